"""Losses that two or more heads share."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import kl_div

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
