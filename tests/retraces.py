"""How often a compiled function is traced.

The size of the function's own cache doesn't say: JAX's holds some thousand programs in
all, and nothing new when it is full. Nor does `chex.assert_max_traces` in a test that
runs with several parameters: functions of one name and place are one to it.
"""

import functools


def traced_once(function):
    """The function, which fails when it is called, thus traced, a second time."""
    traced = []

    @functools.wraps(function)
    def run(*args, **kwargs):
        assert not traced, f"{function} is traced again"
        traced.append(function)
        return function(*args, **kwargs)

    return run
