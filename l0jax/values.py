"""What is known of the arrays within a program, and what reading it collects."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l0jax.axes import Type, freeze, fresh

Place = tuple[str, int]
"""An axis of a parameter."""

COTANGENT: Place = ("", -1)
"""Stands for what reaches a value from behind: zero where nothing behind reads it."""


@dataclass(frozen=True)
class Zeros:
    """Which axes of which parameters, if zero at some units, make a value zero there.

    The value is zero at a unit where all those are zero in which the unit lies.

    Attributes:
        slots: (path, axis) of parameters; empty if nothing is known.
        within: the parts of the axis whose units this is said of; None is all of it.
            Others may lie in the same parameters, and still not be zero there.
    """

    slots: frozenset[Place] = frozenset()
    within: tuple[Type, ...] | None = None


NEVER = Zeros()
Alike = frozenset[Place] | None


@dataclass(frozen=True)
class Value:
    """What is known of one array.

    Attributes:
        axes: the type of each axis.
        zeros: for each axis, what makes the value zero at units along it.
        data: whether it depends on inputs, not on parameters alone.
        array: path of the parameter of which it holds all elements, and no others.
        parts: the number of turns of loops that hold them between them.
        even: for each axis the places that, if zero at some units, make the value the
            same at all of these, whatever it is; None if nothing is known.
        number: what all its elements are, if that is known.
        known: whether it depends on neither inputs nor parameters. It is computed at
            its full size, and what is left of its axes is taken where it meets others.
        counts: the axis along which it is 0, 1, 2, …, if it is known and there is one:
            what is indexed by it stays in its order.
    """

    axes: tuple[Type, ...]
    zeros: tuple[Zeros, ...]
    data: bool
    array: str | None = None
    parts: int = 1
    even: tuple[Alike, ...] = ()
    number: Any = None
    known: bool = False
    counts: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array as it was traced."""
        return tuple(axis.size for axis in self.axes)

    def alike(self, at: int) -> Alike:
        """What makes the value the same at all closed units along an axis."""
        zeros = self.zeros[at]
        if zeros.slots and zeros.within is None:
            return zeros.slots
        if self.number is not None or self.axes[at].size == 1:
            return frozenset()
        return self.even[at] if self.even else None


@dataclass(frozen=True)
class Contraction:
    """A product that was summed over an axis: what a network costs.

    Attributes:
        primitive: its name.
        where: the line of the program.
        factors: axes whose sizes multiply to the number of multiply-accumulates.
        times: how often it runs: the length of the loops around it.
        parts: how many of these runs it takes to use the kernel once.
        kernel: path of the parameter that is one side of it, if one is.
        rest: those of the factors that are no axes of that parameter.
        reads: axes of that parameter over which it sums.
        makes: axes of that parameter that are left.
        apart: axes of both sides that are neither summed over nor multiplied out.
        summed: axes that are summed over.
        free: axes of one side alone.
        of_activations: whether both sides depend on inputs.
        once: the loop around it of which nobody knows how often it turns, and which is
            taken for one turn; empty if there is none.
    """

    primitive: str
    where: str
    factors: tuple[Type, ...]
    times: int
    parts: int = 1
    kernel: str | None = None
    rest: tuple[Type, ...] = ()
    reads: tuple[int, ...] = ()
    makes: tuple[int, ...] = ()
    apart: tuple[Type, ...] = ()
    summed: tuple[Type, ...] = ()
    free: tuple[Type, ...] = ()
    of_activations: bool = False
    once: str = ""


@dataclass(frozen=True)
class Use:
    """An axis that was summed over.

    Attributes:
        axis: its type.
        candidates: what makes what is summed zero; any one of them does.
        severs: for each of them, whether it also cuts the sum off from all that the
            other side depends on.
        where: the line of the program.
    """

    axis: Type
    candidates: tuple[Zeros, ...]
    severs: tuple[bool, ...]
    where: str


@dataclass
class Reading:
    """What reading a program collects.

    Attributes:
        uses: axes that were summed over.
        checks: the same within derivatives, where no gate can be placed.
        ungated: parameters that a gate can't scale, and their dtypes.
        unknown: primitives without a rule, and the line of the first of each.
        contractions: for costs.
        merged: axes that became one; units that lie in it twice are known at neither.
        where: the primitive and the line that are being read.
        times: how often that line runs.
        derivatives: those within which we are.
        numbers: what stands for the symbols in sizes.
        rules: of each function with a derivative of its own, the programs of that.
        columns: of what was concatenated along its last axis, the parts: what indices
            of several axes are made of.
    """

    uses: list[Use] = field(default_factory=list)
    checks: list[Use] = field(default_factory=list)
    ungated: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    merged: list[tuple[Type, str]] = field(default_factory=list)
    where: str = ""
    times: int = 1
    derivatives: list[Any] = field(default_factory=list)
    numbers: Mapping[str, int] = field(default_factory=dict)
    rules: dict[Any, Any] = field(default_factory=dict)
    columns: dict[Any, Sequence[Value]] = field(default_factory=dict)

    def aside(self) -> "Reading":
        """For what is read beside the program: it costs nothing there."""
        return Reading(
            ungated=self.ungated,
            unknown=self.unknown,
            where=self.where,
            numbers=self.numbers,
            rules=self.rules,
        )


def new(shape: Sequence[int], data: bool, known: bool = False) -> Value:
    """A value of which nothing is known but its shape."""
    axes = tuple(fresh(size) for size in shape)
    return Value(axes, (NEVER,) * len(axes), data, known=known)


def constant(array: Any) -> Value:
    """An array of the program itself."""
    value = new(np.shape(array), data=False, known=True)
    concrete = isinstance(array, np.ndarray | np.generic | int | float | complex)
    if not concrete and (
        not isinstance(array, jax.Array)
        or isinstance(array, jax.core.Tracer)
        or jnp.issubdtype(array.dtype, jax.dtypes.extended)
    ):
        return value
    numbers = np.asarray(array)
    return replace(value, number=_number(numbers), counts=_counts(numbers))


def _number(numbers: np.ndarray) -> Any:
    """What all elements of an array are, or None if they differ."""
    if not numbers.size or not (numbers == numbers.flat[0]).all():
        return None
    return numbers.flat[0]


def _counts(numbers: np.ndarray) -> int | None:
    """The one axis along which an array is 0, 1, 2, …, or None if there is none."""
    longer = [at for at, size in enumerate(numbers.shape) if size > 1]
    if len(longer) != 1 or not np.issubdtype(numbers.dtype, np.integer):
        return None
    in_order = (numbers.ravel() == np.arange(numbers.size)).all()
    return longer[0] if in_order else None


def opaque(shape: Sequence[int], why: str, mixes: bool = True) -> Value:
    """A value nothing of which may be removed."""
    value = new(shape, data=True)
    for axis in value.axes:
        freeze(axis, why, mixes=mixes)
    return value


def fixed(size: int, why: str, mixes: bool = True) -> Type:
    """The type of an axis that keeps its size."""
    axis = fresh(size)
    freeze(axis, why, mixes=mixes)
    return axis


def shapes_out(eqn: Any) -> list[tuple[int, ...]]:
    """Shapes of what an equation writes."""
    return [getattr(out.aval, "shape", ()) for out in eqn.outvars]


def union(zeros: Sequence[Zeros]) -> frozenset[Place]:
    """All places of several."""
    return frozenset().union(*(one.slots for one in zeros))


def all_alike(known: Sequence[Alike]) -> Alike:
    """What makes a combination of values alike: all that makes each of them so."""
    if any(one is None for one in known):
        return None
    return frozenset().union(*(one for one in known if one is not None))


def elements(shape: Sequence[int]) -> int:
    """The number of elements of an array."""
    return math.prod(shape)
