"""Flags of a command: the fields of its configuration."""

import dataclasses
import sys
from collections.abc import Mapping
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
