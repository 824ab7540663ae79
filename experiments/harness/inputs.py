"""What a run trains on: arrays that lie on the device, or batches of a pipeline."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from l0jax import train
from l0jax.train import Totals, Training, TrainingState

STREAM = "stream"
"""Among the notes of a checkpoint: the position in a pipeline."""


class Arrays:
    """All examples, in an order of each epoch's own.

    Args:
        data: arrays with the examples along their first axes.
        training: on whose devices they are put.
        key: from which the orders are derived.
        batch_size: examples of a step.

    Raises:
        ValueError: if the examples don't fill a batch.
    """

    def __init__(
        self, data: PyTree, training: Training, key: PRNGKeyArray, batch_size: int
    ):
        if training.placement.mesh is None:
            data = jax.tree.map(jnp.asarray, data)
        self.data = training.placement.everywhere(data)
        self.key, self.batch_size = key, batch_size
        self.examples = len(jax.tree.leaves(self.data)[0])
        self.steps_per_epoch = self.examples // batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch_size is {batch_size}, more than the {self.examples} training "
                "examples"
            )

    def __enter__(self) -> "Arrays":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def order(self, epoch: int) -> Array | np.ndarray:
        """Of an epoch, a row for each step."""
        return train.order_of_epoch(self.key, epoch, self.examples, self.batch_size)

    def trained(
        self, training: Training, state: TrainingState, part: np.ndarray, loop: bool
    ) -> tuple[TrainingState, Totals]:
        """The state after the steps of a part of the order."""
        return training.epoch(state, self.data, part, loop=loop)

    def notes(self) -> dict[str, Any]:
        """What a checkpoint needs to go on: nothing, an epoch being known by number."""
        return {}

    def restore(self, notes: dict[str, Any]) -> None:
        """Takes what is its own out of the notes of a checkpoint.

        Raises:
            ValueError: if they are of a run over a pipeline.
        """
        if STREAM in notes:
            raise ValueError("the run was one over a pipeline, not over arrays")


class Pipeline:
    """Batches of a `grain.IterDataset`, which never ends; see `train.Stream`.

    Args:
        data: the pipeline.
        training: over whose mesh batches are split.
        steps_per_epoch: how many batches make an epoch.

    Raises:
        ValueError: unless there is a step in an epoch.
    """

    def __init__(self, data: Any, training: Training, steps_per_epoch: int):
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be at least 1: {steps_per_epoch}")
        self.data, self.training = data, training
        self.steps_per_epoch = steps_per_epoch
        self._stream: train.Stream | None = None
        self._position: dict[str, Any] | None = None

    @property
    def stream(self) -> train.Stream:
        """The batches, opened where they were left when the first is asked for."""
        if self._stream is None:
            self._stream = train.Stream(self.data, self.training)
            if self._position is not None:
                self._stream.set_state(self._position)
        return self._stream

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._stream is None:
            return
        try:
            # Whoever leaves the loop may go on later.
            if error[0] in (None, GeneratorExit):
                self.notes()
        finally:
            self._stream.close()
            self._stream = None

    def order(self, epoch: int) -> Array | np.ndarray:
        """Of an epoch, a number for each step."""
        return np.arange(self.steps_per_epoch)

    def trained(
        self, training: Training, state: TrainingState, part: np.ndarray, loop: bool
    ) -> tuple[TrainingState, Totals]:
        """The state after the steps of a part of the order, each a program."""
        return training.epoch(state, self.stream.take(len(part)))

    def notes(self) -> dict[str, Any]:
        """What a checkpoint needs to go on: the position."""
        self._position = self.stream.get_state()
        return {STREAM: self._position}

    def restore(self, notes: dict[str, Any]) -> None:
        """Takes what is its own out of the notes of a checkpoint.

        Raises:
            ValueError: if they are of a run over arrays.
        """
        if STREAM not in notes:
            raise ValueError("the run was one over arrays, not over a pipeline")
        self._position = notes.pop(STREAM)


def of(
    data: Any,
    training: Training,
    key: PRNGKeyArray,
    batch_size: int,
    steps_per_epoch: int | None,
) -> Arrays | Pipeline:
    """What a run trains on.

    Raises:
        ValueError: for a pipeline without `steps_per_epoch`, or this without a
            pipeline; as `Arrays` and `Pipeline`.
    """
    if hasattr(data, "mp_prefetch") != (steps_per_epoch is not None):
        raise ValueError(
            "steps_per_epoch is how many batches of a grain.IterDataset make an epoch, "
            f"and of nothing else; got {steps_per_epoch} and a {type(data).__name__}"
        )
    if steps_per_epoch is None:
        return Arrays(data, training, key, batch_size)
    return Pipeline(data, training, steps_per_epoch)
