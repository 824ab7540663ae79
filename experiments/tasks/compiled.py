r"""Transformers that compute known programs, with edges between their parts.

The programs were compiled by tracr (Lindner et al., NeurIPS 2023); the weights lie in
`experiments/tasks/tracr/`, beside the script that made them. Such a transformer has no
layer norm, and what every part of it reads is a sum. The parts that write ("senders")
are the embeddings of tokens and of positions, the heads and the MLPs; those that read
("receivers") are the query, the key and the value of every head, the MLPs and the
output. With an adjacency array e a receiver r reads

$$ x_r = \sum_{s \text{ before } r} e_{rs} \, y_s $$

of what the senders write (Bhaskar et al., "Finding Transformer Circuits with Edge
Pruning", NeurIPS 2024; with zeros in the place of what is removed, as in their runs on
these programs). All ones give the compiled transformer. Of each program all inputs
are known, of 1 to 5 tokens: on those of 5 alone, "reverse" would need no length.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from l0jax import Group, Slot

FOLDER = Path(__file__).parent / "tracr"
START, PADDING = "BOS", "PAD"
READS = ("query", "key", "value")
EDGES = "edges"

Weights = dict[str, Float[np.ndarray, "..."]]
Adjacency = Float[Array, "receivers senders"]


class Edge(NamedTuple):
    """What a part writes, as another part reads it; prints as a line."""

    sender: str
    receiver: str

    def __str__(self) -> str:
        return f"{self.sender} → {self.receiver}"


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A compiled program.

    Attributes:
        name: of the program.
        weights: its arrays by name, those of layers as "layers.0.query".
        vocabulary: what a token may be, by its code.
        directions: what each entry of the residual stream stands for.
        categorical: whether the largest of the outputs counts, or their value.
        examples: all inputs, padded to one length, and started as tracr wants it.
        outputs: what tracr's own transformer makes of them.
    """

    name: str
    weights: Weights
    vocabulary: tuple[str, ...]
    directions: tuple[str, ...]
    categorical: bool
    examples: Int[np.ndarray, "examples length"]
    outputs: Float[np.ndarray, "examples length outputs"]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return sum(name.endswith(".hidden") for name in self.weights)

    @property
    def heads(self) -> int:
        """Number of heads of each layer."""
        return len(self.weights["layers.0.query"])

    # ------------------------------------------------------------------- its edges

    @functools.cached_property
    def senders(self) -> tuple[str, ...]:
        """The parts that write, in the order in which they are computed."""
        found = ["tokens", "positions"]
        for layer in range(self.layers):
            found += [f"head {layer}.{head}" for head in range(self.heads)]
            found.append(f"MLP {layer}")
        return tuple(found)

    @functools.cached_property
    def receivers(self) -> tuple[str, ...]:
        """What reads, in the order in which it is computed."""
        found = []
        for layer in range(self.layers):
            for read in READS:
                found += [f"head {layer}.{head} {read}" for head in range(self.heads)]
            found.append(f"MLP {layer}")
        return (*found, "output")

    @functools.cached_property
    def there(self) -> Bool[np.ndarray, "receivers senders"]:
        """Which edges there are: from what is computed before."""
        earlier = []
        for layer in range(self.layers):
            before = 2 + layer * (self.heads + 1)
            earlier += [before] * len(READS) * self.heads + [before + self.heads]
        earlier.append(len(self.senders))
        return np.arange(len(self.senders)) < np.array(earlier)[:, None]

    @functools.cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All edges, in the order of the units of `group`."""
        return tuple(
            Edge(self.senders[sender], self.receivers[receiver])
            for receiver, sender in np.argwhere(self.there)
        )

    @property
    def group(self) -> Group:
        """The edges as units: the entries of the array `"edges"` that stand for one."""
        numbers = np.full(self.there.shape, -1)
        numbers[self.there] = np.arange(len(self.edges))
        unit_of = tuple(numbers.ravel().tolist())
        slot = Slot(EDGES, None, unit_of)
        return Group(EDGES, len(self.edges), used_by=(slot,))

    def adjacency(
        self, kept: Bool[np.ndarray, " edges"] | Bool[np.ndarray, "sets edges"]
    ) -> Float[np.ndarray, "*sets receivers senders"]:
        """The array with ones at some of the edges; of several sets, one for each."""
        found = np.zeros((*kept.shape[:-1], *self.there.shape), np.float32)
        found[..., self.there] = kept
        return found

    # ------------------------------------------------------------------ what it does

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of `apply`, with all edges."""
        everything = np.ones(len(self.edges), bool)
        return {EDGES: self.adjacency(everything), "weights": self.weights}

    def apply(
        self,
        params: dict[str, Any],
        tokens: Integer[Array | np.ndarray, "batch length"],
    ) -> Float[Array, "batch length outputs"]:
        """What the transformer with such edges puts out at each token.

        Args:
            params: as `params`.
            tokens: codes; whatever is padding is attended to by none.
        """
        params, tokens = jax.tree.map(jnp.asarray, (params, tokens))
        edges, weights = params[EDGES], params["weights"]
        rows = dict(zip(self.receivers, edges, strict=True))
        embedded = weights["tokens"][tokens]
        placed = weights["positions"][: tokens.shape[1]]
        written = [embedded, jnp.broadcast_to(placed, embedded.shape)]
        attended = tokens != self.vocabulary.index(PADDING)

        def read(receiver: str, written: list[Array]) -> Array:
            row = rows[receiver]
            return sum((row[i] * y for i, y in enumerate(written)), jnp.zeros(()))

        for layer in range(self.layers):
            its = {
                name.rpartition(".")[2]: array
                for name, array in weights.items()
                if name.startswith(f"layers.{layer}.")
            }
            made = []
            for head in range(self.heads):
                query, key, value = (
                    read(f"head {layer}.{head} {name}", written) @ its[name][head]
                    for name in READS
                )
                scores = query @ key.swapaxes(1, 2) / np.sqrt(key.shape[-1])
                scores = jnp.where(attended[:, None], scores, -1e30)
                made.append(jax.nn.softmax(scores) @ value @ its["attended"][head])
            written = written + made
            hidden = jax.nn.relu(read(f"MLP {layer}", written) @ its["hidden"])
            written = [*written, hidden @ its["made"]]
        return read("output", written) @ weights["output"]

    @property
    def counted(self) -> Bool[np.ndarray, "examples length"]:
        """At which tokens of the examples the output counts: not at the first one, for
        which tracr promises nothing, nor at padding."""
        silent = [self.vocabulary.index(START), self.vocabulary.index(PADDING)]
        return ~np.isin(self.examples, silent)

    def encode(self, words: Sequence[str]) -> Int[np.ndarray, " length"]:
        """The codes of an input, started and padded.

        Raises:
            ValueError: for no word, for too many, or for one that the program does not
                know.
        """
        length = self.examples.shape[1]
        if not 0 < len(words) < length:
            raise ValueError(
                f"{self.name} reads 1 to {length - 1} tokens, got {len(words)}"
            )
        known = [word for word in self.vocabulary if word not in (START, PADDING)]
        for word in words:
            if word not in known:
                raise ValueError(
                    f"{word!r} is no token of {self.name}; there is {', '.join(known)}"
                )
        padded = [START, *words, *[PADDING] * (length - 1 - len(words))]
        return np.array([self.vocabulary.index(word) for word in padded])

    def run(self, words: Sequence[str]) -> list[Any]:
        """What the program makes of an input: a token or a number for each word.

        Raises:
            ValueError: as `encode`.
        """
        outputs = np.asarray(self.apply(self.params, self.encode(words)[None]))
        outputs = outputs[0, 1 : 1 + len(words)]
        if not self.categorical:
            return outputs[:, 0].tolist()
        reads = self.weights["output"].argmax(axis=0)
        return [
            self.directions[reads[best]].rpartition(":")[2]
            for best in outputs.argmax(axis=1)
        ]

    # ------------------------------------------------------------ what it needs

    @functools.cached_property
    def wired(self) -> Bool[np.ndarray, " edges"]:
        """Which edges carry anything: the receiver reads a direction of the residual
        stream that the sender writes. Without the others the transformer is the same
        function, whatever else is removed."""
        weights = self.weights
        writes = {name: weights[name] for name in ("tokens", "positions")}
        reads = {"output": weights["output"]}
        for layer in range(self.layers):
            for head in range(self.heads):
                at = f"head {layer}.{head}"
                writes[at] = weights[f"layers.{layer}.attended"][head]
                for read in READS:
                    reads[f"{at} {read}"] = weights[f"layers.{layer}.{read}"][head]
            writes[f"MLP {layer}"] = weights[f"layers.{layer}.made"]
            reads[f"MLP {layer}"] = weights[f"layers.{layer}.hidden"]
        written = {name: array.any(axis=0) for name, array in writes.items()}
        read = {name: array.any(axis=1) for name, array in reads.items()}
        return np.array([(written[s] & read[r]).any() for s, r in self.edges])

    def same(
        self, kept: Bool[np.ndarray, "sets edges"], within: float = 1e-3
    ) -> Bool[np.ndarray, " sets"]:
        """Whether circuits of some edges do what the program does, on all examples: the
        same token is the largest output everywhere, or all numbers agree.

        Args:
            kept: a set of edges for each circuit.
            within: how far numbers may be apart.
        """

        def agrees(edges: Adjacency) -> Array:
            outputs = self.apply({EDGES: edges, "weights": self.weights}, self.examples)
            if self.categorical:
                alike = outputs.argmax(-1) == self.outputs.argmax(-1)
            else:
                alike = (abs(outputs - self.outputs) < within).all(-1)
            return (alike | ~self.counted).all()

        return np.asarray(jax.lax.map(agrees, self.adjacency(kept)))

    @functools.cached_property
    def needed(self) -> Bool[np.ndarray, " edges"]:
        """The known graph: the edges without each of which alone the program puts out
        something else for at least one of all inputs.

        Of both programs it is the only answer: of all sets of edges exactly those do
        what the program does that hold it. Beside it only edges from the tokens to
        queries and keys are wired. With them tracr lets a token at which nothing is
        selected attend to the first one; here something always is, and without them
        attention is the same.
        """
        without = ~np.eye(len(self.edges), dtype=bool)
        return ~self.same(without)


NAMES = ("reverse", "xproportion")


def load(name: str) -> Program:
    """One of the programs: `"reverse"` puts out its tokens in reverse order,
    `"xproportion"` at each token which share of those so far are `"x"`.

    Raises:
        ValueError: for a program that there is not.
    """
    if name not in NAMES:
        raise ValueError(f"unknown program {name!r}; there is {', '.join(NAMES)}")
    with np.load(FOLDER / f"{name}.npz") as stored:
        arrays = dict(stored)
    weights = {
        at: arrays[at]
        for at in arrays
        if at in ("tokens", "positions", "output") or at.startswith("layers.")
    }
    return Program(
        name,
        weights,
        tuple(arrays["vocabulary"].tolist()),
        tuple(arrays["directions"].tolist()),
        bool(arrays["categorical"]),
        arrays["examples"].astype(np.int32),
        arrays["outputs"],
    )
