"""Channel pruning by LASSO (He, Zhang and Sun 2017, "Channel Pruning for Accelerating
Very Deep Neural Networks")."""

import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray, PyTree

from l0jax.methods.keeping import count_left
from l0jax.methods.samples import Rows, fold, layer, least_squares, rows
from l0jax.methods.task import Task

BISECTIONS = 50
# The smallest penalty that is tried, as a power of two below the one that removes all.
HALVINGS = 20


def channel_pruning(
    task: Task,
    group: str,
    ratio: float,
    key: PRNGKeyArray,
    params: PyTree | None = None,
    positions: int = 10,
) -> tuple[Bool[np.ndarray, " units"], PyTree]:
    r"""Selects the units of a group by a LASSO over the layer that reads them, and fits
    its kernel to what the base network makes.

    $\min_{\beta, W} \frac{1}{2N} \|Y - \sum_k \beta_k X_k W_k\|_F^2 + \lambda
    \|\beta\|_1$ (eq. 2), with $\|W_k\|_F = 1$: first in β for the W that there is, with
    as large a λ as leaves the wanted number, then in the W of what is left, without a
    penalty.

    Args:
        task: its parameters are the base network, whose outputs are reconstructed.
        group: read by one layer.
        ratio: share of the units that is removed.
        key: draws the positions.
        params: the network as pruned so far; by default the base network.
        positions: drawn of each example; 10 in the paper. There should be several times
            as many rows as weights that an output keeps.

    Returns:
        A flag for each unit that is kept, and the parameters: in the layer's kernel the
        rows of removed units are zero, all others are fitted.

    Raises:
        ValueError: if `ratio` is outside [0, 1); as `samples.layer` and `samples.rows`.
    """
    params = task.params if params is None else params
    of = layer(task, group)
    size = task.structure.groups[group].size
    wanted = count_left(size, ratio)
    system = rows(task, of, key, params, positions)
    keep = np.ones(size, bool)
    if wanted < size:
        keep = select(*lasso_problem(system), wanted)
    # What another group closed before stays closed.
    free = np.append(keep, True)[system.unit_of] & system.kernel.any(axis=1)
    matrix = np.zeros_like(system.kernel)
    matrix[free] = least_squares(
        system.inputs[:, free], system.targets, system.kernel[free]
    )
    return keep, fold(params, of, matrix)


def lasso_problem(
    system: Rows,
) -> tuple[Float[np.ndarray, "rank units"], Float[np.ndarray, " rank"]]:
    """A matrix Z and a vector y for which ‖y - Zβ‖² is ‖Y - Σ βₖ Xₖ Wₖ‖² but for a
    constant, ‖Wₖ‖ = 1.

    All rows and outputs would be a column of millions for each unit. Only ZᵀZ and Zᵀy
    matter, and these come from the products of entries.
    """
    x, y, owners = system.inputs, system.targets_of_units, system.owners
    norms = np.sqrt(owners.T @ np.square(system.kernel).sum(axis=1))
    norms = np.append(np.where(norms > 0, norms, 1), 1)
    w = system.kernel / norms[system.unit_of][:, None]
    gram = owners.T @ ((x.T @ x) * (w @ w.T)) @ owners
    moments = owners.T @ (w * (x.T @ y)).sum(axis=1)
    values, vectors = np.linalg.eigh(gram)
    there = values > len(values) * np.finfo(float).eps * values.max()
    roots, vectors = np.sqrt(values[there]), vectors[:, there]
    return roots[:, None] * vectors.T, vectors.T @ moments / roots


def select(
    z: Float[np.ndarray, "rank units"], y: Float[np.ndarray, " rank"], wanted: int
) -> Bool[np.ndarray, " units"]:
    """The `wanted` units that survive a LASSO of y on z without an intercept.

    The penalty is halved, from one under which none survives, until more do than are
    wanted, and bisected from there. If no penalty leaves just so many, those with the
    largest |β| are kept, the first of several with the same.
    """
    # To import it takes a second, which nothing else here needs.
    from sklearn.linear_model import Lasso

    keep = np.zeros(z.shape[1], bool)
    beta = np.zeros(z.shape[1])
    # (Smaller penalties take longer, so that we don't begin there.)
    high = np.abs(z.T @ y).max(initial=0) / max(len(z), 1)
    if high > 0:
        lasso = Lasso(fit_intercept=False, warm_start=True, tol=1e-7, max_iter=10**5)

        def survive(alpha):
            return lasso.set_params(alpha=alpha).fit(z, y).coef_.copy()

        low = high
        for _ in range(HALVINGS):
            low = low / 2
            beta = survive(low)
            if np.count_nonzero(beta) >= wanted:
                break
            high = low
        for _ in range(BISECTIONS):
            if np.count_nonzero(beta) <= wanted:
                break
            middle = (low + high) / 2
            found = survive(middle)
            if np.count_nonzero(found) < wanted:
                high = middle
            else:
                low, beta = middle, found
    keep[np.argsort(-np.abs(beta), kind="stable")[:wanted]] = True
    return keep
