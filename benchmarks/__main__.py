"""Measures several things one after the other, and prints one table of them.

    python -m benchmarks                       # all that take minutes, on this machine
    python -m benchmarks steps sweeps          # these
    python -m benchmarks --recorded            # what is recorded, measuring nothing
    python -m benchmarks steps --turns 1 --record

Each is `python -m benchmarks.NAME` in a process of its own, which says what it measures
(`--help`). Numbers are ratios of what ran in turns within one process, or counts.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import measure
from experiments.harness import json_lines
from experiments.reports import benchmark_tables

LONG = (
    "compaction",
    "kills",
    "gpu",
    "relocation",
    "selection",
    "against_torch_pruning",
)
"""That take longer, or need what not every machine has."""
HEADER = ["benchmark", "what", "measured", "limit", "", "detail"]


def measured(name: str, flags: Sequence[str], folder: Path) -> list[list[str]]:
    """Lines of the table, of what one of them measures; what it prints goes on."""
    file = folder / f"{name}.jsonl"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--to", str(file), *flags]
    done = subprocess.run(command, check=False, stdout=sys.stderr)
    if done.returncode:
        return [[name, "it failed", "", "", "NOT within", f"code {done.returncode}"]]
    return lines(name, file)


def lines(name: str, file: Path) -> list[list[str]]:
    """Lines of the table, of what is in a file."""
    found = json_lines.read(file)
    return [[name, *(each[key] for key in benchmark_tables.KEYS)] for each in found]


def main() -> None:
    every = [name for name in benchmark_tables.BENCHMARKED if name != "gpu"]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(every))
    parser.add_argument("--recorded", action="store_true", help="measure nothing")
    parser.add_argument("--record", action="store_true", help="write it down")
    parser.add_argument("--turns", type=int, help="of each contender")
    arguments = parser.parse_args()
    unknown = {*arguments.names} - {*every}
    if unknown:
        parser.error(
            f"no benchmark is {', '.join(sorted(unknown))}: {', '.join(every)}"
        )
    names = arguments.names or [
        name for name in every if arguments.recorded or name not in LONG
    ]
    flags = ["--record"] if arguments.record else []
    flags += [] if arguments.turns is None else ["--turns", str(arguments.turns)]
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if arguments.recorded:
                table += lines(name, measure.RESULTS / f"{name}.jsonl")
            else:
                table += measured(name, flags, Path(folder))
    print(measure.aligned([HEADER, *table]))


if __name__ == "__main__":
    main()
