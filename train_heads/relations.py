"""TRX's comparison: tuples of a query's frames find their like among the tuples of a class.

Letters: O frames of a tuple, P tuples of a video, H width of keys and values, U tuples of all shots of a class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from ..data_manifests.errors import ConfigError
from .clips import Clips, gather

FLOATS_AT_ONCE = 2**21  # of scores and mixed values: a core's cache holds them, and main memory is twice as slow
MOST_TUPLES = 5000
POSITIONS = ("matched", "published")


class Tuples(NamedTuple):
    """All ordered tuples of the frames of some videos."""

    keys: Tensor  # [V, P, H]
    values: Tensor  # [V, P, H]
    mask: Tensor | None  # [V, P] bool, True where the frames of a tuple are real; None where all are


class TemporalRelations(nn.Module):
    """Minus the squared distance of a query's tuples to what each finds in a class, averaged over lengths of tuples.

    Args:
        width: of a frame, E.
        n_frames: T of the usual video, which a refusal of too many tuples is judged by.
        cardinalities: frames of a tuple.
        hidden: width of keys and values.
        dropout: of frames and their positions.
        positions: matched, frames at unit RMS and sinusoids as they are; published, frames as they are, sinusoids × 0.1.

    Raises:
        ConfigError: no tuples, or too many of them.
    """

    def __init__(
        self,
        width: int,
        n_frames: int,
        cardinalities: Sequence[int] = (2, 3),
        hidden: int = 1152,
        dropout: float = 0.1,
        positions: str = "matched",
    ) -> None:
        super().__init__()
        for length in cardinalities:
            if (n_tuples := math.comb(n_frames, length)) > MOST_TUPLES:
                raise ConfigError(
                    f"{n_frames} frames have {n_tuples:,} tuples of {length}",
                    wanted=f"at most {MOST_TUPLES:,}",
                    fix="Use fewer frames, or smaller cardinalities.",
                )
        self.is_scaled = positions == "matched"
        self.relations = nn.ModuleList(TupleAttention(width, length, hidden) for length in cardinalities)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Clips, support: Clips, query_rows: Tensor, support_rows: Tensor) -> Tensor:
        """Score queries [n, Q] against supports [n, W, K], rows of their banks [V, T, E]: logits [n, Q, W]."""
        placed = self._placed(query)
        others = placed if support is query else self._placed(support)
        # One after the other: the tuples of a large bank are gigabytes.
        logits = [relation(placed, others, query_rows, support_rows) for relation in self.relations]
        return torch.stack(logits).mean(dim=0)

    def _placed(self, clips: Clips) -> Clips:
        """The frames with their places in time."""
        frames = clips.frames
        places = sinusoids(frames.shape[-2], frames.shape[-1]).to(frames)
        frames = rms_norm(frames, frames.shape[-1:]) + places if self.is_scaled else frames + 0.1 * places
        return Clips(self.dropout(frames), clips.mask)


class TupleAttention(nn.Module):
    """Keys and values of the tuples of one length, and the attention of a query's tuples over those of a class."""

    def __init__(self, width: int, length: int, hidden: int) -> None:
        super().__init__()
        self.length = length
        self.key = nn.Linear(length * width, hidden)
        self.value = nn.Linear(length * width, hidden)
        self.key_norm = nn.LayerNorm(hidden)

    def forward(self, query: Clips, support: Clips, query_rows: Tensor, support_rows: Tensor) -> Tensor:
        """Minus the mean squared distance of queries [n, Q] to the classes of supports [n, W, K]: [n, Q, W]."""
        queries = self.tuples(query)
        supports = queries if support is query else self.tuples(support)
        n_tuples, hidden = queries.keys.shape[1:]
        n_seen = support_rows[0].numel() * supports.keys.shape[1]  # tuples of an episode's supports
        size = query_rows.shape[1] * n_tuples * (n_seen + hidden * support_rows.shape[1])
        chunk = max(1, FLOATS_AT_ONCE // size)
        rows = zip(query_rows.split(chunk), support_rows.split(chunk), strict=True)
        return torch.cat([_compare(queries, supports, q, s) for q, s in rows])

    def tuples(self, clips: Clips) -> Tuples:
        """All ordered tuples of the frames [V, T, E]; of a video shorter than one, its last frame stands in again."""
        frames, mask, device = clips.frames, clips.mask, clips.frames.device
        places = torch.arange(max(frames.shape[1], self.length), device=device)
        picked = torch.tensor(list(combinations(places.tolist(), self.length)), device=device)  # [P, O]
        if mask is None:
            frames = frames[:, places.clamp_max(frames.shape[1] - 1)] if len(places) > frames.shape[1] else frames
        else:
            n_real = rearrange(mask.sum(dim=-1).clamp_min(1), "v -> v 1")
            last = torch.minimum(places, n_real - 1)  # [V, T], each frame while there are real ones, then the last
            frames = frames.take_along_dim(rearrange(last, "v t -> v t 1"), dim=1)
            mask = picked[:, -1] < n_real.clamp_min(self.length)  # [V, P]
        keys = self.key_norm(self._of_tuples(self.key, frames, picked))
        return Tuples(keys, self._of_tuples(self.value, frames, picked), mask)

    def _of_tuples(self, layer: nn.Linear, frames: Tensor, picked: Tensor) -> Tensor:
        """A linear layer of joined frames [V, P, O·E]: each frame once at each place of a tuple, then sums of those."""
        weight = rearrange(layer.weight, "h (o e) -> o h e", o=self.length)
        parts = einsum(frames, weight, "v t e, o h e -> o v t h")
        return layer.bias + sum(part[:, place] for part, place in zip(parts, picked.T, strict=True))


def _compare(query: Tuples, support: Tuples, query_rows: Tensor, support_rows: Tensor) -> Tensor:
    """`TupleAttention.forward` of a few episodes."""
    sizes = {"q": query_rows.shape[1], "w": support_rows.shape[1]}
    q = rearrange(gather(query.keys, query_rows), "n q p h -> n (q p) h")
    k = rearrange(gather(support.keys, support_rows), "n w k p h -> n (w k p) h")
    v = rearrange(gather(support.values, support_rows), "n w k p h -> n w (k p) h")
    scores = rearrange(q @ k.mT / q.shape[-1] ** 0.5, "n qp (w u) -> n w qp u", w=sizes["w"])
    if support.mask is not None:
        readable = rearrange(gather(support.mask, support_rows), "n w k p -> n w 1 (k p)")
        scores = scores.masked_fill(~readable, -math.inf)
    found = scores.softmax(dim=-1) @ v  # [n, W, Q·P, H]
    own = rearrange(gather(query.values, query_rows), "n q p h -> n 1 (q p) h")
    distance = rearrange((own.float() - found.float()).square().sum(dim=-1), "n w (q p) -> n q w p", q=sizes["q"])
    if query.mask is None:
        return -distance.mean(dim=-1)
    counted = rearrange(gather(query.mask, query_rows), "n q p -> n q 1 p")
    return -distance.masked_fill(~counted, 0).sum(dim=-1) / counted.sum(dim=-1)


def sinusoids(n_frames: int, width: int) -> Tensor:
    """Sines and cosines of the place in time, in turns, [T, E].

    Source: Vaswani et al. 2017, arXiv:1706.03762, §3.5.
    """
    places = rearrange(torch.arange(n_frames, dtype=torch.float32), "t -> t 1")
    angles = places * torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))  # [T, E/2, rounded up]
    return rearrange(torch.stack([angles.sin(), angles.cos()]), "two t e -> t (e two)")[:, :width]
