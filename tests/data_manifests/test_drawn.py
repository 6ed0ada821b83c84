"""Drawn data: what is drawn is what was asked for, and motion classes differ by order alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from coldframe.data_manifests.drawn import (
    BASE_EVENTS,
    BASE_SHAPES,
    COLOURS,
    HELD_MOTIONS,
    MOTIONS,
    NOVEL_EVENTS,
    NOVEL_SHAPES,
    PLACES,
    SHAPES,
    draw_background,
    draw_clip,
    draw_frames,
    frame_order,
    plan_clips,
)
from coldframe.data_manifests.errors import ConfigError, UnknownName

GREY = np.full((64, 64, 3), 128, np.float32)


def draw_one(
    shape: str,
    colour: str = "red",
    centre: tuple[float, float] = (0.5, 0.5),
    radius: float = 0.25,
    angle: float = 0.0,
    background: np.ndarray = GREY,
    seed: int = 0,
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return draw_frames(shape, colour, np.array([centre]), np.array([radius]), np.array([angle]), background, rng)[0]


def ink(frame: np.ndarray, background: float = 128.0) -> np.ndarray:
    """Where something was drawn on grey: [S, S] bool."""
    return np.abs(frame.astype(float) - background).max(axis=2) > 50


def test_the_same_arguments_draw_the_same_bytes() -> None:
    first, again, other = (draw_clip(MOTIONS[0], "star", "blue", seed, 8, 32) for seed in (3, 3, 4))
    assert first.dtype == np.uint8
    assert first.shape == (8, 32, 32, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("n_frames", [8, 16, 24])
def test_all_motions_show_the_same_frames(n_frames: int) -> None:
    clips = {motion: draw_clip(motion, "heart", "green", 5, n_frames, 32) for motion in MOTIONS}
    frames = {motion: Counter(frame.tobytes() for frame in clip) for motion, clip in clips.items()}
    assert len(frames[MOTIONS[0]]) == n_frames
    assert all(these == frames[MOTIONS[0]] for these in frames.values())
    assert len({clip.tobytes() for clip in clips.values()}) == len(MOTIONS)


def test_all_motions_show_the_same_frames_to_a_reader_of_eight() -> None:
    seen = np.array([frame_order(motion, 24)[1::3] for motion in MOTIONS])  # [motions, 8]
    assert all(sorted(row) == sorted(seen[0]) for row in seen)
    assert len({tuple(row) for row in seen}) == len(MOTIONS)
    for frames in seen.T:  # at any time, one frame leaves two motions open
        assert set(Counter(frames.tolist()).values()) == {2}


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_motion_does_what_its_name_says(motion: str) -> None:
    way, start = motion.split(" from the ")
    clip = draw_clip(motion, "circle", "white", 1, 24, 64)
    rows, columns = np.indices((64, 64))
    masks = [frame.min(axis=2) > 185 for frame in clip]
    path = np.array([(columns[mask].mean() - 31.5, rows[mask].mean() - 31.5) for mask in masks])  # x right, y down
    towards = {"top": (0, -1), "right": (1, 0), "bottom": (0, 1), "left": (-1, 0)}[start]
    assert path[0] @ towards > 0.8 * np.linalg.norm(path[0])
    (x, y), (next_x, next_y) = path[:-1].T, path[1:].T
    turned = x * next_y - y * next_x  # positive is clockwise where y points down
    assert np.all(turned > 0) if way == "clockwise" else np.all(turned < 0)


def test_motions_refuse_what_they_cannot_do() -> None:
    with pytest.raises(UnknownName, match="sideways"):
        draw_clip("sideways", "circle", "red", 0)
    with pytest.raises(ConfigError, match="multiple of 8"):
        draw_clip(MOTIONS[0], "circle", "red", 0, n_frames=10)
    with pytest.raises(UnknownName, match="circle"):
        draw_clip(MOTIONS[0], "circel", "red", 0)
    with pytest.raises(UnknownName, match="red"):
        draw_clip(MOTIONS[0], "circle", "rad", 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_lies_where_it_was_put(shape: str) -> None:
    for place, (x, y) in PLACES.items():
        mask = ink(draw_one(shape, centre=(x, y), radius=0.2))
        rows, columns = np.nonzero(mask)
        assert abs((columns.mean() + 0.5) / 64 - x) < 0.06, place
        assert abs((rows.mean() + 0.5) / 64 - y) < 0.06, place
        assert np.hypot((columns + 0.5) / 64 - x, (rows + 0.5) / 64 - y).max() < 0.25, place


def test_areas_are_those_of_geometry() -> None:
    unit = (0.3 * 64) ** 2  # a radius of one, squared, in pixels
    for shape, area in {"circle": np.pi * 0.81, "square": 1.6**2, "ring": np.pi * (0.92**2 - 0.48**2)}.items():
        assert ink(draw_one(shape, radius=0.3)).sum() / unit == pytest.approx(area, rel=0.05)


def test_no_two_shapes_look_alike() -> None:
    masks = [ink(draw_one(shape, radius=0.25)) for shape in SHAPES]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert (one & other).sum() / (one | other).sum() < 0.9


def test_colours_are_nearest_to_themselves() -> None:
    table = np.array(list(COLOURS.values()), float)
    for index, colour in enumerate(COLOURS):
        for seed in range(5):
            middle = draw_one("circle", colour, seed=seed)[28:36, 28:36].mean(axis=(0, 1))
            assert np.linalg.norm(table - middle, axis=1).argmin() == index


def test_angles_turn_clockwise() -> None:
    mask = ink(draw_one("arrow", angle=np.pi / 2))  # points right: the head's base is the widest column
    widths = mask.sum(axis=0)
    assert widths.argmax() > 30
    assert widths[:30].max() < widths.max() / 2


def test_edges_are_anti_aliased() -> None:
    black = np.zeros((64, 64, 3), np.float32)
    levels = draw_one("circle", "white", background=black)[:, :, 0].astype(int)
    between = ((levels > 40) & (levels < 180)).sum()
    assert between == pytest.approx(2 * np.pi * 0.25 * 0.9 * 64, rel=0.5)  # a ring about one pixel wide


def test_backgrounds_are_muted() -> None:
    for seed in range(20):
        background = draw_background(32, np.random.default_rng(seed))
        assert background.shape == (32, 32, 3)
        assert background.dtype == np.float32
        assert 50 < background.min() <= background.max() < 200


def test_a_plan_is_stratified() -> None:
    clips = plan_clips(40, seed=2)
    assert len({clip.path for clip in clips}) == len({clip.seed for clip in clips}) == 40 * len(MOTIONS)
    assert all(clip.path.split("/")[0].replace("_", " ") == clip.motion for clip in clips)
    assert Counter((clip.motion, clip.split) for clip in clips) == Counter(
        {(motion, split): n for motion in MOTIONS for split, n in (("train", 24), ("val", 6), ("test", 10))}
    )
    for what in ("shape", "colour"):
        cells = Counter((clip.motion, clip.split, getattr(clip, what)) for clip in clips)
        for motion in MOTIONS:
            train = [n for (m, split, _), n in cells.items() if (m, split) == (motion, "train")]
            assert set(train) == ({2} if what == "shape" else {3})  # 24 clips, 12 shapes, 8 colours
            test = [n for (m, split, _), n in cells.items() if (m, split) == (motion, "test")]
            assert set(test) <= {1, 2}


def test_a_plan_is_a_function_of_its_seed() -> None:
    assert plan_clips(5, seed=1) == plan_clips(5, seed=1) != plan_clips(5, seed=2)


def test_a_plan_has_enough_novel_classes_for_five_way_five_shot() -> None:
    assert not set(BASE_SHAPES) & set(NOVEL_SHAPES)
    novel = Counter(clip.shape for clip in plan_clips(60) if clip.is_novel and clip.split == "test")
    assert len(novel) == 6
    assert min(novel.values()) >= 6


def test_a_plan_too_small_for_its_splits_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 or more"):
        plan_clips(2)


def test_a_planned_clip_draws_itself() -> None:
    clip = plan_clips(4)[7]
    assert np.array_equal(clip.draw(8, 32), draw_clip(clip.motion, clip.shape, clip.colour, clip.seed, 8, 32))


def test_what_is_kept_from_training_is_new_and_its_words_are_known() -> None:
    assert not set(BASE_EVENTS) & set(NOVEL_EVENTS)
    assert {clip.event for clip in plan_clips(60)} <= set(BASE_EVENTS) | set(NOVEL_EVENTS)
    assert all((clip.event in NOVEL_EVENTS) == clip.is_novel for clip in plan_clips(60))
    held, kept = set(HELD_MOTIONS), set(MOTIONS) - set(HELD_MOTIONS)
    assert len(held) == len(kept) == 4
    for motions in (held, kept):
        assert {word for motion in motions for word in motion.split()} == {w for m in MOTIONS for w in m.split()}
