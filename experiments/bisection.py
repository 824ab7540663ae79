"""The baseline that constraints are compared with: bisection over λ until a target is
met, a run of `experiments.mnist` for every λ.

    python -m experiments.bisection --target 0.33 --dataset mnist --epochs 100

Prints every λ that was tried and what was left, and how many epochs it took in all. An
interrupted one goes on where it was. (`experiments.mnist --target-density 0.33` takes
one run.) With `--record` the outcome becomes a line of
`experiments/results/bisection/runs.jsonl`, which `RESULTS.md` quotes.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import mnist
from experiments.harness import results, run_folder
from experiments.reports import places

RESULTS = places.RESULTS / "bisection"


@dataclasses.dataclass(frozen=True)
class Config:
    """Find the λ at which a share of the gated weights is left in expectation."""

    training: Annotated[mnist.Config, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=mnist.Config
    )
    target: float = 0.33
    """share of the gated weights, in (0, 1)"""
    tolerance: float = 0.01
    """how far from the target may be ended, relative to it"""
    low: float = 1e-3
    """c in λ = c/N that leaves too much"""
    high: float = 10.0
    """c that leaves too little"""
    most: int = 12
    """runs after which it is given up"""
    record: bool = False
    """put the outcome into the results, in the place of an older one of this target"""


def main(config: Config) -> dict[str, Any]:
    """Runs until the target is met; returns the runs, and the λ that met it or None."""
    found = search(config)
    if config.record:
        record(config, found)
    return found


def search(config: Config) -> dict[str, Any]:
    if not 0 < config.target < 1:
        raise ValueError(f"target must lie in (0, 1), got {config.target}")
    if not 0 < config.low < config.high:
        raise ValueError(
            f"low and high must rise from above 0, got {config.low} and {config.high}"
        )
    parent = config.training.out or run_folder.default(
        f"bisection-{config.training.dataset}-{config.training.model}",
        {"target": config.target, **mnist.scientific(config.training)},
    )
    low, high, runs = math.log(config.low), math.log(config.high), []
    while len(runs) < config.most:
        lam = math.exp((low + high) / 2)
        runs.append(run(config.training, lam, parent / f"lam-{lam:.6g}"))
        left = runs[-1]["density"]
        print(f"λ = {lam:.4g}/N leaves {100 * left:.2f} %", flush=True)
        if abs(left / config.target - 1) <= config.tolerance:
            return {"lam": lam, "runs": runs}
        low, high = (
            (math.log(lam), high) if left > config.target else (low, math.log(lam))
        )
    return {"lam": None, "runs": runs}


def run(config: mnist.Config, lam: float, folder: Path) -> dict[str, float]:
    """One λ, and the expected share of gated weights at the end of its run."""
    if not results.read(folder):
        resume = (folder / "config.json").exists()
        mnist.main(dataclasses.replace(config, lam=(lam,), out=folder, resume=resume))
    row = run_folder.Log(folder).rows()[-1]
    line = results.read(folder)[-1]
    return {
        "lam": lam,
        "density": row["expected_l0"] / line["gated_weights"],
        "test_error": line["metrics"]["test error"],
        "seconds": line["seconds"],
    }


def record(config: Config, found: dict[str, Any]) -> None:
    """Puts an outcome into the results."""
    how, last = config.training, found["runs"][-1]
    told = {"target": config.target, "tolerance": config.tolerance}
    line = {
        "study": "bisection",
        "task": f"{how.dataset} {how.model}",
        "method": f"to {config.target:g} of the gated weights",
        "seed": how.seed,
        "settings": told | mnist.scientific(how),
        "metrics": {"test error": last["test_error"]},
        "costs": {"gated weights expected": last["density"]},
        "seconds": sum(run["seconds"] for run in found["runs"]),
        **found,
    }
    results.put(RESULTS, [line])


def cli() -> None:
    config = tyro.cli(Config, description=__doc__)
    try:
        found = main(config)
    except (ValueError, mnist.Diverged, OSError) as error:
        raise SystemExit(f"experiments.bisection: {error}") from None
    runs = len(found["runs"])
    epochs = runs * config.training.epochs
    if found["lam"] is None:
        print(f"not met after {runs} runs, {epochs} epochs")
    else:
        print(f"met at λ = {found['lam']:.4g}/N after {runs} runs, {epochs} epochs")


if __name__ == "__main__":
    cli()
