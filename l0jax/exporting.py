"""Functions as programs that need not their code: exported by `jax.export`, for batches
of any size, and with their derivatives."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from l0jax.units import path_of

PLATFORMS = ("cpu", "cuda", "tpu")

Axes = list[dict[int, str]]
"""Of each leaf of the inputs, the axes that may have any size, and the names of these
sizes."""


class Program:
    """A function that was read from a folder, with its parameters.

    It can be compiled, mapped by `vmap` (one member after the other) and differentiated
    in reverse mode, as often as `derivatives` says.

    Attributes:
        params: its arrays by dotted path.
        derivatives: how many times it can be differentiated.
    """

    def __init__(
        self,
        exported: jax.export.Exported,
        params: dict[str, jax.Array],
        derivatives: int = 0,
    ):
        self._exported = exported
        self.params = params
        self.derivatives = derivatives

    @property
    def text(self) -> str:
        """The program in StableHLO, its derivatives after it."""
        exported, texts = self._exported, []
        for _ in range(self.derivatives):
            texts.append(exported.mlir_module())
            exported = exported.vjp()
        return "\n".join([*texts, exported.mlir_module()])

    def __call__(self, *inputs: PyTree) -> PyTree:
        """The function of these inputs."""
        return self.apply(self.params, *inputs)

    def apply(self, params: Mapping[str, jax.Array], *inputs: PyTree) -> PyTree:
        """The function with other parameters, such as an optimiser finds.

        Args:
            params: arrays at the paths, and of the shapes and dtypes, of `self.params`.
            *inputs: as for the function that was saved.

        Raises:
            ValueError: if a parameter is missing, or an array is of another shape or
                dtype than was saved; if it is differentiated more often than
                `derivatives`.
        """
        if params.keys() != self.params.keys():
            wrong = min(params.keys() ^ self.params.keys())
            raise ValueError(
                f"params and the saved function disagree at {wrong!r}: give one array "
                f"for each of {', '.join(self.params)}"
            )
        leaves = ([params[path] for path in self.params], *inputs)
        flat, tree = jax.tree.flatten((leaves, {}))
        if tree != self._exported.in_tree:
            raise ValueError(
                f"the saved function takes {self._exported.in_tree}, its parameters "
                f"as a list, then its inputs; got {tree}"
            )
        call = _differentiable(self._exported, self.derivatives)
        return jax.tree.unflatten(self._exported.out_tree, call(*flat))


def _differentiable(exported: jax.export.Exported, order: int) -> Callable[..., list]:
    """The program over lists of leaves. What `jax.export` gives back has no rule for
    `vmap`, and where a derivative is missing fails within JAX.

    Cotangents of integers and keys, of dtype float0, are flags here: a loop can't
    carry float0.
    """
    given = [aval.dtype == jax.dtypes.float0 for aval in exported.in_avals]

    @jax.custom_batching.sequential_vmap
    def call(*flat):
        flat = [
            np.zeros(leaf.shape, jax.dtypes.float0) if empty else leaf
            for leaf, empty in zip(flat, given, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(exported.in_tree, flat)
        return [*map(_flags, jax.tree.leaves(exported.call(*args, **kwargs)))]

    @jax.custom_vjp
    def function(*flat):
        return call(*flat)

    def forward(*flat):
        # Not `call`: that has no derivative, when this pass is differentiated in turn.
        return function(*flat), flat

    def backward(flat, cotangents):
        if order < 1:
            raise ValueError(
                "the function was saved without this derivative: save it with "
                "derivatives=1, or 2 for derivatives of derivatives, if it has any"
            )
        pullback = exported.vjp()
        found = _differentiable(pullback, order - 1)(*flat, *map(_flags, cotangents))
        return tuple(
            None if aval.dtype == jax.dtypes.float0 else each
            for aval, each in zip(pullback.out_avals, found, strict=True)
        )

    function.defvjp(forward, backward)
    return function


def _flags(leaf: Any) -> Any:
    return jnp.zeros(leaf.shape, bool) if leaf.dtype == jax.dtypes.float0 else leaf


# ----------------------------------------------------------------------------- saving


def exported(
    function: Callable[..., PyTree],
    params: PyTree,
    inputs: tuple[PyTree, ...],
    axes: Axes,
    derivatives: int,
) -> tuple[bytes, Exception | None]:
    """The program of a function: its parameters as a list, then its inputs.

    Args:
        function: `function(params, *inputs)`.
        params: a pytree of arrays.
        inputs: arrays or their shapes.
        axes: of each leaf of the inputs, which may later have any size.
        derivatives: how many are exported with it.

    Returns:
        The program, without derivatives if there are none of this order, and then why.

    Raises:
        ValueError: if JAX can't export the function, or not for a batch of any size.
    """
    tree = jax.tree.structure(params)

    def of_list(leaves, *inputs):
        return function(jax.tree.unflatten(tree, leaves), *inputs)

    leaves = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jax.tree.leaves(params)]
    free = any(axes)
    # A function that is wrong about its inputs is so for their own sizes too.
    jax.eval_shape(of_list, leaves, *shapes(inputs, [{}] * len(axes)))
    try:
        found = jax.export.export(jax.jit(of_list), platforms=PLATFORMS)(
            leaves, *shapes(inputs, axes)
        )
    except (jax.errors.InconclusiveDimensionOperation, TypeError, ValueError) as error:
        if not free:
            raise ValueError(f"JAX can't export the function: {error}") from error
        raise needs_its_batch(error) from error
    try:
        program = bytes(found.serialize())
    except KeyError as error:
        raise ValueError(_no_name_for(error.args[0], params)) from error
    if not derivatives:
        return program, None
    try:
        return bytes(found.serialize(vjp_order=derivatives)), None
    # Whatever a rule of JAX or of the function's own raises where it has none.
    except Exception as error:
        return program, error


def _no_name_for(dtype: Any, params: PyTree) -> str:
    paths = [
        path_of(key_path)
        for key_path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        if leaf.dtype == dtype
    ]
    where = f"array {paths[0]!r}" if paths else "an input, an output or a derivative"
    return (
        f"JAX can't export a function of {dtype} numbers, and {where} is of this "
        "dtype: cast it before, or within the function"
    )


def needs_its_batch(error: Exception) -> ValueError:
    """The error that says what to do where a batch can't have any size."""
    return ValueError(
        f"the function needs to know the size of its batch ({error}); if some inputs "
        "have no batch, say so, as in batch=(0, None); else save it with "
        "any_batch=False"
    )


def axes_of(
    inputs: tuple[PyTree, ...],
    any_batch: bool,
    batch: PyTree,
    dynamic: Mapping[str, PyTree],
) -> Axes:
    """For each leaf of the inputs the axes that may have any size, and their names.

    Args:
        inputs: arrays or their shapes.
        any_batch: whether a batch may have any size.
        batch: its axes, as `in_axes` of `jax.vmap`: one entry for each input, an axis
            or None or a pytree of these. None: the first of all that have one.
        dynamic: the axes of other sizes that may vary, by the name of the size.

    Raises:
        ValueError: if axes do not fit the inputs, or have two names; if inputs differ
            in size along axes of one name, so that these can't vary together.
    """
    named = jax.tree_util.tree_flatten_with_path(inputs)[0]
    paths = ["inputs" + jax.tree_util.keystr(key_path) for key_path, _ in named]
    leaves = [leaf for _, leaf in named]
    for path, leaf in zip(paths, leaves, strict=True):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{path} is a {type(leaf).__name__}: give arrays or their shapes"
            )
    if batch is not None and not any_batch:
        raise ValueError("batch names axes of any size: it needs any_batch=True")
    found: Axes = [{} for _ in leaves]
    for name, of in {BATCH: batch, **dynamic}.items():
        if not name.isidentifier() or (name == BATCH and BATCH in dynamic):
            raise ValueError(
                f"dynamic: {name!r} can't be the name of a size; take another one word"
            )
        if name == BATCH and not any_batch:
            continue
        if name == BATCH and batch is None:
            along = [0 if leaf.shape else None for leaf in leaves]
        else:
            along = _spread(inputs, of, name)
        _check_together(name, paths, leaves, along)
        for path, leaf, axis, names in zip(paths, leaves, along, found, strict=True):
            if axis is None:
                continue
            other = names.setdefault(axis % len(leaf.shape), name)
            if other != name:
                raise ValueError(
                    f"axis {axis} of {path} is {other!r} and {name!r}; sizes that are "
                    "one have one name"
                )
    return found


BATCH = "batch"
"""The name of its size."""


def _check_together(name: str, paths, leaves, axes) -> None:
    """Raises ValueError unless some axes are there, and of one size."""
    sizes = {}
    for path, leaf, axis in zip(paths, leaves, axes, strict=True):
        if axis is None:
            continue
        if type(axis) is not int or not -len(leaf.shape) <= axis < len(leaf.shape):
            raise ValueError(
                f"{name}: {path} of shape {leaf.shape} has no axis {axis!r}"
            )
        sizes[f"{path} has {leaf.shape[axis]} along axis {axis}"] = leaf.shape[axis]
    if len(set(sizes.values())) > 1:
        how = "as in batch=(0, None), or save with any_batch=False"
        if name != BATCH:
            how = f"as in dynamic={{{name!r}: (1, None)}}"
        raise ValueError(
            f"the {name} differs: {', '.join(sizes)}; say which axes vary together and "
            f"which inputs have no {name}, {how}"
        )


def _spread(inputs: tuple[PyTree, ...], axes: PyTree, name: str) -> list[Any]:
    def is_none(node):
        return node is None

    try:
        spread = jax.tree.broadcast(axes, inputs, is_leaf=is_none)
    except ValueError as error:
        raise ValueError(
            f"{name}={axes!r} does not fit {len(inputs)} inputs: give an axis or None "
            f"for each, as in {name}=(0, None)"
        ) from error
    return jax.tree.leaves(spread, is_leaf=is_none)


def shapes(inputs: tuple[PyTree, ...], axes: Axes) -> tuple[PyTree, ...]:
    """Shapes of inputs, some axes of sizes that are not known yet."""
    leaves, tree = jax.tree.flatten(inputs)
    names = [*dict.fromkeys(name for each in axes for name in each.values())]
    scope = jax.export.SymbolicScope()
    symbols = jax.export.symbolic_shape(", ".join(names), scope=scope) if names else ()
    sizes = dict(zip(names, symbols, strict=True))
    return jax.tree.unflatten(
        tree,
        [
            jax.ShapeDtypeStruct(
                tuple(
                    sizes[along[at]] if at in along else n
                    for at, n in enumerate(leaf.shape)
                ),
                leaf.dtype,
            )
            for leaf, along in zip(leaves, axes, strict=True)
        ],
    )


def check(
    program: Program,
    function: Callable[..., PyTree],
    params: PyTree,
    inputs: tuple[PyTree, ...],
    axes: Axes,
) -> None:
    """Runs a program that was read back, beside its function.

    Args:
        program: the one to check.
        function: `function(params, *inputs)`.
        params: its parameters.
        inputs: arrays, or shapes for zeros.
        axes: those along which more is given in a second run.

    Raises:
        ValueError: if the program can't run, or gives something else.
    """
    compiled = jax.jit(function)
    for more in (0, 1) if any(axes) else (0,):
        given = grown(inputs, axes, more)
        try:
            found, expected = program(*given), compiled(params, *given)
        except Exception as error:
            size = "more examples" if more else "the inputs that were given"
            raise ValueError(
                f"the saved function can't run with {size} ({type(error).__name__}: "
                f"{error}); say along which axes inputs vary, as in batch=(0, None), "
                "or save with any_batch=False"
            ) from error
        _check_alike(found, expected)


def grown(inputs: tuple[PyTree, ...], axes: Axes, more: int) -> tuple[PyTree, ...]:
    """Inputs that are longer along axes that may have any size: by `more` of the
    first, by one more of each other, so that no two grow alike."""
    leaves, tree = jax.tree.flatten(inputs)
    names = [*dict.fromkeys(name for each in axes for name in each.values())]
    longer = []
    for leaf, along in zip(leaves, axes, strict=True):
        shape = list(leaf.shape)
        for axis, name in along.items() if more else ():
            shape[axis] += more + names.index(name)
        if isinstance(leaf, jax.ShapeDtypeStruct) or not leaf.size:
            leaf = jnp.broadcast_to(_filled(leaf.dtype), leaf.shape)
        leaf = jnp.asarray(leaf)
        for axis, size in enumerate(shape):
            if size != leaf.shape[axis] and not leaf.size:
                leaf = jnp.broadcast_to(_filled(leaf.dtype), shape)
            elif size != leaf.shape[axis]:
                rows = np.arange(size) % leaf.shape[axis]
                leaf = jnp.take(leaf, rows, axis=axis)
        longer.append(leaf)
    return jax.tree.unflatten(tree, longer)


def _filled(dtype: Any) -> jax.Array:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError("of random keys an example is needed, not only their shape")
    return jnp.zeros((), dtype)


def _check_alike(found: PyTree, expected: PyTree) -> None:
    if jax.tree.structure(found) != jax.tree.structure(expected):
        raise ValueError(
            f"the saved function gives {jax.tree.structure(found)}, the function "
            f"{jax.tree.structure(expected)}"
        )
    pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
    for number, (a, b) in enumerate(pairs):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"output {number} of the saved function is {a.dtype} of shape "
                f"{a.shape}, of the function {b.dtype} of shape {b.shape}"
            )
        if not _close(a, b):
            raise ValueError(
                f"output {number} of the saved function has other values than that of "
                "the function: does it draw numbers, count calls or read what changes?"
            )


def _close(a: jax.Array, b: jax.Array) -> bool:
    """Up to rounding, for the two are compiled apart."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return np.array_equal(np.asarray(a), np.asarray(b))
    margin = 4 * float(jnp.finfo(a.dtype).eps) ** 0.5
    found, expected = (np.asarray(each).astype(np.complex128) for each in (a, b))
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    return np.allclose(
        found, expected, rtol=margin, atol=margin * largest, equal_nan=True
    )


# ---------------------------------------------------------------------------- loading


def program_of(
    content: bytes, params: dict[str, jax.Array], derivatives: int
) -> Program:
    """The program of these bytes, which must be those that `exported` gave.

    Raises:
        ValueError: if they are no program, or one of other parameters.
    """
    try:
        found = jax.export.deserialize(bytearray(content))
        args, kwargs = jax.tree.unflatten(found.in_tree, found.in_avals)
        avals, pullback = list(args[0]), found
        for _ in range(derivatives):
            # JAX reads them only when they are asked for.
            pullback = pullback.vjp()
    # Whatever the readers of JAX raise where bytes are not what they expect.
    except Exception as error:
        raise ValueError(
            f"the program can't be read: {type(error).__name__}: {error}"
        ) from error
    expected = [(tuple(aval.shape), aval.dtype) for aval in avals]
    given = [(array.shape, array.dtype) for array in params.values()]
    if expected != given or kwargs:
        raise ValueError("the program is not one of these arrays")
    return Program(found, params, derivatives)
