"""Many devices and many processes give what one gives (law 12)."""

import collections
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec

from benchmarks import devices as measured
from l0jax import units
from l0jax.train.placement import Placement, parameters_of
from tests import on_devices
from tests import training_models as models
from tests.on_devices import apart, ran
from tests.test_readme import blocks

PARAMS = {"first": {"kernel": jnp.zeros((6, 4))}, "out": {"kernel": jnp.zeros((4, 3))}}


@pytest.mark.slow
@pytest.mark.always
def test_eight_devices_give_what_one_gives(tmp_path):
    (found,) = ran("trajectories", tmp_path)
    for kind in on_devices.KINDS:
        alone, *others = (found[f"{kind}, {way}"] for way in on_devices.WAYS)
        assert len(alone["losses"]) == on_devices.STEPS
        assert alone["losses"][-1] < 0.9 * alone["losses"][0]
        for other in others:
            assert apart(alone, other) < 2e-6, kind
            assert other["widths"] == alone["widths"]
    # Units were taken out; arrays are split, those of gates of single weights too.
    sharded = found["units, sharded"]
    assert sharded["spec"] == str(PartitionSpec(None, "model"))
    assert all(size % 4 == 0 for size in sharded["widths"])
    assert sharded["widths"] != [48, 32]
    assert str(PartitionSpec("model")) in found["single weights, sharded"]["of logits"]


def test_gates_add_no_collective(tmp_path):
    (found,) = ran("collectives", tmp_path)
    assert found["gated"] == found["plain"]
    assert found["plain"]["all-reduce"] > 0


@pytest.mark.slow
def test_a_sharded_decoder_gives_what_one_device_gives(tmp_path):
    (found,) = ran("decoder", tmp_path)
    alone, sharded = found["alone"], found["sharded"]
    assert apart(alone, sharded) < 1e-5
    assert len(set(alone["losses"])) > 50
    # Units were taken out.
    assert alone["widths"] == sharded["widths"]
    assert sum(sharded["widths"][-1]) < sum([4, 64] * 2)
    assert sum("data" in spec for spec in sharded["specs"].values()) > 10
    assert sum("model" in spec for spec in sharded["specs"].values()) >= 12


@pytest.mark.slow
@pytest.mark.always
def test_each_process_goes_on_with_its_part_of_a_stream(tmp_path):
    both = ran("stream", tmp_path, processes=2)
    assert [found["same"] for found in both] == [True, True]
    assert both[0]["losses"] == both[1]["losses"]
    assert both[0]["seen"] != both[1]["seen"]
    assert len(both[0]["seen"]) == 17 * 48


@pytest.mark.slow
@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_two_processes_give_what_one_gives(way, tmp_path):
    (expected,) = ran(way, tmp_path)
    found, other = ran(way, tmp_path, processes=2)
    assert found == other
    assert found["restored"]
    assert expected["restored"]
    assert (found["done"], found["kept"]) == (3, [2, 3])
    assert apart(found, expected) < 2e-6
    assert found["widths"] == expected["widths"]
    np.testing.assert_allclose(found["losses"][-2:], expected["losses"][-2:], rtol=1e-5)
    np.testing.assert_allclose(found["sum"], expected["sum"], rtol=1e-4)
    assert found["seen"] == pytest.approx(expected["seen"], rel=1e-5)


def test_what_the_benchmark_prints_of_all_that(monkeypatch):
    """From the numbers of such programs, of which one differs by five millionths."""
    alone = {"losses": [2.0] * 50, "widths": [4], "restored": True, "specs": {}}
    other = alone | {"losses": [2.0] * 49 + [2.000005]}
    kinds = [f"{kind}, {way}" for kind in on_devices.KINDS for way in on_devices.WAYS]
    found = {
        "trajectories": {k: other if k == kinds[1] else alone for k in kinds},
        "replicated": alone,
        "sharded": alone,
        "decoder": {"alone": alone, "sharded": other},
        "collectives": {"gated": {"all-reduce": 3}, "plain": {"all-reduce": 2}},
    }

    def ran(name, folder, processes=1):
        return [found[name]] * processes

    monkeypatch.setattr(on_devices, "ran", ran)
    lines = measured.of_losses("") + measured.of_collectives("")
    assert len(lines) == len(kinds) - len(on_devices.KINDS) + 2 + 1 + 1
    values = [each["value"] for each in lines]
    assert values[0] == "5.00 millionths"
    assert [each["verdict"] for each in lines].count("NOT within") == 2
    assert lines[-1]["verdict"] == "NOT within"
    assert lines[-2]["verdict"] == "within"  # the decoder's, which may differ more


def test_a_sweep_uses_all_devices_that_it_is_given():
    assert measured.of_program("members", 8) == [8]


# ------------------------------------------------------------------------------ rules


# A mesh of devices that aren't there.
SIX = Mock(
    spec=Mesh,
    axis_names=("data", "model"),
    shape={"data": 3, "model": 2},
    axis_types=(AxisType.Auto,) * 2,
)


def test_the_first_rule_that_matches_counts():
    rules = (
        ("first.*", PartitionSpec(None, "model")),
        (".*", "data"),
    )
    placement = Placement(SIX, rules)
    assert placement.spec("first.kernel", (6, 4)) == PartitionSpec(None, "model")
    # The largest axis that 3 divides.
    assert placement.spec("other", (6, 9)) == PartitionSpec(None, "data")
    assert placement.spec("other", (6, 4)) == PartitionSpec("data")
    assert placement.spec("other", (5, 4)) == PartitionSpec()
    assert placement.spec("other", ()) == PartitionSpec()


def test_what_a_rule_can_t_split_is_refused():
    split = {"first.kernel": PartitionSpec(("data", "model"), None)}
    Placement(SIX, tuple(split.items())).check(PARAMS)
    for rules, message in (
        ({"first.kernel": PartitionSpec(None, "data")}, r"axis 1 of 'first.kernel'"),
        ({"first.*": PartitionSpec(None, None, "data")}, "has 3 entries"),
        ({"second.*": PartitionSpec("data")}, "matches no parameter"),
    ):
        placement = Placement(SIX, tuple(rules.items()))
        with pytest.raises(ValueError, match=message):
            placement.check(PARAMS)


def test_rules_are_of_a_mesh():
    with pytest.raises(ValueError, match="no mesh= is given"):
        Placement(None, ((".*", "data"),))
    for rule in ("sweep", PartitionSpec(None, ("data", "sweep"))):
        with pytest.raises(ValueError, match="names the axis 'sweep'"):
            Placement(SIX, ((".*", rule),))
    with pytest.raises(ValueError, match="is no pattern"):
        Placement(SIX, (("(", "data"),))


PARAMETERS = {
    "named as moments are": {
        "kernel": jnp.zeros(2),
        "mu": {"kernel": jnp.zeros(2), "nu": {"kernel": jnp.zeros(3)}},
        "nu": jnp.zeros(2),
    },
    "in a list": [jnp.zeros(2), jnp.zeros(2)],
    "one array": jnp.zeros(2),
    "of Flax": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
}
OPTIMISERS = {
    "adam": optax.adam(1e-2),
    "in a chain": optax.chain(optax.trace(0.9), optax.scale(0.1), optax.ema(0.9)),
    "by steps": optax.MultiSteps(optax.adam(1e-2), 3),
    "of some": optax.masked(
        optax.adam(1e-2), lambda tree: jax.tree.map(lambda a: a.size != 3, tree)
    ),
    "with what is of none": optax.chain(
        optax.trace(0.9),
        optax.stateless(lambda updates, _: updates),
        optax.GradientTransformation(
            lambda _: jnp.zeros(7), lambda updates, kept, _=None: (updates, kept)
        ),
    ),
}


@pytest.mark.parametrize("params", PARAMETERS)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_what_an_optimiser_keeps_is_of_the_parameter_at_its_place(optimiser, params):
    """What it would keep for that parameter alone, and for no other."""
    tx = OPTIMISERS[optimiser]
    leaves, form = jax.tree.flatten(PARAMETERS[params])
    leaves = [jnp.full_like(leaf, at + 1.0) for at, leaf in enumerate(leaves)]

    def kept_for(params):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(params, tx.init(params), params)[1]

    params = form.unflatten(leaves)
    alone = {
        path: [a for a in jax.tree.leaves(kept_for([leaf])) if a.ndim]
        for path, leaf in units.arrays(params).items()
    }
    kept = kept_for(params)
    names = parameters_of(kept, params)
    named = collections.defaultdict(list)
    for name, leaf in zip(names, jax.tree.leaves(kept), strict=True):
        if name is not None:
            named[name].append(leaf)
    if optimiser == "with what is of none":
        alone = {path: its[:1] for path, its in alone.items()}
    for path, its in alone.items():
        assert len(named[path]) == len(its)
        for found, expected in zip(named[path], its, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_the_example_of_the_readme_splits_a_training():
    (example,) = (block for block in blocks("python") if "PartitionSpec(" in block)
    with jax.numpy_dtype_promotion("standard"):  # optax
        training = on_devices.perceptron()
        names = {"jax": jax, "np": np, "training": training}
        exec(example, names)
        training = names["training"]
        state = training.start(jax.random.key(0))
        specs = {p: a.sharding.spec for p, a in units.arrays(state.params).items()}
        training.step(state, next(models.batches(0)))
    assert specs.pop("out.kernel") == PartitionSpec("model", None)
    assert all("data" in spec for spec in specs.values())


def test_a_training_on_one_device_may_have_a_mesh():
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    with jax.numpy_dtype_promotion("standard"):  # optax
        training = on_devices.perceptron(mesh=mesh, sharding={".*": "data"})
        losses, _, state = on_devices.trained(training)
        alone, _, _ = on_devices.trained(on_devices.perceptron())
    assert losses == alone
    assert state.params["first"]["kernel"].sharding.spec == PartitionSpec("data")
