"""The list for accelerators runs from end to end at small size, and goes on."""

import dataclasses

import jax
import pytest

from benchmarks import gpu
from experiments.harness import json_lines
from l0jax import models
from l0jax.models import pre_activation

PARTS = tuple(gpu.PARTS)
SHALLOW = dataclasses.replace(
    gpu.SMALL, narrowed=("resnet8", 2), trained=("resnet8", "digits", 0.25)
)


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Networks that are compiled in seconds."""
    of = ("pre_activation_resnet", pre_activation.of_depth(8))
    monkeypatch.setitem(models.PRESETS, "resnet8", of)


@pytest.mark.parametrize("sizes", [gpu.Sizes(), gpu.SMALL])
def test_its_networks_can_be_made(sizes):
    names = {name for name, _ in sizes.networks}
    names |= {sizes.narrowed[0], sizes.trained[0]}
    assert names <= {"mlp", "lenet5"} | models.PRESETS.keys()


@pytest.mark.slow
def test_the_list_runs_and_goes_on(tmp_path, monkeypatch):
    file = tmp_path / "gpu.jsonl"
    monkeypatch.setattr(gpu, "CALLS", 1)
    monkeypatch.setattr(gpu, "RUNS", tmp_path / "runs")
    found = gpu.run(file, SHALLOW, PARTS, 10.0, show=False)
    assert {line["part"] for line in found} == set(PARTS)
    assert not any("error" in line for line in found)
    for line in found:
        assert line["device"] == jax.devices()[0].device_kind
        numbers = {n: v for n, v in line.items() if isinstance(v, float)}
        assert numbers
        assert all(value > 0 for value in numbers.values())
    kinds = [line["what"] for line in found if line["part"] == "steps"]
    assert len(kinds) == len(set(kinds)) == 4 * len(SHALLOW.networks)
    whole, *narrowed = (line["macs"] for line in found if line["part"] == "widths")
    assert all(0.3 * whole < macs < 0.8 * whole for macs in narrowed)
    monkeypatch.setattr(gpu, "seconds_of", lambda _: pytest.fail("it is there"))
    assert gpu.run(file, SHALLOW, PARTS, 10.0, show=False) == found
    said = gpu.entries(found)
    assert len(said) == len(found)
    shares = [e["detail"] for e in said if "of the product in bfloat16" in e["detail"]]
    assert len(shares) == len(kinds) + 1 + len(narrowed)


def test_other_devices_and_sizes_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CALLS", 1)
    file, other = tmp_path / "gpu.jsonl", dataclasses.replace(gpu.SMALL, product=64)
    small = gpu.run(file, gpu.SMALL, ("device",), 1.0, show=False)
    found = gpu.run(file, other, ("device",), 1.0, show=False)
    assert [line["sizes"]["product"] for line in small] == [128, 128]
    assert [line["sizes"]["product"] for line in found] == [64, 64]
    # A line of another device doesn't count as one of this.
    lines = [line | {"device": "another"} for line in json_lines.read(file)]
    json_lines.write(file, lines)
    assert gpu.run(file, other, ("device",), -1.0, show=False) == []


def test_a_network_is_trained_in_the_time_that_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(gpu, "seconds_an_epoch", lambda *_: 10.0)
    file = tmp_path / "gpu.jsonl"
    (line,) = gpu.run(file, SHALLOW, ("training",), 0.9, show=False)
    assert line["error"].startswith("an epoch takes 10.0 s, and 5")
    assert not (tmp_path / "runs").exists()
    sizes = dataclasses.replace(SHALLOW, epochs=100)
    (line,) = gpu.run(file, sizes, ("training",), 100 / 60, show=False)
    assert line["epochs"] == 6
    assert 0.3 < line["macs left"] < 0.6
    (said,) = gpu.entries([line])
    assert "base test error" in said["detail"]
    assert said["value"].endswith("% of the test images wrong")


@pytest.mark.parametrize("part", ["device", "sweeps"])
def test_measurements_are_lines(part, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CALLS", 1)
    small = dataclasses.replace(gpu.SMALL, members=(2,))
    found = gpu.run(tmp_path / "gpu.jsonl", small, (part,), 10.0, show=False)
    assert found
    assert all(line["part"] == part for line in found)


def test_none_begins_when_the_minutes_are_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "seconds_of", lambda _: pytest.fail("it is too late"))
    file = tmp_path / "gpu.jsonl"
    assert gpu.run(file, gpu.SMALL, ("device",), -1.0, show=False) == []
    assert "product in float32 and what follows are left" in capsys.readouterr().out


def test_what_a_device_can_t_do_is_a_line(tmp_path, monkeypatch):
    def fails(go):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setattr(gpu, "seconds_of", fails)
    file = tmp_path / "gpu.jsonl"
    found = gpu.run(file, gpu.SMALL, ("device",), 1.0, show=False)
    assert [line["error"] for line in found] == [
        "RESOURCE_EXHAUSTED: out of memory"
    ] * 2
    assert json_lines.read(file) == found
    assert all("out of memory" in e["detail"] for e in gpu.entries(found))
    # It is tried again, and the newer line counts.
    monkeypatch.setattr(gpu, "seconds_of", lambda go: (0.5, 1.0))
    again = gpu.run(file, gpu.SMALL, ("device",), 1.0, show=False)
    assert [line["seconds"] for line in again] == [0.5, 0.5]
