"""Which k features of a table to keep: gates on the inputs of a small network, and what
others do, at the same k.

    python -m experiments.feature_selection --quick              # a minute
    python -m experiments.feature_selection                      # all, 40 minutes
    python -m experiments.feature_selection --data mnist --methods stochastic lasso
    python -m experiments.feature_selection --methods lassonet   # needs torch

Every method (`experiments.feature_methods`) chooses exactly k features of the training
part. Then a network with one hidden layer, which is as large for all, is trained anew
on those features alone, for the same number of steps. Where a method has settings, the
ones stay whose network has the smallest loss on the validation part; the last network
is trained on both parts, and the test part is read once. MNIST keeps its split; other
sets are split anew for each seed (`experiments.tasks.tables`).

Each result is a line of `runs.jsonl` in the folder, which `experiments.compare` reads;
what is there is not run again, and several processes may share a folder.
`experiments.feature_report` makes `runs.csv`, `table.md` and the pictures of it, as
this does at its end.

On one of two busy cores a method takes 10 to 30 s a seed on MNIST, and a second on the
other sets, beside some seconds in which the first seed compiles. With 50 pixels of
MNIST straight-through gates are right on 96.75 ± 0.15 % of the test images (all pixels
98.3 %, the LASSO 94.2 %, a random forest 92.5 %). All families but the
mixture find in every seed the two features that tell an exclusive or, or a ring, among
50 of noise; the LASSO and the analysis of variance never do. On 5 and 10 of the digits'
pixels gates are ahead of the LASSO, on the small tables nothing stands apart.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import feature_methods
from experiments.feature_methods import ALL, METHODS, PAIRS, Recipe
from experiments.harness import (
    command_line,
    progress,
    ranges,
    results,
    run_folder,
)
from experiments.tasks import tables
from experiments.tasks.dataset import DataError
from experiments.tasks.tables import Part
from l0jax import train

SMALL = Recipe()
RECIPES: dict[str, Recipe] = {
    # Chosen on validation images with seed 0; see results/notes.md.
    "mnist": Recipe(
        hidden=256,
        batch_size=128,
        selecting=4_000,
        training=6_000,
        weight_decay=0.1,
        gate_rates=(0.05,),
    ),
}
"""Of the other sets it is `SMALL`."""
COUNTS = {"mnist": (50,), "wine": (5, 10)} | dict.fromkeys(tables.KNOWN, (2,))
"""Of the other sets 5, 10 and 25."""
PAIR = "mixture-exponential_uniform"
"""Of the mixtures this pair is run, if others aren't named: the one with the smallest
error in the comparison of families on MNIST."""
RANGES = {
    "be at least 1": ("selecting", "training", "hidden"),
    "be > 0": ("gate_rates",),
}
QUICK: dict[str, Any] = {
    **{"data": ("wine", "xor_20"), "seeds": (0, 1)},
    **{"methods": ("stochastic", "hard_concrete", "lasso", "forest", "random", ALL)},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Choose features of tables."""

    data: tuple[str, ...] = tables.NAMES
    """data sets"""
    methods: tuple[str, ...] = tuple(
        name for name in METHODS if name != "lassonet" and name not in {*PAIRS} - {PAIR}
    )
    """what chooses: gate families, scores, random and all"""
    counts: tuple[int, ...] = ()
    """k, how many features are kept; none given: those of the data set"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """of splits, weights, noise and the order of the examples"""
    selecting: int | None = None
    """steps in which gates close; None: the data set's recipe has it"""
    training: int | None = None
    """steps of each network that is tested; None: the data set's recipe has it"""
    hidden: int | None = None
    """units of the hidden layer; None: the data set's recipe has it"""
    gate_rates: tuple[float, ...] = ()
    """rates of Adam for the gates, to choose from; none given: those of the recipe"""
    out: Path = Path("runs") / "feature_selection"
    """folder of the results"""
    progress: bool = True
    """show a progress bar"""


def main(config: Config) -> list[dict[str, Any]]:
    """Runs what is missing; all lines of the folder."""
    check(config)
    missing = [*_missing(config)]
    with progress.bar(len(missing), "choice", show=config.progress) as bar:
        for name, seed, method, counts in missing:
            bar.set_description(f"{name}, seed {seed}, {method}")
            results.put(config.out, chosen(config, name, seed, method, counts), ORDER)
            bar.update()
    # Imported at the end, when its second no longer delays the first step.
    from experiments import feature_report

    feature_report.write(config.out)
    return results.read(config.out)


def recipe_of(config: Config, name: str) -> Recipe:
    """Of a data set, with what the configuration has instead."""
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(Recipe)
        if getattr(config, field.name, None)
    }
    return dataclasses.replace(RECIPES.get(name, SMALL), **given)


def counts_of(config: Config, name: str) -> tuple[int, ...]:
    """The k of a data set."""
    return config.counts or COUNTS.get(name, (5, 10, 25))


def check(config: Config) -> None:
    """Raises ValueError for what can't be run, and for a folder whose results were
    found by another recipe: one table can't tell them apart."""
    feature_methods.check(config.methods)
    if not (config.data and config.methods and config.seeds):
        raise ValueError("give at least one data set, one method and one seed")
    ranges.check(config, RANGES)
    for name in config.data:
        features = tables.load(name, config.seeds[0]).features
        for k in counts_of(config, name):
            if not 0 < k <= features:
                raise ValueError(
                    f"{k} features are to be kept, and {name} has {features}: give "
                    f"counts from 1 to {features}"
                )
    for line in results.read(config.out):
        if line["data"] not in config.data:
            continue
        for key, value in told(config, line["data"]).items():
            if line["settings"].get(key) != value:
                raise ValueError(
                    f"{config.out} holds results of {line['data']} with {key} = "
                    f"{line['settings'].get(key)}, and this is with {value}: choose "
                    "another --out"
                )


def told(config: Config, name: str) -> dict[str, Any]:
    """What decides the results of a data set."""
    return run_folder.settings_of(recipe_of(config, name))


def _missing(config: Config) -> Iterator[tuple[str, int, str, tuple[int, ...]]]:
    """What is to be run: seed by seed, so that what is there compares at any time."""
    there = results.there(config.out, "data", "seed", "method", "k")
    for name in config.data:
        for seed in config.seeds:
            for method in config.methods:
                counts = counts_of(config, name)
                if method == ALL:
                    counts = (tables.load(name, seed).features,)
                left = tuple(k for k in counts if (name, seed, method, k) not in there)
                if left:
                    yield name, seed, method, left


ORDER = {"data": tables.NAMES, "k": (), "method": METHODS, "seed": ()}
"""Of the lines of the file."""


def chosen(
    config: Config, name: str, seed: int, method: str, counts: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """A line for each k."""
    table, recipe = tables.load(name, seed), recipe_of(config, name)
    begun = time.perf_counter()
    found = feature_methods.candidates(method, table, counts, recipe, seed)
    seconds = (time.perf_counter() - begun) / len(found)
    for k, tried in found.items():
        of_validation = {
            setting: tested(table.train, table.validation, features, recipe, seed)
            for setting, features in tried.items()
        }
        best = min(tried, key=lambda setting: of_validation[setting]["loss"])
        features = tried[best]
        test = tested(table.known, table.test, features, recipe, seed)
        yield {
            "study": "feature_selection",
            "task": f"{name}, {k} of {table.features} features",
            "data": name,
            "k": k,
            "method": method,
            "seed": seed,
            "features": features.tolist(),
            "setting": best,
            "metrics": {
                "validation loss": of_validation[best]["loss"],
                "validation error": 100 * of_validation[best]["error"],
                "test error": 100 * test["error"],
            },
            "costs": {"features": k / table.features},
            "seconds": round(seconds, 1),
            "settings": told(config, name),
            "made": run_folder.made_by() | feature_methods.peers(method),
        }


def tested(
    part: Part, other: Part, features: Any, recipe: Recipe, seed: int
) -> dict[str, float]:
    """Loss and error on another part of a network that is trained on a part, from new
    weights and on these features alone."""
    classes = int(part.labels.max()) + 1
    training = _training(len(features), classes, recipe)
    model = feature_methods.network(len(features), classes, recipe, seed)
    order = feature_methods.orders(seed, len(part.labels), recipe, recipe.training)
    seen, unseen = (
        (jnp.asarray(each.inputs[:, features]), jnp.asarray(each.labels))
        for each in (part, other)
    )
    state, totals = training.epoch(
        training.start(jax.random.key(seed), model), seen, order
    )
    _ = totals.means  # Raises if a loss was not finite.
    return training.evaluate(state, [unseen])


@functools.cache
def _training(features: int, classes: int, recipe: Recipe) -> train.Training:
    return train.Training(
        feature_methods.network(features, classes, recipe),
        feature_methods.loss,
        optimizer=feature_methods.optimizer(recipe, recipe.training),
    )


def cli() -> None:
    config = command_line.parse(Config, __doc__, QUICK, "two small sets; a minute")
    try:
        main(config)
    except (ValueError, FloatingPointError, DataError, OSError) as error:
        raise SystemExit(f"experiments.feature_selection: {error}") from None
    print((config.out / "table.md").read_text())
    print(config.out)


if __name__ == "__main__":
    cli()
