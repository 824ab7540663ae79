"""Flags that put a run on many devices."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import mnist
from experiments.harness import devices, json_lines, loop, results, run_folder
from experiments.harness.devices import OnDevices, OnHosts, OnMesh
from experiments.mnist_settings import Config, scientific
from l0jax import train
from tests import studies
from tests.studies import STUDIES

FLAGS = (
    *("--epochs", "12", "--dense", "no", "--target-macs", "0.3", "--batch-size", "104"),
    *("--no-progress", "--compact-gain", "0", "--checkpoint-every", "4"),
)


def started_together(command, devices_each, processes):
    """What each of so many processes that train together printed, the first first."""
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
                [sys.executable, *command],
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
    printed = []
    for process in found:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:] + out[-3000:]
        printed.append(out)
    return printed


def run(folder, devices_each, *flags, processes=1):
    """Runs `experiments.mnist` in so many processes; the log of the first one."""
    command = ("-m", "experiments.mnist", *FLAGS, *flags, "--out", str(folder))
    started_together(command, devices_each, processes)
    return json_lines.read(folder / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.always
def test_processes_leave_the_run_folder_of_one(tmp_path):
    """On one device, and twice four with split parameters: the same run, which goes on
    on other devices than it began on."""
    alone = run(tmp_path / "one", 1)
    begun = ("--stop-after", "4")
    both = ("--mesh", "data=4,model=2", "--shard", "model", "--distributed")
    run(tmp_path / "two", 1, *begun)
    two = run(tmp_path / "two", 4, *both, "--resume", processes=2)
    assert [row["epoch"] for row in two] == list(range(1, 13))
    for row, expected in zip(two, alone, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert row["decided"] == pytest.approx(expected["decided"], rel=2e-2)
    assert alone[-1]["architecture"] != alone[0]["architecture"]
    summaries = [results.read(tmp_path / name)[-1] for name in ("one", "two")]
    for summary in summaries:
        assert summary["shrunk"]["max_relative_difference"] < 1e-5
        assert summary["metrics"]["test error"] == pytest.approx(
            summaries[0]["metrics"]["test error"], abs=0.7
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


# ------------------------------------------------------------------- of every study


def test_every_study_with_the_flags_is_looked_at():
    def below(kind):
        return {kind}.union(*map(below, kind.__subclasses__()))

    theirs = {
        kind for kind in below(OnMesh) if kind.__module__.startswith("experiments.")
    } - {OnMesh, OnDevices, OnHosts}
    assert {type(study.config) for study in STUDIES.values()} == theirs


# (Another test trains that one on several devices.)
SPLIT = sorted(STUDIES.keys() - {"mnist"})
QUICKEST = "cifar"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == QUICKEST else pytest.mark.slow)
        for name in SPLIT
    ],
)
def test_a_study_trains_on_two_devices_as_on_one(name, tmp_path, run_python):
    """With parameters that are split too, where they may be."""
    program = f"from tests import studies; studies.main({str(tmp_path)!r}, {name!r})"
    one, two = json.loads(run_python(program, devices=2).splitlines()[-1])
    assert set(one) == {"1"}
    assert set(two) == {"2"}
    assert len(two["2"]) == len(one["1"]) > 0
    assert two["2"] == pytest.approx(one["1"], rel=1e-3)


TOGETHER = ("cifar", "language_model")


def test_every_study_that_processes_train_together_is_looked_at():
    assert {name for name in STUDIES if isinstance(STUDIES[name].config, OnHosts)} == {
        *TOGETHER,
        "mnist",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_processes_train_a_study_together(name, tmp_path):
    """Both say the same losses, which are those of one device; the first writes."""
    alone = studies.losses(name, tmp_path / "one", mesh="data=1")
    where = str(tmp_path / "two")
    program = f"from tests import studies; studies.on_hosts({where!r}, {name!r})"
    printed = started_together(("-c", program), 1, 2)
    told = [json.loads(each.splitlines()[-1]) for each in printed]
    assert [at for at, _ in told] == [0, 1]
    assert told[0][1] == told[1][1]
    assert told[0][1]["2"] == pytest.approx(alone["1"], rel=1e-3)
    files, lines = zip(
        *(
            (
                {
                    str(file.relative_to(folder))
                    for file in folder.rglob("*")
                    if "checkpoints" not in file.parts
                },
                len(results.read(folder)),
            )
            for folder in (tmp_path / "one", tmp_path / "two")
        ),
        strict=True,
    )
    assert files[0] == files[1]
    assert lines[0] == lines[1]


@pytest.fixture
def started(monkeypatch, tmp_path):
    """How far a study comes: to its run folder, or to its first steps."""

    class Came(Exception):
        pass

    def come(name, until, **flags):
        study, found = STUDIES[name], []

        def stop(*args, **how):
            found.extend(args)
            raise Came

        with studies.small(), monkeypatch.context() as patch:
            for owner, method in until:
                patch.setattr(owner, method, stop)
            config = dataclasses.replace(study.config, out=tmp_path / "run", **flags)
            with pytest.raises(Came):
                study.main(config)
        return found

    return come


@pytest.mark.parametrize("name", STUDIES)
def test_where_a_study_runs_is_no_setting_of_it(name, started):
    """And no dtype is one where it is the one of old: records and folders are those of
    before there was a flag."""
    until = [(run_folder, "prepare")]
    folder, settings, *_ = started(name, until)
    flags = {"mesh": "data=1"}
    if isinstance(STUDIES[name].config, OnDevices):
        flags["shard"] = "data"
    there = started(name, until, **flags)
    assert there[:2] == [folder, settings]
    assert not {"mesh", "shard", "compute"} & settings.keys()
    low = started(name, until, compute="bfloat16")
    assert low[1] == {**settings, "compute": "bfloat16"}


@pytest.mark.parametrize("name", STUDIES)
def test_the_network_runs_in_the_dtype_that_is_asked_for(name, started):
    """All products, from the first layer to the last; the loss is in float32."""
    until = [(loop.Run, "__iter__"), (train.Sweep, "epoch")]
    came = started(name, until, compute="bfloat16")
    if isinstance(came[0], loop.Run):
        training, state, data = came[0].training, came[0].state, came[0].inputs.data
    else:
        training, state, data = came[0].of(0), train.member_of(came[1], 0), came[2]
    batch = jax.tree.map(lambda a: a[:4], data)
    step = jax.make_jaxpr(training.task)(
        state.params, state.rest, batch, jax.random.key(0)
    )
    products = re.findall(
        r":(\w+)\[[^\]]*\] = (?:dot_general|conv_general_dilated)\b", str(step)
    )
    assert len(products) > 1
    assert set(products) == {"bf16"}
    assert step.out_avals[0].dtype == jnp.float32


REFUSED = {
    "unknown devices": ({"mesh": "data=64"}, "asks for 64 devices, and there are"),
    "no mesh": ({"shard": "data"}, "shard is given, but no mesh"),
    "unknown axis": (
        {"mesh": "data=1", "shard": "model"},
        "names the axis 'model'; the mesh has data",
    ),
    "uneven batch": ({"mesh": "data=7"}, "can't be split evenly over the 7 devices"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", STUDIES)
def test_what_devices_can_t_do_is_refused(name, case, tmp_path, monkeypatch):
    flags, message = REFUSED[case]
    study = STUDIES[name]
    if "shard" in flags and not isinstance(study.config, OnDevices):
        pytest.skip("it has no such flag")
    if case == "uneven batch":
        if name == "families":
            pytest.skip("it splits no batch")
        seven = types.SimpleNamespace(devices=np.zeros(7), axis_names=("data",))
        monkeypatch.setattr(devices, "mesh_of", lambda _: seven)
    out = tmp_path / "run"
    with studies.small(), pytest.raises(ValueError, match=message):
        study.main(dataclasses.replace(study.config, out=out, **flags))
    assert not out.exists()


def test_members_train_on_as_many_devices_as_somebody_said(run_python):
    """There may be more of them than cores."""
    program = (
        "import sys, jax\n"
        "from experiments import families\n"
        "def main(config):\n"
        "    print(jax.device_count())\n"
        "    raise ValueError('enough')\n"
        "families.main, sys.argv = main, ['families']\n"
        "try:\n"
        "    families.cli()\n"
        "except SystemExit:\n"
        "    pass\n"
    )
    assert run_python(program, devices=5).split() == ["5"]
