"""The tables and pictures of the rows of channel pruning, from their results alone.

    python -m experiments.channel_report

writes into `experiments/results/channel-pruning/`, in a few seconds:

- `methods.png`: how far each method's error is from the base network's, before and
  after the pruned network is trained;
- `equal.png`, `resnet20-….png`: the same where all methods train equally long, gates
  among them;
- `widths.png`: channels that each method keeps of each layer;
- `ablations.png`: the weight of the additional loss, and where a layer is full.

The tables are printed into `RESULTS.md` by `experiments.tables`.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import channel_rows
from experiments.harness import results
from experiments.harness.results import Line
from experiments.reports.printing import interval, markdown, mean_and_half_width
from experiments.reports.style import BLUE, ORANGE, STYLE
from l0jax.methods.keeping import count_left

FOLDER = channel_rows.RESULTS
TRAINED, PRUNED = "test error", "pruned test error"

PUBLISHED = {
    # Zhuang et al. (2018), table 1: the error gap in points of ResNet-56 with half the
    # channels removed, of network slimming that of VGGNet (base error 6.01 %).
    "thinet": "+0.82",
    "channel_pruning": "+1.0",
    "dcp": "+0.31",
    "dcp_adapt": "-0.01",
    "random_dcp": "+0.63",
    "width_multiplier": "+0.56",
    "width_multiplier_plus": "+0.45",
    "slimming": "+0.19 (VGG)",
}
"""With 400 epochs on all of CIFAR-10; the base error of ResNet-56 is 6.20 %."""


def of_methods(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """The lines of each method, in the order of the file."""
    return results.by(lines, "method")


def errors(lines: Iterable[Line], when: str = TRAINED) -> list[float]:
    """One of the metrics, for each seed."""
    return [line["metrics"][when] for line in lines]


def gaps(lines: Sequence[Line], when: str = TRAINED) -> list[float]:
    """How far the test error is from the base network's, in points, for each seed."""
    pairs = zip(errors(lines, when), errors(lines, "base test error"), strict=True)
    return [error - base for error, base in pairs]


def above(lines: Sequence[Line], reference: Sequence[Line], when: str = TRAINED) -> str:
    """How far the test error is above another method's on the same base networks: pairs
    of one seed, so that what base networks differ in cancels."""
    other = {line["seed"]: line for line in reference}
    pairs = [(line, other[line["seed"]]) for line in lines if line["seed"] in other]
    if not pairs or lines[0]["method"] == reference[0]["method"]:
        return "-"
    return signed(a["metrics"][when] - b["metrics"][when] for a, b in pairs)


def times_less(lines: Sequence[Line], what: str) -> list[float]:
    """How many times fewer there are than in the base network, for each seed."""
    return [line[what][0] / line[what][1] for line in lines]


def off_budget(lines: Iterable[Line]) -> dict[str, float]:
    """The share of the multiply-accumulates that methods leave which leave more than
    the budget: it is that of most, 5 % allowed for single channels."""
    shares = {
        method: float(np.mean([line["macs"][1] / line["macs"][0] for line in found]))
        for method, found in of_methods(lines).items()
    }
    most = 1.05 * float(np.median(list(shares.values())))
    return {method: share for method, share in shares.items() if share > most}


def signed(values: Iterable[float]) -> str:
    """An interval with the sign of its mean."""
    text = interval(values)
    return text if text.startswith("-") else f"+{text}"


HEADER = [
    *("method", "test error, %", "gap, points", "gap before training"),
    *("above DCP, by seed", "above DCP before training", "parameters"),
    *("MACs", "latency, batch 128", "choosing, s", "published gap", "seeds"),
]


def seconds(values: Iterable[float | None]) -> str:
    """The mean of those that are known: not of runs that were killed in between."""
    known = [value for value in values if value is not None]
    return f"{np.mean(known):,.0f}" if known else "-"


def table(lines: Sequence[Line]) -> str:
    """Every method: mean ± 95 % over seeds. What leaves more than the others is marked:
    its error can't be compared."""
    rows = []
    methods = of_methods(lines)
    dcp, off = methods.get("dcp", []), off_budget(lines)
    for method, found in methods.items():
        rows.append(
            [
                f"{method} (off the budget)" if method in off else method,
                interval(errors(found)),
                signed(gaps(found)),
                signed(gaps(found, PRUNED)),
                above(found, dcp),
                above(found, dcp, PRUNED),
                *(
                    f"{np.mean(times_less(found, what)):.2f}× less"
                    for what in ("params", "macs", "latency")
                ),
                seconds(line["seconds"] for line in found),
                PUBLISHED.get(method, "-"),
                str(len(found)),
            ]
        )
    return markdown(HEADER, rows)


SHORT = channel_rows.FAIR[0]


def short() -> str:
    """The first row within one budget: what each method ends with."""
    lines = channel_rows.recorded(SHORT)
    rows = [
        [
            method,
            f"{interval(errors(found))} %",
            f"{signed(gaps(found))} points",
            f"{100 / np.mean(times_less(found, 'macs')):.1f} %",
            str(len(found)),
        ]
        for method, found in of_methods(lines).items()
    ]
    if not rows:
        return ""
    header = ["method", "test error, last epoch", "above its base network"]
    return markdown([*header, "MACs left", "seeds"], rows)


def best(lines: Iterable[Line], names: Collection[str]) -> list[Line]:
    """The lines of the method of these that has the lowest mean validation error, among
    those with most seeds."""
    found = {n: its for n, its in of_methods(lines).items() if n in names}
    if not found:
        return []
    most = max(map(len, found.values()))
    full = [its for its in found.values() if len(its) == most]
    return min(full, key=lambda its: np.mean(errors(its, "validation error")))


def statements(lines: Sequence[Line]) -> str:
    """Whether discrimination-aware choice beats chance and gates both, by pairs of one
    base network; which gates stand for all is decided by the validation images."""
    methods = of_methods(lines)
    gates = best(lines, [name for name in methods if name.startswith("l0_")])
    every = best(lines, list(methods))
    said = [
        f"The best by validation, {every[0]['method']}, is "
        f"{signed(gaps(every))} points from its base networks."
    ]
    dcp, drawn = methods.get("dcp", []), methods.get("random_dcp", [])
    for one, other in ((dcp, drawn), (gates, dcp), (gates, drawn)):
        if one and other:
            said.append(
                f"{one[0]['method']} against {other[0]['method']}: "
                f"{above(one, other)} points, {shared(one, other)} seeds."
            )
    return " ".join(said)


def shared(one: Iterable[Line], other: Iterable[Line]) -> int:
    """How many base networks two methods have in common."""
    return len({line["seed"] for line in one} & {line["seed"] for line in other})


def of_setting(setting: str, lines: Sequence[Line]) -> dict[float, list[Line]]:
    """Lines by a setting that an ablation varies."""
    values = sorted({line["settings"][setting] for line in lines})
    return {
        value: [line for line in lines if line["settings"][setting] == value]
        for value in values
    }


def of_weights() -> dict[float, list[Line]]:
    """The lines of DCP with several weights of the additional loss."""
    rows = (row for row in channel_rows.ROWS if row.startswith("discrimination-"))
    lines = [line for row in rows for line in channel_rows.recorded(row)]
    return of_setting("discrimination", lines)


def of_epsilons() -> dict[float, list[Line]]:
    """The lines of DCP-Adapt with several ε, that of the comparison among them."""
    rows = [row for row in channel_rows.ROWS if row.startswith("epsilon-")]
    lines = [line for row in rows for line in channel_rows.recorded(row)]
    if lines:
        compared = channel_rows.recorded(channel_rows.COMPARISON)
        lines += [line for line in compared if line["method"] == "dcp_adapt"]
    return of_setting("epsilon", lines)


def discrimination() -> str:
    """The error before any training by the weight of the additional loss."""
    lines = [
        [f"{weight:g}", interval(errors(found, PRUNED)), str(len(found))]
        for weight, found in of_weights().items()
    ]
    return markdown(["weight of the additional loss", "test error, %", "seeds"], lines)


def epsilons() -> str:
    """What DCP-Adapt removes, and what it loses."""
    lines = [
        [
            f"{epsilon:g}",
            interval(errors(found)),
            signed(gaps(found)),
            f"{np.mean(times_less(found, 'params')):.2f}× less",
            f"{np.mean(times_less(found, 'macs')):.2f}× less",
            str(len(found)),
        ]
        for epsilon, found in of_epsilons().items()
    ]
    header = ["ε", "test error, %", "gap, points", "parameters", "MACs", "seeds"]
    return markdown(header, lines)


# ------------------------------------------------------------------------- the pictures


def methods(lines: Sequence[Line]) -> Figure:
    """The gap of each method, the best on top."""
    found = of_methods(lines)
    order = sorted(found, key=lambda name: -np.mean(gaps(found[name])))
    seeds = {name: len(found[name]) for name in order}
    most = max(seeds.values())
    off = off_budget(lines)
    names = [
        name
        + (f" ({seeds[name]} of {most} seeds)" if seeds[name] != most else "")
        + (f" [{off[name]:.0%} of the MACs]" if name in off else "")
        for name in order
    ]
    figure = Figure(figsize=(9, 0.8 + 0.32 * len(order)), layout="constrained")
    before, after = figure.subplots(1, 2, sharey=True)
    for axes, when, title, colour in (
        (before, PRUNED, "right after pruning", ORANGE),
        (after, TRAINED, "after training what is left", BLUE),
    ):
        pairs = [mean_and_half_width(gaps(found[name], when)) for name in order]
        mean, half = np.array(pairs).T
        # A single seed has no interval.
        half[[len(found[name]) < 2 for name in order]] = np.nan
        bars = axes.barh(names, mean, xerr=half, color=colour, height=0.6, capsize=2)
        for bar, name in zip(bars, order, strict=True):
            if name in off:
                bar.set(hatch="///", alpha=0.5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel("test error above the base network's, points")
    config = lines[0]["settings"]
    left = config.get("left")
    figure.suptitle(
        f"{config['model']}, width {config['width']:g}, "
        + (
            f"{config['ratio']:.0%} of the channels removed"
            if left is None
            else f"{left:.0%} of the {config['cost']} may be left"
        )
        + f": {most} seed{'s' if most > 1 else ''}"
        + ("; hatched: more is left than by the others" if off else "")
    )
    return figure


def unlike(lines: Sequence[Line]) -> list[Line]:
    """The lines of methods that don't keep the same share of every layer."""
    return [
        line
        for line in lines
        if any(
            kept != count_left(size, line["settings"]["ratio"])
            for kept, size in zip(
                line["kept"].values(), line["sizes"].values(), strict=True
            )
        )
    ]


def widths(lines: Sequence[Line]) -> Figure:
    """The share of channels that each method keeps of each layer."""
    found = of_methods(lines)
    figure = Figure(figsize=(9, 1.2 + 1.6 * len(found)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(found), 1, sharex=True, sharey=True))
    for axes, (method, those) in zip(panels, found.items(), strict=True):
        names = list(those[0]["sizes"])
        shares = np.array(
            [[e["kept"][n] / e["sizes"][n] for n in names] for e in those]
        )
        at = np.arange(len(names))
        axes.bar(at, 100 * shares.mean(0), color=BLUE, width=0.7)
        for share in shares:
            axes.plot(at, 100 * share, "o", color="black", markersize=3)
        axes.set_title(f"{method}: mean of the seeds, each a dot")
        axes.set_ylabel("kept, %")
        axes.set_ylim(0, 105)
        axes.set_xticks(at, names, rotation=90, fontsize="small")
    return figure


def ablations() -> Figure:
    """Errors by the weight of the additional loss, and by ε with what is left."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    weights = of_weights()
    ratio = next(iter(weights.values()))[0]["settings"]["ratio"]
    _points(
        left,
        [f"{weight:g}" for weight in weights],
        weights.values(),
        PRUNED,
    )
    left.set_xlabel("weight of the additional loss")
    left.set_ylabel("test error before training, %")
    left.set_title(f"DCP, {ratio:.0%} of the channels removed")
    epsilons = of_epsilons()
    names = [
        f"{epsilon:g}\n{np.mean(times_less(found, 'macs')):.2f}× fewer MACs"
        for epsilon, found in epsilons.items()
    ]
    _points(right, names, epsilons.values(), TRAINED)
    right.set_xlabel("ε")
    right.set_ylabel("test error after training, %")
    right.set_title("DCP-Adapt")
    return figure


def _points(
    axes: Axes,
    names: Sequence[str],
    of: Iterable[Sequence[Line]],
    when: str,
) -> None:
    pairs = [mean_and_half_width(errors(lines, when)) for lines in of]
    mean, half = np.array(pairs).T
    axes.errorbar(names, mean, half, color=BLUE, marker="o", capsize=3)
    axes.margins(x=0.15)


def write(folder: Path = FOLDER) -> list[Path]:
    """Draws what there are results for; says where."""
    folder.mkdir(parents=True, exist_ok=True)
    compared = channel_rows.recorded(channel_rows.COMPARISON)
    drawn = []
    with matplotlib.style.context(["default", STYLE]):
        figures: dict[str, Figure] = {}
        if compared:
            figures |= {"methods": methods(compared)}
            uneven = unlike(compared)
            if uneven:
                figures |= {"widths": widths(uneven)}
        for row in channel_rows.FAIR:
            equal = channel_rows.recorded(row)
            if equal:
                figures |= {row: methods(equal)}
        if of_weights() and of_epsilons():
            figures |= {"ablations": ablations()}
        for name, figure in figures.items():
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1])
    return drawn


if __name__ == "__main__":
    for file in write():
        print(f"picture {file}")
