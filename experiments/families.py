"""Gate families compared: the same network, epochs and seeds, a grid of λ for each, or
the same budgets.

    python -m experiments.families --quick                 # 8x8 digits, 3 minutes
    python -m experiments.families                         # MNIST, MLP: 3 hours
    python -m experiments.families --model lenet5 --families hard_concrete …
    python -m experiments.families --lam --targets 0.1 0.2 0.4

All λ and seeds of a family are one compiled program (`l0jax.train.Sweep`), and so are
all targets and seeds. Every member becomes a line of `runs.jsonl` for each test-time
rule, and a family that is there is not run again; one that was interrupted goes on from
its last checkpoint.
`table.md`, `runs.csv` and the pictures in `figures` follow from it:
`python -m experiments.family_report FOLDER` makes them again.
"""

import os
import sys
from pathlib import Path
from typing import Any

import jax

from experiments import mnist
from experiments.family_settings import QUICK, Config, check, kinds_of
from experiments.family_sweep import Family
from experiments.harness import command_line, progress, results, run_folder
from experiments.tasks import data


def main(config: Config) -> dict[str, Any]:
    """Runs what is missing; returns the folder and all its results."""
    check(config)
    dataset = data.load(config.dataset, mnist.Config.validation)
    named = ["dataset", "model", "lam", "epochs", "gate_learning_rate"]
    named += ["targets", "target_of"] if config.targets else []
    told = run_folder.settings_of(config)
    settings = {name: told[name] for name in (*named, "compute") if name in told}
    name = f"families-{config.dataset}-{config.model}"
    folder = config.out or run_folder.default(name, settings)
    sweeps = {
        kind: [(value, seed) for value in values for seed in range(config.seeds)]
        for kind, values in (("lam", config.lam), ("target", config.targets))
        if values
    }
    there = {kind: results.there(folder, "family", kind, "seed") for kind in sweeps}
    missing = [
        Family(config, name, kind, members, dataset)
        for name in config.families
        for kind, members in sweeps.items()
        if kind in kinds_of(name)
        and not there[kind].issuperset((name, *member) for member in members)
    ]
    without = [n for n in config.families if "target" not in kinds_of(n)]
    if config.targets and without:
        print(
            f"no cost is expected of {', '.join(without)}: left out at the targets",
            file=sys.stderr,
        )
    # Nothing is refused from here on: a refused comparison leaves no folder.
    deciding = {name: told[name] for name in OF_RESULTS if name in told}
    run_folder.prepare(folder, deciding, deciding, resume=True)
    with progress.bar(
        len(missing) * config.epochs, "epoch", show=config.progress
    ) as bar:
        for family in missing:
            lines = family.lines(family.run(folder, bar))
            results.put(folder, [{**line, "settings": deciding} for line in lines])
    # Imported at the end, when its second no longer delays the first step.
    from experiments import family_report

    family_report.write(folder)
    return {"folder": str(folder), "results": results.read(folder)}


OF_RESULTS = ("dataset", "model", "epochs", "gate_learning_rate", "compute")
"""Settings that decide what a member gives, beside what its lines say of it."""


def cli() -> None:
    config = command_line.parse(
        Config,
        __doc__,
        QUICK,
        "all families in three minutes: digits, one seed, two λ, 30 epochs in which "
        "gates are trained fast",
    )
    # One device per core, each of which trains members of its own, if nobody has said
    # how many. (Of the CPU: where there is an accelerator, JAX goes on taking that.)
    if "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    try:
        found = main(config)
    except (ValueError, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.families: {error}") from None
    print((Path(found["folder"]) / "table.md").read_text())
    for file in sorted((Path(found["folder"]) / "figures").glob("*.png")):
        print(f"picture {file}")


if __name__ == "__main__":
    cli()
