"""What a packet says before it is decoded, and how packets are read where some cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterator

import av

_IDR = 5  # type of an H.264 NAL unit: a picture that nothing after it looks back across


def readable(packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
    """Packets up to the first unreadable one; the count tells how many are missing."""
    try:
        yield from packets
    except MemoryError:  # PyAV's own is one of FFmpeg's errors as well, but says nothing of the file
        raise
    except (av.FFmpegError, IndexError):  # the latter at the end, where a stream began late: PyAV does not know of it
        return


def decoded(packet: av.Packet, codec: av.VideoCodecContext) -> tuple[list[av.VideoFrame], str]:
    """The frames that come with a packet, and why it cannot be decoded, or nothing."""
    try:
        return codec.decode(packet), ""
    except MemoryError:  # as above
        raise
    except av.FFmpegError as error:
        return [], str(error.strerror)


def is_hidden(packet: av.Packet, codec: av.VideoCodecContext) -> bool:
    """Whether a packet shows nothing: DivX's placeholder for a picture in the packet before, VP8's alternate picture."""
    match codec.name:
        case "mpeg4":
            return packet.size == 1
        case "vp8":
            return not bytes(packet)[0] & 16
        case _:
            return False


def is_idr(packet: av.Packet, extradata: bytes | None) -> bool:
    """Whether an H.264 packet holds an IDR picture: nothing after it needs what came before."""
    data = bytes(packet)
    return any(data[at] & 31 == _IDR for at in _nal_units(data, extradata))


def begins_anew(packet: av.Packet, codec: av.VideoCodecContext) -> bool:
    """Whether no picture that is shown from this packet on looks at one before it."""
    return packet.is_keyframe and (codec.name != "h264" or _is_intra(bytes(packet), codec.extradata))


def has_start_codes(extradata: bytes | None) -> bool:
    """Whether start codes, not lengths, tell the NAL units of an H.264 stream apart."""
    return not extradata or len(extradata) < 5 or extradata[0] != 1


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
    if extradata is None or has_start_codes(extradata):
        yield from (code.end() for code in re.finditer(rb"\x00\x00\x01(?=.)", packet, re.DOTALL))
        return
    width, at = (extradata[4] & 3) + 1, 0
    while at + width < len(packet):
        yield at + width
        at += width + int.from_bytes(packet[at : at + width], "big")
