"""Running averages of what is trained (Polyak and Juditsky 1992), in float32 or wider,
whatever the dtypes of the parameters."""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

Tree = TypeVar("Tree", bound=PyTree)


def start(theta: Tree) -> Tree:
    """The average before the first step: a copy of the initial values, no leaf of fewer
    than 32 bits."""
    return jax.tree.map(lambda leaf: jnp.copy(_widened(leaf)), theta)


def follow(average: Tree, theta: Tree, decay: float, steps: Int[Array, ""]) -> Tree:
    r"""The average after so many steps, `theta` the last of their results.

    With weights $\text{decay}^{t-i}$ over the results i of t steps, the mean moves
    towards the newest by $(1 - \text{decay}) / (1 - \text{decay}^t)$ of what they
    differ: by nothing where nothing has moved, which a sum to be divided by its weights
    misses by all roundings of the sum.
    """

    def moved(mean, new):
        if not moves(new):
            return mean
        t = steps.astype(jnp.finfo(mean.dtype).dtype)
        share = -(1 - decay) / jnp.expm1(t * math.log(decay))
        return mean + share.astype(mean.dtype) * (new.astype(mean.dtype) - mean)

    return jax.tree.map(moved, average, theta)


def read(average: Tree, theta: Tree) -> Tree:
    """The average in the dtypes of `theta`; integers, flags and keys are those of
    `theta`."""
    return jax.tree.map(
        lambda mean, now: mean.astype(now.dtype) if moves(now) else now, average, theta
    )


def moves(leaf: Array | np.ndarray) -> bool:
    """Whether it is a number that training moves: no integer, flag or random key."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def trained(theta: Tree) -> Tree:
    """`theta` with None where a leaf has no derivative."""
    return jax.tree.map(lambda leaf: leaf if moves(leaf) else None, theta)


def merged(theta: Tree, trained: Tree) -> Tree:
    """`theta` with other values where `trained` has any."""
    return jax.tree.map(lambda old, new: old if new is None else new, theta, trained)


def _widened(leaf: Array | np.ndarray) -> Array:
    """In float32, if it is of fewer bits: a change of 1/1000 must not be lost."""
    narrow = moves(leaf) and jnp.finfo(leaf.dtype).bits < 32
    return jnp.asarray(leaf).astype(jnp.float32) if narrow else jnp.asarray(leaf)
