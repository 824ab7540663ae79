"""Models that others wrote, at small sizes: what is gated is what is narrowed.

`python -m benchmarks.zoo` does the same, and more, for all of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import others, zoo
from l0jax import costs, trace

others.load(others.LIGHT)

NAMES = (
    "haiku_transformer",
    "haiku_lstm_language_model",
    "haiku_vq_vae",
    "equinox_gru",
    "equinox_rope_decoder",
    "equinox_group_norm_resnet",
    "linen_ppo_actor_critic",
    "linen_lm1b_tied",
    "linen_group_norm_unet",
    "nnx_gpt_tied_rms_norm",
    "nnx_gru",
    "nnx_lora",
)


@pytest.fixture(autouse=True)
def any_rank():
    """Other people's code adds vectors to matrices, and counts to numbers."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def read(name):
    small = others.filled(others.MODELS[name].make(False))
    return small, trace(small.apply, small.params, *small.inputs)


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_gated_is_narrowed_with_its_gradients_and_costs(name):
    """With 40 % of the units closed at random, with one left of each group, and without
    some groups; where roundings are large, in float64."""
    small, structure = read(name)
    assert structure.groups
    if zoo.verdict(zoo.checked(small, structure)):
        assert zoo.verdict(zoo.in_float64(others.MODELS[name].make)) == ""


def test_a_structure_of_another_program_is_found_out():
    """What is gated here has one activation more than what is narrowed."""
    small, structure = read("nnx_lora")
    keep = zoo.keeps(structure)["40 % closed"]

    def other(params, *inputs):
        return jnp.tanh(small.apply(params, *inputs))

    gated = zoo.differentiated(other, structure)
    broken = zoo.verdict({"changed": zoo.compared(small, structure, keep, gated)})
    assert "changed: outputs" in broken
    assert "changed: gradients" in broken


def test_a_limit_that_is_no_number_is_not_kept():
    kept = dict.fromkeys(zoo.LIMITS, 0.0) | {"costs": True, "largest gradient": 1.0}
    assert zoo.verdict({"x": kept}) == ""
    assert zoo.verdict({"x": kept | {"outputs": np.nan}}) == "x: outputs nan"
    assert zoo.verdict({"x": kept | {"costs": False}}) == "x: costs"


def test_rounding_is_told_from_wrong_rules_in_float64():
    """Differences in float32 vanish, and those of another program don't."""
    small, _ = read("nnx_lora")
    found = zoo.in_float64(others.MODELS["nnx_lora"].make)
    assert max(zoo.worst(found).values()) < 1e-12
    assert zoo.doubled(small).inputs[0].dtype == np.float64


def test_input_gradients_that_are_noise_are_compared_with_the_largest():
    """One input's gradient is 1e-9 of the parameters', and rounded otherwise."""
    ours, theirs = [np.array([1e-9, 2e-9])], [np.array([1e-9, 3e-9])]
    assert zoo.apart(ours, theirs) > 0.4
    assert zoo.apart(ours, theirs, zoo.NOISE * 1.0) < 2e-7


def test_nothing_is_said_of_networks_without_gradients():
    """Behind units that are all dead, everything agrees."""
    shapes = {"one": others.floats(4, 5), "two": others.floats(5, 3)}
    model = others.Model(
        lambda p, x: jax.nn.relu(jnp.tanh(x @ p["one"]) @ p["two"] - 1e6),
        shapes,
        (others.floats(2, 4),),
    )
    small = others.filled(model)
    structure = trace(small.apply, small.params, *small.inputs)
    found = zoo.checked(small, structure)["40 % closed"]
    assert max(found[what] for what in zoo.LIMITS) == 0
    assert zoo.verdict({"x": found}) == "x: no gradients to compare"


def test_networks_without_values_are_not_compared():
    with pytest.raises(ValueError, match="without finite values"):
        zoo.apart([np.array([np.nan])], [np.array([np.nan])])
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        zoo.apart([np.zeros(2)], [np.zeros(3)])


def test_vectors_over_their_lengths_are_not_compared_with_all_units_gone():
    """0 / 0; with some units left they are."""

    def unit(p, x):
        y = x @ p["one"]
        return y / jnp.linalg.norm(y, axis=-1, keepdims=True) @ p["two"]

    shapes = {"one": others.floats(4, 5), "two": others.floats(5, 3)}
    small = others.filled(others.Model(unit, shapes, (others.floats(2, 4),)))
    structure = trace(small.apply, small.params, *small.inputs)
    gone = {name: np.zeros(g.size, bool) for name, g in structure.groups.items()}
    gated = zoo.differentiated(unit, structure)
    with pytest.raises(zoo.NoValueError):
        zoo.compared(small, structure, gone, gated)
    found = zoo.checked(small, structure)
    assert zoo.verdict(found) == ""
    assert {"40 % closed", "one left"} <= found.keys()


def test_batches_of_any_size_are_told_from_fixed_ones():
    """A table of two rows is added to the one, and nothing to the other."""
    shapes = {"one": others.floats(4, 5), "rows": others.floats(2, 5)}
    for rows, expected in ((True, "fixed"), (False, "any")):
        model = others.Model(
            lambda p, x, rows=rows: x @ p["one"] + (p["rows"] if rows else 0),
            shapes,
            (others.floats(2, 4),),
        )
        assert zoo.batch(model, trace(model.apply, shapes, *model.inputs)) == expected


def test_inputs_that_are_numbers_of_words_have_no_gradient():
    words = others.Model(
        lambda p, x: p[x], others.floats(3, 2), (others.tokens(False),)
    )
    assert not zoo.floating(words)
    sums = others.Model(lambda p, x: p + x, words.params, (others.floats(3, 2),))
    assert zoo.floating(sums)


def test_an_element_is_covered_by_a_unit_along_any_of_its_axes():
    """x @ one @ two, whose inner axis can go, and whose outputs can't."""
    shapes = {"one": others.floats(4, 5), "two": others.floats(5, 3)}
    shapes["bias"] = others.floats(3)
    model = others.Model(
        lambda p, x: jnp.tanh(x @ p["one"]) @ p["two"] + p["bias"],
        shapes,
        (others.floats(2, 4),),
    )
    structure, row = zoo.reading(model, turns=1)
    assert zoo.outside(structure) == {"bias": 3, "one": 0, "two": 0}
    assert row["parameters"] == 20 + 15 + 3
    assert row["covered"] == round(1 - 3 / 38, 4)
    # Half of four inputs, and three of five units.
    assert row["half"] == round(1 - (2 * 3 + 3 * 3 + 3) / 38, 4)
    assert row["frozen"] == {"it is an output": round(3 / 38, 4)}
    assert costs.exact(structure, cost=costs.params) == 38


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("linen_resnet50", 25_557_032), ("nnx_vision_transformer", 86_567_656)],
)
def test_published_sizes_have_the_published_number_of_parameters(name, parameters):
    assert others.MODELS[name].published
    _, row = zoo.reading(others.MODELS[name].make(True), turns=1)
    assert row["parameters"] == parameters
    assert row["covered"] > 0.99


def test_random_weights_are_nowhere_zero_and_spreads_positive():
    for name in NAMES:
        small, _ = read(name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(small.params):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                assert jnp.isfinite(leaf).all()
                assert (leaf != 0).all(), path
                if "var" in jax.tree_util.keystr(path):
                    assert (leaf > 0).all()


def test_errors_are_told_in_one_line():
    """Keras says what happened in its second line, in bold."""
    error = ValueError("while calling it\n\n\x1b[1mthe size must be even\x1b[0m\n")
    assert zoo.said(error) == "ValueError: while calling it the size must be even"
    assert zoo.said(KeyError()) == "KeyError:"


def test_two_models_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two models are called 'haiku_mlp'"):

        @others.model("dm-haiku")
        def haiku_mlp(published):
            raise NotImplementedError
