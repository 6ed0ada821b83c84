"""Closed set: every video belongs to one of the classes that the head was built for.

Source: HMDB51, Kuehne et al. 2011, ICCV; UCF101, Soomro et al. 2012, arXiv:1212.0402 (three official splits each).
Differs: one split a run; the mean over splits is the reader's. Videos that the store lacks are left out of the metrics
and, where there are any, every metric comes a second time with those videos counted wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...data_manifests.errors import ConfigError
from ...extract.specs import SpecMismatch
from ..intervals import Estimate, share
from ..metrics import best_class, class_accuracy, confusion, top_k_hits
from ..predictors import Classifier
from . import Outcome, ProtocolSpec, Videos, class_columns, require_finite


@dataclass(frozen=True, slots=True)
class Config:
    """Nothing here can change a number."""

    batch_size: int = 32  # videos to one call of the head

    def __post_init__(self) -> None:
        """Refuse a batch of nothing."""
        if self.batch_size < 1:
            raise ConfigError("a batch needs at least one video", seen=f"batch_size={self.batch_size}")


def run(predictor: Classifier, videos: Videos, config: Config) -> Outcome:
    """Score every video against every class of the head: top-1, top-5 and mean class accuracy.

    Raises:
        SpecMismatch: the head does not score one of the manifest's classes.
        StoreError: scores are not finite numbers.
    """
    class_names = videos.manifest.class_names
    columns = class_columns(predictor.class_names, class_names, predictor.head)
    scores, ids = _scores(predictor, videos, config.batch_size)
    labels = columns[videos.labels_of(ids)]  # [n], columns of the scores
    hits = {f"top_{k}": top_k_hits(scores, labels, k) for k in (1, 5) if k == 1 or k < len(predictor.class_names)}

    estimates = _estimates(hits, labels, videos.groups_of(ids))
    if videos.missing:
        every_id = [*ids, *videos.missing]
        every_label = columns[videos.labels_of(every_id)]
        misses = np.zeros(len(videos.missing), dtype=bool)
        padded = {name: np.concatenate([hit, misses]) for name, hit in hits.items()}
        worst = _estimates(padded, every_label, videos.groups_of(every_id))
        estimates |= {f"{name}_missing_wrong": estimate for name, estimate in worst.items()}

    predicted = best_class(scores)
    n_classes = len(predictor.class_names)
    return Outcome(
        estimates=estimates,
        n=len(ids),
        unit="videos",
        notes=tuple(_notes(predictor, videos, labels)),
        details={
            "class_names": np.array(predictor.class_names),
            "video_ids": np.array(ids),
            "labels": labels,
            "predicted": predicted,
            "confusion": confusion(predicted, labels, n_classes),  # rows: right class
            "class_accuracy": class_accuracy(hits["top_1"], labels, n_classes),
        },
    )


def _scores(predictor: Classifier, videos: Videos, batch_size: int) -> tuple[NDArray[np.float32], list[str]]:
    """Scores [n, C] and ids of all videos; where the store has several views of each, their mean probabilities."""
    n_views = videos.dataset.n_views
    ids = list(videos.dataset.ids)
    scores = [_scores_of_view(predictor, videos, batch_size, view) for view in range(max(n_views, 1))]  # V × [n, C]
    for of_a_view in scores:
        require_finite(of_a_view, np.array(ids), predictor.head)
    return scores[0] if len(scores) == 1 else np.mean([_softmax(of_a_view) for of_a_view in scores], axis=0), ids


def _scores_of_view(predictor: Classifier, videos: Videos, batch_size: int, view: int) -> NDArray[np.float32]:
    """Scores [n, C] of one view of all videos; features pass through memory one batch at a time."""
    scores: list[NDArray[np.float32]] = []
    for batch in videos.dataset.batches(batch_size, shuffle_seed=None, view=view):
        scores.append(predictor.logits(batch))  # [B, C]
        wanted = (len(batch), len(predictor.class_names))
        if scores[-1].shape != wanted:
            raise SpecMismatch(f"{predictor.head} gave scores of another shape", seen=scores[-1].shape, wanted=wanted)
    return np.concatenate(scores)


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    raised = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def _estimates(
    hits: dict[str, NDArray[np.bool_]], labels: NDArray[np.int64], groups: NDArray[np.str_] | None
) -> dict[str, Estimate]:
    estimates = {name: share(hit, groups=groups) for name, hit in hits.items()}
    class_weights = 1 / np.bincount(labels)[labels]  # [n]
    return estimates | {"mean_class": share(hits["top_1"], class_weights, groups)}


def _notes(predictor: Classifier, videos: Videos, labels: NDArray[np.int64]) -> list[str]:
    n_known, n_wanted = len(predictor.class_names), len(videos.manifest.class_names)
    n_empty = n_wanted - len(np.unique(labels))
    groups = videos.groups_of(videos.dataset.ids)
    notes = []
    if (n_views := videos.dataset.n_views) > 1:
        notes.append(f"probabilities averaged over {n_views} views of each video")
    if n_known > n_wanted:
        notes.append(f"the head tells {n_known} classes apart, of which the manifest has {n_wanted}")
    if groups is not None:
        notes.append(_on_groups(len(set(groups))))
    if n_empty:
        notes.append(f"{n_empty} of {n_wanted} classes have no video here; mean_class is over the others")
    return notes


def _on_groups(n_groups: int) -> str:
    if n_groups == 1:
        return "all videos are of one group: the interval is as wide as for one video"
    return f"intervals take the {n_groups:,} groups of the manifest, not the videos, as independent"


PROTOCOL = ProtocolSpec(
    config=Config,
    run=run,
    task="classify",
    headline="top_1",
    source="Kuehne et al. 2011, ICCV (HMDB51); Soomro et al. 2012, arXiv:1212.0402 (UCF101)",
)
