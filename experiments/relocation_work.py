"""Base networks, what heuristics say of them, and runs from there."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, PRNGKeyArray
from tqdm import tqdm

import l0jax.nnx
from experiments.harness import devices
from experiments.harness.loop import Run, by_step
from experiments.relocation_settings import NETWORKS, Case, Config, Heuristic
from experiments.relocation_training import ARMS, Arm, Doomed, Keep, closing, plain
from experiments.tasks import data
from experiments.tasks.images import (
    Images,
    check_filled,
    images_of,
    measured,
    normalised,
)
from l0jax import gating, methods, models, storage, train
from l0jax.methods import relocation
from l0jax.methods.keeping import keep_top
from l0jax.methods.relocation import LeastSquares
from l0jax.structure import Structure
from l0jax.train import TrainingState


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
        check_filled(images, config.batch_size)
        self.images = Images(*jax.tree.map(jnp.asarray, images))
        self.data = self.images.images, self.images.labels
        self.optimizer = optax.adam(config.learning_rate)
        self.compute = devices.dtype_of(config)
        self.sweeps: dict[Any, train.Sweep] = {}
        self.structure = removable(self.initial(0))
        self.fit = functools.cache(self._fit)
        self.base = functools.cache(self._base)
        self.scores = functools.cache(self._scores)
        self.base_error = functools.cache(self._base_error)

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
        steps = len(self.images.labels) // self.config.batch_size
        steps *= self.config.base_epochs
        rate = optax.cosine_decay_schedule(self.config.learning_rate, steps)
        run = Run(
            plain(self.initial(seed), self.images, optax.adam(rate)),
            gating.key_for(jax.random.key(seed), "base"),
            self.data,
            on=self.config,
            epochs=self.config.base_epochs,
            batch_size=self.config.batch_size,
            folder=self.folder / "checkpoints" / f"base-{seed}",
            loop=by_step(),
            name=f"base network, seed {seed}",
            show=self.config.progress,
        )
        run.restore()
        for _ in run:
            run.say(f"loss {run.means['loss']:.3f}")
        training, state = devices.alone(run.training, run.state)
        trained = training.finish(state)
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

    def key(self, seed: int) -> PRNGKeyArray:
        """Of all runs of a seed: they see the data in one order."""
        return gating.key_for(jax.random.key(seed), "data")

    def order(self, seed: int, steps: int) -> np.ndarray:
        """The examples of so many steps."""
        count, batch = len(self.images.labels), self.config.batch_size
        epochs = -(-steps // (count // batch))
        orders = [
            train.order_of_epoch(self.key(seed), epoch, count, batch)
            for epoch in range(epochs)
        ]
        return np.concatenate(orders)[:steps]

    # -------------------------------------------------------------------- runs

    def run(
        self, case: Case, runs: Sequence[tuple[str, int]], bar: tqdm
    ) -> list[dict[str, Any]]:
        """The results of some heuristics and seeds."""
        arm, begun = ARMS[case.arm], time.perf_counter()
        bar.set_description(f"{case.arm} {case.ratio:g} in {case.budget}")
        closing_steps = arm.closing.steps(case.budget)
        keeps = [keep_top(self.scores(h, s), case.ratio) for h, s in runs]
        bases = [self.base(seed) for _, seed in runs]
        keys = [self.key(seed) for _, seed in runs]
        orders = np.stack([self.order(seed, case.budget) for _, seed in runs])
        doomed = [
            self.doomed(arm, base, keep, key)
            for base, keep, key in zip(bases, keeps, keys, strict=True)
        ]
        # As if all were closed in no time, where units go at once.
        share = arm.closing.share
        sweep = self.closing(case, bases[0], doomed)
        states = sweep.start(keys, bases)
        if share:
            states = self.stepped(sweep, states, orders[:, :closing_steps], bar)
        removed = [
            self.removed(sweep.of(at), train.member_of(states, at), arm, *of)
            for at, of in enumerate(zip(doomed, bases, keys, strict=True))
        ]
        left = [small for small, _, _ in removed]
        removal = [self.tested(small, self.dataset.validation) for small in left]
        sweep = self.plain(left)
        states = sweep.start(keys, left)
        moments = train.stack([moments for _, moments, _ in removed])
        states = states._replace(opt_state={**states.opt_state, "params": moments})
        states = self.stepped(sweep, states, orders[:, closing_steps:], bar)
        lines = []
        for at, (heuristic, seed) in enumerate(runs):
            once = sweep.of(at)
            model = once.whole_model(train.member_of(states, at))
            error, loss = self.tested(model, self.dataset.validation)
            how = f"{case.arm}, {heuristic}, {case.ratio:g} in {case.budget}"
            lines.append(
                {
                    "study": "relocation",
                    "task": f"{self.config.dataset} {self.config.model}",
                    "method": how,
                    **case._asdict(),
                    "heuristic": heuristic,
                    "seed": seed,
                    "metrics": {
                        "validation error": error,
                        "validation loss": loss,
                        "test error": self.tested(model, self.dataset.test)[0],
                        "prepared validation loss": removed[at][2],
                        "removed validation error": removal[at][0],
                        "removed validation loss": removal[at][1],
                        "base test error": self.base_error(seed),
                    },
                    "costs": {},
                    "params": parameters(model),
                    "seconds": (time.perf_counter() - begun) / len(runs),
                }
            )
        return lines

    def doomed(self, arm: Arm, base: models.Model, keep: Keep, key) -> Doomed:
        """What a run has of its own while units close."""
        params = nnx.split(base, nnx.Param, ...)[1]
        shift: Mapping[str, Array] = {}
        if arm.fit == "during":
            shift = self.fit().shift(keep, key, base=nnx.split(base)[1])
        taught = arm.distillation or arm.reconstruction
        teacher = nnx.to_pure_dict(params) if taught else {}
        return Doomed(jax.tree.map(jnp.asarray, keep), shift, teacher)

    def closing(
        self, case: Case, base: models.Model, doomed: Sequence[Doomed]
    ) -> train.Sweep:
        """Runs of an arm, as one program, which is kept."""
        settings = train.stack(doomed)
        key = case.arm, case.budget, len(doomed)
        if key not in self.sweeps:
            how = self.images, self.optimizer, self.structure, ARMS[case.arm]
            member = closing(base, *how, case.budget, self.compute)
            self.sweeps[key] = self.sweep(member, settings, len(doomed))
        return self.sweeps[key].at(settings)

    def plain(self, left: Sequence[models.Model]) -> train.Sweep:
        """Runs of small networks, likewise."""
        key = train.networks.network(left[0]).key, len(left)
        if key not in self.sweeps:
            once = plain(left[0], self.images, self.optimizer, self.compute)
            self.sweeps[key] = self.sweep(
                lambda _: once, np.zeros(len(left)), len(left)
            )
        return self.sweeps[key]

    def sweep(
        self, member: Callable[[Any], train.Training], settings: Any, count: int
    ) -> train.Sweep:
        """So many runs on the devices that the flags ask for."""
        own = devices.members_on(self.config)
        return train.Sweep(member, settings, devices=own, together=count)

    def stepped(
        self, sweep: train.Sweep, states: TrainingState, orders: np.ndarray, bar: tqdm
    ) -> TrainingState:
        """All steps of an order; the host waits for the device now and then."""
        members, steps, _ = orders.shape
        for at in range(0, steps, 50):
            rows = orders[:, at : at + 50]
            states, totals = sweep.epoch(states, self.data, rows, loop=by_step())
            bar.update(members * rows.shape[1])
            bad = np.asarray(totals.first_bad_step)
            if (bad >= 0).any():
                raise FloatingPointError(
                    f"the loss of run {int(np.argmax(bad >= 0))} is not finite at step "
                    f"{int(bad.max())}: lower the learning rate"
                )
            mean = np.mean(totals.sums["loss"] / totals.steps)
            bar.set_postfix_str(f"loss {mean:.3f}")
        return states

    def removed(
        self,
        training: train.Training,
        state: TrainingState,
        arm: Arm,
        doomed: Doomed,
        base: models.Model,
        key: PRNGKeyArray,
    ) -> tuple[models.Model, Any, float]:
        """The smaller network, what the optimiser keeps for it, and the loss before
        units were removed."""
        keep = {name: np.asarray(flags) for name, flags in doomed.keep.items()}
        every = {name: jnp.ones(len(flags)) for name, flags in keep.items()}
        groups = self.structure.groups
        params = relocation.closing(state.params, every, groups, doomed.shift)
        network = training.network
        model = network.whole(network.tree(params, state.rest))
        if arm.fit == "removal":
            graph, whole = nnx.split(model)
            fitted = self.fit()(keep, key, params=whole, base=nnx.split(base)[1])
            model = nnx.merge(graph, fitted)
        before = base
        if arm.closing.share:
            before = l0jax.nnx.fold(model, jax.tree.map(jnp.float32, keep), groups)
        loss = self.tested(before, self.dataset.validation)[1]
        examples = normalised(jnp.asarray(self.images.images[:64]), self.images)
        small = relocation.remove(model, groups, keep, examples)
        _, cut = training.without(state, keep)
        moments = cut.opt_state["params"]
        return small, getattr(moments, "inner", moments), loss

    def _base_error(self, seed: int) -> float:
        return self.tested(self.base(seed), self.dataset.test)[0]

    def tested(self, model: models.Model, part: data.Split) -> tuple[float, float]:
        """Error in per cent and loss on a split."""
        return measured(model, part, self.images, 1000)


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
