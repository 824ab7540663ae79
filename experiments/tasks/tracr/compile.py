"""Compiles the programs whose weights lie beside this file.

    pip install tracr-pypi==1.0.0
    python -m experiments.tasks.tracr.compile

Programs are written in RASP and compiled to transformers by tracr (Lindner et al.,
"Tracr: Compiled Transformers as a Laboratory for Interpretability", NeurIPS 2023). The
two here are those on which Bhaskar et al. ("Finding Transformer Circuits with Edge
Pruning", NeurIPS 2024) compare circuits with the truth. The files were made with
tracr-pypi 1.0.0, dm-haiku 0.0.17 and JAX 0.10.2. Tracr is archived, so nothing but this
script needs it: `experiments.tasks.compiled` reads the files.
"""

import itertools
from pathlib import Path
from typing import Any

import haiku
import jax.numpy as jnp
import numpy as np
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

HERE = Path(__file__).parent
START, PADDING = "BOS", "PAD"
LONGEST = 5
"""tokens of an input, without the first one, which tracr puts before each"""


def programs() -> dict[str, tuple[Any, set[str]]]:
    """Each program and its vocabulary."""
    return {
        "reverse": (lib.make_reverse(rasp.tokens), {"1", "2", "3"}),
        "xproportion": (
            lib.make_frac_prevs(rasp.tokens == "x"),
            {"w", "x", "y", "z"},
        ),
    }


def compiled(program: Any, vocabulary: set[str]) -> dict[str, np.ndarray]:
    """The arrays of a compiled program, all inputs up to the longest, and what tracr's
    own transformer makes of them.

    Attention is not causal, keys are scaled by the square root of their size, and MLPs
    have one hidden layer with a ReLU; all biases are zero and left out.
    """
    model = compiling.compile_rasp_to_model(
        program,
        vocab=vocabulary,
        max_seq_len=LONGEST,
        compiler_bos=START,
        compiler_pad=PADDING,
    )
    assert model.input_encoder is not None
    codes = model.input_encoder.encoding_map
    names = sorted(codes, key=codes.__getitem__)
    width = len(model.residual_labels)

    def unembed(columns):
        read = model.get_compiled_model().unembed
        return read(columns, use_unembed_argmax=False)

    transformed = haiku.without_apply_rng(haiku.transform(unembed))
    unembedding = np.asarray(transformed.apply({}, jnp.eye(width)))
    unembedding = unembedding.reshape(width, -1)
    found: dict[str, Any] = {
        "vocabulary": names,
        "directions": model.residual_labels,
        "categorical": model.output_encoder.__class__.__name__ == "CategoricalEncoder",
        "tokens": model.params["token_embed"]["embeddings"],
        "positions": model.params["pos_embed"]["embeddings"],
        "output": unembedding,
    }
    config = model.model_config
    for layer in range(config.num_layers):
        at = f"transformer/layer_{layer}"
        for ours, theirs in (
            ("query", "attn/query"),
            ("key", "attn/key"),
            ("value", "attn/value"),
            ("attended", "attn/linear"),
            ("hidden", "mlp/linear_1"),
            ("made", "mlp/linear_2"),
        ):
            stored = model.params[f"{at}/{theirs}"]
            assert not np.any(stored["b"]), "biases of tracr are zero"
            weights = np.asarray(stored["w"])
            if ours in ("query", "key", "value"):
                # Of each head a matrix, with heads first.
                shape = (width, config.num_heads, config.key_size)
                weights = weights.reshape(shape).transpose(1, 0, 2)
            elif ours == "attended":
                weights = weights.reshape(config.num_heads, config.key_size, width)
            found[f"layers.{layer}.{ours}"] = weights
    inputs, outputs = [], []
    words = [codes[name] for name in names if name in vocabulary]
    for length in range(1, LONGEST + 1):
        tokens = np.array([*itertools.product(words, repeat=length)])
        tokens = np.pad(tokens, ((0, 0), (1, 0)), constant_values=codes[START])
        ran = model.forward(model.params, jnp.asarray(tokens))
        made = np.asarray(ran.transformer_output.output) @ unembedding
        beside = ((0, 0), (0, LONGEST - length))
        inputs.append(np.pad(tokens, beside, constant_values=codes[PADDING]))
        outputs.append(np.pad(made, (*beside, (0, 0))))
    found["examples"] = np.concatenate(inputs)
    found["outputs"] = np.concatenate(outputs)
    return {name: small(np.asarray(value)) for name, value in found.items()}


def small(array: np.ndarray) -> np.ndarray:
    """The same in a type that takes less room."""
    kinds = {"f": np.float32, "i": np.int8}
    return array.astype(kinds.get(array.dtype.kind, array.dtype))


if __name__ == "__main__":
    for name, (program, vocabulary) in programs().items():
        # (`savez` names its own first argument `file`, which no array is called.)
        arrays: dict[str, Any] = compiled(program, vocabulary)
        np.savez_compressed(HERE / f"{name}.npz", **arrays)
