"""The folder of one run: what was asked for, and what was seen on the way."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
import warnings
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from l0jax import costs

CONFIG = "config.json"
LATENCY = "latency.json"
ADDED = {"compute": "float32", "moved": 0}
"""Settings that flags were added for when there were records without them, and what
these were run with. Where they are that, they are not recorded, so that a run has one
record and one folder before the flag and after it."""
ADDED_TO_RECIPES = {"drop_factor": 0.1}
"""The same of the recipes among the settings, which have `drops`."""


class RunFolderError(ValueError):
    """The run folder holds something that this run would overwrite."""


def default(name: str, settings: dict) -> Path:
    """A folder of its own for each set of settings: `runs/<name>-<digest>`."""
    text = json.dumps(settings, sort_keys=True)
    return Path("runs") / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def settings_of(config: Any, leave_out: Container[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass as JSON has them, but for those that are left out, and
    those of `ADDED` that are what they were before there was a flag."""
    fields = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    told = {name: value for name, value in fields.items() if name not in leave_out}
    return {
        name: _without(value, ADDED_TO_RECIPES) if _is_recipe(value) else value
        for name, value in _without(told, ADDED).items()
    }


def whole(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings with what was not recorded: records are compared so."""
    return ADDED | {
        name: ADDED_TO_RECIPES | value if _is_recipe(value) else value
        for name, value in settings.items()
    }


def _is_recipe(value: Any) -> bool:
    return isinstance(value, dict) and "drops" in value


def _without(fields: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in fields.items()
        if name not in usual or value != usual[name]
    }


def prepare(folder: Path, settings: dict, config: dict, resume: bool) -> None:
    """Makes the folder and writes `config` into it.

    A run goes on only with the settings that decide its result, all of them, and with
    draws of JAX that are the same; where it is run, how far, and how often it is saved
    may change. With another version of a package it goes on and says so: its draws are
    the same, roundings may not be.

    Args:
        folder: where the run is written.
        settings: what decides the result; a run that goes on must have the same.
        config: all fields, for the record.
        resume: whether a run of the same settings may go on.

    Raises:
        RunFolderError: if the folder holds a run of other settings, or one of the same
            and `resume` is False, or a damaged configuration.

    Warns:
        UserWarning: if the run was begun with other versions of packages.
    """
    file = folder / CONFIG
    made = made_by()
    # What changes the random draws is part of the record.
    draws = {"threefry_partitionable": jax.config.values["jax_threefry_partitionable"]}
    if file.exists():
        try:
            old = json.loads(file.read_text())
            if not isinstance(old, dict):
                raise ValueError(f"it holds a {type(old).__name__}")
        except (ValueError, RecursionError) as error:
            raise RunFolderError(
                f"{file} is damaged ({error}), so that nobody knows what run the "
                "folder holds; choose another --out"
            ) from error
        old = whole(old)
        deciding = whole(settings)
        deciding |= {name: draws[name] for name in draws if name in old}
        differing = [k for k in deciding if k not in old or old[k] != deciding[k]]
        if differing:
            name = differing[0]
            raise RunFolderError(
                f"{folder} holds a run of another configuration: {name} is "
                f"{old.get(name)!r} there and {deciding[name]!r} here; choose another "
                "--out"
            )
        if not resume:
            raise RunFolderError(
                f"{folder} holds a run of this configuration already; go on with "
                "--resume, or choose another --out"
            )
        begun = old.get("versions")
        begun = begun if isinstance(begun, dict) else {}
        others = [
            f"{n} {begun[n]}" for n in begun if begun[n] != made["versions"].get(n)
        ]
        if others:
            warnings.warn(
                f"{folder} was begun with {', '.join(others)}; here it is "
                f"{', '.join(f'{n} {v}' for n, v in made['versions'].items())}: what "
                "follows may differ by roundings from what would have followed",
                stacklevel=2,
            )
    if jax.process_count() > 1:
        # Before any has written it, all have seen what is there.
        multihost_utils.sync_global_devices(str(file))
    if jax.process_index() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _put(file, config | made | draws)


def check_base(
    folder: Path, settings: Mapping[str, Any], deciding: Iterable[str]
) -> None:
    """Raises FileNotFoundError if no run is in the folder, ValueError if its base
    networks are those of other settings.

    Args:
        folder: of a run that has trained base networks.
        settings: of the run that takes them.
        deciding: names of those that decide a base network.
    """
    file = folder / CONFIG
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing: base_from must be the folder of a run that has "
            "trained its base networks"
        )
    there, here = whole(json.loads(file.read_text())), whole(settings)
    for name in deciding:
        if there.get(name) != here[name]:
            raise ValueError(
                f"the base networks of {folder} were made with {name} = "
                f"{there.get(name)}; this run has {here[name]}"
            )


def made_by() -> dict[str, Any]:
    """What made a result beside its settings: the commit of this checkout, if it is
    one, the device, and the versions."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = found.stdout.strip() or None
    except OSError:
        commit = None
    versions = {n: importlib.metadata.version(n) for n in ("jax", "flax", "optax")}
    device = jax.devices()[0].device_kind
    return {"commit": commit, "device": device, "versions": versions}


def latency(folder: Path) -> costs.Table | None:
    """The table of seconds in the folder, if there is one.

    Raises:
        RunFolderError: if it is damaged.
    """
    file = folder / LATENCY
    if not file.exists():
        return None
    try:
        stored = json.loads(file.read_text())
        return costs.Table(
            tuple(stored["groups"]),
            tuple(map(tuple, stored["sizes"])),
            np.asarray(stored["seconds"], float),
        )
    except (ValueError, KeyError, RecursionError, TypeError) as error:
        raise RunFolderError(
            f"{file} is damaged ({error!r}); remove it to measure anew"
        ) from error


def keep_latency(folder: Path, table: costs.Table) -> None:
    """Writes the table of seconds, unless there is one: a run that goes on has found
    its own, or one that was put there."""
    if (folder / LATENCY).exists():
        return
    stored = {
        "groups": table.groups,
        "sizes": table.sizes,
        "seconds": table.seconds.tolist(),
        "device": jax.devices()[0].device_kind,
    }
    _put(folder / LATENCY, stored)


def _put(file: Path, content: Any) -> None:
    """Writes JSON. A kill leaves the old file or the new one."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(file)


class Log:
    """The run folder's record: JSON lines, TensorBoard events, arrays of gates. To read
    it changes nothing. Of several processes only the first writes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writes = jax.process_index() == 0
        self.file = folder / "metrics.jsonl"
        self.events = None

    def rows(self) -> list[dict]:
        """What was logged of each epoch. A last line that was cut short when the run
        was killed is left out: its epoch is run again.

        Raises:
            RunFolderError: if another line is damaged.
        """
        if not self.file.exists():
            return []
        rows = []
        lines = self.file.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or type(row.get("epoch")) is not int:
                    raise ValueError("it is no row of an epoch")
            except (ValueError, RecursionError) as error:
                if number == len(lines) and not line.endswith(b"\n"):
                    break
                raise RunFolderError(
                    f"{self.file}, line {number}, is damaged ({error}); restore the "
                    "file, or begin anew with another --out"
                ) from error
            rows.append(row)
        return rows

    def keep_until(self, epoch: int) -> None:
        """Drops what was logged after `epoch`: a resumed run logs it again."""
        if not self.writes:
            return
        kept = [row for row in self.rows() if row["epoch"] <= epoch]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def row(self, row: dict) -> None:
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.events is None:
            # Imported after the first epoch: it takes two seconds.
            from tensorboardX import SummaryWriter

            self.events = SummaryWriter(str(self.folder / "tensorboard"))
        for name in ("loss", "penalty", "expected_l0", "weights", "steps_per_second"):
            self.events.add_scalar(name, row[name], row["step"])
        for name in ("train_error", "validation_error", "test_error"):
            if name in row:
                self.events.add_scalar(f"error/{name}", row[name], row["step"])
        for name, count in row["architecture"].items():
            self.events.add_scalar(f"units/{name}", count, row["step"])

    def activity(self, epoch: int, active: dict) -> None:
        if not self.writes:
            return
        small: dict[str, Any] = {
            n: np.asarray(p, np.float16) for n, p in active.items()
        }
        file = self.folder / "activity" / f"{epoch:05d}.npz"
        file.parent.mkdir(exist_ok=True)
        np.savez(file, **small)

    def gates(self, active: dict, z: dict) -> None:
        values: dict[str, Any] = {}
        for name in active:
            values[f"{name}/prob_active"] = np.asarray(active[name], np.float32)
            values[f"{name}/value"] = np.asarray(z[name], np.float32)
        np.savez_compressed(self.folder / "gates.npz", **values)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
