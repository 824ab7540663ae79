"""The multilayer perceptron 784-300-100-10 of the L0 papers, at any widths."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from l0jax.costs import Operation
from l0jax.models.reads import Reads, select, slot_of_read
from l0jax.units import Group, Slot


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
            nnx.Linear(n_in, n_out, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
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
    def groups(self) -> dict[str, Group]:
        """One group for the inputs and one for each hidden layer (paper A, table 1)."""
        groups = {}
        for i, layer in enumerate(self.layers):
            size = layer.kernel.shape[0]
            used = (Slot(f"layers.{i}.kernel", 0),)
            if i == 0:
                made = (slot_of_read("reads", self.reads),)
            else:
                made = (
                    Slot(f"layers.{i - 1}.kernel", 1),
                    Slot(f"layers.{i - 1}.bias", 0),
                )
            name = "input" if i == 0 else f"hidden{i}"
            groups[name] = Group(name, size, used, made)
        return groups

    @property
    def charges(self) -> dict[str, tuple[Slot, ...]]:
        """A unit pays for the weights that read it."""
        return {name: group.used_by for name, group in self.groups.items()}

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The layers, for `l0jax.costs`."""
        return tuple(Operation(f"layers.{i}.kernel") for i in range(len(self.layers)))
