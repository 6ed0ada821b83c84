"""What can happen to a run and to a store on a bad day: nothing is lost, nothing is there twice, and one line says what to do.

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
from contextlib import contextmanager, suppress
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
        if event in events and os.fspath(args[0] or "").startswith(store) if args and isinstance(args[0], (str, os.PathLike)) else False:
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
        options = ("--model", "coldframe-tiny", "--frames", 4, "--decoder", "pyav", "--features", FEATURES, "--quiet", "--json")
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
        assert (self.wait(), self.out) == (2, ""), self.out + self.err
        (line,) = self.err.splitlines()
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
    assert {path.name for path in store.iterdir()} == {path.name for path in whole.iterdir()}
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
    print(f"{time.monotonic() - began:.1f} s, {seconds:.2f} s a run; {how}: {n_points} points, {n_kills} killed, {n_stores} stores finished, {n_from_scratch} from nothing")
    assert n_kills >= n_points // 3
