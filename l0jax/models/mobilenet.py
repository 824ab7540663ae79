"""MobileNet (Howard et al. 2017) and MobileNetV2 (Sandler et al. 2018), at any widths.

The strides are arguments: on small images fewer layers have stride 2.
"""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from l0jax.models.layers import LECUN_NORMAL, ImageModel, conv, global_average, norm

SEPARABLE = (64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
# Of Zhuang et al. (2018) no more is known than 2.13e8 multiply-accumulates; these are
# the strides at which a network for images of 32 by 32 has 2.12e8.
SMALL_STRIDES = (1, 2, 1, 2, *(1,) * 9)


class MobileNet(ImageModel):
    """A convolution, then depthwise and 1x1 convolutions in turn, each with batch
    normalisation and ReLU; the mean over all positions; one dense layer.

    Args:
        stem: channels of the first convolution.
        widths: channels after each 1x1 convolution.
        strides: of each depthwise convolution.
        stem_stride: of the first convolution.
        classes: number of classes.
        shape: (height, width, channels) of an image.
        rngs: where the initial weights come from.

    Raises:
        ValueError: if `widths` and `strides` differ in length.
    """

    def __init__(
        self,
        stem: int = 32,
        widths: Sequence[int] = SEPARABLE,
        strides: Sequence[int] = STRIDES,
        stem_stride: int = 2,
        classes: int = 1000,
        shape: Sequence[int] = (224, 224, 3),
        *,
        rngs: nnx.Rngs,
    ):
        if len(widths) != len(strides):
            raise ValueError(
                f"widths has {len(widths)} entries and strides {len(strides)}: give "
                "one each for every layer"
            )
        self.shape, self.stem_stride = tuple(shape), stem_stride
        self.strides = tuple(strides)
        self.stem = conv(shape[2], stem, 3, stem_stride, rngs=rngs)
        self.stem_norm = norm(stem, rngs)
        channels, depthwise, pointwise, norms = stem, [], [], []
        for width, stride in zip(widths, strides, strict=True):
            of_each = conv(channels, channels, 3, stride, groups=channels, rngs=rngs)
            depthwise.append(of_each)
            pointwise.append(conv(channels, width, 1, rngs=rngs))
            norms.append(nnx.List([norm(channels, rngs), norm(width, rngs)]))
            channels = width
        self.depthwise, self.pointwise = nnx.List(depthwise), nnx.List(pointwise)
        self.norms = nnx.List(norms)
        self.head = nnx.Linear(channels, classes, kernel_init=LECUN_NORMAL, rngs=rngs)

    def __call__(self, images: Float[Array, "batch h w c"]) -> Float[Array, "batch k"]:
        """Logits of each class."""
        x = jax.nn.relu(self.stem_norm(self.stem(images)))
        for depthwise, pointwise, (first, second) in zip(
            self.depthwise, self.pointwise, self.norms, strict=True
        ):
            x = jax.nn.relu(first(depthwise(x)))
            x = jax.nn.relu(second(pointwise(x)))
        return self.head(global_average(x))

    @property
    def architecture(self) -> dict:
        """Arguments of the constructor that rebuild this shape, for files."""
        return {
            "stem": self.stem.kernel.shape[3],
            "widths": [layer.kernel.shape[3] for layer in self.pointwise],
            "strides": list(self.strides),
            "stem_stride": self.stem_stride,
            "classes": self.head.kernel.shape[1],
            "shape": list(self.shape),
        }


class InvertedResidual(nnx.Module):
    """A 1x1 convolution that widens, a depthwise one, a 1x1 one that narrows, beside
    the identity if `skip` is set.

    Args:
        inputs, inner, outputs: channels.
        stride: of the depthwise convolution.
        widen: whether there is the first of the three; without it inner = inputs.
        skip: whether the input is added.
        rngs: where the initial weights come from.
    """

    def __init__(
        self,
        inputs: int,
        inner: int,
        outputs: int,
        stride: int,
        widen: bool,
        skip: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.widen = conv(inputs, inner, 1, rngs=rngs) if widen else None
        self.widen_norm = norm(inner, rngs) if widen else None
        self.depthwise = conv(inner, inner, 3, stride, groups=inner, rngs=rngs)
        self.depthwise_norm = norm(inner, rngs)
        self.narrow = conv(inner, outputs, 1, rngs=rngs)
        self.narrow_norm = norm(outputs, rngs)
        self.skip = skip

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch ho wo o"]:
        """What leaves the block."""
        beside = x
        if self.widen is not None and self.widen_norm is not None:
            x = jax.nn.relu6(self.widen_norm(self.widen(x)))
        x = jax.nn.relu6(self.depthwise_norm(self.depthwise(x)))
        x = self.narrow_norm(self.narrow(x))
        return beside + x if self.skip else x


# (factor by which a block widens, channels after it, blocks, stride of the first)
STAGES_V2 = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


class MobileNetV2(ImageModel):
    """A convolution, stages of inverted residuals, a 1x1 convolution, the mean over all
    positions, one dense layer.

    Args:
        stem: channels of the first convolution.
        stages: channels after the blocks of each stage.
        inner: for each stage the channels within its blocks.
        widen: of each stage, whether its blocks widen.
        strides: of the first block of each stage.
        stem_stride: of the first convolution.
        last: channels of the last convolution.
        classes: number of classes.
        shape: (height, width, channels) of an image.
        rngs: where the initial weights come from.

    Raises:
        ValueError: if there is not one entry for each stage.
    """

    def __init__(
        self,
        stem: int,
        stages: Sequence[int],
        inner: Sequence[Sequence[int]],
        widen: Sequence[bool],
        strides: Sequence[int],
        stem_stride: int = 2,
        last: int = 1280,
        classes: int = 1000,
        shape: Sequence[int] = (224, 224, 3),
        *,
        rngs: nnx.Rngs,
    ):
        lengths = {len(stages), len(inner), len(widen), len(strides)}
        if len(lengths) > 1:
            raise ValueError(
                f"stages, inner, widen and strides have {len(stages)}, {len(inner)}, "
                f"{len(widen)} and {len(strides)} entries: give one each for every "
                "stage"
            )
        self.shape, self.stem_stride = tuple(shape), stem_stride
        self.strides, self.widen = tuple(strides), tuple(widen)
        self.stem = conv(shape[2], stem, 3, stem_stride, rngs=rngs)
        self.stem_norm = norm(stem, rngs)
        self.depths = tuple(map(len, inner))
        channels, blocks = stem, []
        for stage, (width, within) in enumerate(zip(stages, inner, strict=True)):
            for at, each in enumerate(within):
                stride = 1 if at else strides[stage]
                # As in the paper: within a stage, not from one to the next.
                block = InvertedResidual(
                    channels, each, width, stride, widen[stage], at > 0, rngs=rngs
                )
                blocks.append(block)
                channels = width
        self.blocks = nnx.List(blocks)
        self.last = conv(channels, last, 1, rngs=rngs)
        self.last_norm = norm(last, rngs)
        self.head = nnx.Linear(last, classes, kernel_init=LECUN_NORMAL, rngs=rngs)

    def __call__(self, images: Float[Array, "batch h w c"]) -> Float[Array, "batch k"]:
        """Logits of each class."""
        x = jax.nn.relu6(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(global_average(jax.nn.relu6(self.last_norm(self.last(x)))))

    @property
    def architecture(self) -> dict:
        """Arguments of the constructor that rebuild this shape, for files."""
        blocks, stages, inner = iter(self.blocks), [], []
        for depth in self.depths:
            here = [next(blocks) for _ in range(depth)]
            inner.append([block.depthwise.kernel.shape[3] for block in here])
            stages.append(here[0].narrow.kernel.shape[3])
        return {
            "stem": self.stem.kernel.shape[3],
            "stages": stages,
            "inner": inner,
            "widen": list(self.widen),
            "strides": list(self.strides),
            "stem_stride": self.stem_stride,
            "last": self.last.kernel.shape[3],
            "classes": self.head.kernel.shape[1],
            "shape": list(self.shape),
        }


def v2() -> dict:
    """The architecture of MobileNetV2 as published, for images of 224 by 224."""
    stem = channels = 32
    inner = []
    for factor, width, blocks, _ in STAGES_V2:
        widths = [channels, *(width,) * (blocks - 1)]
        inner.append(tuple(factor * each for each in widths))
        channels = width
    return {
        "stem": stem,
        "stages": tuple(width for _, width, _, _ in STAGES_V2),
        "inner": tuple(inner),
        "widen": tuple(factor > 1 for factor, *_ in STAGES_V2),
        "strides": tuple(stride for *_, stride in STAGES_V2),
    }
