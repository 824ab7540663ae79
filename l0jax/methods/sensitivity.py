"""Scores of units by derivatives of the loss in their gates, which are open: z = 1.

A gate multiplies all values of its unit where they are read. The first derivative for
each example: Molchanov, Tyree, Karras, Aila and Kautz (2017), "Pruning convolutional
neural networks for resource efficient inference". Its mean: Mozer and Smolensky (1989),
"Skeletonization: a technique for trimming the fat from a network via relevance
assessment". The second: LeCun, Denker and Solla (1990), "Optimal brain damage".
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from l0jax.derivatives import bind
from l0jax.methods.batches import mean_over_batches
from l0jax.methods.keeping import check_scores
from l0jax.methods.task import Read, Task


def taylor(task: Task, *, normalise: bool = True) -> dict[str, Float[Array, " units"]]:
    r"""What the loss changes by, to first order, if a unit's values become zero:

    $$ \Theta_j = \frac{1}{N} \sum_i \Big| \frac{1}{M} \sum_m
       z_{ijm} \frac{\partial L_i}{\partial z_{ijm}} \Big| $$

    over N examples and the M values of unit j in an example, in all places where the
    group is read (Molchanov et al. 2017, eq. 8). The inner sum is the derivative
    of the example's loss in the unit's gate. Gates multiply values here rather than
    weights, so that each example has gates of its own and all examples still share
    their weights.

    Args:
        task: the network, examples and a loss.
        normalise: whether to divide the scores of each group by their L2 norm, as the
            paper does to compare units of different groups; scores that are all 0 stay
            0.

    Returns:
        `{group: scores}`, a score for each unit; the highest are to be kept.

    Raises:
        ValueError: if it can't be told where a group is read, or a score is not finite.
    """
    one = _one_example(task)
    lengths = {
        name: _values_per_unit(one, name, group.size)
        for name, group in task.structure.groups.items()
    }
    slopes_of = _slopes(one)

    def sizes(params, images, labels):
        slopes = slopes_of(task.open_gates, params, images, labels)
        return {n: jnp.abs(a).mean(axis=0) / lengths[n] for n, a in slopes.items()}

    scores = mean_over_batches(task, sizes, _zeros(task))
    check_scores(scores)
    if normalise:
        norms = {name: jnp.linalg.norm(values) for name, values in scores.items()}
        scores = {
            name: values / jnp.where(norms[name] > 0, norms[name], 1)
            for name, values in scores.items()
        }
    return scores


def fisher(task: Task) -> dict[str, Float[Array, " units"]]:
    r"""Half the empirical Fisher information of the unit's gate,
    $\frac{1}{2N} \sum_i (\partial L_i / \partial z_j)^2$ over N examples: what the loss
    grows by without the unit where the second derivative is about that (Theis,
    Korshunova, Tejani and Huszár 2018, "Faster gaze prediction with dense networks and
    Fisher pruning", eq. 9). One backward pass, where `obd` takes one for each unit.

    Returns:
        `{group: scores}`, a score for each unit; the highest are to be kept.

    Raises:
        ValueError: if it can't be told where a group is read, or a score is not finite.
    """
    slopes_of = _slopes(_one_example(task))

    def halves(params, images, labels):
        slopes = slopes_of(task.open_gates, params, images, labels)
        return {n: jnp.square(a).mean(axis=0) / 2 for n, a in slopes.items()}

    scores = mean_over_batches(task, halves, _zeros(task))
    check_scores(scores)
    return scores


def skeletonization(task: Task) -> dict[str, Float[Array, " units"]]:
    r"""Relevance: $-\partial L / \partial z_j$ of the mean loss in the unit's gate, to
    first order what the loss grows by without the unit (Mozer and Smolensky 1989, who
    take it of the sum of absolute errors; here it is of the loss of the task).

    Returns:
        `{group: scores}`, a score for each unit; the highest are to be kept.

    Raises:
        ValueError: if a score is not finite.
    """

    def relevance(params, images, labels):
        return jax.tree.map(
            jnp.negative,
            jax.grad(_mean_loss(task, params, images, labels))(task.open_gates),
        )

    scores = mean_over_batches(task, relevance, _zeros(task))
    check_scores(scores)
    return scores


def obd(task: Task) -> dict[str, Float[Array, " units"]]:
    r"""Saliency by the second derivative of the mean loss in the unit's gate,
    $\frac{1}{2} \partial^2 L / \partial z_j^2$: the saliency $\frac{1}{2} h_{kk} u_k^2$
    of LeCun et al. (1990, step 4 of their recipe) with the gate as the parameter
    $u_k = 1$.

    The diagonal of the Hessian is exact rather than the paper's approximation: one
    product with a unit vector for each unit, forward over reverse, which costs a pass
    through the network for each unit and batch. At a minimum no score is below 0;
    elsewhere some may be.

    Returns:
        `{group: scores}`, a score for each unit; the highest are to be kept.

    Raises:
        ValueError: if a score is not finite.
    """
    z, unravel = ravel_pytree(task.open_gates)

    def halves(params, images, labels):
        loss = _mean_loss(task, params, images, labels)
        _, product = jax.linearize(jax.grad(lambda z: loss(unravel(z))), z)
        unit = jnp.arange(z.size)
        diagonal = jax.lax.map(lambda j: product(jnp.float32(unit == j))[j], unit)
        return unravel(diagonal / 2)

    scores = mean_over_batches(task, halves, _zeros(task))
    check_scores(scores)
    return scores


def _one_example(task: Task) -> Task:
    """The task with a batch of one: `vmap` adds the axis of the examples, wherever the
    network moves its own."""
    images, labels = task.images[:1, :1], task.labels[:1, :1]
    return dataclasses.replace(task, images=images, labels=labels)


def _slopes(one: Task):
    """Of each example the derivative of its loss in the gates, (examples, units)."""
    reads = {
        name: [one.read(name, slot) for slot in group.used_by]
        for name, group in one.structure.groups.items()
    }

    def loss(z, params, image, label):
        outputs = _gated_outputs(one, reads, z, params, image[None])
        return one.loss(outputs, label[None])[0]

    return jax.vmap(jax.grad(loss), in_axes=(None, None, 0, 0))


def _mean_loss(task: Task, params: PyTree, images, labels):
    return lambda z: task.gated_loss(z, params, images, labels).mean()


def _zeros(task: Task) -> dict[str, Float[Array, " units"]]:
    return {n: jnp.zeros(g.size) for n, g in task.structure.groups.items()}


def _values_per_unit(one: Task, group: str, size: int) -> np.ndarray:
    """How many values each unit has in one example where the group is read."""
    count = np.zeros(size + 1, np.float32)
    for read in one.reads(group):
        shape = one.flow.shapes[read.value].shape
        np.add.at(count, read.unit_of, np.prod(shape) / shape[read.axis])
    return np.maximum(count[:-1], 1)


def _gated_outputs(
    task: Task,
    reads: Mapping[str, list[Read]],
    z: Mapping[str, Float[Array, " units"]],
    params: PyTree,
    images,
):
    """What the network gives if gates multiply the values that kernels read."""
    gates: dict[tuple[int, int], list[tuple[str, Read]]] = {}
    for name, there in reads.items():
        for read in there:
            at = task.flow.reader(read.kernel).at
            gates.setdefault((at, read.value), []).append((name, read))

    def gated(step, numbers, there):
        for number, value in zip(numbers, there, strict=True):
            for name, read in gates.get((step.at, number), ()):
                factor = jnp.append(z[name], jnp.ones(1))[read.unit_of]
                shape = [1] * value.ndim
                shape[read.axis] = -1
                value = value * factor.astype(value.dtype).reshape(shape)
            yield value

    values = {**task.flow.constants, **task.flow.known(params, images)}
    for step in task.flow.steps:
        given = [*gated(step, step.ins, [values[number] for number in step.ins])]
        made = gated(step, step.outs, bind(step.eqn, given))
        values.update(zip(step.outs, made, strict=True))
    return values[task.flow.outs[0]]
