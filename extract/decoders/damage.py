"""Signs of damage. FFmpeg conceals it: a picture made of its neighbours looks sound.

Most of it is told by what FFmpeg writes to its log, by flags of pictures and packets, and by errors, of which 453 sound
files raised none. A picture is taken to be damaged from the first sign on, up to the next key frame that needs nothing
before it; it counts as missing, and keeps its number. No sign is given where any bits are a picture (the payload of VP8,
of HEVC without hashes, mostly of MJPEG).

PyAV hands on the log of its own FFmpeg; decord and torchcodec bring another, which writes to the standard error.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import av.logging

Log = list[tuple[int, str, str]]  # of FFmpeg: level, component, text

_FFMPEG = re.compile(r"\[[^]]+ @ 0x[0-9a-f]+\]")
_HARMLESS = re.compile("libdav1d [0-9.]+$|deprecated pixel format used")


@contextmanager
def log_of_pyav() -> Iterator[Log]:
    """Listen to the log of PyAV's FFmpeg in this thread."""
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.INFO)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as log:
            yield log
    finally:
        av.logging.set_level(before[0])
        av.logging.set_skip_repeated(before[1])


def sign(log: Log, component: str = "") -> str:
    """Take what was heard, and give the first that tells of damage, or nothing; to conceal is no error to FFmpeg."""
    signs = [
        _message(text)
        for level, name, text in log
        if name.startswith(component) and (level <= av.logging.ERROR or text.startswith("concealing"))
    ]
    log.clear()
    return signs[0] if signs else ""


@contextmanager
def signs_on_stderr() -> Iterator[list[str]]:
    """Gather what another FFmpeg writes to the standard error in the meantime: the list is filled at the end."""
    signs: list[str] = []
    with tempfile.TemporaryFile() as file:  # which becomes the standard error where that is closed
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield signs
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            said = file.read(1 << 16).decode(errors="replace").splitlines()
            signs += [_message(line) for line in said if _FFMPEG.match(line) and not _HARMLESS.search(line)]


def _message(text: str) -> str:
    """A line of FFmpeg's log, without addresses: equal files have equal reasons."""
    return re.sub(r" @ 0x[0-9a-f]+", "", text).strip()[:120]
