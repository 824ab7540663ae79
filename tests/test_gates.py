"""Law 1: what a gate family says of its distribution is what its draws do.

Swept over `GATES`, so that a new family needs no test of its own; below the sweep stand
the published closed forms of the hard concrete gate.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from retraces import traced_once
from scipy import integrate, special, stats

from l0jax import gates
from l0jax.gates import (
    GATES,
    PAIRS,
    Bernoulli,
    ContinuousSparsification,
    DGating,
    HardConcrete,
    HardKumaraswamy,
    HardSigmoid,
    InformationBottleneck,
    Mixture,
    Pair,
    SmoothStep,
    Stochastic,
    VariationalDropout,
    noise,
)
from l0jax.gates.gate import Gate

# Nowhere symmetric about 0: a flipped sign would hide there.
LOGITS = (-4.6, -2.3, -1.1, -0.3, 0.7, 1.9, 3.3)
TEMPERATURES = (0.2, 0.5, 1.4)
DRAWS = 200_000
CURVES = ("prob_active", "prob_one", "mean", "l0_term")


@dataclasses.dataclass(frozen=True)
class Student(Pair):
    """A pair as a user states it, by cdf and density: Student's t with two degrees of
    freedom, whose tails are heavy."""

    def cdf(self, s):
        t = s / self.scale
        return 0.5 + t / (2 * jnp.sqrt(2 + t**2))

    def density(self, s):
        return (2 + (s / self.scale) ** 2) ** -1.5 / self.scale


def variants():
    """Each family at its defaults, mixtures of each pair and of one that is a user's,
    and those that are counted by their mixing weight."""
    for name, family in GATES.items():
        yield name, family()
    yield "mixture-latent", Mixture(l0="latent")
    for name, pair in {**PAIRS, "student": Student}.items():
        if (gate := Mixture(pair())) != Mixture():
            yield f"mixture-{name}", gate


def instances():
    """Each variant at its defaults and at other temperatures; one of each family with
    each float moved."""
    for name, gate in variants():
        yield pytest.param(gate, id=name)
        for temperature in TEMPERATURES:
            if name in GATES or temperature == TEMPERATURES[1]:
                yield pytest.param(
                    gate.at_temperature(jnp.float32(temperature)),
                    id=f"{name}-temperature={temperature}",
                )
        for field in dataclasses.fields(gate):
            value = getattr(gate, field.name)
            if isinstance(value, float) and name in GATES:
                yield pytest.param(
                    dataclasses.replace(gate, **{field.name: moved(value)}),
                    id=f"{name}-{field.name}={moved(value):.3g}",
                )


def moved(value):
    """Another value of a field, on the same side of 0."""
    return 1.3 * value or 0.3


sweep = pytest.mark.parametrize("gate", list(instances()))
families = pytest.mark.parametrize("family", GATES.values(), ids=list(GATES))
curves = pytest.mark.parametrize("curve", CURVES)


def in_float64(gate):
    """The gate with its traced temperature, if it has one, in double precision."""
    wide = {}
    for field in dataclasses.fields(gate):
        value = getattr(gate, field.name)
        if isinstance(value, jax.Array):
            wide[field.name] = value.astype(jnp.float64)
        elif dataclasses.is_dataclass(value):
            wide[field.name] = in_float64(value)
    return dataclasses.replace(gate, **wide)


def curves_of(gate):
    """Everything of a family that is a function of the logit alone, by name."""
    curves = {name: getattr(gate, name) for name in CURVES}
    for rule in gate.rules:
        curves[f"rule {rule}"] = functools.partial(gate.deterministic, rule=rule)
    return curves


def draw(gate, seed, logits, draws):
    keys = jax.random.split(jax.random.key(seed), draws)
    return np.asarray(jax.jit(jax.vmap(lambda key: gate.sample(key, logits)))(keys))


@sweep
def test_the_family_keeps_the_contract(gate):
    assert isinstance(gate, Gate)
    assert len(set(gate.rules)) == len(gate.rules)
    assert "paper" in gate.rules


def test_what_families_lack_is_what_they_say():
    """The laws below ask a family for these."""

    def those_without(name):
        return {each for each, family in GATES.items() if not getattr(family, name)}

    around_one = {"variational_dropout", "information_bottleneck"}
    assert those_without("random") == {
        "continuous_sparsification",
        "d_gating",
        "hard_sigmoid",
        "smooth_step",
    }
    assert those_without("bounded") == {*around_one, "d_gating"}
    assert those_without("zeros") == {
        *around_one,
        "continuous_sparsification",
        "d_gating",
    }
    assert those_without("pathwise") == {"bernoulli", "hard_sigmoid"}
    assert those_without("exact") == {"relaxed_mixture"}


@pytest.mark.sweep
@sweep
def test_probabilities_and_mean_are_those_of_the_draws(gate):
    logits = jnp.float32(LOGITS)
    z = draw(gate, 1, logits, DRAWS).astype(np.float64)
    assert (z.min() >= 0 and z.max() <= 1) == gate.bounded
    if not gate.exact:  # (How far off: `test_mixture`.)
        return
    for stated, hits in (
        (gate.prob_active(logits), z != 0),
        (gate.prob_one(logits), z == 1),
    ):
        p = np.asarray(stated, np.float64)
        # (What is less likely than once in all draws has no spread to be seen in.)
        # (And noise around 1 that is very small is rounded to none.)
        unseen = 1e-7 if gate.bounded else 1e-3
        error = 5 * np.sqrt(p * (1 - p) / DRAWS) + unseen
        np.testing.assert_array_less(np.abs(hits.mean(0) - p), error)
    # (The same of means: gates that were closed in all draws.)
    error = 5 * (z.std(0) / math.sqrt(DRAWS) + 1 / DRAWS)
    np.testing.assert_array_less(np.abs(z.mean(0) - gate.mean(logits)), error)


@pytest.mark.sweep
@sweep
def test_draws_of_one_call_are_independent(gate):
    logits = jnp.full(2000, 0.3)
    z = np.asarray(gate.sample(jax.random.key(2), logits), np.float64)
    if not gate.random:
        assert len(np.unique(z)) == 1
        np.testing.assert_array_equal(z, gate.sample(jax.random.key(3), logits))
        return
    # Neighbours, and halves: two gates may share the bits of one random word.
    for apart in (1, 2, len(z) // 2):
        pair = np.corrcoef(z[:-apart], z[apart:])[0, 1]
        assert abs(pair) < 5 / math.sqrt(len(z) - apart)
    assert not np.array_equal(z, gate.sample(jax.random.key(3), logits))
    np.testing.assert_array_equal(z, gate.sample(jax.random.key(2), logits))


@pytest.mark.sweep
@curves
@sweep
def test_curves_have_the_derivative_of_finite_differences(gate, curve):
    with jax.enable_x64(True):
        of = getattr(in_float64(gate), curve)
        logits, step = jnp.float64(LOGITS), 1e-5
        secant = (of(logits + step) - of(logits - step)) / (2 * step)
        slope = jax.vmap(jax.grad(of))(logits)
        np.testing.assert_allclose(slope, secant, rtol=1e-6, atol=1e-9)


@pytest.mark.sweep
@sweep
def test_draws_have_the_derivative_of_finite_differences(gate):
    with jax.enable_x64(True):
        gate, step = in_float64(gate), 1e-6
        logits = jnp.tile(jnp.float64(LOGITS), 300)
        of = functools.partial(gate.sample, jax.random.key(4))
        slope = jax.jvp(of, (logits,), (jnp.ones_like(logits),))[1]
        assert (slope > 0).mean() > 0.05, "no draw lets a gradient through"
        if not gate.pathwise:
            # That of a surrogate instead, which no draw stops.
            assert (slope > 0).all()
            return
        below, above = of(logits - step), of(logits + step)
        # A step from one piece of the gate into the next has no derivative: rare.
        smooth = ((below > 0) == (above > 0)) & ((below < 1) == (above < 1))
        assert smooth.mean() > 0.999
        secant = (above - below) / (2 * step)
        np.testing.assert_allclose(slope[smooth], secant[smooth], rtol=1e-5, atol=1e-7)


@pytest.mark.sweep
@sweep
def test_everything_is_monotone_in_the_logit(gate):
    logits = jnp.linspace(-6.0, 6.0, 241)
    for name, curve in curves_of(gate).items():
        values = np.asarray(curve(logits))
        assert (np.diff(values) >= 0).all(), name
        levels = np.unique(values)
        if name != "l0_term" and len(levels) == 2:
            assert levels.tolist() == [0, 1], name  # a step
        elif name in constants(gate):
            assert len(levels) == 1, name
        else:
            assert values[0] < values[-1], name
            assert len(levels) > 2, name
    if gate.bounded:
        one_noise = jax.vmap(lambda logit: gate.sample(jax.random.key(5), logit))
        assert (np.diff(np.asarray(one_noise(logits))) >= 0).all()


def constants(gate):
    """What says nothing of gates that are never 0, or noise around 1."""
    ends = () if gate.zeros else ("prob_active", "prob_one")
    around_one = gate.random and not gate.bounded
    return (*ends, "mean", "rule mean") if around_one else ends


@pytest.mark.sweep
@sweep
def test_what_a_unit_pays_is_finite_and_is_trained_at_the_limits(gate):
    ends = gate.project(jnp.float32([-1e9, 1e9]))
    assert np.isfinite(gate.l0_term(ends)).all()
    slope = jax.vmap(jax.grad(gate.l0_term))(ends)
    assert np.isfinite(slope).all()
    assert (slope >= 0).all()
    assert (gate.l0_term(ends) >= 0).all()


@pytest.mark.sweep
@given(st.floats(-8, 8), st.floats(-8, 8))
@families
def test_probabilities_are_ordered(family, a, b):
    gate, (low, high) = family(), sorted((a, b))
    ends = jnp.float32([low, high])
    active, one = gate.prob_active(ends), gate.prob_one(ends)
    assert (one >= 0).all()
    assert (one <= gate.mean(ends) + 1e-6).all()
    if gate.bounded or gate.random:
        assert (gate.mean(ends) <= active + 1e-6).all()
    assert (active <= 1).all()
    assert active[0] <= active[1]
    assert one[0] <= one[1]


@pytest.mark.sweep
@sweep
def test_float32_is_close_to_float64(gate):
    with jax.enable_x64(True):
        # (None where a gate is clipped: a step is at another place in float32.)
        logits = jnp.linspace(-6.0, 6.0, 120)
        for curve in curves_of(gate):
            single = curves_of(gate)[curve](logits.astype(jnp.float32))
            double = curves_of(in_float64(gate))[curve](logits)
            assert (single.dtype, double.dtype) == (jnp.float32, jnp.float64), curve
            relative = 0 if gate.bounded else 1e-5
            np.testing.assert_allclose(single, double, atol=1e-5, rtol=relative)


@pytest.mark.sweep
@sweep
def test_half_precision_logits_keep_noise_in_full_precision(gate):
    """A bfloat16 uniform has 128 values: P(z = 1) would be 3 % off."""
    logits = jnp.tile(jnp.bfloat16(LOGITS), 500)
    z = gate.sample(jax.random.key(6), logits)
    assert z.dtype == jnp.float32
    wide = gate.sample(jax.random.key(6), logits.astype(jnp.float32))
    np.testing.assert_array_equal(z, wide)
    if gate.random and gate.pathwise:  # (Others have a few values only.)
        inside = z[(z > 0) & (z < 1)]
        assert len(np.unique(inside)) > 400


@pytest.mark.sweep
@sweep
def test_every_rule_gives_a_gate_and_others_raise(gate):
    logits = jnp.float32(LOGITS)
    decided = {rule: gate.deterministic(logits, rule) for rule in gate.rules}
    for values in decided.values():
        assert values.shape == logits.shape
        assert (values >= 0).all()
        assert (values <= 1).all() or not gate.bounded
    distinct = {tuple(np.asarray(values).tolist()) for values in decided.values()}
    assert len(distinct) == len(gate.rules)
    with pytest.raises(ValueError, match="coin") as error:
        gate.deterministic(logits, "coin")
    assert all(rule in str(error.value) for rule in gate.rules)


@families
def test_equal_gates_are_interchangeable(family):
    gate = family()
    assert gate == family()
    assert hash(gate) == hash(family())

    @functools.partial(jax.jit, static_argnums=0)
    @traced_once
    def traced(gate, logits):
        return gate.prob_active(logits)

    for each in (family(), family()):
        traced(each, jnp.float32(LOGITS))
    for field in dataclasses.fields(gate):
        if isinstance(value := getattr(gate, field.name), float):
            other = dataclasses.replace(gate, **{field.name: moved(value)})
            assert other != gate
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(gate, field.name, value)
    assert family.__name__ in repr(gate)


@pytest.mark.sweep
@families
def test_temperature_may_be_traced_and_is_all_that_changes(family):
    gate, logits = family(), jnp.float32(LOGITS)

    def curves(temperature):
        now = gate.at_temperature(temperature)
        return now.prob_active(logits), now.sample(jax.random.key(7), logits)

    traced = jax.jit(traced_once(curves))
    for temperature in TEMPERATURES:
        for one, other in zip(
            traced(jnp.float32(temperature)),
            curves(jnp.float32(temperature)),
            strict=True,
        ):
            np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-6)
    assert gate.at_temperature(0.3).temperature == 0.3
    hot, cold = curves(jnp.float32(1.4)), curves(jnp.float32(0.2))
    assert not np.array_equal(hot, cold)
    np.testing.assert_array_equal(
        gate.at_temperature(jnp.float32(0.2)).project(100 * logits),
        gate.project(100 * logits),
    )


@sweep
def test_projection_is_one(gate):
    logits = jnp.linspace(-50.0, 50.0, 101)
    once = gate.project(logits)
    assert once.shape == logits.shape
    assert (jnp.diff(once) >= 0).all()
    np.testing.assert_array_equal(gate.project(once), once)


@pytest.mark.sweep
@families
def test_initial_logits_lie_where_they_should(family):
    gate, size = family(), 20_000
    paid = []
    for keep_prob in (0.05, 0.3, 0.8):
        logits = gate.init(jax.random.key(8), size, keep_prob)
        assert logits.shape == (size,)
        assert logits.dtype == jnp.float32
        assert np.std(logits) > 0, "equal gates can't be told apart"
        assert not np.array_equal(logits, gate.init(jax.random.key(9), size, keep_prob))
        paid.append(float(gate.l0_term(logits).mean()))
    assert paid == sorted(set(paid))
    for outside in (0.0, 1.0, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="keep_prob") as error:
            gate.init(jax.random.key(0), 3, outside)
        assert str(outside) in str(error.value)


@pytest.mark.sweep
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (0,)])
@families
def test_gates_take_arrays_of_any_shape(family, shape):
    gate, logits = family(), jnp.full(shape, 0.3)
    for values in (
        gate.sample(jax.random.key(0), logits),
        gate.project(logits),
        *(curve(logits) for curve in curves_of(gate).values()),
    ):
        assert values.shape == shape
        assert values.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(), (7,), (4096,), (4097,), (30_001,), (99, 101)])
def test_normal_noise_is_the_quantile_of_uniform_noise(shape):
    """In a loop where there is much of it, which takes rows of one length."""
    u = noise.uniform(jax.random.key(13), shape)
    found = jax.jit(noise.normal)(u)
    assert found.shape == shape
    np.testing.assert_allclose(found, special.ndtri(np.asarray(u, np.float64)), 1e-5)


@pytest.mark.parametrize("size", [1000, 1001, 200_000])
def test_noise_is_uniform_on_the_open_interval(size):
    u = np.asarray(noise.uniform(jax.random.key(13), (size,)), np.float64)
    assert u.min() > 0
    assert u.max() < 1
    assert len(np.unique(u)) > 0.75 * min(size, noise.CELLS)
    # Each of 16 intervals, at both ends of the vector, gets its share; moments too.
    for part in (u, u[: size // 2], u[size // 2 :]):
        counts = np.histogram(part, 16, (0, 1))[0] / len(part)
        spread = math.sqrt(1 / 16 * 15 / 16 / len(part))
        assert np.abs(counts - 1 / 16).max() < 5 * spread
        assert abs(part.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / len(part))
        assert abs((part**2).mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / len(part))
    # Low bits are as random as high ones.
    fine = (u * noise.CELLS - 0.5) % 16
    assert abs(fine.mean() - 7.5) < 5 * math.sqrt(255 / 12 / size)
    np.testing.assert_array_equal(fine, np.round(fine))


@families
def test_the_registry_makes_families_by_name(family):
    name = next(name for name, each in GATES.items() if each is family)
    assert gates.make(name) == family()
    with pytest.raises(ValueError, match="'soft'") as error:
        gates.make("soft")
    assert name in str(error.value)


# -------------------------------------------------- the hard concrete gate in print

# log alpha: P(z=0), P(z=1), P(0<z<1), P(z!=0), E[z], the paper's rule, the median
TABLE = {
    -4.60517: (0.952870, 0.002018, 0.045112, 0.047130, 0.01312, 0.0, 0.0),
    -2.39790: (0.689825, 0.018048, 0.292126, 0.310175, 0.10272, 0.0, 0.0),
    -1.59860: (0.500000, 0.039271, 0.460729, 0.500000, 0.19431, 0.10181, 0.0),
    -1.0: (0.354665, 0.069229, 0.576106, 0.645335, 0.29295, 0.22273, 0.11891),
    0.0: (0.168178, 0.168178, 0.663644, 0.831822, 0.5, 0.5, 0.5),
    0.8473: (0.079739, 0.320539, 0.599722, 0.920261, 0.67812, 0.74, 0.83709),
    1.3863: (0.048113, 0.447124, 0.504763, 0.951887, 0.77360, 0.86, 0.96667),
    4.60517: (0.002018, 0.952870, 0.045112, 0.997982, 0.98688, 1.0, 1.0),
}


@pytest.mark.parametrize("log_alpha", TABLE)
def test_hard_concrete_reproduces_the_reference_values(log_alpha):
    gate, logit = HardConcrete(), jnp.float32(log_alpha)
    active, one = gate.prob_active(logit), gate.prob_one(logit)
    found = [1 - active, one, active - one, active, gate.mean(logit)]
    found += [gate.deterministic(logit, rule) for rule in ("paper", "median")]
    np.testing.assert_allclose(found, TABLE[log_alpha], atol=1e-4)
    assert gate.deterministic(logit, "mean") == gate.mean(logit)


@pytest.mark.parametrize(("gamma", "zeta"), [(-0.1, 1.1), (-0.3, 1.05)])
@pytest.mark.parametrize("beta", [0.1, 2 / 3, 1.5])
def test_hard_concrete_mean_is_the_integral_of_the_survival_function(beta, gamma, zeta):
    def survival(x, logit):
        s = (x - gamma) / (zeta - gamma)
        return special.expit(logit - beta * special.logit(s))

    with jax.enable_x64(True):
        found = HardConcrete(beta, gamma=gamma, zeta=zeta).mean(jnp.float64(LOGITS))
    exact = [integrate.quad(survival, 0, 1, args=(a,), limit=500)[0] for a in LOGITS]
    np.testing.assert_allclose(found, exact, atol=1e-6)


@given(st.floats(-4.6, 4.6), st.floats(0.1, 2.0), st.floats(-0.9, -0.05))
def test_hard_concrete_rules_prune_at_their_own_thresholds(logit, beta, gamma):
    """The paper's rule closes at log(-gamma/zeta), the median at beta times that."""
    zeta = 1 - gamma
    edge = math.log(-gamma / zeta)
    gate, a = HardConcrete(beta, gamma=gamma, zeta=zeta), jnp.float32(logit)
    if abs(logit - edge) > 1e-3:
        assert (gate.deterministic(a, "paper") == 0) == (logit < edge)
        at_the_edge = float(special.expit(edge - beta * edge))
        assert (gate.prob_active(a) < at_the_edge) == (logit < edge)
    if abs(logit - beta * edge) > 1e-3:
        assert (gate.deterministic(a, "median") == 0) == (logit < beta * edge)
        assert (gate.prob_active(a) < 0.5) == (logit < beta * edge)
    assert gate.deterministic(a, "mean") > 0


def test_hard_concrete_paper_rule_prunes_below_a_third():
    gate, edge = HardConcrete(), -math.log(11)
    below, above = jnp.float32(edge - 1e-3), jnp.float32(edge + 1e-3)
    assert gate.deterministic(below, "paper") == 0 < gate.deterministic(above, "paper")
    assert gate.prob_active(jnp.float32(edge)) == pytest.approx(0.310, abs=5e-4)


def test_hard_concrete_clamp_leaves_a_dead_gate_its_cost():
    gate = HardConcrete()
    ends = gate.project(jnp.float32([-100.0, 100.0, 1.25]))
    np.testing.assert_allclose(ends, [math.log(0.01), math.log(100), 1.25], rtol=1e-6)
    assert gate.prob_active(ends)[0] == pytest.approx(0.0471, abs=5e-5)


@pytest.mark.parametrize(
    ("keep_prob", "density"), [(0.5, 0.832), (0.7, 0.920), (0.8, 0.952), (0.95, 0.989)]
)
def test_hard_concrete_starts_denser_than_its_keep_probability(keep_prob, density):
    gate, size = HardConcrete(), 10_000
    logits = np.asarray(gate.init(jax.random.key(10), size, keep_prob), np.float64)
    location = math.log(keep_prob / (1 - keep_prob))
    assert abs(logits.mean() - location) < 5 * 0.01 / math.sqrt(size)
    assert abs(logits.std() - 0.01) < 5 * 0.01 / math.sqrt(2 * size)
    assert gate.prob_active(jnp.float32(location)) == pytest.approx(density, abs=6e-4)


@pytest.mark.parametrize(
    ("log_alpha", "first", "second"),
    [(0.0, 0.2187, 0.0785), (2.0, 0.1141, 0.0387), (-2.0, 0.1141, 0.0387)],
)
def test_hard_concrete_pathwise_gradient_has_its_moments(log_alpha, first, second):
    gate, logits = HardConcrete(), jnp.full(DRAWS, log_alpha, jnp.float32)
    z, slope = jax.jvp(
        lambda a: gate.sample(jax.random.key(11), a),
        (logits,),
        (jnp.ones_like(logits),),
    )
    slope = np.asarray(slope, np.float64)
    assert (slope[(z == 0) | (z == 1)] == 0).all()
    assert (slope[(z > 0) & (z < 1)] > 0).all()
    for power, expected in ((slope, first), (slope**2, second)):
        error = 5 * power.std() / math.sqrt(DRAWS)
        assert abs(power.mean() - expected) < error + 5e-5


def test_hard_concrete_gradients_in_closed_form():
    """d P(z != 0) / d log alpha = P (1 - P); dz / d log alpha from z itself."""
    gate = HardConcrete()
    with jax.enable_x64(True):
        logits = jnp.float64(LOGITS)
        p = gate.prob_active(logits)
        np.testing.assert_allclose(
            jax.vmap(jax.grad(gate.prob_active))(logits), p * (1 - p), rtol=1e-9
        )
        z, slope = jax.jvp(
            lambda a: gate.sample(jax.random.key(12), a),
            (jnp.tile(logits, 500),),
            (jnp.ones(500 * len(LOGITS)),),
        )
        inside = (z > 0) & (z < 1)
        s = (z - gate.gamma) / (gate.zeta - gate.gamma)
        closed = jnp.where(
            inside, (gate.zeta - gate.gamma) * s * (1 - s) / gate.beta, 0.0
        )
        np.testing.assert_allclose(slope, closed, rtol=1e-8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", 0.0),
        ("beta", -1.0),
        ("gamma", 0.0),
        ("gamma", 0.1),
        ("zeta", 1.0),
        ("zeta", 0.5),
        ("limit", 0.0),
        ("beta", math.nan),
        ("limit", math.nan),
    ],
)
def test_hard_concrete_refuses_what_is_no_gate(field, value):
    with pytest.raises(ValueError, match=field) as error:
        HardConcrete(**{field: value})
    if field != "limit":
        assert str(value) in str(error.value)


# ------------------------------------------------------- other families in print


@pytest.mark.parametrize("sigma", [0.2, 0.5])
def test_stochastic_gates_are_clipped_gaussians(sigma):
    """Yamada et al. (2020): P(z != 0) = Phi(mu / sigma), the gate at test time is
    clip(mu), and with sigma = 1/2 a gate with mu = 1/2 is open in 84 % of draws."""
    gate, mu = Stochastic(sigma), np.asarray([-0.4, 0.1, 0.5, 0.9, 1.3])
    with jax.enable_x64(True):
        logits = jnp.asarray(4 * (mu - 0.5))
        truth = stats.norm(mu, sigma)
        np.testing.assert_allclose(gate.prob_active(logits), truth.sf(0), rtol=1e-9)
        np.testing.assert_allclose(gate.prob_one(logits), truth.sf(1), rtol=1e-7)
        exact = [
            integrate.quad(stats.norm(m, sigma).sf, 0, 1, limit=200)[0] for m in mu
        ]
        np.testing.assert_allclose(gate.mean(logits), exact, rtol=1e-9)
        decided = gate.deterministic(logits, "paper")
        np.testing.assert_allclose(decided, np.clip(mu, 0, 1), atol=1e-12)
    half = Stochastic().prob_active(jnp.float32(0.0))
    assert half == pytest.approx(0.841345, abs=1e-6)


@pytest.mark.parametrize("tau", [0.3, 0.5, 1.0])
def test_hard_kumaraswamy_gates_have_its_cdf(tau):
    """Bastings et al. (2019): F(s) = 1 - (1 - s^a)^b, stretched to (-0.1, 1.1)."""
    gate, eta = HardKumaraswamy(tau), np.asarray([-2.0, 0.0, 1.0])
    a, b = tau * np.exp(eta / 2), tau * np.exp(-eta / 2)
    with jax.enable_x64(True):
        logits = jnp.asarray(eta)
        low, high = (1 - (1 - s**a) ** b for s in (1 / 12, 11 / 12))
        np.testing.assert_allclose(gate.prob_active(logits), 1 - low, rtol=1e-9)
        np.testing.assert_allclose(gate.prob_one(logits), 1 - high, rtol=1e-9)
        median = (1 - 0.5 ** (1 / b)) ** (1 / a)
        np.testing.assert_allclose(
            gate.deterministic(logits, "median"),
            np.clip(1.2 * median - 0.1, 0, 1),
            atol=1e-9,
        )


def test_hard_kumaraswamy_rule_of_the_paper_takes_what_is_most_likely():
    """Bastings et al. (2019): 0, 1, or the mean of the unstretched variable."""
    gate, eta = HardKumaraswamy(), np.linspace(-4, 4, 81)
    with jax.enable_x64(True):
        found = np.asarray(gate.deterministic(jnp.asarray(eta), "paper"))
    expected = []
    for a, b in zip(0.5 * np.exp(eta / 2), 0.5 * np.exp(-eta / 2), strict=True):
        low, high = (1 - (1 - s**a) ** b for s in (1 / 12, 11 / 12))
        mean, _ = integrate.quad(lambda s, a=a, b=b: (1 - s**a) ** b, 0, 1, limit=200)
        expected.append((0, mean, 1)[np.argmax([low, high - low, 1 - high])])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert {0, 1} < set(found)


@pytest.mark.parametrize("temperature", [1 / 7, 1.0])
def test_bernoulli_gates_are_those_of_l0_arm(temperature):
    """Li and Ji (2019): P(z = 1) = sigmoid(k phi), k = 7, and 1[phi > 0] at the end."""
    gate, phi = Bernoulli(temperature), np.asarray(LOGITS) / 4
    p = stats.logistic.cdf(phi / temperature)
    logits = jnp.float32(phi)
    for stated in (gate.prob_active, gate.prob_one, gate.mean, gate.l0_term):
        np.testing.assert_allclose(stated(logits), p, rtol=1e-5)
    np.testing.assert_array_equal(gate.deterministic(logits, "paper"), phi > 0)
    z, slope = jax.jvp(
        lambda a: gate.sample(jax.random.key(0), a),
        (jnp.tile(logits, 500),),
        (jnp.ones(3500),),
    )
    assert set(np.unique(z)) == {0, 1}
    p = np.tile(p, 500)
    np.testing.assert_allclose(slope, p * (1 - p) / temperature, rtol=1e-3)


@pytest.mark.parametrize("width", [1.0, 6.0])
def test_smooth_steps_are_the_published_cubic(width):
    """Hazimeh et al. (2020)."""
    gate = SmoothStep(width / 6)
    assert gate.width == width
    t = np.linspace(-0.8, 0.8, 33) * width
    cubic = -2 / width**3 * t**3 + 3 / (2 * width) * t + 0.5
    expected = np.where(t <= -width / 2, 0, np.where(t >= width / 2, 1, cubic))
    logits = jnp.float32(t)
    for stated in (gate.mean, gate.l0_term, lambda a: gate.deterministic(a, "paper")):
        np.testing.assert_allclose(stated(logits), expected, atol=1e-6)
    np.testing.assert_array_equal(gate.prob_active(logits), expected > 0)
    np.testing.assert_array_equal(gate.prob_one(logits), expected == 1)


def test_continuous_sparsification_becomes_a_step():
    """Savarese et al. (2020): sigmoid(beta s), beta from 1 to 200; then 1[s > 0]."""
    s = np.linspace(-2, 2, 20)
    for beta in (1, 14, 200):
        gate = ContinuousSparsification(1 / beta)
        z = gate.sample(jax.random.key(0), jnp.float32(s))
        np.testing.assert_allclose(z, special.expit(beta * s), atol=1e-6)
        np.testing.assert_allclose(gate.l0_term(jnp.float32(s)), z, atol=1e-6)
    np.testing.assert_allclose(z, s > 0, atol=1e-6)
    np.testing.assert_array_equal(gate.deterministic(jnp.float32(s), "paper"), s > 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_hard_sigmoids_let_gradients_through_where_they_are_clipped(temperature):
    gate, phi = HardSigmoid(temperature), np.asarray(LOGITS)
    logits, k = jnp.float32(phi), 0.25 / temperature
    z, slope = jax.jvp(
        lambda a: gate.sample(jax.random.key(0), a), (logits,), (jnp.ones(len(phi)),)
    )
    np.testing.assert_allclose(z, np.clip(k * phi + 0.5, 0, 1), atol=1e-6)
    assert {0, 1} < set(z.tolist())
    np.testing.assert_allclose(slope, np.full(len(phi), k), rtol=1e-6)
    np.testing.assert_array_equal(gate.prob_active(logits), z > 0)
    paid = special.expit(4 * k * phi)
    np.testing.assert_allclose(gate.l0_term(logits), paid, rtol=1e-5)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_the_factors_of_d_gating_pay_least_for_what_the_norm_would_cost(depth):
    """Kolb et al. (2025): (|omega|^2 + (D-1) gamma^2) / D >= |omega gamma^(D-1)|^(2/D),
    and equal where the factors are."""
    gate = DGating(1 / (depth - 1))
    norms, gammas = np.meshgrid(np.geomspace(0.05, 3, 40), np.geomspace(0.05, 3, 40))
    z = np.asarray(gate.mean(jnp.float32(gammas)), np.float64)
    np.testing.assert_allclose(z, gammas ** (depth - 1), rtol=1e-5)
    paid = gate.norm_share * norms**2 + np.asarray(gate.l0_term(jnp.float32(gammas)))
    least = (norms * z) ** (2 / depth)
    assert (paid >= least * (1 - 1e-5)).all()
    np.testing.assert_allclose(np.diagonal(paid), np.diagonal(least), rtol=1e-5)
    apart = ~np.isclose(norms, gammas, rtol=0.05)
    assert (paid[apart] > 1.001 * least[apart]).all()


@pytest.mark.parametrize("family", [VariationalDropout, InformationBottleneck])
def test_multiplicative_noise_is_that_of_gaussian_dropout(family):
    """Kingma et al. (2015): N(1, alpha) with alpha = (1 - p) / p of a keep rate p."""
    gate = family()
    for p in (0.3, 0.8):
        logits = jnp.full(DRAWS, math.log(p / (1 - p)), jnp.float32)
        z = np.asarray(gate.sample(jax.random.key(0), logits), np.float64)
        alpha = (1 - p) / p
        assert abs(z.mean() - 1) < 5 * math.sqrt(alpha / DRAWS)
        assert abs(z.var() - alpha) < 5 * alpha * math.sqrt(2 / DRAWS)
        assert stats.kstest(z, stats.norm(1, math.sqrt(alpha)).cdf).pvalue > 1e-6
    ends = gate.project(jnp.float32([-100.0, 100.0]))
    np.testing.assert_array_equal(ends, [-8.0, 8.0])


def test_variational_dropout_pays_its_divergence_from_the_log_uniform_prior():
    """Molchanov et al. (2017): an approximation, within 0.01 or so of the integral

    KL(N(1, alpha) || 1/|w|) = E[log |1 + sqrt(alpha) e|] - log(alpha) / 2 + constant.
    """
    gate, log_alpha = VariationalDropout(), np.asarray([-6.0, -2.0, 0.5, 2.0, 4.0])

    def divergence(log_alpha):
        root = math.exp(log_alpha / 2)
        # (The logarithm has a pole, between two nodes.)
        e = (np.arange(400_000) + 0.5) / 400_000 * 20 - 10
        log = np.log(np.abs(1 + root * e))
        return (stats.norm.pdf(e) * log).sum() * 20 / 400_000 - log_alpha / 2

    found = np.asarray(gate.l0_term(jnp.float32(-log_alpha)), np.float64)
    exact = np.asarray([divergence(a) - divergence(24.0) for a in log_alpha])
    np.testing.assert_allclose(found, exact, atol=0.015)
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    printed = (
        k1 * special.expit(k2 + k3 * log_alpha)
        - 0.5 * np.log1p(np.exp(-log_alpha))
        - k1
    )
    np.testing.assert_allclose(found, -printed, atol=1e-6)
    kept = gate.deterministic(jnp.float32([-2.9, -3.1]), "paper")
    np.testing.assert_array_equal(kept, [1, 0])


def test_an_information_bottleneck_pays_the_capacity_of_its_noise():
    """Dai et al. (2018): log(1 + mu^2 / sigma^2) / 2; pruned where log alpha > 0."""
    gate, alpha = InformationBottleneck(), np.asarray([0.01, 0.5, 2.0, 300.0])
    logits = jnp.float32(-np.log(alpha))
    np.testing.assert_allclose(
        gate.l0_term(logits), 0.5 * np.log(1 + 1 / alpha), rtol=1e-5
    )
    np.testing.assert_array_equal(gate.deterministic(logits, "paper"), [1, 1, 0, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stochastic(0.0), "sigma must be > 0, got 0.0"),
        (lambda: Stochastic(limit=-1.0), "limit must be > 0, got -1.0"),
        (lambda: Bernoulli(0.0), "temperature must be > 0, got 0.0"),
        (lambda: SmoothStep(-1.0), "temperature must be > 0, got -1.0"),
        (lambda: VariationalDropout(math.nan), "temperature must be > 0, got nan"),
        (lambda: DGating(0.0), "temperature must be > 0, got 0.0"),
        (lambda: DGating(threshold=-1.0), "threshold must be > 0, got -1.0"),
        (lambda: HardKumaraswamy(-1.0), "tau must be > 0, got -1.0"),
        (lambda: HardKumaraswamy(gamma=0.0), "gamma must be < 0.*got 0.0"),
        (lambda: HardKumaraswamy(zeta=1.0), "zeta must be > 1.*got 1.0"),
    ],
)
def test_other_families_refuse_what_is_no_gate(make, message):
    with pytest.raises(ValueError, match=message):
        make()
