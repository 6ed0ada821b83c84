"""Adapters in both towers, and in each image block one more token that has looked at all frames of the video.

In a changed block each frame is given a token: the mean of the frame's tokens plus a trained vector of its place in time,
passed through the block's own frozen attention along time. The frame's tokens attend to it, then it is dropped. Serial
adapters follow the attention of image and text blocks. A loss rewards frames whose embeddings differ.

Source: EZ-CLIP, Ahmad et al. 2023, arXiv:2312.08010 (temporal visual prompts, motion loss); the same method is T2L,
    TMLR 2025. What the paper leaves open follows its code, Shahzadnit/EZ-CLIP 2f4d622 (MIT); the matching loss is
    ActionCLIP's.
Differs: a branch is dropped for a whole video or sentence, not for one position of a token throughout a batch. Attention
    probabilities are not dropped, which the original does at the rates of the branches. The texts of a batch are encoded
    once a class, so samples of one class share what is dropped. A single frame has no variance: the motion loss counts
    it as zero. Padded frames take no part. Class texts are one sentence unless `descriptions` or "actionclip" is chosen;
    the sixteen sentences of the latter are ours, in the place of ActionCLIP's. `reach` leaves the lowest blocks as they
    are, which the original cannot; of the last block alone it trains without the patches (`compact`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log, sqrt
from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ...data_manifests.errors import ConfigError
from ...extract.batches import FeatureBatch
from ...extract.blocks import Block, Insert
from ...extract.summary import attend, unpack
from ...extract.text import TextFeatures
from ..class_texts import ACTIONCLIP, TEMPLATES, AdaptedTexts, from_descriptions, from_templates
from ..layers import Adapter, DropPath, cosines, masked_mean, of_frames
from ..layouts import back_to_theirs, renamed, stretched
from ..limits import require_at_least, require_rate
from ..losses import motion_loss, same_class_contrastive
from ..reach import Reach, reached_feature
from ..specs import HeadContext, HeadOutput, HeadSpec, Official


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `ez_clip`."""

    reach: int = 0  # the blocks above it are changed; see train_heads/reach.py
    compact: bool = False  # of a reach of -2: read summary.-2 in the place of the tokens, which is the same
    prompts: bool = True  # a token a frame that has looked at the other frames
    deep: bool = True  # a prompt in every changed block, or in the first alone
    temporal_adapters: bool = False  # instead of prompts: frozen attention along time at every place, adapted
    adapter_ratio: int = 4  # width of a tower over that of its adapters' bottlenecks
    temporal_embedding: bool = False  # a frozen shift of each frame before ln_pre, of files in which it is not zero
    motion_weight: float = 1.0
    drop_path: float = 0.1  # of the last block's branches; in the first none are dropped
    prompt_dropout: float = 0.1
    descriptions: str | None = None  # a CSV with the columns name and description; None: the template
    template: str = "a video of a person {}."  # a sentence, or "actionclip": sixteen of them
    checkpoint: bool = False  # compute activations again in the backward pass, to save memory

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if self.prompts and self.temporal_adapters:
            raise ConfigError(
                "temporal adapters stand in the place of prompts",
                fix="Choose one: --set prompts=false, or no adapters.",
            )
        if self.compact and (self.reach != -2 or self.temporal_adapters):
            raise ConfigError(
                "compact features know no patches, which all but the last block read, and adapters along time",
                seen=f"reach={self.reach}, temporal_adapters={str(self.temporal_adapters).lower()}",
                wanted="reach=-2 and prompts",
            )
        if self.temporal_embedding and self.reach != 0:
            raise ConfigError("frames are shifted before the first block", seen=f"reach={self.reach}", wanted="reach=0")
        require_at_least(1, self, "adapter_ratio")
        require_at_least(0, self, "motion_weight")
        require_rate(self, "drop_path", "prompt_dropout")
        if self.template != ACTIONCLIP and "{}" not in self.template:
            wanted = f"a sentence with {{}} where the class name goes, or {ACTIONCLIP}"
            raise ConfigError("no class name would be in the template", seen=repr(self.template), wanted=wanted)

    @property
    def feature(self) -> str:
        """The stored feature that it reads."""
        return f"summary.{self.reach}" if self.compact else reached_feature(self.reach)

    def sentences(self, class_names: tuple[str, ...]) -> list[list[str]]:
        """What is said of each class, C rows of P sentences."""
        if self.descriptions is not None:
            return from_descriptions(class_names, Path(self.descriptions))
        return from_templates(class_names, TEMPLATES if self.template == ACTIONCLIP else (self.template,))


class EZCLIP(nn.Module):
    """Both towers with what is put into them; classes are scored by the cosine of video and text."""

    uses_class_names = True
    offset: Tensor | None

    def __init__(self, config: Config, context: HeadContext) -> None:
        super().__init__()
        shape = context.shape
        self.config, self.tower = config, context.tower()
        self.reach = Reach.of(config.reach, shape)
        self.register_buffer(
            "offset", torch.zeros(context.n_frames, shape.width) if config.temporal_embedding else None
        )
        n_rates = max(shape.layers, shape.text_layers)
        rates = torch.linspace(0, config.drop_path, n_rates).tolist()
        self.image = nn.ModuleList(
            ImageInsert(
                shape.width, context.n_frames, config, rate, has_prompt=config.prompts and (config.deep or not i)
            )
            for i, rate in enumerate(rates[self.reach.layer : shape.layers])
        )
        text_inserts = nn.ModuleList(
            AdapterInsert(shape.text_width, config.adapter_ratio, rate) for rate in rates[: shape.text_layers]
        )
        self.texts = AdaptedTexts(config.sentences(context.class_names), self.tower, text_inserts, config.checkpoint)

    def forward(self, batch: FeatureBatch, text: TextFeatures | None = None) -> HeadOutput:
        """Score classes; in training, the losses of matching the videos of the batch to their texts instead."""
        frames = self.frames(batch)
        video = masked_mean(frames, batch.mask)
        if not self.training:
            return HeadOutput(logits=self.scores(video), embedding=video)
        similarity = cosines(video, self.texts.of(batch.labels))
        losses = {
            "contrastive": same_class_contrastive(self.tower.logit_scale * similarity, batch.labels),
            "motion": self.config.motion_weight * motion_loss(frames, batch.mask),
        }
        return HeadOutput(embedding=video, losses=losses)

    def frames(self, batch: FeatureBatch) -> Tensor:
        """Embeddings of the frames, [B, T, E], un-normalised."""
        if self.config.compact:
            return self.tower.project(self._last_block(batch))
        offset = None if self.offset is None else of_frames(self.offset, batch.mask.shape[1])
        tokens = self.tower.resume(
            self.reach.tokens(batch, self.tower, offset),
            self.reach.layer,
            inserts=self.image,
            mask=batch.real,
            class_token_only=True,
            checkpoint=self.config.checkpoint,
        )
        return self.tower.project(tokens)

    def _last_block(self, batch: FeatureBatch) -> Tensor:
        """The class tokens that the last block leaves, [B, T, 1, D], from what it needs of each frame."""
        insert, block = self.image[0], self.tower.block(self.reach.layer + 1)
        assert isinstance(insert, ImageInsert)
        frame = unpack(batch[f"summary.{self.reach.layer}"], block.heads)
        with self.tower.working_precision():
            extra = None if insert.prompt is None else insert.temporal_token(frame.mean, block, batch.real)
            class_token = rearrange(frame.class_token, "b t d -> b t 1 d")
            return block.finish(class_token, attend(frame, extra, block), insert, batch.real)

    def scores(self, video: Tensor) -> Tensor:
        """Logits [B, C] of videos [B, E]; of several sentences a class, the log of their mean probabilities."""
        logits = self.tower.logit_scale * cosines(video, rearrange(self.texts.all(), "c p e -> p c e"))  # [P, B, C]
        if len(logits) == 1:
            return logits[0]
        return logits.log_softmax(dim=-1).logsumexp(dim=0) - log(len(logits))


class AdapterInsert(Insert):
    """What a block of either tower is given: an adapter before the MLP; its branches are dropped at a rate."""

    def __init__(self, width: int, adapter_ratio: int, rate: float) -> None:
        super().__init__()
        self.adapter, self.drop_path = Adapter(width, max(1, width // adapter_ratio)), DropPath(rate)

    def after_attention(self, attended: Tensor) -> Tensor:
        """Drop it for some videos, or sentences."""
        return self.drop_path(attended)

    def before_mlp(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The stream and what its adapter adds."""
        return x + self.adapter(x)

    def after_mlp(self, added: Tensor, normed: Tensor) -> Tensor:
        """Drop it for some videos, or sentences."""
        return self.drop_path(added)


class ImageInsert(AdapterInsert):
    """What an image block is given beside: a token that looks along time, or an adapter there."""

    def __init__(self, width: int, n_frames: int, config: Config, rate: float, has_prompt: bool) -> None:
        super().__init__(width, config.adapter_ratio, rate)
        hidden = max(1, width // config.adapter_ratio)
        self.temporal_adapter = Adapter(width, hidden) if config.temporal_adapters else None
        self.prompt = None
        if has_prompt:
            bound = sqrt(6 / (3 * 16 * 16 + width))  # Xavier's of a patch of 16 pixels, as published for every tower
            self.prompt = nn.Parameter(torch.empty(n_frames, width).uniform_(-bound, bound))
        self.prompt_dropout = nn.Dropout(config.prompt_dropout)

    def before_attention(self, x: Tensor, block: Block, mask: Tensor | None) -> Tensor:
        """Add what the adapter makes of attention along time, at every place of a frame."""
        if self.temporal_adapter is None:
            return x
        along_time = rearrange(x, "b t s d -> b s t d")
        real = None if mask is None else repeat(mask, "b t -> b s t", s=x.shape[2])
        seen = self.temporal_adapter(block.attend(along_time, mask=real))
        return x + self.drop_path(rearrange(seen, "b s t d -> b t s d"))

    def extra_tokens(self, x: Tensor, block: Block, mask: Tensor | None) -> Tensor | None:
        """One token a frame, [B, T, 1, D]."""
        return None if self.prompt is None else self.temporal_token(x.mean(dim=2), block, mask)

    def temporal_token(self, mean: Tensor, block: Block, mask: Tensor | None) -> Tensor:
        """What each frame's prompt sees along time: means over the tokens of a frame [B, T, D] -> [B, T, 1, D].

        Raises as `of_frames` does.
        """
        assert self.prompt is not None
        asking = of_frames(self.prompt_dropout(self.prompt), mean.shape[1]) + mean
        return rearrange(self.drop_path(block.attend(asking, mask=mask)), "b t d -> b t 1 d")


def read_official(
    weights: Mapping[str, Tensor], context: HeadContext, config: Config
) -> tuple[Config, dict[str, Tensor]]:
    """A published checkpoint without its CLIP, under our names; see `Official`."""
    weights = dict(weights)
    offset = weights.pop(POSITIONS, None)
    prompts = weights.pop(PROMPTS, None)
    config = replace(
        config,
        reach=0,
        compact=False,
        prompts=prompts is not None,
        temporal_embedding=offset is not None and bool(offset.any()),
        deep=config.deep if prompts is None else len(prompts) == context.shape.layers,
        temporal_adapters=any(".T_Adapter." in name for name in weights),
    )
    names = _official_names(config, context.shape.layers, context.shape.text_layers)
    state = renamed(weights, names, "EZ-CLIP")
    hidden, width = state["image.0.adapter.down.weight"].shape
    for i, prompt in enumerate(() if prompts is None else prompts):
        state[f"image.{i}.prompt"] = stretched(prompt.float(), context.n_frames)
    if config.temporal_embedding and offset is not None:
        state["offset"] = stretched(offset[0].float(), context.n_frames)
    return replace(config, adapter_ratio=width // hidden), state


def write_official(config: Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state under the names of the original code, whose every block is changed.

    Raises:
        ConfigError: the lowest blocks are not changed.
    """
    if config.reach != 0:
        raise ConfigError("the original code changes every block", seen=f"reach={config.reach}", wanted="reach=0")
    layers, text_layers = (
        len({name.split(".")[place] for name in state if name.startswith(start)})
        for start, place in (("image.", 1), ("texts.inserts.", 2))
    )
    weights = back_to_theirs(state, _official_names(config, layers, text_layers))
    prompts = [state[f"image.{i}.prompt"] for i in range(layers) if f"image.{i}.prompt" in state]
    if prompts:
        weights[PROMPTS] = torch.stack(prompts)
        weights[POSITIONS] = torch.zeros_like(weights[PROMPTS][:1])
    if "offset" in state:
        weights[POSITIONS] = rearrange(state["offset"], "t d -> 1 t d")
    return weights


PROMPTS, POSITIONS = "visual.transformer.T_prompt_embeddings", "visual.temporal_embedding"


def _official_names(config: Config, layers: int, text_layers: int) -> dict[str, str]:
    """Their name of every tensor but the prompts → ours."""
    modules = {f"visual.transformer.resblocks.{i}.Adapter": f"image.{i}.adapter" for i in range(layers)}
    modules |= {f"transformer.resblocks.{i}.Adapter": f"texts.inserts.{i}.adapter" for i in range(text_layers)}
    if config.temporal_adapters:
        modules |= {f"visual.transformer.resblocks.{i}.T_Adapter": f"image.{i}.temporal_adapter" for i in range(layers)}
    return {
        f"{theirs}.{fc}.{leaf}": f"{ours}.{part}.{leaf}"
        for theirs, ours in modules.items()
        for fc, part in (("D_fc1", "down"), ("D_fc2", "up"))
        for leaf in ("weight", "bias")
    }


HEAD = HeadSpec(
    config=Config,
    build=EZCLIP,
    needs=lambda config: (config.feature, "names"),
    tasks=frozenset({"classify"}),
    source="EZ-CLIP, Ahmad et al. 2023, arXiv:2312.08010",
    official=Official(read_official, write_official, container="model_state_dict", clip=""),
)
