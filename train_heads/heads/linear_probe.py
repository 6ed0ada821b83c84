"""A linear classifier on the mean frame: what the frozen features say by themselves.

Source: the linear-probe protocol of CLIP, Radford et al. 2021, arXiv:2103.00020, §3.2; standardised inputs as in MAE's
    (batch norm without affine), He et al. 2022, arXiv:2111.06377, appendix A.1.
Differs: trained by AdamW instead of L-BFGS or LARS; the mean and variance of the features are gathered exactly over all
    of training instead of taken from each batch, so evaluation sees the same numbers and a batch may be one video.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...data_manifests.errors import ConfigError
from ...extract.batches import FeatureBatch
from ...extract.specs import canonical_feature, feature_shape
from ...extract.text import TextFeatures
from ..layers import masked_mean
from ..specs import HeadContext, HeadOutput, HeadSpec


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `linear_probe`."""

    feature: str = "cls.-1"  # cls.<k> | embedding
    standardise: bool = True  # to zero mean and unit variance of the training videos

    def __post_init__(self) -> None:
        """Refuse features that are not one vector a frame."""
        if self.feature.partition(".")[0] not in ("cls", "embedding"):
            raise ConfigError(
                "linear_probe reads one vector a frame", seen=f"feature={self.feature!r}", wanted="cls.<k> or embedding"
            )


class LinearProbe(nn.Module):
    """Mean over frames, standardise, one linear layer."""

    def __init__(self, feature: str, width: int, n_classes: int, standardise: bool) -> None:
        super().__init__()
        self.feature = feature
        self.standardise = Standardise(width) if standardise else nn.Identity()
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, batch: FeatureBatch, text: TextFeatures | None = None) -> HeadOutput:
        """Classify: feature [B, T, D] -> logits [B, C]."""
        video = masked_mean(batch[self.feature], batch.mask)  # [B, D]
        return HeadOutput(logits=self.classifier(self.standardise(video)))


class Standardise(nn.Module):
    """Subtract the mean and divide by the standard deviation of all vectors seen in training."""

    n_seen: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("n_seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, D]; a training batch is counted first."""
        if self.training:
            self._count(x.detach())
        return (x - self.mean) * torch.rsqrt(self.variance + 1e-6)

    def _count(self, x: Tensor) -> None:
        """Merge the moments of a batch into the moments so far: Chan, Golub and LeVeque 1979."""
        n_seen = self.n_seen + len(x)
        share, shift = len(x) / n_seen, x.mean(dim=0) - self.mean
        within = (1 - share) * self.variance * (self.n_seen > 0) + share * x.var(dim=0, correction=0)
        self.variance.copy_(within + share * (1 - share) * shift.square())
        self.mean.add_(share * shift)
        self.n_seen.copy_(n_seen)


def _build(config: Config, context: HeadContext) -> nn.Module:
    feature = canonical_feature(config.feature, context.shape.layers)
    (width,) = feature_shape(feature, context.shape, size_px=0)
    return LinearProbe(feature, width, len(context.class_names), config.standardise)


HEAD = HeadSpec(
    config=Config,
    build=_build,
    needs=lambda config: (config.feature,),
    tasks=frozenset({"classify"}),
    source="CLIP, Radford et al. 2021, arXiv:2103.00020, §3.2",
)
