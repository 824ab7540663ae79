"""Commands that run rows of tables by name."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import tyro

from experiments.harness.loop import Diverged
from experiments.tasks.dataset import DataError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which rows to run."""

    rows: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """names of rows"""
    seeds: tuple[int, ...] | None = None
    """only these seeds; None is all of the row's"""
    list: bool = False
    """print the names and settings, and run nothing; what most rows have first"""


@dataclasses.dataclass(frozen=True)
class OfMethods(Arguments):
    """Which rows to run, and what of them."""

    methods: tuple[str, ...] = ()
    """only these methods; none named is all of the row's"""


def run(
    arguments: Arguments,
    program: str,
    rows: Mapping[str, Any],
    one: Callable[[str, int], Any],
    told: Callable[[Any], Mapping[str, Any]],
) -> None:
    """Runs rows by name, one seed after the other; what can't be done ends the program
    with a line that says why.

    Args:
        arguments: of the command line.
        program: its name, for that line.
        rows: by name; each has `seeds`.
        one: runs one row with one seed.
        told: the settings of a row.
    """
    if arguments.rows or not arguments.list:
        check_names(arguments.rows, rows)
    if arguments.list:
        settings = {name: flat(told(row)) for name, row in rows.items()}
        usual = most_common(settings.values())
        print(f"where a row says nothing else: {said(usual.items())}")
        for name, its in settings.items():
            own = (item for item in its.items() if usual[item[0]] != item[1])
            print(f"{name}: {said(own)}")
        return
    for name in arguments.rows:
        for seed in arguments.seeds or rows[name].seeds:
            print(f"== {name}, seed {seed}", file=sys.stderr)
            try:
                one(name, seed)
            except (ValueError, Diverged, DataError, OSError) as error:
                raise SystemExit(f"{program}: {error}") from None


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names of their flags: those of recipes have a dot."""
    return {
        f"{name}.{inner}" if inner else name: its
        for name, value in settings.items()
        for inner, its in (value if isinstance(value, dict) else {"": value}).items()
    }


def most_common(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each setting the value that most rows have, the first of several."""
    values: dict[str, list[Any]] = {}
    for settings in rows:
        for name, value in settings.items():
            values.setdefault(name, []).append(value)
    return {name: max(its, key=its.count) for name, its in values.items()}


def said(settings: Iterable[tuple[str, Any]]) -> str:
    """Settings as a line."""
    return ", ".join(f"{name} = {value}" for name, value in settings)


def check_names(names: Sequence[str], there: Iterable[str]) -> None:
    """Ends the program, with the names of rows that there are, unless all of `names`
    are among them and there is at least one."""
    known = list(there)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown row {unknown[0]!r}; there is {', '.join(known)}")
    if not names:
        raise SystemExit(f"give one or more rows of {', '.join(known)}")
