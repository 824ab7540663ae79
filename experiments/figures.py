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
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
import PIL.Image
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

Vector = Float[np.ndarray, " units"]
Image = Float[np.ndarray, "height width"]

BLUE, ORANGE, GREEN, PINK, AMBER, SKY = (
    # Okabe and Ito (2008): distinct for every common kind of colour vision.
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY)
REMOVED = "#D0D0D0"

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.titlesize": "medium",
    "figure.titleweight": "bold",
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 4,
    "savefig.dpi": 120,
}

COSTS = {
    "weights": "Weights left",
    "macs": "Computation: multiply-accumulates",
    "reference_flops": "Computation: FLOPs, reference implementation",
    "flops_objective": "Computation: FLOPs, FLOPs-objective paper (Tang et al. 2018)",
}

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

MOST_FRAMES = 60
FRAME_MILLISECONDS = 120
LAST_FRAME_MILLISECONDS = 2000


class Run(NamedTuple):
    """What a run left in its folder.

    Attributes:
        config: its settings.
        epochs: the metrics of each epoch, in order; empty if none was finished.
        activity: by epoch, 0 for the start, P(z != 0) of each unit of each group.
        gates: at the end, `"<group>/prob_active"` and `"<group>/value"`.
        summary: the results.
    """

    config: dict[str, Any]
    epochs: list[dict[str, Any]]
    activity: dict[int, dict[str, Vector]]
    gates: dict[str, Vector]
    summary: dict[str, Any]


def read(folder: Path) -> Run:
    """The run that lies in `folder`.

    Raises:
        FileNotFoundError: if one of its files is missing.
    """
    names = ("config.json", "metrics.jsonl", "gates.npz", "summary.json", "activity")
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
        summary=json.loads((folder / "summary.json").read_text()),
    )


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
        if "input" in _sizes(run):
            drawn.append(target / "pixels.gif")
            animate(run, drawn[-1])
    return drawn


def _pictures(run: Run) -> Iterable[tuple[str, Figure]]:
    if run.epochs:
        yield "training.png", training(run)
        yield "costs.png", costs(run)
    if run.gates:
        yield "gates.png", gates(run)
    if "input" in _sizes(run):
        yield "pixels.png", pixels(run)
    if "features" in _sizes(run):
        yield "features.png", features(run)


# --- over epochs ----------------------------------------------------------------------


def training(run: Run) -> Figure:
    """Errors above, the share of each group's units that is left below."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    figure.suptitle(f"Training of {_title(run)}")
    above, below = figure.subplots(2, 1, sharex=True)
    _errors(above, run)
    _architecture(below, run)
    for axes in (above, below):
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _errors(axes: Axes, run: Run) -> None:
    epochs = _over_epochs(run, "epoch")
    train, validation = (
        _over_epochs(run, key) for key in ("train_error", "validation_error")
    )
    for name, errors, colour in (
        ("training", train, SKY),
        ("validation", validation, BLUE),
    ):
        label = f"{name}, last: {errors[-1]:.2f} %"
        axes.plot(epochs, errors, color=colour, marker=_marker(run), label=label)
    points = _test_errors(run)
    for epoch, error, label, form in points:
        axes.plot(epoch, error, linestyle="", label=label, zorder=3, **form)
    unseen = [*validation, *(error for _, error, _, _ in points)]
    # A training error that falls to nothing may leave the axis: the others matter.
    floor = min((error for error in unseen if error > 0), default=1.0) / 10
    shown = [error for error in (*unseen, *train) if error >= floor]
    _log_percent(axes, min(shown, default=floor), max(shown, default=1.0))
    axes.set_title("Error")
    axes.set_ylabel("error (%), log scale")


def _test_errors(run: Run) -> list[tuple[int, float, str, dict[str, Any]]]:
    """The two test errors worth reporting: epoch, error, label and form of the point.

    They may coincide, so the one is drawn as a ring around the other.
    """
    last = run.epochs[-1]["epoch"]
    dot = {"marker": "D", "markersize": 5, "color": ORANGE}
    ring = {**dot, "marker": "o", "markersize": 11, "fillstyle": "none"}
    points = []
    for key, name, form in (
        ("last", "last epoch", dot),
        ("best_on_validation", "best on validation", ring),
    ):
        found = run.summary.get(key) or {}
        if found.get("test_error") is not None:
            epoch, error = found.get("epoch", last), found["test_error"]
            label = f"test, {name}\n(epoch {epoch}): {error:.2f} %"
            points.append((epoch, error, label, form))
    return points


def _architecture(axes: Axes, run: Run) -> None:
    epochs = _over_epochs(run, "epoch")
    # Lines often coincide: what is drawn later has gaps.
    looks = itertools.cycle(zip(COLOURS, ("-", "--", "-.", ":"), strict=False))
    for (group, size), (colour, line) in zip(_sizes(run).items(), looks, strict=False):
        left = np.array([record["architecture"][group] for record in run.epochs])
        axes.plot(
            epochs,
            100 * left / size,
            color=colour,
            linestyle=line,
            marker=_marker(run),
            label=f"{group}: {size:,} → {left[-1]:,}",
        )
    axes.set_title(f"Units left {_by_rule(run)}")
    axes.set_ylabel("units left (% of the group)")
    axes.set_ylim(-3, 103)
    _epoch_axis(axes)


def costs(run: Run) -> Figure:
    """Weights and computation left: in expectation, and by the test-time rule."""
    figure = Figure(figsize=(10.5, 7.5), layout="constrained")
    figure.suptitle(f"Costs of {_title(run)}")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for (key, name), axes in zip(COSTS.items(), grid.flat, strict=True):
        _cost(axes, run, key, name)
    _log_share(grid[0, 0], min(axes.dataLim.y0 for axes in grid.flat))
    for axes in grid[:, 0]:
        axes.set_ylabel("left (% of dense), log scale")
    for axes in grid[1]:
        _epoch_axis(axes)
    return figure


def _cost(axes: Axes, run: Run, key: str, name: str) -> None:
    epochs = _over_epochs(run, "epoch")
    dense = run.epochs[-1]["dense"][key]
    for which, label, colour, line in (
        ("decided", _by_rule(run), BLUE, "-"),
        ("expected", "expected over draws of the gates", ORANGE, "--"),
    ):
        left = np.array([record[which][key] for record in run.epochs], float)
        axes.plot(
            epochs,
            100 * left / max(dense, 1),
            color=colour,
            linestyle=line,
            marker=_marker(run),
            label=f"{label}: {left[-1]:,.0f}",
        )
    # Above the axes, where it can't cover a curve; its title is that of the panel.
    legend = axes.legend(
        title=f"{name}\ndense: {dense:,.0f}",
        alignment="left",
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        borderpad=0,
    )
    legend.get_title().set_fontsize("medium")


# --- the gates at the end -------------------------------------------------------------


def gates(run: Run) -> Figure:
    """For each group, P(z != 0) and the values of the gates at test time."""
    groups = _gated(run)
    figure = Figure(figsize=(9, 1 + 2 * len(groups)), layout="constrained")
    figure.suptitle(f"Gates of {_title(run)}, after training")
    grid = figure.subplots(len(groups), 2, sharex="col", squeeze=False)
    for group, (left, right) in zip(groups, grid, strict=True):
        prob_active = run.gates[f"{group}/prob_active"]
        value = run.gates[f"{group}/value"]
        undecided = _share((prob_active > 0.1) & (prob_active < 0.9))
        _histogram(left, prob_active, SKY)
        _histogram(right, value, BLUE)
        left.set_ylabel("gates, log scale")
        left.set_title(f"{group}: {value.size:,} gates, {undecided} undecided")
        at_0, at_1 = value == 0, value == 1
        right.set_title(
            f"exactly 0: {at_0.sum():,} ({_share(at_0)}), "
            f"exactly 1: {at_1.sum():,} ({_share(at_1)})"
        )
    grid[-1, 0].set_xlabel("P(z ≠ 0); undecided: between 0.1 and 0.9")
    grid[-1, 1].set_xlabel(f"gate value {_by_rule(run)}")
    return figure


def _histogram(axes: Axes, values: Vector, colour: str) -> None:
    ends = (min(0.0, values.min(initial=0)), max(1.0, values.max(initial=1)))
    axes.hist(values, bins=40, range=ends, color=colour)
    axes.set_yscale("log")
    # From below 1, so that a bar of one gate can be seen.
    axes.set_ylim(0.5, 2 * max(values.size, 1))


def _share(condition: np.ndarray) -> str:
    return f"{100 * condition.sum() / max(condition.size, 1):.1f} %"


# --- what is read ---------------------------------------------------------------------


def readers_left(run: Run, group: str) -> Int[np.ndarray, " units"]:
    """How much still reads each unit of `group` at test time.

    With gates on units it is 1 or 0, as the gate says; with gates on weights, the
    number of weights left that read the unit. Without gates, all are read.
    """
    if not run.gates:
        return np.ones(_sizes(run)[group], int)
    if f"{group}/value" in run.gates:
        return (run.gates[f"{group}/value"] != 0).astype(int)
    kernel, outputs = READERS[group]
    sizes = _sizes(run)
    # (windows or positions, inputs, outputs), whatever the kernel.
    value = run.gates[f"{kernel}/value"].reshape(-1, sizes[group], sizes[outputs])
    return (value != 0).sum((0, 2))


def pixels(run: Run) -> Figure:
    """The input as a map: P(z != 0) of each pixel, and what is read at test time."""
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    figure.suptitle(f"{_pixels_read(run)}: {_title(run)}")
    left, right = figure.subplots(1, 2)
    _show_probability(figure, left, pixel_map(run, _last_activity(run)["input"]), run)
    readers = pixel_map(run, readers_left(run, "input").astype(float))
    _show_readers(figure, right, readers, "pixel", run)
    for axes in (left, right):
        axes.set_xlabel("column (pixels)")
        axes.set_ylabel("row (pixels)")
    return figure


def pixel_map(run: Run, values: Vector) -> Image:
    """One value per pixel, as an image; the mean over colours, if there are any."""
    return values.reshape(run.summary["shape"]).mean(-1)


def animate(run: Run, file: Path) -> None:
    """P(z != 0) of each pixel over epochs."""
    figure = Figure(figsize=(4.6, 4.5), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.08, 0.06, 0.76, 0.78))
    name = f"{_probability_name(run)} of each pixel"
    figure.suptitle(f"{_title(run)}\n{name}", fontsize="small")
    last = pixel_map(run, _last_activity(run)["input"])
    shown = _show_probability(figure, axes, last, run)
    shown.set_clim(0, 1)
    title = axes.set_title("")
    # All but these two is drawn once: whole frames would take ten times as long.
    for artist in (shown, title):
        artist.set_animated(True)
    canvas.draw()
    background = canvas.copy_from_bbox(figure.bbox)
    images = []
    for epoch in frames(list(run.activity), MOST_FRAMES):
        canvas.restore_region(background)
        shown.set_data(pixel_map(run, run.activity[epoch]["input"]))
        title.set_text(_frame_title(run, epoch))
        for artist in (shown, title):
            axes.draw_artist(artist)
        images.append(PIL.Image.fromarray(np.array(canvas.buffer_rgba())[..., :3]))
    durations = [FRAME_MILLISECONDS] * (len(images) - 1) + [LAST_FRAME_MILLISECONDS]
    images[0].save(
        file, save_all=True, append_images=images[1:], duration=durations, loop=0
    )


def _frame_title(run: Run, epoch: int) -> str:
    for record in run.epochs:
        if record["epoch"] == epoch:
            return f"epoch {epoch}: {_pixels_read(run, record['architecture'])}"
    expected = run.activity[epoch]["input"].sum()
    return f"epoch {epoch}: {expected:,.0f} pixels expected to be read"


def frames(epochs: Sequence[int], most: int) -> list[int]:
    """At most `most` of `epochs`, evenly spread, the first and the last among them."""
    if len(epochs) <= most:
        return list(epochs)
    return [
        epochs[i] for i in np.linspace(0, len(epochs) - 1, most).round().astype(int)
    ]


def features(run: Run) -> Figure:
    """What the first dense layer of LeNet-5 reads, and the maps that are left."""
    left = _architecture_at_end(run)
    sizes = _sizes(run)
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(
        f"{left['features']:,} of {sizes['features']:,} features read, from "
        f"{left['conv2']} of {sizes['conv2']} maps: {_title(run)}"
    )
    grid = figure.subplot_mosaic(
        [["probability", "readers"], ["conv1", "conv2"]], height_ratios=(3, 2)
    )
    probability, readers = feature_maps(run)
    _show_probability(figure, grid["probability"], tiles(probability), run)
    _show_readers(figure, grid["readers"], tiles(readers), "feature", run)
    for name in ("probability", "readers"):
        _label_tiles(grid[name], probability.shape)
    _maps(grid["conv1"], run, "conv1", readers_left(run, "conv1") > 0)
    _maps(grid["conv2"], run, "conv2", readers.sum((0, 1)) > 0)
    return figure


def feature_maps(
    run: Run,
) -> tuple[Float[np.ndarray, "h w maps"], Float[np.ndarray, "h w maps"]]:
    """P(z != 0) and `readers_left` of each feature, in the shape of the maps.

    With gates on units both the feature's gate and its map's must be open.
    """
    prob_active, maps = _last_activity(run), _sizes(run)["conv2"]
    side = math.isqrt(prob_active["features"].size // maps)
    probability = prob_active["features"].reshape(side, side, maps)
    readers = readers_left(run, "features").reshape(side, side, maps)
    if "features/value" in run.gates:
        probability = probability * prob_active["conv2"]
        readers = readers * readers_left(run, "conv2")
    return probability, readers.astype(float)


def tiles(maps: Float[np.ndarray, "h w maps"], columns: int = 10) -> Image:
    """The maps side by side, `columns` in a row, with a gap of NaN around each."""
    height, width, count = maps.shape
    rows = math.ceil(count / columns)
    image = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1), np.nan)
    for j in range(count):
        top = (j // columns) * (height + 1) + 1
        left = (j % columns) * (width + 1) + 1
        image[top : top + height, left : left + width] = maps[:, :, j]
    return image


def _label_tiles(axes: Axes, shape: tuple[int, ...], columns: int = 10) -> None:
    height, width, count = shape
    rows = range(math.ceil(count / columns))
    axes.set_xticks(
        [(width + 1) * (j + 0.5) for j in range(columns)], map(str, range(columns))
    )
    axes.set_yticks(
        [(height + 1) * (row + 0.5) for row in rows],
        [f"{columns * row} +" for row in rows],
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"feature map; each is {height} by {width} features")


def _maps(axes: Axes, run: Run, group: str, kept: np.ndarray) -> None:
    prob_active = _last_activity(run)[group]
    colours = np.where(kept, BLUE, REMOVED)
    axes.bar(np.arange(kept.size), prob_active, color=colours, width=0.8)
    axes.set_title(f"{group}: {kept.sum()} of {kept.size} maps read (blue)")
    axes.set_xlabel("map")
    axes.set_ylabel(_probability_name(run))
    axes.set_ylim(0, 1.02)
    axes.grid(False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _show_probability(figure: Figure, axes: Axes, image: Image, run: Run) -> AxesImage:
    # The mean over many weights is small everywhere, so it is scaled.
    most = np.nanmax(image) if run.config["gates"] == "weight" else 1.0
    shown = axes.imshow(
        image, cmap="cividis", vmin=0, vmax=max(most, 0.01), interpolation="nearest"
    )
    axes.grid(False)
    axes.set_title(_probability_name(run))
    _colour_bar(figure, axes, shown)
    return shown


def _show_readers(
    figure: Figure, axes: Axes, image: Image, unit: str, run: Run
) -> None:
    counts = run.config["gates"] == "weight"
    colours = matplotlib.colormaps["cividis"].resampled(256 if counts else 2)
    most = max(1.0, np.nanmax(image)) if counts else 1.0
    shown = axes.imshow(image, cmap=colours, vmin=0, vmax=most, interpolation="nearest")
    axes.grid(False)
    axes.set_title(f"Left {_by_rule(run)}")
    bar = _colour_bar(figure, axes, shown)
    if counts:
        bar.locator = MaxNLocator(integer=True)
        bar.set_label(f"weights left that read the {unit}")
    else:
        bar.set_ticks([0.25, 0.75], labels=["removed", "read"])


def _colour_bar(figure: Figure, axes: Axes, shown: AxesImage) -> Colorbar:
    """A colour bar as high as the image, which `ax=axes` would not give."""
    return figure.colorbar(shown, cax=axes.inset_axes((1.03, 0, 0.04, 1)))


# --- words, axes and numbers ----------------------------------------------------------


def _title(run: Run) -> str:
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


def _by_rule(run: Run) -> str:
    return f"by the test-time rule '{run.summary['test_rule']}'"


def _pixels_read(run: Run, architecture: dict[str, int] | None = None) -> str:
    read = (architecture or _architecture_at_end(run))["input"]
    return f"{read:,} of {_sizes(run)['input']:,} pixels read"


def _probability_name(run: Run) -> str:
    return "mean P(z ≠ 0)" if run.config["gates"] == "weight" else "P(z ≠ 0)"


def _architecture_at_end(run: Run) -> dict[str, int]:
    if run.epochs:
        return run.epochs[-1]["architecture"]
    return {
        group: int((readers_left(run, group) > 0).sum())
        for group in _sizes(run)
        if group in READERS
    }


def _last_activity(run: Run) -> dict[str, Vector]:
    return run.activity[max(run.activity)]


def _sizes(run: Run) -> dict[str, int]:
    last = _last_activity(run)
    return {group: last[group].size for group in _in_order(last)}


def _gated(run: Run) -> list[str]:
    return _in_order({name.rpartition("/")[0] for name in run.gates})


def _in_order(names: Iterable[str]) -> list[str]:
    """From the input of the network to its output; `layers.10` after `layers.9`."""
    return sorted(names, key=lambda name: (name not in READERS, len(name), name))


def _arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as stored:
        # float16 sums and products would be coarse.
        return {name: stored[name].astype(np.float32) for name in stored.files}


def _over_epochs(run: Run, key: str) -> Float[np.ndarray, " epochs"]:
    """One metric over epochs; NaN, which is drawn as a gap, where there is none."""
    return np.array([record.get(key) for record in run.epochs], float)


def _marker(run: Run) -> str:
    """Points where epochs are few: a line through one point can't be seen."""
    return "o" if len(run.epochs) <= 20 else ""


def _epoch_axis(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(
        MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    )


def _log_share(axes: Axes, least: float) -> None:
    """A logarithmic axis from `least` to 100 %; linear below 1 %, to have 0 on it."""
    ticks = (0, 1, 2, 5, 10, 20, 50, 100)
    axes.set_yscale("symlog", linthresh=1, linscale=0.5)
    axes.set_yticks(ticks, map(str, ticks))
    axes.set_ylim(max((tick for tick in ticks if 0 < tick < least), default=-0.3), 120)


def _log_percent(axes: Axes, lowest: float, highest: float) -> None:
    """A logarithmic axis between round numbers that enclose `lowest` and `highest`."""
    round_numbers = [digit * 10.0**n for n in range(-6, 3) for digit in (1, 2, 5)]
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(
        max(number for number in round_numbers if number < lowest),
        min(number for number in round_numbers if number > highest),
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def main() -> None:
    """Draws the pictures of the run in the folder that is given."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of a finished run")
    for file in draw(parser.parse_args().folder):
        print(file)


if __name__ == "__main__":
    main()
