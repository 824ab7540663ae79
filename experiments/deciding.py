"""Which units stay at test time: the rule that fills the budget against the others.

    python -m experiments.deciding
    python -m experiments.deciding --networks mlp --seeds 0 1 2 --record

A network is trained to a target on its multiply-accumulates, with hard concrete gates,
and decided by every rule. Rules other than `"budget"` end at shares of their own; each
is compared with the budget rule *at that share*, on the same trained network: what is
left costs the same, and only the choice differs. Statistics of batch normalisation are
recalibrated for each decision. Every decision becomes a line of `runs.jsonl`, with
`--record` of that in `experiments/results/deciding` too.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx

from experiments import mnist_training
from experiments.channel_run import prunable
from experiments.harness import devices, results, run_folder
from experiments.harness.loop import Diverged, Run
from experiments.mnist_settings import Config as OfMnist
from experiments.mnist_settings import check
from experiments.reports import places
from experiments.reports.printing import interval, markdown
from experiments.tasks import data
from experiments.tasks.images import batches_of, images_of, normalised
from l0jax import costs, gates, gating, models, train
from l0jax.methods.task import cross_entropy

RESULTS = places.RESULTS / "deciding"
GATE = gates.HardConcrete()
RULES = ("paper", "median", "threshold", "expected_count", "budget")
NETWORKS: dict[str, dict[str, Any]] = {
    # With how many epochs, and whether an epoch is one program.
    "mlp": {"dataset": "mnist", "epochs": 30, "loop": False},
    "lenet5": {"dataset": "mnist", "epochs": 6, "loop": False},
    "resnet8": {"dataset": "cifar10_jpeg", "epochs": 12, "loop": True},
}


@dataclasses.dataclass(frozen=True)
class Config(devices.OnDevices):
    """Decide trained gates by every rule."""

    networks: tuple[str, ...] = tuple(NETWORKS)
    """which of them"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of weights, gates and the order of the data"""
    target: float = 0.3
    """share of the multiply-accumulates that may be left"""
    gate_learning_rate: float = 2e-2
    """of Adam, for the gates"""
    examples: int = 5_120
    """images that the residual network is trained on"""
    out: Path = Path("runs") / "deciding"
    """folder of the checkpoints and results"""
    record: bool = False
    """put results into `experiments/results`, in the place of older ones"""
    progress: bool = True
    """show a progress bar"""


ORDER = {"network": NETWORKS, "seed": (), "method": RULES}
UNTOLD = ("networks", "seeds", "out", "record", "progress", *devices.PLACES)
BATCH_SIZE = 100


def main(config: Config) -> list[dict[str, Any]]:
    """All decisions of all networks."""
    for name in config.networks:
        if name not in NETWORKS:
            raise ValueError(
                f"unknown network {name!r}; there is {', '.join(NETWORKS)}"
            )
    if not config.networks or not config.seeds:
        raise ValueError("give at least one network and one seed")
    devices.check(config, BATCH_SIZE)
    told = run_folder.settings_of(config, UNTOLD)
    run_folder.prepare(config.out, told, told, resume=True)
    found = []
    for name in config.networks:
        dataset = data.load(NETWORKS[name]["dataset"], 0.1)
        for seed in config.seeds:
            make = of_images if name == "resnet8" else of_mnist
            training, images = make(config, name, dataset, seed)
            of = {"study": "deciding", "task": f"{dataset.name} {name}"}
            of |= {"network": name, "seed": seed, "settings": told}
            lines = decided(config, name, dataset, seed, training, images)
            new = [{**of, **line} for line in lines]
            found += new
            for folder in (config.out, *([RESULTS] if config.record else [])):
                results.put(folder, new, ORDER)
    return found


def of_mnist(config: Config, name: str, dataset: data.Dataset, seed: int):
    """The perceptron or LeNet-5, as `experiments.mnist` trains them."""
    settings = OfMnist(
        dataset=dataset.name,
        model=name,
        target_macs=config.target,
        epochs=NETWORKS[name]["epochs"],
        gate_learning_rate=config.gate_learning_rate,
        multiplier_rate=2e-2,
        seed=seed,
    )
    model = mnist_training.network(settings, dataset, jax.random.key(seed))
    return mnist_training.training_of(settings, check(settings), dataset, model), None


def of_images(config: Config, name: str, dataset: data.Dataset, seed: int):
    """A residual network with batch normalisation, gates on the maps within blocks."""
    del name
    images = images_of(dataset, config.examples)
    key = gating.key_for(jax.random.key(seed), "weights")
    sizes = {"stem": 8, "stages": (8, 16, 32), "inner": ((8,), (16,), (32,))}
    sizes |= {"classes": dataset.classes, "shape": dataset.train.images.shape[1:]}
    model = models.make("pre_activation_resnet", sizes, rngs=nnx.Rngs(key))

    def loss(model, batch):
        pixels, labels = batch
        logits = devices.logits_of(model, normalised(pixels, images))
        wrong = (logits.argmax(-1) != labels).mean()
        return cross_entropy(logits, labels).mean(), {"error": wrong}

    steps = len(images.labels) // BATCH_SIZE * NETWORKS["resnet8"]["epochs"]
    training = train.Training(
        model,
        loss,
        structure=prunable(model),
        gate=train.Learned(GATE, keep_prob=0.9),
        target=train.Target(costs.macs, config.target, warm_up=steps // 2, rate=5e-2),
        optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, steps)),
        gate_optimizer=optax.adam(config.gate_learning_rate),
    )
    return training, images


def decided(
    config: Config, name: str, dataset: data.Dataset, seed: int, training, images
) -> Iterator[dict[str, Any]]:
    """Trains a network; a line for each rule."""
    split = (images.images, images.labels) if images else tuple(dataset.train)
    run = Run(
        training,
        jax.random.key(seed),
        split,
        on=config,
        epochs=NETWORKS[name]["epochs"],
        batch_size=BATCH_SIZE,
        folder=config.out / f"{name}-{seed}",
        loop=NETWORKS[name]["loop"],
        name=f"{name}, seed {seed}",
        show=config.progress,
    )
    run.restore()
    for _ in run:
        run.say(f"loss {run.means['loss']:.3f}")
    training, state = devices.alone(run.training, run.state)
    target = training.target
    assert target is not None

    def errors(decision: train.Decision, when: str = "") -> dict[str, float]:
        fitted = state
        if images is not None:
            parts = batches_of(images, 128)
            fitted = training.recalibrate(state, parts, rule=decision)
        found = {}
        for part in ("validation", "test"):
            pixels, labels = getattr(dataset, part)
            tenths = (np.array_split(each, 10) for each in (pixels, labels))
            batches = zip(*tenths, strict=True)
            error = training.evaluate(fitted, batches, rule=decision)["error"]
            found[f"{when}{part} error"] = 100 * error
        return found

    for rule in RULES:
        decision = training.decide(state, rule)
        share = decision.decided["macs"]
        alike = dataclasses.replace(target, share=min(share * (1 + 1e-9), 1.0))
        filled = training.replace(target=alike).decide(state)
        its = decision if rule == "budget" else filled
        yield {
            "method": rule,
            "metrics": errors(decision) | errors(its, ALIKE),
            "costs": {
                "macs": share,
                "macs expected": decision.expected["macs"],
                f"{ALIKE}macs": filled.decided["macs"],
            },
            "excess": decision.excess["macs"],
            "undecided": decision.undecided,
        }


ALIKE = "budget at that share: "
"""Before the names of what the budget rule gives at the share of another."""


def table(lines: Sequence[results.Line]) -> str:
    """A line for each network and rule: means with 95 % intervals over seeds."""
    rows = []
    for (network, rule), its in results.by(lines, "network", "method").items():
        test = [line["metrics"]["test error"] for line in its]
        alike = [line["metrics"][f"{ALIKE}test error"] for line in its]
        apart = [own - other for own, other in zip(test, alike, strict=True)]
        rows.append(
            [
                network,
                rule,
                interval(100 * line["settings"]["target"] for line in its),
                interval(100 * line["costs"]["macs expected"] for line in its),
                interval(100 * line["costs"]["macs"] for line in its),
                interval(100 * line["excess"] for line in its),
                interval(test),
                "-" if rule == "budget" else interval(apart),
                str(len(its)),
            ]
        )
    header = ["network", "rule", "target, % of MACs", "expected", "decided"]
    header += ["excess, % of the target", "test error, %"]
    header += ["above the budget rule at the same MACs, points", "seeds"]
    return markdown(header, rows)


def cli() -> None:
    config = tyro.cli(Annotated[Config, tyro.conf.arg(name="")], description=__doc__)
    try:
        print(table(main(config)))
    except (ValueError, Diverged, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.deciding: {error}") from None


if __name__ == "__main__":
    cli()
