"""The newest checkpoint that is whole is found, whatever happened to the others."""

import argparse
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_dtype import WIDE, every_dtype, of_dtype, same_bits

from benchmarks import checkpoints as measured
from l0jax import checkpoints, encoding
from l0jax.checkpoints import Checkpoints


def state(value):
    return {
        "theta": {"w": jnp.full((3, 2), value), "b": [jnp.int32(value)]},
        "half": jnp.full(4, value, jnp.bfloat16),
    }


def save(folder, steps, keep=2):
    of_run = Checkpoints(folder, keep=keep)
    for step in steps:
        of_run.save(step, state(float(step)), {"epoch": step, "best": None})
    return of_run


def restore(folder):
    lines = []
    found = Checkpoints(folder).restore(lambda _: state(0.0), lines.append)
    return found, lines


def check(found, step):
    at, restored, notes = found
    assert at == step
    assert notes == {"epoch": step, "best": None}
    assert jax.tree.structure(restored) == jax.tree.structure(state(0.0))
    for a, b in zip(
        jax.tree.leaves(restored), jax.tree.leaves(state(float(step))), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def arrays_of(folder, step):
    return folder / f"{step}.safetensors"


def damage_by_truncation(folder, step):
    file = arrays_of(folder, step)
    file.write_bytes(file.read_bytes()[:-7])


def damage_by_one_bit(folder, step):
    file = arrays_of(folder, step)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_by_more_than_there_was(folder, step):
    with arrays_of(folder, step).open("ab") as file:
        file.write(b"\0")


def damage_by_loss_of_the_arrays(folder, step):
    arrays_of(folder, step).unlink()


def damage_by_arrays_of_another_step(folder, step):
    arrays_of(folder, step).write_bytes(arrays_of(folder, step - 1).read_bytes())


def damage_by_death_before_the_record(folder, step):
    (folder / f"{step}.json").unlink()


def damage_to_the_record(folder, step):
    file = folder / f"{step}.json"
    file.write_text(file.read_text()[:20])


DAMAGES = [
    damage_by_truncation,
    damage_by_one_bit,
    damage_by_more_than_there_was,
    damage_by_loss_of_the_arrays,
    damage_by_arrays_of_another_step,
    damage_by_death_before_the_record,
    damage_to_the_record,
]


def test_no_checkpoint_is_none(tmp_path):
    assert restore(tmp_path / "nowhere") == (None, [])
    assert Checkpoints(tmp_path / "nowhere").steps() == []
    assert not (tmp_path / "nowhere").exists()


def test_the_newest_checkpoint_comes_back(tmp_path):
    save(tmp_path, [9, 10])
    found, lines = restore(tmp_path)
    assert lines == []
    check(found, 10)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_line(damage, tmp_path):
    save(tmp_path, [9, 10])
    damage(tmp_path, 10)
    found, lines = restore(tmp_path)
    check(found, 9)
    assert len(lines) == 1
    assert str(tmp_path / "10") in lines[0]
    damage_by_truncation(tmp_path, 9)
    found, lines = restore(tmp_path)
    assert found is None
    assert len(lines) == 2


@pytest.mark.parametrize("keep", [2, 3])
def test_only_the_newest_are_kept(keep, tmp_path):
    of_run = save(tmp_path, [2, 9, 10, 11, 100], keep=keep)
    kept = [2, 9, 10, 11, 100][-keep:]
    assert of_run.steps() == kept
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(
        f"{step}.{kind}" for step in kept for kind in ("json", "safetensors")
    )


def test_one_that_was_cut_short_is_none_of_those_that_are_kept(tmp_path):
    of_run = save(tmp_path, [9, 10, 11])
    damage_by_death_before_the_record(tmp_path, 11)
    of_run.save(12, state(12.0), {"epoch": 12, "best": None})
    assert of_run.steps() == [10, 12]


def test_what_was_just_saved_is_kept(tmp_path):
    """By one that goes back by itself."""
    assert save(tmp_path, [9, 10, 1]).steps() == [1, 9, 10]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_that_begins_anew_beside_a_longer_one_is_refused(asynchronous, tmp_path):
    save(tmp_path, [9, 10])
    anew = Checkpoints(tmp_path, asynchronous=asynchronous)
    with pytest.raises(
        ValueError, match=r"step 10, .* step 1 there.* restore"
    ) as error:
        anew.save(1, state(1.0), {})
    assert str(tmp_path) in str(error.value)
    assert anew.steps() == [9, 10]
    check(restore(tmp_path)[0], 10)


def test_a_run_that_went_back_past_a_damaged_checkpoint_goes_on(tmp_path):
    save(tmp_path, [9, 12])
    damage_by_truncation(tmp_path, 12)
    of_run = Checkpoints(tmp_path)
    lines = []
    check(of_run.restore(lambda _: state(0.0), lines.append), 9)
    of_run.save(10, state(10.0), {"epoch": 10, "best": None})
    check(restore(tmp_path)[0], 10)


def test_saving_over_a_half_written_checkpoint(tmp_path):
    """A run that died while saving saves the same step again when it is resumed."""
    save(tmp_path, [9, 10])
    damage_by_death_before_the_record(tmp_path, 10)
    damage_by_truncation(tmp_path, 10)
    save(tmp_path, [10])
    found, lines = restore(tmp_path)
    check(found, 10)
    assert lines == []


def test_a_death_while_saving_over_a_step_leaves_no_stale_record(tmp_path, monkeypatch):
    """The record of the old state must not vouch for the new one, nor the reverse."""
    of_run = save(tmp_path, [9, 10])

    write = checkpoints.files.write

    def die(file, *parts):
        if file.suffix == ".json":
            raise KeyboardInterrupt
        write(file, *parts)

    monkeypatch.setattr(checkpoints.files, "write", die)
    with pytest.raises(KeyboardInterrupt):
        of_run.save(10, state(77.0), {"epoch": 77})
    found, lines = restore(tmp_path)
    check(found, 9)
    assert len(lines) == 1


def test_other_files_beside_checkpoints_are_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "7").write_text("a file")
    save(tmp_path, [9, 10, 11])
    assert (tmp_path / "notes").is_dir()
    assert (tmp_path / "7").read_text() == "a file"
    check(restore(tmp_path)[0], 11)


@pytest.mark.parametrize("keep", [1, 0, -1])
def test_keeping_fewer_than_two_is_refused(keep, tmp_path):
    with pytest.raises(ValueError, match=f"at least 2, got {keep}"):
        Checkpoints(tmp_path, keep=keep)


def test_a_relative_folder_is_the_one_at_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_run = Checkpoints("run")
    of_run.save(1, state(1.0), {})
    monkeypatch.chdir("/")
    assert of_run.steps() == [1]
    assert arrays_of(tmp_path / "run", 1).is_file()


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"w": jnp.zeros(3)}, r"'w': the checkpoint holds \(\(2,\), .*\), the state"),
        ({"w": jnp.zeros(2, jnp.bfloat16)}, "'w': the checkpoint holds .*float32"),
        ({"v": jnp.zeros(2)}, "'v': the checkpoint holds nothing"),
        ({"w": jnp.zeros(2), "x": jnp.zeros(2)}, "'x': the checkpoint holds nothing"),
    ],
)
def test_a_state_of_another_shape_or_dtype_is_refused(like, words, tmp_path):
    of_run = Checkpoints(tmp_path)
    of_run.save(1, {"w": jnp.ones(2)}, {})
    with pytest.raises(ValueError, match=words) as error:
        of_run.restore(lambda _: like, pytest.fail)
    assert str(tmp_path / "1") in str(error.value)


def test_a_state_of_nothing_is_a_checkpoint(tmp_path):
    of_run = Checkpoints(tmp_path)
    for nothing in ({}, {"w": jnp.ones((0, 3))}):
        of_run.save(1, nothing, {"epoch": 1})
        found = of_run.restore(lambda _, it=nothing: it, pytest.fail)
        assert found[2] == {"epoch": 1}
        jax.tree.map(same_bits, found[1], nothing)


NO_ROOM = """
import resource
import jax.numpy as jnp
import numpy as np
from l0jax.checkpoints import Checkpoints

def state(seed):
    noise = np.random.default_rng(seed).normal(size=200_000)
    return {"a": jnp.asarray(noise, jnp.float32)}

of_run = Checkpoints(FOLDER)
of_run.save(1, state(1), {"epoch": 1})
no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, no_limit[1]))
try:
    of_run.save(2, state(2), {"epoch": 2})
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
print(sorted(entry.name for entry in of_run.folder.iterdir()))
step, found, notes = of_run.restore(lambda _: state(0), print)
print(step, notes, bool((found["a"] == state(1)["a"]).all()))
of_run.save(2, state(2), {"epoch": 2})
print(of_run.restore(lambda _: state(0), print)[0])
"""


def test_where_there_is_no_room_the_checkpoints_before_stay(tmp_path, run_python):
    """The limit is that of the size of a file: tests can't fill a disk."""
    out = run_python(NO_ROOM.replace("FOLDER", repr(str(tmp_path / "checkpoints"))))
    said, there, restored, after = out.splitlines()[-4:]
    assert "2.safetensors can't be written ([Errno 27]" in said
    assert said.endswith("make room, and go on from the newest")
    assert there == "['1.json', '1.safetensors']"
    assert restored == "1 {'epoch': 1} True"
    assert after == "2"


@pytest.mark.sweep
@every_dtype
def test_checkpoints_come_back_bit_for_bit(dtype, tmp_path):
    with jax.enable_x64(dtype in WIDE):
        state = of_dtype(dtype)
        of_run = Checkpoints(tmp_path)
        of_run.save(3, state, {})
        found = of_run.restore(
            lambda _: jax.tree.map(jnp.zeros_like, state), pytest.fail
        )
        jax.tree.map(same_bits, found[1], state)
    if dtype in WIDE:
        with pytest.raises(ValueError, match=f"dtype {dtype}, of which JAX would make"):
            of_run.save(4, {"host": state["host"]}, {})
        assert of_run.steps() == [3]


def test_a_checkpoint_with_an_absurdly_large_file_is_passed_over(tmp_path):
    save(tmp_path, [9, 10])
    with arrays_of(tmp_path, 10).open("r+b") as file:
        file.truncate(2**36)
    found, lines = restore(tmp_path)
    check(found, 9)
    assert len(lines) == 1


def test_what_json_can_not_hold_is_refused(tmp_path, monkeypatch):
    of_run = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="such as 1 and '1'"):
        of_run.save(1, state(1.0), {"best": {1: "a", "1": "b"}})
    monkeypatch.setattr(encoding, "LARGEST_RECORD", 1000)
    with pytest.raises(ValueError, match="more than 1000"):
        of_run.save(1, state(1.0), {"text": "x" * 1000})
    assert of_run.steps() == []


def test_a_checkpoint_of_an_older_version_says_so(tmp_path):
    """The arrays were a folder, whose files were those of another library."""
    save(tmp_path, [9, 10])
    arrays_of(tmp_path, 10).unlink()
    (tmp_path / "10" / "ocdbt").mkdir(parents=True)
    with pytest.raises(ValueError, match="10 was written by an older version of l0jax"):
        restore(tmp_path)


# ----------------------------------------------------------------- in another thread


def test_what_another_thread_writes_is_what_was_saved(tmp_path):
    """Although the buffers are given away, and the notes changed, right after it."""
    of_run = Checkpoints(tmp_path, asynchronous=True)
    gone = jax.jit(lambda state: jax.tree.map(lambda a: a * 0, state), donate_argnums=0)
    for step in (9, 10):
        now = state(float(step))
        host, notes = np.full(3, step, np.int32), {"epoch": step, "best": None}
        of_run.save(step, {"jax": now, "host": host}, notes)
        jax.block_until_ready(gone(now))
        host[:], notes["epoch"] = -1, -1
    of_run.wait()
    assert of_run.steps() == [9, 10]
    like = {"jax": state(0.0), "host": np.zeros(3, np.int32)}
    at, found, notes = Checkpoints(tmp_path).restore(lambda _: like, pytest.fail)
    check((at, found["jax"], notes), 10)
    np.testing.assert_array_equal(found["host"], [10, 10, 10])


def test_saving_returns_before_it_is_written(tmp_path, monkeypatch):
    of_run, may = Checkpoints(tmp_path, asynchronous=True), threading.Event()
    write = checkpoints.files.write
    monkeypatch.setattr(
        checkpoints.files, "write", lambda *a: may.wait(60) and write(*a)
    )
    of_run.save(1, state(1.0), {"epoch": 1, "best": None})
    assert not (tmp_path / "1.json").exists()
    may.set()
    check(of_run.restore(lambda _: state(0.0), pytest.fail), 1)


@pytest.mark.parametrize("asks", ["wait", "save", "restore"])
def test_what_another_thread_could_not_write_is_said_at_once_and_raised(
    asks, tmp_path, monkeypatch
):
    of_run = Checkpoints(tmp_path, asynchronous=True)
    of_run.save(1, state(1.0), {"epoch": 1, "best": None})
    of_run.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    def ask():
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.files, "write", full)
            of_run.save(2, state(2.0), {})
            with pytest.raises(
                OSError, match=r"2.safetensors can't be written .*No space"
            ):
                {
                    "wait": of_run.wait,
                    "save": lambda: of_run.save(3, state(3.0), {}),
                    "restore": lambda: of_run.restore(lambda _: state(0.0), print),
                }[asks]()

    with pytest.warns(UserWarning, match="No space"):
        ask()
    of_run.wait()
    found, lines = restore(tmp_path)
    check(found, 1)
    assert lines == []
    assert not list(tmp_path.glob("2.*"))


# ------------------------------------------------------------------ several processes


@pytest.mark.parametrize("first_failed", [False, True])
def test_a_process_that_waits_for_the_first_raises_if_that_fails(
    first_failed, tmp_path, monkeypatch
):
    """As the second of two, which writes nothing, and which would wait for ever."""
    of_run = Checkpoints(tmp_path, asynchronous=True)
    monkeypatch.setattr(of_run, "_writer", None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    told = []

    def broadcast(mine):
        told.append(bool(mine))
        return np.asarray(first_failed)

    monkeypatch.setattr(checkpoints.multihost_utils, "broadcast_one_to_all", broadcast)
    if first_failed:
        with pytest.raises(OSError, match="by the first process, which says why"):
            of_run.save(1, state(1.0), {})
    else:
        of_run.save(1, state(1.0), {})
    assert told == [False]
    assert of_run.steps() == []


def test_the_first_process_tells_the_others_that_it_failed(tmp_path, monkeypatch):
    told = []

    def full(*_):
        raise OSError(28, "No space left on device")

    def broadcast(mine):
        told.append(bool(mine))
        return np.asarray(mine)

    monkeypatch.setattr(checkpoints.files, "write", full)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoints.multihost_utils, "broadcast_one_to_all", broadcast)
    with pytest.raises(OSError, match="No space left"):
        Checkpoints(tmp_path).save(1, state(1.0), {})
    assert told == [True]


def test_what_saving_costs_is_measured():
    """`benchmarks.checkpoints`, small: a ratio of each of the two ways of saving."""
    with jax.numpy_dtype_promotion("standard"):
        entries = measured.main(argparse.Namespace(turns=1), epochs=2, examples=200)
    assert [each["value"].endswith("×") for each in entries] == [True, True]
    assert "another thread" in entries[0]["what"]
    assert entries[0]["limit"] == "≤ 1.02×"
