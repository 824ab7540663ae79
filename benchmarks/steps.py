"""What gates cost per training step, and how fast LeNet-5's step is beside PyTorch's.

    python -m benchmarks.steps             # prints ratios and limits
    python -m benchmarks.steps --record    # and writes benchmarks/results/steps.jsonl
    pip install torch==2.13.0              # for the comparison with PyTorch

The things compared take turns in one process, so that a machine whose speed drifts
treats them alike; a ratio is the median over turns. Five minutes on two cores. The data
are random images of MNIST's shape: no step depends on what they show.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks import measure
from benchmarks.measure import entry, milliseconds, ratio, take_turns
from experiments.harness import results
from experiments.mnist_training import loss_on, weight_groups
from l0jax import gates, models, train

EXAMPLES, BATCH = 10_000, 100


def images_and_labels():
    key = jax.random.key(0)
    images = jax.random.randint(key, (EXAMPLES, 28, 28, 1), 0, 256, jnp.int32)
    labels = jax.random.randint(key, (EXAMPLES,), 0, 10, jnp.int32)
    return images.astype(jnp.uint8), labels


class NotDrawn(gates.HardConcrete):
    """Gates that cost no noise: what is left is the price of a second parameter."""

    def sample(self, key, logits):
        return self.deterministic(logits, "paper")


class NoiseOfJax(gates.HardConcrete):
    """Hard concrete gates, drawn with the uniform noise that JAX offers."""

    def sample(self, key, logits):
        u = jax.random.uniform(key, logits.shape, minval=1e-6, maxval=1 - 1e-6)
        return self._stretch((jnp.log(u) - jnp.log1p(-u) + logits) / self.beta)


def stepper(
    model: models.Model,
    kind: str,
    steps: int,
    gate: gates.Gate = gates.HardConcrete(),  # noqa: B008 (frozen)
) -> Callable[[], None]:
    """Runs `steps` training steps of `model` gated per `kind`, compiled before."""
    structure = models.structure(model)
    gated = list(structure.groups)
    if kind == "weight":
        single = weight_groups(nnx.state(model, nnx.Param))
        gated = list(single)
        for group in single.values():
            structure = structure.add(group)
    training = train.Training(
        model,
        loss_on(255.0),
        structure=structure,
        gate=None if kind == "none" else train.Learned(gate, only=tuple(gated)),
        price=None if kind == "none" else 0.1 / EXAMPLES,
        weight_decay=1e-4,
        optimizer=optax.adam(1e-3),
        gate_optimizer=optax.adam(1e-3),
        polyak=0.999,
    )
    key = jax.random.key(1)
    data = images_and_labels()
    order = train.order_of_epoch(key, 0, EXAMPLES, BATCH)[:steps]
    kept = [training.epoch(training.start(key), data, order)[0]]

    def go():
        kept[0], _ = training.epoch(kept[0], data, order)
        jax.block_until_ready(kept)

    return go


def torch_stepper(steps: int) -> Callable[[], None]:
    """The same LeNet-5, loss and optimiser in PyTorch, in its default layout."""
    import torch
    from torch import nn

    network = nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    images = torch.randint(0, 256, (EXAMPLES, 1, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, 10, (EXAMPLES,))

    def go():
        order = torch.randperm(EXAMPLES).reshape(-1, BATCH)
        for rows in order[:steps]:
            optimizer.zero_grad()
            outputs = network(images[rows].float() / 255)
            nn.functional.cross_entropy(outputs, labels[rows]).backward()
            optimizer.step()

    go()
    return go


def gate_costs(turns: int) -> list[dict]:
    steps = 50
    model = models.MLP((784, 300, 100, 10), rngs=nnx.Rngs(0))
    variants = {
        "one gate per unit": ("group", gates.HardConcrete(), 1.15),
        "one gate per weight": ("weight", gates.HardConcrete(), 2.0),
        "one gate per weight, not drawn": ("weight", NotDrawn(), None),
        "one gate per weight, noise of jax.random": ("weight", NoiseOfJax(), None),
    }
    contenders = {"no gates": stepper(model, "none", steps)}
    for name, (kind, gate, _) in variants.items():
        contenders[name] = stepper(model, kind, steps, gate)
    seconds = take_turns(contenders, turns)
    return [
        entry(
            f"MLP step, {name}, over the step without gates",
            ratio(seconds, name, "no gates"),
            limit,
            "×",
            milliseconds({n: seconds[n] for n in (name, "no gates")}, steps),
        )
        for name, (_, _, limit) in variants.items()
    ]


def against_torch(turns: int) -> list[dict]:
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: its comparison is left out", file=sys.stderr)
        return []
    steps = 20
    model = models.LeNet5(rngs=nnx.Rngs(0))
    seconds = take_turns(
        {
            "l0jax": stepper(model, "none", steps),
            "l0jax gated": stepper(model, "group", steps),
            "PyTorch": torch_stepper(steps),
        },
        turns,
    )
    return [
        entry(
            f"LeNet-5 step over PyTorch {torch.__version__.split('+')[0]}",
            ratio(seconds, "l0jax", "PyTorch"),
            1.0,
            "×",
            milliseconds(seconds, steps),
        )
    ]


def start_up() -> list[dict]:
    """Seconds from the command to the end of the first step, compilation included."""
    cases = [("digits", 10.0)]
    if os.environ.get("TFDS_DATA_DIR"):
        cases.append(("mnist", 20.0))
    else:
        print("TFDS_DATA_DIR is not set: MNIST is left out", file=sys.stderr)
    entries = []
    for dataset, limit in cases:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "run"
            command = f"-m experiments.mnist --dataset {dataset} --epochs 1 --out"
            begun = time.time()
            subprocess.run(
                [sys.executable, *command.split(), str(out), "--no-progress"],
                check=True,
                capture_output=True,
            )
            (line,) = results.read(out)
        entries.append(
            entry(
                f"first step on {dataset}, after the start of the command",
                line["first_step_at"] - begun,
                limit,
                " s",
                "imports, data and compilation included",
            )
        )
    return entries


def main(arguments) -> list[dict]:
    turns = arguments.turns
    return start_up() + gate_costs(turns) + against_torch(turns)


if __name__ == "__main__":
    measure.run(__doc__, "steps", main, turns=15)
