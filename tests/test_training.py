"""Training of users' networks: the laws of the core, for every kind of network."""

import math
import re
import warnings
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

import l0jax
import l0jax.nnx
from l0jax import costs, estimators, gates, gating, objectives, train, units
from l0jax.methods import relocation
from l0jax.train import training as core
from l0jax.train.placement import Placement
from tests import training_models as models

SGD = optax.sgd(0.05, momentum=0.9)
ADAM = optax.adam(1e-1)
STEPS = 10 * 15


@pytest.fixture(autouse=True)
def promotion_of_optax():
    with jax.numpy_dtype_promotion("standard"):
        yield


def training_of(name="nnx", **settings):
    make, loss = models.MODELS[name]
    settings = {
        "gate": gates.HardConcrete(),
        "target": train.Target(costs.macs, 0.3, warm_up=STEPS // 2),
        "optimizer": SGD,
        "gate_optimizer": ADAM,
        "polyak": 0.97,
    } | settings
    settings.setdefault("compaction", train.Compaction(below=0.5, after=1, at=1.0))
    return train.Training(make(), loss, models.EXAMPLE, **settings)


def trained(training, state, first=0, last=10, widths=None):
    """So many epochs, after some of which the dead are taken out."""
    for epoch in range(first, last):
        state, _ = training.epoch(state, models.batches(epoch))
        if epoch == 7:
            training, state = training.compact(state)
        if widths is not None:
            widths.append({n: g.size for n, g in training.structure.groups.items()})
    return training, state


def bits(tree):
    """All leaves as what is stored."""
    leaves = jax.tree.leaves(tree)
    return [
        np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        for leaf in leaves
    ]


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def outputs(model, x):
    if isinstance(model, nnx.Module):
        return np.asarray(model(x))
    apply, variables = model
    return np.asarray(apply(variables, x))


# ---------------------------------------------------------------- networks of all kinds


@pytest.mark.sweep
@pytest.mark.parametrize("name", models.MODELS)
def test_a_network_is_trained_to_its_target_and_what_is_left_is_the_same(name):
    training = training_of(name)
    widths = []
    training, state = trained(
        training, training.start(jax.random.key(0)), last=14, widths=widths
    )
    assert widths[-1] != widths[0], "nothing was taken out of the running training"
    decision = training.decide(state)
    # Within one unit of the target, and not above it.
    one = 1 / min(group.size for group in training.structure.groups.values())
    assert -max(0.01, one) < decision.excess["macs"] <= 1e-9
    found = training.evaluate(state, models.validation())
    assert found["error"] < 0.2
    x = models.digits()[0][:64]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        small = training.finish(state)
    whole = training.whole_model(state)
    np.testing.assert_allclose(
        outputs(small, x), outputs(whole, x), rtol=1e-4, atol=1e-5
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(arrays(small))]
    assert shapes != [leaf.shape for leaf in jax.tree.leaves(arrays(whole))]


def arrays(model):
    return nnx.state(model) if isinstance(model, nnx.Module) else model[1]


def test_what_is_left_of_a_module_is_a_module_of_its_class():
    training = training_of()
    training, state = trained(training, training.start(jax.random.key(0)), last=4)
    with pytest.warns(UserWarning, match="undecided in training"):
        small = training.finish(state)
    assert type(small) is models.ConvNet
    assert small.first.kernel.shape[-1] == small.norm.scale.shape[0] < 8


class Recurrent(nnx.Module):
    """It writes keys of dropout, in training, and what a cell carries."""

    def __init__(self, rngs):
        self.cell = nnx.RNN(nnx.LSTMCell(8, 6, rngs=rngs))
        self.hidden = nnx.Linear(6, 12, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.hidden(self.cell(x[..., 0])[:, -1]))
        return self.out(self.dropout(x))


@pytest.mark.parametrize("gate", [None, gates.HardConcrete()])
def test_what_is_left_of_a_module_can_be_trained_on(gate):
    training = train.Training(
        Recurrent(nnx.Rngs(0)),
        models.loss,
        models.EXAMPLE,
        gate=gate,
        price=None if gate is None else 1e-4,
        optimizer=SGD,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        small = training.finish(training.start(jax.random.key(0)))
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(nnx.state(small)))
    images = models.digits()[0][:5]
    small(images)
    small.train()
    assert np.abs(np.asarray(small(images) - small(images))).max() > 0


@pytest.mark.parametrize("gate", [None, gates.HardConcrete()])
def test_what_is_left_of_a_function_has_arrays_of_jax(gate):
    training = training_of("function", gate=gate, target=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _, variables = training.finish(training.start(jax.random.key(0)))
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(variables))


def test_the_users_arrays_survive():
    model = models.ConvNet(nnx.Rngs(0))
    before = bits(nnx.state(model))
    training = train.Training(
        model,
        models.loss,
        models.EXAMPLE,
        gate=gates.HardConcrete(),
        price=1e-4,
        optimizer=SGD,
    )
    training.epoch(training.start(jax.random.key(0)), models.batches(0))
    for one, other in zip(before, bits(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert model.dropout.deterministic is False


def test_running_statistics_and_keys_of_dropout_move():
    training = training_of()
    state = training.start(jax.random.key(0))
    before = dict(zip(units.arrays(state.rest), bits(state.rest), strict=True))
    state, _ = training.epoch(state, models.batches(0))
    after = dict(zip(units.arrays(state.rest), bits(state.rest), strict=True))
    moved = {path for path in before if (before[path] != after[path]).any()}
    assert moved == {
        "norm.mean",
        "norm.var",
        "other.mean",
        "other.var",
        "dropout.rngs.count",
    }


# ----------------------------------------------------------------------- law 10: resume


GATINGS = {
    "hard_concrete": {},
    "bernoulli": {"gate": gates.Bernoulli()},
    "stochastic": {"gate": gates.Stochastic()},
    "mixture": {"gate": gates.Mixture(), "target": None, "price": 1e-4},
    "trained temperature": {
        "gate": train.Learned(gates.HardConcrete(), temperature=(0.3, 1.0))
    },
    "annealed": {
        "gate": train.Learned(
            gates.HardConcrete(),
            temperature=optax.exponential_decay(0.66, STEPS, 0.5),
        )
    },
    "arm": {"gate": train.Learned(gates.Bernoulli(), estimator=estimators.arm)},
    "closing": {
        "gate": train.Chosen(
            {"first": np.arange(48) < 30},
            relocation.Closing(stochastic=True),
            steps=STEPS,
        ),
        "target": None,
    },
    "fixed": {"gate": train.Chosen({"first": np.arange(48) < 30}), "target": None},
    "none": {"gate": None, "target": None},
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", GATINGS)
def test_a_run_that_was_killed_goes_on_bit_for_bit(name, tmp_path):
    def begin():
        return training_of("function", **GATINGS[name])

    key = jax.random.key(3)
    first = begin()
    at_once = trained(first, first.start(key), last=4)[1]
    _, state = trained(first, first.start(key), last=2)
    train.Checkpoints(tmp_path).save(2, first, state, {"best": 0.5})
    del first, state
    checkpoints = train.Checkpoints(tmp_path)
    again, state, done = checkpoints.restore(begin(), jax.random.key(99))
    assert (done, checkpoints.notes) == (2, {"best": 0.5})
    state = trained(again, state, first=2, last=4)[1]
    for one, other in zip(bits(at_once), bits(state), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["nnx", "linen", "function_with_rest"])
def test_it_goes_on_bit_for_bit_after_units_were_taken_out(name, tmp_path):
    key = jax.random.key(3)
    widths = []
    begin = training_of(name)
    at_once = trained(begin, begin.start(key), widths=widths)[1]
    saved = next(at for at, w in enumerate(widths, 1) if w != widths[0])
    assert saved < 10, "units must go before the run is killed"
    train.Checkpoints(tmp_path).save(
        saved, *trained(begin, begin.start(key), last=saved)
    )
    again, state, done = train.Checkpoints(tmp_path).restore(training_of(name), key)
    assert again.structure.arrays != begin.structure.arrays
    state = trained(again, state, first=done)[1]
    for one, other in zip(bits(at_once), bits(state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_a_checkpoint_a_run_begins(tmp_path):
    training = training_of("perceptron")
    again, state, done = train.Checkpoints(tmp_path).restore(
        training, jax.random.key(0)
    )
    assert again is training
    assert done == 0
    for one, other in zip(
        bits(state), bits(training.start(jax.random.key(0))), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    training = training_of("perceptron")
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, training, training.start(jax.random.key(0)))
    other = training_of("perceptron", gate=gates.Bernoulli())
    with pytest.raises(ValueError, match=r"its gates are Learned\(HardConcrete"):
        checkpoints.restore(other, jax.random.key(0))
    with pytest.raises(ValueError, match="its groups are"):
        checkpoints.restore(training_of("nnx"), jax.random.key(0))
    other = training_of("perceptron", optimizer=optax.adam(1e-3))
    with pytest.raises(ValueError, match="disagree at 'opt_state"):
        checkpoints.restore(other, jax.random.key(0))


def test_a_truncated_checkpoint_is_passed_over(tmp_path):
    training = training_of("perceptron")
    checkpoints = train.Checkpoints(tmp_path)
    key = jax.random.key(0)
    checkpoints.save(1, training, training.start(key))
    state, _ = training.epoch(training.start(key), models.batches(0))
    checkpoints.save(2, training, state)
    (tmp_path / "2.json").write_text("{")
    with pytest.warns(UserWarning, match="damaged; going back to the one before"):
        assert checkpoints.restore(training, key)[2] == 1


# -------------------------------------------------------------------- law 11: one trace


def test_a_width_is_compiled_once_and_equal_trainings_share_it(monkeypatch):
    taken, traced = core._take, []

    def counted(training, *rest):
        traced.append(training)
        return taken(training, *rest)

    monkeypatch.setattr(
        core, "_step", jax.jit(counted, static_argnums=0, donate_argnums=1)
    )
    widths = []
    begin = training_of()
    trained(begin, begin.start(jax.random.key(0)), widths=widths)
    different = {tuple(each.items()) for each in widths} | {
        tuple((n, g.size) for n, g in begin.structure.groups.items())
    }
    assert len(traced) == len(different) > 1
    again = training_of()
    assert again == begin
    trained(again, again.start(jax.random.key(1)), last=2)
    assert len(traced) == len(different)
    other = training_of(target=train.Target(costs.macs, 0.4, warm_up=STEPS // 2))
    assert other != begin


def test_no_array_is_captured_in_the_program():
    training = training_of()
    state = training.start(jax.random.key(0))
    batch = next(models.batches(0))
    text = core._step.lower(training, state, batch).as_text()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    constants = re.findall(r"stablehlo.constant dense<([^>]*)>", text)
    assert max(map(len, constants)) < parameters
    # Of the batch and the parameters there are none among the constants.
    assert len(text) < 4e5


def test_a_step_gives_its_state_away():
    training = training_of("perceptron")
    state = training.start(jax.random.key(0))
    training.step(state, next(models.batches(0)))
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(state.params["first"]["kernel"])


# ----------------------------------------------------------------- law 12: many devices

ON_EIGHT = """
import jax, numpy as np, optax
from jax.sharding import Mesh
from l0jax import costs, gates, train
from tests import training_models as models

assert len(jax.devices()) == 8
losses = {}
mesh = Mesh(np.asarray(jax.devices()), ("data",))
for name, (make, loss) in models.MODELS.items():
    if name == "linen" or name == "nnx":
        rate = 1e-3  # Batch statistics: roundings grow.
    else:
        rate = 0.05
    for on in (None, mesh):
        training = train.Training(
            make(), loss, models.EXAMPLE, gate=gates.HardConcrete(),
            target=train.Target(costs.macs, 0.3, warm_up=30),
            optimizer=optax.sgd(rate, momentum=0.9), mesh=on,
        )
        state = training.start(jax.random.key(0))
        losses[on is None] = []
        for epoch in range(4):
            for batch in models.batches(epoch, size=96):
                state, metrics = training.step(state, batch)
                losses[on is None].append(float(metrics["loss"]))
    apart = np.abs(np.subtract(losses[True], losses[False]))[:50].max()
    text = train.training._step.lower(
        training, state, training.split(batch)
    ).compile().as_text()
    gathers = text.count(" all-gather(") + text.count(" collective-permute(")
    print(name, apart, gathers)
"""


WITHIN_EIGHT = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh
from l0jax import gates, train
from l0jax.train import epochs
from tests import training_models as models

mesh = Mesh(np.asarray(jax.devices()), ("data",))
make, loss = models.MODELS["perceptron"]
data = next(models.batches(0, size=96))
order = jnp.arange(4 * 96).reshape(4, 96) % 96
totals = []
for on in (None, mesh):
    training = train.Training(
        make(), loss, models.EXAMPLE, gate=gates.HardConcrete(), price=1e-3,
        optimizer=optax.sgd(0.05), mesh=on,
    )
    state = training.start(jax.random.key(0))
    text = epochs._scan.lower(training, state, data, order).compile().as_text()
    state, total = training.epoch(state, data, order)
    totals.append(total.means["loss"])
    print(text.count(" all-reduce("), "f32[12,64]" in text)
print(abs(totals[0] - totals[1]))
try:
    training.epoch(state, data, order[:, :90])
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_an_epoch_in_one_program_is_split_over_devices(run_python):
    alone, split, apart, refused = run_python(WITHIN_EIGHT, devices=8).splitlines()
    assert alone == "0 False"
    # Sums of gradients, and an eighth of the 96 examples on each device.
    assert int(split.split()[0]) > 0
    assert split.endswith(" True")
    assert float(apart) < 1e-6
    assert "can't be split evenly over 8 devices" in refused


@pytest.mark.slow
def test_eight_devices_train_as_one(run_python):
    lines = run_python(ON_EIGHT, devices=8).splitlines()
    assert len(lines) == len(models.MODELS)
    for line in lines:
        name, apart, gathers = line.split()
        assert float(apart) < 1e-5, name
        assert int(gathers) == 0, name


WITHOUT_WAITING = """
import jax, jax.numpy as jnp, numpy as np, optax
from l0jax import gates, train
from tests import training_models as models

make, loss = models.MODELS["perceptron"]
data = next(models.batches(0, size=96))
order = jnp.arange(2 * 96).reshape(2, 96) % 96

def training_of(**how):
    return train.Training(
        make(), loss, models.EXAMPLE, gate=gates.HardConcrete(), price=1e-3,
        optimizer=optax.sgd(0.05), **how,
    )

# (Its axes are of the type that models would have to know.)
training = training_of(mesh=jax.make_mesh((jax.device_count(),), ("data",)))
state = training.start(jax.random.key(0))
batch = training.split(data)
for _ in range(STEPS):
    state, metrics = training.step(state, batch)
jax.block_until_ready(state)
training.evaluate(state, (batch for _ in range(STEPS)))
training.recalibrate(state, [batch])  # of which there is nothing
for _ in range(STEPS // 4):
    state, totals = training.epoch(state, data, order)
jax.block_until_ready(state)
alone = training_of()
sweep = train.Sweep(lambda price: alone.replace(price=price), jnp.ones(8))
states = sweep.start([jax.random.key(0)] * 8)
orders = jnp.stack([order] * 8)
for _ in range(STEPS // 4):
    states, totals = sweep.epoch(states, data, orders)
jax.block_until_ready(states)
print(int(state.step), states.step.tolist())
"""


@pytest.mark.slow
def test_a_loop_that_never_waits_comes_to_an_end(run_python):
    """The threads of XLA's CPU client would all wait for one another."""
    program = WITHOUT_WAITING.replace("STEPS", "400")
    assert run_python(program, devices=8).split()[:2] == ["600", "[200,"]


def test_a_batch_that_cant_be_split_is_refused():
    auto = (AxisType.Auto,)
    three = Mock(spec=Mesh, axis_names=("data",), shape={"data": 3}, axis_types=auto)
    training = training_of("perceptron")
    training.placement = Placement(three)
    with pytest.raises(ValueError, match="can't be split evenly over 3 devices"):
        training.split((np.zeros((100, 8)), np.zeros(100)))


# ---------------------------------------------------------- law 13: during training too


@pytest.mark.sweep
@pytest.mark.parametrize("name", models.MODELS)
def test_a_step_is_the_same_without_the_units_whose_gates_are_closed(name):
    training = training_of(name)
    state, _ = training.epoch(training.start(jax.random.key(0)), models.batches(0))
    keep, own = {}, dict(state.gates["logits"])
    for group, logits in own.items():
        keep[group] = np.arange(len(logits)) % 3 != 0
        # No draw of a hard concrete gate is open at such logits.
        own[group] = jnp.where(keep[group], logits, -60.0)
    # (Steps of projection would clamp them: only the loss of the step is compared.)
    state = state._replace(gates={"logits": own})
    batch = next(models.batches(1))
    smaller, left = training.without(state, keep)

    def value(training, state):
        return training.task(
            training.gating.fold(
                state.params,
                state.gates,
                drawn(training, state),
                training._gated,
            ),
            state.rest,
            batch,
            state.key,
            training=name not in ("nnx", "linen"),
        )[0]

    def drawn(training, state):
        # The same draws: those of the units that are left.
        all_of = gating.sample(jax.random.key(5), gates.HardConcrete(), own)
        alive = training.alive
        return {n: jnp.asarray(np.asarray(z)[alive[n]]) for n, z in all_of.items()}

    np.testing.assert_allclose(value(training, state), value(smaller, left), rtol=1e-5)
    for path, leaf in units.arrays(left.opt_state["params"]).items():
        whole = units.arrays(state.opt_state["params"])[path]
        assert leaf.shape == whole.shape or leaf.size < whole.size


def test_momenta_and_averages_go_with_their_units():
    training = training_of("perceptron")
    state, _ = training.epoch(training.start(jax.random.key(0)), models.batches(0))
    keep = {"first": np.arange(48) % 2 == 0}
    before = jax.device_get(state)
    _, after = training.without(state, keep)
    for one, other in (
        (before.params, after.params),
        (before.average["params"], after.average["params"]),
        (before.opt_state["params"][0].trace, after.opt_state["params"][0].trace),
    ):
        np.testing.assert_array_equal(
            one["first"]["kernel"][:, ::2], other["first"]["kernel"]
        )
        np.testing.assert_array_equal(
            one["second"]["kernel"][::2], other["second"]["kernel"]
        )
    logits = before.gates["logits"]["first"]
    np.testing.assert_array_equal(logits[::2], after.gates["logits"]["first"])
    moments = before.opt_state["gates"][0].mu["logits"]["first"]
    np.testing.assert_array_equal(
        moments[::2], after.opt_state["gates"][0].mu["logits"]["first"]
    )


@pytest.mark.parametrize("row", ["gone", "shifted"])
def test_a_shift_is_that_of_the_units_that_are_left(row):
    """And units to which it is added are none that are closed."""
    keep = np.arange(32) % 2 == 0
    rows = keep if row == "gone" else keep | (np.arange(32) == 1)
    shift = jnp.outer(jnp.float32(rows), jnp.linspace(0.1, 0.2, 10))
    training = training_of(
        "perceptron",
        gate=train.Chosen(
            {"second": keep},
            relocation.Closing("cosine", share=0.5),
            2,
            {"out.kernel": shift},
        ),
        target=None,
    )
    state = training.start(jax.random.key(0))
    state, _ = training.step(state, next(models.batches(0)))
    small, after = training.compact(state)
    assert small.structure.groups["second"].size == rows.sum()
    x = models.digits()[0][:64]
    expected = training.whole_model(state)(x)
    np.testing.assert_allclose(small.whole_model(after)(x), expected, atol=1e-5)
    batch = next(models.batches(1))
    ours, _ = small.step(jax.tree.map(jnp.copy, after), batch)
    theirs, _ = training.step(state, batch)
    np.testing.assert_allclose(
        ours.params["out"]["kernel"], theirs.params["out"]["kernel"][rows], atol=1e-5
    )
    np.testing.assert_allclose(small.finish(after)(x), expected, atol=1e-5)


def test_units_of_inputs_stay_with_the_data():
    model = models.Perceptron(nnx.Rngs(0))
    flat = [
        (images.reshape(len(images), -1), labels)
        for images, labels in (next(models.batches(0)),)
    ]
    structure = l0jax.trace(model, flat[0][0])
    training = train.Training(
        model,
        models.loss,
        structure=structure,
        gate=gates.HardConcrete(),
        price=1e-4,
        optimizer=SGD,
        compaction=train.Compaction(after=1, at=1.0),
    )
    state = training.start(jax.random.key(0))
    half = {
        name: jnp.where(jnp.arange(group.size) % 2 == 0, 5.0, -5.0)
        for name, group in structure.groups.items()
    }
    training, state = training.compact(state._replace(gates={"logits": half}))
    sizes = {n: g.size for n, g in training.structure.groups.items()}
    assert sizes == {"input": 64, "first": 24, "second": 16}
    training.step(state, flat[0])


def test_compacting_a_training_without_gates_changes_nothing():
    training = training_of("perceptron", gate=None, target=None)
    state = training.start(jax.random.key(0))
    again, after = training.compact(state)
    assert again is training
    assert after is state


def test_what_computes_from_its_sizes_goes_on_at_full_width():
    class Scaled(models.Perceptron):
        def __call__(self, x):
            x = nnx.relu(self.first(x.reshape(x.shape[0], -1)))
            x = x / x.shape[-1] ** 0.5
            return self.out(nnx.relu(self.second(x)))

    training = train.Training(
        Scaled(nnx.Rngs(0)),
        models.loss,
        models.EXAMPLE,
        gate=gates.HardConcrete(),
        target=train.Target(costs.macs, 0.3, warm_up=STEPS // 2),
        optimizer=optax.adam(1e-2),
        gate_optimizer=ADAM,
        compaction=train.Compaction(below=0.5, after=1, at=1.0),
    )
    with pytest.warns(UserWarning, match="training goes on at full width"):
        training, state = trained(training, training.start(jax.random.key(0)))
    assert training.structure.groups["first"].size == 48
    x = models.digits()[0][:32]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        small = training.finish(state)
    np.testing.assert_allclose(
        small(x), training.whole_model(state)(x), rtol=1e-4, atol=1e-5
    )


def test_a_stack_that_is_a_group_ends_as_a_narrowed_module():
    """Its layers remember sizes of one layer each, and can't tell which axis it is."""

    class Ensemble(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def make(rngs):
                return nnx.Linear(64, 8, rngs=rngs)

            self.members = make(rngs)
            self.out = nnx.Linear(8, 10, rngs=rngs)

        def __call__(self, x):
            x = x.reshape(len(x), -1)
            each = nnx.vmap(lambda one, x: one(x), in_axes=(0, None))(self.members, x)
            return self.out(nnx.relu(each.mean(0)))

    training = train.Training(
        Ensemble(nnx.Rngs(0)),
        models.loss,
        models.EXAMPLE,
        gate=gates.HardConcrete(),
        price=1e-4,
        optimizer=SGD,
        compaction=train.Compaction(after=1, at=1.0),
    )
    state = training.start(jax.random.key(0))
    logits = {
        name: jnp.where(jnp.arange(group.size) < 2, 9.0, -9.0)
        for name, group in training.structure.groups.items()
    }
    state = state._replace(gates={"logits": logits})
    with pytest.warns(UserWarning, match=r"full width.*remembers the sizes"):
        again, state = training.compact(state)
    assert again.structure.groups == training.structure.groups
    small = again.finish(state)
    assert type(small) is l0jax.nnx.Narrowed
    x = models.digits()[0][:5]
    np.testing.assert_allclose(small(x), again.whole_model(state)(x), atol=1e-5)


# ----------------------------------------------------------------- what is descended on


def test_a_step_is_the_derivative_of_loss_and_penalty():
    """Against a step that is written out: SGD on parameters and on logits."""
    training = training_of(
        "function",
        target=None,
        price=1e-5,
        weight_decay=1e-3,
        optimizer=optax.sgd(0.1),
        gate_optimizer=optax.sgd(0.5),
        polyak=0.0,
    )
    state = training.start(jax.random.key(0))
    batch = next(models.batches(0))
    gate, groups = gates.HardConcrete(), training.structure.groups
    params, logits = state.params, state.gates["logits"]

    def total(params, logits):
        z = gating.sample(jax.random.fold_in(state.key, 0), gate, logits)
        gated = units.apply_gates(params, z, groups)
        value, _ = models.loss(lambda x: models.apply(gated, x), batch)
        paid = sum(
            (n * p).sum()
            for n, p in zip(
                objectives.sizes(params, groups).values(),
                gating.l0_term(gate, logits).values(),
                strict=True,
            )
        )
        norms = objectives.penalty(groups, 0.0, 1, weight_decay=1e-3)
        return value + 1e-5 * paid + norms(params, gating.l0_term(gate, logits))

    slopes = jax.grad(total, (0, 1))(params, logits)
    wanted = jax.tree.map(lambda a, g: a - 0.1 * g, params, slopes[0])
    moved = jax.tree.map(lambda a, g: a - 0.5 * g, logits, slopes[1])
    after, _ = training.step(state, batch)
    for name, each in wanted.items():
        np.testing.assert_allclose(after.params[name], each, rtol=1e-4, atol=1e-6)
    for name, each in moved.items():
        np.testing.assert_allclose(
            after.gates["logits"][name], each, rtol=1e-4, atol=1e-6
        )


@pytest.mark.sweep
@pytest.mark.parametrize("name", estimators.ESTIMATORS)
def test_estimators_leave_what_a_network_writes_as_it_is(name):
    """Statistics are the means of draws; keys and counters are no numbers."""
    gate = train.Learned(gates.Bernoulli(), estimator=estimators.ESTIMATORS[name])
    training = training_of(gate=gate)
    before = training.start(jax.random.key(0))
    kinds = [(leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(before)]
    mean = np.asarray(before.rest["norm"]["mean"])
    after, _ = training.step(before, next(models.batches(0)))
    assert [(leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(after)] == kinds
    assert not np.array_equal(after.rest["norm"]["mean"], mean)


def test_a_penalty_of_the_users_is_added():
    plain = {"gate": None, "target": None, "optimizer": optax.sgd(0.1)}
    batch = next(models.batches(0))

    def sparse(params):
        return 0.01 * jnp.abs(params["norm"]["scale"]).sum()

    after = {}
    for penalty in (None, sparse):
        training = training_of("nnx", **plain, penalty=penalty)
        after[penalty], metrics = training.step(
            training.start(jax.random.key(0)), batch
        )
    assert float(metrics["penalty"]) == pytest.approx(0.08)
    shift = after[sparse].params["norm"]["scale"] - after[None].params["norm"]["scale"]
    np.testing.assert_allclose(shift, -0.1 * 0.01, rtol=1e-3)


def test_gates_for_each_example_have_the_mean_loss_of_networks_of_their_own():
    training = training_of(
        "perceptron",
        gate=train.Learned(gates.HardConcrete(), keep_prob=0.5, per_example=True),
    )
    state = training.start(jax.random.key(0))
    images, labels = next(models.batches(0))
    key = jax.random.fold_in(state.key, 0)
    values = []
    keys = jax.random.split(key, len(images))
    for at in range(4):
        z = gating.sample(keys[at], gates.HardConcrete(), state.gates["logits"])
        gated = units.apply_gates(state.params, z, training.structure.groups)
        batch = images[at : at + 1], labels[at : at + 1]
        values.append(training.task(gated, state.rest, batch, key)[0])
    found = training._task(
        state, (images[:4], labels[:4]), state.params, state.gates, key
    )
    few = jax.random.split(key, 4)
    np.testing.assert_array_equal(
        jax.random.key_data(few[0]), jax.random.key_data(keys[0])
    )
    np.testing.assert_allclose(found[0], np.mean(values), rtol=1e-5)
    both = training_of(gate=train.Learned(gates.HardConcrete(), per_example=True))
    state = both.start(jax.random.key(0))
    with pytest.raises(ValueError, match=r"can't write 'dropout\.rngs\.count' for all"):
        both.step(state, (images, labels))


def test_both_drivers_take_the_same_steps():
    training = training_of()
    images, labels = map(jnp.asarray, models.digits())
    order = train.order_of_epoch(jax.random.key(7), 1, 1500, 100)
    rows = [(images[each], labels[each]) for each in order]
    ways = [((rows,), {}), (((images, labels), order), {})]
    ways.append((((images, labels), order), {"loop": True}))
    states, means = [], []
    for given, named in ways:
        state, totals = training.epoch(
            training.start(jax.random.key(0)), *given, **named
        )
        states.append(state)
        means.append(totals.means)
    for state, mean in zip(states[1:], means[1:], strict=True):
        assert mean == pytest.approx(means[0], rel=1e-4)
        for one, other in zip(bits(states[0]), bits(state), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_lower_precision_is_that_of_the_network_alone():
    training = training_of(compute=jnp.bfloat16)
    seen = set()

    def loss(model, batch):
        seen.add(str(batch[0].dtype))
        seen.update(
            str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))
        )
        return models.loss(model, batch)

    training = training.replace(loss=loss)
    state = training.start(jax.random.key(0))
    before = [leaf.dtype for leaf in jax.tree.leaves(state)]
    state, totals = training.epoch(state, models.batches(0))
    assert seen == {"bfloat16"}
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == before
    assert totals.sums["loss"].dtype == jnp.float32
    plain = training_of()
    _, wide = plain.epoch(plain.start(jax.random.key(0)), models.batches(0))
    assert totals.means["loss"] == pytest.approx(wide.means["loss"], rel=0.05)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "setting",
    [
        lambda t, v: t.replace(gating=train.Learned(gates.HardConcrete(beta=v))),
        lambda t, v: t.replace(gating=train.Learned(gates.HardConcrete(), v)),
        lambda t, v: t.replace(weight_decay=v),
        lambda t, v: t.replace(target=train.Target(costs.macs, v)),
        lambda t, v: t.replace(target=train.Target(costs.macs, 0.5, rate=v)),
    ],
    ids=["beta", "keep_prob", "weight_decay", "target", "rate"],
)
def test_members_of_a_sweep_differ_in_any_number(setting):
    """Each is the training that has it from the start."""
    training = training_of("perceptron", polyak=0.0)
    values = np.float32([0.3, 0.6])
    sweep = train.Sweep(lambda value: setting(training, value), values)
    images, labels = map(jnp.asarray, models.digits())
    orders = np.arange(2 * 3 * 50).reshape(2, 3, 50)
    states = sweep.start([jax.random.key(3)] * 2)
    states, _ = sweep.epoch(states, (images, labels), orders)
    for at, value in enumerate(values):
        alone = setting(training, float(value))
        state, _ = alone.epoch(
            alone.start(jax.random.key(3)), (images, labels), orders[at]
        )
        one, other = map(bits, (train.member_of(states, at), state))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_what_no_sweep_can_differ_in_is_named():
    training = training_of("perceptron")
    sweep = train.Sweep(lambda v: training.replace(polyak=v), np.float32([0.1, 0.2]))
    states, data = sweep.start([jax.random.key(0)] * 2), (jnp.zeros((4, 1)),)
    with pytest.raises(ValueError, match="polyak is a constant of the program"):
        sweep.epoch(states, data, np.zeros((2, 1, 2), int))
    with pytest.raises(ValueError, match=r"members along their first axis.*\(\)"):
        train.Sweep(lambda v: training, [0.1, 0.2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_loss_of_any_float_is_trained_under_strict_promotion(dtype):
    def loss(model, batch):
        value, _ = models.loss(model, batch)
        images, labels = batch
        return value.astype(dtype), {"right": (model(images).argmax(-1) == labels)[:3]}

    training = training_of("perceptron", weight_decay=1e-3)
    training = training.replace(loss=loss, optimizer=optax.sgd(0.1))
    training = training.replace(gate_optimizer=optax.sgd(0.1))
    with jax.numpy_dtype_promotion("strict"):
        _, metrics = training.step(
            training.start(jax.random.key(0)), next(models.batches(0))
        )
    assert metrics["loss"].dtype == metrics["right"].dtype == jnp.float32


def test_members_of_a_sweep_are_runs_of_their_own():
    once = training_of("perceptron", target=None, price=1e-4, polyak=0.0)
    prices = np.asarray([1e-5, 3e-4], np.float32)
    sweep = train.Sweep(lambda price: once.replace(price=price), prices)
    keys = [jax.random.key(1), jax.random.key(2)]
    data = tuple(map(jnp.asarray, models.digits()))
    orders = jnp.stack([train.order_of_epoch(key, 0, 1500, 100) for key in keys])
    states, totals = sweep.epoch(sweep.start(keys), data, orders)
    for at, key in enumerate(keys):
        alone = sweep.of(at)
        assert alone.price == pytest.approx(prices[at])
        state, single = alone.epoch(alone.start(key), data, orders[at])
        found = train.member_of(totals, at)
        assert found.means == pytest.approx(single.means, rel=1e-4)
        for one, other in zip(
            bits(state), bits(train.member_of(states, at)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------- what is decided


@pytest.mark.sweep
@pytest.mark.parametrize("cost", [costs.macs, costs.params, costs.bytes, "density"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_budget_is_filled_and_not_exceeded(cost, share):
    training = training_of("perceptron", target=train.Target(cost, share))
    state = training.start(jax.random.key(4))
    decision = training.decide(state)
    assert decision.rule == "budget"
    assert max(decision.excess.values()) <= 1e-9
    # One more unit of any group would be too much.
    name = next(iter(decision.target))
    for group, z in decision.z.items():
        closed = np.flatnonzero(z == 0)
        assert closed.size, group
        keep = {n: np.asarray(v) != 0 for n, v in decision.z.items()}
        keep[group][closed[0]] = True
        left = training._budget.left(keep, training.structure)
        assert left[name] > share


def test_the_units_with_the_largest_logits_are_left():
    training = training_of("perceptron", target=train.Target(costs.macs, 0.5))
    state = training.start(jax.random.key(4))
    decision = training.decide(state)
    logits = {n: np.asarray(a) for n, a in state.gates["logits"].items()}
    # All that are left but those that filled the rest of the budget.
    cut = [logits[n][np.asarray(z) == 0].max() for n, z in decision.z.items()]
    for name, z in decision.z.items():
        mine = logits[name]
        kept = np.asarray(z) != 0
        assert mine[kept].min() >= mine[~kept].max()
        assert kept[mine > max(cut)].all()


def test_each_group_may_have_a_target_of_its_own():
    shares = {"first": 0.25, "second": 0.75}
    training = training_of("perceptron", target=train.Target("density", shares))
    decision = training.decide(training.start(jax.random.key(4)))
    left = {name: int((np.asarray(z) != 0).sum()) for name, z in decision.z.items()}
    assert left == {"first": 12, "second": 24}


def test_no_layer_goes_that_training_has_left():
    training = training_of(
        "perceptron", target=train.Target(costs.macs, 0.2), polyak=0.0
    )
    state = training.start(jax.random.key(4))
    logits = dict(state.gates["logits"])
    logits["second"] = logits["second"] - 1.0
    state = state._replace(gates={"logits": logits})
    keep = training.decide(state).z
    assert (keep["second"] != 0).any()


def test_what_was_decided_is_not_decided_again(monkeypatch):
    training = training_of(target=train.Target(costs.macs, 0.3))
    state = training.start(jax.random.key(0))
    found = {}
    for rule in ("paper", "budget"):
        decision = training.decide(state, rule)
        by_rule = (
            training.evaluate(state, models.validation(), rule=rule),
            training.recalibrate(state, models.batches(0), rule=rule).rest,
            bits(nnx.to_pure_dict(nnx.state(training.whole_model(state, rule)))),
        )
        with monkeypatch.context() as patch:
            patch.setattr(train.Training, "decide", None)
            decided = (
                training.evaluate(state, models.validation(), rule=decision),
                training.recalibrate(state, models.batches(0), rule=decision).rest,
                bits(
                    nnx.to_pure_dict(nnx.state(training.whole_model(state, decision)))
                ),
            )
        assert decided[0] == by_rule[0]
        for one, other in zip(decided[1:], by_rule[1:], strict=True):
            for a, b in zip(bits(one), bits(other), strict=True):
                np.testing.assert_array_equal(a, b)
        found[rule] = by_rule[0]
    assert found["paper"] != found["budget"]


def test_by_samples_gates_are_the_mean_of_their_draws():
    gate = train.Learned(gates.HardConcrete(), draws=4000)
    training = training_of("perceptron", gate=gate)
    state = training.start(jax.random.key(0))
    found = training.decide(state, "samples")
    for name, z in found.z.items():
        mean = gates.HardConcrete().mean(state.gates["logits"][name])
        np.testing.assert_allclose(z, mean, atol=5 * 0.5 / 4000**0.5)
        assert not np.array_equal(z, mean)
    again = training.decide(state, "samples")
    for name, z in found.z.items():
        np.testing.assert_array_equal(again.z[name], z)


@pytest.mark.sweep
@pytest.mark.parametrize("name", models.MODELS)
def test_a_network_that_has_lost_a_layer_is_finished(name):
    training = training_of(name, target=None, polyak=0.0)
    for dead in [[group] for group in training.structure.groups] + [
        [*training.structure.groups]
    ]:
        state = training.start(jax.random.key(0))
        logits = {
            n: jnp.full_like(a, -20.0 if n in dead else 3.0)
            for n, a in state.gates["logits"].items()
        }
        state = state._replace(gates={"logits": logits})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = training.finish(state)
        x = models.digits()[0][:5]
        expected = called(training.whole_model(state), x)
        np.testing.assert_allclose(called(small, x), expected, atol=1e-5)
        # It no longer depends on the inputs.
        np.testing.assert_allclose(expected, expected[:1].repeat(5, 0), atol=1e-5)


def called(model, x):
    if isinstance(model, tuple):
        apply, variables = model
        found = apply(variables, x)
    else:
        found = model(x)
    return np.asarray(found)


def test_decisions_name_what_is_undecided():
    training = training_of("perceptron", target=None, price=1e-4, polyak=0.0)
    state = training.start(jax.random.key(0))
    state = state._replace(
        gates={"logits": {"first": jnp.full(48, 5.0), "second": jnp.zeros(32)}}
    )
    decision = training.decide(state)
    assert decision.undecided == {"first": 0.0, "second": 1.0}
    with pytest.warns(UserWarning, match=r"'second' \(100 %\)") as record:
        training.finish(state)
    assert "'first'" not in str(record[0].message)


def test_costs_are_shares_of_the_whole_network_after_units_have_gone():
    training = training_of("perceptron")
    state = training.start(jax.random.key(0))
    before = training.decide(state)
    worst = {n: np.argsort(-np.asarray(a)) for n, a in state.gates["logits"].items()}
    keep = {n: np.ones(len(a), bool) for n, a in worst.items()}
    for name, order in worst.items():
        keep[name][order[-5:]] = False
    training, state = training.without(state, keep)
    after = training.decide(state)
    assert after.decided == pytest.approx(before.decided, rel=0.02)
    assert after.target == before.target
    full = training.full(after.z)
    assert {n: len(v) for n, v in full.items()} == {"first": 48, "second": 32}


def test_statistics_are_those_of_batches_under_the_gates_of_test_time():
    """Against Flax, of a module whose statistics forget all but the last batch."""
    training = training_of(polyak=0.0)
    state, _ = training.epoch(training.start(jax.random.key(0)), models.batches(0))
    wanted = []
    for batch in [*models.batches(1)][:3]:
        module = training.whole_model(state)
        module.train()
        module.dropout.deterministic = True  # Which comes after the last norm.
        for norm in (module.norm, module.other):
            norm.momentum = 0.0
        module(batch[0])
        wanted.append([module.norm.mean[...], module.other.var[...]])
    after = training.recalibrate(state, [*models.batches(1)][:3])
    found = [after.rest["norm"]["mean"], after.rest["other"]["var"]]
    for at, mine in enumerate(found):
        theirs = np.mean([each[at] for each in wanted], axis=0)
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="no batch to recalibrate with"):
        training.recalibrate(state, [])


def test_what_is_no_running_average_cant_be_recalibrated():
    def doubling(params, rest, x):
        return models.apply(params, x), {"seen": rest["seen"] ** 2 + x.mean()}

    network = train.function(doubling, models.function().params, {"seen": jnp.ones(())})
    training = train.Training(
        network, models.loss, models.EXAMPLE, gate=None, optimizer=SGD
    )
    state = training.start(jax.random.key(0))
    with pytest.raises(ValueError, match="'seen' is no running average"):
        training.recalibrate(state, models.batches(0))


# ------------------------------------------------------------------ other ways to train


def test_single_weights_are_gated_and_units_go_with_them():
    training = training_of("perceptron")
    structure = training.structure
    kernels = ("second.kernel", "out.kernel")
    for path in kernels:
        shape = structure.arrays[path].shape
        group = units.Group(path, shape[0] * shape[1], (units.Slot(path, None),))
        structure = structure.add(group)
    gate = train.Learned(gates.HardConcrete(), only=kernels, keep_prob=0.5)
    training = training_of(
        "perceptron",
        structure=structure,
        gate=gate,
        target=None,
        price=1e-3,
        compaction=train.Compaction(below=1.0, after=1, at=1.0),
    )
    state = training.start(jax.random.key(0))
    assert {*state.gates["logits"]} == {*kernels}
    logits = dict(state.gates["logits"])
    # Of three units of the first layer all weights that read them are closed.
    closed = np.zeros((48, 32), bool)
    closed[[3, 5, 40]] = True
    logits["second.kernel"] = jnp.where(closed.ravel(), -20.0, 3.0)
    logits["out.kernel"] = jnp.full(320, 3.0)
    state = state._replace(
        gates={"logits": logits},
        average={**state.average, "gates": {"logits": logits}},
    )
    smaller, left = training.compact(state)
    assert smaller.structure.groups["first"].size == 45
    assert left.gates["logits"]["second.kernel"].shape == (45 * 32,)
    assert left.params["second"]["kernel"].shape == (45, 32)
    shapes = jax.tree.map(jnp.shape, left._replace(key=()))
    begun = smaller.start(jax.random.key(0))._replace(key=())
    assert jax.tree.map(jnp.shape, begun) == shapes
    smaller.step(left, next(models.batches(0)))


def test_units_that_cost_nothing_under_a_target_are_named():
    structure = training_of("perceptron").structure
    for path in ("first.bias", "second.kernel"):
        size = math.prod(structure.arrays[path].shape)
        structure = structure.add(units.Group(path, size, (units.Slot(path, None),)))
    with pytest.warns(UserWarning, match="'first.bias' cost nothing in macs") as said:
        training_of("perceptron", structure=structure)
    assert len(said) == 1
    training_of("perceptron", structure=structure, target=train.Target("density", 0.3))


def test_a_target_that_counts_a_loop_of_unknown_turns_says_so():
    params = {"a": jnp.ones((3, 6)), "w": jnp.ones((6, 6)), "b": jnp.ones((6, 2))}

    def apply(params, x, turns):
        h = jax.lax.fori_loop(0, turns, lambda _, h: h @ params["w"], x @ params["a"])
        return h @ params["b"]

    def training(target):
        return train.Training(
            train.function(apply, params),
            lambda model, batch: ((model(*batch) ** 2).mean(), {}),
            (jnp.ones((4, 3)), jnp.asarray(2)),
            gate=gates.HardConcrete(),
            target=target,
            optimizer=SGD,
        )

    for how in ("lagrangian", "decided"):
        said = r"of macs, which counts one turn of while at .*test_training.py"
        with pytest.warns(UserWarning, match=said) as warned:
            training(train.Target(costs.macs, 0.5, how=how))
        assert len(warned) == 1
    training(train.Target(costs.params, 0.5))
    training(train.Target("density", 0.5))


def _first_closed(training):
    """A network's arrays, its structure, and which units are left without the first."""
    network, structure = training.network, training.structure
    tree = network.tree(network.params, network.rest)
    return tree, {"first": np.arange(48) > 0}, structure


def test_a_structure_of_another_network_is_refused():
    structure = training_of("perceptron").structure
    small = training_of("perceptron").network.finished(
        *_first_closed(training_of("perceptron"))
    )
    said = r"'first.(kernel|bias)', where the units of first lie, has shape .*, and in "
    with pytest.raises(ValueError, match=said + r"the model it is \((64, )?47,?\)"):
        train.Training(small, models.loss, structure=structure, optimizer=SGD)
    with pytest.raises(ValueError, match=r"in the model it is none; trace this model"):
        training_of("function", structure=structure)


def test_members_of_a_sweep_are_evaluated_by_one_program():
    """And recalibrated: what they differ in is no part of it."""
    traced = []

    def counted(model, batch):
        traced.append(jnp.shape(batch[0]))
        return models.loss(model, batch)

    make, _ = models.MODELS["nnx"]
    one = train.Training(
        make(),
        counted,
        models.EXAMPLE,
        gate=gates.HardConcrete(),
        price=1e-3,
        optimizer=SGD,
    )
    others = (
        one.replace(price=2e-3),
        one.replace(
            price=None, target=train.Target(costs.macs, 0.5), optimizer=optax.adam(1e-2)
        ),
    )
    found = []
    for training in (one, *others):
        state = training.start(jax.random.key(0))
        found.append(training.evaluate(state, models.validation())["error"])
        training.recalibrate(state, models.batches(0))
    assert found[0] == found[1]
    # Once in evaluation mode, and three times within the one that recalibrates.
    assert len(traced) == 4
    one.replace(compute=jnp.bfloat16).evaluate(state, models.validation())
    assert len(traced) == 5


def test_a_network_without_gates_ends_as_it_is():
    training = train.Training(
        models.Perceptron(nnx.Rngs(0)), models.loss, optimizer=SGD
    )
    state, _ = training.epoch(training.start(jax.random.key(0)), models.batches(0))
    found = training.evaluate(state, models.validation())
    images, labels = models.validation()[0]
    small = training.finish(state)
    wrong = (np.asarray(small(images)).argmax(-1) != labels).mean()
    assert found["error"] == pytest.approx(wrong, abs=1e-6)


def test_gates_of_an_unknown_group_are_refused():
    gate = train.Learned(gates.HardConcrete(), only=("third",))
    with pytest.raises(ValueError, match="unknown group 'third'; there is first"):
        training_of("perceptron", gate=gate)


def test_one_training_starts_with_models_of_many_seeds():
    training = training_of("perceptron")
    other = models.Perceptron(nnx.Rngs(1))
    state = training.start(jax.random.key(0), other)
    np.testing.assert_array_equal(
        state.params["first"]["kernel"], other.first.kernel[...]
    )
    with pytest.raises(ValueError, match="a model of its own kind"):
        training.start(jax.random.key(0), models.ConvNet(nnx.Rngs(1)))


def test_an_optimiser_of_nnx_tells_gates_from_weights():
    module = models.Perceptron(nnx.Rngs(0))
    groups = training_of("perceptron").structure.groups
    net = l0jax.nnx.Gated(module, gates.HardConcrete(), groups, rngs=nnx.Rngs(1))
    apart = train.gates_apart(optax.sgd(0.1), optax.sgd(0.0))
    optimizer = nnx.Optimizer(net, apart, wrt=nnx.Param)
    before, kernel = net.log_odds, module.second.kernel[...]
    images, labels = next(models.batches(0))

    def loss(net):
        return models.scored(net(images, key=jax.random.key(0)), labels)[0]

    optimizer.update(net, nnx.grad(loss)(net))
    for name, logits in net.log_odds.items():
        np.testing.assert_array_equal(before[name], logits)
    assert np.abs(kernel - module.second.kernel[...]).max() > 0
    params = nnx.state(models.Perceptron(nnx.Rngs(0)), nnx.Param)
    with pytest.raises(ValueError, match=r"make the nnx.Optimizer before"):
        apart.update(nnx.as_pure(params), apart.init({"params": {}, "gates": {}}))


# ---------------------------------------------------------------------------- bad input


def returns_none(model, batch):
    return None


def returns_losses(model, batch):
    return jnp.ones(4), {}


def returns_no_metrics(model, batch):
    return models.loss(model, batch)[0]


def returns_text(model, batch):
    return models.loss(model, batch)[0], {"said": "much"}


def returns_loss(model, batch):
    return models.loss(model, batch)[0], {"loss": jnp.ones(())}


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (returns_none, r"returns_none must return \(mean loss, metrics\), got None"),
        (returns_losses, r"a real scalar first, got float32 of shape \(4,\)"),
        (returns_no_metrics, "must return"),
        (returns_text, "metric 'said' of returns_text is no array but str"),
        (returns_loss, "may not call a metric 'loss'"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, said):
    training = training_of("perceptron").replace(loss=loss)
    with pytest.raises(ValueError, match=said):
        training.step(training.start(jax.random.key(0)), next(models.batches(0)))


def test_what_a_network_writes_keeps_its_shape():
    def grows(params, rest, x):
        return models.apply(params, x), {"seen": jnp.append(rest["seen"], 1.0)}

    network = train.function(grows, models.function().params, {"seen": jnp.zeros(3)})
    training = train.Training(
        network, models.loss, models.EXAMPLE, gate=None, optimizer=SGD
    )
    with pytest.raises(ValueError, match=r"writes 'seen' in shape \(4,\)"):
        training.step(training.start(jax.random.key(0)), next(models.batches(0)))


def test_a_loader_that_yields_nothing_is_refused():
    training = training_of("perceptron")
    with pytest.raises(ValueError, match="the loader yields nothing"):
        training.epoch(training.start(jax.random.key(0)), iter(()))
    with pytest.raises(ValueError, match="no batch to evaluate"):
        training.evaluate(training.start(jax.random.key(0)), [])


def test_a_loss_that_is_not_finite_names_its_step():
    training = training_of("perceptron", optimizer=optax.sgd(1e6))
    _, totals = training.epoch(training.start(jax.random.key(0)), models.batches(0))
    with pytest.raises(FloatingPointError, match=r"not finite at step \d"):
        totals.means  # noqa: B018


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"price": 1e-4}, "both a price and a target"),
        ({"gate": None}, "a target is given, but no gate is learned"),
        ({"polyak": 1.0}, r"polyak must lie in \[0, 1\), got 1.0"),
        ({"target": train.Target(costs.params, 0.001)}, "what has no gates alone"),
        ({"gate": "hard"}, "gate must be one of"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        training_of("perceptron", **settings)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: train.Target(costs.macs, 0.0), r"must lie in \(0, 1\], got 0.0"),
        (lambda: train.Target(costs.macs, 0.3, how="hope"), "unknown constraint"),
        (lambda: train.Target(costs.macs, {"a": 0.3}), "a cost of the whole network"),
        (lambda: train.Target(costs.macs, 0.3, rate=0.0), "rate must be > 0"),
        (lambda: train.Target(costs.macs, 0.3, warm_up=-1), "at least 0 steps"),
        (lambda: train.Compaction(after=0), "at least one call"),
        (lambda: train.Compaction(at=2.0), r"at must lie in \[0, 1\]"),
        (
            lambda: train.Learned(gates.HardConcrete(), rule="none"),
            "unknown test-time rule",
        ),
        (
            lambda: train.Learned(gates.HardConcrete(), estimator=estimators.arm),
            "only Bernoulli gates need one",
        ),
        (
            lambda: train.Learned(gates.HardConcrete(), temperature=(2.0, 1.0)),
            "rise from above 0",
        ),
        (
            lambda: train.Chosen({}, relocation.Closing()),
            "give steps",
        ),
        (lambda: train.linen(models.LinenNet(), {"stats": {}}), "collection 'params'"),
    ],
)
def test_settings_that_are_none_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_what_is_no_network_is_refused():
    for model, said in (
        (models.LinenNet(), r"give train.linen\(module, variables\)"),
        (lambda x: x, "can be trained, got function"),
    ):
        with pytest.raises(ValueError, match=said):
            train.Training(model, models.loss, models.EXAMPLE, optimizer=SGD)


def test_the_budget_needs_a_target():
    training = training_of("perceptron", target=None, price=1e-4)
    with pytest.raises(ValueError, match='the rule "budget" fills a target'):
        training.decide(training.start(jax.random.key(0)), "budget")


@pytest.mark.parametrize(
    ("make", "leaf"),
    [
        (lambda: optax.adafactor(1e-3, min_dim_size_to_factor=8), "v_row"),
        (lambda: optax.sm3(1e-3), r"mu\.first"),
        (lambda: optax.flatten(optax.adam(1e-3)), r"0\.mu"),
    ],
)
def test_an_optimiser_that_keeps_other_shapes_is_refused(make, leaf):
    training = training_of("perceptron", optimizer=make())
    state = training.start(jax.random.key(0))
    words = rf"the optimiser keeps '.*{leaf}.*its units can't be told apart"
    with pytest.raises(ValueError, match=words):
        training.without(state, {"first": np.arange(48) < 20})


@pytest.mark.parametrize("make", [optax.novograd, optax.adafactor])
def test_numbers_that_an_optimiser_keeps_for_arrays_need_no_cut(make):
    training = training_of("perceptron", optimizer=make(1e-3), gate_optimizer=ADAM)
    state = training.start(jax.random.key(0))
    training, state = training.without(state, {"first": np.arange(48) < 20})
    training.step(state, next(models.batches(0)))


def test_a_group_that_something_else_reads_is_refused():
    class Read(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(64, 16, rngs=rngs)
            self.table = nnx.BatchStat(jnp.ones((16, 10)))

        def __call__(self, x):
            return self.first(x.reshape(x.shape[0], -1)) @ self.table[...]

    with pytest.raises(ValueError, match="read by 'table', which is no parameter"):
        train.Training(
            Read(nnx.Rngs(0)),
            models.loss,
            models.EXAMPLE,
            gate=gates.HardConcrete(),
            price=1.0,
            optimizer=SGD,
        )


def test_what_cant_be_replaced_is_named():
    with pytest.raises(ValueError, match="'network' can't be replaced"):
        training_of("perceptron").replace(network=None)
