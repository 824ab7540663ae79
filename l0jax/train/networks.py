"""What is trained: an NNX module, a Linen module, or a plain function.

All three are the same to training: parameters, the *rest* (whatever else the network
reads and may write: running statistics, keys of dropout, counters), and a way to run it
that gives the rest back as it was left.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from flax import linen as nn
from flax import nnx
from jaxtyping import PRNGKeyArray, PyTree

import l0jax.linen
import l0jax.nnx
from l0jax import gating, units
from l0jax.equivalence import CantShrink, difference
from l0jax.narrow import narrow
from l0jax.remembered import Attributes
from l0jax.structure import Structure
from l0jax.tracing import trace
from l0jax.units import Keep


@runtime_checkable
class Network(Protocol):
    """A network as training sees it: a value, with the arrays that it starts with."""

    @property
    def params(self) -> PyTree:
        """What is trained."""
        ...

    @property
    def rest(self) -> PyTree:
        """What else it reads, and may write."""
        ...

    @property
    def below(self) -> str:
        """What the paths of parameters begin with in its structure: "" or "params."."""
        ...

    @property
    def key(self) -> Any:
        """Equal for networks that run the same code."""
        ...

    def run(
        self, params: PyTree, rest: PyTree, key: PRNGKeyArray, training: bool
    ) -> tuple[Any, Callable[[], PyTree]]:
        """What a loss calls, and a function that tells the rest after its calls."""
        ...

    def structure(self, inputs: Sequence[PyTree]) -> Structure:
        """Its units, as in evaluation."""
        ...

    def tree(self, params: PyTree, rest: PyTree) -> PyTree:
        """All its arrays, by the paths of the structure."""
        ...

    def smaller(
        self, trees: Sequence[PyTree], keep: Keep, structure: Structure
    ) -> tuple["Network", list[tuple[PyTree, PyTree]]]:
        """The network without the units that are not kept, which starts with what is
        left of the first of some `tree`; and the parameters and the rest that are left
        of each.

        Raises:
            CantShrink: if its code is another function when its arrays are smaller, or
                can't be told its sizes.
        """
        ...

    def finished(self, tree: PyTree, keep: Keep, structure: Structure) -> Any:
        """What is left in the end, to be called in evaluation."""
        ...

    def whole(self, tree: PyTree) -> Any:
        """With all its units, to be called in evaluation."""
        ...


def network(model: Any) -> Network:
    """A network from what a user has: an NNX module, or what `linen` and `function`
    give.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(model, nnx.Module):
        return Module.of(model)
    if isinstance(model, Module | Linen | Function):
        return model
    kind = type(model).__name__
    if isinstance(model, nn.Module):
        raise ValueError(
            f"{kind} is a Linen module; give train.linen(module, variables)"
        )
    raise ValueError(
        f"an NNX module, train.linen(module, variables) or train.function(apply, "
        f"params) can be trained, got {kind}"
    )


# ------------------------------------------------------------------------------ NNX


def module(module: nnx.Module, attributes: Attributes | None = None) -> "Module":
    """An NNX module to be trained, whose code reads sizes from attributes of its own.

    One that has none is given as it is: `train.Training(module, loss, example)`.

    Args:
        module: the module.
        attributes: which attributes count the units of which groups:
            `{"blocks.0.heads": "blocks.0.query"}`. See `l0jax.nnx.shrink`.
    """
    return Module.of(module, tuple(sorted((attributes or {}).items())))


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """An NNX module. It is copied: training changes no array of the user's."""

    graph: Any  # in training mode
    graph_evaluated: Any
    params: PyTree
    rest: PyTree
    attributes: tuple[tuple[str, str | Sequence[str]], ...] = ()
    below: str = ""

    @classmethod
    def of(cls, module: nnx.Module, attributes: Any = ()) -> "Module":
        """From a module in any mode."""
        module = nnx.clone(module)
        module.train()
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        module.eval()
        after = nnx.split(module, nnx.Param, ...)[0]
        pure = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
        return cls(graph, after, *pure, attributes)

    @property
    def key(self) -> Any:
        """The two graphs."""
        return self.graph, self.graph_evaluated

    def run(self, params, rest, key, training):
        """A module of its own for each run."""
        del key  # It draws with the keys among its arrays.
        graph = self.graph if training else self.graph_evaluated
        module = nnx.merge(graph, params, rest, copy=True)

        def left():
            _, _, found = nnx.split(module, nnx.Param, ...)
            return nnx.to_pure_dict(found)

        return module, left

    def structure(self, inputs):
        """As `l0jax.trace` reads the module."""
        return trace(self.whole(self.tree(self.params, self.rest)), *inputs)

    def tree(self, params, rest):
        """As `nnx.state` of the module."""
        return nnx.state(nnx.merge(self.graph_evaluated, params, rest))

    def smaller(self, trees, keep, structure):
        """The same class with smaller arrays."""
        found, left = None, []
        for tree in trees:
            module = nnx.merge(self.graph, tree, copy=True)
            # That it is the same function is seen at the first: code and sizes are
            # those of all.
            groups = structure if found is None else structure.groups
            small = l0jax.nnx.shrink(module, keep, groups, dict(self.attributes))
            small = Module.of(small, self.attributes)
            found = found or small
            left.append((small.params, small.rest))
        assert found is not None
        return found, left

    def finished(self, tree, keep, structure):
        """A module of the same class; of one whose code computes from its sizes, or
        can't be told them, a `l0jax.nnx.Narrowed`."""
        module = self.whole(tree)
        try:
            return l0jax.nnx.shrink(module, keep, structure, dict(self.attributes))
        except CantShrink:
            return l0jax.nnx.Narrowed(structure, module, keep)

    def whole(self, tree):
        """The module in evaluation mode."""
        return nnx.merge(self.graph_evaluated, tree, copy=True)


class _Applied:
    """What is called as a function of its arrays in evaluation: `_evaluated(tree,
    *inputs)`."""

    def structure(self: Any, inputs):
        """Of the outputs in evaluation; what is written is none of them."""
        return trace(self._evaluated, self.tree(self.params, self.rest), *inputs)

    def finished(self: Any, tree, keep, structure):
        """A function of smaller arrays, and these."""
        return narrow(structure, tree, keep)

    def whole(self: Any, tree):
        """A function of all arrays, and these."""
        return self._evaluated, tree


# ---------------------------------------------------------------------------- Linen


def linen(
    module: nn.Module,
    variables: Mapping[str, PyTree],
    attributes: Attributes | None = None,
    **evaluation: Any,
) -> "Linen":
    """A Linen module to be trained.

    A loss gets a function in its place, which is called as the module is, without
    `variables`, `rngs` and `mutable`: `loss(apply, batch)` calls `apply(x,
    train=True)`. Collections beside `params` are written where the module writes them,
    and every stream that it draws from (`dropout`, …) has a key.

    Args:
        module: the module.
        variables: as `module.init` gives them.
        attributes: fields of the module that count the units of groups:
            `{"heads": "query"}`. See `l0jax.linen.shrink`.
        **evaluation: keyword arguments with which it is called in evaluation, such as
            `train=False`: its units are read so, and `Training.evaluate` calls it so.

    Raises:
        ValueError: if there is no collection `params`.
    """
    if "params" not in variables:
        raise ValueError(
            f"variables have no collection 'params'; there is "
            f"{', '.join(variables) or 'nothing'}"
        )
    rest = {name: each for name, each in variables.items() if name != "params"}
    return Linen(
        module,
        variables["params"],
        rest,
        tuple(sorted(evaluation.items())),
        tuple(sorted((attributes or {}).items())),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Linen(_Applied):
    """A Linen module and its variables; see `linen`."""

    module: nn.Module
    params: PyTree
    rest: PyTree
    evaluation: tuple[tuple[str, Any], ...] = ()
    attributes: tuple[tuple[str, str | Sequence[str]], ...] = ()
    below: str = "params."

    @property
    def key(self) -> Any:
        """The module, which is compared by its attributes."""
        return self.module, self.evaluation

    def run(self, params, rest, key, training):
        """A function whose calls follow one another: what one writes, the next reads;
        each has keys of its own."""
        now, calls = dict(rest), 0

        def apply(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if not training:
                kwargs |= dict(self.evaluation)
            one = jax.random.fold_in(key, calls)
            calls += 1
            outputs, written = self.module.apply(
                {"params": params, **now},
                *args,
                # Linen takes the key of `params` for streams that have none.
                rngs={"params": one, "dropout": jax.random.fold_in(one, 1)},
                mutable=list(rest),
                **kwargs,
            )
            now.update(written)
            return outputs

        return apply, lambda: now

    def _evaluated(self, variables, *inputs):
        return self.module.apply(variables, *inputs, **dict(self.evaluation))

    def tree(self, params, rest):
        """The module's variables."""
        return {"params": params, **rest}

    def smaller(self, trees, keep, structure):
        """The same module, whose layers take their sizes from their arrays."""
        small, first = l0jax.linen.shrink(
            self.module,
            trees[0],
            keep,
            structure,
            dict(self.attributes),
            **dict(self.evaluation),
        )
        left = []
        others = (units.shrink(tree, keep, structure.groups) for tree in trees[1:])
        for tree in (first, *others):
            variables = dict(tree)
            left.append((variables.pop("params"), variables))
        params, rest = left[0]
        return dataclasses.replace(self, module=small, params=params, rest=rest), left


# ------------------------------------------------------------------------- functions


def function(
    apply: Callable[..., Any], params: PyTree, rest: PyTree | None = None
) -> "Function":
    """A plain function to be trained: `apply(params, *inputs)`, or with a `rest` that
    it writes `apply(params, rest, *inputs) -> (outputs, rest)`.

    A loss gets a function of the inputs alone, which gives the outputs: `loss(apply,
    batch)` calls `apply(x)`. What it draws at random it draws with keys that are among
    the inputs or in the rest, or with the `key` that a loss may ask for.
    """
    return Function(apply, params, rest)


@dataclasses.dataclass(frozen=True, eq=False)
class Function(_Applied):
    """A plain function and its arrays; see `function`."""

    apply: Callable[..., Any]
    params: PyTree
    rest: PyTree | None = None

    @property
    def below(self) -> str:
        """Without a rest the parameters are all arrays there are."""
        return "" if self.rest is None else "params."

    @property
    def key(self) -> Any:
        """The function."""
        return self.apply

    def run(self, params, rest, key, training):
        """A function whose calls follow one another."""
        del key, training
        if rest is None:
            return lambda *inputs: self.apply(params, *inputs), lambda: None
        now = rest

        def call(*inputs: PyTree) -> Any:
            nonlocal now
            outputs, now = self.apply(params, now, *inputs)
            return outputs

        return call, lambda: now

    def _evaluated(self, tree, *inputs):
        if self.rest is None:
            return self.apply(tree, *inputs)
        return self.apply(tree["params"], tree["rest"], *inputs)[0]

    def tree(self, params, rest):
        """The parameters; with a rest `{"params": …, "rest": …}`."""
        return params if self.rest is None else {"params": params, "rest": rest}

    def smaller(self, trees, keep, structure):
        """The same function of smaller arrays."""
        _check_same(self._evaluated, self._evaluated, trees[0], keep, structure)
        left = []
        for tree in trees:
            tree = units.shrink(tree, keep, structure.groups)
            both = (tree, None) if self.rest is None else (tree["params"], tree["rest"])
            left.append(both)
        params, rest = left[0]
        return dataclasses.replace(self, params=params, rest=rest), left


def _check_same(whole, small, tree, keep: Keep, structure: Structure) -> None:
    """Raises CantShrink unless code is the same function of smaller arrays."""
    found = difference(structure, keep, whole, tree, small)
    if found is not None:
        raise CantShrink(
            f"the code is another function when its arrays are smaller: {found}"
        )


def with_keys_of(rest: PyTree, key: PRNGKeyArray) -> PyTree:
    """What a network writes, its own keys derived from this one too."""
    bits = jax.random.bits(gating.key_for(key, "rest"))

    def derived(leaf: Any) -> Any:
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        many = jax.vmap(jax.random.fold_in, (0, None))
        return many(leaf.reshape(-1), bits).reshape(leaf.shape)

    return jax.tree.map(derived, rest)
