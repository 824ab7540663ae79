"""Prints `RESULTS.md` from the committed results.

    python -m experiments.tables            # writes RESULTS.md
    python -m experiments.tables --check    # fails if RESULTS.md says something else

The README quotes the table between its two markers, and the same command fills it in.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import (
    bisection,
    channel_report,
    channel_rows,
    families,
    family_report,
    mnist_rows,
    relocation_course,
    relocation_report,
    wide_resnet,
)
from experiments.harness import json_lines
from experiments.reports.printing import interval, markdown

ROOT = Path(__file__).parent.parent
NOTES = Path(__file__).parent / "results" / "notes.md"
BENCHMARKS = ROOT / "benchmarks" / "results"
MARKERS = ("<!-- table: mnist -->", "<!-- end of table -->")


def by_row() -> dict[str, list[dict]]:
    """Results of each row, by seed."""
    grouped = defaultdict(list)
    for result in mnist_rows.results():
        grouped[result["row"]].append(result)
    return grouped


def architectures(results: list[dict], which: str = "last") -> str:
    """The surviving units of every seed, `219-214-100, …`."""
    return ", ".join(
        "-".join(str(n) for n in result[which]["architecture"].values())
        for result in results
    )


def verdict(row: mnist_rows.Row, results: list[dict]) -> str:
    """Whether the means are within the row's limits."""
    if row.weights_limit is None or row.error_limit is None:
        return ""
    error = np.mean([r["last"]["test_error"] for r in results])
    weights = np.mean([r["last"]["weights"] for r in results])
    # Compared as printed, so that no reader finds a limit kept that is not.
    error, weights = float(f"{error:.2f}"), float(f"{weights:.0f}")
    kept = error <= row.error_limit and weights <= row.weights_limit
    return (
        f"{'within' if kept else 'NOT within'} {row.error_limit} %, "
        f"{row.weights_limit:,} weights"
    )


def published_units(name: str) -> bool:
    """Whether a row has gates on units and a published network to be compared with."""
    row = mnist_rows.ROWS[name]
    return row.weights_limit is not None and row.config.gates != "weight"


def structured() -> str:
    """The table of the paper's four rows."""
    lines = []
    for name, results in by_row().items():
        row = mnist_rows.ROWS[name]
        if not published_units(name):
            continue
        lines.append(
            [
                f"`{name}`",
                row.published,
                f"{interval(r['last']['test_error'] for r in results)} %",
                interval((r["last"]["weights"] for r in results), 0),
                architectures(results),
                f"{interval(r['best_on_validation']['test_error'] for r in results)} %",
                interval((r["best_on_validation"]["weights"] for r in results), 0),
                str(len(results)),
                str(results[0]["config"]["epochs"]),
                verdict(row, results),
            ]
        )
    header = [
        "row",
        "published (best epoch on the test set)",
        "test error, last epoch",
        "weights",
        "architectures by seed",
        "test error, best epoch on validation",
        "its weights",
        "seeds",
        "epochs",
        "limits of last epoch",
    ]
    return markdown(header, lines)


def weightwise() -> str:
    """The curve of error against single weights left."""
    lines = []
    for name, results in by_row().items():
        config = results[0]["config"]
        if config["gates"] != "weight":
            continue
        row = mnist_rows.ROWS[name]
        lines.append(
            [
                f"`{name}`",
                config["model"],
                config["gate"],
                ", ".join(f"{c:g}" for c in config["lam"]),
                f"{interval(r['last']['test_error'] for r in results)} %",
                interval((r["last"]["weights"] for r in results), 0),
                architectures(results),
                interval((r["shrunk"]["parameters"] for r in results), 0),
                str(len(results)),
                str(config["epochs"]),
                row.published,
                verdict(row, results),
            ]
        )
    header = [
        "row",
        "network",
        "gates",
        "c in λ = c/N",
        "test error, last epoch",
        "weights left",
        "units that still reach anything",
        "parameters of the network of these units",
        "seeds",
        "epochs",
        "published network of units",
        "limits of last epoch",
    ]
    return markdown(header, lines)


def constrained() -> str:
    """The rows with a target in place of λ."""
    lines = []
    for name, results in by_row().items():
        if "excess" not in results[0]:
            continue
        config = results[0]["config"]
        dense = DENSE_PARAMETERS[config["model"]]
        left = [100 * r["shrunk"]["parameters"] / dense for r in results]
        misses = [100 * e for r in results for e in r["excess"].values()]
        met = sum(abs(miss) <= 1 for miss in misses)
        lines.append(
            [
                f"`{name}`",
                target_of(config),
                mnist_rows.ROWS[name].published,
                f"{interval(left)} %",
                f"{interval(r['last']['test_error'] for r in results)} %",
                architectures(results),
                f"{max(map(abs, misses)):.2f} %, {met} of {len(misses)}",
                str(len(results)),
                str(config["epochs"]),
            ]
        )
    header = [
        "row",
        "target: share of",
        "published (Gallego-Posada et al. 2022)",
        "parameters left after removal",
        "test error, last epoch",
        "architectures by seed",
        "expected share off its target at most, and how often within 1 %",
        "seeds",
        "epochs",
    ]
    return markdown(header, lines)


def bisected() -> str:
    """What it took to meet a target by bisection over λ."""
    lines = []
    for result in bisection.results():
        config, runs = result["config"], result["runs"]
        met = f"{result['lam']:.3g}" if result["lam"] else "not met"
        lines.append(
            [
                f"{config['model']} on {config['dataset']}, {result['target']:g} of "
                "the gated weights",
                met,
                str(len(runs)),
                str(len(runs) * config["epochs"]),
                f"{100 * (runs[-1]['density'] / result['target'] - 1):+.2f} %",
                f"{runs[-1]['test_error']:.2f} %",
                str(config["seed"]),
            ]
        )
    header = ["target", "c in λ = c/N", "runs", "epochs in all"]
    header += ["share off the target", "test error", "seed"]
    if not lines:
        return ""
    return (
        "Bisection over λ, the baseline, takes several runs of as many epochs each\n"
        "(`python -m experiments.bisection`):\n\n" + markdown(header, lines)
    )


def target_of(config: dict) -> str:
    """A configuration's target in words."""
    what = {
        "target_density": "the gated weights",
        "target_params": "the parameters",
        "target_macs": "the multiply-accumulates",
        "target_bytes": "the bytes",
        "target_latency": "the seconds of a call",
    }
    for field, words in what.items():
        target = config.get(field)
        if target is not None:
            numbers = target if isinstance(target, list) else [target]
            return f"{words}: " + ", ".join(f"{number:g}" for number in numbers)
    raise ValueError("no target is given")


# With biases, of the networks as they are built.
DENSE_PARAMETERS = {"mlp": 266_610, "lenet5": 431_080}


def settings() -> str:
    """What each row's settings are, where they are not the defaults."""
    defaults = mnist_rows.mnist.scientific(mnist_rows.mnist.Config())
    lines = []
    for name, results in by_row().items():
        config = results[0]["config"]
        changed = ", ".join(
            f"{field} {value}"
            for field, value in config.items()
            if value != defaults.get(field)
            and field not in ("dataset", "model", "seed", "epochs")
        )
        lines.append(
            [
                f"`{mnist_rows.command(name)}`",
                changed or "defaults",
                results[0]["test_rule"],
                results[0]["jax"],
            ]
        )
    header = [
        "command",
        "settings that are not defaults",
        "test-time rule",
        "JAX",
    ]
    return markdown(header, lines)


KEYS = ("what", "value", "limit", "verdict", "detail")
BENCHMARKED = {
    "steps": "A training step",
    "structure": "Reading models, counting and removing",
    "reading": "Reading large programs",
    "transformers": "Reading a language model of 7 billion parameters",
    "against_torch_pruning": "Beside Torch-Pruning",
    "compaction": "Training that compacts",
    "sweeps": "Many runs in one program",
    "selection": "Choosing channels",
    "relocation": "Closing units softly",
    "mutations": "Damaged files",
    "narrow_convolutions": "What half the channels of a convolution save",
}


def benchmarks() -> str:
    """The recorded benchmarks, a line per number."""
    header = ["what", "measured", "limit", "", "detail"]
    parts = []
    for name, title in BENCHMARKED.items():
        entries = json_lines.read(BENCHMARKS / f"{name}.jsonl")
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
    rows = json_lines.read(BENCHMARKS / "zoo.jsonl")
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


def document() -> str:
    """The text of RESULTS.md."""
    # What nothing is recorded of leaves an empty place.
    return re.sub("\n{3,}", "\n\n", _document())


def _document() -> str:
    return f"""# Results

Printed by `python -m experiments.tables` from `experiments/results` and
`benchmarks/results`; not edited by hand.

## L0 regularisation on MNIST

Every run trains on 55,000 images and holds out 5,000 for all choices. Errors are of the
10,000 test images, mean ± 95 % interval over seeds (Student's t). "Last epoch" is the
result; "best on validation" is the epoch with the lowest validation error, whose
network may be larger. No epoch and no setting was chosen on the test set. Weights are
those of kernels, biases not counted, as in the literature.

### Gates on groups of units

{structured()}

### Targets in place of λ

The share of the gated weights that may be left in expectation is met by multipliers
that are trained with the gates, in one run. A unit counts with all its weights, whether
or not what they lead to is left; removal leaves fewer.

{constrained()}

{bisected()}

### Gates on single weights

{weightwise()}

### Settings and commands

{settings()}

{compared()}

{channels()}

{wide()}

{relocations()}

## Benchmarks

Things that are compared take turns in one run, so that ratios can be trusted where
absolute times can't.

{benchmarks()}

{zoo()}

{NOTES.read_text().strip() if NOTES.exists() else ""}
"""


def compared() -> str:
    """The comparisons of gate families, a line for each family."""
    parts = []
    for file in sorted(
        (ROOT / "experiments" / "results").glob("families-*/results.csv")
    ):
        folder = file.parent.relative_to(ROOT)
        rows = family_report.read(file)
        seeds = {row["seed"] for row in rows}
        first = rows[0]
        parts.append(
            f"## Gate families: {first['model']} on {first['dataset']}\n\n"
            f"`{families_command(rows)} --out {folder}`: {first['epochs']} epochs and "
            f"{len(seeds)} seeds for every family and λ, in one program a family. Each "
            f"line is the family's λ with the lowest validation error among those that "
            f"leave no more than {100 * MOST_LEFT:.0f} % of the weights; "
            f"[the whole table]({folder}/table.md), [as CSV]({folder}/results.csv).\n\n"
            f"{best_of_families(rows)}\n\n"
            f"![test error against weights left]({folder}/figures/frontier-weights.png)"
        )
    return "\n\n".join(parts)


def channels() -> str:
    """Channel pruning: every method, and the two ablations of the paper."""
    lines = channel_rows.results(channel_rows.COMPARISON)
    if not lines:
        return ""
    config = lines[0]["config"]
    parts = [
        f"## Channel pruning: {config['model']} on {config['dataset']}",
        f"`python -m experiments.channel_rows {channel_rows.COMPARISON}`: "
        f"{images_of(config)} training images, widths times {config['width']:g}, "
        f"{config['base']['epochs']} epochs of the base network and of networks that "
        f"start anew (the width multipliers), {config['tune']['epochs']} of what the "
        f"other methods leave. {config['ratio']:.0%} of the channels within each block "
        "are removed; network slimming removes as many of all as bring the same "
        "multiply-accumulates, DCP-Adapt as many as are of no use. A gap is the error "
        "above that of the base network of the same seed; that of network slimming was "
        "trained with its penalty. Published gaps are of ResNet-56, half of whose "
        "channels are removed, with 400 epochs on all images and a base error of "
        "6.20 %, of network slimming those of VGG (Zhuang et al. 2018, table 1).",
        channel_report.table(lines),
    ]
    folder = channel_report.FOLDER.relative_to(channel_report.FOLDER.parents[2])
    parts += [f"![error of each method]({folder}/methods.png)"]
    if channel_report.unlike(lines):
        parts += [f"![channels kept of each layer]({folder}/widths.png)"]
    weights, epsilons = channel_report.of_weights(), channel_report.of_epsilons()
    if weights:
        ratio = next(iter(weights.values()))[0]["config"]["ratio"]
        title = (
            f"### The weight of the additional loss: DCP, {ratio:.0%} of the channels "
            "removed, before any training (table 6 of the paper)"
        )
        parts += [title, channel_report.discrimination()]
    if epsilons:
        title = "### DCP-Adapt: where a layer is full (table 7)"
        parts += [title, channel_report.epsilons()]
    if weights and epsilons:
        parts += [f"![both ablations]({folder}/ablations.png)"]
    return "\n\n".join(parts)


RELOCATIONS = {
    "mlp": "",
    "mlp-ablation": "--ratios 0.8 --budgets 330 --arms all",
    "lenet5": "--model lenet5 --budgets 110 --base-epochs 3 --together 5 "
    "--arms one_shot least_squares soft soft_least_squares",
    "resnet8": "--model resnet8 --ratios 0.7 --budgets 80 --base-epochs 12 "
    "--examples 5120 --batch-size 32 --together 1 "
    "--arms one_shot least_squares soft soft_least_squares",
    "i3d_small": "--model i3d_small --ratios 0.5 --budgets 40 --base-epochs 8 "
    "--batch-size 32 --chosen-by 128 --together 1 "
    "--arms one_shot least_squares soft soft_least_squares",
}
"""With what `experiments.relocation` made each folder, beside its seeds."""


def relocations() -> str:
    """Soft knowledge relocation: the table and pictures of each network."""
    parts = []
    for name, arguments in RELOCATIONS.items():
        folder = ROOT / "experiments" / "results" / f"relocation-{name}"
        if not (folder / "results.csv").exists():
            continue
        rows = relocation_report.read(folder)
        first, place = rows[0], folder.relative_to(ROOT)
        seeds = " ".join(sorted({row["seed"] for row in rows}))
        words = f"python -m experiments.relocation {arguments} --seeds {seeds}"
        parts += [
            f"### {first['model']} on {first['dataset']}"
            + (": what does it" if name.endswith("ablation") else ""),
            f"`{' '.join(words.split())} --out {place}`; "
            f"[every run as CSV]({place}/results.csv).",
            relocation_report.table(rows),
            f"![accuracy of every heuristic]({place}/figures/spread.png)",
        ]
        if len({row["budget"] for row in rows}) > 1:
            parts += [f"![spread and budget]({place}/figures/variance.png)"]
        if (folder / "course.csv").exists():
            parts += [
                f"Then `python -m experiments.relocation_course {place}`, of 80 % and "
                f"{relocation_course.BUDGET} steps; [as CSV]({place}/course.csv).",
                *(
                    f"![{what}]({place}/figures/{file}.png)"
                    for file, what in COURSE.items()
                ),
            ]
    if not parts:
        return ""
    head = (
        "## Soft knowledge relocation (reconstruction)\n\n"
        "Nine heuristics and two adversaries doom the same share of the units of every "
        "layer, from the same base networks and with the same order of the data. The "
        "variance between heuristics is that of a two-way layout, the noise of seeds "
        "taken off (it may come out below 0); by what share it is lower than with "
        "pruning at once has a bootstrap interval over heuristics and seeds (−∞: some "
        "draws of the baseline have none). Accuracies are of the test set. Adversaries "
        "count in the last column only."
    )
    return "\n\n".join([head, *parts])


COURSE = {
    "bound": "the bound of the sufficient condition while units close",
    "entropy": "entropy of kept and doomed units",
    "kendall": "how alike heuristics rank units",
}


def images_of(config: dict) -> str:
    """How many training images, in words."""
    return "all" if config["examples"] is None else f"{config['examples']:,}"


def wide() -> str:
    """Gates on a wide residual network, a line for each variant."""
    variants: dict[str, list[dict]] = {}
    for result in json_lines.read(wide_resnet.RESULTS):
        variants.setdefault(result["variant"], []).append(result)
    if not variants:
        return ""
    lines = []
    for name, found in variants.items():
        target = found[0]["config"]["target"]
        lines.append(
            [
                name,
                f"{interval(100 * r['shares'][0] for r in found)} %",
                f"{interval(100 * r['expected'] for r in found)} %",
                "-"
                if target is None
                else ", ".join(
                    f"{100 * (r['expected'] / target - 1):+.1f} %" for r in found
                ),
                f"{interval(100 * r['kept'] for r in found)} %",
                f"{interval(r['gated']['test'] for r in found)} %",
                f"{interval(r['shrunk']['test'] for r in found)} %"
                if all("shrunk" in r for r in found)
                else "a layer has closed",
                str(len(found)),
            ]
        )
    header = ["variant", "MACs expected at first", "at the end", "off the target"]
    header += ["kept by the rule", "test error", "test error when removed", "seeds"]
    config = next(iter(variants.values()))[0]["config"]
    most = max(variants.values(), key=len)
    seeds = " ".join(str(result["seed"]) for result in most)
    return "\n\n".join(
        [
            f"## Gates on WRN-{config['depth']}-{config['factor']}",
            f"`python -m experiments.wide_resnet --variant all --seeds {seeds} "
            f"--record`: {images_of(config)} images of {config['dataset']}, "
            f"{config['recipe']['epochs']} epochs of SGD.",
            markdown(header, lines),
            "![multiply-accumulates over the epochs](experiments/results/"
            "wide_resnet.png)",
        ]
    )


def families_command(rows: list[dict[str, str]]) -> str:
    """The command that makes these lines of a comparison, but for its folder."""
    defaults = families.Config()
    words = ["python -m experiments.families"]
    for option, its, default in (
        ("dataset", {rows[0]["dataset"]}, {defaults.dataset}),
        ("model", {rows[0]["model"]}, {defaults.model}),
        ("epochs", {int(rows[0]["epochs"])}, {defaults.epochs}),
        ("lam", {float(row["lam"]) for row in rows}, set(defaults.lam)),
        ("seeds", {len({row["seed"] for row in rows})}, {defaults.seeds}),
        ("families", {row["family"] for row in rows}, set(defaults.families)),
    ):
        if its != default:
            words += [f"--{option}", *(str(value) for value in sorted(its))]
    return " ".join(words)


MOST_LEFT = 0.26  # 74 % pruned, as by the paper's hard concrete gates with one λ


def best_of_families(rows: list[dict[str, str]]) -> str:
    """One line for each family."""
    lines = []
    for (family,), its in family_report.by(rows, "family").items():
        points = family_report.by(
            [row for row in its if row["rule"] == family_report.RULE], "lam"
        )
        within = {
            lam: found
            for (lam,), found in points.items()
            if family_report.numbers(found, "weights").mean()
            <= MOST_LEFT * float(found[0]["dense_weights"])
        }
        if not within:
            lines.append([family, "none", *[""] * 6])
            continue
        lam, found = min(
            within.items(),
            key=lambda pair: family_report.numbers(pair[1], "validation_error").mean(),
        )
        of = {
            name: family_report.numbers(found, name)
            for name in ("test_error", "weights", "undecided", "gradient_variance")
        }
        lines.append(
            [
                family,
                lam,
                f"{interval(of['test_error'])} %",
                interval(of["weights"], 0),
                ", ".join(row["architecture"] for row in found),
                ""
                if np.isnan(of["undecided"]).all()
                else f"{interval(100 * of['undecided'], 1)} %",
                f"{of['gradient_variance'].mean():.1e}",
                family_report.verdicts(found),
            ]
        )
    header = [
        "family",
        "c in λ = c/N",
        "test error",
        "weights",
        "architectures by seed",
        "gates undecided",
        "variance of gradients",
        "verdict",
    ]
    return markdown(header, lines)


def quoted(readme: str) -> str:
    """The README with its table filled in."""
    if [readme.count(marker) for marker in MARKERS] != [1, 1] or (
        readme.index(MARKERS[0]) > readme.index(MARKERS[1])
    ):
        raise SystemExit(
            f"README.md must hold the line {MARKERS[0]} once and, after it, the line "
            f"{MARKERS[1]} once: the table goes between them"
        )
    before, rest = readme.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    lines = []
    for name, results in by_row().items():
        row = mnist_rows.ROWS[name]
        if published_units(name):
            lines.append(
                [
                    f"`{name}`",
                    row.published,
                    f"{interval(r['last']['test_error'] for r in results)} %",
                    interval((r["last"]["weights"] for r in results), 0),
                    architectures(results),
                ]
            )
    header = ["row", "published", "test error", "weights", "architectures by seed"]
    table = markdown(header, lines)
    return f"{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}"


def main(check: bool) -> None:
    """Writes RESULTS.md and the README's table, or compares them."""
    readme = ROOT / "README.md"
    wanted = {
        ROOT / "RESULTS.md": document(),
        readme: quoted(readme.read_text()),
    }
    for file, text in wanted.items():
        if not check:
            file.write_text(text)
        elif not file.exists() or file.read_text() != text:
            raise SystemExit(
                f"{file.name} does not say what the results say; "
                "run python -m experiments.tables"
            )


def cli() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tables",
        description="Writes RESULTS.md and the table of the README from the results.",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and fail if they differ"
    )
    main(parser.parse_args().check)


if __name__ == "__main__":
    cli()
