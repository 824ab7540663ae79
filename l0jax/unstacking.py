"""Layers that one loop runs over, each with arrays of its own.

Libraries stack the arrays of alike layers along one more axis, and let `jax.lax.scan`
run over it. Units of all these layers then come and go together. Here the loop is
written out, layer for layer, so that each has its own groups.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from l0jax.derivatives import bind
from l0jax.program import CALLS, REMATS, constants_and_carries
from l0jax.tracing import evaluated
from l0jax.units import arrays

BY_ROW = ("convert_element_type", "copy")
"""Primitives that do the same to each row as to all of them."""


def unstack(
    apply: Callable[..., PyTree] | nnx.Module, params: PyTree = None, *inputs: PyTree
) -> tuple[Callable[..., PyTree], dict[str, Any]]:
    """A function without loops over its parameters, and what its parameters are.

    Each `jax.lax.scan` over an axis of parameters becomes one turn after the other, and
    these parameters one array for each turn. `l0jax.trace` of the function finds groups
    of units in each layer then. `unstack(module, *inputs)` takes a Flax NNX module, in
    evaluation mode.

    Args:
        apply: a function `apply(params, *inputs)`, of any library.
        params: any pytree of arrays, or of their shapes.
        *inputs: an example of the inputs, or their shapes.

    Returns:
        `(unstacked, arrays)` with `unstacked(arrays, *inputs)`, for inputs of any sizes
        that `apply` takes. `arrays` are by path; those of `"blocks.dense.kernel"` are
        `"blocks.dense.0.kernel"` and so on.

    Raises:
        ValueError: if no loop runs over an axis of a parameter.
    """
    if isinstance(apply, nnx.Module):
        graph, state = nnx.split(evaluated(apply))
        inputs = inputs if params is None else (params, *inputs)
        return _unstack(lambda s, *x: nnx.merge(graph, s)(*x), state, inputs)
    return _unstack(apply, params, inputs)


def _unstack(apply, params, inputs):
    leaves = arrays(params)
    shapes = jax.tree.map(_shape, params)
    closed = jax.make_jaxpr(apply)(shapes, *jax.tree.map(_shape, inputs))
    given = [Origin(path, tuple(range(len(a.shape)))) for path, a in leaves.items()]
    others = [None] * (len(closed.jaxpr.invars) - len(given))
    found: dict[str, tuple[int, ...]] = {}
    _follow(closed.jaxpr, [*given, *others], found)
    if not found:
        raise ValueError(
            "no loop runs over an axis of the parameters: jax.lax.scan takes none of "
            f"{', '.join(leaves)} as what it runs over"
        )
    apart: dict[str, Any] = {}
    for path, leaf in leaves.items():
        apart.update(_apart(path, leaf, found.get(path, ())))

    def unstacked(given: Mapping[str, Any], *inputs: PyTree) -> PyTree:
        values = [
            _together(path, leaf.shape, found.get(path, ()), given)
            for path, leaf in leaves.items()
        ]
        traced, out = jax.make_jaxpr(apply, return_shape=True)(
            shapes, *jax.tree.map(_shape, inputs)
        )
        results = _run(traced, [*values, *jax.tree.leaves(inputs)])
        return jax.tree.unflatten(jax.tree.structure(out), [*map(_whole, results)])

    return unstacked, apart


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


# ---------------------------------------------------------- over which axes loops run


@dataclass(frozen=True)
class Origin:
    """An array that is a parameter, or a row of one.

    Attributes:
        path: of the parameter.
        axes: for each axis, which one of the parameter it is.
        rows: axes of which this is one row, the outermost loop's first.
    """

    path: str
    axes: tuple[int, ...]
    rows: tuple[int, ...] = ()


def _follow(
    jaxpr: Any, given: Sequence[Origin | None], found: dict[str, tuple[int, ...]]
) -> None:
    """Finds for each parameter the axes that loops run over, the outermost first."""
    known = dict(zip(jaxpr.invars, given, strict=True))
    for eqn in jaxpr.eqns:
        ins = [
            None if isinstance(atom, jax.extend.core.Literal) else known.get(atom)
            for atom in eqn.invars
        ]
        if not any(ins):
            continue
        name = eqn.primitive.name
        if name == "transpose" and ins[0] is not None:
            axes = tuple(ins[0].axes[at] for at in eqn.params["permutation"])
            known[eqn.outvars[0]] = Origin(ins[0].path, axes, ins[0].rows)
        elif name in BY_ROW:
            known[eqn.outvars[0]] = ins[0]
        elif name in (*CALLS, *REMATS):
            _follow(_open(eqn.params["jaxpr"]), ins, found)
        elif name == "scan":
            consts, carried = constants_and_carries(eqn)
            inside = [*ins[:consts], *[None] * carried]
            for each in ins[consts + carried :]:
                if each is None:
                    inside.append(None)
                    continue
                rows = (*each.rows, each.axes[0])
                if rows[: len(found.get(each.path, ()))] == found.get(each.path, ()):
                    found[each.path] = rows
                inside.append(Origin(each.path, each.axes[1:], rows))
            _follow(_open(eqn.params["jaxpr"]), inside, found)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


# ------------------------------------------------------------------- arrays of the rows


def _named(path: str, index: Sequence[int]) -> str:
    """The name of one row of a parameter: its module's, the numbers, its own."""
    module, _, last = path.rpartition(".")
    numbers = [*map(str, index)]
    return ".".join([module, *numbers, last] if module else [last, *numbers])


def _apart(path, leaf, axes, index=()) -> dict[str, Any]:
    """The rows of a parameter along some of its axes, by name."""
    if not axes:
        return {_named(path, index) if index else path: leaf}
    first, *rest = axes
    rest = [axis - (axis > first) for axis in rest]
    found = {}
    for at in range(leaf.shape[first]):
        row = _row(leaf, first, at)
        found.update(_apart(path, row, rest, (*index, at)))
    return found


def _row(leaf: Any, axis: int, at: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = leaf.shape[:axis] + leaf.shape[axis + 1 :]
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    return leaf[(slice(None),) * axis + (at,)]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["axis"]
)
@dataclass(frozen=True)
class Stack:
    """An array whose rows along one axis are arrays, or stacks themselves."""

    axis: int
    rows: list[Any]


def _together(path, shape, axes, given, index=()) -> Any:
    """The stack that the rows of a parameter are."""
    if not axes:
        return given[_named(path, index) if index else path]
    first, *rest = axes
    rest = [axis - (axis > first) for axis in rest]
    inside = shape[:first] + shape[first + 1 :]
    return Stack(
        first,
        [
            _together(path, inside, rest, given, (*index, at))
            for at in range(shape[first])
        ],
    )


def _whole(value: Any) -> Any:
    """A stack as one array."""
    if not isinstance(value, Stack):
        return value
    rows = [jnp.expand_dims(_whole(row), value.axis) for row in value.rows]
    return jnp.concatenate(rows, value.axis)


# ------------------------------------------------------------------------ running it


def _run(closed: Any, given: Sequence[Any]) -> list[Any]:
    """The results of a program some of whose arguments are stacks."""
    jaxpr = _open(closed)
    names = [*jaxpr.constvars, *jaxpr.invars]
    known = dict(zip(names, [*getattr(closed, "consts", ()), *given], strict=True))

    def value_of(atom):
        if isinstance(atom, jax.extend.core.Literal):
            return atom.val
        return known[atom]

    for eqn in jaxpr.eqns:
        ins = [value_of(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if not any(isinstance(value, Stack) for value in ins):
            outs = bind(eqn, ins)
        elif name in RUN:
            outs = RUN[name](eqn, ins)
        else:
            outs = bind(eqn, [*map(_whole, ins)])
        known.update(zip(eqn.outvars, outs, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _call(eqn, ins):
    return _run(eqn.params["jaxpr"], ins)


def _remat(eqn, ins):
    again = jax.checkpoint(
        lambda *given: _run(eqn.params["jaxpr"], given),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    return again(*ins)


def _transpose(eqn, ins):
    return [_permuted(ins[0], eqn.params["permutation"])]


def _permuted(value: Any, permutation: Sequence[int]) -> Any:
    if not isinstance(value, Stack):
        return jnp.transpose(value, permutation)
    inside = [at - (at > value.axis) for at in permutation if at != value.axis]
    rows = [_permuted(row, inside) for row in value.rows]
    return Stack(list(permutation).index(value.axis), rows)


def _by_row(eqn, ins):
    return [jax.tree.map(lambda row: bind(eqn, [row])[0], ins[0])]


def _scan(eqn, ins):
    consts, carried = constants_and_carries(eqn)
    body = eqn.params["jaxpr"]
    fixed = ins[:consts]
    carry = [*map(_whole, ins[consts : consts + carried])]
    over = [
        value if isinstance(value, Stack) and value.axis == 0 else _whole(value)
        for value in ins[consts + carried :]
    ]

    def turn(carry, row):
        results = [*map(_whole, _run(body, [*fixed, *carry, *row]))]
        return results[:carried], results[carried:]

    if not any(isinstance(value, Stack) for value in over):
        carry, rows = jax.lax.scan(
            turn,
            carry,
            over,
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        return [*carry, *rows]
    turns = range(eqn.params["length"])
    found: dict[int, list[Any]] = {}
    for at in reversed(turns) if eqn.params["reverse"] else turns:
        row = [v.rows[at] if isinstance(v, Stack) else v[at] for v in over]
        carry, found[at] = turn(carry, row)
    columns = zip(*(found[at] for at in turns), strict=True)
    return [*carry, *(_whole(Stack(0, list(column))) for column in columns)]


RUN: dict[str, Callable[[Any, Sequence[Any]], Sequence[Any]]] = {
    **dict.fromkeys(CALLS, _call),
    **dict.fromkeys(REMATS, _remat),
    **dict.fromkeys(BY_ROW, _by_row),
    "transpose": _transpose,
    "scan": _scan,
}
