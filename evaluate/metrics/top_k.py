"""Top-k: is the right class among the k best?

Source: ILSVRC, Russakovsky et al. 2015, arXiv:1409.0575, §4.1.
Differs: a tie counts against the head, so that one which gives every class the same score gets 0 % and not 100 %, and
the order of the classes cannot matter; so does a score that is not a number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def top_k_hits(scores: NDArray[np.floating], labels: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """Say of every sample whether fewer than k other classes score as much as the right one.

    Args:
        scores: [n, C]; larger is likelier.
        labels: [n], each in [0, C).
        k: 1 or more.

    Returns:
        [n].

    Raises:
        ValueError: k is below 1, the shapes do not fit, or a label is no class.
    """
    if k < 1 or scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(f"top-{k} of scores {scores.shape} and labels {labels.shape}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < scores.shape[1]:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {scores.shape[1]} classes")
    right = np.take_along_axis(scores, labels[:, None], axis=1)  # [n, 1]
    # Negated, because every comparison with NaN is false: it then stands above the right class, and above nothing.
    n_as_good = (~(scores < right)).sum(axis=1) - 1  # [n], without the right class itself
    return n_as_good < k


def top_k(scores: NDArray[np.floating], labels: NDArray[np.int64], k: int) -> float:
    """Share of samples whose right class is among the k best; NaN of no samples. Shapes as in `top_k_hits`."""
    hits = top_k_hits(scores, labels, k)
    return float(hits.mean()) if len(hits) else float("nan")


def best_class(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """Index of the best score along the last axis; of equal ones the lowest, and NaN is never the best."""
    return np.where(np.isnan(scores), -np.inf, scores).argmax(axis=-1)
