"""One bad video costs one video, whatever it does to its process."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.frames import Crops, DecodedVideo, decode, write_video
from coldframe.extract.specs import FrameSpec, TransformSpec
from coldframe.extract.worker import _PART_S
from coldframe.extract.workers import Chunk, DecodePool, Failure, Job

FRAMES = FrameSpec(n_frames=2)
PYAV = FrameSpec(n_frames=2, decoder="pyav")
ANY = FrameSpec(n_frames=None, sampling="all")
TRANSFORM = TransformSpec(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# A decoder whose behaviour is the path of the video: what, and its arguments.
FAULTY = """
import dataclasses, os, signal, sys, time
import numpy as np
from coldframe.extract import frames as frames_file
from coldframe.extract.frames import DecodedVideo, DecodeError, SourceError

kept = []

def decode(path, frames, transform, sink, *, key, start_s, end_s, views, options):
    what, *args = path.split(":")
    what = os.path.basename(what)
    is_first = frames.decoder == "auto"
    n = int(args[0]) if args and args[0].isdigit() else frames.n_frames or 0
    side = transform.size_px
    peak = memory("VmHWM")

    def put(start, stop, error=0):
        for k in range(start, stop):
            sink.put(np.full((3, side, side), (sum(path.encode()) + k + error) % 251, np.uint8))

    if what == "crash" or (what == "crash once" and is_first):
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "abort":
        os.write(2, b"noise\\nterminate called after throwing\\n")
        os.abort()
    elif what == "bad alloc":
        os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\\n  what():  std::bad_alloc\\n")
        os.abort()
    elif what == "exit":
        os._exit(3)
    elif what == "quit":
        sys.exit("enough")
    elif what == "hang":
        for file in args:
            open(file, "w").write(str(os.getpid()))
        time.sleep(600)
    elif what == "hang midway" or (what == "hang once" and is_first):
        put(0, n // 2, error=1)
        time.sleep(600)
    elif what == "crash midway" or (what == "crash midway once" and is_first):
        put(0, n // 2, error=1)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "begin again":
        put(0, n // 2, error=1)
        sink.restart()
    elif what == "bad midway":
        put(0, n // 2)
        raise DecodeError("corrupt: the end")
    elif what == "too few":
        put(0, n - 1)
        n -= 1
        frames = dataclasses.replace(frames, n_frames=n + 1)
    elif what == "nothing":
        n = 0
    elif what == "noise":
        os.write(2, b"x" * 300_000)
        print("y" * 300_000, flush=True)
    elif what == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    elif what == "slow":
        time.sleep(0.2)
    elif what == "bad":
        raise DecodeError("not a video")
    elif what == "gone":
        raise SourceError("file is missing")
    elif what == "bug":
        raise ValueError("first line\\nsecond line")
    elif what in ("eat", "eat midway") or (what == "eat once" and is_first):
        put(0, n // 2 if what == "eat midway" else 0)
        full = []
        while True:
            full.append(bytearray(1 << 20))
    elif what == "leak":
        kept.append(bytearray(n << 20))
        n = frames.n_frames
    elif what == "leak all":
        kept.append([])
        while True:
            kept[-1].append(bytearray(1 << 20))
    elif what == "drop":  # as FFmpeg's decoders do when memory is short
        kept.append(bytearray(int(n) << 20))
        raise DecodeError("corrupt: 1 of 2 frames could be decoded")
    elif what == "real":
        video = frames_file.decode(args[0], frames, transform, sink, key=key)
        return dataclasses.replace(video, decoder=f"{video.decoder}, torch {'torch' in sys.modules}")
    if what == "paced":
        for k in range(n):
            time.sleep(float(args[1]))
            put(k, k + 1)
    elif what != "too few":
        put(0, n)
    rows = np.arange(frames.n_frames if what == "too few" else n)[None]
    return DecodedVideo(
        rows=rows, timestamps_s=rows + (start_s or 0.0), indices=rows,
        n_source_frames=2, n_repeated=np.zeros(1, np.int64), decoder=frames.decoder,
        content_sha256=f"{os.getpid()} {memory('VmHWM') - peak}", source_bytes=len(key),
    )

def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The faulty decoder as a module that workers can import too."""
    (tmp_path / "faulty_decoder.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("faulty_decoder")
    del sys.modules["faulty_decoder"]


@dataclass
class Got:
    """What came of one video."""

    answer: Any  # DecodedVideo or Failure
    crops: list[np.ndarray]  # as far as they came
    n_parts: int  # of every attempt

    def check(self, path: str, n: int = 2) -> None:
        """Assert that each crop came, once, in order."""
        assert isinstance(self.answer, DecodedVideo), self.answer
        wanted = (sum(path.encode()) + np.arange(n)) % 251
        crops = np.stack(self.crops)
        assert crops.shape == (n, 3, 16, 16)
        assert (crops == wanted[:, None, None, None]).all()


def gather(arrivals: Iterable[tuple[str, Any]]) -> dict[str, Got]:
    """Put videos together, and check what every caller relies on: parts without gaps, then one answer."""
    crops: dict[str, list[np.ndarray]] = {}
    n_parts: Counter[str] = Counter()
    found: dict[str, Got] = {}
    for key, arrival in arrivals:
        assert key not in found
        if isinstance(arrival, Chunk):
            if arrival.first == 0:
                crops[key] = []
            assert arrival.first == len(crops[key])
            assert len(arrival.crops) > 0
            crops[key] += [*arrival.crops]
            n_parts[key] += 1
        else:
            found[key] = Got(arrival, crops.pop(key, []), n_parts[key])
    assert not crops
    return found


def run(pool: DecodePool, paths: list[str]) -> dict[str, Got]:
    found = gather(pool.decode(Job(path, path) for path in paths))
    assert sorted(found) == sorted(paths)
    return found


def failure(got: Got) -> tuple[str, int, bool]:
    assert isinstance(got.answer, Failure), got.answer
    return got.answer.reason, got.answer.attempts, got.answer.is_final


def pid(got: Got) -> int:
    return int(got.answer.content_sha256.split()[0])


def test_a_bad_video_costs_one_video(faulty: ModuleType, tmp_path: Path) -> None:
    good = [f"good:{i}:" for i in range(2, 16)]
    bad = [
        "crash", "abort", "exit", "quit", "bad", "bug", "gone", "nothing", "too few", "bad midway:90",
        hang := f"hang:{tmp_path / 'pid'}", "noise", "interrupt",
    ]  # fmt: skip
    paths = [path for pair in zip(good, bad, strict=False) for path in pair] + good[len(bad) :]
    with DecodePool(PYAV, TRANSFORM, workers=2, timeout_s=2.0, decode=faulty.decode) as pool:
        found = run(pool, paths)
        assert failure(found["crash"]) == ("decoder crashed (signal 11)", 1, True)
        assert failure(found["abort"]) == ("decoder crashed (signal 6): terminate called after throwing", 1, True)
        assert failure(found["exit"]) == ("decoder exited (code 3)", 1, True)
        assert failure(found["quit"]) == ("decoder exited (code 1): enough", 1, False)
        assert failure(found["bad"]) == ("not a video", 1, True)
        assert failure(found["bad midway:90"]) == ("corrupt: the end", 1, True)
        assert failure(found["bug"]) == ("ValueError: first line", 1, True)
        assert failure(found["gone"]) == ("file is missing", 1, False)
        assert failure(found["nothing"]) == ("decoder gave 0 of 0 crops", 1, True)
        assert failure(found["too few"]) == ("decoder gave 1 of 2 crops", 1, True)
        assert failure(found[hang]) == ("timed out after 2 s", 1, True)
        assert 2 <= found[hang].answer.seconds < 4
        for path in good:
            found[path].check(path, int(path.split(":")[1]))
        found["noise"].check("noise")
        found["interrupt"].check("interrupt")
        assert pool.waiting_s > 0.5
        assert pool.decoding_s > 2
        run(pool, good)  # the pool lives on


def test_where_the_choice_is_free_a_lost_video_is_tried_by_pyav(faulty: ModuleType) -> None:
    n = 90
    once = [f"{what} once:{n}" for what in ("crash", "crash midway", "hang", "eat")]
    always = [f"crash midway:{n}", f"hang midway:{n}"]
    with DecodePool(FRAMES, TRANSFORM, workers=1, timeout_s=0.8, memory_bytes=512 << 20, decode=faulty.decode) as pool:
        found = run(pool, [*once, *always, "good"])
    assert found["good"].answer.decoder == "auto"
    for path in once:
        found[path].check(path, n)
        assert found[path].answer.decoder == "pyav"
    assert failure(found[always[0]]) == ("decoder crashed (signal 11)", 2, True)
    assert failure(found[always[1]]) == ("timed out after 0.8 s", 2, True)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("path", ["good:5000", "begin again:200", "good:32", "good:33", "good:1"])
def test_videos_of_any_length_pass_through_a_few_slots(faulty: ModuleType, workers: int, path: str) -> None:
    n = int(path.partition(":")[2])
    began = time.monotonic()
    with DecodePool(ANY, TRANSFORM, workers=workers, decode=faulty.decode) as pool:
        found = run(pool, [path])
    n_unfilled = (time.monotonic() - began) // _PART_S  # at most: sent because they were long in the making
    found[path].check(path, n)
    n_full = -(-n // 32) + (3 if "again" in path else 0)
    assert n_full <= found[path].n_parts <= n_full + n_unfilled


def test_failed_videos_give_their_slots_back(faulty: ModuleType) -> None:
    bad = [f"bad midway:{n}" for n in range(90, 100)]
    with DecodePool(PYAV, TRANSFORM, workers=1, timeout_s=5, decode=faulty.decode) as pool:
        found = run(pool, [*bad, "good:90"])
    assert {failure(found[path]) for path in bad} == {("corrupt: the end", 1, True)}
    found["good:90"].check("good:90", 90)


@pytest.mark.parametrize("workers", [0, 2])
def test_neither_side_holds_more_than_a_few_parts(faulty: ModuleType, workers: int) -> None:
    n, transform = 3000, TransformSpec(64, (0.5,) * 3, (0.5,) * 3)
    part_bytes = 32 * 3 * 64 * 64
    with DecodePool(ANY, transform, workers=workers, decode=faulty.decode) as pool:
        tracemalloc.start()
        n_crops = 0
        for number, (_, arrival) in enumerate(pool.decode(Job(str(i), f"good:{n}") for i in range(2))):
            if isinstance(arrival, Chunk):
                n_crops += len(arrival.crops)
                time.sleep(0.1 if number < 5 else 0)  # workers could have decoded all of it
            else:
                assert int(arrival.content_sha256.split()[1]) < 8 * part_bytes / 1024 or workers == 0
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert n_crops == 2 * n
    assert peak < 7 * part_bytes


def test_a_slow_caller_costs_no_video_its_time(faulty: ModuleType) -> None:
    with DecodePool(ANY, TRANSFORM, workers=1, timeout_s=0.7, decode=faulty.decode) as pool:

        def slowly() -> Iterator[tuple[str, Any]]:
            for number, arrival in enumerate(pool.decode([Job("a", "good:300"), Job("b", "good:300")])):
                yield arrival
                time.sleep(1.2 if number in (0, 11) else 0)

        found = gather(slowly())
    assert all(isinstance(got.answer, DecodedVideo) for got in found.values()), found
    assert [got.n_parts for got in found.values()] == [10, 10], "waiting for the caller makes no part smaller"
    assert found["a"].answer.seconds < 0.7, "the caller's time is not the decoder's"
    assert pool.decoding_s < 1.4


def test_progress_is_what_counts(faulty: ModuleType) -> None:
    path = "paced:6:0.4"
    with DecodePool(ANY, TRANSFORM, workers=1, timeout_s=1.8, decode=faulty.decode) as pool:
        found = run(pool, [path])  # longer than the limit, and less than one part
    found[path].check(path, 6)
    assert found[path].answer.seconds > 2
    assert found[path].n_parts > 1


def test_a_large_file_has_more_time(faulty: ModuleType, tmp_path: Path) -> None:
    with (tmp_path / "hang").open("wb") as file:
        file.truncate(2 << 20)
    with DecodePool(PYAV, TRANSFORM, workers=1, timeout_s=0.25, decode=faulty.decode) as pool:
        found = run(pool, [str(tmp_path / "hang")])
    assert failure(found[str(tmp_path / "hang")]) == ("timed out after 1.25 s", 1, True)


@pytest.mark.parametrize("what", ["eat", "eat midway:90", "leak all", "bad alloc", "drop:420"])
def test_a_video_that_eats_memory_harms_no_other(faulty: ModuleType, what: str) -> None:
    good = [f"good:{i}" for i in range(2, 8)]
    with DecodePool(PYAV, TRANSFORM, workers=1, memory_bytes=512 << 20, decode=faulty.decode) as pool:
        found = run(pool, [*good[:3], what, *good[3:]])
    assert failure(found[what]) == ("out of memory: a worker may take 0.5 GiB for a video", 1, False)
    for path in good:
        found[path].check(path, int(path[-1]))
    assert pid(found[good[2]]) != pid(found[good[3]])


def test_real_decoders_under_the_memory_limit(tmp_path: Path) -> None:
    path = str(tmp_path / "a.mp4")
    pictures = (np.full((2160, 3840, 3), 8 * i, np.uint8) for i in range(10))
    write_video(path, pictures, fps=10, options={"preset": "ultrafast", "g": "5"})
    for decoder in ("decord", "pyav"):
        frames = FrameSpec(n_frames=4, decoder=decoder)
        with DecodePool(frames, TRANSFORM, workers=1, memory_bytes=512 << 20) as pool:
            found = run(pool, [path])
        sink = Crops()
        decode(path, frames, TRANSFORM, sink)
        assert found[path].answer.decoder == decoder
        np.testing.assert_array_equal(found[path].crops, sink)
    many = FrameSpec(n_frames=10, decoder="decord")  # 249 MB, and decord holds more
    with DecodePool(many, TRANSFORM, workers=1, memory_bytes=512 << 20) as pool:
        reason, _, is_final = failure(run(pool, [path])[path])
    assert not is_final, reason


def test_workers_are_replaced_before_leaks_matter(faulty: ModuleType) -> None:
    leaky = [f"leak:{n}" for n in range(140, 146)]  # MB; 256 is half of what a worker may take
    with DecodePool(PYAV, TRANSFORM, workers=1, memory_bytes=512 << 20, decode=faulty.decode) as pool:
        found = run(pool, leaky)
    for path in leaky:
        found[path].check(path)
    assert [*Counter(pid(found[path]) for path in leaky).values()] == [2] * 3


def test_workers_are_replaced_after_many_videos(faulty: ModuleType) -> None:
    many = [f"good:1:{n}" for n in range(2003)]
    with DecodePool(PYAV, TRANSFORM, workers=1, decode=faulty.decode) as pool:
        found = run(pool, many)
    assert [*Counter(pid(found[path]) for path in many).values()] == [1000, 1000, 3]


def test_a_worker_that_is_killed_from_outside(faulty: ModuleType, tmp_path: Path) -> None:
    hang = f"hang:{tmp_path / 'pid'}"
    with DecodePool(PYAV, TRANSFORM, workers=1, decode=faulty.decode) as pool:

        def kill() -> None:
            wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        found = run(pool, ["good", hang, "good:3"])
        killer.join()
    assert failure(found[hang]) == ("decoder crashed (signal 9)", 1, False)
    found["good:3"].check("good:3", 3)


def test_workers_do_not_import_torch(faulty: ModuleType, tmp_path: Path) -> None:
    import torch  # noqa: F401 - this process has it, as that of `coldframe extract`

    rng = np.random.default_rng(0)
    paths = {"decord": f"real:{tmp_path / 'a.mp4'}", "pyav": f"real:{tmp_path / 'a.avi'}"}
    for path in paths.values():
        codec = "mpeg4" if path.endswith("avi") else "libx264"
        write_video(path.partition(":")[2], rng.integers(0, 255, (5, 48, 64, 3), dtype=np.uint8), fps=10, codec=codec)
    with DecodePool(FRAMES, TRANSFORM, workers=1, decode=faulty.decode) as pool:
        found = run(pool, list(paths.values()))
    assert {name: found[path].answer.decoder for name, path in paths.items()} == {
        "decord": "decord, torch False",
        "pyav": "pyav, torch False",
    }


@pytest.mark.parametrize("path", ["slow", "good:500"])
def test_a_caller_may_walk_away(faulty: ModuleType, path: str) -> None:
    drawn = []

    def jobs(path: str) -> Iterator[Job]:
        for number in range(60):
            drawn.append(number)
            yield Job(f"{path}:{number}", path, float(number))

    with DecodePool(ANY if ":" in path else FRAMES, TRANSFORM, workers=2, ahead=2, decode=faulty.decode) as pool:
        taken: Any = pool.decode(jobs(path))
        n_answers = 0
        for _ in range(6):
            _, arrival = next(taken)
            n_answers += isinstance(arrival, DecodedVideo)
            time.sleep(0.3)  # the workers could have done many more meanwhile
            assert len(drawn) <= n_answers + 2 * 2 * 2
        taken.close()
        again = gather(pool.decode(jobs("good:70")))
        assert sorted(again) == sorted(f"good:70:{number}" for number in range(60))
        for got in again.values():
            got.check("good:70", 70)
            assert got.answer.timestamps_s[0, 0] in range(60)


def test_a_caller_of_this_process_may_walk_away(faulty: ModuleType) -> None:
    with DecodePool(ANY, TRANSFORM, workers=0, decode=faulty.decode) as pool:
        taken: Any = pool.decode([Job("a", "good:500")])
        next(taken)
        taken.close()
        wait_until(lambda: not any(thread.name == "coldframe-decode" for thread in threading.enumerate()))
        found = run(pool, ["good:40", "gone:1", "bad midway:90", "nothing"])
        found["good:40"].check("good:40", 40)
        assert failure(found["gone:1"]) == ("file is missing", 1, False)
        assert failure(found["bad midway:90"]) == ("corrupt: the end", 1, True)
        assert failure(found["nothing"]) == ("decoder gave 0 of 0 crops", 1, True)
        assert pool.waiting_s > 0
        with pytest.raises(SystemExit):
            run(pool, ["quit:1"])


def test_the_pool_gives_what_decoding_here_gives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{number}.mp4") for number in range(4)]
    for path in paths:
        write_video(path, rng.integers(0, 255, (9, 48, 64, 3), dtype=np.uint8), fps=10)
    absent = str(tmp_path / "absent.mp4")
    frames = FrameSpec(n_frames=3, crops="random", seed=1, draws=3)
    for workers in (0, 1):
        with DecodePool(frames, TRANSFORM, workers=workers) as pool:
            found = gather(pool.decode(Job(path, path, 0.2, views=(0, 2)) for path in [*paths, absent]))
        assert failure(found.pop(absent)) == ("file is missing", 1, False)
        for path, got in found.items():
            sink = Crops()
            here = decode(path, frames, TRANSFORM, sink, key=path, start_s=0.2, views=(0, 2))
            np.testing.assert_array_equal(got.crops, sink)
            np.testing.assert_array_equal(got.answer.rows, here.rows)
            np.testing.assert_array_equal(got.answer.timestamps_s, here.timestamps_s)
            assert (got.answer.decoder, got.answer.content_sha256) == (here.decoder, here.content_sha256)
            assert got.answer.views == (0, 2)
            assert got.answer.seconds > 0
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
from coldframe.extract.frames import DecodedVideo
from coldframe.extract.specs import FrameSpec, TransformSpec
from coldframe.extract.workers import DecodePool, Job

with DecodePool(FrameSpec(2), TransformSpec(16, (0,) * 3, (1,) * 3), workers=2, decode=faulty_decoder.decode) as pool:
    for key, arrival in pool.decode([Job("a", "good"), Job("b", "hang:{folder}/pid")]):
        if isinstance(arrival, DecodedVideo):
            print(key, flush=True)
"""


@pytest.mark.parametrize("fate", ["Ctrl-C", "kill -9"])
def test_nothing_is_left_behind(faulty: ModuleType, tmp_path: Path, fate: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path)))
    with (
        subprocess.Popen(
            [sys.executable, "-W", "error", script],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        ) as parent,
        ExitStack() as end,
    ):  # fmt: skip
        end.callback(parent.kill)  # should this test fail, no other one pays for it
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


def test_a_pool_that_was_not_entered_decodes_nothing() -> None:
    with pytest.raises(RuntimeError, match="enter it first"):
        list(DecodePool(FRAMES, TRANSFORM, workers=1).decode([Job("a", "a")]))


def test_no_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"found 0 GiB; expected at least 0\.5 GiB"):
        DecodePool(FRAMES, TRANSFORM, memory_bytes=0)


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e12])
def test_no_time_limit(faulty: ModuleType, timeout_s: float) -> None:
    with DecodePool(FRAMES, TRANSFORM, workers=1, timeout_s=timeout_s, decode=faulty.decode) as pool:
        run(pool, ["slow"])["slow"].check("slow")


def test_closed_standard_streams_are_no_hindrance(faulty: ModuleType, tmp_path: Path) -> None:
    code = """
import os, sys
os.closerange(0, 3)
sys.stdin = sys.stdout = sys.stderr = None
sys.path.insert(0, sys.argv[1])
from coldframe.extract.specs import FrameSpec, TransformSpec
from coldframe.extract.workers import DecodePool, Job
import faulty_decoder
frames, transform = FrameSpec(n_frames=2), TransformSpec(16, (0.5,) * 3, (0.5,) * 3)
with DecodePool(frames, transform, workers=1, timeout_s=30, decode=faulty_decoder.decode) as pool:
    (part, answer) = pool.decode([Job("key", "noise")])
with open(sys.argv[1] + "/answer", "w") as file:
    file.write(answer[1].decoder)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / "answer").read_text() == "auto"
