"""Scores of units by the size of their weights: no example is looked at.

The norm of filters: Li, Kadav, Durdanovic, Samet and Graf (2017), "Pruning filters for
efficient ConvNets". The norm of what reads a unit: He, Fan, Qian, Tan and Yu (2014),
"Reshaping deep neural network for fast decoding by node-pruning".
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from l0jax import units
from l0jax.methods.keeping import check_scores
from l0jax.methods.task import Task


def filter_l1(task: Task) -> dict[str, Float[Array, " units"]]:
    r"""The L1 norm of the filter that makes each unit,
    $s_j = \sum |W_{\cdot j}|$ (Li et al. 2017, section 3.1).

    Where several kernels make a group, as along a residual stream, it is the sum over
    them. Biases and the parameters of normalisation don't count.

    Returns:
        `{group: scores}`, a score for each unit; the highest are to be kept.

    Raises:
        ValueError: if no kernel makes a group, or a score is not finite.
    """
    structure, scores = task.structure, {}
    for name, group in structure.groups.items():
        kernels = [
            slot
            for slot in group.made_by
            if slot.path in structure.trainable
            and len(structure.arrays[slot.path].shape) > 1
        ]
        if not kernels:
            made_by = ", ".join(slot.path for slot in group.made_by) or "nothing"
            raise ValueError(
                f"group {name!r}: no kernel makes its units ({made_by} does), so that "
                "they have no filters; choose groups with structure.only"
            )
        scores[name] = units.charge(jnp.abs, task.params, kernels, group.size)
    check_scores(scores)
    return scores


def outgoing_l2(task: Task) -> dict[str, Float[Array, " units"]]:
    r"""The L2 norm of all weights that read each unit, $s_j = \lVert W_{j \cdot}
    \rVert_2$ (He et al. 2014, "onorm", but for the mean over weights there).

    Returns:
        `{group: scores}`, a score for each unit; the highest are to be kept.

    Raises:
        ValueError: if a score is not finite.
    """
    scores = {
        name: jnp.sqrt(units.charge(jnp.square, task.params, g.used_by, g.size))
        for name, g in task.structure.groups.items()
    }
    check_scores(scores)
    return scores
