"""The networks that are compared with torchvision's, and what the comparison counts."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import against_torch_pruning as against
from benchmarks.vision import VISION
from l0jax import narrow, trace, units

# As torchvision's documentation counts them.
PARAMETERS = {
    "ResNet-50": 25_557_032,
    "ViT-B/16": 86_567_656,
    "ConvNeXt-T": 28_589_128,
}
SMALL = {
    "ResNet-50": {"widths": (4, 6), "blocks": (2, 2)},
    "ViT-B/16": {"width": 12, "layers": 2, "heads": 3, "inside": 10, "patch": 8},
    "ConvNeXt-T": {"widths": (6, 8), "blocks": (2, 1)},
}


@pytest.mark.parametrize("name", VISION)
def test_it_has_the_parameters_of_torchvision(name):
    arrays = VISION[name]().params["params"].values()
    assert sum(array.size for array in arrays) == PARAMETERS[name]


@pytest.mark.parametrize("name", VISION)
def test_gated_is_narrowed(name):
    net, rng = VISION[name](classes=5, side=16, **SMALL[name]), np.random.default_rng(0)
    params = {
        part: {
            path: jnp.asarray(against.drawn(path, array.shape, rng))
            for path, array in arrays.items()
        }
        for part, arrays in net.params.items()
    }
    x = jnp.asarray(rng.normal(size=(2, 3, 16, 16)), jnp.float32)
    structure, keep = trace(net.apply, params, x), {}
    for group in structure.groups.values():
        keep[group.name] = rng.random(group.size) < 0.6
        keep[group.name][0] = True
    assert keep
    z = {group: jnp.float32(flags) for group, flags in keep.items()}
    gated = units.apply_gates(params, z, structure.groups)
    small, left = narrow(structure, params, keep)
    theirs, ours = jax.jit(net.apply)(gated, x), jax.jit(small)(left, x)
    assert theirs.shape == (2, 5)
    assert against.apart(np.asarray(theirs), np.asarray(ours)) <= 1e-5


def test_weights_are_told_by_their_values():
    before = against.drawn("conv.weight", (5, 4, 3, 3), np.random.default_rng(0))
    assert len(np.unique(before)) == before.size
    assert (before != 0).all()
    after = before[[0, 2, 3]][:, [1, 3]]
    found = against.survivors(before, after)
    assert [each.tolist() for each in found] == [
        [0, 2, 3],
        [1, 3],
        [0, 1, 2],
        [0, 1, 2],
    ]
    zero = against.masked(before, after)
    np.testing.assert_array_equal(zero[[0, 2, 3]][:, [1, 3]], after)
    assert (zero != 0).sum() == after.size


def test_what_is_no_part_is_refused():
    before = against.drawn("fc.weight", (5, 4), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"shape \(2, 4\) is no part of one"):
        against.survivors(before, before[:2] + 1)
    # Each row of its own columns.
    mixed = np.stack([before[0, :2], before[1, 2:]])
    with pytest.raises(ValueError, match=r"shape \(2, 2\) is no part of one"):
        against.survivors(before, mixed)


def test_networks_without_values_are_not_compared():
    with pytest.raises(ValueError, match="without finite values"):
        against.apart(np.array([np.nan]), np.array([1.0]))


def test_what_is_not_installed_is_named(monkeypatch):
    there = {"torch": object(), "torchvision": object()}
    monkeypatch.setattr(importlib.util, "find_spec", there.get)
    with pytest.raises(SystemExit, match=r"^torch_pruning not installed: pip"):
        against.check_installed()


def test_differences_are_held_against_the_limit():
    def removal(difference):
        return against.Removal(0.5, difference, np.ones(2))

    for difference, verdict in ((1e-6, "within"), (1e-4, "NOT within")):
        rows = against.removing("x", removal(difference), removal(0.3), "They")
        assert rows[-1]["verdict"] == verdict
        assert rows[-1]["detail"].startswith("They 3e-01")
