"""Closing doomed units softly, making up for them, removing them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES, inputs_for
from flax import nnx
from retraces import traced_once

import l0jax.nnx
from l0jax import methods, models, units
from l0jax.methods import Closing, LeastSquares, relocation
from l0jax.methods.relocation import CURVES

KEY = jax.random.key(0)
KEEP = {"layer": np.array([True, False, True, False])}
every_model = pytest.mark.parametrize("name", ARCHITECTURES)


def built(name):
    sizes = ARCHITECTURES[name]
    smallest = sizes["small"] if name == "mlp" else sizes.get("odd", sizes["small"])
    model = models.make(name, smallest, rngs=nnx.Rngs(0))
    structure = models.structure(model)
    # Those that layers make: not the rows that LeNet-5's dense layer reads.
    made = [
        n
        for n, group in structure.groups.items()
        if all(slot.axis is not None for slot in group.made_by)
    ]
    if isinstance(model, models.Decoder):
        # Nor what is gated where it is looked up and made, which no product reads.
        made = [name for name in made if name.endswith((".heads", ".hidden"))]
    structure = structure.only(*(n for n in made if n not in structure.inputs))
    images = inputs_for(model, 24, seed=0)
    labels = np.int32(np.random.default_rng(0).integers(3, size=24))
    return model, structure, methods.task(model, structure, images, labels, 8)


def some(structure, least=1):
    """Every other unit stays."""
    return {
        name: np.arange(group.size) % 2 == 0
        for name, group in structure.groups.items()
        if group.size > least
    } | {
        name: np.ones(group.size, bool)
        for name, group in structure.groups.items()
        if group.size <= least
    }


# ------------------------------------------------------------------------ schedules


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_closes_what_is_open(name):
    shares = np.linspace(0, 1, 101)
    values = np.array([CURVES[name](share) for share in shares])
    np.testing.assert_allclose(values[[0, -1]], (1, 0), atol=1e-6)
    assert (np.diff(values) <= 0).all()


@pytest.mark.parametrize("curve", CURVES)
def test_kept_units_stay_open_and_doomed_ones_close(curve):
    closing = Closing(curve)
    for share in (0.0, 0.3, 1.0):
        gates = closing.gates(KEEP, share)["layer"]
        expected = np.where(KEEP["layer"], 1, CURVES[curve](share))
        np.testing.assert_allclose(gates, expected, rtol=1e-6)


def test_a_stochastic_gate_is_open_as_often_as_the_curve_says():
    closing = Closing(stochastic=True)
    draws = jax.vmap(lambda key: closing.gates(KEEP, 0.3, key)["layer"])(
        jax.random.split(KEY, 4000)
    )
    assert set(np.unique(draws)) == {0.0, 1.0}
    expected = np.where(KEEP["layer"], 1, CURVES["cosine"](0.3))
    np.testing.assert_allclose(draws.mean(0), expected, atol=0.03)
    # Units of a layer are drawn apart from each other.
    assert (draws[:, 1] != draws[:, 3]).any()
    last = closing.gates(KEEP, 1.0, KEY)["layer"]
    np.testing.assert_array_equal(last, KEEP["layer"])


def test_decay_leaves_a_known_share_and_then_nothing():
    closing, left = Closing(decay=True), np.ones(4)
    factors = [np.asarray(closing.decayed(KEEP, t, 50)["layer"]) for t in range(50)]
    for factor in factors:
        left = left * factor
    np.testing.assert_allclose(left[KEEP["layer"]], 1)
    np.testing.assert_allclose(left[~KEEP["layer"]], math.exp(-5), rtol=1e-5)
    assert (np.diff([f[1] for f in factors]) < 0).all(), "faster and faster"
    for share, gate in ((0.0, 1), (0.99, 1), (1.0, 0)):
        np.testing.assert_array_equal(closing.gates(KEEP, share)["layer"][1], gate)
    # Other closings leave the weights alone.
    np.testing.assert_array_equal(Closing().decayed(KEEP, 3, 50)["layer"], 1)


def test_a_schedule_is_data():
    """One program for every share of it."""
    curves = [Closing(curve) for curve in CURVES]
    for closing in (*curves, Closing(stochastic=True), Closing(decay=True)):
        gates = jax.jit(traced_once(functools.partial(closing.gates, KEEP)))
        for share in (0.0, 0.5, 1.0):
            found = gates(jnp.float32(share), KEY)["layer"]
            np.testing.assert_allclose(
                found, closing.gates(KEEP, share, KEY)["layer"], atol=1e-6
            )


def test_steps_of_a_budget():
    assert Closing().steps(110) == 55
    assert Closing(share=0.0).steps(1) == 0
    assert Closing(share=1.0).steps(3) == 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Closing("square"), "unknown curve 'square'; there is cosine"),
        (lambda: Closing(share=1.5), r"share must be in \[0, 1\].* got 1.5.* budget"),
        (lambda: Closing(share=-0.1), "got -0.1"),
        (lambda: Closing(stochastic=True, decay=True), "exclude each other"),
        (lambda: Closing(share=0.1).steps(3), "0.1 of 3 steps is less than one step"),
        (lambda: Closing(stochastic=True).gates(KEEP, 0.5), "need a key"),
    ],
)
def test_bad_schedules_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --------------------------------------------------------------------- least squares


def test_least_squares_against_the_formula():
    """Both hidden layers of an MLP, one after the other, with their biases."""
    model, structure, task = built("mlp")
    keep = some(structure)
    fit = LeastSquares(task, ridge=0.03)
    fitted = units.arrays(fit(keep, KEY))
    x = np.float64(np.concatenate(np.asarray(task.images)))
    x = x.reshape(len(x), -1)
    arrays = {p: np.float64(a) for p, a in units.arrays(task.params).items()}
    depth = len(model.layers)
    base = now = x
    for i in range(depth):
        kernel, bias = (arrays[f"layers.{i}.{n}"] for n in ("kernel", "bias"))
        target = base @ kernel + bias
        if i == 0:
            made = now @ kernel + bias
        else:
            kept = keep[f"hidden{i}"]
            h = np.concatenate([now[:, kept], np.ones((len(now), 1))], 1)
            w = np.concatenate([kernel[kept], bias[None]])
            gram = h.T @ h / len(h)
            ridge = 0.03 * gram.diagonal().mean() * np.eye(len(gram))
            w = w + np.linalg.solve(gram + ridge, h.T @ (target - h @ w) / len(h))
            found = fitted[f"layers.{i}.kernel"]
            np.testing.assert_allclose(found[kept], w[:-1], rtol=2e-3, atol=1e-4)
            np.testing.assert_array_equal(found[~kept], 0)
            np.testing.assert_allclose(
                fitted[f"layers.{i}.bias"], w[-1], rtol=2e-3, atol=1e-4
            )
            made = h @ w
        base, now = np.maximum(target, 0), np.maximum(made, 0)


def test_a_unit_that_others_repeat_is_made_up_for():
    """With a copy of each doomed unit among the kept ones nothing is lost."""
    _, structure, task = built("lenet5")
    keep, new = {}, {}
    arrays = {p: np.array(a) for p, a in units.arrays(task.params).items()}
    for name, group in structure.groups.items():
        half = group.size // 2
        keep[name] = np.arange(group.size) < group.size - half
        for slot in group.made_by:
            along = np.moveaxis(arrays[slot.path], slot.axis, 0)
            along[group.size - half :] = along[:half]
            new[slot.path] = arrays[slot.path]
    params = units.replace(task.params, new)
    fitted = LeastSquares(task, positions=1000, ridge=1e-5)(keep, KEY, base=params)
    for batch, _ in task.batches():
        before, after = (np.asarray(task.apply(p, batch)) for p in (params, fitted))
        assert np.abs(before - after).max() < 2e-3 * np.abs(before).max()
    z = {n: jnp.float32(k) for n, k in keep.items()}
    cut = units.apply_gates(params, z, structure.groups)
    after = np.asarray(task.apply(cut, task.images[0]))
    before = np.asarray(task.apply(params, task.images[0]))
    assert np.abs(before - after).max() > 0.05 * np.abs(before).max()


@pytest.mark.sweep
@every_model
def test_what_is_fitted_comes_nearer(name):
    """Of every architecture: where doomed units are gone, the first layers that read
    them make more of what they made."""
    _, structure, task = built(name)
    keep = some(structure)
    fit = LeastSquares(task, positions=1000, ridge=1e-4)
    fitted = fit(keep, KEY)
    z = {n: jnp.float32(k) for n, k in keep.items()}
    cut = units.apply_gates(task.params, z, structure.groups)
    path, reader = next(iter(fit.readers.items()))
    arrays = units.arrays(fitted)
    kept = np.asarray(reader.kept(keep), bool)
    np.testing.assert_array_equal(reader.of.matrix(arrays[path])[~kept], 0)
    bias, old = (
        0 if reader.bias is None else np.asarray(of[reader.bias])
        for of in (arrays, units.arrays(task.params))
    )

    def apart(params, bias):
        total = 0
        for images, _ in task.batches():
            made, target = (
                task.flow.evaluate(task.flow.known(p, images), [reader.of.makes])[0]
                for p in (params, task.params)
            )
            made = np.moveaxis(np.asarray(made), reader.of.channels_axis, -1)
            target = np.moveaxis(np.asarray(target), reader.of.channels_axis, -1)
            total += np.square(made + bias - target - old).sum()
        return total

    assert apart(fitted, bias) < apart(cut, old)


def test_each_layer_is_compiled_once_for_all_choices(monkeypatch):
    _, structure, task = built("mlp")
    fit, traces = LeastSquares(task), []
    add = fit._add

    def counted(total, *args):
        traces.extend(total)
        return add(total, *args)

    monkeypatch.setattr(fit, "_add", counted)
    for flip in (False, True):
        keep = {n: k ^ flip for n, k in some(structure).items()}
        fit(keep, jax.random.fold_in(KEY, flip), params=task.params)
    assert sorted(traces) == sorted(fit.readers)


@pytest.mark.sweep
@every_model
def test_layers_of_a_level_do_not_depend_on_each_other(name):
    _, _, task = built(name)
    fit = LeastSquares(task)
    in_order = [path for level in fit.levels for path in level]
    assert in_order == list(fit.readers)
    for level in fit.levels:
        made = task.flow.dependents([task.flow.params[path] for path in level])
        assert not any(fit.readers[path].of.value in made for path in level)
    if name == "i3d":
        assert len(fit.levels) < len(fit.readers)


def test_shift_is_the_rest_of_the_way():
    """With all of the shift and closed gates the network is the fitted one."""
    _, structure, task = built("lenet5")
    keep, fit = some(structure), LeastSquares(task)
    shift = fit.shift(keep, KEY)
    gates = {n: jnp.float32(k) for n, k in keep.items()}
    groups = structure.groups
    closed = relocation.closing(task.params, gates, groups, shift, 1.0)
    fitted = fit(keep, KEY)
    for path, values in units.arrays(fitted).items():
        np.testing.assert_allclose(
            units.arrays(closed)[path], values, atol=1e-5, err_msg=path
        )
    unmoved = relocation.closing(task.params, task.open_gates, groups, shift, 0.0)
    for path, values in units.arrays(task.params).items():
        np.testing.assert_array_equal(units.arrays(unmoved)[path], values)


def test_residual_knowledge_is_what_doomed_units_add():
    _, structure, task = built("mlp")
    keep = some(structure)
    found = LeastSquares(task).residual(keep, KEY)
    x = np.concatenate(np.asarray(task.images)).reshape(24, -1)
    for i in (1, 2):
        arrays = units.arrays(task.params)
        kernel, bias = (
            np.asarray(arrays[f"layers.{i - 1}.{n}"]) for n in ("kernel", "bias")
        )
        x = np.maximum(x @ kernel + bias, 0)
        gone = ~keep[f"hidden{i}"]
        added = x[:, gone] @ np.asarray(arrays[f"layers.{i}.kernel"])[gone]
        expected = np.square(added).sum(1).mean()
        assert found[f"layers.{i}.kernel"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"positions": 0}, "positions must be at least 1 and ridge above 0, got 0"),
        ({"ridge": 0.0}, "positions must be at least 1 and ridge above 0, got .* 0.0"),
        ({"active": 1.0}, r"active must be in \[0, 1\), got 1.0"),
        ({"active": -0.1}, r"active must be in \[0, 1\), got -0.1"),
    ],
)
def test_bad_settings_of_the_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LeastSquares(built("mlp")[2], **settings)


def test_units_that_are_hardly_active_are_left_alone():
    """The fit would see to it that they stay so."""
    _, structure, task = built("mlp")
    keep = some(structure)
    old = units.arrays(task.params)
    # Of the second hidden layer unit 0 is never active, unit 2 for one example.
    x = np.maximum(
        np.concatenate(np.asarray(task.images)).reshape(24, -1)
        @ np.asarray(old["layers.0.kernel"])
        + np.asarray(old["layers.0.bias"]),
        0,
    )
    values = np.sort(x @ np.asarray(old["layers.1.kernel"])[:, 2])
    bias = np.array(old["layers.1.bias"])
    bias[0], bias[2] = -100, -(values[-1] + values[-2]) / 2
    base = units.replace(task.params, {"layers.1.bias": jnp.asarray(bias)})

    def moved(active):
        fit = LeastSquares(task, active=active)
        new = units.arrays(fit(keep, KEY, base=base))
        kernel = np.asarray(new["layers.1.kernel"] - old["layers.1.kernel"])
        kept = np.abs(kernel[keep["hidden1"]]).max(0) > 0
        return kept | (np.asarray(new["layers.1.bias"]) != bias)

    def but(*units):
        return ~np.isin(np.arange(structure.groups["hidden2"].size), units)

    np.testing.assert_array_equal(moved(0.0), but())
    np.testing.assert_array_equal(moved(0.5 / 24), but(0))
    np.testing.assert_array_equal(moved(1.5 / 24), but(0, 2))


def test_what_is_not_finite_is_named():
    _, structure, task = built("mlp")
    broken = units.arrays(task.params)["layers.0.kernel"] * jnp.nan
    params = units.replace(task.params, {"layers.0.kernel": broken})
    with pytest.raises(ValueError, match=r"'layers.1.kernel' reads or makes isn't fin"):
        LeastSquares(task)(some(structure), KEY, params=params)


# --------------------------------------------------------------------------- removal


@pytest.mark.sweep
@every_model
def test_removal_is_exact(name):
    model, structure, task = built(name)
    keep = some(structure)
    small = relocation.remove(model, structure, keep, task.images[0])
    z = {n: jnp.float32(k) for n, k in keep.items()}
    closed = l0jax.nnx.fold(model, z, structure.groups)
    before, after = (
        np.asarray(net(jnp.asarray(task.images[0]))) for net in (closed, small)
    )
    assert np.abs(before - after).max() <= 1e-5 * max(np.abs(before).max(), 1)
    sizes = [
        sum(a.size for a in jax.tree.leaves(nnx.state(net))) for net in (model, small)
    ]
    assert sizes[1] < sizes[0]


def test_a_removal_that_changes_something_is_refused(monkeypatch):
    model, structure, task = built("mlp")
    monkeypatch.setattr(l0jax.nnx, "fold", lambda model, z, groups: model)
    with pytest.raises(
        ValueError, match=r"removing \d+ closed units changes an output"
    ):
        relocation.remove(model, structure, some(structure), task.images[0])


# ----------------------------------------------------------------- additional losses


def test_distillation_is_a_divergence():
    rng = np.random.default_rng(0)
    teacher, logits = (np.float32(rng.normal(size=(5, 4))) for _ in range(2))
    np.testing.assert_allclose(relocation.distillation(teacher, teacher), 0, atol=1e-6)
    p, q = (
        np.exp(a / 2) / np.exp(a / 2).sum(1, keepdims=True) for a in (teacher, logits)
    )
    expected = 4 * (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(
        relocation.distillation(logits, teacher), expected, rtol=1e-4
    )


def test_mismatch_counts_kept_units_alone():
    target = jnp.float32([[3.0, 4.0, 100.0]])
    made = jnp.float32([[3.0, 0.0, 7.0]])
    kept = jnp.float32([1.0, 1.0, 0.0])
    assert float(relocation.mismatch(made, target, kept)) == pytest.approx(16 / 25)


def test_gradnorm_follows_the_gradient_of_its_loss():
    norms, losses = jnp.float32([2.0, 0.5, 1.0]), jnp.float32([0.9, 0.2, 0.5])
    first, weights = jnp.float32([1.0, 1.0, 0.5]), jnp.float32([1.2, 0.8, 1.0])
    left = losses / first
    target = (weights * norms).mean() * (left / left.mean()) ** 1.5

    def imbalance(w):
        return jnp.abs(w * norms - target).sum()

    moved = weights - 0.1 * jax.grad(imbalance)(weights)
    expected = moved * 3 / moved.sum()
    found = relocation.gradnorm(weights, norms, losses, first, 1.5, 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert float(found.sum()) == pytest.approx(3)
