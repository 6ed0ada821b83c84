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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ..data_manifests.errors import ColdframeError
from ..data_manifests.locations import LocationError, fetched
from .specs import FrameSpec, TransformSpec

_KEPT = 0.95  # a file with a smaller share of its promised frames is damaged: refused, not quietly shortened
# PyAV 19 took the option away.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
_SLACK_S = 5e-4  # times in annotations are rounded
_BATCH_BYTES = 256 << 20  # full-size pictures that decord may hold at once
_TIMED_BY_HEADER = {"matroska,webm", "flv"}  # containers that promise a duration, not a count
_DECORD_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_IDR = 5  # type of an H.264 NAL unit: a picture that nothing after it looks back across

Times = NDArray[np.float64]  # seconds of every frame of a file, in the order of display
Picture = NDArray[np.uint8]  # RGB [H, W, 3], or a crop [3, S, S]
Choose = Callable[[Times], NDArray[np.int64]]
Crop = Callable[[Picture], Picture]


class DecodeError(ColdframeError, OSError):
    """One video cannot be decoded; the text is the reason, as `category: detail`."""

    @property
    def reason(self) -> str:
        """What goes into the record of the video."""
        return str(self)


@dataclass(frozen=True, slots=True)
class DecodedVideo:
    """The sampled frames of one video, as open_clip would have cropped them."""

    pixels: NDArray[np.uint8]  # [T, 3, S, S]
    timestamps_s: NDArray[np.float64]  # [T], since the first frame of the file
    indices: NDArray[np.int64]  # [T], which frames of the file
    n_source_frames: int  # frames of the whole file
    n_repeated: int  # repetitions of the last frame at the end, where the video is shorter than T
    decoder: str  # decord | pyav
    content_sha256: str  # of the file's bytes


def decode(
    path: str | os.PathLike[str],
    frames: FrameSpec,
    transform: TransformSpec,
    start_s: float | None = None,
    end_s: float | None = None,
) -> DecodedVideo:
    """Sample, decode, resize and crop one video, or the part of it with start_s ≤ time < end_s.

    Args:
        path: of a file, or a URL, from which a temporary copy is made.

    Raises:
        DecodeError: there is no such file, it is no video, it is damaged, or no frame lies in the part asked for;
            `locations.is_transient` tells whether another attempt may go better.
    """
    try:
        with fetched(os.fspath(path)) as file:
            return _decode(file, frames, transform, start_s, end_s)
    except LocationError as error:
        raise DecodeError(str(error)) from error


def _decode(
    path: Path, frames: FrameSpec, transform: TransformSpec, start_s: float | None, end_s: float | None
) -> DecodedVideo:
    """Do what `decode` promises with a local file."""
    content_sha256 = _digest(path)
    source = _inspect(os.path.abspath(path))  # noqa: PTH100 - a name such as `12:30.mp4` is no protocol
    choose = partial(_choose, frames=frames, start_s=start_s, end_s=end_s)
    picked = _DECODERS[frames.decoder](source, choose, partial(resize_and_crop, transform=transform))
    n_repeated = frames.n_frames - len(picked.crops)
    return DecodedVideo(
        pixels=np.stack(picked.crops + picked.crops[-1:] * n_repeated),
        timestamps_s=picked.timestamps_s[picked.indices],
        indices=picked.indices,
        n_source_frames=len(picked.timestamps_s),
        n_repeated=n_repeated,
        decoder=picked.decoder,
        content_sha256=content_sha256,
    )


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


def resize_and_crop(rgb: Picture, transform: TransformSpec) -> Picture:
    """Do open_clip's evaluation transform up to, not including, ToTensor.  rgb [H, W, 3] -> [3, S, S].

    Source: open_clip 3.3 `image_transform` (MIT) and torchvision 0.20 `resize`, `center_crop` (BSD-3): their rounding.
    Differs: nothing, bit for bit; torchvision, and so torch, is not needed.
    """
    (height, width, _), side = rgb.shape, transform.size_px
    match transform.resize_mode:
        case "shortest":
            short = min(height, width)
            size = (int(side * width / short), int(side * height / short))
        case "longest":
            ratio = max(height, width) / side
            size = (round(width / ratio), round(height / ratio))
        case _:
            size = (side, side)
    kernel = Image.Resampling.BILINEAR if transform.interpolation == "bilinear" else Image.Resampling.BICUBIC
    resized = np.asarray(Image.fromarray(rgb).resize(size, kernel))  # [h, w, 3]

    canvas = np.full((3, side, side), transform.fill_color, np.uint8)
    (from_y, to_y), (from_x, to_x) = _centred(resized.shape[0], side), _centred(resized.shape[1], side)
    canvas[:, to_y, to_x] = resized[from_y, from_x].transpose(2, 0, 1)
    return canvas


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


class Picked(NamedTuple):
    """What a decoder hands back."""

    timestamps_s: Times
    indices: NDArray[np.int64]  # [T], the frames chosen
    crops: list[Picture]  # [3, S, S] for each distinct index, in order
    decoder: str


class Decoder(Protocol):
    """A back end; pictures are cropped one by one, so that it never holds a video in full size."""

    def __call__(self, source: Source, choose: Choose, crop: Crop) -> Picked:
        """Decode the frames that `choose` takes from the times of all frames; raises DecodeError."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """What a file's header and packets say; no picture is decoded for it."""

    path: str
    stream: int  # among the video streams
    timestamps_s: Times  # of the frames that the packets promise
    rate_fps: float
    frame_bytes: int  # of one picture as RGB
    decord_flaw: str  # why decord would go astray; empty where it is exact


def _choose(timestamps_s: Times, frames: FrameSpec, start_s: float | None, end_s: float | None) -> NDArray[np.int64]:
    """Indices [T] of the sampled frames with start_s ≤ time < end_s; raises DecodeError where there are none."""
    first = 0 if start_s is None else int(np.searchsorted(timestamps_s, start_s - _SLACK_S))
    stop = len(timestamps_s) if end_s is None else int(np.searchsorted(timestamps_s, end_s - _SLACK_S))
    if stop <= first:
        raise DecodeError(
            f"no frames in the segment: {start_s} to {end_s} s, but the last is at {timestamps_s[-1]:.2f} s"
        )
    return first + segment_centres(stop - first, frames.n_frames)


def _by_the_better(source: Source, choose: Choose, crop: Crop) -> Picked:
    """Ask decord where it is exact, and PyAV where it is not, refuses, or shows one picture twice."""
    if not source.decord_flaw:
        with suppress(DecodeError):
            picked = _by_decord(source, choose, crop)
            if not any(np.array_equal(a, b) for a, b in pairwise(picked.crops)):
                return picked
    return _by_pyav(source, choose, crop)


def _by_decord(source: Source, choose: Choose, crop: Crop) -> Picked:
    """Seek to the frames by decord; raise DecodeError where they might be others than those asked for."""
    if source.decord_flaw:
        raise DecodeError(f"decord is not exact {source.decord_flaw}: use the decoder auto or pyav")
    try:
        import decord  # here, since it breaks a later import of torch in the same process (decord #293)
    except ImportError as error:
        raise DecodeError("decord is not installed: there is no wheel for this machine") from error
    decord.logging.set_level(decord.logging.QUIET)

    indices = choose(source.timestamps_s)
    wanted = np.unique(indices)
    n_batches = -(-len(wanted) * source.frame_bytes // _BATCH_BYTES)
    crops: list[Picture] = []
    try:
        for batch in np.array_split(wanted, n_batches):
            # Open, one ascending batch, drop: an idle reader goes on decoding into memory (decord #157).
            reader = decord.VideoReader(source.path, num_threads=1)
            _trust(reader, source)
            pictures = reader.get_batch(batch).asnumpy()  # [t, H, W, 3]
            del reader
            crops += map(crop, pictures)
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        reason = str(error).rpartition(".cc:")[2].partition("\n")[0]
        raise DecodeError(f"decord gave up: {reason[:200]}") from error
    return Picked(source.timestamps_s, indices, crops, "decord")


def _trust(reader: Any, source: Source) -> None:
    """Raise DecodeError unless decord's index is that of the packets; it believes containers that lie."""
    if len(reader) != len(source.timestamps_s):
        raise DecodeError(f"decord miscounts: {len(reader)} frames where the packets hold {len(source.timestamps_s)}")
    times = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0].astype(np.float64)
    if reader.get_key_indices()[0] != 0 or np.abs(times - times[0] - source.timestamps_s).max() > 2e-3:  # float32
        raise DecodeError("decord misplaces frames: its times are not those of the packets")


def _by_pyav(source: Source, choose: Choose, crop: Crop) -> Picked:
    """Decode from end to end by PyAV; a second time where the packets promised other frames than came."""
    timestamps_s = source.timestamps_s
    indices = choose(timestamps_s)
    seen, crops = _read_through(source, indices, crop)
    if len(seen) < _KEPT * len(timestamps_s):
        problem = f"corrupt: {len(seen)} of {len(timestamps_s)} frames could be decoded"
        raise DecodeError(problem if seen else "no frames could be decoded")
    if len(seen) != len(timestamps_s):
        timestamps_s = _clock(seen, source.rate_fps)
        indices = choose(timestamps_s)
        _, crops = _read_through(source, indices, crop)
    return Picked(timestamps_s, indices, crops, "pyav")


_DECODERS: Mapping[str, Decoder] = {"auto": _by_the_better, "decord": _by_decord, "pyav": _by_pyav}


def _read_through(source: Source, indices: NDArray[np.int64], crop: Crop) -> tuple[list[float], list[Picture]]:
    """Decode every frame, keep the crops of some; gives the time of each frame and the crops."""
    wanted = set(indices.tolist())
    seen: list[float] = []
    crops: list[Picture] = []
    with av.open(source.path, **_LENIENT) as container:
        stream = container.streams.video[source.stream]
        stream.codec_context.thread_count = 1  # parallel over videos, not within one
        for packet in _packets(container.demux(stream)):
            with suppress(av.FFmpegError):  # an undecodable packet gives no frame: the count tells
                for frame in packet.decode():
                    if len(seen) in wanted:
                        rgb = frame.to_ndarray(format="rgb24", threads=1)  # 5 × faster than its pool for one picture
                        crops.append(crop(np.rot90(rgb, round(frame.rotation / 90))))  # the display matrix, as decord
                    seen.append(frame.time)
    return seen, crops


def _inspect(path: str) -> Source:
    """Read a file's header and packets; raise DecodeError for what cannot be a whole video."""
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

        if n_packets < _KEPT * stream.frames:
            raise DecodeError(f"truncated: {n_packets} of {stream.frames} frames")
        promised_s = (container.duration or 0) / av.time_base if container.format.name in _TIMED_BY_HEADER else 0
        if end_s < _KEPT * promised_s:
            raise DecodeError(f"truncated: {end_s:.1f} of {promised_s:.1f} seconds")
        if not shown:
            raise DecodeError("no frames could be decoded")
        rate_fps = float(stream.average_rate or stream.guessed_rate or 25)
        flaws = {
            f"with {container.format.name} files": container.format.name not in _DECORD_CONTAINERS,
            f"with {codec.name}": codec.name != "h264",
            f"with {codec.pix_fmt}": codec.pix_fmt not in ("yuv420p", "yuvj420p"),
            "at an odd height": codec.height % 2 == 1,
            "with open GOPs": not gops_are_closed,
        }
        return Source(
            path=path,
            stream=container.streams.video.index(stream),
            timestamps_s=_clock(np.sort(shown), rate_fps),
            rate_fps=rate_fps,
            frame_bytes=3 * codec.height * codec.width,
            decord_flaw=next((flaw for flaw, holds in flaws.items() if holds), ""),
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


def _centred(size: int, side: int) -> tuple[slice, slice]:
    """The part of an axis that a centre crop reads, and the part of the crop that it fills."""
    if size <= side:
        return slice(None), slice((side - size) // 2, (side - size) // 2 + size)
    return slice(round((size - side) / 2), round((size - side) / 2) + side), slice(None)  # banker's, as torchvision


def _digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes; raises DecodeError where there are none."""
    digest = ""
    try:
        status = Path(path).stat()
        if is_regular := stat.S_ISREG(status.st_mode):  # to open a pipe is to wait for its writer
            with Path(path).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DecodeError("file is missing") from None
    except OSError as error:
        raise DecodeError(f"file cannot be read: {error.strerror}") from error
    if not is_regular:
        raise DecodeError("not a regular file")
    if status.st_size == 0:
        raise DecodeError("empty file")
    return digest
