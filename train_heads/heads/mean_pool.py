"""Mean over frames, then cosine to the class texts: zero-shot CLIP on video, with nothing to train.

Source: CLIP, Radford et al. 2021, arXiv:2103.00020, §3.1 (images); frames are averaged as in CLIP4Clip's mean pooling,
    Luo et al. 2021, arXiv:2104.08860: each frame embedding has length one before the mean.
Differs: nothing by default; `normalise_frames=False` averages the frames as they are, as ViFi-CLIP does.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.functional import normalize

from ...extract.batches import FeatureBatch
from ...extract.text import TextFeatures
from ..layers import cosines, masked_mean
from ..specs import HeadOutput, HeadSpec


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `mean_pool`."""

    normalise_frames: bool = True  # every frame counts the same, whatever the length of its embedding


class MeanPool(nn.Module):
    """CLIP, frames averaged."""

    def __init__(self, normalise_frames: bool) -> None:
        super().__init__()
        self.normalise_frames = normalise_frames

    def forward(self, batch: FeatureBatch, text: TextFeatures) -> HeadOutput:
        """Score classes by cosine: embedding [B, T, E] and class texts [C, E] -> logits [B, C]."""
        frames = batch["embedding"]
        frames = normalize(frames, dim=-1) if self.normalise_frames else frames
        video = masked_mean(frames, batch.mask)  # [B, E]
        return HeadOutput(logits=text.logit_scale * cosines(video, text.embedding), embedding=video)


HEAD = HeadSpec(
    config=Config,
    build=lambda config, context: MeanPool(config.normalise_frames),
    needs=lambda config: ("embedding", "text"),
    tasks=frozenset({"classify"}),
    source="CLIP, Radford et al. 2021, arXiv:2103.00020; CLIP4Clip, Luo et al. 2021, arXiv:2104.08860",
    is_trained=False,
)
