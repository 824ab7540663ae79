"""What it costs to choose channels by discrimination-aware pruning.

    python -m benchmarks.selection             # prints the ratio and its limit
    python -m benchmarks.selection --record    # and writes benchmarks/results/

All layers of a narrow ResNet-56, half of the channels of each, as the small rows of
`experiments.channel_rows` choose them, beside the epochs of training that follow there.
The images are random: no step depends on what they show. Six minutes on two cores.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import l0jax.nnx
from benchmarks import measure
from benchmarks.measure import entry
from experiments.channel_rows import SMALL
from experiments.channel_run import prunable
from experiments.tasks.images import Images, Trainer, normalised, recalibrated
from l0jax import methods, models, train
from l0jax.methods import discrimination
from l0jax.methods.keeping import count_left
from l0jax.models import pre_activation

WIDTH, RATIO, LOSSES = 4, 0.5, 2
EPOCHS_MEASURED = 2


def main(arguments) -> list[dict]:
    assert SMALL.examples is not None
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (SMALL.examples, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, SMALL.examples).astype(np.int32)
    colour = np.full(3, 128, np.float32)
    images = Images(pixels, labels, colour, colour)
    model = models.make(
        "pre_activation_resnet",
        pre_activation.of_depth(56, WIDTH),
        rngs=nnx.Rngs(0),
    )
    # Twenty-seven blocks of a new network overflow without statistics of their own.
    chosen_by = images._replace(
        images=pixels[: SMALL.chosen_by], labels=labels[: SMALL.chosen_by]
    )
    model = recalibrated(model, chosen_by)
    structure = prunable(model)
    x = normalised(jnp.asarray(chosen_by.images), chosen_by)
    task = methods.task(model, structure, x, jnp.asarray(chosen_by.labels))
    stages = discrimination.stages(task, LOSSES)
    heads = discrimination.heads(task, stages, rngs=nnx.Rngs(0))

    # -------------------------------------------------------------- the choice
    compiled, keep, params = Compilations(), {}, task.params
    begun = time.perf_counter()
    with compiled:
        for number, stage in enumerate(stages):
            head = heads.get(stage.kernel or "")
            if head is not None:
                head.eval()
            found, params = discrimination.prune(
                dataclasses.replace(task, params=params),
                task.params,
                stage,
                head,
                discrimination.Selection(),
                jax.random.key(number),
                ratio=RATIO,
            )
            keep |= found
    choosing = time.perf_counter() - begun

    # ------------------------------------------------- the training that follows
    graph, _ = nnx.split(model)
    small = l0jax.nnx.shrink(nnx.merge(graph, params), keep, structure)
    trainer = Trainer(small, images, SMALL.tune, jax.random.key(0))

    def train_once(epoch: int) -> None:
        count, batch = len(images.labels), SMALL.tune.batch_size
        order = train.order_of_epoch(trainer.key, epoch, count, batch)
        trainer.state, totals = trainer.training.epoch(
            trainer.state, trainer.data, order, loop=True
        )
        jax.block_until_ready(totals)

    train_once(0)
    begun = time.perf_counter()
    for epoch in range(EPOCHS_MEASURED):
        train_once(epoch)
    epoch_seconds = (time.perf_counter() - begun) / EPOCHS_MEASURED
    training = SMALL.tune.epochs * epoch_seconds

    passes = sum(
        # Before each choice a gradient over all, after it an epoch; one gradient more.
        2 * count_left(group.size, RATIO) + 1
        for group in structure.groups.values()
    )
    return [
        entry(
            f"ResNet-56 of {WIDTH} to {4 * WIDTH} channels: choosing half of them over "
            f"{SMALL.tune.epochs} epochs of training what is left",
            choosing / training,
            3,
            "×",
            f"{choosing:.0f} s and {training:.0f} s; {compiled.seconds:.0f} s of the "
            f"choice compile {compiled.count} programs for {len(structure.groups)} "
            f"layers; {passes} passes over {SMALL.chosen_by} images take "
            f"{(choosing - compiled.seconds) / passes:.2f} s each, one of training "
            f"over as many {epoch_seconds * SMALL.chosen_by / SMALL.examples:.2f} s",
        )
    ]


class Compilations:
    """Counts the programs that are compiled within it, and their seconds."""

    def __init__(self):
        self.count, self.seconds, self.on = 0, 0.0, False
        jax.monitoring.register_event_duration_secs_listener(self.heard)

    def heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        if self.on and event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs
            self.count += event.endswith("backend_compile_duration")

    def __enter__(self):
        self.on = True

    def __exit__(self, *_):
        self.on = False


if __name__ == "__main__":
    measure.run(__doc__, "selection", main, turns=1)
