"""What a finished run of `experiments.mnist` left in its folder, and its names."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from experiments.harness import results

Vector = Float[np.ndarray, " units"]

READERS = {
    # group: the kernel that reads it, and the group of that kernel's outputs.
    "input": ("layers.0.kernel", "hidden1"),
    "conv1": ("conv2.kernel", "conv2"),
    "conv2": ("dense1.kernel", "hidden"),
    "features": ("dense1.kernel", "hidden"),
}

WRITTEN_OUT = {
    "mlp": "MLP",
    "lenet5": "LeNet-5",
    "mnist": "MNIST",
    "group": "gates on units",
    "none": "no gates",
    "weight": "gates on weights",
}


class Run(NamedTuple):
    """What a run left in its folder.

    Attributes:
        config: its settings.
        epochs: the metrics of each epoch, in order; empty if none was finished.
        activity: by epoch, 0 for the start, P(z != 0) of each unit of each group.
        gates: at the end, `"<group>/prob_active"` and `"<group>/value"`.
        result: the line of `runs.jsonl`.
    """

    config: dict[str, Any]
    epochs: list[dict[str, Any]]
    activity: dict[int, dict[str, Vector]]
    gates: dict[str, Vector]
    result: dict[str, Any]


def read(folder: Path) -> Run:
    """The run that lies in `folder`.

    Raises:
        FileNotFoundError: if one of its files is missing.
        ValueError: if the run is of an older version.
    """
    results.read(folder)
    names = ("config.json", "metrics.jsonl", "gates.npz", results.LINES, "activity")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no finished run: {', '.join(missing)} missing"
        )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    # A run that was resumed may have written an epoch twice: the later one counts.
    epochs = {record["epoch"]: record for record in map(json.loads, lines)}
    return Run(
        config=json.loads((folder / "config.json").read_text()),
        epochs=[epochs[epoch] for epoch in sorted(epochs)],
        activity={
            int(file.stem): _arrays(file)
            for file in sorted((folder / "activity").glob("*.npz"))
        },
        gates=_arrays(folder / "gates.npz"),
        result=results.read(folder)[-1],
    )


def readers_left(run: Run, group: str) -> Int[np.ndarray, " units"]:
    """How much still reads each unit of `group` at test time.

    With gates on units it is 1 or 0, as the gate says; with gates on weights, the
    number of weights left that read the unit. Without gates, all are read.
    """
    if not run.gates:
        return np.ones(sizes_of(run)[group], int)
    if f"{group}/value" in run.gates:
        return (run.gates[f"{group}/value"] != 0).astype(int)
    kernel, outputs = READERS[group]
    sizes = sizes_of(run)
    # (windows or positions, inputs, outputs), whatever the kernel.
    value = run.gates[f"{kernel}/value"].reshape(-1, sizes[group], sizes[outputs])
    return (value != 0).sum((0, 2))


def title_of(run: Run) -> str:
    words = [str(run.config[key]) for key in ("model", "dataset", "gates")]
    model, dataset, gates_on = (WRITTEN_OUT.get(word, word) for word in words)
    return ", ".join([f"{model} on {dataset}", gates_on, *_strength(run)])


def _strength(run: Run) -> list[str]:
    """The cost of an expected weight, as the settings have it: c in c / N."""
    lam = run.config.get("lam")
    if lam is None or run.config["gates"] == "none":
        return []
    values = [f"{value:g}" for value in (lam if isinstance(lam, list) else [lam])]
    if len(set(values)) == 1:
        return [f"λ = {values[0]} / N"]
    return [f"λ = ({', '.join(values)}) / N"]


def by_rule(run: Run) -> str:
    return f"by the test-time rule '{run.result['test_rule']}'"


def pixels_read(run: Run, architecture: dict[str, int] | None = None) -> str:
    read = (architecture or architecture_at_end(run))["input"]
    return f"{read:,} of {sizes_of(run)['input']:,} pixels read"


def probability_name(run: Run) -> str:
    return "mean P(z ≠ 0)" if run.config["gates"] == "weight" else "P(z ≠ 0)"


def architecture_at_end(run: Run) -> dict[str, int]:
    if run.epochs:
        return run.epochs[-1]["architecture"]
    return {
        group: int((readers_left(run, group) > 0).sum())
        for group in sizes_of(run)
        if group in READERS
    }


def last_activity(run: Run) -> dict[str, Vector]:
    return run.activity[max(run.activity)]


def sizes_of(run: Run) -> dict[str, int]:
    last = last_activity(run)
    return {group: last[group].size for group in in_order(last)}


def gated_groups(run: Run) -> list[str]:
    return in_order({name.rpartition("/")[0] for name in run.gates})


def in_order(names: Iterable[str]) -> list[str]:
    """From the input of the network to its output; `layers.10` after `layers.9`."""
    return sorted(names, key=lambda name: (name not in READERS, len(name), name))


def _arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as stored:
        # float16 sums and products would be coarse.
        return {name: stored[name].astype(np.float32) for name in stored.files}
