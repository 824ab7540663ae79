"""The regulariser against the formula worked out by hand, one weight at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES, CLASSIFIERS
from flax import nnx

from l0jax import gates, gating, models, objectives
from l0jax.units import Group, Slot, arrays

GATE = gates.HardConcrete()
RNG = np.random.default_rng(0)
PARAMS = {
    "conv": {
        "kernel": jnp.float32(RNG.normal(size=(2, 2, 1, 3))),
        "bias": jnp.float32(RNG.normal(size=3)),
    },
    "dense": {
        "kernel": jnp.float32(RNG.normal(size=(6, 2))),
        "bias": jnp.float32(RNG.normal(size=2)),
    },
}
GROUPS = {
    "maps": Group(
        "maps",
        3,
        used_by=(Slot("dense.kernel", 0, (0, 1, 2, 0, 1, 2)),),
        made_by=(Slot("conv.kernel", 3), Slot("conv.bias", 0)),
    ),
    "features": Group("features", 6, (Slot("dense.kernel", 0),)),
}
# A map pays for its own filter and bias, a feature for the weights that read it.
CHARGES = {"maps": GROUPS["maps"].made_by, "features": GROUPS["features"].used_by}
LOGITS = {
    "maps": jnp.float32([-1.7, 0.4, 2.2]),
    "features": jnp.float32([0.1, -3.0, 1.0, 2.0, -0.5, -1.2]),
}
ACTIVE = gating.prob_active(GATE, LOGITS)


def by_hand(active, lam, examples, decay):
    """The formula of the module, weight by weight, in double precision."""
    p = {name: np.asarray(q, np.float64) for name, q in active.items()}
    conv, dense = (jax.tree.map(np.float64, PARAMS[name]) for name in ("conv", "dense"))
    total = 0.0
    for j in range(3):
        weights = [*conv["kernel"][:, :, :, j].ravel(), conv["bias"][j]]
        assert len(weights) == 5, "n weights and a bias"
        cost = lam["maps"] / examples * len(weights)
        total += p["maps"][j] * (cost + 0.5 * decay * np.square(weights).sum())
    for j in range(6):
        weights = dense["kernel"][j]
        cost = lam["features"] / examples * len(weights)
        total += p["features"][j] * (cost + 0.5 * decay * np.square(weights).sum())
    return total + 0.5 * decay * np.square(dense["bias"]).sum()


@pytest.mark.parametrize("decay", [0.0, 5e-4, 0.3])
@pytest.mark.parametrize("lam", [0.0, 0.1, {"maps": 10.0, "features": 0.5}])
@pytest.mark.parametrize("examples", [1, 60_000])
def test_penalty_is_the_formula(lam, decay, examples):
    objective = objectives.penalty(
        GROUPS, lam, examples, weight_decay=decay, charges=CHARGES
    )
    each = lam if isinstance(lam, dict) else dict.fromkeys(GROUPS, lam)
    found = jax.jit(objective)(PARAMS, ACTIVE)
    assert found.shape == ()
    expected = by_hand(ACTIVE, each, examples, decay)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_expected_l0_counts_each_weight_once():
    p = {name: np.asarray(q, np.float64) for name, q in ACTIVE.items()}
    for charges, per_map in ((CHARGES, 4 + 1), (None, 2 * 2)):
        found = objectives.expected_l0(PARAMS, ACTIVE, GROUPS, charges)
        closed = per_map * p["maps"].sum() + 2 * p["features"].sum()
        np.testing.assert_allclose(found, closed, rtol=1e-6)
    assert objectives.charges_of(GROUPS) == {
        name: group.used_by for name, group in GROUPS.items()
    }


def test_penalty_without_decay_is_expected_l0():
    objective = objectives.penalty(GROUPS, 0.7, 50, charges=CHARGES)
    l0 = objectives.expected_l0(PARAMS, ACTIVE, GROUPS, CHARGES)
    np.testing.assert_allclose(objective(PARAMS, ACTIVE), 0.7 / 50 * l0, rtol=1e-6)
    # By default a unit pays for what reads it, in both.
    default = objectives.penalty(GROUPS, 0.7, 50)(PARAMS, ACTIVE)
    l0 = objectives.expected_l0(PARAMS, ACTIVE, GROUPS)
    np.testing.assert_allclose(default, 0.7 / 50 * l0, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_gradient_in_the_logits_is_closed_form(decay):
    lam, examples = {"maps": 10.0, "features": 0.5}, 40
    objective = objectives.penalty(
        GROUPS, lam, examples, weight_decay=decay, charges=CHARGES
    )
    slopes = jax.grad(lambda a: objective(PARAMS, gating.prob_active(GATE, a)))(LOGITS)
    squares = {
        "maps": jnp.square(PARAMS["conv"]["kernel"]).sum((0, 1, 2))
        + jnp.square(PARAMS["conv"]["bias"]),
        "features": jnp.square(PARAMS["dense"]["kernel"]).sum(1),
    }
    for name, count in (("maps", 5), ("features", 2)):
        cost = lam[name] / examples * count + 0.5 * decay * squares[name]
        p = ACTIVE[name]
        np.testing.assert_allclose(slopes[name], p * (1 - p) * cost, rtol=1e-5)
        assert (slopes[name] > 0).all(), "the penalty closes gates"


def test_detached_decay_closes_no_gates():
    """The value and the gradient in the weights stay, that in the logits is λ's."""
    told = {"lam": 5.0, "examples": 40, "charges": CHARGES}
    attached = objectives.penalty(GROUPS, weight_decay=0.3, **told)
    detached = objectives.penalty(GROUPS, weight_decay=0.3, detached=True, **told)
    undecayed = objectives.penalty(GROUPS, **told)

    def of(objective):
        def value(params, logits):
            return objective(params, gating.prob_active(GATE, logits))

        return jax.value_and_grad(value, (0, 1))(PARAMS, LOGITS)

    (one, (weights, _)), (other, (same, logits)) = of(attached), of(detached)
    assert one == other
    jax.tree.map(np.testing.assert_array_equal, weights, same)
    jax.tree.map(np.testing.assert_array_equal, logits, of(undecayed)[1][1])


def test_factors_are_priced_with_the_weights_that_they_multiply():
    """Whatever a unit is charged for: a map pays for its filter, and its gate
    multiplies what reads it."""
    lam = {"maps": 10.0, "features": 0.5}
    objective = objectives.penalty(GROUPS, lam, 40, charges=CHARGES)
    found = objective(PARAMS, ACTIVE, 0.25) - objective(PARAMS, ACTIVE)
    squares = np.square(np.float64(PARAMS["dense"]["kernel"])).sum(1)
    # (Rows j and j + 3 are of map j; it is charged for 5 weights, a feature for 2.)
    expected = 0.25 / 40 * (10.0 * 5 * squares.sum() + 0.5 * 2 * squares.sum())
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_norms_count_by_what_is_there_where_the_price_is_no_probability():
    objective = objectives.penalty(GROUPS, 0.0, 1, weight_decay=0.3, charges=CHARGES)
    there = {name: jnp.ones(len(p)) for name, p in ACTIVE.items()}
    paid = {name: 7 * p for name, p in ACTIVE.items()}
    found = objective(PARAMS, paid, 0.0, there)
    np.testing.assert_allclose(found, objective(PARAMS, there), rtol=1e-6)
    assert abs(found - objective(PARAMS, paid)) > 0.1


def test_gradient_in_the_weights_is_decay_by_probability():
    decay = 0.3
    objective = objectives.penalty(GROUPS, 5.0, 40, weight_decay=decay, charges=CHARGES)
    slopes = jax.grad(objective)(PARAMS, ACTIVE)
    expected = {
        "conv": {
            "kernel": PARAMS["conv"]["kernel"] * ACTIVE["maps"][None, None, None],
            "bias": PARAMS["conv"]["bias"] * ACTIVE["maps"],
        },
        "dense": {
            "kernel": PARAMS["dense"]["kernel"] * ACTIVE["features"][:, None],
            "bias": PARAMS["dense"]["bias"],
        },
    }
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, decay * b, rtol=1e-5),
        slopes,
        expected,
    )


def test_penalty_of_single_weights():
    """Every weight a unit of its own: |g| = 1, and biases decay in full."""
    groups = {"dense.kernel": Group("w", 12, (Slot("dense.kernel", None),))}
    p = {"dense.kernel": jnp.linspace(0.1, 0.9, 12)}
    l0 = objectives.expected_l0(PARAMS, p, groups)
    np.testing.assert_allclose(l0, p["dense.kernel"].sum(), rtol=1e-6)
    found = objectives.penalty(groups, 2.0, 10, weight_decay=0.1)(PARAMS, p)
    norm = (jnp.square(PARAMS["dense"]["kernel"]).ravel() * p["dense.kernel"]).sum()
    for other in (PARAMS["dense"]["bias"], *PARAMS["conv"].values()):
        norm = norm + jnp.square(other).sum()
    np.testing.assert_allclose(found, 0.2 * l0 + 0.05 * norm, rtol=1e-5)


def test_positions_of_no_unit_decay_in_full():
    """A concatenation: rows that belong to no unit are there for certain."""
    groups = {"g": Group("g", 2, (Slot("w", 0, (0, 1, -1)),))}
    params = {"w": jnp.float32([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
    p = {"g": jnp.float32([0.5, 0.25])}
    found = objectives.penalty(groups, 0.0, 1, weight_decay=2.0)(params, p)
    np.testing.assert_allclose(found, 0.5 * 5 + 0.25 * 25 + 61, rtol=1e-6)


def test_every_model_is_charged_for_all_its_kernels():
    for name in CLASSIFIERS:
        model = models.make(name, ARCHITECTURES[name]["small"], rngs=nnx.Rngs(0))
        params = nnx.state(model, nnx.Param)
        groups = models.structure(model).groups
        charges = model.charges(groups)
        ones = {n: jnp.ones(g.size) for n, g in groups.items()}
        l0 = objectives.expected_l0(params, ones, groups, charges)
        charged = {slot.path for slots in charges.values() for slot in slots}
        sizes = {path: a.size for path, a in arrays(params).items()}
        assert l0 == sum(sizes[path] for path in charged)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lam": -0.1}, ["maps", "-0.1"]),
        ({"lam": {"maps": 0.1, "features": -2.0}}, ["features", "-2.0"]),
        ({"lam": float("nan")}, ["maps", "nan"]),
        ({"weight_decay": -1.0}, ["weight_decay", "-1.0"]),
        ({"examples": 0}, ["examples", "0"]),
        ({"examples": -5}, ["examples", "-5"]),
        ({"lam": {"maps": 0.1}}, ["lam", "maps", "features"]),
        ({"lam": {"heads": 0.1}}, ["lam", "heads", "maps, features"]),
        ({"lam": {}}, ["lam", "nothing", "maps, features"]),
    ],
)
def test_penalty_refuses_by_name(arguments, words):
    with pytest.raises(ValueError, match=r"\d|lam") as error:
        objectives.penalty(GROUPS, **{"lam": 0.1, "examples": 10, **arguments})
    for word in words:
        assert word in str(error.value)
