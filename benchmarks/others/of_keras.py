"""Keras's applications, on its JAX backend."""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras

from benchmarks.others import Model, image, model


def functional(published: bool, make: Callable[[], Any], *inputs) -> Model:
    """A model of Keras, by its constructor, as a function of its variables. Of the
    published one they are never made, only their shapes are known."""
    keras.backend.clear_session()  # (It numbers layers,
    keras.utils.set_random_seed(0)  # and draws what they start from.)
    if published:
        with keras.StatelessScope(initialize_variables=False):
            module = make()
    else:
        module = make()

    def value(variable):
        if published:
            return jax.ShapeDtypeStruct(variable.shape, variable.dtype)
        return variable.value

    trained, state = (
        {variable.path: value(variable) for variable in variables}
        for variables in (module.trainable_variables, module.non_trainable_variables)
    )

    def apply(params, *inputs):
        trained, state = params["params"], params["state"]
        given = inputs if len(inputs) > 1 else inputs[0]
        outputs, _ = module.stateless_call(
            [*trained.values()], [*state.values()], given, training=False
        )
        return outputs

    return Model(apply, {"params": ordered(trained), "state": ordered(state)}, inputs)


def ordered(variables):
    """In the order in which Keras gives them, which a plain dict would lose."""
    return Ordered(variables)


@jax.tree_util.register_pytree_with_keys_class
class Ordered(dict):
    """A dict whose leaves stay in the order in which they were put in."""

    def tree_flatten_with_keys(self):
        keys = tuple(self)
        named = ((jax.tree_util.DictKey(key), self[key]) for key in keys)
        return tuple(named), keys

    def tree_flatten(self):
        return tuple(self.values()), tuple(self)

    @classmethod
    def tree_unflatten(cls, keys, leaves):
        return cls(zip(keys, leaves, strict=True))


def application(function, side: int = 32, full: int = 224, **small):
    """A model of `keras.applications`: published, and with few classes and pixels."""

    def make(published: bool) -> Model:
        size = full if published else side
        options = {} if published else {"classes": 5, **small}
        # (Logits, of which gradients are left where a softmax would be saturated.)
        options["classifier_activation"] = None
        options["input_shape"] = (size, size, 3)
        pixels = image(published, side, full)
        return functional(published, lambda: function(weights=None, **options), pixels)

    return make


NETS = keras.applications
APPLICATIONS = {
    "keras_vgg16": application(NETS.VGG16),
    "keras_resnet50": application(NETS.ResNet50),
    "keras_resnet50_v2": application(NETS.ResNet50V2),
    "keras_mobilenet": application(NETS.MobileNet, alpha=0.25),
    "keras_mobilenet_v2": application(NETS.MobileNetV2, alpha=0.35),
    "keras_mobilenet_v3_large": application(NETS.MobileNetV3Large, alpha=0.5),
    "keras_densenet121": application(NETS.DenseNet121),
    "keras_efficientnet_b0": application(NETS.EfficientNetB0),
    "keras_efficientnet_v2_s": application(NETS.EfficientNetV2S),
    "keras_inception_v3": application(NETS.InceptionV3, 75, 299),
    "keras_xception": application(NETS.Xception, 71, 299),
    "keras_nasnet_mobile": application(NETS.NASNetMobile),
    "keras_convnext_tiny": application(NETS.ConvNeXtTiny),
}
for name, make in APPLICATIONS.items():
    make.__name__ = name
    make.__module__ = __name__
    model("keras")(make)
