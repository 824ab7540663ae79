"""Settings of `experiments.channel_pruning`, and which of them can't be run."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from experiments.harness import devices, ranges
from experiments.tasks.images import Recipe
from l0jax import models
from l0jax.methods.discrimination import Selection
from l0jax.methods.keeping import count_left

BASE = Recipe()
HEADS = Recipe(epochs=2, learning_rate=0.01, drops=())
TUNE = Recipe(epochs=10, learning_rate=0.01)
GATE = Recipe(epochs=5, learning_rate=0.01, drops=())
RANGES = {
    "be > 0": ("gate_learning_rate", "multiplier_rate"),
    "lie in (0, 1)": ("left", "keep_prob"),
}
RECIPES = ("base", "heads", "gate", "tune")


@dataclasses.dataclass(frozen=True)
class Config(devices.OnDevices):
    """Prune the channels of a convolutional network."""

    method: tuple[str, ...] = ("dcp",)
    """which methods, or all"""
    dataset: str = "cifar10"
    """a data set of `experiments.tasks.data`"""
    model: str = "resnet20"
    """a network of `l0jax.models.PRESETS`, or `module:function` of one's own: called
    with `shape`, `classes` and `rngs` it gives an NNX module"""
    width: float = 1.0
    """factor by which all channels of a preset are multiplied"""
    ratio: float = 0.5
    """share of the channels of each layer that is removed"""
    left: float | None = None
    """share of the cost that may be left, in the place of the ratio"""
    cost: Literal["macs", "params"] = "macs"
    """what is equal for all methods that don't remove a share of each layer"""
    after: int | None = None
    """epochs of training after the base network, for choosing and tuning together, the
    same for all methods; None: tune.epochs after the choice, as in the papers"""
    gate: Recipe = GATE
    """how the network is trained while gates or doomed units close; the epochs are a
    part of those after the base network"""
    gate_learning_rate: float = 0.05
    """of Adam, for the gates"""
    multiplier_rate: float = 0.05
    """of gradient ascent, for the multiplier of the gates' budget"""
    keep_prob: float = 0.9
    """of the gates, at first"""
    epsilon: float = 0.001
    """DCP-Adapt: the relative change of the loss below which a layer is full"""
    losses: int = 2
    """additional losses of DCP"""
    auxiliary: Literal["stage", "once"] = "stage"
    """train the additional classifiers before each stage, as in the paper, or all of
    them once before the first, as in the authors' code"""
    discrimination: float = 1.0
    """weight of the additional loss when DCP chooses channels"""
    reconstruction: float = 1.0
    """weight of the reconstruction of the layer's output there"""
    norm: Literal["overall", "per_output"] = "overall"
    """of the gradient along a channel"""
    gradient_at: Literal["zero", "warm"] = "zero"
    """weights of channels that are not chosen yet, when the gradient is taken"""
    added_from: Literal["warm", "zero"] = "warm"
    """where the weights of a chosen channel begin"""
    gradient_batches: int | None = None
    """batches over which the gradient is taken; by default all"""
    sparsity: float = 1e-4
    """network slimming: weight of the sum of all scales"""
    seeds: tuple[int, ...] = (0,)
    """a base network and a run of each method for each"""
    examples: int | None = None
    """training images that are used; by default all"""
    chosen_by: int = 2048
    """training images that methods choose channels by"""
    validation: float = 0.1
    """share of the training images that is held out"""
    base: Recipe = BASE
    """how the base network is trained"""
    base_from: Path | None = None
    """run folder whose base networks are pruned, instead of training some"""
    heads: Recipe = HEADS
    """how the network and the additional classifiers are trained before channels are
    chosen"""
    tune: Recipe = TUNE
    """how the pruned network is trained"""
    out: Path | None = None
    """run folder; None is runs/<dataset>-<model>-<digest of the configuration>"""
    progress: bool = True
    """show a progress bar"""


OF_BASE = ("dataset", "model", "width", "examples", "validation", "base", "compute")
"""Settings that decide the base networks; of those of slimming the sparsity too."""
UNTOLD = ("method", "seeds", "out", "base_from", "progress", *devices.PLACES)
"""Settings that don't change what a single run gives."""


def check(config: Config, known: Collection[str]) -> None:
    """Raises ValueError for what can't be run."""
    for method in config.method:
        if method not in known:
            raise ValueError(
                f"unknown method {method!r}; there is all, {', '.join(known)}"
            )
    if not config.method or not config.seeds:
        raise ValueError("give at least one method and one seed")
    check_network(config.model, config.width)
    count_left(1, config.ratio)
    if config.after is not None and config.after < 0:
        raise ValueError(f"after must be at least 0 epochs, got {config.after}")
    ranges.check(config, RANGES)
    if not config.epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {config.epsilon}")
    selection_of(config)
    recipes = {name: getattr(config, name) for name in RECIPES}
    for name, recipe in recipes.items():
        # Without any tuning the errors right after pruning are what is asked for.
        recipe.check(name, int(name != "tune"))
    devices.check(config, *(recipe.batch_size for recipe in recipes.values()))


def check_network(name: str, width: float) -> None:
    """Raises ValueError for a network that there is not, or of no such width."""
    if ":" in name:
        if width != 1:
            raise ValueError(
                f"width is {width}, but {name!r} is no preset whose channels could be "
                "multiplied"
            )
    elif name not in models.PRESETS:
        raise ValueError(
            f"unknown model {name!r}; there is {', '.join(models.PRESETS)}"
        )
    if not width > 0:
        raise ValueError(f"width must be above 0, got {width}")


def epochs_after(config: Config) -> int:
    """Epochs of training after the base network, for choosing and tuning."""
    return config.tune.epochs if config.after is None else config.after


def selection_of(config: Config, **changes: Any) -> Selection:
    names = {field.name for field in dataclasses.fields(Selection)}
    told = {n: v for n, v in dataclasses.asdict(config).items() if n in names}
    return Selection(**{**told, **changes})
