"""Runs of several studies in one table: what is one method, what is its seed."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from benchmarks import run_folders
from experiments import compare, mnist
from experiments.harness import results
from experiments.reports import runs as reading
from experiments.reports.printing import latex


def pruned(folder, errors, *, ratio=0.5):
    """The folder of a run of channel pruning: `{method: errors by seed}`."""
    lines = [
        {
            "study": "channel_pruning",
            "task": "cifar net",
            "method": method,
            "seed": seed,
            "settings": {"dataset": "cifar", "model": "net", "ratio": ratio},
            "metrics": {"test error": error, "validation error": error + 1},
            "costs": {"macs": 0.4, "params": 0.5},
            "seconds": None,
            "made": {"commit": "abc", "device": "cpu", "versions": {"jax": "1"}},
        }
        for method, found in errors.items()
        for seed, error in enumerate(found)
    ]
    results.put(folder, lines)


def trained(folder, *, seed=0, lam=0.1, error=2.0, **more):
    """The folder of a run of `experiments.mnist`."""
    line = {
        "study": "mnist",
        "task": "digits mlp",
        "method": "hard_concrete",
        "seed": seed,
        "settings": {"lam": [lam], "seed": seed, "out": str(folder)} | more,
        "metrics": {"test error": error, "validation error": error},
        "costs": {"weights": 0.3},
        "seconds": 3.0,
    }
    results.put(folder, [line])


def test_differences_are_those_of_pairs_with_student_s_interval(tmp_path):
    errors = {"dcp": [8.0, 9.0, 11.0], "taylor": [8.5, 9.25, 12.0]}
    pruned(tmp_path / "run", errors)
    found = reading.by_method(reading.runs(tmp_path / "run"))
    one, other = found["cifar net", "taylor"], found["cifar net", "dcp"]
    mean, half, count = reading.paired(one, other)
    apart = np.subtract(errors["taylor"], errors["dcp"])
    expected = scipy.stats.t.interval(0.95, 2, apart.mean(), scipy.stats.sem(apart))
    assert (mean - half, mean + half) == pytest.approx(expected)
    assert count == 3
    # Of one pair nothing is known of the spread.
    assert math.isnan(reading.paired(one[:1], other)[1])
    with pytest.raises(ValueError, match="taylor and dcp have no seed in common"):
        reading.paired(one[:1], other[1:])


def test_runs_with_other_settings_are_no_seeds_of_one_another(tmp_path):
    for seed in (0, 1):
        for lam in (0.1, 0.5):
            trained(tmp_path / f"{lam}-{seed}", seed=seed, lam=lam, error=lam)
    found = reading.by_method(reading.runs(tmp_path / "*"))
    assert {method: len(its) for (_, method), its in found.items()} == {
        "hard_concrete, lam [0.1]": 2,
        "hard_concrete, lam [0.5]": 2,
    }
    # What is alike in all is not said.
    alone = reading.runs(tmp_path / "0.1-*")
    assert {result.method for result in alone} == {"hard_concrete"}
    assert [result.seed for result in alone] == [0, 1]


def test_a_run_of_before_a_flag_stands_beside_one_with_it(tmp_path):
    """Where it was made tells no runs apart."""
    trained(tmp_path / "old")
    trained(tmp_path / "new", seed=1, compute="float32", mesh="data=8", shard="data")
    same = reading.runs(tmp_path / "*")
    assert {result.method for result in same} == {"hard_concrete"}
    trained(tmp_path / "low", compute="bfloat16")
    found = [(result.method, result.seed) for result in reading.runs(tmp_path / "*")]
    assert sorted(found) == [
        ("hard_concrete, compute bfloat16", 0),
        ("hard_concrete, compute float32", 0),
        ("hard_concrete, compute float32", 1),
    ]


def test_a_result_is_not_counted_twice(tmp_path):
    for name in ("one", "other"):
        pruned(tmp_path / name, {"dcp": [8.0]})
    with pytest.raises(ValueError, match=r"dcp with seed 0 is in .*one and in .*other"):
        reading.runs(tmp_path / "*")
    assert len(reading.runs(tmp_path / "one")) == 1


def test_a_folder_without_results_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no results.*runs\.jsonl"):
        reading.runs(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_table_is_written_in_all_formats(tmp_path):
    pruned(tmp_path / "runs" / "a", {"dcp": [8.0, 9.0], "l0_gates": [8.5, 9.0]})
    trained(tmp_path / "runs" / "b")
    config = compare.Config((str(tmp_path / "runs" / "*"),), "dcp", tmp_path / "out")
    text = compare.main(config)
    lines = text.splitlines()
    assert len(lines) == 2 + 3
    (gates,) = (line for line in lines if "l0_gates" in line)
    assert "+0.25 ± " in gates
    assert (tmp_path / "out" / "table.md").read_text() == text + "\n"
    with (tmp_path / "out" / "table.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["method"] for row in rows] == ["dcp", "l0_gates", "hard_concrete"]
    assert rows[0]["macs left, %"] == "40.00"
    assert rows[2]["macs left, %"] == "-"
    with (tmp_path / "out" / "runs.csv").open(newline="") as stream:
        each = list(csv.DictReader(stream))
    assert [float(row["test error"]) for row in each] == [8.0, 9.0, 8.5, 9.0, 2.0]
    table = (tmp_path / "out" / "table.tex").read_text()
    assert r"l0\_gates" in table
    assert r"\pm" in table
    assert table.count(r"\\") == 1 + 3
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 10_000
    other = dataclasses.replace(config, against="apoz")
    with pytest.raises(ValueError, match="no run has the method 'apoz'; there is dcp"):
        compare.main(other)


def test_lines_are_written_as_a_table_of_their_own(tmp_path):
    trained(tmp_path)
    other = {**results.read(tmp_path)[0], "seed": 1, "metrics": {"test error": 1 / 3}}
    results.put(tmp_path, [{**other, "widths": [3, 4]}])
    with pytest.raises(KeyError, match="widths"):
        reading.write_csv(tmp_path, "widths")
    both = [{**line, "widths": [3, 4]} for line in results.read(tmp_path)]
    results.put(tmp_path, both)
    reading.write_csv(tmp_path, "widths")
    with (tmp_path / "runs.csv").open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert first["widths"] == second["widths"] == "3 4"
    assert (first["weights left"], first["seconds"]) == ("0.3", "3")
    assert second["test error"] == "0.333333"
    assert (first["validation error"], second["validation error"]) == ("2", "")


def test_what_latex_takes_for_its_own_is_escaped():
    text = latex(["a_b", "c %"], [["1 & 2", "λ ± 3"]])
    assert r"a\_b & c \% \\" in text
    assert r"1 \& 2 & $\lambda$ $\pm$ 3 \\" in text


@pytest.mark.parametrize("name", results.OLDER)
def test_a_run_of_an_older_version_is_refused(name, tmp_path):
    """It would else count as one that has ended with nothing."""
    trained(tmp_path / "runs" / "new")
    old = tmp_path / "runs" / "old"
    old.mkdir()
    (old / name).write_text("{}")
    with pytest.raises(ValueError, match=f"old is of an older version, .* {name}"):
        reading.runs(tmp_path / "runs" / "*")
    config = mnist.Config(out=old, resume=True)
    with pytest.raises(ValueError, match=f"old is of an older version, .* {name}"):
        mnist.main(config)
    assert [file.name for file in old.iterdir()] == [name]


def test_changed_records_are_read_or_refused_by_name(tmp_path):
    """The first of the changes of benchmarks/run_folders.py."""
    counts, examples = run_folders.count("relocation", 60, tmp_path)
    assert set(counts) == {"as before", "other values", "refused"}, examples
    counts, examples = run_folders.count("cifar", 60, tmp_path)
    assert set(counts) == {"as before", "other values", "refused"}, examples
