"""What it costs a training step that doomed units are closed softly meanwhile.

    python -m benchmarks.relocation             # prints ratios and their limit
    python -m benchmarks.relocation --record    # and writes benchmarks/results/

The steps of `experiments.relocation` at its batch sizes: without gates, with gates that
close, and with the shift of a least-squares fit that is added meanwhile. The images are
random: no step depends on what they show. Two minutes on two cores.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import measure
from benchmarks.measure import entry, milliseconds, ratio, take_turns
from experiments.relocation_settings import NETWORKS
from experiments.relocation_training import ARMS, Doomed, closing, plain
from experiments.relocation_work import parameters, removable
from experiments.tasks.images import Images
from l0jax import models, train, units
from l0jax.methods.relocation import remove

STEPS = {"mlp": 100, "lenet5": 12, "resnet8": 12}
BATCH = {"mlp": 128, "lenet5": 128, "resnet8": 32}
KINDS = {"plain": None, "soft": "soft", "soft, least squares": "soft_least_squares"}
LIMIT = 1.05


def main(arguments) -> list[dict]:
    entries = []
    for name, steps in STEPS.items():
        contenders = {kind: Contender(name, arm) for kind, arm in KINDS.items()}
        for go in contenders.values():
            go(steps)
        turns = {k: partial(go, steps) for k, go in contenders.items()}
        seconds = take_turns(turns, arguments.turns)
        of = milliseconds(seconds, steps)
        entries += [
            entry(
                f"{name}, batch {BATCH[name]}: a step that closes units softly over "
                "one without gates",
                ratio(seconds, "soft", "plain"),
                LIMIT,
                "×",
                of,
            ),
            entry(
                f"{name}, batch {BATCH[name]}: with a least-squares shift too",
                ratio(seconds, "soft, least squares", "plain"),
                None,
                "×",
                "one more sum of as many numbers as the kernels that read have",
            ),
        ]
    return [*entries, small_video_network(arguments.turns)]


def small_video_network(turns: int) -> dict:
    """What half the units of the small I3D are worth in seconds."""
    kind, architecture, _ = NETWORKS["i3d_small"]
    whole = models.make(kind, architecture, rngs=nnx.Rngs(0))
    whole.eval()
    structure = removable(whole)
    keep = {n: np.arange(g.size) % 2 == 0 for n, g in structure.groups.items()}
    x = jax.random.normal(jax.random.key(0), (8, *whole.example.shape[1:]))
    small = remove(whole, structure, keep, x)
    contenders = {
        "whole": partial(forward, nnx.jit(lambda net, x: net(x)), whole, x),
        "half": partial(forward, nnx.jit(lambda net, x: net(x)), small, x),
    }
    for go in contenders.values():
        go()
    seconds = take_turns(contenders, turns)
    return entry(
        "i3d_small with half the units of each layer over the whole: 8 clips",
        ratio(seconds, "half", "whole"),
        1,
        "×",
        f"{milliseconds(seconds, 1)}; {parameters(whole):,} and {parameters(small):,} "
        "parameters",
    )


def forward(run, network, x) -> None:
    run(network, x).block_until_ready()


class Contender:
    """Steps of a network under an arm, which go on where they stopped."""

    def __init__(self, name: str, arm: str | None):
        rng, batch = np.random.default_rng(0), BATCH[name]
        kind, architecture, dataset = NETWORKS[name]
        model = models.make(kind, architecture, rngs=nnx.Rngs(0))
        shape = (32, 32, 3) if dataset.startswith("cifar") else (28, 28, 1)
        count = 4 * batch
        colours = [np.full(shape[-1], 128, np.float32) for _ in range(2)]
        pixels = rng.integers(0, 256, (count, *shape), np.uint8)
        labels = rng.integers(0, 10, count).astype(np.int32)
        # On the device, as in the experiment: a step gathers its batch there.
        images = Images(pixels, labels, *colours)
        structure = removable(model)
        keep = {n: jnp.arange(g.size) % 5 == 0 for n, g in structure.groups.items()}
        shift = {}
        if arm == "soft_least_squares":
            arrays = units.arrays(nnx.state(model))
            read = {s.path for g in structure.groups.values() for s in g.used_by}
            shift = {path: jnp.zeros_like(arrays[path]) for path in read}
        if arm is None:
            once = plain(model, images, optax.adam(1e-3))
            self.sweep = train.Sweep(lambda _: once, np.zeros(1), together=1)
        else:
            member = closing(
                model, images, optax.adam(1e-3), structure, ARMS[arm], 4000
            )
            settings = train.stack([Doomed(keep, shift, {})])
            self.sweep = train.Sweep(member, settings, together=1)
        # On the device, as in the experiment: a step gathers its batch there.
        self.data = jnp.asarray(pixels), jnp.asarray(labels)
        self.order = rng.permutation(count).reshape(1, -1, batch)
        self.states = self.sweep.start([jax.random.key(0)])

    def __call__(self, steps: int) -> None:
        rows = np.resize(self.order, (1, steps, self.order.shape[-1]))
        self.states, _ = self.sweep.epoch(self.states, self.data, rows, loop=True)
        jax.block_until_ready(self.states.params)


if __name__ == "__main__":
    measure.run(__doc__, "relocation", main, turns=9)
