"""Types of axes: unification is sound, and takes no longer for longer axes."""

import random
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l0jax import axes, units
from l0jax.axes import Product, Sum, freeze, fresh, resolve, split, unify, variables
from l0jax.narrow import narrow
from l0jax.structure import Structure
from l0jax.tracing import trace


def play(seed):
    """Types that were put together, cut and unified at random; pairs that are one."""
    rng = random.Random(seed)
    pool = [fresh(rng.randint(1, 12)) for _ in range(rng.randint(1, 3))]
    pairs = []
    for _ in range(rng.randint(2, 14)):
        one = rng.choice(pool)
        turn = rng.choice(["cut", "cut", "sum", "product", "freeze", *["unify"] * 4])
        if turn == "cut" and one.size > 1:
            at = rng.randint(1, one.size - 1)
            cut = split(one, [at, one.size - at])
            if cut is None:
                freeze(one, "it can't be cut")
            else:
                pool += cut
                pairs.append((one, Sum(tuple(cut))))
        elif turn == "sum" and one.size < 100:
            pool.append(Sum((one, *rng.choices(pool, k=rng.randint(1, 3)))))
        elif turn == "product" and one.size < 100:
            factors = [one, fresh(rng.randint(1, 4))]
            pool.append(Product(tuple(rng.sample(factors, 2))))
        elif turn == "freeze" and rng.random() < 0.2:
            freeze(one, "by hand")
        elif turn == "unify":
            others = [each for each in pool if each.size == one.size]
            other = rng.choice([*others, fresh(one.size)])
            pool.append(other)
            unify(one, other, "they meet")
            pairs.append((one, other))
    return pool, pairs


@pytest.mark.parametrize("seed", range(10))
def test_units_lie_at_the_same_positions_of_types_that_are_one(seed):
    """What is removed of the one can then be removed of the other."""
    alive = 0
    for turn in range(100):
        _, pairs = play(100 * seed + turn)
        for a, b in pairs:
            assert a.size == b.size
            for variable in {*variables(a), *variables(b)}:
                if variable.frozen:
                    continue
                alive += 1
                one, other = axes.unit_of(a, variable), axes.unit_of(b, variable)
                np.testing.assert_array_equal(one, other)
    assert alive > 100  # freezing everything would be no answer


def doubled(x):
    """The cumulative sum, of shifts by powers of two."""
    step = 1
    while step < x.shape[1]:
        x = x + jnp.pad(x[:, :-step], ((0, 0), (step, 0)))
        step *= 2
    return x


def rolled(*by):
    return lambda x: sum(jnp.roll(x, n, axis=1) for n in by) + x


def flat(x):
    """Positions times channels in one axis, shifted by one position."""
    y = jnp.repeat(x[:, :, None], 8, 2).reshape(len(x), -1)
    return y[:, 8:] - y[:, :-8]


SHIFTS = {
    "difference": lambda x: x[:, 1:] - x[:, :-1],
    "shift by two": lambda x: x[:, 2:] * x[:, :-2],
    "second difference": lambda x: x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2],
    "third difference": lambda x: jnp.diff(x, 3, axis=1),
    "difference of every other": lambda x: x[:, 1::2] - x[:, :-1:2],
    "roll": rolled(1),
    "rolls": rolled(7, 3),
    "causal shift": lambda x: jnp.pad(x, ((0, 0), (1, 0)))[:, :-1] + x,
    "concatenated": lambda x: jnp.concatenate([x[:, :1], x[:, 1:] + x[:, :-1]], 1),
    "flat": flat,
    "cumulative sum": lambda x: jnp.cumsum(x, axis=1),
    "cumulative sum of shifts": doubled,
    "associative scan": lambda x: jax.lax.associative_scan(jnp.add, x, axis=1),
    "mirrored": lambda x: x[:, ::-1] + x,
}


def shifted(name, size):
    """A network beside whose axis that meets its own shift there are units."""

    def apply(p, x):
        h = jnp.tanh(x @ p["a"]) @ p["b"]
        return SHIFTS[name](jnp.tanh(x) * p["each"][None]).sum(1) + h

    shapes = {"a": (size, 3), "b": (3,), "each": (size,)}
    rng = np.random.default_rng(0)
    params = {n: jnp.float32(rng.normal(size=shape)) for n, shape in shapes.items()}
    return apply, params, jnp.float32(rng.normal(size=(2, size)))


@pytest.mark.sweep
@pytest.mark.parametrize("name", SHIFTS)
def test_units_beside_an_axis_that_meets_its_own_shift_can_be_removed(name):
    for size in (4, 5, 16, 33):
        apply, params, x = shifted(name, size)
        structure = trace(apply, params, x)
        sizes = [group.size for group in structure.groups.values()]
        # Positions take their neighbours along, but for parts that don't overlap.
        apart = {("shift by two", 4): [2]}
        if name == "difference of every other" and size % 2 == 0:
            apart[name, size] = [size // 2]
        assert sizes == [*apart.get((name, size), ()), 3]
        assert structure.frozen or (name, size) in apart or size < 16
        keep = {n: np.arange(g.size) != 1 for n, g in structure.groups.items()}
        closed = units.apply_gates(
            params, {n: jnp.float32(k) for n, k in keep.items()}, structure.groups
        )
        small, small_params = narrow(structure, params, keep)
        np.testing.assert_allclose(
            small(small_params, x), apply(closed, x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", SHIFTS)
def test_longer_axes_take_no_longer(name, monkeypatch):
    """Steps are counted, not seconds: nothing peels positions off one by one."""
    steps = []

    def counted(of):
        steps.append(of)
        return resolve(of)

    monkeypatch.setattr(axes, "resolve", counted)
    taken = {}
    for size in (64, 4096, 2**17):
        apply, params, x = shifted(name, 4)
        shapes = {"a": (size, 3), "b": (3,), "each": (size,)}
        params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
        x = jax.ShapeDtypeStruct((2, size), jnp.float32)
        equations = len(jax.make_jaxpr(apply)(params, x).eqns)
        steps.clear()
        trace(apply, params, x)
        taken[size] = len(steps) / equations
    # (A step is a call for one type; doubling and scans have more equations too.)
    assert max(taken.values()) < 2 * taken[64] + 20, taken


def test_a_shift_says_why_it_freezes():
    apply, params, x = shifted("difference", 8)
    (frozen,) = trace(apply, params, x).frozen.values()
    assert frozen.why.startswith("sub at ")
    assert frozen.why.endswith("it meets its own shift")


@pytest.mark.parametrize("by", [2, 3])
def test_halves_and_thirds_that_meet_are_one_group(by):
    """A gated linear unit: parts of one axis that don't overlap are no shift."""

    def apply(p, x):
        h = x @ p["up"]
        parts = jnp.split(h, by, axis=1)
        return jnp.tanh(sum(parts[1:]) * parts[0]) @ p["down"]

    params = {"up": jnp.ones((5, 6 * by)), "down": jnp.ones((6, 2))}
    structure = trace(apply, params, jnp.ones((2, 5)))
    assert structure.groups["up"].size == 6


def deep(layers: int, turn) -> Structure:
    def apply(p, x):
        for _ in range(layers):
            x = turn(x)
        return jnp.tanh(x @ p["a"][: x.shape[1]]) @ p["b"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    return trace(apply, params, jnp.ones((2, 3)))


TURNS = {
    "a sum": lambda x: x + jnp.concatenate([x[:, :1], x[:, 1:]], 1),
    "a product": lambda x: x.reshape(2, 1, 3).transpose(1, 0, 2).reshape(2, 3),
    "a longer sum that is cut": lambda x: jnp.concatenate([x[:, :1], x], 1)[:, 1:],
    "a pad": lambda x: jnp.pad(x, ((0, 0), (0, 1)))[:, :3],
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", TURNS)
def test_deep_programs_are_read(name):
    layers = sys.getrecursionlimit()
    assert deep(layers, TURNS[name]).groups.keys() >= {"a"}


def test_deeply_nested_types_are_put_together():
    """What a chain of ten thousand concatenations makes, of cuts, and of both."""
    count = 10_000
    chain = fresh(2)
    for _ in range(count):
        chain = Sum((chain, fresh(2)))
    assert len(list(variables(chain))) == count + 1
    assert len(axes.parts(resolve(chain))) == count + 1
    whole = rest = fresh(2 * count + 2)
    for left in range(2 * count, 0, -2):
        _, rest = split(rest, [2, left])
    unify(whole, chain, "they meet")
    first = next(variables(whole))
    assert first is next(variables(chain))
    assert axes.unit_of(whole, first)[:3].tolist() == [0, 1, -1]
    assert axes.size(whole, lambda variable: variable.size) == 2 * count + 2
    assert axes.positions(whole, lambda variable: np.ones(2, bool)).all()
    assert axes.meeting_themselves(Product((whole, first))) == [first]


def test_what_meets_itself_in_a_product_is_found():
    a, b, c = fresh(2), fresh(3), fresh(4)
    assert axes.meeting_themselves(Sum((a, a, Product((a, b))))) == []
    assert axes.meeting_themselves(Product((Sum((a, b)), Sum((c, b))))) == [b]
    assert axes.meeting_themselves(Sum((Product((a, b, a)), c))) == [a]


def test_all_reasons_are_told():
    """Of types that are made one both, of parts and of what they were cut from."""
    a, b = fresh(4), fresh(4)
    freeze(a, "one")
    freeze(b, "two")
    freeze(b, "two")
    unify(a, b, "they meet")
    (both,) = variables(a)
    assert (both.frozen, both.reasons) == ("two", ["two", "one"])
    rest = split(a, [1, 3])[1]
    freeze(rest, "three")
    assert both.reasons == ["two", "one", "three"]
    parts = Sum((fresh(2), fresh(2)))
    unify(parts, a, "they meet")
    for part in variables(parts):
        assert part.reasons == both.reasons
    for number in range(100):
        freeze(a, f"reason {number}")
    assert len(both.reasons) == axes.MOST_REASONS


def test_the_table_tells_several_reasons():
    def apply(p, x):
        h = jnp.sort(x @ p["a"], axis=1)
        h = jnp.cumsum(h, axis=1)
        return h @ p["b"], jax.lax.top_k(h, 2)[0], h[:, ::-1]

    structure = trace(
        apply, {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((5, 3))
    )
    frozen = structure.frozen["a"]
    kinds = [why.partition(" ")[0] for why in frozen.reasons]
    assert kinds == ["sort", "cumsum", "top_k", "rev", "it"]
    assert frozen.why == frozen.reasons[0]
    lines = str(structure).splitlines()
    at = lines.index("  a (4: a:1, b:0)")
    assert lines[at + 1 : at + 4] == [f"    {why}" for why in frozen.reasons[:3]]
    assert lines[at + 4].startswith("    and more")
