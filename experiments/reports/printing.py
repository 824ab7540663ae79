"""Numbers with their intervals, and Markdown tables."""

import math
from collections.abc import Iterable

import numpy as np
import scipy.stats


def mean_and_half_width(values: Iterable[float | int]) -> tuple[float, float]:
    """The mean, and the half width of its 95 % interval (Student's t); 0 of a single
    value."""
    numbers = np.asarray(list(values), float)
    if len(numbers) < 2:
        return float(numbers.mean()), 0.0
    spread = numbers.std(ddof=1) / math.sqrt(len(numbers))
    return float(numbers.mean()), scipy.stats.t.ppf(0.975, len(numbers) - 1) * spread


def interval(values: Iterable[float | int], digits: int = 2) -> str:
    """Mean ± half width of the 95 % interval of the mean."""
    numbers = list(values)
    mean, half = mean_and_half_width(numbers)
    text = f"{mean:,.{digits}f}"
    return text if len(numbers) < 2 else f"{text} ± {half:,.{digits}f}"


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def latex(header: list[str], lines: list[list[str]]) -> str:
    """A LaTeX table for the package booktabs."""
    rows = [" & ".join(map(_escaped, cells)) + r" \\" for cells in (header, *lines)]
    return "\n".join(
        [
            r"\begin{tabular}{" + "l" * len(header) + "}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    """Without what LaTeX takes for its own."""
    for sign in "&%#_$":
        text = text.replace(sign, "\\" + sign)
    names = {"±": r"$\pm$", "×": r"$\times$", "λ": r"$\lambda$", "ε": r"$\epsilon$"}
    for sign, command in names.items():
        text = text.replace(sign, command)
    return text
