"""The frozen text tower of a CLIP, opened: from token ids to embeddings, with a place for prompts and inserts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block, Inserts, expect_layers, open_block, run_blocks
from .weights import TowerError


class TextTower:
    """Words and positions, causal blocks, ln_final, projection: each step by itself, differentiable, frozen.

    `encode` of a sentence is `project(resume(embed(ids)), ids.argmax(dim=-1))`: the end of a text is its highest id.
    The blocks run in float32, or in the precision of an autocast around the call.
    """

    def __init__(self, module: Any, model: str) -> None:
        """Open the text tower of a model.

        Raises:
            TowerError: it is not CLIP's.
        """
        projection = getattr(module, "text_projection", None)
        if not isinstance(projection, Tensor) or getattr(module, "attn_mask", None) is None:
            raise TowerError(
                f"the text tower of {model} is not CLIP's, so nothing can be put into it",
                fix="Use a CLIP of OpenAI's design, such as ViT-B-16-quickgelu.",
            )
        self.module, self.model = module, model
        self.layers = len(module.transformer.resblocks)

    @property
    def words(self) -> nn.Embedding:
        """The frozen embedding of every token id, [V, D_t]."""
        return self.module.token_embedding

    @property
    def positions(self) -> Tensor:
        """The frozen table of positions, [context length, D_t]."""
        return self.module.positional_embedding

    def embed(self, ids: Tensor) -> Tensor:
        """Words and positions: token ids [C, S] → the stream before the first block [C, S, D_t]."""
        return self.words(ids) + self.positions[: ids.shape[1]]

    def block(self, layer: int) -> Block:
        """Block `layer`, counted from 1, opened; raises as `Tower.block` does."""
        return open_block(self.module.transformer.resblocks, layer, self.model, self.module.attn_mask)

    def resume(
        self,
        stream: Tensor,
        from_layer: int = 0,
        *,
        to_layer: int | None = None,
        inserts: Inserts = (),
        checkpoint: bool = False,
    ) -> Tensor:
        """The stream [C, S, D_t] after block from_layer → after block to_layer; arguments as in `Tower.resume`."""
        to_layer = self.layers if to_layer is None else to_layer
        expect_layers(from_layer, to_layer, self.layers)
        blocks = [self.block(k) for k in range(from_layer + 1, to_layer + 1)]
        return run_blocks(stream.float(), blocks, inserts, checkpoint=checkpoint)

    def project(self, stream: Tensor, ends: Tensor) -> Tensor:
        """ln_final and joint projection of the token at `ends` [C] of each text [C, S, D_t] → embedding [C, E]."""
        last = stream[torch.arange(len(stream), device=stream.device), ends]
        with torch.autocast(stream.device.type, enabled=False):
            return self.module.ln_final(last.float()) @ self.module.text_projection
