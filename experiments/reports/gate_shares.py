"""What gates leave in expectation over the epochs, by variant."""

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from experiments.harness.results import by
from experiments.reports.style import COLOURS, STYLE


def picture(results: list[dict[str, Any]]) -> Figure:
    """The expected share of the multiply-accumulates over the epochs."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for at, (name, lines) in enumerate(by(results, "method").items()):
        its = [line["shares"] for line in lines]
        axes.plot(
            100 * np.array(its).T,
            color=COLOURS[at % len(COLOURS)],
            linestyle="-" if at < len(COLOURS) else "--",
            # Of two that lie upon one another both are seen.
            linewidth=(3.5, 1.2)[at % 2],
            zorder=2 + at % 2,
            label=[name] + [None] * (len(its) - 1),
        )
    for target in {result["settings"]["target"] for result in results} - {None}:
        axes.axhline(100 * target, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("epoch")
    axes.set_ylabel("multiply-accumulates expected, %")
    axes.set_ylim(0, 105)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    config = results[0]["settings"]
    figure.suptitle(f"WRN-{config['depth']}-{config['factor']}, {config['dataset']}")
    return figure


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """The picture in a file."""
    with matplotlib.style.context(["default", STYLE]):
        picture(results).savefig(file)
