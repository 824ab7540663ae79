"""The program of the README runs as it is written, with networks of every kind."""

import re
import warnings

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from tests import training_models as models
from tests.test_readme import blocks

(PROGRAM,) = (block for block in blocks("python") if "train.Training(" in block)
EPOCHS = 14


@pytest.fixture(autouse=True)
def promotion_of_optax():
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(program, folder, monkeypatch, **names):
    """Runs a program in a folder; the names that it leaves."""
    monkeypatch.chdir(folder)
    steps = EPOCHS * 15
    given = {
        "loader": models.batches,
        "epochs": EPOCHS,
        "steps": steps,
        "schedule": optax.cosine_decay_schedule(0.1, steps),
        "example": models.digits()[0][:2],
    }
    names = {**given, **names}
    with warnings.catch_warnings():
        # So few steps leave gates undecided, and say so.
        warnings.filterwarnings("ignore", "gates are undecided", UserWarning)
        exec(program, names)
    return names


def check(names, small):
    """It is as small as asked, as good as it says, and what the whole one was."""
    training, state = names["training"], names["state"]
    decision = training.decide(state)
    assert decision.excess["macs"] <= 1e-9
    images, labels = models.digits()
    logits = np.asarray(small(images))
    found = training.evaluate(state, [(images[1500:], labels[1500:])])
    wrong = (logits[1500:].argmax(-1) != labels[1500:]).mean()
    assert found["error"] == pytest.approx(wrong, abs=1e-6)
    assert wrong < 0.2
    whole = training.whole_model(state)
    if not isinstance(whole, nnx.Module):
        apply, variables = whole
        whole = lambda x: apply(variables, x)  # noqa: E731
    np.testing.assert_allclose(logits[:64], whole(images[:64]), rtol=1e-3, atol=1e-4)


def test_it_is_no_longer_than_thirty_lines():
    lines = [line for line in PROGRAM.splitlines() if line.strip()]
    assert len(lines) <= 30


def test_a_module_of_nnx(tmp_path, monkeypatch, capsys):
    model = models.ConvNet(nnx.Rngs(0))
    names = run(PROGRAM, tmp_path, monkeypatch, model=model)
    assert type(names["small"]) is models.ConvNet
    check(names, names["small"])
    assert "multiply-accumulates" in capsys.readouterr().out
    # Once more, it goes on from its last checkpoint: all is done.
    again = run(PROGRAM, tmp_path, monkeypatch, model=model)
    for one, other in zip(
        jax.tree.leaves(nnx.state(names["small"], nnx.Param)),
        jax.tree.leaves(nnx.state(again["small"], nnx.Param)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def with_another_model(of, called="apply(images)", before="(model.apply, model.tree)"):
    """The program with another first argument, whose loss calls a function."""
    program = PROGRAM.replace("loss(model, batch)", "loss(apply, batch)")
    program = program.replace("model(images)", called)
    program = program.replace("    model,\n    loss,", f"    {of},\n    loss,")
    return re.sub(r"l0jax.report\(model", f"l0jax.report({before}", program)


def test_a_module_of_linen(tmp_path, monkeypatch):
    module = models.LinenNet()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    program = with_another_model(
        "train.linen(module, variables, train=False)",
        "apply(images, train=True)",
        "(module, variables)",
    )
    names = run(program, tmp_path, monkeypatch, module=module, variables=variables)
    apply, small = names["small"]
    assert isinstance(module, nn.Module)
    check(names, lambda x: apply(small, x))


def test_a_plain_function(tmp_path, monkeypatch):
    params = models.function().params
    program = with_another_model(
        "train.function(function, params)", before="(function, params)"
    )
    names = run(program, tmp_path, monkeypatch, function=models.apply, params=params)
    apply, small = names["small"]
    check(names, lambda x: apply(small, x))


class Digits:
    """A source of Grain's: an image and its label by number."""

    def __len__(self):
        return 1500

    def __getitem__(self, at):
        images, labels = models.digits()
        return images[at], labels[at]


def loaded(epoch):
    """Batches of Grain's."""
    data = grain.MapDataset.source(Digits()).shuffle(seed=epoch)
    return data.batch(100).to_iter_dataset()


def test_a_model_of_equinox_and_a_loader_of_grain(tmp_path, monkeypatch):
    model = eqx.nn.MLP(64, 10, 48, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)

    def function(params, images):
        images = images.reshape(len(images), -1)
        return jax.vmap(eqx.combine(params, static))(images)

    program = with_another_model(
        "train.function(function, params)", before="(function, params)"
    )
    names = run(
        program, tmp_path, monkeypatch, function=function, params=params, loader=loaded
    )
    assert names["training"].alive.keys() == {"layers.0"}
    apply, small = names["small"]
    check(names, lambda x: apply(small, x))
