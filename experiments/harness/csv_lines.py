"""Files of comma-separated values."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """These lines and no others, a column for each name that any of them has, floats
    with six digits. A kill leaves the old file or the new one."""
    rows = [
        {n: f"{v:.6g}" if isinstance(v, float) else v for n, v in line.items()}
        for line in lines
    ]
    part = file.with_name(file.name + ".part")
    with part.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(n for r in rows for n in r)))
        writer.writeheader()
        writer.writerows(rows)
    part.replace(file)
