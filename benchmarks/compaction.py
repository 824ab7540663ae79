"""Whether training gets faster in seconds as it prunes: the whole program's wall time,
imports, data, compilation and pictures included, over that of the same program training
the dense network.

    python -m benchmarks.compaction             # prints ratios and limits
    python -m benchmarks.compaction --record    # and writes benchmarks/results/

Runs take turns, each in a process of its own: dense, with compaction, and last, for the
errors alone, without compaction. It takes an hour and a half; what is recorded ran on
one core (`taskset -c 0`). TFDS_DATA_DIR names the folder of MNIST. Finished runs are
kept in `runs/compaction`, and a second start goes on from there.
"""

import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import measure
from benchmarks.measure import entry
from experiments.harness import results, run_folder

FOLDER = Path("runs") / "compaction"
SETTINGS = {
    "MLP, 200 epochs": (
        "--epochs 200 --lam 0.1 --weight-decay 5e-4 --gate-learning-rate 1e-3"
    ),
    "LeNet-5, 40 epochs": (
        "--model lenet5 --epochs 40 --lam 20 0.6 0.2 10 --gate-learning-rate 5e-3"
    ),
}
KINDS = {
    # λ is one number where nothing is gated.
    "dense": "--gates none --lam 0.1",
    "compacted": "",
    "whole": "--no-compact",
}
LIMIT = 0.6


def folder_of(name: str, kind: str, seed: int) -> Path:
    return FOLDER / f"{name.split(',')[0]}-{kind}-seed{seed}"


def run(name: str, kind: str, seed: int) -> dict:
    """The result of one run, which is made unless it is there."""
    out = folder_of(name, kind, seed)
    if not results.read(out):
        command = f"-m experiments.mnist --dataset mnist {SETTINGS[name]} {KINDS[kind]}"
        subprocess.run(
            [
                *(sys.executable, *command.split()),
                *("--seed", str(seed), "--out", str(out), "--no-progress"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return results.read(out)[-1]


def main(arguments) -> list[dict]:
    seeds = range(arguments.turns)
    found = {
        (name, seed, kind): run(name, kind, seed)
        for name in SETTINGS
        for seed in seeds
        for kind in ("dense", "compacted")
    }
    entries = []
    for name in SETTINGS:
        dense, compacted = (
            [found[name, seed, kind]["wall_seconds"] for seed in seeds]
            for kind in ("dense", "compacted")
        )
        entries.append(
            entry(
                f"{name}: gated training that compacts, over dense training",
                statistics.median(c / d for c, d in zip(compacted, dense, strict=True)),
                LIMIT,
                "×",
                f"wall time {_seconds(compacted)} and {_seconds(dense)}, "
                f"compilation included; {_epochs(name)}",
            )
        )
    name = next(iter(SETTINGS))
    errors = {
        kind: [run(name, kind, seed)["metrics"]["test error"] for seed in seeds]
        for kind in ("compacted", "whole")
    }
    entries.append(
        entry(
            f"{name}: test error with compaction, less that without",
            statistics.mean(errors["compacted"]) - statistics.mean(errors["whole"]),
            0.1,
            " points",
            f"compacted {_errors(errors['compacted'])}, whole "
            f"{_errors(errors['whole'])}; last epoch, seed by seed",
        )
    )
    return entries


def _epochs(name: str) -> str:
    """Where the first seed's seconds went."""
    found = {}
    for kind in ("dense", "compacted"):
        run(name, kind, 0)
        found[kind] = run_folder.Log(folder_of(name, kind, 0)).rows()
    rows, outside = found["compacted"], {}
    for kind, lines in found.items():
        wall = run(name, kind, 0)["wall_seconds"]
        outside[kind] = wall - sum(line["seconds"] for line in lines)
    sizes = [line["trained"] for line in rows]
    smaller = [at for at, size in enumerate(sizes[1:], 1) if size != sizes[at - 1]]
    whole, last, dense = (
        statistics.median(line["seconds"] for line in lines)
        for lines in (rows[1 : smaller[0]], rows[smaller[-1] + 1 :], found["dense"])
    )
    # An epoch's line says what it goes on with, and counts that compilation.
    compiled = sum(rows[at]["seconds"] - rows[at - 1]["seconds"] for at in smaller)
    return (
        f"of seed 0, an epoch takes {whole:.2f} s up to the compaction after epoch "
        f"{smaller[0] + 1}, {last:.2f} s after the last of {len(smaller)}, dense "
        f"{dense:.2f} s; compaction itself {compiled:.0f} s, and all outside of epochs "
        f"{outside['compacted']:.0f} s, dense {outside['dense']:.0f} s"
    )


def _seconds(values: list[float]) -> str:
    return "/".join(f"{value:.0f}" for value in values) + " s"


def _errors(values: list[float]) -> str:
    return "/".join(f"{value:.2f}" for value in values) + " %"


if __name__ == "__main__":
    measure.run(__doc__, "compaction", main, turns=3)
