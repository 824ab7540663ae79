r"""The gate of Savarese, Silva and Maire (NeurIPS 2020), Continuous Sparsification:
$z = \sigma(s / T)$, which the temperature makes a step $1[s > 0]$ while training.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from l0jax.gates.family import Logits
from l0jax.gates.noiseless import Noiseless


@dataclasses.dataclass(frozen=True)
class ContinuousSparsification(Noiseless):
    r"""Gates $\sigma(s / T)$ of a trained s each, which are never exactly 0.

    Args:
        temperature: T, > 0; the paper's $\beta$ is 1/T, and goes from 1 to 200
            exponentially.
        limit: as for all families.

    Raises:
        ValueError: if a field is outside its range.
    """

    rules: ClassVar[tuple[str, ...]] = ("paper", "mean")
    zeros: ClassVar[bool] = False

    def mean(self, logits: Logits) -> Logits:
        r"""$\sigma(s / T)$, the gate itself."""
        return jax.nn.sigmoid(logits / self.temperature)

    def prob_active(self, logits: Logits) -> Logits:
        """1."""
        return jnp.ones_like(logits)

    def prob_one(self, logits: Logits) -> Logits:
        """0."""
        return jnp.zeros_like(logits)

    def deterministic(self, logits: Logits, rule: str) -> Logits:
        """The gate at test time: `"paper"` is 1 where s > 0, else 0; `"mean"` is the
        gate itself.

        Raises:
            ValueError: if `rule` is not one of `rules`.
        """
        if rule == "paper":
            return (logits > 0).astype(logits.dtype)
        if rule == "mean":
            return self.mean(logits)
        raise self.unknown_rule(rule)
