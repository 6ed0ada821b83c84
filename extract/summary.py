"""What the last changed block needs of a frame, without its patches: the feature `summary.<k>`.

Only the class token leaves the last block of a CLIP. Where the blocks below are as they were, that token's query and all
keys and values of the frame are constants. A method that adds tokens to block k+1, and lets no patch token be changed, then
needs of tokens.<k> [1+N, D] these numbers alone, in this order:

    class_token [D]   the class token itself
    mean        [D]   the mean of all 1+N tokens
    read        [D]   what the class token's heads read of the 1+N tokens in block k+1: Σ_j softmax_j(s) v_j, per head
    lse     [heads]   log Σ_j exp(s_j) of each head, s_j = q·k_j / √(D/heads): what the softmax was divided by
            [heads]   the rest of it: the first part is rounded to bfloat16, so that the sum of both keeps its sixth digit
                      in a store of 16 bits, while every other number is rounded as in any store

That is 3D + 2·heads numbers a frame, a sixty-fifth of the tokens of a ViT-B/16. Attention to further tokens follows exactly:
a new score s takes the share sigmoid(s - lse) of a head. Keys and values are those of ln_1 of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn.functional import linear

from .blocks import Block


class FrameSummary(NamedTuple):
    """The parts of `summary.<k>`, of frames [...]."""

    class_token: Tensor  # [..., D]
    mean: Tensor  # [..., D]
    read: Tensor  # [..., D], heads one after the other
    lse: Tensor  # [..., heads]


def summarise(tokens: Tensor, block: Block) -> FrameSummary:
    """What block k+1 needs of tokens.<k> [..., 1+N, D], in float32.

    No key or value is made: the query goes into the space of the tokens, and the tokens' mixture out of it.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = tokens.float()
        normed = block.module.ln_1(tokens)
        weight, bias = block.module.attn.in_proj_weight, block.module.attn.in_proj_bias
        (_, key, value), (_, key_bias, value_bias) = (
            rearrange(both, "(three h c) ... -> three h c ...", three=3, h=block.heads) for both in (weight, bias)
        )
        q = _queries(tokens[..., 0, :], block)
        absorbed = einsum(q, key, "... h c, h c d -> ... h d")
        shift = einsum(q, key_bias, "... h c, h c -> ... h")
        scores = einsum(absorbed, normed, "... h d, ... s d -> ... h s") + rearrange(shift, "... h -> ... h 1")
        mixed = einsum(scores.softmax(dim=-1), normed, "... h s, ... s d -> ... h d")
        read = einsum(mixed, value, "... h d, h c d -> ... h c") + value_bias
        return FrameSummary(
            tokens[..., 0, :], tokens.mean(dim=-2), rearrange(read, "... h c -> ... (h c)"), scores.logsumexp(dim=-1)
        )


def pack(summary: FrameSummary) -> Tensor:
    """The stored feature, [..., 3D + 2·heads]."""
    high = summary.lse.to(torch.bfloat16).to(summary.lse.dtype)
    return torch.cat([*summary[:3], high, summary.lse - high], dim=-1)


def unpack(packed: Tensor, heads: int) -> FrameSummary:
    """The inverse of `pack`, in float32."""
    packed = packed.float()
    width = (packed.shape[-1] - 2 * heads) // 3
    class_token, mean, read, high, low = packed.split([width, width, width, heads, heads], dim=-1)
    return FrameSummary(class_token, mean, read, high + low)


def attend(summary: FrameSummary, extra: Tensor | None, block: Block) -> Tensor:
    """The attention of the class token to its frame and to extra tokens [..., M, D], [..., 1, D].

    It equals `block.attend` of the class token to the frame's tokens and the extra ones.
    """
    read = summary.read
    if extra is not None:
        per_head, width = {"h": block.heads}, extra.shape[-1]
        weight, bias = block.module.attn.in_proj_weight, block.module.attn.in_proj_bias
        both = linear(block.module.ln_1(extra), weight[width:], bias[width:])
        k, v = rearrange(both, "... m (two h c) -> two ... h m c", two=2, **per_head)
        scores = einsum(_queries(summary.class_token, block), k, "... h c, ... h m c -> ... h m")
        shares = torch.cat([rearrange(summary.lse, "... h -> ... h 1"), scores.float()], dim=-1).softmax(dim=-1)
        values = torch.cat([rearrange(read, "... (h c) -> ... h 1 c", **per_head), v.float()], dim=-2)
        read = rearrange(einsum(shares, values, "... h m, ... h m c -> ... h c"), "... h c -> ... (h c)")
    return rearrange(block.module.attn.out_proj(read), "... d -> ... 1 d")


def _queries(class_token: Tensor, block: Block) -> Tensor:
    """The scaled queries of class tokens [..., D], [..., heads, D/heads]."""
    width = class_token.shape[-1]
    weight, bias = block.module.attn.in_proj_weight[:width], block.module.attn.in_proj_bias[:width]
    q = rearrange(linear(block.module.ln_1(class_token), weight, bias), "... (h c) -> ... h c", h=block.heads)
    return q / q.shape[-1] ** 0.5
