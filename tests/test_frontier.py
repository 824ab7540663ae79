"""Dense networks are closed to a number of weights, by units and by single weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import nnx

from experiments import frontier, frontier_training
from experiments.harness import results
from experiments.reports import runs
from experiments.tasks import data
from l0jax import models, storage

TINY = frontier.Config(
    dataset="digits",
    weights=2_000,
    dense=2,
    closing=4,
    tuning=2,
    gate_learning_rate=0.1,
    progress=False,
)


@pytest.mark.filterwarnings("ignore:gates are undecided")
@pytest.mark.parametrize("gates", ["group", "weight"])
def test_as_many_weights_are_left_as_may_be(gates, tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, gates=gates, out=tmp_path / "run")
    (line,) = frontier.main(config)["results"]
    # A unit more would be too much; of single weights all that may be are there.
    assert TINY.weights - (400 if gates == "group" else 2) < line["weights"]
    assert line["weights"] <= TINY.weights
    stored = storage.load(tmp_path / "run" / f"{gates}-0")
    kernels = [a for a in jax.tree.leaves(nnx.state(stored, nnx.Param)) if a.ndim > 1]
    assert line["weights"] == sum(np.count_nonzero(kernel) for kernel in kernels)
    assert (kernels[0].size < 64 * 300) == (gates == "group")
    for name, value in line["metrics"].items():
        assert 0 <= value < 90, name
    (found,) = runs.runs(tmp_path / "run")
    assert found.metrics == line["metrics"]
    assert found.costs == {"weights": pytest.approx(line["weights"] / 50_200)}
    monkeypatch.setattr(frontier.Closed, "result", lambda _: pytest.fail("it is there"))
    assert frontier.main(config)["results"] == [line]


@pytest.mark.filterwarnings("ignore:gates are undecided")
def test_a_run_that_goes_on_ends_alike_and_claims_no_seconds(tmp_path):
    config = dataclasses.replace(TINY, out=tmp_path / "run")
    (line,) = frontier.main(config)["results"]
    assert line["seconds"] > 0
    (tmp_path / "run" / results.LINES).unlink()
    (again,) = frontier.main(config)["results"]
    assert again["seconds"] is None
    assert {**again, "seconds": 0} == {**line, "seconds": 0}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:gates are undecided")
def test_what_the_dense_network_says_is_learned_from(tmp_path):
    """Of labels alone, of the dense network alone: other networks."""
    found = [
        frontier.main(
            dataclasses.replace(TINY, distil=distil, out=tmp_path / str(distil))
        )["results"][0]["metrics"]
        for distil in (0.0, 1.0)
    ]
    assert found[0]["dense test error"] == found[1]["dense test error"]
    assert found[0]["test error"] != found[1]["test error"]


def test_the_loss_is_that_of_labels_and_of_what_is_said():
    """Against cross-entropies, whose difference from the divergence is what the
    teacher's own entropy is."""
    rng = np.random.default_rng(0)
    logits, said = rng.normal(size=(2, 5, 3)).astype(np.float32)
    labels = np.array([0, 1, 2, 1, 0], np.int32)
    batch = frontier.Examples(jnp.zeros((5, 2), jnp.uint8), labels, said)
    loss = frontier.learned_from(16.0, 0.5, 0.25, 2.0, 0)

    class Says(nnx.Module):
        def __init__(self):
            self.logits = nnx.Param(jnp.asarray(logits))

        def __call__(self, images):
            return self.logits[...]

    found, metrics = loss(Says(), batch, jax.random.key(0))

    def logarithms(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    nats = -logarithms(logits)[np.arange(5), labels].mean()
    p = np.exp(logarithms(said / 2))
    apart = (p * (np.log(p) - logarithms(logits / 2))).sum(-1).mean()
    assert float(found) == pytest.approx(0.75 * nats + 0.25 * 4 * apart, rel=1e-5)
    assert metrics["error"] == pytest.approx((logits.argmax(-1) != labels).mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": 50_200}, "50200 weights may be left, and the dense network has"),
        ({"weights": 0}, "weights must be at least 1, got 0"),
        ({"gate": "d_gating"}, "'d_gating' gates pay is no probability"),
        ({"gate": "sigmoid"}, "sigmoid"),
        ({"model": "resnet20"}, "unknown model 'resnet20'; there is mlp, lenet5"),
        ({"seeds": ()}, "give at least one seed"),
        ({"moved": -1}, "moved must be >= 0, got -1"),
        ({"distil": 1.5}, r"distil must lie in \[0, 1\], got 1.5"),
        ({"dropped": 1.0}, r"dropped must lie in \[0, 1\), got 1.0"),
        ({"softness": 0.0}, "softness must be > 0, got 0.0"),
        ({"batch_size": 2_000}, "batch_size is 2000, more than the"),
    ],
)
def test_what_can_t_be_run_is_refused(changes, message, tmp_path):
    config = dataclasses.replace(TINY, **changes, out=tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        frontier.main(config)
    assert not (tmp_path / "run" / results.LINES).exists()


def test_errors_of_the_test_images_are_told_when_they_are_asked_for(
    monkeypatch, capsys
):
    metrics = {
        f"{dense}{part} error": value
        for dense, value in (("dense ", 1.25), ("", 1.5))
        for part in ("validation", "test")
    }
    line = {"task": "mnist mlp", "method": "m", "seed": 0, "weights": 9_560}
    found = {"folder": "run", "results": [{**line, "metrics": metrics}]}
    monkeypatch.setattr(frontier, "main", lambda _: found)
    for test in (True, False):
        config = dataclasses.replace(TINY, test=test)
        monkeypatch.setattr(frontier.command_line, "parse", lambda *_, c=config: c)
        frontier.cli()
        said = capsys.readouterr().out
        assert "9,560 weights; validation error 1.25 % -> 1.50 %" in said
        assert ("test error" in said) == test


# ------------------------------------------------------------------- moved images


def test_images_are_moved_by_as_much_as_is_said():
    """Against SciPy, at all places."""
    images = np.random.default_rng(0).integers(0, 9, (25, 6, 5, 1), np.uint8)
    places = frontier_training.places_of(2)
    assert sorted(map(tuple, places.tolist())) == [
        (down, right) for down in range(-2, 3) for right in range(-2, 3)
    ]
    moved = frontier_training.placed(jnp.asarray(images), jnp.arange(25), 2)
    for image, place, found in zip(images, places, moved, strict=True):
        expected = scipy.ndimage.shift(image, (*place, 0), order=0)
        np.testing.assert_array_equal(found, expected)


def test_the_dense_network_says_what_it_says_of_the_moved_image():
    """And what is learned is the mean over places: no one image stands for all."""
    model = models.make(
        "mlp", {"features": (64, 7, 6, 10)}, rngs=nnx.Rngs(jax.random.key(0))
    )
    dataset = data.load("digits", 0.1)
    said = frontier_training.said_by(model, dataset, 1)
    assert said.shape == (len(dataset.train.labels), 9, 10)
    plain = frontier_training.said_by(model, dataset, 0)
    np.testing.assert_allclose(said[:, 4], plain, rtol=1e-5, atol=1e-5)
    some = slice(0, 40)
    examples = frontier_training.Examples(
        jnp.asarray(dataset.train.images[some]),
        jnp.asarray(dataset.train.labels[some]),
        jnp.asarray(said[some]),
    )
    # The dense network itself is nowhere apart from what it has said.
    loss = frontier_training.learned_from(dataset.scale, 0.0, 1.0, 1.0, 1)
    for seed in range(3):
        apart, _ = loss(model, examples, jax.random.key(seed))
        assert abs(apart) < 1e-5
    still = examples._replace(teacher=examples.teacher[:, 4])
    loss = frontier_training.learned_from(dataset.scale, 0.0, 1.0, 1.0, 0)
    assert abs(loss(model, still, jax.random.key(0))[0]) < 1e-5
    turned = examples._replace(teacher=examples.teacher[:, ::-1])
    loss = frontier_training.learned_from(dataset.scale, 0.0, 1.0, 1.0, 1)
    assert loss(model, turned, jax.random.key(0))[0] > 1e-3
