r"""What a network costs: parameters, multiply-accumulates, bytes, measured seconds.

Every cost is a function `(structure, prob_active) -> scalar` and is differentiable, so
that any of them can be an objective. Under independent gates it is the exact
expectation: a cost is a sum of products of group sizes, and where a group meets itself
(a square kernel on a residual stream), $E[n^2] = (\sum p)^2 + \sum p (1 - p)$. With
probabilities that are all 0 or 1 it is the exact cost after removal; with none it is
that of the whole network. (Seconds alone, which are interpolated, are those at expected
sizes.)

Papers count in three ways, whose numbers can't be compared with one another:

- `macs`: multiply-accumulates of the removed network, biases not counted; `weights` are
  those of its kernels. Tables of surviving weights in the literature are of this kind.
- `reference_flops`: what the reference implementation of Louizos et al. (2018) counts
  in expectation: multiplications and additions apart, a convolution's input channels in
  full, a dense layer's outputs in full. (Its released code reads the spatial size of a
  convolution from the wrong axes; the intended formula is used here.)
- `flops_objective`: Tang, Adhikari and Lin (2018): one operation per weight and bias
  and position, survivors on both sides.

All are of one example if examples are computed apart from one another, else of the
batch that was traced; the table of a structure says which. Loops count as often as they
turn; of those that run as long as their values say (`while_loop`, but for one that only
counts between constants) one turn is counted, and `Structure.notes` names them.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from l0jax.narrow import emptied, knows, unread
from l0jax.polynomials import Polynomial
from l0jax.structure import (
    Found,
    Structure,
    expected_macs,
    expected_size_of,
    within,
)
from l0jax.units import (
    Amount,
    Certain,
    Group,
    Probabilities,
    check_lengths,
    expected_size,
    left,
)

Cost = Callable[[Structure, Probabilities], Amount]
ALL: Probabilities = {}


def params(structure: Structure, prob_active: Probabilities = ALL) -> Amount:
    """Expected number of parameters left (running statistics are none)."""
    sizes = (expected_size_of(structure, p, prob_active) for p in structure.trainable)
    return _total(structure, prob_active, sizes)


def weights(structure: Structure, prob_active: Probabilities = ALL) -> Amount:
    """Expected number of weights left: parameters that something is multiplied with."""
    kernels = dict.fromkeys(op.kernel for op in structure.operations if op.kernel)
    sizes = (expected_size_of(structure, path, prob_active) for path in kernels)
    return _total(structure, prob_active, sizes)


def bytes(structure: Structure, prob_active: Probabilities = ALL) -> Amount:
    """Expected bytes of all arrays, state included.

    Single elements can't be taken out of an array: their zeros take as many.
    """
    return _total(
        structure,
        prob_active,
        (
            leaf.dtype.itemsize
            * _axes_size(structure, path, range(len(leaf.shape)), prob_active)
            for path, leaf in structure.arrays.items()
        ),
    )


def macs(structure: Structure, prob_active: Probabilities = ALL) -> Amount:
    """Expected multiply-accumulates."""
    return _total(structure, prob_active, per_operation(structure, prob_active))


def counted_once(structure: Structure, cost: Cost) -> tuple[str, ...]:
    """The loops that run as long as their values say and of which a cost counts one
    turn; none for a cost that doesn't ask how often they turn."""

    def twice(of: Polynomial) -> Polynomial:
        return {names: 2 * number for names, number in of.items()}

    operations = tuple(
        dataclasses.replace(op, macs=twice(op.macs), positions=twice(op.positions))
        if op.once
        else op
        for op in structure.operations
    )
    loops = tuple(dict.fromkeys(op.once for op in structure.operations if op.once))
    longer = dataclasses.replace(structure, operations=operations)
    # (A cost may be any function: whether it counts turns shows in what it gives.)
    return loops if loops and cost(longer, ALL) != cost(structure, ALL) else ()


def reference_flops(structure: Structure, prob_active: Probabilities = ALL) -> Amount:
    """Expected operations as the reference code of Louizos et al. (2018) counts them.

    A product that is summed over more than one axis is taken for a convolution.
    Products of activations count two operations for a multiply-accumulate.
    """
    total = _total(structure, prob_active, ())
    for op in structure.operations:
        if op.kernel is None:
            total = total + 2 * structure.expected(op.macs, prob_active)
            continue
        positions = structure.expected(op.positions, prob_active)
        shape = structure.arrays[op.kernel].shape
        if len(op.reads) > 1:
            # (2n - 1) E[out] for the products and sums, E[out] for the bias.
            fan_in = math.prod(shape[axis] for axis in op.reads)
            outputs = _axes_size(structure, op.kernel, op.makes, prob_active)
            total = total + positions * 2 * fan_in * outputs
        else:
            inputs = _axes_size(structure, op.kernel, op.reads, prob_active)
            outputs = math.prod(shape[axis] for axis in op.makes)
            total = total + positions * ((2 * inputs - 1) * outputs + outputs)
    return total


def flops_objective(structure: Structure, prob_active: Probabilities = ALL) -> Amount:
    """Expected operations as Tang, Adhikari and Lin (2018) count them."""
    total = macs(structure, prob_active)
    for op in structure.operations:
        if op.kernel is not None:
            outputs = _axes_size(structure, op.kernel, op.makes, prob_active)
            positions = structure.expected(op.positions, prob_active)
            total = total + positions * outputs
    return total


# Each is a sum over operations and arrays: what a group saves is counted over those
# that it has to do with.
COSTS: dict[str, Cost] = {
    "params": params,
    "weights": weights,
    "bytes": bytes,
    "macs": macs,
    "reference_flops": reference_flops,
    "flops_objective": flops_objective,
}
CONVENTIONS = ("macs", "reference_flops", "flops_objective")


def make(name: str) -> Cost:
    """The cost called `name`.

    Raises:
        ValueError: if there is none; the message lists those that exist.
    """
    if name not in COSTS:
        raise ValueError(f"unknown cost {name!r}; there is {', '.join(COSTS)}")
    return COSTS[name]


@dataclass(frozen=True, eq=False)
class Table:
    """Seconds of a call that were measured of networks of several sizes, as
    by `l0jax.measure_latency`.

    Args:
        groups: the groups whose sizes differ, one for each axis of `seconds`.
        sizes: for each of them the numbers of units that were measured, ascending.
        seconds: of a call, for each combination of sizes.

    Raises:
        ValueError: if a group has no sizes, if they don't ascend, or if
            `seconds` has another shape or a number that is no time.
    """

    groups: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    seconds: Float[np.ndarray, "..."]

    def __post_init__(self):
        if len(self.groups) != len(self.sizes):
            raise ValueError(
                f"sizes are given {len(self.sizes)} times for {len(self.groups)} "
                f"groups ({', '.join(self.groups)}); give them once for each"
            )
        for name, sizes in zip(self.groups, self.sizes, strict=True):
            if not sizes or (np.diff(sizes) <= 0).any():
                raise ValueError(f"the sizes of {name!r} must ascend, got {sizes}")
        shape = tuple(map(len, self.sizes))
        if self.seconds.shape != shape:
            raise ValueError(
                f"seconds must have shape {shape}, one for each combination of sizes, "
                f"got {self.seconds.shape}"
            )
        wrong = self.seconds[~(np.isfinite(self.seconds) & (self.seconds > 0))]
        if wrong.size:
            raise ValueError(f"seconds must be positive and finite, got {wrong[0]}")


def interpolated(tables: Sequence[Table], name: str = "latency") -> Cost:
    """Measured seconds as a cost: the sum over tables of what each says of the expected
    sizes of its groups, as in ProxylessNAS that over layers (Cai, Zhu and Han 2019,
    section 3.3).

    Between the measured sizes it is multilinear; beyond them it stays what it is at
    the nearest, with no gradient. Tables are taken as they are: where noise made a
    larger network the faster one, so it is here, and gradients point to it.

    Args:
        tables: of parts whose times add up; more often one, of the whole network.
        name: the cost's `__name__`, by which constraints and logs call it.

    Where groups have gates of their wholes (`Structure.whole`), it is the mean over
    what these may be: a branch that is there half of the time takes half of its
    seconds, not those of half of its units.

    Raises:
        ValueError: when called, if the structure lacks a group of a table, or a table
            has groups of more wholes than can be gone through.
    """

    def cost(structure: Structure, prob_active: Probabilities = ALL):
        seconds = (_mean_seconds(table, structure, prob_active) for table in tables)
        return sum(seconds, start=jnp.zeros(()))

    cost.__name__ = name
    return cost


MOST_WHOLES = 6


def _mean_seconds(
    table: Table, structure: Structure, prob_active: Probabilities
) -> Array:
    """The mean of `_seconds` over gates of wholes."""
    above = [
        (prob_active[whole][at], [n for n in names if n in table.groups])
        for whole, parts in structure.wholes.items()
        if whole in prob_active
        for at, names in enumerate(parts)
        if any(name in table.groups for name in names)
    ]
    if len(above) > MOST_WHOLES:
        raise ValueError(
            f"a table of {', '.join(table.groups)} has groups of {len(above)} wholes; "
            f"with more than {MOST_WHOLES} give a table for each part"
        )
    total = jnp.zeros(())
    for there in itertools.product((True, False), repeat=len(above)):
        chance, known = jnp.ones(()), dict(prob_active)
        for open_, (probability, names) in zip(there, above, strict=True):
            chance = chance * (probability if open_ else 1 - probability)
            if not open_:
                known |= {n: np.zeros(structure.groups[n].size) for n in names}
        total = total + chance * _seconds(table, structure, known)
    return total


def _seconds(table: Table, structure: Structure, prob_active: Probabilities) -> Array:
    dtype = jnp.result_type(float)
    seconds = jnp.asarray(table.seconds, dtype)
    for name, sizes in reversed([*zip(table.groups, table.sizes, strict=True)]):
        if name not in structure.groups:
            raise ValueError(
                f"a table is of group {name!r}, which the network doesn't have; there "
                f"is {', '.join(structure.groups)}"
            )
        whole = jnp.ones(structure.groups[name].size, dtype)
        count = jnp.asarray(prob_active.get(name, whole)).sum().astype(dtype)
        grid = jnp.asarray(sizes, dtype)
        # (`map_coordinates` has no gradient where nothing is removed yet.)
        seconds = jnp.apply_along_axis(
            lambda along, n=count, at=grid: jnp.interp(n, at, along), -1, seconds
        )
    return seconds


def exact(
    structure: Structure,
    keep: Mapping[str, Bool[np.ndarray, " units"]] | None = None,
    cost: Cost = macs,
) -> int:
    """A cost that is counted, after removal of the units that are not kept, as a whole
    number. (In float32, numbers beyond 16 million are rounded.)

    With a group that keeps no unit, all goes that was there for it alone: other units,
    arrays that nothing reads, and what is computed of them; unless a group was stated
    by hand.

    Raises:
        ValueError: if a group of `keep` is unknown or a vector has the wrong length.
    """
    keep = keep or {}
    check_lengths(keep, structure.groups)
    if emptied(structure, keep) and knows(structure, keep):
        keep = left(dict(structure.arrays), keep, structure.groups)
        structure = _without(structure, unread(structure, keep))
    flags = Certain({n: np.asarray(k, np.float64) for n, k in keep.items()})
    with jax.enable_x64(True):  # for costs that compute with JAX
        found = cost(structure, flags)
        return found if isinstance(found, int) else round(float(found))


def _without(structure: Structure, gone: Collection[str]) -> Structure:
    """Without arrays that nothing reads, and the products of these."""
    groups = {
        name: dataclasses.replace(
            group,
            used_by=tuple(slot for slot in group.used_by if slot.path not in gone),
            made_by=tuple(slot for slot in group.made_by if slot.path not in gone),
        )
        for name, group in structure.groups.items()
    }
    return dataclasses.replace(
        structure,
        groups=Found(groups, structure.frozen),
        operations=tuple(op for op in structure.operations if op.kernel not in gone),
        arrays={p: leaf for p, leaf in structure.arrays.items() if p not in gone},
        trainable=tuple(p for p in structure.trainable if p not in gone),
    )


def per_operation(
    structure: Structure, prob_active: Probabilities = ALL
) -> list[Amount]:
    """Expected multiply-accumulates of each of `structure.operations`."""
    return [expected_macs(structure, op, prob_active) for op in structure.operations]


def per_group(
    structure: Structure, cost: Cost = macs, prob_active: Probabilities = ALL
) -> dict[str, Amount]:
    """What would be saved by removing all units of each group."""
    check_lengths(prob_active, structure.groups)
    saved = {}
    for name, group in structure.groups.items():
        # What is the same with the group and without it need not be counted.
        part = _about(structure, name) if cost in COSTS.values() else structure
        known = {n: p for n, p in prob_active.items() if n in part.groups}
        none = {**known, name: jnp.zeros(group.size)}
        saved[name] = cost(part, known) - cost(part, none)
    return saved


def _about(structure: Structure, name: str) -> Structure:
    """The operations that depend on a group, the arrays in which it lies, and what else
    is known of these."""
    operations = structure.computing[name]
    lies = dict.fromkeys(slot.path for slot in structure.groups[name].slots)
    paths = lies | dict.fromkeys(op.kernel for op in operations if op.kernel)
    names = {n: None for op in operations for term in op.macs for n in term}
    names |= {n: None for op in operations for term in op.positions for n in term}
    names |= {n: None for path in paths for n in structure.lying_in[path]}
    names |= {whole: None for n in names for whole in structure.above(n)}
    return dataclasses.replace(
        structure,
        groups=Found({n: structure.groups[n] for n in names}, structure.frozen),
        operations=operations,
        arrays={path: structure.arrays[path] for path in paths},
        trainable=tuple(path for path in structure.trainable if path in lies),
    )


def _axes_size(
    structure: Structure, path: str, axes: Sequence[int], prob_active: Probabilities
) -> Amount:
    """Expected number of positions left along some axes of an array."""
    shape = structure.arrays[path].shape
    alone = tuple(n if axis in axes else 1 for axis, n in enumerate(shape))
    there = within(structure, path, prob_active)
    along = {
        name: Group(
            name,
            structure.groups[name].size,
            tuple(
                slot
                for slot in structure.groups[name].slots
                if slot.path == path and slot.axis in axes
            ),
        )
        for name in there
    }
    array = jax.ShapeDtypeStruct(alone, structure.arrays[path].dtype)
    return expected_size(array, path, there, along)


def _total(
    structure: Structure, prob_active: Probabilities, amounts: Iterable[Amount]
) -> Amount:
    check_lengths(prob_active, structure.groups)
    zero = 0 if isinstance(prob_active, Certain) else jnp.zeros(())
    return sum(amounts, start=zero)
