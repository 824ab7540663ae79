"""ONNX files do in ONNX Runtime what the functions do in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import l0jax
from benchmarks.networks import NETWORKS
from l0jax import models, storage

pytest.importorskip("jax2onnx", reason='needs the extra: pip install "l0jax[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def any_rank():
    """The converter traces layers that add vectors to matrices."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


SMALL = {
    "mlp": {"features": (9, 7, 5, 3)},
    "lenet5": {"shape": (16, 16, 1), "maps": (3, 4), "hidden": 6, "classes": 3},
}


def without_last(structure):
    return {
        name: np.arange(group.size) < group.size - 1
        for name, group in structure.groups.items()
        if group.size > 1
    }


@pytest.mark.parametrize(
    "name",
    ["mobilenet", "resnet_post_activation", "unet", "transformer", "recurrent"],
)
def test_narrowed_networks(name, tmp_path):
    net = NETWORKS[name]()
    structure = l0jax.trace(net.apply, net.params, *net.inputs)
    small, params = l0jax.narrow(structure, net.params, without_last(structure))
    worst = storage.save_onnx(small, params, *net.inputs, file=tmp_path / "net.onnx")
    assert worst <= 1e-5
    assert (tmp_path / "net.onnx").is_file()


@pytest.mark.parametrize("kind", ["mlp", "lenet5"])
def test_shrunk_models(kind, tmp_path):
    model = models.make(kind, SMALL[kind], rngs=nnx.Rngs(0))
    structure = models.structure(model)
    graph, state = nnx.split(
        l0jax.nnx.shrink(model, without_last(structure), structure)
    )
    x = np.random.default_rng(0).normal(size=(3, *model.example.shape[1:]))

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    worst = storage.save_onnx(apply, state, np.float32(x), file=tmp_path / "net.onnx")
    assert worst <= 1e-5


def test_a_batch_that_is_bound_stays_so(tmp_path):
    def apply(params, x):
        return x.reshape(-1, 6) @ params["a"] if x.shape[0] > 2 else x @ params["a"]

    params, x = {"a": jnp.ones((6, 2))}, jnp.ones((3, 6))
    with pytest.raises(ValueError, match="any_batch=False"):
        storage.save_onnx(apply, params, x, file=tmp_path / "net.onnx")
    storage.save_onnx(apply, params, x, file=tmp_path / "net.onnx", any_batch=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (given,) = session.get_inputs()
    assert given.shape == [3, 6]


def test_a_file_that_does_something_else_is_refused(tmp_path, monkeypatch):
    """A converter that goes wrong in one weight."""
    import jax2onnx

    convert = jax2onnx.to_onnx
    wrong = {"a": jnp.ones((6, 2)).at[3, 1].set(1.01)}

    def to_onnx(function, *args, **kwargs):
        return convert(lambda x: apply(wrong, x), *args, **kwargs)

    def apply(params, x):
        return x @ params["a"]

    monkeypatch.setattr(jax2onnx, "to_onnx", to_onnx)
    params, x = {"a": jnp.ones((6, 2))}, jnp.ones((3, 6))
    with pytest.raises(ValueError, match="differ from JAX's by"):
        storage.save_onnx(apply, params, x, file=tmp_path / "net.onnx")
