"""Few-shot episodes out of cached features: what a step of episodic training, and its validation, are made of.

Source: episodic training, Vinyals et al. 2016, arXiv:1606.04080; its numbers for video, CLIP-FSAR, Wang et al. 2023,
    arXiv:2303.02982: 5 ways, 1 shot, 5 queries a class.
Differs: the list of an epoch is a function of a seed, drawn as the lists of evaluation are; the published loaders draw from
    a stream that depends on the number of their processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange

from ..data_manifests.episodes import EpisodeList, EpisodeSpec, draw_episodes
from ..data_manifests.records import ManifestError
from ..extract.batches import FeatureDataset
from .specs import Episodes


class EpisodeDataset:
    """Episodes over some videos of a store; has the face of a FeatureDataset, with episodes for videos."""

    def __init__(self, videos: FeatureDataset, spec: EpisodeSpec, class_names: Sequence[str], of: str) -> None:
        """Choose the videos to draw from; they have labels, which become the episodes' `class_ids`.

        Args:
            spec: of an epoch; its seed is that of the list which is not shuffled.
            class_names: by label, for messages.
            of: what these videos are, for messages.

        Raises:
            ManifestError: too few classes or videos for such episodes.
        """
        self.videos, self.spec, self._class_names = videos, spec, class_names
        self._row_of = {video_id: row for row, video_id in enumerate(videos.ids)}
        try:
            self.draw(spec.seed)  # before training begins
        except ManifestError as error:
            raise ManifestError(f"{of}: {error}") from error

    def __len__(self) -> int:
        """Episodes of an epoch."""
        return self.spec.n_episodes

    def draw(self, seed: int) -> EpisodeList:
        """The list of an epoch, a function of the seed."""
        labels = self.videos.labels.numpy()
        return draw_episodes(self.videos.ids, labels, replace(self.spec, seed=seed), self._class_names)

    def batches(self, batch_size: int, shuffle_seed: int | None = None, *, pin: bool = False) -> Iterator[Episodes]:
        """Go through a list of episodes, `batch_size` to a step; each step reads every video of it once.

        Args:
            shuffle_seed: the list, and the view drawn of each video, are functions of it alone; None is the list of the
                spec's own seed, of first views.

        Raises:
            StoreError: a file cannot be read; raised at the step that needs it.
        """
        drawn = self.draw(self.spec.seed if shuffle_seed is None else shuffle_seed)
        row_of_bank = np.array([self._row_of[video_id] for video_id in drawn.bank_ids])  # bank -> videos
        steps = [slice(begin, begin + batch_size) for begin in range(0, len(drawn), batch_size)]
        videos_of = [np.unique(np.concatenate([drawn.support[s].ravel(), drawn.query[s].ravel()])) for s in steps]
        banks = self.videos.parts((row_of_bank[rows] for rows in videos_of), shuffle_seed, pin=pin)
        for step, rows, bank in zip(steps, videos_of, banks, strict=True):
            support = np.searchsorted(rows, drawn.support[step])  # rows of this step's bank [n, W, K]
            query = np.searchsorted(rows, rearrange(drawn.query[step], "n w q -> n (w q)"))
            class_ids = drawn.class_ids[step].copy()  # the list's own cannot be written, which torch dislikes
            labels = np.tile(np.repeat(np.arange(self.spec.n_way), self.spec.n_query), (len(query), 1))
            yield Episodes(bank, *(torch.from_numpy(part) for part in (support, query, class_ids, labels)))
