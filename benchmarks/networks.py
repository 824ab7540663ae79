"""Networks of many kinds, to be read by `trace`: `NETWORKS[name]()` gives one.

Some are written out here, in plain JAX; others come from libraries, as they are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from l0jax import models

NETWORKS: dict[str, Callable[[], "Network"]] = {}


@dataclasses.dataclass(frozen=True)
class Network:
    """A function with its arrays.

    `removable` is how many units it has that can be removed, and `frozen` names arrays
    and axes of which no unit may be in any group.
    """

    apply: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    removable: int
    frozen: tuple[tuple[str, int], ...] = ()


def network(function):
    NETWORKS[function.__name__] = function
    return function


class Arrays(dict):
    """Random arrays, made when they are first named."""

    def __init__(self, seed=0):
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def __call__(self, name, *shape):
        fan = max(int(np.prod(shape[:-1])), 1)
        values = self.rng.normal(size=shape) / np.sqrt(fan) + 0.05
        self[name] = jnp.asarray(values, jnp.float32)
        return self[name]


def normal(*shape, seed=1):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


def shaken(tree, seed=2):
    """All arrays of numbers a little off their initial values, none of them zero."""
    rng = np.random.default_rng(seed)

    def shake(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(shake, tree)


def conv(x, kernel, stride=1, groups=1, padding="SAME"):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def batch_norm(p, name, x):
    scale, shift, mean, var = (p[f"{name}.{part}"] for part in "abmv")
    return (x - mean) * jax.lax.rsqrt(jnp.square(var) + 1e-3) * scale + shift


def batch_norm_arrays(a, name, size):
    for part in "abmv":
        a(f"{name}.{part}", size)


# ---------------------------------------------------------------------- written out


@network
def mlp():
    model = models.make("mlp", {"features": (12, 9, 7, 3)}, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    return Network(
        lambda state, x: nnx.merge(graph, state)(x),
        shaken(state),
        (normal(4, 12),),
        12 + 9 + 7,
        (("layers.2.kernel", 1),),
    )


@network
def lenet5():
    widths = {"maps": (4, 6), "hidden": 9, "shape": (16, 16, 2), "classes": 3}
    model = models.make("lenet5", widths, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    return Network(
        lambda state, x: nnx.merge(graph, state)(x),
        shaken(state),
        (normal(2, 16, 16, 2),),
        2 + 4 + 6 + 9,
        (("dense2.kernel", 1), ("conv1.kernel", 0)),
    )


@network
def vgg():
    a, widths = Arrays(), (3, 5, 6, 4)
    for i in range(3):
        a(f"conv{i}", 3, 3, widths[i], widths[i + 1])
        a(f"bias{i}", widths[i + 1])
    a("dense", 4 * widths[3], 8)
    a("head", 8, 3)

    def apply(p, x):
        for i in range(3):
            x = jax.nn.relu(conv(x, p[f"conv{i}"]) + p[f"bias{i}"])
            if i < 2:
                window = ((1, 2, 2, 1), (1, 2, 2, 1), "VALID")
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *window)
        x = jax.nn.relu(x.reshape(x.shape[0], -1) @ p["dense"])
        return x @ p["head"]

    return Network(apply, dict(a), (normal(2, 8, 8, 3),), 3 + 5 + 6 + 4 + 8)


def residual(pre, shortcut):
    a = Arrays()
    a("stem", 3, 3, 3, 4)
    a("conv1", 3, 3, 4, 6)
    a("conv2", 3, 3, 6, 8)
    a("project", 1, 1, 4, 8)
    a("conv3", 3, 3, 8, 5)
    a("conv4", 3, 3, 5, 8)
    a("head", 8, 3)
    for name, size in (("n0", 4), ("n1", 6), ("n2", 8), ("n3", 5), ("n4", 8)):
        batch_norm_arrays(a, name, size)
    if shortcut == "pad":
        del a["project"]

    def aside(p, x):
        if shortcut == "project":
            return conv(x, p["project"], 2)
        x = x[:, ::2, ::2]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 3)))

    def post_apply(p, x):
        x = jax.nn.relu(batch_norm(p, "n0", conv(x, p["stem"])))
        y = jax.nn.relu(batch_norm(p, "n1", conv(x, p["conv1"], 2)))
        x = jax.nn.relu(aside(p, x) + batch_norm(p, "n2", conv(y, p["conv2"])))
        y = jax.nn.relu(batch_norm(p, "n3", conv(x, p["conv3"])))
        x = jax.nn.relu(x + batch_norm(p, "n4", conv(y, p["conv4"])))
        return x.mean((1, 2)) @ p["head"]

    def pre_apply(p, x):
        x = conv(x, p["stem"])
        y = jax.nn.relu(batch_norm(p, "n0", x))
        y = jax.nn.relu(batch_norm(p, "n1", conv(y, p["conv1"], 2)))
        x = aside(p, x) + conv(y, p["conv2"])
        y = jax.nn.relu(batch_norm(p, "n2", x))
        y = jax.nn.relu(batch_norm(p, "n3", conv(y, p["conv3"])))
        x = x + conv(y, p["conv4"])
        return jax.nn.relu(batch_norm(p, "n4", x)).mean((1, 2)) @ p["head"]

    # With zeros beside the stem's maps, the stream is 1 + 4 + 3 maps; a single one is
    # an axis of one, which has no units.
    streams = 3 + 6 + 5 + (8 + 4 if shortcut == "project" else 8 - 1)
    apply = pre_apply if pre else post_apply
    return Network(apply, dict(a), (normal(2, 6, 6, 3),), streams)


@network
def resnet_post_activation():
    return residual(pre=False, shortcut="project")


@network
def resnet_pre_activation():
    return residual(pre=True, shortcut="project")


@network
def resnet_with_padded_shortcut():
    return residual(pre=False, shortcut="pad")


@network
def resnet_pre_activation_with_padded_shortcut():
    return residual(pre=True, shortcut="pad")


@network
def square_on_a_residual_stream():
    """A group that meets itself: the stream reads and writes itself."""
    a = Arrays()
    a("stem", 3, 6)
    a("block1", 6, 6)
    a("block2", 6, 6)
    a("head", 6, 2)

    def apply(p, x):
        x = x @ p["stem"]
        for name in ("block1", "block2"):
            x = x + jax.nn.relu(x @ p[name])
        return x @ p["head"]

    return Network(apply, dict(a), (normal(4, 3),), 3 + 6)


@network
def densenet():
    a, size = Arrays(), 4
    a("stem", 3, 3, 3, size)
    for i in range(3):
        batch_norm_arrays(a, f"n{i}", size)
        a(f"conv{i}", 3, 3, size, 3)
        size += 3
    a("head", size, 2)

    def apply(p, x):
        x = conv(x, p["stem"])
        for i in range(3):
            y = conv(jax.nn.relu(batch_norm(p, f"n{i}", x)), p[f"conv{i}"])
            x = jnp.concatenate([x, y], axis=-1)
        return x.mean((1, 2)) @ p["head"]

    return Network(apply, dict(a), (normal(2, 5, 5, 3),), 3 + 4 + 3 * 3)


@network
def inception():
    a = Arrays()
    a("stem", 3, 3, 3, 6)
    a("one", 1, 1, 6, 4)
    a("three.reduce", 1, 1, 6, 3)
    a("three", 3, 3, 3, 5)
    a("pool", 1, 1, 6, 2)
    a("after", 1, 1, 4 + 5 + 2, 7)
    a("head", 7, 2)

    def apply(p, x):
        x = jax.nn.relu(conv(x, p["stem"]))
        window = ((1, 3, 3, 1), (1, 1, 1, 1), "SAME")
        pooled = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *window)
        x = jnp.concatenate(
            [
                conv(x, p["one"]),
                conv(jax.nn.relu(conv(x, p["three.reduce"])), p["three"]),
                conv(pooled, p["pool"]),
            ],
            axis=-1,
        )
        return jax.nn.relu(conv(jax.nn.relu(x), p["after"])).mean((1, 2)) @ p["head"]

    return Network(apply, dict(a), (normal(2, 5, 5, 3),), 3 + 6 + 4 + 3 + 5 + 2 + 7)


@network
def added_concatenations():
    """Two concatenations whose parts do not line up, and their sum."""
    a = Arrays()
    for name, size in (("a", 4), ("b", 3), ("c", 2), ("d", 5)):
        a(name, 3, size)
    a("after", 7, 4)
    a("head", 4, 2)

    def apply(p, x):
        one = jnp.concatenate([x @ p["a"], jnp.tanh(x @ p["b"])], axis=1)
        two = jnp.concatenate([jnp.cos(x @ p["c"]), x @ p["d"]], axis=1)
        return jax.nn.relu((one + two) @ p["after"]) @ p["head"]

    return Network(apply, dict(a), (normal(2, 3),), 3 + (2 + 2 + 3) + 4)


@network
def gram_matrix():
    """Channels times channels of activations: a group meets itself."""
    a = Arrays()
    a("stem", 3, 6)
    a("left", 6, 4)
    a("right", 6, 4)
    a("head", 4, 2)

    def apply(p, x):
        h = jnp.cos(x @ p["stem"])
        gram = jnp.einsum("bpk,bpl->bkl", h, h)
        pooled = jnp.einsum("bkl,kc,lc->bc", gram, p["left"], p["right"])
        return jax.nn.relu(pooled) @ p["head"]

    return Network(apply, dict(a), (normal(2, 5, 3),), 3 + 6 + 4)


@network
def mobilenet():
    """Depthwise separable (version 1), then an inverted residual (version 2)."""
    a = Arrays()
    a("stem", 3, 3, 3, 5)
    a("depth1", 3, 3, 1, 5)
    a("point1", 1, 1, 5, 4)
    a("expand", 1, 1, 4, 9)
    a("depth2", 3, 3, 1, 9)
    a("project", 1, 1, 9, 4)
    a("head", 4, 2)

    def apply(p, x):
        x = jax.nn.relu6(conv(x, p["stem"]))
        x = jax.nn.relu6(conv(x, p["depth1"], groups=5))
        x = conv(jax.nn.relu6(x), p["point1"])
        y = jax.nn.relu6(conv(x, p["expand"]))
        y = jax.nn.relu6(conv(y, p["depth2"], groups=9))
        x = x + conv(y, p["project"])
        return x.mean((1, 2)) @ p["head"]

    return Network(apply, dict(a), (normal(2, 5, 5, 3),), 3 + 5 + 4 + 9)


@network
def grouped_convolution():
    a = Arrays()
    a("stem", 1, 1, 3, 6)
    a("grouped", 3, 3, 2, 9)
    a("head", 9, 2)

    def apply(p, x):
        x = jax.nn.relu(conv(x, p["stem"]))
        x = jax.nn.relu(conv(x, p["grouped"], groups=3))
        return x.mean((1, 2)) @ p["head"]

    # Whole groups, and the same channel of each group on both sides.
    return Network(apply, dict(a), (normal(2, 4, 4, 3),), 3 + 3 + 2 + 3)


@network
def channel_shuffle():
    a = Arrays()
    a("stem", 1, 1, 3, 6)
    a("grouped", 3, 3, 2, 6)
    a("after", 1, 1, 6, 4)
    a("head", 4, 2)

    def apply(p, x):
        x = jax.nn.relu(conv(conv(x, p["stem"]), p["grouped"], groups=3))
        n, h, w, c = x.shape
        x = x.reshape(n, h, w, 3, 2).transpose(0, 1, 2, 4, 3).reshape(n, h, w, c)
        return jax.nn.relu(conv(x, p["after"])).mean((1, 2)) @ p["head"]

    return Network(apply, dict(a), (normal(2, 4, 4, 3),), 3 + 3 + 2 + 2 + 4)


@network
def unet():
    a = Arrays()
    a("down1", 3, 3, 3, 4)
    a("down2", 3, 3, 4, 6)
    a("up", 2, 2, 6, 5)
    a("merge", 3, 3, 4 + 5, 7)
    a("head", 1, 1, 7, 2)

    def apply(p, x):
        skip = jax.nn.relu(conv(x, p["down1"]))
        x = jax.nn.relu(conv(skip, p["down2"], 2))
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_transpose(
            x, p["up"], (2, 2), "SAME", dimension_numbers=dimensions
        )
        x = jnp.concatenate([skip, jax.nn.relu(x)], axis=-1)
        return conv(jax.nn.relu(conv(x, p["merge"])), p["head"])

    return Network(apply, dict(a), (normal(2, 8, 8, 3),), 3 + 4 + 6 + 5 + 7)


@network
def squeeze_and_excitation():
    a = Arrays()
    a("stem", 3, 3, 3, 6)
    a("squeeze", 6, 4)
    a("excite", 4, 6)
    a("head", 6, 2)

    def apply(p, x):
        x = jax.nn.relu(conv(x, p["stem"]))
        weights = jax.nn.relu(x.mean((1, 2)) @ p["squeeze"]) @ p["excite"]
        x = x * jax.nn.sigmoid(weights)[:, None, None]
        return x.mean((1, 2)) @ p["head"]

    return Network(apply, dict(a), (normal(2, 4, 4, 3),), 3 + 6 + 4)


def normalised(groups):
    """Normalised over positions, and over the channels of each of some groups."""
    a = Arrays()
    a("stem", 3, 3, 3, 6)
    a("scale", 6)
    a("shift", 6)
    a("head", 6, 2)

    def apply(p, x):
        x = conv(x, p["stem"])
        x = x.reshape(*x.shape[:-1], groups, -1)
        mean = x.mean((1, 2, 4), keepdims=True)
        spread = jnp.square(x - mean).mean((1, 2, 4), keepdims=True)
        x = ((x - mean) * jax.lax.rsqrt(spread + 1e-3)).reshape(*x.shape[:3], -1)
        return jax.nn.relu(x * p["scale"] + p["shift"]).mean((1, 2)) @ p["head"]

    return a, apply


@network
def group_norm():
    a, apply = normalised(3)
    return Network(apply, dict(a), (normal(2, 4, 4, 3),), 3 + 3 + 2)


@network
def instance_norm():
    a, apply = normalised(6)
    return Network(apply, dict(a), (normal(2, 4, 4, 3),), 3 + 6)


@network
def layer_norm():
    a, apply = normalised(1)
    return Network(apply, dict(a), (normal(2, 4, 4, 3),), 3 + 6)


def attention(p, x, heads, grouped):
    """`grouped` query heads share each key and value head."""
    q = jnp.einsum("nsc,chd->nshd", x, p["q"]) + p["bq"]
    k = jnp.einsum("nsc,chd->nshd", x, p["k"])
    v = jnp.einsum("nsc,chd->nshd", x, p["v"])
    k, v = (jnp.repeat(each, grouped, axis=2) for each in (k, v))
    weights = jax.nn.softmax(jnp.einsum("nshd,nthd->nhst", q, k) / 2.0, axis=-1)
    mixed = jnp.einsum("nhst,nthd->nshd", weights, v)
    return jnp.einsum("nshd,hdc->nsc", mixed, p["o"])


def encoder(heads, grouped):
    a, size, dim = Arrays(), 6, 4
    a("embedding", 11, size)
    a("position", 5, size)
    a("q", size, heads, dim)
    a("bq", heads, dim)
    a("k", size, heads // grouped, dim)
    a("v", size, heads // grouped, dim)
    a("o", heads, dim, size)
    a("up", size, 8)
    a("down", 8, size)
    a("head", size, 3)

    def standardised(x):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3)

    def apply(p, tokens):
        x = p["embedding"][tokens] + p["position"]
        x = x + attention(p, standardised(x), heads, grouped)
        x = x + jax.nn.gelu(standardised(x) @ p["up"]) @ p["down"]
        return standardised(x).mean(1) @ p["head"]

    # The stream, heads (or key heads and query heads of each), two kinds of head
    # dimensions, and the feed-forward units.
    heads = heads if grouped == 1 else heads // grouped + grouped
    return Network(
        apply,
        dict(a),
        (jnp.arange(10).reshape(2, 5) % 11,),
        size + heads + dim + dim + 8,
        (("embedding", 0), ("position", 0), ("head", 1)),
    )


@network
def transformer():
    return encoder(heads=3, grouped=1)


@network
def transformer_with_grouped_queries():
    return encoder(heads=6, grouped=2)


@network
def merged_heads():
    """Attention whose heads are split off by a reshape to given sizes."""
    a, size, heads, dim = Arrays(), 6, 3, 4
    for name in ("q", "k", "v"):
        a(name, size, heads * dim)
    a("o", heads * dim, size)
    a("head", size, 2)

    def apply(p, x):
        q, k, v = ((x @ p[name]).reshape(*x.shape[:2], heads, dim) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("nshd,nthd->nhst", q, k), axis=-1)
        mixed = jnp.einsum("nhst,nthd->nshd", weights, v)
        return (x + mixed.reshape(*x.shape[:2], -1) @ p["o"]).mean(1) @ p["head"]

    return Network(apply, dict(a), (normal(2, 5, size),), size + heads + dim + dim)


@network
def recurrent():
    a, size = Arrays(), 5
    for gate in "ifgo":
        a(f"x{gate}", 3, size)
        a(f"h{gate}", size, size)
        a(f"b{gate}", size)
    a("head", size, 2)

    def apply(p, x):
        def turn(carry, x):
            c, h = carry
            i, f, g, o = (x @ p[f"x{n}"] + h @ p[f"h{n}"] + p[f"b{n}"] for n in "ifgo")
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

        start = jnp.zeros((x.shape[0], p["bi"].shape[0]))
        (_, h), _ = jax.lax.scan(turn, (start, start), x.swapaxes(0, 1))
        return h @ p["head"]

    return Network(apply, dict(a), (normal(2, 4, 3),), 3 + size)


@network
def scan_over_layers():
    a = Arrays()
    a("stem", 3, 5)
    a("up", 4, 5, 6)
    a("down", 4, 6, 5)
    a("head", 5, 2)

    def apply(p, x):
        def layer(x, rows):
            up, down = rows
            return x + jax.nn.relu(x @ up) @ down, None

        x, _ = jax.lax.scan(layer, x @ p["stem"], (p["up"], p["down"]))
        return x @ p["head"]

    return Network(apply, dict(a), (normal(4, 3),), 3 + 5 + 6, (("up", 0), ("head", 1)))


def of_experts():
    """Arrays of a layer of experts, and its sizes."""
    a, size, experts, hidden = Arrays(), 6, 4, 5
    a("stem", 3, size)
    a("router", size, experts)
    a("up", experts, size, hidden)
    a("down", experts, hidden, size)
    a("head", size, 2)
    return a, size, experts, hidden


@network
def mixture_of_experts():
    """All experts, weighed by the scores that a router gives them."""
    a, size, experts, hidden = of_experts()

    def apply(p, x):
        x = x @ p["stem"]
        scores = jax.nn.softmax(x @ p["router"])
        hidden = jax.nn.silu(jnp.einsum("tc,ecf->tef", x, p["up"]))
        made = jnp.einsum("tef,efc->tec", hidden, p["down"])
        return (x + jnp.einsum("te,tec->tc", scores, made)) @ p["head"]

    return Network(apply, dict(a), (normal(7, 3),), 3 + size + experts + hidden)


@network
def routed_experts():
    """The two best experts of each token: which ones is an order of scores."""
    a, size, _, hidden = of_experts()

    def apply(p, x):
        x = x @ p["stem"]
        scores, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
        up, down = p["up"][chosen], p["down"][chosen]
        hidden = jax.nn.silu(jnp.einsum("tc,tkcf->tkf", x, up))
        made = jnp.einsum("tkf,tkfc->tkc", hidden, down)
        return (x + jnp.einsum("tk,tkc->tc", scores, made)) @ p["head"]

    frozen = (("router", 1), ("up", 0), ("down", 0))
    return Network(apply, dict(a), (normal(7, 3),), 3 + size + hidden, frozen)


@network
def graph_network():
    """Two rounds of messages along the edges of a graph, summed at their ends."""
    a, size = Arrays(), 5
    a("stem", 3, size)
    for layer in range(2):
        a(f"message{layer}", 2 * size, 6)
        a(f"shift{layer}", 6)
        a(f"update{layer}", size + 6, size)
    a("head", size, 2)
    senders, receivers = jnp.asarray([[0, 1, 2, 3, 3, 0], [1, 2, 3, 0, 1, 2]])

    def apply(p, nodes, senders, receivers):
        x = nodes @ p["stem"]
        for layer in range(2):
            both = jnp.concatenate([x[senders], x[receivers]], axis=-1)
            made = jax.nn.relu(both @ p[f"message{layer}"] + p[f"shift{layer}"])
            seen = jax.ops.segment_sum(made, receivers, num_segments=len(nodes))
            x = x + jnp.concatenate([x, seen], axis=-1) @ p[f"update{layer}"]
        return x @ p["head"]

    inputs = (normal(4, 3), senders, receivers)
    return Network(apply, dict(a), inputs, 3 + size + 6 + 6)


@network
def state_space():
    """Diagonal recurrences whose inputs and outputs depend on what is read, as in
    Mamba, by an associative scan."""
    a, size, channels, states = Arrays(), 5, 6, 4
    a("stem", 3, size)
    a("into", size, 2 * channels)
    a("decay", channels, states)
    a("step", channels, channels)
    a("write", channels, states)
    a("read", channels, states)
    a("skip", channels)
    a("out", channels, size)
    a("head", size, 2)

    def apply(p, x):
        x = x @ p["stem"]
        u, gate = jnp.split(x @ p["into"], 2, axis=-1)
        step = jax.nn.softplus(u @ p["step"])
        decay = jnp.exp(-step[..., None] * jnp.exp(p["decay"]))
        written = step[..., None] * u[..., None] * (u @ p["write"])[:, :, None]

        def after(one, other):
            return one[0] * other[0], one[1] * other[0] + other[1]

        _, state = jax.lax.associative_scan(after, (decay, written), axis=1)
        y = jnp.einsum("btcs,bts->btc", state, u @ p["read"]) + u * p["skip"]
        return (x + (y * jax.nn.silu(gate)) @ p["out"])[:, -1] @ p["head"]

    return Network(apply, dict(a), (normal(2, 5, 3),), 3 + size + channels + states)


@network
def encoder_decoder():
    """Attention over what an encoder has read, by a stream of its own."""
    a, size, wide, heads, dim = Arrays(), 6, 7, 3, 4
    a("read", 9, wide)
    a("encode", wide, 8)
    a("encoded", 8, wide)
    a("embedding", 11, size)
    a("q", size, heads, dim)
    a("k", wide, heads, dim)
    a("v", wide, heads, dim)
    a("o", heads, dim, size)
    a("up", size, 5)
    a("down", 5, size)

    def normed(x):
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3)

    def apply(p, source, target):
        memory = p["read"][source]
        memory = memory + jax.nn.relu(normed(memory) @ p["encode"]) @ p["encoded"]
        memory, x = normed(memory), p["embedding"][target]
        q = jnp.einsum("ntc,chd->nthd", normed(x), p["q"])
        k = jnp.einsum("nsc,chd->nshd", memory, p["k"])
        v = jnp.einsum("nsc,chd->nshd", memory, p["v"])
        weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", q, k) / 2.0, axis=-1)
        mixed = jnp.einsum("nhts,nshd->nthd", weights, v)
        x = x + jnp.einsum("nthd,hdc->ntc", mixed, p["o"])
        x = x + jax.nn.relu(normed(x) @ p["up"]) @ p["down"]
        return normed(x) @ p["embedding"].T

    inputs = (jnp.arange(8).reshape(2, 4) % 9, jnp.arange(6).reshape(2, 3) % 11)
    return Network(
        apply,
        dict(a),
        inputs,
        wide + 8 + size + heads + dim + dim + 5,
        (("read", 0), ("embedding", 0)),
    )


@network
def unet_with_time_embedding():
    """A denoiser: the time as sines, which shift and scale the maps at every level."""
    a = Arrays()
    a("time", 8, 6)
    a("shift1", 6, 4)
    a("shift2", 6, 5)
    a("down1", 3, 3, 3, 4)
    a("down2", 3, 3, 4, 5)
    a("up", 3, 3, 5, 4)
    a("merge", 3, 3, 4 + 4, 4)
    a("head", 1, 1, 4, 3)

    def apply(p, x, time):
        angles = time[:, None] * jnp.exp(-jnp.arange(4.0))
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        embedded = jax.nn.silu(waves @ p["time"])
        first = conv(x, p["down1"])
        first = jax.nn.silu(first + (embedded @ p["shift1"])[:, None, None])
        x = conv(first, p["down2"], 2)
        x = jax.nn.silu(x * (1 + (embedded @ p["shift2"])[:, None, None]))
        n, height, width, _ = x.shape
        shape = (n, 2 * height, 2 * width, x.shape[-1])
        x = conv(jax.image.resize(x, shape, "nearest"), p["up"])
        x = jnp.concatenate([first, jax.nn.silu(x)], axis=-1)
        return conv(jax.nn.silu(conv(x, p["merge"])), p["head"])

    inputs = (normal(2, 8, 8, 3), jnp.asarray([0.5, 3.0]))
    # The frequencies, of which each is a sine and a cosine, too.
    return Network(apply, dict(a), inputs, 3 + 4 + 6 + 4 + 5 + 4 + 4)


@network
def several_inputs_and_outputs():
    a = Arrays()
    a("left", 4, 6)
    a("right", 3, 6)
    a("middle", 6, 5)
    a("one", 5, 2)
    a("other", 6, 1)

    def apply(p, left, right):
        h = jnp.tanh(left["x"] @ p["left"] + right @ p["right"])
        return {"one": jnp.tanh(h @ p["middle"]) @ p["one"], "other": h @ p["other"]}

    inputs = ({"x": normal(4, 4)}, normal(4, 3))
    return Network(apply, dict(a), inputs, 4 + 3 + 6 + 5)


@network
def tied_autoencoder():
    a = Arrays()
    a("kernel", 6, 4)
    a("bias", 4)
    a("mean", 6)

    def apply(p, x):
        return jax.nn.relu((x - p["mean"]) @ p["kernel"] + p["bias"]) @ p["kernel"].T

    return Network(apply, dict(a), (normal(5, 6),), 4, (("kernel", 0),))


@network
def tied_embedding():
    a = Arrays()
    a("embedding", 9, 5)
    a("up", 5, 7)
    a("down", 7, 5)

    def apply(p, tokens):
        x = p["embedding"][tokens]
        return (x + jax.nn.relu(x @ p["up"]) @ p["down"]) @ p["embedding"].T

    tokens = jnp.arange(6).reshape(2, 3)
    return Network(apply, dict(a), (tokens,), 5 + 7, (("embedding", 0),))


@network
def while_and_cond():
    a = Arrays()
    a("stem", 3, 5)
    a("turn", 5, 5)
    a("head", 5, 2)

    def apply(p, x):
        h = x @ p["stem"]
        _, h = jax.lax.while_loop(
            lambda state: state[0] < 3,
            lambda state: (state[0] + 1, jnp.tanh(state[1] @ p["turn"])),
            (0, h),
        )
        h = jax.lax.cond(x.sum() > 0, jnp.sin, lambda h: h * h, h)
        return h @ p["head"]

    # The sum over the inputs keeps them all.
    return Network(apply, dict(a), (normal(4, 3),), 5)


# ---------------------------------------------------------------- from other libraries


def of_haiku(net, x, removable):
    def function(x, training):
        return net()(x, is_training=training)

    net_of = hk.transform_with_state(function)
    params, state = net_of.init(jax.random.key(0), x, True)
    state = jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.5, shaken(state))

    def apply(both, x):
        return net_of.apply(*both, None, x, False)[0]

    return Network(apply, (shaken(params), state), (x,), removable)


@network
def haiku_resnet50():
    # Stem, two inner layers of each of 16 blocks, and the stream of each of 4 stages.
    inner = sum(
        2 * n * c for n, c in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)
    )
    streams = 256 + 512 + 1024 + 2048
    return of_haiku(
        lambda: hk.nets.ResNet50(5), normal(2, 32, 32, 3), 3 + 64 + inner + streams
    )


@network
def haiku_mobilenet_v1():
    channels = (32, 64, 128, 128, 256, 256, *6 * (512,), 1024, 1024)
    return of_haiku(
        lambda: hk.nets.MobileNetV1(num_classes=5),
        normal(2, 32, 32, 3),
        3 + sum(channels),
    )


def of_equinox(module, call, inputs, removable):
    params, static = eqx.partition(module, eqx.is_array)

    def apply(params, *inputs):
        return call(eqx.combine(params, static), *inputs)

    return Network(apply, shaken(params), inputs, removable)


@network
def equinox_mlp():
    module = eqx.nn.MLP(4, 2, 6, 2, key=jax.random.key(0))
    return of_equinox(module, lambda m, x: jax.vmap(m)(x), (normal(3, 4),), 4 + 6 + 6)


@network
def equinox_attention():
    module = eqx.nn.MultiheadAttention(3, 6, key=jax.random.key(0))
    x = normal(5, 6)
    # The inputs, the heads, and the dimensions of keys and of values.
    return of_equinox(module, lambda m, x: m(x, x, x), (x,), 6 + 3 + 2 + 2)


def of_nnx(make, inputs, removable):
    graph, state = nnx.split(make(nnx.Rngs(0)))
    return Network(
        lambda state, *inputs: nnx.merge(graph, state)(*inputs),
        shaken(state),
        inputs,
        removable,
    )


class NNXAttention(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(3, 6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attention(self.stem(x)))


@network
def nnx_attention():
    return of_nnx(NNXAttention, (normal(2, 4, 3),), 3 + 6 + 2 + 3 + 3 + 6)


class NNXRecurrent(nnx.Module):
    def __init__(self, cell, rngs):
        self.rnn = nnx.RNN(cell(3, 5, rngs=rngs))
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x)[:, -1])


@network
def nnx_lstm():
    make = lambda rngs: NNXRecurrent(nnx.LSTMCell, rngs)  # noqa: E731
    return of_nnx(make, (normal(2, 4, 3),), 3 + 5)


@network
def nnx_gru():
    make = lambda rngs: NNXRecurrent(nnx.GRUCell, rngs)  # noqa: E731
    return of_nnx(make, (normal(2, 4, 3),), 3 + 5)


class LinenEncoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x: Any = nn.Embed(11, 6)(tokens)
        x = x + nn.MultiHeadDotProductAttention(3)(nn.LayerNorm()(x))
        return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(nn.Dense(7)(x)))


def of_linen(module, inputs, removable):
    variables = module.init(jax.random.key(0), *inputs)
    return Network(module.apply, shaken(variables), inputs, removable)


@network
def linen_attention():
    tokens = jnp.arange(8).reshape(2, 4)
    # The stream is normalised once, and read once as it is.
    return of_linen(LinenEncoder(), (tokens,), 6 + 3 + 2 + 2 + 7)


class LinenRecurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        outputs: Any = nn.RNN(nn.OptimizedLSTMCell(5))(x)
        return nn.Dense(2)(outputs[:, -1])


@network
def linen_lstm():
    return of_linen(LinenRecurrent(), (normal(2, 4, 3),), 3 + 5)
