"""Models of KerasHub, without weights, on Keras's JAX backend.

Where its presets say how many parameters a model has, those are the ones that are
counted here.
"""

import jax
import jax.numpy as jnp
import keras

from benchmarks.others import Model, floats, model
from benchmarks.others.of_keras import functional

# isort: split
import keras_hub.models as hub


def made(published: bool, backbone, head, sizes) -> Model:
    """A backbone of tokens, and of masks that hide nothing, with a head."""
    shape = jax.ShapeDtypeStruct((2, 128 if published else 6), jnp.int32)
    ones = jnp.ones(shape.shape, jnp.int32)
    given = {}

    def make():
        body = backbone(**sizes)
        for name in body.input:
            given[name] = shape if name.endswith("token_ids") else ones
        return keras.Model(body.input, head(body, body(body.input)))

    return functional(published, make, given)


def words(body, hidden):
    """Logits by the embedding, as the package's `CausalLM`s."""
    return body.token_embedding(hidden, reverse=True)


def classifier(body, hidden):
    """Two classes by the first token, as the package's `TextClassifier`s."""
    if isinstance(hidden, dict):
        return keras.layers.Dense(2)(hidden["pooled_output"])
    pooled = keras.layers.Dense(body.hidden_dim, activation="gelu")(hidden[:, 0])
    return keras.layers.Dense(2)(pooled)


def small_decoder(**more):
    return {
        "vocabulary_size": 11,
        "num_layers": 1,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "hidden_dim": 24,
        "intermediate_dim": 10,
        **more,
    }


@model("keras-hub")
def keras_hub_llama3(published):
    """Llama 3.2 1B, whose logits have a matrix of their own here."""
    sizes = {
        "vocabulary_size": 128_256,
        "num_layers": 16,
        "num_query_heads": 32,
        "num_key_value_heads": 8,
        "hidden_dim": 2048,
        "intermediate_dim": 8192,
        "rope_max_wavelength": 500_000,
    }
    sizes = sizes if published else small_decoder()
    return made(published, hub.Llama3Backbone, words, sizes)


@model("keras-hub")
def keras_hub_qwen3(published):
    """Qwen3 0.6B."""
    sizes = {
        "vocabulary_size": 151_936,
        "num_layers": 28,
        "num_query_heads": 16,
        "num_key_value_heads": 8,
        "hidden_dim": 1024,
        "intermediate_dim": 3072,
        "head_dim": 128,
        "rope_max_wavelength": 1_000_000,
        "tie_word_embeddings": True,
    }
    sizes = sizes if published else small_decoder(head_dim=4)
    return made(published, hub.Qwen3Backbone, words, sizes)


@model("keras-hub")
def keras_hub_mixtral(published):
    """Mixtral 8x7B."""
    sizes = {
        "vocabulary_size": 32_000,
        "num_layers": 32,
        "num_query_heads": 32,
        "num_key_value_heads": 8,
        "hidden_dim": 4096,
        "intermediate_dim": 14_336,
        "num_experts": 8,
        "rope_max_wavelength": 1_000_000,
    }
    sizes = sizes if published else small_decoder(num_experts=3)
    return made(published, hub.MixtralBackbone, words, sizes)


@model("keras-hub")
def keras_hub_gpt_oss(published):
    """GPT-OSS 20B."""
    sizes = {
        "vocabulary_size": 201_088,
        "num_layers": 24,
        "num_query_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_dim": 2880,
        "intermediate_dim": 2880,
        "num_experts": 32,
        "top_k": 4,
        "sliding_window": 128,
        "rope_max_wavelength": 150_000,
        "rope_scaling_factor": 32.0,
    }
    sizes = sizes if published else small_decoder(num_experts=3)
    return made(published, hub.GptOssBackbone, words, sizes)


@model("keras-hub")
def keras_hub_gemma(published):
    """Gemma 2B."""
    sizes = {
        "vocabulary_size": 256_000,
        "num_layers": 18,
        "num_query_heads": 8,
        "num_key_value_heads": 1,
        "hidden_dim": 2048,
        "intermediate_dim": 32_768,
        "head_dim": 256,
    }
    sizes = sizes if published else small_decoder(head_dim=4)
    return made(published, hub.GemmaBackbone, words, sizes)


@model("keras-hub")
def keras_hub_f_net(published):
    """FNet base."""
    sizes = {
        "vocabulary_size": 32_000 if published else 11,
        "num_layers": 12 if published else 1,
        "hidden_dim": 768 if published else 24,
        "intermediate_dim": 3072 if published else 10,
        "max_sequence_length": 512 if published else 6,
    }
    return made(published, hub.FNetBackbone, classifier, sizes)


@model("keras-hub")
def keras_hub_deberta_v3(published):
    """DeBERTa v3 base."""
    sizes = {
        "vocabulary_size": 128_100 if published else 11,
        "num_layers": 12 if published else 1,
        "num_heads": 12 if published else 3,
        "hidden_dim": 768 if published else 24,
        "intermediate_dim": 3072 if published else 10,
        "max_sequence_length": 512 if published else 6,
        "bucket_size": 256 if published else 4,
    }
    return made(published, hub.DebertaV3Backbone, classifier, sizes)


@model("keras-hub")
def keras_hub_swin(published):
    """Swin-T."""
    side = 224 if published else 32
    sizes = {
        "image_shape": (side, side, 3),
        "patch_size": 4,
        "embed_dim": 96 if published else 6,
        "depths": (2, 2, 6, 2) if published else (1, 2),
        "num_heads": (3, 6, 12, 24) if published else (3, 3),
        "window_size": 7 if published else 4,
    }
    classes = 1000 if published else 5

    def make():
        body = hub.SwinTransformerBackbone(**sizes)
        pooled = keras.ops.mean(body.output, axis=1)
        return keras.Model(body.input, keras.layers.Dense(classes)(pooled))

    return functional(published, make, floats(2, side, side, 3))
