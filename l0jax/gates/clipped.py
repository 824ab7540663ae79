"""What gates have in common that are clipped to [0, 1], and stretched before.

A family states how likely a gate is above a point; the probabilities of both ends and
the mean follow.
"""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax.gates import noise

Logits = Float[Array, "*units"]

# E[z] integrates a smooth function of one variable over [0, 1]. 32 Gauss-Legendre
# nodes leave an error below 1e-6 for a hard concrete beta >= 0.1; the test compares
# with SciPy.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)
NODES, WEIGHTS = ((NODES + 1) / 2).tolist(), (WEIGHTS / 2).tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clipped(abc.ABC):
    """A family whose draws are clipped to [0, 1].

    Args:
        limit: after every step the logits are clipped to [-limit, limit].

    Raises:
        ValueError: if a field is outside its range.
    """

    limit: float = math.log(100.0)

    rules: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        positive(limit=self.limit)

    @abc.abstractmethod
    def survival(self, x: float, logits: Logits) -> Logits:
        """P(z > x) for x in [0, 1), and P(z = 1) for 1."""

    def init(
        self, key: PRNGKeyArray, size: int, keep_prob: float
    ) -> Float[Array, " units"]:
        r"""Draws logits from $N(\log\frac{p}{1-p}, 0.01^2)$ for `size` gates.

        What the gates of a family do with p differs: P(z != 0) of hard concrete gates
        starts at 0.832 for 0.5, since p is the keep rate before the stretch.

        Raises:
            ValueError: if `keep_prob` is outside (0, 1).
        """
        if not 0 < keep_prob < 1:
            raise ValueError(f"keep_prob must lie in (0, 1), got {keep_prob}")
        location = math.log(keep_prob) - math.log1p(-keep_prob)
        return location + 0.01 * jax.random.normal(key, (size,), jnp.float32)

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

    def project(self, logits: Logits) -> Logits:
        """Clips the logits to [-limit, limit]."""
        return jnp.clip(logits, -self.limit, self.limit)

    def unknown_rule(self, rule: str) -> ValueError:
        """The error for a test-time rule that the family does not know."""
        return ValueError(
            f"unknown test-time rule {rule!r} for {type(self).__name__}; "
            f"it knows {', '.join(self.rules)}"
        )


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
    """Uniform noise for each logit, and the logits in the precision of the noise:
    float32 also where theirs is lower."""
    u = noise.uniform(key, logits.shape)
    dtype = logits.dtype if jnp.finfo(logits.dtype).bits > 32 else jnp.float32
    return u.astype(dtype), logits.astype(dtype)


def positive(**fields: object) -> None:
    """Raises ValueError for a number that is not above 0.

    What is traced (a temperature that is annealed) has no value to check; its schedule
    has.
    """
    for name, value in fields.items():
        if isinstance(value, float | int) and not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
