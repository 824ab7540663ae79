"""Uniform noise for gates, at half the price of `jax.random.uniform`.

With one gate per weight, drawing the noise is the largest part of a training step. A
gate needs no more than 16 random bits: the result is the midpoint of one of 65,536
equal cells of (0, 1), which shifts no probability by more than 2^-17 and is never 0
or 1. Two gates share one 32-bit word. (The 8 significant bits of a bfloat16 uniform
are too few: 128 values, which shift P(z = 1) by 3 %.)
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

CELLS = 65536


def uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Independent float32 draws from the midpoints of `CELLS` cells of (0, 1)."""
    size = math.prod(shape)
    words = jax.random.bits(key, ((size + 1) // 2,), jnp.uint32)
    halves = jnp.concatenate([words >> 16, words & jnp.uint32(CELLS - 1)])
    return ((halves[:size].astype(jnp.float32) + 0.5) / CELLS).reshape(shape)
