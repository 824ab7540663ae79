"""Laws of the training step: what is drawn when, and that nothing else matters.

Two tiny networks: one with two dense layers, and one whose outputs *are* its gates.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l0jax import constraints, gates, gating, objectives, storage, train, units
from l0jax.estimators import ESTIMATORS
from l0jax.units import Group, Slot, apply_gates

GATE = gates.HardConcrete()
ROOT = jax.random.key(0)
GROUPS = {
    "input": Group("input", 4, (Slot("dense1", 0),)),
    "hidden": Group("hidden", 6, (Slot("dense2", 0),), (Slot("dense1", 1),)),
}
EXAMPLES, BATCH = 50, 8
OBJECTIVE = objectives.penalty(GROUPS, 2.0, EXAMPLES, weight_decay=1e-3)
POLYAK = 0.8


def apply(params, x):
    return jnp.tanh(x @ params["dense1"]) @ params["dense2"]


def squared(outputs, targets):
    error = jnp.square(outputs - targets).mean()
    return error, {"largest": jnp.abs(outputs).max()}


def temperature(step):
    return 0.9 * 0.97 ** step.astype(jnp.float32)


def relaxed(optimizer):
    """Adam and its schedules raise a float to the power of an integer count."""

    def update(*args):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*args)

    return optax.GradientTransformation(optimizer.init, update)


def adam():
    rate = optax.linear_schedule(3e-2, 1e-3, 20, 3)
    return relaxed(train.gates_apart(optax.adam(rate), optax.adam(0.1)))


def theta(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "dense1": jnp.float32(rng.normal(size=(4, 6))),
            "dense2": jnp.float32(rng.normal(size=(6, 2))),
        },
        "gates": gating.init(jax.random.key(seed), GATE, GROUPS, 0.5),
    }


def data(examples=EXAMPLES, seed=1):
    rng = np.random.default_rng(seed)
    inputs = jnp.float32(rng.normal(size=(examples, 4)))
    return inputs, jnp.float32(rng.normal(size=(examples, 2)))


def make(optimizer=None, apply=apply, **how):
    optimizer = adam() if optimizer is None else optimizer
    how = {"polyak": POLYAK, "temperature": temperature, **how}
    return train.make_step(apply, squared, OBJECTIVE, GATE, GROUPS, optimizer, **how)


def start(optimizer=None, seed=0):
    return train.init(theta(seed), adam() if optimizer is None else optimizer)


def batch_of(rows, examples=EXAMPLES):
    return jax.tree.map(lambda a: a[np.asarray(rows)], data(examples))


def epochs(run, step, state, which, examples=EXAMPLES):
    """Trains the epochs `which`; the totals are those of the last."""
    whole = data(examples)
    for epoch in which:
        totals = train.no_totals(step, state, batch_of(range(BATCH), examples), ROOT)
        order = train.order_of_epoch(ROOT, epoch, examples, BATCH)
        state, totals = run(state, totals, whole, order, ROOT)
    return state, totals


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# ------------------------------------------------------------------- what is drawn

PROBE = {"all": Group("all", 5, (Slot("w", 0),))}
PROBE_LOGITS = jnp.float32([-1.5, -0.5, 0.0, 0.8, 2.0])


def probe(per_example, gate=GATE, rate=1.0, **how):
    """A step whose metric `z` holds the gates as the network met them."""

    def gates_of(params, x):
        return jnp.broadcast_to(params["w"][None], (x.shape[0], 5))

    def loss(outputs, targets):
        return (outputs @ targets).mean(), {"z": outputs}

    return train.make_step(
        gates_of,
        loss,
        lambda params, prob_active: jnp.zeros(()),
        gate,
        PROBE,
        optax.sgd(rate),
        per_example=per_example,
        **how,
    )


def probed(step, at, key=ROOT, examples=3):
    state = train.init(
        {"params": {"w": jnp.ones(5)}, "gates": {"all": PROBE_LOGITS}}, optax.sgd(1.0)
    )
    state = state._replace(step=jnp.int32(at))
    batch = (jnp.zeros((examples, 1)), jnp.float32([1, 2, 3, -1, -2]))
    # Targets are the same vector for every example: mapped over examples, unread.
    new, metrics = jax.jit(step)(state, batch, key)
    return np.asarray(metrics["z"]), new


@pytest.mark.parametrize("per_example", [False, True])
def test_steps_draw_their_own_gates_and_nothing_else_matters(per_example):
    step = probe(per_example)
    first, _ = probed(step, 3)
    equal(probed(step, 3)[0], first)
    for at, key in ((4, ROOT), (3, jax.random.key(1)), (0, ROOT)):
        assert not np.array_equal(probed(step, at, key)[0], first)


FAMILIES = {name: family() for name, family in gates.GATES.items()}
FAMILIES |= {f"mixture-{n}": gates.Mixture(pair()) for n, pair in gates.PAIRS.items()}


@pytest.mark.parametrize("gate", FAMILIES.values(), ids=list(FAMILIES))
def test_steps_of_every_family_draw_their_own_gates(gate):
    """Law 5: the same step draws the same, another one others, if there is noise."""
    step = probe(False, gate)
    first, after = probed(step, 3)
    equal(probed(step, 3), (first, after))
    assert np.array_equal(probed(step, 4)[0], first) is not gate.random
    moved = np.asarray(after.theta["gates"]["all"]) - np.asarray(PROBE_LOGITS)
    assert np.isfinite(moved).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_step_follows_its_estimator(name):
    """The gradients in logits and in weights are those of the surrogate, the metrics
    those of its draws."""
    gate, ones = gates.Bernoulli(temperature=0.5), jnp.ones(5)
    step = jax.jit(probe(False, gate, 0.1, estimator=ESTIMATORS[name]))
    theta = {"params": {"w": ones}, "gates": {"all": PROBE_LOGITS}}
    batch = (jnp.zeros((3, 1)), jnp.float32([1, 2.3, 3.7, -1.1, -2.9]))

    def surrogate(logits, w, at):
        def loss(z):
            return (z["all"] * w) @ batch[1]

        key = jax.random.fold_in(ROOT, at)
        return ESTIMATORS[name](key, {"all": logits / 0.5}, loss)

    total = np.zeros(5)
    for at in range(6):
        state = train.init(theta, optax.sgd(0.1))._replace(step=jnp.int32(at))
        after, metrics = step(state, batch, ROOT)
        value, slopes = jax.value_and_grad(surrogate, (0, 1))(PROBE_LOGITS, ones, at)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5, atol=1e-6)
        for found, start, slope in (
            (after.theta["gates"]["all"], PROBE_LOGITS, slopes[0]),
            (after.theta["params"]["w"], ones, slopes[1]),
        ):
            moved = (start - found) / 0.1  # (Further, logits would be clipped.)
            np.testing.assert_allclose(moved, slope, rtol=1e-4, atol=1e-4)
        total += np.abs(slopes[0])
    # (Two draws that are the same say nothing; of six pairs some differ.)
    assert (total > 0).sum() >= 3


def test_estimators_are_for_bernoulli_gates_drawn_once_for_a_batch():
    arm = ESTIMATORS["arm"]
    with pytest.raises(ValueError, match="HardConcrete gates have gradients of their"):
        probe(False, estimator=arm)
    with pytest.raises(ValueError, match="once for a batch, not per example"):
        probe(True, gates.Bernoulli(), estimator=arm)


# --------------------------------------------------------- constraints and temperatures

SIZES = {"input": 6.0, "hidden": 2.0}


def constrained(target=0.4, **how):
    return constraints.lagrangian(
        constraints.density(SIZES, {"input": 24.0, "hidden": 12.0}), target, **how
    )


def test_a_step_descends_on_weights_and_ascends_on_multipliers():
    """Each against what it is, worked out apart."""
    constraint = constrained(optimizer=optax.sgd(0.5))
    optimizer = optax.sgd(0.1)
    step = make(optimizer, polyak=0.0, temperature=None, constraint=constraint)
    state = train.init(theta(), optimizer, constraint)
    batch = batch_of(range(BATCH))
    free, _ = jax.jit(make(optimizer, polyak=0.0, temperature=None))(state, batch, ROOT)
    one, metrics = jax.jit(step)(state, batch, ROOT)
    # A multiplier of 0 pushes nothing; it grows by the rate times the excess.
    equal(one.theta, free.theta)
    active = gating.prob_active(GATE, state.theta["gates"])
    left = 6 * active["input"].sum() + 2 * active["hidden"].sum()
    excess = float(left) / 36 / 0.4 - 1
    assert excess > 0
    assert float(one.dual.multipliers["density"]) == pytest.approx(0.5 * excess, 1e-4)
    assert float(metrics["excess of density"]) == pytest.approx(excess, 1e-4)
    assert float(metrics["multiplier of density"]) == 0
    # Then the logits go down by what the multiplier adds, the weights don't.
    pushed, _ = jax.jit(step)(one, batch, ROOT)
    bare = train.init(one.theta, optimizer)._replace(step=one.step)
    unpushed, _ = jax.jit(make(optimizer, polyak=0.0, temperature=None))(
        bare, batch, ROOT
    )
    equal(pushed.theta["params"], unpushed.theta["params"])
    for name, size in SIZES.items():
        p = GATE.prob_active(one.theta["gates"][name])
        slope = 0.5 * excess * size / 36 / 0.4 * p * (1 - p)
        found = unpushed.theta["gates"][name] - pushed.theta["gates"][name]
        np.testing.assert_allclose(found, 0.1 * slope, rtol=1e-3, atol=1e-7)


def test_multipliers_survive_a_shrink():
    constraint = constrained()
    state = train.init(theta(), adam(), constraint)
    step = make(constraint=constraint)
    state = epochs(train.make_run(step), step, state, [1, 2])[0]
    assert float(state.dual.multipliers["density"]) > 0
    small = train.shrink(state, KEEP, GROUPS)
    equal(small.dual, state.dual)


def test_a_trained_temperature_moves_within_its_range():
    low, high = 0.5, 0.7
    start_at = {**theta(), "log_temperature": jnp.log(jnp.float32(0.6))}
    found = {}
    for rate in (1e-3, 1.0):
        optimizer = optax.sgd(rate)
        step = make(optimizer, polyak=0.0, temperature=(low, high))
        state, _ = epochs(
            train.make_run(step), step, train.init(start_at, optimizer), [1]
        )
        found[rate] = float(jnp.exp(state.theta["log_temperature"]))
        now = train.gate_at(GATE, (low, high), state.step, state.theta)
        assert float(now.temperature) == pytest.approx(found[rate])
    assert low < found[1e-3] < high
    assert found[1e-3] != pytest.approx(0.6, abs=1e-6)
    ends = (pytest.approx(low, rel=1e-5), pytest.approx(high, rel=1e-5))
    assert found[1.0] in ends, "a large step ends at the range's end"


def test_gates_of_a_step_are_those_of_its_key():
    z, _ = probed(probe(False), 3)
    key = jax.random.fold_in(ROOT, 3)
    expected = gating.sample(key, GATE, {"all": PROBE_LOGITS})["all"]
    np.testing.assert_allclose(z, np.tile(expected, (3, 1)), rtol=1e-6)


def test_gates_are_drawn_at_the_temperature_of_their_step():
    z, _ = probed(probe(False, temperature=temperature), 30)
    now = GATE.at_temperature(temperature(jnp.int32(30)))
    expected = gating.sample(jax.random.fold_in(ROOT, 30), now, {"all": PROBE_LOGITS})[
        "all"
    ]
    np.testing.assert_allclose(z[0], expected, rtol=1e-5)
    assert not np.allclose(z, probed(probe(False), 30)[0])


def test_per_example_draws_are_independent_and_have_the_law_of_the_gate():
    n = 4000
    z, new = probed(probe(True), 0, examples=n)
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
    moved = np.asarray(PROBE_LOGITS - new.theta["gates"]["all"], np.float64)
    targets = np.array([1, 2, 3, -1, -2])
    with jax.enable_x64(True):
        wide = jnp.asarray(PROBE_LOGITS, jnp.float64)
        slope = np.asarray(jax.vmap(jax.grad(GATE.mean))(wide))
    error = 5 * np.abs(targets) * 0.3 / math.sqrt(n)
    np.testing.assert_array_less(np.abs(moved - targets * slope), error)


def test_per_example_losses_have_the_mean_of_shared_ones():
    """For one example the two are the same distribution: equal means over keys."""
    keys = jax.random.split(jax.random.key(5), 3000)
    state, batch, means = start(), batch_of([0]), []
    for per_example in (False, True):
        step = make(per_example=per_example)

        def loss(key, step=step):
            return step(state, batch, key)[1]["loss"]

        losses = np.asarray(jax.jit(jax.vmap(loss))(keys), np.float64)
        means.append((losses.mean(), losses.var() / len(keys)))
    (one, a), (other, b) = means
    assert abs(one - other) < 5 * math.sqrt(a + b)


# --------------------------------------------------------------------- one step


def by_hand(state, batch, rate=0.1):
    """One step of plain gradient descent, from the functional core."""
    now = GATE.at_temperature(temperature(state.step))
    key = jax.random.fold_in(ROOT, state.step)

    def total(theta):
        z = gating.sample(key, now, theta["gates"])
        outputs = apply(apply_gates(theta["params"], z, GROUPS), batch[0])
        task = squared(outputs, batch[1])[0]
        cost = OBJECTIVE(theta["params"], gating.prob_active(now, theta["gates"]))
        return task + cost, (task, cost)

    slopes, parts = jax.grad(total, has_aux=True)(state.theta)
    new = jax.tree.map(lambda a, g: a - rate * g, state.theta, slopes)
    new["gates"] = gating.project(now, new["gates"])
    return new, parts


def test_a_step_is_gradient_descent_on_loss_and_penalty():
    sgd = optax.sgd(0.1)
    state, step = start(sgd), jax.jit(make(sgd))
    for rows in ([0, 1, 2], [7, 8, 9], [4, 5, 6]):
        expected, (task, cost) = by_hand(state, batch_of(rows))
        state, metrics = step(state, batch_of(rows), ROOT)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            state.theta,
            expected,
        )
        np.testing.assert_allclose(metrics["loss"], task, rtol=1e-5)
        np.testing.assert_allclose(metrics["penalty"], cost, rtol=1e-5)
        assert set(metrics) == {"loss", "penalty", "largest"}
    assert state.step == 3


def test_logits_are_projected_after_every_step():
    sgd = optax.sgd(1e4)
    state, _ = make(sgd)(start(sgd), batch_of(range(BATCH)), ROOT)
    values = jnp.concatenate(list(state.theta["gates"].values()))
    assert jnp.abs(values).max() == jnp.float32(GATE.limit)
    equal(gating.project(GATE, state.theta["gates"]), state.theta["gates"])
    # The average is of what is used, not of what the optimiser proposed.
    average = train.averaged(state, POLYAK)["gates"]
    for name, values in state.theta["gates"].items():
        np.testing.assert_allclose(average[name], values, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["params", "gates"])
def test_gates_and_weights_have_their_own_optimisers(frozen):
    rates = {"params": optax.sgd(0.1), "gates": optax.sgd(0.1), frozen: optax.sgd(0.0)}
    optimizer = train.gates_apart(rates["params"], rates["gates"])
    before = start(optimizer)
    state, _ = make(optimizer)(before, batch_of(range(BATCH)), ROOT)
    for part in ("params", "gates"):
        leaves = zip(
            jax.tree.leaves(state.theta[part]),
            jax.tree.leaves(before.theta[part]),
            strict=True,
        )
        assert all(np.array_equal(a, b) == (part == frozen) for a, b in leaves)


def test_a_step_leaves_its_arguments_alone():
    state = start()
    kept = jax.tree.map(np.array, state)
    make()(state, batch_of(range(BATCH)), ROOT)
    equal(state, kept)


@pytest.mark.parametrize("polyak", [0.0, 0.8, 0.999])
def test_polyak_average_is_the_weighted_mean_of_the_past(polyak):
    step, state = jax.jit(make(polyak=polyak)), start()
    equal(train.averaged(state, polyak), state.theta)
    past = []
    for t in range(1, 6):
        state, _ = step(state, batch_of(range(BATCH)), ROOT)
        past.append(jax.tree.map(np.float64, state.theta))
        weights = [(1 - polyak) * polyak ** (t - 1 - i) for i in range(t)]
        mean = jax.tree.map(
            lambda *values, w=weights: (
                sum(a * b for a, b in zip(w, values, strict=True)) / sum(w)
            ),
            *past,
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            train.averaged(state, polyak),
            mean,
        )


@pytest.mark.parametrize("polyak", [1.0, 1.5, -0.1, math.nan])
def test_a_decay_that_is_none_is_refused(polyak):
    with pytest.raises(ValueError, match=rf"polyak must lie in \[0, 1\), got {polyak}"):
        make(polyak=polyak)


FLOATS = [
    *("float64", "float32", "bfloat16", "float16", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"),
]
PULL = jnp.float32([1.0, -2.0, 0.5])


def following(dtype, rate, polyak, optimizer=None):
    """A step that adds `rate` times `PULL` to weights of `dtype`, and its state."""

    def pulled(params, x):
        real = params["w"].real if dtype.startswith("complex") else params["w"]
        return (real.astype(jnp.float32) * PULL).sum() + 0 * x.sum()

    def descend(gradients, state, params):
        return jax.tree.map(lambda g: (-rate * g).astype(g.dtype), gradients), state

    optimizer = optimizer or optax.GradientTransformation(lambda _: (), descend)
    step = train.make_step(
        pulled,
        lambda output, _: (-output, {}),
        lambda params, terms: jnp.float32(0),
        GATE,
        {},
        optimizer,
        polyak=polyak,
    )
    carried = {
        "count": jnp.int32([3, 4]),
        "seen": jnp.array([True, False]),
        "bits": jnp.uint8(7),
        "key": jax.random.key(5),
    }
    params = {"w": jnp.asarray([3.0, -0.7, 24.0]).astype(dtype), **carried}
    return step, train.init({"params": params, "gates": {}}, optimizer)


def many(step, state, steps):
    batch = (np.ones((1, 1), np.float32),) * 2
    one = jax.jit(lambda state, _: (step(state, batch, ROOT)[0], state.theta["params"]))
    return jax.lax.scan(one, state, None, length=steps)


@pytest.mark.parametrize("polyak", [0.9, 0.99999])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_average_of_what_never_moves_is_what_it_was(dtype, polyak):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        step, state = following(dtype, 0.0, polyak)
        for steps in (0, 1, 3000):
            after, _ = many(step, state, steps)
            found = train.averaged(after, polyak)
            assert all(
                a.dtype == b.dtype
                for a, b in zip(
                    *map(jax.tree.leaves, (found, state.theta)), strict=True
                )
            )
            np.testing.assert_array_equal(
                found["params"]["w"], state.theta["params"]["w"]
            )


@pytest.mark.parametrize("polyak", [0.0, 0.999])
@pytest.mark.parametrize("dtype", FLOATS)
def test_averages_of_every_dtype_are_those_of_wider_numbers(dtype, polyak):
    """As exact as the dtype they are given back in, though each change is small."""
    steps = 40
    with jax.enable_x64(dtype in ("float64", "complex128")):
        step, state = following(dtype, 0.25, polyak)
        after, before = many(step, state, steps)
        # The values after each step.
        path = np.asarray(before["w"]).astype(np.complex128)[1:]
        last = np.asarray(after.theta["params"]["w"]).astype(np.complex128)
        path = np.concatenate([path, last[None]])
        assert (path[0] != path[-1]).any()
        weights = polyak ** np.arange(steps)[::-1]
        expected = np.average(path, axis=0, weights=weights)
        assert after.average["params"]["w"].dtype == {
            "float64": "float64",
            "complex64": "complex64",
            "complex128": "complex128",
        }.get(dtype, "float32")
        found = train.averaged(after, polyak)["params"]["w"]
        assert found.dtype == dtype
        precision = max(float(jnp.finfo(dtype).eps), 1e-15)
        np.testing.assert_allclose(
            np.asarray(found).astype(np.complex128), expected, rtol=4 * precision
        )


@pytest.mark.parametrize(
    "optimizer",
    [optax.adam(0.1), train.gates_apart(optax.adam(0.1), optax.sgd(0.1))],
    ids=["one", "apart"],
)
def test_integers_flags_and_keys_are_carried(optimizer):
    step, state = following("float32", 0.0, 0.9, relaxed(optimizer))
    after, _ = many(step, state, 3)
    assert (after.theta["params"]["w"] != state.theta["params"]["w"]).all()
    for found in (after.theta, train.averaged(after, 0.9), train.averaged(state, 0.9)):
        assert jax.tree.structure(found) == jax.tree.structure(state.theta)
        for name, leaf in state.theta["params"].items():
            if name != "w":
                again = found["params"][name]
                assert again.dtype == leaf.dtype
                equal(
                    *(
                        a if name != "key" else jax.random.key_data(a)
                        for a in (again, leaf)
                    )
                )


# ----------------------------------------------------------------- many of them


def test_an_epoch_visits_each_example_once_in_a_fresh_order():
    orders = [
        np.asarray(train.order_of_epoch(key, epoch, EXAMPLES, BATCH))
        for key, epoch in itertools.product((ROOT, jax.random.key(9)), (1, 2, 3))
    ]
    for order in orders:
        assert order.shape == (EXAMPLES // BATCH, BATCH)
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
    step = make()
    state, totals = epochs(train.make_run(step), step, start(), [1])
    single, sums, expected = jax.jit(step), {}, start()
    for rows in train.order_of_epoch(ROOT, 1, EXAMPLES, BATCH):
        expected, metrics = single(expected, batch_of(rows), ROOT)
        sums = {name: sums.get(name, 0.0) + float(m) for name, m in metrics.items()}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        state,
        expected,
    )
    assert totals.steps == EXAMPLES // BATCH
    assert totals.first_bad_step == -1
    assert set(totals.sums) == set(sums)
    for name, value in sums.items():
        np.testing.assert_allclose(totals.sums[name], value, rtol=1e-4)


def test_training_goes_on_where_it_stopped(tmp_path):
    """Law 7: 2n steps = n, save, load in a new program, n: bit for bit."""
    step = make()
    once, totals = epochs(train.make_run(step), step, start(), [1, 2, 3, 4])

    half, _ = epochs(train.make_run(step), step, start(), [1, 2])
    checkpoints = storage.Checkpoints(tmp_path)
    checkpoints.save(2, half, {"best": 0.5})
    fresh = make()
    told = []

    def like(notes):
        told.append(notes)
        return start(seed=7)

    at, loaded, notes = storage.Checkpoints(tmp_path).restore(like, pytest.fail)
    assert told == [notes]
    assert (at, notes) == (2, {"best": 0.5})
    equal(loaded, half)
    twice, resumed = epochs(train.make_run(fresh), fresh, loaded, [3, 4])
    assert jax.tree.structure(twice) == jax.tree.structure(once)
    equal(twice, once)
    equal(resumed, totals)
    assert once.step == 4 * (EXAMPLES // BATCH)
    equal(train.averaged(twice, POLYAK), train.averaged(once, POLYAK))


# --------------------------------------------------------- training on with fewer units

KEEP = {"input": np.array([1, 0, 1, 1], bool)}
KEEP["hidden"] = np.array([1, 1, 0, 1, 0, 1], bool)


def of_the_rest(params, x):
    """The network of the inputs that are left."""
    return apply(params, x[:, KEEP["input"]])


def small_step():
    groups = units.shrink_groups(theta()["params"], KEEP, GROUPS)
    return train.make_step(
        of_the_rest,
        squared,
        objectives.penalty(groups, 2.0, EXAMPLES, weight_decay=1e-3),
        GATE,
        groups,
        adam(),
        polyak=POLYAK,
        temperature=temperature,
    )


def surviving(state):
    """What is left of any array, told by its shape: each says what it holds."""
    inside, hidden = KEEP["input"], KEEP["hidden"]
    cut = {
        (4, 6): lambda a: a[inside][:, hidden],
        (6, 2): lambda a: a[hidden],
        (4,): lambda a: a[inside],
        (6,): lambda a: a[hidden],
        (): lambda a: a,
    }
    return jax.tree.map(lambda a: cut[a.shape](np.asarray(a)), state)


def trained_for_a_while():
    step = make()
    return epochs(train.make_run(step), step, start(), [1, 2])[0]


def test_shrinking_keeps_what_belongs_to_the_surviving_units():
    """Parameters, logits, averages, and what the optimiser knows of each."""
    state = trained_for_a_while()
    small = train.shrink(state, KEEP, GROUPS)
    assert jax.tree.structure(small) == jax.tree.structure(state)
    equal(small, surviving(state))
    # There was something to tell apart.
    for part in (state.opt_state, state.average, state.theta):
        widths = [a.shape for a in jax.tree.leaves(part) if a.ndim == 2]
        assert set(widths) == {(4, 6), (6, 2)}
        assert all(len(np.unique(a)) == a.size for a in jax.tree.leaves(part))
    equal(state, trained_for_a_while())


def test_shrinking_cuts_gates_of_single_weights_too():
    single = {"w": Group("w", 24, (Slot("dense1", None),))}
    begun = {"params": theta()["params"], "gates": {"w": jnp.arange(24.0)}}
    state = train.init(begun, adam())
    small = train.shrink(state, KEEP, {**GROUPS, **single})
    kept = np.arange(24.0).reshape(4, 6)[np.ix_(KEEP["input"], KEEP["hidden"])]
    np.testing.assert_array_equal(small.theta["gates"]["w"], kept.ravel())
    assert small.theta["params"]["dense1"].shape == kept.shape


def test_training_goes_on_across_a_shrink(tmp_path):
    """Law 7: what was shrunk, through save and load in a new program: bit for bit."""
    half = trained_for_a_while()
    small, step = train.shrink(half, KEEP, GROUPS), small_step()
    storage.Checkpoints(tmp_path).save(2, small, {"keep": "some"})
    once, totals = epochs(train.make_run(step), step, small, [3, 4])
    fresh = small_step()

    def like(notes):
        assert notes == {"keep": "some"}
        return train.shrink(start(seed=7), KEEP, GROUPS)

    found = storage.Checkpoints(tmp_path).restore(like, pytest.fail)
    assert found is not None
    equal(found[1], surviving(half))
    twice, resumed = epochs(train.make_run(fresh), fresh, found[1], [3, 4])
    equal(twice, once)
    equal(resumed, totals)
    assert once.step == 4 * (EXAMPLES // BATCH)
    assert once.theta["params"]["dense1"].shape == (3, 4)
    # And it has gone on indeed.
    moved = np.abs(
        np.asarray(once.theta["params"]["dense1"])
        - surviving(half.theta["params"]["dense1"])
    )
    assert (moved > 0).all()


def test_training_goes_on_as_if_lost_units_had_been_closed():
    """Gates that can't open any more, in place of units that are not there."""
    half = trained_for_a_while()
    small, step = train.shrink(half, KEEP, GROUPS), small_step()
    batch = batch_of(range(BATCH))
    smaller, metrics = jax.jit(step)(small, batch, ROOT)
    assert np.isfinite(metrics["loss"])
    z = {name: jnp.float32(flags) for name, flags in KEEP.items()}
    gated = apply(apply_gates(half.theta["params"], z, GROUPS), batch[0])
    np.testing.assert_allclose(
        of_the_rest(small.theta["params"], batch[0]), gated, rtol=1e-5, atol=1e-6
    )
    assert smaller.step == half.step + 1


@pytest.mark.parametrize("least", [2, 128])
def test_an_optimiser_that_keeps_other_shapes_is_refused(least):
    """Adafactor keeps sums over rows and columns, or a placeholder in their place."""
    optimizer = train.gates_apart(
        optax.adafactor(1e-2, min_dim_size_to_factor=least), optax.adam(1e-2)
    )
    with jax.numpy_dtype_promotion("standard"):
        state = train.init(theta(), optimizer)
    with pytest.raises(ValueError, match="the optimiser keeps") as error:
        train.shrink(state, KEEP, GROUPS)
    said = str(error.value)
    shape = "(4,)" if least == 2 else "(1,)"
    assert all(word in said for word in (shape, "dense1", "(4, 6)", "told apart"))


def test_what_can_not_be_shrunk_is_named():
    state = start()
    with pytest.raises(ValueError, match="'heads'"):
        train.shrink(state, {"heads": np.ones(3, bool)}, GROUPS)
    with pytest.raises(ValueError, match=r"'hidden' has 6 units.*\(5,\)"):
        train.shrink(state, {"hidden": np.ones(5, bool)}, GROUPS)


def test_training_goes_on_without_a_group():
    """Zero is a size: what is left trains, here the mean of the targets alone."""
    state = trained_for_a_while()
    gone = {"hidden": np.zeros(6, bool), "input": np.zeros(4, bool)}
    small = train.shrink(state, gone, GROUPS)
    assert small.theta["params"]["dense2"].shape == (0, 2)
    groups = units.shrink_groups(state.theta["params"], gone, GROUPS)
    step = train.make_step(
        apply,
        squared,
        objectives.penalty(groups, 2.0, EXAMPLES, weight_decay=1e-3),
        GATE,
        groups,
        adam(),
        polyak=POLYAK,
        temperature=temperature,
    )
    inputs, targets = data()
    whole = inputs[:, :0], targets
    first = jax.tree.map(lambda a: a[:BATCH], whole)
    order = train.order_of_epoch(ROOT, 3, EXAMPLES, BATCH)
    totals = train.no_totals(step, small, first, ROOT)
    small, totals = train.make_run(step)(small, totals, whole, order, ROOT)
    assert int(totals.first_bad_step) == -1
    used = np.asarray(targets)[np.asarray(order).ravel()]
    loss = float(totals.sums["loss"]) / int(totals.steps)
    np.testing.assert_allclose(loss, np.square(used).mean(), rtol=1e-4)


def test_one_trace_serves_all_epochs():
    """Law 5: annealing, schedules and the epoch's number are data, not constants."""
    traces = []

    def traced(params, x):
        traces.append(1)
        return apply(params, x)

    step = make(apply=traced)
    run = train.make_run(step)
    batch, state = batch_of(range(BATCH)), start()
    empty = jax.tree.map(np.asarray, train.no_totals(step, state, batch, ROOT))
    after = []
    for epoch in range(4):
        totals = jax.tree.map(jnp.asarray, empty)
        order = train.order_of_epoch(ROOT, epoch, EXAMPLES, BATCH)
        state, _ = run(state, totals, data(), order, ROOT)
        after.append(len(traces))
    assert after[0] == after[-1]
    assert after[0] <= 3, "no_totals, and one trace of the run and of its loop"


def lowered(examples):
    step = make()
    state, batch = start(), batch_of(range(BATCH), examples)
    totals = train.no_totals(step, state, batch, ROOT)
    order = train.order_of_epoch(ROOT, 1, examples, BATCH)[:3]
    run = train.make_run(step)
    return run.lower(state, totals, data(examples), order, ROOT).as_text()


def test_the_data_set_is_an_argument_and_no_constant():
    small, large = lowered(40), lowered(40_000)
    assert "40000x4xf32" in large
    assert abs(len(large) - len(small)) < 2000
    assert max(map(len, large.splitlines())) < 20_000


def test_the_state_is_donated():
    step = make()
    state, batch, whole = start(), batch_of(range(BATCH)), data()
    totals = train.no_totals(step, state, batch, ROOT)
    order = train.order_of_epoch(ROOT, 1, EXAMPLES, BATCH)
    train.make_run(step)(state, totals, whole, order, ROOT)
    assert all(a.is_deleted() for a in jax.tree.leaves(state.theta))
    assert not any(a.is_deleted() for a in jax.tree.leaves((whole, order, ROOT)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_loss_that_is_not_finite_is_marked(bad):
    step = make(optax.sgd(0.0))
    run = train.make_run(step)
    inputs, targets = data()
    state, marked = start(optax.sgd(0.0)), []
    for epoch, spoilt in ((1, None), (2, 3), (3, 0)):
        totals = train.no_totals(step, state, batch_of(range(BATCH)), ROOT)
        order = train.order_of_epoch(ROOT, epoch, EXAMPLES, BATCH)
        wrong = targets
        if spoilt is not None:
            # This step and the one after it: the first counts.
            rows = jnp.concatenate([order[spoilt, :1], order[spoilt + 1, :1]])
            wrong = targets.at[rows].set(bad)
        state, totals = run(state, totals, (inputs, wrong), order, ROOT)
        marked.append(int(totals.first_bad_step))
    steps = EXAMPLES // BATCH
    assert marked == [-1, steps + 3, 2 * steps]


def test_a_penalty_that_is_not_finite_is_marked_too():
    totals = train.Totals(jnp.int32(0), {"loss": jnp.zeros(())}, jnp.int32(-1))
    fine = {"loss": jnp.float32(1), "penalty": jnp.float32(2)}
    for broken in ({"loss": jnp.float32(jnp.nan)}, {"penalty": jnp.float32(jnp.inf)}):
        after = train.add(totals, fine, jnp.int32(4))
        after = train.add(after, {**fine, **broken}, jnp.int32(5))
        after = train.add(after, {**fine, **broken}, jnp.int32(6))
        assert (int(after.steps), int(after.first_bad_step)) == (3, 5)


def test_training_lowers_the_loss_and_closes_the_gates_of_unread_inputs():
    """The sign of everything: the target reads one input of four."""
    optimizer = relaxed(optax.adam(3e-2))
    objective = objectives.penalty(GROUPS, 0.3, 64)
    step = train.make_step(apply, squared, objective, GATE, GROUPS, optimizer)
    x = jnp.float32(np.random.default_rng(3).normal(size=(64, 4)))
    whole = (x, jnp.tanh(x[:, :1]) * jnp.float32([[1.0, -1.0]]))
    batch = jax.tree.map(lambda a: a[:8], whole)
    state, run, losses = start(optimizer), train.make_run(step), []
    for epoch in range(40):
        totals = train.no_totals(step, state, batch, ROOT)
        order = train.order_of_epoch(ROOT, epoch, 64, 8)
        state, totals = run(state, totals, whole, order, ROOT)
        losses.append(float(totals.sums["loss"]) / int(totals.steps))
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    active = gating.prob_active(GATE, state.theta["gates"])["input"]
    assert active[0] > 0.9
    assert active[1:].max() < 0.5
