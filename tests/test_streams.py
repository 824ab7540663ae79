"""Batches of Grain's pipelines: a run that was killed goes on bit for bit."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import grain
import jax
import numpy as np
import optax
import pytest

from l0jax import costs, gates, train
from tests import training_models as models
from tests.optimizers import adam
from tests.pipelines import Digits, pipeline

STEPS = 60
KILLED = sorted({*np.random.default_rng(0).integers(25, STEPS, 3).tolist()})


def source(examples=1500):
    images, labels = models.digits()
    return Digits(images[:examples], labels[:examples])


def training_anew():
    """Its gates close fast."""
    make, loss = models.MODELS["perceptron"]
    return train.Training(
        make(),
        loss,
        models.EXAMPLE,
        gate=gates.HardConcrete(),
        target=train.Target(costs.macs, 0.3, warm_up=20),
        optimizer=adam(3e-3),
        gate_optimizer=adam(3e-1),
        polyak=0.9,
        compaction=train.Compaction(below=0.95, after=1, at=1.0),
    )


def plain():
    make, loss = models.MODELS["perceptron"]
    sgd = optax.sgd(0.1)
    return train.Training(make(), loss, optimizer=sgd, gate_optimizer=sgd)


def run(folder, until, data, every=7):
    """From the newest checkpoint on, to a step after which it is killed."""
    checkpoints = train.Checkpoints(folder)
    begun, key = training_anew(), jax.random.key(0)
    training, state, done = checkpoints.restore(begun, key)
    with train.Stream(data, begun) as stream:
        if done:
            stream.set_state(checkpoints.notes["stream"])
        for step in range(done + 1, until + 1):
            state, _ = training.step(state, next(stream))
            if step % 10 == 0:
                training, state = training.compact(state)
            if step % every == 0:
                notes = {"stream": stream.get_state()}
                checkpoints.save(step, training, state, notes)
    return done, training, state


def on_host(tree):
    return [
        np.asarray(jax.random.key_data(a) if a.dtype == jax.random.key(0).dtype else a)
        for a in jax.tree.leaves(tree)
    ]


def check_equal(found, expected):
    pairs = list(zip(on_host(found), on_host(expected), strict=True))
    assert pairs
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert not multiprocessing.active_children()
    assert not [t.name for t in threading.enumerate() if "grain-thread" in t.name]


@pytest.mark.slow
@pytest.mark.always
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path):
    data = pipeline(source())
    _, whole, expected = run(tmp_path / "straight", STEPS, data)
    assert whole.alive["first"].sum() < 48
    dones = []
    for killed in KILLED:
        folder = tmp_path / str(killed)
        _, before, _ = run(folder, killed, data)
        assert before.alive["first"].sum() < 48
        done, training, found = run(folder, STEPS, pipeline(source()))
        dones.append(done)
        for name, flags in whole.alive.items():
            np.testing.assert_array_equal(training.alive[name], flags)
        check_equal(found, expected)
    assert dones == [killed // 7 * 7 for killed in KILLED]


def drawn(data, steps, state=None):
    """So many batches, of which none is copied before the last has come; and the
    position in their middle, as JSON gives it back."""
    with train.Stream(data, plain()) as stream:
        if state is not None:
            stream.set_state(state)
        found = [*stream.take(steps // 2)]
        there = json.loads(json.dumps(stream.get_state()))
        found += stream.take(steps - steps // 2)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
        return on_host(found), there


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_batches(workers):
    expected, _ = drawn(pipeline(source()), 24)
    assert len({a.tobytes() for a in expected}) == 48
    found, there = drawn(pipeline(source(), workers), 24)
    check_equal(found, expected)
    rest, _ = drawn(pipeline(source(), workers), 12, there)
    check_equal(rest, expected[24:])


def test_parts_are_disjoint_and_all_there_is():
    """As processes take them."""
    examples = 1200
    numbers = Digits(np.zeros((examples, 2, 2), np.float32), np.arange(examples))
    parts = []
    for at in range(2):
        data = pipeline(numbers, part=slice(at, None, 2), size=50)
        with train.Stream(data, plain()) as stream:
            epochs = [[*stream.take(12)] for _ in range(2)]
        first, second = (np.concatenate([y for _, y in each]) for each in epochs)
        assert {*first.tolist()} == {*second.tolist()}
        assert first.tolist() != second.tolist()
        parts.append({*first.tolist()})
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {*range(examples)}


def test_to_ask_for_the_position_takes_nothing_away():
    data = pipeline(source(), passes=1)
    expected, _ = drawn(data, 14)
    with train.Stream(data, plain(), ahead=1) as stream:
        found = []
        for batch in stream:
            assert stream.get_state() == stream.get_state()
            found.append(batch)
        end = stream.get_state()
        stream.close()
        with pytest.raises(ValueError, match="the stream is closed"):
            next(stream)
    assert len(found) == 15
    check_equal(found[:14], expected)
    with train.Stream(data, plain()) as stream:
        stream.set_state(end)
        with pytest.raises(ValueError, match="ended after 0 of the 5 batches"):
            next(stream.take(5))


def test_what_ends_too_early_says_when():
    with train.Stream(pipeline(source(99)), plain()) as stream:
        with pytest.raises(ValueError, match=r"ended after 0 of the 3 .* more ex"):
            next(stream.take(3))
        assert [*stream] == []
    training = plain()
    with train.Stream(pipeline(source(), passes=1), training) as stream:
        state, _ = training.epoch(training.start(jax.random.key(0)), stream.take(10))
        with pytest.raises(ValueError, match="ended after 5 of the 10 batches"):
            training.epoch(state, stream.take(10))


OTHERS = {
    "another seed": {"seed": 1},
    "other sizes": {"size": 50},
    "other data": {"part": slice(0, 1400)},
    "an end before": {"passes": 1},
    "other workers": {"workers": 1},
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_position_of_another_pipeline_is_refused(other):
    _, there = drawn(pipeline(source()), 40)
    with (
        train.Stream(pipeline(source(), **OTHERS[other]), plain()) as stream,
        pytest.raises(ValueError, match=r"another batch than|can't go on from"),
    ):
        stream.set_state(there)


def test_what_can_t_be_streamed_is_refused():
    data = grain.MapDataset.source(source()).batch(10)
    with pytest.raises(ValueError, match=r"not a Batch.*to_iter_dataset"):
        train.Stream(data, plain())
    with pytest.raises(ValueError, match="ahead must be at least 1, got 0"):
        train.Stream(pipeline(source()), plain(), ahead=0)
    with train.Stream(pipeline(source()), plain()) as stream:
        with pytest.raises(ValueError, match="no position of a Stream"):
            stream.set_state({"next_index": 3})
        two = stream.get_state()["processes"] * 2
        with pytest.raises(ValueError, match="saved by 2 processes, and here are 1"):
            stream.set_state({"processes": two})


KILLED_WITH_WORKERS = """
import multiprocessing, time
from l0jax import train
from tests import test_streams as tests

stream = train.Stream(tests.pipeline(tests.source(), workers=2), tests.plain())
for _ in range(8):
    next(stream)
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
time.sleep(300)
"""


def is_there(process):
    try:
        os.kill(process, 0)
        stat = Path(f"/proc/{process}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] != "Z"  # nobody asked how it ended
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_workers_end_with_a_run_that_is_killed():
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", KILLED_WITH_WORKERS]
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=root, **told) as run:
        try:
            assert run.stdout is not None
            workers = [*map(int, run.stdout.readline().split())]
            there = [*map(is_there, workers)]
        finally:
            run.kill()
    assert there == [True, True]
    until = time.monotonic() + 60
    while any(map(is_there, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(is_there, workers))


def broken(example):
    raise RuntimeError("an image that can't be read")


def test_what_the_pipeline_raises_is_raised():
    data = pipeline(source()).map(broken)
    with (
        train.Stream(data, plain()) as stream,
        pytest.raises(RuntimeError, match="an image that can't be read"),
    ):
        next(stream)


ON_A_MESH = """
import jax, numpy as np
from jax.sharding import Mesh
from l0jax import train
from tests import test_streams as tests

whole = tests.plain()
mesh = Mesh(np.asarray(jax.devices()), ("data",))
split = whole.replace(mesh=mesh)
with train.Stream(tests.pipeline(tests.source()), split) as stream:
    images, labels = next(stream)
    assert {s.data.shape[0] for s in images.addressable_shards} == {25}
    there = stream.get_state()
    state, _ = split.step(split.start(jax.random.key(0)), (images, labels))
with train.Stream(tests.pipeline(tests.source()), whole) as stream:
    tests.check_equal(next(stream), (images, labels))
    # The checksum is that of the examples, wherever they lie.
    assert stream.get_state() == there
with train.Stream(tests.pipeline(tests.source(), size=99), split) as stream:
    try:
        next(stream)
    except ValueError as error:
        print(error)
"""


def test_batches_are_split_over_a_mesh(run_python):
    assert "can't be split evenly over 4 devices" in run_python(ON_A_MESH, devices=4)
