"""Data that don't fit into memory: batches of a Grain pipeline, on the device before
they are asked for, from a position that is kept with a checkpoint."""

import functools
import itertools
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from l0jax import encoding, units
from l0jax.train.placement import Placement
from l0jax.train.training import Training

if TYPE_CHECKING:
    import grain


class Stream:
    """Batches of a Grain pipeline.

        with Stream(pipeline, training) as stream:
            training, state, done = checkpoints.restore(training, key)
            if done:
                stream.set_state(checkpoints.notes["stream"])
            for epoch in range(done, epochs):
                state, totals = training.epoch(state, stream.take(steps))
                training, state = training.compact(state)
                notes = {"stream": stream.get_state()}
                checkpoints.save(epoch + 1, training, state, notes)

    A thread takes batches from the pipeline and puts them where the mesh wants them,
    while a step runs. It ends with the stream, as the pipeline's own processes do:
    `with`, or `close`. Needs the extra `l0jax[pipelines]`.

    Args:
        pipeline: a `grain.IterDataset` of batches: pytrees of arrays, with the examples
            along their first axes. For more than one pass over the data it has
            `.repeat()`. Of several processes each gives a part of its own.
        training: over whose mesh batches are split; also that of what compaction
            leaves of it.
        ahead: how many batches lie on the device before they are asked for.

    Raises:
        ImportError: if the extra is missing.
        ValueError: if the pipeline is something else, or `ahead` is below 1.
    """

    def __init__(
        self, pipeline: "grain.IterDataset", training: Training, *, ahead: int = 2
    ):
        try:
            import grain
            from absl import flags
        except ImportError as error:
            raise ImportError(
                f'{error.name} is missing: pip install "l0jax[pipelines]"'
            ) from error
        if not isinstance(pipeline, grain.IterDataset):
            raise ValueError(
                f"a grain.IterDataset of batches is wanted, not a "
                f"{type(pipeline).__name__}; a MapDataset becomes one by "
                ".batch(…).to_iter_dataset()"
            )
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, got {ahead}")
        # Grain 0.2.18 reads a flag of absl where it begins a process (its issue 1355).
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        placed = grain.experimental.ThreadPrefetchIterDataset(
            pipeline.map(functools.partial(_placed, training.placement)),
            prefetch_buffer_size=ahead,
        )
        self._iterator: grain.DatasetIterator | None = iter(placed)
        # What was taken from them to see what comes next.
        self._seen: list[PyTree] = []
        self._position: dict[str, Any] = {}

    @property
    def _batches(self) -> "grain.DatasetIterator":
        if self._iterator is None:
            raise ValueError("the stream is closed")
        return self._iterator

    # ------------------------------------------------------------------ batches

    def __iter__(self) -> Iterator[PyTree]:
        return self

    def __next__(self) -> PyTree:
        """The next batch, on the device.

        Raises:
            StopIteration: if the pipeline has ended.
            ValueError: if the examples of a batch can't be split over the mesh, or the
                stream is closed; and whatever the pipeline raises.
        """
        return self._seen.pop() if self._seen else next(self._batches)

    def take(self, steps: int) -> Iterator[PyTree]:
        """So many batches, such as those of an epoch.

        Raises:
            ValueError: if the pipeline ends before; as `next`.
        """
        for step in range(steps):
            try:
                batch = next(self)
            except StopIteration:
                raise ValueError(
                    f"the pipeline has ended after {step} of the {steps} batches that "
                    "were asked for: ask for fewer, let it .repeat(), or give it more "
                    "examples than one batch has"
                ) from None
            yield batch

    # ------------------------------------------------------------------ the position

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON values, for the notes of a checkpoint: before the batch
        that comes next, of which there is a checksum. Of several processes all call it,
        and get the positions of all.
        """
        self._look()
        return {"processes": _of_all({"position": self._position, "next": self._next})}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position: the next batch is the one that came next there.

        Raises:
            ValueError: if it is the position of another pipeline, which would go on
                with another batch: one with other data, seeds, transformations, batches
                or numbers of workers; or of so many processes as there are not now.
        """
        if state.keys() != {"processes"}:
            raise ValueError(
                "this is no position of a Stream: give what its get_state gave"
            )
        positions = state["processes"]
        if len(positions) != jax.process_count():
            raise ValueError(
                f"the position was saved by {len(positions)} processes, and here are "
                f"{jax.process_count()}: go on with as many, since each has read a "
                "part of its own"
            )
        own = positions[jax.process_index()]
        self._seen.clear()
        try:
            self._batches.set_state(own["position"])
            self._look()
        # A pipeline's stages raise types of their own.
        except Exception as error:
            raise ValueError(
                "the pipeline can't go on from the position that was saved "
                f"({type(error).__name__}: {error}): give the pipeline that was saved, "
                "with as many workers"
            ) from error
        if self._next != own["next"]:
            raise ValueError(
                "the pipeline goes on with another batch than the one that came next "
                "when its position was saved: give the same data, seeds, "
                "transformations, size of batches and number of workers"
            )

    def _look(self) -> None:
        """Takes the batch that comes next, without giving it away."""
        if not self._seen:
            self._position = self._batches.get_state()
            self._seen = list(itertools.islice(self._batches, 1))

    @property
    def _next(self) -> int | None:
        return _checksum(self._seen[0]) if self._seen else None

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Ends the thread, and the processes of the pipeline."""
        self._seen.clear()
        if self._iterator is not None:
            self._iterator.close()
            # Grain's closes itself once more when it is deleted, for which it is too
            # late while Python ends.
            self._iterator = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()


def _placed(placement: Placement, batch: PyTree) -> PyTree:
    return jax.device_put(batch) if placement.mesh is None else placement.split(batch)


def _checksum(batch: PyTree) -> int:
    """Of the examples that this process has."""
    found = 0
    for path, leaf in units.arrays(batch).items():
        found = zlib.crc32(f"{path} {leaf.dtype} {leaf.shape}".encode(), found)
        # Devices that have the same examples count once.
        parts = {str(part.index): part.data for part in leaf.addressable_shards}
        for part in parts.values():
            found = zlib.crc32(np.asarray(part).tobytes(), found)
    return found


def _of_all(own: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process has, in every one."""
    if jax.process_count() == 1:
        return [own]
    text = np.frombuffer(encoding.sealed(own).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(text.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [
        encoding.opened(row[:size].tobytes())
        for row, size in zip(rows, sizes, strict=True)
    ]
