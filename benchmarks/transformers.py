"""How long it takes to read and to print a language model of 7 billion parameters.

    python -m benchmarks.transformers             # prints numbers and limits
    python -m benchmarks.transformers --record    # and writes benchmarks/results/

Mistral 7B (Jiang et al. 2023), which is Llama (Touvron et al. 2023) with grouped
queries: 32 layers of rotary attention and SwiGLU between RMS norms, written out in
plain JAX, of which only shapes are read. Half a minute on two cores.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.measure import entry
from l0jax import Structure, trace


@dataclass(frozen=True)
class Sizes:
    """Every `heads // shared` queries share a head of keys and values."""

    layers: int
    width: int
    heads: int
    shared: int
    head: int
    inside: int
    words: int


MISTRAL = Sizes(32, 4096, 32, 8, 128, 14_336, 32_000)


def shapes(sizes: Sizes) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of the model, by name."""
    queries, keys = sizes.heads * sizes.head, sizes.shared * sizes.head
    layer = {
        "attention_norm": (sizes.width,),
        "query": (sizes.width, queries),
        "key": (sizes.width, keys),
        "value": (sizes.width, keys),
        "out": (queries, sizes.width),
        "norm": (sizes.width,),
        "gate": (sizes.width, sizes.inside),
        "up": (sizes.width, sizes.inside),
        "down": (sizes.inside, sizes.width),
    }
    found = {"embedding": (sizes.words, sizes.width)}
    for i in range(sizes.layers):
        found |= {f"layer{i}.{name}": shape for name, shape in layer.items()}
    found |= {"norm": (sizes.width,), "head": (sizes.width, sizes.words)}
    return {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in found.items()}


def norm(x, scale):
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + 1e-5) * scale[None, None]


def turned(x):
    """Rotary positions (Su et al. 2021) of `(batch, length, heads, size)`."""
    length, half = x.shape[1], x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency[None]
    sine, cosine = (f(angle)[None, :, None] for f in (jnp.sin, jnp.cos))
    one, two = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([one * cosine - two * sine, two * cosine + one * sine], -1)


def language_model(sizes: Sizes) -> Callable:
    """`apply(params, tokens)` gives logits, `(batch, length, words)`."""

    def attention(p, name, x):
        batch, length, _ = x.shape

        def heads(part):
            return (x @ p[f"{name}.{part}"]).reshape(batch, length, -1, sizes.head)

        query, key = turned(heads("query")), turned(heads("key"))
        query = query.reshape(batch, length, sizes.shared, -1, sizes.head)
        scores = jnp.einsum("btkgd,bskd->bkgts", query, key) / sizes.head**0.5
        past = jnp.tril(jnp.ones((length, length), bool))[None, None, None]
        weights = jax.nn.softmax(jnp.where(past, scores, -1e9), axis=-1)
        mixed = jnp.einsum("bkgts,bskd->btkgd", weights, heads("value"))
        return mixed.reshape(batch, length, -1) @ p[f"{name}.out"]

    def swiglu(p, name, x):
        gate = jax.nn.silu(x @ p[f"{name}.gate"])
        return (gate * (x @ p[f"{name}.up"])) @ p[f"{name}.down"]

    def apply(p, tokens):
        x = p["embedding"][tokens]
        for i in range(sizes.layers):
            name = f"layer{i}"
            x = x + attention(p, name, norm(x, p[f"{name}.attention_norm"]))
            x = x + swiglu(p, name, norm(x, p[f"{name}.norm"]))
        return norm(x, p["norm"]) @ p["head"]

    return apply


def tokens(length: int) -> jax.ShapeDtypeStruct:
    """(A batch of 1 would be taken for an axis that is broadcast.)"""
    return jax.ShapeDtypeStruct((2, length), jnp.int32)


def read(sizes: Sizes, length: int) -> Structure:
    return trace(language_model(sizes), shapes(sizes), tokens(length))


def seconds(function: Callable[[], object], turns: int) -> float:
    """The median over turns, each without what JAX remembers of the last."""
    found = []
    for _ in range(turns):
        jax.clear_caches()
        begun = time.perf_counter()
        function()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def main(arguments) -> list[dict]:
    structure = read(MISTRAL, 128)
    lines = str(structure).splitlines()
    parameters = sum(array.size for array in structure.arrays.values())
    name = f"a language model of {parameters / 1e9:.2f} billion parameters"
    jaxpr = seconds(
        lambda: jax.make_jaxpr(language_model(MISTRAL))(shapes(MISTRAL), tokens(128)),
        arguments.turns,
    )
    reading = seconds(lambda: read(MISTRAL, 128), arguments.turns)
    printing = seconds(lambda: str(structure), arguments.turns)
    found = f"{len(structure.groups)} groups; {jaxpr:.2f} s of it for the jaxpr"
    return [
        entry(f"reading {name}, its jaxpr included", reading, 1.5, " s", found),
        entry(f"printing {name}", printing, 0.5, " s", f"{len(lines)} lines"),
    ]


if __name__ == "__main__":
    measure.run(__doc__, "transformers", main, turns=5)
