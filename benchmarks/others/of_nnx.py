"""Flax NNX: what its guides put together from its layers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.others import Model, floats, image, model, tokens


def made(make, *inputs) -> Model:
    """A module by its constructor, as a function of its arrays."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def apply(state, *inputs):
        return nnx.merge(graph, state)(*inputs)

    return Model(apply, nnx.to_pure_dict(state), inputs)


class CNN(nnx.Module):
    """Of the guide `mnist_tutorial`, with BatchNorm."""

    def __init__(self, maps, hidden, flat, rngs):
        one, two = maps
        self.conv1 = nnx.Conv(1, one, kernel_size=(3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(one, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(one, two, kernel_size=(3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(two, use_running_average=True, rngs=rngs)
        self.linear1 = nnx.Linear(flat, hidden, rngs=rngs)
        self.linear2 = nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(self, x):
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = nnx.relu(norm(conv(x)))
            x = nnx.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        return self.linear2(nnx.relu(self.linear1(x.reshape(x.shape[0], -1))))


@model("flax")
def nnx_mnist_cnn(published):
    if published:
        return made(lambda r: CNN((32, 64), 256, 3136, r), floats(2, 28, 28, 1))
    return made(lambda r: CNN((4, 6), 9, 24, r), floats(2, 8, 8, 1))


class Block(nnx.Module):
    """Of the tutorial on a small GPT, with either norm before each part."""

    def __init__(self, norm, size, heads, width, gated, rngs):
        self.norm1, self.norm2 = norm(size, rngs=rngs), norm(size, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, size, decode=False, rngs=rngs)
        self.up = nnx.Linear(size, width, rngs=rngs)
        self.gate = nnx.Linear(size, width, rngs=rngs) if gated else None
        self.down = nnx.Linear(width, size, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask=mask)
        y = self.norm2(x)
        up = nnx.gelu(self.up(y)) if self.gate is None else self.up(y)
        up = up if self.gate is None else nnx.silu(self.gate(y)) * up
        return x + self.down(up)


class GPT(nnx.Module):
    """Of the tutorial on a small GPT; logits by the tied embedding or a layer."""

    def __init__(
        self, norm, layers, size, heads, width, vocabulary, length, tied, gated, rngs
    ):
        self.embedding = nnx.Embed(vocabulary, size, rngs=rngs)
        self.positions = nnx.Embed(length, size, rngs=rngs)
        self.blocks = nnx.List(
            Block(norm, size, heads, width, gated, rngs) for _ in range(layers)
        )
        self.norm = norm(size, rngs=rngs)
        self.head = None if tied else nnx.Linear(size, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        length = tokens.shape[1]
        x = self.embedding(tokens) + self.positions(jnp.arange(length))[None]
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        return self.embedding.attend(x) if self.head is None else self.head(x)


def gpt(published, norm, **options):
    sizes = (12, 768, 12, 3072, 50_257, 1024) if published else (2, 12, 3, 10, 11, 7)
    return made(lambda r: GPT(norm, *sizes, **options, rngs=r), tokens(published))


@model("flax")
def nnx_gpt(published):
    """At the sizes of GPT-2."""
    return gpt(published, nnx.LayerNorm, tied=False, gated=False)


@model("flax", published=False)
def nnx_gpt_tied_rms_norm(published):
    return gpt(published, nnx.RMSNorm, tied=True, gated=True)


class VisionTransformer(nnx.Module):
    """Of the tutorial on a vision transformer."""

    def __init__(self, layers, size, heads, width, patches, side, classes, rngs):
        window = (side, side)
        self.patches = nnx.Conv(3, size, window, strides=window, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, size)))
        self.positions = nnx.Param(jnp.zeros((1, patches + 1, size)))
        self.blocks = nnx.List(
            Block(nnx.LayerNorm, size, heads, width, False, rngs) for _ in range(layers)
        )
        self.norm = nnx.LayerNorm(size, rngs=rngs)
        self.head = nnx.Linear(size, classes, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.tile(self.token[...], [x.shape[0], 1, 1])
        x = jnp.concatenate([token, x], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.norm(x[:, 0]))


@model("flax")
def nnx_vision_transformer(published):
    """At the sizes of ViT-B/16."""
    if published:
        sizes = (12, 768, 12, 3072, 196, 16, 1000)
        return made(lambda r: VisionTransformer(*sizes, r), image(True))
    return made(lambda r: VisionTransformer(2, 12, 3, 10, 4, 4, 5, r), image(False, 8))


class Recurrent(nnx.Module):
    """A cell in `nnx.RNN`, in both directions if asked, and a head."""

    def __init__(self, cell, vocabulary, size, hidden, both, rngs):
        self.embedding = nnx.Embed(vocabulary, size, rngs=rngs)
        one = nnx.RNN(cell(size, hidden, rngs=rngs))
        other = nnx.RNN(cell(size, hidden, rngs=rngs))
        self.rnn = nnx.Bidirectional(one, other) if both else one
        self.head = nnx.Linear(2 * hidden if both else hidden, 3, rngs=rngs)

    def __call__(self, tokens):
        outputs: Any = self.rnn(self.embedding(tokens))
        return self.head(outputs[:, -1])


def recurrent(published, cell, both):
    sizes = (10_000, 128, 256) if published else (11, 5, 6)
    return made(lambda r: Recurrent(cell, *sizes, both, r), tokens(published))


@model("flax", published=False)
def nnx_bidirectional_lstm(published):
    return recurrent(published, nnx.OptimizedLSTMCell, both=True)


@model("flax", published=False)
def nnx_gru(published):
    return recurrent(published, nnx.GRUCell, both=False)


class LoRANetwork(nnx.Module):
    """Layers with low-rank adapters, as in the guide on LoRA."""

    def __init__(self, size, rank, hidden, rngs):
        self.one = nnx.LoRALinear(size, hidden, lora_rank=rank, rngs=rngs)
        self.two = nnx.LoRALinear(hidden, hidden, lora_rank=rank, rngs=rngs)
        self.head = nnx.Linear(hidden, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.two(nnx.relu(self.one(x)))))


@model("flax", published=False)
def nnx_lora(published):
    sizes = (784, 8, 300) if published else (4, 2, 7)
    return made(lambda r: LoRANetwork(*sizes, r), floats(2, sizes[0]))


class Autoencoder(nnx.Module):
    """Convolutions down and transposed ones up, with InstanceNorm and PReLU."""

    def __init__(self, width, rngs):
        self.down = nnx.Conv(3, width, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.InstanceNorm(width, rngs=rngs)
        self.prelu = nnx.PReLU()
        self.middle = nnx.Einsum("bhwc,cd->bhwd", (width, width), (width,), rngs=rngs)
        self.up = nnx.ConvTranspose(width, 3, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x):
        x = self.prelu(self.norm(self.down(x)))
        return self.up(jax.nn.gelu(self.middle(x)))


@model("flax", published=False)
def nnx_autoencoder(published):
    width = 64 if published else 6
    return made(lambda r: Autoencoder(width, r), image(published, 8, 64))
