"""The rows of the frontier of MNIST in `RESULTS.md`, beside published networks.

    python -m experiments.frontier_rows mlp-units       # one row, all its seeds
    python -m experiments.frontier_rows --list

Each is a run of `experiments.frontier`. A seed becomes a line of
`experiments/results/frontier/runs.jsonl` when it has ended, which
`experiments.tables` prints, and the picture beside it is drawn anew. A row that was
interrupted goes on where it stopped. Settings were chosen on the validation images.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments import frontier
from experiments.harness import results, rows, run_folder
from experiments.reports import places
from experiments.reports.printing import interval, markdown, mean_and_half_width
from experiments.reports.style import BLACK, COLOURS, STYLE

RUNS = Path("runs") / "frontier_rows"
RESULTS = places.RESULTS / "frontier"
PICTURE = "frontier.png"


@dataclasses.dataclass(frozen=True)
class Row:
    """Settings, and what is published of as many weights.

    Args:
        config: the settings, but for the seeds.
        published: who, and how it was counted.
        error: that is published, in per cent of the test images.
        seeds: that are run.
    """

    config: frontier.Config
    published: str
    error: float
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


UNITS = frontier.Config()
LENET5 = dataclasses.replace(UNITS, model="lenet5", dense=20, closing=40, tuning=40)
WEIGHTS = dataclasses.replace(UNITS, gates="weight", gate="bernoulli")
ROWS = {
    "mlp-units": Row(
        UNITS,
        "97-71-33 of the information bottleneck (Dai et al. 2018), best epoch on the "
        "test images",
        1.6,
    ),
    "lenet5-units": Row(
        dataclasses.replace(LENET5, weights=2_751),
        "5-10-76-16 of BC-GHS (Louizos et al. 2017), as a dense network",
        1.0,
    ),
    "mlp-weights-6300": Row(
        dataclasses.replace(WEIGHTS, weights=6_300),
        "RigL (Evci et al. 2020), last epoch",
        1.48,
    ),
    "mlp-weights-3100": Row(
        dataclasses.replace(WEIGHTS, weights=3_100),
        "RigL+ (Evci et al. 2020), last epoch",
        1.69,
    ),
}


def run(row: str, seed: int) -> None:
    """Runs one seed of a row, or goes on with it, and records it."""
    config = dataclasses.replace(ROWS[row].config, seeds=(seed,), out=RUNS / row)
    new = [
        {"row": row, **line}
        for line in frontier.main(config)["results"]
        if line["seed"] == seed
    ]
    results.put(RESULTS, new, {"row": ROWS, "seed": ()})
    with matplotlib.style.context(["default", STYLE]):
        picture(recorded()).savefig(RESULTS / PICTURE)


def recorded() -> dict[str, list[dict[str, Any]]]:
    """The results of each row, by seed."""
    found = results.by(results.read(RESULTS), "row")
    return {row: lines for row, lines in found.items() if row in ROWS}


def picture(of_rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Errors against weights, ours with 95 % intervals and those that are published."""
    tasks = dict.fromkeys(its[0]["task"] for its in of_rows.values())
    figure = Figure(figsize=(4.5 * max(len(tasks), 1), 5), layout="constrained")
    panels = figure.subplots(1, max(len(tasks), 1), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=False):
        here = {name: its for name, its in of_rows.items() if its[0]["task"] == task}
        for at, (name, its) in enumerate(here.items()):
            weights = np.mean([line["weights"] for line in its])
            error, half = mean_and_half_width(
                line["metrics"]["test error"] for line in its
            )
            axes.errorbar(
                weights,
                error,
                half if len(its) > 1 else None,
                marker="o",
                color=COLOURS[at],
                linestyle="none",
                capsize=2,
                label=f"{its[0]['method']}, {weights:,.0f} weights",
            )
            axes.plot(
                ROWS[name].config.weights,
                ROWS[name].error,
                marker="x",
                color=COLOURS[at],
                linestyle="none",
                label=ROWS[name].published.split(" (")[0],
            )
        dense, _ = mean_and_half_width(
            line["metrics"]["dense test error"] for its in here.values() for line in its
        )
        axes.axhline(dense, color=BLACK, linewidth=0.8, linestyle=":", label="dense")
        axes.set_xscale("log")
        # So that networks of nearly one size stand beside each other.
        at_least, at_most = axes.get_xlim()
        axes.set_xlim(at_least / 1.2, at_most * 1.2)
        budgets = sorted({ROWS[name].config.weights for name in here})
        axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets], minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("weights left")
        axes.set_ylabel("test error, %")
        axes.set_title(task)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def section() -> str:
    """What `RESULTS.md` says of the rows that are recorded."""
    there = recorded()
    if not there:
        return ""
    header = [
        *("row", "published", "its error", "weights", "test error, last epoch"),
        *("of the dense network", "architectures by seed", "seeds", ""),
    ]
    inside = RESULTS.relative_to(places.ROOT)
    of = next(iter(there.values()))[0]["settings"]
    return "\n\n".join(
        [
            "### A number of weights, and what the dense network says",
            "`python -m experiments.frontier_rows ROW`: a dense network is trained, "
            "closed to a number of weights by gates, and what is left is trained on; "
            f"it learns from labels and, with {of['distil']:g} of the weight, from the "
            f"dense network. Epochs: {epochs(there)}. Published networks have other "
            "numbers of epochs and learn from labels alone.",
            markdown(header, [line(name, its) for name, its in there.items()]),
            f"![error against weights]({inside}/{PICTURE})",
        ]
    )


def epochs(of_rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Of the three trainings of each row."""
    said: dict[str, list[str]] = {}
    for name, its in of_rows.items():
        of = its[0]["settings"]
        number = " + ".join(str(of[part]) for part in ("dense", "closing", "tuning"))
        said.setdefault(number, []).append(f"`{name}`")
    return "; ".join(f"{number} ({', '.join(names)})" for number, names in said.items())


def line(name: str, its: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row of the table; errors and weights are compared as they are printed."""
    row = ROWS[name]
    errors = [each["metrics"]["test error"] for each in its]
    weights = [each["weights"] for each in its]
    kept = round(float(np.mean(errors)), 2) <= row.error
    kept &= max(weights) <= row.config.weights
    sizes = (shape(each["architecture"]) for each in its)
    return [
        f"`{name}`",
        row.published,
        f"{row.error:.2f} %",
        interval(weights, 0),
        f"{interval(errors)} %",
        f"{interval(each['metrics']['dense test error'] for each in its)} %",
        "" if row.config.gates == "weight" else ", ".join(sizes),
        str(len(its)),
        f"{'within' if kept else 'NOT within'} {row.error:g} %, "
        f"{row.config.weights:,} weights",
    ]


def shape(architecture: Mapping[str, Any]) -> str:
    """The units that are left, as papers write them: `97-71-33`."""
    if "maps" in architecture:
        sizes = [*architecture["maps"], architecture["reads"], architecture["hidden"]]
    else:
        sizes = [architecture["reads"], *architecture["features"][1:-1]]
    return "-".join(map(str, sizes))


def main(arguments: rows.Arguments) -> None:
    """Runs rows by name."""

    def told(row: Row) -> dict[str, Any]:
        return run_folder.settings_of(row.config, frontier.UNTOLD)

    rows.run(arguments, "experiments.frontier_rows", ROWS, run, told)


if __name__ == "__main__":
    main(tyro.cli(rows.Arguments, description=__doc__))
