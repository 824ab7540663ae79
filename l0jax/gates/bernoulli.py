r"""Bernoulli gates: $z \in \{0, 1\}$ with $P(z = 1) = \sigma(\phi / T)$.

Those of Li and Ji (2019, L0-ARM), who write $k = 7$ for $1 / T$.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax.gates.clipped import Clipped, uniform_beside
from l0jax.gates.family import Logits, positive, straight_through


@dataclasses.dataclass(frozen=True)
class Bernoulli(Clipped):
    r"""Bernoulli gates with one trained logit $\phi$ each.

    No path leads from a draw back to its logit; `sample` lets the derivative of the
    probability pass instead. `l0jax.estimators` has other gradients.

    Args:
        temperature: T, > 0.
        limit: as for all families.

    Raises:
        ValueError: if a field is outside its range.
    """

    temperature: float | Float[Array, ""] = 1.0

    rules: ClassVar[tuple[str, ...]] = ("paper", "mean")
    pathwise: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        positive(temperature=self.temperature)

    def at_temperature(self, temperature: float | Float[Array, ""]) -> "Bernoulli":
        """The same gate at another temperature, which may be traced."""
        return dataclasses.replace(self, temperature=temperature)

    def natural(
        self, logits: Mapping[str, Float[Array, " units"]]
    ) -> dict[str, Float[Array, " units"]]:
        r"""$\phi / T$ of every group, whose sigmoid P(z = 1) is, as
        `l0jax.estimators` take it."""
        return {name: phi / self.temperature for name, phi in logits.items()}

    def sample(self, key: PRNGKeyArray, logits: Logits) -> Logits:
        """One draw per gate, straight-through: with the derivative of P(z = 1)."""
        u, logits = uniform_beside(key, logits)
        p = self.prob_one(logits)
        return straight_through((u < p).astype(p.dtype), p)

    def survival(self, x: float, logits: Logits) -> Logits:
        r"""$P(z > x) = \sigma(\phi / T)$ for every x < 1."""
        del x
        return jax.nn.sigmoid(logits / self.temperature)

    def mean(self, logits: Logits) -> Logits:
        """E[z] = P(z = 1)."""
        return self.prob_one(logits)

    def deterministic(self, logits: Logits, rule: str) -> Logits:
        r"""The gate at test time: `"paper"` is 1 where $\phi > 0$, else 0; `"mean"` is
        E[z], which is never 0.

        Raises:
            ValueError: if `rule` is not one of `rules`.
        """
        if rule == "paper":
            return (logits > 0).astype(logits.dtype)
        if rule == "mean":
            return self.mean(logits)
        raise self.unknown_rule(rule)
