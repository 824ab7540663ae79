"""Every test runs with JAX's implicit promotions switched off.

Nothing of `l0jax` is imported here: its annotations are checked only if pytest's
`--jaxtyping-packages` is in place before the first import.
"""

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples at every run, and no clock: a test fails for its code alone.
settings.register_profile("laws", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("laws")


@pytest.fixture(autouse=True, scope="module")
def promotion_of_experiments(request):
    """Experiments run under JAX's default promotion of dtypes.

    They hand themselves to optax, whose Adam and schedules raise a float to the power
    of an integer count. Tests of the library stay strict and wrap just the optimiser.
    """
    imported = [
        getattr(value, "__name__", "") for value in vars(request.module).values()
    ]
    of_experiments = any(str(name).startswith("experiments") for name in imported)
    with jax.numpy_dtype_promotion("standard" if of_experiments else "strict"):
        yield
