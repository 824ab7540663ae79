"""Residual networks with pre-activation for small images (He et al. 2016), narrow as
ResNet-56 or wide as WRN-28-10 (Zagoruyko and Komodakis 2016), at any widths."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from l0jax.models.layers import LECUN_NORMAL, conv, global_average, norm
from l0jax.models.residual import ResidualModel, blocks_of


class Block(nnx.Module):
    """Two 3x3 convolutions, each after batch normalisation and ReLU, beside a shortcut.

    Args:
        inputs, inner, outputs: channels.
        stride: of the first convolution.
        project: whether the shortcut is a convolution.
        rngs: where the initial weights come from.
    """

    def __init__(
        self,
        inputs: int,
        inner: int,
        outputs: int,
        stride: int,
        project: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.norm1 = norm(inputs, rngs)
        self.conv1 = conv(inputs, inner, 3, stride, rngs=rngs)
        self.norm2 = norm(inner, rngs)
        self.conv2 = conv(inner, outputs, rngs=rngs)
        self.shortcut = conv(inputs, outputs, 1, stride, rngs=rngs) if project else None

    @property
    def inner(self) -> int:
        """Channels between the convolutions."""
        return self.conv1.kernel.shape[3]

    @property
    def outputs(self) -> int:
        """Channels that leave the block."""
        return self.conv2.kernel.shape[3]

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch ho wo o"]:
        """What leaves the block."""
        active = jax.nn.relu(self.norm1(x))
        # A projection reads what the convolutions read, the identity what came in.
        beside = x if self.shortcut is None else self.shortcut(active)
        active = jax.nn.relu(self.norm2(self.conv1(active)))
        return beside + self.conv2(active)


class PreActivationResNet(ResidualModel):
    """A convolution, stages of blocks of which all but the first begin with stride 2,
    batch normalisation, ReLU, the mean over all positions, one dense layer.

    Args:
        stem: channels of the first convolution.
        stages: channels between the blocks of each stage.
        inner: channels within the blocks of each stage, one number for each block.
        project: of each stage, whether the shortcut of its first block is a
            convolution; else it is the identity.
        classes: number of classes.
        shape: (height, width, channels) of an image.
        rngs: where the initial weights come from.

    Raises:
        ValueError: if `stages`, `inner` and `project` differ in length, or an identity
            would have to change the size.
    """

    def __init__(
        self,
        stem: int = 16,
        stages: Sequence[int] = (16, 32, 64),
        inner: Sequence[Sequence[int]] = ((16,) * 9, (32,) * 9, (64,) * 9),
        project: Sequence[bool] = (False, True, True),
        classes: int = 10,
        shape: Sequence[int] = (32, 32, 3),
        *,
        rngs: nnx.Rngs,
    ):
        self.shape = tuple(shape)
        self.stem = conv(shape[2], stem, rngs=rngs)
        self.depths = tuple(map(len, inner))
        self.blocks = nnx.List(
            blocks_of(Block, stem, stages, inner, project, rngs=rngs)
        )
        self.norm = norm(stages[-1], rngs)
        self.head = nnx.Linear(stages[-1], classes, kernel_init=LECUN_NORMAL, rngs=rngs)

    def __call__(self, images: Float[Array, "batch h w c"]) -> Float[Array, "batch k"]:
        """Logits of each class."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(global_average(jax.nn.relu(self.norm(x))))


def of_depth(depth: int, width: int = 16) -> dict:
    """The architecture of ResNet-`depth` for small images: 6n + 2 layers.

    Raises:
        ValueError: if there is none of this depth.
    """
    widths = (width, 2 * width, 4 * width)
    return _uniform("ResNet", depth, 2, width, widths) | {
        "project": (False, True, True)
    }


def wide(depth: int, factor: int) -> dict:
    """The architecture of WRN-`depth`-`factor`: 6n + 4 layers.

    Raises:
        ValueError: if there is none of this depth.
    """
    widths = (16 * factor, 32 * factor, 64 * factor)
    return _uniform("WRN", depth, 4, 16, widths) | {"project": (True, True, True)}


def _uniform(name: str, depth: int, beside: int, stem: int, stages) -> dict:
    blocks, rest = divmod(depth - beside, 6)
    if blocks < 1 or rest:
        raise ValueError(f"{name} has a depth of 6n + {beside}, got {depth}")
    return {
        "stem": stem,
        "stages": stages,
        "inner": tuple((width,) * blocks for width in stages),
    }
