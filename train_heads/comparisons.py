"""What scores the queries of episodes against their supports, whatever features a head makes of them.

A comparison is a module called with (query, support, query_rows, support_rows): two banks of clips, which may be one,
and the episodes' rows of them [n, Q] and [n, W, K]. It gives logits [n, Q, W]; larger is closer.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from ..data_manifests.errors import ConfigError
from .alignment import METRICS
from .clips import Clips
from .relations import TemporalRelations

COMPARISONS = (*METRICS, "trx")
SHOTS = ("dist_mean", "proto_mean")
PAIRS_AT_ONCE = 1600  # pairs of videos whose frames and distances still lie in a core's cache


class Alignment(nn.Module):
    """Compare by a metric of frames. It has nothing to train.

    Args:
        metric: one of METRICS.
        shots: dist_mean, the mean of the logits of the K support videos; or proto_mean, the logits of their mean.
        lam: softness of OTAM's minimum.
        eps: added to the product of norms in a frame cosine.
    """

    def __init__(self, metric: str, shots: str, lam: float = 0.5, eps: float = 0.0) -> None:
        super().__init__()
        options = {"mean_cosine": {}, "otam": {"lam": lam, "eps": eps}, "bi_mhm": {"eps": eps}}
        self.metric, self.shots = partial(METRICS[metric], **options[metric]), shots

    def forward(self, query: Clips, support: Clips, query_rows: Tensor, support_rows: Tensor) -> Tensor:
        """Score queries [n, Q] against supports [n, W, K], rows of their banks: logits [n, Q, W]."""
        n_pairs = query_rows.numel() * support_rows[0].numel()
        if self.shots == "dist_mean" and len(query.frames) * len(support.frames) <= n_pairs:
            return _look_up(self._all_pairs(query, support), support_rows, query_rows)
        chunk = max(1, PAIRS_AT_ONCE * len(query_rows) // n_pairs)
        rows = zip(query_rows.split(chunk), support_rows.split(chunk), strict=True)
        return torch.cat([self.of_episodes(query.at(q), support.at(s)) for q, s in rows])

    def of_episodes(self, query: Clips, support: Clips) -> Tensor:
        """Score queries [n, Q, T, E] against supports [n, W, K, T, E]: logits [n, Q, W]."""
        n_ways = support.frames.shape[1]
        if self.shots == "proto_mean":
            support = support.mean_shot()
            return self.metric(query.frames, support.frames, query.mask, support.mask)
        frames = rearrange(support.frames, "n w k t e -> n (w k) t e")
        mask = None if support.mask is None else rearrange(support.mask, "n w k t -> n (w k) t")
        logits = self.metric(query.frames, frames, query.mask, mask)  # [n, Q, W·K]
        return reduce(logits, "n q (w k) -> n q w", "mean", w=n_ways)

    def _all_pairs(self, query: Clips, support: Clips) -> Tensor:
        """Logits [V, V'] of every video of one bank against every video of the other, a block of rows at a time."""
        rows = torch.arange(len(query.frames), device=query.frames.device)
        blocks = (query.at(block) for block in rows.split(max(1, PAIRS_AT_ONCE // len(support.frames))))
        return torch.cat([self.metric(block.frames, support.frames, block.mask, support.mask) for block in blocks])


def build_comparison(
    metric: str, shots: str, width: int, n_frames: int, *, lam: float = 0.5, eps: float = 0.0
) -> nn.Module:
    """The comparison of a name: a metric of frames, or `trx`, which is trained and has shots and softness of its own."""
    if metric == "trx":
        return TemporalRelations(width, n_frames)
    return Alignment(metric, shots, lam, eps)


def require_comparison(
    metric: str, shots: str, lam: float, metrics: Iterable[str] = COMPARISONS, fusions: Iterable[str] = SHOTS
) -> None:
    """Refuse settings that name no comparison.

    Raises:
        ConfigError: no such metric or fusion of shots, or an impossible softness.
    """
    if metric not in metrics:
        raise ConfigError("no such metric", seen=metric, wanted=" or ".join(metrics))
    if shots not in fusions:
        raise ConfigError("no such fusion of shots", seen=shots, wanted=" or ".join(fusions))
    if lam <= 0:
        raise ConfigError("OTAM's softness is above 0", seen=f"lam={lam}")


def _look_up(logits: Tensor, support: Tensor, query: Tensor) -> Tensor:
    """Mean over shots of stored logits [V, V']: [n, Q, W]."""
    pairs = rearrange(query, "n q -> n q 1 1"), rearrange(support, "n w k -> n 1 w k")
    return logits[pairs].mean(dim=-1)
