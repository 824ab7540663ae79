"""Gates as a Flax NNX module around any NNX module, and shrinking one.

The wrapped module is read and never written: its paths and values stay what they are.
Train with plain `jax.jit` over `nnx.split` and `nnx.merge`; `nnx.jit` costs several
times the step of a small network.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax import gating, remembered, units
from l0jax.equivalence import CantShrink, difference
from l0jax.gates.gate import Gate
from l0jax.narrowed import Narrowed as Narrowed
from l0jax.structure import Structure
from l0jax.tracing import evaluated
from l0jax.units import Group, Groups

Module = TypeVar("Module", bound=nnx.Module)


class GateLogits(nnx.Param):
    """Trainable logits of one group of gates. A type of its own, so that
    `nnx.split(net, GateLogits, ...)` takes them apart from the parameters."""


class Gated(nnx.Module):
    """A module whose units are gated.

    Args:
        module: any NNX module; `net.module` is this very object.
        gate: the gate family.
        groups: where its units lie, by the paths of `nnx.state(module)`.
        keep_prob: initial keep probability, one number or one per group.
        rngs: the stream `gates` initialises the logits.

    Raises:
        ValueError: if a slot of `groups` does not fit the module.
    """

    def __init__(
        self,
        module: nnx.Module,
        gate: Gate,
        groups: Groups,
        keep_prob: float | Mapping[str, float] = 0.8,
        *,
        rngs: nnx.Rngs,
    ):
        units.check(nnx.state(module), groups)
        self.module = module
        self.gate = gate
        # A tuple, because the graph definition of a module must be hashable.
        self._groups = nnx.static(tuple(groups.items()))
        logits = gating.init(rngs.gates(), gate, groups, keep_prob)
        self.logits = nnx.Dict({name: GateLogits(a) for name, a in logits.items()})

    def __call__(
        self,
        *args: Any,
        key: PRNGKeyArray | None = None,
        rule: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The module's output under gates drawn with `key`, or set by `rule`.

        Raises:
            ValueError: unless exactly one of `key` and `rule` is given.
        """
        z = self.gates(key=key, rule=rule)
        graph, params, rest = nnx.split(self.module, nnx.Param, ...)
        gated = nnx.merge(graph, units.apply_gates(params, z, self.groups), rest)
        outputs = gated(*args, **kwargs)
        # What the call wrote beside the parameters (running statistics) is the
        # module's own; gated parameters are not.
        nnx.update(self.module, nnx.split(gated, nnx.Param, ...)[2])
        return outputs

    @property
    def groups(self) -> dict[str, Group]:
        """Where the units lie."""
        return dict(self._groups)

    def gates(
        self, *, key: PRNGKeyArray | None = None, rule: str | None = None
    ) -> dict[str, Float[Array, " units"]]:
        """Gate values drawn with `key`, or set by the test-time rule `rule`."""
        return gating.draw_or_decide(self.gate, self.log_odds, key=key, rule=rule)

    @property
    def log_odds(self) -> dict[str, Float[Array, " units"]]:
        """The logits as plain arrays by group."""
        return {name: variable[...] for name, variable in self.logits.items()}

    def prob_active(self) -> dict[str, Float[Array, " units"]]:
        """P(z != 0) of every unit, for the objective.

        The objective's other argument is `nnx.state(net.module, nnx.Param)`: groups
        name their arrays by the paths of the wrapped module.
        """
        return gating.prob_active(self.gate, self.log_odds)


def fold(
    module: Module, z: Mapping[str, Float[Array, " units"]], groups: Groups
) -> Module:
    """A copy of `module` with gate values multiplied into its weights."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    # A copy, or running statistics would be shared with `module`.
    return nnx.merge(graph, units.apply_gates(params, z, groups), rest, copy=True)


def shrink(
    module: Module,
    keep: units.Keep,
    groups: Groups | Structure,
    attributes: remembered.Attributes | None = None,
) -> Module:
    """A smaller copy of `module` without the units that are not kept.

    The result is the same class with smaller arrays, and Flax's own layers say their
    new sizes when they are printed. With closed gates folded in first it has the same
    outputs. The scale and ε of an RMS norm that loses units make up for these.

    Args:
        module: the module.
        keep: a boolean vector for each group that loses units.
        groups: where the units lie. If it is the structure that `l0jax.trace` found, it
            is checked that the module's code, run on smaller arrays, is still the same
            function in evaluation; the mode that the module is in stays.
        attributes: sizes that the module's own code reads from attributes, and which
            groups they count: `{"blocks.0.heads": "blocks.0.query"}`. What they say is
            multiplied by the share of the units that are left.

    Raises:
        ValueError: as `l0jax.units.shrink`; if there is no such attribute or group, or
            the attribute is no multiple of the number of units.
        l0jax.equivalence.CantShrink: a ValueError, where `Narrowed` and `l0jax.narrow`
            give the smaller function: if a layer has arrays of other sizes than it
            says; if the module's code computes something else from smaller arrays, as
            the scale of an attention from the size of its heads, or it can't be told
            that it doesn't.
    """
    structure = groups if isinstance(groups, Structure) else None
    if isinstance(groups, Structure):
        groups = groups.groups
    graph, state = nnx.split(module)
    smaller = units.shrink(state, keep, groups)
    masks = units.positions_left(state, keep, groups)
    small = nnx.merge(graph, smaller, copy=True)
    remembered.recount(small, attributes or {}, keep, groups)
    rescaled = remembered.tell(module, small, masks)
    if structure is not None:
        _check_same(module, small, rescaled, keep, structure)
    if rescaled.factors:
        nnx.update(small, rescaled.params(nnx.state(small)))
    return small


def _check_same(module, small, rescaled, keep, structure) -> None:
    """Raises ValueError unless a smaller module is the same function."""
    (whole, state), (smaller, _) = map(nnx.split, map(evaluated, (module, small)))
    found = difference(
        structure,
        keep,
        lambda state, *inputs: nnx.merge(whole, state)(*inputs),
        state,
        lambda state, *inputs: nnx.merge(smaller, rescaled.params(state))(*inputs),
        rescaled.numbers,
    )
    if found is not None:
        raise CantShrink(
            f"{type(module).__name__} is another function when its arrays are "
            f"smaller: {found}; name sizes that it keeps itself in attributes, use "
            "l0jax.nnx.Narrowed(structure, module, keep) or l0jax.narrow, or keep the "
            "units of that group"
        )
