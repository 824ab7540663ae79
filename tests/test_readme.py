"""What the README shows is what happens."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_of_the_library_runs():
    example = next(block for block in blocks("python") if "apply_gates(" in block)
    names = {}
    exec(example, names)
    x = jax.random.normal(jax.random.key(3), (5, 4))
    left = {name: int(flags.sum()) for name, flags in names["keep"].items()}
    assert 0 < left["w1"] < 8, "the example must remove something"
    assert jax.tree.map(jnp.shape, names["small_params"]) == {
        "w1": (left["input"], left["w1"]),
        "b1": (left["w1"],),
        "w2": (left["w1"], 2),
    }
    before = names["apply"](names["gated"], x)
    after = names["small"](names["small_params"], x)
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-6)
    active = {
        name: float(names["gate"].prob_active(logits).sum())
        for name, logits in names["logits"].items()
    }
    expected = active["input"] * active["w1"] + 2 * active["w1"]
    np.testing.assert_allclose(names["macs"], expected, rtol=1e-6)


def test_the_example_of_feature_selection_finds_the_features(capsys):
    (example,) = (block for block in blocks("python") if "Stochastic" in block)
    with jax.numpy_dtype_promotion("standard"):  # (For optax.)
        exec(example, {})
    printed = capsys.readouterr().out.strip()
    assert printed == "[3 7]"
    assert f"# {printed}" in example


def test_the_example_of_relocation_learns_while_it_prunes(capsys):
    (example,) = (block for block in blocks("python") if "relocation" in block)
    names = {}
    with jax.numpy_dtype_promotion("standard"):  # (For optax.)
        exec(example, names)
    printed = capsys.readouterr().out.strip()
    assert f"# {printed}" in example
    right = names["small"](names["x"]).argmax(-1) == names["y"]
    assert right.mean() > 0.9


def test_every_file_that_is_shown_or_linked_exists():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_commands_name_modules_that_exist():
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for module in re.findall(r"python -m (experiments\.[a-z_]+)", text):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def test_the_first_two_commands_are_marked_for_ci():
    for name, what in (("digits", "experiments.mnist"), ("tests", "pytest")):
        marked = re.search(rf"<!-- {name} -->\n```sh\n(.*)\n```", README)
        assert marked is not None, name
        assert marked[1].startswith("pip install -c constraints.txt")
        assert what in marked[1]
