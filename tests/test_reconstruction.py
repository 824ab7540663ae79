"""ThiNet and channel pruning against brute force, other solvers and exact cases."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES, CLASSIFIERS
from flax import nnx

import l0jax.nnx
from l0jax import models, trace, units
from l0jax.dataflow import Dataflow
from l0jax.methods import channel_pruning, reconstruct, thinet
from l0jax.methods.channel_pruning import lasso_problem, select
from l0jax.methods.samples import Rows, layer, least_squares, rows
from l0jax.methods.task import Task, task
from l0jax.methods.thinet import contributions, greedy_removal
from l0jax.units import Group, Slot

KEY = jax.random.key(5)
METHODS = {"thinet": thinet, "channel_pruning": channel_pruning}
both = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def array(seed, *shape):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


@functools.cache
def build(name, examples=32):
    """A small network, two batches of examples, its groups that one layer reads."""
    model = models.make(name, ARCHITECTURES[name]["small"], rngs=nnx.Rngs(0))
    structure = models.structure(model)
    single = [n for n, g in structure.groups.items() if len(g.used_by) == 1]
    images = array(0, examples, *model.example.shape[1:])
    labels = np.zeros(examples, np.int32)
    of = task(model, structure.only(*single), images, labels, examples // 2)
    # Means, scales and biases that are not those of initialisation.
    moved = {
        path: jnp.asarray(np.asarray(a) + np.abs(0.2 * array(i, *a.shape)))
        for i, (path, a) in enumerate(units.arrays(of.params).items())
        if a.ndim == 1 and a.dtype == jnp.float32
    }
    return model, with_params(of, units.replace(of.params, moved))


def with_params(of, params):
    return dataclasses.replace(of, params=params)


def plain(apply, params, x, groups=None, batch=None):
    """A task of a function without classes."""
    structure = trace(apply, params, x[:2])
    if groups:
        structure = structure.only().add(groups)
    images = x.reshape(-1, batch or len(x), *x.shape[1:])
    labels = np.zeros(images.shape[:2], np.int32)
    return Task(apply, params, structure, images, labels)


def mixed(count=60, closed=False):
    """Two rows are of unit 0, one of unit 1, one of unit 2, and one is of none."""
    params = {"a": array(1, 6, 5), "b": array(2, 5, 4)}
    if closed:
        params["b"][2] = 0

    def apply(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    group = Group("units", 3, (Slot("b", 0, (0, 0, 1, 2, -1)),))
    params = jax.tree.map(jnp.asarray, params)
    return plain(apply, params, jnp.asarray(array(3, count, 6)), group)


def outputs(of, params):
    apply = jax.jit(of.apply)
    return np.concatenate([apply(params, images) for images, _ in of.batches()])


def assert_close(found, expected, tolerance):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


# The linear system.


@pytest.mark.sweep
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_outputs_are_windows_times_kernels(name):
    _, of = build(name)
    assert of.structure.groups
    for group in of.structure.groups:
        system = rows(of, layer(of, group), KEY, of.params, positions=3)
        product = system.inputs @ system.kernel
        assert_close(product, system.targets, 2e-6)
        assert np.abs(system.targets).max() > 0
        # A unit's entries are those that its closed gate takes away.
        gates = jnp.asarray(np.float32(np.arange(system.size) != 1))
        closed = units.apply_gates(of.params, {group: gates}, of.structure.groups)
        closed = layer(of, group).matrix(units.arrays(closed)[layer(of, group).path])
        other = np.where((system.unit_of == 1)[:, None], 0, system.kernel)
        np.testing.assert_array_equal(closed, other)


WINDOWS = {
    "strides": ((2, 3), "VALID", (1, 1)),
    "padding": ((1, 1), "SAME", (1, 1)),
    "all": ((2, 1), ((2, 0), (1, 3)), (1, 2)),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_are_those_of_the_convolution(case):
    """Against the library's patches, at all positions, in whatever order."""
    stride, padding, dilation = WINDOWS[case]
    names = ("NCHW", "OIHW", "NCHW")

    def apply(params, x):
        h = jax.nn.relu(jnp.einsum("bchw,cd->bdhw", x, params["a"]))
        y = jax.lax.conv_general_dilated(
            *(h, params["b"], stride, padding),
            rhs_dilation=dilation,
            dimension_numbers=names,
        )
        return y.mean(axis=(2, 3))

    params = {"a": jnp.asarray(array(1, 2, 4)), "b": jnp.asarray(array(2, 5, 4, 3, 2))}
    x = jnp.asarray(array(3, 6, 2, 8, 7))
    of = plain(apply, params, x, batch=3)
    (group,) = [
        n
        for n, g in of.structure.groups.items()
        if [s.path for s in g.used_by] == ["b"]
    ]
    system = rows(of, layer(of, group), KEY, params, positions=1000)
    # NCHW with the channel slowest, as an entry of OIHW is numbered.
    patches = jax.lax.conv_general_dilated_patches(
        jax.nn.relu(jnp.einsum("bchw,cd->bdhw", x, params["a"])),
        *((3, 2), stride, padding),
        rhs_dilation=dilation,
        dimension_numbers=names,
    )
    expected = np.moveaxis(np.asarray(patches), 1, -1).reshape(-1, 24)
    assert system.inputs.shape == expected.shape
    found = sorted(map(tuple, system.inputs))
    assert_close(found, sorted(map(tuple, expected)), 1e-6)
    np.testing.assert_array_equal(system.unit_of, np.repeat(np.arange(4), 6))
    assert_close(system.inputs @ system.kernel, system.targets, 2e-6)
    few = rows(of, layer(of, group), KEY, params, positions=2)
    assert few.inputs.shape == (12, 24)
    # Two places of an example are never the same.
    assert len(np.unique(few.inputs, axis=0)) == 12


def test_inputs_are_of_the_pruned_network_and_targets_of_the_base():
    _, of = build("lenet5")
    zero = {p: 0 * a for p, a in units.arrays(of.params).items() if p.endswith("bias")}
    base = units.replace(of.params, zero)
    arrays = units.arrays(base)
    doubled = {"conv1.kernel": 2 * arrays["conv1.kernel"]}
    doubled["conv2.kernel"] = 5 * arrays["conv2.kernel"]
    of = with_params(of, base)
    once = rows(of, layer(of, "conv1"), KEY, base)
    twice = rows(of, layer(of, "conv1"), KEY, units.replace(base, doubled))
    assert_close(twice.inputs, 2 * once.inputs, 1e-6)
    np.testing.assert_array_equal(twice.targets, once.targets)
    assert_close(twice.kernel, 5 * once.kernel, 1e-6)
    other = rows(of, layer(of, "conv1"), jax.random.key(6), base)
    assert not np.array_equal(other.targets, once.targets)


def test_batches_run_one_program(monkeypatch):
    _, of = build("vgg")
    traced = []

    def evaluate(self, known, wanted):
        traced.append(wanted)
        return evaluated(self, known, wanted)

    evaluated = Dataflow.evaluate
    monkeypatch.setattr(Dataflow, "evaluate", evaluate)
    system = rows(of, layer(of, "convs.0"), KEY, of.params, positions=4)
    assert len(system.inputs) == 32 * 4
    # The network, now and before, and the windows.
    assert len(traced) == 2
    # The positions of the batches are not the same.
    same = dataclasses.replace(of, images=of.images[[0, 0]])
    system = rows(same, layer(same, "convs.0"), KEY, of.params, positions=4)
    assert not np.array_equal(system.inputs[:64], system.inputs[64:])


def test_least_squares():
    x, y, start = array(1, 50, 7), array(2, 50, 3), array(3, 7, 3)
    expected = np.linalg.lstsq(x.astype(float), y, rcond=None)[0]
    assert_close(least_squares(x.astype(float), y, start), expected, 1e-9)


def test_what_the_rows_do_not_determine_stays():
    """A channel that is always zero, copies up to rounding, too few rows."""
    x, y, start = (
        a.astype(float) for a in (array(1, 50, 4), array(2, 50), array(3, 6))
    )
    copy = np.float32(x[:, 3] * 3 / 7).astype(float)
    x = np.concatenate([x, 0 * x[:, :1], copy[:, None]], axis=1)
    found = least_squares(x, y, start)
    assert found[4] == start[4]
    assert np.abs(found).max() < 10
    best = np.linalg.lstsq(x[:, :4], y, rcond=None)[0]
    assert_close(x @ found, x[:, :4] @ best, 1e-6)
    few = least_squares(x[:3], y[:3], start)
    assert_close(x[:3] @ few, y[:3], 1e-9)
    assert np.abs(few).max() < 10


@both
def test_layers_that_no_rows_determine_give_no_nan(method):
    """Fewer rows than entries, units that are dead, and an image of zeros."""
    _, of = build("vgg")
    of = dataclasses.replace(of, images=of.images[:1, :2], labels=of.labels[:1, :2])
    dead = {"norms.0.bias": jnp.full(3, -50.0)}
    for params in (of.params, units.replace(of.params, dead)):
        keep, found = method(with_params(of, params), "convs.0", 0.5, KEY, None, 1)
        assert keep.sum() == 2
        for a in units.arrays(found).values():
            assert np.isfinite(a).all()
    of = dataclasses.replace(of, images=0 * of.images)
    keep, found = method(of, "convs.0", 0.5, KEY, None, 1)
    assert keep.sum() == 2
    assert np.isfinite(outputs(of, found)).all()


# ThiNet.


def cost(x, removed):
    return np.square(x[:, list(removed)].sum(axis=1)).sum()


@pytest.mark.parametrize("seed", range(6))
def test_greedy_removal(seed):
    x = (array(seed, 30, 7) @ array(seed + 50, 7, 7)).astype(float)
    removed = greedy_removal(x.T @ x, 4)
    plainly = []
    for _ in range(4):
        left = [k for k in range(7) if k not in plainly]
        plainly.append(min(left, key=lambda k: cost(x, [*plainly, k])))
    assert removed.tolist() == plainly
    best = min(cost(x, each) for each in itertools.combinations(range(7), 4))
    assert cost(x, removed) >= best - 1e-9
    # Where contributions are orthogonal, no set is better.
    orthogonal = np.linalg.qr(x)[0] * np.random.default_rng(seed).permutation(7)
    removed = greedy_removal(orthogonal.T @ orthogonal, 4)
    sets = itertools.combinations(range(7), 4)
    assert set(removed) == set(min(sets, key=lambda each: cost(orthogonal, each)))


def test_greedy_removal_counts_on_what_is_removed_already():
    """The last alone is less than the second; what is removed cancels the second."""
    x = np.stack([[2.0, 0, 0], [-4, 0.5, 0], [0, 0, 0.1], [0, 0, 2.3]], axis=1)
    assert greedy_removal(x.T @ x, 3).tolist() == [2, 0, 1]


def test_contributions_are_of_the_drawn_outputs():
    of = mixed()
    system = rows(of, layer(of, "units"), KEY, of.params)
    drawn = np.arange(60) % 4
    found = contributions(system, drawn)
    for row, unit in itertools.product((0, 1, 33), range(3)):
        mine = system.unit_of == unit
        expected = system.inputs[row, mine] @ system.kernel[mine, drawn[row]]
        np.testing.assert_allclose(found[row, unit], expected, rtol=1e-12)
    summed = found.sum(axis=1)
    there = np.take_along_axis(system.targets_of_units, drawn[:, None], 1)[:, 0]
    assert_close(summed, there, 2e-6)


def test_thinet_keeps_and_scales_as_the_paper():
    """With the sample that it drew, by an exhaustive search and NumPy's solver."""
    of = mixed()
    keep, params = thinet(of, "units", 0.4, KEY)
    one, two = jax.random.split(KEY)
    system = rows(of, layer(of, "units"), one, of.params)
    drawn = np.asarray(jax.random.randint(two, (60,), 0, 4))
    x = contributions(system, drawn)
    smallest = min(range(3), key=lambda k: cost(x, [k]))
    assert np.flatnonzero(~keep).tolist() == [smallest]
    rest = system.inputs[:, 4] * system.kernel[4, drawn]
    y = system.targets[np.arange(60), drawn] - rest
    scale = np.zeros(3)
    scale[keep] = np.linalg.lstsq(x[:, keep], y, rcond=None)[0]
    expected = of.params["b"] * np.append(scale, 1)[system.unit_of][:, None]
    np.testing.assert_allclose(params["b"], expected, rtol=1e-5)
    np.testing.assert_array_equal(params["a"], of.params["a"])


# Channel pruning.


def columns(system):
    """One column for each unit, one row for each output of each row."""
    z = []
    for unit in range(system.size):
        mine = system.unit_of == unit
        kernel = system.kernel[mine]
        norm = np.linalg.norm(kernel)
        z.append((system.inputs[:, mine] @ (kernel / norm)).ravel())
    return np.stack(z, axis=1), system.targets_of_units.ravel()


def some_rows(seed, size=6, each=2, rest=0):
    """A system whose targets are those of a somewhat different kernel."""
    x = np.maximum(array(seed, 40, size * each + rest), -0.5).astype(float)
    kernel = array(seed + 1, size * each + rest, 3) * np.linspace(0.1, 2, 3)
    kernel *= np.abs(array(seed + 2, size * each + rest, 1))
    targets = x @ (kernel + 0.2 * array(seed + 3, *kernel.shape))
    unit_of = np.append(np.tile(np.arange(size), each), np.full(rest, -1))
    return Rows(x, targets, kernel.astype(float), unit_of, size)


@pytest.mark.parametrize("seed", [10, 20, 30])
def test_the_small_problem_is_the_large_one(seed):
    system = some_rows(seed, rest=seed // 10 - 1)
    z, y = columns(system)
    small, aim = lasso_problem(system)
    assert small.shape[0] <= system.size
    np.testing.assert_allclose(small.T @ small, z.T @ z, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(small.T @ aim, z.T @ y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", [10, 20, 30])
def test_the_chosen_set_is_on_the_lasso_path(seed):
    from sklearn.linear_model import lasso_path

    system = some_rows(seed)
    z, y = columns(system)
    alphas = np.abs(z.T @ y).max() / len(z) * np.geomspace(1, 1e-4, 2000)
    _, path, _ = lasso_path(z, y, alphas=alphas, tol=1e-9, max_iter=10**5)
    surviving = {tuple(np.flatnonzero(beta)) for beta in path.T}
    for wanted in range(1, 6):
        there = {each for each in surviving if len(each) == wanted}
        found = tuple(np.flatnonzero(select(*lasso_problem(system), wanted)))
        assert there == {found}


def test_of_equal_units_the_first_are_kept():
    """No penalty leaves two of four that are the same problem."""
    keep = select(np.eye(4), np.ones(4), 2)
    np.testing.assert_array_equal(keep, [True, True, False, False])
    keep = select(np.eye(4), np.array([1.0, -3, 2, 2]), 2)
    np.testing.assert_array_equal(keep, [False, True, True, False])
    np.testing.assert_array_equal(select(np.zeros((0, 3)), np.zeros(0), 1), [1, 0, 0])


def test_who_survives_is_not_who_has_the_largest_coefficient():
    """At half of the largest penalty both do, the second with a larger one."""
    keep = select(np.diag([10.0, 1]), np.array([0.12, 1]), 1)
    np.testing.assert_array_equal(keep, [True, False])


def test_channel_pruning_fits_what_is_kept():
    of = mixed()
    pruned = units.replace(of.params, {"a": of.params["a"] * 1.3})
    keep, params = channel_pruning(of, "units", 0.4, KEY, pruned)
    assert keep.sum() == 2
    system = rows(of, layer(of, "units"), KEY, pruned)
    chosen = select(*lasso_problem(system), 2)
    np.testing.assert_array_equal(keep, chosen)
    free = np.append(keep, True)[[0, 0, 1, 2, -1]]
    inputs = system.inputs[:, free]
    expected = np.zeros((5, 4))
    expected[free] = np.linalg.lstsq(inputs, system.targets, rcond=None)[0]
    assert_close(params["b"], expected, 1e-5)
    np.testing.assert_array_equal(params["a"], pruned["a"])


@both
def test_what_was_closed_before_stays_closed(method):
    of = mixed(closed=True)
    keep, params = method(of, "units", 0.0, KEY)
    assert keep.all()
    assert not params["b"][2].any()
    # And nothing else changes when nothing goes.
    assert_close(params["b"], of.params["b"], 1e-5)


# Copies.


@functools.cache
def copied(name, share):
    """A network in which half of the units of each group are `share` times the others:
    they are made `share` times as large, and are read the same way."""
    architecture = {
        "lenet5": {"shape": (16, 16, 1), "maps": (4, 4), "hidden": 6, "classes": 3},
        "vgg": {"stages": ((4,), (4, 6)), "classes": 3, "shape": (5, 4, 2)},
    }[name]
    model = models.make(name, architecture, rngs=nnx.Rngs(1))
    structure = models.structure(model)
    structure = structure.only(*(n for n in structure.groups if n != "features"))
    images = array(0, 96, *model.example.shape[1:])
    of = task(model, structure, images, np.zeros(96, np.int32), 32)
    params = of.params
    for group in structure.groups.values():
        half, changed = group.size // 2, {}
        for slot in group.slots:
            a = np.array(units.arrays(params)[slot.path])
            if slot.path == "reads":
                continue
            unit_of = np.asarray(slot.unit_of or range(group.size))
            along = np.moveaxis(a, slot.axis, 0)
            # The last of what makes a unit says how large it is.
            norm = any("norm" in each.path for each in group.made_by)
            last = "norm" in slot.path if norm else slot in group.made_by
            last &= not slot.path.endswith(("mean", "var"))
            if slot.path.endswith("bias") or slot.path.endswith("scale"):
                along += np.abs(0.3 * array(4, *along.shape))
            for unit in range(half):
                source, copy = unit_of == unit, unit_of == unit + half
                along[copy] = along[source] * np.float32(share if last else 1)
            changed[slot.path] = jnp.asarray(a)
        params = units.replace(params, changed)
    return with_params(of, params)


@pytest.mark.sweep
@both
@pytest.mark.parametrize("name", ["lenet5", "vgg"])
def test_copies_go_and_nothing_changes(name, method):
    of = copied(name, 0.01)
    kept, params = reconstruct(of, method, 0.5, KEY)
    assert kept.keys() == of.structure.groups.keys()
    expected = outputs(of, of.params)
    assert_close(outputs(of, params), expected, 1e-4)
    # Without the reconstruction it would have changed.
    gates = {name: jnp.float32(keep) for name, keep in kept.items()}
    closed = units.apply_gates(of.params, gates, of.structure.groups)
    assert np.abs(outputs(of, closed) - expected).max() > 1e-3 * np.abs(expected).max()


@both
def test_the_smaller_of_two_copies_goes_first(method):
    of = mixed()
    a, b = np.array(of.params["a"]), np.array(of.params["b"])
    a[:, 3], b[3] = a[:, 2] * np.float32(0.01), b[2] * np.float32(0.7)
    of = with_params(of, {"a": jnp.asarray(a), "b": jnp.asarray(b)})
    keep, params = method(of, "units", 0.4, KEY)
    np.testing.assert_array_equal(keep, [True, True, False])
    assert_close(outputs(of, params), outputs(of, of.params), 1e-5)


# The whole network.


@pytest.mark.sweep
@both
@pytest.mark.parametrize("name", ["lenet5", "pre_activation_resnet"])
def test_shrinking_is_exact(name, method):
    model, of = build(name)
    kept, params = reconstruct(of, method, 0.4, KEY)
    assert any(not keep.all() for keep in kept.values())
    graph = nnx.split(model)[0]
    small = l0jax.nnx.shrink(nnx.merge(graph, params), kept, of.structure)
    found = nnx.jit(lambda model, images: model(images))(small, of.images[1])
    assert_close(found, jax.jit(of.apply)(params, of.images[1]), 1e-5)


def test_layers_are_pruned_as_they_are_read_in_what_is_left():
    _, of = build("mlp")
    seen = []
    kept, params = reconstruct(
        *(of, thinet, 0.5, KEY, ["hidden2", "input", "hidden1"]),
        on_progress=lambda name, keep: seen.append((name, keep)),
    )
    order = ["input", "hidden1", "hidden2"]
    assert [name for name, _ in seen] == order == list(kept)
    by_hand = of.params
    for at, name in enumerate(order):
        keep, by_hand = thinet(of, name, 0.5, jax.random.fold_in(KEY, at), by_hand)
        np.testing.assert_array_equal(keep, kept[name])
        np.testing.assert_array_equal(keep, seen[at][1])
    for found, expected in zip(
        jax.tree.leaves(params), jax.tree.leaves(by_hand), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@both
def test_a_key_gives_one_result(method):
    _, of = build("mlp")
    (kept, one), (again, two) = (reconstruct(of, method, 0.5, KEY) for _ in range(2))
    for name, keep in kept.items():
        np.testing.assert_array_equal(keep, again[name])
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


# Errors.


def depthwise(params, x):
    h = jax.nn.relu(jnp.einsum("bhwc,cd->bhwd", x, params["a"]))
    y = jax.lax.conv_general_dilated(
        *(h, params["b"], (1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    return y.mean(axis=(1, 2))


def squared(params, x):
    return jax.nn.relu(x @ params["a"]) @ jnp.square(params["b"])


@jax.custom_vjp
def rectified_product(x, kernel):
    return jnp.maximum(x @ kernel, 0)


rectified_product.defvjp(
    lambda x, kernel: (rectified_product(x, kernel), None),
    lambda saved, dy: (dy, dy),
)


def rectified(params, x):
    return rectified_product(jax.nn.relu(x @ params["a"]), params["b"])


def task_of(apply, *shape, images):
    params = {"a": jnp.asarray(array(1, 3, 4)), "b": jnp.asarray(array(2, *shape))}
    group = Group("h", shape[-2], (Slot("b", len(shape) - 2),))
    return plain(apply, params, jnp.asarray(array(3, *images)), group)


def residual():
    model, of = build("pre_activation_resnet")
    return dataclasses.replace(of, structure=models.structure(model))


BAD = {
    "several readers": (
        lambda: reconstruct(residual(), thinet, 0.5, KEY),
        ["'blocks.0.conv2'", "4 places", "blocks.2.shortcut.kernel", "only(...)"],
    ),
    "unknown": (
        lambda: reconstruct(build("mlp")[1], thinet, 0.5, KEY, ["conv"]),
        ["unknown group 'conv'", "hidden1"],
    ),
    "ratio": (lambda: reconstruct(build("mlp")[1], thinet, 1.0, KEY), ["got 1.0"]),
    "ratio of thinet": (
        lambda: thinet(build("mlp")[1], "hidden1", -0.1, KEY),
        ["got -0.1"],
    ),
    "ratio of channel pruning": (
        lambda: channel_pruning(build("mlp")[1], "hidden1", 1.5, KEY),
        ["got 1.5"],
    ),
    "positions": (
        lambda: thinet(build("mlp")[1], "hidden1", 0.5, KEY, None, 0),
        ["at least 1, got 0"],
    ),
    "convolution in groups": (
        lambda: thinet(
            task_of(depthwise, 3, 3, 2, 6, images=(4, 5, 5, 3)), "h", 0.5, KEY
        ),
        ["'b'", "conv_general_dilated", "along an axis of 2"],
    ),
    "not linear": (
        lambda: thinet(task_of(squared, 4, 3, images=(8, 3)), "h", 0.5, KEY),
        ["'h'", "dot_general", "reads 'b', isn't one product"],
    ),
    "not linear within": (
        lambda: thinet(task_of(rectified, 4, 3, images=(8, 3)), "h", 0.5, KEY),
        ["'h'", "custom_vjp", "isn't the product of windows with 'b'"],
    ),
}


@pytest.mark.sweep
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_named(case):
    run, words = BAD[case]
    with pytest.raises(ValueError, match=r".") as error:
        run()
    assert all(word in str(error.value) for word in words), error.value
