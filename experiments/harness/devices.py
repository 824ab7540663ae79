"""How a run trains, whatever it trains: flags that studies share."""

import dataclasses
import math
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from l0jax.train import Training, TrainingState


@dataclasses.dataclass(frozen=True)
class OnDevices:
    """Flags of a study: its devices, its dtype, its checkpoints."""

    mesh: str = ""
    """devices, by the names of axes: data=8 splits each batch over eight,
    data=4,model=2 arranges them in two axes; none: one device"""
    shard: str = ""
    """axis of the mesh over which parameters are split, each along its largest axis
    that can be; none: every device has all"""
    compute: Literal["float32", "bfloat16"] = "float32"
    """in which the network runs; parameters, gates, statistics and losses stay in
    float32"""
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
    if not flags.distributed:
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


def check(flags: OnDevices, batch_size: int) -> Mesh | None:
    """The devices that the flags ask for.

    Raises:
        ValueError: if there are no such devices, a batch can't be split over them, or
            processes have no mesh in common; if fewer than two checkpoints are kept.
    """
    if flags.keep_checkpoints < 2:
        raise ValueError(
            f"keep_checkpoints must be at least 2, got {flags.keep_checkpoints}: one "
            "is left if the newest turns out to be damaged"
        )
    mesh = mesh_of(flags.mesh)
    if mesh is None and (flags.shard or jax.process_count() > 1):
        raise ValueError(
            f"{'shard' if flags.shard else 'distributed'} is given, but no mesh, such "
            f"as data={jax.device_count()}"
        )
    if mesh is not None and batch_size % mesh.devices.shape[0]:
        raise ValueError(
            f"a batch of {batch_size} examples can't be split evenly over the "
            f"{mesh.devices.shape[0]} devices of {mesh.axis_names[0]!r}"
        )
    return mesh


def on(training: Training, flags: OnDevices, batch_size: int) -> Training:
    """The training on the devices that the flags ask for.

    Raises:
        ValueError: as `check`; if the mesh has no axis `shard`.
    """
    mesh = check(flags, batch_size)
    compute = jnp.bfloat16 if flags.compute == "bfloat16" else None
    if mesh is None and compute is None:
        return training
    sharding = {".*": flags.shard} if flags.shard else None
    return training.replace(mesh=mesh, sharding=sharding, compute=compute)


def alone(training: Training, state: TrainingState) -> tuple[Training, TrainingState]:
    """The same on one device of this process, as what is done in the end wants it. Of
    several processes all call it."""
    if training.placement.mesh is None:
        return training, state
    here = training.placement.on_host(state)
    return training.replace(mesh=None, sharding=None), jax.tree.map(jnp.asarray, here)


def is_first() -> bool:
    """Whether this process is the one that writes and tells."""
    return jax.process_index() == 0
