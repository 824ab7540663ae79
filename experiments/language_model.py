"""A language model at a share of its size: gates, scores, narrowing, a new model.

    python -m experiments.language_model --quick       # Python's reference, 3 minutes
    python -m experiments.language_model --method all --seeds 0 1 2
    python -m experiments.language_model --gated heads hidden branches --distil
    python -m experiments.language_model --mesh data=8 --compute bfloat16

A decoder is trained on characters, or read from the run folder. Each method takes the
same share out of it, decided within the budget, and all train on as much text after
the base, what they train to choose included. That gated, closed and removed say the
same is checked in every run: in logits, and in the text that they go on with. All is
stored as it comes, and a run that was killed goes on where it was.
`table.md`, `runs.csv` and the pictures in `figures` follow from `runs.jsonl`:
`python -m experiments.language_report FOLDER` makes them again.
"""

import dataclasses
from typing import Any

from experiments.harness import command_line, devices, results, run_folder
from experiments.harness.loop import Diverged
from experiments.language_methods import METHODS, check_budget
from experiments.language_run import Run
from experiments.language_settings import OF_BASE, QUICK, UNTOLD, Config, check
from experiments.tasks import text
from experiments.tasks.dataset import DataError


def main(config: Config) -> dict[str, Any]:
    """Runs what is missing; returns the folder and all its results."""
    devices.begin(config)
    if config.method == ("all",):
        config = dataclasses.replace(config, method=tuple(METHODS))
    check(config, METHODS)
    found = text.load(config.text)
    settings = run_folder.settings_of(config, UNTOLD)
    folder = config.out or run_folder.default(f"{config.text}-decoder", settings)
    if config.base_from is not None:
        run_folder.check_base(config.base_from, settings, OF_BASE)
    there = results.there(folder, "method", "seed")
    missing = [
        Run(config, found, folder, method, METHODS[method], seed)
        for seed in config.seeds
        for method in config.method
        if (method, seed) not in there
    ]
    if missing:
        check_budget(missing[0])
    # What can be known is refused by now: a refused run leaves no folder.
    run_folder.prepare(folder, settings, settings, resume=True)
    for run in missing:
        line = {
            "study": "language_model",
            "task": f"{config.text} decoder",
            "settings": settings,
            **run.result(),
        }
        results.put(folder, [line])
    if not devices.is_first():
        return {"folder": str(folder), "results": []}
    # Imported at the end, when its second no longer delays the first step.
    from experiments import language_report

    language_report.write(folder)
    return {"folder": str(folder), "results": results.read(folder)}


def cli() -> None:
    config = command_line.parse(
        Config, __doc__, QUICK, "a small model on Python's reference; 3 minutes"
    )
    try:
        found = main(config)
    except (ValueError, Diverged, DataError, OSError) as error:
        raise SystemExit(f"experiments.language_model: {error}") from None
    if not devices.is_first():
        return
    for line in found["results"]:
        metrics, share = line["metrics"], line["costs"][config.cost]
        print(
            f"{line['method']} seed {line['seed']}: {100 * share:.1f} % of the "
            f"{config.cost}; nats a character of the test text "
            f"{metrics['base test loss']:.3f} -> {metrics['test loss']:.3f}"
        )
    print(found["folder"])


if __name__ == "__main__":
    cli()
