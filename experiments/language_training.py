"""What a language model learns from: windows of a text, a loss, and rates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from experiments.language_settings import Recipe
from l0jax.models.decoder import Decoder


class Windows(NamedTuple):
    """Pieces of a text, and what a teacher says of each next character."""

    tokens: Any
    teacher: Any = None


def loss(model: Decoder, batch: Windows) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Nats a character; with a teacher the mean of that and of the divergence from what
    it says (Hinton, Vinyals and Dean 2015, at a temperature of 1)."""
    tokens = batch.tokens.astype(jnp.int32)
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    if batch.teacher is None:
        return nats, {"nats": nats}
    said = batch.teacher.astype(jnp.float32)
    apart = optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(logits), said
    ).mean()
    return (nats + apart) / 2, {"nats": nats, "from the base": apart}


def said_by(teacher: Decoder, windows: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities that a model gives to each next character."""
    parts = np.array_split(windows, max(len(windows) // 32, 1))
    split = nnx.split(teacher)
    return np.concatenate([np.asarray(_said(split, part)) for part in parts])


@jax.jit
def _said(graph_and_state: Any, tokens: Array) -> Array:
    model = nnx.merge(*graph_and_state)
    logits = model(tokens[:, :-1].astype(jnp.int32))
    return jax.nn.log_softmax(logits).astype(jnp.float16)


def adam(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """Of the weights."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        recipe.learning_rate,
        warm_up := max(round(recipe.warm_up * steps), 1),
        max(steps, warm_up + 1),
        recipe.learning_rate / 10,
    )

    def matrices(tree: Any) -> Any:
        return jax.tree.map(lambda array: array.ndim > 1, tree)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.99, weight_decay=recipe.weight_decay, mask=matrices),
    )
