from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from coldframe.evaluate.intervals import Estimate, over_classes, over_episodes, share, student_t_95


def bits(n_right: int, n: int) -> np.ndarray:
    return np.arange(n) < n_right


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize(
    ("n_right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (29, 29, 0.8830, 1.0)],
)
def test_share_is_wilson_for_independent_videos(n_right: int, n: int, low: float, high: float) -> None:
    # The four examples of Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (the last one mirrored).
    estimate = share(bits(n_right, n))
    assert estimate.value == pytest.approx(n_right / n)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


def test_equal_weights_and_groups_of_one_size_one_change_nothing_much() -> None:
    hits = bits(60, 100)
    assert share(hits, np.full(100, 7.0)) == share(hits)
    alone = share(hits, groups=np.arange(100))  # groups of one: only the estimate of their variance adds width
    assert alone.low == pytest.approx(share(hits).low, abs=0.003)
    assert alone.high == pytest.approx(share(hits).high, abs=0.003)


def test_videos_that_always_agree_count_once() -> None:
    hits, groups = np.repeat(bits(30, 50), 8), np.repeat(np.arange(50), 8)
    once, grouped, naive = share(bits(30, 50)), share(hits, groups=groups), share(hits)
    assert grouped.value == once.value
    assert grouped.high - grouped.low == pytest.approx(once.high - once.low, rel=0.05)
    assert naive.high - naive.low < 0.5 * (grouped.high - grouped.low)


def test_a_perfect_score_still_has_an_interval_that_counts_groups() -> None:
    perfect = np.ones(80, dtype=bool)
    assert share(perfect).low == pytest.approx(0.9542, abs=1e-4)
    assert share(perfect, groups=np.repeat(np.arange(8), 10)) == share(perfect[:8])
    assert share(~perfect, groups=np.repeat(np.arange(8), 10)).high == pytest.approx(1 - share(perfect[:8]).low)


def test_one_group_says_next_to_nothing() -> None:
    estimate = share(bits(5, 10), groups=np.zeros(10))
    assert estimate.high - estimate.low > 0.75


def test_class_weights_give_the_mean_over_classes() -> None:
    labels = np.repeat([0, 1], [90, 10])
    hits = np.concatenate([bits(81, 90), bits(2, 10)])
    estimate = share(hits, 1 / np.bincount(labels)[labels])
    assert estimate.value == pytest.approx((0.9 + 0.2) / 2)
    assert estimate.high - estimate.low > 1.5 * (share(hits).high - share(hits).low)  # ten videos decide a half of it


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_share_covers_the_truth_in_95_of_100_test_sets(spread: float) -> None:
    rng = np.random.default_rng(2)
    n_classes, n_groups, size, n_sets = 10, 7, 5, 400
    labels = np.repeat(np.arange(n_classes), n_groups * size)
    groups = np.repeat(np.arange(n_classes * n_groups), size)
    level = rng.normal(1, 1, n_classes)
    typical = rng.normal(0, spread, 50_000)
    truth = float(np.mean([(1 / (1 + np.exp(-(x + typical)))).mean() for x in level]))
    found = {"grouped": 0, "alone": 0}
    for _ in range(n_sets):
        shift = level[labels] + rng.normal(0, spread, n_classes * n_groups)[groups]
        hits = rng.random(len(labels)) < 1 / (1 + np.exp(-shift))
        found["grouped"] += covers(share(hits, groups=groups), truth)
        found["alone"] += covers(share(hits), truth)
    assert found["grouped"] / n_sets >= 0.93
    if spread:
        assert found["alone"] / n_sets < 0.9  # what taking films or players for independent videos would claim
    else:
        assert 0.93 <= found["alone"] / n_sets <= 0.99


def test_over_episodes_is_the_published_formula() -> None:
    accuracy = np.array([1.0, 0.6, 0.8, 0.2])
    half = 1.959963984540054 * np.sqrt(np.mean((accuracy - 0.65) ** 2)) / 2  # by hand: 0.65 ± 0.2899
    assert half == pytest.approx(0.28988, abs=1e-5)
    assert dataclasses.astuple(over_episodes(accuracy)) == pytest.approx((0.65, 0.65 - half, 0.65 + half))


def test_ten_thousand_episodes_at_60_percent_give_plus_minus_0_43() -> None:
    accuracy = np.random.default_rng(3).binomial(5, 0.6, 10_000) / 5
    estimate = over_episodes(accuracy)
    assert estimate.high - estimate.value == pytest.approx(0.0043, abs=1e-4)


def test_over_episodes_stays_between_0_and_1() -> None:
    assert over_episodes(np.array([1.0, 1.0, 0.9])).high == 1.0


def test_over_classes_of_a_hand_worked_case() -> None:
    # All 3 pairs of 3 classes. Without class 0: 0.9; without 1: 0.6; without 2: 0.3. Mean 0.6.
    ids = np.array([[0, 1], [2, 0], [1, 2]])
    accuracy = np.array([0.3, 0.6, 0.9])
    half = student_t_95(2) * np.sqrt(2 / 3 * (0.09 + 0.0 + 0.09))
    estimate = over_classes(accuracy, ids)
    assert estimate is not None
    assert estimate.value == pytest.approx(0.6)
    assert (estimate.low, estimate.high) == (pytest.approx(max(0, 0.6 - half)), pytest.approx(min(1, 0.6 + half)))


def test_over_classes_is_the_plain_t_interval_when_an_episode_has_one_class() -> None:
    quality = np.array([0.5, 0.7, 0.8, 0.6, 0.9])
    estimate = over_classes(np.tile(quality, 20), np.tile(np.arange(5), 20)[:, None])
    assert estimate is not None
    half = student_t_95(4) * quality.std(ddof=1) / np.sqrt(5)
    assert estimate.low == pytest.approx(0.7 - half)


def test_over_classes_needs_a_class_that_can_be_left_out() -> None:
    assert over_classes(np.ones(4), np.tile(np.arange(3), (4, 1))) is None
    assert over_classes(np.ones(2), np.array([[0, 1], [0, 2]])) is None  # class 0 is in every episode


def test_over_classes_covers_the_truth_where_the_interval_over_episodes_does_not() -> None:
    rng = np.random.default_rng(4)
    n_classes, n_way, n_worlds = 10, 3, 300
    ways = np.array(list(itertools.combinations(range(n_classes), n_way)))
    found = {"classes": 0, "episodes": 0}
    for _ in range(n_worlds):
        ease, draws = rng.normal(0, 0.04, n_classes), rng.integers(0, len(ways), 2000)
        accuracy = 0.6 + ease[ways].sum(axis=1) + rng.normal(0, 0.02, len(ways))
        sampled = accuracy[draws] + rng.normal(0, 0.15, len(draws))
        classes = over_classes(sampled, ways[draws])
        assert classes is not None
        found["classes"] += covers(classes, 0.6)
        found["episodes"] += covers(over_episodes(sampled), 0.6)
    assert 0.92 <= found["classes"] / n_worlds <= 0.99
    assert found["episodes"] / n_worlds < 0.4


@pytest.mark.parametrize(
    ("df", "quantile"), [(4, 2.776445), (6, 2.446912), (9, 2.262157), (23, 2.068658), (1000, 1.962339)]
)
def test_student_t_agrees_with_tables(df: int, quantile: float) -> None:
    assert student_t_95(df) == pytest.approx(quantile, abs=1e-3)
