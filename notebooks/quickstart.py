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
# # Quickstart
#
# Many networks have more units than they need. Louizos, Welling and Kingma (ICLR 2018)
# let training decide which ones stay. Each unit is multiplied by a random *gate*. The
# gate is exactly 0 with a probability that is learned, and the loss charges for the
# expected number of weights that are left. This notebook
#
# 1. draws gates, and compares them with their closed forms;
# 2. trains a network on small images of digits until most of it is removed;
# 3. takes out what the gates have closed, and saves the small network;
# 4. does the same with a Flax module of your own.
#
# It runs in less than a minute on one CPU core, and downloads nothing.

# %%
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import l0jax
from experiments.reports import style
from experiments.tasks import data
from l0jax import gates, models, objectives, storage, train

plt.rcParams.update(style.STYLE)
key = jax.random.key(0)

# %% [markdown]
# ## 1. A gate
#
# A hard concrete gate takes a binary concrete variable $s$, stretches it from $(0, 1)$
# to $(\gamma, \zeta)$, and clips it to $[0, 1]$:
#
# $$ s = \sigma\Big(\frac{\log u - \log(1-u) + \log\alpha}{\beta}\Big), \qquad
#    z = \min\big(1, \max(0, s(\zeta-\gamma)+\gamma)\big), \qquad u \sim U(0, 1). $$
#
# The clip makes $z$ exactly 0, or exactly 1, with a positive probability. In between,
# $z$ has the density of $s$, stretched:
#
# $$ q_s(s) = \frac{\beta\alpha\, s^{-\beta-1} (1-s)^{-\beta-1}}
#                  {\big(\alpha s^{-\beta} + (1-s)^{-\beta}\big)^2}, \qquad
#    q_z(z) = \frac{1}{\zeta-\gamma}\; q_s\Big(\frac{z-\gamma}{\zeta-\gamma}\Big)
#    \quad\text{for } 0 < z < 1. $$
#
# The temperature $\beta$ and the ends $\gamma$ and $\zeta$ are fixed. Training moves
# $\log\alpha$, the *logit* of the gate.

# %%
gate = gates.HardConcrete()  # β = 2/3, γ = -0.1 and ζ = 1.1, as in the paper
DRAWS, BINS = 100_000, 25


def draw(logits):
    """DRAWS draws of one gate for each logit."""
    return np.asarray(gate.sample(key, jnp.tile(logits[:, None], DRAWS)))


def density(z, log_alpha):
    stretch = gate.zeta - gate.gamma
    s = (z - gate.gamma) / stretch
    alpha, beta = np.exp(log_alpha), gate.beta
    top = beta * alpha * s ** (-beta - 1) * (1 - s) ** (-beta - 1)
    return top / (alpha * s**-beta + (1 - s) ** -beta) ** 2 / stretch


four = jnp.array([-3.0, -1.0, 0.0, 2.0])
draws = draw(four)
is_zero, is_one = 1 - gate.prob_active(four), gate.prob_one(four)
inside = np.linspace(0, 1, 201)

figure, panels = plt.subplots(2, 2, figsize=(9.5, 6), sharex=True, layout="constrained")
for axes, log_alpha, z, p0, p1 in zip(
    panels.flat, four, draws, is_zero, is_one, strict=True
):
    counts, edges = np.histogram(z[(z > 0) & (z < 1)], bins=BINS, range=(0, 1))
    axes.stairs(counts / DRAWS * BINS, edges, fill=True, color=style.SKY)
    axes.plot(inside, density(inside, float(log_alpha)), color=style.BLUE)
    axes.set_yticks(np.linspace(0, 2, 6))
    axes.set_ylabel("density on (0, 1)", color=style.BLUE)
    # At 0 and 1 there are probabilities, no densities: they have their own axis.
    masses = axes.twinx()
    # Beside the histogram, which would else be hidden.
    beside, drawn = [-0.02, 1.02], [(z == 0).mean(), (z == 1).mean()]
    masses.bar(beside, drawn, width=0.04, color=style.AMBER)
    masses.plot(beside, [p0, p1], "_", color=style.ORANGE, ms=20, mew=2)
    masses.set_yticks(np.linspace(0, 1, 6))
    masses.set_ylabel("probability of 0 and 1", color=style.ORANGE)
    masses.spines.right.set_visible(True)
    masses.grid(False)
    axes.set_title(
        rf"$\log\alpha = {log_alpha:g}$:  P(z = 0) = {p0:.3f},  P(z = 1) = {p1:.3f}"
    )
for axes in panels[1]:
    axes.set_xlabel("gate z")
figure.suptitle(f"{DRAWS:,} draws (filled) and closed forms (lines)")
plt.show()

# %% [markdown]
# The probabilities of 0 and 1 have closed forms. So the loss can charge for the
# expected number of weights without drawing gates. The mean $E[z]$ is an integral over
# $(0, 1)$ that the library takes by quadrature. The draws agree with all three to
# within five standard errors:

# %%
for frequency, p in (((draws == 0).mean(1), is_zero), ((draws == 1).mean(1), is_one)):
    assert (abs(frequency - p) < 5 * np.sqrt(p * (1 - p) / DRAWS)).all()
standard_error = draws.std(1) / np.sqrt(DRAWS)
assert (abs(draws.mean(1) - gate.mean(four)) < 5 * standard_error).all()

# The area below the density and the two probabilities make 1.
for log_alpha, p0, p1 in zip(four, is_zero, is_one, strict=True):
    area = np.trapezoid(density(inside, float(log_alpha)), inside)
    assert abs(area + p0 + p1 - 1) < 1e-4

# %% [markdown]
# At test time a gate has one value. The rule `"median"` is the median of $z$, which is
# $z$ at $u = 1/2$. The rule `"paper"` is the same without $\beta$ (eq. 13 of the
# paper). Both are exactly 0 for low logits, and this is what removes units.

# %%
line, points = jnp.linspace(-6, 6, 401), jnp.linspace(-6, 6, 25)
draws = draw(points)

figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
for label, values, drawn, look, colour in (
    ("P(z ≠ 0)", gate.prob_active(line), (draws != 0).mean(1), "-", style.BLUE),
    ("E[z]", gate.mean(line), draws.mean(1), "-", style.GREEN),
    (
        "rule 'median'",
        gate.deterministic(line, "median"),
        np.median(draws, 1),
        "-",
        style.PINK,
    ),
    ("rule 'paper'", gate.deterministic(line, "paper"), None, "--", style.ORANGE),
):
    axes.plot(line, values, look, color=colour, label=label)
    if drawn is not None:
        axes.plot(points, drawn, "o", color=colour)
axes.plot([], [], "o", color="grey", label=f"dots: from {DRAWS:,} draws")
axes.set_xlabel(r"logit $\log\alpha$")
axes.set_ylabel("probability, or value of the gate")
axes.set_title("A gate over its logit: probability, mean, and values at test time")
axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
plt.show()

# %% [markdown]
# ## 2. A network that gets smaller while it learns
#
# The data are the 8×8 digits that come with scikit-learn. The network is a multilayer
# perceptron with 300 and 100 hidden units. Each of the 64 pixels and each hidden unit
# has a gate.
#
# A *group* says where the units of one layer lie: which arrays use them, and which make
# them. The library reads the groups of a model from its program.

# %%
digits = data.load("digits", validation=0.2)


def arrays(split):
    return jnp.float32(split.images / digits.scale), jnp.asarray(split.labels)


train_set, validation, test = map(
    arrays, (digits.train, digits.validation, digits.test)
)
EXAMPLES = len(digits.train.labels)

model = models.MLP((64, 300, 100, 10), rngs=nnx.Rngs(0))
structure = models.structure(model)
groups = structure.groups

print(f"{EXAMPLES} training images")
for name, group in groups.items():
    used_by = ", ".join(f"axis {slot.axis} of {slot.path}" for slot in group.used_by)
    print(f"{name}: {group.size} units, used by {used_by}")

# %% [markdown]
# `train.Training` takes the model, its loss, its units, and how they are gated. The
# `price` of each expected weight is $\lambda = 0.1 / N$, with $N$ training images. A
# step draws the gates, multiplies them into the parameters, and takes a gradient step
# on parameters and logits together; `epoch` compiles many steps into one program.
#
# Every ten epochs the loop below leaves the compiled program, sets the gates by the
# test-time rule, and counts what is left.

# %%
BATCH, EPOCHS, EVERY = 50, 200, 10


def loss(model, batch):
    images, labels = batch
    logits = model(images)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return each.mean(), {"error": (logits.argmax(axis=1) != labels).mean()}


def order_of(epochs):
    """The images that each step sees: in each epoch, all of them in a new order."""
    orders = jax.vmap(lambda e: train.order_of_epoch(key, e, EXAMPLES, BATCH))(epochs)
    return orders.reshape(-1, BATCH)


def fit(**gated):
    training = train.Training(
        model,
        loss,
        structure=structure,
        optimizer=optax.adam(1e-3),
        gate_optimizer=optax.adam(1e-2),
        **gated,
    )
    state, history = training.start(key), []
    for epoch in range(EVERY, EPOCHS + 1, EVERY):
        order = order_of(jnp.arange(epoch - EVERY, epoch))
        state, totals = training.epoch(state, train_set, order)
        assert totals.first_bad_step < 0, "a loss was not finite"
        z = training.decide(state).z
        left = {name: np.count_nonzero(values) for name, values in z.items()}
        now = training.evaluate(state, [validation])["error"]
        history.append((epoch, 100 * now, left))
    return training, state, history


# %% [markdown]
# We fit twice. Without gates there is no penalty either: the same code trains the dense
# network, to compare with.

# %%
dense, dense_state, dense_history = fit()
training, state, history = fit(gate=gate, price=0.1 / EXAMPLES)

# %%
figure, (above, below) = plt.subplots(
    2, 1, figsize=(9, 6), sharex=True, layout="constrained"
)
for label, past, colour in (
    ("dense", dense_history, "grey"),
    ("gated", history, style.BLUE),
):
    epochs, errors, _ = zip(*past, strict=True)
    above.plot(epochs, errors, color=colour, label=f"{label}, last: {errors[-1]:.1f} %")
for (name, group), colour in zip(groups.items(), style.COLOURS[1:], strict=False):
    left = np.array([left[name] for _, _, left in history])
    label = f"{name}: {group.size} → {left[-1]}"
    below.plot(epochs, 100 * left / group.size, color=colour, label=label)
above.set_title("Validation error")
above.set_ylabel("error (%)")
above.set_ylim(0)
below.set_title("Units left by the test-time rule 'paper'")
below.set_ylabel("units left (% of the layer)")
below.set_ylim(0, 103)
below.set_xlabel("epoch")
for axes in (above, below):
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
plt.show()

# %% [markdown]
# One of the 287 validation images is 0.35 %, so a difference of two or three of them
# means little.
#
# `hidden2` loses few units. A unit is charged for the weights that use it: 300 for a
# pixel, 100 for a unit of `hidden1`, and only 10 for a unit of `hidden2`. `price` may
# also be one number per group.
#
# ## 3. What was removed
#
# `finish` multiplies the gates of the test-time rule into the weights. Where a gate is
# 0, nothing uses its unit any more, and the unit is taken out of every array. The
# result is of the same class, with smaller arrays and without gates.

# %%
small = training.finish(state)


def widths(network):
    groups = models.structure(network).groups
    return "-".join(str(group.size) for group in groups.values()) + "-10"


def parameters(network):
    return sum(array.size for array in jax.tree.leaves(nnx.state(network, nnx.Param)))


print(f"widths:     {widths(model)} → {widths(small)}")
print(f"parameters: {parameters(model):,} → {parameters(small):,}")

# %% [markdown]
# The small network has the same outputs as the gated one, which `whole_model` gives at
# its full width, up to rounding:

# %%
# In full float32: by default, a GPU may multiply matrices at a lower precision.
with jax.default_matmul_precision("highest"):
    before, after = training.whole_model(state)(test[0]), small(test[0])
difference = abs(after - before).max() / abs(before).max()
print(f"largest difference of the logits: {difference:.0e} of the largest logit")
assert difference <= 1e-5

# %% [markdown]
# Which pixels does it read? Those that were removed vary less from image to image, on
# average. A few do vary, but the pixels that are left tell the network enough.

# %%
images = np.asarray(train_set[0])[..., 0]
spread = images.std(0)
decision = training.decide(state)
active = decision.prob_active["input"].reshape(8, 8)
read = decision.z["input"].reshape(8, 8) != 0
rows, columns = np.nonzero(~read)

figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.6), layout="constrained")
for axes, title, image, colours, most in zip(
    panels,
    ("Mean over images", "Standard deviation over images", "P(z ≠ 0) of the gate"),
    (images.mean(0), spread, active),
    ("gray", "gray", "cividis"),
    (None, None, 1),
    strict=True,
):
    shown = axes.imshow(image, cmap=colours, vmin=0, vmax=most)
    axes.plot(columns, rows, "x", color=style.ORANGE, ms=8, mew=2)
    figure.colorbar(shown, cax=axes.inset_axes((1.03, 0, 0.05, 1)))
    axes.set_title(title)
    axes.set_xlabel("column (pixels)")
    axes.grid(False)
panels[0].set_ylabel("row (pixels)")
figure.suptitle(f"{read.sum()} of 64 pixels are read (crosses: removed)")
plt.show()
print(f"mean standard deviation of the pixels that are read: {spread[read].mean():.2f}")
print(f"of those that were removed: {spread[~read].mean():.2f}")

# %% [markdown]
# A saved model is a folder with two files: its widths in JSON, and its arrays in the
# safetensors format. Reading it takes neither gates nor training code.

# %%
with tempfile.TemporaryDirectory() as folder:
    storage.save(small, folder)
    loaded = storage.load(folder)
np.testing.assert_array_equal(loaded(test[0]), small(test[0]))


@jax.jit
def error(network, batch):
    return 100 * loss(network, batch)[1]["error"]


print(f"{'':6} {'validation error':>17} {'test error':>11} {'parameters':>11}")
for name, network in (("dense", dense.whole_model(dense_state)), ("small", loaded)):
    print(
        f"{name:6} {error(network, validation):15.1f} % {error(network, test):9.1f} %"
        f" {parameters(network):11,}"
    )

# %% [markdown]
# ## 4. A Flax module of your own
#
# `Training` takes any NNX module. If you write the loop yourself, `l0jax.nnx.Gated`
# puts gates around a module, which itself stays as it is. Here the units are 200 hidden
# ones, which `first` makes and `second` uses; `trace` reads that from the module's
# program.


# %%
class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 200, rngs=rngs)
        self.second = nnx.Linear(200, 10, rngs=rngs)

    def __call__(self, images):
        return self.second(nnx.tanh(self.first(images.reshape(-1, 64))))


classifier = Classifier(nnx.Rngs(0))
structure = l0jax.trace(classifier, test[0]).only("first")
groups = structure.groups
net = l0jax.nnx.Gated(classifier, gate, groups, rngs=nnx.Rngs(gates=1))

# Give a key to draw the gates, as in training, or a rule to set them, as at test time.
one, other = (net(test[0], key=jax.random.key(seed)) for seed in (1, 2))
decided = net(test[0], rule="median")
assert not jnp.array_equal(one, other)
assert jnp.array_equal(decided, net(test[0], rule="median"))

# %% [markdown]
# `GateLogits` is a kind of `nnx.Param`. So `nnx.split` can take the logits apart from
# the other parameters, if they are named first. Training is then plain JAX, here with
# all images in every step:

# %%
net_graph, logits, weights, others = nnx.split(
    net, l0jax.nnx.GateLogits, nnx.Param, ...
)
both = {"params": weights, "gates": logits}
objective = objectives.penalty(groups, lam=1.0, examples=EXAMPLES)
optimizer = train.gates_apart(optax.adam(1e-2), optax.adam(3e-2))


@jax.jit
def descend(both, opt_state, key):
    def total(both):
        net = nnx.merge(net_graph, both["gates"], both["params"], others)
        task, _ = loss(lambda images: net(images, key=key), train_set)
        return task + objective(nnx.state(net.module), net.prob_active())

    updates, opt_state = optimizer.update(jax.grad(total)(both), opt_state, both)
    both = optax.apply_updates(both, updates)
    # The logits are kept where a closed gate can still open.
    return both | {"gates": jax.tree.map(gate.project, both["gates"])}, opt_state


opt_state = optimizer.init(both)
for t in range(400):
    both, opt_state = descend(both, opt_state, jax.random.fold_in(key, t))

net = nnx.merge(net_graph, both["gates"], both["params"], others)
folded = l0jax.nnx.fold(net.module, net.gates(rule="median"), groups)
keep = l0jax.in_use(nnx.state(folded), groups)
smaller = l0jax.nnx.shrink(folded, keep, structure)
print(
    f"hidden units: 200 → {smaller.first.bias.size}, "
    f"validation error {error(smaller, validation):.1f} %"
)

# %% [markdown]
# ## Where next
#
# The README says what else there is, such as costs in multiply-accumulates and FLOPs
# (`l0jax.costs`), and the same adapter for Flax Linen (`l0jax.linen`).
#
# `experiments/mnist.py` is a whole run, to be read from top to bottom, and
# `experiments/mnist_training.py` makes the `Training` from its settings. They have
# learning rate schedules, averaging, checkpoints and pictures. Run it on these digits
# by `python -m experiments.mnist`. With `--dataset mnist --model lenet5` it trains
# LeNet-5 on MNIST, and removes whole feature maps.
