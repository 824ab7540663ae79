"""The generator is JAX's, and what gates draw from it is uniform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32

from l0jax.gates import noise

SEEDS = st.integers(0, 2**31 - 1)
WORDS = st.integers(0, 2**32 - 1)
# Fewer gates than one pair of words serves, the last that are drawn at once, the first
# that are drawn in a loop, and numbers that do not divide.
SIZES = [1, 3, 4, 5, 4096, 4097, 9999]


@given(SEEDS, WORDS)
def test_fold_in_is_that_of_jax(seed, number):
    key, number = jax.random.key(seed), jnp.uint32(number)
    expected = jax.random.key_data(jax.random.fold_in(key, number))
    for derive in (noise.fold_in, jax.jit(noise.fold_in)):
        np.testing.assert_array_equal(
            jax.random.key_data(derive(key, number)), expected
        )


def test_fold_in_maps_over_keys_and_numbers():
    keys = jax.random.split(jax.random.key(1), 5)
    numbers = jnp.arange(5)
    for axes in ((0, None), (None, 0), (0, 0)):
        arguments = [
            a if axis == 0 else a[2]
            for a, axis in zip((keys, numbers), axes, strict=True)
        ]
        np.testing.assert_array_equal(
            jax.random.key_data(jax.vmap(noise.fold_in, axes)(*arguments)),
            jax.random.key_data(jax.vmap(jax.random.fold_in, axes)(*arguments)),
        )


@given(WORDS, WORDS, st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_threefry_is_that_of_jax(key0, key1, counters):
    counters = np.array(counters, np.uint32).T
    key = jnp.array([key0, key1], jnp.uint32)
    found = jnp.concatenate(noise.threefry(*key, *jnp.asarray(counters)))
    np.testing.assert_array_equal(found, threefry_2x32(key, counters.ravel()))


@pytest.mark.sweep
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("size", SIZES)
def test_any_number_of_gates_has_noise_of_any_generator(size, impl):
    key = jax.random.key(3, impl=impl)
    u = noise.uniform(key, (size,))
    assert u.shape == (size,)
    assert u.dtype == jnp.float32
    assert u.min() > 0
    assert u.max() < 1
    np.testing.assert_array_equal(
        u.reshape(1, size), jax.jit(noise.uniform, static_argnums=1)(key, (1, size))
    )
    derived = noise.fold_in(key, 1)
    assert jax.random.key_impl(derived) == jax.random.key_impl(key)
    assert not np.array_equal(u, noise.uniform(derived, (size,)))


@pytest.mark.parametrize("size", [4000, 100_000])
def test_noise_is_uniform_and_independent(size):
    """Over gates, over keys, and between the four gates of one call."""
    keys = jax.random.split(jax.random.key(4), 400_000 // size)
    u = np.asarray(jax.vmap(lambda key: noise.uniform(key, (size,)))(keys))
    assert scipy.stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(u[:, 7], "uniform").pvalue > 1e-3
    limit = 4 / np.sqrt(u.size)
    for shift in (1, size // 4, size // 2, 3 * size // 4):
        rolled = np.roll(u, shift, axis=1)
        assert abs(np.corrcoef(u.ravel(), rolled.ravel())[0, 1]) < limit
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < limit


def test_every_cell_is_drawn():
    u = noise.uniform(jax.random.key(5), (noise.CELLS * 16,))
    assert len(np.unique(u)) == noise.CELLS


def test_each_of_many_keys_draws_as_alone():
    keys = jax.random.split(jax.random.key(6), 3)
    for size in (5, 5000):
        together = jax.vmap(lambda key, n=size: noise.uniform(key, (n,)))(keys)
        for key, row in zip(keys, together, strict=True):
            np.testing.assert_array_equal(row, noise.uniform(key, (size,)))
