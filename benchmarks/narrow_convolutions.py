"""What a convolution saves when half of the channels between two of them are gone.

    python -m benchmarks.narrow_convolutions             # prints ratios
    python -m benchmarks.narrow_convolutions --record    # and writes them down

The two 3x3 convolutions of a residual block at the sizes of the ResNet-20 of half its
width that `experiments.channel_rows` prunes, for 128 images. Half a minute.
"""

import statistics
from collections.abc import Callable

import jax

from benchmarks import measure
from benchmarks.measure import entry, ratio, take_turns

BATCH = 128
SIZES = ((32, 8), (16, 16), (8, 32))


def convolution(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=dimensions
    )


def pair(size: int, channels: int, inner: int) -> Callable[[], None]:
    """Both convolutions of a block, compiled."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (BATCH, size, size, channels))
    first = jax.random.normal(keys[1], (3, 3, channels, inner))
    second = jax.random.normal(keys[2], (3, 3, inner, channels))
    both = jax.jit(lambda x, a, b: convolution(jax.nn.relu(convolution(x, a)), b))

    def go():
        both(x, first, second).block_until_ready()

    go()
    return go


def main(arguments) -> list[dict]:
    lines = []
    for size, channels in SIZES:
        blocks = {
            "whole": pair(size, channels, channels),
            "half": pair(size, channels, channels // 2),
        }
        seconds = take_turns(blocks, arguments.turns)
        whole, half = (1e3 * statistics.median(seconds[name]) for name in blocks)
        lines.append(
            entry(
                f"{size}x{size} positions: {channels}, {channels // 2}, {channels} "
                f"channels over {channels} in all three places",
                ratio(seconds, "half", "whole"),
                None,
                "×",
                f"{half:.2f} ms and {whole:.2f} ms for {BATCH} images; 0.5 × the "
                "multiply-accumulates",
            )
        )
    return lines


if __name__ == "__main__":
    measure.run(__doc__, "narrow_convolutions", main, turns=100)
