"""Networks in Flax NNX at any widths. A new one is one file and one line in `MODELS`.

Widths are data: a shrunk network is the same class with smaller arrays. Each model has
`architecture`, the arguments that rebuild its present shape, an `example` of its input
to trace it with, an `edit` of what `trace` finds (names; the mask of the inputs that
are read) and the `charges` of each unit.

`PRESETS` are the networks of the papers by their names.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from l0jax.models import i3d, mobilenet, pre_activation, resnet, vgg
from l0jax.models.decoder import Decoder as Decoder
from l0jax.models.i3d import I3D as I3D
from l0jax.models.layers import ImageModel as ImageModel
from l0jax.models.lenet5 import LeNet5 as LeNet5
from l0jax.models.mlp import MLP as MLP
from l0jax.models.mobilenet import MobileNet as MobileNet
from l0jax.models.mobilenet import MobileNetV2 as MobileNetV2
from l0jax.models.pre_activation import PreActivationResNet as PreActivationResNet
from l0jax.models.resnet import ResNet as ResNet
from l0jax.models.vgg import VGG as VGG
from l0jax.structure import Structure
from l0jax.tracing import trace

Model = MLP | LeNet5 | ImageModel | Decoder

MODELS: dict[str, Callable[..., Model]] = {
    "mlp": MLP,
    "lenet5": LeNet5,
    "vgg": VGG,
    "pre_activation_resnet": PreActivationResNet,
    "resnet": ResNet,
    "mobilenet": MobileNet,
    "mobilenet_v2": MobileNetV2,
    "i3d": I3D,
    "decoder": Decoder,
}

PRESETS: dict[str, tuple[str, dict]] = {
    # For images of 32 by 32, as of CIFAR-10.
    "vgg16": ("vgg", vgg.of_depth(16)),
    "vgg19": ("vgg", vgg.of_depth(19)),
    "resnet20": ("pre_activation_resnet", pre_activation.of_depth(20)),
    "resnet56": ("pre_activation_resnet", pre_activation.of_depth(56)),
    "wrn28_10": ("pre_activation_resnet", pre_activation.wide(28, 10)),
    "mobilenet_small": (
        "mobilenet",
        {
            "strides": mobilenet.SMALL_STRIDES,
            "stem_stride": 1,
            "classes": 10,
            "shape": (32, 32, 3),
        },
    ),
    # For images of 224 by 224, as of ImageNet.
    "resnet18": ("resnet", resnet.basic((2, 2, 2, 2))),
    "resnet50": ("resnet", resnet.bottleneck((3, 4, 6, 3))),
    "mobilenet": ("mobilenet", {}),
    "mobilenet_v2": ("mobilenet_v2", mobilenet.v2()),
    # For clips of 64 frames of 224 by 224, as of Kinetics, and for small grey ones.
    "i3d": ("i3d", {}),
    "i3d_small": ("i3d", i3d.small()),
}
"""The class in `MODELS` and the architecture of each network with a name."""


def make(name: str, architecture: Mapping, *, rngs: nnx.Rngs) -> Model:
    """The model called `name`, of the given architecture.

    Raises:
        ValueError: if no model has that name; the message lists those that exist.
    """
    if name not in MODELS:
        raise ValueError(
            f"unknown model {name!r}; there is {', '.join(sorted(MODELS))}"
        )
    return MODELS[name](**architecture, rngs=rngs)


def preset(name: str, *, rngs: nnx.Rngs, **changes: Any) -> Model:
    """The network that papers call `name`, with `changes` of its architecture.

    Raises:
        ValueError: if no network has that name; the message lists those that exist.
    """
    if name not in PRESETS:
        raise ValueError(
            f"unknown network {name!r}; there is {', '.join(sorted(PRESETS))}"
        )
    kind, architecture = PRESETS[name]
    return make(kind, {**architecture, **changes}, rngs=rngs)


def structure(model: Model) -> Structure:
    """The units of `model`, as `trace` reads them and the model edits them."""
    return model.edit(trace(model, model.example))


def check(model: Model) -> None:
    """Raises ValueError unless `model.reads` marks one feature for each row that reads.

    The mask is data, so that no shape tells.
    """
    if isinstance(model, ImageModel | Decoder):
        return
    marked, rows = int(model.reads[...].sum()), model.architecture["reads"]
    if marked != rows:
        raise ValueError(
            f"`reads` marks {marked} features, and the layer that reads has {rows} rows"
        )


def name_of(model: nnx.Module) -> str:
    """The name under which `model` stands in `MODELS`.

    Raises:
        ValueError: if its class is not registered.
    """
    for name, kind in MODELS.items():
        if type(model) is kind:
            return name
    raise ValueError(
        f"{type(model).__name__} is not in MODELS; there is {', '.join(sorted(MODELS))}"
    )
