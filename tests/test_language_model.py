"""The language model whose reading is measured is what it is said to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import transformers
from l0jax import narrow, units

SMALL = transformers.Sizes(2, 12, 6, 3, 4, 10, 11)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(0.3 + rng.normal(size=array.shape) / 4, jnp.float32)
        for name, array in transformers.shapes(SMALL).items()
    }


@pytest.fixture(scope="module")
def structure():
    return transformers.read(SMALL, 5)


def drawn(length=5):
    return jnp.asarray(np.random.default_rng(1).integers(0, 11, (3, length)))


def test_it_has_the_parameters_of_mistral():
    found = transformers.shapes(transformers.MISTRAL).values()
    assert sum(array.size for array in found) == 7_241_732_096


def test_a_word_is_told_by_those_before_it_alone(params):
    apply, words = transformers.language_model(SMALL), drawn()
    other = words.at[:, 3].set((words[:, 3] + 1) % 11)
    before, after = (apply(params, each) for each in (words, other))
    np.testing.assert_allclose(before[:, :3], after[:, :3], rtol=1e-6)
    assert (abs(before - after)[:, 3:].max((0, 2)) > 1e-3).all()


def test_a_product_of_turned_vectors_knows_only_how_far_they_are_apart():
    one, two = np.random.default_rng(2).normal(size=(2, 4)).astype(np.float32)
    alike = [jnp.tile(each, (1, 6, 1, 1)) for each in (one, two)]
    query, key = (transformers.turned(each)[0, :, 0] for each in alike)
    products = np.asarray(query @ key.T)
    for apart in range(-5, 6):
        np.testing.assert_allclose(np.ptp(np.diagonal(products, apart)), 0, atol=1e-5)
    assert np.ptp(products[0]) > 0.1


def test_gated_is_narrowed(params, structure):
    """Key-value heads with their queries, values, and hidden units of both layers."""
    sizes = [group.size for group in structure.groups.values()]
    assert sizes.count(3) == sizes.count(10) == 2
    rng, keep = np.random.default_rng(3), {}
    for group in structure.groups.values():
        keep[group.name] = rng.random(group.size) < 0.6
        keep[group.name][0] = True
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    gated = units.apply_gates(params, z, structure.groups)
    small, left = narrow(structure, params, keep)
    # (The batch is not that of the reading.)
    ours = jax.jit(small)(left, drawn())
    theirs = jax.jit(transformers.language_model(SMALL))(gated, drawn())
    assert abs(ours - theirs).max() <= 1e-5 * abs(theirs).max()
