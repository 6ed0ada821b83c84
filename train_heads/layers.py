"""Pieces that two or more heads share."""

from __future__ import annotations

from collections import OrderedDict

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, rms_norm

from ..extract.specs import SpecMismatch
from .limits import require_heads

POSITION_STD = {"matched": 1.0, "published": 0.01}  # of the table of a FrameTransformer


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


def mlp(width: int, hidden: int, dropout: float) -> nn.Sequential:
    """The MLP of a transformer layer, [..., width] -> [..., width], with dropout behind both of its layers."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
    )


class DropPath(nn.Module):
    """In training, leaves out the branch of a sample with probability `rate`, and scales up those that stay.

    Source: stochastic depth, Huang et al. 2016, arXiv:1603.09382, §3.
    Differs: branches are scaled up in training, not down in use.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """What a block adds, [B, ...]: one draw for each of its B samples."""
        if not self.training or not self.rate:
            return branch
        stays = torch.rand(len(branch), *[1] * (branch.ndim - 1), device=branch.device) >= self.rate
        return branch * stays / (1 - self.rate)


class TransformerBlock(nn.Module):
    """CLIP's own block: x + attention(LN x), then x + MLP(LN x)."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": QuickGELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """[B, T, E] -> [B, T, E]; no frame attends to a frame where padding [B, T] is True."""
        y = self.ln_1(x)
        attended, _ = self.attn(y, y, y, key_padding_mask=padding, need_weights=False)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.ln_2(x)))


class FrameTransformer(nn.Module):
    """The temporal module of Efficient-Prompt: a table of positions, then pre-LN blocks over the frames of a video.

    Source: Ju et al. 2022, arXiv:2112.04478, and its code at ju-chen/Efficient-Prompt 1f69a18 (MIT).
    Differs: with `matched` positions the inputs are scaled to unit RMS and positions are drawn at that scale. `published`
        takes the embeddings as they are beside N(0, 0.01); on real features such a module ignores the order of frames.
    """

    def __init__(
        self, n_frames: int, width: int, *, layers: int, heads: int, dropout: float = 0.0, positions: str = "matched"
    ) -> None:
        """Draw a module for up to `n_frames` embeddings; raises ConfigError if the heads cannot share the width."""
        super().__init__()
        require_heads(width, heads, "the temporal transformer")
        self.is_scaled = positions == "matched"
        self.position = nn.Parameter(torch.randn(n_frames, width) * POSITION_STD[positions])
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(layers))

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Frames [B, T, E] that know their neighbours where mask [B, T]; raises as `of_frames` does."""
        position = of_frames(self.position, frames.shape[1])
        x = rms_norm(frames, frames.shape[-1:]) if self.is_scaled else frames
        x = x + position
        for block in self.blocks:
            x = block(x, ~mask)
        return x


def of_frames(table: Tensor, n_frames: int) -> Tensor:
    """The first rows of a table that has one for each frame.

    Raises:
        SpecMismatch: it has fewer.
    """
    if n_frames > len(table):
        raise SpecMismatch("videos have more frames than the head", seen=n_frames, wanted=len(table))
    return table[:n_frames]


def cosines(videos: Tensor, texts: Tensor) -> Tensor:
    """Cosines of vectors [..., B, E] with vectors [..., C, E]: [..., B, C].

    In float32 also under autocast: a scale of 100 makes half a logit of what bfloat16 rounds off.
    """
    with torch.autocast(videos.device.type, enabled=False):
        return normalize(videos.float(), dim=-1) @ normalize(texts.float(), dim=-1).mT


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
