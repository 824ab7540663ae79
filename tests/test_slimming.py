"""Network slimming: what is penalised, what goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES, CLASSIFIERS
from flax import nnx

import l0jax.nnx
from l0jax import models, units
from l0jax.methods import keeping, slimming
from l0jax.methods.task import task


def build(name):
    model = models.make(name, ARCHITECTURES[name]["small"], rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.BatchNorm):
            layer.scale[...] = jnp.float32(rng.normal(size=layer.scale.shape))
    images = np.float32(rng.normal(size=(4, *model.example.shape[1:])))
    of = task(model, models.structure(model), images, np.zeros(4, int), batch_size=4)
    return model, of


def test_scales_are_those_of_the_norms():
    model, of = build("vgg")
    found = slimming.scale(of)
    for i, layer in enumerate(model.norms):
        np.testing.assert_array_equal(found[f"convs.{i}"], np.abs(layer.scale[...]))
    total = sum(np.abs(layer.scale[...]).sum() for layer in model.norms)
    assert slimming.penalty(of.params, of.structure.groups) == pytest.approx(total)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [n for n in CLASSIFIERS if n not in ("mlp", "lenet5")])
def test_each_scale_is_penalised_once(name):
    """Its derivative is the sign of each scale, and nothing else is pulled."""
    _, of = build(name)
    of_scales = jax.grad(
        lambda values: slimming.penalty(
            units.replace(of.params, values), of.structure.groups
        )
    )
    arrays = units.arrays(of.params)
    floats = {p: a for p, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    for path, slope in of_scales(floats).items():
        expected = np.sign(arrays[path]) if path.endswith("scale") else 0 * slope
        np.testing.assert_array_equal(slope, expected, err_msg=path)


def test_what_has_no_scale_left_goes_without_a_trace():
    """Where scale and shift are zero the network stays the same when they go."""
    model, of = build("vgg")
    off = {name: np.arange(g.size) == 1 for name, g in of.structure.groups.items()}
    for i, layer in enumerate(model.norms):
        on = jnp.float32(~off[f"convs.{i}"])
        layer.scale[...] = layer.scale[...] * on
    now = task(model, of.structure, of.images[0], of.labels[0], batch_size=4)
    total = sum(len(flags) for flags in off.values())
    keep = keeping.keep_above(slimming.scale(now), len(off) / total)
    for name, flags in keep.items():
        np.testing.assert_array_equal(flags, ~off[name])
    small = l0jax.nnx.shrink(model, keep, of.structure)
    images = jnp.asarray(of.images[0])
    np.testing.assert_allclose(small(images), model(images), rtol=1e-5, atol=1e-6)


def test_all_scales_start_at_one_value():
    _, of = build("resnet")
    started = slimming.start_scales(of.params, of.structure.groups)
    for path, array in units.arrays(started).items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(array, jnp.full_like(array, 0.5))
        else:
            np.testing.assert_array_equal(array, units.arrays(of.params)[path])


@pytest.mark.parametrize(
    "ask",
    [
        slimming.scale,
        lambda of: slimming.penalty(of.params, of.structure.groups),
        lambda of: slimming.start_scales(of.params, of.structure.groups),
    ],
)
def test_a_network_without_batch_normalisation_is_refused(ask):
    _, of = build("lenet5")
    with pytest.raises(ValueError, match="'conv1' has no scale") as error:
        ask(of)
    assert "conv1.bias, conv1.kernel" in str(error.value)
