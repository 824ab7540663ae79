"""What gates have in common that are functions of their logits, without noise."""

import abc
import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float, PRNGKeyArray

from l0jax.gates.family import Family, Logits, in_full, positive


@dataclasses.dataclass(frozen=True)
class Noiseless(Family):
    """A family whose gates are the same at every draw.

    Args:
        temperature: how far from a step the function of the logit is, > 0. At 1 its
            slope at 0 is 1/4, that of the sigmoid.
        limit: as for all families.

    Raises:
        ValueError: if a field is outside its range.
    """

    temperature: float | Float[Array, ""] = 1.0

    rules: ClassVar[tuple[str, ...]] = ("paper",)
    random: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        positive(temperature=self.temperature)

    def at_temperature(self, temperature: float | Float[Array, ""]) -> "Noiseless":
        """The same gate at another temperature, which may be traced."""
        return dataclasses.replace(self, temperature=temperature)

    @abc.abstractmethod
    def mean(self, logits: Logits) -> Logits:
        """The gate itself."""

    def sample(self, key: PRNGKeyArray, logits: Logits) -> Logits:
        """The gate, whatever the key."""
        del key
        return self.mean(in_full(logits))

    def prob_active(self, logits: Logits) -> Logits:
        """1 where the gate is not 0, else 0: a step, which trains nothing."""
        return (self.mean(logits) > 0).astype(logits.dtype)

    def prob_one(self, logits: Logits) -> Logits:
        """1 where the gate is 1, else 0."""
        return (self.mean(logits) == 1).astype(logits.dtype)

    def l0_term(self, logits: Logits) -> Logits:
        """The gate itself."""
        return self.mean(logits)

    def deterministic(self, logits: Logits, rule: str) -> Logits:
        """The gate at test time: `"paper"` is the gate itself.

        Raises:
            ValueError: if `rule` is not one of `rules`.
        """
        if rule == "paper":
            return self.mean(logits)
        raise self.unknown_rule(rule)
