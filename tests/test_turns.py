"""Tests that take turns: none is left out, and nothing else is."""

from types import SimpleNamespace

import pytest

from tests import conftest


class Item:
    """What is collected of a test."""

    def __init__(self, nodeid, *marks):
        self.nodeid, self.marks = nodeid, set(marks)

    def add_marker(self, mark):
        self.marks.add(mark.name)

    def get_closest_marker(self, name):
        return name if name in self.marks else None


def collected(monkeypatch, **turn):
    """What is run of some tests, and what is said to be left out."""
    items = [Item(f"test_a.py::test_law[{at}]", "sweep") for at in range(17)]
    items += [Item(f"test_a.py::test_kind[{at}]") for at in range(4)]
    items += [Item("test_b.py::test_run[1]", "slow"), Item("test_b.py::test_b", "slow")]
    items += [Item("test_c.py::test_c"), Item("test_c.py::test_d", "slow", "always")]
    left_out = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    for name in (conftest.TURN, conftest.MEMBERS_TURN):
        monkeypatch.delenv(name, raising=False)
    for name, value in turn.items():
        monkeypatch.setenv(name, value)
    conftest.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
    return items, left_out


@pytest.mark.parametrize("of", range(1, 8))
@pytest.mark.parametrize("name", [conftest.TURN, conftest.MEMBERS_TURN])
def test_each_has_one_turn_and_all_else_every(name, of, monkeypatch):
    everything, none = collected(monkeypatch)
    assert none == []
    takes_turns = {
        item.nodeid
        for item in everything
        if (
            "[" in item.nodeid
            if name == conftest.MEMBERS_TURN
            else "slow" in item.marks and "always" not in item.marks
        )
    }
    # A sweep has one fast member.
    assert len(takes_turns) == (22 if name == conftest.MEMBERS_TURN else 18)
    turns = [collected(monkeypatch, **{name: f"{at}/{of}"}) for at in range(of)]
    sizes = []
    for runs, left_out in turns:
        names = [item.nodeid for item in runs]
        assert {item.nodeid for item in everything} - takes_turns <= set(names)
        assert len(names) + len(left_out) == len(everything)
        sizes.append(len(names))
    assert max(sizes) - min(sizes) <= 1
    for each in takes_turns:
        assert sum(each in {item.nodeid for item in runs} for runs, _ in turns) == 1
