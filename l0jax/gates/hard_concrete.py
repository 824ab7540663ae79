r"""The hard concrete gate of Louizos, Welling and Kingma (ICLR 2018), section 2.2.

A binary concrete variable is stretched to (gamma, zeta) and clipped to [0, 1]:

$$ s = \sigma\big((\log u - \log(1-u) + \log\alpha) / \beta\big), \qquad
   z = \min(1, \max(0, s(\zeta-\gamma)+\gamma)), \qquad u \sim U(0, 1). $$

The clip puts mass on exactly 0 and exactly 1, and in between the draw is
differentiable in $\log\alpha$, the logit that is trained.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax.gates.clipped import Stretched, uniform_beside
from l0jax.gates.family import Logits, positive


@dataclasses.dataclass(frozen=True)
class HardConcrete(Stretched):
    """Hard concrete gates with location `log_alpha` per gate.

    Args:
        beta: temperature, > 0. Small values make gates nearly binary.
        gamma, zeta: ends of the stretch, as for all `Stretched` gates.
        limit: of `log_alpha`. At the default, log 100, a dead gate still opens in 4.7 %
            of training draws.

    Raises:
        ValueError: if a field is outside its range.
    """

    beta: float | Float[Array, ""] = 2 / 3

    rules: ClassVar[tuple[str, ...]] = ("paper", "median", "mean")

    def __post_init__(self):
        super().__post_init__()
        positive(beta=self.beta)

    @property
    def temperature(self) -> float | Float[Array, ""]:
        """`beta`."""
        return self.beta

    def at_temperature(self, temperature: float | Float[Array, ""]) -> "HardConcrete":
        """The same gate with `beta` replaced; `temperature` may be traced."""
        return dataclasses.replace(self, beta=temperature)

    def sample(self, key: PRNGKeyArray, logits: Logits) -> Logits:
        """One draw per gate (eq. 10-12), with pathwise gradients in the logits."""
        u, logits = uniform_beside(key, logits)
        return self._stretch((jnp.log(u / (1 - u)) + logits) / self.beta)

    def survival(self, x: float, logits: Logits) -> Logits:
        r"""$P(z > x) = \sigma(\log\alpha - \beta \log\frac{x-\gamma}{\zeta-x})$, of
        which x = 0 is eq. 12 and x = 1 is P(z = 1)."""
        edge = self.beta * math.log((x - self.gamma) / (self.zeta - x))
        return jax.nn.sigmoid(logits - edge)

    def deterministic(self, logits: Logits, rule: str) -> Logits:
        r"""The gate at test time.

        `"paper"`: $\text{clip}(\sigma(\log\alpha)(\zeta-\gamma)+\gamma)$ (eq. 13),
        which is neither mean nor median; zero iff P(z != 0) <= 0.310 at the defaults.
        `"median"`: the median of z; zero iff P(z != 0) <= 1/2. `"mean"`: E[z], which
        is never 0, so that it removes nothing.

        Raises:
            ValueError: if `rule` is not one of `rules`.
        """
        if rule == "paper":
            return self._stretch(logits)
        if rule == "median":
            return self._stretch(logits / self.beta)
        if rule == "mean":
            return self.mean(logits)
        raise self.unknown_rule(rule)

    def _stretch(self, logit_of_s: Logits) -> Logits:
        return _stretched(logit_of_s, self.gamma, self.zeta)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _stretched(logit_of_s: Logits, gamma: float, zeta: float) -> Logits:
    s = jax.nn.sigmoid(logit_of_s)
    return jnp.clip(s * (zeta - gamma) + gamma, 0.0, 1.0)


@_stretched.defjvp
def _stretched_jvp(gamma, zeta, primals, tangents):
    # s(1 - s) in terms of z itself, so that the gates are all that a step keeps for its
    # backward pass.
    z = _stretched(*primals, gamma, zeta)
    slope = (z - gamma) * (zeta - z) / (zeta - gamma)
    return z, jnp.where((z > 0) & (z < 1), slope, 0) * tangents[0]
