"""Whether code that runs on smaller arrays is the function that was narrowed.

Code may compute more from sizes than shapes: a mean, a scale, a table of positions. It
is then another function of its inputs when its arrays are smaller. That it is the same
is proved where both programs consist of the same terms; else the two are run, on
random values, and must agree at all of them.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from l0jax import units
from l0jax.narrow import inputs_left, knows, narrow
from l0jax.structure import Structure
from l0jax.terms import Terms
from l0jax.units import Keep, arrays

SCALES = (1.0, 1.0, 1e-3, 30.0)
"""Of the inputs that are drawn: small ones show small shifts, large ones thresholds."""

BOUNDS = (8, 2, 1)
"""Below what integers are drawn: they may be positions in arrays of any size."""

TOLERANCE = 1e-4
"""Relative difference of outputs that roundings may make."""

# Compiled fast rather than to run fast.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

Apply = Callable[..., PyTree]


class CantShrink(ValueError):
    """A module or a function is another one when its arrays are smaller, can't be told
    from another one, or can't be told its sizes. `l0jax.narrow` needs none of them."""


def difference(
    structure: Structure,
    keep: Keep,
    whole: Apply,
    params: PyTree,
    small: Apply,
    excused: Collection[float] = (),
) -> str | None:
    """Where a smaller function is another one, or can't be told from another one.

    It must be what the narrowed program is. Of groups that a user stated by hand there
    is none, and it must be what the whole function is when their gates are closed.
    Values are compared at the traced sizes of the inputs, on the CPU if JAX has one.

    Args:
        structure: of the function, by `trace`.
        keep: which units are left.
        whole: the function, `whole(params, *inputs)`.
        params: its arrays.
        small: `small(l0jax.shrink(params, keep, groups), *inputs)`. Of inputs that lose
            positions it takes what is left.
        excused: numbers that may be in one program and not in the other, where it is
            known that values show the difference.

    Returns:
        None if the two are the same, else a sentence that names the line if it can.

    Raises:
        ValueError: if the structure is not that of these arrays.
    """
    check_arrays(structure, params)
    shapes = _input_shapes(structure)
    smaller = units.shrink(params, keep, structure.groups)
    small = _of_whole_inputs(small, structure, keep)
    try:
        theirs = jax.make_jaxpr(small)(smaller, *shapes)
    except Exception as error:
        # Any error may come out of a user's code.
        return f"with smaller arrays it fails: {type(error).__name__}: {error}"

    def shrunk(params):
        return units.shrink(params, keep, structure.groups)

    def found(params, *inputs):
        return small(shrunk(params), *inputs)

    if not knows(structure, keep):
        z = {name: jnp.asarray(flags, jnp.float32) for name, flags in keep.items()}

        # Of a module that was shrunk before, inputs may have lost positions already.
        before = _of_whole_inputs(whole, structure, {})

        def gated(params, *inputs):
            closed = units.apply_gates(params, z, structure.groups)
            return before(closed, *inputs)

        return _apart(found, gated, params, shapes)
    narrowed = _narrowed(structure, keep, params)
    ours = jax.make_jaxpr(narrowed)(smaller, *shapes)
    said, settled = _compared(theirs, ours, excused)
    if settled:
        return said
    apart = _apart(found, lambda p, *x: narrowed(shrunk(p), *x), params, shapes)
    return apart and f"{said}, and {apart}"


def check_arrays(structure: Structure, params: PyTree) -> None:
    """Raises ValueError unless a structure is of these arrays."""
    found = {path: jnp.shape(leaf) for path, leaf in arrays(params).items()}
    expected = {path: leaf.shape for path, leaf in structure.arrays.items()}
    for path in [*expected, *found]:
        if found.get(path) != expected.get(path):
            raise ValueError(
                f"the structure was traced with {path!r} of shape "
                f"{expected.get(path, 'none')}, and now it is {found.get(path, 'none')}"
                "; trace the module again"
            )


# ------------------------------------------------------------------------- as programs


def _input_shapes(structure: Structure) -> tuple[Any, ...]:
    traced = structure.traced
    leaves = [*structure.arrays.values(), *traced.given.values()]
    return jax.tree.unflatten(traced.in_tree, leaves)[1:]


def _of_whole_inputs(small: Apply, structure: Structure, keep: Keep) -> Apply:
    """The smaller function, which is given inputs of which nothing is missing."""
    gone = inputs_left(structure, keep)

    def call(params, *inputs):
        def cut(key_path, leaf):
            for axis, flags in gone.get(units.path_of(key_path), {}).items():
                leaf = jnp.take(leaf, np.flatnonzero(flags), axis=axis)
            return leaf

        return small(params, *jax.tree_util.tree_map_with_path(cut, inputs))

    return call


def _narrowed(structure: Structure, keep: Keep, params: PyTree) -> Apply:
    """The narrowed program, of arrays in the tree that they have now."""
    narrowed, wanted = narrow(structure, params, keep)
    lengths = [np.shape(leaf)[:1] for leaf in jax.tree.leaves(wanted)]

    def call(params, *inputs):
        # Of what nothing reads it wants no elements; code of the user's has some.
        leaves = [
            leaf[:0] if length == (0,) else leaf
            for leaf, length in zip(jax.tree.leaves(params), lengths, strict=True)
        ]
        leaves += jax.tree.leaves(inputs)
        return narrowed(*jax.tree.unflatten(structure.traced.in_tree, leaves))

    return call


def _compared(
    theirs: Any, ours: Any, excused: Collection[float]
) -> tuple[str | None, bool]:
    """What differs between two programs, and whether that settles that they are
    different functions, or that they are one."""
    types = [", ".join(map(str, closed.out_avals)) for closed in (theirs, ours)]
    if types[0] != types[1]:
        return f"with smaller arrays it gives {types[0]}, not {types[1]}", True
    for fold in (False, True):
        terms = Terms(fold)
        one, other = terms.of(theirs), terms.of(ours)
        if one == other:
            return None, True
    # A shift by 1e-9, or a threshold at 1e9, shows in no values that one would draw.
    numbers = terms.numbers(one) ^ terms.numbers(other)
    settled = bool(numbers - {terms.name(number) for number in excused})
    return _first_difference(terms, one, other), settled


def _first_difference(terms: Terms, one: Sequence[int], other: Sequence[int]) -> str:
    """The first line of one program that computes what the other does not."""
    mine, others = set(terms.within(one)), set(terms.within(other))
    here, there = (
        sorted(n for n in some if n in terms.terms)
        for some in (mine - others, others - mine)
    )
    if not here:
        if not there:
            return "with smaller arrays its outputs are other values"
        return f"with smaller arrays it doesn't compute {terms.text(there[0])}"
    line, text = terms.terms[here[0]].line, terms.text(here[0])
    said = f"{line} computes {text} with smaller arrays"
    if not there:
        return said
    instead = terms.text(there[0])
    if instead == text:
        return f"{said}, of other constants or parameters"
    return f"{said}, not {instead}"


# --------------------------------------------------------------------------- in values


def _apart(found: Apply, expected: Apply, params: PyTree, shapes: Any) -> str | None:
    """Where two functions of the same arguments give other values."""
    device = _device()
    quick = QUICK if device.platform == "cpu" else {}
    both = jax.jit(
        lambda *arguments: (found(*arguments), expected(*arguments)),
        compiler_options=quick,
    )
    rng = np.random.default_rng(0)
    shown = 0
    for scale in SCALES:
        for bound in BOUNDS:
            arguments = (
                jax.tree.map(lambda leaf: _near(rng, leaf), params),
                *jax.tree.map(
                    lambda leaf, s=scale, b=bound: _drawn(rng, leaf, s, b), shapes
                ),
            )
            one, other = both(*jax.device_put(arguments, device))
            one, other = ([*map(np.asarray, jax.tree.leaves(x))] for x in (one, other))
            said = _first_apart(one, other, _tolerance(arguments, other))
            if said is not None:
                return said
            if any(map(_shows, other)):
                shown += 1
                break
    if shown < 2:
        return (
            "with smaller arrays it can't be compared: its outputs are constant or not "
            "finite for random inputs"
        )
    return None


def _device() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        # JAX was told to know of accelerators only.
        return jax.devices()[0]


def _near(rng: np.random.Generator, leaf: Any) -> Any:
    """Values of no special kind near those of a parameter, of the signs that it has if
    none is negative (a variance)."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    values = np.asarray(leaf, np.complex128 if _complex(leaf) else np.float64)
    size = np.sqrt(np.mean(np.square(np.abs(values)))) if values.size else 0.0
    noise = (size or 0.1) * rng.normal(size=values.shape)
    if not _complex(leaf) and (values >= 0).all():
        noise = np.abs(noise)
    near = values * rng.uniform(0.5, 1.5, values.shape) + 0.5 * noise
    return near.astype(leaf.dtype)


def _drawn(rng: np.random.Generator, leaf: Any, scale: float, bound: int) -> Any:
    """Random values of an input."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        kind = jax.random.key_impl(jnp.empty(leaf.shape, leaf.dtype))
        key = jax.random.key(int(rng.integers(2**31)), impl=kind)
        return jax.random.split(key, leaf.shape)
    if leaf.dtype == bool:
        return rng.random(leaf.shape) < 0.7
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return rng.integers(0, bound, leaf.shape).astype(leaf.dtype)
    values = rng.normal(size=leaf.shape)
    if _complex(leaf):
        values = values + 1j * rng.normal(size=leaf.shape)
    return (scale * values).astype(leaf.dtype)


def _complex(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def _tolerance(*trees: PyTree) -> float:
    """What roundings may make, in the coarsest numbers among some arrays."""
    kinds = [leaf.dtype for leaf in jax.tree.leaves(trees)]
    floats = [kind for kind in kinds if jnp.issubdtype(kind, jnp.inexact)]
    return max([TOLERANCE, *(4 * float(jnp.finfo(kind).eps) for kind in floats)])


def _shows(values: np.ndarray) -> bool:
    """Whether an output says anything: at least half of it is finite, and it varies."""
    if values.dtype.kind not in "fc" and values.dtype != jnp.bfloat16:
        return False
    finite = values[np.isfinite(values)].astype(np.complex128)
    return 2 * finite.size >= values.size and bool(np.ptp(np.abs(finite)) > 0)


def _first_apart(
    found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float
) -> str | None:
    """Which of several outputs differ by more than roundings."""
    for at, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one.shape != other.shape:
            return f"output {at} has shape {one.shape}, not {other.shape}"
        if not jnp.issubdtype(other.dtype, jnp.inexact):
            if not np.array_equal(one, other):
                return f"output {at} differs, on random inputs"
            continue
        a, b = (each.astype(np.complex128) for each in (one, other))
        finite = np.isfinite(b)
        if not np.array_equal(np.isfinite(a), finite):
            return f"output {at} is finite elsewhere, on random inputs"
        # A few huge numbers (of masks) must not hide what the others do.
        there = np.abs(b[finite & (b != 0)])
        usual = np.median(there) if there.size else 1.0
        off = np.abs(a - b)[finite] / (np.abs(b)[finite] + usual)
        if off.size and off.max() > tolerance:
            return (
                f"output {at} is off by {100 * off.max():.2g} %, on random parameters "
                "and inputs"
            )
    return None
