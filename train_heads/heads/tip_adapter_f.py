"""Tip-Adapter-F: zero-shot CLIP, plus how close a video is to keys of each class, which begin as training videos.

The keys are the first videos of each class that training meets, in the order that its seed draws, and learn from then on.

Source: Tip-Adapter, Zhang et al. 2022, arXiv:2207.09519, §3.3, and its code at gaopengcuhk/Tip-Adapter d0e2d6f; published
    with AdamW, lr 1e-3, 20 epochs.
Differs: as `tip_adapter` does. Training sees all training videos, where the published method has those of the keys alone;
    its sharpness and weight are not searched afterwards, and its epoch is not chosen on test. A class with fewer videos
    than keys leaves the rest of its keys at zero, from where they may learn. Classes that were not trained on are scored by
    their names alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ...extract.batches import FeatureBatch
from ...extract.text import TextFeatures
from ..layers import cosines
from ..limits import require_at_least
from ..specs import HeadContext, HeadOutput, HeadSpec
from .tip_adapter import affinity, video_of


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `tip_adapter_f`."""

    keys: int = 16  # of each class
    alpha: float = 1.0  # weight of the keys beside the names
    beta: float = 5.5  # sharpness: how fast a key's say falls with its distance
    logit_scale: float = 100.0  # of the names' cosines

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        require_at_least(1, self, "keys")
        require_at_least(0, self, "alpha", "beta", "logit_scale")


class TipAdapterF(nn.Module):
    """Names and trained keys, added."""

    key_videos: Tensor
    columns: Tensor
    classes: Tensor

    def __init__(
        self,
        width: int,
        trained_names: Sequence[str],
        class_names: Sequence[str],
        *,
        keys: int,
        alpha: float,
        beta: float,
        logit_scale: float,
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.logit_scale = alpha, beta, logit_scale
        self.keys = nn.Parameter(torch.zeros(len(trained_names), keys, width))
        self.register_buffer("key_videos", torch.zeros(len(trained_names), keys, dtype=torch.int64))  # 0: none yet
        place = {name: number for number, name in enumerate(trained_names)}
        known = [(column, place[name]) for column, name in enumerate(class_names) if name in place]
        columns, classes = torch.tensor(known, dtype=torch.int64).reshape(-1, 2).T  # of the logits, and of the keys
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("classes", classes, persistent=False)

    def forward(self, batch: FeatureBatch, text: TextFeatures) -> HeadOutput:
        """Score classes: embedding [B, T, E] and class texts [C, E] -> logits [B, C]."""
        video = video_of(batch)
        if self.training:
            self._remember(video.detach(), batch)
        logits = self.logit_scale * cosines(video, text.embedding)  # [B, C]
        if len(self.columns):
            with torch.autocast(video.device.type, enabled=False):  # as in `cosines`; a key has the length it learnt
                cosine = einsum(video, self.keys[self.classes], "b e, c m e -> b c m")
            by_keys = self.alpha * reduce(affinity(cosine, self.beta), "b c m -> b c", "sum")
            logits = logits.index_add(1, self.columns, by_keys)
        return HeadOutput(logits=logits, embedding=video)

    @torch.no_grad()
    def _remember(self, video: Tensor, batch: FeatureBatch) -> None:
        """Put videos [B, E] that are no keys yet into what is free of their classes."""
        numbers = torch.tensor([_number(video_id) for video_id in batch.video_ids], device=video.device)
        is_new = ~torch.isin(numbers, self.key_videos)
        of_class = one_hot(batch.labels, len(self.keys)) * rearrange(is_new, "b -> b 1")  # [B, C]
        earlier = of_class.cumsum(dim=0) - of_class  # in this batch, [B, C]
        before = rearrange(earlier.gather(1, rearrange(batch.labels, "b -> b 1")), "b 1 -> b")
        place = (self.key_videos != 0).sum(dim=1)[batch.labels] + before  # [B]
        chosen = is_new & (place < self.keys.shape[1])
        where = batch.labels[chosen], place[chosen]
        self.keys[where] = video[chosen].to(self.keys.dtype)
        self.key_videos[where] = numbers[chosen]


def _number(video_id: str) -> int:
    """A video's id as a number above 0."""
    return int.from_bytes(hashlib.sha256(video_id.encode()).digest()[:8]) >> 1 or 1


def _build(config: Config, context: HeadContext) -> nn.Module:
    return TipAdapterF(
        context.shape.embed_dim,
        context.trained_names,
        context.class_names,
        keys=config.keys,
        alpha=config.alpha,
        beta=config.beta,
        logit_scale=config.logit_scale,
    )


HEAD = HeadSpec(
    config=Config,
    build=_build,
    needs=lambda config: ("embedding", "text"),
    tasks=frozenset({"classify"}),
    source="Tip-Adapter, Zhang et al. 2022, arXiv:2207.09519",
)
