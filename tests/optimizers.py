"""Optimisers for tests that run under strict promotion of dtypes."""

import jax
import optax


def adam(rate):
    """Adam, which raises a float to the power of an integer count."""
    found = optax.adam(rate)

    def update(grads, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return found.update(grads, state, params)

    return optax.GradientTransformation(found.init, update)
