"""A law of derivatives: a narrowed function has those that its author gave it.

Functions with derivatives of their own, and those that are computed again rather than
remembered, are that at other sizes too: of units, and of batches.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l0jax import derivatives, units
from l0jax.narrow import narrow
from l0jax.tracing import trace


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        yield


# ------------------------------------------------------------ functions of their own


@jax.custom_jvp
def slope_of_one(h):
    return jnp.maximum(h, 0)


slope_of_one.defjvp(lambda given, moves: (slope_of_one(*given), moves[0]))


@jax.custom_jvp
def scaled(h, factor):
    return h * factor


scaled.defjvps(
    lambda move, out, h, factor: 3 * move * factor,
    lambda move, out, h, factor: (h * move) - move,
)


@jax.custom_vjp
def straight_through(h):
    return jnp.sign(h)


straight_through.defvjp(lambda h: (straight_through(h), None), lambda _, g: (g,))


@jax.custom_vjp
def reversed_gradient(h):
    return h


reversed_gradient.defvjp(lambda h: (h, None), lambda _, g: (-g,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clipped_gradient(h, bound):
    return jnp.sin(h)


clipped_gradient.defvjp(
    lambda h, bound: (jnp.sin(h), h),
    lambda bound, h, g: (jnp.clip(g * jnp.cos(h), -bound, bound),),
)


@jax.custom_vjp
def two_results(h, k):
    return h * k, h - k


def _two_results_back(remembered, cotangents):
    h, k = remembered
    g, d = cotangents
    return 2 * g * k + d, g * h - 5 * d


two_results.defvjp(lambda h, k: (two_results(h, k), (h, k)), _two_results_back)


@jax.custom_vjp
def contracted(h, w):
    return h @ w


contracted.defvjp(
    lambda h, w: (h @ w, (h, w)),
    lambda kept, g: (7 * g @ kept[1].T, kept[0].T @ g),
)


@jax.custom_jvp
def chosen(h, index):
    return jnp.where(index > 0, h, -h)


@chosen.defjvp
def _chosen_forward(given, moves):
    h, index = given
    return chosen(h, index), jnp.where(index > 0, 2 * moves[0], moves[0])


remembered_not = jax.checkpoint(lambda h: jnp.tanh(jnp.sin(h)))


@jax.custom_vjp
def around_another(h):
    return slope_of_one(h) + jax.nn.relu(h)


around_another.defvjp(
    lambda h: (around_another(h), h), lambda h, g: (g * jax.nn.softplus(h),)
)


OWN = {
    "forward": lambda p, h: slope_of_one(h) @ p["b"],
    "forward, of two": lambda p, h: scaled(h, p["c"]) @ p["b"],
    "straight through": lambda p, h: straight_through(h) @ p["b"],
    "reversed": lambda p, h: reversed_gradient(h) @ p["b"],
    "not differentiated by all": lambda p, h: clipped_gradient(h, 0.3) @ p["b"],
    "two results": lambda p, h: (
        (out := two_results(h, jnp.cos(h)))[0] @ p["b"] + out[1] @ p["b"]
    ),
    "a product": lambda p, h: contracted(jnp.tanh(h), p["b"]),
    "whole numbers beside": lambda p, h: (
        chosen(h, jnp.arange(len(h))[:, None] % 2) @ p["b"]
    ),
    "computed again": lambda p, h: remembered_not(h) @ p["b"],
    "around another": lambda p, h: around_another(h) @ p["b"],
    "relu at zero": lambda p, h: jax.nn.relu(h * 0) @ p["b"] + h @ p["b"],
    "in a loop": lambda p, h: (
        jax.lax.scan(lambda h, _: (reversed_gradient(jnp.sin(h)), None), h, None, 3)[0]
        @ p["b"]
    ),
    "in a branch": lambda p, h: (
        jax.lax.cond(h.shape[0] > 2, straight_through, jnp.cos, h) @ p["b"]
    ),
    "of a library": lambda p, h: jax.nn.gelu(jax.nn.silu(jax.nn.relu6(h))) @ p["b"],
    "a maximum of exponentials": lambda p, h: (
        (h - jax.nn.logsumexp(h, axis=1, keepdims=True)) @ p["b"]
    ),
}
SIZES = {"a": (3, 6), "b": (6, 2), "c": (6,)}
RNG = np.random.default_rng(0)
PARAMS = {name: RNG.normal(size=shape) for name, shape in SIZES.items()}
X = RNG.normal(size=(4, 3))
KEEP = np.array([True, False, True, True, False, True])


def network(name):
    def apply(p, x):
        return OWN[name](p, x @ p["a"])

    return apply


def case(name):
    apply = network(name)
    structure = trace(apply, PARAMS, X)
    (group,) = (n for n in structure.groups if n not in structure.inputs)
    keep = {group: KEEP}
    z = {group: jnp.asarray(KEEP, jnp.float64)}

    def masked(p, x):
        return apply(units.apply_gates(p, z, structure.groups), x)

    small, small_params = narrow(structure, PARAMS, keep)

    def left(tree):
        return units.shrink(tree, keep, structure.groups)

    return masked, small, small_params, left


def loss(function):
    return lambda p, x: jnp.square(function(p, x) - 0.3).sum()


def assert_same(found, expected):
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-9, rtol=1e-9)


@pytest.mark.sweep
@pytest.mark.parametrize("size", [4, 3, 1])
@pytest.mark.parametrize("name", OWN)
def test_gradients_are_those_of_the_gated_function(name, size):
    masked, small, params, left = case(name)
    np.testing.assert_allclose(
        small(params, X[:size]), masked(PARAMS, X[:size]), atol=1e-9
    )
    expected = jax.grad(loss(masked), (0, 1))(PARAMS, X[:size])
    found = jax.jit(jax.grad(loss(small), (0, 1)))(params, X[:size])
    assert_same(found[0], left(expected[0]))
    np.testing.assert_allclose(found[1], expected[1], atol=1e-9)


@pytest.mark.sweep
@pytest.mark.parametrize("name", OWN)
def test_second_derivatives_are_too(name):
    masked, small, params, left = case(name)
    direction = {n: RNG.normal(size=a.shape) for n, a in PARAMS.items()}

    def product(function, params, direction):
        by = jax.grad(lambda p: loss(function)(p, X))
        along = lambda p: sum((by(p)[n] * direction[n]).sum() for n in p)  # noqa: E731
        return jax.grad(along)(params)

    # (What goes is neither moved nor read.)
    closed = jax.tree.map(jnp.asarray, direction)
    expected = product(masked, PARAMS, closed)
    assert_same(product(small, params, left(closed)), left(expected))


def test_what_is_computed_again_is_so_at_other_sizes():
    _, small, params, _ = case("computed again")
    assert "remat" in str(jax.make_jaxpr(small)(params, X[:2]))


# What of a cotangent, zero at closed units, is no cotangent of the rest alone.
NEEDS_ALL = {
    "cumulative": lambda g: jnp.cumsum(g, axis=1),
    "of what closed units receive": lambda g: g + 1,
    "shared by all": lambda g: jnp.broadcast_to(
        jnp.cos(g).sum(1, keepdims=True), g.shape
    ),
}


@pytest.mark.parametrize("name", NEEDS_ALL)
def test_a_derivative_that_needs_all_units_keeps_them(name):
    @jax.custom_vjp
    def function(h):
        return jnp.tanh(h)

    function.defvjp(lambda h: (function(h), None), lambda _, g: (NEEDS_ALL[name](g),))
    structure = trace(lambda p, x: function(x @ p["a"]) @ p["b"], PARAMS, X)
    assert "a" in structure.frozen
    assert "a" not in structure.groups


def test_a_derivative_that_cannot_be_traced_is_refused_when_it_is_asked_for():
    @jax.custom_vjp
    def broken(h):
        return jnp.tanh(h)

    def forward(h):
        raise RuntimeError("there is none")

    broken.defvjp(forward, lambda _, g: (g,))
    structure = trace(lambda p, x: broken(x @ p["a"]) @ p["b"], PARAMS, X)
    small, params = narrow(structure, PARAMS, {"a": KEEP})
    assert np.isfinite(small(params, X)).all()
    with pytest.raises(ValueError, match="its derivative can't be traced: there is"):
        jax.grad(loss(small))(params, X)


# ------------------------------------------------------- which derivatives are the same


def with_jvp(factor):
    @jax.custom_jvp
    def function(x):
        return jnp.maximum(x, 0)

    function.defjvp(lambda given, moves: (function(given[0]), factor * moves[0]))
    return function


def with_jvps(factor):
    @jax.custom_jvp
    def function(x):
        return jnp.maximum(x, 0)

    function.defjvps(lambda move, out, x, factor=factor: factor * move)
    return function


def with_vjp(factor):
    @jax.custom_vjp
    def function(x):
        return jnp.maximum(x, 0)

    function.defvjp(lambda x: (function(x), None), lambda _, g: (factor * g,))
    return function


@pytest.mark.parametrize("make", [with_jvp, with_jvps, with_vjp])
def test_only_what_is_one_function_has_one_rule(make):
    one, other = make(1.0), make(2.0)
    jaxpr = jax.make_jaxpr(lambda x: other(one(one(x))))(X).jaxpr
    first, again, another = map(derivatives.rule_of, jaxpr.eqns)
    assert first is not None
    assert first == again
    assert first != another


def test_functions_that_differ_in_their_rules_alone_stay_apart():
    def apply(p, x):
        h = x @ p["a"]
        return with_vjp(1.0)(h) @ p["b"] + with_vjp(-2.0)(h) @ p["b"]

    structure = trace(apply, PARAMS, X)
    keep = {"a": KEEP}
    z = {"a": jnp.asarray(KEEP, jnp.float64)}
    masked = lambda p, x: apply(units.apply_gates(p, z, structure.groups), x)  # noqa: E731
    small, params = narrow(structure, PARAMS, keep)
    expected = jax.grad(loss(masked))(PARAMS, X)
    assert_same(
        jax.grad(loss(small))(params, X),
        units.shrink(expected, keep, structure.groups),
    )
