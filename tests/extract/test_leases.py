"""One writer a part, whoever races, dies or sleeps; with real processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract import leases
from coldframe.extract.arrays import StoreError
from coldframe.extract.leases import WHOLE, Claim, Holder, Lease, LocalFolder, Part, exclusive, live

# Forks a process for every caller, since an import takes seconds; each evaluates lines until its caller hangs up.
NURSERY = """
import errno, json, os, signal, socket, subprocess, sys, time
from pathlib import Path
from coldframe.extract import leases
from coldframe.extract.leases import Lease, Part, exclusive

def take(store, part="0/1"):
    global lease
    lease = Lease.take(Path(store), Part.parse(part))
    return "taken"

def no_locks(beat_s, dead_after_s):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    leases.fcntl.flock, leases._BEAT_S, leases._DEAD_AFTER_S, leases._POLL_S = flock, beat_s, dead_after_s, 0.002

def count(store, times):
    for _ in range(times):
        with exclusive(Path(store)):
            n = int(Path(store, "n").read_text())
            time.sleep(0.001)
            Path(store, "n").write_text(str(n + 1))

def fork():
    pid = os.fork()
    if not pid:
        time.sleep(60)
    return pid

def check_in_fork():
    pid = os.fork()
    if not pid:
        try:
            lease.check()
        except OSError:
            os._exit(7)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def serve(lines):
    for line in lines:
        try:
            answer = str(eval(json.loads(line), globals()))
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        lines.write(json.dumps(answer) + "\\n")
        lines.flush()
    os._exit(0)

door = socket.socket(socket.AF_UNIX)
door.bind(sys.argv[1])
door.listen()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a killed one vanishes once all its threads have
print("open", flush=True)
while True:
    caller = door.accept()[0]
    if not os.fork():
        door.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        serve(caller.makefile("rw"))
    caller.close()
"""


class Peer:
    """Another process."""

    def __init__(self, door: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(door)
        self._lines = self._socket.makefile("rw")
        self.pid = int(self.ask("os.getpid()"))

    def send(self, code: str) -> None:
        self._lines.write(json.dumps(code) + "\n")
        self._lines.flush()

    def hear(self) -> str:
        return json.loads(self._lines.readline())

    def ask(self, code: str) -> str:
        self.send(code)
        return self.hear()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        while Path(f"/proc/{self.pid}").exists():
            time.sleep(0.001)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@pytest.fixture(scope="module")
def door() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "door")
        with subprocess.Popen([sys.executable, "-c", NURSERY, path], stdout=subprocess.PIPE) as nursery:
            assert nursery.stdout is not None
            assert nursery.stdout.readline() == b"open\n"
            yield path
            nursery.kill()


@pytest.fixture
def peer(door: str) -> Iterator[Callable[[], Peer]]:
    peers: list[Peer] = []

    def make() -> Peer:
        peers.append(Peer(door))
        return peers[-1]

    yield make
    for each in peers:
        with suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGCONT)
        each.close()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system without locks; gives what tells a peer."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(leases.fcntl, "flock", flock)
    monkeypatch.setattr(leases, "_DEAD_AFTER_S", 0.8)
    monkeypatch.setattr(leases, "_BEAT_S", 0.1)
    return "no_locks(0.1, 0.8)"


def names(store: Path, kind: str = "part") -> list[str]:
    return sorted(path.name for path in (store / "leases").glob(f"{kind}-*"))


def test_every_video_is_in_one_part_for_ever() -> None:
    ids = [f"class/{n}.mp4" for n in range(400)]
    parts = [Part(n, 8) for n in range(8)]
    held = [[i for i in ids if part.holds(i)] for part in parts]
    assert sorted(i for some in held for i in some) == sorted(ids)
    assert min(map(len, held)) > 25
    assert all(map(WHOLE.holds, ids))
    # sha256 of "abc" ends in 0x15ad, which is 13 modulo 16
    assert [Part(n, 16).holds("abc") for n in (12, 13, 14)] == [False, True, False]


def test_a_part_of_a_part_holds_videos_of_it_only() -> None:
    ids = [f"{n}" for n in range(300)]
    half = Part(1, 2)
    pieces = [half.split(n, 3) for n in range(3)]
    assert sorted(i for piece in pieces for i in ids if piece.holds(i)) == sorted(filter(half.holds, ids))
    assert [str(piece) for piece in pieces] == ["1/6", "3/6", "5/6"]


def test_parts_overlap_where_a_video_may_be_in_both() -> None:
    parts = [Part(i, n) for n in range(1, 7) for i in range(n)]
    for one in parts:
        for other in parts:
            residues = range(one.count * other.count)
            both = any(r % one.count == one.index and r % other.count == other.index for r in residues)
            assert one.overlaps(other) is both, (one, other)


def test_a_part_is_parsed_as_it_is_printed() -> None:
    assert Part.parse(" 2/8 ") == Part(2, 8)
    assert str(Part.parse("2/8")) == "2/8"


@pytest.mark.parametrize("text", ["8/8", "2", "2/8/1", "-1/8", "0/0", "a/b", "", "1.0/2", "²/8", "1/" + "9" * 5000])
def test_no_part_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"no part of a store; found .*; expected i/N") as caught:
        Part.parse(text)
    assert "\n" not in str(caught.value)


def test_parts_run_side_by_side_and_overlaps_are_refused(tmp_path: Path, peer) -> None:
    other = peer()
    assert other.ask(f"take({str(tmp_path)!r}, '0/4')") == "taken"
    with pytest.raises(StoreError, match=rf"part 0/4, pid {other.pid} on .* since 20.*expected nobody at part 0/3"):
        Lease.take(tmp_path, Part(0, 3))
    with pytest.raises(StoreError, match=r"nobody at all of it. Wait for it, or end it; .* --shard 0/N"):
        Lease.take(tmp_path)
    with pytest.raises(StoreError):
        Lease.take(tmp_path, Part(0, 4))
    with Lease.take(tmp_path, Part(3, 4)) as three, Lease.take(tmp_path, Part(1, 4)) as one:
        three.check()
        one.check()
        assert [(str(h.part), h.pid) for h in live(tmp_path)] == [
            ("0/4", other.pid),
            ("1/4", os.getpid()),
            ("3/4", os.getpid()),
        ]
    assert other.ask("lease.check()") == "None"
    assert other.ask("lease.close()") == "None"
    assert names(tmp_path) == []
    Lease.take(tmp_path).close()


def test_a_lease_ends_once_and_with_its_last_reference(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path)
    lease.close()
    lease.close()
    with pytest.raises(StoreError, match="it was closed"):
        lease.check()
    lease = Lease.take(tmp_path)
    del lease
    assert live(tmp_path) == []
    Lease.take(tmp_path).close()


@pytest.mark.parametrize("locks", [True, False])
def test_of_two_who_race_one_wins(tmp_path: Path, peer, locks: bool) -> None:
    peers = [peer(), peer()]
    if not locks:
        for each in peers:
            each.ask("no_locks(5, 30)")
    won = [0, 0]
    for _ in range(50):
        for each in peers:
            each.send(f"take({str(tmp_path)!r})")
        answers = [each.hear() for each in peers]
        assert sorted(a.partition(":")[0] for a in answers) == ["StoreError", "taken"], answers
        winner = answers.index("taken")
        won[winner] += 1
        peers[winner].ask("lease.close()")
    assert sum(won) == 50


@pytest.mark.parametrize("locks", [True, False])
def test_one_at_a_time_passes_the_gate(tmp_path: Path, peer, locks: bool) -> None:
    (tmp_path / "n").write_text("0")
    peers = [peer() for _ in range(3)]
    for each in peers:
        each.ask("setattr(leases, '_POLL_S', 0.002)" if locks else "no_locks(5, 30)")
    for each in peers:
        each.send(f"count({str(tmp_path)!r}, 25)")
    assert [each.hear() for each in peers] == ["None"] * 3
    assert (tmp_path / "n").read_text() == "75"
    assert len(names(tmp_path, "gate")) <= 2


def test_whoever_waits_too_long_at_the_gate_learns_for_whom(tmp_path: Path, peer) -> None:
    other = peer()
    assert other.ask(f"(gate := exclusive(Path({str(tmp_path)!r}))).__enter__()").startswith("<")
    with (
        pytest.raises(StoreError, match=rf"is being changed by another process; found pid {other.pid} on"),
        exclusive(tmp_path, patience_s=0.05),
    ):
        pytest.fail("two at once")
    other.kill()
    with exclusive(tmp_path, patience_s=0.05) as claim:
        claim.check()


def test_errors_inside_pass_through_and_open_the_gate(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), exclusive(tmp_path):
        (tmp_path / "absent").read_bytes()
    with exclusive(tmp_path, patience_s=0):
        pass


def test_a_killed_holder_leaves_nothing_in_the_way(tmp_path: Path, peer) -> None:
    other = peer()
    other.ask(f"take({str(tmp_path)!r})")
    left = names(tmp_path)
    other.kill()
    assert live(tmp_path) == []
    assert names(tmp_path) == left  # who only looks changes nothing
    with Lease.take(tmp_path):
        assert len(names(tmp_path)) == 1
        assert names(tmp_path) != left


def test_processes_that_outlive_the_holder_do_not_hold(tmp_path: Path, peer) -> None:
    other = peer()
    other.ask(f"take({str(tmp_path)!r})")
    forked = int(other.ask("fork()"))
    spawned = int(other.ask("(child := subprocess.Popen(['sleep', '60'], close_fds=False)).pid"))
    try:
        assert other.ask("check_in_fork()") == "7"
        assert other.ask("lease.check()") == "None"  # the child that ended took nothing with it
        with pytest.raises(StoreError):
            Lease.take(tmp_path)
        other.kill()
        Lease.take(tmp_path).close()
        assert all(Path(f"/proc/{pid}").exists() for pid in (forked, spawned))
    finally:
        os.kill(forked, signal.SIGKILL)
        os.kill(spawned, signal.SIGKILL)


def test_without_locks_a_beating_holder_stays_and_a_killed_one_is_soon_forgotten(
    tmp_path: Path, peer, no_locks: str
) -> None:
    other = peer()
    other.ask(no_locks)
    other.ask(f"take({str(tmp_path)!r})")
    time.sleep(1.1)
    with pytest.raises(StoreError, match=rf"pid {other.pid} on"):
        Lease.take(tmp_path)
    other.kill()
    with pytest.raises(StoreError):  # nobody can know yet
        Lease.take(tmp_path)
    time.sleep(0.9)
    Lease.take(tmp_path).close()
    assert names(tmp_path) == []


def test_without_locks_a_check_is_a_sign_of_life(tmp_path: Path, no_locks: str, monkeypatch) -> None:
    monkeypatch.setattr(leases, "_BEAT_S", 100.0)
    with Lease.take(tmp_path) as lease:
        for _ in range(12):
            time.sleep(0.1)
            lease.check()
        assert len(live(tmp_path)) == 1
        time.sleep(0.9)
        assert live(tmp_path) == []


def test_without_locks_a_paused_holder_loses_and_learns_it(tmp_path: Path, peer, no_locks: str) -> None:
    other = peer()
    other.ask(no_locks)
    other.ask(f"take({str(tmp_path)!r})")
    os.kill(other.pid, signal.SIGSTOP)
    time.sleep(1.0)
    with Lease.take(tmp_path) as mine:
        os.kill(other.pid, signal.SIGCONT)
        assert other.ask("lease.check()").startswith("StoreError: this process no longer holds")
        time.sleep(0.15)  # it may want to beat
        assert other.ask("lease.close()") == "None"
        mine.check()
        assert len(names(tmp_path)) == 1


def test_without_locks_a_paused_guest_loses_its_turn_and_cannot_end_that_of_the_next(
    tmp_path: Path, peer, no_locks: str
) -> None:
    other = peer()
    other.ask(no_locks)
    other.ask(f"(claim := (gate := exclusive(Path({str(tmp_path)!r}))).__enter__())")
    os.kill(other.pid, signal.SIGSTOP)
    time.sleep(1.0)
    with exclusive(tmp_path) as claim:
        os.kill(other.pid, signal.SIGCONT)
        assert other.ask("claim.check()").startswith("StoreError: this process no longer holds")
        assert other.ask("gate.__exit__(None, None, None)") in ("None", "False")
        claim.check()
        with pytest.raises(StoreError), exclusive(tmp_path, patience_s=0.05):
            pytest.fail("two at once")


def test_of_another_machine_only_the_age_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is free may be one of those that the file system keeps to each machine."""
    monkeypatch.setattr(leases, "_machine", lambda: "another")
    claim = Claim(LocalFolder(tmp_path / "leases"), "part-1-of-2-00000000")
    claim.forget()
    monkeypatch.undo()
    assert [str(holder.part) for holder in live(tmp_path)] == ["1/2"]
    monkeypatch.setattr(leases.time, "time", lambda: 4e9)  # the clock of this machine does not matter
    with pytest.raises(StoreError, match="One that died on another machine is forgotten after 60 s"):
        Lease.take(tmp_path)
    file = tmp_path / "leases" / "part-1-of-2-00000000"
    os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 61))
    Lease.take(tmp_path).close()
    assert names(tmp_path) == []


def test_a_file_that_is_being_made_counts_as_held(tmp_path: Path) -> None:
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / "part-0-of-2-00000000").touch()
    (tmp_path / "leases" / "of-a-stranger").touch()
    assert live(tmp_path) == [Holder(Part(0, 2), 0, "", "")]
    with pytest.raises(StoreError, match="part 0/2, a process that just started"):
        Lease.take(tmp_path)
    Lease.take(tmp_path, Part(1, 2)).close()


def test_a_store_that_is_not_there_has_no_writers(tmp_path: Path) -> None:
    assert live(tmp_path / "absent") == []
    assert not (tmp_path / "absent").exists()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot be used: .*Not a directory.* may write") as caught:
        Lease.take(tmp_path / "file")
    assert "\n" not in str(caught.value)


class Bucket:
    """Leases in a place without folders, locks and file descriptors."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[float, bytes]] = {}

    def _of(self, name: str) -> tuple[float, bytes]:
        if name not in self._files:
            raise FileNotFoundError(errno.ENOENT, "No such object", name)
        return self._files[name]

    def names(self) -> list[str]:
        return list(self._files)

    def create(self, name: str) -> None:
        if name in self._files:
            raise FileExistsError(name)
        self._files[name] = time.monotonic(), b""

    def read(self, name: str) -> bytes:
        return self._of(name)[1]

    def write(self, name: str, content: bytes) -> None:
        self._of(name)
        self._files[name] = time.monotonic(), content

    def touch(self, name: str) -> None:
        self.write(name, self.read(name))

    def age_s(self, name: str) -> float:
        return time.monotonic() - self._of(name)[0]

    def is_locked(self, name: str) -> None:
        return None

    def remove(self, name: str) -> None:
        self._of(name)
        del self._files[name]


def test_any_place_with_a_few_methods_can_hold_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket()
    with Lease.take(bucket, Part(0, 2)) as lease, Lease.take(bucket, Part(1, 2)):
        with pytest.raises(StoreError, match=f"pid {os.getpid()}"):
            Lease.take(bucket)
        lease.check()
        assert [str(holder.part) for holder in live(bucket)] == ["0/2", "1/2"]
        monkeypatch.setattr(leases, "_DEAD_AFTER_S", 0.0)
        Lease.take(bucket).close()
        with pytest.raises(StoreError, match="no longer holds"):
            lease.check()
    assert live(bucket) == []
