"""Results of one run, read back from what its study wrote into its folder."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.harness import csv_lines, json_lines, results
from experiments.harness.results import Result
from experiments.harness.run_folder import CONFIG

FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError)
"""What reading meets where another thing was expected."""


def of_folder(folder: Path) -> Iterator[Result]:
    """The results of one run; none if it has not finished any.

    Raises:
        ValueError: if a file of the folder is not what a study wrote there.
    """
    yield from results.of_folder(folder)
    for name, read in READERS.items():
        if not (folder / name).exists():
            continue
        try:
            found = list(read(folder))
            for result in found:
                results.check(vars(result), str(folder))
        except FAULTS as error:
            raise ValueError(
                f"{folder / name} is damaged, or of another version: {error!r}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{folder / name}: {error}") from error
        yield from found


def _config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings, and what is told of the machine."""
    file = folder / CONFIG
    stored = json.loads(file.read_text()) if file.exists() else {}
    made = {name: stored.pop(name, None) for name in ("commit", "device", "versions")}
    return stored, made


def _of_mnist(folder: Path) -> Iterator[Result]:
    summary = json.loads((folder / "summary.json").read_text())
    if not isinstance(summary, dict):
        raise ValueError(f"it holds a {type(summary).__name__}, and must hold a record")
    if "best_on_validation" not in summary:
        return
    settings, made = _config(folder)
    last = summary["last"]
    yield Result(
        "mnist",
        str(folder),
        f"{summary['dataset']} {summary['model']}",
        settings.get("gate", "hard_concrete"),
        settings.get("seed", 0),
        settings,
        {
            "test error": last["test_error"],
            "validation error": last["validation_error"],
        },
        {
            "weights": last["weights"] / summary["dense_weights"],
            **{f"{n} expected": b["expected"] for n, b in _budget(summary)},
            **{f"{n} decided": b["decided"] for n, b in _budget(summary)},
        },
        summary["seconds"],
        made,
    )


def _budget(summary: dict[str, Any]) -> Iterable[tuple[str, dict[str, float]]]:
    return summary.get("budget", {}).items()


def _of_channels(folder: Path) -> Iterator[Result]:
    settings, made = _config(folder)
    for line in json_lines.read(folder / "results.jsonl"):
        yield Result(
            "channel_pruning",
            str(folder),
            f"{settings.get('dataset')} {settings.get('model')}",
            line["method"],
            line["seed"],
            settings,
            {
                "test error": line["trained"]["test"],
                "validation error": line["trained"]["validation"],
                "base test error": line["base"]["test"],
            },
            {what: line[what][1] / line[what][0] for what in ("params", "macs")},
            line["choosing"],
            made,
        )


def _of_wide_resnet(folder: Path) -> Iterator[Result]:
    settings, made = _config(folder)
    for line in json_lines.read(folder / "result.jsonl"):
        yield Result(
            "wide_resnet",
            str(folder),
            f"{settings.get('dataset')} WRN-{settings.get('depth')}",
            # (Older runs don't say which variant they are.)
            line.get("variant", folder.name.rsplit("-", 1)[0]),
            line.get("seed", int(folder.name.rsplit("-", 1)[-1])),
            settings,
            {
                "test error": line["gated"]["test"],
                "validation error": line["gated"]["validation"],
            },
            {"macs": line["kept"], "macs expected": line["expected"]},
            None,
            made,
        )


def _of_csv(folder: Path) -> Iterator[Result]:
    settings, made = _config(folder)
    for line in csv_lines.read(folder / "results.csv"):
        task = f"{line['dataset']} {line['model']}"
        if "family" in line:
            at = (
                f"target {line['target']}" if line.get("target") else f"λ {line['lam']}"
            )
            whole = float(line["dense_weights"]), float(line["dense_macs"])
            yield Result(
                "families",
                str(folder),
                task,
                f"{line['family']}, {at}, {line['rule']}",
                int(line["seed"]),
                settings,
                {
                    "test error": float(line["test_error"]),
                    "validation error": float(line["validation_error"]),
                },
                {
                    "weights": float(line["weights"]) / whole[0],
                    "macs": float(line["macs"]) / whole[1],
                },
                None,
                made,
            )
        else:
            yield Result(
                "relocation",
                str(folder),
                task,
                f"{line['arm']}, {line['heuristic']}, {line['ratio']} in "
                f"{line['budget']}",
                int(line["seed"]),
                settings,
                {
                    "test error": 100 - float(line["test"]),
                    "validation error": 100 - float(line["validation"]),
                },
                {},
                float(line["seconds"]),
                made,
            )


READERS = {
    "summary.json": _of_mnist,
    "results.jsonl": _of_channels,
    "result.jsonl": _of_wide_resnet,
    "results.csv": _of_csv,
}
"""By the file of a run folder that they read."""
