"""A loss of a network on a batch: what is differentiated, and what is evaluated."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from l0jax import gating, units
from l0jax.train import losses
from l0jax.train.losses import Loss, Metrics
from l0jax.train.networks import Network


class Task:
    """A network, a loss, and the dtype in which both run. Equal for all trainings of
    one network, whatever their prices, targets and optimisers: programs that need no
    more are compiled once for them.

    Args:
        network: what runs.
        loss: of a batch.
        compute: the dtype; None: as its arrays are.
    """

    def __init__(self, network: Network, loss: Loss, compute: Any):
        self.network, self.loss, self.compute = network, loss, compute
        self._key = network.key, loss, compute
        try:
            hash(self._key)
        except TypeError:  # Attributes of a module, or of a loss, may have no hash.
            self._key = id(network), id(loss), compute

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Task) and self._key == other._key

    def __call__(
        self,
        params: PyTree,
        rest: PyTree,
        batch: PyTree,
        key: PRNGKeyArray,
        *,
        training: bool = True,
    ) -> tuple[Float[Array, ""], tuple[Metrics, PyTree]]:
        """The loss at given parameters, its metrics, and the rest that is left.

        Raises:
            ValueError: unless the loss is a scalar with metrics that are arrays; if the
                network changes the shape of what it writes.
        """
        wants_key = "key" in inspect.signature(self.loss).parameters
        lower = (params, batch)
        if self.compute is not None:
            lower = jax.tree.map(self._computed, lower)
        model, left = self.network.run(
            lower[0], rest, gating.key_for(key, "network"), training
        )
        more = {"key": gating.key_for(key, "loss")} if wants_key else {}
        found = self.loss(model, lower[1], **more)
        value, metrics = losses.checked(self.loss, found)
        after = left()
        losses.check_rest(rest, after)
        after = jax.tree.map(
            lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype),
            after,
            rest,
        )
        return value, (metrics, after)

    def _computed(self, leaf: Any) -> Any:
        """A float in the dtype in which the network runs."""
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(leaf).astype(self.compute)


@functools.partial(jax.jit, static_argnums=0)
def evaluated(
    task: Task, params: PyTree, rest: PyTree, batch: PyTree, key: PRNGKeyArray
) -> Metrics:
    """The loss of a batch and its metrics, in evaluation mode."""
    value, (metrics, _) = task(params, rest, batch, key, training=False)
    return {"loss": value, **metrics}


@functools.partial(jax.jit, static_argnums=0)
def statistics(
    task: Task, params: PyTree, rest: PyTree, batch: PyTree, key: PRNGKeyArray
) -> dict[str, tuple[Array, Array]]:
    """For each running average what a batch alone would leave, and whether it is
    one."""
    floating = {
        path: leaf
        for path, leaf in units.arrays(rest).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }

    def after(before: dict[str, Array]) -> dict[str, Array]:
        _, (_, left) = task(params, units.replace(rest, before), batch, key)
        left = units.arrays(left)
        return {path: left[path] for path in floating}

    zero = after({path: jnp.zeros_like(leaf) for path, leaf in floating.items()})
    # Old values as large as what the batch has: beside it smaller ones would be lost.
    size = {path: jnp.maximum(jnp.abs(value), 1) for path, value in zero.items()}
    one = after(size)
    two = after({path: 2 * each for path, each in size.items()})
    found = {}
    for path, leaf in floating.items():
        old = (one[path] - zero[path]) / size[path]
        new = (two[path] - one[path]) / size[path]
        # What isn't written keeps its value.
        kept = jnp.all(old == 1)
        share = jnp.where(kept, 0.0, old)
        linear = jnp.allclose(new, old, rtol=1e-3, atol=1e-3)
        linear &= jnp.allclose(old, old.ravel()[0], rtol=1e-3, atol=1e-3)
        batch_alone = zero[path] / (1 - share)
        value = jnp.where(kept, leaf, batch_alone)
        found[path] = value, linear.astype(jnp.int32)
    return found


@jax.jit
def times(tree: PyTree, number: Array | int) -> PyTree:
    """All arrays times a number, in one program."""
    return jax.tree.map(lambda a: a * jnp.asarray(number, a.dtype), tree)


@jax.jit
def plus(tree: PyTree, other: PyTree) -> PyTree:
    """The sums of all arrays, in one program: on many devices each has its price."""
    return jax.tree.map(jnp.add, tree, other)
