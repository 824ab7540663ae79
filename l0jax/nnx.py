"""Gates as a Flax NNX module around any NNX module, and shrinking one.

The wrapped module is read and never written: its paths and values stay what they are.
Train with plain `jax.jit` over `nnx.split` and `nnx.merge`; `nnx.jit` costs several
times the step of a small network.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from l0jax import gating, units
from l0jax.gates.gate import Gate
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
    module: Module, keep: Mapping[str, Bool[np.ndarray, " units"]], groups: Groups
) -> Module:
    """A smaller copy of `module` without the units that are not kept.

    The result is the same class with smaller arrays. With closed gates folded in
    first it has the same outputs.

    Raises:
        ValueError: as `l0jax.units.shrink`.
    """
    graph, state = nnx.split(module)
    return nnx.merge(graph, units.shrink(state, keep, groups))
