"""Files that are read as a whole and written as a whole."""

import os
from pathlib import Path
from typing import Any


def read(file: Path, largest: int) -> bytes:
    """What is in a file.

    Raises:
        OSError: if it can't be read.
        ValueError: if it has more than `largest` bytes.
    """
    size = file.stat().st_size
    if size > largest:
        raise ValueError(f"{file.name} has {size} bytes, at most {largest} expected")
    return file.read_bytes()


def write(file: Path, *parts: Any) -> None:
    """Writes a file, its parts (bytes, or views of such) one after the other, so that a
    reader sees all of it or none, even after a loss of power.

    Raises:
        OSError: if it can't be written; nothing of it stays.
    """
    scratch = file.with_name(f"{file.name}.part")
    try:
        with scratch.open("wb") as to:
            to.writelines(parts)
            to.flush()
            os.fsync(to.fileno())
        scratch.replace(file)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
