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
from l0jax.equivalence import CantShrink, difference
from l0jax.gates.gate import Gate
from l0jax.remembered import Attributes, counted
from l0jax.structure import Structure
from l0jax.units import Group, Groups, Keep

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


def shrink(
    module: nn.Module,
    variables: Mapping[str, Any],
    keep: Keep,
    structure: Structure,
    attributes: Attributes | None = None,
    **evaluation: Any,
) -> tuple[Resized, dict[str, Any]]:
    """A smaller module and its variables, without the units that are not kept.

    With closed gates folded in first (`l0jax.apply_gates(variables, z,
    structure.groups)`) it has the same outputs. It is trained, traced and saved as the
    module is.

    Args:
        module: the module.
        variables: of the module, with test-time gates folded in.
        keep: a boolean vector for each group that loses units.
        structure: of the module, by `l0jax.trace(module, variables, *inputs)`.
        attributes: sizes in the fields of the module, or of modules in these, and which
            groups they count: `{"heads": "query"}`. See `l0jax.nnx.shrink`.
        **evaluation: keyword arguments with which it was traced, such as `train=False`.

    Returns:
        `(small, small_variables)`: `small.apply(small_variables, *inputs)`.

    Raises:
        ValueError: as `l0jax.units.shrink`; if there is no such attribute or group.
        l0jax.equivalence.CantShrink: a ValueError, if the module's code computes
            something else from smaller arrays, or it can't be told that it doesn't:
            `l0jax.narrow` gives the smaller function.
    """
    inner = module.module if isinstance(module, Resized) else module
    for attribute, named in (attributes or {}).items():
        inner = _recounted(inner, attribute, named, keep, structure.groups)
    small = Resized(inner)

    def evaluated(module):
        return lambda variables, *inputs: module.apply(variables, *inputs, **evaluation)

    found = difference(structure, keep, evaluated(module), variables, evaluated(small))
    if found is not None:
        raise CantShrink(
            f"{type(inner).__name__} is another function when its arrays are smaller: "
            f"{found}; name sizes that it keeps itself in attributes, use l0jax.narrow,"
            " or keep the units of that group"
        )
    return small, dict(units.shrink(variables, keep, structure.groups))


def _recounted(module, attribute, named, keep, groups, inside=""):
    """A copy of a module, of which a field says how many units are left."""
    first, _, rest = attribute.removeprefix(inside).partition(".")
    fields = {each.name for each in dataclasses.fields(module)} - {"parent", "name"}
    if first not in fields or (
        rest and not isinstance(getattr(module, first), nn.Module)
    ):
        raise ValueError(
            f"there is no attribute {attribute!r}: {type(module).__name__} has the "
            f"fields {', '.join(sorted(fields)) or '(none)'}"
        )
    value = getattr(module, first)
    if rest:
        new = _recounted(value, attribute, named, keep, groups, f"{inside}{first}.")
    else:
        new = counted(value, attribute, named, keep, groups)
    return module.clone(**{first: new})


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
