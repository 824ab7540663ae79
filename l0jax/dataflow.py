"""The values within a function: which there are, what they depend on, how to get them.

Pruning methods look into a network: at what a layer reads and writes, at the loss of a
classifier attached halfway, at one layer trained alone while all before it stays. A
`Dataflow` is the function's jaxpr with its calls written out, and evaluates any of its
values from any others, so that no model has to be written for it.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
from jaxtyping import Array, PyTree

from l0jax.derivatives import bind
from l0jax.program import CALLS, REMATS, line_of
from l0jax.units import arrays

INLINED = (*CALLS, *REMATS)
"""Calls that are written out. Functions with derivatives of their own stay whole."""


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        at: its place in the order of the program.
        eqn: the equation of the jaxpr.
        ins: numbers of the values that it reads.
        outs: numbers of the values that it writes.
    """

    at: int
    eqn: Any
    ins: tuple[int, ...]
    outs: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.eqn.primitive.name} at {line_of(self.eqn) or 'an unknown line'}"


@dataclass(frozen=True, eq=False)
class Dataflow:
    """A function as steps between numbered values.

    Attributes:
        steps: in an order in which they can be run.
        params: the number of each array of the parameters, by path.
        inputs: numbers of the arrays of the inputs.
        outs: numbers of the arrays that the function gives.
        constants: the values of those that are fixed.
        shapes: shape and dtype of each value.
    """

    steps: tuple[Step, ...]
    params: Mapping[str, int]
    inputs: tuple[int, ...]
    outs: tuple[int, ...]
    constants: Mapping[int, Any]
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    def evaluate(self, known: Mapping[int, Any], wanted: Sequence[int]) -> list[Array]:
        """The values `wanted`, from those that are `known`, by as few steps as do.

        A pure function: it can be compiled and differentiated.

        Raises:
            ValueError: if they depend on a parameter or an input that isn't known.
        """
        values = {**self.constants, **known}
        for step in self._needed(values, wanted):
            given = [values[value] for value in step.ins]
            values.update(zip(step.outs, bind(step.eqn, given), strict=True))
        return [values[value] for value in wanted]

    def known(self, params: PyTree, *inputs: PyTree) -> dict[int, Any]:
        """What the function's arguments say, for `evaluate`: the parameters, and the
        inputs unless they are left out.

        Raises:
            ValueError: if the parameters have other paths than those that were traced,
                or there are more or fewer inputs.
        """
        given = arrays(params)
        if given.keys() != self.params.keys():
            other = sorted(given.keys() ^ self.params.keys())
            raise ValueError(
                f"the parameters differ from those that were traced in {other[0]!r}"
            )
        known = {number: given[path] for path, number in self.params.items()}
        if inputs:
            known |= dict(zip(self.inputs, jax.tree.leaves(inputs), strict=True))
        return known

    def dependents(self, of: Iterable[int]) -> frozenset[int]:
        """These values, and all that are computed from any of them."""
        found = set(of)
        for step in self.steps:
            if not found.isdisjoint(step.ins):
                found.update(step.outs)
        return frozenset(found)

    def frontier(
        self, changed: Iterable[int], wanted: Sequence[int]
    ) -> tuple[int, ...]:
        """What has to be stored of each example so that `wanted` can be evaluated again
        and again while only `changed` changes: values that depend on the inputs and not
        on `changed`, as few as there are."""
        moving, data = self.dependents(changed), self._data
        read = [value for value in wanted if value not in moving]
        for step in self._needed(self.constants.keys(), wanted, strict=False):
            if not moving.isdisjoint(step.ins):
                read += [value for value in step.ins if value not in moving]
        return tuple(dict.fromkeys(value for value in read if value in data))

    def reader(self, path: str) -> Step:
        """The step that brings the parameter at `path` together with the data.

        Raises:
            ValueError: unless there is one such step.
        """
        if path not in self.params:
            raise ValueError(f"no array at {path!r}; there is {', '.join(self.params)}")
        data, carried = self._data, {self.params[path]}
        found = []
        for step in self.steps:
            if carried.isdisjoint(step.ins):
                continue
            if data.isdisjoint(step.ins):
                carried.update(step.outs)
            else:
                found.append(step)
        if len(found) != 1:
            at = "; ".join(map(str, found)) or "no step"
            raise ValueError(
                f"the parameter {path!r} must meet the data in one step; it does in "
                f"{len(found)}: {at}"
            )
        return found[0]

    def reads(self, path: str) -> int:
        """The value that the parameter at `path` is multiplied by.

        Raises:
            ValueError: as `reader`; if that step reads several values of the data.
        """
        step, data = self.reader(path), self._data
        found = dict.fromkeys(value for value in step.ins if value in data)
        if len(found) != 1:
            raise ValueError(
                f"{step}, which reads {path!r}, has {len(found)} arguments that depend "
                "on the data; a product by one of them is needed"
            )
        return next(iter(found))

    def makes(self, path: str) -> int:
        """The value that the parameter at `path` makes: what its step writes.

        Raises:
            ValueError: as `reader`; if that step writes several values.
        """
        step = self.reader(path)
        if len(step.outs) != 1:
            raise ValueError(f"{step}, which reads {path!r}, writes {len(step.outs)}")
        return step.outs[0]

    def after(self, path: str) -> int:
        """The first value from the step of `path` on through which all must pass that
        reaches the first output: the end of a residual block, a concatenation, or what
        the step writes where nothing runs beside it.

        Raises:
            ValueError: as `reader`; if that step is beside every such value.
        """
        start = self.reader(path).at
        for at, value in self._passes:
            if at >= start:
                return value
        raise ValueError(f"nothing that {path!r} makes reaches the output")

    @functools.cached_property
    def _data(self) -> frozenset[int]:
        """The values that depend on the inputs."""
        return self.dependents(self.inputs)

    @functools.cached_property
    def _passes(self) -> tuple[tuple[int, int], ...]:
        """Values through which all must pass that reaches the first output, each with
        the place of the step that makes it."""
        data, wanted, found = self._data, self.outs[:1], []
        steps = self._needed(self.constants.keys(), wanted, strict=False)
        waits = Counter(
            value for step in steps for value in set(step.ins) if value in data
        )
        waits.update(wanted)
        alive = {value for value in self.inputs if waits[value]}
        for step in steps:
            for value in set(step.ins) & data:
                waits[value] -= 1
                if not waits[value]:
                    alive.discard(value)
            made = {value for value in step.outs if value in data and waits[value]}
            alive |= made
            if len(alive) == 1 and made:
                found.append((step.at, next(iter(alive))))
        return tuple(found)

    def _needed(
        self, known: Iterable[int], wanted: Sequence[int], strict: bool = True
    ) -> list[Step]:
        """The steps from what is known to what is wanted, in their order."""
        known = set(known)
        open_, chosen = {value for value in wanted if value not in known}, []
        for step in reversed(self.steps):
            if open_.isdisjoint(step.outs):
                continue
            open_.difference_update(step.outs)
            open_.update(value for value in step.ins if value not in known)
            chosen.append(step)
        if strict and open_:
            names = {value: repr(path) for path, value in self.params.items()}
            names |= {v: f"input {i}" for i, v in enumerate(self.inputs)}
            missing = ", ".join(names.get(v, f"value {v}") for v in sorted(open_))
            raise ValueError(
                f"what is wanted depends on {missing}: not among the known"
            )
        return chosen[::-1]


def dataflow(apply: Callable[..., PyTree], params: PyTree, *inputs: PyTree) -> Dataflow:
    """The values within `apply(params, *inputs)`, at the shapes of these arguments.

    Args:
        apply: any function of JAX.
        params: its parameters, a pytree of arrays or of their shapes.
        *inputs: pytrees of arrays or of their shapes. Of each the batch is as large as
            it will be when values are evaluated.
    """
    closed = jax.make_jaxpr(apply)(params, *inputs)
    steps: list[Step] = []
    constants: dict[int, Any] = {}
    shapes: list[jax.ShapeDtypeStruct] = []
    number = itertools.count()

    def new(aval: Any) -> int:
        shapes.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return next(number)

    def constant(aval: Any, value: Any) -> int:
        constants[at := new(aval)] = value
        return at

    def write_out(jaxpr, fixed, given: Sequence[int]) -> list[int]:
        inside = [
            constant(v.aval, c) for v, c in zip(jaxpr.constvars, fixed, strict=True)
        ]
        known = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*inside, *given], strict=True)
        )

        def value_of(atom) -> int:
            if isinstance(atom, jax.extend.core.Literal):
                return constant(atom.aval, atom.val)
            return known[atom]

        for eqn in jaxpr.eqns:
            ins = tuple(map(value_of, eqn.invars))
            if eqn.primitive.name in INLINED:
                called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                body = getattr(called, "jaxpr", called)
                outs = write_out(body, getattr(called, "consts", ()), ins)
            else:
                outs = [new(v.aval) for v in eqn.outvars]
                steps.append(Step(len(steps), eqn, ins, tuple(outs)))
            known.update(zip(eqn.outvars, outs, strict=True))
        return [value_of(atom) for atom in jaxpr.outvars]

    numbers = [new(v.aval) for v in closed.jaxpr.invars]
    outs = write_out(closed.jaxpr, closed.consts, numbers)
    paths = list(arrays(params))
    return Dataflow(
        tuple(steps),
        dict(zip(paths, numbers[: len(paths)], strict=True)),
        tuple(numbers[len(paths) :]),
        tuple(outs),
        constants,
        tuple(shapes),
    )
