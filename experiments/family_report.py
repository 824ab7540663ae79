"""The tables and the pictures of a comparison of gate families, from its folder alone.

    python -m experiments.family_report FOLDER

writes into the folder, in a few seconds:

- `table.md`: every family at every λ, mean ± 95 % interval over seeds;
- `runs.csv`: every member by every rule;
- `figures/frontier-weights.png` and `figures/frontier-macs.png`: test error against
  what is left, with published points;
- `figures/densities.png`: what each family draws at three settings of its logit.
"""

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
from experiments.harness import command_line, results
from experiments.harness.results import Line
from experiments.reports import runs
from experiments.reports.printing import interval, markdown, mean_and_half_width
from experiments.reports.published_networks import PUBLISHED, cost
from experiments.reports.style import BLUE, COLOURS, REMOVED, STYLE
from l0jax import gates

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


OWN = (
    *("family", "lam", "target", "rule", "architecture", "weights", "macs"),
    *("dense_weights", "dense_macs", "expected_l0", "test_l0", "undecided"),
    *("gradient_variance", "step_ms", "verdict"),
)
"""What lines say beside those of other studies."""


def write(folder: Path) -> bool:
    """Writes all of it; whether there is a result."""
    rows = results.read(folder)
    if not rows:
        return False
    (folder / "table.md").write_text(table(rows) + "\n")
    runs.write_csv(folder, *OWN)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    with matplotlib.style.context(["default", STYLE]):
        for name, figure in (
            ("frontier-weights", frontier(rows, "weights")),
            ("frontier-macs", frontier(rows, "macs")),
            ("densities", densities(sorted({row["family"] for row in rows}))),
        ):
            figure.savefig(figures / f"{name}.png")
    return True


def numbers(rows: Iterable[Line], name: str) -> np.ndarray:
    """A metric, or what lines say themselves; nan where that is nothing."""
    return np.array([{**row, **row["metrics"]}[name] for row in rows], float)


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


def table(rows: Sequence[Line]) -> str:
    """Every family at every λ, under the rule of its paper and beside it the others."""
    lines = []
    for (family, strength), found in by_strength(rows).items():
        rules = results.by(found, "rule")
        rule = rule_of(found[0])
        its = rules[rule]
        others = [
            f"{name} {numbers(other, 'test error').mean():.2f}, "
            f"{numbers(other, 'weights').mean():,.0f}"
            for name, other in rules.items()
            if name != rule
        ]
        lines.append(
            [
                family,
                strength,
                interval(numbers(its, "test error")),
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


def by_strength(rows: Iterable[Line]) -> dict[tuple[str, str], list[Line]]:
    """The lines of each family at each λ and each target."""
    grouped = defaultdict(list)
    for row in rows:
        share = row["target"]
        said = f"{row['lam']:g}" if share is None else f"{100 * share:g} % left"
        grouped[row["family"], said].append(row)
    return dict(grouped)


def rule_of(row: Line) -> str:
    """By which a line is shown: the budget where there is one, else the paper's."""
    return RULE if row["target"] is None else "budget"


def verdicts(rows: Sequence[Line]) -> str:
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


def frontier(rows: Sequence[Line], column: str) -> Figure:
    """Test error against what is left, a panel for each kind of family."""
    rows = [row for row in rows if row["rule"] == rule_of(row)]
    of_family = results.by(rows, "family")
    reference = of_family.pop("hard_concrete", [])
    model, dataset, epochs = (
        rows[0]["settings"][name] for name in ("model", "dataset", "epochs")
    )
    kinds = panels_of(of_family)
    kinds = kinds or {"hard concrete": []}
    height, width = (len(kinds) + 1) // 2, min(len(kinds), 2)
    figure = Figure(figsize=(11, 1 + 3.5 * height), layout="constrained")
    panels = figure.subplots(height, width, sharex=True, sharey=True, squeeze=False)
    panels, bottom, first = panels.ravel(), panels[-1], panels[:, 0]
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    for axes, (title, here) in zip(panels, kinds.items(), strict=False):
        axes.set_title(title)
        if dataset == "mnist":
            published(axes, model, column)
        if reference:
            curve(axes, reference, column, "hard_concrete", "black")
        for at, name in enumerate(here):
            label = name.removeprefix("mixture-").removeprefix("bernoulli-")
            curve(axes, of_family[name], column, label, COLOURS[at])
        axes.legend(fontsize="small", ncols=2 if len(here) > 5 else 1)
    error = numbers(rows, "test error")
    lowest, highest = np.nanmin(error), min(np.nanmax(error), 4 * np.nanmin(error))
    whole = rows[0][f"dense_{column}"]
    kept = numbers(rows, column)[error <= highest]
    fewest = kept.min(initial=whole)
    if dataset == "mnist":
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
    if dataset == "mnist":
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
        f"{model} on {dataset}, {epochs} epochs: "
        + (f"means of {seeds} seeds with 95 % intervals" if seeds > 1 else "one seed")
        + ", a point for each λ or target"
    )
    return figure


def curve(
    axes: Axes,
    rows: Sequence[Line],
    column: str,
    label: str,
    colour: str,
) -> None:
    """One family: a point with both intervals for each λ."""
    points = []
    for found in by_strength(rows).values():
        pair = [
            mean_and_half_width(numbers(found, name)) for name in (column, "test error")
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


if __name__ == "__main__":
    command_line.report(__doc__, "experiments.family_report", write)
