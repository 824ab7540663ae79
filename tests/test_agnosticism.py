"""How much results depend on the heuristic: simulated tables of known variance."""

import numpy as np
import pytest
from scipy import stats

from l0jax import agnosticism
from l0jax.agnosticism import change, heuristic_variance, kendall, reduction


def simulated(rng, between, noise=1.0, of_runs=2.0, heuristics=9, runs=5):
    return (
        between * rng.normal(size=(heuristics, 1))
        + of_runs * rng.normal(size=(1, runs))
        + noise * rng.normal(size=(heuristics, runs))
    )


def test_seed_noise_is_removed():
    """On average the variance is that of the heuristics' effects, whatever the runs."""
    rng = np.random.default_rng(0)
    tables = [simulated(rng, between=0.7) for _ in range(4000)]
    found = np.array([heuristic_variance(table) for table in tables])
    raw = np.array([heuristic_variance(t, noise_removed=False) for t in tables])
    error = found.std() / np.sqrt(len(found))
    assert abs(found.mean() - 0.49) < 3 * error
    assert abs(raw.mean() - 0.49 - 1 / 5) < 3 * error


def test_what_all_heuristics_share_is_no_variance():
    runs = np.array([[90.0, 95.0, 70.0]])
    effects = np.array([[1.0], [-1.0], [3.0]])
    np.testing.assert_allclose(
        heuristic_variance(effects + runs), effects.var(ddof=1), rtol=1e-12
    )
    assert abs(heuristic_variance(0 * effects + runs)) < 1e-20


def test_resampled_variances_are_centred_on_the_estimate():
    """Resampling runs puts their noise in once more: it is taken off again."""
    rng = np.random.default_rng(1)
    table = simulated(rng, between=0.0, heuristics=9, runs=5)
    _, r = agnosticism._resamples(table.shape, 20_000, 0)
    same = np.arange(9)[None, :, None]
    found = agnosticism._variance(table[same, r], (2 * 5 - 1) / (5 - 1))
    error = found.std() / np.sqrt(len(found))
    assert abs(found.mean() - heuristic_variance(table)) < 4 * error


def test_intervals_hold_the_truth():
    """Nearly as often as they say, and they tell a large effect from none."""
    rng = np.random.default_rng(2)
    held, seen, none = 0, 0, 0
    for _ in range(60):
        base, less = simulated(rng, 2.0, 0.5), simulated(rng, 0.5, 0.5)
        found = reduction(base, less, draws=500)
        held += found.low <= 1 - 0.5**2 / 2.0**2 <= found.high
        seen += found.low > 0
        again = reduction(base, simulated(rng, 2.0, 0.5), draws=500)
        none += again.low > 0
    assert held >= 54
    assert seen >= 40
    assert none <= 8


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 3.0])
def test_the_interval_of_a_variance_holds_it(noise):
    rng, held = np.random.default_rng(4), 0
    for _ in range(400):
        table = simulated(rng, 0.7, noise=noise, heuristics=5, runs=4)
        found = agnosticism.variance_interval(table)
        assert found.value == heuristic_variance(table)
        assert found.low <= max(found.value, 0) <= found.high
        held += found.low <= 0.7**2 <= found.high
    # 95 % and no less, within 2.6 deviations of what 400 tables show.
    assert held >= 400 * (0.95 - 0.028)
    assert noise or held <= 400 * (0.95 + 0.028)


def test_a_table_with_itself_is_not_reduced():
    table = simulated(np.random.default_rng(3), 1.0, noise=0.1)
    assert reduction(table, table, draws=200) == (0, 0, 0)
    assert change(table, table, draws=200) == (0, 0, 0)


def test_reductions_and_changes_by_hand():
    effects = np.array([[1.0], [-1.0], [3.0]]) + np.zeros((3, 4))
    found = reduction(effects, effects / 2, draws=200)
    assert found.value == pytest.approx(0.75)
    up = change(effects, effects + 5, draws=200)
    np.testing.assert_allclose(up, (5, 5, 5))


def test_a_base_without_variance_is_no_evidence():
    flat = np.ones((3, 4)) + np.arange(4)
    found = reduction(flat, simulated(np.random.default_rng(0), 1, 1, 1, 3, 4), 200)
    assert found.value == found.low == -np.inf


def test_kendall_is_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    first, second, third = rng.normal(size=(3, 12))
    scores = {
        "a": {"layer": first, "other": first},
        "b": {"layer": second, "other": first},
        "c": {"layer": third, "other": first},
        "flat": {"layer": np.zeros(12), "other": -first},
    }
    found = kendall(scores)
    pairs = ((first, second), (first, third), (second, third))
    expected = np.mean([stats.kendalltau(*pair).statistic for pair in pairs])
    assert found["layer"] == pytest.approx(expected)
    assert found["other"] == pytest.approx((3 - 3) / 6)
    alone = kendall({"a": {"layer": first}, "flat": {"layer": np.zeros(12)}})
    assert np.isnan(alone["layer"])


BAD = {
    "one heuristic": (np.ones((1, 5)), "at least 2 heuristics"),
    "one run": (np.ones((3, 1)), "2 runs"),
    "a vector": (np.ones(3), r"shape \(3,\)"),
    "not finite": (
        np.array([[1.0, 2.0], [3.0, np.nan]]),
        "heuristic 1 in run 1 is nan",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_refused(case):
    table, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        heuristic_variance(table)


def test_tables_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 5\)"):
        reduction(np.ones((3, 4)), np.ones((3, 5)))
