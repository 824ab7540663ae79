"""One layer after the other is pruned and reconstructed."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from l0jax.methods.keeping import count_left
from l0jax.methods.samples import layer
from l0jax.methods.task import Task


def reconstruct(
    task: Task,
    method: Callable[..., tuple[Any, PyTree]],
    ratio: float,
    key: PRNGKeyArray,
    groups: Iterable[str] | None = None,
    on_progress: Callable[[str, np.ndarray], None] = lambda name, keep: None,
) -> tuple[dict[str, np.ndarray], PyTree]:
    """Prunes groups in the order in which they are read, each of them in the network
    that those before left, towards the outputs of the base network.

    Args:
        task: its parameters are the base network.
        method: `thinet` or `channel_pruning`, or another `method(task, group, ratio,
            key, params)` that gives flags of what it keeps and the new parameters.
        ratio: share of the units of each group that is removed.
        key: each group gets its own.
        groups: names of those that are pruned; by default all of the structure.
        on_progress: called with the name of each group and the flags of its units.

    Returns:
        For each group the flags of the units that are kept, and the parameters at their
        full sizes. What reads a removed unit is zero, so that `l0jax.shrink` takes it
        out without a change.

    Raises:
        ValueError: if `ratio` is outside [0, 1); before anything is pruned, if a group
            is read at several places.
    """
    names = list(task.structure.groups if groups is None else groups)
    layers = {name: layer(task, name) for name in names}
    for name in names:
        count_left(task.structure.groups[name].size, ratio)
    names.sort(key=lambda name: task.flow.reader(layers[name].path).at)
    params, kept = task.params, {}
    for at, name in enumerate(names):
        keep, params = method(task, name, ratio, jax.random.fold_in(key, at), params)
        kept[name] = np.asarray(keep)
        on_progress(name, kept[name])
    return kept, params
