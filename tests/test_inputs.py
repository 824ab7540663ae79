"""A run over a pipeline, beside one over arrays."""

import jax
import numpy as np
import pytest

from benchmarks import input as benchmark
from experiments.harness import loop
from tests import training_models as models
from tests.pipelines import pipeline
from tests.test_streams import (
    check_equal,
    nothing_stays,  # noqa: F401 (a fixture)
    source,
    training_anew,
)

STEPS = 12


def run_over(data, folder=None, **settings):
    steps = None if isinstance(data, tuple) else STEPS
    settings = {"epochs": 5, "steps_per_epoch": steps, "show": False} | settings
    key = jax.random.key(0)
    return loop.Run(
        training_anew(), key, data, batch_size=100, folder=folder, **settings
    )


def trained(run):
    """Each epoch's loss; units are taken out on the way."""
    losses = []
    for _ in run:
        losses.append(run.means["loss"])
        run.training, run.state = run.training.compact(run.state)
    return losses


@pytest.mark.slow
def test_a_run_over_a_pipeline_goes_on_bit_for_bit(tmp_path):
    straight = run_over(pipeline(source()), tmp_path / "straight")
    losses = trained(straight)
    assert losses[-1] < losses[0]
    folder = tmp_path / "stopped"
    part = run_over(pipeline(source()), folder, until=3)
    found = trained(part)
    assert part.training.alive["first"].sum() < 48
    rest = run_over(pipeline(source()), folder)
    rest.restore()
    assert rest.epoch == 3
    assert rest.notes == {}
    found += trained(rest)
    assert found == losses
    check_equal(rest.state, straight.state)
    # Nothing is left to do, and nothing is read for it.
    again = run_over(pipeline(source()), folder)
    again.restore()
    assert trained(again) == []


@pytest.mark.slow
def test_a_loop_that_was_left_goes_on():
    expected = trained(run_over(pipeline(source())))
    run = run_over(pipeline(source()))
    for epoch in run:
        run.training, run.state = run.training.compact(run.state)
        if epoch == 2:
            break
    assert trained(run) == expected[2:]


def test_arrays_and_pipelines_are_told_apart(tmp_path):
    data = tuple(part[:1500] for part in models.digits())
    for given, steps in ((data, 3), (pipeline(source()), None)):
        with pytest.raises(ValueError, match="steps_per_epoch is how many batches"):
            run_over(given, steps_per_epoch=steps)
    with pytest.raises(ValueError, match="must be at least 1: 0"):
        run_over(pipeline(source()), steps_per_epoch=0)
    ways = {"arrays": data, "a pipeline": pipeline(source())}
    for name, given in ways.items():
        trained(run_over(given, tmp_path / name, until=1))
        for other, others in ways.items():
            run = run_over(others, tmp_path / name)
            if other == name:
                run.restore()
                continue
            with pytest.raises(ValueError, match=f"over {name}, not over {other}"):
                run.restore()


def test_a_pipeline_that_ends_says_so():
    run = run_over(pipeline(source(), passes=1))
    with pytest.raises(ValueError, match="ended after 3 of the 12 batches"):
        trained(run)


class Pixels:
    """Random images of MNIST's shape, in the place of its records."""

    def __len__(self):
        return 300

    def __getitem__(self, at):
        rng = np.random.default_rng(at)
        image = rng.integers(0, 256, (28, 28, 1), np.uint8)
        return image, np.int32(at % 10)


def as_it_is(example):
    return example


@pytest.mark.slow
def test_the_benchmark_compares_every_way(monkeypatch):
    monkeypatch.setattr(benchmark, "BUFFERED", 3)
    found = benchmark.measured("mlp", Pixels(), as_it_is, turns=1, steps=5)
    assert [line["what"].split(",")[0] for line in found] == [
        "mlp: step by step",
        "mlp: Grain in this process",
        "mlp: 1 worker",
        "mlp: 2 workers",
    ]
    assert all(float(line["value"].rstrip("×")) > 0 for line in found)
    assert all("waits" in line["detail"] for line in found[1:])
