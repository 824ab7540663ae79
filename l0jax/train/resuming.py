"""Checkpoints of a training: of arrays, and of which units it still has."""

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from l0jax import checkpoints
from l0jax.train.training import Training, TrainingState


class Checkpoints:
    """The newest checkpoints of one run, in a folder.

    A run that is resumed goes on bit for bit as it would have, also where units have
    been taken out. A checkpoint that was cut short or damaged is passed over with a
    warning, for the one before.

    Args:
        folder: where they lie; made when the first one is saved.
        keep: how many are kept, at least two.
        asynchronous: whether training goes on while a checkpoint is written. Call
            `wait` at the end.

    Attributes:
        notes: what was saved beside the checkpoint that was restored.
    """

    def __init__(
        self, folder: checkpoints.Folder, keep: int = 2, *, asynchronous: bool = False
    ):
        self._files = checkpoints.Checkpoints(folder, keep, asynchronous=asynchronous)
        self.notes: dict[str, Any] = {}

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self._files.folder

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint's arrays, damaged or not; None if there is none. One
        that is being written is not yet there."""
        steps = self._files.steps()
        return self._files.arrays(steps[-1]) if steps else None

    def save(
        self,
        done: int,
        training: Training,
        state: TrainingState,
        notes: dict[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint.

        Args:
            done: how many epochs, or whatever the run counts, are done.
            training: as it is by now.
            state: of the training.
            notes: JSON values that the run needs to go on.

        Raises:
            ValueError, OSError: as `checkpoints.Checkpoints.save`.
        """
        alive = {n: flags.astype(int).tolist() for n, flags in training.alive.items()}
        record = {
            "alive": alive,
            "gating": _described(training),
            "notes": {} if notes is None else notes,
        }
        here = training.placement.on_host(state)
        self._files.save(done, here._asdict(), record)

    def wait(self) -> None:
        """Returns when all that was saved is on the disk.

        Raises:
            OSError: as `save`.
        """
        self._files.wait()

    def restore(
        self, training: Training, key: PRNGKeyArray
    ) -> tuple[Training, TrainingState, int]:
        """The training and the state of the newest checkpoint that is whole, and how
        much was done; without one, the start of the training, and 0.

        Args:
            training: as it was at the start.
            key: from which all that is random is derived; the one of a checkpoint is
                in its state.

        Raises:
            ValueError: if the checkpoint is of another training.
        """
        smaller = training

        def like(record: dict[str, Any]) -> dict[str, Any]:
            nonlocal smaller
            smaller = self._of(training, record)
            return smaller.start(key)._asdict()

        found = self._files.restore(
            like, lambda line: warnings.warn(line, stacklevel=3)
        )
        if found is None:
            return training, training.start(key), 0
        done, arrays, record = found
        self.notes = record["notes"]
        state = TrainingState(**jax.tree.map(_own, arrays))
        return smaller, smaller.placed(state), done

    def _of(self, training: Training, record: dict[str, Any]) -> Training:
        """The training at the width of a checkpoint."""
        if not {"alive", "gating", "notes"} <= record.keys():
            raise ValueError(
                f"{self._files.folder} holds checkpoints of something else than a "
                "Training; choose another folder"
            )
        alive = {n: np.asarray(flags, bool) for n, flags in record["alive"].items()}
        sizes = {name: len(flags) for name, flags in alive.items()}
        here = {name: len(flags) for name, flags in training.alive.items()}
        for what, saved, now in (
            ("groups", sizes, here),
            ("gates", record["gating"], _described(training)),
        ):
            if saved != now:
                raise ValueError(
                    f"{self._files.folder} holds a checkpoint of another training: its "
                    f"{what} are {saved}, and here they are {now}"
                )
        return training.at(alive)


def _own(array: Any) -> jax.Array:
    """A buffer that a step may be given."""
    return jax.numpy.array(array, copy=True)


def _described(training: Training) -> str:
    gating = training.gating
    return f"{type(gating).__name__}({getattr(gating, 'gate', '')})"
