"""TRX: each tuple of a query's frames is compared with the tuple that attention makes of all shots of a class.

Source: TRX, Perrett et al. 2021, arXiv:2101.06184, and its code at tobyperrett/trx 390c20a.
Differs: reads the embeddings of a frozen CLIP where the published network trains a ResNet-50 as well. By default frames
    are brought to unit RMS and their sinusoids stand beside them in full; `positions = "published"` takes frames as they
    are and a tenth of the sinusoids. The norm of values, which the published code has and never applies, is absent.
    Keys and values are made once a video, not once an episode, which changes nothing; so do they from one product of
    each frame and each place in a tuple.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...data_manifests.errors import ConfigError
from ...extract.batches import FeatureBatch
from ...extract.text import TextFeatures
from ..clips import Clips
from ..limits import require_at_least, require_choice, require_rate
from ..relations import POSITIONS, TemporalRelations
from ..specs import Episodes, HeadContext, HeadOutput, HeadSpec


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `trx`."""

    cardinalities: tuple[int, ...] = (2, 3)  # frames of a tuple; the logits of all are averaged
    hidden: int = 1152  # width of keys and values
    dropout: float = 0.1
    positions: str = "matched"  # matched: frames and sinusoids on one scale | published: as they are, sinusoids × 0.1

    def __post_init__(self) -> None:
        """Refuse numbers and words that mean nothing here."""
        if not self.cardinalities or min(self.cardinalities) < 1:
            raise ConfigError("a tuple has at least one frame", seen=f"cardinalities={self.cardinalities}")
        require_at_least(1, self, "hidden")
        require_rate(self, "dropout")
        require_choice(self, "positions", POSITIONS)


class Trx(nn.Module):
    """Temporal relations of embeddings."""

    uses_class_names = False
    is_transductive = False

    def __init__(self, relations: TemporalRelations) -> None:
        super().__init__()
        self.relations = relations

    def forward(self, episodes: Episodes, text: TextFeatures | None = None) -> HeadOutput:
        """Score the queries of episodes: logits [n, Q, W]."""
        return HeadOutput(logits=self.episode_logits(episodes.bank, episodes.support, episodes.query))

    def episode_logits(self, bank: FeatureBatch, support: Tensor, query: Tensor, text: Tensor | None = None) -> Tensor:
        """Score queries [n, Q] against supports [n, W, K], rows of a bank of V videos: logits [n, Q, W]."""
        clips = Clips.of(bank, "embedding")
        return self.relations(clips, clips, query, support)


def _build(config: Config, context: HeadContext) -> nn.Module:
    return Trx(
        TemporalRelations(
            context.shape.embed_dim,
            context.n_frames,
            config.cardinalities,
            config.hidden,
            config.dropout,
            config.positions,
        )
    )


HEAD = HeadSpec(
    config=Config,
    build=_build,
    needs=lambda config: ("embedding",),
    tasks=frozenset({"episodes"}),
    source="TRX, Perrett et al. 2021, arXiv:2101.06184",
)
