"""The Flax adapters: one suite for both, over a dense and a convolutional network.

What differs between NNX and Linen is confined to the two classes at the top.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from retraces import traced_once

import l0jax
import l0jax.linen
import l0jax.nnx
from l0jax import gates, gating, units
from l0jax.units import Group, Slot

GATE = gates.HardConcrete()
KEEP_PROB = 0.7
GROUPS = {
    "mlp": {
        "input": Group("input", 6, (Slot("dense1.kernel", 0),)),
        "hidden": Group(
            "hidden",
            5,
            (Slot("dense2.kernel", 0),),
            (Slot("dense1.kernel", 1), Slot("dense1.bias", 0)),
        ),
    },
    "conv": {
        "maps": Group(
            "maps",
            4,
            (Slot("dense.kernel", 0, tuple(j % 4 for j in range(36))),),
            (
                Slot("conv.kernel", 3),
                Slot("conv.bias", 0),
                Slot("norm.scale", 0),
                Slot("norm.bias", 0),
            ),
        ),
    },
}
SHAPES = {"mlp": (6,), "conv": (3, 3, 2)}


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.dense1 = nnx.Linear(6, 5, rngs=rngs)
        self.dense2 = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, train=False):
        return self.dense2(jax.nn.relu(self.dense1(x)))


class NNXConv(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dense = nnx.Linear(36, 3, rngs=rngs)

    def __call__(self, x, train=False):
        x = jax.nn.relu(self.norm(self.conv(x), use_running_average=not train))
        return self.dense(x.reshape(x.shape[0], -1))


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.relu(linen.Dense(5, name="dense1")(x))
        return linen.Dense(3, name="dense2")(x)


class LinenConv(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Conv(4, (3, 3), name="conv")(x)
        x = linen.BatchNorm(use_running_average=not train, name="norm")(x)
        return linen.Dense(3, name="dense")(linen.relu(x).reshape(x.shape[0], -1))


class InNNX:
    """Variables are the states of the network: parameters, logits, all the rest."""

    modules = {"mlp": NNXMLP, "conv": NNXConv}  # noqa: RUF012

    def __init__(self, kind, groups=None, keep_prob=KEEP_PROB, gate=GATE):
        self.module = self.modules[kind](nnx.Rngs(3))
        self.net = l0jax.nnx.Gated(
            self.module,
            gate,
            GROUPS[kind] if groups is None else groups,
            keep_prob,
            rngs=nnx.Rngs(gates=5),
        )
        self.graph, *self.variables = nnx.split(
            self.net, l0jax.nnx.GateLogits, nnx.Param, ...
        )
        self.trained = [0, 1]

    def bare(self):
        return nnx.state(type(self.module)(nnx.Rngs(3)), nnx.Param)

    def bare_call(self, params, x, train):
        graph, _, rest = nnx.split(self.module, nnx.Param, ...)
        module = nnx.merge(graph, params, rest, copy=True)
        outputs = module(x, train)
        return outputs, nnx.state(module, nnx.BatchStat)

    def call(self, variables, x, **how):
        # Without a copy, the network would write into `variables` themselves.
        net = nnx.merge(self.graph, *variables, copy=True)
        outputs = net(x, **how)
        return outputs, list(nnx.split(net, l0jax.nnx.GateLogits, nnx.Param, ...)[1:])

    def params(self, variables):
        return variables[1]["module"]

    def logits(self, variables):
        return nnx.merge(self.graph, *variables).log_odds

    def statistics(self, variables):
        net = nnx.merge(self.graph, *variables)
        return nnx.state(net.module, nnx.BatchStat)

    def prob_active(self, variables):
        return nnx.merge(self.graph, *variables).prob_active()


class InLinen:
    """Variables are the collections: params, gates, batch_stats."""

    modules = {"mlp": LinenMLP, "conv": LinenConv}  # noqa: RUF012

    def __init__(self, kind, groups=None, keep_prob=KEEP_PROB, gate=GATE):
        self.module = self.modules[kind]()
        self.x = jnp.ones((2, *SHAPES[kind]))
        self.net = l0jax.linen.Gated(
            self.module, gate, GROUPS[kind] if groups is None else groups, keep_prob
        )
        self.variables = self.net.init(
            {"params": jax.random.key(3), "gates": jax.random.key(5)},
            self.x,
            rule="paper",
        )
        self.trained = ["params", "gates"]

    def bare(self):
        return self.module.init({"params": jax.random.key(3)}, self.x)["params"]

    def bare_call(self, params, x, train):
        outputs, written = self.module.apply(
            {**self.variables, "params": params}, x, train, mutable=["batch_stats"]
        )
        return outputs, written.get("batch_stats", {})

    def call(self, variables, x, **how):
        outputs, written = self.net.apply(variables, x, mutable=["batch_stats"], **how)
        return outputs, {**variables, **written}

    def params(self, variables):
        return variables["params"]

    def logits(self, variables):
        return variables["gates"]["log_odds"]

    def statistics(self, variables):
        return variables.get("batch_stats", {})

    def prob_active(self, variables):
        return l0jax.linen.prob_active(GATE, variables)


APIS = {"nnx": InNNX, "linen": InLinen}
CASES = [(api, kind) for api in APIS for kind in GROUPS]
both = pytest.mark.parametrize(("api", "kind"), CASES)
either = pytest.mark.parametrize("api", APIS)
make = functools.cache(lambda api, kind: APIS[api](kind))


def inputs(kind, seed=0, batch=8):
    shape = (batch, *SHAPES[kind])
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def same(found, expected):
    found, expected = units.arrays(found), units.arrays(expected)
    assert list(found) == list(expected)
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.sweep
@both
def test_paths_and_initial_values_are_those_of_the_bare_module(api, kind):
    case = make(api, kind)
    same(case.params(case.variables), case.bare())
    units.check(case.bare(), GROUPS[kind])


@both
def test_initial_logits_follow_keep_prob(api, kind):
    names = list(GROUPS[kind])
    each = {name: 0.2 + 0.3 * i for i, name in enumerate(names)}
    for keep_prob in (KEEP_PROB, each):
        case = APIS[api](kind, keep_prob=keep_prob)
        logits = case.logits(case.variables)
        assert sorted(logits) == sorted(names)
        for name, values in logits.items():
            p = keep_prob[name] if isinstance(keep_prob, dict) else keep_prob
            assert values.shape == (GROUPS[kind][name].size,)
            assert values.dtype == jnp.float32
            # Six standard deviations of the initial values.
            np.testing.assert_allclose(values, np.log(p / (1 - p)), atol=0.06)


@pytest.mark.sweep
@both
def test_calls_never_write_parameters_or_logits(api, kind):
    case = make(api, kind)
    variables = case.variables
    for how in ({"key": jax.random.key(1)}, {"rule": "paper"}):
        for train in (False, True):
            _, variables = case.call(variables, inputs(kind), train=train, **how)
            same(case.params(variables), case.params(case.variables))
            same(case.logits(variables), case.logits(case.variables))


@pytest.mark.parametrize("kind", GROUPS)
def test_an_nnx_module_is_not_written_in_place(kind):
    case = InNNX(kind)
    before = jax.tree.map(np.asarray, nnx.state(case.module, nnx.Param))
    assert case.net.module is case.module
    for _ in range(2):
        case.net(inputs(kind), key=jax.random.key(0), train=True)
    same(nnx.state(case.module, nnx.Param), before)
    if kind == "conv":
        assert np.abs(case.module.norm.mean[...]).max() > 0, "statistics are its own"


@pytest.mark.sweep
@both
def test_gates_are_those_of_the_functional_core(api, kind):
    """A gated call is the bare module under `apply_gates`, whatever sets the gates."""
    case = make(api, kind)
    params, logits = case.params(case.variables), case.logits(case.variables)
    key = jax.random.key(7)
    drawn = gating.sample(key, GATE, logits)
    hows = [({"key": key}, drawn)]
    hows += [
        ({"rule": rule}, gating.deterministic(GATE, logits, rule))
        for rule in GATE.rules
    ]
    for train in (False, True):
        for how, z in hows:
            found, _ = case.call(case.variables, inputs(kind), train=train, **how)
            gated = units.apply_gates(params, z, GROUPS[kind])
            expected, _ = case.bare_call(gated, inputs(kind), train)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    bare, _ = case.bare_call(params, inputs(kind), False)
    gated, _ = case.call(case.variables, inputs(kind), key=key)
    assert np.abs(gated - bare).max() > 1e-3
    other, _ = case.call(case.variables, inputs(kind), key=jax.random.key(8))
    assert not np.array_equal(gated, other)


FAMILIES = {name: family() for name, family in gates.GATES.items()}
FAMILIES |= {f"mixture-{n}": gates.Mixture(pair()) for n, pair in gates.PAIRS.items()}


@pytest.mark.sweep
@either
@pytest.mark.parametrize("gate", FAMILIES.values(), ids=list(FAMILIES))
def test_logits_of_every_family_are_trained(api, gate):
    """Law 6, of gates that start where none is shut for good."""
    moves_every_one(api, "mlp", APIS[api]("mlp", keep_prob=0.6, gate=gate))


@pytest.mark.sweep
@both
def test_logits_are_trained_with_the_parameters(api, kind):
    """Law 6: a step of plain gradient descent under `jax.jit` moves every one."""
    moves_every_one(api, kind, make(api, kind))


def moves_every_one(api, kind, case):

    def split(variables):
        trained = {i: variables[i] for i in case.trained}
        if api == "linen":
            return trained, {k: v for k, v in variables.items() if k not in trained}
        return trained, {2: variables[2]}

    @jax.jit
    @traced_once
    def gradient(trained, rest, key):
        def loss(trained):
            whole = {**trained, **rest}
            variables = whole if api == "linen" else [whole[i] for i in range(3)]
            outputs, _ = case.call(variables, inputs(kind), key=key, train=True)
            return jnp.square(outputs - 1).mean()

        return jax.grad(loss)(trained)

    trained, rest = split(case.variables)
    total = jax.tree.map(jnp.zeros_like, trained)
    for seed in range(64):
        # A gate that is clipped in one draw has no gradient there.
        slope = gradient(trained, rest, jax.random.key(seed))
        total = jax.tree.map(lambda a, b: a + jnp.abs(b), total, slope)
    whole = {**total, **rest}
    moved = whole if api == "linen" else [whole[i] for i in range(3)]
    for name, values in case.logits(moved).items():
        assert (values > 0).all(), name
    for path, values in units.arrays(case.params(moved)).items():
        if path != "conv.bias":  # batch norm takes it out
            assert (values > 0).any(), path


def test_nnx_logits_are_parameters_of_a_type_of_their_own():
    net = make("nnx", "mlp").net
    everything = units.arrays(nnx.state(net, nnx.Param))
    logits = units.arrays(nnx.state(net, l0jax.nnx.GateLogits))
    assert sorted(logits) == ["logits.hidden", "logits.input"]
    assert set(logits) < set(everything)
    assert net.groups == GROUPS["mlp"]


@both
def test_exactly_one_of_key_and_rule_is_given(api, kind):
    case = make(api, kind)
    for how, given in (
        ({}, "neither"),
        ({"key": jax.random.key(0), "rule": "paper"}, "both"),
    ):
        with pytest.raises(ValueError, match=rf"key=.*rule=.*got {given}") as error:
            case.call(case.variables, inputs(kind), **how)
        assert all(rule in str(error.value) for rule in GATE.rules)
    with pytest.raises(ValueError, match="'often'"):
        case.call(case.variables, inputs(kind), rule="often")


@either
def test_running_statistics_are_updated_and_kept(api):
    """They are those of the bare module: its gates come after the norm."""
    case = make(api, "conv")
    variables, params = case.variables, case.params(case.variables)
    _, at_test = case.call(variables, inputs("conv"), rule="paper")
    same(case.statistics(at_test), case.statistics(variables))
    _, once = case.call(variables, inputs("conv"), key=jax.random.key(0), train=True)
    _, expected = case.bare_call(params, inputs("conv"), True)
    first, fresh = (units.arrays(case.statistics(v)) for v in (once, variables))
    assert len(first) == 2
    for path, array in units.arrays(expected).items():
        np.testing.assert_allclose(first[path], array, rtol=1e-5, atol=1e-6)
        assert not np.allclose(array, fresh[path])
    _, twice = case.call(once, inputs("conv", 1), key=jax.random.key(0), train=True)
    for path, array in units.arrays(case.statistics(twice)).items():
        assert not np.allclose(array, first[path])


@pytest.mark.sweep
@both
def test_repeated_calls_share_one_trace(api, kind):
    traces = []

    @jax.jit
    def call(variables, x, key):
        traces.append(1)
        return case.call(variables, x, key=key, train=True)

    outputs = []
    for seed in range(3):
        case = APIS[api](kind)
        variables = case.variables
        for step in range(2):
            key = jax.random.fold_in(jax.random.key(seed), step)
            result, variables = call(variables, inputs(kind, seed), key)
            outputs.append(np.asarray(result))
    assert len(traces) == 1
    assert not np.array_equal(outputs[0], outputs[1])


@both
def test_prob_active_is_that_of_the_logits(api, kind):
    case = make(api, kind)
    expected = gating.prob_active(GATE, case.logits(case.variables))
    same(case.prob_active(case.variables), expected)


@either
@pytest.mark.parametrize(
    ("slot", "words"),
    [
        (Slot("dense9.kernel", 0), ["'dense9.kernel'", "dense1.kernel"]),
        (Slot("dense1.kernel", 1), ["'dense1.kernel'", "5 positions", "describes 6"]),
    ],
)
def test_groups_that_do_not_fit_are_refused(api, slot, words):
    with pytest.raises(ValueError, match="'input'") as error:
        APIS[api]("mlp", {"input": Group("input", 6, (slot,))})
    assert all(word in str(error.value) for word in words)


@either
def test_keep_probabilities_of_other_groups_are_refused(api):
    with pytest.raises(ValueError, match="keep_prob is given for maps") as error:
        APIS[api]("mlp", keep_prob={"maps": 0.5})
    assert "input, hidden" in str(error.value)


@pytest.mark.parametrize("streams", [{"params": 0}, {"params": 0, "dropout": 1}])
def test_linen_asks_for_the_stream_of_gates(streams):
    net = l0jax.linen.Gated(LinenMLP(), GATE, GROUPS["mlp"])
    keys = {name: jax.random.key(seed) for name, seed in streams.items()}
    with pytest.raises(ValueError, match="random stream for the gates"):
        net.init(keys, inputs("mlp"), rule="paper")


def test_nnx_keeps_what_a_call_writes_beside_the_parameters():
    """Dropout under fixed gates still draws anew at every call."""

    class Dropped(NNXMLP):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dense2(self.dropout(jax.nn.relu(self.dense1(x))))

    net = l0jax.nnx.Gated(
        Dropped(nnx.Rngs(0)), GATE, GROUPS["mlp"], rngs=nnx.Rngs(gates=1)
    )
    one, other = (net(inputs("mlp"), rule="mean") for _ in range(2))
    assert not np.array_equal(one, other)


def test_nnx_fold_and_shrink_leave_the_module_alone():
    case = InNNX("conv")
    before = jax.tree.map(np.asarray, nnx.state(case.module))
    z = case.net.gates(rule="paper")
    folded = l0jax.nnx.fold(case.module, z, GROUPS["conv"])
    keep = {"maps": np.array([True, False, True, False])}
    maps = GROUPS["conv"]["maps"]
    statistics = (Slot("norm.mean", 0), Slot("norm.var", 0))
    whole = dataclasses.replace(maps, made_by=maps.made_by + statistics)
    small = l0jax.nnx.shrink(case.module, keep, {"maps": whole})
    same(nnx.state(case.module), before)
    np.testing.assert_allclose(
        folded(inputs("conv")), case.net(inputs("conv"), rule="paper"), rtol=1e-5
    )
    folded(inputs("conv"), train=True)
    small(inputs("conv"), train=True)
    same(nnx.state(case.module), before)
    assert type(small) is type(case.module)
    assert small.conv.kernel.shape == (3, 3, 2, 2)
    assert small.dense.kernel.shape == (18, 3)


# ------------------------------------------------------- groups that `trace` has found


class Convolutions(nnx.Module):
    """Every kind of layer whose module remembers sizes."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.depth = nnx.Conv(8, 16, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.grouped = nnx.Conv(16, 12, (3, 3), feature_group_count=4, rngs=rngs)
        self.groups = nnx.GroupNorm(12, num_groups=4, rngs=rngs)
        self.up = nnx.ConvTranspose(12, 6, (2, 2), strides=(2, 2), rngs=rngs)
        self.dense = nnx.Linear(6, 5, rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.depth(self.stem(x))))
        x = self.up(self.groups(self.grouped(x)))
        return self.head(jax.nn.relu(self.dense(x.mean((1, 2)))))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 6, decode=False, rngs=rngs)
        self.rnn = nnx.RNN(nnx.LSTMCell(6, 5, rngs=rngs))
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.rnn(self.attention(self.embed(tokens)))[:, -1])


TRACED = {
    # A group norm takes the mean over the channels of a group that are left.
    "convolutions": (Convolutions, lambda: inputs("images"), ("groups",)),
    # The scale of an attention is computed from the size of its heads.
    "attention": (Attention, lambda: jnp.arange(8).reshape(2, 4) % 7, ("key", "value")),
}
SHAPES["images"] = (6, 6, 2)


@pytest.fixture
def any_rank():
    """Flax's own layers add vectors to matrices."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def keep_most(structure, left_alone):
    """All but the second unit of each group, of those that are not left alone."""
    return {
        name: np.arange(group.size) != 1
        for name, group in structure.groups.items()
        if group.size > 1 and name not in structure.inputs
        if not any(word in name.split(":")[0].split(".") for word in left_alone)
    }


@pytest.mark.usefixtures("any_rank")
@pytest.mark.parametrize("kind", TRACED)
def test_nnx_modules_shrink_by_what_was_traced_and_say_so(kind):
    make, example, left_alone = TRACED[kind]
    module, x = make(nnx.Rngs(0)), example()
    structure = l0jax.trace(module, x)
    keep = keep_most(structure, left_alone)
    # Heads are named after the key layer too.
    if kind == "attention":
        heads = next(n for n, g in structure.groups.items() if g.size == 3)
        keep[heads] = np.array([True, False, True])
    assert keep
    z = {name: jnp.float32(flags) for name, flags in keep.items()}
    folded = l0jax.nnx.fold(module, z, structure.groups)
    small = l0jax.nnx.shrink(folded, keep, structure)
    expected, found = folded(x), small(x)
    scale = float(abs(expected).max())
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)
    assert type(small) is make
    # What the modules remember is what their arrays are.
    for _, layer in nnx.iter_modules(small):
        if isinstance(layer, nnx.Linear):
            assert layer.kernel.shape == (layer.in_features, layer.out_features)
        if isinstance(layer, nnx.Conv):
            inside = layer.in_features // layer.feature_group_count
            assert layer.kernel.shape == layer.kernel_shape
            assert layer.kernel.shape[-2:] == (inside, layer.out_features)
        if isinstance(layer, nnx.BatchNorm):
            assert layer.mean.shape == (layer.num_features,)
        if isinstance(layer, nnx.GroupNorm):
            assert layer.scale.shape == (layer.num_groups * layer.group_size,)
        if isinstance(layer, nnx.MultiHeadAttention):
            assert layer.query.kernel.shape[1:] == (layer.num_heads, layer.head_dim)
        if isinstance(layer, nnx.LSTMCell):
            assert layer.hi.kernel.shape[0] == layer.hidden_features
    # The module itself is as it was.
    same(nnx.state(module, nnx.Param), nnx.state(make(nnx.Rngs(0)), nnx.Param))


@pytest.mark.usefixtures("any_rank")
def test_a_module_that_is_another_function_when_smaller_is_refused():
    class Scaled(nnx.Module):
        """Divides by the number of its units."""

        def __init__(self, rngs):
            self.one = nnx.Linear(3, 4, rngs=rngs)
            self.two = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.two(self.one(x) / self.one.kernel.shape[1])

    module = Scaled(nnx.Rngs(0))
    structure = l0jax.trace(module, jnp.ones((2, 3)))
    keep = {"one": np.array([True, False, True, True])}
    with pytest.raises(ValueError, match="Scaled is another function") as error:
        l0jax.nnx.shrink(module, keep, structure)
    assert "div(3.0)" in str(error.value)
    assert "div(4.0)" in str(error.value)
    assert "l0jax.narrow" in str(error.value)
    small, params = l0jax.narrow(structure, nnx.state(module), keep)
    z = {"one": jnp.float32(keep["one"])}
    folded = l0jax.nnx.fold(module, z, structure.groups)
    x = inputs("mlp")[:, :3]
    np.testing.assert_allclose(small(params, x), folded(x), rtol=1e-5)


@pytest.mark.sweep
@pytest.mark.usefixtures("any_rank")
@both
def test_both_apis_are_gated_by_what_was_traced(api, kind):
    """The same groups as those that are stated by hand above."""
    x = inputs(kind)
    if api == "nnx":
        module = InNNX.modules[kind](nnx.Rngs(3))
        structure = l0jax.trace(module, x)
    else:
        module = InLinen.modules[kind]()
        variables = module.init(jax.random.key(3), x)
        structure = l0jax.trace(module.apply, variables, x)
    groups = structure.groups
    stated = {slot for group in GROUPS[kind].values() for slot in group.used_by}
    found = {
        dataclasses.replace(slot, path=slot.path.removeprefix("params."))
        for group in groups.values()
        for slot in group.used_by
    }
    assert stated <= found
    case = APIS[api](kind, groups, 0.5)
    logits = case.logits(case.variables)
    assert {name: a.size for name, a in logits.items()} == {
        name: group.size for name, group in groups.items()
    }
    outputs = [
        case.call(case.variables, x, key=jax.random.key(seed), train=False)[0]
        for seed in range(2)
    ]
    assert not np.allclose(*outputs)
