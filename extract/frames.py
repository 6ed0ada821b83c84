"""One video → the frames that a tower sees. The only file that imports decord, torchcodec and av; the last alone at once.

Three back ends. PyAV reads a file from end to end and gave every frame asked for, of every kind of file tried.
decord 0.6.0 seeks, and gives the same bits where it lands, but lands well only where each key frame of an H.264 stream
is an IDR picture and the container keeps times (mp4, mov, mkv): 3,464 frames of real files, none wrong. Elsewhere:

    open GOPs      x264 open-gop or intra-refresh, x265's default, MPEG-4 and MPEG-2 with B-frames: 2 to 20 frames off
    AVI, TS        every sparse batch wrong with B-frames; packed MPEG-4 counted one frame too long; no times
    edit lists     frames that the list cuts are shown, and the last one is repeated in their stead (18 of 74)
    odd heights    colours of the last row smear; 10 bits: colours are shifted by half a pixel
    AV1            cannot be opened; VP8, VP9: seeks went astray in long files (decord #91)
    damage         an undecodable frame is silently replaced by a neighbour (decord PR #119)

So `auto` asks decord only where it is exact, holds its index to the times of the file's packets, and gives the video to
PyAV when it refuses, complains or shows one picture twice. torchcodec is asked by name alone, and held to the same; so is
decord2, which goes by decord's import name, refuses some widths, and beside PyAV does not tell of damage.

Damage. FFmpeg conceals it: a picture made of its neighbours looks sound. Most of it is told by what FFmpeg writes to its
log, by flags of pictures and packets, and by errors, of which 453 sound files raised none. A picture is taken to be
damaged from the first sign on, up to the next key frame that needs nothing before it; it counts as missing, and keeps its
number. No sign is given where any bits are a picture (the payload of VP8, of HEVC without hashes, mostly of MJPEG).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import stat
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import av
import av.logging
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
_STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}  # a decoder may fail, and check what sums there are
_TIMED_BY_HEADER = {"matroska,webm", "flv"}  # containers that promise a duration, not a count
_DECORD_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_UNTIMED = {"avi", "mpeg"}  # containers that do not time each packet: a lost one moves others
_REORDERED = 17  # pictures at most that are stored otherwise than shown
_AVI_HEADERS = 32  # bytes at most between two packets
_FFMPEG = re.compile(r"\[[^]]+ @ 0x[0-9a-f]+\]")
_HARMLESS = re.compile("libdav1d [0-9.]+$|deprecated pixel format used")
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
    decoder: str  # decord | decord2 | pyav | torchcodec
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


class Picked(NamedTuple):
    """What a decoder hands back, besides the crops."""

    timestamps_s: Times
    views: Views
    decoder: str
    kept: float = 1.0


Choose = Callable[[Times], Views]
_Log = list[tuple[int, str, str]]  # of FFmpeg: level, component, text


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
    """decord cannot, or should not, read this file: `auto` gives it to PyAV."""


def _by_decord(
    source: Source, choose: Choose, crop: Crop, sink: Sink, options: DecodeOptions, is_free_to_choose: bool = False
) -> Picked:
    """Seek to the frames by decord; raise DecodeError where they might be others than those asked for."""
    if source.decord_flaw:
        raise _NotByDecord(f"decord is not exact {source.decord_flaw}: use the decoder auto or pyav")
    views = choose(source.timestamps_s)
    crops_of = _crops_of(views)
    batches = _batches(source, crops_of)
    if is_free_to_choose and len(batches) > 1 and len(crops_of) > len(source.timestamps_s) // 4:
        raise _NotByDecord("reading from end to end is faster")
    try:
        import decord  # here, since it breaks a later import of torch in the same process (decord #293)
    except (ImportError, OSError, RuntimeError) as error:
        raise _NotByDecord("decord is not installed: there is no wheel for this machine") from error
    name = _distribution_of_decord()
    if is_free_to_choose and name != "decord":
        raise _NotByDecord(f"{name} does not tell of damage")  # beside PyAV its log goes nowhere
    decord.logging.set_level(decord.logging.INFO)

    last: Picture | None = None
    try:
        for batch in batches:
            with _noise() as noise:
                # Open, one ascending batch, drop: an idle reader goes on decoding into memory (decord #157).
                reader = decord.VideoReader(source.path, num_threads=1)
                _trust(reader, source)
                pictures = reader.get_batch(batch).asnumpy()  # [t, H, W, 3]
                del reader
            if noise:
                raise _NotByDecord(f"corrupt: {noise[0]}")
            for number, rgb in zip(batch.tolist(), pictures, strict=True):
                if is_free_to_choose and last is not None and np.array_equal(last, rgb):
                    raise _NotByDecord("decord shows one picture twice")
                for crop_number in crops_of[number]:
                    sink.put(crop(rgb, crop_number))
                last = rgb
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        reason = str(error).rpartition(".cc:")[2].partition("\n")[0]
        raise _NotByDecord(f"decord gave up: {reason[:200]}") from error
    return Picked(source.timestamps_s, views, name, source.kept)


def _trust(reader: Any, source: Source) -> None:
    """Raise DecodeError unless decord's index is that of the packets; it believes containers that lie."""
    if len(reader) != len(source.timestamps_s):
        raise _NotByDecord(f"decord miscounts: {len(reader)} frames where the packets hold {len(source.timestamps_s)}")
    times = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0].astype(np.float64)
    if reader.get_key_indices()[0] != 0 or np.abs(times - times[0] - source.timestamps_s).max() > 2e-3:  # float32
        raise _NotByDecord("decord misplaces frames: its times are not those of the packets")


def _distribution_of_decord() -> str:
    """decord2 goes by the same import name."""
    for name in ("decord", "decord2"):
        with suppress(PackageNotFoundError):
            return version(name) and name
    return "decord"


def _by_torchcodec(source: Source, choose: Choose, crop: Crop, sink: Sink, options: DecodeOptions) -> Picked:
    """Seek to the frames by torchcodec; raise DecodeError where they might be others than those asked for."""
    if source.seek_flaw:
        raise DecodeError(f"torchcodec is not exact {source.seek_flaw}: use the decoder auto or pyav")
    views = choose(source.timestamps_s)
    crops_of = _crops_of(views)
    os.environ["TORCHCODEC_FFMPEG_LOG_LEVEL"] = "INFO"  # damage is told there alone
    try:
        from torchcodec.decoders import VideoDecoder  # here, since it imports torch

        with _noise() as noise:
            reader = VideoDecoder(
                source.path, stream_index=source.index, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
            )
        n_frames, begin_s = reader.metadata.num_frames, reader.metadata.begin_stream_seconds_from_content or 0.0
        if n_frames != len(source.timestamps_s):
            raise DecodeError(
                f"torchcodec miscounts: {n_frames} frames where the packets hold {len(source.timestamps_s)}"
            )
        for batch in _batches(source, crops_of):
            with _noise() as more:
                pictures = reader.get_frames_at(batch.tolist())  # [t, H, W, 3]
            if noise := noise + more:
                raise DecodeError(f"corrupt: {noise[0]}")
            times = pictures.pts_seconds.numpy() - float(begin_s)
            if np.abs(times - source.timestamps_s[batch]).max() > 1e-6:
                raise DecodeError("torchcodec misplaces frames: its times are not those of the packets")
            for number, rgb in zip(batch.tolist(), pictures.data.numpy(), strict=True):
                for crop_number in crops_of[number]:
                    sink.put(crop(rgb, crop_number))
    except ModuleNotFoundError as error:
        raise DecodeError("torchcodec is not installed: install it, or use the decoder auto") from error
    except (ImportError, RuntimeError, IndexError, ValueError) as error:
        if "Could not load libtorchcodec" in str(error):
            reason = "finds no FFmpeg that fits: install FFmpeg's shared libraries, or use the decoder auto"
        else:
            reason = f"gave up: {str(error).strip().partition(chr(10))[0][-200:]}"
        raise DecodeError(f"torchcodec {reason}") from error
    return Picked(source.timestamps_s, views, "torchcodec", source.kept)


def _batches(source: Source, crops_of: Mapping[int, list[int]]) -> list[NDArray[np.int64]]:
    """The wanted frames, ascending, in parts that fit in memory."""
    wanted = np.array(sorted(crops_of))
    return np.array_split(wanted, -(-len(wanted) * 3 * source.height * source.width // _BATCH_BYTES))


@contextmanager
def _noise() -> Iterator[list[str]]:
    """Gather what FFmpeg writes to the standard error, where decord and torchcodec tell of damage, and nowhere else."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            said = file.read(1 << 16).decode(errors="replace").splitlines()
            lines += [_message(line) for line in said if _FFMPEG.match(line) and not _HARMLESS.search(line)]


def _message(text: str) -> str:
    """A line of FFmpeg's log, without addresses: equal files have equal reasons."""
    return re.sub(r" @ 0x[0-9a-f]+", "", text).strip()[:120]


def _by_pyav(source: Source, choose: Choose, crop: Crop, sink: Sink, options: DecodeOptions) -> Picked:
    """Decode from end to end by PyAV; again where the frames wanted are damaged, or the packets promised others."""
    views = choose(source.timestamps_s)
    try:
        seen = _read_through(source, views, crop, sink)
    except _TimesLie:
        source = replace(source, ticks=None)
        sink.restart()
        seen = _read_through(source, views, crop, sink)

    n_promised = len(source.timestamps_s)
    kept = min(source.kept * len(seen.numbers) / n_promised, 1.0)
    is_short = len(seen.numbers) < _KEPT * n_promised or (seen.damage and source.has_gaps)
    if not seen.numbers or (is_short and (options.salvage is None or kept < options.salvage)):
        sign = f": {seen.damage}" if seen.damage else ""
        problem = f"corrupt: {len(seen.numbers)} of {n_promised} frames could be decoded{sign}"
        raise DecodeError(problem if seen.numbers else "no frames could be decoded")

    there = np.array(seen.numbers)
    if not seen.damage and len(there) != n_promised:  # the packets promised too much or too little
        source = replace(source, ticks=None, timestamps_s=_clock(seen.times_s, source.rate_fps))
        views = choose(source.timestamps_s)
    elif not np.isin(views.frames, there).all():
        chosen = choose(source.timestamps_s[there])
        views = Views(there[chosen.frames], chosen.crops)
    else:
        return Picked(source.timestamps_s, views, "pyav", kept)
    sink.restart()
    again = _read_through(source, views, crop, sink)
    assert np.isin(views.frames, again.numbers).all()
    return Picked(source.timestamps_s, views, "pyav", kept)


_DECODERS: Mapping[str, Decoder] = {
    "auto": _by_the_better,
    "decord": _by_decord,
    "pyav": _by_pyav,
    "torchcodec": _by_torchcodec,
}


class Seen(NamedTuple):
    """The sound frames of a file."""

    numbers: list[int]  # ascending
    times_s: list[float]
    damage: str  # the first sign of it; empty where all is sound


class _TimesLie(Exception):
    """Pictures come in another order than that of the times of their packets."""


def _read_through(source: Source, views: Views, crop: Crop, sink: Sink) -> Seen:
    """Decode every frame, pass the crops of some on.

    A frame is known by its time, so that a lost one moves no other; where times are no help, by how many came before,
    and nothing is believed after the first sign of damage.

    Raises:
        _TimesLie: the frames must be counted.
    """
    crops_of = _crops_of(views)
    number_of = None if source.ticks is None else {tick: number for number, tick in enumerate(source.ticks.tolist())}
    last_tick = math.inf if source.ticks is None else int(source.ticks[-1])
    numbers: list[int] = []
    times_s: list[float] = []
    first_sound = -math.inf
    doubtful: set[int | None] = set()  # times of pictures that are damaged, or look at one that is
    with _complaints() as complaints, av.open(source.path, **_LENIENT) as container:
        stream = container.streams.video[source.stream]
        codec, tick_s = _codec(stream), stream.time_base or Fraction(1)
        codec.thread_count = 1  # parallel over videos, not within one
        codec.options = _STRICT
        damage = _sign(complaints, container.format.name)  # opening reads ahead; what it decodes is decoded again
        is_damaged = bool(damage)
        for packet in _packets(container.demux(stream)):
            sign = _sign(complaints)
            if source.hole_at is not None and packet.pos is not None and packet.pos >= source.hole_at:
                sign = "packets are missing"
            if sign and packet.size:  # what is said after the last packet is of no part of the video
                damage, is_damaged = damage or sign, True
            if is_damaged and number_of is not None and packet.pts is not None and _begins_anew(packet, codec):
                is_damaged, first_sound = False, packet.pts
            frames, sign = _decoded(packet, codec, complaints)
            damage, is_damaged = damage or sign, is_damaged or bool(sign)
            if is_damaged and number_of is None:
                break
            if is_damaged or (packet.pts is not None and packet.pts < first_sound):
                doubtful.add(packet.pts)
            for frame in frames:
                if frame.is_corrupt or frame.pts in doubtful:
                    continue
                number = len(numbers) if number_of is None else number_of.get(frame.pts, -1)
                if number < 0 and (damage or (frame.pts or 0) > last_tick):
                    continue
                if number <= (numbers[-1] if numbers else -1):
                    raise _TimesLie
                if number in crops_of:
                    rgb: Any = frame.to_ndarray(format="rgb24", threads=1)  # 5 × faster than its pool for one picture
                    turns = round((frame.rotation or source.rotation) / 90)  # the display matrix, as decord
                    rgb = np.rot90(rgb, turns)
                    for crop_number in crops_of[number]:
                        sink.put(crop(rgb, crop_number))
                numbers.append(number)
                times_s.append(math.nan if frame.pts is None else float(frame.pts * tick_s))
    return Seen(numbers, times_s, damage)


def _codec(stream: av.VideoStream) -> Any:
    """The decoder of a stream: of VP9 libvpx, since FFmpeg's own never knows that what it reads is no picture."""
    codec = stream.codec_context
    if codec.name == "vp9" and codec.pix_fmt == "yuv420p":
        with suppress(ValueError):  # this PyAV was built without
            checking = av.VideoCodecContext.create("libvpx-vp9", "r")
            checking.extradata = codec.extradata
            return checking
    return codec


def _decoded(packet: av.Packet, codec: Any, complaints: _Log) -> tuple[list[av.VideoFrame], str]:
    """The frames that come with a packet, and a sign of damage, or nothing."""
    frames: list[av.VideoFrame] = []
    error = ""
    try:
        frames = codec.decode(packet)
    except av.FFmpegError as raised:
        error = str(raised.strerror)
    is_marked = packet.is_corrupt or any(frame.is_corrupt for frame in frames)
    return frames, _sign(complaints) or error or ("a picture is marked as corrupt" if is_marked else "")


def _begins_anew(packet: av.Packet, codec: av.VideoCodecContext) -> bool:
    """Whether no picture that is shown from this packet on looks at one before it."""
    return packet.is_keyframe and (codec.name != "h264" or _is_intra(bytes(packet), codec.extradata))


def _crops_of(views: Views) -> Mapping[int, list[int]]:
    """The crops wanted of each wanted frame."""
    crops: dict[int, list[int]] = defaultdict(list)
    for frame, crop in views.shots:
        crops[frame].append(crop)
    return dict(crops)


def _inspect(path: str) -> Source:
    """Read a file's header and packets; raise DecodeError for what is no video at all."""
    try:
        with _complaints() as complaints:
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
        if not stream.codec_context:  # typed otherwise
            raise DecodeError("no decoder for this kind of video")

        codec = stream.codec_context
        rate_fps = float(stream.average_rate or stream.guessed_rate or 25)
        n_packets, end_s, lost_s, gops_are_closed = 0, 0.0, 0.0, True
        hole = _sign(complaints, container.format.name)  # opening reads ahead
        shown: list[int | None] = []
        spans: list[tuple[int, int]] = []  # bytes of each packet of an untimed container
        with _complaints() as complaints:
            for packet in _packets(container.demux()):
                if packet.pts is not None:
                    end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if container.format.name == "avi" and packet.pos is not None:
                    spans.append((packet.pos, packet.pos + packet.size))
                if packet.stream.index != stream.index or not packet.size:
                    continue
                n_packets += 1
                if packet.is_keyframe and codec.name == "h264":
                    gops_are_closed &= _is_idr(bytes(packet), codec.extradata)
                if sign := _sign(complaints, container.format.name):
                    hole = hole or sign
                    if shown and shown[-1] is not None and packet.pts is not None:
                        lost_s += max(float((packet.pts - shown[-1]) * packet.time_base) - 1 / rate_fps, 0.0)
                if not packet.is_discard and not _is_hidden(packet, codec):  # an edit list discards packets
                    shown.append(packet.pts)

        if not shown:
            raise DecodeError("no frames could be decoded")
        if codec.height * codec.width > _LARGEST:
            raise DecodeError(f"too large: pictures of {codec.width} x {codec.height} pixels")
        kept, problem = min(n_packets / max(stream.frames, 1), 1.0), ""
        if kept < _KEPT or (kept < 1 and container.format.name in _UNTIMED):
            problem = f"truncated: {n_packets} of {stream.frames} frames"
        promised_s = (container.duration or 0) / av.time_base if container.format.name in _TIMED_BY_HEADER else 0
        if end_s < _KEPT * promised_s:
            kept, problem = end_s / promised_s, f"truncated: {end_s:.1f} of {promised_s:.1f} seconds"
        if hole:
            kept, problem = kept * (1 - min(lost_s / max(end_s, lost_s, 1e-9), 1.0)), problem or f"corrupt: {hole}"

        spans.sort()
        holes = [begin for (begin, end), (next_, _) in itertools.pairwise(spans) if next_ - end > _AVI_HEADERS]
        rotation = 0
        if codec.name == "vp9":  # libvpx does not hand it on
            with suppress(av.FFmpegError, StopIteration), av.open(path, **_LENIENT) as again:
                rotation = next(again.decode(again.streams.video[container.streams.video.index(stream)])).rotation
        ticks = None if None in shown else np.sort(np.array(shown, np.int64))
        has_times = ticks is not None and container.format.name not in _UNTIMED and bool((np.diff(ticks) > 0).all())
        if ticks is not None and (stream.frames > n_packets or promised_s > end_s + 1 / rate_fps):
            ticks = _without_stragglers(ticks, 1.5 / rate_fps / float(stream.time_base or 1))
        times_s = [math.nan] * len(shown) if ticks is None else ticks * float(stream.time_base or 1)
        timestamps_s = _clock(times_s, rate_fps)
        decord_flaws = {
            f"with {container.format.name} files": container.format.name not in _DECORD_CONTAINERS,
            f"with {codec.name}": codec.name != "h264",
            f"with {codec.pix_fmt}": codec.pix_fmt not in ("yuv420p", "yuvj420p"),
            "at an odd height": codec.height % 2 == 1,
            "with open GOPs": not gops_are_closed,
            "with start codes": (codec.extradata or b" ")[0] != 1,
            "with damaged files": bool(problem),
        }
        seek_flaws = {
            f"with {container.format.name} files": not has_times or container.format.name not in _DECORD_CONTAINERS,
            "with open GOPs": not gops_are_closed,
            "with damaged files": bool(problem),
        }
        return Source(
            path=path,
            stream=container.streams.video.index(stream),
            index=stream.index,
            timestamps_s=timestamps_s,
            ticks=ticks if has_times else None,
            has_gaps=n_packets != stream.frames and bool((np.diff(timestamps_s) * rate_fps > 1.5).any()),
            rate_fps=rate_fps,
            height=codec.height,
            width=codec.width,
            rotation=rotation,
            decord_flaw=next((flaw for flaw, holds in decord_flaws.items() if holds), ""),
            seek_flaw=next((flaw for flaw, holds in seek_flaws.items() if holds), ""),
            problem=problem,
            hole_at=holes[0] if holes and kept < 1 else None,
            kept=kept,
        )


def _without_stragglers(ticks: NDArray[np.int64], step: float) -> NDArray[np.int64]:
    """Cut the last pictures of a file that ends too early where those between are missing: they are stored out of order."""
    gaps = np.flatnonzero(np.diff(ticks[-_REORDERED:]) > step)
    return ticks[: len(ticks) - min(len(ticks), _REORDERED) + gaps[0] + 1] if len(gaps) else ticks


def _is_idr(packet: bytes, extradata: bytes | None) -> bool:
    """Whether an H.264 packet holds an IDR picture: nothing after it needs what came before."""
    return any(packet[at] & 31 == _IDR for at in _nal_units(packet, extradata))


def _is_intra(packet: bytes, extradata: bytes | None) -> bool:
    """Whether an H.264 packet holds I slices alone: a key frame so made needs nothing before it."""
    types: list[int] = []
    for at in _nal_units(packet, extradata):
        if packet[at] & 31 in (1, _IDR):
            bits = "".join(f"{byte:08b}" for byte in packet[at + 1 : at + 9]) + "1"
            bits = bits[2 * bits.index("1") + 1 :] + "1"  # past the number of the first macroblock
            n_zeros = bits.index("1")
            types.append(int(bits[n_zeros : 2 * n_zeros + 1], 2) - 1)
    return bool(types) and all(kind % 5 == 2 for kind in types)


def _nal_units(packet: bytes, extradata: bytes | None) -> Iterator[int]:
    """Where the NAL units of an H.264 packet begin."""
    if not extradata or extradata[0] != 1:  # start codes instead of lengths
        yield from (code.end() for code in re.finditer(rb"\x00\x00\x01(?=.)", packet, re.DOTALL))
        return
    width, at = (extradata[4] & 3) + 1, 0
    while at + width < len(packet):
        yield at + width
        at += width + int.from_bytes(packet[at : at + width], "big")


def _is_hidden(packet: av.Packet, codec: av.VideoCodecContext) -> bool:
    """Whether a packet shows nothing: DivX's placeholder for a picture in the packet before, VP8's alternate picture."""
    match codec.name:
        case "mpeg4":
            return packet.size == 1
        case "vp8":
            return not bytes(packet)[0] & 16
        case _:
            return False


def _packets(packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
    """Packets up to the first unreadable one; the count tells how many are missing."""
    with suppress(av.FFmpegError):
        yield from packets


@contextmanager
def _complaints() -> Iterator[_Log]:
    """Listen to FFmpeg's log in this thread: it goes on where it can, and tells of damage there alone."""
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.INFO)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as complaints:
            yield complaints
    finally:
        av.logging.set_level(before[0])
        av.logging.set_skip_repeated(before[1])


def _sign(complaints: _Log, component: str = "") -> str:
    """Take what was heard, and give the first that tells of damage, or nothing; to conceal is no error to FFmpeg."""
    signs = [
        _message(text)
        for level, name, text in complaints
        if name.startswith(component) and (level <= av.logging.ERROR or text.startswith("concealing"))
    ]
    complaints.clear()
    return signs[0] if signs else ""


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
