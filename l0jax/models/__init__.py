"""Networks in Flax NNX at any widths. A new one is one file and one line in `MODELS`.

Widths are data: a shrunk network is the same class with smaller arrays. Each model has
`architecture`, the arguments that rebuild its present shape, an `example` of its input
to trace it with, an `edit` of what `trace` finds (names; the mask of the inputs that
are read) and the `charges` of each unit.
"""

from collections.abc import Mapping

from flax import nnx

from l0jax.models.lenet5 import LeNet5 as LeNet5
from l0jax.models.mlp import MLP as MLP
from l0jax.structure import Structure
from l0jax.tracing import trace

Model = MLP | LeNet5

MODELS: dict[str, type[MLP] | type[LeNet5]] = {"mlp": MLP, "lenet5": LeNet5}


def make(name: str, architecture: Mapping, *, rngs: nnx.Rngs) -> Model:
    """The model called `name`, of the given architecture.

    Raises:
        ValueError: if no model has that name; the message lists those that exist.
    """
    if name not in MODELS:
        raise ValueError(
            f"unknown model {name!r}; there is {', '.join(sorted(MODELS))}"
        )
    return MODELS[name](**architecture, rngs=rngs)


def structure(model: Model) -> Structure:
    """The units of `model`, as `trace` reads them and the model edits them."""
    return model.edit(trace(model, model.example))


def check(model: Model) -> None:
    """Raises ValueError unless `model.reads` marks one feature for each row that reads.

    The mask is data, so that no shape tells.
    """
    marked, rows = int(model.reads[...].sum()), model.architecture["reads"]
    if marked != rows:
        raise ValueError(
            f"`reads` marks {marked} features, and the layer that reads has {rows} rows"
        )


def name_of(model: nnx.Module) -> str:
    """The name under which `model` stands in `MODELS`.

    Raises:
        ValueError: if its class is not registered.
    """
    for name, kind in MODELS.items():
        if type(model) is kind:
            return name
    raise ValueError(
        f"{type(model).__name__} is not in MODELS; there is {', '.join(sorted(MODELS))}"
    )
