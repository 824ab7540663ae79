r"""A mixture whose indicator is relaxed: an ablation of `l0jax.gates.mixture`.

With an indicator b of the binary concrete distribution (Maddison et al. 2017) and one
number from each distribution of the pair,

$$ s = (1 - b) s_0 + b s_1, \qquad
   z = \text{clip}(s (\zeta - \gamma) + \gamma, 0, 1). $$

This is no mixture: it has mass between the two modes.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from l0jax.gates.clipped import uniform_beside
from l0jax.gates.family import Logits, positive
from l0jax.gates.mixture import Mixture, quantile


@dataclasses.dataclass(frozen=True)
class RelaxedMixture(Mixture):
    """Gates that are drawn with a relaxed indicator and counted as a `Mixture`.

    All closed forms are the mixture's, not those of what is drawn: the expected L0 norm
    is biased. They agree as `beta` goes to 0.

    Args:
        beta: temperature of the indicator, > 0.
        pair, l0, gamma, zeta, limit: as for `Mixture`; `temperature` is the scale of
            the pair here too.

    Raises:
        ValueError: as for `Mixture`, or if `beta` is not positive.
    """

    beta: float = 2 / 3

    exact: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        positive(beta=self.beta)

    def sample(self, key: PRNGKeyArray, logits: Logits) -> Logits:
        """One draw per gate, with pathwise gradients in the logits, and none in the
        pair's scale."""
        of_indicator, of_pair = jax.random.split(key)
        u, logits = uniform_beside(of_indicator, logits)
        b = jax.nn.sigmoid((jnp.log(u / (1 - u)) + logits) / self.beta)
        # Both from the same noise, so that s1 >= s0: z grows with the indicator.
        v, _ = uniform_beside(of_pair, logits)
        s = (1 - b) * self._off(v) + b * (1 - self._off(1 - v))
        return jnp.clip(s * (self.zeta - self.gamma) + self.gamma, 0.0, 1.0)

    def _off(self, v: Logits) -> Logits:
        """The number below which the first distribution lies with probability v."""
        # As a mixture without the second, of which [-1, 2] becomes [0, 1].
        never = jnp.full_like(v, -jnp.inf)
        scale = jax.lax.stop_gradient(jnp.asarray(self.pair.scale, v.dtype))
        return 3 * quantile(self.pair.at_scale(1.0), 1 / 3, 2 / 3, v, never, scale) - 1
