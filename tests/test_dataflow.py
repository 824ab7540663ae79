"""Any value within a function, from any others that determine it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES, CLASSIFIERS, inputs_for
from flax import nnx

from l0jax import models, units
from l0jax.dataflow import dataflow

sweep = pytest.mark.parametrize("name", models.MODELS)


@functools.cache
def build(name):
    """A small network as a function, its arrays by path, images, and its values."""
    model = models.make(name, ARCHITECTURES[name]["small"], rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    images = inputs_for(model, 4, seed=0)

    def apply(state, images):
        return nnx.merge(graph, state)(images)

    return apply, state, images, dataflow(apply, state, images)


def kernels(state):
    """The first, one in the middle, and the last."""
    found = [
        path
        for path, a in units.arrays(state).items()
        if a.ndim > 1 and a.dtype == jnp.float32
    ]
    return dict.fromkeys([found[0], found[len(found) // 2], found[-1]])


@pytest.mark.sweep
@sweep
def test_all_steps_are_the_function(name):
    apply, state, images, flow = build(name)
    (found,) = jax.jit(lambda *a: flow.evaluate(flow.known(*a), flow.outs))(
        state, images
    )
    np.testing.assert_allclose(found, jax.jit(apply)(state, images), rtol=1e-6)


@pytest.mark.sweep
@sweep
def test_what_is_stored_and_what_changes_give_the_same(name):
    """From the frontier of any kernel the function is evaluated without its inputs."""
    _, state, images, flow = build(name)
    known = flow.known(state, images)
    for path in kernels(state):
        changed = flow.params[path]
        front = flow.frontier([changed], flow.outs)
        stored = dict(zip(front, flow.evaluate(known, front), strict=True))
        params = {value: known[value] for value in flow.params.values()}
        params[changed] = params[changed] * 0.7 + 0.1
        (found,) = flow.evaluate({**params, **stored}, flow.outs)
        (expected,) = flow.evaluate({**known, changed: params[changed]}, flow.outs)
        np.testing.assert_array_equal(found, expected, err_msg=path)
        moving = flow.dependents([changed])
        assert moving.isdisjoint(front)
        # The last layer stores what it reads, and nothing of before.
        if path == "head.kernel":
            assert front == (flow.reads(path),)


@pytest.mark.sweep
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_layer_is_linear_in_what_it_reads(name):
    """A unit of the read value is a row of the kernel: zero at either, it is gone."""
    _, state, images, flow = build(name)
    known = flow.known(state, images)
    structure = models.structure(
        models.make(name, ARCHITECTURES[name]["small"], rngs=nnx.Rngs(0))
    )
    seen = 0
    for group in structure.groups.values():
        for slot in group.used_by:
            x, y = flow.reads(slot.path), flow.makes(slot.path)
            (before,) = flow.evaluate(known, [x])
            kernel = known[flow.params[slot.path]]
            if before.shape[-1] != kernel.shape[slot.axis]:
                continue  # a product of patches
            owner = np.arange(group.size) if slot.unit_of is None else slot.unit_of
            off = jnp.float32(np.asarray(owner) != 1)
            shape = np.ones(kernel.ndim, int)
            shape[slot.axis] = -1
            closed = {flow.params[slot.path]: kernel * off.reshape(shape)}
            masked = before * off.reshape(*(1,) * (before.ndim - 1), -1)
            (by_weight,) = flow.evaluate({**known, **closed}, [y])
            (by_value,) = flow.evaluate({**known, x: masked}, [y])
            np.testing.assert_allclose(by_weight, by_value, rtol=1e-5, atol=1e-6)
            # (A unit may be dead.)
            seen += not np.allclose(by_weight, flow.evaluate(known, [y])[0])
    assert seen


def test_blocks_end_where_all_values_pass():
    _, state, images, flow = build("pre_activation_resnet")
    model = models.make(
        "pre_activation_resnet",
        ARCHITECTURES["pre_activation_resnet"]["small"],
        rngs=nnx.Rngs(0),
    )
    known, x = flow.known(state, images), images
    x = model.stem(x)
    for i, block in enumerate(model.blocks):
        x = block(x)
        for layer in ("conv1", "conv2", "shortcut"):
            path = f"blocks.{i}.{layer}.kernel"
            if path not in flow.params:
                continue
            (found,) = flow.evaluate(known, [flow.after(path)])
            np.testing.assert_allclose(found, x, rtol=1e-6, err_msg=path)
    # Where nothing runs beside it, a layer's own output is such a value.
    assert flow.after("stem.kernel") == flow.makes("stem.kernel")


def test_values_of_training_mode_are_found_by_the_same_names():
    """The steps differ there, the layers and the ends of blocks are the same."""
    model = models.make(
        "pre_activation_resnet",
        ARCHITECTURES["pre_activation_resnet"]["small"],
        rngs=nnx.Rngs(0),
    )
    model.train()
    graph, state = nnx.split(model)
    images = build("pre_activation_resnet")[2]

    def apply(state, images):
        net = nnx.merge(graph, state)
        return net(images), nnx.state(net)

    flow = dataflow(apply, state, images)
    known, x = flow.known(state, images), images
    x = model.stem(x)
    for i, block in enumerate(model.blocks):
        x = block(x)
        (found,) = flow.evaluate(known, [flow.after(f"blocks.{i}.conv2.kernel")])
        np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-6)


def test_calls_are_written_out_and_custom_derivatives_stay():
    @jax.custom_vjp
    def twice(x):
        return 2 * x

    twice.defvjp(lambda x: (2 * x, None), lambda _, dy: (5 * dy,))

    @jax.jit
    def inner(params, x):
        return jax.checkpoint(lambda x: twice(x @ params["w"]))(x)

    params, x = {"w": jnp.eye(3)}, jnp.ones((2, 3))
    flow = dataflow(inner, params, x)
    assert "jit" not in " ".join(step.eqn.primitive.name for step in flow.steps)
    known = {flow.params["w"]: params["w"], flow.inputs[0]: x}
    slope = jax.grad(
        lambda w: flow.evaluate({**known, flow.params["w"]: w}, flow.outs)[0].sum()
    )(params["w"])
    np.testing.assert_array_equal(slope, jnp.full((3, 3), 10.0))


def shared(params, x):
    return jnp.tanh(x @ params["w"]) @ params["w"]


def never_meets(params, x):
    return x + 1


BAD = {
    "unknown": (shared, lambda f: f.reader("v"), ["'v'", "there is w"]),
    "twice": (shared, lambda f: f.reads("w"), ["'w'", "one step", "in 2: dot_general"]),
    "never": (never_meets, lambda f: f.reader("w"), ["'w'", "in 0: no step"]),
    "missing": (
        shared,
        lambda f: f.evaluate({f.inputs[0]: jnp.ones((2, 3))}, f.outs),
        ["depends on 'w'"],
    ),
    "missing input": (
        shared,
        lambda f: f.evaluate({f.params["w"]: jnp.eye(3)}, f.outs),
        ["depends on input 0"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_there_is_named(case):
    function, ask, words = BAD[case]
    flow = dataflow(function, {"w": jnp.eye(3)}, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=words[0]) as error:
        ask(flow)
    assert all(word in str(error.value) for word in words), error.value
