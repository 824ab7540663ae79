"""L0 gates on a wide residual network: why they never close, and what makes them.

    python -m experiments.wide_resnet --variant fixed
    python -m experiments.wide_resnet --variant all --seeds 0 1 2

With SGD at the learning rate of the weights the gates of a network with batch
normalisation end where they began (Gale et al. 2019; Gallego-Posada et al. 2022). The
variants switch the parts of the remedy on and off: a rate of the gates' own, weight
decay that doesn't close gates, gates after batch normalisation or a normalisation that
knows of closed maps, a constraint that ends at its target. With `--record` each result
becomes a line of `experiments/results/wide-resnet/runs.jsonl`. Killed runs go on.

The defaults are as small as two cores can train: WRN-10-1 on a part of the images.
`--preset louizos2018` is WRN-28-10 as in the paper, `gallego2022` with the remedy.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

import l0jax.nnx
from experiments.channel_run import prunable
from experiments.harness import command_line, devices, results, run_folder
from experiments.harness.loop import Run, by_step
from experiments.published_settings import WIDE_RESNET
from experiments.reports import places
from experiments.reports.gate_shares import draw
from experiments.tasks import data
from experiments.tasks.images import (
    Images,
    Recipe,
    augmented,
    batches_of,
    check_filled,
    errors,
    images_of,
    normalised,
    optimizer_of,
    recalibrated,
    smoothed,
)
from l0jax import costs, gates, gating, models, objectives, storage, train, units
from l0jax.models import pre_activation
from l0jax.structure import Structure
from l0jax.units import Group, Groups

RESULTS = places.RESULTS / "wide-resnet"
PICTURE = "shares.png"
RECIPE = Recipe(epochs=14, weight_decay=5e-4, drops=(0.6, 0.85))


@dataclasses.dataclass(frozen=True)
class Config(devices.OnDevices):
    """Train a gated wide residual network."""

    variant: tuple[str, ...] = ("fixed",)
    """settings of `VARIANTS`, or all; the fields below are what they change"""
    gate_learning_rate: float | None = 6.0
    """of SGD, for the gates; None is that of the weights"""
    detached: bool = True
    """weight decay doesn't close gates"""
    gates_on: Literal["reads", "maps"] = "reads"
    """gates multiply the weights that read a map, or the filters that make it, and so
    what batch normalisation sees"""
    masked_norm: bool = True
    """with gates on maps: after batch normalisation closed maps are zero again"""
    constraint: Literal["quadratic", "lagrangian"] = "quadratic"
    """how the target is enforced: quadratic ends at it, lagrangian (Gallego-Posada et
    al. 2022) about it"""
    restart: bool = True
    """of a Lagrangian: the multiplier is set to 0 where the constraint holds"""
    target: float | None = 0.5
    """share of the multiply-accumulates that may be left; None is a fixed λ"""
    lam: float = 0.002
    """c in λ = c/N without a target"""
    multiplier_rate: float = 1e-2
    """of gradient ascent, for the constraint's multiplier"""
    warm_up: float = 0.5
    """share of the run over which the target falls from 1"""
    keep_prob: float = 0.7
    """initial"""
    dataset: str = "cifar10_jpeg"
    """a data set of `experiments.tasks.data`"""
    depth: int = 10
    """6n + 4 layers"""
    factor: int = 1
    """channels, times 16, 32 and 64"""
    examples: int | None = 5_120
    """training images that are used; None is all"""
    validation: float = 0.1
    """share of the training images that is held out"""
    recipe: Recipe = RECIPE
    """how the weights are trained; gates have no drops of their rate"""
    seeds: tuple[int, ...] = (0,)
    """of the weights, the gates' noise and the order of the images"""
    out: Path = Path("runs") / "wide_resnet"
    """folder of the runs, one within it for each variant and seed"""
    record: bool = False
    """put results into `experiments/results`, in the place of older ones; of the
    defaults only"""
    progress: bool = True
    """show a progress bar"""


VARIANTS: dict[str, dict[str, Any]] = {
    "λ, the weights' rate": {"gate_learning_rate": None, "target": None},
    "λ, a rate of their own": {"target": None},
    "target, the weights' rate": {"gate_learning_rate": None},
    "fixed": {},
    "fixed, decay closes gates": {"detached": False},
    "fixed, lagrangian": {"constraint": "lagrangian"},
    "fixed, lagrangian without restarts": {
        "constraint": "lagrangian",
        "restart": False,
    },
    "fixed, gates on maps": {"gates_on": "maps", "masked_norm": False},
    "fixed, gates on maps, masked norm": {"gates_on": "maps"},
}
UNTOLD = ("variant", "seeds", "out", "record", "progress", *devices.PLACES)
ORDER = {"method": VARIANTS, "seed": ()}
GATE = gates.make("hard_concrete")
RULE = "paper"


def main(config: Config) -> list[dict[str, Any]]:
    """Runs what is missing; a result for each variant and seed."""
    names = tuple(VARIANTS) if config.variant == ("all",) else config.variant
    unknown = [name for name in names if name not in VARIANTS]
    if unknown or not names or not config.seeds:
        raise ValueError(
            f"unknown variant {unknown[0]!r}; there is all, {', '.join(VARIANTS)}"
            if unknown
            else "give at least one variant and one seed"
        )
    config.recipe.check("recipe")
    devices.check(config, config.recipe.batch_size)
    each = (run_folder.settings_of(c, UNTOLD) for c in (config, Config()))
    told, defaults = map(run_folder.whole, each)
    changed = [field for field in told if told[field] != defaults[field]]
    if config.record and changed:
        raise ValueError(
            f"only the defaults are recorded, so that variants can be compared: "
            f"{changed[0]} is {told[changed[0]]}, not {defaults[changed[0]]}"
        )
    dataset = data.load(config.dataset, config.validation)
    found = []
    for name in names:
        for seed in config.seeds:
            variant = dataclasses.replace(config, **VARIANTS[name])
            found.append(run(name, variant, dataset, seed))
            if config.record:
                results.put(RESULTS, found[-1:], ORDER)
    return found


def run(name: str, config: Config, dataset: data.Dataset, seed: int) -> dict[str, Any]:
    """One variant with one seed."""
    settings = run_folder.settings_of(config, UNTOLD)
    folder = config.out / f"{run_folder.default('run', settings).name}-{seed}"
    done = results.read(folder)
    if done:
        run_folder.prepare(folder, settings, settings, resume=True)
        # (A variant is one of settings, by whatever name.)
        return {**done[-1], "method": name}
    images = images_of(dataset, config.examples)
    check_filled(images, config.recipe.batch_size)
    key = jax.random.key(seed)
    model = network(config, dataset, key)
    structure = prunable(model)
    training = training_of(config, images, model, structure)
    training.start(key)
    # Nothing is refused from here on: a refused run leaves no folder.
    run_folder.prepare(folder, settings, settings, resume=True)
    training, state, shares = trained(config, images, training, key, folder)
    found = tested(config, dataset, images, training, state, folder)
    found["costs"]["macs expected"] = shares[-1]
    line = {
        "study": "wide_resnet",
        "task": f"{config.dataset} WRN-{config.depth}-{config.factor}",
        "method": name,
        "seed": seed,
        "settings": settings,
        "shares": shares,
        **found,
    }
    results.put(folder, [line])
    return results.read(folder)[-1]


def network(
    config: Config, dataset: data.Dataset, key: PRNGKeyArray
) -> models.ImageModel:
    """The network before training."""
    architecture = pre_activation.wide(config.depth, config.factor)
    shape = dataset.train.images.shape[1:]
    architecture |= {"classes": dataset.classes, "shape": shape}
    weights = nnx.Rngs(gating.key_for(key, "weights"))
    return models.PreActivationResNet(**architecture, rngs=weights)


def made_by(groups: Groups) -> Groups:
    """The same units, to be gated by the filters that make them."""
    return {
        name: Group(
            name,
            group.size,
            tuple(slot for slot in group.made_by if slot.path.endswith("kernel")),
            (),
        )
        for name, group in groups.items()
    }


@dataclasses.dataclass(frozen=True)
class OnMaps(train.Learned):
    """Gates on the filters that make a map.

    Args:
        masked: after batch normalisation closed maps are zero again.
    """

    masked: bool = True

    @property
    def key(self) -> Any:
        """All fields."""
        return super().key, self.masked

    def fold(self, params, own, z, groups):
        """Where a map is made."""
        makes = made_by(groups)
        closed = units.apply_gates(params, z, makes)
        return masked(closed, makes, groups) if self.masked else closed


def training_of(
    config: Config, images: Images, model: models.ImageModel, structure: Structure
) -> train.Training:
    """What is trained, and how."""
    recipe, count = config.recipe, len(images.labels)
    steps = count // recipe.batch_size * recipe.epochs
    learned = {"gate": GATE, "keep_prob": config.keep_prob, "rule": RULE}
    on_maps = config.gates_on == "maps"
    target = None
    if config.target is not None:
        target = train.Target(
            costs.macs,
            config.target,
            warm_up=round(config.warm_up * steps),
            how=config.constraint,
            rate=config.multiplier_rate,
            restart=config.restart,
        )

    def loss(model, batch, key):
        pixels, labels = batch
        x = normalised(pixels, images)
        x = augmented(key, x) if recipe.augment else x
        return smoothed(devices.logits_of(model, x), labels, recipe.smoothing), {}

    # Weight decay counts by the gates, and is no part of the optimiser.
    undecayed = dataclasses.replace(recipe, weight_decay=0.0)
    rate = config.gate_learning_rate
    # Gates keep their rate to the end, so that the target can still be met there.
    gate_recipe = dataclasses.replace(
        undecayed,
        learning_rate=recipe.learning_rate if rate is None else rate,
        drops=(),
        cycle=None,
    )
    return train.Training(
        model,
        loss,
        structure=structure,
        gate=OnMaps(**learned, masked=config.masked_norm)
        if on_maps
        else train.Learned(**learned),
        price=config.lam / count if target is None else None,
        target=target,
        weight_decay=recipe.weight_decay,
        detached=config.detached,
        charges=lambda groups: objectives.charges_of(
            made_by(groups) if on_maps else groups
        ),
        optimizer=optimizer_of(undecayed, steps),
        gate_optimizer=optimizer_of(gate_recipe, steps),
    )


def trained(
    config: Config,
    images: Images,
    training: train.Training,
    key: PRNGKeyArray,
    folder: Path,
) -> tuple[train.Training, train.TrainingState, list[float]]:
    """The training and its state at the end, and the share of the multiply-accumulates
    that was expected before each epoch and at the end."""
    recipe, structure = config.recipe, training.structure

    @jax.jit
    def left(logits):
        expected = costs.macs(structure, gating.prob_active(GATE, logits))
        return expected / costs.macs(structure)

    run = Run(
        training,
        key,
        (images.images, images.labels),
        on=config,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        folder=folder / "checkpoints",
        loop=by_step(),
        show=config.progress,
    )
    run.restore()
    shares = run.notes.get("shares", [float(left(run.state.gates["logits"]))])
    for _ in run:
        shares.append(float(left(run.state.gates["logits"])))
        run.notes["shares"] = shares
        run.say(f"loss {run.means['loss']:.3f}, MACs expected {100 * shares[-1]:.1f} %")
    return *devices.alone(run.training, run.state), shares


def tested(
    config: Config,
    dataset: data.Dataset,
    images: Images,
    training: train.Training,
    state: train.TrainingState,
    folder: Path,
) -> dict[str, Any]:
    """The network whose gates the rule has decided, before and after removal of what it
    closes; without the latter if a layer has closed."""
    structure = training.structure
    decision = training.decide(state, RULE)
    keep = {name: np.asarray(values) != 0 for name, values in decision.z.items()}
    size = config.recipe.batch_size
    fitted = training.recalibrate(state, batches_of(images, size), rule=decision)
    whole = training.whole_model(fitted, decision)
    found = errors(whole, dataset, images)
    metrics = {f"{part} error": error for part, error in found.items()}
    if all(each.any() for each in keep.values()):
        flags = {name: jnp.float32(each) for name, each in keep.items()}
        closed = l0jax.nnx.fold(whole, flags, structure.groups)
        small = l0jax.nnx.shrink(closed, keep, structure)
        if config.gates_on == "maps" and not config.masked_norm:
            # Batch normalisation had made something of closed maps, which is gone.
            small = recalibrated(small, images, size)
        storage.save(small, folder / "shrunk")
        found = errors(small, dataset, images)
        metrics |= {f"removed {part} error": error for part, error in found.items()}
    share = float(costs.exact(structure, keep) / costs.exact(structure))
    widths = {name: int(each.sum()) for name, each in keep.items()}
    return {"metrics": metrics, "costs": {"macs": share}, "widths": widths}


def masked(params: Any, groups: Groups, reads: Groups) -> Any:
    """The weights that read a map that is closed at zero, as if batch normalisation
    gave zero there."""
    magnitudes = jax.tree.map(jnp.abs, params)
    largest = units.largest_use(magnitudes, groups)
    on = {name: jax.lax.stop_gradient(jnp.sign(v)) for name, v in largest.items()}
    return units.apply_gates(params, on, reads)


def cli() -> None:
    config = command_line.parse(Config, __doc__, presets=WIDE_RESNET)
    try:
        found = main(config)
    except (ValueError, FloatingPointError, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.wide_resnet: {error}") from None
    for result in found:
        metrics, share = result["metrics"], result["costs"]
        shrunk = metrics.get("removed test error", math.nan)
        name = f"{result['method']:34} seed {result['seed']}"
        left = f"{100 * share['macs expected']:.1f} %, kept {100 * share['macs']:.1f} %"
        wrong = f"{metrics['test error']:.2f} %, shrunk {shrunk:.2f} %"
        print(f"{name}: MACs expected {left}; test error {wrong}")
    if config.record:
        draw(results.read(RESULTS), RESULTS / PICTURE)
        print(f"picture {RESULTS / PICTURE}")


if __name__ == "__main__":
    cli()
