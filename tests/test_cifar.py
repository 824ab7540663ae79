"""A network is trained by its recipe, once, and its line says what it is worth."""

import dataclasses

import pytest

from experiments import cifar
from experiments.harness import json_lines
from experiments.reports import runs
from experiments.tasks import data
from experiments.tasks.images import Recipe

TINY = cifar.Config(
    dataset="digits",
    model="resnet20",
    width=0.25,
    examples=64,
    recipe=Recipe(epochs=1, batch_size=32, cycle=0.5, smoothing=0.1, augment=False),
    progress=False,
)


def test_a_run_is_a_line_and_is_not_made_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "RECORDED", tmp_path / "recorded")
    config = dataclasses.replace(TINY, out=tmp_path / "run", record=True)
    (line,) = cifar.main(config)
    assert line["task"] == "digits resnet20"
    assert line["settings"]["recipe"]["cycle"] == 0.5
    assert 0 < line["metrics"]["test error"] <= 100
    assert 1_000 < line["params"] < line["macs"] / 2
    (found,) = runs.runs(tmp_path / "run")
    assert found.metrics == line["metrics"]
    recorded = json_lines.read(tmp_path / "recorded" / runs.LINES)
    assert recorded == [line]
    monkeypatch.setattr(cifar, "one", lambda *_: pytest.fail("it is there"))
    assert cifar.main(config) == [line]


@pytest.mark.parametrize("test", [True, False])
def test_errors_of_the_test_images_are_told_when_they_are_asked_for(
    test, tmp_path, monkeypatch, capsys
):
    """Whether they were when the run was made doesn't matter."""
    line = {"task": "cifar10 resnet20", "seed": 0}
    line["metrics"] = {"validation error": 8.25, "test error": 9.5}
    config = dataclasses.replace(TINY, test=test)
    monkeypatch.setattr(cifar.tyro, "cli", lambda *_, **__: config)
    monkeypatch.setattr(cifar, "main", lambda _: [line])
    cifar.cli()
    said = capsys.readouterr().out
    assert "validation error 8.25 %" in said
    assert ("test error 9.50 %" in said) == test


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": Recipe(epochs=0)}, "recipe.epochs must be at least 1, got 0"),
        (
            {"recipe": Recipe(cycle=-0.1)},
            r"recipe.cycle must lie in \[0, 1\), got -0.1",
        ),
        ({"seeds": ()}, "give at least one seed"),
        ({"examples": 16}, "16 training images don't fill a batch of 32"),
        ({"dataset": "nothing"}, "nothing"),
        ({"model": "nothing:at_all"}, "nothing"),
        ({"model": "nothing"}, "nothing"),
    ],
)
def test_what_cant_be_run_is_refused_and_leaves_nothing(changes, message, tmp_path):
    config = dataclasses.replace(TINY, out=tmp_path / "run", **changes)
    with pytest.raises((ValueError, data.DataError), match=message):
        cifar.main(config)
    assert not (tmp_path / "run").exists()
