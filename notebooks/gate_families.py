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
# # Gate families
#
# A gate multiplies a unit of a network, and is exactly 0 with a probability that is
# trained. Which distribution a gate has is a choice, and so are the gradient by which
# it is trained, the price that closes it, and the rule that decides it at test time.
# This notebook shows these choices in pictures:
#
# 1. what a gate is, in five families;
# 2. a mixture from a pair of distributions of your own;
# 3. how the sharpness of a mixture makes its gradient noisy;
# 4. estimates of the gradient for gates that are only 0 or 1;
# 5. error against size for two families, each from one compiled program;
# 6. a target for the size in place of a guessed price;
# 7. what different test-time rules make of one network.
#
# It runs in about a minute on one CPU core, and downloads nothing.

# %%
import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from experiments.reports import style
from experiments.tasks import data
from l0jax import costs, estimators, gates, gating, models, train

plt.rcParams.update(style.STYLE)
key = jax.random.key(0)

# %% [markdown]
# ## 1. What a gate is
#
# A gate $z$ is a random number in $[0, 1]$. It has three parts: a probability of being
# exactly 0, a probability of being exactly 1, and a density in between. One number is
# trained for each gate, its *logit*, which moves the gate from 0 to 1.
#
# | family | how it is drawn |
# | --- | --- |
# | hard concrete | a logistic variable through a sigmoid, stretched and clipped |
# | mixture | near 0 or near 1 by a biased coin, stretched and clipped |
# | stochastic (STG) | a normal variable, clipped |
# | HardKuma | a Kumaraswamy variable, stretched and clipped |
# | Bernoulli | 0 or 1 |
#
# All of them have `sample`, and closed forms of $P(z \ne 0)$, of $P(z = 1)$ and of
# $P(z > x)$, called `survival`. The density is minus its derivative.

# %%
families = {
    "hard concrete": gates.HardConcrete(),
    "mixture (power)": gates.Mixture(gates.make_pair("power")),
    "stochastic (STG)": gates.Stochastic(),
    "HardKuma": gates.HardKumaraswamy(),
    "Bernoulli": gates.Bernoulli(),
}
three = jnp.array([-2.0, 0.0, 2.0])
colours = (style.ORANGE, style.BLUE, style.GREEN)
DRAWS = 10_000
points = np.linspace(0.005, 0.995, 50)


def draw(gate, logits):
    """Draws of one gate for each logit, one row each."""
    return np.asarray(jax.jit(gate.sample)(key, jnp.tile(logits[:, None], DRAWS)))


figure, panels = plt.subplots(
    2, 5, figsize=(13, 5), sharex="row", sharey="row", layout="constrained"
)
for (name, gate), (above, below) in zip(families.items(), panels.T, strict=True):
    draws = draw(gate, three)
    survival = np.array([gate.survival(x, three) for x in points.tolist()])
    density = -np.diff(survival, axis=0) / np.diff(points)[:, None]
    for logit, curve, z, colour in zip(three, density.T, draws, colours, strict=True):
        counts, edges = np.histogram(z[(z > 0) & (z < 1)], bins=25, range=(0, 1))
        above.stairs(25 * counts / DRAWS, edges, color=colour, fill=True, alpha=0.25)
        middles = (points[1:] + points[:-1]) / 2
        above.plot(middles, curve, color=colour, label=f"logit {logit:g}")
    zero, one = 1 - gate.prob_active(three), gate.prob_one(three)
    for at, (label, p, drawn, colour) in enumerate(
        (
            ("z = 0", zero, draws == 0, "#333333"),
            ("0 < z < 1", 1 - zero - one, (draws > 0) & (draws < 1), "#BBBBBB"),
            ("z = 1", one, draws == 1, "white"),
        )
    ):
        x = np.arange(3) + 0.28 * (at - 1)
        below.bar(x, p, 0.26, color=colour, edgecolor="#333333", label=label)
        below.plot(x, drawn.mean(1), "_", color=style.ORANGE, ms=10, mew=2)
    above.set_title(name)
    above.set_xlabel("gate z")
    below.set_xlabel("logit")
below.plot([], [], "_", color=style.ORANGE, ms=10, mew=2, label="of the draws")
panels[0, 0].set(ylim=(0, 2), ylabel="density on (0, 1)", xticks=(0, 0.5, 1))
panels[1, 0].set(ylim=(0, 1), ylabel="probability")
panels[1, 0].set_xticks(range(3), [f"{logit:g}" for logit in three])
for axes in panels[:, -1]:
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
figure.suptitle(f"{DRAWS:,} draws (filled) and closed forms (lines and bars)")
plt.show()

# %% [markdown]
# The loss can charge for $P(z \ne 0)$ without drawing anything. The task has to be
# solved with draws, so that it matters what lies between 0 and 1: there, and only
# there, does a draw change a little when its logit does, and pass a gradient on. A
# hard concrete gate at logit 0 is in between in 66 % of its draws, this mixture in
# 21 %, and a Bernoulli gate never. The less there is in between, the closer are gates
# in training to those that are 0 or 1 in the end.
#
# ## 2. A mixture from any pair
#
# A mixture is made of a distribution near 0, with cdf $R_0$, and its mirror image near
# 1, with weights $1 - \pi$ and $\pi = \sigma(\text{logit})$:
#
# $$ Q(s) = (1 - \pi) R_0(s) + \pi\,(1 - R_0(1 - s)). $$
#
# It is stretched from $(0, 1)$ to $(\gamma, \zeta) = (-0.1, 1.1)$ and clipped. A pair
# is a cdf and its density. Here is Student's distribution with two degrees of freedom,
# whose tails fall as $|s|^{-3}$:


# %%
@dataclass(frozen=True)
class Student(gates.Pair):
    """Student's distribution with two degrees of freedom, on all numbers."""

    scale: float = 0.04

    def cdf(self, s):
        x = s / self.scale
        return (1 + x / jnp.sqrt(2 + x**2)) / 2

    def density(self, s):
        x = s / self.scale
        return (2 + x**2) ** -1.5 / self.scale


mixture = gates.Mixture(Student())

# %% [markdown]
# That is all: `sample` inverts $Q$ by bisection, and differentiates it as the implicit
# function that it is. A pair is checked when a gate is made of it. If the density is
# not the derivative of the cdf, the gradient would be wrong, so there is no gate:


# %%
class Forgetful(Student):
    def density(self, s):
        return super().density(s) * self.scale


try:
    gates.Mixture(Forgetful())
except ValueError as error:
    print(error)

# %% [markdown]
# Draws, probabilities and gradients follow from the two functions. For the gradient:
# the mean of $\partial z / \partial \text{logit}$ over draws is the derivative of
# $E[z]$, which has a closed form.

# %%
line, some = jnp.linspace(-4, 4, 81), jnp.linspace(-4, 4, 9)
many = jnp.tile(some[:, None], DRAWS)
draws = draw(mixture, some)
slopes = np.asarray(jax.jit(jax.grad(lambda x: mixture.sample(key, x).sum()))(many))

figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(13, 3.8), layout="constrained"
)
s, pi = np.linspace(-0.3, 1.3, 400), 0.3
off, on = mixture.pair.density(s), mixture.pair.density(1 - s)
left.plot(s, (1 - pi) * off, color=style.ORANGE, label=r"$(1 - \pi)\, r_0(s)$")
left.plot(s, pi * on, color=style.GREEN, label=r"$\pi\, r_0(1 - s)$")
left.plot(s, (1 - pi) * off + pi * on, "k:", label="their sum")
width = mixture.zeta - mixture.gamma
edges = [-mixture.gamma / width, (1 - mixture.gamma) / width]
left.axvspan(-0.3, edges[0], color=style.REMOVED, alpha=0.6, lw=0, label="z is 0")
left.axvspan(edges[1], 1.3, color=style.SKY, alpha=0.25, lw=0, label="z is 1")
left.set_title(r"Before the stretch, at $\pi = 0.3$")
left.set(xlabel="s", ylabel="density", xlim=(-0.3, 1.3), yscale="log", ylim=(1e-3, 1e2))
left.legend(ncols=2)

for label, curve, drawn, colour in (
    ("P(z ≠ 0)", mixture.prob_active(line), draws != 0, style.BLUE),
    ("E[z]", mixture.mean(line), draws, style.PINK),
    ("P(z = 1)", mixture.prob_one(line), draws == 1, style.GREEN),
):
    middle.plot(line, curve, color=colour, label=label)
    middle.plot(some, drawn.mean(1), "o", color=colour)
middle.set_title(f"Closed forms and {DRAWS:,} draws (dots)")
middle.set(xlabel="logit", ylabel="probability or mean")
middle.legend()

slope_of_mean = jax.jit(jax.vmap(jax.grad(mixture.mean)))
standard_error = slopes.std(1) / np.sqrt(DRAWS)
right.plot(line, slope_of_mean(line), color=style.PINK, label="d E[z] / d logit")
right.errorbar(
    some,
    slopes.mean(1),
    2 * standard_error,
    fmt="o",
    color=style.BLUE,
    capsize=3,
    label="draws, ± 2 standard errors",
)
right.set_title("The gradient")
right.set(xlabel="logit", ylabel="slope", ylim=(0, 0.4))
right.legend()
plt.show()

p = mixture.prob_active(some)
assert (abs((draws != 0).mean(1) - p) < 5 * np.sqrt(p * (1 - p) / DRAWS)).all()
assert (abs(slopes.mean(1) - slope_of_mean(some)) < 5 * standard_error).all()

# %% [markdown]
# ## 3. Sharpness against noise
#
# Sharper modes make a gate that is off count less: its $P(z \ne 0)$, the *leak*, goes
# to 0. But then draws seldom fall between the modes, and those that do have steep
# slopes, since the same derivative of $E[z]$ is left to fewer draws. `slope_moments`
# has the mean and the mean square of the slope of a draw, by quadrature. Each curve
# below is one pair over its scales.

# %%
pairs = {name: gates.make_pair(name) for name in gates.PAIRS}
pairs["Student (of section 2)"] = Student()
off, undecided = jnp.array(-jnp.inf), jnp.array(0.0)


@functools.partial(jax.jit, static_argnums=0)
def facts(gate, scales):
    """Of a gate at each scale: the leak, and both moments."""

    def at(scale):
        now = gate.at_temperature(scale)
        return now.prob_active(off), *now.slope_moments(undecided)

    return jax.vmap(at)(scales)


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
looks = itertools.product(("-", "--"), style.COLOURS)
for (name, pair), (line, colour) in zip(pairs.items(), looks, strict=False):
    scales = jnp.append(jnp.geomspace(0.003, 3, 81), pair.scale)
    leak, first, second = map(np.asarray, facts(gates.Mixture(pair), scales))
    for axes, values in ((left, second), (right, second / first**2 - 1)):
        axes.plot(leak[:-1], values[:-1], line, color=colour, label=name)
        axes.plot(leak[-1], values[-1], "o", color=colour)
right.plot([], [], "o", color="grey", label="dot: the default scale")
for axes, low, high in ((left, 1e-2, 1e5), (right, 0.1, 1e6)):
    axes.set(xscale="log", yscale="log", xlim=(0.9, 0.02), ylim=(low, high))
    axes.set_xticks([0.5, 0.2, 0.1, 0.05, 0.02], ["0.5", "0.2", "0.1", "0.05", "0.02"])
    axes.minorticks_off()
    axes.set_xlabel("leak: P(z ≠ 0) of a gate that is off (sharper →)")
left.set_title("Mean square of the slope of a draw, at logit 0")
left.set_ylabel("mean square")
right.set_title("Its variance, divided by the square of its mean")
right.set_ylabel("draws until noise and signal are equal")
right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
plt.show()

# %% [markdown]
# Three kinds of tails can be told apart. Where the density falls as fast as a
# Gaussian's (gaussian, half_normal), a leak of 0.2 takes thousands of draws and more
# for a gradient that is not mostly noise. With exponential tails (exponential,
# logistic, laplace) the mean square grows more than tenfold from a leak of 0.2 to one
# of 0.1. With the tails of a power (power, kumaraswamy, beta, Student) it grows slowly.
# In exponential_uniform a share of 5 % is uniform, which bounds the slopes, but the
# leak too. All of these pairs converge to 0 and 1, so all of them make gates; those
# that shall be sharp need heavy tails. Too wide a pair is no use either: the gate then
# barely depends on its logit.
#
# ## 4. Gates that are only 0 or 1
#
# Bernoulli gates have nothing in between, so no path leads from a draw to its logit.
# `l0jax.estimators` has estimates of the gradient that, but for straight-through, only
# evaluate the loss. To see their bias and their variance we take a loss of eight gates:
# the mean square error of a linear model. There are $2^8$ states, so that the gradient
# of the expected loss is known.

# %%
rng = np.random.default_rng(0)
features = jnp.float32(rng.normal(size=(64, 8)))
weights = jnp.linspace(0.2, 1.6, 8)
targets = features @ (weights * (weights > 0.8)) + jnp.float32(rng.normal(size=64))
phi = {"inputs": jnp.linspace(2, -2, 8)}


def square_error(z):
    return ((features @ (weights * z["inputs"]) - targets) ** 2).mean()


def expected_error(phi):
    states = jnp.array(list(itertools.product((0.0, 1.0), repeat=8)))
    p = jax.nn.sigmoid(phi["inputs"])
    probabilities = jnp.prod(jnp.where(states == 1, p, 1 - p), axis=1)
    return probabilities @ jax.vmap(lambda z: square_error({"inputs": z}))(states)


usual, exact = jax.jit(jax.value_and_grad(expected_error))(phi)
exact = exact["inputs"]

# %% [markdown]
# An estimator gives a *surrogate*, whose gradient is the estimate:


# %%
def estimates(estimator, loss=square_error, draws=10_000):
    """The estimated gradient, one row for each draw."""
    slope = jax.grad(lambda phi, key: estimator(key, phi, loss))
    keys = jax.random.split(key, draws)
    many = jax.jit(jax.vmap(slope, in_axes=(None, 0)))
    return np.asarray(many(phi, keys)["inputs"])


found = {name: estimates(each) for name, each in estimators.ESTIMATORS.items()}


def with_baseline(key, phi, loss):
    return estimators.reinforce(key, phi, loss, baseline=usual)


found["reinforce, baseline E[f]"] = estimates(with_baseline)
found = dict(sorted(found.items(), key=lambda item: -item[1].var(0).mean()))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), layout="constrained")
for at, (each, colour) in enumerate(zip(found.values(), style.COLOURS, strict=True)):
    places = np.arange(1, 9) + 0.11 * (at - 3)
    two_errors = 2 * each.std(0) / np.sqrt(len(each))
    left.errorbar(
        places, each.mean(0) - exact, two_errors, fmt="o", color=colour, elinewidth=1
    )
    right.barh(at, each.var(0).mean(), color=colour)
left.axhline(0, color="black", lw=1)
left.set_title("Bias: mean estimate - exact, ± 2 standard errors (colours →)")
left.set(xlabel="gate", ylabel="bias of the derivative")
right.set_yticks(range(len(found)), [name.replace("_", " ") for name in found])
right.invert_yaxis()
right.set_title("Variance of an estimate, mean over the gates")
right.set(xscale="log", xlabel="variance")
right.grid(False, axis="y")
plt.show()

for name, each in found.items():
    errors = abs(each.mean(0) - exact) / (each.std(0) / np.sqrt(len(each)))
    print(f"{name:25} largest bias: {errors.max():6.1f} standard errors")
    assert (errors.max() < 5) == (name != "straight_through")

# %% [markdown]
# Straight-through varies least, but it is biased: a square is not linear in a gate. Of
# the others, REINFORCE and AR (augment reinforce) evaluate the loss once and the rest
# twice. What helps most is a difference of two values: a baseline, which here is the
# mean that training would not know, a second draw, or two draws from the same noise and
# its mirror image (ARM). DisARM is ARM with the rest of the noise integrated out, so
# that its variance is never larger. In training, `train.Learned` takes one of these as
# `estimator=`.
#
# ## 5. Error against size
#
# Families can be compared only over a range of prices: each gives a curve of error
# against size. Here a small network learns the 8×8 digits that come with scikit-learn,
# and each of the 64 pixels and each hidden unit has a gate.

# %%
digits = data.load("digits", validation=0.2)


def arrays(split):
    return jnp.float32(split.images / digits.scale), jnp.asarray(split.labels)


train_set, validation = arrays(digits.train), arrays(digits.validation)
EXAMPLES, BATCH, WIDTHS = len(digits.train.labels), 64, (64, 100, 50, 10)


def network(key):
    return models.MLP(WIDTHS, rngs=nnx.Rngs(key))


structure = models.structure(network(key))


def loss(model, batch):
    images, labels = batch
    logits = model(images)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return each.mean(), {"error": (logits.argmax(1) != labels).mean()}


def training_of(gate, **paid):
    """A network with such gates, at a price or with a target."""
    return train.Training(
        network(key),
        loss,
        structure=structure,
        gate=gate,
        optimizer=optax.adam(3e-3),
        gate_optimizer=optax.adam(3e-2),
        **paid,
    )


def order(key, epochs):
    """The images of each step: in each epoch, all of them in a new order."""
    orders = [train.order_of_epoch(key, e, EXAMPLES, BATCH) for e in range(epochs)]
    return jnp.concatenate(orders)


# %% [markdown]
# `Sweep` compiles many trainings that differ in numbers into one program: here all
# prices and seeds of a family. (On a CPU its members run one after the other.)

# %%
two = {"hard concrete": gates.HardConcrete(), "mixture (power)": gates.Mixture()}
prices, seeds = (0.03, 0.1, 0.2, 0.4), (0, 1, 2)
members = list(itertools.product(prices, seeds))
keys = [jax.random.key(seed) for _, seed in members]
orders = jnp.stack([order(key, 30) for key in keys])


def swept(gate):
    """A training of the family, and the states of all members in the end."""
    once = training_of(gate, price=0.0)
    sweep = train.Sweep(
        lambda lam: once.replace(price=lam / EXAMPLES),
        np.array([lam for lam, _ in members]),
    )
    states = sweep.start(keys, [network(key) for key in keys])
    states, totals = sweep.epoch(states, train_set, orders)
    assert (totals.first_bad_step < 0).all()
    return once, states


trained = {name: swept(gate) for name, gate in two.items()}
print(f"{len(members)} trainings of {orders.shape[1]} steps for each family")

# %% [markdown]
# A test-time rule turns the logits of each member into one network, of which we take
# the validation error and the weights that are left after removal.

# %%
weights_of = jax.jit(functools.partial(costs.weights, structure))
whole = float(weights_of({}))


def evaluate(training, state, decision):
    """Validation error in per cent, and weights left, with gates as decided."""
    found = training.evaluate(state, [validation], rule=decision)
    left = {name: jnp.float32(z != 0) for name, z in decision.z.items()}
    return 100 * found["error"], float(weights_of(left))


decided = {}
for name, (training, states) in trained.items():
    for at, (lam, seed) in enumerate(members):
        state = train.member_of(states, at)
        decision = training.decide(state, "median")
        decided[name, lam, seed] = evaluate(training, state, decision)

figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
for name, colour, marker in zip(two, style.COLOURS, "os", strict=False):
    of_seed = np.array([[decided[name, lam, seed] for seed in seeds] for lam in prices])
    errors, left = of_seed.mean(1).T
    axes.plot(
        of_seed[..., 1].ravel(),
        of_seed[..., 0].ravel(),
        marker,
        color=colour,
        alpha=0.35,
        ms=5,
    )
    axes.plot(left, errors, f"{marker}-", color=colour, label=name, ms=7)
    side = 12 if marker == "s" else -20
    for lam, x, y in zip(prices, left, errors, strict=True):
        axes.annotate(
            f"{lam:g}",
            (x, y),
            (0, side),
            textcoords="offset points",
            color=colour,
            ha="center",
        )
axes.axvline(whole, color="grey", ls=":", label="all weights")
axes.set(xscale="log", xlabel="weights left", ylabel="validation error (%)", ylim=0)
ticks = (1000, 2000, 5000, 10_000)
axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
axes.minorticks_off()
axes.set_title("Rule 'median'; means of three seeds, labelled by Nλ; faint: each seed")
axes.legend()
plt.show()

# %% [markdown]
# In this short training the mixture removes more at high prices, and makes more
# errors at the same size. That is one network, one rate for the gates and one scale of
# the pair, not a verdict. `experiments/families.py` compares all families on MNIST in
# the same way.
#
# ## 6. A target instead of a price
#
# Nothing says beforehand which price leaves how much. A target states the share that
# may be left, in expectation, and its price is found in training: a multiplier, which
# ascends while there is too much left. `"lagrangian"`, one of the constraints that
# enforce targets, sets it back to 0 once the target is met (`restart`).

# %%
gate = two["hard concrete"]


def fit(share, epochs=60, **options):
    """A training, its states after a quarter and at the end, and the metrics of each
    step."""
    target = train.Target(costs.weights, share, how="lagrangian", rate=3e-3, **options)
    training = training_of(gate, target=target)

    # (`training.step` gives its state away. Here some are kept.)
    @jax.jit
    def steps(state, order):
        def step(state, rows):
            batch = jax.tree.map(lambda a: a[rows], train_set)
            return training.taken(state, batch)

        return jax.lax.scan(step, state, order)

    states, history = [training.start(key)], []
    for quarter in np.split(order(key, epochs), 4):
        state, metrics = steps(states[-1], quarter)
        states.append(state)
        history.append(metrics)
    joined = jax.tree.map(lambda *a: jnp.concatenate(a), *history)
    return training, states[1], states[-1], joined


fits = {
    "target 0.5": (style.GREEN, *fit(0.5)),
    "target 0.2": (style.BLUE, *fit(0.2)),
    "0.2, no restart": (style.ORANGE, *fit(0.2, restart=False)),
}

# %%
figure, (above, below) = plt.subplots(
    2, 1, figsize=(9, 6), sharex=True, layout="constrained"
)
for label, (colour, *_, seen) in fits.items():
    look = "--" if "no restart" in label else "-"
    above.plot(seen["multiplier of weights"], look, color=colour, label=label)
    below.plot(seen["excess of weights"], look, color=colour)
above.set_title("The multiplier")
above.set(ylabel="multiplier", ylim=0)
below.axhline(0, color="black", lw=1)
below.set_title("The excess: expected share of weights left / target - 1")
below.set(xlabel="step", ylabel="excess")
above.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
plt.show()

for label, (_, training, _, state, _) in fits.items():
    decision = training.decide(state, "median")
    wrong, left = evaluate(training, state, decision)
    print(
        f"{label:16} expected {decision.expected['weights']:.3f},"
        f" left {left / whole:.3f} of the weights, validation error {wrong:.1f} %"
    )

# %% [markdown]
# Each price rose until its target was met. Without a restart, a multiplier that has
# grown for long falls only as slowly, and goes on closing gates below the target. What
# removal leaves is a little less than expected: a gate that is off still opens in a few
# per cent of its draws, and the rule closes it.
#
# ## 7. What the test-time rule decides
#
# A trained gate is still random. A rule gives it one value:
#
# - `"paper"`: as the family's paper does, for hard concrete gates without their
#   temperature, so that only the least likely ones close;
# - `"median"`: the median of $z$, 0 where $P(z \ne 0) \le 1/2$;
# - `"threshold"`: $E[z]$, or 0 where $P(z \ne 0) \le 1/2$;
# - `"expected_count"`: $E[z]$ of as many units as are expected to be open;
# - `"budget"`: $E[z]$ of the units with the largest logits, as many as fit into a
#   target; the default where there is one.
#
# The last three exist for every family. Here they decide the network of the target 0.2,
# after a quarter of its training and at the end. Beside them are networks with drawn
# gates, as in training.

# %%
_, training, early, late, _ = fits["target 0.2"]
rules = ("paper", "median", "threshold", "expected_count", "budget")

figure, lines = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
for when, state, (left, middle, right) in zip(
    ("early", "at the end"), (early, late), lines, strict=True
):
    active = training.decide(state).prob_active
    for at, (rule, marker) in enumerate(zip(rules, "os^x+", strict=True)):
        decision = training.decide(state, rule)
        wrong, weights_left = evaluate(training, state, decision)
        colour = style.COLOURS[at]
        for name, z in decision.z.items():
            left.plot(active[name], z, marker, color=colour, alpha=0.5)
        left.plot([], [], marker, color=colour, label=rule)
        middle.barh(at, weights_left, color=colour)
        right.barh(at, wrong, color=colour)
    drawn = []
    for seed in range(10):
        z = gating.sample(jax.random.key(seed), gate, state.gates["logits"])
        draw_of_it = train.Decision("drawn", jax.device_get(z), active, {})
        drawn.append(evaluate(training, state, draw_of_it))
    for axes, values in zip((right, middle), np.transpose(drawn), strict=True):
        axes.barh(5, values.mean(), color=style.REMOVED)
        axes.plot(values, np.full(10, 5), "|", color="black")
        names = (*rules, "ten draws") if axes is middle else [""] * 6
        axes.set_yticks(range(6), names)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
    middle.axvline(float(weights_of(active)), color="black", ls=":")
    left.set(xlabel="P(z ≠ 0)", ylabel="gate at test time", title=f"Gates, {when}")
    middle.set(xlabel="weights", title=f"Weights left, {when} (dotted: expected)")
    right.set(xlabel="validation error (%)", title=f"Error, {when}")
lines[0, 0].legend()
plt.show()

# %% [markdown]
# While gates are undecided, the rules differ: `"paper"` keeps units that `"median"`
# closes, and the rules by $E[z]$ give those that they keep the values that they have on
# average. `"budget"` closes what the target has no room for, more than training has
# closed so far. At the end most gates are decided, and it matters little which rule is
# asked: one of the 287 validation images is 0.35 %. No P(z ≠ 0) is below 0.047: the
# logits are kept where a closed gate can still open; all closed gates together are
# expected to open a few units, which is why `"expected_count"` keeps more than
# `"threshold"`. The draws show what the rules leave out: how much the error varies with
# the gates.
#
# ## Where next
#
# [quickstart.ipynb](quickstart.ipynb) trains, shrinks and saves one network step by
# step. `gates.GATES`, `gates.PAIRS`, `estimators.ESTIMATORS` and `gating.RULES` list
# what there is, and `python -m experiments.families --quick` trains a small network
# with all of it.
