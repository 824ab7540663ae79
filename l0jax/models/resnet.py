"""Residual networks for large images (He et al. 2016), at any widths."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from l0jax.models.layers import LECUN_NORMAL, conv, global_average, max_pool_3x3, norm
from l0jax.models.residual import ResidualModel, blocks_of

WIDTHS = (64, 128, 256, 512)


class Block(nnx.Module):
    """Convolutions with batch normalisation beside a shortcut: two of 3x3, or, as a
    bottleneck, 1x1, 3x3 and 1x1.

    Args:
        inputs, outputs: channels.
        inner: channels after each convolution but the last; two make a bottleneck.
        stride: of the first 3x3 convolution.
        project: whether the shortcut is a convolution.
        rngs: where the initial weights come from.
    """

    def __init__(
        self,
        inputs: int,
        inner: Sequence[int],
        outputs: int,
        stride: int,
        project: bool,
        *,
        rngs: nnx.Rngs,
    ):
        windows = (3, 3) if len(inner) == 1 else (1, 3, 1)
        strides = (stride, 1) if len(inner) == 1 else (1, stride, 1)
        widths = [inputs, *inner, outputs]
        self.convs = nnx.List(
            conv(widths[i], widths[i + 1], window, step, rngs=rngs)
            for i, (window, step) in enumerate(zip(windows, strides, strict=True))
        )
        self.norms = nnx.List(norm(width, rngs) for width in widths[1:])
        self.shortcut = conv(inputs, outputs, 1, stride, rngs=rngs) if project else None
        self.shortcut_norm = norm(outputs, rngs) if project else None

    @property
    def inner(self) -> list[int]:
        """Channels after each convolution but the last."""
        return [layer.kernel.shape[3] for layer in list(self.convs)[:-1]]

    @property
    def outputs(self) -> int:
        """Channels that leave the block."""
        return self.convs[-1].kernel.shape[3]

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch ho wo o"]:
        """What leaves the block."""
        beside = x
        if self.shortcut is not None and self.shortcut_norm is not None:
            beside = self.shortcut_norm(self.shortcut(x))
        last = len(self.convs) - 1
        for i, (layer, normalise) in enumerate(
            zip(self.convs, self.norms, strict=True)
        ):
            x = normalise(layer(x))
            if i < last:
                x = jax.nn.relu(x)
        return jax.nn.relu(x + beside)


class ResNet(ResidualModel):
    """A 7x7 convolution and 3x3 maxima, both with stride 2, stages of blocks of which
    all but the first begin with stride 2, the mean over all positions, one dense layer.

    Args:
        stem: channels of the first convolution.
        stages: channels between the blocks of each stage.
        inner: for each block of each stage the channels within it: one number, or two
            for a bottleneck.
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
        stem: int = 64,
        stages: Sequence[int] = WIDTHS,
        inner: Sequence[Sequence[Sequence[int]]] = tuple(((w,),) * 2 for w in WIDTHS),
        project: Sequence[bool] = (False, True, True, True),
        classes: int = 1000,
        shape: Sequence[int] = (224, 224, 3),
        *,
        rngs: nnx.Rngs,
    ):
        self.shape = tuple(shape)
        self.stem = conv(shape[2], stem, 7, 2, rngs=rngs)
        self.norm = norm(stem, rngs)
        self.depths = tuple(map(len, inner))
        self.blocks = nnx.List(
            blocks_of(Block, stem, stages, inner, project, rngs=rngs)
        )
        self.head = nnx.Linear(stages[-1], classes, kernel_init=LECUN_NORMAL, rngs=rngs)

    def __call__(self, images: Float[Array, "batch h w c"]) -> Float[Array, "batch k"]:
        """Logits of each class."""
        x = max_pool_3x3(jax.nn.relu(self.norm(self.stem(images))))
        for block in self.blocks:
            x = block(x)
        return self.head(global_average(x))


def basic(blocks: Sequence[int]) -> dict:
    """The architecture of a network of basic blocks, so many in each stage."""
    inner = tuple(((w,),) * n for w, n in zip(WIDTHS, blocks, strict=True))
    return {"stages": WIDTHS, "inner": inner, "project": (False, True, True, True)}


def bottleneck(blocks: Sequence[int]) -> dict:
    """The architecture of a network of bottlenecks, so many in each stage."""
    inner = tuple(((w, w),) * n for w, n in zip(WIDTHS, blocks, strict=True))
    stages = tuple(4 * w for w in WIDTHS)
    return {"stages": stages, "inner": inner, "project": (True,) * len(stages)}
