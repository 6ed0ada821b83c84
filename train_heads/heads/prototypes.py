"""Few-shot recognition with nothing to train: the class whose support videos are closest under an alignment metric.

Source: Prototypical Networks, Snell et al. 2017, arXiv:1703.05175, with the metrics of OTAM (arXiv:1906.11415) and
    HyRSM (arXiv:2204.13423) on frozen CLIP: the "CLIP-Freeze" rows of CLIP-FSAR, Wang et al. 2023, arXiv:2303.02982.
Differs: frames have length one before anything is averaged, and their cosine is exact; `normalise = false` with `eps =
    0.01` is the published code.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import normalize

from ...data_manifests.errors import ConfigError
from ...extract.batches import FeatureBatch
from ...extract.specs import canonical_feature
from ..alignment import METRICS
from ..clips import Clips
from ..comparisons import Alignment, require_comparison
from ..specs import HeadContext, HeadSpec


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `prototypes`."""

    metric: str = "otam"  # mean_cosine | otam | bi_mhm
    shots: str = "dist_mean"  # dist_mean: mean of the logits of the K support videos | proto_mean: of their frames
    lam: float = 0.5  # softness of OTAM's minimum
    eps: float = 0.0  # added to the product of norms in a frame cosine
    normalise: bool = True  # give every frame length one first
    feature: str = "embedding"  # embedding | cls.<k>

    def __post_init__(self) -> None:
        """Refuse words that mean nothing here."""
        require_comparison(self.metric, self.shots, self.lam, METRICS)
        if self.feature.partition(".")[0] not in ("cls", "embedding"):
            raise ConfigError(
                "prototypes reads one vector a frame", seen=f"feature={self.feature!r}", wanted="cls.<k> or embedding"
            )


class Prototypes(nn.Module):
    """Compare each query with the support videos of each class."""

    uses_class_names = False
    is_transductive = False

    def __init__(self, feature: str, comparison: Alignment, normalise: bool) -> None:
        super().__init__()
        self.feature, self.comparison, self.normalise = feature, comparison, normalise

    def episode_logits(self, bank: FeatureBatch, support: Tensor, query: Tensor, text: Tensor | None = None) -> Tensor:
        """Score queries [n, Q] against supports [n, W, K], rows of a bank of V videos: logits [n, Q, W]."""
        clips = Clips.of(bank, self.feature)
        clips = Clips(normalize(clips.frames, dim=-1), clips.mask) if self.normalise else clips
        return self.comparison(clips, clips, query, support)


def _build(config: Config, context: HeadContext) -> nn.Module:
    comparison = Alignment(config.metric, config.shots, config.lam, config.eps)
    return Prototypes(canonical_feature(config.feature, context.shape.layers), comparison, config.normalise)


HEAD = HeadSpec(
    config=Config,
    build=_build,
    needs=lambda config: (config.feature,),
    tasks=frozenset({"episodes"}),
    source="Prototypical Networks, Snell et al. 2017, arXiv:1703.05175; OTAM, Cao et al. 2020, arXiv:1906.11415",
    is_trained=False,
)
