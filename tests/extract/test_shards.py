"""A shard is there whole or not at all, whatever happens to its writer."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from coldframe.extract.arrays import StoreError
from coldframe.extract.shards import Shard, VideoRow, committed, remove_torn, replace_file, write_shard

ROWS = [
    VideoRow("a.mp4", "ok", n_frames=2, n_repeated=1, decoder="pyav", content_hash="1f", seconds=0.5),
    VideoRow("b.mp4", "failed", "timed out: 60 s", attempts=3),
    VideoRow("c.mp4", "ok", n_frames=3),
]
ARRAYS = {"x": [np.full((2, 4), 1, np.float16), np.full((3, 4), 2, np.float16)]}


def test_round_trip(tmp_path: Path) -> None:
    written = write_shard(tmp_path, 7, ROWS, ARRAYS)
    (path,) = committed(tmp_path)
    shard = Shard.read(path)
    assert shard == written
    assert shard.number == 7
    assert shard.arrays == ("x",)
    assert shard.first_frame == (0, 2, 2, 5)
    assert [(row.video_id, row.reason, row.attempts, row.decoder) for row in shard.rows] == [
        ("a.mp4", "", 1, "pyav"),
        ("b.mp4", "timed out: 60 s", 3, ""),
        ("c.mp4", "", 1, ""),
    ]
    assert [set(row.crc32c) for row in shard.rows] == [{"x"}, set(), {"x"}]
    assert shard.array("x").n_frames == 5
    offsets, x = (zarr.open_array(path / "features.zarr" / name, mode="r") for name in ("frame_offsets", "x"))
    assert np.asarray(offsets[:]).tolist() == [0, 2, 2, 5]
    assert np.asarray(x[2:]).tolist() == [[2.0] * 4] * 3


def test_a_shard_of_failures_alone(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, 0, [ROWS[1]], {"x": []})
    assert Shard.read(shard.path).rows == (ROWS[1],)


def test_shards_are_ordered_by_number_beyond_five_digits(tmp_path: Path) -> None:
    for number in (100000, 2, 99999):
        write_shard(tmp_path, number, ROWS, ARRAYS)
    (tmp_path / ".tmp-host-1-00003").mkdir()
    (tmp_path / "00004-not-a-shard").mkdir()
    assert [int(path.name[:-9]) for path in committed(tmp_path)] == [2, 99999, 100000]
    assert committed(tmp_path / "absent") == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("calls", [1, 4, 7])
def test_an_error_of_the_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, calls: int
) -> None:
    left = iter(range(calls))

    def fsync(number: int) -> None:
        if next(left, None) is None:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError) as error:
        write_shard(tmp_path, 0, ROWS, ARRAYS)
    assert list(tmp_path.iterdir()) == []
    if code == errno.ENOSPC:
        assert "is full; found" in str(error.value)
        assert "expected 40 bytes" in str(error.value)


def test_a_real_write_error_leaves_nothing(tmp_path: Path) -> None:
    large = {"x": [np.zeros((2, 1 << 20), np.uint8), np.zeros((3, 1 << 20), np.uint8)]}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StoreError, match="could not be written"):
            write_shard(tmp_path, 0, ROWS, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=39)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match="found 39 bytes free; expected 40 bytes"):
        write_shard(tmp_path, 0, ROWS, ARRAYS)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, 0, ROWS, ARRAYS)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_killed_before_the_rename_leaves_no_shard(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
import numpy as np
from coldframe.extract.shards import VideoRow, write_shard
Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_shard(Path(sys.argv[1]), 0, [VideoRow("a", "ok", n_frames=1)], {"x": [np.ones((1, 2))]})
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    (torn,) = tmp_path.iterdir()
    assert (torn / "videos.parquet").exists()
    assert committed(tmp_path) == []
    remove_torn(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_what_dead_writers_left_is_removed(tmp_path: Path) -> None:
    host = socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive, elsewhere = tmp_path / f".tmp-{host}-1-00000", tmp_path / ".tmp-another-host-99-00000"
    for folder in (
        alive,
        elsewhere,
        tmp_path / f".tmp-{host}-{dead.pid}-00000",
        tmp_path / f".tmp-{host}-{os.getpid()}-1",
    ):
        folder.mkdir()
    remove_torn(tmp_path)
    assert set(tmp_path.iterdir()) == {alive, elsewhere}


def test_damaged_rows_are_an_error(tmp_path: Path) -> None:
    path = write_shard(tmp_path, 0, ROWS, ARRAYS).path
    file = path / "videos.parquet"
    sound = file.read_bytes()
    at = sound.index(b"timed out")
    file.write_bytes(sound[:at] + b"T" + sound[at + 1 :])
    with pytest.raises(StoreError, match="cannot be read"):
        Shard.read(path)
    file.write_bytes(sound[:-20])
    with pytest.raises(StoreError, match="cannot be read"):
        Shard.read(path)
    file.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        Shard.read(path)


@pytest.mark.parametrize("damage", ["remove", "truncate", "metadata", "frames"])
def test_a_damaged_array_is_an_error_that_names_place_and_videos(tmp_path: Path, damage: str) -> None:
    shard = write_shard(tmp_path, 0, ROWS, ARRAYS)
    folder = shard.path / "features.zarr" / "x"
    match damage:
        case "remove":
            (folder / "c.0.0").unlink()
        case "truncate":
            os.truncate(folder / "c.0.0", 30)
        case "metadata":
            (folder / "zarr.json").write_text("{")
        case "frames":
            shutil.rmtree(shard.path)
            write_shard(tmp_path, 0, ROWS, {"x": [np.ones((2, 4)), np.ones((4, 4))]}).path.rename(shard.path)
    with pytest.raises(StoreError) as error:
        shard.array("x")
    assert str(shard.path) in str(error.value)
    assert "a.mp4, c.mp4" in str(error.value)


def test_a_file_is_replaced_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "store.json"
    replace_file(path, lambda new: new.write_text("one"))

    def fails(new: Path) -> None:
        new.write_text("tw")
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        replace_file(path, fails)
    assert path.read_text() == "one"


def test_a_folder_that_no_writer_named_is_left_alone(tmp_path: Path) -> None:
    for name in (".tmp-foo", ".tmp-a-b-c", f".tmp-{socket.gethostname()}-{'9' * 30}-00001"):
        (tmp_path / name).mkdir()
    remove_torn(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_an_array_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    shard = write_shard(tmp_path, 0, ROWS, ARRAYS)

    def refuse(path: Path) -> bytes:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StoreError, match=rf"cannot be read: {os.strerror(code)}$"):
        shard.array("x")
