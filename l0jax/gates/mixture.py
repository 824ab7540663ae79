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
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, PRNGKeyArray
from scipy import optimize

from l0jax.gates.clipped import NODES, WEIGHTS, Stretched, uniform_beside
from l0jax.gates.family import Logits
from l0jax.gates.pairs import Pair, Power

L0 = Literal["active", "latent"]


@dataclasses.dataclass(frozen=True)
class Mixture(Stretched):
    r"""Mixture-distributed gates with one trained logit of the mixing weight each.

    Args:
        pair: the distributions, of which `PAIRS` has some.
        l0: what a unit pays, P(z != 0) (`"active"`) or the mixing weight
            (`"latent"`): P(z != 0) is affine in it, so that the two differ by a
            constant and a factor on $\lambda$.
        gamma, zeta, limit: as for all `Stretched` gates.

    Raises:
        TypeError: if the pair is no `Pair`.
        ValueError: if a field is outside its range, or the pair is none of
            distributions: its cdf is no cdf, its density is not the derivative of that,
            its second distribution is not to the right of the first, or it does not
            converge to 0 and 1.
    """

    pair: Pair = dataclasses.field(default_factory=Power)
    l0: L0 = "active"

    rules: ClassVar[tuple[str, ...]] = ("paper", "median", "mean", "round")

    def __post_init__(self):
        super().__post_init__()
        if self.l0 not in get_args(L0):
            known = " or ".join(repr(name) for name in get_args(L0))
            raise ValueError(f"l0 must be {known}, got {self.l0!r}")
        if not isinstance(self.pair, Pair):
            raise TypeError(
                "pair must be a Pair, such as l0jax.gates.make_pair('power'), got "
                f"{self.pair!r}"
            )
        if isinstance(self.pair.scale, float | int):
            check_pair(self.pair, self.gamma / (self.gamma - self.zeta))

    @property
    def temperature(self) -> float | Float[Array, ""]:
        """The scale of the pair."""
        return self.pair.scale

    def at_temperature(self, temperature: float | Float[Array, ""]) -> "Mixture":
        """The same gate with another scale of its pair, which may be traced."""
        return dataclasses.replace(self, pair=self.pair.at_scale(temperature))

    def scale_at_leak(self, leak: float) -> float:
        r"""The scale of the pair at which a gate with $\pi = 0$ is not 0 with
        probability `leak`.

        By this number pairs can be made equally sharp, and annealed to the same end: at
        the default scales closed gates leak in 20 to 74 % of the draws, and what they
        close still takes part in training.

        Args:
            leak: the probability, between 0 and 1.

        Raises:
            ValueError: if there is no such scale.
        """
        edge = np.float32(self.gamma / (self.gamma - self.zeta))

        def leak_at(log_scale):
            with jax.ensure_compile_time_eval():
                below = self.pair.at_scale(math.exp(log_scale)).cdf(jnp.asarray(edge))
            return 1 - float(below)

        low, high = math.log(1e-5), math.log(1e3)
        if not leak_at(low) < leak < leak_at(high):
            raise ValueError(
                f"gates of {type(self.pair).__name__} leak with a probability between "
                f"{leak_at(low):.3g} and {leak_at(high):.3g}, got leak={leak}"
            )
        found = optimize.root_scalar(
            lambda log_scale: leak_at(log_scale) - leak, bracket=(low, high), xtol=1e-4
        )
        return math.exp(found.root)

    def sample(self, key: PRNGKeyArray, logits: Logits) -> Logits:
        """One draw per gate, with the pathwise gradients of the implicit function."""
        return self.quantile(*uniform_beside(key, logits))

    def quantile(self, u: Logits, logits: Logits) -> Logits:
        r"""The gate below which z lies with probability u, by bisection unless the pair
        has a closed form.

        Its derivatives in the logits and in the pair's scale are those of the implicit
        function $Q(s) = u$, and none is given in u.
        """
        scale = jnp.asarray(self.pair.scale, logits.dtype)
        # (Its scale may be traced; what is left of the pair may not.)
        pair = self.pair.at_scale(1.0)
        return _compiled(pair, self.gamma, self.zeta, u, logits, scale)

    def survival(self, x: float, logits: Logits) -> Logits:
        r"""$P(z > x) = 1 - Q(\frac{x - \gamma}{\zeta - \gamma})$, affine in $\pi$."""
        z = jnp.asarray(x, logits.dtype)
        return _survival(self.pair, self.gamma, self.zeta, z, logits)

    def mixing_weight(self, logits: Logits) -> Logits:
        r"""$\pi$."""
        return jax.nn.sigmoid(logits)

    def l0_term(self, logits: Logits) -> Logits:
        """P(z != 0), or the mixing weight."""
        if self.l0 == "latent":
            return self.mixing_weight(logits)
        return self.prob_active(logits)

    def slope_moments(self, logits: Logits) -> tuple[Logits, Logits]:
        r"""$E[\partial z / \partial \eta]$ and $E[(\partial z / \partial \eta)^2]$: the
        signal and the noise of what trains a gate.

        Between the modes the slope is $\pi (1 - \pi) (\zeta - \gamma) / q(s)$ at most,
        with the density q that sharp modes leave there: exponential tails let it grow
        as $e^{\kappa / 2}$, Gaussian ones as $e^{1 / 8 \sigma^2}$, polynomial ones
        (power, Kumaraswamy) slowly. Compare pairs before making one sharp.
        """
        width = self.zeta - self.gamma
        # Over pieces, since the modes may be narrow.
        starts = np.linspace(0, 1, 17)[:-1]
        nodes = np.add.outer(starts, np.asarray(NODES) / 16).ravel()
        weights = jnp.asarray(np.tile(WEIGHTS, 16) / 16, logits.dtype)
        z = jnp.asarray(nodes, logits.dtype).reshape(*(1,) * logits.ndim, -1)
        moved, density = _slope(self.pair, self.gamma, self.zeta, z, logits[..., None])
        # (dz = width ds)
        return moved @ weights, width * (moved**2 / density) @ weights

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
        raise self.unknown_rule(rule)


def _survival(pair: Pair, gamma: float, zeta: float, z: Array, logits: Logits) -> Array:
    """The probability of more than z, which broadcasts with the logits: 1 - Q at the
    point that is stretched to it."""
    width = zeta - gamma
    # (1 - s from its own numbers: near 1 there is nothing left of it.)
    on, off = pair.cdf((zeta - z) / width), 1 - pair.cdf((z - gamma) / width)
    pi = jax.nn.sigmoid(logits)
    return (pi * on + (1 - pi) * off).astype(logits.dtype)


def _slope(
    pair: Pair, gamma: float, zeta: float, z: Array, logits: Logits
) -> tuple[Array, Array]:
    """-dQ/d eta, and the density of Q, at the point that is stretched to z, which
    broadcasts with the logits."""
    width = zeta - gamma
    s, rest = (z - gamma) / width, (zeta - z) / width
    pi = jax.nn.sigmoid(logits)
    # R0 >= R1: more weight on the second distribution makes draws larger.
    moved = pi * (1 - pi) * (pair.cdf(s) + pair.cdf(rest) - 1)
    return moved, (1 - pi) * pair.density(s) + pi * pair.density(rest)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def quantile(
    pair: Pair, gamma: float, zeta: float, u: Logits, logits: Logits, scale: Array
) -> Logits:
    """The number in [0, 1] below which a mixture lies with probability u once it is
    stretched to (gamma, zeta)."""
    closed = pair.at_scale(scale).mixed_quantile(u, logits)
    if closed is not None:
        return jnp.clip(closed * (zeta - gamma) + gamma, 0.0, 1.0)
    survival = functools.partial(_survival, pair.at_scale(scale), gamma, zeta)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        below = survival(middle, logits) > 1 - u
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    steps = jnp.finfo(logits.dtype).nmant + 1
    ends = jnp.zeros_like(u), jnp.ones_like(u)
    low, high = jax.lax.fori_loop(0, steps, halve, ends)
    z = jnp.where(survival(ends[0], logits) <= 1 - u, 0.0, (low + high) / 2)
    return jnp.where(survival(ends[1], logits) >= 1 - u, 1.0, z)


# Outside of any other program too, where tracing the loop takes longer than the loop.
_compiled = jax.jit(quantile, static_argnums=(0, 1, 2))


@functools.partial(quantile.defjvp, symbolic_zeros=True)
def _quantile_jvp(
    pair: Pair, gamma: float, zeta: float, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    u, logits, scale = primals
    _, of_logits, of_scale = tangents
    z = quantile(pair, gamma, zeta, u, logits, scale)
    slope, density = _slope(pair.at_scale(scale), gamma, zeta, z, logits)
    moved = jnp.zeros_like(z)
    if not isinstance(of_logits, SymbolicZero):
        moved = moved + slope * of_logits
    if not isinstance(of_scale, SymbolicZero):
        _, change = jax.jvp(
            lambda scale: _survival(pair.at_scale(scale), gamma, zeta, z, logits),
            (scale,),
            (of_scale,),
        )
        moved = moved + change
    inside = (z > 0) & (z < 1)
    change = (zeta - gamma) * moved / density
    return z, jnp.where(inside, change, 0.0).astype(z.dtype)


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
        ends = np.asarray(pair.cdf(jnp.asarray([-1e6, 1e6])), np.float64)
        density = np.asarray(pair.density(jnp.asarray(s)), np.float64)
        sharp = float(pair.at_scale(1 / 3000).cdf(jnp.asarray(edge)))
        u, logits = jnp.linspace(0.05, 0.95, 19), jnp.full(19, 0.7)
        drawn, below = pair.mixed_quantile(u, logits), u
        if drawn is not None:
            off, on = pair.cdf(drawn), 1 - pair.cdf(1 - drawn)
            below = jax.nn.sigmoid(-logits) * off + jax.nn.sigmoid(logits) * on
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
    if not np.allclose(below, u, atol=1e-3):
        at = int(np.argmax(np.abs(np.asarray(below) - np.asarray(u))))
        raise ValueError(
            f"{name}.mixed_quantile must invert the mixture's cdf: below what it gives "
            f"for {float(u[at]):.3g} lies {float(below[at]):.3g}"
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
