"""Discrimination-aware channel pruning (DCP, Zhuang et al. 2018, arXiv 1810.11809).

A layer is emptied and filled again, one input channel at a time: the one along which
the loss is steepest. That loss is how far the layer's output is from that of the
network before pruning, and how well classes can be told apart a few layers later, by a
small classifier attached there. The functions work on any traced network: a
`Dataflow` gives the value at which a classifier is attached, and stores of every
example just what the layer and all after it need, so that a step through them never
runs what comes before.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from l0jax import gating, units
from l0jax.dataflow import Dataflow
from l0jax.methods.keeping import count_left
from l0jax.methods.task import Task
from l0jax.models.layers import norm
from l0jax.units import Group


class Head(nnx.Module):
    """A classifier on the maps within a network: batch normalisation, ReLU, the mean
    over all positions, a dense layer (eqs. 4 and 5).

    Args:
        channels: of the maps.
        outputs: of the network, the classes.
        rngs: where the initial weights come from.
    """

    def __init__(self, channels: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm = norm(channels, rngs)
        self.dense = nnx.Linear(channels, outputs, rngs=rngs)

    def __call__(
        self, maps: Float[Array, "batch *positions channels"]
    ) -> Float[Array, "batch outputs"]:
        """Logits."""
        x = jax.nn.relu(self.norm(maps))
        return self.dense(x.mean(axis=tuple(range(1, x.ndim - 1))))


@dataclass(frozen=True)
class Stage:
    """Layers that are judged by one loss.

    Attributes:
        groups: in the order in which they are read.
        kernel: the loss is attached after the layer of this kernel
            (`Dataflow.after`); None if it is that of the network itself.
    """

    groups: tuple[str, ...]
    kernel: str | None


def stages(task: Task, losses: int) -> list[Stage]:
    """The layers in stages, with `losses` additional losses evenly in between.

    Of n places at which one could be attached it is every (n // (losses + 1) + 1)-th,
    as in the authors' code: after blocks 7, 14 and 21 of the 27 of ResNet-56.

    Raises:
        ValueError: if there are too few places.
    """
    flow = task.flow
    kernels = {
        name: max(
            (slot.path for slot in group.used_by), key=lambda p: flow.reader(p).at
        )
        for name, group in task.structure.groups.items()
    }
    order = sorted(kernels, key=lambda name: flow.reader(kernels[name]).at)
    places = list(dict.fromkeys(flow.after(kernels[name]) for name in order))
    if not 0 <= losses < len(places):
        raise ValueError(
            f"there are {len(places)} places after which a loss can be attached, the "
            f"last of which has the network's own: got {losses} additional losses"
        )
    step, last = len(places) // (losses + 1) + 1, len(places) - losses
    ends = [min(step * p, last + p - 1) - 1 for p in range(1, losses + 1)]
    at = [places.index(flow.after(kernels[name])) for name in order]
    found, within = [], []
    for name, place, following in zip(order, at, [*at[1:], None], strict=True):
        within.append(name)
        if place in ends and following != place:
            found.append(Stage(tuple(within), kernels[name]))
            within = []
    return [*found, Stage(tuple(within), None)]


def heads(task: Task, of: Sequence[Stage], *, rngs: nnx.Rngs) -> dict[str, Head]:
    """A new classifier for each stage that needs one, by the stage's kernel."""
    flow = task.flow
    outputs = flow.shapes[flow.outs[0]].shape[-1]
    return {
        stage.kernel: Head(
            flow.shapes[flow.after(stage.kernel)].shape[-1], outputs, rngs=rngs
        )
        for stage in of
        if stage.kernel is not None
    }


def sgd() -> optax.GradientTransformation:
    """What the authors' code solves the sub-problem (8) with."""
    return optax.chain(
        optax.add_decayed_weights(1e-4), optax.sgd(0.01, momentum=0.9, nesterov=True)
    )


@dataclass(frozen=True)
class Selection:
    """How channels are chosen; by default as the paper says.

    Attributes:
        reconstruction: weight of the distance to the base network's output (eq. 3:
            half of the mean square). The authors' code leaves the half out: 2 is that.
        discrimination: weight of the additional loss, the paper's lambda (eq. 6).
        epochs: over the data after each channel, to solve the sub-problem (8).
        channels_at_once: chosen by one gradient. The paper chooses one.
        norm: of the gradient of a channel: "overall", over all its weights, or
            "per_output", the sum of a norm for each output, as in the authors' code.
        gradient_at: the other channels' weights are "zero" when the gradient is taken,
            or "warm", those of the network, as for PocketFlow's first channel.
        added_from: a chosen channel begins with the network's weights, "warm", or at
            "zero" as in PocketFlow.
        gradient_batches: over how many batches the gradient is taken; None is all.
            PocketFlow takes one.
        random: channels are drawn instead: Random DCP.
        optimizer: makes the optimiser of the sub-problem, anew for each channel.
    """

    reconstruction: float = 1.0
    discrimination: float = 1.0
    epochs: int = 1
    channels_at_once: int = 1
    norm: Literal["overall", "per_output"] = "overall"
    gradient_at: Literal["zero", "warm"] = "zero"
    added_from: Literal["warm", "zero"] = "warm"
    gradient_batches: int | None = None
    random: bool = False
    optimizer: Callable[[], optax.GradientTransformation] = sgd

    def __post_init__(self):
        for name in ("reconstruction", "discrimination"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"{name} must be at least 0, got {getattr(self, name)}"
                )
        if self.reconstruction == self.discrimination == 0:
            raise ValueError(
                "reconstruction and discrimination are both 0: nothing to choose by"
            )
        for name in ("channels_at_once", "epochs", "gradient_batches"):
            at_least = 0 if name == "epochs" else 1
            value = getattr(self, name)
            if value is not None and value < at_least:
                raise ValueError(f"{name} must be at least {at_least}, got {value}")


@dataclass(frozen=True)
class Chosen:
    """The channels of a layer that have been chosen so far, and its weights: all that
    the choice goes on from.

    Attributes:
        order: units in the order in which they were chosen.
        kernels: the kernels that read the group, zero where no unit was chosen.
        losses: before any was chosen, and after each choice but the last.
    """

    order: tuple[int, ...]
    kernels: Mapping[str, Array]
    losses: tuple[float, ...]


def prune(
    task: Task,
    base: PyTree,
    stage: Stage,
    head: Head | None,
    selection: Selection,
    key: PRNGKeyArray,
    *,
    ratio: float | None = None,
    epsilon: float | None = None,
    chosen: Mapping[str, Chosen] | None = None,
    on_channel: Callable[[str, Chosen], None] | None = None,
) -> tuple[dict[str, np.ndarray], PyTree]:
    """Algorithm 2 for one layer of a stage after the other.

    Args:
        task: the network as it is now.
        base: the parameters of the network before pruning, whose outputs are to be
            reconstructed (the superscript b of eq. 3).
        stage: the layers.
        head: the classifier of the stage, in evaluation mode; None for the last stage.
        selection: how channels are chosen.
        key: for Random DCP.
        ratio: the share of channels that is removed of each layer, or
        epsilon: DCP-Adapt: a layer is full when a channel lowers the loss by no more
            than this share of the loss of the empty layer (eq. 10).
        chosen: layers that have been chosen before, whole or in part, as `on_channel`
            was given them.
        on_channel: called after each choice, with the layer's group.

    Returns:
        What is kept of each group, and the parameters, with the weights that read other
        units at zero: these units can be removed.

    Raises:
        ValueError: unless one of `ratio` and `epsilon` is given; if `ratio` is outside
            [0, 1) or `epsilon` isn't above 0; if a loss is not finite.
    """
    if (ratio is None) == (epsilon is None):
        raise ValueError("give one of ratio and epsilon")
    if ratio is not None:
        count_left(1, ratio)
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    if (head is None) != (stage.kernel is None):
        raise ValueError(
            "a stage that ends within the network needs a head, the last one none: "
            f"this one ends {'with' if stage.kernel is None else 'before'} the network"
        )
    params, keep = task.params, {}
    now = before = [{task.flow.inputs[0]: batch} for batch, _ in task.batches()]
    for name in stage.groups:
        layer = _Layer(task, stage, head, selection, name)
        now = _evaluate(task.flow, params, now, layer.stored)
        before = _evaluate(task.flow, base, before, layer.stored)
        size = task.structure.groups[name].size
        found = layer.fill(
            params,
            now,
            _evaluate(task.flow, base, before, layer.made),
            gating.key_for(key, name),
            size if ratio is None else count_left(size, ratio),
            epsilon,
            (chosen or {}).get(name),
            on_channel,
        )
        keep[name] = np.isin(np.arange(size), found.order)
        params = units.replace(params, found.kernels)
    return keep, params


def _evaluate(
    flow: Dataflow,
    params: PyTree,
    stored: Sequence[Mapping[int, Any]],
    wanted: Sequence[int],
) -> list[dict[int, Array]]:
    """Of each batch the values `wanted`, from those that are stored."""

    @jax.jit
    def values(params, stored):
        return flow.evaluate({**flow.known(params), **stored}, wanted)

    return [dict(zip(wanted, values(params, batch), strict=True)) for batch in stored]


class _Layer:
    """The layer that reads a group, while it is filled."""

    def __init__(
        self,
        task: Task,
        stage: Stage,
        head: Head | None,
        selection: Selection,
        name: str,
    ):
        flow, group = task.flow, task.structure.groups[name]
        self.task, self.selection = task, selection
        self.group = Group(name, group.size, group.used_by, ())
        self.paths = tuple(dict.fromkeys(slot.path for slot in group.used_by))
        self.made = tuple(flow.makes(path) for path in self.paths)
        point = flow.outs[0] if stage.kernel is None else flow.after(stage.kernel)
        changed = [flow.params[path] for path in self.paths]
        self.stored = flow.frontier(changed, [*self.made, point, flow.outs[0]])
        self.optimizer = optimizer = selection.optimizer()
        graph, self.head = (None, None) if head is None else nnx.split(head)

        @jax.jit
        def turn(kernels, state, on, params, head, stored, targets, labels):
            """The loss at these kernels, its gradient, and a step of the chosen."""

            def total(kernels):
                arrays = units.replace(params, kernels)
                known = {**flow.known(arrays), **stored}
                *made, at = flow.evaluate(known, [*self.made, point])
                apart = [
                    jnp.square(y - targets[value]).mean() / 2
                    for y, value in zip(made, self.made, strict=True)
                ]
                if graph is not None:
                    at = nnx.merge(graph, head)(at)
                return (
                    selection.reconstruction * sum(apart)
                    + selection.discrimination * task.loss(at, labels).mean()
                )

            loss, slopes = jax.value_and_grad(total)(kernels)
            # What isn't chosen is zero: without a gradient it stays so.
            updates, state = optimizer.update(self.gated(slopes, on), state, kernels)
            return loss, slopes, optax.apply_updates(kernels, updates), state

        self.turn = turn

    def gated(self, kernels: PyTree, on: Float[Array, " units"]) -> PyTree:
        name = self.group.name
        return units.apply_gates(kernels, {name: on}, {name: self.group})

    def norms(self, slopes: Mapping[str, Array]) -> Float[Array, " units"]:
        """Of the gradient along each channel (step 4 of algorithm 2)."""

        def squares(slopes):
            return units.charge(jnp.square, slopes, self.group.used_by, self.group.size)

        if self.selection.norm == "overall":
            return jnp.sqrt(squares(slopes))
        # A trailing axis of one is left, so that slots keep their axes.
        total = jnp.zeros(self.group.size)
        for path in self.paths:
            of_outputs = jnp.moveaxis(slopes[path], -1, 0)[..., None]
            others = {p: jnp.zeros_like(slopes[p]) for p in self.paths if p != path}
            found = jax.lax.map(
                lambda s, p=path, o=others: squares({**o, p: s}), of_outputs
            )
            total += jnp.sqrt(found).sum(0)
        return total

    def fill(
        self,
        params: PyTree,
        stored: Sequence[Mapping[int, Array]],
        targets: Sequence[Mapping[int, Array]],
        key: PRNGKeyArray,
        count: int,
        epsilon: float | None,
        chosen: Chosen | None,
        on_channel: Callable[[str, Chosen], None] | None,
    ) -> Chosen:
        """Chooses channels until `count` are, or until one more is of no use."""
        selection, size = self.selection, self.group.size
        batches = list(zip(stored, targets, self.task.labels, strict=True))
        warm = {path: units.arrays(params)[path] for path in self.paths}
        nothing = {path: jnp.zeros_like(kernel) for path, kernel in warm.items()}
        norms = jax.jit(self.norms)
        found = chosen or Chosen((), nothing, ())

        def step(kernels, state, on, batch):
            return self.turn(kernels, state, on, params, self.head, *batch)

        while True:
            on = jnp.zeros(size).at[np.array(found.order, int)].set(1.0)
            kernels = dict(found.kernels)
            at = kernels
            if selection.gradient_at == "warm":
                others = self.gated(warm, 1 - on)
                at = jax.tree.map(jnp.add, kernels, others)
            state = self.optimizer.init(kernels)
            looked = batches[: selection.gradient_batches]
            loss, slopes = jnp.zeros(()), nothing
            for batch in looked:
                lost, slope, *_ = step(at, state, on, batch)
                loss, slopes = loss + lost, jax.tree.map(jnp.add, slopes, slope)
            losses = (*found.losses, float(loss) / len(looked))
            found = dataclasses.replace(found, losses=losses)
            if not np.isfinite(losses[-1]):
                raise ValueError(
                    f"the loss of group {self.group.name!r} is {losses[-1]} after "
                    f"{len(found.order)} of its {size} channels were chosen: are the "
                    "weights finite, and the steps of the sub-problem small enough?"
                )
            if len(found.order) >= count or _is_full(losses, epsilon):
                return found
            if selection.random:
                ranked = np.asarray(jax.random.permutation(key, size))
            else:
                ranked = np.argsort(-np.asarray(norms(slopes)), kind="stable")
            free = [int(unit) for unit in ranked if unit not in found.order]
            more = min(selection.channels_at_once, count - len(found.order))
            order = (*found.order, *free[:more])
            new = jnp.zeros(size).at[np.array(free[:more])].set(1.0)
            if selection.added_from == "warm":
                kernels = jax.tree.map(jnp.add, kernels, self.gated(warm, new))
            for _ in range(selection.epochs):
                for batch in batches:
                    *_, kernels, state = step(kernels, state, on + new, batch)
            found = Chosen(order, kernels, losses)
            if on_channel is not None:
                on_channel(self.group.name, found)


def _is_full(losses: Sequence[float], epsilon: float | None) -> bool:
    """Whether the last channel made too little of a difference (eq. 10)."""
    if epsilon is None or len(losses) < 2:
        return False
    return abs(losses[-2] - losses[-1]) <= epsilon * losses[0]
