"""What a training step costs with gates of each family, and what of it is noise.

    python -m benchmarks.families             # prints ratios and limits
    python -m benchmarks.families --record    # and writes benchmarks/results/

An MLP (784-300-100-10) and LeNet-5 are trained in batches of 100 with a gate on each
unit, and the MLP with one on each weight, beside the same network without gates. The
share of the random numbers is what is saved if the noise is no longer drawn but counted
up, which costs next to nothing. (It would be more than drawing takes alone where XLA
fused it with what a family makes of its noise.) Contenders take turns in one process,
and a ratio is the median over turns. Ten minutes on two cores.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import measure, steps
from l0jax import gates, models
from l0jax.gates import noise

STEPS = 20
KINDS = (
    ("MLP", "group", 1.15),
    ("LeNet-5", "group", 1.05),
    ("MLP", "weight", None),
)
NAMES = {"group": "unit", "weight": "weight"}


def model_of(name: str) -> models.Model:
    if name == "MLP":
        return models.MLP((784, 300, 100, 10), rngs=nnx.Rngs(0))
    return models.LeNet5(rngs=nnx.Rngs(0))


def all_gates() -> dict[str, gates.Gate]:
    """A gate of each family with its default settings, and of each mixture."""
    single = {name: gates.make(name) for name in gates.GATES if name != "mixture"}
    pairs = {
        f"mixture of {name}": gates.Mixture(gates.make_pair(name))
        for name in gates.PAIRS
    }
    return {**single, **pairs}


def counted(key: Any, shape: tuple[int, ...]) -> jax.Array:
    """Numbers in (0, 1) that nobody drew, but which no compiler knows before."""
    first = jax.random.key_data(key).ravel()[0]
    cells = (jax.lax.iota(jnp.uint32, math.prod(shape)) * 40503 + first) % noise.CELLS
    return ((cells.astype(jnp.float32) + 0.5) / noise.CELLS).reshape(shape)


def with_counted_noise(gate: gates.Gate) -> gates.Gate:
    """The same gate, but for its noise."""
    family = type(gate)

    def sample(self, key, logits):
        with mock.patch.object(noise, "uniform", counted):
            return family.sample(self, key, logits)

    # (Another class, so that no compiled program is shared with the family's.)
    other = type(f"Counted{family.__name__}", (family,), {"sample": sample})
    names = [field.name for field in dataclasses.fields(family)]  # pyrefly: ignore
    return other(**{name: getattr(gate, name) for name in names})


def of_family(
    name: str,
    gate: gates.Gate,
    network: str,
    kind: str,
    limit: float | None,
    plain: Callable[[], None],
    turns: int,
) -> dict:
    """A line of the results."""
    model = model_of(network)
    contenders = {
        "no gates": plain,
        "gates": steps.stepper(model, kind, STEPS, gate),
    }
    if gate.random:
        quiet = with_counted_noise(gate)
        contenders["noise counted"] = steps.stepper(model, kind, STEPS, quiet)
    seconds = measure.take_turns(contenders, turns)
    said = "draws nothing"
    if gate.random:
        pairs = zip(seconds["noise counted"], seconds["gates"], strict=True)
        share = max(0.0, 1 - statistics.median(a / b for a, b in pairs))
        said = f"random numbers {100 * share:.0f} % of the step"
    times = measure.milliseconds({n: seconds[n] for n in ("gates", "no gates")}, STEPS)
    return measure.entry(
        f"{network} step, {name} gates on each {NAMES[kind]}, over one without gates",
        measure.ratio(seconds, "gates", "no gates"),
        limit,
        "×",
        f"{said}; {times}",
    )


def main(arguments: Any, families: dict[str, gates.Gate] | None = None) -> list[dict]:
    """A line for each family, network and kind of gates."""
    families = all_gates() if families is None else families
    entries = []
    for network, kind, limit in KINDS:
        plain = steps.stepper(model_of(network), "none", STEPS)
        for name, gate in families.items():
            of = (name.replace("_", " "), gate, network, kind, limit)
            entries.append(of_family(*of, plain, arguments.turns))
    return entries


if __name__ == "__main__":
    measure.run(__doc__, "families", main, turns=7)
