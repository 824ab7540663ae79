"""What a user's loss gives and what a network leaves: checked, and wide enough to be
summed."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from l0jax import units

Metrics = dict[str, Array]
Loss = Callable[..., tuple[Float[Array, ""], Mapping[str, Array]]]
"""`loss(model, batch) -> (mean loss, metrics)`; with a parameter `key`, also a key."""


def checked(loss: Loss, found: Any) -> tuple[Float[Array, ""], Metrics]:
    """What a loss returned, as float32.

    Raises:
        ValueError: unless it is a scalar and metrics that are arrays.
    """
    name = getattr(loss, "__name__", "the loss")
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(
            f"{name} must return (mean loss, metrics), got {type(found).__name__}; "
            "without metrics return (value, {})"
        )
    value, metrics = found
    if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"{name} must return a real scalar first, got {_kind(value)}; take the mean"
        )
    if not isinstance(metrics, Mapping):
        raise ValueError(
            f"{name} must return metrics by name second, got {type(metrics).__name__}"
        )
    kept = {}
    for key, metric in metrics.items():
        if not isinstance(metric, jax.Array | np.ndarray | np.generic | float | int):
            raise ValueError(
                f"metric {key!r} of {name} is no array but {type(metric).__name__}"
            )
        if key in ("loss", "penalty"):
            raise ValueError(f"{name} may not call a metric {key!r}: that is taken")
        kept[key] = _wide(metric)
    return _wide(value), kept


def _wide(value: Any) -> Array:
    value = jnp.asarray(value)
    real = jnp.issubdtype(value.dtype, jnp.floating)
    wide = real and jnp.finfo(value.dtype).bits > 32
    return value if wide else value.astype(jnp.float32)


def examples_of(batch: PyTree) -> int:
    """How many examples a batch has, along the first axes of its arrays. Numbers among
    them are of all examples.

    Raises:
        ValueError: if its arrays differ in length, or there is none.
    """
    lengths = {
        path or "its root": np.shape(leaf)[0]
        for path, leaf in units.arrays(batch).items()
        if np.ndim(leaf)
    }
    if len(set(lengths.values())) != 1:
        told = ", ".join(f"{length} at {path!r}" for path, length in lengths.items())
        raise ValueError(
            f"nobody knows how many examples a batch has with {told or 'no array'}: "
            "what is of no example, such as weights of classes, is left to the loss"
        )
    return next(iter(lengths.values()))


def mean(total: Any, count: int) -> Any:
    """Of a sum, in double precision: a float, or an array in NumPy of what is none."""
    found = np.asarray(total, np.float64) / count
    return found if found.ndim else float(found)


def check_rest(before: PyTree, after: PyTree) -> None:
    """Raises ValueError if the network changed the shapes of what it writes."""
    old = {path: jnp.shape(leaf) for path, leaf in units.arrays(before).items()}
    new = {path: jnp.shape(leaf) for path, leaf in units.arrays(after).items()}
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            raise ValueError(
                f"the network writes {path!r} in shape {new.get(path, 'none')}, and "
                f"it had {old.get(path, 'none')}: what it writes must keep its shape"
            )


def written(before: PyTree, after: PyTree) -> str | None:
    """The first array that a network has written, if there is any."""
    for (path, old), new in zip(
        units.arrays(before).items(), jax.tree.leaves(after), strict=True
    ):
        if new is not old:
            return path
    return None


def _kind(value: Any) -> str:
    return f"{jnp.result_type(value)} of shape {jnp.shape(value)}"
