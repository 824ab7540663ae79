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
    before, after = names["gated"], names["small"]
    x = jax.random.normal(jax.random.key(3), (5, 4))

    def network(params):
        return jax.nn.relu(x @ params["w1"] + params["b1"][None]) @ params["w2"]

    left = int((names["z"]["hidden"] > 0).sum())
    assert 0 < left < 8, "the example must remove something"
    assert jax.tree.map(jnp.shape, after) == {
        "w1": (4, left),
        "b1": (left,),
        "w2": (left, 2),
    }
    np.testing.assert_allclose(network(before), network(after), rtol=1e-5, atol=1e-6)
    # Eight rows of two weights, each there with P(z != 0).
    active = names["gate"].prob_active(names["logits"]["hidden"])
    np.testing.assert_allclose(names["cost"], 2 * active.sum(), rtol=1e-6)


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
