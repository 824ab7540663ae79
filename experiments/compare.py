"""Runs of any study side by side: one table, paired differences, a picture.

    python -m experiments.compare runs/digits-* runs/channel_rows/comparison
    python -m experiments.compare runs/equal --against dcp --out comparison

Prints a Markdown table with a line for each method: test errors with 95 % intervals
over seeds, what is left of the network, and with `--against` how far each is above one
method on the same seeds. With `--out` it is also written as `table.md`, `table.csv` and
`table.tex`, every network as a line of `runs.csv`, and `frontier.png` draws errors
against what is left.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import matplotlib
import matplotlib.style
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness import csv_lines
from experiments.reports.printing import latex, markdown, mean_and_half_width
from experiments.reports.runs import (
    METRICS,
    Result,
    by_method,
    lines,
    metric_of,
    runs,
)
from experiments.reports.style import COLOURS, STYLE


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare runs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders of runs, or patterns of them"""
    against: str | None = None
    """a method from which the others' differences are taken, seed by seed"""
    out: Path | None = None
    """folder for the table in all formats and the picture"""


def main(config: Config) -> str:
    """The table; written too, if there is a folder."""
    found = runs(*config.runs)
    header, table = lines(found, config.against)
    text = markdown(header, table)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "table.md").write_text(text + "\n")
        (config.out / "table.tex").write_text(latex(header, table))
        rows = [dict(zip(header, line, strict=True)) for line in table]
        csv_lines.write(config.out / "table.csv", rows)
        csv_lines.write(config.out / "runs.csv", [result.row() for result in found])
        with matplotlib.style.context(["default", STYLE]):
            frontier(found).savefig(config.out / "frontier.png")
    return text


def frontier(results: list[Result]) -> Figure:
    """Test error or loss against the share that is left, a panel for each task and
    cost."""
    metric = metric_of(results)
    panels: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for (task, method), its in by_method(results).items():
        for cost in its[0].costs:
            panels.setdefault((task, cost), {})[method] = its
    figure = Figure(figsize=(5 * max(len(panels), 1), 4), layout="constrained")
    axes_of = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axes, ((task, cost), methods) in zip(axes_of, panels.items(), strict=False):
        for at, (method, its) in enumerate(methods.items()):
            point(axes, at, method, its, cost, metric)
        axes.set_title(task)
        axes.set_xlabel(f"{cost} left, %")
        axes.set_ylabel(f"{metric}, {METRICS[metric][0]}")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def point(
    axes: Axes, at: int, method: str, its: Sequence[Result], cost: str, metric: str
) -> None:
    """The mean over seeds of a method, the `at`-th one, with its 95 % interval."""
    x = np.mean([100 * r.costs[cost] for r in its if cost in r.costs])
    y, half = mean_and_half_width(r.metrics[metric] for r in its)
    axes.errorbar(
        x,
        y,
        half if len(its) > 1 else None,
        marker="osD^vP*X"[at // len(COLOURS) % 8],
        color=COLOURS[at % len(COLOURS)],
        linestyle="none",
        capsize=2,
        label=method,
    )


def cli() -> None:
    config = tyro.cli(Config, description=__doc__)
    try:
        print(main(config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"experiments.compare: {error}") from None


if __name__ == "__main__":
    cli()
