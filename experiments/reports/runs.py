"""What runs of all studies have found, read back from their folders in one form."""

import dataclasses
import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from experiments.harness import csv_lines, results
from experiments.harness.devices import PLACES
from experiments.harness.results import Result
from experiments.harness.run_folder import whole
from experiments.reports.printing import interval, mean_and_half_width


def runs(*patterns: str | Path) -> list[Result]:
    """The results in all folders of some patterns, such as `runs("runs/*")`. Nothing
    is written.

    Raises:
        FileNotFoundError: if a pattern matches no folder that holds results.
        ValueError: as `results.read`.
    """
    found: list[Result] = []
    for pattern in patterns:
        folders = sorted(Path(each) for each in glob.glob(str(pattern)))
        here = [result for folder in folders for result in results.of_folder(folder)]
        if not here:
            raise FileNotFoundError(
                f"{pattern} holds no results: give folders of runs, in which there is "
                f"{results.LINES}"
            )
        found += here
    return told_apart(found)


UNTOLD = (
    *("seed", "seeds", "out", "resume", "stop_after", "checkpoint_every", "progress"),
    *("dense", "variant", "method", "families", "arms", "heuristics", "ratios"),
    *("budgets", "together", "base_from", *PLACES),
)
"""Settings that say where and how far to run, or which of several results it is."""


def told_apart(results: Sequence[Result]) -> list[Result]:
    """Methods of one name that were run with other settings get these into their
    names: they are no seeds of one another.

    Raises:
        ValueError: if a result stands in two runs, and would count twice.
    """
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.study, result.task, result.method), []).append(result)
    found = []
    for result in results:
        own = whole(result.settings)
        its = groups[result.study, result.task, result.method]
        others = [whole(each.settings) for each in its]
        names = dict.fromkeys(name for each in others for name in each)
        said = [
            f"{name} {own.get(name)}"
            for name in names
            if name not in UNTOLD
            and any(each.get(name) != own.get(name) for each in others)
        ]
        method = ", ".join([result.method, *said])
        found.append(dataclasses.replace(result, method=method))
    there: dict[tuple[str, str, str, int], Result] = {}
    for result in found:
        key = result.study, result.task, result.method, result.seed
        if key in there:
            raise ValueError(
                f"{result.method} with seed {result.seed} is in {there[key].run} and "
                f"in {result.run}: give one of them, or it counts twice"
            )
        there[key] = result
    return found


def by_method(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """Seeds of one method on one task, in the order in which they come, of what `runs`
    gives."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault((result.task, result.method), []).append(result)
    return found


def paired(
    one: Sequence[Result], other: Sequence[Result], metric: str = "test error"
) -> tuple[float, float, int]:
    """How far a metric is above another method's: the mean over the seeds that both
    have, half of its 95 % interval (Student's t), and how many these are. What seeds
    have in common cancels.

    Raises:
        ValueError: if there is no seed that both have.
    """
    theirs = {result.seed: result.metrics[metric] for result in other}
    apart = [r.metrics[metric] - theirs[r.seed] for r in one if r.seed in theirs]
    if not apart:
        raise ValueError(
            f"{one[0].method} and {other[0].method} have no seed in common"
        )
    mean, half = mean_and_half_width(apart)
    return mean, half if len(apart) > 1 else float("nan"), len(apart)


METRICS = {"test error": ("%", 2), "test loss": ("nats", 3)}
"""What networks are compared by: its unit, and how many digits are shown."""


def metric_of(results: Sequence[Result]) -> str:
    """The first of `METRICS` that all results have.

    Raises:
        ValueError: if there is none.
    """
    for name in METRICS:
        if all(name in result.metrics for result in results):
            return name
    studies = ", ".join(dict.fromkeys(result.study for result in results))
    raise ValueError(
        f"results of {studies} can't stand in one table: there is none of "
        f"{', '.join(METRICS)} that all of them have"
    )


def lines(
    results: Sequence[Result], against: str | None = None
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table with a line for each method: means with 95 %
    intervals over seeds, what is left, and the paired difference to one method.

    Raises:
        ValueError: if `against` is none of the methods.
    """
    found = by_method(results)
    names = [method for _, method in found]
    if against is not None and against not in names:
        raise ValueError(
            f"no run has the method {against!r}; there is {', '.join(names)}"
        )
    costs = list(dict.fromkeys(name for r in results for name in r.costs))
    metric = metric_of(results)
    unit, digits = METRICS[metric]
    header = ["task", "method", f"{metric}, {unit}", "seeds"]
    header += [f"{name} left, %" for name in costs]
    points = "points" if unit == "%" else unit
    header += [f"above {against}, {points}"] if against else []
    table = []
    for (task, method), its in found.items():
        line = [
            task,
            method,
            interval((r.metrics[metric] for r in its), digits),
            str(len(its)),
        ]
        for name in costs:
            shares = [100 * r.costs[name] for r in its if name in r.costs]
            line.append(f"{np.mean(shares):.2f}" if shares else "-")
        if against:
            line.append(_above(its, found.get((task, against), []), metric))
        table.append(line)
    return header, table


def _above(one: Sequence[Result], other: Sequence[Result], metric: str) -> str:
    if not other or one[0].method == other[0].method:
        return "-"
    mean, half, count = paired(one, other, metric)
    digits = METRICS[metric][1]
    return f"{mean:+.{digits}f}" + (f" ± {half:.{digits}f}" if count > 1 else "")


def write_csv(folder: Path, *own: str) -> None:
    """The lines of a folder as its `runs.csv`: what lines of all studies say, and what
    else theirs does under some names."""
    rows, names = [], ("study", "task", "method", "seed", "seconds", *own)
    for line in results.read(folder):
        said = {name: {"seconds": None, **line}[name] for name in names}
        listed = {n: " ".join(map(str, v)) for n, v in said.items() if type(v) is list}
        left = {f"{name} left": share for name, share in line["costs"].items()}
        rows.append(said | listed | line["metrics"] | left)
    csv_lines.write(folder / "runs.csv", rows)
