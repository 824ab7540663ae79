"""What is evaluated of a gated network of `experiments.mnist`, and what it costs."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.tasks.data import Split
from l0jax import costs, models, objectives, units
from l0jax.compaction import removable
from l0jax.structure import Structure
from l0jax.train import Decision, Training, TrainingState, deciding

EVALUATION_BATCH = 2500


@dataclasses.dataclass(frozen=True)
class Seen:
    """A training at the end of an epoch: what is evaluated.

    Attributes:
        training, state: as they are.
        decision: the gates at test time, and their probabilities.
        model: the network with its gates folded in.
        keep: which units of each group something is left of.
    """

    training: Training
    state: TrainingState
    decision: Decision
    model: models.Model
    keep: dict[str, np.ndarray]

    @classmethod
    def of(
        cls, training: Training, state: TrainingState, rule: str | Decision
    ) -> "Seen":
        """What a rule decides, or has decided."""
        decision = rule
        if not isinstance(decision, Decision):
            decision = training.decide(state, decision if training.learns else None)
        model = training.whole_model(state, decision)
        folded = jax.device_get(nnx.to_pure_dict(nnx.state(model)))
        keep = units.in_use(folded, removable(training.structure.groups))
        return cls(training, state, decision, model, keep)

    def error(self, split: Split) -> float:
        """In per cent, of the examples of a split."""
        all_of = map(self.training.placement.everywhere, batches(split))
        found = self.training.evaluate(self.state, all_of, rule=self.decision)
        count = len(split.labels)
        return 100 * round(found["error"] * count) / count

    def full(self, values: dict[str, Any]) -> dict[str, np.ndarray]:
        """Vectors as they would lie in the whole network."""
        return self.training.full(values)

    def decided(self) -> dict[str, np.ndarray]:
        """What is left of whatever has gates."""
        leaves = units.arrays(nnx.state(self.model))
        left = {
            name: self.keep[name]
            if name in self.keep
            else np.ravel(np.asarray(leaves[name])) != 0
            for name in self.training.gated
        }
        return {n: each.astype(np.float32) for n, each in self.full(left).items()}


def batches(split: Split) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A split in parts that fit into memory."""
    for at in range(0, len(split.labels), EVALUATION_BATCH):
        rows = slice(at, at + EVALUATION_BATCH)
        yield split.images[rows], split.labels[rows]


@functools.lru_cache(maxsize=8)
def sizes_of(training: Training) -> dict[str, np.ndarray]:
    """For how many weights each gate pays."""
    groups, params = training.gated, training.network.params
    found = objectives.sizes(params, groups, training.charges(groups))
    return {name: np.asarray(each) for name, each in found.items()}


def counter(structure: Structure) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function from P(z != 0), or flags, of the whole network to its costs."""

    @jax.jit
    def count(active):
        names = ("weights", *costs.CONVENTIONS)
        return {name: costs.make(name)(structure, active) for name in names}

    return count


def unit_activity(whole: Training, active: dict[str, Any]) -> dict[str, Any]:
    """P(z != 0) per unit of the whole network; of weight gates, the mean over the
    weights that use it."""
    groups = removable(whole.structure.groups)
    if not whole.gated:
        return {name: np.ones(group.size) for name, group in groups.items()}
    if set(whole.gated) == set(groups):
        return active
    params = whole.network.params
    ones = jax.tree.map(jnp.ones_like, params)
    active = jax.tree.map(jnp.asarray, active)
    weighted = units.apply_gates(ones, active, whole.gated)
    totals = {}
    for name, group in groups.items():
        amount = units.charge(lambda a: a, weighted, group.used_by, group.size)
        count = units.charge(lambda a: a, ones, group.used_by, group.size)
        totals[name] = amount / count
    return totals


def undecided(active: dict[str, Any]) -> float:
    """Share of all gates of a network that are neither clearly open nor closed."""
    sizes = {name: len(each) for name, each in active.items()}
    shares = deciding.undecided(active)
    between = sum(sizes[name] * share for name, share in shares.items())
    return between / max(sum(sizes.values()), 1)


def to_floats(tree) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(tree).items()}
