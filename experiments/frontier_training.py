"""What dense networks, and those that close, learn from in `experiments.frontier`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Int, Shaped

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


def places_of(moved: int) -> np.ndarray:
    """Where an image can be moved to: pixels down and to the right, a row for each."""
    steps = range(-moved, moved + 1)
    return np.array([(down, right) for down in steps for right in steps])


def placed(
    images: Shaped[Array, "batch height width colours"],
    at: Int[Array, " batch"],
    moved: int,
) -> Shaped[Array, "batch height width colours"]:
    """Each image at one of `places_of`; what moves in is 0.

    Args:
        images: as they are stored.
        at: rows of `places_of`.
        moved: pixels, at most.
    """
    sides = (moved, moved)
    padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))

    def cut(image: Any, place: Any) -> Any:
        start = moved - place[0], moved - place[1], 0
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    return jax.vmap(cut)(padded, jnp.asarray(places_of(moved))[at])


@functools.cache
def learned_from(
    scale: float, dropped: float, distil: float, softness: float, moved: int
) -> Callable[..., Any]:
    """The loss of the labels, and of what the dense network says where that is there;
    one function for each setting, so that all seeds are one program."""

    def loss(model: Any, batch: Examples, key: Any) -> tuple[Any, dict[str, Any]]:
        images, teacher = batch.images, batch.teacher
        if moved:
            key, of_place = jax.random.split(key)
            count = len(places_of(moved))
            at = jax.random.randint(of_place, images.shape[:1], 0, count)
            images = placed(images, at, moved)
            if teacher is not None:
                teacher = jnp.take_along_axis(teacher, at[:, None, None], 1)[:, 0]
        images = images.astype(jnp.float32) / scale
        if dropped:
            seen = jax.random.bernoulli(key, 1 - dropped, images.shape)
            images = jnp.where(seen, images / (1 - dropped), 0.0)
        logits = devices.logits_of(model, images)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        found = nats.mean()
        if teacher is not None:
            apart = optax.losses.kl_divergence_with_log_targets(
                jax.nn.log_softmax(logits / softness),
                jax.nn.log_softmax(teacher / softness),
            ).mean()
            # (Its gradients fall with the square of the temperature.)
            found = (1 - distil) * found + distil * softness**2 * apart
        return found, {"error": (logits.argmax(-1) != batch.labels).mean()}

    return loss


def said_by(model: Any, dataset: data.Dataset, moved: int) -> np.ndarray:
    """Logits of the training images; where these are moved, with another axis for the
    rows of `places_of`."""
    graph, state = nnx.split(model)

    @jax.jit
    def said(state, images, place):
        at = jnp.full(len(images), place)
        scaled = placed(images, at, moved).astype(jnp.float32) / dataset.scale
        return nnx.merge(graph, state)(scaled)

    images = dataset.train.images
    parts = np.split(images, range(TOGETHER, len(images), TOGETHER))
    found = [
        np.concatenate([said(state, part, place) for part in parts])
        for place in range(len(places_of(moved)))
    ]
    return np.stack(found, 1) if moved else found[0]
