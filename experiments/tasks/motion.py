"""Clips of moving digits: what moves where is what is to be told."""

import numpy as np
from jaxtyping import UInt8

from experiments.tasks.dataset import Split

# The rows and columns that a clip of each class moves by, per frame and unit of speed.
DIRECTIONS = {
    "north": (-1, 0),
    "north-east": (-1, 1),
    "east": (0, 1),
    "south-east": (1, 1),
    "south": (1, 0),
    "south-west": (1, -1),
    "west": (0, -1),
    "north-west": (-1, -1),
}
SPEEDS = (1, 2, 3)  # pixels per frame, along each axis that the digit moves on


def motion(
    digits: UInt8[np.ndarray, "digits h w 1"],
    clips: int,
    seed: int,
    *,
    frames: int = 16,
    size: int = 32,
) -> Split:
    """Clips of digits that move in one of eight directions, which is the class.

    A digit moves by whole pixels on a torus: what leaves on one side comes back on the
    other. Digit, speed and place at the start are drawn independently of the class, the
    place uniformly; so it is uniform in every frame, and no single frame tells anything
    about the class. The mean of a clip over time is a streak along the axis of motion.
    It leaves two opposite directions, one of which is the other backwards.

    The classes are as frequent as each other, up to one clip. No two clips show the
    same digit.

    Args:
        digits: what moves, on a black ground, no larger than a frame.
        clips: how many.
        seed: of what is drawn.
        frames: of each clip.
        size: height and width of a frame.

    Raises:
        ValueError: if there are fewer digits than clips, or larger ones than frames.
    """
    count, height, width, _ = digits.shape
    if count < clips:
        raise ValueError(
            f"{clips} clips of one digit each are asked for, and there are {count} "
            "digits: ask for no more"
        )
    if max(height, width) > size:
        raise ValueError(
            f"digits of {height}x{width} pixels don't fit frames of {size}x{size}: "
            f"{max(height, width)} would do"
        )
    # RandomState, for its stream is frozen; that of default_rng may change with NumPy.
    rng = np.random.RandomState(seed)
    shown = rng.permutation(count)[:clips]
    labels = rng.permutation(np.arange(clips, dtype=np.int32) % len(DIRECTIONS))
    start = rng.randint(size, size=(clips, 2))
    speed = rng.choice(SPEEDS, size=(clips, 1))
    step = speed * np.array(list(DIRECTIONS.values()))[labels]
    ground = np.zeros((clips, size, size), np.uint8)
    ground[:, :height, :width] = digits[shown, ..., 0]
    images = np.empty((clips, frames, size, size, 1), np.uint8)
    each = np.arange(clips)[:, None, None]
    for frame in range(frames):
        # The pixel that is seen here now, on the digit's own canvas.
        from_ = (
            np.arange(size)[:, None] - start[:, None] - frame * step[:, None]
        ) % size
        rows, columns = from_[..., 0, None], from_[:, None, :, 1]
        images[:, frame, ..., 0] = ground[each, rows, columns]
    return Split(images, labels)
