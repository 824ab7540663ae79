"""Slow members of sweeps that take turns: none is left out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TURN

SWEEP = "tests/test_models.py"


def collected(*arguments, turn=None):
    """The tests of a file that would be run."""
    given = {name: value for name, value in os.environ.items() if name != TURN}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--collect-only", "-q", SWEEP),
            *("-o", "addopts=--strict-markers", *arguments),
        ],
        env=given | ({TURN: turn} if turn else {}) | {"PYTEST_ADDOPTS": ""},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_each_slow_member_of_a_sweep_has_one_turn_of_three_and_all_else_every():
    slow = collected("-m", "slow")
    fast = set(collected("-m", "not slow"))
    turns = [collected("-m", "slow or not slow", turn=f"{at}/3") for at in range(3)]
    members = [name for name in slow if "[" in name]
    assert len(members) > 30
    for name in members:
        assert sum(name in turn for turn in turns) == 1
    for turn in turns:
        assert fast <= set(turn)
        assert set(slow) - set(members) <= set(turn)
        assert len(members) / 4 < sum(name in turn for name in members)
