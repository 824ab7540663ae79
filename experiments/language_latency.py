"""Seconds of a language model as a cost: what heads and feed-forward units take.

They are measured once, of models with a part of the units of one group each, and are
taken to add up over groups. Between the measured sizes they are interpolated; a branch
that is gone takes none.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments.harness import run_folder
from experiments.harness.alone import alone
from experiments.language_settings import LATENCY
from l0jax import costs, models
from l0jax.models.decoder import Decoder
from l0jax.report import measure_latency
from l0jax.structure import Structure

PARTS = 4
"""Into how many equal steps the units of a group are divided."""


def cost(base: Decoder, length: int, folder: Path) -> costs.Cost:
    """Seconds of a call for one text, of what is left.

    Args:
        base: the whole model.
        length: characters of the text.
        folder: of the measurements, made or to be made.

    Raises:
        ValueError: if what was measured doesn't add up to the whole model.
    """
    structure = models.structure(base)
    named = [n for n in structure.groups if n.endswith((".heads", ".hidden"))]
    tables = [measured(base, structure, n, length, folder / n) for n in named]
    whole = np.mean([table.seconds[-1] for table in tables])
    saved = sum(table.seconds[-1] - table.seconds[0] for table in tables)
    rest = (whole - saved) / len(tables)
    again = f"measure on a quieter machine, after removing {folder}"
    if not rest > 0:
        raise ValueError(
            f"what heads and feed-forward units take adds up to {saved:.2g} s of "
            f"{whole:.2g} s: {again}"
        )
    apart = []
    for name, table in zip(named, tables, strict=True):
        seconds = table.seconds - table.seconds[0] + rest
        if not (seconds > 0).all():
            raise ValueError(
                f"with a part of {name} the model was measured to be faster than "
                f"without any, by more than can be: {again}"
            )
        apart.append(dataclasses.replace(table, seconds=seconds))
    return costs.interpolated(apart, LATENCY)


def measured(
    base: Decoder, structure: Structure, name: str, length: int, folder: Path
) -> costs.Table:
    """Seconds with none, with parts and with all of the units of a group."""
    # Two that measure at the same time would slow each other.
    with alone(folder):
        found = run_folder.latency(folder)
        if found is None:
            size = structure.groups[name].size
            sizes = {name: {round(part * size / PARTS) for part in range(PARTS + 1)}}
            tokens = jnp.zeros((1, length), jnp.int32)
            found = measure_latency(base, structure, tokens, sizes=sizes)
            run_folder.keep_latency(folder, found)
        return found
