"""How much the outcome of pruning depends on the heuristic: soft knowledge relocation
(a reconstruction, see `l0jax.methods.relocation`) against pruning at once.

    python -m experiments.relocation --quick                # digits, 2 minutes
    python -m experiments.relocation --model mlp            # MNIST
    python -m experiments.relocation --model resnet8 --dataset cifar10_jpeg --ratios 0.5

A base network is trained for each seed. Every heuristic dooms the same share of its
units; every arm takes the same number of steps from the doomed network to the small
one that is tested. Runs of one arm, ratio and budget differ only in numbers, so that
many of them are one compiled program. Each becomes a line of `results.csv`; what is
there is not run again. `table.md` and the pictures in `figures` follow from the CSV:
`python -m experiments.relocation_report FOLDER` makes them again.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, PRNGKeyArray
from tqdm import tqdm

import l0jax.nnx
from experiments.harness import command_line, csv_lines, progress, run_folder
from experiments.relocation_training import (
    ARMS,
    MAIN_ARMS,
    Arm,
    Keep,
    Member,
    Program,
    State,
    folded,
    member_of,
    merged,
    split,
    stacked,
)
from experiments.tasks import data
from experiments.tasks.images import Images, images_of, normalised
from l0jax import gating, methods, models, storage
from l0jax.methods import relocation
from l0jax.methods.keeping import keep_top
from l0jax.methods.relocation import LeastSquares
from l0jax.methods.task import cross_entropy
from l0jax.structure import Structure

Heuristic = Callable[[methods.Task, PRNGKeyArray], Mapping[str, Any]]


def by_score(name: str, sign: float = 1.0) -> Heuristic:
    """A score of `l0jax.methods.SCORES`; -1 turns its ranking upside down."""

    def scores(task: methods.Task, key: PRNGKeyArray) -> dict[str, Any]:
        found = methods.score(name, task, key)
        return {n: sign * np.asarray(values) for n, values in found.items()}

    return scores


HEURISTICS: dict[str, Heuristic] = {
    **{
        name: by_score(name)
        for name in (
            *("random", "filter_l1", "outgoing_l2", "apoz", "variance", "entropy"),
            *("taylor", "skeletonization", "fisher"),
        )
    },
    # Adversaries: what these would keep goes.
    "inverted_taylor": by_score("taylor", -1.0),
    "inverted_filter_l1": by_score("filter_l1", -1.0),
}
"""What decides which units are doomed: functions of a task and a key, of which the
units with the lowest scores of each group go."""
ADVERSARIES = ("inverted_taylor", "inverted_filter_l1")


class Network(NamedTuple):
    """What is pruned: a kind of model, its architecture, and on what by default."""

    kind: str
    architecture: dict[str, Any]
    dataset: str


NETWORKS: dict[str, Network] = {
    "mlp": Network("mlp", {"features": (784, 300, 100, 10)}, "mnist"),
    "lenet5": Network("lenet5", {}, "mnist"),
    "resnet8": Network(
        "pre_activation_resnet",
        {
            "stem": 8,
            "stages": (8, 16, 32),
            "inner": ((8,), (16,), (32,)),
        },
        "cifar10_jpeg",
    ),
    "i3d_small": Network(*models.PRESETS.get("i3d_small", ("", {})), "motion"),
}
QUICK: dict[str, Any] = {
    **{"dataset": "digits", "ratios": (0.8,), "budgets": (20, 60), "seeds": (0, 1)},
    **{"base_epochs": 20, "batch_size": 64, "chosen_by": 512},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Prune by every heuristic, at once and softly."""

    model: str = "mlp"
    """a name in `NETWORKS`"""
    dataset: str | None = None
    """a data set of `experiments.tasks.data`; by default that of the network"""
    heuristics: tuple[str, ...] = tuple(HEURISTICS)
    """which heuristics"""
    arms: tuple[str, ...] = MAIN_ARMS
    """which arms, or all"""
    ratios: tuple[float, ...] = (0.8, 0.9)
    """shares of the units of each layer that are removed"""
    budgets: tuple[int, ...] = (110, 330, 1100)
    """steps from the base network to the one that is tested"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """a base network and an order of the data for each"""
    examples: int | None = None
    """training images that are used; by default all"""
    chosen_by: int = 2048
    """training images that heuristics and least squares look at"""
    validation: float = 0.1
    """share of the training images that is held out"""
    base_epochs: int = 5
    """passes over the training images that make the base network"""
    batch_size: int = 128
    """images of a step"""
    learning_rate: float = 1e-3
    """of Adam; for the base network it falls to 0"""
    together: int = 55
    """runs in one program"""
    out: Path | None = None
    """folder; None is runs/relocation-<dataset>-<model>-<digest of the settings>"""
    progress: bool = True
    """show a progress bar"""


OF_RESULTS = (
    *("model", "dataset", "examples", "chosen_by", "validation", "base_epochs"),
    *("batch_size", "learning_rate"),
)
"""Settings that decide what a single run gives."""


def main(
    config: Config, heuristics: Mapping[str, Heuristic] = HEURISTICS
) -> dict[str, Any]:
    """Runs what is missing; returns the folder and all its results.

    Args:
        config: what is run.
        heuristics: by name; further ones are functions like those of `HEURISTICS`.
    """
    config = resolved(config)
    check(config, heuristics)
    dataset = data.load(str(config.dataset), config.validation)
    told = run_folder.settings_of(config)
    settings = {name: told[name] for name in OF_RESULTS}
    name = f"relocation-{config.dataset}-{config.model}"
    folder = config.out or run_folder.default(name, settings)
    run_folder.prepare(folder, settings, told, resume=True)
    results = Results(folder / "results.csv")
    work = Work(config, dataset, folder, heuristics)
    cases = [
        Case(arm, ratio, budget)
        for ratio, budget, arm in itertools.product(
            config.ratios, config.budgets, config.arms
        )
    ]
    missing = {case: results.missing(case, config) for case in cases}
    steps = sum(case.budget for case, runs in missing.items() for _ in runs)
    with progress.bar(steps, "step", show=config.progress) as bar:
        for case, runs in missing.items():
            for at in range(0, len(runs), config.together):
                results.add(work.run(case, runs[at : at + config.together], bar))
    # Imported at the end, when its second no longer delays the first step.
    from experiments import relocation_report

    written = relocation_report.write(folder)
    return {"folder": str(folder), "results": results.lines(), "written": written}


def resolved(config: Config) -> Config:
    """The configuration with all defaults filled in."""
    if config.arms == ("all",):
        config = dataclasses.replace(config, arms=tuple(ARMS))
    if config.dataset is None and config.model in NETWORKS:
        dataset = NETWORKS[config.model].dataset
        config = dataclasses.replace(config, dataset=dataset)
    return config


def check(config: Config, heuristics: Mapping[str, Heuristic]) -> None:
    """Raises ValueError for what can't be run."""
    for what, given, there in (
        ("model", (config.model,), NETWORKS),
        ("arm", config.arms, ARMS),
        ("heuristic", config.heuristics, heuristics),
    ):
        for name in given:
            if name not in there:
                raise ValueError(
                    f"unknown {what} {name!r}; there is {', '.join(there)}"
                )
    for field in ("heuristics", "arms", "ratios", "budgets", "seeds"):
        if not getattr(config, field):
            raise ValueError(f"{field} must not be empty")
    for ratio in config.ratios:
        methods.keeping.count_left(1, ratio)
    for budget, arm in itertools.product(config.budgets, config.arms):
        if budget < 1:
            raise ValueError(f"a budget must be at least one step, got {budget}")
        ARMS[arm].closing.steps(budget)


class Case(NamedTuple):
    """What the runs of one program have in common."""

    arm: str
    ratio: float
    budget: int


def removable(model: models.Model) -> Structure:
    """The groups whose units go: those that one layer makes. Streams that several
    layers add to are left alone, and so are the inputs."""
    structure = models.structure(model)
    kernels = {op.kernel for op in structure.operations}

    def makers(name: str) -> int:
        paths = {slot.path for slot in structure.groups[name].made_by}
        return len(paths & kernels)

    names = [
        name
        for name in structure.groups
        if name not in structure.inputs and makers(name) == 1
    ]
    return structure.only(*names)


class Work:
    """The base networks, what heuristics say of them, and runs from there."""

    def __init__(
        self,
        config: Config,
        dataset: data.Dataset,
        folder: Path,
        heuristics: Mapping[str, Heuristic],
    ):
        self.config, self.dataset, self.folder = config, dataset, folder
        self.heuristics = heuristics
        images = images_of(dataset, config.examples)
        if len(images.labels) < config.batch_size:
            raise ValueError(
                f"{len(images.labels)} training images don't fill a batch of "
                f"{config.batch_size}"
            )
        self.images = Images(*jax.tree.map(jnp.asarray, images))
        self.optimizer = optax.adam(config.learning_rate)
        self.programs: dict[Any, Program] = {}
        self.structure = removable(self.initial(0))
        self.fit = functools.cache(self._fit)
        self.base = functools.cache(self._base)
        self.scores = functools.cache(self._scores)
        self.base_accuracy = functools.cache(self._base_accuracy)

    # ------------------------------------------------------------ what is pruned

    def initial(self, seed: int) -> models.Model:
        """The base network before training."""
        kind, architecture, _ = NETWORKS[self.config.model]
        shape = self.dataset.train.images.shape[1:]
        classes = self.dataset.classes
        if kind == "mlp":
            features = (int(np.prod(shape)), *architecture["features"][1:-1], classes)
            architecture = {"features": features}
        elif kind != "lenet5":
            architecture = {**architecture, "classes": classes, "shape": shape}
        rngs = nnx.Rngs(gating.key_for(jax.random.key(seed), "weights"))
        return models.make(kind, architecture, rngs=rngs)

    def _base(self, seed: int) -> models.Model:
        folder = self.folder / f"base-{seed}"
        if folder.exists():
            return storage.load(folder)  # pyrefly: ignore[bad-return]
        model = self.initial(seed)
        per_epoch = len(self.images.labels) // self.config.batch_size
        steps = per_epoch * self.config.base_epochs
        rate = optax.cosine_decay_schedule(self.config.learning_rate, steps)
        graph, params, statistics = split(model)
        program = Program(graph, optax.adam(rate), self.structure)
        member = self.member(seed, "base", steps)
        member = jax.tree.map(lambda a: a[None], member)
        state = stacked([program.start(params, statistics)])
        name = f"base network, seed {seed}"
        with progress.bar(steps, "step", name=name, show=self.config.progress) as bar:
            state = self.stepped(program, state, member, 0, steps, steps, bar)
        trained = merged(graph, member_of(state, 0))
        storage.save(trained, folder)
        return trained

    def task(self, model: models.Model) -> methods.Task:
        count = min(self.config.chosen_by, len(self.images.labels))
        images = normalised(jnp.asarray(self.images.images[:count]), self.images)
        labels = self.images.labels[:count]
        batch = min(self.config.batch_size, count)
        return methods.task(model, self.structure, images, labels, batch)

    def _scores(self, heuristic: str, seed: int) -> dict[str, np.ndarray]:
        key = gating.key_for(jax.random.key(seed), heuristic)
        found = self.heuristics[heuristic](self.task(self.base(seed)), key)
        return checked(heuristic, found, self.structure)

    def _fit(self) -> LeastSquares:
        return LeastSquares(self.task(self.base(self.config.seeds[0])))

    def member(self, seed: int, purpose: str, steps: int) -> Member:
        """The order of the data of a seed: the same for all heuristics and arms."""
        key = gating.key_for(jax.random.key(seed), purpose)
        count, batch = len(self.images.labels), self.config.batch_size
        per_epoch = count // batch
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        orders = [
            rng.permutation(count)[: per_epoch * batch].reshape(per_epoch, batch)
            for _ in range(-(-steps // per_epoch))
        ]
        order = jnp.asarray(np.concatenate(orders)[:steps], jnp.int32)
        return Member(order, key, {}, {}, {})

    # -------------------------------------------------------------------- runs

    def run(
        self, case: Case, runs: Sequence[tuple[str, int]], bar: tqdm
    ) -> list[dict[str, Any]]:
        """The results of some heuristics and seeds."""
        arm, begun = ARMS[case.arm], time.perf_counter()
        closing_steps = arm.closing.steps(case.budget)
        bar.set_description(f"{case.arm} {case.ratio:g} in {case.budget}")
        keeps = [keep_top(self.scores(h, s), case.ratio) for h, s in runs]
        members = [self.member(seed, "data", case.budget) for _, seed in runs]
        bases = [self.base(seed) for _, seed in runs]
        graph = split(bases[0])[0]
        if closing_steps:
            program = self.program(case.arm, graph, arm)
            states = [program.start(*split(base)[1:]) for base in bases]
            full = [
                m._replace(
                    keep=jax.tree.map(jnp.asarray, keep),
                    shift=self.shift(arm, base, keep, m.key),
                    teacher=split(base)[1] if program._weights() else {},
                )
                for m, keep, base in zip(members, keeps, bases, strict=True)
            ]
            steps = closing_steps
            state = self.stepped(
                program, stacked(states), stacked(full), 0, steps, steps, bar
            )
            states = [member_of(state, i) for i in range(len(runs))]
            shifts = [m.shift for m in full]
        else:
            program = self.program("plain", graph)
            states = [program.start(*split(base)[1:]) for base in bases]
            shifts = [{} for _ in runs]
        smaller, prepared = [], []
        for state, keep, shift, base, m in zip(
            states, keeps, shifts, bases, members, strict=True
        ):
            small, before = self.removed(
                graph, state, keep, shift, arm, base, m.key, bool(closing_steps)
            )
            smaller.append(small)
            prepared.append(before)
        left = [m for m, _ in smaller]
        removal = [self.tested(m, self.dataset.validation) for m in left]
        small_graph = split(left[0])[0]
        program = self.program("plain", small_graph)
        state = stacked([state for _, state in smaller])
        state = self.stepped(
            program, state, stacked(members), closing_steps, case.budget, 1, bar
        )
        lines = []
        for i, (heuristic, seed) in enumerate(runs):
            model = merged(small_graph, member_of(state, i))
            validation, loss = self.tested(model, self.dataset.validation)
            test, _ = self.tested(model, self.dataset.test)
            lines.append(
                {
                    "model": self.config.model,
                    "dataset": self.config.dataset,
                    **case._asdict(),
                    "heuristic": heuristic,
                    "seed": seed,
                    "validation": validation,
                    "validation_loss": loss,
                    "test": test,
                    "prepared_loss": prepared[i],
                    "removed_accuracy": removal[i][0],
                    "removed_loss": removal[i][1],
                    "base": self.base_accuracy(seed),
                    "params": parameters(model),
                    "seconds": (time.perf_counter() - begun) / len(runs),
                }
            )
        return lines

    def program(self, name: str, graph, arm: Arm | None = None) -> Program:
        """Compiled steps are kept, one program for each arm and shape."""
        key = name, graph
        if key not in self.programs:
            self.programs[key] = Program(graph, self.optimizer, self.structure, arm)
        return self.programs[key]

    def stepped(self, program, state, member, start, end, steps, bar) -> State:
        """Steps from `start` to `end`; the host waits for the device now and then."""
        loss, members = jnp.zeros(()), len(jax.tree.leaves(state)[0])
        for at in range(start, end):
            state, loss = program.step(
                state, member, jnp.int32(at), jnp.float32(steps), self.images
            )
            bar.update(members)
            if (at + 1) % 50 == 0:
                worst = np.asarray(loss)
                if not np.isfinite(worst).all():
                    raise FloatingPointError(
                        f"the loss of run {int(np.argmax(~np.isfinite(worst)))} is not "
                        f"finite at step {at + 1}: lower the learning rate"
                    )
                bar.set_postfix_str(f"loss {worst.mean():.3f}")
        return state

    def shift(self, arm: Arm, base, keep: Keep, key) -> dict[str, Array]:
        if arm.fit != "during":
            return {}
        params = nnx.split(base)[1]
        return self.fit().shift(keep, key, base=params)

    def removed(self, graph, state: State, keep, shift, arm, base, key, closed: bool):
        """The smaller network and its state, and the loss before units were removed."""
        params = state.params
        if shift:
            open_ = {n: jnp.ones(len(flags)) for n, flags in keep.items()}
            gates = {n: jnp.float32(flags) for n, flags in keep.items()}
            groups = self.structure.groups
            params = relocation.closing(
                params, gates if closed else open_, groups, shift
            )
        model = merged(graph, state._replace(params=params))
        if arm.fit == "removal":
            whole = nnx.split(model)[1]
            fitted = self.fit()(keep, key, params=whole, base=nnx.split(base)[1])
            model = nnx.merge(nnx.split(model)[0], fitted)
        before = base if not closed else folded(model, keep, self.structure)
        loss = self.tested(before, self.dataset.validation)[1]
        examples = normalised(jnp.asarray(self.images.images[:64]), self.images)
        small = relocation.remove(model, self.structure, keep, examples)
        _, params, statistics = split(small)

        def moment(tree):
            of = merged(graph, state._replace(params=tree))
            return split(l0jax.nnx.shrink(of, keep, self.structure))[1]

        adam = state.moments[0]
        moments = (
            adam._replace(mu=moment(adam.mu), nu=moment(adam.nu)),
            *state.moments[1:],
        )
        small_state = State(params, statistics, moments, state.weights, state.first)
        return (small, small_state), loss

    def _base_accuracy(self, seed: int) -> float:
        return self.tested(self.base(seed), self.dataset.test)[0]

    def tested(self, model: models.Model, split_: data.Split) -> tuple[float, float]:
        """Accuracy in per cent and loss on a split."""
        graph, state = nnx.split(model)
        count = len(split_.labels)
        batch = max(n for n in range(1, min(1000, count) + 1) if count % n == 0)
        found = [
            _right(
                graph,
                state,
                (self.images.mean, self.images.deviation),
                split_.images[at : at + batch],
                split_.labels[at : at + batch],
            )
            for at in range(0, count, batch)
        ]
        right, loss = np.sum([np.asarray(each) for each in found], axis=0) / count
        return 100 * float(right), float(loss)


@functools.partial(jax.jit, static_argnums=0)
def _right(graph, state, colours, images, labels):
    """How many of a batch are right, and the sum of their losses."""
    of = Images(images, labels, *colours)
    logits = nnx.merge(graph, state)(normalised(images, of))
    right = (logits.argmax(-1) == labels).sum()
    return jnp.stack([jnp.float32(right), cross_entropy(logits, labels).sum()])


def checked(
    heuristic: str, scores: Mapping[str, Any], structure: Structure
) -> dict[str, np.ndarray]:
    """Scores as arrays.

    Raises:
        ValueError: if a group has none, or not one finite number for each unit.
    """
    found = {}
    for name, group in structure.groups.items():
        if name not in scores:
            raise ValueError(
                f"the heuristic {heuristic!r} gives no scores for group {name!r}; it "
                f"gives them for {', '.join(scores) or 'none'}"
            )
        found[name] = np.asarray(scores[name], np.float64)
        if found[name].shape != (group.size,):
            raise ValueError(
                f"the heuristic {heuristic!r} gives group {name!r} scores of the shape "
                f"{found[name].shape}; it has {group.size} units"
            )
    try:
        methods.keeping.check_scores(found)
    except ValueError as error:
        raise ValueError(f"the heuristic {heuristic!r}: {error}") from None
    return found


def parameters(model: models.Model) -> int:
    return sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param)))


# -------------------------------------------------------------------------- results


class Results:
    """The CSV with a line for each run."""

    def __init__(self, file: Path):
        self.file = file

    def lines(self) -> list[dict[str, str]]:
        return csv_lines.read(self.file)

    def missing(self, case: Case, config: Config) -> list[tuple[str, int]]:
        """Heuristics and seeds of which there is no line."""
        there = {
            (line["heuristic"], int(line["seed"]))
            for line in self.lines()
            if case == Case(line["arm"], float(line["ratio"]), int(line["budget"]))
        }
        wanted = itertools.product(config.heuristics, config.seeds)
        return [run for run in wanted if run not in there]

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """All lines of a program, or none if the process is killed meanwhile."""
        csv_lines.write(self.file, [*self.lines(), *lines])


def cli() -> None:
    config = command_line.parse(
        Config, __doc__, QUICK, "an MLP on digits, in two minutes"
    )
    try:
        found = main(config)
    except (ValueError, FloatingPointError, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.relocation: {error}") from None
    for file in found["written"]:
        print(file)


if __name__ == "__main__":
    cli()
