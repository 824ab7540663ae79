"""Settings of `experiments.families`: which families, on what, how strongly."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import optax

from experiments.harness import devices, ranges
from l0jax import gates
from l0jax.estimators import ESTIMATORS

QUICK: dict[str, Any] = {
    **{"dataset": "digits", "lam": (0.03, 0.1), "seeds": 1},
    **{"epochs": 30, "gate_learning_rate": 6e-2},
}
# What a closed gate of a mixture leaks at the end of the run: its pair is annealed to
# that, so that all pairs end equally sharp, as hard concrete gates that are clamped.
LEAK = 0.047

VARIANTS: dict[str, dict[str, Any]] = {
    # name: settings of `experiments.mnist.Config` that make it.
    "hard_concrete": {},
    **{f"mixture-{pair}": {"gate": "mixture", "pair": pair} for pair in gates.PAIRS},
    "relaxed_mixture": {"gate": "relaxed_mixture"},
    "stochastic": {"gate": "stochastic"},
    "hard_kumaraswamy": {"gate": "hard_kumaraswamy"},
    **{
        f"bernoulli-{name}": {"gate": "bernoulli", "estimator": name}
        for name in ESTIMATORS
    },
    "smooth_step": {"gate": "smooth_step"},
    "hard_sigmoid": {"gate": "hard_sigmoid"},
    "continuous_sparsification": {
        "gate": "continuous_sparsification",
        "beta_end": 1 / 200,
    },
    "d_gating": {"gate": "d_gating"},
    "variational_dropout": {"gate": "variational_dropout"},
    "information_bottleneck": {"gate": "information_bottleneck"},
}


def best_mixture() -> gates.Mixture:
    """That of the pair which stands for all of them beside other methods."""
    return gates.Mixture(gates.make_pair("beta"))


def cooled(gate: gates.Gate, steps: int) -> optax.Schedule | None:
    """The temperature of a mixture over so many steps, down to `LEAK`; others keep
    theirs."""
    if not isinstance(gate, gates.Mixture):
        return None
    begin = float(gate.temperature)
    return optax.exponential_decay(begin, steps, gate.scale_at_leak(LEAK) / begin)


@dataclasses.dataclass(frozen=True)
class Config(devices.OnMesh):
    """Compare gate families on one network."""

    mesh: str = ""
    """devices, by the names of axes: members=4 splits the members of a family among
    four; none: as many as are of use"""
    dataset: str = "mnist"
    """a data set of `experiments.mnist`"""
    model: str = "mlp"
    """mlp or lenet5"""
    families: tuple[str, ...] = tuple(VARIANTS)
    """which families"""
    lam: tuple[float, ...] = (0.03, 0.07, 0.15, 0.35)
    """the grid of c in λ = c/N"""
    targets: tuple[float, ...] = ()
    """a grid of budgets: shares of the cost that may be left"""
    target_of: Literal["params", "macs", "bytes"] = "macs"
    """the cost that the budgets are of"""
    seeds: int = 3
    """runs for each family and λ, with seeds 0, 1, …"""
    epochs: int = 30
    """passes over the training set; 200 are the papers' and for a GPU"""
    gate_learning_rate: float = 2e-2
    """of Adam, for the gates; of 5e-3 noisy families have most gates undecided after 30
    epochs"""
    checkpoint_every: int = 10
    """epochs between checkpoints"""
    out: Path | None = None
    """folder; None is runs/families-<dataset>-<model>-<digest of the configuration>"""
    progress: bool = True
    """show a progress bar"""


RANGES = {
    "be at least 1": ("seeds", "epochs", "checkpoint_every"),
    "be >= 0": ("lam",),
    "lie in (0, 1]": ("targets",),
}


def kinds_of(name: str) -> tuple[str, ...]:
    """What a family may be compared at: a price, and a target, but for gates that pay
    something else than a probability, of which no cost is expected."""
    family = gates.GATES[VARIANTS[name].get("gate", "hard_concrete")]
    return ("lam", "target") if family.bounded else ("lam",)


def check(config: Config) -> None:
    """Raises ValueError for what can't be run."""
    for name in config.families:
        if name not in VARIANTS:
            known = ", ".join(VARIANTS)
            raise ValueError(f"unknown family {name!r}; there is {known}")
    ranges.check(config, RANGES)
    if not config.families or not (config.lam or config.targets):
        raise ValueError("give at least one family and one λ or target")
    without = [n for n in config.families if "target" not in kinds_of(n)]
    if config.targets and not config.lam and without == [*config.families]:
        raise ValueError(
            f"nothing is expected to be left of {', '.join(without)}: there is no "
            "target for them, give lam"
        )
    devices.check(config)
