"""One compiled training step over parameters and gates together, and one epoch of it.

There is no loop over epochs, no logging and no evaluation here: those are the
experiment's, to be read there from top to bottom.

Keys are derived, never split in a chain: the gates of step t are drawn with
`fold_in(key, t)`, so that a resumed run draws what an uninterrupted one would have.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from l0jax import gating, units
from l0jax.gates.gate import Gate
from l0jax.gates.noise import fold_in
from l0jax.objectives import Objective
from l0jax.units import Groups, apply_gates

Theta = dict[str, PyTree]
"""What is trained: `{"params": pytree, "gates": {group: logits}}`."""

Apply = Callable[[PyTree, PyTree], PyTree]
"""`apply(params, inputs) -> outputs`, a pure function."""

Loss = Callable[[PyTree, PyTree], tuple[Float[Array, ""], Mapping[str, Array]]]
"""`loss(outputs, targets) -> (mean loss, sums of interest over the batch)`."""


class State(NamedTuple):
    """All that the next step needs; a pytree of arrays.

    Attributes:
        step: number of steps taken.
        theta: the trained parameters and gate logits.
        opt_state: the optimiser's.
        average: the running sum of Polyak averaging over `theta`, biased towards 0;
            `averaged` corrects it.
    """

    step: Int[Array, ""]
    theta: Theta
    opt_state: optax.OptState
    average: Theta


class Totals(NamedTuple):
    """Sums over the steps of an epoch, kept on the device until they are asked for.

    Attributes:
        steps: steps summed.
        sums: the sum of each step's metrics.
        first_bad_step: the first step whose loss was not finite, or -1.
    """

    steps: Int[Array, ""]
    sums: dict[str, Float[Array, ""]]
    first_bad_step: Int[Array, ""]


Step = Callable[..., tuple[State, dict[str, Array]]]


def init(theta: Theta, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step.

    It holds copies: a run donates its state, and the caller's arrays must survive.
    """
    theta = jax.tree.map(jnp.copy, theta)
    return State(
        step=jnp.zeros((), jnp.int32),
        theta=theta,
        opt_state=optimizer.init(theta),
        average=jax.tree.map(jnp.zeros_like, theta),
    )


def gates_apart(
    weights: optax.GradientTransformation, gates: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One optimiser for the parameters and another (often only its rate) for gates."""
    return optax.partition(
        {"params": weights, "gates": gates}, {"params": "params", "gates": "gates"}
    )


def make_step(
    apply: Apply,
    loss: Loss,
    objective: Objective,
    gate: Gate,
    groups: Groups,
    optimizer: optax.GradientTransformation,
    *,
    polyak: float = 0.0,
    temperature: optax.Schedule | None = None,
    per_example: bool = False,
) -> Step:
    """A training step `(state, (inputs, targets), key) -> (state, metrics)`.

    Draws the gates, takes the gradient of the mean task loss plus `objective` with
    respect to parameters and logits, updates both, and projects the logits. Pure and
    not yet compiled; `key` is the same at every step.

    Args:
        apply: the network as a pure function of its parameters.
        loss: the task loss.
        objective: what the expected cost adds, as made by `l0jax.objectives`.
        gate: the gate family.
        groups: where the units lie.
        optimizer: over `{"params": …, "gates": …}`.
        polyak: decay of the average over steps, 0 for none.
        temperature: schedule of the gate's temperature over steps, if it is annealed.
        per_example: draw the gates for each example rather than once for the batch.
            Each example then has weights of its own: memory and time grow with the
            batch.
    """

    def step(state: State, batch: tuple[PyTree, PyTree], key: PRNGKeyArray):
        inputs, targets = batch
        now = gate_at(gate, temperature, state.step)
        noise = fold_in(key, state.step)

        def one_draw(params, logits, noise, inputs):
            z = gating.sample(noise, now, logits)
            return apply(apply_gates(params, z, groups), inputs)

        def total(theta: Theta):
            params, logits = theta["params"], theta["gates"]
            if per_example:
                examples = jax.tree.leaves(inputs)[0].shape[0]
                outputs = jax.vmap(
                    lambda noise, x: jax.tree.map(
                        lambda y: y[0],
                        one_draw(
                            params, logits, noise, jax.tree.map(lambda a: a[None], x)
                        ),
                    )
                )(jax.random.split(noise, examples), inputs)
            else:
                outputs = one_draw(params, logits, noise, inputs)
            task, sums = loss(outputs, targets)
            cost = objective(params, gating.prob_active(now, logits))
            return task + cost, {"loss": task, "penalty": cost, **sums}

        gradients, metrics = jax.grad(total, has_aux=True)(state.theta)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.theta)
        theta: Any = optax.apply_updates(state.theta, updates)
        theta = {**theta, "gates": gating.project(now, theta["gates"])}
        average = jax.tree.map(
            lambda old, new: polyak * old + (1 - polyak) * new, state.average, theta
        )
        return State(state.step + 1, theta, opt_state, average), metrics

    return step


def gate_at(
    gate: Gate, temperature: optax.Schedule | None, step: Int[Array, ""]
) -> Gate:
    """The gate family as it is at `step` under a schedule of its temperature."""
    if temperature is None:
        return gate
    return gate.at_temperature(jnp.asarray(temperature(step)))


def averaged(state: State, polyak: float) -> Theta:
    r"""The Polyak average $a / (1 - \text{polyak}^t)$ of parameters and logits after t
    steps; before the first step, the initial values."""
    weight = 1 - jnp.power(polyak, state.step.astype(jnp.float32))
    return jax.tree.map(
        lambda a, now: jnp.where(weight > 0, a / jnp.where(weight > 0, weight, 1), now),
        state.average,
        state.theta,
    )


def shrink(state: State, keep: units.Keep, groups: Groups) -> State:
    """The state without the units that are not kept: parameters, gates, running average
    and whatever the optimiser keeps for each parameter.

    Training goes on from it with a step that is made for the smaller groups.

    Args:
        state: the state before; it is fetched to the host.
        keep: a boolean vector for each group that loses units.
        groups: where the units lie; those of the gates among them.

    Raises:
        ValueError: as `l0jax.shrink`; if the optimiser keeps an array for a parameter
            in another shape than the parameter's, so that it can't be cut likewise.
    """
    state = jax.device_get(state)
    params = state.theta["params"]
    here = units.arrays(params)
    groups = {
        name: dataclasses.replace(
            group, made_by=tuple(slot for slot in group.made_by if slot.path in here)
        )
        for name, group in groups.items()
    }
    keep = units.left(params, keep, groups)
    masks: units.Masks = {
        (f"params.{path}", axis): flags
        for (path, axis), flags in units.positions_left(params, keep, groups).items()
    }
    masks |= {(f"gates.{name}", 0): keep[name] for name in state.theta["gates"]}
    shapes = {path: np.shape(leaf) for path, leaf in units.arrays(state.theta).items()}
    longest_first = sorted(shapes, key=len, reverse=True)

    def cut(key_path, leaf):
        path = units.path_of(key_path)
        of = next((p for p in longest_first if f".{path}".endswith(f".{p}")), None)
        if of is None or not any(path == of for path, _ in masks):
            return leaf
        if np.shape(leaf) != shapes[of]:
            raise ValueError(
                f"the optimiser keeps {path!r} in shape {np.shape(leaf)} for a "
                f"parameter of shape {shapes[of]}: its units can't be told apart"
            )
        return units.take(leaf, of, masks)

    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(cut, state))


def no_totals(step: Step, state: State, batch: Any, key: PRNGKeyArray) -> Totals:
    """Totals of no steps, in the shape that `step` will fill."""
    metrics = jax.eval_shape(step, state, batch, key)[1]
    sums = {name: jnp.zeros(m.shape, m.dtype) for name, m in metrics.items()}
    return Totals(jnp.zeros((), jnp.int32), sums, jnp.full((), -1, jnp.int32))


def add(totals: Totals, metrics: Mapping[str, Array], step: Int[Array, ""]) -> Totals:
    """`totals` with one more step's metrics; a loss that is not finite is marked."""
    finite = jnp.isfinite(metrics["loss"] + metrics["penalty"])
    return Totals(
        totals.steps + 1,
        {name: total + metrics[name] for name, total in totals.sums.items()},
        jnp.where((totals.first_bad_step < 0) & ~finite, step, totals.first_bad_step),
    )


@functools.partial(jax.jit, static_argnames=("examples", "batch"))
def order_of_epoch(
    key: PRNGKeyArray, epoch: int | Int[Array, ""], examples: int, batch: int
) -> Int[Array, "steps batch"]:
    """A fresh permutation of the examples, cut into whole batches."""
    steps = examples // batch
    order = jax.random.permutation(
        jax.random.fold_in(gating.key_for(key, "order"), epoch), examples
    )
    return order[: steps * batch].reshape(steps, batch)


def make_run(step: Step) -> Callable[..., tuple[State, Totals]]:
    """Many steps, compiled into one program.

    Returns `(state, totals, data, order, key) -> (state, totals)`. `data` is a pytree
    of arrays with the examples along the first axis, passed as an argument; row t of
    `order` holds the examples of step t. State and totals are donated.
    """

    def one(state: State, totals: Totals, data: PyTree, rows: Array, key: PRNGKeyArray):
        batch = jax.tree.map(lambda a: a.at[rows].get(mode="clip"), data)
        now = state.step
        state, metrics = step(state, batch, key)
        return state, add(totals, metrics, now)

    def run(state, totals, data, order, key):
        return jax.lax.scan(
            lambda carry, rows: (one(*carry, data, rows, key), None),
            (state, totals),
            order,
        )[0]

    return jax.jit(run, donate_argnums=(0, 1))
