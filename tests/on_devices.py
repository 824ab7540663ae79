"""Programs of the tests on many devices: each prints JSON, once by each process. Also
`ran`, which runs them.

python -m tests.on_devices NAME PORT PROCESSES PROCESS FOLDER
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import l0jax.models
from l0jax import costs, gates, objectives, train, units
from l0jax.train import training as core
from tests import training_models as models
from tests.pipelines import Digits, pipeline

RULES = {
    r"first\.kernel": PartitionSpec(None, "model"),
    r"second\.kernel": PartitionSpec("model", None),
    ".*": "data",
}
OF_DECODER = {
    r".*\.(query|key|value|gate|up)": PartitionSpec("data", "model"),
    r".*\.out": PartitionSpec("model", None, None, "data"),
    r".*\.down": PartitionSpec("model", "data"),
    ".*": "data",
}
STEPS = 60
WEIGHTS = "single weights"


def mesh():
    devices = np.asarray(jax.devices())
    assert len(devices) == 8
    return Mesh(devices.reshape(4, 2), ("data", "model"))


def perceptron(**settings):
    """A training of the perceptron, whose gates close fast. Widths stay multiples of
    4, as they must where arrays are split, so that all ways take out the same units."""
    make, loss = models.MODELS["perceptron"]
    settings = {
        "gate": gates.HardConcrete(),
        "target": train.Target(costs.macs, 0.3, warm_up=STEPS),
        "optimizer": optax.adam(3e-3),
        "gate_optimizer": optax.adam(1e-1),
        "polyak": 0.9,
        "compaction": train.Compaction(below=0.95, after=1, at=1.0, round_to=4),
    } | settings
    return train.Training(make(), loss, models.EXAMPLE, **settings)


def of_single_weights(**settings):
    make, _ = models.MODELS["perceptron"]
    model = make()
    structure = l0jax.trace(model, models.EXAMPLE).only()
    for path, leaf in units.arrays(nnx.state(model, nnx.Param)).items():
        if leaf.ndim > 1:
            structure = structure.add(
                units.Group(path, leaf.size, (units.Slot(path, None),))
            )
    return perceptron(
        structure=structure,
        target=train.Target("density", 0.3, warm_up=STEPS),
        charges=objectives.charges_of,
        **settings,
    )


KINDS = {
    "units": perceptron,
    "per example": lambda **on: perceptron(
        gate=train.Learned(gates.HardConcrete(), per_example=True), **on
    ),
    WEIGHTS: of_single_weights,
}
WAYS = {"one device": False, "data": None, "sharded": RULES}


def trained(training, parts=1, part=0):
    """Losses of steps between which units are taken out, and where it all lies."""
    state = training.start(jax.random.key(0))
    losses = []
    for epoch in range(STEPS // 15):
        for batch in models.batches(epoch, size=96):
            batch = jax.tree.map(lambda a: np.split(a, parts)[part], batch)
            state, metrics = training.step(state, batch)
            losses.append(float(metrics["loss"]))
        training, state = training.compact(state)
    return losses, training, state


def trajectories(*_):
    """Of each kind of gates, alone and on a mesh."""
    found = {}
    for kind, make in KINDS.items():
        for way, sharding in WAYS.items():
            on = {} if sharding is False else {"mesh": mesh(), "sharding": sharding}
            losses, training, state = trained(make(**on))
            found[f"{kind}, {way}"] = {
                "losses": losses,
                "widths": [g.size for g in training.structure.groups.values()],
                "spec": str(state.params["first"]["kernel"].sharding.spec)
                if on
                else "",
                "of logits": [
                    str(a.sharding.spec) if on else ""
                    for a in state.gates["logits"].values()
                ],
            }
    return found


def spec_of(array):
    """How it is split, if it lies on a mesh."""
    return str(getattr(array.sharding, "spec", ""))


def collectives(*_):
    """In the compiled steps of a training without gates and of one with gates."""
    found = {}
    for name, how in (("gated", {}), ("plain", {"gate": None, "target": None})):
        training = perceptron(mesh=mesh(), **how)
        state = training.start(jax.random.key(0))
        batch = training.split(next(models.batches(0, size=96)))
        text = core._step.lower(training, state, batch).compile().as_text()
        names = ("all-reduce", "all-gather", "collective-permute", "all-to-all")
        found[name] = {each: text.count(f" {each}(") for each in names}
    return found


def decoder(*_):
    """A language model, alone and on the mesh, through a compaction."""
    found = {}
    tokens = np.random.default_rng(0).integers(0, 30, (STEPS, 16, 17))
    for way in ("alone", "sharded"):
        model = l0jax.models.Decoder(
            30, 32, [(4, 1, 4, 8, 64), (4, 1, 4, 8, 64)], 16, rngs=nnx.Rngs(0)
        )
        on = {"mesh": mesh(), "sharding": OF_DECODER} if way == "sharded" else {}
        structure = l0jax.models.structure(model)
        names = [n for n in structure.groups if n.endswith((".heads", ".hidden"))]
        training = train.Training(
            model,
            loss_of_tokens,
            structure=structure.only(*names),
            gate=gates.HardConcrete(),
            target=train.Target(costs.params, 0.5, warm_up=10),
            optimizer=optax.adam(1e-3),
            gate_optimizer=optax.adam(1e-1),
            compaction=train.Compaction(below=0.5, after=1, at=1.0, round_to=2),
            **on,
        )
        state = training.start(jax.random.key(0))
        losses, widths = [], []
        for at, batch in enumerate(tokens):
            state, metrics = training.step(state, batch.astype(np.int32))
            losses.append(float(metrics["loss"]))
            if at in (30, 45):
                training, state = training.compact(state)
                widths.append([g.size for g in training.structure.groups.values()])
        specs = {
            path: spec_of(leaf) for path, leaf in units.arrays(state.params).items()
        }
        found[way] = {"losses": losses, "widths": widths, "specs": specs}
    return found


def loss_of_tokens(model, batch):
    logits = model(batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return losses.mean(), {}


def processes(folder, parts, part, sharding):
    """A run with all it does: steps over parts of batches, compaction, a checkpoint,
    evaluation, epochs over data that lie on the devices, and its end."""
    whole = perceptron(mesh=mesh(), sharding=sharding)
    losses, training, state = trained(whole, parts, part)
    checkpoints = train.Checkpoints(f"{folder}/{parts}-{bool(sharding)}")
    for done in (1, 2, 3):
        checkpoints.save(done, training, state)
    again, restored, done = checkpoints.restore(whole, jax.random.key(1))
    equal = [
        np.array_equal(*map(np.asarray, pair))
        for pair in zip(
            jax.tree.leaves(training.placement.on_host(state._replace(key=0))),
            jax.tree.leaves(again.placement.on_host(restored._replace(key=0))),
            strict=True,
        )
    ]
    images, labels = models.digits()
    held_out = jax.tree.map(
        lambda a: np.split(a[1500:1796], parts)[part], (images, labels)
    )
    seen = training.evaluate(state, [held_out])
    data, order = (images[:960], labels[:960]), np.arange(960).reshape(10, 96)
    for loop in (False, True):
        state, totals = again.epoch(restored, data, order, loop=loop)
        losses.append(totals.means["loss"])
        restored = state
    small = again.finish(state)
    return {
        "losses": losses,
        "seen": seen,
        "restored": all(equal) and len(equal) > 20,
        "done": done,
        "kept": sorted(checkpoints._files.steps()),
        "sum": float(np.abs(small.first.kernel[...]).sum()),
        "widths": [g.size for g in again.structure.groups.values()],
    }


def replicated(*where):
    """Each device has all parameters."""
    return processes(*where, None)


def sharded(*where):
    """Each has a part of them."""
    return processes(*where, RULES)


def stream(folder, parts, part):
    """A run over a pipeline, of which each process has a part, and how it goes on
    from where it was saved in the middle."""
    images, labels = models.digits()
    source = Digits(images[:960], labels[:960])

    def data():
        return pipeline(source, part=slice(part, None, parts), size=96 // parts)

    def some(training, state, batches, steps):
        """So many steps: the losses, and the labels that this process has seen."""
        losses, seen = [], []
        for batch in batches.take(steps):
            # Devices of the second axis have the same examples.
            there = {str(s.index): s.data for s in batch[1].addressable_shards}
            seen += np.concatenate([*there.values()]).tolist()
            state, metrics = training.step(state, batch)
            losses.append(float(metrics["loss"]))
        return state, losses, seen

    whole = perceptron(mesh=mesh())
    checkpoints = train.Checkpoints(f"{folder}/stream-{parts}")
    with train.Stream(data(), whole) as batches:
        state, *_ = some(whole, whole.start(jax.random.key(0)), batches, 13)
        training, state = whole.compact(state)
        notes = {"stream": batches.get_state()}
        checkpoints.save(13, training, state, notes)
        _, *straight = some(training, state, batches, 17)
    training, state, _ = checkpoints.restore(whole, jax.random.key(1))
    with train.Stream(data(), whole) as batches:
        batches.set_state(checkpoints.notes["stream"])
        _, *resumed = some(training, state, batches, 17)
    # (What each has seen is its own.)
    return {"same": straight == resumed, "losses": resumed[0], "seen": resumed[1]}


def ran(name, folder, processes=1, seconds=300):
    """What a program gave, on eight devices of so many processes."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={8 // processes}"
    begun = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-m", "tests.on_devices", name),
                *(str(port), str(processes), str(at), str(folder)),
            ],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for at in range(processes)
    ]
    found = []
    for process in begun:
        try:
            out, error = process.communicate(timeout=seconds)
        finally:
            for other in begun:
                if process.returncode:
                    other.kill()
        assert process.returncode == 0, error[-3000:]
        found.append(json.loads(out.splitlines()[-1]))
    return found


def apart(a, b):
    return np.abs(np.subtract(a["losses"], b["losses"]))[:50].max()


def main(name, port, of, at, folder):
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    if of > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", of, at)
    assert jax.process_count() == of
    print(json.dumps(globals()[name](folder, of, at)), flush=True)


if __name__ == "__main__":
    name, port, of, at, folder = sys.argv[1:]
    main(name, int(port), int(of), int(at), folder)
