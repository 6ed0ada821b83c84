"""Features of many videos as one batch: the only input of a head besides text."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..data_manifests.errors import UnknownName
from .specs import canonical_features

if TYPE_CHECKING:
    from ..data_manifests.records import Manifest
    from .store import FeatureStore


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """B videos. Where `mask` is False a frame is padding and every feature holds zeros."""

    features: Mapping[str, Tensor]  # canonical name -> [B, T, ...]
    mask: Tensor  # [B, T] bool
    labels: Tensor  # [B] int64; -1 where unknown
    video_ids: tuple[str, ...]
    has_padding: bool | None = None  # whether the mask is False anywhere; None: look at it

    def __len__(self) -> int:
        return len(self.video_ids)

    def __getitem__(self, name: str) -> Tensor:
        """One feature, [B, T, ...]; raises UnknownName with what the batch has."""
        if name not in self.features:
            raise UnknownName("feature in this batch", name, self.features)
        return self.features[name]

    @property
    def real(self) -> Tensor | None:
        """The mask [B, T], or None where every frame is real."""
        has_padding = not self.mask.all() if self.has_padding is None else self.has_padding
        return self.mask if has_padding else None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the batch; `dtype` converts the floating features (pixels stay uint8)."""

        def moved(feature: Tensor) -> Tensor:
            there = feature.to(device, non_blocking=True)  # in its small dtype: torch would widen it before the bus
            return there.to(dtype) if dtype is not None and there.is_floating_point() else there

        return replace(
            self,
            features={name: moved(feature) for name, feature in self.features.items()},
            mask=self.mask.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            has_padding=self.real is not None,  # now: on an accelerator the look would wait for all that it has to do
        )

    def only(self, names: Iterable[str]) -> Self:
        """The same videos with some of the features."""
        return replace(self, features={name: self[name] for name in names})

    def select(self, rows: Tensor) -> Self:
        """The videos at `rows` [B'] (int64), in that order."""
        rows = rows.to(self.mask.device)
        return replace(
            self,
            features={name: feature[rows] for name, feature in self.features.items()},
            mask=self.mask[rows],
            labels=self.labels[rows],
            video_ids=tuple(self.video_ids[row] for row in rows.tolist()),
        )


class FeatureDataset:
    """Some videos of a store with their labels, as batches or all at once."""

    def __init__(self, store: FeatureStore, ids: Sequence[str], labels: ArrayLike, features: Iterable[str]) -> None:
        """Choose videos and features.

        Args:
            labels: a class for each id, [B]; -1 where unknown.
            features: what the batches hold, such as `embedding` or `tokens.-1`.

        Raises:
            SpecMismatch: the store lacks a feature; says how to add it.
            StoreError: the store lacks a video.
        """
        self.store, self.ids = store, tuple(ids)
        self.labels = torch.from_numpy(np.array(labels, dtype=np.int64))
        self.features = canonical_features(features, store.shape.layers)
        if self.labels.shape != (len(self.ids),):
            raise ValueError(f"{len(self.ids)} videos have labels of shape {tuple(self.labels.shape)}")
        store.require(self.features, "the data set")
        store.lengths(self.ids)  # raises for a video that the store lacks, before training begins

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_views(self) -> int:
        """V, views that the store has of every video."""
        return self.store.n_views

    def batches(
        self,
        batch_size: int,
        shuffle_seed: int | None = None,
        *,
        view: int | None = None,
        drop_last: bool = False,
        ahead: int = 1,
        pin: bool = False,
    ) -> Generator[FeatureBatch, None, None]:
        """Go through the videos once, reading `ahead` batches on threads of their own while one is worked on.

        Args:
            shuffle_seed: the order, and the view drawn of each video, are functions of it alone; None keeps the order
                of the ids and takes their first views.
            view: take this one of every video.
            drop_last: leave out a last batch that is not full.
            pin: read into page-locked memory, for an accelerator.

        Raises:
            StoreError: a file cannot be read; raised at the batch that needs it.
        """
        n_videos = len(self) - len(self) % batch_size if drop_last else len(self)
        order = (
            np.arange(len(self)) if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(len(self))
        )
        parts = (order[begin : begin + batch_size] for begin in range(0, n_videos, batch_size))
        return self.parts(parts, shuffle_seed, view=view, ahead=ahead, pin=pin)

    def parts(
        self,
        parts: Iterable[NDArray[np.int64]],
        view_seed: int | None = None,
        *,
        view: int | None = None,
        ahead: int = 1,
        pin: bool = False,
    ) -> Generator[FeatureBatch, None, None]:
        """Read lists of videos, by their rows, a batch each; `ahead` of them while one is worked on.

        Args:
            view_seed: draws a view of each video, the same in every list; None takes their first views.
            view: take this one of every video.
            pin: read into page-locked memory, for an accelerator.

        Raises:
            StoreError: a file cannot be read; raised at the batch that needs it.
        """
        if view is None and view_seed is not None and self.store.n_views > 1:
            views = np.random.default_rng((view_seed, 1)).integers(self.store.n_views, size=len(self))
        else:
            views = np.full(len(self), view or 0)
        waiting: deque[Future[FeatureBatch]] = deque()
        # Leaving the block, also by closing the generator, waits for the reads that are under way.
        with ThreadPoolExecutor(max(ahead, 1), thread_name_prefix="feature-batches") as readers:
            for rows in parts:
                waiting.append(readers.submit(self._gather, rows, views, pin))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def all(self) -> FeatureBatch:
        """The first view of every video as one batch, in the order of the ids."""
        return self._gather(np.arange(len(self)), np.zeros(len(self), np.int64), pin=False)

    def class_counts(self, n_classes: int | None = None) -> Tensor:
        """Videos of each class, [C] int64; videos without a label are not counted."""
        known = self.labels[self.labels >= 0]
        return torch.bincount(known, minlength=n_classes or 0)

    def _gather(self, rows: NDArray[np.int64], views: NDArray[np.int64], pin: bool) -> FeatureBatch:
        ids = tuple(self.ids[row] for row in rows)
        features, mask = self.store.gather(ids, self.features, view=views[rows].tolist(), pin=pin)
        return FeatureBatch(features, mask, self.labels[torch.from_numpy(rows)], ids)


def labelled(
    store: FeatureStore, manifest: Manifest, split: str | None = None
) -> tuple[tuple[str, ...], NDArray[np.int64], tuple[str, ...]]:
    """Find which videos of a manifest, or of one split of it, the store has.

    Returns:
        ids that the store has, in the order of the manifest; their labels, -1 where unknown; and the ids that it lacks,
        for the caller to count: nothing stands in for them.
    """
    part = manifest if split is None else manifest.split(split)
    has = np.array([video_id in store for video_id in part.ids], dtype=bool)
    ids = np.array(part.ids, dtype=object)
    return tuple(ids[has]), part.labels[has], tuple(ids[~has])
