"""What multiplies the weights in training: gates that are learned, gates that close on
a schedule, gates that stay as they are, or none.

That is all in which L0 regularisation, soft knowledge relocation, fine-tuning of chosen
units and plain training differ. Each is a frozen dataclass; what it trains are arrays
of its own, which it makes and reads.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from l0jax import gating, units
from l0jax.constraints import Number
from l0jax.estimators import Estimator
from l0jax.gates.bernoulli import Bernoulli
from l0jax.gates.gate import Gate
from l0jax.methods import relocation
from l0jax.units import Groups, Keep

Vectors = dict[str, Float[Array, " units"]]
Own = dict[str, Any]
Step = Int[Array, ""]

SAMPLES = "samples"


Temperature = optax.Schedule | tuple[float, float]
"""A schedule over steps, or the lowest and the highest value of one that is trained."""


@runtime_checkable
class Gating(Protocol):
    """What multiplies the weights."""

    @property
    def key(self) -> Any:
        """Hashable, and equal for gatings that do the same."""
        ...

    def groups(self, groups: Groups) -> Groups:
        """Those of the groups that it multiplies."""
        ...

    def init(self, key: PRNGKeyArray, groups: Groups) -> Own:
        """Its own arrays before the first step, all of which are trained."""
        ...

    def value(
        self,
        params: PyTree,
        own: Own,
        step: Step,
        key: PRNGKeyArray,
        groups: Groups,
        of: Callable[[PyTree], tuple[Float[Array, ""], Any]],
    ) -> tuple[Float[Array, ""], Any]:
        """The value of a loss and what else it gives, at multiplied parameters."""
        ...

    def terms(self, own: Own, step: Step) -> Vectors:
        """P(z != 0) of every unit as it is paid for; nothing if it isn't learned."""
        ...

    def norm_share(self, own: Own, step: Step) -> Number:
        """Which share of the price the squared norms of the weights pay."""
        ...

    def there(self, own: Own, step: Step) -> Vectors | None:
        """P(z != 0), where `terms` are something else."""
        ...

    def project(self, own: Own, step: Step) -> Own:
        """Its arrays after a step, where they may not take any value."""
        ...

    def decide(
        self, own: Own, step: Step, rule: str, key: PRNGKeyArray
    ) -> tuple[Vectors, Vectors]:
        """Gates at test time, and P(z != 0)."""
        ...

    def fold(self, params: PyTree, own: Own, z: Vectors, groups: Groups) -> PyTree:
        """Parameters with gates of test time multiplied in."""
        ...

    def smaller(self, keep: Keep, masks: units.Masks) -> "Gating":
        """The same for the units that are kept, and for the positions of parameters
        that are left."""
        ...


@dataclasses.dataclass(frozen=True)
class Learned:
    """Gates whose logits are trained beside the weights.

    Args:
        gate: the family.
        keep_prob: initial keep probability, one number or one per group.
        temperature: of the gates, if it is annealed or trained.
        per_example: draw the gates for each example rather than once for the batch.
        estimator: of the gradient in the logits of Bernoulli gates, one of
            `l0jax.estimators`; None is that of `Bernoulli.sample`, straight-through.
        rule: by which gates are set at test time, if no other is asked for: one of the
            family, of `gating.RULES`, or "samples", the mean of many draws.
        draws: of each gate by the rule "samples".
        only: names of the groups that have gates; None: all.

    Raises:
        ValueError: if an estimator is given for gates that aren't Bernoulli, or for
            gates per example; for a rule or a temperature that there is not.
    """

    gate: Gate
    keep_prob: Number | Mapping[str, Number] = 0.8
    temperature: Temperature | None = None
    per_example: bool = False
    estimator: Estimator | None = None
    rule: str = "paper"
    draws: int = 100
    only: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.estimator is not None and not isinstance(self.gate, Bernoulli):
            raise ValueError(
                f"an estimator is given, but {type(self.gate).__name__} gates have "
                "gradients of their own; only Bernoulli gates need one"
            )
        if self.estimator is not None and self.per_example:
            raise ValueError(
                "an estimator draws the gates once for a batch, not per example"
            )
        rules = (*self.gate.rules, *gating.RULES, SAMPLES)
        if self.rule not in rules:
            raise ValueError(
                f"unknown test-time rule {self.rule!r} for {type(self.gate).__name__}; "
                f"there is {', '.join(rules)}"
            )
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")
        if isinstance(self.temperature, tuple):
            low, high = self.temperature
            if not 0 < low < high:
                raise ValueError(
                    f"a temperature that is trained lies between two numbers that rise "
                    f"from above 0, got {low} and {high}"
                )

    @property
    def key(self) -> Any:
        """All fields."""
        keep_prob = self.keep_prob
        if isinstance(keep_prob, Mapping):
            keep_prob = tuple(keep_prob.items())
        drawn = self.temperature, self.per_example, self.estimator
        return type(self), self.gate, keep_prob, drawn, self.rule, self.draws, self.only

    def groups(self, groups: Groups) -> Groups:
        """All, or those that are named."""
        if self.only is None:
            return groups
        unknown = [name for name in self.only if name not in groups]
        if unknown:
            raise ValueError(
                f"unknown group {unknown[0]!r}; there is {', '.join(groups) or 'none'}"
            )
        return {name: groups[name] for name in self.only}

    def init(self, key: PRNGKeyArray, groups: Groups) -> Own:
        """Logits, and the logarithm of a temperature that is trained."""
        keep_prob: Any = self.keep_prob
        own: Own = {
            "logits": gating.init(
                gating.key_for(key, "gates"), self.gate, groups, keep_prob
            )
        }
        if isinstance(self.temperature, tuple):
            own["log_temperature"] = jnp.log(jnp.float32(self.gate.temperature))
        return own

    def at(self, own: Own, step: Step) -> Gate:
        """The family with its temperature at a step."""
        if self.temperature is None:
            return self.gate
        if isinstance(self.temperature, tuple):
            return self.gate.at_temperature(jnp.exp(own["log_temperature"]))
        return self.gate.at_temperature(jnp.asarray(self.temperature(step)))

    def value(self, params, own, step, key, groups, of):
        """At gates that are drawn."""
        now = self.at(own, step)

        def at(z):
            return of(self.fold(params, own, z, groups))

        if self.estimator is not None and isinstance(now, Bernoulli):
            logits = now.natural(own["logits"])
            return self.estimator(key, logits, at, has_aux=True)
        return at(gating.sample(key, now, own["logits"]))

    def terms(self, own, step):
        """What units pay."""
        return gating.l0_term(self.at(own, step), own["logits"])

    def norm_share(self, own, step):
        """As the family has it."""
        return self.at(own, step).norm_share

    def there(self, own, step):
        """Of gates whose price is no probability."""
        now = self.at(own, step)
        return None if now.bounded else gating.prob_active(now, own["logits"])

    def project(self, own, step):
        """The family's projection, and the bounds of the temperature."""
        if isinstance(self.temperature, tuple):
            low, high = map(math.log, self.temperature)
            within = jnp.clip(own["log_temperature"], low, high)
            own = {**own, "log_temperature": within}
        now = self.at(own, step)
        return {**own, "logits": gating.project(now, own["logits"])}

    def decide(self, own, step, rule, key):
        """By a rule of the family or of `gating.RULES`, or by the mean of draws."""
        now, logits = self.at(own, step), own["logits"]
        if rule == SAMPLES:
            key = gating.key_for(key, "test-time samples")
            z = gating.sample_average(key, now, logits, self.draws)
        else:
            z = gating.deterministic(now, logits, rule)
        return z, gating.prob_active(now, logits)

    def fold(self, params, own, z, groups):
        """Where a unit is read."""
        return units.apply_gates(params, z, groups)

    def smaller(self, keep, masks):
        """The same: its logits are in the state."""
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """Units that were chosen before: the others are closed on a schedule, or closed
    from the start, while the weights go on training (Salzinger 2020).

    Args:
        keep: a boolean vector for each group that loses units; in a sweep a member's,
            as its shift.
        closing: the curve along which doomed units close, and which share of `steps` it
            takes; None: they are closed from the first step on.
        steps: of the training.
        shift: what is added to arrays as the units close, by path; see
            `l0jax.methods.relocation.LeastSquares`.

    Raises:
        ValueError: if there is a closing and no number of steps.
    """

    keep: Mapping[str, Bool[Array | np.ndarray, " units"]]
    closing: relocation.Closing | None = None
    steps: int = 0
    shift: Mapping[str, Array] | None = None

    def __post_init__(self):
        if self.closing is not None and self.steps < 1:
            raise ValueError(
                f"a closing takes a share of the steps; give steps, got {self.steps}"
            )

    @property
    def key(self) -> Any:
        """Flags are arguments of the program: only their sizes count."""
        sizes = tuple((name, len(flags)) for name, flags in self.keep.items())
        return (
            Chosen,
            sizes,
            self.closing,
            self.steps,
            id(self) if self.shift else None,
        )

    def groups(self, groups: Groups) -> Groups:
        """Those that lose units."""
        units.check_lengths(self.keep, groups)
        return {name: groups[name] for name in self.keep}

    def init(self, key: PRNGKeyArray, groups: Groups) -> Own:
        """The flags, which aren't trained."""
        del key, groups
        return {"keep": {n: jnp.asarray(f, bool) for n, f in self.keep.items()}}

    def value(self, params, own, step, key, groups, of):
        """At gates that are closed as far as the schedule says."""
        if self.closing is None:
            z = {n: jnp.float32(f) for n, f in own["keep"].items()}
            return of(units.apply_gates(params, z, groups))
        share = jnp.minimum(step / max(self.closing.steps(self.steps), 1), 1.0)
        z = self.closing.gates(own["keep"], share, key)
        done = 1 - relocation.CURVES[self.closing.curve](share)
        return of(relocation.closing(params, z, groups, self.shift, done))

    def terms(self, own, step):
        """Nothing is paid for."""
        return {}

    def norm_share(self, own, step):
        """None."""
        return 0.0

    def there(self, own, step):
        """Nothing is paid."""
        return None

    def project(self, own, step):
        """They stay what they are."""
        return own

    def decide(self, own, step, rule, key):
        """The flags, whatever the rule; while doomed units close they are there."""
        z = {name: jnp.float32(flags) for name, flags in own["keep"].items()}
        over = self.closing is None or step >= self.closing.steps(self.steps)
        return z, {name: jnp.where(over, flags, 1.0) for name, flags in z.items()}

    def fold(self, params, own, z, groups):
        """Where a unit is read, and the shift that makes up for it."""
        return relocation.closing(params, z, groups, self.shift, 1.0)

    def smaller(self, keep, masks):
        """Of the units that are left."""
        left = {
            name: np.asarray(flags)[keep[name]] if name in keep else flags
            for name, flags in self.keep.items()
        }
        shift = self.shift
        if shift:
            shift = {path: units.take(a, path, masks) for path, a in shift.items()}
        return dataclasses.replace(self, keep=left, shift=shift)


@dataclasses.dataclass(frozen=True)
class Ungated:
    """No gates: plain training, of base networks and of controls."""

    @property
    def key(self) -> Any:
        """Equal to any other."""
        return Ungated

    def groups(self, groups: Groups) -> Groups:
        """None."""
        return {}

    def init(self, key: PRNGKeyArray, groups: Groups) -> Own:
        """Nothing."""
        return {}

    def value(self, params, own, step, key, groups, of):
        """At the parameters as they are."""
        return of(params)

    def terms(self, own, step):
        """Nothing."""
        return {}

    def norm_share(self, own, step):
        """None."""
        return 0.0

    def there(self, own, step):
        """Nothing is paid."""
        return None

    def project(self, own, step):
        """Nothing."""
        return own

    def decide(self, own, step, rule, key):
        """Nothing."""
        return {}, {}

    def fold(self, params, own, z, groups):
        """The parameters as they are."""
        return params

    def smaller(self, keep, masks):
        """The same."""
        return self


def gating_of(gate: Any) -> Gating:
    """A gating from what a user gives: a gate family, a gating, or None.

    Raises:
        ValueError: for anything else.
    """
    given: object = gate
    if given is None:
        return Ungated()
    if isinstance(given, Gating):
        return given
    if isinstance(given, Gate):
        return Learned(given)
    raise ValueError(
        "gate must be one of l0jax.gates, train.Learned, train.Chosen or None, got "
        f"{gate!r}"
    )
