"""Table, CSV and pictures of `experiments.language_model`, from its folder alone.

    python -m experiments.language_report RUN_FOLDER

- `table.md`, `runs.csv`: losses with 95 % intervals over seeds, and what is left;
- `figures/losses.png`: loss against the share that is left, and against seconds;
- `figures/left.png`: which heads and feed-forward units of which block are left, and
  how much of the stream;
- `texts.md`: how the models go on.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from experiments.compare import point
from experiments.harness import command_line, results
from experiments.harness.results import Line, Result
from experiments.reports import runs
from experiments.reports.printing import markdown, mean_and_half_width
from experiments.reports.style import STYLE

AGAINST = "uniform"


def write(folder: Path) -> bool:
    """Writes all of it; whether there is a result."""
    lines = results.read(folder)
    if not lines:
        return False
    found = results.of_folder(folder)
    (folder / "table.md").write_text(table(found) + "\n")
    runs.write_csv(folder)
    (folder / "texts.md").write_text(texts(lines))
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    with matplotlib.style.context(["default", STYLE]):
        losses(found).savefig(figures / "losses.png")
        left(lines).savefig(figures / "left.png")
    return True


def table(found: Sequence[Result]) -> str:
    """A line for each method, and how far it is from uniform narrowing."""
    there = {result.method for result in found}
    return markdown(*runs.lines(found, AGAINST if AGAINST in there else None))


def texts(lines: Sequence[Line]) -> str:
    """How the models of the first seed go on, the base before the others."""
    first = [line for line in lines if line["seed"] == lines[0]["seed"]]
    said = {"what all begin with": first[0]["prompt"]}
    said["base"] = first[0]["base goes on"]
    said |= {line["method"]: line["goes on"] for line in first}
    parts = (f"## {name}\n\n```text\n{text}\n```\n" for name, text in said.items())
    return "\n".join(parts)


def losses(found: Sequence[Result]) -> Figure:
    """Loss against what is left, a panel for each cost."""
    costs = list(found[0].costs)
    figure = Figure(figsize=(4 * len(costs) + 2, 4), layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    methods = runs.by_method(found)
    base, _ = mean_and_half_width(r.metrics["base test loss"] for r in found)
    for axes, cost in zip(panels, costs, strict=True):
        axes.axhline(base, color="grey", linestyle=":", label="base")
        for at, ((_, method), its) in enumerate(methods.items()):
            point(axes, at, method, its, cost, "test loss")
        axes.set_xlabel(f"{cost}, % of the base's")
        axes.set_xlim(0, max(105, axes.get_xlim()[1]))
    panels[0].set_ylabel("test loss, nats a character")
    panels[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def left(lines: Sequence[Line]) -> Figure:
    """Heads and feed-forward units of each block that are left, and the stream's, in
    the mean over seeds."""
    settings = lines[0]["settings"]
    heads, hidden, width = (settings[n] for n in ("heads", "hidden", "width"))
    panels = {
        f"heads left, of {heads}": (heads, lambda line: _of_blocks(line, 0)),
        f"feed-forward units left, of {hidden}": (
            hidden,
            lambda line: _of_blocks(line, 4),
        ),
        f"stream of {width}": (width, lambda line: [line["width"]]),
    }
    methods = results.by(lines, "method")
    blocks = len(lines[0]["blocks"])
    height = 0.34 * len(methods) + 1.2
    figure = Figure(figsize=(10, height), layout="constrained")
    axes_of = figure.subplots(1, 3, sharey=True, width_ratios=(blocks, blocks, 2))
    for axes, (title, (size, counts)) in zip(axes_of, panels.items(), strict=True):
        found = np.array(
            [
                np.mean([counts(line) for line in its], axis=0)
                for its in methods.values()
            ]
        )
        axes.imshow(found / size, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), count in np.ndenumerate(found):
            axes.text(
                column,
                row,
                f"{count:.3g}",
                ha="center",
                va="center",
                fontsize="small",
                color="white" if count > 0.6 * size else "black",
            )
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.set_yticks(range(len(methods)), methods)
        axes.set_title(title)
    for axes in axes_of[:2]:
        axes.set_xticks(range(blocks), range(1, blocks + 1))
        axes.set_xlabel("block")
    return figure


def _of_blocks(line: Line, at: int) -> list[int]:
    return [block[at] for block in line["blocks"]]


if __name__ == "__main__":
    command_line.report(__doc__, "experiments.language_report", write)
