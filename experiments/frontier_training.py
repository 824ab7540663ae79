"""What dense networks, and those that close, learn from in `experiments.frontier`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.harness import devices
from experiments.mnist_training import weight_groups
from experiments.tasks import data
from l0jax import models
from l0jax.structure import Structure

TOGETHER = 500
"""Images of a batch where nothing is learned."""


class Examples(NamedTuple):
    """Images, labels, and logits of a teacher."""

    images: Any
    labels: Any
    teacher: Any = None


def of_single_weights(model: Any) -> tuple[Structure, tuple[str, ...]]:
    """The structure with a group for each kernel, of its single weights, and the names
    of these."""
    structure, single = models.structure(model), weight_groups(nnx.state(model))
    for group in single.values():
        structure = structure.add(group)
    return structure, tuple(single)


@functools.cache
def learned_from(
    scale: float, dropped: float, distil: float, softness: float
) -> Callable[..., Any]:
    """The loss of the labels, and of what the dense network says where that is there;
    one function for each setting, so that all seeds are one program."""

    def loss(model: Any, batch: Examples, key: Any) -> tuple[Any, dict[str, Any]]:
        images = batch.images.astype(jnp.float32) / scale
        if dropped:
            seen = jax.random.bernoulli(key, 1 - dropped, images.shape)
            images = jnp.where(seen, images / (1 - dropped), 0.0)
        logits = devices.logits_of(model, images)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        found = nats.mean()
        if batch.teacher is not None:
            apart = optax.losses.kl_divergence_with_log_targets(
                jax.nn.log_softmax(logits / softness),
                jax.nn.log_softmax(batch.teacher / softness),
            ).mean()
            # (Its gradients fall with the square of the temperature.)
            found = (1 - distil) * found + distil * softness**2 * apart
        return found, {"error": (logits.argmax(-1) != batch.labels).mean()}

    return loss


def said_by(model: Any, dataset: data.Dataset) -> np.ndarray:
    """Logits of the training images."""
    graph, state = nnx.split(model)

    @jax.jit
    def said(state, images):
        scaled = images.astype(jnp.float32) / dataset.scale
        return nnx.merge(graph, state)(scaled)

    images = dataset.train.images
    parts = range(TOGETHER, len(images), TOGETHER)
    return np.concatenate([said(state, part) for part in np.split(images, [*parts])])
