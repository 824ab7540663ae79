"""What `l0jax.nnx.shrink` returns is the gated function, or it is refused.

Over code that computes more from sizes than shapes: numbers, tables, masks, slices,
branches.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import l0jax
from l0jax import units
from l0jax.equivalence import difference
from l0jax.terms import Terms
from l0jax.units import Group, Slot

pytestmark = pytest.mark.usefixtures("any_rank")


@pytest.fixture
def any_rank():
    """Flax's own layers add vectors to matrices."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class Between(nnx.Module):
    """A function of the eight units between two dense layers."""

    def __init__(self, function, left, rngs):
        self.one = nnx.Linear(3, 8, rngs=rngs)
        self.two = nnx.Linear(left, 2, rngs=rngs)
        self.function = nnx.static(function)

    def __call__(self, x):
        return self.two(self.function(self.one(x)))


class Attention(nnx.Module):
    """Self-attention of which `positions` changes queries and keys, or scores."""

    def __init__(self, rngs, rotate=None, bias=None, scale=0.35):
        def make():
            return nnx.LinearGeneral(6, (4, 8), use_bias=False, rngs=rngs)

        self.q, self.k, self.v = make(), make(), make()
        self.o = nnx.LinearGeneral((4, 8), 3, axis=(-2, -1), rngs=rngs)
        self.rotate, self.bias = nnx.static(rotate), nnx.static(bias)
        self.scale = nnx.static(scale)

    def __call__(self, x):
        q, k = self.q(x), self.k(x)
        if self.rotate is not None:
            q, k = self.rotate(q), self.rotate(k)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        scores *= self.scale or q.shape[-1] ** -0.5
        if self.bias is not None:
            scores += self.bias(scores)
        mask = np.tril(np.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        return self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, self.v(x)))


def rotary(library):
    def rotate(x):
        positions, size = x.shape[1], x.shape[-1]
        rates = 100.0 ** (-library.arange(0, size, 2) / size)
        angles = library.outer(library.arange(positions), rates)
        cos, sin = (
            jnp.asarray(f(angles), jnp.float32)[None, :, None]
            for f in (library.cos, library.sin)
        )
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    return rotate


def alibi(scores):
    heads, positions = scores.shape[1:3]
    slopes = 2.0 ** (-8 * (np.arange(heads) + 1) / heads)
    apart = np.abs(np.subtract.outer(np.arange(positions), np.arange(positions)))
    return -np.float32(slopes[:, None, None] * apart)


def sinusoidal(x):
    positions, size = x.shape[-2:]
    rates = 100.0 ** (-np.arange(size) / size)
    return x + np.float32(np.sin(np.outer(np.arange(positions), rates)))


def threshold(x):
    """Nothing that is drawn at random reaches it."""
    return jnp.clip(x, -1e4 * x.shape[-1], 1e4 * x.shape[-1])


def branch(x):
    return jnp.tanh(x) if x.shape[-1] > 7 else x


def loop(x):
    return jax.lax.fori_loop(0, x.shape[-1], lambda _, y: 0.9 * y, x)


SIZES = {
    "scale": lambda x: x * x.shape[-1] ** -0.5,
    "mean": lambda x: x - x.sum(-1, keepdims=True) / x.shape[-1],
    "power": lambda x: jnp.abs(x) ** (x.shape[-1] / 4),
    "whole power": lambda x: jax.lax.integer_pow(x, x.shape[-1] - 5),
    "shift": lambda x: jnp.sqrt(jnp.abs(x) + 1e-12 * x.shape[-1]),
    "added": lambda x: x + 0.1 * np.float32(np.arange(x.shape[-1]) ** 2),
    "table": sinusoidal,
    "half": lambda x: x[..., : x.shape[-1] // 2],
    "gated half": lambda x: jnp.prod(jnp.stack(jnp.split(x, 2, -1)), 0),
    "mask": lambda x: x * (np.arange(x.shape[-1]) % 3 > 0),
    "first": lambda x: jnp.where(jnp.arange(x.shape[-1]) < x.shape[-1] // 2, x, -x),
    "stride": lambda x: x[..., :: max(1, x.shape[-1] // 4)],
    "threshold": threshold,
    "branch": branch,
    "turns": loop,
    "reshape": lambda x: x.reshape(*x.shape[:-1], -1, 4).sum(-2),
    "key": lambda x: x + jax.random.normal(jax.random.key(0), x.shape[-1:]),
}
SAME = {
    "nothing": lambda x: jax.nn.gelu(x),
    "equal by chance": lambda x: x / max(1, x.shape[-1] // 16),
    "as large": lambda x: x + jnp.zeros(x.shape[-1]),
    "order": lambda x: 2 * x[..., ::-1],
    "inner call": lambda x: jax.jit(jax.nn.relu6)(x),
    "scan": lambda x: jax.lax.scan(lambda c, _: (0.5 * c + x, None), x, length=3)[0],
    "branches": lambda x: jax.lax.cond(x.sum() > 0, jnp.tanh, jnp.sin, x),
    "while": lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y), x),
}
MODULES = {
    **{
        name: lambda rngs, f=f: Between(
            f, jax.eval_shape(f, jnp.ones((5, 8))).shape[-1], rngs
        )
        for name, f in {**SIZES, **SAME}.items()
    },
    "rotary, NumPy": lambda rngs: Attention(rngs, rotary(np)),
    "rotary, JAX": lambda rngs: Attention(rngs, rotary(jnp)),
    "alibi": lambda rngs: Attention(rngs, bias=alibi),
    "attention": lambda rngs: Attention(rngs),
    "scale of heads": lambda rngs: Attention(rngs, scale=None),
}
EXAMPLE = {3: np.float32(np.random.default_rng(0).normal(size=(2, 5, 3)))}
EXAMPLE[6] = np.float32(np.random.default_rng(0).normal(size=(2, 5, 6)))


def made(name):
    module = MODULES[name](nnx.Rngs(0))
    return module, EXAMPLE[6 if isinstance(module, Attention) else 3]


def keeps(structure):
    """Of each group alone, and of all of them: the first half, the last, one, some."""
    groups = {n: g for n, g in structure.groups.items() if n not in structure.inputs}
    for choose in (
        lambda at, size: at < max(size // 2, 1),
        lambda at, size: at >= size // 2,
        lambda at, size: at == size - 1,
        lambda at, size: at % 3 != 1,
    ):
        every = {n: choose(np.arange(g.size), g.size) for n, g in groups.items()}
        yield from ({name: flags} for name, flags in every.items())
        yield every


def shrunk(module, keep, structure, x):
    """Outputs of the smaller module, and of the gated one; the first is None if it was
    refused."""
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    folded = l0jax.nnx.fold(module, z, structure.groups)
    expected = folded(x)
    try:
        small = l0jax.nnx.shrink(folded, keep, structure)
    except ValueError:
        return None, expected
    return small(x), expected


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODULES)
def test_a_smaller_module_is_the_gated_one_or_refused(name):
    module, x = made(name)
    structure = l0jax.trace(module, x)
    refused = 0
    for keep in keeps(structure):
        found, expected = shrunk(module, keep, structure, x)
        refused += found is None
        if found is not None:
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    if name in SAME or name == "attention":
        assert structure.groups
        assert not refused


NAMED = {
    "scale": "mul(0.5",
    "shift": "add(4e-12",
    "threshold": "max(-40000.0)",
    "branch": "tanh",
    "rotary, NumPy": "rotate",
    "scale of heads": "mul(0.5",
}


@pytest.mark.parametrize("name", NAMED)
def test_a_refusal_names_the_line(name):
    module, x = made(name)
    structure = l0jax.trace(module, x)
    group = next(n for n in structure.groups if n in ("one", "q", "k"))
    size = structure.groups[group].size
    keep = {group: np.arange(size) < size // 2}
    with pytest.raises(ValueError, match="is another function") as error:
        l0jax.nnx.shrink(module, keep, structure)
    # A line that is not there when arrays are smaller has no place.
    assert name == "branch" or "test_equivalence.py:" in str(error.value)
    assert NAMED[name] in str(error.value)


def compared(function, params, small=None, shape=(3, 2), **changes):
    """`difference` for a function that removes nothing, and another one."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    structure = l0jax.trace(function, params, x)
    return difference(structure, {}, function, params, small or function, **changes)


WEIGHTS = {"w": np.float32(np.random.default_rng(1).normal(size=(2, 2)))}
OTHERS = {
    "small shift": (lambda p, x: x @ p["w"] + 1e-7, "1e-07"),
    "large threshold": (lambda p, x: jnp.minimum(x @ p["w"], 1e7), "min"),
    "scale": (lambda p, x: 1.01 * (x @ p["w"]), "mul"),
    "dtype": (lambda p, x: (x @ p["w"]).astype(jnp.bfloat16), "bfloat16"),
    "order": (lambda p, x: (x @ p["w"])[:, ::-1], "off by"),
    "transposed": (lambda p, x: x @ p["w"].T, "off by"),
    "one row": (lambda p, x: (x @ p["w"]).at[0, 0].set((p["w"] @ p["w"])[0, 0]), "off"),
    "not finite": (lambda p, x: jnp.log(x @ p["w"]), "finite"),
    "fails": (lambda p, x: 1 // 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_function_is_told_apart(name):
    function, word = OTHERS[name]
    found = compared(lambda p, x: x @ p["w"], WEIGHTS, function)
    assert found is not None
    assert word in found


def test_huge_outputs_do_not_hide_what_the_others_do():
    def masked(w, x):
        return (x @ w).at[0].set(-1e9)

    one, other = (
        lambda p, x: masked(p["w"], x),
        lambda p, x: masked(p["w"].T, x),
    )
    assert "off by" in compared(one, WEIGHTS, other)


ALIKE = {
    "transposed": lambda p, x: (p["w"].T @ x.T).T,
    "einsum": lambda p, x: jnp.einsum("ij,bi->bj", p["w"], x),
    "a call": lambda p, x: jax.jit(lambda w, x: x @ w)(p["w"], x),
    "dead code": lambda p, x: (jnp.sin(x), x @ p["w"])[1],
}


@pytest.mark.parametrize("name", ALIKE)
def test_code_that_computes_the_same_is_the_same(name):
    assert compared(lambda p, x: x @ p["w"], WEIGHTS, ALIKE[name]) is None


def test_numbers_are_excused_where_values_show_them():
    def function(p, x):
        return x @ p["w"] / 4.0

    def other(p, x):
        return x @ p["w"] * 0.25

    def wrong(p, x):
        return x @ p["w"] * 0.26

    assert "mul(0.25)" in compared(function, WEIGHTS, other)
    assert compared(function, WEIGHTS, other, excused=(4.0, 0.25)) is None
    found = compared(function, WEIGHTS, wrong, excused=(4.0, 0.26))
    assert "off by 2" in found


@pytest.mark.parametrize("constant", [0.0, np.nan])
def test_values_that_show_nothing_prove_nothing(constant):
    def function(p, x):
        return jnp.full_like(x, constant) * (x @ p["w"])

    def other(p, x):
        return (x @ p["w"]) * jnp.full_like(x, constant)

    found = compared(function, WEIGHTS, other)
    assert "can't be compared" in found


def test_tables_are_compared_entry_by_entry():
    table = np.arange(200.0, dtype=np.float32)
    other = table.copy()
    other[150] += 1

    def adds(values):
        return lambda p, x: x * p["w"] + values

    params = {"w": np.ones(200, np.float32)}
    same = compared(adds(table), params, adds(jnp.arange(200.0)), (3, 200))
    assert same is None
    assert compared(adds(table), params, adds(other), (3, 200)) is not None


def test_groups_by_hand_are_compared_with_gates_that_are_closed():
    """No program is narrowed along them."""
    module = Between(jnp.tanh, 8, nnx.Rngs(0))
    x = EXAMPLE[3]
    used = (Slot("two.kernel", 0),)
    made = (Slot("one.kernel", 1), Slot("one.bias", 0))
    structure = l0jax.trace(module, x, frozen=["one"])
    keep = {"mine": np.arange(8) > 2}
    right = structure.add(Group("mine", 8, used, made))
    found, expected = shrunk(module, keep, right, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    back = tuple(range(8))[::-1]
    for wrong in (
        Group("mine", 8, used, tuple(Slot(s.path, s.axis, back) for s in made)),
        Group("mine", 8, (), (*made, *used)),
    ):
        with pytest.raises(ValueError, match="is off by"):
            l0jax.nnx.shrink(module, keep, structure.add(wrong))


def test_a_structure_of_another_module_is_refused():
    one, other = (Between(jnp.tanh, 8, nnx.Rngs(0)) for _ in range(2))
    other.two = nnx.Linear(8, 5, rngs=nnx.Rngs(0))
    structure = l0jax.trace(one, EXAMPLE[3])
    with pytest.raises(ValueError, match=r"'two\.bias'.*\(2,\).*\(5,\).*trace"):
        l0jax.nnx.shrink(other, {"one": np.arange(8) > 2}, structure)


KINDS = {
    "tokens": (lambda p, x: p["table"][x] @ p["w"], jnp.int32),
    "mask": (lambda p, x: jnp.where(x, p["w"][0, 0], 1.0) @ p["w"], bool),
    "complex": (lambda p, x: jnp.abs(x @ p["w"].astype(x.dtype)), jnp.complex64),
    "half": (lambda p, x: x @ p["w"].astype(x.dtype), jnp.bfloat16),
    "double": (lambda p, x: jnp.float32(x) @ p["w"], jnp.float16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_every_kind_are_drawn(kind):
    function, dtype = KINDS[kind]
    params = {**WEIGHTS, "table": np.float32(np.eye(9)[:, :2] + 0.1)}
    x = jax.ShapeDtypeStruct((3, 2), dtype)
    structure = l0jax.trace(function, params, x)

    def swapped(p, x):
        return -(-1 * function(p, x))

    def wrong(p, x):
        return -(-1 * function({**p, "w": p["w"].T}, x))

    given = (structure, {}, function, params)
    assert difference(*given, swapped, excused=(-1.0,)) is None
    assert "off by" in difference(*given, wrong, excused=(-1.0,))


def test_terms_are_equal_only_if_all_that_they_depend_on_is():
    x = jnp.ones((2, 3))

    def programs(*functions):
        terms = Terms()
        return [terms.of(jax.make_jaxpr(f)(x, x)) for f in functions]

    def scan(body, length=3, reverse=False):
        return lambda x, y: jax.lax.scan(
            lambda c, r: (body(c, r, y), None),
            x,
            jnp.ones((length, 3)),
            reverse=reverse,
        )[0]

    different = programs(
        lambda x, y: x - y,
        lambda x, y: y - x,
        lambda x, y: jnp.sum(x + y, 0, keepdims=True),
        lambda x, y: jnp.sum(x + y, 1, keepdims=True),
        scan(lambda c, r, y: c * y + r),
        scan(lambda c, r, y: c * y - r),
        scan(lambda c, r, y: c * y + r, length=4),
        scan(lambda c, r, y: c * y + r, reverse=True),
        scan(lambda c, r, y: y * y + r),
        lambda x, y: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, y),
        lambda x, y: jax.lax.cond(x.sum() > 0, jnp.cos, jnp.sin, y),
        lambda x, y: jax.lax.cond(x.sum() > 1, jnp.sin, jnp.cos, y),
        lambda x, y: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + y, x),
        lambda x, y: jax.lax.while_loop(lambda c: c.sum() < 8, lambda c: c + y, x),
        lambda x, y: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c - y, x),
        lambda x, y: x.at[0].add(y[0]),
        lambda x, y: x.at[0].multiply(y[0]),
        lambda x, y: jax.pure_callback(np.sin, x, x),
        lambda x, y: jax.pure_callback(np.cos, x, x),
    )
    assert len(set(different)) == len(different)
    one, other = programs(
        scan(lambda c, r, y: c * y + r), scan(lambda c, r, y: c * y + r)
    )
    assert one == other


def test_inputs_that_are_removed_are_taken_out_of_what_is_drawn():
    module, x = made("nothing")
    structure = l0jax.trace(module, x)
    keep = {"input": np.array([True, False, True])}
    small = l0jax.nnx.shrink(module, keep, structure)
    z = {"input": jnp.float32(keep["input"])}
    expected = l0jax.nnx.fold(module, z, structure.groups)(x)
    np.testing.assert_allclose(small(x[..., keep["input"]]), expected, rtol=1e-5)
    assert units.arrays(nnx.state(small))["one.kernel"].shape == (2, 8)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_smaller_module_with_fewer_inputs_shrinks_again(by_hand):
    module, x = made("nothing")
    structure = l0jax.trace(module, x)
    first = {"input": np.array([True, False, True]), "one": np.arange(8) > 1}
    small = l0jax.nnx.shrink(module, first, structure)
    again = structure.shrink(first)
    keep = {"one": np.arange(6) % 2 == 0}
    if by_hand:
        group = again.groups["one"]
        renamed = Group("mine", 6, group.used_by, group.made_by)
        again, keep = again.add(renamed), {"mine": keep["one"]}
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    folded = l0jax.nnx.fold(small, z, again.groups)
    smallest = l0jax.nnx.shrink(folded, keep, again)
    left = x[..., first["input"]]
    np.testing.assert_allclose(smallest(left), folded(left), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_random_keys_are_drawn_as_inputs(impl):
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl=impl), 3))

    def function(p, keys):
        return jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys) @ p["w"]

    def swapped(p, keys):
        return (p["w"].T @ function({"w": jnp.eye(2)}, keys).T).T

    structure = l0jax.trace(function, WEIGHTS, keys)
    found = difference(structure, {}, function, WEIGHTS, swapped, excused=(0.0, 1.0))
    assert found is None
