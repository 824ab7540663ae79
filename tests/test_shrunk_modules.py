"""Modules of a user's own class that are made smaller, of NNX and of Linen: what they
keep of sizes, and that they live on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_models
from flax import linen as nn
from flax import nnx

import l0jax
import l0jax.linen
import l0jax.nnx
from l0jax import costs, gates, train

KEY = jax.random.key(0)
HEADS, SIZE = 4, 3


@pytest.fixture(autouse=True)
def any_rank():
    """Flax's own layers add vectors to matrices."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def attend(q, k, v):
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
    return jnp.einsum("bhqk,bkhd->bqhd", scores, v)


class Attention(nnx.Module):
    """Splits its heads by a number that it keeps itself."""

    def __init__(self, rngs):
        self.heads, self.features = HEADS, HEADS * SIZE

        def make(a, b):
            return nnx.Linear(a, b, use_bias=False, rngs=rngs)

        self.query, self.key, self.value = (make(6, self.features) for _ in range(3))
        self.out = make(self.features, 6)

    def __call__(self, x):
        apart = (*x.shape[:2], self.heads, -1)
        q, k, v = (f(x).reshape(apart) for f in (self.query, self.key, self.value))
        return self.out(attend(q, k, v).reshape((*x.shape[:2], self.features)))


class Net(nnx.Module):
    """Two blocks of it, one in a list."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Attention(rngs), Attention(rngs)])
        self.out = nnx.Linear(6, 10, rngs=rngs)
        self.name = "net"

    def __call__(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.out(x.mean(1))


class LinenAttention(nn.Module):
    heads: int = HEADS

    @nn.compact
    def __call__(self, x):
        size = x.shape[-1]
        q, k, v = (
            nn.Dense(self.heads * SIZE, use_bias=False, name=name)(x).reshape(
                (*x.shape[:2], self.heads, -1)
            )
            for name in ("query", "key", "value")
        )
        mixed = attend(q, k, v).reshape((*x.shape[:2], -1))
        return x + nn.Dense(size, use_bias=False, name="out")(mixed)


class LinenNet(nn.Module):
    """A module among the fields of another."""

    inner: nn.Module
    title: str = "net"

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(self.inner(x).mean(1))


def heads_of(structure):
    return [name for name, group in structure.groups.items() if group.size == HEADS]


def first_gone(structure, names):
    return {name: np.arange(structure.groups[name].size) > 0 for name in names}


def folded(tree, keep, structure):
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    return l0jax.apply_gates(tree, z, structure.groups)


INPUTS = jax.random.normal(KEY, (2, 5, 6))


def test_a_class_is_told_how_many_heads_are_left():
    module = Net(nnx.Rngs(0))
    structure = l0jax.trace(module, INPUTS)
    first, second = heads_of(structure)
    attributes = {
        "blocks.0.heads": first,
        "blocks.1.heads": second,
        # A size of every head, times the number of heads.
        "blocks.0.features": first,
        "blocks.1.features": second,
    }
    keep = first_gone(structure, [first, second])
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    gated = l0jax.nnx.fold(module, z, structure.groups)
    with pytest.raises(ValueError, match=r"another function.*keeps itself in attribut"):
        l0jax.nnx.shrink(gated, keep, structure)
    small = l0jax.nnx.shrink(gated, keep, structure, attributes)
    assert [b.heads for b in small.blocks] == [HEADS - 1] * 2
    assert [b.features for b in small.blocks] == [(HEADS - 1) * SIZE] * 2
    assert [b.heads for b in module.blocks] == [HEADS] * 2
    np.testing.assert_allclose(small(INPUTS), gated(INPUTS), atol=1e-5)
    # Once more: the smaller module is one like any other.
    structure = l0jax.trace(small, INPUTS)
    keep = first_gone(structure, [first])
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    gated = l0jax.nnx.fold(small, z, structure.groups)
    again = l0jax.nnx.shrink(gated, keep, structure, attributes)
    assert [b.heads for b in again.blocks] == [HEADS - 2, HEADS - 1]
    np.testing.assert_allclose(again(INPUTS), gated(INPUTS), atol=1e-5)


def test_an_attribute_may_count_the_units_of_several_groups():
    module = Attention(nnx.Rngs(0))
    structure = l0jax.trace(module, INPUTS)
    (heads,) = heads_of(structure)
    # Each head's own dimensions, of values; the heads; and all of both.
    sizes = [n for n, g in structure.groups.items() if g.size == SIZE]
    value = next(n for n in sizes if n.startswith("value"))
    keep = first_gone(structure, [heads, value])
    gated = l0jax.nnx.fold(
        module, {n: jnp.float32(f) for n, f in keep.items()}, structure.groups
    )
    attributes = {"heads": heads, "features": (heads, value)}
    small = l0jax.nnx.shrink(gated, keep, structure, attributes)
    assert small.heads == HEADS - 1
    assert small.features == (HEADS - 1) * (SIZE - 1)
    np.testing.assert_allclose(small(INPUTS), gated(INPUTS), atol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        (
            {"blocks.0.haeds": "first"},
            r"'blocks.0.haeds': .*features, heads",
        ),
        (
            {"blocks.7.heads": "first"},
            r"no attribute .*: List has no '7'",
        ),
        ({"blocks.0.heads": "quary"}, r"count the units of 'quary'; there is .*blocks"),
        ({"name": "first"}, r"'name' is 'net', no multiple of the 4 units"),
        ({"blocks.0.heads": ("first", "first")}, r"is 4, no multiple of the 16 units"),
    ],
)
def test_attributes_that_are_not_there_are_refused(attributes, words):
    module = Net(nnx.Rngs(0))
    structure = l0jax.trace(module, INPUTS)
    first, _ = heads_of(structure)

    def named(names):
        if isinstance(names, tuple):
            return tuple(map(named, names))
        return first if names == "first" else names

    told = {attribute: named(names) for attribute, names in attributes.items()}
    with pytest.raises(ValueError, match=words):
        l0jax.nnx.shrink(module, first_gone(structure, [first]), structure, told)


# ---------------------------------------------------------------------------- Linen


def linen_net():
    module = LinenNet(LinenAttention())
    return module, module.init(KEY, INPUTS)


def test_a_linen_module_is_shrunk_with_its_variables():
    """Running statistics go with the channels, and it is trained on as it is."""
    module = training_models.LinenNet()
    x = jax.random.normal(KEY, (4, 8, 8, 1))
    variables = module.init(KEY, x)
    structure = l0jax.trace(module, variables, x, train=False)
    keep = first_gone(structure, structure.groups)
    variables = folded(variables, keep, structure)
    small, left = l0jax.linen.shrink(module, variables, keep, structure, train=False)
    widths = [left["batch_stats"][f"BatchNorm_{at}"]["mean"].shape for at in (0, 1)]
    assert widths == [(7,), (15,)]
    for mode in ({"train": False}, {"train": True, "rngs": {"dropout": KEY}}):
        mutable = ["batch_stats"] if mode["train"] else False
        shown = [
            m.apply(v, x, mutable=mutable, **mode)
            for m, v in ((small, left), (module, variables))
        ]
        if not mode["train"]:
            np.testing.assert_allclose(*shown, atol=1e-5)
        else:
            (_, found), (_, whole) = shown
            expected = l0jax.shrink({**variables, **whole}, keep, structure.groups)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
                found["batch_stats"],
                expected["batch_stats"],
            )
    again = l0jax.trace(small, left, x, train=False)
    assert [g.size for g in again.groups.values()] == [7, 15]
    trained = train.linen(small, left, train=False)
    training = train.Training(
        trained, training_models.loss_of_linen, x, optimizer=optax.sgd(0.1)
    )
    batch = next(training_models.batches(0))
    metrics = training.step(training.start(KEY), batch)[1]
    assert np.isfinite(metrics["loss"])


def test_fields_of_linen_modules_are_told_how_many_heads_are_left():
    module, variables = linen_net()
    structure = l0jax.trace(module, variables, INPUTS)
    (heads,) = heads_of(structure)
    keep = first_gone(structure, [heads])
    variables = folded(variables, keep, structure)
    with pytest.raises(ValueError, match=r"LinenNet is another function"):
        l0jax.linen.shrink(module, variables, keep, structure)
    small, left = l0jax.linen.shrink(
        module, variables, keep, structure, {"inner.heads": heads}
    )
    assert small.module.inner.heads == HEADS - 1
    np.testing.assert_allclose(
        small.apply(left, INPUTS), module.apply(variables, INPUTS), atol=1e-5
    )
    for attribute in ("inner.haeds", "heads", "title.heads"):
        with pytest.raises(ValueError, match=f"no attribute '{attribute}'.*fields"):
            l0jax.linen.shrink(module, variables, keep, structure, {attribute: heads})


# ------------------------------------------------------------------------- in training


def loss(model, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean(), {}


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_training_compacts_and_finishes_classes_that_keep_sizes(kind):
    if kind == "nnx":
        module = Net(nnx.Rngs(0))
        structure = l0jax.trace(module, INPUTS)
        heads = heads_of(structure)
        model = train.module(
            module,
            {
                f"blocks.{at}.{name}": group
                for at, group in enumerate(heads)
                for name in ("heads", "features")
            },
        )
    else:
        module, variables = linen_net()
        structure = l0jax.trace(module, variables, INPUTS)
        heads = heads_of(structure)
        model = train.linen(module, variables, {"inner.heads": heads[0]})
    training = train.Training(
        model,
        loss,
        INPUTS,
        compaction=train.Compaction(after=1, at=1.0, gain=0.0),
        structure=structure.only(*heads),
        gate=gates.HardConcrete(),
        target=train.Target(costs.macs, 0.3),
        optimizer=optax.sgd(0.1),
        gate_optimizer=optax.adam(1e-2),
    )
    state = training.start(KEY)
    # The first head of each is closed for good.
    closed = {n: a.at[0].set(-20.0) for n, a in state.gates["logits"].items()}
    state = state._replace(gates={"logits": closed})
    batch = INPUTS, jnp.array([1, 2])
    small, after = training.compact(state)
    assert [g.size for g in small.structure.groups.values()] == [HEADS - 1] * len(heads)
    before = training.evaluate(state, [batch], rule="paper")["loss"]
    assert small.evaluate(after, [batch], rule="paper")["loss"] == pytest.approx(before)
    after, metrics = small.step(after, batch)
    assert np.isfinite(metrics["loss"])
    done = small.finish(after)
    if kind == "nnx":
        assert type(done) is Net
        assert all(block.heads < HEADS for block in done.blocks)
