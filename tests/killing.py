"""Programs that are killed while they save, and what they save."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import pytest

from l0jax.checkpoints import Checkpoints


@contextlib.contextmanager
def killed_when(condition: Callable[[str, int], bool]) -> Iterator[None]:
    """What runs within it is killed once it has saved a checkpoint of which
    `condition(name of its folder, step)` holds."""
    save = Checkpoints.save

    def dies(self, step, state, notes):
        save(self, step, state, notes)
        if condition(self.folder.name, step):
            raise KeyboardInterrupt

    with (
        mock.patch.object(Checkpoints, "save", dies),
        pytest.raises(KeyboardInterrupt),
    ):
        yield


@contextlib.contextmanager
def saves() -> Iterator[list[tuple[str, int]]]:
    """The folder's name and the step of each checkpoint that is saved within it."""
    save, seen = Checkpoints.save, []

    def notes_it(self, step, state, notes):
        save(self, step, state, notes)
        seen.append((self.folder.name, step))

    with mock.patch.object(Checkpoints, "save", notes_it):
        yield seen
