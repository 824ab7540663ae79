r"""The hard sigmoid of Courbariaux, Bengio and David (NeurIPS 2015), without noise:
$z = \text{clip}(\tfrac12 + k\phi, 0, 1)$.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from l0jax.gates.family import Logits, in_full, straight_through
from l0jax.gates.noiseless import Noiseless


@dataclasses.dataclass(frozen=True)
class HardSigmoid(Noiseless):
    r"""Gates that are clipped linear functions of a trained $\phi$ each.

    What a unit pays is the sigmoid to which the gate is tangent, since the gate's own
    slope ends where it is clipped: one that is fully open would never close.

    Args:
        temperature: > 0; k is 1/4 of its inverse.
        limit: as for all families.

    Raises:
        ValueError: if a field is outside its range.
    """

    pathwise: ClassVar[bool] = False

    def sample(self, key: PRNGKeyArray, logits: Logits) -> Logits:
        """The gate, whatever the key, straight-through: its slope is k where it is
        clipped too, so that a closed gate can open again."""
        del key
        line = self._line(in_full(logits))
        return straight_through(jnp.clip(line, 0.0, 1.0), line)

    def mean(self, logits: Logits) -> Logits:
        r"""$\text{clip}(\tfrac12 + k\phi, 0, 1)$, the gate itself."""
        return jnp.clip(self._line(logits), 0.0, 1.0)

    def l0_term(self, logits: Logits) -> Logits:
        r"""$\sigma(4 k \phi)$."""
        return jax.nn.sigmoid(logits / self.temperature)

    def _line(self, logits: Logits) -> Logits:
        return 0.5 + logits / (4 * self.temperature)
