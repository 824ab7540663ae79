"""What a device did while it was watched: a trace, and what took longest.

The trace is for TensorBoard (`tensorboard --logdir`) or Perfetto (`ui.perfetto.dev`).
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from experiments.reports.printing import markdown

FOLDER = "profile"
WATCHED = "watched"


@dataclasses.dataclass(frozen=True)
class Profile:
    """What was seen.

    Args:
        seconds: for how long.
        busy: seconds of these in which an operation ran.
        operations: seconds and calls of each, by its name and that of its program,
            those within it not counted; of several devices or threads the sum.
    """

    seconds: float
    busy: float
    operations: dict[tuple[str, str], tuple[float, int]]

    def text(self, most: int = 10) -> str:
        """The operations that took longest, as a table."""
        longest = sorted(self.operations.items(), key=lambda item: -item[1][0])
        all_of = sum(seconds for seconds, _ in self.operations.values())
        lines = [
            [name, program, str(calls), f"{seconds:.3g}", f"{seconds / all_of:.1%}"]
            for (name, program), (seconds, calls) in longest[:most]
        ]
        return "\n".join(
            [
                markdown(["operation", "program", "calls", "seconds", "share"], lines),
                f"watched for {self.seconds:.3g} s, {1 - self.busy / self.seconds:.1%} "
                "of it without any operation: the device waited for input, or its host",
            ]
        )


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Writes a trace of what is done within it into a folder of its own there."""
    with (
        jax.profiler.trace(str(folder)),
        jax.profiler.TraceAnnotation(WATCHED),
    ):
        yield


def read(folder: Path) -> Profile:
    """What the newest trace in a folder says.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if no operation ran while it was made.
    """
    traces = sorted(folder.glob("plugins/profile/*/*.xplane.pb"))
    if not traces:
        raise FileNotFoundError(f"{folder} holds no trace of jax.profiler")
    own: dict[tuple[str, str], float] = collections.defaultdict(float)
    calls: collections.Counter[tuple[str, str]] = collections.Counter()
    spans, seconds = [], 0.0
    for plane in ProfileData.from_file(str(traces[-1])).planes:
        for line in plane.lines:
            found = []
            for event in line.events:
                stats: dict[Any, Any] = dict(event.stats)
                if event.name == WATCHED:
                    seconds = event.duration_ns / 1e9
                if "hlo_op" in stats and event.duration_ns > 0:
                    name = str(stats["hlo_op"]), str(stats.get("hlo_module", ""))
                    end = event.start_ns + event.duration_ns
                    found.append((event.start_ns, end, name))
            for begin, end, name, without in alone(found):
                own[name] += without
                calls[name] += 1
                spans.append((begin, end))
    if not spans:
        raise ValueError(f"{traces[-1]}: no operation ran while it was made")
    return Profile(
        seconds,
        covered(spans) / 1e9,
        {name: (own[name] / 1e9, calls[name]) for name in own},
    )


def alone(
    events: list[tuple[float, float, tuple[str, str]]],
) -> list[tuple[float, float, tuple[str, str], float]]:
    """Events of one thread, each with its time without those within it."""
    found: list[list[Any]] = []
    open_at: list[int] = []
    for begin, end, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_at and found[open_at[-1]][1] <= begin:
            open_at.pop()
        if open_at:
            found[open_at[-1]][3] -= end - begin
        open_at.append(len(found))
        found.append([begin, end, name, end - begin])
    return [(begin, end, name, max(own, 0.0)) for begin, end, name, own in found]


def covered(spans: list[tuple[float, float]]) -> float:
    """The time that intervals cover."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
