"""Laws of units: gating, counting and removing agree on where a unit lives.

The dictionaries and groups below are random: plain axes, flattened axes (`unit_of`),
positions of no unit (-1), and single elements.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from l0jax import units
from l0jax.units import Group, Slot

DRAWS = 4000


# The strategies draw plain tuples: making a `Slot` under beartype uses `random`, which
# hypothesis forbids inside of a strategy.


@st.composite
def slots(draw, path, shape, size, axes):
    """Arguments of a slot of a group of `size` units in the array at `path`."""
    axis = draw(st.sampled_from(axes))
    positions = math.prod(shape) if axis is None else shape[axis]
    if positions == size and draw(st.booleans()):
        return path, axis
    owners = st.lists(st.integers(-1, size - 1), min_size=positions, max_size=positions)
    return path, axis, tuple(draw(owners))


@st.composite
def structures(draw, elements):
    shapes = {}
    for i in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        shapes[f"layer{i % 2}.w{i}"] = tuple(shape)
    groups = {}
    for name in draw(st.sampled_from([("a",), ("a", "b")])):
        size = draw(st.integers(1, 4))
        paths = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, unique=True))
        chosen = [
            draw(
                slots(
                    path,
                    shapes[path],
                    size,
                    [*range(len(shapes[path])), *([None] if elements else [])],
                )
            )
            for path in paths
        ]
        cut = draw(st.integers(0, len(chosen)))
        groups[name] = (size, chosen[cut:], chosen[:cut])
    return shapes, draw(st.integers(0, 999)), groups


def arrays_and_groups(data, elements=True):
    """Arrays in a nested dictionary, and groups of units in them.

    A group lies along at most one axis of each array.
    """
    shapes, seed, described = data.draw(structures(elements))
    rng, tree = np.random.default_rng(seed), {}
    for path, shape in shapes.items():
        layer, name = path.split(".")
        values = jnp.float32(rng.normal(size=shape))
        tree.setdefault(layer, {})[name] = values
    groups = {
        name: Group(
            name,
            size,
            tuple(Slot(*slot) for slot in used),
            tuple(Slot(*slot) for slot in made),
        )
        for name, (size, used, made) in described.items()
    }
    return tree, groups


def flags(groups):
    return st.fixed_dictionaries(
        {
            name: st.lists(st.booleans(), min_size=group.size, max_size=group.size).map(
                lambda kept: np.array(kept, bool)
            )
            for name, group in groups.items()
        }
    )


def positions_left(path, shape, keep, groups):
    """Along each axis of one array, which positions have all their units kept."""
    rows = [np.ones(n, bool) for n in shape]
    for name, group in groups.items():
        for slot in group.slots:
            if slot.path == path and slot.axis is not None:
                for j in range(shape[slot.axis]):
                    unit = j if slot.unit_of is None else slot.unit_of[j]
                    rows[slot.axis][j] &= unit < 0 or keep[name][unit]
    return rows


def leaves_something(tree, keep, groups):
    return all(kept.any() for kept in keep.values()) and all(
        along.any()
        for path, array in units.arrays(tree).items()
        for along in positions_left(path, array.shape, keep, groups)
    )


def owner(slot, index, shape):
    """The unit that the element at `index` of an array belongs to, or -1."""
    position = (
        np.ravel_multi_index(index, shape) if slot.axis is None else index[slot.axis]
    )
    return position if slot.unit_of is None else slot.unit_of[position]


def expected_factor(path, index, shape, values, slots_of):
    """What multiplies one element, by going through every slot, one at a time."""
    factor = 1.0
    for name, group_slots in slots_of.items():
        for slot in group_slots:
            if slot.path == path and (unit := owner(slot, index, shape)) >= 0:
                factor *= float(values[name][unit])
    return factor


@given(st.data())
def test_gates_multiply_each_element_that_uses_their_unit(data):
    tree, groups = arrays_and_groups(data)
    z = {
        name: jnp.float32(
            data.draw(
                st.lists(
                    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
                    min_size=group.size,
                    max_size=group.size,
                )
            )
        )
        for name, group in groups.items()
    }
    gated = units.apply_gates(tree, z, groups)
    assert jax.tree.structure(gated) == jax.tree.structure(tree)
    used = {name: group.used_by for name, group in groups.items()}
    before = units.arrays(tree)
    for path, after in units.arrays(gated).items():
        assert after.dtype == before[path].dtype
        for index in np.ndindex(after.shape):
            factor = expected_factor(path, index, after.shape, z, used)
            # Powers of two: the product is exact.
            assert after[index] == before[path][index] * factor


@given(st.data())
def test_open_gates_and_no_gates_change_nothing(data):
    tree, groups = arrays_and_groups(data)
    ones = {name: jnp.ones(group.size) for name, group in groups.items()}
    for z in (ones, {}):
        jax.tree.map(
            np.testing.assert_array_equal, units.apply_gates(tree, z, groups), tree
        )


@given(st.data())
def test_what_shrinking_leaves_is_what_open_gates_leave(data):
    """Gating every slot by `keep` and dropping what is closed is shrinking."""
    tree, groups = arrays_and_groups(data)
    keep = data.draw(flags(groups))
    assume(leaves_something(tree, keep, groups))
    everywhere = {
        name: Group(name, group.size, group.slots) for name, group in groups.items()
    }
    z = {name: jnp.float32(kept) for name, kept in keep.items()}
    gated = units.arrays(units.apply_gates(tree, z, everywhere))
    shrunk = units.arrays(units.shrink(tree, keep, groups))
    for path, array in gated.items():
        rows = positions_left(path, array.shape, keep, groups)
        np.testing.assert_array_equal(shrunk[path], np.asarray(array)[np.ix_(*rows)])


@given(st.data())
def test_shrinking_in_two_steps_is_shrinking_at_once(data):
    tree, groups = arrays_and_groups(data)
    keep = data.draw(flags(groups))
    assume(leaves_something(tree, keep, groups))
    whole = {name: np.ones(group.size, bool) for name, group in groups.items()}
    jax.tree.map(np.testing.assert_array_equal, units.shrink(tree, whole, groups), tree)
    for name in keep:
        one = {name: groups[name]}
        by_name = units.shrink(tree, {name: keep[name]}, groups)
        jax.tree.map(
            np.testing.assert_array_equal,
            by_name,
            units.shrink(tree, {name: keep[name]}, one),
        )


@given(st.data())
def test_shrinking_keeps_kind_and_dtype(data):
    tree, groups = arrays_and_groups(data)
    tree = jax.tree.map(np.asarray, tree)
    small = units.shrink(tree, {}, groups)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(small))
    mask = {"m": np.array([True, True, False])}
    group = {"g": Group("g", 2, (), (Slot("m", None, (0, 1, -1)),))}
    kept = units.shrink(mask, {"g": np.array([False, True])}, group)["m"]
    assert kept.dtype == bool
    np.testing.assert_array_equal(kept, [False, True, False])


@given(st.data())
def test_expected_size_is_the_exact_size_at_certain_gates(data):
    tree, groups = arrays_and_groups(data, elements=False)
    keep = data.draw(flags(groups))
    assume(leaves_something(tree, keep, groups))
    certain = {name: jnp.float32(kept) for name, kept in keep.items()}
    shrunk = units.arrays(units.shrink(tree, keep, groups))
    for path, array in units.arrays(tree).items():
        size = units.expected_size(array, path, certain, groups)
        assert size == shrunk[path].size


def left(array, path, open_gates, groups):
    """Elements whose units are all open, counted one by one: (draws,) counts."""
    alive = np.ones((DRAWS, *array.shape), bool)
    for name, group in groups.items():
        padded = np.append(open_gates[name], np.ones((DRAWS, 1), bool), axis=1)
        for slot in group.slots:
            if slot.path == path:
                owners = np.array(
                    [
                        owner(slot, index, array.shape)
                        for index in np.ndindex(array.shape)
                    ]
                )
                alive &= padded[:, owners].reshape(alive.shape)
    return alive.reshape(DRAWS, -1).sum(1)


@given(st.data())
def test_expected_size_is_the_mean_over_draws(data):
    tree, groups = arrays_and_groups(data, elements=False)
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    p = {name: rng.uniform(0.05, 0.95, group.size) for name, group in groups.items()}
    open_gates = {name: rng.random((DRAWS, len(q))) < q for name, q in p.items()}
    p32 = {name: jnp.float32(q) for name, q in p.items()}
    for path, array in units.arrays(tree).items():
        counts = left(array, path, open_gates, groups)
        error = 5 * counts.std() / math.sqrt(DRAWS) + 1e-4
        for like in (array, jax.ShapeDtypeStruct(array.shape, array.dtype)):
            size = units.expected_size(like, path, p32, groups)
            assert abs(size - counts.mean()) < error


@given(st.data())
def test_expected_size_of_gated_elements_is_the_mean_over_draws(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    array = jnp.zeros((2, 3))
    slot = Slot(*data.draw(slots("w", array.shape, 4, [None])))
    groups = {"g": Group("g", 4, (slot,))}
    p = rng.uniform(0.05, 0.95, 4)
    counts = left(array, "w", {"g": rng.random((DRAWS, 4)) < p}, groups)
    error = 5 * counts.std() / math.sqrt(DRAWS) + 1e-4
    size = units.expected_size(array, "w", {"g": jnp.float32(p)}, groups)
    assert abs(size - counts.mean()) < error


def test_expected_size_of_elements_and_rows_is_the_mean_over_draws():
    """Single weights that are gated, in an array whose rows are gated too."""
    rng = np.random.default_rng(0)
    array = jnp.zeros((3, 2))
    groups = {
        "weights": Group("weights", 6, (Slot("w", None),)),
        "rows": Group("rows", 3, (Slot("w", 0),)),
    }
    p = {"weights": np.array([0.9, 0.8, 0.1, 0.2, 0.5, 0.5])}
    p["rows"] = np.array([0.9, 0.2, 0.5])
    open_gates = {name: rng.random((DRAWS, len(q))) < q for name, q in p.items()}
    counts = left(array, "w", open_gates, groups)
    p32 = {name: jnp.float32(q) for name, q in p.items()}
    size = units.expected_size(array, "w", p32, groups)
    assert abs(size - counts.mean()) < 5 * counts.std() / math.sqrt(DRAWS)


def test_expected_size_of_two_halves_of_an_axis_is_that_of_the_whole():
    """A concatenation may be stated as one slot or as one slot for each part."""
    array, p = jnp.zeros((6, 2)), {"g": jnp.float32([0.1, 0.5, 0.7])}
    whole = Slot("w", 0, (0, 1, 2, 0, 1, 2))
    halves = (Slot("w", 0, (0, 1, 2, -1, -1, -1)), Slot("w", 0, (-1, -1, -1, 0, 1, 2)))
    sizes = [
        units.expected_size(array, "w", p, {"g": Group("g", 3, used)})
        for used in ((whole,), halves, (whole, whole))
    ]
    np.testing.assert_allclose(sizes, 2 * 2 * 1.3, rtol=1e-6)


@given(st.data())
def test_expected_size_of_a_group_on_two_axes_is_the_mean_over_draws(data):
    """Where it meets itself one gate decides, and elsewhere two: E[n^2]."""
    size, others = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    both = data.draw(st.permutations((0, 1, 2)))[:2]
    shape, lies = [others] * 3, []
    for axis in both:
        shape[axis] = data.draw(st.integers(1, 5))
        lies += [Slot(*data.draw(slots("w", shape, size, [axis]))) for _ in range(2)]
    (third,) = {0, 1, 2} - set(both)
    groups = {
        "g": Group("g", size, (lies[0],), (lies[2],)),
        "same axes": Group("same axes", size, (lies[3],), (lies[1],)),
        "h": Group("h", others, (Slot("w", third),)),
    }
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    p = {name: rng.uniform(0.1, 0.9, group.size) for name, group in groups.items()}
    open_gates = {name: rng.random((DRAWS, len(q))) < q for name, q in p.items()}
    p32 = {name: jnp.float32(q) for name, q in p.items()}
    array = jnp.zeros(shape)
    # With others gated too, and with the one group alone.
    for gated in (("g", "h"), ("h", "g"), ("g",), ("same axes", "g"), tuple(groups)):
        counts = left(array, "w", open_gates, {n: groups[n] for n in gated})
        error = 5 * counts.std() / math.sqrt(DRAWS) + 1e-4
        found = units.expected_size(array, "w", {n: p32[n] for n in gated}, groups)
        assert abs(found - counts.mean()) < error


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        (
            (3, 3, 3),
            {"g": Group("g", 3, (Slot("w", 0), Slot("w", 1)), (Slot("w", 2),))},
        ),
        ((3, 3), {"g": Group("g", 3, (Slot("w", 0), Slot("w", 1), Slot("w", 1)))}),
        ((3, 1), {"g": Group("g", 3, (Slot("w", 0), Slot("w", None)))}),
    ],
)
def test_expected_size_refuses_groups_that_it_cannot_count(shape, groups):
    p = {name: jnp.ones(3) for name in groups}
    with pytest.raises(ValueError, match=r"'g'.*axes.*'w'"):
        units.expected_size(jnp.zeros(shape), "w", p, groups)


@given(st.data())
def test_a_unit_is_in_use_iff_a_weight_that_uses_it_is_not_zero(data):
    tree, groups = arrays_and_groups(data)
    closed = data.draw(flags(groups))
    z = {name: jnp.float32(kept) for name, kept in closed.items()}
    gated = units.apply_gates(tree, z, groups)
    leaves = units.arrays(gated)
    found = units.in_use(gated, groups)
    for name, group in groups.items():
        alive = np.zeros(group.size, bool)
        for slot in group.used_by:
            array = np.asarray(leaves[slot.path])
            for index in np.ndindex(array.shape):
                unit = owner(slot, index, array.shape)
                if unit >= 0 and array[index] != 0:
                    alive[unit] = True
        np.testing.assert_array_equal(found[name], alive)
        assert not (found[name] & ~closed[name]).any()


@given(st.data())
def test_the_largest_use_of_a_unit_is_that_of_its_positions(data):
    tree, groups = arrays_and_groups(data)
    leaves = units.arrays(tree)
    # Compiled, as in a step's evaluation.
    found = jax.jit(lambda tree: units.largest_use(tree, groups))(tree)
    sizes = units.largest_use(jax.tree.map(jnp.abs, tree), groups)
    in_use = units.in_use(tree, groups)
    assert found.keys() == groups.keys()
    for name, group in groups.items():
        largest = np.zeros(group.size, np.float32)
        for slot in group.used_by:
            shape = leaves[slot.path].shape
            for index in np.ndindex(shape):
                if (unit := owner(slot, index, shape)) >= 0:
                    value = float(leaves[slot.path][index])
                    largest[unit] = max(largest[unit], value)
        np.testing.assert_array_equal(found[name], largest)
        np.testing.assert_array_equal(np.asarray(sizes[name]) > 0, in_use[name])


def uses_left(tree, keep, groups, name):
    """Which units of a group are kept and have a position that uses them left, in an
    array of which anything is."""
    group, shapes = groups[name], {p: a.shape for p, a in units.arrays(tree).items()}
    found = np.zeros(group.size, bool)
    for slot in group.used_by:
        rows = positions_left(slot.path, shapes[slot.path], keep, groups)
        for index in np.ndindex(shapes[slot.path]):
            unit = owner(slot, index, shapes[slot.path])
            # Of an array with units along its axes, a position needs its own only.
            axes = range(len(index)) if slot.axis is None else [slot.axis]
            if not all(along.any() for along in rows):
                continue
            if unit >= 0 and all(rows[axis][index[axis]] for axis in axes):
                found[unit] |= keep[name][unit]
    return found


@given(st.data())
def test_units_are_left_with_the_positions_that_use_them(data):
    tree, groups = arrays_and_groups(data)
    keep = data.draw(flags(groups))
    found = units.left(tree, keep, groups)
    assert found.keys() == groups.keys()
    expected = keep
    for _ in range(1 + sum(group.size for group in groups.values())):
        expected = {n: uses_left(tree, expected, groups, n) for n in groups}
    for name, flagged in found.items():
        np.testing.assert_array_equal(flagged, expected[name])
        assert flagged.dtype == bool
    # Of a group that is not mentioned, all are kept.
    for name in groups:
        others = {n: k for n, k in keep.items() if n != name}
        whole = others | {name: np.ones(groups[name].size, bool)}
        same = units.left(tree, whole, groups)
        for n, flagged in units.left(tree, others, groups).items():
            np.testing.assert_array_equal(flagged, same[n])


def test_a_flattened_position_goes_with_its_map():
    tree = {"w": np.ones((6, 2)), "v": np.ones((6, 1))}
    groups = {
        "maps": Group("maps", 3, (Slot("w", 0, (0, 1, 2, 0, 1, 2)),)),
        "features": Group("features", 6, (Slot("w", 0),)),
    }
    keep = {"maps": np.array([True, False, True])}
    found = units.left(tree, keep, groups)
    np.testing.assert_array_equal(found["features"], [1, 0, 1, 1, 0, 1])
    keep["features"] = np.array([1, 1, 0, 1, 1, 0], bool)
    # And a map goes with all of its features.
    np.testing.assert_array_equal(units.left(tree, keep, groups)["maps"], [1, 0, 0])


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(st.data())
def test_groups_after_shrinking_gate_what_is_left(data):
    """Gating and shrinking commute, under the groups of what is left."""
    tree, groups = arrays_and_groups(data)
    keep = data.draw(flags(groups))
    assume(leaves_something(tree, keep, groups))
    # A unit may have been the last to use another: until nothing goes any more.
    for _ in range(sum(group.size for group in groups.values())):
        keep = units.left(tree, keep, groups)
        assume(leaves_something(tree, keep, groups))
    small, after = (
        units.shrink(tree, keep, groups),
        units.shrink_groups(tree, keep, groups),
    )
    units.check(small, after)
    assert {n: g.size for n, g in after.items()} == {
        n: int(flagged.sum()) for n, flagged in keep.items()
    }
    for name, group in after.items():
        assert group.name == name
        before = groups[name]
        assert [s.path for s in group.used_by] == [s.path for s in before.used_by]
        assert [s.path for s in group.made_by] == [s.path for s in before.made_by]
    values = {n: 2.0 ** -(1 + np.arange(g.size)) for n, g in groups.items()}
    z = {n: jnp.float32(v) for n, v in values.items()}
    kept = {n: jnp.float32(v[keep[n]]) for n, v in values.items()}

    def everywhere(of):
        return {n: Group(n, group.size, group.slots) for n, group in of.items()}

    jax.tree.map(
        np.testing.assert_array_equal,
        units.apply_gates(small, kept, everywhere(after)),
        units.shrink(units.apply_gates(tree, z, everywhere(groups)), keep, groups),
    )


@given(st.data())
def test_rounding_keeps_the_fewest_more_that_make_a_multiple(data):
    sizes = {"a": data.draw(st.integers(1, 12)), "b": data.draw(st.integers(1, 12))}
    keep = {
        name: np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
        for name, n in sizes.items()
    }
    before = {name: flagged.copy() for name, flagged in keep.items()}
    each = {name: data.draw(st.integers(1, 5)) for name in sizes}
    for multiple, of in (
        (each, each),
        (3, dict.fromkeys(sizes, 3)),
        ({"a": 4}, {"a": 4, "b": 1}),
    ):
        found = units.round_to(keep, multiple)
        assert found.keys() == keep.keys()
        for name, flagged in found.items():
            np.testing.assert_array_equal(keep[name], before[name], err_msg="written")
            kept, width, size = keep[name].sum(), flagged.sum(), len(flagged)
            assert flagged[keep[name]].all()
            assert width % of[name] == 0 or width == size
            assert width - kept < of[name]
            # The first of those that were not kept.
            back = np.flatnonzero(flagged & ~keep[name])
            np.testing.assert_array_equal(
                back, np.flatnonzero(~keep[name])[: len(back)]
            )


@pytest.mark.parametrize(
    ("multiple", "words"),
    [
        (0, ["'a'", "at least 1", "got 0"]),
        ({"b": -8}, ["'b'", "at least 1", "got -8"]),
        ({"heads": 8}, ["'heads'", "a, b"]),
    ],
)
def test_multiples_that_make_no_sense_are_named(multiple, words):
    keep = {"a": np.ones(3, bool), "b": np.ones(2, bool)}
    with pytest.raises(ValueError, match="multiple") as error:
        units.round_to(keep, multiple)
    assert all(word in str(error.value) for word in words)


@given(st.data())
def test_charge_sums_the_weights_of_each_unit(data):
    tree, groups = arrays_and_groups(data)
    leaves = units.arrays(tree)
    for group in groups.values():
        for values in (jnp.ones_like, jnp.square):
            total = np.zeros(group.size)
            for slot in group.slots:
                amounts = np.asarray(values(leaves[slot.path]), np.float64)
                for index in np.ndindex(amounts.shape):
                    unit = owner(slot, index, amounts.shape)
                    if unit >= 0:
                        total[unit] += amounts[index]
            found = units.charge(values, tree, group.slots, group.size)
            np.testing.assert_allclose(found, total, rtol=1e-5)


def test_gates_take_the_type_of_the_weights():
    tree = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    groups = {"g": Group("g", 2, (Slot("w", 0),))}
    gated = units.apply_gates(tree, {"g": jnp.float32([0.5, 1])}, groups)
    assert gated["w"].dtype == jnp.bfloat16
    assert units.charge(jnp.square, tree, groups["g"].slots, 2).dtype == jnp.float32


def test_gates_are_differentiable_through_the_weights():
    tree = {"w": jnp.arange(6.0).reshape(2, 3)}
    groups = {"g": Group("g", 2, (Slot("w", 0),))}

    def total(z):
        return units.apply_gates(tree, {"g": z}, groups)["w"].sum()

    np.testing.assert_allclose(jax.jit(jax.grad(total))(jnp.ones(2)), [3.0, 12.0])


def test_paths_are_dotted_and_leave_out_boxes():
    tree = {"layers": [{"kernel": jnp.zeros(1)}, (jnp.zeros(2),)]}
    assert sorted(units.arrays(tree)) == ["layers.0.kernel", "layers.1.0"]

    @functools.partial(
        jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[]
    )
    @dataclasses.dataclass
    class Box:
        value: jax.Array

    assert list(units.arrays({"w": Box(jnp.zeros(3))})) == ["w"]


# ------------------------------------------------------------------------- errors

TREE = {"first": {"w": jnp.zeros((3, 4))}, "b": jnp.zeros(4)}


def one(*used, size=4, made=()):
    return {"maps": Group("maps", size, used, made)}


WRONG = {
    "no such array": (
        one(Slot("second.w", 0)),
        ["'maps'", "'second.w'", "first.w", "b"],
    ),
    "no such axis": (one(Slot("first.w", 2)), ["'maps'", "'first.w'", "(3, 4)", "2"]),
    "negative axis": (
        one(Slot("first.w", -1)),
        ["'maps'", "'first.w'", "(3, 4)", "-1"],
    ),
    "axis too short": (
        one(Slot("first.w", 0)),
        ["'maps'", "'first.w'", "axis 0", "3 positions", "describes 4"],
    ),
    "elements": (
        one(Slot("first.w", None)),
        ["'maps'", "'first.w'", "12 positions", "describes 4"],
    ),
    "unit_of too short": (
        one(Slot("first.w", 1, (0, 1, 2))),
        ["'maps'", "'first.w'", "axis 1", "4 positions", "describes 3"],
    ),
    "unit too large": (
        one(Slot("b", 0, (0, 1, 2, 4))),
        ["'maps'", "'b'", "[-1, 4)", "0 to 4"],
    ),
    "unit too small": (
        one(Slot("b", 0, (0, -2, 2, 3))),
        ["'maps'", "'b'", "[-1, 4)", "-2 to 3"],
    ),
}
VERBS = {
    "check": units.check,
    "apply_gates": lambda tree, groups: units.apply_gates(
        tree, {"maps": jnp.ones(4)}, groups
    ),
    "shrink": lambda tree, groups: units.shrink(
        tree, {"maps": np.ones(4, bool)}, groups
    ),
    "in_use": units.in_use,
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", WRONG)
def test_a_slot_that_does_not_fit_is_named(case, verb):
    groups, words = WRONG[case]
    with pytest.raises(ValueError, match="group 'maps'") as error:
        VERBS[verb](TREE, groups)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("verb", ["check", "shrink"])
def test_slots_on_the_making_side_are_checked_where_they_are_cut(verb):
    groups = one(Slot("b", 0), made=(Slot("first.w", 0),))
    with pytest.raises(ValueError, match=r"'first\.w'.*3 positions.*describes 4"):
        VERBS[verb](TREE, groups)
    # Gating and looking for what is in use need the using side alone.
    VERBS["apply_gates"](TREE, groups)
    VERBS["in_use"](TREE, groups)


def test_unknown_groups_are_named_with_those_that_exist():
    groups = one(Slot("b", 0))
    for verb in (
        lambda: units.apply_gates(TREE, {"heads": jnp.ones(4)}, groups),
        lambda: units.shrink(TREE, {"heads": np.ones(4, bool)}, groups),
    ):
        with pytest.raises(ValueError, match=r"'heads'.*maps"):
            verb()


def test_vectors_of_the_wrong_length_are_named_with_both_sizes():
    groups = one(Slot("b", 0))
    for verb in (
        lambda: units.apply_gates(TREE, {"maps": jnp.ones(3)}, groups),
        lambda: units.shrink(TREE, {"maps": np.ones(3, bool)}, groups),
    ):
        with pytest.raises(ValueError, match=r"'maps' has 4 units.*\(3,\)"):
            verb()


def test_zero_is_a_size():
    small = units.shrink(TREE, {"maps": np.zeros(4, bool)}, one(Slot("b", 0)))
    assert small["b"].shape == (0, *TREE["b"].shape[1:])


def test_groups_may_leave_nothing_of_an_axis_between_them():
    """Each keeps one unit, and no position belongs to both."""
    groups = {
        "maps": Group("maps", 2, (Slot("b", 0, (0, 0, 1, 1)),)),
        "features": Group("features", 4, (Slot("b", 0),)),
    }
    keep = {"maps": np.array([True, False]), "features": np.arange(4) == 3}
    assert units.shrink(TREE, keep, groups)["b"].shape[0] == 0
    assert not any(flags.any() for flags in units.left(TREE, keep, groups).values())


def test_an_empty_tree_is_reported_as_such():
    with pytest.raises(ValueError, match="there is nothing"):
        units.check({}, one(Slot("b", 0)))


def test_paths_must_tell_arrays_apart():
    with pytest.raises(ValueError, match=r"two arrays have the same path 'a\.b'"):
        units.arrays({"a": {"b": 1.0}, "a.b": 2.0})


def test_replaced_leaves_are_new_and_all_others_the_same():
    tree = {"a": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}, "c": jnp.ones(1)}
    new = units.replace(tree, {"a.w": jnp.full((4, 3), 2.0)})
    assert new["a"]["w"].shape == (4, 3)
    assert new["a"]["b"] is tree["a"]["b"]
    assert new["c"] is tree["c"]
    assert tree["a"]["w"].shape == (2, 3)
    with pytest.raises(ValueError, match=r"no array at 'a\.v'; there is a\.b, a\.w, c"):
        units.replace(tree, {"a.v": jnp.ones(1)})


def test_a_group_that_has_lost_all_units_has_places_still():
    """An empty `unit_of` is one of integers."""
    groups = {"gone": Group("gone", 0, (Slot("w", 0, ()),))}
    tree, none = {"w": jnp.zeros((0, 3))}, jnp.zeros(0)
    assert units.apply_gates(tree, {"gone": none}, groups)["w"].shape == (0, 3)
    assert units.expected_size(tree["w"], "w", {"gone": none}, groups) == 0
    assert units.charge(jnp.square, tree, groups["gone"].used_by, 0).shape == (0,)
    assert units.in_use(tree, groups)["gone"].shape == (0,)
    assert units.free(jnp.square, tree["w"], groups["gone"].used_by) == 0
