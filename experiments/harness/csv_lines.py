"""Files of comma-separated values, a line for each run."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def read(file: Path) -> list[dict[str, str]]:
    """All lines; none if there is no such file."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def write(
    file: Path, lines: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """These lines and no others, floats with six digits. A kill leaves the old file or
    the new one.

    Args:
        file: that is written.
        lines: at least one, if no columns are given.
        columns: their names; by default those of the first line.
    """
    whole = [rounded(line) for line in lines]
    part = file.with_name(file.name + ".part")
    with part.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns or list(whole[0]))
        writer.writeheader()
        writer.writerows(whole)
    part.replace(file)


def rounded(line: Mapping[str, Any]) -> dict[str, Any]:
    """What is written of a line."""
    return {
        name: f"{value:.6g}" if isinstance(value, float) else value
        for name, value in line.items()
    }
