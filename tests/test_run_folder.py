"""What a run folder holds, and that no run overwrites another."""

import dataclasses
import json
import re
import struct

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from experiments.harness import run_folder
from l0jax import costs

SETTINGS = {"dataset": "digits", "lam": [0.1, 0.2], "beta_end": None, "seed": 0}
CONFIG = SETTINGS | {"out": "somewhere", "progress": False}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(0, 1),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


def row(epoch, **changes):
    return {
        "epoch": epoch,
        "step": 26 * epoch,
        "loss": 1 / epoch,
        "penalty": 0.5 / epoch,
        "expected_l0": 100.0 - epoch,
        "weights": 90 - epoch,
        "steps_per_second": 10.0,
        "train_error": 3.0 / epoch,
        "validation_error": 4.0 / epoch,
        "architecture": {"input": 64, "hidden1": 30 - epoch},
    } | changes


def scalars(folder):
    """Every scalar of the TensorBoard events in a folder, `{(tag, step): [values]}`."""
    found = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            # Length, its checksum, the record, its checksum.
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[12 + length + 4 :]
            for value in event.summary.value:
                key = value.tag, event.step
                found.setdefault(key, []).append(value.simple_value)
    return found


# ---------------------------------------------------------------------- the folder


@given(st.dictionaries(st.text(), VALUES, min_size=1), st.data())
def test_each_set_of_settings_has_a_folder_of_its_own(settings, data):
    folder = run_folder.default("digits-mlp", settings)
    assert re.fullmatch(r"runs/digits-mlp-[0-9a-f]{8}", folder.as_posix())
    # A path below where the command is run, whichever way the settings are sorted.
    reversed_order = dict(reversed(settings.items()))
    assert run_folder.default("digits-mlp", reversed_order) == folder
    changed = data.draw(st.sampled_from(sorted(settings)))
    value = data.draw(VALUES)
    other = run_folder.default("digits-mlp", settings | {changed: value})
    # As JSON, for 0, 0.0 and False are one value in Python and three in a file.
    same = json.dumps(value) == json.dumps(settings[changed])
    assert (other == folder) == same
    without = {name: settings[name] for name in settings if name != changed}
    assert run_folder.default("digits-mlp", without) != folder
    assert run_folder.default("digits-lenet5", settings).name != folder.name


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_folder_is_made_with_its_configuration(tmp_path, resume):
    for folder in (tmp_path / "deep" / "new", tmp_path):
        run_folder.prepare(folder, SETTINGS, CONFIG, resume)
        stored = json.loads((folder / "config.json").read_text())
        assert stored.items() > CONFIG.items()
        # What decides the random draws, as far as it is not a setting.
        assert stored["versions"]["jax"] == jax.__version__
        partitionable = jax.config.values["jax_threefry_partitionable"]
        assert stored["threefry_partitionable"] is partitionable


def test_a_folder_is_only_gone_on_with_if_asked_to(tmp_path):
    folder = tmp_path / "run"
    run_folder.prepare(folder, SETTINGS, CONFIG, False)
    before = (folder / "config.json").read_bytes()
    with pytest.raises(run_folder.RunFolderError) as error:
        run_folder.prepare(folder, SETTINGS, CONFIG, False)
    assert all(w in str(error.value) for w in (str(folder), "--resume", "--out"))
    assert (folder / "config.json").read_bytes() == before
    # Where to write and how to show it may change between the two.
    run_folder.prepare(folder, SETTINGS, CONFIG | {"progress": True}, True)
    assert json.loads((folder / "config.json").read_text())["progress"] is True


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("field", "value"),
    [("dataset", "mnist"), ("lam", [0.1, 0.3]), ("beta_end", 0.5), ("seed", 1)],
)
def test_another_configuration_is_never_overwritten(tmp_path, resume, field, value):
    run_folder.prepare(tmp_path, SETTINGS, CONFIG, False)
    before = (tmp_path / "config.json").read_bytes()
    other = {field: value}
    with pytest.raises(run_folder.RunFolderError) as error:
        run_folder.prepare(tmp_path, SETTINGS | other, CONFIG | other, resume)
    said = str(error.value)
    assert "\n" not in said
    found = f"{field} is {SETTINGS[field]!r} there and {value!r} here"
    assert all(words in said for words in (str(tmp_path), found, "--out"))
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_setting_that_the_folder_does_not_know_is_another_configuration(tmp_path):
    """Written by an older version, say: what it ran with can't be told."""
    run_folder.prepare(tmp_path, SETTINGS, CONFIG, False)
    with pytest.raises(run_folder.RunFolderError, match="gates is None there and 'x'"):
        run_folder.prepare(tmp_path, SETTINGS | {"gates": "x"}, CONFIG, True)


ADDED = [(name, usual, "other") for name, usual in run_folder.ADDED.items()]


@pytest.mark.parametrize(("name", "usual", "other"), ADDED)
def test_a_record_without_a_flag_was_run_as_before_the_flag(
    tmp_path, name, usual, other
):
    old, new = tmp_path / "old", tmp_path / "new"
    run_folder.prepare(old, SETTINGS, CONFIG, False)
    run_folder.prepare(new, SETTINGS | {name: other}, CONFIG | {name: other}, False)
    for there in ({}, {name: usual}):
        run_folder.prepare(old, SETTINGS | there, CONFIG | there, True)
        run_folder.check_base(old, SETTINGS | there, [*SETTINGS, name])
        with pytest.raises(
            ValueError, match=f"{name} is '{other}' there and {usual!r}"
        ):
            run_folder.prepare(new, SETTINGS | there, CONFIG | there, True)
        with pytest.raises(ValueError, match=f"{name} = {other}; this run has {usual}"):
            run_folder.check_base(new, SETTINGS | there, [*SETTINGS, name])
    with pytest.raises(ValueError, match=f"{name} is {usual!r} there and '{other}'"):
        run_folder.prepare(old, SETTINGS | {name: other}, CONFIG, True)
    with pytest.raises(ValueError, match=f"{name} = {usual}; this run has {other}"):
        run_folder.check_base(old, SETTINGS | {name: other}, [name])


@pytest.mark.parametrize(("name", "usual", "other"), ADDED)
def test_a_flag_is_recorded_where_it_is_not_as_before(name, usual, other):
    kind = dataclasses.make_dataclass("Config", ["seed", name, "out"])
    assert run_folder.settings_of(kind(1, usual, "x"), ("out",)) == {"seed": 1}
    told = run_folder.settings_of(kind(1, other, "x"), ("out",))
    assert told == {"seed": 1, name: other}
    assert run_folder.whole({"seed": 1})[name] == usual
    assert run_folder.whole(told)[name] == other


@pytest.mark.parametrize("usual", run_folder.ADDED_TO_RECIPES.items())
def test_a_recipe_without_a_setting_is_as_before_the_setting(tmp_path, usual):
    name, value = usual
    recipe = {"epochs": 3, "drops": (0.5,)}
    kind = dataclasses.make_dataclass("Config", ["seed", "base"])
    told = run_folder.settings_of(kind(1, recipe | {name: value}))
    assert told == {"seed": 1, "base": {"epochs": 3, "drops": [0.5]}}
    assert run_folder.whole(told)["base"][name] == value
    other = run_folder.settings_of(kind(1, recipe | {name: 0.7}))
    assert other["base"][name] == 0.7
    run_folder.prepare(tmp_path, told, told, False)
    run_folder.prepare(tmp_path, run_folder.whole(told), told, True)
    with pytest.raises(run_folder.RunFolderError, match="another configuration: base"):
        run_folder.prepare(tmp_path, other, other, True)


def test_a_configuration_that_was_cut_short_is_named(tmp_path):
    run_folder.prepare(tmp_path, SETTINGS, CONFIG, False)
    file = tmp_path / "config.json"
    whole = file.read_text()
    for kept in (0, 20):
        file.write_text(whole[:kept])
        with pytest.raises(ValueError, match=re.escape(str(file))):
            run_folder.prepare(tmp_path, SETTINGS, CONFIG, True)


# ------------------------------------------------------------------------- the log


def test_rows_come_back_as_they_were_and_survive_reopening(tmp_path):
    log = run_folder.Log(tmp_path / "new" / "run")
    assert log.rows() == []
    rows = [row(1, test_error=5.0), row(2), row(3)]
    for one in rows[:2]:
        log.row(one)
    assert log.rows() == rows[:2]
    # Not closed: as if killed.
    again = run_folder.Log(tmp_path / "new" / "run")
    assert again.rows() == rows[:2]
    again.row(rows[2])
    again.close()
    assert run_folder.Log(tmp_path / "new" / "run").rows() == rows
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


@pytest.mark.parametrize("last", [0, 1, 3, 9])
def test_later_rows_are_dropped_and_earlier_ones_kept(tmp_path, last):
    log = run_folder.Log(tmp_path)
    log.keep_until(last)
    assert log.rows() == []
    for epoch in (1, 2, 3, 4):
        log.row(row(epoch))
    log.keep_until(last)
    kept = [row(epoch) for epoch in (1, 2, 3, 4) if epoch <= last]
    assert run_folder.Log(tmp_path).rows() == kept
    log.row(row(last + 1))
    assert log.rows() == [*kept, row(last + 1)]
    log.close()


def test_a_line_that_was_cut_short_is_dropped_like_any_later_row(tmp_path):
    """Of an epoch that was being written when the run was killed."""
    log = run_folder.Log(tmp_path)
    for epoch in (1, 2):
        log.row(row(epoch))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(3))[:30])
    again = run_folder.Log(tmp_path)
    again.keep_until(2)
    assert again.rows() == [row(1), row(2)]


@pytest.mark.parametrize(
    "damaged",
    ['{"epoch": 1, "lo', "[]", '{"loss": 1.0}', '{"epoch": "1"}', "[" * 10**5],
)
def test_another_damaged_line_is_named_and_not_dropped(damaged, tmp_path):
    log = run_folder.Log(tmp_path)
    log.row(row(1))
    log.close()
    file = tmp_path / "metrics.jsonl"
    whole = file.read_text()
    for text, number in ((f"{damaged}\n{whole}", 1), (f"{whole}{damaged}\n", 2)):
        file.write_text(text)
        with pytest.raises(run_folder.RunFolderError, match=f"line {number}, is damag"):
            run_folder.Log(tmp_path).rows()


def test_tensorboard_shows_what_the_rows_say(tmp_path):
    log = run_folder.Log(tmp_path)
    rows = [row(1, test_error=5.0), row(2)]
    for one in rows:
        log.row(one)
    log.close()
    expected = {}
    for one in rows:
        named = {f"error/{n}": v for n, v in one.items() if n.endswith("_error")}
        named |= {f"units/{n}": v for n, v in one["architecture"].items()}
        plain = ("loss", "penalty", "expected_l0", "weights", "steps_per_second")
        named |= {name: one[name] for name in plain}
        expected |= {(tag, one["step"]): [v] for tag, v in named.items()}
    found = scalars(tmp_path)
    assert set(found) == set(expected)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-6)


def test_closing_needs_no_rows(tmp_path):
    run_folder.Log(tmp_path).close()
    assert not (tmp_path / "tensorboard").exists()


def test_activity_is_a_small_array_per_group_and_epoch(tmp_path):
    log = run_folder.Log(tmp_path)
    probabilities = np.linspace(0, 1, 7, dtype=np.float32)
    for epoch in (0, 12):
        log.activity(epoch, {"input": probabilities, "hidden1": probabilities[:2]})
    files = sorted((tmp_path / "activity").iterdir())
    # Padded, so that the order of names is that of epochs.
    assert [file.name for file in files] == ["00000.npz", "00012.npz"]
    with np.load(files[1]) as stored:
        assert set(stored) == {"input", "hidden1"}
        assert stored["input"].dtype == np.float16
        np.testing.assert_allclose(stored["input"], probabilities, atol=5e-4)
        np.testing.assert_allclose(stored["hidden1"], probabilities[:2], atol=5e-4)


def test_gates_come_back(tmp_path):
    log = run_folder.Log(tmp_path)
    active = {"layers.0.kernel": np.float32([0.1, 0.9]), "b": np.float32([0.5])}
    z = {"layers.0.kernel": np.float32([0.0, 1.0]), "b": np.float32([0.4])}
    log.gates(active, z)
    with np.load(tmp_path / "gates.npz") as stored:
        assert len(stored) == 4
        for name in active:
            np.testing.assert_array_equal(stored[f"{name}/prob_active"], active[name])
            np.testing.assert_array_equal(stored[f"{name}/value"], z[name])


# ------------------------------------------------------------------ measured seconds


def table_of(seconds):
    return costs.Table(("input", "hidden1"), ((1, 64), (1, 150, 300)), seconds)


def test_a_table_of_seconds_is_read_back_and_not_overwritten(tmp_path):
    assert run_folder.latency(tmp_path / "nowhere") is None
    seconds = np.random.default_rng(0).random((2, 3))
    run_folder.keep_latency(tmp_path, table_of(seconds))
    run_folder.keep_latency(tmp_path, table_of(2 * seconds))
    found = run_folder.latency(tmp_path)
    assert found is not None
    assert (found.groups, found.sizes) == (
        ("input", "hidden1"),
        ((1, 64), (1, 150, 300)),
    )
    np.testing.assert_array_equal(found.seconds, seconds)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"groups": [], "sizes": [[1]]}'])
def test_a_damaged_table_of_seconds_is_named(text, tmp_path):
    (tmp_path / "latency.json").write_text(text)
    with pytest.raises(
        run_folder.RunFolderError, match=r"latency.json is damaged.*rem"
    ):
        run_folder.latency(tmp_path)


def test_reading_a_folder_changes_nothing(tmp_path):
    assert run_folder.Log(tmp_path).rows() == []
    assert list(tmp_path.iterdir()) == []


def changed(folder, **fields):
    file = folder / run_folder.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_another_version_of_a_package_is_said(tmp_path):
    run_folder.prepare(tmp_path, SETTINGS, CONFIG, False)
    versions = run_folder.made_by()["versions"]
    changed(tmp_path, versions=versions | {"jax": "0.1.2"})
    with pytest.warns(UserWarning, match=r"begun with jax 0\.1\.2; here it is jax"):
        run_folder.prepare(tmp_path, SETTINGS, CONFIG, True)
    # It is told once: from here on the versions are these.
    run_folder.prepare(tmp_path, SETTINGS, CONFIG, True)


def test_other_draws_are_another_run(tmp_path):
    run_folder.prepare(tmp_path, SETTINGS, CONFIG, False)
    now = jax.config.values["jax_threefry_partitionable"]
    changed(tmp_path, threefry_partitionable=not now)
    with pytest.raises(run_folder.RunFolderError, match="threefry_partitionable is"):
        run_folder.prepare(tmp_path, SETTINGS, CONFIG, True)


def test_a_configuration_that_is_a_list_is_damaged(tmp_path):
    (tmp_path / run_folder.CONFIG).write_text("[1]")
    with pytest.raises(run_folder.RunFolderError, match=r"damaged.*holds a list"):
        run_folder.prepare(tmp_path, SETTINGS, CONFIG, True)
