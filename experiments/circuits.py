r"""Circuits of transformers whose graph is known: gates on the edges between parts.

    python -m experiments.circuits
    python -m experiments.circuits --seeds 0 1 2 --record

A transformer that was compiled from a program stays as it is; what is learned is which
of the edges between its embeddings, heads, MLPs and output may go (Bhaskar et al.,
"Finding Transformer Circuits with Edge Pruning", NeurIPS 2024, who recover both of
these programs). Each edge is the unit of a hard concrete gate, which is drawn for each
example and paid for; the loss is how far the outputs are from those of the whole
transformer: the Kullback-Leibler divergence where the largest output counts, else the
squared error. What is left is compared with the known graph, the edges that
`compiled.Program.needed` names. Each search becomes a line of `runs.jsonl`, with
`--record` of that in `experiments/results/circuits` too, where the pictures of the
first seed go.

Both graphs are found exactly, in 4 to 10 s each on two cores, by each of the seeds 0 to
2 at the prices 0.001, 0.01 and 0.03. At 0.1 edges that are needed go too: to be wrong
is cheaper.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Bool

from experiments.harness import results, run_folder
from experiments.harness.loop import Diverged, Run
from experiments.reports import places
from experiments.reports.circuit_graphs import graph
from experiments.reports.printing import interval, markdown
from experiments.tasks import compiled
from experiments.tasks.compiled import EDGES, Program
from l0jax import gates, trace, train

RESULTS = places.RESULTS / "circuits"
ORDER = {"task": compiled.NAMES, "seed": ()}


@dataclasses.dataclass(frozen=True)
class Config:
    """Find the circuits of compiled programs."""

    programs: tuple[str, ...] = compiled.NAMES
    """which of them"""
    seeds: tuple[int, ...] = (0,)
    """of the gates, their noise and the order of the examples"""
    price: float = 1e-2
    """of each edge that is expected to be there"""
    keep_prob: float = 0.9
    """of each edge at the beginning"""
    gate_learning_rate: float = 5e-2
    """of Adam, for the gates"""
    epochs: int = 150
    """passes over all inputs that the program has"""
    batch_size: int = 120
    """inputs of a step"""
    out: Path = Path("runs") / "circuits"
    """folder of the results and pictures"""
    record: bool = False
    """put results into `experiments/results`, in the place of older ones and of what
    other settings gave"""
    progress: bool = True
    """show a progress bar"""


UNTOLD = ("programs", "seeds", "out", "record", "progress")


def main(config: Config) -> list[dict[str, Any]]:
    """All circuits of all seeds."""
    check(config)
    told = run_folder.settings_of(config, UNTOLD)
    folders = (config.out, *([RESULTS] if config.record else []))
    lines = []
    for name in config.programs:
        program = compiled.load(name)
        for seed in config.seeds:
            begun = time.perf_counter()
            kept = search(config, program, seed)
            seconds = time.perf_counter() - begun
            line = {"study": "circuits", "task": name, "method": "gates on edges"}
            line |= {"seed": seed, "settings": told, "seconds": round(seconds, 1)}
            lines.append(line | compared(program, kept))
            draw(config, program, kept, seed)
            for folder in folders:
                results.put(folder, lines[-1:], ORDER, alike=True)
    return lines


def check(config: Config) -> None:
    """Raises ValueError for what can't be run."""
    for name in config.programs:
        if name not in compiled.NAMES:
            raise ValueError(
                f"unknown program {name!r}; there is {', '.join(compiled.NAMES)}"
            )
    if not config.programs or not config.seeds:
        raise ValueError("give at least one program and one seed")
    for name in ("epochs", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


# ---------------------------------------------------------------------- the search


def search(config: Config, program: Program, seed: int) -> Bool[np.ndarray, " edges"]:
    """Which edges are left."""
    data = program.examples, program.outputs, np.float32(program.counted)
    run = Run(
        training_of(config, program),
        jax.random.key(seed),
        data,
        epochs=config.epochs,
        batch_size=config.batch_size,
        name=f"{program.name}, seed {seed}",
        show=config.progress,
    )
    for _ in run:
        run.say(f"loss {run.means['loss']:.3f}")
    return run.training.decide(run.state).z[EDGES] != 0


def training_of(config: Config, program: Program) -> train.Training:
    """Gates on all edges of a program; its weights stay."""
    params = program.params
    units = trace(program.apply, params, program.examples).only().add(program.group)
    # One draw for a whole batch would tell much less about so few gates.
    gate = train.Learned(
        gates.HardConcrete(), keep_prob=config.keep_prob, per_example=True
    )
    return train.Training(
        train.function(program.apply, params),
        loss_of(program),
        structure=units,
        gate=gate,
        price=config.price,
        optimizer=optax.set_to_zero(),
        gate_optimizer=optax.adam(config.gate_learning_rate),
    )


def loss_of(program: Program):
    """How far outputs are from those of the whole transformer, where they count."""

    def loss(model, batch):
        tokens, whole, counted = batch
        outputs = model(tokens)
        if program.categorical:
            apart = optax.losses.kl_divergence(
                jax.nn.log_softmax(outputs), jax.nn.softmax(whole)
            )
        else:
            apart = jnp.square(outputs - whole).sum(axis=-1)
        return (apart * counted).sum() / counted.sum(), {}

    return loss


# ---------------------------------------------------------------------- the report


def compared(program: Program, kept: Bool[np.ndarray, " edges"]) -> dict[str, Any]:
    """A circuit beside the known graph, and whether it does what the program does."""

    def named(flags: Bool[np.ndarray, " edges"]) -> list[str]:
        return [str(program.edges[at]) for at in np.flatnonzero(flags)]

    needed = program.needed
    return {
        "metrics": {},
        "costs": {"edges": float(kept.mean())},
        "edges": len(program.edges),
        "needed": named(needed),
        "found": named(kept),
        "missing": named(needed & ~kept),
        "superfluous": named(kept & ~needed),
        "same outputs": bool(program.same(kept[None])[0]),
    }


def draw(config: Config, program: Program, kept, seed: int) -> None:
    """Writes the picture of a circuit."""
    edges = [program.edges[at] for at in np.flatnonzero(kept)]
    files = [config.out / f"{program.name}-{seed}.png"]
    if config.record and seed == config.seeds[0]:
        files.append(RESULTS / f"{program.name}.png")
    for place in files:
        place.parent.mkdir(parents=True, exist_ok=True)
        title = f"{program.name}: {len(edges)} of {len(program.edges)} edges"
        graph(program, edges, title).savefig(place, dpi=100)


def table(lines: Sequence[results.Line]) -> str:
    """A line for each program: means with 95 % intervals over seeds."""
    rows = []
    for name, its in results.by(lines, "task").items():
        lists = ("found", "missing", "superfluous")
        rows.append(
            [
                name,
                str(its[0]["edges"]),
                str(len(its[0]["needed"])),
                *(interval(len(line[which]) for line in its) for which in lists),
                f"{sum(line['same outputs'] for line in its)} of {len(its)}",
                interval((line["seconds"] for line in its), 1),
                str(len(its)),
            ]
        )
    header = ["program", "edges", "needed", "found", "missing", "superfluous"]
    return markdown([*header, "same outputs", "seconds", "seeds"], rows)


def wrong(lines: Sequence[results.Line]) -> str:
    """Every edge that was missed or is superfluous."""
    return "\n".join(
        f"{line['task']}, seed {line['seed']}: {edge} is {which}"
        for line in lines
        for which in ("missing", "superfluous")
        for edge in line[which]
    )


def cli() -> None:
    config = tyro.cli(Annotated[Config, tyro.conf.arg(name="")], description=__doc__)
    try:
        lines = main(config)
    except (ValueError, Diverged, OSError) as error:
        raise SystemExit(f"experiments.circuits: {error}") from None
    for text in (table(lines), wrong(lines), f"pictures in {config.out}"):
        if text:
            print(text)


if __name__ == "__main__":
    cli()
