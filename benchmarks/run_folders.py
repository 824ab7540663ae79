"""What is noticed when the records of a run change: its settings, its log, its results.

    python -m benchmarks.run_folders             # prints counts and limits
    python -m benchmarks.run_folders --record    # and writes benchmarks/results/

A run of `experiments.mnist` on the bundled digits, with a target and a table of
seconds, and recorded results of two other studies are changed as `benchmarks.mutations`
changes saved models: bits flipped, ranges cut, inserted, swapped and zeroed, files
lost, renamed and exchanged, JSON edited. Each folder is then read as a run that goes on
reads it, and as `experiments.compare` does. What is no record any more, holds a value
of another type, or other settings, must be refused with the file's name. The rest of
these records is text without digests, so that another number in the place of a number
is read; of models and checkpoints, which have digests, it is not. A minute. --turns is
how many of each.
"""

import collections
import hashlib
import json
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from benchmarks import measure, mutations
from benchmarks.measure import entry
from benchmarks.mutations import Files
from experiments import mnist
from experiments.harness import results, run_folder
from experiments.mnist_settings import Config
from experiments.reports import places

RECORDS = ("config.json", "latency.json", "metrics.jsonl", results.LINES)


def of_mnist(folder: Path) -> Files:
    """The records of a run that has ended."""
    config = Config(
        epochs=4, dense="no", progress=False, target_latency=0.9, out=folder
    )
    with warnings.catch_warnings(action="ignore"):
        mnist.main(config)
    return {name: (folder / name).read_bytes() for name in RECORDS}


def of_cifar(_: Path) -> Files:
    """What is recorded of a recipe."""
    there = places.RESULTS / "cifar" / "cifar10-resnet20"
    return {
        name: (there / name).read_bytes() for name in ("config.json", results.LINES)
    }


def of_relocation(_: Path) -> Files:
    """The first of the results of an ablation."""
    there = places.RESULTS / "relocation-mlp-ablation"
    lines = (there / results.LINES).read_bytes().splitlines(keepends=True)
    return {results.LINES: b"".join(lines[:20])}


FOLDERS = {"mnist": of_mnist, "cifar": of_cifar, "relocation": of_relocation}
FAULTS = ("foreign error", "file not named")


def settings_of(files: Files) -> dict[str, Any]:
    """What a run that goes on in the folder has: the settings that are recorded."""
    stored = json.loads(files.get(run_folder.CONFIG, b"{}"))
    made = ("commit", "device", "versions", "threefry_partitionable")
    return {name: value for name, value in stored.items() if name not in made}


def outcome(folder: Path, settings: dict[str, Any]) -> str:
    """In a word, what comes of reading a folder: `refused: …` or `read: …`."""
    try:
        run_folder.prepare(folder, settings, settings, resume=True)
        found: list[Any] = [run_folder.Log(folder).rows()]
        found += [str(run_folder.latency(folder)), results.of_folder(folder)]
    except (ValueError, FileNotFoundError) as error:
        word = "refused" if str(folder) in str(error) else "file not named"
        return f"{word}: {error!r:.300}"
    except Exception as error:
        return f"foreign error: {error!r:.300}"
    return "read: " + hashlib.sha256(str(found).encode()).hexdigest()


def changed(files: Files, rng: random.Random) -> Files:
    """The files with one change; of lines of JSON often one that is edited."""
    name = rng.choice([*files])
    if not name.endswith(".jsonl") or rng.random() < 0.5:
        return mutations.mutated(files, "", rng)
    lines = files[name].splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(mutations.edited(json.loads(lines[at]), rng)).encode()
    return {**files, name: b"".join([*lines[: at + 1], b"\n", *lines[at + 1 :]])}


def count(
    kind: str, turns: int, place: Path
) -> tuple[collections.Counter[str], dict[str, str]]:
    """How often what came of it, and an example of each."""
    files, folder = FOLDERS[kind](place / f"{kind}-run"), place / kind
    mutations.put(files, folder)
    settings = settings_of(files)
    whole = outcome(folder, settings)
    if not whole.startswith("read"):
        raise RuntimeError(f"the whole folder can't be read: {whole}")
    counts: collections.Counter[str] = collections.Counter()
    examples: dict[str, str] = {}
    for seed in range(turns):
        mutations.put(changed(files, random.Random(f"{kind} {seed}")), folder)
        with warnings.catch_warnings(action="ignore"):
            found = outcome(folder, settings)
        word = found.split(":")[0]
        if word == "read":
            word = "as before" if found == whole else "other values"
        counts[word] += 1
        examples.setdefault(word, f"seed {seed}: {found}")
    return counts, examples


def main(arguments: Any) -> list[dict]:
    """Counts of faults, by the kind of folder."""
    entries = []
    with tempfile.TemporaryDirectory() as place:
        for kind in FOLDERS:
            counts, examples = count(kind, arguments.turns, Path(place))
            summary = ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
            for fault in FAULTS:
                if fault in examples:
                    print(f"{kind}: {fault}: {examples[fault]}", file=sys.stderr)
                entries.append(
                    entry(
                        f"records of `{kind}`, changed: {fault}, of "
                        f"{arguments.turns:,}",
                        counts[fault],
                        0,
                        "",
                        summary,
                    )
                )
    return entries


if __name__ == "__main__":
    measure.run(__doc__, "run_folders", main, turns=4000)
