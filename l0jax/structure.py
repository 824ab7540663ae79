"""Which units a model has, read from its jaxpr.

`trace` gives every axis of every array a type (`l0jax.axes`) and lets each primitive
say which of them agree (`l0jax.rules`). A variable that is left over is a group of
units: its positions can be taken out of every array that carries it. Whatever can't be
proved removable is frozen, and says why.
"""

import dataclasses
import itertools
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import source_info_util
from jaxtyping import Array, Float, PyTree

from l0jax.axes import (
    Sum,
    Type,
    Variable,
    freeze,
    meets_itself,
    resolve,
    unify,
    unit_of,
    variables,
)
from l0jax.polynomials import Polynomial, expected, product, substitute
from l0jax.rules import (
    NEVER,
    RULES,
    Contraction,
    Reading,
    Value,
    Zeros,
    frozen,
    new,
    opaque,
)
from l0jax.units import (
    Group,
    Keep,
    Slot,
    arrays,
    check,
    expected_size,
    left,
    shrink,
    shrink_groups,
)

# -------------------------------------------------------------------- reading programs


@dataclass(frozen=True)
class Line:
    """One equation of a program, with what is known of its values.

    Attributes:
        eqn: the equation.
        ins: the values that it reads.
        outs: the values that it writes.
        inner: the programs that it runs, if it runs any.
    """

    eqn: Any
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    inner: tuple["Program", ...]


@dataclass(frozen=True)
class Program:
    """A jaxpr with what is known of all its values."""

    jaxpr: Any
    constants: tuple[Any, ...]
    ins: tuple[Value, ...]
    lines: tuple[Line, ...]
    outs: tuple[Value, ...]


def read(
    reading: Reading, closed: Any, values: Sequence[Value], caller: str = ""
) -> Program:
    """Reads a jaxpr, closed over constants or without any, called in line `caller`."""
    jaxpr, constants = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    # The arguments of jaxprs without constants may still come first as `constvars`.
    inside = [_constant(reading, constant) for constant in constants]
    given = [*inside, *values]
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], given, strict=True))

    def value_of(atom):
        if isinstance(atom, jax.extend.core.Literal):
            return _constant(reading, atom.val)
        return known[atom]

    lines = []
    for eqn in jaxpr.eqns:
        ins = [value_of(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        # What a library compiled before has no line of its own, but that of the call.
        line = line_of(eqn) or caller
        reading.where = f"{name} at {line or 'an unknown line'}"
        inner: tuple[Program, ...] = ()
        if name in RULES:
            outs = RULES[name](reading, eqn, ins)
        elif name in RUNS:
            outs, inner = RUNS[name](reading, eqn, ins, line)
        else:
            reading.unknown.setdefault(name, line or "an unknown line")
            reading.where = f"no rule for {reading.where}"
            outs = frozen(reading, eqn, ins)
        known.update(zip(eqn.outvars, outs, strict=True))
        lines.append(Line(eqn, tuple(ins), tuple(outs), inner))
    outs = tuple(value_of(atom) for atom in jaxpr.outvars)
    return Program(jaxpr, tuple(constants), tuple(given), tuple(lines), outs)


def _constant(reading: Reading, constant: Any) -> Value:
    value = new(np.shape(constant), data=False)
    reading.constants.append(value)
    return value


def line_of(eqn: Any) -> str:
    """`file:line (function)` of the user's code that an equation came from, or ""."""
    line = source_info_util.summarize(eqn.source_info)
    for folder in ("site-packages/", f"{Path.cwd()}/"):
        line = line.rpartition(folder)[2]
    return line.strip(" :")


Runs = Callable[
    [Reading, Any, list[Value], str], tuple[list[Value], tuple[Program, ...]]
]


def _call(reading, eqn, values, line):
    """A jaxpr that is run once, on the equation's own arguments."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            program = read(reading, eqn.params[name], values, line)
            return list(program.outs), (program,)
    raise AssertionError(f"{eqn.primitive.name} has no jaxpr")  # pragma: no cover


def _meet(reading: Reading, before: Sequence[Value], after: Sequence[Value]) -> None:
    """Values that come round again in a loop have the types that they began with."""
    for a, b in zip(before, after, strict=True):
        for x, y in zip(a.axes, b.axes, strict=True):
            unify(x, y, reading.where)


def _forget(value: Value) -> Value:
    """What a loop changes: zeros that held before it need not hold after a turn."""
    return Value(value.axes, (NEVER,) * len(value.axes), value.data)


def constants_and_carries(scan: Any) -> tuple[int, int]:
    """How many of a scan's arguments are constants, and how many are carried."""
    if "num_consts" in scan.params:  # before JAX 0.11
        return scan.params["num_consts"], scan.params["num_carry"]
    constants, carries, _ = scan.params["ft_in"].unpack()
    return len(constants), len(carries)


def _scan(reading, eqn, values, line):
    consts, carried = constants_and_carries(eqn)
    where, length = reading.where, eqn.params["length"]
    loop = f"{where}: a loop runs over it"
    carry = [*map(_forget, values[consts : consts + carried])]
    stacked = values[consts + carried :]
    for value in stacked:
        freeze(value.axes[0], loop)
    rows = [
        dataclasses.replace(
            value,
            axes=value.axes[1:],
            zeros=value.zeros[1:],
            parts=value.parts * length,
            summed=(),
        )
        for value in stacked
    ]
    reading.times *= length
    given = [*values[:consts], *carry, *rows]
    program = read(reading, eqn.params["jaxpr"], given, line)
    reading.times //= max(length, 1)
    reading.where = where
    found = program.outs
    _meet(reading, carry, found[:carried])
    (along,) = opaque((length,), loop).axes
    outs = [
        *map(_forget, found[:carried]),
        *(Value((along, *v.axes), (NEVER, *v.zeros), v.data) for v in found[carried:]),
    ]
    return outs, (program,)


def _while(reading, eqn, values, line):
    tested, turned = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    where = reading.where
    carry = [*map(_forget, values[tested + turned :])]
    test = read(reading, eqn.params["cond_jaxpr"], [*values[:tested], *carry], line)
    given = values[tested : tested + turned]
    body = read(reading, eqn.params["body_jaxpr"], [*given, *carry], line)
    reading.where = where
    _meet(reading, carry, body.outs)
    return [*map(_forget, body.outs)], (test, body)


def _cond(reading, eqn, values, line):
    where, before = reading.where, reading.contractions
    programs, costs = [], []
    for branch in eqn.params["branches"]:
        reading.contractions = []
        programs.append(read(reading, branch, values[1:], line))
        costs.append(reading.contractions)
    reading.where = where
    # A network costs what its costliest branch does.
    reading.contractions = before + max(costs, key=_multiply_accumulates)
    for other in programs[1:]:
        _meet(reading, programs[0].outs, other.outs)
    return [*map(_forget, programs[0].outs)], tuple(programs)


def _multiply_accumulates(contractions: Sequence[Contraction]) -> int:
    return sum(
        each.times * math.prod(axis.size for axis in each.factors)
        for each in contractions
    )


CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
)
RUNS: dict[str, Runs] = {
    **dict.fromkeys(CALLS, _call),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}

# ------------------------------------------------------------------------- the result


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
    """

    primitive: str
    where: str
    macs: Polynomial
    kernel: str | None
    positions: Polynomial
    reads: tuple[int, ...]
    makes: tuple[int, ...]


@dataclass(frozen=True)
class Frozen:
    """Units that can't be removed, and why."""

    name: str
    size: int
    slots: tuple[Slot, ...]
    why: str


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
        traced: what was read, for `l0jax.narrow`.
    """

    groups: Found
    inputs: Mapping[str, tuple[Slot, ...]]
    frozen: Mapping[str, Frozen]
    unknown: Mapping[str, str]
    operations: tuple[Operation, ...]
    arrays: Mapping[str, jax.ShapeDtypeStruct]
    trainable: tuple[str, ...]
    traced: "Traced" = field(repr=False)

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
        be narrowed along it."""
        if group.name in self.groups:
            raise ValueError(f"there is a group {group.name!r} already")
        check(self.arrays, {group.name: group})
        return self._with({**self.groups, group.name: group})

    def extend(
        self, name: str, *, made_by: Iterable[Slot] = (), used_by: Iterable[Slot] = ()
    ) -> "Structure":
        """A group that lies in more arrays than the program shows."""
        self._check([name])
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
            arrays=arrays(
                jax.eval_shape(
                    lambda tree: shrink(tree, keep, self.groups), dict(self.arrays)
                )
            ),
            traced=dataclasses.replace(self.traced, members=members),
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
        operations = tuple(
            dataclasses.replace(
                each,
                macs=substitute(each.macs, renamed),
                positions=substitute(each.positions, renamed),
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
        return dataclasses.replace(
            self,
            groups=Found(groups, self.frozen),
            inputs={name: slots for name, slots in inputs.items() if name in groups},
            operations=operations,
            traced=dataclasses.replace(self.traced, members=members),
        )

    def __str__(self) -> str:
        return _table(self)


def expected_macs(
    structure: Structure,
    op: Operation,
    prob_active: Mapping[str, Float[Array, " units"]],
) -> Float[Array, ""]:
    """Expected multiply-accumulates of one operation, under independent gates."""
    groups = structure.groups
    if op.kernel is None:
        return expected(op.macs, groups, prob_active)
    inside = {
        name
        for name in prob_active
        if any(slot.path == op.kernel for slot in groups[name].slots)
    }
    if any(name in inside for names in op.positions for name in names):
        return expected(op.macs, groups, prob_active)
    array = structure.arrays[op.kernel]
    size = expected_size(array, op.kernel, prob_active, groups)
    return size * expected(op.positions, groups, prob_active)


@dataclass(frozen=True)
class Traced:
    """What `trace` read.

    Attributes:
        program: the jaxpr and the types of all its values.
        params: what is known of each array of the parameters, by path.
        inputs: the same of the inputs.
        given: shapes and dtypes of the inputs.
        in_tree: the tree of `(params, *inputs)`.
        out_tree: the tree of what the function gives.
        members: for each variable that is a group, the group and the unit of each of
            its positions, or `GONE`.
        resizable: variables of inputs that may have any size: the batch.
    """

    program: Program
    params: Mapping[str, Value]
    inputs: Mapping[str, Value]
    given: tuple[jax.ShapeDtypeStruct, ...]
    in_tree: Any
    out_tree: Any
    members: Mapping[Variable, tuple[tuple[str, int], ...]]
    resizable: frozenset[Variable]


GONE = ("", -1)
"""The group and the unit of positions that an earlier shrink has taken out."""


def _part(slot: Slot, units: Sequence[int], size: int) -> Slot:
    """A slot of some of a group's units, numbered anew."""
    new_unit = np.full(size + 1, -1)
    new_unit[np.asarray(units, int)] = np.arange(len(units))
    old = np.arange(size) if slot.unit_of is None else np.asarray(slot.unit_of)
    return Slot(slot.path, slot.axis, tuple(new_unit[old].tolist()))


def _renamed(member, renamed, parts):
    name, unit = member
    if parts is not None:
        for part, units in parts.items():
            if unit in units:
                return part, list(units).index(unit)
    return renamed.get(name, (name,))[0], unit


# ---------------------------------------------------------------------------- tracing


class TraceError(ValueError):
    """The model can't be traced."""


def trace(
    apply: Callable | nnx.Module,
    params: PyTree = None,
    *inputs: PyTree,
    frozen: Iterable[str] = (),
) -> Structure:
    """The groups of units of `apply(params, *inputs)`, and what they cost.

    `trace(module, *inputs)` reads a Flax NNX module; its arrays are those of
    `nnx.state(module)`.

    Args:
        apply: any function of JAX.
        params: any pytree of arrays or of their shapes: parameters, running statistics.
            All of them may lose units. Of Linen's variables, the collection `params` is
            what is trained.
        *inputs: pytrees of arrays or of their shapes. The leading axis of each is taken
            for the batch. If parameters read an axis of an input, its positions are a
            group too: removing some is feature selection.
        frozen: paths of arrays, or of what holds arrays, that keep all their units.

    Raises:
        TraceError: if the function can't be traced: its Python code looks at the values
            of arrays. The message names the line.
        ValueError: if `frozen` names what isn't there.
    """
    if isinstance(apply, nnx.Module):
        graph, state = nnx.split(apply)
        inputs = inputs if params is None else (params, *inputs)
        trained = arrays(nnx.state(apply, nnx.Param))
        structure = _trace(
            lambda state, *inputs: nnx.merge(graph, state)(*inputs),
            state,
            inputs,
            frozen,
        )
        return dataclasses.replace(structure, trainable=tuple(trained))
    return _trace(apply, params, inputs, frozen)


def _trace(apply, params, inputs, kept) -> Structure:
    try:
        closed, out_shape = jax.make_jaxpr(apply, return_shape=True)(params, *inputs)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise TraceError(
            f"the model can't be traced: {_culprit(error)} looks at the value of an "
            "array; use jax.lax.cond, jnp.where or sizes instead"
        ) from error
    leaves = arrays(params)
    stored = {}
    for path, leaf in leaves.items():
        value = new(leaf.shape, data=False)
        zeros = tuple(Zeros(frozenset({(path, at)})) for at in range(len(leaf.shape)))
        stored[path] = Value(value.axes, zeros, data=False, array=path)
    for name in kept:
        within = [p for p in stored if p == name or p.startswith(f"{name}.")]
        if not within:
            raise ValueError(
                f"frozen: no array at {name!r}; there is {', '.join(stored)}"
            )
        for path in within:
            for axis in stored[path].axes:
                freeze(axis, "the user froze it")
    given = {path: new(leaf.shape, data=True) for path, leaf in arrays(inputs).items()}
    reading = Reading()
    program = read(reading, closed, [*stored.values(), *given.values()])
    lies = _places(stored)
    gated = _gated(reading, lies)
    fixed = {
        variable
        for value in reading.constants
        for axis in value.axes
        for variable in variables(axis)
    }
    resizable = frozenset(
        variable
        for value in given.values()
        for axis in value.axes
        for variable in variables(axis)
        if variable.frozen is None and variable not in lies and variable not in fixed
    )
    for value in program.outs:
        for axis in value.axes:
            freeze(axis, "it is an output")
    batch = frozenset(
        variable
        for value in given.values()
        for axis in value.axes[:1]
        for variable in variables(axis)
        if variable in resizable
    )
    traced = Traced(
        program,
        stored,
        given,
        tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays(inputs).values()),
        jax.tree.structure((params, *inputs)),
        jax.tree.structure(out_shape),
        {},
        resizable,
    )
    trained = _trained(leaves)
    return _collect(reading, traced, lies, gated, batch, leaves, trained)


def _trained(leaves: Mapping[str, Any]) -> list[str]:
    """Paths of the parameters: of Linen's variables those below `params`."""
    collections = {path.partition(".")[0] for path in leaves}
    linen = "params" in collections and all("." in path for path in leaves)
    return [
        path
        for path, leaf in leaves.items()
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
        and (not linen or path.startswith("params."))
    ]


def _culprit(error: Exception) -> str:
    """The last line of the traceback that is neither JAX's nor Flax's nor ours."""
    inside = [Path(module.__file__ or "").parent for module in (jax, nnx)]
    inside = [inside[0], inside[1].parent, Path(__file__).parent]
    frames = traceback.extract_tb(error.__traceback__)
    users = [
        frame
        for frame in frames
        if not any(Path(frame.filename).is_relative_to(folder) for folder in inside)
    ]
    frame = (users or frames)[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line})"


Place = tuple[str, int]


def _places(stored: Mapping[str, Value]) -> dict[Variable, dict[Place, None]]:
    """Axes of parameters in which each variable lies, in their order."""
    lies: dict[Variable, dict[Place, None]] = {}
    for path, value in stored.items():
        for at, axis in enumerate(value.axes):
            for variable in dict.fromkeys(variables(axis)):
                if meets_itself(axis, variable):
                    freeze(variable, "it meets itself in a product")
                lies.setdefault(variable, {})[path, at] = None
    return lies


def _gated(
    reading: Reading, lies: Mapping[Variable, dict[Place, None]]
) -> dict[Variable, dict[Place, None]]:
    """Where the gates of each variable belong, in the order of the program."""
    gated: dict[Variable, dict[Place, None]] = {}
    for axis, candidates, where in reading.used:
        for variable in dict.fromkeys(variables(axis)):
            if meets_itself(axis, variable):
                freeze(variable, f"{where}: it meets itself in a product")
            for zeros in candidates:
                slots = [p for p in sorted(zeros.slots) if p in lies.get(variable, ())]
                if slots:
                    gated.setdefault(variable, {}).update(dict.fromkeys(slots))
                    break
            else:
                freeze(variable, f"{where}: no parameter reads it")
    return gated


def _collect(reading, traced, lies, gated, batch, leaves, trained) -> Structure:
    stored, given = traced.params, traced.inputs
    order = {variable: at for at, variable in enumerate(gated)}
    for variable in lies:
        if variable not in gated:
            freeze(variable, "nothing reads it")
    groups: dict[str, Group] = {}
    inputs: dict[str, tuple[Slot, ...]] = {}
    left_alone: dict[str, Frozen] = {}
    names: Counter = Counter()
    name_of: dict[Variable, str] = {}
    for variable in sorted(order.keys() & lies.keys(), key=order.__getitem__):
        if variable.frozen:
            continue
        used = {place: None for place in gated[variable] if place in lies[variable]}
        made = tuple(
            _slot(stored, place, variable)
            for place in lies[variable]
            if place not in used
        )
        name = _name(made, leaves, names)
        name_of[variable] = name
        reads = tuple(_slot(stored, place, variable) for place in used)
        groups[name] = Group(name, variable.size, reads, made)
        outside = tuple(
            _slot(given, (path, at), variable)
            for path, value in given.items()
            for at, axis in enumerate(value.axes)
            if variable in variables(axis)
        )
        if outside:
            inputs[name] = outside
    for variable, places in lies.items():
        if variable.frozen:
            slots = tuple(_slot(stored, place, variable) for place in places)
            used = gated.get(variable, ())
            made = [
                s for s, place in zip(slots, places, strict=True) if place not in used
            ]
            name = _name(made or slots, leaves, names)
            left_alone[name] = Frozen(name, variable.size, slots, variable.frozen)

    def named(variable: Variable) -> str | int:
        return 1 if variable in batch else name_of.get(variable, variable.size)

    def sizes(axes: Sequence[Type], times: int) -> dict:
        return product([{(): times}, *(_polynomial(axis, named) for axis in axes)])

    operations = tuple(
        Operation(
            each.primitive,
            each.where,
            sizes(each.factors, each.times),
            each.kernel,
            sizes(each.rest, each.times // each.parts),
            each.reads,
            each.makes,
        )
        for each in reading.contractions
    )
    members = {
        variable: tuple((name, unit) for unit in range(variable.size))
        for variable, name in name_of.items()
    }
    return Structure(
        Found(groups, left_alone),
        inputs,
        left_alone,
        dict(reading.unknown),
        operations,
        {p: jax.ShapeDtypeStruct(a.shape, a.dtype) for p, a in leaves.items()},
        tuple(trained),
        dataclasses.replace(traced, members=members),
    )


def _polynomial(of: Type, named: Callable[[Variable], str | int]) -> dict:
    """An axis' size as a `Polynomial`; `named` gives a variable's group or size."""
    of = resolve(of)
    if isinstance(of, Variable):
        found = named(of)
        return {(found,): 1} if isinstance(found, str) else {(): found}
    if isinstance(of, Sum):
        total: Counter = Counter()
        for part in of.parts:
            total.update(_polynomial(part, named))
        return dict(total)
    return product(_polynomial(factor, named) for factor in of.factors)


def _slot(stored: Mapping[str, Value], place: Place, variable: Variable) -> Slot:
    path, at = place
    owner = unit_of(stored[path].axes[at], variable)
    if np.array_equal(owner, np.arange(variable.size)):
        return Slot(path, at)
    return Slot(path, at, tuple(owner.tolist()))


def _name(slots: Sequence[Slot], leaves: Mapping[str, Any], taken: Counter) -> str:
    """The module that makes the units: of several the one with the largest array."""
    base = "input"
    if slots:
        path = max(slots, key=lambda slot: math.prod(leaves[slot.path].shape)).path
        path = path.removeprefix("params.")
        base = path.rpartition(".")[0] or path
    name = base
    while name in taken:
        taken[base] += 1
        name = f"{base}:{taken[base]}"
    taken[name] += 1
    return name


# ------------------------------------------------------------------------ as a table


def _table(structure: Structure) -> str:
    """Groups with their cost, then what is left alone and why."""
    total = _macs(structure, {})
    lines = [["group", "units", "made by", "used by", "MACs per unit", "in all"]]
    for name, group in structure.groups.items():
        saved = total - _macs(structure, {name: jnp.zeros(group.size)})
        made = [_short(slot) for slot in group.made_by]
        made += ["inputs " + _short(slot) for slot in structure.inputs.get(name, ())]
        lines.append(
            [
                name,
                f"{group.size:,}",
                ", ".join(made) or "-",
                ", ".join(map(_short, group.used_by)),
                f"{saved / group.size:,.0f}",
                f"{100 * saved / max(total, 1):.1f} %",
            ]
        )
    text = [
        f"{len(structure.groups)} groups of units, {total:,.0f} multiply-accumulates, "
        f"{_numbers(structure):,} numbers",
        "",
        *columns(lines, right=(1, 4, 5)),
    ]
    reasons: dict[str, list[str]] = {}
    windows = 0
    for each in structure.frozen.values():
        if each.why.endswith("a window slides over it"):
            windows += 1
            continue
        reasons.setdefault(each.why, []).append(
            f"{each.name} ({each.size}: {', '.join(map(_short, each.slots[:3]))}"
            f"{', …' if len(each.slots) > 3 else ''})"
        )
    if reasons:
        text += ["", "left alone:"]
    for why, names in reasons.items():
        text += [f"  {name}" for name in names] + [f"    {why}"]
    if windows:
        text.append(f"  {windows} axes of kernels over which windows slide")
    for primitive, line in structure.unknown.items():
        text.append(f"no rule for {primitive}, first at {line}: what it touches stays")
    return "\n".join(text)


def _numbers(structure: Structure) -> int:
    return sum(math.prod(structure.arrays[path].shape) for path in structure.trainable)


def _macs(structure: Structure, prob_active: Mapping[str, Any]) -> float:
    return float(
        sum(expected_macs(structure, op, prob_active) for op in structure.operations)
    )


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
