"""A bad day for a run or for a store: nothing is lost, nothing is there twice, and one line says what to do.

Every run is a process of its own with the real program in it, forked from one that has imported torch already: hundreds
of interpreters would take minutes to start. It is killed, stopped or robbed of its videos either after a random time, or at
the n-th file that it touches in its store; the disk that fills up is one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldframe.data_manifests.drawn import plan_clips
from coldframe.extract import FeatureStore, upkeep
from coldframe.extract.frames import write_video
from coldframe.extract.shards import committed

N_VIDEOS = 12
FEATURES = "embedding,tokens.-1"

# Runs the program in a fork for each order, in a process group of its own.
HOST = """
import functools, gc, json, os, signal, sys, traceback
import av, pyarrow.parquet, torch, zarr
torch.set_num_threads(1)
import coldframe.extract as package
from coldframe import cli
from coldframe.extract import pipeline, towers, upkeep
from coldframe.train_heads import heads
package.load_tower = functools.cache(towers.load_tower)
package.load_tower("coldframe-tiny", None, "fp32", "auto")

def disturb(store, at, action):
    seen, events = [], {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.utime", "os.truncate"}
    def hook(event, args):
        if event in events and isinstance(args[0], (str, os.PathLike)) and os.fspath(args[0]).startswith(store):
            seen.append(event)
            if len(seen) == at:
                if action == "kill":
                    os.killpg(0, signal.SIGKILL)
                elif action == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                else:
                    os.rename(action, action + ".away")
    sys.addaudithook(hook)
    return seen

def run(arguments, out, cores, store, at, action):
    os.setpgid(0, 0)
    for number, name in ((0, os.devnull), (1, out + ".out"), (2, out + ".err")):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["coldframe", *arguments]
    cli.cores = lambda: cores
    seen = disturb(store, at, action)
    code = 0
    try:
        cli.main(arguments)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    with open(out + ".seen", "w") as file:
        file.write(str(len(seen)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to tear down all that was imported would take longer than the run

gc.freeze()
for line in iter(sys.stdin.readline, ""):
    order = json.loads(line)
    if "wait" in order:
        status = os.waitpid(order["wait"], os.WUNTRACED)[1]
        answer = "stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
    else:
        answer = os.fork()
        if not answer:
            run(**order)
        try:
            os.setpgid(answer, answer)
        except OSError:
            pass  # it was faster
    os.write(1, f"{json.dumps(answer)}\\n".encode())
os._exit(0)
"""


class Host:
    """A process that forks runs."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._n_runs = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **order: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *arguments: object, store: Path, workers: int = 0, at: int = 0, action: str = "kill") -> Run:
        """Begin a command; `action` (kill, stop, or the folder to move away) is done at the `at`-th touch of the store."""
        self._n_runs += 1
        out = str(self._folder / str(self._n_runs))
        words = [str(word) for word in arguments]
        pid = self.ask(arguments=words, out=out, cores=workers, store=str(store), at=at, action=action)
        return Run(self, pid, out)

    def extract(self, videos: Path, store: Path, *more: object, shard_videos: int = 2, **how: Any) -> Run:
        """Begin an extraction."""
        options = (
            "--model",
            "coldframe-tiny",
            "--frames",
            4,
            "--decoder",
            "pyav",
            "--features",
            FEATURES,
            "--quiet",
            "--json",
        )
        return self.start(
            "extract", videos, "--store", store, *options, "--shard-videos", shard_videos, *more, store=store, **how
        )


class Run:
    """One command at work."""

    def __init__(self, host: Host, pid: int, out: str) -> None:
        self._host, self.pid, self._out = host, pid, out

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        """Kill it and all that it started."""
        os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> int | str:
        """Its exit code, -9 where it was killed; `stopped` where it stopped itself."""
        return self._host.ask(wait=self.pid)

    @property
    def out(self) -> str:
        return Path(f"{self._out}.out").read_text()

    @property
    def err(self) -> str:
        return Path(f"{self._out}.err").read_text()

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def n_touched(self) -> int:
        """How many files of its store it touched."""
        return int(Path(f"{self._out}.seen").read_text())

    def refused(self) -> str:
        """The one line in which it was refused."""
        assert self.wait() == 2, self.out + self.err
        (line,) = self.err.splitlines()
        if self.out:  # where JSON was asked for
            assert json.loads(self.out) == {"error": line.removeprefix("error: ")}
        assert line.startswith("error: ")
        return line


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    made = Host(tmp_path_factory.mktemp("host"))
    yield made
    assert made.process.stdin
    assert made.process.stdout
    made.process.stdin.close()
    assert made.process.wait(30) == 0
    made.process.stdout.close()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "videos"
    for clip in plan_clips(n_per_class=4)[::2][:N_VIDEOS]:
        write_video(folder / clip.path, clip.draw(n_frames=8, size_px=64), fps=12)
    return folder


@pytest.fixture(scope="module")
def whole(host: Host, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The store of an undisturbed run, and how many files that touched."""
    store = tmp_path_factory.mktemp("whole") / "store"
    run = host.extract(videos, store)
    assert (run.wait(), run.report["n_written"]) == (0, N_VIDEOS), run.err
    return store, run.n_touched


@pytest.fixture
def sound(whole: tuple[Path, int], tmp_path: Path) -> Path:
    """A copy of that store."""
    return Path(shutil.copytree(whole[0], tmp_path / "store"))


def numbers(store: Path) -> dict[tuple[str, str], np.ndarray]:
    opened = FeatureStore.open(store)
    return {(name, i): opened.read(name, i) for i in opened.ids for name in (*opened.features, "timestamps_s")}


def assert_as_undisturbed(store: Path, whole: Path, *, once: bool = True) -> None:
    """Sound, with the same numbers; each video once; nothing half-written, and nobody at work."""
    report = upkeep.verify(store, quiet=True)
    assert report.is_sound, report.describe()
    ours, theirs = numbers(store), numbers(whole)
    assert ours.keys() == theirs.keys()
    for key, frames in theirs.items():
        np.testing.assert_allclose(ours[key], frames, atol=2e-3, err_msg=str(key))  # another batch rounds otherwise
    opened = FeatureStore.open(store)
    assert opened.failures == []
    rows = Counter((row.video_id, row.view) for shard in opened.catalogue.shards for row in shard.rows)
    assert not once or set(rows.values()) == {1}, rows
    names = [{path.name for path in place.iterdir()} - {"journal"} for place in (store, whole)]
    assert names[0] == names[1]
    assert sorted((store / "shards").iterdir()) == committed(store / "shards")
    assert {path.name.partition("-")[0] for path in (store / "leases").iterdir()} == {"gate"}
    assert len(list((store / "leases").iterdir())) <= 2


def held(store: Path) -> dict[str, tuple[int, ...]]:
    """What readers find: video → the checksums of its arrays."""
    if not (store / "store.json").exists():
        return {}
    opened = FeatureStore.open(store)
    return {i: tuple(sorted(opened.row(i).crc32c.values())) for i in opened.ids}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["time", "touch", "workers"])
def test_kill_9_anywhere_then_the_rerun_gives_the_same_store(
    host: Host, videos: Path, whole: tuple[Path, int], tmp_path: Path, how: str
) -> None:
    rng = random.Random(how)
    n_kills = n_points = n_stores = n_from_scratch = 0
    store, before = tmp_path / "0", {}
    began = time.monotonic()
    run = host.extract(videos, tmp_path / "timed", workers=int(how == "workers"))
    assert run.wait() == 0, run.err
    seconds = time.monotonic() - began
    while n_points < (10 if how == "workers" else 20) or before:
        if how == "touch":
            run = host.extract(videos, store, shard_videos=1, at=rng.randint(1, whole[1]))
        else:
            run = host.extract(videos, store, shard_videos=1, workers=int(how == "workers"))
            time.sleep(rng.uniform(0, seconds))
            run.kill()
        n_points += 1
        code = run.wait()
        assert code in (0, -signal.SIGKILL), run.err
        n_kills += code != 0
        after = held(store)
        assert before.items() <= after.items()  # nothing lost, and nothing made anew
        assert list((store / "shards").glob(".tmp-*")) == [] or code != 0
        n_from_scratch += not before
        before = after
        if code == 0:
            assert_as_undisturbed(store, whole[0])
            n_stores += 1
            store, before = tmp_path / str(n_stores), {}
    print(
        f"{how}: {n_points} points in {time.monotonic() - began:.1f} s, {n_kills} killed, {n_stores} stores finished, "
        f"{n_from_scratch} runs began with no video"
    )
    assert n_kills >= n_points // 3


def run_at_half(host: Host, videos: Path, store: Path, n_touches: int, action: str, **how: Any) -> Run:
    """An extraction to which something happens after about half of its shards."""
    return host.extract(videos, store, "--batch", 4, at=n_touches * 6 // 10, action=action, **how)


@contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[Path]:
    """A file system of so many bytes; skips loudly where nobody may mount one."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"may not mount a small disk: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up(host: Host, videos: Path, whole: tuple[Path, int], tmp_path: Path) -> None:
    rng, n_full, n_committed = random.Random(0), 0, 0
    size = sum(path.stat().st_size for path in whole[0].rglob("*")) * 2
    with small_disk(tmp_path / "disk", size) as disk:
        for n_free in [0, 1 << 12, *(rng.randrange(size // 2) for _ in range(10))]:
            store, filler = disk / "store", disk / "filler"
            filler.write_bytes(bytes(max(shutil.disk_usage(disk).free // 4096 - n_free // 4096, 0) * 4096))
            before = held(store)
            run = host.extract(videos, store, shard_videos=1)
            code = run.wait()
            if n_free and code == 0:  # it was enough
                assert_as_undisturbed(store, whole[0])
            else:
                assert code == 2, run.err
                (line,) = run.err.splitlines()
                assert "space" in line, line
                assert before.items() <= held(store).items()
                n_committed += len(held(store)) > 0
                if (store / "store.json").exists():
                    assert upkeep.verify(store, quiet=True).is_sound
                n_full += 1
            filler.unlink()
            if rng.random() < 0.5:
                run = host.extract(videos, store, shard_videos=1)
                assert run.wait() == 0, run.err
                assert_as_undisturbed(store, whole[0])
                shutil.rmtree(store)
    print(f"disk: {n_full} times full, {n_committed} of them with shards committed")
    assert n_full >= 6


def test_a_folder_of_videos_that_disappears_and_comes_back(
    host: Host, videos: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    folder, store = tmp_path / "videos", tmp_path / "store"
    shutil.copytree(videos, folder)
    run = run_at_half(host, folder, store, whole[1] // 2, action=str(folder))  # early: decoding is a few videos ahead
    assert run.wait() == 3, run.err
    report = run.report
    assert 0 < report["n_failed"] < N_VIDEOS
    assert report["n_written"] == N_VIDEOS - report["n_failed"]
    assert {row.status for row in FeatureStore.open(store).failures} == {"deferred"}
    assert upkeep.verify(store, quiet=True).is_sound
    assert "no such folder" in host.extract(folder, store).refused()
    (tmp_path / "videos.away").rename(folder)
    run = host.extract(folder, store)
    assert (run.wait(), run.report["n_written"]) == (0, report["n_failed"]), run.err
    assert_as_undisturbed(store, whole[0], once=False)  # the failures have rows, too


def test_the_second_of_two_runs_is_refused(host: Host, videos: Path, whole: tuple[Path, int], tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = run_at_half(host, videos, store, whole[1], action="stop")
    assert first.wait() == "stopped"
    before = held(store)
    assert 0 < len(before) < N_VIDEOS
    assert "another extract is writing this store" in host.extract(videos, store).refused()
    assert "another extract is writing" in host.extract(videos, store, "--shard", "1/2").refused()
    assert held(store) == before
    first.send(signal.SIGCONT)
    assert (first.wait(), first.report["n_written"]) == (0, N_VIDEOS), first.err
    assert_as_undisturbed(store, whole[0])


def test_parts_side_by_side_make_one_store(host: Host, videos: Path, whole: tuple[Path, int], tmp_path: Path) -> None:
    store = tmp_path / "store"
    for at in (whole[1] // 8, 0):  # the first time one of them dies, in its first shard
        runs = [
            host.extract(videos, store, "--shard", f"{i}/2", shard_videos=1, workers=i, at=at * i) for i in range(2)
        ]
        codes = [run.wait() for run in runs]
        assert codes[0] == 0, runs[0].err
        assert codes[1] == (-signal.SIGKILL if at else 0), runs[1].err
    assert_as_undisturbed(store, whole[0])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("times", [1, 2])
def test_a_run_that_is_told_to_stop_keeps_what_it_has(
    host: Host, videos: Path, whole: tuple[Path, int], tmp_path: Path, signum: int, times: int
) -> None:
    store = tmp_path / "store"
    run = run_at_half(host, videos, store, whole[1], action="stop")
    assert run.wait() == "stopped"
    before = held(store)
    run.send(signum)
    run.send(signal.SIGCONT)
    if times == 2:
        time.sleep(0.005)
        run.send(signum)
    assert run.wait() == 130, run.err
    if times == 1:
        assert run.report["interrupted"]
        assert len(held(store)) == run.report["n_written"]
    assert "Traceback" not in run.err
    assert before.items() <= held(store).items()
    run = host.extract(videos, store)
    assert run.wait() == 0, run.err
    assert_as_undisturbed(store, whole[0])


@pytest.mark.slow
def test_signals_at_random_moments(host: Host, videos: Path, whole: tuple[Path, int], tmp_path: Path) -> None:
    rng, codes = random.Random(1), Counter[int | str]()
    store, before = tmp_path / "0", {}
    for number in range(1, 25):
        at, signum = rng.randint(1, whole[1]), rng.choice([signal.SIGTERM, signal.SIGINT])
        run = host.extract(
            videos, store, "--batch", 8, shard_videos=1, at=at, action="stop", workers=int(number % 4 == 0)
        )
        if (code := run.wait()) == "stopped":
            run.send(signum)
            run.send(signal.SIGCONT)
            for _ in range(rng.randrange(3)):
                time.sleep(rng.choice([0.0, 0.001, 0.02]))
                run.send(signum)
            code = run.wait()
        codes[code] += 1
        # Before a run begins and after it has ended, a signal ends the process as the system does.
        assert code in (0, 130, -signal.SIGTERM, -signal.SIGINT), f"{at}: {run.err}"
        # Python has no way to raise what a signal raises in a finaliser: it says so and goes on.
        assert code < 0 or "Traceback" not in run.err or "Exception ignored in" in run.err, f"{at}: {run.err}"
        assert before.items() <= (before := held(store)).items()
        if code == 0:
            assert_as_undisturbed(store, whole[0])
            store, before = tmp_path / str(number), {}
    print(f"signals: {codes}")
    run = host.extract(videos, store)
    assert run.wait() == 0, run.err
    assert_as_undisturbed(store, whole[0])
    assert codes[130] >= 8


@pytest.mark.slow
def test_one_command_on_two_devices_of_which_one_is_killed(
    videos: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    command = [sys.executable, "-m", "coldframe.cli", "extract", str(videos), "--store", str(store), "--frames", "4",
               "--model", "coldframe-tiny", "--decoder", "pyav", "--features", FEATURES, "--shard-videos", "1",
               "--batch", "4", "--workers", "1", "--device", "cpu,cpu", "--json"]  # fmt: skip
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run,
        ExitStack() as end,
    ):
        end.callback(run.kill)
        while not ((store / "shards").is_dir() and committed(store / "shards")):
            assert run.poll() is None
            time.sleep(0.002)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        holders = [json.loads(path.read_bytes())["pid"] for path in (store / "leases").glob("part-*")]
        for pid in holders[:1]:
            assert str(pid) in children
            os.kill(pid, signal.SIGKILL)
        _, err = run.communicate(timeout=120)
        assert (run.returncode, "was killed by SIGKILL" in err) == (1, True), err
    before = held(store)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout)["n_failed"]) == (0, 0), done.stderr
    assert before.items() <= held(store).items()
    assert_as_undisturbed(store, whole[0])


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_a_flipped_bit_anywhere_is_found_and_mended(host: Host, whole: tuple[Path, int], sound: Path) -> None:
    rng = random.Random(0)
    files = sorted(path for path in (sound / "shards").rglob("*") if path.is_file())
    weights = [path.stat().st_size for path in files]
    files += [sound / "store.json", sound / "store.copy.json"]
    picked = [*rng.choices(files[:-2], weights, k=16), *rng.choices(files, k=20), *files[-2:], *files[-2:]]
    for file in picked:
        content, bit = file.read_bytes(), rng.randrange(8 * file.stat().st_size)
        flip(file, bit)
        run = host.start("verify", sound, "--quiet", store=sound)
        assert run.wait() == (2 if file.name == "store.json" else 3), f"{file} {bit}: {run.out}{run.err}"
        file.write_bytes(content)
    for file in [*rng.sample(files[:-2], 4), sound / "store.copy.json"]:
        flip(file, rng.randrange(8 * file.stat().st_size))
    for options, code in (((), 3), (("--repair",), 0), ((), 0)):
        run = host.start("verify", sound, "--quiet", *options, store=sound)
        assert run.wait() == code, run.out + run.err
    assert_as_undisturbed(sound, whole[0], once=False)  # a row for what was sound, and one for what was made again


def first_shard(store: Path) -> Path:
    return committed(store / "shards")[0]


def rewrite(file: Path, content: bytes) -> None:
    """Write a file that nobody has touched lately."""
    file.write_bytes(content)
    os.utime(file, (1, 1))


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def copy_shard_as(store: Path, number: str) -> None:
    shutil.copytree(first_shard(store), store / "shards" / f"{number}{first_shard(store).name[5:]}")


WAY_BACK = dict.fromkeys(("inspect", "verify", "extract"), "put it back: cp ")
AGAIN = dict.fromkeys(("inspect", "verify"), "Run the same extract command again")
REPAIR = dict.fromkeys(("inspect", "extract"), "Mend it: coldframe verify ")
NOISE = random.Random(0).randbytes(500)
DISASTERS: dict[str, tuple[Any, dict[str, str]]] = {
    # What happens, and what each command says of it; a command that is not named goes on as if nothing had happened.
    "header emptied": (lambda s: os.truncate(s / "store.json", 0), WAY_BACK),
    "header cut": (lambda s: os.truncate(s / "store.json", 400), WAY_BACK),
    "header of noise": (lambda s: (s / "store.json").write_bytes(NOISE), WAY_BACK),
    "header gone": (lambda s: (s / "store.json").unlink(), WAY_BACK),
    "header edited": (
        lambda s: (s / "store.json").write_text((s / "store.json").read_text().replace('"embedding"', "7")),
        WAY_BACK,
    ),
    "header and copy emptied": (
        lambda s: (os.truncate(s / "store.json", 0), os.truncate(s / "store.copy.json", 0)),
        dict.fromkeys(("inspect", "verify", "extract"), "is damaged"),
    ),
    "copy gone": (lambda s: (s / "store.copy.json").unlink(), {}),
    "manifest gone": (lambda s: (s / "manifest.parquet").unlink(), AGAIN),
    "manifest of noise": (lambda s: (s / "manifest.parquet").write_bytes(NOISE), AGAIN),
    "shards gone": (lambda s: shutil.rmtree(s / "shards"), {"verify": "is missing. Put it back, or run the same"}),
    "shards a file": (lambda s: replace_by_file(s / "shards"), {"verify": "is missing", "extract": "File exists"}),
    "journal of noise": (lambda s: rewrite(next((s / "journal").iterdir()), NOISE), {}),
    "journal gone": (lambda s: shutil.rmtree(s / "journal"), {}),
    "journal a file": (lambda s: replace_by_file(s / "journal"), {}),  # a run with nothing to write needs none
    "gate of noise": (lambda s: [rewrite(gate, NOISE) for gate in (s / "leases").iterdir()], {}),
    "gate emptied": (lambda s: [rewrite(gate, b"") for gate in (s / "leases").iterdir()], {}),
    "lease of noise": (lambda s: rewrite(s / "leases" / "part-0-of-1-00c0ffee", NOISE), {}),
    "lease of no part": (lambda s: rewrite(s / "leases" / "part-3-of-2-00c0ffee", b"[1]"), {}),
    "young lease of no part": (
        lambda s: (s / "leases" / "part-3-of-2-00c0ffee").write_bytes(b"[1]"), {"extract": "no part of a store"}
    ),
    "leases gone": (lambda s: shutil.rmtree(s / "leases"), {}),
    "leases a file": (lambda s: replace_by_file(s / "leases"), {"extract": "cannot be used"}),
    "shard twice": (lambda s: copy_shard_as(s, "00099"), {}),
    "shard twice under one number": (lambda s: copy_shard_as(s, "00001"), {}),
    "shard copied by a file manager": (lambda s: shutil.copytree(first_shard(s), f"{first_shard(s)} (copy)"), {}),
    "shard without rows": (lambda s: (first_shard(s) / "videos.parquet").unlink(), REPAIR),
    "shard that is empty": (lambda s: (s / "shards" / "00050-00c0ffee").mkdir(), REPAIR),
    "torn folder of nobody": (lambda s: (s / "shards" / ".tmp-foo").mkdir(), {}),
}  # fmt: skip


@pytest.mark.parametrize("disaster", DISASTERS)
def test_what_hands_can_do_to_a_store_ends_in_one_line_or_works(
    disaster: str, host: Host, videos: Path, whole: tuple[Path, int], sound: Path
) -> None:
    harm, words = DISASTERS[disaster]
    harm(sound)
    is_damaged, is_beheaded = words is REPAIR, words is WAY_BACK
    for command in ("inspect", "verify", "extract"):
        quiet = ("--quiet",) if command == "verify" else ()
        how = host.extract(videos, sound) if command == "extract" else host.start(command, sound, *quiet, store=sound)
        if command in words:
            assert words[command] in how.refused()
        else:
            assert how.wait() == (3 if command == "verify" and is_damaged else 0), how.out + how.err
    # The way back that the line names.
    if is_beheaded:
        shutil.copy(sound / "store.copy.json", sound / "store.json")
    if is_damaged:
        assert host.start("verify", sound, "--repair", "--quiet", store=sound).wait() == 0
    if is_beheaded or is_damaged or "extract" not in words:
        run = host.extract(videos, sound)
        assert run.wait() == 0, run.err
        for stray in [*(sound / "shards").glob(".tmp-foo"), *(sound / "shards").glob("* (copy)")]:
            shutil.rmtree(stray)  # not ours to remove
        assert_as_undisturbed(sound, whole[0], once="twice" not in disaster)


def test_a_store_that_may_not_be_written(host: Host, videos: Path, whole: tuple[Path, int], sound: Path) -> None:
    subprocess.run(["mount", "--bind", sound, sound], capture_output=True, check=False)
    locked = subprocess.run(["mount", "-o", "remount,bind,ro", sound], capture_output=True, check=False)
    if locked.returncode and os.getuid() == 0:
        pytest.skip(f"may not mount a folder to be read only: {locked.stderr.decode().strip()}")
    for folder in [sound, *(path for path in sound.rglob("*") if path.is_dir())] if locked.returncode else []:
        folder.chmod(0o500)
    try:
        assert host.start("inspect", sound, store=sound).wait() == 0
        assert host.start("verify", sound, "--quiet", store=sound).wait() == 0
        assert "cannot be used" in host.extract(videos, sound).refused()
        assert "cannot be used" in host.start("compact", sound, store=sound).refused()
    finally:
        if locked.returncode:
            for folder in [sound, *(path for path in sound.rglob("*") if path.is_dir())]:
                folder.chmod(0o700)
        else:
            subprocess.run(["umount", "-l", sound], check=True)
    assert_as_undisturbed(sound, whole[0])
