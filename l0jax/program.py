"""A jaxpr, read equation by equation: what each does to the types of axes.

Primitives have their rules in `l0jax.rules`. Here are those that run other jaxprs
(calls, loops, branches), and what is remembered of each equation for `l0jax.narrow`.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import numpy as np
from jax.extend import source_info_util

from l0jax.axes import freeze, unify
from l0jax.rules import NEVER, RULES, Contraction, Reading, Value, frozen, new, opaque


@dataclass(frozen=True)
class Line:
    """One equation of a program, with what is known of its values.

    Attributes:
        eqn: the equation.
        ins: the values that it reads.
        outs: the values that it writes.
        inner: the programs that it runs, if it runs any.
        where: the primitive and the line of the user's code.
    """

    eqn: Any
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    inner: tuple["Program", ...]
    where: str


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
        reading.where = where = f"{name} at {line or 'an unknown line'}"
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
        lines.append(Line(eqn, tuple(ins), tuple(outs), inner, where))
    outs = tuple(value_of(atom) for atom in jaxpr.outvars)
    return Program(jaxpr, tuple(constants), tuple(given), tuple(lines), outs)


def _constant(reading: Reading, constant: Any) -> Value:
    value = new(np.shape(constant), data=False)
    reading.constants.append(value)
    return value


def line_of(eqn: Any) -> str:
    """`file:line (function)` of the user's code that an equation came from, or ""."""
    line = source_info_util.summarize(eqn.source_info)
    for folder in ("site-packages/", f"{os.getcwd()}/"):
        line = line.rpartition(folder)[2]
    return line.strip(" :")


def bind(
    eqn: Any, given: Sequence[Any], changes: Mapping[str, Any] | None = None
) -> Sequence[Any]:
    """What an equation gives for other arguments, with some parameters changed."""
    params = eqn.primitive.get_bind_params({**eqn.params, **(changes or {})})
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*given, **params)
    return results if eqn.primitive.multiple_results else [results]


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
    times = reading.times
    reading.times *= length
    given = [*values[:consts], *carry, *rows]
    program = read(reading, eqn.params["jaxpr"], given, line)
    reading.times = times
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
