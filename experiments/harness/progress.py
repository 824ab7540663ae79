"""The progress bar of long runs."""

import sys

from tqdm import tqdm


def bar(
    total: int, unit: str, *, done: int = 0, name: str | None = None, show: bool = True
) -> tqdm:
    """A bar on a terminal; in a log file, a line now and then."""
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        desc=name,
        disable=not show,
        mininterval=0.1 if sys.stderr.isatty() else 30.0,
        dynamic_ncols=True,
    )
