"""The papers' networks are as large as published, whole and pruned."""

import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from l0jax import costs, models


@functools.cache
def structure_of(name):
    """Only the shapes: nothing is computed."""
    return models.structure(
        nnx.eval_shape(lambda: models.preset(name, rngs=nnx.Rngs(0)))
    )


def digits(number):
    """Three digits, as the papers print them."""
    return digits_of(number, 3)


def digits_of(number, count):
    """So many digits."""
    return float(f"{float(number):.{count}g}")


# Zhuang et al. (2018), supplementary tables S4 and S5, but for WRN-28-10 (Zagoruyko and
# Komodakis 2016) and the two MobileNets for large images (Howard et al. 2017, Sandler
# et al. 2018).
PUBLISHED = {
    "vgg19": (2.00e7, 3.98e8),
    "resnet56": (8.56e5, 1.26e8),
    "mobilenet_small": (3.22e6, 2.12e8),
    "resnet18": (1.17e7, 1.81e9),
    "resnet50": (2.56e7, 4.09e9),
    "wrn28_10": (3.65e7, 5.24e9),
    "mobilenet": (4.23e6, 5.69e8),
    "mobilenet_v2": (3.50e6, 3.01e8),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiply_adds_are_the_published_ones(name):
    structure = structure_of(name)
    found = digits(costs.params(structure, {})), digits(costs.macs(structure, {}))
    assert found == pytest.approx(PUBLISHED[name], rel=2e-3)


def block_widths(name):
    """Channels within a block, which no other block reads."""
    return ".conv1" in name or ".convs.0" in name or ".convs.1" in name


# Tables S4 and S5: a share of the channels of each pruned layer is removed.
PRUNED = [
    ("resnet56", block_widths, 0.3, 6.08e5, 9.13e7),
    ("resnet56", block_widths, 0.5, 4.31e5, 6.32e7),
    ("resnet56", block_widths, 0.7, 2.71e5, 3.98e7),
    ("resnet50", block_widths, 0.3, 1.70e7, 2.63e9),
    ("resnet50", block_widths, 0.5, 1.24e7, 1.82e9),
    ("resnet50", block_widths, 0.7, 8.71e6, 1.18e9),
    ("vgg19", lambda name: name != "convs.15", 0.3, 1.04e7, 1.99e8),
    ("vgg19", lambda name: name != "convs.15", 0.4, 7.83e6, 1.47e8),
]


@pytest.mark.parametrize(("name", "prunes", "ratio", "params", "macs"), PRUNED)
def test_a_pruned_network_is_as_small_as_published(name, prunes, ratio, params, macs):
    structure = structure_of(name)
    left = {}
    for group in structure.groups.values():
        if name == "resnet50" and ".convs.2" in group.name:
            continue
        if prunes(group.name):
            removed = int(group.size * ratio)
            left[group.name] = np.arange(group.size) >= removed
    params_left = costs.exact(structure, left, costs.params)
    found = digits(params_left), digits(costs.exact(structure, left))
    assert found == pytest.approx((params, macs), rel=2e-3)


@pytest.mark.parametrize("name", models.PRESETS)
def test_every_unit_but_the_classes_can_go(name):
    structure = structure_of(name)
    assert not structure.unknown
    for frozen in structure.frozen.values():
        # What isn't an output is where a window slides: no axis of channels.
        assert frozen.why == "it is an output" or all(
            slot.axis < len(structure.arrays[slot.path].shape) - 2
            and slot.path.endswith("kernel")
            for slot in frozen.slots
        )
    widths = {group.size for group in structure.groups.values()}
    assert max(widths) >= (48 if name == "i3d_small" else 64)


def third_branches(path):
    """The 3x3x3 convolutions where Inception has those of 5x5."""
    return ".branches.2.1.conv.kernel" in path


def test_i3d_has_the_published_parameters():
    structure = structure_of("i3d")
    found = costs.exact(structure, {}, costs.params)
    # The PyTorch port, whose batch normalisation scales as ours: 12.29 million without
    # its last layer, 12.70 with it.
    assert found == 12_697_264
    last = 1024 * 400 + 400
    assert digits_of(found - last, 4) == 1.229e7
    # The released one does not scale; Open Model Zoo counts 12.69 million.
    scales = sum(
        array.size for path, array in structure.arrays.items() if "scale" in path
    )
    assert digits_of(found - scales, 4) == 1.269e7
    # Table 1 of the paper: 25 million of two, one of which reads two channels of flow.
    assert round((2 * (found - scales) - 7**3 * 64) / 1e6) == 25


def test_i3d_has_the_published_multiply_adds():
    """Open Model Zoo counts 278.981e9 operations of 79 frames: two for each of ours,
    and those of pooling and biases, which we don't count."""
    shapes = nnx.eval_shape(
        lambda: models.preset("i3d", shape=(79, 224, 224, 3), rngs=nnx.Rngs(0))
    )
    found = 2 * costs.exact(models.structure(shapes))
    assert found < 278.981e9
    assert found == pytest.approx(278.981e9, rel=5e-3)


def test_what_xie_et_al_count_of_i3d_has_smaller_third_branches():
    """Xie et al. (2018) print 12.06 million parameters and 107.89e9 multiply-adds of 64
    frames. These are not those of the released network, 12.27 million weights without
    the last layer and 111.15e9: they are reached, to all digits printed, if the third
    branches end in 1x1x1 convolutions and only weights are counted. That they did so is
    inferred from the numbers."""
    structure = structure_of("i3d")
    weights = costs.exact(structure, {}, costs.weights)
    macs = costs.exact(structure)
    assert digits_of(weights - 1024 * 400, 4) == 1.227e7
    assert digits_of(macs, 5) == 1.1115e11
    each = costs.per_operation(structure)
    for operation, cost in zip(structure.operations, each, strict=True):
        if third_branches(operation.kernel):
            weights -= structure.arrays[operation.kernel].size * 26 // 27
            macs -= float(cost) * 26 / 27
    assert digits_of(weights, 4) == 1.206e7
    assert digits_of(macs, 5) == 1.0789e11


def test_presets_take_changes():
    shapes = nnx.eval_shape(
        lambda: models.preset("resnet20", classes=7, shape=(8, 8, 1), rngs=nnx.Rngs(0))
    )
    assert shapes.architecture["classes"] == 7
    logits = jax.eval_shape(lambda m, x: m(x), shapes, shapes.example)
    assert logits.shape == (2, 7)


BAD = {
    "name": (lambda: models.preset("vgg11", rngs=nnx.Rngs(0)), ["vgg11", "vgg19"]),
    "VGG's depth": (lambda: models.vgg.of_depth(11), ["16 or 19", "got 11"]),
    "ResNet's depth": (
        lambda: models.pre_activation.of_depth(57),
        ["ResNet has a depth of 6n + 2", "got 57"],
    ),
    "WRN's depth": (
        lambda: models.pre_activation.wide(26, 2),
        ["WRN has a depth of 6n + 4", "got 26"],
    ),
    "images too small": (
        lambda: models.preset("vgg16", shape=(8, 32, 3), rngs=nnx.Rngs(0)),
        ["16 by 16", "(8, 32, 3)"],
    ),
    "stages": (
        lambda: models.preset("resnet18", project=(True,), rngs=nnx.Rngs(0)),
        ["stages has 4", "project 1"],
    ),
    "identity": (
        lambda: models.preset("resnet20", project=(False,) * 3, rngs=nnx.Rngs(0)),
        ["stage 1", "from 16 to 32", "project must be True"],
    ),
    "strides": (
        lambda: models.preset("mobilenet", strides=(1, 2), rngs=nnx.Rngs(0)),
        ["widths has 13", "strides 2"],
    ),
    "stages of inverted residuals": (
        lambda: models.preset("mobilenet_v2", strides=(1, 2), rngs=nnx.Rngs(0)),
        ["stages, inner, widen and strides", "7, 7, 7 and 2"],
    ),
    "pools": (
        lambda: models.preset(
            "i3d_small", pools=models.i3d.POOLS[:3], rngs=nnx.Rngs(0)
        ),
        ["stages 3", "pools 3"],
    ),
    "branches": (
        lambda: models.i3d.Mixed(8, (1, 2), rngs=nnx.Rngs(0)),
        ["(64, (96, 128), (16, 32), 32)", "got (1, 2)"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case):
    build, words = BAD[case]
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        build()
    assert all(word in str(error.value) for word in words), error.value
