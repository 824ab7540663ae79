"""An optimiser for parameters and another for gates, as one."""

from typing import Any

import jax
import optax
from flax import nnx

from l0jax import units
from l0jax.nnx import GateLogits


def gates_apart(
    weights: optax.GradientTransformation, gates: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One optimiser for the parameters and another (often only its rate) for gates: of
    `{"params": …, "gates": …}`, or of the state of an NNX module that contains
    `l0jax.nnx.Gated`, as `nnx.Optimizer` takes it."""

    # Its updates show arrays without their types: those are known from init.
    known: dict[tuple[str, ...], dict[str, str]] = {}

    def label(variable) -> str:
        return "gates" if isinstance(variable, GateLogits) else "params"

    def labels(theta):
        if not isinstance(theta, nnx.State):
            return {name: "params" if name == "params" else "gates" for name in theta}
        typed = jax.tree.map(label, theta, is_leaf=_is_variable)
        paths = tuple(units.arrays(theta))
        if any(map(_is_variable, jax.tree.leaves(theta, is_leaf=_is_variable))):
            known[paths] = units.arrays(typed)
            return typed
        if paths not in known:
            raise ValueError(
                "which of an NNX state are gates is known from the types of its "
                "variables: make the nnx.Optimizer before it is updated"
            )
        return jax.tree_util.tree_map_with_path(
            lambda key_path, _: known[paths][units.path_of(key_path)], theta
        )

    return optax.partition({"params": weights, "gates": gates}, labels)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)
