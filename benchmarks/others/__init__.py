"""Models that others wrote, as their packages give them: `MODELS[name].make(size)`.

Each is a function of its arrays and of inputs, with sizes of two kinds: small ones
that are run, and large ones, of which shapes are enough. Large ones are those that
were published: in a paper, by the package, or in an example of it. Where there are
none, they are ours, and the model says so (`published=False`).
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MODELS: dict[str, "Entry"] = {}


@dataclasses.dataclass(frozen=True)
class Model:
    """A function with its arrays and its inputs, or the shapes of these.

    `fan_out_last` says that what a kernel makes lies along its last axis; along the
    first otherwise.
    """

    apply: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    fan_out_last: bool = True


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a model is made, small or large, and where it comes from; and whether its
    large sizes were published."""

    file: str
    package: str
    make: Callable[[bool], Model]
    published: bool


def model(package: str, published: bool = True):
    """Registers `function(large) -> Model` under its name."""

    def register(function):
        if function.__name__ in MODELS:
            raise ValueError(f"two models are called {function.__name__!r}")
        MODELS[function.__name__] = Entry(
            function.__module__.rpartition(".")[2], package, function, published
        )
        return function

    return register


# A file of this folder, and what it imports.
FILES = {
    "of_haiku": "haiku",
    "of_equinox": "equinox",
    "of_linen": "flax",
    "of_nnx": "flax",
    "of_flowjax": "flowjax",
    "of_equimo": "equimo",
    "of_jraph": "jraph",
    "of_brax": "brax",
    "of_transformers": "transformers",
    "of_keras_hub": "keras_hub",
    "of_diffusers": "diffusers",
    "of_keras": "keras",
}
LIGHT = ("of_haiku", "of_equinox", "of_linen", "of_nnx")


def load(files=FILES) -> list[str]:
    """Fills `MODELS`; gives the packages that aren't installed."""
    missing = []
    for file in files:
        if importlib.util.find_spec(FILES[file]) is None:
            missing.append(FILES[file])
        else:
            importlib.import_module(f"benchmarks.others.{file}")
    return missing


def image(published: bool, small: int = 32, side: int = 224, batch: int = 2):
    """A batch of images, channels last."""
    side = side if published else small
    return jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)


def tokens(published: bool, small: int = 7, length: int = 128, batch: int = 2):
    """A batch of sequences of token numbers."""
    return jax.ShapeDtypeStruct((batch, length if published else small), jnp.int32)


def floats(*shape):
    """The shape of an array of float32."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def filled(made: Model, seed: int = 0) -> Model:
    """With numbers for all shapes: weights that are nowhere zero, spreads that are
    positive, and tokens 0 to 6. Arrays that were numbers already stay, but for a
    little noise."""
    rng = np.random.default_rng(seed)

    def number(key_path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return _whole(rng, leaf)
        path = jax.tree_util.keystr(key_path)
        noise = rng.normal(size=leaf.shape)
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            values = np.asarray(leaf) + 0.05 * noise
        elif leaf.ndim < 2:
            values = 0.5 + 0.3 * noise
        else:
            outputs = leaf.shape[-1 if made.fan_out_last else 0]
            values = noise / np.sqrt(leaf.size / outputs)
        if "var" in path.lower():
            values = np.abs(values) + 0.5
        return np.asarray(values, leaf.dtype)

    def given(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        return _whole(rng, leaf)

    return dataclasses.replace(
        made,
        params=jax.tree_util.tree_map_with_path(number, made.params),
        inputs=jax.tree.map(given, made.inputs),
    )


def _whole(rng, leaf):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), leaf.shape)
    if leaf.dtype == jnp.bool_:
        return np.ones(leaf.shape, bool)
    return np.asarray(rng.integers(0, 7, leaf.shape), leaf.dtype)
