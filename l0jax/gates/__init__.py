"""Gate families, one file each. A new family is one file and one line in `GATES`."""

from collections.abc import Callable, Mapping

from l0jax.gates.clipped import Stretched as Stretched
from l0jax.gates.gate import Gate as Gate
from l0jax.gates.hard_concrete import HardConcrete as HardConcrete
from l0jax.gates.hard_kumaraswamy import HardKumaraswamy as HardKumaraswamy
from l0jax.gates.mixture import Mixture as Mixture
from l0jax.gates.pairs import PAIRS as PAIRS
from l0jax.gates.pairs import Pair as Pair
from l0jax.gates.stochastic import Stochastic as Stochastic

GATES: dict[str, type[Gate]] = {
    "hard_concrete": HardConcrete,
    "hard_kumaraswamy": HardKumaraswamy,
    "mixture": Mixture,
    "stochastic": Stochastic,
}


def make(name: str, **hyperparameters) -> Gate:
    """The gate family called `name`.

    Raises:
        ValueError: if no family has that name; the message lists those that exist.
    """
    return _known(GATES, "gate", name)(**hyperparameters)


def make_pair(name: str, **hyperparameters) -> Pair:
    """The pair of distributions called `name`, for `Mixture`.

    Raises:
        ValueError: if no pair has that name; the message lists those that exist.
    """
    return _known(PAIRS, "pair", name)(**hyperparameters)


def _known(registry: Mapping[str, Callable], kind: str, name: str) -> Callable:
    if name not in registry:
        known = ", ".join(sorted(registry))
        raise ValueError(f"unknown {kind} {name!r}; there is {known}")
    return registry[name]
