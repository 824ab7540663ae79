"""Rules of test time against the one that fills the budget, on 8x8 digits."""

import dataclasses

import pytest

from experiments import deciding
from experiments.deciding import NETWORKS, Config
from experiments.harness import results

CONFIG = Config(networks=("mlp",), seeds=(0,), gate_learning_rate=0.1, progress=False)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    small = {"dataset": "digits", "epochs": 8}
    monkeypatch.setitem(NETWORKS, "mlp", {**small, "loop": False})
    monkeypatch.setitem(NETWORKS, "resnet8", {**small, "epochs": 2, "loop": True})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "resnet8"])
def test_each_rule_is_compared_with_the_budget_at_its_own_share(
    tmp_path, monkeypatch, name
):
    monkeypatch.setattr(deciding, "RESULTS", tmp_path / "deciding")
    config = dataclasses.replace(
        CONFIG, networks=(name,), out=tmp_path / "run", examples=256, record=True
    )
    found = deciding.main(config)
    assert [line["method"] for line in found] == [*deciding.RULES]
    for line in found:
        share, errors = line["costs"]["macs"], line["metrics"]
        # As much as fits into what the rule has left, which is never more.
        alike = line["costs"][f"{deciding.ALIKE}macs"]
        assert 0.95 * share <= alike <= share * 1.000001
        assert set(errors) == {
            f"{when}{part} error"
            for when in ("", deciding.ALIKE)
            for part in ("validation", "test")
        }
        assert all(0 <= error <= 100 for error in errors.values())
    last = found[-1]
    assert last["costs"]["macs"] <= config.target
    alike = last["metrics"][f"{deciding.ALIKE}test error"]
    assert last["metrics"]["test error"] == alike
    for folder in (config.out, deciding.RESULTS):
        there = results.read(folder)
        assert [
            line | {"made": found["made"]}
            for line, found in zip(found, there, strict=True)
        ] == there
    text = deciding.table(found)
    assert len(text.splitlines()) == 2 + len(found)


def test_what_can_not_be_decided_is_named(tmp_path):
    for changes, words in (
        (
            {"networks": ("vgg",)},
            "unknown network 'vgg'; there is mlp, lenet5, resnet8",
        ),
        ({"seeds": ()}, "at least one network and one seed"),
    ):
        with pytest.raises(ValueError, match=words):
            deciding.main(dataclasses.replace(CONFIG, out=tmp_path / "x", **changes))
    assert not (tmp_path / "x").exists()
