"""Many steps: over any iterable of batches, or in one compiled program over data that
lies on the device; and many trainings that differ in numbers, in one program."""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from l0jax import gating
from l0jax.train import losses, placement

if TYPE_CHECKING:
    from l0jax.train.training import Training, TrainingState


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

    @property
    def means(self) -> dict[str, Any]:
        """The mean of each metric over the steps: numbers, and arrays of what is none.

        Raises:
            FloatingPointError: if a loss was not finite.
        """
        totals = jax.device_get(self)
        if totals.first_bad_step >= 0:
            raise FloatingPointError(
                f"the loss is not finite at step {int(totals.first_bad_step)}: a "
                "smaller learning rate may help, unless the order of the examples has "
                "rows that the data don't have"
            )
        steps = int(totals.steps)
        return {name: losses.mean(each, steps) for name, each in totals.sums.items()}

    def plus(self, other: "Totals") -> "Totals":
        """Of these steps and of others that came later."""
        sums = {name: total + other.sums[name] for name, total in self.sums.items()}
        bad = jnp.where(
            self.first_bad_step < 0, other.first_bad_step, self.first_bad_step
        )
        return Totals(self.steps + other.steps, sums, bad)


_plus = jax.jit(Totals.plus, donate_argnums=0)


def none_yet(metrics: Mapping[str, Any]) -> Totals:
    """Totals of no steps, for metrics of such shapes."""
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


def over(
    training: "Training", state: "TrainingState", batches: Iterable[PyTree]
) -> tuple["TrainingState", Totals]:
    """Steps over batches as they come; nothing waits for the device.

    Raises:
        ValueError: if there is no batch.
    """
    totals = None
    for batch in batches:
        state, metrics = training.step(state, batch)
        totals = none_yet(metrics) if totals is None else totals
        totals = _added(totals, metrics, state.step)
    if totals is None:
        raise ValueError("there is no batch to train on: the loader yields nothing")
    return state, totals


@functools.partial(jax.jit, donate_argnums=0)
def _added(totals: Totals, metrics: Mapping[str, Array], after: Array) -> Totals:
    return add(totals, metrics, after - 1)


def within(
    training: "Training",
    state: "TrainingState",
    data: PyTree,
    order: Int[Array, "steps batch"] | Int[np.ndarray, "steps batch"],
    *,
    loop: bool = False,
) -> tuple["TrainingState", Totals]:
    """Steps over examples that lie on the device, in one program or in a loop; see
    `Training.epoch`."""
    order = np.asarray(order) if loop else order
    check_rows(data, order)
    data = training.placement.everywhere(data)
    if loop:
        return over(training, state, (_taken(training, data, each) for each in order))
    state, totals = _scan(training, state, data, jnp.asarray(order))
    placement.keep_pace(training.placement.mesh, totals.first_bad_step)
    return state, totals


def check_rows(data: PyTree, order: Any) -> None:
    """Raises ValueError unless an order has steps, of rows that all arrays of the data
    have. (Everything would wait for an order that lies on a device: that is looked at
    where it is, by `many`.)
    """
    examples = losses.examples_of(data)
    if not math.prod(np.shape(order)):
        raise ValueError(
            f"there is no step to take: the order has the shape {np.shape(order)}, and "
            f"the data {examples} examples; is a batch larger than that?"
        )
    if isinstance(order, np.ndarray) and not 0 <= order.min() <= order.max() < examples:
        raise ValueError(
            f"the order names the rows {order.min()} to {order.max()}, and the data "
            f"have {examples} examples"
        )


def _part(training: "Training", data: PyTree, rows: Any) -> PyTree:
    """Some of the examples, taken where the whole data lie, on every device; each goes
    on with its part."""
    batch = jax.tree.map(lambda a: a.at[rows].get(mode="clip"), data)
    return training.split(batch)


_taken = jax.jit(_part, static_argnums=0)


def many(training: "Training", state, data, order) -> tuple["TrainingState", Totals]:
    """Steps over examples that lie on the device, as a pure function."""

    examples = losses.examples_of(data)

    def one(state, rows):
        after, metrics = training.taken(state, _part(training, data, rows))
        # Of rows that there are not others would be taken without a word.
        there = ((rows >= 0) & (rows < examples)).all()
        return after, metrics | {"loss": jnp.where(there, metrics["loss"], jnp.nan)}

    first = state.step
    if len(order) == 1:
        state, metrics = one(state, order[0])
        metrics = {name: each[None] for name, each in metrics.items()}
    else:
        state, metrics = jax.lax.scan(one, state, order)
    bad = ~jnp.isfinite(metrics["loss"] + metrics["penalty"])
    totals = Totals(
        jnp.asarray(len(order), jnp.int32),
        {name: each.sum(0) for name, each in metrics.items()},
        jnp.where(bad.any(), first + bad.argmax().astype(first.dtype), -1),
    )
    return state, totals


_scan = jax.jit(many, static_argnums=0, donate_argnums=1)


class Sweep:
    """Many trainings that differ in numbers, compiled into one program.

        sweep = Sweep(lambda price: training.replace(price=price), prices)
        states = sweep.start(keys)
        states, totals = sweep.epoch(states, data, orders)

    Members are split among the devices, and nothing passes between them: one that has
    died or diverged changes no other. Where they don't share evenly, the last one is
    trained more than once, and what that gives is dropped.

    Args:
        member: the training of one member from its settings, which are traced: numbers
            such as prices, targets and rates.
        settings: a pytree of arrays with the members along the first axis.
        devices: by default so many that none more would be done earlier: 12 members
            take as long on six devices as on eight. (Of a CPU, JAX makes one device per
            core with `jax.config.update("jax_num_cpu_devices", cores)`.)
        together: how many members a device steps at once, by `vmap`. By default all,
            but one after the other on a CPU, where the weights and the optimiser's
            moments of one small network fit into the cache and those of all do not.

    Attributes:
        members: how many there are.
        devices: those that members are split among.
    """

    def __init__(
        self,
        member: Callable[[Any], "Training"],
        settings: PyTree,
        *,
        devices: Sequence[jax.Device] | None = None,
        together: int | None = None,
    ):
        self.member = member
        self.settings = jax.tree.map(jnp.asarray, settings)
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(self.settings)}
        if len(sizes) != 1 or sizes == {()}:
            raise ValueError(
                "settings are arrays with the members along their first axis, all of "
                f"one length; got the shapes "
                f"{[jnp.shape(a) for a in jax.tree.leaves(self.settings)]}"
            )
        (self.members,) = sizes.pop()
        if devices is None:
            devices = jax.devices()
            turns = math.ceil(self.members / len(devices))
            devices = devices[: math.ceil(self.members / turns)]
        if not devices:
            raise ValueError("no device is given to put members on")
        self.devices = tuple(devices)
        self._idle = -self.members % len(devices)
        if together is None and devices[0].platform == "cpu":
            together = 1
        mesh = self._mesh = Mesh(np.asarray(devices), ("members",))
        each, all_of = PartitionSpec("members"), PartitionSpec()
        places = (each, each, all_of, each)

        def run(settings, states, data, orders):
            def one(of):
                settings, state, order = of
                return many(member(settings), state, data, order)

            members = (settings, states, orders)
            if together is None or together >= len(orders):
                return jax.vmap(one)(members)
            if together == 1:
                return jax.lax.map(one, members)
            return jax.lax.map(one, members, batch_size=together)

        sharded = jax.shard_map(
            run, mesh=mesh, in_specs=places, out_specs=each, check_vma=False
        )
        self._shardings = tuple(NamedSharding(mesh, place) for place in places)
        self._run = jax.jit(sharded, donate_argnums=1)

    def at(self, settings: PyTree) -> "Sweep":
        """The same program for as many members with other settings."""
        other = copy.copy(self)
        other.settings = jax.tree.map(jnp.asarray, settings)
        return other

    def of(self, at: int) -> "Training":
        """The training of a member, to evaluate or to finish it.

        Raises:
            IndexError: if there are fewer.
        """
        _check_member(at, self.members)

        def setting(a):
            return a[at].item() if a.ndim == 1 else a[at]

        return self.member(jax.tree.map(setting, self.settings))

    def start(
        self, keys: Sequence[PRNGKeyArray], models: Sequence[Any] | None = None
    ) -> "TrainingState":
        """The states of all members before the first step, along a new first axis; see
        `Training.start`."""
        begun = [None] * len(keys) if models is None else models
        return stack(
            [
                self.of(at).start(key, model)
                for at, (key, model) in enumerate(zip(keys, begun, strict=True))
            ]
        )

    def epoch(
        self,
        states: "TrainingState",
        data: PyTree,
        orders: Int[Array, "members steps batch"] | Int[np.ndarray, "..."],
        *,
        loop: bool = False,
    ) -> tuple["TrainingState", Totals]:
        """Steps of all members over examples that lie on the device; the states are
        given away. With `loop` each step is a program, as for `Training.epoch`; then
        `together` should be the number of members, for one after the other is a loop
        as well."""
        check_rows(data, orders)
        # What lies elsewhere has another type, for which it would be compiled again.
        here = (self._filled(self.settings), self._filled(states), data)
        settings, states, data = jax.device_put(here, self._shardings[:3])
        orders = self._filled(orders)
        pieces = [orders]
        if loop:
            pieces = np.split(np.asarray(orders), orders.shape[1], axis=1)
        totals = None
        for piece in pieces:
            rows = jax.device_put(piece, self._shardings[3])
            states, found = self._run(settings, states, data, rows)
            placement.keep_pace(self._mesh, found.first_bad_step)
            totals = found if totals is None else _plus(totals, found)
        assert totals is not None
        return self._own((states, totals))

    def _filled(self, tree: PyTree) -> PyTree:
        """What is along the first axis of the members, and of the last one again for
        devices that would have none."""
        if not self._idle:
            return tree

        def filled(a):
            joined = np if isinstance(a, np.ndarray) else jnp
            return joined.concatenate([a, *[a[-1:]] * self._idle])

        return jax.tree.map(filled, tree)

    def _own(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: a[: self.members], tree) if self._idle else tree


def _check_member(index: int, members: int) -> None:
    """(JAX would give the last one.)"""
    if not -members <= index < members:
        raise IndexError(f"there is no member {index} of {members}")


def stack(members: Sequence[PyTree]) -> PyTree:
    """One pytree of all members', along a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def member_of(states: PyTree, index: int) -> PyTree:
    """What a single run would have for the member at `index`.

    Raises:
        IndexError: if there are fewer.
    """
    _check_member(index, len(jax.tree.leaves(states)[0]))
    return jax.tree.map(lambda a: a[index], states)
