"""Training of networks with batch normalisation, against the same done by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from architectures import ARCHITECTURES
from flax import nnx

from experiments.harness import loop
from experiments.tasks import data
from experiments.tasks import images as module
from experiments.tasks.images import Images, Recipe, Trainer
from l0jax import models, train, units
from l0jax.methods.discrimination import Head

KEY = jax.random.key(0)
RECIPE = Recipe(epochs=2, batch_size=8, augment=False, drops=())


@functools.cache
def images():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (24, 5, 4, 2), np.uint8)
    labels = rng.integers(0, 3, 24).astype(np.int32)
    mean, deviation = np.float32([100, 120]), np.float32([60, 70])
    return Images(pixels, labels, mean, deviation)


def network():
    return models.make("vgg", ARCHITECTURES["vgg"]["small"], rngs=nnx.Rngs(0))


def batches(epoch):
    """The numbers of the images of each step."""
    return train.order_of_epoch(KEY, epoch, 24, 8)


def by_hand(model, epochs=2, heads=None, penalty=None):
    """The same training in the way of Flax, without any of ours."""
    model = nnx.clone(model)
    model.train()
    sgd = module.optimizer_of(RECIPE, 6)
    own = nnx.Optimizer(model, sgd, wrt=nnx.Param)

    def loss(model, x, labels):
        found = optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()
        return found + (0 if penalty is None else penalty(nnx.state(model)))

    for epoch in range(1, epochs + 1):
        for batch in batches(epoch):
            x = images().images[np.asarray(batch)].astype(np.float32)
            x = jnp.asarray((x - images().mean) / images().deviation)
            slopes = nnx.grad(loss)(model, x, images().labels[np.asarray(batch)])
            own.update(model, slopes)
    model.eval()
    return model


def same(found, expected, **tolerance):
    expected = units.arrays(nnx.state(expected))
    for path, array in units.arrays(nnx.state(found)).items():
        np.testing.assert_allclose(
            array,
            expected[path],
            err_msg=path,
            **{"rtol": 2e-4, "atol": 1e-5} | tolerance,
        )


def trained(trainer):
    assert trainer.run() == 0
    return trainer.trained()


@pytest.mark.slow
def test_training_is_that_of_flax():
    model = network()
    before = units.arrays(nnx.state(model))
    same(trained(Trainer(model, images(), RECIPE, KEY)), by_hand(model))
    for path, array in units.arrays(nnx.state(model)).items():
        np.testing.assert_array_equal(array, before[path], err_msg="written to")


@pytest.mark.slow
def test_a_penalty_is_part_of_the_loss():
    def penalty(params):
        return 0.1 * jnp.square(units.arrays(params)["head.kernel"]).sum()

    found = trained(Trainer(network(), images(), RECIPE, KEY, penalty=penalty))
    same(found, by_hand(network(), penalty=penalty))
    plain = trained(Trainer(network(), images(), RECIPE, KEY))
    assert np.abs(found.head.kernel[...] - plain.head.kernel[...]).max() > 1e-3


@pytest.mark.parametrize(
    ("share", "steps"), [(0.0, 5), (0.3, 10), (0.5, 7), (0.99, 10)]
)
def test_one_cycle_rises_to_its_highest_rate_and_ends_at_none(share, steps):
    rate = module.one_cycle(0.4, share, steps)
    rates = np.array([rate(step) for step in range(steps + 1)])
    top = min(round(share * steps), steps - 1)
    assert rates.argmax() == top
    assert rates[top] == pytest.approx(0.4)
    assert rates[steps] == 0
    assert (rates[:steps] > 0).all()
    np.testing.assert_allclose(np.diff(rates[: top + 1], 2), 0, atol=1e-6)
    np.testing.assert_allclose(np.diff(rates[top:], 2), 0, atol=1e-6)
    recipe = dataclasses.replace(RECIPE, cycle=share, weight_decay=0.0, momentum=0.0)
    sgd = module.optimizer_of(dataclasses.replace(recipe, learning_rate=0.4), steps)
    state = sgd.init(jnp.ones(()))
    for step in range(steps):
        moved, state = sgd.update(jnp.ones(()), state, jnp.ones(()))
        assert -float(moved) == pytest.approx(rates[step], abs=1e-7)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7])
def test_smoothed_labels_are_those_of_optax(share):
    logits = 3 * jax.random.normal(KEY, (6, 5))
    labels = jnp.arange(6, dtype=jnp.int32) % 5
    told = optax.smooth_labels(jax.nn.one_hot(labels, 5), share)
    expected = optax.softmax_cross_entropy(logits, told).mean()
    found = module.smoothed(logits, labels, share)
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_a_recipe_s_labels_are_smoothed():
    recipe = dataclasses.replace(RECIPE, epochs=1, smoothing=0.5)
    trainer = Trainer(network(), images(), recipe, KEY)
    plain = Trainer(
        network(), images(), dataclasses.replace(recipe, smoothing=0.0), KEY
    )
    apart = np.abs(trained(trainer).head.kernel[...] - trained(plain).head.kernel[...])
    assert apart.max() > 1e-3


def test_additional_losses_move_the_weights_first():
    """Algorithm S1 with plain SGD: one gradient for all losses, in two steps that are
    their sum; with the heads' own statistics."""
    recipe = dataclasses.replace(RECIPE, epochs=1, momentum=0.0, weight_decay=0.0)
    model, head = network(), Head(4, 3, rngs=nnx.Rngs(1))
    trainer = Trainer(model, images(), recipe, KEY, heads={"convs.1.kernel": head})
    trainer.run()

    both = nnx.List([nnx.clone(model), nnx.clone(head)])
    both[0].train()
    both[1].train()

    def loss(both, x, labels):
        net, head = both
        y = net.convs[0](x)
        y = jax.nn.relu(net.norms[0](y))
        from l0jax.models.convolution import max_pool_2x2

        at = net.convs[1](max_pool_2x2(y))
        y = jax.nn.relu(net.norms[1](at))
        y = jax.nn.relu(net.norms[2](net.convs[2](y)))
        logits = net.head(y.mean((1, 2)))
        each = optax.softmax_cross_entropy_with_integer_labels
        return each(logits, labels).mean() + each(head(at), labels).mean()

    sgd = nnx.Optimizer(both, optax.sgd(recipe.learning_rate), wrt=nnx.Param)
    for batch in batches(1):
        x = images().images[np.asarray(batch)].astype(np.float32)
        x = jnp.asarray((x - images().mean) / images().deviation)
        sgd.update(both, nnx.grad(loss)(both, x, images().labels[np.asarray(batch)]))
    same(trainer.trained(), both[0])
    same(trainer.trained_heads()["convs.1.kernel"], both[1])


def test_closed_units_stay_closed():
    model = network()
    structure = models.structure(model)
    keep = {"convs.0": np.array([True, False, True])}
    recipe = dataclasses.replace(RECIPE, weight_decay=0.0)
    trainer = Trainer(model, images(), recipe, KEY, structure=structure, keep=keep)
    found = trained(trainer)
    old, new = model.convs[1].kernel[...], found.convs[1].kernel[...]
    np.testing.assert_array_equal(new[:, :, 1], old[:, :, 1])
    assert np.abs(new[:, :, 0] - old[:, :, 0]).max() > 0


def test_training_goes_on_from_its_checkpoint(tmp_path):
    whole = Trainer(network(), images(), RECIPE, KEY)
    trained(whole)
    first, second = (Trainer(network(), images(), RECIPE, KEY) for _ in range(2))
    part = loop.Run(
        first.training,
        KEY,
        first.data,
        epochs=2,
        batch_size=8,
        folder=tmp_path,
        until=1,
        loop=True,
        show=False,
    )
    assert list(part) == [1]
    assert second.run(tmp_path) == 1
    for one, other in zip(
        jax.tree.leaves(second.state._replace(key=())),
        jax.tree.leaves(whole.state._replace(key=())),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_a_step_is_compiled_once():
    traced = []

    def penalty(params):
        traced.append(1)
        return jnp.zeros(())

    trained(Trainer(network(), images(), RECIPE, KEY, penalty=penalty))
    assert len(traced) == 1


def test_augmentation_shifts_and_mirrors():
    """Every result is one of the 9 x 9 x 2 that there are, and there are many."""
    image = np.float32(np.random.default_rng(0).normal(size=(6, 5, 3)))
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    known = {}
    for top in range(9):
        for left in range(9):
            crop = padded[top : top + 6, left : left + 5]
            known[crop.tobytes()] = (top, left, False)
            known[crop[:, ::-1].tobytes()] = (top, left, True)
    found = module.augmented(KEY, jnp.asarray(np.stack([image] * 400)))
    seen = {known[np.asarray(one).tobytes()] for one in found}
    assert {top for top, *_ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert len(seen) > 120
    flips = np.mean([known[np.asarray(one).tobytes()][2] for one in found])
    assert 0.4 < flips < 0.6
    again = module.augmented(KEY, jnp.asarray(np.stack([image] * 400)))
    np.testing.assert_array_equal(found, again)


def test_the_learning_rate_drops_at_shares_of_the_steps():
    recipe = Recipe(learning_rate=1.0, momentum=0.0, weight_decay=0.0)
    sgd = module.optimizer_of(recipe, 10)
    state, moved = sgd.init(jnp.zeros(())), []
    for _ in range(10):
        update, state = sgd.update(jnp.ones(()), state, jnp.zeros(()))
        moved.append(-float(update))
    np.testing.assert_allclose(moved, [1.0] * 4 + [0.1] * 2 + [0.01] * 4, rtol=1e-5)


def test_errors_are_counted():
    model, of = network(), images()
    x = jnp.asarray((of.images.astype(np.float32) - of.mean) / of.deviation)
    wrong = np.asarray(model(x)).argmax(-1) != of.labels
    split = data.Split(of.images, of.labels)
    for batch in (500, 7):
        found = module.error(model, split, of, batch)
        assert found == pytest.approx(100 * wrong.mean(), rel=1e-6)


def test_statistics_are_the_means_over_batches():
    """Of the first normalisation by hand; the model that was given keeps its own."""
    model, of = network(), images()
    before = jax.tree.map(np.asarray, nnx.state(model))
    found = module.recalibrated(model, of, batch_size=8)
    x = jnp.asarray((of.images.astype(np.float32) - of.mean) / of.deviation)
    maps = np.asarray(model.convs[0](x), np.float64).reshape(3, 8, -1, 3)
    of_batches = maps.reshape(3, -1, 3)
    np.testing.assert_allclose(
        found.norms[0].mean[...], of_batches.mean(1).mean(0), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        found.norms[0].var[...], of_batches.var(1).mean(0), rtol=1e-4
    )
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    assert found.norms[0].use_running_average
    assert found.norms[0].momentum == model.norms[0].momentum
    with pytest.raises(ValueError, match="24 training images don't fill a batch of 25"):
        module.recalibrated(model, of, batch_size=25)


def test_colours_are_normalised_over_the_training_images():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (50, 4, 4, 3), np.uint8)
    split = data.Split(pixels, np.zeros(50, np.int32))
    of = module.images_of(data.Dataset("x", split, split, split, 3, 255.0), 20)
    assert of.images.shape == (20, 4, 4, 3)
    found = module.normalised(jnp.asarray(pixels), of)
    np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(found.std((0, 1, 2)), 1, atol=1e-4)


def test_too_few_images_are_refused():
    recipe = dataclasses.replace(RECIPE, batch_size=25)
    with pytest.raises(ValueError, match="24 training images don't fill a batch of 25"):
        Trainer(network(), images(), recipe, KEY)
