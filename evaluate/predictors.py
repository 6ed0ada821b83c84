"""What evaluation asks of a head; train_heads.checkpoint.Predictor happens to fit, and cli.py joins the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..extract.batches import FeatureBatch


class Predictor(Protocol):
    """What every number has to say about the head it measures."""

    head: str
    config: Mapping[str, Any]  # the head's own settings
    tasks: frozenset[str]  # classify: it is a Classifier | episodes: it is an EpisodeScorer
    needs: tuple[str, ...]  # canonical stored features
    class_names: tuple[str, ...]  # the classes it scores, or whose names it may read
    uses_class_names: bool
    templates: tuple[str, ...]  # of the sentences around class names; () where it reads none
    is_transductive: bool  # the other videos of a batch or episode change a video's scores
    checkpoint: str  # fingerprint of its weights; "" where nothing was trained, and then the next four are empty too
    manifest_fingerprint: str  # of the manifest it was trained on
    seen_classes: tuple[str, ...]  # classes of the videos it was trained on
    selection: str  # the split that chose its epoch: val | test (paper-compatible) | ""
    seed: int | None  # of its training


class Classifier(Predictor, Protocol):
    """Scores videos against a fixed list of classes."""

    def logits(self, batch: FeatureBatch) -> NDArray[np.float32]:
        """Scores [B, C]; larger is likelier."""
        ...


class EpisodeScorer(Predictor, Protocol):
    """Scores the queries of few-shot episodes."""

    def episode_logits(
        self,
        bank: FeatureBatch,
        support: NDArray[np.int64],
        query: NDArray[np.int64],
        class_ids: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Score the queries of n episodes; larger is closer.

        All episodes of an evaluation come in one call, so that what they share is done once; a head whose memory grows
        with n takes them in parts.

        Args:
            bank: features of all V videos that the episodes draw from.
            support: rows of the bank, [n, W, K].
            query: rows of the bank, [n, Q], those of all ways of an episode.
            class_ids: which of `class_names` each way is, [n, W]; for heads that use class names.

        Returns:
            logits [n, Q, W].
        """
        ...
