"""Which units a model has, read from its jaxpr.

`trace` gives every axis of every array a type (`l0jax.axes`) and lets each primitive
say which of them agree (`l0jax.rules`). A variable that is left over is a group of
units: its positions can be taken out of every array that carries it. Whatever can't be
proved removable is frozen, and says why.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jaxtyping import PyTree

from l0jax.axes import (
    Product,
    Sum,
    Type,
    Variable,
    freeze,
    resolve,
    unit_of,
    variables,
)
from l0jax.kinds import kinds
from l0jax.polynomials import product
from l0jax.reading import Gated, Traced, places, traced
from l0jax.reading import TraceError as TraceError
from l0jax.structure import Found, Frozen, Operation, Structure
from l0jax.units import Group, Slot, arrays
from l0jax.values import Place, Reading, Value


def trace(
    apply: Callable | nnx.Module | linen.Module,
    params: PyTree = None,
    *inputs: PyTree,
    frozen: Iterable[str] = (),
    **keywords: Any,
) -> Structure:
    """The groups of units of `apply(params, *inputs)`, and what they cost.

    `trace(module, *inputs)` reads a Flax NNX module as it is in evaluation, whatever
    mode it is in; its arrays are those of `nnx.state(module)`. `trace(module,
    variables, *inputs, train=False)` reads a Linen module.

    Args:
        apply: any function of JAX.
        params: any pytree of arrays or of their shapes: parameters, running statistics.
            All of them may lose units. Of Linen's variables, the collection `params` is
            what is trained.
        *inputs: pytrees of arrays or of their shapes. The leading axis of the first,
            and of those others that have its size, is taken for the batch if examples
            are computed apart from one another: costs are then those of one, else of
            all (`Structure.per_example` says which). If
            parameters read an axis of an input, its positions are a group too: removing
            some is feature selection.
        frozen: paths of arrays, or of what holds arrays, that keep all their units.
        **keywords: with which the function or the module is called.

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
            lambda state, *inputs: nnx.merge(graph, state)(*inputs, **keywords),
            state,
            inputs,
            frozen,
        )
        return dataclasses.replace(
            structure,
            trainable=tuple(trained),
            notes=(*_mode(apply), *structure.notes),
        )
    if isinstance(apply, linen.Module):
        apply = apply.apply
    if keywords:
        apply = functools.partial(apply, **keywords)
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
    found, reading = traced(apply, (params, *inputs), tuple(kept))
    leaves = arrays(params)
    return _collect(found, reading, leaves, _trained(leaves))


def _batch(found: Traced, reading: Reading, lies: Gated) -> frozenset[Variable]:
    """The axis of examples: the leading one of the first input, and of all others of
    its size; empty if examples are not computed apart from one another."""
    leading = [value.axes[0] for value in found.inputs.values() if value.axes]
    batch = {resolve(axis) for axis in leading if 1 < axis.size == leading[0].size}
    apart = all(
        isinstance(axis, Variable) and not axis.mixes and axis not in lies
        for axis in batch
    )
    for each in reading.contractions:
        of_examples = [
            v for axis in each.factors for v in variables(axis) if v in batch
        ]
        # Every example takes part in a product alone, and beside nothing that was
        # padded or concatenated: costs are so many times those of one.
        apart &= len(of_examples) < 2
        apart &= not any(v in batch for axis in each.factors for v in _summed(axis))
    return frozenset(v for v in batch if apart and isinstance(v, Variable))


def _summed(of: Type) -> Iterator[Variable]:
    """Variables that are parts of an axis beside others, as a concatenation makes."""
    of = resolve(of)
    if isinstance(of, Sum):
        yield from variables(of)
    elif isinstance(of, Product):
        for factor in of.factors:
            yield from _summed(factor)


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


def _collect(found: Traced, reading: Reading, leaves, trained) -> Structure:
    stored, given, gated = found.params, found.inputs, found.gated
    lies = places(stored)
    lies_outside = places(given)
    batch = _batch(found, reading, lies)
    order = {variable: at for at, variable in enumerate(gated)}
    for variable in lies:
        if variable not in gated and not variable.frozen:
            freeze(variable, "nothing reads it", mixes=False)
    groups: dict[str, Group] = {}
    inputs: dict[str, tuple[Slot, ...]] = {}
    left_alone: dict[str, Frozen] = {}
    names: Counter = Counter()
    name_of: dict[Variable, str] = {}
    for variable in sorted(order.keys() & lies.keys(), key=order.__getitem__):
        if variable.frozen or not variable.size:
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
        # What a gate can't scale is read rather than made.
        makers = [slot for slot in made if slot.path not in reading.ungated]
        name = _name(makers or (() if outside else reads), leaves, names)
        name_of[variable] = name
        groups[name] = Group(name, variable.size, reads, made)
        if outside:
            inputs[name] = outside
    for variable, where in lies.items():
        if variable.frozen and variable.size:
            slots = tuple(_slot(stored, place, variable) for place in where)
            used = gated.get(variable, ())
            made = [
                s for s, place in zip(slots, where, strict=True) if place not in used
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
            each.once,
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
        kinds(
            reading.contractions,
            name_of,
            inputs,
            {path: len(leaf.shape) for path, leaf in leaves.items()},
        ),
        bool(batch) or not any(v.axes and v.axes[0].size > 1 for v in given.values()),
        dataclasses.replace(found, members=members),
        tuple(
            f"{loop} runs as long as its values say: it is counted once"
            for loop in dict.fromkeys(op.once for op in operations if op.once)
        ),
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
