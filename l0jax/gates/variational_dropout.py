"""Variational dropout (Kingma, Salimans and Welling, NeurIPS 2015; Molchanov, Ashukha
and Vetrov, ICML 2017), with one noise for all weights of a unit.
"""

import dataclasses

import jax

from l0jax.gates.family import Logits
from l0jax.gates.multiplicative_noise import MultiplicativeNoise

K1, K2, K3 = 0.63576, 1.87320, 1.48695  # of eq. 14 of Molchanov et al.


@dataclasses.dataclass(frozen=True)
class VariationalDropout(MultiplicativeNoise):
    r"""Multiplicative noise that costs its divergence from a log-uniform prior.

    Args:
        temperature, limit: as for all `MultiplicativeNoise`.
        threshold: of $\log\alpha$; at the paper's 3 a unit is 95 % noise.

    Raises:
        ValueError: if a field is outside its range.
    """

    threshold: float = 3.0

    def l0_term(self, logits: Logits) -> Logits:
        r"""The divergence as Molchanov et al. approximate it, which goes to 0 as
        $\alpha$ grows:

        $$ k_1 - k_1 \sigma(k_2 + k_3 \log\alpha) + \tfrac12 \log(1 + 1/\alpha). $$
        """
        log_alpha = self.log_alpha(logits)
        sigmoid = K1 * jax.nn.sigmoid(-(K2 + K3 * log_alpha))
        return sigmoid + jax.nn.softplus(-log_alpha) / 2
