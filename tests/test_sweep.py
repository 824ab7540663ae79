"""Many runs in one program: each is the run that it would have been alone."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l0jax import gates, gating, objectives, train
from l0jax.units import Group, Slot

EXAMPLES, BATCH = 24, 4
GROUPS = {
    "input": Group("input", 4, used_by=(Slot("dense1", 0),)),
    "hidden": Group("hidden", 6, used_by=(Slot("dense2", 0),)),
}
SETTINGS = [
    {"lam": lam, "beta": beta, "rate": rate}
    for lam, beta, rate in ((0.1, 0.5, 0.01), (2.0, 0.5, 0.03), (0.5, 1.0, 0.01))
]
SEEDS = (5, 6, 7)
traces = []


def apply(params, x):
    traces.append(1)
    return jnp.tanh(x @ params["dense1"]) @ params["dense2"]


def squared(outputs, targets):
    return ((outputs - targets) ** 2).mean(), {"sum": outputs.sum()}


def optimizer(rate):
    adam = optax.adam(rate)
    with jax.numpy_dtype_promotion("standard"):
        state = adam.init

    def update(grads, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return adam.update(grads, state, params)

    return optax.GradientTransformation(state, update)


def member(settings):
    return train.make_step(
        apply,
        squared,
        objectives.penalty(GROUPS, settings["lam"], EXAMPLES),
        gates.HardConcrete().at_temperature(settings["beta"]),
        GROUPS,
        optimizer(settings["rate"]),
        polyak=0.9,
    )


def data():
    rng = np.random.default_rng(1)
    inputs = jnp.float32(rng.normal(size=(EXAMPLES, 4)))
    return inputs, jnp.float32(rng.normal(size=(EXAMPLES, 2)))


def start(settings, seed):
    """What a run begins with: its state, totals, order and key."""
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    theta = {
        "params": {
            "dense1": jnp.float32(rng.normal(size=(4, 6))),
            "dense2": jnp.float32(rng.normal(size=(6, 2))),
        },
        "gates": gating.init(key, gates.HardConcrete(), GROUPS, 0.5),
    }
    state = train.init(theta, optimizer(0.01))
    batch = jax.tree.map(lambda a: a[:BATCH], data())
    totals = train.no_totals(member(settings), state, batch, key)
    return state, totals, train.order_of_epoch(key, 1, EXAMPLES, BATCH), key


def settings_of(members):
    return train.stack([jax.tree.map(jnp.float32, each) for each in members])


def swept(run, members, seeds=SEEDS):
    begun = [start(s, seed) for s, seed in zip(members, seeds, strict=True)]
    states, totals, orders, keys = (
        train.stack(each) for each in zip(*begun, strict=True)
    )
    return run(settings_of(members), states, totals, data(), orders, keys)


def alone(settings, seed):
    state, totals, order, key = start(settings, seed)
    return train.make_run(member(settings))(state, totals, data(), order, key)


@pytest.mark.parametrize("together", [None, 1, 2, 3])
def test_members_are_the_single_runs(together):
    run = train.make_sweep(member, together=together)
    found = swept(run, SETTINGS)
    for at, (settings, seed) in enumerate(zip(SETTINGS, SEEDS, strict=True)):
        expected = alone(settings, seed)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            train.member_of(found, at),
            expected,
        )
    # They differ, or there would be nothing to tell.
    first, last = (train.member_of(found[0], at).theta["gates"] for at in (0, 2))
    assert np.abs(first["input"] - last["input"]).max() > 0.01


@pytest.mark.parametrize("together", [1, 3])
def test_a_member_that_diverges_disturbs_no_other(together):
    run = train.make_sweep(member, together=together)
    well = swept(run, SETTINGS)
    ill = swept(run, [SETTINGS[0], {**SETTINGS[1], "rate": np.nan}, SETTINGS[2]])
    assert not np.isfinite(train.member_of(ill[0], 1).theta["gates"]["input"]).any()
    assert np.asarray(ill[1].first_bad_step)[1] == 1
    for at in (0, 2):
        jax.tree.map(
            np.testing.assert_array_equal,
            train.member_of(ill, at),
            train.member_of(well, at),
        )
        assert np.asarray(ill[1].first_bad_step)[at] == -1


def test_a_sweep_compiles_once():
    run = train.make_sweep(member)
    swept(run, SETTINGS)
    before = len(traces)
    begun = [start(s, 9) for s in SETTINGS]
    states, totals, orders, keys = (
        train.stack(each) for each in zip(*begun, strict=True)
    )
    before = len(traces)
    others = settings_of([{**s, "lam": 7.0} for s in SETTINGS])
    run(others, states, totals, data(), orders, keys)
    assert len(traces) == before, "other numbers are no other program"


def test_members_on_several_devices_are_those_of_one():
    """In a process of its own, since the number of devices is fixed once."""
    code = """
        import jax
        jax.config.update("jax_num_cpu_devices", 3)
        jax.config.update("jax_numpy_dtype_promotion", "standard")
        import numpy as np
        import test_sweep as t
        from l0jax import train
        assert len(jax.devices()) == 3
        found = t.swept(train.make_sweep(t.member), t.SETTINGS)
        one = train.make_sweep(t.member, devices=jax.devices()[:1])
        expected = t.swept(one, t.SETTINGS)
        found_here, expected = map(jax.device_get, (found, expected))
        jax.tree.map(np.testing.assert_array_equal, found_here, expected)
        where = {s.device for s in found[0].theta["gates"]["input"].addressable_shards}
        assert len(where) == 3
        # And on with what was found, which lies on all devices: the same program.
        again = train.make_sweep(t.member)
        here = t.swept(again, t.SETTINGS)
        begun = [t.start(s, 9) for s in t.SETTINGS]
        parts = [train.stack(each) for each in zip(*begun)]
        before = len(t.traces)
        again(t.settings_of(t.SETTINGS), *here, t.data(), *parts[2:])
        assert len(t.traces) == before
        args = (t.settings_of(t.SETTINGS), *parts[:2], t.data(), *parts[2:])
        text = jax.jit(train.make_sweep(t.member)).lower(*args).compile().as_text()
        for word in ("all-reduce", "all-gather", "collective", "all-to-all"):
            assert word not in text, word
        print("same")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd="tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]
