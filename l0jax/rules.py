"""What each primitive says about the axes of its arguments: one rule per primitive.

A rule gets the values that an equation reads and gives those that it writes. It unifies
the axes that the primitive forces to agree, freezes those of which no position can go
without changing the others, and notes where an axis is *used*: contracted with
parameters, where the gates of its units belong. A primitive without a rule freezes all
that it touches. What a rule allows to be removed, it has proved removable.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l0jax.axes import ONE, Product, Sum, Type, freeze, fresh, split, unify

# ------------------------------------------------------------------------- values


@dataclass(frozen=True)
class Zeros:
    """Which axes of which parameters, if zero at some units, make a value zero there.

    The value is zero at a unit where all those are zero in which the unit lies.

    Attributes:
        slots: (path, axis) of parameters; empty if nothing is known.
        within: the parts of the axis whose units this is said of; None is all of it.
            Others may lie in the same parameters, and still not be zero there.
    """

    slots: frozenset[tuple[str, int]] = frozenset()
    within: tuple[Type, ...] | None = None


NEVER = Zeros()


@dataclass(frozen=True)
class Value:
    """What is known of one array.

    Attributes:
        axes: the type of each axis.
        zeros: for each axis, what makes the value zero at units along it.
        data: whether it depends on inputs, not on parameters alone.
        array: path of the parameter of which it holds all elements, and no others.
        parts: the number of turns of loops that hold them between them.
        summed: axes of which it is the plain sum; scaled, it would be their mean.
    """

    axes: tuple[Type, ...]
    zeros: tuple[Zeros, ...]
    data: bool
    array: str | None = None
    parts: int = 1
    summed: tuple[Type, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array as it was traced."""
        return tuple(axis.size for axis in self.axes)


@dataclass(frozen=True)
class Contraction:
    """A product that was summed over an axis: what a network costs.

    Attributes:
        primitive: its name.
        where: the line of the program.
        factors: axes whose sizes multiply to the number of multiply-accumulates.
        times: how often it runs: the length of the loops around it.
        parts: how many of these runs it takes to use the kernel once.
        kernel: path of the parameter that is one side of it, if one is.
        rest: those of the factors that are no axes of that parameter.
        reads: axes of that parameter over which it sums.
        makes: axes of that parameter that are left.
    """

    primitive: str
    where: str
    factors: tuple[Type, ...]
    times: int
    parts: int = 1
    kernel: str | None = None
    rest: tuple[Type, ...] = ()
    reads: tuple[int, ...] = ()
    makes: tuple[int, ...] = ()


@dataclass
class Reading:
    """What reading a program collects.

    Attributes:
        used: axes that were summed over, what makes what is summed zero (any of several
            does), and where.
        unknown: primitives without a rule, and the line of the first of each.
        contractions: for costs.
        constants: arrays of the program itself.
        merged: axes that became one; units that lie in it twice are known at neither.
        where: the primitive and the line that are being read.
        times: how often that line runs.
    """

    used: list[tuple[Type, tuple[Zeros, ...], str]] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    constants: list[Value] = field(default_factory=list)
    merged: list[tuple[Type, str]] = field(default_factory=list)
    where: str = ""
    times: int = 1


Rule = Callable[[Reading, Any, list[Value]], list[Value]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def new(shape: Sequence[int], data: bool) -> Value:
    """A value of which nothing is known."""
    axes = tuple(fresh(size) for size in shape)
    return Value(axes, (NEVER,) * len(axes), data)


def opaque(shape: Sequence[int], why: str) -> Value:
    """A value nothing of which may be removed."""
    value = new(shape, data=True)
    for axis in value.axes:
        freeze(axis, why)
    return value


def shapes_out(eqn: Any) -> list[tuple[int, ...]]:
    """Shapes of what an equation writes."""
    return [getattr(out.aval, "shape", ()) for out in eqn.outvars]


def frozen(reading: Reading, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Nothing that the equation touches may lose units."""
    for value in values:
        for axis in value.axes:
            freeze(axis, reading.where)
    return [opaque(shape, reading.where) for shape in shapes_out(eqn)]


def _some_data(values: Sequence[Value]) -> bool:
    return any(value.data for value in values)


def _union(zeros: Sequence[Zeros]) -> frozenset[tuple[str, int]]:
    return frozenset().union(*(one.slots for one in zeros))


def _fixed(size: int, why: str) -> Type:
    """The type of an axis that keeps its size."""
    axis = fresh(size)
    freeze(axis, why)
    return axis


# ------------------------------------------------------------- element by element


def names(text: str) -> frozenset[str]:
    """Names of primitives."""
    return frozenset(text.split())


ZERO_TO_ZERO = names(
    "abs asin asinh atan atanh cbrt ceil convert_element_type copy copy_p erf erf_inv "
    "expm1 floor imag integer_pow log1p name neg real reduce_precision round sign sin "
    "sinh sqrt square stop_gradient tan tanh"
)
SAME = names("convert_element_type copy copy_p name stop_gradient")
UNARY = ZERO_TO_ZERO | names(
    "acos acosh bessel_i0e bessel_i1e clz conj cos cosh digamma erfc exp exp2 "
    "is_finite lgamma log logistic not population_count rsqrt"
)
NARY = names(
    "add add_any and atan2 clamp complex div eq ge gt igamma igammac le lt max min mul "
    "ne nextafter or pow rem select_n shift_left shift_right_arithmetic "
    "shift_right_logical sub xor"
)
REDUCTIONS = names(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor "
    "argmax argmin"
)
RANDOM = names(
    "random_bits random_clone random_fold_in random_gamma random_seed random_split "
    "random_unwrap random_wrap rng_bit_generator threefry2x32"
)


@rule(*UNARY)
def _unary(reading, eqn, values):
    (value,) = values
    power = eqn.params.get("y", 1)
    keeps = eqn.primitive.name in ZERO_TO_ZERO and power > 0
    same = eqn.primitive.name in SAME
    zeros = value.zeros if keeps else (NEVER,) * len(value.axes)
    summed = value.summed if same else ()
    array = value.array if same else None
    return [Value(value.axes, zeros, value.data, array, value.parts, summed)]


@rule("bitcast_convert_type")
def _bits(reading, eqn, values):
    (value,), (shape,) = values, shapes_out(eqn)
    if shape != value.shape:
        return frozen(reading, eqn, values)
    return [Value(value.axes, (NEVER,) * len(value.axes), value.data)]


@rule("optimization_barrier", "device_put", "sharding_constraint", "pvary")
def _as_it_is(reading, eqn, values):
    return values


@rule(*NARY)
def _nary(reading, eqn, values):
    axes = _aligned(reading, values)
    name = eqn.primitive.name
    if name in ("mul", "div"):
        _freeze_means(reading, eqn, values)
    zeros = []
    for at, axis in enumerate(axes):
        along = [
            value.zeros[at]
            if len(value.axes) == len(axes) and value.axes[at].size == axis.size
            else NEVER
            for value in values
        ]
        literals = [_literal(atom) for atom in eqn.invars]
        if name == "mul":
            known = [one for one in along if one.slots]
            whole = [one for one in known if one.within is None]
            zeros.append((whole + known)[0] if known else NEVER)
        elif name == "div":
            zeros.append(along[0])
        elif name in ("add", "sub", "add_any", "max", "min"):
            zeros.append(_all_zero(along, [bool(HARMLESS[name](x)) for x in literals]))
        elif name == "select_n":
            zeros.append(_all_zero(along[1:], [bool(x == 0) for x in literals[1:]]))
        elif name == "clamp":
            low, _, high = literals
            inside = low is not None and high is not None and low <= 0 <= high
            zeros.append(along[1] if inside else NEVER)
        else:
            zeros.append(NEVER)
    return [Value(axes, tuple(zeros), _some_data(values))]


# Whether a literal beside zero leaves zero.
HARMLESS: dict[str, Callable[[Any], bool]] = {
    "add": lambda x: x == 0,
    "sub": lambda x: x == 0,
    "add_any": lambda x: x == 0,
    "max": lambda x: x is not None and x <= 0,
    "min": lambda x: x is not None and x >= 0,
}


def _aligned(reading: Reading, values: Sequence[Value]) -> tuple[Type, ...]:
    """The axes of values that are combined element by element, unified."""
    rank = max(len(value.axes) for value in values)
    full = [value for value in values if len(value.axes) == rank]
    axes = []
    for at in range(rank):
        size = max(value.axes[at].size for value in full)
        along = [value.axes[at] for value in full if value.axes[at].size == size]
        for other in along[1:]:
            unify(along[0], other, reading.where)
        axes.append(along[0])
    return tuple(axes)


def _freeze_means(reading: Reading, eqn: Any, values: Sequence[Value]) -> None:
    """A plain sum over units times a number is a mean, whose number would change."""
    for value in values:
        others = [other for other in values if other is not value]
        if value.summed and all(math.prod(o.shape) == 1 and not o.data for o in others):
            for axis in value.summed:
                freeze(axis, f"{reading.where}: a mean is taken over it")


def _literal(atom: Any) -> Any:
    """The number that an argument is, or None."""
    number = getattr(atom, "val", None)
    if number is None or np.ndim(number) or np.iscomplexobj(number):
        return None
    return number


def _all_zero(along: Sequence[Zeros], harmless: Sequence[bool]) -> Zeros:
    """Zero where all of several are."""
    along = [one for one, fine in zip(along, harmless, strict=True) if not fine]
    if len(along) == 1:
        return along[0]
    if not along or any(not one.slots or one.within is not None for one in along):
        return NEVER
    return Zeros(_union(along))


# ------------------------------------------------------------------- axes moved about


@rule("broadcast_in_dim")
def _broadcast(reading, eqn, values):
    (value, *_) = values
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    axes, zeros = [fresh(size) for size in shape], [NEVER] * len(shape)
    for axis, zero, at in zip(value.axes, value.zeros, places, strict=True):
        if axis.size == shape[at]:
            axes[at], zeros[at] = axis, zero
    whole = math.prod(shape) == math.prod(value.shape)
    array = value.array if whole else None
    return [replace(value, axes=tuple(axes), zeros=tuple(zeros), array=array)]


def _at(value: Value, places: Sequence[int]) -> Value:
    """A value with some of its axes, in this order; the others are of one position."""
    return replace(
        value,
        axes=tuple(value.axes[at] for at in places),
        zeros=tuple(value.zeros[at] for at in places),
    )


@rule("transpose")
def _transpose(reading, eqn, values):
    return [_at(values[0], eqn.params["permutation"])]


@rule("squeeze")
def _squeeze(reading, eqn, values):
    (value,) = values
    gone = eqn.params["dimensions"]
    return [_at(value, [at for at in range(len(value.axes)) if at not in gone])]


@rule("expand_dims")
def _expand(reading, eqn, values):
    (value,) = values
    axes, zeros = list(value.axes), list(value.zeros)
    for at in sorted(eqn.params["dimensions"]):
        axes.insert(at, ONE)
        zeros.insert(at, NEVER)
    return [replace(value, axes=tuple(axes), zeros=tuple(zeros))]


@rule("reshape")
def _reshape(reading, eqn, values):
    (value, *_) = values
    shape = eqn.params["new_sizes"]
    if eqn.params.get("dimensions") is not None or 0 in shape:
        return frozen(reading, eqn, values)
    axes: list[Type] = [ONE] * len(shape)
    zeros = [NEVER] * len(shape)
    for ins, outs in _pieces(value.shape, shape):
        if len(ins) == 1 and len(outs) == 1:
            axes[outs[0]], zeros[outs[0]] = value.axes[ins[0]], value.zeros[ins[0]]
            continue
        whole = Product(tuple(value.axes[at] for at in ins))
        along = [value.zeros[at] for at in ins]
        within = None
        if any(not one.slots or one.within is not None for one in along):
            within = tuple(
                part
                for at, one in zip(ins, along, strict=True)
                if one.slots
                for part in (one.within or (value.axes[at],))
            )
        for at in outs:
            zeros[at] = Zeros(_union(along), within)
        reading.merged.append((whole, reading.where))
        if len(outs) == 1:
            axes[outs[0]] = whole
            continue
        for at in outs:
            axes[at] = fresh(shape[at])
        unify(whole, Product(tuple(axes[at] for at in outs)), reading.where)
    return [replace(value, axes=tuple(axes), zeros=tuple(zeros))]


def _pieces(
    before: Sequence[int], after: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest runs of axes whose products agree; axes of one are left out."""
    ins = [at for at, size in enumerate(before) if size != 1]
    outs = [at for at, size in enumerate(after) if size != 1]
    while ins or outs:
        left, right = [ins.pop(0)], [outs.pop(0)]
        while True:
            a = math.prod(before[at] for at in left)
            b = math.prod(after[at] for at in right)
            if a == b:
                break
            if a < b:
                left.append(ins.pop(0))
            else:
                right.append(outs.pop(0))
        yield left, right


@rule("tile")
def _tile(reading, eqn, values):
    (value,) = values
    axes, zeros = [], []
    for axis, zero, times in zip(
        value.axes, value.zeros, eqn.params["reps"], strict=True
    ):
        again = _fixed(times, reading.where)
        axes.append(axis if times == 1 else Product((again, axis)))
        zeros.append(zero)
    return [Value(tuple(axes), tuple(zeros), value.data)]


@rule("concatenate")
def _concatenate(reading, eqn, values):
    at = eqn.params["dimension"]
    axes, zeros = [], []
    for axis in range(len(values[0].axes)):
        along = [value.axes[axis] for value in values]
        if axis == at:
            axes.append(Sum(tuple(along)))
        else:
            for other in along[1:]:
                unify(along[0], other, reading.where)
            axes.append(along[0])
        known = [value.zeros[axis] for value in values]
        zeros.append(_all_zero(known, [False] * len(known)))
    return [Value(tuple(axes), tuple(zeros), _some_data(values))]


@rule("pad")
def _pad(reading, eqn, values):
    value, _ = values
    axes = []
    for axis, config in zip(value.axes, eqn.params["padding_config"], strict=True):
        low, high, interior = map(int, config)
        if (low, high, interior) == (0, 0, 0):
            axes.append(axis)
        elif interior or low < 0 or high < 0:
            freeze(axis, reading.where)
            size = axis.size + low + high + interior * max(axis.size - 1, 0)
            axes.append(_fixed(size, reading.where))
        else:
            before = [fresh(low)] if low else []
            after = [fresh(high)] if high else []
            axes.append(Sum((*before, axis, *after)))
    return [Value(tuple(axes), (NEVER,) * len(axes), _some_data(values))]


@rule("slice")
def _slice(reading, eqn, values):
    (value,) = values
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    axes = []
    for axis, start, limit, stride in zip(
        value.axes, starts, limits, strides, strict=True
    ):
        middle = _between(axis, start, limit) if stride == 1 else None
        if middle is None:
            freeze(axis, reading.where)
            middle = _fixed(-(-(limit - start) // stride), reading.where)
        axes.append(middle)
    return [Value(tuple(axes), value.zeros, value.data)]


def _between(axis: Type, start: int, limit: int) -> Type | None:
    """The positions from `start` to `limit`, or None if the axis can't be cut there."""
    if start == limit:
        return None
    for low, high in ((0, limit), (start, limit - start)):
        ends = [high, axis.size - high] if low == 0 else [low, high]
        if 0 in ends:
            continue
        cut = split(axis, ends)
        if cut is None:
            return None
        axis = cut[0] if low == 0 else cut[1]
    return axis


@rule("split")
def _split(reading, eqn, values):
    (value,) = values
    at, sizes = eqn.params["axis"], [int(size) for size in eqn.params["sizes"]]
    pieces = split(value.axes[at], sizes)
    if pieces is None:
        return frozen(reading, eqn, values)
    return [
        Value((*value.axes[:at], piece, *value.axes[at + 1 :]), value.zeros, value.data)
        for piece in pieces
    ]


@rule("unstack")
def _unstack(reading, eqn, values):
    (value,) = values
    gone = eqn.params["axis"]
    freeze(value.axes[gone], f"{reading.where}: it is indexed")
    piece = _at(value, [at for at in range(len(value.axes)) if at != gone])
    return [replace(piece, array=None, summed=())] * len(eqn.outvars)


@rule("dynamic_slice")
def _dynamic_slice(reading, eqn, values):
    value = values[0]
    axes = []
    for axis, size in zip(value.axes, eqn.params["slice_sizes"], strict=True):
        if size != axis.size:
            freeze(axis, f"{reading.where}: it is indexed")
            axis = _fixed(size, reading.where)
        axes.append(axis)
    return [Value(tuple(axes), value.zeros, _some_data(values))]


@rule("dynamic_update_slice")
def _dynamic_update(reading, eqn, values):
    value, update = values[:2]
    for axis, part in zip(value.axes, update.axes, strict=True):
        if axis.size == part.size:
            unify(axis, part, reading.where)
        else:
            freeze(axis, f"{reading.where}: it is indexed")
            freeze(part, f"{reading.where}: it is indexed")
    zeros = [
        _all_zero([a, b], [False, False])
        for a, b in zip(value.zeros, update.zeros, strict=True)
    ]
    return [Value(value.axes, tuple(zeros), _some_data(values))]


@rule("gather")
def _gather(reading, eqn, values):
    operand, indices = values
    numbers = eqn.params["dimension_numbers"]
    sizes = eqn.params["slice_sizes"]
    if getattr(numbers, "operand_batching_dims", ()):
        return frozen(reading, eqn, values)
    (shape,) = shapes_out(eqn)
    axes: list[Type] = [ONE] * len(shape)
    zeros = [NEVER] * len(shape)
    rank = len(operand.axes)
    window = [at for at in range(rank) if at not in numbers.collapsed_slice_dims]
    for place, at in zip(numbers.offset_dims, window, strict=True):
        if sizes[at] == operand.axes[at].size and at not in numbers.start_index_map:
            axes[place] = operand.axes[at]
            zeros[place] = operand.zeros[at] if _fills_zeros(eqn) else NEVER
        else:
            freeze(operand.axes[at], f"{reading.where}: it is indexed")
            axes[place] = _fixed(sizes[at], reading.where)
    for at in {*numbers.start_index_map, *numbers.collapsed_slice_dims}:
        freeze(operand.axes[at], f"{reading.where}: it is indexed")
    freeze(indices.axes[-1], reading.where)
    others = [place for place in range(len(shape)) if place not in numbers.offset_dims]
    for place, axis in zip(others, indices.axes[:-1], strict=True):
        axes[place] = axis
    return [Value(tuple(axes), tuple(zeros), _some_data(values))]


def _fills_zeros(eqn: Any) -> bool:
    """Whether what a gather reads out of bounds is no number but zero (or not one)."""
    if eqn.params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return True
    fill = eqn.params["fill_value"]
    if fill is None:
        return jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact)
    return fill == 0


@rule("rev")
def _reverse(reading, eqn, values):
    (value,) = values
    for at in eqn.params["dimensions"]:
        freeze(value.axes[at], reading.where)
    return [value]


# ----------------------------------------------------------------- axes taken together


@rule(*REDUCTIONS)
def _reduce(reading, eqn, values):
    (value, *_) = values
    gone = eqn.params["axes"]
    summed = []
    for at in gone:
        if eqn.primitive.name == "reduce_sum" and value.zeros[at].slots:
            # Nothing is missing from a sum that has lost zeros.
            reading.used.append((value.axes[at], (value.zeros[at],), reading.where))
            summed.append(value.axes[at])
        else:
            freeze(value.axes[at], f"{reading.where}: it runs over all of it")
    # (The largest of no zeros is minus infinity.)
    some = all(value.axes[at].size for at in gone)
    keeps = eqn.primitive.name == "reduce_sum" or (
        some and eqn.primitive.name in ("reduce_max", "reduce_min")
    )
    left = _at(value, [at for at in range(len(value.axes)) if at not in gone])
    zeros = left.zeros if keeps else (NEVER,) * len(left.axes)
    return [Value(left.axes, zeros, value.data, summed=tuple(summed))]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(reading, eqn, values):
    (value,) = values
    freeze(value.axes[eqn.params["axis"]], reading.where)
    return [Value(value.axes, (NEVER,) * len(value.axes), value.data)]


@rule("sort")
def _sort(reading, eqn, values):
    axes = _aligned(reading, values)
    freeze(axes[eqn.params["dimension"]], reading.where)
    return [Value(axes, (NEVER,) * len(axes), value.data) for value in values]


@rule("top_k")
def _top_k(reading, eqn, values):
    (value,) = values
    axes = [*value.axes]
    at = eqn.params.get("axis", -1) % len(axes)
    freeze(axes[at], reading.where)
    axes[at] = _fixed(eqn.params["k"], reading.where)
    return [Value(tuple(axes), (NEVER,) * len(axes), value.data)] * 2


@rule("iota")
def _iota(reading, eqn, values):
    (shape,) = shapes_out(eqn)
    value = new(shape, data=False)
    freeze(value.axes[eqn.params["dimension"]], f"{reading.where}: it is counted")
    return [value]


@rule(*RANDOM)
def _random(reading, eqn, values):
    return frozen(reading, eqn, values)


# ------------------------------------------------------------------------ contractions


@rule("dot_general")
def _dot(reading, eqn, values):
    left, right = values
    (con_l, con_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
    for i, j in zip((*con_l, *batch_l), (*con_r, *batch_r), strict=True):
        unify(left.axes[i], right.axes[j], reading.where)
    for i, j in zip(con_l, con_r, strict=True):
        _use(reading, left, i, right, j)
    axes, zeros = [], []
    for i, j in zip(batch_l, batch_r, strict=True):
        axes.append(left.axes[i])
        zeros.append(left.zeros[i] if left.zeros[i].slots else right.zeros[j])
    free_l = [at for at in range(len(left.axes)) if at not in (*con_l, *batch_l)]
    free_r = [at for at in range(len(right.axes)) if at not in (*con_r, *batch_r)]
    for value, free in ((left, free_l), (right, free_r)):
        axes += [value.axes[at] for at in free]
        zeros += [value.zeros[at] for at in free]
    sides = [(left, con_l, free_l, right, free_r), (right, con_r, free_r, left, free_l)]
    # The side that is a parameter, and of two the one that no data has gone into.
    kernel, sums, makes, other, rest = min(
        sides, key=lambda side: (side[0].array is None, side[0].data)
    )
    reading.contractions.append(
        Contraction(
            "dot_general",
            reading.where,
            (*axes, *(left.axes[at] for at in con_l)),
            reading.times,
            kernel.parts,
            kernel.array,
            tuple(other.axes[at] for at in rest),
            _axes_of(kernel, sums),
            _axes_of(kernel, makes),
        )
    )
    return [Value(tuple(axes), tuple(zeros), _some_data(values))]


def _use(reading: Reading, left: Value, i: int, right: Value, j: int) -> None:
    """Notes that an axis is contracted, and what takes a unit out of the sum."""
    # The parameter's own axis rather than whatever made the other side.
    sides = sorted([(left, i), (right, j)], key=lambda side: side[0].data)
    zeros = tuple(value.zeros[at] for value, at in sides)
    reading.used.append((left.axes[i], zeros, reading.where))


def _axes_of(kernel: Value, places: Sequence[int]) -> tuple[int, ...]:
    """Axes of the parameter that a value holds, for some of the value's axes."""
    slots = _union([kernel.zeros[at] for at in places])
    return tuple(sorted(axis for path, axis in slots if path == kernel.array))


@rule("conv_general_dilated")
def _convolution(reading, eqn, values):
    x, kernel = values
    numbers = eqn.params["dimension_numbers"]
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    groups = eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] != 1:
        return frozen(reading, eqn, values)
    (shape,) = shapes_out(eqn)
    window = f"{reading.where}: a window slides over it"
    for axis in [x.axes[at] for at in lhs[2:]] + [kernel.axes[at] for at in rhs[2:]]:
        freeze(axis, window)
    axes = [_fixed(size, window) for size in shape]
    zeros = [NEVER] * len(shape)
    axes[out[0]], zeros[out[0]] = x.axes[lhs[0]], x.zeros[lhs[0]]
    axes[out[1]], zeros[out[1]] = kernel.axes[rhs[0]], kernel.zeros[rhs[0]]
    if groups == 1:
        unify(x.axes[lhs[1]], kernel.axes[rhs[1]], reading.where)
        _use(reading, x, lhs[1], kernel, rhs[1])
    else:
        # Channels are (group, channel of the group), and so are the outputs.
        group = fresh(groups)
        inside = kernel.axes[rhs[1]]
        made = fresh(kernel.axes[rhs[0]].size // groups)
        unify(x.axes[lhs[1]], Product((group, inside)), reading.where)
        unify(kernel.axes[rhs[0]], Product((group, made)), reading.where)
        reading.used.append((inside, (kernel.zeros[rhs[1]],), reading.where))
    rest = tuple(axes[at] for at in (out[0], *out[2:]))
    reading.contractions.append(
        Contraction(
            "conv_general_dilated",
            reading.where,
            (*rest, *kernel.axes),
            reading.times,
            kernel.parts,
            kernel.array,
            rest,
            _axes_of(kernel, rhs[1:]),
            _axes_of(kernel, rhs[:1]),
        )
    )
    return [Value(tuple(axes), tuple(zeros), _some_data(values))]


@rule("reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window")
def _window(reading, eqn, values):
    value = values[0]
    if len(eqn.outvars) > 1:
        return frozen(reading, eqn, values)
    (shape,) = shapes_out(eqn)
    window = f"{reading.where}: a window slides over it"
    axes, zeros = [], []
    for at, axis in enumerate(value.axes):
        still = (
            eqn.params["window_dimensions"][at] == 1
            and eqn.params["window_strides"][at] == 1
            and tuple(eqn.params["padding"][at]) == (0, 0)
            and eqn.params["base_dilation"][at] == 1
        )
        if not still:
            freeze(axis, window)
        axes.append(axis if still else _fixed(shape[at], window))
        zeros.append(value.zeros[at] if still and _window_of_zeros(eqn) else NEVER)
    return [Value(tuple(axes), tuple(zeros), _some_data(values))]


def _window_of_zeros(eqn: Any) -> bool:
    """Whether windows over zeros alone give zero: not where one lies in the padding."""
    if eqn.primitive.name == "reduce_window":  # may reduce by anything
        return False
    dilated = any(n != 1 for n in eqn.params["base_dilation"])
    dilated |= any(n != 1 for n in eqn.params["window_dilation"])
    inside = all(
        low < size and high < size
        for size, (low, high) in zip(
            eqn.params["window_dimensions"], eqn.params["padding"], strict=True
        )
    )
    return eqn.primitive.name == "reduce_window_sum" or (inside and not dilated)
