"""What a file's header and packets promise: when each frame is shown, whether all are there, and who may seek."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from numpy.typing import ArrayLike, NDArray

from ..sampling import Times
from .contract import KEPT, DecodeError, Source, SourceError
from .damage import log_of_pyav, sign
from .packets import decoded, has_start_codes, is_hidden, is_idr, readable

# PyAV 19 took the option away.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
_LARGEST = 1 << 27  # pixels of a picture; more is a decompression bomb, not a video
_TIMED_BY_HEADER = {"matroska,webm", "flv"}  # containers that promise a duration, not a count
_SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_UNTIMED = {"avi", "mpeg"}  # containers that do not time each packet: a lost one moves others
_REORDERED = 17  # pictures at most that are stored otherwise than shown
_AVI_HEADERS = 32  # bytes at most between two packets


def opened(path: str) -> InputContainer:
    """Open a file; raise DecodeError for what is no video, SourceError for what is gone."""
    try:
        return av.open(path, **_LENIENT)
    except FileNotFoundError:
        raise SourceError("file is missing") from None
    except MemoryError:  # PyAV's own is one of FFmpeg's errors as well, but says nothing of the file
        raise
    except (av.FFmpegError, ValueError) as error:
        with Path(path).open("rb") as file:
            is_mp4 = file.read(8)[4:] == b"ftyp"  # the index of an mp4 is usually at its end
        raise DecodeError("truncated: the index is missing" if is_mp4 else "not a video") from error


def promise(path: str) -> tuple[int, float]:
    """How many frames a file's header promises, and at which rate; raises DecodeError where it does not tell."""
    with opened(path) as container:
        stream = _stream(container)
        rate_fps = _rate_fps(stream)
        n_frames = stream.frames or round((container.duration or 0) / av.time_base * rate_fps)
    if n_frames < 1:
        raise DecodeError("its header does not say how long it is")
    return n_frames, rate_fps


def inspect(path: str) -> Source:
    """Read a file's header and packets; raise DecodeError for what is no video at all."""
    with log_of_pyav() as log:
        container = opened(path)
    with container:
        stream = _stream(container)
        codec, kind, number = stream.codec_context, container.format.name, container.streams.video.index(stream)
        rate_fps, tick_s = _rate_fps(stream), float(stream.time_base or 1)
        packets = _walk(container, stream, hole=sign(log, kind))  # opening reads ahead
        if not packets.shown:
            raise DecodeError("no frames could be decoded")
        if codec.height * codec.width > _LARGEST:
            raise DecodeError(f"too large: pictures of {codec.width} x {codec.height} pixels")

        promised_s = (container.duration or 0) / av.time_base if kind in _TIMED_BY_HEADER else 0.0
        kept, problem = _wholeness(packets, kind, stream.frames, promised_s)
        ticks = None if None in packets.shown else np.sort(np.array(packets.shown, np.int64))
        has_times = ticks is not None and kind not in _UNTIMED and bool((np.diff(ticks) > 0).all())
        if ticks is not None and (stream.frames > packets.n or promised_s > packets.end_s + 1 / rate_fps):
            ticks = _without_stragglers(ticks, 1.5 / rate_fps / tick_s)
        timestamps_s = clock([math.nan] * len(packets.shown) if ticks is None else ticks * tick_s, rate_fps)
        seek_flaws = {
            f"with {kind} files": not has_times or kind not in _SEEKABLE,
            "with open GOPs": not packets.gops_are_closed,
            "with damaged files": bool(problem),
        }
        decord_flaws = {
            f"with {kind} files": kind not in _SEEKABLE,
            f"with {codec.name}": codec.name != "h264",
            f"with {codec.pix_fmt}": codec.pix_fmt not in ("yuv420p", "yuvj420p"),
            "at an odd height": codec.height % 2 == 1,
            "with open GOPs": not packets.gops_are_closed,
            "with start codes": has_start_codes(codec.extradata),
            "with damaged files": bool(problem),
        }
        return Source(
            path=path,
            stream=number,
            index=stream.index,
            timestamps_s=timestamps_s,
            ticks=ticks if has_times else None,
            has_gaps=packets.n != stream.frames and bool((np.diff(timestamps_s) * rate_fps > 1.5).any()),
            rate_fps=rate_fps,
            height=codec.height,
            width=codec.width,
            rotation=_rotation(path, number) if codec.name == "vp9" else 0,
            decord_flaw=_first(decord_flaws),
            seek_flaw=_first(seek_flaws),
            problem=problem,
            hole_at=_hole_at(packets.spans) if kept < 1 else None,
            kept=kept,
        )


def clock(times: ArrayLike, rate_fps: float) -> Times:
    """Times since the first frame; counted by the frame rate where the container's are missing or out of order."""
    clock = np.asarray(times, dtype=np.float64)
    if np.isfinite(clock).all() and (np.diff(clock) > 0).all():
        return clock - clock[:1]
    return np.arange(len(clock)) / rate_fps


@dataclass(slots=True)
class _Packets:
    """What the packets of a file tell, up to the first unreadable one."""

    hole: str  # the first sign that some are missing; empty where there is none
    n: int = 0  # of the video stream
    shown: list[int | None] = field(
        default_factory=list
    )  # when, of those that show a picture, in the order of the file
    end_s: float = 0.0  # of any stream
    lost_s: float = 0.0  # what is missing before packets that come with such a sign
    gops_are_closed: bool = True
    spans: list[tuple[int, int]] = field(default_factory=list)  # bytes of each, in an AVI file


def _walk(container: InputContainer, stream: av.VideoStream, hole: str) -> _Packets:
    """Read the packets of all streams."""
    found, codec, kind, rate_fps = _Packets(hole), stream.codec_context, container.format.name, _rate_fps(stream)
    with log_of_pyav() as log:
        for packet in readable(container.demux()):
            if packet.pts is not None:
                found.end_s = max(found.end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if kind == "avi" and packet.pos is not None:
                found.spans.append((packet.pos, packet.pos + packet.size))
            if packet.stream.index != stream.index or not packet.size:
                continue
            found.n += 1
            if packet.is_keyframe and codec.name == "h264":
                found.gops_are_closed &= is_idr(packet, codec.extradata)
            if complaint := sign(log, kind):
                found.hole = found.hole or complaint
                before = found.shown[-1] if found.shown else None
                if before is not None and packet.pts is not None:
                    found.lost_s += max(float((packet.pts - before) * packet.time_base) - 1 / rate_fps, 0.0)
            if not packet.is_discard and not is_hidden(packet, codec):  # an edit list discards packets
                found.shown.append(packet.pts)
    return found


def _wholeness(packets: _Packets, kind: str, n_promised: int, promised_s: float) -> tuple[float, str]:
    """The share of what a header promises that its packets hold, and why the file is not whole, or nothing."""
    kept, problem = min(packets.n / max(n_promised, 1), 1.0), ""
    if kept < KEPT or (kept < 1 and kind in _UNTIMED):
        problem = f"truncated: {packets.n} of {n_promised} frames"
    if packets.end_s < KEPT * promised_s:
        kept, problem = packets.end_s / promised_s, f"truncated: {packets.end_s:.1f} of {promised_s:.1f} seconds"
    if packets.hole:
        kept *= 1 - min(packets.lost_s / max(packets.end_s, packets.lost_s, 1e-9), 1.0)
        problem = problem or f"corrupt: {packets.hole}"
    return kept, problem


def _without_stragglers(ticks: NDArray[np.int64], step: float) -> NDArray[np.int64]:
    """Cut the last pictures of a file that ends too early where those between are missing: they are stored out of order."""
    gaps = np.flatnonzero(np.diff(ticks[-_REORDERED:]) > step)
    return ticks[: len(ticks) - min(len(ticks), _REORDERED) + gaps[0] + 1] if len(gaps) else ticks


def _hole_at(spans: list[tuple[int, int]]) -> int | None:
    """Where the last packet before bytes that no packet tells of begins."""
    pairs = itertools.pairwise(sorted(spans))
    return next((begin for (begin, end), (next_, _) in pairs if next_ - end > _AVI_HEADERS), None)


def _rotation(path: str, number: int) -> int:
    """How a container turns pictures, in degrees: libvpx does not hand it on."""
    with log_of_pyav(), opened(path) as container:
        stream = container.streams.video[number]
        for packet in readable(container.demux(stream)):
            frames, _ = decoded(packet, stream.codec_context)
            if frames:
                return frames[0].rotation
    return 0


def _stream(container: InputContainer) -> av.VideoStream:
    """The one that a player would show; raises DecodeError where there is none."""
    if container.format.name == "tty":
        raise DecodeError("not a video: FFmpeg would draw the text")
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream) or stream.disposition & Disposition.attached_pic:
        raise DecodeError("no video stream")
    if not stream.codec_context:  # typed otherwise
        raise DecodeError("no decoder for this kind of video")
    return stream


def _rate_fps(stream: av.VideoStream) -> float:
    return float(stream.average_rate or stream.guessed_rate or 25)


def _first(flaws: dict[str, bool]) -> str:
    return next((flaw for flaw, holds in flaws.items() if holds), "")
