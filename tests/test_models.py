"""Law 2: a gated network is the shrunk network, whatever is kept.

Swept over `MODELS`: each states its own groups, so that a new model needs one line in
`ARCHITECTURES` and nothing else.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES, inputs_for
from flax import linen, nnx

import l0jax.nnx
from l0jax import gates, models, units
from l0jax.models import MODELS, convolution
from l0jax.units import Group, Slot

GATE = gates.HardConcrete()
CASES = [(name, size) for name in MODELS for size in ARCHITECTURES[name]]
sweep = pytest.mark.parametrize(("name", "size"), CASES)
small = pytest.mark.parametrize(
    ("name", "size"), [case for case in CASES if case[1] != "paper"]
)


@functools.cache
def build(name, size):
    """A model with weights and biases that are all different from zero.

    Its arrays lie on the host: cutting them to many shapes compiles nothing.
    """
    model = models.make(name, ARCHITECTURES[name][size], rngs=nnx.Rngs(0))
    state = params_of(model)
    noise = np.random.default_rng(0)
    state = jax.tree.map(
        lambda a: a + jnp.float32(0.1 * noise.normal(size=a.shape)), state
    )
    nnx.update(model, state)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.BatchNorm):
            mean, var = noise.normal(size=(2, layer.num_features))
            layer.mean[...] = jnp.float32(mean)
            layer.var[...] = jnp.float32(0.5 + var**2)
    return on_host(model)


def on_host(model):
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(np.asarray, state))


@functools.partial(jax.jit, static_argnums=0)
def compiled(graph, state, images):
    return nnx.merge(graph, state)(images)


def outputs(model, images):
    return compiled(*nnx.split(model), images)


def images_for(model, batch=4):
    return inputs_for(model, batch, seed=1)


def groups_of(model):
    return models.structure(model).groups


def params_of(model):
    return nnx.state(model, nnx.Param)


def arrays(model):
    return {path: np.asarray(a) for path, a in units.arrays(nnx.state(model)).items()}


def keeps_for(tree, groups, seed):
    """Random flags at every density, and the extremes: one unit left, one unit gone.

    No array of `tree` loses everything.
    """
    rng = np.random.default_rng(seed)
    ones = jax.tree.map(np.ones_like, tree)
    while True:
        keep = {}
        for i, (name, group) in enumerate(groups.items()):
            unit = np.arange(group.size)
            kind = (seed + i) % 5
            keep[name] = (
                rng.random(group.size) < rng.uniform(0.05, 0.95),
                unit == rng.integers(group.size),
                unit != rng.integers(group.size),
                rng.random(group.size) < 0.5,
                unit >= 0,
            )[kind]
            keep[name][rng.integers(group.size)] |= not keep[name].any()
        z = {name: jnp.float32(flags) for name, flags in keep.items()}
        left = units.apply_gates(ones, z, groups)
        if all(np.any(a) for a in jax.tree.leaves(left)):
            return keep


def gate_values(keep, seed):
    """Values in (0, 1] for what is kept and 0 for the rest."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.float32(np.where(flags, rng.uniform(0.3, 1, len(flags)), 0))
        for name, flags in keep.items()
    }


def agree(found, expected):
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert np.ptp(expected) > 0, "a constant output shows nothing"
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def size_of(groups, name):
    """A single unit that is left need not be a group any more: it can't go."""
    return groups[name].size if name in groups else 1


def check_law(model, seed):
    """Gated by any values = these values folded in and closed units removed."""
    groups, images = groups_of(model), images_for(model)
    keep = keeps_for(params_of(model), groups, seed)
    z = gate_values(keep, seed)
    before = arrays(model)
    folded = on_host(l0jax.nnx.fold(model, z, groups))
    shrunk = l0jax.nnx.shrink(folded, keep, groups)
    agree(outputs(shrunk, images), outputs(folded, images))
    left = groups_of(shrunk)
    for name, flags in keep.items():
        assert size_of(left, name) <= flags.sum(), name
    for path, array in arrays(model).items():
        np.testing.assert_array_equal(array, before[path], err_msg="written to")
    return shrunk


@pytest.mark.sweep
@sweep
def test_gated_is_shrunk(name, size):
    model = build(name, size)
    for seed in range(4 if size == "paper" else 10):
        check_law(model, seed)


@pytest.mark.sweep
@sweep
def test_a_shrunk_model_is_a_model(name, size):
    """Its groups fit it, it can be gated again, and shrinks again."""
    model = build(name, size)
    for seed in range(1 if size == "paper" else 3):
        shrunk = check_law(model, seed)
        units.check(nnx.state(shrunk), groups_of(shrunk))
        twice = check_law(shrunk, seed + 100)
        check_law(twice, seed + 200)


@pytest.mark.sweep
@small
def test_each_group_can_be_shrunk_alone(name, size):
    model = build(name, size)
    groups, images = groups_of(model), images_for(model)
    for group in groups.values():
        for j in range(group.size):
            keep = {group.name: np.arange(group.size) != j}
            if group.size == 1:
                continue
            z = {group.name: jnp.float32(keep[group.name])}
            gated = l0jax.nnx.fold(model, z, groups)
            shrunk = l0jax.nnx.shrink(model, keep, groups)
            agree(outputs(shrunk, images), outputs(gated, images))
            assert size_of(groups_of(shrunk), group.name) == group.size - 1


@pytest.mark.sweep
@small
def test_what_is_not_in_use_may_go(name, size):
    """`in_use` of folded weights finds units that died with another group's gates."""
    model = build(name, size)
    groups, images = groups_of(model), images_for(model)
    for seed in range(4):
        z = gate_values(keeps_for(params_of(model), groups, seed), seed)
        folded = l0jax.nnx.fold(model, z, groups)
        keep = units.in_use(nnx.state(folded), groups)
        for group in groups:
            assert not (keep[group] & (np.asarray(z[group]) == 0)).any()
            keep[group][0] |= not keep[group].any()
        shrunk = l0jax.nnx.shrink(on_host(folded), keep, groups)
        agree(outputs(shrunk, images), outputs(folded, images))


@pytest.mark.sweep
@sweep
def test_architecture_rebuilds_the_shape(name, size):
    model = build(name, size)
    groups = groups_of(model)
    keep = keeps_for(params_of(model), groups, 5)
    for one in (model, l0jax.nnx.shrink(model, keep, groups)):
        again = models.make(models.name_of(one), one.architecture, rngs=nnx.Rngs(3))
        assert again.architecture == one.architecture
        shapes = {path: array.shape for path, array in arrays(one).items()}
        assert {p: a.shape for p, a in arrays(again).items()} == shapes
        found, expected = models.structure(again), models.structure(one)
        assert found.operations == expected.operations
        assert found.arrays == expected.arrays
        assert {n: g.size for n, g in found.groups.items()} == {
            n: g.size for n, g in expected.groups.items()
        }


@sweep
def test_charges_and_groups_fit_the_arrays(name, size):
    model = build(name, size)
    structure = models.structure(model)
    state, groups = params_of(model), structure.groups
    charges = model.charges(groups)
    units.check(nnx.state(model), groups)
    assert set(charges) == set(groups)
    assert all(group.name == key for key, group in groups.items())
    charged = {
        key: Group(key, groups[key].size, slots) for key, slots in charges.items()
    }
    units.check(state, charged)
    kernels = {path for path, a in units.arrays(state).items() if a.ndim > 1}
    # (Tokens are looked up in an embedding, and multiplied by nothing.)
    multiplied = {operation.kernel for operation in structure.operations}
    assert multiplied - {None} == kernels - {"embed"}
    assert kernels <= {slot.path for slots in charges.values() for slot in slots}


def per_unit(model, group):
    groups = groups_of(model)
    sizes = units.charge(
        jnp.ones_like,
        params_of(model),
        model.charges(groups)[group],
        groups[group].size,
    )
    assert len(set(np.asarray(sizes).tolist())) == 1
    return int(sizes[0])


def test_sizes_of_the_papers_networks():
    mlp, lenet = build("mlp", "paper"), build("lenet5", "paper")
    counts = [
        sum(a.size for a in jax.tree.leaves(params_of(model))) for model in (mlp, lenet)
    ]
    assert counts == [266_610, 431_080]
    assert {name: group.size for name, group in groups_of(mlp).items()} == {
        "input": 784,
        "hidden1": 300,
        "hidden2": 100,
    }
    assert {name: group.size for name, group in groups_of(lenet).items()} == {
        "conv1": 20,
        "conv2": 50,
        "features": 800,
        "hidden": 500,
    }
    # A dense unit pays for the weights that read it, a map for its filter and bias.
    assert [per_unit(mlp, name) for name in groups_of(mlp)] == [300, 100, 10]
    assert [per_unit(lenet, name) for name in groups_of(lenet)] == [26, 501, 500, 10]


@pytest.mark.parametrize(
    "shape", [(15, 16, 1), (16, 15, 1), (8, 8, 1), (4, 28, 3), (1, 1, 1)]
)
def test_lenet_refuses_images_that_are_too_small(shape):
    with pytest.raises(ValueError, match="16 by 16") as error:
        models.make("lenet5", {"shape": shape}, rngs=nnx.Rngs(0))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (1, 7, 5, 2), (3, 2, 3, 1)])
def test_pooling_is_that_of_reduce_window(shape):
    x = jnp.float32(np.random.default_rng(0).normal(size=shape))
    theirs = functools.partial(linen.max_pool, window_shape=(2, 2), strides=(2, 2))
    found, pull = jax.vjp(convolution.max_pool_2x2, x)
    expected, their_pull = jax.vjp(theirs, x)
    np.testing.assert_array_equal(found, expected)
    dy = jnp.float32(np.random.default_rng(1).normal(size=found.shape))
    np.testing.assert_array_equal(pull(dy)[0], their_pull(dy)[0])


def test_pooling_shares_the_gradient_of_a_tie():
    slope = jax.grad(lambda x: convolution.max_pool_2x2(x).sum())(
        jnp.ones((1, 4, 4, 1))
    )
    np.testing.assert_array_equal(slope, jnp.full((1, 4, 4, 1), 0.25))


def xla_convolution(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.sweep
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("images", "kernel"),
    [
        ((2, 9, 7, 3), (5, 5, 3, 4)),
        ((3, 6, 8, 1), (3, 2, 1, 2)),
        ((1, 5, 5, 2), (5, 5, 2, 1)),
        ((2, 4, 4, 3), (1, 1, 3, 2)),
    ],
)
def test_convolution_and_its_gradient_are_those_of_xla(
    images, kernel, backend, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    arguments = (
        jnp.float32(rng.normal(size=images)),
        jnp.float32(rng.normal(size=kernel)),
    )
    found, pull = jax.vjp(convolution.conv2d, *arguments)
    expected, their_pull = jax.vjp(xla_convolution, *arguments)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    dy = jnp.float32(rng.normal(size=found.shape))
    for mine, theirs in zip(pull(dy), their_pull(dy), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_convolution_maps_over_kernels():
    """As it must where each example draws gates, and so has weights, of its own."""
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(3, 1, 6, 6, 2)))
    kernels = jnp.float32(rng.normal(size=(3, 5, 5, 2, 4)))
    for of in (convolution.conv2d, jax.jit(convolution.conv2d)):
        found = jax.vmap(of)(x, kernels)
        expected = jnp.stack(
            [xla_convolution(*pair) for pair in zip(x, kernels, strict=True)]
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.sweep
@small
def test_each_example_is_mapped_on_its_own(name, size):
    model = build(name, size)
    images = images_for(model, batch=3)
    together = model(images)
    alone = jnp.concatenate([model(images[i : i + 1]) for i in range(3)])
    assert together.shape[0] == 3
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match="'alexnet'") as error:
        models.make("alexnet", {}, rngs=nnx.Rngs(0))
    assert all(name in str(error.value) for name in MODELS)
    with pytest.raises(ValueError, match="Linear") as error:
        models.name_of(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    assert all(name in str(error.value) for name in MODELS)
    for name in MODELS:
        assert models.name_of(build(name, "small")) == name


# ------------------------------------------------------------- through the adapters


@pytest.mark.sweep
@small
def test_the_nnx_adapter_is_shrunk_at_test_time(name, size):
    model = build(name, size)
    images = images_for(model)
    net = l0jax.nnx.Gated(model, GATE, groups_of(model), 0.25, rngs=nnx.Rngs(gates=0))
    for rule in ("paper", "median"):
        for group, logits in net.logits.items():
            spread = np.random.default_rng(len(group)).uniform(-4, 4, logits.shape)
            logits[...] = jnp.float32(spread).at[0].set(4.0).at[-1].set(-4.0)
        z = net.gates(rule=rule)
        assert all((values == 0).any() for values in z.values())
        folded = l0jax.nnx.fold(model, z, net.groups)
        keep = {group: np.asarray(values) != 0 for group, values in z.items()}
        shrunk = l0jax.nnx.shrink(folded, keep, net.groups)
        agree(shrunk(images), net(images, rule=rule))


class ConvNet(linen.Module):
    """A convolution under batch norm, flattened into a dense layer."""

    maps: int = 4

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(self.maps, (3, 3), name="conv")(x)
        x = linen.BatchNorm(use_running_average=True, name="norm")(x)
        x = linen.relu(x).reshape(x.shape[0], -1)
        return linen.Dense(3, name="dense")(x)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(5))
def test_linen_variables_shrink_with_their_running_statistics(seed):
    rng = np.random.default_rng(seed)
    images = jnp.float32(rng.normal(size=(2, 3, 3, 2)))
    variables = ConvNet().init(jax.random.key(0), images)
    variables = jax.tree.map(
        lambda a: a + jnp.float32(0.1 + rng.random(a.shape)), variables
    )
    made = [
        ("params.conv.kernel", 3),
        ("params.conv.bias", 0),
        ("params.norm.scale", 0),
        ("params.norm.bias", 0),
        ("batch_stats.norm.mean", 0),
        ("batch_stats.norm.var", 0),
    ]
    flattened = Slot("params.dense.kernel", 0, tuple(j % 4 for j in range(36)))
    groups = {"maps": Group("maps", 4, (flattened,), tuple(Slot(*s) for s in made))}
    keep = keeps_for(variables, groups, seed)
    gated = units.apply_gates(variables, gate_values(keep, seed), groups)
    small = units.shrink(gated, keep, groups)
    found = ConvNet(maps=int(keep["maps"].sum())).apply(small, images)
    agree(found, ConvNet().apply(gated, images))
