"""Features that say nothing are dropped, and those that tell are kept."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from experiments import feature_selection
from experiments.feature_selection import Table

QUICK = feature_selection.Config(
    lam=(0.003, 0.03), seeds=2, epochs=150, noise=20, random=5
)


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    config = dataclasses.replace(QUICK, out=tmp_path_factory.mktemp("run"))
    found = feature_selection.main(config)
    assert json.loads((config.out / "summary.json").read_text()) == found
    assert (config.out / "features.png").stat().st_size > 10_000
    return found


def test_noise_is_dropped_and_what_tells_is_kept(summary):
    noise = [name.startswith("noise ") for name in summary["features"]]
    assert noise == [False] * 30 + [True] * 20
    kept = np.array(summary["kept_in"])
    assert kept[noise].sum() <= 1, "of 40 gates"
    assert 2 * 2 <= kept.sum() <= 2 * 15
    assert kept.sum() == sum(summary["count"])
    # Open more often than those of noise are, and open if they are kept.
    active = np.array(summary["prob_active"])
    assert active[noise].max() < active[kept == 2].min()


def test_kept_features_are_worth_more_than_random_ones(summary):
    right = {which: np.mean(each) for which, each in summary["test_accuracy"].items()}
    assert right["kept"] > right["random"] + 2
    assert right["kept"] > right["all"] - 3
    assert right["all"] > 92


def test_at_too_high_a_price_nothing_is_kept(tmp_path):
    config = feature_selection.Config(
        lam=(10.0,), seeds=1, epochs=60, random=2, out=tmp_path
    )
    found = feature_selection.main(config)
    assert (found["lam"], found["count"]) == ([10.0], [0])
    (kept,), (every,), (random,) = found["test_accuracy"].values()
    # The larger class is 72 of 114 examples.
    assert kept == random == pytest.approx(100 * 72 / 114)
    assert every > 92


def test_a_network_is_trained_on_its_columns_alone():
    config = dataclasses.replace(QUICK, epochs=1, hidden=4)
    training, _, _ = feature_selection.split(feature_selection.data(0)[1], 0)
    inputs = training.inputs.copy()
    inputs[:, 4] = 7.0
    train_on = feature_selection.fit_all(config, 30, gated=False)
    columns = np.stack([np.arange(30) != 4, np.arange(30) != 5])
    one, other = (
        train_on(0, Table(each, training.labels), columns).params["layers"][0]
        for each in (training.inputs, inputs)
    )
    np.testing.assert_array_equal(one["kernel"][0], other["kernel"][0])
    assert (one["kernel"][1] != other["kernel"][1]).any()


def test_the_largest_price_within_a_standard_error_is_chosen():
    lam = np.array([0.0, 0.1, 0.2, 0.3])
    # Losses that deviate by 1 from their mean: of 100 examples, 0.1 is the error.
    spread = np.tile([-1.0, 1.0], 50)
    for means, chosen in (
        ([2.0, 2.05, 2.09, 2.11], 2),
        ([2.0, 2.2, 2.05, 2.5], 2),
        ([2.0, 2.11, 2.11, 2.11], 0),
        ([2.0, 2.0, 2.0, 2.0], 3),
    ):
        losses = np.array(means)[:, None] + spread
        assert feature_selection.sparsest(lam, losses) == chosen
        assert feature_selection.sparsest(lam[::-1], losses[::-1]) == 3 - chosen


def test_splits_share_no_example_and_are_scaled_by_the_first():
    _, everything = feature_selection.data(0)
    # A column that tells which example it is.
    rows = np.arange(len(everything.labels), dtype=float)
    table = Table(np.stack([rows, everything.inputs[:, 0]], axis=1), everything.labels)
    parts = feature_selection.split(table, 3)
    sizes = [len(part.labels) for part in parts]
    assert sizes == [341, 114, 114]
    assert len(np.unique(np.concatenate([part.inputs[:, 0] for part in parts]))) == 569
    np.testing.assert_allclose(parts[0].inputs.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(parts[0].inputs.std(axis=0), 1, rtol=1e-5)
    for part in parts:
        assert part.labels.mean() == pytest.approx(table.labels.mean(), abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"random": 0}, "random must be at least 1, got 0"),
        ({"noise": -1}, "noise must be at least 0, got -1"),
        ({"lam": ()}, r"at least one, got \(\)"),
        ({"lam": (0.1, -0.1)}, r"numbers >= 0.*got \(0.1, -0.1\)"),
    ],
)
def test_what_cannot_be_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        feature_selection.main(dataclasses.replace(QUICK, **changes))


def test_the_command_prints_a_table(summary, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["feature_selection", "--out", str(tmp_path)])
    monkeypatch.setattr(feature_selection, "main", lambda config: summary)
    feature_selection.cli()
    said = capsys.readouterr().out
    assert f"random ({np.mean(summary['count']):.1f})" in said
    assert f"{np.mean(summary['test_accuracy']['all']):.1f} ±" in said
    for name, count in zip(summary["features"], summary["kept_in"], strict=True):
        assert (f"  {name} ({count})\n" in said) == (count > 0)
    assert str(tmp_path / "features.png") in said
