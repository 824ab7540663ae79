"""Settings of `experiments.relocation`: heuristics, networks, budgets."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PRNGKeyArray

from experiments.harness import devices
from experiments.relocation_training import ARMS, MAIN_ARMS
from l0jax import methods, models

Heuristic = Callable[[methods.Task, PRNGKeyArray], Mapping[str, Any]]


def by_score(name: str, sign: float = 1.0) -> Heuristic:
    """A score of `l0jax.methods.SCORES`; -1 turns its ranking upside down."""

    def scores(task: methods.Task, key: PRNGKeyArray) -> dict[str, Any]:
        found = methods.score(name, task, key)
        return {n: sign * np.asarray(values) for n, values in found.items()}

    return scores


HEURISTICS: dict[str, Heuristic] = {
    **{
        name: by_score(name)
        for name in (
            *("random", "filter_l1", "outgoing_l2", "apoz", "variance", "entropy"),
            *("taylor", "skeletonization", "fisher"),
        )
    },
    # Adversaries: what these would keep goes.
    "inverted_taylor": by_score("taylor", -1.0),
    "inverted_filter_l1": by_score("filter_l1", -1.0),
}
"""What decides which units are doomed: functions of a task and a key, of which the
units with the lowest scores of each group go."""
ADVERSARIES = ("inverted_taylor", "inverted_filter_l1")


class Network(NamedTuple):
    """What is pruned: a kind of model, its architecture, and on what by default."""

    kind: str
    architecture: dict[str, Any]
    dataset: str


NETWORKS: dict[str, Network] = {
    "mlp": Network("mlp", {"features": (784, 300, 100, 10)}, "mnist"),
    "lenet5": Network("lenet5", {}, "mnist"),
    "resnet8": Network(
        "pre_activation_resnet",
        {
            "stem": 8,
            "stages": (8, 16, 32),
            "inner": ((8,), (16,), (32,)),
        },
        "cifar10_jpeg",
    ),
    "i3d_small": Network(*models.PRESETS.get("i3d_small", ("", {})), "motion"),
}
QUICK: dict[str, Any] = {
    **{"dataset": "digits", "ratios": (0.8,), "budgets": (20, 60), "seeds": (0, 1)},
    **{"base_epochs": 20, "batch_size": 64, "chosen_by": 512},
}


@dataclasses.dataclass(frozen=True)
class Config(devices.OnMesh):
    """Prune by every heuristic, at once and softly."""

    mesh: str = ""
    """devices, by the names of axes: data=8 splits each batch of a base network over
    eight, and the runs of a program among them; none: one device for base networks, for
    runs as many as are of use"""
    model: str = "mlp"
    """a name in `NETWORKS`"""
    dataset: str | None = None
    """a data set of `experiments.tasks.data`; by default that of the network"""
    heuristics: tuple[str, ...] = tuple(HEURISTICS)
    """which heuristics"""
    arms: tuple[str, ...] = MAIN_ARMS
    """which arms, or all"""
    ratios: tuple[float, ...] = (0.8, 0.9)
    """shares of the units of each layer that are removed"""
    budgets: tuple[int, ...] = (110, 330, 1100)
    """steps from the base network to the one that is tested"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """a base network and an order of the data for each"""
    examples: int | None = None
    """training images that are used; by default all"""
    chosen_by: int = 2048
    """training images that heuristics and least squares look at"""
    validation: float = 0.1
    """share of the training images that is held out"""
    base_epochs: int = 5
    """passes over the training images that make the base network"""
    batch_size: int = 128
    """images of a step"""
    learning_rate: float = 1e-3
    """of Adam; for the base network it falls to 0"""
    together: int = 55
    """runs in one program"""
    out: Path | None = None
    """folder; None is runs/relocation-<dataset>-<model>-<digest of the settings>"""
    progress: bool = True
    """show a progress bar"""


OF_RESULTS = (
    *("model", "dataset", "examples", "chosen_by", "validation", "base_epochs"),
    *("batch_size", "learning_rate", "compute"),
)
"""Settings that decide what a single run gives."""


def resolved(config: Config) -> Config:
    """The configuration with all defaults filled in."""
    if config.arms == ("all",):
        config = dataclasses.replace(config, arms=tuple(ARMS))
    if config.dataset is None and config.model in NETWORKS:
        dataset = NETWORKS[config.model].dataset
        config = dataclasses.replace(config, dataset=dataset)
    return config


def check(config: Config, heuristics: Mapping[str, Heuristic]) -> None:
    """Raises ValueError for what can't be run."""
    for what, given, there in (
        ("model", (config.model,), NETWORKS),
        ("arm", config.arms, ARMS),
        ("heuristic", config.heuristics, heuristics),
    ):
        for name in given:
            if name not in there:
                raise ValueError(
                    f"unknown {what} {name!r}; there is {', '.join(there)}"
                )
    for field in ("heuristics", "arms", "ratios", "budgets", "seeds"):
        if not getattr(config, field):
            raise ValueError(f"{field} must not be empty")
    for ratio in config.ratios:
        methods.keeping.count_left(1, ratio)
    for budget, arm in itertools.product(config.budgets, config.arms):
        if budget < 1:
            raise ValueError(f"a budget must be at least one step, got {budget}")
        ARMS[arm].closing.steps(budget)
    devices.check(config, config.batch_size)


class Case(NamedTuple):
    """What the runs of one program have in common."""

    arm: str
    ratio: float
    budget: int
