"""What is written comes back, and what is damaged is noticed."""

import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES
from flax import nnx
from safetensors.numpy import load_file, save_file

import l0jax
import l0jax.nnx
from l0jax import models, storage, units
from l0jax.models import MODELS

WARN = "damaged"


def dense(name):
    return models.make(name, ARCHITECTURES[name]["small"], rngs=nnx.Rngs(0))


def shrunk(name):
    """Smaller, and with arrays that don't lie in memory in row-major order."""
    model = dense(name)
    keep = {}
    groups = models.structure(model).groups
    for group in groups.values():
        keep[group.name] = np.arange(group.size) % 3 != 1
        keep[group.name][0] = True
    small = l0jax.nnx.shrink(model, keep, groups)
    graph, state = nnx.split(small)
    state = jax.tree.map(lambda a: np.asfortranarray(np.asarray(a)), state)
    return nnx.merge(graph, state)


MAKERS = {"dense": dense, "shrunk": shrunk}
sweep = pytest.mark.parametrize("name", MODELS)
sizes = pytest.mark.parametrize("size", MAKERS)


def images_for(model):
    shape = model.architecture.get("shape", [12])
    return jnp.float32(np.random.default_rng(1).normal(size=(3, *shape)))


def arrays(model):
    return {path: np.asarray(a) for path, a in units.arrays(nnx.state(model)).items()}


# ------------------------------------------------------------------------- models


@sizes
@sweep
def test_a_model_comes_back_as_it_was(name, size, tmp_path):
    model = MAKERS[size](name)
    for folder in (tmp_path / "new" / "deep", str(tmp_path / "text")):
        storage.save(model, folder)
        again = storage.load(folder)
        assert type(again) is type(model)
        assert again.architecture == model.architecture
        before, after = arrays(model), arrays(again)
        assert list(before) == list(after)
        for path, array in before.items():
            assert after[path].dtype == array.dtype
            np.testing.assert_array_equal(after[path], array)
        images = images_for(model)
        np.testing.assert_array_equal(again(images), model(images))
        # A loaded model is a model: it has groups that fit, and shrinks.
        units.check(nnx.state(again), models.structure(again).groups)


@sweep
def test_saving_again_replaces_the_model(name, tmp_path):
    for make in (dense, shrunk):
        storage.save(make(name), tmp_path)
        assert storage.load(tmp_path).architecture == make(name).architecture
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "architecture.json",
        "arrays.safetensors",
    ]


@sweep
def test_nothing_is_pickled(name, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for verb in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, verb, refuse)
    storage.save(shrunk(name), tmp_path)
    storage.load(tmp_path)
    described = json.loads((tmp_path / "architecture.json").read_text())
    assert described == {"model": name, "arguments": shrunk(name).architecture}
    assert set(load_file(tmp_path / "arrays.safetensors")) == set(arrays(dense(name)))


LOAD = """
import sys
from flax import nnx
import jax.numpy as jnp
before = set(sys.modules)  # Flax itself imports optax.
from l0jax import storage
model = storage.load(sys.argv[1])
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
loaded &= {"optax", "orbax", "chex", "tensorstore", "experiments", "matplotlib"}
assert not loaded, loaded
shape = model.architecture.get("shape", [12])
assert model(jnp.ones((1, *shape))).shape == (1, 3)
"""


@sweep
def test_loading_waits_for_nothing_that_training_needs(name, tmp_path):
    storage.save(shrunk(name), tmp_path)
    root = pathlib.Path(storage.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_class_that_is_not_registered_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Linear is not in MODELS"):
        storage.save(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("missing", ["architecture.json", "arrays.safetensors"])
def test_a_missing_file_is_named(missing, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        storage.load(tmp_path / "nowhere")
    storage.save(dense("mlp"), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing) as error:
        storage.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_damaged_file_is_reported(tmp_path):
    storage.save(dense("mlp"), tmp_path)
    for name in ("architecture.json", "arrays.safetensors"):
        file = tmp_path / name
        whole = file.read_bytes()
        for damaged in (b"", whole[:-5], b"\xff" + whole[1:]):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match="damaged") as error:
                storage.load(tmp_path)
            assert str(tmp_path) in str(error.value)
        file.write_bytes(whole)
    storage.load(tmp_path)


def rewrite(folder, change):
    file = folder / "arrays.safetensors"
    stored = dict(load_file(file))
    change(stored)
    save_file(stored, file)


@sweep
def test_arrays_that_are_not_those_of_the_architecture_are_named(name, tmp_path):
    storage.save(dense(name), tmp_path)
    path = next(path for path in arrays(dense(name)) if path.endswith("kernel"))

    def drop(stored):
        del stored[path]

    def cut(stored):
        stored[path] = stored[path][..., :-1].copy()

    def add(stored):
        stored["extra.kernel"] = np.zeros((2, 2), np.float32)

    for change, words in (
        (drop, [path, "nothing"]),
        (cut, [path, str(arrays(dense(name))[path].shape)]),
        (add, ["extra.kernel", "(2, 2)", "nothing"]),
    ):
        storage.save(dense(name), tmp_path)
        rewrite(tmp_path, change)
        with pytest.raises(ValueError, match="disagree") as error:
            storage.load(tmp_path)
        assert all(word in str(error.value) for word in [*words, str(tmp_path)])


def test_an_architecture_that_can_not_be_built_is_reported(tmp_path):
    storage.save(dense("mlp"), tmp_path)
    file = tmp_path / "architecture.json"
    for described in (
        {"model": "vgg", "arguments": {}},
        {"model": "mlp"},
        {"model": "mlp", "arguments": {"depth": 3}},
        {"arguments": {}},
        [],
    ):
        file.write_text(json.dumps(described))
        with pytest.raises(ValueError, match=r"vgg|damaged"):
            storage.load(tmp_path)


def test_a_reading_mask_that_disagrees_with_the_weights_is_refused(tmp_path):
    """As many features must be marked as the first layer has rows."""
    storage.save(shrunk("mlp"), tmp_path)
    rewrite(tmp_path, lambda stored: stored.update(reads=np.ones(12, bool)))
    with pytest.raises(ValueError, match="reads"):
        storage.load(tmp_path)


# ---------------------------------------------------------------- any other function


def narrowed():
    """A function that no constructor makes, its parameters, and inputs."""
    rng = np.random.default_rng(0)
    params = {
        name: jnp.float32(rng.normal(size=shape))
        for name, shape in (("a", (4, 6)), ("deep", (6, 5)), ("b", (5, 2)))
    }
    params = {"outer": {"a": params["a"]}, "deep": params["deep"], "b": params["b"]}

    def apply(params, x, scale):
        h = jnp.tanh(x @ params["outer"]["a"]) @ params["deep"]
        return {"y": jax.nn.relu(h) @ params["b"] * scale}

    x, scale = jnp.float32(rng.normal(size=(3, 4))), jnp.ones((3, 1))
    structure = l0jax.trace(apply, params, x, scale)
    keep = {
        name: np.arange(group.size) % 2 == 0 for name, group in structure.groups.items()
    }
    small, small_params = l0jax.narrow(structure, params, keep)
    return small, small_params, (x, scale)


def test_any_function_comes_back_for_batches_of_any_size(tmp_path):
    small, params, inputs = narrowed()
    storage.save_function(small, params, *inputs, folder=tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "architecture.json",
        "arrays.safetensors",
        "program.stablehlo",
    ]
    again = storage.load(tmp_path)
    assert isinstance(again, storage.Program)
    assert {p: a.shape for p, a in again.params.items()} == {
        p: a.shape for p, a in units.arrays(params).items()
    }
    for batch in (1, 3, 7):
        some = [jnp.resize(leaf, (batch, *leaf.shape[1:])) for leaf in inputs]
        np.testing.assert_allclose(
            again(*some)["y"], small(params, *some)["y"], rtol=1e-6
        )


def test_a_saved_function_may_be_bound_to_its_batch(tmp_path):
    small, params, inputs = narrowed()
    storage.save_function(small, params, *inputs, folder=tmp_path, any_batch=False)
    again = storage.load(tmp_path)
    np.testing.assert_allclose(again(*inputs)["y"], small(params, *inputs)["y"])
    with pytest.raises(ValueError, match="shape"):
        again(*(leaf[:2] for leaf in inputs))


def test_a_function_that_needs_its_batch_says_so(tmp_path):
    def apply(params, x):
        return x.reshape(-1, 6) @ params["a"] if x.shape[0] > 2 else x @ params["a"]

    with pytest.raises(ValueError, match="any_batch=False"):
        storage.save_function(
            apply, {"a": jnp.ones((6, 2))}, jnp.ones((3, 6)), folder=tmp_path
        )


def test_a_program_and_arrays_that_disagree_are_refused(tmp_path):
    small, params, inputs = narrowed()
    storage.save_function(small, params, *inputs, folder=tmp_path)
    stored = load_file(tmp_path / "arrays.safetensors")
    stored["b"] = stored["b"][:1]
    save_file(stored, tmp_path / "arrays.safetensors")
    with pytest.raises(ValueError, match=r"arrays and architecture disagree at 'b'"):
        storage.load(tmp_path)
    (tmp_path / "program.stablehlo").unlink()
    with pytest.raises(FileNotFoundError, match=r"program\.stablehlo is missing"):
        storage.load(tmp_path)


def test_a_damaged_program_is_refused(tmp_path):
    small, params, inputs = narrowed()
    storage.save_function(small, params, *inputs, folder=tmp_path)
    file = tmp_path / "program.stablehlo"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="the saved model is damaged"):
        storage.load(tmp_path)


def test_onnx_says_which_extra_is_missing(tmp_path, monkeypatch):
    small, params, inputs = narrowed()
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ImportError, match=r'pip install "l0jax\[onnx\]"'):
        storage.save_onnx(small, params, *inputs, file=tmp_path / "net.onnx")


# -------------------------------------------------------------------- checkpoints


def state(value):
    return {
        "theta": {"w": jnp.full((3, 2), value), "b": [jnp.int32(value)]},
        "half": jnp.full(4, value, jnp.bfloat16),
    }


def save(folder, steps, keep=2):
    checkpoints = storage.Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, state(float(step)), {"epoch": step, "best": None})
    return checkpoints


def restore(folder):
    lines = []
    found = storage.Checkpoints(folder).restore(lambda _: state(0.0), lines.append)
    return found, lines


def check(found, step):
    at, restored, notes = found
    assert at == step
    assert notes == {"epoch": step, "best": None}
    assert jax.tree.structure(restored) == jax.tree.structure(state(0.0))
    for a, b in zip(
        jax.tree.leaves(restored), jax.tree.leaves(state(float(step))), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def damage_by_truncation(folder, step):
    files = [file for file in (folder / str(step)).rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])


def damage_by_one_bit(folder, step):
    files = [file for file in (folder / str(step)).rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def damage_by_loss_of_a_file(folder, step):
    files = [file for file in (folder / str(step)).rglob("*") if file.is_file()]
    min(files, key=lambda file: file.stat().st_size).unlink()


def damage_by_death_before_the_record(folder, step):
    (folder / f"{step}.json").unlink()


def damage_to_the_record(folder, step):
    file = folder / f"{step}.json"
    file.write_text(file.read_text()[:20])


def damage_by_an_empty_folder(folder, step):
    shutil.rmtree(folder / str(step))
    (folder / str(step)).mkdir()


DAMAGES = [
    damage_by_truncation,
    damage_by_one_bit,
    damage_by_loss_of_a_file,
    damage_by_death_before_the_record,
    damage_to_the_record,
    damage_by_an_empty_folder,
]


def test_no_checkpoint_is_none(tmp_path):
    assert restore(tmp_path / "nowhere") == (None, [])
    assert storage.Checkpoints(tmp_path / "nowhere").steps() == []
    assert not (tmp_path / "nowhere").exists()


def test_the_newest_checkpoint_comes_back(tmp_path):
    save(tmp_path, [9, 10])
    found, lines = restore(tmp_path)
    assert lines == []
    check(found, 10)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_line(damage, tmp_path):
    save(tmp_path, [9, 10])
    damage(tmp_path, 10)
    found, lines = restore(tmp_path)
    check(found, 9)
    assert len(lines) == 1
    assert str(tmp_path / "10") in lines[0]
    damage(tmp_path, 9)
    found, lines = restore(tmp_path)
    assert found is None
    assert len(lines) == 2


@pytest.mark.parametrize("keep", [2, 3])
def test_only_the_newest_are_kept(keep, tmp_path):
    checkpoints = save(tmp_path, [2, 9, 10, 11, 100], keep=keep)
    kept = [2, 9, 10, 11, 100][-keep:]
    assert checkpoints.steps() == kept
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(
        [str(step) for step in kept] + [f"{step}.json" for step in kept]
    )


def test_saving_over_a_half_written_checkpoint(tmp_path):
    """A run that died while saving saves the same step again when it is resumed."""
    save(tmp_path, [9, 10])
    damage_by_death_before_the_record(tmp_path, 10)
    damage_by_truncation(tmp_path, 10)
    save(tmp_path, [10])
    found, lines = restore(tmp_path)
    check(found, 10)
    assert lines == []


def test_a_death_while_saving_over_a_step_leaves_no_stale_record(tmp_path, monkeypatch):
    """The record of the old state must not vouch for the new one, nor the reverse."""
    checkpoints = save(tmp_path, [9, 10])

    def die(file, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_write_whole", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(10, state(77.0), {"epoch": 77})
    found, lines = restore(tmp_path)
    check(found, 9)
    assert len(lines) == 1


def test_other_files_beside_checkpoints_are_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "7").write_text("a file")
    save(tmp_path, [9, 10, 11])
    assert (tmp_path / "notes").is_dir()
    assert (tmp_path / "7").read_text() == "a file"
    check(restore(tmp_path)[0], 11)


@pytest.mark.parametrize("keep", [1, 0, -1])
def test_keeping_fewer_than_two_is_refused(keep, tmp_path):
    with pytest.raises(ValueError, match=f"at least 2, got {keep}"):
        storage.Checkpoints(tmp_path, keep=keep)


def test_a_relative_folder_is_the_one_at_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = storage.Checkpoints("run")
    checkpoints.save(1, state(1.0), {})
    monkeypatch.chdir("/")
    assert checkpoints.steps() == [1]
    assert (tmp_path / "run" / "1").is_dir()
