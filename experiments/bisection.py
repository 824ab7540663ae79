"""The baseline that constraints are compared with: bisection over λ until a target is
met, a run of `experiments.mnist` for every λ.

    python -m experiments.bisection --target 0.33 --dataset mnist --epochs 100

Prints every λ that was tried and what was left, and how many epochs it took in all. An
interrupted one goes on where it was. (`experiments.mnist --target-density 0.33` takes
one run.)
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import mnist, run_folder


@dataclasses.dataclass(frozen=True)
class Config:
    """Find the λ at which a share of the gated weights is left in expectation."""

    mnist: Annotated[mnist.Config, tyro.conf.arg(name="")] = dataclasses.field(
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


def main(config: Config) -> dict[str, Any]:
    """Runs until the target is met; returns the runs, and the λ that met it or None."""
    if not 0 < config.target < 1:
        raise ValueError(f"target must lie in (0, 1), got {config.target}")
    if not 0 < config.low < config.high:
        raise ValueError(
            f"low and high must rise from above 0, got {config.low} and {config.high}"
        )
    parent = config.mnist.out or run_folder.default(
        f"bisection-{config.mnist.dataset}-{config.mnist.model}",
        {"target": config.target, **mnist.scientific(config.mnist)},
    )
    low, high, runs = math.log(config.low), math.log(config.high), []
    while len(runs) < config.most:
        lam = math.exp((low + high) / 2)
        left = density(config.mnist, lam, parent / f"lam-{lam:.6g}")
        runs.append({"lam": lam, "density": left})
        print(f"λ = {lam:.4g}/N leaves {100 * left:.2f} %", flush=True)
        if abs(left / config.target - 1) <= config.tolerance:
            return {"lam": lam, "runs": runs}
        low, high = (
            (math.log(lam), high) if left > config.target else (low, math.log(lam))
        )
    return {"lam": None, "runs": runs}


def density(config: mnist.Config, lam: float, folder: Path) -> float:
    """The expected share of gated weights at the end of a run."""
    done = folder / "summary.json"
    if not done.exists():
        resume = (folder / "config.json").exists()
        mnist.main(dataclasses.replace(config, lam=(lam,), out=folder, resume=resume))
    row = run_folder.Log(folder).rows()[-1]
    return row["expected_l0"] / json.loads(done.read_text())["gated_weights"]


def cli() -> None:
    config = tyro.cli(Config, description=__doc__)
    try:
        found = main(config)
    except (ValueError, mnist.Diverged, OSError) as error:
        raise SystemExit(f"experiments.bisection: {error}") from None
    runs = len(found["runs"])
    epochs = runs * config.mnist.epochs
    if found["lam"] is None:
        print(f"not met after {runs} runs, {epochs} epochs")
    else:
        print(f"met at λ = {found['lam']:.4g}/N after {runs} runs, {epochs} epochs")


if __name__ == "__main__":
    cli()
