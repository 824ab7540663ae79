"""Models that others wrote: what is found in them, and whether it can be removed.

    python -m benchmarks.zoo                   # of the packages that are installed
    python -m benchmarks.zoo --only "haiku_*"  # those whose names match
    python -m benchmarks.zoo --record          # and writes benchmarks/results/zoo.jsonl
    python -m benchmarks.zoo --record --again  # what is written down already too

Models run in a process beside this one, with a limit on the time of each. Small ones
are gated at random, narrowed, and compared; of large ones, at the sizes that were
published if there are any, only shapes are read.
The packages, beside those of the tests, are those of the extra `zoo`, which wants an
environment of its own, with Python 3.11:

    pip install -c constraints.txt -e ".[tests,zoo]"
"""

import argparse
import dataclasses
import fnmatch
import importlib.metadata
import math
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import l0jax
from benchmarks import others
from benchmarks.measure import RESULTS
from benchmarks.others import Model
from experiments.harness import json_lines
from l0jax import Structure, costs, units

FILE = RESULTS / "zoo.jsonl"

# The largest difference, over the largest output and over the largest gradient.
LIMITS = {"outputs": 1e-5, "gradients": 1e-4, "input gradients": 1e-4}
# Differences beyond this may be of rounding: they are measured again in float64.
ROUNDING = 1e-5
# Of an array whose gradients are noise (the biases of keys under a softmax, or inputs
# before a norm of which one unit is left), they are compared with a share of the
# largest gradient of all.
NOISE = 1e-2
# Where all gradients are smaller than this (behind a softmax that is saturated), that
# they agree says nothing.
LEAST = 1e-20
# (With groups gone as a whole, all of a network may be.)
SOME = "groups gone"
# Compiled fast rather than to run fast.
QUICK: Any = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

Keep = dict[str, np.ndarray]


# --------------------------------------------------------------------------- reading


def reading(model: Model, turns: int = 3) -> tuple[Structure, dict[str, Any]]:
    """What is found in a model, and in what time of the processor."""
    arguments = model.params, *model.inputs
    equations = count(jax.make_jaxpr(model.apply)(*arguments).jaxpr)
    alone, _ = taken(turns, lambda: jax.make_jaxpr(model.apply)(*arguments))
    both, structure = taken(turns, lambda: l0jax.trace(model.apply, *arguments))
    spent = max(both - alone, 0.0)
    half = {name: np.arange(g.size) < -(-g.size // 2) for name, g in halved(structure)}
    whole = costs.exact(structure, cost=costs.params)
    left = costs.exact(structure, half, costs.params)
    return structure, {
        "parameters": whole,
        "equations": equations,
        "seconds": round(spent, 3),
        "us_per_equation": round(1e6 * spent / max(equations, 1), 1),
        "groups": len(structure.groups),
        "covered": round(1 - sum(outside(structure).values()) / max(whole, 1), 4),
        "half": round(1 - left / max(whole, 1), 4),
        "unknown": sorted(structure.unknown),
        "frozen": why(structure),
    }


def taken(turns: int, function: Callable) -> tuple[float, Any]:
    """The median time of the processor in which a function is done, and its result."""
    seconds, found = [], None
    for _ in range(turns):
        begun = time.process_time()
        found = function()
        seconds.append(time.process_time() - begun)
    return statistics.median(seconds), found


def halved(structure: Structure) -> Iterator[tuple[str, l0jax.Group]]:
    """Groups of which half can go."""
    return ((n, group) for n, group in structure.groups.items() if group.size > 1)


def count(jaxpr: Any) -> int:
    """Equations, those of inner jaxprs included."""
    inner = [
        getattr(each, "jaxpr", each)
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        for each in (value if isinstance(value, tuple | list) else (value,))
        if hasattr(getattr(each, "jaxpr", each), "eqns")
    ]
    return len(jaxpr.eqns) + sum(map(count, inner))


def outside(structure: Structure) -> dict[str, int]:
    """How many elements of each trained array lie in no group along any axis."""
    covered: dict[tuple[str, int | None], np.ndarray] = {}
    for group in structure.groups.values():
        for slot in group.slots:
            there = units.owners(slot, group.size) >= 0
            before = covered.get((slot.path, slot.axis), np.zeros(len(there), bool))
            covered[slot.path, slot.axis] = before | there
    return {
        path: math.prod(
            size - int(covered.get((path, axis), np.zeros(0)).sum())
            for axis, size in enumerate(structure.arrays[path].shape)
        )
        for path in structure.trainable
    }


def why(structure: Structure) -> dict[str, float]:
    """Reasons for what is in no group, and the share of the parameters that each
    touches; the largest first."""
    alone, found = outside(structure), {}
    whole = costs.exact(structure, cost=costs.params)
    for each in structure.frozen.values():
        for path in {slot.path for slot in each.slots}:
            if alone.get(path):
                found.setdefault(each.why, set()).add(path)
    shares = {
        reason: sum(alone[path] for path in paths) / max(whole, 1)
        for reason, paths in found.items()
    }
    order = sorted(shares, key=lambda reason: -shares[reason])
    return {reason: round(shares[reason], 4) for reason in order if shares[reason]}


# -------------------------------------------------------------------------- comparing


def keeps(structure: Structure, seed: int = 0) -> dict[str, Keep]:
    """Six units of ten, at random; one of each group; and nothing of some groups."""
    rng = np.random.default_rng(seed)
    found: dict[str, Keep] = {"40 % closed": {}, "one left": {}, SOME: {}}
    for name, group in structure.groups.items():
        one = np.arange(group.size) == rng.integers(group.size)
        found["40 % closed"][name] = (rng.random(group.size) < 0.6) | one
        found["one left"][name] = one
        found[SOME][name] = np.full(group.size, rng.random() < 0.75)
    return found


Results = Callable[[Any, tuple[Any, ...], Any], tuple[list[Any], dict[str, Any]]]


def differentiated(apply: Callable, structure: Structure | None = None) -> Results:
    """`results(params, inputs, z)`, compiled once: floating outputs, and gradients of a
    random projection of them by all floating arrays, by path; inputs are
    "input 0.…".

    With a structure the parameters are first gated by `z`, and gradients are taken by
    the gated ones.
    """

    def function(params, inputs, z):
        if structure is not None:
            params = units.apply_gates(params, z, structure.groups)
        leaves, tree = jax.tree.flatten((params, inputs))
        moving = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

        def outputs(values):
            given = iter(values)
            every = [
                next(given) if moves else leaf
                for moves, leaf in zip(moving, leaves, strict=True)
            ]
            params, inputs = jax.tree.unflatten(tree, every)
            found = jax.tree.leaves(apply(params, *inputs))
            return [out for out in found if jnp.issubdtype(out.dtype, jnp.inexact)]

        values = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        found, pull = jax.vjp(outputs, values)
        rng = np.random.default_rng(1)
        directions = [np.asarray(rng.normal(size=o.shape), o.dtype) for o in found]
        names = [*units.arrays(params), *(f"input {n}" for n in units.arrays(inputs))]
        moved = [name for name, moves in zip(names, moving, strict=True) if moves]
        (gradients,) = pull([*map(jnp.asarray, directions)])
        return found, dict(zip(moved, gradients, strict=True))

    return jax.jit(function, compiler_options=QUICK)


class NoValueError(ValueError):
    """There is nothing to be compared."""


def largest(value: Any) -> float:
    return float(np.abs(np.asarray(value, np.complex128)).max(initial=0))


def apart(ours: Sequence[Any], theirs: Sequence[Any], least: float = 0.0) -> float:
    """The largest difference of any array over its largest element."""
    found = [0.0]
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"shapes {a.shape} and {b.shape} are compared")
        a, b = (np.asarray(each, np.complex128) for each in (a, b))
        scale = max(largest(a), least)
        if not np.isfinite(scale):
            raise NoValueError("a network without finite values can't be compared")
        found.append(largest(a - b) / scale if scale else largest(b))
    return max(found)


def compared(
    model: Model, structure: Structure, keep: Keep, gated: Results
) -> dict[str, Any]:
    """How far gated and narrowed are apart, and whether costs are those of the
    narrowed program. `gated` is the model's `differentiated`."""
    z = {name: np.asarray(flags, np.float32) for name, flags in keep.items()}
    outputs, gradients = gated(model.params, model.inputs, z)
    small, params = l0jax.narrow(structure, model.params, keep)
    ours, theirs = differentiated(small)(params, model.inputs, {})
    moving = {n: np.asarray(gradients[n]) for n in structure.arrays if n in gradients}
    cut = l0jax.shrink(moving, keep, within(structure, moving))
    most = max(map(largest, cut.values()), default=0.0)
    given = [name for name in theirs if name.startswith("input ")]
    left = l0jax.trace(small, params, *model.inputs)
    # What reads no input any more has no batch, of one example of which it would cost.
    gone = not all(flags.any() for flags in keep.values())
    kinds = [costs.params] if gone else [costs.params, costs.macs]
    return {
        "outputs": apart(outputs, ours),
        "gradients": apart(
            [*cut.values()], [or_zeros(theirs[n], cut[n]) for n in cut], NOISE * most
        ),
        "input gradients": apart(
            [gradients[n] for n in given], [theirs[n] for n in given], NOISE * most
        ),
        "largest gradient": most,
        "costs": all(
            costs.exact(structure, keep, cost) == costs.exact(left, cost=cost)
            for cost in kinds
        ),
    }


def or_zeros(found: Any, expected: Any) -> Any:
    """A gradient; zeros if the array is one that nothing reads, which is empty."""
    return found if found.size else np.zeros_like(expected)


def within(structure: Structure, paths: Any) -> dict[str, l0jax.Group]:
    """The groups, in these arrays alone."""
    return {
        name: dataclasses.replace(
            group,
            used_by=tuple(s for s in group.used_by if s.path in paths),
            made_by=tuple(s for s in group.made_by if s.path in paths),
        )
        for name, group in structure.groups.items()
    }


def checked(model: Model, structure: Structure) -> dict[str, dict[str, Any]]:
    """`compared` for each of `keeps`. Where groups are gone a network may have no
    value (a vector over its length); then it isn't compared there."""
    gated, found = differentiated(model.apply, structure), {}
    for name, keep in keeps(structure).items():
        try:
            found[name] = compared(model, structure, keep, gated)
        except NoValueError:
            if name != SOME:
                raise
    return found


def worst(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The largest difference of each kind."""
    return {what: max(check[what] for check in found.values()) for what in LIMITS}


def doubled(model: Model) -> Model:
    """The model with arrays of float64 for those of float32."""

    def double(leaf):
        return np.asarray(leaf, np.float64) if leaf.dtype == np.float32 else leaf

    arrays = model.params, model.inputs
    params, inputs = jax.tree.map(double, arrays)
    return dataclasses.replace(model, params=params, inputs=inputs)


def in_float64(make: Callable[[bool], Model]) -> dict[str, dict[str, Any]]:
    """`checked` in float64; but for what the model itself asks for in float32."""
    with jax.enable_x64(True):
        model = doubled(others.filled(make(False)))
        structure = l0jax.trace(model.apply, model.params, *model.inputs)
        return checked(model, structure)


def verdict(found: dict[str, dict[str, Any]]) -> str:
    """Which limits are not kept; empty if all are."""
    broken = [
        f"{name}: {what} {value[what]:.1e}"
        for name, value in found.items()
        for what, limit in LIMITS.items()
        if not value[what] <= limit
    ]
    broken += [
        f"{name}: no gradients to compare"
        for name, value in found.items()
        if name != SOME and not value["largest gradient"] >= LEAST
    ]
    broken += [f"{name}: costs" for name, v in found.items() if not v["costs"]]
    return "; ".join(broken)


def batch(model: Model, structure: Structure) -> str:
    """Whether what is narrowed takes a batch of another size: "any", or "fixed"."""
    small, params = l0jax.narrow(structure, model.params, {})

    def longer(leaf):
        shape = (leaf.shape[0] + 1, *leaf.shape[1:]) if leaf.ndim else ()
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    try:
        jax.eval_shape(small, params, *jax.tree.map(longer, model.inputs))
    except ValueError as error:
        if "was traced" not in str(error):
            raise
        return "fixed"
    return "any"


def floating(model: Model) -> bool:
    """Whether there are inputs in which it can be differentiated."""
    leaves = jax.tree.leaves(model.inputs)
    return any(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves)


# --------------------------------------------------------------------------- one model


def measured(name: str, small_only: bool) -> dict[str, Any]:
    """The row of a model."""
    entry = others.MODELS[name]
    row: dict[str, Any] = {
        "model": name,
        "package": entry.package,
        "version": importlib.metadata.version(entry.package),
        "jax": jax.__version__,
    }
    small = others.filled(entry.make(False))
    structure, row["small"] = reading(small, turns=1)
    row["batch"] = batch(small, structure)
    row["floating inputs"] = floating(small)
    row["checks"] = checked(small, structure)
    if not max(worst(row["checks"]).values()) <= ROUNDING:
        row["in float64"] = in_float64(entry.make)
    row["broken"] = verdict(row.get("in float64", row["checks"]))
    if not small_only:
        row["published"] = entry.published
        _, row["large"] = reading(entry.make(True))
    return row


class Worker:
    """A process that measures models of one file, and is ended if one takes longer."""

    def __init__(self, file: str, small_only: bool):
        self.file = file
        context = multiprocessing.get_context("spawn")
        self.ours, its = context.Pipe()
        self.process = context.Process(target=_serve, args=(its, file, small_only))
        self.process.start()
        its.close()

    def row(self, name: str, limit: float) -> dict[str, Any]:
        """The row of a model, or of what became of it."""
        self.ours.send(name)
        # At the end of the process too, there is something to be read: its end.
        if not self.ours.poll(limit):
            self.end()
            return failed(name, f"not done in {limit:.0f} s")
        try:
            return self.ours.recv()
        except EOFError:
            self.end()
            return failed(name, f"it ended with status {self.process.exitcode}")

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(connection: Any, file: str, small_only: bool) -> None:
    jax.config.update("jax_platforms", "cpu")
    others.load([file])
    while True:
        name = connection.recv()
        try:
            row = measured(name, small_only)
        except Exception as error:
            row = failed(name, said(error))
        connection.send(row)
        jax.clear_caches()


def said(error: Exception) -> str:
    """An error in one line, without colors."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return f"{type(error).__name__}: {' '.join(text.split())}"[:300].strip()


def failed(name: str, error: str) -> dict[str, Any]:
    package = others.MODELS[name].package
    version = importlib.metadata.version(package)
    return {"model": name, "package": package, "version": version, "error": error}


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['model']}: {row['error']}"
    best = row.get("large", row["small"])
    return (
        f"{row['model']}: {best['parameters']:,} parameters, "
        f"{best['equations']} equations, {best['seconds']:.2f} s, "
        f"{best['groups']} groups, covered {best['covered']:.1%}, "
        f"half {best['half']:.1%}; "
        + ", ".join(f"{k} {value:.1e}" for k, value in worst(row["checks"]).items())
        + (f"; BROKEN {row['broken']}" if row["broken"] else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=["*"], help="names or patterns")
    parser.add_argument("--small", action="store_true", help="no large ones")
    parser.add_argument("--record", action="store_true", help="write it down")
    parser.add_argument("--again", action="store_true", help="also what is recorded")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a model")
    arguments = parser.parse_args()
    missing = others.load()
    if missing:
        print(f"not installed: {', '.join(missing)}")
    recorded = json_lines.read(FILE) if arguments.record else []
    done = {row["model"] for row in recorded if "error" not in row}
    worker = None
    for name in others.MODELS:
        if not any(fnmatch.fnmatch(name, each) for each in arguments.only):
            continue
        if name in done and not arguments.again:
            continue
        file = others.MODELS[name].file
        if worker is None or worker.file != file or not worker.process.is_alive():
            if worker is not None:
                worker.end()
            worker = Worker(file, arguments.small)
        row = worker.row(name, arguments.limit)
        print(line(row), flush=True)
        if arguments.record:
            json_lines.merge(FILE, [row], lambda row: (row["package"], row["model"]))
    if worker is not None:
        worker.end()


if __name__ == "__main__":
    os.environ.setdefault("KERAS_BACKEND", "jax")
    main()
