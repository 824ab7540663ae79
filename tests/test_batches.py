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


NODES, EDGES = 4, 7
ENDS = np.random.default_rng(1).integers(0, NODES, (2, EDGES))
SOURCE, TARGET = jnp.asarray(ENDS)
ORDER = jnp.asarray([2, 0, 3, 1])


def send(h, source=SOURCE):
    """To each node the sum of what its neighbours hold."""
    return jax.ops.segment_sum(h[source], TARGET, num_segments=NODES)


def by_order(p, x, order):
    """(The order is an input of as many numbers as there are examples.)"""
    return hidden(p, x)[order] @ p["b"]


# What is done to examples between the layers, and how many the second layer gets.
TOGETHER = {
    "neighbours by constants": (lambda p, x: send(hidden(p, x)) @ p["b"], 4),
    "neighbours by an input": (lambda p, x, s: send(hidden(p, x), s) @ p["b"], 4),
    "edges": (lambda p, x: hidden(p, x)[SOURCE] @ p["b"], 7),
    "edges by an input": (lambda p, x, s: hidden(p, x)[s] @ p["b"], 7),
    "added to neighbours": (
        lambda p, x: (send(x) + hidden(p, x) @ p["c6"]) @ p["d"],
        4,
    ),
    "summed by segments": (
        lambda p, x: jax.ops.segment_sum(hidden(p, x), ORDER, num_segments=9) @ p["b"],
        9,
    ),
    "an order": (lambda p, x: hidden(p, x)[ORDER] @ p["b"], 4),
    "an order of an input": (by_order, 4),
    "some": (lambda p, x: hidden(p, x)[jnp.array([3, 0])] @ p["b"], 2),
    "the first by indices": (lambda p, x: hidden(p, x)[jnp.arange(3)] @ p["b"], 3),
    "taken": (lambda p, x: jnp.take(hidden(p, x), ORDER, axis=0) @ p["b"], 4),
    "sorted": (lambda p, x: jnp.sort(hidden(p, x), 0) @ p["b"], 4),
    "the largest": (lambda p, x: jax.lax.top_k(hidden(p, x).T, 3)[0].T @ p["b"], 3),
    "reversed": (lambda p, x: hidden(p, x)[::-1] @ p["b"], 4),
    "rolled": (lambda p, x: jnp.roll(hidden(p, x), 1, 0) @ p["b"], 4),
    "cut": (lambda p, x: hidden(p, x)[:3] @ p["b"], 3),
    "every second": (lambda p, x: hidden(p, x)[::2] @ p["b"], 2),
    "cut where a number says": (
        lambda p, x: jax.lax.dynamic_slice_in_dim(hidden(p, x), p["at"], 3) @ p["b"],
        3,
    ),
    "padded": (lambda p, x: jnp.pad(hidden(p, x), ((0, 1), (0, 0))) @ p["b"], 5),
    "padded between": (
        lambda p, x: jax.lax.pad(hidden(p, x), 0.0, [(0, 0, 1), (0, 0, 0)]) @ p["b"],
        7,
    ),
    "padded and moved": (
        lambda p, x: jnp.pad(hidden(p, x), ((1, 0), (0, 0)))[:-1] @ p["b"],
        4,
    ),
    "with a token": (
        lambda p, x: jnp.concatenate([hidden(p, x), p["row"]]) @ p["b"],
        5,
    ),
    "twice": (lambda p, x: jnp.concatenate([hidden(p, x)] * 2) @ p["b"], 8),
    "put among zeros": (
        lambda p, x: jnp.zeros((9, 6)).at[:4].set(hidden(p, x)) @ p["b"],
        9,
    ),
    "put in an order": (
        lambda p, x: jnp.zeros((4, 6)).at[ORDER].set(hidden(p, x)) @ p["b"],
        4,
    ),
    "summed up": (lambda p, x: jnp.cumsum(hidden(p, x), 0) @ p["b"], 4),
    "summed": (lambda p, x: hidden(p, x).sum(0, keepdims=True) @ p["b"], 1),
    "without their mean": (
        lambda p, x: (lambda h: (h - h.mean(0)) @ p["b"])(hidden(p, x)),
        4,
    ),
    "smoothed": (
        lambda p, x: (
            jax.lax.reduce_window(
                hidden(p, x), 0.0, jax.lax.add, (2, 1), (1, 1), "VALID"
            )
            @ p["b"]
        ),
        3,
    ),
}
# Each example with each: of every one of 4 x 4 pairs.
PAIRS = {
    "pairs": lambda p, x: (lambda h: (h[None] - h[:, None]) @ p["b"])(hidden(p, x)),
    "pairs in a row": lambda p, x: (
        lambda h: (h[None] - h[:, None]).reshape(16, 6) @ p["b"]
    )(hidden(p, x)),
}
WITH = {
    "neighbours by an input": SOURCE,
    "edges by an input": SOURCE,
    "an order of an input": ORDER,
}
MORE = {
    **PARAMS,
    "c6": jnp.ones((6, 3)),
    "d": jnp.ones((3, 2)),
    "row": jnp.ones((1, 6)),
    "at": jnp.ones((), int),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_examples_that_are_moved_or_mixed_are_counted_in_whole(name):
    function, many = TOGETHER[name]
    more = [WITH[name]] if name in WITH else []
    structure = trace(function, MORE, inputs(4), *more)
    assert not structure.per_example
    after = 4 * 6 * 3 + many * 3 * 2 if name == "added to neighbours" else many * 6 * 2
    assert costs.exact(structure) == 4 * 3 * 6 + after


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_examples_are_counted_in_whole(name):
    structure = trace(PAIRS[name], PARAMS, inputs(4))
    assert not structure.per_example
    assert costs.exact(structure) == 4 * 3 * 6 + 4 * 4 * 6 * 2


def test_pairs_of_two_inputs_are_counted_in_whole():
    """As images and their captions are compared."""
    structure = trace(
        lambda p, x, y: hidden(p, x) @ hidden(p, y).T, PARAMS, inputs(4), inputs(4)
    )
    assert not structure.per_example
    assert costs.exact(structure) == 2 * 4 * 3 * 6 + 4 * 4 * 6


def test_a_target_is_met_on_a_graph():
    """What two layers cost is of all nodes in both."""
    structure = trace(lambda p, x: send(hidden(p, x)) @ p["b"], PARAMS, inputs(4))
    left = costs.exact(structure, {of_hidden(structure): KEEP})
    assert left == 4 * (3 * 4 + 4 * 2)


TOKENS = jnp.asarray(np.random.default_rng(2).integers(0, 6, (4, 5)))


def looked_up(p, tokens):
    return p["table"][tokens]


def attending(p, tokens):
    h = looked_up(p, tokens) @ p["a"]
    return jax.nn.softmax(h @ h.swapaxes(1, 2)) @ h @ p["b"]


def cached(p, tokens):
    """Keys of the words are put where a longer memory has place for them."""
    keys = looked_up(p, tokens) @ p["a"]
    memory = jnp.zeros((tokens.shape[0], 8, 6)).at[:, 1:6].set(keys)
    return jax.lax.dynamic_update_slice(memory, keys, (0, 2, 0)) @ p["b"]


def cached_by_index(p, tokens):
    """Of each example a word, at a place of its own."""
    keys = looked_up(p, tokens[:, 0]) @ p["a"]
    rows = jnp.arange(tokens.shape[0])
    memory = jnp.zeros((tokens.shape[0], 8, 6)).at[rows, tokens[:, 1]].set(keys)
    return memory @ p["b"]


ALONE = {
    "an embedding": (lambda p, t: looked_up(p, t) @ p["a"] @ p["b"], 5 * (18 + 12)),
    "one-hot": (lambda p, t: jax.nn.one_hot(t, 7) @ p["table"] @ p["a"], 5 * (21 + 18)),
    "one-hot by hand": (
        lambda p, t: (
            jnp.zeros((t.shape[0], 7)).at[jnp.arange(len(t)), t[:, 0]].set(1.0)
            @ p["table"]
        ),
        7 * 3,
    ),
    "a number of each": (
        lambda p, t: (
            (looked_up(p, t) @ p["a"])[jnp.arange(len(t)), t[:, 1] % 5] @ p["b"]
        ),
        5 * 18 + 12,
    ),
    "a number of each by NumPy": (
        lambda p, t: (
            (looked_up(p, t) @ p["a"])[np.arange(len(t)), t[:, 1] % 5] @ p["b"]
        ),
        5 * 18 + 12,
    ),
    "a number of each place": (
        lambda p, t: (
            (looked_up(p, t) @ p["a"])[
                jnp.arange(len(t))[:, None], jnp.arange(5)[None], t
            ]
            @ p["five"]
        ),
        5 * 18 + 5 * 2,
    ),
    "all of them by index": (
        lambda p, t: (looked_up(p, t[:, 0]) @ p["a"])[jnp.arange(len(t))] @ p["b"],
        18 + 12,
    ),
    "along an axis": (
        lambda p, t: (
            jnp.take_along_axis(looked_up(p, t) @ p["a"], t[:, :2, None] % 5, 1)
            @ p["b"]
        ),
        5 * 18 + 2 * 12,
    ),
    "of each by vmap": (
        lambda p, t: (
            jax.vmap(lambda h, at: h[at])(looked_up(p, t) @ p["a"], t[:, 1] % 5)
            @ p["b"]
        ),
        5 * 18 + 12,
    ),
    "attention": (attending, 5 * 18 + 2 * 5 * 5 * 6 + 5 * 12),
    "positions": (
        lambda p, t: (looked_up(p, t) + p["positions"][: t.shape[1]]) @ p["a"],
        5 * 18,
    ),
    "positions by index": (
        lambda p, t: (
            (looked_up(p, t) + p["positions"][jnp.arange(t.shape[1])]) @ p["a"]
        ),
        5 * 18,
    ),
    "moved along the words": (
        lambda p, t: jnp.roll(looked_up(p, t), 1, axis=1) @ p["a"],
        5 * 18,
    ),
    "padded along the words": (
        lambda p, t: jnp.pad(looked_up(p, t), ((0, 0), (1, 0), (0, 0))) @ p["a"],
        6 * 18,
    ),
    "a memory": (cached, 5 * 18 + 8 * 12),
    "a memory by index": (cached_by_index, 18 + 8 * 12),
    "several of each": (
        lambda p, t: jnp.repeat(looked_up(p, t[:, 0]), 2, axis=0) @ p["a"],
        2 * 18,
    ),
}
OF_WORDS = {
    "table": jnp.ones((7, 3)),
    "positions": jnp.ones((9, 3)),
    "a": PARAMS["a"],
    "b": PARAMS["b"],
    "five": jnp.ones((5, 2)),
}


@pytest.mark.parametrize("name", ALONE)
def test_examples_that_are_indexed_apart_are_counted_alone(name):
    function, macs = ALONE[name]
    structure = trace(function, OF_WORDS, TOKENS)
    assert structure.per_example
    assert costs.exact(structure) == macs


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
