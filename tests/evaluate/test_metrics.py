from __future__ import annotations

import numpy as np
import pytest

from coldframe.evaluate.metrics import best_class, class_accuracy, confusion, mean_class, top_k, top_k_hits

NAN = float("nan")


def slow_top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """An independent implementation: sort every row, the right class behind all it ties with."""
    hits = 0
    for row, label in zip(scores, labels, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c == label))
        hits += order.index(label) < k
    return hits / len(labels)


def test_top_k_of_hand_worked_scores() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 5.0, 9.0]])
    labels = np.array([0, 1, 2, 2])
    assert top_k(scores, labels, 1) == 0.5
    assert top_k(scores, labels, 2) == 0.75
    assert top_k(scores, labels, 3) == 1.0
    assert top_k_hits(scores, labels, 2).tolist() == [True, True, False, True]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_agrees_with_sorting_every_row(k: int) -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, size=(400, 7)).astype(np.float32)  # many ties
    labels = rng.integers(0, 7, size=400)
    assert top_k(scores, labels, k) == slow_top_k(scores, labels, k)


def test_a_constant_head_scores_nothing_below_the_number_of_classes() -> None:
    labels = np.arange(10)
    assert top_k(np.zeros((10, 10)), labels, 1) == 0.0
    assert top_k(np.zeros((10, 10)), labels, 5) == 0.0
    assert top_k(np.zeros((10, 10)), labels, 10) == 1.0


def test_a_score_that_is_not_a_number_counts_against_the_head() -> None:
    scores = np.array([[NAN, 1.0], [NAN, 1.0], [NAN, NAN]])
    assert top_k_hits(scores, np.array([0, 1, 0]), 1).tolist() == [False, False, False]
    assert best_class(np.array([[NAN, 1.0], [2.0, NAN], [NAN, NAN]])).tolist() == [1, 0, 0]


def test_equal_scores_go_to_the_lowest_class() -> None:
    assert best_class(np.array([[[1.0, 3.0, 3.0]], [[0.0, 0.0, 0.0]]])).tolist() == [[1], [0]]


@pytest.mark.parametrize(
    ("labels", "k"), [(np.array([0, -1]), 1), (np.array([0, 2]), 1), (np.array([0]), 1), (np.array([0, 1]), 0)]
)
def test_top_k_refuses_what_it_cannot_mean(labels: np.ndarray, k: int) -> None:
    with pytest.raises(ValueError):
        top_k(np.zeros((2, 2)), labels, k)


def test_top_k_of_no_samples_is_no_number() -> None:
    assert np.isnan(top_k(np.zeros((0, 3)), np.zeros(0, dtype=np.int64), 1))


def test_mean_class_weighs_classes_alike_and_leaves_empty_ones_out() -> None:
    hits = np.array([True, True, True, False, True, False])
    labels = np.array([0, 0, 0, 0, 2, 2])
    assert class_accuracy(hits, labels, 4)[[0, 2]].tolist() == [0.75, 0.5]
    assert np.isnan(class_accuracy(hits, labels, 4)[[1, 3]]).all()
    assert mean_class(hits, labels, 4) == 0.625
    assert np.isnan(mean_class(hits[:0], labels[:0], 4))


def test_mean_class_agrees_with_a_loop_over_classes() -> None:
    rng = np.random.default_rng(1)
    hits, labels = rng.random(300) < 0.6, rng.integers(0, 9, 300)
    loop = np.mean([hits[labels == c].mean() for c in range(9)])
    assert mean_class(hits, labels, 9) == pytest.approx(loop, abs=1e-15)


def test_confusion_has_the_right_class_in_its_rows() -> None:
    matrix = confusion(predicted=np.array([1, 1, 0, 2]), labels=np.array([0, 0, 0, 2]), n_classes=3)
    assert matrix.tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 1]]
