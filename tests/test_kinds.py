"""Kinds of units, in networks that name nothing alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.networks import NETWORKS, Arrays, normal
from l0jax.kinds import KINDS
from l0jax.tracing import trace


@pytest.fixture(autouse=True)
def any_rank():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def of(name):
    net = NETWORKS[name]()
    return trace(net.apply, net.params, *net.inputs)


ATTENTION = {"query-key", "value", "heads"}
EXPECTED = {
    "mlp": {"inputs", "feed-forward"},
    "lenet5": {"inputs", "channels", "feed-forward"},
    "vgg": {"inputs", "channels", "feed-forward"},
    "mobilenet": {"inputs", "channels", "stream"},
    "resnet_pre_activation": {"inputs", "channels", "stream"},
    "transformer": {"stream", "feed-forward", *ATTENTION},
    "transformer_with_grouped_queries": {"stream", "feed-forward", *ATTENTION},
    "linen_attention": {"stream", "feed-forward", *ATTENTION},
    "equinox_attention": {"inputs", *ATTENTION},
    "nnx_attention": {"inputs", "feed-forward", *ATTENTION},
    "tied_embedding": {"stream", "feed-forward"},
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", EXPECTED)
def test_kinds_are_told_apart(name):
    assert set(of(name).kinds.values()) == EXPECTED[name]


@pytest.mark.sweep
@pytest.mark.parametrize("name", NETWORKS)
def test_every_group_has_a_kind_that_the_table_shows(name):
    structure = of(name)
    assert structure.kinds.keys() == structure.groups.keys()
    assert set(structure.kinds.values()) <= KINDS.keys()
    rows = str(structure).splitlines()[3 : 3 + len(structure.groups)]
    for row, kind in zip(rows, structure.kinds.values(), strict=True):
        assert kind in row.split()


def rotated(x):
    """Pairs of dimensions turned by an angle for each position."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] / 10.0 ** jnp.arange(half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def decoder(turn):
    a, size, heads, shared, dim = Arrays(), 6, 2, 2, 4
    a("q", size, shared, heads, dim)
    a("k", size, shared, dim)
    a("v", size, shared, dim)
    a("o", shared, heads, dim, size)
    a("gate", size, 7)
    a("up", size, 7)
    a("down", 7, size)
    a("embed", 9, size)

    def norm(x):
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)

    def apply(p, tokens):
        x = p["embed"][tokens]
        h = norm(x)
        q = jnp.einsum("btc,ckhd->btkhd", h, p["q"])
        k = turn(jnp.einsum("btc,ckd->btkd", h, p["k"]))
        v = jnp.einsum("btc,ckd->btkd", h, p["v"])
        q = jax.vmap(turn, 3, 3)(q)
        weights = jax.nn.softmax(jnp.einsum("btkhd,bskd->bkhts", q, k), axis=-1)
        mixed = jnp.einsum("bkhts,bskd->btkhd", weights, v)
        x = x + jnp.einsum("btkhd,khdc->btc", mixed, p["o"])
        h = norm(x)
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        return norm(x) @ p["embed"].T

    return trace(apply, dict(a), jnp.arange(10).reshape(2, 5) % 9)


@pytest.mark.parametrize("turn", [lambda x: x, rotated])
def test_kinds_are_the_same_with_rotary_positions_and_without(turn):
    structure = decoder(turn)
    sizes = {
        kind: sorted(
            structure.groups[name].size
            for name, each in structure.kinds.items()
            if each == kind
        )
        for kind in set(structure.kinds.values())
    }
    # Of turned dimensions, pairs come and go together.
    pairs = 4 if turn is not rotated else 2
    assert sizes == {
        "stream": [6],
        "feed-forward": [7],
        "heads": [2, 2],
        "query-key": [pairs],
        "value": [4],
    }


def test_experts_are_what_a_product_with_a_parameter_keeps_apart():
    a = Arrays()
    a("router", 3, 4)
    a("up", 4, 3, 5)
    a("down", 4, 5, 2)

    def apply(p, x):
        weights = jax.nn.softmax(x @ p["router"])
        h = jax.nn.relu(jnp.einsum("tc,ecf->tef", x, p["up"]))
        made = jnp.einsum("tef,efd->ted", h, p["down"])
        return jnp.einsum("te,ted->td", weights, made)

    structure = trace(apply, dict(a), normal(6, 3))
    assert sorted(structure.kinds.values()) == ["experts", "feed-forward", "inputs"]


def test_edits_keep_kinds():
    structure = of("transformer")
    name = next(n for n, kind in structure.kinds.items() if kind == "query-key")
    assert structure.rename({name: "new"}).kinds["new"] == "query-key"
    size = structure.groups[name].size
    halves = {"one": range(size // 2), "two": range(size // 2, size)}
    split = structure.split(name, halves)
    assert split.kinds["one"] == split.kinds["two"] == "query-key"
    value = next(n for n, kind in structure.kinds.items() if kind == "value")
    assert structure.merge("both", [name, value]).kinds["both"] == "mixed"
    assert structure.only(name).kinds == {name: "query-key"}
    kept = {name: np.arange(size) > 0}
    assert structure.shrink(kept).kinds == structure.kinds
    assert dataclasses.replace(structure).kinds == structure.kinds
