"""Channel pruning: one network, one budget, every method.

    python -m experiments.channel_pruning --model resnet20 --method dcp --ratio 0.5
    python -m experiments.channel_pruning --method all --seeds 0 1 2

A base network is trained, or read from the run folder. Each method removes the same
share of the channels of each layer, but for network slimming, which ranks those of all
layers together, and DCP-Adapt, which stops at each layer where one more channel is of
no use. The smaller network is trained again and tested once. All is stored as it comes,
and a run that was killed goes on where it was, within the choice of a layer too.
"""

import bisect
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import PRNGKeyArray
from tqdm import tqdm

import l0jax.nnx
from experiments.harness import json_lines, progress, run_folder
from experiments.tasks import data
from experiments.tasks.images import (
    Images,
    Recipe,
    Trainer,
    errors,
    images_of,
    normalised,
)
from l0jax import costs, gating, methods, models, storage, train, units
from l0jax.methods import discrimination, slimming
from l0jax.methods.discrimination import Chosen, Head, Selection, Stage
from l0jax.methods.keeping import count_left, keep_above, keep_top
from l0jax.report import report
from l0jax.structure import Structure

Keep = dict[str, np.ndarray]


BASE = Recipe()
HEADS = Recipe(epochs=2, learning_rate=0.01, drops=())
TUNE = Recipe(epochs=10, learning_rate=0.01)


@dataclasses.dataclass(frozen=True)
class Config:
    """Prune the channels of a convolutional network."""

    method: tuple[str, ...] = ("dcp",)
    """which methods, or all"""
    dataset: str = "cifar10"
    """a data set of `experiments.tasks.data`"""
    model: str = "resnet20"
    """a network of `l0jax.models.PRESETS`"""
    width: float = 1.0
    """factor by which all its channels are multiplied"""
    ratio: float = 0.5
    """share of the channels of each layer that is removed"""
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


OF_BASE = ("dataset", "model", "width", "examples", "validation", "base", "sparsity")
"""Settings that decide the base networks."""
UNTOLD = ("method", "seeds", "out", "progress")
"""Settings that don't change what a single run gives."""


def main(config: Config) -> dict[str, Any]:
    """Runs what is missing; returns the folder and all its results."""
    if config.method == ("all",):
        config = dataclasses.replace(config, method=tuple(METHODS))
    check(config)
    dataset = data.load(config.dataset, config.validation)
    settings = run_folder.settings_of(config, UNTOLD)
    name = f"{config.dataset}-{config.model}"
    folder = config.out or run_folder.default(name, settings)
    if config.base_from is not None:
        check_base(config.base_from, settings)
    run_folder.prepare(folder, settings, settings, resume=True)
    results = Results(folder / "results.jsonl")
    images = images_of(dataset, config.examples)
    for seed in config.seeds:
        for method in config.method:
            if not results.has(method, seed):
                run = Run(config, dataset, images, folder, method, seed)
                results.add(run.result())
    return {"folder": str(folder), "results": results.lines()}


def check_base(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises FileNotFoundError if no run is in the folder, ValueError if its base
    networks are those of other settings."""
    file = folder / run_folder.CONFIG
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing: base_from must be the folder of a run that has "
            "trained its base networks"
        )
    there = json.loads(file.read_text())
    for name in OF_BASE:
        if there.get(name) != settings[name]:
            raise ValueError(
                f"the base networks of {folder} were made with {name} = "
                f"{there.get(name)}; this run has {settings[name]}"
            )


def check(config: Config) -> None:
    """Raises ValueError for what can't be run."""
    for method in config.method:
        if method not in METHODS:
            raise ValueError(
                f"unknown method {method!r}; there is all, {', '.join(METHODS)}"
            )
    if not config.method or not config.seeds:
        raise ValueError("give at least one method and one seed")
    if config.model not in models.PRESETS:
        raise ValueError(
            f"unknown model {config.model!r}; there is {', '.join(models.PRESETS)}"
        )
    count_left(1, config.ratio)
    if not config.epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {config.epsilon}")
    if not config.width > 0:
        raise ValueError(f"width must be above 0, got {config.width}")
    selection_of(config)
    for name in ("base", "heads", "tune"):
        recipe = getattr(config, name)
        # Without any tuning the errors right after pruning are what is asked for.
        for field, least in (("epochs", name != "tune"), ("batch_size", 1)):
            if getattr(recipe, field) < least:
                raise ValueError(
                    f"{name}.{field} must be at least {int(least)}, got "
                    f"{getattr(recipe, field)}"
                )


def selection_of(config: Config, **changes: Any) -> Selection:
    names = {field.name for field in dataclasses.fields(Selection)}
    told = {n: v for n, v in dataclasses.asdict(config).items() if n in names}
    return Selection(**{**told, **changes})


# ------------------------------------------------------------------------ the network


def network(config: Config, dataset: data.Dataset, key: PRNGKeyArray) -> models.Model:
    """The base network before training."""
    kind, architecture = models.PRESETS[config.model]
    sizes = {"stem", "stages", "inner", "widths", "last"}
    wider = {
        name: _scaled(value, config.width) if name in sizes else value
        for name, value in architecture.items()
    }
    shape = dataset.train.images.shape[1:]
    wider |= {"classes": dataset.classes, "shape": shape}
    return models.make(kind, wider, rngs=nnx.Rngs(key))


def stored(folder: Path, like: models.Model) -> models.Model:
    """The network of a folder, which must be of the shape of another.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is another network.
    """
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


def prunable(model: models.Model) -> Structure:
    """The groups that methods prune: those that a single layer reads, but for what the
    classifier reads. (Of residual networks that leaves the channels within blocks.)"""
    structure = models.structure(model)
    names = [
        name
        for name, group in structure.groups.items()
        if len(group.used_by) == 1 and group.used_by[0].path != "head.kernel"
    ]
    return structure.only(*names)


# ------------------------------------------------------------------------------ one run


class Run:
    """One method on one base network."""

    def __init__(
        self,
        config: Config,
        dataset: data.Dataset,
        images: Images,
        folder: Path,
        method: str,
        seed: int,
    ):
        self.config, self.dataset, self.images = config, dataset, images
        self.folder, self.method, self.seed = folder, method, seed
        self.key = jax.random.key(seed)
        self.resumed = False

    def result(self) -> dict[str, Any]:
        """Prunes, trains, tests."""
        base = self.base()
        structure = prunable(base)
        begun, self.resumed = time.perf_counter(), False
        keep, small = METHODS[self.method](self, base, structure)
        # Of a choice that went on where it was killed nobody knows all seconds.
        seconds = None if self.resumed else time.perf_counter() - begun
        before = self.errors(small)
        recipe = self.config.base if self.method in FROM_SCRATCH else self.config.tune
        heads = None
        if self.method == "width_multiplier_plus":
            small_task = self.task(small, prunable(small))
            stages = discrimination.stages(small_task, self.config.losses)
            rngs = nnx.Rngs(self.named("heads"))
            heads = discrimination.heads(small_task, stages, rngs=rngs)
        trained = self.train(f"{self.method}-tune", small, recipe, heads=heads)
        example = jnp.zeros((1, *self.images.images.shape[1:]), jnp.float32)
        compared = report(base, trained, example, batch_sizes=(128,), calls=9)
        storage.save(trained, self.folder / f"{self.method}-{self.seed}")
        return {
            "method": self.method,
            "seed": self.seed,
            "ratio": self.config.ratio,
            "base": self.errors(base),
            "pruned": before,
            "trained": self.errors(trained),
            "params": [compared.before.params, compared.after.params],
            "macs": [compared.before.macs, compared.after.macs],
            "latency": [compared.before.seconds[128], compared.after.seconds[128]],
            "kept": {name: int(flags.sum()) for name, flags in keep.items()},
            "sizes": {name: len(flags) for name, flags in keep.items()},
            "choosing": seconds,
            "device": compared.device,
            "jax": jax.__version__,
        }

    def named(self, name: str) -> PRNGKeyArray:
        """A key of this run's own for one purpose."""
        return gating.key_for(self.key, name)

    def base(self) -> models.Model:
        """The trained network that all methods of this seed prune."""
        model = network(self.config, self.dataset, self.named("weights"))
        name = "slimming-base" if self.method == "slimming" else "base"
        if self.config.base_from is not None:
            return stored(self.config.base_from / f"{name}-{self.seed}", model)
        trained = self.trained_base(name, model)
        storage.save(trained, self.folder / f"{name}-{self.seed}")
        return trained

    def trained_base(self, name: str, model: models.Model) -> models.Model:
        if name == "base":
            return self.train(name, model, self.config.base)
        # Its scales have a price from the start.
        groups = prunable(model).groups
        graph, state = nnx.split(model)
        model = nnx.merge(graph, slimming.start_scales(state, groups))
        return self.train(
            name,
            model,
            self.config.base,
            penalty=lambda p: self.config.sparsity * slimming.penalty(p, groups),
        )

    def errors(self, model: models.Model) -> dict[str, float]:
        """In per cent, of the validation and of the test images."""
        return errors(model, self.dataset, self.images)

    def task(self, model: models.Model, structure: Structure) -> methods.Task:
        """What methods look at: training images as they are, without augmentation."""
        count = min(self.config.chosen_by, len(self.images.labels))
        images = normalised(jnp.asarray(self.images.images[:count]), self.images)
        batch = min(self.config.heads.batch_size, count)
        labels = jnp.asarray(self.images.labels[:count])
        return methods.task(model, structure, images, labels, batch)

    def train(
        self, name: str, model: models.Model, recipe: Recipe, **how: Any
    ) -> models.Model:
        """A network after training, from its checkpoints if there are some."""
        return self.trained(name, model, recipe, **how).trained()

    def trained(
        self, name: str, model: models.Model, recipe: Recipe, **how: Any
    ) -> Trainer[models.Model]:
        """A trainer at its end, from its checkpoints if there are some."""
        trainer = Trainer(model, self.images, recipe, self.named(name), **how)
        checkpoints = train.Checkpoints(
            self.folder / "checkpoints" / f"{name}-{self.seed}"
        )
        _, trainer.state, first = checkpoints.restore(trainer.training, trainer.key)
        self.resumed |= first > 0
        bar = self.bar(f"{name} seed {self.seed}", recipe.epochs, first, "epoch")
        for epoch in range(first, recipe.epochs):
            try:
                loss = trainer.epoch(epoch)
            except FloatingPointError as error:
                raise ValueError(f"{name}, epoch {epoch + 1}: {error}") from None
            checkpoints.save(epoch + 1, trainer.training, trainer.state)
            bar.set_postfix_str(f"loss {loss:.3f}")
            bar.update()
        bar.close()
        return trainer

    def bar(self, name: str, total: int, done: int, unit: str) -> tqdm:
        show = self.config.progress
        return progress.bar(total, unit, done=done, name=name, show=show)


# -------------------------------------------------------------------------- the methods

Method = Callable[[Run, models.Model, Structure], tuple[Keep, models.Model]]


def scored(run: Run, base: models.Model, structure: Structure, *, name: str):
    """The channels of each layer with the highest scores."""
    found = methods.score(name, run.task(base, structure), run.named(name))
    return shrunk(base, keep_top(found, run.config.ratio), structure)


def slimmed(run: Run, base: models.Model, structure: Structure):
    """One threshold for the scales of all layers; each keeps one channel at least."""
    scales = slimming.scale(run.task(base, structure))
    # At a global threshold other layers lose more: the same multiply-adds decide.
    wanted = costs.exact(structure, narrowed(structure, run.config.ratio))
    total = sum(group.size for group in structure.groups.values())

    def keep(gone: int) -> Keep:
        return keep_above(scales, gone / total, at_least=1)

    fewest = bisect.bisect_left(
        range(total),
        True,
        key=lambda gone: costs.exact(structure, keep(gone)) <= wanted,
    )
    return shrunk(base, keep(min(fewest, total - 1)), structure)


def reconstructed(run: Run, base: models.Model, structure: Structure, *, method):
    """One layer after the other towards the outputs of the base network."""
    keep, params = methods.reconstruct(
        run.task(base, structure), method, run.config.ratio, run.named("positions")
    )
    graph, _ = nnx.split(base)
    return shrunk(nnx.merge(graph, params), keep, structure)


def discriminating(
    run: Run,
    base: models.Model,
    structure: Structure,
    *,
    adaptive: bool = False,
    **changes: Any,
):
    """DCP (algorithm 1): before each stage the network and its classifier are trained,
    then the layers of the stage are chosen."""
    config = run.config
    original = run.task(base, structure)
    stages = discrimination.stages(original, config.losses)
    rngs = nnx.Rngs(run.named("heads"))
    heads = discrimination.heads(original, stages, rngs=rngs)
    once = config.auxiliary == "once"
    keep: Keep = {}
    model = base
    for number, stage in enumerate(stages):
        if once and number == 0:
            trainer = run.trained(
                f"{run.method}-heads", model, config.heads, heads=heads
            )
            model, heads = trainer.trained(), trainer.trained_heads()
        elif not once:
            own = {n: h for n, h in heads.items() if n == stage.kernel}
            trainer = run.trained(
                f"{run.method}-heads-{number}",
                model,
                config.heads,
                heads=own,
                structure=structure,
                keep=keep,
            )
            model = closed(trainer.trained(), keep, structure)
            heads |= trainer.trained_heads()
        found, model = choose(
            run,
            number,
            stage,
            heads.get(stage.kernel or ""),
            model,
            original,
            adaptive,
            selection_of(config, **changes),
        )
        keep |= found
    return shrunk(model, keep, structure)


def choose(
    run: Run,
    number: int,
    stage: Stage,
    head: Head | None,
    model: models.Model,
    original: methods.Task,
    adaptive: bool,
    selection: Selection,
) -> tuple[Keep, models.Model]:
    """The channels of one stage; each choice is stored."""
    task = run.task(model, original.structure)
    arrays = units.arrays(task.params)
    checkpoints = storage.Checkpoints(
        run.folder / "checkpoints" / f"{run.method}-choice-{number}-{run.seed}"
    )

    def empty(notes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        groups = task.structure.groups
        return {
            name: {slot.path: arrays[slot.path] for slot in groups[name].used_by}
            for name in notes
        }

    chosen: dict[str, Chosen] = {}
    found = checkpoints.restore(empty, tqdm.write)
    if found is not None:
        run.resumed = True
        _, kernels, notes = found
        chosen = {
            name: Chosen(tuple(n["order"]), kernels[name], tuple(n["losses"]))
            for name, n in notes.items()
        }
    sizes = {name: task.structure.groups[name].size for name in stage.groups}
    total = sum(
        size if adaptive else count_left(size, run.config.ratio)
        for size in sizes.values()
    )
    done = sum(len(each.order) for each in chosen.values())
    bar = run.bar(
        f"{run.method} stage {number + 1} seed {run.seed}", total, done, "channel"
    )

    def on_channel(name: str, so_far: Chosen) -> None:
        chosen[name] = so_far
        notes = {
            n: {"order": each.order, "losses": each.losses}
            for n, each in chosen.items()
        }
        step = sum(len(each.order) for each in chosen.values())
        checkpoints.save(step, {n: dict(c.kernels) for n, c in chosen.items()}, notes)
        count = f"{len(so_far.order)} of {sizes[name]}"
        bar.set_postfix_str(f"{name}: {count}, loss {so_far.losses[-1]:.4f}")
        bar.update()

    keep, params = discrimination.prune(
        task,
        original.params,
        stage,
        head,
        selection,
        run.named(f"choice-{number}"),
        chosen=dict(chosen),
        on_channel=on_channel,
        **(
            {"epsilon": run.config.epsilon} if adaptive else {"ratio": run.config.ratio}
        ),
    )
    bar.close()
    graph, _ = nnx.split(model)
    return keep, nnx.merge(graph, params)


def from_scratch(run: Run, base: models.Model, structure: Structure):
    """New weights in the shape of a uniformly pruned network: a width multiplier, and
    the control of all pruning at this ratio (Liu et al. 2019)."""
    keep = narrowed(structure, run.config.ratio)
    _, small = shrunk(base, keep, structure)
    rngs = nnx.Rngs(run.named("scratch"))
    return keep, models.make(models.name_of(small), small.architecture, rngs=rngs)


def narrowed(structure: Structure, ratio: float) -> Keep:
    """The first channels of each layer, as many as are left when a share goes."""
    alike = {name: np.zeros(group.size) for name, group in structure.groups.items()}
    return keep_top(alike, ratio)


def closed(model: models.Model, keep: Keep, structure: Structure) -> models.Model:
    """The network with what reads removed channels at zero."""
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    return l0jax.nnx.fold(model, z, structure.groups)


def shrunk(
    model: models.Model, keep: Keep, structure: Structure
) -> tuple[Keep, models.Model]:
    """What is kept, and the smaller network that is left."""
    return keep, l0jax.nnx.shrink(closed(model, keep, structure), keep, structure)


METHODS: dict[str, Method] = {
    **{name: functools.partial(scored, name=name) for name in methods.SCORES},
    "slimming": slimmed,
    "thinet": functools.partial(reconstructed, method=methods.thinet),
    "channel_pruning": functools.partial(reconstructed, method=methods.channel_pruning),
    "dcp": discriminating,
    "dcp_adapt": functools.partial(discriminating, adaptive=True),
    "random_dcp": functools.partial(discriminating, random=True),
    "width_multiplier": from_scratch,
    "width_multiplier_plus": from_scratch,
}
FROM_SCRATCH = ("width_multiplier", "width_multiplier_plus")


class Results:
    """The file with a line for each method and seed."""

    def __init__(self, file: Path):
        self.file = file

    def lines(self) -> list[dict[str, Any]]:
        return json_lines.read(self.file)

    def has(self, method: str, seed: int) -> bool:
        return any((r["method"], r["seed"]) == (method, seed) for r in self.lines())

    def add(self, result: dict[str, Any]) -> None:
        json_lines.add(self.file, result)


def cli() -> None:
    config = tyro.cli(Annotated[Config, tyro.conf.arg(name="")], description=__doc__)
    try:
        found = main(config)
    except (ValueError, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.channel_pruning: {error}") from None
    for line in found["results"]:
        left = " ".join(
            f"{what} {a / b:.2f}x"
            for what, (a, b) in ((w, line[w]) for w in ("params", "macs", "latency"))
        )
        errors = [f"{w} {line[w]['test']:.2f} %" for w in ("base", "pruned", "trained")]
        name = f"{line['method']} seed {line['seed']}"
        print(f"{name:30} test error: {', '.join(errors)}; less: {left}")
    print(found["folder"])


if __name__ == "__main__":
    cli()
