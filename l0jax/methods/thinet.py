"""ThiNet: channels whose removal changes the next layer's output least (Luo et al.
2017, "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression")."""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray, PyTree

from l0jax.methods.keeping import count_left
from l0jax.methods.samples import Rows, fold, layer, least_squares, rows
from l0jax.methods.task import Task


def thinet(
    task: Task,
    group: str,
    ratio: float,
    key: PRNGKeyArray,
    params: PyTree | None = None,
    positions: int = 10,
) -> tuple[Bool[np.ndarray, " units"], PyTree]:
    r"""Selects the units of a group by what they contribute to the layer that reads
    them, and scales those that stay.

    At each sampled position one output of the layer is drawn; there unit k contributes
    $\hat x_{ik}$. The removed set T minimises $\sum_i (\sum_{k \in T} \hat x_{ik})^2$
    (eq. 6), greedily (Algorithm 1). Then the kept units are scaled by
    $\arg\min_w \sum_i (\hat y_i - w^\top \hat x_i)^2$ (eq. 7).

    Args:
        task: its parameters are the base network, whose outputs are reconstructed.
        group: read by one layer.
        ratio: share of the units that is removed.
        key: draws positions and outputs.
        params: the network as pruned so far; by default the base network.
        positions: drawn of each example; 10 in the paper.

    Returns:
        A flag for each unit that is kept, and the parameters: in the layer's kernel the
        rows of removed units are zero, those of kept ones scaled.

    Raises:
        ValueError: if `ratio` is outside [0, 1); as `samples.layer` and `samples.rows`.
    """
    params = task.params if params is None else params
    of = layer(task, group)
    size = task.structure.groups[group].size
    removed = size - count_left(size, ratio)
    positions_key, outputs_key = jax.random.split(key)
    system = rows(task, of, positions_key, params, positions)
    shape = system.targets.shape
    outputs = np.asarray(jax.random.randint(outputs_key, shape[:1], 0, shape[1]))
    x = contributions(system, outputs)
    y = np.take_along_axis(system.targets_of_units, outputs[:, None], 1)[:, 0]
    keep = np.ones(size, bool)
    keep[greedy_removal(x.T @ x, removed)] = False
    scale = np.zeros(size + 1)
    scale[:-1][keep] = least_squares(x[:, keep], y, np.ones(keep.sum()))
    scale[-1] = 1  # of entries that are of no unit
    return keep, fold(params, of, system.kernel * scale[system.unit_of][:, None])


def contributions(
    system: Rows, outputs: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, "rows units"]:
    """What each unit contributes to one output of each row."""
    return (system.inputs * system.kernel[:, outputs].T) @ system.owners


def greedy_removal(
    gram: Float[np.ndarray, "units units"], count: int
) -> Int[np.ndarray, " count"]:
    r"""The units that Algorithm 1 removes, in its order.

    The cost of a set is $\sum_{j,k \in T} G_{jk}$ with $G = \hat X^\top \hat X$, so
    that a unit adds $G_{kk} + 2 \sum_{j \in T} G_{jk}$.
    """
    removed: list[int] = []
    added = np.array(gram.diagonal())
    for _ in range(count):
        unit = int(added.argmin())
        removed.append(unit)
        added += 2 * gram[unit]
        added[unit] = np.inf
    return np.array(removed, int)
