"""The decoder is what it is said to be, at any widths, and says its tokens one at a
time as it would all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from architectures import ARCHITECTURES, inputs_for
from flax import nnx

import l0jax
from l0jax import models, train
from l0jax.models.decoder import Decoder, generate, turned

SMALL = ARCHITECTURES["decoder"]["small"]
KEEP = {
    "stream": [1, 0, 1, 1, 0, 1],
    "block0.heads": [0, 1, 1],
    "block0.queries": [1, 0],
    "block0.rotations": [0, 1],
    "block0.values": [1, 1, 0],
    "block0.hidden": [1, 0, 0, 1, 0],
    "block1.heads": [0, 0],
    "block1.hidden": [0, 1, 1, 1, 1, 0, 1],
}


@pytest.fixture(scope="module")
def model():
    return Decoder(**SMALL, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def small(model):
    """With whatever goes folded to zero, so that it is the same function."""
    structure = models.structure(model)
    keep = {name: np.array(flags, bool) for name, flags in KEEP.items()}
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    gated = l0jax.nnx.fold(model, z, structure.groups)
    return gated, l0jax.nnx.shrink(gated, keep, structure)


def test_what_it_says_depends_on_nothing_that_comes_later(model):
    tokens = inputs_for(model, 3, seed=0)
    other = tokens.at[:, 3].set((tokens[:, 3] + 1) % SMALL["vocabulary"])
    before, after = model(tokens), model(other)
    np.testing.assert_allclose(before[:, :3], after[:, :3], rtol=1e-6, atol=1e-7)
    assert (abs(before - after)[:, 3:].max((0, 2)) > 1e-4).all()


def test_products_of_turned_vectors_know_only_how_far_they_are_apart():
    rng = np.random.default_rng(0)
    query, key = (
        jnp.float32(np.tile(rng.normal(size=4), (1, 7, 1, 1))) for _ in range(2)
    )
    angles = jnp.arange(7.0)[:, None] * jnp.float32([[1.0, 0.3]])
    query, key = (turned(each, angles)[0, :, 0] for each in (query, key))
    products = np.asarray(query @ key.T)
    for apart in range(-6, 7):
        np.testing.assert_allclose(np.ptp(np.diagonal(products, apart)), 0, atol=1e-5)
    assert np.ptp(products[0]) > 0.1


def test_queries_of_a_head_share_its_keys_and_values(model):
    """With as many heads as queries, each with the keys of its group, it is the same
    function."""
    sizes = [(g * q, 1, r, v, h) for g, q, r, v, h in SMALL["blocks"]]
    apart = Decoder(**{**SMALL, "blocks": sizes}, rngs=nnx.Rngs(1))
    for one, other in zip(model.blocks, apart.blocks, strict=True):
        queries = one.attention.query.shape[2]
        for name in ("query", "key", "value", "out"):
            array = getattr(one.attention, name)[...]
            if name in ("key", "value"):
                array = jnp.repeat(array, queries, axis=1)
            target = getattr(other.attention, name)
            target[...] = array.reshape(target.shape)
        nnx.update(other.feed_forward, nnx.state(one.feed_forward))
    for name in ("embed", "head"):
        getattr(apart, name)[...] = getattr(model, name)[...]
    tokens = inputs_for(model, 2, seed=1)
    np.testing.assert_allclose(apart(tokens), model(tokens), rtol=1e-5, atol=1e-6)


def test_all_kinds_of_units_are_found_and_removed(model, small):
    gated, left = small
    assert set(KEEP) <= set(models.structure(model).groups)
    assert left.architecture == {
        "vocabulary": 11,
        "width": 4,
        "blocks": [[2, 1, 1, 2, 2], [0, 1, 3, 4, 5]],
        "length": 12,
        "over": 6,
    }
    tokens = inputs_for(model, 4, seed=2)
    expected = gated(tokens)
    assert abs(left(tokens) - expected).max() <= 1e-5 * abs(expected).max()
    assert abs(expected - model(tokens)).max() > 1e-2


@pytest.mark.parametrize("which", ["whole", "small"])
@pytest.mark.parametrize("key", [None, 3])
def test_tokens_one_at_a_time_are_those_of_whole_texts(model, small, which, key):
    of = model if which == "whole" else small[1]
    prompt = np.asarray(inputs_for(of, 3, seed=3)[:, :2])
    key = None if key is None else jax.random.key(key)
    found = generate(of, prompt, 7, key=key, temperature=0.7)
    graph, state = nnx.split(of)
    said = jax.jit(lambda state, text: nnx.merge(graph, state)(text))
    # (Of what comes later nothing depends.)
    text = jnp.asarray(prompt)
    for at in range(2, 9):
        padded = jnp.pad(text, ((0, 0), (0, 9 - at)))
        logits = said(state, padded)[:, at - 1]
        if key is None:
            following = logits.argmax(-1)
        else:
            one = jax.random.fold_in(key, at)
            following = jax.random.categorical(one, logits / 0.7)
        text = jnp.concatenate([text, following[:, None]], axis=1)
    np.testing.assert_array_equal(found, text[:, 2:])
    if which == "small":
        gated = generate(small[0], prompt, 7, key=key, temperature=0.7)
        np.testing.assert_array_equal(found, gated)


def test_it_runs_in_low_precision_beside_parameters_in_full(model):
    def loss(model, batch):
        logits = model(batch)
        assert logits.dtype == jnp.bfloat16
        return jnp.square(logits.astype(jnp.float32)).mean(), {}

    training = train.Training(
        model, loss, optimizer=optax.sgd(0.1), compute=jnp.bfloat16
    )
    state = training.start(jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):
        state, metrics = training.step(state, inputs_for(model, 2, seed=4))
    assert np.isfinite(metrics["loss"])
    assert state.params["embed"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(jnp.zeros((1, 13), int)), "sequence has 13 tokens.*12 positions"),
        (lambda m: generate(m, np.zeros((1, 0), int), 1), "the prompt is empty"),
        (lambda m: generate(m, np.full((1, 2), 11), 1), "from 11 to 11.*0 to 10"),
        (lambda m: generate(m, np.full((1, 2), -1), 1), "from -1 to -1.*0 to 10"),
        (lambda m: generate(m, np.zeros((1, 9), int), 4), "9 tokens and 4 more are 13"),
        (
            lambda m: m.follow(jnp.zeros((1, 2), int), 11, m.empty(1)),
            "2 tokens from position 11 on end beyond the 12",
        ),
        (lambda m: generate(m, np.zeros((1, 2), int), 0), "count must be at least 1"),
        (
            lambda m: generate(m, np.zeros((1, 2), int), 1, temperature=0.0),
            "temperature must be > 0, got 0.0",
        ),
        (
            lambda _: Decoder(3, 4, [(1, 1, 1, 1, -2)], rngs=nnx.Rngs(0)),
            "block 0 has a negative size",
        ),
        (
            lambda _: Decoder(3, 4, [(1, 1, 1, 1, 2)], 0, rngs=nnx.Rngs(0)),
            "length must be at least 1, got 0",
        ),
    ],
)
def test_what_makes_no_text_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
