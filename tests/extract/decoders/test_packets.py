"""NAL units are found however they are stored, and what FFmpeg cannot read is told from what it has no room for."""

from __future__ import annotations

from collections.abc import Iterator

import av
import av.error
import pytest

from coldframe.extract.decoders.packets import begins_anew, is_idr, readable

LENGTHS = b"\x01\x64\x00\x0a\xff"  # the NAL units of a packet come after their lengths, of four bytes
DELIMITER, IDR, INTRA, INTER = b"\x09\xf0", b"\x65\x88\x80", b"\x41\x88\x80", b"\x41\xe0\x80"  # slice types 7, 7, 0


def packet(*units: bytes, extradata: bytes | None) -> av.Packet:
    if extradata == LENGTHS:
        found = av.Packet(b"".join(len(unit).to_bytes(4, "big") + unit for unit in units))
    else:
        found = av.Packet(b"".join(b"\x00\x00\x01" + unit for unit in units))
    found.is_keyframe = True
    return found


@pytest.mark.parametrize("extradata", [LENGTHS, LENGTHS[:1], b"", None], ids=str)
def test_key_frames_that_need_nothing_before_them(extradata: bytes | None) -> None:
    codec = av.VideoCodecContext.create("h264", "r")
    if extradata:
        codec.extradata = extradata
    for units, closes, begins in (
        ((DELIMITER, IDR, IDR), True, True),
        ((DELIMITER, INTRA), False, True),
        ((DELIMITER, INTRA, INTER), False, False),  # such as intra-refresh has
        ((DELIMITER,), False, False),
    ):
        found = packet(*units, extradata=extradata)
        assert (is_idr(found, extradata), begins_anew(found, codec)) == (closes, begins), units


def test_packets_end_at_the_first_unreadable_one_unless_memory_is_short() -> None:
    def until(error: Exception) -> Iterator[av.Packet]:
        yield av.Packet(b"one")
        raise error

    for error in (av.error.InvalidDataError(1, "invalid"), IndexError("of a stream that began late")):
        assert [bytes(found) for found in readable(until(error))] == [b"one"]
    with pytest.raises(MemoryError):
        list(readable(until(av.error.MemoryError(12, "Cannot allocate memory"))))
