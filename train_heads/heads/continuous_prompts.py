"""Learnt vectors around class names or captions, through the frozen text tower, beside a light temporal module.

One head for three tasks: recognition (class names), retrieval (every caption a class of its own; `embed_videos`,
`embed_sentences`) and the classification of proposals in untrimmed videos (`proposal_logits`). Classes that were never
trained are scored by their names; for them set `layers = 0`: the temporal module learns the seen classes, and the paper
loses ten points of 58 by it (Kinetics-700, 400 seen and 300 unseen classes).

Source: Efficient-Prompt, Ju et al. 2022, arXiv:2112.04478, §3, and its code at ju-chen/Efficient-Prompt 1f69a18 (MIT).
    That code recognises closed sets alone; retrieval and proposals follow the paper.
Differs: by default a prompt is k vectors before and k behind the name. The published table of 77 is addressed by absolute
    position, so that the vectors behind a name shift with its length and a longer name than any trained one meets rows
    that never learnt: `form = "table"`. Inputs and positions of the temporal module are of one scale (`positions =
    "published"`: see FrameTransformer). Names are made readable by rule, where the code has a list written by hand.
    What follows the end of a text is not computed; the tower is causal. Dropout is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...data_manifests.errors import ConfigError
from ...extract.batches import FeatureBatch
from ...extract.text import TextFeatures, readable
from ...extract.text_tower import TextTower
from ...extract.towers import TEXTS_AT_ONCE, Tower
from ..class_texts import Kept
from ..layers import POSITION_STD, FrameTransformer, cosines, masked_mean
from ..layouts import back_to_theirs, renamed, stretched
from ..limits import require_at_least, require_choice, require_rate
from ..specs import HeadContext, HeadOutput, HeadSpec, Official

FORMS = ("free", "table")
VECTOR_STD = 0.01
PROPOSALS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `continuous_prompts`."""

    prefix: int = 16  # vectors before the name; the paper's retrieval takes 4 + 4
    postfix: int = 16  # vectors behind it
    form: str = "free"  # free: these vectors and no others | table: one row a position of the context, as published
    layers: int = 1  # of the temporal module; 0, for unseen classes, averages the frames as they are
    heads: int = 8
    dropout: float = 0.0
    positions: str = "matched"  # matched: inputs and positions at unit RMS | published: inputs as they are, N(0, 0.01)
    logit_scale: float = 1 / 0.07  # of the cosine, fixed
    n_contrast: int = 400  # classes in a training step: the batch's, and drawn ones up to so many; 0: the batch's alone
    checkpoint: bool = False  # compute the text tower twice in a step, and keep less of it in memory

    def __post_init__(self) -> None:
        """Refuse words that mean nothing here, and impossible numbers."""
        require_at_least(0, self, "prefix", "postfix", "layers", "n_contrast")
        require_at_least(1, self, "heads")
        require_rate(self, "dropout")
        require_choice(self, "form", FORMS)
        require_choice(self, "positions", POSITION_STD)
        if self.prefix + self.postfix == 0:
            raise ConfigError(
                "there is no prompt without a vector",
                seen="prefix=0, postfix=0",
                fix="For the temporal module alone take temporal_transformer with classifier=text.",
            )
        if not self.logit_scale > 0:
            raise ConfigError("impossible logit_scale", seen=self.logit_scale, wanted="above 0")


class Prompts(nn.Module):
    """The learnt vectors, and where they stand: start, prefix, words, postfix, end."""

    def __init__(self, prefix: int, postfix: int, context_length: int, width: int, *, is_table: bool) -> None:
        super().__init__()
        self.prefix, self.postfix, self.context_length, self.is_table = prefix, postfix, context_length, is_table
        self.vectors = nn.Parameter(torch.randn(context_length if is_table else prefix + postfix, width) * VECTOR_STD)

    def forward(self, ids: Tensor, text: TextTower) -> tuple[Tensor, Tensor]:
        """Put the vectors around tokenised texts.

        Args:
            ids: [C, context length]: start, n words, end, padding.

        Returns:
            The stream before the tower's first block [C, S, D_t], no longer than the longest text; the end of each, [C].
        """
        n_words = rearrange(ids.argmax(dim=-1) - 1, "c -> c 1")  # the end is the highest id
        ends = self.prefix + n_words + self.postfix + 1  # [C, 1]
        place = torch.arange(int(ends.max()) + 1, device=ids.device)  # [S]
        behind = place - self.prefix - n_words  # 1 … postfix where the words are over, [C, S]
        is_postfix = (behind >= 1) & (behind <= self.postfix)
        is_prompt = is_postfix | ((place >= 1) & (place <= self.prefix))
        token = place - self.prefix - self.postfix * (behind > self.postfix)
        words = text.words(ids.gather(1, token.clamp(0, ids.shape[1] - 1)))  # [C, S, D_t]
        row = place.expand_as(behind) if self.is_table else torch.where(is_postfix, self.prefix + behind, place) - 1
        vectors = self.vectors[row.clamp(0, len(self.vectors) - 1)]  # [C, S, D_t]
        stream = torch.where(rearrange(is_prompt, "c s -> c s 1"), vectors, words)
        return stream + text.positions[: len(place)], rearrange(ends, "c 1 -> c")

    def tokenise(self, texts: Sequence[str], tower: Tower) -> Tensor:
        """Token ids [C, context length] of class names or sentences, made readable.

        Raises:
            ConfigError: one is empty, or too long for the tower once it has its prompt; names it.
        """
        words = [readable(text) for text in texts]
        if not words or not all(words):
            raise ConfigError("every class and sentence needs words", seen=list(texts))
        ids = tower.tokenize(words)
        lengths = (ids.argmax(dim=-1) + 1 + self.prefix + self.postfix).tolist()
        if too_long := [word for word, length in zip(words, lengths, strict=True) if length > self.context_length]:
            raise ConfigError(
                f"{len(too_long)} text(s) with a prompt of {self.prefix} + {self.postfix} are longer than the tower reads",
                seen=f"up to {max(lengths)} tokens: {'; '.join(map(repr, too_long[:3]))}",
                wanted=f"at most {self.context_length}",
                fix="Set a smaller prefix and postfix, or shorten them.",
            )
        return ids


class ContinuousPrompts(nn.Module):
    """Cosine between a video and the prompted texts of its classes."""

    uses_class_names = True
    class_ids: Tensor

    def __init__(
        self, prompts: Prompts, frames: FrameTransformer | None, tower: Tower, class_ids: Tensor, config: Config
    ) -> None:
        """Join the parts.

        Args:
            frames: the temporal module; None averages the frames as they are.
            tower: read and never owned: it is in no state and gets no gradient.
            class_ids: tokens of the classes to score, [C, context length].
        """
        super().__init__()
        self.prompts, self.frames, self.tower = prompts, frames, tower
        self.logit_scale, self.n_contrast, self.checkpoint = config.logit_scale, config.n_contrast, config.checkpoint
        self.register_buffer("class_ids", class_ids, persistent=False)
        self._kept = Kept(prompts)

    def forward(self, batch: FeatureBatch, text: TextFeatures | None = None) -> HeadOutput:
        """Score: embedding [B, T, E] -> logits [B, C].

        In training, where there are more classes than `n_contrast`, there are no logits: the loss is the cross-entropy
        among the classes of the batch and others drawn from torch's generator.
        """
        video = self.embed_videos(batch)
        if not self.training or self.n_contrast >= len(self.class_ids):
            return HeadOutput(logits=self.similarity(video, self.class_texts()), embedding=video)
        chosen = self._drawn_classes(batch.labels)
        logits = self.similarity(video, self.embed_tokens(self.class_ids[chosen]))
        loss = cross_entropy(logits, torch.searchsorted(chosen, batch.labels))
        return HeadOutput(embedding=video, losses={"contrast": loss})

    def embed_videos(self, batch: FeatureBatch) -> Tensor:
        """Videos [B, E], un-normalised, of their frames' embeddings [B, T, E]."""
        frames = batch["embedding"]
        return masked_mean(frames if self.frames is None else self.frames(frames, batch.mask), batch.mask)

    def embed_sentences(self, sentences: Sequence[str]) -> Tensor:
        """Prompted sentences [S, E], un-normalised; raises ConfigError for those that are empty or too long."""
        return self._in_chunks(self.prompts.tokenise(sentences, self.tower).to(self.class_ids.device))

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Prompted texts [C, E], un-normalised, of token ids [C, context length]."""
        stream, ends = self.prompts(ids, self.tower.text)
        return self.tower.text.project(self.tower.text.resume(stream, checkpoint=self.checkpoint), ends)

    def class_texts(self) -> Tensor:
        """The classes [C, E]; where no gradient is asked for they are kept until the prompts change."""
        if torch.is_grad_enabled():
            return self.embed_tokens(self.class_ids)
        return self._kept(lambda: self._in_chunks(self.class_ids))

    def similarity(self, video: Tensor, text: Tensor) -> Tensor:
        """Scaled cosine of videos [B, E] and texts [C, E]: [B, C]."""
        return self.logit_scale * cosines(video, text)

    def proposal_logits(self, frames: Tensor, timestamps: Tensor, proposals: Tensor) -> Tensor:
        """Score the classes of parts of an untrimmed video.

        A proposal is the mean over its frames, after the temporal module has seen them and no others: the module was
        trained on such parts. Where they are more than it has positions, it sees the centres of equal segments. A
        proposal between two frames is the frame that is nearest to its middle.

        Args:
            frames: embeddings [T, E] of the whole video.
            timestamps: their times in seconds, [T], ascending.
            proposals: start and end in seconds, [P, 2]; a frame is inside where start ≤ time < end.

        Returns:
            logits [P, C].
        """
        if not len(proposals):
            return frames.new_zeros(0, len(self.class_ids))
        times, edges = timestamps.double(), proposals.double().to(timestamps.device)
        first, stop = rearrange(torch.searchsorted(times, edges), "p two -> two p")
        nearest = (times - edges.mean(dim=1, keepdim=True)).abs().argmin(dim=1)
        first, count = torch.where(stop > first, first, nearest), (stop - first).clamp_min(1)
        if self.frames is None:
            sums = torch.cat([frames.new_zeros(1, frames.shape[1]), frames]).double().cumsum(dim=0)  # [T+1, E]
            parts = ((sums[first + count] - sums[first]) / rearrange(count, "p -> p 1")).to(frames.dtype)
        else:
            chunks = zip(first.split(PROPOSALS_AT_ONCE), count.split(PROPOSALS_AT_ONCE), strict=True)
            parts = torch.cat([self._embed_parts(self.frames, frames, *chunk) for chunk in chunks])
        return self.similarity(parts, self.class_texts())

    def _embed_parts(self, module: FrameTransformer, frames: Tensor, first: Tensor, count: Tensor) -> Tensor:
        """Parts [P, E] of frames [T, E], each from `first` [P] on and `count` [P] long."""
        first, count = rearrange(first, "p -> p 1"), rearrange(count, "p -> p 1")
        n_most = min(len(module.position), len(frames))
        seen, step = count.clamp_max(n_most), torch.arange(n_most, device=count.device)  # [P, 1], [K]
        mask = step < seen  # [P, K]
        rows = first + torch.where(mask, (2 * step + 1) * count // (2 * seen), 0)
        return masked_mean(module(frames[rows], mask), mask)

    def _drawn_classes(self, labels: Tensor) -> Tensor:
        """The classes of a batch and others up to n_contrast, ascending."""
        present = labels.unique()
        order = torch.rand(len(self.class_ids), device=labels.device)
        order[present] = 2.0  # before all that is drawn
        return order.topk(max(self.n_contrast, len(present))).indices.sort().values

    def _in_chunks(self, ids: Tensor) -> Tensor:
        """`embed_tokens`, in float32 and a bounded number at a time."""
        with torch.autocast(ids.device.type, enabled=False):
            return torch.cat([self.embed_tokens(chunk) for chunk in ids.split(TEXTS_AT_ONCE)])


def _build(config: Config, context: HeadContext) -> ContinuousPrompts:
    shape, tower = context.shape, context.tower()
    is_table = config.form == "table"
    prompts = Prompts(config.prefix, config.postfix, shape.context_length, shape.text_width, is_table=is_table)
    frames = None
    if config.layers:
        sizes: dict[str, Any] = {"layers": config.layers, "heads": config.heads, "dropout": config.dropout}
        frames = FrameTransformer(context.n_frames, shape.embed_dim, **sizes, positions=config.positions)
    return ContinuousPrompts(prompts, frames, tower, prompts.tokenise(context.class_names, tower), config)


def _official_names(layers: int) -> dict[str, str]:
    """Their name of every trained tensor → ours."""
    names = {"embedding.weight": "prompts.vectors"}
    if layers:
        names["temporalEmbedding.weight"] = "frames.position"
    linear = ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
    leaves = ["attn.in_proj_weight", "attn.in_proj_bias", *(f"{m}.{x}" for m in linear for x in ("weight", "bias"))]
    blocks = [f"{i}.{leaf}" for i in range(layers) for leaf in leaves]
    return names | {f"temporalModelling.resblocks.{name}": f"frames.blocks.{name}" for name in blocks}


def _read(weights: Mapping[str, Tensor], context: HeadContext, config: Config) -> tuple[Config, dict[str, Tensor]]:
    """See Official; prefix, postfix and heads stand in no tensor."""
    blocks = [name.split(".")[2] for name in weights if name.startswith("temporalModelling.resblocks.")]
    layers = 1 + max(map(int, blocks), default=-1)
    unused = set() if layers else {"temporalEmbedding.weight"}  # a table that no block reads
    trained = {name: weight for name, weight in weights.items() if name not in unused}
    state = renamed(trained, _official_names(layers), "Efficient-Prompt")
    if layers:
        state["frames.position"] = stretched(state["frames.position"], context.n_frames)
    return replace(config, form="table", layers=layers, positions="published"), state


def _write(config: Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if config.form != "table" or (config.layers and config.positions != "published"):
        raise ConfigError(
            "the published code would compute something else from these weights",
            seen=f"form={config.form}, positions={config.positions}",
            fix="Train with form=table and positions=published to write a published checkpoint.",
        )
    return back_to_theirs(state, _official_names(config.layers))


HEAD = HeadSpec(
    config=Config,
    build=_build,
    needs=lambda config: ("embedding", "names"),
    tasks=frozenset({"classify"}),
    source="Efficient-Prompt, Ju et al. 2022, arXiv:2112.04478",
    official=Official(_read, _write, container="state_dict", clip="clipmodel."),
)
