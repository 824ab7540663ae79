# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Soft knowledge relocation
#
# A heuristic chooses which units of a network are removed. One may look for a better
# heuristic, or see to it that less depends on the heuristic. This notebook does the
# latter:
#
# 1. heuristics, and how little they agree;
# 2. units removed at once, and how far results lie apart;
# 3. units closed little by little while the network trains, and then removed;
# 4. a least-squares fit that makes up for them;
# 5. all of that compared;
# 6. where knowledge is, while units close.
#
# That agnosticism is worth having, that there is a sufficient condition for it, and
# that an algorithm made from it lowered the variance of a baseline are the source's
# (J. Salzinger 2020, "Soft Knowledge Relocation: toward heuristic-agnostic model
# pruning", a thesis of which only the abstract is public); the condition, the algorithm
# and the measure of variance that are used here are our reconstruction.
#
# It runs in about a minute on one CPU core, on 8x8 digits, and downloads nothing.
# `python -m experiments.relocation` does the same on MNIST, CIFAR and videos.

# %%
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from experiments.relocation_settings import ADVERSARIES, HEURISTICS
from experiments.relocation_work import removable
from experiments.reports import style
from experiments.tasks import data
from experiments.tasks.images import images_of, normalised
from l0jax import agnosticism, methods, models, train
from l0jax.methods import relocation
from l0jax.methods.task import cross_entropy

plt.rcParams.update(style.STYLE)
key = jax.random.key(0)
digits = data.load("digits", 0.1)
images = images_of(digits)
x, x_test = (
    normalised(jnp.asarray(split.images), images)
    for split in (digits.train, digits.test)
)
labels, test_labels = jnp.asarray(digits.train.labels), jnp.asarray(digits.test.labels)

# %% [markdown]
# ## 1. Heuristics
#
# First a base network for each of three seeds. One step trains them, and all that
# follows: gates multiply what reads the units, a shift may be added to the weights, and
# a number says which share of the closing is over. All of these are arguments, so a
# network that isn't pruned, one that is pruned at once and one whose units close differ
# in numbers only. `vmap` trains many networks in one program.

# %%
SEEDS, BATCH = (0, 1, 2), 64
closing = relocation.Closing("cosine", share=0.5)
optimizer = optax.adam(3e-3)
networks = [
    models.make("mlp", {"features": (64, 64, 32, 10)}, rngs=nnx.Rngs(s)) for s in SEEDS
]
structure = removable(networks[0])
graph, _, rest = nnx.split(networks[0], nnx.Param, ...)
traced = []


class Run(NamedTuple):
    """What runs differ in: units that stay, and what is added while others close."""

    keep: dict[str, Any]
    shift: dict[str, Any]


def closed(params, run, share):
    gates = closing.gates(run.keep, share)
    over = 1 - relocation.CURVES[closing.curve](share)
    return relocation.closing(params, gates, structure.groups, run.shift, over)


def logits(params, run, share, images):
    return nnx.merge(graph, closed(params, run, share), rest)(images)


def one_step(state, run, share, batch, images, labels):
    traced.append("step")
    params, moments = state

    def loss(params):
        made = logits(params, run, share, images[batch])
        return cross_entropy(made, labels[batch]).mean()

    updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
    return optax.apply_updates(params, updates), moments


def one_accuracy(params, run, share, images, labels):
    right = logits(params, run, share, images).argmax(-1) == labels
    return 100 * right.mean()


step = jax.jit(jax.vmap(one_step, in_axes=(0, 0, None, 0, None, None)))
accuracy = jax.jit(jax.vmap(one_accuracy, in_axes=(0, 0, None, None, None)))


def order(seed, steps):
    """Numbers of the examples of each step."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * BATCH // len(labels)) + 1
    numbers = np.concatenate([rng.permutation(len(labels)) for _ in range(epochs)])
    return numbers[: steps * BATCH].reshape(steps, BATCH)


def trained(params, runs, shares, seeds):
    """The parameters before each step and after the last, and accuracies there."""
    state = params, jax.vmap(optimizer.init)(params)
    orders = np.stack([order(seed, len(shares)) for seed in seeds], axis=1)
    path, tested = [params], []
    for share, batch in zip(shares, orders, strict=True):
        tested.append(accuracy(state[0], runs, share, x_test, test_labels))
        state = step(state, runs, share, batch, x, labels)
        path.append(state[0])
    tested.append(accuracy(state[0], runs, shares[-1], x_test, test_labels))
    return path, np.stack(tested)


every = {name: np.ones(group.size, bool) for name, group in structure.groups.items()}
open_ = train.stack([Run(every, {}) for _ in SEEDS])
start = train.stack([nnx.split(network, nnx.Param, ...)[1] for network in networks])
path, tested = trained(start, open_, np.zeros(200, np.float32), SEEDS)
bases = path[-1]
print(structure)
print("\naccuracies of the base networks, %:", tested[-1])

# %% [markdown]
# Scores look at some training images through a `Task`. Each of eleven heuristics ranks
# the units of every network: those of the literature, random numbers, and two
# adversaries, which turn a ranking upside down. Kendall's τ is 1 for two heuristics
# that rank alike and 0 for two that have nothing to do with each other.


# %%
def task_of(params):
    model = nnx.merge(graph, params, rest)
    return methods.task(model, structure, x[:512], labels[:512], 128)


pairs = list(itertools.product(HEURISTICS, SEEDS))
scores = {
    (name, seed): HEURISTICS[name](
        task_of(train.member_of(bases, seed)), jax.random.key(seed)
    )
    for name, seed in pairs
}


def tau(one, other, group):
    """Of two heuristics, in the mean over seeds."""
    return np.mean(
        [
            agnosticism.kendall({n: scores[n, seed] for n in (one, other)})[group]
            for seed in SEEDS
        ]
    )


fair = [name for name in HEURISTICS if name not in ADVERSARIES]
figure, panels = plt.subplots(
    1, 2, figsize=(10, 4.6), sharey=True, layout="constrained"
)
for axes, group in zip(panels, structure.groups, strict=True):
    table = np.array([[tau(a, b, group) for a in fair] for b in fair])
    shown = axes.imshow(table, cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_xticks(range(len(fair)), fair, rotation=60, ha="right")
    axes.set_yticks(range(len(fair)), fair)
    axes.grid(False)
    pairs_apart = table[~np.eye(len(fair), dtype=bool)]
    axes.set_title(f"{group}: {pairs_apart.mean():.2f} in the mean over pairs")
figure.colorbar(shown, ax=panels, label="Kendall's τ")
plt.show()

# %% [markdown]
# ## 2. At once
#
# Of each layer 80 % of the units are removed, and what is left is trained for 60 steps,
# three passes over the images. A unit whose gate is 0 is given no gradient and gives
# nothing on, so that a network with closed units trains as the smaller one does.

# %%
RATIO, STEPS = 0.8, 60
keeps = [methods.keep_top(scores[pair], RATIO) for pair in pairs]
seeds = np.array([seed for _, seed in pairs])
begin = jax.tree.map(lambda a: a[seeds], bases)
plain = train.stack([Run(keep, {}) for keep in keeps])
at_once = np.ones(STEPS, np.float32)
paths, tested = {}, {}
paths["at once"], tested["at once"] = trained(begin, plain, at_once, seeds)


def spread_over_steps(axes, arm):
    """The accuracy of each heuristic, in the mean over seeds."""
    of = tested[arm].reshape(STEPS + 1, len(HEURISTICS), len(SEEDS)).mean(-1)
    for name, line in zip(HEURISTICS, of.T, strict=True):
        colour = style.REMOVED if name in ADVERSARIES else style.BLUE
        axes.plot(line, color=colour, lw=1, zorder=1 if name in ADVERSARIES else 2)
    axes.set_title(arm)
    axes.set_xlabel("steps")


figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
spread_over_steps(axes, "at once")
axes.set_ylabel("test accuracy, %")
axes.set_title("A line for each heuristic; adversaries are grey")
plt.show()

# %% [markdown]
# ## 3. Softly
#
# Now units are only doomed. In the first half of the steps their gates fall from 1 to
# 0 along a curve, so that the loss itself moves what they know to the units that stay.
# `Closing.gates` makes the gates of all units from the share of the closing that is
# over, and `relocation.closing` multiplies what reads the units by them. (A
# `train.Training` whose `gate` is a `train.Chosen` closes units so. Here the step is
# written out, for its networks are tested while their units close.)

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
over = np.linspace(0, 1, 101)
for (name, curve), colour in zip(
    relocation.CURVES.items(), style.COLOURS, strict=False
):
    axes.plot(over, curve(over), label=name, color=colour)
axes.set_xlabel("share of the closing that is over")
axes.set_ylabel("gate of a doomed unit")
axes.legend()
plt.show()

# %% [markdown]
# The step is the one that was compiled for pruning at once; the shares are numbers.

# %%
softly = np.minimum(np.arange(STEPS) / closing.steps(STEPS), 1).astype(np.float32)
before = len(traced)
paths["soft"], tested["soft"] = trained(begin, plain, softly, seeds)
print("compiled for this:", len(traced) - before)

# %% [markdown]
# Removing the closed units changes nothing: `relocation.remove` makes the smaller
# network and compares its outputs with those of the closed one.


# %%
def network(arm, runs, at):
    """A network after its last step, with its doomed units closed."""
    params = closed(train.member_of(paths[arm][-1], at), train.member_of(runs, at), 1.0)
    return nnx.merge(graph, params, rest)


whole = network("soft", plain, 0)
small = relocation.remove(whole, structure, keeps[0], x[:64])
print(whole.architecture["features"], "to", small.architecture["features"])
print("largest difference:", float(jnp.abs(whole(x_test) - small(x_test)).max()))
print("largest output:", float(jnp.abs(whole(x_test)).max()))

# %% [markdown]
# ## 4. Least squares
#
# What a layer makes of the kept units may be fitted to what it made of all of them.
# `LeastSquares.shift` is what such a fit adds to the weights. It is added at once, or
# little by little while the units close: once more a number of the same step.

# %%
fit = relocation.LeastSquares(task_of(train.member_of(bases, 0)))


def shift_of(keep, seed):
    state = nnx.state(nnx.merge(graph, train.member_of(bases, seed), rest))
    return fit.shift(keep, jax.random.key(seed), base=state)


fitted = train.stack(
    [Run(keep, shift_of(keep, seed)) for keep, seed in zip(keeps, seeds, strict=True)]
)
for arm, shares in (("least squares", at_once), ("soft, least squares", softly)):
    paths[arm], tested[arm] = trained(begin, fitted, shares, seeds)

figure, panels = plt.subplots(
    1, 4, figsize=(12, 3.4), sharey=True, layout="constrained"
)
for axes, arm in zip(panels, tested, strict=True):
    spread_over_steps(axes, arm)
panels[0].set_ylabel("test accuracy, %")
plt.show()

# %% [markdown]
# ## 5. How much depends on the heuristic
#
# Each dot below is a run, each column a heuristic, and grey ones are adversaries. What
# is asked for is the variance between heuristics. As all of them start from the same
# base networks and see the same data in the same order, the noise of seeds can be told
# from it (`heuristic_variance`), and by how much an arm's variance is lower than that
# of pruning at once has an interval that draws heuristics and seeds anew (`reduction`).
# With three seeds and nine heuristics it is wide: `-inf` says that some draws of the
# baseline had no variance to lower. Recorded runs have more.

# %%
results = {a: t[-1].reshape(len(HEURISTICS), len(SEEDS)) for a, t in tested.items()}
count = len(fair)
names = list(HEURISTICS)
rng = np.random.default_rng(0)
figure, axes = plt.subplots(figsize=(9, 4.4), layout="constrained")
for at, table in enumerate(results.values()):
    for h, (name, of) in enumerate(zip(names, table, strict=True)):
        colour = style.REMOVED if name in ADVERSARIES else style.COLOURS[at]
        place = at + (h - len(names) / 2) * 0.06
        axes.plot([place] * len(of), of, "o", color=colour)
        axes.plot(place, of.mean(), "_", color="black", ms=9)
axes.set_xticks(range(len(results)), results)
axes.grid(False, axis="x")
axes.set_ylabel("test accuracy, %")
axes.set_title(f"{RATIO:.0%} of the units removed, {STEPS} steps")
plt.show()

base = results["at once"]
for what, rows in (("without adversaries", fair), ("with adversaries", names)):
    chosen = [names.index(name) for name in rows]
    print(what)
    for arm, table in results.items():
        variance = agnosticism.heuristic_variance(table[chosen])
        line = f"  {arm:20} {table[chosen].mean():6.2f} %, variance {variance:6.2f}"
        if arm != "at once":
            lower = agnosticism.reduction(base[chosen], table[chosen])
            line += f", lower by {lower.value:.2f} [{lower.low:.2f}, {lower.high:.2f}]"
        print(line)

# %% [markdown]
# ## 6. Where knowledge is
#
# The source takes the entropy of the singular values of what units say for what a layer
# knows. `spread` gives it for the units that stay and for those that go, divided by
# what it is at most. Below units are closed softly, those that Taylor scores would
# remove and those that they would keep.

# %%
every_fifth = range(0, STEPS + 1, 6)
figure, panels = plt.subplots(
    1, 2, figsize=(10, 3.6), sharey=True, layout="constrained"
)
for name, colour in zip(("taylor", "inverted_taylor"), style.COLOURS, strict=False):
    at = pairs.index((name, 0))
    run = train.member_of(plain, at)
    spreads = []
    for moment in every_fifth:
        share = float(softly[min(moment, STEPS - 1)])
        params = closed(train.member_of(paths["soft"][moment], at), run, share)
        spreads.append(methods.spread(task_of(params), keeps[at]))
    for axes, group in zip(panels, structure.groups, strict=True):
        kept, doomed = zip(*(s[group] for s in spreads), strict=True)
        axes.plot(every_fifth, kept, "o-", color=colour, label=f"{name}, stay")
        axes.plot(every_fifth, doomed, "o:", color=colour, label=f"{name}, go")
        axes.set_title(group)
        axes.set_xlabel("steps")
panels[0].set_ylabel("entropy")
panels[0].legend(fontsize="small", ncols=2, loc="upper center")
panels[0].set_ylim(top=0.75)
plt.show()
