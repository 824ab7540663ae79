"""What is left at test time: which units, and how much that is of the target."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float

from l0jax.train.gatings import Learned
from l0jax.train.targets import fill

if TYPE_CHECKING:
    from l0jax.train.training import Training, TrainingState

BUDGET = "budget"

# Probabilities of gates that are neither clearly open nor clearly closed.
UNDECIDED = (0.1, 0.9)
MANY_UNDECIDED = 0.2


@dataclasses.dataclass(frozen=True)
class Decision:
    """Gates at test time; prints as a line.

    Attributes:
        rule: by which they were set.
        z: their values.
        prob_active: P(z != 0) in training.
        undecided: of each group the share of gates that are neither clearly open nor
            clearly closed in training.
        target: of each cost that has one the share that may be left.
        expected: the share that is expected to be left in training.
        decided: the share that is left by this decision, counted exactly.
    """

    rule: str
    z: dict[str, Float[np.ndarray, " units"]]
    prob_active: dict[str, Float[np.ndarray, " units"]]
    undecided: dict[str, float]
    target: dict[str, float] = dataclasses.field(default_factory=dict)
    expected: dict[str, float] = dataclasses.field(default_factory=dict)
    decided: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def excess(self) -> dict[str, float]:
        """By which part of the target more is left: 0.05 is 5 % too much."""
        return {n: self.decided[n] / share - 1 for n, share in self.target.items()}

    def __str__(self) -> str:
        said = [
            f"{name}: target {100 * share:.1f} %, expected "
            f"{100 * self.expected[name]:.1f} %, decided {100 * self.decided[name]:.1f}"
            f" % ({100 * self.excess[name]:+.1f} % of the target)"
            for name, share in self.target.items()
        ]
        return f"rule {self.rule!r}" + "".join(f"; {line}" for line in said)


def decide(training: "Training", state: "TrainingState", rule: str | None) -> Decision:
    """See `Training.decide`."""
    target = training.target
    if rule is None:
        rule = getattr(training.gating, "rule", "paper")
        rule = BUDGET if target is not None else rule
    if rule == BUDGET and target is None:
        raise ValueError(
            'the rule "budget" fills a target, and none is given: give target=, or '
            "another rule"
        )
    by_family = getattr(training.gating, "rule", "paper") if rule == BUDGET else rule
    seen = training.placement.on_host(_seen(training, by_family, state))
    z, active, expected = seen["z"], seen["active"], seen["expected"]
    if rule == BUDGET:
        z = _within_budget(training, seen["logits"], seen["mean"], active)
    found = Decision(rule, z, active, undecided(active))
    if target is None:
        return found
    z = training.structure.nested(z)
    found = dataclasses.replace(found, z=dict(z))
    keep = {name: np.asarray(values) != 0 for name, values in z.items()}
    budget = training._budget
    assert budget is not None
    left = budget.left(keep, training.structure)
    if rule == BUDGET and not budget.fits(left):
        said = ", ".join(
            f"{100 * now:.4g} % of {name!r} for {100 * budget.share(name):.4g} %"
            for name, now in left.items()
        )
        warnings.warn(
            f"the budget is exceeded, for groups with an open gate keep a unit: {said}",
            stacklevel=3,
        )
    return dataclasses.replace(
        found,
        target={name: budget.share(name) for name in expected},
        expected={name: float(value) for name, value in expected.items()},
        decided=left,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _seen(training: "Training", rule: str, state: "TrainingState") -> dict[str, Any]:
    """All that a decision needs from the device."""
    params, own = training.averaged(state)
    gating = training.gating
    z, active = gating.decide(own, state.step, rule, state.key)
    seen = {"z": z, "active": active, "expected": {}}
    if isinstance(gating, Learned):
        now = gating.at(own, state.step)
        seen["logits"] = own["logits"]
        seen["mean"] = {name: now.mean(each) for name, each in own["logits"].items()}
    if training._amounts is not None:
        terms = gating.terms(own, state.step)
        if isinstance(gating, Learned) and not gating.gate.bounded:
            terms = active  # What these pay is no probability.
        seen["expected"] = training._amounts.of(params, terms)
    return seen


def _within_budget(training, logits, mean, active) -> dict[str, np.ndarray]:
    """E[z] of the units with the largest logits, as many as fit into the target.

    A group of which training has left any gate open keeps its best unit, so that the
    decision takes no layer away that training did not.
    """
    budget, start = training._budget, {}
    for name, values in logits.items():
        start[name] = np.zeros(len(values), bool)
        if len(values) and active[name].max() >= 0.5:
            start[name][np.argmax(values)] = True

    def left(keep):
        return budget.left(keep, training.structure)

    flat = [(name, at) for name, values in logits.items() for at in range(len(values))]
    ranks = np.argsort(
        -np.concatenate([np.asarray(v) for v in logits.values()]), kind="stable"
    )
    order = [flat[at] for at in ranks if not start[flat[at][0]][flat[at][1]]]
    if isinstance(budget.target.share, Mapping):
        # Each group fills a budget of its own.
        keep = {}
        for name in logits:
            mine = [unit for unit in order if unit[0] == name]

            def fits(flags, name=name):
                return left({**start, **flags})[name] <= budget.share(name) * (1 + 1e-9)

            keep |= fill(mine, {name: start[name]}, fits)
    else:
        wholes = training.structure.wholes
        keep = fill(order, start, lambda flags: budget.fits(left(flags)), wholes)
    return {name: mean[name] * keep[name] for name in logits}


def undecided(active: Mapping[str, Any]) -> dict[str, float]:
    """Of each group the share of gates that are neither clearly open nor closed."""
    low, high = UNDECIDED
    return {
        name: float(np.mean((np.asarray(p) > low) & (np.asarray(p) < high)))
        for name, p in active.items()
        if np.size(p)
    }


def warn_undecided(decision: Decision) -> None:
    """Warns if many gates of a group are undecided."""
    named = [
        f"{name!r} ({100 * share:.0f} %)"
        for name, share in decision.undecided.items()
        if share > MANY_UNDECIDED
    ]
    if named:
        warnings.warn(
            f"gates are undecided in training, P(z != 0) between {UNDECIDED[0]} and "
            f"{UNDECIDED[1]}: {', '.join(named)}; what is decided differs from what "
            "was trained: train longer, or at a higher gate rate, or tune what is left",
            stacklevel=3,
        )
