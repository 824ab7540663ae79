"""Backbones of KerasHub, without weights, on Keras's JAX backend."""

import jax
import jax.numpy as jnp

from benchmarks.others import Model, floats, model
from benchmarks.others.of_keras import fresh, functional

# isort: split
import keras_hub.models as hub


def made(backbone, *, published: bool, images=None, **sizes) -> Model:
    """A backbone as a function of its inputs in the order of their names."""
    fresh()
    module = backbone(**sizes)
    if images is not None:
        return functional(module, floats(2, images, images, 3))
    length = 32 if published else 6
    shape = jax.ShapeDtypeStruct((2, length), jnp.int32)
    ones = jnp.ones(shape.shape, jnp.int32)
    given = {
        name: shape if name.endswith("token_ids") else ones for name in module.input
    }
    return functional(module, given, unpack=jax.tree.leaves)


def decoder(published: bool) -> dict[str, int]:
    return {
        "vocabulary_size": 8_000 if published else 11,
        "num_layers": 4 if published else 1,
        "num_query_heads": 8 if published else 4,
        "num_key_value_heads": 2,
        "hidden_dim": 512 if published else 24,
        "intermediate_dim": 1024 if published else 10,
    }


@model("keras-hub")
def keras_hub_llama(published):
    return made(hub.LlamaBackbone, published=published, **decoder(published))


@model("keras-hub")
def keras_hub_qwen3(published):
    more = {"head_dim": 64 if published else 4}
    return made(hub.Qwen3Backbone, published=published, **decoder(published), **more)


@model("keras-hub")
def keras_hub_mixtral(published):
    more = {"num_experts": 8 if published else 3}
    return made(hub.MixtralBackbone, published=published, **decoder(published), **more)


@model("keras-hub")
def keras_hub_gpt_oss(published):
    more = {"num_experts": 8 if published else 3}
    return made(hub.GptOssBackbone, published=published, **decoder(published), **more)


@model("keras-hub")
def keras_hub_gemma(published):
    more = {"head_dim": 64 if published else 4}
    return made(hub.GemmaBackbone, published=published, **decoder(published), **more)


@model("keras-hub")
def keras_hub_f_net(published):
    sizes = {
        "vocabulary_size": 8_000 if published else 11,
        "num_layers": 4 if published else 1,
        "hidden_dim": 512 if published else 24,
        "intermediate_dim": 1024 if published else 10,
        "max_sequence_length": 32 if published else 6,
    }
    return made(hub.FNetBackbone, published=published, **sizes)


@model("keras-hub")
def keras_hub_deberta_v3(published):
    sizes = {
        "vocabulary_size": 8_000 if published else 11,
        "num_layers": 4 if published else 1,
        "num_heads": 8 if published else 3,
        "hidden_dim": 512 if published else 24,
        "intermediate_dim": 1024 if published else 10,
        "max_sequence_length": 32 if published else 6,
        "bucket_size": 16 if published else 4,
    }
    return made(hub.DebertaV3Backbone, published=published, **sizes)


@model("keras-hub")
def keras_hub_swin(published):
    side = 224 if published else 32
    sizes = {
        "image_shape": (side, side, 3),
        "patch_size": 4,
        "embed_dim": 96 if published else 6,
        "depths": (2, 2, 6, 2) if published else (1, 2),
        "num_heads": (3, 6, 12, 24) if published else (3, 3),
        "window_size": 7 if published else 4,
    }
    network = hub.SwinTransformerBackbone
    return made(network, published=published, images=side, **sizes)
