"""Rows of the frontier are recorded as they come, and printed beside published ones."""

import copy

import pytest

from experiments import frontier, frontier_rows
from experiments.harness import results
from experiments.reports import places
from tests.test_frontier import TINY

ROW = frontier_rows.Row(TINY, "97-71-33 of somebody (1999), best epoch", 50.0)
LINE = {
    "row": "row",
    "study": "frontier",
    "task": "mnist mlp",
    "method": "hard_concrete on units",
    "seed": 0,
    "settings": {"dense": 2, "closing": 4, "tuning": 2, "distil": 0.9},
    "metrics": {"test error": 1.604, "dense test error": 1.25},
    "costs": {"weights": 0.036},
    "weights": 2_000,
    "architecture": {"features": [784, 71, 33, 10], "reads": 97},
}


@pytest.fixture
def row(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier_rows, "ROWS", {"row": ROW})
    monkeypatch.setattr(frontier_rows, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(frontier_rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(places, "ROOT", tmp_path)
    return tmp_path / "results"


@pytest.mark.filterwarnings("ignore:gates are undecided")
def test_a_row_is_recorded_and_printed(row, monkeypatch):
    frontier_rows.run("row", 0)
    (line,) = results.read(row)
    assert (row / frontier_rows.PICTURE).stat().st_size > 5_000
    monkeypatch.setattr(
        frontier.Closed, "result", lambda self: {**line, "seed": self.seed}
    )
    frontier_rows.run("row", 0)
    frontier_rows.run("row", 1)
    assert [each["seed"] for each in results.read(row)] == [0, 1]
    said = frontier_rows.section()
    assert "97-71-33 of somebody (1999), best epoch" in said
    assert f"{line['metrics']['test error']:.2f}" in said
    assert "Epochs: 2 + 4 + 2 (`row`)" in said
    assert "results/frontier.png" in said


def test_nothing_is_said_where_nothing_is_recorded(row):
    assert frontier_rows.section() == ""


@pytest.mark.parametrize(
    ("error", "weights", "limit", "said"),
    [
        (1.604, 2_000, 1.6, "within 1.6 %, 2,000 weights"),
        (1.606, 2_000, 1.6, "NOT within 1.6 %, 2,000 weights"),
        (1.5, 2_001, 1.6, "NOT within 1.6 %, 2,000 weights"),
    ],
)
def test_limits_are_those_of_what_is_printed(
    row, monkeypatch, error, weights, limit, said
):
    published = frontier_rows.Row(TINY, "", limit)
    monkeypatch.setattr(frontier_rows, "ROWS", {"row": published})
    line = copy.deepcopy(LINE)
    line["metrics"]["test error"], line["weights"] = error, weights
    assert frontier_rows.line("row", [line])[-1] == said


def test_sizes_are_written_as_in_papers():
    lenet5 = {"shape": [28, 28, 1], "maps": [5, 10], "reads": 76, "hidden": 16}
    assert frontier_rows.shape({**lenet5, "classes": 10}) == "5-10-76-16"
    assert frontier_rows.shape(LINE["architecture"]) == "97-71-33"
