"""The rows of the language model in `RESULTS.md`: settings, seeds, and what they gave.

    python -m experiments.language_rows half           # one row, all its seeds
    python -m experiments.language_rows --list

Each is a run of `experiments.language_model`. Its results, table, texts and pictures
are recorded in `experiments/results/language-ROW`, as they come, and
`experiments.tables` prints them. A row that was interrupted goes on where it stopped;
several processes may run different methods of it at the same time. Rows take the bases
of the first.
"""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import tyro

from experiments import language_model, language_report
from experiments.harness import json_lines, rows, run_folder
from experiments.language_methods import GATES, METHODS, SCORES
from experiments.language_settings import LATENCY, UNTOLD, Config
from experiments.reports import places, runs
from experiments.reports.printing import mean_and_half_width

RUNS = Path("runs") / "language_rows"
HALF = "half"

ROWS: dict[str, Config] = {
    # Half of the parameters, by every method.
    HALF: Config(method=tuple(METHODS), seeds=(0, 1, 2)),
    # Half is nearly enough for this text: a fifth tells ways apart.
    "fifth": Config(
        method=(
            *("uniform", "scratch", "taylor", "taylor_least_squares"),
            *("l0_hard_concrete", "l0_bernoulli", "l0_mixture", "d_gating"),
        ),
        left=0.2,
        seeds=(0, 1, 2),
    ),
    # Half, where all learn from the base too.
    "half-distilled": Config(
        method=("uniform", "taylor", "l0_hard_concrete"), distil=True, seeds=(0, 1, 2)
    ),
    # Whether branches or widths go where seconds are to be saved.
    "seconds": Config(
        method=("taylor", "l0_hard_concrete"),
        gated=("heads", "hidden", "branches"),
        cost=LATENCY,
        left=0.6,
        seeds=(0, 1, 2),
    ),
}


def folder_of(row: str) -> Path:
    """Where the results of a row are recorded."""
    return places.ROOT / "experiments" / "results" / f"language-{row}"


def run(row: str, seeds: Sequence[int], methods: Sequence[str]) -> None:
    """Runs what is missing of a row, and records it as it comes."""
    base_from = None if row == HALF else RUNS / HALF
    config = dataclasses.replace(ROWS[row], out=RUNS / row, base_from=base_from)
    for seed in seeds:
        for method in methods or config.method:
            one = dataclasses.replace(config, method=(method,), seeds=(seed,))
            record(row, language_model.main(one)["results"])


def record(row: str, new: Sequence[dict[str, Any]]) -> None:
    """Puts results into those of a row, each in the place of an older one of the same
    method and seed, and draws them."""
    order = list(METHODS)

    def identity(line):
        return order.index(line["method"]), line["seed"]

    folder = folder_of(row)
    json_lines.merge(folder / runs.LINES, new, identity)
    language_report.write(folder)


def section() -> str:
    """What `RESULTS.md` says of the rows that are recorded."""
    parts = []
    for row in ROWS:
        folder = folder_of(row)
        lines = json_lines.read(folder / runs.LINES)
        if not lines:
            continue
        if not parts:
            parts.append("## A language model at a share of its size")
        inside = folder.relative_to(places.ROOT)
        parts += [
            f"### {row}",
            told(row, lines),
            (folder / "table.md").read_text().strip(),
            statements(list(runs.of_folder(folder))),
            f"![loss against what is left]({inside}/figures/losses.png)",
            f"![what is left of each block]({inside}/figures/left.png)",
            f"[How they go on]({inside}/texts.md), [as CSV]({inside}/runs.csv).",
        ]
    return "\n\n".join(parts)


def told(row: str, lines: Sequence[dict[str, Any]]) -> str:
    """What was run."""
    of = lines[0]["settings"]
    losses = [line["metrics"]["base validation loss"] for line in lines]
    ends = " to ".join(sorted({f"{loss:.3f}" for loss in (min(losses), max(losses))}))
    base, tune = of["base"], of["tune"]
    said = (
        f"`python -m experiments.language_rows {row}`: {of['text']}, {of['layers']} "
        f"blocks of {of['heads']} heads and {of['hidden']} feed-forward units on a "
        f"stream of {of['width']}, windows of {of['length']} characters.",
        f"The base ends at {ends} nats a character of the validation text, after "
        f"{base['epochs']} epochs of windows that overlap by "
        f"{100 * (1 - base['apart']):g} %.",
        f"What may go: {', '.join(of['gated'])}. {100 * of['left']:g} % of the "
        f"{of['cost']} may be left. Epochs after the base: {tune['epochs']}, of which "
        f"{of['closing']} for gates and closing.",
        "Everything was chosen on the validation text.",
    )
    return " ".join(said)


def statements(results: Sequence[runs.Result]) -> str:
    """How the best gates stand beside the best score, uniform narrowing and a new
    network; which is best is decided on the validation text."""
    there: dict[str, list[runs.Result]] = {}
    for result in results:
        there.setdefault(result.method, []).append(result)

    def best(of: Collection[str]) -> str | None:
        known = [name for name in of if name in there]
        return min(known, key=lambda name: _mean(there[name]), default=None)

    ours = best(GATES)
    others = [best(SCORES), *(n for n in ("uniform", "scratch") if n in there)]
    if ours is None:
        return ""
    said = []
    for other in filter(None, others):
        try:
            mean, half, seeds = runs.paired(there[ours], there[other], "test loss")
        except ValueError:  # (No seed in common yet.)
            continue
        within = f" ± {half:.3f}" if seeds > 1 else ""
        said.append(f"{mean:+.3f}{within} from `{other}` ({seeds} seeds)")
    if not said:
        return ""
    return (
        f"Of the gates `{ours}` is best on the validation text. Its test loss differs "
        f"by {', '.join(said)}: nats, paired by seed, with 95 % intervals; below 0 it "
        "is better."
    )


def _mean(results: Sequence[runs.Result]) -> float:
    return mean_and_half_width(r.metrics["validation loss"] for r in results)[0]


def main(arguments: rows.OfMethods) -> None:
    """Runs rows by name."""

    def one(name: str, seed: int) -> None:
        run(name, (seed,), arguments.methods)

    def told(config: Config) -> Any:
        return run_folder.settings_of(config, UNTOLD)

    rows.run(arguments, "experiments.language_rows", ROWS, one, told)


if __name__ == "__main__":
    main(tyro.cli(rows.OfMethods, description=__doc__))
