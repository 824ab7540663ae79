"""The study of language models: every way ends within its budget, in a model that says
what the gated one does."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import (
    compare,
    language_latency,
    language_model,
    language_report,
)
from experiments.harness import results
from experiments.language_methods import METHODS, within_budget
from experiments.language_run import Run, from_new_weights, structure_of
from experiments.language_settings import Config, Recipe
from experiments.language_training import Windows, loss
from experiments.reports import runs
from experiments.tasks import text
from l0jax import costs, methods, models, storage
from l0jax.methods import sensitivity
from l0jax.models.decoder import Decoder

RECIPE = Recipe(epochs=1, batch_size=16, learning_rate=3e-3)
TINY = Config(
    method=("uniform",),
    text="reference",
    layers=2,
    width=12,
    heads=2,
    dim=4,
    hidden=16,
    length=16,
    judged_by=8,
    base=RECIPE,
    tune=dataclasses.replace(RECIPE, epochs=2),
    closing=1,
    gate_learning_rate=5e-2,
    left=0.6,
    progress=False,
)


def a_part():
    """Of the text is enough."""
    whole = text.load("reference")
    return whole._replace(
        train=whole.train[:2_500],
        validation=whole.validation[:600],
        test=whole.test[:600],
    )


@pytest.fixture(scope="module", autouse=True)
def short():
    found = a_part()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "load", lambda name: found)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a run whose base all others of its settings take."""
    folder = tmp_path_factory.mktemp("language") / "run"
    language_model.main(dataclasses.replace(TINY, out=folder))
    return folder


def of(folder, **changes):
    found = language_model.main(dataclasses.replace(TINY, out=folder, **changes))
    (line,) = [r for r in found["results"] if (r["method"],) == changes["method"]]
    return line


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:gates are undecided")
@pytest.mark.parametrize("method", METHODS)
def test_every_way_ends_within_its_budget(method, folder):
    line = of(folder, method=(method,))
    left = line["costs"]["params"]
    assert TINY.left - 0.06 < left <= TINY.left
    if method == "scratch":
        assert line["epochs"] == {"choosing": 0, "tuning": 3}
    else:
        assert sum(line["epochs"].values()) == 2
    if method == "uniform":
        return
    small = storage.load(folder / f"{method}-0")
    assert isinstance(small, Decoder)
    counted = sum(a.size for a in jax.tree.leaves(nnx.state(small, nnx.Param)))
    base = storage.load(folder / "base-0")
    whole = sum(a.size for a in jax.tree.leaves(nnx.state(base, nnx.Param)))
    # (Of a branch that is gone the class keeps the norm.)
    assert abs(counted / whole - left) < 0.02
    assert [list(each) for each in small.sizes] == line["blocks"]
    for name in ("validation loss", "test loss"):
        assert np.isfinite(line["metrics"][name])


@pytest.mark.slow
def test_a_base_is_taken_from_another_run(folder, tmp_path):
    line = of(tmp_path / "run", method=("random",), left=0.7, base_from=folder)
    assert not (tmp_path / "run" / "base-0").exists()
    whole = of(folder, method=("uniform",))
    assert line["base goes on"] == whole["base goes on"]
    with pytest.raises(ValueError, match="made with width = 12; this run has 24"):
        of(tmp_path / "other", method=("random",), width=24, base_from=folder)
    with pytest.raises(FileNotFoundError, match="base_from must be the folder of"):
        of(tmp_path / "other", method=("random",), base_from=tmp_path / "none")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:gates are undecided")
def test_branches_are_gated_beside_their_units_and_learn_from_the_base(tmp_path):
    line = of(
        tmp_path / "run",
        method=("l0_hard_concrete",),
        gated=("heads", "hidden", "branches"),
        cost="macs",
        distil=True,
        compute="bfloat16",
    )
    assert 0.5 < line["costs"]["macs"] <= TINY.left
    assert line["width"] == TINY.width


@pytest.mark.filterwarnings("ignore:gates are undecided")
@pytest.mark.parametrize("method", ["uniform", "l0_hard_concrete"])
def test_seconds_are_a_budget(method, tmp_path, monkeypatch):
    """Of branches, which take seconds of their own beside those of their units."""

    def measured(model, structure, tokens, sizes):
        ((name, counts),) = sizes.items()
        # A head takes 2 beside 3 for there being any, ten hidden units 1 beside 1.
        each, there = (2.0, 3.0) if name.endswith("heads") else (0.1, 1.0)
        counts = tuple(sorted(counts))
        seconds = [30.0 + each * n + there * (n > 0) for n in counts]
        return costs.Table((name,), (counts,), np.array(seconds) - 14.0)

    monkeypatch.setattr(language_latency, "measure_latency", measured)
    line = of(
        tmp_path / "run",
        method=(method,),
        gated=("heads", "hidden", "branches"),
        cost="latency",
        left=0.75,
    )
    assert 0.5 < line["costs"]["latency"] <= 0.75
    heads, hidden = ([b[at] for b in line["blocks"]] for at in (0, 4))
    rest = 16.0 + 7.0 + 2.6 - 2 * (7.0 + 2.6)
    # (Interpolated between none, parts and all.)
    assert line["costs"]["latency"] >= rest / 25.6
    assert sum(heads) + sum(hidden) < 2 * (TINY.heads + TINY.hidden)


def test_seconds_that_can_t_be_are_refused(tmp_path, monkeypatch):
    model = Decoder(5, 8, [(2, 1, 2, 4, 8)], 8, rngs=nnx.Rngs(0))

    def measured(seconds):
        def found(base, structure, tokens, sizes):
            ((name, counts),) = sizes.items()
            shape = sorted(counts)
            return costs.Table(
                (name,), (tuple(shape),), np.linspace(*seconds, len(shape))
            )

        return found

    for seconds, said in (((1.0, 9.0), "adds up to 16 s of 9 s"), ((1.0, 1.2), None)):
        monkeypatch.setattr(language_latency, "measure_latency", measured(seconds))
        folder = tmp_path / str(seconds[1])
        if said is None:
            cost = language_latency.cost(model, 8, folder)
            structure = models.structure(model)
            assert float(cost(structure, {})) == pytest.approx(1.2, rel=1e-5)
            closed = {"block0.hidden": jnp.zeros(8)}
            assert float(cost(structure, closed)) == pytest.approx(1.0, rel=1e-5)
            continue
        with pytest.raises(ValueError, match=said) as error:
            language_latency.cost(model, 8, folder)
        assert str(folder) in str(error.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:gates are undecided")
@pytest.mark.parametrize("method", ["taylor", "l0_bernoulli"])
def test_a_shape_is_met_exactly(method, tmp_path):
    kinds = ("heads", "hidden", "stream")
    line = of(
        tmp_path / "run",
        method=(method,),
        gated=kinds,
        shape={"heads": 1, "hidden": 9, "stream": 8},
    )
    assert line["width"] == 8
    assert line["blocks"] == [[1, 1, 2, 4, 9]] * 2


def test_a_result_is_not_made_twice(folder, monkeypatch):
    monkeypatch.setattr(Run, "result", lambda _: pytest.fail("it is there"))
    found = language_model.main(dataclasses.replace(TINY, out=folder))
    assert {line["method"] for line in found["results"]} >= {"uniform"}


def test_results_are_read_with_those_of_other_studies(folder, tmp_path):
    line = of(folder, method=("random",))
    found = [r for r in runs.runs(folder) if r.method == "random"]
    assert found[0].metrics["test loss"] == line["metrics"]["test loss"]
    assert found[0].costs["params"] == line["costs"]["params"]
    assert found[0].made["versions"]["jax"] == jax.__version__
    out = tmp_path / "compared"
    table = compare.main(compare.Config((str(folder),), "uniform", out))
    assert "| test loss, nats |" in table
    assert "above uniform, nats" in table
    for name in ("table.tex", "runs.csv", "frontier.png"):
        assert (out / name).stat().st_size > 100
    error = dataclasses.replace(found[0], study="mnist", metrics={"test error": 1.0})
    with pytest.raises(ValueError, match="language_model, mnist can't stand in one"):
        runs.lines([found[0], error])


def test_the_report_is_made_of_the_folder_alone(folder):
    language_report.write(folder)
    written = ("table.md", "runs.csv", "texts.md", "figures/left.png")
    before = {name: (folder / name).read_bytes() for name in written[:3]}
    for name in written:
        (folder / name).unlink()
    language_report.write(folder)
    for name, content in before.items():
        assert (folder / name).read_bytes() == content
    assert (folder / "figures" / "losses.png").stat().st_size > 5_000
    lines = results.read(folder)
    assert lines[0]["goes on"] in (folder / "texts.md").read_text()


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_is_filled_alike_in_all_groups(seed):
    sizes = [(4, 1, 2, 4, 20), (4, 1, 2, 4, 30)]
    model = Decoder(11, 24, sizes, 8, rngs=nnx.Rngs(0))
    structure = structure_of(model, ())
    named = [n for n in structure.groups if n.split(".")[-1] in ("hidden", "stream")]
    rng = np.random.default_rng(seed)
    scores = {n: rng.normal(size=structure.groups[n].size) for n in named}
    left = rng.uniform(0.3, 0.9)
    keep = within_budget(structure, scores, costs.params, left)
    most = left * costs.exact(structure, cost=costs.params)
    shares = []
    for name, flags in keep.items():
        assert scores[name][flags].min() > scores[name][~flags].max(initial=-np.inf)
        shares.append(flags.mean())
        more = dict(keep)
        more[name] = flags | (np.arange(len(flags)) == np.argmin(flags))
        assert flags.all() or costs.exact(structure, more, costs.params) > most
    assert costs.exact(structure, keep, costs.params) <= most
    assert np.ptp(shares) < 0.15


def test_a_teacher_is_followed():
    """Half of the loss is the divergence from what it says, which is 0 at itself."""
    model = Decoder(5, 8, [(1, 1, 2, 4, 6)], 8, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, 9)), jnp.uint8)
    logits = model(tokens[:, :-1].astype(jnp.int32))
    said = jax.nn.log_softmax(logits)
    alone, _ = loss(model, Windows(tokens))
    both, metrics = loss(model, Windows(tokens, said))
    assert metrics["from the base"] == pytest.approx(0, abs=1e-6)
    assert both == pytest.approx(float(alone) / 2)
    other = jax.nn.log_softmax(1.5 * logits)
    _, metrics = loss(model, Windows(tokens, other))
    by_hand = (np.exp(other) * (other - said)).sum(-1).mean()
    assert metrics["from the base"] == pytest.approx(float(by_hand), rel=1e-4)


def test_a_new_network_sees_as_much_text_as_the_others():
    base, tune = Recipe(epochs=2, apart=0.5), Recipe(epochs=3, apart=1.0)
    recipe = from_new_weights(dataclasses.replace(TINY, base=base, tune=tune))
    assert recipe == dataclasses.replace(base, epochs=4)
    seen = Run(TINY, a_part(), Path(), "scratch", METHODS["scratch"], 0)
    count = {r.apart: len(seen.windows(r)) for r in (base, tune)}
    assert 2 * count[0.5] + 3 * count[1.0] == pytest.approx(4 * count[0.5], rel=0.15)


def test_windows_hold_the_text_and_what_follows():
    found = text.windows_of(np.arange(100), 16, 8)
    assert found.shape == (11, 17)
    np.testing.assert_array_equal(found[:, 0], np.arange(0, 84, 8))
    assert (np.diff(found, axis=1) == 1).all()
    with pytest.raises(ValueError, match="16 characters, fewer than a window"):
        text.windows_of(np.arange(16), 16, 8)


def test_gates_of_values_are_gates_of_weights():
    """Wherever a kind of unit is gated: at what a product sums over, at what it makes,
    in a table. The mean over examples is the derivative that gates of weights have."""
    sizes = [(3, 2, 2, 4, 10), (2, 1, 3, 5, 7)]
    model = Decoder(11, 12, sizes, 8, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (6, 9)))
    inputs, following = tokens[:, :-1], tokens[:, 1:]

    def nats(logits, labels):
        found = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return found.mean(-1)

    task = methods.task(model, models.structure(model), inputs, following, 6, nats)
    one = sensitivity._one_example(task)
    slopes = jax.jit(sensitivity._slopes(one))
    each = slopes(task.open_gates, task.params, inputs, following)
    of_weights = jax.jit(
        jax.grad(lambda z: task.gated_loss(z, task.params, inputs, following).mean())
    )(task.open_gates)
    assert set(each) == set(task.structure.groups)
    for name, slopes in each.items():
        expected = np.asarray(of_weights[name])
        error = np.abs(np.asarray(slopes).mean(0) - expected).max()
        assert error < 1e-4 * np.abs(expected).max(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ("magic",)}, "unknown method 'magic'; there is uniform"),
        ({"gated": ("neurons",)}, "unknown kind 'neurons'; there is heads"),
        ({"text": "bible"}, "unknown text 'bible'"),
        ({"seeds": ()}, "at least one method, one seed"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"dim": 5}, "dim must be even"),
        ({"left": 1.0}, r"left must lie in \(0, 1\), got 1.0"),
        ({"closing": 2}, "closing is 2 epochs of the 2"),
        ({"closing": 0}, "closing is 0 epochs of the 2"),
        ({"reached": 1.5}, r"reached must lie in \[0, 1\], got 1.5"),
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"gated": ("heads", "queries")}, "the base has no queries that could go"),
        ({"price": 0.0}, "price must be > 0"),
        ({"keep_prob": 1.0}, "keep_prob must lie in"),
        ({"mesh": "data=3"}, "mesh 'data=3' asks for 3 devices, and there are 1"),
        ({"shard": "data"}, "shard is given, but no mesh"),
        ({"base": Recipe(epochs=0)}, "base needs at least one epoch"),
        ({"base": Recipe(apart=0.0)}, r"base.apart must lie in \(0, 1\], got 0.0"),
        ({"tune": Recipe(epochs=2, learning_rate=0.0)}, "tune needs a learning rate"),
        ({"length": 4_000}, "fewer than a window of 4000"),
        ({"cost": "latency"}, "seconds are measured for heads, hidden and branches"),
        ({"shape": {"heads": 1}}, "a shape is given of heads, and gated are heads, h"),
        (
            {"gated": ("heads",), "shape": {"heads": 3}},
            "the shape has 3 heads, and the base has 2",
        ),
        (
            {"gated": ("hidden",), "shape": {"hidden": 0}},
            "the shape has 0 hidden: what reads them would be there for nothing",
        ),
        ({"left": 0.05}, "no more than 0.05 of the params"),
    ],
)
def test_what_cant_be_run_is_refused_and_leaves_nothing(changes, message, tmp_path):
    config = dataclasses.replace(TINY, out=tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        language_model.main(config)
    assert not (tmp_path / "run").exists()
