"""What is written comes back, and what is damaged is noticed."""

import dataclasses
import enum
import functools
import json
import pathlib
import pickle
import random
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES, inputs_for
from every_dtype import WIDE, every_dtype, of_dtype, same_bits
from flax import nnx
from safetensors.numpy import load_file, save_file

import l0jax
import l0jax.nnx
from benchmarks import mutations
from l0jax import encoding, models, storage, units
from l0jax.checkpoints import Checkpoints
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
    # (`np.asfortranarray` would make axes of numbers that have none.)
    state = jax.tree.map(lambda a: np.asarray(a, order="F"), state)
    return nnx.merge(graph, state)


MAKERS = {"dense": dense, "shrunk": shrunk}
sweep = pytest.mark.parametrize("name", MODELS)
sizes = pytest.mark.parametrize("size", MAKERS)


def images_for(model):
    return inputs_for(model, 3, seed=1)


def arrays(model):
    return {path: np.asarray(a) for path, a in units.arrays(nnx.state(model)).items()}


# ------------------------------------------------------------------------- models


@pytest.mark.sweep
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


@pytest.mark.sweep
@sweep
def test_a_model_that_lost_a_whole_layer_comes_back(name, tmp_path):
    model = dense(name)
    structure = models.structure(model)
    emptied = 0
    for group in structure.groups.values():
        keep = {group.name: np.zeros(group.size, bool)}
        closed = {group.name: jnp.zeros(group.size)}
        whole = l0jax.nnx.fold(model, closed, structure.groups)
        try:
            small = l0jax.nnx.shrink(whole, keep, structure)
        except ValueError as error:
            # Convolutions can't be called with no channels at all.
            if "with smaller arrays it fails" not in str(error):
                raise
            continue
        storage.save(small, tmp_path / group.name)
        again = storage.load(tmp_path / group.name)
        images = images_for(model)
        np.testing.assert_array_equal(again(images), small(images))
        emptied += 1
    assert emptied


@pytest.mark.sweep
@sweep
def test_saving_again_replaces_the_model(name, tmp_path):
    for make in (dense, shrunk):
        storage.save(make(name), tmp_path)
        assert storage.load(tmp_path).architecture == make(name).architecture
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "architecture.json",
        "arrays.safetensors",
    ]


@pytest.mark.sweep
@sweep
def test_nothing_is_pickled(name, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for verb in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, verb, refuse)
    storage.save(shrunk(name), tmp_path)
    storage.load(tmp_path)
    described = json.loads((tmp_path / "architecture.json").read_text())
    assert described["model"] == name
    assert described["arguments"] == shrunk(name).architecture
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
example = model.example
images = jnp.ones((1, *example.shape[1:]), example.dtype)
assert len(model(images)) == 1
"""


@pytest.mark.sweep
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


class Own(nnx.Module):
    """A user's module: with a norm, a size of its own, a function and a float."""

    def __init__(self, rngs, width=6, act=nnx.relu, slope=0.5):
        self.first = nnx.Linear(4, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.act, self.slope, self.shape = act, slope, (2, 3)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(width, 3, rngs=rngs)])

    def __call__(self, x):
        x = self.dropout(self.act(self.norm(self.first(x))))
        return self.slope * self.blocks[0](x).reshape(-1, *self.shape[1:])


def own(**settings):
    model = Own(nnx.Rngs(0), **settings)
    model.eval()
    return model


def test_a_users_module_comes_back_smaller_and_is_trained_on(tmp_path):
    whole, x = own(slope=0.25), jnp.ones((2, 4))
    structure = l0jax.trace(whole, x)
    name = next(n for n, g in structure.groups.items() if g.size == 6)
    keep = {name: np.array([True, False, True, True, False, True])}
    small = l0jax.nnx.shrink(whole, keep, structure)
    storage.save(small, tmp_path)
    like = own()
    like.train()
    again = storage.load(tmp_path, like=like)
    assert type(again) is Own
    np.testing.assert_array_equal(again(x), small(x))
    assert again.norm.num_features == again.first.out_features == 4
    assert (again.slope, again.shape, again.act) == (0.25, (2, 3), nnx.relu)
    assert again.dropout.deterministic is True
    assert like.slope == 0.5
    assert like.first.kernel.shape == (4, 6)
    slopes = nnx.grad(lambda model: model(x).sum())(again)
    assert np.abs(np.asarray(slopes.first.kernel[...])).max() > 0
    assert l0jax.trace(again, x).groups[name].size == 4


def test_a_module_of_another_class_or_with_other_code_is_refused(tmp_path):
    storage.save(own(), tmp_path)
    with pytest.raises(ValueError, match=r"class 'Own'.*give like=.*got nothing"):
        storage.load(tmp_path)
    with pytest.raises(ValueError, match="got Linear"):
        storage.load(tmp_path, like=nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"saved with act .*relu.* like= has .*gelu"):
        storage.load(tmp_path, like=own(act=nnx.gelu))
    more = own()
    more.other = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="like="):
        storage.load(tmp_path, like=more)


@dataclasses.dataclass(frozen=True)
class Config:
    scale: float = 1.0
    act: Any = nnx.relu


class Mode(enum.IntEnum):
    SLOW = 1
    FAST = 2


class Opaque:
    pass


def kept(value):
    """A module with some attribute, and one that reads it."""
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    model.kept = nnx.static(value)
    return model


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        (np.float32(2), np.float32(1)),
        (np.int64(2), np.int64(1)),
        (np.bool_(True), np.bool_(False)),
        ((np.int64(2), 3.0), (np.int64(1), 2.0)),
        (((1, 2), (3,)), ((1, 1), (1,))),
        (2.0, 1.0),
        (2, 2.0),
        ({"scale": 2.0, "b": "same"}, {"scale": 1.0, "b": "same"}),
        (({"scale": (2.0, nnx.relu)}, 1), ({"scale": (1.0, nnx.relu)}, 2)),
    ],
)
def test_numbers_within_attributes_are_those_of_the_file(saved, other, tmp_path):
    storage.save(kept(saved), tmp_path)
    like = kept(other)
    again = storage.load(tmp_path, like=like)
    assert repr(again.kept) == repr(saved)
    assert repr(like.kept) == repr(other)


PARTIAL = functools.partial(nnx.leaky_relu, negative_slope=0.1)


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        (Config(2.0), Config(1.0)),
        (Config(act=nnx.gelu), Config()),
        ((Config(2.0),), (Config(1.0),)),
        ({"config": Config(2.0)}, {"config": Config(1.0)}),
        ({"a": 1.0}, {"b": 1.0}),
        (Mode.FAST, Mode.SLOW),
        (Mode.FAST, 2),
        (range(3), range(4)),
        (2j, 1j),
        (slice(1, 2), slice(2)),
        (np.dtype("float32"), np.dtype("float16")),
        (jnp.float32, jnp.bfloat16),
        (frozenset({1, 2}), frozenset({1, 3})),
        (float("inf"), 1.0),
        (b"a", b"b"),
        (functools.partial(PARTIAL.func, negative_slope=0.9), PARTIAL),
        (functools.partial(nnx.elu, negative_slope=0.1), PARTIAL),
        (functools.partial(jnp.add, 1), functools.partial(jnp.add, 2)),
        (Opaque(), nnx.relu),
        (Opaque(), None),
    ],
)
def test_an_attribute_that_is_another_one_is_refused_by_name(saved, other, tmp_path):
    storage.save(kept(saved), tmp_path)
    if not isinstance(saved, Opaque):
        storage.load(tmp_path, like=kept(saved))
    with pytest.raises(
        ValueError, match=r"saved with kept .* at 'its root', and like="
    ):
        storage.load(tmp_path, like=kept(other))


@pytest.mark.parametrize("value", [lambda h: 2 * h, Opaque(), (1, lambda h: h)])
def test_what_can_not_be_told_apart_is_warned_of(value, tmp_path):
    storage.save(kept(value), tmp_path)
    words = r"kept at 'its root' \((.*<lambda>|Opaque)\); see that it is the same"
    with pytest.warns(UserWarning, match=words):
        storage.load(tmp_path, like=kept(value))


def test_modules_and_arrays_within_attributes_are_no_settings(tmp_path):
    def model(seed, scale):
        model = nnx.Linear(4, 2, rngs=nnx.Rngs(seed))
        inside = nnx.Linear(2, 2, rngs=nnx.Rngs(seed))
        model.inside = nnx.data({"layer": inside, "scale": scale})
        return model

    storage.save(model(0, 2.0), tmp_path)
    again = storage.load(tmp_path, like=model(1, 1.0))
    assert again.inside["scale"] == 2.0
    np.testing.assert_array_equal(
        again.inside["layer"].kernel[...], model(0, 2.0).inside["layer"].kernel[...]
    )


def test_a_module_of_an_older_version_is_loaded(tmp_path):
    """It had described numbers, strings, tuples of these and names alone."""
    model = own()
    model.config = nnx.static(Config(2.0))
    model.count = np.int64(2)
    storage.save(model, tmp_path)
    file = tmp_path / "architecture.json"
    record = encoding.opened(file.read_bytes())
    del record["complete"], record["attributes"][""]["config"]
    del record["attributes"][""]["count"]
    file.write_text(encoding.sealed(record))
    with pytest.warns(UserWarning, match=r"config at 'its root', count at 'its root'"):
        again = storage.load(tmp_path, like=model)
    np.testing.assert_array_equal(again(jnp.ones((2, 4))), model(jnp.ones((2, 4))))
    with pytest.raises(ValueError, match="saved with act"):
        storage.load(tmp_path, like=own(act=nnx.gelu))


def test_a_narrowed_module_is_saved_as_a_program(tmp_path):
    model, x = own(), jnp.ones((2, 4))
    structure = l0jax.trace(model, x)
    narrowed = l0jax.nnx.Narrowed(structure, model, {})
    with pytest.raises(ValueError, match=r"write it with save_function\(\*narrowed"):
        storage.save(narrowed, tmp_path)
    storage.save_function(*narrowed.function, x, folder=tmp_path)


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
    path = next(path for path, a in arrays(dense(name)).items() if a.ndim > 1)

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


# ----------------------------------------------------------------- what is an array

UNEXPORTED = ("int2", "uint2")


def first_number(params, x):
    """A function that reads all of its parameters."""
    leaves = jax.tree.leaves(params)
    return x + sum((a == a).sum() for a in leaves)


@pytest.mark.sweep
@every_dtype
def test_arrays_of_a_function_come_back_bit_for_bit(dtype, tmp_path):
    with jax.enable_x64(dtype in WIDE):
        params = of_dtype(dtype)
        x = jnp.zeros((2, 1), int)
        if dtype in UNEXPORTED:
            with pytest.raises(
                ValueError, match=f"{dtype} numbers, and array 'deep.0'"
            ):
                storage.save_function(first_number, params, x, folder=tmp_path / "it")
            assert not (tmp_path / "it").exists()
            return
        with jax.numpy_dtype_promotion("standard"):
            storage.save_function(first_number, params, x, folder=tmp_path)
        again = storage.load(tmp_path)
        expected = units.arrays(params)
        assert list(again.params) == list(expected)
        for path, array in expected.items():
            same_bits(again.params[path], array)


@pytest.mark.sweep
@every_dtype
def test_arrays_of_a_model_come_back_bit_for_bit(dtype, tmp_path):
    with jax.enable_x64(dtype in WIDE):
        model = dense("mlp")
        bias = model.layers[0].bias
        bias.set_value(jnp.asarray(of_dtype(dtype)["host"]).ravel()[: bias.shape[0]])
        storage.save(model, tmp_path)
        same_bits(storage.load(tmp_path).layers[0].bias[...], bias[...])
    if dtype in WIDE:
        with pytest.raises(
            ValueError, match=f"'layers.0.bias' is of dtype {dtype}, of"
        ):
            storage.load(tmp_path)
        with pytest.raises(ValueError, match="jax_enable_x64"):
            storage.save(model, tmp_path / "it")


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_come_back(generator, tmp_path):
    key = jax.random.key(7, impl=generator)
    params = {
        "one": key,
        "many": jax.random.split(key, (2, 3)),
        "raw": jax.random.key_data(key),
    }

    def draw(params, x):
        return x + jax.random.normal(params["one"], x.shape)

    x = jnp.ones((2, 3))
    storage.save_function(draw, params, x, folder=tmp_path / "function")
    again = storage.load(tmp_path / "function")
    for path, array in params.items():
        same_bits(again.params[path], array)
    np.testing.assert_allclose(again(x), draw(params, x), rtol=1e-6)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, params, {})
    like = {**params, "one": jax.random.key(0, impl=generator)}
    jax.tree.map(same_bits, checkpoints.restore(lambda _: like, pytest.fail)[1], params)


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(jax.nn.relu(self.first(x))))


def test_modules_with_dropout_are_saved_with_their_keys(tmp_path):
    model, x = Dropping(nnx.Rngs(0)), jnp.ones((3, 4))
    model.eval()
    state = nnx.split(model)[1]
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, state, {})
    other = nnx.split(Dropping(nnx.Rngs(5)))[1]
    found = checkpoints.restore(lambda _: other, pytest.fail)[1]
    jax.tree.map(same_bits, found, state)
    keep = {"first": np.arange(6) % 2 == 0}
    small, params = l0jax.narrow(l0jax.trace(model, x), state, keep)
    storage.save_function(small, params, x, folder=tmp_path / "small")
    again = storage.load(tmp_path / "small")
    np.testing.assert_allclose(again(x), small(params, x), rtol=1e-6)


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (3.5, "'w' is a float"),
        ("text", "'w' is a str"),
        (np.array(["a"]), "'w' is of dtype str"),
        (np.zeros(2, "datetime64[s]"), "'w' is of dtype datetime64"),
        (np.zeros(2, np.longdouble), "'w' is of dtype (longdouble|float128)"),
        (np.zeros(2, object), "'w' is of dtype object"),
        (np.zeros(2, jax.dtypes.float0), "'w' is of dtype"),
    ],
)
def test_what_is_no_array_of_jax_is_refused_by_name(leaf, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        storage.save_function(
            lambda p, x: x, {"w": leaf}, jnp.ones(2), folder=tmp_path / "it"
        )
    with pytest.raises(ValueError, match=words):
        Checkpoints(tmp_path / "run").save(1, {"w": leaf}, {})
    assert not list(tmp_path.iterdir())


def test_any_reader_of_safetensors_can_read_the_arrays(tmp_path):
    storage.save(dense("mlp"), tmp_path)
    found = load_file(tmp_path / "arrays.safetensors")
    for path, array in arrays(dense("mlp")).items():
        same_bits(found[path], array)


# -------------------------------------------------------- derivatives, maps, batches


def scaled(params, x, scale):
    """Of arrays that have derivatives and others, and of two outputs."""
    h = jnp.tanh(x @ params["a"]) @ params["b"] * scale[:, None].astype(jnp.float32)
    noise = jax.random.normal(params["key"], h.shape)
    return {"y": h + noise, "next": scale + params["step"]}


def scaled_arguments():
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.float32(rng.normal(size=(4, 6))),
        "b": jnp.float32(rng.normal(size=(6, 2))),
        "key": jax.random.key(3),
        "step": jnp.int32(5),
    }
    return params, jnp.float32(rng.normal(size=(3, 4))), jnp.int32([1, 2, 3])


def alike(found, expected, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol),
        found,
        expected,
    )


def saved(tmp_path, **how):
    params, x, scale = scaled_arguments()
    storage.save_function(scaled, params, x, scale, folder=tmp_path, **how)
    return storage.load(tmp_path)


def of_weights(function, params, x, scale):
    """The loss as a function of what has a derivative."""

    def loss(weights, x):
        return jnp.square(function({**params, **weights}, x, scale)["y"]).mean()

    return loss, {name: params[name] for name in "ab"}, x


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "compiled"])
def test_a_loaded_function_has_the_gradients_of_the_function(wrap, tmp_path):
    again, arguments = saved(tmp_path), scaled_arguments()
    found, expected = (
        wrap(jax.grad(loss, argnums=(0, 1)))(weights, x)
        for loss, weights, x in (
            of_weights(again.apply, *arguments),
            of_weights(scaled, *arguments),
        )
    )
    alike(found, expected)
    assert all((a != 0).any() for a in jax.tree.leaves(expected))


def test_a_loaded_function_can_be_trained(tmp_path):
    again, arguments = saved(tmp_path), scaled_arguments()
    values = []
    for function in (again.apply, scaled):
        loss, weights, x = of_weights(function, *arguments)
        for _ in range(3):
            gradients = jax.grad(loss)(weights, x)
            weights = jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients)
        values.append(weights)
    alike(*values)
    assert (values[0]["a"] != again.params["a"]).any()


def test_maps_are_loops(tmp_path):
    again, (params, x, scale) = saved(tmp_path), scaled_arguments()
    xs = jnp.stack([x, x + 1, 2 * x])
    keys = jax.random.split(jax.random.key(9), 3)
    steps = jnp.arange(3)

    def one(key, step, x):
        return again.apply({**params, "key": key, "step": step}, x, scale)

    found = jax.vmap(one)(keys, steps, xs)
    expected = [one(*each) for each in zip(keys, steps, xs, strict=True)]
    alike(found, jax.tree.map(lambda *a: jnp.stack(a), *expected))
    alike(
        expected[1], scaled({**params, "key": keys[1], "step": steps[1]}, xs[1], scale)
    )
    along = jax.vmap(lambda x: again(x, scale), in_axes=2, out_axes=1)
    alike(
        along(jnp.moveaxis(xs, 0, 2))["y"],
        jax.vmap(again, (0, None), 1)(xs, scale)["y"],
    )
    loss, weights, _ = of_weights(again.apply, params, x, scale)
    gradients = jax.vmap(jax.grad(loss), (None, 0))(weights, xs)
    each = [jax.grad(loss)(weights, x) for x in xs]
    alike(gradients, jax.tree.map(lambda *a: jnp.stack(a), *each))


def test_derivatives_are_as_many_as_were_saved(tmp_path):
    def second(function):
        loss, weights, x = of_weights(function, *scaled_arguments())
        squared = lambda x: jnp.square(jax.grad(loss, 1)(weights, x)).sum()  # noqa: E731
        return jax.grad(squared)(x)

    sizes = []
    for derivatives in (0, 1, 2):
        again = saved(tmp_path, derivatives=derivatives)
        assert again.derivatives == derivatives
        sizes.append((tmp_path / "program.stablehlo").stat().st_size)
        alike(again(*scaled_arguments()[1:]), scaled(*scaled_arguments()))
        if derivatives < 2:
            with pytest.raises(ValueError, match="saved without this derivative"):
                second(again.apply)
    alike(second(again.apply), second(scaled))
    assert sizes[0] < sizes[1] < sizes[2] < 12 * sizes[0]
    with pytest.raises(ValueError, match="at least 0, got -1"):
        saved(tmp_path, derivatives=-1)


def test_a_function_without_derivative_is_saved_and_says_so(tmp_path):
    def power(params, x):
        body = lambda at: (at[0] + 1, at[1] @ params["w"])  # noqa: E731
        return jax.lax.while_loop(lambda at: at[0] < x.sum(), body, (0.0, x))[1]

    params, x = {"w": jnp.eye(3)}, jnp.ones((2, 3))
    with pytest.warns(UserWarning, match="Reverse-mode differentiation does not work"):
        storage.save_function(power, params, x, folder=tmp_path)
    storage.save_function(power, params, x, folder=tmp_path, derivatives=0)
    again = storage.load(tmp_path)
    np.testing.assert_array_equal(again(x), power(params, x))
    with pytest.raises(ValueError, match="saved without this derivative"):
        jax.grad(lambda x: again(x).sum())(x)


def test_other_parameters_must_be_alike(tmp_path):
    again, (params, x, scale) = saved(tmp_path), scaled_arguments()
    with pytest.raises(
        ValueError, match="disagree at 'b': give one array for each of a"
    ):
        again.apply({name: params[name] for name in params if name != "b"}, x, scale)
    with pytest.raises(ValueError, match="hape"):
        again.apply({**params, "a": params["a"][:2]}, x, scale)
    with pytest.raises(ValueError, match="the saved function takes"):
        again.apply(params, x)


MASK = np.tri(3, dtype=np.float32)


def attend(params, x, mask):
    return jnp.einsum("ts,bsd->btd", mask, x) @ params["w"]


def test_an_input_without_batch_is_named_or_refused(tmp_path):
    params = {"w": jnp.ones((4, 2))}
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 3, 4)))
    with pytest.raises(
        ValueError, match=r"inputs\[0\] has 2 .* inputs\[1\] has 3 .*batch=\(0, None\)"
    ):
        storage.save_function(attend, params, x, MASK, folder=tmp_path / "it")
    assert not (tmp_path / "it").exists()
    how = {"folder": tmp_path, "batch": (0, None)}
    shapes = jax.ShapeDtypeStruct(x.shape, x.dtype), jnp.asarray(MASK)
    for inputs in ((x, MASK), shapes):
        storage.save_function(attend, params, *inputs, **how)
        again = storage.load(tmp_path)
        for some in (x, x[:1], jnp.concatenate([x, x])):
            alike(again(some, MASK), attend(params, some, MASK))


def test_the_batch_may_lie_along_any_axis_of_any_leaf(tmp_path):
    def last(params, inputs, bias):
        return {"y": params["w"] @ inputs["x"] + inputs["shift"][None] + bias[:, None]}

    inputs = {"x": jnp.ones((4, 5)), "shift": jnp.arange(5.0)}
    bias, params = jnp.arange(3.0), {"w": jnp.ones((3, 4))}
    axes = ({"x": -1, "shift": 0}, None)
    storage.save_function(last, params, inputs, bias, folder=tmp_path, batch=axes)
    again = storage.load(tmp_path)
    more = {"x": jnp.ones((4, 8)), "shift": jnp.arange(8.0)}
    alike(again(more, bias), last(params, more, bias))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"batch": (0,)}, r"does not fit 2 inputs"),
        ({"batch": (0, 2)}, r"inputs\[1\] of shape \(3, 3\) has no axis 2"),
        ({"batch": ("0", None)}, r"inputs\[0\] of shape \(3, 3, 4\) has no axis '0'"),
        ({"batch": (0, None), "any_batch": False}, "it needs any_batch=True"),
        ({"batch": (None, 0)}, r"batch=\(0, None\); else save it with any_batch=False"),
    ],
)
def test_axes_that_do_not_fit_are_refused(how, words, tmp_path):
    params, x = {"w": jnp.ones((4, 2))}, jnp.ones((3, 3, 4))

    def add(params, x, mask):
        return (x + mask[..., None]) @ params["w"]

    with pytest.raises(ValueError, match=words):
        storage.save_function(add, params, x, MASK, folder=tmp_path / "it", **how)
    assert not (tmp_path / "it").exists()


def test_a_program_is_run_before_it_is_written(tmp_path, monkeypatch):
    """Nothing is written that can't run, or gives something else."""
    calls = []

    def changing(params, x):
        calls.append(1)
        return x * params["w"] + len(calls)

    params, x = {"w": jnp.ones((1, 3))}, jnp.ones((2, 3))
    with pytest.raises(ValueError, match="other values than that of the function"):
        storage.save_function(changing, params, x, folder=tmp_path / "it")

    def shaped(params, x):
        return (
            jnp.zeros((x.shape[0] if type(x.shape[0]) is int else 2, 3)) + params["w"]
        )

    with pytest.raises(ValueError, match=r"output 0 .* of shape \(2, 3\), .* \(3, 3\)"):
        storage.save_function(shaped, params, x, folder=tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_onnx_says_which_extra_is_missing(tmp_path, monkeypatch):
    small, params, inputs = narrowed()
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ImportError, match=r'pip install "l0jax\[onnx\]"'):
        storage.save_onnx(small, params, *inputs, file=tmp_path / "net.onnx")


# ----------------------------------------------------------------------- what changes


@pytest.mark.parametrize("kind", mutations.SAVE)
def test_whatever_changes_is_noticed(kind, tmp_path):
    """The first of the changes of benchmarks/mutations.py, in this process."""
    mutations.SAVE[kind](tmp_path / "whole")
    files = mutations.files_of(tmp_path / "whole")
    mutations.put(files, tmp_path / "it")
    whole = mutations.outcome(kind, tmp_path / "it")
    assert whole.startswith("loaded")
    for seed in range(150):
        rng = random.Random(f"{kind} {seed}")
        newest = "10" if kind == "checkpoint" else ""
        mutations.put(mutations.mutated(files, newest, rng), tmp_path / "it")
        begun = time.perf_counter()
        found = mutations.outcome(kind, tmp_path / "it")
        assert mutations.verdict(found, whole) == "refused", (seed, found)
        assert time.perf_counter() - begun < 10


@pytest.mark.parametrize("kind", ["model", "program"])
def test_what_is_forged_loads_or_is_refused(kind, tmp_path):
    mutations.SAVE[kind](tmp_path / "whole")
    files, words = mutations.files_of(tmp_path / "whole"), set()
    for seed in range(150):
        rng = random.Random(f"{kind} {seed}")
        mutations.put(mutations.forged(files, rng), tmp_path / "it")
        begun = time.perf_counter()
        found = mutations.outcome(kind, tmp_path / "it", forged=True)
        words.add(mutations.verdict(found, ""))
        assert time.perf_counter() - begun < 10
    assert words == {"loaded", "refused"}


def test_no_byte_of_any_file_can_change(tmp_path):
    storage.save(models.MLP((3, 2), rngs=nnx.Rngs(0)), tmp_path)
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        for at in range(len(whole)):
            changed = bytearray(whole)
            changed[at] ^= 1 << at % 8
            file.write_bytes(changed)
            with pytest.raises(ValueError, match="damaged") as error:
                storage.load(tmp_path)
            assert str(tmp_path) in str(error.value)
        file.write_bytes(whole)
    storage.load(tmp_path)


def forge(folder, change):
    """Changes the record, and its digest with it."""
    file = folder / "architecture.json"
    record = encoding.opened(file.read_bytes())
    change(record)
    file.write_text(encoding.sealed(record))


@pytest.mark.parametrize(
    "arguments",
    [
        {"features": [10**15, 10**15, 3]},
        {"features": [12, 7, 10**300]},
        {"features": [12, -7, 3]},
        {"features": [2] * 10**6},
        {"features": [12, 7.5, 3]},
        {"features": [[[[]]]]},
        {"features": "12"},
        {"features": None},
        {"features": []},
        {"features": [12, 7, 5, 3], "rngs": 0},
    ],
)
def test_forged_arguments_build_nothing_absurd(arguments, tmp_path):
    storage.save(dense("mlp"), tmp_path)
    forge(tmp_path, lambda record: record.update(arguments=arguments))
    begun = time.perf_counter()
    with pytest.raises(ValueError, match="damaged") as error:
        storage.load(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert time.perf_counter() - begun < 2


@pytest.mark.sweep
@sweep
def test_sizes_of_every_model_are_bounded_by_its_arrays(name, tmp_path):
    storage.save(dense(name), tmp_path)

    def grow(value):
        if isinstance(value, list):
            return [grow(each) for each in value]
        return value if isinstance(value, bool) else 10**12

    record = encoding.opened((tmp_path / "architecture.json").read_bytes())
    for argument, value in record["arguments"].items():
        grown = {**record["arguments"], argument: grow(value)}
        if grown == record["arguments"]:
            continue
        forge(tmp_path, lambda record, grown=grown: record.update(arguments=grown))
        begun = time.perf_counter()
        with pytest.raises(ValueError, match="no size 1000000000000"):
            storage.load(tmp_path)
        assert time.perf_counter() - begun < 2


@pytest.mark.parametrize("name", ["arrays.safetensors", "architecture.json"])
def test_an_absurdly_large_file_is_not_read(name, tmp_path):
    storage.save(dense("mlp"), tmp_path)
    with (tmp_path / name).open("r+b") as file:
        file.truncate(2**36)  # No disk holds these zeros.
    with pytest.raises(ValueError, match=f"{name} has 68719476736 bytes, at most"):
        storage.load(tmp_path)


def test_folders_of_an_older_version_say_so(tmp_path):
    """As they were before there were digests."""
    storage.save(dense("mlp"), tmp_path)
    described = {"model": "mlp", "arguments": dense("mlp").architecture}
    (tmp_path / "architecture.json").write_text(json.dumps(described, indent=2) + "\n")
    save_file(dict(load_file(tmp_path / "arrays.safetensors")), tmp_path / "x")
    (tmp_path / "x").replace(tmp_path / "arrays.safetensors")
    with pytest.raises(ValueError, match=r"version None, not 2.* save it again"):
        storage.load(tmp_path)


def test_a_program_can_be_read_in_another_process_first(tmp_path, monkeypatch):
    again = saved(tmp_path)
    alike(storage.load(tmp_path, apart=True).params["a"], again.params["a"])
    assert again.text.count("module @") == 2
    monkeypatch.setattr(storage, "_APART", "import os; os.abort()")
    with pytest.raises(ValueError, match="ended with code -6") as error:
        storage.load(tmp_path, apart=True)
    assert str(tmp_path) in str(error.value)
    monkeypatch.setattr(storage, "_APART", "import time; time.sleep(60)")
    monkeypatch.setattr(storage, "_SECONDS_APART", 0.2)
    with pytest.raises(ValueError, match="took another process more than"):
        storage.load(tmp_path, apart=True)


def test_a_name_that_the_format_needs_is_refused(tmp_path):
    params = {"__metadata__": jnp.ones((1, 2))}
    with pytest.raises(ValueError, match="rename the array"):
        storage.save_function(
            lambda p, x: x + p["__metadata__"],
            params,
            jnp.ones((3, 2)),
            folder=tmp_path / "it",
        )
