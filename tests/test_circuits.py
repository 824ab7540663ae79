"""Circuits of compiled programs: what they are, and that they are found."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import circuits
from experiments.circuits import Config
from experiments.harness import results
from experiments.reports.circuit_graphs import graph, part_of, places_of
from experiments.tasks import compiled
from experiments.tasks.compiled import EDGES, PADDING, START, Edge
from l0jax import apply_gates, units

# The parts that the compiler makes of the operations of each program.
GRAPHS = {
    "reverse": {
        # All attend to all: what the first token gets of it tells the length...
        "tokens → head 0.0 value",
        "head 0.0 → MLP 0",
        "tokens → MLP 0",
        # ... less the index, less 1: that is where to read.
        "MLP 0 → MLP 1",
        "positions → MLP 1",
        "tokens → MLP 1",
        "MLP 1 → MLP 2",
        "MLP 2 → head 3.0 query",
        "positions → head 3.0 key",
        "tokens → head 3.0 value",
        "head 3.0 → output",
    },
    "xproportion": {
        # Whether a token is x, and its mean over all that are not later.
        "tokens → MLP 0",
        "MLP 0 → head 1.0 value",
        "positions → head 1.0 query",
        "positions → head 1.0 key",
        "head 1.0 → output",
    },
}


@pytest.fixture(scope="module", params=compiled.NAMES)
def program(request):
    return compiled.load(request.param)


def words_of(program, codes):
    names = [program.vocabulary[code] for code in codes]
    return [name for name in names if name not in (START, PADDING)]


# -------------------------------------------------------------------- the transformers


def test_with_all_edges_it_is_the_compiled_transformer(program):
    outputs = np.asarray(program.apply(program.params, program.examples))
    apart = abs(outputs - program.outputs)[program.counted]
    assert apart.max() < 1e-5


def test_the_examples_are_all_inputs(program):
    words = {tuple(words_of(program, codes)) for codes in program.examples}
    known = len(program.vocabulary) - 2
    assert len(words) == len(program.examples) == sum(known**n for n in range(1, 6))


def test_it_computes_the_program(program):
    for codes in program.examples[:: len(program.examples) // 60]:
        words = words_of(program, codes)
        assert np.array_equal(program.encode(words), codes)
        if program.name == "reverse":
            assert program.run(words) == words[::-1]
        else:
            right = np.cumsum(np.array(words) == "x") / np.arange(1, 1 + len(words))
            assert program.run(words) == pytest.approx(right, abs=1e-5)


def test_each_edge_is_one_entry_that_carries_what_its_sender_writes(program):
    assert len(set(program.edges)) == len(program.edges) == program.there.sum()
    for number, edge in enumerate(program.edges):
        z = jnp.ones(len(program.edges)).at[number].set(0)
        gated = apply_gates(program.params, {EDGES: z}, {EDGES: program.group})
        row = program.receivers.index(edge.receiver)
        column = program.senders.index(edge.sender)
        expected = program.there.astype(np.float32)
        expected[row, column] = 0
        assert np.array_equal(gated[EDGES], expected)
    units.check(program.params, {EDGES: program.group})


def test_entries_that_stand_for_no_edge_are_not_read(program):
    params = program.params
    later = {**params, EDGES: np.where(program.there, params[EDGES], np.nan)}
    outputs = program.apply(later, program.examples[-8:])
    assert np.array_equal(outputs, program.apply(params, program.examples[-8:]))


def test_heads_of_a_layer_do_not_read_one_another(program):
    """Each head as two that write half of it each: the same, with other edges."""
    weights = {
        name: np.concatenate([array, array]) if array.ndim == 3 else array
        for name, array in program.weights.items()
    }
    for name in weights:
        if name.endswith(".attended"):
            weights[name] = weights[name] / 2
    two = dataclasses.replace(program, weights=weights)
    assert two.heads == 2
    outputs = np.asarray(two.apply(two.params, two.examples))
    assert abs(outputs - two.outputs)[two.counted].max() < 1e-5
    last = f"head {two.layers - 1}."
    assert Edge(last + "0", "output") in two.edges
    for edge in two.edges:
        begins, ends = edge.sender.split(".")[0], part_of(edge.receiver).split(".")[0]
        assert begins != ends, str(edge)


# ------------------------------------------------------------------ the known graphs


def test_the_known_graph_is_that_of_the_program(program):
    needed = {str(program.edges[at]) for at in np.flatnonzero(program.needed)}
    assert needed == GRAPHS[program.name]


def test_the_known_graph_alone_computes_the_program_and_no_edge_of_it_may_go(program):
    assert program.same(program.needed[None]).all()
    fewer = np.tile(program.needed, (program.needed.sum(), 1))
    fewer[np.arange(len(fewer)), np.flatnonzero(program.needed)] = False
    assert not program.same(fewer).any()


def test_edges_that_are_not_wired_never_matter(program):
    rng = np.random.default_rng(0)
    for _ in range(5):
        some = rng.random(len(program.edges)) < 0.7
        few = some & program.wired
        one, other = (
            program.apply({**program.params, EDGES: program.adjacency(each)}, inputs)
            for each, inputs in ((some, program.examples), (few, program.examples))
        )
        assert np.array_equal(one, other)


@pytest.mark.slow
def test_no_other_circuit_computes_the_program(program):
    """Of all sets of edges exactly those do that hold the known graph."""
    wired = np.flatnonzero(program.wired)
    sets = np.zeros((2 ** len(wired), len(program.edges)), bool)
    sets[:, wired] = np.arange(len(sets))[:, None] >> np.arange(len(wired)) & 1
    # What is wrong somewhere is mostly wrong on one in eight inputs.
    few = dataclasses.replace(
        program, examples=program.examples[::8], outputs=program.outputs[::8]
    )
    good = few.same(sets).copy()
    good[good] = program.same(sets[good])
    assert np.array_equal(good, sets[:, program.needed].all(axis=1))


def test_what_is_needed_is_read_from_the_weights():
    """Another program, whose value is not read, needs fewer edges."""
    program = compiled.load("xproportion")
    weights = dict(program.weights)
    weights["layers.1.value"] = np.zeros_like(weights["layers.1.value"])
    outputs = np.zeros_like(program.outputs)
    idle = dataclasses.replace(program, weights=weights, outputs=outputs)
    assert not idle.needed.any()
    assert idle.wired.sum() == program.wired.sum() - 1


# ---------------------------------------------------------------------- what is found


@pytest.mark.slow
def test_both_circuits_are_found_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(circuits, "RESULTS", tmp_path / "results")
    config = Config(out=tmp_path / "run", record=True, progress=False)
    found = circuits.main(config)
    assert [line["task"] for line in found] == [*compiled.NAMES]
    for line in found:
        assert line["missing"] == line["superfluous"] == []
        assert set(line["found"]) == set(line["needed"]) == GRAPHS[line["task"]]
        assert line["same outputs"]
        picture = tmp_path / "run" / f"{line['task']}-0.png"
        assert picture.stat().st_size > 10_000
        assert (circuits.RESULTS / f"{line['task']}.png").exists()
    for folder in (config.out, circuits.RESULTS):
        there = results.read(folder)
        assert [line["found"] for line in there] == [line["found"] for line in found]
    assert len(circuits.table(found).splitlines()) == 2 + len(found)
    assert circuits.wrong(found) == ""


def test_at_too_high_a_price_nothing_is_found(tmp_path, monkeypatch, capsys):
    argv = ["circuits", "--programs", "xproportion", "--price", "10", "--epochs", "15"]
    argv += ["--out", str(tmp_path), "--no-progress"]
    monkeypatch.setattr(sys, "argv", argv)
    circuits.cli()
    said = capsys.readouterr().out
    assert "| xproportion | 32 | 5 | 0.00 | 5.00 | 0.00 | 0 of 1 |" in said
    assert "xproportion, seed 0: MLP 0 → head 1.0 value is missing" in said


def test_only_gates_are_trained():
    program = compiled.load("xproportion")
    training = circuits.training_of(Config(), program)
    state = training.start(jax.random.key(0))
    batch = program.examples[:8], program.outputs[:8], program.counted[:8] * 1.0
    before = jax.device_get(state.gates)
    after, _ = training.step(state, batch)
    for path, array in units.arrays(program.params).items():
        assert np.array_equal(units.arrays(after.params)[path], array), path
    assert not np.array_equal(after.gates["logits"][EDGES], before["logits"][EDGES])


def test_the_loss_is_zero_for_the_whole_transformer_alone(program):
    loss = circuits.loss_of(program)
    batch = program.examples, program.outputs, program.counted * 1.0

    def value(kept):
        params = {**program.params, EDGES: program.adjacency(kept)}
        return loss(lambda tokens: program.apply(params, tokens), batch)[0]

    everything = np.ones(len(program.edges), bool)
    assert value(everything) == pytest.approx(0, abs=1e-6)
    for at in np.flatnonzero(program.needed):
        assert value(everything & (np.arange(len(everything)) != at)) > 1e-3


# ----------------------------------------------------------------------- the picture


def test_the_picture_tells_edges_apart(program):
    needed = [program.edges[at] for at in np.flatnonzero(program.needed)]
    more = next(e for e in program.edges if e not in needed)
    figure = graph(program, [*needed[1:], more], "title")
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    others = len(program.edges) - len(needed) - 1
    assert [text.get_text() for text in legend.get_texts()] == [
        f"removed: {others}",
        f"kept: {len(needed) - 1}",
        "missing: 1",
        "superfluous: 1",
    ]
    places = places_of(program)
    assert len(set(places.values())) == len(places)
    assert {part_of(edge.receiver) for edge in program.edges} <= set(places)


# ------------------------------------------------------------------- what is refused


def test_what_is_no_program_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown program 'sort'; there is reverse, x"):
        compiled.load("sort")
    for changes, words in (
        ({"programs": ("sort",)}, "unknown program 'sort'; there is reverse, x"),
        ({"seeds": ()}, "at least one program and one seed"),
        ({"programs": ()}, "at least one program and one seed"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 2000}, "more than the 363 training examples"),
        ({"price": -1.0}, "must be >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=words):
            circuits.main(Config(**{"out": tmp_path / "x", **changes}))
    assert not (tmp_path / "x").exists()


def test_what_is_no_token_is_refused(program):
    known = "1, 2, 3" if program.name == "reverse" else "w, x, y, z"
    for word in ("a", START, PADDING):
        message = f"'{word}' is no token of {program.name}; there is {known}"
        with pytest.raises(ValueError, match=message):
            program.run([known[0], word])
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"reads 1 to 5 tokens, got {count}"):
            program.encode([known[0]] * count)


def test_an_edge_is_a_line():
    assert str(Edge("tokens", "head 0.0 query")) == "tokens → head 0.0 query"
