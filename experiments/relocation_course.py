r"""What happens while doomed units close, on an MLP: the sufficient condition of
`l0jax.methods.relocation`, and how evenly units spread what they say.

    python -m experiments.relocation_course FOLDER

takes the base networks from the folder of a run of `experiments.relocation`, closes the
units that each heuristic dooms, and at several times removes them. With $P_h$ the loss
before the removal and $L_h$ that after it, over the same examples,

$$ |L_h - L_{h'}| \le B_h + B_{h'} + |P_h - P_{h'}|, \quad
   B = \sqrt 2 (\lVert W_3 \rVert_2 \sqrt{D_1} + \sqrt{D_2}), $$

since cross-entropy is $\sqrt 2$-Lipschitz in the logits and ReLU 1-Lipschitz: first the
doomed units of the first layer go, which moves the second layer by $D_1$, then those of
the second, which moves the logits by $D_2$. Closing units softly is to make B vanish,
and leaves the third term.

Writes into the folder `course/runs.jsonl`, a line for each arm, heuristic and time, the
same as `course/runs.csv`, and
`figures/bound.png`, `figures/entropy.png` and `figures/kendall.png` (how alike the
heuristics rank the units of the base network).
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.style
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.harness import progress, results, run_folder
from experiments.relocation_settings import (
    ADVERSARIES,
    HEURISTICS,
    OF_RESULTS,
    Case,
    Config,
)
from experiments.relocation_training import ARMS
from experiments.relocation_work import Work
from experiments.reports import runs
from experiments.reports.style import COLOURS, STYLE
from experiments.tasks import data
from l0jax import agnosticism, methods, train, units
from l0jax.methods import LeastSquares, relocation
from l0jax.methods.keeping import keep_top
from l0jax.methods.task import Task

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
BUDGET = 110
PARTS = ("kept", "doomed")
PERCENT = 100 * np.array(SHARES)
FAIR = [i for i, name in enumerate(HEURISTICS) if name not in ADVERSARIES]
SHOWN = {"soft": "soft", "soft_least_squares": "soft, least squares"}


def measure(
    folder: Path, ratio: float = 0.8, seed: int = 0
) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    """For each arm, heuristic and time the losses before and after, the bound B, and
    the entropies; and the scores of all heuristics.

    Raises:
        FileNotFoundError: if the folder isn't that of a run.
        ValueError: if it is of a run of another network.
    """
    if not (folder / run_folder.CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} has no {run_folder.CONFIG}, which says what the base networks "
            f"are: run `python -m experiments.relocation --out {folder}` first"
        )
    there = json.loads((folder / run_folder.CONFIG).read_text())
    if there["model"] != "mlp":
        raise ValueError(
            f"{folder} is a run of {there['model']!r}; the bound is written out for "
            "the two hidden layers of an MLP"
        )
    there = run_folder.whole(there)
    config = Config(**{name: there[name] for name in OF_RESULTS})
    dataset = data.load(str(config.dataset), config.validation)
    work = Work(config, dataset, folder, HEURISTICS)
    scores = {name: work.scores(name, seed) for name in HEURISTICS}
    keeps = {name: keep_top(of, ratio) for name, of in scores.items()}
    total = sum(ARMS[name].closing.steps(BUDGET) for name in SHOWN) * len(keeps)
    with progress.bar(total, "step", name="closing") as bar:
        told = {name: there[name] for name in OF_RESULTS}
        told |= {"ratio": ratio, "budget": BUDGET}
        of = {"study": "relocation_course", "task": f"{config.dataset} {config.model}"}
        of |= {"seed": seed, "settings": told, "costs": {}}
        lines = [
            of | line
            for name in SHOWN
            for line in of_arm(work, Case(name, ratio, BUDGET), keeps, seed, bar)
        ]
    return lines, scores


def of_arm(
    work: Work, case: Case, keeps: dict[str, Any], seed: int, bar: tqdm
) -> Iterator[dict[str, Any]]:
    """The lines of one arm."""
    arm, base, key = ARMS[case.arm], work.base(seed), work.key(seed)
    steps, count = arm.closing.steps(case.budget), len(keeps)
    members = [work.doomed(arm, base, keep, key) for keep in keeps.values()]
    sweep = work.closing(case, base, members)
    states = sweep.start([key] * count, [base] * count)
    orders = np.stack([work.order(seed, case.budget)] * count)
    task, fit, at = work.task(base), work.fit(), 0
    network, groups = sweep.of(0).network, work.structure.groups
    for share in SHARES:
        until = round(share * steps)
        states = work.stepped(sweep, states, orders[:, at:until], bar)
        at = until
        for i, (name, of) in enumerate(zip(keeps, members, strict=True)):
            state = train.member_of(states, i)
            tree = network.tree(state.params, state.rest)
            now = nnx.split(network.whole(tree))[1]
            gates = arm.closing.gates(of.keep, share)
            over = 1 - relocation.CURVES[arm.closing.curve](share)
            now = relocation.closing(now, gates, groups, of.shift, over)
            found = bounded(fit, task, now, keeps[name])
            spread = methods.spread(dataclasses.replace(task, params=now), keeps[name])
            entropy = {
                f"{part} {group}": value
                for group, values in spread.items()
                for part, value in zip(PARTS, values, strict=True)
            }
            how = {"arm": case.arm, "heuristic": name, "share": share}
            method = f"{case.arm}, {name}, {share:g} closed"
            yield {"method": method, **how, "metrics": found, **entropy}


def bounded(fit: LeastSquares, task: Task, now: Any, keep: Any) -> dict[str, float]:
    """P, L and B of one network, over the examples of the task; and how far the logits
    move in truth, times the same constant."""
    groups = task.structure.groups
    last = {name: jnp.float32(flags) for name, flags in keep.items()}
    first = {**last, "hidden2": jnp.ones(groups["hidden2"].size)}
    half = units.apply_gates(now, first, groups)
    gone = units.apply_gates(now, last, groups)
    key = jax.random.key(0)
    added = fit.residual(keep, key, params=now)["layers.1.kernel"]
    rest = fit.residual(keep, key, params=half)["layers.2.kernel"]
    head = np.asarray(units.arrays(now)["layers.2.kernel"], np.float64)
    reach = np.linalg.norm(head, 2) * np.sqrt(added) + np.sqrt(rest)
    before, after, moved = [], [], []
    for images, labels in task.batches():
        logits = [task.apply(p, images) for p in (now, gone)]
        before.append(float(task.loss(logits[0], labels).mean()))
        after.append(float(task.loss(logits[1], labels).mean()))
        moved.append(float(jnp.square(logits[1] - logits[0]).sum(-1).mean()))
    return {
        "before": float(np.mean(before)),
        "after": float(np.mean(after)),
        "logits": float(np.sqrt(2 * np.mean(moved))),
        "bound": float(np.sqrt(2) * reach),
    }


def pairs(lines: list[dict[str, Any]], arm: str, share: float) -> np.ndarray:
    """For each pair of heuristics (the bound, the difference that was measured)."""
    here = [
        line["metrics"]
        for line in lines
        if (line["arm"], line["share"]) == (arm, share)
    ]
    return np.array(
        [
            (
                a["bound"] + b["bound"] + abs(a["before"] - b["before"]),
                abs(a["after"] - b["after"]),
            )
            for a, b in itertools.combinations(here, 2)
        ]
    )


def values(lines: list[dict[str, Any]], arm: str, name: str) -> np.ndarray:
    """(shares, heuristics)."""
    here = [{**line, **line["metrics"]}[name] for line in lines if line["arm"] == arm]
    return np.array(here).reshape(len(SHARES), -1)


def draw_bound(lines: list[dict[str, Any]]) -> Figure:
    """The two terms of the bound over the time of the closing."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    of = {
        name: values(lines, "soft", name)
        for name in ("before", "after", "logits", "bound")
    }
    removal = {
        "layer by layer (the bound)": of["bound"],
        "from how far the logits move": of["logits"],
        "the change of the loss itself": np.abs(of["after"] - of["before"]),
    }
    for (label, found), colour in zip(removal.items(), COLOURS, strict=False):
        # Where all units are closed nothing changes, which no logarithm shows.
        mean = np.where(PERCENT < 100, found.mean(1), np.nan)
        left.plot(PERCENT, mean, "o-", color=colour, label=label)
    left.set_yscale("log")
    left.set_title("soft: what the removal changes, mean of all heuristics")
    left.set_ylabel("loss")
    for (arm, label), colour in zip(SHOWN.items(), COLOURS[3:], strict=False):
        for when, line in (("after", "o-"), ("before", "o:")):
            spread = values(lines, arm, when)[:, FAIR].std(1)
            text = f"{label}, {when} the removal"
            right.plot(PERCENT, spread, line, color=colour, label=text)
    right.set_ylim(0, 1.5 * right.get_ylim()[1])
    right.set_title("how far heuristics lie apart (no adversaries)")
    right.set_ylabel("standard deviation of the loss")
    for axes in (left, right):
        axes.set_xlabel("share of the closing that is over, %")
    left.legend(fontsize="small", loc="lower left")
    right.legend(fontsize="small", loc="upper right")
    return figure


def draw_entropy(lines: list[dict[str, Any]]) -> Figure:
    """The entropy of what kept and doomed units say, over the time of the closing."""
    groups = [
        name.removeprefix("kept ") for name in lines[0] if name.startswith("kept")
    ]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True)
    for axes, group in zip(panels, groups, strict=True):
        for (arm, label), colour in zip(SHOWN.items(), COLOURS, strict=False):
            for part, line in zip(PARTS, ("o-", "o:"), strict=True):
                found = values(lines, arm, f"{part} {group}")[:, FAIR]
                mean, apart = found.mean(1), found.std(1)
                axes.plot(PERCENT, mean, line, color=colour, label=f"{label}, {part}")
                axes.fill_between(
                    PERCENT, mean - apart, mean + apart, color=colour, alpha=0.15, lw=0
                )
        axes.set_title(f"{group}: mean ± deviation of the heuristics")
        axes.set_xlabel("share of the closing that is over, %")
    panels[0].set_ylabel("entropy / log(number of units)")
    panels[0].legend(fontsize="small")
    return figure


def draw_kendall(scores: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Kendall's tau between the rankings of all pairs of heuristics, and its mean over
    those that aren't adversaries."""
    names = list(scores)
    groups = list(scores[names[0]])
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True)
    for axes, group in zip(panels, groups, strict=True):
        table = np.ones((len(names), len(names)))
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
            both = {name: scores[name] for name in (a, b)}
            table[i, j] = table[j, i] = agnosticism.kendall(both)[group]
        axes.imshow(table, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.grid(visible=False)
        apart = table[np.ix_(FAIR, FAIR)][np.triu_indices(len(FAIR), 1)]
        axes.set_title(f"{group}: Kendall's tau, mean {apart.mean():.2f}")
        for i, j in np.ndindex(table.shape):
            colour = "white" if abs(table[i, j]) > 0.6 else "black"
            axes.text(
                *(j, i, f"{table[i, j]:.1f}".replace("-0.0", "0.0")),
                ha="center",
                va="center",
                fontsize=6,
                color=colour,
            )
    return figure


def write(folder: Path) -> list[Path]:
    """Measures and draws; says where."""
    lines, scores = measure(folder)
    for arm, share in itertools.product(SHOWN, SHARES):
        bound, measured = pairs(lines, arm, share).T
        beyond = int((measured > bound + 1e-5).sum())
        print(
            f"{SHOWN[arm]}, {share:4.0%} closed: mean difference {measured.mean():.4f}"
            f", mean bound {bound.mean():.4f}, {beyond} of {len(bound)} pairs beyond it"
        )
    files = [folder / "course" / results.LINES]
    results.put(files[0].parent, lines)
    entropies = [name for name in lines[0] if name.split()[0] in PARTS]
    runs.write_csv(files[0].parent, "arm", "heuristic", "share", *entropies)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context(["default", STYLE]):
        for name, figure in (
            ("bound", draw_bound(lines)),
            ("entropy", draw_entropy(lines)),
            ("kendall", draw_kendall(scores)),
        ):
            files.append(folder / "figures" / f"{name}.png")
            figure.savefig(files[-1])
    return files


def main() -> None:
    """Measures for the base networks of a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    try:
        written = write(parser.parse_args().folder)
    except (ValueError, FloatingPointError, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.relocation_course: {error}") from None
    for file in written:
        print(file)


if __name__ == "__main__":
    main()
