"""Pieces that two or more heads share."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the activation OpenAI's CLIP was trained with.

    Source: openai/CLIP, clip/model.py (MIT).
    Differs: nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply it element by element."""
        return x * torch.sigmoid(1.702 * x)


class Adapter(nn.Module):
    """A bottleneck, down · GELU · up, that adds nothing at first; the residual is its caller's.

    Source: AIM, Yang et al. 2023, arXiv:2302.03024, §3.2.
    Differs: nothing.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width], without x itself."""
        return self.up(gelu(self.down(x)))


def masked_mean(frames: Tensor, mask: Tensor) -> Tensor:
    """Average the real frames of each video.

    Args:
        frames: [B, T, D].
        mask: [B, T] bool, False where a frame is padding.

    Returns:
        [B, D]; zeros for a video without a single real frame.
    """
    real = rearrange(mask, "b t -> b t 1")
    total = frames.masked_fill(~real, 0).sum(dim=1)  # not `frames * real`: inf × 0 would let padding in
    return total / real.sum(dim=1).clamp_min(1)  # [B, D]
