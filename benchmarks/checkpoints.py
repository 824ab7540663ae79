"""What it costs a run to save a checkpoint after every epoch.

    python -m benchmarks.checkpoints             # prints ratios and limits
    python -m benchmarks.checkpoints --record    # and writes benchmarks/results/

An MLP (784-300-100-10, gates on its units, Adam: 3.2 MB of arrays) is trained on 55,000
examples without checkpoints, with such that are waited for, and with such that another
thread writes (`asynchronous=True`): of all networks here it has the shortest epochs for
its size. Contenders take turns; the last checkpoint is waited for. Examples are noise:
how long a step takes does not depend on them. Three minutes on two cores.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import measure
from benchmarks.measure import entry
from l0jax import costs, gates, models, train

BATCH = 100


def loss(model: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    images, labels = batch
    nats = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
    return nats.mean(), {}


def training_of(model: models.Model) -> train.Training:
    return train.Training(
        model,
        loss,
        structure=models.structure(model),
        gate=gates.HardConcrete(),
        target=train.Target(costs.macs, 0.5),
        optimizer=optax.adam(1e-3),
    )


def noise_of(examples: int) -> tuple[jax.Array, jax.Array]:
    """Examples, and labels of ten classes."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(examples, 784)).astype(np.float32)
    return jnp.asarray(noise), jnp.asarray(rng.integers(0, 10, examples), jnp.int32)


class Trained:
    """A training that goes on for some epochs whenever it is called.

    Args:
        training: what is trained.
        data: on what.
        epochs: at each call.
        folder: of its checkpoints.
        asynchronous: whether checkpoints are written by another thread; None: there are
            none.
    """

    def __init__(
        self,
        training: train.Training,
        data: Any,
        epochs: int,
        folder: Path,
        asynchronous: bool | None,
    ):
        self.training, self.data = training, data
        self.state = training.start(jax.random.key(0))
        self.epochs, self.asynchronous, self.done = epochs, asynchronous, 0
        self.folder = folder

    def __call__(self) -> None:
        checkpoints = None
        if self.asynchronous is not None:
            checkpoints = train.Checkpoints(self.folder, asynchronous=self.asynchronous)
        for _ in range(self.epochs):
            key, examples = jax.random.key(1), len(self.data[1])
            order = train.order_of_epoch(key, self.done, examples, BATCH)
            self.state, totals = self.training.epoch(self.state, self.data, order)
            jax.block_until_ready(totals)
            self.done += 1
            if checkpoints is not None:
                checkpoints.save(self.done, self.training, self.state)
        if checkpoints is not None:
            checkpoints.wait()


def main(arguments: Any, epochs: int = 10, examples: int = 55_000) -> list[dict]:
    """Ratios of seconds."""
    training = training_of(models.MLP((784, 300, 100, 10), rngs=nnx.Rngs(0)))
    data = noise_of(examples)
    ways = {"no checkpoints": None, "waited for": False, "another thread": True}
    with tempfile.TemporaryDirectory() as place:
        going: dict[str, Callable[[], None]] = {
            name: Trained(training, data, epochs, Path(place) / name, asynchronous)
            for name, asynchronous in ways.items()
        }
        measure.take_turns(going, 1)
        seconds = measure.take_turns(going, arguments.turns)
    said = measure.milliseconds(seconds, epochs).replace(" ms", " ms an epoch")
    return [
        entry(
            f"MLP: epochs with a checkpoint each ({way}) over epochs without",
            measure.ratio(seconds, way, "no checkpoints"),
            limit,
            "×",
            said,
        )
        for way, limit in (("another thread", 1.02), ("waited for", None))
    ]


if __name__ == "__main__":
    measure.run(__doc__, "checkpoints", main, turns=15)
