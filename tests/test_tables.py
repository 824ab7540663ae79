"""The rows behind `RESULTS.md`, and that what is printed is what was measured."""

import dataclasses
import itertools
import json
import re
import sys
from collections import Counter
from typing import Annotated

import numpy as np
import pytest
import tyro
from flax import nnx

from benchmarks import __main__ as every_benchmark
from benchmarks import measure
from experiments import (
    frontier_rows,
    mnist,
    mnist_rows,
    mnist_training,
    relocation,
    relocation_report,
    tables,
)
from experiments.harness import results
from experiments.harness.rows import Arguments
from experiments.reports import (
    benchmark_tables,
    mnist_tables,
    places,
    printing,
    study_tables,
)
from l0jax import models

COMMITTED = results.read(mnist_rows.RESULTS)
RESULTS = places.RESULTS
# How a running training is made smaller, if it is.
COMPACTION = ("compact_below", "compact_after", "compact_gain")
BEFORE, AFTER = tables.markers("mnist")
OTHER = "\n\n".join(tables.markers("cifar"))
README = (
    f"# Name\n\nAbove.\n\n{BEFORE}\nold | table\n{AFTER}\n\n<!-- below -->\n\n{OTHER}\n"
)

# One row of each kind, and two seeds of each but the last.
CONFIG = mnist.Config(dataset="digits", epochs=7)
ROWS = {
    "units": mnist_rows.Row(
        dataclasses.replace(CONFIG, lam=(0.5, 1.5, 2.5)),
        seeds=(0, 1),
        published="9-8-7 (600), 1.6 %",
        weights_limit=1_000,
        error_limit=1.6,
    ),
    "curve": mnist_rows.Row(
        dataclasses.replace(CONFIG, gates="weight", weight_decay=0.25),
        seeds=(0, 1),
        published="5-4 (40), 2 %",
        weights_limit=400,
        error_limit=2.0,
    ),
    "other": mnist_rows.Row(CONFIG, seeds=(5,), published="?", weights_limit=10_000),
}


def made(row, seed, error=1.5, weights=900, **changes):
    """A result as `mnist_rows.run` records it, with made-up numbers."""

    def reached(error, weights, epoch):
        architecture = {"input": 60 + seed, "hidden1": 30, "hidden2": epoch}
        found = {"test_error": error, "weights": weights, "epoch": epoch}
        return found | {"architecture": architecture}

    config = dataclasses.replace(ROWS[row].config, seed=seed)
    return {
        "row": row,
        "study": "mnist",
        "task": f"{config.dataset} {config.model}",
        "method": config.gate,
        "seed": seed,
        "settings": mnist.scientific(config),
        "metrics": {"test error": error},
        "costs": {},
        "made": {"versions": {"jax": "1.2.3"}},
        "test_rule": "paper",
        "last": reached(error, weights, 7),
        "best_on_validation": reached(error + 0.5, weights + 1_000, 4),
        "shrunk": {"parameters": 2_000},
        "seconds": 60.0 + 10 * seed,
    } | changes


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository with a README and nothing else, whose rows are `ROWS`."""
    monkeypatch.setattr(mnist_rows, "ROWS", ROWS)
    monkeypatch.setattr(mnist_rows, "RESULTS", tmp_path / "results" / "mnist")
    monkeypatch.setattr(places, "ROOT", tmp_path)
    monkeypatch.setattr(places, "NOTES", tmp_path / "results" / "notes.md")
    monkeypatch.setattr(places, "BENCHMARKS", tmp_path / "benchmarks")
    for module, name in (
        (mnist_tables.bisection, "bisection"),
        (study_tables.channel_rows, "channel-pruning"),
        (study_tables.wide_resnet, "wide-resnet"),
        (study_tables.deciding, "deciding"),
        (study_tables.circuits, "circuits"),
        (frontier_rows, "frontier"),
    ):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results" / name)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def parsed(markdown):
    """The cells of a table, a dictionary by header for each line."""
    header, rule, *lines = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown.splitlines()
    )
    assert set(rule) == {"---"}
    return [dict(zip(header, line, strict=True)) for line in lines]


# ------------------------------------------------------------------------ the rows


@pytest.mark.parametrize("name", mnist_rows.ROWS)
def test_every_row_can_be_run(name):
    row = mnist_rows.ROWS[name]
    mnist.check(row.config)
    kind = row.config.model
    widths = mnist_training.architecture(kind, (28, 28, 1), 10)
    # Without its weights, whose first values take seconds.
    model = nnx.eval_shape(lambda: models.make(kind, widths, rngs=nnx.Rngs(0)))
    model.reads.set_value(np.ones(model.reads.shape, bool))
    groups = models.structure(model).groups
    if row.config.gates == "weight":
        groups = mnist_training.weight_groups(
            nnx.to_pure_dict(nnx.state(model, nnx.Param))
        )
    for field in ("lam", "keep_prob"):
        values = getattr(row.config, field)
        if values is not None:
            assert set(mnist_training.per_layer(field, values, groups)) == set(groups)
    assert len(row.seeds) == len(set(row.seeds)) > 0
    # The table compares with both or with neither.
    assert (row.weights_limit is None) == (row.error_limit is None)
    # Where it is written is the row's to say, not its settings'.
    assert row.config.out is None
    assert not row.config.resume


def test_no_two_rows_run_the_same():
    configs = [row.config for row in mnist_rows.ROWS.values()]
    settings = [json.dumps(mnist.scientific(config)) for config in configs]
    assert len(settings) == len(set(settings))


def test_committed_results_are_those_of_the_commands():
    """The settings of every line are the ones that its command would run today."""
    stale = []
    for line in COMMITTED:
        row = mnist_rows.ROWS[line["row"]]
        wanted = mnist.scientific(dataclasses.replace(row.config, seed=line["seed"]))
        # Lines from before there was compaction, or mixtures, were run without it.
        found = {"compact": False, "pair": None} | line["settings"]
        for field in wanted.keys() | found.keys():
            if field in COMPACTION and not found["compact"]:
                continue
            pair = [where.get(field, "nothing") for where in (found, wanted)]
            if pair[0] != pair[1]:
                stale.append((line["row"], line["seed"], field, *pair))
        assert line["seed"] in row.seeds
        assert line["test_rule"] == line["settings"]["test_rule"]
        assert line["last"]["epoch"] == line["settings"]["epochs"]
        assert line["best_on_validation"]["epoch"] <= line["settings"]["epochs"]
        assert line["shrunk"]["max_relative_difference"] <= 1e-5
    assert not stale, "row, seed, field, found, wanted"


def test_committed_networks_have_the_widths_that_are_reported():
    for line in COMMITTED:
        found = line["shrunk"]["architecture"]
        widths = (
            [found["reads"], *found["features"][1:-1]]
            if line["settings"]["model"] == "mlp"
            else [*found["maps"], found["reads"], found["hidden"]]
        )
        reported = line["last"]["architecture"]
        # One unit stays of a group that lost all.
        assert widths == [max(n, 1) for n in reported.values()]
        assert line["dead"] == [name for name, n in reported.items() if n == 0]


def test_committed_results_are_sorted_and_none_counts_twice():
    order = list(mnist_rows.ROWS)
    places = [(order.index(line["row"]), line["seed"]) for line in COMMITTED]
    assert places == sorted(set(places))


def test_a_result_takes_the_place_of_an_older_one(place):
    assert results.read(mnist_rows.RESULTS) == []
    cases = [("curve", 1), ("units", 1), ("other", 5), ("units", 0), ("curve", 0)]
    for name, seed in cases:
        mnist_rows.record(made(name, seed))
    order = [("units", 0), ("units", 1), ("curve", 0), ("curve", 1), ("other", 5)]
    expected = [made(name, seed) for name, seed in order]
    assert results.read(mnist_rows.RESULTS) == expected
    newer = made("curve", 0, error=9.0)
    mnist_rows.record(newer)
    expected[2] = newer
    assert results.read(mnist_rows.RESULTS) == expected
    # The same again changes nothing, to the byte.
    before = (mnist_rows.RESULTS / results.LINES).read_bytes()
    mnist_rows.record(newer)
    assert (mnist_rows.RESULTS / results.LINES).read_bytes() == before


def test_a_row_that_is_no_longer_known_stays_at_the_end(place):
    gone = made("curve", 0) | {"row": "gone"}
    results.put(mnist_rows.RESULTS, [gone])
    mnist_rows.record(made("other", 5))
    assert results.read(mnist_rows.RESULTS) == [made("other", 5), gone]


@pytest.fixture
def ran(place, monkeypatch):
    """The rows and seeds that were run, of which none really is."""
    ran = []
    monkeypatch.setattr(mnist_rows, "run", lambda name, seed: ran.append((name, seed)))
    return ran


@pytest.mark.parametrize("names", [("nope",), ("units", "nope")])
def test_an_unknown_row_is_named_before_any_is_run(names, ran):
    with pytest.raises(SystemExit) as stop:
        mnist_rows.main(Arguments(rows=names))
    said = str(stop.value.code)
    assert all(word in said for word in ("'nope'", *ROWS))
    assert ran == []


def test_without_a_row_it_says_which_there_are(ran):
    with pytest.raises(SystemExit) as stop:
        mnist_rows.main(Arguments())
    assert all(word in str(stop.value.code) for word in ("give one", *ROWS))
    assert ran == []


def test_the_list_shows_all_settings_and_runs_nothing(ran, capsys):
    mnist_rows.main(Arguments(list=True))
    lines = capsys.readouterr().out.splitlines()

    def told(line):
        parts = re.findall(r"([\w.]+) = (.*?)(?=, [\w.]+ = |$)", line)
        return dict(parts)

    usual, *others = lines
    for line, (name, row) in zip(others, ROWS.items(), strict=True):
        assert line.startswith(f"{name}: ")
        its = mnist.scientific(row.config)
        assert told(usual) | told(line) == {n: str(v) for n, v in its.items()}
    assert ran == []


def test_rows_are_run_with_their_seeds_or_those_asked_for(ran):
    mnist_rows.main(Arguments(rows=("other", "units")))
    assert ran == [("other", 5), ("units", 0), ("units", 1)]
    ran.clear()
    mnist_rows.main(Arguments(rows=("units", "curve"), seeds=(3,)))
    assert ran == [("units", 3), ("curve", 3)]


# ------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # With quantiles of Student's t as printed in tables: 12.706, 4.303, 3.182.
        ([0.0, 2.0], "1.00 ± 12.71"),
        ([1.0, 4.0, 7.0], "4.00 ± 7.45"),
        ([1.4, 1.5, 1.7], "1.53 ± 0.38"),
        ([2.0, 2.0, 4.0, 4.0], "3.00 ± 1.84"),
        ([0.5, 0.5, 0.5], "0.50 ± 0.00"),
    ],
)
def test_interval_is_that_of_student(values, expected):
    assert printing.interval(values) == expected
    assert printing.interval(value for value in values) == expected


def test_interval_of_one_value_and_of_large_ones():
    assert printing.interval([1.234]) == "1.23"
    assert printing.interval([69_266.4], 0) == "69,266"
    assert printing.interval([1e4, 1.2e4], 0) == "11,000 ± 12,706"


@pytest.mark.parametrize("limit", [0.2, 0.5, 1.0, 1.2, 1.4, 1.6, 1.8])
def test_a_limit_is_kept_if_the_printed_number_keeps_it(limit):
    row = dataclasses.replace(ROWS["units"], error_limit=limit)
    for below, above in itertools.product(range(8), range(-2, 9)):
        errors = [round(limit - below / 100, 2), round(limit + above / 100, 2)]
        results = [made("units", s, error=e) for s, e in enumerate(errors)]
        printed = float(printing.interval(errors).split(" ± ")[0])
        kept = mnist_tables.verdict(row, results).startswith("within")
        assert kept == (printed <= limit), errors


@pytest.mark.parametrize(
    ("errors", "weights", "kept"),
    [
        ((1.6,), (1_000,), True),
        ((1.61,), (1_000,), False),
        ((1.6,), (1_001,), False),
        ((1.0, 2.2), (500, 1_500), True),
        ((1.0, 2.3), (500, 1_500), False),
        ((1.0, 2.2), (500, 1_503), False),
    ],
)
def test_limits_are_of_the_means_of_the_last_epoch(errors, weights, kept):
    # The best epochs, all beyond the weights' limit, don't count.
    results = [
        made("units", seed, error, count)
        for seed, (error, count) in enumerate(zip(errors, weights, strict=True))
    ]
    said = mnist_tables.verdict(ROWS["units"], results)
    assert said == ("within" if kept else "NOT within") + " 1.6 %, 1,000 weights"
    assert mnist_tables.verdict(ROWS["other"], results) == ""


# ------------------------------------------------------------------------ the text


def fill(*results):
    for result in results:
        mnist_rows.record(result)


def test_the_structured_table_says_what_was_measured(place):
    fill(made("units", 0, 1.5, 1_500), made("units", 1, 1.9, 2_500), made("curve", 0))
    (line,) = parsed(mnist_tables.structured())
    assert line["row"] == "`units`"
    assert line["published (best epoch on the test set)"] == ROWS["units"].published
    assert line["test error, last epoch"] == "1.70 ± 2.54 %"
    assert line["weights"] == "2,000 ± 6,353"
    assert line["architectures by seed"] == "60-30-7, 61-30-7"
    assert line["test error, best epoch on validation"] == "2.20 ± 2.54 %"
    assert line["its weights"] == "3,000 ± 6,353"
    assert (line["seeds"], line["epochs"]) == ("2", "7")
    assert line["limits of last epoch"] == "NOT within 1.6 %, 1,000 weights"


def test_the_curve_has_the_rows_of_single_weights(place):
    fill(made("units", 0), made("curve", 0, 2.0, 300), made("curve", 1, 3.0, 300))
    (line,) = parsed(mnist_tables.weightwise())
    assert line == {
        "row": "`curve`",
        "network": "mlp",
        "gates": "hard_concrete",
        "c in λ = c/N": "0.1",
        "test error, last epoch": "2.50 ± 6.35 %",
        "weights left": "300 ± 0",
        "units that still reach anything": "60-30-7, 61-30-7",
        "parameters of the network of these units": "2,000 ± 0",
        "seeds": "2",
        "epochs": "7",
        "published network of units": "5-4 (40), 2 %",
        "limits of last epoch": "NOT within 2.0 %, 400 weights",
    }


def test_settings_are_those_that_are_not_defaults(place):
    fill(made("units", 0), made("units", 1), made("curve", 0), made("other", 5))
    units, curve, other = parsed(mnist_tables.settings())
    changed = "settings that are not defaults"
    assert units["command"] == f"`{mnist_rows.command('units')}`"
    assert units[changed] == "lam [0.5, 1.5, 2.5]"
    assert curve[changed] == "gates weight, weight_decay 0.25"
    assert other[changed] == "defaults"
    assert (units["test-time rule"], units["JAX"]) == ("paper", "1.2.3")


def test_every_row_stands_in_one_of_the_two_tables(place):
    fill(made("units", 0), made("curve", 0), made("curve", 1))
    text = tables.document()
    assert Counter(re.findall(r"\n\| (`[a-z]+`)", text)) == {"`units`": 1, "`curve`": 1}
    for table in (
        mnist_tables.structured(),
        mnist_tables.weightwise(),
        mnist_tables.settings(),
    ):
        assert f"\n\n{table}\n\n" in text


def pruned(method, seed, **changes):
    """A made-up line of channel pruning."""
    recipe = {"epochs": 4}
    told = {"model": "tiny", "dataset": "digits", "examples": None, "width": 0.5}
    told |= {"ratio": 0.5, "base": recipe, "tune": recipe, "epsilon": 0.001}
    errors = {"base test error": 10.0, "pruned test error": 30.0, "test error": 12.0}
    return {
        "row": study_tables.channel_rows.COMPARISON,
        "study": "channel_pruning",
        "task": "digits tiny",
        "settings": told,
        "method": method,
        "seed": seed,
        "metrics": errors,
        "costs": {},
        "made": {},
        "params": [100, 50],
        "macs": [90, 30],
        "latency": [3e-3, 2e-3],
        "seconds": None,
        "kept": {"a": 2},
        "sizes": {"a": 4},
    } | changes


def test_channel_pruning_is_printed(place):
    assert study_tables.channels() == ""
    rows = study_tables.channel_rows
    rows.record([pruned("dcp", seed) for seed in (0, 1)])
    text = study_tables.channels()
    assert text in tables.document()
    assert "all training images" in text
    assert "| dcp | 12.00 ± 0.00 | +2.00" in text
    assert "widths.png" not in text
    assert "###" not in text
    told = pruned("dcp", 0)["settings"]
    weighed = {"row": "discrimination-1", "settings": told | {"discrimination": 1.0}}
    rows.record([pruned("dcp_adapt", 0, kept={"a": 1}), pruned("dcp", 0, **weighed)])
    text = study_tables.channels()
    assert "widths.png" in text
    assert "### The weight of the additional loss: DCP, 50% of the channels" in text
    assert "| 1 | 30.00 | 1 |" in text
    assert "DCP-Adapt: where" not in text


def test_gates_on_a_wide_network_are_printed(place):
    assert study_tables.wide() == ""
    told = {"target": 0.5, "depth": 10, "factor": 1, "examples": 5120}
    told |= {"dataset": "digits", "recipe": {"epochs": 9}}
    result = {
        "study": "wide_resnet",
        "task": "digits WRN-10-1",
        "method": "fixed",
        "settings": told,
        "shares": [0.9, 0.505],
        "costs": {"macs": 0.52, "macs expected": 0.505},
        "metrics": {"test error": 40.0, "removed test error": 40.0},
        "made": {},
    }
    closed = {"method": "λ, the weights' rate", "metrics": {"test error": 40.0}}
    new = [result | {"seed": seed} for seed in (0, 1)] + [result | closed | {"seed": 0}]
    study = study_tables.wide_resnet
    results.put(study.RESULTS, new, study.ORDER)
    text = study_tables.wide()
    assert text in tables.document()
    assert "--variant all --seeds 0 1 --record" in text
    assert "5,120 images of digits, 9 epochs" in text
    lines = parsed("\n".join(x for x in text.splitlines() if x.startswith("|")))
    assert lines[0]["test error when removed"] == "a layer has closed"
    assert lines[1]["off the target"] == "+1.0 %, +1.0 %"
    assert lines[1]["at the end"] == "50.50 ± 0.00 %"
    assert lines[1]["seeds"] == "2"


def test_benchmarks_and_notes_are_printed(place):
    entry = {"what": "a / b", "value": "1.31", "limit": "1.2", "detail": "of 9 runs"}
    verdicts = ("within", "NOT within")
    lines = [entry | {"verdict": verdict} for verdict in verdicts]
    (place / "benchmarks").mkdir()
    for name, one in zip(("structure.jsonl", "steps.jsonl"), lines, strict=True):
        (place / "benchmarks" / name).write_text(json.dumps(one) + "\n")
    (place / "results").mkdir()
    (place / "results" / "notes.md").write_text("\n## Notes\n\nA remark.\n\n")
    _, first, second = re.split(
        "### .*`python -m .*`\n\n", benchmark_tables.benchmarks()
    )
    found = parsed(first.strip()) + parsed(second.strip())
    assert [line[""] for line in found] == ["NOT within", "within"]
    assert found[0].items() >= {"measured": "1.31", "limit": "1.2"}.items()
    assert found[0].items() >= {"what": "a / b", "detail": "of 9 runs"}.items()
    text = tables.document()
    assert benchmark_tables.benchmarks() in text
    assert "`python -m benchmarks.steps`" in text
    assert text.endswith("\n\n## Notes\n\nA remark.\n")


def test_every_benchmark_is_printed():
    modules = {file.stem for file in places.BENCHMARKS.parent.glob("*.py")}
    shared = {"__init__", "__main__", "killed", "measure", "networks", "vision"}
    assert {*benchmark_tables.BENCHMARKED, "zoo"} == modules - shared


def test_benchmarks_stand_in_one_table(place, monkeypatch, capsys):
    (place / "benchmarks").mkdir()
    monkeypatch.setattr(measure, "RESULTS", place / "benchmarks")
    for name in ("steps", "sweeps"):
        entries = [measure.entry(f"of {name}", 0.5, 1.0, "×", "x")]
        entries += [measure.entry("b", 2.0, 1.0, "", "")]
        text = "".join(json.dumps(each) + "\n" for each in entries)
        (place / "benchmarks" / f"{name}.jsonl").write_text(text)
    monkeypatch.setattr("sys.argv", ["benchmarks", "sweeps", "steps", "--recorded"])
    every_benchmark.main()
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["benchmark", "what", "measured"]
    assert [row.split()[0] for row in rows] == ["sweeps", "sweeps", "steps", "steps"]
    assert {row.index("0.50×") for row in (rows[0], rows[2])} == {header.index("meas")}
    assert "NOT within" in rows[1]


@pytest.mark.slow
def test_a_benchmark_is_measured_in_a_process_of_its_own(tmp_path):
    (row, *_) = every_benchmark.measured("run_folders", ["--turns", "3"], tmp_path)
    assert row[0] == "run_folders"
    assert row[4] == "within"
    (failed,) = every_benchmark.measured("steps", ["--turns", "x"], tmp_path)
    assert failed[1] == "it failed"


@pytest.mark.parametrize("name", ["kill", "gpu"])
def test_a_benchmark_that_there_is_not_is_refused(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", name])
    with pytest.raises(SystemExit):
        every_benchmark.main()
    assert f"no benchmark is {name}: steps, " in capsys.readouterr().err


def zoo_row(model, **more):
    found = {
        "parameters": 1234,
        "equations": 56,
        "seconds": 0.256,
        "us_per_equation": 45.4,
        "groups": 7,
        "covered": 0.125,
        "half": 0.0625,
        "unknown": ["fft", "sort"],
        "frozen": {"it is an output": 0.5, "it is indexed": 0.25},
    }
    check = {"outputs": 2e-7, "gradients": 3e-7, "input gradients": 4e-6}
    checks = {"one left": check, "40 % closed": check | {"outputs": 5e-7}}
    checks["groups gone"] = check
    row = {"model": model, "package": "flax", "version": "1.2", "small": found}
    row |= {"batch": "any", "floating inputs": True}
    return row | {"checks": checks, "broken": ""} | more


def test_models_of_the_zoo_are_printed_with_their_exceptions(place):
    """The large size where there is one, and the worst of what was compared."""
    (place / "benchmarks").mkdir()
    whole = zoo_row("a")["small"] | {"covered": 1.0, "parameters": 56_789}
    failed = {"model": "c", "package": "flax", "version": "1", "error": "TypeError: x"}
    rows = [zoo_row("a", large=whole, published=True)]
    rows += [zoo_row("b", broken="one left: costs")]
    exact = {"outputs": 1e-15, "gradients": 3e-13, "input gradients": 0.0}
    more = {"in float64": {"one left": exact}, "published": False}
    rows += [zoo_row("d", large=whole, **more)]
    del rows[0]["checks"]["groups gone"]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, failed])
    (place / "benchmarks" / "zoo.jsonl").write_text(text)
    zoo = benchmark_tables.zoo()
    _, table = re.findall(r"(?:\|.*\|\n)+", zoo)
    small, published, ours = parsed(table)
    assert small["model"] == "`b` (small)"
    assert small["package"] == "flax 1.2"
    assert small["covered"] == "12 %"
    assert (small["outputs"], small["gradients"]) == ("5e-07", "4e-06")
    assert small["no rule for"] == "fft, sort"
    assert published["model"] == "`a`"
    assert published["parameters"] == "56,789"
    assert published["covered"] == "100 %"
    assert ours["model"] == "`d` (our sizes)"
    assert "themselves): `d` 3e-13." in zoo
    assert ours["gradients"] == "4e-06"
    assert "not compared there: `a`." in zoo
    assert "- `b`: one left: costs\n- `c`: TypeError: x\n\n" in zoo
    assert zoo.endswith("\n\n- `b`: 50.0 %: it is an output; 25.0 %: it is indexed")
    assert zoo in tables.document()


def test_the_zoo_is_held_against_its_limits(place):
    """The worst of all models, and how many are beyond the limit."""
    (place / "benchmarks").mkdir()
    whole = zoo_row("a")["small"] | {"covered": 0.99, "us_per_equation": 120.4}
    far = {"outputs": 3e-5, "gradients": 2e-4, "input gradients": 0.0}
    rows = [zoo_row(f"m{i}", small=whole) for i in range(40)]
    rows += [zoo_row("b", **{"floating inputs": False})]
    rows += [zoo_row("c", batch="fixed", checks={"one left": far})]
    file = place / "benchmarks" / "zoo.jsonl"

    def limits(rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return parsed(re.findall(r"(?:\|.*\|\n)+", benchmark_tables.zoo())[0])

    covered, outputs, gradients, inputs, reading = limits(rows)
    assert covered["measured"] == "40 of 42"
    assert covered[""] == "within"
    assert outputs["measured"] == "3e-05"
    assert outputs["the worst"] == "`c`; 1 beyond the limit"
    assert outputs[""] == gradients[""] == reading[""] == "NOT within"
    assert inputs[""] == "within"
    assert reading["measured"] == "120"
    assert reading["the worst"] == "`m0`; 40 beyond the limit"
    assert "without gradients: `b`." in benchmark_tables.zoo()
    near = {"in float64": {"one left": dict.fromkeys(far, 1e-9)}}
    _, outputs, gradients, *_ = limits([*rows[:-1], rows[-1] | near])
    assert (outputs["measured"], outputs[""]) == ("5e-07", "within")
    covered, outputs, *_ = limits(rows[1:41])
    assert covered["measured"] == "39 of 40"
    assert (covered[""], outputs[""]) == ("NOT within", "within")


def test_in_the_readme_only_the_table_changes(place):
    fill(made("units", 0), made("units", 1, 1.7), made("curve", 0))
    text = tables.quoted(README)
    above, below = README.split(BEFORE)[0], README.split(AFTER)[1]
    assert text.startswith(f"{above}{BEFORE}\n| row |")
    assert text.endswith(f" |\n{AFTER}{below}")
    table = text.split(BEFORE)[1].split(AFTER)[0].strip()
    assert parsed(table) == [
        {
            "row": "`units`",
            "published": ROWS["units"].published,
            "test error": "1.60 ± 1.27 %",
            "weights": "900 ± 0",
            "architectures by seed": "60-30-7, 61-30-7",
        }
    ]
    assert tables.quoted(text) == text


# ----------------------------------------------------------------------- the files


def test_the_check_passes_once_both_files_are_written_and_only_then(place):
    fill(made("units", 0))
    with pytest.raises(SystemExit, match=r"RESULTS\.md .*experiments\.tables"):
        tables.main(check=True)
    assert not (place / "RESULTS.md").exists()
    assert (place / "README.md").read_text() == README
    tables.main(check=False)
    tables.main(check=True)
    assert (place / "RESULTS.md").read_text() == tables.document()
    assert (place / "README.md").read_text() == tables.quoted(README)
    # Nothing has changed, nothing is written.
    written = [(place / name).read_bytes() for name in ("RESULTS.md", "README.md")]
    tables.main(check=False)
    again = [(place / name).read_bytes() for name in ("RESULTS.md", "README.md")]
    assert again == written


@pytest.mark.parametrize("name", ["RESULTS.md", "README.md"])
def test_the_check_fails_if_a_file_was_edited_by_hand(place, name):
    fill(made("units", 0))
    tables.main(check=False)
    file = place / name
    edited = file.read_text().replace("900", "800", 1)
    assert edited != file.read_text()
    file.write_text(edited)
    with pytest.raises(SystemExit, match=f"{name} does not say") as stop:
        tables.main(check=True)
    assert stop.value.code not in (0, None)
    assert file.read_text() == edited


@pytest.mark.parametrize("result", [made("units", 0, 9.0), made("units", 1)])
def test_the_check_fails_after_another_result(place, result):
    fill(made("units", 0))
    tables.main(check=False)
    fill(result)
    with pytest.raises(SystemExit, match="does not say what the results say"):
        tables.main(check=True)


WITHOUT_MARKERS = {
    "none": "# Name\n",
    "only the first": README.replace(AFTER, ""),
    "only the second": README.replace(BEFORE, ""),
    "two tables": README + README,
    "the wrong way round": f"{AFTER}\n{BEFORE}\n",
}


@pytest.mark.parametrize("kind", WITHOUT_MARKERS)
def test_a_readme_without_its_markers_is_an_error_that_names_them(place, kind):
    fill(made("units", 0))
    readme = WITHOUT_MARKERS[kind]
    (place / "README.md").write_text(readme)
    with pytest.raises(SystemExit) as stop:
        tables.main(check=False)
    assert all(word in str(stop.value.code) for word in ("README.md", BEFORE, AFTER))
    assert (place / "README.md").read_text() == readme
    assert not (place / "RESULTS.md").exists()


def test_each_comparison_of_families_is_printed(place):
    """Of each family the λ that validation prefers among those that prune enough."""
    assert study_tables.compared() == ""
    folder = place / "experiments" / "results" / "families-mnist-mlp"
    folder.mkdir(parents=True)
    lines = results.read(RESULTS / folder.name)
    names = ("hard_concrete", "smooth_step", "information_bottleneck")
    results.put(folder, [line for line in lines if line["family"] in names])
    text = study_tables.compared()
    assert "experiments/results/families-mnist-mlp/figures/frontier-weights.png" in text
    named = "--families hard_concrete information_bottleneck smooth_step --out experi"
    assert f"`python -m experiments.families {named}" in text
    table = parsed("\n".join(x for x in text.splitlines() if x.startswith("|")))
    found = {line["family"]: line for line in table}
    assert set(found) == set(names)
    # It removes too little at every λ.
    assert found["smooth_step"]["c in λ = c/N"] == "none"
    # Its gates are above 1, too: none is undecided in the sense of the others.
    assert found["information_bottleneck"]["gates undecided"] == ""
    assert found["hard_concrete"]["c in λ = c/N"] == "0.15"
    left = float(found["hard_concrete"]["weights"].split(" ")[0].replace(",", ""))
    assert left <= 0.26 * 266_200


# ----------------------------------------------------------- soft knowledge relocation


@pytest.mark.sweep
@pytest.mark.parametrize("name", study_tables.RELOCATIONS)
def test_the_command_of_a_relocation_makes_the_runs_that_are_committed(name):
    folder = RESULTS / f"relocation-{name}"
    rows = results.read(folder)
    arguments = study_tables.RELOCATIONS[name].split()
    arguments += ["--seeds", *map(str, sorted({row["seed"] for row in rows}))]
    config = relocation.resolved(
        tyro.cli(Annotated[relocation.Config, tyro.conf.arg(name="")], args=arguments)
    )
    runs = Counter(
        (r["arm"], r["ratio"], r["budget"], r["heuristic"], r["seed"]) for r in rows
    )
    assert runs == Counter(
        itertools.product(
            *(config.arms, config.ratios, config.budgets),
            *(config.heuristics, config.seeds),
        )
    )
    of = {(r["settings"]["model"], r["settings"]["dataset"]) for r in rows}
    assert of == {(config.model, config.dataset)}
    # Drawn from these lines alone.
    assert (folder / "table.md").read_text().strip() == relocation_report.table(rows)
    assert (folder / "figures" / "spread.png").exists()


def test_relocations_are_told():
    text = study_tables.relocations()
    for name in study_tables.RELOCATIONS:
        table = (RESULTS / f"relocation-{name}" / "table.md").read_text()
        assert table.strip() in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (places.ROOT / link).exists(), link


@pytest.mark.parametrize("flag", ["--help", "--chekc", "RESULTS.md"])
def test_a_flag_that_is_none_writes_nothing(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables", flag])
    monkeypatch.setattr(tables, "main", lambda check: pytest.fail("it wrote"))
    with pytest.raises(SystemExit) as stopped:
        tables.cli()
    assert stopped.value.code == (0 if flag == "--help" else 2)
    assert "--check" in "".join(capsys.readouterr())


def test_no_result_names_a_folder_of_the_machine_that_made_it():
    path = re.compile(r'(?:^|[,"` ])/[a-z]+/[a-z]+/', re.MULTILINE)
    for folder in (places.RESULTS, places.BENCHMARKS):
        for file in folder.rglob("*"):
            if file.suffix in (".csv", ".jsonl", ".md"):
                found = path.search(file.read_text())
                assert found is None, (file, found)
