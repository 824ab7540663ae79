"""A network is trained by its recipe, once, and its line says what it is worth."""

import dataclasses

import pytest

from experiments import channel_pruning, channel_settings, cifar
from experiments.harness import results
from experiments.reports import runs
from experiments.reports.printing import interval
from experiments.tasks import data
from experiments.tasks.images import Recipe

TINY = cifar.Config(
    dataset="digits",
    model="resnet20",
    width=0.25,
    examples=64,
    base=Recipe(epochs=1, batch_size=32, cycle=0.5, smoothing=0.1, augment=False),
    progress=False,
)


def test_a_run_is_a_line_and_is_not_made_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "RECORDED", tmp_path / "recorded")
    config = dataclasses.replace(TINY, out=tmp_path / "run", record=True)
    (line,) = cifar.main(config)
    assert line["task"] == "digits resnet20"
    assert line["settings"]["base"]["cycle"] == 0.5
    assert 0 < line["metrics"]["test error"] <= 100
    assert 1_000 < line["params"] < line["macs"] / 2
    (found,) = runs.runs(tmp_path / "run")
    assert found.metrics == line["metrics"]
    recorded = cifar.recorded("digits", "resnet20")
    assert recorded.parent == tmp_path / "recorded"
    assert results.read(recorded) == [line]
    test = interval([line["metrics"]["test error"]])
    assert (
        f"| 1 | {interval([line['metrics']['validation error']])} % | {test} % |"
        in (cifar.section())
    )
    monkeypatch.setattr(cifar, "one", lambda *_: pytest.fail("it is there"))
    assert cifar.main(config) == [line]


@pytest.mark.slow
def test_recorded_networks_are_pruned_by_others_and_are_of_one_recipe(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(cifar, "RECORDED", tmp_path / "recorded")
    for seeds in ((0,), (1,)):
        config = dataclasses.replace(TINY, seeds=seeds, out=tmp_path / "run")
        lines = cifar.main(dataclasses.replace(config, record=True))
    kept = cifar.recorded("digits", "resnet20")
    assert {file.name for file in kept.iterdir()} >= {"base-0", "base-1"}
    same = ("dataset", "model", "width", "examples", "base", "progress")
    pruned = channel_settings.Config(
        method=("filter_l1",),
        seeds=(1,),
        base_from=kept,
        tune=dataclasses.replace(TINY.base, epochs=0),
        heads=TINY.base,
        gate=TINY.base,
        out=tmp_path / "pruned",
        **{name: getattr(TINY, name) for name in same},
    )
    (line,) = channel_pruning.main(pruned)["results"]
    assert line["metrics"]["base test error"] == lines[1]["metrics"]["test error"]

    other = dataclasses.replace(TINY.base, learning_rate=0.05)
    with pytest.raises(ValueError, match="were made with base = "):
        channel_pruning.main(
            dataclasses.replace(pruned, base=other, out=tmp_path / "other")
        )
    # What another recipe gave is no seed of this one.
    cifar.main(
        dataclasses.replace(TINY, base=other, out=tmp_path / "anew", record=True)
    )
    assert not (kept / "base-1").exists()
    assert len(results.read(kept)) == 1


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
        ({"base": Recipe(epochs=0)}, "base.epochs must be at least 1, got 0"),
        (
            {"base": Recipe(cycle=-0.1)},
            r"base.cycle must lie in \[0, 1\), got -0.1",
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
