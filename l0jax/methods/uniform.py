"""Random pruning: the control that every other score must beat."""

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax.gating import key_for
from l0jax.methods.task import Task


def uniform(task: Task, key: PRNGKeyArray) -> dict[str, Float[Array, " units"]]:
    """Scores drawn uniformly from [0, 1): units are kept in a random order.

    Groups draw independently of each other, and of which other groups there are.

    Returns:
        `{group: scores}`, a score for each unit.
    """
    return {
        name: jax.random.uniform(key_for(key, name), (group.size,))
        for name, group in task.structure.groups.items()
    }
