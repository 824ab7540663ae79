"""Channel pruning: one network, one budget, every method.

    python -m experiments.channel_pruning --model resnet20 --method dcp --ratio 0.5
    python -m experiments.channel_pruning --method all --seeds 0 1 2
    python -m experiments.channel_pruning --preset zhuang2018-resnet56   # on a GPU

A base network is trained, or read from the run folder. Each method removes the same
share of the channels of each layer, but for network slimming and gates, which leave as
many multiply-accumulates of all layers together, and DCP-Adapt, which stops at each
layer where one more channel is of no use. With `--after` all train equally long, what
they train to choose included. The smaller network is trained again and tested once. All
is stored as it comes, and a run that was killed goes on where it was, within the choice
of a layer too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.channel_methods import METHODS
from experiments.channel_run import Run, network, prunable, ratio_of
from experiments.channel_settings import OF_BASE, UNTOLD, Config, check, epochs_after
from experiments.harness import command_line, results, run_folder
from experiments.harness.loop import Diverged
from experiments.published_settings import CHANNEL_PRUNING
from experiments.tasks import data
from experiments.tasks.images import check_filled, images_of


def main(config: Config) -> dict[str, Any]:
    """Runs what is missing; returns the folder and all its results."""
    if config.method == ("all",):
        config = dataclasses.replace(config, method=tuple(METHODS))
    check(config, METHODS)
    dataset = data.load(config.dataset, config.validation)
    settings = run_folder.settings_of(config, UNTOLD)
    name = f"{config.dataset}-{config.model}"
    folder = config.out or run_folder.default(name, settings)
    if config.base_from is not None:
        sparse = any(METHODS[name].sparse for name in config.method)
        deciding = (*OF_BASE, "sparsity") if sparse else OF_BASE
        run_folder.check_base(config.base_from, settings, deciding)
    images = images_of(dataset, config.examples)
    for recipe in (config.base, config.heads, config.gate, config.tune):
        check_filled(images, recipe.batch_size)
    closes = [name for name in config.method if METHODS[name].closes]
    after = epochs_after(config)
    if closes and config.gate.epochs > after:
        raise ValueError(
            f"{closes[0]} trains {config.gate.epochs} epochs to choose, more than the "
            f"{after} that there are after the base network; give fewer gate.epochs, "
            "or more with after or tune.epochs"
        )
    if config.left is not None:
        model = network(config.model, config.width, dataset, jax.random.key(0))
        shape = (1, *images.images.shape[1:])
        ratio_of(config, prunable(model, jnp.zeros(shape, jnp.float32)))
    # What can be known is refused by now: a refused run leaves no folder.
    run_folder.prepare(folder, settings, settings, resume=True)
    told = {"study": "channel_pruning", "task": f"{config.dataset} {config.model}"}
    for seed in config.seeds:
        for method in config.method:
            if (method, seed) not in results.there(folder, "method", "seed"):
                how = METHODS[method]
                run = Run(config, dataset, images, folder, method, how, seed)
                line = {**told, "settings": settings, **run.result()}
                results.put(folder, [line])
    return {"folder": str(folder), "results": results.read(folder)}


def cli() -> None:
    config = command_line.parse(Config, __doc__, presets=CHANNEL_PRUNING)
    try:
        found = main(config)
    except (ValueError, Diverged, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.channel_pruning: {error}") from None
    for line in found["results"]:
        left = " ".join(
            f"{what} {a / b:.2f}x"
            for what, (a, b) in ((w, line[w]) for w in ("params", "macs", "latency"))
        )
        errors = [
            f"{name} {error:.2f} %"
            for name, error in line["metrics"].items()
            if "test" in name
        ]
        name = f"{line['method']} seed {line['seed']}"
        print(f"{name:30} {', '.join(errors)}; less: {left}")
    print(found["folder"])


if __name__ == "__main__":
    cli()
