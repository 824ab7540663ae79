"""L0 regularisation with hard-concrete gates on MNIST (Louizos et al., ICLR 2018).

    python -m experiments.mnist                        # 8x8 digits, no network needed
    python -m experiments.mnist --dataset mnist --model lenet5 --epochs 100

Trains the 784-300-100 MLP or LeNet-5-Caffe with a gate on every unit or every weight,
shows it happening, and leaves a folder with the configuration, a line of metrics per
epoch, TensorBoard events, checkpoints, pictures, and the shrunk network.

On two cores the digits take half a minute; an epoch of MNIST takes a second with the
MLP and 13 with LeNet-5. The settings behind RESULTS.md: experiments/mnist_rows.py.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from tqdm import tqdm

import l0jax.nnx
from experiments.harness import progress, run_folder
from experiments.tasks import data
from l0jax import (
    compaction,
    constraints,
    costs,
    estimators,
    gates,
    gating,
    measure_latency,
    models,
    objectives,
    storage,
    train,
    units,
)
from l0jax.structure import Structure

# Fields that say where and how far to run, not what is run.
HOUSEKEEPING = ("out", "resume", "stop_after", "checkpoint_every", "progress")
EVALUATION_BATCH = 2500


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a network whose units or weights are gated, and shrink it."""

    dataset: str = "digits"
    """digits (bundled, 8x8), mnist, fashion_mnist or kmnist (by TensorFlow Datasets)"""
    model: str = "mlp"
    """mlp (300-100) or lenet5 (20-50-800-500)"""
    gates: Literal["group", "weight", "none"] = "group"
    """one per unit (inputs of dense layers, feature maps), one per weight, or none"""
    gate: str = "hard_concrete"
    """the gate family, one of `l0jax.gates.GATES`"""
    estimator: str | None = None
    """of the gradients of bernoulli gates, one of `l0jax.estimators.ESTIMATORS`; None
    is straight through"""
    pair: str | None = None
    """of a mixture: exponential, exponential_uniform, power (the default), kumaraswamy,
    beta, half_normal, gaussian, logistic or laplace"""

    lam: tuple[float, ...] = (0.1,)
    """c in λ = c/N, the cost of one expected weight: one number, or one per layer; not
    used with a target"""
    target_density: tuple[float, ...] | None = None
    """share of the gated weights that may be left in expectation: one number, or one
    per layer; this and the other targets replace λ by a constraint"""
    target_params: float | None = None
    """share of the parameters that may be left"""
    target_macs: float | None = None
    """share of the multiply-accumulates that may be left"""
    target_bytes: float | None = None
    """share of the bytes of all arrays that may be left"""
    target_latency: float | None = None
    """share of the seconds of a call that may be left; measured before training, of
    networks of a few sizes"""
    constraint: str = "quadratic"
    """how a target is enforced: quadratic ends at it, lagrangian and exponential end
    below"""
    multiplier_rate: float = 5e-3
    """of gradient ascent, for the constraint's multipliers"""
    target_warm_up: float = 0.5
    """share of the run over which the target falls from 1"""
    weight_decay: float = 1e-4
    """coefficient of ½‖θ‖²; a unit's norm counts by the probability that it is there"""

    beta: float | None = None
    """temperature of the gates, of a mixture the scale of its pair; None is the
    family's own, 2/3 for hard concrete gates"""
    beta_end: float | None = None
    """temperature that β is annealed to, geometrically over the run; None keeps β"""
    beta_range: tuple[float, float] | None = None
    """lowest and highest temperature, if it is trained from β on with the gates"""
    gamma: float = -0.1
    """lower end of the stretch, below 0"""
    zeta: float = 1.1
    """upper end of the stretch, above 1"""
    keep_prob: tuple[float, ...] | None = None
    """initial, one or one per layer; None: 0.8 for the MLP's inputs, 0.5 elsewhere"""
    per_example: bool = False
    """draw gates for each example, not once per batch, at many times the cost"""

    epochs: int = 400
    """passes over the training set"""
    batch_size: int = 100
    """examples per step"""
    learning_rate: float = 1e-3
    """of Adam, for the weights"""
    gate_learning_rate: float | None = 5e-3
    """of Adam, for the gates; None is that of the weights, as in the paper"""
    decay_from: float = 0.75
    """share of the run after which learning rates fall to 0, gates stop closing"""
    polyak: float = 0.999
    """decay of the running average of weights and gates that is evaluated; 0: none"""

    compact: bool = True
    """take units out of the running training once they are dead for good"""
    compact_below: float = 0.1
    """P(z ≠ 0) below which a unit that is closed at test time counts as dead"""
    compact_after: int = 3
    """epochs in a row that a unit must have been dead"""
    compact_gain: float = 3e11
    """multiply-accumulates of the rest of the run that a compilation must save"""

    test_rule: str = "paper"
    """paper (of the gate family), threshold, expected_count, or a rule of the family's;
    mean and samples (their average) remove nothing"""
    samples: int = 100
    """draws that the test rule `samples` averages"""
    validation: float = 1 / 12
    """share of the training set held out for every choice (5,000 of MNIST's 60,000)"""
    seed: int = 0
    """of the initial values, the gates' noise and the order of the examples"""

    out: Path | None = None
    """run folder; None is runs/<dataset>-<model>-<digest of the configuration>"""
    resume: bool = False
    """go on from the newest checkpoint of the run folder"""
    stop_after: int | None = None
    """stop after this epoch, as if killed; go on later with --resume"""
    checkpoint_every: int = 10
    """epochs between checkpoints"""
    progress: bool = True
    """show a progress bar"""


class Diverged(FloatingPointError):
    """The loss stopped being finite."""


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment; returns what `summary.json` in the run folder holds."""
    begun = time.time()
    gate = check(config)
    dataset = data.load(config.dataset, config.validation)

    # ---------------------------------------------- the network and what trains it
    root = jax.random.key(config.seed)
    shape = dataset.train.images.shape[1:]
    whole = network(
        config,
        models.make(
            config.model,
            architecture(config.model, shape, dataset.classes),
            rngs=nnx.Rngs(gating.key_for(root, "params")),
        ),
    )
    examples = len(dataset.train.labels)
    if examples < config.batch_size:
        raise ValueError(
            f"batch_size is {config.batch_size}, more than the {examples} training "
            f"examples of {config.dataset}"
        )
    steps_per_epoch = examples // config.batch_size
    steps = steps_per_epoch * config.epochs
    optimizer = optimizer_of(config, steps)
    keep_prob = per_layer(
        "keep_prob", keep_probabilities(config, whole.gated), whole.gated
    )
    logits = gating.init(gating.key_for(root, "gates"), gate, whole.gated, keep_prob)
    folder = config.out or run_folder.default(
        f"{config.dataset}-{config.model}", scientific(config)
    )
    table = None
    if config.target_latency is not None:
        table = run_folder.latency(folder) or latency_table(whole, shape)
        whole = whole._replace(latency=costs.interpolated([table]))
    params = nnx.to_pure_dict(nnx.state(whole.model, nnx.Param))
    theta: train.Theta = {"params": params, "gates": logits}
    if config.beta_range is not None:
        theta["log_temperature"] = jnp.log(jnp.float32(gate.temperature))
    constraint = constraint_of(config, whole, whole, steps)
    initial = train.init(theta, optimizer, constraint)
    now, state = whole, initial
    compiled = compile_for(config, gate, now, whole, dataset, optimizer)
    # What is counted in full is counted of the whole network, however small it gets.
    count = compiled.count
    dense = to_floats(jax.device_get(count({})))

    # ---------------------------------------------------- run folder and resume
    checkpoints = storage.Checkpoints(folder / "checkpoints")
    run_folder.prepare(
        folder, scientific(config), run_folder.settings_of(config), config.resume
    )
    if table is not None:
        run_folder.keep_latency(folder, table)
    log = run_folder.Log(folder)
    first, best = 1, None
    # Of each group, which units the network still has, and since when each is closed.
    alive = {n: np.ones(g.size, bool) for n, g in whole.units.items()}
    counts: compaction.Counts = {}
    if config.resume:

        def of_the_shape(notes):
            return train.shrink(initial, flags(notes["alive"]), whole.structure.groups)

        found = checkpoints.restore(of_the_shape, tqdm.write)
        if found is not None:
            at, state, notes = found
            first, best = at + 1, notes["best"]
            alive = flags(notes["alive"])
            counts = {n: np.asarray(c) for n, c in notes["counts"].items()}
            if not all(each.all() for each in alive.values()):
                now = smaller(whole, alive)
                compiled = compile_for(config, gate, now, whole, dataset, optimizer)
    log.keep_until(first - 1)
    if first == 1:
        active = gating.prob_active(gate, logits)
        log.activity(0, unit_activity(whole, params, active))

    # ------------------------------------------------------------- the training
    training = jax.tree.map(jnp.asarray, (dataset.train.images, dataset.train.labels))
    batch = jax.tree.map(lambda a: a[: config.batch_size], training)
    done = (first - 1) * steps_per_epoch
    bar = progress.bar(steps, "step", done=done, show=config.progress)
    first_step_at = None
    last_epoch = min(config.epochs, config.stop_after or config.epochs)
    for epoch in range(first, last_epoch + 1):
        started = time.perf_counter()
        totals = train.no_totals(compiled.step, state, batch, root)
        order = train.order_of_epoch(root, epoch, examples, config.batch_size)
        for part in parts(order):
            state, totals = compiled.run(state, totals, training, part, root)
            if first_step_at is None:
                jax.block_until_ready(state.step)
                first_step_at = time.time()
            bar.update(len(part))
        totals = jax.device_get(totals)
        seconds = time.perf_counter() - started
        bad_step = int(totals.first_bad_step)
        trained = jax.tree.leaves(jax.device_get(state.theta))
        if bad_step < 0 and not all(np.isfinite(a).all() for a in trained):
            # Left by the last step, and met by no loss yet.
            bad_step = int(state.step)
        if bad_step >= 0:
            bar.close()
            good = checkpoints.steps()
            raise Diverged(
                f"the loss is not finite at step {bad_step} "
                f"(epoch {epoch}); the last good checkpoint is "
                f"{checkpoints.folder / str(good[-1]) if good else 'none yet'}; "
                "a smaller learning_rate may help"
            )

        evaluated, active, z, found = compiled.decide(state)
        folded = jax.device_get(units.apply_gates(evaluated, z, now.gated))
        active, z = jax.device_get((active, z))
        keep = units.in_use(folded, now.units)
        decided = decided_units(folded, keep, now.gated)
        decided = to_floats(count(at_full_size(decided, alive, whole)))
        row = {
            "epoch": epoch,
            "step": int(state.step),
            "seconds": seconds,
            "steps_per_second": steps_per_epoch / seconds,
            "loss": float(totals.sums["loss"]) / int(totals.steps),
            "penalty": float(totals.sums["penalty"]) / int(totals.steps),
            "train_error": 100
            * float(totals.sums["errors"])
            / (int(totals.steps) * config.batch_size),
            "validation_error": compiled.error(evaluated, z, dataset.validation),
            "expected_l0": float(found["expected_l0"]),
            "architecture": {name: int(flags.sum()) for name, flags in keep.items()},
            "trained": {name: int(each.sum()) for name, each in alive.items()},
            "weights": round(decided["weights"]),
            "expected": to_floats(count(at_full_size(active, alive, whole))),
            "decided": decided,
            "dense": dense,
            "undecided": undecided(active, whole.gated),
        }
        if constraint is not None:
            row["excess"] = to_floats(found["excess"])
            strength = constraint.strength(state.dual)
            row["multipliers"] = to_floats(jax.device_get(strength))
        if best is None or row["validation_error"] < best["validation_error"]:
            best = result_of(row, compiled.error(evaluated, z, dataset.test))
            row["test_error"] = best["test_error"]
        elif epoch == config.epochs:
            row["test_error"] = compiled.error(evaluated, z, dataset.test)
        log.activity(
            epoch, unit_activity(whole, params, at_full_size(active, alive, whole))
        )

        if config.compact and now.gated and epoch < config.epochs:
            closed = compiled.closed(evaluated, z, active)
            counts = compaction.count(counts, jax.device_get(closed))
            keep = compaction.alive(counts, config.compact_after)
            keep = compiled.spare(keep)
            to_come = (config.epochs - epoch) * steps_per_epoch * config.batch_size
            if worth_it(config, compiled, keep, to_come):
                keep = units.left(nnx.state(now.model), keep, now.units)
                state = train.shrink(state, keep, now.structure.groups)
                counts = {name: c[keep[name]] for name, c in counts.items()}
                for name, each in alive.items():
                    each[each] = keep[name]
                now = smaller(now, keep)
                compiled = compile_for(config, gate, now, whole, dataset, optimizer)
        log.row(row)
        bar.set_postfix_str(progress_line(row), refresh=False)
        if epoch % config.checkpoint_every == 0 or epoch == last_epoch:
            notes = {"best": best, "alive": lists(alive), "counts": lists(counts)}
            checkpoints.save(epoch, state, notes)
    bar.close()
    log.close()
    if last_epoch < config.epochs:
        return {"stopped_after": last_epoch, "folder": str(folder)}

    # ------------------------------------------------------ the smaller network
    row = log.rows()[-1]
    evaluated, active, z, _ = compiled.decide(state)
    graph, _, others = nnx.split(now.model, nnx.Param, ...)
    folded = l0jax.nnx.fold(nnx.merge(graph, evaluated, others), z, now.gated)
    keep = units.in_use(nnx.state(folded), now.units)
    dead = [name for name, flags in keep.items() if not flags.any()]
    for name in dead:
        # No array can be empty. The unit that stays has a closed gate folded in, so
        # that it contributes nothing.
        keep[name][0] = True
    small = l0jax.nnx.shrink(folded, keep, now.structure.groups)
    storage.save(small, folder / "shrunk")
    test_images = jnp.asarray(dataset.test.images[:EVALUATION_BATCH], jnp.float32)
    difference = disagreement(
        compiled_call(folded), compiled_call(small), test_images / dataset.scale
    )
    log.gates(at_full_size(active, alive, whole), at_full_size(z, alive, whole))

    summary = {
        "dataset": config.dataset,
        "model": config.model,
        "test_rule": config.test_rule,
        "shape": list(shape),
        "last": result_of(row, row["test_error"]),
        "best_on_validation": best,
        "dense_weights": round(dense["weights"]),
        "gated_weights": gated_weights(config, whole),
        "shrunk": {
            "architecture": small.architecture,
            "parameters": sum(
                a.size for a in jax.tree.leaves(nnx.state(small, nnx.Param))
            ),
            "max_relative_difference": difference,
        },
        "dead": dead,
        "first_step_at": first_step_at,
        "seconds_to_first_step": first_step_at and first_step_at - begun,
        "seconds": sum(r["seconds"] for r in log.rows()),
        "wall_seconds": time.time() - begun,
        "folder": str(folder),
    }
    if "excess" in row:
        summary["excess"] = row["excess"]
    log.summary(summary)
    return summary


# ------------------------------------------------------- the network, at any size


class Network(NamedTuple):
    """A network of some size and its groups.

    Attributes:
        model: the module; only its shapes and what is not trained are used.
        structure: its groups of units, and its single weights if those are gated.
        units: its groups of units.
        gated: the groups that have gates.
        latency: seconds of a call, if they were measured.
    """

    model: models.Model
    structure: Structure
    units: units.Groups
    gated: units.Groups
    latency: costs.Cost | None = None


def network(config: Config, model: models.Model) -> Network:
    """The whole network."""
    structure = models.structure(model)
    groups = structure.groups
    if config.gates == "group":
        return Network(model, structure, groups, groups)
    single = (
        weight_groups(nnx.state(model, nnx.Param)) if config.gates == "weight" else {}
    )
    for group in single.values():
        structure = structure.add(group)
    return Network(model, structure, groups, single)


def smaller(now: Network, keep: units.Keep) -> Network:
    """The network without the units that are not kept."""
    structure = now.structure.shrink(keep)
    return Network(
        l0jax.nnx.shrink(now.model, keep, now.structure.groups),
        structure,
        {name: structure.groups[name] for name in now.units},
        {name: structure.groups[name] for name in now.gated},
    )


LATENCY_BATCH = 256


def latency_table(whole: Network, shape: tuple[int, ...]) -> costs.Table:
    """Seconds of a call of networks with 1, half and all units of each of the three
    groups without which most multiply-accumulates are saved.

    27 networks at most. What other groups save is not seen: of LeNet-5's flattened
    features, of which fewer are there with fewer maps, no more.
    """
    saved = costs.per_group(whole.structure, costs.macs)
    largest = sorted(whole.units, key=lambda name: -float(saved[name]))[:3]
    sizes = {
        name: (1, math.ceil(group.size / 2), group.size)
        for name, group in whole.units.items()
        if name in largest
    }
    images = jnp.zeros((LATENCY_BATCH, *shape))
    return measure_latency(whole.model, whole.structure, images, sizes=sizes)


class Compiled(NamedTuple):
    """What is compiled for a network of some size."""

    step: train.Step
    run: Callable
    error: Callable
    decide: Callable
    closed: Callable
    count: Callable
    spare: Callable


def compile_for(
    config: Config,
    gate: gates.Gate,
    now: Network,
    whole: Network,
    dataset: data.Dataset,
    optimizer: optax.GradientTransformation,
) -> Compiled:
    """Training and evaluation of a network of this size."""
    groups, charges = now.gated, charges_of(config, now)
    root = jax.random.key(config.seed)
    objective = minimised(config, gate, now, whole, dataset)
    step = train.make_step(**objective, optimizer=optimizer, polyak=config.polyak)
    apply, temperature, constraint = (
        objective[name] for name in ("apply", "temperature", "constraint")
    )

    @jax.jit
    def errors(params, z, images, labels):
        outputs = apply(units.apply_gates(params, z, groups), images)
        return (outputs.argmax(axis=-1) != labels).sum()

    def error(params, z, split):
        wrong = sum(
            errors(
                params,
                z,
                split.images[start : start + EVALUATION_BATCH],
                split.labels[start : start + EVALUATION_BATCH],
            )
            for start in range(0, len(split.labels), EVALUATION_BATCH)
        )
        return 100 * float(wrong) / len(split.labels)

    @jax.jit
    def count(prob_active):
        names = ("weights", *costs.CONVENTIONS)
        return {name: costs.make(name)(now.structure, prob_active) for name in names}

    @jax.jit
    def decide(state):
        """What is evaluated: averaged weights, P(z != 0), gates at test time."""
        theta = (
            state.theta if not config.polyak else train.averaged(state, config.polyak)
        )
        at = train.gate_at(gate, temperature, state.step, theta)
        if config.test_rule == "samples":
            key = gating.key_for(root, "test-time samples")
            z = gating.sample_average(key, at, theta["gates"], config.samples)
        else:
            z = gating.deterministic(at, theta["gates"], config.test_rule)
        active = gating.prob_active(at, theta["gates"])
        l0 = objectives.expected_l0(theta["params"], active, groups, charges)
        excess = {}
        if constraint is not None:
            terms = gating.l0_term(at, theta["gates"])
            excess = constraint.excess(theta["params"], terms, state.step)
        return theta["params"], active, z, {"expected_l0": l0, "excess": excess}

    @jax.jit
    def closed(params, z, active):
        every = now.structure.groups
        return compaction.closed(params, z, active, every, config.compact_below)

    def spare(keep):
        """Of the units that may be taken out, those without which what is left can
        still be as much as the target, with some room to choose: group by group.

        What is taken out never comes back. A network that falls below its target in
        the course of training could not rise to it again.
        """
        if constraint is None:
            return keep
        spared = {}
        params = nnx.to_pure_dict(nnx.state(now.model, nnx.Param))
        end = jnp.asarray(steps_of(config, dataset))
        for name, flags in keep.items():
            without = {**spared, name: flags}
            left = units.left(now.structure.arrays, without, now.structure.groups)
            most = {name: jnp.asarray(left[name], jnp.float32) for name in groups}
            excess = constraint.excess(params, most, end)
            if all(float(each) >= ROOM for each in excess.values()):
                spared = without
        return spared

    run = train.make_run(step)
    return Compiled(step, run, error, decide, closed, count, spare)


def function_of(now: Network, scale: float) -> train.Apply:
    """The network as a function of its parameters and of images as they are stored."""
    graph, _, others = nnx.split(now.model, nnx.Param, ...)
    others = nnx.to_pure_dict(others)

    def apply(params, images):
        network = nnx.merge(graph, params, others)
        return network(images.astype(jnp.float32) / scale)

    return apply


def minimised(
    config: Config,
    gate: gates.Gate,
    now: Network,
    whole: Network,
    dataset: data.Dataset,
    lam: tuple[Any, ...] | None = None,
) -> dict[str, Any]:
    """What is descended on, as `train.make_total` takes it: the loss, the cost of the
    units, and their gates.

    `lam` stands in for that of the configuration, and may be traced.
    """
    examples = len(dataset.train.labels)
    steps = steps_of(config, dataset)
    constraint = constraint_of(config, now, whole, steps)
    lam = config.lam if lam is None else lam
    return {
        "apply": function_of(now, dataset.scale),
        "loss": cross_entropy,
        "objective": objectives.penalty(
            now.gated,
            per_layer("lam", lam if constraint is None else (0.0,), now.gated),
            examples,
            weight_decay=config.weight_decay,
            charges=charges_of(config, now),
        ),
        "gate": gate,
        "groups": now.gated,
        "temperature": temperature_schedule(config, gate, steps),
        "constraint": constraint,
        "per_example": config.per_example,
        "estimator": estimators.ESTIMATORS.get(config.estimator or ""),
    }


def steps_of(config: Config, dataset: data.Dataset) -> int:
    """Of the whole run."""
    return len(dataset.train.labels) // config.batch_size * config.epochs


def worth_it(config: Config, compiled: Compiled, keep: units.Keep, examples) -> bool:
    """Whether compiling the smaller network pays for the examples still to come.

    By what is counted rather than by the clock, so that a run can be repeated.
    """
    kept = {name: jnp.asarray(each, jnp.float32) for name, each in keep.items()}
    before = float(compiled.count({})["macs"])
    after = float(compiled.count(kept)["macs"])
    # A gradient costs twice what the outputs do.
    return (
        after <= COMPACT_AT * before
        and 3 * examples * (before - after) >= config.compact_gain
    )


# It is not looked at before multiply-accumulates have fallen to this share.
COMPACT_AT = 0.65
# By how much of its target a network that was made smaller must be able to exceed it.
ROOM = 0.1


def at_full_size(values: dict, alive: dict, whole: Network) -> dict:
    """Vectors of the smaller network's units, or of its single weights, laid out as in
    the whole network, with zeros for what it has lost."""
    every = units.left(whole.structure.arrays, alive, whole.structure.groups)
    full = {}
    for name, vector in values.items():
        full[name] = np.zeros(len(every[name]), np.float32)
        full[name][every[name]] = np.asarray(vector)
    return full


def flags(stored: dict) -> dict:
    return {name: np.asarray(values, bool) for name, values in stored.items()}


def lists(vectors: dict) -> dict:
    return {name: vector.astype(int).tolist() for name, vector in vectors.items()}


# ------------------------------------------------------------------------- pieces


def check(config: Config) -> gates.Gate:
    """Raises ValueError for what can't be run; returns the gate family."""
    if config.dataset not in data.DATASETS:
        raise ValueError(
            f"unknown dataset {config.dataset!r}; there is {', '.join(data.DATASETS)}"
        )
    if config.model not in NETWORKS:
        raise ValueError(
            f"unknown model {config.model!r}; there is {', '.join(NETWORKS)}"
        )
    for name in ("epochs", "batch_size", "samples", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.stop_after is not None and config.stop_after < 1:
        raise ValueError(f"stop_after must be at least 1, got {config.stop_after}")
    for value in config.lam:
        if not value >= 0:
            raise ValueError(f"lam must be >= 0, got {value}")
    for name in ("learning_rate", "gate_learning_rate"):
        rate = getattr(config, name)
        if rate is not None and not rate >= 0:
            raise ValueError(f"{name} must be >= 0, got {rate}")
    if not 0 <= config.decay_from <= 1:
        raise ValueError(f"decay_from must lie in [0, 1], got {config.decay_from}")
    if not 0 <= config.polyak < 1:
        raise ValueError(f"polyak must lie in [0, 1), got {config.polyak}")
    if config.beta_end is not None and not config.beta_end > 0:
        raise ValueError(f"beta_end must be > 0, got {config.beta_end}")
    given = targets(config)
    if len(given) > 1:
        raise ValueError(f"give one target, not {' and '.join(given)}")
    if given and config.gates == "none":
        raise ValueError(f"{given[0]} is given, but nothing is gated")
    if config.constraint not in constraints.CONSTRAINTS:
        raise ValueError(
            f"unknown constraint {config.constraint!r}; there is "
            f"{', '.join(constraints.CONSTRAINTS)}"
        )
    if not config.multiplier_rate > 0:
        raise ValueError(f"multiplier_rate must be > 0, got {config.multiplier_rate}")
    if not 0 <= config.target_warm_up <= 1:
        raise ValueError(
            f"target_warm_up must lie in [0, 1], got {config.target_warm_up}"
        )
    if config.estimator not in (None, *estimators.ESTIMATORS):
        raise ValueError(
            f"unknown estimator {config.estimator!r}; there is "
            f"{', '.join(estimators.ESTIMATORS)}"
        )
    if config.beta_range is not None:
        low, high = config.beta_range
        if not 0 < low < high:
            raise ValueError(f"beta_range must rise from above 0, got {low} and {high}")
        if config.beta_end is not None:
            raise ValueError("give beta_end to anneal β or beta_range to train it")
    gate = gate_of(config)
    rules = (*gate.rules, *gating.RULES, "samples")
    if config.test_rule not in rules:
        raise ValueError(
            f"unknown test_rule {config.test_rule!r}; there is {', '.join(rules)}"
        )
    return gate


def gate_of(config: Config) -> gates.Gate:
    """The gate family with its settings."""
    settings: dict[str, Any] = {"gamma": config.gamma, "zeta": config.zeta}
    family = gates.GATES.get(config.gate)
    if family is not None and not issubclass(family, gates.Stretched):
        if (config.gamma, config.zeta) != (Config.gamma, Config.zeta):
            raise ValueError(
                f"gamma and zeta are given, but {config.gate!r} gates aren't stretched"
            )
        settings = {}
    if config.pair is not None:
        if family is not None and not issubclass(family, gates.Mixture):
            raise ValueError(
                f"pair is {config.pair!r}, but the gate is {config.gate!r}; only a "
                "mixture has one"
            )
        settings["pair"] = gates.make_pair(config.pair)
    gate = gates.make(config.gate, **settings)
    return gate if config.beta is None else gate.at_temperature(config.beta)


TARGETS: dict[str, costs.Cost] = {
    "target_params": costs.params,
    "target_macs": costs.macs,
    "target_bytes": costs.bytes,
}


def targets(config: Config) -> list[str]:
    """Which targets are given."""
    names = ("target_density", *TARGETS, "target_latency")
    return [name for name in names if getattr(config, name) is not None]


def constraint_of(
    config: Config, now: Network, whole: Network, steps: int
) -> constraints.Constraint | None:
    """What may be left of the network, if there is a target."""
    given = targets(config)
    if not given:
        return None
    (name,) = given
    if config.target_density is not None:
        several = len(config.target_density) > 1
        # A unit pays for as many weights as at first, whatever else is gone by now.
        sizes = objectives.sizes(
            nnx.state(whole.model, nnx.Param), whole.gated, charges_of(config, whole)
        )
        amounts = constraints.density(
            {name: float(each.mean()) for name, each in sizes.items()},
            {name: float(each.sum()) for name, each in sizes.items()},
            per_group=several,
        )
        target = per_layer(name, config.target_density, now.gated)
        if not several:
            target = config.target_density[0]
    else:
        cost = whole.latency if name == "target_latency" else TARGETS[name]
        assert cost is not None
        amounts = constraints.share(
            now.structure, cost, float(cost(whole.structure, {}))
        )
        target = getattr(config, name)
    make = constraints.CONSTRAINTS[config.constraint]
    return make(
        amounts,
        target,
        optimizer=optax.sgd(config.multiplier_rate),
        warm_up=int(config.target_warm_up * steps),
    )


def gated_weights(config: Config, whole: Network) -> float:
    """How many weights the gates pay for when all are open."""
    params = nnx.state(whole.model, nnx.Param)
    sizes = objectives.sizes(params, whole.gated, charges_of(config, whole))
    return float(sum(each.sum() for each in sizes.values()))


def charges_of(config: Config, now: Network) -> objectives.Charges:
    """Which weights each unit pays for."""
    if config.gates == "weight":
        return objectives.charges_of(now.gated)
    return now.model.charges(now.gated)


NETWORKS = ("mlp", "lenet5")
"""Of `l0jax.models.MODELS` those without batch normalisation, as in the L0 papers."""


def architecture(model: str, shape: tuple[int, ...], classes: int) -> dict:
    """The paper's widths for images of `shape`."""
    if model == "lenet5":
        return {"shape": shape, "classes": classes}
    return {"features": (math.prod(shape), 300, 100, classes)}


def weight_groups(params) -> dict[str, units.Group]:
    """One group per kernel, with each of its weights as a unit; biases stay."""
    return {
        path: units.Group(path, leaf.size, (units.Slot(path, None),))
        for path, leaf in units.arrays(params).items()
        if leaf.ndim > 1
    }


def keep_probabilities(config: Config, groups: units.Groups) -> tuple[float, ...]:
    if config.keep_prob is not None:
        return config.keep_prob
    return tuple(0.8 if name == "input" else 0.5 for name in groups)


def per_layer(field: str, values: tuple[Any, ...], groups: units.Groups) -> dict:
    """One value for each group, from one number for all or one for each."""
    if len(values) == 1:
        return dict.fromkeys(groups, values[0])
    if len(values) != len(groups):
        raise ValueError(
            f"{field} has {len(values)} values; give one, or one for each of the "
            f"{len(groups)} gated layers ({', '.join(groups)})"
        )
    return dict(zip(groups, values, strict=True))


def temperature_schedule(config: Config, gate: gates.Gate, steps: int):
    if config.beta_range is not None:
        return config.beta_range
    if config.beta_end is None:
        return None
    begin = float(gate.temperature)
    return optax.exponential_decay(begin, steps, config.beta_end / begin)


def optimizer_of(config: Config, steps: int) -> optax.GradientTransformation:
    """Adam for weights and gates, each with its rate: constant, then linear to 0."""
    from_step = int(config.decay_from * steps)

    def adam(rate):
        return optax.adam(
            optax.linear_schedule(rate, 0.0, max(steps - from_step, 1), from_step)
            if config.decay_from < 1
            else rate
        )

    gate_rate = config.gate_learning_rate
    return train.gates_apart(
        adam(config.learning_rate),
        adam(config.learning_rate if gate_rate is None else gate_rate),
    )


def cross_entropy(outputs, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    wrong = (outputs.argmax(axis=-1) != labels).sum()
    return losses.mean(), {"errors": wrong.astype(jnp.float32)}


def parts(order):
    """An epoch's order in equal pieces, after each of which the progress bar moves.

    Equal, so that one program fits all of them.
    """
    steps = len(order)
    pieces = max(n for n in range(1, 13) if steps % n == 0 and (n == 1 or steps >= 120))
    return np.split(np.asarray(order), pieces)


def decided_units(folded, keep, groups) -> dict[str, np.ndarray]:
    """What is left at test time, from weights with the gates folded in."""
    leaves = units.arrays(folded)
    return {
        name: keep[name] if name in keep else np.ravel(leaves[name]) != 0
        for name in groups
    }


def unit_activity(now: Network, params, active) -> dict:
    """P(z != 0) per unit; of weight gates, the mean over the weights that use it."""
    if not now.gated:
        return {name: np.ones(group.size) for name, group in now.units.items()}
    if now.gated is now.units or set(now.gated) == set(now.units):
        return active
    ones = jax.tree.map(jnp.ones_like, params)
    active = jax.tree.map(jnp.asarray, active)
    weighted = units.apply_gates(ones, active, now.gated)
    totals = {}
    for name, group in now.units.items():
        amount = units.charge(lambda a: a, weighted, group.used_by, group.size)
        count = units.charge(lambda a: a, ones, group.used_by, group.size)
        totals[name] = amount / count
    return totals


def undecided(active, gated: units.Groups) -> float:
    """Share of all gates that are neither clearly open nor clearly closed."""
    between = sum(int(((p > 0.1) & (p < 0.9)).sum()) for p in active.values())
    return between / max(sum(group.size for group in gated.values()), 1)


def compiled_call(network: nnx.Module) -> Callable[[jax.Array], jax.Array]:
    """The network as one compiled function of its inputs."""
    graph, state = nnx.split(network)
    call = jax.jit(lambda state, inputs: nnx.merge(graph, state)(inputs))
    return functools.partial(call, state)


def disagreement(a, b, inputs) -> float:
    """max |a - b| / max |a| of the outputs of two networks."""
    first, second = np.asarray(a(inputs)), np.asarray(b(inputs))
    return float(np.abs(first - second).max() / max(np.abs(first).max(), 1e-30))


def to_floats(tree) -> dict[str, float]:
    return {name: float(value) for name, value in tree.items()}


def result_of(row: dict, test_error: float) -> dict:
    """What is reported of one epoch."""
    names = ("epoch", "validation_error", "architecture", "weights", "expected_l0")
    return {name: row[name] for name in names} | {
        "test_error": test_error,
        "decided": row["decided"],
        "expected": row["expected"],
    }


def progress_line(row: dict) -> str:
    widths = "-".join(str(n) for n in row["architecture"].values())
    dead = " DEAD" if 0 in row["architecture"].values() else ""
    return (
        f"loss {row['loss']:.4f}, val {row['validation_error']:.2f} %, "
        f"L0 {row['expected_l0']:,.0f}, {widths}{dead}, "
        f"{row['steps_per_second']:.0f} steps/s"
    )


def scientific(config: Config) -> dict:
    """The fields that decide the result."""
    return run_folder.settings_of(config, HOUSEKEEPING)


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
    shrunk = summary["shrunk"]
    lines += [
        "",
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


def cli() -> None:
    config = tyro.cli(Annotated[Config, tyro.conf.arg(name="")], description=__doc__)
    try:
        summary = main(config)
    except (ValueError, Diverged, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.mnist: {error}") from None
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
