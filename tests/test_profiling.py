"""What a profile says of a piece of a training."""

import jax
import jax.numpy as jnp
import pytest

from experiments import mnist
from experiments.harness import profiling
from experiments.mnist_settings import Config


def test_time_is_that_without_what_lies_within():
    a, b, c = (("a", ""), ("b", ""), ("c", ""))
    events = [(2.0, 3.0, b), (0.0, 10.0, a), (4.0, 9.0, b), (5.0, 6.0, c)]
    events += [(20.0, 21.0, c)]
    found = [(name[0], own) for _, _, name, own in profiling.alone(events)]
    assert found == [("a", 4), ("b", 1), ("b", 4), ("c", 1), ("c", 1)]
    assert sum(own for _, own in found) == profiling.covered([e[:2] for e in events])


def test_overlapping_spans_are_counted_once():
    assert profiling.covered([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (6.0, 6.5)]) == 5


def test_a_profile_names_what_ran_and_how_often(tmp_path):
    @jax.jit
    def of_products(x):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ x), None), x, None, 7)[0]

    x = jnp.eye(128)
    jax.block_until_ready(of_products(x))
    with profiling.watched(tmp_path):
        jax.block_until_ready(of_products(x))
    found = profiling.read(tmp_path)
    assert {program for _, program in found.operations} == {"jit_of_products"}
    assert 7 in {calls for _, calls in found.operations.values()}
    assert 0 < found.busy <= found.seconds
    spent = sum(seconds for seconds, _ in found.operations.values())
    assert spent == pytest.approx(found.busy, rel=0.05)
    assert "jit_of_products" in found.text()


def test_a_folder_without_trace_and_one_without_operations_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no trace"):
        profiling.read(tmp_path)
    with profiling.watched(tmp_path):
        pass
    with pytest.raises(ValueError, match="no operation ran"):
        profiling.read(tmp_path)


def test_a_profiled_run_ends_as_the_same_run_without(tmp_path, capsys):
    """And its trace stands beside its checkpoints, of which more may be kept."""
    how = {"epochs": 4, "dense": "no", "progress": False}
    plain = mnist.main(Config(**how, out=tmp_path / "plain"))
    asked = {"profile": True, "keep_checkpoints": 3, "checkpoint_every": 1}
    watched = mnist.main(Config(**how, **asked, out=tmp_path / "watched"))
    assert "of it without any operation" in capsys.readouterr().out
    assert watched["last"] == {**plain["last"], **seconds(watched["last"])}
    there = {entry.name for entry in (tmp_path / "watched" / "checkpoints").iterdir()}
    kinds = ("json", "safetensors")
    assert there == {"profile", *(f"{n}.{kind}" for n in "234" for kind in kinds)}
    assert profiling.read(tmp_path / "watched" / "checkpoints" / "profile").operations


def test_a_run_of_which_nothing_can_be_watched_says_so(tmp_path, capsys):
    """Of one piece, which is compiled."""
    how = {"epochs": 1, "dense": "no", "progress": False}
    mnist.main(Config(**how, profile=True, out=tmp_path / "run"))
    assert "nothing was watched" in capsys.readouterr().out


def seconds(row):
    return {name: row[name] for name in row if "seconds" in name or "steps_per" in name}


def test_keeping_one_checkpoint_is_refused_before_there_is_a_folder(tmp_path):
    config = Config(keep_checkpoints=1, out=tmp_path / "run")
    with pytest.raises(ValueError, match="keep_checkpoints must be at least 2, got 1"):
        mnist.main(config)
    assert not (tmp_path / "run").exists()
