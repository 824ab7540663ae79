"""LeNet-5-Caffe, 20-50-800-500, of the L0 papers, at any widths."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from l0jax.models.convolution import conv2d, max_pool_2x2
from l0jax.models.layers import HE_NORMAL
from l0jax.models.reads import Reads, select, slot_of_read
from l0jax.structure import Structure
from l0jax.units import Group, Groups, Slot

WINDOW = 5


class LeNet5(nnx.Module):
    """Two convolutions, each with 2x2 max pooling, and two dense layers.

    Args:
        shape: (height, width, channels) of an image.
        maps: feature maps of the two convolutions.
        reads: how many of the flattened features the first dense layer reads; all of
            them by default.
        hidden: units of the first dense layer.
        classes: number of classes.
        rngs: where the initial weights come from.
    """

    def __init__(
        self,
        shape: Sequence[int] = (28, 28, 1),
        maps: Sequence[int] = (20, 50),
        reads: int | None = None,
        hidden: int = 500,
        classes: int = 10,
        *,
        rngs: nnx.Rngs,
    ):
        height, width = (_after_convolutions(size) for size in shape[:2])
        if height < 1 or width < 1:
            raise ValueError(
                f"LeNet-5 needs images of at least 16 by 16, got {tuple(shape)}"
            )
        features = height * width * maps[1]
        reads = features if reads is None else reads
        self.shape = tuple(shape)
        self.conv1 = _conv(shape[2], maps[0], rngs)
        self.conv2 = _conv(maps[0], maps[1], rngs)
        mask = jnp.arange(features) < reads
        self.reads = Reads(mask.reshape(height, width, maps[1]))
        self.dense1 = _dense(reads, hidden, rngs)
        self.dense2 = _dense(hidden, classes, rngs)

    def __call__(
        self, images: Float[Array, "batch h w c"]
    ) -> Float[Array, "batch classes"]:
        """Logits of each class."""
        x = images
        for conv in (self.conv1, self.conv2):
            assert conv.bias is not None  # Flax's type allows for none
            x = conv2d(x, conv.kernel[...]) + conv.bias[...].reshape(1, 1, 1, -1)
            x = jax.nn.relu(max_pool_2x2(x))
        x = x.reshape(x.shape[0], -1)
        x = select(x, self.reads, self.dense1.kernel.shape[0])
        return self.dense2(jax.nn.relu(self.dense1(x)))

    @property
    def architecture(self) -> dict:
        """Arguments of the constructor that rebuild this shape, for files."""
        return {
            "shape": list(self.shape),
            "maps": [self.conv1.kernel.shape[3], self.conv2.kernel.shape[3]],
            "reads": self.dense1.kernel.shape[0],
            "hidden": self.dense2.kernel.shape[0],
            "classes": self.dense2.kernel.shape[1],
        }

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """What the model can be traced with."""
        return jax.ShapeDtypeStruct((2, *self.shape), jnp.float32)

    def edit(self, structure: Structure) -> Structure:
        """The paper's four groups: both kinds of maps, the flattened features, the
        hidden units. The features lie on the axis on which the maps of the second
        convolution are used too: a row is left if its map and its feature both are.
        """
        # Tracing finds no units along an axis of one.
        if self.conv2.kernel.shape[2] == 1:
            made = (Slot("conv1.bias", 0), Slot("conv1.kernel", 3))
            used = (Slot("conv2.kernel", 2),)
            structure = structure.add(Group("conv1", 1, used, made))
        if self.dense2.kernel.shape[0] == 1:
            made = (Slot("dense1.bias", 0), Slot("dense1.kernel", 1))
            used = (Slot("dense2.kernel", 0),)
            structure = structure.add(Group("hidden", 1, used, made))
        else:
            structure = structure.rename({"dense1": "hidden"})
        features = self.dense1.kernel.shape[0]
        used = (Slot("dense1.kernel", 0),)
        made = (slot_of_read("reads", self.reads),)
        structure = structure.add(Group("features", features, used, made))
        if "conv2" not in structure.groups:
            # Some features are not read: the program gathers the others by an index,
            # and what is indexed can't be traced.
            map_of_feature = tuple(np.nonzero(np.asarray(self.reads[...]))[2].tolist())
            used = (Slot("dense1.kernel", 0, map_of_feature),)
            made = (Slot("conv2.bias", 0), Slot("conv2.kernel", 3))
            maps = self.conv2.kernel.shape[3]
            structure = structure.add(Group("conv2", maps, used, made))
        structure = structure.extend("conv2", made_by=(Slot("reads", 2),))
        return structure.only("conv1", "conv2", "features", "hidden")

    def charges(self, groups: Groups) -> dict[str, tuple[Slot, ...]]:
        """The weights that a unit pays for in the paper: a map for its own filter and
        bias, a dense unit for the weights that read it."""
        return {
            name: tuple(slot for slot in group.made_by if slot.path != "reads")
            if name.startswith("conv")
            else group.used_by
            for name, group in groups.items()
        }


def _after_convolutions(size: int) -> int:
    for _ in range(2):
        size = (size - WINDOW + 1) // 2
    return size


def _conv(channels: int, maps: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        channels,
        maps,
        (WINDOW, WINDOW),
        padding="VALID",
        kernel_init=HE_NORMAL,
        rngs=rngs,
    )


def _dense(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, kernel_init=HE_NORMAL, rngs=rngs)
