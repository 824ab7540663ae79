"""Laws of the training step: what is drawn when, and that nothing else matters.

Two tiny networks: one with two dense layers, and one whose outputs *are* its gates.
"""

import contextlib
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l0jax
from l0jax import gates, gating, objectives, train, units
from l0jax.estimators import ESTIMATORS
from l0jax.units import Group, Slot, apply_gates

GATE = gates.HardConcrete()
ROOT = jax.random.key(0)
GROUPS = {
    "input": Group("input", 4, (Slot("dense1", 0),)),
    "hidden": Group("hidden", 6, (Slot("dense2", 0),), (Slot("dense1", 1),)),
}
EXAMPLES, BATCH = 50, 8
STEPS = EXAMPLES // BATCH
OBJECTIVE = objectives.penalty(GROUPS, 2.0, EXAMPLES, weight_decay=1e-3)
POLYAK = 0.8
EXAMPLE = jax.ShapeDtypeStruct((2, 4), jnp.float32)


# The same optimiser is the same program.
sgd = functools.cache(optax.sgd)


def apply(params, x):
    return jnp.tanh(x @ params["dense1"]) @ params["dense2"]


def squared(model, batch):
    outputs = model(batch[0])
    error = jnp.square(outputs - batch[1]).mean()
    return error, {"largest": jnp.abs(outputs).max()}


def temperature(step):
    return 0.9 * 0.97 ** step.astype(jnp.float32)


def relaxed(optimizer):
    """Adam and its schedules raise a float to the power of an integer count."""

    def standard(function):
        def call(*args):
            with jax.numpy_dtype_promotion("standard"):
                return function(*args)

        return call

    return optax.GradientTransformation(*map(standard, optimizer))


@functools.cache
def adams():
    """Of weights and of gates."""
    rate = optax.linear_schedule(3e-2, 1e-3, 20, 3)
    return relaxed(optax.adam(rate)), relaxed(optax.adam(0.1))


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "dense1": jnp.float32(rng.normal(size=(4, 6))),
        "dense2": jnp.float32(rng.normal(size=(6, 2))),
    }


@functools.cache
def structure():
    """Of the network, with the units of its inputs."""
    found = l0jax.trace(apply, weights(), EXAMPLE)
    return found.rename({"dense1": "hidden"})


@functools.cache
def data(examples=EXAMPLES, seed=1):
    rng = np.random.default_rng(seed)
    inputs = jnp.float32(rng.normal(size=(examples, 4)))
    return inputs, jnp.float32(rng.normal(size=(examples, 2)))


def batch_of(rows, whole=None):
    return jax.tree.map(lambda a: a[np.asarray(rows)], whole or data())


def make(rate=None, apply=apply, **how):
    """A training by plain descent at a rate; without one by Adam."""
    weights_, gates_ = adams() if rate is None else (sgd(rate), sgd(rate))
    settings = {
        "structure": structure(),
        "gate": train.Learned(GATE, keep_prob=0.5, temperature=temperature),
        "price": 2.0 / EXAMPLES,
        "weight_decay": 1e-3,
        "optimizer": weights_,
        "gate_optimizer": gates_,
        "polyak": POLYAK,
    }
    network = train.function(apply, weights())
    return train.Training(network, squared, **(settings | how))


def copied(tree):
    return jax.tree.map(lambda a: jnp.array(a, copy=True), tree)


def stepped(training, state, batch):
    """The compiled step, of a state that survives it."""
    return training.step(copied(state), batch)


def data_for(training, whole=None):
    """Examples with the inputs that the network still reads."""
    inputs, targets = whole or data()
    return inputs[:, training.alive["input"]], targets


def epochs(training, state, which):
    """Trains the epochs `which`; the totals are those of the last."""
    state, totals = copied(state), None
    for epoch in which:
        order = train.order_of_epoch(ROOT, epoch, EXAMPLES, BATCH)
        state, totals = training.epoch(state, data_for(training), order)
    return state, totals


def bits(leaf):
    """What is stored, of keys too."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def equal(found, expected):
    found, expected = (jax.tree.map(bits, tree) for tree in (found, expected))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def close(found, expected, rtol, atol):
    found, expected = (jax.tree.map(bits, tree) for tree in (found, expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        found,
        expected,
    )


def test_the_groups_are_those_that_are_stated_by_hand():
    assert make().gated == GROUPS


# ------------------------------------------------------------------- what is drawn

PROBE_LOGITS = jnp.float32([-1.5, -0.5, 0.0, 0.8, 2.0])
WEIGHTS = np.float32([1, 2.3, 3.7, -1.1, -2.9])


def gates_of(params, x):
    return jnp.broadcast_to(params["w"][None], (x.shape[0], 5))


@functools.cache
def seen(examples):
    """A loss that is linear in the gates, and whose metric `z` holds them as each
    example met them."""

    def loss(model, rows):
        z = model(rows[:, None].astype(jnp.float32))
        mine = rows[:, None, None] == jnp.arange(examples)[None, :, None]
        laid = jnp.where(mine, z[:, None], 0.0).sum(0)
        # Of examples that are alone the mean is taken.
        return (z @ WEIGHTS).mean(), {"z": laid * (examples / len(rows))}

    return loss


@functools.cache
def probe_structure():
    found = l0jax.trace(gates_of, {"w": jnp.ones(5)}, jnp.zeros((2, 1))).only()
    return found.add(Group("all", 5, (Slot("w", 0),)))


def probe(per_example=False, gate=GATE, rate=1.0, examples=3, **learned):
    return train.Training(
        train.function(gates_of, {"w": jnp.ones(5)}),
        seen(examples),
        structure=probe_structure(),
        gate=train.Learned(gate, per_example=per_example, **learned),
        optimizer=sgd(rate),
        gate_optimizer=sgd(rate),
    )


def at_step(training, step, key=ROOT):
    own = copied({"logits": {"all": PROBE_LOGITS}})
    return training.start(key)._replace(step=jnp.int32(step), gates=own)


def probed(training, at, key=ROOT, examples=3):
    after, metrics = training.step(at_step(training, at, key), jnp.arange(examples))
    return np.asarray(metrics["z"]), after


@pytest.mark.parametrize("per_example", [False, True])
def test_steps_draw_their_own_gates_and_nothing_else_matters(per_example):
    step = probe(per_example)
    first, _ = probed(step, 3)
    assert (first[0] == first[1]).all() != per_example
    equal(probed(step, 3)[0], first)
    for at, key in ((4, ROOT), (3, jax.random.key(1)), (0, ROOT)):
        assert not np.array_equal(probed(step, at, key)[0], first)


FAMILIES = {name: family() for name, family in gates.GATES.items()}
FAMILIES |= {f"mixture-{n}": gates.Mixture(pair()) for n, pair in gates.PAIRS.items()}


@pytest.mark.sweep
@pytest.mark.parametrize("gate", FAMILIES.values(), ids=list(FAMILIES))
def test_steps_of_every_family_draw_their_own_gates(gate):
    """Law 5: the same step draws the same, another one others, if there is noise."""
    step = probe(gate=gate)
    first, after = probed(step, 3)
    equal(probed(step, 3), (first, after))
    assert np.array_equal(probed(step, 4)[0], first) is not gate.random
    assert np.isfinite(np.asarray(after.gates["logits"]["all"])).all()


@pytest.mark.sweep
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_step_follows_its_estimator(name):
    """The gradients in logits and in weights are those of the surrogate, the metrics
    those of its draws."""
    gate = gates.Bernoulli(temperature=0.5)
    training = probe(gate=gate, rate=0.1, estimator=ESTIMATORS[name])

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def surrogate(logits, w, at):
        def loss(z):
            return (z["all"] * w) @ WEIGHTS, z["all"] * w

        key = jax.random.fold_in(ROOT, at)
        return ESTIMATORS[name](key, {"all": logits / 0.5}, loss, has_aux=True)

    total = np.zeros(5)
    for at in range(6):
        after, metrics = training.step(at_step(training, at), jnp.arange(3))
        (value, z), slopes = surrogate(PROBE_LOGITS, jnp.ones(5), at)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["z"], np.tile(z, (3, 1)), rtol=1e-6)
        for found, start, slope in (
            (after.gates["logits"]["all"], PROBE_LOGITS, slopes[0]),
            (after.params["w"], 1.0, slopes[1]),
        ):
            moved = (start - found) / 0.1  # (Further, logits would be clipped.)
            np.testing.assert_allclose(moved, slope, rtol=1e-4, atol=1e-4)
        total += np.abs(slopes[0])
    # (Two draws that are the same say nothing; of six pairs some differ.)
    assert (total > 0).sum() >= 3


def test_estimators_are_for_bernoulli_gates_drawn_once_for_a_batch():
    arm = ESTIMATORS["arm"]
    with pytest.raises(ValueError, match="HardConcrete gates have gradients of their"):
        probe(estimator=arm)
    with pytest.raises(ValueError, match="once for a batch, not per example"):
        probe(True, gates.Bernoulli(), estimator=arm)


def test_gates_of_a_step_are_those_of_its_key():
    z, _ = probed(probe(), 3)
    key = jax.random.fold_in(ROOT, 3)
    expected = gating.sample(key, GATE, {"all": PROBE_LOGITS})["all"]
    np.testing.assert_allclose(z, np.tile(expected, (3, 1)), rtol=1e-6)


def test_gates_are_drawn_at_the_temperature_of_their_step():
    z, _ = probed(probe(temperature=temperature), 30)
    now = GATE.at_temperature(temperature(jnp.int32(30)))
    key = jax.random.fold_in(ROOT, 30)
    expected = gating.sample(key, now, {"all": PROBE_LOGITS})["all"]
    np.testing.assert_allclose(z[0], expected, rtol=1e-5)
    assert not np.allclose(z, probed(probe(), 30)[0])


def test_per_example_draws_are_independent_and_have_the_law_of_the_gate():
    n = 4096  # A power of two: the mean over examples rounds nothing.
    z, after = probed(probe(True, examples=n), 0, examples=n)
    z = z.astype(np.float64)
    assert len(np.unique(z[:, 2])) > n / 2
    error = 5 * z.std(0) / math.sqrt(n)
    np.testing.assert_array_less(np.abs(z.mean(0) - GATE.mean(PROBE_LOGITS)), error)
    p = np.asarray(GATE.prob_active(PROBE_LOGITS), np.float64)
    spread = 5 * np.sqrt(p * (1 - p) / n)
    np.testing.assert_array_less(np.abs((z != 0).mean(0) - p), spread)
    for one, other in ((z[:-1, 2], z[1:, 2]), (z[:, 1], z[:, 2])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(n)
    # The gradient of the mean is the mean of pathwise gradients, to 5 sigma of theirs.
    moved = np.asarray(PROBE_LOGITS - after.gates["logits"]["all"], np.float64)
    with jax.enable_x64(True):
        wide = jnp.asarray(PROBE_LOGITS, jnp.float64)
        slope = np.asarray(jax.vmap(jax.grad(GATE.mean))(wide))
    error = 5 * np.abs(WEIGHTS) * 0.3 / math.sqrt(n)
    np.testing.assert_array_less(np.abs(moved - WEIGHTS * slope), error)
    # And in the weights it is the mean of the draws themselves.
    found = 1 - np.asarray(after.params["w"], np.float64)
    np.testing.assert_allclose(found, WEIGHTS * z.mean(0), rtol=1e-4)


def test_per_example_losses_have_the_mean_of_shared_ones():
    """For one example the two are the same distribution: equal means over keys."""
    keys = jax.random.split(jax.random.key(5), 3000)
    means = []
    for per_example in (False, True):
        gate = train.Learned(GATE, 0.5, temperature, per_example=per_example)
        training = make(gate=gate)
        state, batch = training.start(ROOT), batch_of([0])

        def loss(key, state=state, batch=batch, training=training):
            return training.taken(state._replace(key=key), batch)[1]["loss"]

        losses = np.asarray(jax.jit(jax.vmap(loss))(keys), np.float64)
        assert losses.std() > 0.01
        means.append((losses.mean(), losses.var() / len(keys)))
    (one, a), (other, b) = means
    assert abs(one - other) < 5 * math.sqrt(a + b)


# --------------------------------------------------------- constraints and temperatures

SIZES = {"input": 6.0, "hidden": 2.0}


def constrained(rate=None, multipliers=0.5, **how):
    target = train.Target("density", 0.4, how="lagrangian", rate=multipliers)
    gate = train.Learned(GATE, keep_prob=0.5)
    return make(rate, gate=gate, price=None, target=target, **how)


def test_a_step_descends_on_weights_and_ascends_on_multipliers():
    """Each against what it is, worked out apart."""
    training = constrained(0.1, polyak=0.0)
    free = training.replace(target=None)
    state, batch = training.start(ROOT), batch_of(range(BATCH))
    one, metrics = stepped(training, state, batch)
    # A multiplier of 0 pushes nothing; it grows by the rate times the excess.
    alone, _ = stepped(free, state._replace(dual=()), batch)
    equal((one.params, one.gates), (alone.params, alone.gates))
    active = gating.prob_active(GATE, state.gates["logits"])
    left = 6 * active["input"].sum() + 2 * active["hidden"].sum()
    excess = float(left) / 36 / 0.4 - 1
    assert excess > 0
    assert float(one.dual.multipliers["density"]) == pytest.approx(0.5 * excess, 1e-4)
    assert float(metrics["excess of density"]) == pytest.approx(excess, 1e-4)
    assert float(metrics["multiplier of density"]) == 0
    # Then the logits go down by what the multiplier adds, the weights don't.
    pushed, _ = stepped(training, one, batch)
    unpushed, _ = stepped(free, one._replace(dual=()), batch)
    equal(pushed.params, unpushed.params)
    for name, size in SIZES.items():
        p = GATE.prob_active(one.gates["logits"][name])
        slope = 0.5 * excess * size / 36 / 0.4 * p * (1 - p)
        found = unpushed.gates["logits"][name] - pushed.gates["logits"][name]
        np.testing.assert_allclose(found, 0.1 * slope, rtol=1e-3, atol=1e-7)


def test_multipliers_survive_a_shrink():
    training = constrained()
    state, _ = epochs(training, training.start(ROOT), [1, 2])
    assert float(state.dual.multipliers["density"]) > 0
    _, small = training.without(state, KEEP)
    equal(small.dual, state.dual)


def test_a_trained_temperature_moves_within_its_range():
    low, high = 0.5, 0.7
    gate = train.Learned(GATE.at_temperature(0.6), 0.5, (low, high))
    found = {}
    for rate in (1e-3, 1.0):
        training = make(rate, gate=gate, polyak=0.0)
        begun = training.start(ROOT)
        assert float(jnp.exp(begun.gates["log_temperature"])) == pytest.approx(0.6)
        state, _ = epochs(training, begun, [1])
        found[rate] = float(jnp.exp(state.gates["log_temperature"]))
        now = training.gating.at(state.gates, state.step)
        assert float(now.temperature) == pytest.approx(found[rate])
    assert low < found[1e-3] < high
    assert found[1e-3] != pytest.approx(0.6, abs=1e-6)
    ends = (pytest.approx(low, rel=1e-5), pytest.approx(high, rel=1e-5))
    assert found[1.0] in ends, "a large step ends at the range's end"


# --------------------------------------------------------------------- one step


@jax.jit
def by_hand(state, batch):
    """One step of plain gradient descent, from the functional core."""
    now = GATE.at_temperature(temperature(state.step))
    key = jax.random.fold_in(ROOT, state.step)

    def total(params, logits):
        z = gating.sample(key, now, logits)
        outputs = apply(apply_gates(params, z, GROUPS), batch[0])
        task = jnp.square(outputs - batch[1]).mean()
        cost = OBJECTIVE(params, gating.prob_active(now, logits))
        return task + cost, (task, cost)

    theta = state.params, state.gates["logits"]
    slopes, parts = jax.grad(total, (0, 1), has_aux=True)(*theta)
    params, logits = jax.tree.map(lambda a, g: a - 0.1 * g, theta, slopes)
    return (params, gating.project(now, logits)), parts


def test_a_step_is_gradient_descent_on_loss_and_penalty():
    training = make(0.1)
    state = training.start(ROOT)
    for rows in ([0, 1, 2], [7, 8, 9], [4, 5, 6]):
        expected, (task, cost) = by_hand(state, batch_of(rows))
        state, metrics = training.step(state, batch_of(rows))
        close((state.params, state.gates["logits"]), expected, 1e-5, 1e-6)
        np.testing.assert_allclose(metrics["loss"], task, rtol=1e-5)
        np.testing.assert_allclose(metrics["penalty"], cost, rtol=1e-5)
        assert set(metrics) == {"loss", "penalty", "largest"}
    assert state.step == 3


def test_logits_are_projected_after_every_step():
    training = make(1e4)
    state, _ = stepped(training, training.start(ROOT), batch_of(range(BATCH)))
    logits = state.gates["logits"]
    values = jnp.concatenate(list(logits.values()))
    assert jnp.abs(values).max() == jnp.float32(GATE.limit)
    equal(gating.project(GATE, logits), logits)
    # The average is of what is used, not of what the optimiser proposed.
    average = training.averaged(state)[1]["logits"]
    close(average, logits, 1e-5, 0)


@pytest.mark.parametrize("frozen", ["params", "gates"])
def test_gates_and_weights_have_their_own_optimisers(frozen):
    rates = {"params": 0.1, "gates": 0.1, frozen: 0.0}
    training = make(optimizer=sgd(rates["params"]), gate_optimizer=sgd(rates["gates"]))
    before = training.start(ROOT)
    after, _ = stepped(training, before, batch_of(range(BATCH)))
    # As one, over what isn't trained here, they do the same.
    apart = train.gates_apart(sgd(rates["params"]), sgd(rates["gates"]))
    theta = {"params": before.params, "gates": before.gates}
    updates, _ = apart.update(theta, apart.init(theta), theta)
    for part in ("params", "gates"):
        stays = part == frozen
        for leaves in (
            (getattr(after, part), getattr(before, part)),
            (optax.apply_updates(theta, updates)[part], theta[part]),
        ):
            for a, b in zip(*map(jax.tree.leaves, leaves), strict=True):
                assert np.array_equal(a, b) == stays


def test_a_step_that_isnt_compiled_leaves_its_arguments_alone():
    training = make()
    state, batch = training.start(ROOT), batch_of(range(BATCH))
    kept = copied(state)
    after, _ = jax.eval_shape(lambda: training.taken(state, batch))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    equal(state, kept)


@pytest.mark.parametrize("polyak", [0.0, 0.8, 0.999])
def test_polyak_average_is_the_weighted_mean_of_the_past(polyak):
    training = make(polyak=polyak)
    state = training.start(ROOT)
    equal(training.averaged(state), (state.params, state.gates))
    past = []
    for t in range(1, 6):
        state, _ = training.step(state, batch_of(range(BATCH)))
        past.append(jax.tree.map(np.float64, (state.params, state.gates)))
        shares = [(1 - polyak) * polyak ** (t - 1 - i) for i in range(t)]
        mean = jax.tree.map(
            lambda *values, w=shares: (
                sum(a * b for a, b in zip(w, values, strict=True)) / sum(w)
            ),
            *past,
        )
        close(training.averaged(state), mean, 1e-4, 1e-5)
    moved = np.abs(past[0][0]["dense1"] - past[-1][0]["dense1"])
    assert moved.max() > 0.03


@pytest.mark.parametrize("polyak", [1.0, 1.5, -0.1, math.nan])
def test_a_decay_that_is_none_is_refused(polyak):
    with pytest.raises(ValueError, match=rf"polyak must lie in \[0, 1\), got {polyak}"):
        make(polyak=polyak)


# ------------------------------------------------------------------- of every dtype

FLOATS = {
    32: (
        *("float32", "bfloat16", "float16", "complex64"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"),
    ),
    64: ("float64", "complex128"),
}
PULL = np.float32([1.0, -2.0, 0.5])


def pulled(params, x):
    total = 0 * x.sum()
    for name, w in params.items():
        if name in (*FLOATS[32], *FLOATS[64]):
            real = w.real if jnp.issubdtype(w.dtype, jnp.complexfloating) else w
            total += (real.astype(jnp.float32) * PULL).sum()
    return total


def pulling(model, batch):
    return -model(batch), {}


def rising(rate):
    """Adds `rate` times `PULL` in each step."""

    def ascend(gradients, state, params):
        return jax.tree.map(lambda g: (-rate * g).astype(g.dtype), gradients), state

    return optax.GradientTransformation(lambda _: (), ascend)


def following(polyak, optimizer, dtypes=("float32",), **how):
    """Of weights of all these dtypes, and of what isn't trained."""
    params = {name: jnp.asarray([3.0, -0.7, 24.0]).astype(name) for name in dtypes}
    params |= {
        "count": jnp.int32([3, 4]),
        "seen": jnp.array([True, False]),
        "bits": jnp.uint8(7),
        "key": jax.random.key(5),
    }
    return train.Training(
        train.function(pulled, params),
        pulling,
        optimizer=optimizer,
        polyak=polyak,
        **({"gate_optimizer": sgd(0.1)} | how),
    )


@contextlib.contextmanager
def numbers_of(size):
    """Of up to so many bits; with 64 a loss of 32 needs to be promoted."""
    with (
        jax.enable_x64(size == 64),
        jax.numpy_dtype_promotion("standard" if size == 64 else "strict"),
    ):
        yield


def many(training, state, steps):
    """The state after so many steps, and of each of them weights and their average."""

    def one(state, _):
        after, _ = training.taken(state, np.ones((1, 1), np.float32))
        return after, (after.params, training.averaged(after)[0])

    return jax.jit(lambda state: jax.lax.scan(one, state, None, length=steps))(state)


@pytest.mark.sweep
@pytest.mark.parametrize("polyak", [0.9, 0.99999])
@pytest.mark.parametrize("size", FLOATS)
def test_the_average_of_what_never_moves_is_what_it_was(size, polyak):
    with numbers_of(size):
        training = following(polyak, rising(0.0), FLOATS[size])
        state = training.start(ROOT)
        begun = training.network.params
        after, (_, averages) = many(training, state, 3000)
        for each in (state, after):
            kinds = [leaf.dtype for leaf in jax.tree.leaves(begun)]
            found = training.averaged(each)[0]
            assert [leaf.dtype for leaf in jax.tree.leaves(found)] == kinds
            equal(found, begun)
        for dtype in FLOATS[size]:
            expected = np.tile(np.asarray(begun[dtype]), (3000, 1))
            np.testing.assert_array_equal(averages[dtype], expected)


@pytest.mark.sweep
@pytest.mark.parametrize("polyak", [0.0, 0.999])
@pytest.mark.parametrize("size", FLOATS)
def test_averages_of_every_dtype_are_those_of_wider_numbers(size, polyak):
    """As exact as the dtype they are given back in, though each change is small."""
    steps = 40
    shares = polyak ** np.arange(steps)[::-1]
    with numbers_of(size):
        training = following(polyak, rising(0.25), FLOATS[size])
        after, (path, averages) = many(training, training.start(ROOT), steps)
        read = training.averaged(after)[0]
    for dtype in FLOATS[size]:
        mine = np.asarray(path[dtype]).astype(np.complex128)
        assert (mine[0] != mine[-1]).any()
        expected = np.average(mine, axis=0, weights=shares)
        if polyak:
            kept = {"float64", "complex64", "complex128"} & {dtype}
            assert after.average["params"][dtype].dtype == (*kept, "float32")[0]
        assert read[dtype].dtype == dtype
        precision = max(float(jnp.finfo(dtype).eps), 1e-15)
        found = np.asarray(read[dtype]).astype(np.complex128)
        np.testing.assert_allclose(found, expected, rtol=4 * precision, err_msg=dtype)
        np.testing.assert_array_equal(averages[dtype][-1], read[dtype])


GATINGS = {
    "none": None,
    "learned": train.Learned(GATE, keep_prob=0.9),
    "chosen": train.Chosen({"units": np.array([True, False, True])}),
}


@pytest.mark.parametrize("name", GATINGS)
def test_integers_flags_and_keys_are_carried(name):
    how = {"gate": GATINGS[name], "gate_optimizer": adams()[1]}
    if name != "none":
        params = following(0.9, sgd(0.0)).network.params
        here = l0jax.trace(pulled, params, jnp.ones((1, 1))).only()
        how["structure"] = here.add(Group("units", 3, (Slot("float32", 0),)))
    training = following(0.9, relaxed(optax.adam(0.1)), **how)
    state = training.start(ROOT)
    after, _ = many(training, state, 3)
    moved = np.asarray(after.params["float32"] != state.params["float32"])
    assert moved[[0, 2]].all()
    assert moved[1] == (name != "chosen")
    theta = state.params, state.gates
    for now in (
        (after.params, after.gates),
        training.averaged(after),
        training.averaged(state),
    ):
        assert jax.tree.structure(now) == jax.tree.structure(theta)
        for again, leaf in zip(*map(jax.tree.leaves, (now, theta)), strict=True):
            assert again.dtype == leaf.dtype
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                equal(again, leaf)
    # The optimisers know of none of them: Adam has moments, and counts steps.
    known = {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(after.opt_state)}
    assert known == {((), "int32"), ((3,), "float32")}


# ----------------------------------------------------------------- many of them


def test_an_epoch_visits_each_example_once_in_a_fresh_order():
    orders = [
        np.asarray(train.order_of_epoch(key, epoch, EXAMPLES, BATCH))
        for key, epoch in itertools.product((ROOT, jax.random.key(9)), (1, 2, 3))
    ]
    for order in orders:
        assert order.shape == (STEPS, BATCH)
        assert len(np.unique(order)) == order.size
        assert order.min() >= 0
        assert order.max() < EXAMPLES
    assert len({order.tobytes() for order in orders}) == len(orders)
    equal(train.order_of_epoch(ROOT, 2, EXAMPLES, BATCH), orders[1])
    whole = np.sort(train.order_of_epoch(ROOT, 1, 48, 8).ravel())
    np.testing.assert_array_equal(whole, np.arange(48))
    # Over many epochs each example comes first equally often (5 sigma).
    firsts = jax.vmap(lambda e: train.order_of_epoch(ROOT, e, 5, 5)[0, 0])(
        jnp.arange(2000)
    )
    counts = np.bincount(np.asarray(firsts), minlength=5)
    assert np.abs(counts - 400).max() < 5 * math.sqrt(2000 * 0.2 * 0.8)


def test_a_run_is_its_steps_one_after_another():
    training = make()
    state, totals = epochs(training, training.start(ROOT), [1])
    sums, expected = {}, training.start(ROOT)
    for rows in train.order_of_epoch(ROOT, 1, EXAMPLES, BATCH):
        expected, metrics = training.step(expected, batch_of(rows))
        sums = {name: sums.get(name, 0.0) + float(m) for name, m in metrics.items()}
    close(state, expected, 1e-4, 1e-5)
    assert totals.steps == STEPS
    assert totals.first_bad_step == -1
    assert set(totals.sums) == set(sums)
    for name, value in sums.items():
        np.testing.assert_allclose(totals.sums[name], value, rtol=1e-4)


def test_one_trace_serves_all_epochs():
    """Law 5: annealing, schedules and the epoch's number are data, not constants."""
    traces = []

    def traced(params, x):
        traces.append(1)
        return apply(params, x)

    training = make(apply=traced)
    state, after = training.start(ROOT), []
    for epoch in range(4):
        order = train.order_of_epoch(ROOT, epoch, EXAMPLES, BATCH)
        state, _ = training.epoch(state, data(), order)
        after.append(len(traces))
    assert after[0] == after[-1]
    assert 0 < after[0] <= 2, "a trace of the run and of its loop"


def lowered(examples):
    training = make()
    order = train.order_of_epoch(ROOT, 1, examples, BATCH)[:3]
    program = jax.jit(training.epoch)
    return program.lower(training.start(ROOT), data(examples), order).as_text()


def test_the_data_set_is_an_argument_and_no_constant():
    small, large = lowered(40), lowered(40_000)
    assert "40000x4xf32" in large
    assert abs(len(large) - len(small)) < 2000
    assert max(map(len, large.splitlines())) < 20_000


def test_a_run_is_given_its_state_and_nothing_else():
    training = make()
    state, whole = training.start(ROOT), copied(data())
    order = train.order_of_epoch(ROOT, 1, EXAMPLES, BATCH)
    training.epoch(state, whole, order)
    assert all(a.is_deleted() for a in jax.tree.leaves((state.params, state.gates)))
    others = (whole, order, ROOT, training.network.params)
    assert not any(a.is_deleted() for a in jax.tree.leaves(others))


STILL = optax.set_to_zero()


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_loss_that_is_not_finite_is_marked(bad, loop):
    training = make(optimizer=STILL, gate_optimizer=STILL, polyak=0.0)
    inputs, targets = data()
    order, marked = train.order_of_epoch(ROOT, 1, EXAMPLES, BATCH), []
    for spoilt in (None, 3, 0):
        wrong = targets
        if spoilt is not None:
            # This step and the one after it: the first counts.
            rows = jnp.concatenate([order[spoilt, :1], order[spoilt + 1, :1]])
            wrong = targets.at[rows].set(bad)
        state = training.start(ROOT)._replace(step=jnp.int32(7))
        state, totals = training.epoch(state, (inputs, wrong), order, loop=loop)
        marked.append(int(totals.first_bad_step))
        # What is left is as it was, or the marks would say what follows from it.
        equal(state.params, training.network.params)
    assert marked == [-1, 7 + 3, 7]


def test_a_penalty_that_is_not_finite_is_added_as_such():
    totals = train.Totals(jnp.int32(0), {"loss": jnp.zeros(())}, jnp.int32(-1))
    fine = {"loss": jnp.float32(1), "penalty": jnp.float32(2)}
    for broken in ({"loss": jnp.float32(jnp.nan)}, {"penalty": jnp.float32(jnp.inf)}):
        after = train.add(totals, fine, jnp.int32(4))
        after = train.add(after, {**fine, **broken}, jnp.int32(5))
        after = train.add(after, {**fine, **broken}, jnp.int32(6))
        assert (int(after.steps), int(after.first_bad_step)) == (3, 5)


@pytest.mark.parametrize("loop", [False, True])
def test_in_a_run_a_penalty_that_is_not_finite_is_marked_too(loop):
    """The first weight is 3 + t / 4 in step t, and too large from 3.75 on."""

    def penalty(params):
        first = jax.lax.stop_gradient(params["float32"][0])
        return jnp.where(first > 3.6, jnp.inf, 0.0)

    training = following(0.0, rising(0.25), penalty=penalty)
    state = training.start(ROOT)
    order = np.zeros((6, 1), np.int32)
    after, totals = training.epoch(state, np.ones((1, 1), np.float32), order, loop=loop)
    assert float(after.params["float32"][0]) == 3 + 6 / 4
    assert (int(totals.steps), int(totals.first_bad_step)) == (6, 3)


def test_training_lowers_the_loss_and_closes_the_gates_of_unread_inputs():
    """The sign of everything: the target reads one input of four."""
    both = relaxed(optax.adam(3e-2))
    training = make(
        gate=train.Learned(GATE, keep_prob=0.5),
        price=0.3 / 64,
        weight_decay=0.0,
        polyak=0.0,
        optimizer=both,
        gate_optimizer=both,
    )
    x = jnp.float32(np.random.default_rng(3).normal(size=(64, 4)))
    whole = (x, jnp.tanh(x[:, :1]) * jnp.float32([[1.0, -1.0]]))
    state, losses = training.start(ROOT), []
    for epoch in range(40):
        order = train.order_of_epoch(ROOT, epoch, 64, 8)
        state, totals = training.epoch(state, whole, order)
        losses.append(totals.means["loss"])
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    active = gating.prob_active(GATE, state.gates["logits"])["input"]
    assert active[0] > 0.9
    assert active[1:].max() < 0.5


# --------------------------------------------------------- training on with fewer units

KEEP = {"input": np.array([1, 0, 1, 1], bool)}
KEEP["hidden"] = np.array([1, 1, 0, 1, 0, 1], bool)


def surviving(tree):
    """What is left of any array, told by its shape: each says what it holds."""
    inside, hidden = KEEP["input"], KEEP["hidden"]
    cut = {
        (4, 6): lambda a: a[inside][:, hidden],
        (6, 2): lambda a: a[hidden],
        (4,): lambda a: a[inside],
        (6,): lambda a: a[hidden],
        (): lambda a: a,
    }
    # (A key is two words.)
    return jax.tree.map(
        lambda a: cut[() if a.dtype == jnp.uint32 else a.shape](a),
        jax.tree.map(bits, tree),
    )


@functools.cache
def half_way():
    """A training, its state after two epochs, and both without some units."""
    training = make()
    state, _ = epochs(training, training.start(ROOT), [1, 2])
    # As after some calls of `compact`.
    closed = {"input": jnp.arange(4), "hidden": 4 + jnp.arange(6)}
    state = state._replace(closed=closed)
    kept = copied(state)
    smaller, small = training.without(state, KEEP)
    equal(state, kept)
    return training, state, smaller, small


def test_shrinking_keeps_what_belongs_to_the_surviving_units():
    """Parameters, logits, averages, and what the optimiser knows of each."""
    training, state, smaller, small = half_way()
    assert jax.tree.structure(small) == jax.tree.structure(state)
    equal(small, surviving(state))
    # There was something to tell apart.
    for part in (state.opt_state["params"], state.average["params"], state.params):
        widths = [a.shape for a in jax.tree.leaves(part) if a.ndim == 2]
        assert set(widths) == {(4, 6), (6, 2)}
    for part in (state.opt_state["gates"], state.average["gates"], state.gates):
        lengths = [a.shape for a in jax.tree.leaves(part) if a.ndim == 1]
        assert set(lengths) == {(4,), (6,)}
    arrays = jax.tree.leaves((state.opt_state, state.average, state.params))
    assert all(len(np.unique(a)) == a.size for a in arrays)
    assert smaller.gated == units.shrink_groups(training.network.params, KEEP, GROUPS)
    equal(smaller.alive, KEEP)


def test_shrinking_cuts_gates_of_single_weights_too():
    single = structure().add(Group("w", 24, (Slot("dense1", None),)))
    gate = train.Learned(GATE, only=("w",))
    training = make(structure=single, gate=gate)
    state = training.start(ROOT)
    state = state._replace(gates={"logits": {"w": jnp.arange(24.0)}})
    smaller, small = training.without(state, KEEP)
    kept = np.arange(24.0).reshape(4, 6)[np.ix_(KEEP["input"], KEEP["hidden"])]
    np.testing.assert_array_equal(small.gates["logits"]["w"], kept.ravel())
    equal(small.params, surviving(state.params))
    assert smaller.gated["w"].size == kept.size


@pytest.mark.parametrize("shrunk", [False, True])
def test_a_run_of_many_steps_goes_on_where_it_stopped(shrunk, tmp_path):
    """Law 7: 2n steps = n, save, load in a new program, n: bit for bit."""
    training, state, smaller, small = half_way()
    if shrunk:
        training, state = smaller, small
    once, totals = epochs(training, state, [3, 4])
    train.Checkpoints(tmp_path).save(2, training, state, {"best": 0.5})
    checkpoints = train.Checkpoints(tmp_path)
    again, loaded, done = checkpoints.restore(make(), jax.random.key(7))
    assert (done, checkpoints.notes) == (2, {"best": 0.5})
    equal(loaded, surviving(half_way()[1]) if shrunk else state)
    twice, resumed = epochs(again, loaded, [3, 4])
    assert jax.tree.structure(twice) == jax.tree.structure(once)
    equal(twice, once)
    equal(resumed, totals)
    assert once.step == 4 * STEPS
    equal(again.averaged(twice), training.averaged(once))
    # And it has gone on indeed.
    moved = np.abs(np.asarray(once.params["dense1"]) - state.params["dense1"])
    assert moved.shape == ((3, 4) if shrunk else (4, 6))
    assert (moved > 0).all()


def test_training_goes_on_as_if_lost_units_had_been_closed():
    """Gates that can't open any more, in place of units that are not there."""
    training, state, smaller, small = half_way()
    rng = np.random.default_rng(2)
    z = {n: jnp.float32(rng.uniform(0.2, 1, len(flags))) for n, flags in KEEP.items()}
    rows = range(BATCH)

    def loss(training, params, z, whole):
        gated = apply_gates(params, z, training.gated)
        return training.task(gated, None, batch_of(rows, whole), ROOT)[0]

    shut = {name: jnp.where(KEEP[name], each, 0) for name, each in z.items()}
    left = {name: each[KEEP[name]] for name, each in z.items()}
    closed = loss(training, state.params, shut, data())
    found = loss(smaller, small.params, left, data_for(smaller))
    np.testing.assert_allclose(found, closed, rtol=1e-5)
    assert abs(closed - loss(training, state.params, z, data())) > 1e-3
    after, totals = epochs(smaller, small, [3])
    assert totals.first_bad_step == -1
    assert after.step == state.step + STEPS


def test_an_optimiser_that_keeps_other_shapes_is_refused():
    """Adafactor keeps sums over rows and columns."""
    training = make(optimizer=relaxed(optax.adafactor(1e-2, min_dim_size_to_factor=2)))
    state = training.start(ROOT)
    with pytest.raises(ValueError, match="the optimiser keeps") as error:
        training.without(state, KEEP)
    said = str(error.value)
    assert all(word in said for word in ("(4,)", "dense1", "(4, 6)", "told apart"))


@pytest.mark.parametrize("which", ["optimizer", "gate_optimizer"])
def test_a_number_in_the_place_of_an_array_needs_no_cut(which):
    """Of small arrays Adafactor keeps such placeholders."""
    training = make(**{which: relaxed(optax.adafactor(1e-2))})
    smaller, state = training.without(training.start(ROOT), KEEP)
    _, totals = epochs(smaller, state, [3])
    assert totals.first_bad_step == -1


def test_what_can_not_be_shrunk_is_named():
    training = make()
    state = training.start(ROOT)
    with pytest.raises(ValueError, match="'heads'"):
        training.without(state, {"heads": np.ones(3, bool)})
    with pytest.raises(ValueError, match=r"'hidden' has 6 units.*\(5,\)"):
        training.without(state, {"hidden": np.ones(5, bool)})


GONE = {"hidden": np.zeros(6, bool), "input": np.zeros(4, bool)}


def mean_square_of_targets(training, state):
    """Of an epoch, and what is left of its loss after it."""
    assert state.params["dense2"].shape == (0, 2)
    order = train.order_of_epoch(ROOT, 3, EXAMPLES, BATCH)
    inputs, targets = data()
    _, totals = training.epoch(state, (inputs[:, :0], targets), order)
    used = np.asarray(targets)[np.asarray(order).ravel()]
    np.testing.assert_allclose(totals.means["loss"], np.square(used).mean(), rtol=1e-4)


def test_training_goes_on_without_a_group():
    """Zero is a size: what is left trains, here the mean of the targets alone."""
    training, state, *_ = half_way()
    mean_square_of_targets(*training.without(state, GONE))


def test_training_begins_without_a_unit():
    params = units.shrink(weights(), GONE, GROUPS)
    training = train.Training(
        train.function(apply, params),
        squared,
        structure=structure().shrink(GONE),
        gate=GATE,
        price=2.0 / EXAMPLES,
        weight_decay=1e-3,
        optimizer=adams()[0],
        gate_optimizer=adams()[1],
        polyak=POLYAK,
    )
    mean_square_of_targets(training, training.start(ROOT))


def beside(params, x):
    """A hidden layer beside a linear one."""
    return apply(params, x) + x @ params["direct"]


def test_training_goes_on_without_a_branch():
    """What is left is linear regression, which is worked out by hand."""
    params = weights() | {"direct": jnp.float32([[1, 2], [0, 1], [-1, 0], [0.5, 3]])}
    training = train.Training(
        train.function(beside, params),
        squared,
        EXAMPLE,
        gate=GATE,
        price=2.0 / EXAMPLES,
        optimizer=sgd(0.1),
        gate_optimizer=sgd(0.1),
        polyak=POLYAK,
    )
    (name,) = training.gated
    state, _ = training.step(training.start(ROOT), batch_of(range(BATCH)))
    smaller, small = training.without(state, {name: np.zeros(6, bool)})
    assert small.params["dense1"].shape == (4, 0)
    w = np.asarray(small.params["direct"], np.float64)
    for rows in train.order_of_epoch(ROOT, 3, EXAMPLES, BATCH):
        x, targets = map(np.float64, batch_of(rows))
        off = x @ w - targets
        small, metrics = smaller.step(small, batch_of(rows))
        np.testing.assert_allclose(metrics["loss"], np.square(off).mean(), rtol=1e-4)
        w -= 0.1 * 2 * x.T @ off / off.size
        np.testing.assert_allclose(small.params["direct"], w, rtol=1e-4, atol=1e-5)
    assert small.gates["logits"][name].shape == (0,)
