"""A network on images, from new weights to its last epoch: what a recipe is worth.

    python -m experiments.cifar                               # ResNet-20 on CIFAR-10
    python -m experiments.cifar --base.epochs 60 --base.learning-rate 0.2
    python -m experiments.cifar --model resnet56 --seeds 0 1 2 --record

Recipes are chosen on the images that are held out; the test images say what the chosen
one is worth. Runs are resumed where they were killed, and are lines of `runs.jsonl`,
which `experiments.compare` reads. With `--record` they are also put into
`experiments/results/cifar`, and the trained networks beside them: what is pruned then
begins where this ended.
"""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.channel_run import network
from experiments.channel_settings import check_network
from experiments.harness import devices, results, run_folder
from experiments.harness.loop import Diverged
from experiments.reports import places
from experiments.reports.printing import interval, markdown
from experiments.tasks import data
from experiments.tasks.images import Recipe, Trainer, check_filled, errors, images_of
from l0jax import costs, gating, storage, trace

RECORDED = places.RESULTS / "cifar"
RESNET20 = Recipe(
    epochs=30, batch_size=64, learning_rate=0.1, weight_decay=5e-4, cycle=0.2
)
"""Chosen on the images that are held out: see the notes of `RESULTS.md`."""


@dataclasses.dataclass(frozen=True)
class Config(devices.OnHosts):
    """Train a network on images."""

    dataset: str = "cifar10"
    """a data set of `experiments.tasks.data`"""
    model: str = "resnet20"
    """a network of `l0jax.models.PRESETS`, or `module:function` of one's own"""
    width: float = 1.0
    """factor by which all channels of a preset are multiplied"""
    validation: float = 0.1
    """share of the training images that is held out"""
    examples: int | None = None
    """training images that are used; by default all"""
    base: Recipe = RESNET20
    """how it is trained"""
    seeds: tuple[int, ...] = (0,)
    """of weights and the order of the images"""
    test: bool = True
    """say what the errors of the test images are; without, they are stored only"""
    out: Path | None = None
    """run folder; None is runs/<dataset>-<model>-<digest of the configuration>"""
    record: bool = False
    """put the results into experiments/results"""
    progress: bool = True
    """show a progress bar"""


UNTOLD = ("seeds", "test", "out", "record", "progress", *devices.PLACES)


def main(config: Config) -> list[dict[str, Any]]:
    """Runs what is missing; all lines of the folder."""
    devices.begin(config)
    check_network(config.model, config.width)
    config.base.check("base")
    devices.check(config, config.base.batch_size)
    if not config.seeds:
        raise ValueError("give at least one seed")
    dataset = data.load(config.dataset, config.validation)
    images = images_of(dataset, config.examples)
    check_filled(images, config.base.batch_size)
    # What can be known is refused by now: a refused run leaves no folder.
    network(config.model, config.width, dataset, jax.random.key(0))
    settings = run_folder.settings_of(config, UNTOLD)
    model = config.model.replace(":", "-")
    folder = config.out or run_folder.default(f"{config.dataset}-{model}", settings)
    run_folder.prepare(folder, settings, settings, resume=True)
    for seed in config.seeds:
        if (seed,) not in results.there(folder, "seed"):
            line = one(config, dataset, folder, seed)
            results.put(folder, [{"settings": settings, **line}])
    if config.record and devices.is_first():
        record(folder, recorded(config.dataset, model))
    return results.read(folder)


def recorded(dataset: str, model: str) -> Path:
    """Where the networks of a recorded recipe lie."""
    return RECORDED / f"{dataset}-{model}"


def record(folder: Path, kept: Path) -> None:
    """Puts a run's results and networks into those that are kept, in the place of such
    as were made with other settings."""
    lines = results.read(folder)
    old, new = (
        [run_folder.whole(line["settings"]) for line in of[:1]]
        for of in (results.read(kept), lines)
    )
    if old and old != new:
        shutil.rmtree(kept)
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / run_folder.CONFIG, kept / run_folder.CONFIG)
    for line in lines:
        name = f"base-{line['seed']}"
        shutil.copytree(folder / name, kept / name, dirs_exist_ok=True)
    results.put(kept, lines, {"seed": ()})


def one(
    config: Config, dataset: data.Dataset, folder: Path, seed: int
) -> dict[str, Any]:
    """A run with one seed."""
    key = jax.random.key(seed)
    model = network(config.model, config.width, dataset, gating.key_for(key, "weights"))
    images = images_of(dataset, config.examples)
    example = jnp.zeros((1, *images.images.shape[1:]), jnp.float32)
    of_base = gating.key_for(key, "base")
    trainer = Trainer(model, images, config.base, of_base, on=config)
    checkpoints = folder / "checkpoints" / str(seed)
    begun = time.perf_counter()
    done = trainer.run(checkpoints, f"{config.model} seed {seed}", config.progress)
    # Of what went on where it was killed nobody knows all seconds.
    seconds = None if done else time.perf_counter() - begun
    trained = trainer.trained()
    if devices.is_first():
        storage.save(trained, folder / f"base-{seed}")
    found = errors(trained, dataset, images)
    structure = trace(trained, example)
    return {
        "study": "cifar",
        "task": f"{config.dataset} {config.model}",
        "method": "trained",
        "seed": seed,
        "metrics": {f"{part} error": found[part] for part in ("validation", "test")},
        "costs": {},
        "params": costs.exact(structure, cost=costs.params),
        "macs": costs.exact(structure, cost=costs.macs),
        "seconds": seconds,
    }


def section() -> str:
    """What `RESULTS.md` says of the recorded recipes."""
    rows = []
    for folder in sorted(RECORDED.glob("*/")):
        lines = results.read(folder)
        of = lines[0]["settings"]
        known = [line["seconds"] for line in lines if line["seconds"] is not None]
        validation, test = (
            interval(line["metrics"][f"{part} error"] for line in lines)
            for part in ("validation", "test")
        )
        rows.append(
            [
                f"`--dataset {of['dataset']} --model {of['model']}`",
                str(of["base"]["epochs"]),
                *(f"{validation} %", f"{test} %"),
                *(f"{lines[0]['params']:,.0f}", f"{lines[0]['macs'] / 1e6:.1f} M"),
                f"{np.mean(known) / 60:.0f}" if known else "-",
                str(len(lines)),
            ]
        )
    header = ["", "epochs", "validation error", "test error, last epoch"]
    header += ["parameters", "MACs", "minutes", "seeds"]
    said = (
        "`python -m experiments.cifar`: from new weights to the last epoch, which is "
    )
    said += "the one that is tested."
    return "\n\n".join([said, markdown(header, rows)]) if rows else ""


def cli() -> None:
    config = tyro.cli(Annotated[Config, tyro.conf.arg(name="")], description=__doc__)
    try:
        found = main(config)
    except (ValueError, Diverged, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.cifar: {error}") from None
    if not devices.is_first():
        return
    for line in found:
        said = [
            f"{name} {value:.2f} %"
            for name, value in line["metrics"].items()
            if config.test or name != "test error"
        ]
        print(f"{line['task']} seed {line['seed']}: {', '.join(said)}")


if __name__ == "__main__":
    cli()
