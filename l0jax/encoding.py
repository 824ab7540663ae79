"""Arrays and records as bytes, and back, so that no byte can change unnoticed.

Arrays are one file in the format of safetensors: the length of a header, the header in
JSON, the arrays one after the other. A dtype that the format has no name for lies in it
as uint8 with one more axis, a random key as its words. What each array really is stands
in a record, with its digest; the header follows from the record, byte for byte.

A record is JSON with a digest of itself, in the one form in which it is written.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from l0jax import units

VERSION = 2
LARGEST_RECORD = 32 * 2**20

# What safetensors calls them.
NAMED = {
    "bool": "BOOL",
    **{f"int{n}": f"I{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}": f"U{n}" for n in (8, 16, 32, 64)},
    **{f"float{n}": f"F{n}" for n in (16, 32, 64)},
    "bfloat16": "BF16",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
NAMELESS = (
    *("complex128", "int2", "uint2", "int4", "uint4", "float4_e2m1fn"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
)
DTYPES = {name: np.dtype(name) for name in (*NAMED, *NAMELESS)}

Description = dict[str, Any]
"""Of one array: `dtype`, `shape` and `sha256`, all of what is stored, and for random
keys also `key`, the name of their generator."""


# ------------------------------------------------------------------------- one array


def describe(path: str, leaf: Any) -> tuple[Description, np.ndarray]:
    """What an array is, but for its digest, and its values on the host, in row-major
    order; of an array on the host, those are a view.

    Raises:
        ValueError: if it is no array; if its dtype can't be stored, or JAX as it is set
            up would load it as another; if the format has no place for its name.
    """
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise ValueError(
            f"{path!r} is a {type(leaf).__name__} and can't be saved: give an array, "
            "such as jnp.asarray makes of a number"
        )
    if path == "__metadata__":
        raise ValueError(
            "safetensors has another use for the name '__metadata__': rename the array"
        )
    described: Description = {}
    if isinstance(leaf, jax.Array) and is_key(leaf):
        described["key"] = str(jax.random.key_impl(leaf))
        _check_generator(path, described["key"], leaf.dtype)
        leaf = jax.random.key_data(leaf)
    name = leaf.dtype.name
    if name not in DTYPES:
        raise ValueError(
            f"{path!r} is of dtype {name} and can't be saved; there is "
            f"{', '.join(DTYPES)}: cast it to one of these"
        )
    _check_width(path, name)
    # `ascontiguousarray` alone would make a vector of a single number.
    array = np.asarray(leaf, DTYPES[name])
    array = np.ascontiguousarray(array).reshape(array.shape)
    described |= {"dtype": name, "shape": list(array.shape)}
    return described, array


def describe_all(tree: PyTree) -> tuple[dict[str, Description], dict[str, np.ndarray]]:
    """`describe` of all arrays, by path.

    Raises:
        ValueError: as `describe`.
    """
    both = {p: describe(p, leaf) for p, leaf in units.arrays(tree).items()}
    return {p: d for p, (d, _) in both.items()}, {p: a for p, (_, a) in both.items()}


def digested(
    described: Mapping[str, Description], arrays: Mapping[str, np.ndarray]
) -> dict[str, Description]:
    """The descriptions with the digests of their arrays."""
    return {
        path: {**each, "sha256": hashlib.sha256(bytes_of(arrays[path])).hexdigest()}
        for path, each in described.items()
    }


def encode_all(tree: PyTree) -> tuple[dict[str, Description], dict[str, np.ndarray]]:
    """Of all arrays by path what they are, and their values on the host.

    Raises:
        ValueError: as `describe`.
    """
    described, arrays = describe_all(tree)
    return digested(described, arrays), arrays


def decode(path: str, described: Description, content: Any) -> jax.Array:
    """The array of these bytes, which are those that were saved.

    Raises:
        ValueError: if they are no such array; if JAX as it is set up has none.
    """
    if (
        described["dtype"] == "bool"
        and np.frombuffer(content, np.uint8).max(initial=0) > 1
    ):
        raise ValueError(f"array {path!r} holds flags that are neither 0 nor 1")
    _check_width(path, described["dtype"])
    array = np.frombuffer(content, DTYPES[described["dtype"]])
    leaf = jnp.asarray(array.reshape(described["shape"]))
    if "key" not in described:
        return leaf
    try:
        return jax.random.wrap_key_data(leaf, impl=described["key"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"array {path!r} holds random keys of {described['key']!r}, which JAX "
            f"can't make: {error}"
        ) from error


def is_key(leaf: jax.Array) -> bool:
    """Whether it holds random keys as `jax.random.key` makes them."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def bytes_of(array: np.ndarray) -> memoryview | bytes:
    """The bytes of an array that lies in row-major order."""
    return array.reshape(-1).view(np.uint8).data if array.size else b""


def _check_generator(path: str, name: str, dtype: Any) -> None:
    try:
        known = jax.eval_shape(lambda: jax.random.key(0, impl=name)).dtype == dtype
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"{path!r} is of dtype {dtype}: random keys of {name!r}, which is no "
            "generator that JAX knows by name; save jax.random.key_data of it"
        )


def _check_width(path: str, name: str) -> None:
    found = jax.dtypes.canonicalize_dtype(DTYPES[name])
    if found != DTYPES[name]:
        raise ValueError(
            f"array {path!r} is of dtype {name}, of which JAX would make {found}: set "
            "jax_enable_x64, or cast it before it is saved"
        )


# ---------------------------------------------------------------------- all arrays


def pack(
    described: Mapping[str, Description], arrays: Mapping[str, np.ndarray]
) -> bytes:
    """All arrays as one file in the format of safetensors."""
    return b"".join(parts(described, arrays))


def parts(
    described: Mapping[str, Description], arrays: Mapping[str, np.ndarray]
) -> list[Any]:
    """What `pack` joins: bytes, and views of the arrays."""
    ordered = [bytes_of(arrays[path]) for path in _in_order(described)]
    return [header(described), *ordered]


def header(described: Mapping[str, Description]) -> bytes:
    """What stands before the arrays."""
    entries, at = {}, 0
    for path in _in_order(described):
        each = described[path]
        raw = each["dtype"] not in NAMED
        dtype, end = DTYPES[each["dtype"]], at + size_of(each)
        entries[path] = {
            "dtype": "U8" if raw else NAMED[each["dtype"]],
            "shape": [*each["shape"], *([dtype.itemsize] if raw else [])],
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def unpack(
    described: Mapping[str, Description], content: bytes
) -> dict[str, jax.Array]:
    """The arrays of a file that `pack` wrote.

    Raises:
        ValueError: as `apart` and `decode`.
    """
    found = apart(described, content)
    return {path: decode(path, described[path], part) for path, part in found.items()}


def apart(
    described: Mapping[str, Description], content: bytes
) -> dict[str, memoryview]:
    """The bytes of each array in a file that `pack` wrote.

    Raises:
        ValueError: if the file holds other arrays or other values, or anything else.
    """
    expected = header(described)
    if not content.startswith(expected) or len(content) != length(described):
        _tell_apart(described, content)
    found, at = {}, len(expected)
    for path in _in_order(described):
        end = at + size_of(described[path])
        found[path] = memoryview(content)[at:end]
        if hashlib.sha256(found[path]).hexdigest() != described[path]["sha256"]:
            raise ValueError(f"array {path!r} is not what was saved")
        at = end
    return {path: found[path] for path in described}


def length(described: Mapping[str, Description]) -> int:
    """Bytes of a file of these arrays."""
    return len(header(described)) + sum(map(size_of, described.values()))


def size_of(described: Description) -> int:
    """Bytes of an array."""
    return math.prod(described["shape"]) * DTYPES[described["dtype"]].itemsize


def check_descriptions(described: Any) -> None:
    """Raises ValueError unless it describes arrays by path, as `encode` does."""
    if not isinstance(described, dict):
        raise ValueError(f"arrays are described by {type(described).__name__}")
    for path, each in described.items():
        fits = (
            isinstance(each, dict)
            and {"dtype", "shape", "sha256"} <= each.keys() <= {*KEYS}
            and isinstance(each["dtype"], str)
            and each["dtype"] in DTYPES
            and isinstance(each["shape"], list)
            and all(type(size) is int and size >= 0 for size in each["shape"])
            and len(each["shape"]) <= MOST_AXES
            and isinstance(each.get("key", ""), str)
            and ("key" not in each or (each["dtype"] == "uint32" and each["shape"]))
        )
        if not fits:
            raise ValueError(f"array {path!r} is described by {each!r:.200}")


KEYS = ("key", "dtype", "shape", "sha256")
MOST_AXES = 32  # of an array in NumPy 1; JAX has fewer


def _in_order(described: Mapping[str, Description]) -> list[str]:
    """Those of wide dtypes first, so that all are aligned."""
    return sorted(described, key=lambda p: -DTYPES[described[p]["dtype"]].itemsize)


def _tell_apart(described: Mapping[str, Description], content: bytes) -> None:
    """Raises ValueError: in what does a file differ from what was saved?"""
    found = _entries(content)
    expected = _entries(header(described), sum(map(size_of, described.values())))
    for path in sorted(found.keys() | expected.keys()):
        if found.get(path) != expected.get(path):
            raise ValueError(
                f"arrays and architecture disagree at {path!r}: the file holds "
                f"{found.get(path, 'nothing')}, the architecture says "
                f"{expected.get(path, 'nothing')}"
            )
    raise ValueError("the header or the length of the arrays is not what was saved")


def _entries(content: bytes, after: int | None = None) -> dict[str, str]:
    """Shape and dtype of each array in a file of the format, by the file's header.

    Args:
        content: the file, or its beginning.
        after: bytes that follow the header; by default, those that do.

    Raises:
        ValueError: if it has no such header.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError(
            f"a header of {length} bytes is claimed, the file has {len(content)}"
        )
    if after is None:
        after = len(content) - 8 - length
    entries = parsed(content[8 : 8 + length])
    sizes = {NAMED[name]: DTYPES[name].itemsize for name in NAMED}
    found = {}
    for path, entry in entries.items():
        if path == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [a, b]} if (
                dtype in sizes
                and all(type(n) is int and n >= 0 for n in (*shape, a, b))
                and a <= b <= after
                and math.prod(shape) * sizes[dtype] == b - a
            ):
                found[path] = f"{tuple(shape)} of {dtype}"
            case _:
                raise ValueError(f"the header describes {path!r} by {entry!r:.200}")
    return found


# -------------------------------------------------------------------------- records


def sealed(record: Mapping[str, Any]) -> str:
    """A record as text, with its version and its digest.

    Raises:
        ValueError: if it holds what JSON would not give back as it was, or too much.
    """
    whole = {"version": VERSION, **record}
    text = _written({**whole, "digest": _digest(whole)})
    if _written(json.loads(text)) != text:
        raise ValueError(
            "JSON can't tell some keys of the notes or arguments apart, such as 1 and "
            "'1': use strings"
        )
    if len(text) > LARGEST_RECORD:
        raise ValueError(
            f"the record has {len(text)} bytes, more than {LARGEST_RECORD}: "
            "store what is large as an array"
        )
    return text


def opened(text: bytes) -> dict[str, Any]:
    """The record that was sealed.

    Raises:
        ValueError: if it is damaged, down to a single byte, or of another version.
    """
    record = parsed(text)
    version = record.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"its record is of version {version!r:.50}, not {VERSION}: if it is not "
            "damaged, another version of l0jax wrote it; save it again with this one"
        )
    written, digest = _written(record).encode(), record.pop("digest", None)
    if written != text or digest != _digest(record):
        raise ValueError("its record is not what was saved")
    del record["version"]
    return record


def parsed(text: bytes) -> dict[str, Any]:
    """JSON, of which nothing is known.

    Raises:
        ValueError: if it is none, or no dictionary.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON of too many levels") from error
    if not isinstance(found, dict):
        raise ValueError(f"{type(found).__name__} where a dictionary was expected")
    return found


def _written(record: Mapping[str, Any]) -> str:
    """One line for each entry, and for each entry of an entry; the indentation of
    `json` itself is many times slower."""

    def lines(entries, indent, write):
        inner = ",\n".join(
            f"{indent}  {json.dumps(name)}: {write(value)}"
            for name, value in entries.items()
        )
        return f"{{\n{inner}\n{indent}}}"

    def entry(value):
        deep = isinstance(value, dict) and value
        return lines(value, "  ", json.dumps) if deep else json.dumps(value)

    try:
        return lines(record, "", entry) + "\n"
    except RecursionError as error:
        raise ValueError("JSON of too many levels") from error


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_written(record).encode()).hexdigest()
