"""What gates have in common that are clipped to [0, 1], and stretched before.

A family states how likely a gate is above a point; the probabilities of both ends and
the mean follow.
"""

import abc
import dataclasses

import numpy as np
from jaxtyping import PRNGKeyArray

from l0jax.gates import noise
from l0jax.gates.family import Family, Logits, in_full

# E[z] integrates a smooth function of one variable over [0, 1]. 32 Gauss-Legendre
# nodes leave an error below 1e-6 for a hard concrete beta >= 0.1; the test compares
# with SciPy.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)
NODES, WEIGHTS = ((NODES + 1) / 2).tolist(), (WEIGHTS / 2).tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clipped(Family):
    """A family whose draws are clipped to [0, 1]."""

    @abc.abstractmethod
    def survival(self, x: float, logits: Logits) -> Logits:
        """P(z > x) for x in [0, 1), and P(z = 1) for 1."""

    def prob_active(self, logits: Logits) -> Logits:
        """P(z != 0)."""
        return self.survival(0.0, logits)

    def prob_one(self, logits: Logits) -> Logits:
        """P(z = 1)."""
        return self.survival(1.0, logits)

    def mean(self, logits: Logits) -> Logits:
        r"""$E[z] = \int_0^1 P(z > x)\,dx$, by Gauss-Legendre quadrature."""
        parts = [
            weight * self.survival(node, logits)
            for node, weight in zip(NODES, WEIGHTS, strict=True)
        ]
        return sum(parts[1:], start=parts[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretched(Clipped):
    """A family whose draws from (0, 1) are stretched to (gamma, zeta) and clipped.

    Args:
        gamma: lower end of the stretch, < 0: below it lies the mass of z = 0.
        zeta: upper end of the stretch, > 1: above it lies the mass of z = 1.

    Raises:
        ValueError: if a field is outside its range.
    """

    gamma: float = -0.1
    zeta: float = 1.1

    def __post_init__(self):
        super().__post_init__()
        if not self.gamma < 0:
            raise ValueError(
                f"gamma must be < 0, or no gate is ever exactly 0; got {self.gamma}"
            )
        if not self.zeta > 1:
            raise ValueError(
                f"zeta must be > 1, or no gate is ever exactly 1; got {self.zeta}"
            )


def uniform_beside(key: PRNGKeyArray, logits: Logits) -> tuple[Logits, Logits]:
    """Uniform noise for each logit, and the logits in the precision of the noise."""
    logits = in_full(logits)
    return noise.uniform(key, logits.shape).astype(logits.dtype), logits
