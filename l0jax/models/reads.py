"""Which of its input features a layer reads: a mask that shrinking switches off."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from l0jax.units import Slot


class Reads(nnx.Variable):
    """A boolean array in the shape of the features; False where one isn't read."""


def select(
    x: Float[Array, "batch features"], reads: Reads, count: int
) -> Float[Array, "batch reads"]:
    """The `count` features of `x` that `reads` marks.

    `count`, the number of rows of the kernel that follows, makes the shape static. A
    layer that reads everything costs nothing.
    """
    if count == x.shape[1]:
        return x
    # Fused into each other and into the product that follows, XLA's loops on CPU read
    # the features again for every output.
    read = jax.lax.optimization_barrier(jnp.flatnonzero(reads[...], size=count))
    return jax.lax.optimization_barrier(x[:, read])


def slot_of_read(path: str, reads: Reads) -> Slot:
    """Where the features that are read lie in their mask: unit j is the j-th of them.

    Outside of compiled code only: it looks at the mask.
    """
    marked = np.asarray(reads[...]).ravel()
    return Slot(path, None, tuple(np.where(marked, np.cumsum(marked) - 1, -1).tolist()))
