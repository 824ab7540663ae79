"""Types of axes: what the axes of a program's arrays have to do with one another.

A type is a variable, a product of types (the axis of 800 = 4 * 4 * 50 that a flatten
makes) or a sum of types (what a concatenation makes). Unifying two types makes them
one, as a type checker does. Where they agree only in part, more is made one than need
be: a coarser group of units is always right, a finer one is not. Where they can't
agree, what they are made of is frozen.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np


class Variable:
    """An axis, or a part or factor of one, of which nothing more is known.

    Unification makes variables one (`same`) or finds that one is composed (`is_now`).
    Its `reasons` say why its units can't be removed, if they can't: each once, and not
    more than `MOST_REASONS`. Parts that were cut from what is frozen share them.
    """

    __slots__ = ("is_now", "reasons", "same", "size")

    def __init__(self, size: int):
        self.size = size
        self.same: Variable | None = None
        self.is_now: Type | None = None
        self.reasons: list[str] = []

    @property
    def frozen(self) -> str | None:
        """The first reason why its units can't be removed, or None if they can."""
        return self.reasons[0] if self.reasons else None


MOST_REASONS = 8
"""Every layer may freeze a stream: of so many reasons the first tell enough."""


class Sum:
    """Parts, one after the other: `size` positions in all."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: tuple["Type", ...]):
        self.parts = parts
        self.size = sum(part.size for part in parts)


class Product:
    """Factors in row-major order, the last one runs fastest: `size` positions."""

    __slots__ = ("factors", "size")

    def __init__(self, factors: tuple["Type", ...]):
        self.factors = factors
        self.size = math.prod(factor.size for factor in factors)


Type = Variable | Sum | Product
ONE = Product(())


def fresh(size: int) -> Type:
    """A type for an axis of which nothing is known; an axis of one has no units."""
    return ONE if size == 1 else Variable(size)


def resolve(of: Type) -> Type:
    """The type with everything that is known of its variables put in: a variable, a sum
    of two or more that are no sums, or a product of none, two or more that are none.

    A type of which nothing more is known than it says is given back as it is.
    """
    if isinstance(of, Variable):
        last = of if of.same is None else _last(of)
        if last.is_now is None:
            return last
        last.is_now = resolve(last.is_now)  # so that it is put together once
        return last.is_now
    kind = type(of)
    found: list[Type] = []
    # Sums in sums are nested as deep as a program is long: they are walked through. A
    # sum in a product in a sum is at most half as large, so that calls are few.
    waiting: list[Type] = [*reversed(parts(of))]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Variable):
            part = _last(part)
            if part.is_now is None:
                found.append(part)
            else:
                waiting.append(part.is_now)
        elif isinstance(part, kind):
            waiting.extend(reversed(parts(part)))
        else:
            part = resolve(part)
            (waiting if isinstance(part, kind) else found).append(part)
    if len(found) == 1:
        return found[0]
    before = parts(of)
    if len(found) == len(before) and all(map(operator.is_, found, before)):
        return of
    return kind(tuple(found))


def _last(of: Variable) -> Variable:
    """The variable that this one was made one with."""
    last = of
    while last.same is not None:
        last = last.same
    while of.same is not None:  # so that long chains are followed once
        of.same, of = last, of.same
    return last


def variables(of: Type) -> Iterator[Variable]:
    """Every variable in a type, once for each time that it occurs."""
    waiting = [resolve(of)]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Variable):
            yield part
        else:
            waiting.extend(reversed(parts(part)))


def freeze(of: Type, *reasons: str) -> None:
    """Marks all that a type is made of as not removable."""
    for variable in variables(of):
        known = variable.reasons
        for why in reasons:
            if len(known) < MOST_REASONS and why not in known:
                known.append(why)


def unify(a: Type, b: Type, why: str) -> None:
    """Makes two types of the same size one; `why` is said where they can't be.

    What is frozen need not be known any closer: what it meets is frozen too, and the
    parts of the one are not looked for in the other.
    """
    pairs = [(a, b)]
    while pairs:
        pairs.extend(reversed(_unified(*pairs.pop(), why)))


Pairs = list[tuple[Type, Type]]


def _unified(a: Type, b: Type, why: str) -> Pairs:
    """Makes two types one but for parts of them, which are left to be made one."""
    if a is b:
        return []
    a, b = resolve(a), resolve(b)
    if a is b or a.size == 1:
        return []
    if isinstance(a, Variable):
        _bind(a, b, why)
        return []
    if isinstance(b, Variable):
        _bind(b, a, why)
        return []
    if isinstance(a, Sum):
        if isinstance(b, Sum):
            return _unify_sums(a, b, why)
        return _unify_sum_with_product(a, b, why)
    if isinstance(b, Sum):
        return _unify_sum_with_product(b, a, why)
    return _unify_products(a, b, why)


def _bind(a: Variable, b: Type, why: str) -> None:
    if isinstance(b, Variable):
        freeze(b, *a.reasons)
        a.same = b
    elif a.frozen:
        freeze(b, *a.reasons)
    elif a in variables(b):
        freeze(b, why)
    else:
        a.is_now = b


def _conflict(a: Type, b: Type, why: str) -> Pairs:
    why = f"{why}: its parts do not line up"
    freeze(a, why)
    freeze(b, why)
    return []


class _Row:
    """The parts of a type that are still to be met, from the first to the last."""

    def __init__(self, of: Type):
        self.waiting = [of]

    def take(self) -> Type | None:
        """The next part that has positions and is no sum, as it is known by now."""
        while self.waiting:
            part = resolve(self.waiting.pop())
            if isinstance(part, Sum):
                self.waiting.extend(reversed(part.parts))
            elif part.size:
                return part
        return None

    def take_up_to(self, size: int) -> list[Type] | None:
        """The next parts, `size` positions together: the last of them is cut, and what
        is left of it is the next. None if it can't be cut there."""
        taken: list[Type] = []
        while size and (part := self.take()) is not None:
            if part.size > size:
                both = split(part, [size, part.size - size])
                if both is None:
                    return None
                part, rest = both
                self.waiting.append(rest)
            taken.append(part)
            size -= part.size
        return taken

    def covering(self, size: int) -> list[Type]:
        """The next parts, of at least `size` positions, which are not taken."""
        taken: list[Type] = []
        while size > 0 and (part := self.take()) is not None:
            taken.append(part)
            size -= part.size
        self.waiting.extend(reversed(taken))
        return taken


def _unify_sums(a: Sum, b: Sum, why: str) -> Pairs:
    """Walks along both: a part is one with the run of parts that lies beside it."""
    pairs: Pairs = []
    rows = _Row(a), _Row(b)
    while (x := rows[0].take()) and (y := rows[1].take()):
        if x.size == y.size:
            pairs.append((x, y))
            continue
        long, row = (x, rows[1]) if x.size > y.size else (y, rows[0])
        row.waiting.append(y if long is x else x)
        beside = row.covering(long.size)
        if not _moving(long).isdisjoint(variables(Sum(tuple(beside)))):
            # To cut it would cut the same beside it, at another place, and so on.
            freeze(Sum((long, *beside)), f"{why}: it meets its own shift")
        run = row.take_up_to(long.size)
        cuts = None if run is None else _beside(long, run)
        if cuts is None:
            rest = [part for each in rows for part in each.waiting]
            return [*pairs, *_conflict(long, Sum((*beside, *rest)), why)]
        pairs += cuts
    return pairs


def _moving(of: Type) -> set[Variable]:
    """The variables of a type that are cut where it is cut."""
    of = resolve(of)
    return set(variables(of.factors[0] if isinstance(of, Product) else of))


def _beside(of: Type, run: list[Type]) -> Pairs | None:
    """A variable or product is one with a run of parts; None if it has no such parts.

    The variable is one with all of them at once, for its parts are of no use.
    """
    if isinstance(of := resolve(of), Product):
        cut = split(of, [part.size for part in run])
        return None if cut is None else [*zip(cut, run, strict=True)]
    return [(of, Sum(tuple(run)))]


def _unify_products(a: Product, b: Product, why: str) -> Pairs:
    size = math.gcd(a.factors[-1].size, b.factors[-1].size)
    if size not in (a.factors[-1].size, b.factors[-1].size):
        return _conflict(a, b, why)
    pairs: Pairs = []
    ends: list[tuple[Type, Type]] = []
    for of in (a, b):
        *outer, last = of.factors
        if last.size != size:
            high, low = fresh(last.size // size), fresh(size)
            pairs.append((last, Product((high, low))))
            outer, last = [*outer, high], low
        ends.append((Product(tuple(outer)), last))
    (outer_a, last_a), (outer_b, last_b) = ends
    return [*pairs, (last_a, last_b), (outer_a, outer_b)]


def _unify_sum_with_product(total: Sum, product: Product, why: str) -> Pairs:
    """A product whose first factor is n is n times the rest, one after the other."""
    first, rest = product.factors[0], Product(product.factors[1:])
    counts = f"{why}: one factor of a product that meets a concatenation"
    pairs: Pairs = []
    row = _Row(total)
    while (part := row.take()) is not None:
        row.waiting.append(part)
        # A long part stays as it is, so that it is not cut up into all these times.
        times = max(part.size // rest.size, 1)
        taken = row.take_up_to(times * rest.size)
        if taken is None:
            return _conflict(product, total, why)
        if isinstance(part, Product) and times > 1:
            count = fresh(times)
            freeze(count, counts)
            pairs.append((taken[0], Product((count, rest))))
        else:
            pairs.append((Sum(tuple(taken)), Sum((rest,) * times)))
    freeze(first, counts)
    return pairs


def split(of: Type, sizes: Sequence[int]) -> list[Type] | None:
    """A type cut into consecutive parts, or None if it can't be cut there."""
    of = resolve(of)
    if len(sizes) == 1:
        return [of]
    if isinstance(of, Variable):
        return _parts(of, sizes)
    if isinstance(of, Product):
        first, rest = of.factors[0], of.factors[1:]
        inner = math.prod(factor.size for factor in rest)
        if not inner or any(size % inner for size in sizes):
            return None
        cut = split(first, [size // inner for size in sizes])
        return None if cut is None else [Product((part, *rest)) for part in cut]
    row, found = _Row(of), []
    for size in sizes:
        taken = row.take_up_to(size)
        if taken is None:
            return None
        found.append(Sum(tuple(taken)))
    return found


def _parts(of: Variable, sizes: Sequence[int]) -> list[Type]:
    """A variable's parts. What is frozen has other ones at each cut, which are frozen:
    of what stays, nobody asks what it is made of."""
    parts = [fresh(size) for size in sizes]
    if of.frozen:
        for part in variables(Sum(tuple(parts))):
            part.reasons = of.reasons
    else:
        of.is_now = Sum(tuple(parts))
    return parts


def unit_of(of: Type, variable: Variable) -> np.ndarray:
    """For each position of an axis the unit of `variable` that it belongs to, or -1."""
    of = resolve(of)
    if of is variable:
        return np.arange(variable.size)
    if isinstance(of, Variable):
        return np.full(of.size, -1)
    if isinstance(of, Sum):
        units, at = np.full(of.size, -1), 0
        for part in of.parts:
            if part is variable or isinstance(part, Product):
                units[at : at + part.size] = unit_of(part, variable)
            at += part.size
        return units
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


def meeting_themselves(of: Type) -> list[Variable]:
    """The variables that occur in two factors of one product: their units have no
    positions of their own there."""
    found: dict[Variable, None] = {}
    _meet(of, found)
    return [*found]


def _meet(of: Type, found: dict[Variable, None]) -> dict[Variable, None]:
    """The variables of a type, after those that meet themselves are among `found`."""
    of = resolve(of)
    if isinstance(of, Variable):
        return {of: None}
    seen: dict[Variable, None] = {}
    for part in parts(of):
        inside = _meet(part, found)
        if isinstance(of, Product):
            found.update((variable, None) for variable in inside if variable in seen)
        seen.update(inside)
    return seen
