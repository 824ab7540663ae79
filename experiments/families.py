"""Gate families compared: the same network, budget and seeds, a grid of λ for each.

    python -m experiments.families --quick                 # 8x8 digits, 3 minutes
    python -m experiments.families                         # MNIST, MLP: 3 hours
    python -m experiments.families --model lenet5 --families hard_concrete …

All λ and seeds of a family are one compiled program (`l0jax.train.make_sweep`). Every
member becomes a line of `results.csv` for each test-time rule, and a family that is
there is not run again; one that was interrupted goes on from its last checkpoint.
`table.md` and the pictures in `figures` follow from the CSV:
`python -m experiments.family_report FOLDER` makes them again.
"""

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from experiments import mnist
from experiments.harness import command_line, csv_lines, progress, run_folder
from experiments.tasks import data
from l0jax import gates, gating, models, objectives, storage, train, units
from l0jax.estimators import ESTIMATORS

QUICK: dict[str, Any] = {
    **{"dataset": "digits", "lam": (0.03, 0.1), "seeds": 1},
    **{"epochs": 30, "gate_learning_rate": 6e-2},
}
GRADIENT_DRAWS = 32
# What a closed gate of a mixture leaks at the end of the run: its pair is annealed to
# that, so that all pairs end equally sharp, as hard concrete gates that are clamped.
LEAK = 0.047
SAMPLED_NETWORKS = 5

VARIANTS: dict[str, dict[str, Any]] = {
    # name: settings of `experiments.mnist.Config` that make it.
    "hard_concrete": {},
    **{f"mixture-{pair}": {"gate": "mixture", "pair": pair} for pair in gates.PAIRS},
    "relaxed_mixture": {"gate": "relaxed_mixture"},
    "stochastic": {"gate": "stochastic"},
    "hard_kumaraswamy": {"gate": "hard_kumaraswamy"},
    **{
        f"bernoulli-{name}": {"gate": "bernoulli", "estimator": name}
        for name in ESTIMATORS
    },
    "smooth_step": {"gate": "smooth_step"},
    "hard_sigmoid": {"gate": "hard_sigmoid"},
    "continuous_sparsification": {
        "gate": "continuous_sparsification",
        "beta_end": 1 / 200,
    },
    "variational_dropout": {"gate": "variational_dropout"},
    "information_bottleneck": {"gate": "information_bottleneck"},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare gate families on one network."""

    dataset: str = "mnist"
    """a data set of `experiments.mnist`"""
    model: str = "mlp"
    """mlp or lenet5"""
    families: tuple[str, ...] = tuple(VARIANTS)
    """which families"""
    lam: tuple[float, ...] = (0.03, 0.07, 0.15, 0.35)
    """the grid of c in λ = c/N"""
    seeds: int = 3
    """runs for each family and λ, with seeds 0, 1, …"""
    epochs: int = 30
    """passes over the training set; 200 are the papers' and for a GPU"""
    gate_learning_rate: float = 2e-2
    """of Adam, for the gates; of 5e-3 noisy families have most gates undecided after 30
    epochs"""
    checkpoint_every: int = 10
    """epochs between checkpoints"""
    out: Path | None = None
    """folder; None is runs/families-<dataset>-<model>-<digest of the configuration>"""
    progress: bool = True
    """show a progress bar"""


def main(config: Config) -> dict[str, Any]:
    """Runs what is missing; returns the folder and the lines of its CSV."""
    check(config)
    dataset = data.load(config.dataset, mnist.Config.validation)
    settings = {
        name: getattr(config, name)
        for name in ("dataset", "model", "lam", "epochs", "gate_learning_rate")
    }
    name = f"families-{config.dataset}-{config.model}"
    folder = config.out or run_folder.default(name, settings)
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "results.csv")
    wanted = [(lam, seed) for lam in config.lam for seed in range(config.seeds)]
    missing = [name for name in config.families if not results.has(name, wanted)]
    epochs = len(missing) * config.epochs
    bar = progress.bar(epochs, "epoch", show=config.progress)
    for name in missing:
        bar.set_description(name)
        results.add(run(config, name, wanted, dataset, folder, bar))
    bar.close()
    # Imported at the end, when its second no longer delays the first step.
    from experiments import family_report

    family_report.write(folder)
    return {"folder": str(folder), "rows": results.rows()}


def check(config: Config) -> None:
    """Raises ValueError for what can't be run."""
    for name in config.families:
        if name not in VARIANTS:
            known = ", ".join(VARIANTS)
            raise ValueError(f"unknown family {name!r}; there is {known}")
    for name in ("seeds", "epochs", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not config.families or not config.lam:
        raise ValueError("give at least one family and one λ")
    for lam in config.lam:
        if not lam >= 0:
            raise ValueError(f"lam must be >= 0, got {lam}")


# ----------------------------------------------------------------- one family's sweep


class Setting(NamedTuple):
    """One family on the network: everything that its members share."""

    config: mnist.Config
    gate: gates.Gate
    network: mnist.Network
    dataset: data.Dataset
    steps: int

    def minimised(self, lam) -> dict[str, Any]:
        """The arguments of `train.make_total` at a λ."""
        return mnist.minimised(
            self.config, self.gate, self.network, self.network, self.dataset, (lam,)
        )


def run(
    config: Config,
    name: str,
    wanted: list[tuple[float, int]],
    dataset: data.Dataset,
    folder: Path,
    bar: tqdm,
) -> list[dict[str, Any]]:
    """Trains all members of one family; the lines of the CSV that they become."""
    setting = setting_of(config, name, dataset)
    once = mnist.optimizer_of(setting.config, setting.steps)

    def member(lam):
        return train.make_step(
            **setting.minimised(lam), optimizer=once, polyak=setting.config.polyak
        )

    batch_size = setting.config.batch_size
    examples = len(dataset.train.labels)
    roots = [jax.random.key(seed) for _, seed in wanted]
    states = train.stack(
        [train.init(initial(setting, key), once) for key in roots],
    )
    training = jax.tree.map(jnp.asarray, (dataset.train.images, dataset.train.labels))
    batch = jax.tree.map(lambda a: a[:batch_size], training)
    lams = jnp.asarray([lam for lam, _ in wanted], jnp.float32)
    devices = devices_for(len(wanted))
    sweep = train.make_sweep(member, devices=devices)
    empty = train.no_totals(
        member(lams[0]), train.member_of(states, 0), batch, roots[0]
    )

    checkpoints = storage.Checkpoints(folder / "checkpoints" / f"{name}-{len(wanted)}")
    first, fastest, variance = 1, math.inf, []
    found = checkpoints.restore(lambda _: states, tqdm.write)
    if found is not None:
        first, states = found[0] + 1, found[1]
        fastest, variance = found[2]["fastest"], found[2]["variance"]
        bar.update(first - 1)
    keys = jnp.stack(roots)
    for epoch in range(first, config.epochs + 1):
        begun = time.perf_counter()
        orders = jnp.stack(
            [train.order_of_epoch(k, epoch, examples, batch_size) for k in roots]
        )
        totals = train.stack([empty] * len(wanted))
        states, totals = sweep(lams, states, totals, training, orders, keys)
        loss = np.asarray(totals.sums["loss"] / totals.steps)
        # (The first one compiles, and whatever else runs on the machine slows some.)
        fastest = min(fastest, time.perf_counter() - begun)
        if epoch == max(config.epochs // 4, 1):
            variance = gradient_variances(setting, states, lams, batch)
        bar.set_postfix_str(f"loss {np.nanmin(loss):.3f} to {np.nanmax(loss):.3f}")
        bar.update()
        if epoch % config.checkpoint_every == 0 or epoch == config.epochs:
            notes = {"fastest": fastest, "variance": variance}
            checkpoints.save(epoch, states, notes)
    milliseconds = 1e3 * fastest / (setting.steps // config.epochs) / len(wanted)
    evaluate = evaluation(setting)
    lines = []
    # A member taken out on the devices makes them meet, and they wait for one that is
    # still busy with the member before for 40 seconds at most.
    states = jax.device_get(states)
    for at, (lam, seed) in enumerate(wanted):
        state = train.member_of(states, at)
        for line in evaluate(state, jax.random.key(seed)):
            line |= {
                "dataset": config.dataset,
                "model": config.model,
                "family": name,
                "lam": lam,
                "seed": seed,
                "epochs": config.epochs,
                "gradient_variance": variance[at],
                "step_ms": milliseconds,
            }
            lines.append(line)
    return lines


def setting_of(config: Config, name: str, dataset: data.Dataset) -> Setting:
    """A family on the network of the comparison."""
    its = mnist.Config(
        dataset=config.dataset,
        model=config.model,
        epochs=config.epochs,
        gate_learning_rate=config.gate_learning_rate,
        compact=False,
        **VARIANTS[name],
    )
    gate = mnist.check(its)
    if isinstance(gate, gates.Mixture):
        its = dataclasses.replace(its, beta_end=gate.scale_at_leak(LEAK))
    shape = dataset.train.images.shape[1:]
    widths = mnist.architecture(its.model, shape, dataset.classes)
    network = mnist.network(its, models.make(its.model, widths, rngs=nnx.Rngs(0)))
    steps = len(dataset.train.labels) // its.batch_size * its.epochs
    return Setting(its, gate, network, dataset, steps)


def initial(setting: Setting, key: jax.Array) -> train.Theta:
    """Weights and logits of one seed, those that `experiments.mnist` starts with."""
    its, groups = setting.config, setting.network.gated
    shape = setting.dataset.train.images.shape[1:]
    widths = mnist.architecture(its.model, shape, setting.dataset.classes)
    rngs = nnx.Rngs(gating.key_for(key, "params"))
    model = models.make(its.model, widths, rngs=rngs)
    keep_prob = mnist.keep_probabilities(its, groups)
    keep_prob = mnist.per_layer("keep_prob", keep_prob, groups)
    return {
        "params": nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        "gates": gating.init(
            gating.key_for(key, "gates"), setting.gate, groups, keep_prob
        ),
    }


def devices_for(members: int) -> list[jax.Device]:
    """As many devices as share the members evenly."""
    devices = jax.devices()
    return devices[: max(n for n in range(1, len(devices) + 1) if members % n == 0)]


def gradient_variances(
    setting: Setting, states: train.State, lams: jax.Array, batch
) -> list[float]:
    """Of each member: the variance over draws of the gates of the derivative of the
    loss in a logit, at one batch; the mean over all logits."""

    @jax.jit
    def variance(state, lam, keys):
        total = train.make_total(**setting.minimised(lam))

        def slopes(key):
            return jax.grad(total, has_aux=True)(state.theta, state, batch, key)[0]

        found = jax.lax.map(lambda key: slopes(key)["gates"], keys)
        variances = [jnp.var(g, axis=0, ddof=1) for g in found.values()]
        return jnp.concatenate(variances).mean()

    keys = jax.random.split(jax.random.key(0), GRADIENT_DRAWS)
    states = jax.device_get(states)
    return [
        float(variance(train.member_of(states, at), lam, keys))
        for at, lam in enumerate(lams)
    ]


# --------------------------------------------------------------------------- evaluation


def evaluation(setting: Setting):
    """A function from a member's state to its lines, one for each test-time rule."""
    its, gate, now = setting.config, setting.gate, setting.network
    compiled = mnist.compile_for(
        its, gate, now, now, setting.dataset, mnist.optimizer_of(its, setting.steps)
    )
    temperature = mnist.temperature_schedule(its, gate, setting.steps)
    dense = mnist.to_floats(jax.device_get(compiled.count({})))
    sizes = objectives.sizes(
        nnx.state(now.model, nnx.Param), now.gated, mnist.charges_of(its, now)
    )
    sizes = {name: np.asarray(each) for name, each in sizes.items()}

    def theta_of(state):
        theta = train.averaged(state, its.polyak)
        return theta, train.gate_at(gate, temperature, state.step, theta)

    @jax.jit
    def facts(state, keys):
        theta, at = theta_of(state)
        logits = theta["gates"]
        return {
            "params": theta["params"],
            "active": gating.prob_active(at, logits),
            "paid": gating.l0_term(at, logits),
            # Mapped, for written out they would take longest of all to compile.
            "drawn": jax.lax.map(lambda key: gating.sample(key, at, logits), keys),
            "decided": {
                rule: gating.deterministic(at, logits, rule) for rule in rules_of(gate)
            },
        }

    def lines(state: train.State, key) -> Iterator[dict[str, Any]]:
        keys = jax.random.split(gating.key_for(key, "networks"), SAMPLED_NETWORKS)
        found = facts(state, keys)
        params, validation = found["params"], setting.dataset.validation
        expected = sum((sizes[n] * p).sum() for n, p in found["active"].items())
        draws = [train.member_of(found["drawn"], at) for at in range(len(keys))]
        sampled = [compiled.error(params, z, validation) for z in draws]
        for rule, z in found["decided"].items():
            folded = units.apply_gates(params, z, now.gated)
            keep = units.in_use(jax.device_get(folded), now.units)
            vectors = {n: jnp.asarray(k, jnp.float32) for n, k in keep.items()}
            left = mnist.to_floats(jax.device_get(compiled.count(vectors)))
            line = {
                "rule": rule,
                "validation_error": compiled.error(params, z, validation),
                "test_error": compiled.error(params, z, setting.dataset.test),
                "sampled_validation_error": float(np.mean(sampled)),
                "architecture": "-".join(str(int(k.sum())) for k in keep.values()),
                "weights": round(left["weights"]),
                "macs": round(left["macs"]),
                "dense_weights": round(dense["weights"]),
                "dense_macs": round(dense["macs"]),
                "expected_l0": float(expected),
                "test_l0": float(
                    sum((sizes[n] * (np.asarray(v) != 0)).sum() for n, v in z.items())
                ),
                "undecided": mnist.undecided(found["paid"], now.gated)
                if gate.bounded
                else math.nan,
            }
            yield line | {"verdict": verdict(line)}

    return lines


def rules_of(gate: gates.Gate) -> tuple[str, ...]:
    """The test-time rules that are compared: those that remove units."""
    its = tuple(rule for rule in ("paper", "median") if rule in gate.rules)
    return its + tuple(gating.RULES)


def verdict(line: dict[str, Any]) -> str:
    """In words: what went wrong with a run, if anything did."""
    said = []
    widths = [int(width) for width in line["architecture"].split("-")]
    if not math.isfinite(line["expected_l0"]):
        return "diverged"
    if 0 in widths:
        return "a layer has collapsed: λ is too large"
    left = line["weights"] / line["dense_weights"]
    if left > 0.9:
        said.append("nearly nothing removed: λ is too small")
    if line["validation_error"] > 10:
        said.append("most of what was learned is lost: λ is too large")
    if line["undecided"] > 0.2:
        said.append(f"{100 * line['undecided']:.0f} % of the gates are undecided")
    gap = line["validation_error"] - line["sampled_validation_error"]
    if abs(gap) > 1:
        better = "better" if gap < 0 else "worse"
        said.append(
            f"the test-time rule is {abs(gap):.1f} points {better} than sampled gates"
        )
    return "; ".join(said) or "fine"


# ------------------------------------------------------------------------------ the CSV

COLUMNS = (
    *(
        "dataset",
        "model",
        "family",
        "lam",
        "seed",
        "rule",
        "epochs",
        "validation_error",
        "test_error",
    ),
    *("sampled_validation_error", "architecture", "weights", "macs", "dense_weights"),
    *("dense_macs", "expected_l0", "test_l0", "undecided", "gradient_variance"),
    *("step_ms", "verdict"),
)


class Results:
    """The file of all runs."""

    def __init__(self, file: Path):
        self.file = file

    def rows(self) -> list[dict[str, str]]:
        """Its lines."""
        return csv_lines.read(self.file)

    def has(self, family: str, wanted: list[tuple[float, int]]) -> bool:
        """Whether all members of a family are there."""
        found = {
            (float(row["lam"]), int(row["seed"]))
            for row in self.rows()
            if row["family"] == family
        }
        return set(wanted) <= found

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Puts lines into the file, in the place of older ones of the same family."""
        families = {line["family"] for line in lines}
        kept = [row for row in self.rows() if row["family"] not in families]
        csv_lines.write(self.file, [*kept, *lines], COLUMNS)


def cli() -> None:
    config = command_line.parse(
        Config,
        __doc__,
        QUICK,
        "all families in three minutes: digits, one seed, two λ, 30 epochs in which "
        "gates are trained fast",
    )
    # One device per core, each of which trains members of its own. (Of the CPU: where
    # there is an accelerator, JAX goes on taking that.)
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    try:
        found = main(config)
    except (ValueError, data.DataError, OSError) as error:
        raise SystemExit(f"experiments.families: {error}") from None
    print((Path(found["folder"]) / "table.md").read_text())
    for file in sorted((Path(found["folder"]) / "figures").glob("*.png")):
        print(f"picture {file}")


if __name__ == "__main__":
    cli()
