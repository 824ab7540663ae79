"""Haiku: its networks, and what its examples put together from its layers."""

import haiku as hk
import jax
import jax.numpy as jnp

from benchmarks.others import Model, floats, image, model, tokens


def made(function, *inputs, statistics: bool = False) -> Model:
    """A function of Haiku; of inputs and `is_training` if it has running statistics."""
    net = hk.transform_with_state(function)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def init(key, *inputs):
        return net.init(key, *inputs, *((True,) if statistics else ()))

    params, state = jax.eval_shape(init, key, *inputs)

    def apply(both, *inputs):
        return net.apply(*both, None, *inputs, *((False,) if statistics else ()))[0]

    return Model(apply, (params, state), inputs)


def classes(published: bool) -> int:
    return 1000 if published else 5


def resnet(network, **options):
    def make(published):
        return made(
            lambda x, training: network(classes(published), **options)(x, training),
            image(published),
            statistics=True,
        )

    return make


@model("dm-haiku")
def haiku_resnet18_v1(published):
    return resnet(hk.nets.ResNet18)(published)


@model("dm-haiku")
def haiku_resnet18_v2(published):
    return resnet(hk.nets.ResNet18, resnet_v2=True)(published)


@model("dm-haiku")
def haiku_resnet50_v1(published):
    return resnet(hk.nets.ResNet50)(published)


@model("dm-haiku")
def haiku_resnet50_v2(published):
    return resnet(hk.nets.ResNet50, resnet_v2=True)(published)


@model("dm-haiku")
def haiku_mobilenet_v1(published):
    strides = (1, 2, 1, 2, 1, 2, *5 * (1,), 2, 1)
    channels = (64, 128, 128, 256, 256, 512, *5 * (512,), 1024, 1024)
    if not published:
        strides, channels = strides[:5], (8, 12, 12, 16, 10)

    def function(x, training):
        network = hk.nets.MobileNetV1(strides, channels, classes(published))
        return network(x, is_training=training)

    return made(function, image(published), statistics=True)


@model("dm-haiku")
def haiku_mlp(published):
    sizes = (300, 100, 10) if published else (9, 7, 3)
    inputs = floats(2, 784 if published else 12)
    return made(lambda x: hk.nets.MLP(sizes, activation=jax.nn.gelu)(x), inputs)


@model("dm-haiku")
def haiku_transformer(published):
    """The decoder of `examples/transformer`, at the sizes of its training script, and
    30 000 words of LM1B."""
    layers, heads, size, width, vocabulary = (
        (6, 4, 64, 256, 30_000) if published else (2, 3, 4, 12, 11)
    )

    def norm(x):
        return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)

    def function(tokens):
        start = hk.initializers.VarianceScaling(2 / layers)
        length = tokens.shape[1]
        h = hk.Embed(vocabulary, width)(tokens)
        h = h + hk.get_parameter("positions", [length, width], init=start)
        mask = jnp.tril(jnp.ones((1, 1, length, length)))
        for _ in range(layers):
            attention = hk.MultiHeadAttention(heads, size, w_init=start)
            normed = norm(h)
            h = h + attention(normed, normed, normed, mask=mask)
            dense = hk.Sequential([hk.Linear(4 * width), jax.nn.gelu, hk.Linear(width)])
            h = h + dense(norm(h))
        return hk.Linear(vocabulary)(norm(h))

    return made(function, tokens(published))


@model("dm-haiku")
def haiku_lstm_language_model(published):
    """The `examples/rnn` character model: two LSTMs, unrolled in a scan."""
    hidden, vocabulary = (256, 128) if published else (6, 11)

    def function(tokens):
        core = hk.DeepRNN(
            [
                hk.LSTM(hidden),
                jax.nn.relu,
                hk.LSTM(hidden),
                hk.nets.MLP([hidden, vocabulary]),
            ]
        )
        x = jax.nn.one_hot(tokens, vocabulary)
        start = core.initial_state(tokens.shape[0])
        return hk.dynamic_unroll(core, x, start, time_major=False)[0]

    return made(function, tokens(published))


@model("dm-haiku", published=False)
def haiku_gru_classifier(published):
    hidden = 128 if published else 6

    def function(x):
        core = hk.GRU(hidden)
        start = core.initial_state(x.shape[0])
        _, last = hk.dynamic_unroll(core, x, start, time_major=False)
        return hk.Linear(4)(last)

    return made(function, floats(2, 5, 3))


@model("dm-haiku")
def haiku_vq_vae(published):
    """The encoder, quantiser and decoder of `examples/vqvae_example.ipynb`."""
    hidden, inner, blocks, width, codes = (
        (128, 32, 2, 64, 512) if published else (8, 5, 1, 6, 9)
    )

    def residual(h):
        for _ in range(blocks):
            y = hk.Conv2D(inner, 3)(jax.nn.relu(h))
            h = h + hk.Conv2D(hidden, 1)(jax.nn.relu(y))
        return jax.nn.relu(h)

    def function(x):
        h = jax.nn.relu(hk.Conv2D(hidden // 2, 4, 2)(x))
        h = jax.nn.relu(hk.Conv2D(hidden, 4, 2)(h))
        h = residual(hk.Conv2D(hidden, 3)(h))
        h = hk.Conv2D(width, 1)(h)
        quantizer = hk.nets.VectorQuantizer(width, codes, commitment_cost=0.25)
        h = quantizer(h, is_training=False)["quantize"]
        h = residual(hk.Conv2D(hidden, 3)(h))
        h = jax.nn.relu(hk.Conv2DTranspose(hidden // 2, 4, 2)(h))
        return hk.Conv2DTranspose(3, 4, 2)(h)

    return made(function, image(published, 16, 32))


@model("dm-haiku", published=False)
def haiku_group_norm_network(published):
    """Convolutions, separable ones too, each followed by GroupNorm."""
    width = 64 if published else 8

    def function(x):
        for scale in (1, 2):
            x = hk.Conv2D(width * scale, 3, 2)(x)
            x = jax.nn.silu(hk.GroupNorm(4)(x))
            x = hk.SeparableDepthwiseConv2D(1, 3)(x)
            x = jax.nn.silu(hk.InstanceNorm(True, True)(x))
        return hk.Linear(5)(x.mean((1, 2)))

    return made(function, image(published, 16, 64))
