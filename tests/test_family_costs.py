"""What gates of each family cost is measured on the families as they are."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import families, steps
from l0jax import gates


def test_all_families_and_pairs_are_measured():
    measured = families.all_gates().values()
    assert {type(gate) for gate in measured} == {*gates.GATES.values()}
    pairs = {type(g.pair) for g in measured if type(g) is gates.Mixture}
    assert pairs == {type(gates.make_pair(name)) for name in gates.PAIRS}


@pytest.mark.parametrize(
    "name", [n for n, g in families.all_gates().items() if g.random]
)
def test_only_the_noise_is_another(name):
    """Draws are those of the family for other noise: they differ, their mean hardly."""
    gate = families.all_gates()[name]
    other = families.with_counted_noise(gate)
    assert type(other) is not type(gate)
    logits = jnp.linspace(-3.0, 3.0, 4001)
    drawn = gate.sample(jax.random.key(0), logits)
    counted = other.sample(jax.random.key(0), logits)
    assert (drawn != counted).mean() > 0.1
    assert abs(drawn.mean() - counted.mean()) < 0.05
    np.testing.assert_array_equal(gate.sample(jax.random.key(0), logits), drawn)


@pytest.mark.slow
def test_a_line_for_each_network_and_kind(monkeypatch):
    monkeypatch.setattr(families, "STEPS", 1)
    monkeypatch.setattr(steps, "EXAMPLES", 200)
    chosen = {name: gates.make(name) for name in ("hard_concrete", "smooth_step")}
    with jax.numpy_dtype_promotion("standard"):  # optax
        found = families.main(argparse.Namespace(turns=1), chosen)
    whats = [each["what"] for each in found]
    assert len({*whats}) == len(families.KINDS) * 2
    assert whats[0].startswith("MLP step, hard concrete gates on each unit")
    assert "random numbers" in found[0]["detail"]
    assert "draws nothing" in found[1]["detail"]
