"""What sixteen runs in one program cost beside sixteen single runs.

    python -m benchmarks.sweeps             # prints ratios and limits
    python -m benchmarks.sweeps --record    # and writes benchmarks/results/sweeps.jsonl

The MLP with a gate on every unit, at sixteen λ and seeds. Both take turns in one
process, compiled before. Two minutes on two cores. The data are random images of
MNIST's shape: no step depends on what they show.
"""

import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks import measure
from benchmarks.measure import entry, milliseconds, ratio, take_turns
from benchmarks.steps import BATCH, EXAMPLES, images_and_labels
from experiments.mnist import cross_entropy
from l0jax import gates, gating, models, objectives, train

MEMBERS, STEPS = 16, 100
GATE = gates.HardConcrete()
OPTIMIZER = train.gates_apart(optax.adam(1e-3), optax.adam(5e-3))


def contenders() -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """Both ways to train all members, and the seconds that each took to compile."""
    model = models.MLP((784, 300, 100, 10), rngs=nnx.Rngs(0))
    groups = models.structure(model).groups
    graph, params, others = nnx.split(model, nnx.Param, ...)
    params, others = nnx.to_pure_dict(params), nnx.to_pure_dict(others)
    data = images_and_labels()
    batch = jax.tree.map(lambda a: a[:BATCH], data)

    def member(lam) -> train.Step:
        return train.make_step(
            lambda p, x: nnx.merge(graph, p, others)(x.astype(jnp.float32) / 255),
            cross_entropy,
            objectives.penalty(groups, lam, EXAMPLES, weight_decay=1e-4),
            GATE,
            groups,
            OPTIMIZER,
            polyak=0.999,
        )

    def start(seed):
        key = jax.random.key(seed)
        theta = {"params": params, "gates": gating.init(key, GATE, groups, 0.8)}
        state = train.init(theta, OPTIMIZER)
        order = train.order_of_epoch(key, 0, EXAMPLES, BATCH)[:STEPS]
        return state, train.no_totals(member(0.1), state, batch, key), order, key

    single = train.make_run(member(0.1))
    states, totals, orders, keys = zip(*map(start, range(MEMBERS)), strict=True)
    one_by_one = list(zip(states, totals, strict=True))

    def singles():
        for at in range(MEMBERS):
            one_by_one[at] = single(*one_by_one[at], data, orders[at], keys[at])
        jax.block_until_ready(one_by_one)

    sweep = train.make_sweep(member)
    lams = jnp.geomspace(0.01, 1.0, MEMBERS)
    together = [train.stack(states), train.stack(totals)]
    stacked = train.stack(orders), train.stack(keys)

    def swept():
        together[:] = sweep(lams, *together, data, *stacked)
        jax.block_until_ready(together)

    # The sweep first: the single runs donate what both begin with.
    found, compiled = {"one program": swept, "single runs": singles}, {}
    for name, go in found.items():
        begun = time.perf_counter()
        go()
        compiled[name] = time.perf_counter() - begun
    return found, compiled


def main(arguments) -> list[dict]:
    found, compiled = contenders()
    seconds = take_turns(found, arguments.turns)
    cpu = jax.default_backend() == "cpu"
    first = ", ".join(f"{name} {s:.1f} s" for name, s in compiled.items())
    return [
        entry(
            f"{MEMBERS} MLP runs in one program over single runs, on "
            f"{len(jax.devices())} {jax.devices()[0].device_kind}",
            ratio(seconds, "one program", "single runs"),
            0.85 if cpu else 0.15,
            "×",
            f"{milliseconds(seconds, MEMBERS * STEPS)} a step; "
            f"the first call, with compilation: {first}",
        )
    ]


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    measure.run(__doc__, "sweeps", main, turns=15)
