"""The comparison of gate families: a tiny one, from the command to the pictures."""

import dataclasses
import math
import re

import matplotlib
import matplotlib.style
import numpy as np
import pytest

from experiments import (
    families,
    family_report,
    family_settings,
    family_sweep,
    mnist,
    mnist_settings,
)
from experiments.harness import results
from experiments.reports import printing, published_networks
from experiments.reports.style import STYLE
from l0jax import gates, gating

TINY = families.Config(
    dataset="digits",
    families=("hard_concrete", "bernoulli-arm", "variational_dropout"),
    lam=(0.03, 0.1),
    seeds=2,
    epochs=4,
    gate_learning_rate=0.1,
    checkpoint_every=2,
    progress=False,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    found = families.main(dataclasses.replace(TINY, out=folder))
    assert found["folder"] == str(folder)
    return folder


def rows(folder):
    return results.read(folder)


def test_every_gate_family_and_pair_and_estimator_is_compared():
    variants = family_settings.VARIANTS
    assert {its.get("gate", "hard_concrete") for its in variants.values()} == set(
        gates.GATES
    )
    assert {its["pair"] for its in variants.values() if "pair" in its} == set(
        gates.PAIRS
    )
    for its in variants.values():
        mnist.check(mnist.Config(**its))


@pytest.mark.slow
def test_every_member_has_a_line_for_each_rule(tiny):
    lines = rows(tiny)
    assert set(lines[0]) >= {*family_report.OWN, *results.KINDS}
    for name in TINY.families:
        rules = family_sweep.rules_of(
            mnist_settings.gate_of(mnist.Config(**family_settings.VARIANTS[name]))
        )
        assert set(gating.RULES) < set(rules)
        found = {(r["lam"], r["seed"], r["rule"]) for r in lines if r["family"] == name}
        assert found == {
            (lam, seed, rule) for lam in TINY.lam for seed in (0, 1) for rule in rules
        }
    assert len({r["metrics"]["test error"] for r in lines}) > 4


@pytest.mark.slow
def test_lines_say_what_was_left(tiny):
    for row in rows(tiny):
        widths = [int(width) for width in row["architecture"].split("-")]
        a, b, c = widths
        assert row["weights"] == a * b + b * c + 10 * c == row["macs"]
        assert row["dense_weights"] == 64 * 300 + 300 * 100 + 1000
        assert row["costs"]["weights"] == row["weights"] / row["dense_weights"]
        assert row["test_l0"] <= row["dense_weights"]
        assert row["gradient_variance"] > 0
        assert 0 <= row["metrics"]["test error"] <= 100
        assert row["verdict"]
    # What is never 0 is counted in full, and is neither open nor closed.
    noise = [r for r in rows(tiny) if r["family"] == "variational_dropout"]
    assert {r["expected_l0"] for r in noise} == {50200.0}
    assert all(r["undecided"] is None for r in noise)


@pytest.mark.slow
def test_members_are_runs_of_the_mnist_experiment(tiny, tmp_path):
    """The sweep's member and the single run of the same settings."""
    config = mnist.Config(
        epochs=4,
        gate_learning_rate=0.1,
        compact=False,
        lam=(0.1,),
        seed=1,
        out=tmp_path / "run",
        progress=False,
    )
    alone = mnist.main(config)["last"]
    (row,) = (
        r
        for r in rows(tiny)
        if (r["family"], r["lam"], r["seed"], r["rule"])
        == ("hard_concrete", 0.1, 1, "paper")
    )
    widths = "-".join(map(str, alone["architecture"].values()))
    assert row["architecture"] == widths
    assert row["expected_l0"] == pytest.approx(alone["expected_l0"], rel=1e-3)
    assert row["metrics"]["test error"] == pytest.approx(alone["test_error"], abs=0.6)


@pytest.mark.slow
def test_families_are_compared_at_equal_budgets(tmp_path):
    """Beside equal λ: every family ends at the same multiply-accumulates."""
    how = dataclasses.replace(
        TINY,
        out=tmp_path,
        lam=(),
        targets=(0.2, 0.5),
        families=("hard_concrete", "mixture-beta"),
        seeds=1,
    )
    families.main(how)
    lines = rows(tmp_path)
    kept = [r for r in lines if r["rule"] == "budget"]
    assert [(r["family"], r["target"], r["lam"]) for r in kept] == [
        (family, target, None) for family in how.families for target in (0.2, 0.5)
    ]
    for row in kept:
        left = row["costs"]["macs"]
        # The most that fits: less than one unit of the largest layer is missing.
        assert row["target"] - 400 / 50_200 < left <= row["target"]
    others = [r for r in lines if r["rule"] == "paper"]
    assert len(others) == len(kept)
    table = (tmp_path / "table.md").read_text()
    assert "| 20 % left |" in table
    assert "| 50 % left |" in table
    # What is there is not run again.
    before = (tmp_path / results.LINES).read_text()
    families.main(how)
    assert (tmp_path / results.LINES).read_text() == before


@pytest.mark.slow
def test_members_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    """At a λ of 0, and at one of which no number of digits is all, too."""
    lam = (0.0, 1 / 3, 0.1 + 0.2)
    how = {"families": ("hard_concrete",), "lam": lam, "seeds": 1, "out": tmp_path}
    one = dataclasses.replace(TINY, **how, epochs=1)
    first = families.main(one)["results"]
    monkeypatch.setattr(family_sweep.Family, "run", lambda *_: pytest.fail("it is run"))
    assert families.main(one)["results"] == first
    for changes in ({"lam": (0.5,)}, {"seeds": 2}, {"lam": (), "targets": (0.3,)}):
        with pytest.raises(pytest.fail.Exception):
            families.main(dataclasses.replace(one, **changes))


def test_a_refused_comparison_leaves_no_folder(tmp_path):
    """Refused as late as by the network, for which the images are too small."""
    small = dataclasses.replace(TINY, model="lenet5", out=tmp_path / "run")
    with pytest.raises(ValueError, match="16 by 16"):
        families.main(small)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was_stopped(tiny, tmp_path, monkeypatch):
    """A family that is there is not run again; one that was interrupted goes on."""
    one = dataclasses.replace(TINY, out=tmp_path, families=("hard_concrete",))
    sweeps = []
    whole = family_sweep.train.Sweep.epoch

    def stopped(self, states, *rest):
        if len(sweeps) == 3:
            sweeps.append("stopped")
            raise KeyboardInterrupt
        sweeps.append(int(states.step[0]))
        return whole(self, states, *rest)

    monkeypatch.setattr(family_sweep.train.Sweep, "epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        families.main(one)
    assert results.read(tmp_path) == []
    families.main(one)
    # Of 13 steps an epoch; what followed the last checkpoint is trained again.
    assert sweeps == [0, 13, 26, "stopped", 26, 39]
    expected = [r for r in rows(tiny) if r["family"] == "hard_concrete"]
    for found, row in zip(rows(tmp_path), expected, strict=True):
        assert {**found, "step_ms": 0} == {**row, "step_ms": 0}
    families.main(dataclasses.replace(one, families=("hard_concrete", "smooth_step")))
    assert sweeps[6:] == [0, 13, 26, 39], "only the new family was run"
    assert [r["family"] for r in rows(tmp_path)][-1] == "smooth_step"


@pytest.mark.slow
def test_the_table_has_a_line_for_each_family_and_strength(tiny):
    lines = (tiny / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(TINY.families) * len(TINY.lam)
    width = lines[0].count("|")
    assert all(line.count("|") == width for line in lines)
    assert all("±" in line for line in lines[2:])
    for name in ("frontier-weights", "frontier-macs", "densities"):
        assert (tiny / "figures" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_only_kinds_that_were_compared_have_a_panel(tiny):
    lines = results.read(tiny)

    def titles(names):
        figure = family_report.frontier(
            [line for line in lines if line["family"] in names], "weights"
        )
        return [a.get_title(loc="left") for a in figure.axes if a.get_visible()]

    with matplotlib.style.context(["default", STYLE]):
        assert titles(["hard_concrete"]) == ["hard concrete"]
        assert titles(["hard_concrete", "variational_dropout"]) == [
            "without noise, and controls"
        ]
        both = ["Bernoulli gates, by estimator", "without noise, and controls"]
        assert titles(TINY.families) == both


LINE = {
    "architecture": "3-4-5",
    "costs": {"weights": 0.5},
    "metrics": {"validation error": 2.0, "sampled validation error": 2.1},
    "expected_l0": 40.0,
    "undecided": 0.1,
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "^fine$"),
        ({"architecture": "3-0-5"}, "collapsed.*too large"),
        ({"costs": {"weights": 0.95}}, "nearly nothing removed: λ is too small"),
        ({"metrics": {"validation error": 30.0}}, "lost: λ is too large"),
        ({"undecided": 0.4}, "^40 % of the gates are undecided$"),
        ({"metrics": {"validation error": 4.1}}, "2.0 points worse than sampled"),
        (
            {"metrics": {"sampled validation error": 4.0}},
            "2.0 points better than sampled",
        ),
        ({"expected_l0": math.nan}, "^diverged$"),
    ],
)
def test_verdicts_say_what_went_wrong(changed, said):
    metrics = LINE["metrics"] | changed.get("metrics", {})
    line = {**LINE, **changed, "metrics": metrics}
    assert re.search(said, family_sweep.verdict(line))


@pytest.mark.parametrize(
    ("each", "together"),
    [
        (["fine", "fine", "fine"], "fine"),
        (["fine", "L0 is 2.5 % off", "fine"], "2 of 3: fine; 1 of 3: L0 is 2.5 % off"),
        (["7 % a; b", "71 % a; b", "9 % a; b"], "7 to 71 % a; b"),
        (["a is 1; b", "b", "b"], "1 of 3: a is 1; b"),
    ],
)
def test_verdicts_that_differ_in_numbers_are_one(each, together):
    rows = [{"verdict": said} for said in each]
    assert family_report.verdicts(rows) == together


@pytest.mark.parametrize("model", ["mlp", "lenet5"])
def test_published_networks_cost_what_is_published(model):
    """Weights that the papers, or those who quote them, print."""
    weights = {
        p.architecture: published_networks.cost(model, p.widths, "weights")
        for p in published_networks.PUBLISHED[model]
    }
    printed = {
        "mlp": {"219-214-100": 69_266, "266-88-33": 26_642, "278-98-13": 28_648},
        "lenet5": {"20-25-45-462": 38_410, "9-18-65-25": 6_150, "5-10-76-16": 2_751},
    }[model]
    assert {name: weights[name] for name in printed} == printed


def test_intervals_are_those_of_student():
    middle, half = printing.mean_and_half_width(np.array([1.0, 2.0, 3.0]))
    assert middle == 2
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert printing.mean_and_half_width(np.array([1.5])) == (1.5, 0.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"families": ("soft",)}, "unknown family 'soft'; there is hard_concrete"),
        ({"families": ()}, "at least one family"),
        ({"lam": ()}, "at least one family and one λ or target"),
        ({"targets": (1.5,)}, r"targets must lie in \(0, 1\], got 1.5"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lam": (-1.0,)}, "lam must be >= 0, got -1.0"),
    ],
)
def test_what_can_not_be_compared_is_named(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        families.main(dataclasses.replace(TINY, out=tmp_path / "new", **changed))
    assert not (tmp_path / "new").exists()


def test_a_report_of_nothing_says_so(tmp_path):
    assert not family_report.write(tmp_path)
    assert not [*tmp_path.iterdir()]
