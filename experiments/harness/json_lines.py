"""Files with one JSON object in each line, as results are recorded in."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.harness.alone import alone


def read(file: Path) -> list[dict[str, Any]]:
    """All entries; none if there is no such file.

    Raises:
        ValueError: if a line can't be read; it names file and line.
    """
    if not file.exists():
        return []
    entries = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError(f"it is {entry!r:.50}, and must be a record")
            entries.append(entry)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: {error}; mend it") from error
    return entries


def write(file: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """These entries and no others. A kill leaves the old file or the new one. Of those
    that train together only the first process writes."""
    if jax.process_index() > 0:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    part.replace(file)


def merge(
    file: Path,
    new: Iterable[Mapping[str, Any]],
    identity: Callable[[Mapping[str, Any]], Any],
) -> None:
    """Puts entries into the file in the order of their identities, each in the place of
    an older one of the same."""
    with alone(file.parent):
        fresh = {identity(entry): entry for entry in [*read(file), *new]}
        write(file, [fresh[each] for each in sorted(fresh)])


def add(file: Path, entry: Mapping[str, Any]) -> None:
    """One entry more, at the end."""
    with alone(file.parent):
        write(file, [*read(file), entry])
