"""Gates on whole branches beside those of their units: a unit is there if both are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import l0jax
from l0jax import costs, gates, train
from l0jax.models.decoder import Decoder
from l0jax.train.targets import fill
from l0jax.units import Certain, Group, Slot
from tests.optimizers import adam

BRANCHES = {
    "blocks.0.attention:2": "attention",
    "blocks.0.feed_forward": "feed-forward",
    "blocks.1.attention:2": "attention",
    "blocks.1.feed_forward": "feed-forward",
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (3, 8)))


@pytest.fixture(scope="module")
def model():
    sizes = [(3, 2, 2, 4, 10), (2, 1, 3, 5, 7)]
    model = Decoder(11, 12, sizes, 8, rngs=nnx.Rngs(0))
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            variable[...] = variable[...] + 0.1 * jnp.sin(
                jnp.arange(variable.size)
            ).reshape(variable.shape)
    return model


@pytest.fixture(scope="module")
def parts(model):
    return l0jax.trace(model, model.example)


@pytest.fixture(scope="module")
def structure(parts):
    return parts.whole("branches", list(BRANCHES))


def drawn(structure, seed, share=0.7):
    rng = np.random.default_rng(seed)
    return {n: rng.random(g.size) < share for n, g in structure.groups.items()}


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(6))
def test_what_is_left_is_what_is_left_of_the_parts(model, parts, structure, seed):
    """Counted, gated, removed from the module, and narrowed."""
    keep = drawn(structure, seed)
    inner = {n: f for n, f in structure.nested(keep).items() if n != "branches"}
    assert any((inner[n] != keep[n]).any() for n in BRANCHES) or keep["branches"].all()
    for cost in costs.COSTS.values():
        found = costs.exact(structure, keep, cost)
        assert found == costs.exact(parts, inner, cost)
        flags = Certain({n: np.float64(f) for n, f in keep.items()})
        apart = Certain({n: np.float64(f) for n, f in inner.items()})
        assert cost(structure, flags) == pytest.approx(float(cost(parts, apart)))
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    gated = l0jax.nnx.fold(model, z, structure.groups)
    expected = gated(TOKENS)
    assert abs(expected - model(TOKENS)).max() > 1e-2
    small = l0jax.nnx.shrink(gated, keep, structure)
    function, params = l0jax.narrow(structure, nnx.state(gated), keep)
    for outputs in (small(TOKENS), function(params, TOKENS)):
        assert abs(outputs - expected).max() <= 1e-5 * abs(expected).max()
    lost = [n for n, open_ in zip(BRANCHES, keep["branches"], strict=True) if not open_]
    sizes = [(each.groups, each.hidden) for each in small.sizes]
    left = dict(zip(BRANCHES, itertools.chain(*sizes), strict=True))
    assert all((left[n] == 0) >= (n in lost) for n in BRANCHES)


@pytest.mark.parametrize("cost", [costs.params, costs.macs, costs.weights])
def test_expected_costs_are_the_means_of_draws(parts, structure, cost):
    """Counted of the parts, which know nothing of wholes."""
    rng = np.random.default_rng(1)
    names = ("branches", *BRANCHES)
    p = {n: rng.uniform(0.2, 0.9, structure.groups[n].size) for n in names}
    expected = float(cost(structure, {n: jnp.float32(each) for n, each in p.items()}))
    found = []
    for _ in range(1_500):
        flags = {n: np.float64(rng.random(len(each)) < each) for n, each in p.items()}
        there = flags.pop("branches")
        for name, open_ in zip(BRANCHES, there, strict=True):
            flags[name] = flags[name] * open_
        found.append(float(cost(parts, Certain(flags))))
    error = 5 * np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - expected) < error
    # (Were gates of wholes forgotten anywhere, it would be further off.)
    alone = {n: jnp.float32(each) for n, each in p.items() if n != "branches"}
    assert abs(float(cost(structure, alone)) - expected) > 3 * error


def test_expected_seconds_are_the_means_of_draws_of_wholes(structure):
    """Interpolated in the units of a branch, and exact in whether it is there."""
    attention, hidden = "blocks.0.attention:2", "blocks.0.feed_forward"
    tables = [
        costs.Table((attention,), ((0, 1, 3),), np.array([1.0, 5.0, 6.0])),
        costs.Table(
            (attention, hidden), ((0, 3), (0, 10)), np.array([[2.0, 3.0], [4.0, 9.0]])
        ),
    ]
    cost = costs.interpolated(tables)
    rng = np.random.default_rng(0)
    branches = rng.uniform(0.2, 0.9, 4)
    counts = {attention: 2.0, hidden: 4.0}
    units = {
        n: jnp.full(structure.groups[n].size, count / structure.groups[n].size)
        for n, count in counts.items()
    }
    found = float(cost(structure, {"branches": jnp.float32(branches), **units}))
    expected = 0.0
    for there in itertools.product((0, 1), repeat=2):
        chance = np.prod(np.where(there, branches[:2], 1 - branches[:2]))
        now = {n: p * on for (n, p), on in zip(units.items(), there, strict=True)}
        expected += chance * float(cost(structure, now))
    assert found == pytest.approx(expected, rel=1e-5)
    # That of half of the units would be another.
    halved = {n: p * b for (n, p), b in zip(units.items(), branches, strict=False)}
    assert abs(float(cost(structure, halved)) - found) > 0.05
    closed = {"branches": np.array([False, True, True, True])}
    assert costs.exact(structure, closed, cost) == round(1.0 + 3.0)


def test_a_smaller_structure_has_the_wholes_that_are_left(structure):
    keep = {"branches": np.array([True, False, True, True])}
    left = structure.shrink(keep)
    assert left.groups["branches"].size == 3
    assert left.groups["blocks.0.feed_forward"].size == 0
    assert left.wholes["branches"] == tuple(
        (name,) for name in BRANCHES if name != "blocks.0.feed_forward"
    )
    again = {"branches": np.array([False, True, True])}
    both = {"branches": np.array([False, False, True, True])}
    # (Norms without a reader go by counting, and no program is left to tell.)
    flags = [
        Certain({n: np.float64(f) for n, f in each.items()}) for each in (again, both)
    ]
    assert costs.macs(left, flags[0]) == costs.macs(structure, flags[1])


def test_edits_of_members_are_followed(structure):
    renamed = structure.rename({"blocks.0.feed_forward": "first", "branches": "all"})
    assert renamed.wholes == {
        "all": tuple((n.replace("blocks.0.feed_forward", "first"),) for n in BRANCHES)
    }
    split = structure.split("blocks.1.feed_forward", {"a": range(3), "b": range(3, 7)})
    assert split.wholes["branches"][3] == ("a", "b")
    keep = {"branches": np.array([True, True, True, False])}
    for other in (split, renamed.rename({"all": "branches"})):
        assert costs.exact(other, keep) == costs.exact(structure, keep)
    assert structure.only("blocks.0.attention:2").wholes == {}


def test_a_target_is_met_by_branches_and_units(model, structure):
    target = train.Target(costs.params, 0.5, rate=0.05)

    def loss(model, batch):
        logits = model(batch[:, :-1])
        found = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
        return found.mean(), {}

    training = train.Training(
        model,
        loss,
        structure=structure.only("branches", *BRANCHES),
        gate=gates.HardConcrete(),
        target=target,
        optimizer=adam(1e-2),
        gate_optimizer=adam(5e-2),
        compaction=train.Compaction(after=1, at=0.95),
    )
    state = training.start(jax.random.key(0))
    rng = np.random.default_rng(0)
    for part in range(4):
        for _ in range(30):
            state, _ = training.step(state, jnp.asarray(rng.integers(0, 11, (8, 9))))
        if part == 1:
            logits = state.gates["logits"]
            logits["branches"] = logits["branches"].at[1].set(-4.6)
        training, state = training.compact(state)
    # A branch that is closed for good is gone with its units.
    np.testing.assert_array_equal(training.alive["branches"], [1, 0, 1, 1])
    assert not training.alive["blocks.0.feed_forward"].any()
    assert training.structure.groups["branches"].size == 3
    decision = training.decide(state)
    # A unit of the smallest group is 1.5 % of the parameters.
    assert -0.06 < decision.excess["params"] <= 0
    folded = training.whole_model(state, decision)
    with pytest.warns(UserWarning, match="'branches' .100 %."):
        small = training.finish(state, decision)
    expected = folded(TOKENS)
    assert abs(small(TOKENS) - expected).max() <= 1e-5 * abs(expected).max()
    counted = sum(a.size for a in jax.tree.leaves(nnx.state(small, nnx.Param)))
    whole = costs.exact(structure, cost=costs.params)
    assert counted <= 0.5 * whole + 24  # Norms of lost branches stay in the class.


def test_what_is_no_whole_is_refused(parts, structure):
    with pytest.raises(ValueError, match="unknown group 'heads'"):
        parts.whole("branches", ["heads"])
    with pytest.raises(ValueError, match=r"'blocks\.0\.feed_forward' is named twice"):
        parts.whole("branches", ["blocks.0.feed_forward"] * 2)
    with pytest.raises(ValueError, match="'branches' is a whole itself"):
        structure.whole("more", ["branches"])
    with pytest.raises(ValueError, match="there is a group 'branches' already"):
        structure.whole("branches", list(BRANCHES))
    single = Group("single", 12, (Slot("norm.scale", None),))
    with pytest.raises(ValueError, match="'single' is of single weights"):
        parts.add(single).whole("branches", ["single"])
    members = ["blocks.0.attention", "blocks.0.attention:2"]
    pair = parts.whole("one", ["blocks.0.attention:2"])
    with pytest.raises(ValueError, match=r"blocks\.0\.attention:2' can't be merged"):
        pair.merge("both", [members[1], "blocks.1.attention:2"])
    with pytest.raises(ValueError, match="'branches' can't be split: the units"):
        structure.split("branches", {"a": [0, 1], "b": [2, 3]})
    two = pair.whole("two", ["blocks.1.attention:2"])
    with pytest.raises(ValueError, match="'one' can't be merged"):
        two.merge("both", ["one", "two"])
    for name in ("one", members[1]):
        with pytest.raises(ValueError, match=f"{name!r} can't be extended"):
            pair.extend(name, used_by=[Slot("norm.scale", 0)])
    with pytest.raises(ValueError, match=r"'blocks\.0\.attention:2' is left out, and"):
        structure.only("branches")


@pytest.mark.parametrize("how", ["quadratic", "decided"])
def test_a_target_below_what_some_gates_can_remove_is_refused(model, structure, how):
    """Those of one group leave most of the model."""
    gate = train.Learned(gates.HardConcrete(), only=("blocks.0.feed_forward",))
    target = train.Target(costs.params, 0.3, how=how)
    with pytest.raises(ValueError, match=r"no gates alone is 0\.8"):
        train.Training(
            model,
            lambda *_: (jnp.zeros(()), {}),
            structure=structure,
            gate=gate,
            target=target,
            optimizer=optax.sgd(0.1),
        )


def test_a_later_branch_may_fit_where_an_earlier_one_does_not():
    """Branches of one group cost differently; units of others all the same."""
    price = {("branches", 0): 5, ("branches", 1): 1, ("units", 0): 3, ("units", 1): 3}
    start = {"branches": np.zeros(2, bool), "units": np.zeros(2, bool)}

    def fits(keep):
        return sum(c for (n, at), c in price.items() if keep[n][at]) <= 2

    kept = fill([*price], start, fits, ("branches",))
    assert kept["branches"].tolist() == [False, True]
    assert fill([*price], start, fits)["branches"].tolist() == [False, False]


def test_the_budget_takes_a_branch_that_fits_after_one_that_does_not(model, structure):
    alone = [
        costs.exact(structure, {"branches": np.arange(4) == at}, costs.params)
        for at in range(4)
    ]
    whole = costs.exact(structure, cost=costs.params)
    cheapest = int(np.argmin(alone))
    assert alone.count(alone[cheapest]) == 1
    training = train.Training(
        model,
        lambda *_: (jnp.zeros(()), {}),
        structure=structure,
        gate=train.Learned(gates.HardConcrete(), only=("branches",)),
        target=train.Target(costs.params, alone[cheapest] / whole),
        optimizer=optax.sgd(0.1),
    )
    state = training.start(jax.random.key(0))
    # Closed all of them, so that none is kept for its group; the cheapest is last.
    wanted = -3.0 - 0.1 * (np.arange(4) == cheapest)
    state.gates["logits"]["branches"] = jnp.float32(wanted)
    kept = training.decide(state).z["branches"] != 0
    np.testing.assert_array_equal(kept, np.arange(4) == cheapest)


def test_trainings_of_other_wholes_are_other_programs(model, parts, structure):
    """Of the same groups by name and place, stated by hand and as a whole."""
    by_hand = parts.add(structure.groups["branches"])

    def made(of):
        return train.Training(
            model,
            optax.l2_loss,
            structure=of,
            gate=gates.HardConcrete(),
            target=train.Target(costs.macs, 0.5),
            optimizer=optax.sgd(0.1),
        )

    one, other, again = (made(of) for of in (structure, by_hand, structure))
    again = again.replace(target=one.target, optimizer=one.optimizer)
    again.gate_optimizer = other.gate_optimizer = one.gate_optimizer
    other = other.replace(target=one.target, optimizer=one.optimizer)
    assert again == one != other


def test_weights_under_a_whole_are_not_paid_for_twice(model, structure):
    def made(**told):
        return train.Training(
            model,
            lambda *_: (jnp.zeros(()), {}),
            structure=structure,
            gate=gates.HardConcrete(),
            optimizer=optax.sgd(0.1),
            **told,
        )

    for told, name in (
        ({"price": 0.1}, "a price"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"target": train.Target("density", 0.5)}, "a density"),
    ):
        with pytest.raises(ValueError, match=f"{name} is counted by weights, of which"):
            made(**told)
    shares = dict.fromkeys(structure.groups, 0.5)
    assert made(target=train.Target("density", shares)).target is not None


def test_a_table_tells_of_groups_that_are_empty(structure):
    keep = {"branches": np.array([False, True, True, True])}
    assert "blocks.0.attention:2" in str(structure.shrink(keep))
