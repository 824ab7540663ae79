"""Sums of products of group sizes, and what is expected of them.

A `Polynomial` such as `{("conv1", "conv2"): 25, (): 10}` is 25 times the size of conv1
times that of conv2, plus 10.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from l0jax.units import Amount, Certain, Groups, Probabilities

Polynomial = Mapping[tuple[str, ...], int]


def product(factors: Iterable[Polynomial]) -> dict:
    """The product of polynomials."""
    result: dict[tuple[str, ...], int] = {(): 1}
    for factor in factors:
        longer: dict[tuple[str, ...], int] = {}
        for (a, x), (b, y) in itertools.product(result.items(), factor.items()):
            names = tuple(sorted((*a, *b))) if a and b else a or b
            longer[names] = longer.get(names, 0) + x * y
        result = longer
    return result


def substitute(of: Polynomial, sizes: Mapping[str, Polynomial]) -> dict:
    """A polynomial with others in the place of some sizes."""
    total: Counter = Counter()
    for names, times in of.items():
        for term, number in product(sizes.get(n, {(n,): 1}) for n in names).items():
            total[term] += times * number
    return dict(total)


def expected(of: Polynomial, groups: Groups, prob_active: Probabilities) -> Amount:
    """The expectation of a sum of products of group sizes, under independent gates."""
    if isinstance(prob_active, Certain):
        return sum(
            times * math.prod(_open(name, groups, prob_active) for name in names)
            for names, times in of.items()
        )
    total = jnp.zeros(())
    for names, times in of.items():
        term = jnp.full((), float(times))
        for name, power in Counter(names).items():
            if name in prob_active:
                term = term * _moment(jnp.asarray(prob_active[name]), power)
            else:
                term = term * float(groups[name].size) ** power
        total = total + term
    return total


def _open(name: str, groups: Groups, certain: Certain) -> int:
    if name in certain:
        return int(np.count_nonzero(certain[name]))
    return groups[name].size


def _moment(prob_active: Float[Array, " units"], power: int) -> Float[Array, ""]:
    """E[n^power] of the number n of open gates, from its cumulants."""
    p = prob_active
    cumulants = [
        jnp.polyval(jnp.asarray(coefficients, p.dtype), p).sum()
        for coefficients in _bernoulli_cumulants(power)
    ]
    moments = [jnp.ones(())]
    for k in range(1, power + 1):
        terms = (
            math.comb(k - 1, j - 1) * cumulants[j - 1] * moments[k - j]
            for j in range(1, k + 1)
        )
        moments.append(sum(terms, start=jnp.zeros(())))
    return moments[power]


@functools.cache
def _bernoulli_cumulants(count: int) -> list[tuple[float, ...]]:
    """Coefficients of the cumulants as polynomials in p: κ' = p (1 - p) dκ/dp."""
    spread, cumulant = np.poly1d([-1, 1, 0]), np.poly1d([1, 0])
    found = []
    for _ in range(count):
        found.append(tuple(map(float, cumulant.coeffs)))
        cumulant = spread * cumulant.deriv()
    return found
