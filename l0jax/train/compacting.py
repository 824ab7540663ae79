"""Training goes on without units that are dead for good, and gets faster."""

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from l0jax import compaction, costs, units
from l0jax.equivalence import CantShrink
from l0jax.train import averages
from l0jax.train.placement import parameters_of
from l0jax.units import Keep

if TYPE_CHECKING:
    from l0jax.train.training import Training, TrainingState


@dataclasses.dataclass(frozen=True)
class Compaction:
    """When units are taken out of a training that goes on.

    A unit is dead for good when at several calls of `compact` in a row it is closed by
    the test-time rule and open in training with a small probability. The dead are taken
    out together, once so many multiply-accumulates go with them that it is worth
    another compilation. Units that lie in inputs stay, closed: the data would have to
    lose them too. Where there is a target, no more is taken out than leaves some
    room above it: what is gone never comes back.

    Args:
        below: P(z != 0) below which a unit counts as closed in training.
        after: calls in a row at which it must have been.
        at: share of the present multiply-accumulates to which they must fall.
        gain: multiply-accumulates that must be saved in the examples to come, if
            `compact` is told how many these are; some 3e11 take as long as compiling
            on a CPU.
        room: by how much of its target the network must still be able to exceed it.
        round_to: multiple that widths stay, of all groups or of each that is named, by
            so many dead units more (as `l0jax.round_to`). What is split over a mesh
            stays a multiple of its devices anyhow.

    Raises:
        ValueError: for a share or a probability outside [0, 1], fewer than one call, or
            a multiple below 1.
    """

    below: float = 0.1
    after: int = 3
    at: float = 0.8
    gain: float = 3e11
    room: float = 0.1
    round_to: int | Mapping[str, int] = 1

    def __post_init__(self):
        for name in ("below", "at"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must lie in [0, 1], got {getattr(self, name)}"
                )
        if self.after < 1:
            raise ValueError(f"after must be at least one call, got {self.after}")
        each = self.round_to
        for multiple in each.values() if isinstance(each, Mapping) else (each,):
            if multiple < 1:
                raise ValueError(f"round_to must be at least 1, got {multiple}")


def compact(
    training: "Training", state: "TrainingState", examples_to_come: int | None
) -> tuple["Training", "TrainingState"]:
    """See `Training.compact`."""
    policy = training.compaction
    if not training._gated:
        return training, state
    here = training.placement.on_host
    now = here(_closed(training, policy.below, state))
    closed = compaction.count(here(state.closed), now)
    state = state._replace(
        closed={name: jnp.asarray(each, jnp.int32) for name, each in closed.items()}
    )
    keep = compaction.alive(closed, policy.after)
    for name in training.structure.inputs.keys() & keep.keys():
        keep[name][:] = True  # Else the batches to come would not fit.
    keep = _with_room(training, keep, policy.room)
    keep = _rounded(training, keep)
    if all(flags.all() for flags in keep.values()):
        return training, training.placed(state)
    before = costs.exact(training.structure)
    after = costs.exact(training.structure, keep)
    if after > policy.at * before:
        return training, training.placed(state)
    # A gradient costs twice what the outputs do.
    saved = (before - after) * 3 * (examples_to_come or 0)
    if examples_to_come is not None and saved < policy.gain:
        return training, training.placed(state)
    try:
        return without(training, state, keep)
    except CantShrink as error:
        warnings.warn(
            f"training goes on at full width, for the code can't run with fewer units: "
            f"{error}",
            stacklevel=3,
        )
        never = dataclasses.replace(policy, at=0.0)
        return training.replace(compaction=never), training.placed(state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _closed(training: "Training", below: float, state: "TrainingState"):
    """Which units are closed now."""
    rule = getattr(training.gating, "rule", "paper")
    params, own = training.averaged(state)
    z, active = training.gating.decide(own, state.step, rule, state.key)
    groups = training._below(training.structure.groups)
    closed = compaction.closed(params, z, active, groups, below)
    # A shift may still be added where a gate is closed.
    folded = training.gating.fold(params, own, z, training._gated)
    used = units.largest_use(
        jax.tree.map(jnp.abs, folded), compaction.removable(groups)
    )
    return {name: flags & (used[name] == 0) for name, flags in closed.items()}


def _with_room(training: "Training", keep: Keep, room: float) -> dict[str, np.ndarray]:
    """Of the units that may be taken out, those without which what is left can still be
    as much as the target and some more: group by group."""
    budget = training._budget
    if budget is None:
        return dict(keep)
    spared: dict[str, np.ndarray] = {}
    every = {n: np.ones(g.size, bool) for n, g in training.structure.groups.items()}
    for name, flags in keep.items():
        without = {**spared, name: flags}
        most = budget.left({**every, **without}, training.structure)
        if all(each >= room for each in budget.excess(most).values()):
            spared = without
    return spared


def _rounded(training: "Training", keep: Keep) -> dict[str, np.ndarray]:
    """So many units more that widths are multiples: of what the policy says, and of the
    devices over which arrays are split."""
    asked = training.compaction.round_to
    groups = training._below(training.structure.groups)
    devices = training.placement.multiples(groups, training.network.params)
    multiples = {
        name: math.lcm(
            asked.get(name, 1) if isinstance(asked, Mapping) else asked, devices[name]
        )
        for name in keep
    }
    rounded = units.round_to(keep, multiples)
    for name, flags in rounded.items():
        more = int(np.sum(flags & ~np.asarray(keep[name])))
        if more and devices[name] > 1:
            warnings.warn(
                f"{more} closed units of {name!r} stay: its arrays are split over "
                f"{devices[name]} devices",
                stacklevel=4,
            )
    return rounded


def without(
    training: "Training", state: "TrainingState", keep: Keep
) -> tuple["Training", "TrainingState"]:
    """See `Training.without`."""
    structure = training.structure
    state = training.placement.on_host(state)
    tree = training.network.tree(state.params, state.rest)
    keep = units.left(tree, keep, structure.groups)
    trees = [tree]
    if training.polyak:
        trees.append(training.network.tree(state.average["params"], state.rest))
    smaller, left = training.network.smaller(trees, keep, structure)
    masks = _masks_of_params(training, tree, keep)
    average = state.average
    if training.polyak:
        average = {
            "params": left[1][0],
            "gates": _of_groups(state.average["gates"], keep),
        }
    params, rest = left[0]
    gates = _of_groups(state.gates, keep)
    opt_state = {
        "params": _moments(state.opt_state["params"], state.params, masks),
        "gates": _of_groups(state.opt_state["gates"], keep),
    }
    for name, theta in (("params", params), ("gates", gates)):
        _check_fits(opt_state[name], training._optimizers[name], theta)
    other = copy.copy(training)
    other.network = smaller
    other.structure = structure.shrink(keep)
    other.gating = training.gating.smaller(keep, masks)
    other.alive = {name: flags.copy() for name, flags in training.alive.items()}
    for name, flags in other.alive.items():
        flags[flags] = keep[name]
    other._derive()
    closed: Any = {n: np.asarray(a)[keep[n]] for n, a in state.closed.items()}
    after = state._replace(
        params=params,
        gates=gates,
        rest=rest,
        opt_state=opt_state,
        average=average,
        closed=closed,
    )
    for line in other.placement.uneven(smaller.params):
        warnings.warn(f"{line}; every device holds it whole", stacklevel=4)
    return other, other.placed(jax.tree.map(jnp.array, after))


def _masks_of_params(training, tree: PyTree, keep: Keep) -> units.Masks:
    prefix = training.network.below
    found = units.positions_left(tree, keep, training.structure.groups)
    return {
        (path.removeprefix(prefix), axis): flags
        for (path, axis), flags in found.items()
        if path.startswith(prefix)
    }


def _of_groups(tree: PyTree, keep: Keep) -> PyTree:
    """What a gating trains, or an optimiser keeps for it, of the units that are kept:
    arrays whose path ends with the name of a group."""

    def cut(key_path, leaf):
        last = getattr(key_path[-1], "key", None) if key_path else None
        if not isinstance(last, str) or last not in keep:
            return leaf
        if np.shape(leaf) != keep[last].shape:
            return _of_all(key_path, leaf, keep[last].shape)
        return np.asarray(leaf)[keep[last]]

    return jax.tree_util.tree_map_with_path(cut, tree)


def _moments(opt_state: PyTree, params: PyTree, masks: units.Masks) -> PyTree:
    """What an optimiser keeps for the parameters that are left."""
    shapes = {path: np.shape(leaf) for path, leaf in units.arrays(params).items()}
    cut_paths = {path for path, _ in masks}

    def cut(of, key_path, leaf):
        if of not in cut_paths:
            return leaf
        if np.shape(leaf) != shapes[of]:
            return _of_all(key_path, leaf, shapes[of])
        return units.take(leaf, of, masks)

    leaves, form = jax.tree_util.tree_flatten_with_path(opt_state)
    names = parameters_of(opt_state, params)
    return form.unflatten(
        cut(of, key_path, leaf)
        for of, (key_path, leaf) in zip(names, leaves, strict=True)
    )


def _of_all(key_path, leaf, shape) -> Any:
    """A number that is kept for all units of an array, or in place of one.

    Raises:
        ValueError: if it is more than a number.
    """
    if np.size(leaf) > 1:
        raise ValueError(
            f"the optimiser keeps {units.path_of(key_path)!r} in shape "
            f"{np.shape(leaf)} for a parameter of shape {shape}: {_TOLD_APART}"
        )
    return leaf


def _check_fits(opt_state: PyTree, optimizer: Any, theta: PyTree) -> None:
    """Raises ValueError unless an optimiser would begin with arrays of these shapes: it
    may keep some of which it can't be told what they are of."""
    wanted = jax.eval_shape(optimizer.init, averages.trained(theta))
    (ours, form), (theirs, other) = (
        jax.tree_util.tree_flatten_with_path(tree) for tree in (opt_state, wanted)
    )
    if form != other:
        raise ValueError(
            f"the optimiser keeps {form}, and would begin with {other} for what is "
            f"left: {_TOLD_APART}"
        )
    for (key_path, leaf), (_, one) in zip(ours, theirs, strict=True):
        if np.shape(leaf) != one.shape:
            raise ValueError(
                f"the optimiser keeps {units.path_of(key_path)!r} in shape "
                f"{np.shape(leaf)}, and would in {one.shape} for what is left: "
                f"{_TOLD_APART}"
            )


_TOLD_APART = (
    "its units can't be told apart; take an optimiser that keeps arrays of the "
    "parameters' shapes, or train without taking units out"
)
