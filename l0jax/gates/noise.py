"""Uniform noise for gates, at a fraction of the price of `jax.random.uniform`.

With one gate per weight, drawing the noise is a large part of a training step. Two
things make it cheap. A gate needs no more than 16 random bits: the result is the
midpoint of one of 65,536 equal cells of (0, 1), which shifts no probability by more
than 2^-17 and is never 0 or 1. (The 8 significant bits of a bfloat16 uniform are too
few: 128 values, which shift P(z = 1) by 3 %.) So one call of the generator, which gives
two words of 32 bits, serves four gates, where `jax.random` spends a call on each. And
on CPU, JAX compiles the generator's rounds as a loop of small kernels; written out they
are one.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Integer, PRNGKeyArray, UInt32

CELLS = 65536
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_SMALL = 1024  # pairs of words, below which a loop costs more than it saves


def uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Independent float32 draws from the midpoints of `CELLS` cells of (0, 1)."""
    size = math.prod(shape)
    words = _words(key, (size + 3) // 4)
    cells = jnp.stack([words >> 16, words & (CELLS - 1)]).reshape(-1)[:size]
    return ((cells.astype(jnp.float32) + 0.5) / CELLS).reshape(shape)


def normal(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The standard normal numbers below which one lies with probability u, of noise."""
    if u.size <= 4 * _SMALL:
        return ndtri(u)
    # In a loop, because XLA would draw u again for each use that `ndtri` makes of it.
    rows = jnp.pad(u.reshape(-1), (0, u.size % 2), constant_values=0.5).reshape(2, -1)
    return jax.lax.map(ndtri, rows).reshape(-1)[: u.size].reshape(u.shape)


@functools.partial(jax.jit, inline=True)
def fold_in(key: PRNGKeyArray, number: Integer[Array, ""]) -> PRNGKeyArray:
    """The very key that `jax.random.fold_in` derives, without its loop of kernels."""
    if not _is_threefry(key):
        return jax.random.fold_in(key, number)
    key0, key1 = jax.random.key_data(key)
    number = number.astype(jnp.uint32)
    derived = jnp.stack(threefry(key0, key1, jnp.zeros_like(number), number))
    return jax.random.wrap_key_data(derived, impl=jax.random.key_impl(key))


@functools.partial(jax.jit, inline=True)
def threefry(
    key0: UInt32[Array, ""],
    key1: UInt32[Array, ""],
    x0: UInt32[Array, "*shape"],
    x1: UInt32[Array, "*shape"],
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011): JAX's default generator."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(_PARITY))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << distance) | (x1 >> (32 - distance))
            x1 = x1 ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1


def _words(key: PRNGKeyArray, pairs: int) -> UInt32[Array, " words"]:
    if not _is_threefry(key):
        return jax.random.bits(key, (2 * pairs,), jnp.uint32)
    key0, key1 = jax.random.key_data(key)
    if pairs <= _SMALL:
        count = jnp.arange(pairs, dtype=jnp.uint32)
        return jnp.concatenate(threefry(key0, key1, count, jnp.zeros_like(count)))
    count = jnp.arange((pairs + 1) // 2, dtype=jnp.uint32)
    # In a loop, because XLA fuses nothing across its bounds: it would compute all
    # rounds again wherever a gate is read, for each of the four gates of a call.
    first, second = jax.lax.map(
        lambda high: threefry(key0, key1, count, jnp.full_like(count, high)),
        jnp.arange(2, dtype=jnp.uint32),
    )
    return jnp.concatenate([first.ravel(), second.ravel()])


def _is_threefry(key: PRNGKeyArray) -> bool:
    return str(jax.random.key_impl(key)) == "threefry2x32"
