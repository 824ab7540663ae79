"""Which equations of a program reach what it gives.

What is multiplied by nothing at all (a kernel that has lost all rows) is zero, whatever
it is. So a branch that has lost all its units is dead with its norms and biases.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.extend


def reached(jaxpr: Any) -> list[Any]:
    """The equations that results depend on by their names, in their order."""
    return _live(jaxpr, lambda eqn: False)[0]


def live(jaxpr: Any) -> tuple[list[Any], Collection[Any]]:
    """The equations that results depend on by their values, in their order, and the
    variables that these and the results read."""
    return _live(jaxpr, is_nothing)


def constant(jaxpr: Any, inputs: Collection[Any]) -> list[bool]:
    """For each result whether it is the same whatever some arguments are."""
    return [
        _live(jaxpr, is_nothing, [out])[1].isdisjoint(inputs) for out in jaxpr.outvars
    ]


def _live(
    jaxpr: Any, ends: Callable[[Any], bool], outs: Iterable[Any] | None = None
) -> tuple[list[Any], set[Any]]:
    results = jaxpr.outvars if outs is None else outs
    needed = {atom for atom in results if _is_variable(atom)}
    equations = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            equations.append(eqn)
            if not ends(eqn):
                needed.update(filter(_is_variable, eqn.invars))
    return equations[::-1], needed


def is_nothing(eqn: Any) -> bool:
    """Whether what an equation gives is zero, or has no elements, whatever it reads."""
    if eqn.effects:
        return False
    if all(map(_is_empty, eqn.outvars)):
        return True
    return 0 in summed(eqn)


def summed(eqn: Any) -> list[Any]:
    """Sizes of the axes over which a product is summed; empty if it is none."""
    if eqn.primitive.name == "dot_general":
        (axes, _), _ = eqn.params["dimension_numbers"]
        return [eqn.invars[0].aval.shape[at] for at in axes]
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        kernel = eqn.invars[1].aval.shape
        return [kernel[at] for at in numbers.rhs_spec[1:]]
    return []


def _is_empty(atom: Any) -> bool:
    """Whether an array of numbers has no elements."""
    dtype = getattr(atom.aval, "dtype", None)
    if dtype is None or jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return False
    return 0 in atom.aval.shape


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, jax.extend.core.Literal)
