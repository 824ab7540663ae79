"""Types of axes: what the axes of a program's arrays have to do with one another.

A type is a variable, a product of types (the axis of 800 = 4 * 4 * 50 that a flatten
makes) or a sum of types (what a concatenation makes). Unifying two types makes them
one, as a type checker does. Where they agree only in part, more is made one than need
be: a coarser group of units is always right, a finer one is not. Where they can't
agree, what they are made of is frozen.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class Variable:
    """An axis, or a part or factor of one, of which nothing more is known.

    Unification makes variables one (`same`) or finds that one is composed (`is_now`).
    """

    __slots__ = ("frozen", "is_now", "same", "size")

    def __init__(self, size: int):
        self.size = size
        self.same: Variable | None = None
        self.is_now: Type | None = None
        self.frozen: str | None = None


@dataclass(frozen=True, eq=False)
class Sum:
    """Parts, one after the other."""

    parts: tuple["Type", ...]

    @property
    def size(self) -> int:
        """Number of positions."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True, eq=False)
class Product:
    """Factors in row-major order: the last one runs fastest."""

    factors: tuple["Type", ...]

    @property
    def size(self) -> int:
        """Number of positions."""
        return math.prod(factor.size for factor in self.factors)


Type = Variable | Sum | Product
ONE = Product(())


def fresh(size: int) -> Type:
    """A type for an axis of which nothing is known; an axis of one has no units."""
    return ONE if size == 1 else Variable(size)


def resolve(of: Type) -> Type:
    """The type with everything that is known of its variables put in: a variable, a sum
    of two or more that are no sums, or a product of none, two or more that are none."""
    if isinstance(of, Variable):
        last = of
        while last.same is not None:
            last = last.same
        while of.same is not None:  # so that long chains are followed once
            of.same, of = last, of.same
        return last if last.is_now is None else resolve(last.is_now)
    if isinstance(of, Sum):
        parts = [
            each
            for part in map(resolve, of.parts)
            for each in (part.parts if isinstance(part, Sum) else (part,))
        ]
        return parts[0] if len(parts) == 1 else Sum(tuple(parts))
    factors = [
        each
        for factor in map(resolve, of.factors)
        for each in (factor.factors if isinstance(factor, Product) else (factor,))
    ]
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def variables(of: Type) -> Iterator[Variable]:
    """Every variable in a type, once for each time that it occurs."""
    of = resolve(of)
    if isinstance(of, Variable):
        yield of
    else:
        for inner in parts(of):
            yield from variables(inner)


def freeze(of: Type, why: str) -> None:
    """Marks all that a type is made of as not removable."""
    for variable in variables(of):
        variable.frozen = variable.frozen or why


def unify(a: Type, b: Type, why: str) -> None:
    """Makes two types of the same size one; `why` is said where they can't be."""
    a, b = resolve(a), resolve(b)
    if a is b or a.size == 1:
        return
    if isinstance(b, Variable) and not isinstance(a, Variable):
        a, b = b, a
    if isinstance(a, Variable):
        if a in variables(b):
            freeze(b, why)
        elif isinstance(b, Variable):
            a.same, b.frozen = b, b.frozen or a.frozen
        else:
            a.is_now = b
            if a.frozen:
                freeze(b, a.frozen)
    elif isinstance(a, Sum) and isinstance(b, Sum):
        _unify_sums(a, b, why)
    elif isinstance(a, Product) and isinstance(b, Product):
        _unify_products(a, b, why)
    elif isinstance(a, Product) and isinstance(b, Sum):
        _unify_product_with_sum(a, b, why)
    elif isinstance(a, Sum) and isinstance(b, Product):
        _unify_product_with_sum(b, a, why)


def _conflict(a: Type, b: Type, why: str) -> None:
    why = f"{why}: its parts do not line up"
    freeze(a, why)
    freeze(b, why)


def _unify_sums(a: Sum, b: Sum, why: str) -> None:
    size = min(a.parts[0].size, b.parts[0].size)
    first, second = split(a, [size, a.size - size]), split(b, [size, b.size - size])
    if first is None or second is None:
        _conflict(a, b, why)
        return
    for x, y in zip(first, second, strict=True):
        unify(x, y, why)


def _unify_products(a: Product, b: Product, why: str) -> None:
    size = math.gcd(a.factors[-1].size, b.factors[-1].size)
    if size not in (a.factors[-1].size, b.factors[-1].size):
        _conflict(a, b, why)
        return
    pairs = []
    for of in (a, b):
        *outer, last = of.factors
        if last.size != size:
            high, low = fresh(last.size // size), fresh(size)
            unify(last, Product((high, low)), why)
            outer, last = [*outer, high], low
        pairs.append((Product(tuple(outer)), last))
    (outer_a, last_a), (outer_b, last_b) = pairs
    unify(last_a, last_b, why)
    unify(outer_a, outer_b, why)


def _unify_product_with_sum(product: Product, total: Sum, why: str) -> None:
    """A product whose first factor is n is n times the rest, one after the other."""
    first, rest = product.factors[0], Product(product.factors[1:])
    chunks = split(total, [rest.size] * first.size)
    if chunks is None:
        _conflict(product, total, why)
        return
    freeze(first, f"{why}: one factor of a product that meets a concatenation")
    for chunk in chunks:
        unify(chunk, rest, why)


def split(of: Type, sizes: Sequence[int]) -> list[Type] | None:
    """A type cut into consecutive parts, or None if it can't be cut there."""
    of, parts = resolve(of), []
    for size in sizes[:-1]:
        both = _cut(of, size)
        if both is None:
            return None
        part, of = both
        parts.append(part)
    return [*parts, of]


def _cut(of: Type, size: int) -> tuple[Type, Type] | None:
    of = resolve(of)
    if isinstance(of, Variable):
        both = fresh(size), fresh(of.size - size)
        of.is_now = Sum(both)
        if of.frozen:
            freeze(of.is_now, of.frozen)
        return both
    if isinstance(of, Product):
        first, rest = of.factors[0], of.factors[1:]
        inner = math.prod(factor.size for factor in rest)
        both = None if size % inner else _cut(first, size // inner)
        if both is None:
            return None
        return Product((both[0], *rest)), Product((both[1], *rest))
    before: list[Type] = []
    for at, part in enumerate(of.parts):
        if size < part.size:
            if size == 0:
                return Sum(tuple(before)), Sum(of.parts[at:])
            both = _cut(part, size)
            if both is None:
                return None
            return Sum((*before, both[0])), Sum((both[1], *of.parts[at + 1 :]))
        before.append(part)
        size -= part.size
    return Sum(tuple(before)), Sum(())


def unit_of(of: Type, variable: Variable) -> np.ndarray:
    """For each position of an axis the unit of `variable` that it belongs to, or -1."""
    of = resolve(of)
    if of is variable:
        return np.arange(variable.size)
    if isinstance(of, Variable):
        return np.full(of.size, -1)
    if isinstance(of, Sum):
        found = [unit_of(part, variable) for part in of.parts]
        return np.concatenate([np.zeros(0, int), *found])
    sizes = [factor.size for factor in of.factors]
    found = np.full(sizes, -1)
    for at, factor in enumerate(of.factors):
        along = unit_of(factor, variable).reshape([-1] + [1] * (len(sizes) - at - 1))
        found = np.maximum(found, along)
    return found.ravel()


def positions(of: Type, kept: Callable[[Variable], np.ndarray]) -> np.ndarray:
    """For each position of an axis whether it is left: where all its units are.

    `kept` gives a boolean vector for a variable.
    """
    of = resolve(of)
    if isinstance(of, Variable):
        return kept(of)
    if isinstance(of, Sum):
        flags = [positions(part, kept) for part in of.parts]
        return np.concatenate([np.zeros(0, bool), *flags])
    flags = np.ones(1, bool)
    for factor in of.factors:
        flags = np.outer(flags, positions(factor, kept)).ravel()
    return flags


def size(of: Type, left: Callable[[Variable], Any]) -> Any:
    """The size of an axis whose variables have the sizes `left`: a number, or what
    stands for one while JAX exports a program for batches of any size."""
    of = resolve(of)
    if isinstance(of, Variable):
        return left(of)
    sizes = [size(each, left) for each in parts(of)]
    return sum(sizes) if isinstance(of, Sum) else math.prod(sizes)


def parts(of: Sum | Product) -> tuple[Type, ...]:
    """What a type is made of."""
    return of.parts if isinstance(of, Sum) else of.factors


def meets_itself(of: Type, variable: Variable) -> bool:
    """Whether a variable occurs in two factors of one product: its units then have no
    positions of their own."""
    of = resolve(of)
    if isinstance(of, Variable):
        return False
    with_it = [part for part in parts(of) if variable in variables(part)]
    if isinstance(of, Product) and len(with_it) > 1:
        return True
    return any(meets_itself(part, variable) for part in with_it)
