"""The rows of the tables of channel pruning in `RESULTS.md`: settings and seeds.

    python -m experiments.channel_rows resnet20-half   # one row, all its seeds
    python -m experiments.channel_rows --list

Each is a run of `experiments.channel_pruning`. Every method and seed becomes a line of
`experiments/results/channel-pruning/runs.jsonl`, which `experiments.channel_report`
draws and `experiments.tables` prints. A row that was interrupted goes on where it
stopped.

Rows `resnet20-…` prune whole ResNet-20s, which are recorded beside the results of
`experiments.cifar`; `comparison` and the ablations a small one that two cores train in
minutes, on a part of the images; rows of the paper (`paper-…`) want an accelerator.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from experiments import channel_pruning, cifar
from experiments.channel_methods import METHODS
from experiments.channel_settings import OF_BASE, UNTOLD, Config
from experiments.harness import results, rows, run_folder
from experiments.reports import places
from experiments.tasks.images import Recipe

RESULTS = places.RESULTS / "channel-pruning"
RUNS = Path("runs") / "channel_rows"
COMPARISON, EQUAL = "comparison", "equal"

FEASIBLE = tuple(name for name in METHODS if name != "obd")
"""Optimal brain damage takes a pass through the network for each unit and batch, within
a loop, where XLA runs convolutions on one core: it had not ended after half an hour."""

SMALL = Config(
    # (What trains while units close stands in the row of equal epochs.)
    method=tuple(name for name in FEASIBLE if not METHODS[name].closes),
    dataset="cifar10_jpeg",
    model="resnet20",
    width=0.5,
    ratio=0.5,
    seeds=(0, 1, 2),
    examples=5_120,
    chosen_by=512,
    base=Recipe(epochs=15, learning_rate=0.1),
    heads=Recipe(epochs=1, learning_rate=0.01, drops=()),
    tune=Recipe(epochs=3, learning_rate=0.01),
)
UNTUNED = dataclasses.replace(SMALL.tune, epochs=0)
# The paper's, as far as it says them: 45,000 images for 50,000, the rest held out.
PAPER = Config(
    method=FEASIBLE,
    dataset="cifar10",
    seeds=(0, 1, 2),
    chosen_by=45_000,
    base=Recipe(epochs=400),
    heads=Recipe(epochs=100),
    gate=Recipe(epochs=200, learning_rate=0.01, drops=()),
    tune=Recipe(epochs=400),
)

TRAINED_ON = Recipe(
    epochs=1, batch_size=64, learning_rate=0.02, weight_decay=5e-4, drops=()
)
# All methods within one budget of multiply-accumulates and of epochs. A new network of
# the size that is left and what trains while units close have as many epochs.
RESNET20 = Config(
    method=(
        *("filter_l1", "taylor", "thinet", "channel_pruning"),
        *("dcp", "random_dcp", "width_multiplier", "soft_least_squares"),
        *("l0_hard_concrete", "l0_bernoulli", "l0_mixture"),
    ),
    seeds=(0, 1, 2),
    chosen_by=512,
    base=cifar.RESNET20,
    base_from=cifar.recorded("cifar10", "resnet20"),
    after=6,
    heads=TRAINED_ON,
    gate=dataclasses.replace(TRAINED_ON, epochs=3),
    tune=dataclasses.replace(TRAINED_ON, cycle=0.0),
)
BUDGETS = {"resnet20-half": 0.5, "resnet20-third": 0.3, "resnet20-modelopt": 0.73}
"""Shares of the multiply-accumulates that may be left; the last is that of the
published example of NVIDIA's ModelOpt."""
FAIR = (*BUDGETS, EQUAL)
"""Rows in which all methods have one budget of multiply-accumulates and of epochs."""

ABLATIONS: dict[str, Config] = {
    # Table 6: the weight of the additional loss, before fine-tuning.
    **{
        f"discrimination-{weight:g}": dataclasses.replace(
            SMALL, method=("dcp",), ratio=0.3, discrimination=weight, tune=UNTUNED
        )
        for weight in (0.0, 0.01, 0.1, 1.0)
    },
    # Table 7: where a layer is full. (0.001 is that of the comparison.)
    **{
        f"epsilon-{epsilon:g}": dataclasses.replace(
            SMALL, method=("dcp_adapt",), epsilon=epsilon
        )
        for epsilon in (0.1, 0.01)
    },
}
"""What the paper's tables 6 and 7 vary."""

ROWS: dict[str, Config] = {
    **{
        row: dataclasses.replace(RESNET20, left=share) for row, share in BUDGETS.items()
    },
    COMPARISON: SMALL,
    # Every method there is, on a network that is small enough for it.
    EQUAL: dataclasses.replace(
        SMALL,
        dataset="cifar10",
        method=FEASIBLE,
        after=6,
        gate=Recipe(epochs=3, learning_rate=0.01, drops=()),
    ),
    **ABLATIONS,
    # Table 1. (Network slimming has a lower price in deep residual networks.)
    "paper-resnet56": dataclasses.replace(
        PAPER, model="resnet56", ratio=0.5, sparsity=1e-5
    ),
    "paper-vgg19": dataclasses.replace(PAPER, model="vgg19", ratio=0.3),
}


def recorded(row: str) -> list[dict[str, Any]]:
    """The results of a row so far."""
    return results.by(results.read(RESULTS), "row").get(row, [])


def record(new: list[dict[str, Any]]) -> None:
    """Puts results of rows into those that are recorded."""
    results.put(RESULTS, new, {"row": ROWS, "method": METHODS, "seed": ()})


def run(name: str, seeds: tuple[int, ...], methods: tuple[str, ...]) -> None:
    """Runs what is missing of a row, and records it."""
    config = dataclasses.replace(ROWS[name], out=RUNS / name, seeds=seeds)
    if methods:
        config = dataclasses.replace(config, method=methods)
    compared = ROWS[COMPARISON]
    made_by = f"channel_rows {COMPARISON} --seeds {{}}"
    if config.base_from is not None:
        made_by = f"cifar --model {config.model} --seeds {{}} --record"
    elif name not in (COMPARISON, EQUAL) and all(
        getattr(config, field) == getattr(compared, field) for field in OF_BASE
    ):
        config = dataclasses.replace(config, base_from=RUNS / COMPARISON)
    if config.base_from is not None:
        missing = [s for s in seeds if not (config.base_from / f"base-{s}").exists()]
        if missing:
            raise SystemExit(
                f"{name} prunes base networks of {config.base_from}; run `python -m "
                f"experiments.{made_by.format(missing[0])}` first"
            )
    # Recorded as they come: a row may take longer than a machine is there.
    for method in config.method:
        one = dataclasses.replace(config, method=(method,))
        record([{"row": name, **line} for line in channel_pruning.main(one)["results"]])


def main(arguments: rows.OfMethods) -> None:
    """Runs rows by name."""

    def one(name: str, seed: int) -> None:
        run(name, (seed,), arguments.methods)

    def told(config: Config) -> dict[str, Any]:
        return run_folder.settings_of(config, UNTOLD)

    rows.run(arguments, "experiments.channel_rows", ROWS, one, told)


if __name__ == "__main__":
    main(tyro.cli(rows.OfMethods, description=__doc__))
