"""Tables of the rows of `experiments.mnist_rows`, and of bisection."""

import numpy as np

from experiments import bisection, mnist_rows
from experiments.harness import results
from experiments.reports.printing import interval, markdown


def by_row() -> dict[str, list[dict]]:
    """Results of each row, by seed."""
    return results.by(results.read(mnist_rows.RESULTS), "row")


def architectures(its: list[dict], which: str = "last") -> str:
    """The surviving units of every seed, `219-214-100, …`."""
    return ", ".join(
        "-".join(str(n) for n in result[which]["architecture"].values())
        for result in its
    )


def verdict(row: mnist_rows.Row, its: list[dict]) -> str:
    """Whether the means are within the row's limits."""
    if row.weights_limit is None or row.error_limit is None:
        return ""
    error = np.mean([r["metrics"]["test error"] for r in its])
    weights = np.mean([r["last"]["weights"] for r in its])
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


def beside_published(name: str, its: list[dict]) -> list[str]:
    """Of a row what is published, and what was found."""
    return [
        f"`{name}`",
        mnist_rows.ROWS[name].published,
        f"{interval(r['metrics']['test error'] for r in its)} %",
        interval((r["last"]["weights"] for r in its), 0),
        architectures(its),
    ]


def structured() -> str:
    """The table of the paper's four rows."""
    lines = []
    for name, its in by_row().items():
        row = mnist_rows.ROWS[name]
        if not published_units(name):
            continue
        lines.append(
            [
                *beside_published(name, its),
                f"{interval(r['best_on_validation']['test_error'] for r in its)} %",
                interval((r["best_on_validation"]["weights"] for r in its), 0),
                str(len(its)),
                str(its[0]["settings"]["epochs"]),
                verdict(row, its),
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
    for name, its in by_row().items():
        config = its[0]["settings"]
        if config["gates"] != "weight":
            continue
        row = mnist_rows.ROWS[name]
        lines.append(
            [
                f"`{name}`",
                config["model"],
                config["gate"],
                ", ".join(f"{c:g}" for c in config["lam"]),
                f"{interval(r['metrics']['test error'] for r in its)} %",
                interval((r["last"]["weights"] for r in its), 0),
                architectures(its),
                interval((r["shrunk"]["parameters"] for r in its), 0),
                str(len(its)),
                str(config["epochs"]),
                row.published,
                verdict(row, its),
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
    for name, its in by_row().items():
        if "excess" not in its[0]:
            continue
        config = its[0]["settings"]
        dense = DENSE_PARAMETERS[config["model"]]
        left = [100 * r["shrunk"]["parameters"] / dense for r in its]
        misses = [100 * e for r in its for e in r["excess"].values()]
        met = sum(abs(miss) <= 1 for miss in misses)
        lines.append(
            [
                f"`{name}`",
                target_of(config),
                mnist_rows.ROWS[name].published,
                f"{interval(left)} %",
                f"{interval(r['metrics']['test error'] for r in its)} %",
                architectures(its),
                f"{max(map(abs, misses)):.2f} %, {met} of {len(misses)}",
                str(len(its)),
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
    for result in results.read(bisection.RESULTS):
        told, runs = result["settings"], result["runs"]
        met = f"{result['lam']:.3g}" if result["lam"] else "not met"
        lines.append(
            [
                f"{told['model']} on {told['dataset']}, {told['target']:g} of "
                "the gated weights",
                met,
                str(len(runs)),
                str(len(runs) * told["epochs"]),
                f"{100 * (runs[-1]['density'] / told['target'] - 1):+.2f} %",
                f"{result['metrics']['test error']:.2f} %",
                str(result["seed"]),
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
    for name, its in by_row().items():
        config = its[0]["settings"]
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
                its[0]["test_rule"],
                its[0]["made"]["versions"]["jax"],
            ]
        )
    header = [
        "command",
        "settings that are not defaults",
        "test-time rule",
        "JAX",
    ]
    return markdown(header, lines)
