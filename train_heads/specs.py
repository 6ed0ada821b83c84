"""What a head declares, what it is built from, what it returns, and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data_manifests.errors import ConfigError
from ..extract.batches import FeatureBatch
from ..extract.specs import PRECISIONS, TowerShape
from ..extract.text import TextFeatures
from ..extract.towers import Tower


@dataclass(frozen=True, slots=True)
class HeadContext:
    """What a head may know when it is built; nothing here is a tensor of the training set."""

    shape: TowerShape
    n_frames: int  # T of the store's videos
    class_names: tuple[str, ...]  # to score
    tower: Callable[[], Tower]  # the frozen tower, loaded on the first call; for heads that reach into it
    trained_names: tuple[str, ...] = ()  # classes of the training, by which trained parts are sized; () is class_names

    def __post_init__(self) -> None:
        """A head that scores what it was trained on has one list of classes."""
        object.__setattr__(self, "trained_names", self.trained_names or self.class_names)


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What a head says of a batch."""

    logits: Tensor | None = None  # [B, C], or [n, Q, W] of Episodes
    embedding: Tensor | None = None  # [B, E], un-normalised
    losses: Mapping[str, Tensor] = field(default_factory=dict)  # terms to add to the loss, already weighted


@dataclass(frozen=True, slots=True)
class Official:
    """How a head's weights are named in checkpoints of its authors' code; the frozen CLIP in them is not its business.

    read(weights, context, config) -> (config, state): the config with all that the tensors tell put into it, and the
        state of the head under our names. `config` brings what no tensor tells. Tables over frames are stretched to
        context.n_frames. Raises SpecMismatch, naming what is missing or unknown.
    write(config, state) -> weights: the inverse.
    """

    read: Callable[[Mapping[str, Tensor], HeadContext, Any], tuple[Any, dict[str, Tensor]]]
    write: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]]
    container: str = "model"  # the key of their file under which the weights lie
    prefix: str = ""  # before every name, left by data-parallel training
    clip: str | None = None  # prefix of the frozen CLIP, where their files hold it too


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """The constant `HEAD` of every file in `heads/`: the file's name is the head's name."""

    config: type  # a frozen dataclass of plain settings, every one with a default
    build: Callable[[Any, HeadContext], nn.Module]
    needs: Callable[[Any], tuple[str, ...]]  # of a config: features, and "text" (embeddings of the classes) or "names"
    # (their names, of which the head makes something of its own) where it scores classes by what they are called
    tasks: frozenset[str]  # classify: forward(batch, text) -> HeadOutput | episodes: an EpisodeHead
    source: str  # where it comes from, as a citation
    is_trained: bool = True  # False: nothing to train; `eval --head NAME` uses it as it is
    official: Official | None = None  # None: there are no checkpoints of its authors

    def needs_text(self, config: Any) -> bool:
        """Whether the head is given the text tower's embeddings of the classes."""
        return "text" in self.needs(config)

    def reads_names(self, config: Any) -> bool:
        """Whether the head scores classes by their names, so that it may be asked about classes it never saw."""
        return not {"text", "names"}.isdisjoint(self.needs(config))

    @property
    def learns_from_episodes(self) -> bool:
        """Whether training gives it `Episodes`; a head that classifies as well is trained on batches of videos."""
        return self.is_trained and "classify" not in self.tasks

    def features(self, config: Any) -> tuple[str, ...]:
        """The stored features it reads: `needs` without text and names."""
        return tuple(name for name in self.needs(config) if name not in ("text", "names"))


class ClassifierHead(Protocol):
    """A head with the task `classify`: an nn.Module whose forward is this."""

    def __call__(self, batch: FeatureBatch, text: TextFeatures | None) -> HeadOutput:
        """Score a batch; `batch` is never changed in place."""
        ...


@dataclass(frozen=True, slots=True)
class Episodes:
    """n few-shot episodes over a bank of V videos: what a step of episodic training is made of.

    Classes are counted in the list of training classes, which is HeadContext.trained_names.
    """

    bank: FeatureBatch  # every video once
    support: Tensor  # rows of the bank [n, W, K]
    query: Tensor  # rows of the bank [n, Q], those of all ways of an episode
    class_ids: Tensor  # which class each way is, [n, W]
    labels: Tensor  # the right way of each query, [n, Q]

    def __len__(self) -> int:
        """Episodes, n."""
        return len(self.query)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Episodes:
        """Move them; `dtype` converts the floating features."""
        rows = (part.to(device, non_blocking=True) for part in (self.support, self.query, self.class_ids, self.labels))
        return Episodes(self.bank.to(device, dtype), *rows)

    def only(self, names: Iterable[str]) -> Episodes:
        """The same episodes with some of the features."""
        return replace(self, bank=self.bank.only(names))


class EpisodeHead(Protocol):
    """A head with the task `episodes`; one that is trained is also called with `Episodes`, see `__call__`."""

    uses_class_names: bool
    is_transductive: bool

    def __call__(self, episodes: Episodes, text: TextFeatures | None) -> HeadOutput:
        """Training: logits [n, Q, W] and the head's own losses. `text` is of all training classes, [C, E]."""
        ...

    def episode_logits(self, bank: FeatureBatch, support: Tensor, query: Tensor, text: Tensor | None) -> Tensor:
        """Score the queries of many episodes; larger is closer.

        Args:
            bank: features of all V videos that the episodes draw from.
            support: rows of the bank, [n, W, K].
            query: rows of the bank, [n, Q] (queries of all ways of an episode).
            text: class embeddings of each episode's ways, [n, W, E]; None where names are not used.

        Returns:
            logits [n, Q, W].
        """
        ...


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """The one plain training loop, in numbers."""

    epochs: int = 30
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    decay_all: bool = False  # also decay biases, norms and tables of positions, as EVL and Efficient-Prompt publish
    warmup_epochs: float = 1.0
    min_lr_ratio: float = 0.0  # the cosine ends at lr × this
    label_smoothing: float = 0.0
    clip_norm: float = 1.0  # 0 switches clipping off
    precision: str = "fp32"  # autocast of the forward pass: fp32 | bf16 | fp16
    seed: int = 0
    val_fraction: float = 0.15  # carved from the training split where the manifest has no validation split
    patience: int = 0  # epochs without a better validation score before stopping; 0 never stops early

    def __post_init__(self) -> None:
        """Refuse numbers that cannot train."""
        for name, low, high in (
            ("epochs", 1, math.inf),
            ("batch_size", 1, math.inf),
            ("lr", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("warmup_epochs", 0, math.inf),
            ("min_lr_ratio", 0, 1),
            ("label_smoothing", 0, 1),
            ("clip_norm", 0, math.inf),
            ("seed", 0, 2**63 - 1),
            ("patience", 0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                wanted = f"at least {low}" if high == math.inf else f"{low} to {high}"
                raise ConfigError(f"impossible {name}", seen=value, wanted=wanted)
        if not 0 < self.val_fraction < 1:
            raise ConfigError("val_fraction is a share of the training videos", seen=self.val_fraction, wanted="0 to 1")
        if self.precision not in PRECISIONS:
            raise ConfigError("unknown precision", seen=self.precision, wanted=" or ".join(PRECISIONS))


@dataclass(frozen=True, slots=True)
class EpisodeTraining:
    """What an episodic head is trained on, in numbers; epochs, learning rate and the rest are the TrainSpec's."""

    n_way: int = 5  # W
    n_shot: int = 1  # K
    n_query: int = 5  # of a class, in training; validation asks one, as the protocol does
    episodes_per_epoch: int = 200
    n_val_episodes: int = 400
    per_step: int = 8  # episodes to a step: the batch size

    def __post_init__(self) -> None:
        """Refuse numbers that draw nothing."""
        for name in self.__dataclass_fields__:
            least = 2 if name == "n_way" else 1
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"impossible {name}", seen=value, wanted=f"at least {least}")
