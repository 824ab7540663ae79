"""Removing half of the units, beside Torch-Pruning (Fang et al. 2023).

    python -m benchmarks.against_torch_pruning             # prints numbers and limits
    python -m benchmarks.against_torch_pruning --record    # and writes them down
    pip install torch==2.9.1 torchvision==0.24.1 torch-pruning==1.6.1    # is needed

Networks are torchvision's, and the same in plain JAX (`vision.py`) with the same random
weights; that they compute the same is measured first. Units are whole groups, of which
each loses half; images and classes stay. What is removed is exact if the network
without the units computes what the network computes in which every weight that went is
zero. (That is no aim of Torch-Pruning's, which has networks trained again: means over
units that are gone are means over those that are left.) It is asked for the same: half
of the units of each layer by their magnitude, as in its authors' script for
torchvision. Three minutes on two cores.
"""

import copy
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.measure import entry
from benchmarks.vision import VISION, Vision
from l0jax import Structure, costs, narrow, trace, units

NEEDED = ("torch", "torchvision", "torch_pruning")
RATIO = 0.5
LIMIT = 1e-5


def check_installed() -> None:
    """Raises `SystemExit`, which names what is missing, unless all is there."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)} not installed: "
            "pip install torch==2.9.1 torchvision==0.24.1 torch-pruning==1.6.1"
        )


@dataclass(frozen=True)
class Removal:
    """What one of the two does with a network.

    Args:
        removed: share of the parameters.
        difference: of the network without the units from the one in which their
            weights are zero, over the largest output.
        outputs: of the whole network.
    """

    removed: float
    difference: float
    outputs: np.ndarray


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference over the largest element of the first."""
    if not np.isfinite(one).all():
        raise ValueError("a network without finite values can't be compared")
    return float(abs(one - other).max() / abs(one).max())


# ------------------------------------------------------------------------------- ours


def read(net: Vision, shape: tuple[int, ...]) -> Structure:
    """Nothing is remembered of an earlier reading."""
    jax.clear_caches()
    return trace(net.apply, net.params, jax.ShapeDtypeStruct(shape, jnp.float32))


def ours(net: Vision, params: Any, image: np.ndarray) -> Removal:
    """Half of each group that lies in no image, at random."""
    structure, rng = read(net, image.shape), np.random.default_rng(0)
    keep = {}
    for name, group in structure.groups.items():
        if name not in structure.inputs:
            gone = rng.permutation(group.size)[: int(RATIO * group.size)]
            keep[name] = ~np.isin(np.arange(group.size), gone)
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    gated = units.apply_gates(params, z, structure.groups)
    small, left = narrow(structure, params, keep)
    whole = costs.exact(structure, cost=costs.params)
    apply, x = jax.jit(net.apply), jnp.asarray(image)
    return Removal(
        1 - costs.exact(structure, keep, costs.params) / whole,
        apart(np.asarray(apply(gated, x)), np.asarray(jax.jit(small)(left, x))),
        np.asarray(apply(params, x)),
    )


# ------------------------------------------------------------------------------ theirs

# Of each network the function of torchvision, and the layer that makes its outputs.
THEIRS = {
    "ResNet-50": ("resnet50", "fc"),
    "ViT-B/16": ("vit_b_16", "heads.head"),
    "ConvNeXt-T": ("convnext_tiny", "classifier.2"),
}


def drawn(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Uniform random weights of which no two are equal, so that one can be told by its
    value. Vectors and spreads are positive."""
    size = int(np.prod(shape))
    values = 2 * (rng.permutation(size) + 0.3) / size - 1
    fan = size // shape[0]
    if name.endswith(("class_token", "pos_embedding")):
        values = values / 2
    elif fan == 1:
        values = 0.5 + values / 4
    else:
        values = values * np.sqrt(3 / fan)
    return values.reshape(shape).astype(np.float32)


def survivors(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, ...]:
    """Positions along each axis of `before`, whose elements differ, that are left.

    Raises:
        ValueError: if `after` is not `before` at some positions of each axis.
    """
    order = np.argsort(before, axis=None)
    ranked, found = before.ravel()[order], []
    for axis in range(before.ndim):
        line = np.moveaxis(after, axis, 0).reshape(after.shape[axis], -1)[:, 0]
        rank = np.searchsorted(ranked, line).clip(max=before.size - 1)
        found.append(np.unravel_index(order[rank], before.shape)[axis])
    if not np.array_equal(before[np.ix_(*found)], after):
        raise ValueError(
            f"an array of shape {after.shape} is no part of one of shape {before.shape}"
        )
    return tuple(found)


def masked(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """`before`, zero where `after` has lost it."""
    zero = np.zeros_like(before)
    zero[np.ix_(*survivors(before, after))] = after
    return zero


def torchvision_network(name: str, seed: int = 0) -> Any:
    """With random weights everywhere."""
    import torch
    import torchvision

    network = getattr(torchvision.models, THEIRS[name][0])(weights=None).eval()
    rng = np.random.default_rng(seed)
    for path, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(drawn(path, tuple(value.shape), rng)))
    return network


def in_jax(network: Any) -> dict[str, dict[str, jax.Array]]:
    """Its arrays, as the networks of `vision.py` take them."""
    stats = {path for path, _ in network.named_buffers()}
    found: dict[str, dict[str, jax.Array]] = {"params": {}, "stats": {}}
    for path, value in network.state_dict().items():
        if value.is_floating_point():
            part = "stats" if path in stats else "params"
            found[part][path] = jnp.asarray(value.numpy())
    return found


def build(network: Any, image: np.ndarray) -> Any:
    """The graph of what depends on what, from one example."""
    import torch
    import torch_pruning

    graph = torch_pruning.DependencyGraph()
    return graph.build_dependency(network, torch.from_numpy(image[:1]))


def theirs(name: str, network: Any, image: np.ndarray) -> Removal:
    """Half of the units of each layer but the last, by Torch-Pruning."""
    import torch
    import torch_pruning

    x = torch.from_numpy(image)

    def outputs(network) -> np.ndarray:
        with torch.no_grad():
            return network(x).numpy()

    whole = outputs(network)
    small = copy.deepcopy(network)
    attentions = [
        each
        for each in small.modules()
        if isinstance(each, torch.nn.MultiheadAttention)
    ]
    # As its script for torchvision does: channels that divide among the heads, and the
    # layers within attention left to it. (Told of `num_heads`, it leaves the width of
    # torchvision's ViT as it is.)
    pruner = torch_pruning.pruner.BasePruner(
        small,
        x,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=[
            small.get_submodule(THEIRS[name][1]),
            *(each.out_proj for each in attentions),
        ],
        round_to=max((each.num_heads for each in attentions), default=None),
    )
    pruner.step()
    if hasattr(small, "hidden_dim"):
        # Torchvision's ViT reshapes to the width that it was made with.
        small.hidden_dim = small.conv_proj.out_channels
    left = dict(small.named_parameters())
    zeroed = copy.deepcopy(network)
    with torch.no_grad():
        for path, value in zeroed.named_parameters():
            zero = masked(value.numpy(), left[path].detach().numpy())
            value.copy_(torch.from_numpy(zero))
    before, after = (
        sum(value.numel() for value in each.parameters()) for each in (network, small)
    )
    difference = apart(outputs(zeroed), outputs(small))
    return Removal(1 - after / before, difference, whole)


# ------------------------------------------------------------------------- both of them


def reading(
    name: str, net: Vision, network: Any, image: np.ndarray, them: str, turns: int
) -> dict:
    def mine() -> None:
        read(net, image.shape)

    def other() -> None:
        build(network, image)

    seconds = measure.take_turns({"l0jax": mine, them: other}, turns)
    return entry(
        f"{name}: reading it, its jaxpr included, over {them}'s graph",
        measure.ratio(seconds, "l0jax", them),
        None,
        "×",
        measure.milliseconds(seconds, 1),
    )


def removing(name: str, mine: Removal, other: Removal, them: str) -> list[dict]:
    exact = {
        "value": f"{mine.difference:.0e}",
        "limit": f"≤ {LIMIT:.0e}",
        "verdict": "within" if mine.difference <= LIMIT else "NOT within",
        "detail": f"{them} {other.difference:.0e}, over the largest output",
    }
    alike = apart(other.outputs, mine.outputs)
    return [
        entry(
            f"{name}: parameters that go with half of the units",
            100 * mine.removed,
            None,
            " %",
            f"{them} {100 * other.removed:.2f} %; the two networks' outputs differ by "
            f"{alike:.0e} before",
        ),
        {"what": f"{name}: weights at zero against units removed", **exact},
    ]


def main(arguments) -> list[dict]:
    check_installed()
    them = f"Torch-Pruning {importlib.metadata.version('torch-pruning')}"
    found = []
    for name, make in VISION.items():
        net, network = make(), torchvision_network(name)
        shape = (2, 3, net.side, net.side)
        image = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        found.append(reading(name, net, network, image, them, arguments.turns))
        mine, other = ours(net, in_jax(network), image), theirs(name, network, image)
        found += removing(name, mine, other, them)
    return found


if __name__ == "__main__":
    measure.run(__doc__, "against_torch_pruning", main, turns=7)
