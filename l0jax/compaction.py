"""When a unit is dead for good, so that training may go on without it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from l0jax import units
from l0jax.units import Group, Groups

Counts = dict[str, Int[np.ndarray, " units"]]


def closed(
    params: PyTree,
    z: Mapping[str, Float[Array, " units"]],
    prob_active: Mapping[str, Float[Array, " units"]],
    groups: Groups,
    below: float,
) -> dict[str, Bool[Array, " _units"]]:
    """Which units are closed now: by the test-time rule they reach nothing, and in
    training they reach anything with a probability below `below`.

    The two differ. Hard concrete logits are clamped, so that a gate which is closed at
    test time still opens in 4.7 % of the draws; and the test-time rules close gates
    that open in up to half of them.

    Args:
        params: the parameters.
        z: gates at test time.
        prob_active: P(z != 0); the gates may be those of units or of single weights.
        groups: where the units lie, and the weights if those are gated.
        below: the probability.
    """
    those = removable(groups)
    ones = jax.tree.map(jnp.ones_like, params)
    sizes = jax.tree.map(jnp.abs, units.apply_gates(params, z, groups))
    decided = units.largest_use(sizes, those)
    likely = units.largest_use(units.apply_gates(ones, prob_active, groups), those)
    return {n: (decided[n] == 0) & (likely[n] < below) for n in those}


def removable(groups: Groups) -> dict[str, Group]:
    """The groups whose units can be taken out of arrays: none of single weights."""
    return {
        name: group
        for name, group in groups.items()
        if any(slot.axis is not None for slot in group.used_by)
    }


def count(
    counts: Mapping[str, Int[np.ndarray, " units"]],
    now: Mapping[str, Bool[np.ndarray, " units"]],
) -> Counts:
    """For how many evaluations in a row each unit has been closed."""
    return {
        name: np.where(flags, counts.get(name, 0) + 1, 0) for name, flags in now.items()
    }


def alive(
    counts: Mapping[str, Int[np.ndarray, " units"]], evaluations: int
) -> dict[str, Bool[np.ndarray, " units"]]:
    """What training goes on with: all units but those that have been closed for so many
    evaluations in a row, and one unit of a group of which all have.

    This is the policy: a unit is dead for good when `closed` says so every time.
    """
    keep = {name: each < evaluations for name, each in counts.items()}
    for flags in keep.values():
        if flags.size and not flags.any():
            flags[0] = True
    return keep
