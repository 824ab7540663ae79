"""D-Gating under plain gradient descent ends where the price of norms that it stands
for has its minimum (Kolb et al. 2025, theorem 1): |w|^(2/D) of each unit's weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l0jax
from l0jax import costs, gates, train

WEIGHTS = 3  # of each unit


def descended(loss, start, depth, price, steps=6_000, rate=0.02):
    """The weights that are left of gated rows, each a unit."""

    def apply(params, x):
        return x @ params["w"].reshape(-1, WEIGHTS)

    example = jax.ShapeDtypeStruct((2, len(start)), jnp.float32)
    structure = l0jax.trace(apply, {"w": start}, example)
    (name,) = structure.groups
    training = train.Training(
        train.function(apply, {"w": start}),
        lambda model, batch: (loss(model(jnp.eye(len(start)))), {}),
        structure=structure.rename({name: "rows"}),
        gate=train.Learned(gates.DGating(1 / (depth - 1)), keep_prob=0.9),
        # A unit pays for as many weights as it has.
        price=price / WEIGHTS,
        optimizer=optax.sgd(rate),
        gate_optimizer=optax.sgd(rate),
    )
    state = training.start(jax.random.key(0))
    nothing = jnp.zeros((steps, 1))
    order = np.arange(steps)[:, None]
    state, totals = training.epoch(state, nothing, order)
    assert totals.first_bad_step == -1
    decision = training.decide(state, "mean")
    return np.asarray(training.folded(state, decision)["w"]), training, state


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_it_ends_at_the_minimum_of_the_norms_that_it_stands_for(depth):
    """Rows apart from one another: of each the distance to a target is known, and
    what is left of its norm is a root, or nothing."""
    price = 0.5
    rng = np.random.default_rng(0)
    norms = np.float32([0.2, 0.55, 1.2, 1.6, 2.5])
    aims = rng.normal(size=(len(norms), WEIGHTS))
    aims *= (norms / np.linalg.norm(aims, axis=1))[:, None]

    def loss(w):
        return 0.5 * jnp.square(w - jnp.float32(aims)).sum()

    found, *_ = descended(loss, jnp.float32(aims), depth, price)
    grid = np.linspace(1e-6, 3, 300_001)
    for row, aim, norm in zip(found, aims, norms, strict=True):
        slope = grid - norm + price * 2 / depth * grid ** (2 / depth - 1)
        # The minimum that is not 0 lies where the slope turns positive for good.
        below = np.flatnonzero(slope < 0)
        left = grid[below[-1]] if below.size else 0.0
        np.testing.assert_allclose(row, aim / norm * left, atol=2e-3)
    assert 0 < (np.linalg.norm(found, axis=1) < 1e-3).sum() < len(norms)


def test_with_two_factors_it_solves_the_group_lasso():
    """Rows that depend on each other, against proximal gradient descent."""
    rng, price, rows = np.random.default_rng(1), 0.35, 6
    mixing = np.eye(rows) + 0.4 * rng.normal(size=(rows, rows))
    mix = rng.normal(size=(40, rows)) @ mixing
    truth = np.where(np.arange(rows) < 3, 1.0, 0.0)[:, None] * rng.normal(
        size=(rows, WEIGHTS)
    )
    seen = mix @ truth + 0.3 * rng.normal(size=(40, WEIGHTS))

    def loss(w):
        return 0.5 * jnp.square(jnp.float32(mix) @ w - jnp.float32(seen)).sum() / 40

    start = jnp.float32(0.5 * rng.normal(size=(rows, WEIGHTS)))
    found, training, state = descended(loss, start, 2, price, steps=30_000)
    w, rate = np.zeros((rows, WEIGHTS)), 40 / np.linalg.norm(mix, 2) ** 2
    for _ in range(20_000):
        w = w - rate * mix.T @ (mix @ w - seen) / 40
        norm = np.linalg.norm(w, axis=1, keepdims=True)
        w *= np.maximum(1 - rate * price / np.maximum(norm, 1e-12), 0)
    zero = np.linalg.norm(w, axis=1) == 0
    assert 0 < zero.sum() < rows
    np.testing.assert_allclose(found, w, atol=2e-3)
    decided = training.decide(state, "paper").z["rows"]
    np.testing.assert_array_equal(decided == 0, zero)


def test_weight_decay_counts_all_units_as_there():
    """What factors pay is no probability."""
    start = jnp.float32(np.linspace(0.5, 1.5, 12).reshape(4, WEIGHTS))
    _, training, state = descended(lambda w: w.sum() * 0, start, 3, 0.1, steps=1)
    decayed = training.replace(weight_decay=0.3)
    batch, norm = jnp.zeros(1), np.square(np.asarray(state.params["w"])).sum()
    penalties = [
        float(each.total(state, batch, state.params, state.gates)[1][0]["penalty"])
        for each in (training, decayed)
    ]
    assert penalties[1] - penalties[0] == pytest.approx(0.5 * 0.3 * norm, rel=1e-4)


def test_a_target_can_decide_but_not_push():
    def loss(w):
        return 0.5 * jnp.square(w - 1).sum()

    start = jnp.float32(np.linspace(0.5, 1.5, 12).reshape(4, WEIGHTS))
    _, training, state = descended(loss, start, 3, 0.1, steps=50)
    with pytest.raises(ValueError, match=r'is no probability.*how="decided"'):
        training.replace(price=None, target=train.Target(costs.params, 0.5))
    decides = train.Target(costs.params, 0.5, how="decided")
    training = training.replace(target=decides)
    decision = training.decide(state)
    assert decision.rule == "budget"
    assert decision.decided == {"params": 0.5}
    assert decision.expected == {"params": 1.0}
    assert "multiplier of params" not in training.step(state, jnp.zeros(1))[1]
