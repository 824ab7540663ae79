"""From settings of `experiments.mnist` to what is trained."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import PRNGKeyArray

from experiments.harness import devices
from experiments.mnist_settings import TARGETS, Config, rule_of, targets
from experiments.tasks.data import Dataset
from l0jax import (
    costs,
    estimators,
    gates,
    gating,
    measure_latency,
    models,
    objectives,
    train,
    units,
)
from l0jax.structure import Structure

COMPACT_AT = 0.65
"""Share of the multiply-accumulates to which compaction must bring them."""
LATENCY_BATCH = 256


def training_of(
    config: Config,
    gate: gates.Gate,
    dataset: Dataset,
    model: models.Model,
    latency: costs.Cost | None = None,
    lam: tuple[Any, ...] | None = None,
) -> train.Training:
    """The training of a network.

    Args:
        config: the settings.
        gate: the family, as `check` gives it.
        dataset: what it is trained on.
        model: the network before training.
        latency: seconds of a call, for a target on these.
        lam: in the place of that of the settings; it may be traced.
    """
    examples = len(dataset.train.labels)
    steps = examples // config.batch_size * config.epochs
    structure, gated = structure_of(config, model)
    optimizer, gate_optimizer = optimizers_of(config, steps)
    rule = rule_of(config)
    learned: dict[str, Any] = {}
    if gated:
        target = target_of(config, gated, steps, latency)
        lam = config.lam if lam is None else lam
        learned = {
            "gate": train.Learned(
                gate,
                keep_probabilities(config, gated),
                temperature_of(config, gate, steps),
                config.per_example,
                estimators.ESTIMATORS.get(config.estimator or ""),
                "paper" if rule == "budget" else rule,
                config.samples,
                tuple(gated),
            ),
            "target": target,
            "price": None
            if target and target.pushes
            else {n: c / examples for n, c in per_layer("lam", lam, gated).items()},
        }
    return train.Training(
        model,
        loss_on(dataset.scale),
        structure=structure,
        weight_decay=config.weight_decay,
        charges=objectives.charges_of if config.gates == "weight" else model.charges,
        optimizer=optimizer,
        gate_optimizer=gate_optimizer,
        polyak=config.polyak,
        compaction=train.Compaction(
            config.compact_below,
            config.compact_after,
            at=COMPACT_AT,
            gain=config.compact_gain,
        ),
        **learned,
    )


@functools.cache
def loss_on(scale: float) -> Callable[..., Any]:
    """The loss on images as they are stored; one function for each scale, so that equal
    trainings are one program."""

    def loss(model, batch):
        images, labels = batch
        logits = devices.logits_of(model, images.astype(jnp.float32) / scale)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), {"error": (logits.argmax(-1) != labels).mean()}

    return loss


# ------------------------------------------------------------------- the network


def network(config: Config, dataset: Dataset, key: PRNGKeyArray) -> models.Model:
    """The network before training."""
    shape = dataset.train.images.shape[1:]
    return models.make(
        config.model,
        architecture(config.model, shape, dataset.classes),
        rngs=nnx.Rngs(gating.key_for(key, "params")),
    )


def architecture(model: str, shape: tuple[int, ...], classes: int) -> dict:
    """The paper's widths for images of `shape`."""
    if model == "lenet5":
        return {"shape": shape, "classes": classes}
    return {"features": (math.prod(shape), 300, 100, classes)}


def structure_of(
    config: Config, model: models.Model
) -> tuple[Structure, dict[str, units.Group]]:
    """The groups of units, and of single weights if those are gated; and the groups
    that have gates."""
    structure = models.structure(model)
    if config.gates == "group":
        return structure, dict(structure.groups)
    if config.gates == "none":
        return structure, {}
    single = weight_groups(nnx.state(model, nnx.Param))
    for group in single.values():
        structure = structure.add(group)
    return structure, single


def weight_groups(params) -> dict[str, units.Group]:
    """One group per kernel, with each of its weights as a unit; biases stay."""
    return {
        path: units.Group(path, leaf.size, (units.Slot(path, None),))
        for path, leaf in units.arrays(params).items()
        if leaf.ndim > 1
    }


def keep_probabilities(config: Config, groups: units.Groups) -> dict[str, float]:
    """Initial, for each group."""
    given = config.keep_prob
    if given is None:
        given = tuple(0.8 if name == "input" else 0.5 for name in groups)
    return per_layer("keep_prob", given, groups)


def per_layer(field: str, values: tuple[Any, ...], groups: units.Groups) -> dict:
    """One value for each group, from one number for all or one for each."""
    if len(values) == 1:
        return dict.fromkeys(groups, values[0])
    if len(values) != len(groups):
        raise ValueError(
            f"{field} has {len(values)} values; give one, or one for each of the "
            f"{len(groups)} gated layers ({', '.join(groups)})"
        )
    return dict(zip(groups, values, strict=True))


# ------------------------------------------------------------------- how it is trained


def target_of(
    config: Config, gated: units.Groups, steps: int, latency: costs.Cost | None
) -> train.Target | None:
    """What may be left of the network, if there is a target."""
    given = targets(config)
    if not given:
        return None
    (name,) = given
    share: Any = getattr(config, name)
    cost: Any = latency if name == "target_latency" else TARGETS.get(name, "density")
    if name == "target_density":
        # One number is that of all layers together.
        share = per_layer(name, share, gated) if len(share) > 1 else share[0]
    return train.Target(
        cost,
        share,
        warm_up=int(config.target_warm_up * steps),
        how=config.constraint,
        rate=config.multiplier_rate,
    )


def temperature_of(
    config: Config, gate: gates.Gate, steps: int
) -> train.Temperature | None:
    """That of the gates, if it is annealed or trained."""
    if config.beta_range is not None:
        return config.beta_range
    if config.beta_end is None:
        return None
    begin = float(gate.temperature)
    return optax.exponential_decay(begin, steps, config.beta_end / begin)


def optimizers_of(
    config: Config, steps: int
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Adam for weights and for gates, each with its rate: constant, then linear to
    0."""
    from_step = int(config.decay_from * steps)

    def adam(rate):
        return optax.adam(
            optax.linear_schedule(rate, 0.0, max(steps - from_step, 1), from_step)
            if config.decay_from < 1
            else rate
        )

    gate_rate = config.gate_learning_rate
    return (
        adam(config.learning_rate),
        adam(config.learning_rate if gate_rate is None else gate_rate),
    )


def latency_table(
    config: Config, model: models.Model, shape: tuple[int, ...]
) -> costs.Table:
    """Seconds of a call of networks with 1, half and all units of each of the three
    groups without which most multiply-accumulates are saved.

    27 networks at most. What other groups save is not seen: of LeNet-5's flattened
    features, of which fewer are there with fewer maps, no more.
    """
    structure = models.structure(model)
    saved = costs.per_group(structure, costs.macs)
    largest = sorted(structure.groups, key=lambda name: -float(saved[name]))[:3]
    sizes = {
        name: (1, math.ceil(group.size / 2), group.size)
        for name, group in structure.groups.items()
        if name in largest
    }
    images = jnp.zeros((LATENCY_BATCH, *shape))
    return measure_latency(model, structure, images, sizes=sizes)
