"""Flags that are given count, whatever stands beside them."""

import sys

import pytest

from experiments import families, relocation
from experiments.harness import command_line


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
