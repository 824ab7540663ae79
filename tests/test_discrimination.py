"""Discrimination-aware channel pruning against brute force on small networks."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from architectures import ARCHITECTURES
from flax import nnx

import l0jax.nnx
from l0jax import models, units
from l0jax.methods import discrimination
from l0jax.methods.discrimination import Chosen, Head, Selection, Stage
from l0jax.methods.task import Task, task

KEY = jax.random.key(3)


@functools.cache
def build(name="pre_activation_resnet"):
    """A small network with two batches of examples, and what was before it changed."""
    model = models.make(name, ARCHITECTURES[name]["small"], rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    images = np.float32(rng.normal(size=(16, *model.example.shape[1:])))
    labels = np.int32(rng.integers(0, 3, 16))
    found = task(model, models.structure(model), images, labels, batch_size=8)
    base = jax.tree.map(
        lambda a: (
            a + jnp.float32(0.1 * rng.normal(size=a.shape))
            if jnp.issubdtype(a.dtype, jnp.floating)
            else a
        ),
        found.params,
    )
    return model, found, base


def inner(of):
    """Only the groups that one layer reads, two of them."""
    single = [n for n, g in of.structure.groups.items() if len(g.used_by) == 1]
    return dataclasses.replace(of, structure=of.structure.only(*single[:2]))


def stage_of(of, head=True):
    (last,) = [
        of.structure.groups[n].used_by[0].path for n in [*of.structure.groups][-1:]
    ]
    return Stage(tuple(of.structure.groups), last if head else None)


def head_of(of, stage):
    return discrimination.heads(of, [stage], rngs=nnx.Rngs(1)).get(stage.kernel)


def whole_loss(of, base, group, head, selection, params):
    """The loss of equation 6 by the whole network, from the images."""
    flow, total = of.flow, 0.0
    point = flow.outs[0] if head is None else flow.after(stage_of(of).kernel)
    path = of.structure.groups[group].used_by[0].path
    for images, labels in of.batches():
        wanted = [flow.makes(path), point]
        made, at = flow.evaluate(flow.known(params, images), wanted)
        target, _ = flow.evaluate(flow.known(base, images), wanted)
        logits = at if head is None else head(at)
        total += selection.reconstruction * jnp.mean((made - target) ** 2) / 2
        total += selection.discrimination * of.loss(logits, labels).mean()
    return total / len(of.images)


def no_training(**settings):
    return Selection(epochs=0, **settings)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["pre_activation_resnet", "vgg", "lenet5"])
@pytest.mark.parametrize("norm", ["overall", "per_output"])
@pytest.mark.parametrize("with_head", [True, False])
def test_channels_are_those_of_the_steepest_whole_loss(name, norm, with_head):
    """Each choice of every layer by the gradient of the whole network's loss."""
    _, of, base = build(name)
    of = inner(of)
    stage = stage_of(of, with_head)
    head = head_of(of, stage) if with_head else None
    selection = no_training(norm=norm)
    found = {}
    keep, after = discrimination.prune(
        *(of, base, stage, head, selection, KEY),
        ratio=0.4,
        on_channel=found.__setitem__,
    )
    params = of.params
    for group in stage.groups:
        (slot,) = of.structure.groups[group].used_by
        size = of.structure.groups[group].size
        warm = units.arrays(params)[slot.path]
        owner = np.arange(size) if slot.unit_of is None else np.asarray(slot.unit_of)

        # To (units, positions, outputs), whatever the kernel looks like.
        def by_unit(kernel, owner=owner, size=size, axis=slot.axis):
            rows = np.moveaxis(np.asarray(kernel, np.float64), axis, 0)
            rows = rows.reshape(len(owner), -1, rows.shape[-1])
            return [np.concatenate(rows[owner == unit]) for unit in range(size)]

        chosen, losses = [], []
        for _ in range(keep[group].sum()):
            on = np.float32(np.isin(owner, chosen))
            shape = np.ones(warm.ndim, int)
            shape[slot.axis] = -1
            kernel = warm * on.reshape(shape)
            loss, slope = jax.value_and_grad(
                lambda k, params=params, group=group, path=slot.path: whole_loss(
                    of, base, group, head, selection, units.replace(params, {path: k})
                )
            )(kernel)
            norms = [
                np.linalg.norm(g)
                if norm == "overall"
                else np.linalg.norm(g, axis=0).sum()
                for g in by_unit(slope)
            ]
            norms = [-1 if u in chosen else n for u, n in enumerate(norms)]
            chosen.append(int(np.argmax(norms)))
            losses.append(loss)
        assert list(found[group].order) == chosen
        assert list(np.flatnonzero(keep[group])) == sorted(chosen)
        np.testing.assert_allclose(found[group].losses, losses, rtol=1e-5)
        on = np.float32(np.isin(owner, chosen)).reshape(shape)
        params = units.replace(params, {slot.path: warm * on})
    for path, array in units.arrays(after).items():
        np.testing.assert_allclose(array, units.arrays(params)[path], rtol=1e-6)


def dense(seed, orthogonal):
    """A layer that reads six inputs: `x @ w`, to be reconstructed from three."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(64, 6))
    if orthogonal:
        x = np.linalg.qr(x)[0] * 8
    w = rng.normal(size=(6, 4))
    params = {"features": {"w": np.eye(6, dtype=np.float32)}, "w": np.float32(w)}

    def apply(params, x):
        return (x @ params["features"]["w"]) @ params["w"]

    structure = l0jax.trace(apply, params, np.float32(x))
    return (
        Task(
            apply, params, structure, np.float32(x)[None], np.zeros((1, 64), np.int32)
        ),
        x,
        w,
    )


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(6))
def test_greedy_choice_is_the_best_of_all(seed):
    """Where inputs are orthogonal the best three are known by trying all of them; the
    sub-problem's solution is that of least squares."""
    of, x, w = dense(seed, orthogonal=True)
    (name,) = [n for n, g in of.structure.groups.items() if g.used_by[0].path == "w"]
    of = dataclasses.replace(of, structure=of.structure.only(name))
    selection = Selection(
        discrimination=0.0, epochs=60, optimizer=lambda: optax.sgd(1.0)
    )
    found = {}
    keep, after = discrimination.prune(
        of,
        of.params,
        Stage((name,), None),
        None,
        selection,
        KEY,
        ratio=0.5,
        on_channel=found.__setitem__,
    )
    y = x @ w

    def apart(chosen):
        left = x[:, chosen]
        return np.sum((left @ np.linalg.lstsq(left, y, rcond=None)[0] - y) ** 2)

    best = min(itertools.combinations(range(6), 3), key=lambda c: apart(list(c)))
    assert tuple(np.flatnonzero(keep[name])) == best
    left = x[:, list(best)]
    solved = np.linalg.lstsq(left, y, rcond=None)[0]
    np.testing.assert_allclose(np.asarray(after["w"])[list(best)], solved, atol=1e-3)
    assert not np.asarray(after["w"])[~keep[name]].any()
    assert len(found[name].losses) == 3


def test_what_was_not_chosen_can_be_removed():
    model, of, base = build()
    stage = stage_of(of)
    keep, after = discrimination.prune(
        of, base, stage, head_of(of, stage), Selection(), KEY, ratio=0.5
    )
    graph, _ = nnx.split(model)
    full = nnx.merge(graph, after)
    small = l0jax.nnx.shrink(full, keep, of.structure)
    images = jnp.asarray(of.images[0])
    expected = full(images)
    np.testing.assert_allclose(
        small(images), expected, atol=1e-5 * np.abs(expected).max()
    )
    for name, flags in keep.items():
        size = of.structure.groups[name].size
        assert flags.sum() == size - size // 2


def run(selection=None, of=None, **how):
    _, built, base = build()
    of = inner(of or built)
    stage = stage_of(of)
    kept = {}
    how = {"ratio": 0.5, **how} if "epsilon" not in how else how
    keep, after = discrimination.prune(
        of,
        base,
        stage,
        head_of(of, stage),
        selection or Selection(),
        KEY,
        on_channel=kept.__setitem__,
        **how,
    )
    return keep, after, kept


def test_each_option_does_something():
    arrays = units.arrays(run()[1])
    for changed in (
        {"reconstruction": 2.0},
        {"discrimination": 0.1},
        {"epochs": 2},
        {"added_from": "zero"},
        {"random": True},
        {"optimizer": lambda: optax.sgd(0.1)},
    ):
        others = units.arrays(run(Selection(**changed))[1])
        assert any((others[p] != arrays[p]).any() for p in arrays), changed
    losses = [
        next(iter(run(s)[2].values())).losses[0]
        for s in (Selection(), Selection(gradient_at="warm"))
    ]
    losses.append(next(iter(run(Selection(gradient_batches=1))[2].values())).losses[0])
    assert len(set(losses)) == 3


def test_several_channels_at_once_are_as_many_as_asked():
    keep, _, kept = run(Selection(channels_at_once=2, epochs=0), ratio=0.3)
    for name, flags in keep.items():
        assert flags.sum() == len(kept[name].order)
        # One gradient for two channels, and one for what is left.
        assert len(kept[name].losses) == -(-flags.sum() // 2)


def test_random_choices_follow_the_key():
    _, of, base = build()
    of = inner(of)
    stage = stage_of(of)

    def order(key):
        kept = {}
        discrimination.prune(
            of,
            base,
            stage,
            head_of(of, stage),
            no_training(random=True),
            key,
            ratio=0.0,
            on_channel=kept.__setitem__,
        )
        return [chosen.order for chosen in kept.values()]

    assert order(KEY) == order(KEY)
    assert any(order(jax.random.key(seed)) != order(KEY) for seed in range(3))
    assert all(sorted(o) == list(range(len(o))) for o in order(KEY))


def test_adaptive_pruning_stops_where_a_channel_makes_no_difference():
    left = []
    for epsilon in (1e-9, 0.005, 0.05, 10.0):
        keep, _, kept = run(epsilon=epsilon)
        left.append(sum(flags.sum() for flags in keep.values()))
        for name, flags in keep.items():
            losses = kept[name].losses
            # All choices but the last made more of a difference.
            assert all(
                abs(a - b) > epsilon * losses[0] for a, b in itertools.pairwise(losses)
            )
            assert flags.sum() == len(losses)
    assert left == sorted(left, reverse=True)
    assert left[-1] == len(keep)
    assert left[0] > left[-1]


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["pre_activation_resnet", "lenet5"])
@pytest.mark.parametrize("norm", ["overall", "per_output"])
def test_norms_are_over_all_weights_of_a_channel_or_for_each_output(name, norm):
    _, of, _ = build(name)
    of = inner(of)
    stage, rng = stage_of(of, head=False), np.random.default_rng(0)
    for group in stage.groups:
        layer = discrimination._Layer(of, stage, None, Selection(norm=norm), group)
        (slot,) = of.structure.groups[group].used_by
        kernel = units.arrays(of.params)[slot.path]
        slope = rng.normal(size=kernel.shape)
        found = layer.norms({slot.path: jnp.float32(slope)})
        size = of.structure.groups[group].size
        owner = np.arange(size) if slot.unit_of is None else np.asarray(slot.unit_of)
        rows = np.moveaxis(slope, slot.axis, 0)
        rows = rows.reshape(len(owner), -1, rows.shape[-1])
        for unit in range(size):
            its = np.concatenate(rows[owner == unit])
            each = np.sqrt(np.square(its).sum(0))
            whole = np.sqrt(np.square(its).sum())
            expected = whole if norm == "overall" else each.sum()
            np.testing.assert_allclose(found[unit], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("losses", "full"),
    [
        ((4.0,), False),
        # Against the loss of the empty layer, not the one before.
        ((4.0, 2.0, 1.9), True),
        ((4.0, 2.0, 1.8), False),
        # A loss that grows has changed, too.
        ((4.0, 2.0, 2.1), True),
        ((4.0, 2.0, 2.2), False),
    ],
)
def test_a_layer_is_full_by_equation_10(losses, full):
    assert discrimination._is_full(losses, 0.03) == full
    assert not discrimination._is_full(losses, None)


def test_a_choice_goes_on_where_it_was_stopped():
    states = []
    _, of, base = build()
    of = inner(of)
    stage = stage_of(of)

    def go(chosen=None, on_channel=None):
        return discrimination.prune(
            of,
            base,
            stage,
            head_of(of, stage),
            Selection(),
            KEY,
            ratio=0.0,
            chosen=chosen,
            on_channel=on_channel,
        )

    keep, after = go(on_channel=lambda *state: states.append(state))
    for stop in range(1, len(states)):
        more = []
        again, resumed = go(
            dict(states[:stop]), lambda *state, to=more: to.append(state)
        )
        # What was chosen before is not chosen again.
        assert len(more) == len(states) - stop
        jax.tree.map(np.testing.assert_array_equal, (again, resumed), (keep, after))


def test_a_layer_is_compiled_once():
    traced = []

    def loss(logits, labels):
        traced.append(1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    _, of, _ = build()
    keep, *_ = run(of=dataclasses.replace(of, loss=loss))
    assert len(traced) == len(keep)


def test_any_loss_does():
    _, of, base = build()
    targets = np.float32(np.random.default_rng(1).normal(size=(2, 8, 3)))
    of = inner(
        dataclasses.replace(
            of, labels=targets, loss=lambda y, t: jnp.square(y - t).mean(-1)
        )
    )
    stage = stage_of(of)
    found = {}
    discrimination.prune(
        of,
        base,
        stage,
        head_of(of, stage),
        Selection(),
        KEY,
        ratio=0.0,
        on_channel=found.__setitem__,
    )
    for chosen in found.values():
        assert chosen.losses[-1] < chosen.losses[0]


def shapes_of(name):
    model = nnx.eval_shape(lambda: models.preset(name, rngs=nnx.Rngs(0)))
    structure = models.structure(model)
    within = [n for n, g in structure.groups.items() if len(g.used_by) == 1]
    images = np.zeros((1, 1, *model.shape), np.float32)
    graph, state = nnx.split(model)
    return Task(
        lambda state, x: nnx.merge(graph, state)(x),
        state,
        structure.only(*within),
        images,
        np.zeros((1, 1), np.int32),
    )


@pytest.mark.parametrize(
    ("name", "losses", "after"),
    [
        ("resnet56", 3, [6, 13, 20]),
        ("resnet18", 2, [2, 5]),
        ("resnet50", 3, [4, 9, 14]),
    ],
)
def test_losses_are_where_the_authors_put_them(name, losses, after):
    """After blocks 7, 14, 21 of 27; 3 and 6 of 8; 5, 10 and 15 of 16."""
    of = shapes_of(name)
    found = discrimination.stages(of, losses)
    blocks = [int(stage.kernel.split(".")[1]) for stage in found[:-1]]
    assert blocks == after
    assert found[-1].kernel is None
    assert [n for s in found for n in s.groups] == list(of.structure.groups)
    for stage, block in zip(found, after, strict=False):
        assert all(int(name.split(".")[1]) <= block for name in stage.groups)


@pytest.mark.parametrize("losses", range(4))
def test_there_are_as_many_stages_as_losses(losses):
    _, of, _ = build("vgg")
    found = discrimination.stages(of, min(losses, 2))
    assert len(found) == min(losses, 2) + 1
    assert all(stage.groups for stage in found)


def test_a_head_sees_maps_and_features():
    rng = np.random.default_rng(0)
    head = Head(5, 3, rngs=nnx.Rngs(0))
    mean, var, scale, bias = np.float32(rng.uniform(0.5, 2, size=(4, 5)))
    for name, value in (("mean", mean), ("var", var), ("scale", scale), ("bias", bias)):
        getattr(head.norm, name)[...] = jnp.asarray(value)
    maps = np.float32(rng.normal(size=(4, 2, 3, 5)))
    normal = (maps - mean) / np.sqrt(var + 1e-5) * scale + bias
    by_hand = np.maximum(normal, 0).reshape(4, 6, 5).mean(1)
    kernel, shift = (np.asarray(a[...]) for a in (head.dense.kernel, head.dense.bias))
    expected = by_hand @ kernel + shift
    np.testing.assert_allclose(head(jnp.asarray(maps)), expected, rtol=1e-5, atol=1e-5)
    assert head(jnp.asarray(maps[:, 0, 0])).shape == (4, 3)


def with_nan(a):
    return a * jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else a


BAD = {
    "both": ({"ratio": 0.5, "epsilon": 0.1}, ["one of ratio and epsilon"]),
    "neither": ({"ratio": None}, ["one of ratio and epsilon"]),
    "ratio": ({"ratio": 1.0}, ["[0, 1)", "1.0"]),
    "negative": ({"ratio": -0.1}, ["[0, 1)", "-0.1"]),
    "epsilon": ({"epsilon": 0.0}, ["epsilon must be above 0", "0.0"]),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_make_no_sense_are_named(case):
    how, words = BAD[case]
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        run(**how)
    assert all(word in str(error.value) for word in words)


def test_a_loss_that_is_not_finite_is_named():
    _, of, base = build()
    of = inner(of)
    stage = stage_of(of)
    broken = dataclasses.replace(of, params=jax.tree.map(with_nan, of.params))
    with pytest.raises(ValueError, match="is nan after 0 of its") as error:
        discrimination.prune(
            broken, base, stage, head_of(of, stage), Selection(), KEY, ratio=0.5
        )
    assert stage.groups[0] in str(error.value)


def test_heads_must_fit_the_stage():
    _, of, base = build()
    of = inner(of)
    for with_head in (True, False):
        stage = stage_of(of, with_head)
        head = None if with_head else head_of(of, stage_of(of))
        with pytest.raises(ValueError, match="needs a head, the last one none"):
            discrimination.prune(of, base, stage, head, Selection(), KEY, ratio=0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reconstruction": -1.0}, "reconstruction must be at least 0"),
        ({"discrimination": float("nan")}, "discrimination must be at least 0"),
        ({"reconstruction": 0.0, "discrimination": 0.0}, "nothing to choose by"),
        ({"epochs": -1}, "epochs must be at least 0"),
        ({"channels_at_once": 0}, "channels_at_once must be at least 1"),
        ({"gradient_batches": 0}, "gradient_batches must be at least 1"),
    ],
)
def test_selections_that_choose_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Selection(**settings)


def test_too_many_losses_are_refused():
    _, of, _ = build("vgg")
    with pytest.raises(ValueError, match="got 9 additional losses"):
        discrimination.stages(of, 9)
    with pytest.raises(ValueError, match="got -1 additional losses"):
        discrimination.stages(of, -1)


def test_chosen_is_what_is_stored():
    _, _, kept = run(Selection(epochs=0))
    chosen = next(iter(kept.values()))
    assert isinstance(chosen, Chosen)
    assert len(chosen.order) == len(chosen.losses)
