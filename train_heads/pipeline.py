"""Stage 2, top-down: store → training and validation videos → head → fit → checkpoint."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..data_manifests.episodes import EpisodeSpec
from ..data_manifests.errors import ConfigError
from ..data_manifests.records import Manifest, ManifestError
from ..data_manifests.splits import carve_validation
from ..extract.batches import FeatureDataset, labelled
from ..extract.provenance import code_commit, code_versions
from ..extract.store import FeatureStore, StoreError
from ..extract.text import TextFeatures
from .build import build_head, find_device, needed_features
from .checkpoint import (
    Checkpoint,
    Predictor,
    is_finished,
    load_checkpoint,
    remove_state,
    save_checkpoint,
    trained_tensors,
    write_whole,
)
from .episodic import EpisodeDataset
from .heads import find
from .loop import fit
from .settings import to_toml
from .specs import EpisodeTraining, TrainSpec

SETTINGS = "settings.toml"


def train(
    store: FeatureStore,
    manifest: Manifest,
    head: str,
    config: Any = None,
    spec: TrainSpec | None = None,
    out: Path | str = "run",
    *,
    episodes: EpisodeTraining | None = None,
    templates: Sequence[str] | str = "video",
    device: str = "auto",
    quiet: bool = False,
) -> Checkpoint:
    """Train a head on the features of a manifest's training videos and write the run to a folder.

    The best epoch is chosen on the split `val`, or on videos carved from `train` where there is none, never on `test`.
    The same call after an interruption goes on where it stopped; after the end it returns the checkpoint.

    Args:
        config: the head's own; None takes its defaults.
        out: folder of the run: settings, history, and in the end the checkpoint.
        episodes: of a head that learns from them; None takes the defaults.
        templates: sentences around class names, one of them, or the name of a set of them; for heads that read text.
        device: a torch device, or auto.
        quiet: show no progress.

    Raises:
        UnknownName, ConfigError: no such head, nothing to train in it, or a config that does not suit the tower.
        SpecMismatch: the store lacks a feature; the message is the command that adds it.
        ManifestError, StoreError: no training videos, unlabelled ones, too few for the episodes, or none of them in the
            store.
        DivergedError: the loss is not finite any more.
    """
    out, spec = Path(out), spec or TrainSpec()
    config = find(head).config() if config is None else config
    if not find(head).is_trained:
        protocol = "few_shot" if "episodes" in find(head).tasks else "zero_shot"
        raise ConfigError(
            f"{head} has nothing to train",
            fix=f"Evaluate it as it is: `coldframe eval {protocol} --store STORE --head {head}`.",
        )
    if find(head).learns_from_episodes:
        episodes = episodes or EpisodeTraining()
        spec = dataclasses.replace(spec, batch_size=episodes.per_step)
    elif episodes is not None:
        raise ConfigError(f"{head} does not learn from episodes", seen=episodes)
    needs = needed_features(head, config, store)
    store.require(needs, wanted_by=head)
    videos = _videos(store, manifest, needs, spec)
    described = _settings(store, manifest, head, config, spec, episodes, templates)
    if _is_finished(out, described):
        return load_checkpoint(out)

    found = find_device(device)
    trained_names = () if episodes is None else videos.seen_classes
    module, text = build_head(head, config, store, manifest.class_names, templates, found, spec.seed, trained_names)
    if episodes is None:
        data, train_text, validate = videos.train, text, _validation(videos.val, text, spec.batch_size, found)
    else:
        data, val = _episodes(videos, episodes, manifest)
        train_text = None if text is None else text.select(videos.seen)
        validate = _episode_validation(val, text, episodes.per_step, found)
    _begin(out, described)  # only now: a head that cannot be built leaves no folder that refuses the corrected one
    fitted = fit(
        module,
        data,
        train_text,
        spec,
        validate=validate,
        folder=out,
        device=found,
        quiet=quiet,
    )
    checkpoint = save_checkpoint(
        out,
        Checkpoint(
            head=head,
            config=config,
            train=spec,
            class_names=manifest.class_names,
            seen_classes=videos.seen_classes,
            templates=() if text is None else text.templates,
            features=store.spec,
            needs=needs,
            manifest_fingerprint=manifest.fingerprint,
            selection="val",
            n_train=len(videos.train),
            n_val=len(videos.val),
            n_missing=videos.n_missing,
            epoch=fitted.epoch,
            step=fitted.step,
            scores=fitted.scores,
            episodes=episodes,
            weights=trained_tensors(module),
        ),
    )
    remove_state(out)
    return checkpoint


def untrained(
    store: FeatureStore,
    class_names: Sequence[str],
    head: str,
    config: Any = None,
    *,
    templates: Sequence[str] | str = "video",
    device: str = "auto",
) -> Predictor:
    """Put a head that has nothing to train to work on a store.

    Raises:
        UnknownName, ConfigError: no such head, or one that must be trained first.
        SpecMismatch: the store lacks a feature; the message is the command that adds it.
    """
    if find(head).is_trained:
        raise ConfigError(
            f"{head} must be trained first",
            fix=f"`coldframe train-head {head} --store STORE --out RUN`, then name the run.",
        )
    config = find(head).config() if config is None else config
    found = find_device(device)
    module, text = build_head(head, config, store, class_names, templates, found)
    needs = needed_features(head, config, store)
    return Predictor(head, dataclasses.asdict(config), module, needs, tuple(class_names), text, found)


@dataclass(frozen=True, slots=True)
class Videos:
    """What a head trains on and what its epoch is chosen on: labelled videos of the store."""

    train: FeatureDataset
    val: FeatureDataset
    seen: tuple[int, ...]  # labels of the training videos, ascending
    seen_classes: tuple[str, ...]  # their names
    n_missing: int


def _videos(store: FeatureStore, manifest: Manifest, needs: Sequence[str], spec: TrainSpec) -> Videos:
    """Join two splits with the store; a video that it lacks is counted, and nothing stands in for it."""
    if not manifest.split("val").records:
        manifest = carve_validation(manifest, spec.val_fraction, spec.seed)
    train, n_missing_train = _part(store, manifest, "train", needs)
    val, n_missing_val = _part(store, manifest, "val", needs)
    seen = tuple(sorted(set(train.labels.tolist())))
    names = tuple(manifest.class_names[label] for label in seen)
    return Videos(train, val, seen, names, n_missing_train + n_missing_val)


def _part(store: FeatureStore, manifest: Manifest, split: str, needs: Sequence[str]) -> tuple[FeatureDataset, int]:
    ids, labels, missing = labelled(store, manifest, split)
    if not ids:
        raise StoreError(
            f"no video of split {split!r} of {manifest.name} is in the store {store.path}",
            seen=f"{len(missing)} videos that it lacks",
            fix="Extract this manifest's videos first, or give it that split.",
        )
    if (labels < 0).any():
        raise ManifestError(
            f"{int((labels < 0).sum())} videos of split {split!r} of {manifest.name} have no label",
            seen=f"for example {ids[int((labels < 0).argmax())]}",
            fix="Heads are trained on labelled videos: label them, or put them into no split.",
        )
    return FeatureDataset(store, ids, labels, needs), len(missing)


def _episodes(videos: Videos, training: EpisodeTraining, manifest: Manifest) -> tuple[EpisodeDataset, EpisodeDataset]:
    """Episodes to train on, whose classes are counted among the training classes, and one fixed list to validate on.

    The list is the same for every run on these videos, so that runs can be compared.
    """
    way_and_shot = {"n_way": training.n_way, "n_shot": training.n_shot}
    spec = EpisodeSpec(**way_and_shot, n_query=training.n_query, n_episodes=training.episodes_per_epoch)
    val_spec = EpisodeSpec(**way_and_shot, n_query=1, n_episodes=training.n_val_episodes)
    of_the_list = np.searchsorted(videos.seen, videos.train.labels.numpy())  # [V]
    train = FeatureDataset(videos.train.store, videos.train.ids, of_the_list, videos.train.features)
    return (
        EpisodeDataset(train, spec, videos.seen_classes, f"training videos of {manifest.name}"),
        EpisodeDataset(videos.val, val_spec, manifest.class_names, f"validation videos of {manifest.name}"),
    )


def _episode_validation(
    val: EpisodeDataset, text: TextFeatures | None, per_step: int, device: torch.device
) -> Callable[[nn.Module], dict[str, float]]:
    """Top-1 and loss of an episodic head over all queries of a list, asked as evaluation asks it."""

    def validate(head: Any) -> dict[str, float]:
        loss, hits, n = 0.0, 0, 0
        for batch in val.batches(per_step):
            moved = batch.to(device, torch.float32)
            names = None if text is None else text.embedding[moved.class_ids]  # [n, W, E]
            logits = head.episode_logits(moved.bank, moved.support, moved.query, names).float().flatten(0, 1)
            labels = moved.labels.flatten()
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            hits += int((logits.argmax(dim=-1) == labels).sum())
            n += len(labels)
        return {"top_1": hits / n, "loss": loss / n}

    return validate


def _validation(
    val: FeatureDataset, text: TextFeatures | None, batch_size: int, device: torch.device
) -> Callable[[nn.Module], dict[str, float]]:
    """Top-1 and loss of a head on all validation videos."""

    def validate(head: nn.Module) -> dict[str, float]:
        loss, hits = 0.0, 0
        for batch in val.batches(batch_size):
            moved = batch.to(device, torch.float32)
            logits = head(moved, text).logits.float()
            loss += float(cross_entropy(logits, moved.labels, reduction="sum"))
            hits += int((logits.argmax(dim=-1) == moved.labels).sum())
        return {"top_1": hits / len(val), "loss": loss / len(val)}

    return validate


def _settings(
    store: FeatureStore,
    manifest: Manifest,
    head: str,
    config: Any,
    spec: TrainSpec,
    episodes: EpisodeTraining | None,
    templates: Sequence[str] | str,
) -> str:
    """Everything that decides the run, as the TOML file that would start it again."""
    versions = ", ".join(f"{name} {number}" for name, number in code_versions().items())
    made = f"# {versions}, commit {code_commit() or 'unknown'}\n# store {store.path}, manifest {manifest.name}\n\n"
    return made + to_toml(
        {
            "head": {"name": head, **dataclasses.asdict(config)},
            "train": dataclasses.asdict(spec),
            **({} if episodes is None else {"episodes": dataclasses.asdict(episodes)}),
            "features": {
                "store": store.fingerprint,
                "manifest": manifest.fingerprint,
                "templates": templates if isinstance(templates, str) else list(templates),
            },
        }
    )


def _is_finished(folder: Path, settings: str) -> bool:
    """Whether this very run has already ended in a folder; writes nothing.

    Raises:
        ConfigError: the folder holds something else.
    """
    ours = tomllib.loads(settings)
    begun = _begun(folder / SETTINGS)
    if ours.keys() <= begun.keys():
        _expect_same(folder, begun, ours)
        return is_finished(folder)
    if folder.is_file() or (folder.exists() and any(not path.name.startswith(SETTINGS) for path in folder.iterdir())):
        raise ConfigError(f"{folder} holds something that is no run", fix="Choose another folder.")
    return False


def _begun(path: Path) -> dict[str, Any]:
    """The settings of a run that has begun; nothing where they are absent or were cut off while being written."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}


def _begin(folder: Path, settings: str) -> None:
    """Write the settings of a run; those of one that goes on stay as they are."""
    if not tomllib.loads(settings).keys() <= _begun(folder / SETTINGS).keys():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / SETTINGS, settings.encode())


def _expect_same(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for table, values in ours.items():
        held = theirs.get(table, {})
        for key in [*values, *held]:
            seen, wanted = held.get(key), values.get(key)
            if seen != wanted:
                raise ConfigError(
                    f"{folder} holds a run with another {table}.{key}",
                    seen=repr(seen),
                    wanted=repr(wanted),
                    fix="Choose another folder, or remove it.",
                )
