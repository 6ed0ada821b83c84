"""Tip-Adapter on episodes: zero-shot CLIP, plus how close the query is to each support video. Nothing is trained.

Source: Tip-Adapter, Zhang et al. 2022, arXiv:2207.09519, and its code at gaopengcuhk/Tip-Adapter d0e2d6f.
Differs: published for images. A video is the mean of its frames, each of length one, and has length one itself; there is no
    augmentation, whose ten passes the published code averages. Keys are the support videos of the episode. As published,
    the shots of a class add up: with more of them the support weighs more against the names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn.functional import normalize

from ...extract.batches import FeatureBatch
from ..clips import Clips
from ..comparisons import Alignment
from ..layers import cosines, masked_mean
from ..limits import require_at_least
from ..specs import HeadSpec


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `tip_adapter`."""

    alpha: float = 1.0  # weight of the support videos beside the names
    beta: float = 5.5  # sharpness: how fast a support video's say falls with its distance
    logit_scale: float = 100.0  # of the names' cosines

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        require_at_least(0, self, "alpha", "beta", "logit_scale")


class TipAdapter(nn.Module):
    """Names and support videos, added."""

    uses_class_names = True
    is_transductive = False

    def __init__(self, alpha: float, beta: float, logit_scale: float) -> None:
        super().__init__()
        self.alpha, self.beta, self.logit_scale = alpha, beta, logit_scale
        self.cosine = Alignment("mean_cosine", "dist_mean")

    def episode_logits(self, bank: FeatureBatch, support: Tensor, query: Tensor, text: Tensor | None) -> Tensor:
        """Score queries [n, Q] against supports [n, W, K] with names [n, W, E]: logits [n, Q, W]."""
        assert text is not None, "tip_adapter declares that it needs text"
        video = video_of(bank)  # [V, E]
        by_name = self.logit_scale * cosines(video[query], text)
        clips = Clips(rearrange(video, "v e -> v 1 e"))
        cosine = self.cosine(clips, clips, query, rearrange(support, "n w k -> n (w k) 1"))  # [n, Q, W·K]
        by_support = reduce(affinity(cosine, self.beta), "n q (w k) -> n q w", "sum", w=support.shape[1])
        return by_name + self.alpha * by_support


def video_of(batch: FeatureBatch) -> Tensor:
    """Mean of the frames, each of length one, at length one: [B, E]."""
    return normalize(masked_mean(normalize(batch["embedding"], dim=-1), batch.mask), dim=-1)


def affinity(cosine: Tensor, beta: float) -> Tensor:
    """What a key has to say at a cosine: 1 where it is the video itself."""
    return torch.exp(-beta * (1 - cosine))


HEAD = HeadSpec(
    config=Config,
    build=lambda config, context: TipAdapter(config.alpha, config.beta, config.logit_scale),
    needs=lambda config: ("embedding", "text"),
    tasks=frozenset({"episodes"}),
    source="Tip-Adapter, Zhang et al. 2022, arXiv:2207.09519",
    is_trained=False,
)
