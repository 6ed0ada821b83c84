"""How alike are two videos, frame by frame: the temporal metrics of few-shot recognition.

Pure, differentiable functions. Letters beside the house's: `S` support videos, `U` frames of a support video (`T` are
the query's), `P` pairs of videos, `...` any leading axes, usually episodes. Masks are True at real frames, which come
before all padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from einops import rearrange
from torch import Tensor

from .layers import cosines


def mean_cosine(
    query: Tensor, support: Tensor, query_mask: Tensor | None = None, support_mask: Tensor | None = None
) -> Tensor:
    """Compare videos by the cosine between the means of their frames.

    Args:
        query: [..., Q, T, E].
        support: [..., S, U, E].
        query_mask: [..., Q, T] bool.
        support_mask: [..., S, U] bool.

    Returns:
        logits [..., Q, S] in [-1, 1].

    Source: the ProtoNet / TSN baseline of few-shot video papers, e.g. OTAM, Cao et al. 2020, arXiv:1906.11415.
    Differs: nothing.
    """
    q, s = _mean_over_frames(query, query_mask), _mean_over_frames(support, support_mask)  # [..., Q, E], [..., S, E]
    return cosines(q, s)


def otam(
    query: Tensor,
    support: Tensor,
    query_mask: Tensor | None = None,
    support_mask: Tensor | None = None,
    *,
    lam: float = 0.5,
    eps: float = 0.0,
    both_directions: bool = True,
) -> Tensor:
    """Compare videos by ordered temporal alignment; arguments as in `mean_cosine` and `otam_cost`.

    Returns:
        logits [..., Q, S]: minus the soft cost of the alignment.
    """
    distance = frame_distance(query, support, eps)
    return -otam_cost(distance, lam, both_directions, *_pair_masks(query_mask, support_mask))


def bi_mhm(
    query: Tensor,
    support: Tensor,
    query_mask: Tensor | None = None,
    support_mask: Tensor | None = None,
    *,
    eps: float = 0.0,
) -> Tensor:
    """Compare videos by their bidirectional mean Hausdorff distance; arguments as in `mean_cosine`.

    Returns:
        logits [..., Q, S]: minus the cost.
    """
    return -bi_mhm_cost(frame_distance(query, support, eps), *_pair_masks(query_mask, support_mask))


METRICS: Mapping[str, Callable[..., Tensor]] = {"bi_mhm": bi_mhm, "mean_cosine": mean_cosine, "otam": otam}


def frame_distance(query: Tensor, support: Tensor, eps: float = 0.0) -> Tensor:
    """Compare every frame of every query with every frame of every support video: 1 - cosine.

    Args:
        query: [..., Q, T, E].
        support: [..., S, U, E].
        eps: added to the product of the two norms. The published few-shot code has 0.01, which shrinks the cosines of
            normalised features by 1 %; 0 is the exact cosine.

    Returns:
        [..., Q, S, T, U] in [0, 2]; 1 for a frame of zeros.
    """
    rows = rearrange(query, "... q t e -> ... (q t) e")
    columns = rearrange(support, "... s u e -> ... (s u) e")
    row_norms = rearrange(_norms(rows), "... q -> ... q 1")
    column_norms = rearrange(_norms(columns), "... s -> ... 1 s")
    with torch.autocast(rows.device.type, enabled=False):  # bfloat16 would round the cosines to two digits
        products = rows @ columns.mT
    # Fused: this matrix, not the product of the frames, is what an episode spends its time on.
    norms = torch.addcmul(rows.new_tensor(eps), row_norms, column_norms)
    distance = torch.addcdiv(rows.new_ones(()), products, norms, value=-1)
    return rearrange(distance, "... (q t) (s u) -> ... q s t u", t=query.shape[-2], u=support.shape[-2])


def otam_cost(
    distance: Tensor,
    lam: float = 0.5,
    both_directions: bool = True,
    row_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
) -> Tensor:
    """Soft cost of the best ordered alignment of two videos.

    In one direction a path matches every column (support frame) to a row (query frame): the row stays or advances by
    one from column to column, and rows are skipped at the two ends only. As lam → 0 the cost becomes the least sum of
    distances along a path; for lam > 0 it is -lam · log Σ exp(-sum / lam) over all paths, so it may be below 0. (Soft
    paths may also run down the first column, through several of its rows; the least never does.)

    Args:
        distance: [..., T, U], at least 1 × 1.
        lam: softness, above 0.
        both_directions: add the cost of the transposed matrix, which makes the sum symmetric.
        row_mask: [..., T] bool, broadcast over the leading axes of `distance`.
        column_mask: [..., U] bool, likewise.

    Returns:
        [...].

    Source: OTAM, Cao et al. 2020, arXiv:1906.11415, as re-implemented in tobyperrett/few-shot-action-recognition
        (lam 0.1) and CLIP-FSAR (lam 0.5).
    Differs: the recursion runs on log Z instead of Z = Σ exp(-cost / lam), which overflows float32 at 16 frames.
    """
    pairs = distance.shape[:-2]
    rows = None if row_mask is None else row_mask.sum(dim=-1).expand(pairs).flatten()  # [P]
    columns = None if column_mask is None else column_mask.sum(dim=-1).expand(pairs).flatten()  # [P]
    scores = rearrange(distance / -lam, "... t u -> t u (...)").contiguous()  # [T, U, P]: P last runs at memory speed
    log_z = _log_partition(scores, rows, columns)  # [P]
    if both_directions:
        log_z = log_z + _log_partition(rearrange(scores, "t u p -> u t p"), columns, rows)
    return -lam * log_z.reshape(pairs)


def bi_mhm_cost(distance: Tensor, row_mask: Tensor | None = None, column_mask: Tensor | None = None) -> Tensor:
    """Each frame's distance to the nearest frame of the other video, summed both ways; blind to order.

    Args:
        distance: [..., T, U].
        row_mask: [..., T] bool, broadcast over the leading axes of `distance`.
        column_mask: [..., U] bool, likewise.

    Returns:
        [...].

    Source: HyRSM, Wang et al. 2022, arXiv:2204.13423.
    Differs: sums over frames as the authors' code does; the paper's equation divides each sum by the frames.
    """
    to_columns, to_rows = distance, distance
    if column_mask is not None:
        to_columns = distance.masked_fill(~rearrange(column_mask, "... u -> ... 1 u"), math.inf)
    if row_mask is not None:
        to_rows = distance.masked_fill(~rearrange(row_mask, "... t -> ... t 1"), math.inf)
    nearest_column, nearest_row = to_columns.amin(dim=-1), to_rows.amin(dim=-2)  # [..., T], [..., U]
    if row_mask is not None:
        nearest_column = nearest_column.masked_fill(~row_mask, 0)
    if column_mask is not None:
        nearest_row = nearest_row.masked_fill(~column_mask, 0)
    return nearest_column.sum(dim=-1) + nearest_row.sum(dim=-1)


def _log_partition(scores: Tensor, n_rows: Tensor | None, n_columns: Tensor | None) -> Tensor:
    """Sum exp(path) over all paths, as a logarithm: one column at a time, all rows and pairs at once.

    Args:
        scores: [T, U, P], -distance / lam.
        n_rows: [P], the real rows of each pair; None where all are.
        n_columns: [P], likewise.

    Returns:
        [P].
    """
    log_2 = scores.new_tensor(math.log(2))
    first = [scores[0, 0]]
    for row in scores[1:, 0]:  # the first column is entered from its own row above, or from two free neighbours
        first.append(row + torch.logaddexp(first[-1], log_2))
    log_z = torch.stack(first)  # [T, P]: all paths that have come to row t of this column

    for column in range(1, scores.shape[1]):
        moved = torch.cat([log_z[:1], torch.logaddexp(log_z[1:], log_z[:-1])]) + scores[:, column]
        log_z = moved if n_columns is None else torch.where(column < n_columns, moved, log_z)

    # The closing column is free and entered from the same row or the one above: every row but the last counts twice.
    row_index = torch.arange(scores.shape[0], device=scores.device)[:, None]  # [T, 1]
    last = scores.shape[0] - 1 if n_rows is None else n_rows - 1
    log_z = torch.where(row_index < last, log_z + log_2, log_z).masked_fill(row_index > last, -math.inf)
    return torch.logsumexp(log_z, dim=0)


def _pair_masks(query_mask: Tensor | None, support_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Masks of videos as masks of pairs: [..., Q, 1, T] and [..., 1, S, U]."""
    return (
        None if query_mask is None else rearrange(query_mask, "... q t -> ... q 1 t"),
        None if support_mask is None else rearrange(support_mask, "... s u -> ... 1 s u"),
    )


def _mean_over_frames(frames: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return frames.mean(dim=-2)
    real = rearrange(mask, "... t -> ... t 1")
    return frames.masked_fill(~real, 0).sum(dim=-2) / real.sum(dim=-2).clamp_min(1)


def _norms(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=-1).clamp_min(1e-12)  # a frame of zeros is at distance 1 from all, not at NaN
