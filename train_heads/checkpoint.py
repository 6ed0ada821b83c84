"""A trained head in a folder: weights in safetensors, everything else in one JSON; and the head at work again.

- RUN/head.safetensors: trained parameters and buffers. Frozen parts are not copied: they come from the tower.
- RUN/checkpoint.json: written last, so a folder that has it is whole.
- RUN/state.pt: what a run that has not ended needs to go on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..data_manifests.errors import ColdframeError
from ..extract.provenance import code_commit, code_versions
from ..extract.specs import FeatureSpec
from ..extract.store import FeatureStore
from .build import build_head, find_device, needed_features
from .heads import find
from .predictor import Predictor
from .settings import fill
from .specs import EpisodeTraining, TrainSpec

FORMAT_VERSION = 1
DESCRIPTION, WEIGHTS, STATE = "checkpoint.json", "head.safetensors", "state.pt"


class CheckpointError(ColdframeError, ValueError):
    """Not a checkpoint of ours, or a broken one."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A trained head and everything that made it."""

    head: str
    config: Any  # the head's own
    train: TrainSpec
    class_names: tuple[str, ...]
    seen_classes: tuple[str, ...]  # classes of the videos it was trained on
    templates: tuple[str, ...]  # of the class texts
    features: FeatureSpec  # of the store
    needs: tuple[str, ...]  # canonical stored features
    manifest_fingerprint: str
    selection: str  # the split that chose the epoch
    n_train: int
    n_val: int
    n_missing: int  # videos of the two splits that the store lacks
    epoch: int  # the chosen one
    step: int
    scores: Mapping[str, float]  # on the validation split, at that epoch
    weights: Mapping[str, Tensor]
    episodes: EpisodeTraining | None = None  # of a head that learned from episodes
    fingerprint: str = ""  # of the weights' file
    commit: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights, as plain values."""
        described = dataclasses.asdict(dataclasses.replace(self, weights={}))
        del described["weights"]
        return described | {"format_version": FORMAT_VERSION, "feature_fingerprint": self.features.fingerprint}

    def describe(self) -> str:
        """Short text for people."""
        if not self.n_train:
            return f"{self.head}, {len(self.class_names)} classes, weights as published"
        missing = f", {self.n_missing} missing from the store" if self.n_missing else ""
        classes = self.class_names if self.episodes is None else self.seen_classes
        return (
            f"{self.head}, {len(classes)} classes, {self.n_train} training videos{missing}\n"
            f"epoch {self.epoch} of {self.train.epochs}: top-1 {100 * self.scores['top_1']:.1f} % "
            f"of {self.validated_on}, on which the epoch was chosen"
        )

    @property
    def validated_on(self) -> str:
        """What the scores are of, in words."""
        videos = f"{self.n_val} {self.selection} videos"
        if self.episodes is None:
            return videos
        return (
            f"{self.episodes.n_val_episodes} {self.episodes.n_way}-way {self.episodes.n_shot}-shot episodes of {videos}"
        )

    def predictor(
        self, store: FeatureStore, class_names: Sequence[str] | None = None, device: str = "auto"
    ) -> Predictor:
        """Put the head to work on a store.

        Args:
            class_names: to score instead of the training classes, by a head that reads class names; any other head
                knows its own classes alone.

        Raises:
            SpecMismatch: the store was made otherwise than the training store; names the field.
            CheckpointError: the weights do not fit the head.
        """
        store.spec.expect(self.features, f"the store {store.path}")
        reads_names = find(self.head).reads_names(self.config)
        names = tuple(class_names) if class_names is not None and reads_names else self.class_names
        found = find_device(device)
        trained_names = self.class_names if self.episodes is None else self.seen_classes
        module, text = build_head(
            self.head, self.config, store, names, self.templates, found, trained_names=trained_names
        )
        _load(module, self.weights, self.head)
        return Predictor(
            head=self.head,
            config=dataclasses.asdict(self.config),
            module=module,
            needs=needed_features(self.head, self.config, store),
            class_names=names,
            text=text,
            device=found,
            checkpoint=self.fingerprint,
            manifest_fingerprint=self.manifest_fingerprint,
            seen_classes=self.seen_classes,
            selection=self.selection,
            seed=self.train.seed,
        )


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Write a checkpoint to a folder, whole or not at all; returns it with fingerprint, commit and versions."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.weights.items()}
    data = as_safetensors(tensors)
    checkpoint = dataclasses.replace(
        checkpoint,
        weights=tensors,
        fingerprint=hashlib.sha256(data).hexdigest()[:16],
        commit=code_commit(),
        versions=code_versions(),
    )
    write_whole(folder / WEIGHTS, data)
    write_whole(folder / DESCRIPTION, json.dumps(checkpoint.to_json(), indent=1, ensure_ascii=False).encode())
    return checkpoint


def load_checkpoint(folder: Path | str) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: not a checkpoint, one of an unknown head or format, or a damaged one.
    """
    folder = Path(folder)
    described = _describe(folder)
    try:
        data = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise CheckpointError(f"the weights of {folder} cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest()[:16] != described.fingerprint:
        raise CheckpointError(f"{folder / WEIGHTS} is damaged, or belongs to another run", fix="Copy the folder again.")
    return dataclasses.replace(described, weights=safetensors.torch.load(data))


def trained_tensors(head: nn.Module) -> dict[str, Tensor]:
    """The state that training makes: parameters with gradient, and buffers; not what is frozen."""
    frozen = {name for name, parameter in head.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in head.state_dict().items() if name not in frozen}


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Keep what an unfinished run needs to go on; replaces the last state in one step."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(folder / STATE, buffer.getbuffer())


def read_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The state of an unfinished run, or None.

    Raises:
        CheckpointError: there is one, but it is damaged.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read", fix=f"Remove {folder} to train from the start.") from error


def remove_state(folder: Path) -> None:
    """Forget the state of a run that has ended."""
    (folder / STATE).unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder has ended with a checkpoint."""
    return (folder / DESCRIPTION).exists()


def _describe(folder: Path) -> Checkpoint:
    """The checkpoint without its weights."""
    path = folder / DESCRIPTION
    if not path.is_file():
        wanted = f"a folder with {DESCRIPTION}"
        raise CheckpointError(f"{folder} is not a checkpoint", seen=_what_it_is(folder), wanted=wanted)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version_found = found.pop("format_version")
        if version_found == FORMAT_VERSION:
            return _checkpoint(found)
    except (KeyError, TypeError, AttributeError, ValueError, ColdframeError) as error:
        raise CheckpointError(f"{path} does not describe a checkpoint: {error}") from error
    raise CheckpointError(
        f"{folder} is of a format that this release does not read",
        seen=f"version {version_found}",
        wanted=f"version {FORMAT_VERSION}",
        fix="Use the coldframe release that wrote it.",
    )


def _checkpoint(described: dict[str, Any]) -> Checkpoint:
    del described["feature_fingerprint"]  # for people who read the file; it follows from the spec
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in described.items()
    }
    fields["config"] = fill(find(fields["head"]).config, fields["config"], "head")
    fields["train"] = fill(TrainSpec, fields["train"], "train")
    if (episodes := fields.get("episodes")) is not None:
        fields["episodes"] = fill(EpisodeTraining, episodes, "episodes")
    fields["features"] = FeatureSpec.from_json(fields["features"])
    return Checkpoint(**fields, weights={})


def _what_it_is(folder: Path) -> str:
    if not folder.exists():
        return "nothing there"
    if not folder.is_dir():
        return "a file"
    if (folder / "store.json").exists():
        return "a feature store"
    if (folder / STATE).exists():
        return "a run that has not ended; run train-head again to go on"
    return "another folder"


def _load(module: nn.Module, weights: Mapping[str, Tensor], head: str) -> None:
    """Load the trained tensors, all of them and nothing else."""
    own = trained_tensors(module)
    wrong = sorted(name for name in own.keys() | weights.keys() if _shape(own, name) != _shape(weights, name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"the weights do not fit {head}: {len(wrong)} tensors differ, first {name}",
            seen=_shape(weights, name),
            wanted=_shape(own, name),
        )
    module.load_state_dict(weights, strict=False)


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return f"shape {tuple(tensors[name].shape)}" if name in tensors else "no such tensor"


def as_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a file of safetensors holds them."""
    return safetensors.torch.save(dict(tensors))


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole, on the disk before it takes its name."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
