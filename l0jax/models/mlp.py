"""The multilayer perceptron 784-300-100-10 of the L0 papers, at any widths."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from l0jax.models.layers import HE_NORMAL
from l0jax.models.reads import Reads, select, slot_of_read
from l0jax.structure import Structure
from l0jax.units import Group, Groups, Slot


class MLP(nnx.Module):
    """Dense layers with ReLU between them.

    Args:
        features: widths from the input to the classes, `(784, 300, 100, 10)`.
        reads: how many of the inputs the first layer reads; all by default.
        rngs: where the initial weights come from.
    """

    def __init__(
        self, features: Sequence[int], reads: int | None = None, *, rngs: nnx.Rngs
    ):
        widths = [features[0] if reads is None else reads, *features[1:]]
        self.reads = Reads(jnp.arange(features[0]) < widths[0])
        self.layers = nnx.List(
            nnx.Linear(n_in, n_out, kernel_init=HE_NORMAL, rngs=rngs)
            for n_in, n_out in itertools.pairwise(widths)
        )

    def __call__(self, images: Float[Array, "batch *shape"]) -> Float[Array, "batch k"]:
        """Logits of each class."""
        x = images.reshape(images.shape[0], -1)
        x = select(x, self.reads, self.layers[0].kernel.shape[0])
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)

    @property
    def architecture(self) -> dict:
        """Arguments of the constructor that rebuild this shape, for files."""
        kernels = [layer.kernel.shape for layer in self.layers]
        return {
            "features": [self.reads.shape[0], *(n_out for _, n_out in kernels)],
            "reads": kernels[0][0],
        }

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """What the model can be traced with."""
        return jax.ShapeDtypeStruct((2, self.reads.shape[0]), jnp.float32)

    def edit(self, structure: Structure) -> Structure:
        """The paper's names for the groups, and the mask that marks the inputs."""
        hidden = {i: f"hidden{i}" for i in range(1, len(self.layers))}
        for i, name in hidden.items():
            if self.layers[i].kernel.shape[0] > 1:
                structure = structure.rename({f"layers.{i - 1}": name})
                continue
            # Tracing finds no units along an axis of one.
            made_by = Slot(f"layers.{i - 1}.bias", 0), Slot(f"layers.{i - 1}.kernel", 1)
            used_by = (Slot(f"layers.{i}.kernel", 0),)
            structure = structure.add(Group(name, 1, used_by, made_by))
        reads = slot_of_read("reads", self.reads)
        if "input" in structure.groups:
            structure = structure.extend("input", made_by=(reads,))
        else:
            # Some features are not read: the program gathers the others by an index,
            # and what is indexed can't be traced.
            size = self.layers[0].kernel.shape[0]
            used = (Slot("layers.0.kernel", 0),)
            structure = structure.add(Group("input", size, used, (reads,)))
        return structure.only("input", *hidden.values())

    def charges(self, groups: Groups) -> dict[str, tuple[Slot, ...]]:
        """A unit pays for the weights that read it."""
        return {name: group.used_by for name, group in groups.items()}
