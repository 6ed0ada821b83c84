"""A small episodic head for tests: a linear map and dropout before prototypes."""

from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from torch import nn
from torch.nn.functional import dropout, normalize

from coldframe.train_heads.specs import HeadOutput, HeadSpec


@dataclass(frozen=True)
class Config:
    """Settings."""

    drop: float = 0.1
    names: bool = False


class LinearPrototypes(nn.Module):
    """Cosine between a mapped query and the mean of its way's mapped supports."""

    is_transductive = False

    def __init__(self, width, config, trained_names):
        super().__init__()
        self.map = nn.Linear(width, width)
        self.drop, self.uses_class_names, self.trained_names = config.drop, config.names, trained_names
        self.seen_labels, self.asked = set(), []

    def forward(self, episodes, text):
        assert self.training
        assert (text is None) == (not self.uses_class_names)
        if text is not None:
            assert text.class_names == self.trained_names
        self.seen_labels |= set(episodes.bank.labels.tolist())
        bank, support = episodes.bank, episodes.support
        assert (
            len(set(bank.video_ids))
            == len(bank)
            == len(set(support.flatten().tolist() + episodes.query.flatten().tolist()))
        )
        assert (bank.labels[support] == episodes.class_ids[..., None]).all()
        assert (bank.labels[episodes.query] == episodes.class_ids.gather(1, episodes.labels)).all()
        names = None if text is None else text.embedding[episodes.class_ids]
        return HeadOutput(self.episode_logits(bank, support, episodes.query, names))

    def episode_logits(self, bank, support, query, text=None):
        assert (text is None) == (not self.uses_class_names)
        if not self.training:
            self.asked.append(query.tolist())
        frames = reduce(bank["embedding"], "v t e -> v e", "mean")
        mapped = normalize(self.map(dropout(frames, self.drop, self.training)), dim=-1)
        prototypes = mapped[support].mean(2)
        logits = 10 * torch.einsum("n q e, n w e -> n q w", mapped[query], prototypes)
        return logits if text is None else logits + rearrange(text.sum(-1), "n w -> n 1 w") * 0


HEAD = HeadSpec(
    config=Config,
    build=lambda config, context: LinearPrototypes(context.shape.embed_dim, config, context.trained_names),
    needs=lambda config: ("embedding", "text") if config.names else ("embedding",),
    tasks=frozenset({"episodes"}),
    source="for tests",
)
