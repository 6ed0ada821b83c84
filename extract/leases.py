"""Who may write what: several processes, on one machine or on many, fill one store without meeting.

    <store>/leases/part-0-of-4-9f2c61d0    one writer each: who it is; locked, and touched every few seconds
    <store>/leases/gate-17                 the turn of the one who changes this folder, the header or the manifest

A writer whose file is locked is alive: the system lets go when a process dies, however it dies. Where the file system
has no locks, or keeps them to each machine, the age of the file tells: by the clock of the file system, since machines
disagree. Gates are numbered upwards and the last one stays, so a turn that was lost is never mistaken for the next.
Behind a URL it is the same without locks, see url_leases.py.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from ..data_manifests.errors import ConfigError
from ..data_manifests.locations import is_local
from .arrays import Descriptor, StoreError
from .url_leases import UrlFolder

LEASES = "leases"

_BEAT_S, _DEAD_AFTER_S = 15.0, 60.0
_PATIENCE_S = 75.0  # outlasts one who died at the gate on another machine
_POLL_S = 0.02
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_GONE = {errno.ENOENT, errno.ESTALE}
_RELEASED = b"{}"
_GATE = re.compile(r"gate-([0-9]+)")
_PART = re.compile(r"part-([0-9]+)-of-([0-9]+)-[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Part:
    """One of `count` parts of the videos; `index` counts from 0."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise _no_part(str(self))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The part that a user means by `2/8`.

        Raises:
            ConfigError: no such part.
        """
        numbers = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
        if not numbers:
            raise _no_part(repr(text))
        return cls(int(numbers[1]), int(numbers[2]))

    def holds(self, video_id: str) -> bool:
        """Whether a video belongs to this part, on every machine and in every release."""
        return int.from_bytes(hashlib.sha256(video_id.encode()).digest()) % self.count == self.index

    def split(self, index: int, count: int) -> Part:
        """One of `count` parts of this part."""
        return Part(self.index + self.count * Part(index, count).index, self.count * count)

    def overlaps(self, other: Part) -> bool:
        """Whether some video may belong to both."""
        return (self.index - other.index) % math.gcd(self.count, other.count) == 0


WHOLE = Part(0, 1)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who is writing a part, and since when (ISO 8601)."""

    part: Part
    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        who = f"pid {self.pid} on {self.host} since {self.since}" if self.pid else "a process that just started"
        return who if self.part == WHOLE else f"part {self.part}, {who}"


@runtime_checkable
class Folder(Protocol):
    """What leases need of the place where they lie; `LocalFolder` is a folder of the file system.

    Every method but `names` and `create` raises OSError with ENOENT or ESTALE for a file that is gone, and makes none.
    """

    def names(self) -> list[str]:
        """The files, in any order; none where the folder does not exist."""
        ...

    def create(self, name: str) -> Descriptor | None:
        """Make an empty file and lock it, until the descriptor closes; None where there are no locks.

        Raises:
            FileExistsError: it is there already; of several callers one makes it.
        """
        ...

    def read(self, name: str) -> bytes:
        """What is in a file."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Replace what is in a file."""
        ...

    def touch(self, name: str) -> None:
        """Make a file new."""
        ...

    def age_s(self, name: str) -> float:
        """Seconds since a file was touched, by the clock that times the files."""
        ...

    def is_locked(self, name: str) -> bool | None:
        """Whether somebody holds the lock of a file; None where there are no locks."""
        ...

    def remove(self, name: str) -> None:
        """Delete a file."""
        ...


class LocalFolder:
    """Leases in a folder of the file system."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def names(self) -> list[str]:
        """See `Folder`."""
        return os.listdir(self._path) if self._path.is_dir() else []  # noqa: PTH208

    def create(self, name: str) -> Descriptor | None:
        """See `Folder`; the descriptor does not reach processes that this one starts."""
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # which here means a lease that somebody else has made
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self._path)) from error
        file = Descriptor(str(self._path / name), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            fcntl.flock(file.number, fcntl.LOCK_EX)  # waits for nobody but a passing `is_locked`
        except OSError as error:
            file.close()
            if error.errno in _NO_LOCKS:
                return None
            raise
        return file

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        return (self._path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """See `Folder`."""
        with (self._path / name).open("r+b", buffering=0) as file:
            file.truncate()
            file.write(content)

    def touch(self, name: str) -> None:
        """See `Folder`."""
        os.utime(self._path / name)

    def age_s(self, name: str) -> float:
        """See `Folder`."""
        with (self._path / name).open("rb") as file:  # NFS believes what it remembers until a file is opened
            touched_s = os.fstat(file.fileno()).st_mtime
        try:
            with tempfile.TemporaryFile(dir=self._path, buffering=0) as new:
                new.write(b"now")
                os.fsync(new.fileno())
                now_s = os.fstat(new.fileno()).st_mtime
        except OSError:  # one who may only read
            now_s = time.time()
        return now_s - touched_s

    def is_locked(self, name: str) -> bool | None:
        """See `Folder`."""
        file = Descriptor(str(self._path / name))
        try:
            fcntl.flock(file.number, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not see each other
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            raise
        finally:
            file.close()
        return False

    def remove(self, name: str) -> None:
        """See `Folder`."""
        (self._path / name).unlink()


class Claim:
    """A file that says who is at work, kept young until it is let go; not by a process forked off."""

    def __init__(self, folder: Folder, name: str) -> None:
        """Make the file; raises FileExistsError if somebody else has."""
        self._folder, self._name = folder, name
        self._lock = folder.create(name)
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat("T", "seconds")}
        # Only of a lock that it has seen may another process on the machine conclude that it is no more.
        self._content = json.dumps(facts | ({"machine": _machine()} if self._lock else {})).encode()
        self._let_go = threading.Event()
        try:
            folder.write(name, self._content)
        except BaseException:
            self.remove()
            raise
        _claims.add(self)
        threading.Thread(target=self._beat, name=f"coldframe-{name}", daemon=True).start()

    def check(self) -> None:
        """Make sure that this is still held.

        Raises:
            StoreError: it was let go, or this process was paused for so long that another one took it.
        """
        lost = self._let_go.is_set()
        if not lost:
            try:
                self._folder.touch(self._name)
                lost = self._folder.read(self._name) != self._content
            except OSError as error:
                if error.errno not in _GONE:
                    raise _unusable(self._folder, error) from error
                lost = True
        if lost:
            raise StoreError(
                f"this process no longer holds {self._folder}/{self._name}: it was closed, or it gave no sign for "
                f"{_DEAD_AFTER_S:g} s and another one took its place",
                fix="Run the same command again: what is committed stays.",
            )

    def remove(self) -> None:
        """Let go; nothing stays."""
        self._end(lambda: self._folder.remove(self._name))

    def release(self) -> None:
        """Let go; the file stays and says so."""
        self._end(lambda: self._folder.write(self._name, _RELEASED))

    def forget(self) -> None:
        """Be no holder, as a process forked off must; the file is somebody else's."""
        self._let_go.set()
        if self._lock:
            self._lock.close()

    def _end(self, last: Callable[[], None]) -> None:
        if not self._let_go.is_set():
            self._let_go.set()
            with suppress(OSError):  # it is gone, or soon old
                last()
        if self._lock:
            self._lock.close()

    def _beat(self) -> None:
        while not self._let_go.wait(_BEAT_S):
            with suppress(OSError):  # `check` tells
                self._folder.touch(self._name)


_claims: weakref.WeakSet[Claim] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [claim.forget() for claim in list(_claims)])


class Lease:
    """Being the one writer of a part; a context manager."""

    def __init__(self, part: Part, claim: Claim) -> None:
        """Use `take`."""
        self.part, self._claim = part, claim
        self._close = weakref.finalize(self, claim.remove)  # also where nobody closes it

    @classmethod
    def take(cls, store: Path | Folder, part: Part = WHOLE) -> Self:
        """Become the one writer of a part, if nobody writes any of its videos.

        Raises:
            StoreError: somebody does; or the folder cannot be written.
        """
        folder = _folder_of(store)
        with exclusive(folder):
            try:
                for name in _parts(folder):
                    if not _is_live(folder, name):
                        _remove(folder, name)
                    elif part.overlaps((holder := _holder(folder, name)).part):
                        raise _in_use(folder, part, holder)
                claim = Claim(folder, f"part-{part.index}-of-{part.count}-{secrets.token_hex(4)}")
            except StoreError:
                raise
            except OSError as error:
                raise _unusable(folder, error) from error
        return cls(part, claim)

    def check(self) -> None:
        """Make sure, before each commit, that this is still held.

        Raises:
            StoreError: this process was paused for so long that another one took the part.
        """
        self._claim.check()

    def close(self) -> None:
        """Let another writer in; closing twice does nothing."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def exclusive(store: Path | Folder, patience_s: float | None = None) -> Iterator[Claim]:
    """Change the header, the manifest or the leases while nobody else does; not to be nested.

    Args:
        patience_s: how long to wait for others; None outlasts one who died.

    Yields:
        The claim, to be checked before what cannot be undone.

    Raises:
        StoreError: others took too long; or the folder cannot be written.
    """
    folder = _folder_of(store)
    try:
        claim = _pass_gate(folder, time.monotonic() + (_PATIENCE_S if patience_s is None else patience_s))
    except StoreError:
        raise
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        yield claim
    finally:
        claim.release()


def live(store: Path | Folder) -> list[Holder]:
    """Who is writing a store now, in the order of their parts."""
    folder = _folder_of(store)
    holders = [_holder(folder, name) for name in _parts(folder) if _is_live(folder, name)]
    return sorted(holders, key=lambda holder: (holder.part.count, holder.part.index))


def _pass_gate(folder: Folder, deadline_s: float) -> Claim:
    """Make the gate that follows the last one, once that one is passed."""
    while True:
        last = max(_gates(folder), default=-1)
        if last < 0 or not _is_live(folder, f"gate-{last}"):
            with suppress(FileExistsError):  # somebody was faster
                claim = Claim(folder, f"gate-{last + 1}")
                try:
                    if _sweep_gates(folder, last):
                        return claim
                except BaseException:
                    claim.remove()
                    raise
                claim.remove()
        elif time.monotonic() > deadline_s:
            holder = _holder(folder, f"gate-{last}")
            raise StoreError(f"{folder} is being changed by another process", seen=holder, fix="Wait for it, or end it")
        time.sleep(_POLL_S)


def _sweep_gates(folder: Folder, last: int) -> bool:
    """Do away with the gates up to `last`; false if there are more than one behind it.

    Others may have passed while this process slept, and swept away what it took for the next.
    """
    gates = _gates(folder)
    if max(gates) > last + 1:
        return False
    for number in gates:
        if number < last:
            _remove(folder, f"gate-{number}")
        elif number == last:  # stays, for those who are listing the folder now; whoever slept there shall learn it
            with suppress(OSError):
                folder.write(f"gate-{last}", _RELEASED)
    return True


def _gates(folder: Folder) -> list[int]:
    return [int(found[1]) for found in map(_GATE.fullmatch, folder.names()) if found]


def _parts(folder: Folder) -> list[str]:
    return sorted(filter(_PART.fullmatch, folder.names()))


def _is_live(folder: Folder, name: str) -> bool:
    """Whether the process that made a file is still at work."""
    try:
        if (content := folder.read(name)) == _RELEASED:
            return False
        is_locked = folder.is_locked(name)
        if is_locked or (is_locked is False and _facts(content).get("machine") == _machine()):
            return is_locked
        return folder.age_s(name) < _DEAD_AFTER_S
    except OSError as error:
        if error.errno in _GONE:
            return False
        raise


def _holder(folder: Folder, name: str) -> Holder:
    """Who made a file, as far as it says."""
    try:
        facts = _facts(folder.read(name))
    except OSError:
        facts = {}
    found = _PART.fullmatch(name)
    part = Part(int(found[1]), int(found[2])) if found else WHOLE
    return Holder(part, facts.get("pid", 0), facts.get("host", ""), facts.get("since", ""))


def _facts(content: bytes) -> dict[str, Any]:
    """What a file says; nothing while it is being made."""
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


@cache
def _machine() -> str:
    """The running kernel, whose processes see each other's locks; containers have names of their own."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _remove(folder: Folder, name: str) -> None:
    with suppress(OSError):  # gone already; or another user's, and a dead file harms nobody
        folder.remove(name)


def _folder_of(store: Path | Folder) -> Folder:
    if isinstance(store, Folder):
        return store
    return (LocalFolder if is_local(store) else UrlFolder)(store / LEASES)


def _no_part(seen: str) -> ConfigError:
    return ConfigError("no part of a store", seen=seen, wanted="i/N with i from 0 to N-1, such as 0/4")


def _in_use(folder: Folder, part: Part, holder: Holder) -> StoreError:
    asked = "all of it" if part == WHOLE else f"part {part}"
    return StoreError(
        f"another extract is writing this store ({folder})",
        seen=holder,
        wanted=f"nobody at {asked}",
        fix="Wait for it, or end it; or give each process a part of its own: --shard 0/N to --shard N-1/N. "
        f"One that died on another machine is forgotten after {_DEAD_AFTER_S:g} s.",
    )


def _unusable(folder: Folder, error: OSError) -> StoreError:
    return StoreError(
        f"{folder} cannot be used: {error}", fix="Writers of a store need a folder that they may write, and free space."
    )
