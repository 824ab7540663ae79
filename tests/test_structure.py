"""Laws 2, 3 and 4: what `trace` says may be removed may be, and costs what it says.

Over the networks of `networks.py`, and over random ones: composed of layers whose code
reads all sizes from its arrays, so that the same function runs on smaller ones too.
"""

import copy
import functools
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from benchmarks.networks import NETWORKS
from l0jax import costs, gating, units
from l0jax.gates import HardConcrete
from l0jax.narrow import narrow
from l0jax.tracing import TraceError, trace
from l0jax.units import Group, Slot

# Compiled fast rather than to run fast.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
quick = functools.partial(jax.jit, compiler_options=QUICK)

# ------------------------------------------------------------------ random networks

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
}


def conv(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def along_last(vector, x):
    return vector.reshape([1] * (x.ndim - 1) + [-1])


class Network:
    """Draws layers, makes their arrays, and is the function that they compute."""

    def __init__(self, data):
        self.data, self.params, self.layers = data, {}, []
        self.counts = False  # whether its code counts units or positions
        self.rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
        size = self.int(1, 3)
        self.shape = (2, 4, 4, size)
        self.steps = self.sequence(size, self.int(1, 4))
        x = jnp.asarray(self.rng.normal(size=self.shape))
        self.flat = data.draw(st.booleans())
        width = jax.eval_shape(
            lambda params, x: self(x, params, features=True), self.params, x
        ).shape[-1]
        self.array("head", (width, 3))
        self.x = x

    def int(self, low, high):
        return self.data.draw(st.integers(low, high))

    def array(self, name, shape):
        fan = max(int(np.prod(shape[:-1])), 1)
        values = self.rng.normal(size=shape) / np.sqrt(fan) + 0.05
        self.params[name] = np.asarray(values)
        return name

    def fresh(self, kind):
        return f"{kind}{len(self.params)}"

    def sequence(self, size, layers):
        steps, self.size = [], size
        for _ in range(layers):
            kind = self.data.draw(st.sampled_from(sorted(LAYERS)))
            steps.append(LAYERS[kind](self))
        return steps

    def run(self, steps, params, x):
        for step in steps:
            x = step(params, x)
        return x

    def __call__(self, x, params=None, features=False):
        params = self.params if params is None else params
        x = self.run(self.steps, params, x)
        x = x.reshape(x.shape[0], -1) if self.flat else x.mean((1, 2))
        return x if features else x @ params["head"]


LAYERS = {}


def layer(function):
    LAYERS[function.__name__] = function
    return function


@layer
def convolution(net):
    out = net.int(1, 5)
    kernel = net.array(net.fresh("conv"), (3, 3, net.size, out))
    bias = net.array(net.fresh("bias"), (out,))
    net.size = out
    return lambda p, x: conv(x, p[kernel]) + along_last(p[bias], x)


@layer
def depthwise(net):
    times = net.int(1, 3)
    kernel = net.array(net.fresh("depthwise"), (3, 3, 1, net.size * times))
    net.size *= times
    return lambda p, x: conv(x, p[kernel], groups=x.shape[-1])


@layer
def grouped(net):
    inside, groups, made = net.int(1, 3), net.int(1, 3), net.int(1, 2)
    first = net.array(net.fresh("conv"), (1, 1, net.size, inside * groups))
    kernel = net.array(net.fresh("grouped"), (3, 3, inside, made * groups))
    net.size = made * groups

    def run(p, x):
        x = conv(x, p[first])
        return conv(x, p[kernel], groups=x.shape[-1] // p[kernel].shape[2])

    return run


@layer
def batch_norm(net):
    names = [net.array(net.fresh(part), (net.size,)) for part in ("a", "b", "m", "v")]

    def run(p, x):
        scale, shift, mean, var = (along_last(p[name], x) for name in names)
        return (x - mean) * jax.lax.rsqrt(jnp.square(var) + 1e-3) * scale + shift

    return run


@layer
def norm_of_pairs(net):
    """Group normalisation of two channels each: only whole pairs can go."""
    net.counts = True
    kernel = net.array(net.fresh("conv"), (1, 1, net.size, 2 * net.int(1, 3)))
    net.size = net.params[kernel].shape[-1]

    def run(p, x):
        x = conv(x, p[kernel])
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        mean = pairs.mean((1, 2, 4), keepdims=True)
        spread = jnp.square(pairs - mean).mean((1, 2, 4), keepdims=True)
        return ((pairs - mean) * jax.lax.rsqrt(spread + 1e-3)).reshape(x.shape)

    return run


@layer
def layer_norm(net):
    net.counts = True

    def run(p, x):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3)

    return run


@layer
def rms_norm(net):
    scale = net.array(net.fresh("scale"), (net.size,))

    def run(p, x):
        mean = jnp.square(x).sum(-1, keepdims=True) / 7
        return x * jax.lax.rsqrt(mean + 1e-3) * along_last(p[scale], x)

    return run


@layer
def norm_of_repeated(net):
    """Units that lie twice along the axis that is normalised."""
    net.counts = True
    net.size *= 2

    def run(p, x):
        x = jnp.concatenate([x, jnp.tanh(x)], axis=-1)
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3)

    return run


@layer
def weighted(net):
    """Each unit by its share of all."""
    net.counts = True
    return lambda p, x: x * jax.nn.softmax(x)


@layer
def stacked(net):
    return lambda p, x: jnp.stack([x, jnp.tanh(x)]).sum(0)


@layer
def added_by_index(net):
    """Rows of pixels that are summed where their index says."""
    net.counts = True

    def run(p, x):
        rows = jnp.zeros_like(x).at[:, jnp.array([0, 2, 2, 1])].add(x)
        return rows[:, jnp.array([2, 1, 0, 3])]

    return run


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (2 * g,))


@layer
def own_derivative(net):
    again = net.data.draw(st.booleans())
    function = jax.checkpoint(jnp.sin) if again else straight_through
    return lambda p, x: x + function(3 * x)


@layer
def activation(net):
    function = ACTIVATIONS[net.data.draw(st.sampled_from(sorted(ACTIVATIONS)))]
    return lambda p, x: function(x)


@layer
def gate(net):
    """A gated linear unit: two halves of one layer's outputs meet."""
    half = net.int(1, 3)
    kernel = net.array(net.fresh("glu"), (net.size, 2 * half))
    net.size = half

    def run(p, x):
        a, b = jnp.split(x @ p[kernel], 2, axis=-1)
        return a * jax.nn.sigmoid(b)

    return run


@layer
def residual(net):
    size = net.size
    inner = net.sequence(size, net.int(1, 2))
    back = net.array(net.fresh("back"), (1, 1, net.size, size))
    net.size = size
    return lambda p, x: x + conv(net.run(inner, p, x), p[back])


@layer
def dense_block(net):
    size = net.size
    inner = net.sequence(size, net.int(1, 2))
    net.size += size
    return lambda p, x: jnp.concatenate([x, net.run(inner, p, x)], axis=-1)


@layer
def squeeze_and_excite(net):
    middle = net.int(1, 4)
    down = net.array(net.fresh("down"), (net.size, middle))
    up = net.array(net.fresh("up"), (middle, net.size))

    def run(p, x):
        weights = jax.nn.relu(x.mean((1, 2)) @ p[down]) @ p[up]
        return x * jax.nn.sigmoid(weights)[:, None, None, :]

    return run


@layer
def pooling(net):
    def run(p, x):
        return jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME"
        )

    return run


@layer
def attention(net):
    heads, dim = net.int(1, 3), net.int(1, 3)
    q, k, v = (net.array(net.fresh(n), (net.size, heads, dim)) for n in "qkv")
    bias = net.array(net.fresh("bias"), (heads, dim))
    out = net.array(net.fresh("out"), (heads, dim, net.size))

    def run(p, x):
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        query = jnp.einsum("nsc,chd->nshd", tokens, p[q]) + p[bias][None, None]
        key = jnp.einsum("nsc,chd->nshd", tokens, p[k])
        value = jnp.einsum("nsc,chd->nshd", tokens, p[v])
        weights = jax.nn.softmax(jnp.einsum("nshd,nthd->nhst", query, key), axis=-1)
        mixed = jnp.einsum("nhst,nthd->nshd", weights, value)
        return x + jnp.einsum("nshd,hdc->nsc", mixed, p[out]).reshape(x.shape)

    return run


@layer
def tied(net):
    """One square kernel, twice: its outputs are what it reads."""
    kernel = net.array(net.fresh("tied"), (net.size, net.size))
    return lambda p, x: jnp.tanh(jnp.tanh(x @ p[kernel]) @ p[kernel])


@layer
def in_a_scan(net):
    """Layers that are stacked along a first axis."""
    stack = net.array(net.fresh("stack"), (2, net.size, net.size))

    def run(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p[stack])[0]

    return run


@layer
def standardised(net):
    """A kernel that is normalised over what it reads: those units can't go."""
    net.counts = True
    out = net.int(1, 4)
    kernel = net.array(net.fresh("standardised"), (net.size, out))
    net.size = out

    def run(p, x):
        w = p[kernel]
        return x @ (w - w.mean(0, keepdims=True))

    return run


@layer
def outer_product(net):
    """All products of two layers' outputs, flattened."""
    sizes = net.int(1, 3), net.int(1, 3)
    one, other = (net.array(net.fresh("factor"), (net.size, size)) for size in sizes)
    net.size = sizes[0] * sizes[1]
    even = net.data.draw(st.booleans())

    def run(p, x):
        a, b = x @ p[one], x @ p[other]
        a = jnp.cos(a) if even else a
        return (a[..., None] * b[..., None, :]).reshape(*x.shape[:-1], -1)

    return run


@layer
def divided(net):
    """Each unit over what it has over all pixels."""
    kind = net.data.draw(st.sampled_from(sorted(DIVISORS)))
    kernel = net.array(net.fresh("divided"), (net.size, net.size))
    return lambda p, x: (h := x @ p[kernel]) / DIVISORS[kind](h)


DIVISORS = {
    "root": lambda h: jnp.sqrt(jnp.square(h).mean((1, 2), keepdims=True) + 1e-3),
    "norm": lambda h: jnp.sqrt(jnp.square(h).sum((1, 2), keepdims=True)),
    "largest": lambda h: jnp.abs(h).max((1, 2), keepdims=True),
    "softsign": lambda h: 1 + jnp.abs(h),
    "deviation": lambda h: h.std((1, 2), keepdims=True),
}


@layer
def weight_norm(net):
    """A kernel over its norm, along the units that it reads or that it makes."""
    kernel = net.array(net.fresh("normed"), (net.size, net.size))
    along = net.int(0, 1)

    def run(p, x):
        norm = jnp.sqrt(jnp.square(p[kernel]).sum(along, keepdims=True))
        return x @ (p[kernel] / norm)

    return run


@layer
def read_out_of_bounds(net):
    """Rows of pixels, some of which are not there."""
    net.counts = True
    fill = float(net.int(0, 1))

    def run(p, x):
        # (They are read in part by a narrowed program, but not by this code.)
        rows = 2 * jnp.arange(4)
        return x.at[:, rows].get(mode="fill", fill_value=fill)

    return run


@layer
def scaled_by_a_sum(net):
    """A layer of which nothing but the sum is used: its gates are where it is made."""
    kernel = net.array(net.fresh("summed"), (net.size, net.int(1, 4)))
    function = ACTIVATIONS[net.data.draw(st.sampled_from(sorted(ACTIVATIONS)))]
    divided = net.data.draw(st.booleans())

    def run(p, x):
        h = function(x @ p[kernel])
        if divided:
            h = h / DIVISORS["norm"](h)
        return x * h.sum(-1, keepdims=True)

    return run


# ----------------------------------------------------------------------------- laws


@pytest.fixture(autouse=True)
def any_rank():
    """Other people's code adds vectors to matrices, and counts to numbers."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def without_removed_inputs(structure, keep, inputs):
    """The inputs with zeros where nothing is to be read."""
    for name, slots in structure.inputs.items():
        groups = {name: Group(name, structure.groups[name].size, slots)}
        z = {name: jnp.float32(keep.get(name, np.ones(groups[name].size)))}
        inputs = units.apply_gates(inputs, z, groups)
    return inputs


def assert_close(masked, small, tolerance):
    masked, small = jax.tree.leaves(masked), jax.tree.leaves(small)
    assert len(masked) == len(small)
    for a, b in zip(masked, small, strict=True):
        assert a.shape == b.shape
        scale = float(abs(b).max()) + 1e-6
        assert np.isfinite(scale), "two networks without a value are not compared"
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)


def gated(params, keep, groups):
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    return units.apply_gates(params, z, groups)


def masked_outputs(apply, params, inputs, keep, groups):
    """The outputs under closed gates, in one program."""
    return quick(lambda params, *inputs: apply(gated(params, keep, groups), *inputs))(
        params, *inputs
    )


def assert_law_2(apply, params, inputs, structure, keep, tolerance=1e-5):
    """Closing the gates of units is the same as running the program without them."""
    masked = masked_outputs(apply, params, inputs, keep, structure.groups)
    small, small_params = narrow(structure, params, keep)
    assert_close(masked, quick(small)(small_params, *inputs), tolerance)
    # Of the inputs, nothing of what is gone was read.
    blind = without_removed_inputs(structure, keep, inputs)
    assert_close(masked, quick(small)(small_params, *blind), tolerance)


def loss(outputs):
    """A number that depends on every output, and on none in the same way."""
    return sum(
        (jnp.abs(a) * (1 + jnp.arange(a.size).reshape(a.shape) % 7)).sum()
        for a in jax.tree.leaves(outputs)
        if jnp.issubdtype(a.dtype, jnp.inexact)
    )


def gradients(function, params):
    """Of a loss; of what is no number there is none."""
    found = jax.grad(lambda p: loss(function(p)), allow_int=True)
    exact = lambda leaf: not jnp.issubdtype(leaf.dtype, jnp.inexact)  # noqa: E731
    return jax.tree.map(
        lambda leaf, g: jnp.zeros(leaf.shape) if exact(leaf) else g,
        params,
        quick(found)(params),
    )


def assert_same_gradients(apply, params, inputs, structure, keep, tolerance=1e-5):
    """By what is left: of the gated function, those of the units that are kept."""
    groups = structure.groups
    masked = gradients(lambda p: apply(gated(p, keep, groups), *inputs), params)
    small, small_params = narrow(structure, params, keep)
    narrowed = gradients(lambda p: small(p, *inputs), small_params)
    masked = jax.tree.leaves(units.shrink(masked, keep, groups))
    narrowed = jax.tree.leaves(narrowed)
    scale = max([float(abs(g).max()) for g in masked if g.size], default=0.0) + 1e-6
    assert np.isfinite(scale)
    for a, b in zip(masked, narrowed, strict=True):
        # Of an array that nothing reads any more, narrowing leaves nothing.
        b = b if b.size else jnp.zeros_like(a)
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)


def random_keep(groups, seed, share=0.6):
    rng = np.random.default_rng(seed)
    keep = {}
    for name, group in groups.items():
        keep[name] = rng.random(group.size) < share
        keep[name][rng.integers(group.size)] = True
    return keep


def read(name):
    net = NETWORKS[name]()
    return net, trace(net.apply, net.params, *net.inputs)


read = functools.cache(read)
every_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.mark.sweep
@every_network
def test_finds_all_units_that_can_be_removed_and_no_others(name):
    """Law 4: outputs, normalised axes and what is indexed are in no group."""
    net, structure = read(name)
    assert not structure.unknown
    assert sum(group.size for group in structure.groups.values()) == net.removable
    for path, axis in net.frozen:
        assert path in structure.arrays
        for group in structure.groups.values():
            assert (path, axis) not in {(slot.path, slot.axis) for slot in group.slots}
    units.check(net.params, structure.groups)


@pytest.mark.sweep
@every_network
def test_gated_equals_narrowed(name):
    """Law 2, of units at random and of a single unit of each group."""
    net, structure = read(name)
    keep = random_keep(structure.groups, seed=0)
    assert_law_2(net.apply, net.params, net.inputs, structure, keep)
    keep = random_keep(structure.groups, seed=1, share=0.0)
    assert_law_2(net.apply, net.params, net.inputs, structure, keep)


@pytest.mark.sweep
@every_network
def test_all_gates_open_change_nothing(name):
    net, structure = read(name)
    keep = random_keep(structure.groups, seed=0, share=1.1)
    before = quick(net.apply)(net.params, *net.inputs)
    small, params = narrow(structure, net.params, keep)
    assert_close(before, quick(small)(params, *net.inputs), 1e-6)
    for a, b in zip(jax.tree.leaves(net.params), jax.tree.leaves(params), strict=True):
        assert a.shape == b.shape
        assert (a == b).all()


@pytest.mark.sweep
@every_network
def test_groups_may_lose_all_their_units(name):
    """Zero is a size: laws 2 and 3 of each group that is gone, and of all of them."""
    net, structure = read(name)
    all_of = {n: np.ones(group.size, bool) for n, group in structure.groups.items()}
    # (Of many groups some, for each is a program to compile.)
    alone = [(n,) for n in [*all_of][:: max(len(all_of) // 3, 1)]]
    for gone in {each: None for each in [*alone, (*all_of,)]}:
        keep = {n: flags & (n not in gone) for n, flags in all_of.items()}
        assert_law_2(net.apply, net.params, net.inputs, structure, keep)
        _, params = narrow(structure, net.params, keep)
        sizes = {path: leaf.size for path, leaf in units.arrays(params).items()}
        left = sum(sizes[path] for path in structure.trainable)
        assert costs.exact(structure, keep, costs.params) == left
        smaller = structure.shrink(keep)
        for cost in (costs.params, costs.macs):
            assert costs.exact(structure, keep, cost) == costs.exact(smaller, cost=cost)


@pytest.mark.sweep
@every_network
def test_costs_are_those_of_the_narrowed_program(name):
    """Law 3: costs at `keep` are counted again on a trace of what is left."""
    net, structure = read(name)
    keep = random_keep(structure.groups, seed=2)
    small, params = narrow(structure, net.params, keep)
    left = trace(small, params, *net.inputs)
    smaller = structure.shrink(keep)
    for cost in (costs.params, costs.weights, costs.bytes, costs.macs):
        found = costs.exact(structure, keep, cost)
        assert found == costs.exact(left, cost=cost)
        assert found == costs.exact(smaller, cost=cost)


@pytest.mark.sweep
@every_network
def test_expected_costs_are_the_means_of_draws(name):
    """Law 3: within five standard errors of 20,000 draws."""
    _, structure = read(name)
    gate = HardConcrete()
    key = jax.random.key(0)
    logits = {
        name: jax.random.normal(gating.key_for(key, name), group.size)
        for name, group in structure.groups.items()
    }
    active = gating.prob_active(gate, logits)

    @jax.jit
    def draw(key):
        z = gating.sample(key, gate, logits)
        open_ = {name: (value != 0).astype(jnp.float32) for name, value in z.items()}
        return costs.params(structure, open_), costs.macs(structure, open_)

    draws = jax.lax.map(draw, jax.random.split(key, 20_000), batch_size=2_000)
    for cost, values in zip((costs.params, costs.macs), draws, strict=True):
        values = np.asarray(values, np.float64)
        error = values.std(ddof=1) / np.sqrt(len(values))
        # Sums of millions are rounded in float32.
        slack = 1e-6 * values.mean()
        assert abs(float(cost(structure, active)) - values.mean()) <= 5 * error + slack


# Contractions that XLA counts as multiply-adds; those of ResNet and MobileNet pad.
COUNTED = ("mlp", "tied_autoencoder", "equinox_mlp", "square_on_a_residual_stream")


@pytest.mark.parametrize("name", COUNTED)
def test_costs_agree_with_the_count_of_the_compiler(name):
    net, structure = read(name)
    batch = jax.tree.leaves(net.inputs)[0].shape[0]
    compiled = jax.jit(net.apply).lower(net.params, *net.inputs).compile()
    flops = compiled.cost_analysis()["flops"]
    products = 2 * batch * costs.exact(structure)
    # Beside its products, a layer has a bias and an activation for each unit.
    assert products <= flops <= 1.35 * products


@pytest.mark.sweep
@every_network
def test_narrowed_functions_take_batches_of_any_size(name):
    net, structure = read(name)
    keep = random_keep(structure.groups, seed=3)
    small, params = narrow(structure, net.params, keep)
    more = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), net.inputs)
    masked = masked_outputs(net.apply, net.params, more, keep, structure.groups)
    assert_close(masked, quick(small)(params, *more), 1e-5)


def draws(data, groups):
    """Which units stay, at random; of some groups none."""
    keep = {}
    for name, group in groups.items():
        flags = st.lists(st.booleans(), min_size=group.size, max_size=group.size)
        keep[name] = np.array(data.draw(flags))
        if data.draw(st.integers(0, 7)):
            keep[name][data.draw(st.integers(0, group.size - 1))] = True
    return keep


def in_float64(test):
    """Of ten thousand networks, some cancel all but the last digits of float32."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            test(*args, **kwargs)

    return wrapped


def random_networks(examples):
    """Sweeps a law over random networks, in float64."""

    def law(test):
        how = settings(
            phases=[Phase.generate],
            # Many times as many by hand:
            # L0JAX_NETWORKS=200 python -m pytest tests/test_structure.py
            max_examples=examples * int(os.environ.get("L0JAX_NETWORKS", 1)),
            suppress_health_check=[
                HealthCheck.too_slow,
                HealthCheck.data_too_large,
            ],
            deadline=None,
        )
        return how(given(st.data())(in_float64(test)))

    return law


def drawn(data):
    """A network, the function that it is, its structure, which units stay, and its
    outputs under closed gates."""
    net = Network(data)

    def apply(params, x):
        return net(x, params)

    structure = trace(apply, net.params, net.x)
    keep = draws(data, structure.groups)
    masked = masked_outputs(apply, net.params, (net.x,), keep, structure.groups)
    return net, apply, structure, keep, masked


def some_of_each(keep):
    return all(flags.any() for flags in keep.values())


@random_networks(50)
def test_units_of_random_networks_can_be_removed(data):
    net, _, structure, keep, masked = drawn(data)
    assert not structure.unknown
    small, small_params = narrow(structure, net.params, keep)
    results = quick(small)(small_params, net.x)
    assume(np.isfinite(results).all())  # some networks divide by zero themselves
    if some_of_each(keep):
        assert costs.exact(structure, keep) == costs.exact(
            trace(small, small_params, net.x)
        )
    else:  # and some by all units of a group
        assume(np.isfinite(masked).all())
    assert_close(masked, results, 1e-9)


@random_networks(6)
def test_gradients_of_random_networks_are_those_of_what_is_left(data):
    net, apply, structure, keep, masked = drawn(data)
    assume(np.isfinite(masked).all())
    params = jax.tree.map(jnp.asarray, net.params)
    closed = gradients(lambda p: apply(gated(p, keep, structure.groups), net.x), params)
    assume(all(np.isfinite(g).all() for g in closed.values()))
    assert_same_gradients(apply, params, (net.x,), structure, keep, 1e-9)


@random_networks(8)
def test_code_that_reads_sizes_from_arrays_runs_on_smaller_ones(data):
    net, apply, structure, keep, masked = drawn(data)
    # (Means are then over fewer units; and it reshapes to -1.)
    assume(not net.counts and some_of_each(keep))
    outside = {
        name: Group(name, structure.groups[name].size, (), slots)
        for name, slots in structure.inputs.items()
    }
    (x,) = units.shrink((net.x,), {name: keep[name] for name in outside}, outside)
    small = units.shrink(net.params, keep, structure.groups)
    results = quick(apply)(small, x)
    assume(np.isfinite(results).all())
    assert_close(masked, results, 1e-9)


# ------------------------------------------------------------ what can't be removed


ARRAYS = {
    "one": jnp.ones((3, 4)),
    "two": jnp.ones((4, 2)),
    "three": jnp.ones((3, 4)),
    "bias": jnp.ones((1, 4)),
    "seven": jnp.ones((1, 7)),
    "grouped": jnp.ones((2, 2)),
    "sixteen": jnp.ones((16, 2)),
    "square": jnp.ones((4, 4)),
}
X = jnp.ones((5, 3))


def in_two_passes(x):
    """Units over their deviation; closed ones are not zero within it."""
    x = x - x.mean(1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(1, keepdims=True) + 1e-3)


def outer(h, g):
    """All products of two vectors, for each example, along one axis."""
    return (h[:, :, None] * g[:, None]).reshape(len(h), h.shape[1] * g.shape[1])


FROZEN_BY = {
    "cumulative sum": lambda p, x: jnp.cumsum(x @ p["one"], axis=1) @ p["two"],
    "sort": lambda p, x: jnp.sort(x @ p["one"], axis=1) @ p["two"],
    "top k": lambda p, x: jax.lax.top_k(x @ p["one"], 4)[0] @ p["two"],
    "reversal": lambda p, x: (x @ p["one"])[:, ::-1] @ p["two"],
    "output": lambda p, x: ((h := x @ p["one"]) @ p["two"], h),
    "index": lambda p, x: (x @ p["one"])[:, jnp.array([3, 1, 2, 0])] @ p["two"],
    "a primitive without a rule": lambda p, x: (
        jax.lax.linalg.qr(x @ p["one"], full_matrices=False)[0] @ p["two"]
    ),
    "product with itself": lambda p, x: (
        outer(x @ p["one"], x @ p["one"]) @ p["sixteen"]
    ),
    "product with itself that no parameter reads": lambda p, x: (
        outer(x @ p["one"], x @ p["one"]) @ jnp.tile(p["two"], (4, 1))
    ),
    "product of activations": lambda p, x: (
        jnp.cos(x @ p["one"]) @ jnp.cos(x @ p["one"]).T
    ),
    "product with itself, zero where one factor is": lambda p, x: outer(
        jnp.cos(x @ p["one"]), jnp.tanh(x @ p["one"])
    ).sum(1),
    "sum of products that are zero in different factors": lambda p, x: (
        outer(jnp.cos(x @ p["one"]), jnp.tanh(x @ p["three"]))
        + outer(jnp.tanh(x @ p["one"]), jnp.cos(x @ p["three"]))
    ).sum(1),
    "grouped convolution whose kernel is read again": lambda p, x: (
        jax.lax.conv_general_dilated(
            (x @ p["one"])[:, None],
            p["grouped"][None],
            (1,),
            "SAME",
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=2,
        )[:, 0]
        @ p["grouped"]
    ),
    "top k of each unit, sorted": lambda p, x: (
        jax.lax.top_k((x @ p["one"])[:, :, None], 4, axis=1)[0][..., 0] @ p["two"]
    ),
    "sum of a product of itself that was split again": lambda p, x: (
        outer(h := jnp.exp(x @ p["one"]), h * p["bias"]).reshape(5, 4, 4).sum(1)
        @ p["two"]
    ),
    "concatenation of what is zero in different factors": lambda p, x: jnp.concatenate(
        [
            outer(jnp.exp(x @ p["one"]), jnp.tanh(x @ p["three"]))[:, None],
            outer(jnp.tanh(x @ p["one"]), jnp.exp(x @ p["three"]))[:, None],
        ],
        axis=1,
    ).sum(2),
    "product that is zero in one factor, of one array": lambda p, x: outer(
        jnp.exp((x @ p["one"]) * p["seven"][:, :4]), jnp.tanh(p["seven"][:, 4:])
    ).sum(1),
    "gather of a window": lambda p, x: jax.lax.gather(
        jnp.tanh(x @ p["one"]),
        jnp.array([[1], [2]]),
        jax.lax.GatherDimensionNumbers((1,), (0,), (0,)),
        (1, 2),
    ),
}


@pytest.mark.parametrize("why", FROZEN_BY)
def test_what_is_not_provably_removable_is_frozen(why):
    def apply(p, x):
        # Its units are read elsewhere too: that alone would let them be removed.
        return FROZEN_BY[why](p, x), x @ p["one"] @ p["two"]

    structure = trace(apply, ARRAYS, X)
    assert not any(
        (slot.path, slot.axis) == ("one", 1)
        for group in structure.groups.values()
        for slot in group.slots
    )
    assert any(
        (slot.path, slot.axis) == ("one", 1)
        for each in structure.frozen.values()
        for slot in each.slots
    )
    assert bool(structure.unknown) == (why == "a primitive without a rule")


# What runs over units that are not zero when they are closed, but all alike, or that
# meet what is fixed: narrowing adds what is missing, or takes what is left.
ALIKE = {
    "softmax": lambda p, x: jax.nn.softmax(x @ p["one"]) @ p["two"],
    "layer norm": lambda p, x: jax.nn.standardize(x @ p["one"]) @ p["two"],
    "maximum": lambda p, x: (
        ((h := x @ p["one"]) / (1 + h.max(1, keepdims=True))) @ p["two"]
    ),
    "mean": lambda p, x: ((h := x @ p["one"]) - h.mean(1, keepdims=True)) @ p["two"],
    "sum of more than zeros": lambda p, x: (
        ((h := jnp.cos(x @ p["one"])) * h.sum(1, keepdims=True)) @ p["two"]
    ),
    "counting": lambda p, x: (x @ p["one"] * jnp.arange(4.0)) @ p["two"],
    "random numbers": lambda p, x: (
        (x @ p["one"] * jax.random.normal(jax.random.key(0), (5, 4))) @ p["two"]
    ),
    "what is read out of bounds": lambda p, x: (
        (jnp.tanh(x @ p["one"])).at[jnp.array([1, 9])].get(mode="fill", fill_value=5.0)
    ).sum(1),
    "windows in the holes": lambda p, x: jnp.maximum(
        jax.lax.reduce_window(
            x @ p["one"],
            -jnp.inf,
            jax.lax.max,
            (2, 1),
            (1, 1),
            "VALID",
            base_dilation=(4, 1),
        ),
        -1.0,
    ).sum(1),
    "windows in the padding": lambda p, x: jnp.maximum(
        jax.lax.reduce_window(
            x @ p["one"],
            -jnp.inf,
            jax.lax.max,
            (2, 1),
            (1, 1),
            ((3, 0), (0, 0)),
        ),
        -1.0,
    ).sum(1),
    "largest of nothing": lambda p, x: jnp.maximum(
        jnp.max((x @ p["one"])[:0], axis=0, initial=-jnp.inf), -2.0
    ).sum(),
    "sum of zeros and more than zeros": lambda p, x: (
        jnp.cos(h := x @ p["one"]) + jnp.tanh(h)
    ).sum(1),
    "smallest": lambda p, x: (
        (jnp.cos(h := x @ p["one"]) - jnp.cos(h).min(1, keepdims=True)) @ p["two"]
    ),
    "a log of a sum of exponentials": lambda p, x: jax.nn.logsumexp(
        x @ p["one"], axis=1
    ),
    "two axes at once": lambda p, x: jnp.exp(outer(x @ p["one"], x @ p["three"])).sum(
        1
    ),
    "power of a sum of squares": lambda p, x: (
        ((h := x @ p["one"]) / jnp.linalg.norm(h, axis=1, keepdims=True)) @ p["two"]
    ),
    "a norm of units that lie twice": lambda p, x: (
        in_two_passes(jnp.concatenate([h := x @ p["one"], jnp.tanh(h)], axis=1))
        @ jnp.concatenate([p["two"], p["two"]])
    ),
    "a norm of products and of one factor": lambda p, x: (
        in_two_passes(
            jnp.concatenate([outer(h := x @ p["one"], x @ p["three"]), h], axis=1)
        )
        @ jnp.concatenate([p["sixteen"], p["two"]])
    ),
    "a transform along another axis": lambda p, x: (
        jnp.abs(jnp.fft.fft(x @ p["one"], axis=0)) @ p["two"]
    ),
}


@pytest.mark.sweep
@pytest.mark.parametrize("what", ALIKE)
def test_units_that_are_alike_when_closed_can_be_removed(what):
    def apply(p, x):
        return ALIKE[what](p, x), x @ p["one"] @ p["two"]

    structure = trace(apply, ARRAYS, X)
    (name,) = [
        group.name
        for group in structure.groups.values()
        for slot in group.slots
        if (slot.path, slot.axis) == ("one", 1)
    ]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {n: jnp.asarray(rng.normal(size=a.shape)) for n, a in ARRAYS.items()}
        x = jnp.asarray(rng.normal(size=X.shape))
        for flags in ([1, 0, 1, 1], [0, 0, 1, 0]):
            keep = {name: np.array(flags, bool)}
            assert_law_2(apply, params, (x,), structure, keep, 1e-9)
            assert_same_gradients(apply, params, (x,), structure, keep, 1e-9)


def branch(p, h):
    return jax.lax.cond(p["bias"].sum() > 0, jnp.tanh, jnp.sin, h)


# What of `h`, of shape (examples, units) and zero at closed units, has no value there.
POLES = {
    "division": lambda h, p: h / h,
    "division by a deviation": lambda h, p: h / h.std(0),
    "division by a norm": lambda h, p: h / jnp.linalg.norm(h, axis=0),
    "division by a norm of order three": lambda h, p: (
        h / jnp.linalg.norm(h, ord=3, axis=0)
    ),
    "division by what is zero but no product of it": lambda h, p: h / (1 - jnp.cos(h)),
    "division by a product": lambda h, p: p["bias"] / (h * p["bias"]),
    "division by a cumulative product": lambda h, p: h / jnp.cumprod(h, axis=0),
    "division by a median": lambda h, p: h / jnp.sort(h, axis=0)[2],
    "division by the largest": lambda h, p: h / jax.lax.top_k(h.T, 1)[0].T,
    "division by what is moved": lambda h, p: h / jnp.roll(jnp.square(h), 1, axis=0),
    "division by a window": lambda h, p: (
        h / jnp.pad(jnp.square(h), ((1, 0), (0, 0)))[1:]
    ),
    "division by a sum with zeros": lambda h, p: h / (h + jnp.zeros((5, 4))),
    "division by what a loop gives": lambda h, p: (
        h / jax.lax.fori_loop(0, 3, lambda _, g: g + jnp.square(h), jnp.zeros_like(h))
    ),
    "division by what comes round in a loop": lambda h, p: (
        h
        / jax.lax.scan(
            lambda g, _: ((g[1], g[2], g[0]), None),
            (jnp.ones_like(h), jnp.ones_like(h), h),
            None,
            length=5,
        )[0][0]
    ),
    "division by rows of a loop": lambda h, p: (
        h / jax.lax.scan(lambda c, row: (c, jnp.square(row)), 0.0, h)[1]
    ),
    "division by a loop without turns": lambda h, p: (
        h / jax.lax.scan(lambda g, _: (jnp.ones_like(g), None), h, None, length=0)[0]
    ),
    "division within a loop": lambda h, p: jax.lax.scan(
        lambda c, row: (c, row / jnp.square(row)), 0.0, h
    )[1],
    "division while": lambda h, p: (
        h
        / jax.lax.while_loop(
            lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1] + jnp.square(h)), (0, h)
        )[1]
    ),
    "division by what a branch gives": lambda h, p: h / branch(p, h),
    "division by one where": lambda h, p: h / jnp.where(h > 9, 1.0, h),
    "division by a negative number more": lambda h, p: h / (jnp.square(h) - 1.0),
    "division by a square of parts": lambda h, p: (
        h / jnp.square(jnp.concatenate([h[:2], h[2:]]))
    ),
    "division by a rounded number": lambda h, p: h / jnp.exp(h).astype(int),
    "division by a convolution": lambda h, p: (
        h
        / jax.lax.conv_general_dilated(
            h[None],
            jnp.ones((1, 1, 4)),
            (1,),
            "SAME",
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=4,
        )[0]
    ),
    "division by an absolute complex number": lambda h, p: (
        h / jnp.abs(jax.lax.complex(h, h))
    ),
    "division by what a positive number leaves": lambda h, p: h / (h + 1.0),
    "division by an exponential and a negative number": lambda h, p: (
        h / (jnp.exp(h) + (-1.0))
    ),
    "division by a square and nothing": lambda h, p: (
        h / (jnp.square(h) + np.zeros((5, 4), np.float32))
    ),
    "division by a square beside positive numbers": lambda h, p: (
        h / jnp.concatenate([jnp.square(h[:2]), np.ones((3, 4), np.float32)])
    ),
    "division by a sum of nothing": lambda h, p: (
        h / (jnp.exp(h)[:0].sum(0) + jnp.abs(h))
    ),
    "division by what is read out of bounds": lambda h, p: (
        h
        / (
            jnp.exp(h).at[jnp.arange(3, 8)].get(mode="fill", fill_value=0.0)
            + jnp.abs(h)
        )
    ),
    "division by what is clipped to zero": lambda h, p: (
        h / (jax.lax.clamp(0.1, h, 0.0) + jnp.abs(h))
    ),
    "division by windows in the padding": lambda h, p: (
        h
        / (
            jnp.abs(h)
            + jax.lax.conv_general_dilated(
                jnp.exp(h)[None],
                np.ones((1, 1, 4), np.float32),
                (1,),
                [(3, 0)],
                dimension_numbers=("NHC", "HIO", "NHC"),
                feature_group_count=4,
            )[0, :5]
        )
    ),
    "division by complex exponentials": lambda h, p: jnp.abs(
        h
        / (jnp.exp(c := jax.lax.complex(h, jnp.full_like(h, np.pi / 2))) + jnp.exp(-c))
    ),
    "negative power of a square": lambda h, p: h * jnp.square(h) ** -0.3,
    "remainder": lambda h, p: h * jax.lax.rem(jnp.ones((5, 4)), jnp.abs(h)),
    "root": lambda h, p: h * jax.lax.rsqrt(jnp.square(h).sum(0)),
    "root of a negative number": lambda h, p: h * jnp.sqrt(jnp.square(h) - 0.5),
    "negative power": lambda h, p: h * jnp.square(h) ** -1,
    "negative power that is no integer": lambda h, p: h * (1 - jnp.cos(h)) ** -0.3,
    "power that is not known": lambda h, p: h * jnp.abs(h) ** p["bias"],
    "power of a negative number": lambda h, p: h * jnp.power(h - 0.5, 0.3),
    "logarithm": lambda h, p: h * jnp.log(jnp.abs(h)),
    "logarithm near one": lambda h, p: h * jnp.log1p(jnp.square(h) - 1),
    "gamma function": lambda h, p: h * jax.scipy.special.gammaln(h),
    "digamma function": lambda h, p: h * jax.scipy.special.digamma(h),
    "incomplete gamma function": lambda h, p: (
        h * jax.scipy.special.gammainc(jnp.abs(h), 1.0)
    ),
    "inverse hyperbolic tangent": lambda h, p: h * jnp.arctanh(jnp.cos(h)),
    "inverse hyperbolic cosine": lambda h, p: h * jax.lax.acosh(jnp.cosh(h)),
    "inverse error function": lambda h, p: h * jax.lax.erf_inv(jnp.cos(h)),
    "product with infinity": lambda h, p: jnp.minimum(jnp.abs(h) * jnp.inf, 1.0),
    "product with infinities": lambda h, p: jnp.minimum(
        jnp.abs(h) * np.array([1.0, np.inf, 2.0, 3.0]), 1.0
    ),
    "product with a block of infinities": lambda h, p: jnp.minimum(
        jnp.abs(h) * jnp.where(jnp.ones((5, 4)) > 0, jnp.full((5, 4), jnp.inf), 1.0),
        1.0,
    ),
}


@pytest.mark.parametrize("pole", POLES)
def test_what_may_have_no_value_with_closed_gates_is_frozen(pole):
    structure = trace(
        lambda p, x: POLES[pole](x @ p["one"], p).sum(1), ARRAYS, jnp.ones((5, 3))
    )
    (frozen,) = (
        each for each in structure.frozen.values() if Slot("one", 1) in each.slots
    )
    assert frozen.why.endswith("with closed gates it may have no value")
    assert "test_structure.py" in frozen.why


# The same, but provably positive, or of no unit alone.
NO_POLES = {
    "plain sum": lambda h, p: jnp.tanh(h),
    "one and a number": lambda h, p: h / (1 + jnp.abs(h)),
    "one and a root": lambda h, p: h / (jnp.sqrt(jnp.square(h).sum(0)) + 1e-3),
    "the larger of a norm and a number": lambda h, p: (
        h / jnp.maximum(jnp.linalg.norm(h, axis=0), 1e-3)
    ),
    "root of a variance and a number": lambda h, p: (
        h * jax.lax.rsqrt(jnp.square(h - h.mean(0)).mean(0) + 1e-3)
    ),
    "squared norm of all units": lambda h, p: (
        h / jnp.sqrt(1 + jnp.square(h).sum(1, keepdims=True))
    ),
    "softmax of each unit": lambda h, p: h * jax.nn.softmax(h, axis=0),
    "logarithm of a sum": lambda h, p: h * jnp.log(1 + jnp.square(h) + h**4),
    "power": lambda h, p: h * jnp.power(jnp.abs(h), 0.3),
    "clipped": lambda h, p: h / jnp.clip(h, 0.1, 3.0),
    "positive constants": lambda h, p: h / np.array([1.0, 2.0, 3.0, 4.0]),
    "exponentials in a loop": lambda h, p: jax.lax.scan(
        lambda c, row: (c, row / jnp.exp(row)), 0.0, h
    )[1],
    "division by other units": lambda h, p: ((g := h @ p["square"] + h) / g) @ p["two"],
    "division by a norm over other units": lambda h, p: (
        (h @ (p["square"] / jnp.linalg.norm(p["square"], axis=0)) + h) @ p["two"]
    ),
    "minus infinity where it is masked": lambda h, p: (
        h * jax.nn.relu(jnp.where(h > 9, -jnp.inf, h)).clip(0, 1)
    ),
}


@pytest.mark.parametrize("name", NO_POLES)
def test_what_is_provably_positive_may_be_divided_by(name):
    def apply(p, x):
        return NO_POLES[name](x @ p["one"], p).sum(1)

    random = np.random.default_rng(0)
    params = {
        path: jnp.asarray(random.normal(size=a.shape)) for path, a in ARRAYS.items()
    }
    x = jnp.asarray(random.normal(size=(5, 3)))
    structure = trace(apply, params, x)
    (group,) = (g for g in structure.groups.values() if Slot("one", 1) in g.slots)
    keep = {group.name: np.array([True, False, True, False])}
    assert_law_2(apply, params, (x,), structure, keep)


# --------------------------------------------------------------------------- edits


def two_layers():
    params = {name: jnp.ones(shape) for name, shape in (("a", (3, 4)), ("b", (4, 4)))}
    params["c"] = jnp.ones((4, 2))

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    return apply, params, trace(apply, params, X)


def test_groups_can_be_renamed_chosen_merged_and_split():
    apply, params, structure = two_layers()
    assert list(structure.groups) == ["input", "a", "b"]
    edited = structure.rename({"a": "first"}).merge("both", ["first", "b"])
    assert list(edited.groups) == ["input", "both"]
    keep = {"both": np.array([True, False, True, True])}
    assert_law_2(apply, params, (X,), edited, keep)
    assert costs.exact(edited, keep) == 3 * 3 + 3 * 3 + 3 * 2
    half = {"both": jnp.full(4, 0.5)}
    assert float(costs.macs(edited, half)) == 3 * 2 + (2**2 + 4 * 0.25) + 2 * 2

    parts = structure.split("a", {"even": [0, 2], "odd": [3, 1]}).only("even", "odd")
    assert list(parts.groups) == ["even", "odd"]
    keep = {"odd": np.array([False, True]), "even": np.array([True, True])}
    _, small_params = narrow(parts, params, keep)
    np.testing.assert_array_equal(small_params["a"], np.delete(params["a"], 3, axis=1))
    assert_law_2(apply, params, (X,), parts, keep)
    assert costs.exact(parts, keep) == 3 * 3 + 3 * 4 + 4 * 2


def test_groups_that_are_added_are_counted_and_sliced():
    _, params, structure = two_layers()
    more = structure.add(Group("rows", 4, (Slot("b", 0),)))
    keep = {"a": np.array([1, 1, 0, 1], bool), "rows": np.array([1, 0, 1, 1], bool)}
    assert costs.exact(more, keep) == 3 * 3 + 2 * 4 + 4 * 2
    small = units.shrink(params, keep, more.groups)
    assert small["b"].shape == (2, 4)
    longer = structure.extend("a", made_by=(Slot("c", 1, (-1, 3)),))
    assert longer.groups["a"].made_by[-1] == Slot("c", 1, (-1, 3))


def test_arrays_that_are_to_stay_keep_all_units():
    apply, params, _ = two_layers()
    structure = trace(apply, params, X, frozen=["b"])
    assert list(structure.groups) == ["input"]
    assert structure.frozen["a"].why == "the user froze it"


def test_a_batch_that_is_cut_may_have_other_sizes():
    def apply(params, x):
        first = (x @ x.T)[:, :1]
        return (first * jnp.square(params["b"])).sum(1)

    params, x = {"b": jnp.arange(1.0, 5.0).reshape(1, 4)}, jnp.ones((5, 3))
    structure = trace(apply, params, x)
    assert [*structure.groups] == ["b"]
    keep = {"b": np.array([True, False, True, True])}
    for size in (5, 3, 1):
        assert_law_2(apply, params, (x[:size],), structure, keep)


def test_empty_slices_have_no_units():
    def apply(params, x):
        h = x @ params["one"]
        return jnp.concatenate([h[:, :0], h], axis=1) @ params["two"]

    units.check(ARRAYS, trace(apply, ARRAYS, X).groups)


def test_a_loop_without_turns_costs_nothing_and_what_follows_does():
    params, x = {"one": jnp.ones((4, 4)), "two": jnp.ones((4, 2))}, jnp.ones((5, 4))

    def apply(params, x):
        def turn(h, _):
            return h @ params["one"], None

        return jax.lax.scan(turn, x, None, length=0)[0] @ params["two"]

    assert costs.exact(trace(apply, params, x)) == 4 * 2


@pytest.mark.parametrize("turns", [3, "traced"])
def test_what_changes_places_in_a_loop_is_one_group(turns):
    """Unit j of the one is unit j of the other a turn later; of `fori_loop`, a `scan`
    if the number of turns is known, else a `while_loop`."""
    names = {"one": (4, 6), "two": (4, 6), "three": (6, 2), "four": (6, 2)}
    rng = np.random.default_rng(0)
    params = {n: jnp.float32(rng.normal(size=shape)) for n, shape in names.items()}

    def swap(_, pair):
        return pair[1], jnp.tanh(pair[0])

    def net(params, x):
        many = turns if turns == 3 else (x.sum() * 0).astype(int) + 3
        pair = jax.lax.fori_loop(0, many, swap, (x @ params["one"], x @ params["two"]))
        return pair[0] @ params["three"] + pair[1] @ params["four"]

    x = jnp.ones((2, 4))
    groups = trace(net, params, x).groups
    hidden = [g for g in groups.values() if g.size == 6]
    assert len(hidden) == 1
    paths = {slot.path for slot in (*hidden[0].made_by, *hidden[0].used_by)}
    assert paths == set(names)


def test_every_turn_of_a_loop_is_counted():
    params = {"layers": jnp.ones((6, 4, 4)), "head": jnp.ones((4, 2))}
    x = jnp.ones((5, 4))

    def loop(params, x):
        def turn(h, kernel):
            return jnp.tanh(h @ kernel), None

        return jax.lax.scan(turn, x, params["layers"])[0] @ params["head"]

    def unrolled(params, x):
        for kernel in params["layers"]:
            x = jnp.tanh(x @ kernel)
        return x @ params["head"]

    assert costs.exact(trace(loop, params, x)) == 6 * 4 * 4 + 4 * 2
    assert costs.exact(trace(unrolled, params, x)) == 6 * 4 * 4 + 4 * 2


def counting(begin=0, limit=50, step=1, test=jax.lax.lt):
    """A network with a layer that is used again and again, as long as a number is less
    than another."""

    def apply(params, x):
        def turn(carry):
            return carry[0] + step, jnp.tanh(carry[1] @ params["one"])

        begun = (jnp.asarray(begin), x)
        h = jax.lax.while_loop(lambda carry: test(carry[0], limit), turn, begun)[1]
        return h @ params["two"]

    return apply


TURNED = {"one": jnp.ones((4, 4)), "two": jnp.ones((4, 2))}
ROWS = jnp.ones((2, 4))


@pytest.mark.parametrize(
    ("counted", "turns"),
    [
        ({}, 50),
        ({"begin": 3, "step": 4}, 12),
        ({"limit": 9, "step": 4}, 3),
        ({"limit": 0}, 0),
        ({"limit": -5}, 0),
    ],
)
def test_turns_of_a_loop_that_only_counts_are_known(counted, turns):
    structure = trace(counting(**counted), TURNED, ROWS)
    assert costs.exact(structure) == turns * 4 * 4 + 4 * 2
    assert not structure.notes


def until_small(params, x):
    def test(h):
        return jnp.abs(h @ params["one"]).max() > 0.1

    return jax.lax.while_loop(test, lambda h: h / 2, x) @ params["two"]


def as_often_as_told(params, x, turns):
    h = jax.lax.fori_loop(0, turns, lambda _, h: jnp.tanh(h @ params["one"]), x)
    return h @ params["two"]


def in_a_loop(params, x, turns):
    def turn(h, _):
        return as_often_as_told({**params, "two": jnp.eye(4)}, h, turns), None

    return jax.lax.scan(turn, x, None, length=3)[0] @ params["two"]


UNKNOWN_TURNS = {
    "as often as told": (as_often_as_told, [3], 16 + 8),
    "until small": (until_small, [], 2 * 16 + 2 * 8),  # of both examples together
    "from a number that is told": (
        lambda p, x, turns: counting(begin=turns)(p, x),
        [3],
        16 + 8,
    ),
    "by steps that are not whole": (counting(0.0, 2.5, 0.5), [], 16 + 8),
    "as long as it is no more": (counting(test=jax.lax.le), [], 16 + 8),
    "down": (counting(9, 0, -1, jax.lax.gt), [], 16 + 8),
    "in a loop": (in_a_loop, [3], 3 * (16 + 16) + 8),
}


@pytest.mark.parametrize("name", UNKNOWN_TURNS)
def test_a_loop_of_unknown_turns_is_counted_once_and_says_so(name):
    apply, more, macs = UNKNOWN_TURNS[name]
    structure = trace(apply, TURNED, ROWS, *map(jnp.asarray, more))
    assert costs.exact(structure) == macs
    (note,) = structure.notes
    assert note.startswith("while at ")
    assert "test_structure.py" in note
    assert "runs as long as its values say: it is counted once" in note
    assert str(structure).endswith(note)
    assert costs.counted_once(structure, costs.macs)
    assert costs.counted_once(structure, costs.reference_flops)
    assert not costs.counted_once(structure, costs.params)
    assert not costs.counted_once(structure, costs.weights)


def test_loops_that_multiply_nothing_are_not_told_of():
    def apply(params, x):
        big = jax.lax.while_loop(lambda n: n * n < x.sum(), lambda n: n + 1, 1.0)
        return x @ params["one"] * big

    assert not trace(apply, TURNED, ROWS).notes


def test_prints_a_table():
    _, _, structure = two_layers()
    lines = str(structure).splitlines()
    assert lines[0] == "3 groups of units, 36 multiply-accumulates, 36 numbers"
    assert lines[2].split() == (
        "group units kind made by used by MACs per unit in all".split()  # noqa: SIM905
    )
    rows = [line.split() for line in lines[3:6]]
    assert [row[:2] for row in rows] == [["input", "3"], ["a", "4"], ["b", "4"]]
    assert [row[-3:] for row in rows] == [
        ["4", "33.3", "%"],
        ["7", "77.8", "%"],
        ["6", "66.7", "%"],
    ]
    assert "  c (2: c:1)" in lines
    assert "    it is an output" in lines
    unknown = trace(FROZEN_BY["a primitive without a rule"], ARRAYS, X)
    assert "no rule for qr, first at" in str(unknown)
    assert "test_structure.py" in str(unknown)


def test_a_copy_of_a_structure_is_the_structure():
    """Edits give new ones."""
    _, params, structure = two_layers()
    both = copy.deepcopy({"structure": structure, "params": params})
    assert both["structure"] is copy.copy(structure) is structure
    assert copy.deepcopy(structure.groups) == structure.groups


# ----------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", NETWORKS)
def test_a_structure_is_pickled_without_its_program(name):
    """Groups, costs and edits are what they were; narrowing says what is missing."""
    net = NETWORKS[name]()
    structure = trace(net.apply, net.params, *net.inputs)
    there = pickle.loads(pickle.dumps(structure))
    assert str(there) == str(structure)
    assert (there.groups, there.inputs) == (structure.groups, structure.inputs)
    keep = {n: np.arange(g.size) != 1 for n, g in structure.groups.items()}
    assert costs.exact(there, keep) == costs.exact(structure, keep)
    assert str(there.shrink(keep)) == str(structure.shrink(keep))
    with pytest.raises(ValueError, match=r"pickled.*call l0jax\.trace again"):
        narrow(there, net.params, keep)


def test_a_model_that_looks_at_values_is_refused_with_the_line():
    def apply(params, x):
        if x.sum() > 0:  # the culprit
            return x @ params["one"]
        return x @ params["one"] + 1

    with pytest.raises(TraceError, match=r"test_structure\.py:") as error:
        trace(apply, ARRAYS, X)
    assert "if x.sum() > 0:" in str(error.value)
    assert "jax.lax.cond" in str(error.value)


def test_arrays_that_are_to_stay_must_be_there():
    apply, params, _ = two_layers()
    with pytest.raises(ValueError, match="no array at 'd'; there is a, b, c"):
        trace(apply, params, X, frozen=["d"])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"a": np.ones(3, bool)}, r"group 'a' has 4 units, got values of shape \(3,\)"),
        ({"c": np.ones(2, bool)}, "group 'c' is frozen: it is an output"),
        ({"d": np.ones(2, bool)}, "unknown group 'd'; there is input, a, b"),
    ],
)
def test_a_keep_that_does_not_fit_is_refused(keep, message):
    _, params, structure = two_layers()
    with pytest.raises(ValueError, match=message):
        narrow(structure, params, keep)
    with pytest.raises(ValueError, match=message):
        structure.shrink(keep)


def test_gates_of_a_frozen_group_are_refused_with_the_reason():
    _, params, structure = two_layers()
    with pytest.raises(ValueError, match="group 'c' is frozen: it is an output"):
        units.apply_gates(params, {"c": jnp.ones(2)}, structure.groups)
    with pytest.raises(ValueError, match="group 'c' is frozen: it is an output"):
        structure.only("c")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.rename({"a": "b"}), "two groups would be called 'b'"),
        (lambda s: s.merge("all", ["a", "input"]), "only groups of one size"),
        (lambda s: s.split("a", {"one": [0, 1]}), "'a' has 4 units; each must be in"),
        (lambda s: s.only("d"), "unknown group 'd'; there is input, a, b"),
        (lambda s: s.add(s.groups["a"]), "there is a group 'a' already"),
        (lambda s: s.add(Group("x", 2, (Slot("e", 0),))), "no array at 'e'"),
    ],
)
def test_edits_that_do_not_fit_are_refused(edit, message):
    _, _, structure = two_layers()
    with pytest.raises(ValueError, match=message):
        edit(structure)


ADDED = {
    "a group of its own": (
        lambda s: s.add(Group("rows", 4, (Slot("b", 0),))),
        "rows",
    ),
    "another place of a group": (
        lambda s: s.extend("a", used_by=[Slot("c", 0)]),
        "a",
    ),
    "a group that is merged": (
        lambda s: s.add(Group("rows", 4, (Slot("c", 0),))).merge("both", ["a", "rows"]),
        "both",
    ),
}


@pytest.mark.parametrize("added", ADDED)
def test_a_program_can_not_lose_units_that_it_does_not_know(added):
    _, params, structure = two_layers()
    edit, name = ADDED[added]
    edited = edit(structure)
    keep = {name: np.array([True, False, True, True])}
    with pytest.raises(
        ValueError, match=rf"group {name!r} was made to lie in axis 0 of '\w' by hand"
    ):
        narrow(edited, params, keep)
    narrow(edited, params, {name: np.ones(4, bool)})


def test_single_weights_that_are_added_become_zero():
    apply, params, structure = two_layers()
    more = structure.add(Group("weights", 8, (Slot("c", None),)))
    keep = {"weights": np.arange(8) != 3, "a": np.array([True, False, True, True])}
    assert_law_2(apply, params, (X,), more, keep)


def test_groups_that_are_left_out_stay_in_the_costs():
    def apply(p, x):
        h = x @ p["one"]
        return (h * p["bias"]) @ jnp.cos(h).T

    structure = trace(apply, ARRAYS, X)
    assert {"input", "bias"} <= structure.groups.keys()
    assert costs.exact(structure.only("input")) == costs.exact(structure)


def test_a_shrunk_structure_knows_which_inputs_are_left():
    _, _, structure = two_layers()
    keep = {"input": np.array([True, False, True])}
    (slot,) = structure.shrink(keep).inputs["input"]
    assert slot == Slot("0", 1, (0, -1, 1))


def test_inputs_of_another_shape_are_refused():
    _, params, structure = two_layers()
    small, small_params = narrow(structure, params, {})
    small(small_params, jnp.ones((9, 3)))
    with pytest.raises(ValueError, match=r"input '0' has shape \(5, 4\)") as error:
        small(small_params, jnp.ones((5, 4)))
    assert "for these it can't be traced: dot_general" in str(error.value)
    with pytest.raises(ValueError, match="the arguments have another structure"):
        small(small_params, X, X)
