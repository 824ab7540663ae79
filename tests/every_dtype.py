"""Arrays of every dtype that JAX has, with many bit patterns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("int2", "uint2", "int4", "uint4", "float4_e2m1fn", "float8_e8m0fnu"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
]
WIDE = ("int64", "uint64", "float64", "complex128")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def of_dtype(dtype):
    """Arrays of several ranks with every bit pattern that there is, or many."""
    dtype = np.dtype(dtype)
    if dtype.name in ("bool", "int2", "uint2", "int4", "uint4", "float4_e2m1fn"):
        # They fill no byte. Casting wraps.
        values = (np.arange(12) % 7).astype(np.int8).reshape(2, 6).astype(dtype)
    else:
        rng = np.random.default_rng(0)
        values = rng.integers(0, 256, (2, 6, dtype.itemsize), np.uint8)
        values = values.view(dtype).reshape(2, 6)
    return {
        "matrix": jnp.asarray(values),
        "scalar": jnp.asarray(values)[1, 1],
        "none": jnp.asarray(values)[:, :0],
        "deep": [jnp.asarray(values)[0], jnp.asarray(values).reshape(3, 2, 2)],
        "host": np.asfortranarray(values),
    }


def same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if jnp.issubdtype(found.dtype, jax.dtypes.prng_key):
        found, expected = jax.random.key_data(found), jax.random.key_data(expected)
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
