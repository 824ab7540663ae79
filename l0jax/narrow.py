"""A traced function evaluated again at other sizes.

Every size in a traced program has a type, so that all that depends on sizes (reshapes,
broadcasts, slices, group counts, constants) is computed again from the units that are
left. The result is an ordinary function of JAX: it can be jitted, differentiated and
exported. Functions with custom derivatives are differentiated by their own code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, PyTree

from l0jax import units
from l0jax.axes import Type, Variable, positions, resolve, size, variables
from l0jax.program import Line, Program, bind, constants_and_carries
from l0jax.rules import Value
from l0jax.structure import Structure
from l0jax.units import Keep, arrays


def narrow(
    structure: Structure, params: PyTree, keep: Keep
) -> tuple[Callable[..., PyTree], PyTree]:
    """The traced function without the units that are not kept, and its parameters.

    Args:
        structure: of the function, by `trace`.
        params: the parameters, with test-time gates folded in: what is removed is then
            exactly what contributes nothing.
        keep: a boolean vector for each group that loses units.

    Returns:
        `(small, small_params)`: `small(small_params, *inputs)` takes the same inputs as
        the traced function, in batches of any size, and reads of them what is left.

    Raises:
        ValueError: as `l0jax.shrink`; if a group was said by hand to lie where the
            program can't lose units; and, when called, for inputs of another shape.
    """
    units.check_keep(keep, structure.groups)
    unknown = _lost_unknown(structure, keep)
    if unknown is not None:
        name, path, axis = unknown
        raise ValueError(
            f"group {name!r} was made to lie in axis {axis} of {path!r} by hand, and "
            "the program can't lose these positions; leave it out of keep and set its "
            "closed gates to zero"
        )
    small_params = units.shrink(params, keep, structure.groups)
    left = _Left(structure, keep)

    def small(params: PyTree, *inputs: PyTree) -> PyTree:
        _check_tree(structure, params, inputs)
        sizes = left.with_batch(inputs)
        given = [
            _take(sizes, value, leaf, path)
            for (path, value), leaf in zip(
                structure.traced.inputs.items(), arrays(inputs).values(), strict=True
            )
        ]
        leaves = [*arrays(params).values(), *given]
        results = _run(structure.traced.program, leaves, sizes)
        return jax.tree.unflatten(structure.traced.out_tree, results)

    return small, small_params


def knows(structure: Structure, keep: Keep) -> bool:
    """Whether what goes is what the program was found to be able to lose, and nothing
    that a user added by hand."""
    return _lost_unknown(structure, keep) is None


def _lost_unknown(structure: Structure, keep: Keep) -> tuple[str, str, int] | None:
    """A group, and an axis of an array that would lose other positions by what the
    group is said to lie in than the program can lose."""
    masks = units.positions_left(dict(structure.arrays), keep, structure.groups)
    before, after = _Left(structure, {}), _Left(structure, keep)
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
    left = _Left(structure, keep)
    return {
        path: {
            at: left.positions(axis)
            for at, axis in enumerate(value.axes)
            if left.changed([axis])
        }
        for path, value in structure.traced.inputs.items()
        if left.changed(value.axes)
    }


class _Left:
    """Sizes of variables after removal, and what positions of an axis are left."""

    def __init__(self, structure: Structure, keep: Keep):
        def stays(name: str, unit: int) -> bool:
            return unit >= 0 and (name not in keep or bool(keep[name][unit]))

        self.structure = structure
        self.kept: dict[Variable, np.ndarray] = {}
        for variable, members in structure.traced.members.items():
            flags = np.array([stays(*member) for member in members])
            if not flags.all():
                self.kept[variable] = flags
        self.sizes = {
            variable: int(flags.sum()) for variable, flags in self.kept.items()
        }

    def with_batch(self, inputs: PyTree) -> "_Left":
        """With the sizes that the inputs have in this call."""
        both = object.__new__(_Left)
        both.structure, both.kept, both.sizes = (
            self.structure,
            self.kept,
            {**self.sizes},
        )
        traced = self.structure.traced
        for (path, value), leaf in zip(
            traced.inputs.items(), arrays(inputs).values(), strict=True
        ):
            found = tuple(leaf.shape)
            for axis, now in zip(value.axes, found, strict=False):
                axis = resolve(axis)
                # (An axis that was cut has parts, whose sizes its own doesn't tell.)
                if isinstance(axis, Variable) and axis in traced.resizable:
                    both.sizes[axis] = now
            expected = tuple(
                axis.size if self.changed([axis]) else both.size(axis)
                for axis in value.axes
            )
            if found != expected:
                raise ValueError(
                    f"input {path!r} has shape {found}; the program was traced with "
                    f"{value.shape}, of which {_free(value, traced.resizable)}"
                )
        return both

    def size(self, axis: Type) -> Any:
        return size(axis, lambda variable: self.sizes.get(variable, variable.size))

    def shape(self, value: Value) -> tuple[Any, ...]:
        return tuple(self.size(axis) for axis in value.axes)

    def positions(self, axis: Type) -> np.ndarray:
        return positions(
            axis, lambda v: self.kept.get(v, np.ones(self.sizes.get(v, v.size), bool))
        )

    def changed(self, axes: Sequence[Type]) -> bool:
        return any(
            self.sizes.get(variable, variable.size) != variable.size
            for axis in axes
            for variable in variables(axis)
        )


def _free(value: Value, resizable: frozenset[Variable]) -> str:
    free = [str(at) for at, axis in enumerate(value.axes) if resolve(axis) in resizable]
    return f"axis {', '.join(free)} may have any size" if free else "no axis may differ"


def _check_tree(structure: Structure, params: PyTree, inputs: PyTree) -> None:
    found = jax.tree.structure((params, *inputs))
    expected = structure.traced.in_tree
    if found != expected:
        raise ValueError(
            f"the arguments have the structure {found}; the program was traced with "
            f"{expected}"
        )


def _take(left: _Left, value: Value, leaf: Any, path: str) -> Any:
    """An input, without the positions that nothing reads any more."""
    for at, axis in enumerate(value.axes):
        if any(variable in left.kept for variable in variables(axis)):
            leaf = jnp.take(leaf, np.flatnonzero(left.positions(axis)), axis=at)
    return leaf


# ---------------------------------------------------------------- running a program


def _run(program: Program, arguments: Sequence[Any], left: _Left) -> list[Any]:
    jaxpr = program.jaxpr
    constants = [
        _constant(left, value, constant)
        for value, constant in zip(program.ins, program.constants, strict=False)
    ]
    names = [*jaxpr.constvars, *jaxpr.invars]
    found = dict(zip(names, [*constants, *arguments], strict=True))

    def read(atom, value):
        if isinstance(atom, jax.extend.core.Literal):
            return _constant(left, value, atom.val)
        return found[atom]

    for line in program.lines:
        given = [
            read(atom, value)
            for atom, value in zip(line.eqn.invars, line.ins, strict=True)
        ]
        found.update(zip(line.eqn.outvars, _line(line, given, left), strict=True))
    return [
        read(atom, value)
        for atom, value in zip(jaxpr.outvars, program.outs, strict=True)
    ]


def _constant(left: _Left, value: Value, constant: Any) -> Any:
    for at, axis in enumerate(value.axes):
        if left.changed([axis]):
            constant = np.asarray(constant).take(
                np.flatnonzero(left.positions(axis)), axis=at
            )
    return constant


def _line(line: Line, given: Sequence[Any], left: _Left) -> Sequence[Any]:
    eqn = line.eqn
    if not _differs(line, left):
        return bind(eqn, given)
    name = eqn.primitive.name
    if name in RUN:
        return RUN[name](line, given, left)
    if line.inner:
        return _run(line.inner[0], given, left)
    changes = SIZES[name](line, given, left) if name in SIZES else {}
    return bind(eqn, given, changes)


def _differs(line: Line, left: _Left) -> bool:
    """Whether any size differs from the traced one, within the line too."""
    return any(left.changed(value.axes) for value in (*line.ins, *line.outs)) or any(
        _differs(inner, left) for program in line.inner for inner in program.lines
    )


# Parameters of primitives that hold sizes, at the sizes of this call.

Sizes = Callable[[Line, Sequence[Any], _Left], dict[str, Any]]


def _out(name: str) -> Sizes:
    return lambda line, given, left: {name: left.shape(line.outs[0])}


def _slice(line, given, left):
    starts, limits = [], []
    for axis, start, limit in zip(
        line.ins[0].axes,
        line.eqn.params["start_indices"],
        line.eqn.params["limit_indices"],
        strict=True,
    ):
        if (start, limit) == (0, axis.size):
            limit = left.size(axis)
        elif left.changed([axis]):
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
    return {"sizes": tuple(left.size(out.axes[at]) for out in line.outs)}


def _gather(line, given, left):
    axes = line.ins[0].axes
    return {
        "slice_sizes": tuple(
            left.size(axis) if traced == axis.size else traced
            for axis, traced in zip(axes, line.eqn.params["slice_sizes"], strict=True)
        )
    }


def _convolution(line, given, left):
    numbers = line.eqn.params["dimension_numbers"]
    x, kernel = given
    channels, inside = x.shape[numbers.lhs_spec[1]], kernel.shape[numbers.rhs_spec[1]]
    if line.eqn.params["feature_group_count"] == 1:
        return {}
    return {"feature_group_count": channels // inside}


SIZES: dict[str, Sizes] = {
    "broadcast_in_dim": _out("shape"),
    "reshape": _out("new_sizes"),
    "iota": _out("shape"),
    "dynamic_slice": _out("slice_sizes"),
    "slice": _slice,
    "pad": _pad,
    "split": _split,
    "gather": _gather,
    "conv_general_dilated": _convolution,
}


# Loops and branches.


def _scan(line, given, left):
    params, (body,) = line.eqn.params, line.inner
    consts, carried = constants_and_carries(line.eqn)
    fixed = given[:consts]

    def turn(carry, row):
        results = _run(body, [*fixed, *carry, *row], left)
        return results[:carried], results[carried:]

    carry, rows = jax.lax.scan(
        turn,
        list(given[consts : consts + carried]),
        list(given[consts + carried :]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *rows]


def _while(line, given, left):
    test, body = line.inner
    tested = line.eqn.params["cond_nconsts"]
    turned = tested + line.eqn.params["body_nconsts"]
    return jax.lax.while_loop(
        lambda carry: _run(test, [*given[:tested], *carry], left)[0],
        lambda carry: _run(body, [*given[tested:turned], *carry], left),
        list(given[turned:]),
    )


def _cond(line, given, left):
    branches = [
        lambda *values, program=program: _run(program, values, left)
        for program in line.inner
    ]
    return jax.lax.switch(given[0], branches, *given[1:])


RUN: dict[str, Callable[[Line, Sequence[Any], _Left], Sequence[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
