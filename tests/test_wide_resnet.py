"""Gates on a wide residual network, on 8x8 digits and the smallest of its kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from killing import killed_when, saves

from experiments import channel_run, wide_resnet
from experiments.harness import results
from experiments.reports import gate_shares
from experiments.tasks.images import Recipe
from experiments.wide_resnet import Config, made_by
from l0jax import costs, models, storage, train, units
from l0jax.models import PreActivationResNet

CONFIG = Config(
    dataset="digits",
    examples=512,
    multiplier_rate=0.02,
    recipe=Recipe(epochs=4, batch_size=32, weight_decay=5e-4, drops=(0.7,)),
    progress=False,
)
ARCHITECTURE = {"stem": 3, "stages": (4,), "inner": ((8,),), "project": (True,)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(
        wide_resnet.pre_activation,
        "wide",
        lambda depth, factor: dict(ARCHITECTURE),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("wide_resnet")


def run(folder, variant, **changes):
    config = dataclasses.replace(CONFIG, variant=(variant,), out=folder, **changes)
    (result,) = wide_resnet.main(config)
    return result


@pytest.mark.parametrize("variant", wide_resnet.VARIANTS)
def test_every_variant_trains_and_is_removed(folder, variant, monkeypatch):
    """Removal changes nothing, but where batch normalisation fills closed maps."""
    decide = train.Training.decide

    def some_closed(training, state, rule):
        """Whatever was learned, so that there is something to remove."""
        decision = decide(training, state, rule)
        z = {name: np.array(values) for name, values in decision.z.items()}
        for values in z.values():
            values[:4] = (0.0, 0.0, 0.0, 1.0)
        return dataclasses.replace(decision, z=z)

    monkeypatch.setattr(train.Training, "decide", some_closed)
    result = run(folder / "closed", variant)
    assert len(result["shares"]) == CONFIG.recipe.epochs + 1
    assert result["costs"]["macs expected"] == result["shares"][-1]
    assert 0 < result["costs"]["macs"] < 1
    assert max(result["widths"].values()) <= 5
    for part in ("validation", "test"):
        removed = result["metrics"][f"removed {part} error"]
        if variant != "fixed, gates on maps":
            assert removed == result["metrics"][f"{part} error"]


def test_a_price_at_the_rate_of_the_weights_closes_no_gates(folder):
    """Where a target does, within the same epochs."""
    slow, fast = run(folder, "λ, the weights' rate"), run(folder, "fixed")
    assert slow["shares"][-1] > 0.95 * slow["shares"][0]
    assert fast["shares"][-1] < 0.8 * fast["shares"][0]


def test_what_was_removed_is_what_was_counted(folder):
    """The network that is stored has the widths and the multiply-accumulates."""
    result = run(folder / "closed", "fixed")
    (where,) = (
        file.parent
        for file in (folder / "closed").glob("*/runs.jsonl")
        if results.read(file.parent) == [result]
    )
    small = storage.load(where / "shrunk")
    assert [w for each in small.architecture["inner"] for w in each] == list(
        result["widths"].values()
    )
    shape = {"classes": 10, "shape": (8, 8, 1)}
    large = PreActivationResNet(**ARCHITECTURE, **shape, rngs=nnx.Rngs(0))
    macs = [costs.exact(models.structure(model)) for model in (small, large)]
    assert result["costs"]["macs"] == macs[0] / macs[1]


def test_a_killed_run_goes_on(folder, tmp_path):
    whole = run(folder, "fixed")
    with killed_when(lambda _, step: step == 2):
        run(tmp_path, "fixed")
    with saves() as seen:
        again = run(tmp_path, "fixed")
    assert [step for _, step in seen] == [3, 4]
    for name in ("shares", "metrics", "widths"):
        assert again[name] == whole[name]


def test_closed_maps_are_not_read_by_the_masked_network():
    model = PreActivationResNet(
        **ARCHITECTURE,
        classes=3,
        shape=(6, 6, 2),
        rngs=nnx.Rngs(0),
    )
    reads = channel_run.prunable(model).groups
    groups = made_by(reads)
    z = {name: jnp.ones(group.size).at[1].set(0.0) for name, group in groups.items()}
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    closed = units.apply_gates(params, z, groups)
    found = units.arrays(wide_resnet.masked(closed, groups, reads))
    for name, group in reads.items():
        for slot in group.used_by:
            kernel = np.moveaxis(np.asarray(found[slot.path]), slot.axis, 0)
            assert not kernel[1].any(), name
            assert kernel[[0, 2]].all(), name
    # What is read of open maps is as it was.
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 2))
    at_reads = nnx.merge(graph, units.apply_gates(params, z, reads), rest)(x)
    np.testing.assert_allclose(
        nnx.merge(graph, wide_resnet.masked(closed, groups, reads), rest)(x),
        at_reads,
        rtol=1e-5,
        atol=1e-6,
    )


def test_results_are_recorded_and_drawn(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(wide_resnet, "RESULTS", tmp_path / "results")
    for variant in ("fixed", "fixed", "target, the weights' rate"):
        results.put(wide_resnet.RESULTS, [run(folder, variant)], wide_resnet.ORDER)
    found = results.read(wide_resnet.RESULTS)
    assert [r["method"] for r in found] == ["target, the weights' rate", "fixed"]
    axes = gate_shares.picture(found).axes[0]
    drawn = axes.lines[1].get_ydata()
    np.testing.assert_allclose(drawn, 100 * np.array(found[1]["shares"]))
    # No two variants look alike.
    every = [{**found[0], "method": name} for name in wide_resnet.VARIANTS]
    lines = gate_shares.picture(every).axes[0].get_legend().get_lines()
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(every)


BAD = {
    "variant": ({"variant": ("magic",)}, "unknown variant 'magic'; there is all"),
    "none": ({"variant": ()}, "at least one variant"),
    "epochs": ({"recipe": Recipe(epochs=0)}, "recipe.epochs must be at least 1, got 0"),
    "target": ({"target": 1.5}, r"target of 'macs' must lie in \(0, 1\], got 1.5"),
    "what has no gates": ({"target": 0.01}, "what has no gates alone is"),
    "decay": ({"recipe": Recipe(weight_decay=-1.0)}, "'weight_decay' must be >= 0"),
    "images": ({"examples": 20}, "20 training images don't fill a batch of 32"),
    "recorded": (
        {"record": True},
        "only the defaults are recorded.*multiplier_rate is 0.02",
    ),
    "initial": ({"keep_prob": 1.0}, "keep_prob"),
}


@pytest.mark.sweep
@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused(tmp_path, case):
    changes, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        wide_resnet.main(dataclasses.replace(CONFIG, out=tmp_path, **changes))
    assert not [*tmp_path.iterdir()], "a refused run leaves no folder"


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    recipe = dataclasses.replace(CONFIG.recipe, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="not finite at step"):
        run(tmp_path, "fixed", recipe=recipe)
