"""Which pixels and which features a network reads, at the end and over the epochs."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from experiments.reports.finished_run import (
    Run,
    Vector,
    architecture_at_end,
    by_rule,
    last_activity,
    pixels_read,
    probability_name,
    readers_left,
    sizes_of,
    title_of,
)
from experiments.reports.style import BLUE, REMOVED

Image = Float[np.ndarray, "height width"]

MOST_FRAMES = 40

FRAME_MILLISECONDS = 180

LAST_FRAME_MILLISECONDS = 2000
COLOURS_OF_FRAMES = 32


def pixels(run: Run) -> Figure:
    """The input as a map: P(z != 0) of each pixel, and what is read at test time."""
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    figure.suptitle(f"{pixels_read(run)}: {title_of(run)}")
    left, right = figure.subplots(1, 2)
    _show_probability(figure, left, pixel_map(run, last_activity(run)["input"]), run)
    readers = pixel_map(run, readers_left(run, "input").astype(float))
    _show_readers(figure, right, readers, "pixel", run)
    for axes in (left, right):
        axes.set_xlabel("column (pixels)")
        axes.set_ylabel("row (pixels)")
    return figure


def pixel_map(run: Run, values: Vector) -> Image:
    """One value per pixel, as an image; the mean over colours, if there are any."""
    return values.reshape(run.result["shape"]).mean(-1)


def animate(run: Run, file: Path) -> None:
    """P(z != 0) of each pixel over epochs."""
    figure = Figure(figsize=(4.6, 4.5), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.08, 0.06, 0.76, 0.78))
    name = f"{probability_name(run)} of each pixel"
    figure.suptitle(f"{title_of(run)}\n{name}", fontsize="small")
    last = pixel_map(run, last_activity(run)["input"])
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
    # With few colours, the same in all frames, the file is a quarter as large.
    ends = PIL.Image.fromarray(np.hstack([np.asarray(images[i]) for i in (0, -1)]))
    colours = ends.quantize(COLOURS_OF_FRAMES)
    small = [
        each.quantize(palette=colours, dither=PIL.Image.Dither.NONE) for each in images
    ]
    small[0].save(
        file, save_all=True, append_images=small[1:], duration=durations, loop=0
    )


def _frame_title(run: Run, epoch: int) -> str:
    for record in run.epochs:
        if record["epoch"] == epoch:
            return f"epoch {epoch}: {pixels_read(run, record['architecture'])}"
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
    left = architecture_at_end(run)
    sizes = sizes_of(run)
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(
        f"{left['features']:,} of {sizes['features']:,} features read, from "
        f"{left['conv2']} of {sizes['conv2']} maps: {title_of(run)}"
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
    prob_active, maps = last_activity(run), sizes_of(run)["conv2"]
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
    prob_active = last_activity(run)[group]
    colours = np.where(kept, BLUE, REMOVED)
    axes.bar(np.arange(kept.size), prob_active, color=colours, width=0.8)
    axes.set_title(f"{group}: {kept.sum()} of {kept.size} maps read (blue)")
    axes.set_xlabel("map")
    axes.set_ylabel(probability_name(run))
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
    axes.set_title(probability_name(run))
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
    axes.set_title(f"Left {by_rule(run)}")
    bar = _colour_bar(figure, axes, shown)
    if counts:
        bar.locator = MaxNLocator(integer=True)
        bar.set_label(f"weights left that read the {unit}")
    else:
        bar.set_ticks([0.25, 0.75], labels=["removed", "read"])


def _colour_bar(figure: Figure, axes: Axes, shown: AxesImage) -> Colorbar:
    """A colour bar as high as the image, which `ax=axes` would not give."""
    return figure.colorbar(shown, cax=axes.inset_axes((1.03, 0, 0.04, 1)))
