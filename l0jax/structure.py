"""The units of a model: its groups, what they cost, and what is left alone.

`l0jax.tracing` finds them. Here are the edits that a user may make of what was found,
and the table that shows it.
"""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from l0jax.polynomials import Polynomial, expected, substitute
from l0jax.reading import Traced
from l0jax.units import (
    Amount,
    Certain,
    Group,
    Keep,
    Probabilities,
    Slot,
    arrays,
    check,
    expected_size,
    left,
    owners,
    shrink,
    shrink_groups,
)


@dataclass(frozen=True)
class Operation:
    """A dense layer, a convolution, or a product of activations.

    Args:
        primitive: its name.
        where: the line of the program.
        macs: multiply-accumulates for one example, from the sizes of groups.
        kernel: path of the parameter that it multiplies by, if there is one.
        positions: how often each weight of the kernel is used for one example.
        reads: axes of the kernel that are summed over.
        makes: axes of the kernel that are left.
        once: the loop around it that runs as long as its values say, of which one turn
            is counted; empty if there is none.
    """

    primitive: str
    where: str
    macs: Polynomial
    kernel: str | None
    positions: Polynomial
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    once: str = ""


@dataclass(frozen=True)
class Frozen:
    """Units that can't be removed, and why: the first reason, and all of the first few
    that were found."""

    name: str
    size: int
    slots: tuple[Slot, ...]
    why: str
    reasons: tuple[str, ...] = ()


class Found(dict[str, Group]):
    """Groups by name, which know of the frozen ones, to say why one is not there."""

    frozen: Mapping[str, Frozen]

    def __init__(self, groups: Mapping[str, Group], frozen: Mapping[str, Frozen]):
        super().__init__(groups)
        self.frozen = frozen


@dataclass(frozen=True)
class Structure:
    """The units of a model, what they cost, and what is left alone.

    Attributes:
        groups: the groups of units by name, in the order in which they are used.
        inputs: for each group whose units lie in an input too, where: slots of the
            tuple of inputs, `Slot("0", 1)` for the second axis of the first.
        frozen: units that can't be removed.
        unknown: primitives without a rule, and the first line that has each.
        operations: what computes.
        arrays: shape and dtype of each array of the parameters, by path.
        trainable: paths of those that are parameters rather than state.
        kinds: what kind of units each group has, one of `l0jax.kinds.KINDS`; "mixed"
            if groups of several kinds were merged.
        per_example: whether costs are those of one example: whether the leading axis of
            the inputs is a batch, whose examples are computed apart from one another.
            They aren't if anything mixes or sorts them, or if some are picked, put
            elsewhere, padded or concatenated, as nodes of a graph are. Then costs are
            those of all that was traced, for every operation.
        traced: what was read, for `l0jax.narrow`. It is pickled without the program of
            the function: groups, costs and edits go to other processes, narrowing
            doesn't.
        notes: what else one must know of how it was read: a module's mode, loops that
            are counted once since nobody knows how often they turn.
        wholes: groups each of whose units stands for all units of other groups; see
            `whole`.
    """

    groups: Found
    inputs: Mapping[str, tuple[Slot, ...]]
    frozen: Mapping[str, Frozen]
    unknown: Mapping[str, str]
    operations: tuple[Operation, ...]
    arrays: Mapping[str, jax.ShapeDtypeStruct]
    trainable: tuple[str, ...]
    kinds: Mapping[str, str]
    per_example: bool
    traced: Traced = field(repr=False)
    notes: tuple[str, ...] = ()
    wholes: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)

    # Users' edits. Each gives a new structure.

    def only(self, *names: str) -> "Structure":
        """Only these groups, in this order; units of the others stay."""
        self._check(names)
        return self._with({name: self.groups[name] for name in names})

    def rename(self, names: Mapping[str, str]) -> "Structure":
        """Groups under other names, `{old: new}`."""
        self._check(names)
        called = [names.get(name, name) for name in self.groups]
        if len(set(called)) < len(called):
            twice = next(name for name, n in Counter(called).items() if n > 1)
            raise ValueError(f"two groups would be called {twice!r}")
        groups = {
            names.get(name, name): dataclasses.replace(
                group, name=names.get(name, name)
            )
            for name, group in self.groups.items()
        }
        return self._with(groups, {old: (new,) for old, new in names.items()})

    def merge(self, name: str, members: Sequence[str]) -> "Structure":
        """One group for several of one size: their j-th units come and go together.

        Raises:
            ValueError: if a group is unknown or their sizes differ.
        """
        self._check(members)
        sizes = {member: self.groups[member].size for member in members}
        for member in members:
            self._check_apart(member, "merged")
        if len(set(sizes.values())) != 1:
            raise ValueError(f"only groups of one size can be merged, got {sizes}")
        merged = Group(
            name,
            self.groups[members[0]].size,
            tuple(slot for m in members for slot in self.groups[m].used_by),
            tuple(slot for m in members for slot in self.groups[m].made_by),
        )
        groups = {}
        for old, group in self.groups.items():
            if old not in members:
                groups[old] = group
            elif name not in groups:
                groups[name] = merged
        return self._with(groups, dict.fromkeys(members, (name,)))

    def split(self, name: str, into: Mapping[str, Sequence[int]]) -> "Structure":
        """Several groups for one: `into` gives the units of each.

        Raises:
            ValueError: unless `into` holds every unit once.
        """
        self._check([name])
        if name in self.wholes:
            self._check_apart(name, "split")
        group = self.groups[name]
        if sorted(itertools.chain(*into.values())) != list(range(group.size)):
            raise ValueError(
                f"group {name!r} has {group.size} units; each must be in one part, got "
                f"{ {part: list(units) for part, units in into.items()} }"
            )
        groups = {}
        for old, kept in self.groups.items():
            if old != name:
                groups[old] = kept
                continue
            for part, units in into.items():
                groups[part] = Group(
                    part,
                    len(units),
                    tuple(_part(slot, units, group.size) for slot in group.used_by),
                    tuple(_part(slot, units, group.size) for slot in group.made_by),
                )
        return self._with(groups, {name: tuple(into)}, {name: dict(into)})

    def add(self, group: Group) -> "Structure":
        """One more group, stated by hand: gates at single positions of an axis, or at
        single weights. It is gated, counted and sliced like the others; a program can't
        be narrowed along an axis of it."""
        if group.name in self.groups:
            raise ValueError(f"there is a group {group.name!r} already")
        check(self.arrays, {group.name: group})
        return self._with({**self.groups, group.name: group})

    def whole(self, name: str, members: Sequence[str]) -> "Structure":
        """One more group, whose unit j stands for all units of the j-th of some groups:
        gates on whole layers, heads of a block, branches, beside those of their units.

        A unit is there if its own gate is open and that of the whole is. Costs under
        independent gates stay exact where no operation's cost is a product of two
        groups of one whole: of a branch, name the group that its output is summed over.

        Args:
            name: of the new group.
            members: groups, one for each of its units.

        Raises:
            ValueError: if a group is unknown, named twice, a whole itself or of single
                weights; if there is a group called `name`.
        """
        self._check(members)
        if len(set(members)) < len(members):
            twice = next(m for m, n in Counter(members).items() if n > 1)
            raise ValueError(f"group {twice!r} is named twice for {name!r}")
        for member in members:
            alone = any(slot.axis is None for slot in self.groups[member].slots)
            if member in self.wholes or alone:
                raise ValueError(
                    f"group {member!r} "
                    + ("is of single weights" if alone else "is a whole itself")
                    + f" and can't be a unit of {name!r}"
                )

        def slots(of: Callable[[Group], Iterable[Slot]]) -> tuple[Slot, ...]:
            found = []
            for at, member in enumerate(members):
                group = self.groups[member]
                for slot in of(group):
                    there = owners(slot, group.size) >= 0
                    unit_of = tuple(np.where(there, at, -1).tolist())
                    found.append(Slot(slot.path, slot.axis, unit_of))
            return tuple(found)

        group = Group(
            name,
            len(members),
            slots(lambda g: g.used_by),
            slots(lambda g: g.made_by),
        )
        more = {name: tuple((member,) for member in members)}
        return dataclasses.replace(self.add(group), wholes={**self.wholes, **more})

    def _check_apart(self, name: str, edited: str) -> None:
        """Raises ValueError for a whole, or a group that is a unit of one."""
        above = (name,) if name in self.wholes else self.above(name)
        if above:
            raise ValueError(
                f"group {name!r} can't be {edited}: the units of {above[0]!r} stand "
                "for all of groups as they are; edit first, then call whole"
            )

    def above(self, member: str) -> tuple[str, ...]:
        """The wholes of which a group is a unit."""
        return tuple(
            whole
            for whole, parts in self.wholes.items()
            if any(member in names for names in parts)
        )

    def nested(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Flags or probabilities of groups, each times that of its whole."""
        found = dict(values)
        for whole, parts in self.wholes.items():
            if whole not in values:
                continue
            for at, names in enumerate(parts):
                for name in names:
                    if name in self.groups:
                        outer = values[whole][at]
                        ones = np.ones(self.groups[name].size, outer.dtype)
                        found[name] = found.get(name, ones) * outer
        return Certain(found) if isinstance(values, Certain) else found

    def expected(self, of: Polynomial, prob_active: Probabilities) -> Amount:
        """What a sum of products of group sizes is expected to be."""
        return expected(of, self.groups, self.nested(prob_active))

    def extend(
        self, name: str, *, made_by: Iterable[Slot] = (), used_by: Iterable[Slot] = ()
    ) -> "Structure":
        """A group that lies in more arrays than the program shows.

        Raises:
            ValueError: if a group is unknown, a whole, or a unit of one.
        """
        self._check([name])
        self._check_apart(name, "extended")
        group = self.groups[name]
        longer = dataclasses.replace(
            group,
            made_by=(*group.made_by, *made_by),
            used_by=(*group.used_by, *used_by),
        )
        return self._with({**self.groups, name: longer})

    def shrink(self, keep: Keep) -> "Structure":
        """The structure of the smaller model that `l0jax.shrink` gives.

        Raises:
            ValueError: as `l0jax.shrink`.
        """
        keep = left(self.arrays, keep, self.groups)
        number = {name: np.cumsum(flags) - 1 for name, flags in keep.items()}

        def after(member: tuple[str, int]) -> tuple[str, int]:
            name, unit = member
            if name not in keep:
                return member
            return (name, int(number[name][unit])) if keep[name][unit] else GONE

        members = {
            variable: tuple(map(after, units))
            for variable, units in self.traced.members.items()
        }
        return dataclasses.replace(
            self,
            groups=Found(shrink_groups(self.arrays, keep, self.groups), self.frozen),
            inputs={
                name: tuple(
                    _part(slot, np.flatnonzero(keep[name]).tolist(), len(keep[name]))
                    for slot in slots
                )
                for name, slots in self.inputs.items()
            },
            arrays=arrays(
                jax.eval_shape(
                    lambda tree: shrink(tree, keep, self.groups), dict(self.arrays)
                )
            ),
            traced=dataclasses.replace(self.traced, members=members, others={}),
            wholes={
                name: tuple(itertools.compress(parts, keep[name]))
                for name, parts in self.wholes.items()
            },
        )

    def _check(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.groups:
                continue
            if name in self.frozen:
                raise ValueError(f"group {name!r} is frozen: {self.frozen[name].why}")
            raise ValueError(
                f"unknown group {name!r}; there is {', '.join(self.groups)}"
            )

    def _with(
        self,
        groups: Mapping[str, Group],
        renamed: Mapping[str, tuple[str, ...]] | None = None,
        parts: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
    ) -> "Structure":
        """With other groups; `renamed` says what stands for the size of an old one."""
        renamed = renamed or {}
        sizes: dict[str, Polynomial] = {
            # Of what is no group any more all units stay.
            name: {(): group.size}
            for name, group in self.groups.items()
            if name not in groups
        }
        for old, new in renamed.items():
            sizes[old] = dict.fromkeys(((name,) for name in new), 1)
        operations = tuple(
            dataclasses.replace(
                each,
                macs=substitute(each.macs, sizes),
                positions=substitute(each.positions, sizes),
            )
            for each in self.operations
        )
        inputs: dict[str, tuple[Slot, ...]] = {}
        for name, slots in self.inputs.items():
            for new_name in renamed.get(name, (name,)):
                part = (parts or {}).get(name, {}).get(new_name)
                size = self.groups[name].size if name in self.groups else 0
                more = [s if part is None else _part(s, part, size) for s in slots]
                inputs[new_name] = (*inputs.get(new_name, ()), *more)
        members = {
            variable: tuple(
                _renamed(member, renamed, (parts or {}).get(member[0]))
                for member in units
            )
            for variable, units in self.traced.members.items()
        }
        wholes = {}
        for old, units in self.wholes.items():
            (name,) = renamed.get(old, (old,))
            if name not in groups:
                continue
            wholes[name] = tuple(
                tuple(new for n in names for new in renamed.get(n, (n,)))
                for names in units
            )
            missing = [n for names in wholes[name] for n in names if n not in groups]
            if missing:
                raise ValueError(
                    f"group {missing[0]!r} is left out, and {name!r} has a unit that "
                    "stands for it: keep both, or leave both out (Learned(only=…) "
                    "gates some of the groups that there are)"
                )
        kinds: dict[str, str] = {}
        for old, kind in self.kinds.items():
            for name in renamed.get(old, (old,)):
                kinds[name] = kind if kinds.get(name, kind) == kind else "mixed"
        return dataclasses.replace(
            self,
            groups=Found(groups, self.frozen),
            kinds={name: kind for name, kind in kinds.items() if name in groups},
            inputs={name: slots for name, slots in inputs.items() if name in groups},
            operations=operations,
            traced=dataclasses.replace(self.traced, members=members, others={}),
            wholes=wholes,
        )

    @functools.cached_property
    def lying_in(self) -> Mapping[str, tuple[str, ...]]:
        """For each array the groups whose units lie in it."""
        found: dict[str, dict[str, None]] = {path: {} for path in self.arrays}
        for name, group in self.groups.items():
            for slot in group.slots:
                found.setdefault(slot.path, {})[name] = None
        return {path: tuple(names) for path, names in found.items()}

    @functools.cached_property
    def computing(self) -> Mapping[str, tuple[Operation, ...]]:
        """For each group the operations whose costs depend on its size."""
        found: dict[str, list[Operation]] = {name: [] for name in self.groups}
        for op in self.operations:
            names = {n: None for term in (*op.macs, *op.positions) for n in term}
            if op.kernel is not None:
                names |= dict.fromkeys(self.lying_in[op.kernel])
            names |= {whole: None for name in names for whole in self.above(name)}
            for name in names:
                found[name].append(op)
        return {name: tuple(operations) for name, operations in found.items()}

    # Edits give new structures, so that one may be in several places.

    def __copy__(self) -> "Structure":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Structure":
        return self

    def __str__(self) -> str:
        return _table(self)


def within(
    structure: Structure, path: str, prob_active: Probabilities
) -> Probabilities:
    """The probabilities of groups that lie in one array."""
    there = {n: prob_active[n] for n in structure.lying_in[path] if n in prob_active}
    return Certain(there) if isinstance(prob_active, Certain) else there


def expected_size_of(
    structure: Structure, path: str, prob_active: Probabilities
) -> Amount:
    """Expected number of elements left of one array, under independent gates."""
    there = within(structure, path, prob_active)
    return expected_size(structure.arrays[path], path, there, structure.groups)


def expected_macs(
    structure: Structure,
    op: Operation,
    prob_active: Probabilities,
) -> Amount:
    """Expected multiply-accumulates of one operation, under independent gates."""
    if op.kernel is None:
        return structure.expected(op.macs, prob_active)
    inside = within(structure, op.kernel, prob_active)
    if any(name in inside for names in op.positions for name in names):
        return structure.expected(op.macs, prob_active)
    size = expected_size_of(structure, op.kernel, prob_active)
    return size * structure.expected(op.positions, prob_active)


GONE = ("", -1)
"""The group and the unit of positions that an earlier shrink has taken out."""


def _part(slot: Slot, units: Sequence[int], size: int) -> Slot:
    """A slot of some of a group's units, numbered anew."""
    new_unit = np.full(size + 1, -1)
    new_unit[np.asarray(units, int)] = np.arange(len(units))
    return Slot(slot.path, slot.axis, tuple(new_unit[owners(slot, size)].tolist()))


def _renamed(member, renamed, parts):
    name, unit = member
    if parts is not None:
        for part, units in parts.items():
            if unit in units:
                return part, list(units).index(unit)
    return renamed.get(name, (name,))[0], unit


# ------------------------------------------------------------------------ as a table


def _table(structure: Structure) -> str:
    """Groups with their cost, then what is left alone and why."""
    total = sum(expected_macs(structure, op, Certain()) for op in structure.operations)
    lines = [
        ["group", "units", "kind", "made by", "used by", "MACs per unit", "in all"]
    ]
    for name, group in structure.groups.items():
        none = Certain({name: np.zeros(group.size)})
        saved = sum(
            expected_macs(structure, op, Certain()) - expected_macs(structure, op, none)
            for op in structure.computing[name]
        )
        made = [_short(slot) for slot in group.made_by]
        made += ["inputs " + _short(slot) for slot in structure.inputs.get(name, ())]
        lines.append(
            [
                name,
                f"{group.size:,}",
                structure.kinds.get(name, "by hand"),
                ", ".join(made) or "-",
                ", ".join(map(_short, group.used_by)),
                f"{saved / max(group.size, 1):,.0f}",
                f"{100 * saved / max(total, 1):.1f} %",
            ]
        )
    text = [
        f"{len(structure.groups)} groups of units, {total:,.0f} multiply-accumulates"
        f"{_of_what(structure)}, {_numbers(structure):,} numbers",
        "",
        *columns(lines, right=(1, 5, 6)),
    ]
    text += _left_alone(structure)
    for primitive, line in structure.unknown.items():
        text.append(f"no rule for {primitive}, first at {line}: what it touches stays")
    text += structure.notes
    return "\n".join(text)


def _of_what(structure: Structure) -> str:
    """Of how many examples costs are, if they are not those of one."""
    if structure.per_example:
        return ""
    leading = [v.axes[0].size for v in structure.traced.inputs.values() if v.axes]
    return f" of all {leading[0]} examples together, which depend on one another"


WINDOW = "a window slides over it"


def _left_alone(structure: Structure) -> list[str]:
    """Frozen units under one another if they have the same reasons, which follow."""
    text: list[str] = []
    together: dict[tuple[str, ...], list[str]] = {}
    windows = 0
    for each in structure.frozen.values():
        reasons = each.reasons or (each.why,)
        if all(why.endswith(WINDOW) for why in reasons):
            windows += 1
            continue
        together.setdefault(reasons, []).append(
            f"  {each.name} ({each.size}: {', '.join(map(_short, each.slots[:3]))}"
            f"{', …' if len(each.slots) > 3 else ''})"
        )
    for reasons, names in together.items():
        text += names + [f"    {why}" for why in reasons[:3]]
        if len(reasons) > 3:
            text.append("    and more, which `reasons` of each tells")
    if text:
        text = ["", "left alone:", *text]
    if windows:
        text.append(f"  {windows} axes of kernels over which windows slide")
    return text


def _numbers(structure: Structure) -> int:
    return sum(math.prod(structure.arrays[path].shape) for path in structure.trainable)


def _short(slot: Slot) -> str:
    return slot.path if slot.axis is None else f"{slot.path}:{slot.axis}"


def columns(lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of cells under one another; a cell that is too long is shortened."""
    lines = [
        [cell if len(cell) <= 48 else cell[:45] + "…" for cell in line]
        for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
