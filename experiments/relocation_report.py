"""The tables and pictures of soft knowledge relocation, from its folder alone.

    python -m experiments.relocation_report FOLDER

writes into the folder, in a few seconds:

- `table.md`: for every ratio, budget and arm the accuracy, its spread over heuristics,
  the variance between heuristics and by how much that is lower than with pruning at
  once, with 95 % intervals;
- `runs.csv`: every run;
- `figures/spread.png`: the accuracy of every heuristic in every arm;
- `figures/variance.png`: the standard deviation between heuristics with its 95 %
  interval, and the mean accuracy, against the budget.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness import command_line, results
from experiments.harness.results import Line
from experiments.relocation_settings import ADVERSARIES, Case
from experiments.relocation_training import ARMS
from experiments.reports import runs
from experiments.reports.printing import markdown
from experiments.reports.style import COLOURS, REMOVED, STYLE
from l0jax import agnosticism
from l0jax.agnosticism import Interval

BASELINE = "one_shot"
NAMES = {
    "one_shot": "at once",
    "least_squares": "at once, least squares",
    "soft": "soft",
    "soft_least_squares": "soft, least squares",
    "growing_l2": "growing L2",
    "soft_linear": "soft, linear",
    "soft_exponential": "soft, exponential",
    "soft_longer": "soft, 90 % of the budget",
    "soft_stochastic": "soft, stochastic",
    "soft_refitted": "soft, least squares at removal",
    "soft_distilled": "soft, distillation",
    "soft_reconstructed": "soft, reconstruction",
    "soft_balanced": "soft, both by GradNorm",
}


class Cell:
    """The runs of one arm, ratio and budget, that all heuristics and seeds have."""

    def __init__(self, rows: Iterable[Line]):
        self.of = {
            (r["heuristic"], r["seed"]): 100 - r["metrics"]["test error"] for r in rows
        }
        self.seeds = sorted({seed for _, seed in self.of})
        # In the order of the file; those that some seed misses are left out.
        self.heuristics = [
            name
            for name in dict.fromkeys(name for name, _ in self.of)
            if all((name, seed) in self.of for seed in self.seeds)
        ]

    def table(self, heuristics: Sequence[str]) -> np.ndarray:
        """(heuristics, seeds), accuracies in per cent."""
        return np.array([[self.of[h, s] for s in self.seeds] for h in heuristics])

    def usual(self) -> list[str]:
        """The heuristics that aren't adversaries."""
        return [name for name in self.heuristics if name not in ADVERSARIES]


Cells = dict[tuple[float, int, str], Cell]


def cells(rows: Iterable[Line]) -> Cells:
    """The runs by ratio, budget and arm, in the order of the arms."""
    names = ("ratio", "budget", "arm")
    order = results.sort(rows, {"ratio": (), "budget": (), "arm": ARMS})
    return {key: Cell(its) for key, its in results.by(order, *names).items()}


def compared(
    there: Cells, key: tuple[float, int, str], adversaries: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """The baseline's table and a cell's, of the same heuristics and seeds; None if it
    is the baseline, or has other seeds."""
    cell, base = there[key], there.get((*key[:2], BASELINE))
    if base is None or base is cell or cell.seeds != base.seeds:
        return None
    names = [
        name
        for name in (cell.heuristics if adversaries else cell.usual())
        if name in base.heuristics
    ]
    return base.table(names), cell.table(names)


def written(interval: Interval, digits: int, sign: bool = False) -> str:
    """An estimate with its interval."""
    value, low, high = (f"{v:{'+' if sign else ''}.{digits}f}" for v in interval)
    return f"{value} [{low}, {high}]".replace("-inf", "−∞")


def table(rows: Sequence[Line]) -> str:
    """One line for every ratio, budget and arm."""
    there, lines = cells(rows), []
    for key, cell in there.items():
        if len(cell.usual()) < 2 or len(cell.seeds) < 2:
            continue
        ratio, budget, arm = key
        mine = cell.table(cell.usual())
        means = mine.mean(1)
        line = [
            f"{ratio:g}",
            str(budget),
            NAMES.get(arm, arm),
            f"{means.mean():.2f}",
            f"{means.min():.1f} to {means.max():.1f}",
            f"{agnosticism.heuristic_variance(mine):.3g}",
        ]
        usual = compared(there, key, adversaries=False)
        everything = compared(there, key, adversaries=True)
        if usual is None or everything is None:
            line += ["", "", ""]
        else:
            line += [
                written(agnosticism.reduction(*usual), 2),
                written(agnosticism.change(*usual), 2, sign=True),
                written(agnosticism.reduction(*everything), 2),
            ]
        lines.append(line)
    header = [
        *("ratio", "steps", "arm", "accuracy, %", "over heuristics"),
        *("variance between heuristics", "lower by (share) [95 %]"),
        *("accuracy above at once [95 %]", "with adversaries, lower by"),
    ]
    return markdown(header, lines)


# ------------------------------------------------------------------------- pictures


def panels_of(there: Cells) -> tuple[list[float], list[int], list[str]]:
    """The ratios, budgets and arms that there are."""
    ratios = sorted({ratio for ratio, _, _ in there})
    budgets = sorted({budget for _, budget, _ in there})
    return ratios, budgets, list(dict.fromkeys(arm for *_, arm in there))


def spread(rows: Sequence[Line]) -> Figure:
    """Each heuristic's accuracy, in the mean over seeds."""
    there, told = cells(rows), rows[0]["settings"]
    ratios, budgets, arms = panels_of(there)
    # The title takes seven inches.
    size = (
        max(1.5 + 3.4 * len(budgets), 7),
        0.9 + (0.5 + 0.3 * len(arms)) * len(ratios),
    )
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(ratios), len(budgets), squeeze=False, sharey=True)
    for at, ratio in enumerate(ratios):
        for beside, budget in enumerate(budgets):
            axes = grid[at, beside]
            for place, arm in enumerate(arms):
                cell = there.get((ratio, budget, arm))
                if cell is None:
                    continue
                means = cell.table(cell.heuristics).mean(1)
                usual = np.isin(cell.heuristics, cell.usual())
                colour = COLOURS[place % len(COLOURS)]
                line = means[usual].min(), means[usual].max()
                axes.plot(line, [place] * 2, color=REMOVED, linewidth=5, zorder=1)
                axes.plot(means[usual], [place] * usual.sum(), "o", color=colour)
                axes.plot(
                    means[~usual],
                    [place] * (~usual).sum(),
                    "x",
                    color=colour,
                    markersize=5,
                )
            axes.set_yticks(range(len(arms)), [NAMES.get(a, a) for a in arms])
            axes.set_ylim(len(arms) - 0.5, -0.5)
            axes.set_title(f"{ratio:.0%} of the units removed, {budget} steps")
            if at == len(ratios) - 1:
                axes.set_xlabel("test accuracy, %")
    figure.suptitle(
        f"{told['model']} on {told['dataset']}: a dot for each heuristic, "
        "a cross for an adversary"
    )
    return figure


def variance(rows: Sequence[Line]) -> Figure:
    """The spread between heuristics and the accuracy, against the budget."""
    there, told = cells(rows), rows[0]["settings"]
    ratios, budgets, arms = panels_of(there)
    figure = Figure(figsize=(9, 0.8 + 2.8 * len(ratios)), layout="constrained")
    grid = figure.subplots(len(ratios), 2, squeeze=False, sharex=True)
    for at, ratio in enumerate(ratios):
        left, right = grid[at]
        for number, arm in enumerate(arms):
            tables = {
                budget: there[ratio, budget, arm].table(
                    there[ratio, budget, arm].usual()
                )
                for budget in budgets
                if (ratio, budget, arm) in there
                and len(there[ratio, budget, arm].seeds) > 1
            }
            if not tables:
                continue
            style = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": "os^vD<>ph*XP+"[number % 13],
                "label": NAMES.get(arm, arm),
            }
            # Below zero there is nothing to take a root of: no spread is seen.
            found = np.sqrt(
                np.maximum(
                    [agnosticism.variance_interval(t) for t in tables.values()], 0
                )
            ).T
            # (Beside one another, or intervals would hide intervals.)
            beside = np.array([*tables]) * 1.04 ** (number - (len(arms) - 1) / 2)
            left.errorbar(
                beside,
                found[0],
                (found[0] - found[1], found[2] - found[0]),
                elinewidth=0.8,
                **style,
            )
            means = [t.mean() for t in tables.values()]
            right.plot(list(tables), means, **style)
        _labelled(left, ratio, "deviation between heuristics, points")
        _labelled(right, ratio, "mean test accuracy, %")
        left.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xticks(budgets, [str(b) for b in budgets])
            axes.minorticks_off()
            if at == len(ratios) - 1:
                axes.set_xlabel("steps from the base network to the small one")
    if grid[0, 1].lines:
        grid[0, 1].legend(fontsize="small")
    figure.suptitle(f"{told['model']} on {told['dataset']}")
    return figure


def _labelled(axes: Axes, ratio: float, name: str) -> None:
    axes.set_title(f"{ratio:.0%} of the units removed")
    axes.set_ylabel(name)


def write(folder: Path) -> bool:
    """Writes all of it; whether there is a result."""
    rows = results.read(folder)
    if not rows:
        return False
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table(rows) + "\n")
    own = (*Case._fields, "heuristic", "params")
    runs.write_csv(folder, *own)
    with matplotlib.style.context(["default", STYLE]):
        for name, draw in (("spread", spread), ("variance", variance)):
            draw(rows).savefig(figures / f"{name}.png")
    return True


if __name__ == "__main__":
    command_line.report(__doc__, "experiments.relocation_report", write)
