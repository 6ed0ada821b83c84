"""Accuracy of every class, and their mean: a class with few videos counts as much as one with many.

Source: average per-class top-1 accuracy, Xian et al. 2018, arXiv:1707.00600.
Differs: a class without samples is left out of the mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mean_class(hits: NDArray[np.bool_], labels: NDArray[np.int64], n_classes: int) -> float:
    """Mean over the classes that have samples of the share of hits; NaN where none has.

    Args:
        hits: was the sample right, [n].
        labels: [n], each in [0, n_classes).
    """
    accuracy = class_accuracy(hits, labels, n_classes)
    present = ~np.isnan(accuracy)
    return float(accuracy[present].mean()) if present.any() else float("nan")


def class_accuracy(hits: NDArray[np.bool_], labels: NDArray[np.int64], n_classes: int) -> NDArray[np.float64]:
    """Share of hits of every class, [C]; NaN where a class has no samples. Shapes as in `mean_class`."""
    n = np.bincount(labels, minlength=n_classes)  # [C]
    right = np.bincount(labels, weights=hits, minlength=n_classes)  # [C]
    return np.divide(right, n, out=np.full(n_classes, np.nan), where=n > 0)


def confusion(predicted: NDArray[np.int64], labels: NDArray[np.int64], n_classes: int) -> NDArray[np.int64]:
    """Count samples by right class (row) and predicted class (column), [C, C].

    Args:
        predicted: [n], each in [0, n_classes).
        labels: [n], each in [0, n_classes).
    """
    pairs = np.bincount(labels * n_classes + predicted, minlength=n_classes**2)
    return pairs.reshape(n_classes, n_classes)
