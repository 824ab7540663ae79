"""Checkpoints: states of a run on the disk, of which the newest whole one is found.

The arrays are written by Orbax. Beside them lies a record of what they are, with the
digest of their files, written last: a checkpoint that was cut short has none, or one
that does not fit.
"""

import copy
import hashlib
import shutil
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
    """The checkpoints of one run: `folder/<step>/`, the newest `keep` of them.

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

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were begun, oldest first."""
        return sorted(
            int(entry.name) for entry in self.folder.glob("*") if _is_step(entry)
        )

    def save(self, step: int, state: PyTree, notes: dict[str, Any]) -> None:
        """Writes the arrays of `state` and the JSON values of `notes`.

        Of several processes all call it, with the same values, and see one folder; the
        first one writes.

        Raises:
            ValueError: if an array is of a dtype that can't be stored, or that JAX as
                it is set up does not have; if JSON would not give `notes` back.
            OSError: if it can't be written, as on a full disk. The checkpoints before
                it stay. What another thread meets is raised by whatever waits for it,
                and a warning says it at once.
        """
        described, arrays = encoding.encode_all(state)
        record: dict[str, Any] = {"arrays": described, "notes": notes}
        encoding.sealed(record)
        arrays = {path: _plain(a) for path, a in arrays.items() if a.size}
        if self._writer is None:
            self._write_together(step, record, arrays)
            return
        self.wait()
        # Whoever trains on may give the buffers away, and change the notes.
        mine = copy.deepcopy(record), jax.tree.map(np.array, arrays)
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
        records = {int(e.stem) for e in self.folder.glob("*.json") if _is_of_step(e)}
        for step in sorted({*self.steps(), *records}, reverse=True):
            target = self.folder / str(step)
            text = b""
            try:
                text = files.read(self._record(step), encoding.LARGEST_RECORD)
                record = _opened(target, text)
            except (OSError, ValueError) as error:
                if _is_older(target, text):
                    raise ValueError(
                        f"checkpoint {target} was written by an older version of "
                        "l0jax: end the run with that one, or begin it anew elsewhere"
                    ) from error
                why = " ".join(str(error).split())
                warn(
                    f"checkpoint {target} is damaged; going back to the one before: "
                    f"{why}"
                )
                continue
            state = like(record["notes"])
            return step, _restored(target, record["arrays"], state), record["notes"]
        return None

    def _write_together(self, step: int, record: dict, arrays: dict) -> None:
        """Of several processes the first writes; if it can't, all raise."""
        failed = None
        if jax.process_index() == 0:
            try:
                self._write(step, record, arrays)
            except OSError as error:
                failed = error
        if jax.process_count() > 1:
            at_first = multihost_utils.broadcast_one_to_all(failed is not None)
            if at_first and failed is None:
                failed = OSError(
                    f"checkpoint {self.folder / str(step)} can't be written by the "
                    "first process, which says why"
                )
        if failed is not None:
            raise failed

    def _write(self, step: int, record: dict, arrays: dict) -> None:
        target = self.folder / str(step)
        try:
            _write_arrays(target, arrays)
            record |= {"bytes": _bytes(target), "files": _digest(target)}
            files.write(self._record(step), encoding.sealed(record).encode())
        # Whatever Orbax and what is below it raise where there is no room.
        except Exception as error:
            for part in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)
            why = str(error).strip().splitlines()[-1:]
            raise OSError(
                f"checkpoint {target} can't be written ({' '.join(why)}); those before "
                "it are as they were: make room, and go on from the newest"
            ) from error
        for old in self.steps()[: -self.keep]:
            self._record(old).unlink(missing_ok=True)
            shutil.rmtree(self.folder / str(old))

    def _record(self, step: int) -> Path:
        return self.folder / f"{step}.json"


def _say(written: Future[None]) -> None:
    """At once: nobody may ask for what has failed."""
    error = written.exception()
    if error is not None:
        warnings.warn(str(error), stacklevel=2)


def _opened(target: Path, text: bytes) -> dict[str, Any]:
    """The record of a checkpoint that is whole."""
    record = encoding.opened(text)
    if record.keys() != {"arrays", "notes", "bytes", "files"}:
        raise ValueError(f"its record holds {', '.join(record)}")
    encoding.check_descriptions(record["arrays"])
    # In this order: what is of another size may take forever to read.
    if _bytes(target) != record["bytes"] or _digest(target) != record["files"]:
        raise ValueError("its files are not those that were saved")
    return record


def _is_step(entry: Path) -> bool:
    return entry.is_dir() and _is_number(entry.name)


def _is_of_step(entry: Path) -> bool:
    return entry.is_file() and _is_number(entry.stem)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name


def _is_older(target: Path, text: bytes) -> bool:
    """Whether it is the record of a whole checkpoint of the first version."""
    try:
        record = encoding.parsed(text)
    except ValueError:
        return False
    return record.keys() == {"digest", "notes"} and record["digest"] == _digest(target)


def _checkpointer():
    # Imported here: it takes a second, and a first step need not wait for it.
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    # What it is given is on this host: it need not wait for the others.
    here = jax.process_index()
    return ocp.StandardCheckpointer(
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=here,
            active_processes={here},
            barrier_sync_key_prefix=f"process{here}",
        )
    )


# What Orbax stores under names of its own, on every platform.
_PLAIN = {"bool", "bfloat16", *(np.dtype(code).name for code in "bhilqBHILQefdFD")}


def _plain(array: np.ndarray) -> np.ndarray:
    """What Orbax stores: the raw bytes of an array whose dtype it does not know."""
    if array.dtype.name in _PLAIN:
        return array
    return array[..., None].view(np.uint8)


def _write_arrays(target: Path, arrays: dict[str, np.ndarray]) -> None:
    if not arrays:  # Orbax has no checkpoint of nothing.
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        return
    checkpointer = _checkpointer()
    checkpointer.save(target, arrays, force=True)
    checkpointer.wait_until_finished()


def _restored(
    target: Path, described: dict[str, encoding.Description], like: PyTree
) -> PyTree:
    """The state of a whole checkpoint, in the structure of `like`."""
    empty = {
        path: np.zeros(each["shape"], encoding.DTYPES[each["dtype"]])
        for path, each in described.items()
    }
    wanted = {path: _plain(array) for path, array in empty.items() if array.size}
    try:
        found = _checkpointer().restore(target, wanted) if wanted else {}
        arrays = {
            path: encoding.decode(path, each, _stored(found.get(path, empty[path])))
            for path, each in described.items()
        }
    # Whatever a version of Orbax raises that reads other files than this one.
    except Exception as error:
        raise ValueError(
            f"checkpoint {target} is what was saved, but can't be read: "
            f"{type(error).__name__}: {error}"
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


def _stored(array: Any) -> Any:
    return encoding.bytes_of(np.ascontiguousarray(array))


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder))


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for file in _files(folder):
        total.update(str(file.relative_to(folder)).encode() + b"\0")
        total.update(file.read_bytes())
    return total.hexdigest()
