"""CLIP with adapters in both towers, taught by four tasks at once.

TED-adapters see each token's neighbours in time and what changed around it; adapters in the text tower see the class
sentences; one more adapter sees the frame embeddings. The tasks: match the videos of a batch to their sentences, find a
video's sentence among those of all classes, find the words masked in its sentence, and classify it without text.

Source: M2-CLIP, Wang et al. 2024, arXiv:2401.11649; sizes, names and initialisation are those of the official code,
    sallymmx/m2clip 3c8c661, which states no licence: none of it is used here.
Differs: text adapters add nothing at first (`text_init = "original"`: the published draw, after which frozen CLIP's
    agreement of videos with unseen names is soon lost). The cross-modal loss is the cross-entropy of its logits, not of
    their softmax (`double_softmax`). Videos are matched to whole sentences, not to masked ones (`masked_contrastive`).
    Words are masked for every video, where the published code as released masks none (`masked_share = 0`). The head may
    reach into the upper blocks alone; see reach.py. Padded frames take no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...data_manifests.errors import ConfigError
from ...extract.batches import FeatureBatch
from ...extract.text import TextFeatures
from .. import m2_clip_layout as layout
from ..class_texts import from_templates
from ..layers import cosines, masked_mean
from ..layouts import back_to_theirs, renamed
from ..limits import require_at_least, require_choice, require_rate, require_share
from ..losses import same_class_contrastive
from ..masked_words import MaskedSentences, WordDecoder, masked_places, masked_word_loss, vocabulary
from ..reach import Reach, reached_feature
from ..specs import HeadContext, HeadOutput, HeadSpec, Official
from ..temporal_adapters import TEDInsert, TemporalEnhancement
from ..text_adapters import INITS, AdaptedSentences, TextInsert

PLACES = ("mlp", "both")
SCORES = ("text", "classifier", "mean")


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `m2_clip`."""

    reach: int = 0  # 0: every block, from pixels | k: the blocks above k, from tokens.<k> | -1: none, from cls.<L>
    places: str = "mlp"  # adapters before the MLP, as for Kinetics | both: and before attention, as for SSv2
    width: int = 384  # of the adapters' bottlenecks
    text_layers: int | None = None  # adapted blocks of the text tower, the last ones; None: 1 of `mlp`, all of `both`
    text_lr: float = 0.5  # share of the learning rate that text adapters have
    text_init: str = "identity"  # identity: text adapters add nothing at first | original
    template: str = "A video of {}"
    dropout: float = 0.5  # before the classifier
    masked_share: float = 0.2  # of a sentence's words, at least one; 0 masks none and leaves that task out
    masked_contrastive: bool = False  # match videos to the masked sentences, as published
    double_softmax: bool = False  # cross-entropy of probabilities, as published
    scores: str = "text"  # text: similarity to class sentences, also of unseen classes | classifier | mean: of both
    text_blend: float = 1.0  # share of the adapters in sentences of classes not trained on; 0: frozen CLIP's embedding
    n_words: int | None = None  # rows of the classifier of words; None: one a word of the training sentences
    checkpoint: bool = False  # keep no activations inside blocks, and compute them again in the backward pass

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        for name, choices in (("places", PLACES), ("text_init", INITS), ("scores", SCORES)):
            require_choice(self, name, choices)
        require_at_least(1, self, "width", "text_layers", "n_words")
        require_rate(self, "dropout")
        require_share(self, "masked_share", "text_blend", "text_lr")
        if "{}" not in self.template:
            raise ConfigError("a template is a sentence with {} where the class name goes", seen=self.template)
        if self.masked_contrastive and not self.masked_share:
            raise ConfigError("masked_contrastive matches videos to masked sentences", seen="masked_share=0")


class M2CLIP(nn.Module):
    """Two adapted towers, a classifier of videos and a classifier of masked words.

    As published, nothing reads the patches behind the last block's MLP, so the local difference of its TED-adapter is
    trained in name only; `idle` names what is.
    """

    uses_class_names = True
    rows: Tensor
    depth: Tensor

    def __init__(self, config: Config, context: HeadContext) -> None:
        super().__init__()
        self.config, self.tower, shape = config, context.tower(), context.shape
        self.reach = Reach.of(config.reach, shape)
        both = config.places == "both"
        self.visual = nn.ModuleList(
            TEDInsert(shape.width, config.width, shape.grid, both) for _ in range(self.reach.n_blocks)
        )
        self.temporal = TemporalEnhancement(shape.embed_dim, max(1, shape.embed_dim // 2))
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(shape.width, len(context.trained_names))
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

        text_inserts = [
            TextInsert(shape.text_width, config.width, both, config.text_init, config.text_lr)
            for _ in range(_n_text_layers(config, shape.text_layers) + 1)
        ]
        ids = self.tower.tokenize(_sentences(config, context.class_names))
        share = _adapted_share(config, context)
        self.sentences = AdaptedSentences(ids, self.tower, nn.ModuleList(text_inserts[:-1]), share, config.checkpoint)
        trained = _sentences(config, context.trained_names)
        self.n_words = len(vocabulary(trained))
        self.decoder = WordDecoder(self.tower, text_inserts[-1], config.n_words or self.n_words)
        self.masked = MaskedSentences(trained, self.tower, config.masked_share) if config.masked_share else None

        self.is_scoring_its_own = context.class_names == context.trained_names
        self.register_buffer("rows", _rows(config, context), persistent=False)
        self.register_buffer("depth", torch.tensor([shape.layers, shape.text_layers]))  # `_write` names blocks by it
        self.idle = _idle(self)

    def forward(self, batch: FeatureBatch, text: TextFeatures | None = None) -> HeadOutput:
        """Pixels, tokens or class tokens of a batch -> in evaluation logits [B, C], in training the losses instead.

        Raises:
            ConfigError: in training, of a head that was built for other classes or words than it is to learn.
        """
        mask = batch.real
        classes = self.class_tokens(batch, mask)
        frames = self.embed_frames(classes, mask)
        video = masked_mean(frames, batch.mask)
        by_video = self.classify(masked_mean(classes, batch.mask))
        is_taught = self.training or (
            torch.is_grad_enabled() and self.is_scoring_its_own and bool((batch.labels >= 0).all())
        )
        by_text = self.compare(video, self.sentences())
        losses = self._losses(batch.labels, video, frames, mask, by_video, by_text) if is_taught else {}
        return HeadOutput(None if self.training else self._score(by_video, by_text), video, losses)

    def class_tokens(self, batch: FeatureBatch, mask: Tensor | None) -> Tensor:
        """Class tokens behind the last block, [B, T, D]."""
        tokens = self.reach.tokens(batch, self.tower)
        if self.visual:
            options = {"inserts": self.visual, "mask": mask, "checkpoint": self.config.checkpoint}
            tokens = self.tower.resume(tokens, self.reach.layer, class_token_only=True, **options)
        return tokens[:, :, 0]

    def embed_frames(self, classes: Tensor, mask: Tensor | None) -> Tensor:
        """Joint embeddings of frames, told of their neighbours: class tokens [B, T, D] -> [B, T, E]."""
        frames = self.tower.project(rearrange(classes, "b t d -> b t 1 d"))
        return frames + rearrange(self.temporal(rearrange(frames, "b t e -> b t 1 e"), mask), "b t 1 e -> b t e")

    def classify(self, video: Tensor) -> Tensor:
        """The classifier that reads no text: mean class tokens [B, D] -> logits [B, trained classes]."""
        return self.classifier(self.dropout(self.tower.visual.ln_post(video)))

    def compare(self, video: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosines of videos [B, E] and texts [C, E], in float32: [B, C]."""
        return self.tower.logit_scale * cosines(video, texts)

    def _losses(
        self, labels: Tensor, video: Tensor, frames: Tensor, mask: Tensor | None, by_video: Tensor, by_text: Tensor
    ) -> dict[str, Tensor]:
        """The four terms, weighted as published."""
        if not self.is_scoring_its_own:
            raise ConfigError(
                "m2_clip was built to score other classes than it is trained on", fix="Build it for one list."
            )
        in_batch, losses = by_text[:, labels], {}
        if self.masked is not None:
            if self.config.n_words not in (None, self.n_words):
                raise ConfigError(
                    "the classifier of words is not of the training sentences",
                    seen=f"n_words={self.config.n_words}",
                    wanted=self.n_words,
                    fix="Set masked_share=0 to train without masked words.",
                )
            ids, words = self.masked(labels)
            places = masked_places(words, self.masked.n_most)
            stream = self.sentences.read(ids, torch.cat([places, ids.argmax(dim=-1, keepdim=True)], dim=1))
            found = self.decoder(stream[:, :-1], frames, mask)
            losses["masked_words"] = masked_word_loss(found, words.gather(1, places)) / 10
            if self.config.masked_contrastive:
                in_batch = self.compare(video, self.tower.text.project(stream[:, -1:], torch.zeros_like(labels)))
        cross_modal = by_text.softmax(dim=-1) if self.config.double_softmax else by_text
        return losses | {
            "contrastive": same_class_contrastive(in_batch, labels) / 2,
            "cross_modal": cross_entropy(cross_modal, labels) / 2,
            "classification": cross_entropy(by_video.float(), labels),
        }

    def _score(self, by_video: Tensor, by_text: Tensor) -> Tensor:
        """Logits [B, C] of the classes to score."""
        if self.config.scores == "classifier":
            return by_video[:, self.rows]
        if self.config.scores == "text":
            return by_text
        both = torch.stack([by_video[:, self.rows].float(), by_text]).log_softmax(dim=-1)
        return both.logsumexp(dim=0) - log(2)


def _n_text_layers(config: Config, there_are: int) -> int:
    """How many blocks of the text tower have adapters.

    Raises:
        ConfigError: more than the tower has.
    """
    published = there_are if config.places == "both" else 1
    wanted = published if config.text_layers is None else config.text_layers
    if not 1 <= wanted <= there_are:
        raise ConfigError(
            "m2_clip adapts blocks of the text tower", seen=f"text_layers={wanted}", wanted=f"1 to {there_are}"
        )
    return wanted


def _sentences(config: Config, class_names: tuple[str, ...]) -> list[str]:
    return [sentence for (sentence,) in from_templates(class_names, [config.template])]


def _adapted_share(config: Config, context: HeadContext) -> list[float] | None:
    """Of the adapters in the embedding of each class to score; None is all of each."""
    if config.text_blend == 1 or set(context.class_names) <= set(context.trained_names):
        return None
    return [1.0 if name in context.trained_names else config.text_blend for name in context.class_names]


def _rows(config: Config, context: HeadContext) -> Tensor | None:
    """Which row of the classifier each class to score has; None where the classifier is not asked.

    Raises:
        ConfigError: it was not trained on one of them.
    """
    if config.scores == "text":
        return None
    place = {name: i for i, name in enumerate(context.trained_names)}
    if unseen := [name for name in context.class_names if name not in place]:
        raise ConfigError(
            f"the classifier knows its training classes alone, not {unseen[0]!r}",
            seen=f"scores={config.scores}",
            wanted="scores=text",
        )
    return torch.tensor([place[name] for name in context.class_names])


def _idle(head: M2CLIP) -> tuple[str, ...]:
    """Names of trained parameters that no loss reaches."""
    unread = [f"visual.{len(head.visual) - 1}.pre_mlp.local."] if head.visual else []
    if head.masked is None:
        unread.append("decoder.")
    return tuple(name for name, _ in head.named_parameters() if name.startswith(tuple(unread)))


def _read(weights: Mapping[str, Tensor], context: HeadContext, config: Config) -> tuple[Config, dict[str, Tensor]]:
    """A checkpoint of the original code; of its fusion block the frozen weights are left out: they are the tower's.

    The words of its classifier are in a file beside it, not in it: they are taken to be those of the training sentences
    where there are as many.

    Raises:
        SpecMismatch: tensors are missing or unknown.
    """
    layers, text_layers = context.shape.layers, context.shape.text_layers
    weights = {name: tensor for name, tensor in weights.items() if not layout.is_frozen(name, text_layers)}
    found = layout.sizes_of(weights)
    words = vocabulary(_sentences(config, context.trained_names))
    config = replace(
        config,
        reach=min(found.blocks, default=-1),
        places="both" if found.both else "mlp",
        width=found.width or config.width,
        text_layers=text_layers - min(found.text_blocks, default=text_layers) or None,
        n_words=found.n_words if found.n_words != len(words) else None,
    )
    depth = torch.tensor([layers, text_layers])
    state = renamed(weights, _their_names(config, depth), "M2-CLIP")
    return config, layout.without_frame_axis(state) | {"depth": depth}


def _write(config: Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_read`.

    Raises:
        ConfigError: the tower's texts are not as wide as its embedding, which theirs cannot but be.
    """
    if any(name.startswith("decoder.bridge.") for name in state):
        raise ConfigError("the published code has no map from the embedding to a text tower of another width")
    return back_to_theirs(layout.with_frame_axis(state), _their_names(config, state["depth"]))


def _their_names(config: Config, depth: Tensor) -> dict[str, str]:
    layers, text_layers = depth.tolist()
    blocks = range(config.reach % (layers + 1), layers)
    text_blocks = range(text_layers - _n_text_layers(config, text_layers), text_layers)
    return layout.their_names(blocks, text_blocks, both=config.places == "both")


HEAD = HeadSpec(
    config=Config,
    build=M2CLIP,
    needs=lambda config: (reached_feature(config.reach), "names"),
    tasks=frozenset({"classify"}),
    source="M2-CLIP, Wang et al. 2024, arXiv:2401.11649",
    official=Official(_read, _write),
)
