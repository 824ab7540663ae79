"""Programs that were traced for any size, seen at numbers.

While JAX exports a function for inputs of any size, sizes are expressions of symbols.
Rules divide and compare sizes. So they see each equation as it is where the symbols are
large primes, which equal and divide no other size of the program.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend

Numbers = Mapping[str, int]
"""What stands for each symbol."""

PRIMES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079)

SIGNS: dict[type, Callable[[int], int]] = {ast.USub: operator.neg}
OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
}
FUNCTIONS: dict[str, Callable[[int, int], int]] = {
    "mod": operator.mod,
    "floordiv": operator.floordiv,
    "max": max,
    "min": min,
}
"""In what JAX writes for a size, beside sums, products and powers."""


def is_symbolic(size: Any) -> bool:
    """Whether a size is an expression of symbols."""
    return jax.export.is_symbolic_dim(size)


def numbers_for(shapes: Iterable[Sequence[Any]]) -> dict[str, int]:
    """Numbers that stand for the symbols in some shapes.

    Raises:
        ValueError: if there are more symbols than numbers.
    """
    symbols: dict[str, None] = {}
    for size in (size for shape in shapes for size in shape if is_symbolic(size)):
        names = re.findall(r"[A-Za-z_]\w*", str(size))
        symbols |= dict.fromkeys(name for name in names if name not in FUNCTIONS)
    if len(symbols) > len(PRIMES):
        raise ValueError(
            f"inputs have {len(symbols)} sizes that may vary ({', '.join(symbols)}); "
            f"at most {len(PRIMES)} may"
        )
    return dict(zip(symbols, PRIMES, strict=False))


def number(size: Any, numbers: Numbers) -> Any:
    """What a size is where the symbols are numbers; anything else as it is."""
    if is_symbolic(size):
        # (In a grammar that `jax.export.symbolic_shape` reads too.)
        return _value(
            ast.parse(str(size).replace("^", "**"), mode="eval").body, numbers
        )
    if type(size) in (tuple, list):
        return type(size)(number(each, numbers) for each in size)
    return size


def _value(node: Any, numbers: Numbers) -> int:
    if isinstance(node, ast.Constant):
        return int(str(node.value))
    if isinstance(node, ast.Name):
        return numbers[node.id]
    if isinstance(node, ast.UnaryOp):
        return SIGNS[type(node.op)](_value(node.operand, numbers))
    if isinstance(node, ast.BinOp):
        both = _value(node.left, numbers), _value(node.right, numbers)
        return OPERATORS[type(node.op)](*both)
    given = [_value(each, numbers) for each in node.args]
    return FUNCTIONS[node.func.id](*given)


@dataclass(frozen=True)
class Atom:
    """A variable of an equation, of which rules ask shape and dtype."""

    aval: jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Seen:
    """An equation where the symbols are numbers."""

    eqn: Any
    params: dict[str, Any]
    invars: list[Any]
    outvars: list[Any]

    @property
    def primitive(self) -> Any:
        """What the equation computes."""
        return self.eqn.primitive


def seen(eqn: Any, numbers: Numbers) -> Any:
    """An equation as rules see it."""
    if not numbers:
        return eqn

    def at(atom):
        shape = getattr(atom.aval, "shape", None)
        literal = isinstance(atom, jax.extend.core.Literal)
        if literal or shape is None or not any(map(is_symbolic, shape)):
            return atom
        return Atom(jax.ShapeDtypeStruct(number(shape, numbers), atom.aval.dtype))

    return Seen(
        eqn,
        {name: number(value, numbers) for name, value in eqn.params.items()},
        [at(atom) for atom in eqn.invars],
        [at(atom) for atom in eqn.outvars],
    )
