"""What an accelerator makes of gates: one command, some 25 minutes.

    python -m benchmarks.gpu                # all of it, into runs/gpu.jsonl
    python -m benchmarks.gpu --only device steps
    python -m benchmarks.gpu --small        # the same at small size, for any machine
    python -m benchmarks.gpu --record       # and writes benchmarks/results/gpu.jsonl

- `device`: what it is, and how many operations a second it brings to large products;
- `steps`: training steps of known networks, plain and gated, in float32 (as JAX
  multiplies by default, which is TF32 on today's GPUs) and bfloat16: examples a second,
  and which share they use of what the device brings in bfloat16;
- `sweeps`: 1 to 256 MLPs with gates in one program;
- `widths`: calls of ResNet-50 without half of its inner channels, with the widths as
  they come and rounded up;
- `training`: ResNet-56 on CIFAR-10, and pruned by gates to half of its
  multiply-accumulates, in as many epochs as there is time for.

Every measurement is a line that is written when it is there. A second start measures
what is missing on this device at this size, and what failed; none begins when the
minutes are over. But for the last part the data are random: no step depends on what
they show.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import l0jax
from benchmarks.measure import RESULTS, entry
from experiments import channel_pruning, channel_run, channel_settings
from experiments.harness import json_lines, run_folder
from experiments.tasks import data
from experiments.tasks.images import Images, Recipe, Trainer, images_of
from l0jax import costs, gates, models, train

Line = dict[str, Any]
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
CALLS = 7
Measurement = tuple[str, Callable[[float], Line]]
"""What it is, and what measures it in so many seconds."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the list is."""

    product: int = 8192
    """rows and columns of what is multiplied to see what the device brings"""
    steps: int = 20
    """of a program"""
    networks: tuple[tuple[str, int], ...] = (
        ("mlp", 128),
        ("lenet5", 128),
        ("resnet20", 512),
        ("resnet56", 512),
        ("wrn28_10", 256),
        ("resnet50", 128),
    )
    """names and batches"""
    members: tuple[int, ...] = (1, 16, 64, 256)
    """of sweeps"""
    narrowed: tuple[str, int] = ("resnet50", 64)
    """name and batch"""
    rounded: tuple[int, ...] = (1, 8, 16, 32, 64)
    """to multiples of which widths are rounded up"""
    trained: tuple[str, str, float] = ("resnet56", "cifar10", 1.0)
    """name, data set, and factor of the channels"""
    examples: int | None = None
    """training images; None is all"""
    epochs: int = 300
    """that are trained at most, the base network's and those after it"""


SMALL = Sizes(
    product=128,
    steps=2,
    networks=(("mlp", 8), ("lenet5", 8)),
    members=(1, 3),
    narrowed=("resnet20", 2),
    rounded=(1, 8),
    trained=("resnet20", "digits", 0.25),
    examples=256,
    epochs=6,
)
RUNS = Path("runs") / "gpu"
"""Where trained networks are."""
FOR_THE_REST = 0.3
"""Share of the time that is left that goes to compilation, choosing and tests."""


def seconds_of(go: Callable[[], Any]) -> tuple[float, float]:
    """The median time of some calls, and that of the first one, which compiles."""
    found = []
    for _ in range(CALLS + 1):
        begun = time.perf_counter()
        jax.block_until_ready(go())
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:]), found[0]


# ------------------------------------------------------------------------- the device


def device(sizes: Sizes) -> Iterator[Measurement]:
    """Operations a second of a square product; a multiply-accumulate counts as two."""
    for name, dtype in DTYPES.items():

        def measured(_: float, dtype: Any = dtype) -> Line:
            side = sizes.product
            array = jnp.ones((side, side), dtype or jnp.float32) / side
            product = jax.jit(lambda a, b: a @ b)
            seconds, _ = seconds_of(lambda: product(array, array))
            return {"seconds": seconds, "operations a second": 2 * side**3 / seconds}

        yield f"product in {name}", measured


# ------------------------------------------------------------------------------- steps


def network(name: str) -> tuple[Any, tuple[int, ...], int]:
    """A network with random weights, the shape of its examples, and its classes."""
    if name == "mlp":
        return models.MLP((784, 300, 100, 10), rngs=nnx.Rngs(0)), (784,), 10
    if name == "lenet5":
        return models.LeNet5(rngs=nnx.Rngs(0)), (28, 28, 1), 10
    kind, architecture = models.PRESETS[name]
    made: Any = models.make(kind, architecture, rngs=nnx.Rngs(0))
    return made, tuple(made.example.shape[1:]), made.architecture["classes"]


def loss(model: Any, batch: Any) -> tuple[Any, dict]:
    """Mean cross-entropy."""
    images, labels = batch
    logits = model(images).astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return nats.mean(), {}


def examples(shape: tuple[int, ...], classes: int, count: int) -> tuple[Any, Any]:
    """Random images and labels."""
    key = jax.random.key(0)
    images = jax.random.normal(key, (count, *shape))
    return images, jax.random.randint(key, (count,), 0, classes, jnp.int32)


def training_of(model: Any, gated: bool, compute: Any) -> train.Training:
    """Gates on every unit, or none."""
    structure = models.structure(model)
    how: dict[str, Any] = {"structure": structure.only()}
    if gated:
        how = {
            "structure": structure,
            "gate": gates.HardConcrete(),
            "target": train.Target(costs.macs, 0.5),
        }
    sgd = optax.sgd(0.01, momentum=0.9, nesterov=True)
    return train.Training(model, loss, optimizer=sgd, compute=compute, **how)


def steps(sizes: Sizes) -> Iterator[Measurement]:
    """Every network, plain and gated, in both dtypes."""
    for name, batch in sizes.networks:
        for dtype, compute in DTYPES.items():
            for gated in (False, True):

                def measured(
                    _: float,
                    name: str = name,
                    batch: int = batch,
                    compute: Any = compute,
                    gated: bool = gated,
                ) -> Line:
                    model, shape, classes = network(name)
                    macs = costs.exact(models.structure(model), cost=costs.macs)
                    training = training_of(model, gated, compute)
                    data = examples(shape, classes, batch)
                    order = np.tile(np.arange(batch), (sizes.steps, 1))
                    kept = [training.start(jax.random.key(0))]

                    def go() -> Any:
                        kept[0], totals = training.epoch(kept[0], data, order)
                        return totals

                    seconds, first = seconds_of(go)
                    rate = batch * sizes.steps / seconds
                    # Forward, and backward twice as much.
                    return {
                        "batch": batch,
                        "milliseconds a step": 1e3 * seconds / sizes.steps,
                        "examples a second": rate,
                        "operations a second": 6 * macs * rate,
                        "seconds with compilation": first,
                    }

                kind = "gated" if gated else "plain"
                yield f"step of {name}, {kind}, {dtype}", measured


# ------------------------------------------------------------------------------ sweeps


def sweeps(sizes: Sizes) -> Iterator[Measurement]:
    """Many MLPs with gates in one program."""
    for members in sizes.members:

        def measured(_: float, members: int = members) -> Line:
            model, shape, classes = network("mlp")
            training = train.Training(
                model,
                loss,
                structure=models.structure(model),
                gate=gates.HardConcrete(),
                price=1e-5,
                optimizer=optax.adam(1e-3),
            )
            batch = 128
            data = examples(shape, classes, batch)
            prices = jnp.geomspace(1e-6, 1e-4, members)
            sweep = train.Sweep(lambda price: training.replace(price=price), prices)
            kept = [sweep.start([*map(jax.random.key, range(members))])]
            order = np.tile(np.arange(batch), (members, sizes.steps, 1))

            def go() -> Any:
                kept[0], totals = sweep.epoch(kept[0], data, order)
                return totals

            seconds, first = seconds_of(go)
            return {
                "members": members,
                "milliseconds a step": 1e3 * seconds / sizes.steps,
                "members' steps a second": members * sizes.steps / seconds,
                "seconds with compilation": first,
            }

        yield f"sweep of {members} MLPs", measured


# ------------------------------------------------------------------------------ widths


def widths(sizes: Sizes) -> Iterator[Measurement]:
    """A network whole, and without about half of the channels that one layer reads."""
    name, batch = sizes.narrowed

    def called(rounded: int | None) -> Line:
        model, shape, _ = network(name)
        if rounded is not None:
            model = halved(model, rounded)
        graph, state = nnx.split(model)
        state = jax.tree.map(lambda a: a.astype(jnp.bfloat16), state)
        call = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
        images = jnp.ones((batch, *shape), jnp.bfloat16)
        seconds, first = seconds_of(lambda: call(state, images))
        macs = costs.exact(models.structure(model), cost=costs.macs)
        return {
            "batch": batch,
            "milliseconds": 1e3 * seconds,
            "macs": macs,
            "operations a second": 2 * macs * batch / seconds,
            "seconds with compilation": first,
        }

    yield f"call of {name}, bfloat16, whole", lambda _: called(None)
    for rounded in sizes.rounded:
        of = "as they come" if rounded == 1 else f"multiples of {rounded}"
        yield f"call of {name}, bfloat16, half, {of}", lambda _, r=rounded: called(r)


def halved(model: Any, rounded: int) -> Any:
    """Without the last channels of each group that a single layer reads. Shares are
    drawn around a half, as gates would leave them."""
    structure = models.structure(model)
    rng = np.random.default_rng(0)
    keep = {}
    for name, group in structure.groups.items():
        share = rng.uniform(0.4, 0.6)
        if name in structure.inputs or len(group.used_by) > 1:
            continue
        count = -(-max(round(share * group.size), 1) // rounded) * rounded
        keep[name] = np.arange(group.size) < min(count, group.size)
    return l0jax.nnx.shrink(model, keep, structure)


# ---------------------------------------------------------------------------- training


def training(sizes: Sizes) -> Iterator[Measurement]:
    """A network from new weights, and then with gates, in the time that is left."""
    name, dataset, width = sizes.trained

    def measured(left: float) -> Line:
        found = data.load(dataset, 0.1)
        images = images_of(found, sizes.examples)
        model = channel_run.network(name, width, found, jax.random.key(0))
        seconds = seconds_an_epoch(model, images)
        epochs = min(int((1 - FOR_THE_REST) * left / seconds), sizes.epochs)
        after = epochs // 3
        if after < 2:
            raise NoTime(
                f"an epoch takes {seconds:.1f} s, and {left:.0f} s are left, which is "
                "too little for six"
            )
        recipe = Recipe(epochs=epochs - after, weight_decay=5e-4, cycle=0.2)
        tune = Recipe(learning_rate=0.05, weight_decay=5e-4, cycle=0.2)
        config = channel_settings.Config(
            method=("l0_hard_concrete",),
            dataset=dataset,
            model=name,
            width=width,
            left=0.5,
            after=after,
            examples=sizes.examples,
            base=recipe,
            gate=dataclasses.replace(tune, epochs=after // 2),
            tune=tune,
            out=RUNS / f"{dataset}-{name}-{epochs}",
        )
        (line,) = channel_pruning.main(config)["results"]
        whole, small = line["macs"]
        return {
            "epochs": epochs,
            "seconds an epoch": seconds,
            "base test error": line["metrics"]["base test error"],
            "test error": line["metrics"]["test error"],
            "macs left": small / whole,
        }

    yield f"{name} on {dataset}, half of its MACs by gates", measured


class NoTime(ValueError):
    """There is not enough left for a measurement."""


def seconds_an_epoch(model: Any, images: Images) -> float:
    """Of training, by some steps."""
    trainer = Trainer(model, images, Recipe(), jax.random.key(0))
    batch = [each[: trainer.recipe.batch_size] for each in trainer.data]
    kept = [trainer.state]

    def go() -> Any:
        for _ in range(3):
            kept[0], metrics = trainer.training.step(kept[0], tuple(batch))
        return metrics

    seconds, _ = seconds_of(go)
    return seconds / 3 * (len(images.labels) // trainer.recipe.batch_size)


PARTS = {
    "device": device,
    "steps": steps,
    "sweeps": sweeps,
    "widths": widths,
    "training": training,
}


def run(
    file: Path, sizes: Sizes, parts: tuple[str, ...], minutes: float, show: bool = True
) -> list[Line]:
    """Measures what is missing in the file, while there is time; all that is there of
    this device at these sizes, the newest of each.

    Args:
        file: of the lines, also of other devices and sizes.
        sizes: of the list.
        parts: of `PARTS`, in the order in which they are measured.
        minutes: after which no measurement begins.
        show: whether there is a progress bar.
    """
    begun = time.monotonic()
    of = jax.devices()[0]
    machine: Line = {
        **{"device": of.device_kind, "platform": of.platform, "jax": jax.__version__},
        # (As JSON has them, to be compared with what was stored.)
        "sizes": run_folder.settings_of(sizes),
    }
    there = {line["what"] for line in of_machine(file, machine) if "error" not in line}
    wanted = [(p, *each) for p in parts for each in PARTS[p](sizes)]
    missing = [(p, what, go) for p, what, go in wanted if what not in there]
    for part, what, go in (bar := tqdm(missing, disable=not show)):
        bar.set_postfix_str(what)
        left = 60 * minutes - (time.monotonic() - begun)
        if left < 0:
            print(f"{minutes:g} minutes are over: {what} and what follows are left")
            break
        line: Line = {"part": part, "what": what, **machine}
        try:
            line |= go(left)
        except (jax.errors.JaxRuntimeError, data.DataError, NoTime) as error:
            # Too large for this device, most likely: that is what was found.
            line["error"] = str(error).splitlines()[0][:200]
        json_lines.add(file, line)
    newest = {line["what"]: line for line in of_machine(file, machine)}
    return [newest[what] for _, what, _ in wanted if what in newest]


def of_machine(file: Path, machine: Line) -> list[Line]:
    """The lines of this device, at these sizes."""
    return [
        line
        for line in json_lines.read(file)
        if machine == {n: line.get(n) for n in machine}
    ]


NUMBERS = {
    "device": ("operations a second", 1e-12, " T operations/s"),
    "steps": ("examples a second", 1.0, " examples/s"),
    "sweeps": ("members' steps a second", 1.0, " members' steps/s"),
    "widths": ("milliseconds", 1.0, " ms"),
    "training": ("test error", 1.0, " % of the test images wrong"),
}
"""The number of each part that its line in a table begins with."""
IN_DETAIL = (
    *("milliseconds a step", "batch", "macs", "seconds with compilation"),
    *("base test error", "macs left", "epochs", "seconds an epoch"),
)


def entries(lines: list[Line]) -> list[dict]:
    """As other benchmarks are recorded."""
    most = [
        line["operations a second"]
        for line in lines
        if line["what"] == "product in bfloat16" and "error" not in line
    ]
    found = []
    for line in lines:
        what = f"{line['what']}, on {line['device']}"
        if "error" in line:
            found.append(entry(what, float("nan"), None, "", line["error"]))
            continue
        name, factor, unit = NUMBERS[line["part"]]
        detail = [f"{n} {line[n]:,.4g}" for n in IN_DETAIL if n in line]
        if most and line["part"] in ("steps", "widths"):
            share = line["operations a second"] / most[0]
            detail.append(f"{share:.1%} of the product in bfloat16")
        found.append(entry(what, factor * line[name], None, unit, ", ".join(detail)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs") / "gpu.jsonl")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--small", action="store_true", help="for any machine")
    parser.add_argument("--record", action="store_true", help="write it down")
    arguments = parser.parse_args()
    sizes = SMALL if arguments.small else Sizes()
    if arguments.record and (
        arguments.small or jax.default_backend() not in ("gpu", "tpu")
    ):
        raise SystemExit("only full sizes on a GPU or TPU are recorded")
    lines = run(arguments.out, sizes, tuple(arguments.only), arguments.minutes)
    found = entries(lines)
    for e in found:
        print(f"{e['what']}: {e['value']}; {e['detail']}")
    if arguments.record:
        json_lines.write(RESULTS / "gpu.jsonl", found)


if __name__ == "__main__":
    main()
