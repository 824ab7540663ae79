"""Network slimming (Liu et al. 2017, arXiv 1708.06519): the scales of batch
normalisation are trained under an L1 penalty, and channels of small scale go, by one
threshold for the whole network."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from l0jax import units
from l0jax.methods.task import Task
from l0jax.units import Group, Groups, Slot


def penalty(params: PyTree, groups: Groups) -> Float[Array, ""]:
    """The sum of |scale| over the units of all groups: times s it is added to the loss.

    The paper takes s = 1e-4 for VGG and 1e-5 for deep residual networks, and starts all
    scales at 0.5.

    Raises:
        ValueError: for a group without a scale.
    """
    arrays = units.arrays(params)
    slots = {slot for group in groups.values() for slot in _scales(group)}
    return sum((jnp.abs(arrays[slot.path]).sum() for slot in slots), jnp.zeros(()))


def scale(task: Task) -> dict[str, Float[Array, " units"]]:
    """|scale| of each unit; where several norms scale it, their sum. Compared between
    all groups: `keep_above`.

    Raises:
        ValueError: for a group without a scale.
    """
    return {
        name: units.charge(jnp.abs, task.params, _scales(group), group.size)
        for name, group in task.structure.groups.items()
    }


def start_scales(params: PyTree, groups: Groups, value: float = 0.5) -> PyTree:
    """The parameters with all scales of the groups at `value`, to train from."""
    arrays = units.arrays(params)
    paths = {slot.path for group in groups.values() for slot in _scales(group)}
    new: Mapping[str, Array] = {p: jnp.full_like(arrays[p], value) for p in paths}
    return units.replace(params, new)


def _scales(group: Group) -> list[Slot]:
    found = [slot for slot in group.made_by if slot.path.endswith("scale")]
    if not found:
        made = ", ".join(slot.path for slot in group.made_by) or "nothing"
        raise ValueError(
            f"group {group.name!r} has no scale of a normalisation (it is made by "
            f"{made}): network slimming needs one; use another method, or leave the "
            "group out"
        )
    return found
