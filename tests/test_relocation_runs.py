"""Soft relocation on 8x8 digits, from the command to the pictures."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import (
    relocation,
    relocation_course,
    relocation_report,
    relocation_work,
)
from experiments.harness import results
from experiments.relocation_settings import HEURISTICS, NETWORKS, Config, Network
from experiments.relocation_training import ARMS
from l0jax import agnosticism, methods, models

TINY = Config(
    dataset="digits",
    heuristics=("random", "filter_l1", "inverted_filter_l1"),
    ratios=(0.75,),
    budgets=(8,),
    seeds=(0, 1),
    base_epochs=2,
    batch_size=64,
    chosen_by=128,
    progress=False,
)


@pytest.fixture(autouse=True, scope="module")
def small_network():
    with pytest.MonkeyPatch.context() as patch:
        tiny = Network("mlp", {"features": (64, 24, 12, 10)}, "digits")
        patch.setitem(NETWORKS, "mlp", tiny)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relocation") / "run"
    run(folder, arms=tuple(ARMS))
    return folder


def run(folder, known=HEURISTICS, **changes):
    config = dataclasses.replace(TINY, out=folder, **changes)
    return relocation.main(config, known)


def test_every_arm_ends_in_the_same_small_network(folder):
    lines = results.read(folder)
    runs = list(itertools.product(ARMS, TINY.heuristics, (0, 1)))
    assert [(r["arm"], r["heuristic"], r["seed"]) for r in lines] == runs
    # 64-6-3-10: three quarters of the units are gone.
    small = 64 * 6 + 6 + 6 * 3 + 3 + 3 * 10 + 10
    assert {line["params"] for line in lines} == {small}
    for line in lines:
        errors = {n: v for n, v in line["metrics"].items() if n.endswith("error")}
        assert len(errors) == 4
        assert all(0 <= error <= 100 for error in errors.values())


def test_closed_units_are_removed_without_a_change(folder):
    """Where units were closed before, the loss after the removal is that before; where
    they go at once, the base network was the one before."""
    for line in results.read(folder):
        before, after = (
            line["metrics"][f"{when} validation loss"]
            for when in ("prepared", "removed")
        )
        if ARMS[line["arm"]].closing.share:
            assert after == pytest.approx(before, rel=1e-4)
        else:
            assert after != pytest.approx(before, rel=1e-2)


def test_arms_share_base_networks_and_the_order_of_the_data(folder):
    lines = results.read(folder)
    for seed in (0, 1):
        its = [line["metrics"] for line in lines if line["seed"] == seed]
        assert len({metrics["base test error"] for metrics in its}) == 1
    # The closing itself is all that differs between these.
    found = {
        line["arm"]: line["metrics"]["validation loss"]
        for line in lines
        if (line["heuristic"], line["seed"]) == ("filter_l1", 0)
    }
    assert len(set(found.values())) == len(found)


def test_what_is_there_is_not_run_again(folder, monkeypatch):
    before = (folder / results.LINES).read_text()
    monkeypatch.setattr(relocation_work.Work, "run", None)
    assert run(folder, arms=("soft", "one_shot"))["results"]
    assert (folder / results.LINES).read_text() == before


def test_a_killed_run_goes_on(folder, tmp_path, monkeypatch):
    """Members of the program that was killed are run again, to the same results."""
    done, real = [], relocation_work.Work.run

    def dies(self, case, runs, bar):
        if done:
            raise KeyboardInterrupt
        done.append(case)
        return real(self, case, runs, bar)

    arms = ("one_shot", "soft")
    with monkeypatch.context() as patch:
        patch.setattr(relocation_work.Work, "run", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, arms=arms, together=4)
    assert len(results.read(tmp_path)) == 4
    found = run(tmp_path, arms=arms, together=4)["results"]
    whole = results.read(folder)
    expected = {
        (r["arm"], r["heuristic"], r["seed"]): r for r in whole if r["arm"] in arms
    }
    assert len(found) == len(expected)
    for line in found:
        other = expected[line["arm"], line["heuristic"], line["seed"]]
        # Other members are together in a program: sums of another order.
        for name in ("validation loss", "removed validation loss"):
            whole = other["metrics"][name]
            assert line["metrics"][name] == pytest.approx(whole, rel=2e-3)
        right, wanted = (100 - each["metrics"]["test error"] for each in (line, other))
        assert right == pytest.approx(wanted, rel=2e-3)


def test_a_heuristic_of_one_s_own(tmp_path):
    """A function of a task and a key is one of the heuristics."""

    def first(task, key):
        return {n: -np.arange(g.size) for n, g in task.structure.groups.items()}

    found = run(
        tmp_path,
        {**HEURISTICS, "first": first},
        heuristics=("first", "random"),
        arms=("one_shot", "soft"),
        seeds=(0,),
    )
    names = [line["heuristic"] for line in found["results"]]
    assert names == ["first", "random"] * 2


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (lambda g: {n: np.ones(3) for n in g}, r"'mine' gives group .* shape \(3,\)"),
        (lambda g: {n: np.full(g[n].size, np.nan) for n in g}, "'mine'.* is nan"),
        (lambda g: {}, "'mine' gives no scores for group .* none"),
    ],
)
def test_bad_scores_name_the_heuristic(tmp_path, folder, scores, words):
    def mine(task, key):
        return scores(task.structure.groups)

    with pytest.raises(ValueError, match=words):
        run(folder, {"mine": mine}, heuristics=("mine",), arms=("one_shot",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "perceptron"}, "unknown model 'perceptron'; there is mlp"),
        ({"arms": ("hard",)}, "unknown arm 'hard'; there is one_shot"),
        ({"heuristics": ("luck",)}, "unknown heuristic 'luck'; there is random"),
        ({"ratios": (1.0,)}, r"in \[0, 1\), got 1.0"),
        ({"budgets": (0,)}, "a budget must be at least one step, got 0"),
        ({"budgets": (1,), "arms": ("soft",)}, None),
        ({"seeds": ()}, "seeds must not be empty"),
        ({"batch_size": 5000}, "don't fill a batch of 5000"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, words):
    if words is None:
        # Half of one step rounds to none.
        words = "0.5 of 1 steps is less than one step"
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_only_units_that_one_layer_makes_are_removed():
    """Streams of residual networks and inputs stay; of I3D all units may go."""

    def groups(name, **sizes):
        kind, architecture, _ = NETWORKS[name]
        model = models.make(kind, {**architecture, **sizes}, rngs=nnx.Rngs(0))
        return set(relocation_work.removable(model).groups)

    assert groups("resnet8") == {f"blocks.{i}.conv1" for i in range(3)}
    assert groups("mlp") == {"hidden1", "hidden2"}
    assert groups("lenet5") == {"conv1", "conv2", "hidden"}


# --------------------------------------------------------------------------- report


def test_the_report_says_what_the_csv_says(folder):
    text = (folder / "table.md").read_text()
    rows = results.read(folder)
    there = relocation_report.cells(rows)
    usual = ["random", "filter_l1"]
    for arm in ARMS:
        cell = there[0.75, 8, arm]
        assert cell.usual() == usual
        table = np.array(
            [
                [
                    100 - r["metrics"]["test error"]
                    for r in rows
                    if (r["arm"], r["heuristic"]) == (arm, h)
                ]
                for h in usual
            ]
        )
        np.testing.assert_array_equal(cell.table(usual), table)
        name = re.escape(relocation_report.NAMES[arm])
        (line,) = re.findall(rf"^\| 0.75 \| 8 \| {name} \|.*$", text, re.M)
        assert f"{table.mean():.2f}" in line
        assert f"{agnosticism.heuristic_variance(table):.3g}" in line
    assert set(relocation_report.NAMES) == set(ARMS)
    for name in ("spread", "variance"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 10_000
    # Each spread with its interval.
    figure = relocation_report.variance(rows)
    for container in figure.axes[0].containers:
        ends = [segment[:, 1] for segment in container[2][0].get_segments()]
        marks = container[0].get_ydata()
        assert all(low <= y <= high for (low, high), y in zip(ends, marks, strict=True))
    assert figure.axes[0].containers


def test_of_a_folder_without_runs_nothing_is_written(tmp_path):
    assert not relocation_report.write(tmp_path)
    assert not [*tmp_path.iterdir()]


# ----------------------------------------------------------------- while units close


@pytest.fixture(scope="module")
def course(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relocation_course, "SHARES", (0.0, 0.75, 1.0))
        patch.setattr(relocation_course, "PERCENT", np.array([0, 75, 100]))
        patch.setattr(relocation_course, "BUDGET", 16)
        written = relocation_course.write(folder)
    return results.read(written[0].parent), written[1:]


def test_the_bound_holds_and_vanishes_with_the_closing(course):
    lines, _ = course
    assert len(lines) == 2 * 3 * len(HEURISTICS)
    for line in lines:
        losses = line["metrics"]
        change = abs(losses["after"] - losses["before"])
        logits, bound = losses["logits"], losses["bound"]
        assert change <= logits + 1e-6
        assert logits <= bound * (1 + 1e-5)
        if line["share"] == 1:
            assert bound == pytest.approx(0, abs=1e-6)
        else:
            assert logits > 0.1


def test_the_bound_is_what_the_logits_move_where_only_the_last_layer_loses_units():
    model = models.MLP((6, 8, 5, 3), rngs=nnx.Rngs(0))
    structure = models.structure(model).only("hidden1", "hidden2")
    x = jax.random.normal(jax.random.key(0), (16, 6))
    task = methods.task(model, structure, x, jnp.arange(16) % 3, 8)
    fit = methods.LeastSquares(task)
    keep = {"hidden1": np.ones(8, bool), "hidden2": np.arange(5) < 2}
    found = relocation_course.bounded(fit, task, task.params, keep)
    assert found["bound"] == pytest.approx(found["logits"], rel=1e-5)
    assert found["logits"] > 0.1
    both = {**keep, "hidden1": np.arange(8) % 2 == 0}
    assert (
        relocation_course.bounded(fit, task, task.params, both)["bound"]
        > (found["bound"])
    )


def test_the_course_has_its_pictures(course):
    lines, pictures = course
    assert [file.stem for file in pictures] == ["bound", "entropy", "kendall"]
    for file in pictures:
        assert file.stat().st_size > 10_000
    for line in lines:
        entropies = [v for n, v in line.items() if n.split()[0] in ("kept", "doomed")]
        assert len(entropies) == 4
        assert all(0 <= v <= 1 for v in entropies)


def test_a_course_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json.*relocation --out"):
        relocation_course.measure(tmp_path)


def test_the_course_of_another_network_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "lenet5"}')
    with pytest.raises(ValueError, match=r"is a run of 'lenet5'; .* of an MLP"):
        relocation_course.measure(tmp_path)
