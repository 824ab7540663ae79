"""One method of channel pruning on one base network: from the base to the test."""

import bisect
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray
from tqdm import tqdm

import l0jax.nnx
from experiments.channel_settings import Config, epochs_after
from experiments.harness import progress
from experiments.tasks import data
from experiments.tasks.images import Images, Recipe, Trainer, errors, normalised
from l0jax import costs, gating, methods, models, storage, trace
from l0jax.methods import discrimination, slimming
from l0jax.methods.keeping import keep_top
from l0jax.report import report
from l0jax.structure import Structure

Keep = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to choose channels.

    Args:
        choose: from a run, its base network and the groups that may lose channels to
            what is kept and the smaller network.
        sparse: its base network has a price on its scales.
        scratch: what is left is trained as the base network was, from new weights.
        heads: it is trained with additional classifiers.
        closes: it trains while units close, in a part of the epochs of tuning.
    """

    choose: Callable[["Run", Any, Structure], tuple[Keep, Any]]
    sparse: bool = False
    scratch: bool = False
    heads: bool = False
    closes: bool = False


# ------------------------------------------------------------------------ the network


def network(name: str, width: float, dataset: data.Dataset, key: PRNGKeyArray) -> Any:
    """A network of `l0jax.models.PRESETS` with its channels times `width`, or
    `module:function` of one's own, before training."""
    shape = dataset.train.images.shape[1:]
    if ":" in name:
        make = data.named(name)
        return make(shape=shape, classes=dataset.classes, rngs=nnx.Rngs(key))
    kind, architecture = models.PRESETS[name]
    sizes = {"stem", "stages", "inner", "widths", "last"}
    wider = {
        what: _scaled(value, width) if what in sizes else value
        for what, value in architecture.items()
    }
    wider |= {"classes": dataset.classes, "shape": shape}
    return models.make(kind, wider, rngs=nnx.Rngs(key))


def stored(folder: Path, like: Any) -> Any:
    """The network of a folder, which must be of the shape of another.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is another network.
    """
    if not isinstance(like, models.ImageModel):
        return storage.load(folder, like=like)
    model = storage.load(folder)
    kind, wanted = models.name_of(like), json_of(like.architecture)
    if not isinstance(model, models.ImageModel) or models.name_of(model) != kind:
        raise ValueError(f"{folder} holds a {type(model).__name__}, not a {kind}")
    for name, there in json_of(model.architecture).items():
        if there != wanted[name]:
            raise ValueError(
                f"{folder} holds a {kind} with {name} = {there}; these settings and "
                f"this data set ask for {wanted[name]}"
            )
    return model


def json_of(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture with lists for tuples."""
    return json.loads(json.dumps(architecture))


def _scaled(widths: Any, factor: float) -> Any:
    if isinstance(widths, tuple | list):
        return tuple(_scaled(each, factor) for each in widths)
    return max(round(widths * factor), 1)


def prunable(model: Any, example: Any = None) -> Structure:
    """The groups that methods prune: those that a single layer reads, but for what the
    classifier reads, the last layer there is. (Of residual networks that leaves the
    channels within blocks.)

    Args:
        model: one of `l0jax.models`, or any NNX module.
        example: inputs of a module that is none of `l0jax.models`.
    """
    if isinstance(model, models.ImageModel):
        structure, last = models.structure(model), "head.kernel"
    else:
        structure = trace(model, example)
        last = structure.operations[-1].kernel
    names = [
        name
        for name, group in structure.groups.items()
        if name not in structure.inputs
        and len(group.used_by) == 1
        and group.used_by[0].path != last
    ]
    return structure.only(*names)


# ------------------------------------------------------------------------ how much goes


def narrowed(structure: Structure, ratio: float) -> Keep:
    """The first channels of each layer, as many as are left when a share goes."""
    alike = {name: np.zeros(group.size) for name, group in structure.groups.items()}
    return keep_top(alike, ratio)


def ratio_of(config: Config, structure: Structure) -> float:
    """The share of the channels of each layer that goes: that of the settings, or the
    smallest with which no more is left than the budget.

    Raises:
        ValueError: if no share leaves as little.
    """
    if config.left is None:
        return config.ratio
    cost = costs.COSTS[config.cost]
    most = config.left * costs.exact(structure, cost=cost)
    sizes = {group.size for group in structure.groups.values()}
    # Between these, no layer loses another channel.
    shares = sorted({gone / size for size in sizes for gone in range(size)})

    def left(ratio: float) -> float:
        return float(costs.exact(structure, narrowed(structure, ratio), cost))

    first = bisect.bisect_left(shares, True, key=lambda ratio: left(ratio) <= most)
    if first < len(shares):
        return shares[first]
    raise ValueError(
        f"left is {config.left}, but with one channel a layer "
        f"{left(shares[-1]) / left(0.0):.3g} of the {config.cost} are left"
    )


def closed(model: Any, keep: Keep, structure: Structure) -> Any:
    """The network with what reads removed channels at zero."""
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    return l0jax.nnx.fold(model, z, structure.groups)


def shrunk(model: Any, keep: Keep, structure: Structure) -> tuple[Keep, Any]:
    """What is kept, and the smaller network that is left."""
    return keep, l0jax.nnx.shrink(closed(model, keep, structure), keep, structure)


# ------------------------------------------------------------------------------ one run


class Run:
    """One method on one base network.

    Attributes:
        spent: epochs of training that the method has spent on its choice.
    """

    def __init__(
        self,
        config: Config,
        dataset: data.Dataset,
        images: Images,
        folder: Path,
        name: str,
        method: Method,
        seed: int,
    ):
        self.config, self.dataset, self.images = config, dataset, images
        self.folder, self.method, self.seed = folder, name, seed
        self.how = method
        self.key = jax.random.key(seed)
        self.resumed, self.spent = False, 0
        self.example = jnp.zeros((1, *images.images.shape[1:]), jnp.float32)

    def result(self) -> dict[str, Any]:
        """Prunes, trains, tests."""
        config = self.config
        base = self.base()
        structure = prunable(base, self.example)
        begun, self.resumed, self.spent = time.perf_counter(), False, 0
        keep, small = self.how.choose(self, base, structure)
        # Of a choice that went on where it was killed nobody knows all seconds.
        seconds = None if self.resumed else time.perf_counter() - begun
        found = {"base ": self.errors(base), "pruned ": self.errors(small)}
        heads = None
        if self.how.heads:
            small_task = self.task(small, prunable(small, self.example))
            stages = discrimination.stages(small_task, config.losses)
            rngs = nnx.Rngs(self.named("heads"))
            heads = discrimination.heads(small_task, stages, rngs=rngs)
        spent = self.spent
        recipe = self.tuning()
        trained = self.train(f"{self.method}-tune", small, recipe, heads=heads)
        found[""] = self.errors(trained)
        compared = report(base, trained, self.example, batch_sizes=(128,), calls=9)
        storage.save(trained, self.folder / f"{self.method}-{self.seed}")
        cost = costs.COSTS[config.cost]
        share = costs.exact(structure, keep, cost) / costs.exact(structure, cost=cost)
        counted = {
            "params": [compared.before.params, compared.after.params],
            "macs": [compared.before.macs, compared.after.macs],
        }
        return {
            "method": self.method,
            "seed": self.seed,
            "metrics": {
                f"{when}{part} error": error
                for when, errors in found.items()
                for part, error in errors.items()
            },
            "costs": {name: left / whole for name, (whole, left) in counted.items()},
            "ratio": self.ratio(structure),
            "budget": self.allowed(structure),
            "left": share,
            "epochs": {"choosing": spent, "tuning": recipe.epochs},
            **counted,
            "latency": [compared.before.seconds[128], compared.after.seconds[128]],
            "kept": {name: int(flags.sum()) for name, flags in keep.items()},
            "sizes": {name: len(flags) for name, flags in keep.items()},
            "seconds": seconds,
        }

    def ratio(self, structure: Structure) -> float:
        """The share of the channels of each layer that goes."""
        return ratio_of(self.config, structure)

    def allowed(self, structure: Structure) -> float:
        """The share of the cost that is left of a uniformly pruned network: what every
        method may leave."""
        cost = costs.COSTS[self.config.cost]
        keep = narrowed(structure, self.ratio(structure))
        return costs.exact(structure, keep, cost) / costs.exact(structure, cost=cost)

    def closing(self) -> tuple[Recipe, int]:
        """How the network is trained while units close, and in how many steps."""
        recipe = self.config.gate
        return recipe, len(self.images.labels) // recipe.batch_size * recipe.epochs

    def tuning(self) -> Recipe:
        """How what is left is trained: in the epochs that the choice has not spent.

        Raises:
            ValueError: if it has spent more than there are.
        """
        config = self.config
        if self.how.scratch:
            more = 0 if config.after is None else config.after
            return dataclasses.replace(config.base, epochs=config.base.epochs + more)
        # Without a budget of epochs DCP trains its classifiers beside them, as in the
        # paper.
        counted = config.after is not None or self.how.closes
        after = epochs_after(config)
        left = after - (self.spent if counted else 0)
        if left < 0:
            raise ValueError(
                f"{self.method} trains {self.spent} epochs to choose, more than the "
                f"{after} that there are after the base network; give a larger "
                "after, or fewer gate.epochs or heads.epochs"
            )
        return dataclasses.replace(config.tune, epochs=left)

    def named(self, name: str) -> PRNGKeyArray:
        """A key of this run's own for one purpose."""
        return gating.key_for(self.key, name)

    def base(self) -> Any:
        """The trained network that all methods of this seed prune."""
        config, key = self.config, self.named("weights")
        model = network(config.model, config.width, self.dataset, key)
        name = "slimming-base" if self.how.sparse else "base"
        if self.config.base_from is not None:
            return stored(self.config.base_from / f"{name}-{self.seed}", model)
        trained = self.trained_base(name, model)
        storage.save(trained, self.folder / f"{name}-{self.seed}")
        return trained

    def trained_base(self, name: str, model: Any) -> Any:
        if name == "base":
            return self.train(name, model, self.config.base)
        # Its scales have a price from the start.
        groups = prunable(model, self.example).groups
        graph, state = nnx.split(model)
        model = nnx.merge(graph, slimming.start_scales(state, groups))
        return self.train(
            name,
            model,
            self.config.base,
            penalty=lambda p: self.config.sparsity * slimming.penalty(p, groups),
        )

    def errors(self, model: Any) -> dict[str, float]:
        """In per cent, of the validation and of the test images."""
        return errors(model, self.dataset, self.images)

    def task(self, model: Any, structure: Structure) -> methods.Task:
        """What methods look at: training images as they are, without augmentation."""
        count = min(self.config.chosen_by, len(self.images.labels))
        images = normalised(jnp.asarray(self.images.images[:count]), self.images)
        batch = min(self.config.heads.batch_size, count)
        labels = jnp.asarray(self.images.labels[:count])
        return methods.task(model, structure, images, labels, batch)

    def train(self, name: str, model: Any, recipe: Recipe, **how: Any) -> Any:
        """A network after training, from its checkpoints if there are some."""
        return self.trained(name, model, recipe, **how).trained()

    def trained(self, name: str, model: Any, recipe: Recipe, **how: Any) -> Trainer:
        """A trainer at its end, from its checkpoints if there are some."""
        how["on"] = self.config
        trainer = Trainer(model, self.images, recipe, self.named(name), **how)
        folder = self.folder / "checkpoints" / f"{name}-{self.seed}"
        shown = f"{name} seed {self.seed}", self.config.progress
        self.resumed |= trainer.run(folder, *shown) > 0
        self.spent += recipe.epochs
        return trainer

    def bar(self, name: str, total: int, done: int, unit: str) -> tqdm:
        show = self.config.progress
        return progress.bar(total, unit, done=done, name=name, show=show)
