"""Mixture-distributed gates: their closed forms, the equality of ways to draw them,
and what is no pair. (The laws that every gate keeps are in `test_gates`.)"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from l0jax import gates
from l0jax.gates import PAIRS, Mixture, Pair, RelaxedMixture, mixture, pairs

T = 1 / 12  # the point that is stretched to 0 at the defaults
SCALES = (0.08, 0.2, 0.6)
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=list(PAIRS))
at_each_scale = pytest.mark.parametrize("scale", SCALES)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


in_float64 = pytest.mark.usefixtures("float64")


# What SciPy knows of each pair, at a scale.
TRUTH = {
    "exponential": lambda c: stats.truncexpon(b=1 / c, scale=c),
    "power": lambda c: stats.beta(c / (1 + c), 1),
    "beta": lambda c: stats.beta(c, 4),
    "half_normal": lambda c: stats.truncnorm(0, 1 / c, scale=c),
    "gaussian": lambda c: stats.norm(scale=c),
    "logistic": lambda c: stats.logistic(scale=c),
    "laplace": lambda c: stats.laplace(scale=c),
}


@pytest.mark.sweep
@at_each_scale
@pytest.mark.parametrize("name", TRUTH)
@in_float64
def test_pairs_are_the_distributions_that_they_are_called(name, scale):
    pair, truth = gates.make_pair(name, scale=scale), TRUTH[name](scale)
    s = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(pair.cdf(jnp.asarray(s)), truth.cdf(s), rtol=1e-9)
    np.testing.assert_allclose(pair.density(jnp.asarray(s)), truth.pdf(s), rtol=1e-7)


@pytest.mark.sweep
@at_each_scale
@every_pair
@in_float64
def test_densities_integrate_to_the_cdf(pair, scale):
    """For those that SciPy does not have too."""
    now = pair(scale=scale)
    for low, high in ((0.02, 0.3), (0.3, 0.95)):
        found, _ = integrate.quad(lambda s: float(now.density(s)), low, high)
        steps = now.cdf(jnp.asarray([low, high]))
        assert found == pytest.approx(float(steps[1] - steps[0]), abs=1e-7)


# P(z != 0) of the first and of the second distribution (methods: 4e6 draws).
EDGES: dict[str, tuple[Pair, float, float | None]] = {
    "exponential, 5": (pairs.Exponential(1 / 5), 0.6569, 0.9965),
    "exponential, 8": (pairs.Exponential(1 / 8), 0.5133, 0.9997),
    "exponential, 12": (pairs.Exponential(1 / 12), 0.3679, 1.0),
    "power, 0.2": (pairs.Power(1 / 4), 0.3916, 0.9827),
    "power, 0.1": (pairs.Power(1 / 9), 0.2200, 0.9913),
    "gaussian, 0.1": (pairs.Gaussian(0.1), 0.2023, None),
    "gaussian, 0.2": (pairs.Gaussian(0.2), 0.3385, None),
    "logistic, 0.05": (pairs.Logistic(0.05), 0.1589, None),
    "logistic, 0.1": (pairs.Logistic(0.1), 0.3029, None),
    "laplace, 0.05": (pairs.Laplace(0.05), 0.0944, None),
    "laplace, 0.1": (pairs.Laplace(0.1), 0.2173, None),
    "half normal, 0.1": (pairs.HalfNormal(0.1), 0.4047, None),
    "half normal, 0.2": (pairs.HalfNormal(0.2), 0.6769, None),
    "kumaraswamy, 0.5, 4": (pairs.Kumaraswamy(0.5, 4.0), 0.2560, None),
    "kumaraswamy, 1, 8": (pairs.Kumaraswamy(1.0, 8.0), 0.4985, None),
    "beta, 0.5, 4": (pairs.Beta(0.5, 4), 0.4186, None),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", EDGES)
def test_open_probabilities_of_both_distributions(name):
    """P(z != 0) = b + (a - b) pi, of which b and a are these."""
    pair, off, on = EDGES[name]
    gate = Mixture(pair)
    ends = gate.prob_active(jnp.float32([-30.0, 30.0]))
    assert ends[0] == pytest.approx(off, abs=6e-5)
    if on is not None:
        assert ends[1] == pytest.approx(on, abs=6e-5)
    half = gate.prob_active(jnp.float32(0.0))
    assert half == pytest.approx(float(ends.mean()), abs=1e-6)


# z of noise 0.1, 0.5, 0.69, 0.71, 0.9 at pi = 0.3, before the stretch.
VECTORS = {
    "exponential": (1 / 8, (0.019258, 0.156334, 0.481477, 0.622718, 0.949411)),
    "logistic": (0.1, (-0.179179, 0.091605, 0.415020, 0.671686, 1.069339)),
    "laplace": (0.1, (-0.125278, 0.055956, 0.353232, 0.731498, 1.040557)),
}


def explicit(name, u, pi, scale):
    """The inverse cdf in closed form (for the exponential: DVAE++)."""
    if name == "exponential":
        e = math.exp(-1 / scale)
        b = (u + e * (pi - u)) / (1 - pi) - 1
        c = -pi * e / (1 - pi)
        return -scale * np.log((-b + np.sqrt(b**2 - 4 * c)) / 2)
    k = math.exp(-1 / scale)
    if name == "logistic":
        b = (1 - pi) + pi * k - u * (1 + k)
        root = np.sqrt(b**2 + 4 * k * u * (1 - u))
        return scale * np.log((-b + root) / (2 * k * (1 - u)))
    d = 1 - pi - u
    between = -scale * np.log((d + np.sqrt(d**2 + (1 - pi) * pi * k)) / (1 - pi))
    low, high = (1 - pi) + pi * k, pi + (1 - pi) * k
    left = scale * np.log(2 * u / low)
    right = 1 - scale * np.log(2 * (1 - u) / high)
    return np.where(u < low / 2, left, np.where(u > 1 - high / 2, right, between))


@pytest.mark.parametrize("name", VECTORS)
@in_float64
def test_draws_are_the_inverse_cdf_in_closed_form(name):
    scale, expected = VECTORS[name]
    u = np.asarray([0.1, 0.5, 0.69, 0.71, 0.9])
    np.testing.assert_allclose(explicit(name, u, 0.3, scale), expected, atol=1e-6)
    u = np.linspace(0.001, 0.999, 500)
    for pi in (0.05, 0.3, 0.5, 0.9):
        s = explicit(name, u, pi, scale)
        logits = jnp.full(u.shape, math.log(pi / (1 - pi)))
        z = Mixture(gates.make_pair(name, scale=scale)).quantile(jnp.asarray(u), logits)
        np.testing.assert_allclose(z, np.clip(1.2 * s - 0.1, 0, 1), atol=1e-9)


CLOSED = [
    name
    for name, pair in gates.PAIRS.items()
    if pair.mixed_quantile is not gates.Pair.mixed_quantile
]


def test_the_pairs_with_a_closed_form():
    assert {*CLOSED} == {*VECTORS}


@pytest.mark.parametrize("scale", [1e-4, 0.003, 0.01, 0.1, 1.0, 1.1, 10.0, 1e3])
@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_are_exact_in_single_precision(name, scale):
    """Q(s) is the u that s was drawn with, wherever a gate is neither 0 nor 1; sharp
    pairs underflow, and have their modes alone."""
    gate = Mixture(gates.make_pair(name, scale=scale))
    cells = (np.arange(0, 65536, 11, dtype=np.float32) + 0.5) / 65536

    def below(z):
        with jax.enable_x64(True):
            pair, s = gates.make_pair(name, scale=scale), jnp.asarray((z + 0.1) / 1.2)
            off, on = np.asarray(pair.cdf(s)), 1 - np.asarray(pair.cdf(1 - s))
        pi = 1 / (1 + math.exp(-eta))
        return (1 - pi) * off + pi * on

    for eta in (-15.0, -4.0, -0.3, 0.0, 1.0, 4.6, 15.0):
        logits = jnp.full(len(cells), eta, jnp.float32)
        z = np.asarray(gate.quantile(jnp.asarray(cells), logits), np.float64)
        assert np.isfinite(z).all()
        assert (np.diff(z) >= -1e-6).all()
        q, (low, high) = below(z), below(np.array([0.0, 1.0]))
        inside = (z > 0) & (z < 1)
        np.testing.assert_allclose(q[inside], cells[inside], atol=1e-6)
        assert (cells[z == 0] <= low + 1e-6).all()
        assert (cells[z == 1] >= high - 1e-6).all()


def test_a_pair_made_of_another_one_is_not_drawn_by_its_closed_form():
    """A user's, who knows of the cdf and the density alone."""

    @dataclasses.dataclass(frozen=True)
    class Narrower(gates.PAIRS["logistic"]):
        def cdf(self, s):
            return super().cdf(2 * s)

        def density(self, s):
            return 2 * super().density(2 * s)

    u, logits = jnp.linspace(0.01, 0.99, 99), jnp.zeros(99)
    found = Mixture(Narrower(0.2)).quantile(u, logits)
    expected = Mixture(gates.make_pair("logistic", scale=0.1)).quantile(u, logits)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert Narrower.mixed_quantile is gates.Pair.mixed_quantile


def test_what_is_mixed_in_before_a_pair_is_not_drawn_by_the_pairs_closed_form():
    class Half:
        def cdf(self, s):
            return super().cdf(2 * s)

        def density(self, s):
            return 2 * super().density(2 * s)

    class Narrower(Half, gates.PAIRS["laplace"]):
        pass

    class Renamed(gates.PAIRS["laplace"]):
        pass

    assert Narrower.mixed_quantile is gates.Pair.mixed_quantile
    assert Renamed.mixed_quantile is gates.PAIRS["laplace"].mixed_quantile


def test_a_closed_form_of_another_distribution_is_refused():
    class Wrong(gates.PAIRS["logistic"]):
        def mixed_quantile(self, u, logits):
            return super().mixed_quantile(u, logits) + 0.05

    with pytest.raises(ValueError, match=r"Wrong\.mixed_quantile must invert"):
        Mixture(Wrong())


@pytest.mark.parametrize("scale", [0.012, 0.02, 0.05])
@pytest.mark.parametrize("name", CLOSED)
def test_slopes_stay_bounded_where_noise_and_weight_are_equal(name, scale):
    """1 - pi is a cell of the noise: such a draw lies exactly between the modes."""
    gate = Mixture(gates.make_pair(name, scale=scale))
    u = jnp.float32((37550 + 0.5) / 65536)
    near = math.log(1 / float(u) - 1) + 3e-8 * np.arange(-8, 9)
    logits = jnp.asarray(near, jnp.float32)
    z, slope = jax.jvp(
        lambda eta: gate.quantile(jnp.full(17, u), eta), (logits,), (jnp.ones(17),)
    )
    assert np.isfinite(z).all()
    # (Of the middle itself they are 1e8 and more.)
    assert np.abs(slope).max() < 2e5


@pytest.mark.parametrize("name", VECTORS)
@in_float64
def test_implicit_gradients_are_those_of_the_closed_form(name):
    """In the logit and in the scale: one Newton step of the implicit function."""
    scale, _ = VECTORS[name]
    u, logits = map(np.ravel, np.meshgrid(*[np.linspace(0.02, 0.98, 40)] * 2))
    logits = 6 * logits - 3

    def closed(eta, scale):
        return 1.2 * explicit(name, u, 1 / (1 + np.exp(-eta)), scale) - 0.1

    def implicit(eta, scale):
        gate = Mixture(gates.make_pair(name)).at_temperature(scale)
        return gate.quantile(jnp.asarray(u), eta)

    z = closed(logits, scale)
    inside = (z > 0.01) & (z < 0.99)
    assert inside.sum() > 200
    at = jnp.asarray(logits), jnp.asarray(scale)
    step = 1e-5
    _, of_logit = jax.jvp(
        lambda eta: implicit(eta, at[1]), at[:1], (jnp.ones_like(at[0]),)
    )
    secant = closed(logits + step, scale) - closed(logits - step, scale)
    np.testing.assert_allclose(of_logit[inside], secant[inside] / 2 / step, rtol=1e-5)
    _, of_scale = jax.jvp(lambda scale: implicit(at[0], scale), at[1:], (jnp.ones(()),))
    secant = closed(logits, scale + step) - closed(logits, scale - step)
    np.testing.assert_allclose(
        of_scale[inside], secant[inside] / 2 / step, rtol=1e-5, atol=1e-7
    )


@pytest.mark.sweep
@every_pair
@in_float64
def test_gradients_of_draws_have_the_mean_that_they_should(pair):
    """E[dz/d eta] = (1 - 2 m0) pi (1 - pi), with m0 the mean of a gate that is off."""
    gate = Mixture(pair())
    for eta in (-1.5, 0.4):
        logit, pi = jnp.float64(eta), 1 / (1 + math.exp(-eta))
        m0 = float(gate.mean(jnp.float64(-40.0)))
        # All noise, cell by cell, rather than draws.
        u = (jnp.arange(400_000.0) + 0.5) / 400_000
        logits = jnp.full(u.shape, logit)
        _, slope = jax.jvp(
            lambda eta, u=u: gate.quantile(u, eta), (logits,), (jnp.ones_like(u),)
        )
        expected = (1 - 2 * m0) * pi * (1 - pi)
        assert float(slope.mean()) == pytest.approx(expected, rel=2e-2)


@every_pair
@in_float64
def test_sharp_pairs_are_binary_gates(pair):
    """P(z != 0) and P(z = 1) go to pi as the scale goes to 0."""
    logits = jnp.asarray([-2.0, 0.0, 1.5])
    pi = jax.nn.sigmoid(logits)
    fixed = {"share": 1e-3} if pair is pairs.ExponentialUniform else {}
    gate = Mixture(pair(scale=1e-3, **fixed))
    for found in (gate.prob_active(logits), gate.prob_one(logits), gate.mean(logits)):
        np.testing.assert_allclose(found, pi, atol=6e-3)
    np.testing.assert_array_equal(gate.deterministic(logits, "round"), [0.0, 0.0, 1.0])
    np.testing.assert_allclose(gate.mixing_weight(logits), pi)


# E[(dz / d eta)^2] at pi = 1/2, with scales at which an off gate is open with
# probability 0.4, and 0.2.
MOMENTS = {
    "power": (0.085, 0.26),
    "kumaraswamy": (0.124, 0.34),
    "laplace": (0.085, 1.1),
    "logistic": (0.098, 4.2),
    "exponential": (0.54, 11.8),
    "gaussian": (0.10, 5e2),
}


@pytest.mark.sweep
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("name", MOMENTS)
@in_float64
def test_sharp_pairs_have_slopes_of_these_moments(name, at):
    def open_when_off(scale):
        return float(1 - gates.make_pair(name, scale=scale).cdf(jnp.float64(T)))

    wanted = (0.4, 0.2)[at]
    scale = optimize.brentq(lambda c: open_when_off(c) - wanted, 0.02, 2.0)
    gate = Mixture(gates.make_pair(name, scale=scale))
    both = jnp.stack(gate.slope_moments(jnp.zeros((2, 3))))
    assert both.shape == (2, 2, 3)
    first, second = both[:, 1, 2]
    assert float(second) == pytest.approx(MOMENTS[name][at], rel=0.06)
    assert float(first) == pytest.approx(float(jax.grad(gate.mean)(0.0)), rel=1e-6)


@every_pair
@in_float64
def test_what_a_unit_pays_is_its_probability_or_its_mixing_weight(pair):
    """The two differ by a constant and a factor."""
    logits = jnp.asarray([-3.0, -1.0, 0.5, 2.0])
    pi = jax.nn.sigmoid(logits)
    active, latent = Mixture(pair()), Mixture(pair(), l0="latent")
    np.testing.assert_array_equal(latent.l0_term(logits), pi)
    np.testing.assert_array_equal(active.l0_term(logits), active.prob_active(logits))
    off, on = active.prob_active(jnp.asarray([-50.0, 50.0]))
    np.testing.assert_allclose(active.l0_term(logits), off + (on - off) * pi)


def frequencies(gate, logits, draws=200_000):
    """Of z != 0 and of z = 1, with the errors of five standard deviations."""
    z = gate.sample(jax.random.key(0), jnp.full(draws, logits))
    hits = np.asarray([(z != 0).mean(), (z == 1).mean()], np.float64)
    return hits, 5 * np.sqrt(hits * (1 - hits) / draws) + 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pairs.Power, pairs.Exponential, pairs.Logistic])
def test_a_relaxed_indicator_biases_what_is_counted(pair):
    """It moves gates away from both ends, and less the colder it is."""
    logit, gaps = jnp.float32(-1.0), []
    for beta in (2 / 3, 0.3, 0.003):
        gate = RelaxedMixture(pair(), beta=beta)
        hits, error = frequencies(gate, logit)
        stated = np.asarray([gate.prob_active(logit), gate.prob_one(logit)])
        gaps.append(stated - hits)
        far = np.abs(gaps[-1]) > error
        assert far.all() if beta > 0.1 else not far.any(), gaps[-1] / error
    assert (np.abs(gaps[1]) < np.abs(gaps[0])).all()
    assert gaps[0][0] < 0 < gaps[0][1]


@pytest.mark.sweep
@every_pair
def test_pairs_can_be_made_equally_sharp(pair):
    gate = Mixture(pair=pair())
    for leak in (0.047, 0.2):
        sharp = gate.at_temperature(gate.scale_at_leak(leak))
        closed = sharp.prob_active(jnp.float32([-30.0]))
        assert float(closed[0]) == pytest.approx(leak, rel=2e-3)


@pytest.mark.parametrize("leak", [-0.1, 0.0, 0.97, 1.0, math.nan])
def test_no_scale_leaks_so_much(leak):
    with pytest.raises(ValueError, match=r"Gaussian leak .* and 0\.5, got leak="):
        Mixture(pair=gates.make_pair("gaussian")).scale_at_leak(leak)


def test_the_rule_of_the_paper_closes_at_a_twelfth():
    edge, gate = math.log(T / (1 - T)), Mixture()
    below, above = gate.deterministic(jnp.float32([edge - 1e-3, edge + 1e-3]), "paper")
    assert below == 0 < above


def test_logits_are_clipped_as_those_of_hard_concrete_gates():
    ends = Mixture().project(jnp.float32([-100.0, 100.0, 1.25]))
    np.testing.assert_allclose(ends, [math.log(0.01), math.log(100), 1.25], rtol=1e-6)


def test_a_pair_is_checked_once_and_not_with_every_draw(monkeypatch):
    checked = []
    monkeypatch.setattr(mixture, "check_pair", lambda *given: checked.append(given))
    gate = Mixture(pairs.Laplace())
    assert len(checked) == 1
    slope = jax.grad(lambda eta: gate.sample(jax.random.key(0), eta).sum())
    slope(jnp.zeros(3))
    gate.deterministic(jnp.zeros(3), "median")
    assert len(checked) == 1


def test_a_pair_without_a_density_can_not_be_made():
    class Half(Pair):
        def cdf(self, s):
            return s

    with pytest.raises(TypeError, match=r"Half.*density"):
        Half()


def test_a_new_pair_is_a_cdf_and_a_density():
    @dataclasses.dataclass(frozen=True)
    class Rational(Pair):
        """R0(s) = s / (s + scale (1 - s)) on [0, 1]."""

        def cdf(self, s):
            s = jnp.clip(s, 0, 1)
            return s / (s + self.scale * (1 - s))

        def density(self, s):
            return self.scale / (s + self.scale * (1 - s)) ** 2

    gate, logits = Mixture(Rational(0.05)), jnp.full(200_000, 0.7)
    z = np.asarray(gate.sample(jax.random.key(0), logits), np.float64)
    for stated, hits in ((gate.prob_active, z != 0), (gate.prob_one, z == 1)):
        assert hits.mean() == pytest.approx(float(stated(logits[0])), abs=5e-3)
    assert z.mean() == pytest.approx(float(gate.mean(logits[0])), abs=5e-3)
    slope = jax.grad(lambda eta: gate.sample(jax.random.key(0), eta).mean())(logits)
    exact = jax.grad(gate.mean)(jnp.float32(0.7))
    assert float(slope.sum()) == pytest.approx(float(exact), rel=0.02)


# ---------------------------------------------------------------------- bad input


def pair_with(cdf, density=None) -> Any:
    """A pair of functions of s and the scale."""

    class Bad(Pair):
        def cdf(self, s):
            return cdf(s, self.scale)

        def density(self, s):
            slope = density or jax.vmap(jax.grad(cdf), (0, None))
            return slope(s, self.scale)

    return Bad()


def inside(s):
    return jnp.clip(s, 0, 1)


NO_PAIRS = {
    "does not end at 1": (
        pair_with(lambda s, c: 0.5 * inside(s)),
        r"cdf must go from 0 to 1, got 0 and 0\.5",
    ),
    "falls": (
        pair_with(lambda s, c: inside(s) + 0.3 * jnp.sin(8 * jnp.pi * inside(s))),
        "cdf must not fall, but it does near",
    ),
    "has another density": (
        pair_with(lambda s, c: inside(s) ** c, lambda s, c: jnp.ones_like(s)),
        "density must be the derivative of its cdf",
    ),
    "is to the right": (
        pair_with(lambda s, c: inside(s) ** 3),
        "lies to the right of its mirror image",
    ),
    "does not become sharp": (
        pair_with(lambda s, c: inside(s) ** 0.5),
        "does not converge to 0: at a scale of 1/3000",
    ),
}


def test_heavy_tails_and_other_settings_are_a_users_to_choose():
    """Cauchy's distribution, around a point left of 0."""

    @dataclasses.dataclass(frozen=True)
    class Cauchy(Pair):
        scale: Any = 0.02
        shift: float = -0.05

        def cdf(self, s):
            return 0.5 + jnp.arctan((s - self.shift) / self.scale) / jnp.pi

        def density(self, s):
            t = (s - self.shift) / self.scale
            return 1 / (jnp.pi * self.scale * (1 + t**2))

    p = Mixture(Cauchy()).prob_active(jnp.float32([30.0]))
    np.testing.assert_allclose(p, stats.cauchy.cdf((1 - T + 0.05) / 0.02), rtol=1e-4)


def test_a_pair_is_given_and_not_its_name(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    wrong: Any = "power"
    with pytest.raises(TypeError, match=r"make_pair\('power'\), got 'power'"):
        Mixture(wrong)


@pytest.mark.sweep
@pytest.mark.parametrize("what", NO_PAIRS)
def test_what_is_no_pair_is_refused(what):
    pair, message = NO_PAIRS[what]
    with pytest.raises(ValueError, match=f"Bad.*{message}"):
        Mixture(pair)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture(gamma=0.0), "gamma must be < 0.*got 0.0"),
        (lambda: Mixture(zeta=1.0), "zeta must be > 1.*got 1.0"),
        (lambda: Mixture(limit=0.0), "limit must be > 0, got 0.0"),
        (lambda: RelaxedMixture(beta=0.0), "beta must be > 0, got 0.0"),
        (lambda: pairs.Power(0.0), "scale must be > 0, got 0.0"),
        (lambda: pairs.Laplace(math.nan), "scale must be > 0, got nan"),
        (lambda: pairs.ExponentialUniform(share=1.0), "share must be < 1, got 1.0"),
        (lambda: pairs.Beta(q=0), "q must be > 0, got 0"),
        (lambda: gates.make_pair("cauchy"), "unknown pair 'cauchy'; there is beta"),
    ],
)
def test_fields_outside_their_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_a_unit_pays_has_two_readings(monkeypatch):
    # (While tests run, the annotation would be the first to refuse.)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    wrong: Any = "probability"
    with pytest.raises(ValueError, match="'active' or 'latent', got 'probability'"):
        Mixture(l0=wrong)
