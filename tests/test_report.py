"""What is measured before and after is what it says."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import l0jax
from l0jax import models


def before_and_after():
    model = models.MLP((12, 9, 7, 3), rngs=nnx.Rngs(0))
    structure = models.structure(model)
    keep = {"hidden1": np.arange(9) < 4, "hidden2": np.arange(7) < 2}
    return model, l0jax.nnx.shrink(model, keep, structure)


@pytest.fixture(scope="module")
def report():
    return l0jax.report(*before_and_after(), jnp.ones((5, 12)), batch_sizes=(1, 8))


def test_counts_are_those_of_the_arrays(report):
    model, small = before_and_after()
    for side, network in ((report.before, model), (report.after, small)):
        arrays = l0jax.units.arrays(nnx.state(network))
        assert side.shapes == {path: leaf.shape for path, leaf in arrays.items()}
        parameters = jax.tree.leaves(nnx.state(network, nnx.Param))
        assert side.params == sum(leaf.size for leaf in parameters)
        assert side.bytes == sum(leaf.nbytes for leaf in arrays.values())
    assert report.before.macs == 12 * 9 + 9 * 7 + 7 * 3
    assert report.after.macs == 12 * 4 + 4 * 2 + 2 * 3


def test_prints_serialises_and_draws_every_number(report):
    text = str(report)
    for what, before, _ in report.lines():
        assert what in text
        assert before > 0
    assert {"ms a call, batch 1", "ms a call, batch 8"} <= {
        what for what, _, _ in report.lines()
    }
    rows = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["layers.0.kernel", "12 × 9", "12 × 4"] in cells
    stored = json.loads(json.dumps(report.as_json()))
    assert stored["after"]["macs"] == report.after.macs
    figure = report.plot()
    (axes,) = figure.axes
    shown = {label.get_text() for label in axes.get_yticklabels()}
    assert "multiply-accumulates" in shown
    widths = [patch.get_width() for patch in axes.patches]
    assert 100 * report.after.macs / report.before.macs in widths


def test_programs_in_the_cache_have_the_size_that_they_have():
    """JAX's persistent cache, which all tests use, gives programs of another size."""
    model, small = before_and_after()
    graph, state = nnx.split(model)
    x = jnp.ones((3, 12))
    # (Twice: what is compiled is put there, and what is there is taken.)
    for _ in range(2):
        jax.clear_caches()
        jax.jit(lambda state, *x: nnx.merge(graph, state)(*x)).lower(state, x).compile()
    one, other = (
        l0jax.report(model, small, x, batch_sizes=(3,), calls=1).before.program_bytes[3]
        for _ in range(2)
    )
    program = jax.jit(lambda state, *x: nnx.merge(graph, state)(*x)).lower(state, x)
    cached = len(program.compile().runtime_executable().serialize())
    assert one == other != cached


def test_functions_are_measured_like_modules():
    def apply(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 2))}
    structure = l0jax.trace(apply, params, jnp.ones((2, 4)))
    small = l0jax.narrow(structure, params, {"a": np.arange(6) < 2})
    found = l0jax.report((apply, params), small, jnp.ones((3, 4)), batch_sizes=(4,))
    assert (found.before.params, found.after.params) == (36, 12)
    assert set(found.after.seconds) == {4}


def test_costs_are_those_of_one_example_even_if_they_depend_on_one_another():
    params = {"a": jnp.ones((6, 8)), "b": jnp.ones((8, 2))}

    def each(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    def in_turn(params, x):
        return jax.lax.map(lambda row: each(params, row), x)

    found = l0jax.report(
        (each, params), (in_turn, params), jnp.ones((4, 6)), batch_sizes=(2,), calls=1
    )
    assert found.before.macs == found.after.macs == 6 * 8 + 8 * 2


@pytest.mark.parametrize("wrong", [{"batch_sizes": (0,)}, {"calls": 0}])
def test_sizes_must_be_positive(wrong):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        l0jax.report(*before_and_after(), jnp.ones((5, 12)), **wrong)


# ----------------------------------------------------------- networks of many sizes


@pytest.fixture
def clock(monkeypatch):
    """A clock that a call moves by the number of columns that its kernels still have,
    and by 1000 in every third round, when the machine is busy."""
    now, calls = [0.0], []

    def compiled_call(params, *inputs):
        width = sum(leaf.shape[-1] for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
        calls.append(width)
        now[0] += width + (1000.0 if len(calls) // 4 % 3 == 0 else 0.0)
        return inputs

    class Lowered:
        lower = staticmethod(lambda *_: Lowered)
        compile = staticmethod(lambda: compiled_call)

    # (`l0jax.report` is the function.)
    module = sys.modules[l0jax.measure_latency.__module__]
    fake = SimpleNamespace(
        jit=lambda _: Lowered, tree=jax.tree, block_until_ready=lambda x: x
    )
    monkeypatch.setattr(module, "jax", fake)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return calls


@pytest.mark.parametrize("kind", ["module", "function"])
def test_every_combination_of_sizes_is_measured_in_turns(clock, kind):
    def apply(params, x):
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]

    if kind == "module":
        model, x = models.MLP((12, 9, 7, 3), rngs=nnx.Rngs(0)), jnp.ones((5, 12))
        structure, names = models.structure(model), ("hidden1", "hidden2")
    else:
        params = {"a": jnp.ones((12, 9)), "b": jnp.ones((9, 7)), "c": jnp.ones((7, 3))}
        model, x = (apply, params), jnp.ones((5, 12))
        structure, names = l0jax.trace(*model, x), ("a", "b")
    sizes = dict(zip(names, [(9, 2), (1, 7)], strict=True))
    table = l0jax.measure_latency(model, structure, x, sizes=sizes, calls=9)
    assert (table.groups, table.sizes) == (names, ((2, 9), (1, 7)))
    # 2, 9 and 1, 7 columns, and the 3 of the outputs.
    np.testing.assert_array_equal(table.seconds, [[6, 12], [13, 19]])
    rounds = [clock[at : at + 4] for at in range(0, len(clock), 4)]
    assert len(rounds) == 10
    assert all(sorted(each) == [6, 12, 13, 19] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1, "the order changes"


def test_what_is_measured_is_a_cost():
    model, _ = before_and_after()
    structure = models.structure(model)
    sizes = {"input": (3, 12), "hidden2": (2, 7)}
    x = np.ones((4, 12), np.float32)
    table = l0jax.measure_latency(model, structure, x, sizes=sizes, calls=2)
    cost = l0jax.costs.interpolated([table])
    assert cost(structure) == pytest.approx(table.seconds[1, 1], rel=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": (1,)}, "unknown group 'heads'; there is input, hidden1, hidden2"),
        ({"input": (-1, 2)}, r"'input' must lie between 0 and 12, got \(-1, 2\)"),
        ({"input": (1, 13)}, r"'input' must lie between 0 and 12, got \(1, 13\)"),
        ({"input": ()}, r"'input' must lie between 0 and 12, got \(\)"),
    ],
)
def test_sizes_that_no_network_has_are_refused(sizes, message):
    model, _ = before_and_after()
    with pytest.raises(ValueError, match=message):
        l0jax.measure_latency(
            model, models.structure(model), jnp.ones((5, 12)), sizes=sizes
        )


def test_latency_is_measured_at_least_once():
    model, _ = before_and_after()
    with pytest.raises(ValueError, match="calls must be at least 1, got 0"):
        l0jax.measure_latency(
            model, models.structure(model), jnp.ones((5, 12)), sizes={}, calls=0
        )


def test_outputs_that_no_longer_depend_on_the_inputs_are_reported():
    """One of two outputs is dead; the other has a way around what is gone."""

    def apply(params, x):
        h = jnp.tanh(x @ params["a"])
        return h @ params["b"] + params["c"], x + h @ params["b"] @ params["d"]

    sizes = {"a": (4, 6), "b": (6, 2), "c": (1, 2), "d": (2, 4)}
    params = {name: jnp.ones(shape) for name, shape in sizes.items()}
    structure = l0jax.trace(apply, params, jnp.ones((2, 4)))
    (name,) = structure.groups
    none = l0jax.narrow(structure, params, {name: np.zeros(6, bool)})
    found = l0jax.report((apply, params), none, jnp.ones((2, 4)), batch_sizes=(1,))
    assert found.dead == (0,)
    assert "DEAD: output 0 is the same for all inputs" in str(found)
    some = l0jax.narrow(structure, params, {name: np.arange(6) < 1})
    found = l0jax.report((apply, params), some, jnp.ones((2, 4)), batch_sizes=(1,))
    assert found.dead == ()
    assert "DEAD" not in str(found)
