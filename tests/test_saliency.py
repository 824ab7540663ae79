"""What a unit is worth: scores against what their formulas give by hand."""

import dataclasses
import functools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from architectures import ARCHITECTURES, CLASSIFIERS
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from retraces import traced_once

import l0jax.nnx
from l0jax import methods, models, tracing
from l0jax.methods import SCORES, batches, keep_above, keep_top, keeping
from l0jax.methods.task import task as task_of

KEY = jax.random.key(0)
every_score = pytest.mark.parametrize("name", SCORES)

# With maps of two positions, flattened; and with a stream of two maps that is read in
# three places, of 20, 20 and 1 positions, and a convolution on the shortcut.
SHAPES = {
    "mlp": ARCHITECTURES["mlp"]["small"],
    "lenet5": ARCHITECTURES["lenet5"]["odd"],
    "pre_activation_resnet": {
        "stem": 2,
        "stages": (3,),
        "inner": ((2, 4),),
        "project": (True,),
        "classes": 3,
        "shape": (5, 4, 2),
    },
}
by_hand = pytest.mark.parametrize("net", SHAPES)
# As small as there is one of each kind.
SMALLEST = {
    name: sizes.get("odd", sizes["small"]) for name, sizes in ARCHITECTURES.items()
} | {
    "mlp": SHAPES["mlp"],
    "lenet5": ARCHITECTURES["lenet5"]["small"],
    "mobilenet_v2": {
        "stem": 3,
        "stages": (4,),
        "inner": ((3, 5),),
        "widen": (True,),
        "strides": (1,),
        "last": 4,
        "classes": 3,
        "shape": (5, 4, 2),
    },
}


def make(net, architecture):
    return filled(lambda: models.make(net, architecture, rngs=nnx.Rngs(0)))


def filled(build):
    """A model whose weights, biases and running statistics are all skewed.

    They lie on the host, so that making them compiles nothing.
    """
    graph, state = nnx.split(nnx.eval_shape(build))
    noise = np.random.default_rng(0)

    def fill(key_path, leaf):
        path = l0jax.units.path_of(key_path)
        if leaf.dtype == bool:
            return np.ones(leaf.shape, bool)
        if path.endswith("kernel"):
            fan_in = np.prod(leaf.shape[:-1])
            values = noise.normal(size=leaf.shape) * np.sqrt(2 / fan_in)
            return np.float32(values + 0.1 * noise.gamma(2, size=leaf.shape))
        return np.float32(0.5 + noise.gamma(1, size=leaf.shape) * 0.5)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def examples(model, number):
    rng = np.random.default_rng(1)
    images = np.float32(rng.gamma(1.5, size=(number, *model.example.shape[1:])) - 1)
    classes = model.architecture.get("classes", 3)
    return images, np.int32(rng.integers(classes, size=number))


@functools.cache
def build(net):
    """A model, and a task of three batches of four examples."""
    model = make(net, SHAPES[net])
    return model, task_of(model, models.structure(model), *examples(model, 12), 4)


@functools.cache
def scores_of(name, net):
    return methods.score(name, build(net)[1], KEY)


def needs_filters(name, task):
    """Whether a score says that of some groups it has nothing to look at."""
    try:
        methods.score(name, task, KEY)
    except ValueError as error:
        return "choose groups with structure.only" in str(error)
    return False


def of_filters(task):
    """Only groups that have filters: not those of inputs."""
    made = [n for n in task.structure.groups if n not in ("input", "features")]
    return dataclasses.replace(task, structure=task.structure.only(*made))


# ---------------------------------------------------------- the networks, by hand


def forward(model, images, add):
    """Logits, and what each kernel reads, with `add` added to that."""
    values = {}

    def read(path, x):
        values[path] = x + add[path] if path in add else x
        return values[path]

    if isinstance(model, models.MLP):
        x = images
        for i, layer in enumerate(model.layers):
            x = layer(read(f"layers.{i}.kernel", jax.nn.relu(x) if i else x))
        return x, values
    if isinstance(model, models.LeNet5):
        x = images
        for path, conv in (("conv1", model.conv1), ("conv2", model.conv2)):
            x = read(f"{path}.kernel", x)
            x = jax.nn.relu(nnx.max_pool(conv(x), (2, 2), strides=(2, 2)))
        x = model.dense1(read("dense1.kernel", x.reshape(len(x), -1)))
        return model.dense2(read("dense2.kernel", jax.nn.relu(x))), values
    x = model.stem(images)
    for i, block in enumerate(model.blocks):
        active = read(f"blocks.{i}.conv1.kernel", jax.nn.relu(block.norm1(x)))
        beside = x if block.shortcut is None else block.shortcut(active)
        active = jax.nn.relu(block.norm2(block.conv1(active)))
        x = beside + block.conv2(read(f"blocks.{i}.conv2.kernel", active))
    x = jax.nn.relu(model.norm(x)).mean(axis=(1, 2))
    return model.head(read("head.kernel", x)), values


@functools.cache
def read_values(net):
    model, task = build(net)
    images = task.images.reshape(-1, *task.images.shape[2:])
    return jax.jit(lambda images: forward(model, images, {})[1])(images)


def places(group, values):
    """Of each place where the group is read (the shortcut reads what conv1 reads), its
    path and values in double precision: (examples, positions, units)."""
    found = {}
    for slot in group.used_by:
        if slot.path not in values:
            assert slot.path.endswith("shortcut.kernel")
            continue
        value = np.asarray(values[slot.path], np.float64)
        value = value.reshape(len(value), -1, value.shape[-1])
        owner = np.arange(group.size) if slot.unit_of is None else slot.unit_of
        units = [
            value[:, :, np.asarray(owner) == j].reshape(len(value), -1)
            for j in range(group.size)
        ]
        found[slot.path] = np.stack(units, axis=-1)
    return found


def samples(group, values):
    """All values of each unit: (samples, units)."""
    there = places(group, values).values()
    return np.concatenate([value.reshape(-1, group.size) for value in there])


def entropy_of(matrix):
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    p = squares[squares > 1e-20] / squares.sum()
    return -(p * np.log(p)).sum()


def entropies(matrix):
    units = matrix.shape[1]
    without = [entropy_of(np.delete(matrix, j, axis=1)) for j in range(units)]
    return (entropy_of(matrix) - without) / np.log(units)


STATISTICS = {
    "apoz": lambda a: -(a == 0).mean(axis=0),
    "variance": lambda a: a.var(axis=0),
    "entropy": entropies,
}


@pytest.mark.sweep
@by_hand
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_of_values_are_those_by_hand(name, net):
    task = build(net)[1]
    values = read_values(net)
    found = scores_of(name, net)
    for group in task.structure.groups.values():
        expected = STATISTICS[name](samples(group, values))
        np.testing.assert_allclose(found[group.name], expected, rtol=2e-4, atol=2e-6)
    assert any(np.ptp(a) > 0 for a in found.values())


@by_hand
def test_taylor_is_values_by_slopes(net):
    """z dL/dz, by an addition to z."""
    model, task = build(net)
    images = task.images.reshape(-1, *task.images.shape[2:])
    labels = jnp.asarray(task.labels.reshape(-1))
    values = read_values(net)
    zeros = jax.tree.map(jnp.zeros_like, values)

    def loss(add):
        return task.loss(forward(model, images, add)[0], labels).sum()

    slopes = jax.jit(jax.grad(loss))(zeros)
    found = methods.taylor(task, normalise=False)
    for group in task.structure.groups.values():
        z, dz = places(group, values), places(group, slopes)
        products = np.concatenate([z[path] * dz[path] for path in z], axis=1)
        expected = np.abs(products.mean(axis=1)).mean(axis=0)
        largest = expected.max()
        np.testing.assert_allclose(
            found[group.name], expected, rtol=1e-4, atol=1e-5 * largest
        )


def test_filters_are_summed_over_the_kernels_that_make_them():
    _, task = build("pre_activation_resnet")
    found = methods.filter_l1(of_filters(task))
    state = {
        path: np.asarray(a, np.float64)
        for path, a in l0jax.units.arrays(task.params).items()
    }
    stream = next(g for g in task.structure.groups.values() if len(g.used_by) == 2)
    # The first stream is made by the stem, the second by three kernels.
    expected = {stream.name: ["stem.kernel"]}
    last = next(
        g for g in task.structure.groups.values() if g.used_by[-1].path == "head.kernel"
    )
    expected[last.name] = [
        f"blocks.{layer}.kernel" for layer in ("0.shortcut", "0.conv2", "1.conv2")
    ]
    for i in range(2):
        (inner,) = (
            g
            for g in task.structure.groups.values()
            if g.used_by[0].path == f"blocks.{i}.conv2.kernel"
        )
        expected[inner.name] = [f"blocks.{i}.conv1.kernel"]
    assert expected.keys() == found.keys()
    for name, kernels in expected.items():
        norm = sum(np.abs(state[path]).sum(axis=(0, 1, 2)) for path in kernels)
        np.testing.assert_allclose(found[name], norm, rtol=1e-5, err_msg=name)


# ------------------------------------------- derivatives in gates, by differences


def gated_mlp(model, z, images, labels):
    """The mean loss in double precision, with gates on what each layer reads."""
    x = np.asarray(images, np.float64).reshape(-1, images.shape[-1])
    gates = [z["input"], z["hidden1"], z["hidden2"]]
    for i, (layer, gate) in enumerate(zip(model.layers, gates, strict=True)):
        x = np.maximum(x, 0) if i else x
        kernel = np.asarray(layer.kernel[...], np.float64)
        x = (x * gate) @ kernel + np.asarray(layer.bias[...], np.float64)
    labels = np.asarray(labels).reshape(-1)
    right = x[np.arange(len(x)), labels]
    return (np.log(np.exp(x).sum(axis=1)) - right).mean()


def differences(size):
    """First and second derivatives in each gate of the MLP."""
    model, task = build("mlp")
    ones = {n: np.ones(g.size) for n, g in task.structure.groups.items()}

    def at(name, unit, step):
        z = {n: a.copy() for n, a in ones.items()}
        z[name][unit] += step
        return gated_mlp(model, z, task.images, task.labels)

    for name, units in ones.items():
        below, here, above = (
            np.array([at(name, unit, step) for unit in range(len(units))])
            for step in (-size, 0, size)
        )
        yield name, (above - below) / (2 * size), (above - 2 * here + below) / size**2


def test_relevance_is_a_difference_of_losses():
    found = scores_of("skeletonization", "mlp")
    for name, first, _ in differences(1e-5):
        np.testing.assert_allclose(-found[name], first, rtol=1e-3, atol=1e-6)


def test_obd_is_half_a_second_difference():
    found = scores_of("obd", "mlp")
    for name, _, second in differences(1e-4):
        np.testing.assert_allclose(found[name], second / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("net", ["lenet5", "pre_activation_resnet"])
def test_obd_is_the_diagonal_of_the_hessian(net):
    _, task = build(net)
    groups = task.structure.groups
    cuts = np.cumsum([group.size for group in groups.values()])[:-1]

    def loss(z, params, images, labels):
        z = dict(zip(groups, jnp.split(z, cuts), strict=True))
        return task.gated_loss(z, params, images, labels).mean()

    hessian = jax.jit(jax.hessian(loss))
    ones = jnp.ones(sum(group.size for group in groups.values()))
    whole = np.mean(
        [hessian(ones, task.params, *batch) for batch in task.batches()], axis=0
    )
    found = np.concatenate([scores_of("obd", net)[name] for name in groups])
    np.testing.assert_allclose(
        found, np.diag(whole) / 2, rtol=1e-3, atol=1e-5 * np.abs(whole).max()
    )
    # The rest of the Hessian is not small: it matters that this is the diagonal.
    assert np.abs(whole - np.diag(np.diag(whole))).max() > 0.1 * np.abs(whole).max()


# -------------------------------------------------------------------- over all models


@functools.cache
def smallest(net):
    model = make(net, SMALLEST[net])
    return model, task_of(model, models.structure(model), *examples(model, 4), 4)


@functools.partial(jax.jit, static_argnums=0)
def outputs(graph, state, images):
    return nnx.merge(graph, state)(images)


@pytest.mark.sweep
@pytest.mark.parametrize("net", CLASSIFIERS)
@every_score
def test_scores_choose_what_is_left(name, net):
    """Finite, one for each unit, and a choice by them is gating by it."""
    model, task = smallest(net)
    if needs_filters(name, task):
        task = of_filters(task)
    found = methods.score(name, task, KEY)
    groups = task.structure.groups
    assert list(found) == list(groups)
    for group in groups.values():
        assert found[group.name].shape == (group.size,)
        assert found[group.name].dtype == jnp.float32
        assert np.isfinite(found[group.name]).all()
    keep = keep_top(found, 0.4)
    closed = {n: jnp.float32(flags) for n, flags in keep.items()}
    expected = outputs(
        *nnx.split(l0jax.nnx.fold(model, closed, groups)), task.images[0]
    )
    shrunk = l0jax.nnx.shrink(model, keep, groups)
    logits = outputs(*nnx.split(shrunk), task.images[0])
    assert np.ptp(expected) > 0
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    sizes = [
        sum(a.size for a in jax.tree.leaves(nnx.state(each)))
        for each in (shrunk, model)
    ]
    assert sizes[0] < sizes[1]


@pytest.mark.sweep
@every_score
def test_each_batch_runs_the_same_program(name, monkeypatch):
    """One function is compiled, once, and its weights and examples are arguments; or
    no example makes a difference."""
    task = of_filters(build("lenet5")[1])
    jitted = []

    def jit(step):
        compiled = jax.jit(traced_once(step))

        def run(*args):
            if not jitted:
                constants = compiled.trace(*args).jaxpr.consts
                fewest = min(task.images[0].size, task.params.dense1.kernel.size)
                assert max(map(np.size, constants), default=0) < fewest
            jitted.append(compiled)
            return compiled(*args)

        return run

    stand_in = SimpleNamespace(jit=jit, tree=jax.tree)
    monkeypatch.setattr(batches, "jax", stand_in)
    found = methods.score(name, task, KEY)
    if not jitted:
        others = dataclasses.replace(task, images=-task.images)
        jax.tree.map(
            np.testing.assert_array_equal, found, methods.score(name, others, KEY)
        )
        return
    assert len(jitted) == len(task.images) > 1
    assert len(set(map(id, jitted))) == 1


def test_a_fold_traces_its_step_once():
    _, task = build("mlp")

    @chex.assert_max_traces(n=1)
    def step(total, params, images, labels):
        return total + images.sum() + labels.mean() + params.layers[0].bias[...].sum()

    found = batches.fold_batches(task, step, jnp.zeros(()))
    bias = task.params.layers[0].bias[...].sum()
    expected = task.images.sum() + task.labels.mean(axis=1).sum() + 3 * bias
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# ----------------------------------------------------------------- dead, tied, random


def test_a_dead_unit_is_worth_least():
    model = make("vgg", SMALLEST["vgg"])
    kernel, norm = model.convs[0].kernel, model.norms[0]
    kernel[...] = kernel[...] * np.float32([1, 0, 1])
    norm.mean[...] = np.zeros(3, np.float32)
    # The others are often alive.
    norm.bias[...] = np.float32([0.5, -0.5, 0.5])
    task = task_of(model, models.structure(model), *examples(model, 4), 4)
    for name in ("apoz", "variance", "taylor"):
        values = methods.score(name, task, KEY)["convs.0"]
        assert values[1] < min(values[0], values[2]), name
        assert values[1] == (-1 if name == "apoz" else 0)
    # And adds exactly nothing to the entropy.
    np.testing.assert_allclose(methods.entropy(task)["convs.0"][1], 0, atol=1e-6)


def test_groups_without_any_value_have_scores():
    """All units dead: 0 by the norm of 0, and by the entropy of nothing."""
    model = make("mlp", SHAPES["mlp"])
    model.layers[0].bias[...] = np.full(7, -1e3, np.float32)
    task = task_of(model, models.structure(model), *examples(model, 4), 4)
    for score in (methods.taylor, methods.entropy, methods.variance):
        np.testing.assert_array_equal(score(task)["hidden1"], np.zeros(7))


class SideBySide(nnx.Module):
    """Two layers read the same, and are read side by side."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 3, rngs=rngs)
        self.second = nnx.Linear(4, 3, rngs=rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        sides = jax.nn.relu(self.first(x)), jax.nn.relu(self.second(x))
        return self.head(jnp.concatenate(sides, axis=1))


def beside():
    model = filled(lambda: SideBySide(nnx.Rngs(0)))
    structure = tracing.trace(model, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    images = np.float32(np.random.default_rng(0).gamma(1, size=(8, 4)) - 0.7)
    return model, structure, images, np.int32(np.arange(8) % 2)


def rectified(linear, x):
    """After ReLU, in double precision."""
    kernel, bias = linear.kernel[...], linear.bias[...]
    return np.maximum(np.float64(x) @ np.float64(kernel) + np.float64(bias), 0)


def test_one_value_may_hold_a_unit_at_two_places():
    """Merged groups are read side by side: both places count."""
    model, structure, images, labels = beside()
    structure = structure.merge("both", ["first", "second"]).only("both")
    task = task_of(model, structure, images, labels, 4)
    assert len(task.reads("both")) == 2
    pooled = np.concatenate(
        [rectified(linear, images) for linear in (model.first, model.second)]
    )
    for name, statistic in STATISTICS.items():
        found = methods.score(name, task, KEY)["both"]
        np.testing.assert_allclose(found, statistic(pooled), rtol=1e-4, atol=1e-6)

    @jax.jit
    def slopes(z, images, labels):
        def loss(z, x, y):
            return task.gated_loss(z, task.params, x[None], y[None])[0]

        return jax.vmap(jax.grad(loss), (None, 0, 0))(z, images, labels)

    each = slopes(task.open_gates, images, labels)["both"]
    found = methods.taylor(task, normalise=False)["both"]
    np.testing.assert_allclose(found, jnp.abs(each).mean(axis=0) / 2, rtol=1e-5)


def test_the_only_unit_of_a_group_has_no_entropy():
    model, structure, images, labels = beside()
    parts = {"alone": [0], "others": [1, 2]}
    structure = structure.split("first", parts).only("alone", "others")
    task = task_of(model, structure, images, labels, 4)
    found = methods.entropy(task)
    np.testing.assert_array_equal(found["alone"], [0])
    values = rectified(model.first, images)[:, 1:]
    np.testing.assert_allclose(found["others"], entropies(values), rtol=1e-4)


def test_variances_of_large_values_keep_their_digits():
    """Values about 1,000 that differ by one."""
    model, structure, images, labels = beside()
    model.first.bias[...] = np.full(3, 1e3, np.float32)
    task = task_of(model, structure.only("first"), images, labels, 4)
    values = rectified(model.first, images)
    found = methods.variance(task)["first"]
    np.testing.assert_allclose(found, values.var(axis=0), rtol=1e-3)


def test_random_orders_are_uniform_and_of_each_group_alone():
    _, task = build("mlp")
    draw = jax.jit(jax.vmap(lambda key: SCORES["random"](task, key)))
    draws = draw(jax.random.split(KEY, 4000))
    for name, values in draws.items():
        size = values.shape[1]
        first = np.bincount(np.argmax(values, axis=1), minlength=size) / 4000
        assert 0 <= values.min() < 0.01
        assert 0.99 < values.max() < 1
        sigma = np.sqrt((1 - 1 / size) / size / 4000)
        assert np.abs(first - 1 / size).max() < 5 * sigma, name
    together = np.corrcoef(draws["hidden1"][:, 0], draws["hidden2"][:, 0])[0, 1]
    assert abs(together) < 5 / np.sqrt(4000)
    alone = dataclasses.replace(task, structure=task.structure.only("hidden2"))
    np.testing.assert_array_equal(
        SCORES["random"](alone, KEY)["hidden2"], SCORES["random"](task, KEY)["hidden2"]
    )


# ----------------------------------------------------------------------------- errors


@pytest.mark.sweep
@every_score
def test_scores_that_are_not_finite_are_named(name):

    def task_with(change):
        model = make("mlp", SHAPES["mlp"])
        # What makes a unit, and what reads it.
        for layer, at in ((0, (0, 2)), (1, (2, 0))):
            kernel = np.array(model.layers[layer].kernel[...])
            kernel[at] = change(kernel[at])
            model.layers[layer].kernel[...] = kernel
        structure = models.structure(model).only("hidden1")
        return task_of(model, structure, *examples(model, 4), 4)

    whole, other = (
        methods.score(name, task_with(change), KEY)["hidden1"]
        for change in (lambda weight: weight, lambda weight: weight - 30)
    )
    if np.array_equal(whole, other):
        # It looks at no weight.
        return
    with pytest.raises(ValueError, match=r"unit [02] of group 'hidden1' is nan"):
        methods.score(name, task_with(lambda _: np.nan), KEY)


def test_groups_that_no_kernel_makes_are_named():
    for net, group in (("mlp", "input"), ("lenet5", "features")):
        with pytest.raises(ValueError, match=f"'{group}'.*reads") as error:
            methods.filter_l1(build(net)[1])
        assert "structure.only" in str(error.value)


def test_positions_that_do_not_fit_are_named():
    _, task = build("lenet5")
    # The first feature is read no more.
    group = task.structure.groups["conv2"]
    (slot,) = group.used_by
    slot = dataclasses.replace(slot, unit_of=(-1, *slot.unit_of[1:]))
    group = dataclasses.replace(group, name="maps", used_by=(slot,))
    structure = task.structure.add(group).only("maps")
    task = dataclasses.replace(task, structure=structure)
    with pytest.raises(ValueError, match="'maps'") as error:
        methods.entropy(task)
    assert "unit 0 has 1" in str(error.value)
    # The others take what there is.
    assert np.isfinite(methods.apoz(task)["maps"]).all()


def test_unknown_scores_are_named():
    _, task = build("mlp")
    with pytest.raises(ValueError, match="'hessian'") as error:
        methods.score("hessian", task, KEY)
    assert all(name in str(error.value) for name in SCORES)


def test_settings_reach_the_score():
    _, task = build("mlp")
    raw = methods.score("taylor", task, KEY, normalise=False)
    found = methods.score("taylor", task, KEY)
    for name, values in raw.items():
        values = np.float64(values)
        expected = values / np.sqrt((values**2).sum())
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-7)
        assert abs(np.linalg.norm(values) - 1) > 0.01


# -------------------------------------------------------------- from scores to choices

numbers = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 3.0]), min_size=1, max_size=9)
ratios = st.floats(0, 1, exclude_max=True)
groups_of_scores = st.dictionaries(
    st.sampled_from("abc"), numbers.map(np.array), min_size=1
)


@given(groups_of_scores, ratios)
def test_the_top_of_each_group_is_kept(scores, ratio):
    keep = keep_top(scores, ratio)
    assert keep.keys() == scores.keys()
    for name, values in scores.items():
        flags = keep[name]
        gone = int(np.floor(round(len(values) * ratio, 9)))
        assert flags.sum() == max(len(values) - gone, 1)
        # A unit that goes is below, or behind, every unit that stays.
        for lost in np.flatnonzero(~flags):
            for kept in np.flatnonzero(flags):
                assert (-values[kept], kept) < (-values[lost], lost)


def test_a_negative_number_of_units_is_refused():
    with pytest.raises(ValueError, match="at_least must be 0 or more, got -1"):
        keeping.keep_above({"a": np.ones(3)}, 0.5, at_least=-1)


@given(groups_of_scores, ratios, st.integers(0, 3))
def test_the_top_of_all_is_kept(scores, ratio, at_least):
    total = sum(map(len, scores.values()))
    count = keeping.count_left(total, ratio)
    flat = [(-v, at) for at, v in enumerate(np.concatenate(list(scores.values())))]
    chosen = {at for _, at in sorted(flat)[:count]}
    expected, start = {}, 0
    for name, values in scores.items():
        best = sorted(range(len(values)), key=lambda j: (-values[j], j))[:at_least]
        here = {j for j in range(len(values)) if start + j in chosen} | set(best)
        expected[name] = [j in here for j in range(len(values))]
        start += len(values)
    if all(any(flags) for flags in expected.values()):
        found = keep_above(scores, ratio, at_least)
        assert {name: flags.tolist() for name, flags in found.items()} == expected
    else:
        empty = next(name for name, flags in expected.items() if not any(flags))
        with pytest.raises(ValueError, match=f"group '{empty}' would lose all"):
            keep_above(scores, ratio, at_least)


def test_counts_are_those_of_exact_arithmetic():
    assert [keeping.count_left(10, r / 10) for r in range(10)] == list(range(10, 0, -1))
    assert keeping.count_left(7, 0.5) == 4
    assert keeping.count_left(100, 0.29) == 71  # 28.999999999999996 in floats
    assert keeping.count_left(1, 1 - 1e-12) == 1


@pytest.mark.parametrize("choose", [keep_top, keep_above])
def test_what_can_not_be_ranked_is_refused(choose):
    for ratio in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            choose({"a": np.ones(3)}, ratio)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=f"unit 1 of group 'b' is {bad}"):
            choose({"a": np.ones(3), "b": np.array([0.0, bad])}, 0.5)


def test_a_loss_of_ones_own():
    """Targets of any kind: here a regression."""
    model, structure, images, _ = beside()
    target = images[:, :2]
    task = task_of(
        model,
        structure.only("first"),
        images,
        target,
        4,
        lambda y, t: optax.l2_loss(y, t).sum(axis=1),
    )

    @jax.jit
    @jax.grad
    def slope(z):
        return task.gated_loss(z, task.params, images, target).mean()

    expected = -slope(task.open_gates)["first"]
    found = methods.skeletonization(task)["first"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert np.isfinite(methods.taylor(task)["first"]).all()


# --------------------------------------------------- scores that came with relocation


def test_fisher_is_half_the_mean_square_of_each_example_s_slope():
    model, task = build("mlp")
    graph, _ = nnx.split(model)
    found = methods.fisher(task)

    def loss(z, image, label):
        params = l0jax.apply_gates(task.params, z, task.structure.groups)
        return task.loss(nnx.merge(graph, params)(image[None]), label[None])[0]

    images, labels = (np.concatenate(np.asarray(a)) for a in (task.images, task.labels))
    slopes = [
        jax.grad(loss)(task.open_gates, jnp.asarray(image), jnp.asarray(label))
        for image, label in zip(images, labels, strict=True)
    ]
    for name, values in found.items():
        expected = np.mean([np.square(one[name]) for one in slopes], axis=0) / 2
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-8)


def test_outgoing_weights_of_all_readers_count():
    _, task = build("pre_activation_resnet")
    found = methods.outgoing_l2(task)
    arrays = l0jax.units.arrays(task.params)
    for name, group in task.structure.groups.items():
        total = np.zeros(group.size)
        for slot in group.used_by:
            kernel = np.moveaxis(np.asarray(arrays[slot.path]), slot.axis, 0)
            squares = np.square(kernel).reshape(len(kernel), -1).sum(1)
            np.add.at(total, l0jax.units.owners(slot, group.size), squares)
        np.testing.assert_allclose(found[name], np.sqrt(total), rtol=1e-5)
    assert any(len(g.used_by) > 1 for g in task.structure.groups.values())


def test_spread_is_the_entropy_of_either_part():
    _, task = build("mlp")
    keep = {
        n: np.arange(g.size) < g.size // 2 for n, g in task.structure.groups.items()
    }
    found = methods.spread(task, keep)
    name = "hidden1"
    values = hidden_values(task)
    for part, flags in zip(found[name], (keep[name], ~keep[name]), strict=True):
        squares = np.linalg.svd(values[:, flags], compute_uv=False) ** 2
        p = squares / squares.sum()
        p = p[p > 1e-12]
        expected = -(p * np.log(p)).sum() / np.log(flags.sum())
        assert part == pytest.approx(expected, rel=1e-3)


def hidden_values(task):
    """What the first hidden layer of an MLP gives."""
    arrays = l0jax.units.arrays(task.params)
    x = np.concatenate(np.asarray(task.images)).reshape(-1, task.images[0][0].size)
    kernel, bias = (np.asarray(arrays[f"layers.0.{n}"]) for n in ("kernel", "bias"))
    return np.maximum(x @ kernel + bias, 0)
