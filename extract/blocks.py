"""The frozen blocks of a tower, opened: where a method puts something of its own, and what it may ask of the block.

A block of CLIP is x + attention(ln_1 x), then x + MLP(ln_2 x). An `Insert` may change the stream before either of them,
give attention more tokens to read, and change what either of them adds. The weights are the tower's own, shared and
never copied, so gradients flow through them to the inserts below and none reaches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint as checkpoint_of

from ..data_manifests.errors import ConfigError, UnknownName
from .weights import TowerError


class Insert(nn.Module):
    """What a method puts into one block: override the points that it uses, the others leave all as it is.

    The stream x is [B, T, 1+N, D] in the image tower, class token first, and [C, S, D] in the text tower. `mask` [B, T]
    is True at real frames, None where all are. Nothing is changed in place.
    """

    def before_attention(self, x: Tensor, block: Block, mask: Tensor | None) -> Tensor:
        """The stream as attention and all that follows shall see it."""
        return x

    def extra_tokens(self, x: Tensor, block: Block, mask: Tensor | None) -> Tensor | None:
        """Tokens [..., M, D] that the others may attend to in this block; they end with its attention."""
        return None

    def after_attention(self, attended: Tensor) -> Tensor:
        """What attention adds to the stream."""
        return attended

    def before_mlp(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The stream as the MLP shall see it; of a last block it may be the class token alone, [B, T, 1, D]."""
        return x

    def after_mlp(self, added: Tensor, normed: Tensor) -> Tensor:
        """What the MLP adds to the stream, beside ln_2 of the stream, which it read."""
        return added


Inserts = Sequence[Insert | None] | nn.ModuleList  # of Insert


class Block:
    """One frozen block of either tower."""

    def __init__(self, module: Any, causal: Tensor | None = None) -> None:
        """Open a residual attention block of open_clip; `causal` is the additive mask [S, S] of a text tower."""
        self.module, self.causal = module, causal
        self.heads: int = module.attn.num_heads

    def __call__(
        self, x: Tensor, insert: Insert | None = None, mask: Tensor | None = None, class_token_only: bool = False
    ) -> Tensor:
        """Run the block on [..., S, D]; `class_token_only` gives back [..., 1, D] and computes no other token."""
        insert = insert or _NOTHING
        x = insert.before_attention(x, self, mask)
        extra = insert.extra_tokens(x, self, mask)
        read = x if extra is None else torch.cat([x, extra], dim=-2)
        x = x[..., :1, :] if class_token_only else x
        return self.finish(x, self.attend(x, None if read is x else read), insert, mask)

    def finish(self, x: Tensor, attended: Tensor, insert: Insert | None = None, mask: Tensor | None = None) -> Tensor:
        """The block from its attention on: the stream [..., S, D] that went in, and what was attended to, [..., S, D]."""
        insert = insert or _NOTHING
        x = x + insert.after_attention(self.module.ls_1(attended))
        x = insert.before_mlp(x, mask)
        normed = self.module.ln_2(x)
        return x + insert.after_mlp(self.module.ls_2(self.module.mlp(normed)), normed)

    def attend(self, x: Tensor, read: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The block's attention of ln_1(x) to ln_1(read), without the residual.

        Args:
            x: [..., S, D].
            read: [..., U, D]; None is x itself, which a text tower reads causally.
            mask: [..., U] bool, True where a token of `read` may be attended to.

        Returns:
            [..., S, D]; finite, but without meaning where the mask lets nothing be read.
        """
        attn, per_head = self.module.attn, {"h": self.heads}
        width = x.shape[-1]
        weight, bias = attn.in_proj_weight, attn.in_proj_bias
        normed = self.module.ln_1(x)
        if read is None:
            all_three = linear(normed, weight, bias)
            q, k, v = rearrange(all_three, "... s (three h d) -> three ... h s d", three=3, **per_head)
        else:
            q = rearrange(linear(normed, weight[:width], bias[:width]), "... s (h d) -> ... h s d", **per_head)
            both = linear(self.module.ln_1(read), weight[width:], bias[width:])
            k, v = rearrange(both, "... u (two h d) -> two ... h u d", two=2, **per_head)
        allowed = self.causal if read is None else None
        if allowed is not None:
            allowed = allowed[: x.shape[-2], : x.shape[-2]].to(q.dtype)
        elif mask is not None:
            nobody = ~mask.any(dim=-1, keepdim=True)
            allowed = rearrange(mask | nobody, "... u -> (...) 1 1 u")
        leading = q.shape[:-3]
        flat = (part.reshape(-1, *part.shape[-3:]) for part in (q, k, v))
        mixed = scaled_dot_product_attention(*flat, attn_mask=allowed).reshape(*leading, *q.shape[-3:])
        return attn.out_proj(rearrange(mixed, "... h s d -> ... s (h d)"))

    def query_key(self) -> QueryKey:
        """Queries and keys of this block by themselves."""
        norm, attn = self.module.ln_1, self.module.attn
        rows = 2 * norm.weight.shape[0]  # in_proj holds queries, then keys, then values
        return QueryKey(
            ln_weight=norm.weight.detach(),
            ln_bias=norm.bias.detach(),
            weight=attn.in_proj_weight[:rows].detach(),
            bias=attn.in_proj_bias[:rows].detach(),
            heads=self.heads,
            eps=norm.eps,
        )


@dataclass(frozen=True, slots=True, eq=False)
class QueryKey:
    """The frozen map from tokens.<k-1> to the queries and keys of block k, its tables in float32."""

    ln_weight: Tensor  # [D]
    ln_bias: Tensor  # [D]
    weight: Tensor  # [2D, D], queries then keys
    bias: Tensor  # [2D]
    heads: int
    eps: float

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [..., heads, D/heads] of tokens [..., D]: with bias, before scaling."""
        normed = layer_norm(tokens.float(), self.ln_weight.shape, self.ln_weight, self.ln_bias, self.eps)
        both = linear(normed, self.weight, self.bias)  # [..., 2D]
        q, k = rearrange(both, "... (two h d) -> two ... h d", two=2, h=self.heads)
        return q, k


def open_block(blocks: Any, layer: int, model: str, causal: Tensor | None = None) -> Block:
    """Block `layer`, counted from 1, of a tower of this model.

    Raises:
        UnknownName: the tower has no such block.
        TowerError: its attention is not CLIP's.
    """
    if not 1 <= layer <= len(blocks):
        raise UnknownName("block", str(layer), map(str, range(1, len(blocks) + 1)))
    module = blocks[layer - 1]
    if not isinstance(getattr(module, "attn", None), nn.MultiheadAttention):
        raise TowerError(f"the attention of {model} is not CLIP's, so nothing can be put into its blocks")
    return Block(module, causal)


def run_blocks(
    x: Tensor,
    blocks: Sequence[Block],
    inserts: Inserts = (),
    mask: Tensor | None = None,
    class_token_only: bool = False,
    checkpoint: bool = False,
) -> Tensor:
    """The stream after some blocks, the last of which have inserts; arguments as in `Tower.resume`."""
    if len(inserts) > len(blocks):
        raise ValueError(f"{len(inserts)} inserts for {len(blocks)} blocks")
    insert_of: list[Any] = [None] * (len(blocks) - len(inserts)) + list(inserts)
    for block, insert in zip(blocks, insert_of, strict=True):
        rest = (insert, mask, class_token_only and block is blocks[-1])
        is_kept = not checkpoint or not torch.is_grad_enabled()
        x = block(x, *rest) if is_kept else checkpoint_of(block, x, *rest, use_reentrant=False)
    return x


def expect_layers(first: int, last: int, n_layers: int) -> None:
    """Refuse a pass between layers that a tower lacks, or downwards."""
    for layer in (first, last):
        if not 0 <= layer <= n_layers:
            raise UnknownName("layer", str(layer), map(str, range(n_layers + 1)))
    if first > last:
        raise ConfigError("a pass goes upwards", seen=f"from layer {first} to layer {last}")


_NOTHING = Insert()
