"""Gate families, one file each. A new family is one file and one line in `GATES`."""

from l0jax.gates.gate import Gate as Gate
from l0jax.gates.hard_concrete import HardConcrete as HardConcrete

GATES: dict[str, type[Gate]] = {"hard_concrete": HardConcrete}


def make(name: str, **hyperparameters) -> Gate:
    """The gate family called `name`.

    Raises:
        ValueError: if no family has that name; the message lists those that exist.
    """
    if name not in GATES:
        raise ValueError(f"unknown gate {name!r}; there is {', '.join(sorted(GATES))}")
    return GATES[name](**hyperparameters)
