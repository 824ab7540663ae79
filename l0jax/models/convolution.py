"""A convolution and a pooling whose gradients are fast on CPU too.

On CPU, XLA's own convolution takes most of a training step, and inside `lax.scan` or
`while` it is several times slower still (jax issue 12868). Written as a product of
patches with the batch along the last axis, where every copy is one long run, LeNet-5's
step takes half the time and may be scanned. Elsewhere the library's convolution is
used.
"""

import jax
import jax.numpy as jnp
import numpy as np
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
