"""Law 3: what is counted is what is there, in each of the papers' conventions."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l0jax import costs, models, units
from l0jax.costs import CONVENTIONS, Operation

NETWORKS = {
    "mlp": {"features": (784, 300, 100, 10)},
    "lenet5": {},
    "small": {"shape": (18, 16, 2), "maps": (3, 4), "hidden": 6, "classes": 3},
}
DRAWS = 3000


def network(name):
    kind = "mlp" if name == "mlp" else "lenet5"
    model = models.make(kind, NETWORKS[name], rngs=nnx.Rngs(0))
    return nnx.state(model, nnx.Param), model.groups, model.operations


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


@pytest.mark.parametrize("widths", MLP_TABLE)
def test_weights_of_published_mlps(widths):
    params, groups, operations = network("mlp")
    kept = certain(flags_of(groups, widths))
    assert costs.weights(params, kept, groups, operations) == MLP_TABLE[widths]
    a, b, c = widths
    found = costs.compute(params, kept, groups, operations, "macs")
    assert found == a * b + b * c + 10 * c


@pytest.mark.parametrize("widths", LENET_TABLE)
def test_costs_of_published_lenets(widths):
    params, groups, operations = network("lenet5")
    kept = certain(lenet_flags(groups, widths))
    weights, printed = LENET_TABLE[widths]
    a, b, c, d = widths
    count = {
        convention: float(costs.compute(params, kept, groups, operations, convention))
        for convention in CONVENTIONS
    }
    assert costs.weights(params, kept, groups, operations) == weights
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
    params, groups, every = network("lenet5")
    # One product and one sum for each weight, and the bias instead of a last sum:
    # 576 * 20 * (25 + 24 + 1) and 64 * 50 * (500 + 499 + 1).
    one = [op for op in every if op.kernel == kernel]
    assert len(one) == 1
    found = costs.compute(params, everything(groups), groups, one, "reference_flops")
    assert found == operations


def test_dense_networks_have_the_known_macs():
    for name, macs in (("mlp", 266_200), ("lenet5", 2_293_000)):
        params, groups, operations = network(name)
        found = costs.compute(params, everything(groups), groups, operations, "macs")
        assert found == macs


def test_positions_are_those_of_the_output():
    """The program that XLA compiles has the same products, convolution by dense."""
    for name in NETWORKS:
        kind = "mlp" if name == "mlp" else "lenet5"
        model = models.make(kind, NETWORKS[name], rngs=nnx.Rngs(0))
        shape = model.architecture.get("shape", [784])
        flops = jax.jit(model).lower(jnp.zeros((1, *shape))).compile().cost_analysis()
        params, groups = nnx.state(model, nnx.Param), model.groups
        macs = costs.compute(
            params, everything(groups), groups, model.operations, "macs"
        )
        assert flops["flops"] == pytest.approx(2 * float(macs), rel=0.05)


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_at_keep_are_those_of_the_shrunk_network(name):
    params, groups, operations = network(name)
    rng = np.random.default_rng(0)
    for _ in range(3):
        keep = {n: rng.random(g.size) < 0.6 for n, g in groups.items()}
        for flags in keep.values():
            flags[0] = True
        small = units.shrink(params, keep, drop_reads(groups))
        kernels = {op.kernel: units.arrays(small)[op.kernel].shape for op in operations}
        positions = {op.kernel: op.positions for op in operations}
        kept = certain(keep)
        left = costs.weights(params, kept, groups, operations)
        assert left == sum(map(math.prod, kernels.values()))
        macs = costs.compute(params, kept, groups, operations, "macs")
        assert macs == sum(
            math.prod(shape) * positions[path] for path, shape in kernels.items()
        )
        tang = costs.compute(params, kept, groups, operations, "flops_objective")
        assert tang == pytest.approx(
            sum(
                (math.prod(shape) + shape[-1]) * positions[path]
                for path, shape in kernels.items()
            ),
            rel=1e-6,
        )
        # Nothing left to remove: the shrunk network costs what it was said to.
        for convention in ("macs", "flops_objective"):
            again = costs.compute(small, {}, {}, operations, convention)
            assert again == pytest.approx(
                float(costs.compute(params, kept, groups, operations, convention)),
                rel=1e-6,
            )


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


def test_expected_costs_are_means_over_draws():
    params, groups, operations = network("small")
    rng = np.random.default_rng(1)
    p = {name: jnp.float32(rng.uniform(0.1, 0.9, g.size)) for name, g in groups.items()}
    draws = {
        name: jnp.float32(rng.random((DRAWS, len(q))) < np.asarray(q))
        for name, q in p.items()
    }
    counts = {"weights": lambda z: costs.weights(params, z, groups, operations)}
    for convention in CONVENTIONS:
        counts[convention] = lambda z, convention=convention: costs.compute(
            params, z, groups, operations, convention
        )
    for name, count in counts.items():
        sampled = np.asarray(jax.jit(jax.vmap(count))(draws), np.float64)
        error = 5 * sampled.std() / math.sqrt(DRAWS)
        assert sampled.std() > 0
        assert abs(sampled.mean() - float(count(p))) < error, name


def test_expected_costs_have_a_gradient_in_every_probability():
    params, groups, operations = network("small")
    p = {name: jnp.full(g.size, 0.5) for name, g in groups.items()}
    for convention in CONVENTIONS:
        slopes = jax.grad(
            lambda p, convention=convention: costs.compute(
                params, p, groups, operations, convention
            )
        )(p)
        for slope in slopes.values():
            assert (slope >= 0).all()
        assert sum(float(slope.sum()) for slope in slopes.values()) > 0
    slopes = jax.grad(lambda p: costs.compute(params, p, groups, operations, "macs"))(p)
    assert all((slope > 0).all() for slope in slopes.values())


def test_costs_only_read_shapes():
    params, groups, operations = network("small")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    for convention, p in itertools.product(CONVENTIONS, (1.0, 0.3)):
        active = {name: jnp.full(g.size, p) for name, g in groups.items()}
        assert costs.compute(
            shapes, active, groups, operations, convention
        ) == costs.compute(params, active, groups, operations, convention)


def test_operations_add_up():
    params, groups, operations = network("small")
    active = {name: jnp.full(g.size, 0.4) for name, g in groups.items()}
    for convention in CONVENTIONS:
        apart = sum(
            costs.compute(params, active, groups, [op], convention) for op in operations
        )
        together = costs.compute(params, active, groups, operations, convention)
        np.testing.assert_allclose(apart, together, rtol=1e-6)
    assert costs.weights(params, active, groups, []) == 0
    twice = [Operation(op.kernel, 2 * op.positions) for op in operations]
    np.testing.assert_allclose(
        costs.compute(params, active, groups, twice, "macs"),
        2 * costs.compute(params, active, groups, operations, "macs"),
    )


def test_unknown_conventions_are_named():
    params, groups, operations = network("small")
    with pytest.raises(ValueError, match="'joules'") as error:
        costs.compute(params, everything(groups), groups, operations, "joules")
    assert all(convention in str(error.value) for convention in CONVENTIONS)
