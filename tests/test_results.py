"""Lines of results: what they must say, how they stand, and who may write them."""

import math
import multiprocessing

import pytest

from experiments.harness import results, run_folder

LINE = {
    **{"study": "study", "task": "digits mlp", "method": "gates", "seed": 0},
    **{"settings": {"epochs": 3}, "metrics": {"test error": 2.5}},
    **{"costs": {"macs": 0.5}, "seconds": None, "widths": [3, 4]},
}


def line(**changes):
    return {**LINE, "made": {}, **changes}


def test_what_was_put_is_read_with_what_made_it(tmp_path):
    folder = tmp_path / "new" / "run"
    assert results.read(folder) == []
    results.put(folder, [LINE, line(seed=1, made={"device": "another"})])
    first, second = results.read(folder)
    assert first == {**LINE, "made": run_folder.made_by()}
    assert second["made"] == {"device": "another"}
    assert [each.name for each in folder.iterdir()] == [results.LINES]
    (found, _) = results.of_folder(folder)
    assert (found.run, found.metrics) == (str(folder), {"test error": 2.5})
    assert results.there(folder, "method", "seed") == {("gates", 0), ("gates", 1)}


def test_a_line_takes_the_place_of_an_older_one(tmp_path):
    results.put(tmp_path, [line(seed=seed) for seed in (2, 0, 1)])
    changed = line(seed=0, metrics={"test error": 9.0})
    results.put(tmp_path, [changed, line(seed=0, row="another")])
    found = results.read(tmp_path)
    assert [each["seed"] for each in found] == [2, 0, 1, 0]
    assert found[1] == changed


def test_lines_stand_in_the_order_of_what_is_known(tmp_path):
    """What another version knows comes after it."""
    order = {"method": ("scores", "gates"), "seed": ()}
    for method, seed in (("gates", 1), ("old", 0), ("gates", 0), ("scores", 2)):
        results.put(tmp_path, [line(method=method, seed=seed)], order)
    found = [(each["method"], each["seed"]) for each in results.read(tmp_path)]
    assert found == [("scores", 2), ("gates", 0), ("gates", 1), ("old", 0)]


def test_of_other_settings_only_other_rows_and_tasks_stay(tmp_path):
    there = [line(row=row, seed=seed) for row in ("a", "b") for seed in (0, 1)]
    results.put(tmp_path, [*there, line(row="a", task="mnist mlp")])
    # (What is said of how all were run changes nothing.)
    told = {"epochs": 3, "compute": "float32"}
    results.put(tmp_path, [line(row="a", seed=2, settings=told)], alike=True)
    assert len(results.read(tmp_path)) == 6
    new = line(row="a", seed=0, settings={"epochs": 4})
    results.put(tmp_path, [new], alike=True)
    found = results.read(tmp_path)
    assert [(each["row"], each["task"]) for each in found].count(
        ("a", "digits mlp")
    ) == 1
    assert len(found) == 4
    assert new in found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": {"test error": math.nan}}, "test error is nan, .* finite number"),
        ({"metrics": {"test error": "2"}}, "test error is '2', .* finite number"),
        ({"costs": {"macs": True}}, "macs is True, and must be a finite number"),
        ({"seconds": ""}, "seconds is '', and must be a finite number"),
        ({"seconds": math.inf}, "seconds is inf, and must be a finite number"),
        ({"seed": "0"}, "seed is '0', and must be a int"),
        ({"seed": True}, "seed is True, and must be a int"),
        ({"method": None}, "method is None, and must be a str"),
        ({"settings": []}, r"settings is \[\], and must be a dict"),
    ],
)
def test_values_of_another_kind_are_neither_written_nor_read(tmp_path, changes, words):
    with pytest.raises(
        ValueError, match=rf"{results.LINES}, the result of .*: {words}"
    ):
        results.put(tmp_path, [line(), line(**changes)])
    assert not [*tmp_path.iterdir()]
    results.json_lines.write(tmp_path / results.LINES, [line(), line(**changes)])
    with pytest.raises(ValueError, match=rf"{results.LINES}, line 2: {words}"):
        results.read(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", "1" * 400, "[" * 10**5, "{}"])
def test_a_damaged_line_is_named(text, tmp_path):
    (tmp_path / results.LINES).write_text(text)
    with pytest.raises(ValueError, match=rf"{results.LINES}, line 1: "):
        results.read(tmp_path)


def test_numbers_beyond_all_floats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"test error is 1000.* finite number"):
        results.put(tmp_path, [line(metrics={"test error": 10**400})])


def _put(folder, task, ready):
    ready.wait()
    for seed in range(50):
        results.put(folder, [line(task=task, seed=seed)])


def test_several_processes_write_to_one_folder(tmp_path):
    tasks = ("a", "b", "c")
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(len(tasks))
    processes = [context.Process(target=_put, args=(tmp_path, t, ready)) for t in tasks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert results.there(tmp_path, "task", "seed") == {
        (task, seed) for task in tasks for seed in range(50)
    }


def test_lines_are_grouped_in_their_order():
    lines = [line(seed=s, method=m) for s, m in ((1, "b"), (0, "a"), (0, "b"))]
    assert results.by(lines, "method") == {"b": [lines[0], lines[2]], "a": [lines[1]]}
    assert [*results.by(lines, "method", "seed")] == [("b", 1), ("a", 0), ("b", 0)]
