"""Flags that are given count, whatever stands beside them."""

import dataclasses
import sys

import pytest

from experiments import (
    channel_pruning,
    channel_settings,
    families,
    mnist,
    mnist_settings,
    published_settings,
    relocation,
    wide_resnet,
)
from experiments.harness import command_line
from experiments.tasks.images import Recipe
from tests import studies


@pytest.mark.parametrize(
    ("study", "flags", "wanted"),
    [
        (families, (), {}),
        (families, ("--quick",), families.QUICK),
        (families, ("--quick", "--dataset", "mnist"), {"dataset": "mnist"}),
        (families, ("--epochs", "3", "--quick"), {"epochs": 3, "dataset": "digits"}),
        (relocation, ("--quick", "--base-epochs", "5"), {"base_epochs": 5}),
    ],
)
def test_quick_gives_way_to_flags(study, flags, wanted, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study", *flags])
    found = command_line.parse(study.Config, study.__doc__, study.QUICK, "quick")
    expected = study.QUICK if "--quick" in flags else {}
    for name, value in {**expected, **wanted}.items():
        assert getattr(found, name) == value
    if not flags:
        assert found == study.Config()


def test_help_tells_of_quick(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study", "--help"])
    with pytest.raises(SystemExit):
        command_line.parse(families.Config, "What it is.", families.QUICK, "in no time")
    said = capsys.readouterr().out
    assert "--quick" in said
    assert "in no time" in said


# ------------------------------------------------------------------- published settings

ONE = Recipe(epochs=1, batch_size=32, augment=False)
SMALL = {"dataset": "digits", "examples": 64, "progress": False}
SMALL_MNIST = {"dataset": "digits", "model": "mlp", "epochs": 1}
STUDIES = {
    mnist: (
        published_settings.MNIST,
        {**SMALL_MNIST, "dense": "no", "progress": False},
    ),
    wide_resnet: (
        published_settings.WIDE_RESNET,
        {**SMALL, "depth": 10, "factor": 1, "recipe": ONE},
    ),
    channel_pruning: (
        published_settings.CHANNEL_PRUNING,
        {
            **{**SMALL, "model": "tiny", "method": ("dcp",), "losses": 1},
            **dict.fromkeys(("base", "heads", "gate", "tune"), ONE),
            "chosen_by": 32,
        },
    ),
}
PRESETS = [(study, name) for study, (known, _) in STUDIES.items() for name in known]


def parsed(monkeypatch, study, *flags):
    monkeypatch.setattr(sys, "argv", ["study", *flags])
    return command_line.parse(study.Config, study.__doc__, presets=STUDIES[study][0])


@pytest.mark.parametrize(("study", "name"), PRESETS)
def test_published_settings_are_at_full_size(study, name, monkeypatch):
    found = parsed(monkeypatch, study, "--preset", name)
    for field, value in STUDIES[study][0][name].items():
        assert getattr(found, field) == value
    assert parsed(monkeypatch, study, f"--preset={name}") == found
    assert found.dataset in ("mnist", "cifar10")
    epochs = {mnist: ["epochs"], wide_resnet: ["recipe.epochs"]}.get(study)
    for each in epochs or ["base.epochs", "tune.epochs"]:
        its = found
        for part in each.split("."):
            its = getattr(its, part)
        assert its >= 200
    if study is mnist:
        mnist_settings.check(found)
    if study is channel_pruning:
        channel_settings.check(found, channel_pruning.METHODS)
    flag = "--seed" if study is mnist else "--seeds"
    other = parsed(monkeypatch, study, "--preset", name, flag, "3")
    assert other != found


@pytest.mark.slow
@pytest.mark.parametrize(("study", "name"), PRESETS)
def test_published_settings_train(study, name, monkeypatch, tmp_path):
    """Those that remain when everything is made small."""
    published = parsed(monkeypatch, study, "--preset", name)
    small = STUDIES[study][1]
    with studies.small():
        study.main(dataclasses.replace(published, out=tmp_path / "run", **small))


def test_settings_that_nobody_published_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, mnist, "--preset", "paper")
    said = capsys.readouterr()
    assert "louizos2018-mlp" in said.out + said.err
    with pytest.raises(SystemExit):
        parsed(monkeypatch, mnist, "--quick")
