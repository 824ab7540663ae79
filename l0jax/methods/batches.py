"""Sums over all batches of a task, by one compiled function."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from l0jax.methods.task import Task

Carry = TypeVar("Carry")


def fold_batches(
    task: Task, step: Callable[[Carry, PyTree, Any, Any], Carry], start: Carry
) -> Carry:
    """`carry = step(carry, params, images, labels)` for one batch after the other.

    The step is compiled once. What is carried stays on the device, and the host waits
    for nothing.
    """
    compiled = jax.jit(step)
    carry = start
    for images, labels in task.batches():
        carry = compiled(carry, task.params, images, labels)
    return carry


def mean_over_batches(
    task: Task,
    of: Callable[[PyTree, Any, Any], dict[str, Array]],
    zeros: dict[str, Array],
) -> dict[str, Array]:
    """The mean over batches of `of(params, images, labels)`, an array for each group,
    which are shaped like `zeros`."""

    def step(total, params, images, labels):
        return jax.tree.map(jnp.add, total, of(params, images, labels))

    total = fold_batches(task, step, zeros)
    # Compiled functions sort what they give by name.
    return {name: total[name] / len(task.images) for name in zeros}
