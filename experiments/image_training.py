"""Training of convolutional networks with batch normalisation, one epoch at a time.

Images lie on the device as they are stored. A step takes its batch by numbers, crops
and flips it at random, normalises the colours and moves the weights by SGD, all in one
compiled program. (Steps are a Python loop: within `lax.scan` XLA's convolutions are
several times slower on a CPU, jax issue 12868.)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray, PyTree, UInt8

from experiments import data
from l0jax import units
from l0jax.dataflow import dataflow
from l0jax.methods.discrimination import Head
from l0jax.methods.task import cross_entropy
from l0jax.units import Groups

PADDING = 4
"""Pixels of zero around an image before it is cropped at random."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How weights are trained. The defaults are those of Zhuang et al. (2018) for
    CIFAR-10, but for the epochs, of which they take 400."""

    epochs: int = 20
    """passes over the training images"""
    batch_size: int = 128
    """images of a step"""
    learning_rate: float = 0.1
    """of SGD with Nesterov momentum"""
    momentum: float = 0.9
    """of SGD"""
    weight_decay: float = 1e-4
    """times the weights is added to their gradient"""
    drops: tuple[float, ...] = (0.4, 0.6)
    """shares of the epochs after which the learning rate is divided by ten"""
    augment: bool = True
    """crop and flip at random"""


class Images(NamedTuple):
    """Training images and how their colours are normalised."""

    images: UInt8[Array | np.ndarray, "n h w c"]
    labels: Int32[Array | np.ndarray, " n"]
    mean: Float[np.ndarray, " c"]
    deviation: Float[np.ndarray, " c"]


class State(NamedTuple):
    """All that training changes."""

    params: PyTree
    statistics: PyTree
    heads: dict[str, tuple[PyTree, PyTree]]
    optimizer: Any
    step: Array


def images_of(dataset: data.Dataset, examples: int | None = None) -> Images:
    """The first `examples` training images, with the mean and the deviation of each
    colour of all of them."""
    pixels = dataset.train.images.reshape(-1, dataset.train.images.shape[-1])
    return Images(
        dataset.train.images[:examples],
        dataset.train.labels[:examples],
        pixels.mean(0).astype(np.float32),
        pixels.std(0).astype(np.float32),
    )


def normalised(
    images: UInt8[Array, "batch h w c"], of: Images
) -> Float[Array, "batch h w c"]:
    """Each colour with mean 0 and deviation 1 over the training images."""
    mean, deviation = (jnp.reshape(a, (1, 1, 1, -1)) for a in (of.mean, of.deviation))
    return (images.astype(jnp.float32) - mean) / deviation


def augmented(
    key: PRNGKeyArray, images: Float[Array, "batch h w c"]
) -> Float[Array, "batch h w c"]:
    """Each image shifted by up to four pixels and, every other one, mirrored."""
    count, height, width, _ = images.shape
    shift, flip = jax.random.split(key)
    shifts = jax.random.randint(shift, (count, 2), 0, 2 * PADDING + 1)
    flips = jax.random.bernoulli(flip, shape=(count, 1, 1, 1))
    around = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
    padded = jnp.pad(images, around)

    def crop(image, at):
        size = (height, width, image.shape[2])
        return jax.lax.dynamic_slice(image, (at[0], at[1], 0), size)

    cropped = jax.vmap(crop)(padded, shifts)
    return jnp.where(flips, cropped[:, :, ::-1], cropped)


def optimizer_of(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """SGD, whose learning rate drops at shares of so many steps."""
    drops = {int(share * steps): 0.1 for share in recipe.drops}
    rate = optax.piecewise_constant_schedule(recipe.learning_rate, drops)
    return optax.chain(
        optax.add_decayed_weights(recipe.weight_decay),
        optax.sgd(rate, momentum=recipe.momentum, nesterov=True),
    )


Model = TypeVar("Model", bound=nnx.Module)


class Trainer(Generic[Model]):
    """A network in training.

    Args:
        model: where it starts; its own arrays are not changed.
        images: the training images.
        recipe: how it is trained.
        heads: additional classifiers, by the kernel after which they are attached.
        keep: units that stay closed, `{group: flags}`, of `groups`.
        penalty: added to the loss, a function of the parameters.
    """

    def __init__(
        self,
        model: Model,
        images: Images,
        recipe: Recipe,
        *,
        heads: Mapping[str, Head] | None = None,
        groups: Groups | None = None,
        keep: Mapping[str, np.ndarray] | None = None,
        penalty: Callable[[PyTree], Array] | None = None,
    ):
        if len(images.images) < recipe.batch_size:
            raise ValueError(
                f"{len(images.images)} training images don't fill a batch of "
                f"{recipe.batch_size}"
            )
        self.recipe = recipe
        self.images = Images(*jax.tree.map(jnp.asarray, images))
        self.per_epoch = len(images.images) // recipe.batch_size
        steps = self.per_epoch * recipe.epochs
        training = nnx.clone(model)
        training.train()
        self.graph, params, statistics = nnx.split(training, nnx.Param, ...)
        self.heads = {}
        of_heads = {}
        for name, head in (heads or {}).items():
            own = nnx.clone(head)
            own.train()
            self.heads[name], weights, rest = nnx.split(own, nnx.Param, ...)
            of_heads[name] = weights, rest
        # The additional losses move the weights before the network's own does
        # (algorithm S1 of Zhuang et al.), each with momentum of its own.
        self.optimizer = optimizer_of(recipe, steps)
        moved = {"params": params, "heads": {n: p for n, (p, _) in of_heads.items()}}
        pairs = 2 if heads else 1
        started = State(
            params,
            statistics,
            of_heads,
            tuple(self.optimizer.init(moved) for _ in range(pairs)),
            jnp.zeros((), jnp.int32),
        )
        # Copies, for a step gives the buffers of its state away.
        self.state = jax.tree.map(lambda a: jnp.array(a, copy=True), started)
        gates = None
        if keep is not None and groups is not None:
            gates = {name: jnp.float32(flags) for name, flags in keep.items()}
        self._step = jax.jit(
            functools.partial(self._turn, gates, groups, penalty), donate_argnums=0
        )

    def epoch(self, number: int, key: PRNGKeyArray) -> float:
        """Trains once over the images; the mean loss. Epoch `number` of a key is always
        the same."""
        key = jax.random.fold_in(key, number)
        order = jax.random.permutation(key, len(self.images.labels))
        order = order[: self.per_epoch * self.recipe.batch_size]
        losses = []
        for batch in order.reshape(self.per_epoch, -1):
            self.state, loss = self._step(self.state, batch, key, self.images)
            losses.append(loss)
        return float(jnp.stack(losses).mean())

    def trained(self) -> Model:
        """The network as it is now, in evaluation mode."""
        model = nnx.merge(self.graph, self.state.params, self.state.statistics)
        model = nnx.clone(model)
        model.eval()
        return model

    def trained_heads(self) -> dict[str, Head]:
        """The additional classifiers as they are now, in evaluation mode."""
        found = {}
        for name, graph in self.heads.items():
            found[name] = nnx.clone(nnx.merge(graph, *self.state.heads[name]))
            found[name].eval()
        return found

    def _turn(self, gates, groups, penalty, state, batch, key, images):
        x = normalised(images.images[batch], images)
        labels = images.labels[batch]
        if self.recipe.augment:
            x = augmented(jax.random.fold_in(key, state.step), x)

        def run(params, x):
            if gates is not None:
                params = units.apply_gates(params, gates, groups)
            net = nnx.merge(self.graph, params, state.statistics, copy=True)
            logits = net(x)
            return logits, nnx.split(net, nnx.Param, ...)[2]

        def losses(moved):
            """The network's own loss, and the sum of the additional ones."""
            params, extra = moved["params"], {}
            if not self.heads:
                logits, statistics = run(params, x)
            else:
                flow = dataflow(run, params, x)
                at = {name: flow.after(name) for name in self.heads}
                wanted = [*flow.outs, *at.values()]
                values = flow.evaluate(flow.known(params, x), wanted)
                shapes = jax.eval_shape(run, params, x)
                found = values[: len(flow.outs)]
                logits, statistics = jax.tree.unflatten(
                    jax.tree.structure(shapes), found
                )
                for name, value in zip(at, values[len(flow.outs) :], strict=True):
                    graph, (_, rest) = self.heads[name], state.heads[name]
                    head = nnx.merge(graph, moved["heads"][name], rest, copy=True)
                    extra[name] = (head(value), nnx.split(head, nnx.Param, ...)[2])
            own = cross_entropy(logits, labels).mean()
            if penalty is not None:
                own = own + penalty(params)
            others = [cross_entropy(y, labels).mean() for y, _ in extra.values()]
            beside = sum(others, jnp.zeros(()))
            rest = {name: written for name, (_, written) in extra.items()}
            return (own, beside), (statistics, rest)

        moved: Any = {
            "params": state.params,
            "heads": {name: params for name, (params, _) in state.heads.items()},
        }
        (own, beside), pull, (statistics, rest) = jax.vjp(losses, moved, has_aux=True)
        optimizers = list(state.optimizer)
        one, none = jnp.ones(()), jnp.zeros(())
        turns = [(one, none)] if len(optimizers) == 1 else [(none, one), (one, none)]
        for i, turn in enumerate(turns):
            (slopes,) = pull(turn)
            updates, optimizers[i] = self.optimizer.update(slopes, optimizers[i], moved)
            moved = jax.tree.map(jnp.add, moved, updates)
        heads = {name: (moved["heads"][name], rest[name]) for name in state.heads}
        after = State(
            moved["params"], statistics, heads, tuple(optimizers), state.step + 1
        )
        return after, own + beside


def error(model: nnx.Module, split: data.Split, of: Images, batch: int = 500) -> float:
    """The share of images of a split that the network gets wrong, in percent."""
    graph, state = nnx.split(model)
    colours = of.mean, of.deviation
    count = len(split.labels)
    batch = max(n for n in range(1, min(batch, count) + 1) if count % n == 0)
    found = [
        _wrong(
            graph,
            state,
            colours,
            split.images[at : at + batch],
            split.labels[at : at + batch],
        )
        for at in range(0, count, batch)
    ]
    return 100 * float(jnp.stack(found).sum()) / count


def errors(model: nnx.Module, dataset: data.Dataset, of: Images) -> dict[str, float]:
    """In per cent, of the validation and of the test images."""
    return {
        "validation": error(model, dataset.validation, of),
        "test": error(model, dataset.test, of),
    }


@functools.partial(jax.jit, static_argnums=0)
def _wrong(graph, state, colours, images, labels):
    """How many of a batch the network gets wrong."""
    of = Images(images, labels, *colours)
    logits = nnx.merge(graph, state)(normalised(images, of))
    return (logits.argmax(-1) != labels).sum()


def recalibrated(model: Model, of: Images, batch_size: int = 128) -> Model:
    """The network in evaluation mode with the statistics of the training images: the
    means over batches of the mean and of the variance within each. With the gates of
    test time they are other ones than with drawn ones.

    Raises:
        ValueError: if the images don't fill a batch.
    """
    count = len(of.labels) // batch_size
    if not count:
        raise ValueError(f"{len(of.labels)} images don't fill a batch of {batch_size}")
    fitting = nnx.clone(model)
    fitting.train()
    for _, module in nnx.iter_modules(fitting):
        if isinstance(module, nnx.BatchNorm):
            # So that what is written is the statistics of the batch alone.
            module.momentum = 0.0
    graph, params, before = nnx.split(fitting, nnx.Param, ...)
    colours = of.mean, of.deviation
    total = jax.tree.map(jnp.zeros_like, before)
    for images in np.split(np.asarray(of.images[: count * batch_size]), count):
        found = _statistics(graph, params, before, colours, images)
        total = jax.tree.map(lambda a, b: a + b / count, total, found)
    evaluated = nnx.clone(model)
    evaluated.eval()
    graph, params, _ = nnx.split(evaluated, nnx.Param, ...)
    return nnx.merge(graph, params, total, copy=True)


@functools.partial(jax.jit, static_argnums=0)
def _statistics(graph, params, before, colours, images):
    """The statistics that a batch leaves."""
    of = Images(images, jnp.zeros(len(images), jnp.int32), *colours)
    model = nnx.merge(graph, params, before, copy=True)
    model(normalised(images, of))
    return nnx.split(model, nnx.Param, ...)[2]
