"""Flax models of Hugging Face's transformers, built from classes of settings."""

import operator
import types

import jax
import jax.numpy as jnp
import transformers as hf

from benchmarks.others import Model, image, model, tokens

INT = jnp.int32
LOGITS = operator.attrgetter("logits")

# T5 names the bound of `jnp.clip` as JAX did before 0.4.27.
hf.models.t5.modeling_flax_t5.jnp = types.SimpleNamespace(
    **vars(jnp) | {"clip": lambda x, a_max: jnp.minimum(x, a_max)}
)


def made(network, config, *inputs, unpack=LOGITS, **named) -> Model:
    """`network(config)` without weights, called as its module is; its hidden states
    are no outputs."""
    # (In float64 where that is enabled.)
    wrapped = network(config, dtype=jnp.result_type(float), _do_init=False)
    module = wrapped.module
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(
        lambda key, *inputs: module.init(key, *inputs, **named), key, *inputs
    )

    def apply(variables, *inputs):
        return unpack(module.apply(variables, *inputs, **named))

    return Model(apply, shapes, inputs)


def numbered(x):
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=INT), x.shape)


def decoder(network, published, config):
    x = tokens(published)
    return made(network, config, x, jnp.ones(x.shape, INT), numbered(x))


@model("transformers")
def transformers_gpt2(published):
    small = {
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 3,
        "vocab_size": 11,
        "n_positions": 8,
    }
    config = hf.GPT2Config(**({} if published else small))
    return decoder(hf.FlaxGPT2LMHeadModel, published, config)


@model("transformers")
def transformers_llama(published):
    """TinyLlama 1.1B."""
    sizes = {
        "hidden_size": 2048 if published else 12,
        "intermediate_size": 5632 if published else 10,
        "num_hidden_layers": 22 if published else 2,
        "num_attention_heads": 32 if published else 6,
        "num_key_value_heads": 4 if published else 3,
        "vocab_size": 32_000 if published else 11,
        "max_position_embeddings": 2048 if published else 8,
    }
    return decoder(hf.FlaxLlamaForCausalLM, published, hf.LlamaConfig(**sizes))


@model("transformers")
def transformers_mistral(published):
    """Mistral 7B, with a table of positions of the length of its window."""
    sizes = {
        "hidden_size": 4096 if published else 12,
        "intermediate_size": 14_336 if published else 10,
        "num_hidden_layers": 32 if published else 2,
        "num_attention_heads": 32 if published else 6,
        "num_key_value_heads": 8 if published else 3,
        "vocab_size": 32_000 if published else 11,
        "max_position_embeddings": 4096 if published else 8,
        "sliding_window": 4096 if published else 4,
    }
    return decoder(hf.FlaxMistralForCausalLM, published, hf.MistralConfig(**sizes))


@model("transformers")
def transformers_gemma(published):
    """Gemma 2B."""
    sizes = {
        "hidden_size": 2048 if published else 12,
        "intermediate_size": 16_384 if published else 10,
        "num_hidden_layers": 18 if published else 2,
        "num_attention_heads": 8 if published else 3,
        "num_key_value_heads": 1,
        "head_dim": 256 if published else 4,
        "vocab_size": 256_000 if published else 11,
        "max_position_embeddings": 8192 if published else 8,
    }
    return decoder(hf.FlaxGemmaForCausalLM, published, hf.GemmaConfig(**sizes))


@model("transformers")
def transformers_gpt_neo(published):
    small = {
        "hidden_size": 12,
        "num_layers": 2,
        "num_heads": 3,
        "attention_types": [[["global", "local"], 1]],
        "vocab_size": 11,
        "max_position_embeddings": 8,
        "window_size": 4,
    }
    config = hf.GPTNeoConfig(**({} if published else small))
    return decoder(hf.FlaxGPTNeoForCausalLM, published, config)


@model("transformers")
def transformers_gptj(published):
    """GPT-J 6B."""
    small = {
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 3,
        "rotary_dim": 2,
        "vocab_size": 11,
        "n_positions": 8,
    }
    config = hf.GPTJConfig(**({} if published else small))
    return decoder(hf.FlaxGPTJForCausalLM, published, config)


@model("transformers")
def transformers_opt(published):
    small = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "ffn_dim": 10,
        "num_attention_heads": 3,
        "vocab_size": 11,
        "max_position_embeddings": 8,
        "word_embed_proj_dim": 12,
    }
    config = hf.OPTConfig(**({} if published else small))
    return decoder(hf.FlaxOPTForCausalLM, published, config)


def small_bert(**more):
    return {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 10,
        "vocab_size": 11,
        "max_position_embeddings": 16,
        **more,
    }


def encoder(network, settings, published, **more):
    config = settings(**({} if published else small_bert(**more)))
    x = tokens(published)
    one = jnp.ones(x.shape, INT)
    return made(network, config, x, one, jnp.zeros(x.shape, INT), numbered(x), None)


@model("transformers")
def transformers_bert(published):
    network = hf.FlaxBertForSequenceClassification
    return encoder(network, hf.BertConfig, published)


@model("transformers")
def transformers_roberta(published):
    network = hf.FlaxRobertaForMaskedLM
    return encoder(network, hf.RobertaConfig, published, pad_token_id=1)


@model("transformers")
def transformers_electra(published):
    network = hf.FlaxElectraForMaskedLM
    return encoder(network, hf.ElectraConfig, published, embedding_size=8)


@model("transformers")
def transformers_albert(published):
    config = hf.AlbertConfig(
        **(
            {
                "hidden_size": 768,
                "num_attention_heads": 12,
                "intermediate_size": 3072,
            }
            if published
            else small_bert(embedding_size=8)
        )
    )
    x = tokens(published)
    one = jnp.ones(x.shape, INT)
    network = hf.FlaxAlbertForMaskedLM
    return made(network, config, x, one, jnp.zeros(x.shape, INT), numbered(x))


@model("transformers")
def transformers_roformer(published):
    config = hf.RoFormerConfig(**({} if published else small_bert(embedding_size=12)))
    x = tokens(published)
    one, zero = jnp.ones(x.shape, INT), jnp.zeros(x.shape, INT)
    return made(hf.FlaxRoFormerForMaskedLM, config, x, one, zero, None)


@model("transformers")
def transformers_distilbert(published):
    small = {
        "dim": 12,
        "n_layers": 2,
        "n_heads": 3,
        "hidden_dim": 10,
        "vocab_size": 11,
        "max_position_embeddings": 16,
    }
    config = hf.DistilBertConfig(**({} if published else small))
    x = tokens(published)
    return made(hf.FlaxDistilBertForMaskedLM, config, x, jnp.ones(x.shape, INT))


def pictures(published):
    side = 224 if published else 16
    return jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)


LABELS = {"num_labels": 1000}


def small_vit(**more):
    return {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 10,
        "image_size": 16,
        "patch_size": 8,
        **more,
    }


@model("transformers")
def transformers_vit(published):
    config = hf.ViTConfig(**(LABELS if published else small_vit()))
    return made(hf.FlaxViTForImageClassification, config, pictures(published))


@model("transformers")
def transformers_dinov2(published):
    usual = {"image_size": 224, "patch_size": 14, **LABELS}
    config = hf.Dinov2Config(**(usual if published else small_vit(mlp_ratio=2)))
    return made(hf.FlaxDinov2ForImageClassification, config, pictures(published))


@model("transformers")
def transformers_beit(published):
    more = {"use_relative_position_bias": True, "use_mask_token": False}
    sizes = LABELS if published else small_vit()
    config = hf.BeitConfig(**more, **sizes)
    return made(hf.FlaxBeitForImageClassification, config, pictures(published))


@model("transformers")
def transformers_resnet(published):
    small = {
        "embedding_size": 6,
        "hidden_sizes": [8, 10],
        "depths": [1, 2],
        "layer_type": "bottleneck",
    }
    config = hf.ResNetConfig(**(LABELS if published else small))
    return made(hf.FlaxResNetForImageClassification, config, image(published))


@model("transformers")
def transformers_regnet(published):
    small = {
        "embedding_size": 6,
        "hidden_sizes": [8, 12],
        "depths": [1, 2],
        "groups_width": 4,
    }
    config = hf.RegNetConfig(**(LABELS if published else small))
    return made(hf.FlaxRegNetForImageClassification, config, image(published))


def pair(published):
    """Tokens and a mask of an encoder, and those of a decoder."""
    x, y = tokens(published), tokens(published, 5)
    return x, jnp.ones(x.shape, INT), y, jnp.ones(y.shape, INT)


@model("transformers")
def transformers_t5(published):
    small = {
        "d_model": 12,
        "d_kv": 4,
        "d_ff": 10,
        "num_layers": 2,
        "num_heads": 3,
        "vocab_size": 11,
    }
    config = hf.T5Config(**({} if published else small))
    return made(hf.FlaxT5ForConditionalGeneration, config, *pair(published))


@model("transformers")
def transformers_mt5(published):
    small = {
        "d_model": 12,
        "d_kv": 4,
        "d_ff": 10,
        "num_layers": 1,
        "num_heads": 3,
        "vocab_size": 11,
    }
    config = hf.MT5Config(**({} if published else small))
    return made(hf.FlaxMT5ForConditionalGeneration, config, *pair(published))


def small_bart(**more):
    return {
        "d_model": 12,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 10,
        "decoder_ffn_dim": 9,
        "vocab_size": 11,
        **more,
    }


@model("transformers")
def transformers_bart(published):
    more = small_bart(max_position_embeddings=16)
    config = hf.BartConfig(**({} if published else more))
    x, mask, y, causal = pair(published)
    inputs = x, mask, y, causal, numbered(x), numbered(y)
    return made(hf.FlaxBartForConditionalGeneration, config, *inputs)


@model("transformers")
def transformers_whisper(published):
    small = small_bart(
        num_mel_bins=5, max_source_positions=8, max_target_positions=8
    ) | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.WhisperConfig(
        **({"num_mel_bins": 80} if published else small),
    )
    bins, length = config.num_mel_bins, 2 * config.max_source_positions
    sound = jax.ShapeDtypeStruct((2, bins, length), jnp.float32)
    y = tokens(published, 5)
    inputs = sound, y, jnp.ones(y.shape, INT), numbered(y)
    return made(hf.FlaxWhisperForConditionalGeneration, config, *inputs)


@model("transformers")
def transformers_clip(published):
    part = small_vit()
    words = small_bert(max_position_embeddings=8, eos_token_id=10, bos_token_id=0)
    small = {"text_config": words, "vision_config": part, "projection_dim": 7}
    config = hf.CLIPConfig(**({} if published else small))
    x = tokens(published, length=77)
    inputs = x, pictures(published), jnp.ones(x.shape, INT), numbered(x)
    both = operator.attrgetter("logits_per_image", "logits_per_text")
    return made(hf.FlaxCLIPModel, config, *inputs, unpack=both)


@model("transformers")
def transformers_wav2vec2(published):
    """The large one, of a second of sound."""
    small = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 10,
        "conv_dim": (6, 6),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "vocab_size": 11,
    }
    usual = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "conv_bias": True,
        "do_stable_layer_norm": True,
        "feat_extract_norm": "layer",
    }
    config = hf.Wav2Vec2Config(**(usual if published else small))
    sound = jax.ShapeDtypeStruct((2, 16_000 if published else 100), jnp.float32)
    first = operator.itemgetter(0)
    return made(hf.FlaxWav2Vec2ForCTC, config, sound, unpack=first)
