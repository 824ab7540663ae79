"""Whether runs that are killed end as if they had not been.

    python -m benchmarks.kills             # 30 kills; prints counts
    python -m benchmarks.kills --record    # and writes benchmarks/results/

Two runs on the bundled digits, `experiments.mnist` with a target and compaction and
`experiments.channel_pruning` with DCP, are ended by SIGKILL: at any moment of the run,
and in the middle of writing a checkpoint, of taking units out, of choosing channels.
Each is begun anew at once and killed again, until one is let through to its end. What
it then leaves, down to the last bit of its arrays and the last digit of its metrics
(seconds aside), must be what an undisturbed run leaves. A quarter of an hour on two
cores. --turns is how many kills there are.
"""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.measure import entry
from experiments.harness import results

Left = dict[str, Any]
KILLS_OF_A_RUN = 5
SAVING = "l0jax.files.write"


def mnist(folder: Path) -> list[str]:
    return [
        *("experiments.mnist", "--out", str(folder), "--no-progress", "--dense", "no"),
        *("--epochs", "30", "--checkpoint-every", "2", "--target-macs", "0.3"),
        *("--compact-gain", "0", "--compact-after", "1", "--compact-below", "0.6"),
        *("--gate-learning-rate", "0.05", "--target-warm-up", "0.2"),
        *(["--resume"] if (folder / "config.json").exists() else []),
    ]


def of_mnist(folder: Path) -> Left:
    """The stored network, the gates, and what was logged but for seconds."""
    rows = [json.loads(r) for r in (folder / "metrics.jsonl").read_text().splitlines()]
    gates = np.load(folder / "gates.npz")
    return {
        "rows": [without_seconds(row) for row in rows],
        "gates": {name: gates[name].tobytes() for name in gates.files},
        "arrays": (folder / "shrunk" / "arrays.safetensors").read_bytes(),
    }


def pruning(folder: Path) -> list[str]:
    return [
        *("experiments.channel_pruning", "--out", str(folder), "--no-progress"),
        *("--method", "dcp", "--dataset", "digits", "--model", "resnet20"),
        *("--width", "0.25", "--examples", "512", "--chosen-by", "256"),
        *("--base.epochs", "2", "--heads.epochs", "1", "--tune.epochs", "2"),
    ]


def of_pruning(folder: Path) -> Left:
    """What was recorded, but for seconds and commits."""
    (line,) = results.read(folder)
    return without_seconds(line)


def without_seconds(line: dict[str, Any]) -> Left:
    """Without what a clock decides."""
    return {
        name: value
        for name, value in line.items()
        if "second" not in name and name not in ("latency", "made")
    }


RUNS: dict[str, tuple[Callable[..., list[str]], Callable[[Path], Left]]] = {
    "mnist": (mnist, of_mnist),
    "channel_pruning": (pruning, of_pruning),
}
MOMENTS = {
    # The run, the function that is called, how often it is at least, and the most
    # seconds after a call.
    "at any moment": ("mnist", "start", 1, None),
    "while a checkpoint is written": ("mnist", SAVING, 6, 0.004),
    "while units are taken out": ("mnist", "l0jax.train.compacting.without", 1, 0.4),
    "while channels are chosen": (
        "channel_pruning",
        "l0jax.methods.discrimination.prune",
        1,
        3.0,
    ),
}


def called(command: list[str], *, killed: tuple[str, int, float] | None = None) -> int:
    """The exit code of a program, which may be killed."""
    program = ["-m", *command]
    if killed is not None:
        program = ["-m", "benchmarks.killed", *map(str, killed), *command]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *program],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return done.returncode


def main(arguments: Any) -> list[dict]:
    """Counts of runs that ended otherwise, by the moment at which they were killed."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        # Programs are compiled once for all runs.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{scratch}/compiled")
        undisturbed, seconds = {}, {}
        for name, (command, left) in RUNS.items():
            folder = Path(scratch) / name
            called(command(folder))
            undisturbed[name] = left(folder)
            again = Path(scratch) / f"{name}-again"
            begun = time.perf_counter()
            called(command(again))
            seconds[name] = time.perf_counter() - begun
            if left(again) != undisturbed[name]:
                raise RuntimeError(f"two undisturbed runs of {name} differ")
        kills: collections.Counter[str] = collections.Counter()
        other: collections.Counter[str] = collections.Counter()
        each = -(-arguments.turns // len(MOMENTS))
        for moment, (name, function, calls, most) in MOMENTS.items():
            command, left = RUNS[name]
            number = 0
            while kills[moment] < each:
                folder = Path(scratch) / f"{moment}-{number}"
                number += 1
                for _ in range(KILLS_OF_A_RUN):
                    longest = seconds[name] if most is None else most
                    killed = function, rng.randrange(calls), rng.uniform(0, longest)
                    if not called(command(folder), killed=killed):
                        break
                    kills[moment] += 1
                    if kills[moment] == each:
                        break
                called(command(folder))
                other[moment] += left(folder) != undisturbed[name]
                print(f"{moment}: {kills[moment]} kills", file=sys.stderr)
    return [
        entry(
            f"runs of `{MOMENTS[moment][0]}` that end otherwise when killed {moment}",
            other[moment],
            0,
            "",
            f"{kills[moment]} kills",
        )
        for moment in MOMENTS
    ]


if __name__ == "__main__":
    measure.run(__doc__, "kills", main, turns=30)
