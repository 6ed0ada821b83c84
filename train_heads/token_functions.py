"""Differentiable functions over all tokens of a video, with hand-written backward passes.

Tokens are what a training step from cached features spends its time on: T·(1+N)·D numbers a layer. Written out, a layer
reads them about twenty times and keeps one copy for the backward pass; composed of library layers it is twice that.
"""

# pyright: reportIncompatibleMethodOverride=false
# autograd.Function declares backward(ctx, *grads); naming the gradients is the point.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_neighbours(tokens: Tensor, kernel: Tensor | None, offset: Tensor) -> Tensor:
    """Add to frozen tokens their depthwise convolution over time, and an offset a frame.

    Args:
        tokens: [B, T, S, D]; no gradient flows to them.
        kernel: [D, 1, 3], as nn.Conv1d has it, with zeros before and after the video; None adds no convolution.
        offset: [T, D].

    Returns:
        A new tensor [B, T, S, D].
    """
    return _AddNeighbours.apply(tokens, kernel, offset)


@torch.no_grad()
def bin_by_displacement(
    queries_and_keys: Callable[[Tensor], tuple[Tensor, Tensor]], tokens: Tensor, mask: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Attention of each patch to the previous and to the next frame, averaged over heads and laid out by displacement.

    The patches of a row reach gh of the 2gh-1 rows of displacements, and those of a block of w columns reach c = w + gw - 1
    of the 2gw-1 columns. In n = 2 blocks, 0.38 of a 14 × 14 grid's displacements are left to multiply with a table.

    Args:
        queries_and_keys: frozen, of tokens [T, 1+N, D] each [T, 1+N, heads, d].
        tokens: [B, T, 1+N, D], class token first; it neither looks nor is looked at.
        mask: [B, T]; a frame and a padded neighbour give zeros.
        grid: (gh, gw), patches down and across.

    Returns:
        float32 [2, n, gh, B·(T-1)·w, gh·c], previous then next. What the patch in row i and in column j of block m gives to
        the patch at (k, l) stands at (gh-1-k, j + gw-1-l) of the last axis: in a table, i rows and m·w columns further.
    """
    (gh, gw), n_pairs = grid, tokens.shape[1] - 1
    n = 1 if gw % 2 else 2
    w = gw // n
    bins = torch.zeros(2, n, gh, len(tokens), n_pairs, w, gh, w + gw - 1, device=tokens.device)
    is_pair = rearrange(mask[:, 1:] & mask[:, :-1], "b t -> b t 1 1")
    for video, frames in enumerate(tokens):  # one at a time: its scores, unlike a batch of them, fit a cache
        q, k = (rearrange(x[:, 1:], "t n h d -> t h n d").contiguous() for x in queries_and_keys(frames))
        q *= q.shape[-1] ** -0.5
        for neighbour, (here, there) in enumerate([(q[1:], k[:-1]), (q[:-1], k[1:])]):
            scores = here @ there.mT
            torch.softmax(scores, dim=-1, out=scores)
            attention = scores.mean(dim=1) * is_pair[video]  # [T-1, N, N]
            # With the keys mirrored, displacement grows with both indices: i - k is i + k' and j - l is j + l'.
            mirrored = rearrange(attention.flip(-1), "t (i m j) (k l) -> m i t j k l", i=gh, m=n, k=gh)
            _sheared(bins[neighbour, :, :, video]).copy_(mirrored)
    return rearrange(bins, "two m i b t j k c -> two m i (b t j) (k c)")


def _sheared(bins: Tensor) -> Tensor:
    """View bins [m, i, t, j, k, c] so that entry l of patch column j is bin j + l: [m, i, t, j, k, c - w + 1]."""
    *sizes, c = bins.shape
    *strides, j, k, step = bins.stride()
    return bins.as_strided((*sizes, c - bins.shape[-3] + 1), (*strides, j + step, k, step), bins.storage_offset())


def add_displacement(x: Tensor, bins: Tensor, previous: Tensor, following: Tensor, grid: tuple[int, int]) -> Tensor:
    """Add to the patch tokens of x, in place, attention by displacement times tables of embeddings.

    Args:
        x: [B, T, 1+N, D], class token first.
        bins: as `bin_by_displacement` lays them out.
        previous, following: [(2gh-1)·(2gw-1), D], a row for each displacement.
        grid: (gh, gw), patches down and across.

    Returns:
        x.
    """
    return _AddDisplacement.apply(x, bins, previous, following, grid)


def mix_normalised(x: Tensor, query: Tensor, shift: Tensor, padding: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Attend to tokens x̂ = (x - mean) / std, and average x̂ under the attention, without forming x̂.

    Always in the precision of the tokens, under autocast too.

    Args:
        x: tokens [B, S, D].
        query: [B, H, D], scaled.
        shift: [B, H], what a head adds to the logits of all tokens alike: it cancels, and its gradient is zero.
        padding: [B, 1, S], True where a token takes no part.

    Returns:
        mixture [B, H, D], attention [B, H, S]; no gradient flows back through the attention returned.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _MixNormalised.apply(x, query.to(x.dtype), shift.to(x.dtype), padding, eps)


class _AddNeighbours(torch.autograd.Function):
    """Three shifted products, where a library's convolution would first transpose every token."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, kernel: Tensor | None, offset: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        offset = rearrange(offset, "t d -> t 1 d")
        if kernel is None:
            return tokens + offset
        before, now, after = rearrange(kernel, "d 1 k -> k d").contiguous()
        x = torch.addcmul(offset, tokens, 1 + now)
        x[:, 1:].addcmul_(tokens[:, :-1], before)
        x[:, :-1].addcmul_(tokens[:, 1:], after)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[None, Tensor | None, Tensor]:
        (tokens,) = ctx.saved_tensors
        d_offset = dx.sum(dim=2).sum(dim=0)  # torch sums over two axes that do not touch ten times slower
        if not ctx.needs_input_grad[1]:
            return None, None, d_offset
        product = torch.empty_like(dx)  # one buffer for the three taps
        shifts = ((slice(1, None), slice(None, -1)), (slice(None), slice(None)), (slice(None, -1), slice(1, None)))
        taps = [torch.mul(dx[:, x], tokens[:, y], out=product[:, x]).sum(dim=2).sum(dim=(0, 1)) for x, y in shifts]
        return None, rearrange(taps, "k d -> d 1 k"), d_offset


class _AddDisplacement(torch.autograd.Function):
    """One product for each row i of each block m: the rows of the table that it reaches lie together.

    The windows of neighbouring rows overlap, which costs a stride in the forward pass and a sum in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bins: Tensor, previous: Tensor, following: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(bins)
        ctx.mark_dirty(x)
        ctx.grid = gh, gw = grid
        n, width = bins.shape[1], x.shape[-1]
        w = gw // n
        c = w + gw - 1
        for frames, seen, table in zip((x[:, 1:], x[:, :-1]), bins, (previous, following), strict=True):
            patches = frames[:, :, 1:].unflatten(2, (gh, n, w))
            blocks = table.unflatten(0, (2 * gh - 1, -1)).unfold(1, c, w)  # [2gh-1, n, D, c]
            blocks = rearrange(blocks, "r n d c -> n (r c) d").contiguous()
            for m in range(n):
                windows = blocks[m].as_strided((gh, gh * c, width), (c * width, width, 1), blocks[m].storage_offset())
                patches[:, :, :, m] += rearrange(seen[m] @ windows, "i (b t j) d -> b t i j d", b=len(x), j=w)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        (bins,) = ctx.saved_tensors
        gh, gw = ctx.grid
        n = bins.shape[1]
        w = gw // n
        c = w + gw - 1
        d_tables = dx.new_zeros(2, 2 * gh - 1, 2 * gw - 1, dx.shape[-1])
        for frames, seen, d_table in zip((dx[:, 1:], dx[:, :-1]), bins, d_tables, strict=True):
            patches = frames[:, :, 1:].unflatten(2, (gh, n, w))
            for m in range(n):
                rows = rearrange(patches[:, :, :, m], "b t i j d -> i (b t j) d")
                d_block = dx.new_zeros((2 * gh - 1) * c, dx.shape[-1])
                for i in range(gh):
                    d_block[i * c : (i + gh) * c].addmm_(seen[m, i].T, rows[i])
                d_table[:, m * w : m * w + c] += d_block.unflatten(0, (-1, c))
        d_previous, d_following = d_tables.flatten(1, 2)
        return dx, None, d_previous, d_following, None


class _MixNormalised(torch.autograd.Function):
    """A query without mean ignores the mean of a token; what the mixture keeps of it is the mixture's own mean.

    So a factor 1 / std a token is all that is left of normalisation, forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, query: Tensor, shift: Tensor, padding: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        query = _centred(query)
        products = torch.cat([query, torch.full_like(query[:, :1], 1 / x.shape[-1])], dim=1) @ x.mT  # [B, H+1, S]
        logits, mean = products[:, :-1], products[:, -1:]
        mean_square = torch.linalg.vector_norm(x, dim=-1).square_().unsqueeze(1) / x.shape[-1]  # [B, 1, S]
        inverse_std = (mean_square - mean.square()).clamp_min_(0).add_(eps).rsqrt_()
        logits = logits * inverse_std
        attention = logits.masked_fill(padding, float("-inf")).softmax(dim=-1)
        mixture = _centred((attention * inverse_std) @ x)  # [B, H, D]
        ctx.save_for_backward(x, query, logits, mean, inverse_std, attention)
        ctx.mark_non_differentiable(attention)
        return mixture, attention

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, query, logits, mean, inverse_std, attention = ctx.saved_tensors
        grad = _centred(grad)
        d_attention = (grad @ x.mT) * inverse_std  # [B, H, S]
        d_logits = attention * (d_attention - (attention * d_attention).sum(dim=-1, keepdim=True))
        d_query = _centred((d_logits * inverse_std) @ x)
        d_shift = torch.zeros_like(query[..., 0])
        if not ctx.needs_input_grad[0]:
            return None, d_query, d_shift, None, None
        # LayerNorm's dx = (dx̂ - mean(dx̂) - x̂ · mean(dx̂ · x̂)) / std; dx̂ is a mixture of the queries and of grad.
        along = (d_logits * logits + attention * d_attention).sum(dim=1, keepdim=True) / x.shape[-1]  # mean(dx̂ · x̂)
        along = along * inverse_std.square()
        weights = torch.cat([d_logits * inverse_std, attention * inverse_std, along * mean], dim=1)  # [B, 2H+1, S]
        vectors = torch.cat([query, grad, torch.ones_like(query[:, :1])], dim=1)  # [B, 2H+1, D]
        dx = (x * -along.mT).baddbmm_(weights.mT, vectors)
        return dx, d_query, d_shift, None, None


def _centred(x: Tensor) -> Tensor:
    """Take the mean over the last axis away."""
    return x - x.mean(dim=-1, keepdim=True)
