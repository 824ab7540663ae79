"""Laws of sizes that may vary: a narrowed function is the traced one at any batch.

Python code may compute with the number of examples. What is traced then holds a number
that nothing ties to the batch; so functions are read again for other sizes.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from l0jax import costs, storage, units
from l0jax.narrow import narrow
from l0jax.tracing import trace


@pytest.fixture(autouse=True)
def any_rank():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def hidden(p, x):
    return jnp.tanh(x @ p["a"])


# Functions that know how many examples there are, in what they compute or by shapes.
KNOWING = {
    "a mean by hand": lambda p, x: (hidden(p, x) @ p["b"]).sum(0) / x.shape[0],
    "a share of the batch": lambda p, x: hidden(p, x) @ p["b"] / x.shape[0],
    "a counted batch": lambda p, x: jnp.arange(len(x)) * (hidden(p, x) @ p["b"])[:, 0],
    "the last half": lambda p, x: (hidden(p, x) @ p["b"])[len(x) // 2 :],
    "a token for each": lambda p, x: (
        jnp.concatenate([jnp.tile(p["token"], (x.shape[0], 1)), hidden(p, x)], 1)
        @ p["c"]
    ),
    "filled": lambda p, x: (hidden(p, x) + jnp.full((x.shape[0], 6), 2.0)) @ p["b"],
    "flattened": lambda p, x: (
        (
            (x[:, None] * jnp.ones((1, 2, 1))).reshape(x.shape[0] * 2, 3) @ p["a"]
        ).reshape(x.shape[0], 12)
        @ p["twice"]
    ),
    "over the batch": lambda p, x: jax.nn.softmax(hidden(p, x) @ p["b"], axis=0),
    "by position": lambda p, x: hidden(p, x)[jnp.arange(len(x))[::-1]] @ p["b"],
    "a power of the number": lambda p, x: (hidden(p, x) @ p["b"]) ** (len(x) % 3 + 1),
    "a loop over examples": lambda p, x: jax.lax.map(
        lambda row: hidden(p, row) @ p["b"], x
    ),
    "a loop in Python": lambda p, x: jnp.stack([hidden(p, row) @ p["b"] for row in x]),
}
SIZES = {"a": (3, 6), "b": (6, 2), "c": (8, 2), "token": (1, 2), "twice": (12, 2)}
RNG = np.random.default_rng(0)
PARAMS = {n: jnp.float32(RNG.normal(size=shape)) for n, shape in SIZES.items()}
KEEP = np.array([True, False, True, True, False, True])


def inputs(size):
    return jnp.float32(np.random.default_rng(size).normal(size=(size, 3)))


def of_hidden(structure):
    found = {
        group.name: None
        for group in structure.groups.values()
        for slot in group.slots
        if (slot.path, slot.axis) == ("a", 1)
    }
    return max(found, key=lambda name: structure.groups[name].size)


@pytest.mark.sweep
@pytest.mark.parametrize("traced", [4, 1])
@pytest.mark.parametrize("name", KNOWING)
def test_any_batch_gives_what_the_function_gives(name, traced):
    structure = trace(KNOWING[name], PARAMS, inputs(traced))
    keep = {of_hidden(structure): KEEP}
    z = {n: jnp.float32(flags) for n, flags in keep.items()}
    closed = units.apply_gates(PARAMS, z, structure.groups)
    small, params = narrow(structure, PARAMS, keep)
    for size in (4, 1, 7):
        np.testing.assert_allclose(
            small(params, inputs(size)),
            KNOWING[name](closed, inputs(size)),
            rtol=1e-4,
            atol=1e-5,
        )


APART = ("a share of the batch", "a token for each", "filled", "flattened")


def rotated(p, x):
    """Halves of the units are turned by an angle for each position."""
    h = hidden(p, x)
    a, b = h[:, :3], h[:, 3:]
    turned = jnp.concatenate([a * 0.6 - b * 0.8, b * 0.6 + a * 0.8], 1)
    return turned @ p["b"]


FOR_ANY = {
    **{name: KNOWING[name] for name in APART},
    "a mean by hand": KNOWING["a mean by hand"],
    "over the batch": KNOWING["over the batch"],
    "halves": rotated,
    "slices": lambda p, x: hidden(p, x)[:, 1:5] @ p["b"][1:5],
    "a norm": lambda p, x: jax.nn.standardize(hidden(p, x)) @ p["b"],
    "merged": lambda p, x: (
        (hidden(p, x)[:, :, None] * jnp.ones((1, 1, 2))).reshape(x.shape[0], 12)
        @ p["twice"]
    ),
    "a scan": lambda p, x: (
        jax.lax.scan(
            lambda h, row: (h + jnp.tanh(row @ p["a"]), None), jnp.zeros(6), x
        )[0]
        @ p["b"]
    ),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", FOR_ANY)
def test_narrowed_functions_are_exported_for_any_batch(name):
    """Sizes are then symbols, and slices are traced as gathers."""
    function = FOR_ANY[name]
    structure = trace(function, PARAMS, inputs(4))
    group = of_hidden(structure)
    flags = np.arange(structure.groups[group].size) != 1
    keep = {group: flags}
    z = {group: jnp.float32(flags)}
    closed = units.apply_gates(PARAMS, z, structure.groups)
    small, params = narrow(structure, PARAMS, keep)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 3), jnp.float32)
    exported = jax.export.export(jax.jit(small))(params, shape)
    for size in (4, 2, 9):
        np.testing.assert_allclose(
            exported.call(params, inputs(size)),
            function(closed, inputs(size)),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("name", APART)
def test_costs_are_those_of_one_example_where_these_are_apart(name):
    found = {
        size: costs.exact(trace(KNOWING[name], PARAMS, inputs(size)))
        for size in (1, 4, 6)
    }
    assert len(set(found.values())) == 1


def test_costs_of_examples_that_are_not_apart_are_of_the_whole_batch_and_say_so():
    def distances(p, x):
        h = hidden(p, x)
        return h @ h.T

    structure = trace(distances, PARAMS, inputs(4))
    assert not structure.per_example
    assert costs.exact(structure) == 4 * 3 * 6 + 4 * 4 * 6
    assert "of all 4 examples together" in str(structure)
    assert "examples together" not in str(trace(KNOWING["filled"], PARAMS, inputs(4)))


def test_a_batch_for_which_units_are_others_is_refused_with_its_reason():
    def apply(p, x):
        h = hidden(p, x)
        return (jnp.cumsum(h, axis=1) if len(x) == 3 else h) @ p["b"]

    structure = trace(apply, PARAMS, inputs(4))
    small, params = narrow(structure, PARAMS, {of_hidden(structure): KEEP})
    small(params, inputs(5))
    with pytest.raises(
        ValueError, match=r"units of group '\w+' can't be removed: cums"
    ):
        small(params, inputs(3))


def attention(p, x, mask):
    """Of texts of any length, whose words may be masked."""
    h = jnp.tanh(x @ p["a"])
    scores = jnp.where(mask[:, None], h @ h.swapaxes(1, 2), -1e9)
    return jax.nn.softmax(scores) @ h @ p["b"]


def texts(size, length):
    rng = np.random.default_rng(size)
    x = jnp.float32(rng.normal(size=(size, length, 3)))
    return x, jnp.asarray(rng.random((size, length)) < 0.8)


def smaller_attention():
    structure = trace(attention, PARAMS, *texts(2, 5))
    name = of_hidden(structure)
    z = {name: jnp.float32(KEEP)}
    closed = units.apply_gates(PARAMS, z, structure.groups)
    return closed, *narrow(structure, closed, {name: KEEP})


def test_other_sizes_than_the_batch_may_vary(tmp_path):
    closed, small, params = smaller_attention()
    storage.save_function(
        small, params, *texts(2, 5), folder=tmp_path, dynamic={"tokens": 1}
    )
    loaded = storage.load(tmp_path)
    for size, length in ((2, 5), (1, 9), (7, 2)):
        given = texts(size, length)
        np.testing.assert_allclose(
            loaded(*given), attention(closed, *given), rtol=1e-4, atol=1e-5
        )


def test_a_size_may_be_one_of_some_inputs_alone(tmp_path):
    def function(p, x, each):
        return x @ p["a"] * each

    each = jnp.ones(6)
    storage.save_function(
        function,
        PARAMS,
        texts(2, 5)[0],
        each,
        folder=tmp_path,
        batch=(0, None),
        dynamic={"tokens": (1, None)},
    )
    assert storage.load(tmp_path)(texts(3, 8)[0], each).shape == (3, 8, 6)


WRONG = {
    "an axis that is not there": ({"tokens": 2}, r"tokens: inputs\[1\] .* no axis 2"),
    "sizes that differ": ({"tokens": (1, 0)}, "the tokens differs: .* 5 .* 2 "),
    "an axis with two names": ({"tokens": (0, None)}, "is 'batch' and 'tokens'"),
    "too many entries": ({"tokens": (1, 1, 1)}, "does not fit 2 inputs"),
    "a name that is none": ({"2 words": 1}, "can't be the name of a size"),
    "the batch's own name": ({"batch": 1}, "can't be the name of a size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_axes_that_can_not_vary_are_refused(name, tmp_path):
    dynamic, said = WRONG[name]
    _, small, params = smaller_attention()
    with pytest.raises(ValueError, match=said):
        storage.save_function(
            small, params, *texts(2, 5), folder=tmp_path / "net", dynamic=dynamic
        )
    assert not (tmp_path / "net").exists()


# ------------------------------------------------------- gates and dtypes of parameters

FLOATS = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64")
EXACT = ("int8", "int32", "uint8", "int4", "uint16", "bool")


def typed(dtype):
    values = np.random.default_rng(1).integers(0, 2, size=(6, 2))
    return jnp.asarray(values).astype(jnp.dtype(getattr(ml_dtypes, dtype, dtype)))


def reads(p, x):
    """The second kernel may be of any dtype."""
    kernel = p["b"].astype(jnp.complex64 if "c" in p else jnp.float32)
    return hidden(p, x) @ kernel


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [*FLOATS, *EXACT])
def test_a_gate_acts_on_what_it_gates_whatever_the_dtype(dtype):
    """A soft gate scales; what it can't scale is not gated."""
    params = {"a": PARAMS["a"], "b": typed(dtype)}
    if dtype.startswith("complex"):
        params["c"] = jnp.ones(())
    structure = trace(reads, params, inputs(4))
    gated = {slot.path for g in structure.groups.values() for slot in g.used_by}
    assert ("b" in gated) == (dtype in FLOATS)
    if dtype in EXACT:
        # tanh keeps zeros, so that gates before it do; and nothing is cut to a half.
        name = of_hidden(structure)
        assert {slot.path for slot in structure.groups[name].used_by} == {"a"}
        return
    name = of_hidden(structure)
    z = {name: jnp.full(6, 0.5, jnp.float32)}
    half = units.apply_gates(params, z, structure.groups)
    assert half["b"].dtype == params["b"].dtype
    whole = reads(params, inputs(4))
    np.testing.assert_allclose(reads(half, inputs(4)), whole / 2, rtol=1e-5)


def test_whole_numbers_that_nothing_else_can_gate_say_so():
    params = {"a": PARAMS["a"], "b": typed("int8")}
    structure = trace(
        lambda p, x: jnp.cos(x @ p["a"]) @ p["b"].astype(jnp.float32), params, inputs(4)
    )
    assert "reads 'b' of int8, that a gate can't scale" in structure.frozen["a"].why
