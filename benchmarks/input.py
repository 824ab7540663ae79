"""What it costs to read MNIST from the disk while a network trains, beside MNIST that
lies on the device.

    python -m benchmarks.input             # prints ratios and shares
    python -m benchmarks.input --record    # and writes benchmarks/results/input.jsonl

The MLP and LeNet-5 with a gate on every unit. Grain reads records of TensorFlow
Datasets, decodes their PNGs and moves each image by up to two pixels, in threads of
this process or in processes of its own. All take turns. Waiting is what passes between
the end of a step and the next batch being there. Five minutes on two cores.
"""

import functools
import io
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import numpy as np
import optax
from flax import nnx

from benchmarks import measure
from benchmarks.measure import entry, milliseconds, ratio
from experiments.mnist_training import loss_on
from experiments.tasks import data
from l0jax import gates, models, train

BATCH, STEPS = 100, 200
BUFFERED = 30
"""No fewer batches than all buffers of a pipeline hold."""
FIRST = "one program"
NETWORKS = ("mlp", "lenet5")
WORKERS = {"Grain in this process": 0, "1 worker": 1, "2 workers": 2}


def decoded(example: Mapping[str, Any]) -> tuple[np.ndarray, np.int32]:
    """An image of a record, and its label."""
    from PIL import Image  # in each worker

    image = np.asarray(Image.open(io.BytesIO(example["image"])))
    return image[..., None], np.int32(example["label"])


def moved(example: tuple, rng: np.random.Generator) -> tuple:
    image, label = example
    return np.roll(image, rng.integers(-2, 3, 2), axis=(0, 1)), label


def mnist() -> Any:
    """The records of MNIST by number."""
    import tensorflow_datasets as tfds

    undecoded = {"image": tfds.decode.SkipDecoding()}
    return data.stored(
        "mnist", lambda found: found.as_data_source("train", decoders=undecoded)
    )


def pipeline(source: Any, decode: Callable, workers: int) -> grain.IterDataset:
    found = grain.MapDataset.source(source).seed(0).shuffle()
    found = found.map(decode).random_map(moved)
    found = found.batch(BATCH, drop_remainder=True).repeat()
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=4)
    return found.to_iter_dataset(read).mp_prefetch(options)


def training_of(network: str) -> train.Training:
    model: Any = models.MLP((784, 300, 100, 10), rngs=nnx.Rngs(0))
    if network == "lenet5":
        model = models.LeNet5(rngs=nnx.Rngs(0))
    return train.Training(
        model,
        loss_on(255.0),
        structure=models.structure(model),
        gate=gates.HardConcrete(),
        price=0.1 / 60_000,
        weight_decay=1e-4,
        optimizer=optax.adam(1e-3),
        polyak=0.999,
    )


def measured(
    network: str, source: Any, decode: Callable, turns: int, steps: int = STEPS
) -> list[dict]:
    """A network trained in every way.

    Args:
        network: one of `NETWORKS`.
        source: examples by number.
        decode: makes an image and its label of one.
        turns: of each way.
        steps: of a turn.
    """
    training, key = training_of(network), jax.random.key(0)
    examples = [decode(source[at]) for at in range(min(len(source), steps * BATCH))]
    arrays = jax.device_put(tuple(map(np.stack, zip(*examples, strict=True))))
    order = np.arange(steps * BATCH).reshape(steps, BATCH) % len(examples)

    def resident(loop: bool) -> tuple[float, float]:
        state = training.start(key)
        begun = time.perf_counter()
        jax.block_until_ready(training.epoch(state, arrays, order, loop=loop))
        return time.perf_counter() - begun, 0.0

    def streamed(workers: int) -> tuple[float, float]:
        state, waited = training.start(key), 0.0
        with train.Stream(pipeline(source, decode, workers), training) as stream:
            # Those that were made beforehand, while processes began.
            for _ in stream.take(BUFFERED):
                pass
            begun = time.perf_counter()
            for _ in range(steps):
                asked = time.perf_counter()
                batch = next(stream)
                waited += time.perf_counter() - asked
                state, _ = training.step(state, batch)
                # Else what the device still has to do would count as waiting.
                jax.block_until_ready(state)
            taken = time.perf_counter() - begun
        return taken, waited / taken

    ways: dict[str, Callable[[], tuple[float, float]]] = {
        FIRST: functools.partial(resident, False),
        "step by step": functools.partial(resident, True),
        **{name: functools.partial(streamed, n) for name, n in WORKERS.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    waiting: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, go in ways.items():
            taken, share = go()
            # The first compiles.
            if turn:
                seconds[name].append(taken)
                waiting[name].append(share)
    took = f"{milliseconds(seconds, steps)} a step"
    return [
        entry(
            f"{network}: {name}, over an epoch that is {FIRST}",
            ratio(seconds, name, FIRST),
            None,
            "×",
            f"waits {100 * statistics.median(waiting[name]):.0f} % of the time"
            if name in WORKERS
            else took,
        )
        for name in ways
        if name != FIRST
    ]


def main(arguments) -> list[dict]:
    source = mnist()
    return [
        line
        for network in NETWORKS
        for line in measured(network, source, decoded, arguments.turns)
    ]


if __name__ == "__main__":
    measure.run(__doc__, "input", main, turns=5)
