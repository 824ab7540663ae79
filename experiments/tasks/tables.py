"""Tables by name, in which features are looked for: a row for each example.

`breast_cancer`, `digits` and `wine` are the classification sets with five features and
more that scikit-learn ships. `madelon_like` is drawn by the generator that was written
for the Madelon set (Guyon, NIPS 2003 challenge), `make_classification`: 5 features
tell the class, 15 are mixtures of these, 180 are noise. Of `xor_…` and `ring_…` the
features that tell the class are known, 0 and 1, beside as many columns of noise as the
name says. `mnist` are the pixels, read as `experiments.tasks.data` does.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from sklearn import datasets
from sklearn.model_selection import train_test_split

from experiments.tasks import data

STORED = ("breast_cancer", "digits", "wine")
KNOWN = ("xor_20", "xor_50", "ring_20", "ring_50")
NAMES = ("mnist", *STORED, "madelon_like", *KNOWN)
DRAWN = 2_500
"""Examples that are drawn where a set is made up."""


class Part(NamedTuple):
    """Features of some examples, and the class of each."""

    inputs: Float[np.ndarray, "examples features"]
    labels: Int[np.ndarray, " examples"]


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Examples to train with, to choose with and to test with.

    Attributes:
        name: of the set.
        train, validation, test: its parts.
        truth: the features that tell the class, where that is known.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    truth: tuple[int, ...] | None = None

    @property
    def features(self) -> int:
        """How many there are."""
        return self.train.inputs.shape[1]

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(self.train.labels.max()) + 1

    @property
    def known(self) -> Part:
        """All that may be trained with when nothing is left to choose: first what is
        trained with before, then the validation part."""
        parts = zip(self.train, self.validation, strict=True)
        return Part(*(np.concatenate(both) for both in parts))


def check(name: str) -> None:
    """Raises ValueError if there is no such set."""
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}; there is {', '.join(NAMES)}")


def load(name: str, seed: int) -> Table:
    """A set by name.

    Args:
        name: one of `NAMES`.
        seed: of the split, three fifths, one and one, by which features are
            standardised; of the examples where they are drawn. MNIST has one split.

    Raises:
        ValueError: if there is no such set.
        DataError: if MNIST can't be read.
    """
    check(name)
    if name == "mnist":
        return Table(name, *pixels())
    inputs, labels = _stored(name) if name in STORED else _drawn(name, seed)
    rows = np.arange(len(labels))
    rest, test = train_test_split(
        rows, test_size=0.2, stratify=labels, random_state=seed
    )
    train, validation = train_test_split(
        rest, test_size=0.25, stratify=labels[rest], random_state=seed
    )
    deviation = inputs[train].std(axis=0)
    # (The corners of the digits are always white.)
    scaled = (inputs - inputs[train].mean(axis=0)) / np.where(deviation, deviation, 1)
    parts = [
        Part(scaled[part].astype(np.float32), labels[part].astype(np.int32))
        for part in (train, validation, test)
    ]
    return Table(name, *parts, truth=(0, 1) if name in KNOWN else None)


@functools.cache
def pixels() -> tuple[Part, Part, Part]:
    """The three parts of MNIST, in [0, 1]."""
    images = data.load("mnist", 1 / 12)
    train, validation, test = (
        Part(
            part.images.reshape(len(part.labels), -1) / np.float32(images.scale),
            part.labels.astype(np.int32),
        )
        for part in (images.train, images.validation, images.test)
    )
    return train, validation, test


def _stored(name: str) -> tuple[np.ndarray, np.ndarray]:
    found: Any = getattr(datasets, f"load_{name}")()
    return found.data, found.target


def _drawn(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if name == "madelon_like":
        return datasets.make_classification(
            DRAWN,
            200,
            n_informative=5,
            n_redundant=15,
            n_clusters_per_class=16,
            flip_y=0.01,
            random_state=0,  # Another one would have other features that tell.
        )
    kind, noise = name.split("_")
    inputs = np.random.default_rng(seed).normal(size=(DRAWN, 2 + int(noise)))
    one, other = inputs[:, 0], inputs[:, 1]
    if kind == "xor":
        return inputs, one * other > 0
    # The median of a squared radius of two normal numbers.
    return inputs, one**2 + other**2 > 2 * np.log(2)
