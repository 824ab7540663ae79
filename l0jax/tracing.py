"""Which units a model has, read from its jaxpr.

`trace` gives every axis of every array a type (`l0jax.axes`) and lets each primitive
say which of them agree (`l0jax.rules`). A variable that is left over is a group of
units: its positions can be taken out of every array that carries it. Whatever can't be
proved removable is frozen, and says why.
"""

import dataclasses
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from l0jax.axes import (
    Sum,
    Type,
    Variable,
    freeze,
    meeting_themselves,
    resolve,
    unit_of,
    variables,
)
from l0jax.poles import freeze_at_poles
from l0jax.polynomials import product
from l0jax.program import read
from l0jax.rules import Reading, Value, Zeros, new
from l0jax.structure import Found, Frozen, Operation, Structure, Traced
from l0jax.units import Group, Slot, arrays


class TraceError(ValueError):
    """The model can't be traced."""


def trace(
    apply: Callable | nnx.Module,
    params: PyTree = None,
    *inputs: PyTree,
    frozen: Iterable[str] = (),
) -> Structure:
    """The groups of units of `apply(params, *inputs)`, and what they cost.

    `trace(module, *inputs)` reads a Flax NNX module as it is in evaluation, whatever
    mode it is in; its arrays are those of `nnx.state(module)`.

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
        graph, state = nnx.split(evaluated(apply))
        inputs = inputs if params is None else (params, *inputs)
        trained = arrays(nnx.state(apply, nnx.Param))
        structure = _trace(
            lambda state, *inputs: nnx.merge(graph, state)(*inputs),
            state,
            inputs,
            frozen,
        )
        return dataclasses.replace(
            structure, trainable=tuple(trained), notes=_mode(apply)
        )
    return _trace(apply, params, inputs, frozen)


Module = TypeVar("Module", bound=nnx.Module)


def evaluated(module: Module) -> Module:
    """A copy of an NNX module in evaluation mode, with the same arrays."""
    copy = nnx.clone(module)
    copy.eval()
    return copy


def _mode(module: nnx.Module) -> tuple[str, ...]:
    """Says so if a module is in training mode, and so is not read as it is."""
    training = [
        ".".join(map(str, path)) or type(each).__name__
        for path, each in nnx.iter_modules(module)
        if getattr(each, "deterministic", None) is False
        or getattr(each, "use_running_average", None) is False
    ]
    if not training:
        return ()
    shown = ", ".join(training[:3]) + (", …" if len(training) > 3 else "")
    return (f"read in evaluation mode, though it is in training mode: {shown}",)


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
    _freeze_what_meets_itself(reading, stored)
    gated = _gated(reading, lies)
    freeze_at_poles(program, stored.values(), gated)
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
                lies.setdefault(variable, {})[path, at] = None
    return lies


def _freeze_what_meets_itself(reading: Reading, stored: Mapping[str, Value]) -> None:
    """Units that lie twice in one axis: zero at the one place is not at the other."""
    axes = [(axis, path) for path, value in stored.items() for axis in value.axes]
    axes += [(axis, where) for axis, _, where in reading.used]
    for axis, where in axes + reading.merged:
        for variable in meeting_themselves(axis):
            freeze(variable, f"{where}: it meets itself in a product")


def _gated(
    reading: Reading, lies: Mapping[Variable, dict[Place, None]]
) -> dict[Variable, dict[Place, None]]:
    """Where the gates of each variable belong, in the order of the program."""
    gated: dict[Variable, dict[Place, None]] = {}
    for axis, candidates, where in reading.used:
        for variable in dict.fromkeys(variables(axis)):
            for zeros in candidates:
                if zeros.within is not None and not any(
                    variable in variables(part) for part in zeros.within
                ):
                    continue
                slots = [p for p in sorted(zeros.slots) if p in lies.get(variable, ())]
                if slots:
                    gated.setdefault(variable, {}).update(dict.fromkeys(slots))
                    break
            else:
                freeze(variable, f"{where}: no parameter reads it")
    return gated


def _collect(reading, traced, lies, gated, batch, leaves, trained) -> Structure:
    stored, given = traced.params, traced.inputs
    lies_outside = _places(given)
    order = {variable: at for at, variable in enumerate(gated)}
    for variable in lies:
        if variable not in gated and not variable.frozen:
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
        reads = tuple(_slot(stored, place, variable) for place in used)
        outside = tuple(
            _slot(given, place, variable) for place in lies_outside.get(variable, ())
        )
        name = _name(made or (() if outside else reads), leaves, names)
        name_of[variable] = name
        groups[name] = Group(name, variable.size, reads, made)
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
            reasons = tuple(variable.reasons)
            left_alone[name] = Frozen(name, variable.size, slots, reasons[0], reasons)

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
        variable: tuple(zip((name,) * variable.size, range(variable.size), strict=True))
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
    axis = stored[path].axes[at]
    if resolve(axis) is variable:
        return Slot(path, at)
    owner = unit_of(axis, variable)
    if np.array_equal(owner, np.arange(variable.size)):
        return Slot(path, at)
    return Slot(path, at, tuple(owner.tolist()))


def _name(slots: Sequence[Slot], leaves: Mapping[str, Any], taken: Counter) -> str:
    """The module that makes the units: of several the first of those whose array has
    most axes, so that names stay when some become smaller than others."""
    base = "input"
    if slots:
        path = max(slots, key=lambda slot: len(leaves[slot.path].shape)).path
        path = path.removeprefix("params.")
        base = path.rpartition(".")[0] or path
    name = base
    while name in taken:
        taken[base] += 1
        name = f"{base}:{taken[base]}"
    taken[name] += 1
    return name
