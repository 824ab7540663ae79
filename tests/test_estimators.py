"""Law: an estimator's gradient is that of the expected loss, which on a few gates is
known by enumeration; and weights get theirs too."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l0jax import estimators, gating
from l0jax.estimators import ESTIMATORS
from l0jax.gates import noise

SIZES = {"input": 3, "hidden": 2}
LOGITS = {"input": jnp.asarray([-1.2, 0.3, 0.9]), "hidden": jnp.asarray([0.6, -0.4])}
DRAWS = 60_000
UNBIASED = sorted(set(ESTIMATORS) - {"straight_through"})
every = pytest.mark.parametrize("name", sorted(ESTIMATORS))
unbiased = pytest.mark.parametrize("name", UNBIASED)


def network():
    """Weights and data of a small regression."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 1))
    one, two = rng.normal(size=(3, 2)), rng.normal(size=(2, 1))
    return [jnp.asarray(a, jnp.float32) for a in (one, two, x, y)]


def loss_of(one, two, x, y):
    def loss(z):
        hidden = jnp.tanh((x * z["input"].reshape(1, -1)) @ one)
        return jnp.square((hidden * z["hidden"].reshape(1, -1)) @ two - y).mean()

    return loss


def exact(loss, logits):
    """E[loss], over all gates that there are."""
    total = 0.0
    for bits in itertools.product((0.0, 1.0), repeat=5):
        z = {"input": jnp.asarray(bits[:3]), "hidden": jnp.asarray(bits[3:])}
        chance = 1.0
        for name, phi in logits.items():
            p = jax.nn.sigmoid(phi)
            chance = chance * jnp.where(z[name] > 0, p, 1 - p).prod()
        total = total + chance * loss(z)
    return total


@functools.cache
def draws(name):
    """Values and gradients, in logits and weights, of many surrogates."""
    one, two, x, y = network()

    def surrogate(logits, weights, key):
        return ESTIMATORS[name](key, logits, loss_of(*weights, x, y))

    keys = jax.random.split(jax.random.key(1), DRAWS)
    both = jax.value_and_grad(surrogate, (0, 1))
    return jax.jit(jax.vmap(both, (None, None, 0)))(LOGITS, (one, two), keys)


def assert_mean(found, expected):
    found = np.asarray(found, np.float64)
    error = 5 * found.std(0) / math.sqrt(DRAWS) + 1e-6
    np.testing.assert_array_less(np.abs(found.mean(0) - np.asarray(expected)), error)


@pytest.mark.sweep
@unbiased
def test_gradients_in_logits_are_those_of_the_expected_loss(name):
    one, two, x, y = network()
    wanted = jax.grad(functools.partial(exact, loss_of(one, two, x, y)))(LOGITS)
    _, (found, _) = draws(name)
    for group in SIZES:
        assert_mean(found[group], wanted[group])


@pytest.mark.sweep
@every
def test_values_and_gradients_in_weights_are_those_of_the_expected_loss(name):
    one, two, x, y = network()

    def expected(weights):
        return exact(loss_of(*weights, x, y), LOGITS)

    value, wanted = jax.value_and_grad(expected)((one, two))
    values, (_, found) = draws(name)
    assert_mean(values, value)
    for a, b in zip(found, wanted, strict=True):
        assert_mean(a, b)


def test_straight_through_is_biased_but_for_linear_losses():
    one, two, x, y = network()
    wanted = jax.grad(functools.partial(exact, loss_of(one, two, x, y)))(LOGITS)
    _, (found, _) = draws("straight_through")
    off = np.abs(np.mean(found["input"], 0) - wanted["input"])
    assert (off > 5 * np.std(found["input"], 0) / math.sqrt(DRAWS)).any()

    def linear(z):
        return (jnp.arange(3.0) * z["input"]).sum()

    def surrogate(logits):
        return estimators.straight_through(jax.random.key(0), logits, linear)

    p = jax.nn.sigmoid(LOGITS["input"])
    slope = jax.grad(surrogate)(LOGITS)["input"]
    np.testing.assert_allclose(slope, jnp.arange(3.0) * p * (1 - p), rtol=1e-6)


def test_a_baseline_and_a_second_draw_lower_the_variance():
    one, two, x, y = network()
    loss = loss_of(one, two, x, y)
    mean = float(exact(loss, LOGITS))

    def surrogate(logits, key):
        return estimators.reinforce(key, logits, loss, baseline=mean)

    keys = jax.random.split(jax.random.key(2), DRAWS)
    found = jax.jit(jax.vmap(jax.grad(surrogate), (None, 0)))(LOGITS, keys)
    assert_mean(
        found["input"], jax.grad(functools.partial(exact, loss))(LOGITS)["input"]
    )

    def variance(grads):
        return sum(float(np.var(g, 0).sum()) for g in grads.values())

    plain = variance(draws("reinforce")[1][0])
    assert variance(found) < 0.8 * plain
    # DisARM is ARM without the variance of its noise (Dong et al. 2020).
    arm, disarm = (variance(draws(name)[1][0]) for name in ("arm", "disarm"))
    assert disarm < 0.9 * arm
    assert arm < variance(draws("augment_reinforce")[1][0])


@every
def test_losses_see_gates_that_are_zero_or_one(name):
    seen = []

    def loss(z):
        seen.append(z)
        return z["input"].sum()

    value = ESTIMATORS[name](jax.random.key(3), LOGITS, loss)
    assert value.shape == ()
    assert 1 <= len(seen) <= 2
    for z in seen:
        for group, size in SIZES.items():
            assert z[group].shape == (size,)
            np.testing.assert_allclose(z[group] * (1 - z[group]), 0, atol=1e-6)


def test_a_group_draws_the_same_whatever_other_groups_there_are():
    u = noise.uniform(gating.key_for(jax.random.key(4), "input"), (3,))
    expected = u < jax.nn.sigmoid(LOGITS["input"])

    def loss(z):
        np.testing.assert_array_equal(z["input"], expected)
        return z["input"].sum()

    for logits in (LOGITS, {"input": LOGITS["input"]}):
        estimators.augment_reinforce(jax.random.key(4), logits, loss)
