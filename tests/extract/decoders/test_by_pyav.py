"""What goes wrong while a file is read from end to end is told by its own name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from coldframe.extract.frames import write_video

DECODING = """
import resource, sys
from coldframe.extract.frames import Crops, DecodeError, decode
from coldframe.extract.specs import FrameSpec, TransformSpec

def attempt(path):
    try:
        return decode(path, FrameSpec(2, decoder="pyav"), TransformSpec(32, (0,) * 3, (1,) * 3), Crops()).decoder
    except MemoryError:
        return "memory"
    except DecodeError as error:
        return error.reason

small, large = sys.argv[1:]
found = [attempt(small)]
pages = int(open("/proc/self/statm").read().split()[5])
for mebibytes in (1, 6, 11):
    resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + (mebibytes << 20), resource.RLIM_INFINITY))
    found.append(attempt(large))
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(*found, attempt(large), sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux obeys the limit")
def test_want_of_memory_is_no_damage(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (1080, 1920, 3), dtype=np.uint8) for _ in range(3)]
    write_video(tmp_path / "small.avi", [np.zeros((64, 64, 3), np.uint8)] * 3, fps=25, codec="mpeg4")
    write_video(tmp_path / "large.avi", noise, fps=25, codec="mpeg4")
    command = [sys.executable, "-c", DECODING, str(tmp_path / "small.avi"), str(tmp_path / "large.avi")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pyav", "memory", "memory", "memory", "pyav"]
