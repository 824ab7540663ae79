"""Steps of many networks whose doomed units go, each as its arm says."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import l0jax.nnx
from experiments.tasks.images import Images, normalised
from l0jax import models, units
from l0jax.dataflow import dataflow
from l0jax.methods import relocation
from l0jax.methods.relocation import Closing
from l0jax.methods.task import cross_entropy
from l0jax.structure import Structure

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


class State(NamedTuple):
    """What training changes of one run."""

    params: PyTree
    statistics: PyTree
    moments: Any
    # Of the losses, where GradNorm balances them; and their first values.
    weights: Float[Array, " losses"]
    first: Float[Array, " losses"]


class Member(NamedTuple):
    """What runs of one program differ in, beside their states."""

    order: Array
    key: PRNGKeyArray
    keep: dict[str, Array]
    shift: dict[str, Array]
    teacher: PyTree


class Program:
    """Steps of networks of one kind, compiled once for each shape and arm.

    Args:
        graph: of the network in training mode.
        optimizer: of its parameters.
        structure: of the full network.
        arm: how doomed units are closed; None trains what is there.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        optimizer: optax.GradientTransformation,
        structure: Structure,
        arm: Arm | None = None,
    ):
        self.graph, self.optimizer, self.arm = graph, optimizer, arm
        self.structure = structure
        self.step = jax.jit(
            jax.vmap(self._step, in_axes=(0, 0, None, None, None)), donate_argnums=0
        )

    def start(self, params: PyTree, statistics: PyTree) -> State:
        """A run at its beginning; arrays are copied, for steps give theirs away."""
        losses = jnp.ones(3)
        state = State(
            params, statistics, self.optimizer.init(params), losses, jnp.zeros(3)
        )
        return jax.tree.map(lambda a: jnp.array(a, copy=True), state)

    def _step(self, state: State, member: Member, at, steps, images: Images):
        batch = member.order[at]
        x = normalised(images.images[batch], images)
        labels = images.labels[batch]
        gates = None
        if self.arm is not None:
            key = jax.random.fold_in(member.key, at)
            gates = self.arm.closing.gates(member.keep, at / steps, key)

        def losses(params):
            if self.arm is None or gates is None:
                logits, statistics = self._run(params, state.statistics, x)
                return (cross_entropy(logits, labels).mean(),), statistics
            share = 1 - relocation.CURVES[self.arm.closing.curve](at / steps)
            closed = relocation.closing(
                params, gates, self.structure.groups, member.shift, share
            )
            return self._losses(closed, state, member, x, labels)

        if self.arm is not None and self.arm.balanced:
            return self._balanced(state, losses)

        def weighed(params):
            found, statistics = losses(params)
            weights = (1.0, *self._weights())[: len(found)]
            return sum(w * a for w, a in zip(weights, found, strict=True)), statistics

        (loss, statistics), slopes = jax.value_and_grad(weighed, has_aux=True)(
            state.params
        )
        updates, moments = self.optimizer.update(slopes, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
        if self.arm is not None and self.arm.closing.decay:
            left = self.arm.closing.decayed(member.keep, at, steps)
            params = units.apply_gates(params, left, self.structure.groups)
        return state._replace(
            params=params, statistics=statistics, moments=moments
        ), loss

    def _weights(self) -> tuple[float, ...]:
        """Of the additional losses that the arm has."""
        if self.arm is None:
            return ()
        given = (self.arm.distillation, self.arm.reconstruction)
        return tuple(weight for weight in given if weight)

    def _run(self, params, statistics, x):
        net = nnx.merge(self.graph, params, statistics, copy=True)
        logits = net(x)
        return logits, nnx.split(net, nnx.Param, ...)[2]

    def _losses(self, params, state, member, x, labels):
        """The loss of the task and the additional ones."""
        if not self._weights():
            logits, statistics = self._run(params, state.statistics, x)
            return (cross_entropy(logits, labels).mean(),), statistics
        assert self.arm is not None
        kernels = list(
            dict.fromkeys(
                slot.path
                for group in self.structure.groups.values()
                for slot in group.used_by
            )
        )

        def seen(params):
            def run(params, x):
                return self._run(params, state.statistics, x)

            flow = dataflow(run, params, x)
            made = [flow.makes(path) for path in kernels]
            values = flow.evaluate(flow.known(params, x), [*flow.outs, *made])
            outs = jax.tree.structure(jax.eval_shape(run, params, x))
            return jax.tree.unflatten(outs, values[: len(flow.outs)]), values[
                len(flow.outs) :
            ]

        (logits, statistics), now = seen(params)
        (taught, _), target = seen(member.teacher)
        found = [cross_entropy(logits, labels).mean()]
        if self.arm.distillation:
            found.append(relocation.distillation(logits, taught).mean())
        if self.arm.reconstruction:
            apart = [
                relocation.mismatch(a, b, self._kept(path, member.keep, a.shape[-1]))
                for path, a, b in zip(kernels, now, target, strict=True)
            ]
            found.append(sum(apart, jnp.zeros(())) / len(apart))
        return tuple(found), statistics

    def _kept(self, path: str, keep, size: int):
        """Which outputs of a layer stay."""
        flags = jnp.ones(size)
        for name, group in self.structure.groups.items():
            for slot in group.made_by:
                if slot.path == path:
                    at = units.owners(slot, group.size)
                    flags *= jnp.append(jnp.float32(keep[name]), 1.0)[at]
        return flags

    def _balanced(self, state: State, losses):
        def listed(params):
            found, statistics = losses(params)
            return jnp.stack(found), statistics

        found, pull, statistics = jax.vjp(listed, state.params, has_aux=True)
        (slopes,) = jax.vmap(pull)(jnp.eye(len(found)))
        norms = jnp.sqrt(
            sum(
                jnp.square(a).reshape(len(found), -1).sum(1)
                for a in jax.tree.leaves(slopes)
            )
        )
        first = jnp.where(state.first.sum() == 0, found, state.first)
        weights = relocation.gradnorm(state.weights, norms, found, first)
        total = jax.tree.map(lambda a: jnp.tensordot(state.weights, a, 1), slopes)
        updates, moments = self.optimizer.update(total, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, statistics, moments, weights, first), found[0]


def split(model):
    """A network in training mode: its graph, its parameters, its statistics."""
    training = nnx.clone(model)
    training.train()
    return nnx.split(training, nnx.Param, ...)


def merged(graph, state: State) -> models.Model:
    """The network of a run, in evaluation mode."""
    model = nnx.clone(nnx.merge(graph, state.params, state.statistics))
    model.eval()
    return model


def folded(model: models.Model, keep: Keep, structure: Structure) -> models.Model:
    """The network with doomed units closed."""
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    return l0jax.nnx.fold(model, z, structure.groups)


def stacked(trees: Sequence[PyTree]) -> PyTree:
    """Members along a new first axis."""
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


def member_of(tree: PyTree, at: int) -> PyTree:
    return jax.tree.map(lambda a: a[at], tree)
