"""Ways to a smaller language model, on equal training text.

A way is a function of a run and its base; it gives flags of what is kept and the
smaller model, which is then trained. A line in `METHODS` puts it into every comparison,
table and picture.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import l0jax.nnx
from experiments.family_settings import best_mixture, cooled
from experiments.language_run import (
    Keep,
    Method,
    Run,
    Trained,
    groups_of,
    structure_of,
)
from experiments.language_settings import LATENCY
from l0jax import costs, gates, methods, models, train
from l0jax.methods import relocation
from l0jax.methods.keeping import check_scores
from l0jax.models.decoder import Decoder
from l0jax.structure import Structure
from l0jax.train.targets import counted, fill


def within_budget(
    structure: Structure, scores: Mapping[str, Any], cost: costs.Cost, left: float
) -> Keep:
    """The best units of each group, alike shares of all groups, as many as fit.

    Units are wanted in the order of their ranks as shares of their groups' sizes; every
    group keeps one.
    """
    check_scores(scores)
    wanted: list[tuple[float, str, int]] = []
    start = {}
    for name, values in scores.items():
        order = np.argsort(-np.asarray(values), kind="stable")
        start[name] = np.arange(len(order)) == order[0]
        ranks = (np.arange(len(order)) + 0.5) / len(order)
        others = zip(ranks[1:], order[1:].tolist(), strict=True)
        wanted += [(rank, name, at) for rank, at in others]
    most = left * counted(structure, {}, cost)
    return fill(
        [(name, at) for _, name, at in sorted(wanted)],
        start,
        lambda keep: counted(structure, keep, cost) <= most,
        structure.wholes,
    )


def check_budget(run: Run) -> None:
    """Raises ValueError if there is nothing of a kind that is to go, or if more is left
    with one unit of each group."""
    config = run.config
    structure = structure_of(run.new(run.key), config.gated)
    for kind in config.gated:
        if not groups_of(structure, (kind,)):
            raise ValueError(
                f"the base has no {kind} that could go, with one or none in a place; "
                f"there is {', '.join(structure.groups)}"
            )
    # (Seconds are known when the base is there to be measured.)
    if config.shape or config.cost == LATENCY:
        return
    cost = costs.COSTS[config.cost]
    one = {
        name: np.arange(structure.groups[name].size) == 0
        for name in groups_of(structure, config.gated)
    }
    least = costs.exact(structure, one, cost) / costs.exact(structure, cost=cost)
    if least > config.left:
        raise ValueError(
            f"no more than {config.left:g} of the {config.cost} may be left, but with "
            f"one unit of each group there are {least:.3g}"
        )


def chosen(
    run: Run, base: Decoder, structure: Structure, scores: Mapping[str, Any]
) -> Keep:
    """What fits into the budget, by scores."""
    config = run.config
    if config.shape:
        counts = shape_of(config.shape, scores)
        return {name: best(scores[name], counts[name]) for name in scores}
    return within_budget(structure, scores, run.cost(base), config.left)


def members(structure: Structure, whole: str) -> list[str]:
    """The groups for which the units of a whole stand."""
    return [name for names in structure.wholes.get(whole, ()) for name in names]


def shape_of(shape: Mapping[str, int], groups: Iterable[str]) -> dict[str, int]:
    """How many units of each group a shape has."""
    return {name: shape[name.split(".")[-1]] for name in groups}


def best(scores: Any, count: int) -> np.ndarray:
    """Flags of so many units with the highest scores."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    return np.isin(np.arange(len(order)), order[:count])


def scored(run: Run, base: Decoder, *, name: str):
    """The units with the highest scores."""
    keep = by_score(run, base, name)
    return keep, run.shrunk(base, keep)


def by_score(run: Run, base: Decoder, name: str) -> Keep:
    """Flags of the units with the highest scores."""
    structure = structure_of(base, run.config.gated)
    named = groups_of(structure, run.config.gated)
    # (Of what stands for whole branches other groups are told apart.)
    kept = dict.fromkeys([*named, *(n for w in named for n in members(structure, w))])
    task = task_of(run, base, structure.only(*kept))
    found = methods.score(name, task, run.key)
    found = {group: found[group] for group in named}
    return chosen(run, base, structure, found)


def fitted(run: Run, base: Decoder):
    """What a Taylor score keeps, with what reads heads and feed-forward units fitted to
    what it made in the base, of which other units are closed by now
    (`methods.LeastSquares`)."""
    keep = by_score(run, base, "taylor")
    structure = structure_of(base, run.config.gated)
    read = [n for n in keep if n.endswith((".heads", ".hidden"))]
    if not read:
        raise ValueError(
            f"least squares fit what reads heads or hidden units, and gated are "
            f"{', '.join(run.config.gated)}"
        )
    others = {n: jnp.float32(flags) for n, flags in keep.items() if n not in read}
    start = l0jax.nnx.fold(base, others, structure.groups)
    graph, _ = nnx.split(start)
    of_read = models.structure(base).only(*read)
    fit = methods.LeastSquares(task_of(run, start, of_read))
    params = fit({n: keep[n] for n in read}, run.named("positions"))
    return keep, run.shrunk(nnx.merge(graph, params), keep)


def relocated(run: Run, base: Decoder):
    """Soft knowledge relocation (Salzinger 2020, our reconstruction): what a Taylor
    score dooms closes little by little while the model trains."""
    config = run.config
    keep = by_score(run, base, "taylor")
    steps = run.steps(config.tune, config.closing)
    trained = run.closing(
        f"{run.method}-closing",
        base,
        structure=structure_of(base, config.gated),
        gate=train.Chosen(keep, relocation.Closing(share=1.0), steps),
    )
    whole = trained.whole_model
    small = trained.training.finish(trained.state)
    run.check_same(whole, small)
    return keep, small


def uniform(run: Run, base: Decoder):
    """The first units of each group: a narrower model with a part of the weights."""
    structure = structure_of(base, run.config.gated)
    sizes = {
        name: structure.groups[name].size
        for name in groups_of(structure, run.config.gated)
    }
    first = {name: -np.arange(float(size)) for name, size in sizes.items()}
    keep = chosen(run, base, structure, first)
    return keep, run.shrunk(base, keep)


def from_scratch(run: Run, base: Decoder):
    """New weights in the shape of a uniformly narrowed model (Liu et al. 2019)."""
    keep, small = uniform(run, base)
    rngs = nnx.Rngs(run.named("scratch"))
    sizes: dict[str, Any] = {**small.architecture, "over": None}
    return keep, Decoder(**sizes, rngs=rngs)


def gated(run: Run, base: Decoder, *, made: Callable[[], gates.Gate]):
    """Gates on all units while the base trains on, with a constraint on the expected
    cost; in the end the units with the largest logits, as many as fit."""
    config, gate = run.config, made()
    steps = run.steps(config.tune, config.closing)
    of: Any = run.cost(base), config.left
    if config.shape:
        structure = structure_of(base, config.gated)
        counts = shape_of(config.shape, groups_of(structure, config.gated))
        of = "density", {n: c / structure.groups[n].size for n, c in counts.items()}
    trained = gates_trained(
        run,
        base,
        gate,
        config.gate_learning_rate,
        cooled(gate, steps),
        target=train.Target(
            *of, warm_up=round(config.reached * steps), rate=config.multiplier_rate
        ),
    )
    return decided(run, trained, trained.training.decide(trained.state))


def factored(run: Run, base: Decoder):
    """Factors of all units while the base trains on, at a price for the norms of what
    they multiply (D-Gating, Kolb et al. 2025). No probability is paid, which a target
    could push; and what is paid for units of one kind doesn't compare with another
    kind's, so that in the end factors rank the units of a group, as scores do."""
    config = run.config
    # (Factors are about 1, where other gates have logits.)
    rate = config.gate_learning_rate / 10
    trained = gates_trained(run, base, gates.DGating(), rate, price=config.price)
    learned = trained.training.decide(trained.state, "mean")
    keep = chosen(run, base, structure_of(base, config.gated), learned.z)
    z = {name: values * keep[name] for name, values in learned.z.items()}
    return decided(run, trained, dataclasses.replace(learned, z=z))


def gates_trained(
    run: Run,
    base: Decoder,
    gate: gates.Gate,
    rate: float,
    temperature: optax.Schedule | None = None,
    **how: Any,
) -> Trained:
    """The base and its gates after the epochs in which units close."""
    structure = structure_of(base, run.config.gated)
    named = tuple(groups_of(structure, run.config.gated))
    return run.closing(
        f"{run.method}-gates",
        base,
        structure=structure,
        gate=train.Learned(gate, run.config.keep_prob, temperature, only=named),
        gate_optimizer=optax.adam(rate),
        **how,
    )


def decided(
    run: Run, trained: Trained, decision: train.Decision
) -> tuple[Keep, Decoder]:
    """What is kept, and the smaller model, of gates as they were decided."""
    training, state = trained.training, trained.state
    keep = training.full({n: np.asarray(z) != 0 for n, z in decision.z.items()})
    small = training.finish(state, decision)
    run.check_same(training.whole_model(state, decision), small)
    return keep, small


def task_of(run: Run, base: Decoder, structure: Structure) -> methods.Task:
    """What scores look at: windows of the training text."""
    windows = jnp.asarray(
        run.windows(run.config.tune)[: run.config.judged_by], jnp.int32
    )

    def nats(logits, following):
        found = optax.softmax_cross_entropy_with_integer_labels(logits, following)
        return found.mean(axis=-1)

    batch = min(8, len(windows))
    return methods.task(
        base, structure, windows[:, :-1], windows[:, 1:], batch, loss=nats
    )


SCORES: dict[str, Method] = {
    **{
        name: Method(functools.partial(scored, name=name))
        for name in ("random", "outgoing_l2", "variance", "taylor")
    },
    "taylor_least_squares": Method(fitted),
    "soft_relocation": Method(relocated),
}
"""What a number for each unit decides."""
GATES: dict[str, Method] = {
    "l0_hard_concrete": Method(functools.partial(gated, made=gates.HardConcrete)),
    "l0_bernoulli": Method(functools.partial(gated, made=gates.Bernoulli)),
    "l0_mixture": Method(functools.partial(gated, made=best_mixture)),
    "d_gating": Method(factored),
}
"""What is learned with the weights."""
METHODS: dict[str, Method] = {
    "uniform": Method(uniform),
    "scratch": Method(from_scratch, scratch=True),
    **SCORES,
    **GATES,
}
