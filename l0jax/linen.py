"""Gates as a Flax Linen module around any Linen module.

The two share one scope: parameter paths and initial values are those of the bare
module, so that its checkpoints still fit. Gate logits are `variables["gates"]` beside
`variables["params"]`, by group below `"log_odds"`; train both.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax import gating, units
from l0jax.gates.gate import Gate
from l0jax.units import Group, Groups

COLLECTION = "gates"
LOG_ODDS = "log_odds"


class Gated(nn.Module):
    """A module whose units are gated.

    `init` needs the random streams `params` and `gates`.

    Args:
        module: any Linen module.
        gate: the gate family.
        groups: where its units lie: those of `l0jax.trace(module.apply, variables, x)`,
            or stated by paths below `params`.
        keep_prob: initial keep probability, one number or one per group.

    Raises:
        ValueError: if a slot of `groups` does not fit the parameters.
    """

    module: nn.Module
    gate: Gate
    groups: Mapping[str, Group]
    keep_prob: float | Mapping[str, float] = 0.8

    def setup(self):
        """Creates or finds the logits."""
        nn.share_scope(self, self.module)
        # Linen falls back to the stream `params` where one is missing, which would
        # change the initial values of the wrapped module.
        if self.is_initializing() and not self.has_rng(COLLECTION):
            raise ValueError(
                "init needs a random stream for the gates: "
                'init({"params": key, "gates": another_key}, ...)'
            )
        # One variable for all: in the shared scope a variable must not have the name of
        # a submodule, and traced groups are named after the layers that make them.
        self.log_odds = self.variable(
            COLLECTION,
            LOG_ODDS,
            lambda: gating.init(
                self.make_rng(COLLECTION), self.gate, self.groups, self.keep_prob
            ),
        )

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
        z = gating.draw_or_decide(self.gate, self.log_odds.value, key=key, rule=rule)
        if self.is_initializing():
            outputs = self.module(*args, **kwargs)
            units.check(self.module.variables["params"], below_params(self.groups))
            return outputs

        def gate(variables):
            groups = below_params(self.groups)
            gated = units.apply_gates(variables["params"], z, groups)
            return {**variables, "params": gated}

        call = nn.map_variables(
            lambda module: module(*args, **kwargs), "params", trans_in_fn=gate
        )
        return call(self.module)


class Resized(nn.Module):
    """A module whose layers take their sizes from their arrays.

    Linen's layers are made with their sizes, so that a module can't be called with
    smaller variables. Within this one each of `SIZES` is told what its arrays are
    before it is called. It shares the module's scope: variables have the same paths.

    What the module's own code computes from sizes stays what it was. Whether it is
    still the same function `l0jax.train` checks.
    """

    module: nn.Module

    def setup(self):
        """Variables are the module's own."""
        nn.share_scope(self, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        with nn.intercept_methods(_resize):
            return self.module(*args, **kwargs)


def _resize(call, args, kwargs, context):
    """Tells a layer its sizes before it is called."""
    layer = context.module
    for kind, sizes in SIZES.items():
        if isinstance(layer, kind) and context.method_name == "__call__":
            params = layer.variables.get("params", {})
            for name, value in sizes(layer, params).items():
                # A copy that was bound for this call alone.
                object.__setattr__(layer, name, value)
    return call(*args, **kwargs)


def _features(layer, params):
    del layer
    return {"features": params["kernel"].shape[-1]}


def _general(layer, params):
    outputs = layer.features if isinstance(layer.features, Sequence) else (0,)
    return {"features": params["kernel"].shape[-len(outputs) :]}


def _embedded(layer, params):
    del layer
    count, features = params["embedding"].shape
    return {"num_embeddings": count, "features": features}


def _heads(layer, params):
    del layer
    *_, heads, size = params["query"]["kernel"].shape
    return {
        "num_heads": heads,
        "qkv_features": heads * size,
        "out_features": params["out"]["kernel"].shape[-1],
    }


SIZES: dict[type[nn.Module], Callable[[Any, Mapping[str, Any]], dict[str, Any]]] = {
    nn.Dense: _features,
    nn.Conv: _features,
    nn.ConvTranspose: _features,
    nn.DenseGeneral: _general,
    nn.Embed: _embedded,
    nn.MultiHeadDotProductAttention: _heads,
}
"""Of each layer that is made with sizes, what they are by its parameters."""


def below_params(groups: Groups) -> dict[str, Group]:
    """Groups as they lie below `params`, from paths in all of the variables or there.

    Slots in other collections (running statistics) are left out.
    """

    def below(slots):
        return tuple(
            dataclasses.replace(slot, path=slot.path.removeprefix("params."))
            for slot in slots
            if slot.path.partition(".")[0] != "batch_stats"
        )

    return {
        name: Group(name, group.size, below(group.used_by), below(group.made_by))
        for name, group in groups.items()
    }


def prob_active(
    gate: Gate, variables: Mapping[str, Any]
) -> dict[str, Float[Array, " units"]]:
    """P(z != 0) of every unit, for the objective."""
    return gating.prob_active(gate, variables[COLLECTION][LOG_ODDS])
