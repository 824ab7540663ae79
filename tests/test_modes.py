"""NNX modules in training mode are read, shrunk and measured as in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import l0jax
from l0jax import costs, units


@pytest.fixture(autouse=True)
def any_rank():
    """Flax's own layers add vectors to matrices."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class Net(nnx.Module):
    """Two dense layers with `layers` of the hidden units between them."""

    def __init__(self, make, rngs):
        self.one = nnx.Linear(4, 6, rngs=rngs)
        self.layers = nnx.List(make(rngs))
        self.two = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = self.one(x)
        for layer in self.layers:
            x = layer(x)
        return self.two(nnx.relu(x))


class Noisy(nnx.Module):
    """A module of one's own that has a mode."""

    def __init__(self, rngs):
        self.deterministic = False
        self.rngs = rngs.noise.fork()

    def __call__(self, x):
        if self.deterministic:
            return x
        return x + jax.random.normal(self.rngs(), x.shape)


class Attention(nnx.Module):
    """An attention between the two layers; of its heads' sizes nothing may go."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            2, 6, dropout_rate=0.5, decode=False, deterministic=False, rngs=rngs
        )

    def __call__(self, x):
        return self.attention(x[None])[0]


def norm(rngs):
    return nnx.BatchNorm(6, rngs=rngs)


def dropout(rngs):
    return nnx.Dropout(0.5, rngs=rngs)


def evaluated_dropout(rngs):
    return nnx.Dropout(0.5, deterministic=True, rngs=rngs)


LAYERS = {
    "batch norm": lambda rngs: [norm(rngs)],
    "dropout": lambda rngs: [dropout(rngs)],
    "both": lambda rngs: [norm(rngs), dropout(rngs)],
    "one's own": lambda rngs: [Noisy(rngs)],
    "attention": lambda rngs: [Attention(rngs)],
    "in part": lambda rngs: [norm(rngs), evaluated_dropout(rngs)],
}
X = np.float32(np.random.default_rng(0).normal(size=(8, 4)))


def made(name):
    module = Net(LAYERS[name], nnx.Rngs(0))
    if name not in ("attention", "one's own", "dropout"):
        for seed in range(5):
            x = 3 + 2 * jax.random.normal(jax.random.key(seed), (64, 4))
            module(x)
    return module


def modes(module):
    return {
        path: {
            name: getattr(each, name)
            for name in ("deterministic", "use_running_average")
            if hasattr(each, name)
        }
        for path, each in nnx.iter_modules(module)
    }


def keys_of(state):
    """Random keys and counts by path."""
    return {
        path: np.asarray(
            jax.random.key_data(leaf)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )
        for path, leaf in units.arrays(state).items()
        if not jnp.issubdtype(leaf.dtype, jnp.floating)
    }


@pytest.mark.sweep
@pytest.mark.parametrize("name", LAYERS)
def test_a_module_in_training_is_read_as_in_evaluation(name):
    module = made(name)
    before, mode = keys_of(nnx.state(module)), modes(module)
    structure = l0jax.trace(module, X)
    assert modes(module) == mode, "the module itself stays as it is"
    for path, key in keys_of(nnx.state(module)).items():
        np.testing.assert_array_equal(key, before[path])
    calm = nnx.clone(module)
    calm.eval()
    expected = l0jax.trace(calm, X)
    assert structure.groups == expected.groups
    assert structure.groups
    assert costs.exact(structure) == costs.exact(expected)
    assert costs.exact(structure, cost=costs.bytes) > 0
    assert structure.operations == expected.operations
    assert not expected.notes
    (note,) = structure.notes
    assert "evaluation mode" in note
    assert "layers.0" in note
    assert note in str(structure)
    assert note in str(structure.only(*structure.groups))


@pytest.mark.sweep
@pytest.mark.parametrize("name", LAYERS)
def test_narrowed_and_shrunk_are_the_gated_module_in_evaluation(name):
    module = made(name)
    structure = l0jax.trace(module, X)
    # Scores are scaled by the size of the heads.
    group = "layers.0.attention.value" if name == "attention" else "one"
    size = structure.groups[group].size
    keep = {group: np.arange(size) != 1}
    z = {group: jnp.float32(keep[group])}
    gated = l0jax.nnx.fold(module, z, structure.groups)
    calm = nnx.clone(gated)
    calm.eval()
    function, params = l0jax.narrow(structure, nnx.state(gated), keep)
    np.testing.assert_allclose(function(params, X), calm(X), rtol=1e-5, atol=1e-6)
    small = l0jax.nnx.shrink(gated, keep, structure)
    assert modes(small) == modes(module)
    keys = keys_of(nnx.state(module))
    for state in (
        params,
        nnx.state(small),
        l0jax.apply_gates(nnx.state(module), z, structure.groups),
    ):
        assert list(keys_of(state)) == list(keys)
        for path, key in keys_of(state).items():
            np.testing.assert_array_equal(key, keys[path])
    small.eval()
    np.testing.assert_allclose(small(X), calm(X), rtol=1e-5, atol=1e-6)
    small.train()
    small(X)


def test_a_report_is_of_evaluation():
    module = made("both")
    before = {path: np.asarray(a) for path, a in keys_of(nnx.state(module)).items()}
    found = l0jax.report(module, module, X, batch_sizes=(1,), calls=1)
    calm = nnx.clone(module)
    calm.eval()
    expected = l0jax.report(calm, calm, X, batch_sizes=(1,), calls=1)
    assert found.before.macs == expected.before.macs
    # In training, batch statistics and masks would be compiled too.
    assert found.before.program_bytes == expected.before.program_bytes
    for path, key in keys_of(nnx.state(module)).items():
        np.testing.assert_array_equal(key, before[path])
    assert module.layers[1].deterministic is False
