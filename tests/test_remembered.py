"""Every layer of Flax NNX that remembers sizes is told them anew when it shrinks.

A layer made anew from the sizes that it says it has must have arrays of the shapes that
it has.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import l0jax
from l0jax import units

INSIDE = 6
KEYS = nnx.Rngs(0)


@pytest.fixture(autouse=True)
def any_rank():
    """Flax's own layers add vectors to matrices."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class Between(nnx.Module):
    """A layer between two dense ones, which make its inputs and read its outputs."""

    def __init__(self, layer, call, inputs, rngs):
        self.one = nnx.Linear(3, inputs, rngs=rngs)
        self.layer = layer
        self.call = nnx.static(call)
        shape = jax.eval_shape(call, layer, jnp.ones((4, 5, inputs))).shape
        self.two = nnx.Linear(shape[-1], 2, rngs=rngs)

    def __call__(self, x):
        return self.two(self.call(self.layer, jnp.tanh(self.one(x))))


def plain(layer, x):
    return layer(x)


def heads(layer, x):
    """Units in two axes, of sizes that the layer says."""
    return layer(x.reshape(*x.shape[:-1], *layer.in_features))


def by_batch(layer, x):
    """A kernel for each position."""
    return layer(jnp.moveaxis(x, -2, 0)).swapaxes(0, 1)


def flat(layer, x):
    y = layer(x)
    return y.reshape(*y.shape[:2], -1)


def cross(layer, x):
    return layer(x, x[..., : x.shape[-1]] * 0.5)


# Of each layer: how it is made, called, and made anew from what it remembers.
LAYERS = {
    "linear": (
        lambda: nnx.Linear(6, 8, rngs=KEYS),
        plain,
        lambda n: nnx.Linear(n.in_features, n.out_features, rngs=KEYS),
    ),
    "linear general": (
        lambda: nnx.LinearGeneral(6, (2, 4), rngs=KEYS),
        flat,
        lambda n: nnx.LinearGeneral(n.in_features, n.out_features, rngs=KEYS),
    ),
    "linear general, two axes": (
        lambda: nnx.LinearGeneral((2, 3), 8, axis=(-2, -1), rngs=KEYS),
        heads,
        lambda n: nnx.LinearGeneral(
            n.in_features, n.out_features, axis=(-2, -1), rngs=KEYS
        ),
    ),
    "linear general, batch axis": (
        lambda: nnx.LinearGeneral(6, 8, batch_axis={0: 5}, rngs=KEYS),
        by_batch,
        lambda n: nnx.LinearGeneral(
            n.in_features, n.out_features, batch_axis=n.batch_axis, rngs=KEYS
        ),
    ),
    "einsum": (
        lambda: nnx.Einsum("btc,chd->bthd", (6, 2, 4), (2, 4), rngs=KEYS),
        flat,
        lambda n: nnx.Einsum(n.einsum_str, n.kernel_shape, n.bias_shape, rngs=KEYS),
    ),
    "einsum without bias": (
        lambda: nnx.Einsum("btc,cd->btd", (6, 8), rngs=KEYS),
        plain,
        lambda n: nnx.Einsum(n.einsum_str, n.kernel_shape, n.bias_shape, rngs=KEYS),
    ),
    "conv": (
        lambda: nnx.Conv(6, 8, (3,), rngs=KEYS),
        plain,
        lambda n: nnx.Conv(n.in_features, n.out_features, n.kernel_size, rngs=KEYS),
    ),
    "grouped conv": (
        lambda: nnx.Conv(6, 12, (3,), feature_group_count=3, rngs=KEYS),
        plain,
        lambda n: nnx.Conv(
            n.in_features,
            n.out_features,
            n.kernel_size,
            feature_group_count=n.feature_group_count,
            rngs=KEYS,
        ),
    ),
    "depthwise conv": (
        lambda: nnx.Conv(6, 6, (3,), feature_group_count=6, use_bias=False, rngs=KEYS),
        plain,
        lambda n: nnx.Conv(
            n.in_features,
            n.out_features,
            n.kernel_size,
            feature_group_count=n.feature_group_count,
            use_bias=False,
            rngs=KEYS,
        ),
    ),
    "masked conv": (
        lambda: nnx.Conv(6, 8, (3,), mask=jnp.ones((3, 6, 8)), rngs=KEYS),
        plain,
        lambda n: nnx.Conv(
            n.in_features,
            n.out_features,
            n.kernel_size,
            mask=jnp.ones(n.kernel_shape),
            rngs=KEYS,
        ),
    ),
    "transposed conv": (
        lambda: nnx.ConvTranspose(6, 8, (3,), rngs=KEYS),
        plain,
        lambda n: nnx.ConvTranspose(
            n.in_features, n.out_features, n.kernel_size, rngs=KEYS
        ),
    ),
    "transposed conv, transposed kernel": (
        lambda: nnx.ConvTranspose(6, 8, (3,), transpose_kernel=True, rngs=KEYS),
        plain,
        lambda n: nnx.ConvTranspose(
            n.in_features,
            n.out_features,
            n.kernel_size,
            transpose_kernel=True,
            rngs=KEYS,
        ),
    ),
    "batch norm": (
        lambda: nnx.BatchNorm(6, rngs=KEYS),
        plain,
        lambda n: nnx.BatchNorm(n.num_features, rngs=KEYS),
    ),
    "batch norm without scale": (
        lambda: nnx.BatchNorm(6, use_scale=False, use_bias=False, rngs=KEYS),
        plain,
        lambda n: nnx.BatchNorm(
            n.num_features, use_scale=False, use_bias=False, rngs=KEYS
        ),
    ),
    "instance norm": (
        lambda: nnx.InstanceNorm(6, rngs=KEYS),
        plain,
        lambda n: nnx.InstanceNorm(n.num_features, rngs=KEYS),
    ),
    "group norm": (
        lambda: nnx.GroupNorm(6, num_groups=3, rngs=KEYS),
        plain,
        lambda n: nnx.GroupNorm(
            n.num_groups * n.group_size, num_groups=n.num_groups, rngs=KEYS
        ),
    ),
    "layer norm": (
        lambda: nnx.LayerNorm(6, rngs=KEYS),
        plain,
        lambda n: nnx.LayerNorm(n.num_features, rngs=KEYS),
    ),
    "rms norm": (
        lambda: nnx.RMSNorm(6, rngs=KEYS),
        plain,
        lambda n: nnx.RMSNorm(n.num_features, rngs=KEYS),
    ),
    "embedding": (
        lambda: nnx.Embed(7, 8, rngs=KEYS),
        lambda layer, x: layer((jnp.abs(x[..., 0]) * 3).astype(int)) + 0 * x[..., :1],
        lambda n: nnx.Embed(n.num_embeddings, n.features, rngs=KEYS),
    ),
    "lora": (
        lambda: nnx.LoRA(6, 4, 8, rngs=KEYS),
        plain,
        lambda n: nnx.LoRA(n.in_features, n.lora_a.shape[1], n.out_features, rngs=KEYS),
    ),
    "lora linear": (
        lambda: nnx.LoRALinear(6, 8, lora_rank=4, rngs=KEYS),
        plain,
        lambda n: nnx.LoRALinear(
            n.in_features,
            n.out_features,
            lora_rank=n.lora.lora_a.shape[1],
            rngs=KEYS,
        ),
    ),
    "attention": (
        lambda: nnx.MultiHeadAttention(2, 6, 8, 9, decode=False, rngs=KEYS),
        plain,
        lambda n: nnx.MultiHeadAttention(
            n.num_heads, n.in_features, n.qkv_features, n.out_features, rngs=KEYS
        ),
    ),
    "attention to others": (
        lambda: nnx.MultiHeadAttention(
            4, 6, 8, 9, num_kv_heads=2, in_kv_features=6, decode=False, rngs=KEYS
        ),
        cross,
        lambda n: nnx.MultiHeadAttention(
            n.num_heads,
            n.in_features,
            n.qkv_features,
            n.out_features,
            num_kv_heads=n.num_kv_heads,
            in_kv_features=n.in_kv_features,
            rngs=KEYS,
        ),
    ),
    "weight norm": (
        lambda: nnx.WeightNorm(nnx.Linear(6, 8, rngs=KEYS), rngs=KEYS),
        plain,
        lambda n: nnx.WeightNorm(
            nnx.Linear(
                n.layer_instance.in_features, n.layer_instance.out_features, rngs=KEYS
            ),
            rngs=KEYS,
        ),
    ),
    "bidirectional": (
        lambda: nnx.Bidirectional(
            nnx.RNN(nnx.GRUCell(6, 4, rngs=KEYS)), nnx.RNN(nnx.GRUCell(6, 4, rngs=KEYS))
        ),
        plain,
        lambda n: nnx.Bidirectional(
            *(
                nnx.RNN(
                    nnx.GRUCell(
                        each.cell.in_features, each.cell.hidden_features, rngs=KEYS
                    )
                )
                for each in (n.forward_rnn, n.backward_rnn)
            )
        ),
    ),
    **{
        kind.__name__: (
            lambda kind=kind: nnx.RNN(kind(6, 5, rngs=KEYS)),
            plain,
            lambda n, kind=kind: nnx.RNN(
                kind(n.cell.in_features, n.cell.hidden_features, rngs=KEYS)
            ),
        )
        for kind in (
            nnx.LSTMCell,
            nnx.OptimizedLSTMCell,
            nnx.GRUCell,
            nnx.SimpleCell,
        )
    },
}
# Nothing of these can go: means are taken over their units.
WHOLE = ("layer norm", "rms norm", "weight norm")
WITHOUT_SIZES = {
    "RoPE",
    "Dropout",
    "PReLU",
    "SpectralNorm",
    "Sequential",
    "Module",
    "Pytree",
    "RNNCellBase",
    "List",
    "Dict",
}
"""Layers that have no sizes of their own, and containers."""


def of(name):
    make, call, again = LAYERS[name]
    module = Between(make(), call, INSIDE, nnx.Rngs(1))
    graph, state = nnx.split(module)
    rng = np.random.default_rng(0)

    def shake(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf + np.float32(0.2 * np.abs(rng.normal(size=leaf.shape)))

    module = nnx.merge(graph, jax.tree.map(shake, state))
    module.eval()
    return module, again


def floats(module):
    return {
        path: leaf.shape
        for path, leaf in units.arrays(nnx.state(module)).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


X = np.float32(np.random.default_rng(0).normal(size=(4, 5, 3)))


@pytest.mark.sweep
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_shrinks_says_what_its_sizes_are(name):
    module, again = of(name)
    structure = l0jax.trace(module, X)
    shrunk = 0
    for group in structure.groups.values():
        if group.name in structure.inputs or group.size == 1:
            continue
        keep = {group.name: np.arange(group.size) != 1}
        z = {group.name: jnp.float32(keep[group.name])}
        gated = l0jax.nnx.fold(module, z, structure.groups)
        small = shrink_or_none(gated, keep, structure)
        if small is None:
            # Heads of other sizes are scaled by something else; means are taken over
            # the units that are left.
            assert name.startswith(("attention", "group norm", "layer norm"))
            assert group.size != getattr(module.layer, "num_heads", None)
            l0jax.nnx.Narrowed(structure, gated, keep)
            continue
        assert floats(again(small.layer)) == floats(small.layer)
        if floats(small.layer) != floats(module.layer):
            shrunk += 1
            np.testing.assert_allclose(small(X), gated(X), rtol=1e-4, atol=1e-5)
    assert shrunk or name in WHOLE
    assert floats(again(module.layer)) == floats(module.layer)


def shrink_or_none(module, keep, structure):
    try:
        return l0jax.nnx.shrink(module, keep, structure)
    except ValueError:
        return None


def test_every_layer_of_flax_is_swept():
    """One that is new in Flax has to be put among them."""
    layers = {
        name
        for name, kind in vars(nnx).items()
        if inspect.isclass(kind)
        and issubclass(kind, nnx.Module)
        and kind.__module__.startswith("flax.nnx.nn.")
    }
    made = [make() for make, _, _ in LAYERS.values()]
    swept = {type(each).__name__ for one in made for _, each in nnx.iter_modules(one)}
    assert layers - WITHOUT_SIZES <= swept
    assert {"Linear", "MultiHeadAttention", "LoRALinear", "Einsum"} <= layers
