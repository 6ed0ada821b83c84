"""The videos of episodes: rows of a bank, gathered, averaged over shots, and told apart by what must be computed once.

Letters beside the house's: V videos of a bank, n episodes of W ways and K shots, U videos that are each computed once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..extract.batches import FeatureBatch


class Clips(NamedTuple):
    """One vector for each frame of some videos."""

    frames: Tensor  # [..., T, E]
    mask: Tensor | None = None  # [..., T] bool; None where every frame is real

    @classmethod
    def of(cls, bank: FeatureBatch, feature: str) -> Clips:
        """All videos of a bank, [V, T, E]."""
        return cls(bank[feature], bank.real)

    def at(self, rows: Tensor) -> Clips:
        """The videos at rows [...] of a bank: frames [..., T, E]."""
        return Clips(gather(self.frames, rows), None if self.mask is None else gather(self.mask, rows))

    def mean_shot(self) -> Clips:
        """Average K videos frame by frame, [..., K, T, E] -> [..., T, E]; a frame counts where its video has it."""
        if self.mask is None:
            return Clips(self.frames.mean(dim=-3))
        real = rearrange(self.mask, "... k t -> ... k t 1")
        total = self.frames.masked_fill(~real, 0).sum(dim=-3)
        return Clips(total / real.sum(dim=-3).clamp_min(1), self.mask.any(dim=-2))


class Supports(NamedTuple):
    """Support videos of many episodes, each with the text of its class, those that recur once."""

    rows: Tensor  # of the bank, [U]
    text: Tensor | None  # of the class that the video stands for, [U, E]
    which: Tensor  # of the U each support video is, [n, W, K]

    @classmethod
    def of(cls, support: Tensor, text: Tensor | None) -> Supports:
        """Find what is distinct among supports [n, W, K] whose ways have the texts [n, W, E]."""
        rows, which = support.unique(return_inverse=True)
        if text is None:
            return cls(rows, None, which)
        n_shots = support.shape[-1]
        per_way = text.flatten(0, 1)  # [n·W, E]
        way_of = which.new_empty(len(rows))
        way_of[which.flatten()] = torch.arange(len(per_way), device=which.device).repeat_interleave(n_shots)
        own = per_way[way_of]  # [U, E]
        if all(torch.equal(gather(own, which[..., k]), text) for k in range(n_shots)):
            return cls(rows, own, which)
        # A video that stands for two classes, as only made-up episodes have it: nothing is shared.
        everyone = torch.arange(support.numel(), device=support.device)
        return cls(support.flatten(), per_way.repeat_interleave(n_shots, dim=0), everyone.view_as(support))


def gather(bank: Tensor, rows: Tensor) -> Tensor:
    """Rows of a bank [V, ...] by an index of any shape."""
    # Whole rows of a flat bank: indexing with `bank[rows]` copies frame by frame, three times slower.
    return bank.index_select(0, rows.flatten()).unflatten(0, rows.shape)
