"""Files with one JSON object in each line, as results are recorded in."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read(file: Path) -> list[dict[str, Any]]:
    """All entries; none if there is no such file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """These entries and no others."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def add(file: Path, entry: Mapping[str, Any]) -> None:
    """One entry more, at the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(entry) + "\n")
