"""One learned query looks at every token of every frame, then a linear classifier; blind to the order of frames.

Source: the attentive probe of frozen video towers, V-JEPA, Bardes et al. 2024, arXiv:2404.08471; pooling by a learned
    query is Set Transformer's PMA, Lee et al. 2019, arXiv:1810.00825.
Differs: the query meets the keys in token space. A learned query reaches its keys only through the product with the key
    projection, so each head learns that product and no token is projected to keys; values are projected after they
    are mixed, which is the same by linearity. No MLP after the pooling. Tokens are normalised without a learned affine,
    which the two linear maps contain. The query starts at zero, which is the mean over all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ...data_manifests.errors import ConfigError
from ...extract.batches import FeatureBatch
from ...extract.specs import canonical_feature, feature_shape
from ...extract.text import TextFeatures
from ..limits import require_at_least, require_heads, require_rate
from ..specs import HeadContext, HeadOutput, HeadSpec


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `attentive_pool`."""

    feature: str = "tokens.-1"  # tokens.<k> | cls.<k> | embedding
    heads: int = 8  # ways of looking; the width must divide by it
    dropout: float = 0.1  # on the pooled vector

    def __post_init__(self) -> None:
        """Refuse features that are not vectors, and impossible numbers."""
        if self.feature.partition(".")[0] not in ("tokens", "cls", "embedding"):
            raise ConfigError(
                "attentive_pool reads vectors",
                seen=f"feature={self.feature!r}",
                wanted="tokens.<k>, cls.<k> or embedding",
            )
        require_at_least(1, self, "heads")
        require_rate(self, "dropout")


class AttentivePool(nn.Module):
    """Attention pooling by one query, then LayerNorm and a linear classifier."""

    def __init__(self, feature: str, width: int, n_classes: int, heads: int, dropout: float) -> None:
        super().__init__()
        require_heads(width, heads, "attentive_pool")
        self.feature, self.heads = feature, heads
        self.query = nn.Parameter(torch.zeros(heads, width))
        self.value = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, batch: FeatureBatch, text: TextFeatures | None = None) -> HeadOutput:
        """Classify: feature [B, T, N, D] or [B, T, D] -> logits [B, C]."""
        frames = batch[self.feature]
        tokens = rearrange(frames, "b t ... d -> b t (...) d")  # one token a frame where the feature is one vector
        mask = repeat(batch.mask, "b t -> b (t n)", n=tokens.shape[2])
        tokens = rearrange(tokens, "b t n d -> b (t n) d")
        pooled = self.pool(layer_norm(tokens, tokens.shape[-1:]), mask)  # [B, D]
        return HeadOutput(logits=self.classifier(self.dropout(self.norm(pooled))))

    def pool(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Mix the tokens [B, S, D] where mask [B, S], each head by its own attention and value projection: [B, D]."""
        scores = einsum(tokens, self.query, "b s d, h d -> b h s") / tokens.shape[-1] ** 0.5
        attention = scores.masked_fill(~rearrange(mask, "b s -> b 1 s"), float("-inf")).softmax(dim=-1)
        mixed = einsum(attention, tokens, "b h s, b s d -> b h d")
        weight = rearrange(self.value.weight, "(h v) d -> h v d", h=self.heads)
        values = einsum(mixed, weight, "b h d, h v d -> b h v")
        return rearrange(values, "b h v -> b (h v)") + self.value.bias


def _build(config: Config, context: HeadContext) -> nn.Module:
    feature = canonical_feature(config.feature, context.shape.layers)
    width = feature_shape(feature, context.shape, size_px=0)[-1]
    return AttentivePool(feature, width, len(context.class_names), config.heads, config.dropout)


HEAD = HeadSpec(
    config=Config,
    build=_build,
    needs=lambda config: (config.feature,),
    tasks=frozenset({"classify"}),
    source="V-JEPA, Bardes et al. 2024, arXiv:2404.08471",
)
