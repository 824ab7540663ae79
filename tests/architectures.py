"""Small networks of every kind in `MODELS`, and the papers' of MNIST."""

import jax.numpy as jnp
import numpy as np

from l0jax import models

CLASSIFIERS = tuple(name for name in models.MODELS if name != "decoder")
"""What gives a row of logits for an image."""


def inputs_for(model, batch, seed):
    """Random images, or random tokens."""
    rng, shape = np.random.default_rng(seed), (batch, *model.example.shape[1:])
    if isinstance(model, models.Decoder):
        return jnp.asarray(rng.integers(0, model.embed.shape[0], shape), jnp.int32)
    return jnp.float32(rng.normal(size=shape))


# Of each model: a small shape, one with odd sizes and colours, and the paper's.
ARCHITECTURES = {
    "mlp": {
        "small": {"features": (12, 7, 5, 3)},
        "odd": {"features": (9, 4)},
        "paper": {"features": (784, 300, 100, 10)},
    },
    "lenet5": {
        "small": {"shape": (16, 16, 1), "maps": (3, 4), "hidden": 6, "classes": 3},
        "odd": {"shape": (21, 18, 3), "maps": (4, 5), "hidden": 7, "classes": 4},
        "paper": {},
    },
    "vgg": {
        "small": {"stages": ((3,), (4, 5)), "classes": 3, "shape": (5, 4, 2)},
    },
    "pre_activation_resnet": {
        "small": {
            "stem": 3,
            "stages": (3, 5),
            "inner": ((2, 4), (3,)),
            "project": (False, True),
            "classes": 3,
            "shape": (6, 5, 2),
        },
        "odd": {
            "stem": 2,
            "stages": (3,),
            "inner": ((4,),),
            "project": (True,),
            "classes": 4,
            "shape": (3, 3, 1),
        },
    },
    "resnet": {
        "small": {
            "stem": 3,
            "stages": (3, 4),
            "inner": (((2,), (5,)), ((3,),)),
            "project": (False, True),
            "classes": 3,
            "shape": (11, 12, 2),
        },
        "odd": {
            "stem": 2,
            "stages": (4, 6),
            "inner": (((2, 3),), ((3, 2),)),
            "project": (True, True),
            "classes": 3,
            "shape": (9, 9, 3),
        },
    },
    "mobilenet": {
        "small": {
            "stem": 3,
            "widths": (4, 5),
            "strides": (1, 2),
            "classes": 3,
            "shape": (7, 6, 2),
        },
    },
    "mobilenet_v2": {
        "small": {
            "stem": 3,
            "stages": (3, 4),
            "inner": ((3,), (6, 5)),
            "widen": (False, True),
            "strides": (1, 2),
            "last": 6,
            "classes": 3,
            "shape": (9, 8, 2),
        },
    },
    "decoder": {
        "small": {
            "vocabulary": 11,
            "width": 6,
            "blocks": ((3, 2, 2, 3, 5), (2, 1, 3, 4, 7)),
            "length": 12,
        },
    },
    "i3d": {
        "small": {
            "stem": (3, 2, 2),
            "stages": (((2, (2, 3), (3, 2), 2),), ((2, (3, 2), (2, 2), 2),)),
            "pools": (
                ((1, 3, 3), (1, 2, 2)),
                ((3, 2, 1), (1, 1, 1)),
                ((2, 2, 2), (2, 2, 2)),
            ),
            "window": (3, 3, 3),
            "strides": (1, 1, 2),
            "classes": 3,
            "shape": (4, 8, 8, 1),
        },
    },
}
