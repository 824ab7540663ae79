"""Budgets: how much of a network may be left when it has been trained."""

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax

from l0jax import constraints, costs, objectives
from l0jax.constraints import Amounts, Constraint, Number
from l0jax.costs import Cost
from l0jax.structure import Structure
from l0jax.units import Certain, Groups, Keep

Density = Literal["density"]

DECIDED = "decided"
"""How a target is enforced that nothing pushes to in training."""

Sizes = Mapping[str, np.ndarray]
"""|g| of each unit, the number of weights that it pays for."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What may be left of a network, instead of a price for what is there.

    Args:
        cost: of what: a function of `l0jax.costs`, or "density", the share of the
            weights that the gates multiply, whatever else goes with them.
        share: of the whole network's, in (0, 1]; of a density also one for each group.
        warm_up: steps over which the target falls from 1 to `share`.
        how: by which of `constraints.CONSTRAINTS` it is enforced; "quadratic" ends at
            the target, the others at it or below. "decided": by the rule "budget" at
            test time alone, while in training a price is paid, or nothing.
        rate: of gradient ascent, for the multipliers.
        restart: of "lagrangian": a multiplier is set to 0 where its constraint holds.

    Raises:
        ValueError: for a share outside (0, 1], a negative warm-up, a rate that isn't
            positive, or a constraint that there is not.
    """

    cost: Cost | Density
    share: Number | Mapping[str, Number]
    warm_up: int = 0
    how: str = "quadratic"
    rate: Number = 5e-3
    restart: bool = True

    def __post_init__(self):
        if self.how not in (*constraints.CONSTRAINTS, DECIDED):
            raise ValueError(
                f"unknown constraint {self.how!r}; there is "
                f"{', '.join((*constraints.CONSTRAINTS, DECIDED))}"
            )
        shares = self.share
        if not isinstance(shares, Mapping):
            shares = {self.name: shares}
        for name, share in shares.items():
            # (A member's target in a sweep is traced, and has no value to check.)
            if not isinstance(share, jax.core.Tracer) and not 0 < share <= 1:
                raise ValueError(
                    f"the target of {name!r} must lie in (0, 1], got {share}"
                )
        if self.warm_up < 0:
            raise ValueError(f"warm_up must be at least 0 steps, got {self.warm_up}")
        if not isinstance(self.rate, jax.core.Tracer) and not self.rate > 0:
            raise ValueError(f"rate must be > 0, got {self.rate}")
        if isinstance(self.share, Mapping) and self.cost != "density":
            raise ValueError(
                f"each group has a target of its own, but {self.name} is a cost of the "
                'whole network; give one number, or "density"'
            )

    @property
    def pushes(self) -> bool:
        """Whether anything is done for it in training."""
        return self.how != DECIDED

    @property
    def counts(self) -> bool:
        """Whether it is of a cost of `l0jax.costs`, or of each group's own units."""
        return self.cost != "density" or isinstance(self.share, Mapping)

    @property
    def name(self) -> str:
        """Of the cost."""
        return self.cost if isinstance(self.cost, str) else self.cost.__name__

    @property
    def key(self) -> Any:
        """Hashable, and equal for equal targets."""
        share = self.share
        if isinstance(share, Mapping):
            share = tuple(share.items())
        return self.cost, share, self.warm_up, self.how, self.rate, self.restart


@dataclasses.dataclass(frozen=True, eq=False)
class Budget:
    """A target, and the network of which it is a share.

    Args:
        target: what may be left.
        whole: the network's structure before anything was taken out.
        sizes: |g| of each of its gated units, for a density.
    """

    target: Target
    whole: Structure
    sizes: Sizes

    @functools.cached_property
    def all_of(self) -> float:
        """The cost of the whole network."""
        assert not isinstance(self.target.cost, str)
        return counted(self.whole, {}, self.target.cost)

    def amounts(self, structure: Structure, gated: Iterable[str]) -> Amounts:
        """What is left in expectation of a network as it is trained, as shares of the
        whole."""
        target = self.target
        if not isinstance(target.cost, str):
            return constraints.share(structure, target.cost, self.all_of, gated)
        # A unit pays for as many weights as at first, whatever else is gone by now.
        return constraints.density(
            {name: float(np.mean(each)) for name, each in self.sizes.items()},
            {name: float(np.sum(each)) for name, each in self.sizes.items()},
            per_group=isinstance(target.share, Mapping),
        )

    def constraint(self, amounts: Amounts) -> Constraint | None:
        """What is added to the loss, and its multipliers, if anything is."""
        target = self.target
        if not target.pushes:
            constraints.quadratic(amounts, target.share)  # Refuses what can't be met.
            return None
        named: dict[str, Any] = {"warm_up": target.warm_up}
        if target.how == "lagrangian":
            named["restart"] = target.restart
        make = constraints.CONSTRAINTS[target.how]
        return make(amounts, target.share, optimizer=optax.sgd(target.rate), **named)

    def left(self, keep: Keep, structure: Structure) -> dict[str, float]:
        """What is left of a network as it is trained if only such units are kept, as
        shares of the whole, counted exactly."""
        target = self.target
        if not isinstance(target.cost, str):
            return {target.name: counted(structure, keep, target.cost) / self.all_of}
        one = {name: float(np.mean(each)) for name, each in self.sizes.items()}
        now = {name: one[name] * float(np.sum(keep[name])) for name in one}
        total = {name: float(np.sum(each)) for name, each in self.sizes.items()}
        if isinstance(target.share, Mapping):
            return {name: now[name] / total[name] for name in now}
        return {"density": sum(now.values()) / sum(total.values())}

    def share(self, name: str) -> float:
        """What may be left of a cost, or of a group."""
        share = self.target.share
        return float(share[name] if isinstance(share, Mapping) else share)

    def fits(self, left: Mapping[str, float]) -> bool:
        """Whether shares, as `left` gives them, are within the target."""
        return all(now <= self.share(n) * (1 + 1e-9) for n, now in left.items())

    def excess(self, left: Mapping[str, float]) -> dict[str, float]:
        """By which part of the target there is more than that: 0.05 is 5 % too much."""
        return {name: now / self.share(name) - 1 for name, now in left.items()}


def fill(
    order: Sequence[tuple[str, int]],
    start: Mapping[str, np.ndarray],
    fits: Callable[[Keep], bool],
    unlike: Container[str] = (),
) -> dict[str, np.ndarray]:
    """The units that are wanted most, as many as fit into a budget.

    That is as many of the first of them as fit; then each later one that still does, as
    of a group whose units cost less.

    Args:
        order: units, `(group, number)`, those that are wanted most first.
        start: of each group of the order, units that are kept whether they fit or not.
        fits: whether a choice is within the budget; of more units no more fit.
        unlike: groups whose units differ in what they cost, as whole layers do.

    Returns:
        Flags of the units of each group.
    """

    def first(count: int) -> dict[str, np.ndarray]:
        keep = {name: np.array(flags, bool) for name, flags in start.items()}
        for name, at in order[:count]:
            keep[name][at] = True
        return keep

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(first(middle)) else (low, middle - 1)
    keep, full = first(low), set[str]()
    for name, at in order[low:]:
        # Units of a group cost the same: where one doesn't fit, none does.
        if name in full:
            continue
        keep[name][at] = True
        if not fits(keep):
            keep[name][at] = False
            if name not in unlike:
                full.add(name)
            if len(full) == len(start):
                break
    return keep


def counted(structure: Structure, keep: Keep, cost: Cost) -> float:
    """A cost of what is left, in whole numbers where it is one of `costs.COSTS`."""
    if cost in costs.COSTS.values():
        return float(costs.exact(structure, keep, cost))
    flags = Certain({n: np.asarray(k, np.float64) for n, k in keep.items()})
    return float(cost(structure, flags))


def sizes_of(
    params: Any, groups: Groups, charges: objectives.Charges
) -> dict[str, np.ndarray]:
    """|g| of each unit."""
    found = objectives.sizes(params, groups, charges)
    return {name: np.asarray(each) for name, each in found.items()}
