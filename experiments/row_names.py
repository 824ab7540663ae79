"""Rows of tables are asked for by name on the command line."""

from collections.abc import Iterable, Sequence


def check(names: Sequence[str], there: Iterable[str]) -> None:
    """Ends the program, with the names that there are, unless all of `names` are among
    them and there is at least one."""
    known = list(there)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown row {unknown[0]!r}; there is {', '.join(known)}")
    if not names:
        raise SystemExit(f"give one or more rows of {', '.join(known)}")
