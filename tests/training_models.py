"""Networks that users would train, for the tests of training: of NNX, of Linen, and as
plain functions, on the bundled 8x8 digits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from sklearn.datasets import load_digits

from l0jax import train


@functools.cache
def digits():
    """Images and labels, the last 297 for validation."""
    found = load_digits()
    images = (found.images[..., None] / 16).astype(np.float32)
    return images, found.target.astype(np.int32)


def batches(epoch, size=100, examples=1500):
    """The batches of an epoch, always the same."""
    images, labels = digits()
    order = np.random.default_rng(epoch).permutation(examples)
    for rows in order[: examples // size * size].reshape(-1, size):
        yield images[rows], labels[rows]


def validation():
    images, labels = digits()
    return [(images[1500:], labels[1500:])]


EXAMPLE = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)


def scored(logits, labels):
    value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return value, {"error": (logits.argmax(-1) != labels).mean()}


def loss(model, batch):
    images, labels = batch
    return scored(model(images), labels)


def loss_of_linen(apply, batch):
    images, labels = batch
    return scored(apply(images, train=True), labels)


class ConvNet(nnx.Module):
    """Convolutions with batch normalisation and dropout."""

    def __init__(self, rngs, dropout=0.2):
        self.first = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.other = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.out = nnx.Linear(16 * 4, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        x = nnx.relu(self.other(self.second(x)))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.out(self.dropout(x.reshape(x.shape[0], -1)))


class Perceptron(nnx.Module):
    """Two hidden layers, and nothing that is written."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 48, rngs=rngs)
        self.second = nnx.Linear(48, 32, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x.reshape(x.shape[0], -1)))
        return self.out(nnx.relu(self.second(x)))


class LinenNet(nn.Module):
    """The convolutions once more."""

    @nn.compact
    def __call__(self, x, train=False):
        for features in (8, 16):
            x = nn.Conv(features, (3, 3))(x)
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.9)
            x = nn.relu(norm(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(10)(x)


def linen():
    module = LinenNet()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return train.linen(module, variables, train=False)


def apply(params, x):
    x = x.reshape(x.shape[0], -1)
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name] + params[f"{name}_bias"].reshape(1, -1))
    return x @ params["out"]


def function():
    sizes = {"first": (64, 48), "second": (48, 32), "out": (32, 10)}
    params = {
        name: jax.random.normal(jax.random.key(at), shape) / shape[0] ** 0.5
        for at, (name, shape) in enumerate(sizes.items())
    }
    params |= {"first_bias": jnp.zeros(48), "second_bias": jnp.zeros(32)}
    return train.function(apply, params)


def counting(params, rest, x):
    """A function that keeps a running mean of its inputs."""
    mean = 0.9 * rest["mean"] + 0.1 * x.mean((0, 3))
    x = x - rest["mean"].reshape(1, 8, 8, 1)
    return apply(params, x), {"mean": mean}


def function_with_rest():
    return train.function(counting, function().params, {"mean": jnp.zeros((8, 8))})


MODELS = {
    "nnx": (lambda: ConvNet(nnx.Rngs(0)), loss),
    "perceptron": (lambda: Perceptron(nnx.Rngs(0)), loss),
    "linen": (linen, loss_of_linen),
    "function": (function, loss),
    "function_with_rest": (function_with_rest, loss),
}
"""Each with its loss."""
