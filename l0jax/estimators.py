r"""Gradients of an expected loss in the logits of Bernoulli gates.

The gates are exactly 0 or 1, $z \sim \text{Bernoulli}(\sigma(\phi))$, so that no path
leads from the loss back to $\phi$. Each estimator evaluates a loss, which may be any
function of the gates, at one or two draws and gives a *surrogate*: a scalar with the
value of the loss whose gradient in the logits is the estimate, and whose gradient in
whatever else the loss reads (weights) is that of the loss. So `jax.grad` of a surrogate
is all that a training step needs.

Each takes a key, the logits, the loss, and `has_aux`: whether the loss returns a pair
of its value and a pytree of whatever else is of interest. The mean of that over the
draws (of what isn't real, counters and keys that a network writes, that of the first)
is then returned beside the surrogate, as by `jax.value_and_grad`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from l0jax import gating
from l0jax.gates import noise

Vectors = Mapping[str, Float[Array, " units"]]
Loss = Callable[[dict[str, Float[Array, " units"]]], Any]
Estimator = Callable[..., Any]


def _with_aux(estimate: Callable) -> Estimator:
    """An estimator of losses with and without aux, from one of losses with it."""

    @functools.wraps(estimate)
    def estimator(key, logits, loss, *more, has_aux=False, **named):
        pair = loss if has_aux else lambda z: (loss(z), ())
        surrogate, aux = estimate(key, logits, pair, *more, **named)
        return (surrogate, aux) if has_aux else surrogate

    return estimator


@_with_aux
def straight_through(
    key: PRNGKeyArray, logits: Vectors, loss: Loss
) -> tuple[Float[Array, ""], Any]:
    r"""The derivative in z as if z were its probability (Bengio et al. 2013).

    The only one here that is biased, unless the loss is linear in each gate, and the
    only one that needs the loss to be differentiable in the gates.
    """
    draws = {}
    for name, u in _uniform(key, logits).items():
        p = jax.nn.sigmoid(logits[name])
        # (In this order draws are exactly 0 and 1.)
        draws[name] = _open(u < p, p) + (p - jax.lax.stop_gradient(p))
    return loss(draws)


@_with_aux
def reinforce(
    key: PRNGKeyArray,
    logits: Vectors,
    loss: Loss,
    baseline: Float[Array, ""] | float = 0,
) -> tuple[Float[Array, ""], Any]:
    r"""$(f(z) - c)(z - \sigma(\phi))$ (Williams 1992), one evaluation.

    Args:
        key: of the draw.
        logits: of the gates.
        loss: f.
        baseline: c, anything that does not depend on this draw, such as a running mean
            of earlier losses.
    """
    z, slopes = {}, {}
    for name, u in _uniform(key, logits).items():
        p = jax.nn.sigmoid(logits[name])
        z[name] = _open(u < p, p)
        slopes[name] = z[name] - p
    value, aux = loss(z)
    return value + _credit(value - baseline, slopes, logits), aux


@_with_aux
def reinforce_two(
    key: PRNGKeyArray, logits: Vectors, loss: Loss
) -> tuple[Float[Array, ""], Any]:
    r"""REINFORCE with two draws, each the other's baseline (Kool et al. 2019):
    $\tfrac12 (f(z) - f(z'))(z - z')$."""
    first, second = {}, {}
    one, other = (_uniform(k, logits) for k in jax.random.split(key))
    for name, phi in logits.items():
        p = jax.nn.sigmoid(phi)
        first[name], second[name] = _open(one[name] < p, p), _open(other[name] < p, p)
    (a, b), aux = _both(loss, first, second)
    slopes = {name: (first[name] - second[name]) / 2 for name in logits}
    return (a + b) / 2 + _credit(a - b, slopes, logits), aux


@_with_aux
def augment_reinforce(
    key: PRNGKeyArray, logits: Vectors, loss: Loss
) -> tuple[Float[Array, ""], Any]:
    r"""AR (Yin and Zhou 2019): $f(1[u < \sigma(\phi)]) (1 - 2u)$, one evaluation."""
    noises = _uniform(key, logits)
    z, slopes = {}, {}
    for name, u in noises.items():
        z[name] = _open(u < jax.nn.sigmoid(logits[name]), u)
        slopes[name] = 1 - 2 * u
    value, aux = loss(z)
    return value + _credit(value, slopes, logits), aux


@_with_aux
def arm(key: PRNGKeyArray, logits: Vectors, loss: Loss) -> tuple[Float[Array, ""], Any]:
    r"""Augment-REINFORCE-merge (Yin and Zhou 2019; of Li and Ji 2019, L0-ARM):
    $(f(1[u > \sigma(-\phi)]) - f(1[u < \sigma(\phi)])) (u - \tfrac12)$."""
    noises, (first, second) = _antithetic(key, logits)
    (a, b), aux = _both(loss, first, second)
    slopes = {name: u - 0.5 for name, u in noises.items()}
    return (a + b) / 2 + _credit(a - b, slopes, logits), aux


@_with_aux
def disarm(
    key: PRNGKeyArray, logits: Vectors, loss: Loss
) -> tuple[Float[Array, ""], Any]:
    r"""DisARM (Dong, Mnih and Tucker 2020), ARM with the noise integrated out:
    $\tfrac12 (f(z) - f(\tilde z)) \, (z - \tilde z) \, \sigma(|\phi|)$."""
    _, (first, second) = _antithetic(key, logits)
    (a, b), aux = _both(loss, first, second)
    slopes = {
        name: (first[name] - second[name]) / 2 * jax.nn.sigmoid(jnp.abs(phi))
        for name, phi in logits.items()
    }
    return (a + b) / 2 + _credit(a - b, slopes, logits), aux


ESTIMATORS: dict[str, Estimator] = {
    "straight_through": straight_through,
    "reinforce": reinforce,
    "reinforce_two": reinforce_two,
    "augment_reinforce": augment_reinforce,
    "arm": arm,
    "disarm": disarm,
}


def _uniform(key: PRNGKeyArray, logits: Vectors) -> dict[str, Float[Array, " units"]]:
    """Noise in (0, 1) for every gate; groups draw as in `l0jax.gating`."""
    return {
        name: noise.uniform(gating.key_for(key, name), phi.shape).astype(phi.dtype)
        for name, phi in logits.items()
    }


def _antithetic(key: PRNGKeyArray, logits: Vectors):
    """The noise, and the gates that it and its mirror image open."""
    noises = _uniform(key, logits)
    first, second = {}, {}
    for name, u in noises.items():
        p = jax.nn.sigmoid(logits[name])
        first[name], second[name] = _open(u > 1 - p, p), _open(u < p, p)
    return noises, (first, second)


def _both(loss: Loss, first: Vectors, second: Vectors):
    """The values at two draws, and the mean of what else there is that is real."""
    (a, of_a), (b, of_b) = loss(dict(first)), loss(dict(second))

    def mean(x, y):
        real = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return (x + y) / 2 if real else x

    return (a, b), jax.tree.map(mean, of_a, of_b)


def _open(which: Array, like: Array) -> Array:
    return which.astype(like.dtype)


def _credit(
    advantage: Float[Array, ""], slopes: Vectors, logits: Vectors
) -> Float[Array, ""]:
    """Zero, with the gradient advantage times slope in the logits."""
    total = jnp.zeros((), advantage.dtype)
    for name, phi in logits.items():
        estimate = jax.lax.stop_gradient(advantage * slopes[name])
        total = total + (estimate * (phi - jax.lax.stop_gradient(phi))).sum()
    return total
