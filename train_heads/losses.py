"""Losses of the published systems, beside cross-entropy."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import kl_div

from .layers import masked_mean

SHARPNESS = 10  # of the targets: with 80 texts, a lone partner gets 0.996 of the mass


def same_class_contrastive(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the matching of B videos to their B texts, in both directions, is from matching by class.

    The target of a row is softmax(10 · [same class]): texts of one class share its mass. The loss is the mean over rows
    of KL(target ‖ softmax(row)), averaged over both directions; it does not depend on the order of the batch.

    Args:
        logits: scaled similarities [B, B] of video i and the text of video j.
        labels: classes of the videos, [B].

    Source: ActionCLIP, Wang et al. 2021, arXiv:2109.08472, §3.2; EZ-CLIP and M2-CLIP use it as it is.
    """
    is_same = rearrange(labels, "i -> i 1") == rearrange(labels, "j -> 1 j")
    target = (SHARPNESS * is_same.float()).softmax(dim=-1)  # [B, B], symmetric
    directions = (logits.float(), rearrange(logits.float(), "i j -> j i"))
    return torch.stack([kl_div(rows.log_softmax(dim=-1), target, reduction="batchmean") for rows in directions]).mean()


def motion_loss(frames: Tensor, mask: Tensor) -> Tensor:
    """1 / (C + V + 1): small where the frames of a video differ.

    C is the mean, over real frames and channels, of |e[t+1] - e[t-1]| / 2, where the first and the last real frame stand
    for their missing neighbours; V is the mean, over videos and channels, of the unbiased variance over time.

    Args:
        frames: embeddings [B, T, E], un-normalised.
        mask: [B, T] bool; the real frames of a video come first.

    Source: EZ-CLIP, Ahmad et al. 2023, arXiv:2312.08010, with δ = 1; the arithmetic is that of its code (MIT).
    Differs: a single frame has no variance and counts as zero.
    """
    frames = frames.float().masked_fill(~rearrange(mask, "b t -> b t 1"), 0)
    n_real = mask.sum(dim=1, keepdim=True)  # [B, 1]
    time = torch.arange(frames.shape[1], device=frames.device)
    width = frames.shape[2]
    after = torch.minimum(time + 1, (n_real - 1).clamp_min(0))
    before = (time - 1).clamp_min(0).expand_as(after)
    ahead, behind = (frames.gather(1, repeat(at, "b t -> b t e", e=width)) for at in (after, before))
    real = rearrange(mask, "b t -> b t 1")
    difference = ((ahead - behind).abs() / 2).masked_fill(~real, 0).sum() / (mask.sum() * width).clamp_min(1)
    deviation = (frames - rearrange(masked_mean(frames, mask), "b e -> b 1 e")).masked_fill(~real, 0)
    variance = (deviation.square().sum(dim=1) / (n_real - 1).clamp_min(1)).mean()
    return 1 / (difference + variance + 1)
