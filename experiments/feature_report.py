"""Table and CSV of `experiments.feature_selection`, from its folder alone.

python -m experiments.feature_report FOLDER
"""

import argparse
from pathlib import Path

from experiments.harness import csv_lines
from experiments.reports import runs
from experiments.reports.printing import markdown


def write(folder: Path) -> None:
    """Writes all of it."""
    found = [*runs.of_folder(folder)]
    (folder / "table.md").write_text(markdown(*runs.lines(found)) + "\n")
    csv_lines.write(folder / "results.csv", [result.row() for result in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of a run")
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
