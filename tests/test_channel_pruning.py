"""The comparison of channel pruning, on 8x8 digits and a tiny network."""

import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from killing import killed_when, saves

from experiments import channel_pruning, channel_run
from experiments.channel_pruning import METHODS, Config
from experiments.harness.loop import Diverged
from experiments.tasks import data
from experiments.tasks.images import Recipe
from l0jax import costs, models, storage, train

RECIPE = Recipe(epochs=1, batch_size=64)
CONFIG = Config(
    dataset="digits",
    model="tiny",
    losses=1,
    epsilon=0.2,
    examples=256,
    chosen_by=128,
    base=RECIPE,
    heads=dataclasses.replace(RECIPE, learning_rate=0.01),
    gate=dataclasses.replace(RECIPE, learning_rate=0.01),
    tune=dataclasses.replace(RECIPE, learning_rate=0.01),
    progress=False,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    network = ("vgg", {"stages": ((4,), (6, 6))})
    monkeypatch.setitem(models.PRESETS, "tiny", network)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all methods: they share the base network."""
    return tmp_path_factory.mktemp("channel_pruning") / "run"


def run(folder, **changes):
    return channel_pruning.main(dataclasses.replace(CONFIG, out=folder, **changes))


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_in_a_smaller_network(folder, method):
    found = run(folder, method=(method,))
    (line,) = [r for r in found["results"] if r["method"] == method]
    # The last layer's channels are read by the classifier, and stay.
    assert line["sizes"] == {"convs.0": 4, "convs.1": 6}
    if not method.startswith("l0_") and method not in ("slimming", "dcp_adapt"):
        assert line["kept"] == {"convs.0": 2, "convs.1": 3}
    for what in ("params", "macs"):
        before, after = line[what]
        assert after < before
    small = storage.load(folder / f"{method}-0")
    widths = [width for stage in small.architecture["stages"] for width in stage]
    assert widths == [*line["kept"].values(), 6]
    assert set(line["metrics"]) == {
        f"{when}{part} error"
        for when in ("base ", "pruned ", "")
        for part in ("validation", "test")
    }
    assert all(0 <= error <= 100 for error in line["metrics"].values())


@pytest.mark.slow
def test_gates_fill_the_budget_that_others_have(folder):
    """They leave the most that fits into what a uniformly pruned network costs."""
    names = ("filter_l1", "l0_hard_concrete", "l0_mixture", "l0_bernoulli")
    lines = {r["method"]: r for r in run(folder, method=names)["results"]}
    model = channel_run.network(
        CONFIG.model, CONFIG.width, data.load("digits", 0.1), jax.random.key(0)
    )
    structure = channel_run.prunable(model)
    for name in names:
        line = lines[name]
        assert line["budget"] == lines["filter_l1"]["left"]
        assert line["left"] <= line["budget"]
        if not name.startswith("l0_"):
            continue
        # One channel more of any layer would be too much.
        for group, kept in line["kept"].items():
            more = {**line["kept"], group: kept + 1}
            if kept == line["sizes"][group]:
                continue
            flags = {
                n: np.arange(line["sizes"][n]) < count for n, count in more.items()
            }
            share = costs.exact(structure, flags) / costs.exact(structure)
            assert share > line["budget"]


@pytest.mark.slow
def test_a_layer_may_close_wholly(tmp_path, monkeypatch):
    """What is left does not depend on the images; it is trained and stored."""
    decide = train.Training.decide

    def none_of_the_first(self, state, rule=None):
        decision = decide(self, state, rule)
        z = {**decision.z, "convs.0": np.zeros(4, np.float32)}
        return dataclasses.replace(decision, z=z)

    monkeypatch.setattr(train.Training, "decide", none_of_the_first)
    how = {"method": ("l0_hard_concrete",), "after": 1}
    (line,) = run(tmp_path / "run", **how)["results"]
    assert line["kept"]["convs.0"] == 0
    small = storage.load(tmp_path / "run" / "l0_hard_concrete-0")
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    first, second = np.asarray(small(images))
    np.testing.assert_allclose(first, second, rtol=1e-6)


@pytest.mark.slow
def test_all_methods_train_equally_long(tmp_path):
    """With `after`, what a method trains to choose counts."""
    tune = dataclasses.replace(CONFIG.tune, epochs=7)
    names = ("filter_l1", "dcp", "l0_hard_concrete", "soft_relocation")
    names += ("width_multiplier",)
    found = run(tmp_path / "run", method=names, after=3, tune=tune)["results"]
    epochs = {r["method"]: r["epochs"] for r in found}
    assert epochs == {
        "filter_l1": {"choosing": 0, "tuning": 3},
        # Two stages, each after an epoch of its classifier.
        "dcp": {"choosing": 2, "tuning": 1},
        "l0_hard_concrete": {"choosing": 1, "tuning": 2},
        "soft_relocation": {"choosing": 1, "tuning": 2},
        # From new weights: as long as the base network and what followed.
        "width_multiplier": {"choosing": 0, "tuning": 1 + 3},
    }


@pytest.mark.slow
@pytest.mark.parametrize("cost", ["macs", "params"])
def test_a_budget_may_be_a_share_of_a_cost(tmp_path, cost):
    names = ("filter_l1", "slimming", "l0_hard_concrete")
    how = {"left": 0.6, "cost": cost, "method": names}
    for line in run(tmp_path / "run", **how)["results"]:
        assert line["left"] <= 0.6
        assert line["budget"] <= 0.6
        # The network as it is counted outside.
        if cost == "macs":
            before, after = line["macs"]
            assert after / before == pytest.approx(line["left"], rel=1e-6)


def own_network(shape, classes, rngs):
    return OwnNetwork(shape, classes, rngs)


class OwnNetwork(nnx.Module):
    def __init__(self, shape, classes, rngs):
        self.first = nnx.Conv(shape[-1], 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.second = nnx.Conv(6, 8, (3, 3), rngs=rngs)
        self.out = nnx.Linear(8, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        return self.out(nnx.relu(self.second(x)).mean((1, 2)))


def own_data(validation):
    return data.load("digits", validation)


def test_a_network_and_a_data_set_of_one_s_own(tmp_path, monkeypatch):
    """My model, my data, all of these methods: one command."""
    names = ("random", "taylor", "l0_hard_concrete", "soft_least_squares")
    names += ("width_multiplier",)
    how = {
        "model": f"{__name__}:own_network",
        "dataset": f"{__name__}:own_data",
        "method": names,
    }
    found = run(tmp_path / "run", **how)["results"]
    assert [line["method"] for line in found] == list(names)
    for line in found:
        assert line["sizes"] == {"first": 6}
        assert line["macs"][1] < line["macs"][0]
    with pytest.raises(ValueError, match=r"'os:nothing' is to be a function of a mod"):
        run(tmp_path / "none", **{**how, "model": "os:nothing"})
    with pytest.raises(ValueError, match="no preset whose channels could be mult"):
        run(tmp_path / "none", **how, width=0.5)


def test_what_leaves_no_epoch_for_tuning_is_refused(tmp_path):
    for how in (
        {"method": ("l0_hard_concrete",), "after": 0},
        {"method": ("filter_l1",), "left": 0.01},
        {"method": ("filter_l1",), "examples": 10},
    ):
        with pytest.raises(ValueError, match=r"more than the 0|of the macs|don't fill"):
            run(tmp_path / "run", **how)
        assert not (tmp_path / "run").exists()


def base_errors(line):
    return [line["metrics"][f"base {part} error"] for part in ("validation", "test")]


def test_methods_share_their_base_network(folder):
    found = run(folder, method=("filter_l1", "thinet"))
    lines = {r["method"]: r for r in found["results"]}
    assert base_errors(lines["filter_l1"]) == base_errors(lines["thinet"])


def test_what_is_done_is_not_done_again(folder, monkeypatch):
    before = run(folder, method=("filter_l1",))["results"]

    def never(*args):
        raise AssertionError("it is run again")

    monkeypatch.setattr(channel_pruning, "Run", never)
    assert run(folder, method=("filter_l1",))["results"] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kills"), [("dcp", (1, 4)), ("dcp_adapt", (1,)), ("random_dcp", (2,))]
)
def test_a_choice_that_was_killed_goes_on(tmp_path, method, kills):
    """Killed within each stage; the same channels are kept."""
    whole = run(tmp_path / "whole", method=(method,))["results"][0]
    for killed_at in kills:
        folder, choice = tmp_path / f"killed-{killed_at}", itertools.count(1)

        def condition(name, _, choice=choice, killed_at=killed_at):
            return "choice" in name and next(choice) == killed_at

        with killed_when(condition):
            run(folder, method=(method,))
        again = run(folder, method=(method,))["results"][0]
        for name in ("kept", "metrics"):
            assert again[name] == whole[name]
        # What the first process had spent is not known to the second.
        assert whole["seconds"] > 0
        assert again["seconds"] is None
        one, other = (
            storage.load(f / f"{method}-0") for f in (folder, tmp_path / "whole")
        )
        np.testing.assert_array_equal(one.convs[1].kernel, other.convs[1].kernel)


def test_training_goes_on_after_an_epoch(tmp_path):
    longer = dataclasses.replace(RECIPE, epochs=3)
    whole = run(tmp_path / "whole", method=("filter_l1",), base=longer)["results"][0]
    with killed_when(lambda _, step: step == 2):
        run(tmp_path / "killed", method=("filter_l1",), base=longer)
    with saves() as seen:
        found = run(tmp_path / "killed", method=("filter_l1",), base=longer)
    assert seen == [("base-0", 3), ("filter_l1-tune-0", 1)]
    (again,) = found["results"]
    for name in ("kept", "metrics"):
        assert again[name] == whole[name]


def test_slimming_keeps_as_many_multiply_adds_as_others(folder):
    found = run(folder, method=("filter_l1", "slimming"))["results"]
    lines = {r["method"]: r for r in found}
    assert lines["slimming"]["macs"][1] <= lines["filter_l1"]["macs"][1]


def test_seeds_have_base_networks_of_their_own(folder):
    found = run(folder, method=("random",), seeds=(0, 1))["results"]
    lines = {r["seed"]: r for r in found if r["method"] == "random"}
    assert base_errors(lines[0]) != base_errors(lines[1])


def test_another_configuration_is_refused(folder):
    run(folder, method=("random",))
    with pytest.raises(ValueError, match=r"ratio is 0\.5 there and 0\.3 here"):
        run(folder, method=("random",), ratio=0.3)


@pytest.mark.slow
def test_the_authors_way_is_an_option(tmp_path):
    line = run(tmp_path / "run", method=("dcp",), auxiliary="once")["results"][0]
    assert line["kept"] == {"convs.0": 2, "convs.1": 3}
    heads = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert "dcp-heads-0" in heads
    assert not any(re.match(r"dcp-heads-\d-0", name) for name in heads)


BAD = {
    "method": ({"method": ("magic",)}, ["unknown method 'magic'", "dcp", "thinet"]),
    "no method": ({"method": ()}, ["at least one method"]),
    "model": ({"model": "alexnet"}, ["unknown model 'alexnet'", "resnet56"]),
    "ratio": ({"ratio": 1.0}, ["[0, 1)", "1.0"]),
    "epsilon": ({"epsilon": 0.0}, ["epsilon must be above 0", "0.0"]),
    "width": ({"width": 0.0}, ["width must be above 0"]),
    "weights of losses": (
        {"discrimination": 0.0, "reconstruction": 0.0},
        ["nothing to choose by"],
    ),
    "epochs": ({"base": Recipe(epochs=0)}, ["base.epochs must be at least 1"]),
    "cycle": ({"base": Recipe(cycle=1.0)}, ["base.cycle must lie in [0, 1), got 1"]),
    "labels": ({"tune": Recipe(smoothing=1.0)}, ["tune.smoothing must lie in [0, 1)"]),
    "no tuning": ({"tune": Recipe(epochs=-1)}, ["tune.epochs must be at least 0"]),
    "losses": ({"losses": 5}, ["5 additional losses"]),
    "examples": ({"examples": 10}, ["10 training images don't fill a batch of 64"]),
}


@pytest.mark.sweep
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_run_is_named(tmp_path, case):
    changes, words = BAD[case]
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        run(tmp_path / "run", **changes)
    assert all(word in str(error.value) for word in words)


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    wild = dataclasses.replace(RECIPE, learning_rate=1e30)
    with pytest.raises(Diverged, match="base seed 0: the loss is not finite at step 2"):
        run(tmp_path / "run", base=wild)


def test_widths_are_scaled():
    config = dataclasses.replace(CONFIG, model="resnet20", width=0.25)
    shape = (8, 8, 1)
    images = np.zeros((2, *shape), np.uint8)
    split = channel_pruning.data.Split(images, np.zeros(2, np.int32))
    of = channel_pruning.data.Dataset("x", split, split, split, 7, 255.0)
    found = channel_run.network(
        config.model, config.width, of, jax.random.key(0)
    ).architecture
    assert found["stem"] == 4
    assert list(found["stages"]) == [4, 8, 16]
    assert found["classes"] == 7
    assert tuple(found["shape"]) == shape


def test_results_are_lines_of_json(folder):
    run(folder, method=("random",))
    for line in (folder / "runs.jsonl").read_text().splitlines():
        assert json.loads(line)["ratio"] == 0.5


def test_base_networks_come_from_another_run(folder, tmp_path):
    """The same network is pruned, before any tuning."""
    there = run(folder, method=("filter_l1",))["results"]
    (first,) = [r for r in there if r["method"] == "filter_l1"]
    untuned = dataclasses.replace(CONFIG.tune, epochs=0)
    again = run(tmp_path / "run", method=("filter_l1",), base_from=folder, tune=untuned)
    (line,) = again["results"]
    assert base_errors(line) == base_errors(first)
    errors, pruned = line["metrics"], first["metrics"]["pruned test error"]
    assert errors["test error"] == errors["pruned test error"] == pruned
    assert not (tmp_path / "run" / "checkpoints" / "base-0").exists()


OTHERS = {
    "widths": ({"width": 2.0}, ["width = 1.0", "this run has 2.0"]),
    "a model": ({"model": "resnet20"}, ["model = tiny", "this run has resnet20"]),
    "training": ({"base": Recipe(epochs=2, batch_size=64)}, ["base = ", "'epochs': 2"]),
    # (Of which nothing was recorded: it is the one of old.)
    "a dtype": (
        {"compute": "bfloat16"},
        ["compute = float32", "this run has bfloat16"],
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_base_networks_of_other_settings_are_refused(folder, tmp_path, case):
    changes, words = OTHERS[case]
    run(folder, method=("filter_l1",))
    with pytest.raises(ValueError, match="base networks of") as error:
        run(tmp_path / "run", method=("filter_l1",), base_from=folder, **changes)
    assert all(word in str(error.value) for word in words), error.value


def test_another_network_in_the_place_of_a_base_network_is_refused(tmp_path):
    def of(kind, stages):
        shape = {"shape": (8, 8, 1)}
        return models.make(kind, {**stages, **shape}, rngs=nnx.Rngs(0))

    wide, narrow = (of("vgg", {"stages": ((w,), (6,))}) for w in (8, 4))
    storage.save(wide, tmp_path / "base-0")
    with pytest.raises(
        ValueError, match=r"base-0 .* stages = \[\[8\], \[6\]\].* \[\[4\], \[6\]\]"
    ):
        channel_run.stored(tmp_path / "base-0", narrow)
    other = of("pre_activation_resnet", {})
    with pytest.raises(ValueError, match="holds a VGG, not a pre_activation_resnet"):
        channel_run.stored(tmp_path / "base-0", other)


def test_a_base_network_of_other_classes_is_refused(folder, tmp_path, monkeypatch):
    run(folder, method=("filter_l1",))
    load = channel_pruning.data.load
    monkeypatch.setattr(
        channel_pruning.data,
        "load",
        lambda *args: dataclasses.replace(load(*args), classes=12),
    )
    with pytest.raises(ValueError, match=r"classes = 10; .* ask for 12"):
        run(tmp_path / "run", method=("filter_l1",), base_from=folder)


def test_a_base_network_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.config.json is missing"):
        run(tmp_path / "run", method=("filter_l1",), base_from=tmp_path / "nowhere")


def test_a_base_network_that_is_refused_leaves_no_folder(folder, tmp_path):
    """So that the right one may be given to the same folder."""
    run(folder, method=("filter_l1",))
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "run", method=("filter_l1",), base_from=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()
