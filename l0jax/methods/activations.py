"""Scores of units by the values that they take where they are read.

A unit's values are those of all examples and all positions of its map, in every place
where the group is read: places are pooled.

The share of zeros: Hu, Peng, Tai and Tang (2016), "Network trimming: a data-driven
neuron pruning approach towards efficient deep architectures". The variance, in the
order of the standard deviation: Molchanov, Tyree, Karras, Aila and Kautz (2017),
"Pruning convolutional neural networks for resource efficient inference". The entropy of
the singular values: Varshavsky, Gottlieb, Linial and Horn (2006), "Novel unsupervised
feature filtering of biological data".
"""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from l0jax.methods.batches import fold_batches, mean_over_batches
from l0jax.methods.keeping import check_scores
from l0jax.methods.task import Read, Task


def apoz(task: Task) -> dict[str, Float[Array, " units"]]:
    r"""Minus the average percentage of zeros, as a share (Hu et al. 2016, eq. 1):
    $-\frac{1}{NM} \sum_{i, m} 1[z_{ijm} = 0]$ over N examples and M positions.

    Returns:
        `{group: scores}`, a score in [-1, 0] for each unit; the highest are to be kept.

    Raises:
        ValueError: if it can't be told where a group is read.
    """
    active = activity(task)

    def shares(params, images, labels):
        del labels
        return {name: share - 1 for name, share in active(params, images).items()}

    scores = mean_over_batches(task, shares, _zeros(task))
    check_scores(scores)
    return scores


def variance(task: Task) -> dict[str, Float[Array, " units"]]:
    """The variance of each unit's values.

    Batches are merged by their means and variances (Chan, Golub and LeVeque 1979):
    E[z²] - E[z]² would lose all digits where the mean is large.

    Returns:
        `{group: scores}`, a score for each unit; the highest are to be kept.

    Raises:
        ValueError: if it can't be told where a group is read, or a value isn't finite.
    """
    reads = _reads(task)

    def merge(carry, params, images, labels):
        del labels
        seen, before = carry
        columns, after = _columns(task, reads, params, images), {}
        for name, there in reads.items():
            mean, spread = before[name]
            after[name] = _merged(seen, mean, spread, columns[name], there)
        return seen + 1, after

    start = {name: (zeros, zeros) for name, zeros in _zeros(task).items()}
    _, found = fold_batches(task, merge, (jnp.zeros(()), start))
    scores = {name: found[name][1] for name in reads}
    check_scores(scores)
    return scores


def entropy(task: Task) -> dict[str, Float[Array, " units"]]:
    r"""What each unit contributes to the entropy of the singular values of the matrix
    $A$ of values, (examples and positions, units): H(A) - H(A without the unit), with

    $$ H(A) = -\frac{1}{\log n} \sum_j p_j \log p_j, \quad
       p_j = s_j^2 / \sum_k s_k^2 $$

    for singular values $s_j$ of n units (Varshavsky et al. 2006, section 2). n is the
    same in both, so that a dead unit contributes exactly 0; one that repeats what
    others do contributes less than 0. They follow from the matrix $A^T A$ alone, which
    is summed over batches on the device; its eigenvalues are computed on the host in
    double precision, one decomposition for each unit.

    Returns:
        `{group: scores}`, a score for each unit; the highest are to be kept. The only
        unit of a group has 0.

    Raises:
        ValueError: if it can't be told where a group is read, or the units have not the
            same number of positions there; if a value isn't finite.
    """
    scores = {
        name: jnp.float32(_contributions(gram)) for name, gram in _grams(task).items()
    }
    check_scores(scores)
    return scores


def spread(
    task: Task, keep: Mapping[str, Bool[Array | np.ndarray, " units"]]
) -> dict[str, tuple[float, float]]:
    """How evenly the units that stay, and those that go, spread what they say: the
    entropy of the singular values of their own values, as of `entropy`, each divided
    by the logarithm of how many units they are, in [0, 1].

    A meter of where knowledge is, if entropy is taken for what a layer knows (Salzinger
    2020). Softly closed units of an MLP lose theirs; with a least-squares fit, which
    makes up for them without training, they hardly do.

    Returns:
        For each group (of the units that stay, of those that go); 0 for fewer than two
        units.

    Raises:
        ValueError: as `entropy`.
    """

    def part(gram: np.ndarray, some: np.ndarray) -> float:
        count = int(some.sum())
        if count < 2:
            return 0.0
        return _entropy(gram[np.ix_(some, some)]) / float(np.log(count))

    found = {}
    for name, gram in _grams(task).items():
        flags = np.asarray(keep[name], bool)
        found[name] = part(gram, flags), part(gram, ~flags)
    return found


def activity(task: Task) -> Callable[..., dict[str, Float[Array, " units"]]]:
    """A function of parameters and images: of each unit the share of its values that
    aren't 0 (1 - APoZ of `apoz`).

    Raises:
        ValueError: if it can't be told where a group is read.
    """
    reads, sizes = _reads(task), _sizes(task)

    def active(params, images):
        columns = _columns(task, reads, params, images)
        return {
            name: _mean_by_unit(
                # What is not finite stays so, and is refused.
                [(c != 0).astype(c.dtype) + 0 * c for c in columns[name]],
                reads[name],
                size,
            )
            for name, size in sizes.items()
        }

    return active


def _grams(task: Task) -> dict[str, Float[np.ndarray, "units units"]]:
    """Of each group the mean over batches of sums of products of units."""
    reads, sizes = _reads(task), _sizes(task)
    positions = {
        name: [_positions_of_units(name, read, n) for read in reads[name]]
        for name, n in sizes.items()
    }

    def products(params, images, labels):
        del labels
        columns = _columns(task, reads, params, images)
        return {
            name: sum(
                map(_gram, columns[name], positions[name]),
                start=jnp.zeros((sizes[name], sizes[name])),
            )
            for name in sizes
        }

    zeros = {name: jnp.zeros((n, n)) for name, n in sizes.items()}
    grams = mean_over_batches(task, products, zeros)
    check_scores({name: jnp.diagonal(gram) for name, gram in grams.items()})
    return {name: np.asarray(gram, np.float64) for name, gram in grams.items()}


def _merged(
    seen: Float[Array, ""],
    mean: Float[Array, " units"],
    variance: Float[Array, " units"],
    columns: Sequence[Float[Array, "_samples _positions"]],
    reads: Sequence[Read],
) -> tuple[Float[Array, " units"], Float[Array, " units"]]:
    """Mean and variance after one more batch; all batches are of one size."""
    here = _mean_by_unit(columns, reads, len(mean))
    squares = [
        (column - _by_position(here, read)) ** 2
        for column, read in zip(columns, reads, strict=True)
    ]
    apart, old, new = here - mean, seen / (seen + 1), 1 / (seen + 1)
    spread = _mean_by_unit(squares, reads, len(mean))
    return mean + apart * new, variance * old + spread * new + apart**2 * old * new


def _contributions(gram: np.ndarray) -> np.ndarray:
    """The entropy of all units less that without each of them."""
    n = len(gram)
    if n == 1:
        return np.zeros(1)
    without = []
    for unit in range(n):
        # A row and a column of zeros give an eigenvalue 0, which adds nothing.
        left = np.arange(n) != unit
        without.append(_entropy(gram * left * left[:, None]))
    return (_entropy(gram) - np.array(without)) / np.log(n)


def _entropy(gram: np.ndarray) -> float:
    squares = np.maximum(np.linalg.eigvalsh(gram), 0)
    if not squares.any():
        return 0.0
    p = squares / squares.sum()
    return -float(np.sum(p[p > 0] * np.log(p[p > 0])))


def _gram(
    columns: Float[Array, "samples positions"], at: np.ndarray
) -> Float[Array, "units units"]:
    """Sums of products of units. Different positions of a unit are further samples."""
    samples = columns[:, at]
    return jnp.einsum("iuk,ivk->uv", samples, samples, precision="highest")


def _positions_of_units(group: str, read: Read, size: int) -> np.ndarray:
    """For each unit the positions along the axis that are its own, in their order."""
    counts = np.bincount(read.unit_of[read.unit_of >= 0], minlength=size)
    if counts.min() != counts.max():
        fewest, most = counts.argmin(), counts.argmax()
        raise ValueError(
            f"group {group!r}: where {read.kernel!r} reads it, unit {most} has "
            f"{counts[most]} positions and unit {fewest} has {counts[fewest]}; the "
            "entropy compares units at the same positions"
        )
    order = np.argsort(read.unit_of, kind="stable")
    return order[len(order) - counts.sum() :].reshape(size, -1)


# ------------------------------------------------------- values, by place and by unit


def _reads(task: Task) -> dict[str, list[Read]]:
    return {name: task.reads(name) for name in task.structure.groups}


def _sizes(task: Task) -> dict[str, int]:
    return {name: group.size for name, group in task.structure.groups.items()}


def _zeros(task: Task) -> dict[str, Float[Array, " units"]]:
    return {name: jnp.zeros(size) for name, size in _sizes(task).items()}


def _columns(
    task: Task, reads: dict[str, list[Read]], params, images
) -> dict[str, list[Float[Array, "samples positions"]]]:
    """Of each group the values in each of its places."""
    wanted = list(dict.fromkeys(r.value for there in reads.values() for r in there))
    found = task.flow.evaluate(task.flow.known(params, images), wanted)
    values = dict(zip(wanted, found, strict=True))

    def column(read: Read):
        value = jnp.moveaxis(values[read.value], read.axis, -1)
        return value.reshape(-1, value.shape[-1]).astype(jnp.float32)

    return {name: [column(read) for read in there] for name, there in reads.items()}


def _mean_by_unit(
    columns: Sequence[Float[Array, "_samples _positions"]],
    reads: Sequence[Read],
    size: int,
) -> Float[Array, " units"]:
    """The mean over all samples and positions of each unit, in all places."""
    total, count = jnp.zeros(size + 1), np.zeros(size + 1, np.float32)
    for column, read in zip(columns, reads, strict=True):
        # Positions of no unit go to the last entry, which is dropped.
        total = total.at[read.unit_of].add(column.sum(axis=0))
        np.add.at(count, read.unit_of, len(column))
    return total[:-1] / np.maximum(count[:-1], 1)


def _by_position(values: Float[Array, " units"], read: Read):
    """What belongs to a unit at each of its positions, shaped like one sample."""
    return jnp.append(values, jnp.zeros(1))[read.unit_of][None]
