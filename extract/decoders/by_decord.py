"""Seek by decord 0.6.0, where that is exact.

It gives the same bits as PyAV where it lands, but lands well only where each key frame of an H.264 stream is an IDR
picture and the container keeps times (mp4, mov, mkv): 3,464 frames of real files, none wrong. Elsewhere:

    open GOPs      x264 open-gop or intra-refresh, x265's default, MPEG-4 and MPEG-2 with B-frames: 2 to 20 frames off
    AVI, TS        every sparse batch wrong with B-frames; packed MPEG-4 counted one frame too long; no times
    edit lists     frames that the list cuts are shown, and the last one is repeated in their stead (18 of 74)
    odd heights    colours of the last row smear; 10 bits: colours are shifted by half a pixel
    AV1            cannot be opened; VP8, VP9: seeks went astray in long files (decord #91)
    damage         an undecodable frame is silently replaced by a neighbour (decord PR #119)

So its index is held to the times of the file's packets, and its log is read. decord2 goes by the same import name, and
beside PyAV its log goes nowhere: what it gives cannot be told from damage.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from ..crops import Crop, Picture
from .contract import Choose, DecodeError, DecodeOptions, Picked, Sink, Source, crops_of
from .damage import signs_on_stderr


class NotByDecord(DecodeError):
    """decord cannot, or should not, read this file: `auto` gives it to PyAV."""


def decode(
    source: Source, choose: Choose, crop: Crop, sink: Sink, options: DecodeOptions, is_free_to_choose: bool = False
) -> Picked:
    """Seek to the frames; raise NotByDecord where they might be others than those asked for.

    Args:
        is_free_to_choose: refuse as well where another back end would be faster, or surer.
    """
    if source.decord_flaw:
        raise NotByDecord(f"decord is not exact {source.decord_flaw}: use the decoder auto or pyav")
    views = choose(source.timestamps_s)
    wanted = crops_of(views)
    batches = source.batches(wanted)
    if is_free_to_choose and len(batches) > 1 and len(wanted) > len(source.timestamps_s) // 4:
        raise NotByDecord("reading from end to end is faster")
    if _is_decord2():
        raise NotByDecord("decord2 does not tell of damage: install decord in its place, or use the decoder auto")
    try:
        import decord  # here, since it breaks a later import of torch in the same process (decord #293)
    except (ImportError, OSError, RuntimeError) as error:
        raise NotByDecord("decord is not installed: there is no wheel for this machine") from error
    decord.logging.set_level(decord.logging.INFO)

    last: Picture | None = None
    try:
        for batch in batches:
            with signs_on_stderr() as signs:
                # Open, one ascending batch, drop: an idle reader goes on decoding into memory (decord #157).
                reader = decord.VideoReader(source.path, num_threads=1)
                _trust(reader, source)
                pictures = reader.get_batch(batch).asnumpy()  # [t, H, W, 3]
                del reader
            if signs:
                raise NotByDecord(f"corrupt: {signs[0]}")
            for number, rgb in zip(batch.tolist(), pictures, strict=True):
                if is_free_to_choose and last is not None and np.array_equal(last, rgb):
                    raise NotByDecord("decord shows one picture twice")
                for crop_number in wanted[number]:
                    sink.put(crop(rgb, crop_number))
                last = rgb
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        reason = str(error).rpartition(".cc:")[2].partition("\n")[0]
        raise NotByDecord(f"decord gave up: {reason[:200]}") from error
    return Picked(source.timestamps_s, views, "decord", source.kept)


def _is_decord2() -> bool:
    """Whether decord2 is installed; where decord is as well, nobody knows whose files lie on top."""
    try:
        return bool(version("decord2"))
    except PackageNotFoundError:
        return False


def _trust(reader: Any, source: Source) -> None:
    """Raise NotByDecord unless decord's index is that of the packets; it believes containers that lie."""
    if len(reader) != len(source.timestamps_s):
        raise NotByDecord(f"decord miscounts: {len(reader)} frames where the packets hold {len(source.timestamps_s)}")
    times_s = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0].astype(np.float64)
    if reader.get_key_indices()[0] != 0 or np.abs(times_s - times_s[0] - source.timestamps_s).max() > 2e-3:  # float32
        raise NotByDecord("decord misplaces frames: its times are not those of the packets")
