"""The pictures of one training run, drawn from the files in its folder alone.

    python -m experiments.figures RUN_FOLDER

draws into `RUN_FOLDER/figures`, in a few seconds, and as often as you like:

- `training.png`: errors, and the units left of each group, over epochs;
- `costs.png`: weights and computation, in each convention of `l0jax.costs`;
- `gates.png`: how decided the gates are at the end;
- `pixels.png` and `pixels.gif`: the pixels that are read, at the end and over epochs;
- `features.png`, for LeNet-5 in place of the pixels: the features that are read.

Figures are made without pyplot, so no backend is chosen and a notebook keeps its own.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure

from experiments.reports.curves import costs, gates, training
from experiments.reports.finished_run import Run, read, sizes_of
from experiments.reports.style import STYLE
from experiments.reports.unit_maps import animate, features, pixels


def draw(folder: Path) -> list[Path]:
    """Draws every picture of the run in `folder`, and says where they are."""
    run = read(folder)
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    drawn = []
    with matplotlib.style.context(["default", STYLE]):
        for name, figure in _pictures(run):
            drawn.append(target / name)
            figure.savefig(drawn[-1])
        if "input" in sizes_of(run):
            drawn.append(target / "pixels.gif")
            animate(run, drawn[-1])
    return drawn


def _pictures(run: Run) -> Iterable[tuple[str, Figure]]:
    if run.epochs:
        yield "training.png", training(run)
        yield "costs.png", costs(run)
    if run.gates:
        yield "gates.png", gates(run)
    if "input" in sizes_of(run):
        yield "pixels.png", pixels(run)
    if "features" in sizes_of(run):
        yield "features.png", features(run)


def main() -> None:
    """Draws the pictures of the run in the folder that is given."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of a finished run")
    for file in draw(parser.parse_args().folder):
        print(file)


if __name__ == "__main__":
    main()
