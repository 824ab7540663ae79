"""Ways to choose k features of a table: gates on the inputs, and what others do.

Gates are those of `experiments.families` of which a number is expected to be open: each
is trained with its network until k of them are (a target on the "input" group), and the
k largest logits are kept (the rule "budget"). The target counts that a closed gate
still opens now and then, as far as its family is bounded: with 784 gates of 4.7 % those
alone would be 37 of 50. The rate of the gates is what may be chosen on validation data.

The others give every feature a score, of at most `Recipe.examples` training examples:
the LASSO (the penalty of a logistic regression at which a feature enters), the
importances of a random forest, the F statistic of an analysis of variance, mutual
information, nothing (`random`), and LassoNet (Lemhadri et al., JMLR 2021; the penalty
at which its residual network drops a feature). That one needs the package of its
authors, which needs torch: see `LASSONET`.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_selection import f_classif, mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.svm import l1_min_c

from experiments.family_settings import LEAK, VARIANTS, kinds_of
from experiments.mnist_settings import Config as Named
from experiments.mnist_settings import gate_of
from experiments.mnist_training import temperature_of
from experiments.tasks.tables import Part, Table
from l0jax import estimators, gates, models, train

LASSONET = "pip install lassonet==0.0.21 torch==2.14.1"
"""What installs it, best in an environment of its own."""
LASSONET_EXAMPLES = 2_000
KEEP_PROB = 0.8
TREES = 300
PENALTIES = 25


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is the same for every method on a data set."""

    hidden: int = 64
    """units of the only hidden layer, while choosing and after it"""
    batch_size: int = 32
    """examples of a step"""
    selecting: int = 3_000
    """steps in which gates close"""
    training: int = 3_000
    """steps of the network that is tested, from new weights on the chosen features"""
    learning_rate: float = 3e-3
    """of AdamW; it falls to 0 along a cosine"""
    weight_decay: float = 1e-2
    """decoupled"""
    gate_rates: tuple[float, ...] = (0.02, 0.1)
    """of Adam, for the gates: tried, and chosen from on validation data"""
    examples: int = 5_000
    """that a score is made of, at most"""


Candidates = dict[int, dict[str, np.ndarray]]
"""Of each k, features by the setting that chose them."""


def check(methods: Sequence[str]) -> None:
    """Raises ValueError for a method that there is not, or that can't be run here."""
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; there is {', '.join(METHODS)}")
        missing = [n for n in NEEDS.get(name, ()) if not importlib.util.find_spec(n)]
        if missing:
            raise ValueError(
                f"{name!r} needs {' and '.join(missing)}, which is not installed: "
                f"{LASSONET}, or name other methods"
            )


def peers(method: str) -> dict[str, dict[str, str]]:
    """Versions of the packages that a method needs beside those of the project."""
    found = {name: importlib.metadata.version(name) for name in NEEDS.get(method, ())}
    return {"peers": found} if found else {}


def candidates(
    method: str, table: Table, counts: tuple[int, ...], recipe: Recipe, seed: int
) -> Candidates:
    """The features that a method chooses, k of them for each k of `counts` and each of
    the settings that the method has."""
    if method in FAMILIES:
        return by_gates(method, table, counts, recipe, seed)
    if method == ALL:
        return {table.features: {"": np.arange(table.features)}}
    some = np.random.default_rng(seed).permutation(len(table.train.labels))
    part = Part(*(each[some[: recipe.examples]] for each in table.train))
    order = np.argsort(-SCORES[method](part, recipe, max(counts), seed), kind="stable")
    return {k: {"": np.sort(order[:k])} for k in counts}


# -------------------------------------------------------------------------- networks


def network(features: int, classes: int, recipe: Recipe, seed: int = 0) -> models.MLP:
    """The network that every method has."""
    return models.MLP((features, recipe.hidden, classes), rngs=nnx.Rngs(seed))


def optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """That of all networks."""
    rate = optax.cosine_decay_schedule(recipe.learning_rate, steps)
    return optax.adamw(rate, weight_decay=recipe.weight_decay)


def loss(model: Any, batch: Any) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy, and the share of examples that are wrong."""
    inputs, labels = batch
    logits = model(inputs)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return nats.mean(), {"error": (logits.argmax(-1) != labels).mean()}


def orders(
    seed: int, examples: int, recipe: Recipe, steps: int
) -> Int[Array, "steps batch"]:
    """The examples of each step: whole passes, and what is missing of the last one."""
    batch = min(recipe.batch_size, examples)
    key, passes = jax.random.key(seed), -(-steps // (examples // batch))
    each = [train.order_of_epoch(key, at, examples, batch) for at in range(passes)]
    return jnp.concatenate(each)[:steps]


# ----------------------------------------------------------------------------- gates

PAIRS = tuple(name for name in VARIANTS if name.startswith("mixture-"))
FAMILIES = tuple(
    name
    for name in VARIANTS
    if "target" in kinds_of(name)
    # The other estimators look at losses alone, and leave most gates undecided.
    and (name == "bernoulli-straight_through" or not name.startswith("bernoulli-"))
)


def by_gates(
    method: str, table: Table, counts: tuple[int, ...], recipe: Recipe, seed: int
) -> Candidates:
    """All k and rates of a family, in one program."""
    closing = _closing(method, table.features, table.classes, counts, recipe)
    key, members = jax.random.key(seed), closing.sweep.members
    model = network(table.features, table.classes, recipe, seed)
    order = orders(seed, len(table.train.labels), recipe, recipe.selecting)
    states, totals = closing.sweep.epoch(
        closing.sweep.start([key] * members, [model] * members),
        tuple(jax.tree.map(jnp.asarray, table.train)),
        jnp.stack([order] * members),
    )
    for at in range(members):
        _ = train.member_of(totals, at).means  # Raises if a loss was not finite.
    found: Candidates = {k: {} for k in counts}
    states = jax.device_get(states)
    for at, (k, rate) in enumerate(closing.members):
        # As the rule "budget" has it, but k of those too whose E[z] is 0 in float32.
        logits = train.member_of(states, at).gates["logits"]["input"]
        kept = np.argsort(-logits, kind="stable")[:k]
        found[k][f"gate rate {rate:g}"] = np.sort(kept)
    return found


@dataclasses.dataclass(frozen=True)
class Closing:
    """Trainings of a family, which differ in k and the rate of the gates."""

    members: list[tuple[int, float]]
    sweep: train.Sweep


@functools.cache
def _closing(
    method: str, features: int, classes: int, counts: tuple[int, ...], recipe: Recipe
) -> Closing:
    steps = recipe.selecting
    gate = learned(method, steps)
    leak = open_when_closed(gate, steps)
    members = [(k, rate) for k in counts for rate in recipe.gate_rates]
    shares = [(k + leak * (features - k)) / features for k, _ in members]
    target = train.Target("density", shares[0], warm_up=steps // 2)
    model = network(features, classes, recipe)
    once = train.Training(
        model,
        loss,
        structure=models.structure(model).only("input"),
        gate=gate,
        target=target,
        optimizer=optimizer(recipe, steps),
    )

    def member(setting):
        share, rate = setting
        return once.replace(
            target=dataclasses.replace(target, share=share),
            gate_optimizer=optax.adam(rate),
        )

    rates = np.asarray([rate for _, rate in members], np.float32)
    sweep = train.Sweep(member, (np.asarray(shares, np.float32), rates))
    return Closing(members, sweep)


def learned(method: str, steps: int) -> train.Learned:
    """A family as `experiments.families` has it."""
    named = Named(**VARIANTS[method])
    gate = gate_of(named)
    if isinstance(gate, gates.Mixture):
        named = dataclasses.replace(named, beta_end=gate.scale_at_leak(LEAK))
    return train.Learned(
        gate,
        KEEP_PROB,
        temperature_of(named, gate, steps),
        estimator=estimators.ESTIMATORS.get(named.estimator or ""),
    )


def open_when_closed(gating: train.Learned, steps: int) -> float:
    """P(z != 0) of a gate whose logit is as low as it may be, after so many steps."""
    gate = gating.at({}, jnp.asarray(steps))
    lowest = gate.project(jnp.full(1, -1e3))
    return float(gate.prob_active(lowest)[0])


# ---------------------------------------------------------------------------- scores

Scores = Float[np.ndarray, " features"]


def lasso(part: Part, recipe: Recipe, most: int, seed: int) -> Scores:
    """At how many penalties of a path a feature takes part; of equal ones the largest
    coefficient first. The path ends when `most` have taken part."""
    least = l1_min_c(part.inputs, part.labels, loss="log")
    # (`saga` has all classes at once, and that bound is of one against the others.)
    path = np.geomspace(0.5 * least, 200 * least, PENALTIES)
    model = LogisticRegression(
        l1_ratio=1.0,
        solver="saga",
        tol=1e-2,
        max_iter=1_000,
        warm_start=True,
        random_state=seed,
    )
    there, largest = np.zeros((2, part.inputs.shape[1]))
    for penalty in path:
        model.set_params(C=penalty).fit(part.inputs, part.labels)
        largest = np.abs(model.coef_).max(axis=0)
        there += largest > 0
        if (there > 0).sum() >= most:
            break
    return there + largest / (1 + largest.max())


def forest(part: Part, recipe: Recipe, most: int, seed: int) -> Scores:
    """Mean decrease of impurity."""
    model = RandomForestClassifier(TREES, random_state=seed)
    return model.fit(part.inputs, part.labels).feature_importances_


def analysis_of_variance(part: Part, recipe: Recipe, most: int, seed: int) -> Scores:
    """The F statistic; -1 of a feature that is constant."""
    varies = part.inputs.std(axis=0) > 0
    found = np.full(len(varies), -1.0)
    found[varies] = f_classif(part.inputs[:, varies], part.labels)[0]
    return found


def mutual_information(part: Part, recipe: Recipe, most: int, seed: int) -> Scores:
    """By nearest neighbours."""
    return mutual_info_classif(part.inputs, part.labels, random_state=seed)


def at_random(part: Part, recipe: Recipe, most: int, seed: int) -> Scores:
    """Noise."""
    return np.random.default_rng(seed).random(part.inputs.shape[1])


def lassonet(part: Part, recipe: Recipe, most: int, seed: int) -> Scores:
    """The penalty at which a feature goes for good, on the whole path of the package
    with its settings, and a hidden layer as large as everywhere here; of at most
    `LASSONET_EXAMPLES`, for each step of that path is up to 100 passes over all."""
    from lassonet import LassoNetClassifier

    model = LassoNetClassifier(
        hidden_dims=(recipe.hidden,), verbose=0, random_state=seed, torch_seed=seed
    )
    some = slice(LASSONET_EXAMPLES)
    model.path(part.inputs[some], part.labels[some])
    return model.feature_importances_.numpy()


ALL = "all"
SCORES: dict[str, Callable[[Part, Recipe, int, int], Scores]] = {
    "lassonet": lassonet,
    "lasso": lasso,
    "forest": forest,
    "anova": analysis_of_variance,
    "mutual_information": mutual_information,
    "random": at_random,
}
NEEDS = {"lassonet": ("lassonet", "torch")}
METHODS = (*FAMILIES, *SCORES, ALL)
