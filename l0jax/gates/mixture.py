r"""Mixture-distributed gates (Huang, Chen and Wu, CVPR Workshops 2020).

A gate is drawn from a mixture of two distributions that converge to $\delta(0)$ and
$\delta(1)$, of which the second is the mirror image of the first (`l0jax.gates.pairs`),
with cdf

$$ Q(s) = (1 - \pi) R_0(s) + \pi \, (1 - R_0(1 - s)), \qquad \pi = \sigma(\eta), $$

then stretched and clipped as a hard concrete gate is: $z = \text{clip}(s (\zeta -
\gamma) + \gamma, 0, 1)$. The stretch makes a gate exactly 0 with a probability that
goes to $1 - \pi$; without it, a distribution around 0 is positive half of the time
however sharp it is. Draws are $Q^{-1}(u)$ of uniform noise u, whose gradients follow
from the implicit function theorem (Graves 2016; Figurnov et al. 2018).
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax.gates import noise
from l0jax.gates.pairs import Pair, Power

Logits = Float[Array, "*units"]

# As for the hard concrete gate: E[z] integrates a smooth function over [0, 1].
NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)
NODES, WEIGHTS = ((NODES + 1) / 2).tolist(), (WEIGHTS / 2).tolist()


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Mixture-distributed gates with one trained logit of the mixing weight each.

    Args:
        pair: the distributions, of which `PAIRS` has some.
        gamma: lower end of the stretch, < 0: below it lies the mass of z = 0.
        zeta: upper end of the stretch, > 1: above it lies the mass of z = 1.
        limit: after every step the logits are clipped to [-limit, limit].

    Raises:
        ValueError: if a field is outside its range, or the pair is none: its cdf is no
            cdf, its density is not the derivative of that, its second distribution is
            not to the right of the first, or it does not converge to 0 and 1.
    """

    pair: Pair = dataclasses.field(default_factory=Power)
    gamma: float = -0.1
    zeta: float = 1.1
    limit: float = math.log(100.0)

    rules: ClassVar[tuple[str, ...]] = ("paper", "median", "mean", "round")

    def __post_init__(self):
        if not self.gamma < 0:
            raise ValueError(
                f"gamma must be < 0, or no gate is ever exactly 0; got {self.gamma}"
            )
        if not self.zeta > 1:
            raise ValueError(
                f"zeta must be > 1, or no gate is ever exactly 1; got {self.zeta}"
            )
        if not self.limit > 0:
            raise ValueError(f"limit must be > 0, got {self.limit}")
        if isinstance(self.pair.scale, float | int):
            check_pair(self.pair, self._unstretched(0.0))

    @property
    def temperature(self) -> float | Float[Array, ""]:
        """The scale of the pair."""
        return self.pair.scale

    def at_temperature(self, temperature: float | Float[Array, ""]) -> "Mixture":
        """The same gate with another scale of its pair, which may be traced."""
        return dataclasses.replace(self, pair=self.pair.at_scale(temperature))

    def init(
        self, key: PRNGKeyArray, size: int, keep_prob: float
    ) -> Float[Array, " units"]:
        r"""Draws $\eta \sim N(\log\frac{p}{1-p}, 0.01^2)$: a mixing weight of about p.

        Raises:
            ValueError: if `keep_prob` is outside (0, 1).
        """
        if not 0 < keep_prob < 1:
            raise ValueError(f"keep_prob must lie in (0, 1), got {keep_prob}")
        location = math.log(keep_prob) - math.log1p(-keep_prob)
        return location + 0.01 * jax.random.normal(key, (size,), jnp.float32)

    def sample(self, key: PRNGKeyArray, logits: Logits) -> Logits:
        """One draw per gate, with the pathwise gradients of the implicit function."""
        u = noise.uniform(key, logits.shape)
        wide = jnp.finfo(logits.dtype).bits > 32
        dtype = logits.dtype if wide else jnp.float32
        return self.quantile(u.astype(dtype), logits.astype(dtype))

    def quantile(self, u: Logits, logits: Logits) -> Logits:
        r"""The gate below which z lies with probability u, by bisection.

        Its derivatives in the logits and in the pair's scale are those of the implicit
        function $Q(s) = u$, and none is given in u.
        """
        scale = jnp.asarray(self.pair.scale, logits.dtype)
        return _quantile(self._shape(), u, logits, scale)

    def prob_active(self, logits: Logits) -> Logits:
        r"""$P(z \neq 0) = 1 - Q(-\gamma / (\zeta - \gamma))$, affine in $\pi$."""
        return self._survival(0.0, logits)

    def prob_one(self, logits: Logits) -> Logits:
        r"""$P(z = 1) = 1 - Q((1 - \gamma) / (\zeta - \gamma))$."""
        return self._survival(1.0, logits)

    def mean(self, logits: Logits) -> Logits:
        r"""$E[z] = \int_0^1 P(z > x) dx$, by Gauss-Legendre quadrature."""
        survival = [
            weight * self._survival(node, logits)
            for node, weight in zip(NODES, WEIGHTS, strict=True)
        ]
        return sum(survival[1:], start=survival[0])

    def mixing_weight(self, logits: Logits) -> Logits:
        r"""$\pi$, the "latent" reading of the expected L0 norm: P(z != 0) is affine in
        it, so that the two differ by a constant and a factor on $\lambda$."""
        return jax.nn.sigmoid(logits)

    def deterministic(self, logits: Logits, rule: str) -> Logits:
        r"""The gate at test time.

        `"paper"`: $\text{clip}(\pi (\zeta - \gamma) + \gamma)$, the parallel of the
        hard concrete gate's; `"median"`: the median of z; `"mean"`: E[z], which is
        never 0; `"round"`: 1 where $\pi > 1/2$, else 0.

        Raises:
            ValueError: if `rule` is not one of `rules`.
        """
        if rule == "paper":
            stretched = jax.nn.sigmoid(logits) * (self.zeta - self.gamma) + self.gamma
            return jnp.clip(stretched, 0.0, 1.0)
        if rule == "median":
            return self.quantile(jnp.full_like(logits, 0.5), logits)
        if rule == "mean":
            return self.mean(logits)
        if rule == "round":
            return (logits > 0).astype(logits.dtype)
        raise ValueError(
            f"unknown test-time rule {rule!r} for {type(self).__name__}; "
            f"it knows {', '.join(self.rules)}"
        )

    def project(self, logits: Logits) -> Logits:
        """Clips the logits to [-limit, limit]."""
        return jnp.clip(logits, -self.limit, self.limit)

    def _unstretched(self, x: float) -> float:
        return (x - self.gamma) / (self.zeta - self.gamma)

    def _survival(self, x: float, logits: Logits) -> Logits:
        """P(z > x) for x below 1, P(z = 1) for 1."""
        s = jnp.asarray(self._unstretched(x), logits.dtype)
        # (1 - s from its own numbers: near 1 there is nothing left of it.)
        rest = jnp.asarray((self.zeta - x) / (self.zeta - self.gamma), logits.dtype)
        on, off = self.pair.cdf(rest), 1 - self.pair.cdf(s)
        pi = jax.nn.sigmoid(logits)
        return (pi * on + (1 - pi) * off).astype(logits.dtype)

    def _shape(self) -> "Mixture":
        """All but the scale, which may be traced."""
        return dataclasses.replace(self, pair=self.pair.at_scale(1.0))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _quantile(shape: Mixture, u: Logits, logits: Logits, scale: Array) -> Logits:
    gate = shape.at_temperature(scale)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        below = _cdf(gate, middle, logits) < u
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    steps = jnp.finfo(logits.dtype).nmant + 1
    ends = jnp.zeros_like(u), jnp.ones_like(u)
    low, high = jax.lax.fori_loop(0, steps, halve, ends)
    z = (low + high) / 2
    z = jnp.where(u <= _cdf(gate, jnp.zeros_like(u), logits), 0.0, z)
    return jnp.where(u >= _cdf(gate, jnp.ones_like(u), logits), 1.0, z)


def _cdf(gate: Mixture, z: Logits, logits: Logits) -> Logits:
    """Q at the point that is stretched to z."""
    width = gate.zeta - gate.gamma
    off = gate.pair.cdf((z - gate.gamma) / width)
    on = 1 - gate.pair.cdf((gate.zeta - z) / width)
    pi = jax.nn.sigmoid(logits)
    return (1 - pi) * off + pi * on


@functools.partial(_quantile.defjvp, symbolic_zeros=True)
def _quantile_jvp(shape: Mixture, primals: Any, tangents: Any) -> tuple[Any, Any]:
    u, logits, scale = primals
    _, of_logits, of_scale = tangents
    z = _quantile(shape, u, logits, scale)
    gate, width = shape.at_temperature(scale), shape.zeta - shape.gamma
    s, rest = (z - shape.gamma) / width, (shape.zeta - z) / width
    pi = jax.nn.sigmoid(logits)
    density = (1 - pi) * gate.pair.density(s) + pi * gate.pair.density(rest)
    moved = jnp.zeros_like(z)
    if not isinstance(of_logits, SymbolicZero):
        # R0 >= R1: more weight on the second distribution makes draws larger.
        apart = gate.pair.cdf(s) + gate.pair.cdf(rest) - 1
        moved = moved + pi * (1 - pi) * apart * of_logits
    if not isinstance(of_scale, SymbolicZero):
        _, change = jax.jvp(
            lambda scale: _cdf(shape.at_temperature(scale), z, logits),
            (scale,),
            (of_scale,),
        )
        moved = moved - change
    inside = (z > 0) & (z < 1)
    return z, jnp.where(inside, width * moved / density, 0.0).astype(z.dtype)


def check_pair(pair: Pair, edge: float) -> None:
    """Whether a pair can be mixed into gates that are counted.

    Args:
        pair: the pair, with a scale that is a number.
        edge: the point below which a gate is 0.

    Raises:
        ValueError: if it can't; the message says what was found, and where.
    """
    name = type(pair).__name__
    s = np.linspace(0.0, 1.0, 257)[1:-1]
    with jax.ensure_compile_time_eval():
        cdf = np.asarray(pair.cdf(jnp.asarray(s)), np.float64)
        ends = np.asarray(pair.cdf(jnp.asarray([-1e3, 1e3])), np.float64)
        density = np.asarray(pair.density(jnp.asarray(s)), np.float64)
        sharp = float(pair.at_scale(1 / 3000).cdf(jnp.asarray(edge)))
    if not np.allclose(ends, [0, 1], atol=1e-5):
        raise ValueError(
            f"{name}.cdf must go from 0 to 1, got {ends[0]:.3g} and {ends[1]:.3g} far "
            "to the left and to the right"
        )
    if not (np.diff(cdf) >= -1e-6).all():
        at = s[int(np.argmin(np.diff(cdf)))]
        raise ValueError(f"{name}.cdf must not fall, but it does near {at:.3g}")
    slope = (cdf[2:] - cdf[:-2]) / (s[2:] - s[:-2])
    between = (s[1:-1] > 0.1) & (s[1:-1] < 0.9)
    error = np.abs(slope - density[1:-1]) / (np.abs(slope) + 1e-2)
    if error[between].max() > 0.05:
        at = int(np.argmax(np.where(between, error, 0)))
        raise ValueError(
            f"{name}.density must be the derivative of its cdf: at {s[1 + at]:.3g} it "
            f"is {density[1 + at]:.3g}, and the cdf rises by {slope[at]:.3g}"
        )
    mirrored = 1 - cdf[::-1]
    if not (cdf >= mirrored - 1e-6).all():
        at = s[int(np.argmin(cdf - mirrored))]
        raise ValueError(
            f"{name} lies to the right of its mirror image at {at:.3g}: more weight on "
            "the second distribution would make gates smaller"
        )
    if not sharp > 0.95:
        raise ValueError(
            f"{name} does not converge to 0: at a scale of 1/3000 a gate that is off "
            f"is 0 with probability {sharp:.3g} only, so that open gates could not "
            "be counted"
        )
