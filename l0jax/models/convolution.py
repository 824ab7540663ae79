"""Convolutions and poolings whose gradients are fast on CPU too.

On CPU, XLA's own convolution takes most of a training step, and inside `lax.scan` or
`while` it is several times slower still (jax issue 12868). Written as a product of
patches with the batch along the last axis, where every copy is one long run, LeNet-5's
step takes half the time and may be scanned. Elsewhere the library's convolution is
used.

Over clips, where windows reach over the border, a model is read and evaluated through
the library's convolution; only what is differentiated on CPU is a product of patches.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float


def conv2d(
    x: Float[Array, "batch h w inputs"],
    kernel: Float[Array | np.ndarray, "kh kw inputs outputs"],
) -> Float[Array, "batch ho wo outputs"]:
    """Cross-correlation without padding, stride 1."""
    kernel = jnp.asarray(kernel)
    if jax.default_backend() == "cpu":
        return _product_of_patches(x, kernel)
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def max_pool_2x2(
    x: Float[Array, "batch h w channels"],
) -> Float[Array, "batch h//2 w//2 channels"]:
    """2x2 max pooling with stride 2; an odd last row or column is dropped.

    By pairwise maxima: the backward pass of `reduce_window` is several times slower on
    CPU. Where two values tie, each gets half of the gradient.
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].transpose(3, 1, 2, 0)
    x = x.reshape(channels, height // 2, 2, width // 2, 2, batch)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1]).transpose(3, 1, 2, 0)


@jax.custom_vjp
def _product_of_patches(x, kernel):
    return _forward(x, kernel)[0]


def _forward(x, kernel):
    height, width, inputs, outputs = kernel.shape
    patches = _patches(x.transpose(3, 1, 2, 0), height, width)
    y = kernel.reshape(-1, outputs).T @ patches.reshape(height * width * inputs, -1)
    y = y.reshape(outputs, *patches.shape[1:]).transpose(3, 1, 2, 0)
    return y, (patches, kernel)


def _backward(saved, dy):
    patches, kernel = saved
    height, width, inputs, outputs = kernel.shape
    _, rows, columns, batch = patches.shape
    dy = dy.transpose(3, 1, 2, 0).reshape(outputs, -1)
    dkernel = (dy @ patches.reshape(height * width * inputs, -1).T).T
    dpatches = (kernel.reshape(-1, outputs) @ dy).reshape(
        height, width, inputs, rows, columns, batch
    )
    dx = jnp.zeros((inputs, rows + height - 1, columns + width - 1, batch), dy.dtype)
    for i in range(height):
        for j in range(width):
            dx = dx.at[:, i : i + rows, j : j + columns].add(dpatches[i, j])
    return dx.transpose(3, 1, 2, 0), dkernel.reshape(kernel.shape)


_product_of_patches.defvjp(_forward, _backward)


def _patches(x, height: int, width: int):
    """(inputs, h, w, batch) -> (height * width * inputs, ho, wo, batch)."""
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    # Columns first, then rows: two cheap copies instead of one of every window.
    x = jnp.concatenate([x[:, :, j : j + columns] for j in range(width)])
    return jnp.concatenate([x[:, i : i + rows] for i in range(height)])


# ------------------------------------------------------------------------------ clips


def conv3d(
    x: Float[Array, "batch t h w inputs"],
    kernel: Float[Array | np.ndarray, "kt kh kw inputs outputs"],
    strides: Sequence[int] = (1, 1, 1),
) -> Float[Array, "batch to ho wo outputs"]:
    """Cross-correlation, padded so that stride 1 keeps the size: TensorFlow's SAME."""
    kernel, strides = jnp.asarray(kernel), tuple(strides)
    # Of one position, the gradients of XLA's are products already.
    if jax.default_backend() == "cpu" and max(kernel.shape[:3]) > 1:
        return _conv3d(x, kernel, strides)
    return _xla_conv3d(x, kernel, strides)


def max_pool_3d(
    x: Float[Array, "batch t h w channels"],
    window: Sequence[int],
    strides: Sequence[int],
) -> Float[Array, "batch to ho wo channels"]:
    """Max pooling, padded so that stride 1 keeps the size: TensorFlow's SAME.

    On CPU, where values tie, the gradient is shared among them.
    """
    window, strides = tuple(window), tuple(strides)
    if jax.default_backend() == "cpu":
        return _max_pool_3d(x, window, strides)
    return _xla_max_pool_3d(x, window, strides)


def _xla_conv3d(x, kernel, strides):
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=numbers
    )


def _xla_max_pool_3d(x, window, strides):
    return nnx.max_pool(x, window, strides=strides, padding="SAME")


def _patches_conv3d(x, kernel, strides):
    window, outputs = kernel.shape[:3], kernel.shape[4]
    x = _padded(x, window, strides, 0.0)
    for axis in (3, 2, 1):
        x = jnp.concatenate(_shifts(x, axis, window[axis - 1], strides[axis - 1]))
    y = kernel.reshape(-1, outputs).T @ x.reshape(x.shape[0], -1)
    return y.reshape(outputs, *x.shape[1:]).transpose(4, 1, 2, 3, 0)


def _pairwise_max_pool_3d(x, window, strides):
    x = _padded(x, window, strides, -jnp.inf)
    for axis in (3, 2, 1):
        shifted = _shifts(x, axis, window[axis - 1], strides[axis - 1])
        x = functools.reduce(jnp.maximum, shifted)
    return x.transpose(4, 1, 2, 3, 0)


def _padded(x, window, strides, value):
    """(batch, t, h, w, channels) -> (channels, t, h, w, batch) with the borders."""
    pads = jax.lax.padtype_to_pads(x.shape[1:4], window, strides, "SAME")
    x = x.transpose(4, 1, 2, 3, 0)
    return jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=value)


def _shifts(x, axis: int, window: int, stride: int) -> list:
    """What stands at each place of a window that moves along an axis."""
    reach = (x.shape[axis] - window) // stride * stride
    return [
        jax.lax.slice_in_dim(x, at, at + reach + 1, stride, axis)
        for at in range(window)
    ]


def _differentiated_as(evaluated, differentiated, moves):
    """`evaluated`, whose gradients by its first `moves` arguments are the other's."""
    fixed = tuple(range(moves, 3))
    function = jax.custom_vjp(evaluated, nondiff_argnums=fixed)

    def forward(*arguments):
        moving, still = arguments[:moves], arguments[moves:]
        return jax.vjp(lambda *each: differentiated(*each, *still), *moving)

    def backward(*arguments):
        pull, dy = arguments[-2:]
        return pull(dy)

    function.defvjp(forward, backward)
    return function


_conv3d = _differentiated_as(_xla_conv3d, _patches_conv3d, 2)
_max_pool_3d = _differentiated_as(_xla_max_pool_3d, _pairwise_max_pool_3d, 1)
