r"""D-Gating of Kolb, Frost, Bischl and Rügamer (NeurIPS 2025): the weights of a unit
are $w = \omega \gamma^{D-1}$, and both factors pay their squares.

Smooth as it is, that is a price of $\|w\|_2^{2/D}$, which takes whole units out: for
given w, what both factors pay in

$$ \frac{\lambda}{D} \Big( \|\omega\|_2^2 + (D - 1) \gamma^2 \Big) $$

is least where $\|\omega\| = \gamma$, and is $\lambda \|w\|_2^{2/D}$ there (their
theorem 1, for D - 1 factors of one value, which stay equal if they begin so).
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax.gates.family import Family, Logits, in_full, positive

FLOOR = 1e-3
"""The least factor: at 0 no gradient would reach it any more."""


@dataclasses.dataclass(frozen=True)
class DGating(Family):
    r"""Gates $\gamma^{D-1}$ of a trained factor $\gamma > 0$ each, without noise.

    Nothing in the mathematics asks for a whole number of factors, so that the depth is
    a temperature, $D = 1 + 1/T$: 1 is the group LASSO, and towards 0 what a unit pays
    becomes the L0 norm, $\|w\|^{2T/(1+T)} \to 1[w \neq 0]$.

    A gate is never exactly 0, and may exceed 1. Which units go is said by a threshold,
    or by a budget.

    Args:
        temperature: T = 1/(D - 1), > 0; 1/2 is D = 3.
        threshold: of the gate in the paper's rule, which asks for numerical zeros.
        limit: after every step factors are clipped to [0.001, limit].

    Raises:
        ValueError: if a field is outside its range.
    """

    temperature: float | Float[Array, ""] = 0.5
    threshold: float = 1e-2
    limit: float = dataclasses.field(default=8.0, kw_only=True)

    rules: ClassVar[tuple[str, ...]] = ("paper", "mean")
    random: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    zeros: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        positive(temperature=self.temperature, threshold=self.threshold)

    def at_temperature(self, temperature: float | Float[Array, ""]) -> "DGating":
        """The same gate with another number of factors, which may be traced."""
        return dataclasses.replace(self, temperature=temperature)

    @property
    def norm_share(self) -> Float[Array, ""] | float:
        """1/D, of the price, for the squared norm of what the gate multiplies."""
        return self.temperature / (1 + self.temperature)

    def init(
        self, key: PRNGKeyArray, size: int, keep_prob: float
    ) -> Float[Array, " units"]:
        """Factors of gates about `keep_prob`, so that they begin close to what they
        multiply; they differ by a hundredth.

        Raises:
            ValueError: if `keep_prob` is outside (0, 1).
        """
        if not 0 < keep_prob < 1:
            raise ValueError(f"keep_prob must lie in (0, 1), got {keep_prob}")
        apart = 0.01 * jax.random.normal(key, (size,), jnp.float32)
        return jnp.exp(self.temperature * (math.log(keep_prob) + apart))

    def mean(self, logits: Logits) -> Logits:
        r"""$\gamma^{D-1}$, the gate itself."""
        return jnp.exp(jnp.log(jnp.maximum(logits, FLOOR)) / self.temperature)

    def sample(self, key: PRNGKeyArray, logits: Logits) -> Logits:
        """The gate, whatever the key."""
        del key
        return self.mean(in_full(logits))

    def prob_active(self, logits: Logits) -> Logits:
        """1."""
        return jnp.ones_like(logits)

    def prob_one(self, logits: Logits) -> Logits:
        """0."""
        return jnp.zeros_like(logits)

    def l0_term(self, logits: Logits) -> Logits:
        r"""$\frac{D-1}{D} \gamma^2$: the part of the price that the factors pay."""
        return jnp.square(jnp.maximum(logits, FLOOR)) / (1 + self.temperature)

    def project(self, logits: Logits) -> Logits:
        """Clips the factors to [0.001, limit]: the sign is that of the weights."""
        return jnp.clip(logits, FLOOR, self.limit)

    def deterministic(self, logits: Logits, rule: str) -> Logits:
        """The gate at test time: `"paper"` is 0 where it is below the threshold;
        `"mean"` is the gate itself.

        Raises:
            ValueError: if `rule` is not one of `rules`.
        """
        if rule == "paper":
            z = self.mean(logits)
            return jnp.where(z < self.threshold, 0.0, z)
        if rule == "mean":
            return self.mean(logits)
        raise self.unknown_rule(rule)
