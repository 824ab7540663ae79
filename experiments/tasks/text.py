"""Texts by name, as numbers of characters, in three parts.

`tiny_shakespeare` is read by TensorFlow Datasets in its own split; `reference`, what
Python says of its own language, comes with Python and needs no network.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from experiments.tasks import data
from experiments.tasks.dataset import DataError

Characters = Int[np.ndarray, " n"]
TEXTS = ("tiny_shakespeare", "reference")


class Text(NamedTuple):
    """A text in three parts.

    Attributes:
        name: one of `TEXTS`.
        alphabet: the characters of the training part; number i is the i-th of them.
        train, validation, test: numbers of characters.
    """

    name: str
    alphabet: str
    train: Characters
    validation: Characters
    test: Characters

    def encode(self, text: str) -> Characters:
        """The numbers of the characters of a text.

        Raises:
            ValueError: for a character that the alphabet doesn't have.
        """
        return _encoded(text, self.alphabet)

    def decode(self, numbers: Any) -> str:
        """The text of numbers."""
        return "".join(self.alphabet[int(number)] for number in numbers)


def load(name: str) -> Text:
    """A text by name.

    Raises:
        ValueError: if there is no such text.
        DataError: if it is not there and can't be prepared, or can't be read.
    """
    if name not in TEXTS:
        raise ValueError(f"no text {name!r}; there are {', '.join(TEXTS)}")
    train, validation, test = _reference() if name == "reference" else _prepared(name)
    alphabet = "".join(sorted({*train}))
    try:
        parts = [_encoded(part, alphabet) for part in (train, validation, test)]
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
    return Text(name, alphabet, *parts)


def windows_of(numbers: np.ndarray, length: int, step: int) -> np.ndarray:
    """Pieces of a text, each with the character after it.

    Raises:
        ValueError: if the text is shorter than one.
    """
    if len(numbers) <= length:
        raise ValueError(
            f"the text has {len(numbers)} characters, fewer than a window of "
            f"{length} and the one after it; give a smaller length"
        )
    starts = np.arange(0, len(numbers) - length, step)
    return numbers[starts[:, None] + np.arange(length + 1)]


def _encoded(text: str, alphabet: str) -> Characters:
    number = {character: at for at, character in enumerate(alphabet)}
    unknown = sorted({*text} - number.keys())
    if unknown:
        raise ValueError(
            f"the character {unknown[0]!r} is not among the {len(alphabet)} of the "
            f"training text: {alphabet!r}"
        )
    return np.array([number[character] for character in text], np.int32)


def _reference() -> tuple[str, str, str]:
    """Nine tenths, and twice a twentieth."""
    from pydoc_data import topics

    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    # (Rare characters would be missing from a part.)
    text = "".join(each for each in text if each.isascii())
    first, second = len(text) * 18 // 20, len(text) * 19 // 20
    return text[:first], text[first:second], text[second:]


def _prepared(name: str) -> tuple[str, str, str]:
    train, validation, test = data.stored(
        name,
        lambda builder: [
            _whole(builder.as_data_source(split=part))
            for part in ("train", "validation", "test")
        ],
    )
    return train, validation, test


def _whole(part: Any) -> str:
    """All examples of a part, one after the other."""
    found = [example["text"] for example in part]
    if not found:
        raise ValueError("a part has no text")
    return "".join(
        each.decode() if isinstance(each, bytes) else str(each) for each in found
    )
