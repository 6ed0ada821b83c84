"""A small transformer over the frame embeddings of a video, then a classifier.

Source: the temporal module of Efficient-Prompt, Ju et al. 2022, arXiv:2112.04478, and its code at
    ju-chen/Efficient-Prompt 1f69a18 (MIT).
Differs: by default the inputs are scaled to unit RMS and positions are drawn at that scale. At the published scale,
    N(0, 0.01) beside the embeddings as they are, the module ignores the order of frames on real features;
    `positions = "published"` restores it. A linear classifier (after LayerNorm) stands beside the published one, which
    is the cosine to the class texts / 0.07. Dropout is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...extract.batches import FeatureBatch
from ...extract.text import TextFeatures
from ..layers import POSITION_STD, FrameTransformer, cosines, masked_mean
from ..limits import require_at_least, require_choice, require_rate
from ..specs import HeadContext, HeadOutput, HeadSpec


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `temporal_transformer`."""

    layers: int = 1  # the released HMDB51 setting; the tables of the paper go up to 4
    heads: int = 8
    dropout: float = 0.1
    positions: str = "matched"  # matched: inputs and positions at unit RMS | published: inputs as they are, N(0, 0.01)
    classifier: str = "linear"  # linear | text: cosine to the class texts, which may be of new classes
    logit_scale: float = 1 / 0.07  # of the text classifier, fixed, as published

    def __post_init__(self) -> None:
        """Refuse words that mean nothing here, and impossible numbers."""
        require_choice(self, "positions", POSITION_STD)
        require_choice(self, "classifier", ("linear", "text"))
        require_at_least(1, self, "layers", "heads")
        require_rate(self, "dropout")


class TemporalTransformer(nn.Module):
    """Positions, pre-LN blocks, mean over time, classifier."""

    def __init__(
        self,
        n_frames: int,
        width: int,
        n_classes: int | None,
        *,
        layers: int,
        heads: int,
        dropout: float,
        positions: str,
        logit_scale: float,
    ) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        self.frames = FrameTransformer(
            n_frames, width, layers=layers, heads=heads, dropout=dropout, positions=positions
        )
        self.classifier = None
        if n_classes is not None:
            self.classifier = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_classes))

    def forward(self, batch: FeatureBatch, text: TextFeatures | None = None) -> HeadOutput:
        """Classify: embedding [B, T, E] (and, with the text classifier, texts [C, E]) -> logits [B, C]."""
        video = self.embed(batch["embedding"], batch.mask)  # [B, E]
        if self.classifier is not None:
            return HeadOutput(logits=self.classifier(video), embedding=video)
        assert text is not None, "the text classifier declares that it needs text"
        return HeadOutput(logits=self.logit_scale * cosines(video, text.embedding), embedding=video)

    def embed(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Video embeddings [B, E] of frames [B, T, E] where mask [B, T]."""
        return masked_mean(self.frames(frames, mask), mask)


def _build(config: Config, context: HeadContext) -> nn.Module:
    return TemporalTransformer(
        context.n_frames,
        context.shape.embed_dim,
        len(context.class_names) if config.classifier == "linear" else None,
        layers=config.layers,
        heads=config.heads,
        dropout=config.dropout,
        positions=config.positions,
        logit_scale=config.logit_scale,
    )


HEAD = HeadSpec(
    config=Config,
    build=_build,
    needs=lambda config: ("embedding",) if config.classifier == "linear" else ("embedding", "text"),
    tasks=frozenset({"classify"}),
    source="Efficient-Prompt, Ju et al. 2022, arXiv:2112.04478",
)
