"""Every test runs with JAX's implicit promotions switched off.

Nothing of `l0jax` is imported here: its annotations are checked only if pytest's
`--jaxtyping-packages` is in place before the first import.
"""

import collections
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples at every run, and no clock: a test fails for its code alone.
settings.register_profile("laws", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("laws")


# What takes longest: the largest members of sweeps, the others being of the same kind,
# and runs of whole experiments beyond the first of each.
SLOW = re.compile(
    r"i3d|haiku_(resnet50|mobilenet_v1|vq_vae|lstm|transformer)|equinox_rope_decoder"
    r"|ResNet-50|ConvNeXt-T|ViT-B|test_models.*(-odd|-paper)"
    r"|test_relocation_runs|each_option_does_something"
    r"|every_variant_trains_and_is_removed\[(?!fixed\])"
    r"|a_target_is_met\[(?!macs)|a_comparison_goes_on_where|it_trains_and_is_recorded"
    r"|test_mnist.*\[compacted( weights)?\]|a_network_and_a_data_set_of_one_s_own"
    r"|a_page_run\[devices"
    r"|test_language_study.*(every_way_ends|a_budget\[|not_made_twice|are_read_with)"
    r"|the_report_is_made_of_the_folder|met_by_branches_and_units"
    r"|each_group_may_have_a_target_of_its_own|have_the_mean_loss_of_networks_of_their"
    r"|input_gradients_that_are_noise|in_the_time_that_is_left"
)


def pytest_configure(config):
    """Programs are compiled once for all tests, workers and what they start: that is
    most of the time. Where a folder is given, they stay there for other runs.

    (A worker that reads what another one is still writing compiles it again.)
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="compiled-")
        config.add_cleanup(functools.partial(shutil.rmtree, folder, ignore_errors=True))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    for name, value in (
        ("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"]),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
        # What is compiled runs for milliseconds. (XLA's other way to emit fusions,
        # --xla_cpu_use_fusion_emitters=false, compiles in two thirds of the time, and
        # gives wrong gradients of convolutions.)
        ("jax_disable_most_optimizations", True),
    ):
        jax.config.update(name, value)
        # Processes begin with the environment of their parent.
        os.environ[name.upper()] = str(value)


TURN = "SLOW_TURN"
"""Where `1/5` stands there, slow tests take turns: only every fifth is run, the first
being the one at 1, and those that are marked `always`."""
MEMBERS_TURN = "MEMBERS_TURN"
"""The same for the members of sweeps, slow or not."""


def pytest_collection_modifyitems(config, items):
    """Marks as slow what is so by name, and of each sweep all members but one.

    Which ones differs from law to law, so that every network and every family of gates
    stands under some laws in the fast run, and under all of them in the slow one.
    """
    sweeps = collections.defaultdict(list)
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
        elif item.get_closest_marker("sweep"):
            sweeps[item.nodeid.partition("[")[0]].append(item)
    for name, members in sweeps.items():
        chosen = zlib.crc32(name.encode()) % len(members)
        for item in members[:chosen] + members[chosen + 1 :]:
            item.add_marker(pytest.mark.slow)
    for turn, takes_turns in ((TURN, is_slow), (MEMBERS_TURN, is_member)):
        if turn in os.environ:
            at, of = map(int, os.environ[turn].split("/"))
            found = [item for item in items if takes_turns(item)]
            waits = set(found).difference(found[at::of])
            config.hook.pytest_deselected(items=[*waits])
            items[:] = [item for item in items if item not in waits]


def is_slow(item):
    return item.get_closest_marker("slow") and not item.get_closest_marker("always")


def is_member(item):
    return "[" in item.nodeid


MAPS = Path("/proc/self/maps")
MOST_MAPS = 30_000  # of the 65,530 that Linux gives a process
tests_run = itertools.count(1)


def pytest_runtest_teardown(item, nextitem):
    """Lets compiled programs go before they are more than a process may hold.

    Each takes some ten maps of memory, and thousands of tests run in one process: with
    no map left, XLA crashes.
    """
    del item, nextitem
    if next(tests_run) % 25 == 0 and MAPS.exists():
        with MAPS.open() as maps:
            many = sum(1 for _ in maps) > MOST_MAPS
        if many:
            jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def promotion_of_experiments(request):
    """Experiments run under JAX's default promotion of dtypes.

    They hand themselves to optax, whose Adam and schedules raise a float to the power
    of an integer count. Tests of the library stay strict and wrap just the optimiser.
    """
    imported = [
        getattr(value, "__name__", "") for value in vars(request.module).values()
    ]
    of_experiments = any(str(name).startswith("experiments") for name in imported)
    with jax.numpy_dtype_promotion("standard" if of_experiments else "strict"):
        yield


@pytest.fixture
def run_python():
    """Runs a program with so many simulated devices; gives what it printed."""

    def run(program, devices=1):
        flags = os.environ.get("XLA_FLAGS", "")
        flags += f" --xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
