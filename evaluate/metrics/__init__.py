"""Metrics: pure functions, arrays in, numbers out; one family a file. They are given everything at once.

top_k.py        is the right class among the k best?
mean_class.py   the same for every class, averaged over classes; confusions
"""

from __future__ import annotations

from .mean_class import class_accuracy, confusion, mean_class
from .top_k import best_class, top_k, top_k_hits

__all__ = ["best_class", "class_accuracy", "confusion", "mean_class", "top_k", "top_k_hits"]
