r"""How much of a network may be left: constraints instead of a guessed $\lambda$.

A constraint asks for the least loss among the networks of which no more is left than a
target says, in expectation (Gallego-Posada et al. 2022):

$$ \min_\theta \; \text{loss}(\theta) \quad \text{subject to} \quad
   a_i(\theta) = \frac{E[\text{cost}_i]}{\text{cost}_i \text{ of the whole}} \le t_i. $$

Its multipliers are trained beside the weights: the weights descend on the loss plus
multiplier times excess, the multipliers ascend. The excess is relative, $e_i = a_i /
t_i - 1$ (the paper's is $a_i - t_i$), so that one rate serves for small targets and for
large ones.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from l0jax.costs import Cost
from l0jax.structure import Structure

Number = float | Float[Array, ""]
"""It may be traced: a member's in a sweep."""

Scalars = dict[str, Float[Array, ""]]


class Amounts(NamedTuple):
    """Expected costs as shares of the whole network's.

    Attributes:
        of: `(params, P(z != 0) of each unit) -> {name: share}`.
        least: the shares that are left with no unit at all.
    """

    of: Callable[[PyTree, Mapping[str, Float[Array, " units"]]], Scalars]
    least: Mapping[str, float]


def density(
    sizes: Mapping[str, Float[Array, " units"] | float],
    whole: Mapping[str, float] | None = None,
    *,
    per_group: bool = False,
) -> Amounts:
    """The share of gated weights that is expected to be left, called "density"; or of
    each group's, called as the group.

    Unlike the weights that removal leaves (`share` of `costs.weights`), it counts a
    unit's weights whether or not what they lead to is left.

    Args:
        sizes: |g| of each group's units, as counted by `objectives.sizes`.
        whole: of each group, the number of weights that is all; by default the sum of
            `sizes`. A network that was made smaller gives the number it had.
        per_group: one share for each group.
    """
    if whole is None:
        whole = {name: float(jnp.sum(jnp.asarray(n))) for name, n in sizes.items()}

    def of(params, prob_active) -> Scalars:
        del params
        left = {name: (n * prob_active[name]).sum() for name, n in sizes.items()}
        if per_group:
            return {name: left[name] / whole[name] for name in sizes}
        return {"density": _sum(left.values()) / sum(whole.values())}

    return Amounts(of, dict.fromkeys(sizes if per_group else ("density",), 0.0))


def share(
    structure: Structure,
    cost: Cost,
    whole: float | None = None,
    gated: Iterable[str] | None = None,
) -> Amounts:
    """An expected cost of `l0jax.costs` as a share of the whole network's, called as
    the cost.

    Args:
        structure: of the network as it is trained.
        cost: parameters, multiply-accumulates, bytes, seconds…
        whole: the cost that is all; by default that of `structure`. A network that was
            made smaller gives the one it had.
        gated: names of the groups that have gates; by default all.
    """
    # A member of a sweep is made while the sweep is traced, and these are numbers.
    with jax.ensure_compile_time_eval():
        whole = float(cost(structure, {})) if whole is None else whole
        names = structure.groups if gated is None else gated
        closed = {name: jnp.zeros(structure.groups[name].size) for name in names}
        least = float(cost(structure, closed)) / whole
    name = cost.__name__

    def of(params, prob_active):
        del params  # The structure knows their shapes.
        return {name: jnp.asarray(cost(structure, prob_active)) / whole}

    return Amounts(of, {name: least})


class Dual(NamedTuple):
    """What a constraint trains: a pytree, and what its optimiser keeps."""

    multipliers: PyTree
    opt_state: optax.OptState


class Constraint(NamedTuple):
    """Amounts that must not exceed their targets, and how that is enforced.

    Attributes:
        excess: `(params, P(z != 0), step) -> {name: amount / target - 1}`.
        init: `() -> Dual`.
        term: `(dual, excess) -> scalar`, what is added to the loss.
        ascend: `(dual, excess) -> Dual`, after a step.
        strength: `(dual) -> {name: how hard the constraint pushes}`, to be logged.
    """

    excess: Callable[[PyTree, Mapping[str, Array], Int[Array, ""]], Scalars]
    init: Callable[[], Dual]
    term: Callable[[Dual, Scalars], Float[Array, ""]]
    ascend: Callable[[Dual, Scalars], Dual]
    strength: Callable[[Dual], Scalars]


def lagrangian(
    amounts: Amounts,
    target: Number | Mapping[str, Number],
    *,
    optimizer: optax.GradientTransformation | None = None,
    restart: bool = True,
    warm_up: int = 0,
) -> Constraint:
    r"""$\sum_i \lambda_i e_i$ with $\lambda_i \ge 0$ that grows while there is too much
    left (Gallego-Posada et al. 2022).

    Args:
        amounts: as made by `density` or `share`.
        target: t in (0, 1], one number or one for each of the amounts.
        optimizer: of the multipliers; gradient ascent with a rate of 1e-3 if None.
        restart: set a multiplier to 0 once its constraint holds, as in the paper.
            Without it, one that has grown for long goes on closing gates below the
            target.
        warm_up: steps over which the target falls from 1, by the same factor in each:
            a small target is then approached no faster than a large one, and is not
            overrun.

    Raises:
        ValueError: if a target is outside (0, 1], is less than what is left with no
            unit at all, or is given for other amounts than there are.
    """
    optimizer = optax.sgd(1e-3) if optimizer is None else optimizer
    excess, names = _excess(amounts, target, warm_up)

    def ascend(dual, excess):
        multipliers, opt_state = _ascent(optimizer, dual, excess)
        for name, value in multipliers.items():
            value = jnp.maximum(value, 0)
            if restart:
                value = jnp.where(excess[name] > 0, value, 0)
            multipliers[name] = value
        return Dual(multipliers, opt_state)

    return Constraint(
        excess=excess,
        init=lambda: _dual(optimizer, dict.fromkeys(names, jnp.zeros(()))),
        term=lambda dual, excess: _dot(dual.multipliers, excess),
        ascend=ascend,
        strength=lambda dual: dual.multipliers,
    )


def quadratic(
    amounts: Amounts,
    target: Number | Mapping[str, Number],
    *,
    optimizer: optax.GradientTransformation | None = None,
    initial: float = 5.0,
    warm_up: int = 0,
) -> Constraint:
    r"""$\sum_i \lambda_i e_i + \mu_i e_i^2$, both multipliers of either sign and
    ascending (Wang et al. 2020; CoFi, Xia et al. 2022).

    An equality: where too little is left, units are opened again.

    Args:
        amounts, target, optimizer, warm_up: as for `lagrangian`.
        initial: the $\mu_i$ at the start, >= 0. From 0, as in the papers, it takes so
            long to grow that the amount swings about its target: $\lambda_i$ alone
            pushes by what the excess was, $\mu_i$ by what it is.

    Raises:
        ValueError: as `lagrangian`; if `initial` is negative.
    """
    if not initial >= 0:
        raise ValueError(f"initial must be >= 0, got {initial}")
    optimizer = optax.sgd(1e-3) if optimizer is None else optimizer
    excess, names = _excess(amounts, target, warm_up)

    def init():
        multipliers = {"linear": 0.0, "square": initial}
        return _dual(
            optimizer,
            {
                name: {each: jnp.asarray(value, jnp.float32) for each in names}
                for name, value in multipliers.items()
            },
        )

    def term(dual, excess):
        squares = {name: value**2 for name, value in excess.items()}
        return _dot(dual.multipliers["linear"], excess) + _dot(
            dual.multipliers["square"], squares
        )

    def ascend(dual, excess):
        squares = {name: value**2 for name, value in excess.items()}
        slopes = {"linear": excess, "square": squares}
        return Dual(*_ascent(optimizer, dual, slopes))

    return Constraint(
        excess, init, term, ascend, lambda dual: dual.multipliers["linear"]
    )


def exponential(
    amounts: Amounts,
    target: Number | Mapping[str, Number],
    *,
    optimizer: optax.GradientTransformation | None = None,
    decay: float = 0.99,
    initial: float = 1e-2,
    warm_up: int = 0,
) -> Constraint:
    r"""$\sum_i \lambda_i e_i$ with $\lambda_i \leftarrow \lambda_i e^{\eta c_i}$ and
    a running mean c of the excess (Bastings et al. 2019, HardKuma).

    A multiplier is never 0, so that it grows from a push that is felt, and falls as
    fast as it grew.

    Args:
        amounts, target, warm_up: as for `lagrangian`.
        optimizer: of the logarithms of the multipliers; gradient ascent with a rate
            $\eta$ of 1e-2 if None.
        decay: of the running mean.
        initial: the multipliers at the start, > 0.

    Raises:
        ValueError: as `lagrangian`; if `initial` is not positive.
    """
    if not initial > 0:
        raise ValueError(f"initial must be > 0, got {initial}")
    optimizer = optax.sgd(1e-2) if optimizer is None else optimizer
    optimizer = optax.chain(optax.ema(decay, debias=False), optimizer)
    excess, names = _excess(amounts, target, warm_up)
    start = jnp.asarray(math.log(initial), jnp.float32)

    def strength(dual):
        return {name: jnp.exp(value) for name, value in dual.multipliers.items()}

    return Constraint(
        excess=excess,
        init=lambda: _dual(optimizer, dict.fromkeys(names, start)),
        term=lambda dual, excess: _dot(strength(dual), excess),
        ascend=lambda dual, excess: Dual(*_ascent(optimizer, dual, excess)),
        strength=strength,
    )


CONSTRAINTS: dict[str, Callable[..., Constraint]] = {
    "lagrangian": lagrangian,
    "quadratic": quadratic,
    "exponential": exponential,
}


def _excess(amounts: Amounts, target: Number | Mapping[str, Number], warm_up: int):
    """The function `Constraint.excess`, and the names of what is constrained."""
    names = tuple(amounts.least)
    if not isinstance(target, Mapping):
        target = dict.fromkeys(names, target)
    if set(target) != set(names):
        raise ValueError(
            f"targets are given for {', '.join(target) or 'nothing'}; what is "
            f"constrained is {', '.join(names)}"
        )
    for name, value in target.items():
        # (A member's target in a sweep is traced, and has no value to check.)
        if isinstance(value, jax.core.Tracer):
            continue
        if not 0 < value <= 1:
            raise ValueError(f"the target of {name!r} must lie in (0, 1], got {value}")
        if value <= amounts.least[name]:
            raise ValueError(
                f"the target of {name!r} is {value:.4g}, but what has no gates alone "
                f"is {amounts.least[name]:.4g} of the whole; give more than that"
            )

    def excess(params, prob_active, step):
        left = amounts.of(params, prob_active)
        found = {}
        for name in names:
            goal = target[name]
            if warm_up:
                goal = goal ** jnp.minimum(step / warm_up, 1.0)
            found[name] = left[name] / goal - 1
        return found

    return excess, names


def _dual(optimizer: optax.GradientTransformation, multipliers: PyTree) -> Dual:
    return Dual(multipliers, optimizer.init(multipliers))


def _ascent(optimizer: optax.GradientTransformation, dual: Dual, slopes: PyTree):
    down = jax.tree.map(jnp.negative, slopes)
    updates, opt_state = optimizer.update(down, dual.opt_state, dual.multipliers)
    return optax.apply_updates(dual.multipliers, updates), opt_state


def _dot(multipliers: Scalars, excess: Scalars) -> Float[Array, ""]:
    return _sum(
        jax.lax.stop_gradient(multipliers[name]) * excess[name] for name in excess
    )


def _sum(amounts: Iterable[Array]) -> Float[Array, ""]:
    return sum(amounts, start=jnp.zeros(()))
