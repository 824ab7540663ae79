"""What a network costs, in each of the three conventions that the papers use.

Conventions differ in what they count, so that their numbers can't be compared with one
another; every result names its own.

- `"macs"`: weights left and multiply-accumulates of the removed network, biases not
  counted. Tables of surviving weights in the literature are of this kind.
- `"reference_flops"`: what the reference implementation of Louizos et al. (2018) counts
  in expectation: multiplications and additions apart, a convolution's input channels in
  full, a dense layer's outputs in full. (Its released code reads the spatial size of a
  convolution from the wrong axes; the intended formula is used here.)
- `"flops_objective"`: Tang, Adhikari and Lin (2018): one operation per weight and bias
  and position, survivors on both sides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from l0jax.units import Groups, arrays, expected_size

CONVENTIONS = ("macs", "reference_flops", "flops_objective")


@dataclass(frozen=True)
class Operation:
    """A dense layer or a convolution.

    Args:
        kernel: dotted path of the kernel, laid out (..., inputs, outputs).
        positions: output positions that the kernel is applied to; 1 for a dense layer.
    """

    kernel: str
    positions: int = 1


def weights(
    params: PyTree,
    prob_active: Mapping[str, Float[Array, " units"]],
    groups: Groups,
    operations: Sequence[Operation],
) -> Float[Array, ""]:
    """Expected number of kernel weights left (biases not counted).

    With probabilities that are all 0 or 1 this is the exact number after removal.
    """
    leaves = arrays(params)
    total = jnp.zeros(())
    for op in operations:
        total = total + expected_size(leaves[op.kernel], op.kernel, prob_active, groups)
    return total


def compute(
    params: PyTree,
    prob_active: Mapping[str, Float[Array, " units"]],
    groups: Groups,
    operations: Sequence[Operation],
    convention: str,
) -> Float[Array, ""]:
    """Expected cost of one example, in one of `CONVENTIONS`.

    Raises:
        ValueError: if the convention does not exist.
    """
    if convention not in CONVENTIONS:
        raise ValueError(
            f"unknown convention {convention!r}; there is {', '.join(CONVENTIONS)}"
        )
    leaves = arrays(params)
    total = jnp.zeros(())
    for op in operations:
        kernel = leaves[op.kernel]
        *window, _, outputs = kernel.shape
        left = expected_size(kernel, op.kernel, prob_active, groups)
        size_out = _axis_size(kernel, op.kernel, prob_active, groups, kernel.ndim - 1)
        if convention == "macs":
            total = total + left * op.positions
        elif convention == "flops_objective":
            total = total + (left + size_out) * op.positions
        elif window:
            # (2n - 1) E[out] for the products and sums, E[out] for the bias.
            fan_in = math.prod(kernel.shape[:-1])
            total = total + op.positions * 2 * fan_in * size_out
        else:
            size_in = _axis_size(kernel, op.kernel, prob_active, groups, 0)
            total = total + (2 * size_in - 1) * outputs + outputs
    return total


def _axis_size(kernel, path, prob_active, groups, axis):
    """Expected number of positions left along one axis."""
    along = {
        name: type(group)(
            name,
            group.size,
            tuple(s for s in group.slots if s.path == path and s.axis == axis),
        )
        for name, group in groups.items()
    }
    others = math.prod(n for a, n in enumerate(kernel.shape) if a != axis)
    return expected_size(kernel, path, prob_active, along) / others
