"""What all gate families have in common: one trained logit for each gate, where it
starts and how far it may go.
"""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Logits = Float[Array, "*units"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(abc.ABC):
    """A family of gates with one trained logit each.

    Args:
        limit: after every step the logits are clipped to [-limit, limit].

    Raises:
        ValueError: if a field is outside its range.
    """

    limit: float = math.log(100.0)

    rules: ClassVar[tuple[str, ...]] = ()
    random: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    zeros: ClassVar[bool] = True
    pathwise: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def __post_init__(self):
        positive(limit=self.limit)

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

    @property
    def norm_share(self) -> float | Float[Array, ""]:
        """0: weights pay for nothing."""
        return 0.0

    @abc.abstractmethod
    def prob_active(self, logits: Logits) -> Logits:
        """P(z != 0)."""

    def l0_term(self, logits: Logits) -> Logits:
        """P(z != 0)."""
        return self.prob_active(logits)

    def project(self, logits: Logits) -> Logits:
        """Clips the logits to [-limit, limit]."""
        return jnp.clip(logits, -self.limit, self.limit)

    def unknown_rule(self, rule: str) -> ValueError:
        """The error for a test-time rule that the family does not know."""
        return ValueError(
            f"unknown test-time rule {rule!r} for {type(self).__name__}; "
            f"it knows {', '.join(self.rules)}"
        )


def in_full(logits: Logits) -> Logits:
    """The logits in the precision that gates have: float32 also where theirs is
    lower."""
    wide = jnp.finfo(logits.dtype).bits > 32
    return logits.astype(logits.dtype if wide else jnp.float32)


def straight_through(value: Logits, surrogate: Logits) -> Logits:
    """The value, with the derivative of its surrogate (Bengio et al. 2013)."""
    # (In this order the value comes out exactly: what is added to it is 0.)
    return jax.lax.stop_gradient(value) + (surrogate - jax.lax.stop_gradient(surrogate))


def positive(**fields: object) -> None:
    """Raises ValueError for a number that is not above 0.

    What is traced (a temperature that is annealed) has no value to check; its schedule
    has.
    """
    for name, value in fields.items():
        if isinstance(value, float | int) and not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
