"""Constraints against problems whose solution is known, and against the costs that they
are shares of."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from l0jax import constraints, costs, models, objectives
from l0jax.constraints import CONSTRAINTS
from l0jax.units import Group, Slot

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.ones((6, 4)), "v": jnp.ones((4, 2))}
GROUPS = {
    "input": Group("input", 6, used_by=(Slot("w", 0),)),
    "hidden": Group("hidden", 4, made_by=(Slot("w", 1),), used_by=(Slot("v", 0),)),
}
SIZES = objectives.sizes(PARAMS, GROUPS)
P = {"input": jnp.float32(RNG.random(6)), "hidden": jnp.float32(RNG.random(4))}
every = pytest.mark.parametrize("make", CONSTRAINTS.values(), ids=list(CONSTRAINTS))


# ------------------------------------------------------------------------- amounts


def test_density_is_the_share_of_gated_weights():
    of_input, of_hidden = 4 * P["input"].sum(), 2 * P["hidden"].sum()
    (found,) = constraints.density(SIZES).of(PARAMS, P).values()
    np.testing.assert_allclose(found, (of_input + of_hidden) / 32, rtol=1e-6)
    each = constraints.density(SIZES, per_group=True).of(PARAMS, P)
    np.testing.assert_allclose(each["input"], of_input / 24, rtol=1e-6)
    np.testing.assert_allclose(each["hidden"], of_hidden / 8, rtol=1e-6)


def test_density_counts_what_is_charged():
    charges = {"input": GROUPS["input"].used_by, "hidden": GROUPS["hidden"].made_by}
    sizes = objectives.sizes(PARAMS, GROUPS, charges)
    (found,) = constraints.density(sizes).of(PARAMS, P).values()
    expected = 4 * P["input"].sum() + 6 * P["hidden"].sum()
    np.testing.assert_allclose(found, expected / 48, rtol=1e-6)


def test_a_smaller_network_is_a_share_of_the_whole_one():
    """What training goes on with after a compaction is bound as before it."""
    keep = {"input": np.arange(6) < 3, "hidden": np.arange(4) < 3}
    closed = {name: P[name] * jnp.float32(keep[name]) for name in P}
    alive = {name: P[name][keep[name]] for name in P}
    sizes = {name: SIZES[name][keep[name]] for name in P}
    whole = {"input": 24.0, "hidden": 8.0}
    for per_group in (False, True):
        before = constraints.density(SIZES, per_group=per_group).of((), closed)
        now = constraints.density(sizes, whole, per_group=per_group)
        for name, amount in now.of((), alive).items():
            np.testing.assert_allclose(amount, before[name], rtol=1e-6)


@pytest.fixture(scope="module")
def structure():
    return models.structure(models.MLP((5, 7, 4, 3), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", ["params", "macs", "bytes"])
def test_shares_are_costs_over_that_of_the_whole(structure, name):
    cost = costs.make(name)
    p = {n: jnp.float32(RNG.random(g.size)) for n, g in structure.groups.items()}
    amounts = constraints.share(structure, cost)
    assert list(amounts.least) == [name]
    found = amounts.of(None, p)[name]
    np.testing.assert_allclose(found, cost(structure, p) / cost(structure), rtol=1e-6)
    none = {n: np.zeros(g.size, bool) for n, g in structure.groups.items()}
    least = costs.exact(structure, none, cost) / costs.exact(structure, cost=cost)
    assert amounts.least[name] == pytest.approx(least, rel=1e-6)
    doubled = constraints.share(structure, cost, whole=2 * float(cost(structure)))
    np.testing.assert_allclose(doubled.of(None, p)[name], found / 2, rtol=1e-6)


# ------------------------------------------------------------- a problem that is solved

TARGET = 0.3
FOUR = constraints.density({"all": jnp.ones(4)})


def solve(constraint, steps=6000):
    """Least sum of (p - 1)^2 over four probabilities whose mean is constrained; the
    mean at every step, and the multipliers."""

    def one(carry, step):
        p, dual = carry

        def total(p):
            excess = constraint.excess((), {"all": p}, step)
            return ((p - 1) ** 2).sum() + constraint.term(dual, excess), excess

        slope, excess = jax.grad(total, has_aux=True)(p)
        dual = constraint.ascend(dual, excess)
        p = jnp.clip(p - 0.02 * slope, 0, 1)
        return (p, dual), (p.mean(), constraint.strength(dual)["density"])

    start = (jnp.full(4, 0.9), constraint.init())
    _, (means, strengths) = jax.jit(
        lambda: jax.lax.scan(one, start, jnp.arange(steps))
    )()
    return np.asarray(means), np.asarray(strengths)


SETTINGS = {
    "lagrangian": {"restart": False, "optimizer": optax.sgd(0.02)},
    "quadratic": {"optimizer": optax.sgd(0.02)},
    "exponential": {"optimizer": optax.sgd(0.002)},
}


@every
def test_all_reach_the_target_and_its_multiplier(make):
    settings = SETTINGS[make.__name__]
    means, strengths = solve(make(FOUR, TARGET, **settings))
    assert abs(means[-1] - TARGET) < 1e-3
    # At the optimum the multiplier is the slope of the loss, 4 * 2 (1 - p), in p / t.
    assert strengths[-1] == pytest.approx(8 * (1 - TARGET) * TARGET, rel=1e-2)


def test_restarts_keep_the_multiplier_from_closing_too_much():
    fast = {"optimizer": optax.sgd(0.5)}
    free, _ = solve(constraints.lagrangian(FOUR, TARGET, restart=False, **fast))
    held, _ = solve(constraints.lagrangian(FOUR, TARGET, **fast))

    def below(means):
        """The longest run of steps with less than the target."""
        steps = np.flatnonzero(means < TARGET - 1e-3)
        return max(map(len, np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1)))

    assert free.min() < TARGET - 0.05, "without, it overshoots"
    assert below(held) < below(free) / 2


def test_an_equality_that_pushes_by_what_the_excess_is_does_not_swing():
    how = {"optimizer": optax.sgd(0.5)}
    still, _ = solve(constraints.quadratic(FOUR, TARGET, **how))
    swinging, _ = solve(constraints.quadratic(FOUR, TARGET, initial=0.0, **how))
    assert still.min() > TARGET - 1e-3
    assert swinging.min() < TARGET - 0.03


def test_an_inequality_that_holds_does_nothing():
    means, strengths = solve(constraints.lagrangian(FOUR, 1.0))
    assert means[-1] == pytest.approx(1.0, abs=1e-3)
    assert (strengths == 0).all()


@every
def test_a_target_warms_up(make):
    constraint = make(constraints.density(SIZES), 0.2, warm_up=100)
    full = {name: jnp.ones_like(p) for name, p in P.items()}
    for step, goal in ((0, 1.0), (50, 0.2**0.5), (100, 0.2), (500, 0.2)):
        excess = constraint.excess(PARAMS, full, jnp.int32(step))["density"]
        assert float(excess) == pytest.approx(1 / goal - 1, abs=1e-5)


def test_each_group_has_a_multiplier_of_its_own():
    amounts = constraints.density(SIZES, per_group=True)
    constraint = constraints.lagrangian(amounts, {"input": 0.9, "hidden": 0.1})
    half = {name: jnp.full_like(p, 0.5) for name, p in P.items()}
    excess = constraint.excess(PARAMS, half, jnp.int32(0))
    dual = constraint.ascend(constraint.init(), excess)
    strength = constraint.strength(dual)
    assert strength["input"] == 0
    assert float(strength["hidden"]) == pytest.approx(4 * 1e-3)
    term = constraint.term(dual, excess)
    assert float(term) == pytest.approx(4 * 4 * 1e-3)


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("initial", [-1.0, math.nan])
def test_a_square_does_not_push_away(initial):
    with pytest.raises(ValueError, match=f"initial must be >= 0, got {initial}"):
        constraints.quadratic(FOUR, TARGET, initial=initial)


@every
@pytest.mark.parametrize("target", [0.0, -0.1, 1.5, float("nan")])
def test_targets_are_shares(make, target):
    with pytest.raises(ValueError, match=r"'density' must lie in \(0, 1\], got"):
        make(constraints.density(SIZES), target)


@every
def test_a_target_below_what_has_no_gates_is_refused(make, structure):
    amounts = constraints.share(structure, costs.params)
    # The output's three biases, of 5*7+7 + 7*4+4 + 4*3+3 parameters.
    with pytest.raises(ValueError, match=r"is 0\.03.*is 0\.0337\d* of the whole"):
        make(amounts, 0.03)
    make(amounts, 0.04)


@every
def test_targets_of_other_names_are_refused(make):
    amounts = constraints.density(SIZES, per_group=True)
    with pytest.raises(ValueError, match=r"given for input; what.* is input, hidden"):
        make(amounts, {"input": 0.5})


def test_a_multiplier_that_is_exponential_starts_above_0():
    with pytest.raises(ValueError, match="initial must be > 0, got 0"):
        constraints.exponential(constraints.density(SIZES), 0.5, initial=0.0)


def test_expected_l0_is_what_density_counts():
    total = objectives.expected_l0(PARAMS, P, GROUPS)
    (found,) = constraints.density(SIZES).of(PARAMS, P).values()
    np.testing.assert_allclose(32 * found, total, rtol=1e-6)
