"""Shrunk models and checkpoints: the only file that touches the disk.

A model is a folder of files that need neither pickle nor training code to read:
`architecture.json`, the name and the arguments of its constructor, and
`arrays.safetensors`, its arrays by dotted path. Of a function that no constructor
makes, the architecture is a third file: its program, exported by `jax.export`.

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
import jax.export
import numpy as np
from flax import nnx
from jaxtyping import PyTree
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from l0jax import models, units

ARCHITECTURE = "architecture.json"
ARRAYS = "arrays.safetensors"
PROGRAM = "program.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


def save(model: nnx.Module, folder: Path | str) -> None:
    """Writes `model`, an instance of one of `l0jax.models.MODELS`, into `folder`.

    Raises:
        ValueError: if its class is not in `MODELS`.
    """
    folder = Path(folder)
    name = models.name_of(model)
    assert isinstance(model, models.Model)
    architecture = {"model": name, "arguments": model.architecture}
    _write(folder, architecture, nnx.state(model))


def save_function(
    function: Callable[..., PyTree],
    params: PyTree,
    *inputs: PyTree,
    folder: Path | str,
    any_batch: bool = True,
) -> None:
    """Writes any function, such as `l0jax.narrow` gives, and its parameters.

    Args:
        function: `function(params, *inputs)`.
        params: a pytree of arrays.
        *inputs: an example of the inputs: arrays or their shapes.
        folder: where to.
        any_batch: whether the leading axis of the inputs may later have any size; else
            all sizes are those of the example.

    Raises:
        ValueError: if JAX can't export the function for a batch of any size.
    """
    folder = Path(folder)
    paths = [*units.arrays(params)]
    tree = jax.tree.structure(params)

    def of_list(leaves, *inputs):
        return function(jax.tree.unflatten(tree, leaves), *inputs)

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jax.tree.leaves(params)]
    try:
        exported = jax.export.export(jax.jit(of_list), platforms=PLATFORMS)(
            shapes, *_shapes(inputs, any_batch)
        )
    except jax.errors.InconclusiveDimensionOperation as error:
        raise _needs_its_batch(error) from error
    program = exported.serialize()
    architecture = {
        "program": PROGRAM,
        "sha256": hashlib.sha256(program).hexdigest(),
        "jax": jax.__version__,
        "arrays": paths,
    }
    _write(folder, architecture, params)
    (folder / PROGRAM).write_bytes(program)


def save_onnx(
    function: Callable[..., PyTree],
    params: PyTree,
    *inputs: PyTree,
    file: Path | str,
    any_batch: bool = True,
) -> float:
    """Writes a function and its parameters as ONNX, and runs the file to check it.

    Needs the extra `l0jax[onnx]`: jax2onnx to convert, ONNX Runtime to check. Inputs
    and outputs of the file are the leaves of the pytrees, in their order.

    Args:
        function: `function(params, *inputs)`.
        params: a pytree of arrays; constants of the file.
        *inputs: arrays on which the file is checked against `function`.
        file: where to, such as `network.onnx`.
        any_batch: whether the leading axis of the inputs may later have any size; else
            all sizes are those of `inputs`. The check then runs on two sizes.

    Returns:
        The largest difference that was found, relative to the largest output.

    Raises:
        ImportError: if the extra is missing.
        ValueError: if the file's outputs differ from the function's by more than 1e-4
            of the largest, or are of other shapes.
    """
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f'{error.name} is missing: pip install "l0jax[onnx]"'
        ) from error
    tree = jax.tree.structure(inputs)

    def of_leaves(*leaves):
        return jax.tree.leaves(function(params, *jax.tree.unflatten(tree, leaves)))

    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
    try:
        jax2onnx.to_onnx(
            of_leaves,
            _shapes(leaves, any_batch),
            model_name=file.stem,
            return_mode="file",
            output_path=str(file),
        )
    except jax.errors.InconclusiveDimensionOperation as error:
        raise _needs_its_batch(error) from error
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    twice = [np.concatenate([a, a]) if a.ndim else a for a in leaves]
    compiled, worst = jax.jit(of_leaves), 0.0
    for given in (leaves, twice) if any_batch else (leaves,):
        found: Any = session.run(None, dict(zip(names, given, strict=True)))
        expected = [np.asarray(out) for out in compiled(*given)]
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            if a.shape != b.shape:
                raise ValueError(
                    f"{file}: output {number} is of shape {a.shape} in ONNX Runtime, "
                    f"{b.shape} in JAX"
                )
            scale = max(float(np.abs(b).max(initial=0)), 1e-30)
            worst = max(worst, float(np.abs(a - b).max(initial=0)) / scale)
    if not worst <= 1e-4:
        raise ValueError(
            f"{file}: its outputs in ONNX Runtime differ from JAX's by {worst:.1e} of "
            "the largest; at most 1e-4 was expected"
        )
    return worst


def _shapes(inputs: PyTree, any_batch: bool) -> PyTree:
    """Shapes of inputs, their leading axis of a size that is not known yet."""
    (batch,) = jax.export.symbolic_shape("batch", scope=jax.export.SymbolicScope())

    def shape(leaf):
        free = any_batch and len(leaf.shape)
        sizes = (batch, *leaf.shape[1:]) if free else leaf.shape
        return jax.ShapeDtypeStruct(sizes, leaf.dtype)

    return jax.tree.map(shape, inputs)


def _needs_its_batch(error: Exception) -> ValueError:
    return ValueError(
        f"the function needs to know the size of its batch ({error}); save it with "
        "any_batch=False"
    )


class Program:
    """A function that was read from a folder, with its parameters.

    Attributes:
        params: its arrays by dotted path.
    """

    def __init__(self, exported: jax.export.Exported, params: dict[str, jax.Array]):
        self._exported = exported
        self.params = params

    def __call__(self, *inputs: PyTree) -> PyTree:
        """The function of these inputs."""
        return self._exported.call(list(self.params.values()), *inputs)


def _write(folder: Path, architecture: dict[str, Any], tree: PyTree) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ARCHITECTURE).write_text(json.dumps(architecture, indent=2) + "\n")
    # safetensors stores the buffer as it lies; a transposed view would come back wrong.
    save_file(
        {p: np.ascontiguousarray(leaf) for p, leaf in units.arrays(tree).items()},
        folder / ARRAYS,
    )


def load(folder: Path | str) -> "models.Model | Program":
    """The model that `save` wrote into `folder`, or the function of `save_function`.

    Raises:
        FileNotFoundError: if one of the files is missing.
        ValueError: if a file can't be read, or arrays and architecture disagree.
    """
    folder = Path(folder)
    for name in (ARCHITECTURE, ARRAYS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no saved model: {name} is missing")
    try:
        described = json.loads((folder / ARCHITECTURE).read_text())
        stored = load_file(folder / ARRAYS)
        abstract: Any = None
        if "program" not in described:
            name, arguments = described["model"], described["arguments"]
            abstract = nnx.eval_shape(
                lambda: models.make(name, arguments, rngs=nnx.Rngs(0))
            )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder}: the saved model is damaged: {type(error).__name__}: {error}"
        ) from error
    if abstract is None:
        return _program(folder, described, stored)
    graph, state = nnx.split(abstract)
    _compare(folder, units.arrays(state), stored)
    filled = jax.tree_util.tree_map_with_path(
        lambda key_path, _: jax.numpy.asarray(stored[units.path_of(key_path)]), state
    )
    model = nnx.merge(graph, filled)
    try:
        models.check(model)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return model


def _program(folder: Path, described: dict[str, Any], stored: dict) -> Program:
    if not (folder / PROGRAM).is_file():
        raise FileNotFoundError(f"{folder} holds no saved model: {PROGRAM} is missing")
    program = (folder / PROGRAM).read_bytes()
    if hashlib.sha256(program).hexdigest() != described.get("sha256"):
        raise ValueError(
            f"{folder}: the saved model is damaged: {PROGRAM} is not what was saved"
        )
    exported = jax.export.deserialize(bytearray(program))
    # Its first arguments are the arrays, one by one.
    paths = described.get("arrays", [])
    expected = dict(zip(paths, exported.in_avals, strict=False))
    _compare(folder, expected, stored)
    params = {path: jax.numpy.asarray(stored[path]) for path in expected}
    return Program(exported, params)


def _compare(folder: Path, architecture: dict[str, Any], stored: dict) -> None:
    """Raises ValueError unless the arrays are those of the architecture."""
    expected = {path: tuple(leaf.shape) for path, leaf in architecture.items()}
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
        self, like: Callable[[dict[str, Any]], PyTree], warn: Callable[[str], None]
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest checkpoint that is whole: its step, state and notes.

        Args:
            like: a state of the same structure, shapes and dtypes, from the notes that
                were saved with it.
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
            state = like(record["notes"])
            restored = _checkpointer().restore(target, _to_arrays(state))
            return step, _from_arrays(restored, state), record["notes"]
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
