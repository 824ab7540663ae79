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
# # Half of a language model
#
# Which heads, which feed-forward units and which part of the stream does a language
# model need? Here gates learn it while the model trains on, within a budget of half of
# its parameters:
#
# 1. a small decoder learns to continue a text, character by character;
# 2. gates on its units are trained with it until half of the parameters are left;
# 3. what is closed is taken out: the smaller model says the same, word for word;
# 4. which heads and units of which block are left;
# 5. text before and after;
# 6. the same at full size, beside other ways to a smaller model.
#
# It runs in three minutes on one CPU core, and downloads nothing: the text is the
# reference of the language that Python brings along.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from experiments import language_report, language_rows
from experiments.harness import results
from experiments.reports import style
from experiments.tasks import text
from l0jax import costs, gates, models, train
from l0jax.models.decoder import Decoder, Sizes, generate

plt.rcParams.update(style.STYLE)
key = jax.random.key(0)

# %% [markdown]
# ## 1. A decoder
#
# Four heads and 160 feed-forward units in each of three blocks, on a stream of 64. A
# window of the text is a row; what a loss is, is the user's.

# %%
LENGTH, BATCH = 64, 32
reference = text.load("reference")
windows = text.windows_of(reference.train, LENGTH, LENGTH // 2).astype(np.int32)
held_out = text.windows_of(reference.validation, LENGTH, LENGTH).astype(np.int32)
held_out = held_out[: len(held_out) // BATCH * BATCH].reshape(-1, BATCH, LENGTH + 1)
print(f"{len(windows):,} windows of {LENGTH} of {len(reference.alphabet)} characters")


def loss(model, tokens):
    """Nats a character."""
    logits = model(tokens[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return nats.mean(), {}


def adam(rate, steps):
    return optax.adamw(optax.cosine_decay_schedule(rate, steps, 0.1), b2=0.99)


sizes = Sizes(groups=4, queries=1, rotations=8, values=16, hidden=160)
model = Decoder(len(reference.alphabet), 64, [sizes] * 3, LENGTH, rngs=nnx.Rngs(0))
structure = models.structure(model)
steps = len(windows) // BATCH

training = train.Training(
    model, loss, structure=structure.only(), optimizer=adam(3e-3, steps)
)
state = training.start(key)
order = train.order_of_epoch(key, 1, len(windows), BATCH)
state, totals = training.epoch(state, windows, order)
base = training.whole_model(state)
print(f"{training.evaluate(state, held_out)['loss']:.3f} nats on the text held out")

# %% [markdown]
# ## 2. Gates, within a budget
#
# The structure was read from the program of the model; its groups have names. Each unit
# of each group gets a hard concrete gate. A multiplier presses until half of the
# parameters are left in expectation; it is reached half way, and the rest of the epoch
# is for the gates to settle. `order` is taken in twelve pieces, to look at the gates in
# between.

# %%
for name, group in structure.groups.items():
    print(f"{name:18} {group.size}")

# %%
gate = gates.HardConcrete()
target = train.Target(costs.params, 0.5, warm_up=steps // 2, rate=0.05)
training = train.Training(
    base,
    loss,
    structure=structure,
    gate=train.Learned(gate, 0.95),
    gate_optimizer=optax.adam(0.1),
    target=target,
    optimizer=adam(1e-3, steps),
)
state = training.start(key)
PIECES = 12
order = train.order_of_epoch(key, 2, len(windows), BATCH)
order = order[: len(order) // PIECES * PIECES]
open_gates = {name: [] for name in training.gated}
for part in np.split(np.asarray(order), PIECES):
    state, totals = training.epoch(state, windows, part)
    for name, logits in state.gates["logits"].items():
        open_gates[name].append(np.asarray(gate.prob_active(logits)))

# %%
heads = [name for name in open_gates if name.endswith("heads")]
hidden = [name for name in open_gates if name.endswith("hidden")]
fig, axes = plt.subplots(2, 3, figsize=(9, 5), sharex=True, layout="constrained")
for row, names in zip(axes, (heads, hidden), strict=True):
    for axis, name in zip(row, names, strict=True):
        shown = np.stack(open_gates[name])
        shown = shown[:, np.argsort(-shown[-1], kind="stable")]
        image = axis.imshow(
            shown.T,
            extent=(0, PIECES, shown.shape[1], 0),
            aspect="auto",
            vmin=0,
            vmax=1,
            cmap="Blues",
        )
        axis.grid(visible=False)
        axis.set_xticks(range(0, PIECES + 1, 3))
        axis.set_title(name)
for axis in axes[1]:
    axis.set_xlabel("twelfths of the epoch")
for row in axes:
    row[0].set_ylabel("those that stay first")
fig.colorbar(image, ax=axes, label="probability that the gate is open")
plt.show()

# %% [markdown]
# ## 3. Out
#
# Which units stay is decided within the budget: those with the largest logits, as many
# as fit. `finish` folds what gates are worth into the weights and takes the rest out.

# %%
decision = training.decide(state)
gated = training.whole_model(state, decision)
small = training.finish(state, decision)
count = {
    name: costs.exact(models.structure(each), cost=costs.params)
    for name, each in (("base", base), ("small", small))
}
print(f"{count['small'] / count['base']:.1%} of {count['base']:,} parameters are left")

tokens = jnp.asarray(held_out[0, :, :-1])
apart = jnp.abs(gated(tokens) - small(tokens)).max() / jnp.abs(gated(tokens)).max()
prompt = reference.encode("The following ")[None]
same = bool((generate(gated, prompt, 48) == generate(small, prompt, 48)).all())
print(f"logits {apart:.0e} of the largest apart; the same text: {same}")
assert apart < 1e-5
assert same

# %%
tuning = train.Training(
    small,
    loss,
    structure=models.structure(small).only(),
    optimizer=adam(1e-3, steps // 2),
)
state = tuning.start(key)
print(f"cut: {tuning.evaluate(state, held_out)['loss']:.3f} nats")
order = train.order_of_epoch(key, 3, len(windows), BATCH)
state, totals = tuning.epoch(state, windows, order[: steps // 2])
tuned = tuning.whole_model(state)
print(f"trained on: {tuning.evaluate(state, held_out)['loss']:.3f} nats")

# %% [markdown]
# ## 4. What is left

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
blocks = np.arange(len(tuned.sizes))
for axis, at, what in ((axes[0], 0, "heads"), (axes[1], 4, "feed-forward units")):
    axis.bar(blocks, [each[at] for each in base.sizes], color="0.85", label="base")
    axis.bar(blocks, [each[at] for each in tuned.sizes], label="left")
    axis.set_xticks(blocks)
    axis.set_xlabel("block")
    axis.set_ylabel(what)
fig.legend(*axes[1].get_legend_handles_labels(), loc="outside right")
plt.show()
print(f"of {base.embed.shape[1]} units of the stream {tuned.embed.shape[1]} are left")

# %% [markdown]
# ## 5. Before and after

# %%
print("begins with: ", repr(reference.decode(prompt[0])))
for name, each in (("base", base), ("small", tuned)):
    print(f"{name:12}", repr(reference.decode(generate(each, prompt, 48)[0])))

# %% [markdown]
# ## 6. At full size
#
# `python -m experiments.language_rows half` trains decoders of 2.7 million parameters
# on a million characters of Shakespeare, and takes half of each, by gates and
# otherwise, on equal text. What is recorded of it is read back from its files.

# %%
folder = language_rows.folder_of("half")
found = results.of_folder(folder)
display(language_report.losses(found))

# %%
display(language_report.left(results.read(folder)))
print(language_rows.statements(found))
