"""What a head trains on, and what its epoch is chosen on: labelled videos of a store, or episodes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data_manifests.episodes import EpisodeSpec
from ..data_manifests.records import Manifest, ManifestError
from ..data_manifests.splits import carve_validation
from ..extract.batches import FeatureDataset, labelled
from ..extract.store import FeatureStore, StoreError
from .episodic import EpisodeDataset
from .loop import Data
from .settings import Settings
from .specs import EpisodeTraining, TrainSpec


@dataclass(frozen=True, slots=True)
class Videos:
    """What a head trains on and what its epoch is chosen on: labelled videos of the store."""

    train: FeatureDataset
    val: FeatureDataset
    seen: tuple[int, ...]  # labels of the training videos, ascending
    seen_classes: tuple[str, ...]  # their names
    n_missing: int
    manifest: Manifest  # as it was given, with or without a validation split

    def data(self, asked: Settings) -> Data:
        """What a loop goes over.

        Raises:
            ManifestError: too few classes or videos for the episodes.
        """
        train, val = (self.train, self.val) if asked.episodes is None else self._episodes(asked.episodes)
        return Data(train, val, asked.train.batch_size, asked.train.seed)

    def _episodes(self, training: EpisodeTraining) -> tuple[EpisodeDataset, EpisodeDataset]:
        """Episodes to train on, whose classes are counted among the training classes, and a fixed list to validate on.

        The list is the same for every run on these videos, so that runs can be compared.
        """
        way_and_shot = {"n_way": training.n_way, "n_shot": training.n_shot}
        spec = EpisodeSpec(**way_and_shot, n_query=training.n_query, n_episodes=training.episodes_per_epoch)
        val_spec = EpisodeSpec(**way_and_shot, n_query=1, n_episodes=training.n_val_episodes)
        of_the_list = np.searchsorted(self.seen, self.train.labels.numpy())  # [V]
        train = FeatureDataset(self.train.store, self.train.ids, of_the_list, self.train.features)
        name, class_names = self.manifest.name, self.manifest.class_names
        return (
            EpisodeDataset(train, spec, self.seen_classes, f"training videos of {name}"),
            EpisodeDataset(self.val, val_spec, class_names, f"validation videos of {name}"),
        )


def find_videos(store: FeatureStore, manifest: Manifest, needs: Sequence[str], spec: TrainSpec) -> Videos:
    """Join two splits with the store; a video that it lacks is counted, and nothing stands in for it.

    The split `val` is carved from `train` where there is none.

    Raises:
        ManifestError, StoreError: no training videos, unlabelled ones, or none of them in the store.
    """
    has_val = bool(manifest.split("val").records)
    split = manifest if has_val else carve_validation(manifest, spec.val_fraction, spec.seed)
    train, n_missing_train = _part(store, split, "train", needs)
    val, n_missing_val = _part(store, split, "val", needs)
    seen = tuple(sorted(set(train.labels.tolist())))
    names = tuple(manifest.class_names[label] for label in seen)
    return Videos(train, val, seen, names, n_missing_train + n_missing_val, manifest)


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
