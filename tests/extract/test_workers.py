"""One bad video costs one video, whatever it does to its process."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.frames import decode, write_video
from coldframe.extract.specs import FrameSpec, TransformSpec
from coldframe.extract.workers import DecodePool, Failure

FRAMES = FrameSpec(n_frames=2)
TRANSFORM = TransformSpec(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# A decoder whose behaviour is the path of the video.
FAULTY = """
import dataclasses, os, signal, sys, time
import numpy as np
from coldframe.extract import frames as frames_file
from coldframe.extract.frames import DecodedVideo, DecodeError

def decode(path, frames, transform, start_s, end_s):
    what = path.partition(":")[0]
    if what == "crash" or (what == "crash once" and frames.decoder == "auto"):
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "abort":
        os.write(2, b"noise\\nterminate called after throwing\\n")
        os.abort()
    elif what == "exit":
        os._exit(3)
    elif what == "hang":
        open(path.partition(":")[2], "w").write(str(os.getpid()))
        time.sleep(600)
    elif what == "noise":
        os.write(2, b"x" * 300_000)
        print("y" * 300_000, flush=True)
    elif what == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    elif what == "slow":
        time.sleep(0.2)
    elif what == "bad":
        raise DecodeError("not a video")
    elif what == "bug":
        raise ValueError("first line\\nsecond line")
    elif what == "real":
        video = frames_file.decode(path.partition(":")[2], frames, transform, start_s, end_s)
        return dataclasses.replace(video, decoder=f"{video.decoder}, torch {'torch' in sys.modules}")
    number = sum(path.encode()) % 251
    side = transform.size_px
    return DecodedVideo(
        pixels=np.full((frames.n_frames, 3, side, side), number, np.uint8),
        timestamps_s=np.arange(frames.n_frames) + (start_s or 0.0),
        indices=np.arange(frames.n_frames),
        n_source_frames=2, n_repeated=0,
        decoder=frames.decoder,
        content_sha256="",
    )
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The faulty decoder as a module that workers can import too."""
    (tmp_path / "faulty_decoder.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("faulty_decoder")
    del sys.modules["faulty_decoder"]


def run(pool: DecodePool, paths: list[str]) -> dict[str, Any]:
    found = list(pool.decode((path, path, None, None) for path in paths))
    assert sorted(key for key, _ in found) == sorted(paths)
    return dict(found)


def test_a_bad_video_costs_one_video(faulty: ModuleType, tmp_path: Path) -> None:
    good = [f"good:{i}" for i in range(12)]
    bad = ["crash", "abort", "exit", "bad", "bug", hang := f"hang:{tmp_path / 'pid'}", "noise", "interrupt"]
    paths = [path for pair in zip(good, bad, strict=False) for path in pair] + good[len(bad) :]
    with DecodePool(FrameSpec(2, decoder="pyav"), TRANSFORM, workers=2, timeout_s=2.0, decode=faulty.decode) as pool:
        found = run(pool, paths)
        assert found["crash"] == Failure("decoder crashed (signal 11)")
        assert found["abort"] == Failure("decoder crashed (signal 6): terminate called after throwing")
        assert found["exit"] == Failure("decoder exited (code 3)")
        assert found["bad"] == Failure("not a video")
        assert found["bug"] == Failure("ValueError: first line")
        assert found[hang] == Failure("timed out after 2 s")
        for path in [*good, "noise", "interrupt"]:
            assert found[path].pixels.shape == (2, 3, 16, 16)
            assert (found[path].pixels == sum(path.encode()) % 251).all()
        assert pool.waiting_s > 0.5
        assert run(pool, good).keys() == set(good)  # the pool lives on


def test_where_the_choice_is_free_a_lost_video_is_tried_by_pyav(faulty: ModuleType) -> None:
    with DecodePool(FRAMES, TRANSFORM, workers=1, decode=faulty.decode) as pool:
        found = run(pool, ["good", "crash", "crash once"])
    assert found["good"].decoder == "auto"
    assert found["crash once"].decoder == "pyav"
    assert found["crash"] == Failure("decoder crashed (signal 11)", attempts=2)


def test_workers_do_not_import_torch(faulty: ModuleType, tmp_path: Path) -> None:
    import torch  # noqa: F401 - this process has it, as that of `coldframe extract`

    rng = np.random.default_rng(0)
    paths = {"decord": f"real:{tmp_path / 'a.mp4'}", "pyav": f"real:{tmp_path / 'a.avi'}"}
    for path in paths.values():
        codec = "mpeg4" if path.endswith("avi") else "libx264"
        write_video(path.partition(":")[2], rng.integers(0, 255, (5, 48, 64, 3), dtype=np.uint8), fps=10, codec=codec)
    with DecodePool(FRAMES, TRANSFORM, workers=1, decode=faulty.decode) as pool:
        found = run(pool, list(paths.values()))
    assert {name: found[path].decoder for name, path in paths.items()} == {
        "decord": "decord, torch False",
        "pyav": "pyav, torch False",
    }


def test_workers_hold_a_bounded_number_of_videos_and_a_caller_may_walk_away(faulty: ModuleType) -> None:
    drawn = []

    def jobs(what: str) -> Iterator[tuple[str, str, float, None]]:
        for number in range(60):
            drawn.append(number)
            yield f"{what}:{number}", f"{what}:{number}", float(number), None

    with DecodePool(FRAMES, TRANSFORM, workers=2, ahead=2, decode=faulty.decode) as pool:
        taken: Any = pool.decode(jobs("slow"))
        for n_taken in range(1, 4):
            key, video = next(taken)
            assert video.timestamps_s[0] == float(key.partition(":")[2])
            time.sleep(0.5)  # the workers could have done many more meanwhile
            assert len(drawn) <= n_taken + 2 * 2 * 2
        taken.close()
        again: dict[str, Any] = dict(pool.decode(jobs("good")))
        assert sorted(again) == sorted(f"good:{number}" for number in range(60))
        assert all((again[key].pixels == sum(key.encode()) % 251).all() for key in again)


def test_the_pool_gives_what_decoding_here_gives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{number}.mp4") for number in range(4)]
    for path in paths:
        write_video(path, rng.integers(0, 255, (9, 48, 64, 3), dtype=np.uint8), fps=10)
    paths.append(str(tmp_path / "absent.mp4"))
    for workers in (0, 1):
        with DecodePool(FRAMES, TRANSFORM, workers=workers) as pool:
            found = run(pool, paths)
        assert found.pop(paths[-1]) == Failure("file is missing")
        for path, video in found.items():
            here = decode(path, FRAMES, TRANSFORM)
            np.testing.assert_array_equal(video.pixels, here.pixels)
            np.testing.assert_array_equal(video.timestamps_s, here.timestamps_s)
            assert (video.decoder, video.content_sha256) == (here.decoder, here.content_sha256)
        assert pool.decoding_s > 0


def test_workers_that_cannot_start_end_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    nowhere = ModuleType("a_module_that_workers_do_not_find")
    exec("def decode(*args): pass", nowhere.__dict__)
    nowhere.decode.__module__ = nowhere.__name__
    sys.modules[nowhere.__name__] = nowhere
    try:
        with (
            pytest.raises(RuntimeError, match="do not start"),
            DecodePool(FRAMES, TRANSFORM, workers=1, decode=nowhere.decode) as pool,
        ):
            run(pool, ["good"])
    finally:
        del sys.modules[nowhere.__name__]
    assert "a_module_that_workers_do_not_find" in capfd.readouterr().err


# A user's script without `if __name__ == "__main__"`, which hangs in its second video.
SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
print("the script ran", flush=True)
import faulty_decoder
from coldframe.extract.specs import FrameSpec, TransformSpec
from coldframe.extract.workers import DecodePool

with DecodePool(FrameSpec(2), TransformSpec(16, (0,) * 3, (1,) * 3), workers=2, decode=faulty_decoder.decode) as pool:
    for key, video in pool.decode([("a", "good", None, None), ("b", "hang:{folder}/pid", None, None)]):
        print(key, flush=True)
"""


@pytest.mark.parametrize("fate", ["Ctrl-C", "kill -9"])
def test_nothing_is_left_behind(faulty: ModuleType, tmp_path: Path, fate: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path)))
    parent = subprocess.Popen(
        [sys.executable, "-W", "error", script],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    pid_file = tmp_path / "pid"
    assert parent.stdout is not None
    assert [parent.stdout.readline(), parent.stdout.readline()] == ["the script ran\n", "a\n"]
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    if fate == "Ctrl-C":
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to the workers too
    else:
        parent.kill()
    out, err = parent.communicate(timeout=20)
    assert out == ""
    if fate == "Ctrl-C":
        assert err.count("KeyboardInterrupt") == 1, err  # the parent's own, and nothing of leaked memory
        assert "resource_tracker" not in err
    else:
        assert err == ""
    worker = int(pid_file.read_text())
    wait_until(lambda: not Path(f"/proc/{worker}").exists() or "zombie" in Path(f"/proc/{worker}/status").read_text())
    assert not [*Path("/dev/shm").glob(f"*{parent.pid}*"), *Path(tempfile.gettempdir()).glob(f"pym-{parent.pid}-*")]


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan")])
def test_a_time_limit_of_nothing_is_refused(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="expected more than 0 seconds"):
        DecodePool(FRAMES, TRANSFORM, timeout_s=timeout_s)


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e12])
def test_no_time_limit(faulty: ModuleType, timeout_s: float) -> None:
    with DecodePool(FRAMES, TRANSFORM, workers=1, timeout_s=timeout_s, decode=faulty.decode) as pool:
        assert run(pool, ["slow"])["slow"].decoder == "auto"


def test_closed_standard_streams_are_no_hindrance(faulty: ModuleType, tmp_path: Path) -> None:
    code = """
import os, sys
os.closerange(0, 3)
sys.stdin = sys.stdout = sys.stderr = None
sys.path.insert(0, sys.argv[1])
from coldframe.extract.specs import FrameSpec, TransformSpec
from coldframe.extract.workers import DecodePool
import faulty_decoder
frames, transform = FrameSpec(n_frames=2), TransformSpec(16, (0.5,) * 3, (0.5,) * 3)
with DecodePool(frames, transform, workers=1, timeout_s=30, decode=faulty_decoder.decode) as pool:
    (answer,) = pool.decode([("key", "noise", None, None)])
with open(sys.argv[1] + "/answer", "w") as file:
    file.write(answer[1].decoder)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / "answer").read_text() == "auto"
