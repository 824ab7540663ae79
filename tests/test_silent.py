"""What once went wrong without a word in training, or was taken as if it were right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from l0jax import costs, gates, objectives, train

RNG = np.random.default_rng(0)
X, Y = (np.float32(RNG.normal(size=(32, n))) for n in (6, 2))
PLAIN = {"gate": None, "optimizer": optax.sgd(0.0)}


class Perceptron(nnx.Module):
    """Two hidden layers, a and b, whose units can go."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.a = nnx.Linear(6, 8, rngs=rngs)
        self.b = nnx.Linear(8, 8, rngs=rngs)
        self.out = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.b(nnx.relu(self.a(x)))))


def loss(model, batch):
    x, y = batch[0], batch[1]
    return jnp.square(model(x) - y).mean(), {}


@pytest.fixture(autouse=True)
def promotion():
    """As optax needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# ------------------------------------------------------------ other gates than at first


def density_of(training):
    state = training.start(jax.random.key(0))
    logits = {"a": jnp.full(8, -9.0), "b": jnp.full(8, 9.0)}
    own = {name: logits[name] for name in state.gates["logits"]}
    state = state._replace(gates={"logits": own})
    _, metrics = training.step(state, (X, Y))
    return float(metrics["excess of density"])


@pytest.mark.parametrize("begun", [("a",), ("b",), None, "ungated"])
@pytest.mark.parametrize("then", [("a",), None])
def test_a_density_is_of_the_groups_that_have_gates_now(begun, then):
    gate = gates.HardConcrete()
    how = {
        "target": train.Target("density", 0.5),
        "optimizer": optax.sgd(1e-2),
        "gate_optimizer": optax.sgd(0.1),
    }
    wanted = train.Training(
        Perceptron(), loss, X, gate=train.Learned(gate, only=then), **how
    )
    if begun == "ungated":
        other = train.Training(
            Perceptron(), loss, structure=wanted.structure, gate=None, **PLAIN_SGD
        )
        other = other.replace(gate_optimizer=how["gate_optimizer"])
    else:
        other = train.Training(
            Perceptron(), loss, X, gate=train.Learned(gate, only=begun), **how
        )
    other = other.replace(gating=train.Learned(gate, only=then), target=how["target"])
    # Two inputs of 8 weights for each unit of a, and 2 for each of b.
    sizes = {"a": 8, "b": 2}
    named = then or ("a", "b")
    p = {
        "a": gate.prob_active(jnp.float32(-9.0)),
        "b": gate.prob_active(jnp.float32(9)),
    }
    share = float(sum(sizes[n] * p[n] for n in named)) / sum(sizes[n] for n in named)
    assert density_of(wanted) == pytest.approx(share / 0.5 - 1, rel=1e-4)
    assert density_of(other) == pytest.approx(share / 0.5 - 1, rel=1e-4)


PLAIN_SGD = {"optimizer": optax.sgd(1e-2)}


# ------------------------------------------------------------------- running statistics


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e4, 1e6])
def test_statistics_of_features_of_any_size_are_recalibrated(scale):
    class Normalised(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
            self.out = nnx.Linear(6, 2, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.out(self.norm(x))

    x = X * np.float32(scale)
    training = train.Training(Normalised(), loss, **PLAIN)
    state = training.recalibrate(training.start(jax.random.key(0)), [(x, Y)])
    np.testing.assert_allclose(state.rest["norm"]["var"], x.var(0), rtol=1e-4)
    np.testing.assert_allclose(
        state.rest["norm"]["mean"], x.mean(0), rtol=1e-3, atol=1e-6 * scale
    )


# ------------------------------------------------------------------ means over batches


def test_a_mean_is_of_examples_and_of_nothing_else():
    def of_dict(model, batch):
        return loss(model, (batch["x"], batch["y"]))

    training = train.Training(Perceptron(), of_dict, **PLAIN)
    state = training.start(jax.random.key(0))

    def halves(**more):
        return [{"x": X[a], "y": Y[a], **more} for a in (slice(28), slice(28, 32))]

    whole = training.evaluate(state, [{"x": X, "y": Y}])["loss"]
    assert training.evaluate(state, halves())["loss"] == pytest.approx(whole)
    numbers = halves(alpha=np.float32(0.1))
    assert training.evaluate(state, numbers)["loss"] == pytest.approx(whole)
    with pytest.raises(
        ValueError, match=r"nobody knows how many.*10 at 'class_weights'"
    ):
        training.evaluate(state, halves(class_weights=np.ones(10, np.float32)))


def test_a_metric_may_be_an_array():
    def by_output(model, batch):
        apart = jnp.square(model(batch[0]) - batch[1])
        return apart.mean(), {"of each": apart.mean(0)}

    training = train.Training(Perceptron(), by_output, **PLAIN)
    state = training.start(jax.random.key(0))
    halves = [(X[:28], Y[:28]), (X[28:], Y[28:])]
    found = training.evaluate(state, halves)
    expected = np.square(Perceptron()(X) - Y).mean(0)
    np.testing.assert_allclose(found["of each"], expected, rtol=1e-5)
    assert found["loss"] == pytest.approx(expected.mean(), rel=1e-5)
    _, totals = training.epoch(state, [(X, Y), (X, Y)])
    np.testing.assert_allclose(totals.means["of each"], expected, rtol=1e-5)


# --------------------------------------------------------------- rows, members, numbers


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("where", [np.asarray, jnp.asarray])
def test_rows_that_the_data_have_not_are_named(loop, where):
    training = train.Training(Perceptron(), loss, **PLAIN)
    order = where(np.arange(40, dtype=np.int32).reshape(5, 8))
    state = training.start(jax.random.key(0))
    with pytest.raises((ValueError, FloatingPointError), match=r"\brows\b"):
        print(training.epoch(state, (X, Y), order, loop=loop)[1].means)
    state, totals = training.epoch(
        training.start(jax.random.key(0)), (X, Y), order[:4], loop=loop
    )
    assert totals.means["loss"] > 0
    with pytest.raises(ValueError, match=r"nobody knows how many .*20 at '1'"):
        training.epoch(state, (X, Y[:20]), order[:2], loop=loop)
    with pytest.raises(ValueError, match=r"no step to take.* larger than that"):
        training.epoch(state, (X, Y), order[:0], loop=loop)


def test_members_that_there_are_not_are_named():
    training = train.Training(
        Perceptron(), loss, X, gate=gates.HardConcrete(), price=1.0, **PLAIN_SGD
    )
    sweep = train.Sweep(lambda price: training.replace(price=price), np.ones(3))
    states = sweep.start([jax.random.key(at) for at in range(3)])
    for at in (3, -4):
        with pytest.raises(IndexError, match=f"no member {at} of 3"):
            sweep.of(at)
        with pytest.raises(IndexError, match=f"no member {at} of 3"):
            train.member_of(states, at)
    train.member_of(states, -1)


@pytest.mark.parametrize("kind", [float, np.float64, jnp.float32])
def test_numbers_of_all_kinds_must_lie_in_their_ranges(kind):
    with pytest.raises(ValueError, match="must lie in"):
        train.Target(costs.macs, kind(30.0))
    with pytest.raises(ValueError, match="rate must be > 0"):
        train.Target(costs.macs, 0.5, rate=kind(-1.0))
    how = {"gate": gates.HardConcrete(), **PLAIN_SGD}
    training = train.Training(Perceptron(), loss, X, price=1.0, **how)
    with pytest.raises(ValueError, match="must be >= 0"):
        training.replace(price=kind(-1.0))


# ---------------------------------------------------------------- kinds of parameters


def test_complex_parameters_go_down():
    """The gradient of |w - c|² is twice w - c, not its conjugate."""
    goal = np.complex64(0.3 + 0.8j)

    def apart(apply, batch):
        return jnp.square(jnp.abs(apply(batch) - goal)).mean(), {}

    training = train.Training(
        train.function(lambda w, x: w["w"] * x, {"w": jnp.complex64(1 - 1j)}),
        apart,
        gate=None,
        optimizer=optax.sgd(0.25),
    )
    state = training.start(jax.random.key(0))
    for _ in range(20):
        state, _ = training.step(state, np.ones(4, np.float32))
    assert complex(state.params["w"]) == pytest.approx(complex(goal), abs=1e-4)


def test_weights_decay_by_their_magnitudes_and_integers_not():
    params = {
        "w": jnp.complex64([3 + 4j, 1j]),
        "steps": jnp.int32([1000]),
    }
    decay = objectives.penalty({}, {}, 1, weight_decay=0.5, charges={})
    assert float(decay(params, {})) == pytest.approx(0.25 * (25 + 1))


def test_dropout_is_drawn_from_the_key_of_the_start():
    class Dropping(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.drop, self.out = (
                nnx.Dropout(0.5, rngs=rngs),
                nnx.Linear(6, 2, rngs=rngs),
            )

        def __call__(self, x):
            return self.out(self.drop(x))

    training = train.Training(Dropping(), loss, **PLAIN)

    def first(seed):
        state = training.start(jax.random.key(seed))
        return float(training.step(state, (X, Y))[1]["loss"])

    assert len({first(seed) for seed in range(3)}) == 3
    assert first(1) == first(1)
