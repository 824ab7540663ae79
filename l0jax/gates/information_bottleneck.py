"""The variational information bottleneck of Dai, Zhu, Guo and Wipf (ICML 2018)."""

import dataclasses

import jax

from l0jax.gates.family import Logits
from l0jax.gates.multiplicative_noise import MultiplicativeNoise


@dataclasses.dataclass(frozen=True)
class InformationBottleneck(MultiplicativeNoise):
    r"""Multiplicative noise that costs the information that passes it.

    The paper draws $\mu + \sigma\epsilon$; here the weights, which the gate multiplies,
    have $\mu$ among them, and $\alpha$ is $\sigma^2 / \mu^2$.

    Args:
        temperature, limit: as for all `MultiplicativeNoise`.
        threshold: of $\log\alpha$; at the paper's 0 a unit is as much noise as signal.

    Raises:
        ValueError: if a field is outside its range.
    """

    def l0_term(self, logits: Logits) -> Logits:
        r"""$\tfrac12 \log(1 + 1/\alpha)$."""
        return jax.nn.softplus(-self.log_alpha(logits)) / 2
