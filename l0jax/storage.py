"""Shrunk models and functions on the disk.

A model is a folder of files that need neither pickle nor training code to read:
`architecture.json`, the name and the arguments of its constructor, and
`arrays.safetensors`, its arrays by dotted path. Of a user's own module the architecture
is its attributes, to be put into another module of its class. Of a function that no
constructor makes, it is a third file: its program, exported by `jax.export`.
`architecture.json` also says what each array is, and holds digests of all there is and
of itself: whatever changes by accident, be it one bit of any file, is noticed when the
folder is read.
"""

import dataclasses
import enum
import functools
import hashlib
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core import FrozenDict
from jaxtyping import PyTree

from l0jax import encoding, exporting, files, models, units
from l0jax.exporting import Program as Program
from l0jax.narrowed import Narrowed

ARCHITECTURE = "architecture.json"
ARRAYS = "arrays.safetensors"
PROGRAM = "program.stablehlo"

Folder = Path | str

# Beyond the arrays of a file, so that one which holds other arrays can be told from one
# that holds anything at all.
MARGIN = 2**24
# Sizes and settings among a model's arguments that no array shows, such as strides.
LARGEST_ARGUMENT = 2**20


# ----------------------------------------------------------------------------- saving


def save(model: nnx.Module, folder: Folder) -> None:
    """Writes any NNX module into `folder`: its arrays, and what its attributes are.

    Numbers, strings and tuples of these are written as they are, also NumPy's. Of
    others there is a description (`attributes_of`), by which `load` tells whether the
    module that it is given has the same.

    One of `l0jax.models.MODELS` is read back by itself; of any other class `load` needs
    a module of any size, such as the one that was shrunk.

    Raises:
        ValueError: if an array is of a dtype that can't be stored, or that JAX as it is
            set up does not have; for a `l0jax.nnx.Narrowed`, which is a program:
            `save_function(*narrowed.function, inputs, folder=folder)` writes it.
    """
    if isinstance(model, Narrowed):
        raise ValueError(
            "a Narrowed module is a program: write it with "
            "save_function(*narrowed.function, inputs, folder=folder)"
        )
    record: dict[str, Any]
    if any(type(model) is kind for kind in models.MODELS.values()):
        assert isinstance(model, models.Model)
        record = {"model": models.name_of(model), "arguments": model.architecture}
    else:
        record = {"class": type(model).__qualname__, "attributes": attributes_of(model)}
        record["complete"] = True
    described, arrays = encoding.encode_all(nnx.state(model))
    parts = {ARRAYS: encoding.pack(described, arrays)}
    _write(Path(folder), parts, {**record, "arrays": described})


def attributes_of(model: nnx.Module) -> dict[str, dict[str, Any]]:
    """The attributes of a module and of all modules within it, by their dotted paths,
    but for arrays and modules.

    Numbers, strings and tuples of these are what they are in JSON. All else is a
    dictionary: of functions and types the name, `{"named": "relu"}`, of other values
    the type and what they consist of, `{"type": "Mode", "is": "FAST"}`; the type alone
    of what does not say what it is.
    """
    found = {}
    for path, module in nnx.iter_modules(model):
        each = {}
        for name, value in sorted(vars(module).items()):
            # (NNX keeps books of its own there.)
            if name.startswith(("_pytree", "_object")):
                continue
            held = bool(vars(module).get("_pytree__nodes", {}).get(name))
            if not (held and isinstance(value, _HELD)):
                each[name] = _described(value, held)
        found[".".join(map(str, path))] = each
    return found


_HELD = (nnx.Variable, nnx.Pytree, jax.Array, np.ndarray)
"""What NNX has in its state, or goes into, where it isn't told to leave it alone."""


def _described(value: Any, held: bool = False) -> Any:
    """A value as JSON: see `attributes_of`.

    Args:
        value: an attribute, or something within one.
        held: whether arrays and modules within it are in the state of the module.
    """
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value).__qualname__
    if isinstance(value, enum.Enum):
        return {"type": kind, "is": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, tuple | list):
        return [_described(each, held) for each in value]
    if held and isinstance(value, _HELD):
        return {"held": kind}
    parts: Any
    if isinstance(value, Mapping):
        keys, values = zip(*_sorted(value), strict=True) if value else ((), ())
        parts = {"keys": list(keys), "values": [_described(v, held) for v in values]}
    elif isinstance(value, set | frozenset):
        parts = {"of": sorted(map(_described, value), key=repr)}
    elif isinstance(value, functools.partial):
        whole = value.func, value.args, value.keywords
        parts = {"of": _described(whole, held)}
    elif isinstance(value, jax.Array | np.ndarray):
        parts = _described_array(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [each.name for each in dataclasses.fields(value)]
        parts = {"of": [[n, _described(getattr(value, n), held)] for n in fields]}
    elif callable(value) and hasattr(value, "__qualname__"):
        return {"named": value.__qualname__}
    else:
        said = repr(value)
        # By default an address, which is another one each time.
        says = type(value).__repr__ is not object.__repr__ and " at 0x" not in said
        parts = {"is": said} if says and not isinstance(value, _HELD) else {}
    return {"type": kind, **parts}


def _described_array(value: Any) -> dict[str, Any]:
    """An array that is no part of a module's state."""
    try:
        return dict(encoding.encode_all({"": value})[0][""])
    except ValueError:  # Such as one of objects.
        return {}


def _sorted(mapping: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """What keys are, and values, in an order that is always the same."""
    pairs = [(_described(key), value) for key, value in mapping.items()]
    return sorted(pairs, key=lambda pair: repr(pair[0]))


def _untold(described: Any) -> list[str]:
    """Of what is described what can't be told apart: functions without a name of their
    own, and what has nothing but a type."""
    found = []
    for each in _values(described):
        if isinstance(each, dict) and each.keys() == {"type"}:
            found.append(each["type"])
        elif isinstance(each, dict) and "<" in str(each.get("named", "")):
            found.append(each["named"])
    return found


def _as_saved(saved: Any, here: Any, was: Any) -> Any:
    """An attribute as a file describes it, in the place of one that is there.

    Args:
        saved: the description of the file.
        here: the description of `was`.
        was: the attribute that is there.

    Raises:
        ValueError: if it is more than numbers and strings in which they differ.
    """
    # (As text: 1, 1.0 and True are equal in Python.)
    if repr(saved) == repr(here):
        return was
    both = isinstance(saved, dict) and isinstance(here, dict)
    if both and type(was) in (dict, FrozenDict) and saved.get("keys") == here["keys"]:
        parts = zip(here["keys"], saved["values"], here["values"], strict=True)
        told = {repr(key): (theirs, ours) for key, theirs, ours in parts}
        made = {}
        for key, value in was.items():
            theirs, ours = told[repr(_described(key))]
            made[key] = _as_saved(theirs, ours, value)
        return type(was)(made)
    if not any(isinstance(each, dict) for each in _values([saved, here])):
        return _as_attribute(saved, was)
    if isinstance(saved, list) and isinstance(here, list):
        each = [_as_saved(*three) for three in zip(saved, here, was, strict=True)]
        return _sequence(each, was)
    raise ValueError(f"{saved!r} can't take the place of {here!r}")


def _as_attribute(value: Any, was: Any) -> Any:
    """A value of JSON, with tuples and numbers of NumPy where there were some."""
    if isinstance(value, list):
        there = list(was) if isinstance(was, tuple | list) else []
        # (Those beyond are as the last.)
        there += [there[-1] if there else None] * len(value)
        each = [_as_attribute(v, w) for v, w in zip(value, there, strict=False)]
        return _sequence(each, was)
    if isinstance(was, np.generic) and type(was.item()) is type(value):
        made = np.asarray(value).astype(was.dtype)[()]
        return made if made.item() == value else value
    return value


def _sequence(each: list[Any], was: Any) -> Any:
    if hasattr(was, "_fields") and len(was) == len(each):
        return type(was)(*each)
    return tuple(each) if isinstance(was, tuple) else each


def save_function(
    function: Callable[..., PyTree],
    params: PyTree,
    *inputs: PyTree,
    folder: Folder,
    any_batch: bool = True,
    batch: PyTree = None,
    dynamic: Mapping[str, PyTree] | None = None,
    derivatives: int = 1,
) -> None:
    """Writes any function, such as `l0jax.narrow` gives, and its parameters.

    What is to be written is read back and run beside the function before anything is
    written: with the inputs that are given, or zeros of their shapes, and with more of
    them along every axis that may vary.

    Args:
        function: `function(params, *inputs)`.
        params: a pytree of arrays.
        *inputs: an example of the inputs: arrays or their shapes.
        folder: where to.
        any_batch: whether the batch may later have any size; else all sizes are those
            of the example.
        batch: the axes of the inputs that are the batch, as `in_axes` of `jax.vmap`:
            `(0, None)` where the second input has none. By default the leading axes of
            all inputs, which then must agree in size, here and in every later call.
        dynamic: other axes that may later have any size, by a name of the size, given
            as `batch` is: `{"tokens": 1}` for the length of texts, or
            `{"tokens": (1, None)}` where the second input has no such axis.
        derivatives: how often the saved function can be differentiated, in reverse
            mode. Programs with one are three to four times as large as without, with
            two up to twelve times: 9, 37 and 105 kB for LeNet-5, whose arrays take
            1.7 MB. A function that has no derivative is saved without, with a warning.

    Raises:
        ValueError: if JAX can't export the function, or not for a batch of any size;
            if inputs differ in the size of their batch; if what was exported can't
            run or gives something else than the function; if an array is of a dtype
            that can't be stored or exported, or that JAX as it is set up does not
            have.
    """
    if derivatives < 0:
        raise ValueError(f"derivatives must be at least 0, got {derivatives}")
    described, arrays = encoding.encode_all(params)
    axes = exporting.axes_of(inputs, any_batch, batch, dynamic or {})
    program, missing = exporting.exported(function, params, inputs, axes, derivatives)
    if missing is not None:
        warnings.warn(
            f"the function is saved without derivatives: it has none of order "
            f"{derivatives} ({type(missing).__name__}: {missing}); derivatives=0 says "
            "that none are wanted",
            stacklevel=2,
        )
        derivatives = 0
    parts = {ARRAYS: encoding.pack(described, arrays), PROGRAM: program}
    record = {
        "program": hashlib.sha256(program).hexdigest(),
        "program bytes": len(program),
        "derivatives": derivatives,
        "jax": jax.__version__,
        "arrays": described,
    }
    stored = encoding.unpack(described, parts[ARRAYS])
    again = exporting.program_of(program, stored, derivatives)
    exporting.check(again, function, params, inputs, axes)
    _write(Path(folder), parts, record)


def save_onnx(
    function: Callable[..., PyTree],
    params: PyTree,
    *inputs: PyTree,
    file: Path | str,
    any_batch: bool = True,
    batch: PyTree = None,
    dynamic: Mapping[str, PyTree] | None = None,
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
        batch, dynamic: which axes those are, as for `save_function`.

    Returns:
        The largest difference that was found, relative to the largest output.

    Raises:
        ImportError: if the extra is missing.
        ValueError: if the file's outputs differ from the function's by more than 1e-4
            of the largest, or are of other shapes; if the inputs differ in the size of
            their batch.
    """
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f'{error.name} is missing: pip install "l0jax[onnx]"'
        ) from error
    tree = jax.tree.structure(inputs)
    axes = exporting.axes_of(inputs, any_batch, batch, dynamic or {})

    def of_leaves(*leaves):
        return jax.tree.leaves(function(params, *jax.tree.unflatten(tree, leaves)))

    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
    shapes = exporting.shapes(tuple(leaves), axes)
    try:
        # A narrowed function is read again for these sizes and remembers it. Within the
        # conversion functions of JAX are others, which no rule knows.
        jax.eval_shape(of_leaves, *shapes)
        jax2onnx.to_onnx(
            of_leaves,
            shapes,
            model_name=file.stem,
            return_mode="file",
            output_path=str(file),
        )
    except (jax.errors.InconclusiveDimensionOperation, ValueError) as error:
        if not any(axes):
            raise
        raise exporting.needs_its_batch(error) from error
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    more = [np.asarray(leaf) for leaf in exporting.grown(tuple(leaves), axes, 1)]
    compiled, worst = jax.jit(of_leaves), 0.0
    for given in (leaves, more) if any(axes) else (leaves,):
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


def _write(folder: Path, parts: dict[str, bytes], record: dict[str, Any]) -> None:
    """Writes the record last, and takes away what belonged to something else."""
    parts = {**parts, ARCHITECTURE: encoding.sealed(record).encode()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in parts.items():
        files.write(folder / name, content)
    for name in {PROGRAM} - parts.keys():
        (folder / name).unlink(missing_ok=True)


# ---------------------------------------------------------------------------- loading


def load(
    folder: Folder, *, like: nnx.Module | None = None, apart: bool = False
) -> "nnx.Module | Program":
    """The model that `save` wrote into `folder`, or the function of `save_function`.

    What has changed by accident is refused, down to a single bit. Someone who means
    harm can make digests fit. No file of arrays and no architecture can then do more
    than hold wrong numbers: sizes are checked before anything is read or built, and a
    model takes as long to build as one with so many arrays does. But a program is code:
    JAX reads it within this process, and a crafted one can crash it, or keep it busy,
    when it is read or first called. Load programs only from where you would run code
    from, or with `apart`, which finds what crashes or hangs when it is read.

    Args:
        folder: where it lies.
        like: a module of the class that was saved, of any size, if that is none of
            `l0jax.models.MODELS`. Arrays, numbers and strings, also in tuples and
            dictionaries, are those of the file. Its code is taken, functions among its
            attributes too, which must have the same names; and all other attributes,
            which must be what the file describes. It isn't changed.
        apart: read a program in a process of its own first, which takes seconds.

    Raises:
        FileNotFoundError: if one of the files is missing.
        ValueError: if a file is not what was saved, or was saved by another version; if
            arrays and architecture disagree; if `like` is missing, needless, of
            another class, or has attributes that are no numbers or strings and are
            something else than those that were saved.

    Warns:
        UserWarning: of attributes of `like` that are taken though they can't be told
            from others: lambdas and other functions without a name of their own,
            objects that don't say what they are, and in a file of an older version
            what that did not describe.
    """
    folder = Path(folder)
    if apart:
        _read_apart(folder)
    for name in (ARCHITECTURE, ARRAYS):
        _check_there(folder, name)
    try:
        record = encoding.opened(
            files.read(folder / ARCHITECTURE, encoding.LARGEST_RECORD)
        )
        _check_record(record)
        described = record["arrays"]
        encoding.check_descriptions(described)
        if "program" in record:
            _check_there(folder, PROGRAM)
        largest = encoding.length(described) + MARGIN
        arrays = encoding.unpack(described, files.read(folder / ARRAYS, largest))
        if "program" in record:
            return _load_program(folder, record, arrays)
        if "model" in record:
            return _load_model(record, arrays)
    except FileNotFoundError:
        raise
    except (ValueError, OSError, MemoryError) as error:
        raise ValueError(
            f"{folder}: the saved model is damaged or can't be read: {error}; copy it "
            "again from where it is whole, or save it again"
        ) from error
    return _load_like(folder, record, arrays, like)


def _is_new(described: Any, saved: bool) -> bool:
    """Whether older versions left out an attribute, or wrote it as something else."""
    return described is not None and (
        not saved
        or any(
            isinstance(each, dict) and "named" not in each
            for each in _values(described)
        )
    )


def _load_like(
    folder: Path,
    record: dict[str, Any],
    arrays: dict[str, jax.Array],
    like: nnx.Module | None,
) -> nnx.Module:
    """A copy of a module with the sizes and the arrays of a file."""
    name = record["class"]
    if like is None or type(like).__qualname__ != name:
        got = "nothing" if like is None else type(like).__qualname__
        raise ValueError(
            f"{folder} holds a module of the class {name!r}, which no file can make: "
            f"give like=, a module of that class of any size; got {got}"
        )
    model = nnx.clone(like)
    here, saved = attributes_of(model), record["attributes"]
    taken = []
    for path, module in list(nnx.iter_modules(model)):
        at = ".".join(map(str, path))
        mine, theirs = here[at], saved.get(at, {})
        for attribute in sorted({*mine, *theirs}):
            one, other = mine.get(attribute), theirs.get(attribute)
            where = f"{attribute} at {at or 'its root'!r}"
            if "complete" not in record and _is_new(one, attribute in theirs):
                taken.append(where)
                continue
            try:
                if (attribute in mine) != (attribute in theirs):
                    raise ValueError("only one has it")
                value = _as_saved(other, one, getattr(module, attribute))
            except ValueError as error:
                raise ValueError(
                    f"{folder}: {name} was saved with {attribute} {other!r} at "
                    f"{at or 'its root'!r}, and like= has {one!r}"
                ) from error
            taken += [f"{where} ({what})" for what in _untold(one)]
            if repr(one) != repr(other):
                setattr(module, attribute, value)
    if taken:
        warnings.warn(
            f"{folder}: what like= has is taken for what was saved, which can't be "
            f"told: {', '.join(taken)}; see that it is the same, and give functions "
            "names of their own, and objects a repr or fields of a dataclass",
            stacklevel=3,
        )
    state = nnx.state(model)
    expected = units.arrays(state)
    if expected.keys() != arrays.keys():
        path = min(expected.keys() ^ arrays.keys())
        where = "like=" if path in expected else "the file"
        raise ValueError(f"{folder}: only {where} has an array at {path!r}")
    filled = jax.tree_util.tree_map_with_path(
        lambda key_path, _: arrays[units.path_of(key_path)], state
    )
    nnx.update(model, filled)
    return model


def _check_there(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"{folder} holds no saved model: {name} is missing; give the folder that "
            "storage.save or storage.save_function wrote"
        )


def _check_record(record: dict[str, Any]) -> None:
    """Raises ValueError unless it is one of a model or one of a program."""
    kinds: dict[str, type] = {"model": str, "arguments": dict, "arrays": dict}
    if "class" in record:
        kinds = {"class": str, "attributes": dict, "arrays": dict}
        if "complete" in record:  # Before, only what is plain was described.
            kinds["complete"] = bool
    if "program" in record:
        kinds = {"program": str, "program bytes": int, "derivatives": int}
        kinds |= {"jax": str, "arrays": dict}
    found = {name: type(value) for name, value in record.items()}
    if found != kinds:
        raise ValueError(f"{ARCHITECTURE} holds {', '.join(found) or 'nothing'}")


def _load_program(folder: Path, record: dict[str, Any], arrays: dict) -> Program:
    content = files.read(folder / PROGRAM, record["program bytes"])
    if hashlib.sha256(content).hexdigest() != record["program"]:
        raise ValueError(f"{PROGRAM} is not what was saved")
    return exporting.program_of(content, arrays, record["derivatives"])


def _load_model(record: dict[str, Any], arrays: dict[str, jax.Array]) -> models.Model:
    name, arguments = record["model"], record["arguments"]
    _check_arguments(arguments, arrays)
    try:
        abstract = nnx.eval_shape(
            lambda: models.make(name, arguments, rngs=nnx.Rngs(0))
        )
    # Whatever a constructor raises for arguments that it was not made for.
    except Exception as error:
        raise ValueError(
            f"no {name} can be built of its arguments: {type(error).__name__}: {error}"
        ) from error
    graph, state = nnx.split(abstract)
    _compare(units.arrays(state), arrays)
    filled = jax.tree_util.tree_map_with_path(
        lambda key_path, _: arrays[units.path_of(key_path)], state
    )
    model = nnx.merge(graph, filled)
    models.check(model)
    return model


def _check_arguments(arguments: dict[str, Any], arrays: dict[str, jax.Array]) -> None:
    """Raises ValueError if so few arrays can't be of a model with such arguments: to
    build one could take forever, even of shapes alone."""
    most = 64 + 16 * len(arrays)
    largest = max([LARGEST_ARGUMENT, *(array.size for array in arrays.values())])
    values = list(_values(arguments))
    if len(values) > most:
        raise ValueError(
            f"a model of {len(arrays)} arrays has at most {most} sizes, not "
            f"{len(values)}"
        )
    for value in values:
        if isinstance(value, int) and not 0 <= value <= largest:
            raise ValueError(
                f"a model of arrays with at most {largest} elements has no size {value}"
            )


def _values(node: Any) -> Iterator[Any]:
    """All that lists and dictionaries hold, themselves too."""
    below = [node]
    while below:
        node = below.pop()
        yield node
        if isinstance(node, dict):
            below += node.values()
        elif isinstance(node, list):
            below += node


def _compare(architecture: dict[str, Any], arrays: dict[str, jax.Array]) -> None:
    """Raises ValueError unless the arrays are those of the architecture."""
    expected = {path: tuple(leaf.shape) for path, leaf in architecture.items()}
    found = {path: array.shape for path, array in arrays.items()}
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise ValueError(
                f"arrays and architecture disagree at {path!r}: the file holds "
                f"{found.get(path, 'nothing')}, the architecture says "
                f"{expected.get(path, 'nothing')}"
            )


_APART = """
import sys
from l0jax import storage
try:
    found = storage.load(sys.argv[1])
except (FileNotFoundError, ValueError):  # as this process will say
    sys.exit()
if isinstance(found, storage.Program):
    found.text
"""
_SECONDS_APART = 120


def _read_apart(folder: Path) -> None:
    """Raises ValueError if a process that reads the folder crashes or hangs."""
    settings = {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "JAX_PLATFORMS": "cpu",  # this process may hold the others
        "JAX_ENABLE_X64": str(jax.dtypes.canonicalize_dtype(float) == np.float64),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", _APART, str(folder)],
            env={**os.environ, **settings},
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS_APART,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"{folder}: to read it took another process more than {_SECONDS_APART} "
            "seconds; save it again"
        ) from error
    if done.returncode:
        raise ValueError(
            f"{folder}: the process that read it first ended with code "
            f"{done.returncode}; save it again"
        )
