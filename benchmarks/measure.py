"""What benchmarks share: contenders that take turns, results with limits, and a command
line that prints and records them."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def take_turns(
    contenders: dict[str, Callable[[], None]], turns: int
) -> dict[str, list[float]]:
    """Seconds of each contender in each turn."""
    seconds = {name: [] for name in contenders}
    for _ in range(turns):
        for name, go in contenders.items():
            begun = time.perf_counter()
            go()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    """The median over turns of a's time over b's."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def entry(what: str, value: float, limit: float | None, unit: str, detail: str) -> dict:
    """A line of the results; without a limit it is there to be compared with."""
    verdict = "for comparison"
    if limit is not None:
        # Compared as printed.
        verdict = "within" if round(value, 2) <= limit else "NOT within"
    return {
        "what": what,
        "value": f"{value:.2f}{unit}",
        "limit": "" if limit is None else f"≤ {limit:g}{unit}",
        "verdict": verdict,
        "detail": detail,
    }


def milliseconds(seconds: dict[str, list[float]], steps: int) -> str:
    """The median time of a step of each contender."""
    return ", ".join(
        f"{name} {1e3 * statistics.median(s) / steps:.2f} ms"
        for name, s in seconds.items()
    )


def run(
    doc: str | None, name: str, main: Callable[..., list[dict]], turns: int
) -> None:
    """Prints what `main(arguments)` measures; records it as `name` if that is asked."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="write it down")
    parser.add_argument("--to", type=Path, help="write it into this file too")
    parser.add_argument("--turns", type=int, default=turns, help="of each contender")
    arguments = parser.parse_args()
    entries = main(arguments)
    for e in entries:
        print(f"{e['what']}: {e['value']} ({e['verdict']} {e['limit']}); {e['detail']}")
    files = [RESULTS / f"{name}.jsonl"] if arguments.record else []
    for file in [*files, *([arguments.to] if arguments.to else [])]:
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(e) + "\n" for e in entries))


def aligned(table: list[list[str]]) -> str:
    """A table whose columns begin below one another."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in table
    )
