"""Training of convolutional networks with batch normalisation, one epoch at a time.

Images lie on the device as they are stored. A step takes its batch by numbers, crops
and flips it at random, normalises the colours and moves the weights by SGD, all in one
compiled program. (On a CPU steps are a Python loop: see `loop.by_step`.)
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt8

from experiments.harness import devices
from experiments.harness.devices import OnMesh
from experiments.harness.loop import Run, by_step
from experiments.tasks import data
from l0jax import train
from l0jax.dataflow import dataflow
from l0jax.methods.discrimination import Head
from l0jax.methods.task import cross_entropy
from l0jax.structure import Structure

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
    """shares of the epochs after which the learning rate drops"""
    drop_factor: float = 0.1
    """of the rate at each drop"""
    cycle: float | None = None
    """in the place of drops a single cycle (Smith and Topin 2018): over this share of
    the steps the rate rises from 0, over the others it falls to 0, in lines"""
    smoothing: float = 0.0
    """share of each label that all classes have in equal parts (Szegedy et al. 2016);
    in training alone: scores look at whole labels"""
    augment: bool = True
    """crop and flip at random"""

    def check(self, name: str, least: int = 1) -> None:
        """Raises ValueError, which names the recipe, for what can't be trained.

        Args:
            name: of the recipe.
            least: epochs that there must be.
        """
        for field, lowest in (("epochs", least), ("batch_size", 1)):
            if getattr(self, field) < lowest:
                raise ValueError(
                    f"{name}.{field} must be at least {lowest}, got "
                    f"{getattr(self, field)}"
                )
        if self.cycle is not None and not 0 <= self.cycle < 1:
            raise ValueError(f"{name}.cycle must lie in [0, 1), got {self.cycle}")
        factor = self.drop_factor
        if not 0 < factor < 1:
            raise ValueError(f"{name}.drop_factor must lie in (0, 1), got {factor}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(
                f"{name}.smoothing must lie in [0, 1), got {self.smoothing}"
            )


class Images(NamedTuple):
    """Training images and how their colours are normalised."""

    images: UInt8[Array | np.ndarray, "n h w c"]
    labels: Int32[Array | np.ndarray, " n"]
    mean: Float[np.ndarray, " c"]
    deviation: Float[np.ndarray, " c"]


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


def check_filled(images: Images, batch_size: int) -> None:
    """Raises ValueError if the images don't fill a batch."""
    if len(images.labels) < batch_size:
        raise ValueError(
            f"{len(images.labels)} training images don't fill a batch of {batch_size}"
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


def smoothed(
    logits: Float[Array, "batch classes"], labels: Int32[Array, " batch"], share: float
) -> Float[Array, ""]:
    """The mean cross-entropy, of labels of which all classes have a share in equal
    parts."""
    logits = logits.astype(jnp.float32)
    told = cross_entropy(logits, labels)
    # The mean of what each class would cost is what equal parts cost.
    alike = -jax.nn.log_softmax(logits).mean(-1)
    return ((1 - share) * told + share * alike).mean()


def optimizer_of(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """SGD with the learning rates of a recipe of so many steps."""
    if recipe.cycle is None:
        drops = {int(share * steps): recipe.drop_factor for share in recipe.drops}
        rate = optax.piecewise_constant_schedule(recipe.learning_rate, drops)
    else:
        rate = one_cycle(recipe.learning_rate, recipe.cycle, steps)
    return optax.chain(
        optax.add_decayed_weights(recipe.weight_decay),
        optax.sgd(rate, momentum=recipe.momentum, nesterov=True),
    )


def one_cycle(highest: float, share: float, steps: int) -> optax.Schedule:
    """A line up, and one down to 0 after the last step.

    Args:
        highest: rate.
        share: of the steps before it is reached.
        steps: of the training.
    """
    rising = min(round(share * steps), max(steps - 1, 0))
    up = optax.linear_schedule(highest / (rising + 1), highest, rising)
    down = optax.linear_schedule(highest, 0.0, max(steps - rising, 1))
    return optax.join_schedules([up, down], [rising])


Model = TypeVar("Model", bound=nnx.Module)


class Trainer(Generic[Model]):
    """A network in training.

    Args:
        model: where it starts; its own arrays are not changed.
        images: the training images.
        recipe: how it is trained.
        key: from which all that is random is derived.
        heads: additional classifiers, by the kernel after which they are attached.
        structure: of the network, if units stay closed.
        keep: which units don't stay closed, `{group: flags}`.
        on: the devices it is trained on; by default one.
        **how: other arguments of `train.Training`: gates, a target, a penalty.

    Attributes:
        training, state: what is trained, and how far; on one device but for `run`.
    """

    def __init__(
        self,
        model: Model,
        images: Images,
        recipe: Recipe,
        key: PRNGKeyArray,
        *,
        heads: Mapping[str, Head] | None = None,
        structure: Structure | None = None,
        keep: Mapping[str, np.ndarray] | None = None,
        on: OnMesh | None = None,
        **how: Any,
    ):
        check_filled(images, recipe.batch_size)
        self.heads = tuple(heads or ())
        steps = len(images.labels) // recipe.batch_size * recipe.epochs
        both: Any = nnx.clone(model)
        if heads:
            both.heads = nnx.List([nnx.clone(head) for head in heads.values()])
        if keep:
            how["gate"] = train.Chosen(keep)
        if "gate" in how:
            how["structure"] = structure
        # The additional losses move the weights before the network's own does
        # (algorithm S1 of Zhuang et al.), each by a step of its own. Of SGD with
        # momentum these are a step by the sum, but that the weights decay in both.
        decayed = dataclasses.replace(
            recipe, weight_decay=recipe.weight_decay * (2 if heads else 1)
        )
        self.recipe, self.data, self.on = recipe, _on_device(images), on
        self.training = train.Training(
            both,
            functools.partial(_loss, self.heads, recipe, colours_of(images)),
            optimizer=optimizer_of(decayed, steps),
            **how,
        )
        self.key, self.state = key, self.training.start(key)

    def run(
        self, folder: Path | None = None, name: str | None = None, show: bool = False
    ) -> int:
        """Trains as the recipe says, from the newest checkpoint on if there is one; how
        many epochs that had done.

        Args:
            folder: of the checkpoints; None: there are none.
            name: of the progress bar.
            show: whether there is a bar.

        Raises:
            Diverged: if the loss is not finite.
            ValueError: as `devices.on`.
        """
        run = Run(
            self.training,
            self.key,
            self.data,
            on=self.on,
            epochs=self.recipe.epochs,
            batch_size=self.recipe.batch_size,
            folder=folder,
            loop=by_step(),
            name=name,
            show=show,
        )
        run.restore()
        done = run.epoch
        for _ in run:
            run.say(f"loss {run.means['loss']:.3f}")
        self.training, self.state = devices.alone(run.training, run.state)
        return done

    def trained(self) -> Model:
        """The network as it is now, in evaluation mode."""
        model = self._both()
        if self.heads:
            del model.heads
        return model

    def trained_heads(self) -> dict[str, Head]:
        """The additional classifiers as they are now, in evaluation mode."""
        if not self.heads:
            return {}
        return dict(zip(self.heads, map(nnx.clone, self._both().heads), strict=True))

    def _both(self) -> Any:
        network = self.training.network
        return network.whole(network.tree(self.state.params, self.state.rest))


def _on_device(images: Images) -> tuple[Array, Array]:
    return jnp.asarray(images.images), jnp.asarray(images.labels)


def colours_of(images: Images) -> Images:
    """What normalises colours, without the images."""
    return images._replace(images=images.images[:0], labels=images.labels[:0])


def _loss(heads: tuple[str, ...], recipe: Recipe, of: Images, model, batch, key):
    """The network's own loss and the additional ones."""
    pixels, labels = batch
    x = normalised(pixels, of)
    if recipe.augment:
        x = augmented(key, x)
    if not heads:
        logits = devices.logits_of(model, x)
        return smoothed(logits, labels, recipe.smoothing), {}
    x = devices.as_parameters(model, x)
    graph, params, before = nnx.split(model, nnx.Param, ...)

    def run(params, x):
        net = nnx.merge(graph, params, before, copy=True)
        logits = net(x)
        return logits, nnx.split(net, nnx.Param, ...)[2]

    flow = dataflow(run, params, x)
    wanted = [*flow.outs, *(flow.after(name) for name in heads)]
    values = flow.evaluate(flow.known(params, x), wanted)
    outs, reached = values[: len(flow.outs)], values[len(flow.outs) :]
    tree = jax.tree.structure(jax.eval_shape(run, params, x))
    logits, statistics = jax.tree.unflatten(tree, outs)
    nnx.update(model, statistics)
    found = [logits, *(head(y) for head, y in zip(model.heads, reached, strict=True))]
    losses = [smoothed(each, labels, recipe.smoothing) for each in found]
    return sum(losses[1:], losses[0]), {}


def error(model: nnx.Module, split: data.Split, of: Images, batch: int = 500) -> float:
    """The share of images of a split that the network gets wrong, in percent."""
    return measured(model, split, of, batch)[0]


def measured(
    model: nnx.Module, split: data.Split, of: Images, batch: int = 500
) -> tuple[float, float]:
    """The share of images of a split that the network gets wrong, in percent, and the
    mean loss."""
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
    wrong, loss = np.sum(jax.device_get(found), axis=0) / count
    return 100 * float(wrong), float(loss)


def errors(model: nnx.Module, dataset: data.Dataset, of: Images) -> dict[str, float]:
    """In per cent, of the validation and of the test images."""
    return {
        "validation": error(model, dataset.validation, of),
        "test": error(model, dataset.test, of),
    }


@functools.partial(jax.jit, static_argnums=0)
def _wrong(graph, state, colours, images, labels):
    """How many of a batch the network gets wrong, and the sum of their losses."""
    of = Images(images, labels, *colours)
    logits = nnx.merge(graph, state)(normalised(images, of))
    wrong = (logits.argmax(-1) != labels).sum()
    return wrong, cross_entropy(logits, labels).sum()


def recalibrated(model: Model, of: Images, batch_size: int = 128) -> Model:
    """The network in evaluation mode with the statistics of the training images. With
    the gates of test time they are other ones than with drawn ones.

    Raises:
        ValueError: if the images don't fill a batch.
    """
    check_filled(of, batch_size)
    colours = colours_of(of)
    training = train.Training(
        model,
        functools.partial(_loss, (), Recipe(augment=False), colours),
        optimizer=optax.identity(),
    )
    state = training.start(jax.random.key(0))
    state = training.recalibrate(state, batches_of(of, batch_size))
    return training.whole_model(state)


def batches_of(
    of: Images, size: int
) -> Iterator[tuple[Array | np.ndarray, Array | np.ndarray]]:
    """Whole batches of the training images, as they are stored."""
    for at in range(0, len(of.labels) // size * size, size):
        yield of.images[at : at + size], of.labels[at : at + size]
