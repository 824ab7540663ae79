"""The rows of the MNIST table in `RESULTS.md`: settings, seeds and published numbers.

    python -m experiments.mnist_rows mlp-uniform      # one row, all its seeds
    python -m experiments.mnist_rows --list

Each seed of a row is one run of `experiments.mnist`; its result becomes a line of
`experiments/results/mnist/runs.jsonl`, from which `experiments.tables` prints
`RESULTS.md`.
A row that was interrupted goes on where it stopped. The settings were chosen on the
validation split; the test set was not looked at to choose them.

On one core a seed takes 2 to 4 minutes with the MLP and 9 with LeNet-5.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from experiments import mnist
from experiments.harness import results, rows
from experiments.reports import places

RESULTS = places.RESULTS / "mnist"
RUNS = Path("runs") / "rows"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        config: the settings, but for the seed.
        seeds: the seeds that are run.
        published: the paper's architecture, weights and error.
        weights_limit: weights that must not be exceeded, or None for a free point.
        error_limit: test error in per cent that must not be exceeded, likewise.
    """

    config: mnist.Config
    seeds: tuple[int, ...] = (0, 1, 2)
    published: str = "-"
    weights_limit: int | None = None
    error_limit: float | None = None


MLP = mnist.Config(
    dataset="mnist", model="mlp", epochs=200, gate_learning_rate=None, compact=False
)
LENET5 = mnist.Config(dataset="mnist", model="lenet5", epochs=40, compact=False)
CURVE = (0.03, 0.1, 0.3, 1.0)
# Recorded before there was a rule that fills a budget.
TARGET: dict[str, Any] = {
    **{"gate_learning_rate": 5e-3, "compact": True, "test_rule": "paper"}
}
WEIGHTS: dict[str, Any] = {"gates": "weight", "gate_learning_rate": 1e-2}
STRAIGHT_THROUGH: dict[str, Any] = {"gate": "bernoulli", **WEIGHTS}

ROWS = {
    # Stopped at 100 epochs: the gates go on closing, to 44,000 weights at 200.
    "mlp-uniform": Row(
        dataclasses.replace(MLP, epochs=100),
        published="219-214-100 (69,266 weights), 1.4 %",
        weights_limit=72_000,
        error_limit=1.6,
    ),
    "mlp-per-layer": Row(
        dataclasses.replace(MLP, lam=(0.12, 0.5, 2.5), weight_decay=2e-4),
        published="266-88-33 (26,642), 1.8 % (quoted elsewhere as 1.6 %)",
        weights_limit=26_642,
        error_limit=1.8,
    ),
    "lenet5-uniform": Row(
        dataclasses.replace(LENET5, gate_learning_rate=1e-2, weight_decay=2e-4),
        published="20-25-45-462 (38,410), 0.9 %",
        weights_limit=38_410,
        error_limit=1.0,
    ),
    "lenet5-per-layer": Row(
        dataclasses.replace(
            LENET5, gate_learning_rate=5e-3, lam=(20.0, 0.6, 0.2, 10.0)
        ),
        published="9-18-65-25 (6,150), 1.0 %",
        weights_limit=6_150,
        error_limit=1.0,
    ),
    # Targets in place of λ, as in Gallego-Posada et al. (2022): the share of the gated
    # weights, in all or of each layer.
    "mlp-target": Row(
        dataclasses.replace(MLP, target_density=(0.33,), **TARGET),
        published="26.6 % of the parameters, 1.77 ± 0.08 %",
    ),
    "mlp-target-per-layer": Row(
        dataclasses.replace(MLP, target_density=(0.3,) * 3, **TARGET),
        published="7.59 % of the parameters, 2.19 ± 0.12 %",
    ),
    # At as many parameters as the published runs end with.
    "mlp-target-per-layer-0.27": Row(
        dataclasses.replace(MLP, target_density=(0.27,) * 3, **TARGET),
        published="7.59 % of the parameters, 2.19 ± 0.12 %",
    ),
    "lenet5-target": Row(
        dataclasses.replace(LENET5, target_density=(0.1,), **TARGET),
        published="7.75 % of the parameters, 1.01 ± 0.05 %",
    ),
    "lenet5-target-per-layer": Row(
        dataclasses.replace(LENET5, target_density=(0.5, 0.3, 0.7, 0.1), **TARGET),
        published="2.35 % of the parameters, 0.91 ± 0.05 %",
    ),
    # A little below the parameters that the published runs end with, as targets.
    "lenet5-params-0.07": Row(
        dataclasses.replace(LENET5, target_params=0.07, **TARGET),
        published="7.75 % of the parameters, 1.01 ± 0.05 %",
    ),
    "lenet5-params-0.02": Row(
        dataclasses.replace(LENET5, target_params=0.02, **TARGET),
        published="2.35 % of the parameters, 0.91 ± 0.05 %",
    ),
    # As few single weights as the best published networks of units have, by the family
    # that the comparison of families found best.
    "mlp-weights-few": Row(
        dataclasses.replace(MLP, lam=(0.08,), epochs=120, **STRAIGHT_THROUGH),
        published="97-71-33 (9,560), 1.6 %",
        weights_limit=9_550,
        error_limit=1.6,
    ),
    "lenet5-weights-few": Row(
        dataclasses.replace(LENET5, lam=(1.0,), epochs=30, **STRAIGHT_THROUGH),
        published="5-10-76-16 (2,751), 1.0 %",
        weights_limit=2_751,
        error_limit=1.0,
    ),
    # A curve of error against single weights left: four costs of a weight each.
    **{
        f"mlp-weights-{c:g}": Row(
            dataclasses.replace(MLP, lam=(c,), epochs=60, **WEIGHTS)
        )
        for c in CURVE
    },
    **{
        f"lenet5-weights-{c:g}": Row(
            dataclasses.replace(LENET5, lam=(c,), epochs=20, **WEIGHTS)
        )
        for c in CURVE
    },
}


def command(name: str) -> str:
    """The command that runs a row."""
    return f"python -m experiments.mnist_rows {name}"


def record(line: dict[str, Any]) -> None:
    """Puts the result of a row into those that are recorded."""
    results.put(RESULTS, [line], {"row": ROWS, "seed": ()})


def run(name: str, seed: int) -> None:
    """Runs one seed of a row, or goes on with it, and records the result."""
    folder = RUNS / f"{name}-seed{seed}"
    config = dataclasses.replace(
        ROWS[name].config,
        seed=seed,
        out=folder,
        resume=(folder / "config.json").exists(),
    )
    found = mnist.main(config)
    record({"row": name, **results.read(folder)[-1]})
    print(mnist.table(found), flush=True)


def main(arguments: rows.Arguments) -> None:
    """Runs rows by name."""

    def told(row: Row) -> dict[str, Any]:
        return mnist.scientific(row.config)

    rows.run(arguments, "experiments.mnist_rows", ROWS, run, told)


if __name__ == "__main__":
    main(tyro.cli(rows.Arguments, description=__doc__))
