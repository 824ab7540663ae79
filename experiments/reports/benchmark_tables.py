"""Tables of the recorded benchmarks, and of models that others wrote."""

from collections.abc import Callable

from experiments.harness import json_lines
from experiments.reports import places
from experiments.reports.printing import markdown

KEYS = ("what", "value", "limit", "verdict", "detail")
BENCHMARKED = {
    "steps": "A training step",
    "families": "A training step with gates of each family",
    "pages": "A training step in large pages of memory",
    "structure": "Reading models, counting and removing",
    "reading": "Reading large programs",
    "transformers": "Reading a language model of 7 billion parameters",
    "against_torch_pruning": "Beside Torch-Pruning",
    "compaction": "Training that compacts",
    "decoder": "A language model with gates, and at half of its size",
    "sweeps": "Many runs in one program",
    "devices": "Many devices",
    "input": "Examples from the disk",
    "gpu": "On an accelerator",
    "selection": "Choosing channels",
    "relocation": "Closing units softly",
    "mutations": "Damaged files",
    "run_folders": "Damaged records",
    "kills": "Runs that are killed",
    "checkpoints": "A checkpoint after every epoch",
    "narrow_convolutions": "What half the channels of a convolution save",
}


def benchmarks() -> str:
    """The recorded benchmarks, a line per number."""
    header = ["what", "measured", "limit", "", "detail"]
    parts = []
    for name, title in BENCHMARKED.items():
        entries = json_lines.read(places.BENCHMARKS / f"{name}.jsonl")
        if entries:
            lines = [[e[k] for k in KEYS] for e in entries]
            parts += [f"### {title}: `python -m benchmarks.{name}`"]
            parts += [markdown(header, lines)]
    return "\n\n".join(parts)


ZOO = (
    "model",
    "package",
    "parameters",
    "equations",
    "s",
    "µs an equation",
    "groups",
    "covered",
    "half",
    "outputs",
    "gradients",
    "batch",
    "no rule for",
)

KINDS = ("outputs", "gradients", "input gradients")
# The share of the parameters in groups that counts as all.
COVERED = 0.99


def zoo() -> str:
    """Models that others wrote: a line each, those that are covered least first."""
    rows = json_lines.read(places.BENCHMARKS / "zoo.jsonl")
    if not rows:
        return ""
    read = [row for row in rows if "error" not in row]
    read.sort(key=lambda row: (_best(row)["covered"], row["model"]))
    lines = [_zoo_line(row) for row in read]
    whole = ", ".join(f"`{r['model']}`" for r in read if not r["floating inputs"])
    broken = [f"- `{row['model']}`: {row['broken']}" for row in read if row["broken"]]
    broken += [f"- `{r['model']}`: {r['error']}" for r in rows if "error" in r]
    remarks = []
    if whole:
        remarks.append(f"Inputs are whole numbers, without gradients: {whole}.")
    without = [f"`{r['model']}`" for r in read if len(r["checks"]) < 3]
    if without:
        remarks.append(
            "Without a value when the groups drawn are gone, and not compared there: "
            f"{', '.join(without)}."
        )
    again = [*map(_zoo_again, (row for row in read if "in float64" in row))]
    if again:
        remarks.append(
            "The largest difference in float64, where it was measured (some models ask "
            f"for float32 themselves): {', '.join(again)}."
        )
    if broken:
        remarks.append("Exceptions:\n\n" + "\n".join(broken))
    least = [*map(_zoo_reasons, (r for r in read if _best(r)["covered"] < COVERED))]
    if least:
        remarks.append(
            "Why less than 99 % is covered, with the share of the parameters in no "
            "group that each reason touches:\n\n" + "\n".join(least)
        )
    return "\n\n".join(
        [
            "## Models that others wrote",
            f"`python -m benchmarks.zoo --record`: {len(rows)} models with random "
            "weights, read at their published sizes if they have them, else at sizes "
            "of ours. *Covered* is the share of the parameters that lie in at least "
            "one group, *half* the share that goes with half of every group; seconds "
            "are those of the processor for `trace` beyond `jax.make_jaxpr`. Small "
            "ones are gated with 40 % of the units closed at random, with one left of "
            "each group, and with some groups gone, and compared with what is "
            "narrowed, in float32: the largest difference over the largest output "
            "(limit 1e-5) and over the largest gradient (limit 1e-4), and whether the "
            "costs are those of the narrowed program. Where a difference is beyond "
            "1e-5, all are measured again in float64, which tells rounding from a "
            "wrong rule, and those are held against the limits.",
            *([_zoo_limits(read)] if read else []),
            markdown([*ZOO], lines),
            *remarks,
        ]
    )


def _best(row: dict) -> dict:
    return row.get("large", row["small"])


def _zoo_again(row: dict) -> str:
    """The largest difference of any kind in float64."""
    return f"`{row['model']}` {max(_farthest(what)(row) for what in KINDS):.0e}"


def _zoo_reasons(row: dict) -> str:
    """The three largest reasons for what is in no group."""
    found = [*_best(row)["frozen"].items()][:3]
    told = "; ".join(f"{100 * share:.1f} %: {reason}" for reason, share in found)
    return f"- `{row['model']}`: {told}"


def _zoo_sizes(row: dict) -> str:
    """Whose sizes they are, unless they were published."""
    if "large" not in row:
        return " (small)"
    return "" if row["published"] else " (our sizes)"


def _zoo_line(row: dict) -> list[str]:
    found, checks = _best(row), row["checks"].values()
    gradients = [each[k] for each in checks for k in ("gradients", "input gradients")]
    return [
        f"`{row['model']}`" + _zoo_sizes(row),
        f"{row['package']} {row['version']}",
        f"{found['parameters']:,}",
        f"{found['equations']:,}",
        f"{found['seconds']:.2f}",
        f"{found['us_per_equation']:.0f}",
        str(found["groups"]),
        f"{100 * found['covered']:.0f} %",
        f"{100 * found['half']:.0f} %",
        f"{max(each['outputs'] for each in checks):.0e}",
        f"{max(gradients):.0e}",
        row["batch"],
        ", ".join(found["unknown"]),
    ]


def _zoo_limits(rows: list[dict]) -> str:
    """The worst of all models beside the limits."""
    header = ["what", "measured", "limit", "", "the worst"]
    covered = [row["model"] for row in rows if _best(row)["covered"] >= COVERED]
    least = min(rows, key=lambda row: _best(row)["covered"])
    lines = [
        [
            "models with 99 % of the parameters in groups",
            f"{len(covered)} of {len(rows)}",
            "≥ 40",
            "within" if len(covered) >= 40 else "NOT within",
            f"`{least['model']}`, {100 * _best(least)['covered']:.0f} %",
        ]
    ]
    for what, form, limit, value in (
        ("gated against narrowed, outputs", ".0e", 1e-5, _farthest("outputs")),
        ("gated against narrowed, gradients", ".0e", 1e-4, _farthest("gradients")),
        (
            "gated against narrowed, gradients in inputs",
            ".0e",
            1e-4,
            _farthest("input gradients"),
        ),
        (
            "µs of reading an equation",
            ".0f",
            100,
            lambda row: _best(row)["us_per_equation"],
        ),
    ):
        worst = max(rows, key=value)
        beyond = sum(not value(row) <= limit for row in rows)
        kept = "NOT within" if beyond else "within"
        more = f"; {beyond} beyond the limit" if beyond else ""
        lines.append(
            [
                what,
                f"{value(worst):{form}}",
                f"≤ {limit:{form}}",
                kept,
                f"`{worst['model']}`{more}",
            ]
        )
    return markdown(header, lines)


def _farthest(what: str) -> Callable[[dict], float]:
    """The largest difference of a kind: in float64 where it was measured."""
    return lambda row: max(
        check[what] for check in row.get("in float64", row["checks"]).values()
    )
