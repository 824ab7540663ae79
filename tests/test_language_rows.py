"""Rows of language models: recorded as they come, and said with intervals."""

import numpy as np
import pytest
from scipy import stats

from experiments import language_model, language_rows
from experiments.harness import results, run_folder
from experiments.harness.rows import OfMethods
from experiments.language_settings import OF_BASE, UNTOLD, Config
from experiments.reports import places

LOSSES = {
    "uniform": (1.60, 1.62, 1.61),
    "scratch": (1.58, 1.60, 1.62),
    "random": (1.70, 1.71, 1.72),
    "taylor": (1.59, 1.60, 1.62),
    "l0_hard_concrete": (1.56, 1.59, 1.58),
    "d_gating": (1.65, 1.66, 1.67),
}


def line(method, seed, **changes):
    config = Config(method=(method,))
    found = LOSSES[method][seed]
    return {
        "study": "language_model",
        "task": "tiny_shakespeare decoder",
        "settings": run_folder.settings_of(config, UNTOLD),
        "method": method,
        "seed": seed,
        "metrics": {
            "base test loss": 1.5,
            "base validation loss": 1.52 + seed / 100,
            "validation loss": found - 0.01,
            "test loss": found,
        },
        "costs": {"params": 0.5, "seconds at batch 1": 0.6},
        "blocks": [[3, 1, 16, 32, 250]] * config.layers,
        "width": 137,
        "prompt": "To be",
        "goes on": ", or not",
        "base goes on": ", or not to be",
        "seconds": 10.0,
        "made": {"commit": None},
    } | changes


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "ROOT", tmp_path)
    return tmp_path


def test_nothing_is_said_of_what_was_not_run(place):
    assert language_rows.section() == ""


def test_rows_are_recorded_as_they_come(place, monkeypatch):
    asked = []

    def run(config):
        (method,), (seed,) = config.method, config.seeds
        asked.append((method, seed, config.out.name, config.base_from))
        return {"results": [line(method, seed)]}

    monkeypatch.setattr(language_model, "main", run)
    named = ("taylor", "uniform")
    for seed in (1, 0):
        language_rows.run("half", seed, named)
    folder = language_rows.folder_of("half")
    there = [(found["method"], found["seed"]) for found in results.read(folder)]
    assert there == [("uniform", 0), ("uniform", 1), ("taylor", 0), ("taylor", 1)]
    assert asked[0] == ("taylor", 1, "half", None)
    monkeypatch.setattr(language_rows, "RUNS", place / "runs")
    with pytest.raises(FileNotFoundError, match="language_rows half --seeds 0` first"):
        language_rows.run("seconds", 0, named[:1])
    (place / "runs" / "half" / "base-0").mkdir(parents=True)
    language_rows.run("seconds", 0, named[:1])
    assert asked[-1] == ("taylor", 0, "seconds", language_rows.RUNS / "half")
    # An older result makes place.
    changed = line("uniform", 0, seconds=None)
    language_rows.record("half", [changed])
    assert results.read(folder)[0] == changed
    assert len(results.read(folder)) == 4
    # So does one that says what others leave out: in which dtype all of them ran.
    told = line("uniform", 0)
    told["settings"] |= {"compute": "float32"}
    language_rows.record("half", [told])
    assert results.read(folder)[0] == told
    assert len(results.read(folder)) == 4
    # What other settings gave is no seed of it.
    other = line("uniform", 1)
    other["settings"] |= {"left": 0.3}
    language_rows.record("half", [other])
    assert results.read(folder) == [other]


def test_the_best_gates_are_compared_seed_by_seed(place):
    lines = [line(method, seed) for method in LOSSES for seed in range(3)]
    language_rows.record("half", lines)
    said = language_rows.section()
    assert "The base ends at 1.520 to 1.540 nats" in said
    assert "`l0_hard_concrete` is the best of the gates" in said
    for other in ("taylor", "uniform", "scratch"):
        apart = np.subtract(LOSSES["l0_hard_concrete"], LOSSES[other])
        half = stats.t.ppf(0.975, 2) * apart.std(ddof=1) / np.sqrt(3)
        assert f"{apart.mean():+.3f} ± {half:.3f} (3 seeds) from `{other}`" in said
    assert "from `random`" not in said
    for file in ("figures/losses.png", "figures/left.png", "texts.md", "runs.csv"):
        assert f"](experiments/results/language-half/{file})" in said
        assert (place / "experiments/results/language-half" / file).exists()


def test_a_lucky_seed_is_not_compared_with_three(place):
    """The gates with one seed are better on it, and worse than the others' mean."""
    lines = [line("l0_hard_concrete", seed) for seed in range(3)]
    one = line("d_gating", 1)
    for at, loss in enumerate((1.0, 1.9, 1.0)):
        lines[at]["metrics"] |= {"validation loss": loss}
    one["metrics"] |= {"validation loss": 1.8}
    language_rows.record("half", [*lines, one, line("uniform", 1)])
    said = language_rows.section()
    assert "`d_gating` is the best" in said
    assert "+0.040 (one seed) from `uniform`" in said


def test_branches_that_are_gone_are_counted_where_they_may_go(place):
    language_rows.record("half", [line("taylor", 0)])
    assert "Branches" not in language_rows.section()
    whole, (none, narrow) = [3, 1, 16, 32, 250], ([0, 1, 16, 0, 0], [3, 1, 16, 32, 0])
    lines = [
        line("taylor", 0, blocks=[narrow, whole, none]),
        line("taylor", 1, blocks=[[0, 1, 16, 0, 9], whole, whole]),
    ]
    for each in lines:
        each["settings"] |= {"gated": ("heads", "hidden", "branches")}
    language_rows.record("seconds", lines)
    assert (
        "`taylor` 1.0 of attention and 1.0 feed-forward ones, whole blocks 1 in 2 runs."
        in language_rows.section()
    )


def test_rows_are_settings_that_can_be_run():
    for config in language_rows.ROWS.values():
        language_model.check(config, language_model.METHODS)
        assert set(config.method) <= language_model.METHODS.keys()
        assert len(config.seeds) >= 3
    deciding = [
        [getattr(config, name) for name in OF_BASE]
        for config in language_rows.ROWS.values()
    ]
    assert all(each == deciding[0] for each in deciding)


def test_the_command_runs_rows(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(language_rows, "run", lambda *asked: ran.append(asked))
    language_rows.main(OfMethods(("half",), (2,), methods=("uniform",)))
    assert ran == [("half", 2, ("uniform",))]
    language_rows.main(OfMethods(list=True))
    printed = capsys.readouterr().out.splitlines()
    usual, *others = printed
    assert all(part in usual for part in ("base.epochs = 2,", "left = 0.5,"))
    assert others == [
        "half: ",
        "fifth: left = 0.2",
        "half-distilled: distil = True",
        "seconds: gated = ['heads', 'hidden', 'branches'], cost = latency, left = 0.6",
    ]
    assert len(ran) == 1
