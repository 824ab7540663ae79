"""Shrunk models and checkpoints: the only file that touches the disk.

A model is a folder of two files that need neither pickle nor training code to read:
`architecture.json`, the name and the arguments of its constructor, and
`arrays.safetensors`, its arrays by dotted path.

A checkpoint is written by Orbax. Beside it lies a digest of its files, written last:
a checkpoint that was cut short has none, or one that no longer fits.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from l0jax import models, units

ARCHITECTURE = "architecture.json"
ARRAYS = "arrays.safetensors"


def save(model: nnx.Module, folder: Path | str) -> None:
    """Writes `model`, an instance of one of `l0jax.models.MODELS`, into `folder`.

    Raises:
        ValueError: if its class is not in `MODELS`.
    """
    folder = Path(folder)
    name = models.name_of(model)
    assert isinstance(model, models.Model)
    architecture = {"model": name, "arguments": model.architecture}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ARCHITECTURE).write_text(json.dumps(architecture, indent=2) + "\n")
    leaves = units.arrays(nnx.state(model))
    # safetensors stores the buffer as it lies; a transposed view would come back wrong.
    save_file(
        {path: np.ascontiguousarray(leaf) for path, leaf in leaves.items()},
        folder / ARRAYS,
    )


def load(folder: Path | str) -> models.Model:
    """The model that `save` wrote into `folder`.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if a file can't be read, or arrays and architecture disagree.
    """
    folder = Path(folder)
    for name in (ARCHITECTURE, ARRAYS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no saved model: {name} is missing")
    try:
        described = json.loads((folder / ARCHITECTURE).read_text())
        stored = load_file(folder / ARRAYS)
        name, arguments = described["model"], described["arguments"]
        abstract = nnx.eval_shape(
            lambda: models.make(name, arguments, rngs=nnx.Rngs(0))
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder}: the saved model is damaged: {type(error).__name__}: {error}"
        ) from error
    graph, state = nnx.split(abstract)
    expected = {path: leaf.shape for path, leaf in units.arrays(state).items()}
    found = {path: array.shape for path, array in stored.items()}
    if expected != found:
        wrong = sorted(
            path
            for path in expected.keys() | found.keys()
            if expected.get(path) != found.get(path)
        )[0]
        raise ValueError(
            f"{folder}: arrays and architecture disagree at {wrong!r}: the file holds "
            f"{found.get(wrong, 'nothing')}, the architecture says "
            f"{expected.get(wrong, 'nothing')}"
        )
    filled = jax.tree_util.tree_map_with_path(
        lambda key_path, _: jax.numpy.asarray(stored[units.path_of(key_path)]), state
    )
    model = nnx.merge(graph, filled)
    try:
        models.check(model)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return model


class Checkpoints:
    """The checkpoints of one run: `folder/<step>/`, the newest `keep` of them.

    Args:
        folder: where they lie; made when the first one is saved.
        keep: how many are kept. At least two, so that one is left if the newest turns
            out to be damaged.
    """

    def __init__(self, folder: Path | str, keep: int = 2):
        if keep < 2:
            raise ValueError(f"keep must be at least 2, got {keep}")
        self.folder = Path(folder).absolute()
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were begun, oldest first."""
        return sorted(
            int(entry.name)
            for entry in self.folder.glob("*")
            if entry.is_dir() and entry.name.isdigit()
        )

    def save(self, step: int, state: PyTree, notes: dict[str, Any]) -> None:
        """Writes the arrays of `state` and the JSON values of `notes`."""
        checkpointer = _checkpointer()
        target = self.folder / str(step)
        checkpointer.save(target, _to_arrays(state), force=True)
        checkpointer.wait_until_finished()
        record = {"digest": _digest(target), "notes": notes}
        _write_whole(self._record(step), json.dumps(record) + "\n")
        for old in self.steps()[: -self.keep]:
            self._record(old).unlink(missing_ok=True)
            shutil.rmtree(self.folder / str(old))

    def restore(
        self, like: PyTree, warn: Callable[[str], None]
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest checkpoint that is whole: its step, state and notes.

        Args:
            like: a state of the same structure, shapes and dtypes.
            warn: told, in a line each, which damaged checkpoints were passed over.

        Returns:
            None if there is no whole checkpoint.
        """
        for step in reversed(self.steps()):
            target = self.folder / str(step)
            try:
                record = json.loads(self._record(step).read_text())
            except (OSError, ValueError):
                record = {}
            if record.get("digest") != _digest(target):
                warn(f"checkpoint {target} is damaged; going back to the one before")
                continue
            restored = _checkpointer().restore(target, _to_arrays(like))
            return step, _from_arrays(restored, like), record["notes"]
        return None

    def _record(self, step: int) -> Path:
        return self.folder / f"{step}.json"


def _checkpointer():
    # Imported here: reading a saved model must not need it, nor wait for it.
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer()


def _to_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """Leaves by path: Orbax then need not know our named tuples."""
    return {path: np.asarray(leaf) for path, leaf in units.arrays(tree).items()}


def _from_arrays(leaves: dict[str, Any], like: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda key_path, old: jax.numpy.asarray(
            leaves[units.path_of(key_path)], dtype=old.dtype
        ),
        like,
    )


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            total.update(str(file.relative_to(folder)).encode() + b"\0")
            total.update(file.read_bytes())
    return total.hexdigest()


def _write_whole(file: Path, text: str) -> None:
    """Writes a file so that a reader sees all of it or none."""
    scratch = file.with_suffix(".part")
    scratch.write_text(text)
    scratch.replace(file)
