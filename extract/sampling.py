"""Which frames of a video are kept, and how each view of it crops them. Indices alone; no picture is seen here.

A view is one row of a store: the same video in another draw, at other times or in another crop. Views are numbered draw
by draw, then clip by clip, then crop by crop, so that further draws only ever add numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .specs import FrameSpec

Times = NDArray[np.float64]  # seconds of every frame of a file, in the order of display
_SLACK_S = 5e-4  # times of frames are rounded


@dataclass(frozen=True)
class Views:
    """What V views of one video show: crop `crops[v]` of the source frames `frames[v]`."""

    frames: NDArray[np.int64]  # [V, T], ascending in T
    crops: NDArray[np.int64]  # [V]

    @cached_property
    def shots(self) -> list[tuple[int, int]]:
        """Distinct (frame, crop) pairs in the order in which a decoder meets them: each is decoded and encoded once."""
        return [(code // self._n_crops, code % self._n_crops) for code in self._codes[0].tolist()]

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Which shot each view shows at each time, [V, T]."""
        return self._codes[1].reshape(self.frames.shape)

    @cached_property
    def n_repeated(self) -> NDArray[np.int64]:
        """How many frames of each view only repeat another, because the video is too short, [V]."""
        distinct = 1 + (np.diff(self.frames, axis=1) != 0).sum(axis=1)
        return self.frames.shape[1] - distinct

    @cached_property
    def _codes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.unique(self.frames * self._n_crops + self.crops[:, None], return_inverse=True)

    @cached_property
    def _n_crops(self) -> int:
        return int(self.crops.max()) + 1


def sample(timestamps_s: Times, spec: FrameSpec, key: str = "", views: Sequence[int] | None = None) -> Views:
    """Choose the frames and crops of some views.

    Args:
        timestamps_s: of the frames of the video, or of the part of it that is asked for, [n]; at least one.
        key: what random draws depend on besides the seed: the video's id, so that no order of work matters.
        views: their numbers; None is all of them.
    """
    numbers = np.arange(spec.n_views) if views is None else np.asarray(views)
    draw, rest = np.divmod(numbers, spec.n_clips * spec.n_crops)
    clip, crop = np.divmod(rest, spec.n_crops)
    frames = [_SAMPLINGS[spec.sampling](timestamps_s, spec, key, *at) for at in zip(draw, clip, strict=True)]
    return Views(np.stack(frames), draw if spec.crops == "random" else crop)


def segment_centres(n_source: int, n_frames: int) -> NDArray[np.int64]:
    """Take the centre of each of `n_frames` equal parts: frame i is floor((2i + 1) · n_source / (2 · n_frames)).

    A video with fewer frames than parts gives each of its frames once, in order, then repeats the last.

    Returns:
        Indices [n_frames], ascending, each in [0, n_source).

    Source: TSN, Wang et al. 2016, arXiv:1608.00859; the positions of its evaluation code.
    """
    part = np.arange(n_frames, dtype=np.int64)
    if n_source < n_frames:
        return np.minimum(part, n_source - 1)
    return (2 * part + 1) * n_source // (2 * n_frames)


def generator(seed: int | None, *key: object) -> np.random.Generator:
    """A source of random numbers that is a function of the seed and the key, on every machine."""
    digest = hashlib.sha256("\0".join(map(str, (seed, *key))).encode(errors="surrogateescape")).digest()
    return np.random.default_rng(np.frombuffer(digest, "<u8"))


def _uniform(timestamps_s: Times, spec: FrameSpec, key: str, draw: int, clip: int) -> NDArray[np.int64]:
    """The centres of T equal parts."""
    return segment_centres(len(timestamps_s), spec.length)


def _random(timestamps_s: Times, spec: FrameSpec, key: str, draw: int, clip: int) -> NDArray[np.int64]:
    """One frame of each of T equal parts, every frame of a part as likely.  Source: TSN's training."""
    n_source, n_frames = len(timestamps_s), spec.length
    if n_source < n_frames:
        return segment_centres(n_source, n_frames)
    bounds = np.arange(n_frames + 1) * n_source // n_frames
    return generator(spec.seed, "frames", key, draw).integers(bounds[:-1], bounds[1:])


def _dense(timestamps_s: Times, spec: FrameSpec, key: str, draw: int, clip: int) -> NDArray[np.int64]:
    """T frames `stride` apart; clips begin at even distances from the first possible place to the last, one in the middle."""
    step = spec.stride or 1
    room = max(len(timestamps_s) - 1 - (spec.length - 1) * step, 0)
    begin = room // 2 if spec.n_clips == 1 else (2 * clip * room + spec.n_clips - 1) // (2 * (spec.n_clips - 1))
    return np.minimum(begin + step * np.arange(spec.length), len(timestamps_s) - 1)


def _fps(timestamps_s: Times, spec: FrameSpec, key: str, draw: int, clip: int) -> NDArray[np.int64]:
    """The frame on display at 0, 1/rate, 2/rate, … seconds, up to the last frame."""
    assert spec.rate_fps is not None
    since = timestamps_s - timestamps_s[0]
    n_ticks = int((since[-1] + _SLACK_S) * spec.rate_fps) + 1
    return np.searchsorted(since, np.arange(n_ticks) / spec.rate_fps + _SLACK_S, side="right") - 1


def _all(timestamps_s: Times, spec: FrameSpec, key: str, draw: int, clip: int) -> NDArray[np.int64]:
    return np.arange(len(timestamps_s))


_SAMPLINGS = {"uniform": _uniform, "random": _random, "dense": _dense, "fps": _fps, "all": _all}
