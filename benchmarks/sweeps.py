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
from experiments.mnist_training import loss_on
from l0jax import gates, models, train

MEMBERS, STEPS = 16, 100


def contenders() -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """Both ways to train all members, and the seconds that each took to compile."""
    model = models.MLP((784, 300, 100, 10), rngs=nnx.Rngs(0))
    data = images_and_labels()
    training = train.Training(
        model,
        loss_on(255.0),
        structure=models.structure(model),
        gate=gates.HardConcrete(),
        price=0.1 / EXAMPLES,
        weight_decay=1e-4,
        optimizer=optax.adam(1e-3),
        polyak=0.999,
    )
    keys = list(map(jax.random.key, range(MEMBERS)))
    orders = [train.order_of_epoch(k, 0, EXAMPLES, BATCH)[:STEPS] for k in keys]
    states = [training.start(key) for key in keys]

    def singles():
        for at in range(MEMBERS):
            states[at], _ = training.epoch(states[at], data, orders[at])
        jax.block_until_ready(states)

    prices = jnp.geomspace(0.01, 1.0, MEMBERS) / EXAMPLES
    sweep = train.Sweep(lambda price: training.replace(price=price), prices)
    together, stacked = [sweep.start(keys)], train.stack(orders)

    def swept():
        together[0], _ = sweep.epoch(together[0], data, stacked)
        jax.block_until_ready(together)

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
