"""What residual networks share: stages of blocks beside shortcuts, at any widths."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from l0jax.models.layers import ImageModel


class ResidualModel(ImageModel):
    """A first convolution `stem`, `blocks` in stages, a dense layer `head`.

    Each block has `inner`, its constructor's argument of that name, `outputs`, the
    channels that leave it, and `shortcut`, a convolution or None.

    Attributes:
        depths: the number of blocks of each stage.
    """

    depths: tuple[int, ...]
    stem: nnx.Conv
    blocks: nnx.List
    head: nnx.Linear

    @property
    def architecture(self) -> dict:
        """Arguments of the constructor that rebuild this shape, for files."""
        blocks, stages, inner, project = iter(self.blocks), [], [], []
        for depth in self.depths:
            here = [next(blocks) for _ in range(depth)]
            inner.append([block.inner for block in here])
            stages.append(here[0].outputs)
            project.append(here[0].shortcut is not None)
        return {
            "stem": self.stem.kernel.shape[3],
            "stages": stages,
            "inner": inner,
            "project": project,
            "classes": self.head.kernel.shape[1],
            "shape": list(self.shape),
        }


def blocks_of(
    block: Callable[..., nnx.Module],
    stem: int,
    stages: Sequence[int],
    inner: Sequence[Sequence[Any]],
    project: Sequence[bool],
    *,
    rngs: nnx.Rngs,
) -> list[nnx.Module]:
    """The blocks of all stages; all stages but the first begin with stride 2.

    Args:
        block: `block(inputs, inner, outputs, stride, project, rngs=rngs)`.
        stem: channels that enter the first stage.
        stages: channels between the blocks of each stage.
        inner: for each block of each stage the channels within it.
        project: of each stage, whether the shortcut of its first block is a
            convolution; else it is the identity.
        rngs: where the initial weights come from.

    Raises:
        ValueError: if `stages`, `inner` and `project` differ in length, or an identity
            would have to change the size; if a stage has no blocks.
    """
    if not len(stages) == len(inner) == len(project):
        raise ValueError(
            f"stages has {len(stages)} entries, inner {len(inner)} and project "
            f"{len(project)}: give one each for every stage"
        )
    if empty := [stage for stage, within in enumerate(inner) if not within]:
        raise ValueError(f"inner names no block of stage {empty[0]}: give at least one")
    widths = [stem, *stages]
    for stage, beside in enumerate(project):
        if not beside and (stage or widths[stage] != widths[stage + 1]):
            raise ValueError(
                f"stage {stage} goes from {widths[stage]} to {widths[stage + 1]} "
                f"channels{' with stride 2' if stage else ''}: project must be True "
                "there"
            )
    channels, blocks = stem, []
    for stage, (width, within) in enumerate(zip(stages, inner, strict=True)):
        for at, each in enumerate(within):
            stride = 2 if stage and not at else 1
            beside = project[stage] and not at
            blocks.append(block(channels, each, width, stride, beside, rngs=rngs))
            channels = width
    return blocks
