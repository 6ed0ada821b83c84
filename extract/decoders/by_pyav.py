"""Read a file from end to end by PyAV: of every kind of file, each frame asked for came; and what is damaged is told."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np

from ..crops import Crop, Picture
from ..sampling import Views
from .contract import KEPT, Choose, DecodeError, DecodeOptions, Picked, Sink, Source, crops_of
from .damage import log_of_pyav, sign
from .packets import begins_anew, decoded, readable
from .source import clock, opened

_STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}  # a decoder may fail, and check what sums there are


def decode(source: Source, choose: Choose, crop: Crop, sink: Sink, options: DecodeOptions) -> Picked:
    """Decode from end to end; again where the frames wanted are damaged, or the packets promised others."""
    views = choose(source.timestamps_s)
    try:
        seen = _read_through(source, views, crop, sink)
    except _TimesLie:
        source = replace(source, ticks=None)
        sink.restart()
        seen = _read_through(source, views, crop, sink)

    n_promised = len(source.timestamps_s)
    kept = min(source.kept * len(seen.numbers) / n_promised, 1.0)
    is_short = len(seen.numbers) < KEPT * n_promised or (seen.damage and source.has_gaps)
    if not seen.numbers:
        raise DecodeError("no frames could be decoded")
    if is_short and (options.salvage is None or kept < options.salvage):
        reason = f": {seen.damage}" if seen.damage else ""
        raise DecodeError(f"corrupt: {len(seen.numbers)} of {n_promised} frames could be decoded{reason}")

    there = np.array(seen.numbers)
    if not seen.damage and len(there) != n_promised:  # the packets promised too much or too little
        source = replace(source, ticks=None, timestamps_s=clock(seen.times_s, source.rate_fps))
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


class _Seen(NamedTuple):
    """The sound frames of a file."""

    numbers: list[int]  # ascending
    times_s: list[float]
    damage: str  # the first sign of it; empty where all is sound


class _TimesLie(Exception):
    """Pictures come in another order than that of the times of their packets."""


def _read_through(source: Source, views: Views, crop: Crop, sink: Sink) -> _Seen:
    """Decode every frame, pass the crops of some on.

    A frame is known by its time, so that a lost one moves no other; where times are no help, by how many came before,
    and nothing is believed after the first sign of damage.

    Raises:
        _TimesLie: the frames must be counted.
    """
    wanted = crops_of(views)
    number_of = None if source.ticks is None else {tick: number for number, tick in enumerate(source.ticks.tolist())}
    last_tick = math.inf if source.ticks is None else int(source.ticks[-1])
    numbers: list[int] = []
    times_s: list[float] = []
    first_sound = -math.inf
    doubtful: set[int | None] = set()  # times of pictures that are damaged, or look at one that is
    with log_of_pyav() as log, opened(source.path) as container:
        stream = container.streams.video[source.stream]
        codec, tick_s = _codec(stream), stream.time_base or Fraction(1)
        codec.thread_count = 1  # parallel over videos, not within one
        codec.options = _STRICT
        damage = sign(log, container.format.name)  # opening reads ahead; what it decodes is decoded again
        is_damaged = bool(damage)
        for packet in readable(container.demux(stream)):
            complaint = sign(log)
            if source.hole_at is not None and packet.pos is not None and packet.pos >= source.hole_at:
                complaint = "packets are missing"
            if complaint and packet.size:  # what is said after the last packet is of no part of the video
                damage, is_damaged = damage or complaint, True
            if is_damaged and number_of is not None and packet.pts is not None and begins_anew(packet, codec):
                is_damaged, first_sound = False, packet.pts
            frames, error = decoded(packet, codec)
            complaint = sign(log) or error or _mark(packet, frames)
            damage, is_damaged = damage or complaint, is_damaged or bool(complaint)
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
                if number in wanted:
                    rgb = _upright(frame, source.rotation)
                    for crop_number in wanted[number]:
                        sink.put(crop(rgb, crop_number))
                numbers.append(number)
                times_s.append(math.nan if frame.pts is None else float(frame.pts * tick_s))
    return _Seen(numbers, times_s, damage)


def _codec(stream: av.VideoStream) -> Any:
    """The decoder of a stream: of VP9 libvpx, since FFmpeg's own never knows that what it reads is no picture."""
    codec = stream.codec_context
    if codec.name == "vp9" and codec.pix_fmt == "yuv420p":
        with suppress(ValueError):  # this PyAV was built without
            checking = av.VideoCodecContext.create("libvpx-vp9", "r")
            checking.extradata = codec.extradata
            return checking
    return codec


def _mark(packet: av.Packet, frames: list[av.VideoFrame]) -> str:
    is_marked = packet.is_corrupt or any(frame.is_corrupt for frame in frames)
    return "a picture is marked as corrupt" if is_marked else ""


def _upright(frame: av.VideoFrame, rotation: int) -> Picture:
    """A picture [H, W, 3] as it is shown, turned by its display matrix: as decord turns it."""
    rgb: Any = frame.to_ndarray(format="rgb24", threads=1)  # 5 × faster than its pool for one picture
    return np.rot90(rgb, round((frame.rotation or rotation) / 90))
