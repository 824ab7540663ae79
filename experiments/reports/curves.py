"""Errors, units and costs over the epochs of a run, and its gates at the end."""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.reports.finished_run import (
    Run,
    Vector,
    by_rule,
    gated_groups,
    sizes_of,
    title_of,
)
from experiments.reports.style import BLUE, COLOURS, ORANGE, SKY

COSTS = {
    "weights": "Weights left",
    "macs": "Computation: multiply-accumulates",
    "reference_flops": "Computation: FLOPs, reference implementation",
    "flops_objective": "Computation: FLOPs, FLOPs-objective paper (Tang et al. 2018)",
}


def training(run: Run) -> Figure:
    """Errors above, the share of each group's units that is left below."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    figure.suptitle(f"Training of {title_of(run)}")
    above, below = figure.subplots(2, 1, sharex=True)
    _errors(above, run)
    _architecture(below, run)
    for axes in (above, below):
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _errors(axes: Axes, run: Run) -> None:
    epochs = _over_epochs(run, "epoch")
    train, validation = (
        _over_epochs(run, key) for key in ("train_error", "validation_error")
    )
    for name, errors, colour in (
        ("training", train, SKY),
        ("validation", validation, BLUE),
    ):
        label = f"{name}, last: {errors[-1]:.2f} %"
        axes.plot(epochs, errors, color=colour, marker=_marker(run), label=label)
    points = _test_errors(run)
    for epoch, error, label, form in points:
        axes.plot(epoch, error, linestyle="", label=label, zorder=3, **form)
    unseen = [*validation, *(error for _, error, _, _ in points)]
    # A training error that falls to nothing may leave the axis: the others matter.
    floor = min((error for error in unseen if error > 0), default=1.0) / 10
    shown = [error for error in (*unseen, *train) if error >= floor]
    _log_percent(axes, min(shown, default=floor), max(shown, default=1.0))
    axes.set_title("Error")
    axes.set_ylabel("error (%), log scale")


def _test_errors(run: Run) -> list[tuple[int, float, str, dict[str, Any]]]:
    """The two test errors worth reporting: epoch, error, label and form of the point.

    They may coincide, so the one is drawn as a ring around the other.
    """
    last = run.epochs[-1]["epoch"]
    dot = {"marker": "D", "markersize": 5, "color": ORANGE}
    ring = {**dot, "marker": "o", "markersize": 11, "fillstyle": "none"}
    points = []
    for key, name, form in (
        ("last", "last epoch", dot),
        ("best_on_validation", "best on validation", ring),
    ):
        found = run.result.get(key) or {}
        if found.get("test_error") is not None:
            epoch, error = found.get("epoch", last), found["test_error"]
            label = f"test, {name}\n(epoch {epoch}): {error:.2f} %"
            points.append((epoch, error, label, form))
    return points


def _architecture(axes: Axes, run: Run) -> None:
    epochs = _over_epochs(run, "epoch")
    # Lines often coincide: what is drawn later has gaps.
    looks = itertools.cycle(zip(COLOURS, ("-", "--", "-.", ":"), strict=False))
    for (group, size), (colour, line) in zip(
        sizes_of(run).items(), looks, strict=False
    ):
        left = np.array([record["architecture"][group] for record in run.epochs])
        axes.plot(
            epochs,
            100 * left / size,
            color=colour,
            linestyle=line,
            marker=_marker(run),
            label=f"{group}: {size:,} → {left[-1]:,}",
        )
    axes.set_title(f"Units left {by_rule(run)}")
    axes.set_ylabel("units left (% of the group)")
    axes.set_ylim(-3, 103)
    _epoch_axis(axes)


def costs(run: Run) -> Figure:
    """Weights and computation left: in expectation, and by the test-time rule."""
    figure = Figure(figsize=(10.5, 7.5), layout="constrained")
    figure.suptitle(f"Costs of {title_of(run)}")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for (key, name), axes in zip(COSTS.items(), grid.flat, strict=True):
        _cost(axes, run, key, name)
    _log_share(grid[0, 0], min(axes.dataLim.y0 for axes in grid.flat))
    for axes in grid[:, 0]:
        axes.set_ylabel("left (% of dense), log scale")
    for axes in grid[1]:
        _epoch_axis(axes)
    return figure


def _cost(axes: Axes, run: Run, key: str, name: str) -> None:
    epochs = _over_epochs(run, "epoch")
    dense = run.epochs[-1]["dense"][key]
    for which, label, colour, line in (
        ("decided", by_rule(run), BLUE, "-"),
        ("expected", "expected over draws of the gates", ORANGE, "--"),
    ):
        left = np.array([record[which][key] for record in run.epochs], float)
        axes.plot(
            epochs,
            100 * left / max(dense, 1),
            color=colour,
            linestyle=line,
            marker=_marker(run),
            label=f"{label}: {left[-1]:,.0f}",
        )
    # Above the axes, where it can't cover a curve; its title is that of the panel.
    legend = axes.legend(
        title=f"{name}\ndense: {dense:,.0f}",
        alignment="left",
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        borderpad=0,
    )
    legend.get_title().set_fontsize("medium")


def gates(run: Run) -> Figure:
    """For each group, P(z != 0) and the values of the gates at test time."""
    groups = gated_groups(run)
    figure = Figure(figsize=(9, 1 + 2 * len(groups)), layout="constrained")
    figure.suptitle(f"Gates of {title_of(run)}, after training")
    grid = figure.subplots(len(groups), 2, sharex="col", squeeze=False)
    for group, (left, right) in zip(groups, grid, strict=True):
        prob_active = run.gates[f"{group}/prob_active"]
        value = run.gates[f"{group}/value"]
        undecided = _share((prob_active > 0.1) & (prob_active < 0.9))
        _histogram(left, prob_active, SKY)
        _histogram(right, value, BLUE)
        left.set_ylabel("gates, log scale")
        left.set_title(f"{group}: {value.size:,} gates, {undecided} undecided")
        at_0, at_1 = value == 0, value == 1
        right.set_title(
            f"exactly 0: {at_0.sum():,} ({_share(at_0)}), "
            f"exactly 1: {at_1.sum():,} ({_share(at_1)})"
        )
    grid[-1, 0].set_xlabel("P(z ≠ 0); undecided: between 0.1 and 0.9")
    grid[-1, 1].set_xlabel(f"gate value {by_rule(run)}")
    return figure


def _histogram(axes: Axes, values: Vector, colour: str) -> None:
    ends = (min(0.0, values.min(initial=0)), max(1.0, values.max(initial=1)))
    axes.hist(values, bins=40, range=ends, color=colour)
    axes.set_yscale("log")
    # From below 1, so that a bar of one gate can be seen.
    axes.set_ylim(0.5, 2 * max(values.size, 1))


def _share(condition: np.ndarray) -> str:
    return f"{100 * condition.sum() / max(condition.size, 1):.1f} %"


def _over_epochs(run: Run, key: str) -> Float[np.ndarray, " epochs"]:
    """One metric over epochs; NaN, which is drawn as a gap, where there is none."""
    return np.array([record.get(key) for record in run.epochs], float)


def _marker(run: Run) -> str:
    """Points where epochs are few: a line through one point can't be seen."""
    return "o" if len(run.epochs) <= 20 else ""


def _epoch_axis(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(
        MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    )


def _log_share(axes: Axes, least: float) -> None:
    """A logarithmic axis from `least` to 100 %; linear below 1 %, to have 0 on it."""
    ticks = (0, 1, 2, 5, 10, 20, 50, 100)
    axes.set_yscale("symlog", linthresh=1, linscale=0.5)
    axes.set_yticks(ticks, map(str, ticks))
    axes.set_ylim(max((tick for tick in ticks if 0 < tick < least), default=-0.3), 120)


def _log_percent(axes: Axes, lowest: float, highest: float) -> None:
    """A logarithmic axis between round numbers that enclose `lowest` and `highest`."""
    round_numbers = [digit * 10.0**n for n in range(-6, 3) for digit in (1, 2, 5)]
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(
        max(number for number in round_numbers if number < lowest),
        min(number for number in round_numbers if number > highest),
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
