"""Flax Linen: what its examples put together from its layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.others import Model, floats, image, model, tokens


def made(module: nn.Module, *inputs) -> Model:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Model(module.apply, jax.eval_shape(module.init, key, *inputs), inputs)


class CNN(nn.Module):
    """Of the example `mnist`."""

    maps: tuple[int, int]
    hidden: int

    @nn.compact
    def __call__(self, x):
        for maps in self.maps:
            x = nn.relu(nn.Conv(maps, (3, 3))(x))
            x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(10)(nn.relu(nn.Dense(self.hidden)(x)))


@model("flax")
def linen_mnist_cnn(published):
    if published:
        return made(CNN((32, 64), 256), floats(2, 28, 28, 1))
    return made(CNN((4, 6), 9), floats(2, 8, 8, 1))


class VAE(nn.Module):
    """Of the example `vae`; the noise is an input."""

    hidden: int
    latents: int
    pixels: int

    @nn.compact
    def __call__(self, x, noise):
        h = nn.relu(nn.Dense(self.hidden)(x))
        mean, log_variance = nn.Dense(self.latents)(h), nn.Dense(self.latents)(h)
        z = mean + noise * jnp.exp(0.5 * log_variance)
        out = nn.Dense(self.pixels)(nn.relu(nn.Dense(self.hidden)(z)))
        return out, mean, log_variance


@model("flax")
def linen_vae(published):
    sizes = (500, 20, 784) if published else (7, 3, 12)
    return made(VAE(*sizes), floats(2, sizes[2]), floats(2, sizes[1]))


class ActorCritic(nn.Module):
    """Of the example `ppo`."""

    maps: tuple[int, int, int]
    hidden: int

    @nn.compact
    def __call__(self, x):
        x = x / 255.0
        layers = ((8, 4), (4, 2), (3, 1))
        for maps, (side, stride) in zip(self.maps, layers, strict=True):
            shape, strides = (side, side), (stride, stride)
            x = nn.relu(nn.Conv(maps, shape, strides, padding="VALID")(x))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape((x.shape[0], -1))))
        return nn.log_softmax(nn.Dense(4)(x)), nn.Dense(1)(x)


@model("flax")
def linen_ppo_actor_critic(published):
    if published:
        return made(ActorCritic((32, 64, 64), 512), floats(2, 84, 84, 4))
    return made(ActorCritic((4, 6, 5), 9), floats(2, 36, 36, 2))


class ResNetBlock(nn.Module):
    filters: int
    strides: int

    @nn.compact
    def __call__(self, x):
        def norm(**options: Any) -> nn.BatchNorm:
            return nn.BatchNorm(use_running_average=True, epsilon=1e-5, **options)

        shortcut, strides = x, (self.strides, self.strides)
        y = nn.Conv(self.filters, (1, 1), use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = nn.Conv(self.filters, (3, 3), strides, use_bias=False)(y)
        y = nn.relu(norm()(y))
        y = nn.Conv(4 * self.filters, (1, 1), use_bias=False)(y)
        y = norm(scale_init=nn.initializers.zeros_init())(y)
        if shortcut.shape != y.shape:
            shortcut = nn.Conv(4 * self.filters, (1, 1), strides, use_bias=False)(x)
            shortcut = norm()(shortcut)
        return nn.relu(shortcut + y)


class ResNet(nn.Module):
    """Of the example `imagenet`."""

    stages: tuple[int, ...]
    filters: int
    classes: int

    @nn.compact
    def __call__(self, x):
        padding = [(3, 3), (3, 3)]
        x = nn.Conv(self.filters, (7, 7), (2, 2), padding=padding, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                strides = 2 if i > 0 and j == 0 else 1
                x = ResNetBlock(self.filters * 2**i, strides)(x)
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


@model("flax")
def linen_resnet50(published):
    if published:
        return made(ResNet((3, 4, 6, 3), 64, 1000), image(True))
    return made(ResNet((1, 2), 4, 5), image(False, 16))


class MLPBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        size = x.shape[-1]
        return nn.Dense(size)(nn.relu(nn.Dense(self.width)(x)))


def sinusoids(length: int, size: int):
    places = jnp.arange(length)[:, None]
    scale = jnp.exp(jnp.arange(size // 2) * -(jnp.log(10_000.0) / (size // 2 - 1)))
    return jnp.concatenate([jnp.sin(places * scale), jnp.cos(places * scale)], axis=1)


class LM1B(nn.Module):
    """The decoder of the example `lm1b`: fixed positions, logits by its embedding."""

    layers: int
    size: int
    heads: int
    width: int
    vocabulary: int
    tied: bool

    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(self.vocabulary, self.size)
        before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        y = embedding(before) + sinusoids(tokens.shape[1], self.size)
        mask = nn.combine_masks(
            nn.make_attention_mask(tokens > 0, tokens > 0),
            nn.make_causal_mask(tokens),
        )
        for _ in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(self.heads, use_bias=False)
            attended: Any = attention(nn.LayerNorm()(y), mask=mask)
            y = y + attended
            y = y + MLPBlock(self.width)(nn.LayerNorm()(y))
        y = nn.LayerNorm()(y)
        if self.tied:
            return embedding.attend(y) / jnp.sqrt(self.size)
        return nn.Dense(self.vocabulary)(y)


@model("flax")
def linen_lm1b(published):
    sizes = (6, 512, 8, 2048, 30_000) if published else (2, 12, 3, 10, 11)
    return made(LM1B(*sizes, tied=False), tokens(published))


@model("flax")
def linen_lm1b_tied(published):
    sizes = (6, 512, 8, 2048, 30_000) if published else (2, 12, 3, 10, 11)
    return made(LM1B(*sizes, tied=True), tokens(published))


class WMT(nn.Module):
    """The encoder and decoder of the example `wmt`, one embedding for all."""

    layers: int
    size: int
    heads: int
    width: int
    vocabulary: int

    @nn.compact
    def __call__(self, source, target):
        embedding = nn.Embed(self.vocabulary, self.size)

        def attend(x, *others, mask) -> Any:
            attention = nn.MultiHeadDotProductAttention(self.heads, use_bias=False)
            return attention(nn.LayerNorm()(x), *others, mask=mask)

        x = embedding(source) + sinusoids(source.shape[1], self.size)
        mask = nn.make_attention_mask(source > 0, source > 0)
        for _ in range(self.layers):
            x = x + attend(x, mask=mask)
            x = x + MLPBlock(self.width)(nn.LayerNorm()(x))
        encoded = nn.LayerNorm()(x)
        y = embedding(target) + sinusoids(target.shape[1], self.size)
        causal = nn.make_causal_mask(target)
        across = nn.make_attention_mask(target > 0, source > 0)
        for _ in range(self.layers):
            y = y + attend(y, mask=causal)
            y = y + attend(y, encoded, mask=across)
            y = y + MLPBlock(self.width)(nn.LayerNorm()(y))
        return embedding.attend(nn.LayerNorm()(y)) / jnp.sqrt(self.size)


@model("flax")
def linen_wmt(published):
    sizes = (6, 1024, 16, 4096, 32_000) if published else (1, 12, 3, 10, 11)
    return made(WMT(*sizes), tokens(published), tokens(published, 5))


class BiLSTM(nn.Module):
    """The text classifier of the example `sst2`: a two-way LSTM and attention."""

    vocabulary: int
    embedding: int
    hidden: int

    @nn.compact
    def __call__(self, tokens, lengths):
        embedded = nn.Embed(self.vocabulary, self.embedding)(tokens)
        forward = nn.RNN(nn.OptimizedLSTMCell(self.hidden))
        backward = nn.RNN(
            nn.OptimizedLSTMCell(self.hidden), reverse=True, keep_order=True
        )
        x: Any = nn.Bidirectional(forward, backward)(embedded, seq_lengths=lengths)
        keys: Any = nn.Dense(self.hidden, use_bias=False)(x)
        scores = nn.Dense(1, use_bias=False)(nn.tanh(keys))[..., 0]
        mask = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        weights = nn.softmax(jnp.where(mask, scores, -jnp.inf))
        pooled = jnp.sum(x * weights[..., None], axis=1)
        return nn.Dense(1)(nn.tanh(nn.Dense(self.hidden)(pooled)))


@model("flax")
def linen_sst2(published):
    sizes = (16_000, 300, 256) if published else (11, 5, 6)
    lengths = jnp.array([3, 7], jnp.int32)
    return made(BiLSTM(*sizes), tokens(published), lengths)


class Seq2Seq(nn.Module):
    """Of the example `seq2seq`, with the target given."""

    hidden: int
    vocabulary: int

    @nn.compact
    def __call__(self, source, target):
        encoder = nn.RNN(nn.LSTMCell(self.hidden), return_carry=True)
        carry, _ = encoder(source)
        decoder = nn.RNN(nn.LSTMCell(self.hidden))
        outputs: Any = decoder(target, initial_carry=carry)
        return nn.Dense(self.vocabulary)(outputs)


@model("flax")
def linen_seq2seq(published):
    hidden, vocabulary = (512, 15) if published else (6, 5)
    inputs = floats(2, 6, vocabulary), floats(2, 4, vocabulary)
    return made(Seq2Seq(hidden, vocabulary), *inputs)


class UNet(nn.Module):
    """A U-Net of one convolution a level, with GroupNorm, and of transposed ones."""

    widths: tuple[int, ...]
    groups: int
    activation: Callable = nn.silu

    @nn.compact
    def __call__(self, x):
        def block(x, width):
            x = nn.Conv(width, (3, 3))(x)
            return self.activation(nn.GroupNorm(self.groups)(x))

        skips = []
        for width in self.widths[:-1]:
            x = block(x, width)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = block(x, self.widths[-1])
        for width in reversed(self.widths[:-1]):
            x = nn.ConvTranspose(width, (2, 2), (2, 2))(x)
            x = block(jnp.concatenate([skips.pop(), x], axis=-1), width)
        return nn.Conv(2, (1, 1))(x)


@model("flax", published=False)
def linen_group_norm_unet(published):
    if published:
        return made(UNet((64, 128, 256, 512), 32), image(True, side=128))
    return made(UNet((4, 6), 2), image(False, 8))
