r"""The smooth-step gate of Hazimeh et al. (ICML 2020), as a gate of a unit.

$$ S(t) = -\tfrac{2}{w^3} t^3 + \tfrac{3}{2w} t + \tfrac12 $$

between $-w/2$ and $w/2$, 0 below and 1 above, with the width w.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from l0jax.gates.family import Logits
from l0jax.gates.noiseless import Noiseless


@dataclasses.dataclass(frozen=True)
class SmoothStep(Noiseless):
    """Gates S(t) of a trained t each, of width 6 at temperature 1.

    Both ends have slope 0: a gate that is exactly 0 or 1 is trained no more.

    Args:
        temperature: a sixth of the width, > 0. Initial logits should lie within half
            the width.
        limit: as for all families.

    Raises:
        ValueError: if a field is outside its range.
    """

    @property
    def width(self) -> float | Float[Array, ""]:
        """w."""
        return 6 * self.temperature

    def mean(self, logits: Logits) -> Logits:
        """S(t), the gate itself."""
        # (The polynomial of t is this one of t/w + 1/2, which is exactly 0 at its end.)
        x = jnp.clip(logits / self.width + 0.5, 0.0, 1.0)
        return x * x * (3 - 2 * x)
