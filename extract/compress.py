"""Smaller features: tokens averaged to a coarser grid, and numbers rounded to a store's dtype.

int8 keeps each token as 127 · x / max|x| with that maximum in a scale of its own: no token's outlier costs another one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .specs import arrays_of

_STEPS = 127


def pool_tokens(tokens: Tensor, grid: tuple[int, int], to: int) -> Tensor:
    """Average the patch tokens of each frame to a grid of `to` × `to`.  [F, 1+N, D] → [F, 1+to², D], class token first.

    Where `to` does not divide the grid, neighbouring averages share a row or column of patches.
    """
    patches = rearrange(tokens[:, 1:], "f (h w) d -> f d h w", h=grid[0])
    pooled = rearrange(F.adaptive_avg_pool2d(patches, to), "f d h w -> f (h w) d")
    return torch.cat([tokens[:, :1], pooled], dim=1)


def rounded(feature: str, frames: Tensor, dtype: str) -> dict[str, Tensor]:
    """A feature [F, ...] as the arrays that a store of this dtype holds; pixels stay what they are.

    Numbers that float16 cannot hold become infinite, which is what a reader should see.
    """
    if not frames.is_floating_point():
        return {feature: frames}
    arrays = arrays_of(feature, dtype)
    if len(arrays) == 1:
        return {feature: frames.to(torch.float16 if dtype == "int8" else getattr(torch, dtype))}
    # The scale is rounded before it divides, so that what is read back is off by half a step at most.
    scale = (frames.abs().amax(dim=-1) / _STEPS).clamp(min=2.0**-24).to(torch.float16)  # [F, 1+N]
    steps = (frames / scale[..., None].float()).round().clamp(-_STEPS, _STEPS).to(torch.int8)
    return dict(zip(arrays, (steps, scale), strict=True))


def restored(steps: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Tokens [..., D] from int8 and their scales [...], in float16."""
    return torch.mul(steps, scale[..., None], out=out)


def fidelity(feature: str, frames: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """Cosine between each vector of a feature and what will be read of it, float32 [...]."""
    arrays = [stored[name] for name in stored]
    read = restored(arrays[0], arrays[1]) if len(arrays) == 2 else arrays[0]
    return F.cosine_similarity(frames.double(), read.double(), dim=-1).float()
