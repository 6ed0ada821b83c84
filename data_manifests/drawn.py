"""Drawn pictures and clips: coloured shapes on noisy backgrounds, with names for all that can be seen in them.

Labelled data for a machine that has none: `coldframe-tiny` learns from pictures, `coldframe demo` runs on clips.

A clip is a shape going once round a loop. Its frames are drawn before its motion is looked at, and a motion is nothing
but the order in which they are shown: where the lap starts, and which way round it goes. So all motion classes have the
same frames, and no average over frames tells any two of them apart. Nor does a frame and its time: at any time, every
place that is shown is shown by two motions.

NumPy alone; the same arguments always draw the same bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, UnknownName

Plane = NDArray[np.floating]  # one number a pixel, float32

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 225, 40),
    "green": (35, 165, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 175),
    "white": (248, 248, 248),
    "black": (15, 15, 15),
}
PLACES: dict[str, tuple[float, float]] = {
    f"{row} {column}".strip() or "centre": (x, y)
    for row, y in (("top", 0.25), ("", 0.5), ("bottom", 0.75))
    for column, x in (("left", 0.25), ("", 0.5), ("right", 0.75))
}
BASE_SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NOVEL_SHAPES = ("diamond", "heart", "bow", "moon", "drop", "arrow")
SHAPES = BASE_SHAPES + NOVEL_SHAPES
STARTS = ("top", "right", "bottom", "left")  # clockwise
MOTIONS = tuple(f"{way} from the {start}" for way in ("clockwise", "counter-clockwise") for start in STARTS)
BASE_EVENTS = tuple(f"{shape} going {motion}" for shape in BASE_SHAPES for motion in MOTIONS)
NOVEL_EVENTS = tuple(f"{shape} going {motion}" for shape in NOVEL_SHAPES for motion in MOTIONS)
# Kept from training for new classes: every start once, either way round twice, so all their words are known.
HELD_MOTIONS = tuple(
    f"{way} from the {start}" for way, start in zip(("clockwise", "counter-clockwise") * 2, STARTS, strict=True)
)
SPLITS = {"train": 0.6, "val": 0.15, "test": 0.25}
MAX_TILT = math.radians(20)  # more would turn a square into a diamond


@dataclass(frozen=True, slots=True)
class DrawnClip:
    """One clip of a drawn data set: what is in it, and where its file belongs."""

    path: str  # relative to the data set's root; the folder is the motion
    motion: str
    shape: str
    colour: str
    split: str
    seed: int

    @property
    def is_novel(self) -> bool:
        """Whether the shape belongs to the classes kept from training in base-to-novel and few-shot protocols."""
        return self.shape in NOVEL_SHAPES

    @property
    def event(self) -> str:
        """What happens: `circle going clockwise from the top`."""
        return f"{self.shape} going {self.motion}"

    def draw(self, n_frames: int = 24, size_px: int = 96) -> NDArray[np.uint8]:
        """The frames [T, S, S, 3], RGB."""
        return draw_clip(self.motion, self.shape, self.colour, self.seed, n_frames, size_px)


def plan_clips(n_per_class: int, seed: int = 0) -> tuple[DrawnClip, ...]:
    """Decide the clips of a data set, `n_per_class` of each motion; nothing is drawn yet.

    Shapes and colours occur equally often, give or take one, in every split of every motion. So one set of files makes
    two data sets, labelled by motion and labelled by shape, and neither label helps to guess the other.

    Raises:
        ConfigError: too few clips for each motion to be in every split.
    """
    edges = np.rint(np.cumsum(list(SPLITS.values())) * n_per_class).astype(int)
    n_of_split = dict(zip(SPLITS, np.diff(edges, prepend=0).tolist(), strict=True))
    if min(n_of_split.values()) < 1:
        raise ConfigError("too few clips for three splits", seen=f"{n_per_class} a class", wanted="4 or more")
    rng = np.random.default_rng(seed)
    clips: list[DrawnClip] = []
    for motion in MOTIONS:
        number = itertools.count()
        for split, n in n_of_split.items():
            columns = _evenly(SHAPES, n, rng), _evenly(COLOURS, n, rng), rng.integers(2**32, size=n).tolist()
            for shape, colour, clip_seed in zip(*columns, strict=True):
                path = f"{motion.replace(' ', '_')}/{next(number):03d}.mp4"
                clips.append(DrawnClip(path, motion, shape, colour, split, clip_seed))
    return tuple(clips)


def draw_clip(
    motion: str, shape: str, colour: str, seed: int, n_frames: int = 24, size_px: int = 96
) -> NDArray[np.uint8]:
    """Draw one lap of a shape round a loop.

    Speed, size and tilt vary smoothly along the lap; loop and background are fixed. All of it comes from `seed`.

    Returns:
        Frames [T, S, S, 3], RGB. For one seed every motion returns the same frames in another order, and so are the 8
        at the centres of equal segments: one at each of eight stations of the loop.

    Raises:
        UnknownName: no such motion, shape or colour.
        ConfigError: n_frames is not a multiple of 8, so that the motions would not share their frames.
    """
    order = frame_order(motion, n_frames)
    rng = np.random.default_rng(seed)
    turn = (np.arange(n_frames) - _at_station(n_frames)) * (2 * np.pi / n_frames)  # clockwise, 0 is the top
    turn += _wave(turn, 0.3, rng)
    reach = rng.uniform(0.23, 0.28, size=2)
    middle = 0.5 + rng.uniform(-0.03, 0.03, size=2)
    centres = middle + reach * np.stack([np.sin(turn), -np.cos(turn)], axis=1)  # [T, 2]
    radii = rng.uniform(0.17, 0.22) * (1 + _wave(turn, 0.1, rng))
    angles = rng.uniform(-0.6, 0.6) * MAX_TILT + _wave(turn, 0.4 * MAX_TILT, rng)
    background = draw_background(size_px, rng)
    return draw_frames(shape, colour, centres, radii, angles, background, rng)[order]


def frame_order(motion: str, n_frames: int) -> NDArray[np.int64]:
    """Which frame of the clockwise lap from the top is shown when, [T]: all that tells one motion from another."""
    if motion not in MOTIONS:
        raise UnknownName("motion", motion, MOTIONS)
    if n_frames < 8 or n_frames % 8:
        raise ConfigError("the motions share no frames", seen=f"n_frames={n_frames}", wanted="a multiple of 8")
    is_counter, start = divmod(MOTIONS.index(motion), len(STARTS))
    steps = np.arange(n_frames)
    if is_counter:
        steps = 2 * _at_station(n_frames) - steps  # mirrored at the station where the lap starts
    return (steps + start * n_frames // len(STARTS)).astype(np.int64) % n_frames


def draw_frames(
    shape: str,
    colour: str,
    centres: NDArray[np.floating],
    radii: NDArray[np.floating],
    angles: NDArray[np.floating],
    background: NDArray[np.float32],
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Draw one shape at T places, anti-aliased, in one hue and one light, with sensor noise.

    Args:
        centres: [T, 2], x to the right and y downwards, in sides of the picture.
        radii: [T], in sides of the picture.
        angles: [T], radians, clockwise.
        background: [S, S, 3], 0 to 255.
        rng: draws hue, light and noise.

    Returns:
        Frames [T, S, S, 3], RGB.

    Raises:
        UnknownName: no such shape or colour.
    """
    if shape not in _OUTLINES:
        raise UnknownName("shape", shape, SHAPES)
    if colour not in COLOURS:
        raise UnknownName("colour", colour, COLOURS)
    size_px = background.shape[0]
    axis = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
    centres, radii, angles = (np.asarray(a, np.float32)[..., None, None] for a in (centres, radii, angles))
    right, down = axis[None, None, :] - centres[:, 0], axis[None, :, None] - centres[:, 1]  # [T, 1, S], [T, S, 1]
    cos, sin = np.cos(angles), np.sin(angles)
    across, up = (right * cos + down * sin) / radii, (right * sin - down * cos) / radii  # [T, S, S], shape in unit disc
    distance_px = _OUTLINES[shape](across, up) * radii * size_px
    cover = np.clip(0.5 - distance_px, 0, 1)[..., None]
    ink = np.asarray(COLOURS[colour], np.float32) + rng.normal(0, 8, 3).astype(np.float32)
    frames = background + cover * (ink - background)  # [T, S, S, 3]
    frames *= rng.uniform(0.85, 1.1)
    frames += rng.uniform(1, 8) * rng.standard_normal(frames.shape, np.float32)
    return np.rint(np.clip(frames, 0, 255)).astype(np.uint8)


def draw_background(size_px: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw a muted backdrop [S, S, 3], 0 to 255: plain, shaded, striped, chequered or cloudy."""
    axis = np.linspace(-1, 1, size_px, dtype=np.float32)
    x, y = axis[None, :], axis[:, None]
    tilt, period = rng.uniform(0, math.pi), rng.uniform(0.15, 0.6)
    cos, sin = math.cos(tilt), math.sin(tilt)
    along, across = x * cos + y * sin, y * cos - x * sin
    match rng.integers(5):
        case 0:
            pattern = np.zeros_like(along)
        case 1:
            pattern = along
        case 2:
            pattern = np.sin(2 * math.pi / period * along)
        case 3:
            pattern = np.sign(np.sin(math.pi / period * along) * np.sin(math.pi / period * across))
        case _:
            pattern = _clouds(size_px, rng)
    light, dark = (rng.uniform(85, 165, size=(2, 1)) + rng.uniform(-18, 18, size=(2, 3))).astype(np.float32)
    mixed = 0.5 + 0.5 * rng.uniform(0.1, 0.5) * pattern[..., None]
    return (light + mixed * (dark - light)).astype(np.float32)


def _evenly(values: Collection[str], n: int, rng: np.random.Generator) -> list[str]:
    """Draw n values in which each occurs as often as any other, give or take one, in random order."""
    rounds = [rng.permutation(list(values)) for _ in range(-(-n // len(values)))]
    return rng.permutation(np.concatenate(rounds)[:n]).tolist()


def _at_station(n_frames: int) -> float:
    """The time, in frames, at which a lap is at its first station: the middle of the first of eight segments."""
    return (n_frames / 8 - 1) / 2


def _wave(turn: NDArray[np.floating], height: float, rng: np.random.Generator) -> NDArray[np.floating]:
    """A smooth change along the lap that favours no part of it: the phase is anywhere."""
    return rng.uniform(0, height) * np.sin(turn + rng.uniform(0, 2 * np.pi))


def _clouds(size_px: int, rng: np.random.Generator) -> Plane:
    """Blobs: a few random numbers, interpolated."""
    coarse = rng.uniform(-1, 1, size=(5, 5)).astype(np.float32)
    place = np.linspace(0, 4, size_px, dtype=np.float32)
    weights = np.clip(1 - np.abs(place[:, None] - np.arange(5, dtype=np.float32)), 0, 1)  # [S, 5]
    return weights @ coarse @ weights.T


def _star(x: Plane, y: Plane) -> Plane:
    """Five points: one edge, mirrored and turned into all ten places."""
    sector = math.pi / 5
    folded = np.abs((np.arctan2(x, y) + sector) % (2 * sector) - sector)
    radius = np.hypot(x, y)
    notch_x, notch_y = 0.42 * math.sin(sector), 0.42 * math.cos(sector)
    across, up = (1 - notch_y), notch_x
    return (radius * (across * np.sin(folded) + up * np.cos(folded)) - up) / math.hypot(across, up)


def _heart(x: Plane, y: Plane) -> Plane:
    """A square on its corner, and a disc round the middle of each upper edge."""
    x, y, half = np.abs(x), y + 0.08, 0.57
    middle = half * math.sqrt(0.5)
    return np.minimum((x + np.abs(y)) * math.sqrt(0.5) - half, np.hypot(x - middle, y - middle) - half)


def _drop(x: Plane, y: Plane) -> Plane:
    """A disc under a cone that touches it."""
    disc = np.hypot(x, y + 0.4) - 0.58
    sin = 0.58 / 1.4
    cone = np.maximum(np.abs(x) * math.sqrt(1 - sin**2) + (y - 1) * sin, 0.58 * sin - 0.4 - y)
    return np.minimum(disc, cone)


def _arrow(x: Plane, y: Plane) -> Plane:
    """A head and a shaft, pointing up."""
    head = np.maximum(np.abs(x) * 0.77 + (y - 1) * 0.64, -y)
    shaft = np.maximum(np.abs(x) - 0.28, np.abs(y + 0.4) - 0.55)
    return np.minimum(head, shaft)


# Signed distance to the outline (a bound of it is enough for one pixel of anti-aliasing) in a frame where x is to the
# right, y is up and the shape fills the unit disc.
_OUTLINES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.8,
    "triangle": lambda x, y: np.maximum(np.abs(x) * math.sqrt(0.75) + (y + 0.15) * 0.5, -y - 0.15) - 0.55,
    "star": _star,
    "cross": lambda x, y: np.maximum(np.minimum(np.abs(x), np.abs(y)) - 0.3, np.maximum(np.abs(x), np.abs(y)) - 0.95),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.22,
    "diamond": lambda x, y: (np.abs(x) / 0.62 + np.abs(y) - 1) * 0.53,
    "heart": _heart,
    "bow": lambda x, y: np.maximum(np.abs(x) - 0.85, (np.abs(y) - 0.08 - 0.7 * np.abs(x)) * 0.82),
    "moon": lambda x, y: np.maximum(np.hypot(x - 0.25, y) - 0.95, 0.8 - np.hypot(x - 0.7, y)),
    "drop": _drop,
    "arrow": _arrow,
}
