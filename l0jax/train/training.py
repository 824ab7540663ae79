"""Training of a network while it is decided what is left of it.

    training = Training(model, loss, example, gate=…, target=…, optimizer=…)
    state = training.start(key)
    state, metrics = training.step(state, batch)      # as often as you like
    training, state = training.compact(state)         # what is dead for good goes
    small = training.finish(state)

Keys are derived, never split in a chain: all that is random in step t is drawn with
`fold_in(key, t)`, so that a resumed run draws what an uninterrupted one would have.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from l0jax import costs, objectives, units
from l0jax.compaction import removable
from l0jax.constraints import Amounts, Constraint
from l0jax.gates.noise import fold_in
from l0jax.structure import Structure
from l0jax.tracing import trace
from l0jax.train import averages, compacting, deciding, epochs, losses, placement, tasks
from l0jax.train.compacting import Compaction
from l0jax.train.deciding import Decision
from l0jax.train.epochs import Totals
from l0jax.train.gatings import Learned, Ungated, gating_of
from l0jax.train.losses import Loss, Metrics
from l0jax.train.networks import Network, network, with_keys_of
from l0jax.train.placement import Placement, Sharding
from l0jax.train.targets import Budget, Target, sizes_of
from l0jax.train.tasks import Task
from l0jax.units import Group, Groups, Keep

Penalty = Callable[[PyTree], Float[Array, ""]]


class TrainingState(NamedTuple):
    """All that the next step needs; a pytree of arrays.

    Attributes:
        step: number of steps taken.
        key: from which all that is random is derived.
        params: the parameters.
        gates: what the gating trains: logits by group below "logits", for instance.
        rest: what the network writes beside the parameters: running statistics, keys.
        opt_state: of the optimisers of "params" and "gates". They are shown no
            integers, flags or keys.
        average: the Polyak average of params and gates, in float32 or wider; empty if
            there is none.
        dual: what a constraint trains; empty if there is none.
        closed: for how many calls of `compact` in a row each unit has been closed.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    params: PyTree
    gates: PyTree
    rest: PyTree
    opt_state: dict[str, optax.OptState]
    average: PyTree
    dual: PyTree
    closed: dict[str, Int[Array, " units"]]


class Training:
    """How a network is trained; immutable.

    Args:
        model: an NNX module (`train.module(module, attributes)` where its code reads
            sizes from attributes of its own), `train.linen(module, variables)`, or
            `train.function(apply, params)`. Its own arrays are not changed.
        loss: `loss(model, batch) -> (mean loss, metrics)`: of the model in training
            mode and any pytree of arrays whose leading axes are the examples. Metrics
            are arrays by name. With a parameter called `key` it also gets a key.
        example: inputs of the model, one or a tuple of them (arrays or their shapes),
            from which its units are read.
        structure: the units, if they are not to be read from the model: restricted,
            renamed, merged. Of those that are read the inputs' own are left out: the
            data would have to lose them too.
        gate: a gate family of `l0jax.gates`, or `train.Learned` with more settings, or
            `train.Chosen` for units that were chosen before; None trains the network
            as it is.
        price: what is paid for each weight that is expected to be read by an open
            gate, c/N for N examples (Louizos et al. 2018): a number, or one per group.
        target: what may be left, instead of a price; with a price if it is one that
            only decides.
        weight_decay: coefficient of ½‖θ‖², of which the norm of a unit counts by the
            probability that it is there (Louizos et al. 2018, appendix A).
        detached: weight decay shrinks weights only, and closes no gates (as in the code
            of Gallego-Posada et al. 2022).
        charges: which weights a unit pays for, by default those that read it.
        penalty: anything else that is added to the loss, a function of the parameters.
        optimizer: of the parameters.
        gate_optimizer: of what the gating trains; by default Adam with a rate of 5e-3.
            At the rate of SGD for the weights gates don't move.
        polyak: decay of the average over steps that is evaluated and kept in the end;
            0 for none, below 1.
        compaction: when `compact` takes units out.
        mesh: devices over the first axis of which batches are split. With several
            processes each gives its own part of a batch.
        sharding: how parameters, and what the optimiser and the average keep for them,
            are split over the mesh, by patterns of paths, the first that matches:
            `{r".*.out.kernel": PartitionSpec("model", None), ".*": "data"}` splits
            some along their first axis over "model", and of all others the largest axis
            that can be over "data". By default every device has all of them.
        compute: the dtype in which the network runs, such as `jnp.bfloat16`.
            Parameters, gates, noise and statistics stay as they are, and what a loss
            returns is summed in float32. All floats of a batch are rounded to that
            dtype, or layers would run in the wider one of their inputs: what must not
            be, such as targets of a regression, a loss takes from integers, say from
            `jax.lax.bitcast_convert_type(targets, jnp.int32)`.

    Raises:
        ValueError: for rules of `sharding` that the mesh or the parameters don't fit;
            for both a price and a target that pushes, or either without gates
            that are learned; a target that pushes gates of which nothing is expected to
            be 0; a target below what no gate can remove; `polyak` outside [0, 1); a
            group whose units are used by what isn't trained; anything that is refused
            by `train.network`, `Learned` or `Target`.
        l0jax.tracing.TraceError: if the model can't be read.

    Warns:
        UserWarning: for groups that cost nothing under the target; for loops that run
            as long as their values say, if the target counts their turns.
    """

    def __init__(
        self,
        model: Any,
        loss: Loss,
        example: PyTree = None,
        *,
        structure: Structure | None = None,
        gate: Any = None,
        price: float | Mapping[str, float] | None = None,
        target: Target | None = None,
        weight_decay: float = 0.0,
        detached: bool = False,
        charges: Callable[[Groups], objectives.Charges] = objectives.charges_of,
        penalty: Penalty | None = None,
        optimizer: optax.GradientTransformation,
        gate_optimizer: optax.GradientTransformation | None = None,
        polyak: float = 0.0,
        compaction: Compaction | None = None,
        mesh: Mesh | None = None,
        sharding: Sharding | None = None,
        compute: Any = None,
    ):
        self.network: Network = network(model)
        self.placement = Placement(mesh, tuple((sharding or {}).items()))
        self.placement.check(self.network.params)
        self.loss = loss
        self.gating = gating_of(gate)
        self.price, self.target = price, target
        self.weight_decay, self.detached = weight_decay, detached
        self.charges, self.penalty = charges, penalty
        self.optimizer = optimizer
        self.gate_optimizer = (
            optax.adam(5e-3) if gate_optimizer is None else gate_optimizer
        )
        self.polyak = polyak
        self.compaction = Compaction() if compaction is None else compaction
        self.compute = compute
        if structure is None:
            structure = self._read(example)
        else:
            self._check_sizes(structure)
        self.structure = structure
        self.whole = structure
        self.alive = {n: np.ones(g.size, bool) for n, g in structure.groups.items()}
        self._check()
        self._sizes = self._sizes_at_first()
        self._derive()
        self._warn_of_what_costs_nothing()
        self._warn_of_what_is_counted_once()

    def _read(self, example: PyTree) -> Structure:
        if example is None and isinstance(self.gating, Ungated):
            # What is trained as it is has no units to be known.
            network = self.network
            tree = network.tree(network.params, network.rest)
            return trace(lambda _: jnp.zeros(()), tree).only()
        if example is None:
            raise ValueError(
                "the units are read from the model with an example of its inputs: give "
                "example=, or structure="
            )
        inputs = example if isinstance(example, tuple) else (example,)
        structure = self.network.structure(inputs)
        kept = [name for name in structure.groups if name not in structure.inputs]
        return structure.only(*kept)

    # ------------------------------------------------------------------ what it is

    @property
    def gated(self) -> dict[str, Group]:
        """The groups that are multiplied, by the paths of `params`."""
        return dict(self.gating.groups(self._below(self.structure.groups)))

    @property
    def learns(self) -> bool:
        """Whether gates are trained."""
        return isinstance(self.gating, Learned)

    @property
    def key(self) -> Any:
        """Equal for trainings that are the same program."""
        price = self.price
        if isinstance(price, Mapping):
            price = tuple(price.items())
        return (
            self.network.key,
            self.loss,
            self.gating.key,
            (price, self.target and self.target.key, self.weight_decay, self.detached),
            (self.charges, self.penalty, self.optimizer, self.gate_optimizer),
            (self.polyak, self.placement, self.compute),
            tuple(self.structure.groups.items()),
            tuple(self.structure.wholes.items()),
            tuple((path, leaf.shape) for path, leaf in self.structure.arrays.items()),
            tuple(self.alive[name].tobytes() for name in sorted(self.alive)),
        )

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Training)
            and self.key == other.key
            and self.structure.operations == other.structure.operations
        )

    def replace(self, **changes: Any) -> "Training":
        """The same with other settings, such as `price` or `optimizer`. Numbers may be
        traced, but for `polyak`: so a sweep differs in them."""
        unknown = changes.keys() - _REPLACEABLE
        if unknown:
            raise ValueError(
                f"{min(unknown)!r} can't be replaced; {', '.join(_REPLACEABLE)} can"
            )
        other = copy.copy(self)
        if {"mesh", "sharding"} & changes.keys():
            mesh = changes.pop("mesh", self.placement.mesh)
            sharding = changes.pop("sharding", dict(self.placement.rules))
            other.placement = Placement(mesh, tuple((sharding or {}).items()))
            other.placement.check(self.network.params)
        for name, value in changes.items():
            setattr(other, name, gating_of(value) if name == "gating" else value)
        other._check()
        if {"gating", "charges"} & changes.keys():
            other._sizes = other._sizes_at_first()
        other._derive()
        return other

    def _below(self, groups: Groups) -> dict[str, Group]:
        """Groups with the paths of parameters, and what lies in parameters alone."""
        prefix = self.network.below
        paths = units.arrays(self.network.params).keys()

        def below(slots):
            return tuple(
                dataclasses.replace(slot, path=slot.path.removeprefix(prefix))
                for slot in slots
                if slot.path.startswith(prefix)
                and slot.path.removeprefix(prefix) in paths
            )

        return {
            name: Group(name, group.size, below(group.used_by), below(group.made_by))
            for name, group in groups.items()
        }

    def _check_sizes(self, structure: Structure) -> None:
        """Raises ValueError unless the structure is of a network of these sizes."""
        network = self.network
        arrays = units.arrays(network.tree(network.params, network.rest))
        for path, read in structure.arrays.items():
            if path in arrays and np.shape(arrays[path]) == read.shape:
                continue
            here = np.shape(arrays[path]) if path in arrays else "none"
            groups = [
                name
                for name, group in structure.groups.items()
                if path in {slot.path for slot in (*group.used_by, *group.made_by)}
            ]
            of = f", where the units of {', '.join(groups)} lie," if groups else ""
            raise ValueError(
                f"the structure is that of another network: its array {path!r}{of} has "
                f"shape {read.shape}, and in the model it is {here}; trace this model"
            )

    def _warn_of_what_costs_nothing(self) -> None:
        """Of gates that nothing pushes."""
        budget = self._budget
        if (
            self._constraint is None
            or budget is None
            or budget.target.cost == "density"
        ):
            return
        whole = budget.left({}, self.structure)
        for name in self._gated:
            size = self.structure.groups[name].size
            one = {name: np.arange(size) < 1}
            if size > 1 and budget.left(one, self.structure) == whole:
                warnings.warn(
                    f"the units of {name!r} cost nothing in {budget.target.name}, so "
                    "that the target closes none of their gates: leave the group out, "
                    "or give a cost that counts them",
                    stacklevel=3,
                )

    def _warn_of_what_is_counted_once(self) -> None:
        """Of loops whose turns a target counts, and nobody knows."""
        if self._budget is None or isinstance(self._budget.target.cost, str):
            return
        loops = costs.counted_once(self.structure, self._budget.target.cost)
        if loops:
            warnings.warn(
                f"the target is of {self._budget.target.name}, which counts one turn "
                f"of {loops[0]}, whose turns nobody knows before it runs: what is left "
                "is a share of that; give the loop a fixed number of turns (a Python "
                "number to fori_loop, or scan), or a cost that counts no turns, such "
                "as costs.params or what measure_latency found",
                stacklevel=3,
            )

    def _check(self) -> None:
        if isinstance(self.polyak, jax.core.Tracer):
            raise ValueError(
                "polyak is a constant of the program, which members of a sweep share"
            )
        if not 0 <= self.polyak < 1:
            raise ValueError(f"polyak must lie in [0, 1), got {self.polyak}")
        pushes = self.target is not None and self.target.pushes
        if self.price is not None and pushes:
            raise ValueError(
                "both a price and a target are given: a target finds its own price; "
                'give one of them, or a target that only decides: how="decided"'
            )
        if pushes and isinstance(self.gating, Learned) and not self.gating.gate.bounded:
            raise ValueError(
                f"what {type(self.gating.gate).__name__} gates pay is no probability, "
                "so that no cost is expected of them that a target could push: give a "
                'price, and how="decided" to the target'
            )
        if not self.learns:
            for name in ("price", "target"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"a {name} is given, but no gate is learned; give gate="
                    )
        wholes = [name for name in self.gated if name in self.structure.wholes]
        for name, given in (
            ("a price", self.price is not None),
            ("weight_decay", objectives.given(self.weight_decay)),
            ("a density", self.target is not None and not self.target.counts),
        ):
            if self.learns and wholes and given:
                raise ValueError(
                    f"{name} is counted by weights, of which those under {wholes[0]!r} "
                    "would count twice: give a target that is a cost of l0jax.costs, "
                    "let the optimizer decay, or leave that group out"
                )
        if self.learns and not self.structure.groups:
            raise ValueError(
                "there is no group of units to gate:\n" + str(self.structure)
            )
        prefix = self.network.below
        for name, group in self.gated.items():
            here = {prefix + slot.path for slot in group.used_by}
            for slot in self.structure.groups[name].used_by:
                if slot.path not in here:
                    raise ValueError(
                        f"the units of group {name!r} are read by {slot.path!r}, which "
                        "is no parameter, so that no gate can be put there; leave the "
                        "group out with structure=…only(…)"
                    )

    def _derive(self) -> None:
        """What follows from the settings, at the width that the network has."""
        self._gated = self.gated
        self._objective = None
        if self._gated and self.learns:
            price = 0.0 if self.price is None else self.price
            self._objective = objectives.penalty(
                self._gated,
                price,
                1,
                weight_decay=self.weight_decay,
                charges=self.charges(self._gated),
                detached=self.detached,
            )
        elif objectives.given(self.weight_decay):
            self._objective = objectives.penalty(
                {}, {}, 1, weight_decay=self.weight_decay, charges={}
            )
        self._amounts: Amounts | None = None
        self._constraint: Constraint | None = None
        self._budget: Budget | None = None
        if self.target is not None:
            self._budget = Budget(self.target, self.whole, self._sizes)
            self._amounts = self._budget.amounts(self.structure, self._gated)
            self._constraint = self._budget.constraint(self._amounts)
        # Of traced settings, a member's in a sweep, there is no hash.
        try:
            self._hash = hash(self.key)
        except TypeError:
            self._hash = id(self)

    def _sizes_at_first(self) -> dict[str, np.ndarray]:
        """|g| of the units that have gates now, in the network as it was before any was
        taken out: shares are of that."""
        groups = dict(self.gating.groups(self._below(self.whole.groups)))
        prefix = self.network.below
        whole = {
            path.removeprefix(prefix): np.zeros(array.shape, np.float32)
            for path, array in self.whole.arrays.items()
            if path.startswith(prefix)
        }
        # (A member of a sweep is made while its program is traced.)
        with jax.ensure_compile_time_eval():
            return sizes_of(whole, groups, self.charges(groups))

    # ------------------------------------------------------------------ the state

    def start(self, key: PRNGKeyArray, model: Any = None) -> TrainingState:
        """The state before the first step. It holds copies: a step gives its state
        away, and the user's arrays must survive.

        Args:
            key: from which all that is random is derived, the keys of `nnx.Rngs` within
                the model too.
            model: of which the initial values are; by default that of the training. A
                sweep over seeds starts one training with models of several.

        Raises:
            ValueError: if the model runs other code than that of the training.
        """
        begun = self.network if model is None else network(model)
        if begun.key != self.network.key:
            raise ValueError(
                "a training starts with a model of its own kind; this one differs in "
                "its code or its settings"
            )
        own = self.gating.init(key, self._gated)
        params = begun.params
        theta = {"params": params, "gates": own}
        state = TrainingState(
            step=jnp.zeros((), jnp.int32),
            key=key,
            params=params,
            gates=own,
            rest=with_keys_of(begun.rest, key),
            opt_state={
                "params": self.optimizer.init(averages.trained(params)),
                "gates": self.gate_optimizer.init(averages.trained(own)),
            },
            average=averages.start(theta) if self.polyak else {},
            dual=() if self._constraint is None else self._constraint.init(),
            closed={
                name: jnp.zeros(group.size, jnp.int32)
                for name, group in removable(self.structure.groups).items()
                if self._gated
            },
        )
        return self.placed(jax.tree.map(lambda a: jnp.array(a, copy=True), state))

    def placed(self, state: TrainingState) -> TrainingState:
        """A state where the mesh wants it."""
        if self.placement.mesh is None:
            return state
        return placement.put(state, self.placement.of_state(state, self._gated))

    def split(self, batch: PyTree) -> PyTree:
        """A batch, split over the mesh. Of several processes each gives its own part.

        Raises:
            ValueError: if the number of examples doesn't divide.
        """
        return self.placement.split(batch)

    # ------------------------------------------------------------------ the step

    def step(
        self, state: TrainingState, batch: PyTree
    ) -> tuple[TrainingState, Metrics]:
        """One compiled step; the state is given away.

        Returns:
            The state after it, and on the device: the loss, the penalty, the metrics of
            the loss, and of a target its excess and its multiplier.
        """
        state, metrics = _step(self, state, self.split(batch))
        placement.keep_pace(self.placement.mesh, metrics)
        return state, metrics

    def taken(
        self, state: TrainingState, batch: PyTree
    ) -> tuple[TrainingState, Metrics]:
        """The step as a pure function that isn't compiled."""
        trained = {
            "params": averages.trained(state.params),
            "gates": averages.trained(state.gates),
        }
        now = {"params": state.params, "gates": state.gates}

        def total(trained):
            theta = averages.merged(now, trained)
            return self.total(state, batch, theta["params"], theta["gates"])

        gradients, (metrics, rest, excess) = jax.grad(total, has_aux=True)(trained)
        # For complex numbers JAX gives the conjugate of the direction of ascent.
        gradients = jax.tree.map(jnp.conj, gradients)
        opt_state = {}
        for name, optimizer in self._optimizers.items():
            updates, opt_state[name] = optimizer.update(
                gradients[name], state.opt_state[name], trained[name]
            )
            trained[name] = optax.apply_updates(trained[name], updates)
        theta: Any = averages.merged(now, trained)
        theta["gates"] = self.gating.project(theta["gates"], state.step)
        average, dual = state.average, state.dual
        if self.polyak:
            average = averages.follow(average, theta, self.polyak, state.step + 1)
        if self._constraint is not None:
            dual = self._constraint.ascend(dual, excess)
        after = state._replace(
            step=state.step + 1,
            params=theta["params"],
            gates=theta["gates"],
            rest=rest,
            opt_state=opt_state,
            average=average,
            dual=dual,
        )
        if self.placement.mesh is not None:
            # Else the compiler may choose another place, for which the next step would
            # be another program.
            places = self.placement.of_state(after, self._gated)
            after = jax.lax.with_sharding_constraint(after, places)
        return after, metrics

    def epoch(
        self,
        state: TrainingState,
        data: Iterable[PyTree] | PyTree,
        order: Int[Array, "steps batch"] | Int[np.ndarray, "steps batch"] | None = None,
        *,
        loop: bool = False,
    ) -> tuple[TrainingState, Totals]:
        """Many steps; the state is given away, and nothing waits for the device.

        Args:
            state: of this training.
            data: any iterable of batches; or with an `order` arrays with all examples
                along the first axis, which lie on the device.
            order: row t holds the examples of step t, as `order_of_epoch` gives it; all
                steps are then one program.
            loop: with an order, a program for each step instead: XLA's convolutions are
                several times slower within `lax.scan` on a CPU (jax issue 12868).

        Returns:
            The state after it, and sums over the steps, whose `means` are the metrics.

        Raises:
            ValueError: if there is no batch.
        """
        if order is None:
            return epochs.over(self, state, data)
        return epochs.within(self, state, data, order, loop=loop)

    @property
    def _optimizers(self) -> dict[str, optax.GradientTransformation]:
        return {"params": self.optimizer, "gates": self.gate_optimizer}

    def total(
        self, state: TrainingState, batch: PyTree, params: PyTree, own: PyTree
    ) -> tuple[Float[Array, ""], tuple[Metrics, PyTree, dict[str, Array]]]:
        """What a step descends on: the loss at one draw of the gates, and what the
        units and the parameters cost. Also the metrics, the rest that the network
        leaves, and the excess over a target."""
        key = fold_in(state.key, state.step)
        value, (found, rest) = self._task(state, batch, params, own, key)
        terms = self.gating.terms(own, state.step)
        cost = jnp.zeros((), value.dtype)
        if self._objective is not None:
            share = self.gating.norm_share(own, state.step)
            there = self.gating.there(own, state.step)
            paid = self._objective(params, terms, share, there)
            cost = cost + paid.astype(value.dtype)
        if self.penalty is not None:
            cost = cost + jnp.asarray(self.penalty(params)).astype(value.dtype)
        metrics = {"loss": value, "penalty": cost, **found}
        excess: dict[str, Array] = {}
        if self._constraint is not None:
            excess = self._constraint.excess(params, terms, state.step)
            term = self._constraint.term(state.dual, excess)
            cost = cost + term.astype(value.dtype)
            for name, strength in self._constraint.strength(state.dual).items():
                metrics[f"multiplier of {name}"] = strength
                metrics[f"excess of {name}"] = excess[name]
        return value + cost, (metrics, rest, excess)

    def _task(self, state: TrainingState, batch, params, own, key):
        """The loss of the task, the metrics, and the rest after it."""

        alone = getattr(self.gating, "per_example", False)

        def at(params, batch, key):
            value, (found, rest) = self.task(params, state.rest, batch, key)
            written = losses.written(state.rest, rest) if alone else None
            if written:
                raise ValueError(
                    "gates for each example give each example a network of its own, "
                    f"which can't write {written!r} for all: train "
                    "without per_example, or a model that writes nothing"
                )
            return value, (found, rest)

        def drawn(batch, key):
            return self.gating.value(
                params, own, state.step, key, self._gated, lambda p: at(p, batch, key)
            )

        if not alone:
            return drawn(batch, key)

        def one(key, example):
            return drawn(jax.tree.map(lambda a: a[None], example), key)

        examples = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
        keys = jax.random.split(key, examples.pop())
        value, (found, _) = jax.vmap(one)(keys, batch)
        value, found = jax.tree.map(lambda a: a.mean(0), (value, found))
        return value, (found, state.rest)

    def task(
        self,
        params: PyTree,
        rest: PyTree,
        batch: PyTree,
        key: PRNGKeyArray,
        *,
        training: bool = True,
        loss: Loss | None = None,
    ) -> tuple[Float[Array, ""], tuple[Metrics, PyTree]]:
        """A loss at given parameters, its metrics, and the rest that is left.

        Raises:
            ValueError: as `train.tasks.Task`.
        """
        return self._task_of(loss)(params, rest, batch, key, training=training)

    def _task_of(self, loss: Loss | None = None) -> Task:
        return Task(self.network, loss or self.loss, self.compute)

    # -------------------------------------------------------------- what is left

    def averaged(self, state: TrainingState) -> tuple[PyTree, PyTree]:
        """Parameters and gates as they are evaluated: their Polyak average, if there is
        one."""
        theta = {"params": state.params, "gates": state.gates}
        if self.polyak:
            theta = averages.read(state.average, theta)
        return theta["params"], theta["gates"]

    def decide(self, state: TrainingState, rule: str | None = None) -> Decision:
        """Which units are left at test time, and how much that is.

        Args:
            state: of this training.
            rule: "budget", the units with the largest logits that fit into the target,
                which is the default where there is one; or a rule of the gate family or
                of `gating.RULES`, by default that of `Learned`.

        Raises:
            ValueError: for the rule "budget" without a target, or an unknown rule.
        """
        return deciding.decide(self, state, rule)

    def evaluate(
        self,
        state: TrainingState,
        batches: Iterable[PyTree],
        loss: Loss | None = None,
        *,
        rule: str | Decision | None = None,
    ) -> dict[str, Any]:
        """The means of a loss and its metrics over batches, in evaluation mode and with
        gates as at test time: numbers, and arrays of metrics that are no scalars.

        Args:
            state: of this training.
            batches: of one size, but for the last: means are weighted by the numbers of
                examples along the first axes of their arrays.
            loss: `loss(model, batch) -> (value, metrics)`; that of the training if
                None.
            rule: of the gates, as for `decide`, or what that has decided.

        Raises:
            ValueError: if there is no batch, or one of which nobody knows how many
                examples it has: its arrays differ in length.
        """
        params = self.folded(state, self._decided(state, rule))
        task, total, count = self._task_of(loss), None, 0
        for batch in batches:
            batch = self.placement.split_if_even(batch)
            size = losses.examples_of(batch)
            found = tasks.evaluated(task, params, state.rest, batch, state.key)
            placement.keep_pace(self.placement.mesh, found)
            found = tasks.times(found, size)
            total = found if total is None else tasks.plus(total, found)
            count += size
        if total is None:
            raise ValueError("there is no batch to evaluate")
        return {name: losses.mean(value, count) for name, value in total.items()}

    def _decided(self, state: TrainingState, rule: str | Decision | None) -> Decision:
        return rule if isinstance(rule, Decision) else self.decide(state, rule)

    def folded(self, state: TrainingState, decision: Decision) -> PyTree:
        """The parameters that are evaluated, with gates of test time multiplied in."""
        params, own = self.averaged(state)
        # What follows are many small programs, all of which would wait for these.
        placement.wait(self.placement.mesh, params)
        z = {name: jnp.asarray(values) for name, values in decision.z.items()}
        return self.gating.fold(params, own, z, self._gated)

    def recalibrate(
        self,
        state: TrainingState,
        batches: Iterable[PyTree],
        *,
        rule: str | Decision | None = None,
    ) -> TrainingState:
        """The state with running statistics that are those of batches under the gates
        of test time: other ones than under gates that are drawn.

        They are the means over batches of what each batch alone would leave, however
        the network weighs old ones: what it writes is a n + (1 - a) b of the old n and
        the batch's b, and two n tell both.

        Args:
            state: of this training.
            batches: run in training mode.
            rule: of the gates, as for `evaluate`.

        Raises:
            ValueError: if there is no batch, or the network writes a real array that is
                no running average.
        """
        params = self.folded(state, self._decided(state, rule))
        task, total, count = self._task_of(), None, 0
        for batch in batches:
            batch = self.split(batch)
            found = tasks.statistics(task, params, state.rest, batch, state.key)
            placement.keep_pace(self.placement.mesh, found)
            total = found if total is None else tasks.plus(total, found)
            count += 1
        if total is None:
            raise ValueError("there is no batch to recalibrate with")
        moved = {}
        for path, (sum_of, average) in total.items():
            if not bool(average == count):
                raise ValueError(
                    f"{path!r} is no running average of what batches have, and can't "
                    "be recalibrated"
                )
            moved[path] = sum_of / count
        return self.placed(state._replace(rest=units.replace(state.rest, moved)))

    def whole_model(
        self, state: TrainingState, rule: str | Decision | None = None
    ) -> Any:
        """The network at its present width in evaluation mode, with gates folded in: a
        module, or `(apply, variables)`."""
        params = self.folded(state, self._decided(state, rule))
        return self.network.whole(self.network.tree(params, state.rest))

    def finish(self, state: TrainingState, rule: str | Decision | None = None) -> Any:
        """What is left: the network without the units that are closed, gates folded in.
        Rules are as for `evaluate`.

        Returns:
            For an NNX module one of the same class with smaller arrays, in evaluation
            mode, or a `l0jax.nnx.Narrowed` where its code computes from its sizes or
            can't be told them; else a pair `(apply, variables)`. Arrays are JAX's.

        Warns:
            UserWarning: if many gates of a group are undecided: what is decided then
                differs from what was trained.
        """
        decision = self._decided(state, rule)
        deciding.warn_undecided(decision)
        params = self.folded(state, decision)
        tree = self.placement.on_host(self.network.tree(params, state.rest))
        if not self.structure.groups:
            return _of_jax(self.network.whole(tree))
        keep = units.in_use(tree, self.structure.groups)
        return _of_jax(self.network.finished(tree, keep, self.structure))

    # -------------------------------------------------------------- compaction

    def compact(
        self, state: TrainingState, examples_to_come: int | None = None
    ) -> tuple["Training", TrainingState]:
        """The training and the state without units that are dead for good, if that is
        worth another compilation; else as they are. Units of inputs stay. See
        `Compaction`.

        Args:
            state: of this training.
            examples_to_come: how many examples will still be trained on, if known.
        """
        return compacting.compact(self, state, examples_to_come)

    def without(
        self, state: TrainingState, keep: Keep
    ) -> tuple["Training", TrainingState]:
        """The training and the state without the units that are not kept: parameters,
        gates, statistics, running average and whatever the optimisers keep.

        The loss is as before, and so are the next steps, but for three things that look
        at how many units there are: a norm that has no mean to take off (`RMSNorm`)
        gets a scale that makes up for them, and from there on another rate than it had;
        optimisers that take the norm of a whole layer (LAMB, LARS, clipping by layers)
        miss the units that were closed; noise of an optimiser is drawn anew.

        Raises:
            ValueError: as `l0jax.shrink`; if the network's code is another function
                when its arrays are smaller; if an optimiser keeps an array, not only
                a number, in another shape than that of its parameter.
        """
        return compacting.without(self, state, keep)

    def at(self, alive: Keep) -> "Training":
        """The training of which only some units of the whole network are left, as a
        checkpoint tells: with arrays of the right shapes and any values."""
        if all(flags.all() for flags in alive.values()):
            return self
        state = self.start(jax.random.key(0))
        return self.without(state, alive)[0]

    def full(self, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Vectors of the units that are left, laid out as in the whole network, with
        zeros for those that are gone."""
        laid = {}
        for name, vector in values.items():
            flags = self.alive[name]
            laid[name] = np.zeros(len(flags), np.asarray(vector).dtype)
            laid[name][flags] = np.asarray(vector)
        return laid


def _of_jax(found: Any) -> Any:
    """What is left, with arrays of JAX: those that lie on the host can't be written,
    and have no `.at`, which layers use."""
    if isinstance(found, tuple):
        apply, variables = found
        return apply, jax.tree.map(jnp.array, variables)
    graph, tree = nnx.split(found)
    return nnx.merge(graph, jax.tree.map(jnp.array, tree))


_REPLACEABLE = (
    "loss",
    "gating",
    "price",
    "target",
    "weight_decay",
    "penalty",
    "optimizer",
    "gate_optimizer",
    "polyak",
    "compaction",
    "mesh",
    "sharding",
    "compute",
)


def _take(training: Training, state: TrainingState, batch: PyTree):
    return training.taken(state, batch)


_step = jax.jit(_take, static_argnums=0, donate_argnums=1)
