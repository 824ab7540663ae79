r"""What is added to the task loss: the expected L0 norm, alone or with L2.

With gates z and weights $\tilde\theta$, the regulariser of Louizos et al. (2018),
eq. 3 and appendix A, for a data set of N examples is

$$ \frac{1}{N} \sum_g P(z_g \neq 0) \Big( c_g |g|
     + \tfrac{W}{2} \sum_{j \in g} \tilde\theta_j^2 \Big)
   + \frac{1}{N} \frac{W}{2} \sum_{j \notin \cup g} \tilde\theta_j^2,
   \qquad W = N \cdot \text{weight decay}. $$

The L2 term is that of the weights rescaled so that the gate does not shrink it: a unit
pays for its norm in proportion to the probability that it is there.

Of gates that are factors of their weights (`l0jax.gates.DGating`) a share s of the
price is paid by the weights themselves that the gate multiplies, whatever the unit is
charged for: $c_g |g| \, s \sum_j \theta_j^2 / N$.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from l0jax.units import Groups, Slot, arrays, charge, free

Objective = Callable[..., Float[Array, ""]]
"""`(params, what each unit pays, norm_share=0.0, there=None) -> scalar`."""
Charges = Mapping[str, tuple[Slot, ...]]


def charges_of(groups: Groups) -> dict[str, tuple[Slot, ...]]:
    """The weights that each unit pays for by default: those that use it."""
    return {name: group.used_by for name, group in groups.items()}


def expected_l0(
    params: PyTree,
    prob_active: Mapping[str, Float[Array, " units"]],
    groups: Groups,
    charges: Charges | None = None,
) -> Float[Array, ""]:
    r"""$E\|\theta\|_0 = \sum_g |g| P(z_g \neq 0)$ (Louizos et al. 2018, eq. 4).

    Args:
        params: the weights; only their shapes matter.
        prob_active: P(z != 0) of each unit.
        groups: the groups of units.
        charges: which weights count for a unit, |g| of them; by default those that
            its gate multiplies.
    """
    total = jnp.zeros(())
    for name, each in sizes(params, groups, charges).items():
        if name in prob_active:
            total = total + (each * prob_active[name]).sum()
    return total


def sizes(
    params: PyTree, groups: Groups, charges: Charges | None = None
) -> dict[str, Float[Array, " units"]]:
    """|g|, the number of weights that each unit pays for."""
    charges = charges_of(groups) if charges is None else charges
    return {
        name: charge(jnp.ones_like, params, charges[name], group.size)
        for name, group in groups.items()
    }


def given(coefficient: float | Float[Array, ""]) -> bool:
    """Whether there is anything to add: a coefficient that is traced may be any."""
    return not isinstance(coefficient, float | int) or coefficient != 0


def penalty(
    groups: Groups,
    lam: float | Float[Array, ""] | Mapping[str, float | Float[Array, ""]],
    examples: int,
    *,
    weight_decay: float | Float[Array, ""] = 0.0,
    charges: Charges | None = None,
    detached: bool = False,
) -> Objective:
    r"""The regulariser above, as a function `(params, paid, norm_share=0.0, there=None)
    -> scalar` of what each unit pays, P(z != 0) as a rule; and, where that is no
    probability, of that it is there, for the norms.

    The reference implementation differs in two places that are corrected here. Its
    gated convolution *subtracts* $\lambda$ for the bias, $P(\tfrac{W}{2} b^2 -
    \lambda)$ with the sign of both terms inverted, so that a map of n weights and a
    bias is charged n - 1 instead of n + 1. And its LeNet-5 passes the weight decay as W
    without the factor N, which makes L2 N times weaker than stated.

    Args:
        groups: the gated groups.
        lam: c in $\lambda = c/N$, one number or one per group; it may be traced.
        examples: N, the number of training examples.
        weight_decay: coefficient of $\tfrac12\|\theta\|^2$ beside a mean loss.
        charges: slots whose weights each unit pays for, by default those that use it.
            A weight that no unit pays for has plain weight decay.
        detached: let weight decay shrink the weights only and not close gates: its
            P(z != 0) counts as a constant (as in the code of Gallego-Posada et al.
            2022).

    Raises:
        ValueError: if a coefficient is negative, `examples` is not positive, or `lam`
            names other groups than there are.
    """
    if not isinstance(lam, Mapping):
        lam = dict.fromkeys(groups, lam)
    if set(lam) != set(groups):
        raise ValueError(
            f"lam is given for {', '.join(lam) or 'nothing'}; "
            f"the groups are {', '.join(groups)}"
        )
    for name, value in {**lam, "weight_decay": weight_decay}.items():
        # (A traced coefficient, a member's of a sweep, has no value to check.)
        if not isinstance(value, jax.core.Tracer) and not value >= 0:
            raise ValueError(f"the coefficient of {name!r} must be >= 0, got {value}")
    if not examples > 0:
        raise ValueError(f"examples must be > 0, got {examples}")
    charges = charges_of(groups) if charges is None else charges
    charged = [slot for slots in charges.values() for slot in slots]

    def objective(params, prob_active, norm_share=0.0, there=None):
        total = jnp.zeros(())
        for name, group in groups.items():
            count = charge(jnp.ones_like, params, charges[name], group.size)
            open_ = prob_active[name]
            total = total + (open_ * count).sum() * (lam[name] / examples)
            if given(norm_share):
                read = charge(jnp.square, params, group.used_by, group.size)
                paid = norm_share * (count * read).sum()
                total = total + paid * (lam[name] / examples)
            if given(weight_decay):
                norm = charge(jnp.square, params, charges[name], group.size)
                open_ = open_ if there is None else there[name]
                if detached:
                    open_ = jax.lax.stop_gradient(open_)
                total = total + 0.5 * weight_decay * (open_ * norm).sum()
        if given(weight_decay):
            for path, leaf in arrays(params).items():
                if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                    continue  # It is not trained, and doesn't decay.
                slots = [slot for slot in charged if slot.path == path]
                total = total + 0.5 * weight_decay * free(jnp.square, leaf, slots)
        return total

    return objective
