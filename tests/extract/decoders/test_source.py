"""What header and packets promise is held to what a file was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from coldframe.extract.decoders.contract import DecodeError, SourceError
from coldframe.extract.decoders.source import inspect, opened, promise


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """VP9 that is shown turned, in four groups of five pictures."""
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libvpx-vp9", rate=10, options={"cpu-used": "8", "g": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(90)
        for number in range(20):
            picture = np.full((48, 64, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_damaged_begin_does_not_hide_how_pictures_are_turned(turned: Path) -> None:
    whole = inspect(str(turned))
    assert abs(whole.rotation) == 90
    with av.open(str(turned)) as container:
        first = next(container.demux(video=0))
        begin, size = first.pos, first.size
    data = bytearray(turned.read_bytes())
    assert begin is not None
    data[begin : begin + size] = bytes(size)
    turned.write_bytes(data)
    assert inspect(str(turned)).rotation == whole.rotation


def test_header_and_packets_promise_the_same(turned: Path) -> None:
    source = inspect(str(turned))
    assert promise(str(turned)) == (20, 10.0) == (len(source.timestamps_s), source.rate_fps)
    np.testing.assert_allclose(source.timestamps_s, np.arange(20) / 10)
    assert (source.width, source.height, source.kept, source.problem) == (64, 48, 1.0, "")
    assert source.decord_flaw == "with vp9"
    assert source.seek_flaw == ""


def test_a_file_that_went_away_may_come_back(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^file is missing$"):
        opened(str(tmp_path / "gone.mp4"))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DecodeError, match=r"^not a video$") as caught:
        opened(str(tmp_path / "text.mp4"))
    assert not isinstance(caught.value, SourceError)
