"""Where results lie, and what is printed of them."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
NOTES = RESULTS / "notes.md"
BENCHMARKS = ROOT / "benchmarks" / "results"
