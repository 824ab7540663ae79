"""What every gate family provides: pure functions of a key and of logits.

A gate z multiplies what a unit gives to the rest of the network. A family
is a frozen dataclass whose fields are hyperparameters, so that equal gates compare
equal, hash equal and share one compiled trace. It is written for one gate: every
method maps over arrays of any shape, and `jax.vmap` over keys gives one draw per
example.
"""

from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Array, Float, PRNGKeyArray


@runtime_checkable
class Gate(Protocol):
    """The contract of a gate family; `tests/test_gates.py` sweeps it as laws."""

    rules: ClassVar[tuple[str, ...]]
    """Names of the test-time estimators that `deterministic` knows; `"paper"`, the one
    of the paper that the family is from, is among them."""

    random: ClassVar[bool]
    """Whether draws depend on the key."""

    bounded: ClassVar[bool]
    """Whether draws lie in [0, 1] and grow with the logit."""

    zeros: ClassVar[bool]
    """Whether a gate can be exactly 0. If not, P(z != 0) is 1, and only the paper's
    rule says which units go."""

    pathwise: ClassVar[bool]
    """Whether the derivative of a draw is its own, not that of a surrogate."""

    exact: ClassVar[bool]
    """Whether the closed forms are those of what is drawn."""

    def init(
        self, key: PRNGKeyArray, size: int, keep_prob: float
    ) -> Float[Array, " units"]:
        """Logits of `size` gates whose keep probability is about `keep_prob`."""
        ...

    def sample(
        self, key: PRNGKeyArray, logits: Float[Array, "*units"]
    ) -> Float[Array, "*units"]:
        """One draw of each gate, differentiable in its logit."""
        ...

    def prob_active(self, logits: Float[Array, "*units"]) -> Float[Array, "*units"]:
        """P(z != 0) in closed form."""
        ...

    def l0_term(self, logits: Float[Array, "*units"]) -> Float[Array, "*units"]:
        """What a unit pays in the objective, differentiable: P(z != 0) unless the
        family says otherwise."""
        ...

    def prob_one(self, logits: Float[Array, "*units"]) -> Float[Array, "*units"]:
        """P(z = 1) in closed form."""
        ...

    def mean(self, logits: Float[Array, "*units"]) -> Float[Array, "*units"]:
        """E[z]."""
        ...

    def deterministic(
        self, logits: Float[Array, "*units"], rule: str
    ) -> Float[Array, "*units"]:
        """The gate's value at test time under the estimator named `rule`."""
        ...

    def project(self, logits: Float[Array, "*units"]) -> Float[Array, "*units"]:
        """The nearest logits that the family allows; applied after every step."""
        ...

    @property
    def norm_share(self) -> float | Float[Array, ""]:
        """Which share of the price of a unit stands before the squared norm of the
        weights that its gate multiplies, for gates that are factors of them."""
        ...

    @property
    def temperature(self) -> float | Float[Array, ""]:
        """How soft the gates are, > 0: towards 0 they become binary."""
        ...

    def at_temperature(self, temperature: float | Float[Array, ""]) -> "Gate":
        """The same family at another temperature, which may be traced (annealing)."""
        ...
