"""Files of JSON lines."""

import pytest

from experiments.harness import json_lines


def test_what_was_written_is_read(tmp_path):
    file = tmp_path / "new" / "results.jsonl"
    assert json_lines.read(file) == []
    json_lines.write(file, [{"a": 1}, {"a": 2}])
    json_lines.add(file, {"b": "ε"})
    assert json_lines.read(file) == [{"a": 1}, {"a": 2}, {"b": "ε"}]
    assert [each.name for each in file.parent.iterdir()] == ["results.jsonl"]


def test_merged_entries_replace_their_like_and_are_in_order(tmp_path):
    file = tmp_path / "results.jsonl"
    json_lines.write(file, [{"a": 3, "b": 1}, {"a": 1, "b": 1}])
    json_lines.merge(file, [{"a": 2, "b": 2}, {"a": 1, "b": 2}], lambda e: e["a"])
    found = [(e["a"], e["b"]) for e in json_lines.read(file)]
    assert found == [(1, 2), (2, 2), (3, 1)]


def test_a_kill_while_writing_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "results.jsonl"
    json_lines.write(file, [{"a": 1}])

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(json_lines.Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        json_lines.add(file, {"a": 2})
    assert json_lines.read(file) == [{"a": 1}]


def test_a_line_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"a": 1}\n{"a":')
    with pytest.raises(ValueError, match=r"results.jsonl, line 2: .*mend it"):
        json_lines.read(file)
