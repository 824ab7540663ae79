"""One compiled training step over parameters and gates together, and one epoch of it.

There is no loop over epochs, no logging and no evaluation here: those are the
experiment's, to be read there from top to bottom.

Keys are derived, never split in a chain: the gates of step t are drawn with
`fold_in(key, t)`, so that a resumed run draws what an uninterrupted one would have.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from l0jax import gating, units
from l0jax.constraints import Constraint
from l0jax.estimators import Estimator
from l0jax.gates.bernoulli import Bernoulli
from l0jax.gates.gate import Gate
from l0jax.gates.noise import fold_in
from l0jax.nnx import GateLogits
from l0jax.objectives import Objective
from l0jax.train import averages
from l0jax.train.epochs import Totals, add
from l0jax.train.gatings import Temperature
from l0jax.units import Groups, apply_gates

Theta = dict[str, PyTree]
"""What is trained: `{"params": pytree, "gates": {group: logits}}`, and if the gates'
temperature is trained too, its logarithm as `"log_temperature"`."""

Apply = Callable[[PyTree, PyTree], PyTree]
"""`apply(params, inputs) -> outputs`, a pure function."""

Loss = Callable[[PyTree, PyTree], tuple[Float[Array, ""], Mapping[str, Array]]]
"""`loss(outputs, targets) -> (mean loss, sums of interest over the batch)`."""


class State(NamedTuple):
    """All that the next step needs; a pytree of arrays.

    Attributes:
        step: number of steps taken.
        theta: the trained parameters and gate logits.
        opt_state: the optimiser's; it is shown no integers, flags or keys.
        average: the Polyak average of `theta` so far, in float32 or wider whatever
            the dtypes of `theta`; the initial values before the first step. Integers,
            flags and keys only keep their place in it.
        dual: what a constraint trains, empty if there is none.
    """

    step: Int[Array, ""]
    theta: Theta
    opt_state: optax.OptState
    average: Theta
    dual: PyTree = ()


Step = Callable[..., tuple[State, dict[str, Array]]]


def init(
    theta: Theta,
    optimizer: optax.GradientTransformation,
    constraint: Constraint | None = None,
) -> State:
    """The state before the first step.

    It holds copies: a run donates its state, and the caller's arrays must survive.
    """
    theta = jax.tree.map(jnp.copy, theta)
    return State(
        step=jnp.zeros((), jnp.int32),
        theta=theta,
        opt_state=optimizer.init(averages.trained(theta)),
        average=averages.start(theta),
        dual=() if constraint is None else jax.tree.map(jnp.copy, constraint.init()),
    )


def gates_apart(
    weights: optax.GradientTransformation, gates: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One optimiser for the parameters and another (often only its rate) for gates: of
    `{"params": …, "gates": …}`, or of the state of an NNX module that contains
    `l0jax.nnx.Gated`, as `nnx.Optimizer` takes it."""

    # Its updates show arrays without their types: those are known from init.
    known: dict[tuple[str, ...], dict[str, str]] = {}

    def label(variable) -> str:
        return "gates" if isinstance(variable, GateLogits) else "params"

    def labels(theta):
        if not isinstance(theta, nnx.State):
            return {name: "params" if name == "params" else "gates" for name in theta}
        typed = jax.tree.map(label, theta, is_leaf=_is_variable)
        paths = tuple(units.arrays(theta))
        if any(map(_is_variable, jax.tree.leaves(theta, is_leaf=_is_variable))):
            known[paths] = units.arrays(typed)
            return typed
        if paths not in known:
            raise ValueError(
                "which of an NNX state are gates is known from the types of its "
                "variables: make the nnx.Optimizer before it is updated"
            )
        return jax.tree_util.tree_map_with_path(
            lambda key_path, _: known[paths][units.path_of(key_path)], theta
        )

    return optax.partition({"params": weights, "gates": gates}, labels)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def make_step(
    apply: Apply,
    loss: Loss,
    objective: Objective,
    gate: Gate,
    groups: Groups,
    optimizer: optax.GradientTransformation,
    *,
    polyak: float = 0.0,
    temperature: Temperature | None = None,
    constraint: Constraint | None = None,
    per_example: bool = False,
    estimator: Estimator | None = None,
) -> Step:
    """A training step `(state, (inputs, targets), key) -> (state, metrics)`.

    Draws the gates, takes the gradient of the mean task loss plus `objective` with
    respect to parameters and logits, updates both, and projects the logits; the
    multipliers of a constraint then ascend. Pure and not yet compiled; `key` is the
    same at every step.

    Args:
        apply: the network as a pure function of its parameters.
        loss: the task loss.
        objective: what the expected cost adds, as made by `l0jax.objectives`.
        gate: the gate family.
        groups: where the units lie.
        optimizer: over `{"params": …, "gates": …}`.
        polyak: decay of the average over steps, 0 for none, below 1.
        temperature: of the gate, if it is annealed or trained.
        constraint: what may be left, as made by `l0jax.constraints`.
        per_example, estimator: how gates are drawn, as for `make_total`.

    Raises:
        ValueError: as `make_total`; if `polyak` is not in [0, 1).
    """
    if not 0 <= polyak < 1:
        raise ValueError(f"polyak must lie in [0, 1), got {polyak}")
    total = make_total(
        apply,
        loss,
        objective,
        gate,
        groups,
        temperature=temperature,
        constraint=constraint,
        per_example=per_example,
        estimator=estimator,
    )

    def step(state: State, batch: tuple[PyTree, PyTree], key: PRNGKeyArray):
        def of_trained(trained, *rest):
            return total(averages.merged(state.theta, trained), *rest)

        trained = averages.trained(state.theta)
        gradients, (metrics, excess) = jax.grad(of_trained, has_aux=True)(
            trained, state, batch, fold_in(key, state.step)
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        trained: Any = optax.apply_updates(trained, updates)
        theta: Any = averages.merged(state.theta, trained)
        if isinstance(temperature, tuple):
            low, high = map(math.log, temperature)
            trained = jnp.clip(theta["log_temperature"], low, high)
            theta = {**theta, "log_temperature": trained}
        now = gate_at(gate, temperature, state.step, theta)
        theta = {**theta, "gates": gating.project(now, theta["gates"])}
        average = state.average
        if polyak:
            average = averages.follow(average, theta, polyak, state.step + 1)
        dual = state.dual
        if constraint is not None:
            dual = constraint.ascend(dual, excess)
        return State(state.step + 1, theta, opt_state, average, dual), metrics

    return step


def make_total(
    apply: Apply,
    loss: Loss,
    objective: Objective,
    gate: Gate,
    groups: Groups,
    *,
    temperature: Temperature | None = None,
    constraint: Constraint | None = None,
    per_example: bool = False,
    estimator: Estimator | None = None,
) -> Callable[..., tuple[Float[Array, ""], Any]]:
    """What a step descends on: `(theta, state, batch, key) -> (value, (metrics,
    excess))`, the sum of the task loss at one draw of the gates and of what their cost
    adds.

    Args:
        apply, loss, objective, gate, groups, temperature, constraint: as for
            `make_step`.
        per_example: draw the gates for each example rather than once for the batch.
            Each example then has weights of its own: memory and time grow with the
            batch.
        estimator: of the gradient in the logits of Bernoulli gates, one of
            `l0jax.estimators`; None is that of `Bernoulli.sample`, straight-through.

    Raises:
        ValueError: if an estimator is given for gates that aren't Bernoulli, or for
            gates per example.
    """
    if estimator is not None and not isinstance(gate, Bernoulli):
        raise ValueError(
            f"an estimator is given, but {type(gate).__name__} gates have gradients "
            "of their own; only Bernoulli gates need one"
        )
    if estimator is not None and per_example:
        raise ValueError(
            "an estimator draws the gates once for a batch, not per example"
        )

    def output(params, z, inputs):
        return apply(apply_gates(params, z, groups), inputs)

    def task(params, logits, now: Gate, batch, key):
        inputs, targets = batch
        if estimator is not None and isinstance(now, Bernoulli):
            return estimator(
                key,
                now.natural(logits),
                lambda z: loss(output(params, z, inputs), targets),
                has_aux=True,
            )
        if not per_example:
            z = gating.sample(key, now, logits)
            return loss(output(params, z, inputs), targets)

        def one(key, x):
            z = gating.sample(key, now, logits)
            alone = output(params, z, jax.tree.map(lambda a: a[None], x))
            return jax.tree.map(lambda y: y[0], alone)

        examples = jax.tree.leaves(inputs)[0].shape[0]
        outputs = jax.vmap(one)(jax.random.split(key, examples), inputs)
        return loss(outputs, targets)

    def total(theta: Theta, state: State, batch, key: PRNGKeyArray):
        params, logits = theta["params"], theta["gates"]
        now = gate_at(gate, temperature, state.step, theta)
        value, sums = task(params, logits, now, batch, key)
        terms = gating.l0_term(now, logits)
        cost = objective(params, terms)
        metrics = {"loss": value, "penalty": cost, **sums}
        excess = {}
        if constraint is not None:
            excess = constraint.excess(params, terms, state.step)
            cost = cost + constraint.term(state.dual, excess)
            for name, strength in constraint.strength(state.dual).items():
                metrics[f"multiplier of {name}"] = strength
                metrics[f"excess of {name}"] = excess[name]
        return value + cost, (metrics, excess)

    return total


def gate_at(
    gate: Gate,
    temperature: Temperature | None,
    step: Int[Array, ""],
    theta: Theta,
) -> Gate:
    """The gate family as it is at `step`, with its annealed or trained temperature."""
    if temperature is None:
        return gate
    if isinstance(temperature, tuple):
        return gate.at_temperature(jnp.exp(theta["log_temperature"]))
    return gate.at_temperature(jnp.asarray(temperature(step)))


def averaged(state: State, polyak: float) -> Theta:
    """The Polyak average of parameters and logits, in their dtypes; before the first
    step, the initial values. What is not averaged (all, if `polyak` is 0; integers,
    flags and keys) is as it is now."""
    return averages.read(state.average, state.theta) if polyak else state.theta


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


def make_run(step: Step) -> Callable[..., tuple[State, Totals]]:
    """Many steps, compiled into one program.

    Returns `(state, totals, data, order, key) -> (state, totals)`. `data` is a pytree
    of arrays with the examples along the first axis, passed as an argument; row t of
    `order` holds the examples of step t. State and totals are donated.
    """

    def run(state, totals, data, order, key):
        return _many(step, state, totals, data, order, key)

    return jax.jit(run, donate_argnums=(0, 1))


def _many(step: Step, state, totals, data, order, key) -> tuple[State, Totals]:
    def one(carry, rows):
        state, totals = carry
        batch = jax.tree.map(lambda a: a.at[rows].get(mode="clip"), data)
        now = state.step
        state, metrics = step(state, batch, key)
        return (state, add(totals, metrics, now)), None

    return jax.lax.scan(one, (state, totals), order)[0]


def make_sweep(
    member: Callable[[PyTree], Step],
    *,
    devices: Sequence[jax.Device] | None = None,
    together: int | None = None,
) -> Callable[..., tuple[State, Totals]]:
    """Many runs that differ in numbers, compiled into one program.

    Returns `(settings, states, totals, data, orders, keys) -> (states, totals)`, whose
    arguments but `data` have the members along the first axis; see `stack`. Members are
    split evenly among the devices, and nothing passes between them: one that has died
    or diverged changes no other. States and totals are donated.

    Args:
        member: the step of one member from its settings, which are traced: a pytree of
            numbers such as coefficients, rates and temperatures.
        devices: by default all there are. (Of a CPU, JAX makes one device per core
            with `jax.config.update("jax_num_cpu_devices", cores)`.)
        together: how many members a device steps at once, by `vmap`. By default all,
            but one after the other on a CPU, where the weights and the optimiser's
            moments of one small network fit into the cache and those of all do not.
    """
    devices = jax.devices() if devices is None else devices
    if together is None and devices[0].platform == "cpu":
        together = 1

    def run(settings, states, totals, data, orders, keys):
        def one(each):
            settings, state, totals, order, key = each
            return _many(member(settings), state, totals, data, order, key)

        members = (settings, states, totals, orders, keys)
        if together == 1:
            return jax.lax.map(one, members)
        return jax.lax.map(one, members, batch_size=together or len(keys))

    mesh = jax.sharding.Mesh(np.asarray(devices), ("members",))
    each, all_of = PartitionSpec("members"), PartitionSpec()
    places = (each, each, each, all_of, each, each)
    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=places, out_specs=each, check_vma=False
    )
    shardings = tuple(NamedSharding(mesh, place) for place in places)
    compiled = jax.jit(sharded, donate_argnums=(1, 2))

    def sweep(*members):
        # What lies elsewhere has another type, for which it would be compiled again.
        return compiled(*jax.device_put(members, shardings))

    return sweep
