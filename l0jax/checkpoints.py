"""Checkpoints: states of a run on the disk, of which the newest whole one is found.

The arrays are one file in the format of safetensors. Beside it lies a record of what
they are, with the digest of each, written last: a checkpoint that was cut short has
none, or one that does not fit.
"""

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from l0jax import encoding, files, units

Folder = Path | str


class Checkpoints:
    """The checkpoints of one run: `folder/<step>.safetensors`, the newest `keep` of
    them.

    Args:
        folder: where they lie; made when the first one is saved.
        keep: how many are kept. At least two, so that one is left if the newest turns
            out to be damaged.
        asynchronous: whether `save` returns once it has copied the state, while
            another thread writes it. One is written at a time: `save` waits for the one
            before, and `wait` for the last. Of several processes all wait.

    Raises:
        ValueError: if fewer than two are to be kept.
    """

    def __init__(self, folder: Folder, keep: int = 2, *, asynchronous: bool = False):
        if keep < 2:
            raise ValueError(f"keep must be at least 2, got {keep}")
        self.folder = Path(folder).absolute()
        self.keep = keep
        self._writer = None
        if asynchronous and jax.process_count() == 1:
            self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        self._known: set[int] = set()  # Steps that were written or looked at here.

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were begun, oldest first."""
        return sorted(
            int(file.stem) for file in self.folder.glob("*.safetensors") if _is_of(file)
        )

    def save(self, step: int, state: PyTree, notes: dict[str, Any]) -> None:
        """Writes the arrays of `state` and the JSON values of `notes`.

        Of several processes all call it, with the same values, and see one folder; the
        first one writes.

        Raises:
            ValueError: if an array is of a dtype that can't be stored, or that JAX as
                it is set up does not have; if JSON would not give `notes` back; if
                there is a checkpoint of a later step that was neither written nor
                looked at by `restore` here, as of another run.
            OSError: if it can't be written, as on a full disk. The checkpoints before
                it stay. What another thread meets is raised by whatever waits for it,
                and a warning says it at once.
        """
        described, arrays = encoding.describe_all(state)
        encoding.sealed({"arrays": described, "notes": notes})
        if self._writer is None:
            self._write_together(step, notes, described, arrays)
            return
        self.wait()
        self._check_order(step)
        # Whoever trains on may give the buffers away, and change the notes.
        mine = copy.deepcopy(notes), described, jax.tree.map(np.array, arrays)
        self._writing = self._writer.submit(self._write, step, *mine)
        self._writing.add_done_callback(_say)

    def wait(self) -> None:
        """Returns when what was saved is on the disk.

        Raises:
            OSError: as `save`.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def restore(
        self, like: Callable[[dict[str, Any]], PyTree], warn: Callable[[str], None]
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest checkpoint that is whole: its step, state and notes.

        Args:
            like: a state of the same structure, shapes and dtypes, from the notes that
                were saved with it.
            warn: told, in a line each, which damaged checkpoints were passed over.

        Returns:
            None if there is no whole checkpoint.

        Raises:
            ValueError: if a whole checkpoint was written by an older version, or is of
                another state than `like` gives.
        """
        self.wait()
        records = {int(e.stem) for e in self.folder.glob("*.json") if _is_of(e)}
        there = {*self.steps(), *records}
        self._known |= there
        for step in sorted(there, reverse=True):
            target = self.arrays(step)
            try:
                record, parts = self._opened(step)
            except (OSError, ValueError) as error:
                if (self.folder / str(step)).is_dir():
                    raise ValueError(
                        f"checkpoint {self.folder / str(step)} was written by an older "
                        "version of l0jax: end the run with that one, or begin it anew "
                        "elsewhere"
                    ) from error
                why = " ".join(str(error).split())
                warn(
                    f"checkpoint {target} is damaged; going back to the one before: "
                    f"{why}"
                )
                continue
            state = like(record["notes"])
            found = _restored(target, record["arrays"], parts, state)
            return step, found, record["notes"]
        return None

    def _opened(self, step: int) -> tuple[dict[str, Any], dict[str, memoryview]]:
        """The record of a checkpoint that is whole, and the bytes of its arrays."""
        record = encoding.opened(
            files.read(self._record(step), encoding.LARGEST_RECORD)
        )
        if record.keys() != {"arrays", "notes"}:
            raise ValueError(f"its record holds {', '.join(record)}")
        described = record["arrays"]
        encoding.check_descriptions(described)
        content = files.read(self.arrays(step), encoding.length(described))
        return record, encoding.apart(described, content)

    def _write_together(self, step: int, *parts: Any) -> None:
        """Of several processes the first writes; if it can't, all raise."""
        failed = None
        if jax.process_index() == 0:
            try:
                self._check_order(step)
                self._write(step, *parts)
            # Whatever it is: the others would wait for ever.
            except Exception as error:
                failed = error
        if jax.process_count() > 1:
            at_first = multihost_utils.broadcast_one_to_all(failed is not None)
            if at_first and failed is None:
                failed = OSError(
                    f"checkpoint {self.arrays(step)} can't be written by the first "
                    "process, which says why"
                )
        if failed is not None:
            raise failed

    def _check_order(self, step: int) -> None:
        """Raises ValueError where the newest are another run's: they would be kept, and
        restored, in place of those of this one."""
        newest = max(self.steps(), default=step)
        if newest > step and newest not in self._known:
            raise ValueError(
                f"{self.folder} holds a checkpoint of step {newest}, and a run that "
                f"didn't begin with it is to save step {step} there: call restore "
                "first, or choose another folder"
            )
        self._known.add(step)

    def _write(self, step: int, notes: Any, described: dict, arrays: dict) -> None:
        described = encoding.digested(described, arrays)
        record = encoding.sealed({"arrays": described, "notes": notes})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write(self.arrays(step), *encoding.parts(described, arrays))
            files.write(self._record(step), record.encode())
        except OSError as error:
            raise OSError(
                f"checkpoint {self.arrays(step)} can't be written ({error}); those "
                "before it are as they were: make room, and go on from the newest"
            ) from error
        # One that was cut short is none of those that are kept.
        whole = [each for each in self.steps() if self._record(each).exists()]
        for old in set(self.steps()) - {step, *whole[-self.keep :]}:
            self._record(old).unlink(missing_ok=True)
            self.arrays(old).unlink()

    def arrays(self, step: int) -> Path:
        """The file with the arrays of a checkpoint."""
        return self.folder / f"{step}.safetensors"

    def _record(self, step: int) -> Path:
        return self.folder / f"{step}.json"


def _say(written: Future[None]) -> None:
    """At once: nobody may ask for what has failed."""
    error = written.exception()
    if error is not None:
        warnings.warn(str(error), stacklevel=2)


def _is_of(file: Path) -> bool:
    """Whether it is of a checkpoint, by its name."""
    name = file.stem
    number = name.isascii() and name.isdigit() and str(int(name)) == name
    return number and file.is_file()


def _restored(
    target: Path,
    described: dict[str, encoding.Description],
    parts: dict[str, memoryview],
    like: PyTree,
) -> PyTree:
    """The state of a whole checkpoint, in the structure of `like`."""
    try:
        arrays = {
            p: encoding.decode(p, described[p], part) for p, part in parts.items()
        }
    except ValueError as error:
        raise ValueError(
            f"checkpoint {target} is what was saved, but can't be read: {error}"
        ) from error
    kinds = {p: (np.shape(leaf), leaf.dtype) for p, leaf in units.arrays(like).items()}
    held = {path: (array.shape, array.dtype) for path, array in arrays.items()}
    for path in sorted(kinds.keys() | held.keys()):
        if kinds.get(path) != held.get(path):
            raise ValueError(
                f"checkpoint {target} and the state to restore disagree at {path!r}: "
                f"the checkpoint holds {held.get(path, 'nothing')}, the state "
                f"{kinds.get(path, 'nothing')}"
            )
    return jax.tree_util.tree_map_with_path(
        lambda key_path, _: arrays[units.path_of(key_path)], like
    )
