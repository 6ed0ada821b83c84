"""Back ends: a file, and frames wanted of it → their crops, in the order of time, or a reason why not.

    contract.py       what a back end is given, and hands back     damage.py        signs of damage in FFmpeg's log
    source.py         what a file's header and packets promise     packets.py       what one packet says
    by_pyav.py        from end to end: of every kind of file       by_decord.py     seeks, where that is exact
    by_torchcodec.py  seeks, in more kinds of files

PyAV gave every frame asked for, of every kind of file tried. Whoever seeks is asked only where source.py finds no flaw, and
is held to the times of the packets. decord and torchcodec are imported by their own files alone, and when first used:
decode processes do without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from ..crops import Crop
from . import by_decord, by_pyav, by_torchcodec
from .contract import Choose, DecodeOptions, Decoder, Picked, Sink, Source


def by_the_better(source: Source, choose: Choose, crop: Crop, sink: Sink, options: DecodeOptions) -> Picked:
    """Ask decord where it is exact, and PyAV where it is not, refuses, shows one picture twice, or must read it all."""
    if not source.decord_flaw:
        with suppress(by_decord.NotByDecord):
            return by_decord.decode(source, choose, crop, sink, options, is_free_to_choose=True)
        sink.restart()
    return by_pyav.decode(source, choose, crop, sink, options)


DECODERS: Mapping[str, Decoder] = {
    "auto": by_the_better,
    "decord": by_decord.decode,
    "pyav": by_pyav.decode,
    "torchcodec": by_torchcodec.decode,
}
