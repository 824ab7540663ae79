"""Flags of a command: the fields of its configuration."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

Config = TypeVar("Config")


def parse(
    kind: type[Config],
    description: str | None,
    quick: Mapping[str, Any] | None = None,
    about: str = "",
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """The configuration that the command line asks for.

    Args:
        kind: a dataclass whose fields are the flags.
        description: what `--help` says of the command.
        quick: fields that the flag `--quick` gives other defaults; a flag that is given
            beside it counts. None: there is no such flag.
        about: what `--help` says of `--quick`.
        presets: fields that `--preset NAME` gives other defaults, by name, likewise.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--quick", action="store_true")
    early.add_argument("--preset")
    told, _ = early.parse_known_args()
    default: Any = kind()
    its: Any
    flags: list[Any] = [("config", Annotated[kind, tyro.conf.arg(name="")])]
    if quick is not None:
        its = Annotated[bool, tyro.conf.arg(help=about)]
        flags.append(("quick", its, dataclasses.field(default=False)))
        if told.quick:
            default = dataclasses.replace(default, **quick)
    if presets:
        said = "settings that are published"
        names = Literal[tuple(presets)]  # pyrefly: ignore[invalid-literal]
        its = Annotated[names | None, tyro.conf.arg(help=said)]
        flags.append(("preset", its, dataclasses.field(default=None)))
        # (Of an unknown one the parser below tells.)
        default = dataclasses.replace(default, **presets.get(told.preset, {}))
    made = dataclasses.make_dataclass("Flags", flags)
    return tyro.cli(made, default=made(default), description=description).config


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
