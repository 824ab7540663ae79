"""Numbers of settings, and in which ranges they lie."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

RANGES: dict[str, Callable[[Any], bool]] = {
    "be at least 1": lambda value: value >= 1,
    "be >= 0": lambda value: value >= 0,
    "be > 0": lambda value: value > 0,
    "lie in [0, 1]": lambda value: 0 <= value <= 1,
    "lie in [0, 1)": lambda value: 0 <= value < 1,
    "lie in (0, 1]": lambda value: 0 < value <= 1,
    "lie in (0, 1)": lambda value: 0 < value < 1,
}
"""What a number must do, and whether it does."""


def check(config: Any, ranges: Mapping[str, Iterable[str]]) -> None:
    """Raises ValueError for the first number that lies outside of its range.

    Args:
        config: with numbers, tuples of them or None, which lies in every range.
        ranges: of `RANGES`, each with the names of the fields that must lie in it.
    """
    for must, names in ranges.items():
        for name in names:
            given = getattr(config, name)
            for value in given if isinstance(given, tuple) else (given,):
                if value is not None and not RANGES[must](value):
                    raise ValueError(f"{name} must {must}, got {value}")
