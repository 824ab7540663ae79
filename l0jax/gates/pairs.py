r"""Pairs of distributions for mixture-distributed gates: one near 0, its mirror near 1.

A pair is a base distribution $R_0$ that converges to $\delta(0)$ as its `scale` goes to
0; the other one is $R_1(s) = 1 - R_0(1 - s)$. A new pair is a subclass that states a
cdf and a density; what is drawn, and every gradient, follows from the two. Where the
mixture's quantile has a closed form, `mixed_quantile` says so: drawing takes a fifth of
the time.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy import special
from jaxtyping import Array, Float

from l0jax.gates.family import positive

Numbers = Float[Array, "*shape"]


@dataclasses.dataclass(frozen=True)
class Pair(abc.ABC):
    """A base distribution, by its cdf and its density.

    Args:
        scale: width of the two modes, > 0; annealing and trained sharpness change it.

    Raises:
        ValueError: if the scale is not positive.
    """

    scale: float | Float[Array, ""] = 0.1

    def __post_init__(self):
        positive(scale=self.scale)

    def __init_subclass__(cls, **settings: Any):
        super().__init_subclass__(**settings)
        first = {
            name: [name in vars(each) for each in cls.__mro__].index(True)
            for name in ("cdf", "mixed_quantile")
        }
        if first["cdf"] < first["mixed_quantile"]:
            # It would be that of another distribution.
            cls.mixed_quantile = Pair.mixed_quantile

    @abc.abstractmethod
    def cdf(self, s: Numbers) -> Numbers:
        """R0(s)."""

    @abc.abstractmethod
    def density(self, s: Numbers) -> Numbers:
        """The derivative of `cdf`."""

    def mixed_quantile(self, u: Numbers, logits: Numbers) -> Numbers | None:
        r"""The s below which a mixture with weights $\sigma(\eta)$ lies with
        probability u; None if there is no closed form.

        Args:
            u: in (0, 1).
            logits: $\eta$; at $-\infty$ there is only the first distribution.
        """
        return None

    def at_scale(self, scale: float | Float[Array, ""]) -> "Pair":
        """The same pair with another scale, which may be traced."""
        return dataclasses.replace(self, scale=scale)


@dataclasses.dataclass(frozen=True)
class Exponential(Pair):
    r"""Exponential, truncated to [0, 1] (Vahdat et al. 2018, DVAE++), with rate
    $\kappa = 1/\text{scale}$: $R_0(s) = (1 - e^{-\kappa s}) / (1 - e^{-\kappa})$."""

    scale: float | Float[Array, ""] = 1 / 8

    def cdf(self, s):
        """R0(s)."""
        return jnp.expm1(-_inside(s) / self.scale) / jnp.expm1(-1 / self.scale)

    def density(self, s):
        """r0(s)."""
        return -jnp.exp(-s / self.scale) / (self.scale * jnp.expm1(-1 / self.scale))

    def mixed_quantile(self, u, logits):
        r"""The root of a quadratic equation for $e^{-\kappa s}$ (DVAE++)."""
        pi, rest = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
        near, far = -jnp.expm1(-1 / self.scale), jnp.exp(-1 / self.scale)
        # In logarithms, and without a difference, each from the end that it is near.
        b = rest - pi * far - u * near
        square = _apart(b) + 4 * rest * pi * far
        root = jnp.log((jnp.abs(b) + jnp.sqrt(square)) / 2)
        low = jax.nn.log_sigmoid(-logits) - root
        high = root - jax.nn.log_sigmoid(logits)
        sharp = jnp.where(b > 0, self.scale * low, 1 + self.scale * high)
        # And for 1 - e^(-kappa s), which is small for all s if the scale is large.
        b = 1 - pi * near + u * near
        square = jnp.maximum(jnp.square(b) - 4 * rest * u * near, 0)
        wide = jnp.log1p(-2 * u * near / (b + jnp.sqrt(square)))
        return jnp.where(self.scale > 1, -self.scale * wide, sharp)


@dataclasses.dataclass(frozen=True)
class ExponentialUniform(Exponential):
    r"""The same with a uniform share $\epsilon$ (Vahdat et al. 2018, DVAE#), which
    keeps the gradient below $1/\epsilon$ between the modes.

    Raises:
        ValueError: if `share` is not below 1.
    """

    share: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        positive(share=self.share)
        if not self.share < 1:
            raise ValueError(f"share must be < 1, got {self.share}")

    def cdf(self, s):
        """R0(s)."""
        return (1 - self.share) * super().cdf(s) + self.share * _inside(s)

    def density(self, s):
        """r0(s)."""
        return (1 - self.share) * super().density(s) + self.share


@dataclasses.dataclass(frozen=True)
class Power(Pair):
    r"""$R_0(s) = s^\lambda$ on [0, 1] (DVAE++), with
    $\lambda = \text{scale} / (1 + \text{scale}) < 1$."""

    scale: float | Float[Array, ""] = 1 / 9

    def cdf(self, s):
        """R0(s)."""
        return jnp.power(_inside(s), self._exponent)

    def density(self, s):
        """r0(s)."""
        return self._exponent * jnp.power(s, self._exponent - 1)

    @property
    def _exponent(self):
        return self.scale / (1 + self.scale)


@dataclasses.dataclass(frozen=True)
class Kumaraswamy(Pair):
    r"""$R_0(s) = 1 - (1 - s^p)^q$ on [0, 1], with p the scale."""

    scale: float | Float[Array, ""] = 0.25
    q: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        positive(q=self.q)

    def cdf(self, s):
        """R0(s)."""
        return 1 - jnp.power(1 - jnp.power(_inside(s), self.scale), self.q)

    def density(self, s):
        """r0(s)."""
        low = jnp.power(s, self.scale - 1)
        high = jnp.power(1 - jnp.power(s, self.scale), self.q - 1)
        return self.scale * self.q * low * high


@dataclasses.dataclass(frozen=True)
class Beta(Pair):
    r"""Beta(p, q) with p the scale and an integer q, for which
    $I_s(p, q) = s^p \sum_{j<q} \frac{(p)_j}{j!} (1 - s)^j$."""

    scale: float | Float[Array, ""] = 0.25
    q: int = 4

    def __post_init__(self):
        super().__post_init__()
        positive(q=self.q)

    def cdf(self, s):
        """R0(s)."""
        s = _inside(s)
        term, total = jnp.ones_like(s), jnp.zeros_like(s)
        for j in range(self.q):
            total = total + term
            term = term * (1 - s) * (self.scale + j) / (j + 1)
        return jnp.power(s, self.scale) * total

    def density(self, s):
        """r0(s)."""
        # 1 / B(p, q) = p (p + 1) ... (p + q - 1) / (q - 1)!
        rising = math.prod(self.scale + j for j in range(self.q))
        shape = jnp.power(s, self.scale - 1) * jnp.power(1 - s, self.q - 1)
        return rising / math.factorial(self.q - 1) * shape


@dataclasses.dataclass(frozen=True)
class HalfNormal(Pair):
    """A normal distribution around 0 with the scale as its deviation, truncated to
    [0, 1]."""

    scale: float | Float[Array, ""] = 0.25

    def cdf(self, s):
        """R0(s)."""
        width = math.sqrt(2) * self.scale
        return special.erf(_inside(s) / width) / special.erf(1 / width)

    def density(self, s):
        """r0(s)."""
        width = math.sqrt(2) * self.scale
        height = 2 / math.sqrt(math.pi) / width / special.erf(1 / width)
        return height * jnp.exp(-jnp.square(s / width))


@dataclasses.dataclass(frozen=True)
class Gaussian(Pair):
    """A normal distribution around 0, on all numbers (DVAE#)."""

    scale: float | Float[Array, ""] = 0.25

    def cdf(self, s):
        """R0(s)."""
        return special.ndtr(s / self.scale)

    def density(self, s):
        """r0(s)."""
        bell = jnp.exp(-jnp.square(s / self.scale) / 2)
        return bell / (math.sqrt(2 * math.pi) * self.scale)


@dataclasses.dataclass(frozen=True)
class Logistic(Pair):
    """A logistic distribution around 0, on all numbers."""

    scale: float | Float[Array, ""] = 0.1

    def cdf(self, s):
        """R0(s)."""
        return jax.nn.sigmoid(s / self.scale)

    def density(self, s):
        """r0(s)."""
        half = jax.nn.sigmoid(s / self.scale) * jax.nn.sigmoid(-s / self.scale)
        return half / self.scale

    def mixed_quantile(self, u, logits):
        r"""The root of a quadratic equation for $y = e^{s / \text{scale}}$:
        $(1 - u) k y^2 + b y - u = 0$ with $k = e^{-1 / \text{scale}}$."""
        far = jnp.exp(-1 / self.scale)
        b = jax.nn.sigmoid(-logits) + jax.nn.sigmoid(logits) * far - u * (1 + far)
        root = jnp.abs(b) + jnp.sqrt(_apart(b) + 4 * far * u * (1 - u))
        low = jnp.log(2 * u / root)
        high = jnp.log(root / (2 * (1 - u)))
        return jnp.where(b > 0, self.scale * low, 1 + self.scale * high)


@dataclasses.dataclass(frozen=True)
class Laplace(Pair):
    """A Laplace distribution around 0, on all numbers."""

    scale: float | Float[Array, ""] = 0.1

    def cdf(self, s):
        """R0(s)."""
        tail = jnp.exp(-jnp.abs(s) / self.scale) / 2
        return jnp.where(s < 0, tail, 1 - tail)

    def density(self, s):
        """r0(s)."""
        return jnp.exp(-jnp.abs(s) / self.scale) / (2 * self.scale)

    def mixed_quantile(self, u, logits):
        r"""That of the tail below 0 or above 1, or between them the root of a quadratic
        equation for $e^{-s / \text{scale}}$."""
        pi, rest = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
        far = jnp.exp(-1 / self.scale)
        below, above = rest + pi * far, pi + rest * far  # twice what lies there
        product = rest * pi * far
        d = rest - u
        root = jnp.log(jnp.abs(d) + jnp.sqrt(_apart(d) + product))
        low = jax.nn.log_sigmoid(-logits) - root
        high = root - jax.nn.log_sigmoid(logits)
        s = jnp.where(d > 0, self.scale * low, 1 + self.scale * high)
        s = jnp.where(2 * u < below, self.scale * jnp.log(2 * u / below), s)
        tail = 1 - self.scale * jnp.log(2 * (1 - u) / above)
        return jnp.where(2 * (1 - u) < above, tail, s)


def _apart(b: Numbers) -> Numbers:
    """The square of a difference of probabilities, which is known but for its rounding:
    at 0 a sharp pair would be drawn from the middle between its modes, where next to
    nothing is, and the slope without bounds."""
    return jnp.square(b) + jnp.finfo(b.dtype).eps ** 2


def _inside(s: Numbers) -> Numbers:
    return jnp.clip(s, 0.0, 1.0)


PAIRS: dict[str, type[Pair]] = {
    "exponential": Exponential,
    "exponential_uniform": ExponentialUniform,
    "power": Power,
    "kumaraswamy": Kumaraswamy,
    "beta": Beta,
    "half_normal": HalfNormal,
    "gaussian": Gaussian,
    "logistic": Logistic,
    "laplace": Laplace,
}
