"""Whether many devices give what one gives, and what it costs to split the work.

    python -m benchmarks.devices             # prints numbers and limits
    python -m benchmarks.devices --record    # and writes benchmarks/results/

The devices are simulated: eight of one process, or four of each of two that
`jax.distributed` connects. What is compared are the losses of 50 steps of networks with
gates and a target, between which units are taken out, alone and on a mesh 4×2: with
batches split, and with parameters, gates and the optimiser's moments split too. Then
the same number of examples is trained on by one to eight devices. They share the cores
that there are, so it takes no less time; what it takes more is what XLA pays for each
of them. Four minutes on two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks import measure
from benchmarks.checkpoints import noise_of, training_of
from benchmarks.measure import entry
from l0jax import costs, models, train
from tests import on_devices

MILLIONTH = " millionths"
DEVICES = (1, 2, 4, 8)
EXAMPLES, BATCH, EPOCHS = 9_600, 96, 5


# --------------------------------------------------------------- what all of them give


def of_losses(folder: str) -> list[dict]:
    """Eight devices, and two processes with four each, beside one device."""
    (found,) = on_devices.ran("trajectories", folder)
    entries = []
    for kind in on_devices.KINDS:
        alone, *others = (found[f"{kind}, {way}"] for way in on_devices.WAYS)
        for way, other in zip([*on_devices.WAYS][1:], others, strict=True):
            split = "batches split" if way == "data" else "parameters split too"
            same = "the same" if other["widths"] == alone["widths"] else "OTHER"
            entries.append(
                difference(
                    f"8 devices beside one, {split}, gates: {kind}",
                    on_devices.apart(alone, other),
                    1.0,
                    f"{same} units are left",
                )
            )
    for way, split in (
        ("replicated", "batches split"),
        ("sharded", "parameters split too"),
    ):
        (expected,) = on_devices.ran(way, folder)
        two = on_devices.ran(way, folder, processes=2)
        apart = max(on_devices.apart(each, expected) for each in two)
        restored = all(each["restored"] for each in two)
        entries.append(
            difference(
                f"2 processes with 4 devices each beside one with 8, {split}",
                apart,
                1.0,
                "its checkpoint restored"
                if restored
                else "its checkpoint NOT restored",
            )
        )
    (found,) = on_devices.ran("decoder", folder)
    specs = [*found["sharded"]["specs"].values()]
    split = sum("data" in spec or "model" in spec for spec in specs)
    entries.append(
        difference(
            "a decoder, parameters split over a mesh 4×2, beside one device",
            on_devices.apart(found["alone"], found["sharded"]),
            10.0,
            f"{split} of {len(specs)} arrays are split, through two compactions",
        )
    )
    return entries


def difference(what: str, value: float, limit: float, detail: str) -> dict:
    return entry(
        f"largest difference of a loss in 50 steps: {what}",
        1e6 * value,
        limit,
        MILLIONTH,
        detail,
    )


def of_collectives(folder: str) -> list[dict]:
    (found,) = on_devices.ran("collectives", folder)
    gated, plain = (sum(found[name].values()) for name in ("gated", "plain"))
    return [
        entry(
            "collective operations of a step with gates, beyond one without",
            gated - plain,
            0,
            "",
            f"{gated} and {plain} in the compiled program",
        )
    ]


# ------------------------------------------------------------------- what it costs


def mlp() -> models.Model:
    return models.MLP((784, 300, 100, 10), rngs=nnx.Rngs(0))


def epochs() -> list[float]:
    """Seconds of epochs over a mesh of all devices, after the first."""
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    training = training_of(mlp()).replace(mesh=mesh)
    data, state = noise_of(EXAMPLES), training.start(jax.random.key(0))
    seconds = []
    for at in range(EPOCHS + 1):
        order = train.order_of_epoch(jax.random.key(1), at, EXAMPLES, BATCH)
        begun = time.perf_counter()
        state, totals = training.epoch(state, data, order)
        jax.block_until_ready(totals)
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def members() -> list[int]:
    """Among how many devices a sweep of 12 is split that is given all of them."""
    training = training_of(models.MLP((784, 20, 10), rngs=nnx.Rngs(0)))
    sweep = train.Sweep(
        lambda share: training.replace(target=train.Target(costs.macs, share)),
        jnp.linspace(0.3, 0.8, 12),
        devices=jax.devices(),
    )
    states = sweep.start([jax.random.key(at) for at in range(12)])
    order = np.arange(2 * BATCH).reshape(2, BATCH)
    _, totals = sweep.epoch(states, noise_of(2 * BATCH), np.stack([order] * 12))
    assert len(totals.first_bad_step) == 12
    return [len(sweep.devices)]


PROGRAMS = {"epochs": epochs, "members": members}


def of_program(name: str, devices: int) -> list:
    """What a program gives on so many simulated devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.devices", "--program", name],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def of_scaling(turns: int) -> list[dict]:
    seconds: dict[int, list[float]] = {devices: [] for devices in DEVICES}
    for _ in range(turns):
        for devices in DEVICES:
            seconds[devices] += of_program("epochs", devices)
    medians = {devices: statistics.median(each) for devices, each in seconds.items()}
    cores = len(os.sched_getaffinity(0))
    return [
        entry(
            f"MLP: an epoch on {devices} simulated devices over one on 1",
            medians[devices] / medians[1],
            None,
            "×",
            f"on {cores} cores; {1e3 * medians[devices]:.0f} and "
            f"{1e3 * medians[1]:.0f} ms",
        )
        for devices in DEVICES[1:]
    ]


def main(arguments: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        entries = of_losses(folder) + of_collectives(folder)
    (used,) = of_program("members", 8)
    idle = entry(
        "of 8 devices, those that 12 members of a sweep leave idle",
        8 - used,
        0,
        "",
        "the last member is trained more than once; by default a sweep takes 6, on "
        "which it takes as long",
    )
    return [*entries, idle, *of_scaling(arguments.turns)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--program"]:
        print(json.dumps(PROGRAMS[sys.argv[2]]()))
    else:
        measure.run(__doc__, "devices", main, turns=2)
