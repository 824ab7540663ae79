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
# 3. gates them, under a price for every multiply-accumulate;
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
from experiments import figures
from experiments.tasks import data
from l0jax import costs, gates, gating, train

plt.rcParams.update(figures.STYLE)
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

    def __call__(self, x, train=False):
        y = nnx.relu(self.norm1(self.conv1(x), use_running_average=not train))
        y = self.norm2(self.conv2(y), use_running_average=not train)
        return nnx.relu((self.project(x) if self.stride > 1 else x) + y)


class ResNet(nnx.Module):
    """A stem, two blocks, and a dense layer on the mean of each map."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.block1 = Block(32, 32, 32, 1, rngs)
        self.block2 = Block(32, 64, 64, 2, rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x, train=False):
        x = self.block2(self.block1(nnx.relu(self.stem(x)), train), train)
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
# ## 3. Gates, at a price
#
# The loss is the task's plus a price for the expected share of multiply-accumulates.
# Gates and weights are trained together in one compiled step. (Batch norm runs on its
# running statistics here, which start at the first batch's and follow from there.)

# %%
gate = gates.HardConcrete()
graph, params, others = nnx.split(model, nnx.Param, ...)
logits = gating.init(key, gate, structure.groups, keep_prob=0.8)


def price(weight):
    return lambda params, active: weight * costs.macs(structure, active) / whole


def loss_of(theta, others, batch, noise, weight):
    images, labels = batch
    z = gating.sample(noise, gate, theta["gates"])
    gated = l0jax.apply_gates(theta["params"], z, structure.groups)
    # A copy, or the running statistics would be written into `others`.
    network = nnx.merge(graph, gated, others, copy=True)
    outputs = network(images, train=True)
    others = nnx.split(network, nnx.Param, ...)[2]
    task = optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()
    active = gating.prob_active(gate, theta["gates"])
    return task + price(weight)(theta["params"], active), (task, others)


STEPS = 500
rates = [optax.cosine_decay_schedule(rate, STEPS) for rate in (3e-3, 1e-1)]
optimizer = train.gates_apart(*map(optax.adam, rates))


@jax.jit
def step(theta, others, opt_state, batch, t):
    slopes, (task, others) = jax.grad(loss_of, has_aux=True)(
        theta, others, batch, jax.random.fold_in(key, t), 2.0
    )
    updates, opt_state = optimizer.update(slopes, opt_state, theta)
    theta = optax.apply_updates(theta, updates)
    theta = {**theta, "gates": gating.project(gate, theta["gates"])}
    active = gating.prob_active(gate, theta["gates"])
    left = {name: p.sum() for name, p in active.items()}
    return theta, others, opt_state, (task, left)


images = jnp.asarray(digits.train.images, jnp.float32) / digits.scale
labels = jnp.asarray(digits.train.labels)
theta = {"params": params, "gates": logits}
opt_state = optimizer.init(theta)
history, t = [], 0
while t < STEPS:
    for rows in train.order_of_epoch(key, t, len(labels), 100):
        batch = images[rows], labels[rows]
        theta, others, opt_state, seen = step(theta, others, opt_state, batch, t)
        history.append(seen)
        t += 1
task, left = jax.device_get(jax.tree.map(lambda *a: jnp.stack(a), *history))

# %%
fig, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True)
smooth = np.convolve(task, np.ones(30) / 30, mode="valid")
above.plot(np.arange(len(smooth)) + 15, smooth)
above.set_yscale("log")
above.set_ylabel("cross-entropy, mean of 30 steps")
for name, values in left.items():
    below.plot(values / structure.groups[name].size, label=name)
below.set_ylabel("expected share of units left")
below.set_xlabel("step")
below.set_ylim(0, 1.05)
below.legend(loc="center", bbox_to_anchor=(0.6, 0.72), ncols=2)
above.set_title("Training with gates on all groups")
# %% [markdown]
# ## 4. What is left
#
# A gate that is closed by the test-time rule is exactly zero, so its unit contributes
# nothing, and taking it out changes no output. `shrink` slices kernels, norms and
# running statistics, and checks that the module's own code, run on smaller arrays, is
# still the same function. Hardware likes round widths, so some closed units come back
# to fill them up to a multiple of four.

# %%
z = gating.deterministic(gate, theta["gates"], "median")
trained = nnx.merge(graph, theta["params"], others)
folded = l0jax.nnx.fold(trained, z, structure.groups)
keep = l0jax.in_use(nnx.state(folded), structure.groups)
keep = l0jax.round_to(keep, 4)
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
report = l0jax.report(trained, small, test, batch_sizes=(1, 256))
print(report)

# %%
report.plot()
