"""One video → the frames that a tower sees: which of them here, their pictures by decoders/."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Self

import av
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..data_manifests.locations import LocationError, MissingError, TransientError, fetched
from .crops import Picture, cropper
from .decoders import DECODERS
from .decoders.contract import WHOLE, DecodeError, DecodeOptions, Sink, SourceError
from .decoders.source import inspect, promise
from .sampling import Times, Views, sample
from .specs import FrameSpec, TransformSpec

_SLACK_S = 5e-4  # times in annotations are rounded


@dataclass(frozen=True, slots=True, eq=False)
class DecodedVideo:
    """What was read of one video; its V views share the crops, n of them, that went to the sink."""

    rows: NDArray[np.int64]  # [V, T], the crop that each view shows at each time
    timestamps_s: NDArray[np.float64]  # [V, T], since the first frame of the file
    indices: NDArray[np.int64]  # [V, T], which frames of the file
    n_source_frames: int  # frames of the whole file
    n_repeated: NDArray[np.int64]  # [V], frames that only repeat another, where the video is too short
    decoder: str  # decord | pyav | torchcodec
    content_sha256: str  # of the file's bytes
    source_bytes: int  # size of the file
    kept: float = 1.0  # share of the promised frames that could be decoded, below 0.95 only where it was salvaged
    views: tuple[int, ...] = (0,)  # their numbers
    seconds: float = 0.0  # that it took

    @classmethod
    def of_one_view(cls, timestamps_s: ArrayLike, decoder: str, content_sha256: str = "") -> Self:
        """A video whose crops [T, …] are its one view, frame by frame: what has features without having been decoded."""
        times = np.asarray(timestamps_s, dtype=np.float64)
        rows, none = np.arange(len(times))[None], np.zeros(1, np.int64)
        return cls(rows, times[None], rows, len(times), none, decoder, content_sha256, source_bytes=0)


class Crops(list[Picture]):
    """A sink that keeps everything."""

    def restart(self) -> None:
        """Forget what came."""
        self.clear()

    def put(self, crop: Picture) -> None:
        """Keep a crop."""
        self.append(crop)


def decode(
    path: str | os.PathLike[str],
    frames: FrameSpec,
    transform: TransformSpec,
    sink: Sink,
    *,
    key: str = "",
    start_s: float | None = None,
    end_s: float | None = None,
    views: Sequence[int] | None = None,
    options: DecodeOptions = WHOLE,
) -> DecodedVideo:
    """Sample, decode and crop one video, or the part of it with start_s ≤ time < end_s.

    Args:
        path: of a file, or a URL, from which a temporary copy is made.
        sink: is given each distinct crop once, in the order of time.
        key: the video's id, on which random frames and crops depend.
        views: numbers of the views wanted; None is all.

    Raises:
        DecodeError: it is no video, it is damaged, or no frame lies in the part asked for.
        SourceError: there is no such file, or it cannot be read now.
    """
    with _at_hand(path) as file:
        return _decode(file, frames, transform, sink, key, start_s, end_s, views, options)


@contextmanager
def _at_hand(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A local file with the bytes of a video; raises DecodeError, or SourceError where they may come back."""
    try:
        with fetched(os.fspath(path)) as file:
            yield file
    except LocationError as error:
        may_come_back = isinstance(error, (MissingError, TransientError))
        raise (SourceError if may_come_back else DecodeError)(str(error)) from error


def _decode(
    path: Path,
    frames: FrameSpec,
    transform: TransformSpec,
    sink: Sink,
    key: str,
    start_s: float | None,
    end_s: float | None,
    views: Sequence[int] | None,
    options: DecodeOptions,
) -> DecodedVideo:
    """Do what `decode` promises with a local file."""
    content_sha256, source_bytes = _digest(path)
    source = inspect(os.path.abspath(path))  # noqa: PTH100 - a name such as `12:30.mp4` is no protocol
    if source.problem and (options.salvage is None or source.kept < options.salvage):
        raise DecodeError(source.problem)

    def choose(timestamps_s: Times) -> Views:
        return _choose(timestamps_s, frames, key, start_s, end_s, views, options)

    picked = DECODERS[frames.decoder](source, choose, cropper(frames, transform, key), sink, options)
    return DecodedVideo(
        rows=picked.views.rows,
        timestamps_s=picked.timestamps_s[picked.views.frames],
        indices=picked.views.frames,
        n_source_frames=len(picked.timestamps_s),
        n_repeated=picked.views.n_repeated,
        decoder=picked.decoder,
        content_sha256=content_sha256,
        source_bytes=source_bytes,
        kept=picked.kept,
        views=tuple(range(frames.n_views) if views is None else views),
    )


def probe(
    path: str | os.PathLike[str],
    frames: FrameSpec,
    transform: TransformSpec,
    sink: Sink,
    *,
    key: str = "",
    start_s: float | None = None,
    end_s: float | None = None,
    views: Sequence[int] | None = None,
    options: DecodeOptions = WHOLE,
) -> DecodedVideo:
    """What `decode` would give if the file's header tells the truth; no picture is seen and nothing goes to the sink.

    Raises:
        DecodeError: it is no video, its header does not say how long it is, or no frame lies in the part asked for.
        SourceError: there is no such file.
    """
    if not Path(path).is_file():  # to open a pipe is to wait for its writer
        raise SourceError("no such file")
    n_frames, rate_fps = promise(os.path.abspath(path))  # noqa: PTH100 - as in `decode`
    timestamps_s = np.arange(n_frames) / rate_fps
    chosen = _choose(timestamps_s, frames, key, start_s, end_s, views, options)
    return DecodedVideo(
        rows=np.full_like(chosen.frames, -1),  # no crops
        timestamps_s=timestamps_s[chosen.frames],
        indices=chosen.frames,
        n_source_frames=n_frames,
        n_repeated=chosen.n_repeated,
        decoder="header",
        content_sha256="",
        source_bytes=0,
        views=tuple(range(frames.n_views) if views is None else views),
    )


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[NDArray[np.uint8]],
    fps: float,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: Mapping[str, str] | None = None,
) -> None:
    """Write frames uint8 [T, H, W, 3] as a video file, whole or not at all; the ending of `path` names the container.

    Args:
        options: of the codec, such as `{"crf": "18", "g": "250"}`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    rate = Fraction(fps).limit_denominator(65535)
    try:
        with av.open(str(unfinished), "w") as container:
            stream = container.add_stream(codec, rate=rate, options=dict(options or {}))
            assert isinstance(stream, av.VideoStream)
            stream.pix_fmt = pix_fmt
            stream.thread_count = 1  # the bytes must not depend on the machine's cores
            for number, rgb in enumerate(frames):
                if number == 0:
                    stream.height, stream.width = rgb.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")))
            container.mux(stream.encode())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def decoder_versions() -> dict[str, str]:
    """The releases of PyAV's FFmpeg and of its libraries."""
    libraries = {name: ".".join(map(str, number)) for name, number in av.library_versions.items()}
    return {"FFmpeg": av.ffmpeg_version_info, **libraries}


def _part(timestamps_s: Times, start_s: float | None, end_s: float | None) -> tuple[int, int]:
    """First and last + 1 of the frames with start_s ≤ time < end_s; raises DecodeError where there are none."""
    first = 0 if start_s is None else int(np.searchsorted(timestamps_s, start_s - _SLACK_S))
    stop = len(timestamps_s) if end_s is None else int(np.searchsorted(timestamps_s, end_s - _SLACK_S))
    if stop <= first:
        raise DecodeError(
            f"no frames in the segment: {start_s} to {end_s} s, but the last is at {timestamps_s[-1]:.2f} s"
        )
    return first, stop


def _choose(
    timestamps_s: Times,
    frames: FrameSpec,
    key: str,
    start_s: float | None,
    end_s: float | None,
    views: Sequence[int] | None,
    options: DecodeOptions,
) -> Views:
    """Sample the part of a video that is asked for; raises DecodeError where it is empty or too long."""
    first, stop = _part(timestamps_s, start_s, end_s)
    chosen = sample(timestamps_s[first:stop], frames, key, views)
    if chosen.frames.shape[1] > (options.max_frames or math.inf):
        raise DecodeError(f"too long: {chosen.frames.shape[1]} frames, at most {options.max_frames} are taken")
    return Views(first + chosen.frames, chosen.crops)


def _digest(path: str | os.PathLike[str]) -> tuple[str, int]:
    """SHA-256 of a file's bytes, and their number; raises DecodeError where there are none."""
    digest = ""
    try:
        status = Path(path).stat()
        if is_regular := stat.S_ISREG(status.st_mode):  # to open a pipe is to wait for its writer
            with Path(path).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise SourceError("file is missing") from None
    except OSError as error:
        raise SourceError(f"file cannot be read: {error.strerror}") from error
    if not is_regular:
        raise DecodeError("not a regular file")
    if status.st_size == 0:
        raise DecodeError("empty file")
    return digest, status.st_size
