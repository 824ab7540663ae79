"""All studies that have flags for devices, each as small as it gets."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from experiments import (
    channel_pruning,
    channel_settings,
    cifar,
    deciding,
    families,
    frontier,
    language_model,
    mnist,
    relocation,
    relocation_settings,
    wide_resnet,
)
from experiments.harness import devices, loop
from experiments.harness.devices import OnDevices, OnHosts
from experiments.relocation_settings import Network
from experiments.tasks import text
from experiments.tasks.images import Recipe
from l0jax import models, train
from tests import test_language_study

RECIPE = Recipe(epochs=1, batch_size=32, learning_rate=0.02, augment=False)


class Study(NamedTuple):
    """What runs it, and how."""

    main: Callable[[Any], Any]
    config: Any


STUDIES = {
    "mnist": Study(
        mnist.main, mnist.Config(epochs=2, dense="no", target_macs=0.5, progress=False)
    ),
    "language_model": Study(language_model.main, test_language_study.TINY),
    "cifar": Study(
        cifar.main,
        cifar.Config(
            dataset="digits", model="tiny", examples=128, base=RECIPE, progress=False
        ),
    ),
    "channel_pruning": Study(
        channel_pruning.main,
        channel_settings.Config(
            method=("l0_hard_concrete", "width_multiplier_plus"),
            dataset="digits",
            model="tiny",
            losses=1,
            examples=128,
            chosen_by=64,
            base=RECIPE,
            heads=RECIPE,
            gate=RECIPE,
            tune=RECIPE,
            progress=False,
        ),
    ),
    "wide_resnet": Study(
        wide_resnet.main,
        wide_resnet.Config(
            dataset="digits", examples=128, recipe=RECIPE, progress=False
        ),
    ),
    "frontier": Study(
        frontier.main,
        frontier.Config(
            dataset="digits",
            weights=2_000,
            dense=1,
            closing=2,
            tuning=1,
            gate_learning_rate=0.1,
            progress=False,
        ),
    ),
    "deciding": Study(
        deciding.main,
        deciding.Config(
            networks=("resnet8",), seeds=(0,), examples=200, progress=False
        ),
    ),
    "relocation": Study(
        relocation.main,
        relocation_settings.Config(
            dataset="digits",
            heuristics=("random", "filter_l1"),
            arms=("soft_distilled",),
            ratios=(0.75,),
            budgets=(8,),
            seeds=(0,),
            base_epochs=1,
            batch_size=64,
            chosen_by=128,
            progress=False,
        ),
    ),
    "families": Study(
        families.main,
        families.Config(
            dataset="digits",
            families=("hard_concrete",),
            lam=(0.03, 0.1),
            seeds=1,
            epochs=1,
            progress=False,
        ),
    ),
}


@contextlib.contextmanager
def small() -> Iterator[None]:
    """Networks and texts are small ones meanwhile."""
    part = test_language_study.a_part()
    with pytest.MonkeyPatch.context() as patch:
        vgg = ("vgg", {"stages": ((4,), (6, 6))})
        patch.setitem(models.PRESETS, "tiny", vgg)
        wide = {"stem": 3, "stages": (4,), "inner": ((8,),), "project": (True,)}
        patch.setattr(wide_resnet.pre_activation, "wide", lambda *_: dict(wide))
        tiny = Network("mlp", {"features": (64, 24, 12, 10)}, "digits")
        patch.setitem(relocation_settings.NETWORKS, "mlp", tiny)
        of_digits = {"dataset": "digits", "epochs": 1, "loop": True}
        patch.setitem(deciding.NETWORKS, "resnet8", of_digits)
        patch.setattr(text, "load", lambda _: part)
        yield


def losses(name: str, folder: Path, **flags: Any) -> dict[str, list[float]]:
    """Of all epochs of a study, by the number of devices that they ran on."""
    study, found = STUDIES[name], {}
    checked, swept = loop.Run._check, train.Sweep.epoch

    def noted(count: int, means: Any) -> None:
        found.setdefault(str(count), []).extend(means)

    def of_run(run, totals, epoch):
        mesh = run.training.placement.mesh
        noted(1 if mesh is None else mesh.size, [totals.means["loss"]])
        return checked(run, totals, epoch)

    def of_sweep(sweep, *args, **how):
        states, totals = swept(sweep, *args, **how)
        means = totals.sums["loss"] / totals.steps
        noted(sweep._shardings[0].mesh.size, means.tolist())
        return states, totals

    with small(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "_check", of_run)
        patch.setattr(train.Sweep, "epoch", of_sweep)
        study.main(dataclasses.replace(study.config, out=folder, **flags))
    return found


def on_hosts(folder: str, name: str) -> None:
    """Prints the losses of a study that several processes train together."""
    # (What makes it small uses JAX before they could join.)
    devices.begin(OnHosts(distributed=True))
    found = losses(name, Path(folder), mesh="data=2", distributed=True)
    print(json.dumps([jax.process_index(), found]))


def main(folder: str, name: str) -> None:
    """Prints the losses of a study on one device and on two, which split parameters
    too where the study has a flag for that."""
    split = isinstance(STUDIES[name].config, OnDevices)
    flags: dict[str, Any] = {"shard": "data"} if split else {}
    one = losses(name, Path(folder) / "one", mesh="data=1")
    two = losses(name, Path(folder) / "two", mesh="data=2", **flags)
    print(json.dumps([one, two]))
