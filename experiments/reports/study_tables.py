"""Tables of the comparisons: gate families, channel pruning, relocation, WRN."""

from typing import Any

import numpy as np

from experiments import (
    channel_report,
    channel_rows,
    cifar,
    circuits,
    deciding,
    families,
    family_report,
    relocation_course,
    relocation_report,
    wide_resnet,
)
from experiments.harness import results
from experiments.reports import places
from experiments.reports.printing import interval, markdown


def compared() -> str:
    """The comparisons of gate families, a line for each family."""
    parts = []
    there = places.ROOT / "experiments" / "results"
    for file in sorted(there.glob(f"families-*/{results.LINES}")):
        folder = file.parent.relative_to(places.ROOT)
        rows = results.read(file.parent)
        seeds = {row["seed"] for row in rows}
        first = rows[0]["settings"]
        parts.append(
            f"## Gate families: {first['model']} on {first['dataset']}\n\n"
            f"`{families_command(rows)} --out {folder}`: {first['epochs']} epochs and "
            f"{len(seeds)} seeds for every family and λ, in one program a family. Each "
            f"line is the family's λ with the lowest validation error among those that "
            f"leave no more than {100 * MOST_LEFT:.0f} % of the weights; "
            f"[the whole table]({folder}/table.md), [as CSV]({folder}/runs.csv).\n\n"
            f"{best_of_families(rows)}\n\n"
            f"![test error against weights left]({folder}/figures/frontier-weights.png)"
            "\n\n![test error against multiply-accumulates left]"
            f"({folder}/figures/frontier-macs.png)\n\n"
            f"![densities of gates]({folder}/figures/densities.png)"
        )
    return "\n\n".join(parts)


def channels() -> str:
    """Channel pruning: every method, and the two ablations of the paper."""
    lines = channel_rows.recorded(channel_rows.COMPARISON)
    if not lines:
        return ""
    config = lines[0]["settings"]
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
        ratio = next(iter(weights.values()))[0]["settings"]["ratio"]
        title = (
            f"### The weight of the additional loss: DCP, {ratio:.0%} of the channels "
            "removed, before any training (table 6 of the paper)"
        )
        parts += [title, channel_report.discrimination()]
    if epsilons:
        title = "### DCP-Adapt: where a layer is full (table 7)"
        parts += [title, channel_report.epsilons()]
    if weights and epsilons:
        parts += [
            f"`python -m experiments.channel_rows {channel_rows.COMPARISON} "
            f"{' '.join(channel_rows.ABLATIONS)}`, drawn by `python -m "
            "experiments.channel_report`:",
            f"![both ablations]({folder}/ablations.png)",
        ]
    return "\n\n".join(parts)


def within_one_budget() -> str:
    """All methods with the same multiply-accumulates and epochs, gates among them."""
    folder = channel_report.FOLDER.relative_to(channel_report.FOLDER.parents[2])
    parts = [cifar.section()]
    for row in channel_rows.FAIR:
        lines = channel_rows.recorded(row)
        if not lines:
            continue
        config = lines[0]["settings"]
        base, more = config["base"]["epochs"], config["after"]
        left = np.median([line["macs"][1] / line["macs"][0] for line in lines])
        parts += [
            f"### {config['model']}, width {config['width']:g}: {left:.0%} of the MACs",
            f"`python -m experiments.channel_rows {row}`: base networks of {base} "
            f"epochs of {images_of(config)} images of {config['dataset']}. All methods "
            f"train for {more} epochs after them, what they train to choose included: "
            f"gates and doomed units close in {config['gate']['epochs']} of them, DCP "
            "trains its classifiers in "
            f"{(config['losses'] + 1) * config['heads']['epochs']}, and what starts "
            f"anew trains for {base + more}. Gates (`l0_…`) have "
            "the multiply-accumulates of a uniformly pruned network as their target, "
            'and the rule `"budget"` fills it. A gap is the error above that of the '
            "base network of the same seed.",
            channel_report.table(lines),
            channel_report.statements(lines),
            f"![error of each method]({folder}/{row}.png)",
        ]
    if any(parts):
        parts.insert(0, "## CIFAR-10: gates, channel pruning and relocation")
    return "\n\n".join(filter(None, parts))


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
        folder = places.ROOT / "experiments" / "results" / f"relocation-{name}"
        rows = results.read(folder)
        if not rows:
            continue
        first, place = rows[0]["settings"], folder.relative_to(places.ROOT)
        seeds = " ".join(map(str, sorted({row["seed"] for row in rows})))
        words = f"python -m experiments.relocation {arguments} --seeds {seeds}"
        parts += [
            f"### {first['model']} on {first['dataset']}"
            + (": what does it" if name.endswith("ablation") else ""),
            f"`{' '.join(words.split())} --out {place}`; "
            f"[every run as CSV]({place}/runs.csv).",
            relocation_report.table(rows),
            f"![accuracy of every heuristic]({place}/figures/spread.png)",
        ]
        if len({row["budget"] for row in rows}) > 1:
            parts += [f"![spread and budget]({place}/figures/variance.png)"]
        if (folder / "course").exists():
            parts += [
                f"Then `python -m experiments.relocation_course {place}`, of 80 % and "
                f"{relocation_course.BUDGET} steps; [as CSV]({place}/course/runs.csv).",
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
    variants = results.by(results.read(wide_resnet.RESULTS), "method")
    if not variants:
        return ""
    lines = []
    for name, found in variants.items():
        target = found[0]["settings"]["target"]
        kept, expected = (
            [line["costs"][name] for line in found]
            for name in ("macs", "macs expected")
        )
        removed = [r["metrics"].get("removed test error") for r in found]
        lines.append(
            [
                name,
                f"{interval(100 * r['shares'][0] for r in found)} %",
                f"{interval(100 * share for share in expected)} %",
                "-"
                if target is None
                else ", ".join(
                    f"{100 * (share / target - 1):+.1f} %" for share in expected
                ),
                f"{interval(100 * share for share in kept)} %",
                f"{interval(r['metrics']['test error'] for r in found)} %",
                f"{interval(removed)} %"
                if None not in removed
                else "a layer has closed",
                str(len(found)),
            ]
        )
    header = ["variant", "MACs expected at first", "at the end", "off the target"]
    header += ["kept by the rule", "test error", "test error when removed", "seeds"]
    config = next(iter(variants.values()))[0]["settings"]
    most = max(variants.values(), key=len)
    seeds = " ".join(str(result["seed"]) for result in most)
    return "\n\n".join(
        [
            f"## Gates on WRN-{config['depth']}-{config['factor']}",
            f"`python -m experiments.wide_resnet --variant all --seeds {seeds} "
            f"--record`: {images_of(config)} images of {config['dataset']}, "
            f"{config['recipe']['epochs']} epochs of SGD.",
            markdown(header, lines),
            "![multiply-accumulates over the epochs](experiments/results/wide-resnet/"
            f"{wide_resnet.PICTURE})",
        ]
    )


MOST_NAMED = 12


def rules() -> str:
    """The rule that fills the budget against the others."""
    lines = results.read(deciding.RESULTS)
    if not lines:
        return ""
    seeds = " ".join(sorted({str(line["seed"]) for line in lines}))
    names = " ".join(results.by(lines, "network"))
    return "\n\n".join(
        [
            "## Which units stay within a target",
            f"`python -m experiments.deciding --networks {names} --seeds {seeds} "
            "--record`: hard concrete gates, trained to a target on the "
            "multiply-accumulates, and decided by every rule. A rule is compared with "
            "the budget rule at the share that it has itself left, on the same trained "
            "network: above 0, the budget rule chooses better.",
            deciding.table(lines),
        ]
    )


def edges() -> str:
    """Edges of compiled transformers that gates keep, beside the known graphs."""
    lines = results.read(circuits.RESULTS)
    if not lines:
        return ""
    seeds = " ".join(sorted({str(line["seed"]) for line in lines}))
    names = results.by(lines, "task")
    pictures = [
        f"![edges of {name}](experiments/results/circuits/{name}.png)" for name in names
    ]
    return "\n\n".join(
        [
            "## Circuits of compiled programs",
            f"`python -m experiments.circuits --programs {' '.join(names)} --seeds "
            f"{seeds} --record`: hard concrete gates on the edges of a transformer "
            "that was compiled from a program and stays as it is, at one price for "
            "each. An edge is needed if the program is another one without it.",
            circuits.table(lines),
            *pictures,
        ]
    )


def families_command(rows: list[dict[str, Any]]) -> str:
    """The command that makes these lines of a comparison, but for its folder."""
    defaults, told = families.Config(), rows[0]["settings"]
    words = ["python -m experiments.families"]
    for option, its, default in (
        ("dataset", {told["dataset"]}, {defaults.dataset}),
        ("model", {told["model"]}, {defaults.model}),
        ("epochs", {told["epochs"]}, {defaults.epochs}),
        ("lam", {row["lam"] for row in rows} - {None}, set(defaults.lam)),
        ("seeds", {len({row["seed"] for row in rows})}, {defaults.seeds}),
        ("families", {row["family"] for row in rows}, set(defaults.families)),
    ):
        # (Of many families, those that there were: more may have come since.)
        if its != default and len(its) <= MOST_NAMED:
            words += [f"--{option}", *(str(value) for value in sorted(its))]
    return " ".join(words)


MOST_LEFT = 0.26  # 74 % pruned, as by the paper's hard concrete gates with one λ


def best_of_families(rows: list[dict[str, Any]]) -> str:
    """One line for each family."""
    lines = []
    for family, of in results.by(rows, "family").items():
        its = [
            row
            for row in of
            if row["rule"] == family_report.RULE and row["lam"] is not None
        ]
        within = {
            lam: found
            for lam, found in results.by(its, "lam").items()
            if family_report.numbers(found, "weights").mean()
            <= MOST_LEFT * found[0]["dense_weights"]
        }
        if not within:
            lines.append([family, "none", *[""] * 6])
            continue
        lam, found = min(
            within.items(),
            key=lambda pair: family_report.numbers(pair[1], "validation error").mean(),
        )
        of = {
            name: family_report.numbers(found, name)
            for name in ("test error", "weights", "undecided", "gradient_variance")
        }
        lines.append(
            [
                family,
                f"{lam:g}",
                f"{interval(of['test error'])} %",
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
