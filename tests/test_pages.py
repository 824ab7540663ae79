"""Steps with large and with small pages of memory are told apart and compared."""

import argparse
import platform

import jax
import pytest

from benchmarks import pages


def test_a_step_is_timed_and_its_pages_are_counted(monkeypatch):
    monkeypatch.setattr(pages, "NETWORKS", {"mlp": 4})
    monkeypatch.setattr(pages, "STEPS", 2)
    with jax.numpy_dtype_promotion("standard"):  # Of optax, as in a program.
        seconds, given = pages.measured()["mlp"]
    assert seconds > 0
    assert given >= 0


def test_turns_are_compared_in_pairs(monkeypatch):
    monkeypatch.setattr(pages, "NETWORKS", {"mlp": 4})
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.35"))
    turns = iter([(True, 2.0), (False, 4.0), (True, 3.0), (False, 4.0)])

    def process(large):
        expected, seconds = next(turns)
        assert large == expected
        return {"mlp": [seconds, 8.0 / seconds]}

    monkeypatch.setattr(pages, "process", process)
    (line,) = pages.main(argparse.Namespace(turns=2))
    assert line["value"] == "0.62×"  # The median of 1/2 and 3/4.
    assert line["detail"].endswith("large pages 3, small pages 2")


def test_other_tunables_are_kept(monkeypatch):
    seen = []

    def run(command, env, **_):
        seen.append(env[pages.TUNABLES])
        return argparse.Namespace(stdout="{}")

    monkeypatch.setattr(pages.subprocess, "run", run)
    monkeypatch.setenv(pages.TUNABLES, "glibc.malloc.check=1:glibc.malloc.hugetlb=2")
    pages.process(large=True)
    pages.process(large=False)
    assert seen == [f"glibc.malloc.check=1:{pages.LARGE}", "glibc.malloc.check=1"]


@pytest.mark.parametrize("found", [("", ""), ("glibc", "2.31")])
def test_other_c_libraries_are_refused(monkeypatch, found):
    monkeypatch.setattr(platform, "libc_ver", lambda: found)
    with pytest.raises(SystemExit, match=r"setting of glibc ≥ 2\.35"):
        pages.main(argparse.Namespace(turns=1))
