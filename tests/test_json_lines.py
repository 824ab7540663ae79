"""Files of JSON lines."""

import pytest

from experiments import json_lines


def test_what_was_written_is_read(tmp_path):
    file = tmp_path / "new" / "results.jsonl"
    assert json_lines.read(file) == []
    json_lines.write(file, [{"a": 1}, {"a": 2}])
    json_lines.add(file, {"b": "ε"})
    assert json_lines.read(file) == [{"a": 1}, {"a": 2}, {"b": "ε"}]
    assert [each.name for each in file.parent.iterdir()] == ["results.jsonl"]


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
