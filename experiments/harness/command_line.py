"""Flags of a command: the fields of its configuration."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
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


def report(
    description: str | None, program: str, write: Callable[[Path], bool]
) -> None:
    """The command that draws what lies in a run folder.

    Args:
        description: what `--help` says of the command.
        program: its name.
        write: writes it, and tells whether there was a result.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a run")
    folder = parser.parse_args().folder
    if not write(folder):
        raise SystemExit(f"{program}: {folder} holds no result")
    print(folder)
