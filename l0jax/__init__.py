"""l0jax: learning which parts of a network to keep."""

from l0jax import (
    checkpoints,
    constraints,
    costs,
    estimators,
    gates,
    gating,
    linen,
    methods,
    models,
    nnx,
    objectives,
    storage,
    train,
)
from l0jax.narrow import narrow
from l0jax.objectives import expected_l0
from l0jax.report import measure_latency, report
from l0jax.structure import Structure
from l0jax.tracing import trace
from l0jax.units import Group, Slot, apply_gates, in_use, round_to, shrink
from l0jax.unstacking import unstack

__all__ = [
    "Group",
    "Slot",
    "Structure",
    "apply_gates",
    "checkpoints",
    "constraints",
    "costs",
    "estimators",
    "expected_l0",
    "gates",
    "gating",
    "in_use",
    "linen",
    "measure_latency",
    "methods",
    "models",
    "narrow",
    "nnx",
    "objectives",
    "report",
    "round_to",
    "shrink",
    "storage",
    "trace",
    "train",
    "unstack",
]
