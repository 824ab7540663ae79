"""Equimo's vision models."""

import equinox as eqx
import jax
from equimo.models import convnext, mlla, mobilenet, vit

from benchmarks.others import Model, floats, model


def made(make, side: int) -> Model:
    module = eqx.filter_eval_shape(lambda: eqx.nn.inference_mode(make()))
    params, static = eqx.partition(
        module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    )

    def apply(params, x):
        module = eqx.combine(params, static)
        key = jax.random.PRNGKey(0)
        return jax.vmap(lambda x: module(x, key=key, inference=True))(x)

    return Model(apply, params, (floats(2, 3, side, side),), fan_out_last=False)


KEY = {"key": jax.random.PRNGKey(0)}


@model("equimo")
def equimo_vit(published):
    if published:
        return made(lambda: vit.vit_tiny_patch16_224(**KEY), 224)
    return made(
        lambda: vit.VisionTransformer(16, 3, 12, 8, 3, [2], num_classes=5, **KEY), 16
    )


@model("equimo")
def equimo_convnext(published):
    if published:
        return made(lambda: convnext.convnext_t(**KEY), 224)
    sizes = {"depths": [1, 1, 1, 1], "dims": [6, 8, 10, 12], "num_classes": 5}
    return made(lambda: convnext.ConvNeXt(**sizes, **KEY), 32)


@model("equimo")
def equimo_mlla(published):
    if published:
        tiny = {"dim": 64, "depths": [2, 4, 8, 4], "num_heads": [2, 4, 8, 16]}
        return made(lambda: mlla.Mlla(224, 3, **tiny, **KEY), 224)
    sizes = {"dim": 12, "depths": [1, 1], "num_heads": [3, 6], "num_classes": 5}
    return made(lambda: mlla.Mlla(32, 3, **sizes, **KEY), 32)


@model("equimo")
def equimo_mobilenet_v3(published):
    side = 224 if published else 32
    return made(lambda: mobilenet.mobilenetv3_small(**KEY), side)
