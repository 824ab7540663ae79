"""VGG with batch normalisation for small images (Simonyan and Zisserman 2015), as
pruned by Zhuang et al. (2018) and Liu et al. (2017), at any widths."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from l0jax.models.convolution import max_pool_2x2
from l0jax.models.layers import LECUN_NORMAL, ImageModel, conv, global_average, norm

LAYERS = {  # convolutions of each stage, between which 2x2 maxima are taken
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)


class VGG(ImageModel):
    """Stages of 3x3 convolutions, each with batch normalisation and ReLU; the mean over
    what is left of the image; one dense layer.

    Args:
        stages: the widths of the convolutions of each stage.
        classes: number of classes.
        shape: (height, width, channels) of an image.
        rngs: where the initial weights come from.

    Raises:
        ValueError: if the images are too small for so many stages.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        classes: int = 10,
        shape: Sequence[int] = (32, 32, 3),
        *,
        rngs: nnx.Rngs,
    ):
        smallest = 2 ** (len(stages) - 1)
        if min(shape[:2]) < smallest:
            raise ValueError(
                f"{len(stages)} stages need images of at least {smallest} by "
                f"{smallest}, got {tuple(shape)}"
            )
        self.shape = tuple(shape)
        channels, convs, norms = shape[2], [], []
        for widths in stages:
            for width in widths:
                convs.append(conv(channels, width, rngs=rngs))
                norms.append(norm(width, rngs))
                channels = width
        self.depths = tuple(map(len, stages))
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        self.head = nnx.Linear(channels, classes, kernel_init=LECUN_NORMAL, rngs=rngs)

    def __call__(self, images: Float[Array, "batch h w c"]) -> Float[Array, "batch k"]:
        """Logits of each class."""
        x, layers = images, iter(zip(self.convs, self.norms, strict=True))
        for stage, depth in enumerate(self.depths):
            if stage:
                x = max_pool_2x2(x)
            for _ in range(depth):
                layer, normalise = next(layers)
                x = jax.nn.relu(normalise(layer(x)))
        return self.head(global_average(x))

    @property
    def architecture(self) -> dict:
        """Arguments of the constructor that rebuild this shape, for files."""
        widths = iter([layer.kernel.shape[3] for layer in self.convs])
        return {
            "stages": [[next(widths) for _ in range(depth)] for depth in self.depths],
            "classes": self.head.kernel.shape[1],
            "shape": list(self.shape),
        }


def of_depth(layers: int) -> dict:
    """The architecture with so many weight layers in the original: 16 or 19.

    Raises:
        ValueError: for another number.
    """
    if layers not in LAYERS:
        raise ValueError(
            f"VGG has {' or '.join(map(str, LAYERS))} layers, got {layers}"
        )
    depths = zip(WIDTHS, LAYERS[layers], strict=True)
    return {"stages": tuple((width,) * depth for width, depth in depths)}
