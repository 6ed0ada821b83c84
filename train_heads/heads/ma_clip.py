"""MA-CLIP, later MA-FSAR: adapters that carry time and the name of the class into the frozen tower, then prototypes.

In a changed block each frame is given two more tokens that the others may read: the class token after the block's own
attention along time and, in support videos alone, the name of the class. Small adapters follow the attention and stand
beside the MLP. Behind the tower one transformer layer adds the name to every support frame, and any metric compares.

Source: MA-CLIP, Xing et al. 2023, arXiv:2308.01532: figures 2 to 4, tables 1 to 9, and its counts of parameters; what is
    silent there follows AIM, Yang et al. 2023, arXiv:2302.03024, and CLIP-FSAR, arXiv:2303.02982.
Differs: there is no published code. Not known, and settings here: `alpha`, `logit_scale`, `joint_scale`, `shots`, heads
    and dropouts. Chosen: the trained places in time are added before the first norm, as AIM's are, or to the stream
    that the changed blocks begin with where the lowest are left as they are; the layer behind the tower has no norm,
    for which its count leaves no room, and is given frames and names at unit RMS; the divergence of a match from its
    one right answer is its cross-entropy. With adapters that add nothing yet the tower still differs from the frozen
    one, because the further tokens are read: as drawn. `reach` leaves the lowest blocks as they are, and -1 all of
    them: table 3's row of a frozen encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm

from ...extract.batches import FeatureBatch
from ...extract.blocks import Block, Insert
from ...extract.text import TextFeatures
from ..clips import Clips, Supports, gather
from ..comparisons import build_comparison, require_comparison
from ..layers import Adapter, cosines, masked_mean, mlp, of_frames
from ..limits import require_at_least, require_heads, require_rate, require_share
from ..reach import Reach, reached_feature
from ..specs import Episodes, HeadContext, HeadOutput, HeadSpec

VIDEOS_AT_ONCE = 32  # through the tower


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `ma_clip`."""

    reach: int = 0  # the blocks above it are changed; see train_heads/reach.py. -1: from the embedding, none is
    names: bool = True  # whether class names are read; False: neither tokens, nor prototypes, nor scores of them
    metric: str = "otam"  # otam | bi_mhm | mean_cosine | trx (which knows no `shots`, `lam` and `eps`)
    shots: str = "proto_mean"  # proto_mean: the metric of the K videos' mean | dist_mean: the mean of their metrics
    alpha: float = 0.5  # share of the names in the score and the loss; the metric has the rest
    logit_scale: float = 100.0  # of the names' cosines
    lam: float = 0.5  # softness of OTAM's minimum
    eps: float = 0.0  # added to the product of norms in a frame cosine
    adapter_ratio: int = 4  # width of the tower over that of its adapters' bottlenecks
    joint_scale: float = 0.5  # of the adapters beside the MLPs
    heads: int = 8  # of the layer behind the tower
    hidden: int = 2048
    dropout: float = 0.2  # after its attention
    mlp_dropout: float = 0.05
    checkpoint: bool = False  # compute activations again in the backward pass, to save memory

    def __post_init__(self) -> None:
        """Refuse words that mean nothing here, and impossible numbers."""
        require_comparison(self.metric, self.shots, self.lam)
        require_at_least(1, self, "adapter_ratio", "heads", "hidden")
        require_rate(self, "dropout", "mlp_dropout")
        require_share(self, "alpha")


class MaClip(nn.Module):
    """The adapted tower, where it is reached into; the prototype layer; a comparison, and a match with names."""

    is_transductive = False

    def __init__(self, config: Config, tower: AdaptedTower | None, prototypes: PrototypeLayer, comparison: nn.Module):
        super().__init__()
        self.config, self.tower, self.prototypes, self.comparison = config, tower, prototypes, comparison
        self.uses_class_names = config.names

    def forward(self, episodes: Episodes, text: TextFeatures | None) -> HeadOutput:
        """The losses of episodes and, outside of training, the scores [n, Q, W]."""
        names = None
        if self.config.names:
            assert text is not None, "ma_clip declares that it needs text"
            names = text.embedding[episodes.class_ids]  # [n, W, E]
        scores = self._score(episodes.bank, episodes.support, episodes.query, names)
        losses = scores.losses(episodes.labels, self.config.alpha)
        return HeadOutput(logits=None if self.training else scores.mixed(self.config.alpha), losses=losses)

    def episode_logits(self, bank: FeatureBatch, support: Tensor, query: Tensor, text: Tensor | None) -> Tensor:
        """Score queries [n, Q] against supports [n, W, K] with names [n, W, E]: logits [n, Q, W]."""
        return self._score(bank, support, query, text if self.config.names else None).mixed(self.config.alpha)

    def _score(self, bank: FeatureBatch, support: Tensor, query: Tensor, names: Tensor | None) -> Scores:
        """All that is compared; each video goes through the tower once in each role that it has."""
        names = None if names is None else rms_norm(names, names.shape[-1:])
        supports = Supports.of(support, names)
        query_rows, which = query.unique(return_inverse=True)
        s = self._frames(bank, supports.rows, supports.text)  # [U, T, E]
        q = self._frames(bank, query_rows, None)
        by_video = self.comparison(self.prototypes(q), self.prototypes(s, supports.text), which, supports.which)
        if names is None:
            return Scores(by_video)
        support_means = gather(_mean(s), supports.which)  # [n, W, K, E]
        return Scores(
            by_video,
            self._match(gather(_mean(q), which), names),
            self._match(rearrange(support_means, "n w k e -> n (w k) e"), names),
        )

    def _frames(self, bank: FeatureBatch, rows: Tensor, text: Tensor | None) -> Clips:
        """Frame embeddings [U, T, E] of some videos, supports with the text of their class [U, E]."""
        if self.tower is None:
            return Clips.of(bank, "embedding").at(rows)
        pieces = torch.arange(len(rows), device=rows.device).split(VIDEOS_AT_ONCE)
        done = [self.tower(bank.select(rows[piece]), None if text is None else text[piece]) for piece in pieces]
        return Clips(torch.cat(done), None if bank.real is None else bank.mask[rows])

    def _match(self, videos: Tensor, names: Tensor) -> Tensor:
        """Scaled cosines of videos [n, Q, E] with the names of their episode [n, W, E]: [n, Q, W]."""
        return self.config.logit_scale * cosines(videos, names)


@dataclass(frozen=True, slots=True)
class Scores:
    """What episodes say of their videos."""

    by_video: Tensor  # queries against supports [n, Q, W]
    by_name: Tensor | None = None  # queries against names [n, Q, W]
    support_by_name: Tensor | None = None  # [n, W·K, W]

    def mixed(self, alpha: float) -> Tensor:
        """Log of the mean probability of names, of weight alpha, and metric: [n, Q, W]."""
        if self.by_name is None:
            return self.by_video
        both = torch.stack([self.by_name.log_softmax(dim=-1), self.by_video.log_softmax(dim=-1)])
        weights = both.new_tensor([alpha, 1 - alpha]).log()
        return (both + rearrange(weights, "two -> two 1 1 1")).logsumexp(dim=0)

    def losses(self, labels: Tensor, alpha: float) -> dict[str, Tensor]:
        """Weighted cross-entropies; `labels` [n, Q] are the ways of the queries."""
        by_video = _cross_entropy(self.by_video, labels)
        if self.by_name is None or self.support_by_name is None:
            return {"query_to_support": by_video}
        n_episodes, n_supports, n_ways = self.support_by_name.shape
        ways = repeat(torch.arange(n_ways, device=labels.device), "w -> n (w k)", n=n_episodes, k=n_supports // n_ways)
        return {
            "query_to_support": (1 - alpha) * by_video,
            "query_to_text": alpha / 2 * _cross_entropy(self.by_name, labels),
            "support_to_text": alpha / 2 * _cross_entropy(self.support_by_name, ways),
        }


class AdaptedTower(nn.Module):
    """The frozen tower from the first changed block on, with what is put into it."""

    def __init__(self, config: Config, context: HeadContext) -> None:
        super().__init__()
        shape = context.shape
        self.tower, self.reach, self.checkpoint = context.tower(), Reach.of(config.reach, shape), config.checkpoint
        text_width = shape.embed_dim if config.names else None
        self.position = nn.Parameter(torch.zeros(context.n_frames, 1, shape.width))
        self.blocks = nn.ModuleList(
            BlockAdapters(shape.width, text_width, config.adapter_ratio, config.joint_scale)
            for _ in range(self.reach.n_blocks)
        )

    def forward(self, batch: FeatureBatch, text: Tensor | None) -> Tensor:
        """Embeddings of the frames [B, T, E]; texts [B, E] of support videos, None of queries."""
        position = of_frames(self.position, batch.mask.shape[1])
        from_pixels = self.reach.feature == "pixels"
        tokens = self.reach.tokens(batch, self.tower, position.squeeze(1) if from_pixels else None)  # [B, T, 1+N, D]
        tokens = self.tower.resume(
            tokens if from_pixels else tokens + position,
            self.reach.layer,
            inserts=[TokensAndAdapters(adapters, text) for adapters in self.blocks],
            mask=batch.real,
            class_token_only=True,
            checkpoint=self.checkpoint,
        )
        return self.tower.project(tokens)


class BlockAdapters(nn.Module):
    """What is trained in one block."""

    def __init__(self, width: int, text_width: int | None, ratio: int, joint_scale: float) -> None:
        super().__init__()
        hidden = max(1, width // ratio)
        self.temporal, self.spatial, self.joint = (Adapter(width, hidden) for _ in range(3))
        self.text = None if text_width is None else nn.Linear(text_width, width)
        self.joint_scale = joint_scale


class TokensAndAdapters(Insert):
    """The adapters of a block at work on videos, which are supports where they have texts [B, E]."""

    def __init__(self, adapters: Any, text: Tensor | None) -> None:
        super().__init__()
        self.adapters, self.text = adapters, text

    def extra_tokens(self, x: Tensor, block: Block, mask: Tensor | None) -> Tensor:
        """The class token that has looked at the other frames and, of a support, its name: [B, T, 1 or 2, D]."""
        c = x[..., 0, :]  # [B, T, D]
        tokens = [c + self.adapters.temporal(block.attend(c, mask=mask))]
        if self.text is not None:
            tokens.append(repeat(self.adapters.text(self.text), "b d -> b t d", t=x.shape[1]))
        return torch.stack(tokens, dim=-2)

    def after_attention(self, attended: Tensor) -> Tensor:
        """Attention, and its adapter after it."""
        return attended + self.adapters.spatial(attended)

    def after_mlp(self, added: Tensor, normed: Tensor) -> Tensor:
        """The MLP, and an adapter beside it."""
        return added + self.adapters.joint_scale * self.adapters.joint(normed)


class PrototypeLayer(nn.Module):
    """One layer of attention and MLP along time, shared by both roles; the name is added to each frame of a support."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, mlp_dropout: float) -> None:
        super().__init__()
        require_heads(width, heads, "ma_clip")
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.mlp = mlp(width, hidden, mlp_dropout)

    def forward(self, clips: Clips, text: Tensor | None = None) -> Clips:
        """Frames [U, T, E], of supports with texts [U, E] at unit RMS, to frames [U, T, E]."""
        x = read = rms_norm(clips.frames, clips.frames.shape[-1:])
        padding = None if clips.mask is None else ~clips.mask
        if text is not None:
            name = rearrange(text, "u e -> u 1 e")
            x, read = x + name, torch.cat([name, x], dim=1)
            padding = None if padding is None else torch.cat([padding.new_zeros(len(x), 1), padding], dim=1)
        attended, _ = self.attention(x, read, read, key_padding_mask=padding, need_weights=False)
        x = x + self.dropout(attended)
        return Clips(x + self.mlp(x), clips.mask)


def _mean(clips: Clips) -> Tensor:
    """Mean over real frames, [U, E]."""
    return clips.frames.mean(dim=1) if clips.mask is None else masked_mean(clips.frames, clips.mask)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


def _build(config: Config, context: HeadContext) -> nn.Module:
    width = context.shape.embed_dim
    return MaClip(
        config,
        None if config.reach == -1 else AdaptedTower(config, context),
        PrototypeLayer(width, config.heads, config.hidden, config.dropout, config.mlp_dropout),
        build_comparison(config.metric, config.shots, width, context.n_frames, lam=config.lam, eps=config.eps),
    )


def _needs(config: Config) -> tuple[str, ...]:
    feature = "embedding" if config.reach == -1 else reached_feature(config.reach)
    return (feature, "text") if config.names else (feature,)


HEAD = HeadSpec(
    config=Config,
    build=_build,
    needs=_needs,
    tasks=frozenset({"episodes"}),
    source="MA-CLIP, Xing et al. 2023, arXiv:2308.01532",
)
