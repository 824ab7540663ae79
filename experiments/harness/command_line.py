"""Flags of a command: the fields of its configuration."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro

Config = TypeVar("Config")


def parse(
    kind: type[Config],
    description: str | None,
    quick: Mapping[str, Any],
    about: str,
) -> Config:
    """The configuration that the command line asks for.

    Args:
        kind: a dataclass whose fields are the flags.
        description: what `--help` says of the command.
        quick: fields that the flag `--quick` gives other defaults; a flag that is given
            beside it counts.
        about: what `--help` says of `--quick`.
    """
    default: Any = kind()
    if "--quick" in sys.argv[1:]:
        default = dataclasses.replace(default, **quick)

    @dataclasses.dataclass
    class Flags:
        config: Annotated[kind, tyro.conf.arg(name="")]  # type: ignore[valid-type]
        quick: Annotated[bool, tyro.conf.arg(help=about)] = False

    return tyro.cli(Flags, default=Flags(default), description=description).config


def check_names(names: Sequence[str], there: Iterable[str]) -> None:
    """Ends the program, with the names of rows that there are, unless all of `names`
    are among them and there is at least one."""
    known = list(there)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown row {unknown[0]!r}; there is {', '.join(known)}")
    if not names:
        raise SystemExit(f"give one or more rows of {', '.join(known)}")
