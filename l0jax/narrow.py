"""A traced function evaluated again without some of its units.

Every axis in a traced program has a type, which says what of it is left, so that all
that depends on sizes (reshapes, broadcasts, slices, group counts, tables) is computed
again. The result is an ordinary function of JAX: it can be jitted, differentiated and
exported, and functions with derivatives of their own keep these.

Where a sum or a maximum runs over units that are not zero when they are closed but all
alike (after a mean was taken from them, say), what is missing from it is one value
times the number of units that are gone. It is computed on the side.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, PyTree

from l0jax import reading, units
from l0jax.axes import (
    Sum,
    Type,
    Variable,
    positions,
    resolve,
    size,
    variables,
)
from l0jax.derivatives import bind, is_backward
from l0jax.liveness import live
from l0jax.program import Line, Program, constants_and_carries
from l0jax.rules import slice_of
from l0jax.structure import Structure
from l0jax.symbolic import is_symbolic
from l0jax.units import Keep, arrays
from l0jax.values import Value


def narrow(
    structure: Structure, params: PyTree, keep: Keep
) -> tuple[Callable[..., PyTree], PyTree]:
    """The traced function without the units that are not kept, and its parameters.

    Args:
        structure: of the function, by `trace`.
        params: the parameters, with test-time gates folded in: what is removed is then
            exactly what contributes nothing. Of an NNX module its state, or the module.
        keep: a boolean vector for each group that loses units. If a group loses all,
            what was computed for it alone goes with it: of a block whose branch has no
            units, nothing is left but the constants that it adds to the stream.

    Returns:
        `(small, small_params)`: `small(small_params, *inputs)` takes the same inputs as
        the traced function, of any size for which that can be traced and has the same
        units (it is traced again for each size), and reads of them what is left. Arrays
        that nothing reads any more have no elements.

    Raises:
        ValueError: as `l0jax.shrink`; if the structure was pickled, which leaves the
            program behind; if a group was said by hand to lie where the
            program can't lose units; and, when called, for inputs for which the
            function can't be traced or has other units.
    """
    if isinstance(params, nnx.Module):
        params = nnx.state(params)
    structure.traced.here  # noqa: B018 -- Raises where there is no program.
    for path, leaf in arrays(params).items():
        if not hasattr(leaf, "shape"):
            raise ValueError(
                f"the parameters hold no array at {path!r}, but {type(leaf).__name__}"
            )
    units.check_lengths(keep, structure.groups)
    unknown = _lost_unknown(structure, keep)
    if unknown is not None:
        name, path, axis = unknown
        raise ValueError(
            f"group {name!r} was made to lie in axis {axis} of {path!r} by hand, and "
            "the program can't lose these positions; leave it out of keep and set its "
            "closed gates to zero"
        )
    small_params = units.shrink(params, keep, structure.groups)
    gone = unread(structure, keep)
    leaves = arrays(small_params)
    small_params = units.replace(
        small_params, {path: leaves[path][:0] for path in gone}
    )

    def small(params: PyTree, *inputs: PyTree) -> PyTree:
        _check_tree(structure, params, inputs)
        given = arrays(inputs)
        now, left = _at(structure, keep, given)
        whole = _whole(now, left, arrays(params), gone)
        cells = [
            *(Cell(a, v, left) for a, v in _pair(whole, now.params)),
            *(
                Cell(_taken(leaf, value, left), value, left)
                for leaf, value in _pair(given, now.inputs)
            ),
        ]
        results = [cell.cut for cell in _run(now.here.program, cells, left)]
        return jax.tree.unflatten(now.out_tree, results)

    return small, small_params


def emptied(structure: Structure, keep: Keep) -> bool:
    """Whether any group has no units, or none that is kept."""
    keep = structure.nested(keep)
    return any(
        not np.any(keep.get(name, np.ones(group.size, bool)))
        for name, group in structure.groups.items()
    )


def unread(structure: Structure, keep: Keep) -> list[str]:
    """Arrays that nothing reads any more, since what they went into lost all units."""
    if not emptied(structure, keep):
        return []
    found, left = structure.traced, left_of(structure, keep)

    def small(params, inputs):
        leaves = [*params, *arrays(inputs).values()]
        values = [*found.params.values(), *found.inputs.values()]
        cells = [
            Cell(_taken(leaf, value, left), value, left)
            for leaf, value in zip(leaves, values, strict=True)
        ]
        return [cell.cut for cell in _run(found.here.program, cells, left)]

    whole = arrays(found.shapes[0])
    jaxpr = jax.make_jaxpr(small)([*whole.values()], found.shapes[1:]).jaxpr
    before, now = _read(whole, found.here.program.jaxpr), _read(whole, jaxpr)
    return [path for path in before if path not in now]


def _read(paths: Iterable[str], jaxpr: Any) -> list[str]:
    """The arrays of the parameters that a program reads, but numbers."""
    needed = live(jaxpr)[1]
    return [
        path
        for path, atom in zip(paths, jaxpr.invars, strict=False)
        if atom in needed and atom.aval.shape
    ]


def knows(structure: Structure, keep: Keep) -> bool:
    """Whether what goes is what the program was found to be able to lose, and nothing
    that a user added by hand."""
    return _lost_unknown(structure, keep) is None


def _lost_unknown(structure: Structure, keep: Keep) -> tuple[str, str, int] | None:
    """A group, and an axis of an array that would lose other positions by what the
    group is said to lie in than the program can lose."""
    masks = units.positions_left(dict(structure.arrays), keep, structure.groups)
    before, after = left_of(structure, {}), left_of(structure, keep)
    for path, value in structure.traced.params.items():
        for at, axis in enumerate(value.axes):
            there = before.positions(axis)
            expected = after.positions(axis)[there]
            found = masks.get((path, at), np.ones(len(expected), bool))
            if not np.array_equal(found, expected):
                names = [
                    name
                    for name in keep
                    for slot in structure.groups[name].slots
                    if (slot.path, slot.axis) == (path, at)
                ]
                return (names or [*keep])[-1], path, at
    return None


def inputs_left(
    structure: Structure, keep: Keep
) -> dict[str, dict[int, Bool[np.ndarray, " positions"]]]:
    """Which positions of the inputs are still read: `{input: {axis: flags}}`."""
    left = left_of(structure, keep)
    return {
        path: {
            at: left.positions(axis)
            for at, axis in enumerate(value.axes)
            if left.changed([axis])
        }
        for path, value in structure.traced.inputs.items()
        if left.changed(value.axes)
    }


@dataclass(frozen=True)
class Left:
    """What of each variable is left: flags of its positions, where some are gone, and
    sizes that are not those of the types (while JAX exports for any)."""

    kept: Mapping[Variable, np.ndarray]
    sizes: Mapping[Variable, Any] = dataclasses.field(default_factory=dict)

    def size(self, axis: Type) -> Any:
        """The number of positions that are left of an axis."""
        if not self.changed([axis]):
            return size(axis, lambda v: self.sizes.get(v, v.size))
        return size(
            axis,
            lambda v: (
                int(self.kept[v].sum()) if v in self.kept else self.sizes.get(v, v.size)
            ),
        )

    def positions(self, axis: Type) -> np.ndarray:
        """Which positions of an axis are left."""
        return positions(axis, lambda v: self.kept.get(v, np.ones(v.size, bool)))

    def changed(self, axes: Sequence[Type]) -> bool:
        """Whether anything of these axes is gone."""
        return any(v in self.kept for axis in axes for v in variables(axis))

    def shape(self, value: Value, atom: Any) -> tuple[Any, ...]:
        """The shape that is left of an array, of which the whole is `atom`'s.

        Raises:
            ValueError: if a size can't be said of what may have any.
        """
        found = []
        for axis, whole in zip(value.axes, atom.aval.shape, strict=True):
            if not self.changed([axis]):
                found.append(whole)
                continue
            if is_symbolic(whole) and Left({}, self.sizes).size(axis) != whole:
                raise ValueError(
                    f"what is left of an axis of {whole} positions can't be said for "
                    "any size of the inputs"
                )
            found.append(self.size(axis))
        return tuple(found)

    def only(self, axes: Mapping[int, Type]) -> tuple["Left", dict[int, int]]:
        """With a closed position of each of some axes, and of these as few others as
        there may be; and where among what is left of each that position is."""
        kept, chosen = dict(self.kept), {}
        for at, axis in axes.items():
            chosen[at] = int(np.flatnonzero(~self.positions(axis))[0])
            kept |= {v: np.zeros(v.size, bool) for v in variables(axis)}
            _choose(resolve(axis), chosen[at], kept)
        found = Left(kept, self.sizes)
        before = {at: found.positions(axis)[: chosen[at]] for at, axis in axes.items()}
        return found, {at: int(flags.sum()) for at, flags in before.items()}


def _choose(axis: Type, position: int, kept: dict[Variable, np.ndarray]) -> None:
    """Leaves one position of an axis."""
    if isinstance(axis, Variable):
        kept[axis] = np.arange(axis.size) == position
    elif isinstance(axis, Sum):
        for part in axis.parts:
            if position < part.size:
                _choose(resolve(part), position, kept)
                return
            position -= part.size
    else:
        for factor in reversed(axis.factors):
            position, at = divmod(position, factor.size)
            _choose(resolve(factor), at, kept)


def left_of(structure: Structure, keep: Keep) -> Left:
    """What is left of the variables of the structure's own program."""
    return _left(structure.traced, structure.nested(keep))


def _left(found: reading.Traced, keep: Keep) -> Left:
    def stays(name: str, unit: int) -> bool:
        return unit >= 0 and (name not in keep or bool(keep[name][unit]))

    kept = {}
    for variable, members in found.members.items():
        flags = np.array([stays(*member) for member in members])
        if not flags.all():
            kept[variable] = flags
    return Left(kept)


def _pair(leaves: Mapping[str, Any], values: Mapping[str, Value]):
    return zip(leaves.values(), values.values(), strict=True)


def _at(
    structure: Structure, keep: Keep, given: Mapping[str, Any]
) -> tuple[reading.Traced, Left]:
    """The function at the sizes of a call, and what is left of it."""
    now = reading.at_sizes(structure.traced, given)
    left = _left(now, structure.nested(keep))
    return now, dataclasses.replace(left, sizes=now.sizes)


def _whole(
    now: reading.Traced, left: Left, params: Mapping[str, Any], gone: Sequence[str]
) -> dict[str, Any]:
    """The arrays, with zeros for those that nothing reads.

    Raises:
        ValueError: if one has another shape than what is left of it.
    """
    whole = {}
    for path, value in now.params.items():
        shape, leaf = tuple(left.size(axis) for axis in value.axes), params[path]
        expected = (0, *shape[1:]) if path in gone else shape
        if tuple(np.shape(leaf)) != expected:
            raise ValueError(
                f"parameter {path!r} has shape {np.shape(leaf)}; of what is kept it "
                f"is {expected}"
            )
        whole[path] = jnp.zeros(shape, leaf.dtype) if path in gone else leaf
    return whole


def _check_tree(structure: Structure, params: PyTree, inputs: PyTree) -> None:
    found = jax.tree.structure((params, *inputs))
    expected = structure.traced.in_tree
    if found == expected:
        return
    said = []
    for number, (mine, theirs) in enumerate(
        itertools.zip_longest(found.children(), expected.children())
    ):
        if mine is None or theirs is None or mine != theirs:
            what = "the parameters" if not number else f"input {number - 1}"
            said.append(f"{what} are {_short(mine)}, traced was {_short(theirs)}")
    raise ValueError(
        f"the arguments have another structure than those that were traced: "
        f"{'; '.join(said)}"
    )


def _short(tree: Any) -> str:
    """A structure of arguments in so many words."""
    if tree is None:
        return "missing"
    text = str(tree).removeprefix("PyTreeDef(").removesuffix(")")
    return text if len(text) <= 120 else f"{text[:100]}… ({tree.num_leaves} arrays)"


# ---------------------------------------------------------------- running a program


@dataclass(frozen=True, eq=False)
class Cell:
    """An array while a program runs.

    Attributes:
        array: it; if its value is known, all of it, else what is left.
        value: what is known of it.
        left: for what it was computed.
        again: computes it for something else; None for arguments.
    """

    array: Any
    value: Value
    left: Left
    again: Callable[[Left], Any] | None = None

    @property
    def cut(self) -> Any:
        """What is left of it."""
        if self.value.known:
            return _taken(self.array, self.value, self.left)
        return self.array


def _taken(array: Any, value: Value, left: Left) -> Any:
    """An array that is whole, without the positions that are gone."""
    for at, axis in enumerate(value.axes):
        if left.changed([axis]):
            array = jnp.take(array, np.flatnonzero(left.positions(axis)), axis=at)
    return array


def _for(cell: Cell, asked: Left) -> Any:
    """An array for something else that is left than what it was computed for: of some
    axes a closed position is asked for."""
    value = cell.value
    if value.known:
        return _taken(cell.array, value, asked)
    other = [
        at for at, axis in enumerate(value.axes) if _differ(axis, cell.left, asked)
    ]
    if not other:
        return cell.array
    if any(value.zeros[at].slots and not value.zeros[at].within for at in other):
        shape = [
            asked.size(axis) if at in other else cell.array.shape[at]
            for at, axis in enumerate(value.axes)
        ]
        return jnp.zeros(shape, cell.array.dtype)
    if cell.again is None:
        raise AssertionError("closed units were said to be alike where they aren't")
    return cell.again(asked)


def _differ(axis: Type, left: Left, asked: Left) -> bool:
    return any(left.kept.get(v) is not asked.kept.get(v) for v in variables(axis))


def _run(program: Program, arguments: Sequence[Cell], left: Left) -> list[Cell]:
    jaxpr = program.jaxpr
    inside = [
        Cell(array, value, left)
        for array, value in zip(program.constants, program.ins, strict=False)
    ]
    names = [*jaxpr.constvars, *jaxpr.invars]
    found = dict(zip(names, [*inside, *arguments], strict=True))

    def cell_of(atom, value):
        if isinstance(atom, jax.extend.core.Literal):
            return Cell(atom.val, value, left)
        return found[atom]

    for line in program.lines:
        given = [
            cell_of(atom, value)
            for atom, value in zip(line.eqn.invars, line.ins, strict=True)
        ]
        found.update(zip(line.eqn.outvars, _line(line, given, left), strict=True))
    return [
        cell_of(atom, value)
        for atom, value in zip(jaxpr.outvars, program.outs, strict=True)
    ]


def _line(line: Line, given: Sequence[Cell], left: Left) -> Sequence[Cell]:
    name = line.eqn.primitive.name
    if not _differs(line, left) or (
        not line.inner and all(value.known for value in line.outs)
    ):
        whole = bind(line.eqn, [cell.array for cell in given])
        return [Cell(a, v, left) for a, v in zip(whole, line.outs, strict=True)]
    if line.inner and name not in RUN and line.derivative is None:
        # A call: what it computes is known inside as it is outside.
        return _run(line.inner[0], given, left)

    def again(at: int, asked: Left) -> Any:
        return _compute(line, [_for(cell, asked) for cell in given], asked, given)[at]

    computed = _compute(line, [cell.cut for cell in given], left, given)
    return [
        Cell(array, value, left, functools.partial(again, at))
        for at, (array, value) in enumerate(zip(computed, line.outs, strict=True))
    ]


def _compute(
    line: Line, given: Sequence[Any], left: Left, cells: Sequence[Cell]
) -> Sequence[Any]:
    """What an equation gives of arrays as they are left; `cells` gives them for other
    things that are left."""
    name = line.eqn.primitive.name
    if line.derivative is not None:
        return _custom(line, given, left)
    if name in RUN:
        return RUN[name](line, given, left)
    if name in ALIKE:
        return [_reduced(line, given[0], left, cells[0])]
    changes = SIZES[name](line, given, left) if name in SIZES else {}
    return bind(line.eqn, given, changes)


def _differs(line: Line, left: Left) -> bool:
    """Whether any size differs from the traced one, within the line too."""
    return any(left.changed(value.axes) for value in (*line.ins, *line.outs)) or any(
        _differs(inner, left) for program in line.inner for inner in program.lines
    )


# Reductions over units that are alike when they are closed.

ALIKE: dict[str, Callable[[Any, Any, int], Any]] = {
    "reduce_sum": lambda total, one, times: total + one * jnp.asarray(times, one.dtype),
    "reduce_max": lambda total, one, times: jnp.maximum(total, one),
    "reduce_min": lambda total, one, times: jnp.minimum(total, one),
}


def _reduced(line: Line, array: Any, left: Left, cell: Cell) -> Any:
    """A reduction, and of each axis that lost units what the lost ones add to it."""
    (value, *_), name = line.ins, line.eqn.primitive.name
    axes = [
        int(at)
        for at in line.eqn.params["axes"]
        if left.changed([value.axes[at]])
        and not (name == "reduce_sum" and value.zeros[at].slots)
    ]
    total = None
    for number in range(len(axes) + 1):
        for closed in itertools.combinations(axes, number):
            times, part = 1, array
            if closed:
                along = {at: value.axes[at] for at in closed}
                for axis in along.values():
                    flags = left.positions(axis)
                    times *= len(flags) - int(flags.sum())
                if not times:
                    continue
                asked, places = left.only(along)
                part = _for(cell, asked)
                for at, place in places.items():
                    part = jax.lax.slice_in_dim(part, place, place + 1, axis=at)
            if name != "reduce_sum" and 0 in part.shape:
                continue
            (found,) = bind(line.eqn, [part])
            total = found if total is None else ALIKE[name](total, found, times)
    if total is None:  # nothing was there to begin with
        (total,) = bind(line.eqn, [array])
    return total


# Parameters of primitives that hold sizes, at the sizes of this call.

Sizes = Callable[[Line, Sequence[Any], Left], dict[str, Any]]


def _out(name: str) -> Sizes:
    return lambda line, given, left: {
        name: left.shape(line.outs[0], line.eqn.outvars[0])
    }


def _slice(line, given, left):
    starts, limits = [], []
    params = line.eqn.params
    strides = params["strides"] or (1,) * len(params["start_indices"])
    for axis, start, limit, stride in zip(
        line.ins[0].axes,
        params["start_indices"],
        params["limit_indices"],
        strides,
        strict=True,
    ):
        if left.changed([axis]):
            if stride != 1:  # one position of each row of `stride`
                limit = left.size(axis)
            else:
                flags = left.positions(axis)
                start, limit = int(flags[:start].sum()), int(flags[:limit].sum())
        starts.append(start)
        limits.append(limit)
    return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}


def _pad(line, given, left):
    config = []
    for axis, (low, high, interior) in zip(
        line.outs[0].axes, line.eqn.params["padding_config"], strict=True
    ):
        if (low > 0 or high > 0) and left.changed([axis]):
            flags = left.positions(axis)
            low = int(flags[:low].sum())
            high = int(flags[len(flags) - high :].sum())
        config.append((low, high, interior))
    return {"padding_config": tuple(config)}


def _split(line, given, left):
    at = line.eqn.params["axis"]
    return {
        "sizes": tuple(
            left.shape(out, atom)[at]
            for out, atom in zip(line.outs, line.eqn.outvars, strict=True)
        )
    }


def _tile(line, given, left):
    whole = left.shape(line.outs[0], line.eqn.outvars[0])
    return {
        "reps": tuple(
            now // had if had else times
            for now, had, times in zip(
                whole, given[0].shape, line.eqn.params["reps"], strict=True
            )
        )
    }


def _dynamic_slice(line, given, left):
    return {"slice_sizes": left.shape(line.outs[0], line.eqn.outvars[0])}


SIZES: dict[str, Sizes] = {
    "broadcast_in_dim": _out("shape"),
    "reshape": _out("new_sizes"),
    "dynamic_slice": _dynamic_slice,
    "slice": _slice,
    "pad": _pad,
    "split": _split,
    "tile": _tile,
}


def _convolution(line, given, left):
    x, kernel = given
    numbers = line.eqn.params["dimension_numbers"]
    groups = line.eqn.params["feature_group_count"]
    if groups != 1:
        channels, inside = x.shape[numbers.lhs_spec[1]], numbers.rhs_spec[1]
        groups = channels // kernel.shape[inside] if kernel.shape[inside] else groups
        if not groups:  # one group of no channels
            kernel = jax.lax.slice_in_dim(kernel, 0, 0, axis=inside)
    return bind(line.eqn, [x, kernel], {"feature_group_count": groups or 1})


def _gather(line, given, left):
    cut = slice_of(line.eqn, *line.ins)
    if cut is not None and left.changed([line.ins[0].axes[cut[0]]]):
        at, start, limit = cut
        flags = left.positions(line.ins[0].axes[at])
        low, high = int(flags[:start].sum()), int(flags[:limit].sum())
        return [jax.lax.slice_in_dim(given[0], low, high, axis=at)]
    axes, whole = line.ins[0].axes, line.eqn.invars[0].aval.shape
    sizes = {
        "slice_sizes": tuple(
            left.size(axis) if traced == full and left.changed([axis]) else traced
            for axis, full, traced in zip(
                axes, whole, line.eqn.params["slice_sizes"], strict=True
            )
        )
    }
    return bind(line.eqn, given, sizes)


# Loops, branches, and functions that are differentiated in their own way.


def _arrays(program: Program, given: Sequence[Any], left: Left) -> list[Any]:
    """What a program gives, of arrays whose values are its arguments'."""
    values = program.ins[len(program.constants) :]
    cells = [Cell(a, value, left) for a, value in zip(given, values, strict=True)]
    return [cell.cut for cell in _run(program, cells, left)]


def _scan(line, given, left):
    params, (body,) = line.eqn.params, line.inner
    consts, carried = constants_and_carries(line.eqn)
    fixed = given[:consts]

    def turn(carry, row):
        results = _arrays(body, [*fixed, *carry, *row], left)
        return results[:carried], results[carried:]

    carry, rows = jax.lax.scan(
        turn,
        list(given[consts : consts + carried]),
        list(given[consts + carried :]),
        # (What any batch may be long can't be said, but by rows.)
        length=None if given[consts + carried :] else params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *rows]


def _while(line, given, left):
    test, body = line.inner
    tested = line.eqn.params["cond_nconsts"]
    turned = tested + line.eqn.params["body_nconsts"]
    return jax.lax.while_loop(
        lambda carry: _arrays(test, [*given[:tested], *carry], left)[0],
        lambda carry: _arrays(body, [*given[tested:turned], *carry], left),
        list(given[turned:]),
    )


def _cond(line, given, left):
    branches = [
        lambda *values, program=program: _arrays(program, values, left)
        for program in line.inner
    ]
    return jax.lax.switch(given[0], branches, *given[1:])


def _remat(line, given, left):
    params = line.eqn.params
    run = functools.partial(_arrays, line.inner[0], left=left)
    again = jax.checkpoint(
        lambda *given: run(given),
        prevent_cse=params["prevent_cse"],
        policy=params["policy"],
    )
    return again(*given)


def _custom(line, given, left):
    """A function with its own derivative, which is one of fewer units too."""
    derivative, (program,) = line.derivative, line.inner
    moving = derivative.moving
    count = len(line.outs)

    def primal(*args):
        return _arrays(program, args, left)

    if derivative.fails:

        def refuse(*_):
            raise ValueError(derivative.fails)

        function = jax.custom_vjp(primal)
        function.defvjp(refuse, refuse)
    elif is_backward(line.eqn):
        first, second = derivative.programs
        reals = [jnp.issubdtype(o.aval.dtype, jnp.inexact) for o in line.eqn.outvars]

        def forward(*args):
            found = _arrays(first, args, left)
            return found[:count], found[count:]

        def backward(remembered, cotangents):
            moved = [c for c, real in zip(cotangents, reals, strict=True) if real]
            found = iter(_arrays(second, [*remembered, *moved], left))
            return tuple(next(found) if moves else None for moves in moving)

        function = jax.custom_vjp(primal)
        function.defvjp(forward, backward)
    else:
        (rule,) = derivative.programs

        def tangent(primals, tangents):
            moved = [t for t, moves in zip(tangents, moving, strict=True) if moves]
            found = _arrays(rule, [*primals, *moved], left)
            results, rest = found[:count], iter(found[count:])
            return results, [
                next(rest)
                if jnp.issubdtype(r.dtype, jnp.inexact)
                else np.zeros(r.shape, jax.dtypes.float0)
                for r in results
            ]

        function = jax.custom_jvp(primal)
        function.defjvp(tangent)
    return function(*given)


RUN: dict[str, Callable[[Line, Sequence[Any], Left], Sequence[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    **dict.fromkeys(("remat", "remat2", "checkpoint"), _remat),
}
