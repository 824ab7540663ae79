"""I3D, the inflated Inception-v1 for clips (Carreira and Zisserman 2017), at any
widths, and the inflation of two-dimensional weights to it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from l0jax.models.convolution import conv3d, max_pool_3d
from l0jax.models.layers import HE_BY_OUTPUTS, LECUN_NORMAL, ImageModel, norm
from l0jax.units import arrays, replace

# Channels of a module's four branches: of the 1x1x1 convolution; of the 1x1x1 and the
# 3x3x3 one, twice; of the 1x1x1 one behind the maxima.
Widths = Sequence[int | Sequence[int]]
# Frames, height and width of a window, and its strides.
Pool = Sequence[Sequence[int]]

STEM = (64, 64, 192)
STAGES = (
    (
        (64, (96, 128), (16, 32), 32),
        (128, (128, 192), (32, 96), 64),
    ),
    (
        (192, (96, 208), (16, 48), 64),
        (160, (112, 224), (24, 64), 64),
        (128, (128, 256), (24, 64), 64),
        (112, (144, 288), (32, 64), 64),
        (256, (160, 320), (32, 128), 128),
    ),
    (
        (256, (160, 320), (32, 128), 128),
        (384, (192, 384), (48, 128), 128),
    ),
)
POOLS = (
    ((1, 3, 3), (1, 2, 2)),
    ((1, 3, 3), (1, 2, 2)),
    ((3, 3, 3), (2, 2, 2)),
    ((2, 2, 2), (2, 2, 2)),
)
AVERAGE = (2, 7, 7)


class Unit(nnx.Module):
    """A convolution over clips without bias, batch normalisation, ReLU.

    Args:
        inputs, outputs: channels.
        window: frames, height and width of the kernel.
        strides: of these axes.
        rngs: where the initial weights come from (He et al. 2015, by outputs).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        window: Sequence[int] = (1, 1, 1),
        strides: Sequence[int] = (1, 1, 1),
        *,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            inputs,
            outputs,
            tuple(window),
            strides=tuple(strides),
            use_bias=False,
            kernel_init=HE_BY_OUTPUTS,
            rngs=rngs,
        )
        self.strides = tuple(strides)
        self.norm = norm(outputs, rngs)

    @property
    def outputs(self) -> int:
        """Channels that leave it."""
        return self.conv.kernel.shape[4]

    def __call__(
        self, x: Float[Array, "batch t h w c"]
    ) -> Float[Array, "batch to ho wo o"]:
        """What leaves it, none of it negative."""
        return jax.nn.relu(self.norm(conv3d(x, self.conv.kernel[...], self.strides)))


class Mixed(nnx.Module):
    """Four branches side by side: a 1x1x1 convolution; a 1x1x1 and a 3x3x3 one, twice;
    3x3x3 maxima and a 1x1x1 one. (Inception's third has 5x5; the released I3D has not.)

    Args:
        inputs: channels.
        widths: channels after each convolution.
        rngs: where the initial weights come from.

    Raises:
        ValueError: if `widths` has another form.
    """

    def __init__(self, inputs: int, widths: Widths, *, rngs: nnx.Rngs):
        forms = [1 if isinstance(each, int) else len(each) for each in widths]
        if forms != [1, 2, 2, 1]:
            raise ValueError(
                "a module has widths as in (64, (96, 128), (16, 32), 32), got "
                f"{tuple(widths)}"
            )
        branches = []
        for each in widths:
            first, *second = [each] if isinstance(each, int) else each
            units = [Unit(inputs, first, rngs=rngs)]
            units += [Unit(first, width, (3, 3, 3), rngs=rngs) for width in second]
            branches.append(nnx.List(units))
        self.branches = nnx.List(branches)

    @property
    def widths(self) -> list:
        """The constructor's argument of that name."""
        found = [[unit.outputs for unit in branch] for branch in self.branches]
        return [each if len(each) > 1 else each[0] for each in found]

    def __call__(
        self, x: Float[Array, "batch t h w c"]
    ) -> Float[Array, "batch t h w o"]:
        """What leaves the branches, one after the other."""
        last, leaving = len(self.branches) - 1, []
        for at, branch in enumerate(self.branches):
            y = max_pool_3d(x, (3, 3, 3), (1, 1, 1)) if at == last else x
            for unit in branch:
                y = unit(y)
            leaving.append(y)
        return jnp.concatenate(leaving, axis=-1)


class I3D(ImageModel):
    """Three convolutions, of which the first has a large window and strides and the
    last is 3x3x3; stages of modules; averages over windows, one dense layer at each of
    these, the mean of its logits. Maxima are taken behind the first convolution and
    before each stage.

    Args:
        stem: channels of the first three convolutions.
        stages: the widths of the modules of each stage.
        pools: (window, strides) of the maxima behind the first convolution and before
            each stage.
        window: frames, height and width of the first convolution.
        strides: of the first convolution.
        classes: number of classes.
        shape: (frames, height, width, channels) of a clip.
        rngs: where the initial weights come from.

    Raises:
        ValueError: if there are not three widths of the stem, not one more of `pools`
            than of `stages`, or a module's widths have not the form of four branches.
    """

    def __init__(
        self,
        stem: Sequence[int] = STEM,
        stages: Sequence[Sequence[Widths]] = STAGES,
        pools: Sequence[Pool] = POOLS,
        window: Sequence[int] = (7, 7, 7),
        strides: Sequence[int] = (2, 2, 2),
        classes: int = 400,
        shape: Sequence[int] = (64, 224, 224, 3),
        *,
        rngs: nnx.Rngs,
    ):
        if len(stem) != 3 or len(pools) != len(stages) + 1:
            raise ValueError(
                f"stem has {len(stem)} entries, stages {len(stages)} and pools "
                f"{len(pools)}: give 3 of the stem, and one more of pools than of "
                "stages"
            )
        self.shape = tuple(shape)
        self.pools = tuple((tuple(size), tuple(steps)) for size, steps in pools)
        first, second, channels = stem
        self.stem = nnx.List(
            [
                Unit(shape[3], first, window, strides, rngs=rngs),
                Unit(first, second, rngs=rngs),
                Unit(second, channels, (3, 3, 3), rngs=rngs),
            ]
        )
        modules = []
        for widths in (widths for stage in stages for widths in stage):
            modules.append(Mixed(channels, widths, rngs=rngs))
            channels = sum(branch[-1].outputs for branch in modules[-1].branches)
        self.depths = tuple(map(len, stages))
        self.modules = nnx.List(modules)
        self.head = nnx.Linear(channels, classes, kernel_init=LECUN_NORMAL, rngs=rngs)

    def __call__(self, clips: Float[Array, "batch t h w c"]) -> Float[Array, "batch k"]:
        """Logits of each class."""
        first, second, third = self.stem
        before, *pools = self.pools
        x = third(second(max_pool_3d(first(clips), *before)))
        modules = iter(self.modules)
        for pool, depth in zip(pools, self.depths, strict=True):
            x = max_pool_3d(x, *pool)
            for _ in range(depth):
                x = next(modules)(x)
        return self.head(mean_of_averages(x, AVERAGE))

    @property
    def architecture(self) -> dict:
        """Arguments of the constructor that rebuild this shape, for files."""
        modules = iter(self.modules)
        return {
            "stem": [unit.outputs for unit in self.stem],
            "stages": [
                [next(modules).widths for _ in range(depth)] for depth in self.depths
            ],
            "pools": [[list(size), list(steps)] for size, steps in self.pools],
            "window": list(self.stem[0].conv.kernel.shape[:3]),
            "strides": list(self.stem[0].strides),
            "classes": self.head.kernel.shape[1],
            "shape": list(self.shape),
        }


def mean_of_averages(
    x: Float[Array, "batch t h w c"], window: Sequence[int]
) -> Float[Array, "batch c"]:
    """The mean over all positions of averages over a window with stride 1.

    A window that is larger than the clip shrinks to it. As the dense layer is linear,
    its logits at this mean are the mean of its logits at the averages, as published: of
    8 frames the inner 6 weigh twice as much as the first and the last.
    """
    for axis, size in enumerate(window, start=1):
        length = x.shape[axis]
        size = min(size, length)
        places = length - size + 1
        # At each position, the number of windows over it.
        weights = np.convolve(np.ones(places), np.ones(size)) / (places * size)
        along = [1] * x.ndim
        along[axis] = length
        x = (x * weights.reshape(along).astype(x.dtype)).sum(axis=axis, keepdims=True)
    return x.reshape(x.shape[0], -1)


# --------------------------------------------------------------------------- inflation


def inflated(
    kernel: Float[Array, "h w inputs outputs"], frames: int
) -> Float[Array, "{frames} h w inputs outputs"]:
    r"""A two-dimensional kernel repeated over time: $W_{thwio} = W_{hwio} / T$.

    A clip of one image again and again gets the response of the image, wherever the
    window lies within the clip (Carreira and Zisserman 2017, section 2.4).
    """
    return jnp.repeat(kernel[None] / frames, frames, axis=0)


def inflate(model: I3D, images: PyTree) -> I3D:
    """`model` with the weights of a network for images.

    Args:
        model: any I3D; it is left as it is.
        images: arrays at paths of the model's, as `nnx.state` of the same network
            over images would have: kernels of convolutions lack the first axis, all
            else is of the same shape. What is not there stays as the model has it.

    Raises:
        ValueError: if the model has no array of such a path, or one of another shape.
    """
    graph, state = nnx.split(model)
    present, values = arrays(state), {}
    for path, array in arrays(images).items():
        if path not in present:
            raise ValueError(
                f"inflate: the model has no array {path!r}; there is "
                f"{', '.join(present)}"
            )
        shape = present[path].shape
        expected = shape[1:] if len(shape) == 5 else shape
        if array.shape != expected:
            raise ValueError(
                f"inflate: {path!r} has shape {array.shape}, and the model takes "
                f"{expected}"
            )
        inflates = len(shape) == 5
        values[path] = inflated(array, shape[0]) if inflates else array
    return nnx.merge(graph, replace(state, values))


def small() -> dict:
    """An eighth of the published channels, for clips of 16 grey frames of 32 by 32.

    With the published strides 2 frames of one position are left of them. The first
    window is as small as such frames ask for.
    """
    return {
        "stem": tuple(width // 8 for width in STEM),
        "stages": tuple(tuple(map(_eighth, stage)) for stage in STAGES),
        "window": (3, 3, 3),
        "classes": 8,
        "shape": (16, 32, 32, 1),
    }


def _eighth(widths: Widths) -> tuple:
    return tuple(w // 8 if isinstance(w, int) else _eighth(w) for w in widths)
