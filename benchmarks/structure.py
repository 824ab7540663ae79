"""How long it takes to read a model, how exact removal is, and what it is worth.

    python -m benchmarks.structure             # prints numbers and limits
    python -m benchmarks.structure --record    # and writes benchmarks/results/

Two minutes on two cores.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import l0jax
from benchmarks import measure
from benchmarks.measure import entry
from benchmarks.networks import NETWORKS, Arrays, Network, normal
from l0jax import costs, gating, models, units
from l0jax.gates import HardConcrete
from l0jax.narrow import narrow
from l0jax.structure import Structure
from l0jax.tracing import trace


def conv3d(x, kernel, stride=(1, 1, 1)):
    dimensions = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, stride, "SAME", dimension_numbers=dimensions
    )


# Inflated Inception-v1 (Carreira and Zisserman 2017): channels of the four branches.
I3D = tuple(itertools.chain.from_iterable(models.i3d.STAGES))


def i3d() -> Network:
    """I3D with batch norm, as a program in plain JAX, for clips of 16 frames."""
    a = Arrays()

    def unit(name: str, window: int, inputs: int, outputs: int) -> None:
        a(f"{name}.kernel", window, window, window, inputs, outputs)
        for part in ("shift", "mean", "var"):
            a(f"{name}.{part}", outputs)

    unit("stem1", 7, 3, 64)
    unit("stem2", 1, 64, 64)
    unit("stem3", 3, 64, 192)
    size = 192
    for i, (one, (reduce3, three), (reduce5, five), pool) in enumerate(I3D):
        unit(f"mixed{i}.one", 1, size, one)
        unit(f"mixed{i}.reduce3", 1, size, reduce3)
        unit(f"mixed{i}.three", 3, reduce3, three)
        unit(f"mixed{i}.reduce5", 1, size, reduce5)
        unit(f"mixed{i}.five", 3, reduce5, five)
        unit(f"mixed{i}.pool", 1, size, pool)
        size = one + three + five + pool
    a("head", size, 400)

    def layer(p, name, x, stride=(1, 1, 1)):
        x = conv3d(x, p[f"{name}.kernel"], stride)
        scale = jax.lax.rsqrt(jnp.square(p[f"{name}.var"]) + 1e-3)
        return jax.nn.relu((x - p[f"{name}.mean"]) * scale + p[f"{name}.shift"])

    def pooled(x, window, stride):
        return jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *stride, 1), "SAME"
        )

    def apply(p, x):
        x = pooled(layer(p, "stem1", x, (2, 2, 2)), (1, 3, 3), (1, 2, 2))
        x = layer(p, "stem3", layer(p, "stem2", x))
        x = pooled(x, (1, 3, 3), (1, 2, 2))
        for i in range(len(I3D)):
            if i in (2, 7):
                window = (3, 3, 3) if i == 2 else (2, 2, 2)
                x = pooled(x, window, (2, 2, 2))
            name = f"mixed{i}"
            x = jnp.concatenate(
                [
                    layer(p, f"{name}.one", x),
                    layer(p, f"{name}.three", layer(p, f"{name}.reduce3", x)),
                    layer(p, f"{name}.five", layer(p, f"{name}.reduce5", x)),
                    layer(p, f"{name}.pool", pooled(x, (3, 3, 3), (1, 1, 1))),
                ],
                axis=-1,
            )
        return x.mean((1, 2, 3)) @ p["head"]

    clip = jax.ShapeDtypeStruct((2, 16, 224, 224, 3), jnp.float32)
    return Network(apply, dict(a), (clip,), removable=0)


def resnet50() -> Network:
    net = hk.transform_with_state(lambda x, t: hk.nets.ResNet50(1000)(x, is_training=t))
    x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    params, state = jax.eval_shape(
        lambda key, x: net.init(key, x, True), jax.random.key(0), x
    )
    return Network(
        lambda both, x: net.apply(*both, None, x, False)[0], (params, state), (x,), 0
    )


def lenet5() -> Network:
    graph, state = nnx.split(models.LeNet5(rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
    return Network(lambda state, x: nnx.merge(graph, state)(x), state, (x,), 0)


def residual(layers: int) -> Network:
    """A stream of 8 units with as many residual layers as are asked for."""
    a = Arrays()
    for i in range(layers):
        a(f"up{i}", 8, 8)
        a(f"down{i}", 8, 8)

    def apply(p, x):
        for i in range(layers):
            x = x + jax.nn.relu(x @ p[f"up{i}"]) @ p[f"down{i}"]
        return x

    return Network(apply, dict(a), (normal(2, 8),), removable=0)


def reading_seconds(net: Network, turns: int) -> tuple[float, Structure, int]:
    """Median seconds of `trace` beyond those of `jax.make_jaxpr`, and what it found."""
    seconds = []
    for _ in range(turns):
        begun = time.perf_counter()
        closed = jax.make_jaxpr(net.apply)(net.params, *net.inputs)
        middle = time.perf_counter()
        structure = trace(net.apply, net.params, *net.inputs)
        end = time.perf_counter()
        seconds.append((end - middle) - (middle - begun))
    return statistics.median(seconds), structure, equations(closed.jaxpr)


def equations(jaxpr) -> int:
    """How many a jaxpr has, with those of the jaxprs in it."""
    inner = [
        getattr(value, "jaxpr", value)
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    return len(jaxpr.eqns) + sum(map(equations, inner))


def reading(turns: int) -> list[dict]:
    cases: Sequence[tuple[str, Callable[[], Network], float]] = (
        ("ResNet-50 (Haiku's)", resnet50, 0.5),
        ("I3D", i3d, 1.0),
        ("LeNet-5", lenet5, 0.05),
    )
    entries = []
    for name, make, limit in cases:
        seconds, structure, count = reading_seconds(make(), turns)
        detail = (
            f"{len(structure.groups)} groups, {count} equations, "
            f"{len(structure.unknown)} primitives without a rule"
        )
        what = f"reading {name}, its jaxpr given"
        entries.append(entry(what, seconds, limit, " s", detail))
    each = {}
    for layers in (10, 30, 100, 300, 1000):
        seconds, _, count = reading_seconds(residual(layers), min(turns, 3))
        each[layers] = 1e6 * seconds / count
    entries.append(
        entry(
            "reading 1,000 residual layers over 10, per equation",
            each[1000] / each[10],
            2.0,
            "×",
            ", ".join(f"{n} layers {us:.0f} µs" for n, us in each.items())
            + " an equation; linear growth is 1",
        )
    )
    return entries


def exactness() -> list[dict]:
    """The largest difference between masked and narrowed, and of costs from draws."""
    differences: dict[str, float] = {}
    errors: dict[str, float] = {}
    with jax.numpy_rank_promotion("allow"):
        for name, make in NETWORKS.items():
            net = make()
            structure = trace(net.apply, net.params, *net.inputs)
            rng = np.random.default_rng(0)
            keep = {}
            for group in structure.groups.values():
                keep[group.name] = rng.random(group.size) < 0.6
                keep[group.name][0] = True
            z = {n: jnp.float32(flags) for n, flags in keep.items()}
            gated = units.apply_gates(net.params, z, structure.groups)
            masked = jax.tree.leaves(jax.jit(net.apply)(gated, *net.inputs))
            small, params = narrow(structure, net.params, keep)
            narrowed = jax.tree.leaves(jax.jit(small)(params, *net.inputs))
            differences[name] = max(
                float(abs(a - b).max() / abs(a).max())
                for a, b in zip(masked, narrowed, strict=True)
            )
            errors[name] = _sigmas(structure)
    worst = max(differences, key=lambda n: differences[n])
    name = max(errors, key=lambda n: errors[n])
    count = f"over {len(NETWORKS)} networks"
    return [
        {
            **entry("", 0.0, 1.0, "", f"{count}; the worst is {worst}"),
            "what": "masked against narrowed: largest difference over largest output",
            "value": f"{differences[worst]:.1e}",
            "limit": "≤ 1e-5",
            "verdict": "within" if differences[worst] <= 1e-5 else "NOT within",
        },
        entry(
            "expected costs against the mean of 20,000 draws",
            errors[name],
            5.0,
            " σ",
            f"parameters and multiply-accumulates {count}; the worst is {name}",
        ),
    ]


def _sigmas(structure: Structure) -> float:
    gate, key = HardConcrete(), jax.random.key(0)
    logits = {
        name: jax.random.normal(gating.key_for(key, name), (group.size,))
        for name, group in structure.groups.items()
    }

    @jax.jit
    def draw(key):
        z = gating.sample(key, gate, logits)
        drawn = {name: (value != 0).astype(jnp.float32) for name, value in z.items()}
        return costs.params(structure, drawn), costs.macs(structure, drawn)

    draws = jax.lax.map(draw, jax.random.split(key, 20_000), batch_size=2_000)
    active = gating.prob_active(gate, logits)
    found = []
    for cost, values in zip((costs.params, costs.macs), draws, strict=True):
        values = np.asarray(values, np.float64)
        error = values.std(ddof=1) / np.sqrt(len(values)) + 1e-7 * values.mean()
        found.append(abs(float(cost(structure, active)) - values.mean()) / error)
    return max(found)


# Where the rows of RESULTS.md end: units left of the MLP and of LeNet-5.
LEFT = {
    "MLP": {"input": 232, "hidden1": 81, "hidden2": 65},
    "LeNet-5": {"conv1": 9, "conv2": 17, "hidden": 30},
}


def worth(turns: int) -> list[dict]:
    """What removal saves in seconds, of what it saves in multiply-accumulates."""
    entries = []
    for name, model in (
        ("MLP", models.MLP((784, 300, 100, 10), rngs=nnx.Rngs(0))),
        ("LeNet-5", models.LeNet5(rngs=nnx.Rngs(0))),
    ):
        structure = models.structure(model)
        keep = {
            group: np.arange(structure.groups[group].size) < size
            for group, size in LEFT[name].items()
        }
        small = l0jax.nnx.shrink(model, keep, structure.groups)
        x = jnp.ones((256, *model.example.shape[1:]))
        found = l0jax.report(model, small, x, batch_sizes=(256,), calls=8 * turns)
        faster = found.before.seconds[256] / found.after.seconds[256]
        fewer = found.before.macs / found.after.macs
        entries.append(
            {
                **entry("", 0.0, None, "", ""),
                "what": f"{name} at batch 256: speed-up over the ratio of MACs",
                "value": f"{faster / fewer:.2f}",
                "limit": "≥ 0.6",
                "verdict": "within" if faster / fewer >= 0.6 else "NOT within",
                "detail": f"{faster:.1f} times as fast with {fewer:.1f} times fewer "
                f"MACs, {1e3 * found.before.seconds[256]:.2f} ms and "
                f"{1e3 * found.after.seconds[256]:.2f} ms",
            }
        )
    return entries


def floor(turns: int) -> dict:
    """What a call of the MLP's shrunk network costs that nothing is gathered for."""
    model = models.MLP((784, 300, 100, 10), rngs=nnx.Rngs(0))
    groups = models.structure(model).groups
    rng = np.random.default_rng(0)
    keep = {}
    for name, size in LEFT["MLP"].items():
        kept = rng.permutation(groups[name].size)[:size]
        keep[name] = np.isin(np.arange(groups[name].size), kept)
    graph, state = nnx.split(l0jax.nnx.shrink(model, keep, groups))
    widths = [*LEFT["MLP"].values(), 10]
    kernels = [jnp.ones(shape) for shape in itertools.pairwise(widths)]

    def products(x):
        x = x.reshape(len(x), -1)[:, : widths[0]]
        for kernel in kernels[:-1]:
            x = jax.nn.relu(x @ kernel)
        return x @ kernels[-1]

    def everything(x):
        return nnx.merge(graph, state)(x)

    functions = {
        "shrunk": everything,
        "its products alone": products,
        "nothing": lambda x: x[:1, 0, 0, 0],
    }
    x = jnp.ones((256, 28, 28, 1))

    def calls(function: Callable) -> Callable[[], None]:
        compiled = jax.jit(function)
        jax.block_until_ready(compiled(x))

        def fifty() -> None:
            for _ in range(50):
                jax.block_until_ready(compiled(x))

        return fifty

    seconds = measure.take_turns(
        {name: calls(function) for name, function in functions.items()}, turns
    )
    return entry(
        "MLP at batch 256: the shrunk network over its three products alone",
        measure.ratio(seconds, "shrunk", "its products alone"),
        None,
        "×",
        measure.milliseconds(seconds, 50),
    )


def main(arguments) -> list[dict]:
    parts = (
        reading(arguments.turns),
        exactness(),
        worth(arguments.turns),
        [floor(arguments.turns)],
    )
    return list(itertools.chain(*parts))


if __name__ == "__main__":
    measure.run(__doc__, "structure", main, turns=7)
