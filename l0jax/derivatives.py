"""The derivatives that functions have of their own, as programs."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def bind(
    eqn: Any, given: Sequence[Any], changes: Mapping[str, Any] | None = None
) -> Sequence[Any]:
    """What an equation gives for other arguments, with some parameters changed."""
    params = eqn.primitive.get_bind_params({**eqn.params, **(changes or {})})
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*given, **params)
    return results if eqn.primitive.multiple_results else [results]


def is_backward(eqn: Any) -> bool:
    """Whether the derivative is one of cotangents."""
    return eqn.primitive.name != "custom_jvp_call"


def rules_of(eqn: Any, moving: Sequence[bool]) -> tuple[Any, ...]:
    """The programs of an equation's own derivative."""
    return (backward_rule if is_backward(eqn) else forward_rule)(eqn, moving)


# Parameters of an equation in which JAX keeps the functions that its author wrote.
RULES = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd")
# Where JAX keeps what was traced before. (Tracing is done in a `Trace`, a `Store` takes
# the structure of what comes out, and a `DebugInfo` says how things are called.)
KEPT = ("cells", "sentinel")


def rule_of(eqn: Any) -> Hashable:
    """Equal for two equations only if their derivatives are those of one function,
    which JAX wraps anew for each; None if that can't be told."""
    functions = [eqn.params[name] for name in RULES if name in eqn.params]
    found = tuple(map(_identity, functions))
    return found if found and None not in found else None


def _identity(part: Any) -> Hashable:
    """Equal only for functions that do the same."""
    if type(part) in (tuple, list):
        return (type(part), *map(_identity, part))
    of_jax = (getattr(part, "__module__", None) or "").startswith("jax.")
    if of_jax and hasattr(part, "transforms"):  # a function that JAX wraps
        return (_identity(part.f), *map(_identity, (part.transforms, part.params)))
    if of_jax and type(part).__name__.endswith(("Trace", "Store", "DebugInfo")):
        return "kept"
    code = getattr(part, "__code__", None)
    if code is None or not of_jax:
        return _itself(part)
    closure = zip(code.co_freevars, part.__closure__ or (), strict=True)
    try:
        inside = {n: cell.cell_contents for n, cell in closure if n not in KEPT}
    except ValueError:  # a cell that is empty yet
        return ("object", id(part))
    given = [(name, _identity(each)) for name, each in inside.items()]
    return (id(code), _identity(part.__defaults__), *given)


def _itself(part: Any) -> Hashable:
    """Values by what they are, objects by being the same."""
    if part is None or type(part) in (str, int, bool, jax.tree_util.PyTreeDef):
        return (type(part), part)
    if isinstance(part, jax.core.ShapedArray):
        return ("aval", str(part))
    return ("object", id(part))


def _shapes(atoms: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in atoms]


def _of_moving(eqn: Any, args: Sequence[Any], moving: Sequence[bool]):
    """The equation as a function of the arguments that move, and these."""

    def function(*moved):
        rest = iter(moved)
        given = [
            next(rest) if moves else a for a, moves in zip(args, moving, strict=True)
        ]
        return [*bind(eqn, given)]

    return function, [a for a, moves in zip(args, moving, strict=True) if moves]


def _inexact(arrays: Sequence[Any]) -> list[Any]:
    return [a for a in arrays if jnp.issubdtype(a.dtype, jnp.inexact)]


def forward_rule(eqn: Any, moving: Sequence[bool]) -> tuple[Any]:
    """The program `(*args, *tangents) -> (*results, *tangents)` of an equation."""
    count = len(moving)

    def rule(*both):
        function, moved = _of_moving(eqn, both[:count], moving)
        results, tangents = jax.jvp(function, tuple(moved), tuple(both[count:]))
        return (*results, *_inexact(tangents))

    moved = [a for a, moves in zip(eqn.invars, moving, strict=True) if moves]
    return (jax.make_jaxpr(rule)(*_shapes(eqn.invars), *_shapes(moved)),)


def backward_rule(eqn: Any, moving: Sequence[bool]) -> tuple[Any, Any]:
    """The programs `(*args) -> (*results, *remembered)` and `(*remembered,
    *cotangents) -> (*cotangents)` of an equation."""
    trees = []

    def first(*args):
        function, moved = _of_moving(eqn, args, moving)
        results, pull = jax.vjp(function, *moved)
        remembered, tree = jax.tree.flatten(pull)
        trees.append(tree)
        return (*results, *remembered)

    one, shapes = jax.make_jaxpr(first, return_shape=True)(*_shapes(eqn.invars))
    remembered = shapes[len(eqn.outvars) :]

    def second(*both):
        given = iter(both[len(remembered) :])
        cotangents = [
            next(given)
            if jnp.issubdtype(out.aval.dtype, jnp.inexact)
            else np.zeros(out.aval.shape, jax.dtypes.float0)
            for out in eqn.outvars
        ]
        pull = jax.tree.unflatten(trees[-1], both[: len(remembered)])
        return [*pull(cotangents)]

    real = [o for o in eqn.outvars if jnp.issubdtype(o.aval.dtype, jnp.inexact)]
    return one, jax.make_jaxpr(second)(*remembered, *_shapes(real))
