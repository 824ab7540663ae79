"""Sizes that modules remember, told anew when their arrays are smaller.

What Flax's NNX layers remember is known. Layers that were made by `nnx.vmap` have
arrays with more axes than they know of, one for each stack: they remember the sizes of
a single layer. Of what a user's own class remembers the user says which units it
counts.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core import FrozenDict
from jaxtyping import PyTree

from l0jax.equivalence import CantShrink
from l0jax.units import Groups, Keep, Masks, path_of

Attributes = Mapping[str, str | Sequence[str]]
"""Sizes that a module keeps itself: `{"blocks.0.heads": "blocks.0.query"}` says that
this attribute counts the units of that group, or of each unit of several groups all of
those of the others, `("blocks.0.query", "blocks.0.query:1")`."""


@dataclass
class Rescaled:
    """What makes up for sizes that norms divide by.

    Attributes:
        factors: of arrays, by path.
        numbers: in which the programs of the layers differ: sizes, ε, and factors.
    """

    factors: dict[str, float] = field(default_factory=dict)
    numbers: set[float] = field(default_factory=set)

    def params(self, tree: PyTree) -> PyTree:
        """`tree` with its arrays multiplied."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                leaf * np.asarray(self.factors[path_of(path)], leaf.dtype)
                if path_of(path) in self.factors
                else leaf
            ),
            tree,
        )


@dataclass(frozen=True)
class Layer:
    """A layer, before and after its arrays became smaller.

    Attributes:
        before: the layer before.
        after: the layer whose arrays are smaller, and whose sizes are still those of
            `before`.
        path: where it is, as `"blocks.0.conv"`.
        masks: which positions are left of the arrays.
        rescaled: by what arrays must be multiplied, by path, and numbers that make up
            for it.
    """

    before: Any
    after: Any
    path: str
    masks: Masks
    rescaled: "Rescaled"

    def path_of(self, name: str) -> str:
        """The path of one of its arrays."""
        return f"{self.path}.{name}".lstrip(".")

    def axes(self, name: str, sizes: Sequence[int]) -> tuple[int, ...]:
        """Which axes of an array are the layer's own; the others are of stacks.

        Raises:
            CantShrink: if the array has no axes of these sizes.
        """
        old, new = (getattr(each, name).shape for each in (self.before, self.after))
        changed = {at for at, (a, b) in enumerate(zip(old, new, strict=True)) if a != b}
        # The last ones, where several do: stacks come first, if nothing is said. Where
        # a stack is as large as the layer, its own axes are those that lost units.
        for axes in itertools.combinations(range(len(old))[::-1], len(sizes)):
            axes = axes[::-1]
            if tuple(old[at] for at in axes) == tuple(sizes) and changed <= {*axes}:
                return axes
        raise CantShrink(
            f"{type(self.after).__name__} at {self.path!r} remembers the sizes "
            f"{tuple(sizes)} of {name}, which had the shape {old} and now has {new}"
        )

    def sizes(self, name: str, sizes: Sequence[int]) -> tuple[int, ...]:
        """What is left of the sizes that the layer remembers of an array.

        Raises:
            CantShrink: as `axes`.
        """
        shape = getattr(self.after, name).shape
        return tuple(shape[at] for at in self.axes(name, sizes))

    def has(self, name: str) -> bool:
        """Whether there is such an array."""
        return getattr(self.after, name, None) is not None


def tell(before: nnx.Module, after: nnx.Module, masks: Masks) -> "Rescaled":
    """Tells the layers of a module what their sizes are.

    A norm by the mean square of d numbers, of which d' are left and the others were
    zero, is the norm of these d' with the scale times √(d/d') and ε times d/d'.

    Args:
        before: a module.
        after: a copy of it with smaller arrays, which is changed.
        masks: which positions are left of the arrays.

    Returns:
        By what arrays of `after` must be multiplied so that it is the same function.

    Raises:
        CantShrink: if an array of a layer does not have the sizes that the layer says.
    """
    rescaled = Rescaled()
    for kinds in (LAYERS, OF_LAYERS):
        for (path, old), (_, new) in zip(
            nnx.iter_modules(before), nnx.iter_modules(after), strict=True
        ):
            for kind, told in kinds.items():
                if isinstance(new, kind):
                    told(Layer(old, new, ".".join(map(str, path)), masks, rescaled))
    return rescaled


def _linear(layer: Layer) -> None:
    new = layer.after
    new.in_features, new.out_features = layer.sizes(
        "kernel", (new.in_features, new.out_features)
    )


def _linear_general(layer: Layer) -> None:
    new = layer.after
    batch = tuple(new.batch_axis.values())
    left = layer.sizes("kernel", (*batch, *new.in_features, *new.out_features))
    inside = len(batch) + len(new.in_features)
    new.batch_axis = FrozenDict(zip(new.batch_axis, left[: len(batch)], strict=True))
    new.in_features, new.out_features = left[len(batch) : inside], left[inside:]


def _einsum(layer: Layer) -> None:
    new = layer.after
    new.kernel_shape = layer.sizes("kernel", new.kernel_shape)
    if new.bias_shape is not None:
        new.bias_shape = layer.sizes("bias", new.bias_shape)


def _conv(layer: Layer) -> None:
    new = layer.after
    before = new.feature_group_count
    axes = layer.axes("kernel", new.kernel_shape)
    *_, inside, outputs = new.kernel_shape = layer.sizes("kernel", new.kernel_shape)
    flags = layer.masks.get((layer.path_of("kernel"), axes[-1]))
    if before > 1 and flags is not None:
        new.feature_group_count = int(flags.reshape(before, -1).any(1).sum())
    new.in_features = inside * new.feature_group_count
    new.out_features = outputs


def _conv_transpose(layer: Layer) -> None:
    new = layer.after
    *_, inside, outputs = new.kernel_shape = layer.sizes("kernel", new.kernel_shape)
    if new.transpose_kernel:
        inside, outputs = outputs, inside
    new.in_features, new.out_features = inside, outputs


def _norm(layer: Layer) -> None:
    for name in ("scale", "bias", "mean", "var"):
        if layer.has(name):
            (left,) = layer.sizes(name, (layer.before.num_features,))
            layer.after.num_features = left


def _rms_norm(layer: Layer) -> None:
    new, before = layer.after, layer.before.num_features
    _norm(layer)
    features, over = (
        {*axes} if isinstance(axes, Sequence) else {axes}
        for axes in (new.feature_axes, new.reduction_axes)
    )
    left = new.num_features
    if left == before or not features <= over:
        return
    new.epsilon = layer.before.epsilon * before / left
    factor = math.sqrt(before / left)
    layer.rescaled.factors[layer.path_of("scale")] = factor
    layer.rescaled.numbers.update(
        (float(before), float(left), factor, layer.before.epsilon, new.epsilon)
    )


def _group_norm(layer: Layer) -> None:
    new, before = layer.after, layer.before
    whole = before.num_groups * before.group_size
    for name in ("scale", "bias"):
        if layer.has(name):
            (left,) = layer.sizes(name, (whole,))
            # (Of each group all channels, or of all groups some.)
            flags = layer.masks.get(
                (layer.path_of(name), layer.axes(name, (whole,))[0])
            )
            if flags is not None:
                grouped = flags.reshape(before.num_groups, before.group_size)
                new.num_groups = int(grouped.any(axis=1).sum())
                new.group_size = left // max(new.num_groups, 1)


def _embed(layer: Layer) -> None:
    new = layer.after
    new.num_embeddings, new.features = layer.sizes(
        "embedding", (new.num_embeddings, new.features)
    )


def _lora(layer: Layer) -> None:
    new = layer.after
    # The rank is remembered by nobody; where a stack is last, another axis is taken for
    # it, which has no sizes to tell either.
    rank = layer.before.lora_a.shape[-1]
    new.in_features, _ = layer.sizes("lora_a", (new.in_features, rank))
    _, new.out_features = layer.sizes("lora_b", (rank, new.out_features))


# What consists of layers, which know their sizes by now.


def _attention(layer: Layer) -> None:
    new = layer.after
    (new.in_features,), (new.num_heads, new.head_dim) = (
        new.query.in_features,
        new.query.out_features,
    )
    new.qkv_features = math.prod(new.query.out_features)
    (new.in_kv_features,), (new.num_kv_heads, _) = (
        new.key.in_features,
        new.key.out_features,
    )
    (new.out_features,) = new.out.out_features


def _cell(inputs: str, hidden: str) -> Callable[[Layer], None]:
    def told(layer: Layer) -> None:
        new = layer.after
        new.in_features = getattr(new, inputs).in_features
        new.hidden_features = getattr(new, hidden).in_features

    return told


LAYERS: dict[type, Callable[[Layer], None]] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
    nnx.Conv: _conv,
    nnx.ConvTranspose: _conv_transpose,
    nnx.BatchNorm: _norm,
    nnx.LayerNorm: _norm,
    nnx.RMSNorm: _rms_norm,
    nnx.InstanceNorm: _norm,
    nnx.GroupNorm: _group_norm,
    nnx.Embed: _embed,
    nnx.LoRA: _lora,
}
OF_LAYERS: dict[type, Callable[[Layer], None]] = {
    nnx.MultiHeadAttention: _attention,
    nnx.LSTMCell: _cell("ii", "hi"),
    nnx.OptimizedLSTMCell: _cell("dense_i", "dense_h"),
    nnx.GRUCell: _cell("dense_i", "dense_h"),
    nnx.SimpleCell: _cell("dense_i", "dense_h"),
}


# ------------------------------------------------------------ what a user's class keeps


def counted(
    value: Any, attribute: str, named: str | Sequence[str], keep: Keep, groups: Groups
) -> int:
    """What an attribute says when some of the units that it counts are gone.

    Raises:
        ValueError: if there is no such group, or the attribute is no multiple of the
            number of units.
    """
    names = (named,) if isinstance(named, str) else tuple(named)
    for name in names:
        if name not in groups:
            raise ValueError(
                f"attribute {attribute!r} is said to count the units of {name!r}; "
                f"there is {', '.join(groups) or 'no group'}"
            )
    before = math.prod(groups[name].size for name in names)
    after = math.prod(
        int(np.sum(keep[name])) if name in keep else groups[name].size for name in names
    )
    if isinstance(value, bool) or not isinstance(value, int) or value % before:
        raise ValueError(
            f"attribute {attribute!r} is {value!r}, no multiple of the {before} units "
            f"of {' times '.join(names)} that it is said to count"
        )
    return value // before * after


def recount(
    module: nnx.Module, attributes: Attributes, keep: Keep, groups: Groups
) -> None:
    """Tells a module the sizes that it keeps in attributes of its own.

    Raises:
        ValueError: as `counted`; if there is no such attribute.
    """
    for attribute, named in attributes.items():
        *outside, last = attribute.split(".")
        holder = module
        for name in outside:
            holder = _inside(holder, name, attribute)
        value = _inside(holder, last, attribute)
        new = counted(value, attribute, named, keep, groups)
        if not isinstance(holder, nnx.Module):
            raise ValueError(
                f"attribute {attribute!r} is in a {type(holder).__name__}; a size must "
                "be an attribute of a module"
            )
        setattr(holder, last, new)


def _inside(holder: Any, name: str, attribute: str) -> Any:
    if isinstance(holder, Sequence) and name.isdecimal() and int(name) < len(holder):
        return holder[int(name)]
    if isinstance(holder, Mapping) and name in holder:
        return holder[name]
    if hasattr(holder, name):
        return getattr(holder, name)
    there = sorted(each for each in getattr(holder, "__dict__", ()) if each[0] != "_")
    raise ValueError(
        f"there is no attribute {attribute!r}: {type(holder).__name__} has no {name!r}"
        f"; it has {', '.join(there) or 'none'}"
    )
