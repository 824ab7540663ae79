"""As many features as asked for, those that tell, and a fair test of them."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest

from experiments import feature_methods, feature_report, feature_selection
from experiments.feature_methods import METHODS, Recipe
from experiments.feature_selection import Config
from experiments.harness import json_lines, results
from experiments.reports import places, runs
from experiments.tasks import tables
from experiments.tasks.dataset import Dataset, Split

SHORT = Recipe(hidden=8, selecting=40, training=30, gate_rates=(0.1,))
QUICK = Config(
    data=("xor_20",),
    methods=("hard_concrete", "forest", "lasso", "random", "all"),
    seeds=(0, 1),
    selecting=1_200,
    training=300,
    gate_rates=(0.05,),
    progress=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = dataclasses.replace(QUICK, out=tmp_path_factory.mktemp("run"))
    feature_selection.main(config)
    return config.out


# ------------------------------------------------------------------------- the choice


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
def test_exactly_as_many_features_are_kept_as_asked_for(method):
    for package in feature_methods.NEEDS.get(method, ()):
        pytest.importorskip(package)
    table, counts = tables.load("wine", 0), (3, 7)
    found = feature_methods.candidates(method, table, counts, SHORT, 0)
    assert set(found) == ({13} if method == "all" else {*counts})
    for k, tried in found.items():
        assert tried
        for features in tried.values():
            assert features.tolist() == sorted({*features.tolist()})
            assert len(features) == k
            assert 0 <= features.min() <= features.max() < 13


@pytest.mark.parametrize("method", ["stochastic", "lasso", "forest"])
def test_what_is_held_out_chooses_nothing(method):
    table = tables.load("wine", 0)
    held_out = tables.Part(-table.test.inputs, 2 - table.test.labels)
    other = dataclasses.replace(table, validation=held_out, test=held_out)
    one, two = (
        feature_methods.candidates(method, each, (5,), SHORT, 0)[5]
        for each in (table, other)
    )
    for setting, features in one.items():
        np.testing.assert_array_equal(features, two[setting])


def test_what_tells_only_in_company_is_found_by_gates_and_not_by_a_linear_model(folder):
    lines = results.read(folder)
    of = {(line["method"], line["seed"]): line for line in lines}
    for seed in QUICK.seeds:
        assert of["hard_concrete", seed]["features"] == [0, 1]
        assert of["hard_concrete", seed]["metrics"]["test error"] < 10
        assert of["lasso", seed]["features"] != [0, 1]
        assert of["random", seed]["metrics"]["test error"] > 30
    said = feature_report.known(lines)
    assert "| hard_concrete | 2 of 2 |" in said
    assert "| lasso | 0 of 2 |" in said


def test_a_closed_gate_opens_as_often_as_its_family_s_bound_says():
    for method, share in (("stochastic", 0.0228), ("hard_concrete", 0.047)):
        gate = feature_methods.learned(method, 10)
        leak = feature_methods.open_when_closed(gate, 10)
        assert leak == pytest.approx(share, abs=5e-4), method


# --------------------------------------------------------------------------- the test


def test_every_method_s_network_takes_the_same_steps(monkeypatch, tmp_path):
    taken = []
    whole = feature_methods.orders

    def orders(seed, examples, recipe, steps):
        found = whole(seed, examples, recipe, steps)
        taken.append((examples, found.shape))
        return found

    config = Config(data=("wine",), seeds=(0,), out=tmp_path, progress=False)
    config = dataclasses.replace(config, selecting=10, training=33, gate_rates=(0.1,))
    monkeypatch.setattr(feature_methods, "orders", orders)
    for method in ("forest", "random", "all"):
        list(feature_selection.chosen(config, "wine", 0, method, (5,)))
    # The last network learns from what settings were chosen with, too.
    assert taken == 3 * [(106, (33, 32)), (142, (33, 32))]


@pytest.mark.parametrize(("examples", "steps"), [(106, 33), (20, 5), (64, 1)])
def test_steps_are_passes_over_the_examples(examples, steps):
    order = np.asarray(feature_methods.orders(0, examples, SHORT, steps))
    assert order.shape == (steps, min(32, examples))
    first = order[: max(examples // 32, 1)].ravel()
    assert len({*first.tolist()}) == len(first)
    assert order.max() < examples


def test_a_network_sees_its_features_alone():
    table = tables.load("wine", 0)
    features = np.array([1, 4, 6])
    other = table.train.inputs.copy()
    other[:, [0, 2, 12]] = 7.0
    one, two = (
        feature_selection.tested(
            tables.Part(inputs, table.train.labels), table.test, features, SHORT, 0
        )
        for inputs in (table.train.inputs, other)
    )
    assert one == two
    other[:, 4] = 7.0
    changed = tables.Part(other, table.train.labels)
    assert feature_selection.tested(changed, table.test, features, SHORT, 0) != one


def test_the_setting_with_the_smallest_validation_loss_stays(monkeypatch, tmp_path):
    tried = {3: {"a": np.arange(3), "b": np.arange(3, 6), "c": np.arange(6, 9)}}
    table = tables.load("wine", 0)
    seen = []

    def tested(part, other, features, recipe, seed):
        seen.append(len(other.labels) == len(table.test.labels) and len(part.labels))
        # On the test part "c" would be the best.
        loss = float(abs(features[0] - (3 if len(part.labels) == 106 else 6)))
        return {"loss": loss, "error": loss / 10}

    monkeypatch.setattr(feature_methods, "candidates", lambda *_: tried)
    monkeypatch.setattr(feature_selection, "tested", tested)
    (line,) = feature_selection.chosen(QUICK, "wine", 0, "forest", (3,))
    assert (line["setting"], line["features"]) == ("b", [3, 4, 5])
    assert line["metrics"]["test error"] == pytest.approx(30.0)
    assert seen.count(142) == 1, "the test part is read once"


# -------------------------------------------------------------------------- the record


def test_what_is_there_is_not_run_again(folder, tmp_path, monkeypatch):
    lines = results.read(folder)
    assert len(lines) == 2 * len(QUICK.methods)
    config = dataclasses.replace(QUICK, out=tmp_path)
    left = [each for each in lines if (each["method"], each["seed"]) != ("forest", 1)]
    json_lines.write(tmp_path / results.LINES, left)
    run = []
    whole = feature_methods.candidates

    def candidates(method, *rest):
        run.append(method)
        return whole(method, *rest)

    monkeypatch.setattr(feature_methods, "candidates", candidates)
    again = feature_selection.main(config)
    assert run == ["forest"]
    for one, other in zip(lines, again, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    feature_selection.main(config)
    assert run == ["forest"]


def test_lines_are_compared_as_those_of_any_study(folder):
    found = runs.runs(folder)
    assert {result.task for result in found} == {
        "xor_20, 2 of 22 features",
        "xor_20, 22 of 22 features",
    }
    assert {result.costs["features"] for result in found} == {2 / 22, 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ("iris",)}, "unknown data set 'iris'; there is mnist, breast_cancer"),
        ({"methods": ("ridge",)}, "unknown method 'ridge'; there is .*lasso"),
        ({"counts": (5, 23)}, "23 features are to be kept, and xor_20 has 22: .*1 to"),
        ({"counts": (0,)}, "0 features are to be kept, and xor_20 has 22"),
        ({"seeds": ()}, "at least one data set, one method and one seed"),
        ({"selecting": 0}, "selecting must be at least 1, got 0"),
        ({"training": -1}, "training must be at least 1, got -1"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"gate_rates": (0.1, 0.0)}, "gate_rates must be > 0, got 0.0"),
        ({"hidden": 7}, "holds results of xor_20 with hidden = 64, and this is with 7"),
    ],
)
def test_what_cannot_be_run_is_refused(folder, changes, message):
    config = dataclasses.replace(QUICK, out=folder, **changes)
    with pytest.raises(ValueError, match=message):
        feature_selection.main(config)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(feature_methods.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs lassonet and torch.*pip install"):
        feature_methods.check(("forest", "lassonet"))
    feature_methods.check(("forest",))


def test_the_command_prints_the_tables(folder, monkeypatch, capsys):
    flags = ["--quick", "--data", "xor_20", "--seeds", "0", "1", "--out", str(folder)]
    flags += ["--selecting", "1200", "--training", "300", "--gate-rates", "0.05"]
    monkeypatch.setattr(sys, "argv", ["x", *flags, "--methods", "forest", "random"])
    feature_selection.cli()
    assert "| hard_concrete | 2 of 2 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["x", *flags, "--methods", "ridge"])
    with pytest.raises(SystemExit, match=r"experiments\.feature_selection: unknown"):
        feature_selection.cli()


# ---------------------------------------------------------------------------- the data


@pytest.mark.parametrize("name", [n for n in tables.NAMES if n != "mnist"])
def test_splits_share_no_example_and_are_scaled_by_the_first(name):
    table = tables.load(name, 3)
    parts = table.train, table.validation, table.test
    rows = [row.tobytes() for part in parts for row in part.inputs]
    assert len({*rows}) == len(rows)
    share = [len(part.labels) / len(rows) for part in parts]
    np.testing.assert_allclose(share, (0.6, 0.2, 0.2), atol=0.01)
    np.testing.assert_allclose(table.train.inputs.mean(axis=0), 0, atol=1e-4)
    deviation = table.train.inputs.std(axis=0)
    assert (np.isclose(deviation, 1, atol=1e-3) | (deviation == 0)).all()
    assert len(table.known.labels) == len(rows) - len(table.test.labels)
    other = tables.load(name, 4)
    assert other.test.inputs.tobytes() != table.test.inputs.tobytes()


def test_the_class_of_a_known_set_follows_from_its_first_two_features():
    for name in tables.KNOWN:
        table = tables.load(name, 0)
        assert table.truth == (0, 1)
        # Standardised, but for signs and radii near the threshold.
        one, other = table.train.inputs[:, :2].T
        said = one * other > 0 if "xor" in name else one**2 + other**2 > 2 * np.log(2)
        assert (said == table.train.labels).mean() > 0.95, name
        assert abs(table.train.labels.mean() - 0.5) < 0.05


def test_pixels_are_read_as_the_other_studies_read_them(monkeypatch):
    def load(name, validation):
        assert (name, validation) == ("mnist", 1 / 12)
        images = np.full((6, 2, 2, 1), 51, np.uint8)
        parts = [Split(images[:n], np.arange(n) % 2) for n in (6, 4, 5)]
        return Dataset("mnist", *parts, classes=2, scale=255.0)

    monkeypatch.setattr(tables.data, "load", load)
    tables.pixels.cache_clear()
    table = tables.load("mnist", 0)
    tables.pixels.cache_clear()
    assert (table.features, table.classes) == (4, 2)
    np.testing.assert_allclose(table.train.inputs, 0.2)
    assert [len(p.labels) for p in (table.train, table.validation, table.test)] == [
        *(6, 4, 5)
    ]


# -------------------------------------------------------------------------- the report


def test_stability_is_the_corrected_overlap_of_pairs():
    """Of choices of one size it is the index of Kuncheva (2007)."""
    rng = np.random.default_rng(0)
    k, features = 5, 20
    flags = np.zeros((4, features), bool)
    for own in flags:
        own[rng.choice(features // 2, k, replace=False)] = True
    by_chance = k * k / features
    pairs = [
        ((one & other).sum() - by_chance) / (k - by_chance)
        for one, other in itertools.combinations(flags, 2)
    ]
    assert feature_report.stability(flags) == pytest.approx(np.mean(pairs))
    assert feature_report.stability(flags[[0, 0, 0]]) == pytest.approx(1)
    for nothing_to_tell in (flags[:1], np.ones((3, 4), bool)):
        assert np.isnan(feature_report.stability(nothing_to_tell))


def line(data, k, method, seed, validation, error, of=784):
    settings = dataclasses.asdict(feature_selection.RECIPES.get(data, SHORT))
    return {
        "study": "feature_selection",
        "task": f"{data}, {k} of {of} features",
        "data": data,
        "k": k,
        "method": method,
        "seed": seed,
        "features": [*range(seed, seed + k)],
        "setting": "",
        "metrics": {
            "validation loss": validation,
            "validation error": 1.0,
            "test error": error,
        },
        "costs": {"features": k / of},
        "seconds": 1.0,
        "settings": settings,
        "made": {},
    }


def test_results_are_told_from_their_folder_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "ROOT", tmp_path)
    assert feature_report.section() == ""
    folder = tmp_path / "experiments" / "results" / "feature-selection"
    lines = [
        *(line("mnist", 50, "stochastic", s, 0.10, 4.0 + s) for s in (0, 1, 2)),
        # Better on the test images, which choose nothing.
        *(line("mnist", 50, "bernoulli-straight_through", s, 0.2, 3.0) for s in (0, 1)),
        *(line("mnist", 50, "lasso", s, 0.05, 9.5 + s) for s in (0, 1)),
        line("mnist", 784, "all", 0, 0.01, 2.0),
        *(line("wine", k, "forest", 0, 0.2, 10.0, 13) for k in (5, 10)),
        line("ring_50", 2, "lasso", 0, 0.2, 10.0, 52),
    ]
    json_lines.write(folder / results.LINES, lines)
    feature_report.write(folder)
    said = feature_report.section()
    for text in (
        "`stochastic`, the best family of gates by validation, keeps 95.00 ± 2.48 %",
        "-0.60 points from the larger",
        "| lasso | 90.00 ± 6.35 | -5.50 ± 0.00 | 0.98 |",
        "| all 784 | 98.00 |",
        "| forest | 90.00 |",
        "| lasso | 1 of 1 |",
        "one hidden layer of 8 (256 on mnist) units",
    ):
        assert text in said, text
    assert (folder / "table.md").read_text().strip() in said
    assert len((folder / "runs.csv").read_text().splitlines()) == len(lines) + 1
    for name in ("accuracy", "pixels"):
        assert f"feature-selection/figures/{name}.png)" in said
        assert (folder / "figures" / f"{name}.png").stat().st_size > 10_000


def test_committed_results_are_those_of_the_recipes():
    folder = places.ROOT / "experiments" / "results" / "feature-selection"
    lines = results.read(folder)
    assert lines
    for each in lines:
        wanted = feature_selection.told(Config(), each["data"])
        assert each["settings"] == json.loads(json.dumps(wanted))
        assert len({*each["features"]}) == each["k"]
    assert lines == results.sort(lines, feature_selection.ORDER)
    tables_there = (folder / "table.md").read_text().strip()
    assert tables_there == feature_report.document(lines)
