"""Methods that decide which units to keep: scores of units, and choices by them."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, PRNGKeyArray

from l0jax.methods.activations import apoz as apoz
from l0jax.methods.activations import entropy as entropy
from l0jax.methods.activations import spread as spread
from l0jax.methods.activations import variance as variance
from l0jax.methods.channel_pruning import channel_pruning as channel_pruning
from l0jax.methods.keeping import keep_above as keep_above
from l0jax.methods.keeping import keep_top as keep_top
from l0jax.methods.layerwise import reconstruct as reconstruct
from l0jax.methods.magnitude import filter_l1 as filter_l1
from l0jax.methods.magnitude import outgoing_l2 as outgoing_l2
from l0jax.methods.relocation import Closing as Closing
from l0jax.methods.relocation import LeastSquares as LeastSquares
from l0jax.methods.sensitivity import fisher as fisher
from l0jax.methods.sensitivity import obd as obd
from l0jax.methods.sensitivity import skeletonization as skeletonization
from l0jax.methods.sensitivity import taylor as taylor
from l0jax.methods.task import Task as Task
from l0jax.methods.task import task as task
from l0jax.methods.thinet import thinet as thinet
from l0jax.methods.uniform import uniform as uniform

SCORES: dict[str, Callable[..., dict[str, Array]]] = {
    "random": uniform,
    "filter_l1": filter_l1,
    "outgoing_l2": outgoing_l2,
    "apoz": apoz,
    "variance": variance,
    "entropy": entropy,
    "taylor": taylor,
    "skeletonization": skeletonization,
    "fisher": fisher,
    "obd": obd,
}
"""What a unit is worth; the units with the highest scores are to be kept."""


def score(
    name: str, task: Task, key: PRNGKeyArray, **settings: Any
) -> dict[str, Float[Array, " units"]]:
    """The scores called `name` of all units; only random ones use the key.

    Raises:
        ValueError: if no score has that name, the message lists those that exist; or as
            the function in `SCORES`.
    """
    if name not in SCORES:
        raise ValueError(
            f"unknown score {name!r}; there is {', '.join(sorted(SCORES))}"
        )
    if SCORES[name] is uniform:
        return uniform(task, key, **settings)
    return SCORES[name](task, **settings)
