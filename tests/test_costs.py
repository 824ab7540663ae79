"""Law 3: what is counted is what is there, in each of the papers' conventions."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.interpolate import RegularGridInterpolator

import l0jax.nnx
from l0jax import costs, models, units
from l0jax.costs import CONVENTIONS, COSTS
from l0jax.tracing import trace

NETWORKS = {
    "mlp": {"features": (784, 300, 100, 10)},
    "lenet5": {},
    "small": {"shape": (18, 16, 2), "maps": (3, 4), "hidden": 6, "classes": 3},
}
DRAWS = 3000


@functools.cache
def model_of(name):
    kind = "mlp" if name == "mlp" else "lenet5"
    return models.make(kind, NETWORKS[name], rngs=nnx.Rngs(0))


@functools.cache
def network(name):
    return models.structure(model_of(name))


def square(params, x):
    """A hidden layer that is read and made by one square kernel, twice."""
    h = jnp.tanh(x @ params["w_in"])
    for _ in range(2):
        h = jnp.tanh(h @ params["w_square"] + params["bias"].reshape(1, -1))
    return h @ params["w_out"]


SQUARE = {
    "w_in": jnp.ones((5, 7)),
    "w_square": jnp.ones((7, 7)),
    "bias": jnp.ones(7),
    "w_out": jnp.ones((7, 3)),
}


def traced(name, keep=None):
    """A structure that is read anew, from a network that has only what is kept."""
    if name == "square":
        params = SQUARE
        if keep is not None:
            params = units.shrink(params, keep, traced(name).groups)
        x = jax.ShapeDtypeStruct((2, params["w_in"].shape[0]), jnp.float32)
        return trace(square, params, x)
    if keep is None:
        return network(name)
    small = l0jax.nnx.shrink(model_of(name), keep, network(name).groups)
    return models.structure(small)


TRACED = ("small", "mlp", "square")


def only(structure, *operations):
    return dataclasses.replace(structure, operations=operations)


def flags_of(groups, widths):
    """The first units of each group kept, as many as `widths` says."""
    return {
        name: np.arange(group.size) < width
        for (name, group), width in zip(groups.items(), widths, strict=True)
    }


def lenet_flags(groups, widths):
    """Kept features are those of the kept maps, as many as `widths[2]` says."""
    keep = flags_of(groups, widths)
    maps = np.flatnonzero(keep["conv2"])
    in_kept_maps = np.isin(np.arange(800) % 50, maps)
    keep["features"] = in_kept_maps & (np.cumsum(in_kept_maps) <= widths[2])
    assert keep["features"].sum() == widths[2]
    return keep


def certain(keep):
    return {name: jnp.float32(flags) for name, flags in keep.items()}


def everything(groups):
    return {name: jnp.ones(group.size) for name, group in groups.items()}


# Architectures in print, the weights left in them, and (printed as 254K, 1.3M and 403K)
# the cost in the convention of Tang, Adhikari and Lin.
MLP_TABLE = {
    (784, 300, 100): 266_200,
    (512, 114, 72): 67_296,
    (278, 98, 13): 28_648,
    (311, 86, 14): 28_090,
    (219, 214, 100): 69_266,
    (266, 88, 33): 26_642,
}
LENET_TABLE = {
    (20, 50, 800, 500): (430_500, None),
    (14, 19, 242, 131): (40_012, None),
    (3, 12, 192, 500): (101_975, None),
    (7, 13, 208, 16): (5_938, 254_778),
    (3, 18, 284, 283): (84_627, None),
    (8, 13, 88, 13): (4_074, None),
    (5, 10, 76, 16): (2_751, None),
    (20, 25, 45, 462): (38_410, 1_127_002),
    (9, 18, 65, 25): (6_150, 397_046),
}


@pytest.mark.sweep
@pytest.mark.parametrize("widths", MLP_TABLE)
def test_weights_of_published_mlps(widths):
    structure = network("mlp")
    kept = certain(flags_of(structure.groups, widths))
    assert costs.weights(structure, kept) == MLP_TABLE[widths]
    a, b, c = widths
    assert costs.macs(structure, kept) == a * b + b * c + 10 * c


@pytest.mark.sweep
@pytest.mark.parametrize("widths", LENET_TABLE)
def test_costs_of_published_lenets(widths):
    structure = network("lenet5")
    kept = certain(lenet_flags(structure.groups, widths))
    weights, printed = LENET_TABLE[widths]
    a, b, c, d = widths
    count = {
        convention: float(costs.make(convention)(structure, kept))
        for convention in CONVENTIONS
    }
    assert costs.weights(structure, kept) == weights
    assert count["macs"] == 576 * 25 * a + 64 * 25 * a * b + c * d + 10 * d
    assert count["flops_objective"] == (
        576 * (25 + 1) * a + 64 * (25 * a + 1) * b + (c + 1) * d + (d + 1) * 10
    )
    assert printed in (None, count["flops_objective"])
    # Inputs of a convolution and outputs of a dense layer count in full.
    assert count["reference_flops"] == (
        576 * 2 * 25 * a
        + 64 * 2 * 500 * b
        + (2 * c - 1) * 500
        + 500
        + (2 * d - 1) * 10
        + 10
    )


@pytest.mark.parametrize(
    ("kernel", "operations"), [("conv1.kernel", 576_000), ("conv2.kernel", 3_200_000)]
)
def test_open_convolutions_in_reference_flops(kernel, operations):
    structure = network("lenet5")
    # One product and one sum for each weight, and the bias instead of a last sum:
    # 576 * 20 * (25 + 24 + 1) and 64 * 50 * (500 + 499 + 1).
    one = [op for op in structure.operations if op.kernel == kernel]
    assert len(one) == 1
    every = everything(structure.groups)
    assert costs.reference_flops(only(structure, *one), every) == operations


def test_dense_networks_have_the_known_macs():
    for name, macs in (("mlp", 266_200), ("lenet5", 2_293_000)):
        structure = network(name)
        assert costs.macs(structure, everything(structure.groups)) == macs
        assert costs.macs(structure) == macs


def test_positions_are_those_of_the_output():
    """The program that XLA compiles has the same products, convolution by dense."""
    for name in NETWORKS:
        model, structure = model_of(name), network(name)
        shape = model.architecture.get("shape", [784])
        flops = jax.jit(model).lower(jnp.zeros((1, *shape))).compile().cost_analysis()
        macs = costs.macs(structure, everything(structure.groups))
        assert flops["flops"] == pytest.approx(2 * float(macs), rel=0.05)


def random_keep(groups, rng):
    keep = {n: rng.random(g.size) < 0.6 for n, g in groups.items()}
    for flags in keep.values():
        flags[0] = True
    return keep


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_at_keep_are_those_of_the_shrunk_network(name):
    structure, params = network(name), nnx.state(model_of(name), nnx.Param)
    groups, operations = structure.groups, structure.operations
    rng = np.random.default_rng(0)
    for _ in range(3):
        keep = random_keep(groups, rng)
        small = units.shrink(params, keep, drop_reads(groups))
        kernels = {op.kernel: units.arrays(small)[op.kernel].shape for op in operations}
        # No position of these networks comes and goes with a unit.
        assert all(set(op.positions) == {()} for op in operations)
        positions = {op.kernel: op.positions[()] for op in operations}
        kept = certain(keep)
        left = costs.weights(structure, kept)
        assert left == sum(map(math.prod, kernels.values()))
        macs = costs.macs(structure, kept)
        assert macs == sum(
            math.prod(shape) * positions[path] for path, shape in kernels.items()
        )
        tang = costs.flops_objective(structure, kept)
        assert tang == pytest.approx(
            sum(
                (math.prod(shape) + shape[-1]) * positions[path]
                for path, shape in kernels.items()
            ),
            rel=1e-6,
        )
        shapes = [a.shape for a in jax.tree.leaves(small)]
        assert costs.params(structure, kept) == sum(map(math.prod, shapes))
        # Nothing left to remove: the shrunk network costs what it was said to.
        again = traced(name, keep)
        for convention in ("macs", "flops_objective"):
            cost = costs.make(convention)
            found = float(cost(structure, kept))
            assert cost(again) == pytest.approx(found, rel=1e-6)


def drop_reads(groups):
    """The groups without their slots in masks: the parameters have none."""
    return {
        name: type(group)(
            name,
            group.size,
            group.used_by,
            tuple(slot for slot in group.made_by if slot.path != "reads"),
        )
        for name, group in groups.items()
    }


@pytest.mark.parametrize("name", TRACED)
def test_exact_costs_at_keep_are_those_of_what_is_left(name):
    """Of the structure that was shrunk, and of the smaller network that is read anew.

    The reference's FLOPs count what some units were before, so that they only agree on
    what a smaller network costs.
    """
    structure, rng = traced(name), np.random.default_rng(0)
    for _ in range(3):
        keep = random_keep(structure.groups, rng)
        small, again = structure.shrink(keep), traced(name, keep)
        assert small.arrays == again.arrays
        # Groups are named for the largest array that makes them: names may change.
        sizes = [[g.size for g in s.groups.values()] for s in (small, again)]
        assert sizes[0] == sizes[1]
        for convention, cost in COSTS.items():
            found = costs.exact(structure, keep, cost)
            left = costs.exact(small, cost=cost)
            assert type(found) is int
            assert left == costs.exact(again, cost=cost), convention
            if convention == "reference_flops":
                assert left < found
            else:
                assert left == found, convention
            assert found < costs.exact(structure, cost=cost)
        # And it goes on to cost less.
        twice = random_keep(small.groups, rng)
        same = dict(zip(again.groups, twice.values(), strict=True))
        found = costs.exact(small, twice)
        assert found == costs.exact(again, same) == costs.exact(small.shrink(twice))


def test_exact_costs_are_whole_where_single_precision_rounds():
    shapes = {"a": (4099, 8191), "b": (8191, 2)}
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    x = jax.ShapeDtypeStruct((1, 4099), jnp.float32)
    structure = trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, x)
    (hidden,) = (n for n, group in structure.groups.items() if group.size == 8191)
    for flags in (np.ones(8191, bool), np.arange(8191) > 0):
        left = int(flags.sum()) * (4099 + 2)
        assert costs.exact(structure, {hidden: flags}) == left
        assert int(np.float32(left)) != left, "a float32 can't hold it"


def test_exact_costs_refuse_what_is_no_keep():
    structure = network("small")
    with pytest.raises(ValueError, match="'heads'"):
        costs.exact(structure, {"heads": np.ones(3, bool)})
    with pytest.raises(ValueError, match=r"'hidden' has 6 units.*\(5,\)"):
        costs.exact(structure, {"hidden": np.ones(5, bool)})


@pytest.mark.parametrize("name", ["small", "square"])
def test_expected_costs_are_means_over_draws(name):
    structure = traced(name)
    groups, rng = structure.groups, np.random.default_rng(1)
    p = {name: jnp.float32(rng.uniform(0.1, 0.9, g.size)) for name, g in groups.items()}
    draws = {
        name: jnp.float32(rng.random((DRAWS, len(q))) < np.asarray(q))
        for name, q in p.items()
    }
    for convention, cost in COSTS.items():
        count = functools.partial(cost, structure)
        sampled = np.asarray(jax.jit(jax.vmap(count))(draws), np.float64)
        error = 5 * sampled.std() / math.sqrt(DRAWS)
        assert sampled.std() > 0
        assert abs(sampled.mean() - float(count(p))) < error, convention


def test_a_group_that_lies_along_two_axes_is_not_a_square_of_means():
    """What the draws above are to tell apart."""
    structure = traced("square")
    lies = {
        (slot.path, slot.axis)
        for group in structure.groups.values()
        if group.size == 7
        for slot in group.slots
    }
    assert lies >= {("w_square", 0), ("w_square", 1), ("bias", 0)}
    half = {n: jnp.full(g.size, 0.5) for n, g in structure.groups.items()}
    # Of 7 units at 1/2: E[n] is 3.5, E[n^2] is 3.5^2 + 7/4; of 5 inputs 2.5.
    kept = 3.5**2 + 7 / 4
    assert costs.macs(structure, half) == 2.5 * 3.5 + 2 * kept + 3.5 * 3
    assert costs.weights(structure, half) == 2.5 * 3.5 + kept + 3.5 * 3
    assert costs.params(structure, half) == 2.5 * 3.5 + kept + 3.5 + 3.5 * 3


def test_expected_costs_have_a_gradient_in_every_probability():
    structure = network("small")
    p = {name: jnp.full(g.size, 0.5) for name, g in structure.groups.items()}
    for cost in COSTS.values():
        slopes = jax.grad(functools.partial(cost, structure))(p)
        for slope in slopes.values():
            assert (slope >= 0).all()
        assert sum(float(slope.sum()) for slope in slopes.values()) > 0
    slopes = jax.grad(functools.partial(costs.macs, structure))(p)
    assert all((slope > 0).all() for slope in slopes.values())


def test_costs_only_read_shapes():
    structure = network("small")
    blank = nnx.eval_shape(
        lambda: models.make("lenet5", NETWORKS["small"], rngs=nnx.Rngs(0))
    )
    blank.reads.set_value(np.ones(blank.reads.shape, bool))
    shapes = models.structure(blank)
    for cost, p in itertools.product(COSTS.values(), (1.0, 0.3)):
        active = {name: jnp.full(g.size, p) for name, g in structure.groups.items()}
        assert cost(shapes, active) == cost(structure, active)


def test_operations_add_up():
    structure = network("small")
    operations = structure.operations
    active = {name: jnp.full(g.size, 0.4) for name, g in structure.groups.items()}
    for convention in CONVENTIONS:
        cost = costs.make(convention)
        apart = sum(cost(only(structure, op), active) for op in operations)
        together = cost(structure, active)
        np.testing.assert_allclose(apart, together, rtol=1e-6)
    assert costs.weights(only(structure), active) == 0
    each = costs.per_operation(structure, active)
    np.testing.assert_allclose(sum(each), costs.macs(structure, active), rtol=1e-6)
    twice = [
        dataclasses.replace(op, positions={(): 2 * op.positions[()]})
        for op in operations
    ]
    np.testing.assert_allclose(
        costs.macs(only(structure, *twice), active),
        2 * costs.macs(structure, active),
    )


def test_unknown_costs_are_named():
    with pytest.raises(ValueError, match="'joules'") as error:
        costs.make("joules")
    assert all(name in str(error.value) for name in COSTS)
    assert set(CONVENTIONS) <= set(COSTS)
    for name, cost in COSTS.items():
        assert costs.make(name) is cost


@pytest.mark.sweep
@pytest.mark.parametrize("convention", COSTS)
@pytest.mark.parametrize("name", TRACED)
def test_what_a_group_saves_is_what_is_missing_without_it(name, convention):
    structure, cost = traced(name), costs.make(convention)
    rng = np.random.default_rng(0)
    # (The difference of two large costs has few digits in float32.)
    with jax.enable_x64(True):
        active = {
            name: jnp.asarray(rng.random(g.size))
            for name, g in structure.groups.items()
        }
        found = costs.per_group(structure, cost, active)
        assert found.keys() == structure.groups.keys()
        for name, saved in found.items():
            without = {**active, name: jnp.zeros(structure.groups[name].size)}
            expected = cost(structure, active) - cost(structure, without)
            np.testing.assert_allclose(saved, expected, rtol=1e-9)
            assert saved > 0


# ------------------------------------------------------------- tables of seconds

SIZES = ((1, 2, 6), (1, 4))
"""Of the groups "conv2" and "hidden" of the small network, which have 4 and 6 units."""


def table(seconds, sizes=SIZES, groups=("hidden", "conv2")):
    return costs.Table(groups, sizes, np.asarray(seconds, float))


SECONDS = 1e-3 * np.array([[1.0, 3.0], [4.0, 5.0], [7.0, 13.0]])


def at(hidden, conv2):
    """Probabilities of so many expected units, of unequal ones."""
    weights = {"hidden": np.linspace(1, 2, 6), "conv2": np.linspace(2, 1, 4)}
    counts = {"hidden": hidden, "conv2": conv2}
    return {n: jnp.float32(w / w.sum() * counts[n]) for n, w in weights.items()}


def test_seconds_are_those_measured_and_multilinear_between():
    structure, cost = network("small"), costs.interpolated([table(SECONDS)])
    assert cost.__name__ == "latency"
    for (i, hidden), (j, conv2) in itertools.product(
        enumerate(SIZES[0]), enumerate(SIZES[1])
    ):
        found = cost(structure, at(hidden, conv2))
        assert found == pytest.approx(SECONDS[i, j], rel=1e-5)
    oracle = RegularGridInterpolator(SIZES, SECONDS)
    rng = np.random.default_rng(0)
    for point in rng.uniform([1, 1], [6, 4], (20, 2)):
        found = jax.jit(functools.partial(cost, structure))(at(*point))
        assert found == pytest.approx(oracle(point).item(), rel=1e-5)


def test_seconds_have_the_slopes_of_the_table_up_to_the_whole_network():
    structure, cost = network("small"), costs.interpolated([table(SECONDS)])
    slopes_at = jax.grad(functools.partial(cost, structure))
    # Halfway between 4 and 7 ms along one axis, and between 5 and 13 along the other.
    for p, slopes in (
        (at(4, 4), (8e-3 / 4, (1e-3 + 6e-3) / 2 / 3)),
        # At the end of the grid, those of the last piece.
        (everything(structure.groups), (8e-3 / 4, 6e-3 / 3)),
    ):
        found = slopes_at(p)
        for name, slope in zip(("hidden", "conv2"), slopes, strict=True):
            np.testing.assert_allclose(found[name], slope, rtol=1e-4)


def test_beyond_the_grid_seconds_stay_what_they_are():
    structure = network("small")
    cost = costs.interpolated([table(SECONDS[1:, :], ((2, 5), (1, 4)))])
    for outside, inside in (((0, 0), (2, 1)), ((6, 2), (5, 2)), ((1, 3), (2, 3))):
        found = cost(structure, at(*outside))
        assert found == pytest.approx(float(cost(structure, at(*inside))), rel=1e-5)
    slopes = jax.grad(functools.partial(cost, structure))(at(0.5, 2.0))
    assert (slopes["hidden"] == 0).all()
    assert (slopes["conv2"] > 0).all()


def test_seconds_of_no_probabilities_are_those_of_the_units_there_are():
    structure = network("small")
    cost = costs.interpolated([table(SECONDS)])
    assert cost(structure) == pytest.approx(SECONDS[2, 1])
    keep = {n: np.arange(g.size) % 2 == 0 for n, g in structure.groups.items()}
    small = structure.shrink({n: keep[n] for n in ("hidden", "conv2")})
    assert cost(small) == pytest.approx(float(cost(structure, at(3, 2))), rel=1e-5)


def test_seconds_of_several_tables_add_up():
    structure = network("small")
    one, other = table(SECONDS), table([5e-3], ((3,),), ("conv1",))
    cost = costs.interpolated([one, other], "delay")
    assert cost.__name__ == "delay"
    apart = costs.interpolated([one])(structure, at(3, 2)) + 5e-3
    assert cost(structure, at(3, 2)) == pytest.approx(float(apart), rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": ((1, 2, 6),)}, r"given 1 times for 2 groups \(hidden, conv2\)"),
        ({"sizes": ((1, 6, 2), (1, 4))}, r"'hidden' must ascend, got \(1, 6, 2\)"),
        ({"sizes": ((1, 2, 6), (4, 4))}, r"'conv2' must ascend, got \(4, 4\)"),
        ({"sizes": ((1, 2, 6), ())}, r"'conv2' must ascend, got \(\)"),
        ({"seconds": SECONDS.T}, r"shape \(3, 2\),.*got \(2, 3\)"),
        ({"seconds": 0 * SECONDS}, "positive and finite, got 0.0"),
        ({"seconds": SECONDS * np.inf}, "positive and finite, got inf"),
        ({"seconds": SECONDS * np.nan}, "positive and finite, got nan"),
    ],
)
def test_tables_that_are_none_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        table(**{"seconds": SECONDS, **wrong})


def test_a_table_of_another_network_is_refused():
    cost = costs.interpolated([table(SECONDS, groups=("hidden", "heads"))])
    with pytest.raises(ValueError, match=r"'heads'.*there is conv1, conv2, features"):
        cost(network("small"))


# ------------------------------------------------------------------- whole numbers


def some(groups, seed, share=0.6):
    rng = np.random.default_rng(seed)
    keep = {name: rng.random(group.size) < share for name, group in groups.items()}
    return {name: flags for name, flags in keep.items() if rng.random() < 0.8}


def with_elements(structure):
    """With single weights of the first kernel as a group of their own."""
    path = next(op.kernel for op in structure.operations if op.kernel)
    size = math.prod(structure.arrays[path].shape)
    return structure.add(units.Group("elements", size, (units.Slot(path, None),)))


@pytest.mark.parametrize("edit", [lambda s: s, with_elements], ids=["found", "added"])
@pytest.mark.parametrize("convention", COSTS)
@pytest.mark.parametrize("name", TRACED)
def test_whole_numbers_are_what_is_expected_in_float64(name, convention, edit):
    structure, cost = edit(traced(name)), COSTS[convention]
    for seed in range(4):
        keep = some(structure.groups, seed)
        found = costs.exact(structure, keep, cost)
        assert type(found) is int
        with jax.enable_x64(True):
            flags = {n: jnp.asarray(k, jnp.float64) for n, k in keep.items()}
            assert found == pytest.approx(float(cost(structure, flags)), rel=1e-12)


def test_what_groups_save_by_a_cost_that_is_no_sum():
    structure = traced("small")

    def squared(structure, prob_active):
        return costs.macs(structure, prob_active) ** 2

    whole = squared(structure, {})
    for group, amount in costs.per_group(structure, squared).items():
        none = {group: jnp.zeros(structure.groups[group].size)}
        np.testing.assert_allclose(amount, whole - squared(structure, none))


def test_the_table_tells_what_groups_save():
    for name in TRACED:
        structure = traced(name)
        rows = str(structure).splitlines()[3 : 3 + len(structure.groups)]
        for row, (group, found) in zip(rows, structure.groups.items(), strict=True):
            none = {group: np.zeros(found.size)}
            left = costs.macs(structure, units.Certain(none))
            saved = costs.exact(structure) - left
            per_unit, share, _ = row.split()[-3:]
            assert per_unit == f"{saved / found.size:,.0f}"
            assert share == f"{100 * saved / costs.exact(structure):.1f}"


def test_numbers_that_no_float_holds_are_exact():
    size = 7

    def apply(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    shapes = {"a": (size, 5), "b": (5, size)}
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    x = jax.ShapeDtypeStruct((2, size), jnp.float32)
    structure = trace(apply, params, x)
    cubed = {**structure.operations[0].macs, ("a",) * 40: 1}
    longer = dataclasses.replace(structure.operations[0], macs=cubed, kernel=None)
    structure = only(structure, longer)
    keep = {"a": np.array([True, False, True, True, False])}
    assert costs.exact(structure, keep) == 3 * size + 3**40
    assert costs.exact(structure) == 5 * size + 5**40


@pytest.mark.parametrize("convention", COSTS)
@pytest.mark.parametrize(
    ("p", "message"),
    [
        ({"hiden": jnp.ones(3)}, "unknown group 'hiden'"),
        ({"conv1": jnp.ones(7)}, "has 3 units, got values of shape"),
    ],
)
def test_probabilities_that_do_not_fit_are_refused(convention, p, message):
    with pytest.raises(ValueError, match=message):
        COSTS[convention](traced("small"), p)
    with pytest.raises(ValueError, match=message):
        costs.per_group(traced("small"), COSTS[convention], p)
