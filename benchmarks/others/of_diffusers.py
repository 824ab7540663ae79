"""Flax models of Hugging Face's diffusers."""

import warnings

import jax
import jax.numpy as jnp

from benchmarks.others import Model, floats, model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel
    from diffusers.models.vae_flax import FlaxAutoencoderKL


def made(module, *inputs) -> Model:
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(module.init, key, *inputs)

    def apply(variables, *inputs):
        return jax.tree.leaves(module.apply(variables, *inputs))

    return Model(apply, shapes, inputs)


@model("diffusers")
def diffusers_unet(published):
    """Stable Diffusion 1.5's; channels are second."""
    small = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 10,
    }
    usual = {"sample_size": 64, "cross_attention_dim": 768}
    module = FlaxUNet2DConditionModel(**(usual if published else small))
    side, text = (64, (2, 77, 768)) if published else (8, (2, 5, 10))
    channels = 4 if published else 3
    time = jnp.ones((2,), jnp.int32)
    return made(module, floats(2, channels, side, side), time, floats(*text))


@model("diffusers")
def diffusers_vae(published):
    """Stable Diffusion's."""
    usual = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    small = {
        "block_out_channels": (8, 12),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    module = FlaxAutoencoderKL(**(usual if published else small))
    side = 512 if published else 8
    return made(module, floats(2, 3, side, side))
