"""Layers that the convolutional networks share."""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from l0jax.structure import Structure
from l0jax.units import Groups, Slot


def _drawn(initializer: Callable[..., Array]) -> Callable[..., Array]:
    """An initializer that draws nothing where a layer has lost all units: by their
    number it would divide."""

    def draw(key: Any, shape: Any, *args: Any, **kwargs: Any) -> Array:
        if 0 in shape:
            return jnp.zeros(shape, *args, **kwargs)
        return initializer(key, shape, *args, **kwargs)

    return draw


HE_NORMAL = _drawn(nnx.initializers.he_normal())
HE_BY_OUTPUTS = _drawn(nnx.initializers.variance_scaling(2.0, "fan_out", "normal"))
LECUN_NORMAL = _drawn(nnx.initializers.lecun_normal())


def conv(
    inputs: int,
    outputs: int,
    window: int = 3,
    stride: int = 1,
    groups: int = 1,
    *,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution without bias, padded so that stride 1 keeps the size.

    Args:
        inputs, outputs: channels.
        window: height and width of the kernel, odd.
        stride: of both axes.
        groups: into how many groups the channels are divided; as many as there are
            inputs make it depthwise.
        rngs: where the initial weights come from (He et al. 2015, by outputs).
    """
    return nnx.Conv(
        inputs,
        outputs,
        (window, window),
        strides=(stride, stride),
        padding=window // 2,
        use_bias=False,
        feature_group_count=groups,
        kernel_init=HE_BY_OUTPUTS,
        rngs=rngs,
    )


def norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch normalisation with the momentum and the epsilon of all of the papers, by
    the running statistics until `train()` is called. Statistics are of float32 where
    the network runs in bfloat16, and what it gives is of bfloat16."""
    return nnx.BatchNorm(
        channels,
        use_running_average=True,
        momentum=0.9,
        epsilon=1e-5,
        promote_dtype=_as_they_are,
        rngs=rngs,
    )


def _as_they_are(arrays: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """In the place of a promotion of all arrays to the widest dtype among them, that of
    the statistics, in which all layers would run from the first norm on."""
    del dtype, inexact
    return arrays


def global_average(x: Float[Array, "batch h w c"]) -> Float[Array, "batch c"]:
    """The mean over all positions."""
    return x.mean(axis=(1, 2))


def max_pool_3x3(
    x: Float[Array, "batch h w c"],
) -> Float[Array, "batch (h+1)//2 (w+1)//2 c"]:
    """3x3 max pooling with stride 2 and padding 1."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class ImageModel(nnx.Module):
    """A convolutional network with batch normalisation, for images of one shape.

    It is made in evaluation mode, in which it is a function of its arrays and can be
    traced; `train()` and `eval()` of Flax switch.

    Attributes:
        shape: (height, width, channels) of an image; of a clip, frames come first.
    """

    shape: tuple[int, ...]

    @property
    @abc.abstractmethod
    def architecture(self) -> dict:
        """Arguments of the constructor that rebuild the present shape, for files."""

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """What the model can be traced with."""
        return jax.ShapeDtypeStruct((2, *self.shape), jnp.float32)

    def edit(self, structure: Structure) -> Structure:
        """All that tracing finds, but for the colours of the images."""
        return structure.only(
            *(n for n in structure.groups if n not in structure.inputs)
        )

    def charges(self, groups: Groups) -> dict[str, tuple[Slot, ...]]:
        """A unit pays for the weights that read it, and for its own filter where no
        group reads through that: of the first convolution and of depthwise ones."""
        read = {slot.path for group in groups.values() for slot in group.used_by}
        return {
            name: (
                *group.used_by,
                *(
                    slot
                    for slot in group.made_by
                    if slot.path.endswith("kernel") and slot.path not in read
                ),
            )
            for name, group in groups.items()
        }
