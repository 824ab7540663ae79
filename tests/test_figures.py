"""Pictures are drawn from made-up runs, so that they need no training."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from experiments import figures
from experiments.harness import results
from experiments.reports import curves, finished_run, unit_maps

MODELS = {
    "mlp": {"input": 64, "hidden1": 30, "hidden2": 10},
    "lenet5": {"conv1": 6, "conv2": 15, "features": 60, "hidden": 40},
}
KERNELS = {
    "mlp": {
        "layers.0.kernel": (64, 30),
        "layers.1.kernel": (30, 10),
        "layers.2.kernel": (10, 10),
    },
    "lenet5": {
        "conv1.kernel": (5, 5, 1, 6),
        "conv2.kernel": (5, 5, 6, 15),
        "dense1.kernel": (60, 40),
        "dense2.kernel": (40, 10),
    },
}
SHAPES = {"mlp": [8, 8, 1], "lenet5": [20, 20, 1]}
PICTURES = {
    "mlp": ["training.png", "costs.png", "gates.png", "pixels.png", "pixels.gif"],
    "lenet5": ["training.png", "costs.png", "gates.png", "features.png"],
}
EVERY_RUN = list(itertools.product(MODELS, ("group", "weight", "none"), (0, 1, 4)))


def probabilities(random, size, progress):
    """Gates that start undecided and of which a third closes."""
    logits = random.normal(size=size) * (0.3 + 6 * progress) - 2 * progress
    return 1 / (1 + np.exp(-logits))


def values(prob_active):
    return np.clip(1.2 * prob_active - 0.1, 0, 1).astype(np.float32)


def architecture(activity):
    open_gates = {group: values(p) > 0 for group, p in activity.items()}
    if "features" in open_gates:
        maps = open_gates["conv2"]
        open_gates["features"] &= np.tile(
            maps, open_gates["features"].size // maps.size
        )
    return {group: int(is_open.sum()) for group, is_open in open_gates.items()}


def metrics(epoch, progress, activity, kernels, dead):
    dense = float(sum(map(np.prod, kernels.values())))
    keys = {"weights": 1.0, "macs": 1.0, "reference_flops": 2.0, "flops_objective": 1.1}
    left = 0.0 if dead else 1 - 0.8 * progress
    error = 90.0 if dead else 1.0 + 10 / epoch
    return {
        "epoch": epoch,
        "train_error": 0.0 if epoch == 3 else 0.8 * error,
        "validation_error": error,
        "expected": {key: 0.9 * left * dense * unit for key, unit in keys.items()},
        "decided": {key: left * dense * unit for key, unit in keys.items()},
        "dense": {key: dense * unit for key, unit in keys.items()},
        "architecture": {
            group: 0 if dead else count
            for group, count in architecture(activity).items()
        },
    }


def make_run(folder, model="mlp", gates="group", epochs=4, dead=False):
    """A run folder with plausible contents."""
    (folder / "activity").mkdir(parents=True)
    records = []
    for epoch in range(epochs + 1):
        progress = epoch / max(epochs, 1)
        activity = draw_gates(MODELS[model], progress, dead)
        halves = {group: p.astype(np.float16) for group, p in activity.items()}
        np.savez(folder / "activity" / f"{epoch:05d}.npz", **halves)
        if epoch:
            records.append(metrics(epoch, progress, activity, KERNELS[model], dead))
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    config = {"model": model, "gates": gates, "dataset": "digits", "lam": [0.1, 0.2]}
    (folder / "config.json").write_text(json.dumps(config))
    line = {"study": "mnist", "task": f"digits {model}", "method": "hard_concrete"}
    line |= {"seed": 0, "settings": config, "metrics": {}, "costs": {}}
    results.put(folder, [line | told(model, records)])
    sizes = {path: int(np.prod(shape)) for path, shape in KERNELS[model].items()}
    final = {"weight": draw_gates(sizes, 1.0, dead), "group": activity, "none": {}}[
        gates
    ]
    arrays = {f"{name}/prob_active": p.astype(np.float32) for name, p in final.items()}
    arrays |= {f"{name}/value": values(p) for name, p in final.items()}
    np.savez(folder / "gates.npz", **arrays)
    return folder


def draw_gates(sizes, progress, dead):
    random = np.random.default_rng(0)
    return {
        name: probabilities(random, size, progress) * (not dead)
        for name, size in sizes.items()
    }


def told(model, records):
    found = [
        {"test_error": 1.1 * record["validation_error"], "epoch": record["epoch"]}
        for record in records
    ]
    made = {"shape": SHAPES[model], "test_rule": "paper"}
    if found:
        made |= {"last": found[-1], "best_on_validation": found[len(found) // 2]}
    return made


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def every_figure(run):
    return dict(figures._pictures(run))


@pytest.mark.parametrize("model", MODELS)
def test_draws_every_picture_and_nothing_else(tmp_path, model):
    folder = make_run(tmp_path / "run", model)
    before = {file: file.read_bytes() for file in folder.rglob("*.*")}
    drawn = figures.draw(folder)
    assert [file.name for file in drawn] == PICTURES[model]
    assert {file for file in folder.rglob("*.*")} == before.keys() | set(drawn)
    assert all(file.read_bytes() == content for file, content in before.items())
    for file in drawn:
        with Image.open(file) as image:
            assert 400 < min(image.size) <= max(image.size) < 1400
            assert np.asarray(image.convert("L")).std() > 5


@pytest.mark.sweep
@pytest.mark.parametrize(("model", "gates", "epochs"), EVERY_RUN)
def test_every_kind_of_run_has_figures(tmp_path, model, gates, epochs):
    run = finished_run.read(make_run(tmp_path / "run", model, gates, epochs))
    expected = PICTURES[model] if epochs else PICTURES[model][2:]
    expected = [n for n in expected if n.endswith("png")]
    if gates == "none":
        expected.remove("gates.png")
    assert list(every_figure(run)) == expected


@pytest.mark.parametrize("model", MODELS)
def test_without_gates_everything_is_read_and_nothing_is_charged(tmp_path, model):
    folder = make_run(tmp_path / "run", model, "none")
    drawn = [file.name for file in figures.draw(folder)]
    assert drawn == [name for name in PICTURES[model] if name != "gates.png"]
    run = finished_run.read(folder)
    for group, size in MODELS[model].items():
        np.testing.assert_array_equal(
            finished_run.readers_left(run, group), np.ones(size)
        )
    shown = texts(curves.training(run))
    assert any(text.endswith("on digits, no gates") for text in shown)


@pytest.mark.parametrize("model", MODELS)
def test_a_dead_network_can_be_drawn(tmp_path, model):
    folder = make_run(tmp_path / "run", model, dead=True)
    assert len(figures.draw(folder)) == len(PICTURES[model])


@pytest.mark.parametrize(("model", "epochs"), [("mlp", 1), ("lenet5", 4)])
def test_legends_cover_no_data_and_nothing_is_cut_off(tmp_path, model, epochs):
    run = finished_run.read(make_run(tmp_path / "run", model, epochs=epochs))
    for figure in every_figure(run).values():
        figure.draw_without_rendering()
        used, whole = figure.get_tightbbox(), figure.bbox_inches
        assert whole.xmin <= used.xmin < used.xmax <= whole.xmax
        assert whole.ymin <= used.ymin < used.ymax <= whole.ymax
        for axes in figure.axes:
            legend = axes.get_legend()
            if legend is not None:
                box = legend.get_window_extent()
                assert not any(box.overlaps(other.bbox) for other in figure.axes)


def test_training_states_sizes_and_both_test_errors(tmp_path):
    run = finished_run.read(make_run(tmp_path / "run"))
    shown = texts(curves.training(run))
    left = run.epochs[-1]["architecture"]
    for group, size in MODELS["mlp"].items():
        assert f"{group}: {size} → {left[group]}" in shown
    last, best = run.result["last"], run.result["best_on_validation"]
    assert f"test, last epoch\n(epoch 4): {last['test_error']:.2f} %" in shown
    assert f"test, best on validation\n(epoch 3): {best['test_error']:.2f} %" in shown
    assert f"training, last: {run.epochs[-1]['train_error']:.2f} %" in shown
    assert "Training of MLP on digits, gates on units, λ = (0.1, 0.2) / N" in shown


def test_errors_that_matter_stay_on_the_axis_and_zero_is_harmless(tmp_path):
    run = finished_run.read(make_run(tmp_path / "run"))
    run.epochs[0]["validation_error"] = None
    run.epochs[3]["train_error"] = 1e-4
    axes = curves.training(run).axes[0]
    low, high = axes.get_ylim()
    evaluated = [record["validation_error"] for record in run.epochs[1:]]
    assert 0.05 < low < min(evaluated)
    assert high > run.result["best_on_validation"]["test_error"]
    assert high > run.epochs[0]["train_error"]


def test_costs_name_their_conventions_and_absolute_numbers(tmp_path):
    run = finished_run.read(make_run(tmp_path / "run"))
    shown = "\n".join(texts(curves.costs(run)))
    last = run.epochs[-1]
    for key, name in curves.COSTS.items():
        assert f"{name}\ndense: {last['dense'][key]:,.0f}" in shown
        assert f"rule 'paper': {last['decided'][key]:,.0f}" in shown
        assert f"draws of the gates: {last['expected'][key]:,.0f}" in shown


@pytest.mark.parametrize("dead", [False, True])
def test_costs_of_all_panels_are_on_the_axis(tmp_path, dead):
    run = finished_run.read(make_run(tmp_path / "run", dead=dead))
    panels = curves.costs(run).axes
    lines = [line for axes in panels for line in axes.get_lines()]
    shares = np.concatenate([line.get_ydata() for line in lines])
    assert len(lines) == 8
    for axes in panels:
        low, high = axes.get_ylim()
        assert low < shares.min() <= shares.max() < high


def test_gates_state_exact_shares(tmp_path):
    folder = make_run(tmp_path / "run")
    value = np.array([0, 0, 0, 0.5, 1], np.float32)
    np.savez(folder / "gates.npz", **{"g/value": value, "g/prob_active": value})
    shown = texts(curves.gates(finished_run.read(folder)))
    assert "exactly 0: 3 (60.0 %), exactly 1: 1 (20.0 %)" in shown
    assert "g: 5 gates, 20.0 % undecided" in shown


def test_pixel_map_is_row_by_row(tmp_path):
    run = finished_run.read(make_run(tmp_path / "run"))
    run.result["shape"] = [2, 4, 3]
    image = unit_maps.pixel_map(run, np.eye(24, dtype=np.float32)[3 * 6 + 1])
    assert image.shape == (2, 4)
    assert np.argwhere(image).tolist() == [[1, 2]]


@pytest.mark.parametrize("model", MODELS)
def test_readers_left_counts_the_weights_that_read_a_unit(tmp_path, model):
    run = finished_run.read(make_run(tmp_path / "run", model, "weight"))
    axes = {"input": 0, "conv1": 2, "conv2": 2, "features": 0}
    shapes = dict(KERNELS[model])
    for group in axes.keys() & MODELS[model].keys():
        path, _ = finished_run.READERS[group]
        # The maps of the second convolution lie inside the features.
        shape = (4, 1, 15, 40) if group == "conv2" else shapes[path]
        open_gates = run.gates[f"{path}/value"].reshape(shape) != 0
        for j, found in enumerate(finished_run.readers_left(run, group)):
            assert found == np.take(open_gates, j, axis=axes[group]).sum()


def test_features_are_read_if_their_map_is_left_too(tmp_path):
    run = finished_run.read(make_run(tmp_path / "run", "lenet5"))
    left = run.epochs[-1]["architecture"]
    assert 0 < left["features"] < MODELS["lenet5"]["features"]
    probability, readers = unit_maps.feature_maps(run)
    assert readers.sum() == left["features"]
    # The feature in row 1 and column 0 of map 7; there are 2 by 2 features in 15 maps.
    features, maps = run.gates["features/value"], run.gates["conv2/value"]
    assert readers[1, 0, 7] == (features[2 * 15 + 7] * maps[7] != 0)
    last = run.activity[4]
    assert probability[1, 0, 7] == last["features"][2 * 15 + 7] * last["conv2"][7]


def test_tiles_hold_every_map_once():
    maps = np.arange(2 * 3 * 7, dtype=float).reshape(2, 3, 7)
    image = unit_maps.tiles(maps, columns=4)
    assert image.shape == (2 * 3 + 1, 4 * 4 + 1)
    assert sorted(image[~np.isnan(image)]) == sorted(maps.ravel())
    np.testing.assert_array_equal(image[4:6, 5:8], maps[:, :, 5])
    assert np.isnan(image[[0, 3, 6]]).all()
    assert np.isnan(image[:, [0, 4, 8, 12, 16]]).all()


@given(st.integers(1, 500), st.integers(2, 80))
def test_frames_keep_the_first_and_the_last(epochs, most):
    kept = unit_maps.frames(range(epochs), most)
    assert len(kept) == min(epochs, most)
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, epochs - 1)


@pytest.mark.parametrize("epochs", [0, 1, 70])
def test_animation_is_short_and_rests_on_its_last_frame(tmp_path, epochs):
    run = finished_run.read(make_run(tmp_path / "run", epochs=epochs))
    unit_maps.animate(run, tmp_path / "pixels.gif")
    with Image.open(tmp_path / "pixels.gif") as image:
        assert image.n_frames == min(epochs + 1, unit_maps.MOST_FRAMES)
        image.seek(image.n_frames - 1)
        if epochs:
            assert image.info["duration"] == unit_maps.LAST_FRAME_MILLISECONDS


def test_an_epoch_that_was_run_again_counts_once(tmp_path):
    folder = make_run(tmp_path / "run", epochs=2)
    again = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    again["train_error"] = 77.0
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    errors = [record["train_error"] for record in finished_run.read(folder).epochs]
    assert len(errors) == 2
    assert errors[0] == 77.0


def test_a_missing_file_is_named(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / results.LINES).unlink()
    with pytest.raises(FileNotFoundError, match=r"run holds .* runs\.jsonl missing"):
        figures.draw(folder)


def test_settings_of_matplotlib_stay_as_they_were(tmp_path):
    with matplotlib.rc_context({"font.size": 31.0}):
        before = dict(matplotlib.rcParams)
        figures.draw(make_run(tmp_path / "run", epochs=1))
        assert dict(matplotlib.rcParams) == before


def test_command_line_chooses_no_backend(tmp_path):
    folder = make_run(tmp_path / "run", "lenet5", epochs=0)
    code = (
        "import sys; from experiments import figures; figures.main(); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(figures.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    drawn = [folder / "figures" / name for name in ("gates.png", "features.png")]
    assert done.stdout.split() == list(map(str, drawn))
