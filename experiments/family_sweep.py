"""One gate family in one program: all its seeds at several λ, or several budgets."""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from tqdm import tqdm

from experiments import mnist
from experiments.family_settings import LEAK, VARIANTS, Config
from experiments.harness import devices
from experiments.mnist_evaluation import Seen, counter, sizes_of, to_floats, undecided
from experiments.tasks import data
from l0jax import gates, gating, train
from l0jax.checkpoints import Checkpoints

GRADIENT_DRAWS = 32
SAMPLED_NETWORKS = 5
COSTS = ("weights", "macs")


class Swept(NamedTuple):
    """The members of a family after training, and what was measured on the way."""

    states: train.TrainingState
    variance: list[float]
    milliseconds: float


class Family:
    """One family on the network, at several λ or targets and with several seeds.

    Args:
        config: of the comparison.
        name: of the family, in `VARIANTS`.
        kind: what members differ in beside the seed, "lam" or "target".
        members: of each its value and its seed.
        dataset: what they are trained on.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        kind: str,
        members: list[tuple[float, int]],
        dataset: data.Dataset,
    ):
        self.config, self.name, self.kind = config, name, kind
        self.members, self.dataset = members, dataset
        its = mnist.Config(
            dataset=config.dataset,
            model=config.model,
            epochs=config.epochs,
            gate_learning_rate=config.gate_learning_rate,
            compact=False,
            **VARIANTS[name],
        )
        gate = mnist.check(its)
        if isinstance(gate, gates.Mixture):
            its = dataclasses.replace(its, beta_end=gate.scale_at_leak(LEAK))
        if kind == "target":
            share: dict[str, Any] = {f"target_{config.target_of}": members[0][0]}
            its = dataclasses.replace(its, **share)
        self.settings, self.gate = its, gate
        self.keys = [jax.random.key(seed) for _, seed in members]
        model = mnist.network(its, dataset, self.keys[0])
        once = mnist.training_of(its, gate, dataset, model)
        self.once = once.replace(compute=devices.dtype_of(config))
        self.sweep = train.Sweep(
            self.member,
            np.asarray([value for value, _ in members], np.float32),
            devices=devices.members_on(config),
        )

    def member(self, value: Any) -> train.Training:
        """The training at a λ or a target, which may be traced."""
        if self.kind == "lam":
            price = value / len(self.dataset.train.labels)
            return self.once.replace(price=dict.fromkeys(self.once.gated, price))
        assert self.once.target is not None
        target = dataclasses.replace(self.once.target, share=value)
        return self.once.replace(target=target)

    def run(self, folder: Path, bar: tqdm) -> Swept:
        """Trains all members, or goes on with them."""
        bar.set_description(self.name)
        batch_size, count = self.settings.batch_size, len(self.members)
        on_device = jax.tree.map(jnp.asarray, tuple(self.dataset.train))
        examples = len(on_device[1])
        batch = jax.tree.map(lambda a: a[:batch_size], on_device)
        networks = {
            seed: mnist.network(self.settings, self.dataset, jax.random.key(seed))
            for seed in {seed for _, seed in self.members}
        }
        begun_with = [networks[seed] for _, seed in self.members]
        states = self.sweep.start(self.keys, begun_with)
        where = folder / "checkpoints" / f"{self.name}-{self.kind}-{count}"
        checkpoints = Checkpoints(where)
        first, fastest, variance = 1, math.inf, []
        found = checkpoints.restore(lambda _: states._asdict(), tqdm.write)
        if found is not None:
            first, states = found[0] + 1, train.TrainingState(**found[1])
            fastest, variance = found[2]["fastest"], found[2]["variance"]
            bar.update(first - 1)
        for epoch in range(first, self.config.epochs + 1):
            begun = time.perf_counter()
            orders = jnp.stack(
                [
                    train.order_of_epoch(k, epoch, examples, batch_size)
                    for k in self.keys
                ]
            )
            states, totals = self.sweep.epoch(states, on_device, orders)
            loss = np.asarray(totals.sums["loss"] / totals.steps)
            # (The first one compiles, and whatever else runs slows some.)
            fastest = min(fastest, time.perf_counter() - begun)
            if epoch == max(self.config.epochs // 4, 1):
                variance = self.gradient_variances(states, batch)
            bar.set_postfix_str(f"loss {np.nanmin(loss):.3f} to {np.nanmax(loss):.3f}")
            bar.update()
            if epoch % self.config.checkpoint_every == 0 or epoch == self.config.epochs:
                notes = {"fastest": fastest, "variance": variance}
                checkpoints.save(epoch, states._asdict(), notes)
        steps = examples // batch_size * count
        return Swept(states, variance, 1e3 * fastest / steps)

    def gradient_variances(self, states: train.TrainingState, batch) -> list[float]:
        """Of each member: the variance over draws of the gates of the derivative of the
        loss in a logit, at one batch; the mean over all logits."""

        @jax.jit
        def variance(state, value, keys):
            training = self.member(value)

            def total(own, key):
                one = state._replace(key=key)
                return training.total(one, batch, state.params, own)

            def slopes(key):
                return jax.grad(total, has_aux=True)(state.gates, key)[0]["logits"]

            found = jax.lax.map(slopes, keys)
            variances = [jnp.var(g, axis=0, ddof=1) for g in found.values()]
            return jnp.concatenate(variances).mean()

        keys = jax.random.split(jax.random.key(0), GRADIENT_DRAWS)
        states = jax.device_get(states)
        return [
            float(variance(train.member_of(states, at), np.float32(value), keys))
            for at, (value, _) in enumerate(self.members)
        ]

    # ---------------------------------------------------------------- evaluation

    def lines(self, swept: Swept) -> list[dict[str, Any]]:
        """Of each member one for each test-time rule."""
        counted = counter(self.once.structure)
        # A member taken out on the devices makes them meet, and they wait for one that
        # is still busy with the member before for 40 seconds at most.
        states = jax.device_get(swept.states)
        found = []
        for at, (value, seed) in enumerate(self.members):
            state = train.member_of(states, at)
            for line in self.evaluated(value, state, self.keys[at], counted):
                strength = f"{'λ' if self.kind == 'lam' else self.kind} {value:g}"
                line |= {
                    "study": "families",
                    "task": f"{self.config.dataset} {self.config.model}",
                    "method": f"{self.name}, {strength}, {line['rule']}",
                    "family": self.name,
                    "lam": None,
                    "target": None,
                    self.kind: value,
                    "seed": seed,
                    "gradient_variance": swept.variance[at],
                    "step_ms": swept.milliseconds,
                }
                found.append(line)
        return found

    def evaluated(
        self, value: float, state: train.TrainingState, key: PRNGKeyArray, counted
    ) -> Iterator[dict[str, Any]]:
        """What each rule makes of a member."""
        once, dataset = self.once, self.dataset
        keys = jax.random.split(gating.key_for(key, "networks"), SAMPLED_NETWORKS)
        found = jax.device_get(_facts(once, rules_of(self.gate), state, keys))
        active, sizes = found["active"], sizes_of(once)
        dense = to_floats(counted({}))

        def decision(z, rule="drawn"):
            return train.Decision(rule, z, active, {})

        def error(decision, split):
            seen = Seen.of(once, state, decision)
            return seen, seen.error(split)

        draws = [train.member_of(found["drawn"], at) for at in range(len(keys))]
        sampled = [error(decision(z), dataset.validation)[1] for z in draws]
        decided = {rule: decision(z, rule) for rule, z in found["decided"].items()}
        if self.kind == "target":
            decided["budget"] = self.member(value).decide(state)
        for rule, its in decided.items():
            seen, validation = error(its, dataset.validation)
            left = to_floats(counted(seen.decided()))
            line = {
                "rule": rule,
                "metrics": {
                    "validation error": validation,
                    "test error": seen.error(dataset.test),
                    "sampled validation error": float(np.mean(sampled)),
                },
                "costs": {name: left[name] / dense[name] for name in COSTS},
                "architecture": "-".join(str(int(k.sum())) for k in seen.keep.values()),
                **{name: round(left[name]) for name in COSTS},
                **{f"dense_{name}": round(dense[name]) for name in COSTS},
                "expected_l0": float(
                    sum((sizes[n] * p).sum() for n, p in active.items())
                ),
                "test_l0": float(
                    sum((sizes[n] * (z != 0)).sum() for n, z in its.z.items())
                ),
                "undecided": undecided(found["paid"]) if self.gate.bounded else None,
            }
            yield line | {"verdict": verdict(line)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _facts(training: train.Training, rules: tuple[str, ...], state, keys):
    """What is known of the gates of a member."""
    learned = training.gating
    assert isinstance(learned, train.Learned)
    _, own = training.averaged(state)
    gate, logits = learned.at(own, state.step), own["logits"]
    return {
        "active": gating.prob_active(gate, logits),
        "paid": gating.l0_term(gate, logits),
        # Mapped, for written out they would take longest of all to compile.
        "drawn": jax.lax.map(lambda key: gating.sample(key, gate, logits), keys),
        "decided": {rule: gating.deterministic(gate, logits, rule) for rule in rules},
    }


def rules_of(gate: gates.Gate) -> tuple[str, ...]:
    """The test-time rules that are compared: those that remove units."""
    its = tuple(rule for rule in ("paper", "median") if rule in gate.rules)
    return its + tuple(gating.RULES)


def verdict(line: dict[str, Any]) -> str:
    """In words: what went wrong with a run, if anything did."""
    said = []
    widths = [int(width) for width in line["architecture"].split("-")]
    if not math.isfinite(line["expected_l0"]):
        return "diverged"
    if 0 in widths:
        return "a layer has collapsed: λ is too large"
    if line["costs"]["weights"] > 0.9:
        said.append("nearly nothing removed: λ is too small")
    error = line["metrics"]["validation error"]
    if error > 10:
        said.append("most of what was learned is lost: λ is too large")
    if line["undecided"] is not None and line["undecided"] > 0.2:
        said.append(f"{100 * line['undecided']:.0f} % of the gates are undecided")
    gap = error - line["metrics"]["sampled validation error"]
    if abs(gap) > 1:
        better = "better" if gap < 0 else "worse"
        said.append(
            f"the test-time rule is {abs(gap):.1f} points {better} than sampled gates"
        )
    return "; ".join(said) or "fine"
