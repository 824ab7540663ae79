"""Networks on MNIST that papers report, and what they cost."""

from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """A published network: its architecture, test error in per cent, and the source."""

    name: str
    architecture: str
    error: float
    source: str

    @property
    def widths(self) -> list[int]:
        """What is left of each layer."""
        return [int(width) for width in self.architecture.split("-")]


PUBLISHED = {
    "mlp": (
        Point("L0-HC, λ = 0.1/N", "219-214-100", 1.4, "Louizos et al. 2018"),
        Point("L0-HC, λ per layer", "266-88-33", 1.8, "Louizos et al. 2018"),
        Point("L0-ARM, λ = 0.1/N", "143-153-78", 1.7, "Li and Ji 2019"),
        Point("L0-AR, λ = 0.1/N", "453-150-68", 1.7, "Li and Ji 2019"),
        Point("BC-GNJ", "278-98-13", 1.8, "Louizos et al. 2017"),
        Point("VIB", "97-71-33", 1.6, "Dai et al. 2018"),
    ),
    "lenet5": (
        Point("L0-HC, λ = 0.1/N", "20-25-45-462", 0.9, "Louizos et al. 2018"),
        Point("L0-HC, λ per layer", "9-18-65-25", 1.0, "Louizos et al. 2018"),
        Point("L0-ARM, λ = 0.1/N", "20-16-32-257", 0.9, "Li and Ji 2019"),
        Point("L0-ARM, λ per layer", "6-10-39-11", 1.3, "Li and Ji 2019"),
        Point("BC-GNJ", "8-13-88-13", 1.0, "Louizos et al. 2017"),
        Point("BC-GHS", "5-10-76-16", 1.0, "Louizos et al. 2017"),
    ),
}


def cost(model: str, widths: Sequence[int], column: str) -> int:
    """Weights or multiply-accumulates of a published architecture on MNIST."""
    if model == "mlp":
        a, b, c = widths
        return a * b + b * c + 10 * c
    a, b, c, d = widths
    dense = c * d + 10 * d
    maps = (25 * a, 25 * a * b)
    if column == "weights":
        return sum(maps) + dense
    return maps[0] * 24**2 + maps[1] * 8**2 + dense
