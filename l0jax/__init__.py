"""l0jax: learning which parts of a network to keep."""

from l0jax import constraints as constraints
from l0jax import costs as costs
from l0jax import estimators as estimators
from l0jax import gates as gates
from l0jax import gating as gating
from l0jax import linen as linen
from l0jax import methods as methods
from l0jax import models as models
from l0jax import nnx as nnx
from l0jax import objectives as objectives
from l0jax import storage as storage
from l0jax import train as train
from l0jax.narrow import narrow as narrow
from l0jax.objectives import expected_l0 as expected_l0
from l0jax.report import measure_latency as measure_latency
from l0jax.report import report as report
from l0jax.structure import Structure as Structure
from l0jax.tracing import trace as trace
from l0jax.units import Group as Group
from l0jax.units import Slot as Slot
from l0jax.units import apply_gates as apply_gates
from l0jax.units import in_use as in_use
from l0jax.units import round_to as round_to
from l0jax.units import shrink as shrink
from l0jax.unstacking import unstack as unstack
