"""TED-adapters: a bottleneck that sees a token's neighbours in time, and one that sees how its surroundings changed.

Source: M2-CLIP, Wang et al. 2024, arXiv:2401.11649. The order of the convolution over time inside a bottleneck is
    ST-Adapter's, Pan et al. 2022, arXiv:2206.13559.
Differs: nothing is changed in place, and padded frames take no part.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from ..extract.blocks import Block, Insert


class TemporalEnhancement(nn.Module):
    """up · depthwise convolution over time · down, without activation; adds nothing at first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.conv = nn.Conv1d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.up = nn.Linear(hidden, width)
        _start_at_nothing(self.down, self.conv, self.up)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens [B, T, S, D] -> what to add to them; frames where mask [B, T] is False are read as zeros."""
        hidden = self.down(x)
        if mask is not None:
            hidden = hidden.masked_fill(~rearrange(mask, "b t -> b t 1 1"), 0)
        kernel = rearrange(self.conv.weight, "d 1 three -> d 1 three 1")  # an image of T rows and S columns, as it lies
        mixed = conv2d(
            rearrange(hidden, "b t s d -> b d t s"), kernel, self.conv.bias, padding=(1, 0), groups=len(kernel)
        )
        return self.up(rearrange(mixed, "b d t s -> b t s d"))


class LocalDifference(nn.Module):
    """up · depthwise 3 × 3 convolution over the patch grid · down, of what a frame changed; adds nothing at first."""

    def __init__(self, width: int, hidden: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.down = nn.Linear(width, hidden)
        self.conv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.up = nn.Linear(hidden, width)
        _start_at_nothing(self.down, self.conv, self.up)

    def forward(self, patches: Tensor, mask: Tensor | None) -> Tensor:
        """Patch tokens [B, T, N, D] -> what to add to them; a frame after none, or after a padded one, has not changed."""
        change = patches[:, 1:] - patches[:, :-1]
        if mask is not None:
            change = change.masked_fill(~rearrange(mask[:, 1:] & mask[:, :-1], "b t -> b t 1 1"), 0)
        hidden = self.down(pad(change, (0, 0, 0, 0, 1, 0)))
        images = rearrange(hidden, "b t (h w) d -> (b t) d h w", h=self.grid[0])
        return self.up(rearrange(self.conv(images), "(b t) d h w -> b t (h w) d", b=len(patches)))


class TEDAdapter(nn.Module):
    """x + temporal enhancement of all tokens + local difference of the patch tokens."""

    def __init__(self, width: int, hidden: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.temporal = TemporalEnhancement(width, hidden)
        self.local = LocalDifference(width, hidden, grid)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, 1+N, D] -> the same; of the class token alone, [B, T, 1, D], there is no local difference."""
        enhanced = x + self.temporal(x, mask)
        if x.shape[2] == 1:
            return enhanced
        changed = enhanced[:, :, 1:] + self.local(x[:, :, 1:], mask)
        return torch.cat([enhanced[:, :, :1], changed], dim=2)


class TEDInsert(Insert):
    """TED-adapters in a block of the image tower: before the MLP, and before attention where `both` are wanted."""

    def __init__(self, width: int, hidden: int, grid: tuple[int, int], both: bool) -> None:
        super().__init__()
        self.pre_attention = TEDAdapter(width, hidden, grid) if both else None
        self.pre_mlp = TEDAdapter(width, hidden, grid)

    def before_attention(self, x: Tensor, block: Block, mask: Tensor | None) -> Tensor:
        """The stream [B, T, 1+N, D], adapted."""
        return x if self.pre_attention is None else self.pre_attention(x, mask)

    def before_mlp(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The stream [B, T, 1+N, D], adapted; of the last block [B, T, 1, D]."""
        return self.pre_mlp(x, mask)


def _start_at_nothing(down: nn.Linear, conv: nn.Conv1d | nn.Conv2d, up: nn.Linear) -> None:
    """The published draw: with a convolution of zeros the gradient reaches it first, and through it the rest."""
    assert conv.bias is not None
    for table in (down.bias, conv.weight, conv.bias, up.bias):
        nn.init.zeros_(table)
