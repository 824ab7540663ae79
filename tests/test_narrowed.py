"""Modules that are narrowed programs, and norms that make up for units they lose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import l0jax
from l0jax import storage, units
from l0jax.units import Group, Slot

X = np.float32(np.random.default_rng(0).normal(size=(5, 3)))


@pytest.fixture(autouse=True)
def any_rank():
    """Flax's own layers add vectors to matrices."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class Scaled(nnx.Module):
    """Divides by the number of its units, and holds arrays of several kinds."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 8, rngs=rngs), nnx.relu])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)
        self.shift = nnx.Param(jnp.ones(2))

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        x = self.drop(self.norm(x)) / x.shape[-1]
        return self.head(x) + self.shift


def made():
    """A module with closed gates, its structure, what is kept, and its outputs."""
    module = Scaled(nnx.Rngs(0))
    structure = l0jax.trace(module, X)
    keep = {"layers.0": np.arange(8) % 3 != 1}
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    gated = l0jax.nnx.fold(module, z, structure.groups)
    calm = nnx.clone(gated)
    calm.eval()
    return gated, structure, keep, calm


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_narrowed_module_is_the_gated_one():
    gated, structure, keep, calm = made()
    with pytest.raises(ValueError, match=r"l0jax\.nnx\.Narrowed\(structure, module, k"):
        l0jax.nnx.shrink(gated, keep, structure)
    for each in (gated, nnx.state(gated)):
        small = l0jax.nnx.Narrowed(structure, each, keep)
        close(small(X), calm(X))
        close(small(X[:2]), calm(X[:2]))
        close(nnx.jit(lambda m, x: m(x))(small, X), calm(X))
        close(nnx.clone(small)(X), calm(X))


def test_its_arrays_have_the_paths_and_types_of_the_modules():
    gated, structure, keep, _ = made()
    small = l0jax.nnx.Narrowed(structure, gated, keep)
    smaller = units.shrink(nnx.state(gated), keep, structure.groups)
    for kind in (nnx.Param, nnx.BatchStat, nnx.RngState):
        found = units.arrays(nnx.state(small, kind))
        expected = units.arrays(nnx.state(gated, kind))
        assert {*found} == {*expected}
        assert found
    for path, leaf in units.arrays(nnx.state(small)).items():
        expected = units.arrays(smaller)[path]
        assert leaf.dtype == expected.dtype
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(leaf, expected)
    shown = repr(small)
    assert "layers.0: 5 of 8" in shown
    assert "Param # 15" in shown or "Param( # 15" in shown


def test_a_module_is_narrowed_as_its_state_is():
    module = Scaled(nnx.Rngs(0))
    structure = l0jax.trace(module, X)
    keep = {"layers.0": np.arange(8) < 5}
    small, params = l0jax.narrow(structure, module, keep)
    other, state = l0jax.narrow(structure, nnx.state(module), keep)
    np.testing.assert_array_equal(small(params, X), other(state, X))


def test_what_is_no_array_is_named():
    structure = l0jax.trace(lambda p, x: x @ p["w"] @ p["v"], PLAIN, X)
    with pytest.raises(ValueError, match="no array at 'w', but str"):
        l0jax.narrow(structure, {**PLAIN, "w": "of text"}, {})
    small, params = l0jax.narrow(structure, PLAIN, {})
    with pytest.raises(ValueError, match="the parameters are") as raised:
        small(nnx.state(Scaled(nnx.Rngs(0))), X)
    assert len(str(raised.value)) < 500
    with pytest.raises(ValueError, match=r"input 1 are .*traced was missing"):
        small(params, X, X)


PLAIN = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}


def test_it_is_trained():
    gated, structure, keep, _ = made()
    small = l0jax.nnx.Narrowed(structure, gated, keep)
    with jax.numpy_dtype_promotion("standard"):
        optimizer = nnx.Optimizer(small, optax.adam(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        loss, slopes = nnx.value_and_grad(lambda m: jnp.square(m(X) - 3).mean())(module)
        optimizer.update(module, slopes)
        return loss

    before = {
        p: np.asarray(a) for p, a in units.arrays(nnx.state(small, nnx.Param)).items()
    }
    losses = [float(step(small, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]
    for path, array in units.arrays(nnx.state(small, nnx.Param)).items():
        assert (np.asarray(array) != before[path]).any(), path
    graph, params, rest = nnx.split(small, nnx.Param, ...)
    close(nnx.merge(graph, params, rest)(X), small(X))


def test_it_is_read_and_narrowed_again():
    gated, structure, keep, _ = made()
    small = l0jax.nnx.Narrowed(structure, gated, keep)
    again = l0jax.trace(small, X)
    assert again.groups["layers.0"].size == 5
    assert {*again.groups} == {*structure.groups}
    fewer = {"layers.0": np.array([True, False, True, True, False])}
    z = {"layers.0": jnp.float32(fewer["layers.0"])}
    closed = l0jax.nnx.fold(small, z, again.groups)
    smallest = l0jax.nnx.Narrowed(again, closed, fewer)
    assert smallest.head.kernel.shape == (3, 2)
    close(smallest(X), closed(X))
    # It computes no more from sizes than shapes, but where it was told them.
    with pytest.raises(ValueError, match=r"Narrowed is another function"):
        l0jax.nnx.shrink(closed, fewer, again)


def test_it_is_saved(tmp_path):
    gated, structure, keep, calm = made()
    small = l0jax.nnx.Narrowed(structure, gated, keep)
    function, params = small.function
    close(function(params, X), calm(X))
    plain = {
        path: leaf
        for path, leaf in params.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    # Random streams, which evaluation does not read.
    keys = {path: params[path] for path in params if path not in plain}
    storage.save_function(
        lambda p, x: function({**p, **keys}, x), plain, X, folder=tmp_path / "f"
    )
    close(storage.load(tmp_path / "f")(X), calm(X))


def test_narrowed_modules_refuse_other_arrays_and_names():
    gated, structure, keep, _ = made()
    other = Scaled(nnx.Rngs(1))
    other.head = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'head\.bias'.*trace the module again"):
        l0jax.nnx.Narrowed(structure, other, keep)
    with pytest.raises(ValueError, match="unknown group 'them'"):
        l0jax.nnx.Narrowed(structure, gated, {"them": keep["layers.0"]})

    class Named(nnx.Module):
        def __init__(self):
            self.function = nnx.Param(jnp.ones((3, 2)))

        def __call__(self, x):
            return x @ self.function

    named = Named()
    with pytest.raises(ValueError, match="'function', which is a name"):
        l0jax.nnx.Narrowed(l0jax.trace(named, X), named, {})
    with pytest.raises(ValueError, match="structure"):
        l0jax.nnx.Narrowed(structure, gated, keep)(X, X)


# ------------------------------------------------------------------------- RMS norms


class Stream(nnx.Module):
    """Units that are normalised over, made by one layer and read by another."""

    def __init__(self, norm, rngs):
        self.one = nnx.Linear(3, 8, rngs=rngs)
        self.norm = norm(rngs)
        self.two = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.two(self.norm(self.one(x)))


MADE = (Slot("one.kernel", 1), Slot("one.bias", 0))


def stream(norm):
    """The module, and a structure in which gates are where its units are made."""
    module = Stream(norm, nnx.Rngs(0))
    graph, state = nnx.split(module)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda a: a + np.float32(0.3 * rng.normal(size=a.shape)), state
    )
    module = nnx.merge(graph, state)
    read = [Slot(f"norm.{name}", 0) for name in ("scale", "bias")]
    paths = units.arrays(state)
    read = tuple(slot for slot in read if slot.path in paths)
    structure = l0jax.trace(module, X, frozen=["one"])
    group = Group("stream", 8, MADE, (*read, Slot("two.kernel", 0)))
    return module, structure.add(group)


@pytest.mark.sweep
@pytest.mark.parametrize("left", [1, 3, 7])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
def test_an_rms_norm_makes_up_for_the_units_that_it_loses(left, scale, epsilon):
    """Small inputs show ε."""
    module, structure = stream(lambda rngs: nnx.RMSNorm(8, epsilon=epsilon, rngs=rngs))
    keep = {"stream": np.arange(8) < left}
    z = {"stream": jnp.float32(keep["stream"])}
    gated = l0jax.nnx.fold(module, z, structure.groups)
    # Nothing but what is multiplied by the inputs.
    gated.one.bias[...] *= 0.0
    small = l0jax.nnx.shrink(gated, keep, structure)
    close(small(scale * X), gated(scale * X))
    assert small.norm.num_features == left
    assert module.norm.epsilon == epsilon
    assert small.norm.epsilon == pytest.approx(epsilon * 8 / left)
    # By hand alone, unchecked, it is the same.
    by_hand = l0jax.nnx.shrink(gated, keep, dict(structure.groups))
    close(by_hand(scale * X), gated(scale * X))


def test_an_rms_norm_shrinks_twice():
    module, structure = stream(lambda rngs: nnx.RMSNorm(8, rngs=rngs))
    keep = {"stream": np.arange(8) < 6}
    z = {"stream": jnp.float32(keep["stream"])}
    gated = l0jax.nnx.fold(module, z, structure.groups)
    small = l0jax.nnx.shrink(gated, keep, structure)
    again = {"stream": np.arange(6) > 1}
    groups = structure.shrink(keep).groups
    closed = l0jax.nnx.fold(small, {"stream": jnp.float32(again["stream"])}, groups)
    close(l0jax.nnx.shrink(closed, again, groups)(X), closed(X))


REFUSED = {
    "layer norm": lambda rngs: nnx.LayerNorm(8, rngs=rngs),
    "no scale": lambda rngs: nnx.RMSNorm(8, use_scale=False, rngs=rngs),
    "over another axis": lambda rngs: nnx.RMSNorm(8, feature_axes=1, rngs=rngs),
}


@pytest.mark.parametrize("name", REFUSED)
def test_norms_that_can_not_make_up_for_it_are_refused(name):
    module, structure = stream(REFUSED[name])
    keep = {"stream": np.arange(8) < 3}
    z = {"stream": jnp.float32(keep["stream"])}
    gated = l0jax.nnx.fold(module, z, structure.groups)
    with pytest.raises(ValueError, match=r"off by|differ|of shape"):
        l0jax.nnx.shrink(gated, keep, structure)


def test_an_rms_norm_over_other_axes_needs_nothing():
    """Over the examples: each unit has a mean of its own."""
    module, structure = stream(lambda rngs: nnx.RMSNorm(8, reduction_axes=0, rngs=rngs))
    keep = {"stream": np.arange(8) < 3}
    z = {"stream": jnp.float32(keep["stream"])}
    gated = l0jax.nnx.fold(module, z, structure.groups)
    small = l0jax.nnx.shrink(gated, keep, structure)
    close(small(X), gated(X))
    assert small.norm.epsilon == module.norm.epsilon
