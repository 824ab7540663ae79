"""Layers that a loop runs over: their units go from all of them together, or, when the
loop is written out, from each alone."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import l0jax
from l0jax import costs

DEPTH, WIDTH = 3, 9

# Compiled fast rather than to run fast.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
quick = functools.partial(jax.jit, compiler_options=QUICK)


@pytest.fixture(autouse=True)
def any_rank():
    """The libraries' own layers add vectors to matrices."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


X = np.float32(np.random.default_rng(0).normal(size=(4, 6)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(6, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.two = nnx.Linear(WIDTH, 6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.two(self.drop(nnx.relu(self.norm(self.one(x)))))


class Kinds(nnx.Module):
    """A block with other layers that remember sizes."""

    def __init__(self, rngs):
        self.one = nnx.LinearGeneral(6, (3, 4), rngs=rngs)
        self.two = nnx.LinearGeneral((3, 4), (5, 2), axis=(-2, -1), rngs=rngs)
        self.conv = nnx.Conv(10, 20, (1,), feature_group_count=5, rngs=rngs)
        self.norm = nnx.GroupNorm(20, num_groups=5, rngs=rngs)
        self.three = nnx.Linear(20, 6, rngs=rngs)

    def __call__(self, x):
        h = self.two(nnx.relu(self.one(x)))
        h = self.conv(h.reshape(h.shape[0], 1, -1))
        return x + self.three(nnx.relu(self.norm(h)[:, 0]))


class Stacked(nnx.Module):
    def __init__(self, rngs, block=Block, axis=0, depth=DEPTH):
        make = nnx.vmap(
            block,
            in_axes=(0,),
            out_axes=nnx.StateAxes({nnx.Param: axis, nnx.BatchStat: axis, ...: 0}),
        )
        self.blocks = nnx.split_rngs(splits=depth)(make)(rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)
        self.axes = nnx.static(
            nnx.StateAxes({nnx.Param: axis, nnx.BatchStat: axis, ...: 0})
        )

    def __call__(self, x):
        run = nnx.scan(
            lambda x, block: block(x),
            in_axes=(nnx.Carry, self.axes),
            out_axes=nnx.Carry,
        )
        return self.head(run(x, self.blocks))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.relu(nn.Dense(WIDTH, name="one")(x))
        return x + nn.Dense(6, name="two")(h), None


class LinenStacked(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(LinenBlock) if self.remat else LinenBlock
        axes, keys = {"params": 0}, {"params": True}
        blocks = nn.scan(block, variable_axes=axes, split_rngs=keys, length=DEPTH)
        return nn.Dense(2, name="head")(blocks(name="blocks")(x, None)[0])


def of_nnx(**how):
    def make():
        module = Stacked(nnx.Rngs(0), **how)
        module.eval()
        graph, state = nnx.split(module)
        return lambda state, x: nnx.merge(graph, state)(x), state

    return make


def of_linen(**how):
    def make():
        module = LinenStacked(**how)
        return module.apply, module.init(jax.random.key(0), X)

    return make


def of_equinox():
    def block(key):
        keys = jax.random.split(key)
        one = eqx.nn.Linear(6, WIDTH, key=keys[0])
        return one, eqx.nn.Linear(WIDTH, 6, key=keys[1])

    key = jax.random.key(0)
    blocks = eqx.filter_vmap(block)(jax.random.split(key, DEPTH))
    head = eqx.nn.Linear(6, 2, key=key)
    params, static = eqx.partition({"blocks": blocks, "head": head}, eqx.is_array)

    def apply(params, x):
        model = eqx.combine(params, static)
        arrays, rest = eqx.partition(model["blocks"], eqx.is_array)

        def turn(x, arrays):
            one, two = eqx.combine(arrays, rest)
            return x + jax.vmap(two)(jax.nn.relu(jax.vmap(one)(x))), None

        return jax.vmap(model["head"])(jax.lax.scan(turn, x, arrays)[0])

    return apply, params


def of_haiku():
    def forward(x):
        def block(x):
            return x + hk.Linear(6)(jax.nn.relu(hk.Linear(WIDTH)(x)))

        return hk.Linear(2)(hk.experimental.layer_stack(DEPTH)(block)(x))

    net = hk.without_apply_rng(hk.transform(forward))
    return net.apply, net.init(jax.random.key(0), X)


def nested():
    """Loops within a loop, over two axes of one array."""
    rng = np.random.default_rng(0)
    params = {
        "blocks": {
            "one": np.float32(rng.normal(size=(2, DEPTH, 6, WIDTH)) / 3),
            "two": np.float32(rng.normal(size=(2, DEPTH, WIDTH, 6)) / 3),
        },
        "head": np.float32(rng.normal(size=(6, 2))),
    }

    def layer(x, row):
        return x + jax.nn.relu(x @ row["one"]) @ row["two"], None

    def apply(params, x):
        def stage(x, rows):
            return jax.lax.scan(layer, x, rows)[0], None

        return jax.lax.scan(stage, x, params["blocks"])[0] @ params["head"]

    return apply, params


def in_time():
    """A loop over layers within one over time, backwards, that gives values too."""
    rng = np.random.default_rng(0)
    params = {
        "one": np.float32(rng.normal(size=(WIDTH, DEPTH, 6)) / 3),
        "two": np.float32(rng.normal(size=(DEPTH, WIDTH, 6)) / 3),
        "head": np.float32(rng.normal(size=(6, 2))),
    }

    def apply(params, x):
        rows = (jnp.moveaxis(params["one"], 0, 2), params["two"])

        def layer(x, row):
            x = x + jnp.tanh(x @ row[0]) @ row[1]
            return x, x.sum()

        def step(carry, _):
            carry, seen = jax.lax.scan(layer, carry, rows, reverse=True)
            return carry, seen

        out, seen = jax.lax.scan(step, x, None, length=2)
        return out @ params["head"] * (1 + 0.1 * seen[0, 0])

    return apply, params


STACKS = {
    "nnx": of_nnx(),
    "nnx, second axis": of_nnx(axis=1),
    "nnx, other layers": of_nnx(block=Kinds),
    "linen": of_linen(),
    "linen, remat": of_linen(remat=True),
    "equinox": of_equinox,
    "haiku": of_haiku,
    "nested": nested,
    "in time": in_time,
}


def shaken(tree, seed=1):
    rng = np.random.default_rng(seed)

    def shake(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf + jnp.float32(0.1 * np.abs(rng.normal(size=leaf.shape)))

    return jax.tree.map(shake, tree)


@functools.cache
def made(name):
    apply, params = STACKS[name]()
    return apply, shaken(params)


def random_keep(structure, seed=0):
    rng = np.random.default_rng(seed)
    keep = {}
    for name, group in structure.groups.items():
        # (The module's group norm would take other means if its groups were smaller.)
        if name not in (*structure.inputs, "blocks.norm") and group.size > 1:
            keep[name] = rng.random(group.size) < 0.6
            keep[name][rng.integers(group.size)] = True
    return keep


def gates_of(keep):
    return {name: jnp.float32(flags) for name, flags in keep.items()}


def check_narrowed(structure, apply, params, seed=0):
    keep = random_keep(structure, seed)
    assert keep
    gated = l0jax.apply_gates(params, gates_of(keep), structure.groups)
    small, left = l0jax.narrow(structure, gated, keep)
    found, expected = quick(small)(left, X), quick(apply)(gated, X)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)
    return keep


@pytest.mark.sweep
@pytest.mark.parametrize("name", STACKS)
def test_units_of_stacked_layers_go_together(name):
    apply, params = made(name)
    structure = l0jax.trace(apply, params, X)
    check_narrowed(structure, apply, params)


def numbers(tree):
    return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]


@pytest.mark.sweep
@pytest.mark.parametrize("name", STACKS)
def test_an_unstacked_function_is_the_same_with_groups_of_each_layer(name):
    apply, params = made(name)
    unstacked, apart = l0jax.unstack(apply, params, X)
    for x in (X, X[:1]):
        found, expected = quick(unstacked)(apart, x), quick(apply)(params, x)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert sum(a.size for a in numbers(apart)) == sum(a.size for a in numbers(params))
    structure, before = l0jax.trace(unstacked, apart, X), l0jax.trace(apply, params, X)
    assert costs.exact(structure) == costs.exact(before)
    turns = 2 * DEPTH if name == "nested" else DEPTH
    inside, layers = (
        [n for n in found.groups if n not in found.inputs]
        for found in (before, structure)
    )
    assert len(layers) == turns * len(inside)
    check_narrowed(structure, unstacked, apart)


@pytest.mark.sweep
@pytest.mark.parametrize("name", STACKS)
def test_a_step_down_the_gradient_is_the_same(name):
    apply, params = made(name)
    unstacked, apart = l0jax.unstack(apply, params, X)

    def after_a_step(function, params):
        moving, still = eqx.partition(params, eqx.is_inexact_array)

        def loss(moving):
            return jnp.square(function(eqx.combine(moving, still), X)).mean()

        slopes = jax.grad(loss)(moving)
        moved = jax.tree.map(lambda a, b: a - 0.1 * b, moving, slopes)
        return function(eqx.combine(moved, still), X)

    one, other = (
        quick(lambda p, f=f: after_a_step(f, p))(p)
        for f, p in ((apply, params), (unstacked, apart))
    )
    assert np.abs(one - apply(params, X)).max() > 1e-3
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_rows_are_named_by_their_module():
    apply, params = STACKS["linen"]()
    unstacked, apart = l0jax.unstack(apply, params, X)
    assert apart["params.blocks.one.0.kernel"].shape == (6, WIDTH)
    structure = l0jax.trace(unstacked, apart, X)
    assert {f"blocks.one.{at}" for at in range(DEPTH)} <= {*structure.groups}
    kernels = params["params"]["blocks"]["two"]["kernel"]
    np.testing.assert_array_equal(apart["params.blocks.two.2.kernel"], kernels[2])
    shapes = jax.eval_shape(lambda: params)
    _, same = l0jax.unstack(apply, shapes, X)
    assert {p: a.shape for p, a in same.items()} == {
        p: a.shape for p, a in apart.items()
    }


def test_a_module_is_unstacked_as_in_evaluation():
    module = Stacked(nnx.Rngs(0))
    unstacked, apart = l0jax.unstack(module, X)
    calm = nnx.clone(module)
    calm.eval()
    np.testing.assert_allclose(unstacked(apart, X), calm(X), rtol=1e-5, atol=1e-6)
    assert "blocks.one.1.kernel" in apart


def test_a_function_without_loops_is_not_unstacked():
    with pytest.raises(ValueError, match=r"no loop runs over an axis.*one, two"):
        l0jax.unstack(
            lambda p, x: x @ p["one"] @ p["two"],
            {"one": np.ones((6, 3), np.float32), "two": np.ones((3, 2), np.float32)},
            X,
        )


def test_parameters_that_are_used_in_other_ways_too_stay_the_same_function():
    params = {"w": np.float32(np.random.default_rng(0).normal(size=(3, 6, 6)))}

    def apply(params, x):
        w = params["w"]
        out = jax.lax.scan(lambda x, row: (jnp.tanh(x @ row), None), x, w)[0]
        half = jax.lax.cond(x.sum() > 0, lambda w: w[0], lambda w: w[1], w)
        return (out + w.sum(0)[0]) @ half

    unstacked, apart = l0jax.unstack(apply, params, X)
    assert [*apart] == ["w.0", "w.1", "w.2"]
    np.testing.assert_allclose(unstacked(apart, X), apply(params, X), rtol=1e-5)


SHRUNK = {
    "plain": {},
    "second axis": {"axis": 1},
    "as many as inputs": {"depth": 6},
    "as many as units": {"depth": WIDTH},
    "as many, second axis": {"depth": WIDTH, "axis": 1},
    "other layers": {"block": Kinds},
    "other layers, as many": {"block": Kinds, "depth": 4},
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", SHRUNK)
def test_nnx_stacks_shrink_and_say_so(name):
    module = Stacked(nnx.Rngs(0), **SHRUNK[name])
    graph, state = nnx.split(module)
    module = nnx.merge(graph, shaken(state))
    structure = l0jax.trace(module, X)
    keep = random_keep(structure)
    folded = l0jax.nnx.fold(module, gates_of(keep), structure.groups)
    small = l0jax.nnx.shrink(folded, keep, structure)
    outputs = []
    for each in (small, folded):
        each.eval()
        graph, state = nnx.split(each)
        outputs.append(quick(lambda s, g=graph: nnx.merge(g, s)(X))(state))
    np.testing.assert_allclose(*outputs, rtol=2e-5, atol=1e-5)
    one, two = small.blocks.one, small.blocks.two
    left = int(keep["blocks.one"].sum())
    if "block" not in SHRUNK[name]:
        assert (one.in_features, one.out_features) == (6, left)
        assert (two.in_features, two.out_features) == (left, 6)
        assert small.blocks.norm.num_features == left
        return
    heads, inside = one.out_features
    assert one.in_features == (6,)
    assert two.in_features == (heads, inside)
    conv, norm = small.blocks.conv, small.blocks.norm
    assert heads * inside < 12
    assert conv.feature_group_count == norm.num_groups == two.out_features[0]
    assert conv.in_features == two.out_features[0] * two.out_features[1]
    assert norm.num_groups * norm.group_size == conv.out_features


def test_a_layer_that_remembers_other_sizes_is_refused():
    module = Stacked(nnx.Rngs(0))
    structure = l0jax.trace(module, X)
    module.blocks.one.out_features = 5
    keep = {"blocks.one": np.arange(WIDTH) > 1}
    words = r"Linear at 'blocks.one' remembers the sizes \(6, 5\) of kernel"
    with pytest.raises(ValueError, match=words):
        l0jax.nnx.shrink(module, keep, structure)
