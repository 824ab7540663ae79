"""The table and the pictures of a comparison of gate families, from its CSV alone.

    python -m experiments.family_report FOLDER

writes into the folder, in a few seconds:

- `table.md`: every family at every λ, mean ± 95 % interval over seeds;
- `figures/frontier-weights.png` and `figures/frontier-macs.png`: test error against
  what is left, with published points;
- `figures/densities.png`: what each family draws at three settings of its logit.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments import family_settings, mnist_settings
from experiments.harness import csv_lines
from experiments.reports.printing import interval, markdown, mean_and_half_width
from experiments.reports.published_networks import PUBLISHED, cost
from experiments.reports.style import BLUE, COLOURS, REMOVED, STYLE
from l0jax import gates

Row = dict[str, str]
RULE = "paper"


NUMBER = re.compile(r"\d+(?:\.\d+)?")
MOST_CURVES = 6
"""In one panel."""


def gate_named(family: str) -> gates.Gate:
    """A family of the comparison, with its settings."""
    return mnist_settings.gate_of(
        mnist_settings.Config(**family_settings.VARIANTS[family])
    )


def kind_of(family: str) -> str:
    """What a family is compared with, by its own properties."""
    gate = gate_named(family)
    if isinstance(gate, gates.Mixture | gates.RelaxedMixture):
        return "mixtures"
    if isinstance(gate, gates.Bernoulli):
        return "Bernoulli gates, by estimator"
    if gate.random and gate.bounded:
        return "other stochastic gates"
    return "without noise, and controls"


def panels_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Families by kind, no more of them together than can be told apart."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    panels = {}
    for kind, here in kinds.items():
        parts = -(-len(here) // MOST_CURVES)
        for at in range(parts):
            title = kind if parts == 1 else f"{kind}, {at + 1} of {parts}"
            panels[title] = here[at::parts]
    return panels


def write(folder: Path) -> list[Path]:
    """Writes the table and all pictures; says where they are."""
    rows = read(folder / "results.csv")
    (folder / "table.md").write_text(table(rows) + "\n")
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    drawn = []
    with matplotlib.style.context(["default", STYLE]):
        for name, figure in (
            ("frontier-weights.png", frontier(rows, "weights")),
            ("frontier-macs.png", frontier(rows, "macs")),
            ("densities.png", densities(sorted({row["family"] for row in rows}))),
        ):
            drawn.append(figures / name)
            figure.savefig(drawn[-1])
    return drawn


def read(file: Path) -> list[Row]:
    """The lines of a comparison's CSV.

    Raises:
        FileNotFoundError: if there are none yet.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: no family has finished yet")
    return csv_lines.read(file)


def by(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """The lines grouped by some columns, in the order of the file."""
    grouped = defaultdict(list)
    for row in rows:
        grouped[tuple(row[column] for column in columns)].append(row)
    return dict(grouped)


def numbers(rows: Iterable[Row], column: str) -> np.ndarray:
    """One column."""
    return np.array([float(row[column]) for row in rows])


# -------------------------------------------------------------------------- the table

HEADER = [
    *(
        "family",
        "c in λ = c/N, or target",
        "test error, %",
        "architectures by seed",
        "weights",
    ),
    *("MACs", "expected L0", "L0 at test time", "undecided, %"),
    *("variance of gradients", "ms a step", "by other rules: test error, weights"),
    "verdict",
]


def table(rows: list[Row]) -> str:
    """Every family at every λ, under the rule of its paper and beside it the others."""
    lines = []
    for (family, strength), found in by_strength(rows).items():
        rules = by(found, "rule")
        rule = rule_of(found[0])
        its = rules[rule,]
        others = [
            f"{name} {numbers(other, 'test_error').mean():.2f}, "
            f"{numbers(other, 'weights').mean():,.0f}"
            for (name,), other in rules.items()
            if name != rule
        ]
        lines.append(
            [
                family,
                strength,
                interval(numbers(its, "test_error")),
                ", ".join(row["architecture"] for row in its),
                interval(numbers(its, "weights"), 0),
                interval(numbers(its, "macs"), 0),
                interval(numbers(its, "expected_l0"), 0),
                interval(numbers(its, "test_l0"), 0),
                interval(100 * numbers(its, "undecided"), 1),
                f"{numbers(its, 'gradient_variance').mean():.1e}",
                f"{numbers(its, 'step_ms').mean():.2f}",
                "; ".join(others),
                verdicts(its),
            ]
        )
    return markdown(HEADER, lines)


def by_strength(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """The lines of each family at each λ and each target."""
    grouped = defaultdict(list)
    for row in rows:
        share = row.get("target")
        said = f"{100 * float(share):g} % left" if share else row["lam"]
        grouped[row["family"], said].append(row)
    return dict(grouped)


def rule_of(row: Row) -> str:
    """By which a line is shown: the budget where there is one, else the paper's."""
    return "budget" if row.get("target") else RULE


def verdicts(rows: Sequence[Row]) -> str:
    """What is said of several seeds: what differs in its numbers only is said once,
    with the lowest and the highest, and of how many seeds it is said."""
    said: dict[str, list[list[float]]] = defaultdict(list)
    for row in rows:
        for each in row["verdict"].split("; "):
            found = NUMBER.findall(each)
            said[NUMBER.sub("{}", each)].append([float(number) for number in found])
    lines = []
    for text, found in said.items():
        ranges = [
            sorted({f"{n:g}" for n in column}, key=float)
            for column in zip(*found, strict=True)
        ]
        spans = [f"{r[0]} to {r[-1]}" if len(r) > 1 else r[0] for r in ranges]
        line = text.format(*spans)
        of = "" if len(found) == len(rows) else f"{len(found)} of {len(rows)}: "
        lines.append(of + line)
    return "; ".join(lines)


# ------------------------------------------------------------------------ the frontier


def frontier(rows: list[Row], column: str) -> Figure:
    """Test error against what is left, a panel for each kind of family."""
    rows = [row for row in rows if row["rule"] == rule_of(row)]
    of_family = by(rows, "family")
    reference = of_family.pop(("hard_concrete",), [])
    model = rows[0]["model"]
    kinds = panels_of(name for (name,) in of_family)
    kinds = kinds or {"hard concrete": []}
    height, width = (len(kinds) + 1) // 2, min(len(kinds), 2)
    figure = Figure(figsize=(11, 1 + 3.5 * height), layout="constrained")
    panels = figure.subplots(height, width, sharex=True, sharey=True, squeeze=False)
    panels, bottom, first = panels.ravel(), panels[-1], panels[:, 0]
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    for axes, (title, here) in zip(panels, kinds.items(), strict=False):
        axes.set_title(title)
        if rows[0]["dataset"] == "mnist":
            published(axes, model, column)
        if reference:
            curve(axes, reference, column, "hard_concrete", "black")
        for at, name in enumerate(here):
            label = name.removeprefix("mixture-").removeprefix("bernoulli-")
            curve(axes, of_family[name,], column, label, COLOURS[at])
        axes.legend(fontsize="small", ncols=2 if len(here) > 5 else 1)
    error = numbers(rows, "test_error")
    lowest, highest = np.nanmin(error), min(np.nanmax(error), 4 * np.nanmin(error))
    whole = float(rows[0][f"dense_{column}"])
    kept = numbers(rows, column)[error <= highest]
    fewest = kept.min(initial=whole)
    if rows[0]["dataset"] == "mnist":
        costs = [cost(model, point.widths, column) for point in PUBLISHED[model]]
        fewest = min(fewest, *costs)
        lowest = min(lowest, *(point.error for point in PUBLISHED[model]))
    for axes in panels:
        axes.set_xscale("log")
        axes.set_yscale("log")
        # (What has collapsed lies outside.)
        axes.set_xlim(0.6 * fewest, 1.2 * whole)
        axes.set_ylim(0.9 * lowest, 1.1 * highest)
        # (Three labels at least, however narrow the range.)
        wide = highest / lowest > 4
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 1.5, 2, 3, 5)) if wide else MaxNLocator(5)
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    what = {"weights": "weights left", "macs": "multiply-accumulates left"}[column]
    for axes in bottom:
        axes.set_xlabel(what)
    if rows[0]["dataset"] == "mnist":
        listed = [
            f"{number}: {point.name} ({point.source})"
            for number, point in enumerate(PUBLISHED[model], 1)
        ]
        half = (len(listed) + 1) // 2
        lines = [";  ".join(listed[:half]), ";  ".join(listed[half:])]
        figure.supxlabel("published, grey: " + "\n".join(lines), fontsize=8)
    for axes in first:
        axes.set_ylabel("test error, %")
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(
        f"{model} on {rows[0]['dataset']}, {rows[0]['epochs']} epochs: "
        + (f"means of {seeds} seeds with 95 % intervals" if seeds > 1 else "one seed")
        + ", a point for each λ or target"
    )
    return figure


def curve(
    axes: Axes,
    rows: list[Row],
    column: str,
    label: str,
    colour: str,
) -> None:
    """One family: a point with both intervals for each λ."""
    points = []
    for found in by_strength(rows).values():
        pair = [
            mean_and_half_width(numbers(found, name)) for name in (column, "test_error")
        ]
        points.append((*pair[0], *pair[1]))
    x, x_half, y, y_half = np.array(points).T
    axes.errorbar(
        x,
        y,
        y_half,
        np.minimum(x_half, 0.9 * x),
        color=colour,
        label=label,
        linewidth=1,
        elinewidth=0.6,
        marker="o",
        markersize=3.5,
    )


def published(axes: Axes, model: str, column: str) -> None:
    """What papers report, as grey squares with their names."""
    for number, point in enumerate(PUBLISHED[model], 1):
        x = cost(model, point.widths, column)
        axes.plot(x, point.error, "o", color="#777777", markersize=9, zorder=3)
        axes.annotate(
            str(number),
            (x, point.error),
            ha="center",
            va="center",
            fontsize=7,
            color="white",
            zorder=4,
        )


# ----------------------------------------------------------------------- the densities

SETTINGS = (-2.0, 0.0, 2.0)
BELOW_LEGEND = 0.85
"""Share of a panel's height."""


def densities(names: Sequence[str], draws: int = 200_000) -> Figure:
    """What each family draws at three logits; the masses at 0 and at 1 in words."""
    kinds = {}
    for name in names:
        gate = mnist_settings.gate_of(
            mnist_settings.Config(**family_settings.VARIANTS[name])
        )
        kinds.setdefault(gate, name.split("-")[0] if "bernoulli" in name else name)
    columns = 4
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(12, 2.2 * lines + 0.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axes, (gate, name) in zip(panels, kinds.items(), strict=False):
        axes.set_title(name, fontsize="small")
        density(axes, gate, draws)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    figure.supxlabel("z", fontsize="medium")
    figure.supylabel("density", fontsize="medium")
    figure.suptitle(
        "Density of a gate at the logits -2, 0 and 2; in the legends P(z = 0), P(z = 1)"
    )
    return figure


def density(axes: Axes, gate: gates.Gate, draws: int) -> None:
    """One family."""
    low, high = (0, 1) if gate.bounded else (-2, 4)
    bins = np.linspace(low, high, 81)
    for logit, colour in zip(SETTINGS, (COLOURS[1], BLUE, COLOURS[2]), strict=True):
        logits = jnp.full(draws, logit, jnp.float32)
        z = np.asarray(gate.sample(jax.random.key(0), logits))
        label = f"{(z == 0).mean():.2f}, {(z == 1).mean():.2f}"
        between = z[(z != 0) & (z != 1)]
        if len(np.unique(between)) <= 1:
            for value in np.unique(z):
                axes.axvline(value, ymax=BELOW_LEGEND, color=colour, linewidth=1.5)
            label = "always " + ", ".join(f"{value:.2f}" for value in np.unique(z))
            if gate.random:
                label = f"{(z == 0).mean():.2f}, {(z == 1).mean():.2f}"
            axes.plot([], [], color=colour, label=label)
            continue
        height, _ = np.histogram(between, bins)
        height = height / draws / np.diff(bins)
        axes.stairs(height, bins, color=colour, label=label)
    axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    axes.tick_params(labelsize=6)
    axes.axhline(0, color=REMOVED, linewidth=0.5)
    if gate.random:
        axes.set_ylim(0, (3.2 if gate.bounded else 1.2) / BELOW_LEGEND)
    if not gate.random:
        axes.set_yticks([])
    axes.legend(
        fontsize=6,
        loc="upper center",
        ncols=len(SETTINGS),
        handlelength=1,
        columnspacing=1,
        borderpad=0.2,
    )


def main() -> None:
    """Writes the table and the pictures of the comparison in the folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of a comparison")
    for file in write(parser.parse_args().folder):
        print(file)


if __name__ == "__main__":
    main()
