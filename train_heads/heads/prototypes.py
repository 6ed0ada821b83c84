"""Few-shot recognition with nothing to train: the class whose support videos are closest under an alignment metric.

Source: Prototypical Networks, Snell et al. 2017, arXiv:1703.05175, with the metrics of OTAM (arXiv:1906.11415) and
    HyRSM (arXiv:2204.13423) on frozen CLIP: the "CLIP-Freeze" rows of CLIP-FSAR, Wang et al. 2023, arXiv:2303.02982.
Differs: frames have length one before anything is averaged, and their cosine is exact; `normalise = false` with `eps =
    0.01` is the published code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn.functional import normalize

from ...data_manifests.errors import ConfigError
from ...extract.batches import FeatureBatch
from ...extract.specs import canonical_feature
from ..alignment import METRICS
from ..specs import HeadContext, HeadSpec

PAIRS_AT_ONCE = 1600  # pairs of videos whose frames and distances still lie in a core's cache


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
        if self.metric not in METRICS:
            raise ConfigError("no such metric", seen=self.metric, wanted=" or ".join(METRICS))
        if self.shots not in ("dist_mean", "proto_mean"):
            raise ConfigError("no such fusion of shots", seen=self.shots, wanted="dist_mean or proto_mean")
        if self.lam <= 0:
            raise ConfigError("OTAM's softness is above 0", seen=f"lam={self.lam}")
        if self.feature.partition(".")[0] not in ("cls", "embedding"):
            raise ConfigError(
                "prototypes reads one vector a frame", seen=f"feature={self.feature!r}", wanted="cls.<k> or embedding"
            )


class Prototypes(nn.Module):
    """Compare each query with the support videos of each class."""

    uses_class_names = False
    is_transductive = False

    def __init__(self, feature: str, metric: Callable[..., Tensor], shots: str, normalise: bool) -> None:
        super().__init__()
        self.feature, self.metric, self.shots, self.normalise = feature, metric, shots, normalise

    def episode_logits(self, bank: FeatureBatch, support: Tensor, query: Tensor, text: Tensor | None = None) -> Tensor:
        """Score queries [n, Q] against supports [n, W, K], rows of a bank of V videos: logits [n, Q, W]."""
        frames = bank[self.feature]  # [V, T, E]
        frames = normalize(frames, dim=-1) if self.normalise else frames
        mask = None if bank.mask.all() else bank.mask
        n_pairs = query.numel() * support[0].numel()
        if self.shots == "dist_mean" and len(bank) ** 2 <= n_pairs:
            return self._look_up(self._all_pairs(frames, mask), support, query)

        chunk = max(1, PAIRS_AT_ONCE * len(query) // n_pairs)
        logits = [
            self._compare(frames, mask, support[start : start + chunk], query[start : start + chunk])
            for start in range(0, len(query), chunk)
        ]
        return torch.cat(logits)

    def _compare(self, frames: Tensor, mask: Tensor | None, support: Tensor, query: Tensor) -> Tensor:
        """Score a few episodes by gathering their frames."""
        q, s = _gather(frames, query), _gather(frames, support)  # [n, Q, T, E], [n, W, K, T, E]
        q_mask = None if mask is None else _gather(mask, query)  # [n, Q, T]
        s_mask = None if mask is None else _gather(mask, support)  # [n, W, K, T]
        if self.shots == "proto_mean":
            s, s_mask = _mean_shot(s, s_mask)  # [n, W, T, E], [n, W, T]
            return self.metric(q, s, q_mask, s_mask)
        s = rearrange(s, "n w k t e -> n (w k) t e")
        s_mask = None if s_mask is None else rearrange(s_mask, "n w k t -> n (w k) t")
        logits = self.metric(q, s, q_mask, s_mask)  # [n, Q, W·K]
        return reduce(logits, "n q (w k) -> n q w", "mean", w=support.shape[1])

    def _all_pairs(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        """Logits [V, V] of every video against every other, a block of rows at a time."""
        rows = max(1, PAIRS_AT_ONCE // len(frames))
        masks = repeat(None) if mask is None else mask.split(rows)
        blocks = zip(frames.split(rows), masks, strict=False)  # repeat() has no end
        return torch.cat([self.metric(block, frames, block_mask, mask) for block, block_mask in blocks])

    def _look_up(self, logits: Tensor, support: Tensor, query: Tensor) -> Tensor:
        """Mean over shots of stored logits [V, V]: [n, Q, W]."""
        pairs = rearrange(query, "n q -> n q 1 1"), rearrange(support, "n w k -> n 1 w k")
        return logits[pairs].mean(dim=-1)


def _gather(bank: Tensor, rows: Tensor) -> Tensor:
    """Rows of a bank [V, ...] by an index of any shape."""
    # Whole rows of a flat bank: indexing with `bank[rows]` copies frame by frame, three times slower.
    return bank.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _mean_shot(frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Average K videos frame by frame: [n, W, K, T, E] -> [n, W, T, E]; a frame counts where its video has it."""
    if mask is None:
        return frames.mean(dim=2), None
    real = rearrange(mask, "n w k t -> n w k t 1")
    return frames.masked_fill(~real, 0).sum(dim=2) / real.sum(dim=2).clamp_min(1), mask.any(dim=2)


def _build(config: Config, context: HeadContext) -> nn.Module:
    options = {"mean_cosine": {}, "otam": {"lam": config.lam, "eps": config.eps}, "bi_mhm": {"eps": config.eps}}
    metric = partial(METRICS[config.metric], **options[config.metric])
    return Prototypes(canonical_feature(config.feature, context.shape.layers), metric, config.shots, config.normalise)


HEAD = HeadSpec(
    config=Config,
    build=_build,
    needs=lambda config: (config.feature,),
    tasks=frozenset({"episodes"}),
    source="Prototypical Networks, Snell et al. 2017, arXiv:1703.05175; OTAM, Cao et al. 2020, arXiv:1906.11415",
    is_trained=False,
)
