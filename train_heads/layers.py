"""Pieces that two or more heads share."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the activation OpenAI's CLIP was trained with.

    Source: openai/CLIP, clip/model.py (MIT).
    Differs: nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply it element by element."""
        return x * torch.sigmoid(1.702 * x)


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
