"""The verbs of a family over a whole model: each group on its own, under its name."""

import math
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l0jax import gating
from l0jax.gates import GATES
from l0jax.units import Group, Slot

GROUPS = {
    name: Group(name, size, (Slot(name, 0),))
    for name, size in (("first", 40), ("second", 40), ("last", 7))
}
KEY = jax.random.key(0)
sweep = pytest.mark.parametrize("gate", [family() for family in GATES.values()])


def logits_of(gate):
    return gating.init(KEY, gate, GROUPS, 0.5)


@pytest.mark.sweep
@sweep
def test_groups_have_their_own_keys(gate):
    """Two of the same size and logits draw differently; others change nothing."""
    logits = {name: jnp.zeros(group.size) for name, group in GROUPS.items()}
    for draw in (
        lambda groups: gating.init(KEY, gate, groups, 0.5),
        lambda groups: gating.sample(KEY, gate, {n: logits[n] for n in groups}),
    ):
        together = draw(GROUPS)
        assert list(together) == list(GROUPS)
        for name, group in reversed(GROUPS.items()):
            alone = draw({name: group})
            np.testing.assert_array_equal(alone[name], together[name])
    initial = gating.init(KEY, gate, GROUPS, 0.5)
    assert not np.array_equal(initial["first"], initial["second"])
    both = gating.sample(KEY, gate, {n: jnp.zeros(5000) for n in ("first", "second")})
    if not gate.random:
        np.testing.assert_array_equal(both["first"], both["second"])
        return
    correlation = np.corrcoef(both["first"], both["second"])[0, 1]
    assert abs(correlation) < 5 / math.sqrt(5000)


def test_keys_are_the_same_in_every_process():
    """Unlike Python's own hash of a string."""
    program = (
        "import jax; from l0jax import gating; "
        "print(jax.random.key_data(gating.key_for(jax.random.key(3), 'conv1')))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    expected = jax.random.fold_in(jax.random.key(3), zlib.crc32(b"conv1"))
    assert printed == {str(jax.random.key_data(expected))}


@pytest.mark.sweep
@sweep
def test_every_verb_is_that_of_the_family(gate):
    logits = {name: 9 * values for name, values in logits_of(gate).items()}
    for found, one in (
        (gating.prob_active(gate, logits), gate.prob_active),
        (gating.l0_term(gate, logits), gate.l0_term),
        (gating.project(gate, logits), gate.project),
        *(
            (
                gating.deterministic(gate, logits, rule),
                lambda values, rule=rule: gate.deterministic(values, rule),
            )
            for rule in gate.rules
        ),
    ):
        assert list(found) == list(logits)
        for name, values in logits.items():
            np.testing.assert_array_equal(found[name], one(values))
    with pytest.raises(ValueError, match="'coin'") as error:
        gating.deterministic(gate, logits, "coin")
    assert all(rule in str(error.value) for rule in (*gate.rules, *gating.RULES))


@pytest.mark.sweep
@sweep
def test_rules_for_all_families_keep_what_they_say(gate):
    """The decision from probabilities, and its value, in NumPy."""
    spread = np.random.default_rng(0).normal(-0.4, 2.5, 40).astype(np.float32)
    logits = {"first": jnp.asarray(spread), "last": jnp.asarray(spread[:7] - 3)}
    decide = jax.jit(
        lambda logits, rule: gating.deterministic(gate, logits, rule), static_argnums=1
    )
    for name, values in logits.items():
        kept = np.asarray(gate.prob_active(values), np.float64)
        if not gate.zeros:
            kept = np.asarray(gate.deterministic(values, "paper") != 0)
        mean = np.asarray(gate.mean(values))
        np.testing.assert_allclose(
            decide(logits, "threshold")[name], np.where(kept > 0.5, mean, 0), atol=1e-6
        )
        largest = np.argsort(-np.asarray(values))[: round(kept.sum())]
        expected = np.zeros_like(mean)
        expected[largest] = mean[largest]
        found = decide(logits, "expected_count")[name]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert 0 < (found != 0).sum() < len(found) or name == "last"


def test_of_equal_logits_as_many_are_kept_as_are_expected_open():
    gate = GATES["bernoulli"]()
    found = gating.expected_count(gate, jnp.full(10, -0.8))  # P = 0.31
    np.testing.assert_allclose(found, [0.31] * 3 + [0] * 7, atol=1e-3)
    np.testing.assert_array_equal(
        gating.threshold(gate, jnp.full(10, -0.8)), np.zeros(10)
    )


@sweep
def test_keep_probabilities_are_one_or_one_for_each_group(gate):
    each = {"last": 0.9, "first": 0.1, "second": 0.5}
    apart = gating.init(KEY, gate, GROUPS, each)
    for name, p in each.items():
        np.testing.assert_array_equal(
            apart[name], gating.init(KEY, gate, GROUPS, p)[name]
        )
    for wrong in ({"first": 0.5}, {**each, "heads": 0.5}, {}):
        with pytest.raises(ValueError, match="keep_prob is given for") as error:
            gating.init(KEY, gate, GROUPS, wrong)
        assert ", ".join(GROUPS) in str(error.value)
        assert (", ".join(wrong) or "nothing") in str(error.value)
    with pytest.raises(ValueError, match=r"\(0, 1\), got 1\.5"):
        gating.init(KEY, gate, GROUPS, {**each, "last": 1.5})


@pytest.mark.sweep
@sweep
def test_average_of_draws_is_near_the_mean(gate):
    logits, draws = logits_of(gate), 2000
    found = jax.jit(lambda key: gating.sample_average(key, gate, logits, draws))(KEY)
    for name, values in logits.items():
        # No variable in [0, 1] has a standard deviation above a half; Gaussian dropout
        # of rate 1/2 has one of 1.
        error = 5 * (0.5 if gate.bounded else 1) / math.sqrt(draws)
        np.testing.assert_allclose(found[name], gate.mean(values), atol=error)
        assert found[name].shape == values.shape
    if not gate.random:
        return
    one = gating.sample_average(KEY, gate, logits, 1)
    two = gating.sample_average(KEY, gate, logits, 2)
    assert not np.allclose(one["first"], two["first"])


@pytest.mark.sweep
@sweep
def test_exactly_one_of_key_and_rule(gate):
    logits, rule = logits_of(gate), gate.rules[0]
    drawn = gating.draw_or_decide(gate, logits, key=KEY, rule=None)
    decided = gating.draw_or_decide(gate, logits, key=None, rule=rule)
    for name in GROUPS:
        np.testing.assert_array_equal(
            drawn[name], gating.sample(KEY, gate, logits)[name]
        )
        np.testing.assert_array_equal(
            decided[name], gating.deterministic(gate, logits, rule)[name]
        )
    for key, name, given in ((None, None, "neither"), (KEY, rule, "both")):
        with pytest.raises(ValueError, match=f"got {given}") as error:
            gating.draw_or_decide(gate, logits, key=key, rule=name)
        known = (*gate.rules, *gating.RULES)
        assert all(each in str(error.value) for each in known)
