"""The linear system of a layer: what its kernel sees, and what it should make of it.

Methods that reconstruct a layer (ThiNet, channel pruning) look at some positions of its
output. There the output y of the layer is the product of the kernel W with the window x
that the kernel sees: y = Wᵀ x, without the bias. An entry of x is one weight of each
output: one channel at one position of the window.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped

from l0jax import units
from l0jax.methods.task import Task

# Singular values below this share of the largest are the rounding of float32.
RANK_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Product:
    """A layer that is a product of windows with a kernel.

    Attributes:
        path: of the kernel.
        shape: of the kernel.
        outputs_axis: axis of the kernel along which its outputs lie.
        value: number of the value that it reads, in the dataflow.
        makes: number of the value that it makes.
        channels_axis: axis of that value along which the outputs lie.
    """

    path: str
    shape: tuple[int, ...]
    outputs_axis: int
    value: int
    makes: int
    channels_axis: int

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        return self.shape[self.outputs_axis]

    @property
    def entries(self) -> int:
        """The length of a window."""
        return math.prod(self.shape) // self.outputs

    def of_entries(self, axis: int, along: np.ndarray) -> np.ndarray:
        """For each entry what belongs to its position along an axis of the kernel."""
        spread = along[np.indices(self.shape)[axis]]
        return np.moveaxis(spread, self.outputs_axis, -1)[..., 0].ravel()

    def matrix(self, kernel: Any) -> Float[np.ndarray, "entries outputs"]:
        """The kernel as a matrix."""
        last = np.moveaxis(np.asarray(kernel, np.float64), self.outputs_axis, -1)
        return last.reshape(-1, last.shape[-1])

    def kernel(self, matrix: Any) -> Any:
        """The kernel of a matrix, in its own shape: an array of NumPy or of JAX."""
        last = [n for at, n in enumerate(self.shape) if at != self.outputs_axis]
        shaped = matrix.reshape(*last, self.outputs)
        axes = list(range(len(last)))
        axes.insert(self.outputs_axis, len(last))
        return shaped.transpose(axes)


@dataclass(frozen=True, eq=False)
class Layer(Product):
    """The layer that alone reads the units of a group.

    Attributes:
        group: name of the group.
        unit_of: the unit of each entry, or -1 for one that isn't of the group.
    """

    group: str
    unit_of: Int[np.ndarray, " entries"]


@dataclass(frozen=True, eq=False)
class Rows:
    """The linear system `inputs @ W = targets` of a layer.

    Attributes:
        inputs: the windows, of the network as it is now.
        targets: what the layer makes at the same positions of the base network.
        kernel: W as it is now.
        unit_of: the unit of each entry, or -1.
        size: number of units.
    """

    inputs: Float[np.ndarray, "rows entries"]
    targets: Float[np.ndarray, "rows outputs"]
    kernel: Float[np.ndarray, "entries outputs"]
    unit_of: Int[np.ndarray, " entries"]
    size: int

    @property
    def owners(self) -> Float[np.ndarray, "entries units"]:
        """1 where an entry is of a unit: sums over a unit's entries are products."""
        # An entry of no unit has the last row, -1.
        return np.eye(self.size + 1)[self.unit_of][:, :-1]

    @property
    def targets_of_units(self) -> Float[np.ndarray, "rows outputs"]:
        """The targets without what entries of no unit make."""
        rest = self.unit_of < 0
        return self.targets - self.inputs[:, rest] @ self.kernel[rest]


def layer(task: Task, group: str) -> Layer:
    """The layer that reads the units of `group`.

    Raises:
        ValueError: if there is no such group; if several layers read its units; if the
            operation that does isn't a product with a kernel that has one axis of
            outputs.
    """
    if group not in task.structure.groups:
        there = ", ".join(task.structure.groups)
        raise ValueError(f"unknown group {group!r}; there is {there}")
    slots = task.structure.groups[group].used_by
    # A value that two kernels read is one place, but it would be two linear systems.
    if len(slots) != 1 or slots[0].axis is None:
        readers = ", ".join(slot.path for slot in slots)
        raise ValueError(
            f"group {group!r} is read at {len(slots)} places ({readers}), and one "
            "layer's output is reconstructed: leave such groups out, as "
            "structure.only(...) does"
        )
    ((read,), path) = task.reads(group), slots[0].path
    try:
        of = product(task, path)
    except ValueError as error:
        raise ValueError(f"group {group!r}: {error}") from None
    if of.outputs_axis == slots[0].axis:
        raise ValueError(
            f"group {group!r}: its units lie along the outputs of {path!r}"
        )
    fields = {f.name: getattr(of, f.name) for f in dataclasses.fields(of)}
    unit_of = of.of_entries(slots[0].axis, read.unit_of)
    return Layer(**fields, group=group, unit_of=unit_of)


def product(task: Task, path: str) -> Product:
    """The layer whose kernel is at `path`.

    Raises:
        ValueError: if the operation that reads the kernel isn't a product with one axis
            of outputs.
    """
    flow = task.flow
    shape, makes = flow.shapes[flow.params[path]].shape, flow.makes(path)
    made = [op.makes for op in task.structure.operations if op.kernel == path]
    step = flow.reader(path)
    if len(made) != 1 or len(made[0]) != 1:
        raise ValueError(
            f"{step}, which reads {path!r}, isn't one product with one axis of outputs"
        )
    ((outputs_axis,),) = made
    channels_axis = len(flow.shapes[makes].shape) - 1
    if step.eqn.primitive.name == "conv_general_dilated":
        channels_axis = step.eqn.params["dimension_numbers"].out_spec[1]
    if flow.shapes[makes].shape[channels_axis] != shape[outputs_axis]:
        raise ValueError(
            f"{step} makes a value of the shape {flow.shapes[makes].shape} with the "
            f"kernel {path!r} of {shape}: its {shape[outputs_axis]} outputs should lie "
            f"along axis {channels_axis}"
        )
    value = flow.reads(path)
    return Product(path, shape, outputs_axis, value, makes, channels_axis)


def rows(
    task: Task, of: Layer, key: PRNGKeyArray, params: PyTree, positions: int = 10
) -> Rows:
    """The linear system of a layer at random positions of its output.

    Args:
        task: `task.params` are the base network, which gives the targets.
        of: the layer.
        key: draws the positions, other ones of every example.
        params: the network as pruned so far, which gives the inputs and the kernel.
        positions: so many of each example, or all if it has fewer.

    Raises:
        ValueError: if `positions` is not positive; if the layer isn't linear in its
            kernel with the same window for all outputs, as a convolution in groups.
    """
    if positions < 1:
        raise ValueError(f"positions must be at least 1, got {positions}")
    inputs, targets = [], []
    kernel = of.matrix(units.arrays(params)[of.path])
    for x, y, now in _batches(task, of, key, params, positions):
        if not inputs:
            _check_product(task, of, x @ kernel, now)
        inputs.append(x)
        targets.append(y)
    size = task.structure.groups[of.group].size
    x, y = np.concatenate(inputs), np.concatenate(targets)
    return Rows(x.astype(np.float64), y.astype(np.float64), kernel, of.unit_of, size)


class Windows(NamedTuple):
    """Some of what a layer sees and makes of a batch."""

    inputs: Float[Array, "rows entries"]
    targets: Float[Array, "rows outputs"]
    now: Float[Array, "rows outputs"]


def windows(
    task: Task,
    layers: Sequence[Product],
    positions: int,
    key: PRNGKeyArray,
    params: PyTree,
    base: PyTree,
    images: Shaped[Array, "batch *shape"],
) -> list[Windows]:
    """What layers see at random positions of their outputs, and make of it, without
    their biases. A function of JAX, to be compiled.

    Args:
        task: of which only the network is used.
        layers: that are looked at.
        positions: so many of each example, or all if it has fewer.
        key: draws them.
        params: give the inputs and what is made now.
        base: give the targets.
        images: a batch.
    """
    wanted = [number for of in layers for number in (of.value, of.makes)]
    now = task.flow.evaluate(task.flow.known(params, images), wanted)
    makes = [of.makes for of in layers]
    targets = task.flow.evaluate(task.flow.known(base, images), makes)
    return [
        Windows(
            *_sample(
                task,
                of,
                positions,
                jax.random.fold_in(key, at),
                params,
                now[2 * at],
                now[2 * at + 1],
                targets[at],
            )
        )
        for at, of in enumerate(layers)
    ]


def _batches(
    task: Task, of: Layer, key: PRNGKeyArray, params: PyTree, positions: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Windows, targets, and what the layer makes of the windows now."""
    # Apart from each other, so that the network is compiled once for both parameters.
    network = jax.jit(functools.partial(_network, task, of))
    sample = jax.jit(functools.partial(_sample, task, of, positions))
    for at, (images, _) in enumerate(task.batches()):
        value, now = network(params, images)
        _, target = network(task.params, images)
        found = sample(jax.random.fold_in(key, at), params, value, now, target)
        yield tuple(np.asarray(each) for each in found)


def _network(task: Task, of: Product, params, images):
    return task.flow.evaluate(task.flow.known(params, images), [of.value, of.makes])


def _sample(task: Task, of: Product, positions: int, key, params, value, now, target):
    flow, kernel = task.flow, task.flow.params[of.path]
    outputs, entries = of.outputs, of.entries
    known = {**flow.known(params), of.value: value}

    def by_position(made):
        made = jnp.moveaxis(made, of.channels_axis, -1)
        return made.reshape(len(made), -1, outputs)

    # The places of the largest of random numbers: each place at most once.
    shuffled = jax.random.uniform(key, by_position(now).shape[:2])
    chosen = jax.lax.top_k(shuffled, min(positions, shuffled.shape[1]))[1]

    def sampled(made):
        there = jnp.take_along_axis(by_position(made), chosen[..., None], axis=1)
        return there.reshape(-1, outputs)

    def window(start):
        """Entries from `start` on, as many as there are outputs."""
        at = start + jnp.arange(outputs)
        identity = jax.nn.one_hot(at, entries, axis=0, dtype=flow.shapes[kernel].dtype)
        (made,) = flow.evaluate({**known, kernel: of.kernel(identity)}, [of.makes])
        return sampled(made)

    # With columns of the identity for a kernel the layer's outputs are the entries of
    # its windows. So the layer itself says what it reads: any stride, padding and
    # layout, and functions with derivatives of their own, whose shapes are fixed. It
    # costs the layer once for each entry over outputs, some nine times where windows
    # are 3x3, which is less than the network before it.
    parts = jax.vmap(window)(jnp.arange(0, entries, outputs))
    x = jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1)[:, :entries]
    return tuple(a.astype(jnp.float32) for a in (x, sampled(target), sampled(now)))


def _check_product(task: Task, of: Layer, product, made) -> None:
    # Some accelerators multiply with ten bits; what isn't a product is far off.
    if np.abs(product - made).max() > 0.02 * np.abs(made).max() + 1e-6:
        raise ValueError(
            f"group {of.group!r}: what {task.flow.reader(of.path)} makes isn't the "
            f"product of windows with {of.path!r}, the same windows for all outputs: "
            "it can't be reconstructed"
        )


def least_squares(
    inputs: Float[np.ndarray, "rows entries"],
    targets: Float[np.ndarray, "rows *outputs"],
    start: Float[np.ndarray, "entries *outputs"],
) -> Float[np.ndarray, "entries *outputs"]:
    """The weights W nearest to `start` among those with the least ‖targets - inputs W‖.

    Where the rows don't determine the weights (a channel that is always zero, the copy
    of another, fewer rows than entries), these stay as near to `start` as can be.
    """
    missing = targets - inputs @ start
    return start + np.linalg.lstsq(inputs, missing, rcond=RANK_TOLERANCE)[0]


def fold(params: PyTree, of: Product, matrix: Float[np.ndarray, "entries outputs"]):
    """`params` with another kernel of the layer."""
    old = units.arrays(params)[of.path]
    new = jnp.asarray(of.kernel(matrix), old.dtype)
    return units.replace(params, {of.path: new})
