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
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax.gates import noise

# E[z] integrates a smooth function of one variable over [0, 1]. 32 Gauss-Legendre
# nodes leave an error below 1e-6 for beta >= 0.1; the test compares with SciPy.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)
NODES, WEIGHTS = ((NODES + 1) / 2).tolist(), (WEIGHTS / 2).tolist()


@dataclasses.dataclass(frozen=True)
class HardConcrete:
    """Hard concrete gates with location `log_alpha` per gate.

    Args:
        beta: temperature, > 0. Small values make gates nearly binary.
        gamma: lower end of the stretch, < 0: below it lies the mass of z = 0.
        zeta: upper end of the stretch, > 1: above it lies the mass of z = 1.
        limit: after every step `log_alpha` is clipped to [-limit, limit]. At the
            default, log 100, a dead gate still opens in 4.7 % of training draws.

    Raises:
        ValueError: if a field is outside its range.
    """

    beta: float | Float[Array, ""] = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1
    limit: float = math.log(100.0)

    rules: ClassVar[tuple[str, ...]] = ("paper", "median", "mean")

    def __post_init__(self):
        # A traced temperature (annealing) has no value to check; its schedule has.
        if isinstance(self.beta, float | int) and not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta}")
        if not self.gamma < 0:
            raise ValueError(
                f"gamma must be < 0, or no gate is ever exactly 0; got {self.gamma}"
            )
        if not self.zeta > 1:
            raise ValueError(
                f"zeta must be > 1, or no gate is ever exactly 1; got {self.zeta}"
            )
        if not self.limit > 0:
            raise ValueError(f"limit must be > 0, got {self.limit}")

    @property
    def temperature(self) -> float | Float[Array, ""]:
        """`beta`."""
        return self.beta

    def at_temperature(self, temperature: float | Float[Array, ""]) -> "HardConcrete":
        """The same gate with `beta` replaced; `temperature` may be traced."""
        return dataclasses.replace(self, beta=temperature)

    def init(
        self, key: PRNGKeyArray, size: int, keep_prob: float
    ) -> Float[Array, " units"]:
        r"""Draws $\log\alpha \sim N(\log\frac{p}{1-p}, 0.01^2)$ for `size` gates.

        P(z != 0) then starts above `keep_prob` (0.832 for 0.5): alpha / (1 + alpha) is
        the keep rate of the underlying binary concrete, before the stretch.

        Raises:
            ValueError: if `keep_prob` is outside (0, 1).
        """
        if not 0 < keep_prob < 1:
            raise ValueError(f"keep_prob must lie in (0, 1), got {keep_prob}")
        location = math.log(keep_prob) - math.log1p(-keep_prob)
        return location + 0.01 * jax.random.normal(key, (size,), jnp.float32)

    def sample(
        self, key: PRNGKeyArray, logits: Float[Array, "*units"]
    ) -> Float[Array, "*units"]:
        """One draw per gate (eq. 10-12), with pathwise gradients in the logits."""
        u = noise.uniform(key, logits.shape)
        # The noise is float32 also under logits of lower precision.
        wide = jnp.finfo(logits.dtype).bits > 32
        dtype = logits.dtype if wide else jnp.float32
        logistic = jnp.log(u / (1 - u)).astype(dtype)
        return self._stretch((logistic + logits.astype(dtype)) / self.beta)

    def prob_active(self, logits: Float[Array, "*units"]) -> Float[Array, "*units"]:
        r"""$P(z\neq 0) = \sigma(\log\alpha - \beta\log(-\gamma/\zeta))$ (eq. 12)."""
        return jax.nn.sigmoid(logits - self._log_odds(0.0))

    def prob_one(self, logits: Float[Array, "*units"]) -> Float[Array, "*units"]:
        r"""$P(z=1) = \sigma(\log\alpha - \beta\log\frac{1-\gamma}{\zeta-1})$."""
        return jax.nn.sigmoid(logits - self._log_odds(1.0))

    def mean(self, logits: Float[Array, "*units"]) -> Float[Array, "*units"]:
        r"""$E[z] = \int_0^1 P(z > x)\,dx$, by Gauss-Legendre quadrature."""
        survival = [
            weight * jax.nn.sigmoid(logits - self._log_odds(node))
            for node, weight in zip(NODES, WEIGHTS, strict=True)
        ]
        return sum(survival[1:], start=survival[0])

    def deterministic(
        self, logits: Float[Array, "*units"], rule: str
    ) -> Float[Array, "*units"]:
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
        raise ValueError(
            f"unknown test-time rule {rule!r} for {type(self).__name__}; "
            f"it knows {', '.join(self.rules)}"
        )

    def project(self, logits: Float[Array, "*units"]) -> Float[Array, "*units"]:
        """Clips the logits to [-limit, limit]."""
        return jnp.clip(logits, -self.limit, self.limit)

    def _stretch(self, logit_of_s: Float[Array, "*units"]) -> Float[Array, "*units"]:
        return _stretched(logit_of_s, self.gamma, self.zeta)

    def _log_odds(self, x: float) -> float | Float[Array, ""]:
        """beta * logit of the unstretched s at which the stretched one equals x."""
        return self.beta * math.log((x - self.gamma) / (self.zeta - x))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _stretched(
    logit_of_s: Float[Array, "*units"], gamma: float, zeta: float
) -> Float[Array, "*units"]:
    s = jax.nn.sigmoid(logit_of_s)
    return jnp.clip(s * (zeta - gamma) + gamma, 0.0, 1.0)


@_stretched.defjvp
def _stretched_jvp(gamma, zeta, primals, tangents):
    # s(1 - s) in terms of z itself, so that the gates are all that a step keeps for its
    # backward pass.
    z = _stretched(*primals, gamma, zeta)
    slope = (z - gamma) * (zeta - z) / (zeta - gamma)
    return z, jnp.where((z > 0) & (z < 1), slope, 0) * tangents[0]
