"""How much the outcome of pruning depends on the heuristic: soft knowledge relocation
(a reconstruction, see `l0jax.methods.relocation`) against pruning at once.

    python -m experiments.relocation --quick                # digits, 2 minutes
    python -m experiments.relocation --model mlp            # MNIST
    python -m experiments.relocation --model resnet8 --dataset cifar10_jpeg --ratios 0.5

A base network is trained for each seed. Every heuristic dooms the same share of its
units; every arm takes the same number of steps from the doomed network to the small
one that is tested. Runs of one arm, ratio and budget differ only in numbers, so that
many of them are one compiled program. Each becomes a line of `runs.jsonl`; what is
there is not run again. `table.md`, `runs.csv` and the pictures in `figures` follow from
it:
`python -m experiments.relocation_report FOLDER` makes them again.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from experiments.harness import command_line, progress, results, run_folder
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
    there = results.there(folder, *Case._fields, "heuristic", "seed")
    cases = [
        Case(arm, ratio, budget)
        for ratio, budget, arm in itertools.product(
            config.ratios, config.budgets, config.arms
        )
    ]
    each = [*itertools.product(config.heuristics, config.seeds)]
    missing = {
        case: [run for run in each if (*case, *run) not in there] for case in cases
    }
    steps = sum(case.budget for case, runs in missing.items() for _ in runs)
    with progress.bar(steps, "step", show=config.progress) as bar:
        for case, runs in missing.items():
            for at in range(0, len(runs), config.together):
                lines = work.run(case, runs[at : at + config.together], bar)
                results.put(folder, [{**line, "settings": settings} for line in lines])
    # Imported at the end, when its second no longer delays the first step.
    from experiments import relocation_report

    relocation_report.write(folder)
    return {"folder": str(folder), "results": results.read(folder)}


def cli() -> None:
    config = command_line.parse(
        Config, __doc__, QUICK, "an MLP on digits, in two minutes"
    )
    try:
        found = main(config)
    except (ValueError, FloatingPointError, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.relocation: {error}") from None
    print(found["folder"])


if __name__ == "__main__":
    cli()
