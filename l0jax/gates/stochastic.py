r"""The stochastic gate (STG) of Yamada, Lindenbaum, Negahban and Kluger (ICML 2020).

A Gaussian variable is clipped: $z = \min(1, \max(0, \mu + \sigma\epsilon))$.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax.gates import noise
from l0jax.gates.clipped import Clipped, uniform_beside
from l0jax.gates.family import Logits, positive


@dataclasses.dataclass(frozen=True)
class Stochastic(Clipped):
    r"""Stochastic gates with one trained logit $\eta$ each.

    The mean is $\mu = 1/2 + \eta/4$, the tangent of the sigmoid at 0, so that a logit
    means about what it does to other families and is trained at the same rate.

    Args:
        sigma: deviation of the noise, > 0; the paper's is 1/2.
        limit: after every step the logits are clipped to [-limit, limit]: at the
            default mu to [-1, 2], where a dead gate still opens in 2.3 % of the draws.

    Raises:
        ValueError: if a field is outside its range.
    """

    sigma: float | Float[Array, ""] = 0.5
    limit: float = dataclasses.field(default=6.0, kw_only=True)

    rules: ClassVar[tuple[str, ...]] = ("paper", "mean")

    def __post_init__(self):
        super().__post_init__()
        positive(sigma=self.sigma)

    @property
    def temperature(self) -> float | Float[Array, ""]:
        """`sigma`."""
        return self.sigma

    def at_temperature(self, temperature: float | Float[Array, ""]) -> "Stochastic":
        """The same gate with `sigma` replaced; `temperature` may be traced."""
        return dataclasses.replace(self, sigma=temperature)

    def sample(self, key: PRNGKeyArray, logits: Logits) -> Logits:
        """One draw per gate, with pathwise gradients."""
        u, logits = uniform_beside(key, logits)
        return jnp.clip(_mu(logits) + self.sigma * noise.normal(u), 0.0, 1.0)

    def survival(self, x: float, logits: Logits) -> Logits:
        r"""$P(z > x) = \Phi((\mu - x) / \sigma)$."""
        return ndtr((_mu(logits) - x) / self.sigma)

    def deterministic(self, logits: Logits, rule: str) -> Logits:
        r"""The gate at test time: `"paper"` is $\text{clip}(\mu)$, which is the median
        too; `"mean"` is E[z], which is never 0.

        Raises:
            ValueError: if `rule` is not one of `rules`.
        """
        if rule == "paper":
            return jnp.clip(_mu(logits), 0.0, 1.0)
        if rule == "mean":
            return self.mean(logits)
        raise self.unknown_rule(rule)


def _mu(logits: Logits) -> Logits:
    return 0.5 + logits / 4
