"""Videos and stores behind URLs: an S3 on this machine, and memory."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from coldframe.cli import main
from coldframe.data_manifests import Manifest, VideoRecord, from_folder
from coldframe.data_manifests.locations import is_transient
from coldframe.extract.frames import DecodeError, decode, write_video
from coldframe.extract.specs import FrameSpec, TransformSpec
from coldframe.extract.workers import DecodePool, Failure

FRAMES = FrameSpec(n_frames=2)
TRANSFORM = TransformSpec(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIPS = ("spin/a.mp4", "spin/b.mp4", "wave/c.mp4")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small videos in the folders of two classes."""
    root, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for clip in CLIPS:
        write_video(root / clip, rng.integers(0, 255, (9, 48, 64, 3), dtype=np.uint8), fps=10)
    return root


@pytest.fixture
def videos(clips: Path, bucket: str) -> str:
    """The same in a bucket."""
    for clip in CLIPS:
        fsspec.filesystem("s3").put_file(str(clips / clip), f"{bucket}/videos/{clip}")
    return f"{bucket}/videos"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files of this process and of its workers."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def coldframe(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    """Run a command with --json: its exit code, its object, and its last words."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return int(left.value.code or 0), json.loads(printed.out or "null"), printed.err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_video_behind_a_url_is_the_same_video(clips: Path, videos: str, scratch: Path, workers: int) -> None:
    jobs = [(clip, f"{videos}/{clip}", None, None) for clip in (*CLIPS, "absent.mp4")]
    with DecodePool(FRAMES, TRANSFORM, workers=workers) as pool:
        found = dict(pool.decode(jobs))
    assert found.pop("absent.mp4") == Failure(f"file is missing: {videos}/absent.mp4")
    for clip, video in found.items():
        here = decode(clips / clip, FRAMES, TRANSFORM)
        np.testing.assert_array_equal(video.pixels, here.pixels)
        assert (video.decoder, video.content_sha256) == (here.decoder, here.content_sha256)
    assert not list(scratch.iterdir())


def test_a_network_that_fails_is_told_from_a_bad_video(
    videos: str, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    fsspec.filesystem("s3").pipe_file(f"{videos}/bad.mp4", b"no video")
    with pytest.raises(DecodeError, match="not a video") as bad:
        decode(f"{videos}/bad.mp4", FRAMES, TRANSFORM)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3 = fsspec.get_filesystem_class("s3")
    s3.clear_instance_cache()
    monkeypatch.setattr(s3, "retries", 1)
    with pytest.raises(DecodeError, match=f"^network failure: {videos}/{CLIPS[0]} ") as lost:
        decode(f"{videos}/{CLIPS[0]}", FRAMES, TRANSFORM)
    assert (is_transient(bad.value), is_transient(lost.value)) == (False, True)
    with DecodePool(FRAMES, TRANSFORM, workers=0) as pool:
        ((_, failure),) = pool.decode([("a", f"{videos}/{CLIPS[0]}", None, None)])
    assert isinstance(failure, Failure)
    assert (failure.is_transient, failure.reason) == (True, str(lost.value))
    assert not list(scratch.iterdir())


def test_what_a_killed_worker_fetched_is_removed(scratch: Path, videos: str) -> None:
    """The worker is killed while it decodes a copy, the way the watchdog kills it."""
    left: list[list[Path]] = []

    def kill() -> None:
        while not (copies := list(scratch.glob("*/0/*.mp4"))):
            time.sleep(0.001)
        left.append(copies)
        (worker,) = pool._workers
        os.kill(worker._process.pid or 0, signal.SIGKILL)

    with DecodePool(FrameSpec(2, decoder="pyav"), TRANSFORM, workers=1, ahead=1) as pool:
        killer = threading.Thread(target=kill)
        killer.start()
        found = dict(pool.decode((str(n), f"{videos}/{CLIPS[0]}", None, None) for n in range(20)))
        killer.join()
        assert [v for v in found.values() if isinstance(v, Failure)] in ([], [Failure("decoder crashed (signal 9)")])
        assert not any(copy.exists() for copy in left[0])
    assert not list(scratch.iterdir())


def test_manifest_check_looks_behind_urls(videos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coldframe(capsys, "manifest", "check", videos, "--json")[:1] == (0,)
    records = (VideoRecord("a", CLIPS[0], None), VideoRecord("b", f"{videos}/gone.mp4", None))
    Manifest("m", videos, (), records).write(tmp_path / "m.csv")
    code, facts, _ = coldframe(capsys, "manifest", "check", tmp_path / "m.csv", "--json")
    assert (code, facts["missing_files"]) == (3, ["b"])
    code, facts, _ = coldframe(capsys, "manifest", "folder", videos, "--out", tmp_path / "f.csv", "--json")
    assert (code, facts["videos"]) == (0, 3)
    assert Manifest.read(tmp_path / "f.csv").fingerprint == from_folder(videos).fingerprint


def test_a_url_that_cannot_be_opened_is_one_line(videos: str, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("nope://bucket/videos", "s3://no-such-bucket/videos"):
        code, _, words = coldframe(capsys, "manifest", "check", place)
        assert (code, words.count("\n")) == (2, 1)
        assert place.partition("/")[0] in words
