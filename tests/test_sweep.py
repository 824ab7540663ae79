"""Many runs in one program: each is the run that it would have been alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import l0jax
from l0jax import gates, train
from l0jax.train import Sweep
from tests.optimizers import adam

EXAMPLES, BATCH = 24, 4
SETTINGS = {
    "lam": np.float32([0.1, 2.0, 0.5]),
    "beta": np.float32([0.5, 0.5, 1.0]),
    "rate": np.float32([0.01, 0.03, 0.01]),
}
SEEDS = (5, 6, 7)
EXAMPLE = jax.ShapeDtypeStruct((2, 4), jnp.float32)
traces = []


def apply(params, x):
    traces.append(1)
    return jnp.tanh(x @ params["dense1"]) @ params["dense2"]


def squared(model, batch):
    outputs = model(batch[0])
    return ((outputs - batch[1]) ** 2).mean(), {"sum": outputs.sum()}


def learned(beta):
    return train.Learned(gates.HardConcrete().at_temperature(beta), keep_prob=0.5)


def network(seed):
    rng = np.random.default_rng(seed)
    sizes = {"dense1": (4, 6), "dense2": (6, 2)}
    params = {name: jnp.float32(rng.normal(size=size)) for name, size in sizes.items()}
    return train.function(apply, params)


@functools.cache
def once():
    """Of which all members are variants; the inputs are gated too."""
    return train.Training(
        network(0),
        squared,
        structure=l0jax.trace(apply, network(0).params, EXAMPLE),
        gate=learned(0.5),
        price=1.0,
        optimizer=adam(0.01),
        gate_optimizer=adam(0.01),
        polyak=0.9,
    )


def member(settings):
    return once().replace(
        price=settings["lam"] / EXAMPLES,
        gating=learned(settings["beta"]),
        optimizer=adam(settings["rate"]),
        gate_optimizer=adam(settings["rate"]),
    )


@functools.cache
def data():
    rng = np.random.default_rng(1)
    inputs = jnp.float32(rng.normal(size=(EXAMPLES, 4)))
    return inputs, jnp.float32(rng.normal(size=(EXAMPLES, 2)))


def keys(seeds=SEEDS):
    return [jax.random.key(seed) for seed in seeds]


def orders(seeds=SEEDS):
    return train.stack(
        [train.order_of_epoch(key, 1, EXAMPLES, BATCH) for key in keys(seeds)]
    )


def begun(sweep, seeds=SEEDS):
    return sweep.start(keys(seeds), [network(seed) for seed in seeds])


@functools.cache
def sweep_of(together):
    return Sweep(member, SETTINGS, together=together)


@functools.cache
def swept(together):
    sweep = sweep_of(together)
    return sweep.epoch(begun(sweep), data(), orders())


@functools.cache
def alone(at):
    """The run that the member would have been."""
    settings = {name: float(values[at]) for name, values in SETTINGS.items()}
    training = member(settings)
    state = training.start(keys()[at], network(SEEDS[at]))
    return training.epoch(state, data(), orders()[at])


def compared(compare, found, expected):
    """Of keys what is stored."""

    def stored(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    found, expected = (jax.tree.map(stored, tree) for tree in (found, expected))
    jax.tree.map(compare, found, expected)


equal = functools.partial(compared, np.testing.assert_array_equal)
close = functools.partial(
    compared, functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
)


@pytest.mark.sweep
@pytest.mark.parametrize("together", [None, 1, 2, 3])
def test_members_are_the_single_runs(together):
    found = swept(together)
    for at in range(3):
        close(train.member_of(found, at), alone(at))
    # They differ, or there would be nothing to tell.
    first, last = (train.member_of(found[0], at).gates["logits"] for at in (0, 2))
    assert np.abs(first["input"] - last["input"]).max() > 0.01


@pytest.mark.parametrize("together", [1, 2, 3])
def test_steps_may_be_programs_of_their_own(together):
    """The same trajectory, and one trace for all steps."""
    sweep = Sweep(member, SETTINGS, together=together)
    first = np.asarray(orders())[:, :1]
    sweep.epoch(begun(sweep), data(), first, loop=True)
    before = len(traces)
    found = sweep.epoch(begun(sweep), data(), orders(), loop=True)
    assert len(traces) == before
    close(found, swept(together))
    with pytest.raises(ValueError, match="there is no step to take: the order"):
        sweep.epoch(begun(sweep), data(), first[:, :0], loop=True)


def test_the_first_bad_step_of_two_parts_is_the_earlier():
    def totals(steps, bad):
        return train.Totals(
            jnp.int32(steps), {"loss": jnp.float32(steps)}, jnp.asarray(bad, jnp.int32)
        )

    for one, other, both in ((-1, -1, -1), (3, 9, 3), (-1, 9, 9), (3, -1, 3)):
        found = totals(2, one).plus(totals(5, other))
        assert (int(found.steps), float(found.sums["loss"])) == (7, 7.0)
        assert int(found.first_bad_step) == both
    members = totals(1, [-1, 4]).plus(totals(1, [7, 8]))
    np.testing.assert_array_equal(members.first_bad_step, [7, 4])


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_is_that_of_its_member(name):
    """Members that are the same but for one number are other runs."""
    same = {key: np.full(3, values[0]) for key, values in SETTINGS.items()}
    other = {
        **same,
        name: np.float32([same[name][0], 3 * same[name][0], same[name][0]]),
    }
    sweep = sweep_of(None).at(other)
    seeds = (SEEDS[0],) * 3
    states, _ = sweep.epoch(begun(sweep, seeds), data(), orders(seeds))
    one, changed, third = (train.member_of(states, at) for at in range(3))
    equal(one, third)
    close(one, alone(0)[0])
    apart = np.abs(one.gates["logits"]["input"] - changed.gates["logits"]["input"])
    assert apart.max() > 1e-3
    assert float(sweep.of(1).price) == pytest.approx(other["lam"][1] / EXAMPLES)


@pytest.mark.parametrize("together", [1, 3])
def test_a_member_that_diverges_disturbs_no_other(together):
    well, sweep = swept(together), sweep_of(together)
    rates = np.float32([0.01, np.nan, 0.01])
    sweep = sweep.at({**SETTINGS, "rate": rates})
    ill = sweep.epoch(begun(sweep), data(), orders())
    gone = train.member_of(ill[0], 1)
    assert not np.isfinite(gone.gates["logits"]["input"]).any()
    assert not np.isfinite(gone.params["dense1"]).any()
    assert np.asarray(ill[1].first_bad_step)[1] == 1
    for at in (0, 2):
        equal(train.member_of(ill, at), train.member_of(well, at))
        assert np.asarray(ill[1].first_bad_step)[at] == -1


def test_a_sweep_compiles_once():
    # (Not by `swept`: its program may be let go between two tests.)
    sweep = sweep_of(None)
    sweep.epoch(begun(sweep), data(), orders())
    sweep = sweep.at({**SETTINGS, "lam": np.float32([7.0, 7.0, 7.0])})
    states, seen = begun(sweep, (9, 9, 9)), orders((9, 9, 9))
    before = len(traces)
    sweep.epoch(states, data(), seen)
    assert len(traces) == before > 0, "other numbers are no other program"


def test_members_need_a_device():
    with pytest.raises(ValueError, match="no device"):
        Sweep(member, SETTINGS, devices=[])


ON_FOUR = """
import jax
import numpy as np
from l0jax import train
from tests import test_sweep as t

def of(members, devices=None):
    settings = {name: np.resize(values, members) for name, values in t.SETTINGS.items()}
    sweep = train.Sweep(t.member, settings, devices=devices)
    seeds = range(members)
    return sweep, sweep.epoch(t.begun(sweep, seeds), t.data(), t.orders(seeds))

def where(states):
    return {s.device for s in states.gates["logits"]["input"].addressable_shards}

assert len(jax.devices()) == 4
# (A loop over a single member would be compiled as none, with other roundings.)
sweep, found = of(6)
_, expected = of(6, jax.devices()[:1])
t.equal(found, expected)
# Not on more devices than share the members evenly.
assert (len(where(found[0])), len(where(expected[0]))) == (3, 1)
# And on with what was found, which lies on all devices: the same program.
before = len(t.traces)
orders = t.orders(range(6))
states, _ = sweep.epoch(found[0], t.data(), orders)
assert len(t.traces) == before
text = jax.jit(sweep.epoch).lower(states, t.data(), orders).compile().as_text()
assert "num_partitions=3" in text
for word in ("all-reduce", "all-gather", "collective", "all-to-all"):
    assert word not in text, word
# Five on two: one of them is trained twice, and none comes back twice.
two = jax.devices()[:2]
sweep, found = of(5, two)
_, expected = of(5, jax.devices()[:1])
t.equal(found, expected)
before = len(t.traces)
again = sweep.epoch(found[0], t.data(), t.orders(range(5)))
assert len(t.traces) == before
sizes = {len(leaf) for leaf in jax.tree.leaves((found, again))}
assert sizes == {5}, sizes
assert (len(where(found[0])), len(where(of(7)[1][0]))) == (2, 4)
print("same")
"""


@pytest.mark.slow
def test_members_on_several_devices_are_those_of_one(run_python):
    """In a process of its own, since the number of devices is fixed once."""
    assert run_python(ON_FOUR, devices=4).strip() == "same"
