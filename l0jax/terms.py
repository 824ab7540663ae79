"""What programs compute, as terms: equal terms are equal values.

Every value of a jaxpr is numbered by the primitive that makes it, all the primitive's
parameters and the numbers of what it is made from (Click, "Global code motion, global
value numbering", PLDI 1995). Two programs whose results have the same numbers are one
function, in whatever order and within whatever calls they compute it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from l0jax.derivatives import bind
from l0jax.liveness import is_nothing
from l0jax.program import CALLS, CUSTOM, REMATS, constants_and_carries, line_of

COMPARE = ("max", "min", "clamp", "lt", "le", "gt", "ge", "eq", "ne", "rem", "sign")
"""Primitives that may change what they give at a number."""

INLINED = (*CALLS, *REMATS, *CUSTOM)
"""Calls whose value is that of what they call, whatever their derivative is."""


@dataclass(frozen=True)
class Term:
    """How a value is made.

    Attributes:
        eqn: the equation that makes it.
        made_from: numbers of the values that it reads.
        callers: the calls that it is within, the outermost first.
    """

    eqn: Any
    made_from: tuple[int, ...]
    callers: tuple[Any, ...]

    @property
    def line(self) -> str:
        """The line of the user's code, or of a library's call in it."""
        lines = (line_of(each) for each in (self.eqn, *self.callers[::-1]))
        return next(filter(None, lines), "an unknown line")


class Terms:
    """Numbers of the values of several programs.

    Args:
        fold: whether what depends on no argument is computed, so that two tables with
            the same entries are one, however they are made.
    """

    def __init__(self, fold: bool = False):
        self.fold = fold
        self.constants: dict[int, np.ndarray] = {}
        self.terms: dict[int, Term] = {}
        self._numbers: dict[Hashable, int] = {}
        self._depth = 0
        self._callers: tuple[Any, ...] = ()

    def of(self, closed: Any) -> tuple[int, ...]:
        """Numbers of the results of a program whose k-th argument is the k-th of every
        other program."""
        given = [self._number(("argument", k)) for k in range(len(closed.in_avals))]
        return tuple(self._run(closed.jaxpr, closed.consts, given))

    def within(self, results: Sequence[int]) -> list[int]:
        """All values that these are made from, in the order of the program."""
        seen, ahead = set(), [*results]
        while ahead:
            number = ahead.pop()
            if number not in seen:
                seen.add(number)
                if number in self.terms:
                    ahead += self.terms[number].made_from
        return sorted(seen)

    def numbers(self, results: Sequence[int]) -> set[str]:
        """The numbers by which a program multiplies, shifts, or compares its data, to
        five digits."""
        found: set[str] = set()
        for number in self.within(results):
            term = self.terms.get(number)
            if term is None or number in self.constants:
                continue
            name = term.eqn.primitive.name
            if name == "integer_pow":
                found.add(str(term.eqn.params["y"]))
            for each in term.made_from:
                array = self.constants.get(each)
                if array is not None and (
                    np.issubdtype(array.dtype, np.inexact) or name in COMPARE
                ):
                    found |= {*map(self.name, np.unique(array))}
        return found

    @staticmethod
    def name(number: Any) -> str:
        """A number as `numbers` gives it."""
        return f"{complex(number):.5g}"

    def text(self, number: int) -> str:
        """What an equation computes, with the constants that it reads."""
        term = self.terms[number]
        read = [
            _shown(self.constants[each])
            for each in term.made_from
            if each in self.constants
        ]
        shapes = [str(out.aval) for out in term.eqn.outvars]
        return f"{term.eqn.primitive.name}({', '.join(read)}) -> {' '.join(shapes)}"

    # -------------------------------------------------------------------- numbering

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _constant(self, value: Any, dtype: Any = None) -> int:
        found = getattr(value, "dtype", None)
        if found is not None and jnp.issubdtype(found, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(value))
            return self._number(("key", str(found), data.shape, data.tobytes()))
        array = np.asarray(value, dtype)
        key = ("constant", str(array.dtype), array.shape, array.tobytes())
        number = self._number(key)
        self.constants[number] = array
        return number

    def _run(self, jaxpr: Any, constants: Sequence[Any], given: Sequence[int]):
        inside = [self._constant(each) for each in constants]
        names = [*jaxpr.constvars, *jaxpr.invars]
        known = dict(zip(names, [*inside, *given], strict=True))

        def of(atom):
            if isinstance(atom, jax.extend.core.Literal):
                return self._constant(atom.val, getattr(atom.aval, "dtype", None))
            return known[atom]

        callers = self._callers
        for eqn in jaxpr.eqns:
            self._callers = (*callers, eqn)
            results = self._equation(eqn, [of(atom) for atom in eqn.invars])
            known.update(zip(eqn.outvars, results, strict=True))
        self._callers = callers
        return [of(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, ins: list[int]) -> Sequence[int]:
        name = eqn.primitive.name
        if name in INLINED:
            return self._inside(_called(eqn), ins)
        if (
            self.fold
            and not eqn.effects
            and all(each in self.constants for each in ins)
        ):
            return self._folded(eqn, ins)
        if self.fold and is_nothing(eqn):
            # Zero, whatever it reads: a layer that has lost all units.
            kinds = [out.aval for out in eqn.outvars]
            return [self._constant(np.zeros(k.shape, k.dtype)) for k in kinds]
        read, key = self._key(eqn, ins)
        numbers = [self._number((key, at)) for at in range(len(eqn.outvars))]
        for number in numbers:
            self.terms.setdefault(number, Term(eqn, tuple(read), self._callers[:-1]))
        return numbers

    def _key(self, eqn: Any, ins: list[int]) -> tuple[list[int], Hashable]:
        """What an equation reads, and what it is."""
        name, params = eqn.primitive.name, eqn.params
        if eqn.effects:
            # It may give something else each time.
            return ins, (name, _Itself(eqn))
        if name == "scan":
            consts, carried = constants_and_carries(eqn)
            rows = ins[consts:]
            body = self._body(params["jaxpr"], ins[:consts], len(rows))
            key = (name, params["length"], params["reverse"], carried, tuple(body))
            return [*ins, *body], (*key, tuple(rows))
        if name == "while":
            tested = params["cond_nconsts"]
            turned = tested + params["body_nconsts"]
            count = len(ins) - turned
            test = self._body(params["cond_jaxpr"], ins[:tested], count)
            body = self._body(params["body_jaxpr"], ins[tested:turned], count)
            key = (name, tuple(test), tuple(body), tuple(ins[turned:]))
            return [*ins, *test, *body], key
        if name == "cond":
            branches = [self._inside(each, ins[1:]) for each in params["branches"]]
            within = [number for each in branches for number in each]
            index = self._unclamped(ins[0], len(branches) - 1)
            return [index, *within], (name, index, *map(tuple, branches))
        # Bound arguments of several bodies have one number, and types of their own.
        types = tuple(
            (getattr(out.aval, "shape", None), str(getattr(out.aval, "dtype", None)))
            for out in eqn.outvars
        )
        others = tuple(
            (key, self._parameter(value)) for key, value in sorted(params.items())
        )
        return ins, (name, others, types, tuple(ins))

    def _unclamped(self, index: int, last: int) -> int:
        """The index of a branch; clamping it to those that exist changes nothing."""
        term = self.terms.get(index)
        if term is None or term.eqn.primitive.name != "clamp":
            return index
        low, within, high = term.made_from
        bounds = [self.constants.get(each) for each in (low, high)]
        return within if bounds == [0, last] else index

    def _inside(self, closed: Any, given: Sequence[int]) -> list[int]:
        jaxpr = getattr(closed, "jaxpr", closed)
        return self._run(jaxpr, getattr(closed, "consts", ()), given)

    def _body(self, closed: Any, fixed: Sequence[int], count: int) -> list[int]:
        """A program that is run for many values of its last `count` arguments."""
        bound = [self._number(("bound", self._depth, k)) for k in range(count)]
        self._depth += 1
        results = self._inside(closed, [*fixed, *bound])
        self._depth -= 1
        return results

    def _folded(self, eqn: Any, ins: list[int]) -> list[int]:
        given = [jnp.asarray(self.constants[each]) for each in ins]
        with jax.ensure_compile_time_eval():
            return [self._constant(each) for each in bind(eqn, given)]

    def _parameter(self, value: Any) -> Hashable:
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            return ("program", *self._body(value, (), len(jaxpr.invars)))
        if isinstance(value, tuple | list):
            return tuple(self._parameter(each) for each in value)
        if isinstance(value, dict):
            return tuple((k, self._parameter(v)) for k, v in sorted(value.items()))
        if isinstance(value, np.ndarray | jax.Array):
            return ("array", self._constant(value))
        if isinstance(value, np.generic):
            value = value.item()
        try:
            hash(value)
        except TypeError:
            return _Itself(value)
        return (type(value), value)


class _Itself:
    """Equal only to the same object, which it keeps alive."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _called(eqn: Any) -> Any:
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return next(eqn.params[name] for name in names if name in eqn.params)


def _shown(array: np.ndarray) -> str:
    """A constant, of an array its first entries."""
    if array.size == 1:
        return str(array.ravel()[0])
    first = ", ".join(str(each) for each in array.ravel()[:3])
    return f"[{first}{', …' if array.size > 3 else ''}]"
