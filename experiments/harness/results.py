"""Results of all studies: a line of JSON for each network, in `runs.jsonl` of a folder.

Run folders and `experiments/results` hold them in one form. A line has what `KINDS`
names, `seconds`, `row` where its study has rows, and whatever else the study says of
it. It repeats its settings, some hundred bytes, so that it can be moved and compared
without the folder in which it was made.
"""

import dataclasses
import reprlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.harness import json_lines, run_folder
from experiments.harness.alone import alone

Line = Mapping[str, Any]
Order = Mapping[str, Iterable[Any]]
LINES = "runs.jsonl"
OLDER = ("summary.json", "results.jsonl", "result.jsonl", "results.csv")
"""Where earlier versions wrote results."""
KINDS = {
    **{"study": str, "task": str, "method": str, "seed": int},
    **{"settings": dict, "metrics": dict, "costs": dict, "made": dict},
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One network that a run ended with: what lines of all studies say.

    Attributes:
        study: the experiment.
        run: folder of the run.
        task: data set and network.
        method: what chose the units, with what distinguishes it within the run.
        seed: of the run.
        settings: all that decides the result.
        metrics: errors in per cent, losses in nats, by name.
        costs: shares of the whole network that are left, by name.
        seconds: that the method took, where they are known.
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


def read(folder: Path) -> list[dict[str, Any]]:
    """All lines of a folder; none if nothing has been written there.

    Raises:
        ValueError: if a line is not as it must be, or if the folder holds results of an
            earlier version.
    """
    file = folder / LINES
    older = [name for name in OLDER if (folder / name).exists()]
    if older and not file.exists():
        raise ValueError(
            f"{folder} is of an older version, which wrote {older[0]} where there is "
            f"{LINES} now: run it anew, in another folder"
        )
    lines = json_lines.read(file)
    for number, line in enumerate(lines, 1):
        check(line, f"{file}, line {number}")
    return lines


def of_folder(folder: Path) -> list[Result]:
    """The lines of a folder in what they have in common with all others.

    Raises:
        ValueError: as `read`.
    """
    found = []
    for line in read(folder):
        said = {name: line[name] for name in KINDS}
        for name in ("metrics", "costs"):
            said[name] = {key: float(value) for key, value in line[name].items()}
        seconds = line.get("seconds")
        seconds = None if seconds is None else float(seconds)
        found.append(Result(run=str(folder), seconds=seconds, **said))
    return found


def check(line: Line, where: str) -> None:
    """Raises ValueError, with the place, unless all values are of their kinds, and
    numbers finite."""
    for name, kind in KINDS.items():
        if type(line.get(name)) is not kind:
            said = reprlib.repr(line.get(name))
            raise ValueError(
                f"{where}: {name} is {said}, and must be a {kind.__name__}"
            )
    numbers = line["metrics"] | line["costs"]
    if line.get("seconds") is not None:
        numbers |= {"seconds": line["seconds"]}
    for name, value in numbers.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # (An integer that is larger than all floats is no number either.)
        if not number or not abs(value) <= sys.float_info.max:
            said = reprlib.repr(value)
            raise ValueError(f"{where}: {name} is {said}, and must be a finite number")


def identity(line: Line) -> tuple[Any, ...]:
    """Which result it is: one takes the place of another of the same."""
    return line.get("row"), line["task"], line["method"], line["seed"]


def put(
    folder: Path,
    new: Iterable[Line],
    order: Order | None = None,
    alike: bool = False,
) -> None:
    """Puts lines into those of a folder, each in the place of an older one of the same
    row, task, method and seed. Other processes may do so at the same time.

    Args:
        folder: that is written to.
        new: lines; those that don't say what made them say it then.
        order: as `sort` has it; by default lines stay in the order in which they came.
        alike: what a task of a row has of other settings goes: it is no seed of these.

    Raises:
        ValueError: if a line is not as it must be. Nothing is written then.
    """
    fresh = [
        line if "made" in line else {**line, "made": run_folder.made_by()}
        for line in new
    ]
    for line in fresh:
        check(line, f"{folder / LINES}, the result of {line.get('method')}")
    now = {identity(line)[:2]: run_folder.whole(line["settings"]) for line in fresh}

    def stays(line: Line) -> bool:
        settings = run_folder.whole(line["settings"])
        return not alike or settings == now.get(identity(line)[:2], settings)

    with alone(folder):
        old = filter(stays, read(folder))
        lines = {identity(line): line for line in [*old, *fresh]}
        json_lines.write(folder / LINES, sort(lines.values(), order or {}))


def sort(lines: Iterable[Line], order: Order) -> list[Line]:
    """Lines by what they say under the names of an order, one after the other: values
    that it knows in their order, and others, which another version knew, after them."""
    places = {
        name: {value: at for at, value in enumerate(known)}
        for name, known in order.items()
    }

    def place(line: Line) -> list[tuple[int, Any]]:
        return [
            (known.get(line[name], len(known)), line[name])
            for name, known in places.items()
        ]

    return sorted(lines, key=place)


def there(folder: Path, *names: str) -> set[tuple[Any, ...]]:
    """What lines of a folder say under some names: those need not be run again."""
    return {tuple(line[name] for name in names) for line in read(folder)}


def by(lines: Iterable[Line], *names: str) -> dict[Any, list[Any]]:
    """Lines by what they say under a name, or a tuple of what they say under several,
    in the order in which they come."""
    found: dict[Any, list[Any]] = {}
    for line in lines:
        key = tuple(line.get(name) for name in names)
        found.setdefault(key if len(names) > 1 else key[0], []).append(line)
    return found
