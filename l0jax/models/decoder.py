"""A decoder of today's usual parts, at any widths: norms by the root mean square,
rotary positions, queries that share keys and values, gated feed-forward layers.

Touvron et al. (2023, LLaMA) with the grouped queries of Ainslie et al. (2023). Every
size is that of an array. Blocks may differ in theirs, and a branch of which nothing is
left is not computed.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from l0jax.structure import Structure
from l0jax.units import Groups, Slot

EPSILON = 1e-5
SLOWEST = 10_000.0  # The base of the rotations' frequencies (Su et al. 2021).


class Sizes(NamedTuple):
    """What is there in a block.

    Attributes:
        groups: heads of keys and values.
        queries: heads that share each of them.
        rotations: pairs of dimensions of queries and keys.
        values: dimensions of values.
        hidden: feed-forward units.
    """

    groups: int
    queries: int
    rotations: int
    values: int
    hidden: int


class Constant(nnx.Variable):
    """Numbers of the architecture that are kept as arrays, so that removal takes them
    along and files hold them."""


class Cache(NamedTuple):
    """Keys and values of the positions before, of one block."""

    keys: Float[Array, "batch length groups dim"]
    values: Float[Array, "batch length groups value"]


class Norm(nnx.Module):
    """Division by the root mean square, and a scale.

    Args:
        width: of the stream.
        over: by which the sum of squares is divided; a smaller stream is divided by
            what the whole one was, of which zeros are gone.
    """

    def __init__(self, width: int, over: int):
        self.over = over
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*batch w"]) -> Float[Array, "*batch w"]:
        """Of size about one, but for the scale; computed in float32 or wider."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        squares = jnp.square(wide).sum(-1, keepdims=True) / self.over
        scaled = wide * jax.lax.rsqrt(squares + EPSILON)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return scaled.astype(x.dtype) * scale


class Attention(nnx.Module):
    """Causal attention of grouped queries, with rotary positions."""

    def __init__(self, width: int, sizes: Sizes, depth: int, *, rngs: nnx.Rngs):
        groups, queries, rotations, values, _ = sizes
        self.query = _kernel(rngs, width, (width, groups, queries, 2 * rotations))
        self.key = _kernel(rngs, width, (width, groups, 2 * rotations))
        self.value = _kernel(rngs, width, (width, groups, values))
        # What 2 x depth branches add to the stream has the variance of one.
        inside = groups * queries * values * 2 * depth
        self.out = _kernel(rngs, inside, (groups, queries, values, width))
        exponents = jnp.arange(rotations) / max(rotations, 1)
        self.frequencies = Constant(SLOWEST**-exponents)
        self.scale = Constant(jnp.float32(max(2 * rotations, 1) ** -0.5))

    def __call__(
        self,
        x: Float[Array, "batch length w"],
        positions: Int[Array, " length"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch length w"], Cache]:
        """What is added to the stream, and keys and values to come back to."""
        angles = positions[:, None].astype(jnp.float32) * self.frequencies[None]
        query = turned(jnp.einsum("btw,wgqd->btgqd", x, self.query[...]), angles)
        key = turned(jnp.einsum("btw,wgd->btgd", x, self.key[...]), angles)
        value = jnp.einsum("btw,wgv->btgv", x, self.value[...])
        if cache is not None:
            at = (0, positions[0], 0, 0)
            key = jax.lax.dynamic_update_slice(cache.keys, key, at)
            value = jax.lax.dynamic_update_slice(cache.values, value, at)
        scores = jnp.einsum("btgqd,bsgd->bgqts", query, key)
        scores = scores * self.scale[...].astype(scores.dtype)
        seen = positions[:, None] >= jnp.arange(key.shape[1])[None, :]
        scores = jnp.where(seen[None, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.einsum("bgqts,bsgv->btgqv", weights, value)
        out = jnp.einsum("btgqv,gqvw->btw", mixed, self.out[...])
        return out, Cache(key, value)


class FeedForward(nnx.Module):
    """A gated layer, SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, depth: int, *, rngs: nnx.Rngs):
        self.gate = _kernel(rngs, width, (width, hidden))
        self.up = _kernel(rngs, width, (width, hidden))
        self.down = _kernel(rngs, hidden * 2 * depth, (hidden, width))

    def __call__(
        self, x: Float[Array, "batch length w"]
    ) -> Float[Array, "batch length w"]:
        """What is added to the stream."""
        gate, up = (rowwise(x, kernel[...]) for kernel in (self.gate, self.up))
        return rowwise(jax.nn.silu(gate) * up, self.down[...])


class Block(nnx.Module):
    """Attention, then a feed-forward layer, each added to the stream."""

    def __init__(
        self, width: int, sizes: Sizes, depth: int, over: int, *, rngs: nnx.Rngs
    ):
        self.norm1 = Norm(width, over)
        self.attention = Attention(width, sizes, depth, rngs=rngs)
        self.norm2 = Norm(width, over)
        self.feed_forward = FeedForward(width, sizes.hidden, depth, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length w"],
        positions: Int[Array, " length"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch length w"], Cache | None]:
        """The stream after it, and what the next tokens need of these."""
        if self.attention.out.size:
            more, cache = self.attention(self.norm1(x), positions, cache)
            x = x + more
        if self.feed_forward.down.size:
            x = x + self.feed_forward(self.norm2(x))
        return x, cache


class Decoder(nnx.Module):
    """Logits of the next token, at every position.

    Args:
        vocabulary: number of tokens.
        width: of the stream.
        blocks: what is there in each block.
        length: most positions there may be.
        over: by which norms divide the sum of squares; by default the width.
        rngs: where the initial weights come from.

    Raises:
        ValueError: for a size that is negative, or no position.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        blocks: Sequence[Sequence[int]],
        length: int = 256,
        over: int | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        sizes = [Sizes(*each) for each in blocks]
        for at, each in enumerate(sizes):
            if min(each) < 0:
                raise ValueError(f"block {at} has a negative size: {each}")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        over = width if over is None else over
        self.length = length
        self.embed = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (vocabulary, width))
        )
        self.blocks = nnx.List(
            [Block(width, each, len(sizes), over, rngs=rngs) for each in sizes]
        )
        self.norm = Norm(width, over)
        self.head = _kernel(rngs, width, (width, vocabulary))

    def __call__(
        self, tokens: Int[Array, "batch length"]
    ) -> Float[Array, "batch length vocabulary"]:
        """Logits of the token after each. Those of tokens that the model doesn't know
        are NaN, and of all that come later.

        Raises:
            ValueError: if there are more positions than the model knows.
        """
        if tokens.shape[1] > self.length:
            raise ValueError(
                f"the sequence has {tokens.shape[1]} tokens, and the model "
                f"{self.length} positions"
            )
        positions = jnp.arange(tokens.shape[1])
        x = jnp.take(self.embed[...], tokens, axis=0)
        for block in self.blocks:
            x, _ = block(x, positions)
        return rowwise(self.norm(x), self.head[...])

    def follow(
        self,
        tokens: Int[Array, "batch length"],
        first: Int[Array, ""] | int,
        caches: Sequence[Cache],
    ) -> tuple[Float[Array, "batch vocabulary"], list[Cache]]:
        """Logits of the token after the last of some tokens that follow others.

        Args:
            tokens: those that are new.
            first: the position of the first of them.
            caches: what the blocks remember of those before; see `empty`.

        Raises:
            ValueError: if there are more positions than the model knows, where it can
                be told.
        """
        if isinstance(first, int) and first + tokens.shape[1] > self.length:
            raise ValueError(
                f"{tokens.shape[1]} tokens from position {first} on end beyond the "
                f"{self.length} positions of the model"
            )
        positions = first + jnp.arange(tokens.shape[1])
        x, after = jnp.take(self.embed[...], tokens, axis=0), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, positions, cache)
            after.append(cache)
        return self.norm(x[:, -1]) @ self.head[...], after

    def empty(self, batch: int) -> list[Cache]:
        """What blocks remember before the first token."""
        found = []
        for block in self.blocks:
            of = block.attention
            groups, dim = of.key.shape[1:]
            values = of.value.shape[2]
            found.append(
                Cache(
                    jnp.zeros((batch, self.length, groups, dim), of.key.dtype),
                    jnp.zeros((batch, self.length, groups, values), of.value.dtype),
                )
            )
        return found

    @property
    def sizes(self) -> list[Sizes]:
        """What is left in each block."""
        found = []
        for block in self.blocks:
            of = block.attention
            _, groups, queries, dim = of.query.shape
            hidden = block.feed_forward.up.shape[1]
            found.append(Sizes(groups, queries, dim // 2, of.value.shape[2], hidden))
        return found

    @property
    def architecture(self) -> dict:
        """Arguments of the constructor that rebuild this shape, for files."""
        vocabulary, width = self.embed.shape
        return {
            "vocabulary": vocabulary,
            "width": width,
            "blocks": [list(each) for each in self.sizes],
            "length": self.length,
            "over": self.norm.over,
        }

    def edit(self, structure: Structure) -> Structure:
        """Names for the groups: `stream`, and of each block `heads` (of keys and
        values, with their queries), `queries` (of all heads), `rotations`, `values` and
        `hidden`."""
        names = {"embed:1": "stream"}
        for at in range(len(self.blocks)):
            block = f"block{at}"
            out = f"blocks.{at}.attention.out"
            names |= {
                f"{out}:0": f"{block}.heads",
                f"{out}:1": f"{block}.queries",
                f"{out}:2": f"{block}.values",
                f"blocks.{at}.attention.key:2": f"{block}.rotations",
                f"blocks.{at}.feed_forward.down:0": f"{block}.hidden",
            }
        called = {}
        for name, group in structure.groups.items():
            for slot in group.used_by:
                called.setdefault(name, names.get(f"{slot.path}:{slot.axis}", name))
        return structure.rename(called)

    def charges(self, groups: Groups) -> dict[str, tuple[Slot, ...]]:
        """A unit pays for the weights that read it."""
        return {name: group.used_by for name, group in groups.items()}

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """What the model can be traced with."""
        return jax.ShapeDtypeStruct((2, min(self.length, 8)), jnp.int32)


def _kernel(rngs: nnx.Rngs, inputs: int, shape: tuple[int, ...]) -> nnx.Param:
    """Weights of variance 1 / inputs."""
    drawn = jax.random.normal(rngs.params(), shape)
    return nnx.Param(drawn / max(inputs, 1) ** 0.5)


def rowwise(
    x: Float[Array, "*batch inputs"],
    kernel: Float[Array | np.ndarray, "inputs outputs"],
) -> Float[Array, "*batch outputs"]:
    """A product with the last axis of an array, taken as rows of a matrix: of these
    XLA's CPU computes the kernel's gradient five times as fast."""
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ kernel).reshape(*x.shape[:-1], kernel.shape[1])


def turned(
    x: Float[Array, "batch length *heads dim"], angles: Float[Array, "length half"]
) -> Float[Array, "batch length *heads dim"]:
    """Pairs of dimensions, each of the first half with its one of the second, turned by
    the angles of their positions (Su et al. 2021, eq. 34)."""
    half = angles.shape[-1]
    within = (1, angles.shape[0], *(1,) * (x.ndim - 3), half)
    cos, sin = (f(angles).reshape(within).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def generate(
    model: Decoder,
    prompt: Int[Array, "batch length"] | Int[np.ndarray, "batch length"],
    count: int,
    *,
    key: PRNGKeyArray | None = None,
    temperature: float = 1.0,
) -> Int[Array, "batch count"]:
    """Tokens that go on from a prompt, one at a time, with keys and values of those
    before remembered.

    Args:
        model: of which nothing is changed.
        prompt: at least one token.
        count: how many follow.
        key: to draw them; without, each is the most likely one.
        temperature: by which logits are divided before they are drawn.

    Raises:
        ValueError: for a prompt without tokens, with tokens that the model does not
            have, or for more tokens than it has positions.
    """
    prompt = jnp.asarray(prompt)
    vocabulary, total = model.embed.shape[0], prompt.shape[1] + count
    if not prompt.shape[1]:
        raise ValueError("the prompt is empty; give at least one token")
    if prompt.min() < 0 or prompt.max() >= vocabulary:
        raise ValueError(
            f"the prompt has tokens from {int(prompt.min())} to {int(prompt.max())}; "
            f"the model knows 0 to {vocabulary - 1}"
        )
    if total > model.length:
        raise ValueError(
            f"{prompt.shape[1]} tokens and {count} more are {total}; the model has "
            f"{model.length} positions"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    graph, state = nnx.split(model)
    return _generated(graph, state, prompt, count, key, jnp.float32(temperature))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generated(graph, state, prompt, count, key, temperature):
    model = nnx.merge(graph, state)

    def chosen(logits, at):
        if key is None:
            return logits.argmax(-1)
        drawn = jax.random.fold_in(key, at)
        return jax.random.categorical(drawn, logits / temperature)

    def one(carry, at):
        token, caches = carry
        logits, caches = model.follow(token[:, None], at, caches)
        following = chosen(logits, at + 1)
        return (following, caches), following

    logits, caches = model.follow(prompt, 0, model.empty(len(prompt)))
    first, length = chosen(logits, prompt.shape[1]), prompt.shape[1]
    (_, _), more = jax.lax.scan(one, (first, caches), length + jnp.arange(count - 1))
    return jnp.concatenate([first[:, None], more.T], axis=1)
