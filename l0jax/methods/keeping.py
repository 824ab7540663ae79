"""From scores of units to the units that are kept."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Bool, Float

Scores = Mapping[str, Float[Array | np.ndarray, " units"]]


def count_left(size: int, ratio: float) -> int:
    """How many of `size` units are left when the share `ratio` is removed:
    size - floor(size * ratio), as in the code of Zhuang et al. (2018).

    Raises:
        ValueError: if `ratio` is outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"the ratio of removed units must be in [0, 1), got {ratio}")
    # So that 0.29 * 100 is 29, and that a ratio just below 1 leaves one.
    return max(size - int(np.floor(round(size * ratio, 9))), 1)


def check_scores(scores: Scores) -> None:
    """Raises ValueError for scores that can't be ranked."""
    for name, values in scores.items():
        bad = np.flatnonzero(~np.isfinite(np.asarray(values)))
        if bad.size:
            raise ValueError(
                f"the score of unit {bad[0]} of group {name!r} is "
                f"{np.asarray(values)[bad[0]]}: scores must be finite"
            )


def keep_top(scores: Scores, ratio: float) -> dict[str, Bool[np.ndarray, " units"]]:
    """Of each group the units with the highest scores; the share `ratio` goes.

    Of units with the same score the first are kept.

    Raises:
        ValueError: if `ratio` is outside [0, 1), or a score is not finite.
    """
    check_scores(scores)
    keep = {}
    for name, values in scores.items():
        values = np.asarray(values)
        order = np.argsort(-values, kind="stable")
        keep[name] = np.zeros(len(values), bool)
        keep[name][order[: count_left(len(values), ratio)]] = True
    return keep


def keep_above(
    scores: Scores, ratio: float, at_least: int = 0
) -> dict[str, Bool[np.ndarray, " units"]]:
    """Of all groups together the units with the highest scores; the share `ratio` goes.

    Args:
        scores: comparable between groups.
        ratio: of all units that is removed.
        at_least: units that are kept of each group, whatever their scores.

    Raises:
        ValueError: if `ratio` is outside [0, 1) or `at_least` below 0; if a score is
            not finite; if a group would lose all its units.
    """
    if at_least < 0:
        raise ValueError(f"at_least must be 0 or more, got {at_least}")
    check_scores(scores)
    flat = np.concatenate([np.asarray(values) for values in scores.values()])
    order = np.argsort(-flat, kind="stable")
    chosen = np.zeros(len(flat), bool)
    chosen[order[: count_left(len(flat), ratio)]] = True
    keep, start = {}, 0
    for name, values in scores.items():
        values = np.asarray(values)
        flags = chosen[start : start + len(values)].copy()
        start += len(values)
        flags[np.argsort(-values, kind="stable")[:at_least]] = True
        if not flags.any():
            raise ValueError(
                f"group {name!r} would lose all its {len(values)} units at a ratio of "
                f"{ratio}: lower the ratio, or keep some with at_least"
            )
        keep[name] = flags
    return keep
