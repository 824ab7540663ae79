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
# # The structure of a residual network
#
# To take units out of a network one has to know where each of them is stored: which
# rows of which kernels, which entries of which norms. Here nobody states it. `trace`
# reads it from the program that JAX records. This notebook
#
# 1. trains a residual network with batch norm on small images of digits;
# 2. reads its groups of units, and what each of them costs;
# 3. gates them, until a fifth of the multiply-accumulates is left;
# 4. takes out what the gates have closed, and measures what that is worth.
#
# It runs in a minute on one CPU core, and downloads nothing.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import l0jax
from experiments.reports import style
from experiments.tasks import data
from l0jax import costs, gates, train

plt.rcParams.update(style.STYLE)
key = jax.random.key(0)
digits = data.load("digits", validation=1 / 12)

# %% [markdown]
# ## 1. A network
#
# Two residual blocks in ordinary Flax. The second one halves the image and doubles the
# maps, so that its shortcut is a convolution too.


# %%
class Block(nnx.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs, inner, outputs, stride, rngs):
        def conv(n_in, n_out, window, stride=1):
            size, strides = (window, window), (stride, stride)
            return nnx.Conv(n_in, n_out, size, strides, use_bias=False, rngs=rngs)

        self.conv1 = conv(inputs, inner, 3, stride)
        self.norm1 = nnx.BatchNorm(inner, rngs=rngs)
        self.conv2 = conv(inner, outputs, 3)
        self.norm2 = nnx.BatchNorm(outputs, rngs=rngs)
        if stride > 1:
            self.project = conv(inputs, outputs, 1, stride)
        self.stride = stride

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu((self.project(x) if self.stride > 1 else x) + y)


class ResNet(nnx.Module):
    """A stem, two blocks, and a dense layer on the mean of each map."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.block1 = Block(32, 32, 32, 1, rngs)
        self.block2 = Block(32, 64, 64, 2, rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = self.block2(self.block1(nnx.relu(self.stem(x))))
        return self.head(x.mean((1, 2)))


model = ResNet(nnx.Rngs(0))

# %% [markdown]
# ## 2. Its groups
#
# One call. The maps of the stem, of the first block's output and everything between
# them are *one* group, because the shortcut adds them: taking one map out takes it out
# of all of these arrays. The input has a single channel, and the ten classes are
# outputs, so neither has units to remove.

# %%
example = jnp.zeros((2, 8, 8, 1))
structure = l0jax.trace(model, example)
print(structure)

# %% [markdown]
# A unit is not a row of a matrix, it is all the places where it is stored. Groups are
# named after a layer that makes them; another name may say more:

# %%
structure = structure.rename({"block1.conv2": "stream"})
stream = structure.groups["stream"]
print("made by")
for slot in stream.made_by:
    print("   ", slot.path, "along axis", slot.axis)
print("used by")
for slot in stream.used_by:
    print("   ", slot.path, "along axis", slot.axis)

# %% [markdown]
# Every cost is a function of which units are there. Under random gates it is the exact
# expectation, in closed form, and differentiable. Half of all units leave about a
# quarter of the multiply-accumulates:

# %%
half = {name: jnp.full(g.size, 0.5) for name, g in structure.groups.items()}
whole = float(costs.macs(structure))
print(f"all units: {whole:,.0f} multiply-accumulates")
print(
    f"expected if each is there with probability 1/2: "
    f"{float(costs.macs(structure, half)) / whole:.3f} of that"
)

# %% [markdown]
# ## 3. Gates, and a target
#
# A fifth of the multiply-accumulates may be left. Gates and weights are trained
# together in one compiled step, and so is the price of a multiply-accumulate: it rises
# while more than the target is expected to be there, and falls below it. The target
# comes down from everything in the first half of the steps.

# %%
EPOCHS, BATCH = 40, 100
images = jnp.asarray(digits.train.images, jnp.float32) / digits.scale
labels = jnp.asarray(digits.train.labels)
STEPS = EPOCHS * (len(labels) // BATCH)


def loss(model, batch):
    images, labels = batch
    logits = model(images)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return each.mean(), {}


training = train.Training(
    model,
    loss,
    structure=structure,
    gate=gates.HardConcrete(),
    target=train.Target(costs.macs, 0.2, warm_up=STEPS // 2),
    optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, STEPS)),
    gate_optimizer=optax.adam(optax.cosine_decay_schedule(1e-1, STEPS)),
)
state = training.start(key)
losses, active = [], []
for epoch in range(EPOCHS):
    order = train.order_of_epoch(key, epoch, len(labels), BATCH)
    # (A program for each step: convolutions within a loop are slow on a CPU.)
    state, totals = training.epoch(state, (images, labels), order, loop=True)
    losses.append(totals.means["loss"])
    active.append(training.decide(state).prob_active)
print(training.decide(state))

# %%
fig, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True)
epochs = np.arange(1, EPOCHS + 1)
above.plot(epochs, losses)
above.set_yscale("log")
above.set_ylabel("cross-entropy, mean of an epoch")
for name in structure.groups:
    below.plot(epochs, [p[name].mean() for p in active], label=name)
below.set_ylabel("expected share of units left")
below.set_xlabel("epoch")
below.set_ylim(0, 1.05)
below.legend(loc="upper right", bbox_to_anchor=(1, 0.94), ncols=2)
above.set_title("Training with gates on all groups")
plt.show()

# %% [markdown]
# ## 4. What is left
#
# At test time the units with the largest logits stay, as many as fit into the target.
# A gate that is closed is exactly zero, so its unit contributes nothing, and taking it
# out changes no output. `training.finish(state)` does so. Hardware likes round widths,
# so here some closed units come back to fill them up to a multiple of four: `shrink`
# slices kernels, norms and running statistics, and checks that the module's own code,
# run on smaller arrays, is still the same function.

# %%
# In training the statistics of batch norm followed gates that were drawn.
state = training.recalibrate(state, [(images, labels)])
folded = training.whole_model(state)
keep = l0jax.round_to(l0jax.in_use(nnx.state(folded), structure.groups), 4)
small = l0jax.nnx.shrink(folded, keep, structure)

test = jnp.asarray(digits.test.images, jnp.float32) / digits.scale


def error(network):
    wrong = network(test).argmax(-1) != jnp.asarray(digits.test.labels)
    return 100 * float(wrong.mean())


print({name: f"{flags.sum()} of {flags.size}" for name, flags in keep.items()})
print(f"test error {error(folded):.1f} % gated, {error(small):.1f} % shrunk")
print(
    "largest difference of the outputs:", float(abs(folded(test) - small(test)).max())
)

# %%
report = l0jax.report(folded, small, test, batch_sizes=(1, 256))
print(report)

# %%
report.plot()
