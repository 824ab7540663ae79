"""Bisection over λ, which constraints are compared with."""

import dataclasses

import pytest

from experiments import bisection, mnist
from experiments.harness import results

DIGITS = mnist.Config(
    epochs=2, batch_size=50, gate_learning_rate=0.1, polyak=0.9, progress=False
)


@pytest.fixture
def shares(monkeypatch):
    """Runs of which 1 / (1 + λ) is left; the λ that were asked for."""
    asked = []

    def run(config, lam, folder):
        asked.append(lam)
        left = 1 / (1 + lam)
        return {"lam": lam, "density": left, "test_error": 2.0, "seconds": 1.0}

    monkeypatch.setattr(bisection, "run", run)
    return asked


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_it_ends_at_the_target(shares, tmp_path, target):
    config = dataclasses.replace(DIGITS, out=tmp_path)
    found = bisection.main(bisection.Config(config, target=target, high=100.0, most=20))
    assert found["lam"] == shares[-1]
    assert 1 / (1 + found["lam"]) == pytest.approx(target, rel=0.01)
    # It halves an interval, of the logarithms of 0.001 and 100: each run counts.
    assert 1 < len(shares) <= 13
    assert [each["lam"] for each in found["runs"]] == shares


def test_it_gives_up(shares, tmp_path):
    config = dataclasses.replace(DIGITS, out=tmp_path)
    found = bisection.main(bisection.Config(config, target=0.01, most=4))
    assert found["lam"] is None
    assert len(shares) == 4


def test_it_trains_and_is_recorded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bisection, "RESULTS", tmp_path / "results")
    its = bisection.Config(
        dataclasses.replace(DIGITS, out=tmp_path / "runs"),
        **{"target": 0.4, "tolerance": 0.5, "most": 2, "record": True},
    )
    found = bisection.main(its)
    assert 0 < found["runs"][0]["density"] < 1
    assert 0 < found["runs"][0]["test_error"] < 100
    again = bisection.main(its)
    assert again == found, "what was trained is not trained again"
    (line,) = results.read(bisection.RESULTS)
    assert line["runs"] == found["runs"]
    assert line["settings"]["target"] == 0.4
    assert line["settings"]["epochs"] == 2
    assert line["metrics"] == {"test error": line["runs"][-1]["test_error"]}
    bisection.main(dataclasses.replace(its, target=0.5))
    there = results.read(bisection.RESULTS)
    assert [each["settings"]["target"] for each in there] == [0.4, 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 0.0}, r"target must lie in \(0, 1\), got 0\.0"),
        ({"target": 1.0}, r"target must lie in \(0, 1\), got 1\.0"),
        ({"low": 2.0, "high": 1.0}, r"must rise from above 0, got 2\.0 and 1\.0"),
        ({"low": 0.0}, r"must rise from above 0, got 0\.0 and"),
    ],
)
def test_what_can_not_be_searched_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        bisection.main(bisection.Config(DIGITS, **changes))
