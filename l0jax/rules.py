"""What each primitive says about the axes of its arguments: one rule per primitive.

A rule gets the values that an equation reads and gives those that it writes. It unifies
the axes that the primitive forces to agree, freezes those of which no position can go
without changing the others, and notes where an axis is *used*: summed over, so that
gates belong where they make what is summed zero. A primitive without a rule freezes all
that it touches. What a rule allows to be removed, it has proved removable.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from l0jax.axes import (
    ONE,
    Product,
    Sum,
    Type,
    freeze,
    fresh,
    split,
    unify,
)
from l0jax.values import (
    NEVER,
    Alike,
    Contraction,
    Reading,
    Use,
    Value,
    Zeros,
    all_alike,
    elements,
    fixed,
    opaque,
    shapes_out,
    union,
)

Rule = Callable[[Reading, Any, list[Value]], list[Value]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def frozen(
    reading: Reading, eqn: Any, values: Sequence[Value], mixes: bool = True
) -> list[Value]:
    """Nothing that the equation touches may lose units."""
    for value in values:
        for axis in value.axes:
            freeze(axis, reading.where, mixes=mixes)
    return [opaque(shape, reading.where, mixes) for shape in shapes_out(eqn)]


def _some_data(values: Sequence[Value]) -> bool:
    return any(value.data for value in values)


def _ints(numbers: Sequence[Any]) -> list[int]:
    """Of some equations, axes are numbers of NumPy."""
    return [*map(int, numbers)]


def _alikes(value: Value) -> tuple[Alike, ...]:
    return tuple(value.alike(at) for at in range(len(value.axes)))


# ------------------------------------------------------------- element by element


def names(text: str) -> frozenset[str]:
    """Names of primitives."""
    return frozenset(text.split())


ZERO_TO_ZERO = names(
    "abs asin asinh atan atanh cbrt ceil conj convert_element_type copy copy_p erf "
    "erf_inv expm1 floor imag integer_pow log1p name neg real reduce_precision round "
    "sign sin sinh sqrt square stop_gradient tan tanh"
)
SAME = names("convert_element_type copy copy_p name stop_gradient")
UNARY = ZERO_TO_ZERO | names(
    "acos acosh bessel_i0e bessel_i1e clz cos cosh digamma erfc exp exp2 is_finite "
    "lgamma log logistic not population_count rsqrt"
)
NARY = names(
    "add add_any and atan2 clamp complex div eq eq_to ge gt igamma igammac le le_to lt "
    "lt_to max min mul ne nextafter or pow rem select_n shift_left "
    "shift_right_arithmetic shift_right_logical sub xor"
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
    array = value.array if same else None
    return [Value(value.axes, zeros, value.data, array, value.parts, _alikes(value))]


@rule("bitcast_convert_type")
def _bits(reading, eqn, values):
    (value,), (shape,) = values, shapes_out(eqn)
    if shape != value.shape:
        return frozen(reading, eqn, values)
    zeros = (NEVER,) * len(value.axes)
    return [Value(value.axes, zeros, value.data, even=_alikes(value))]


@rule("optimization_barrier", "device_put", "sharding_constraint", "pvary")
def _as_it_is(reading, eqn, values):
    return values


@rule(*NARY)
def _nary(reading, eqn, values):
    axes = _aligned(reading, values)
    name = eqn.primitive.name
    zeros: list[Zeros] = []
    even: list[Alike] = []
    for at, axis in enumerate(axes):
        # What has one position along the axis is the same at all its units.
        along = [
            value.zeros[at]
            if len(value.axes) == len(axes) and value.axes[at].size == axis.size
            else NEVER
            for value in values
        ]
        zeros.append(_zero_of(name, along, [value.number for value in values]))
        even.append(
            all_alike([v.alike(at) for v in values if len(v.axes) == len(axes)])
        )
    return [Value(axes, tuple(zeros), _some_data(values), even=tuple(even))]


def _zero_of(name: str, along: Sequence[Zeros], numbers: Sequence[Any]) -> Zeros:
    """What makes zero what is computed of several values, element by element."""
    if name in ("mul", "and"):
        known = [one for one in along if one.slots]
        whole = [one for one in known if one.within is None]
        return (whole + known)[0] if known else NEVER
    if name in ("div", "rem", "shift_left", "shift_right_logical"):
        return along[0]
    if name == "pow":
        power = numbers[1]
        return along[0] if power is not None and power > 0 else NEVER
    if name in HARMLESS:
        return _all_zero(
            along, [n is not None and bool(HARMLESS[name](n)) for n in numbers]
        )
    if name == "select_n":
        return _all_zero(along[1:], [_is_zero(n) for n in numbers[1:]])
    if name == "clamp":
        low, _, high = numbers
        inside = low is not None and high is not None and low <= 0 <= high
        return along[1] if inside else NEVER
    return NEVER


def _is_zero(number: Any) -> bool:
    return number is not None and bool(number == 0)


# Whether a number beside zero leaves zero.
HARMLESS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("add", "sub", "add_any", "ne", "or", "xor", "complex"), _is_zero),
    "max": lambda number: bool(number <= 0),
    "min": lambda number: bool(number >= 0),
    # 0 > number and 0 < number are false.
    "gt": lambda number: False,
    "lt": lambda number: False,
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


def _all_zero(along: Sequence[Zeros], harmless: Sequence[bool]) -> Zeros:
    """Zero where all of several are."""
    along = [one for one, fine in zip(along, harmless, strict=True) if not fine]
    if len(along) == 1:
        return along[0]
    if not along or any(not one.slots or one.within is not None for one in along):
        return NEVER
    return Zeros(union(along))


# ------------------------------------------------------------------- axes moved about


@rule("broadcast_in_dim")
def _broadcast(reading, eqn, values):
    (value, *_) = values
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    axes, zeros = [fresh(size) for size in shape], [NEVER] * len(shape)
    even: list[Alike] = [frozenset()] * len(shape)
    for from_, at in enumerate(places):
        if value.axes[from_].size == shape[at]:
            axes[at], zeros[at] = value.axes[from_], value.zeros[from_]
            even[at] = value.alike(from_)
    whole = elements(shape) == elements(value.shape)
    return [
        replace(
            value,
            axes=tuple(axes),
            zeros=tuple(zeros),
            even=tuple(even),
            array=value.array if whole else None,
        )
    ]


def _at(value: Value, places: Sequence[int]) -> Value:
    """A value with some of its axes, in this order; the others are of one position."""
    return replace(
        value,
        axes=tuple(value.axes[at] for at in places),
        zeros=tuple(value.zeros[at] for at in places),
        even=tuple(value.alike(at) for at in places),
    )


def _without(value: Value, gone: Sequence[int]) -> Value:
    return _at(value, [at for at in range(len(value.axes)) if at not in gone])


@rule("transpose")
def _transpose(reading, eqn, values):
    return [_at(values[0], _ints(eqn.params["permutation"]))]


@rule("squeeze")
def _squeeze(reading, eqn, values):
    return [_without(values[0], _ints(eqn.params["dimensions"]))]


@rule("expand_dims")
def _expand(reading, eqn, values):
    (value,) = values
    axes, zeros, even = list(value.axes), list(value.zeros), list(_alikes(value))
    for at in sorted(eqn.params["dimensions"]):
        axes.insert(at, ONE)
        zeros.insert(at, NEVER)
        even.insert(at, frozenset())
    return [replace(value, axes=tuple(axes), zeros=tuple(zeros), even=tuple(even))]


@rule("reshape")
def _reshape(reading, eqn, values):
    (value, *_) = values
    shape = eqn.params["new_sizes"]
    if eqn.params.get("dimensions") is not None:
        return frozen(reading, eqn, values)
    axes: list[Type] = [ONE] * len(shape)
    zeros = [NEVER] * len(shape)
    even: list[Alike] = [frozenset()] * len(shape)
    if 0 in shape:
        return [_empty(reading, value, shape)]
    for ins, outs in _pieces(value.shape, shape):
        if len(ins) == 1:
            # (Closed positions of an axis that is cut up are alike all over it.)
            for at in outs:
                even[at] = value.alike(ins[0])
        else:
            for at in outs:
                even[at] = None
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
            zeros[at] = Zeros(union(along), within)
        reading.merged.append((whole, reading.where))
        if len(outs) == 1:
            axes[outs[0]] = whole
            continue
        for at in outs:
            axes[at] = fresh(shape[at])
        unify(whole, Product(tuple(axes[at] for at in outs)), reading.where)
    return [replace(value, axes=tuple(axes), zeros=tuple(zeros), even=tuple(even))]


def _empty(reading: Reading, value: Value, shape: Sequence[int]) -> Value:
    """No elements in another shape: axes before and after all that differs stay."""
    both = min(len(shape), len(value.axes))
    same = [a == b for a, b in zip(value.shape, shape, strict=False)]
    first = same.index(False) if False in same else both
    back = [a == b for a, b in zip(value.shape[::-1], shape[::-1], strict=False)]
    last = back.index(False) if False in back else both
    last = min(last, both - first)
    for axis in value.axes[first : len(value.axes) - last]:
        freeze(axis, reading.where, mixes=False)
    middle = shape[first : len(shape) - last]
    axes = [
        *value.axes[:first],
        *(fixed(size, reading.where, mixes=False) for size in middle),
        *value.axes[len(value.axes) - last :],
    ]
    return Value(tuple(axes), (NEVER,) * len(axes), value.data)


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
    axes: list[Type] = []
    even: list[Alike] = []
    for at, times in enumerate(eqn.params["reps"]):
        axis = value.axes[at]
        axes.append(axis if times == 1 else Product((fresh(times), axis)))
        even.append(value.alike(at) if times == 1 or axis.size == 1 else None)
    return [Value(tuple(axes), value.zeros, value.data, even=tuple(even))]


@rule("concatenate")
def _concatenate(reading, eqn, values):
    at = int(eqn.params["dimension"])
    axes: list[Type] = []
    zeros: list[Zeros] = []
    even: list[Alike] = []
    for axis in range(len(values[0].axes)):
        along = [value.axes[axis] for value in values]
        if axis == at:
            axes.append(Sum(tuple(along)))
        else:
            for other in along[1:]:
                unify(along[0], other, reading.where)
            axes.append(along[0])
        known = [value.zeros[axis] for value in values]
        # (Along the axis itself, a part that is zero throughout says nothing of units.)
        nothing = [axis != at and _is_zero(value.number) for value in values]
        zeros.append(_all_zero(known, nothing))
        even.append(None if axis == at else all_alike([v.alike(axis) for v in values]))
    if at == len(axes) - 1:
        reading.columns[eqn.outvars[0]] = values
    return [Value(tuple(axes), tuple(zeros), _some_data(values), even=tuple(even))]


@rule("stack")
def _stack(reading, eqn, values):
    at, first = int(eqn.params["axis"]), values[0]
    axes = _aligned(reading, values)
    zeros = [
        _all_zero(
            [value.zeros[axis] for value in values],
            [_is_zero(value.number) for value in values],
        )
        for axis in range(len(first.axes))
    ]
    even = [all_alike([v.alike(axis) for v in values]) for axis in range(len(axes))]
    stacked = fixed(len(values), f"{reading.where}: it counts what is stacked", False)
    return [
        Value(
            (*axes[:at], stacked, *axes[at:]),
            (*zeros[:at], NEVER, *zeros[at:]),
            _some_data(values),
            even=(*even[:at], None, *even[at:]),
        )
    ]


@rule("pad")
def _pad(reading, eqn, values):
    value, filled = values
    axes: list[Type] = []
    zeros: list[Zeros] = []
    even: list[Alike] = []
    for at, config in enumerate(eqn.params["padding_config"]):
        low, high, interior = map(int, config)
        axis = value.axes[at]
        still = (low, high, interior) == (0, 0, 0)
        zeros.append(value.zeros[at] if still and _is_zero(filled.number) else NEVER)
        even.append(value.alike(at) if still else None)
        if still:
            axes.append(axis)
        elif interior or low < 0 or high < 0:
            freeze(axis, reading.where)
            size = axis.size + low + high + interior * max(axis.size - 1, 0)
            axes.append(fixed(size, reading.where))
        else:
            before = [fresh(low)] if low else []
            after = [fresh(high)] if high else []
            axes.append(Sum((*before, axis, *after)))
    return [Value(tuple(axes), tuple(zeros), _some_data(values), even=tuple(even))]


@rule("slice")
def _slice(reading, eqn, values):
    (value,) = values
    starts, limits = map(
        _ints, (eqn.params["start_indices"], eqn.params["limit_indices"])
    )
    strides = eqn.params["strides"] or (1,) * len(starts)
    axes = []
    for axis, start, limit, stride in zip(
        value.axes, starts, limits, strides, strict=True
    ):
        if stride == 1:
            middle = _between(axis, start, limit)
        else:
            middle = _every(axis, start, limit, stride, reading.where)
        if middle is None:
            freeze(axis, reading.where)
            middle = fixed(-(-(limit - start) // stride), reading.where)
        axes.append(middle)
    return [Value(tuple(axes), value.zeros, value.data, even=_alikes(value))]


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


def _every(axis: Type, start: int, limit: int, stride: int, where: str) -> Type | None:
    """Of rows of `stride` positions the one at `start` of each, or None if that is not
    what is taken."""
    rows, beyond = divmod(axis.size, stride)
    taken = -(-(limit - start) // stride)
    if beyond or start >= stride or taken != rows or rows < 2:
        return None
    outer = fresh(rows)
    step = fixed(stride, f"{where}: every {stride}th position is taken")
    unify(axis, Product((outer, step)), where)
    return outer


@rule("split")
def _split(reading, eqn, values):
    (value,) = values
    at, sizes = int(eqn.params["axis"]), _ints(eqn.params["sizes"])
    pieces = split(value.axes[at], sizes)
    if pieces is None:
        return frozen(reading, eqn, values)
    even = _alikes(value)
    return [
        Value(
            (*value.axes[:at], piece, *value.axes[at + 1 :]),
            value.zeros,
            value.data,
            even=even,
        )
        for piece in pieces
    ]


@rule("unstack")
def _unstack(reading, eqn, values):
    (value,) = values
    gone = int(eqn.params["axis"])
    freeze(value.axes[gone], f"{reading.where}: it is indexed")
    return [replace(_without(value, (gone,)), array=None)] * len(eqn.outvars)


@rule("dynamic_slice")
def _dynamic_slice(reading, eqn, values):
    value = values[0]
    axes = []
    for axis, size in zip(value.axes, eqn.params["slice_sizes"], strict=True):
        if size != axis.size:
            freeze(axis, f"{reading.where}: it is indexed")
            axis = fixed(size, reading.where)
        axes.append(axis)
    even = _alikes(value)
    return [Value(tuple(axes), value.zeros, _some_data(values), even=even)]


@rule("dynamic_update_slice")
def _dynamic_update(reading, eqn, values):
    value, update = values[:2]
    zeros: list[Zeros] = []
    even: list[Alike] = []
    for at, (axis, part) in enumerate(zip(value.axes, update.axes, strict=True)):
        if axis.size == part.size:
            unify(axis, part, reading.where)
        else:
            freeze(axis, f"{reading.where}: it is indexed")
            freeze(part, f"{reading.where}: it is indexed")
        both = [value.zeros[at], update.zeros[at]]
        zeros.append(_all_zero(both, [_is_zero(value.number), _is_zero(update.number)]))
        even.append(all_alike([value.alike(at), update.alike(at)]))
    return [Value(value.axes, tuple(zeros), _some_data(values), even=tuple(even))]


@rule("gather")
def _gather(reading, eqn, values):
    operand, indices = values
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    (shape,) = shapes_out(eqn)
    axes: list[Type] = [ONE] * len(shape)
    zeros = [NEVER] * len(shape)
    even: list[Alike] = [None] * len(shape)
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = [at for at in range(len(operand.axes)) if at not in gone]
    cut = slice_of(eqn, operand, indices)
    for place, at in zip(numbers.offset_dims, window, strict=True):
        # (What is as long as the axis can only begin at its first position.)
        piece = operand.axes[at] if sizes[at] == operand.axes[at].size else None
        if cut is not None and cut[0] == at:
            piece = _between(operand.axes[at], *cut[1:])
        if piece is not None:
            axes[place] = piece
            zeros[place] = operand.zeros[at] if _fills_zeros(eqn) else NEVER
            even[place] = operand.alike(at)
        else:
            _index(reading, operand.axes[at], None, operand.data)
            axes[place] = fixed(sizes[at], reading.where)
    in_order = _in_order(reading, eqn, values, numbers.start_index_map)
    for at in numbers.collapsed_slice_dims:
        along = in_order.get(at) if operand.data else None
        _index(reading, operand.axes[at], along, operand.data)
    freeze(indices.axes[-1], reading.where)
    others = [place for place in range(len(shape)) if place not in numbers.offset_dims]
    for at, place in enumerate(others):
        axes[place] = indices.axes[at]
    for at, along in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        unify(operand.axes[at], indices.axes[along], reading.where)
        if _fills_zeros(eqn):
            zeros[others[along]] = operand.zeros[at]
    return [Value(tuple(axes), tuple(zeros), _some_data(values), even=tuple(even))]


def _in_order(
    reading: Reading, eqn: Any, values: Sequence[Value], indexed: Sequence[int]
) -> dict[int, Type]:
    """For axes of what is indexed by 0, 1, 2, … to the end, that of these indices.

    Args:
        reading: what is collected.
        eqn: a gather or a scatter.
        values: what it indexes, the indices, and more.
        indexed: for each number along the last axis of the indices, the axis of what is
            indexed of which it is the position.
    """
    operand, indices = values[:2]
    atom = eqn.invars[1]
    literal = isinstance(atom, jax.extend.core.Literal)
    parts = [indices] if literal else reading.columns.get(atom, [indices])
    columns = [part for part in parts for _ in range(part.axes[-1].size)]
    found = {}
    for at, column in zip(indexed, columns, strict=True):
        if column.counts is not None:
            along = indices.axes[column.counts]
            if column.axes[-1].size == 1 and along.size == operand.axes[at].size:
                found[int(at)] = along
    return found


def _index(reading: Reading, axis: Type, in_order: Type | None, mixes: bool) -> None:
    """Notes that an axis is indexed: by each of its positions `in_order` along another,
    or by any, so that what follows is at other positions or at some alone."""
    why = f"{reading.where}: it is indexed"
    freeze(axis, why, mixes=mixes and in_order is None)
    if in_order is not None:
        unify(axis, in_order, reading.where)


def slice_of(eqn: Any, operand: Value, indices: Value) -> tuple[int, int, int] | None:
    """The axis, the start and the limit of a gather that is a slice along one axis, as
    slices are traced where other axes may have any size; None if it isn't one."""
    numbers, start = eqn.params["dimension_numbers"], indices.number
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    if gone or start is None or indices.shape != (1,):
        return None
    (at,) = numbers.start_index_map
    limit = int(start) + eqn.params["slice_sizes"][at]
    inside = start >= 0 and limit <= operand.axes[at].size
    return (at, int(start), limit) if inside else None


def _fills_zeros(eqn: Any) -> bool:
    """Whether what a gather reads out of bounds is no number but zero, or not one: an
    example that does so has no value then, with closed gates and without the units."""
    if eqn.params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return True
    fill = eqn.params["fill_value"]
    if fill is None or fill != fill:
        return jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact)
    return fill == 0


SCATTERS = names("scatter scatter-add scatter-mul scatter-min scatter-max scatter_sub")


@rule(*SCATTERS)
def _scatter(reading, eqn, values):
    operand, indices, updates = values
    numbers = eqn.params["dimension_numbers"]
    axes = list(operand.axes)
    zeros: list[Zeros] = [NEVER] * len(axes)
    even: list[Alike] = [None] * len(axes)
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [at for at in range(len(axes)) if at not in gone]
    one_is_enough = eqn.primitive.name == "scatter-mul"
    for at, place in zip(window, numbers.update_window_dims, strict=True):
        if updates.axes[place].size != axes[at].size:
            _index(reading, axes[at], None, mixes=True)
            _index(reading, updates.axes[place], None, mixes=True)
            continue
        unify(axes[at], updates.axes[place], reading.where)
        known = [operand.zeros[at], updates.zeros[place]]
        nothing = [_is_zero(operand.number), _is_zero(updates.number)]
        zeros[at] = known[0] if one_is_enough else _all_zero(known, nothing)
        even[at] = all_alike([operand.alike(at), updates.alike(place)])
    in_order = _in_order(reading, eqn, values, numbers.scatter_dims_to_operand_dims)
    for at in numbers.inserted_window_dims:
        _index(reading, axes[at], in_order.get(at), mixes=True)
    freeze(indices.axes[-1], reading.where)
    others = [
        place
        for place in range(len(updates.axes))
        if place not in numbers.update_window_dims
    ]
    kept = [indices.axes[along] for along in numbers.scatter_indices_batching_dims]
    kept += [in_order[at] for at in numbers.inserted_window_dims if at in in_order]
    for along, place in enumerate(others):
        unify(indices.axes[along], updates.axes[place], reading.where)
        if not any(indices.axes[along] is axis for axis in kept):
            # Several may come to one place, or to places in another order.
            _index(reading, indices.axes[along], None, mixes=True)
    for at, along in zip(
        numbers.operand_batching_dims,
        numbers.scatter_indices_batching_dims,
        strict=True,
    ):
        unify(axes[at], indices.axes[along], reading.where)
    return [Value(tuple(axes), tuple(zeros), _some_data(values), even=tuple(even))]


@rule("rev")
def _reverse(reading, eqn, values):
    (value,) = values
    for at in eqn.params["dimensions"]:
        freeze(value.axes[at], reading.where)
    return [replace(value, array=None, even=_alikes(value))]


# ----------------------------------------------------------------- axes taken together

# Reductions of which a part over closed units is known: they all have one value.
OF_ALIKE = names("reduce_sum reduce_max reduce_min")


@rule(*REDUCTIONS)
def _reduce(reading, eqn, values):
    (value, *_) = values
    gone, name = _ints(eqn.params["axes"]), eqn.primitive.name
    for at in gone:
        zeros, alike = value.zeros[at], value.alike(at)
        if name == "reduce_sum" and zeros.slots:
            # Nothing is missing from a sum that has lost zeros.
            _uses(reading, value.axes[at], zeros)
        elif name in OF_ALIKE and alike:
            # What is missing is one value, so many times as units are closed: that of
            # one of them alone, which lies along no other axis.
            others = [axis for other, axis in enumerate(value.axes) if other != at]
            for axis in others:
                both = Product((value.axes[at], axis))
                reading.merged.append((both, reading.where))
            _uses(reading, value.axes[at], Zeros(alike))
        else:
            freeze(value.axes[at], f"{reading.where}: it runs over all of it")
    # (The largest of no zeros is minus infinity.)
    some = all(value.axes[at].size for at in gone)
    keeps = name in ("reduce_sum", "reduce_or") or (
        some and name in ("reduce_max", "reduce_min", "reduce_prod", "reduce_and")
    )
    left = _without(value, gone)
    zeros = left.zeros if keeps else (NEVER,) * len(left.axes)
    return [Value(left.axes, zeros, value.data, even=left.even)]


def _uses(reading: Reading, axis: Type, zeros: Zeros) -> None:
    reading.uses.append(Use(axis, (zeros,), (False,), reading.where))


def _others(value: Value, at: int, keeps: bool) -> Value:
    """What is computed along one axis, of all others as they are."""
    alike = _alikes(value)
    zeros = [z if keeps and i != at else NEVER for i, z in enumerate(value.zeros)]
    even = [one if i != at else None for i, one in enumerate(alike)]
    return Value(value.axes, tuple(zeros), value.data, even=tuple(even))


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(reading, eqn, values):
    (value,) = values
    at = int(eqn.params["axis"])
    freeze(value.axes[at], reading.where)
    return [_others(value, at, eqn.primitive.name != "cumlogsumexp")]


@rule("sort")
def _sort(reading, eqn, values):
    axes = _aligned(reading, values)
    at = int(eqn.params["dimension"])
    freeze(axes[at], reading.where)
    if len(values) == 1:
        return [_others(replace(values[0], axes=axes), at, True)]
    return [Value(axes, (NEVER,) * len(axes), _some_data(values)) for _ in values]


@rule("top_k")
def _top_k(reading, eqn, values):
    (value,) = values
    at = eqn.params.get("axis", -1) % len(value.axes)
    freeze(value.axes[at], reading.where)
    axes = [*value.axes]
    axes[at] = fixed(eqn.params["k"], reading.where)
    found = replace(_others(value, at, True), axes=tuple(axes))
    return [found, replace(found, zeros=(NEVER,) * len(axes))]


@rule("fft")
def _fft(reading, eqn, values):
    (value,), (shape,) = values, shapes_out(eqn)
    first = len(value.axes) - len(eqn.params["fft_lengths"])
    axes = [*value.axes]
    for at in range(first, len(axes)):
        freeze(axes[at], reading.where)
        axes[at] = fixed(shape[at], reading.where)
    transformed = range(first, len(axes))
    zeros = [NEVER if at in transformed else z for at, z in enumerate(value.zeros)]
    even = [None if at in transformed else a for at, a in enumerate(_alikes(value))]
    return [Value(tuple(axes), tuple(zeros), value.data, even=tuple(even))]


@rule(*RANDOM)
def _random(reading, eqn, values):
    return frozen(reading, eqn, values, mixes=False)


# ------------------------------------------------------------------------ contractions


@rule("dot_general")
def _dot(reading, eqn, values):
    left, right = values
    (con_l, con_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
    for i, j in zip((*con_l, *batch_l), (*con_r, *batch_r), strict=True):
        unify(left.axes[i], right.axes[j], reading.where)
    for i, j in zip(con_l, con_r, strict=True):
        _use(reading, left, i, right, j)
    axes: list[Type] = []
    zeros: list[Zeros] = []
    even: list[Alike] = []
    for i, j in zip(batch_l, batch_r, strict=True):
        axes.append(left.axes[i])
        zeros.append(left.zeros[i] if left.zeros[i].slots else right.zeros[j])
        even.append(all_alike([left.alike(i), right.alike(j)]))
    free_l = [at for at in range(len(left.axes)) if at not in (*con_l, *batch_l)]
    free_r = [at for at in range(len(right.axes)) if at not in (*con_r, *batch_r)]
    for value, free in ((left, free_l), (right, free_r)):
        axes += [value.axes[at] for at in free]
        zeros += [value.zeros[at] for at in free]
        even += [value.alike(at) for at in free]
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
            tuple(axes[: len(batch_l)]),
            tuple(left.axes[at] for at in con_l),
            tuple(axes[len(batch_l) :]),
            left.data and right.data,
        )
    )
    return [Value(tuple(axes), tuple(zeros), _some_data(values), even=tuple(even))]


def _use(reading: Reading, left: Value, i: int, right: Value, j: int) -> None:
    """Notes that an axis is contracted, and what takes a unit out of the sum."""
    # The parameter's own axis rather than whatever made the other side.
    sides = sorted([(left, i), (right, j)], key=lambda side: side[0].data)
    zeros = tuple(value.zeros[at] for value, at in sides)
    severs = tuple(not value.data for value, _ in sides)
    where = reading.where
    for value, _ in sides:
        if value.array in reading.ungated:
            where += (
                f", which reads {value.array!r} of {reading.ungated[value.array]}, "
                "that a gate can't scale"
            )
    reading.uses.append(Use(left.axes[i], zeros, severs, where))


def _axes_of(kernel: Value, places: Sequence[int]) -> tuple[int, ...]:
    """Axes of the parameter that a value holds, for some of the value's axes."""
    slots = union([kernel.zeros[at] for at in places])
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
    axes = [fixed(size, window) for size in shape]
    zeros = [NEVER] * len(shape)
    axes[out[0]], zeros[out[0]] = x.axes[lhs[0]], x.zeros[lhs[0]]
    axes[out[1]], zeros[out[1]] = kernel.axes[rhs[0]], kernel.zeros[rhs[0]]
    apart, inputs, outputs = (), x.axes[lhs[1]], kernel.axes[rhs[0]]
    if groups == 1:
        unify(x.axes[lhs[1]], kernel.axes[rhs[1]], reading.where)
        _use(reading, x, lhs[1], kernel, rhs[1])
    else:
        # Channels are (group, channel of the group), and so are the outputs.
        group = fresh(groups)
        inside = kernel.axes[rhs[1]]
        made = fresh(kernel.axes[rhs[0]].size // groups)
        apart, inputs, outputs = (group,), inside, made
        unify(x.axes[lhs[1]], Product((group, inside)), reading.where)
        unify(kernel.axes[rhs[0]], Product((group, made)), reading.where)
        reading.uses.append(
            Use(inside, (kernel.zeros[rhs[1]],), (not kernel.data,), reading.where)
        )
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
            apart,
            (inputs,),
            (outputs,),
            x.data and kernel.data,
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
    axes: list[Type] = []
    zeros: list[Zeros] = []
    even: list[Alike] = []
    for at, axis in enumerate(value.axes):
        still = (
            eqn.params["window_dimensions"][at] == 1
            and eqn.params["window_strides"][at] == 1
            and tuple(eqn.params["padding"][at]) == (0, 0)
            and eqn.params["base_dilation"][at] == 1
        )
        if not still:
            freeze(axis, window)
        axes.append(axis if still else fixed(shape[at], window))
        zeros.append(value.zeros[at] if still and _window_of_zeros(eqn) else NEVER)
        even.append(value.alike(at) if still else None)
    return [Value(tuple(axes), tuple(zeros), _some_data(values), even=tuple(even))]


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
