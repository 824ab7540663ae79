"""How a run trains, whatever it trains: flags that studies share."""

import dataclasses
import math
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Float

from l0jax.train import Training, TrainingState


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """Flags of a study that trains on many devices too."""

    mesh: str = ""
    """devices, by the names of axes: data=8 splits each batch over eight,
    data=4,model=2 arranges them in two axes; none: one device"""
    compute: Literal["float32", "bfloat16"] = "float32"
    """in which the network runs; parameters, gates, statistics and losses stay in
    float32"""


@dataclasses.dataclass(frozen=True)
class OnDevices(OnMesh):
    """Flags of a study that trains by `experiments.harness.loop` alone, too."""

    shard: str = ""
    """axis of the mesh over which parameters are split, each along its largest axis
    that can be; none: every device has all"""
    keep_checkpoints: int = 2
    """of the newest of each training"""
    profile: bool = False
    """watch a piece of the training: write a trace of jax.profiler beside the
    checkpoints, and print which operations took longest"""


@dataclasses.dataclass(frozen=True)
class OnHosts(OnDevices):
    """Flags of a study that also trains in several processes."""

    distributed: bool = False
    """one of several processes that train together, one command on each host; which and
    where is found by JAX (SLURM, TPU, Open MPI, Kubernetes) or told by
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"""


PLACES = ("mesh", "shard", "distributed", "keep_checkpoints", "profile")
"""Of the flags those that don't change what a run gives, but for roundings."""


def begin(flags: OnHosts) -> None:
    """Joins the other processes, if there are some; before anything else of JAX.

    Raises:
        ValueError: if JAX does not find out which process this is.
    """
    if not flags.distributed or jax.distributed.is_initialized():
        return
    told: dict[str, Any] = {
        name: int(os.environ[variable])
        for name, variable in (
            ("num_processes", "JAX_NUM_PROCESSES"),
            ("process_id", "JAX_PROCESS_ID"),
        )
        if variable in os.environ
    }
    try:
        jax.distributed.initialize(**told)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: JAX did not find the other processes ({error}); start the "
            "command under SLURM, Open MPI, Kubernetes or on a TPU, or set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def mesh_of(text: str) -> Mesh | None:
    """The devices that `data=4,model=2` names; None for "".

    Raises:
        ValueError: if it is no list of names and sizes, or there are other devices.
    """
    if not text:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name.isidentifier() or name in sizes or not size.isdigit():
            raise ValueError(
                f"mesh is {text!r}; give names and numbers of devices, such as data=8 "
                "or data=4,model=2"
            )
        sizes[name] = int(size)
    devices = jax.devices()
    asked = math.prod(sizes.values())
    # Of several processes each takes part with all that it has.
    few = len(devices) if jax.process_count() > 1 else max(asked, 1)
    if asked != few or asked > len(devices):
        raise ValueError(
            f"mesh {text!r} asks for {asked} devices, and there are {len(devices)}"
        )
    return Mesh(
        np.asarray(devices[:asked]).reshape(*sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
    )


def check(flags: OnMesh, *batch_sizes: int) -> Mesh | None:
    """The devices that the flags ask for.

    Args:
        flags: of the study.
        batch_sizes: of all that it trains.

    Raises:
        ValueError: if there are no such devices, the mesh has no axis `shard`, a batch
            can't be split over them, or processes have no mesh in common; if fewer than
            two checkpoints are kept.
    """
    if isinstance(flags, OnDevices) and flags.keep_checkpoints < 2:
        raise ValueError(
            f"keep_checkpoints must be at least 2, got {flags.keep_checkpoints}: one "
            "is left if the newest turns out to be damaged"
        )
    mesh, shard = mesh_of(flags.mesh), shard_of(flags)
    if mesh is None:
        if shard or jax.process_count() > 1:
            raise ValueError(
                f"{'shard' if shard else 'distributed'} is given, but no mesh, such "
                f"as data={jax.device_count()}"
            )
        return None
    if shard and shard not in mesh.axis_names:
        raise ValueError(
            f"shard names the axis {shard!r}; the mesh has "
            f"{', '.join(map(str, mesh.axis_names))}"
        )
    for batch_size in batch_sizes:
        if batch_size % mesh.devices.shape[0]:
            raise ValueError(
                f"a batch of {batch_size} examples can't be split evenly over the "
                f"{mesh.devices.shape[0]} devices of {mesh.axis_names[0]!r}"
            )
    return mesh


def shard_of(flags: OnMesh) -> str:
    """The axis over which parameters are split, if there is one."""
    return flags.shard if isinstance(flags, OnDevices) else ""


def dtype_of(flags: OnMesh) -> Any:
    """In which the network runs, as `train.Training` has it: None for float32."""
    return jnp.bfloat16 if flags.compute == "bfloat16" else None


def members_on(flags: OnMesh) -> list[jax.Device] | None:
    """The devices among which members of a sweep are split, as `train.Sweep` has them;
    None: it chooses.

    Raises:
        ValueError: as `mesh_of`.
    """
    mesh = mesh_of(flags.mesh)
    return None if mesh is None else [*mesh.devices.flat]


def on(training: Training, flags: OnMesh, batch_size: int) -> Training:
    """The training on the devices that the flags ask for.

    Raises:
        ValueError: as `check`.
    """
    mesh, compute = check(flags, batch_size), dtype_of(flags)
    if mesh is None and compute is None:
        return training
    shard = shard_of(flags)
    sharding = {".*": shard} if shard else None
    return training.replace(mesh=mesh, sharding=sharding, compute=compute)


def logits_of(
    model: Any, inputs: Float[Array, "batch ..."]
) -> Float[Array, "batch classes"]:
    """What a network gives, in float32, that runs in the dtype of its parameters.

    Layers run in the wider dtype of their inputs and parameters: given the float32 that
    a loss makes of stored bytes, the network would run in float32, `compute` or not.
    """
    return model(as_parameters(model, inputs)).astype(jnp.float32)


def as_parameters(
    model: nnx.Module, inputs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Inputs in the dtype of a network's parameters."""
    return inputs.astype(jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype)


def alone(training: Training, state: TrainingState) -> tuple[Training, TrainingState]:
    """The same on one device of this process, as what is done in the end wants it. Of
    several processes all call it."""
    if training.placement.mesh is None:
        return training, state
    here = training.placement.on_host(state)
    return training.replace(mesh=None, sharding=None), jax.tree.map(jnp.asarray, here)


def agreed(value: bool) -> bool:
    """What the first process says; of several all call it."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def is_first() -> bool:
    """Whether this process is the one that writes and tells."""
    return jax.process_index() == 0
