"""A program that is killed in the middle of a function: for `benchmarks.kills`.

    python -m benchmarks.killed MODULE.FUNCTION CALL SECONDS PROGRAM FLAGS…

SIGKILL comes SECONDS after the function was called for the CALL-th time (0 is the
first), wherever the program is by then. With FUNCTION "start" it comes that long after
the process began.
"""

import functools
import importlib
import itertools
import os
import runpy
import signal
import sys
import threading
from typing import Any


def killed_in(name: str, call: int, seconds: float) -> None:
    """Has the process killed so many seconds after a call of a function."""

    def begin():
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()

    if name == "start":
        begin()
        return
    path, _, attribute = name.rpartition(".")
    holder: Any = importlib.import_module(path)
    function = getattr(holder, attribute)
    calls = itertools.count()

    @functools.wraps(function)
    def called(*arguments, **named):
        if next(calls) == call:
            begin()
        return function(*arguments, **named)

    setattr(holder, attribute, called)


if __name__ == "__main__":
    name, call, seconds, program, *flags = sys.argv[1:]
    sys.argv = [program, *flags]
    killed_in(name, int(call), float(seconds))
    runpy.run_module(program, run_name="__main__", alter_sys=True)
