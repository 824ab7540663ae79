"""What is measured before and after is what it says."""

import json

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


def test_functions_are_measured_like_modules():
    def apply(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 2))}
    structure = l0jax.trace(apply, params, jnp.ones((2, 4)))
    small = l0jax.narrow(structure, params, {"a": np.arange(6) < 2})
    found = l0jax.report((apply, params), small, jnp.ones((3, 4)), batch_sizes=(4,))
    assert (found.before.params, found.after.params) == (36, 12)
    assert set(found.after.seconds) == {4}


@pytest.mark.parametrize("wrong", [{"batch_sizes": (0,)}, {"calls": 0}])
def test_sizes_must_be_positive(wrong):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        l0jax.report(*before_and_after(), jnp.ones((5, 12)), **wrong)
