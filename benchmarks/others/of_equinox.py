"""Equinox: what its examples put together from its layers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.others import Model, floats, model, tokens


def is_shape(leaf) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def made(make, *inputs, call=None) -> Model:
    """A module by its constructor, mapped over the batch."""
    module = eqx.filter_eval_shape(make)
    params, static = eqx.partition(
        module, lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )
    call = call or (lambda module, *inputs: jax.vmap(module)(*inputs))

    def apply(params, *inputs):
        return call(eqx.combine(params, static), *inputs)

    return Model(apply, params, inputs, fan_out_last=False)


def keys(number):
    return jax.random.split(jax.random.key(0), number)


@model("equinox", published=False)
def equinox_mlp(published):
    width = 300 if published else 6
    return made(lambda: eqx.nn.MLP(4, 2, width, 3, key=jax.random.key(0)), floats(3, 4))


class CNN(eqx.Module):
    """Of the example `mnist`."""

    layers: list

    def __init__(self, maps, widths, flat):
        a, b, c, d = keys(4)
        self.layers = [
            eqx.nn.Conv2d(1, maps, kernel_size=4, key=a),
            eqx.nn.MaxPool2d(kernel_size=2),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Linear(flat, widths[0], key=b),
            jax.nn.sigmoid,
            eqx.nn.Linear(widths[0], widths[1], key=c),
            jax.nn.relu,
            eqx.nn.Linear(widths[1], 10, key=d),
            jax.nn.log_softmax,
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@model("equinox")
def equinox_mnist_cnn(published):
    if published:
        return made(lambda: CNN(3, (512, 64), 1728), floats(2, 1, 28, 28))
    return made(lambda: CNN(3, (9, 7), 3 * 4 * 4), floats(2, 1, 8, 8))


class Recurrent(eqx.Module):
    """Of the example `train_rnn`, with either cell, and logits."""

    cell: eqx.nn.LSTMCell | eqx.nn.GRUCell
    linear: eqx.nn.Linear
    hidden: int = eqx.field(static=True)

    def __init__(self, cell, hidden):
        a, b = keys(2)
        self.hidden = hidden
        self.cell = cell(2, hidden, key=a)
        self.linear = eqx.nn.Linear(hidden, 1, key=b)

    def __call__(self, x):
        start = jnp.zeros(self.hidden)
        pair = isinstance(self.cell, eqx.nn.LSTMCell)
        cell: Any = self.cell
        carry = (start, start) if pair else start
        last, _ = jax.lax.scan(lambda c, row: (cell(row, c), None), carry, x)
        return self.linear(jax.tree.leaves(last)[0])


@model("equinox", published=False)
def equinox_lstm(published):
    hidden = 256 if published else 5
    return made(lambda: Recurrent(eqx.nn.LSTMCell, hidden), floats(2, 6, 2))


@model("equinox")
def equinox_gru(published):
    hidden = 16 if published else 5
    return made(lambda: Recurrent(eqx.nn.GRUCell, hidden), floats(2, 16, 2))


class Encoder(eqx.Module):
    """A layer of the example `bert`: attention and a block, normalised after each."""

    attention: eqx.nn.MultiheadAttention
    norms: list
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    rope: eqx.nn.RotaryPositionalEmbedding | None
    before: bool = eqx.field(static=True)

    def __init__(self, size, heads, width, norm, rope, before):
        a, b, c = keys(3)
        self.attention = eqx.nn.MultiheadAttention(heads, size, key=a)
        self.norms = [norm(size), norm(size)]
        self.up = eqx.nn.Linear(size, width, key=b)
        self.down = eqx.nn.Linear(width, size, key=c)
        self.rope = eqx.nn.RotaryPositionalEmbedding(size // heads) if rope else None
        self.before = before

    def attend(self, x, mask):
        def turned(query, key, value):
            if self.rope is None:
                return query, key, value
            turn = jax.vmap(self.rope, in_axes=1, out_axes=1)
            return turn(query), turn(key), value

        return self.attention(x, x, x, mask, process_heads=turned)

    def feed(self, x):
        return jax.vmap(lambda x: self.down(jax.nn.gelu(self.up(x))))(x)

    def __call__(self, x, mask=None):
        one, two = (jax.vmap(norm) for norm in self.norms)
        if self.before:
            x = x + self.attend(one(x), mask)
            return x + self.feed(two(x))
        x = one(x + self.attend(x, mask))
        return two(x + self.feed(x))


class Bert(eqx.Module):
    """Of the example `bert`."""

    embedding: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    layers: list
    pooler: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, layers, size, heads, width, vocabulary, length):
        a, b, c, d = keys(4)
        self.embedding = eqx.nn.Embedding(vocabulary, size, key=a)
        self.positions = eqx.nn.Embedding(length, size, key=b)
        self.norm = eqx.nn.LayerNorm(size)
        self.layers = [
            Encoder(size, heads, width, eqx.nn.LayerNorm, False, False)
            for _ in range(layers)
        ]
        self.pooler = eqx.nn.Linear(size, size, key=c)
        self.head = eqx.nn.Linear(size, 2, key=d)

    def __call__(self, tokens):
        places = jnp.arange(tokens.shape[0])
        x = jax.vmap(self.embedding)(tokens) + jax.vmap(self.positions)(places)
        x = jax.vmap(self.norm)(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(jnp.tanh(self.pooler(x[0])))


@model("equinox")
def equinox_bert(published):
    """At the sizes of the example: BERT-tiny's."""
    sizes = (2, 128, 2, 512, 30_522, 512) if published else (2, 12, 3, 10, 11, 7)
    return made(lambda: Bert(*sizes), tokens(published))


class Decoder(eqx.Module):
    """A decoder with RMSNorm and rotary positions; logits by the tied embedding."""

    embedding: eqx.nn.Embedding
    layers: list
    norm: eqx.nn.RMSNorm

    def __init__(self, layers, size, heads, width, vocabulary):
        self.embedding = eqx.nn.Embedding(vocabulary, size, key=jax.random.key(0))
        self.layers = [
            Encoder(size, heads, width, eqx.nn.RMSNorm, True, True)
            for _ in range(layers)
        ]
        self.norm = eqx.nn.RMSNorm(size)

    def __call__(self, tokens):
        mask = jnp.tril(jnp.ones((tokens.shape[0],) * 2, bool))
        x = jax.vmap(self.embedding)(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return jax.vmap(self.norm)(x) @ self.embedding.weight.T


@model("equinox", published=False)
def equinox_rope_decoder(published):
    sizes = (8, 512, 8, 2048, 32_000) if published else (2, 12, 3, 10, 11)
    return made(lambda: Decoder(*sizes), tokens(published))


class ViT(eqx.Module):
    """Of the example `vision_transformer`."""

    patch: eqx.nn.Conv2d
    positions: jax.Array
    token: jax.Array
    layers: list
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, layers, size, heads, width, patches, side):
        a, b, c, d = keys(4)
        self.patch = eqx.nn.Conv2d(3, size, side, side, key=a)
        self.positions = jax.random.normal(b, (patches + 1, size))
        self.token = jax.random.normal(c, (1, size))
        self.layers = [
            Encoder(size, heads, width, eqx.nn.LayerNorm, False, True)
            for _ in range(layers)
        ]
        self.norm = eqx.nn.LayerNorm(size)
        self.head = eqx.nn.Linear(size, 10, key=d)

    def __call__(self, x):
        x = self.patch(x)
        x = x.reshape(x.shape[0], -1).T
        x = jnp.concatenate([self.token, x]) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[0]))


@model("equinox")
def equinox_vit(published):
    if published:
        return made(lambda: ViT(6, 512, 8, 256, 64, 4), floats(2, 3, 32, 32))
    return made(lambda: ViT(2, 12, 3, 10, 4, 4), floats(2, 3, 8, 8))


class MixerBlock(eqx.Module):
    """Of the example `score_based_diffusion`."""

    patch: eqx.nn.MLP
    hidden: eqx.nn.MLP
    norms: list

    def __init__(self, patches, size, patch_width, width):
        a, b = keys(2)
        self.patch = eqx.nn.MLP(patches, patches, patch_width, 1, key=a)
        self.hidden = eqx.nn.MLP(size, size, width, 1, key=b)
        self.norms = [eqx.nn.LayerNorm((size, patches)) for _ in range(2)]

    def __call__(self, y):
        y = y + jax.vmap(self.patch)(self.norms[0](y))
        y = self.norms[1](y)
        return (y.T + jax.vmap(self.hidden)(y.T)).T


class Mixer(eqx.Module):
    """Of the example `score_based_diffusion`."""

    into: eqx.nn.Conv2d
    out: eqx.nn.ConvTranspose2d
    blocks: list
    norm: eqx.nn.LayerNorm

    def __init__(self, side, patch, size, patch_width, width, blocks):
        a, b = keys(2)
        patches = (side // patch) ** 2
        self.into = eqx.nn.Conv2d(2, size, patch, stride=patch, key=a)
        self.out = eqx.nn.ConvTranspose2d(size, 1, patch, stride=patch, key=b)
        self.blocks = [
            MixerBlock(patches, size, patch_width, width) for _ in range(blocks)
        ]
        self.norm = eqx.nn.LayerNorm((size, patches))

    def __call__(self, y, t):
        t = jnp.broadcast_to(t / 10.0, (1, *y.shape[1:]))
        y = self.into(jnp.concatenate([y, t]))
        size, height, width = y.shape
        y = y.reshape(size, height * width)
        for block in self.blocks:
            y = block(y)
        return self.out(self.norm(y).reshape(size, height, width))


@model("equinox")
def equinox_mixer(published):
    if published:
        sizes, side = (28, 4, 64, 512, 512, 4), 28
    else:
        sizes, side = (8, 4, 6, 7, 9, 2), 8
    return made(lambda: Mixer(*sizes), floats(2, 1, side, side), floats(2))


class ResidualGroupNorm(eqx.Module):
    """Residual blocks with GroupNorm."""

    stem: eqx.nn.Conv2d
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, width, groups, blocks):
        a, b, c = keys(3)
        self.stem = eqx.nn.Conv2d(3, width, 3, padding=1, key=a)
        self.blocks = [
            [
                eqx.nn.GroupNorm(groups, width),
                eqx.nn.Conv2d(width, width, 3, padding=1, key=key),
            ]
            for key in jax.random.split(b, blocks)
        ]
        self.head = eqx.nn.Linear(width, 5, key=c)

    def __call__(self, x):
        x = self.stem(x)
        for norm, conv in self.blocks:
            x = x + conv(jax.nn.silu(norm(x)))
        return self.head(x.mean((1, 2)))


@model("equinox", published=False)
def equinox_group_norm_resnet(published):
    side, sizes = (32, (64, 8, 8)) if published else (6, (8, 4, 2))
    return made(lambda: ResidualGroupNorm(*sizes), floats(2, 3, side, side))


class Generator(eqx.Module):
    """As in the example `deep_convolutional_gan`, with GroupNorm."""

    layers: list

    def __init__(self, latent, width):
        names = [(latent, 4 * width, 1, 0), (4 * width, 2 * width, 2, 1)]
        self.layers = []
        for key, (a, b, stride, pad) in zip(keys(2), names, strict=True):
            conv = eqx.nn.ConvTranspose2d(a, b, 4, stride, pad, use_bias=False, key=key)
            self.layers += [conv, eqx.nn.GroupNorm(b, b), jax.nn.relu]
        last = eqx.nn.ConvTranspose2d(2 * width, 1, 4, 2, 1, key=jax.random.key(1))
        self.layers += [last, jnp.tanh]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@model("equinox", published=False)
def equinox_gan_generator(published):
    sizes = (100, 64) if published else (5, 3)
    return made(lambda: Generator(*sizes), floats(2, sizes[0], 1, 1))


@model("equinox", published=False)
def equinox_batch_norm_network(published):
    """A network with BatchNorm's running statistics as state."""
    width = 64 if published else 6

    class Net(eqx.Module):
        one: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        two: eqx.nn.Linear

        def __init__(self):
            a, b = keys(2)
            self.one = eqx.nn.Linear(4, width, key=a)
            self.norm = eqx.nn.BatchNorm(width, "batch", mode="ema")
            self.two = eqx.nn.Linear(width, 3, key=b)

        def __call__(self, x, state):
            x, state = self.norm(self.one(x), state, inference=True)
            return self.two(jax.nn.relu(x)), state

    module, state = eqx.nn.make_with_state(Net)()
    state = jax.tree.map(jnp.ones_like, state)
    params, static = eqx.partition((module, state), eqx.is_array)

    def apply(params, x):
        module, state = eqx.combine(params, static)
        mapped = jax.vmap(module, (0, None), (0, None), axis_name="batch")
        return mapped(x, state)[0]

    return Model(apply, params, (floats(3, 4),), fan_out_last=False)
