"""Where closed gates could leave a program without a number.

A gate multiplies a parameter by zero, and what is computed of it may then be divided
by: the gated network gives no number where the one without the unit gives one. Two
things are followed through the program, along the axes that carry the unit: what the
gates *reach*, and the *signs* of values, which prove that a sum of squares and a
positive number can be divided by all the same.
"""

import enum
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from l0jax.axes import Type, Variable, freeze, variables
from l0jax.program import Line, Program, constants_and_carries
from l0jax.rules import NARY, REDUCTIONS, SAME, UNARY, names
from l0jax.values import Place, Value


class Sign(enum.IntEnum):
    """What is known of the numbers of a value, from nothing to most."""

    INFINITE = -1  # a constant that has infinite numbers, or none
    ANY = 0
    NOT_NEGATIVE = 1
    POSITIVE = 2


def freeze_at_poles(
    program: Program,
    params: Iterable[Value],
    gated: Mapping[Variable, Iterable[Place]],
) -> None:
    """Freezes the units whose gates reach what may then have no value.

    Args:
        program: what was read.
        params: values of the parameters, which are among the program's arguments.
        gated: for each variable the axes of parameters at which its gates are.
    """
    reach = _Reach({v: at for v, at in gated.items() if v.frozen is None})
    for value in params:
        reach.slots[id(value)] = {
            at: reach.number.get((str(value.array), at), 0)
            for at, axis in enumerate(value.axes)
            if reach.live(axis)
        }
    reach.through(program)
    for value, where in reach.poles:
        for at, slots in reach.slots.get(id(value), {}).items():
            for variable in reach.live(value.axes[at]):
                if slots & reach.gated[variable]:
                    freeze(variable, f"{where}: with closed gates it may have no value")


Leads = Callable[[int, int], bool]


def _anywhere(place: int, at: int) -> bool:
    return True


def _leads(eqn: Any, argument: int) -> Leads:
    """Which axes of an argument lead to which axes of what an equation gives.

    An axis that is summed over leads to none: all units have the sum, which is the same
    with those that are closed as without them.
    """
    name, gone = eqn.primitive.name, ()
    if name in UNARY | NARY:  # (arguments without axes lead nowhere anyway)
        return lambda place, at: place == at
    if name == "dot_general":
        gone = eqn.params["dimension_numbers"][0][argument]
    elif name == "conv_general_dilated" and eqn.params["feature_group_count"] == 1:
        numbers = eqn.params["dimension_numbers"]
        gone = (numbers.lhs_spec, numbers.rhs_spec)[argument][1:2]
    elif name in REDUCTIONS:
        gone = eqn.params["axes"]
    return lambda place, at: place not in gone


class _Reach:
    """What gates reach, gathered equation by equation.

    Values are known by their identity: two that are equal are not one.
    """

    def __init__(self, gated: Mapping[Variable, Iterable[Place]]):
        # Sets of places are numbers with a bit for each: of a stream that all layers
        # add to, sets grow as long as the program.
        places = dict.fromkeys(place for at in gated.values() for place in at)
        self.number = {place: 1 << bit for bit, place in enumerate(places)}
        self.gated = {
            variable: sum(self.number[place] for place in dict.fromkeys(at))
            for variable, at in gated.items()
        }
        # For each axis of a value, the gated axes of parameters that it depends on.
        self.slots: dict[int, dict[int, int]] = {}
        self.signs: dict[int, Sign] = {}
        self.poles: list[tuple[Value, str]] = []
        self._live: dict[int, frozenset[Variable]] = {}

    def live(self, axis: Type) -> frozenset[Variable]:
        """The variables of an axis that have gates."""
        found = self._live.get(id(axis))
        if found is None:
            found = frozenset(v for v in variables(axis) if v in self.gated)
            self._live[id(axis)] = found
        return found

    def through(self, program: Program) -> None:
        """Reads all equations, in their order."""
        for value, constant in zip(program.ins, program.constants, strict=False):
            self.signs[id(value)] = _sign_of(constant)
        for line in program.lines:
            for atom, value in zip(line.eqn.invars, line.ins, strict=True):
                if isinstance(atom, jax.extend.core.Literal):
                    self.signs[id(value)] = _sign_of(atom.val)
            if line.inner:
                self._run(line)
                continue
            signs = [self.signs.get(id(value), Sign.ANY) for value in line.ins]
            for at in _outside(line, signs):
                self.poles.append((line.ins[at], line.where))
            for out in line.outs:
                if any(out is value for value in line.ins):  # handed on as it is
                    continue
                self.signs[id(out)] = self._sign(line, out, signs)
                for at, value in enumerate(line.ins):
                    self._flow(value, out, _leads(line.eqn, at))

    @staticmethod
    def _sign(line: Line, out: Value, signs: Sequence[Sign]) -> Sign:
        if out.number is not None:
            return _sign_of(out.number)
        name = line.eqn.primitive.name
        if name == "select_n" and line.ins[0].number is not None:
            return signs[1 + int(line.ins[0].number)]
        if name == "pow" and line.ins[1].number is not None:
            # A square, whatever it is the square of.
            even = signs[0] is not Sign.INFINITE and line.ins[1].number % 2 == 0
            return max(signs[0], Sign.NOT_NEGATIVE) if even else signs[0]
        return _sign(line.eqn, signs)

    def _run(self, line: Line) -> None:
        """Programs within the equation: loops until nothing more is reached."""
        into, again, out = _ways(line)
        for one, other in into:
            self._flow(one, other)
        if not again:
            self._hand_on(into)
        more = True
        while more:
            for program in line.inner:
                self.through(program)
            more = any([self._flow(one, other) for one, other in again])
        for one, other in out:
            self._flow(one, other)
        if not again:
            self._hand_on(out)

    def _hand_on(self, pairs: "Ways") -> None:
        """Signs of values go over to others that are the one or the other of them."""
        found: dict[int, Sign] = {}
        for one, other in pairs:
            sign = self.signs.get(id(one), Sign.ANY)
            found[id(other)] = min(sign, found.get(id(other), sign))
        self.signs.update(found)

    def _flow(self, one: Value, other: Value, leads: Leads = _anywhere) -> bool:
        """What reaches one value reaches another that is made of it, along axes of the
        same units, of which one `leads` to the other; whether that was news."""
        slots = self.slots.get(id(one))
        if one is other or not slots:
            return False
        news = False
        for at, axis in enumerate(other.axes):
            units = self.live(axis)
            if not units:
                continue
            there = self.slots.setdefault(id(other), {})
            before = after = there.get(at, 0)
            for place, more in slots.items():
                if leads(place, at) and not units.isdisjoint(
                    self.live(one.axes[place])
                ):
                    after |= more
            there[at] = after
            news |= after != before
        return news


Ways = Iterable[tuple[Value, Value]]


def _ways(line: Line) -> tuple[Ways, Ways, Ways]:
    """Pairs of values: into the programs of an equation, from one turn to the next, and
    out."""
    eqn, ins, inner = line.eqn, line.ins, line.inner
    if eqn.primitive.name == "scan":
        consts, carried = constants_and_carries(eqn)
        begin = ins[consts : consts + carried]
    elif eqn.primitive.name == "while":
        consts = eqn.params["body_nconsts"]
        begin = ins[eqn.params["cond_nconsts"] + consts :]
        carried = len(begin)
    else:
        # What a program reads as it is, is one value inside and outside.
        given = ins[1:] if eqn.primitive.name == "cond" else ins
        return (
            [
                pair
                for program in inner
                for pair in zip(
                    given, program.ins[len(program.constants) :], strict=True
                )
            ],
            (),
            [
                pair
                for program in inner
                for pair in zip(program.outs, line.outs, strict=True)
            ],
        )
    body = inner[-1]
    given = body.ins[len(body.constants) :]
    carry = given[consts : consts + carried]
    rows = zip(ins[consts + carried :], given[consts + carried :], strict=False)
    return (
        [*zip(begin, carry, strict=True), *rows],
        [*zip(body.outs, carry, strict=False)],
        # (A loop may have no turn.)
        [*zip(body.outs, line.outs, strict=True), *zip(begin, line.outs, strict=False)],
    )


# -------------------------------------------------------------------- what has no value

NEEDS = {
    "log": Sign.POSITIVE,
    "rsqrt": Sign.POSITIVE,
    "sqrt": Sign.NOT_NEGATIVE,
    "log1p": Sign.NOT_NEGATIVE,
}
# Defined on a part of the numbers that signs do not tell.
BOUNDED = names("acos acosh asin atanh digamma erf_inv igamma igammac lgamma")
PRODUCTS = names("mul dot_general conv_general_dilated")


def _outside(line: Line, signs: Sequence[Sign]) -> Iterable[int]:
    """Which arguments of an equation may lie where it has no value."""
    eqn = line.eqn
    name = eqn.primitive.name
    if name in BOUNDED:
        return range(len(signs))
    if name in ("div", "rem"):
        return (1,) if signs[1] < Sign.POSITIVE else ()
    if name == "integer_pow" and eqn.params["y"] < 0:
        return (0,) if signs[0] < Sign.POSITIVE else ()
    if name == "pow":
        exponent = line.ins[1].number
        if exponent is None or exponent <= 0:
            needed = Sign.POSITIVE
        elif exponent % 1:
            # Zero to the power of a positive number is zero.
            needed = Sign.NOT_NEGATIVE
        else:
            return ()
        return (0, 1) if signs[0] < needed else ()
    if name in PRODUCTS and min(signs) is Sign.INFINITE:  # zero times infinity
        return range(len(signs))
    return (0,) if name in NEEDS and signs[0] < NEEDS[name] else ()


# ------------------------------------------------------------------------------- signs


def _sign_of(constant: Any) -> Sign:
    """The sign that all numbers of an array have."""
    if not jnp.issubdtype(jnp.result_type(constant), jnp.number):
        return Sign.ANY
    numbers = np.asarray(constant)
    if not np.isfinite(numbers).all():
        return Sign.INFINITE
    if np.iscomplexobj(numbers) or (numbers < 0).any():
        return Sign.ANY
    return Sign.POSITIVE if (numbers > 0).all() else Sign.NOT_NEGATIVE


# What gives numbers that are there already.
MOVES = SAME | names(
    "broadcast_in_dim concatenate cummax cummin expand_dims pad reduce_max reduce_min "
    "reshape rev slice sort split squeeze stack tile transpose unstack"
)
# Functions whose value has the sign of their argument, and sums and products of it.
KEEPS_SIGN = names(
    "asinh atan cbrt ceil cumprod cumsum erf expm1 log1p reduce_prod reduce_sum rsqrt "
    "sign sinh sqrt tanh"
)
ALWAYS_POSITIVE = names("cosh exp exp2 logistic")


def _sign(eqn: Any, signs: Sequence[Sign]) -> Sign:
    """The sign of what an equation gives, of the signs of what it gets."""
    name = eqn.primitive.name
    avals = [atom.aval for atom in eqn.invars]
    low, high = min(signs, default=Sign.ANY), max(signs, default=Sign.ANY)
    if any(0 in getattr(aval, "shape", ()) for aval in avals):
        return Sign.ANY  # the largest of nothing is minus infinity
    found = Sign.ANY
    if name in MOVES:
        found = low
    elif name == "select_n":
        found = min(signs[1:])
    elif name in ("dynamic_slice", "gather"):  # which may give zero outside of it
        filled = eqn.params.get("fill_value")
        found = min(signs[0], Sign.NOT_NEGATIVE)
        if filled is not None and filled < 0:
            found = Sign.ANY
    elif low is Sign.INFINITE or any(_is_complex(aval) for aval in avals):
        found = Sign.NOT_NEGATIVE if name == "abs" else Sign.ANY
    elif name in ALWAYS_POSITIVE:
        found = Sign.POSITIVE
    elif name in KEEPS_SIGN:
        found = low
    elif _is_even(eqn):
        found = max(low, Sign.NOT_NEGATIVE)
    elif name in ("add", "add_any"):
        found = high if low >= Sign.NOT_NEGATIVE else Sign.ANY
    elif name in ("mul", "div", "min", "dot_general"):
        found = low
    elif name == "max":
        found = high
    elif name == "pow":
        found = signs[0]
    elif name == "clamp":
        lowest, value, highest = signs
        found = min(max(lowest, value), highest)
    elif name in ("conv_general_dilated", "reduce_window_sum", "iota"):
        found = min(low, Sign.NOT_NEGATIVE) if signs else Sign.NOT_NEGATIVE
    exact = not _is(eqn.outvars[0].aval.dtype, jnp.inexact)
    return min(found, Sign.NOT_NEGATIVE) if exact else found  # a half has become zero


def _is_even(eqn: Any) -> bool:
    """Whether what an equation gives is a square, or such a thing."""
    name = eqn.primitive.name
    return (
        name in ("abs", "square")
        or (name == "integer_pow" and eqn.params["y"] % 2 == 0)
        or (name == "mul" and eqn.invars[0] is eqn.invars[1])
    )


def _is_complex(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and _is(dtype, jnp.complexfloating)


# There are few dtypes, and they are asked for in every equation.
_is = functools.cache(jnp.issubdtype)
