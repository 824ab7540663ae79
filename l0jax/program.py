"""A jaxpr, read equation by equation: what each does to the types of axes.

Primitives have their rules in `l0jax.rules`. Here are those that run other jaxprs
(calls, loops, branches), and what is remembered of each equation for `l0jax.narrow`.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util

from l0jax import derivatives
from l0jax.axes import freeze, unify
from l0jax.derivatives import bind, is_backward, rule_of, rules_of
from l0jax.liveness import is_nothing, live, reached
from l0jax.rules import NARY, RULES, SAME, UNARY, frozen
from l0jax.symbolic import seen
from l0jax.values import (
    COTANGENT,
    NEVER,
    Contraction,
    Reading,
    Use,
    Value,
    Zeros,
    constant,
    elements,
    new,
    opaque,
    shapes_out,
)


@dataclass(frozen=True)
class Line:
    """One equation of a program, with what is known of its values.

    Attributes:
        eqn: the equation.
        ins: the values that it reads.
        outs: the values that it writes.
        inner: the programs that it runs, if it runs any.
        where: the primitive and the line of the user's code.
        derivative: of a function that has one of its own.
    """

    eqn: Any
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    inner: tuple["Program", ...]
    where: str
    derivative: "Derivative | None" = None


@dataclass(eq=False)
class Derivative:
    """What the author of a function says is its derivative, as programs.

    Forward (`custom_jvp`): arguments and tangents of those that move, to results and
    their tangents. Backward (`custom_vjp`): arguments to results and what is
    remembered; then that and cotangents, to cotangents of the arguments that move.

    Attributes:
        moving: which arguments are differentiated by: those that hold real numbers.
        texts: the programs as text, by which one within another is known to be it.
        ins, outs: values of the call.
        programs: one program forward, or two backward. Filled in when they are read,
            for a rule may call the function itself.
        fails: why there are none, if the rule could not be traced.
    """

    moving: tuple[bool, ...]
    texts: tuple[str, ...]
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    programs: list["Program"] = field(default_factory=list)
    fails: str = ""


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
    inside = [constant(each) for each in constants]
    given = [*inside, *values]
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], given, strict=True))

    def value_of(atom):
        if isinstance(atom, jax.extend.core.Literal):
            return constant(atom.val)
        return known[atom]

    lines = []
    # (By identity: equations have no order, and are compared part by part.)
    costly = {*map(id, live(jaxpr)[0])}
    for equation in reached(jaxpr):
        eqn, name = seen(equation, reading.numbers), equation.primitive.name
        ins = [value_of(atom) for atom in equation.invars]
        count = len(reading.contractions)
        # What a library compiled before has no line of its own, but that of the call.
        line = line_of(equation) or caller
        reading.where = where = f"{name} at {line or 'an unknown line'}"
        inner: tuple[Program, ...] = ()
        derivative = None
        known_whole = name not in CALLS and not equation.effects
        if known_whole and all(value.known for value in ins):
            outs = _known(eqn, ins)
        elif name in RULES:
            outs = RULES[name](reading, eqn, ins)
        elif name in RUNS:
            outs, inner = RUNS[name](reading, eqn, ins, line)
        elif name in CUSTOM:
            outs, inner, derivative = _custom(reading, equation, ins, line)
        else:
            reading.unknown.setdefault(name, line or "an unknown line")
            reading.where = f"no rule for {reading.where}"
            outs = frozen(reading, eqn, ins)
        if is_nothing(equation):
            outs = [dataclasses.replace(out, number=NONE) for out in outs]
        if id(equation) not in costly:
            reading.contractions = reading.contractions[:count]
        known.update(zip(equation.outvars, outs, strict=True))
        lines.append(Line(equation, tuple(ins), tuple(outs), inner, where, derivative))
    outs = tuple(value_of(atom) for atom in jaxpr.outvars)
    return Program(jaxpr, tuple(constants), tuple(given), tuple(lines), outs)


NONE = np.zeros(())[()]
MOVES_NUMBERS = ("broadcast_in_dim", "reshape", "convert_element_type")


def _known(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    """Values that depend on no argument of the program: tables, masks, counts."""
    outs = [
        new(getattr(out.aval, "shape", ()), data=False, known=True)
        for out in eqn.outvars
    ]
    numbers = [value.number for value in ins]
    counts = _counts(eqn, ins)
    if counts is not None:
        return [dataclasses.replace(outs[0], counts=counts)]
    if eqn.primitive.name == "lt" and ins[0].counts is not None and numbers[1] == 0:
        # (JAX asks it of every index.)
        return [dataclasses.replace(outs[0], number=np.False_)]
    if not numbers or any(number is None for number in numbers):
        return outs
    if eqn.primitive.name in MOVES_NUMBERS:
        number = np.asarray(numbers[0]).astype(eqn.outvars[0].aval.dtype)[()]
    elif eqn.primitive.name in UNARY | NARY and not outs[0].axes:
        with jax.ensure_compile_time_eval():
            (number,) = bind(eqn, [*map(jnp.asarray, numbers)])
        number = np.asarray(number)[()]
    else:
        return outs
    return [dataclasses.replace(outs[0], number=number)]


def _counts(eqn: Any, ins: Sequence[Value]) -> int | None:
    """The axis along which what an equation writes is 0, 1, 2, …, or None."""
    name = eqn.primitive.name
    if name == "iota":
        return int(eqn.params["dimension"])
    if name == "select_n" and ins[0].number is not None:
        return ins[1 + int(ins[0].number)].counts
    if not ins or ins[0].counts is None:
        return None
    (shape,) = shapes_out(eqn)
    at, size = ins[0].counts, ins[0].axes[ins[0].counts].size
    if name in SAME:
        return at
    if name == "broadcast_in_dim":
        place = int(eqn.params["broadcast_dimensions"][at])
        return place if shape[place] == size else None
    if name in ("reshape", "squeeze", "expand_dims"):
        # What else there is has one position, before and after.
        alone = elements(shape) == elements(ins[0].shape) == size
        return shape.index(size) if alone else None
    return None


OWN = derivatives.__file__
"""Where rules of derivatives are traced: no line of a user."""


def line_of(eqn: Any) -> str:
    """`file:line (function)` of the user's code that an equation came from, or ""."""
    line = source_info_util.summarize(eqn.source_info)
    if line.startswith(OWN):
        return ""
    for folder in ("site-packages/", f"{os.getcwd()}/"):
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


def _inside(value: Value) -> Value:
    """An argument of a program that is differentiated, or comes round: cut to what is
    left, and alike at closed units only where it is zero."""
    return dataclasses.replace(value, known=False, number=None, even=(), counts=None)


def _carried(value: Value, zeros: tuple[Zeros, ...]) -> Value:
    """What a loop changes: what held before it need not hold after a turn."""
    return Value(value.axes, zeros, value.data)


def _common_zeros(before: Value, after: Value) -> tuple[Zeros, ...]:
    """What makes both of two values zero, the one before a turn and the one after."""
    return tuple(
        NEVER
        if not a.slots or not b.slots or a.within or b.within
        else Zeros(a.slots | b.slots)
        for a, b in zip(before.zeros, after.zeros, strict=True)
    )


def _round(
    reading: Reading,
    start: Sequence[Value],
    turn: Callable[[Reading, list[Value]], Sequence[Value]],
) -> list[Value]:
    """What comes round in a loop: with zeros where they are zero to begin with, and
    after each turn if they were before it.

    Args:
        reading: what is collected; the turns that are tried are read aside.
        start: values before the first turn.
        turn: reads the loop's body for given values, and gives those after it.
    """
    zeros = [value.zeros for value in start]
    for _ in range(3):
        if not any(one.slots for each in zeros for one in each):
            break
        carry = [_carried(v, z) for v, z in zip(start, zeros, strict=True)]
        found = turn(reading.aside(), carry)
        common = [_common_zeros(a, b) for a, b in zip(carry, found, strict=True)]
        if common == zeros:
            return carry
        zeros = common
    return [_carried(value, (NEVER,) * len(value.axes)) for value in start]


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
    stacked = values[consts + carried :]
    for value in stacked:
        freeze(value.axes[0], loop)
    rows = [
        dataclasses.replace(
            value,
            axes=value.axes[1:],
            zeros=value.zeros[1:],
            parts=value.parts * length,
            even=(),
            counts=None,
        )
        for value in stacked
    ]

    def body(reading, carry):
        times = reading.times
        reading.times *= length
        given = [*values[:consts], *carry, *rows]
        program = read(reading, eqn.params["jaxpr"], given, line)
        reading.times, reading.where = times, where
        return program

    def turn(aside, carry):
        found = body(aside, carry).outs[:carried]
        _meet(reading, carry, found)
        return found

    carry = _round(reading, values[consts : consts + carried], turn)
    program = body(reading, carry)
    found = program.outs
    _meet(reading, carry, found[:carried])
    (along,) = opaque((length,), loop).axes
    outs = [
        *(_carried(v, c.zeros) for v, c in zip(found[:carried], carry, strict=True)),
        *(Value((along, *v.axes), (NEVER, *v.zeros), v.data) for v in found[carried:]),
    ]
    return outs, (program,)


def _while(reading, eqn, values, line):
    tested, turned = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    where = reading.where
    given = values[tested : tested + turned]

    def turn(aside, carry):
        found = read(aside, eqn.params["body_jaxpr"], [*given, *carry], line).outs
        reading.where = where
        _meet(reading, carry, found)
        return found

    carry = _round(reading, values[tested + turned :], turn)
    turns, before = _turns(eqn, values), len(reading.contractions)
    times = reading.times
    if turns is not None:
        reading.times = times * (turns + 1)  # that it ends is tested too
    test = read(reading, eqn.params["cond_jaxpr"], [*values[:tested], *carry], line)
    if turns is not None:
        reading.times = times * turns
    body = read(reading, eqn.params["body_jaxpr"], [*given, *carry], line)
    reading.where, reading.times = where, times
    if turns is None:
        inside = reading.contractions[before:]
        reading.contractions[before:] = [
            dataclasses.replace(each, once=each.once or where) for each in inside
        ]
    _meet(reading, carry, body.outs)
    outs = [_carried(v, c.zeros) for v, c in zip(body.outs, carry, strict=True)]
    return outs, (test, body)


def _turns(eqn: Any, values: Sequence[Value]) -> int | None:
    """How often a loop turns, if it only counts: from a constant, by another, as long
    as it is less than a third. None if it does anything else."""
    literal = jax.extend.core.Literal
    tested, turned = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body = (eqn.params[f"{name}_jaxpr"].jaxpr for name in ("cond", "body"))
    carried, start = body.invars[turned:], values[tested + turned :]
    if len(test.eqns) != 1 or test.eqns[0].primitive.name != "lt":
        return None
    counter, limit = test.eqns[0].invars
    if counter not in test.invars[tested:] or test.outvars != test.eqns[0].outvars:
        return None
    at = test.invars.index(counter) - tested
    steps = [each for each in body.eqns if each.outvars == [body.outvars[at]]]
    if not steps or steps[0].primitive.name != "add":
        return None
    one, step = steps[0].invars
    first = start[at].number
    known = isinstance(limit, literal) and isinstance(step, literal)
    whole = jnp.issubdtype(counter.aval.dtype, jnp.integer)
    if one is not carried[at] or not (known and whole) or first is None:
        return None
    first, step, limit = (int(n) for n in (first, step.val, limit.val))
    return max(0, -(-(limit - first) // step)) if step > 0 else None


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
    outs = [_carried(value, value.zeros) for value in programs[0].outs]
    for other in programs[1:]:
        _meet(reading, programs[0].outs, other.outs)
        outs = [
            _carried(one, _common_zeros(one, value))
            for one, value in zip(outs, other.outs, strict=True)
        ]
    return outs, tuple(programs)


def _remat(reading, eqn, values, line):
    program = read(reading, eqn.params["jaxpr"], [*map(_inside, values)], line)
    return [*map(_inside, program.outs)], (program,)


def _multiply_accumulates(contractions: Sequence[Contraction]) -> int:
    return sum(
        each.times * math.prod(axis.size for axis in each.factors)
        for each in contractions
    )


CALLS = ("jit", "pjit", "closed_call", "core_call")
REMATS = ("remat", "remat2", "checkpoint")
RUNS: dict[str, Runs] = {
    **dict.fromkeys(CALLS, _call),
    **dict.fromkeys(REMATS, _remat),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


# ------------------------------------------------------- functions with own derivatives

CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def _custom(reading, eqn, values, line):
    """A function and the derivative that it has of its own, which is read too: it may
    ask of axes what the function does not."""
    where = reading.where
    given = [*map(_inside, values)]
    program = _call(reading, eqn, given, line)[1][0]
    outs = [*map(_inside, program.outs)]
    reading.where = where
    derivative = _derivative(reading, eqn, given, outs, line)
    reading.where = where
    return outs, (program,), derivative


def _derivative(reading, eqn, given, outs, line) -> Derivative:
    moving = tuple(jnp.issubdtype(atom.aval.dtype, jnp.inexact) for atom in eqn.invars)
    try:
        jaxprs, texts = _traced_once(reading, eqn, moving)
    except Exception as error:  # the user's code, which may raise what it likes
        found = Derivative(moving, (), tuple(given), tuple(outs))
        found.fails = f"{reading.where}: its derivative can't be traced: {error}"
        return found
    for one in reading.derivatives:
        if one.texts == texts:
            # The rule calls the function itself, whose derivative is this one.
            for before, after in ((one.ins, given), (one.outs, outs)):
                _meet(reading, before, after)
            return one
    found = Derivative(moving, texts, tuple(given), tuple(outs))
    aside, where = reading.aside(), reading.where
    aside.derivatives = [*reading.derivatives, found]
    moved = [v for v, moves in zip(given, moving, strict=True) if moves]
    if is_backward(eqn):
        first = read(aside, jaxprs[0], given, line)
        found.programs.append(first)
        _meet(reading, outs, first.outs[: len(outs)])
        cotangents = [
            Value(v.axes, (Zeros(frozenset({COTANGENT})),) * len(v.axes), data=True)
            for v, out in zip(outs, eqn.outvars, strict=True)
            if jnp.issubdtype(out.aval.dtype, jnp.inexact)
        ]
        remembered = [*map(_inside, first.outs[len(outs) :])]
        second = read(aside, jaxprs[1], [*remembered, *cotangents], line)
        found.programs.append(second)
        _meet(reading, moved, second.outs)
        # What reaches closed units from behind must not go on before them.
        aside.checks += [
            Use(axis, (zeros, before), (False, False), where)
            for value, moves in zip(second.outs, moved, strict=True)
            for axis, zeros, before in zip(
                value.axes, value.zeros, moves.zeros, strict=True
            )
        ]
    else:
        program = read(aside, jaxprs[0], [*given, *moved], line)
        found.programs.append(program)
        _meet(reading, outs, program.outs[: len(outs)])
        _meet(reading, _real(outs, eqn), program.outs[len(outs) :])
    reading.checks += [*aside.uses, *aside.checks]
    reading.merged += aside.merged
    return found


def _traced_once(reading: Reading, eqn: Any, moving: Sequence[bool]):
    """The programs of a derivative, and their texts."""
    rule = rule_of(eqn)
    key = (rule, tuple(str(atom.aval) for atom in eqn.invars))
    if rule is None or key not in reading.rules:
        jaxprs = rules_of(eqn, moving)
        # (With the equation, so that what the key identifies lives on.)
        reading.rules[key] = eqn, jaxprs, tuple(map(str, jaxprs))
    _, jaxprs, texts = reading.rules[key]
    return jaxprs, texts


def _real(outs: Sequence[Value], eqn: Any) -> list[Value]:
    """Those that hold real or complex numbers, and so have tangents."""
    return [
        value
        for value, out in zip(outs, eqn.outvars, strict=True)
        if jnp.issubdtype(out.aval.dtype, jnp.inexact)
    ]
