"""Three networks of torchvision in plain JAX, which read its arrays by its names.

ResNet-50 (He et al. 2016, with the strides of v1.5), ViT-B/16 (Dosovitskiy et al. 2021)
and ConvNeXt-T (Liu et al. 2022), in evaluation. `params` holds the parameters and
`stats` the running statistics. Images are `(batch, 3, height, width)`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Shapes = dict[str, tuple[int, ...]]
Parts = dict[str, dict[str, jax.ShapeDtypeStruct]]


@dataclass(frozen=True)
class Vision:
    """A network, the shapes of its arrays, and the side of its images."""

    apply: Callable
    params: Parts
    side: int


def built(apply: Callable, params: Shapes, stats: Shapes, side: int) -> Vision:
    parts = {"params": params, "stats": stats}
    shapes = {
        part: {
            n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in found.items()
        }
        for part, found in parts.items()
    }
    return Vision(apply, shapes, side)


def conv(p, name, x, stride=1, padding=0, groups=1):
    y = jax.lax.conv_general_dilated(
        x,
        p[f"{name}.weight"],
        (stride, stride),
        [(padding, padding)] * 2,
        feature_group_count=groups,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )
    return y + channels(p[f"{name}.bias"]) if f"{name}.bias" in p else y


def channels(vector):
    return vector[None, :, None, None]


def dense(p, name, x):
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"].reshape([1] * (y.ndim - 1) + [-1])


def layer_norm(p, name, x, axis=-1):
    mean = jnp.mean(x, axis=axis, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=axis, keepdims=True)
    shape = [1] * x.ndim
    shape[axis] = -1
    scale, shift = (p[f"{name}.{part}"].reshape(shape) for part in ("weight", "bias"))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * scale + shift


# -------------------------------------------------------------------------- ResNet-50


def resnet(
    widths=(64, 128, 256, 512), blocks=(3, 4, 6, 3), classes=1000, side=224
) -> Vision:
    """Bottlenecks of `width`, `width` and `4 * width` channels."""
    params: Shapes = {}
    stats: Shapes = {}

    def unit(at, number, inputs, outputs, window, norm="bn"):
        kernel = f"{at}conv{number}" if norm == "bn" else f"{at}{norm}.0"
        after = f"{at}bn{number}" if norm == "bn" else f"{at}{norm}.1"
        params[f"{kernel}.weight"] = (outputs, inputs, window, window)
        for part in ("weight", "bias"):
            params[f"{after}.{part}"] = (outputs,)
        for part in ("running_mean", "running_var"):
            stats[f"{after}.{part}"] = (outputs,)

    unit("", 1, 3, widths[0], 7)
    size = widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True), 1):
        for i in range(count):
            at = f"layer{stage}.{i}."
            unit(at, 1, size, width, 1)
            unit(at, 2, width, width, 3)
            unit(at, 3, width, 4 * width, 1)
            if i == 0:
                unit(at, 0, size, 4 * width, 1, "downsample")
            size = 4 * width
    params |= {"fc.weight": (classes, size), "fc.bias": (classes,)}

    def norm(tree, name, x):
        p, s = tree["params"], tree["stats"]
        scale = p[f"{name}.weight"] * jax.lax.rsqrt(s[f"{name}.running_var"] + 1e-5)
        centered = x - channels(s[f"{name}.running_mean"])
        return centered * channels(scale) + channels(p[f"{name}.bias"])

    def block(tree, at, x, stride):
        p = tree["params"]
        y = jax.nn.relu(norm(tree, f"{at}.bn1", conv(p, f"{at}.conv1", x)))
        y = conv(p, f"{at}.conv2", y, stride, padding=1)
        y = jax.nn.relu(norm(tree, f"{at}.bn2", y))
        y = norm(tree, f"{at}.bn3", conv(p, f"{at}.conv3", y))
        if f"{at}.downsample.0.weight" in p:
            x = conv(p, f"{at}.downsample.0", x, stride)
            x = norm(tree, f"{at}.downsample.1", x)
        return jax.nn.relu(x + y)

    def apply(tree, x):
        p = tree["params"]
        x = jax.nn.relu(norm(tree, "bn1", conv(p, "conv1", x, 2, padding=3)))
        edges = ((0, 0), (0, 0), (1, 1), (1, 1))
        x = jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), edges
        )
        for stage, count in enumerate(blocks, 1):
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                x = block(tree, f"layer{stage}.{i}", x, stride)
        return dense(p, "fc", x.mean((2, 3)))

    return built(apply, params, stats, side)


# --------------------------------------------------------------------------- ViT-B/16


def vit(
    width=768, layers=12, heads=12, inside=3072, patch=16, classes=1000, side=224
) -> Vision:
    """Queries, keys and values are made by one array, one after another."""
    params: Shapes = {
        "class_token": (1, 1, width),
        "conv_proj.weight": (width, 3, patch, patch),
        "conv_proj.bias": (width,),
        "encoder.pos_embedding": (1, 1 + (side // patch) ** 2, width),
    }

    def linear(name, inputs, outputs):
        params[f"{name}.weight"] = (outputs, inputs)
        params[f"{name}.bias"] = (outputs,)

    def norm(name):
        params[f"{name}.weight"] = params[f"{name}.bias"] = (width,)

    names = [f"encoder.layers.encoder_layer_{i}" for i in range(layers)]
    for name in names:
        norm(f"{name}.ln_1")
        params[f"{name}.self_attention.in_proj_weight"] = (3 * width, width)
        params[f"{name}.self_attention.in_proj_bias"] = (3 * width,)
        linear(f"{name}.self_attention.out_proj", width, width)
        norm(f"{name}.ln_2")
        linear(f"{name}.mlp.0", width, inside)
        linear(f"{name}.mlp.3", inside, width)
    norm("encoder.ln")
    linear("heads.head", width, classes)

    def attention(p, name, x):
        batch, length, _ = x.shape
        made = x @ p[f"{name}.in_proj_weight"].T + p[f"{name}.in_proj_bias"][None, None]
        query, key, value = (
            part.reshape(batch, length, heads, width // heads)
            for part in jnp.split(made, 3, axis=-1)
        )
        scores = jnp.einsum("bthd,bshd->bhts", query, key) / (width // heads) ** 0.5
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), value)
        return dense(p, f"{name}.out_proj", mixed.reshape(batch, length, width))

    def apply(tree, x):
        p = tree["params"]
        x = conv(p, "conv_proj", x, patch)
        x = x.reshape(len(x), width, -1).transpose(0, 2, 1)
        first = jnp.broadcast_to(p["class_token"], (len(x), 1, width))
        x = jnp.concatenate([first, x], axis=1) + p["encoder.pos_embedding"]
        for name in names:
            x = x + attention(
                p, f"{name}.self_attention", layer_norm(p, f"{name}.ln_1", x)
            )
            y = dense(p, f"{name}.mlp.0", layer_norm(p, f"{name}.ln_2", x))
            x = x + dense(p, f"{name}.mlp.3", jax.nn.gelu(y, approximate=False))
        return dense(p, "heads.head", layer_norm(p, "encoder.ln", x)[:, 0])

    return built(apply, params, {}, side)


# ------------------------------------------------------------------------- ConvNeXt-T


def convnext(
    widths=(96, 192, 384, 768), blocks=(3, 3, 9, 3), classes=1000, side=224
) -> Vision:
    """Blocks whose window is 7 × 7 in each channel, and whose dense layers follow."""
    params: Shapes = {}

    def both(name, *shape):
        params[f"{name}.weight"] = shape
        params[f"{name}.bias"] = shape[:1]

    both("features.0.0", widths[0], 3, 4, 4)
    both("features.0.1", widths[0])
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for i in range(count):
            at = f"features.{2 * stage + 1}.{i}"
            params[f"{at}.layer_scale"] = (width, 1, 1)
            both(f"{at}.block.0", width, 1, 7, 7)
            both(f"{at}.block.2", width)
            both(f"{at}.block.3", 4 * width, width)
            both(f"{at}.block.5", width, 4 * width)
    for stage, (before, after) in enumerate(itertools.pairwise(widths), 1):
        both(f"features.{2 * stage}.0", before)
        both(f"features.{2 * stage}.1", after, before, 2, 2)
    both("classifier.0", widths[-1])
    both("classifier.2", classes, widths[-1])

    def block(p, at, x):
        y = conv(p, f"{at}.block.0", x, padding=3, groups=x.shape[1])
        y = layer_norm(p, f"{at}.block.2", y.transpose(0, 2, 3, 1))
        y = jax.nn.gelu(dense(p, f"{at}.block.3", y), approximate=False)
        y = dense(p, f"{at}.block.5", y).transpose(0, 3, 1, 2)
        return x + p[f"{at}.layer_scale"][None] * y

    def apply(tree, x):
        p = tree["params"]
        x = layer_norm(p, "features.0.1", conv(p, "features.0.0", x, 4), axis=1)
        for stage, count in enumerate(blocks):
            if stage:
                at = f"features.{2 * stage}"
                x = conv(p, f"{at}.1", layer_norm(p, f"{at}.0", x, axis=1), 2)
            for i in range(count):
                x = block(p, f"features.{2 * stage + 1}.{i}", x)
        x = layer_norm(p, "classifier.0", x.mean((2, 3), keepdims=True), axis=1)
        return dense(p, "classifier.2", x.reshape(x.shape[0], x.shape[1]))

    return built(apply, params, {}, side)


VISION = {"ResNet-50": resnet, "ViT-B/16": vit, "ConvNeXt-T": convnext}
