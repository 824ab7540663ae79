"""How doomed units of a network close, as each arm says, while it trains."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from experiments.harness import devices
from experiments.tasks.images import Images, colours_of, normalised
from l0jax import models, train, units
from l0jax.dataflow import dataflow
from l0jax.methods import relocation
from l0jax.methods.relocation import Closing
from l0jax.methods.task import cross_entropy
from l0jax.structure import Structure
from l0jax.train import TrainingState

Keep = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way from a network with doomed units to a small one.

    Args:
        closing: how they are closed; with a share of 0 they are removed at once.
        fit: when kept units are moved by least squares: while the others close, when
            they are removed (which is at once, where the share is 0), or never.
        distillation, reconstruction: weights of the additional losses while units
            close.
        balanced: the weights of all losses are moved by GradNorm.
    """

    closing: Closing = dataclasses.field(default_factory=Closing)
    fit: str = "never"
    distillation: float = 0.0
    reconstruction: float = 0.0
    balanced: bool = False


AT_ONCE = Closing(share=0.0)
ARMS: dict[str, Arm] = {
    "one_shot": Arm(AT_ONCE),
    "least_squares": Arm(AT_ONCE, fit="removal"),
    "soft": Arm(),
    "soft_least_squares": Arm(fit="during"),
    "growing_l2": Arm(Closing(decay=True)),
    # Variants, to see what does it.
    "soft_linear": Arm(Closing("linear")),
    "soft_exponential": Arm(Closing("exponential")),
    "soft_longer": Arm(Closing(share=0.9)),
    "soft_stochastic": Arm(Closing(stochastic=True)),
    "soft_refitted": Arm(fit="removal"),
    "soft_distilled": Arm(distillation=1.0),
    "soft_reconstructed": Arm(reconstruction=1.0),
    "soft_balanced": Arm(distillation=1.0, reconstruction=1.0, balanced=True),
}
MAIN_ARMS = tuple(ARMS)[:5]


class Doomed(NamedTuple):
    """What runs of one arm differ in: settings of the members of a sweep."""

    keep: Mapping[str, Array]
    shift: Mapping[str, Array]
    teacher: PyTree


def plain(
    model: models.Model,
    images: Images,
    optimizer: optax.GradientTransformation,
    compute: Any = None,
) -> train.Training:
    """Training of what is there, in the dtype `compute`."""
    return train.Training(
        model,
        functools.partial(_loss, colours_of(images)),
        optimizer=optimizer,
        compute=compute,
    )


def closing(
    model: models.Model,
    images: Images,
    optimizer: optax.GradientTransformation,
    structure: Structure,
    arm: Arm,
    budget: int,
    compute: Any = None,
) -> Callable[[Doomed], train.Training]:
    """The training of a member in the dtype `compute`: its doomed units close in a part
    of the budget."""
    colours, groups = colours_of(images), structure.groups
    every = {name: np.ones(group.size, bool) for name, group in groups.items()}
    kind = Balanced if arm.balanced else train.Training
    once = kind(
        model,
        functools.partial(_loss, colours),
        structure=structure,
        gate=train.Chosen(every, arm.closing, budget),
        optimizer=optimizer,
        compute=compute,
    )
    steps = arm.closing.steps(budget)

    def member(of: Doomed) -> train.Training:
        settings: dict[str, Any] = {
            "gating": train.Chosen(of.keep, arm.closing, budget, of.shift)
        }
        if arm.distillation or arm.reconstruction:
            settings["loss"] = additional(arm, colours, groups, of)
        if arm.closing.decay:
            decays = functools.partial(arm.closing.decayed, of.keep, steps=steps)
            settings["optimizer"] = decaying(optimizer, decays, groups)
        return once.replace(**settings)

    return member


def _loss(colours: Images, model, batch):
    pixels, labels = batch
    logits = devices.logits_of(model, normalised(pixels, colours))
    return cross_entropy(logits, labels).mean(), {}


class Decaying(NamedTuple):
    """What the optimiser keeps, and how many steps it took."""

    inner: Any
    step: Array


def decaying(
    inner: optax.GradientTransformation,
    decays: Callable[[Array], Mapping[str, Array]],
    groups: units.Groups,
) -> optax.GradientTransformation:
    """An optimiser after whose step the weights that read units decay."""

    def init(params):
        return Decaying(inner.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params: Any = None):
        updates, moments = inner.update(updates, state.inner, params)
        moved = optax.apply_updates(params, updates)
        left = units.apply_gates(moved, decays(state.step), groups)
        updates = jax.tree.map(jnp.subtract, left, params)
        return updates, Decaying(moments, state.step + 1)

    return optax.GradientTransformation(init, update)


# ------------------------------------------------------------------ additional losses


def additional(arm: Arm, colours: Images, groups: units.Groups, of: Doomed):
    """The loss of the task and, weighed, those that compare with the base network."""
    kernels = list(
        dict.fromkeys(slot.path for g in groups.values() for slot in g.used_by)
    )

    def loss(model, batch):
        pixels, labels = batch
        x = devices.as_parameters(model, normalised(pixels, colours))
        graph, params, before = nnx.split(model, nnx.Param, ...)

        def run(params, x):
            net = nnx.merge(graph, params, before, copy=True)
            logits = net(x).astype(jnp.float32)
            return logits, nnx.split(net, nnx.Param, ...)[2]

        def seen(params):
            flow = dataflow(run, params, x)
            made = [flow.makes(path) for path in kernels]
            values = flow.evaluate(flow.known(params, x), [*flow.outs, *made])
            outs = jax.tree.structure(jax.eval_shape(run, params, x))
            count = len(flow.outs)
            return jax.tree.unflatten(outs, values[:count]), values[count:]

        (logits, statistics), now = seen(params)
        teacher = nnx.state(nnx.merge(graph, of.teacher, before), nnx.Param)
        (taught, _), target = seen(teacher)
        nnx.update(model, statistics)
        losses, weights = [cross_entropy(logits, labels).mean()], [1.0]
        if arm.distillation:
            losses.append(relocation.distillation(logits, taught).mean())
            weights.append(arm.distillation)
        if arm.reconstruction:
            apart = [
                relocation.mismatch(a, b, _kept(groups, path, of.keep, a.shape[-1]))
                for path, a, b in zip(kernels, now, target, strict=True)
            ]
            losses.append(sum(apart, jnp.zeros(())) / len(apart))
            weights.append(arm.reconstruction)
        each = jnp.stack(losses)
        return each @ jnp.asarray(weights, each.dtype), {"losses": each}

    return loss


def _kept(groups: units.Groups, path: str, keep: Mapping[str, Array], size: int):
    """Which outputs of a layer stay."""
    flags = jnp.ones(size)
    for name, group in groups.items():
        for slot in group.made_by:
            if slot.path == path:
                at = units.owners(slot, group.size)
                flags *= jnp.append(jnp.float32(keep[name]), 1.0)[at]
    return flags


class Balance(NamedTuple):
    """Weights of losses, and their first values."""

    weights: Float[Array, " losses"]
    first: Float[Array, " losses"]


class Balanced(train.Training):
    """A training with several losses, the metric "losses", whose weights GradNorm
    moves."""

    def start(self, key: PRNGKeyArray, model: Any = None) -> TrainingState:
        """With equal weights."""
        state = super().start(key, model)
        return state._replace(dual=Balance(jnp.ones(3), jnp.zeros(3)))

    def taken(self, state: TrainingState, batch: PyTree):
        """A step along the sum of all slopes by their weights."""
        key = jax.random.fold_in(state.key, state.step)

        def listed(params):
            value, (found, rest) = self.gating.value(
                params,
                state.gates,
                state.step,
                key,
                self.gated,
                lambda p: self.task(p, state.rest, batch, key),
            )
            del value
            return found["losses"], rest

        found, pull, rest = jax.vjp(listed, state.params, has_aux=True)
        (slopes,) = jax.vmap(pull)(jnp.eye(len(found)))
        norms = jnp.sqrt(
            sum(
                jnp.square(a).reshape(len(found), -1).sum(1)
                for a in jax.tree.leaves(slopes)
            )
        )
        first = jnp.where(state.dual.first.sum() == 0, found, state.dual.first)
        weights = relocation.gradnorm(state.dual.weights, norms, found, first)
        total = jax.tree.map(lambda a: jnp.tensordot(state.dual.weights, a, 1), slopes)
        updates, moments = self.optimizer.update(
            total, state.opt_state["params"], state.params
        )
        after = state._replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            rest=rest,
            opt_state={**state.opt_state, "params": moments},
            dual=Balance(weights, first),
        )
        metrics = {"loss": found[0], "penalty": jnp.zeros(()), "losses": found}
        return after, metrics
