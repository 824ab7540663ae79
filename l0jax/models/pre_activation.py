"""Residual networks with pre-activation for small images (He et al. 2016), narrow as
ResNet-56 or wide as WRN-28-10 (Zagoruyko and Komodakis 2016), at any widths."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from l0jax.models.layers import ImageModel, conv, global_average, norm


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

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch ho wo o"]:
        """What leaves the block."""
        active = jax.nn.relu(self.norm1(x))
        # A projection reads what the convolutions read, the identity what came in.
        beside = x if self.shortcut is None else self.shortcut(active)
        active = jax.nn.relu(self.norm2(self.conv1(active)))
        return beside + self.conv2(active)


class PreActivationResNet(ImageModel):
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
        check_stages(stem, stages, inner, project)
        self.shape = tuple(shape)
        self.stem = conv(shape[2], stem, rngs=rngs)
        self.depths = tuple(map(len, inner))
        channels, blocks = stem, []
        for stage, (width, within) in enumerate(zip(stages, inner, strict=True)):
            for at, each in enumerate(within):
                stride = 2 if stage and not at else 1
                beside = project[stage] and not at
                blocks.append(Block(channels, each, width, stride, beside, rngs=rngs))
                channels = width
        self.blocks = nnx.List(blocks)
        self.norm = norm(channels, rngs)
        self.head = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, images: Float[Array, "batch h w c"]) -> Float[Array, "batch k"]:
        """Logits of each class."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(global_average(jax.nn.relu(self.norm(x))))

    @property
    def architecture(self) -> dict:
        """Arguments of the constructor that rebuild this shape, for files."""
        blocks, stages, inner, project = iter(self.blocks), [], [], []
        for depth in self.depths:
            here = [next(blocks) for _ in range(depth)]
            inner.append([block.conv1.kernel.shape[3] for block in here])
            stages.append(here[0].conv2.kernel.shape[3])
            project.append(here[0].shortcut is not None)
        return {
            "stem": self.stem.kernel.shape[3],
            "stages": stages,
            "inner": inner,
            "project": project,
            "classes": self.head.kernel.shape[1],
            "shape": list(self.shape),
        }


def check_stages(
    stem: int, stages: Sequence[int], inner: Sequence, project: Sequence[bool]
) -> None:
    """Raises ValueError for stages that don't fit each other."""
    if not len(stages) == len(inner) == len(project):
        raise ValueError(
            f"stages has {len(stages)} entries, inner {len(inner)} and project "
            f"{len(project)}: give one each for every stage"
        )
    widths = [stem, *stages]
    for stage, beside in enumerate(project):
        if not beside and (stage or widths[stage] != widths[stage + 1]):
            raise ValueError(
                f"stage {stage} goes from {widths[stage]} to {widths[stage + 1]} "
                f"channels{' with stride 2' if stage else ''}: project must be True "
                "there"
            )


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
