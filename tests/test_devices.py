"""Flags that put a run on many devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import mnist
from experiments.harness import devices, json_lines
from experiments.harness.devices import OnDevices
from experiments.mnist_settings import Config, scientific

FLAGS = (
    *("--epochs", "12", "--dense", "no", "--target-macs", "0.3", "--batch-size", "104"),
    *("--no-progress", "--compact-gain", "0", "--checkpoint-every", "4"),
)


def run(folder, devices_each, *flags, processes=1):
    """Runs `experiments.mnist` in so many processes; the log of the first one."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    xla = os.environ.get("XLA_FLAGS", "")
    xla += f" --xla_force_host_platform_device_count={devices_each}"
    found = []
    for at in range(processes):
        places = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(at),
        }
        found.append(
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "experiments.mnist", *FLAGS, *flags),
                    *("--out", str(folder)),
                ],
                env={
                    **os.environ,
                    **{"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu"},
                    **(places if processes > 1 else {}),
                },
                cwd=Path(__file__).parent.parent,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in found:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:] + out[-3000:]
    return json_lines.read(folder / "metrics.jsonl")


@pytest.mark.slow
def test_processes_leave_the_run_folder_of_one(tmp_path):
    """On one device, eight, and twice four with split parameters: the same run, which
    goes on on other devices than it began on."""
    alone = run(tmp_path / "one", 1)
    eight = run(tmp_path / "eight", 8, "--mesh", "data=8")
    begun = ("--stop-after", "4")
    both = ("--mesh", "data=4,model=2", "--shard", "model", "--distributed")
    run(tmp_path / "two", 1, *begun)
    two = run(tmp_path / "two", 4, *both, "--resume", processes=2)
    for found in (eight, two):
        assert [row["epoch"] for row in found] == list(range(1, 13))
        for row, expected in zip(found, alone, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)
            assert row["decided"] == pytest.approx(expected["decided"], rel=2e-2)
    assert alone[-1]["architecture"] != alone[0]["architecture"]
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text())
        for name in ("one", "eight", "two")
    ]
    for summary in summaries:
        assert summary["shrunk"]["max_relative_difference"] < 1e-5
        assert summary["last"]["test_error"] == pytest.approx(
            summaries[0]["last"]["test_error"], abs=0.7
        )


def test_where_a_run_is_made_does_not_decide_what_it_gives():
    here, there = Config(), Config(mesh="data=8", shard="data", distributed=True)
    assert scientific(here) == scientific(there)
    low = scientific(Config(compute="bfloat16"))
    assert low == {**scientific(here), "compute": "bfloat16"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mesh": "8"}, "mesh is '8'; give names and numbers of devices"),
        ({"mesh": "data=1,data=1"}, "give names and numbers"),
        ({"mesh": "data=two"}, "give names and numbers"),
        ({"mesh": "data=64"}, "asks for 64 devices, and there are"),
        ({"mesh": "data=0"}, "asks for 0 devices"),
        ({"shard": "data"}, "shard is given, but no mesh"),
    ],
)
def test_devices_that_there_are_not(flags, message):
    with pytest.raises(ValueError, match=message):
        devices.check(OnDevices(**flags), 104)


def test_an_axis_that_the_mesh_has_not(tmp_path):
    config = Config(mesh="data=1", shard="model", epochs=1, out=tmp_path / "run")
    with pytest.raises(ValueError, match="names the axis 'model'; the mesh has data"):
        mnist.main(config)
    assert not (tmp_path / "run").exists()


def test_a_process_that_is_alone_is_told_so(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices.jax.distributed, "initialize", refused)
    with pytest.raises(ValueError, match="did not find the other processes"):
        devices.begin(Config(distributed=True))


def refused(**_):
    raise ValueError("coordinator_address should be defined.")
