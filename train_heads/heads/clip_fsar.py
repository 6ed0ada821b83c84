"""CLIP-FSAR: the name of a class joins its support videos as one more token, and what comes out is aligned in time.

Source: CLIP-FSAR, Wang et al. 2023, arXiv:2303.02982, and its code at alibaba-mmai-research/CLIP-FSAR 30cf0a8.
Differs: the image tower, which the published method fine-tunes whole, stays frozen and is read from the cache, so the
    term that matches videos to the names of all training classes trains its temperature alone. Losses are not divided
    by the number of tasks between two steps. Texts have length one, which the norm before attention takes away. The
    ensemble divides by the frames of the store where the published code has 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from ...extract.batches import FeatureBatch
from ...extract.text import TextFeatures
from ..clips import Clips, Supports
from ..comparisons import SHOTS, build_comparison, require_comparison
from ..layers import cosines, masked_mean, mlp
from ..limits import require_at_least, require_choice, require_heads, require_rate, require_share
from ..specs import Episodes, HeadContext, HeadOutput, HeadSpec

SCORES = ("metric", "ensemble", "text")
VIDEOS_AT_ONCE = 256  # through the transformer


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `clip_fsar`."""

    metric: str = "otam"  # otam | bi_mhm | mean_cosine | trx (which knows no `shots`, `lam` and `eps`)
    shots: str = "merged"  # merged: K videos averaged before the transformer | proto_mean: after it | dist_mean
    score: str = "metric"  # of evaluation: metric | ensemble, with the names (the paper's †) | text: the names alone
    text_share: float = 0.9  # exponent of the names' probability in the ensemble; the metric's has the rest
    lam: float = 0.5  # softness of OTAM's minimum
    eps: float = 0.01  # added to the product of norms in a frame cosine
    heads: int = 8
    hidden: int = 2048
    dropout: float = 0.2  # after attention
    mlp_dropout: float = 0.05
    class_loss: float = 1.5  # weight; published: HMDB51 1.2, UCF101 and Kinetics 1.5, Something-Something 3.0

    def __post_init__(self) -> None:
        """Refuse words that mean nothing here, and impossible numbers."""
        require_comparison(self.metric, self.shots, self.lam, fusions=("merged", *SHOTS))
        require_choice(self, "score", SCORES)
        require_at_least(1, self, "heads", "hidden")
        require_at_least(0, self, "class_loss")
        require_rate(self, "dropout", "mlp_dropout")
        require_share(self, "text_share")


class ClipFsar(nn.Module):
    """One transformer layer over the frames, and the name where there is one; then a comparison."""

    uses_class_names = True
    is_transductive = False

    def __init__(
        self,
        context: ContextLayer,
        comparison: nn.Module,
        n_frames: int,
        *,
        shots: str,
        score: str,
        text_share: float,
        class_loss: float,
    ) -> None:
        super().__init__()
        self.context, self.comparison = context, comparison
        self.temperature = nn.Parameter(torch.ones(()))  # multiplies; 1 at first, where CLIP's is 100
        self.n_frames, self.shots, self.score, self.text_share = n_frames, shots, score, text_share
        self.class_loss = class_loss

    def forward(self, episodes: Episodes, text: TextFeatures | None) -> HeadOutput:
        """Score the queries of episodes [n, Q, W], and match all of their videos to all training classes."""
        assert text is not None, "clip_fsar declares that it needs text"
        clips = Clips.of(episodes.bank, "embedding")
        names = text.embedding[episodes.class_ids]  # [n, W, E]
        logits = self._compare(clips, episodes.support, episodes.query, names)

        support_classes = repeat(episodes.class_ids, "n w -> n w k", k=episodes.support.shape[-1])
        query_classes = episodes.class_ids.gather(1, episodes.labels)  # [n, Q]
        rows = torch.cat([episodes.support.flatten(), episodes.query.flatten()])
        classes = torch.cat([support_classes.flatten(), query_classes.flatten()])
        means = masked_mean(episodes.bank["embedding"], episodes.bank.mask)[rows]
        matched = self._match(means, text.embedding)  # [n·(W·K + Q), C]
        return HeadOutput(logits=logits, losses={"classes": self.class_loss * cross_entropy(matched, classes)})

    def episode_logits(self, bank: FeatureBatch, support: Tensor, query: Tensor, text: Tensor | None) -> Tensor:
        """Score queries [n, Q] against supports [n, W, K] with names [n, W, E]: logits [n, Q, W]."""
        assert text is not None, "clip_fsar declares that it needs text"
        clips = Clips.of(bank, "embedding")
        if self.score == "metric":
            return self._compare(clips, support, query, text)
        by_name = self._match(masked_mean(bank["embedding"], bank.mask)[query], text)
        if self.score == "text":
            return by_name
        by_video = self._compare(clips, support, query, text) / self.n_frames
        return torch.lerp(by_video.log_softmax(dim=-1), by_name.log_softmax(dim=-1), self.text_share)

    def _compare(self, clips: Clips, support: Tensor, query: Tensor, text: Tensor) -> Tensor:
        """Logits [n, Q, W] of the comparison; each video is computed once, in each of its two roles."""
        query_rows, which = query.unique(return_inverse=True)
        queries = self.context.of_clips(clips.at(query_rows))
        if self.shots != "merged" or support.shape[-1] == 1:
            found = Supports.of(support, text)
            return self.comparison(queries, self.context.of_clips(clips.at(found.rows), found.text), which, found.which)

        logits = []
        size = max(1, VIDEOS_AT_ONCE // support.shape[1])
        for s, q, names in zip(support.split(size), which.split(size), text.split(size), strict=True):
            merged = clips.at(s.flatten(0, 1)).mean_shot()  # [n·W, T, E]
            prototypes = self.context.of_clips(merged, names.flatten(0, 1))
            ways = torch.arange(s[..., 0].numel(), device=s.device).view(*s.shape[:2], 1)
            logits.append(self.comparison(queries, prototypes, q, ways))
        return torch.cat(logits)

    def _match(self, means: Tensor, text: Tensor) -> Tensor:
        """Cosine of mean frames as they came [..., Q, E] with texts [..., C, E], times the temperature: [..., Q, C]."""
        return self.temperature * cosines(means, text)


class ContextLayer(nn.Module):
    """Attention with a norm before it, and an MLP without; no positions."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, mlp_dropout: float) -> None:
        super().__init__()
        require_heads(width, heads, "clip_fsar")
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))
        self.mlp = mlp(width, hidden, mlp_dropout)

    def of_clips(self, clips: Clips, text: Tensor | None = None) -> Clips:
        """Frames [V, T, E] that have read each other and, of supports, the text of their class [V, E], the last token."""
        pieces = torch.arange(len(clips.frames), device=clips.frames.device).split(VIDEOS_AT_ONCE)
        n_frames = clips.frames.shape[1]
        done = []
        for rows in pieces:
            x, mask = clips.at(rows)
            if text is not None:
                x = torch.cat([x, rearrange(text[rows], "v e -> v 1 e")], dim=1)
                mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            done.append(self(x, mask)[:, :n_frames])
        return Clips(torch.cat(done), clips.mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[V, S, E] -> [V, S, E]; no token reads one where mask [V, S] is False."""
        normed = self.norm(x)
        parts = (layer(normed) for layer in (self.query, self.key, self.value))
        q, k, v = (rearrange(part, "v s (h d) -> v h s d", h=self.heads) for part in parts)
        readable = None if mask is None else rearrange(mask, "v s -> v 1 1 s")
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=readable)
        x = x + self.out(rearrange(mixed, "v h s d -> v s (h d)"))
        return x + self.mlp(x)


def _build(config: Config, context: HeadContext) -> nn.Module:
    width = context.shape.embed_dim
    shots = "proto_mean" if config.shots == "merged" else config.shots
    return ClipFsar(
        ContextLayer(width, config.heads, config.hidden, config.dropout, config.mlp_dropout),
        build_comparison(config.metric, shots, width, context.n_frames, lam=config.lam, eps=config.eps),
        context.n_frames,
        shots=config.shots,
        score=config.score,
        text_share=config.text_share,
        class_loss=config.class_loss,
    )


HEAD = HeadSpec(
    config=Config,
    build=_build,
    needs=lambda config: ("embedding", "text"),
    tasks=frozenset({"episodes"}),
    source="CLIP-FSAR, Wang et al. 2023, arXiv:2303.02982",
)
