"""Files that are read as a whole and written as a whole."""

from pathlib import Path


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


def write(file: Path, content: bytes) -> None:
    """Writes a file so that a reader sees all of it or none."""
    scratch = file.with_suffix(".part")
    scratch.write_bytes(content)
    scratch.replace(file)
