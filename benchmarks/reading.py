"""How long it takes to read large programs and to print what was found, an equation.

    python -m benchmarks.reading             # prints numbers and limits
    python -m benchmarks.reading --record    # and writes benchmarks/results/

A minute on two cores. Seconds are those of the processor, beyond `jax.make_jaxpr`.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.measure import entry
from benchmarks.networks import Network
from benchmarks.structure import equations, residual, resnet50
from l0jax.tracing import trace


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def layer_norm(x, scale, shift):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale + (
        shift
    )


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale


def gpt(layers: int = 48, width: int = 256, heads: int = 4, steps: int = 64) -> Network:
    """A language model and its loss: each step predicts the next."""
    words = 512
    each = {
        **dict.fromkeys(("scale1", "shift1", "scale2", "shift2", "bias2"), (width,)),
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "bias1": (4 * width,),
        "down": (4 * width, width),
    }
    params = {
        "words": shape(words, width),
        "steps": shape(steps, width),
        "layers": [{n: shape(*s) for n, s in each.items()} for _ in range(layers)],
    }

    def attention(p, x):
        split = (len(x), steps, heads, width // heads)
        q, k, v = (part.reshape(split) for part in jnp.split(x @ p["qkv"], 3, -1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(float(split[-1]))
        causal = jnp.tril(jnp.ones((steps, steps), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), -1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ p["out"]

    def apply(p, tokens):
        x = p["words"].at[tokens].get() + p["steps"]
        for each in p["layers"]:
            x += attention(each, layer_norm(x, each["scale1"], each["shift1"]))
            h = layer_norm(x, each["scale2"], each["shift2"])
            h = jax.nn.gelu(h @ each["up"] + each["bias1"])
            x += h @ each["down"] + each["bias2"]
        logits = jax.nn.log_softmax(x @ p["words"].T)[:, :-1]
        return -(logits * jax.nn.one_hot(tokens[:, 1:], words)).sum(-1).mean()

    tokens = jax.ShapeDtypeStruct((2, steps), jnp.int32)
    return Network(apply, params, (tokens,), removable=0)


def llama(layers: int = 32, width: int = 256, steps: int = 64) -> Network:
    """Rotated positions, two groups of four queries, gated layers."""
    groups, queries, per_head, hidden = 2, 4, 32, 512
    each = {
        "scale1": (width,),
        "q": (width, groups * queries * per_head),
        "k": (width, groups * per_head),
        "v": (width, groups * per_head),
        "out": (groups * queries * per_head, width),
        "scale2": (width,),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    params = {
        "words": shape(512, width),
        "layers": [{n: shape(*s) for n, s in each.items()} for _ in range(layers)],
    }

    def rotated(x):
        angles = jnp.arange(steps)[:, None] * jnp.arange(per_head // 2)
        cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def attention(p, x):
        q = rotated((x @ p["q"]).reshape(len(x), steps, groups * queries, per_head))
        q = q.reshape(len(x), steps, groups, queries, per_head)
        k = rotated((x @ p["k"]).reshape(len(x), steps, groups, per_head))
        v = (x @ p["v"]).reshape(len(x), steps, groups, per_head)
        weights = jax.nn.softmax(jnp.einsum("bqgrd,bkgd->bgrqk", q, k), -1)
        h = jnp.einsum("bgrqk,bkgd->bqgrd", weights, v)
        return h.reshape(len(x), steps, -1) @ p["out"]

    def apply(p, x):
        for each in p["layers"]:
            x += attention(each, rms_norm(x, each["scale1"]))
            h = rms_norm(x, each["scale2"])
            x += (jax.nn.silu(h @ each["gate"]) * (h @ each["up"])) @ each["down"]
        return x @ p["words"].T

    return Network(apply, params, (shape(2, steps, width),), removable=0)


def mamba2(layers: int = 8, width: int = 32, steps: int = 256) -> Network:
    """State spaces by chunks, as Dao and Gu (2024) write them (listing 1)."""
    heads, per_head, state, chunk = 4, 16, 8, 32
    inner, chunks = heads * per_head, steps // chunk
    each = {
        "in": (width, 2 * inner + 2 * state + heads),
        "window": (4, inner + 2 * state),
        **dict.fromkeys(("decay", "step", "skip"), (heads,)),
        "scale": (inner,),
        "out": (inner, width),
    }
    params = [{n: shape(*s) for n, s in each.items()} for _ in range(layers)]

    def sums_between(x):
        total = jnp.cumsum(x, -1)
        below = jnp.tril(jnp.ones((x.shape[-1],) * 2, bool))
        return jnp.where(below, total[..., :, None] - total[..., None, :], -jnp.inf)

    def scan(x, decay, b, c):
        x, b, c = (a.reshape(len(a), chunks, chunk, *a.shape[2:]) for a in (x, b, c))
        decay = decay.reshape(len(x), chunks, chunk, heads).transpose(0, 3, 1, 2)
        total = jnp.cumsum(decay, -1)
        inside = jnp.exp(sums_between(decay))
        within = jnp.einsum("bcls,bcms,bhclm,bcmhp->bclhp", c, b, inside, x)
        left = jnp.exp(total[..., -1:] - total)
        states = jnp.einsum("bcls,bhcl,bclhp->bchps", b, left, x)
        states = jnp.concatenate([jnp.zeros_like(states[:, :1]), states], 1)
        passed = jnp.pad(total[..., -1], ((0, 0), (0, 0), (1, 0)))
        passed = jnp.exp(sums_between(passed))
        states = jnp.einsum("bhzc,bchps->bzhps", passed, states)[:, :-1]
        before = jnp.einsum("bcls,bchps,bhcl->bclhp", c, states, jnp.exp(total))
        return (within + before).reshape(len(x), steps, heads, per_head)

    def mixer(p, x):
        ends = [inner, 2 * inner + 2 * state]
        gate, h, step = jnp.split(x @ p["in"], ends, -1)
        h = jnp.pad(h, ((0, 0), (3, 0), (0, 0)))
        h = jax.nn.silu(sum(h[:, i : i + steps] * p["window"][i] for i in range(4)))
        h, b, c = jnp.split(h, [inner, inner + state], -1)
        h = h.reshape(len(x), steps, heads, per_head)
        step = jax.nn.softplus(step + p["step"])
        y = scan(h * step[..., None], -jnp.exp(p["decay"]) * step, b, c)
        y = (y + h * p["skip"][:, None]).reshape(len(x), steps, inner)
        return rms_norm(y * jax.nn.silu(gate), p["scale"]) @ p["out"]

    def apply(p, x):
        for each in p:
            x += mixer(each, x)
        return x

    return Network(apply, params, (shape(2, steps, width),), removable=0)


def bigbird(layers: int = 4, width: int = 64, steps: int = 1024) -> Network:
    """Attention of blocks to the first and last, their neighbours and one more (Zaheer
    et al. 2020), by slices and concatenations."""
    heads, block = 4, 32
    blocks = steps // block
    params = [{n: shape(width, width) for n in "qkvo"} for _ in range(layers)]

    def cut(x, at):
        return x[:, :, at * block : (at + 1) * block]

    def attention(q, k, v):
        made = []
        for at in range(blocks):
            near = {max(at - 1, 0), at, min(at + 1, blocks - 1)}
            seen = sorted(near | {0, blocks - 1, (7 * at + 3) % blocks})
            keys = jnp.concatenate([cut(k, other) for other in seen], 2)
            values = jnp.concatenate([cut(v, other) for other in seen], 2)
            scores = jnp.einsum("bhqd,bhkd->bhqk", cut(q, at), keys)
            weights = jax.nn.softmax(scores, -1)
            made.append(jnp.einsum("bhqk,bhkd->bhqd", weights, values))
        return jnp.concatenate(made, 2)

    def apply(p, x):
        split = (len(x), steps, heads, width // heads)
        for each in p:
            q, k, v = (
                (x @ each[name]).reshape(split).transpose(0, 2, 1, 3) for name in "qkv"
            )
            h = attention(q, k, v).transpose(0, 2, 1, 3).reshape(x.shape)
            x += h @ each["o"]
        return x

    return Network(apply, params, (shape(2, steps, width),), removable=0)


PROGRAMS: Mapping[str, Callable[[], Network]] = {
    "GPT of 48 layers and its loss": gpt,
    "Llama of 32 layers": llama,
    "Mamba-2 of 8 layers": mamba2,
    "BigBird of 4 layers": bigbird,
    "ResNet-50 (Haiku's)": resnet50,
    "1,000 residual layers": lambda: residual(1000),
}


def read(net: Network, turns: int) -> tuple[list[float], list[float], int, int]:
    """Seconds of reading and of printing in each turn, equations and groups."""
    reading, printing = [], []
    count = groups = 0
    # (Traced once before: what JAX remembers of it is then given to both.)
    jax.make_jaxpr(net.apply)(net.params, *net.inputs)
    for _ in range(turns):
        begun = time.process_time()
        closed = jax.make_jaxpr(net.apply)(net.params, *net.inputs)
        traced = time.process_time()
        structure = trace(net.apply, net.params, *net.inputs)
        found = time.process_time()
        text = str(structure)
        printed = time.process_time()
        assert text.startswith(f"{len(structure.groups)} groups")
        reading.append((found - traced) - (traced - begun))
        printing.append(printed - found)
        count, groups = equations(closed.jaxpr), len(structure.groups)
    return reading, printing, count, groups


def entries_of(name: str, net: Network, turns: int) -> Sequence[dict]:
    reading, printing, count, groups = read(net, turns)
    each = 1e6 * statistics.median(reading) / count
    ratio = statistics.median(p / r for p, r in zip(printing, reading, strict=True))
    detail = f"{count:,} equations, {groups} groups"
    return (
        entry(f"reading {name}, an equation", each, 100.0, " µs", detail),
        entry(
            f"printing {name} over reading it",
            ratio,
            1.0,
            "×",
            f"{1e3 * statistics.median(printing):.0f} ms",
        ),
    )


def main(arguments) -> list[dict]:
    with jax.numpy_rank_promotion("allow"):
        return list(
            itertools.chain.from_iterable(
                entries_of(name, make(), arguments.turns)
                for name, make in PROGRAMS.items()
            )
        )


if __name__ == "__main__":
    measure.run(__doc__, "reading", main, turns=7)
