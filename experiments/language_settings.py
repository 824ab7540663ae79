"""Settings of `experiments.language_model`, and which of them can't be run."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from experiments.harness import devices, ranges
from experiments.tasks import text
from l0jax import costs

LATENCY = "latency"
KINDS = ("heads", "hidden", "stream", "branches", "queries", "rotations", "values")
"""What can be gated: heads of keys and values with their queries, feed-forward units,
the stream, whole branches; queries of all heads, and dimensions of heads."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Adam with decoupled weight decay, warmed up, then along a cosine to a tenth."""

    epochs: int = 2
    """passes over the windows of the training text"""
    apart: float = 0.5
    """what lies between the beginnings of two windows, as a share of their length"""
    batch_size: int = 16
    """windows of a step"""
    learning_rate: float = 1.5e-3
    """at its highest"""
    weight_decay: float = 0.1
    """of matrices"""
    warm_up: float = 0.05
    """share of the steps"""


@dataclasses.dataclass(frozen=True)
class Config(devices.OnHosts):
    """Take a share out of a language model."""

    method: tuple[str, ...] = ("l0_hard_concrete",)
    """which methods, or all"""
    text: str = "tiny_shakespeare"
    """a text of `experiments.tasks.text`"""
    layers: int = 6
    """blocks of the base"""
    width: int = 192
    """of its stream"""
    heads: int = 6
    """heads of keys and values"""
    queries: int = 1
    """heads that share each of them"""
    dim: int = 32
    """of a head, even"""
    hidden: int = 512
    """feed-forward units of a block"""
    length: int = 128
    """characters of a window, and positions of the model"""
    gated: tuple[str, ...] = ("heads", "hidden", "stream")
    """what may go: heads, hidden, stream, branches, queries, rotations, values"""
    cost: Literal["params", "macs", "latency"] = "params"
    """of what a share is left; latency is in seconds at batch 1, measured of the base
    with a part of its heads and feed-forward units"""
    left: float = 0.5
    """the share"""
    shape: dict[str, int] = dataclasses.field(default_factory=dict)
    """in the place of a share the shape of what is left, such as `heads 3 hidden 256
    stream 128`: so many units of each group of a kind, each with a multiplier of its
    own"""
    base: Recipe = Recipe()
    """how the base is trained"""
    tune: Recipe = Recipe(epochs=2, apart=1.0, learning_rate=5e-4, warm_up=0.02)
    """how it is trained after that, for choosing and for tuning what is left; all
    methods take as many epochs of this, but for new networks, which take as much text
    as the base and all that is after it, by the recipe of the base"""
    closing: int = 1
    """epochs of these in which gates are trained or units close"""
    reached: float = 0.3
    """share of the closing over which the expected cost falls to what may be left, for
    gates of which something is expected"""
    distil: bool = False
    """what is trained after the base also learns from what the base says"""
    gate_learning_rate: float = 0.2
    """of Adam, for the logits of gates; a tenth of it for factors (D-Gating)"""
    multiplier_rate: float = 5e-2
    """of gradient ascent, for the multiplier of the target"""
    keep_prob: float = 0.95
    """of gates at the start"""
    price: float = 1e-8
    """of a weight, for gates that no target pushes (D-Gating)"""
    judged_by: int = 64
    """windows of the training text that scores look at"""
    base_from: Path | None = None
    """folder of a run whose bases are taken"""
    seeds: tuple[int, ...] = (0,)
    """of weights, gates and the order of the text"""
    out: Path | None = None
    """run folder; None is runs/<text>-decoder-<digest of the configuration>"""
    progress: bool = True
    """show a progress bar"""


QUICK: dict[str, Any] = {
    **{"text": "reference", "layers": 2, "width": 48, "heads": 3, "dim": 16},
    **{"hidden": 96, "length": 64, "judged_by": 16, "closing": 1},
    "method": ("l0_hard_concrete", "taylor", "uniform"),
    "base": Recipe(epochs=1, batch_size=32, learning_rate=3e-3),
    "tune": Recipe(epochs=2, batch_size=32, learning_rate=1e-3, warm_up=0.02),
}
SIZES = ("layers", "width", "heads", "queries", "dim", "hidden", "length")
RANGES = {
    "be at least 1": (*SIZES, "judged_by"),
    "be > 0": ("gate_learning_rate", "multiplier_rate", "price"),
    "lie in [0, 1]": ("reached",),
    "lie in (0, 1)": ("left", "keep_prob"),
}
OF_BASE = ("text", *SIZES, "base", "compute")
"""Settings that decide the base."""
UNTOLD = ("method", "seeds", "out", "base_from", "progress", *devices.PLACES)
"""Settings that don't change what a single run gives."""


def check(config: Config, known: Collection[str]) -> None:
    """Raises ValueError for what can't be run."""
    for name, there, given in (
        ("method", known, config.method),
        ("kind", KINDS, config.gated),
        ("text", text.TEXTS, (config.text,)),
        ("cost", (*costs.COSTS, LATENCY), (config.cost,)),
    ):
        for each in given:
            if each not in there:
                raise ValueError(
                    f"unknown {name} {each!r}; there is {', '.join(there)}"
                )
    if not config.method or not config.seeds or not config.gated:
        raise ValueError("give at least one method, one seed and one kind of units")
    ranges.check(config, RANGES)
    if config.dim % 2:
        raise ValueError(f"dim must be even, for pairs turn together, got {config.dim}")
    check_shape(config)
    timed = {"heads", "hidden", "branches"}
    if config.cost == LATENCY and not timed >= {*config.gated}:
        raise ValueError(
            f"seconds are measured for heads, hidden and branches; gated are "
            f"{', '.join(config.gated)}"
        )
    if not 1 <= config.closing < config.tune.epochs:
        raise ValueError(
            f"closing is {config.closing} epochs of the {config.tune.epochs} that "
            "there are after the base, of which at least one is for what is left; give "
            "at least 1, and more with tune.epochs"
        )
    if config.length < 2:
        raise ValueError(f"length must be at least 2, got {config.length}")
    devices.check(config, config.base.batch_size, config.tune.batch_size)
    for name in ("base", "tune"):
        recipe = getattr(config, name)
        if recipe.epochs < 1 or recipe.batch_size < 1:
            raise ValueError(
                f"{name} needs at least one epoch and one window a batch, got "
                f"{recipe.epochs} and {recipe.batch_size}"
            )
        if not 0 < recipe.apart <= 1:
            raise ValueError(f"{name}.apart must lie in (0, 1], got {recipe.apart}")
        if not recipe.learning_rate > 0 or not 0 <= recipe.warm_up < 1:
            raise ValueError(
                f"{name} needs a learning rate above 0 and a warm-up in [0, 1), got "
                f"{recipe.learning_rate} and {recipe.warm_up}"
            )


def check_shape(config: Config) -> None:
    """Raises ValueError for a shape that the base can't be brought to."""
    if not config.shape:
        return
    sizes = {
        **{"heads": config.heads, "hidden": config.hidden, "stream": config.width},
        **{"branches": 2 * config.layers, "queries": config.queries},
        **{"rotations": config.dim // 2, "values": config.dim},
    }
    if set(config.shape) != set(config.gated):
        raise ValueError(
            f"a shape is given of {', '.join(config.shape)}, and gated are "
            f"{', '.join(config.gated)}: give a number for each of these"
        )
    for name, count in config.shape.items():
        if count > sizes[name]:
            raise ValueError(
                f"the shape has {count} {name}, and the base has {sizes[name]}"
            )
        if count < 1:
            raise ValueError(
                f"the shape has {count} {name}: what reads them would be there for "
                "nothing; give at least 1, and branches to take whole ones out"
            )
