"""Gate families, one file each. A new family is one file and one line in `GATES`."""

from collections.abc import Callable, Mapping

from l0jax.gates.bernoulli import Bernoulli as Bernoulli
from l0jax.gates.clipped import Stretched as Stretched
from l0jax.gates.continuous_sparsification import (
    ContinuousSparsification as ContinuousSparsification,
)
from l0jax.gates.d_gating import DGating as DGating
from l0jax.gates.gate import Gate as Gate
from l0jax.gates.hard_concrete import HardConcrete as HardConcrete
from l0jax.gates.hard_kumaraswamy import HardKumaraswamy as HardKumaraswamy
from l0jax.gates.hard_sigmoid import HardSigmoid as HardSigmoid
from l0jax.gates.information_bottleneck import (
    InformationBottleneck as InformationBottleneck,
)
from l0jax.gates.mixture import Mixture as Mixture
from l0jax.gates.pairs import PAIRS as PAIRS
from l0jax.gates.pairs import Pair as Pair
from l0jax.gates.relaxed_mixture import RelaxedMixture as RelaxedMixture
from l0jax.gates.smooth_step import SmoothStep as SmoothStep
from l0jax.gates.stochastic import Stochastic as Stochastic
from l0jax.gates.variational_dropout import VariationalDropout as VariationalDropout

GATES: dict[str, type[Gate]] = {
    "bernoulli": Bernoulli,
    "continuous_sparsification": ContinuousSparsification,
    "d_gating": DGating,
    "hard_concrete": HardConcrete,
    "hard_kumaraswamy": HardKumaraswamy,
    "hard_sigmoid": HardSigmoid,
    "information_bottleneck": InformationBottleneck,
    "mixture": Mixture,
    "relaxed_mixture": RelaxedMixture,
    "smooth_step": SmoothStep,
    "stochastic": Stochastic,
    "variational_dropout": VariationalDropout,
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
