"""A new study is one short file: what varies, what is trained, what is recorded.

The study below is as long as it would be in `experiments/`: which share of a perceptron
is left at several prices. What it needs beside the library is the harness.
"""

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.harness import results, run_folder
from experiments.harness.loop import Diverged, Run
from experiments.reports.printing import interval, markdown
from experiments.reports.runs import runs
from experiments.tasks import data
from experiments.tasks.images import errors, images_of, normalised
from l0jax import costs, gates, train
from l0jax.methods.task import cross_entropy
from tests.training_models import ConvNet

# ---------------------------------------------------------------------- the study


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a network to several budgets."""

    targets: tuple[float, ...] = (0.3, 0.6)
    """shares of the multiply-accumulates"""
    seeds: tuple[int, ...] = (0, 1)
    """of weights, gates and the order of the data"""
    epochs: int = 4
    """passes over the training images"""
    batch_size: int = 64
    """images of a step"""
    learning_rate: float = 3e-3
    """of Adam"""
    out: Path = Path("runs/budgets")
    """run folder"""
    progress: bool = False
    """show a progress bar"""


UNTOLD = ("targets", "seeds", "out", "progress")


def main(config: Config) -> list[dict[str, Any]]:
    """Runs what is missing."""
    dataset = data.load("digits", 0.1)
    settings = run_folder.settings_of(config, UNTOLD)
    run_folder.prepare(config.out, settings, settings, resume=True)
    done = results.there(config.out, "method", "seed")
    for target in config.targets:
        for seed in config.seeds:
            if (f"target {target}", seed) not in done:
                line = one(config, dataset, target, seed)
                results.put(config.out, [{"settings": settings, **line}])
    return results.read(config.out)


def one(config: Config, dataset: data.Dataset, target: float, seed: int):
    """A budget with one seed."""
    images, key = images_of(dataset), jax.random.key(seed)
    model = ConvNet(nnx.Rngs(seed))

    def loss(model, batch):
        pixels, labels = batch
        return cross_entropy(model(normalised(pixels, images)), labels).mean(), {}

    steps = len(images.labels) // config.batch_size * config.epochs
    training = train.Training(
        model,
        loss,
        np.zeros((1, *images.images.shape[1:]), np.float32),
        gate=gates.HardConcrete(),
        target=train.Target(costs.macs, target, warm_up=steps // 2, rate=0.1),
        optimizer=optax.adam(config.learning_rate),
        gate_optimizer=optax.adam(0.1),
    )
    run = Run(
        training,
        key,
        (images.images, images.labels),
        epochs=config.epochs,
        batch_size=config.batch_size,
        folder=config.out / "checkpoints" / f"{target}-{seed}",
        loop=True,
        show=config.progress,
    )
    run.restore()
    for _ in run:
        run.say(f"loss {run.means['loss']:.3f}")
    decision = run.training.decide(run.state)
    left = run.training.whole_model(run.state, decision)
    found = errors(left, dataset, images)
    return {
        "study": "budgets",
        "task": "digits convnet",
        "method": f"target {target}",
        "seed": seed,
        "metrics": {f"{part} error": found[part] for part in ("validation", "test")},
        "costs": {"macs": decision.decided["macs"]},
        "seconds": run.seconds,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Error by budget."""
    rows = [
        [method, interval(line["metrics"]["test error"] for line in its)]
        for method, its in results.by(lines, "method").items()
    ]
    return markdown(["budget", "error, %"], rows)


# ---------------------------------------------------------------------- the tests


def test_a_study_is_short():
    source = Path(inspect.getfile(sys.modules[__name__])).read_text()
    study = source.split("# ----")[1]
    assert len(study.splitlines()) <= 120


def test_a_study_runs_goes_on_and_appears_in_comparisons(tmp_path):
    config = Config(out=tmp_path / "run", targets=(0.3,), seeds=(0,))
    first = main(config)
    assert len(first) == 1
    more = dataclasses.replace(config, targets=(0.3, 0.6), seeds=(0, 1))
    found = main(more)
    assert len(found) == 4
    assert found[0] == first[0], "what is there is not run again"
    for line in found:
        target = float(line["method"].split()[1])
        assert line["costs"]["macs"] <= target
        assert line["metrics"]["test error"] < 60
    text = table(found)
    assert "| target 0.3 |" in text
    read = runs(tmp_path / "*")
    assert [(r.method, r.seed) for r in read] == [
        (line["method"], line["seed"]) for line in found
    ]
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {"commit", "device", "versions"} <= stored.keys()


def test_a_run_that_diverges_names_where_and_what_is_left(tmp_path):
    wild = Config(out=tmp_path / "run", learning_rate=1e30, seeds=(0,))
    with pytest.raises(Diverged, match=r"not finite at step .* is none yet; a smaller"):
        main(wild)
