r"""What gates have in common that are noise around 1: $z \sim N(1, \alpha)$.

They are never 0. A unit costs the information that passes its noise, and the noise may
grow until nothing does.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax.gates import noise
from l0jax.gates.clipped import uniform_beside
from l0jax.gates.family import Family, Logits, positive


@dataclasses.dataclass(frozen=True)
class MultiplicativeNoise(Family):
    r"""Gaussian noise around 1, with $\log\alpha = -\phi / T$ of a trained $\phi$ each.

    A keep probability of p makes $\alpha = (1 - p) / p$ at T = 1, that of Gaussian
    dropout. A family says which number $\log\alpha$ must be below for a unit to stay.

    Args:
        temperature: T, > 0.
        threshold: of $\log\alpha$ in the paper's rule.
        limit: after every step the logits are clipped to [-limit, limit].

    Raises:
        ValueError: if a field is outside its range.
    """

    temperature: float | Float[Array, ""] = 1.0
    threshold: float = 0.0
    limit: float = dataclasses.field(default=8.0, kw_only=True)

    rules: ClassVar[tuple[str, ...]] = ("paper", "mean")
    bounded: ClassVar[bool] = False
    zeros: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        positive(temperature=self.temperature)

    def at_temperature(
        self, temperature: float | Float[Array, ""]
    ) -> "MultiplicativeNoise":
        """The same gate at another temperature, which may be traced."""
        return dataclasses.replace(self, temperature=temperature)

    def log_alpha(self, logits: Logits) -> Logits:
        """Log variance of the gate."""
        return -logits / self.temperature

    def sample(self, key: PRNGKeyArray, logits: Logits) -> Logits:
        """One draw per gate, with pathwise gradients."""
        u, logits = uniform_beside(key, logits)
        return 1 + jnp.exp(self.log_alpha(logits) / 2) * noise.normal(u)

    def prob_active(self, logits: Logits) -> Logits:
        """1."""
        return jnp.ones_like(logits)

    def prob_one(self, logits: Logits) -> Logits:
        """0."""
        return jnp.zeros_like(logits)

    def mean(self, logits: Logits) -> Logits:
        """1."""
        return jnp.ones_like(logits)

    def deterministic(self, logits: Logits, rule: str) -> Logits:
        r"""The gate at test time: `"paper"` is 1 where $\log\alpha$ is below the
        threshold, else 0; `"mean"` is 1, which removes nothing.

        Raises:
            ValueError: if `rule` is not one of `rules`.
        """
        if rule == "paper":
            return (self.log_alpha(logits) < self.threshold).astype(logits.dtype)
        if rule == "mean":
            return self.mean(logits)
        raise self.unknown_rule(rule)
