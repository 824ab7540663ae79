"""A language model of `experiments.language_model` at full size: what gates cost a
step, what half of the parameters saves in training, in a call and in generation, and
whether whole branches or widths save more seconds.

    python -m benchmarks.decoder             # prints ratios and limits
    python -m benchmarks.decoder --record    # and writes benchmarks/results/

What is compared takes turns in one process, as in the other benchmarks. The tokens are
random: no step depends on what they say. Two minutes on two cores.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import l0jax
from benchmarks import measure
from benchmarks.measure import entry, milliseconds, ratio, take_turns
from experiments.language_methods import within_budget
from experiments.language_run import groups_of, new_decoder, structure_of
from experiments.language_settings import Config
from experiments.language_training import Windows, loss
from l0jax import costs, gates, train
from l0jax.models.decoder import Decoder, Sizes, generate
from l0jax.nnx import shrink

CONFIG = Config()
STEPS, CHARACTERS, PROMPT = 8, 65, 16


def base() -> Decoder:
    """With random weights."""
    return new_decoder(CONFIG, CHARACTERS, jax.random.key(0))


def half(model: Decoder) -> Decoder:
    """With the first heads, hidden units and units of the stream, as many as half of
    the parameters allow."""
    structure = structure_of(model, CONFIG.gated)
    named = groups_of(structure, CONFIG.gated)
    scores = {n: -np.arange(float(structure.groups[n].size)) for n in named}
    keep = within_budget(structure, scores, costs.params, 0.5)
    return shrink(model, keep, structure)


def stepper(model: Decoder, gated: bool) -> Callable[[], None]:
    """Runs `STEPS` training steps, compiled before."""
    structure = structure_of(model, CONFIG.gated)
    how: dict[str, Any] = {"structure": structure.only()}
    if gated:
        named = tuple(groups_of(structure, CONFIG.gated))
        how = {
            "structure": structure,
            "gate": train.Learned(gates.HardConcrete(), 0.95, only=named),
            "gate_optimizer": optax.adam(1e-2),
            "target": train.Target(costs.params, 0.5, how="quadratic", rate=0.01),
        }
    training = train.Training(model, loss, optimizer=optax.adamw(1e-3), **how)
    key, batch = jax.random.key(0), CONFIG.tune.batch_size
    shape = (STEPS * batch, CONFIG.length + 1)
    data = Windows(jax.random.randint(key, shape, 0, CHARACTERS, jnp.int32))
    order = np.arange(STEPS * batch).reshape(STEPS, batch)
    kept = [training.epoch(training.start(key), data, order)[0]]
    jax.block_until_ready(kept)

    def go():
        kept[0], _ = training.epoch(kept[0], data, order)
        jax.block_until_ready(kept)

    return go


def caller(model: Decoder, batch: int) -> Callable[[], None]:
    """Calls a model with whole windows, compiled before."""
    graph, state = nnx.split(model)
    call = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    tokens = jnp.zeros((batch, CONFIG.length), jnp.int32)

    def go():
        jax.block_until_ready(call(state, tokens))

    go()
    return go


def writer(model: Decoder, batch: int) -> Callable[[], None]:
    """Goes on from a prompt to the end of the window, with a cache, compiled before."""
    prompt = jnp.zeros((batch, PROMPT), jnp.int32)

    def go():
        jax.block_until_ready(generate(model, prompt, CONFIG.length - PROMPT))

    go()
    return go


def macs(model: Decoder) -> float:
    """Of a call with one window; those of a batch are as many times more."""
    tokens = jax.ShapeDtypeStruct((1, CONFIG.length), jnp.int32)
    return costs.exact(l0jax.trace(model, tokens), cost=costs.macs)


def of_steps(turns: int) -> list[dict]:
    whole = base()
    seconds = take_turns(
        {
            "plain": stepper(whole, gated=False),
            "gated": stepper(whole, gated=True),
            "half": stepper(half(whole), gated=False),
        },
        turns,
    )
    detail = milliseconds(seconds, STEPS)
    gated, smaller = ratio(seconds, "gated", "plain"), ratio(seconds, "half", "plain")
    return [
        entry("decoder step with gates over one without", gated, 1.15, "×", detail),
        entry(
            "decoder step with half of the parameters over that of the whole",
            smaller,
            None,
            "×",
            f"what compaction makes of the rest of training; {detail}",
        ),
    ]


def of_calls(turns: int) -> list[dict]:
    whole = base()
    small = half(whole)
    found = []
    for batch in (1, 32):
        for what, make in (("a call", caller), ("generation with a cache", writer)):
            seconds = take_turns(
                {"half": make(small, batch), "whole": make(whole, batch)}, turns
            )
            found.append(
                entry(
                    f"{what} at batch {batch}, half of the parameters over the whole",
                    ratio(seconds, "half", "whole"),
                    None,
                    "×",
                    f"{macs(small) / macs(whole):.2f}× the multiply-accumulates; "
                    f"{milliseconds(seconds, 1)}",
                )
            )
    return found


def at_sizes(blocks: Sequence[Sizes]) -> Decoder:
    """A decoder of other blocks, with random weights."""
    return Decoder(CHARACTERS, CONFIG.width, blocks, CONFIG.length, rngs=nnx.Rngs(0))


def of_depth(turns: int) -> list[dict]:
    """Half of the blocks, and as much of the arithmetic out of all of them."""
    whole = base()
    each, many, half = whole.sizes[0], CONFIG.layers, CONFIG.layers // 2
    no_attention = each._replace(groups=0, values=0)
    no_feed_forward = each._replace(hidden=0)
    few_heads = each._replace(groups=each.groups // 2)
    few_hidden = each._replace(hidden=each.hidden // 2)
    few = few_heads._replace(hidden=few_hidden.hidden)
    ways = {
        "feed-forward": ([no_feed_forward] * half + [each] * half, [few_hidden] * many),
        "attention": ([no_attention] * half + [each] * half, [few_heads] * many),
        "both": ([each] * half, [few] * many),
    }
    models = {
        f"{what}: half of the {of}": at_sizes(blocks)
        for what, pair in ways.items()
        for of, blocks in zip(("branches", "units of all branches"), pair, strict=True)
    }
    found = []
    for batch in (1, 32):
        calls = {name: caller(model, batch) for name, model in models.items()}
        seconds = take_turns(calls | {"whole": caller(whole, batch)}, turns)
        found += [
            entry(
                f"a call at batch {batch} over that of the whole, {name}",
                ratio(seconds, name, "whole"),
                None,
                "×",
                f"{macs(model) / macs(whole):.2f}× the multiply-accumulates; "
                f"{milliseconds({n: seconds[n] for n in (name, 'whole')}, 1)}",
            )
            for name, model in models.items()
        ]
    return found


def main(arguments) -> list[dict]:
    begun = time.perf_counter()
    turns = 4 * arguments.turns + 1
    found = of_steps(arguments.turns) + of_calls(turns) + of_depth(turns)
    print(f"{time.perf_counter() - begun:.0f} s")
    return found


if __name__ == "__main__":
    measure.run(__doc__, "decoder", main, turns=7)
