"""Methods of channel pruning: each chooses channels of a base network, by equal rules.

A method is a function of a run, its base network and the groups that may lose channels;
it gives flags of what is kept and the smaller network, which is then trained. A line in
`METHODS` puts it into every comparison, table and picture.
"""

import bisect
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from experiments.channel_run import (
    Keep,
    Method,
    Run,
    closed,
    narrowed,
    network,
    shrunk,
)
from experiments.channel_settings import selection_of
from experiments.family_settings import best_mixture, cooled
from experiments.tasks.images import batches_of
from l0jax import costs, gates, methods, models, train, units
from l0jax.checkpoints import Checkpoints
from l0jax.methods import discrimination, relocation, slimming
from l0jax.methods.discrimination import Chosen, Head, Selection, Stage
from l0jax.methods.keeping import count_left, keep_above, keep_top
from l0jax.structure import Structure


def scored(run: Run, base: nnx.Module, structure: Structure, *, name: str):
    """The channels of each layer with the highest scores."""
    found = methods.score(name, run.task(base, structure), run.named(name))
    return shrunk(base, keep_top(found, run.ratio(structure)), structure)


def slimmed(run: Run, base: nnx.Module, structure: Structure):
    """One threshold for the scales of all layers; each keeps one channel at least."""
    scales = slimming.scale(run.task(base, structure))
    # At a global threshold other layers lose more: the same cost decides.
    cost = costs.COSTS[run.config.cost]
    wanted = costs.exact(structure, narrowed(structure, run.ratio(structure)), cost)
    total = sum(group.size for group in structure.groups.values())

    def keep(gone: int) -> Keep:
        return keep_above(scales, gone / total, at_least=1)

    fewest = bisect.bisect_left(
        range(total),
        True,
        key=lambda gone: costs.exact(structure, keep(gone), cost) <= wanted,
    )
    return shrunk(base, keep(min(fewest, total - 1)), structure)


def reconstructed(run: Run, base: nnx.Module, structure: Structure, *, method):
    """One layer after the other towards the outputs of the base network."""
    keep, params = methods.reconstruct(
        run.task(base, structure), method, run.ratio(structure), run.named("positions")
    )
    graph, _ = nnx.split(base)
    return shrunk(nnx.merge(graph, params), keep, structure)


def discriminating(
    run: Run,
    base: nnx.Module,
    structure: Structure,
    *,
    adaptive: bool = False,
    **changes: Any,
):
    """DCP (algorithm 1): before each stage the network and its classifier are trained,
    then the layers of the stage are chosen."""
    config = run.config
    original = run.task(base, structure)
    stages = discrimination.stages(original, config.losses)
    rngs = nnx.Rngs(run.named("heads"))
    heads = discrimination.heads(original, stages, rngs=rngs)
    once = config.auxiliary == "once"
    keep: Keep = {}
    model = base
    for number, stage in enumerate(stages):
        if once and number == 0:
            trainer = run.trained(
                f"{run.method}-heads", model, config.heads, heads=heads
            )
            model, heads = trainer.trained(), trainer.trained_heads()
        elif not once:
            own = {n: h for n, h in heads.items() if n == stage.kernel}
            trainer = run.trained(
                f"{run.method}-heads-{number}",
                model,
                config.heads,
                heads=own,
                structure=structure,
                keep=keep,
            )
            model = closed(trainer.trained(), keep, structure)
            heads |= trainer.trained_heads()
        found, model = choose(
            run,
            number,
            stage,
            heads.get(stage.kernel or ""),
            model,
            original,
            adaptive,
            selection_of(config, **changes),
        )
        keep |= found
    return shrunk(model, keep, structure)


def choose(
    run: Run,
    number: int,
    stage: Stage,
    head: Head | None,
    model: nnx.Module,
    original: methods.Task,
    adaptive: bool,
    selection: Selection,
) -> tuple[Keep, nnx.Module]:
    """The channels of one stage; each choice is stored."""
    ratio = run.ratio(original.structure)
    task = run.task(model, original.structure)
    arrays = units.arrays(task.params)
    checkpoints = Checkpoints(
        run.folder / "checkpoints" / f"{run.method}-choice-{number}-{run.seed}"
    )

    def empty(notes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        groups = task.structure.groups
        return {
            name: {slot.path: arrays[slot.path] for slot in groups[name].used_by}
            for name in notes
        }

    chosen: dict[str, Chosen] = {}
    found = checkpoints.restore(empty, tqdm.write)
    if found is not None:
        run.resumed = True
        _, kernels, notes = found
        chosen = {
            name: Chosen(tuple(n["order"]), kernels[name], tuple(n["losses"]))
            for name, n in notes.items()
        }
    sizes = {name: task.structure.groups[name].size for name in stage.groups}
    total = sum(
        size if adaptive else count_left(size, ratio) for size in sizes.values()
    )
    done = sum(len(each.order) for each in chosen.values())
    bar = run.bar(
        f"{run.method} stage {number + 1} seed {run.seed}", total, done, "channel"
    )

    def on_channel(name: str, so_far: Chosen) -> None:
        chosen[name] = so_far
        notes = {
            n: {"order": each.order, "losses": each.losses}
            for n, each in chosen.items()
        }
        step = sum(len(each.order) for each in chosen.values())
        checkpoints.save(step, {n: dict(c.kernels) for n, c in chosen.items()}, notes)
        count = f"{len(so_far.order)} of {sizes[name]}"
        bar.set_postfix_str(f"{name}: {count}, loss {so_far.losses[-1]:.4f}")
        bar.update()

    keep, params = discrimination.prune(
        task,
        original.params,
        stage,
        head,
        selection,
        run.named(f"choice-{number}"),
        chosen=dict(chosen),
        on_channel=on_channel,
        **({"epsilon": run.config.epsilon} if adaptive else {"ratio": ratio}),
    )
    bar.close()
    graph, _ = nnx.split(model)
    return keep, nnx.merge(graph, params)


def from_scratch(run: Run, base: nnx.Module, structure: Structure):
    """New weights in the shape of a uniformly pruned network: a width multiplier, and
    the control of all pruning at this ratio (Liu et al. 2019)."""
    keep = narrowed(structure, run.ratio(structure))
    _, small = shrunk(base, keep, structure)
    key = run.named("scratch")
    if isinstance(small, models.ImageModel):
        kind, sizes = models.name_of(small), small.architecture
        return keep, models.make(kind, sizes, rngs=nnx.Rngs(key))
    # Of a module of the user's only the whole one can be made: a part of a new one.
    return shrunk(
        network(run.config.model, run.config.width, run.dataset, key), keep, structure
    )


# ----------------------------------------------------- what trains while units close


def gated(run: Run, base: Any, structure: Structure, *, made: Callable[[], gates.Gate]):
    """L0 regularisation of the base network within the budget (Louizos et al. 2018): a
    gate on every channel, a constraint on the expected cost, and in the end the
    channels with the largest logits, as many as fit."""
    config, gate = run.config, made()
    recipe, steps = run.closing()
    trainer = run.trained(
        f"{run.method}-gates",
        base,
        recipe,
        structure=structure,
        gate=train.Learned(gate, config.keep_prob, cooled(gate, steps)),
        gate_optimizer=optax.adam(config.gate_learning_rate),
        target=train.Target(
            costs.COSTS[config.cost],
            run.allowed(structure),
            warm_up=steps // 2,
            rate=config.multiplier_rate,
        ),
    )
    training, state = trainer.training, trainer.state
    decision = training.decide(state)
    keep = {name: np.asarray(z) != 0 for name, z in decision.z.items()}
    state = training.recalibrate(
        state, batches_of(run.images, recipe.batch_size), rule=decision
    )
    whole = training.whole_model(state, decision)
    return shrunk(whole, keep, structure)


def relocated(run: Run, base: Any, structure: Structure, *, fit: bool):
    """Soft knowledge relocation (Salzinger 2020, our reconstruction): what a Taylor
    score dooms closes little by little while the network trains."""
    task = run.task(base, structure)
    keep = keep_top(
        methods.score("taylor", task, run.named("taylor")), run.ratio(structure)
    )
    recipe, steps = run.closing()
    shift = None
    if fit:
        key = run.named("positions")
        params = nnx.split(base)[1]
        shift = methods.LeastSquares(task).shift(keep, key, base=params)
    trainer = run.trained(
        f"{run.method}-closing",
        base,
        recipe,
        structure=structure,
        gate=train.Chosen(keep, relocation.Closing(share=1.0), steps, shift),
    )
    return shrunk(trainer.training.whole_model(trainer.state), keep, structure)


METHODS: dict[str, Method] = {
    **{name: Method(functools.partial(scored, name=name)) for name in methods.SCORES},
    "slimming": Method(slimmed, sparse=True),
    "thinet": Method(functools.partial(reconstructed, method=methods.thinet)),
    "channel_pruning": Method(
        functools.partial(reconstructed, method=methods.channel_pruning)
    ),
    "dcp": Method(discriminating),
    "dcp_adapt": Method(functools.partial(discriminating, adaptive=True)),
    "random_dcp": Method(functools.partial(discriminating, random=True)),
    "width_multiplier": Method(from_scratch, scratch=True),
    "width_multiplier_plus": Method(from_scratch, scratch=True, heads=True),
    "l0_hard_concrete": Method(
        functools.partial(gated, made=gates.HardConcrete), closes=True
    ),
    "l0_mixture": Method(
        functools.partial(gated, made=best_mixture),
        closes=True,
    ),
    "l0_bernoulli": Method(functools.partial(gated, made=gates.Bernoulli), closes=True),
    "soft_relocation": Method(functools.partial(relocated, fit=False), closes=True),
    "soft_least_squares": Method(functools.partial(relocated, fit=True), closes=True),
}
