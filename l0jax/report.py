"""Before and after: what a network was and what is left of it, measured; and how long
networks of many sizes take.

This file alone looks at the clock.
"""

import contextlib
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import PyTree

import l0jax.nnx
from l0jax import costs
from l0jax.liveness import constant
from l0jax.narrow import narrow
from l0jax.structure import Structure, columns
from l0jax.tracing import evaluated, trace
from l0jax.units import Keep

Model = nnx.Module | tuple[Callable[..., PyTree] | linen.Module, PyTree]
"""An NNX module, which is called as in evaluation, or `(apply, params)`, or `(module,
variables)` of Linen."""


@dataclass(frozen=True)
class Side:
    """One of the two networks.

    Attributes:
        shapes: shape of each array of its parameters and state, by path.
        params: number of parameters.
        macs: multiply-accumulates of a call with one example.
        bytes: bytes of all arrays.
        seconds: median seconds of a call, by batch size.
        program_bytes: bytes of the compiled program as it is stored, by batch size.
    """

    shapes: dict[str, tuple[int, ...]]
    params: int
    macs: int
    bytes: int
    seconds: dict[int, float]
    program_bytes: dict[int, int]


@dataclass(frozen=True)
class Report:
    """What `report` measured; prints as a table.

    Attributes:
        before, after: the two networks.
        device: on what they ran.
        dead: numbers of the outputs that depended on the inputs before, and are the
            same for all inputs after.
    """

    before: Side
    after: Side
    device: str
    dead: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """All of it, for `json.dump`."""
        return dataclasses.asdict(self)

    def lines(self) -> list[tuple[str, float, float]]:
        """`(what, before, after)` for each number."""
        before, after = self.before, self.after
        lines: list[tuple[str, float, float]] = [
            ("parameters", float(before.params), float(after.params)),
            ("multiply-accumulates", float(before.macs), float(after.macs)),
            ("bytes of arrays", float(before.bytes), float(after.bytes)),
        ]
        for batch in before.seconds:
            one, other = before.seconds[batch], after.seconds[batch]
            lines += [
                (f"ms a call, batch {batch}", 1e3 * one, 1e3 * other),
                (f"examples a second, batch {batch}", batch / one, batch / other),
                (
                    f"bytes of the program, batch {batch}",
                    float(before.program_bytes[batch]),
                    float(after.program_bytes[batch]),
                ),
            ]
        return lines

    def __str__(self) -> str:
        rows = [["", "before", "after", "after / before"]]
        for what, before, after in self.lines():
            share = f"{after / before:.3f}" if before else "-"
            rows.append([what, _number(before), _number(after), share])
        shapes = [["array", "before", "after"]]
        for path, shape in self.before.shapes.items():
            left = self.after.shapes.get(path)
            shapes.append([path, _shape(shape), "-" if left is None else _shape(left)])
        return "\n".join(
            [
                *columns(rows, right=(1, 2, 3)),
                "",
                *columns(shapes, right=(1, 2)),
                "",
                f"measured on {self.device}",
                *(
                    f"DEAD: output {number} is the same for all inputs by now: too "
                    "many units are gone"
                    for number in self.dead
                ),
            ]
        )

    def plot(self) -> Any:
        """A Matplotlib figure of what is left of each number, in per cent."""
        # Matplotlib is no dependency of the library.
        from matplotlib.figure import Figure

        shown = [line for line in self.lines() if line[1] and "second" not in line[0]]
        names = [what for what, _, _ in shown][::-1]
        shares = [100 * after / before for _, before, after in shown][::-1]
        figure = Figure(figsize=(8, 0.42 * len(names) + 1.1), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(names, shares, color="#3b6fb6", height=0.62)
        axes.bar_label(bars, [f"{share:.1f} %" for share in shares], padding=4)
        axes.axvline(100, color="0.4", linewidth=1)
        axes.set_xlim(0, max(100, *shares) * 1.13)
        axes.set_xlabel("left of the network before, per cent")
        axes.set_title(f"Before and after, on {self.device}")
        axes.spines[["top", "right"]].set_visible(False)
        return figure


def report(
    before: Model,
    after: Model,
    *inputs: PyTree,
    batch_sizes: Sequence[int] = (1, 256),
    calls: int = 20,
    **keywords: Any,
) -> Report:
    """Measures two networks on the same inputs, in turns.

    Args:
        before: a network.
        after: what is left of it.
        *inputs: an example of the inputs, or its shapes; the leading axis of each is
            the batch. Both networks take inputs of the same shape.
        batch_sizes: at which a call is timed.
        calls: of how many the median is taken, for each network and batch size.
        **keywords: with which modules are called, such as `train=False`.

    Raises:
        ValueError: if a batch size or `calls` is not positive.
    """
    for number in (*batch_sizes, calls):
        if number < 1:
            raise ValueError(f"batch sizes and calls must be at least 1, got {number}")
    sides = [_function(each, keywords) for each in (before, after)]
    seconds: list[dict[int, float]] = [{}, {}]
    sizes: list[dict[int, int]] = [{}, {}]
    for batch in batch_sizes:
        given = jax.tree.map(lambda a, n=batch: _of_batch(a, n), inputs)
        with _compiled_here():
            compiled = [
                jax.jit(apply).lower(params, *given).compile()
                for apply, params in sides
            ]
        medians = _medians(
            [
                functools.partial(call, params, *given)
                for call, (_, params) in zip(compiled, sides, strict=True)
            ],
            calls,
        )
        for at in range(2):
            seconds[at][batch] = medians[at]
            executable: Any = compiled[at].runtime_executable()
            sizes[at][batch] = len(executable.serialize())
    # Of more, costs would be those of all, where examples depend on one another.
    example = jax.tree.map(lambda a: _of_batch(a, 1), inputs)
    structures = [
        trace(model, *example, **keywords)
        if isinstance(model, nnx.Module)
        else trace(*side, *example)
        for model, side in zip((before, after), sides, strict=True)
    ]
    one, other = (
        _side(structure, seconds[at], sizes[at])
        for at, structure in enumerate(structures)
    )
    was, now = map(_dead, structures)
    dead = (k for k, both in enumerate(zip(was, now, strict=True)) if both == (0, 1))
    return Report(one, other, jax.devices()[0].device_kind, tuple(dead))


@contextlib.contextmanager
def _compiled_here() -> Iterator[None]:
    """Without JAX's persistent cache: programs that come from there are stored in
    another number of bytes than those that were compiled."""
    before = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _dead(structure: Structure) -> list[bool]:
    """For each output whether it is the same for all inputs."""
    jaxpr = structure.traced.here.program.jaxpr
    return constant(jaxpr, jaxpr.invars[len(structure.traced.params) :])


def measure_latency(
    model: Model,
    structure: Structure,
    *inputs: PyTree,
    sizes: Mapping[str, Iterable[int]],
    calls: int = 20,
) -> costs.Table:
    """Seconds of a call of a network with fewer units, for every combination of sizes;
    `costs.interpolated` makes a cost of it.

    All networks are compiled first. Then each is called once in every round, in an
    order of its own, so that a time at which the machine is busy touches all alike.

    Args:
        model: the network; its values don't matter.
        structure: its groups of units.
        *inputs: what it is called with, of the batch size that is meant.
        sizes: for each group, the numbers of units to measure, which lie evenly among
            all; of other groups all units are there.
        calls: of how many the median is taken, for each combination.

    Raises:
        ValueError: if there is no such group or it has no so many units, or if `calls`
            is not positive.
    """
    if calls < 1:
        raise ValueError(f"calls must be at least 1, got {calls}")
    grid = {name: tuple(sorted(set(each))) for name, each in sizes.items()}
    for name, each in grid.items():
        if name not in structure.groups:
            raise ValueError(
                f"unknown group {name!r}; there is {', '.join(structure.groups)}"
            )
        size = structure.groups[name].size
        if not each or each[0] < 0 or each[-1] > size:
            raise ValueError(
                f"the sizes of {name!r} must lie between 0 and {size}, got {each}"
            )
    inputs = jax.tree.map(jnp.asarray, inputs)
    networks = []
    for widths in itertools.product(*grid.values()):
        keep = {}
        for name, width in zip(grid, widths, strict=True):
            keep[name] = np.zeros(structure.groups[name].size, bool)
            keep[name][np.arange(width) * len(keep[name]) // max(width, 1)] = True
        apply, params = _function(_without(model, structure, keep), {})
        call = jax.jit(apply).lower(params, *inputs).compile()
        networks.append(functools.partial(call, params, *inputs))
    shape = tuple(map(len, grid.values()))
    seconds = np.reshape(_medians(networks, calls), shape)
    return costs.Table(tuple(grid), tuple(grid.values()), seconds)


def _without(model: Model, structure: Structure, keep: Keep) -> Model:
    if isinstance(model, nnx.Module):
        return l0jax.nnx.shrink(model, keep, structure.groups)
    return narrow(structure, model[1], keep)


def _medians(networks: Sequence[Callable[[], PyTree]], calls: int) -> list[float]:
    """Median seconds of a call of each."""
    taken: list[list[float]] = [[] for _ in networks]
    order = np.random.default_rng(0)
    for _ in range(calls + 1):
        # None always follows the same one, which leaves the caches as it does.
        for at in order.permutation(len(networks)):
            begun = time.perf_counter()
            jax.block_until_ready(networks[at]())
            taken[at].append(time.perf_counter() - begun)
    # The first call also moves arrays and fills caches.
    return [statistics.median(each[1:]) for each in taken]


def _side(
    structure: Structure, seconds: dict[int, float], sizes: dict[int, int]
) -> Side:
    return Side(
        {path: tuple(leaf.shape) for path, leaf in structure.arrays.items()},
        costs.exact(structure, cost=costs.params),
        costs.exact(structure, cost=costs.macs),
        costs.exact(structure, cost=costs.bytes),
        seconds,
        sizes,
    )


def _function(
    model: Model, keywords: Mapping[str, Any]
) -> tuple[Callable[..., PyTree], PyTree]:
    if isinstance(model, nnx.Module):
        graph, state = nnx.split(evaluated(model))
        return lambda state, *x: nnx.merge(graph, state)(*x, **keywords), state
    apply, params = model
    if isinstance(apply, linen.Module):
        return functools.partial(apply.apply, **keywords), params
    return apply, params


def _of_batch(leaf: Any, batch: int) -> Any:
    """The first examples, again and again until there are as many as are asked for."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros((batch, *leaf.shape[1:]), leaf.dtype)
    leaf = jnp.asarray(leaf)
    return leaf[jnp.arange(batch) % leaf.shape[0]]


def _number(value: float) -> str:
    return (
        f"{value:,.0f}"
        if float(value).is_integer() or value >= 1000
        else f"{value:.3f}"
    )


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"
