"""How wrong networks of few weights are: a dense one, closed to a number of weights.

    python -m experiments.frontier                            # an MLP of 9,560 weights
    python -m experiments.frontier --weights 2751 --model lenet5
    python -m experiments.frontier --gates weight --weights 6300 --seeds 0 1 2 3 4
    python -m experiments.frontier --quick                    # on scikit-learn's digits

A dense network is trained first. Then it has gates on its units, or on its single
weights, and the number of weights that is expected to be left falls to what may be; the
gates with the largest logits stay, as many as fit, and what is left is trained on. In
both it learns from the labels and from the dense network. Runs are resumed where they
were killed, and are lines of `runs.jsonl`, which `experiments.compare` reads.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from flax import nnx

from experiments.frontier_training import (
    TOGETHER,
    Examples,
    learned_from,
    of_single_weights,
    said_by,
)
from experiments.harness import (
    command_line,
    devices,
    ranges,
    results,
    run_folder,
)
from experiments.harness.loop import Diverged, Run
from experiments.mnist_settings import NETWORKS
from experiments.mnist_training import architecture, loss_on
from experiments.tasks import data
from l0jax import costs, gates, gating, models, storage, train

NAMES = {"group": "units", "weight": "weights"}
QUICK: dict[str, Any] = {
    **{"dataset": "digits", "weights": 2_000, "dense": 60, "closing": 60},
    **{"tuning": 60, "gate_learning_rate": 3e-2},
}


@dataclasses.dataclass(frozen=True)
class Config(devices.OnDevices):
    """Close a dense network to a number of weights."""

    dataset: str = "mnist"
    """a data set of `experiments.tasks.data`"""
    model: str = "mlp"
    """mlp (300-100) or lenet5 (20-50-800-500)"""
    gates: Literal["group", "weight"] = "group"
    """one per unit, or one per weight"""
    gate: str = "hard_concrete"
    """the gate family, one of `l0jax.gates.GATES` that a target can push"""
    weights: int = 9_560
    """that may be left, biases not counted"""
    dense: int = 60
    """epochs of the dense network"""
    closing: int = 200
    """epochs in which gates close"""
    tuning: int = 200
    """epochs of what is left"""
    batch_size: int = 100
    """examples of a step"""
    learning_rate: float = 1e-3
    """of Adam, at the beginning of each of the three; it falls to 0 along a cosine"""
    weight_decay: float = 0.0
    """decoupled, of all three"""
    dropped: float = 0.2
    """share of the pixels that the dense network doesn't see, others at each step"""
    dropped_later: float = 0.1
    """the same while it closes, and of what is left"""
    moved: int = 0
    """pixels by which training images are moved at most, others at each step, up or
    down and left or right"""
    distil: float = 0.9
    """weight of what the dense network says; that of the labels is what is missing to
    one"""
    softness: float = 4.0
    """temperature of what the dense network says (Hinton, Vinyals and Dean 2015)"""
    gate_learning_rate: float = 5e-3
    """of Adam, for the gates"""
    multiplier_rate: float = 5e-3
    """of gradient ascent, for the multiplier of the number of weights"""
    reached: float = 0.5
    """share of the closing over which the expected number falls to what may be left"""
    keep_prob: float = 0.9
    """of the gates, at first"""
    polyak: float = 0.999
    """decay of the running average that is evaluated; 0: none"""
    validation: float = 1 / 12
    """share of the training set that is held out for every choice"""
    seeds: tuple[int, ...] = (0,)
    """of weights, gates and the order of the examples"""
    test: bool = True
    """say what the errors of the test images are; without, they are stored only"""
    out: Path | None = None
    """run folder; None is runs/<dataset>-<model>-frontier-<digest of the settings>"""
    progress: bool = True
    """show a progress bar"""


RANGES = {
    "be at least 1": ("weights", "dense", "closing", "tuning", "batch_size"),
    "be >= 0": ("moved",),
    "be > 0": ("learning_rate", "gate_learning_rate", "multiplier_rate", "softness"),
    "lie in [0, 1]": ("distil", "reached"),
    "lie in [0, 1)": ("dropped", "dropped_later"),
}
UNTOLD = ("seeds", "test", "out", "progress", *devices.PLACES)


def check(config: Config) -> gates.Gate:
    """Raises ValueError for what can't be run; returns the gate family."""
    if config.model not in NETWORKS:
        raise ValueError(
            f"unknown model {config.model!r}; there is {', '.join(NETWORKS)}"
        )
    gate = gates.make(config.gate)
    if not gate.bounded:
        raise ValueError(
            f"what {config.gate!r} gates pay is no probability, so that no number of "
            "weights is expected of them that could be pushed to what may be left"
        )
    if not config.seeds:
        raise ValueError("give at least one seed")
    ranges.check(config, RANGES)
    devices.check(config, config.batch_size)
    return gate


def main(config: Config) -> dict[str, Any]:
    """Runs what is missing; the folder and all its results."""
    gate = check(config)
    dataset = data.load(config.dataset, config.validation)
    settings = run_folder.settings_of(config, UNTOLD)
    name = f"{config.dataset}-{config.model}-frontier"
    folder = config.out or run_folder.default(name, settings)
    there = results.there(folder, "seed")
    missing = [
        Closed(config, gate, dataset, folder, seed)
        for seed in config.seeds
        if (seed,) not in there
    ]
    # What can be known is refused by now: a refused run leaves no folder.
    run_folder.prepare(folder, settings, settings, resume=True)
    for each in missing:
        line = {"study": "frontier", "settings": settings, **each.result()}
        results.put(folder, [line])
    return {"folder": str(folder), "results": results.read(folder)}


class Closed:
    """A run with one seed.

    Raises:
        ValueError: if more weights may be left than there are, or if the examples don't
            fill a batch.
    """

    def __init__(
        self,
        config: Config,
        gate: gates.Gate,
        dataset: data.Dataset,
        folder: Path,
        seed: int,
    ):
        self.config, self.gate, self.dataset = config, gate, dataset
        self.folder, self.seed, self.key = folder, seed, jax.random.key(seed)
        self.resumed = False
        self.examples = Examples(dataset.train.images, dataset.train.labels)
        if not self.steps(1):
            raise ValueError(
                f"batch_size is {config.batch_size}, more than the "
                f"{len(self.examples.labels)} training examples"
            )
        shape = dataset.train.images.shape[1:]
        self.model = models.make(
            config.model,
            architecture(config.model, shape, dataset.classes),
            rngs=nnx.Rngs(gating.key_for(self.key, "weights")),
        )
        self.structure = models.structure(self.model)
        self.whole = int(costs.exact(self.structure, cost=costs.weights))
        if config.weights >= self.whole:
            raise ValueError(
                f"{config.weights} weights may be left, and the dense network has "
                f"{self.whole}: give fewer"
            )

    def result(self) -> dict[str, Any]:
        """Trains, closes, trains what is left, and tests it."""
        begun = time.perf_counter()
        of_dense = self.trained("dense", self.model, self.config.dense)
        dense = of_dense[0].whole_model(of_dense[1])
        self.examples = self.examples._replace(
            teacher=said_by(dense, self.dataset, self.config.moved)
        )
        closed, training, state = self.closed(dense)
        final = training.whole_model(state)
        kernels = [
            a for a in jax.tree.leaves(nnx.state(final, nnx.Param)) if a.ndim > 1
        ]
        left = sum(int(np.count_nonzero(kernel)) for kernel in kernels)
        storage.save(final, self.folder / f"{self.config.gates}-{self.seed}")
        return {
            "task": f"{self.config.dataset} {self.config.model}",
            "method": f"{self.config.gate} on {NAMES[self.config.gates]}",
            "seed": self.seed,
            "metrics": {
                "dense validation error": self.error(*of_dense, "validation"),
                "closed validation error": closed,
                "validation error": self.error(training, state, "validation"),
                "dense test error": self.error(*of_dense, "test"),
                "test error": self.error(training, state, "test"),
            },
            "costs": {"weights": left / self.whole},
            "weights": left,
            "architecture": final.architecture,
            # Of what went on where it was killed nobody knows all seconds.
            "seconds": None if self.resumed else time.perf_counter() - begun,
        }

    def closed(self, dense: Any) -> tuple[float, train.Training, train.TrainingState]:
        """The error when gates have closed, and the training of what is left at its
        end."""
        config = self.config
        share = config.weights / self.whole
        single = config.gates == "weight"
        structure, cost = self.structure, costs.weights
        learned = train.Learned(self.gate, config.keep_prob)
        if single:
            structure, weights = of_single_weights(dense)
            learned = dataclasses.replace(learned, only=weights)
            cost = "density"
        training, state = self.trained(
            "closing",
            dense,
            config.closing,
            structure=structure,
            gate=learned,
            gate_optimizer=optax.adam(config.gate_learning_rate),
            target=train.Target(
                cost,
                share,
                warm_up=round(config.reached * self.steps(config.closing)),
                rate=config.multiplier_rate,
            ),
        )
        decision = training.decide(state)
        error = self.error(training, state, "validation", decision)
        if not single:
            small = training.finish(state, decision)
            return error, *self.trained("tuning", small, config.tuning)
        # Units of which all weights were closed are gone by now.
        left = training.whole_model(state, decision)
        structure, weights = of_single_weights(left)
        return error, *self.trained(
            "tuning",
            left,
            config.tuning,
            structure=structure.only(*weights),
            gate=train.Chosen({n: np.asarray(z) != 0 for n, z in decision.z.items()}),
        )

    def steps(self, epochs: int) -> int:
        """Of so many epochs."""
        return len(self.examples.labels) // self.config.batch_size * epochs

    def trained(
        self, name: str, model: Any, epochs: int, **how: Any
    ) -> tuple[train.Training, train.TrainingState]:
        """A training at its end, from its checkpoints if there are some."""
        config = self.config
        rate = optax.cosine_decay_schedule(config.learning_rate, self.steps(epochs))
        if "structure" not in how:
            how["structure"] = models.structure(model).only()
        dropped = config.dropped if name == "dense" else config.dropped_later
        training = train.Training(
            model,
            learned_from(
                self.dataset.scale,
                dropped,
                config.distil,
                config.softness,
                config.moved,
            ),
            optimizer=optax.adamw(rate, weight_decay=config.weight_decay),
            polyak=config.polyak,
            **how,
        )
        run = Run(
            training,
            gating.key_for(self.key, name),
            self.examples,
            on=config,
            epochs=epochs,
            batch_size=config.batch_size,
            folder=self.folder / "checkpoints" / f"{name}-{self.seed}",
            every=10,
            name=f"{name} seed {self.seed}",
            show=config.progress,
        )
        run.restore()
        self.resumed |= run.epoch > 0
        for _ in run:
            run.say(f"error {100 * run.means['error']:.2f} %")
            run.training, run.state = run.training.compact(
                run.state, run.examples_to_come
            )
        return devices.alone(run.training, run.state)

    def error(
        self,
        training: train.Training,
        state: train.TrainingState,
        part: str,
        rule: Any = None,
    ) -> float:
        """Of images that were held out, in per cent."""
        split = getattr(self.dataset, part)
        parts = range(TOGETHER, len(split.labels), TOGETHER)
        images, labels = (np.split(each, [*parts]) for each in split)
        batches = zip(images, labels, strict=True)
        loss = loss_on(self.dataset.scale)
        return 100 * training.evaluate(state, batches, loss, rule=rule)["error"]


def cli() -> None:
    config = command_line.parse(
        Config, __doc__, QUICK, "scikit-learn's digits; half a minute"
    )
    try:
        found = main(config)
    except (ValueError, Diverged, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.frontier: {error}") from None
    for line in found["results"]:
        said = [
            f"{part} error {line['metrics'][f'dense {part} error']:.2f} % -> "
            f"{line['metrics'][f'{part} error']:.2f} %"
            for part in ("validation", *(["test"] if config.test else []))
        ]
        print(
            f"{line['task']}, {line['method']}, seed {line['seed']}: "
            f"{line['weights']:,} weights; {', '.join(said)}"
        )
    print(found["folder"])


if __name__ == "__main__":
    cli()
