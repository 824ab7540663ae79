"""One way to a smaller language model: from the base to what is left of it."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import PRNGKeyArray

import l0jax.nnx
from experiments import language_latency
from experiments.harness import devices, loop
from experiments.harness.alone import alone
from experiments.language_settings import LATENCY, Config, Recipe
from experiments.language_training import Windows, adam, loss, said_by
from experiments.tasks.text import Text, windows_of
from l0jax import costs, gating, models, storage, train
from l0jax.models.decoder import Decoder, Sizes, generate
from l0jax.report import report
from l0jax.structure import Structure
from l0jax.train.targets import counted

Keep = dict[str, np.ndarray]

EVALUATED_TOGETHER = 31
"""Windows of a batch of evaluation."""
SHOWN = 160
"""Characters that a model goes on with, to be shown and compared."""
WITHIN = 1e-5
"""Of the largest logit, how far gated, closed and smaller models may be apart."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to a smaller model.

    Args:
        choose: from a run and its base to what is kept and the smaller model.
        scratch: what is left is trained as the base was, from new weights.
    """

    choose: Callable[["Run", Decoder], tuple[Keep, Decoder]]
    scratch: bool = False


def new_decoder(config: Config, vocabulary: int, key: PRNGKeyArray) -> Decoder:
    """A base before training, for so many characters."""
    sizes = Sizes(
        config.heads, config.queries, config.dim // 2, config.dim, config.hidden
    )
    blocks = [sizes] * config.layers
    return Decoder(vocabulary, config.width, blocks, config.length, rngs=nnx.Rngs(key))


def structure_of(model: Decoder, gated: tuple[str, ...]) -> Structure:
    """All units of a decoder, with its branches among them if these are gated."""
    structure = models.structure(model)
    if "branches" in gated:
        members = [n for n in structure.groups if n.endswith((".heads", ".hidden"))]
        structure = structure.whole("branches", members)
    return structure


def groups_of(structure: Structure, gated: tuple[str, ...]) -> list[str]:
    """The names of the groups of some kinds."""
    return [name for name in structure.groups if name.split(".")[-1] in gated]


def from_new_weights(config: Config) -> Recipe:
    """That of the base, for as much text as the base has seen and what follows it, in
    whole epochs, rounded up."""
    as_much = config.tune.epochs * config.base.apart / config.tune.apart
    epochs = config.base.epochs + math.ceil(as_much)
    return dataclasses.replace(config.base, epochs=epochs)


def _stored(folder: Path) -> Decoder:
    stored = storage.load(folder)
    assert isinstance(stored, Decoder)
    return stored


class Run:
    """One method on one base.

    Attributes:
        spent: epochs of training that the method has spent on its choice.
        resumed: whether a training went on from a checkpoint.
    """

    def __init__(
        self,
        config: Config,
        text: Text,
        folder: Path,
        name: str,
        how: Method,
        seed: int,
    ):
        self.config, self.text, self.folder = config, text, folder
        self.method, self.how, self.seed = name, how, seed
        self.key = jax.random.key(seed)
        self.spent, self.resumed = 0, False
        self._said: dict[float, np.ndarray] = {}
        length = config.length
        self.held_out = {
            part: windows_of(getattr(text, part), length, length)
            for part in ("validation", "test")
        }

    # ------------------------------------------------------------- a run's parts

    def named(self, name: str) -> PRNGKeyArray:
        """A key of this run's own for one purpose."""
        return gating.key_for(self.key, name)

    def new(self, key: PRNGKeyArray) -> Decoder:
        """A base before training."""
        return new_decoder(self.config, len(self.text.alphabet), key)

    def windows(self, recipe: Recipe) -> np.ndarray:
        """Of the training text."""
        length = self.config.length
        found = windows_of(
            self.text.train, length, max(round(recipe.apart * length), 1)
        )
        return found.astype(np.uint8 if len(self.text.alphabet) < 257 else int)

    def steps(self, recipe: Recipe, epochs: int) -> int:
        """Of so many epochs."""
        return len(self.windows(recipe)) // recipe.batch_size * epochs

    def base(self) -> Decoder:
        """The trained base of this seed.

        Raises:
            FileNotFoundError: if it was to be there and isn't.
        """
        folder = (self.config.base_from or self.folder) / f"base-{self.seed}"
        if self.config.base_from is not None:
            return _stored(folder)
        # Other methods of this folder wait for it; not those who train it together.
        its = self.folder / "checkpoints" / f"base-{self.seed}"
        with alone(its) if devices.is_first() else contextlib.nullcontext():
            # (Written when it has been trained.)
            if devices.agreed((folder / storage.ARCHITECTURE).exists()):
                return _stored(folder)
            return self.new_base(folder)

    def new_base(self, folder: Path) -> Decoder:
        """Trains it, and stores it."""
        model = self.new(self.named("weights"))
        recipe = self.config.base
        trained = self.trained("base", model, recipe).whole_model
        if devices.is_first():
            storage.save(trained, folder)
        return trained

    def closing(self, name: str, base: Decoder, **how: Any) -> "Trained":
        """The base after the epochs in which units close."""
        config = self.config
        self.spent += config.closing
        teacher = base if config.distil else None
        recipe = dataclasses.replace(config.tune, epochs=config.closing)
        return self.trained(name, base, recipe, teacher, **how)

    def trained(
        self,
        name: str,
        model: Decoder,
        recipe: Recipe,
        teacher: Decoder | None = None,
        **how: Any,
    ) -> "Trained":
        """A model after training, from its checkpoints if there are some.

        Args:
            name: of the checkpoints.
            model: as it begins.
            recipe: how it is trained.
            teacher: whose predictions it learns from too; always the base.
            **how: arguments of `train.Training`.
        """
        config = self.config
        steps = self.steps(recipe, recipe.epochs)
        if "structure" not in how:
            how["structure"] = models.structure(model).only()
        training = train.Training(
            model,
            loss,
            optimizer=adam(recipe, max(steps, 1)),
            **how,
        )
        windows, said = self.windows(recipe), None
        if teacher is not None:
            if recipe.apart not in self._said:
                self._said[recipe.apart] = said_by(teacher, windows)
            said = self._said[recipe.apart]
        run = loop.Run(
            training,
            self.named(name),
            Windows(windows, said),
            on=config,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            folder=self.folder / "checkpoints" / f"{name}-{self.seed}",
            name=f"{name} seed {self.seed}",
            show=config.progress,
        )
        run.restore()
        self.resumed |= run.epoch > 0
        for _ in run:
            run.say(f"{run.means['nats']:.3f} nats")
            run.training, run.state = run.training.compact(
                run.state, run.examples_to_come
            )
        return Trained(*devices.alone(run.training, run.state))

    def cost(self, base: Decoder) -> costs.Cost:
        """Of what a share is left.

        Raises:
            ValueError: as `language_latency.cost`.
        """
        if self.config.cost != LATENCY:
            return costs.COSTS[self.config.cost]
        folder = self.folder / LATENCY / str(self.seed)
        return language_latency.cost(base, self.config.length, folder)

    def nats(self, model: Decoder, part: str) -> float:
        """The loss of a part that was held out, in windows that don't overlap."""
        training = train.Training(
            model,
            loss,
            structure=models.structure(model).only(),
            optimizer=optax.sgd(0),
        )
        state = training.start(self.key)
        windows = self.held_out[part]
        cuts = range(EVALUATED_TOGETHER, len(windows), EVALUATED_TOGETHER)
        batches = (Windows(each) for each in np.split(windows, [*cuts]))
        return training.evaluate(state, batches)["nats"]

    # ---------------------------------------------------------------- from base to end

    def result(self) -> dict[str, Any]:
        """Chooses, trains what is left, and tests it."""
        config = self.config
        base = self.base()
        cost = self.cost(base)
        structure = structure_of(base, config.gated)
        begun, self.spent, self.resumed = time.perf_counter(), 0, False
        keep, small = self.how.choose(self, base)
        share = counted(structure, keep, cost) / counted(structure, {}, cost)
        if not config.shape and share > config.left * (1 + 1e-6):
            raise ValueError(
                f"{self.method} leaves {share:.4g} of the {config.cost}, more than the "
                f"{config.left:g} that may be left"
            )
        teacher = base if config.distil else None
        spent = self.spent
        recipe = dataclasses.replace(config.tune, epochs=config.tune.epochs - spent)
        if self.how.scratch:
            recipe = from_new_weights(config)
        cut = self.nats(small, "validation")
        name = f"{self.method}-tune"
        tuned = self.trained(name, small, recipe, teacher).whole_model
        # Of what went on where it was killed nobody knows all seconds.
        seconds = None if self.resumed else time.perf_counter() - begun
        if devices.is_first():
            storage.save(tuned, self.folder / f"{self.method}-{self.seed}")
        compared = report(base, tuned, self.example(1), batch_sizes=(1, 32), calls=9)
        sizes = [list(each) for each in tuned.sizes]
        return {
            "method": self.method,
            "seed": self.seed,
            "metrics": {
                "base test loss": self.nats(base, "test"),
                "base validation loss": self.nats(base, "validation"),
                "cut validation loss": cut,
                "validation loss": self.nats(tuned, "validation"),
                "test loss": self.nats(tuned, "test"),
            },
            "costs": {
                config.cost: share,
                "macs of the base": compared.after.macs / compared.before.macs,
                **{
                    f"seconds at batch {size}": compared.after.seconds[size]
                    / compared.before.seconds[size]
                    for size in (1, 32)
                },
            },
            "epochs": {"choosing": spent, "tuning": recipe.epochs},
            "width": tuned.embed.shape[1],
            "blocks": sizes,
            "prompt": self.text.decode(self.prompt[0]),
            "goes on": self.goes_on(tuned),
            "base goes on": self.goes_on(base),
            "seconds": seconds,
        }

    def example(self, batch: int) -> jax.ShapeDtypeStruct:
        """The shape of tokens."""
        return jax.ShapeDtypeStruct((batch, self.config.length), jnp.int32)

    def goes_on(self, model: Decoder) -> str:
        """How a model goes on with the beginning of the validation text, taking the
        likeliest character each time."""
        count = min(SHOWN, self.config.length - self.prompt.shape[1])
        return self.text.decode(generate(model, self.prompt, count)[0])

    @property
    def prompt(self) -> np.ndarray:
        """The beginning of the validation text."""
        return self.text.validation[None, : max(self.config.length // 4, 1)]

    def shrunk(self, base: Decoder, keep: Mapping[str, np.ndarray]) -> Decoder:
        """What is left of a model when units go, after it was seen that it is what the
        model is with their gates closed: in logits, and in what it goes on with.

        Raises:
            ValueError: if it isn't.
        """
        structure = structure_of(base, self.config.gated)
        closed = {name: jnp.float32(flags) for name, flags in keep.items()}
        gated = l0jax.nnx.fold(base, closed, structure.groups)
        small = l0jax.nnx.shrink(gated, keep, structure)
        self.check_same(gated, small)
        return small

    def check_same(self, gated: Decoder, small: Decoder) -> None:
        """Raises ValueError unless two models say the same."""
        tokens = jnp.asarray(self.held_out["validation"][:4, :-1])
        one, other = gated(tokens), small(tokens)
        apart = float(abs(one - other).max() / abs(one).max())
        if not apart <= WITHIN:
            raise ValueError(
                f"{self.method}: the smaller model is {apart:.1e} of the largest logit "
                f"from the gated one, more than {WITHIN:g}"
            )
        if self.goes_on(gated) != self.goes_on(small):
            raise ValueError(f"{self.method}: the smaller model goes on otherwise")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A training at its end."""

    training: train.Training
    state: train.TrainingState

    @property
    def whole_model(self) -> Decoder:
        """At its present width."""
        return self.training.whole_model(self.state)
