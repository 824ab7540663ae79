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

import numpy as np
import tyro

from experiments import language_model, language_report
from experiments.harness import results, rows, run_folder
from experiments.harness.alone import alone
from experiments.language_methods import GATES, METHODS, SCORES
from experiments.language_settings import LATENCY, UNTOLD, Config
from experiments.reports import places, runs
from l0jax.models.decoder import Sizes

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


def run(row: str, seed: int, methods: Sequence[str]) -> None:
    """Runs what is missing of a row, and records it as it comes.

    Raises:
        FileNotFoundError: if the first row has not trained the base of this seed.
    """
    config = dataclasses.replace(ROWS[row], seeds=(seed,), out=RUNS / row)
    if row != HALF:
        config = dataclasses.replace(config, base_from=RUNS / HALF)
        if not (RUNS / HALF / f"base-{seed}").exists():
            raise FileNotFoundError(
                f"{row} takes the bases of {HALF}; run `python -m "
                f"experiments.language_rows {HALF} --seeds {seed}` first"
            )
    for method in methods or config.method:
        one = dataclasses.replace(config, method=(method,))
        record(row, language_model.main(one)["results"])


def record(row: str, new: Sequence[dict[str, Any]]) -> None:
    """Puts results into those of a row, each in the place of an older one of the same
    method and seed, and draws them. Results of other settings go: they are no seeds of
    these."""
    folder = folder_of(row)
    with alone(folder / "figures"):
        results.put(folder, new, {"method": METHODS, "seed": ()}, alike=True)
        language_report.write(folder)


def section() -> str:
    """What `RESULTS.md` says of the rows that are recorded."""
    parts = []
    for row in ROWS:
        folder = folder_of(row)
        lines = results.read(folder)
        if not lines:
            continue
        if not parts:
            parts.append("## A language model at a share of its size")
        inside = folder.relative_to(places.ROOT)
        parts += [
            f"### {row}",
            told(row, lines),
            language_report.table(results.of_folder(folder)),
            statements(results.of_folder(folder)),
            *filter(None, [branches(lines)]),
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
        "All learn from the base too." if of["distil"] else "",
        "Everything was chosen on the validation text. Seconds are medians of nine "
        "calls at the end of each run, when other work may have run beside it.",
    )
    return " ".join(filter(None, said))


def branches(lines: Sequence[dict[str, Any]]) -> str:
    """Of how many branches nothing is left, by each method, where that was open."""
    if "branches" not in lines[0]["settings"]["gated"]:
        return ""
    said = []
    for method, its in results.by(lines, "method").items():
        blocks = [[Sizes(*each) for each in line["blocks"]] for line in its]
        attention = np.mean([sum(not b.groups for b in each) for each in blocks])
        feed_forward = np.mean([sum(not b.hidden for b in each) for each in blocks])
        whole = sum(not b.groups and not b.hidden for each in blocks for b in each)
        said.append(
            f"`{method}` {attention:.1f} of attention and {feed_forward:.1f} "
            f"feed-forward ones, whole blocks {whole} in {len(its)} runs"
        )
    many = lines[0]["settings"]["layers"]
    return (
        f"Branches of which nothing is left, of {many} and {many} (means of seeds): "
        f"{'; '.join(said)}."
    )


def statements(found: Sequence[results.Result]) -> str:
    """How the best gates stand beside the best score, uniform narrowing and a new
    network. Which is best is decided on the validation text, over the seeds that all of
    a kind have."""
    there: dict[str, dict[int, results.Result]] = {}
    for result in found:
        there.setdefault(result.method, {})[result.seed] = result

    def best(of: Collection[str]) -> str | None:
        known = [there[name] for name in of if name in there]
        shared = set.intersection(*map(set, known)) if known else set()
        losses = {
            its[seed].method: np.mean(
                [its[seed].metrics["validation loss"] for seed in shared]
            )
            for its in known
            for seed in shared
        }
        return min(losses, key=lambda name: losses[name], default=None)

    ours = best(GATES)
    if ours is None:
        return ""
    others = [best(SCORES), *(n for n in ("uniform", "scratch") if n in there)]
    said = []
    for other in filter(None, others):
        if not there[ours].keys() & there[other].keys():
            continue
        mean, half, seeds = runs.paired(
            [*there[ours].values()], [*there[other].values()], "test loss"
        )
        of = f" ± {half:.3f} ({seeds} seeds)" if seeds > 1 else " (one seed)"
        said.append(f"{mean:+.3f}{of} from `{other}`")
    if not said:
        return ""
    return (
        f"By the validation text `{ours}` is the best of the gates there are. Its test "
        f"loss differs by {', '.join(said)}: nats, paired by seed, with 95 % intervals "
        "where there are several; below 0 it is better."
    )


def main(arguments: rows.OfMethods) -> None:
    """Runs rows by name."""

    def one(name: str, seed: int) -> None:
        run(name, seed, arguments.methods)

    def told(config: Config) -> dict[str, Any]:
        return run_folder.settings_of(config, UNTOLD)

    rows.run(arguments, "experiments.language_rows", ROWS, one, told)


if __name__ == "__main__":
    main(tyro.cli(rows.OfMethods, description=__doc__))
