"""Settings of `experiments.mnist`, and which of them can't be run."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from experiments.harness import ranges, run_folder
from experiments.harness.devices import PLACES, OnHosts
from experiments.tasks import data
from l0jax import constraints, costs, estimators, gates, gating
from l0jax.train.targets import DECIDED

NETWORKS = ("mlp", "lenet5")
"""Of `l0jax.models.MODELS` those without batch normalisation, as in the L0 papers."""

# Fields that say where and how far to run, not what is run.
HOUSEKEEPING = (
    *("out", "resume", "stop_after", "checkpoint_every", "progress"),
    *("dense", *PLACES),
)


RANGES = {
    "be at least 1": (
        *("epochs", "batch_size", "samples", "checkpoint_every", "stop_after"),
    ),
    "be >= 0": ("lam", "learning_rate", "gate_learning_rate"),
    "be > 0": ("beta_end", "multiplier_rate"),
    "lie in [0, 1]": ("decay_from", "target_warm_up"),
    "lie in [0, 1)": ("polyak",),
}


@dataclasses.dataclass(frozen=True)
class Config(OnHosts):
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
    below; decided: λ pushes, and the target is met at test time alone"""
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

    test_rule: str | None = None
    """budget (as many units as fit into the target, the default where there is one),
    paper (of the gate family, the default without), threshold, expected_count, or a
    rule of the family's; mean and samples (their average) remove nothing"""
    samples: int = 100
    """draws that the test rule `samples` averages"""
    validation: float = 1 / 12
    """share of the training set held out for every choice (5,000 of MNIST's 60,000)"""
    seed: int = 0
    """of the initial values, the gates' noise and the order of the examples"""

    dense: Literal["auto", "yes", "no"] = "auto"
    """also train the network without gates, to compare; auto: on the digits"""
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


def scientific(config: Config) -> dict:
    """The fields that decide the result."""
    told = run_folder.settings_of(config, HOUSEKEEPING)
    return told | {"test_rule": rule_of(config)}


def rule_of(config: Config) -> str:
    """By which gates are set at test time."""
    if config.test_rule is not None:
        return config.test_rule
    return "budget" if targets(config) else "paper"


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
    ranges.check(config, RANGES)
    given = targets(config)
    if len(given) > 1:
        raise ValueError(f"give one target, not {' and '.join(given)}")
    if given and config.gates == "none":
        raise ValueError(f"{given[0]} is given, but nothing is gated")
    ways = (*constraints.CONSTRAINTS, DECIDED)
    if config.constraint not in ways:
        raise ValueError(
            f"unknown constraint {config.constraint!r}; there is {', '.join(ways)}"
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
    if given and config.constraint != DECIDED and not gate.bounded:
        raise ValueError(
            f"{given[0]} is given, but what {config.gate!r} gates pay is no "
            f"probability that a target could push: give --constraint {DECIDED}, and λ"
        )
    rules = (*gate.rules, *gating.RULES, "samples", *(["budget"] if given else []))
    if rule_of(config) not in rules:
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
