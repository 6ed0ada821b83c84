"""What frames.py and the back ends say to each other: what a decoder is given, what it hands back, how it refuses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...data_manifests.errors import ColdframeError
from ..crops import Crop, Picture
from ..sampling import Times, Views

KEPT = 0.95  # a file with a smaller share of its promised frames is damaged: refused or salvaged, not quietly shortened
_BATCH_BYTES = 256 << 20  # full-size pictures that a back end may hold at once

Choose = Callable[[Times], Views]


class DecodeError(ColdframeError, OSError):
    """One video cannot be decoded; the text is the reason, as `category: detail`."""

    @property
    def reason(self) -> str:
        """What goes into the record of the video."""
        return str(self)


class SourceError(DecodeError):
    """A file cannot be had at present: it, or the disk it is on, may come back."""


class Sink(Protocol):
    """Where crops go as they are decoded, so that no video is ever in memory whole."""

    def restart(self) -> None:
        """Forget what came: the video begins again."""
        ...

    def put(self, crop: Picture) -> None:
        """Take the next crop [3, S, S]; it is not changed afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """What decides whether a video is taken, and never what its numbers are."""

    salvage: float | None = None  # smallest share of the promised frames that will do; None: only whole videos
    max_frames: int | None = None  # a view of more frames is refused


WHOLE = DecodeOptions()


@dataclass(frozen=True, slots=True)
class Source:
    """What a file's header and packets say; no picture is decoded for it."""

    path: str
    stream: int  # among the video streams
    index: int  # of the same among all streams
    timestamps_s: Times  # of the frames that the packets promise
    ticks: NDArray[np.int64] | None  # the same in the container's clock; None where that cannot tell frames apart
    has_gaps: bool  # its times leave room for lost packets, and no count tells of them
    rate_fps: float
    height: int
    width: int
    rotation: int  # degrees, where the decoder does not tell
    decord_flaw: str  # why decord would go astray; empty where it is exact
    seek_flaw: str  # why nobody should seek in it; empty where torchcodec is exact
    problem: str  # why the file is not whole; empty where it is
    hole_at: int | None  # in an AVI file, the last packet before bytes that no packet tells of
    kept: float  # the share of it that is there

    def batches(self, frames: Collection[int]) -> list[NDArray[np.int64]]:
        """Some of its frames, ascending, in parts that fit in memory at full size."""
        n_bytes = len(frames) * 3 * self.height * self.width
        return np.array_split(np.array(sorted(frames)), -(-n_bytes // _BATCH_BYTES))


class Picked(NamedTuple):
    """What a decoder hands back, besides the crops."""

    timestamps_s: Times
    views: Views
    decoder: str
    kept: float = 1.0


class Decoder(Protocol):
    """A back end; pictures are cropped one by one, so that it never holds a video in full size."""

    def __call__(self, source: Source, choose: Choose, crop: Crop, sink: Sink, options: DecodeOptions) -> Picked:
        """Decode the shots of the views that `choose` takes from the times of all frames; raises DecodeError."""
        ...


def crops_of(views: Views) -> Mapping[int, list[int]]:
    """The numbers of the crops wanted of each wanted frame."""
    crops: dict[int, list[int]] = defaultdict(list)
    for frame, crop in views.shots:
        crops[frame].append(crop)
    return dict(crops)
