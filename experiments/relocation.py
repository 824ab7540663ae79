"""How much the outcome of pruning depends on the heuristic: soft knowledge relocation
(a reconstruction, see `l0jax.methods.relocation`) against pruning at once.

    python -m experiments.relocation --quick                # digits, 2 minutes
    python -m experiments.relocation --model mlp            # MNIST
    python -m experiments.relocation --model resnet8 --dataset cifar10_jpeg --ratios 0.5

A base network is trained for each seed. Every heuristic dooms the same share of its
units; every arm takes the same number of steps from the doomed network to the small
one that is tested. Runs of one arm, ratio and budget differ only in numbers, so that
many of them are one compiled program. Each becomes a line of `results.csv`; what is
there is not run again. `table.md` and the pictures in `figures` follow from the CSV:
`python -m experiments.relocation_report FOLDER` makes them again.
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.harness import command_line, csv_lines, progress, run_folder
from experiments.relocation_settings import (
    HEURISTICS,
    OF_RESULTS,
    QUICK,
    Case,
    Config,
    Heuristic,
    check,
    resolved,
)
from experiments.relocation_work import Work
from experiments.tasks import data


def main(
    config: Config, heuristics: Mapping[str, Heuristic] = HEURISTICS
) -> dict[str, Any]:
    """Runs what is missing; returns the folder and all its results.

    Args:
        config: what is run.
        heuristics: by name; further ones are functions like those of `HEURISTICS`.
    """
    config = resolved(config)
    check(config, heuristics)
    dataset = data.load(str(config.dataset), config.validation)
    told = run_folder.settings_of(config)
    settings = {name: told[name] for name in OF_RESULTS if name in told}
    name = f"relocation-{config.dataset}-{config.model}"
    folder = config.out or run_folder.default(name, settings)
    work = Work(config, dataset, folder, heuristics)
    # Nothing is refused from here on: a refused run leaves no folder.
    run_folder.prepare(folder, settings, told, resume=True)
    results = Results(folder / "results.csv")
    cases = [
        Case(arm, ratio, budget)
        for ratio, budget, arm in itertools.product(
            config.ratios, config.budgets, config.arms
        )
    ]
    missing = {case: results.missing(case, config) for case in cases}
    steps = sum(case.budget for case, runs in missing.items() for _ in runs)
    with progress.bar(steps, "step", show=config.progress) as bar:
        for case, runs in missing.items():
            for at in range(0, len(runs), config.together):
                results.add(work.run(case, runs[at : at + config.together], bar))
    # Imported at the end, when its second no longer delays the first step.
    from experiments import relocation_report

    written = relocation_report.write(folder)
    return {"folder": str(folder), "results": results.lines(), "written": written}


class Results:
    """The CSV with a line for each run."""

    def __init__(self, file: Path):
        self.file = file

    def lines(self) -> list[dict[str, str]]:
        return csv_lines.read(self.file)

    def missing(self, case: Case, config: Config) -> list[tuple[str, int]]:
        """Heuristics and seeds of which there is no line."""
        there = {
            (line["heuristic"], int(line["seed"]))
            for line in self.lines()
            if case == Case(line["arm"], float(line["ratio"]), int(line["budget"]))
        }
        wanted = itertools.product(config.heuristics, config.seeds)
        return [run for run in wanted if run not in there]

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """All lines of a program, or none if the process is killed meanwhile."""
        csv_lines.write(self.file, [*self.lines(), *lines])


def cli() -> None:
    config = command_line.parse(
        Config, __doc__, QUICK, "an MLP on digits, in two minutes"
    )
    try:
        found = main(config)
    except (ValueError, FloatingPointError, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.relocation: {error}") from None
    for file in found["written"]:
        print(file)


if __name__ == "__main__":
    cli()
