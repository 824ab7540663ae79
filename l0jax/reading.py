"""A function, traced at some sizes and read: what narrowing runs again.

Sizes that Python code computes with (a divisor, the length of a table, the limit of a
slice) are numbers in what is traced, of which nothing says what they came from. So a
function is never stretched to other sizes: it is traced again, and read again.
"""

import dataclasses
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from l0jax.axes import (
    Type,
    Variable,
    freeze,
    meeting_themselves,
    parts,
    resolve,
    variables,
)
from l0jax.poles import freeze_at_poles
from l0jax.program import Program, read
from l0jax.symbolic import is_symbolic, number, numbers_for
from l0jax.units import arrays
from l0jax.values import COTANGENT, Place, Reading, Value, Zeros, new


class TraceError(ValueError):
    """The model can't be traced."""


Gated = dict[Variable, dict[Place, None]]
"""Where the gates of each variable belong, in the order of the program."""


@dataclass(frozen=True)
class Source:
    """A function of `(params, *inputs)`, its jaxpr and the types of all its values."""

    apply: Callable[..., PyTree]
    program: Program


@dataclass(frozen=True)
class Traced:
    """A function that was read. When it is pickled, all goes along but the source.

    Attributes:
        source: the function and its program; None where it was unpickled.
        frozen: paths of arrays that keep all their units, by the user's word.
        shapes: shapes and dtypes of its arguments, as they were traced.
        params: what is known of each array of the parameters, by path.
        inputs: the same of the inputs.
        out_tree: the tree of what the function gives.
        gated: where the gates of each variable belong.
        members: for each variable that is a group, the group and the unit of each of
            its positions, or `GONE`.
        others: the function at other sizes of its inputs, as far as they were asked.
        sizes: of axes that may have any size, what these are.
    """

    source: Source | None
    frozen: tuple[str, ...]
    shapes: PyTree
    params: Mapping[str, Value]
    inputs: Mapping[str, Value]
    out_tree: Any
    gated: Gated
    members: Mapping[Variable, Sequence[tuple[str, int]]] = field(default_factory=dict)
    others: dict[Any, "Traced"] = field(default_factory=dict)
    sizes: Mapping[Variable, Any] = field(default_factory=dict)

    @property
    def here(self) -> Source:
        """The function and its program.

        Raises:
            ValueError: in a process where it was not traced.
        """
        if self.source is None:
            raise ValueError(
                "this structure was pickled, which leaves the program of the function "
                "behind: call l0jax.trace again where programs are narrowed or modules "
                "shrunk; arrays are shrunk by its groups"
            )
        return self.source

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "source": None, "others": {}}

    @property
    def in_tree(self) -> Any:
        """The tree of `(params, *inputs)`."""
        return jax.tree.structure(self.shapes)

    @property
    def given(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the inputs, by path."""
        return arrays(self.shapes[1:])


def traced(
    apply: Callable[..., PyTree], arguments: PyTree, kept: Iterable[str] = ()
) -> tuple[Traced, Reading]:
    """Traces a function and reads it.

    Args:
        apply: any function of JAX.
        arguments: `(params, *inputs)`, arrays or their shapes.
        kept: paths of arrays, or of what holds arrays, that keep all their units.

    Raises:
        TraceError: if the function looks at values of arrays.
        ValueError: if `kept` names what isn't there.
    """
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    closed, out_shape = jaxpr_of(apply, shapes)
    given = arrays(shapes[1:])
    numbers = numbers_for(leaf.shape for leaf in given.values())
    reading = Reading(numbers=numbers)
    stored = {}
    for path, leaf in arrays(shapes[0]).items():
        value = new(leaf.shape, data=False)
        zeros = [Zeros(frozenset({(path, at)})) for at in range(len(leaf.shape))]
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            # A gate would be rounded there, or can't be a factor at all.
            reading.ungated[path] = str(leaf.dtype)
            zeros = [Zeros()] * len(leaf.shape)
        stored[path] = Value(value.axes, tuple(zeros), data=False, array=path)
    for path in _within(kept, stored):
        for axis in stored[path].axes:
            freeze(axis, "the user froze it", mixes=False)
    outside = {
        path: new(number(leaf.shape, numbers), data=True)
        for path, leaf in given.items()
    }
    program = read(reading, closed, [*stored.values(), *outside.values()])
    for value in program.outs:
        for axis in value.axes:
            freeze(axis, "it is an output", mixes=False)
    lies = places(stored)
    _freeze_what_meets_itself(reading, stored)
    gated = _gated(reading, lies)
    freeze_at_poles(program, stored.values(), gated)
    found = Traced(
        Source(apply, program),
        tuple(kept),
        shapes,
        stored,
        outside,
        jax.tree.structure(out_shape),
        gated,
        sizes=_symbolic_sizes(program) if numbers else {},
    )
    return found, reading


def _symbolic_sizes(program: Program) -> dict[Variable, Any]:
    """For each axis of any size the expression of its size."""
    atoms = [*program.jaxpr.constvars, *program.jaxpr.invars]
    pairs = [*zip(program.ins, atoms, strict=True)]
    for line in program.lines:
        pairs += zip(line.outs, line.eqn.outvars, strict=True)
    sizes: dict[Variable, Any] = {}
    for value, atom in pairs:
        for axis, size in zip(value.axes, getattr(atom.aval, "shape", ()), strict=True):
            variable = resolve(axis)
            if is_symbolic(size) and isinstance(variable, Variable):
                sizes.setdefault(variable, size)
    for line in program.lines:
        for inner in line.inner:
            for variable, size in _symbolic_sizes(inner).items():
                sizes.setdefault(variable, size)
    return sizes


def jaxpr_of(apply: Callable[..., PyTree], shapes: PyTree) -> tuple[Any, PyTree]:
    """The jaxpr of a function, and the shapes of what it gives.

    Raises:
        TraceError: if the function looks at values of arrays.
    """
    try:
        return jax.make_jaxpr(apply, return_shape=True)(*shapes)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise TraceError(
            f"the model can't be traced: {_culprit(error)} looks at the value of an "
            "array; use jax.lax.cond, jnp.where or sizes instead"
        ) from error


def _culprit(error: Exception) -> str:
    """The last line of the traceback that is neither JAX's nor Flax's nor ours."""
    inside = [Path(module.__file__ or "").parent for module in (jax, flax)]
    inside.append(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    users = [
        frame
        for frame in frames
        if not any(Path(frame.filename).is_relative_to(folder) for folder in inside)
    ]
    frame = (users or frames)[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line})"


def _within(kept: Iterable[str], stored: Mapping[str, Value]) -> Iterable[str]:
    for name in kept:
        within = [p for p in stored if p == name or p.startswith(f"{name}.")]
        if not within:
            raise ValueError(
                f"frozen: no array at {name!r}; there is {', '.join(stored)}"
            )
        yield from within


def places(stored: Mapping[str, Value]) -> Gated:
    """Axes of parameters in which each variable lies, in their order."""
    lies: Gated = {}
    for path, value in stored.items():
        for at, axis in enumerate(value.axes):
            for variable in dict.fromkeys(variables(axis)):
                lies.setdefault(variable, {})[path, at] = None
    return lies


def _freeze_what_meets_itself(reading: Reading, stored: Mapping[str, Value]) -> None:
    """Units that lie twice in one axis: zero at the one place is not at the other."""
    axes = [(axis, path) for path, value in stored.items() for axis in value.axes]
    axes += [(use.axis, use.where) for use in [*reading.uses, *reading.checks]]
    for axis, where in axes + reading.merged:
        for variable in meeting_themselves(axis):
            freeze(variable, f"{where}: it meets itself in a product")


def _gated(reading: Reading, lies: Gated) -> Gated:
    gated: Gated = {}
    # Whether whatever a variable's units hold reaches nothing where they are closed.
    severed: dict[Variable, bool] = {}
    for use in reading.uses:
        for variable in dict.fromkeys(variables(use.axis)):
            for zeros, severs in zip(use.candidates, use.severs, strict=True):
                slots = _slots(variable, zeros, lies)
                if slots:
                    gated.setdefault(variable, {}).update(dict.fromkeys(slots))
                    severed[variable] = severed.get(variable, True) and severs
                    break
            else:
                freeze(variable, f"{use.where}: no parameter reads it")
    for use in reading.checks:
        for variable in dict.fromkeys(variables(use.axis)):
            if not any(
                _holds(variable, zeros, lies, gated, severed)
                for zeros in use.candidates
            ):
                # (A gradient is summed over examples, which stay apart all the same.)
                why = f"{use.where}: a derivative runs over all of it"
                freeze(variable, why, mixes=False)
    return gated


def _slots(variable: Variable, zeros: Zeros, lies: Gated) -> list[Place]:
    """Where gates make zero what is said to be."""
    if zeros.within is not None and not any(
        variable in variables(part) for part in zeros.within
    ):
        return []
    return [place for place in sorted(zeros.slots) if place in lies.get(variable, ())]


def _holds(variable, zeros, lies, gated, severed) -> bool:
    """Whether gates that are there already make a value zero."""
    slots = _slots(variable, zeros, lies)
    behind = COTANGENT in zeros.slots
    if behind and not severed.get(variable, False):
        return False
    return bool(slots or behind) and all(p in gated.get(variable, ()) for p in slots)


# ------------------------------------------------------------------- at other sizes


def at_sizes(found: Traced, shapes: Mapping[str, Any]) -> Traced:
    """The function for inputs of other shapes or dtypes, with the same units.

    Args:
        found: the function as it was traced.
        shapes: what holds shape and dtype of each input, by path.

    Raises:
        ValueError: if it can't be traced for such inputs, or has other units then.
    """
    key = tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in shapes.values())
    before = tuple((tuple(a.shape), str(a.dtype)) for a in found.given.values())
    if key == before:
        return found
    if key not in found.others:
        found.others[key] = _again(found, shapes)
    return found.others[key]


def _again(found: Traced, shapes: Mapping[str, Any]) -> Traced:
    leaves = [jax.ShapeDtypeStruct(tuple(a.shape), a.dtype) for a in shapes.values()]
    tree = jax.tree.structure(found.shapes[1:])
    arguments = (found.shapes[0], *jax.tree.unflatten(tree, leaves))
    try:
        now, _ = traced(found.here.apply, arguments, found.frozen)
    except Exception as error:  # the user's code, which may raise what it likes
        raise ValueError(
            f"{differ(found, shapes)}; for these it can't be traced: {error}"
        ) from error
    members: dict[Variable, Sequence[tuple[str, int]]] = {}
    for path, value in found.params.items():
        for axis, other in zip(value.axes, now.params[path].axes, strict=True):
            for old, new_one in _counterparts(found, axis, other):
                name = next(group for group, _ in found.members[old] if group)
                if new_one is None:
                    why = f"its units in {path!r} are no axis of their own"
                elif new_one.frozen is not None:
                    why = new_one.frozen
                elif (
                    members.setdefault(new_one, found.members[old])
                    != (found.members[old])
                ):
                    why = "its units are those of another group too"
                elif not now.gated[new_one].keys() <= found.gated[old].keys():
                    why = f"its gates belong at {[*now.gated[new_one]]}"
                else:
                    continue
                raise ValueError(
                    f"{differ(found, shapes)}; for these, units of group {name!r} "
                    f"can't be removed: {why}"
                )
    return dataclasses.replace(now, members=members, others={})


def _counterparts(
    found: Traced, before: Type, after: Type
) -> Iterator[tuple[Variable, Variable | None]]:
    """Variables of groups in an axis as it was read, and as it was read again."""
    before, after = resolve(before), resolve(after)
    if isinstance(before, Variable):
        if before in found.members:
            yield before, after if isinstance(after, Variable) else None
        return
    inside = () if isinstance(after, Variable) else parts(after)
    if type(before) is type(after) and len(parts(before)) == len(inside):
        for one, other in zip(parts(before), inside, strict=True):
            yield from _counterparts(found, one, other)
    else:
        yield from ((v, None) for v in variables(before) if v in found.members)


def differ(found: Traced, shapes: Mapping[str, Any]) -> str:
    """How inputs differ from those that were traced."""
    told = [
        f"input {path!r} has shape {tuple(leaf.shape)} of {leaf.dtype}, and "
        f"{tuple(was.shape)} of {was.dtype} was traced"
        for (path, leaf), was in zip(shapes.items(), found.given.values(), strict=True)
        if (tuple(leaf.shape), leaf.dtype) != (tuple(was.shape), was.dtype)
    ]
    return "; ".join(told)
