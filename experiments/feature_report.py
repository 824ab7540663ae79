"""Tables, CSV and pictures of `experiments.feature_selection`, from its folder alone.

    python -m experiments.feature_report FOLDER

- `table.md`, `runs.csv`: accuracies with 95 % intervals over seeds, paired
  differences to the best family of gates, and how stable the choice is;
- `figures/accuracy.png`: accuracy against the number of features;
- `figures/pixels.png`: which pixels of MNIST each method keeps.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from jaxtyping import Bool
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.feature_methods import ALL, FAMILIES, METHODS
from experiments.harness import command_line, results
from experiments.harness.results import Line
from experiments.reports import places, runs
from experiments.reports.printing import interval, markdown, mean_and_half_width
from experiments.reports.style import BLUE, COLOURS, STYLE
from experiments.tasks import tables

PUBLISHED = {"Sequential Attention": 95.6, "LassoNet": 87.3}
"""Accuracies of 50 pixels of MNIST, in per cent, from tables of others."""


def write(folder: Path) -> bool:
    """Writes all of it; whether there is a result."""
    lines = results.read(folder)
    if not lines:
        return False
    (folder / "table.md").write_text(document(lines) + "\n")
    runs.write_csv(folder, "data", "k", "setting", "features")
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    with matplotlib.style.context(["default", STYLE]):
        for name, draw in (("accuracy", accuracy), ("pixels", pixels)):
            figure = draw(lines)
            if figure is not None:
                figure.savefig(figures / f"{name}.png", dpi=100)
    return True


# ------------------------------------------------------------------------- the numbers


def by_method(lines: Iterable[Line], name: str) -> dict[int, dict[str, list[Line]]]:
    """Of each k of a set, the seeds of each method; `all` apart, at the last k."""
    its = [line for line in lines if line["data"] == name]
    return {k: results.by(of, "method") for k, of in results.by(its, "k").items()}


def right(its: Sequence[Line]) -> list[float]:
    """Test accuracies in per cent."""
    return [100 - line["metrics"]["test error"] for line in its]


def best(of: Mapping[str, Sequence[Line]]) -> str | None:
    """The family of gates with the smallest validation loss, if there is one."""
    losses = {
        name: np.mean([line["metrics"]["validation loss"] for line in its])
        for name, its in of.items()
        if name in FAMILIES
    }
    return min(losses, key=lambda name: losses[name], default=None)


def apart(one: Sequence[Line], other: Sequence[Line]) -> str:
    """By how many points accuracies differ, paired by seed."""
    theirs = {line["seed"]: line["metrics"]["test error"] for line in other}
    found = [
        theirs[line["seed"]] - line["metrics"]["test error"]
        for line in one
        if line["seed"] in theirs
    ]
    if not found:
        return ""
    mean, half = mean_and_half_width(found)
    return f"{mean:+.2f}" + (f" ± {half:.2f}" if len(found) > 1 else "")


def chosen(its: Sequence[Line]) -> Bool[np.ndarray, "seeds features"]:
    """Which features are kept."""
    features = round(its[0]["k"] / its[0]["costs"]["features"])
    flags = np.zeros((len(its), features), bool)
    for at, line in enumerate(its):
        flags[at, line["features"]] = True
    return flags


def stability(flags: Bool[np.ndarray, "seeds features"]) -> float:
    """How alike choices are: 1 if all are the same, 0 in expectation of random ones
    (Nogueira, Sechidis and Brown, JMLR 2018, definition 4); nan of a single choice and
    where there is none."""
    count, share = len(flags), flags.mean()
    if count < 2 or not 0 < share < 1:
        return math.nan
    variance = flags.mean(axis=0) * (1 - flags.mean(axis=0)) * count / (count - 1)
    return float(1 - variance.mean() / (share * (1 - share)))


# -------------------------------------------------------------------------- the tables


def document(lines: Sequence[Line]) -> str:
    """All tables."""
    there = {line["data"] for line in lines}
    parts = [
        f"### {name}\n\n{table(lines, name)}"
        for name in tables.NAMES
        if name in there and name not in tables.KNOWN
    ]
    if there & {*tables.KNOWN}:
        parts.append(f"### Features that are known\n\n{known(lines)}")
    return "\n\n".join(parts)


def table(lines: Sequence[Line], name: str) -> str:
    """Of a set: for each k the accuracy, how far it is above that of the best family of
    gates, and the stability."""
    found = by_method(lines, name)
    every = {k: of.pop(ALL) for k, of in found.items() if ALL in of}
    found = {k: of for k, of in sorted(found.items()) if of}
    header = ["method"]
    for k, of in found.items():
        first = best(of) or "gates"
        header += [f"{k}: accuracy, %", f"above {first}", "stability"]
    body = []
    for method in METHODS:
        if not any(method in of for of in found.values()):
            continue
        cells = [method]
        for of in found.values():
            its, first = of.get(method, []), of.get(best(of) or "", [])
            cells += [
                interval(right(its)) if its else "",
                apart(its, first) if its is not first else "",
                said(stability(chosen(its))) if its else "",
            ]
        body.append(cells)
    for k, its in every.items():
        last = f"{ALL} {k}"
        body.append([last, interval(right(its))] + [""] * (len(header) - 2))
    return markdown(header, body)


def said(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.2f}"


def known(lines: Sequence[Line]) -> str:
    """In how many seeds exactly the features are found that tell the class."""
    sets = {name: by_method(lines, name) for name in tables.KNOWN}
    sets = {name: found for name, found in sets.items() if found}
    body = []
    for method in METHODS:
        cells = []
        for found in sets.values():
            its = found.get(2, {}).get(method, [])
            exact = sum(line["features"] == [0, 1] for line in its)
            cells.append(f"{exact} of {len(its)}" if its else "")
        if any(cells):
            body.append([method, *cells])
    return markdown(["method", *sets], body)


def section() -> str:
    """What `RESULTS.md` says of the results that are recorded."""
    folder = places.ROOT / "experiments" / "results" / "feature-selection"
    lines = results.read(folder)
    if not lines:
        return ""
    inside = folder.relative_to(places.ROOT)
    parts = [
        "## Feature selection",
        f"`python -m experiments.feature_selection --out {inside}`: every method "
        "chooses exactly k features; a network with one hidden layer of "
        f"{_hidden(lines)} units is then trained anew on those alone, with the same "
        "steps and recipe for all. Settings were chosen on validation examples, the "
        "last network is trained on these too. Means with 95 % intervals over seeds "
        "(Student's t), of splits too but on MNIST. Differences are paired by seed, to "
        "the family of gates with the smallest validation loss. Stability is the "
        "measure of Nogueira, Sechidis and Brown (JMLR 2018): 1 if all seeds keep the "
        f"same, 0 by chance. Scores are made of {_examples(lines)} examples at most. "
        f"[All tables]({inside}/table.md), [as CSV]({inside}/runs.csv).",
        statement(lines),
        document(lines),
        f"![accuracy against the number of features]({inside}/figures/accuracy.png)",
        f"![pixels of MNIST that are kept]({inside}/figures/pixels.png)",
    ]
    return "\n\n".join(filter(None, parts))


def _hidden(lines: Sequence[Line]) -> str:
    sizes = {line["data"]: line["settings"]["hidden"] for line in lines}
    usual = max(set(sizes.values()), key=[*sizes.values()].count)
    other = [f"{size} on {name}" for name, size in sizes.items() if size != usual]
    return f"{usual} ({', '.join(other)})" if other else f"{usual}"


def _examples(lines: Sequence[Line]) -> str:
    return f"{lines[0]['settings']['examples']:,}"


def statement(lines: Sequence[Line]) -> str:
    """How 50 pixels of MNIST do beside what is published."""
    of = by_method(lines, "mnist").get(50, {})
    ours = best(of)
    if ours is None:
        return ""
    mean, _ = mean_and_half_width(right(of[ours]))
    published = ", ".join(f"{name} {value} %" for name, value in PUBLISHED.items())
    return (
        f"50 pixels of MNIST: `{ours}`, the best family of gates by validation, keeps "
        f"{interval(right(of[ours]))} %. Published are {published}, by networks of "
        "other sizes and recipes, on which such numbers depend much: the difference, "
        f"{mean - max(PUBLISHED.values()):+.2f} points from the larger, says that this "
        "is a good choice, and not which method is better. Methods compare within one "
        "table."
    )


# ------------------------------------------------------------------------ the pictures


def accuracy(lines: Sequence[Line]) -> Figure | None:
    """A panel for each set: the best family of gates, the other families, the other
    methods."""
    there = {line["data"] for line in lines} - {*tables.KNOWN}
    names = [name for name in tables.NAMES if name in there]
    if not names:
        return None
    columns = min(len(names) + 1, 3)
    rows = math.ceil((len(names) + 1) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axes, name in zip(panels, names, strict=False):
        handles |= _panel(axes, by_method(lines, name))
        axes.set_title(name)
        axes.set_xlabel("features kept")
        axes.set_ylabel("test accuracy, %")
    for axes in panels[len(names) :]:
        axes.axis("off")
    panels[len(names)].legend(handles.values(), handles.keys(), loc="center left")
    return figure


OTHERS = tuple(name for name in METHODS if name not in (*FAMILIES, ALL))


def _panel(axes: Axes, found: dict[int, dict[str, list[Line]]]) -> dict[str, Any]:
    every = [its for of in found.values() for its in [of.get(ALL)] if its]
    counts = sorted(k for k, of in found.items() if of.keys() - {ALL})
    handles: dict[str, Any] = {}
    firsts = {k: best(found[k]) for k in counts}
    for family in FAMILIES:
        own = {k: right(found[k][family]) for k in counts if family in found[k]}
        (handles["each family of gates"],) = axes.plot(
            [*own],
            [np.mean(each) for each in own.values()],
            color=BLUE,
            alpha=0.35,
            linewidth=0.8,
            marker=".",
        )
    lines = {"best gates by validation": {k: firsts[k] for k in counts if firsts[k]}}
    lines |= {name: dict.fromkeys(counts, name) for name in OTHERS}
    for at, (label, names) in enumerate(lines.items()):
        own = {k: right(found[k][n]) for k, n in names.items() if n in found[k]}
        if not own:
            continue
        means, halves = zip(*map(mean_and_half_width, own.values()), strict=True)
        # Side by side, for intervals would hide one another.
        beside = 0.012 * (at - len(lines) / 2) * max(counts)
        handles[label] = axes.errorbar(
            np.array([*own]) + beside,
            means,
            halves,
            color=COLOURS[at % len(COLOURS)],
            marker="osD^vP*"[at],
            elinewidth=0.8,
            linewidth=2 if not at else 1,
            zorder=3 if not at else 2,
        )
    for its in every:
        handles["all features"] = axes.axhline(
            float(np.mean(right(its))), color="grey", linestyle=":"
        )
    axes.set_xticks(counts)
    axes.margins(x=0.15)
    # A family that fails is in the table; here it would flatten all others.
    others = [its for of in found.values() for n, its in of.items() if n in OTHERS]
    drawn = [np.mean(right(its)) for its in others]
    axes.set_ylim(float(min(drawn, default=50)) - 3, 100.5)
    return handles


def pixels(lines: Sequence[Line]) -> Figure | None:
    """Of MNIST, at the largest k: in which share of the seeds a pixel is kept."""
    found = by_method(lines, "mnist")
    counts = [k for k, of in found.items() if of.keys() - {ALL}]
    if not counts:
        return None
    of = found[max(counts)]
    methods = [name for name in METHODS if name in of]
    columns = 5
    rows = math.ceil(len(methods) / columns)
    figure = Figure(figsize=(1.9 * columns, 2.2 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    shown = None
    for axes, method in zip(panels, methods, strict=False):
        share = chosen(of[method]).mean(axis=0).reshape(28, 28)
        shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        mean, _ = mean_and_half_width(right(of[method]))
        axes.set_title(f"{method}\n{mean:.1f} %", fontsize="small", loc="center")
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[["right", "top"]].set_visible(True)
    for axes in panels[len(methods) :]:
        axes.axis("off")
    assert shown is not None
    figure.colorbar(shown, ax=panels, shrink=0.5, label="share of seeds that keep it")
    return figure


if __name__ == "__main__":
    command_line.report(__doc__, "experiments.feature_report", write)
