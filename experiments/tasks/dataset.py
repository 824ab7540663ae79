"""A data set in three parts, and the error that says it can't be had."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8


class DataError(RuntimeError):
    """A data set is not there and can't be prepared, or can't be read."""


class Split(NamedTuple):
    """Images, or clips of them, and the class of each."""

    images: UInt8[np.ndarray, "n *frames h w c"]
    labels: Int32[np.ndarray, " n"]


@dataclass(frozen=True)
class Dataset:
    """A data set in three parts, each in the order of the stored examples; `ucf101` is
    in that of its groups.

    Args:
        name: one of `DATASETS` or `VIDEOS`.
        train: what is left of the stored training examples.
        validation: what is held out of them.
        test: the test examples.
        classes: the number of classes; labels lie in `range(classes)`.
        scale: `images / scale` lies in [0, 1].
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    scale: float
