"""Rows of channel pruning: run, recorded, printed and drawn."""

import dataclasses

import numpy as np
import pytest
from test_channel_pruning import CONFIG, tiny  # noqa: F401

from experiments import channel_pruning, channel_report, channel_rows, mnist_rows
from experiments.channel_methods import METHODS
from experiments.channel_settings import check
from experiments.harness import results, run_folder
from experiments.harness.rows import OfMethods
from experiments.tasks.dataset import DataError
from experiments.tasks.images import Recipe


def line(
    method="dcp", seed=0, row="comparison", settings=None, metrics=None, **changes
):
    return {
        "row": row,
        "study": "channel_pruning",
        "task": "digits tiny",
        "settings": {"model": "tiny", "width": 1.0, "ratio": 0.5, **(settings or {})},
        "method": method,
        "seed": seed,
        "metrics": {
            "base test error": 10.0,
            "pruned test error": 30.0 + seed,
            "test error": 12.0 + seed,
            **(metrics or {}),
        },
        "costs": {},
        "made": {},
        "params": [100, 50 - 10 * seed],
        "macs": [90, 30],
        "latency": [3e-3, 2e-3],
        "seconds": 7.0,
        "kept": {"a": 2, "b": 3 - seed},
        "sizes": {"a": 4, "b": 6},
        **changes,
    }


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(channel_rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(channel_rows, "RUNS", tmp_path / "runs")
    return tmp_path / "results"


def test_results_stand_in_the_order_of_the_rows(file):
    channel_rows.record([line("dcp", 1), line("dcp", 0), line("random", 0)])
    channel_rows.record([line("dcp", 0, row="epsilon-0.1"), line(seed=1, seconds=8.0)])
    found = results.read(channel_rows.RESULTS)
    assert [(e["row"], e["method"], e["seed"]) for e in found] == [
        ("comparison", "random", 0),
        ("comparison", "dcp", 0),
        ("comparison", "dcp", 1),
        ("epsilon-0.1", "dcp", 0),
    ]
    assert found[2]["seconds"] == 8.0
    assert len(channel_rows.recorded("comparison")) == 3


@pytest.mark.slow
def test_a_row_prunes_the_base_networks_of_the_comparison(file, monkeypatch):
    """Run twice, everything is there once."""
    small = dataclasses.replace(CONFIG, method=("filter_l1", "random"), seeds=(0, 1))
    untuned = dataclasses.replace(small.tune, epochs=0)
    other = dataclasses.replace(
        small, method=("random",), seeds=(1,), ratio=0.25, tune=untuned
    )
    monkeypatch.setattr(
        channel_rows, "ROWS", {"comparison": small, "discrimination-1": other}
    )
    for _ in range(2):
        channel_rows.main(OfMethods(("comparison", "discrimination-1")))
    found = results.read(channel_rows.RESULTS)
    assert [(e["row"], e["method"], e["seed"]) for e in found] == [
        ("comparison", "random", 0),
        ("comparison", "random", 1),
        ("comparison", "filter_l1", 0),
        ("comparison", "filter_l1", 1),
        ("discrimination-1", "random", 1),
    ]
    errors = [each["metrics"] for each in found]
    assert errors[4]["base test error"] == errors[1]["base test error"]
    assert found[4]["kept"] == {"convs.0": 3, "convs.1": 5}
    assert found[4]["settings"]["ratio"] == 0.25
    assert errors[4]["test error"] == errors[4]["pruned test error"]
    assert not (channel_rows.RUNS / "discrimination-1" / "base-1").exists()


def test_only_some_methods_and_seeds(file, monkeypatch):
    small = dataclasses.replace(CONFIG, method=("filter_l1", "random"), seeds=(0, 1))
    monkeypatch.setattr(channel_rows, "ROWS", {"comparison": small})
    arguments = OfMethods(("comparison",), (1,), methods=("random",))
    channel_rows.main(arguments)
    assert results.there(channel_rows.RESULTS, "method", "seed") == {("random", 1)}


@pytest.mark.parametrize(
    ("names", "words"), [(("nothing",), "unknown row 'nothing'"), ((), "one or more")]
)
def test_unknown_rows_are_named(names, words):
    with pytest.raises(SystemExit, match=words) as error:
        channel_rows.main(OfMethods(names))
    assert "comparison" in str(error.value)


def test_rows_are_listed(capsys):
    channel_rows.main(OfMethods(list=True))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[1:]] == [*channel_rows.ROWS]


def test_every_row_can_be_run():
    for config in channel_rows.ROWS.values():
        check(config, METHODS)
        assert set(config.method) <= set(METHODS)
        assert len(config.seeds) >= 3


def test_the_table_by_hand():
    text = channel_report.table([line(seed=0), line(seed=1)])
    header, _, row = (part.strip("| ").split(" | ") for part in text.splitlines())
    cells = dict(zip(header, row, strict=True))
    # Student's t for one degree of freedom is 12.71, the deviation 1 / sqrt(2).
    assert cells == {
        "method": "dcp",
        "test error, %": "12.50 ± 6.35",
        "gap, points": "+2.50 ± 6.35",
        "gap before training": "+20.50 ± 6.35",
        "above DCP, by seed": "-",
        "above DCP before training": "-",
        "parameters": "2.25× less",
        "MACs": "3.00× less",
        "latency, batch 128": "1.50× less",
        "choosing, s": "7",
        "published gap": "+0.31",
        "seeds": "2",
    }


def test_methods_are_compared_with_dcp_seed_by_seed():
    """What differs between base networks is in no interval."""
    dcp = [line(seed=s, metrics={"test error": 12.0 + 5 * s}) for s in (0, 1)]
    other = [line("thinet", s, metrics={"test error": 13.0 + 5 * s}) for s in (0, 1, 2)]
    assert channel_report.above(other, dcp) == "+1.00 ± 0.00"
    assert channel_report.above(dcp, other) == "-1.00 ± 0.00"
    assert channel_report.above(other[2:], dcp) == "-"
    assert channel_report.above(other, []) == "-"
    assert " | +1.00 ± 0.00 | " in channel_report.table([*dcp, *other])


def test_a_gap_below_the_base_network_keeps_its_sign():
    better = line(metrics={"test error": 9.5})
    assert " -0.50 " in channel_report.table([better])


def test_seconds_of_a_killed_choice_are_not_averaged():
    known, unknown = line(seed=0), line(seed=1, seconds=None)
    assert " 7 " in channel_report.table([known, unknown])
    assert " - " in channel_report.table([unknown])


def ablated(monkeypatch):
    rows = {
        **{f"discrimination-{w:g}": CONFIG for w in (0.0, 1.0)},
        "epsilon-0.1": CONFIG,
    }
    monkeypatch.setattr(channel_rows, "ROWS", {"comparison": CONFIG, **rows})
    channel_rows.record(
        [line("dcp_adapt", s, settings={"epsilon": 0.001}) for s in (0, 1)]
    )
    for name in rows:
        setting, value = name.split("-")
        told = {setting: float(value)}
        more = 5 if name == "epsilon-0.1" else 0
        channel_rows.record(
            [
                line("dcp", seed, name, told, {"test error": 12.0 + more})
                for seed in (0, 1)
            ]
        )


def test_ablations_are_in_the_order_of_their_setting(file, monkeypatch):
    ablated(monkeypatch)
    weights = channel_report.discrimination().splitlines()[2:]
    assert [row.split(" | ")[0] for row in weights] == ["| 0", "| 1"]
    assert "30.50 ± 6.35" in weights[0]
    epsilons = channel_report.epsilons().splitlines()[2:]
    assert [row.split(" | ")[0] for row in epsilons] == ["| 0.001", "| 0.1"]
    assert "12.50 ± 6.35" in epsilons[0]
    assert "17.00" in epsilons[1]
    assert "+7.00" in epsilons[1]


def test_pictures_show_what_there_is(file, monkeypatch, tmp_path):
    assert channel_report.write(tmp_path / "none") == []
    ablated(monkeypatch)
    channel_rows.record([line(m, s) for m in ("dcp", "thinet") for s in (0, 1)])
    drawn = channel_report.write(tmp_path / "drawn")
    assert [f.name for f in drawn] == ["methods.png", "widths.png", "ablations.png"]
    assert all(f.stat().st_size > 10_000 for f in drawn)


def test_only_what_differs_from_uniform_pruning_has_a_picture(file, tmp_path):
    uniform = {"kept": {"a": 2, "b": 3}, "sizes": {"a": 4, "b": 6}}
    other = line("slimming", kept={"a": 3, "b": 2})
    assert channel_report.unlike([line("dcp", **uniform), other]) == [other]
    channel_rows.record([line("dcp", **uniform)])
    assert [f.name for f in channel_report.write(tmp_path / "drawn")] == ["methods.png"]


def test_a_row_without_its_base_networks_says_what_to_run(file, monkeypatch):
    other = dataclasses.replace(CONFIG, ratio=0.25)
    monkeypatch.setattr(channel_rows, "ROWS", {"comparison": CONFIG, "other": other})
    with pytest.raises(SystemExit, match="channel_rows comparison --seeds 3` first"):
        channel_rows.main(OfMethods(("other",), (3,)))


def test_a_row_of_recorded_base_networks_says_how_one_is_made(
    file, tmp_path, monkeypatch
):
    other = dataclasses.replace(CONFIG, base_from=tmp_path / "recorded")
    monkeypatch.setattr(channel_rows, "ROWS", {"comparison": CONFIG, "other": other})
    with pytest.raises(SystemExit, match=r"cifar --model .* --seeds 3 --record` first"):
        channel_rows.main(OfMethods(("other",), (3,)))


def test_the_readme_has_the_first_row_within_one_budget(file):
    assert channel_report.short() == ""
    row = channel_report.SHORT
    channel_rows.record([line("taylor", s, row=row) for s in (0, 1)] + [line("dcp")])
    (only,) = channel_report.short().splitlines()[2:]
    errors = "12.50 ± 6.35 % | +2.50 ± 6.35 points"
    assert only == f"| taylor | {errors} | 33.3 % | 2 |"


def test_statements_pair_methods_of_one_base_network(file):
    def of(method, errors, validation):
        return [
            line(method, s, metrics={"test error": e, "validation error": validation})
            for s, e in enumerate(errors)
        ]

    lines = [
        *of("dcp", (12.0, 13.0), 11.0),
        *of("random_dcp", (12.5, 13.5, 20.0), 12.0),
        *of("l0_hard_concrete", (11.0, 12.0), 11.5),
        *of("l0_bernoulli", (9.0, 9.0), 13.0),
        *of("l0_mixture", (9.0,), 1.0),
    ]
    said = channel_report.statements(lines)
    # Of what has most seeds, and by the validation error alone.
    assert said.startswith("The best by validation, random_dcp, is +5.33")
    assert "dcp against random_dcp: -0.50 ± 0.00 points, 2 seeds" in said
    assert "l0_hard_concrete against dcp: -1.00 ± 0.00 points, 2 seeds" in said
    assert "l0_bernoulli" not in said
    assert "l0_mixture" not in said


RECIPE = dataclasses.asdict(Recipe())


def test_committed_results_are_those_of_the_rows():
    for found in results.read(channel_rows.RESULTS):
        settings = run_folder.whole(
            run_folder.settings_of(channel_rows.ROWS[found["row"]], channel_rows.UNTOLD)
        )
        # (Settings that were added since have the defaults that they then had.)
        config = {
            name: RECIPE | value if isinstance(value, dict) else value
            for name, value in found["settings"].items()
        }
        for name, value in config.items():
            assert settings[name] == value, found["row"]
        assert found["method"] in channel_rows.ROWS[found["row"]].method


def test_the_bars_are_the_gaps(file):
    worse = [line("thinet", s, metrics={"test error": 20.0 + s}) for s in (0, 1)]
    figure = channel_report.methods([line("dcp", s) for s in (0, 1)] + worse)
    before, after = figure.axes
    widths = [bar.get_width() for bar in after.patches]
    np.testing.assert_allclose(widths, [10.5, 2.5])
    assert [text.get_text() for text in before.get_yticklabels()] == ["thinet", "dcp"]


def test_methods_with_fewer_seeds_are_marked():
    figure = channel_report.methods([*(line("dcp", s) for s in (0, 1)), line("thinet")])
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert sorted(names) == ["dcp", "thinet (1 of 2 seeds)"]


def test_data_that_are_not_there_are_told_in_a_line(monkeypatch):
    def no_data(name, validation):
        raise DataError(f"{name} is not prepared")

    monkeypatch.setattr(channel_pruning.data, "load", no_data)
    for module, row in ((channel_rows, "comparison"), (mnist_rows, "mlp-uniform")):
        with pytest.raises(SystemExit, match=r"^experiments\.\w+: .* is not prepared$"):
            module.main(OfMethods(rows=(row,)))


def test_what_is_off_the_budget_is_marked():
    lines = [
        {"method": method, "macs": [100, left], "seed": seed}
        for method, left in (("a", 50), ("b", 51), ("c", 94))
        for seed in (0, 1)
    ]
    assert channel_report.off_budget(lines) == {"c": pytest.approx(0.94)}
