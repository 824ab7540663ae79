"""L0 regularisation with hard-concrete gates on MNIST (Louizos et al., ICLR 2018).

    python -m experiments.mnist                        # 8x8 digits, no network needed
    python -m experiments.mnist --dataset mnist --model lenet5 --epochs 100
    python -m experiments.mnist --preset louizos2018-lenet5   # settings of a paper

Trains the 784-300-100 MLP or LeNet-5-Caffe with a gate on every unit or every weight,
shows it happening, and leaves a folder with the configuration, a line of metrics per
epoch, TensorBoard events, checkpoints, pictures, and the shrunk network.

On two cores the digits take half a minute; an epoch of MNIST takes a second with the
MLP and 13 with LeNet-5. The settings behind RESULTS.md: experiments/mnist_rows.py.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import l0jax.nnx
from experiments.harness import command_line, devices, results, run_folder
from experiments.harness.loop import Diverged, Run
from experiments.mnist_evaluation import (
    EVALUATION_BATCH,
    Seen,
    counter,
    sizes_of,
    to_floats,
    undecided,
    unit_activity,
)
from experiments.mnist_settings import Config, check, rule_of, scientific, targets
from experiments.mnist_training import latency_table, network, training_of
from experiments.published_settings import MNIST
from experiments.tasks import data
from l0jax import costs, models, storage
from l0jax.compaction import removable
from l0jax.train import Training


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment; the folder, and the line that `runs.jsonl` in it holds."""
    begun = time.time()
    devices.begin(config)
    gate = check(config)
    dataset = data.load(config.dataset, config.validation)
    key = jax.random.key(config.seed)
    model = network(config, dataset, key)
    folder = config.out or run_folder.default(
        f"{config.dataset}-{config.model}", scientific(config)
    )
    results.read(folder)  # Raises if a run of an older version has ended there.
    table, latency = None, None
    if config.target_latency is not None:
        shape = dataset.train.images.shape[1:]
        table = run_folder.latency(folder) or latency_table(config, model, shape)
        latency = costs.interpolated([table])
    whole = training_of(config, gate, dataset, model, latency)
    run = run_of(config, whole, dataset, folder / "checkpoints")
    # Nothing is refused from here on: a refused run leaves no folder.
    run_folder.prepare(
        folder,
        scientific(config),
        run_folder.settings_of(config) | scientific(config),
        config.resume,
    )
    if table is not None:
        run_folder.keep_latency(folder, table)
    if config.resume:
        run.restore()
    counted = counter(whole.structure)
    dense = to_floats(counted({}))
    log = run_folder.Log(folder)
    log.keep_until(run.epoch)
    if not run.epoch:
        seen = run.training.decide(run.state, config.test_rule)
        log.activity(0, unit_activity(whole, seen.prob_active))

    for epoch in run:
        now = Seen.of(run.training, run.state, rule_of(config))
        row = {**row_of(run, now, dataset, counted), "dense": dense}
        best = run.notes.get("best")
        better = best is None or row["validation_error"] < best["validation_error"]
        if better or epoch == config.epochs:
            row["test_error"] = now.error(dataset.test)
        if better:
            run.notes["best"] = result_of(row)
        log.activity(epoch, unit_activity(whole, now.full(now.decision.prob_active)))
        if config.compact and epoch < config.epochs:
            run.training, run.state = run.training.compact(
                run.state, run.examples_to_come
            )
        log.row(row)
        run.say(progress_line(row))
    log.close()
    training, state = devices.alone(run.training, run.state)
    now = Seen.of(training, state, rule_of(config))
    if run.epoch < config.epochs:
        return {"stopped_after": run.epoch, "folder": str(folder)}
    if not devices.is_first():
        if wants_dense(config):
            dense_network(config, dataset, model, folder)
        return {"folder": str(folder)}

    row = log.rows()[-1]
    small, dead = smaller(now)
    storage.save(small, folder / "shrunk")
    images = jnp.asarray(dataset.test.images[:EVALUATION_BATCH], jnp.float32)
    images = images / dataset.scale
    log.gates(now.full(now.decision.prob_active), now.full(now.decision.z))
    budget, whole_weights = row.get("budget", {}), round(dense["weights"])
    line = {
        "study": "mnist",
        "task": f"{config.dataset} {config.model}",
        "method": config.gate,
        "seed": config.seed,
        "settings": scientific(config),
        "metrics": {
            "test error": row["test_error"],
            "validation error": row["validation_error"],
        },
        "costs": {
            "weights": row["weights"] / whole_weights,
            **{f"{name} expected": its["expected"] for name, its in budget.items()},
            **{f"{name} decided": its["decided"] for name, its in budget.items()},
        },
        "test_rule": rule_of(config),
        "shape": list(dataset.train.images.shape[1:]),
        "last": result_of(row),
        "best_on_validation": run.notes["best"],
        "dense_weights": whole_weights,
        "gated_weights": float(sum(map(np.sum, sizes_of(whole).values()))),
        "shrunk": {
            "architecture": small.architecture,
            "parameters": sum(
                a.size for a in jax.tree.leaves(nnx.state(small, nnx.Param))
            ),
            "max_relative_difference": disagreement(
                compiled_call(now.model), compiled_call(small), images
            ),
        },
        "dead": dead,
        "first_step_at": run.first_step_at,
        "seconds_to_first_step": run.first_step_at and run.first_step_at - begun,
        "seconds": sum(r["seconds"] for r in log.rows()),
        **({"excess": row["excess"], "budget": budget} if whole.target else {}),
        "dense": None,
        "wall_seconds": time.time() - begun,
    }
    # First without what it is compared with, lest that should fail.
    results.put(folder, [line])
    if wants_dense(config):
        line["dense"] = dense_network(config, dataset, model, folder)
        line["wall_seconds"] = time.time() - begun
        results.put(folder, [line])
    return {"folder": str(folder), **results.read(folder)[-1]}


def run_of(
    config: Config, training: Training, dataset: data.Dataset, folder: Path
) -> Run:
    """The run of a training."""
    return Run(
        training,
        jax.random.key(config.seed),
        (dataset.train.images, dataset.train.labels),
        on=config,
        epochs=config.epochs,
        batch_size=config.batch_size,
        folder=folder,
        every=config.checkpoint_every,
        until=config.stop_after,
        show=config.progress,
    )


def row_of(
    run: Run, now: Seen, dataset: data.Dataset, counted: Callable[..., Any]
) -> dict[str, Any]:
    """What is logged of an epoch."""
    active = now.decision.prob_active
    decided = to_floats(counted(now.decided()))
    sizes = sizes_of(run.training)
    row: dict[str, Any] = {
        "epoch": run.epoch,
        "step": int(run.state.step),
        "seconds": run.seconds,
        "steps_per_second": run.steps_per_epoch / run.seconds,
        "loss": run.means["loss"],
        "penalty": run.means["penalty"],
        "train_error": 100 * run.means["error"],
        "validation_error": now.error(dataset.validation),
        "expected_l0": float(sum((sizes[n] * p).sum() for n, p in active.items())),
        "architecture": {name: int(flags.sum()) for name, flags in now.keep.items()},
        "trained": {
            name: int(run.training.alive[name].sum())
            for name in removable(run.training.structure.groups)
        },
        "weights": round(decided["weights"]),
        "expected": to_floats(counted(now.full(active))),
        "decided": decided,
        "undecided": undecided(now.full(active)),
    }
    if run.training.target is not None:
        found = now.decision
        row["excess"] = {
            name: found.expected[name] / share - 1
            for name, share in found.target.items()
        }
        row["budget"] = {
            name: {
                "target": share,
                "expected": found.expected[name],
                "decided": found.decided[name],
                "excess": found.excess[name],
            }
            for name, share in found.target.items()
        }
        row["multipliers"] = {
            name: run.means[f"multiplier of {name}"]
            for name in found.target
            if f"multiplier of {name}" in run.means
        }
    return row


def result_of(row: dict[str, Any]) -> dict[str, Any]:
    """What is reported of one epoch."""
    names = ("epoch", "validation_error", "architecture", "weights", "expected_l0")
    names += ("test_error", "decided", "expected")
    return {name: row[name] for name in names}


# ------------------------------------------------------------------ what is left


def smaller(now: Seen) -> tuple[models.Model, list[str]]:
    """The network without what its gates have closed, and the groups that have lost all
    their units. Of these one stays, since the architecture of a stored network has no
    empty layer; its gate is closed, so that it contributes nothing."""
    keep = {name: flags.copy() for name, flags in now.keep.items()}
    dead = [name for name, flags in keep.items() if not flags.any()]
    for name in dead:
        keep[name][0] = True
    return l0jax.nnx.shrink(now.model, keep, now.training.structure.groups), dead


def compiled_call(network: nnx.Module) -> Callable[[jax.Array], jax.Array]:
    """The network as one compiled function of its inputs."""
    graph, state = nnx.split(network)
    call = jax.jit(lambda state, inputs: nnx.merge(graph, state)(inputs))
    return functools.partial(call, state)


def disagreement(a, b, inputs) -> float:
    """max |a - b| / max |a| of the outputs of two networks."""
    first, second = np.asarray(a(inputs)), np.asarray(b(inputs))
    return float(np.abs(first - second).max() / max(np.abs(first).max(), 1e-30))


def wants_dense(config: Config) -> bool:
    """Whether the network is also trained without gates."""
    return config.dense == "yes" or (
        config.dense == "auto" and config.dataset == "digits"
    )


def dense_network(
    config: Config, dataset: data.Dataset, model: models.Model, folder: Path
) -> dict[str, float]:
    """The errors of the same network, trained alike but without gates."""
    none: dict[str, Any] = dict.fromkeys((*targets(config), "test_rule"))
    bare = dataclasses.replace(config, gates="none", stop_after=None, **none)
    training = training_of(bare, check(bare), dataset, model)
    run = run_of(bare, training, dataset, folder / "dense")
    run.restore()
    for _ in run:
        run.say(f"without gates: loss {run.means['loss']:.4f}")
    now = Seen.of(run.training, run.state, rule_of(bare))
    return {
        "validation_error": now.error(dataset.validation),
        "test_error": now.error(dataset.test),
    }


# --------------------------------------------------------------------- what is shown


def progress_line(row: dict) -> str:
    widths = "-".join(str(n) for n in row["architecture"].values())
    dead = " DEAD" if 0 in row["architecture"].values() else ""
    budget = "".join(
        f", {name} {100 * its['expected']:.1f} % expected, {100 * its['decided']:.1f} %"
        f" decided of {100 * its['target']:.1f} %"
        for name, its in row.get("budget", {}).items()
    )
    return (
        f"loss {row['loss']:.4f}, val {row['validation_error']:.2f} %, "
        f"L0 {row['expected_l0']:,.0f}, {widths}{dead}{budget}, "
        f"{row['steps_per_second']:.0f} steps/s"
    )


def table(summary: dict) -> str:
    """The closing table: the network by its last and by its best validation epoch."""
    dense = summary["dense_weights"]
    lines = [
        f"{'':22} {'test error':>10} {'validation':>10} {'weights':>9} {'of dense':>9}"
        f" {'MACs':>11}  architecture",
    ]
    for title, name in (
        ("last epoch", "last"),
        ("best on validation", "best_on_validation"),
    ):
        result = summary[name]
        widths = "-".join(str(n) for n in result["architecture"].values())
        lines.append(
            f"{title:18} {result['epoch']:>3} {result['test_error']:>9.2f}%"
            f" {result['validation_error']:>9.2f}% {result['weights']:>9,}"
            f" {100 * result['weights'] / dense:>8.1f}%"
            f" {result['decided']['macs']:>11,.0f}  {widths}"
        )
    bare = summary["dense"]
    if bare is not None:
        lines.append(
            f"{'without gates':22} {bare['test_error']:>9.2f}%"
            f" {bare['validation_error']:>9.2f}% {dense:>9,} {100:>8.1f}%"
        )
    shrunk = summary["shrunk"]
    lines += ["", *budget_lines(summary.get("budget", {}))]
    lines += [
        f"gates at test time by the rule {summary['test_rule']!r}; "
        f"the dense network has {dense:,} weights",
        f"shrunk network: {shrunk['parameters']:,} parameters, its logits within "
        f"{shrunk['max_relative_difference']:.1e} of the gated network's",
        f"first step {summary['seconds_to_first_step'] or 0:.1f} s after the start, "
        f"{summary['wall_seconds']:.0f} s in all",
        f"written to {summary['folder']}",
    ]
    for name in summary["dead"]:
        lines.append(
            f"DEAD: group {name!r} has lost all its units, so that the output no "
            "longer depends on the input; λ is too large"
        )
    return "\n".join(lines)


def budget_lines(budget: dict[str, dict[str, float]]) -> list[str]:
    """Of each target what was asked for, what was trained, and what is left."""
    return [
        f"{name}: target {100 * its['target']:.2f} %, expected in training "
        f"{100 * its['expected']:.2f} %, decided {100 * its['decided']:.2f} % "
        f"({100 * its['excess']:+.1f} % of the target)"
        for name, its in budget.items()
    ]


def cli() -> None:
    config = command_line.parse(Config, __doc__, presets=MNIST)
    try:
        summary = main(config)
    except (ValueError, Diverged, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.mnist: {error}") from None
    if not devices.is_first():
        return
    if "stopped_after" in summary:
        print(f"stopped after epoch {summary['stopped_after']}; go on with --resume")
        return
    # Imported at the end, when its second no longer delays the first step.
    from experiments import figures

    print(table(summary))
    for picture in figures.draw(Path(summary["folder"])):
        print(f"picture {picture}")


if __name__ == "__main__":
    cli()
