"""Class sentences in a text tower with adapters in its last blocks, where all that no adapter changes is computed once.

Source: M2-CLIP, Wang et al. 2024, arXiv:2401.11649.
Differs: adapters add nothing at first (`init = "original"` is the published draw, which does). What the blocks below the
    first adapter say of a sentence is a constant and is kept; so is what the last block's attention says of its end,
    where that block alone is adapted and only before its MLP. Sentences end with the longest: the tower is causal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..extract.blocks import Block, Insert
from ..extract.towers import TEXTS_AT_ONCE, Tower
from .class_texts import Kept, up_to_the_longest
from .layers import Adapter

INITS = ("identity", "original")
KEPT_BYTES = 2**29  # of streams of sentences that come again; of ViT-B/16, some 18,000 sentences of 14 tokens


class TextInsert(Insert):
    """Adapters in a block of the text tower: before the MLP, and before attention where `both` are wanted."""

    def __init__(self, width: int, hidden: int, both: bool, init: str, lr_share: float = 1.0) -> None:
        super().__init__()
        self.lr_share = lr_share
        self.pre_attention = _adapter(width, hidden, init) if both else None
        self.pre_mlp = _adapter(width, hidden, init)

    def before_attention(self, x: Tensor, block: Block, mask: Tensor | None) -> Tensor:
        """The stream [C, S, D_t], adapted."""
        return x if self.pre_attention is None else x + self.pre_attention(x)

    def before_mlp(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The stream [C, S, D_t], adapted."""
        return x + self.pre_mlp(x)


def _adapter(width: int, hidden: int, init: str) -> Adapter:
    adapter = Adapter(width, hidden)
    nn.init.zeros_(adapter.down.bias)
    if init == "original":
        adapter.up.reset_parameters()
        nn.init.zeros_(adapter.up.bias)
    return adapter


class AdaptedSentences(nn.Module):
    """C sentences, and the last blocks of the text tower with an insert each."""

    constant: Tensor
    ends: Tensor
    share: Tensor | None
    frozen: Tensor

    def __init__(
        self,
        ids: Tensor,
        tower: Tower,
        inserts: nn.ModuleList,
        share: Sequence[float] | None = None,
        checkpoint: bool = False,
    ) -> None:
        """Read token ids [C, S] up to where the inserts begin.

        Args:
            share: of the inserts in each embedding, [C]; the rest is the frozen tower's. None is all of it.
        """
        super().__init__()
        self.tower, self.inserts, self.checkpoint = tower.text, inserts, checkpoint
        self.below = self.tower.layers - len(inserts)
        top = inserts[0]
        self.is_behind_attention = len(inserts) == 1 and isinstance(top, TextInsert) and top.pre_attention is None
        ids = up_to_the_longest(ids).to(tower.device)
        ends = ids.argmax(dim=-1)
        with torch.no_grad(), torch.autocast(tower.device.type, enabled=False):
            constant = torch.cat([self._constant(chunk) for chunk in ids.split(TEXTS_AT_ONCE)])
            frozen = None if share is None else self.tower.project(self.tower.resume(self.tower.embed(ids)), ends)
        if self.is_behind_attention:  # no token reads another any more
            constant, ends = at_places(constant, rearrange(ends, "c -> c 1")), torch.zeros_like(ends)
        shares = None if share is None else torch.tensor(share, device=tower.device)
        for name, buffer in {"constant": constant, "ends": ends, "frozen": frozen, "share": shares}.items():
            self.register_buffer(name, buffer, persistent=False)
        self._kept = Kept(self)
        self._others = KeptStreams(self._constant)

    def forward(self) -> Tensor:
        """Embeddings of the sentences [C, E], of length one where a part is frozen.

        Without gradients they are computed once for each state of the parameters.
        """
        adapted = self._adapted() if torch.is_grad_enabled() else self._kept(self._adapted)
        if self.share is None:
            return adapted
        share = rearrange(self.share, "c -> c 1")
        return share * normalize(adapted, dim=-1) + (1 - share) * normalize(self.frozen, dim=-1)

    def read(self, ids: Tensor, places: Tensor) -> Tensor:
        """Other sentences, token ids [B, S], behind the last block at some places [B, P] of each: [B, P, D_t]."""
        constant = self._others(ids) if self.below or self.is_behind_attention else self._constant(ids)
        if self.is_behind_attention:
            return self._finish(at_places(constant, places))
        return at_places(self._finish(constant), places)

    def _adapted(self) -> Tensor:
        """The embeddings as the inserts have them, [C, E]."""
        return self.tower.project(self._finish(self.constant), self.ends)

    def _constant(self, ids: Tensor) -> Tensor:
        """What no insert changes of token ids [C, S]: the stream below the first of them, [C, S, D_t].

        Where all that is trained lies behind the last block's attention, what that adds follows, [C, S, 2·D_t].
        """
        stream = self.tower.resume(self.tower.embed(ids), to_layer=self.below)
        if not self.is_behind_attention:
            return stream
        return torch.cat([stream, self.tower.block(self.tower.layers).attend(stream)], dim=-1)

    def _finish(self, constant: Tensor) -> Tensor:
        """The stream behind the last block, [C, S, D_t]."""
        if not self.is_behind_attention:
            return self.tower.resume(constant, self.below, inserts=self.inserts, checkpoint=self.checkpoint)
        top: Any = self.inserts[0]
        stream, attended = constant.chunk(2, dim=-1)
        return self.tower.block(self.tower.layers).finish(stream, attended, top)


def at_places(stream: Tensor, places: Tensor) -> Tensor:
    """Tokens of a stream [B, S, D] at places [B, P]: [B, P, D]."""
    return stream[torch.arange(len(stream), device=stream.device)[:, None], places]


class KeptStreams:
    """What the frozen blocks of a text tower say of sentences that come again and again: each is read once."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        """`read` makes [1, S, D] of the token ids [1, S] of a sentence; nothing in it is trained."""
        self._read_one = read
        self._streams: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids [B, S] -> what those blocks say [B, S, D], in float32."""
        rows = [tuple(row) for row in ids.tolist()]
        for row in dict.fromkeys(rows):
            kept = self._streams.pop(row, None)
            if kept is None or kept.device != ids.device:
                kept = self._read(row, ids.device)
            self._streams[row] = kept  # behind those that came earlier
        streams = torch.stack([self._streams[row] for row in rows])
        while len(self._streams) * streams[0].nbytes > KEPT_BYTES:
            del self._streams[next(iter(self._streams))]
        return streams

    @torch.inference_mode(False)
    @torch.no_grad()
    def _read(self, row: tuple[int, ...], device: torch.device) -> Tensor:
        # Alone: with others its last bits would depend on theirs, and a run that was resumed would end otherwise.
        ids = torch.tensor([row], device=device)
        with torch.autocast(device.type, enabled=False):
            return self._read_one(ids)[0]
