"""A narrowed program as a Flax NNX module.

Where code computes from sizes (the mean of a layer norm, a table of positions), no
module of its class is the smaller function. The narrowed program is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from l0jax.equivalence import check_arrays
from l0jax.narrow import narrow
from l0jax.structure import Structure
from l0jax.units import Keep, arrays

Path = tuple[Any, ...]


class Narrowed(nnx.Module):
    """What is left of a module when units are taken out, as the module was traced.

    Its arrays have the paths and the types of the module's, so that it is trained,
    split, merged and saved like any other, and `l0jax.trace` reads it again:
    `storage.save_function(*narrowed.function, x, folder=...)` writes it. It computes
    what the module does in evaluation: running statistics are read, nothing is dropped.

    Args:
        structure: of the module, by `l0jax.trace(module, *inputs)`.
        module: the module, with test-time gates folded in, or its state.
        keep: a boolean vector for each group that loses units.

    Raises:
        ValueError: as `l0jax.narrow`; if the structure is of other arrays, or an array
            has the name of a method.
    """

    def __init__(self, structure: Structure, module: nnx.Module | PyTree, keep: Keep):
        state = nnx.state(module) if isinstance(module, nnx.Module) else module
        check_arrays(structure, state)
        small, smaller = narrow(structure, state, keep)
        tree = structure.traced.in_tree.children()[0]
        # Static, and equal to itself alone: programs have no other equality.
        self.narrowed_program = nnx.static(
            _Program(small, tree, tuple(structure.arrays), _said(structure, keep))
        )
        for name, node in _nodes([*nnx.to_flat_state(smaller)]).items():
            if hasattr(self, name):
                raise ValueError(
                    f"the module has arrays at {name!r}, which is a name that every "
                    "narrowed module has; use l0jax.narrow, or give it another name"
                )
            setattr(self, name, node)

    def __call__(self, *inputs: PyTree) -> PyTree:
        """The module's outputs, for inputs as the module takes them."""
        function, params = self.function
        return function(params, *inputs)

    @property
    def function(self) -> tuple[Callable[..., PyTree], dict[str, Any]]:
        """`(function, params)`: a plain function `function(params, *inputs)`, and its
        arrays by path."""
        return self.narrowed_program, arrays(nnx.state(self))


class _Program:
    """A narrowed function of arrays by path."""

    def __init__(self, function: Callable[..., PyTree], tree, paths, said: str):
        self.function, self.tree, self.paths = function, tree, paths
        self.said = said

    def __call__(self, params: Mapping[str, Any], *inputs: PyTree) -> PyTree:
        leaves = [params[path] for path in self.paths]
        return self.function(jax.tree.unflatten(self.tree, leaves), *inputs)

    def __repr__(self) -> str:
        return self.said


def _said(structure: Structure, keep: Keep) -> str:
    """How many units are left, group by group."""
    left = [
        f"{name}: {int(np.sum(flags))} of {structure.groups[name].size}"
        for name, flags in keep.items()
    ]
    return f"<narrowed to {', '.join(left) or 'all units'}>"


def _nodes(leaves: Sequence[tuple[Path, Any]]) -> dict[str, Any]:
    """Nested containers with variables at their paths."""
    inside: dict[str, list[tuple[Path, Any]]] = {}
    nodes: dict[str, Any] = {}
    for (first, *rest), variable in leaves:
        if rest:
            inside.setdefault(str(first), []).append((tuple(rest), variable))
        else:
            nodes[str(first)] = variable
    for name, each in inside.items():
        nodes[name] = nnx.Dict(_nodes(each))
    return nodes
