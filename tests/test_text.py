"""Texts are read whole, in the parts that they have, as numbers of characters."""

import os
from pathlib import Path

import numpy as np
import pytest

from experiments.tasks import text
from experiments.tasks.dataset import DataError

SHAKESPEARE = Path(os.environ.get("TFDS_DATA_DIR", "nowhere")) / "tiny_shakespeare"


def test_the_reference_comes_with_python():
    found = text.load("reference")
    assert len(found.train) > 15 * len(found.validation) > 100_000
    assert abs(len(found.validation) - len(found.test)) <= 1
    assert list(found.alphabet) == sorted({*found.alphabet})
    for part in (found.train, found.validation, found.test):
        assert part.dtype == np.int32
        assert 0 <= part.min() <= part.max() < len(found.alphabet)
    assert "statement" in found.decode(found.train)
    said = found.decode(found.train[100:200])
    np.testing.assert_array_equal(found.encode(said), found.train[100:200])


@pytest.mark.skipif(not SHAKESPEARE.is_dir(), reason="not prepared")
def test_shakespeare_is_that_of_tfds():
    found = text.load("tiny_shakespeare")
    parts = found.train, found.validation, found.test
    assert tuple(map(len, parts)) == (1_003_854, 55_770, 55_770)
    assert len(found.alphabet) == 65
    assert found.decode(found.train[:14]) == "First Citizen:"


def test_what_is_no_text_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no text 'bible'; there are tiny_shakes"):
        text.load("bible")
    with pytest.raises(ValueError, match="the character '€' is not among the"):
        text.load("reference").encode("5 €")
    folder = tmp_path / "tiny_shakespeare" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text("{")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"1\.0\.0 can't be read .*delete it and prep"):
        text.load("tiny_shakespeare")
