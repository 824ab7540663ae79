"""The experiment from its settings to its files, on the digits.

Most laws are swept over a few short runs that between them use every option. What a
network does is computed again in NumPy, from the checkpoint and the gates it left.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from scipy.interpolate import RegularGridInterpolator

from experiments import (
    mnist,
    mnist_evaluation,
    mnist_rows,
    mnist_settings,
    mnist_training,
)
from experiments.harness import loop, results, run_folder
from experiments.tasks import data
from l0jax import costs, gates, models, objectives, storage, train, units
from l0jax.checkpoints import Checkpoints
from l0jax.estimators import ESTIMATORS

SHORT = mnist.Config(
    epochs=5,
    batch_size=50,
    lam=(0.2,),
    weight_decay=1e-4,
    beta=2 / 3,
    learning_rate=1e-2,
    gate_learning_rate=0.1,
    polyak=0.9,
    checkpoint_every=2,
    progress=False,
    dense="no",
)
STEPS = 26  # of each epoch: a twelfth of the 1,437 examples is held out
EXAMPLES = 1317
WIDTHS = {"input": 64, "hidden1": 300, "hidden2": 100}
OUTPUTS = [300, 100, 10]  # of the layers that read them
DENSE = 64 * 300 + 300 * 100 + 100 * 10
ARRAYS = [f"layers.{i}.kernel" for i in range(3)]

COMPACT: dict[str, Any] = {"compact_gain": 0.0, "compact_after": 1, "epochs": 5}
KINDS: dict[str, dict[str, Any]] = {
    "group": {},
    "weight": {"gates": "weight", "epochs": 3, "keep_prob": (0.4, 0.5, 0.6)},
    "per example": {
        "per_example": True,
        "test_rule": "mean",
        "batch_size": 100,
        "epochs": 1,
    },
    # No weight and no logit moves, so that the penalty is known.
    "frozen": {
        "learning_rate": 0.0,
        "gate_learning_rate": 0.0,
        "polyak": 0.0,
        "test_rule": "samples",
        "samples": 50,
        "lam": (1.0, 2.0, 3.0),
        "weight_decay": 0.01,
        "keep_prob": (0.9, 0.6, 0.3),
        "beta_end": 0.3,
        "epochs": 2,
    },
    "dead": {"lam": (0.0, 50.0, 0.1), "test_rule": "median", "epochs": 2},
    "none": {"gates": "none", "epochs": 2},
    # What is dead is taken out while training goes on.
    "compacted": {"lam": (2.0,), **COMPACT},
    "compacted weights": {
        "gates": "weight",
        "lam": (2.0,),
        "keep_prob": (0.4, 0.5, 0.6),
        **COMPACT,
    },
}
every_run = pytest.mark.parametrize("kind", KINDS)

CLOCK = {
    "seconds",
    "steps_per_second",
    "first_step_at",
    "seconds_to_first_step",
    "wall_seconds",
    "folder",
    "made",
}


class Run(NamedTuple):
    config: mnist.Config
    summary: dict[str, Any]

    @property
    def folder(self) -> Path:
        assert self.config.out is not None
        return self.config.out

    @property
    def rows(self) -> list[dict[str, Any]]:
        return run_folder.Log(self.folder).rows()

    @property
    def steps(self) -> int:
        return EXAMPLES // self.config.batch_size


def run(folder, **changes):
    config = dataclasses.replace(SHORT, out=folder, **changes)
    return Run(config, mnist.main(config))


@pytest.fixture(autouse=True, scope="module")
def small_evaluation_batches():
    """Several for the test set, one for the validation set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist_evaluation, "EVALUATION_BATCH", 120)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of each kind, `runs("weight")`."""

    @functools.cache
    def finished(kind):
        return run(tmp_path_factory.mktemp("finished") / "run", **KINDS[kind])

    # Before any test replaces what a run consists of.
    finished("group")
    return finished


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run like "group", as if killed after three of five epochs."""
    return run(tmp_path_factory.mktemp("stopped") / "run", stop_after=3)


def without(names, tree):
    """`tree` without the entries of these names, however deep."""
    if isinstance(tree, dict):
        return {k: without(names, v) for k, v in tree.items() if k not in names}
    return [without(names, v) for v in tree] if isinstance(tree, list) else tree


def same_run(found, expected, apart_from=CLOCK):
    assert without(apart_from, found.rows) == without(apart_from, expected.rows)
    found, expected = found.summary, expected.summary
    assert without(apart_from, found) == without(apart_from, expected)


def npz(file):
    with np.load(file) as stored:
        return dict(stored)


def same_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


# --------------------------------------------------------- what a run has to leave


GONE = 100.0  # minus the logit of a gate that is not there


class Left(NamedTuple):
    """What was evaluated at the end of a run, in float64: for each layer the weights
    before and after gating, the biases, and P(z != 0) and the gates' values."""

    weights: list[np.ndarray]
    folded: list[np.ndarray]
    biases: list[np.ndarray]
    active: list[np.ndarray]
    values: list[np.ndarray]
    log_alpha: list[np.ndarray]

    def __call__(self, images):
        x = images.reshape(len(images), -1) / 16.0
        for i, (kernel, bias) in enumerate(zip(self.folded, self.biases, strict=True)):
            x = (np.maximum(x, 0) if i else x) @ kernel + bias
        return x


def names(config):
    """Of the groups, in the order of the layers."""
    return {"group": list(WIDTHS), "weight": ARRAYS, "none": []}[config.gates]


def training(config, data=None):
    """What a configuration trains, whole."""
    data = digits() if data is None else data
    model = mnist.network(config, data, jax.random.key(config.seed))
    return mnist.training_of(config, mnist.check(config), data, model)


def checkpoint(run):
    """The newest one: the training at its width, the state, the epoch, the notes."""
    found = train.Checkpoints(run.folder / "checkpoints")
    return (
        *found.restore(training(run.config), jax.random.key(run.config.seed)),
        found.notes,
    )


def left_in(run):
    """Which units the newest checkpoint has."""
    alive = checkpoint(run)[0].alive
    return {name: alive[name] for name in WIDTHS}


def spread(array, *along):
    """An array as it would lie in the whole network, with zeros for what was lost."""
    whole = np.zeros([len(flags) for flags in along])
    whole[np.ix_(*map(np.flatnonzero, along))] = array
    return whole


def left(run):
    now, state, _, _ = checkpoint(run)
    alive = [*(now.alive[name] for name in WIDTHS), np.ones(10, bool)]
    params, own = now.averaged(state)
    arrays = {path: np.float64(a) for path, a in units.arrays(params).items()}
    logits = {name: np.float64(a) for name, a in own.get("logits", {}).items()}
    stored = npz(run.folder / "gates.npz")
    gated = names(run.config)
    assert len(stored) == 2 * len(gated)
    weights = [spread(arrays[path], *alive[i : i + 2]) for i, path in enumerate(ARRAYS)]
    values = [np.float64(stored[f"{name}/value"]) for name in gated]
    # Of what was lost, a gate that is closed for good.
    where = [
        alive[i] if name in WIDTHS else np.outer(*alive[i : i + 2]).ravel()
        for i, name in enumerate(gated)
    ]
    return Left(
        weights,
        [w * z.reshape(len(w), -1) for w, z in zip(weights, values, strict=True)]
        if gated
        else weights,
        [spread(arrays[f"layers.{i}.bias"], alive[i + 1]) for i in range(3)],
        [np.float64(stored[f"{name}/prob_active"]) for name in gated],
        values,
        [
            spread(logits[name] + GONE, flags) - GONE
            for name, flags in zip(gated, where, strict=True)
        ],
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def prob_active(log_alpha, beta):
    return sigmoid(log_alpha - beta * math.log(0.1 / 1.1))


def error(outputs, split):
    return 100 * (np.argmax(outputs, axis=-1) != split.labels).sum() / len(split.labels)


def digits():
    return data.load("digits", 1 / 12)


@pytest.mark.sweep
@every_run
def test_a_run_leaves_its_record(runs, kind):
    run = runs(kind)
    epochs = list(range(1, run.config.epochs + 1))
    stored = json.loads((run.folder / "config.json").read_text())
    assert stored.items() >= mnist.scientific(run.config).items()
    (line,) = results.read(run.folder)
    assert {"folder": str(run.folder), **line} == run.summary
    assert [row["epoch"] for row in run.rows] == epochs
    assert [row["step"] for row in run.rows] == [run.steps * e for e in epochs]
    for row in run.rows:
        for what in ("expected", "decided", "dense"):
            assert set(row[what]) == {"weights", *costs.CONVENTIONS}
        assert row["steps_per_second"] * row["seconds"] == pytest.approx(run.steps)
        # Of the examples seen in the epoch, a whole number.
        seen = run.steps * run.config.batch_size
        wrong = row["train_error"] * seen / 100
        assert wrong == pytest.approx(round(wrong), abs=1e-3)
        assert 0 < wrong < seen
        assert row["loss"] > 0
    assert sorted(int(f.stem) for f in (run.folder / "activity").iterdir()) == [
        0,
        *epochs,
    ]
    summary = run.summary
    assert summary["seconds"] == pytest.approx(sum(r["seconds"] for r in run.rows))
    assert 0 < summary["seconds_to_first_step"] < summary["wall_seconds"]
    (events,) = (run.folder / "tensorboard").iterdir()
    assert events.stat().st_size > 100
    _, state, at, notes = checkpoint(run)
    assert (at, state.step) == (epochs[-1], run.rows[-1]["step"])
    assert notes == {"best": run.summary["best_on_validation"]}
    alive = {name: flags.sum() for name, flags in left_in(run).items()}
    assert run.rows[0]["trained"] == WIDTHS
    assert run.rows[-1]["trained"] == alive


@pytest.mark.sweep
@every_run
def test_gates_are_those_of_the_averaged_logits(runs, kind):
    config, found = runs(kind).config, left(runs(kind))
    beta = config.beta_end or config.beta
    for log_alpha, active, z in zip(
        found.log_alpha, found.active, found.values, strict=True
    ):
        np.testing.assert_allclose(active, prob_active(log_alpha, beta), atol=1e-5)
        if config.test_rule in ("mean", "samples"):
            expected = gates.HardConcrete(beta).mean(jnp.float32(log_alpha))
        else:
            scale = beta if config.test_rule == "median" else 1
            expected = np.clip(1.2 * sigmoid(log_alpha / scale) - 0.1, 0, 1)
        if config.test_rule == "samples":
            # To 5 sigma, of values whose deviation is at most a half.
            spread = 2.5 / math.sqrt(config.samples)
            np.testing.assert_allclose(z, expected, atol=spread)
            overall = abs(z.mean() - np.mean(expected))
            assert 1e-5 < overall < spread / math.sqrt(len(z))
        else:
            np.testing.assert_allclose(z, expected, atol=1e-5)


@pytest.mark.sweep
@every_run
def test_the_shrunk_network_is_the_gated_one(runs, kind):
    run, dataset = runs(kind), digits()
    small, gated = storage.load(run.folder / "shrunk"), left(run)
    images = jnp.asarray(dataset.test.images, jnp.float32) / 16
    logits, expected = np.asarray(small(images)), gated(dataset.test.images)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    assert run.summary["shrunk"]["max_relative_difference"] <= 1e-5
    # And so are the errors that are reported.
    assert error(logits, dataset.test) == run.summary["last"]["test_error"]
    validation = error(gated(dataset.validation.images), dataset.validation)
    assert run.rows[-1]["validation_error"] == pytest.approx(validation, abs=1e-9)


@pytest.mark.sweep
@every_run
def test_the_shrunk_network_is_as_small_as_is_reported(runs, kind):
    run, found = runs(kind), left(runs(kind))
    in_use = [int((kernel != 0).any(axis=1).sum()) for kernel in found.folded]
    row, shrunk = run.rows[-1], run.summary["shrunk"]
    assert row["architecture"] == dict(zip(WIDTHS, in_use, strict=True))
    dead = [name for name, n in row["architecture"].items() if n == 0]
    assert run.summary["dead"] == dead
    # No array can be empty: of a dead group one unit stays.
    widths = [max(n, 1) for n in in_use]
    assert shrunk["architecture"] == {"features": [64, *widths[1:], 10]} | {
        "reads": widths[0]
    }
    arrays = units.arrays(nnx.state(storage.load(run.folder / "shrunk")))
    shapes = [arrays[path].shape for path in ARRAYS]
    assert shapes == list(zip(widths, [*widths[1:], 10], strict=True))
    counted = sum(math.prod(shape) + shape[1] for shape in shapes)
    assert shrunk["parameters"] == counted
    if run.config.gates == "group" and not dead:
        assert row["weights"] == sum(map(math.prod, shapes))
    if run.config.gates == "weight":
        # Not all that is left: of a unit that nothing reads, its weights go too.
        nonzero = sum(np.count_nonzero(arrays[path]) for path in ARRAYS)
        assert nonzero <= row["weights"]


def test_units_and_weights_are_removed(runs):
    """What the runs above are for."""
    for kind in ("group", "weight"):
        row = runs(kind).rows[-1]
        assert 0 < row["weights"] < 0.6 * DENSE
        removed = [row["architecture"][n] < size for n, size in WIDTHS.items()]
        assert sum(removed) >= 2, "of at least two layers"
    for kind in ("per example", "frozen", "none"):
        assert runs(kind).rows[-1]["architecture"] == WIDTHS
    assert runs("weight").rows[-1]["loss"] < 0.5 * runs("weight").rows[0]["loss"]


def by_hand(units_left, weights_left=None):
    """The costs in each convention, from the sizes of the layers."""
    sizes = [*units_left, 10]
    if weights_left is None:
        weights_left = sum(a * b for a, b in itertools.pairwise(sizes))
    return {
        "weights": weights_left,
        "macs": weights_left,
        "reference_flops": sum(
            2 * a * b for a, b in zip(units_left, OUTPUTS, strict=True)
        ),
        "flops_objective": weights_left + sum(sizes[1:]),
    }


@every_run
def test_costs_are_those_of_the_formulas(runs, kind):
    run, found, row = runs(kind), left(runs(kind)), runs(kind).rows[-1]
    full = list(WIDTHS.values())
    if run.config.gates == "group":
        expected = by_hand([p.sum() for p in found.active])
        decided = by_hand(row["architecture"].values())
        pays = OUTPUTS
        if compacted(run):
            # A unit pays for the weights that are there to read it.
            pays = [*list(row["trained"].values())[1:], 10]
    elif run.config.gates == "none":
        expected = decided = by_hand(full)
        pays = []
    else:
        # Single weights don't change the sizes of layers.
        expected = by_hand(full, sum(p.sum() for p in found.active))
        decided = by_hand(full, sum(np.count_nonzero(a) for a in found.folded))
        pays = [1, 1, 1]
    assert row["expected"] == pytest.approx(expected, rel=1e-4)
    assert row["decided"] == pytest.approx(decided, rel=1e-6)
    assert row["dense"] == by_hand(full)
    assert row["weights"] == decided["weights"]
    assert run.summary["dense_weights"] == DENSE
    l0 = sum(n * p.sum() for n, p in zip(pays, found.active, strict=True))
    assert row["expected_l0"] == pytest.approx(l0, rel=1e-4)
    every = np.concatenate([*found.active, np.zeros(int(not found.active))])
    between = ((every > 0.1) & (every < 0.9)).mean()
    assert row["undecided"] == pytest.approx(between)


def compacted(run):
    return any(row["trained"] != WIDTHS for row in run.rows)


@every_run
def test_runs_are_compacted_where_it_is_worth_it(runs, kind):
    """What is trained gets smaller, and what is reported is in it."""
    run = runs(kind)
    assert compacted(run) == kind.startswith("compacted")
    before = WIDTHS
    for row in run.rows:
        for name, n in row["trained"].items():
            assert row["architecture"][name] <= n <= before[name]
            assert n >= 1
        before = row["trained"]
    macs = [
        sum(by_hand(row["trained"].values())["macs"] for row in [each])
        for each in run.rows
    ]
    for a, b in itertools.pairwise(macs):
        assert b == a or b <= mnist_training.COMPACT_AT * a


@every_run
def test_activity_is_that_of_the_units(runs, kind):
    """At the start by the keep probability, at the end by the gates."""
    run, found = runs(kind), left(runs(kind))
    files = sorted((run.folder / "activity").iterdir())
    first, last = npz(files[0]), npz(files[-1])
    keep_prob = run.config.keep_prob or (0.8, 0.5, 0.5)
    for i, (name, size) in enumerate(WIDTHS.items()):
        if run.config.gates == "none":
            for activity in (first, last):
                np.testing.assert_array_equal(activity[name], np.ones(size))
            continue
        active = found.active[i]
        if run.config.gates == "weight":
            active = active.reshape(size, -1).mean(axis=1)
        np.testing.assert_allclose(last[name], active, atol=1e-3)
        odds = math.log(keep_prob[i] / (1 - keep_prob[i]))
        initial = prob_active(odds, run.config.beta)
        # Logits start with a deviation of 0.01, the slope is at most a quarter.
        np.testing.assert_allclose(first[name], np.full(size, initial), atol=0.0145)


def groups_named(*names):
    return {name: units.Group(name, 1, ()) for name in names}


def test_keep_probabilities_are_the_papers_where_none_is_given():
    mlp, lenet5 = groups_named(*WIDTHS), groups_named("conv1", "conv2", "features")
    of = mnist_training.keep_probabilities
    assert of(SHORT, mlp) == dict(zip(WIDTHS, (0.8, 0.5, 0.5), strict=True))
    assert of(SHORT, lenet5) == dict.fromkeys(lenet5, 0.5)
    given = dataclasses.replace(SHORT, keep_prob=(0.3,))
    assert of(given, mlp) == dict.fromkeys(WIDTHS, 0.3)


def test_the_penalty_of_a_frozen_run_is_the_papers(runs):
    run, found = runs("frozen"), left(runs("frozen"))
    config, steps = run.config, 2 * STEPS
    cooling = config.beta_end / config.beta
    for row in run.rows:
        totals = []
        for t in range(row["step"] - STEPS, row["step"]):
            beta, total = config.beta * cooling ** (t / steps), 0.0
            for c, log_alpha, kernel in zip(
                config.lam, found.log_alpha, found.weights, strict=True
            ):
                squares = config.weight_decay / 2 * (kernel**2).sum(axis=1)
                cost = c / EXAMPLES * kernel.shape[1] + squares
                total += (prob_active(log_alpha, beta) * cost).sum()
            totals.append(total)
        assert row["penalty"] == pytest.approx(np.mean(totals), rel=1e-4)


@every_run
def test_the_best_epoch_is_the_first_of_lowest_validation_error(runs, kind):
    rows, summary = runs(kind).rows, runs(kind).summary
    errors = [row["validation_error"] for row in rows]
    best = rows[int(np.argmin(errors))]
    for row, told in ((best, "best_on_validation"), (rows[-1], "last")):
        assert summary[told].items() <= row.items()
        assert {"test_error", "decided", "expected", "epoch"} <= set(summary[told])
    # The test error is looked at where it may be reported, and nowhere else.
    improved = [e < min(errors[:i], default=math.inf) for i, e in enumerate(errors)]
    improved[-1] = True
    assert ["test_error" in row for row in rows] == improved


def test_a_group_that_loses_all_its_units_is_reported(runs):
    run = runs("dead")
    assert run.summary["dead"] == ["hidden1"]
    assert run.rows[-1]["architecture"]["hidden1"] == 0
    assert "DEAD: group 'hidden1'" in mnist.table(run.summary)
    assert mnist.progress_line(run.rows[-1]).count("DEAD") == 1
    # It has run to the end, and the network it leaves sees nothing.
    assert run.rows[-1]["epoch"] == run.config.epochs
    outputs = storage.load(run.folder / "shrunk")(jnp.eye(64).reshape(64, 8, 8, 1))
    np.testing.assert_array_equal(outputs, np.tile(outputs[0], (64, 1)))
    alive = runs("group")
    assert "DEAD" not in mnist.table(alive.summary)
    assert "DEAD" not in mnist.progress_line(alive.rows[-1])


@every_run
def test_the_table_says_what_the_summary_says(runs, kind):
    summary = runs(kind).summary
    text = mnist.table(summary)
    for title, name in (
        ("last epoch", "last"),
        ("best on valid", "best_on_validation"),
    ):
        (line,) = (line for line in text.splitlines() if line.startswith(title))
        told = summary[name]
        share = 100 * told["weights"] / DENSE
        assert line.split()[-7:] == [
            str(told["epoch"]),
            f"{told['test_error']:.2f}%",
            f"{told['validation_error']:.2f}%",
            f"{told['weights']:,}",
            f"{share:.1f}%",
            f"{told['decided']['macs']:,.0f}",
            "-".join(map(str, told["architecture"].values())),
        ]
    assert repr(summary["test_rule"]) in text
    assert f"{summary['shrunk']['parameters']:,} parameters" in text
    assert f"{summary['shrunk']['max_relative_difference']:.1e}" in text
    assert summary["folder"] in text


class Counter(logging.Handler):
    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        if found := re.match(r"Compiling (\S+)", record.getMessage()):
            self.names.append(found.group(1))


def test_nothing_is_compiled_after_the_first_epoch(tmp_path, monkeypatch):
    counter, after, row = Counter(), [], run_folder.Log.row

    def counted(log, values):
        row(log, values)
        after.append(list(counter.names))

    monkeypatch.setattr(run_folder.Log, "row", counted)
    monkeypatch.setattr(logging.getLogger("jax"), "handlers", [counter])
    with jax.log_compiles():
        run(tmp_path / "run")
    assert "jit(many)" in after[0]
    assert [names[len(after[0]) :] for names in after] == [[]] * SHORT.epochs


# ------------------------------------------------------------------- what is drawn


def test_labels_of_the_test_set_change_nothing_but_test_errors(
    runs, tmp_path, monkeypatch
):
    images, labels = digits().test
    shuffled = data.Split(images, np.random.default_rng(0).permutation(labels))
    other = dataclasses.replace(digits(), test=shuffled)
    monkeypatch.setattr(data, "load", lambda name, validation: other)
    found, expected = run(tmp_path / "run"), runs("group")
    # So the same seed twice is the same run, too.
    same_run(found, expected, CLOCK | {"test_error", "test error"})
    wrong = found.summary["last"]["test_error"]
    assert wrong > expected.summary["last"]["test_error"] + 20


def test_each_seed_has_its_draws_and_each_epoch_its_order(tmp_path, monkeypatch):
    started, orders, keys, sound = [], [], [], train.Training.epoch

    def watched(self, state, examples, order, **how):
        started.append(jax.tree.map(np.array, (state.params, state.gates)))
        orders.append(np.asarray(order))
        keys.append(np.asarray(jax.random.key_data(state.key)).tobytes())
        return sound(self, state, examples, order, **how)

    monkeypatch.setattr(train.Training, "epoch", watched)
    for seed in (0, 1):
        run(tmp_path / str(seed), seed=seed, stop_after=2)
    first, _, other, _ = (units.arrays(theta) for theta in started)
    for path, array in first.items():
        same = np.isclose(array, other[path]).mean()
        assert same == 1 if path.endswith("bias") else same < 0.1
    for order in orders:
        assert order.shape == (STEPS, SHORT.batch_size)
        assert len(np.unique(order)) == order.size
        assert 0 <= order.min() <= order.max() < EXAMPLES
    assert len({order.tobytes() for order in orders}) == 4
    assert keys[0] == keys[1] != keys[2] == keys[3]


# --------------------------------------------------------------- what a step is told


def test_a_step_does_what_the_settings_say():
    changes = {"beta": 0.5, "gamma": -0.2, "zeta": 1.2, "polyak": 0.7}
    changes |= {"per_example": True, "beta_end": 0.25}
    changes |= {"validation": 0.25, "batch_size": 100, "epochs": 3}
    config = dataclasses.replace(SHORT, **changes)
    found = training(config, data.load("digits", 0.25))
    gating = found.gating
    assert gating.gate == gates.HardConcrete(beta=0.5, gamma=-0.2, zeta=1.2)
    assert (found.polyak, gating.per_example) == (0.7, True)
    # 1,437 examples less a quarter are ten steps of a hundred.
    assert float(gating.temperature(30)) == pytest.approx(0.25)
    theta = {"w": jnp.ones(2)}
    for optimizer, rate in (
        (found.optimizer, SHORT.learning_rate),
        (found.gate_optimizer, SHORT.gate_learning_rate),
    ):
        update = jax.jit(optimizer.update)
        state = optimizer.init(theta)
        for _ in range(30):
            updates, state = update(theta, state, theta)
        # Of the last 8 steps, over which rates fall to zero, the last.
        np.testing.assert_allclose(updates["w"], -rate / 8, rtol=1e-4)


def test_units_of_lenet5_pay_what_the_paper_says(monkeypatch):
    """A map for its own filter and bias, a dense unit for the weights that read it."""

    def padded(split):
        edges = ((0, 0), (4, 4), (4, 4), (0, 0))
        return data.Split(np.pad(split.images, edges), split.labels)

    large = {part: padded(getattr(digits(), part)) for part in ("train", "test")}
    large["validation"] = padded(digits().validation)
    dataset = dataclasses.replace(digits(), **large)
    make, made = models.make, []

    def blank(name, architecture, *, rngs):
        # Drawing weights takes seconds, and their values don't matter here.
        model = nnx.eval_shape(lambda: make(name, architecture, rngs=nnx.Rngs(0)))
        graph, shapes = nnx.split(model)
        ones = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes)
        made.append(nnx.merge(graph, ones))
        return made[0]

    monkeypatch.setattr(models, "make", blank)
    lam = (1.0, 10.0, 100.0, 1000.0)
    config = dataclasses.replace(SHORT, model="lenet5", lam=lam, weight_decay=0.0)
    found = training(config, dataset)
    params = nnx.to_pure_dict(nnx.state(made[0], nnx.Param))
    sizes = {name: group.size for name, group in found.gated.items()}
    assert sizes == {"conv1": 20, "conv2": 50, "features": 50, "hidden": 500}
    open_gates = {name: jnp.ones(size) for name, size in sizes.items()}
    pays = (5 * 5 * 1 + 1, 5 * 5 * 20 + 1, 500, 10)
    weights = sum(
        c * size * pay for c, size, pay in zip(lam, sizes.values(), pays, strict=True)
    )
    cost = objectives.penalty(
        found.gated, found.price, 1, charges=found.charges(found.gated)
    )(params, open_gates)
    assert cost == pytest.approx(weights / EXAMPLES, rel=1e-5)


# ------------------------------------------------------------------- stop and go on


def go_on(stopped, folder, **changes):
    """Resumes a copy of the run that was stopped."""
    shutil.copytree(stopped.folder, folder, dirs_exist_ok=True)
    return run(folder, resume=True, **changes)


def truncate(run, epoch):
    """Cuts the arrays of a checkpoint in half; returns what will be named."""
    file = run.folder / "checkpoints" / f"{epoch}.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    return str(file)


def same_files(found, expected):
    epochs = range(expected.config.epochs + 1)
    for name in ("gates.npz", *(f"activity/{e:05d}.npz" for e in epochs)):
        same_arrays(npz(found.folder / name), npz(expected.folder / name))
    for name in ("architecture.json", "arrays.safetensors"):
        ours, theirs = (r.folder / "shrunk" / name for r in (found, expected))
        assert ours.read_bytes() == theirs.read_bytes()
    states = [units.arrays(unkeyed(checkpoint(r)[1])) for r in (found, expected)]
    same_arrays(*states)


def unkeyed(state):
    """With the numbers of its key."""
    return state._replace(key=jax.random.key_data(state.key))._asdict()


def test_a_run_stops_where_it_is_told_to(stopped, runs):
    assert stopped.summary == {"stopped_after": 3, "folder": str(stopped.folder)}
    assert without(CLOCK, stopped.rows) == without(CLOCK, runs("group").rows[:3])
    assert checkpoint(stopped)[2] == 3
    assert not (stopped.folder / results.LINES).exists()


def test_a_resumed_run_is_the_uninterrupted_one(stopped, runs, tmp_path):
    found = go_on(stopped, tmp_path / "run")
    same_run(found, runs("group"))
    same_files(found, runs("group"))
    # The epochs before were not run again.
    assert found.rows[:3] == stopped.rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compacted", "compacted weights"])
def test_a_run_goes_on_after_it_was_compacted(kind, runs, tmp_path):
    """Law 7 across a compaction: bit for bit."""
    whole = runs(kind)
    smaller = [row["epoch"] for row in whole.rows if row["trained"] != WIDTHS]
    # It stops once with a smaller network, and once right after it was made.
    for at in {smaller[0], smaller[0] - 1}:
        folder = tmp_path / str(at)
        part = run(folder, **{**KINDS[kind], "stop_after": at})
        assert part.summary == {"stopped_after": at, "folder": str(folder)}
        flags = left_in(part)
        assert not all(each.all() for each in flags.values())
        found = run(folder, resume=True, **KINDS[kind])
        same_run(found, whole)
        same_files(found, whole)


@pytest.mark.slow
def test_a_run_may_be_told_not_to_compact(runs, tmp_path):
    """Until there is something to take out it is the same run."""
    changes = {**KINDS["compacted"], "compact": False}
    found, other = run(tmp_path / "run", **changes), runs("compacted")
    assert all(row["trained"] == WIDTHS for row in found.rows)
    first = next(i for i, row in enumerate(other.rows) if row["trained"] != WIDTHS)
    assert without(CLOCK, found.rows[:first]) == without(CLOCK, other.rows[:first])


def test_a_truncated_checkpoint_is_passed_over(stopped, runs, tmp_path):
    shutil.copytree(stopped.folder, tmp_path / "run")
    copy = Run(dataclasses.replace(SHORT, out=tmp_path / "run"), {})
    damaged = truncate(copy, 3)
    with pytest.warns(UserWarning, match="is damaged") as said:
        found = run(tmp_path / "run", resume=True)
    (line,) = said
    assert f"checkpoint {damaged} is damaged" in str(line.message)
    same_run(found, runs("group"))
    same_files(found, runs("group"))
    assert found.rows[:2] == stopped.rows[:2]
    assert found.rows[2] != stopped.rows[2]


def test_without_a_whole_checkpoint_a_run_starts_again(stopped, runs, tmp_path):
    shutil.copytree(stopped.folder, tmp_path / "run")
    copy = Run(dataclasses.replace(SHORT, out=tmp_path / "run"), {})
    damaged = [truncate(copy, epoch) for epoch in (3, 2)]
    with pytest.warns(UserWarning, match="is damaged") as lines:
        run(tmp_path / "run", resume=True, stop_after=1)
    said = "".join(str(line.message) for line in lines)
    assert all(f"checkpoint {name} is damaged" in said for name in damaged)
    assert without(CLOCK, copy.rows) == without(CLOCK, runs("group").rows[:1])


@pytest.mark.parametrize("kind", ["group", "frozen"])
def test_to_resume_a_finished_run_changes_nothing(runs, kind, tmp_path):
    before = runs(kind)
    shutil.copytree(before.folder, tmp_path / "run")
    found = run(tmp_path / "run", resume=True, **KINDS[kind])
    same_run(found, before)
    assert found.rows == before.rows
    same_arrays(npz(found.folder / "gates.npz"), npz(before.folder / "gates.npz"))


def test_a_folder_in_use_is_left_alone(stopped):
    files = [file for file in sorted(stopped.folder.rglob("*")) if file.is_file()]
    before = [file.read_bytes() for file in files]
    with pytest.raises(run_folder.RunFolderError, match="go on with --resume"):
        run(stopped.folder)
    for resume in (False, True):
        with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
            run(stopped.folder, seed=1, resume=resume)
    assert [file for file in sorted(stopped.folder.rglob("*")) if file.is_file()] == (
        files
    )
    assert [file.read_bytes() for file in files] == before


def test_a_row_goes_on_where_it_stopped_and_is_recorded(
    stopped, runs, tmp_path, monkeypatch, capsys
):
    row = mnist_rows.Row(SHORT)
    monkeypatch.setattr(mnist_rows, "ROWS", {"tiny": row})
    monkeypatch.setattr(mnist_rows, "RUNS", tmp_path)
    monkeypatch.setattr(mnist_rows, "RESULTS", tmp_path / "results")
    shutil.copytree(stopped.folder, tmp_path / "tiny-seed0")
    mnist_rows.run("tiny", 0)
    (result,) = results.read(mnist_rows.RESULTS)
    expected = runs("group").summary
    for field in ("test_rule", "last", "best_on_validation", "shrunk", "dead"):
        assert result[field] == expected[field]
    assert result["settings"] == mnist.scientific(row.config)
    assert (result["row"], result["seed"]) == ("tiny", 0)
    assert result["made"]["versions"]["jax"] == jax.__version__
    (line,) = results.read(tmp_path / "tiny-seed0")
    assert result == {"row": "tiny", **line}
    told = {"folder": str(tmp_path / "tiny-seed0"), **line}
    assert capsys.readouterr().out == mnist.table(told) + "\n"
    # Of another seed: a run, a folder and a line of its own.
    mnist_rows.run("tiny", 1)
    again, other = results.read(mnist_rows.RESULTS)
    assert again == result
    assert other["settings"]["seed"] == other["seed"] == 1
    assert (tmp_path / "tiny-seed1" / results.LINES).exists()


# -------------------------------------------------------------------- what is wrong

BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dataset": ({"dataset": "emnist"}, ["dataset 'emnist'", *data.DATASETS]),
    "model": ({"model": "vgg"}, ["model 'vgg'", *mnist_settings.NETWORKS]),
    "gate": ({"gate": "soft"}, ["gate 'soft'", *gates.GATES]),
    "rule": (
        {"test_rule": "best"},
        ["test_rule 'best'", "paper", "median", "mean", "samples"],
    ),
    "pair": (
        {"gate": "mixture", "pair": "cauchy"},
        ["pair 'cauchy'", "laplace", "power"],
    ),
    "pair of nothing": (
        {"pair": "power"},
        ["pair is 'power'", "'hard_concrete'", "only a mixture"],
    ),
    "stretch of nothing": (
        {"gate": "stochastic", "gamma": -0.2},
        ["gamma and zeta", "'stochastic' gates aren't stretched"],
    ),
    "scale": (
        {"gate": "mixture", "beta": -1.0},
        ["scale must be > 0", "-1.0"],
    ),
    "estimator": (
        {"gate": "bernoulli", "estimator": "magic"},
        ["estimator 'magic'", "arm", "disarm", "straight_through"],
    ),
    "estimator of nothing": (
        {"estimator": "arm"},
        ["estimator", "HardConcrete", "only Bernoulli gates"],
    ),
    "constraint": (
        {"constraint": "prayer", "target_params": 0.5},
        ["constraint 'prayer'", "lagrangian", "quadratic", "exponential"],
    ),
    "two targets": (
        {"target_params": 0.5, "target_macs": 0.5},
        ["one target", "target_params", "target_macs"],
    ),
    "target of nothing": (
        {"gates": "none", "target_macs": 0.5},
        ["target_macs", "nothing is gated"],
    ),
    # (The ten biases of the outputs, of 50,610 parameters.)
    "target that can't be met": (
        {"target_params": 1e-4},
        ["'params'", "0.0001", "0.0001976", "more than that"],
    ),
    "targets of 2": (
        {"target_density": (0.5, 0.5)},
        ["target_density", "2 values", "one for each of the 3", *WIDTHS],
    ),
    **{
        f"{field} {value}": ({field: value}, ["target", "(0, 1]", str(value)])
        for field in ("target_params", "target_macs", "target_bytes")
        for value in (0.0, 1.5, math.nan)
    },
    "target_density 2.0": (
        {"target_density": (0.5, 2.0, 0.5)},
        ["'hidden1'", "(0, 1]", "2.0"],
    ),
    "range": ({"beta_range": (0.5, 0.2)}, ["beta_range", "0.5", "0.2", "rise"]),
    "range and end": (
        {"beta_range": (0.2, 0.5), "beta_end": 0.2},
        ["beta_end", "beta_range"],
    ),
    "validation": ({"validation": 1.5}, ["validation", "1.5", "below 1"]),
    "small images": ({"model": "lenet5"}, ["LeNet-5", "16 by 16", "(8, 8, 1)"]),
    "large batch": (
        {"batch_size": 1318},
        ["batch_size", "1318", "1317 training examples"],
    ),
    "weight decay": ({"weight_decay": -0.5}, ["weight_decay", "-0.5", ">= 0"]),
    "stop after": ({"stop_after": 0}, ["stop_after", "0", "at least 1"]),
    "rate": ({"learning_rate": -0.1}, ["learning_rate", "-0.1"]),
    "gate rate": ({"gate_learning_rate": -0.1}, ["gate_learning_rate", "-0.1"]),
    **{
        f"lam of {n}": (
            {"lam": (1.0,) * n},
            ["lam", f"{n} values", "one for each of the 3", *WIDTHS],
        )
        for n in (0, 2, 4)
    },
    "keep_prob of 2": (
        {"keep_prob": (0.5, 0.5)},
        ["keep_prob", "2 values", "one for each of the 3", *WIDTHS],
    ),
    "lam of weights": (
        {"gates": "weight", "lam": (1.0, 2.0)},
        ["lam", "2 values", *ARRAYS],
    ),
    **{
        f"lam {value}": ({"lam": (0.1, value, 0.1)}, ["lam", ">= 0", str(value)])
        for value in (-0.5, math.nan)
    },
    **{
        f"keep_prob {value}": ({"keep_prob": (value,)}, ["keep_prob", "(0, 1)", what])
        for value, what in ((0.0, "0.0"), (1.0, "1.0"), (math.nan, "nan"))
    },
    **{
        f"{field} {value}": ({field: value}, [field, limit, str(value)])
        for field, limit, values in (
            ("beta", "> 0", (0.0, -0.5, math.nan)),
            ("beta_end", "> 0", (0.0, -0.5, math.nan)),
            ("gamma", "< 0", (0.0, 0.5, math.nan)),
            ("zeta", "> 1", (1.0, 0.5, math.nan)),
            ("decay_from", "[0, 1]", (-0.1, 1.1, math.nan)),
            ("polyak", "[0, 1)", (-0.1, 1.0, math.nan)),
            ("epochs", "at least 1", (0, -3)),
            ("batch_size", "at least 1", (0, -3)),
            ("samples", "at least 1", (0, -3)),
            ("checkpoint_every", "at least 1", (0, -3)),
            ("multiplier_rate", "> 0", (0.0, math.nan)),
            ("target_warm_up", "[0, 1]", (-0.1, 1.1, math.nan)),
        )
        for value in values
    },
}


@pytest.mark.sweep
@pytest.mark.parametrize("bad", BAD)
def test_bad_settings_are_named_before_anything_is_written(bad, tmp_path):
    changes, words = BAD[bad]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run(tmp_path / "run", **changes)
    said = str(error.value)
    assert "\n" not in said
    for word in words:
        assert word in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"polyak": 0.0, "decay_from": 0.0},
        {"decay_from": 1.0, "lam": (0.0,), "keep_prob": (0.1, 0.5, 0.9)},
    ],
)
def test_settings_at_their_limits_pass(changes):
    config = dataclasses.replace(SHORT, beta=0.5, gamma=-0.2, zeta=1.3, **changes)
    gate = mnist.check(config)
    assert gate == gates.HardConcrete(beta=0.5, gamma=-0.2, zeta=1.3)


def spoiling(epoch, before):
    """`Training.epoch`, but that an epoch's steps meet or leave nothing finite."""
    sound, epochs = train.Training.epoch, itertools.count(1)

    def spoilt(state):
        broken = jax.tree.map(lambda a: a * jnp.inf, (state.params, state.average))
        return state._replace(params=broken[0], average=broken[1])

    def run(self, state, *rest, **how):
        spoil = next(epochs) == epoch
        state = spoilt(state) if spoil and before else state
        state, totals = sound(self, state, *rest, **how)
        return (spoilt(state) if spoil and not before else state), totals

    return run


def finite(run, epoch):
    """Whether all that a checkpoint holds is finite."""
    arrays = load_file(run.folder / "checkpoints" / f"{epoch}.safetensors")
    return all(np.isfinite(a).all() for a in arrays.values())


def test_a_run_that_diverges_keeps_what_was_good(runs, tmp_path, monkeypatch):
    diverged = Run(dataclasses.replace(SHORT, out=tmp_path / "run"), {})
    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "epoch", spoiling(3, before=True))
        with pytest.raises(mnist.Diverged) as error:
            run(tmp_path / "run")
    said = str(error.value)
    good = tmp_path / "run" / "checkpoints" / "2"
    words = (f"at step {2 * STEPS} ", "(epoch 3)", str(good), "learning_rate")
    assert [word for word in words if word not in said] == []
    assert "\n" not in said
    before = diverged.rows
    assert without(CLOCK, before) == without(CLOCK, runs("group").rows[:2])
    assert finite(diverged, 2)
    # With the cause gone, it goes on from there.
    same_run(run(tmp_path / "run", resume=True), runs("group"))
    assert diverged.rows[:2] == before


@pytest.mark.parametrize(("epoch", "good"), [(2, "none yet"), (5, r"4\.safetensors")])
def test_what_the_last_step_of_an_epoch_breaks_is_noticed(
    epoch, good, tmp_path, monkeypatch
):
    """No loss has met it yet, and it must not be called a good checkpoint."""
    diverged = Run(dataclasses.replace(SHORT, out=tmp_path / "run"), {})
    monkeypatch.setattr(train.Training, "epoch", spoiling(epoch, before=False))
    with pytest.raises(mnist.Diverged, match=rf"epoch {epoch}\).*{good};"):
        run(tmp_path / "run")
    steps = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert all(finite(diverged, step) for step in steps)
    assert [row["epoch"] for row in diverged.rows] == list(range(1, epoch))


# -------------------------------------------------------------------- command line


def command(monkeypatch, **changes):
    """Calls the command line with the options that give these settings."""
    given = {**vars(SHORT), **changes}
    words = []
    for field in dataclasses.fields(mnist.Config):
        value, option = given[field.name], field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{option}", *map(str, values)]
    monkeypatch.setattr(sys, "argv", ["mnist", *words])
    mnist.cli()


def test_the_command_line_shows_what_happens(runs, tmp_path, monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        command(monkeypatch, out=tmp_path / "run", progress=True, **KINDS["dead"])
    config = dataclasses.replace(runs("dead").config, out=tmp_path / "run")
    summary = {"folder": str(config.out), **results.read(tmp_path / "run")[-1]}
    same_run(Run(config, summary), runs("dead"))
    table = mnist.table(summary)
    assert "DEAD" in table
    assert out.getvalue().startswith(table + "\n")
    # The pictures come last, each with its place.
    lines = out.getvalue().removeprefix(table + "\n").splitlines()
    pictures = sorted((tmp_path / "run" / "figures").iterdir())
    assert sorted(lines) == [f"picture {file}" for file in pictures]
    assert len(pictures) >= 4
    last = err.getvalue().splitlines()[-1]
    assert mnist.progress_line(Run(config, summary).rows[-1]) in last
    assert f"{2 * STEPS}/{2 * STEPS}" in last


def test_a_run_has_a_folder_of_its_own_by_default(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # To go on in a folder that isn't there is to begin.
    for epoch in (1, 2):
        command(monkeypatch, resume=True, stop_after=epoch)
        said = capsys.readouterr()
        assert said.out == f"stopped after epoch {epoch}; go on with --resume\n"
        assert "it/s" not in said.err
        assert "step/s" not in said.err
    (folder,) = (tmp_path / "runs").iterdir()
    settings = mnist.scientific(SHORT)
    assert folder == tmp_path / run_folder.default("digits-mlp", settings)
    found = Run(dataclasses.replace(SHORT, out=folder), {})
    assert without(CLOCK, found.rows) == without(CLOCK, runs("group").rows[:2])


def no_data(name, validation):
    raise data.DataError(f"{name} is not prepared")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lam": (1.0, 2.0)}, ["lam has 2 values"]),
        ({"learning_rate": 1e30, "epochs": 1}, ["at step 1 (epoch 1)", "none yet"]),
        ({"dataset": "kmnist"}, ["kmnist is not prepared"]),
        ({"out": Path(__file__)}, [__file__]),
    ],
)
def test_an_error_is_one_line(changes, words, tmp_path, monkeypatch):
    if changes.get("dataset"):
        monkeypatch.setattr(data, "load", no_data)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, **{"out": tmp_path / "run", **changes})
    # A message as its code: Python prints it to stderr, and exits with 1.
    said = stop.value.code
    assert isinstance(said, str)
    assert said.startswith("experiments.mnist: ")
    assert "\n" not in said
    assert all(word in said for word in words)


def test_an_error_ends_the_process_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.mnist", "--dataset", "emnist"],
        capture_output=True,
        text=True,
        cwd=Path(mnist.__file__).parents[1],
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("experiments.mnist: unknown dataset 'emnist'")


def explained():
    """The text below each field of `Config` and what it inherits, by name."""
    texts = {}
    for kind in filter(dataclasses.is_dataclass, mnist.Config.__mro__):
        (tree,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[ast.unparse(field.target)] = ast.literal_eval(text.value)
    return texts


def test_help_explains_every_field(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mnist", "--help"])
    with pytest.raises(SystemExit) as stop:
        mnist.cli()
    assert stop.value.code == 0
    # Without the frame, and however it is wrapped.
    squeezed = re.sub(r"[\s│]", "", capsys.readouterr().out)
    texts = explained()
    for field in dataclasses.fields(mnist.Config):
        option = f"--{field.name.replace('_', '-')}"
        text = re.sub(r"\s", "", texts[field.name])
        assert len(text) > 10
        assert re.search(rf"{option}[^-].{{,80}}?{re.escape(text)}", squeezed), option


# --------------------------------------------------------------- a target on seconds


def seconds_left(found):
    """The share of the seconds that is left in expectation, from the run's files."""
    stored = json.loads((found.folder / "latency.json").read_text())
    grid, seconds = stored["sizes"], np.array(stored["seconds"])
    active = npz(found.folder / "gates.npz")
    counts = [active[f"{name}/prob_active"].sum() for name in stored["groups"]]
    # As many as there are at least, for a float32 may be a bit less than one unit.
    inside = np.clip(counts, [g[0] for g in grid], [g[-1] for g in grid])
    left = RegularGridInterpolator(grid, seconds, method="linear")(inside)
    return left.item() / seconds[-1, -1, -1]


LATENCY: dict[str, Any] = {"target_latency": 0.6, "epochs": 2, "target_warm_up": 0.5}


@pytest.mark.slow
def test_seconds_are_measured_once_and_a_resumed_run_has_the_same(
    tmp_path, monkeypatch
):
    part = run(tmp_path / "run", stop_after=1, **LATENCY)
    file = part.folder / "latency.json"
    measured = file.read_text()
    stored = json.loads(measured)
    assert stored["groups"] == ["input", "hidden1", "hidden2"]
    assert stored["sizes"] == [[1, 32, 64], [1, 150, 300], [1, 50, 100]]
    assert stored["device"] == jax.devices()[0].device_kind

    def never(*args, **settings):
        raise AssertionError("it is measured again")

    monkeypatch.setattr(mnist_training, "measure_latency", never)
    found = run(tmp_path / "run", resume=True, **LATENCY)
    assert file.read_text() == measured
    excess = found.rows[-1]["excess"]
    assert set(excess) == set(found.rows[-1]["multipliers"]) == {"latency"}
    assert excess["latency"] == pytest.approx(seconds_left(found) / 0.6 - 1, abs=1e-4)


@pytest.mark.slow
def test_seconds_of_a_network_that_was_compacted_are_those_of_the_whole(tmp_path):
    sizes = {"input": (1, 64), "hidden1": (1, 20, 300), "hidden2": (1, 100)}
    widths = itertools.product(*sizes.values())
    seconds = [1.0 + a * b + b * c for a, b, c in widths]
    table = costs.Table(
        tuple(sizes), tuple(sizes.values()), np.reshape(seconds, (2, 3, 2))
    )
    (tmp_path / "run").mkdir()
    run_folder.keep_latency(tmp_path / "run", table)
    changes = {**LATENCY, **COMPACT, "target_latency": 0.1}
    changes |= {"constraint": "lagrangian", "multiplier_rate": 10.0}
    found = run(tmp_path / "run", **changes)
    assert found.rows[-2]["trained"] != WIDTHS
    excess = found.rows[-1]["excess"]["latency"]
    assert excess == pytest.approx(seconds_left(found) / 0.1 - 1, abs=2e-3)
    assert seconds_left(found) < 0.7


def test_of_lenet_the_groups_that_cost_most_are_measured(monkeypatch):
    config = mnist.Config(model="lenet5")
    widths = mnist_training.architecture("lenet5", (28, 28, 1), 10)
    model = models.make("lenet5", widths, rngs=nnx.Rngs(0))
    asked = {}

    def measure_latency(model, structure, images, sizes):
        asked.update(sizes)
        assert images.shape == (256, 28, 28, 1)
        return costs.Table((), (), np.ones(()))

    monkeypatch.setattr(mnist_training, "measure_latency", measure_latency)
    mnist_training.latency_table(config, model, (28, 28, 1))
    assert asked == {
        "conv1": (1, 10, 20),
        "conv2": (1, 25, 50),
        "hidden": (1, 250, 500),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_macs": 0.5}, "give one target, not target_macs and target_latency"),
        ({"gates": "none"}, "target_latency is given, but nothing is gated"),
    ],
)
def test_targets_that_nothing_can_meet_are_refused(changes, message):
    config = dataclasses.replace(SHORT, target_latency=0.5, **changes)
    with pytest.raises(ValueError, match=message):
        mnist.check(config)


# --------------------------------------------------------------------------- pieces


def test_where_and_how_far_is_no_setting():
    """Two runs that differ in it alone are one, in one folder."""
    settings = mnist.scientific(SHORT)
    changes = {
        "out": Path("elsewhere"),
        "resume": True,
        "stop_after": 2,
        "checkpoint_every": 7,
        "progress": True,
        "dense": "yes",
        "mesh": "data=8",
        "shard": "data",
        "distributed": True,
        "keep_checkpoints": 3,
        "profile": True,
    }
    for name, value in changes.items():
        assert mnist.scientific(dataclasses.replace(SHORT, **{name: value})) == settings
    every = {field.name for field in dataclasses.fields(mnist.Config)}
    # (The dtype is told where it isn't the usual one: runs are older than the flag.)
    assert set(settings) == every - {"compute", *changes}
    # As they are read back from a file.
    assert settings == json.loads(json.dumps(settings))
    assert set(run_folder.settings_of(SHORT)) == every - {"compute"}


@pytest.mark.parametrize("steps", [1, 26, 119, 120, 131, 144, 550, 600])
def test_an_epoch_is_cut_into_equal_parts(steps):
    order = np.arange(3 * steps).reshape(steps, 3)
    pieces = loop.parts(jnp.asarray(order))
    np.testing.assert_array_equal(np.concatenate(pieces), order)
    assert len({len(piece) for piece in pieces}) == 1, "one program fits all"
    divisors = [n for n in range(1, 13) if steps % n == 0]
    assert len(pieces) == (1 if steps < 120 else divisors[-1])


@pytest.mark.parametrize("decay_from", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("gate_rate", [None, 0.3])
def test_rates_are_constant_and_then_fall_to_zero(decay_from, gate_rate):
    steps, start = 20, 20 * decay_from
    config = dataclasses.replace(
        SHORT,
        learning_rate=0.1,
        gate_learning_rate=gate_rate,
        decay_from=decay_from,
    )
    theta = {"w": jnp.ones(2)}
    for optimizer, rate in zip(
        mnist_training.optimizers_of(config, steps),
        (0.1, gate_rate or 0.1),
        strict=True,
    ):
        state = optimizer.init(theta)
        # Under a constant gradient, Adam's steps are its rate.
        for t in range(steps + 3):
            updates, state = optimizer.update(theta, state, theta)
            share = 1.0
            if decay_from < 1 and t > start:
                share = max(steps - t, 0) / (steps - start)
            np.testing.assert_allclose(
                updates["w"], -rate * share, rtol=1e-4, atol=1e-7
            )


def test_by_default_gates_are_those_of_the_paper():
    assert mnist_settings.gate_of(mnist.Config()) == gates.HardConcrete()
    assert mnist_settings.gate_of(SHORT) == gates.HardConcrete()


def test_a_mixture_is_trained_and_prunes(tmp_path):
    config = dataclasses.replace(
        SHORT,
        gate="mixture",
        pair="laplace",
        beta=None,
        lam=(0.05,),
        keep_prob=(0.9,),
        test_rule="round",
        out=tmp_path / "run",
    )
    summary = mnist.main(config)
    assert summary["shrunk"]["max_relative_difference"] < 1e-5
    stored = npz(config.out / "gates.npz")
    shares = []
    for name in WIDTHS:
        active, z = stored[f"{name}/prob_active"], stored[f"{name}/value"]
        assert set(np.unique(z)) <= {0.0, 1.0}
        # P(z != 0) is affine in the mixing weight, and 0.1 is the default scale.
        off, on = 0.5 * math.exp(-1 / 1.2), 1 - 0.5 * math.exp(-11 / 1.2)
        pi = (active - off) / (on - off)
        np.testing.assert_array_equal(z, pi > 0.5)
        shares.append(z.mean())
    assert 0 < min(shares) < 0.9
    assert summary["last"]["test_error"] < 30


TARGETS = {
    "params": {"target_params": 0.3},
    "macs": {"target_macs": 0.3},
    "bytes": {"target_bytes": 0.3},
    "density": {"target_density": (0.3,)},
    "density of layers": {"target_density": (0.6, 0.3, 0.8)},
    "lagrangian": {"target_params": 0.3, "constraint": "lagrangian"},
}


@pytest.mark.parametrize("kind", TARGETS)
def test_a_target_is_met(tmp_path, kind):
    """Across compactions too, after which shares are still those of the whole."""
    its = run(
        tmp_path / "run",
        epochs=40,
        gate_learning_rate=0.02,
        compact_gain=0.0,
        multiplier_rate=0.1,
        **TARGETS[kind],
    )
    last = its.rows[-1]
    assert last["trained"] != WIDTHS, "it compacted"
    targets = its.config.target_density or (0.3,)
    assert len(last["excess"]) == len(last["multipliers"]) == len(targets)
    lowest = -0.3 if its.config.constraint == "lagrangian" else -0.15
    for excess in last["excess"].values():
        assert lowest < excess < 0.05
    # At test time as much stays as fits, by default.
    assert its.summary["test_rule"] == "budget"
    assert last["budget"] == its.summary["budget"]
    for name, budget in last["budget"].items():
        assert budget["expected"] / budget["target"] - 1 == last["excess"][name]
        assert -0.05 < budget["excess"] <= 1e-6
    assert "% of the target)" in mnist.table(its.summary)
    assert "% decided of" in mnist.progress_line(last)
    # Compaction has left room for the target.
    if kind == "density of layers":
        for name, target in zip(("input", "hidden1", "hidden2"), targets, strict=True):
            assert last["trained"][name] >= 1.1 * target * WIDTHS[name]
    if kind in ("params", "macs"):
        dense = DENSE + 410 if kind == "params" else DENSE
        found = last["expected"]["macs"] / dense
        assert found == pytest.approx(0.3 * (1 + last["excess"][kind]), abs=0.01)
    assert its.rows[0]["excess"] != last["excess"]
    assert its.summary["last"]["test_error"] < 40


def test_the_network_without_gates_is_trained_beside(tmp_path):
    """By the same settings, whatever else they say of gates, targets and rules."""
    how: dict[str, Any] = {"target_macs": 0.5, "test_rule": "budget", "epochs": 2}
    its = run(tmp_path / "run", dense="yes", **how)
    bare = run(tmp_path / "bare", gates="none", epochs=2)
    for name in ("test_error", "validation_error"):
        assert its.summary["dense"][name] == bare.summary["last"][name]
    assert "without gates" in mnist.table(its.summary)
    assert "without gates" not in mnist.table(bare.summary)
    assert bare.summary["dense"] is None


def test_what_is_compared_with_may_fail_and_the_result_stays(tmp_path, monkeypatch):
    def fails(*args):
        raise mnist.Diverged("the loss is not finite")

    monkeypatch.setattr(mnist, "dense_network", fails)
    with pytest.raises(mnist.Diverged):
        run(tmp_path / "run", dense="yes", epochs=1)
    (summary,) = results.read(tmp_path / "run")
    assert summary["dense"] is None
    assert summary["last"]["epoch"] == 1


def test_an_exponential_multiplier_grows_while_there_is_too_much_left(tmp_path):
    how: dict[str, Any] = {"target_params": 0.3, "constraint": "exponential"}
    its = run(tmp_path / "run", epochs=4, target_warm_up=0.0, **how)
    strengths = [row["multipliers"]["params"] for row in its.rows]
    assert all(row["excess"]["params"] > 1 for row in its.rows)
    assert 0.01 < strengths[0] < strengths[1] < strengths[3]
    # The exponential of the sum of a running mean, which lags behind an excess of up to
    # 2.3, at a rate of 0.002.
    assert 0.03 < np.log(strengths[3] / strengths[1]) / 2 < 0.12


def test_training_goes_on_with_its_multipliers(tmp_path):
    """Law 7 with a constraint."""
    how: dict[str, Any] = {
        **{"target_params": 0.3, "target_warm_up": 0.0},
        **{"multiplier_rate": 1e-3, "epochs": 4},
    }
    whole = run(tmp_path / "whole", **how)
    run(tmp_path / "half", **how, stop_after=2)
    half = run(tmp_path / "half", **how, resume=True)
    for a, b in zip(whole.rows, half.rows, strict=True):
        assert a["multipliers"] == b["multipliers"]
        assert a["excess"] == b["excess"]
    assert whole.rows[1]["multipliers"]["params"] > 0


@pytest.mark.sweep
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bernoulli_gates_are_trained_by_every_estimator(tmp_path, estimator):
    its = run(
        tmp_path / "run",
        gate="bernoulli",
        estimator=estimator,
        beta=None,
        lam=(0.3,),
        gate_learning_rate=0.02,
        epochs=6,
    )
    assert its.rows[-1]["expected_l0"] < its.rows[0]["expected_l0"]
    assert its.rows[-1]["loss"] < its.rows[0]["loss"]


def test_a_temperature_is_trained_within_its_range(tmp_path):
    its = run(tmp_path / "run", beta_range=(0.3, 0.7), epochs=3)
    held = run(tmp_path / "held", epochs=3)
    assert its.rows[-1]["loss"] != held.rows[-1]["loss"]
    state = checkpoint(its)[1]
    found = float(jnp.exp(state.gates["log_temperature"]))
    assert 0.3 <= found <= 0.7
    assert abs(found - 2 / 3) > 0.01, "it has moved"


def test_temperature_falls_geometrically_from_one_end_to_the_other():
    def of(config):
        return mnist_training.temperature_of(
            config, mnist_settings.gate_of(config), 100
        )

    assert of(SHORT) is None
    schedule = of(dataclasses.replace(SHORT, beta=0.8, beta_end=0.2))
    found = [float(schedule(t)) for t in (0, 25, 50, 100)]
    np.testing.assert_allclose(found, [0.8, 0.8 * 0.25**0.25, 0.4, 0.2], rtol=1e-5)


def test_one_value_serves_all_layers_and_several_their_own():
    groups = groups_named(*WIDTHS)
    assert mnist_training.per_layer("lam", (2.0,), groups) == dict.fromkeys(WIDTHS, 2.0)
    given = mnist_training.per_layer("lam", (1.0, 2.0, 3.0), groups)
    assert given == {"input": 1.0, "hidden1": 2.0, "hidden2": 3.0}


def test_undecided_gates_are_those_between_the_two_ends():
    active = {"a": jnp.float32([0.0, 0.09, 0.11, 0.5]), "b": jnp.float32([0.89, 0.91])}
    assert mnist_evaluation.undecided(active) == pytest.approx(0.5)
    assert mnist_evaluation.undecided({}) == 0


def test_disagreement_is_relative_to_the_larger_outputs():
    a, b = np.float32([[4.0, -8.0]]), np.float32([[4.5, -7.0]])
    assert mnist.disagreement(lambda x: a, lambda x: b, None) == pytest.approx(1 / 8)
    zero = 0 * a
    assert mnist.disagreement(lambda x: zero, lambda x: zero, None) == 0
