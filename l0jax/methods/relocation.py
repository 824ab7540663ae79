r"""Soft knowledge relocation, as reconstructed from what is public of it.

What is the source's: that the search for better heuristics is one half of pruning and
making its outcome depend less on the heuristic is the other; that a sufficient
condition for such agnosticism can be derived and an algorithm made from it; that on I3D
it lowered the variance of its baseline by about 60 % and improved its performance
(J. Salzinger 2020, "Soft Knowledge Relocation: toward heuristic-agnostic model
pruning", master's thesis, NTUST, of which only the abstract is public). What is ours:
all else here, the condition, the algorithm and the measure of variance
(`l0jax.agnosticism`).

The condition. Of two heuristics h and h' that doom the units $S_h$ and $S_{h'}$, with
$P_h$ the loss that the preparation for the removal reaches, $L_h$ the loss after it,
and a loss that is K-Lipschitz in what the doomed units add to the next layer,

$$ |L_h - L_{h'}| \le K (\sqrt{D(S_h)} + \sqrt{D(S_{h'})}) + |P_h - P_{h'}|, \quad
   D(S) = E \lVert H_S W_S \rVert^2. $$

So a method is agnostic if its removals change nothing (D = 0) and its preparation ends
at the same loss whatever was doomed. The algorithm makes the first true: units are
doomed first, by any heuristic; they are closed little by little while the network
trains, so that what they knew moves to the units that stay; then they are removed,
which is an exact no-op. Optionally a linear least-squares fit moves what the kept units
can express of the doomed ones (Castellano, Fanelli and Pelillo 1997, "An iterative
pruning algorithm for feedforward neural networks", who remove at once).

All of it are values of gates and arrays that a compiled step takes as arguments.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Real, Shaped

import l0jax.nnx
from l0jax import units
from l0jax.methods.activations import activity
from l0jax.methods.samples import Product, Windows, product, windows
from l0jax.methods.task import Task
from l0jax.structure import Structure
from l0jax.units import Groups

Keep = Mapping[str, Bool[Array | np.ndarray, " units"]]
Number = Real[Array, ""] | float | int
Model = TypeVar("Model", bound=nnx.Module)

STEEPNESS = 5.0
"""Of the exponential curve; the growing decay leaves exp(-5) of a weight."""


def cosine(share: Number) -> Array:
    """Starts and ends slowly."""
    return (1 + jnp.cos(jnp.pi * jnp.asarray(share))) / 2


def linear(share: Number) -> Array:
    """Closes at a constant rate."""
    return 1 - jnp.asarray(share)


def exponential(share: Number) -> Array:
    """Closes fast at first."""
    least = np.exp(-STEEPNESS)
    return (jnp.exp(-STEEPNESS * jnp.asarray(share)) - least) / (1 - least)


CURVES: dict[str, Callable[[Number], Array]] = {
    "cosine": cosine,
    "linear": linear,
    "exponential": exponential,
}
"""The gate of a doomed unit, from 1 at share 0 of the closing to 0 at share 1."""


@dataclasses.dataclass(frozen=True)
class Closing:
    """When and how doomed units are closed.

    Args:
        curve: a name in `CURVES`.
        share: of the budget that is spent on closing; the rest trains what is left.
        stochastic: the gate is open with the probability that the curve gives, instead
            of having that value: drawn anew for each unit and step.
        decay: the gates stay open, and the weights that read doomed units decay faster
            and faster instead, as by the growing L2 penalty of Wang, Qin, Zhang and Fu
            (2021, "Neural pruning via growing regularization"), to exp(-5) of
            themselves if the loss doesn't hold them; no curve is used.

    Raises:
        ValueError: for an unknown curve or a share outside [0, 1].
    """

    curve: str = "cosine"
    share: float = 0.5
    stochastic: bool = False
    decay: bool = False

    def __post_init__(self):
        if self.curve not in CURVES:
            raise ValueError(
                f"unknown curve {self.curve!r}; there is {', '.join(CURVES)}"
            )
        if not 0 <= self.share <= 1:
            raise ValueError(
                f"share must be in [0, 1], a part of the budget, got {self.share}: a "
                "closing can't be longer than the budget"
            )
        if self.stochastic and self.decay:
            raise ValueError("stochastic gates and decay exclude each other")

    def steps(self, budget: int) -> int:
        """How many of `budget` steps are spent on closing.

        Raises:
            ValueError: if the budget is too short for a closing of one step.
        """
        steps = round(self.share * budget)
        if self.share > 0 and steps < 1:
            raise ValueError(
                f"a share of {self.share} of {budget} steps is less than one step: "
                "raise the budget or the share"
            )
        return steps

    def gates(
        self, keep: Keep, share: Number, key: PRNGKeyArray | None = None
    ) -> dict[str, Float[Array, " units"]]:
        """The gates of all units when the share `share` of the closing is over.

        Args:
            keep: the units that stay have gates of 1.
            share: from 0 to 1; it may be traced.
            key: for stochastic gates.

        Raises:
            ValueError: if stochastic gates get no key.
        """
        share = jnp.clip(jnp.asarray(share, jnp.float32), 0, 1)
        # After the last step of the decay all is closed too.
        value = jnp.float32(share < 1) if self.decay else CURVES[self.curve](share)
        if not self.stochastic:
            return {n: jnp.where(k, 1.0, value) for n, k in keep.items()}
        if key is None:
            raise ValueError("stochastic gates need a key")
        return {
            name: jnp.float32(
                jnp.asarray(flags)
                | jax.random.bernoulli(jax.random.fold_in(key, at), value, flags.shape)
            )
            for at, (name, flags) in enumerate(sorted(keep.items()))
        }

    def decayed(self, keep: Keep, step: Number, steps: Number) -> dict[str, Array]:
        """By what the weights that read each unit are multiplied after a step, of
        `steps`; the exponents of the decay grow linearly."""
        rate = 2 * STEEPNESS * (jnp.asarray(step, jnp.float32) + 0.5) / steps**2
        factor = jnp.exp(-rate) if self.decay else jnp.ones(())
        return {name: jnp.where(flags, 1.0, factor) for name, flags in keep.items()}


def closing(
    params: PyTree,
    gates: Mapping[str, Float[Array, " units"]],
    groups: Groups,
    shift: Mapping[str, Array] | None = None,
    share: Number = 1.0,
) -> PyTree:
    """The parameters with gates on what reads the units, and a part of a shift added.

    Args:
        params: of the network.
        gates: for each group a value of each unit.
        groups: where the units lie.
        shift: `LeastSquares.shift`, by paths.
        share: of the shift that is added; 1 - m where doomed units have the gate m.
    """
    closed = units.apply_gates(params, gates, groups)
    if not shift:
        return closed
    arrays = units.arrays(closed)
    return units.replace(closed, {n: arrays[n] + share * a for n, a in shift.items()})


# ----------------------------------------------------------------- least squares


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A kernel that reads units, and the bias beside it."""

    of: Product
    units_of: tuple[tuple[str, np.ndarray], ...]
    bias: str | None

    def kept(self, keep: Keep) -> Float[Array, " entries"]:
        """1 for each entry that stays."""
        flags = jnp.ones(self.of.entries, bool)
        for name, unit_of in self.units_of:
            flags &= jnp.append(jnp.asarray(keep[name], bool), True)[unit_of]
        return jnp.float32(flags)


class LeastSquares:
    r"""The linear fit that makes up for doomed units: of each layer that reads some,

    $$ \min_V E \lVert Y - H_K V \rVert^2 + \epsilon \lVert V - W_K \rVert^2 $$

    with $H_K$ what the kept units give it, a constant among them where the layer has a
    bias, and $Y$ what it makes in the base network. Layers follow in the order in which
    they are read, each after what precedes it.

    Units that are hardly ever active in the base network are not fitted: the fit would
    see to it that they stay of no use, and without a gradient, where what the removal
    takes away may wake them. That matters to heuristics that keep such units.

    The examples pass once for all layers that don't depend on each other, and only
    products of windows are kept: memory doesn't grow with their number. Each such level
    is compiled once, for all parameters and all choices of units.

    Args:
        task: a network and examples; its parameters are the base network.
        positions: of each example's map that are looked at.
        ridge: ε as a share of the mean of the diagonal of $E[H_K^T H_K]$.
        active: share of a unit's values that must not be 0 for it to be fitted.

    Raises:
        ValueError: if a layer that reads units isn't a product (`samples.product`).
    """

    def __init__(
        self,
        task: Task,
        positions: int = 10,
        ridge: float = 1e-2,
        active: float = 1e-2,
    ):
        if positions < 1 or not ridge > 0:
            raise ValueError(
                f"positions must be at least 1 and ridge above 0, got {positions} and "
                f"{ridge}"
            )
        self.task, self.positions, self.ridge = task, positions, ridge
        if not 0 <= active < 1:
            raise ValueError(f"active must be in [0, 1), got {active}")
        self.active = active
        self.readers = _readers(task)

    @functools.cached_property
    def levels(self) -> list[list[str]]:
        """The layers in the order in which they are fitted; those of one level don't
        depend on each other, and share the passes over the examples."""
        flow, levels, made = self.task.flow, [], frozenset()
        for path, reader in self.readers.items():
            if not levels or reader.of.value in made:
                levels.append([])
                made = frozenset()
            levels[-1].append(path)
            made |= flow.dependents([flow.params[path]])
        return levels

    @functools.cached_property
    def _sum(self):
        return jax.jit(self._add)

    @functools.cached_property
    def _activity(self):
        return jax.jit(activity(self.task))

    def _fitted(self, base: PyTree) -> dict[str, Bool[np.ndarray, " outputs"]]:
        """Which outputs of each layer are fitted: those of units that are active."""
        seen = [self._activity(base, images) for images, _ in self.task.batches()]
        shares = jax.tree.map(lambda *some: np.mean(some, axis=0), *seen)
        found = {
            path: np.ones(reader.of.outputs, bool)
            for path, reader in self.readers.items()
        }
        for name, group in self.task.structure.groups.items():
            for slot in group.made_by:
                reader = self.readers.get(slot.path)
                if reader is not None and slot.axis == reader.of.outputs_axis:
                    unit_of = units.owners(slot, group.size)
                    active = shares[name] >= self.active
                    found[slot.path] &= np.append(active, True)[unit_of]
        return found

    def __call__(
        self,
        keep: Keep,
        key: PRNGKeyArray,
        params: PyTree | None = None,
        base: PyTree | None = None,
    ) -> PyTree:
        """The parameters after the fit, in which nothing reads a doomed unit.

        Args:
            keep: flags of the units that stay, of every group.
            key: draws the positions.
            params: that are changed; by default those of the base network.
            base: whose outputs are fitted; by default the parameters of the task.

        Raises:
            ValueError: if the sums are not finite; the message names the layer.
        """
        base = self.task.params if base is None else base
        params = base if params is None else params
        fitted = self._fitted(base)
        for at, level in enumerate(self.levels):
            kept = {path: self.readers[path].kept(keep) for path in level}
            if all(bool(flags.all()) for flags in kept.values()):
                continue
            level_key = jax.random.fold_in(key, at)
            sums = self._summed(kept, level_key, params, base)
            for path, (gram, cross, _) in sums.items():
                flags, reader = np.asarray(kept[path], bool), self.readers[path]
                cross *= fitted[path]
                params = _solved(reader, flags, gram, cross, self.ridge, params)
        return params

    def shift(self, keep: Keep, key: PRNGKeyArray, **of: PyTree) -> dict[str, Array]:
        """What the fit adds to kernels and biases, 0 at doomed units, by paths."""
        start = of.get("params")
        if start is None:
            start = of.get("base", self.task.params)
        before, after = units.arrays(start), units.arrays(self(keep, key, **of))
        shifts = {}
        for path, reader in self.readers.items():
            kept = reader.of.kernel(
                jnp.repeat(reader.kept(keep)[:, None], reader.of.outputs, 1)
            )
            shifts[path] = (after[path] - before[path]) * kept
            if reader.bias:
                shifts[reader.bias] = after[reader.bias] - before[reader.bias]
        return shifts

    def residual(
        self, keep: Keep, key: PRNGKeyArray, params: PyTree | None = None
    ) -> dict[str, float]:
        r"""$D(S) = E \lVert H_S W_S \rVert^2$ of each layer: what the doomed units add
        to it, summed over its outputs, in the mean over examples and positions."""
        params = self.task.params if params is None else params
        found = {}
        for at, level in enumerate(self.levels):
            kept = {path: self.readers[path].kept(keep) for path in level}
            level_key = jax.random.fold_in(key, at)
            sums = self._summed(kept, level_key, params, params)
            found |= {path: float(gone) for path, (*_, gone) in sums.items()}
        return found

    def _summed(self, kept, key, params, base):
        """For each layer of a level the sums over all examples, on the host."""

        def zeros(of: Product):
            size = of.entries + 1
            return tuple(map(jnp.zeros, ((size, size), (size, of.outputs), ())))

        total = {path: zeros(self.readers[path].of) for path in kept}
        for at, (images, _) in enumerate(self.task.batches()):
            batch_key = jax.random.fold_in(key, at)
            total = self._sum(total, kept, params, base, images, batch_key)
        found = {
            path: tuple(np.asarray(a, np.float64) for a in sums)
            for path, sums in total.items()
        }
        for path, sums in found.items():
            if not all(np.isfinite(a).all() for a in sums):
                raise ValueError(f"what {path!r} reads or makes isn't finite")
        return found

    def _add(self, total, kept, params, base, images, key):
        """Sums of products over a batch, divided by the number of batches."""
        layers = [self.readers[path].of for path in kept]
        seen = windows(self.task, layers, self.positions, key, params, base, images)
        return {
            path: self._added(
                self.readers[path], sums, kept[path][None], params, base, view
            )
            for (path, sums), view in zip(total.items(), seen, strict=True)
        }

    def _added(self, reader, total, kept, params, base, seen: Windows):
        kernel = _flat(reader.of, units.arrays(params)[reader.of.path])
        ones = jnp.full((len(seen.inputs), 1), float(reader.bias is not None))
        x = jnp.concatenate([seen.inputs * kept, ones], axis=1)
        missing = seen.targets - (seen.inputs * kept) @ kernel
        if reader.bias is not None:
            arrays = units.arrays(params), units.arrays(base)
            here, there = (a[reader.bias] for a in arrays)
            missing += (there - here)[None]
        gone = (seen.inputs * (1 - kept)) @ kernel
        share = 1 / (len(seen.inputs) * len(self.task.images))
        gram = jnp.matmul(x.T, x, precision="highest")
        cross = jnp.matmul(x.T, missing, precision="highest")
        new = (gram, cross, jnp.square(gone).sum())
        return tuple(a + b * share for a, b in zip(total, new, strict=True))


def _solved(reader: _Reader, kept, gram, cross, ridge: float, params: PyTree) -> PyTree:
    """The parameters with the kernel and the bias that solve the system."""
    rows = np.append(kept, reader.bias is not None)
    gram, cross = gram[np.ix_(rows, rows)], cross[rows]
    # Where nothing is ever read nothing is moved.
    ridge = max(ridge * float(gram.diagonal().mean()), float(np.finfo(np.float32).tiny))
    moved = np.linalg.solve(gram + ridge * np.eye(len(gram)), cross)
    old = units.arrays(params)
    matrix = reader.of.matrix(old[reader.of.path]) * kept[:, None]
    matrix[kept] += moved[: kept.sum()]
    kernel = old[reader.of.path]
    new = {reader.of.path: jnp.asarray(reader.of.kernel(matrix), kernel.dtype)}
    if reader.bias is not None:
        new[reader.bias] = old[reader.bias] + jnp.float32(moved[-1])
    return units.replace(params, new)


def _readers(task: Task) -> dict[str, _Reader]:
    """The kernels that read units, in the order of the program."""
    arrays = units.arrays(task.params)
    slots: dict[str, list] = {}
    for name, group in task.structure.groups.items():
        for slot in group.used_by:
            slots.setdefault(slot.path, []).append((name, group.size, slot))
    found = {}
    for path in sorted(slots, key=lambda path: task.flow.reader(path).at):
        of = product(task, path)
        of_entries = tuple(
            (name, of.of_entries(slot.axis, units.owners(slot, size)))
            for name, size, slot in slots[path]
        )
        # Flax calls the bias so; a layer without one has none that could be fitted.
        bias: str | None = f"{path.removesuffix('kernel')}bias"
        if bias not in arrays or arrays[bias].shape != (of.outputs,):
            bias = None
        found[path] = _Reader(of, of_entries, bias)
    return found


def _flat(of: Product, kernel: Array) -> Float[Array, "entries outputs"]:
    return jnp.moveaxis(kernel, of.outputs_axis, -1).reshape(-1, of.outputs)


# ------------------------------------------------------------------------- removal


def remove(
    model: Model,
    structure: Structure | Groups,
    keep: Keep,
    examples: Shaped[Array | np.ndarray, "examples *shape"],
    tolerance: float = 1e-5,
) -> Model:
    """The smaller network, which is seen to do what the network with the doomed units
    closed does.

    Args:
        model: in evaluation mode.
        structure: of the network, or its groups.
        keep: flags of the units that stay.
        examples: on which the outputs are compared.
        tolerance: how far outputs may differ, as a share of the largest.

    Raises:
        ValueError: if outputs differ by more; as `l0jax.shrink`.
    """
    groups = structure.groups if isinstance(structure, Structure) else structure
    z = {name: jnp.float32(jnp.asarray(flags)) for name, flags in keep.items()}
    closed = l0jax.nnx.fold(model, z, groups)
    small = l0jax.nnx.shrink(
        closed, {n: np.asarray(k, bool) for n, k in keep.items()}, structure
    )
    before, after = (np.asarray(net(jnp.asarray(examples))) for net in (closed, small))
    apart, largest = np.abs(before - after).max(), np.abs(before).max()
    if not apart <= tolerance * max(largest, 1.0):
        gone = sum(int((~np.asarray(flags, bool)).sum()) for flags in keep.values())
        raise ValueError(
            f"removing {gone} closed units changes an output by {apart:.3g}, more than "
            f"{tolerance:g} of {largest:.3g}: the groups don't describe this network"
        )
    return small


# ---------------------------------------------------------------- additional losses


def distillation(
    logits: Float[Array | np.ndarray, "batch classes"],
    teacher: Float[Array | np.ndarray, "batch classes"],
    temperature: float = 2.0,
) -> Float[Array, " batch"]:
    r"""$\tau^2 KL(\mathrm{softmax}(t / \tau) \Vert \mathrm{softmax}(y / \tau))$ of each
    example (Hinton, Vinyals and Dean 2015)."""
    log_p = jax.nn.log_softmax(teacher / temperature)
    log_q = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def mismatch(
    made: Float[Array, "*rows outputs"],
    target: Float[Array, "*rows outputs"],
    kept: Float[Array, " outputs"],
) -> Float[Array, ""]:
    r"""$\lVert Y_t - Y \rVert^2 / \lVert Y_t \rVert^2$ over the outputs of a
    layer that are kept, those with a 1."""
    kept = kept.reshape([1] * (target.ndim - 1) + [-1])
    wanted = jnp.square(target * kept).sum()
    return jnp.square((target - made) * kept).sum() / jnp.maximum(wanted, 1e-12)


def gradnorm(
    weights: Float[Array, " losses"],
    norms: Float[Array, " losses"],
    losses: Float[Array, " losses"],
    first: Float[Array, " losses"],
    alpha: float = 1.0,
    learning_rate: float = 0.025,
) -> Float[Array, " losses"]:
    r"""Weights of losses after a step of GradNorm (Chen, Badrinarayanan, Lee and
    Rabinovich 2018, algorithm 1).

    They move by the gradient of $\sum_i |w_i g_i - \bar G r_i^\alpha|$, in which
    $\bar G$ is the mean of $w_i g_i$ and $r_i$ how much of the loss is left, over the
    mean of that, both taken as constants; then they are scaled to sum to their number.

    Args:
        weights: w, now.
        norms: g, the norms of the losses' gradients in shared weights, unweighted.
        losses: now.
        first: at the first step.
        alpha: how strongly losses that fall slowly are pushed.
        learning_rate: of the weights.
    """
    left = losses / jnp.maximum(first, 1e-12)
    rate = left / jnp.maximum(left.mean(), 1e-12)
    target = (weights * norms).mean() * rate**alpha
    moved = weights - learning_rate * jnp.sign(weights * norms - target) * norms
    moved = jnp.maximum(moved, 1e-3)
    return moved * len(weights) / moved.sum()
