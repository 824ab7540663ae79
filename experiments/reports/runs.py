"""What runs of all studies have found, read back from their folders in one form."""

import dataclasses
import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import csv_lines, json_lines
from experiments.harness.devices import PLACES
from experiments.harness.run_folder import CONFIG, whole
from experiments.reports.printing import interval, mean_and_half_width


@dataclasses.dataclass(frozen=True)
class Result:
    """One network that a run ended with.

    Attributes:
        study: the experiment.
        run: folder of the run.
        task: data set and network.
        method: what chose the units, with what distinguishes it within the run.
        seed: of the run.
        settings: all that decides the result.
        metrics: errors in per cent, losses in nats, by name.
        costs: shares of the whole network that are left, by name.
        seconds: of training, where they are known.
        made: commit, device and versions, where they were recorded.
    """

    study: str
    run: str
    task: str
    method: str
    seed: int
    settings: dict[str, Any]
    metrics: dict[str, float]
    costs: dict[str, float]
    seconds: float | None
    made: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """As a line of a table: `pandas.DataFrame([r.row() for r in found])`."""
        own = {
            name: getattr(self, name)
            for name in ("study", "run", "task", "method", "seed", "seconds")
        }
        return own | self.metrics | {f"{n} left": v for n, v in self.costs.items()}


def runs(*patterns: str | Path) -> list[Result]:
    """The results in all folders of some patterns, such as `runs("runs/*")`. Nothing
    is written.

    Raises:
        FileNotFoundError: if a pattern matches no folder that holds results.
    """
    found: list[Result] = []
    for pattern in patterns:
        folders = sorted(Path(each) for each in glob.glob(str(pattern)))
        here = [result for folder in folders for result in of_folder(folder)]
        if not here:
            raise FileNotFoundError(
                f"{pattern} holds no results: give folders of runs, in which there is "
                f"one of {', '.join(READERS)}"
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


def of_folder(folder: Path) -> Iterator[Result]:
    """The results of one run; none if it has not finished any."""
    for name, read in READERS.items():
        if (folder / name).exists():
            yield from read(folder)


def _config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings, and what is told of the machine."""
    file = folder / CONFIG
    stored = json.loads(file.read_text()) if file.exists() else {}
    made = {name: stored.pop(name, None) for name in ("commit", "device", "versions")}
    return stored, made


def _of_mnist(folder: Path) -> Iterator[Result]:
    summary = json.loads((folder / "summary.json").read_text())
    if "best_on_validation" not in summary:
        return
    settings, made = _config(folder)
    last = summary["last"]
    yield Result(
        "mnist",
        str(folder),
        f"{summary['dataset']} {summary['model']}",
        settings.get("gate", "hard_concrete"),
        settings.get("seed", 0),
        settings,
        {
            "test error": last["test_error"],
            "validation error": last["validation_error"],
        },
        {
            "weights": last["weights"] / summary["dense_weights"],
            **{f"{n} expected": b["expected"] for n, b in _budget(summary)},
            **{f"{n} decided": b["decided"] for n, b in _budget(summary)},
        },
        summary["seconds"],
        made,
    )


def _budget(summary: dict[str, Any]) -> Iterable[tuple[str, dict[str, float]]]:
    return summary.get("budget", {}).items()


def _of_channels(folder: Path) -> Iterator[Result]:
    settings, made = _config(folder)
    for line in json_lines.read(folder / "results.jsonl"):
        yield Result(
            "channel_pruning",
            str(folder),
            f"{settings.get('dataset')} {settings.get('model')}",
            line["method"],
            line["seed"],
            settings,
            {
                "test error": line["trained"]["test"],
                "validation error": line["trained"]["validation"],
                "base test error": line["base"]["test"],
            },
            {what: line[what][1] / line[what][0] for what in ("params", "macs")},
            line["choosing"],
            made,
        )


def _of_wide_resnet(folder: Path) -> Iterator[Result]:
    settings, made = _config(folder)
    for line in json_lines.read(folder / "result.jsonl"):
        yield Result(
            "wide_resnet",
            str(folder),
            f"{settings.get('dataset')} WRN-{settings.get('depth')}",
            # (Older runs don't say which variant they are.)
            line.get("variant", folder.name.rsplit("-", 1)[0]),
            line.get("seed", int(folder.name.rsplit("-", 1)[-1])),
            settings,
            {
                "test error": line["gated"]["test"],
                "validation error": line["gated"]["validation"],
            },
            {"macs": line["kept"], "macs expected": line["expected"]},
            None,
            made,
        )


def _of_csv(folder: Path) -> Iterator[Result]:
    settings, made = _config(folder)
    for line in csv_lines.read(folder / "results.csv"):
        task = f"{line['dataset']} {line['model']}"
        if "family" in line:
            at = (
                f"target {line['target']}" if line.get("target") else f"λ {line['lam']}"
            )
            whole = float(line["dense_weights"]), float(line["dense_macs"])
            yield Result(
                "families",
                str(folder),
                task,
                f"{line['family']}, {at}, {line['rule']}",
                int(line["seed"]),
                settings,
                {
                    "test error": float(line["test_error"]),
                    "validation error": float(line["validation_error"]),
                },
                {
                    "weights": float(line["weights"]) / whole[0],
                    "macs": float(line["macs"]) / whole[1],
                },
                None,
                made,
            )
        else:
            yield Result(
                "relocation",
                str(folder),
                task,
                f"{line['arm']}, {line['heuristic']}, {line['ratio']} in "
                f"{line['budget']}",
                int(line["seed"]),
                settings,
                {
                    "test error": 100 - float(line["test"]),
                    "validation error": 100 - float(line["validation"]),
                },
                {},
                float(line["seconds"]),
                made,
            )


LINES = "runs.jsonl"
"""Where studies write their results as they are read here."""


def _of_lines(folder: Path) -> Iterator[Result]:
    named = {field.name for field in dataclasses.fields(Result)} - {"run"}
    for line in json_lines.read(folder / LINES):
        yield Result(
            run=str(folder), **{name: line[name] for name in line.keys() & named}
        )


READERS = {
    LINES: _of_lines,
    "summary.json": _of_mnist,
    "results.jsonl": _of_channels,
    "result.jsonl": _of_wide_resnet,
    "results.csv": _of_csv,
}
"""By the file of a run folder that they read."""


# ------------------------------------------------------------------------ several runs


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
