# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Smaller transformers
#
# A decoder has five kinds of units: the residual stream, heads, the dimensions of
# queries and keys, those of values, and feed-forward units. All of them can be taken
# out exactly, the stream too, though every norm is a mean over it, and whole blocks.
# This notebook
#
# 1. trains a small decoder on text, character by character;
# 2. reads its units, whose kinds nobody states;
# 3. takes out a quarter of the stream, half of the heads, and one whole block;
# 4. checks that nothing else has changed, and what it is worth;
# 5. saves the smaller function, loads it, and trains on.
#
# It runs in a minute on one CPU core, and downloads nothing: the text is the reference
# of the language that Python brings along.

# %%
import tempfile
import time
from pydoc_data import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import l0jax
from experiments.reports import style
from l0jax import costs, storage

plt.rcParams.update(style.STYLE)

# %% [markdown]
# ## 1. A decoder
#
# Norms by the root mean square, rotary positions, gated feed-forward layers: today's
# usual parts, in ordinary Flax.

# %%
text = "".join(topics.topics[name] for name in sorted(topics.topics))
characters = sorted({*text})
encoded = np.array([characters.index(each) for each in text], np.int32)
fit, held_out = encoded[: -len(encoded) // 10], encoded[-len(encoded) // 10 :]
WIDTH, HEADS, DIM, HIDDEN, DEPTH, LENGTH = 64, 4, 16, 160, 4, 64
print(f"{len(fit):,} characters of {len(characters)} kinds, {len(held_out):,} held out")


# %%
def rotated(x):
    """Pairs of dimensions turned by an angle for each position."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] / 100.0 ** (jnp.arange(half) / half)
    cos, sin = (f(angles)[None, :, None] for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Block(nnx.Module):
    """Attention to what came before, then a gated feed-forward layer."""

    def __init__(self, rngs):
        def dense(inputs, outputs, axis=-1):
            return nnx.LinearGeneral(
                inputs, outputs, axis=axis, use_bias=False, rngs=rngs
            )

        self.norm1 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.q, self.k, self.v = (dense(WIDTH, (HEADS, DIM)) for _ in range(3))
        self.out = dense((HEADS, DIM), WIDTH, axis=(-2, -1))
        self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate, self.up = dense(WIDTH, HIDDEN), dense(WIDTH, HIDDEN)
        self.down = dense(HIDDEN, WIDTH)

    def __call__(self, x):
        h = self.norm1(x)
        q, k, v = rotated(self.q(h)), rotated(self.k(h)), self.v(h)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / DIM**0.5
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -1e9))
        x = x + self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v))
        h = self.norm2(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


class Decoder(nnx.Module):
    """Logits of the next character, at every position."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(len(characters), WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(DEPTH)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, len(characters), use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# %%
def loss_of(module, tokens):
    """Nats a character."""
    logits = module(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def trained(module, steps, rate, seed):
    """Trains a module in place; gives the loss of every step."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    optimizer = optax.adamw(optax.cosine_decay_schedule(rate, steps))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(
            lambda p: loss_of(nnx.merge(graph, p, rest), tokens)
        )(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng, losses = np.random.default_rng(seed), []
    for _ in range(steps):
        starts = rng.integers(0, len(fit) - LENGTH - 1, 16)
        batch = np.stack([fit[at : at + LENGTH + 1] for at in starts])
        params, state, loss = step(params, state, batch)
        losses.append(loss)
    nnx.update(module, params)
    return [float(loss) for loss in losses]


def error(module):
    """Nats a character, of 256 pieces of text that were held out."""
    pieces = held_out[: 256 * (LENGTH + 1)].reshape(256, LENGTH + 1)
    graph, state = nnx.split(module)
    return float(jax.jit(lambda s, x: loss_of(nnx.merge(graph, s), x))(state, pieces))


model = Decoder(nnx.Rngs(0))
first = trained(model, steps=400, rate=3e-3, seed=0)
print(f"{error(model):.2f} nats a character; {np.log(len(characters)):.2f} by chance")

# %% [markdown]
# ## 2. Its units
#
# The stream lies in every norm, and in every kernel that reads it or writes to it. Its
# gates stand on both sides: what a norm makes of zeros is not zero, once it is scaled
# and shifted.

# %%
tokens = jnp.asarray(held_out[: 8 * LENGTH].reshape(8, LENGTH))
structure = l0jax.trace(model, tokens)
print(structure)

# %%
print(structure.kinds)

# %% [markdown]
# ## 3. What goes
#
# Scores are the sizes of the weights that read a unit: simple, and good enough to show
# what removal is. (Learned gates choose better: see the other notebooks.) Of the third
# block all heads and all feed-forward units go, and so does the block, with its norms.


# %%
def score(group):
    params = nnx.state(model)
    return l0jax.units.charge(jnp.square, params, group.used_by, group.size)


def best(group, share):
    """Flags of the units with the largest scores."""
    order = np.argsort(-np.asarray(score(group)))
    return np.isin(np.arange(group.size), order[: round(share * group.size)])


SHARES = {"stream": 0.75, "heads": 0.5}
keep = {
    name: best(structure.groups[name], SHARES[kind])
    for name, kind in structure.kinds.items()
    if kind in SHARES
}
for name, kind in structure.kinds.items():
    if name.startswith("blocks.2.") and kind in ("heads", "feed-forward"):
        keep[name] = np.zeros(structure.groups[name].size, bool)
for name, flags in keep.items():
    print(f"{name:12} {structure.kinds[name]:13} {flags.sum():3} of {flags.size}")

# %% [markdown]
# ## 4. What is left
#
# With closed gates folded in, the large module and the smaller one are one function. A
# module of the same class would take its means over 48 units rather than 64, so that
# the smaller function is a `Narrowed` module: the program that was traced, at its new
# sizes.

# %%
z = {name: jnp.float32(flags) for name, flags in keep.items()}
gated = l0jax.nnx.fold(model, z, structure.groups)
small = l0jax.nnx.Narrowed(structure, gated, keep)

expected, found = gated(tokens), small(tokens)
difference = float(abs(expected - found).max() / abs(expected).max())
print(f"largest difference over the largest logit: {difference:.1e}")
assert difference < 1e-5


# %%
def seconds(module, turns=20):
    """The median of some calls."""
    graph, state = nnx.split(module)
    call = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    jax.block_until_ready(call(state, tokens))
    spent = []
    for _ in range(turns):
        begun = time.perf_counter()
        jax.block_until_ready(call(state, tokens))
        spent.append(time.perf_counter() - begun)
    return float(np.median(spent))


def table(cost, name):
    before, after = costs.exact(structure, {}, cost), costs.exact(structure, keep, cost)
    print(f"{name:14} {before:12,} -> {after:12,}   {before / after:.1f} times fewer")


table(costs.params, "parameters")
table(costs.macs, "MACs a text")
slow, fast = seconds(gated), seconds(small)
print(f"milliseconds   {1e3 * slow:12.1f} -> {1e3 * fast:12.1f}")

# %% [markdown]
# Of the third block, norms are gone as well: their arrays have no elements.

# %%
print({path: a.shape for path, a in small.function[1].items() if "blocks.2." in path})

# %% [markdown]
# ## 5. Saved, loaded, trained on
#
# The function is written as StableHLO with its arrays, for batches of any size, and has
# its derivatives. The module trains like any other.

# %%
with tempfile.TemporaryDirectory() as folder:
    storage.save_function(*small.function, tokens, folder=folder)
    loaded = storage.load(folder)
    same = bool(jnp.allclose(loaded(tokens[:3]), small(tokens[:3]), atol=1e-5))
print("the loaded function gives the same for a batch of three:", same)
assert same

# %%
before = error(model)
cut = error(small)
second = trained(small, steps=200, rate=1e-3, seed=1)
after = error(small)
print(f"nats a character: {before:.2f} whole, {cut:.2f} cut, {after:.2f} trained on")

# %%
fig, axis = plt.subplots(figsize=(8, 4))


def smooth(losses):
    return np.convolve(losses, np.ones(20) / 20, mode="valid")


axis.plot(np.arange(len(first) - 19) + 10, smooth(first), label="whole")
axis.plot(
    len(first) + np.arange(len(second) - 19) + 10,
    smooth(second),
    label="cut, trained on",
)
axis.set_xlabel("step")
axis.set_ylabel("nats a character, mean of 20 steps")
axis.set_ylim(1, 4)
axis.set_title("A quarter of the stream, half of the heads and one block removed")
axis.legend()
plt.show()
