"""Training steps on a Linux CPU with large pages of memory, against small ones.

    python -m benchmarks.pages             # prints ratios
    python -m benchmarks.pages --record    # and writes benchmarks/results/

A program of XLA asks for the memory of what it computes at every call, and the kernel
hands it out in pages of 4 kB, each cleared when it is first written to. With

    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1

the C library asks for pages of 2 MB (where the kernel allows it, as is usual:
`/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` or `always`). It is read
when a process begins, so that here both kinds are processes, which take turns. Two
minutes on two cores.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import gpu, measure
from benchmarks.measure import entry, milliseconds, ratio

TUNABLES = "GLIBC_TUNABLES"
LARGE = "glibc.malloc.hugetlb=1"
STEPS = 10
NETWORKS = {"lenet5": 128, "resnet20": 128}
MEASURES = "--measure"


def stepper(name: str, batch: int) -> Callable[[], None]:
    """Runs a training step, compiled before."""
    model, shape, classes = gpu.network(name)
    training = gpu.training_of(model, False, None)
    kept: list[Any] = [training.start(jax.random.key(0))]
    data = gpu.examples(shape, classes, batch)

    def go() -> None:
        kept[0], _ = training.step(kept[0], data)
        jax.block_until_ready(kept)

    go()
    return go


def measured() -> dict[str, list[float]]:
    """Of each network the seconds of a step, and the pages that it was given."""
    found = {}
    for name, batch in NETWORKS.items():
        go, seconds = stepper(name, batch), []
        given = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(STEPS):
            begun = time.perf_counter()
            go()
            seconds.append(time.perf_counter() - begun)
        given = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - given
        found[name] = [statistics.median(seconds), given / STEPS]
    return found


def process(large: bool) -> dict[str, list[float]]:
    """The same in a process of its own."""
    others = os.environ.get(TUNABLES, "").split(":")
    tunables = [each for each in others if each and "hugetlb" not in each]
    tunables += [LARGE] if large else []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pages", MEASURES],
        env={**os.environ, TUNABLES: ":".join(tunables)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main(arguments: argparse.Namespace) -> list[dict]:
    """A line for each network.

    Raises:
        SystemExit: without the GNU C library 2.35, which knows this setting.
    """
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        raise SystemExit(
            f"benchmarks.pages: this Python runs on {library or 'another C library'} "
            f"{version}; large pages are a setting of glibc ≥ 2.35"
        )
    kinds = {"large pages": True, "small pages": False}
    turns = [
        {kind: process(large) for kind, large in kinds.items()}
        for _ in range(arguments.turns)
    ]
    found = []
    for name, batch in NETWORKS.items():
        seconds = {kind: [turn[kind][name][0] for turn in turns] for kind in kinds}
        given = {
            kind: statistics.median(turn[kind][name][1] for turn in turns)
            for kind in kinds
        }
        faults = ", ".join(f"{kind} {count:,.0f}" for kind, count in given.items())
        found.append(
            entry(
                f"step of {name}, {batch} images, with large pages over small ones",
                ratio(seconds, *kinds),
                None,
                "×",
                f"{milliseconds(seconds, 1)}; pages given a step: {faults}",
            )
        )
    return found


if __name__ == "__main__":
    if MEASURES in sys.argv:
        print(json.dumps(measured()))
    else:
        measure.run(__doc__, "pages", main, 3)
