"""What a pruning method may look at: a network, its units, examples and a loss."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree, Shaped

from l0jax import units
from l0jax.dataflow import Dataflow, dataflow
from l0jax.structure import Structure
from l0jax.units import Slot


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Shaped[Array | np.ndarray, " batch"]
) -> Float[Array, " batch"]:
    """The loss of each example of a classification."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@dataclass(frozen=True)
class Read:
    """A value in which the units of a group are read.

    Attributes:
        kernel: path of the array that it is multiplied by; or, where gates stand on
            the making side too, of the kernel that makes it or of the table in which it
            was looked up.
        value: its number in the dataflow.
        axis: the axis along which the units lie.
        unit_of: the unit of each position of that axis, or -1.
    """

    kernel: str
    value: int
    axis: int
    unit_of: np.ndarray


@dataclass(frozen=True, eq=False)
class Task:
    """A network in evaluation mode, the units that may go, and what they are judged by.

    Args:
        apply: `apply(params, images)` gives the outputs, one row for each example.
        params: all arrays of the network.
        structure: of the network; units of its groups may be removed.
        images: examples in batches.
        labels: what the loss compares the outputs with, in the same batches.
        loss: `loss(outputs, labels)` gives a number for each example, any that can be
            differentiated.

    Raises:
        ValueError: if images and labels are not in the same batches.
    """

    apply: Callable[[Any, Any], Any]
    params: PyTree
    structure: Structure
    images: Shaped[Array | np.ndarray, "batches batch *shape"]
    labels: Shaped[Array | np.ndarray, "batches batch *target"]
    loss: Callable[[Any, Any], Any] = cross_entropy

    def __post_init__(self):
        if self.images.shape[:2] != self.labels.shape[:2] or 0 in self.images.shape[:2]:
            raise ValueError(
                "images and labels must be in the same batches, and not empty: got "
                f"{self.images.shape[:2]} and {self.labels.shape[:2]}"
            )

    @functools.cached_property
    def flow(self) -> Dataflow:
        """The values within the network, for one batch."""
        return dataflow(self.apply, self.params, self.images[0])

    @functools.cached_property
    def gated_loss(self) -> Callable[..., Float[Array, " batch"]]:
        """`gated_loss(z, params, images, labels)`: the loss of each example when gates
        of the values `z`, `{group: values}`, multiply what reads the units."""
        groups = self.structure.groups

        def gated_loss(z, params, images, labels):
            outputs = self.apply(units.apply_gates(params, z, groups), images)
            return self.loss(outputs, labels)

        return gated_loss

    @property
    def open_gates(self) -> dict[str, Float[Array, " units"]]:
        """A gate of 1 for every unit."""
        return {n: jnp.ones(g.size) for n, g in self.structure.groups.items()}

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """One batch of images and labels after the other."""
        yield from zip(self.images, self.labels, strict=True)

    def reads(self, group: str) -> list[Read]:
        """The values in which the units of `group` are read, each of them once.

        Raises:
            ValueError: if it can't be told along which axis they lie there.
        """
        found: dict[tuple, Read] = {}
        for slot in self.structure.groups[group].used_by:
            read = self.read(group, slot)
            # One value may hold some of the units at one place, others at another.
            found.setdefault((read.value, read.axis, tuple(read.unit_of)), read)
        return list(found.values())

    def read(self, group: str, slot: Slot) -> Read:
        """The value in which one of the arrays that use `group` reads its units.

        Raises:
            ValueError: as `reads`.
        """
        unit_of = units.owners(slot, self.structure.groups[group].size)
        made = self._axis_made(slot, len(unit_of))
        if made is not None:
            return Read(slot.path, self.flow.makes(slot.path), made, unit_of)
        value = self.flow.reads(slot.path)
        axis = self._axis(slot.path, slot.axis, value, len(unit_of))
        return Read(slot.path, value, axis, unit_of)

    def _axis_made(self, slot: Slot, length: int) -> int | None:
        """The axis of what an array makes along which its units lie, if it is there
        that they are gated: by a product's free axis, or in a table."""
        step, number = self.flow.reader(slot.path), self.flow.params[slot.path]
        if slot.axis is None or number not in step.ins:
            return None
        name, params = step.eqn.primitive.name, step.eqn.params
        if name == "gather" and step.ins[0] == number:
            return _axis_of_lookup(params, slot.axis, length)
        if name != "dot_general":
            return None
        side = step.ins.index(number)
        contracted, batch = params["dimension_numbers"]
        if slot.axis in (*contracted[side], *batch[side]):
            return None
        # What is kept apart comes first, then what is free of the left, of the right.
        free = [
            [
                at
                for at in range(len(self.flow.shapes[step.ins[each]].shape))
                if at not in (*contracted[each], *batch[each])
            ]
            for each in (0, 1)
        ]
        before = len(batch[0]) + (len(free[0]) if side else 0)
        return before + free[side].index(slot.axis)

    def _axis(self, path: str, kernel_axis: int | None, value: int, length: int) -> int:
        """The axis of `value` that the axis of the kernel is multiplied along."""
        step, shape = self.flow.reader(path), self.flow.shapes[value].shape
        axis = len(shape) - 1
        if self.flow.params[path] in step.ins:
            side = step.ins.index(self.flow.params[path])
            if step.eqn.primitive.name == "dot_general":
                contracted, _ = step.eqn.params["dimension_numbers"]
                if kernel_axis in contracted[side]:
                    at = list(contracted[side]).index(kernel_axis)
                    axis = contracted[1 - side][at]
            elif step.eqn.primitive.name == "conv_general_dilated":
                axis = step.eqn.params["dimension_numbers"].lhs_spec[1]
        if shape[axis] != length:
            raise ValueError(
                f"{step} reads {path!r}, whose units lie along an axis of {length}, "
                f"and a value of the shape {shape}: it can't be told along which axis "
                "they lie there"
            )
        return axis


def _axis_of_lookup(
    params: dict[str, Any], axis: int | None, length: int
) -> int | None:
    """Along which axis of what a gather gives a whole axis of its table lies."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    left = [at for at in range(len(sizes)) if at not in gone]
    if axis not in left or sizes[axis] != length:
        return None
    return numbers.offset_dims[left.index(axis)]


def task(
    model: nnx.Module,
    structure: Structure,
    images: Shaped[Array | np.ndarray, "examples *shape"],
    labels: Shaped[Array | np.ndarray, "examples *target"],
    batch_size: int = 128,
    loss: Callable[[Any, Any], Any] = cross_entropy,
) -> Task:
    """A `Task` of a Flax NNX module; examples beyond the last whole batch are left out.

    Raises:
        ValueError: if there are fewer examples than fill a batch, or not as many labels
            as images.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    batches = len(images) // batch_size
    if not batches:
        raise ValueError(
            f"{len(images)} examples don't fill a batch of {batch_size}: give more, or "
            "a smaller batch_size"
        )
    graph, state = nnx.split(model)
    cut = batches * batch_size

    def in_batches(a):
        return a[:cut].reshape(batches, batch_size, *a.shape[1:])

    return Task(
        lambda state, images: nnx.merge(graph, state)(images),
        state,
        structure,
        in_batches(images),
        in_batches(labels),
        loss,
    )
