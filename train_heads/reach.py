"""How deep a method reaches into the tower.

The blocks of a frozen CLIP below a method's first change look at one frame at a time and never learn, so they are a
constant of the frame: a method that changes the blocks above k trains exactly from `tokens.<k>`. `reach` is that k:

    0    every block is changed, as published: the head reads `pixels` and runs the tower
    k    the blocks above k are changed: it reads `tokens.<k>`; counted from the end, -2 is the last block alone
    -1   no block is changed: it reads `cls.<L>`, and only what stands behind the tower is trained
"""

from __future__ import annotations

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from ..data_manifests.errors import UnknownName
from ..extract.batches import FeatureBatch
from ..extract.specs import TowerShape, canonical_feature
from ..extract.towers import Tower


def reached_feature(reach: int) -> str:
    """The stored feature that a method of this reach starts from."""
    return {0: "pixels", -1: "cls.-1"}.get(reach, f"tokens.{reach}")


@dataclass(frozen=True, slots=True)
class Reach:
    """A reach into a tower of known depth."""

    layer: int  # k, from 0 to L: the blocks above it are changed
    n_blocks: int  # changed ones, L - k
    feature: str  # where the method starts

    @classmethod
    def of(cls, reach: int, shape: TowerShape) -> Reach:
        """Resolve a reach that may be counted from the end.

        Raises:
            UnknownName: the tower has no such layer.
        """
        if not -shape.layers - 1 <= reach <= shape.layers:
            raise UnknownName("reach", str(reach), map(str, range(-shape.layers - 1, shape.layers + 1)))
        layer = reach % (shape.layers + 1)
        return cls(layer, shape.layers - layer, canonical_feature(reached_feature(reach), shape.layers))

    def tokens(self, batch: FeatureBatch, tower: Tower, offset: Tensor | None = None) -> Tensor:
        """tokens.<layer> of a batch, [B, T, 1+N, D]; of a reach of -1 the class token alone, [B, T, 1, D].

        From pixels an `offset` [T, D] may be added to the tokens of each frame before ln_pre.
        """
        if self.feature == "pixels":
            return tower.start(batch["pixels"], offset)
        found = batch[self.feature]
        return rearrange(found, "b t d -> b t 1 d") if self.feature.startswith("cls.") else found
