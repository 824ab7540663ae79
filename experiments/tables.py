"""Prints `RESULTS.md` from the committed results.

    python -m experiments.tables            # writes RESULTS.md
    python -m experiments.tables --check    # fails if RESULTS.md says something else

The README quotes two tables between lines that mark them, and the same command fills
them in.
"""

import argparse
import re

from experiments import (
    channel_report,
    feature_report,
    frontier_rows,
    language_rows,
)
from experiments.reports import places
from experiments.reports.benchmark_tables import benchmarks, zoo
from experiments.reports.mnist_tables import (
    beside_published,
    bisected,
    by_row,
    constrained,
    published_units,
    settings,
    structured,
    weightwise,
)
from experiments.reports.printing import markdown
from experiments.reports.study_tables import (
    channels,
    compared,
    edges,
    relocations,
    rules,
    wide,
    within_one_budget,
)

TABLES = ("mnist", "cifar")


def markers(table: str) -> tuple[str, str]:
    """The lines of the README between which a table stands."""
    return f"<!-- table: {table} -->", f"<!-- end of {table} -->"


def document() -> str:
    """The text of RESULTS.md."""
    # What nothing is recorded of leaves an empty place.
    return re.sub("\n{3,}", "\n\n", _document())


def _document() -> str:
    return f"""# Results

Printed by `python -m experiments.tables` from `experiments/results` and
`benchmarks/results`; not edited by hand.

## L0 regularisation on MNIST

Every run trains on 55,000 images and holds out 5,000 for all choices. Errors are of the
10,000 test images, mean ± 95 % interval over seeds (Student's t). "Last epoch" is the
result; "best on validation" is the epoch with the lowest validation error, whose
network may be larger. No epoch and no setting was chosen on the test set. Weights are
those of kernels, biases not counted, as in the literature.

### Gates on groups of units

{structured()}

While a network learns, fewer and fewer pixels are read
(`python -m experiments.mnist --dataset mnist --epochs 100 --gate-learning-rate 1e-3`):

![pixels of MNIST that are still read](experiments/results/mnist-pixels.gif)

On scikit-learn's digits (`python -m experiments.mnist --out runs/digits`):

![error and units left over the epochs](experiments/results/digits-training.png)

![pixels of the digits that are still read](experiments/results/digits-pixels.png)

### Targets in place of λ

The share of the gated weights that may be left in expectation is met by multipliers
that are trained with the gates, in one run. A unit counts with all its weights, whether
or not what they lead to is left; removal leaves fewer.

{constrained()}

{bisected()}

### Gates on single weights

{weightwise()}

{frontier_rows.section()}

### Settings and commands

{settings()}

{within_one_budget()}

{rules()}

{compared()}

{channels()}

{wide()}

{relocations()}

{language_rows.section()}

{feature_report.section()}

{edges()}

## Benchmarks

Things that are compared take turns in one run, so that ratios can be trusted where
absolute times can't.

{benchmarks()}

{zoo()}

{places.NOTES.read_text().strip() if places.NOTES.exists() else ""}
"""


def quoted(readme: str) -> str:
    """The README with its tables filled in."""
    header = ["row", "published", "test error", "weights", "architectures by seed"]
    lines = [
        beside_published(name, its)
        for name, its in by_row().items()
        if published_units(name)
    ]
    of = {"mnist": markdown(header, lines), "cifar": channel_report.short()}
    for name in TABLES:
        readme = put(readme, *markers(name), of[name])
    return readme


def put(readme: str, begin: str, end: str, table: str) -> str:
    """The README with one table between its two lines."""
    if [readme.count(marker) for marker in (begin, end)] != [1, 1] or (
        readme.index(begin) > readme.index(end)
    ):
        raise SystemExit(
            f"README.md must hold the line {begin} once and, after it, the line {end} "
            "once: the table goes between them"
        )
    before, rest = readme.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def main(check: bool) -> None:
    """Writes RESULTS.md and the README's tables, or compares them."""
    readme = places.ROOT / "README.md"
    wanted = {
        places.ROOT / "RESULTS.md": document(),
        readme: quoted(readme.read_text()),
    }
    for file, text in wanted.items():
        if not check:
            file.write_text(text)
        elif not file.exists() or file.read_text() != text:
            raise SystemExit(
                f"{file.name} does not say what the results say; "
                "run python -m experiments.tables"
            )


def cli() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tables",
        description="Writes RESULTS.md and the tables of the README from the results.",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and fail if they differ"
    )
    main(parser.parse_args().check)


if __name__ == "__main__":
    cli()
