"""The graph of a circuit: the parts of a transformer by layer, and its edges."""

from collections.abc import Collection
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

from experiments.reports.style import BLUE, ORANGE, PINK, REMOVED
from experiments.tasks.compiled import READS, Edge, Program

WIDE, HIGH = 0.65, 0.62
"""half a box, beside the 2 between stages and lanes"""
LANE = 1.7
SHORT = 4
"""as long as an edge between parts that follow one another"""

Place = tuple[float, float]
Line = Literal["-", "--"]


def graph(program: Program, found: Collection[Edge], title: str) -> Figure:
    """What was found beside what is needed.

    Embeddings are left, then each layer's heads (above) and its MLP (below), then the
    output. An edge ends at the query, the key or the value of a head.

    Args:
        program: of which all edges are drawn.
        found: those that were kept.
        title: of the picture.
    """
    needed = {program.edges[at] for at in np.flatnonzero(program.needed)}
    kinds: dict[str, tuple[set[Edge], str, Line, float]] = {
        "removed": (set(program.edges) - set(found) - needed, REMOVED, "-", 0.6),
        "kept": (needed & set(found), BLUE, "-", 2.0),
        "missing": (needed - set(found), ORANGE, "--", 2.0),
        "superfluous": (set(found) - needed, PINK, "-", 2.0),
    }
    places = places_of(program)
    used = {part for edge in found for part in (edge.sender, part_of(edge.receiver))}
    stages = max(x for x, _ in places.values())
    rows = [y for _, y in places.values()]
    size = (1.2 + 0.6 * stages, 2.6 + 0.6 * (max(rows) - min(rows)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for edges, colour, line, thickness in kinds.values():
        for edge in sorted(edges):
            arrow(axes, places, edge, colour, line, thickness)
    for name, place in places.items():
        box(axes, name, place, name in used)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_aspect("equal")
    axes.autoscale_view()
    axes.axis("off")
    axes.legend(
        handles=[
            Line2D([], [], color=colour, linestyle=line, linewidth=thickness)
            for _, colour, line, thickness in kinds.values()
        ],
        labels=[f"{name}: {len(edges)}" for name, (edges, *_) in kinds.items()],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=len(kinds),
        frameon=False,
        fontsize=9,
    )
    return figure


def part_of(receiver: str) -> str:
    """The part of which it is the input: of a query the head."""
    head, _, read = receiver.rpartition(" ")
    return head if read in READS else receiver


def places_of(program: Program) -> dict[str, Place]:
    """The middle of each part's box."""
    found = {"tokens": (0.0, LANE), "positions": (0.0, -LANE)}
    for layer in range(program.layers):
        for head in range(program.heads):
            found[f"head {layer}.{head}"] = (3.0 + 4 * layer, LANE * (1 + head))
        found[f"MLP {layer}"] = (5.0 + 4 * layer, -LANE)
    found["output"] = (3.0 + 4 * program.layers, 0.0)
    return found


def box(axes: Axes, name: str, place: Place, used: bool) -> None:
    """A part; paler if no edge of the circuit begins or ends there."""
    x, y = place
    colour = "black" if used else "0.65"
    frame = FancyBboxPatch(
        (x - WIDE, y - HIGH),
        2 * WIDE,
        2 * HIGH,
        boxstyle="round,pad=0,rounding_size=0.15",
        facecolor="white",
        edgecolor=colour,
        linewidth=1.2 if used else 0.8,
        zorder=4,
    )
    axes.add_patch(frame)
    reads = name.startswith("head ")
    axes.text(
        x + 0.13 * reads,
        y,
        name.replace(" ", "\n"),
        ha="center",
        va="center",
        fontsize=8,
        color=colour,
        zorder=5,
    )
    if reads:
        for read in READS:
            _, height = entry({name: place}, f"{name} {read}")
            axes.text(
                x - WIDE + 0.08,
                height,
                read[0],
                ha="left",
                va="center",
                fontsize=6.5,
                color=colour,
                zorder=5,
            )


def entry(places: dict[str, Place], receiver: str) -> Place:
    """Where edges to a receiver end."""
    part = part_of(receiver)
    x, y = places[part]
    if part != receiver:
        y += 0.4 * (1 - READS.index(receiver.rpartition(" ")[2]))
    return x - WIDE, y


def arrow(
    axes: Axes,
    places: dict[str, Place],
    edge: Edge,
    colour: str,
    line: Line,
    thickness: float,
) -> None:
    """An edge, which bends around the parts that it passes."""
    start = places[edge.sender][0] + WIDE, places[edge.sender][1]
    end = entry(places, edge.receiver)
    length = end[0] - start[0]
    above, below = np.sign(start[1]), np.sign(places[part_of(edge.receiver)][1])
    reach, leave, arrive = min(0.45 * length, 1.2), 0.0, 0.0
    if length > SHORT and above == below:
        # Around what lies between them, on the outside.
        reach = min(0.45 * length, 2.2)
        leave = arrive = above * (0.75 + 0.1 * length)
    elif length > SHORT:
        # Through the middle, where no box is.
        leave, arrive = -above, -below
    curve = Curve(
        [
            start,
            (start[0] + reach, start[1] + leave),
            (end[0] - reach, end[1] + arrive),
            end,
        ],
        [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4],
    )
    axes.add_patch(
        FancyArrowPatch(
            path=curve,
            arrowstyle="-|>" if thickness > 1 else "-",
            mutation_scale=9,
            color=colour,
            linestyle=line,
            linewidth=thickness,
            shrinkA=0,
            shrinkB=0,
            zorder=3 if thickness > 1 else 1,
        )
    )
