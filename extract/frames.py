"""One video → the frames that a tower sees. The only file that imports decord and av; it never imports torch.

Two back ends. PyAV reads a file from end to end and gave every frame asked for, of every kind of file tried.
decord 0.6.0 seeks, and gives the same bits where it lands, but lands well only where each key frame of an H.264 stream
is an IDR picture and the container keeps times (mp4, mov, mkv): 3,464 frames of real files, none wrong. Elsewhere:

    open GOPs      x264 open-gop or intra-refresh, x265's default, MPEG-4 and MPEG-2 with B-frames: 2 to 20 frames off
    AVI, TS        every sparse batch wrong with B-frames; packed MPEG-4 counted one frame too long; no times
    edit lists     frames that the list cuts are shown, and the last one is repeated in their stead (18 of 74)
    odd heights    colours of the last row smear; 10 bits: colours are shifted by half a pixel
    AV1            cannot be opened; VP8, VP9: seeks went astray in long files (decord #91)
    damage         an undecodable frame is silently replaced by a neighbour (decord PR #119)

So `auto` asks decord only where it is exact, holds its index to the times of the file's packets, and gives the video to
PyAV when it refuses or shows one picture twice.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import ArrayLike, NDArray

from ..data_manifests.errors import ColdframeError
from ..data_manifests.locations import LocationError, MissingError, TransientError, fetched
from .crops import Crop, Picture, cropper
from .sampling import Times, Views, sample
from .specs import FrameSpec, TransformSpec

_KEPT = (
    0.95  # a file with a smaller share of its promised frames is damaged: refused or salvaged, not quietly shortened
)
# PyAV 19 took the option away.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
_SLACK_S = 5e-4  # times in annotations are rounded
_BATCH_BYTES = 256 << 20  # full-size pictures that decord may hold at once
_LARGEST = 1 << 27  # pixels of a picture; more is a decompression bomb, not a video
_TIMED_BY_HEADER = {"matroska,webm", "flv"}  # containers that promise a duration, not a count
_DECORD_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_IDR = 5  # type of an H.264 NAL unit: a picture that nothing after it looks back across


class DecodeError(ColdframeError, OSError):
    """One video cannot be decoded; the text is the reason, as `category: detail`."""

    @property
    def reason(self) -> str:
        """What goes into the record of the video."""
        return str(self)


class SourceError(DecodeError):
    """A file cannot be had at present: it, or the disk it is on, may come back."""


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


class Sink(Protocol):
    """Where crops go as they are decoded, so that no video is ever in memory whole."""

    def restart(self) -> None:
        """Forget what came: the video begins again."""
        ...

    def put(self, crop: Picture) -> None:
        """Take the next crop [3, S, S]; it is not changed afterwards."""
        ...


class Crops(list[Picture]):
    """A sink that keeps everything."""

    def restart(self) -> None:
        """Forget what came."""
        self.clear()

    def put(self, crop: Picture) -> None:
        """Keep a crop."""
        self.append(crop)


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """What decides whether a video is taken, and never what its numbers are."""

    salvage: float | None = None  # smallest share of the promised frames that will do; None: only whole videos
    max_frames: int | None = None  # a view of more frames is refused


WHOLE = DecodeOptions()


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
    source = _inspect(os.path.abspath(path))  # noqa: PTH100 - a name such as `12:30.mp4` is no protocol
    if source.problem and (options.salvage is None or source.kept < options.salvage):
        raise DecodeError(source.problem)

    def choose(timestamps_s: Times) -> Views:
        return _choose(timestamps_s, frames, key, start_s, end_s, views, options)

    picked = _DECODERS[frames.decoder](source, choose, cropper(frames, transform, key), sink, options)
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
    try:
        with av.open(os.path.abspath(path), **_LENIENT) as container:  # noqa: PTH100 - as in `decode`
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream):
                raise DecodeError("no video stream")
            rate_fps = float(stream.average_rate or stream.guessed_rate or 25)
            n_frames = stream.frames or round((container.duration or 0) / av.time_base * rate_fps)
    except (av.FFmpegError, ValueError) as error:
        raise DecodeError("not a video") from error
    if n_frames < 1:
        raise DecodeError("its header does not say how long it is")
    timestamps_s = np.arange(n_frames) / rate_fps
    chosen = _choose(timestamps_s, frames, key, start_s, end_s, views, options)
    return DecodedVideo(
        rows=chosen.rows,
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


class Picked(NamedTuple):
    """What a decoder hands back, besides the crops."""

    timestamps_s: Times
    views: Views
    decoder: str
    kept: float = 1.0


Choose = Callable[[Times], Views]


class Decoder(Protocol):
    """A back end; pictures are cropped one by one, so that it never holds a video in full size."""

    def __call__(self, source: Source, choose: Choose, crop: Crop, sink: Sink, options: DecodeOptions) -> Picked:
        """Decode the shots of the views that `choose` takes from the times of all frames; raises DecodeError."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """What a file's header and packets say; no picture is decoded for it."""

    path: str
    stream: int  # among the video streams
    timestamps_s: Times  # of the frames that the packets promise
    rate_fps: float
    height: int
    width: int
    decord_flaw: str  # why decord would go astray; empty where it is exact
    problem: str  # why the file is not whole; empty where it is
    kept: float  # the share of it that is there


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


def _by_the_better(source: Source, choose: Choose, crop: Crop, sink: Sink, options: DecodeOptions) -> Picked:
    """Ask decord where it is exact, and PyAV where it is not, refuses, shows one picture twice, or must read it all."""
    if not source.decord_flaw:
        with suppress(_NotByDecord):
            return _by_decord(source, choose, crop, sink, options, is_free_to_choose=True)
        sink.restart()
    return _by_pyav(source, choose, crop, sink, options)


class _NotByDecord(DecodeError):
    """decord cannot, or should not, read this file."""


def _by_decord(
    source: Source, choose: Choose, crop: Crop, sink: Sink, options: DecodeOptions, is_free_to_choose: bool = False
) -> Picked:
    """Seek to the frames by decord; raise DecodeError where they might be others than those asked for."""
    if source.decord_flaw:
        raise _NotByDecord(f"decord is not exact {source.decord_flaw}: use the decoder auto or pyav")
    views = choose(source.timestamps_s)
    crops_of = _crops_of(views)
    wanted = np.array(sorted(crops_of))
    n_batches = -(-len(wanted) * 3 * source.height * source.width // _BATCH_BYTES)
    if is_free_to_choose and n_batches > 1 and len(wanted) > len(source.timestamps_s) // 4:
        raise _NotByDecord("reading from end to end is faster")
    try:
        import decord  # here, since it breaks a later import of torch in the same process (decord #293)
    except (ImportError, OSError, RuntimeError) as error:
        raise _NotByDecord("decord is not installed: there is no wheel for this machine") from error
    decord.logging.set_level(decord.logging.QUIET)

    last: Picture | None = None
    try:
        for batch in np.array_split(wanted, n_batches):
            # Open, one ascending batch, drop: an idle reader goes on decoding into memory (decord #157).
            reader = decord.VideoReader(source.path, num_threads=1)
            _trust(reader, source)
            pictures = reader.get_batch(batch).asnumpy()  # [t, H, W, 3]
            del reader
            for number, rgb in zip(batch.tolist(), pictures, strict=True):
                if is_free_to_choose and last is not None and np.array_equal(last, rgb):
                    raise _NotByDecord("decord shows one picture twice")
                for crop_number in crops_of[number]:
                    sink.put(crop(rgb, crop_number))
                last = rgb
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        reason = str(error).rpartition(".cc:")[2].partition("\n")[0]
        raise _NotByDecord(f"decord gave up: {reason[:200]}") from error
    return Picked(source.timestamps_s, views, "decord", source.kept)


def _trust(reader: Any, source: Source) -> None:
    """Raise DecodeError unless decord's index is that of the packets; it believes containers that lie."""
    if len(reader) != len(source.timestamps_s):
        raise _NotByDecord(f"decord miscounts: {len(reader)} frames where the packets hold {len(source.timestamps_s)}")
    times = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0].astype(np.float64)
    if reader.get_key_indices()[0] != 0 or np.abs(times - times[0] - source.timestamps_s).max() > 2e-3:  # float32
        raise _NotByDecord("decord misplaces frames: its times are not those of the packets")


def _by_pyav(source: Source, choose: Choose, crop: Crop, sink: Sink, options: DecodeOptions) -> Picked:
    """Decode from end to end by PyAV; a second time where the packets promised other frames than came."""
    timestamps_s = source.timestamps_s
    views = choose(timestamps_s)
    seen = _read_through(source, views, crop, sink)
    kept = source.kept * len(seen) / len(timestamps_s)
    if len(seen) < _KEPT * len(timestamps_s) and (options.salvage is None or kept < options.salvage or not seen):
        problem = f"corrupt: {len(seen)} of {len(timestamps_s)} frames could be decoded"
        raise DecodeError(problem if seen else "no frames could be decoded")
    if len(seen) != len(timestamps_s):
        timestamps_s = _clock(seen, source.rate_fps)
        views = choose(timestamps_s)
        sink.restart()
        _read_through(source, views, crop, sink)
    return Picked(timestamps_s, views, "pyav", min(kept, 1.0))


_DECODERS: Mapping[str, Decoder] = {"auto": _by_the_better, "decord": _by_decord, "pyav": _by_pyav}


def _read_through(source: Source, views: Views, crop: Crop, sink: Sink) -> list[float]:
    """Decode every frame, pass the crops of some on; gives the time of each frame."""
    crops_of = _crops_of(views)
    seen: list[float] = []
    with av.open(source.path, **_LENIENT) as container:
        stream = container.streams.video[source.stream]
        stream.codec_context.thread_count = 1  # parallel over videos, not within one
        for packet in _packets(container.demux(stream)):
            with suppress(av.FFmpegError):  # an undecodable packet gives no frame: the count tells
                for frame in packet.decode():
                    if len(seen) in crops_of:
                        rgb = frame.to_ndarray(format="rgb24", threads=1)  # 5 × faster than its pool for one picture
                        rgb = np.rot90(rgb, round(frame.rotation / 90))  # the display matrix, as decord
                        for crop_number in crops_of[len(seen)]:
                            sink.put(crop(rgb, crop_number))
                    seen.append(frame.time)
    return seen


def _crops_of(views: Views) -> Mapping[int, list[int]]:
    """The crops wanted of each wanted frame."""
    crops: dict[int, list[int]] = defaultdict(list)
    for frame, crop in views.shots:
        crops[frame].append(crop)
    return dict(crops)


def _inspect(path: str) -> Source:
    """Read a file's header and packets; raise DecodeError for what is no video at all."""
    try:
        container = av.open(path, **_LENIENT)
    except (av.FFmpegError, ValueError) as error:
        with Path(path).open("rb") as file:
            is_mp4 = file.read(8)[4:] == b"ftyp"  # the index of an mp4 is usually at its end
        raise DecodeError("truncated: the index is missing" if is_mp4 else "not a video") from error
    with container:
        if container.format.name == "tty":
            raise DecodeError("not a video: FFmpeg would draw the text")
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream) or stream.disposition & Disposition.attached_pic:
            raise DecodeError("no video stream")

        codec = stream.codec_context
        n_packets, end_s, gops_are_closed = 0, 0.0, True
        shown: list[float] = []
        for packet in _packets(container.demux()):
            if packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index or not packet.size:
                continue
            n_packets += 1
            if packet.is_keyframe and codec.name == "h264":
                gops_are_closed &= _is_idr(bytes(packet), codec.extradata)
            # An edit list discards packets; one byte is DivX's placeholder for a picture in the packet before.
            if not packet.is_discard and not (codec.name == "mpeg4" and packet.size == 1):
                shown.append(math.nan if packet.pts is None else float(packet.pts * packet.time_base))

        if not shown:
            raise DecodeError("no frames could be decoded")
        if codec.height * codec.width > _LARGEST:
            raise DecodeError(f"too large: pictures of {codec.width} x {codec.height} pixels")
        kept, problem = min(n_packets / max(stream.frames, 1), 1.0), ""
        if kept < _KEPT:
            problem = f"truncated: {n_packets} of {stream.frames} frames"
        promised_s = (container.duration or 0) / av.time_base if container.format.name in _TIMED_BY_HEADER else 0
        if end_s < _KEPT * promised_s:
            kept, problem = end_s / promised_s, f"truncated: {end_s:.1f} of {promised_s:.1f} seconds"
        rate_fps = float(stream.average_rate or stream.guessed_rate or 25)
        flaws = {
            f"with {container.format.name} files": container.format.name not in _DECORD_CONTAINERS,
            f"with {codec.name}": codec.name != "h264",
            f"with {codec.pix_fmt}": codec.pix_fmt not in ("yuv420p", "yuvj420p"),
            "at an odd height": codec.height % 2 == 1,
            "with open GOPs": not gops_are_closed,
            "with damaged files": bool(problem),
        }
        return Source(
            path=path,
            stream=container.streams.video.index(stream),
            timestamps_s=_clock(np.sort(shown), rate_fps),
            rate_fps=rate_fps,
            height=codec.height,
            width=codec.width,
            decord_flaw=next((flaw for flaw, holds in flaws.items() if holds), ""),
            problem=problem,
            kept=kept,
        )


def _is_idr(packet: bytes, extradata: bytes | None) -> bool:
    """Whether an H.264 packet of an mp4 or mkv holds an IDR picture: nothing after it needs what came before."""
    if not extradata or extradata[0] != 1:
        return False  # start codes instead of lengths
    width, at = (extradata[4] & 3) + 1, 0
    while at + width < len(packet):
        if packet[at + width] & 31 == _IDR:
            return True
        at += width + int.from_bytes(packet[at : at + width], "big")
    return False


def _packets(packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
    """Packets up to the first unreadable one; the count tells how many are missing."""
    with suppress(av.FFmpegError):
        yield from packets


def _clock(times: ArrayLike, rate_fps: float) -> Times:
    """Times since the first frame; counted by the frame rate where the container's are missing or out of order."""
    clock = np.asarray(times, dtype=np.float64)  # None becomes NaN
    if np.isfinite(clock).all() and (np.diff(clock) > 0).all():
        return clock - clock[:1]
    return np.arange(len(clock)) / rate_fps


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
