"""Units: in which arrays, along which axis, at which positions does unit j live?

Gating, counting and removing all need this one fact. It is stated once per model, as
a dictionary `{name: Group}`, and every verb here is a few lines over it. Arrays are
addressed by their dotted path in any pytree: `"layers.0.kernel"`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree


@dataclass(frozen=True)
class Slot:
    """Where the units of a group lie in one array.

    Args:
        path: the array, as a dotted path in the pytree of parameters.
        axis: the axis along which the units lie, or None: the positions are the single
            elements of the array, in row-major order.
        unit_of: for each position the unit that it belongs to, or -1 for none. None:
            position j is unit j. A feature map of 50 channels that was flattened into
            800 inputs is `unit_of = tuple(j % 50 for j in range(800))`.
    """

    path: str
    axis: int | None
    unit_of: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Group:
    """Interchangeable units, and every place where one of them is stored.

    Args:
        name: how people and files call the group.
        size: number of units.
        used_by: slots that consume the units (the contracted axis of the next kernel).
            Gates multiply these, so that a closed gate removes its unit exactly,
            whatever bias, normalisation or activation lies in between.
        made_by: slots that produce the units (kernel output axis, bias, norm scale).
    """

    name: str
    size: int
    used_by: tuple[Slot, ...]
    made_by: tuple[Slot, ...] = ()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every place where a unit is stored."""
        return self.made_by + self.used_by


Groups = Mapping[str, Group]
Keep = Mapping[str, Bool[np.ndarray, " units"]]
"""Of each group that loses units, a flag for each unit."""


Probabilities = Mapping[str, Float[Array, " _units"] | Float[np.ndarray, " _units"]]
"""Of each group the probability that a unit is there; others are there entirely."""


class Certain(dict[str, Any]):
    """Probabilities that are all 0 or 1, in NumPy: what is expected is then counted, in
    whole numbers of any size, and nothing is compiled."""


Amount = Float[Array, ""] | int
"""What is expected; under `Certain` probabilities a whole number."""


def path_of(key_path: tuple[Any, ...]) -> str:
    """The dotted path of a leaf, from its key path in JAX."""
    # Flax boxes its arrays in a node with the one field `value`: not part of the name.
    if key_path and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator=".")


def arrays(tree: PyTree) -> dict[str, Any]:
    """All leaves of `tree` by dotted path.

    Raises:
        ValueError: if two have the same, as in `{"a": {"b": x}, "a.b": y}`.
    """
    found: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = path_of(key_path)
        if path in found:
            raise ValueError(
                f"two arrays have the same path {path!r}; rename one of them"
            )
        found[path] = leaf
    return found


def replace(tree: PyTree, values: Mapping[str, Any]) -> PyTree:
    """`tree` with other leaves at some of its paths.

    Raises:
        ValueError: for a path that isn't there.
    """
    missing = values.keys() - arrays(tree).keys()
    if missing:
        raise ValueError(
            f"no array at {min(missing)!r}; there is {', '.join(arrays(tree))}"
        )
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: values.get(path_of(key_path), leaf), tree
    )


def check(tree: PyTree, groups: Groups) -> None:
    """Raises ValueError unless every slot of `groups` fits an array of `tree`."""
    shapes = {path: jnp.shape(leaf) for path, leaf in arrays(tree).items()}
    for group in groups.values():
        for slot in group.slots:
            if slot.path not in shapes:
                raise ValueError(
                    f"group {group.name!r}: no array at {slot.path!r}; "
                    f"there is {', '.join(shapes) or 'nothing'}"
                )
            _check_slot(group, slot, shapes[slot.path])


def check_lengths(values: Mapping[str, Any], groups: Groups) -> None:
    """Raises ValueError unless `values` has one for each unit of each of its groups."""
    _check_names(values, groups)
    for name, vector in values.items():
        _check_length(groups[name], vector)


def apply_gates(
    params: PyTree, z: Mapping[str, Float[Array, " units"]], groups: Groups
) -> PyTree:
    """`params` with every position where a unit is *used* multiplied by its gate.

    A group may be used in several places one after the other: units over which a norm
    runs are closed before it, so that they add nothing to it, and after it, since its
    shift makes something of zeros. A gate of 0 or 1 is the same in all; one between
    them acts at each place, so that it scales what the norm reads and what it gives.

    Args:
        params: any pytree of arrays.
        z: a vector of gate values for each group that is to be gated.
        groups: where the units lie; groups that are not in `z` stay as they are.

    Returns:
        A new pytree of the same structure, shapes and dtypes.

    Raises:
        ValueError: if a group is unknown, a vector has the wrong length, or a slot
            does not fit its array.
    """
    check_lengths(z, groups)
    factors: dict[str, list[Array]] = {}
    shapes = {path: jnp.shape(leaf) for path, leaf in arrays(params).items()}
    check(params, {name: _used(groups[name]) for name in z})
    for name, values in z.items():
        for slot in groups[name].used_by:
            factor = _along(values, slot, shapes[slot.path], outside=1)
            factors.setdefault(slot.path, []).append(factor)

    def gate(key_path, leaf):
        for factor in factors.get(path_of(key_path), ()):
            leaf = leaf * factor.astype(leaf.dtype)
        return leaf

    return jax.tree_util.tree_map_with_path(gate, params)


def expected_size(
    array: Array | np.ndarray | jax.ShapeDtypeStruct,
    path: str,
    prob_active: Probabilities,
    groups: Groups,
) -> Amount:
    r"""Expected number of elements of one array that are left, under independent gates.

    Element (i, k, …) is left if all its units are: along each axis the expected number
    of positions is $\sum_j \prod_g P(z_{g,u_g(j)} \neq 0)$, and the axes multiply. Only
    where a group lies along two axes, so that an element may need one gate twice, or
    where single elements are gated too, is the sum taken over all elements.

    Args:
        array: the array at `path`; only its shape is read.
        path: its dotted path.
        prob_active: P(z != 0) of each unit; groups that are missing are all there.
        groups: where the units lie, on both the making and the using side.

    Raises:
        ValueError: if a group lies along more than two axes of the array, unless all
            is certain.
    """
    if isinstance(prob_active, Certain):
        return _size_left(array.shape, path, prob_active, groups)
    axes: dict[int | None, Array] = {}
    both = jnp.ones(())
    for name, given in prob_active.items():
        probabilities = jnp.asarray(given)
        slots = [slot for slot in groups[name].slots if slot.path == path]
        places = list(dict.fromkeys(slot.axis for slot in slots))
        if len(places) == len(slots) == 2 and None not in places:
            one, other = slots
            size = groups[name].size
            both = both * _on_both(probabilities, one, other, array.shape, size)
            continue
        if len(places) > 1:
            raise ValueError(
                f"group {name!r} lies along axes {places} of {path!r}; what is "
                "expected is known along two axes at the most, once along each"
            )
        for slot in _stated_once(slots, groups[name].size):
            along = _vector(probabilities, slot, outside=1)
            axes[slot.axis] = along * axes.get(slot.axis, 1)
    if None in axes or both.ndim:
        left = both
        for axis, along in axes.items():
            left = left * _placed(along, axis, array.shape)
        # Axes along which nothing varies are still of one position here.
        shape = jnp.shape(left) or (1,) * len(array.shape)
        return left.sum() * (math.prod(array.shape) / math.prod(shape))
    total = jnp.ones(())
    for axis, positions in enumerate(array.shape):
        total = total * (axes[axis].sum() if axis in axes else float(positions))
    return total


def _size_left(shape: tuple[int, ...], path: str, certain: Certain, groups: Groups):
    """The number of elements all of whose units are left."""
    axes = [np.ones(n, bool) for n in shape]
    elements = None
    for name, flags in certain.items():
        units = np.append(flags, 1) > 0
        for slot in groups[name].slots:
            if slot.path != path:
                continue
            there = units[owners(slot, len(flags))]
            if slot.axis is not None:
                axes[slot.axis] &= there
            else:
                elements = there if elements is None else elements & there
    if elements is not None:
        for axis, along in enumerate(axes):
            elements = elements.reshape(shape) & _placed(along, axis, shape)
        return int(np.count_nonzero(elements))
    return math.prod(int(np.count_nonzero(along)) for along in axes)


def _on_both(probabilities, one: Slot, other: Slot, shape, size: int) -> Array:
    """P(both gates are open) for the positions of two axes with units of one group."""
    p = _along(probabilities, one, shape, outside=1)
    q = _along(probabilities, other, shape, outside=1)
    unit = _placed(owners(one, size), one.axis, shape)
    same = unit == _placed(owners(other, size), other.axis, shape)
    return jnp.where(same & (unit >= 0), p, p * q)


def in_use(params: PyTree, groups: Groups) -> dict[str, Bool[np.ndarray, " units"]]:
    """Which units still reach anything: `keep[name][j]` is False iff every position of
    `params` that uses unit j is exactly zero.

    Of parameters with test-time gates folded in, this is what `shrink` may take out
    without changing the outputs, however the zeros came about: a closed gate of the
    group itself, single weights that were all closed, or gates of another group on the
    same axis.
    """
    leaves = arrays(params)
    check(params, {name: _used(group) for name, group in groups.items()})
    keep = {}
    for name, group in groups.items():
        alive = np.zeros(group.size, bool)
        for slot in group.used_by:
            reached = _by_position(np.asarray(leaves[slot.path]) != 0, slot, np.any)
            units = owners(slot, group.size)
            alive[units[reached & (units >= 0)]] = True
        keep[name] = alive
    return keep


def largest_use(values: PyTree, groups: Groups) -> dict[str, Float[Array, " units"]]:
    """For each unit the largest of the values at the positions that use it, at least 0.

    A function of JAX, to be compiled: of |θ| with test-time gates folded in, it is
    positive for the units that are in use.
    """
    leaves = arrays(values)
    largest = {}
    for name, group in groups.items():
        most = jnp.zeros(group.size + 1)
        for slot in group.used_by:
            along = _by_position(leaves[slot.path], slot, jnp.max)
            # Positions of no unit go to the last entry, which is dropped.
            most = most.at[owners(slot, group.size)].max(along)
        largest[name] = most[:-1]
    return largest


def round_to(keep: Keep, multiple: int | Mapping[str, int]) -> dict[str, np.ndarray]:
    """`keep` with so many more units that every width is a multiple of some number, as
    hardware may want it; the widest possible is all of them.

    The units that come back are the first that were not kept. With their closed gates
    folded in they contribute nothing.

    Args:
        keep: a boolean vector for each group.
        multiple: one number, or one for each group that is to be rounded.

    Raises:
        ValueError: if a multiple is not positive, or one is given for a group that is
            not in `keep`.
    """
    if not isinstance(multiple, Mapping):
        multiple = dict.fromkeys(keep, multiple)
    for name, number in multiple.items():
        if name not in keep:
            raise ValueError(
                f"a multiple is given for {name!r}; keep has {', '.join(keep)}"
            )
        if number < 1:
            raise ValueError(
                f"the multiple for {name!r} must be at least 1, got {number}"
            )
    rounded = {}
    for name, flags in keep.items():
        flags = np.array(flags, bool)
        missing = -int(flags.sum()) % multiple.get(name, 1)
        flags[np.flatnonzero(~flags)[:missing]] = True
        rounded[name] = flags
    return rounded


def left(
    tree: PyTree, keep: Keep, groups: Groups
) -> dict[str, Bool[np.ndarray, " _units"]]:
    """Which units of every group are left if those that are not kept are taken out.

    Beside the units that are not kept, those go all of whose uses go with them: a
    position of a flattened feature map goes with the map, and what is read by an array
    alone of which nothing is left goes with that.

    Raises:
        ValueError: as `shrink`.
    """
    check_lengths(keep, groups)
    shapes = {path: jnp.shape(leaf) for path, leaf in arrays(tree).items()}
    flags = {
        name: np.array(keep.get(name, np.ones(group.size, bool)), bool)
        for name, group in groups.items()
    }
    while True:
        masks = positions_left(tree, flags, groups)
        empty = {path for (path, _), there in masks.items() if not there.any()}
        before = sum(int(each.sum()) for each in flags.values())
        for name, group in groups.items():
            reached = np.zeros(group.size + 1, bool)
            for slot in group.used_by:
                if slot.path not in empty:
                    there = _left_along(slot, shapes[slot.path], masks)
                    reached[owners(slot, group.size)[there]] = True
            flags[name] &= reached[:-1]
        if sum(int(each.sum()) for each in flags.values()) == before:
            return flags


def shrink(tree: PyTree, keep: Keep, groups: Groups) -> PyTree:
    """`tree` with the units that are not kept taken out of every array.

    A position goes if any of its units goes. Single elements (a slot whose axis is
    None) can't be taken out of an array: they become zero, or False in a mask.

    Args:
        tree: the arrays, on the host or on a device; every slot of `groups` is in it.
        keep: a boolean vector for each group that loses units.
        groups: where the units lie.

    Returns:
        A new pytree of the same structure with smaller arrays; of a group that keeps no
        unit, with arrays that have no elements.

    Raises:
        ValueError: if a group is unknown, a vector has the wrong length, or a slot does
            not fit its array.
    """
    masks, elements = _positions(tree, keep, groups)

    def cut(key_path, leaf):
        path = path_of(key_path)
        if path in elements:
            leaf = leaf * elements[path].reshape(leaf.shape).astype(leaf.dtype)
        return take(leaf, path, masks)

    return jax.tree_util.tree_map_with_path(cut, tree)


def shrink_groups(tree: PyTree, keep: Keep, groups: Groups) -> dict[str, Group]:
    """`groups` as they lie in the arrays that `shrink` gives, numbered anew.

    Args:
        tree: the arrays before.
        keep: what `left` gives, a vector for every group.
        groups: where the units lie before.
    """
    masks = positions_left(tree, keep, groups)
    shapes = {path: jnp.shape(leaf) for path, leaf in arrays(tree).items()}

    def after(slot: Slot, flags: np.ndarray) -> Slot:
        number = np.append(np.where(flags, np.cumsum(flags) - 1, -1), -1)
        there = _left_along(slot, shapes[slot.path], masks)
        units = number[owners(slot, len(flags))[there]]
        if np.array_equal(units, np.arange(flags.sum())):
            return Slot(slot.path, slot.axis)
        return Slot(slot.path, slot.axis, tuple(units.tolist()))

    return {
        name: Group(
            name,
            int(keep[name].sum()),
            tuple(after(slot, keep[name]) for slot in group.used_by),
            tuple(after(slot, keep[name]) for slot in group.made_by),
        )
        for name, group in groups.items()
    }


Masks = dict[tuple[str, int], np.ndarray]
"""For (path, axis) of an array, which positions are left."""


def take(leaf: Any, path: str, masks: Masks) -> Any:
    """What is left of the array at `path`."""
    for axis in range(jnp.ndim(leaf)):
        if (path, axis) in masks:
            leaf = leaf.take(np.flatnonzero(masks[path, axis]), axis=axis)
    return leaf


def positions_left(tree: PyTree, keep: Keep, groups: Groups) -> Masks:
    """For each axis of an array that units lie along, which of its positions are left.

    Raises:
        ValueError: as `shrink`.
    """
    return _positions(tree, keep, groups)[0]


def _positions(
    tree: PyTree, keep: Mapping[str, Any], groups: Groups
) -> tuple[Masks, dict[str, np.ndarray]]:
    """Positions of axes that are left, and elements that are, where they are units."""
    check_lengths(keep, groups)
    check(tree, {name: groups[name] for name in keep})
    masks: Masks = {}
    elements: dict[str, np.ndarray] = {}
    for name, flags in keep.items():
        flags = np.asarray(flags, bool)
        for slot in groups[name].slots:
            along = np.append(flags, True)[owners(slot, len(flags))]
            if slot.axis is None:
                elements[slot.path] = elements.get(slot.path, True) & along
            else:
                key = (slot.path, slot.axis)
                masks[key] = masks.get(key, True) & along
    return masks, elements


def _left_along(slot: Slot, shape: tuple[int, ...], masks: Masks) -> np.ndarray:
    """Which positions of a slot are left."""
    if slot.axis is not None:
        return masks.get((slot.path, slot.axis), np.ones(shape[slot.axis], bool))
    there = np.ones(shape, bool)
    for axis in range(len(shape)):
        if (slot.path, axis) in masks:
            there &= _placed(masks[slot.path, axis], axis, shape)
    return there.ravel()


def charge(
    values: Callable[[Array], Array], params: PyTree, slots: Iterable[Slot], size: int
) -> Float[Array, " units"]:
    """Sums `values` of the weights in `slots` by the unit that they belong to.

    `charge(jnp.ones_like, …)` counts the weights of each unit, |g| in the papers;
    `charge(jnp.square, …)` is their squared norm.
    """
    leaves = arrays(params)
    total = jnp.zeros(size, jnp.float32)
    for slot in slots:
        amounts = values(_magnitude(leaves[slot.path]))
        amounts = _by_position(amounts, slot, jnp.sum)
        if slot.unit_of is None:
            total = total + amounts
        else:
            units = owners(slot, size)
            # Positions of no unit go to an extra last entry, which is dropped.
            total = total + jnp.zeros(size + 1).at[units].add(amounts)[:-1]
    return total


def free(
    values: Callable[[Array], Array], array: Array, slots: Iterable[Slot]
) -> Float[Array, ""]:
    """Sums `values` of the weights of one array that belong to no unit of `slots`."""
    owned = np.zeros(array.shape, bool)
    for slot in slots:
        if slot.unit_of is None:
            return jnp.zeros(())
        owned |= _placed(np.asarray(slot.unit_of, int) >= 0, slot.axis, array.shape)
    return jnp.where(owned, 0, values(_magnitude(array))).sum()


def _magnitude(array: Array | np.ndarray) -> Array:
    """In float32, of complex numbers their absolute value, whose square is |w|²."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.abs(array)
    return jnp.asarray(array, jnp.float32)


def _used(group: Group) -> Group:
    return Group(group.name, group.size, group.used_by)


def owners(slot: Slot, size: int) -> Int[np.ndarray, " positions"]:
    """The unit of each position of a slot's axis, of a group of `size` units; -1 where
    it is of none."""
    return np.arange(size) if slot.unit_of is None else np.array(slot.unit_of, int)


def _by_position(array, slot: Slot, reduce: Callable):
    """`array` reduced to one value for each position of the slot."""
    if slot.axis is None:
        return array.ravel()
    return reduce(array, axis=tuple(a for a in range(array.ndim) if a != slot.axis))


def _vector(values, slot: Slot, outside):
    """`values` of the units, laid out along the slot's axis."""
    if slot.unit_of is None:
        return values
    return jnp.append(values, jnp.full(1, outside, values.dtype))[
        np.asarray(slot.unit_of, int)
    ]


def _along(values, slot: Slot, shape: tuple[int, ...], outside):
    """`_vector`, shaped so that it broadcasts against an array of `shape`."""
    return _placed(_vector(values, slot, outside), slot.axis, shape)


def _placed(along, axis: int | None, shape: tuple[int, ...]):
    """A vector along one axis, shaped to broadcast against an array of `shape`."""
    if axis is None:
        return along.reshape(shape)
    return along.reshape([n if a == axis else 1 for a, n in enumerate(shape)])


def _stated_once(slots: list[Slot], size: int) -> list[Slot]:
    """`slots` of one axis, without positions whose unit an earlier one states."""
    once: list[Slot] = []
    for slot in slots:
        left = owners(slot, size)
        for earlier in once:
            left = np.where(left == owners(earlier, size), -1, left)
        once.append(Slot(slot.path, slot.axis, tuple(left.tolist())))
    return once


def _check_names(given: Mapping[str, Any], groups: Groups) -> None:
    unknown = [name for name in given if name not in groups]
    if unknown:
        # Groups that `l0jax.trace` found know why others are not among them.
        left_alone = getattr(groups, "frozen", {})
        if unknown[0] in left_alone:
            raise ValueError(
                f"group {unknown[0]!r} is frozen: {left_alone[unknown[0]].why}"
            )
        raise ValueError(
            f"unknown group {unknown[0]!r}; there is {', '.join(groups) or 'none'}"
        )


def _check_length(group: Group, values) -> None:
    if jnp.shape(values) != (group.size,):
        raise ValueError(
            f"group {group.name!r} has {group.size} units, "
            f"got values of shape {jnp.shape(values)}"
        )


def _check_slot(group: Group, slot: Slot, shape: tuple[int, ...]) -> None:
    where = f"group {group.name!r}, array {slot.path!r} of shape {shape}"
    if slot.axis is not None and not 0 <= slot.axis < len(shape):
        raise ValueError(f"{where}: it has no axis {slot.axis}")
    positions = math.prod(shape) if slot.axis is None else shape[slot.axis]
    described = group.size if slot.unit_of is None else len(slot.unit_of)
    if positions != described:
        what = "it" if slot.axis is None else f"axis {slot.axis}"
        raise ValueError(
            f"{where}: {what} has {positions} positions, the slot describes {described}"
        )
    if slot.unit_of is not None and not all(
        -1 <= unit < group.size for unit in slot.unit_of
    ):
        raise ValueError(
            f"{where}: unit_of must lie in [-1, {group.size}), "
            f"got {min(slot.unit_of)} to {max(slot.unit_of)}"
        )
