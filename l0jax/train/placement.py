"""Where arrays lie: on one device, or over a mesh of devices, of one process or many.

The work is split by JAX's own compiler (`jax.jit` over a `jax.sharding.Mesh`), which
follows the arrays. So all that is told here is which axis of which array is split over
which axis of the mesh: the examples of a batch over the first, parameters by rules over
their paths, what an optimiser keeps as the parameter that it keeps it for, gates of
single weights as the weights they multiply. All else is held by every device whole.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from l0jax import units
from l0jax.units import Groups

WHOLE = PartitionSpec()

Sharding = Mapping[str, PartitionSpec | str]
"""By patterns of whole paths (`re.fullmatch`), of which the first that matches counts:
which axes of a parameter are split over which axes of the mesh; or the name of an axis
of the mesh, over which the largest axis is split that can be split evenly, if any."""


def parameters_of(kept: PyTree, params: PyTree) -> list[str | None]:
    """For which parameter an optimiser keeps each array: within a part of what it keeps
    that is built as the parameters are, the one at the same place. (By its path alone
    it can't be told: `0.mu.kernel` is of `kernel`, but ends with `mu.kernel` too.)

    Args:
        kept: a state of an optimiser.
        params: that it is of. Where it leaves some alone, in the place of their arrays,
            or of a whole part of them, there is None or an `optax.MaskedNode`.

    Returns:
        Paths in the order of the leaves of `kept`; None: the array is of no parameter.
    """
    found = _alike(kept, params, "")
    if found:
        return list(found)
    if _is_leaf(kept):
        return [None]
    children, _ = _opened(kept)
    return [path for _, child in children for path in parameters_of(child, params)]


def _alike(kept: PyTree, params: PyTree, path: str) -> list[str] | None:
    """The paths of the leaves of a part that is built as the parameters are; None: it
    isn't."""
    if kept is None or isinstance(kept, optax.MaskedNode):
        return []
    if _is_leaf(params) != _is_leaf(kept):
        return None
    if _is_leaf(params):
        # (Where the parameters are one array, its shape is all that can tell.)
        return [path] if path or np.shape(kept) == np.shape(params) else None
    (theirs, form), (ours, other) = _opened(kept), _opened(params)
    if form != other:
        return None
    found: list[str] = []
    for (key, child), (_, param) in zip(theirs, ours, strict=True):
        below = units.path_of(key)
        its = _alike(child, param, ".".join(filter(None, (path, below))))
        if its is None:
            return None
        found += its
    return found


def _opened(node: PyTree) -> tuple[list[tuple[Any, Any]], Any]:
    """What is directly below a node, with keys, and how the node is built."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


def _is_leaf(node: PyTree) -> bool:
    return jax.tree_util.all_leaves([node])


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a training lie.

    Args:
        mesh: devices; over its first axis batches are split. None: the default device.
            Of whatever type its axes are, here the compiler decides (`AxisType.Auto`).
        rules: how parameters are split, as `Sharding` has it.

    Raises:
        ValueError: for rules without a mesh, a rule that names an axis which the mesh
            does not have, or a pattern that is none.
    """

    mesh: Mesh | None = None
    rules: tuple[tuple[str, PartitionSpec | str], ...] = ()

    def __post_init__(self):
        auto = AxisType.Auto
        if self.mesh is not None and {*self.mesh.axis_types} != {auto}:
            # Such as `jax.make_mesh` gives: with it, models would say where all is.
            names = self.mesh.axis_names
            mesh = Mesh(self.mesh.devices, names, axis_types=(auto,) * len(names))
            object.__setattr__(self, "mesh", mesh)
        if self.rules and self.mesh is None:
            raise ValueError(
                "sharding= says how parameters are split over a mesh, and no mesh= is "
                "given"
            )
        for pattern, rule in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{pattern!r} is no pattern of paths: {error}"
                ) from error
            for axis in {rule} if isinstance(rule, str) else _named(rule):
                if axis not in self._mesh.shape:
                    raise ValueError(
                        f"the rule for {pattern!r} names the axis {axis!r}; the mesh "
                        f"has {', '.join(map(str, self._mesh.axis_names))}"
                    )

    @property
    def _mesh(self) -> Mesh:
        assert self.mesh is not None
        return self.mesh

    def _parts(self, names: Any) -> int:
        """Over how many devices an axis is split by an entry of a PartitionSpec."""
        names = names if isinstance(names, tuple) else (names,)
        return math.prod(self._mesh.shape[name] for name in names if name is not None)

    def asked(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How the rules split a parameter.

        Raises:
            ValueError: if a rule has more entries than the parameter has axes.
        """
        for pattern, rule in self.rules:
            if not re.fullmatch(pattern, path):
                continue
            if isinstance(rule, PartitionSpec):
                if len(rule) > len(shape):
                    raise ValueError(
                        f"the rule for {pattern!r} has {len(rule)} entries, and "
                        f"{path!r} the shape {shape}"
                    )
                return rule
            parts = self._parts(rule)
            whole = [at for at, size in enumerate(shape) if size and size % parts == 0]
            if not whole:
                return WHOLE
            largest = max(whole, key=lambda at: shape[at])
            return PartitionSpec(*[None] * largest, rule)
        return WHOLE

    def uneven(self, params: PyTree) -> list[str]:
        """What can't be split as the rules have it, a line for each."""
        found = []
        for path, leaf in units.arrays(params).items():
            shape = np.shape(leaf)
            for at, names in enumerate(self.asked(path, shape)):
                if shape[at] % self._parts(names):
                    found.append(
                        f"axis {at} of {path!r}, of shape {shape}, can't be split "
                        f"evenly over the {self._parts(names)} devices of {names!r}"
                    )
        return found

    def check(self, params: PyTree) -> None:
        """Raises ValueError unless each rule splits something, and what it splits is
        split evenly."""
        for line in self.uneven(params):
            raise ValueError(
                f"{line}; give a rule that leaves it whole before that one"
            )
        paths = units.arrays(params)
        for pattern, _ in self.rules:
            if not any(re.fullmatch(pattern, path) for path in paths):
                raise ValueError(
                    f"the rule for {pattern!r} matches no parameter; there is "
                    f"{', '.join(paths)}"
                )

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How a parameter is split: as the rules have it, but for what can't be split
        evenly."""
        asked = self.asked(path, shape)
        return PartitionSpec(
            *(
                None if size % self._parts(names) else names
                for names, size in zip(asked, shape, strict=False)
            )
        )

    def multiples(self, groups: Groups, params: PyTree) -> dict[str, int]:
        """Of how many units a group must have a multiple for its arrays to be split as
        the rules have it."""
        arrays = units.arrays(params)
        found = {}
        for name, group in groups.items():
            parts = [1]
            for slot in group.slots:
                if slot.axis is None or slot.path not in arrays:
                    continue
                asked = self.asked(slot.path, np.shape(arrays[slot.path]))
                if slot.axis < len(asked):
                    parts.append(self._parts(asked[slot.axis]))
            found[name] = math.lcm(*parts)
        return found

    # ------------------------------------------------------------------ of a state

    def of_state(self, state: Any, groups: Groups) -> Any:
        """Where each array of a `TrainingState` lies.

        Args:
            state: with arrays or their shapes.
            groups: that are multiplied by gates, by the paths of the parameters.
        """
        shapes = {p: np.shape(leaf) for p, leaf in units.arrays(state.params).items()}
        specs = {path: self.spec(path, shape) for path, shape in shapes.items()}
        whole = {
            name: spec
            for name, group in groups.items()
            if (spec := self._of_weights(group, specs)) != WHOLE
        }

        def as_parameters(tree):
            def at(of, leaf):
                same = of is not None and np.shape(leaf) == shapes[of]
                return self._at(specs[of] if same else WHOLE)

            leaves, form = jax.tree.flatten(tree)
            names = parameters_of(tree, state.params)
            return form.unflatten(map(at, names, leaves))

        def as_gates(key_path, leaf):
            name = str(getattr(key_path[-1], "key", "")) if key_path else ""
            same = name in whole and np.shape(leaf) == (groups[name].size,)
            return self._at(whole[name] if same else WHOLE)

        place = jax.tree_util.tree_map_with_path
        everywhere = functools.partial(jax.tree.map, lambda _: self._at(WHOLE))
        average = state.average
        if average:
            average = {
                "params": as_parameters(average["params"]),
                "gates": place(as_gates, average["gates"]),
            }
        return type(state)(
            step=everywhere(state.step),
            key=everywhere(state.key),
            params=as_parameters(state.params),
            gates=place(as_gates, state.gates),
            rest=everywhere(state.rest),
            opt_state={
                "params": as_parameters(state.opt_state["params"]),
                "gates": place(as_gates, state.opt_state["gates"]),
            },
            average=average,
            dual=everywhere(state.dual),
            closed=everywhere(state.closed),
        )

    def _of_weights(self, group: Any, specs: Mapping[str, PartitionSpec]):
        """How the gates of single weights are split, a vector in the weights' order:
        as they are, if they are split along their first axis and no other."""
        slots = group.used_by
        if len(slots) != 1 or slots[0].axis is not None:
            return WHOLE
        spec = specs[slots[0].path]
        return PartitionSpec(spec[0]) if spec and not any(spec[1:]) else WHOLE

    def _at(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self._mesh, spec)

    # ------------------------------------------------------------------ of examples

    def everywhere(self, tree: PyTree) -> PyTree:
        """Arrays that every device has. Of several processes each gives the same."""
        if self.mesh is None:
            return tree
        return put(tree, jax.tree.map(lambda _: self._at(WHOLE), tree))

    def split(self, batch: PyTree) -> PyTree:
        """A batch, split over the first axis of the mesh. Of several processes each
        gives a part of its own.

        Raises:
            ValueError: if the number of examples doesn't divide.
        """
        if self.mesh is None:
            return batch
        axis = self.mesh.axis_names[0]
        parts = self.mesh.shape[axis]
        for path, leaf in units.arrays(batch).items():
            pieces = jax.process_count() if _is_part(leaf) else 1
            if not np.ndim(leaf) or np.shape(leaf)[0] * pieces % parts:
                raise ValueError(
                    f"the batch has shape {np.shape(leaf)} at {path or 'its root'!r}: "
                    f"its examples can't be split evenly over {parts} devices"
                )

        apart = self._at(PartitionSpec(axis))

        def placed(leaf):
            if isinstance(leaf, jax.core.Tracer):
                return jax.lax.with_sharding_constraint(leaf, apart)
            if _is_part(leaf):
                local = np.asarray(leaf)
                return jax.make_array_from_process_local_data(apart, local)
            return put(leaf, apart)

        return jax.tree.map(placed, batch)

    def split_if_even(self, batch: PyTree) -> PyTree:
        """As `split`, but on every device whole what one process gives that doesn't
        divide, such as the last batch of an evaluation."""
        if self.mesh is None:
            return batch
        parts = self.mesh.shape[self.mesh.axis_names[0]]
        leaves = jax.tree.leaves(batch)
        uneven = any(np.ndim(leaf) and len(leaf) % parts for leaf in leaves)
        if uneven and not any(map(_is_part, leaves)):
            return self.everywhere(batch)
        return self.split(batch)

    def on_host(self, tree: PyTree) -> PyTree:
        """NumPy arrays, whole in every process."""
        if not all(map(_is_here, jax.tree.leaves(tree))):
            # What other processes hold: all of them call this.
            tree = _moved(tree, self._at(WHOLE))
        return jax.device_get(tree)


# How many of our programs over several CPU devices may be under way.
_MOST_UNDER_WAY = 4
_under_way: collections.deque[jax.Array] = collections.deque()


def keep_pace(mesh: Mesh | None, launched: PyTree) -> None:
    """Waits, on several CPU devices, for what was launched a few programs ago.

    Else it may wait for ever. XLA starts each device's part of a program in a thread,
    of which there are no more than devices or cores, and lets it wait there while 32
    programs of the device are under way. Once all threads wait, there is none left for
    those to run in; after 40 seconds XLA ends the process.

    Args:
        mesh: over which the program is.
        launched: what the program gives, or some of it.
    """
    if mesh is None or not _has_few_threads(mesh):
        return
    for first in _not_traced(launched)[:1]:
        _under_way.append(first)
    if len(_under_way) > _MOST_UNDER_WAY:
        before = _under_way.popleft()
        if not before.is_deleted():  # Else it was given to a later program.
            jax.block_until_ready(before)


def wait(mesh: Mesh | None, tree: PyTree) -> None:
    """Waits for arrays, where many programs are launched on them that would else wait,
    and `keep_pace` tells why they might for ever."""
    if mesh is not None and _has_few_threads(mesh):
        jax.block_until_ready(_not_traced(tree))


def _not_traced(tree: PyTree) -> list[jax.Array]:
    return [a for a in jax.tree.leaves(tree) if not isinstance(a, jax.core.Tracer)]


@functools.lru_cache
def _has_few_threads(mesh: Mesh) -> bool:
    here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    return len(here) > 1 and here[0].platform == "cpu"


def _named(spec: PartitionSpec) -> set[str]:
    """The axes of the mesh that a PartitionSpec names."""
    found: set[str] = set()
    for entry in spec:
        found |= set(entry) if isinstance(entry, tuple) else {entry} - {None}
    return found


def put(tree: PyTree, places: PyTree) -> PyTree:
    """Arrays where they are to lie. What one process alone has, others have as well:
    each puts its own part where its devices are."""
    if jax.process_count() == 1:
        return jax.device_put(tree, places)
    return jax.tree.map(_put_one, tree, places)


def _put_one(leaf: Any, place: NamedSharding) -> jax.Array:
    if not _is_local(leaf):
        return leaf if leaf.sharding == place else _moved(leaf, place)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = _put_one(jax.random.key_data(leaf), place)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, place, whole.__getitem__)


def _is_local(leaf: Any) -> bool:
    """Whether other processes don't know of it."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _is_part(leaf: Any) -> bool:
    """Whether other processes give the other examples of a batch."""
    traced = isinstance(leaf, jax.core.Tracer)
    return jax.process_count() > 1 and not traced and _is_local(leaf)


def _is_here(leaf: Any) -> bool:
    return _is_local(leaf) or leaf.is_fully_replicated


@functools.partial(jax.jit, static_argnums=1)
def _moved(tree: PyTree, place: NamedSharding) -> PyTree:
    return jax.lax.with_sharding_constraint(tree, place)
