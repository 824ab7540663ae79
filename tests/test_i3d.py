"""I3D: convolutions and maxima over clips, inflation, where its units are read."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES
from flax import nnx

from l0jax import models, units
from l0jax.models import convolution, i3d

SMALL = ARCHITECTURES["i3d"]["small"]


def random(shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def agree_with_gradients(mine, theirs, *arguments):
    found, pull = jax.vjp(mine, *arguments)
    expected, their_pull = jax.vjp(theirs, *arguments)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mine(*arguments), expected, rtol=1e-4, atol=1e-5)
    dy = random(found.shape, 1)
    for ours, other in zip(pull(dy), their_pull(dy), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("clips", "kernel", "strides"),
    [
        ((2, 4, 5, 6, 3), (3, 3, 3, 3, 4), (1, 1, 1)),
        ((3, 5, 6, 7, 1), (5, 2, 3, 1, 2), (2, 2, 1)),
        ((2, 2, 1, 1, 3), (3, 3, 3, 3, 2), (1, 2, 2)),
        ((2, 3, 4, 4, 3), (1, 1, 1, 3, 2), (1, 1, 1)),
    ],
)
def test_convolution_over_clips_is_that_of_xla(
    clips, kernel, strides, backend, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    agree_with_gradients(
        functools.partial(convolution.conv3d, strides=strides),
        lambda x, kernel: jax.lax.conv_general_dilated(
            x,
            kernel,
            strides,
            "SAME",
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        ),
        random(clips),
        random(kernel, 2),
    )


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("clips", "window", "strides"),
    [
        ((2, 4, 5, 6, 3), (3, 3, 3), (1, 1, 1)),
        ((2, 5, 6, 7, 2), (1, 3, 3), (1, 2, 2)),
        ((1, 5, 4, 1, 2), (2, 2, 2), (2, 2, 2)),
    ],
)
def test_maxima_over_clips_are_those_of_reduce_window(
    clips, window, strides, backend, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    agree_with_gradients(
        lambda x: convolution.max_pool_3d(x, window, strides),
        lambda x: nnx.max_pool(x, window, strides=strides, padding="SAME"),
        random(clips),
    )


@pytest.mark.parametrize("of", [convolution.conv3d, jax.jit(convolution.conv3d)])
def test_convolution_over_clips_maps_over_kernels(of):
    x, kernels = random((3, 1, 2, 3, 3, 2)), random((3, 3, 3, 3, 2, 2), 1)

    def loss(x, kernel):
        return (of(x, kernel) ** 2).sum()

    found = jax.vmap(jax.grad(loss, 1))(x, kernels)
    expected = [jax.grad(loss, 1)(*pair) for pair in zip(x, kernels, strict=True)]
    np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------- the average


@pytest.mark.parametrize("frames", [1, 2, 3, 8])
def test_logits_are_the_mean_of_those_at_the_averages(frames):
    """As published: an average over windows of 2 frames, a dense layer, the mean."""
    x, head = random((2, frames, 7, 7, 3)), nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    each, window = x.mean(axis=(2, 3)), min(2, frames)
    starts = range(frames - window + 1)
    logits = [head(each[:, at : at + window].mean(axis=1)) for at in starts]
    expected = jnp.stack(logits).mean(axis=0)
    found = head(i3d.mean_of_averages(x, i3d.AVERAGE))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    if frames > 2:
        assert not np.allclose(found, head(x.mean(axis=(1, 2, 3))), atol=1e-4)


# --------------------------------------------------------------------------- inflation


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_a_clip_of_one_image_gets_the_response_of_the_image(frames):
    image, kernel = random((2, 6, 7, 3)), random((3, 2, 3, 4), 1)
    expected = jax.lax.conv_general_dilated(
        image, kernel, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    clip = jnp.repeat(image[:, None], 7, axis=1)
    found = convolution.conv3d(clip, i3d.inflated(kernel, frames), (1, 2, 1))
    border = frames // 2
    within = found[:, border : 7 - border]
    for at in range(within.shape[1]):
        np.testing.assert_allclose(within[:, at], expected, rtol=1e-4, atol=1e-5)


@functools.cache
def build():
    """Its arrays lie on the host: nothing is compiled."""
    graph, shapes = nnx.split(
        nnx.eval_shape(lambda: models.make("i3d", SMALL, rngs=nnx.Rngs(0)))
    )
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), shapes)
    return nnx.merge(graph, drawn)


def flat(model):
    """The arrays of the same network over images."""
    return {
        path: random(array.shape[1:] if array.ndim == 5 else array.shape, at)
        for at, (path, array) in enumerate(units.arrays(nnx.state(model)).items())
    }


def test_a_model_is_inflated():
    model = build()
    before = jax.tree.map(np.asarray, units.arrays(nnx.state(model)))
    given = {path: array for path, array in flat(model).items() if "head" not in path}
    after = units.arrays(nnx.state(i3d.inflate(model, given)))
    for path, array in units.arrays(nnx.state(model)).items():
        np.testing.assert_array_equal(array, before[path], err_msg="written to")
    for path, array in after.items():
        expected = given.get(path, before[path])
        found = array.sum(axis=0) if array.ndim == 5 else array
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=path)
        if array.ndim == 5:
            np.testing.assert_array_equal(array[0], array[-1])
    nested = i3d.inflate(model, {"head": {"bias": np.arange(3.0)}})
    np.testing.assert_array_equal(nested.head.bias[...], np.arange(3))


BAD = {
    "path": ({"stem.9.conv.kernel": np.ones(3)}, ["'stem.9.conv.kernel'", "head.bias"]),
    "kernel": (
        {"stem.0.conv.kernel": np.ones((3, 3, 1, 9))},
        ["'stem.0.conv.kernel'", "(3, 3, 1, 9)", "(3, 3, 1, 3)"],
    ),
    "vector": ({"head.bias": np.ones(4)}, ["'head.bias'", "(4,)", "(3,)"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_inflated_is_named(case):
    images, words = BAD[case]
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        i3d.inflate(build(), images)
    assert all(word in str(error.value) for word in words), error.value


# ----------------------------------------------------------------------- its structure


def test_each_branch_is_read_by_all_branches_of_the_next_module():
    shapes = nnx.eval_shape(lambda: models.preset("i3d_small", rngs=nnx.Rngs(0)))
    groups = models.structure(shapes).groups
    # Of 3 + 9 * 6 layers with batch normalisation, all that have more than one channel.
    assert len(groups) == 3 + 9 * 6
    for at in range(8):
        for last in ("0.0", "1.1", "2.1", "3.0"):
            group = groups[f"modules.{at}.branches.{last}.conv"]
            assert {slot.path for slot in group.used_by} == {
                f"modules.{at + 1}.branches.{branch}.0.conv.kernel"
                for branch in range(4)
            }
