"""Training in epochs: with a progress bar, from the newest checkpoint on."""

import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree
from tqdm import tqdm

from experiments.harness import devices, inputs, profiling, progress
from experiments.harness.devices import OnDevices, OnMesh
from l0jax import train
from l0jax.train import Training, TrainingState


def by_step() -> bool:
    """Whether convolutions want a program for each step: on a CPU, where XLA's are many
    times slower within `lax.scan` (jax issue 12868)."""
    return jax.default_backend() == "cpu"


class Diverged(FloatingPointError):
    """The loss stopped being finite."""


class Run:
    """A training that goes on epoch by epoch.

        run = Run(training, key, data, epochs=14, batch_size=128, folder=folder)
        run.restore()
        for epoch in run:
            run.notes["shares"] = …             # kept with the checkpoint
            run.say(f"loss {run.means['loss']:.3f}")

    After the body of the loop a checkpoint is written, of whatever training and state
    the body has left.

    Args:
        training: as it begins.
        key: from which all that is random is derived; epoch n has the same order of
            the examples in every run with this key.
        data: arrays of all examples, which are put on the device; or batches of a
            `grain.IterDataset` that repeats, for what doesn't fit there.
        on: the devices it trains on, by default one, how many checkpoints it keeps, and
            whether a piece of it is watched.
        epochs: passes over them.
        batch_size: examples of a step.
        steps_per_epoch: how many batches of a `grain.IterDataset` make an epoch.
        folder: of the checkpoints; None: there are none.
        every: epochs between checkpoints.
        until: the last epoch that is run; by default that of the training.
        loop: a program for each step, as convolutions on a CPU want it.
        name: of the progress bar.
        show: whether there is a bar.

    Attributes:
        training, state: as they are now.
        epoch: how many epochs are over.
        means: of each metric, over the epoch that is over.
        seconds: that it took.
        notes: JSON values that the run needs to go on.
        first_step_at: when the first steps of this process were done, by the clock.

    Raises:
        ValueError: as `inputs.of` and `devices.on`.
    """

    def __init__(
        self,
        training: Training,
        key: PRNGKeyArray,
        data: PyTree,
        *,
        on: OnMesh | None = None,
        epochs: int,
        batch_size: int,
        steps_per_epoch: int | None = None,
        folder: Path | None = None,
        every: int = 1,
        until: int | None = None,
        loop: bool = False,
        name: str | None = None,
        show: bool = True,
    ):
        if on is not None:
            training = devices.on(training, on, batch_size)
        self.inputs = inputs.of(data, training, key, batch_size, steps_per_epoch)
        self.batch_size, self.epochs = batch_size, epochs
        self.steps_per_epoch = self.inputs.steps_per_epoch
        self.training, self.key = training, key
        self.state: TrainingState = training.start(key)
        kept = on if isinstance(on, OnDevices) else OnDevices()
        self.checkpoints = None
        if folder is not None:
            self.checkpoints = train.Checkpoints(
                folder, kept.keep_checkpoints, asynchronous=True
            )
        self.every, self.loop = every, loop
        self.profile = kept.profile
        self._compiled: Training | None = None
        self.until = epochs if until is None else min(until, epochs)
        self.epoch = 0
        self.means: dict[str, float] = {}
        self.seconds = 0.0
        self.notes: dict[str, Any] = {}
        self.first_step_at: float | None = None
        self._said, self._name = "", name
        self._show = show and devices.is_first()

    def restore(self) -> None:
        """Goes on from the newest checkpoint, if there is one.

        Raises:
            ValueError: if it is of another training, or of one over data of the other
                kind.
        """
        if self.checkpoints is not None:
            self.training, self.state, self.epoch = self.checkpoints.restore(
                self.training, self.key
            )
            self.notes = self.checkpoints.notes
            if self.epoch:
                self.inputs.restore(self.notes)

    def say(self, text: str) -> None:
        """Beside the progress bar."""
        self._said = text

    @property
    def examples_to_come(self) -> int:
        """Examples that will still be trained on."""
        return (self.epochs - self.epoch) * self.steps_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[int]:
        bar = progress.bar(
            self.epochs * self.steps_per_epoch,
            "step",
            done=self.epoch * self.steps_per_epoch,
            name=self._name,
            show=self._show,
        )
        try:
            with bar, self.inputs:
                for epoch in range(self.epoch + 1, self.until + 1):
                    begun = time.perf_counter()
                    totals = self._one(epoch, bar)
                    self._check(totals, epoch)
                    self.means = totals.means
                    self.seconds, self.epoch = time.perf_counter() - begun, epoch
                    yield epoch
                    bar.set_postfix_str(self._said, refresh=False)
                    last = epoch == self.until
                    if self.checkpoints and (last or epoch % self.every == 0):
                        notes = self.notes | self.inputs.notes()
                        self.checkpoints.save(epoch, self.training, self.state, notes)
            if self.profile and devices.is_first():
                tqdm.write("nothing was watched: no piece followed one of its program")
        finally:
            if self.checkpoints:
                self.checkpoints.wait()

    def _one(self, epoch: int, bar: Any) -> train.Totals:
        """Trains an epoch."""
        found: list[train.Totals] = []
        for part in parts(self.inputs.order(epoch)):
            with self._watched():
                self.state, totals = self.inputs.trained(
                    self.training, self.state, part, self.loop
                )
                found.append(totals)
                if self.first_step_at is None:
                    jax.block_until_ready(self.state.step)
                    self.first_step_at = time.time()
                # One piece is on its way while the bar tells of those before.
                jax.block_until_ready(found[-2:-1])
                bar.update(len(part) if len(found) > 1 else 0)
        totals = functools.reduce(train.Totals.plus, found)
        jax.block_until_ready(totals)
        bar.update(len(part))
        return totals

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """The first piece of a run that compiles nothing is watched if one asks."""
        compiled, self._compiled = self._compiled, self.training
        if not (self.profile and compiled is self.training and self.checkpoints):
            yield
            return
        self.profile = False
        jax.block_until_ready(self.state)
        folder = self.checkpoints.folder / profiling.FOLDER
        with profiling.watched(folder):
            yield
            jax.block_until_ready(self.state)
        if devices.is_first():
            tqdm.write(f"{profiling.read(folder).text()}\nthe trace is in {folder}")

    def _check(self, totals: train.Totals, epoch: int) -> None:
        """Raises Diverged if a loss of the epoch wasn't finite, or what it left."""
        bad = int(totals.first_bad_step)
        if bad < 0 and not finite((self.state.params, self.state.gates)):
            # Left by the last step, and met by no loss yet.
            bad = int(self.state.step)
        if bad >= 0:
            if self.checkpoints:
                self.checkpoints.wait()
            good = self.checkpoints and self.checkpoints.newest
            whose = f"{self._name}: " if self._name else ""
            raise Diverged(
                f"{whose}the loss is not finite at step {bad} (epoch {epoch}); the "
                f"last good checkpoint is {good or 'none yet'}; a smaller "
                "learning_rate may help"
            )


@jax.jit
def finite(tree: PyTree) -> Array:
    """Whether all floats are finite."""
    found = [
        jnp.isfinite(leaf).all()
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return jnp.stack([jnp.asarray(True), *found]).all()


def parts(order: Array | np.ndarray) -> list[np.ndarray]:
    """An epoch's order in equal pieces, after each of which the progress bar moves.

    Equal, so that one program fits all of them.
    """
    steps = len(order)
    pieces = max(n for n in range(1, 13) if steps % n == 0 and (n == 1 or steps >= 120))
    return np.split(np.asarray(order), pieces)
