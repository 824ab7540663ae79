"""The verbs of a gate family over a whole model: `{group: array}` in, the same out.

Keys: each group draws from `fold_in(key, crc32(name))`. So draws of different groups
are independent, adding a group changes no other group's draw, and every process
agrees (Python's own `hash` of a string differs between processes).
"""

import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax.gates import noise
from l0jax.gates.gate import Gate
from l0jax.units import Groups

Vectors = dict[str, Float[Array, " units"]]


def key_for(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """The key of one named thing, derived from a key shared by all."""
    return noise.fold_in(key, jnp.uint32(zlib.crc32(name.encode())))


def init(
    key: PRNGKeyArray,
    gate: Gate,
    groups: Groups,
    keep_prob: float | Mapping[str, float],
) -> Vectors:
    """Initial logits for every group; `keep_prob` is one number, or one per group.

    Raises:
        ValueError: if `keep_prob` is outside (0, 1), or names other groups than there
            are.
    """
    if isinstance(keep_prob, Mapping) and set(keep_prob) != set(groups):
        raise ValueError(
            f"keep_prob is given for {', '.join(keep_prob) or 'nothing'}; "
            f"the groups are {', '.join(groups)}"
        )
    return {
        name: gate.init(
            key_for(key, name),
            group.size,
            keep_prob[name] if isinstance(keep_prob, Mapping) else keep_prob,
        )
        for name, group in groups.items()
    }


def sample(
    key: PRNGKeyArray, gate: Gate, logits: Mapping[str, Float[Array, " units"]]
) -> Vectors:
    """One draw of every gate; `jax.vmap` over keys for one draw per example."""
    return {name: gate.sample(key_for(key, name), a) for name, a in logits.items()}


def prob_active(gate: Gate, logits: Mapping[str, Float[Array, " units"]]) -> Vectors:
    """P(z != 0) of every gate."""
    return {name: gate.prob_active(a) for name, a in logits.items()}


def l0_term(gate: Gate, logits: Mapping[str, Float[Array, " units"]]) -> Vectors:
    """What every unit pays in the objective."""
    return {name: gate.l0_term(a) for name, a in logits.items()}


def deterministic(
    gate: Gate, logits: Mapping[str, Float[Array, " units"]], rule: str
) -> Vectors:
    """Every gate at test time, by one of `gate.rules` or of `RULES`.

    Raises:
        ValueError: if there is no such rule.
    """
    if rule in RULES:
        return {name: RULES[rule](gate, a) for name, a in logits.items()}
    if rule not in gate.rules:
        known = ", ".join((*gate.rules, *RULES))
        raise ValueError(
            f"unknown test-time rule {rule!r} for {type(gate).__name__}; there is "
            f"{known}"
        )
    return {name: gate.deterministic(a, rule) for name, a in logits.items()}


def threshold(gate: Gate, logits: Float[Array, " units"]) -> Float[Array, " units"]:
    """E[z] where P(z != 0) > 1/2, else 0."""
    return jnp.where(_kept(gate, logits) > 0.5, gate.mean(logits), 0.0)


def expected_count(
    gate: Gate, logits: Float[Array, " units"]
) -> Float[Array, " units"]:
    """E[z] of as many units as are expected to be open, those with the largest logits,
    else 0; of equal ones the first.

    The rule of Wang, Wohlwend and Lei (2020, FLOP) and of Xia, Zhong and Chen (2022,
    CoFi), who have another soft value in the place of E[z].
    """
    count = jnp.round(_kept(gate, logits).sum()).astype(int)
    rank = jnp.argsort(jnp.argsort(logits, descending=True))
    return jnp.where(rank < count, gate.mean(logits), 0.0)


def _kept(gate: Gate, logits: Float[Array, " units"]) -> Float[Array, " units"]:
    """P(z != 0); of gates that are never 0, what the paper's rule keeps."""
    if gate.zeros:
        return gate.prob_active(logits)
    return (gate.deterministic(logits, "paper") != 0).astype(logits.dtype)


# For every family, beside its own.
RULES: dict[str, Callable[[Gate, Array], Array]] = {
    "threshold": threshold,
    "expected_count": expected_count,
}


def sample_average(
    key: PRNGKeyArray,
    gate: Gate,
    logits: Mapping[str, Float[Array, " units"]],
    draws: int,
) -> Vectors:
    """Every gate at test time as the mean of `draws` draws of it."""
    keys = jax.random.split(key, draws)
    many = jax.vmap(lambda one: sample(one, gate, logits))(keys)
    return jax.tree.map(lambda z: z.mean(axis=0), many)


def project(gate: Gate, logits: Mapping[str, Float[Array, " units"]]) -> Vectors:
    """The logits after the family's projection."""
    return {name: gate.project(a) for name, a in logits.items()}


def draw_or_decide(
    gate: Gate,
    logits: Mapping[str, Float[Array, " units"]],
    *,
    key: PRNGKeyArray | None,
    rule: str | None,
) -> Vectors:
    """`sample` if there is a key, `deterministic` if there is a rule.

    Raises:
        ValueError: unless exactly one of the two is given: which one it is changes
            the answer, so there is no default.
    """
    if key is not None and rule is None:
        return sample(key, gate, logits)
    if rule is not None and key is None:
        return deterministic(gate, logits, rule)
    given = "both" if key is not None else "neither"
    raise ValueError(
        f"give key= to draw gates or rule= to set them, got {given}; "
        f"rules: {', '.join((*gate.rules, *RULES))}"
    )
