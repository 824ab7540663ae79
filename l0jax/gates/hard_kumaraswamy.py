r"""The HardKuma gate of Bastings, Aziz and Titov (ACL 2019).

A Kumaraswamy variable, whose cdf $1 - (1 - s^a)^b$ has an inverse in closed form, is
stretched and clipped as a hard concrete gate is.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
from jax.scipy.special import betaln
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax.gates.clipped import Stretched, uniform_beside
from l0jax.gates.family import Logits, positive


@dataclasses.dataclass(frozen=True)
class HardKumaraswamy(Stretched):
    r"""HardKuma gates with one trained logit $\eta$ each.

    The paper trains both shapes. Here they are $a = \tau e^{\eta/2}$ and
    $b = \tau e^{-\eta/2}$, so that draws become larger with $\eta$, and the temperature
    $\tau$ says how far both modes reach inside.

    Args:
        tau: temperature, > 0; at 1 and $\eta = 0$ the variable is uniform.
        gamma, zeta, limit: as for all `Stretched` gates.

    Raises:
        ValueError: if a field is outside its range.
    """

    tau: float | Float[Array, ""] = 0.5

    rules: ClassVar[tuple[str, ...]] = ("paper", "median", "mean")

    def __post_init__(self):
        super().__post_init__()
        positive(tau=self.tau)

    @property
    def temperature(self) -> float | Float[Array, ""]:
        """`tau`."""
        return self.tau

    def at_temperature(
        self, temperature: float | Float[Array, ""]
    ) -> "HardKumaraswamy":
        """The same gate with `tau` replaced; `temperature` may be traced."""
        return dataclasses.replace(self, tau=temperature)

    def sample(self, key: PRNGKeyArray, logits: Logits) -> Logits:
        r"""One draw per gate, $s = (1 - (1 - u)^{1/b})^{1/a}$ stretched and clipped."""
        return self._quantile(*uniform_beside(key, logits))

    def survival(self, x: float, logits: Logits) -> Logits:
        r"""$P(z > x) = (1 - s^a)^b$ at the point s that is stretched to x."""
        a, b = self._shapes(logits)
        log_s = math.log((x - self.gamma) / (self.zeta - self.gamma))
        return jnp.exp(b * jnp.log(-jnp.expm1(a * log_s)))

    def deterministic(self, logits: Logits, rule: str) -> Logits:
        r"""The gate at test time.

        `"paper"`: 0, 1, or the mean $b B(1 + 1/a, b)$ of the variable before the
        stretch, whichever of z = 0, z = 1 and 0 < z < 1 is most likely; `"median"`: the
        median of z; `"mean"`: E[z], which is never 0.

        Raises:
            ValueError: if `rule` is not one of `rules`.
        """
        if rule == "paper":
            active, one = self.prob_active(logits), self.prob_one(logits)
            zero, between = 1 - active, active - one
            a, b = self._shapes(logits)
            inside = b * jnp.exp(betaln(1 + 1 / a, b))
            ends = (one > zero).astype(logits.dtype)
            return jnp.where(between > jnp.maximum(zero, one), inside, ends)
        if rule == "median":
            return self._quantile(jnp.full_like(logits, 0.5), logits)
        if rule == "mean":
            return self.mean(logits)
        raise self.unknown_rule(rule)

    def _shapes(self, logits: Logits) -> tuple[Logits, Logits]:
        return self.tau * jnp.exp(logits / 2), self.tau * jnp.exp(-logits / 2)

    def _quantile(self, u: Logits, logits: Logits) -> Logits:
        a, b = self._shapes(logits)
        s = jnp.exp(jnp.log(-jnp.expm1(jnp.log1p(-u) / b)) / a)
        return jnp.clip(s * (self.zeta - self.gamma) + self.gamma, 0.0, 1.0)
