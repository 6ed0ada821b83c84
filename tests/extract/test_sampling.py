"""Which frames: by hand, and as properties of every sampling on every length."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from coldframe.extract.sampling import generator, sample, segment_centres
from coldframe.extract.specs import FrameSpec


def times(n: int, fps: float = 25.0) -> np.ndarray:
    return np.arange(n) / fps


@pytest.mark.parametrize(
    ("n_source", "n_frames", "expected"),
    [
        (10, 5, [1, 3, 5, 7, 9]),
        (100, 3, [16, 50, 83]),
        (8, 8, list(range(8))),
        (9, 8, [0, 1, 2, 3, 5, 6, 7, 8]),
        (3, 8, [0, 1, 2, 2, 2, 2, 2, 2]),
        (1, 2, [0, 0]),
        (7, 1, [3]),
    ],
)
def test_segment_centres_by_hand(n_source: int, n_frames: int, expected: list[int]) -> None:
    centres = segment_centres(n_source, n_frames)
    assert centres.dtype == np.int64
    assert centres.tolist() == expected


def test_segment_centres_are_those_of_tsn() -> None:
    for n_source, n_frames in itertools.product(range(16, 400, 7), (1, 3, 8, 16)):
        tick = n_source / n_frames
        assert segment_centres(n_source, n_frames).tolist() == [int(tick / 2 + tick * part) for part in range(n_frames)]


@pytest.mark.parametrize(
    ("spec", "n_source", "expected"),
    [
        (FrameSpec(3, "dense", stride=2), 10, [[2, 4, 6]]),  # room for 10 - 5 = 5 begins more: 2 before
        (FrameSpec(3, "dense", stride=2, clips=1), 11, [[3, 5, 7]]),
        (FrameSpec(3, "dense", stride=2, clips=2), 10, [[0, 2, 4], [5, 7, 9]]),
        (FrameSpec(3, "dense", stride=2, clips=3), 10, [[0, 2, 4], [3, 5, 7], [5, 7, 9]]),
        (FrameSpec(3, "dense", stride=1, clips=3), 3, [[0, 1, 2]] * 3),
        (FrameSpec(4, "dense", stride=3, clips=2), 5, [[0, 3, 4, 4]] * 2),
        (FrameSpec(3, "dense", stride=1), 1, [[0, 0, 0]]),
        (FrameSpec(None, "fps", rate_fps=5.0), 11, [[0, 5, 10]]),
        (FrameSpec(None, "fps", rate_fps=50.0), 3, [[0, 0, 1, 1, 2]]),
        (FrameSpec(None, "fps", rate_fps=0.1), 11, [[0]]),
        (FrameSpec(None, "fps", rate_fps=3.0), 25, [[0, 8, 16]]),
        (FrameSpec(None, "all"), 4, [[0, 1, 2, 3]]),
        (FrameSpec(5, "random", seed=1), 3, [[0, 1, 2, 2, 2]]),
    ],
)
def test_by_hand(spec: FrameSpec, n_source: int, expected: list[list[int]]) -> None:
    views = sample(times(n_source), spec)
    assert views.frames.tolist() == expected
    assert views.frames.dtype == np.int64


def test_frames_a_second_follow_the_clock_not_the_count() -> None:
    clock = np.array([0.0, 0.1, 0.2, 1.0, 1.04, 2.0]) + 7.0  # a part that begins late
    assert sample(clock, FrameSpec(None, "fps", rate_fps=2.0)).frames.tolist() == [[0, 2, 3, 4, 5]]
    rounded = np.round(np.arange(100) / 29.97, 3)
    assert sample(rounded, FrameSpec(None, "fps", rate_fps=29.97)).frames.tolist() == [list(range(100))]


SPECS = [
    FrameSpec(8),
    FrameSpec(1),
    FrameSpec(8, "random", seed=0, draws=3),
    FrameSpec(4, "dense", stride=3, clips=5),
    FrameSpec(4, "dense", stride=7, crops="three"),
    FrameSpec(None, "fps", rate_fps=4.0, crops="random", seed=2, draws=2),
    FrameSpec(None, "all", crops="three"),
]


@pytest.mark.parametrize("spec", SPECS, ids=FrameSpec.describe)
def test_every_view_ascends_within_the_video_and_every_shot_is_met_once(spec: FrameSpec) -> None:
    for n_source in (1, 2, 3, 7, 8, 9, 31, 250):
        views = sample(times(n_source), spec, "v")
        assert views.frames.shape[0] == len(views.crops) == spec.n_views
        assert views.frames.min() >= 0
        assert views.frames.max() < n_source
        assert (np.diff(views.frames, axis=1) >= 0).all()
        assert views.shots == sorted(set(views.shots))
        shown = [[views.shots[shot] for shot in row] for row in views.rows]
        wanted = [
            [(frame, crop) for frame in row] for row, crop in zip(views.frames.tolist(), views.crops, strict=True)
        ]
        assert shown == wanted
        assert views.rows.max() + 1 == len(views.shots)
        distinct = [len(set(row)) for row in views.frames.tolist()]
        assert views.n_repeated.tolist() == [views.frames.shape[1] - n for n in distinct]


@pytest.mark.parametrize("spec", SPECS, ids=FrameSpec.describe)
def test_some_views_are_the_same_as_all_of_them(spec: FrameSpec) -> None:
    every = sample(times(60), spec, "v")
    for number in range(spec.n_views):
        alone = sample(times(60), spec, "v", [number])
        np.testing.assert_array_equal(alone.frames[0], every.frames[number])
        assert alone.crops[0] == every.crops[number]


def test_views_are_numbered_draw_by_draw_clip_by_clip_crop_by_crop() -> None:
    views = sample(times(60), FrameSpec(2, "dense", stride=5, clips=2, crops="three"))
    assert views.crops.tolist() == [0, 1, 2, 0, 1, 2]
    assert views.frames[:3].tolist() == [[0, 5]] * 3
    assert views.frames[3:].tolist() == [[54, 59]] * 3
    draws = sample(times(60), FrameSpec(2, "dense", stride=5, clips=2, crops="random", seed=0, draws=2))
    assert draws.crops.tolist() == [0, 0, 1, 1]
    assert draws.frames[:, 0].tolist() == [0, 54, 0, 54]


def test_random_frames_are_a_function_of_seed_key_and_draw_alone() -> None:
    def frames(seed: int = 0, key: str = "v", draws: int = 2) -> list[list[int]]:
        return sample(times(500), FrameSpec(8, "random", seed=seed, draws=draws), key).frames.tolist()

    assert frames() == frames()
    assert frames(draws=5)[:2] == frames()
    different = [*frames(), frames(seed=1)[0], frames(key="w")[0], frames(key="\udce9")[0]]
    assert len({*map(tuple, different)}) == len(different)
    assert frames()[0] == [56, 113, 185, 238, 255, 367, 414, 497]  # on every machine, in every release


def test_every_frame_of_a_part_is_as_likely() -> None:
    drawn = sample(times(20), FrameSpec(4, "random", seed=0, draws=2000)).frames  # [2000, 4], parts of 5 frames
    counts = np.bincount(drawn.ravel(), minlength=20)
    assert (drawn // 5 == np.arange(4)).all()
    assert (abs(counts - 400) < 90).all()  # 5 standard deviations


def test_generators_do_not_take_one_key_for_another() -> None:
    first = {int(generator(*key).integers(1 << 60)) for key in [(1, "a", "b"), (1, "ab"), (11, "a"), (None, "a")]}
    assert len(first) == 4
