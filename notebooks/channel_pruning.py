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
# # Channel pruning
#
# Half of the channels of a trained convolutional network are removed. Which half, and
# what is done with the weights that are left, is what methods differ in:
#
# 1. a network, and what may be removed of it;
# 2. scores of single channels;
# 3. layers that are fitted again to what they made before;
# 4. discrimination-aware pruning: channels that keep the classes apart;
# 5. the smaller network, before and after it is trained again.
#
# It runs in about a minute on one CPU core, on 8x8 digits, and downloads nothing.
# `python -m experiments.channel_pruning` does the same on CIFAR, with the networks of
# the papers.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import l0jax
from experiments.reports import style
from experiments.tasks import data
from experiments.tasks.images import Recipe, Trainer, error, images_of, normalised
from l0jax import methods, models
from l0jax.methods import discrimination
from l0jax.report import report

plt.rcParams.update(style.STYLE)
key = jax.random.key(0)
digits = data.load("digits", 0.1)
images = images_of(digits)

# %% [markdown]
# ## 1. A network, and what may be removed
#
# A small VGG. `models.structure` traces it and finds its groups of channels: what makes
# them, their normalisation, and what reads them. A channel of the last convolution is
# read by the classifier; we leave those.


# %%
def train(model, epochs, rate, **how):
    recipe = Recipe(epochs=epochs, batch_size=64, learning_rate=rate, augment=False)
    trainer = Trainer(model, images, recipe, key, **how)
    trainer.run()
    return trainer


def test_error(model):
    return error(model, digits.test, images)


shape = digits.train.images.shape[1:]
untrained = models.make(
    "vgg", {"stages": ((12, 12), (24, 24)), "shape": shape}, rngs=nnx.Rngs(0)
)
base = train(untrained, 8, 0.1).trained()
every = models.structure(base)
structure = every.only(
    *(n for n, g in every.groups.items() if g.used_by[0].path != "head.kernel")
)
print(structure)
print(f"\ntest error {test_error(base):.2f} %")

# %% [markdown]
# ## 2. Scores
#
# A score says what a channel is worth, and the channels with the highest scores stay.
# `methods.SCORES` has those of the literature: the size of a filter, how often its map
# is zero, its variance or its entropy, the first or the second order of what the loss
# would change by. They look at some training images through a `Task`.

# %%
RATIO = 0.5
x = normalised(jnp.asarray(images.images[:512]), images)
task = methods.task(base, structure, x, jnp.asarray(images.labels[:512]), 128)
some = ("random", "filter_l1", "apoz", "variance", "taylor")
scores = {name: methods.score(name, task, key) for name in some}

layer = "convs.1"
ranks = {n: np.argsort(np.argsort(-np.asarray(s[layer]))) for n, s in scores.items()}
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
shown = axes.imshow(np.array(list(ranks.values())), cmap="viridis_r", aspect="auto")
axes.set_yticks(range(len(ranks)), ranks)
axes.set_xlabel(f"channel of {layer}")
axes.grid(False)
figure.colorbar(shown, label="rank, 0 is kept first")
axes.set_title("Methods disagree about what to keep")
plt.show()

# %% [markdown]
# Removing is exact: with the closed channels at zero the smaller network has the same
# outputs as the large one, so that it doesn't matter which of the two is tested.


# %%
def smaller(model, keep):
    flags = {name: jnp.float32(kept) for name, kept in keep.items()}
    closed = l0jax.nnx.fold(model, flags, structure.groups)
    return l0jax.nnx.shrink(closed, keep, structure)


pruned = {
    name: smaller(base, methods.keep_top(values, RATIO))
    for name, values in scores.items()
}

# %% [markdown]
# ## 3. Layers that are fitted again
#
# ThiNet and channel pruning choose channels so that the layer that reads them can still
# make what it made before, and fit its weights to that by least squares: one layer
# after the other, with no step of training.

# %%
graph, _ = nnx.split(base)
for name in ("thinet", "channel_pruning"):
    keep, fitted = methods.reconstruct(task, getattr(methods, name), RATIO, key)
    pruned[name] = smaller(nnx.merge(graph, fitted), keep)

# %% [markdown]
# ## 4. Discrimination-aware pruning
#
# A small classifier is attached within the network, and network and classifier are
# trained a little together. Then layers are emptied and filled again, a channel at a
# time: the one along which the loss of that classifier and the distance to the layer's
# former output fall most steeply. After each, the weights chosen so far take a few
# steps. The losses of each stage tell how many channels a layer needs.


# %%
def discriminating(selection):
    """The pruned network, and the losses of each layer over the channels chosen."""
    stages = discrimination.stages(task, 1)
    heads = discrimination.heads(task, stages, rngs=nnx.Rngs(1))
    model, keep, losses = base, {}, {}
    for number, stage in enumerate(stages):
        own = {n: head for n, head in heads.items() if n == stage.kernel}
        trainer = train(model, 2, 0.01, heads=own, structure=structure, keep=keep)
        flags = {name: jnp.float32(kept) for name, kept in keep.items()}
        model = l0jax.nnx.fold(trainer.trained(), flags, structure.groups)
        now = methods.task(model, structure, x, task.labels.reshape(-1), 128)
        found, params = discrimination.prune(
            now,
            task.params,
            stage,
            trainer.trained_heads().get(stage.kernel),
            selection,
            jax.random.fold_in(key, number),
            ratio=RATIO,
            on_channel=lambda name, chosen: losses.update({name: chosen.losses}),
        )
        keep |= found
        model = nnx.merge(graph, params)
    return smaller(model, keep), losses


chosen, losses = {}, {}
for name, random in (("dcp", False), ("random dcp", True)):
    selection = discrimination.Selection(random=random)
    pruned[name], losses[name] = discriminating(selection)

figure, panels = plt.subplots(
    1, len(losses["dcp"]), figsize=(11, 3), sharey=True, layout="constrained"
)
for axes, layer in zip(panels, losses["dcp"], strict=True):
    for (name, of), colour in zip(
        losses.items(), (style.BLUE, style.ORANGE), strict=True
    ):
        axes.plot(of[layer], label=name, color=colour)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(layer)
    axes.set_xlabel("channels chosen")
panels[0].set_ylabel("loss")
panels[0].legend()
plt.show()

# %% [markdown]
# ## 5. The smaller networks
#
# All have the same widths, so all have the same size; what differs is which channels
# are left and what their weights are. Training evens much of that out: three epochs
# here, for some of them. So methods are compared before and after it, and with a
# network of the same size that has learned nothing before, here with all epochs that
# the others and their base network had.

# %%
fewer = pruned["dcp"]
like = models.make("vgg", fewer.architecture, rngs=nnx.Rngs(2))
before = {name: test_error(model) for name, model in pruned.items()}
# One model stands for its group: here what was left has a few epochs of training.
after = {
    name: test_error(train(pruned[name], 3, 0.05).trained())
    for name in ("random", "filter_l1", "dcp")
}
before["from scratch"] = test_error(like)
after["from scratch"] = test_error(train(like, 11, 0.1).trained())

figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
order = sorted(before, key=lambda name: -before[name])
axes.barh(order, [before[n] for n in order], color=style.ORANGE, label="pruned")
trained_on = [n for n in order if n in after]
axes.plot(
    [after[n] for n in trained_on],
    trained_on,
    "o",
    color=style.BLUE,
    ms=7,
    label="and trained",
)
axes.axvline(test_error(base), color="black", lw=0.8, ls=":", label="base network")
axes.set_xlabel("test error, %")
axes.set_title(f"{RATIO:.0%} of the channels removed")
axes.legend(loc="upper right")
plt.show()

# %%
example = jnp.zeros((1, *shape), jnp.float32)
print(report(base, fewer, example, batch_sizes=(128,), calls=5))
