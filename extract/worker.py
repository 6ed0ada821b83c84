"""What runs in a decode process, and what the two sides say to each other. `workers.py` is the side of the parent."""

from __future__ import annotations

import multiprocessing
import os
import queue
import resource
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data_manifests.errors import ConfigError
from ..data_manifests.locations import file_size, location
from .crops import Picture
from .frames import DecodedVideo, DecodeError, DecodeOptions, SourceError
from .specs import FrameSpec, TransformSpec

SLOTS = 3  # parts of a video in shared memory, a worker
NEXT_VIDEO = b"\0"  # written between what decoders say of one video and of the next
_PART_S = 1.0  # a part that is not full after so long is sent: it is progress
_SERVICE_VIDEOS, _SERVICE_BYTES = 1000, 1 << 30  # a worker is replaced after so many videos, or grown by so much


class Job(NamedTuple):
    """One video to decode."""

    key: str
    path: str
    start_s: float | None = None
    end_s: float | None = None
    views: tuple[int, ...] | None = None  # None: all


class Chunk(NamedTuple):
    """Some crops of a video."""

    first: int  # how many came before; 0 begins the video, or begins it again
    crops: NDArray[np.uint8]  # [n, 3, S, S]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a video has no frames."""

    reason: str  # `category` or `category: detail`
    attempts: int = 1
    is_final: bool = True  # False where another try may find it mended: the disk, the memory
    seconds: float = 0.0


Decode = Callable[..., DecodedVideo]  # `frames.decode`, or another of its signature
Answer = DecodedVideo | Failure


@dataclass(frozen=True, slots=True)
class Task:
    """One attempt at one video."""

    job: Job
    frames: FrameSpec
    options: DecodeOptions
    attempts: int = 1


class Orders(NamedTuple):
    """What a worker process is told at birth."""

    memory: Any
    shape: tuple[int, ...]  # [workers, slots, crops, 3, S, S]
    number: int
    transform: TransformSpec
    decode: Decode
    memory_bytes: int
    scratch: Path  # for what it fetches; gone with the process


class Started(NamedTuple):
    """The first task was taken up; its file has so many bytes."""

    at_s: float
    size: int


class Filled(NamedTuple):
    """A slot holds crops of the first task, `first` having come before."""

    slot: int
    first: int
    n_crops: int


class Done(NamedTuple):
    """The first task is done."""

    answer: Answer
    is_last: bool  # the process takes up no other, and is to be replaced


def serve(pipe: Connection, noise: Connection, orders: Orders) -> None:
    """Be a worker process: decode tasks until the parent closes the pipe, or dies."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tempfile.tempdir = str(orders.scratch)
    os.set_blocking(noise.fileno(), False)  # what nobody reads is dropped, never waited for
    for descriptor in (1, 2):  # not sys.stdout and sys.stderr, which may be closed
        os.dup2(noise.fileno(), descriptor)
    born_bytes, n_done = _memory_bytes(), 0
    _limit_memory(born_bytes + orders.memory_bytes)
    slots = np.frombuffer(orders.memory, np.uint8).reshape(orders.shape)[orders.number]  # [slots, crops, 3, S, S]
    inbox = _Inbox(pipe, len(slots))
    with suppress(EOFError):
        while True:
            task = inbox.task()
            began_s = time.monotonic()
            pipe.send(Started(began_s, 0))  # before anything that a disk can hold up
            if size := _size(task.job.path):
                pipe.send(Started(began_s, size))
            with suppress(BlockingIOError):
                os.write(2, NEXT_VIDEO)
            sink = _SharedParts(slots, inbox)
            answer: Answer | None = None
            with suppress(MemoryError):
                answer = attempt(orders.decode, task, orders.transform, sink)
            sink.release()
            # FFmpeg's decoders call it damage where an allocation has failed, or skip frames; more than half was in use.
            is_short = _peak_bytes() > born_bytes + orders.memory_bytes // 2
            if answer is None or (is_short and _is_damaged(answer)):
                pipe.send(out_of_memory(orders.memory_bytes))
                return
            n_done += 1
            has_leaked = _memory_bytes() > born_bytes + min(_SERVICE_BYTES, orders.memory_bytes // 2)
            is_last = is_short or has_leaked or n_done >= _SERVICE_VIDEOS
            pipe.send(Done(answer, is_last))
            if is_last:
                return


class _Inbox:
    """What a worker hears: tasks, and numbers of slots that the parent has emptied."""

    def __init__(self, pipe: Connection, n_slots: int) -> None:
        self.pipe = pipe
        self.free = deque(range(n_slots))
        self._tasks: deque[Task] = deque()

    def task(self) -> Task:
        """The next task; raises EOFError when the parent has closed the pipe."""
        while not self._tasks:
            self._hear()
        return self._tasks.popleft()

    def slot(self) -> int:
        """A slot that the parent has emptied."""
        while not self.free:
            self._hear()
        return self.free.popleft()

    def _hear(self) -> None:
        message = self.pipe.recv()
        if isinstance(message, Task):
            self._tasks.append(message)
        else:
            self.free.append(message)


class _Parts(ABC):
    """A sink that gathers crops into parts and sends each as soon as it is full, or has been long in the making."""

    def __init__(self) -> None:
        self.n_crops = 0  # of the video so far
        self.waited_s = 0.0  # for room
        self._part: NDArray[np.uint8] | None = None  # being filled, [n, 3, S, S]
        self._n_filled = 0
        self._sent_s = time.monotonic()

    def restart(self) -> None:
        """Begin the video again."""
        self.n_crops = self._n_filled = 0

    def put(self, crop: Picture) -> None:
        """Take the next crop [3, S, S]."""
        if self._part is None:
            began = time.monotonic()
            self._part = self._room()
            waited_s = time.monotonic() - began
            self.waited_s += waited_s
            self._sent_s += waited_s
        self._part[self._n_filled] = crop
        self._n_filled += 1
        self.n_crops += 1
        if self._n_filled == len(self._part) or time.monotonic() > self._sent_s + _PART_S:
            self.flush()

    def flush(self) -> None:
        """Send what has come."""
        if self._part is not None and self._n_filled:
            self._send(Chunk(self.n_crops - self._n_filled, self._part[: self._n_filled]))
            self._part, self._n_filled, self._sent_s = None, 0, time.monotonic()

    @abstractmethod
    def _room(self) -> NDArray[np.uint8]:
        """Wait for room for a part, [n, 3, S, S]."""

    @abstractmethod
    def _send(self, chunk: Chunk) -> None:
        """Pass on the part that was filled."""


class _SharedParts(_Parts):
    """Sends parts through shared memory."""

    def __init__(self, slots: NDArray[np.uint8], inbox: _Inbox) -> None:
        super().__init__()
        self._slots, self._inbox = slots, inbox
        self._slot = 0

    def _room(self) -> NDArray[np.uint8]:
        self._slot = self._inbox.slot()
        return self._slots[self._slot]

    def _send(self, chunk: Chunk) -> None:
        self._inbox.pipe.send(Filled(self._slot, chunk.first, len(chunk.crops)))

    def release(self) -> None:
        """Keep a slot that was taken and not sent, for the next video."""
        if self._part is not None:
            self._inbox.free.append(self._slot)


class QueuedParts(_Parts):
    """Sends parts to another thread."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.arrivals: queue.SimpleQueue[Chunk | Answer | BaseException] = queue.SimpleQueue()
        self.room = threading.Semaphore(SLOTS)
        self._shape = shape
        self._is_closed = False

    def _room(self) -> NDArray[np.uint8]:
        self.room.acquire()
        if self._is_closed:
            raise DecodeError("nobody waits for this video any more")
        return np.empty(self._shape, np.uint8)

    def _send(self, chunk: Chunk) -> None:
        self.arrivals.put(chunk)

    def close(self) -> None:
        """Take no further part, so that the decoder comes to its end."""
        self._is_closed = True
        self.room.release()


def out_of_memory(limit_bytes: int) -> Failure:
    """What is said of a video for which a worker may not take enough."""
    return Failure(f"out of memory: a worker may take {gib(limit_bytes)} for a video", is_final=False)


def gib(n_bytes: int) -> str:
    """Bytes for people."""
    return f"{n_bytes / 2**30:.3g} GiB"


def _is_damaged(answer: Answer) -> bool:
    """Whether the video, or part of it, is missing."""
    return answer.is_final if isinstance(answer, Failure) else answer.kept < 1


def _limit_memory(n_bytes: int) -> None:
    """Let an allocation beyond so much private memory fail, instead of taking the machine down; only Linux obeys."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = min(n_bytes, sys.maxsize if most == resource.RLIM_INFINITY else most)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, most))


def _memory_bytes() -> int:
    """Private memory of this process, as its limit counts it."""
    try:
        with open("/proc/self/statm") as file:  # noqa: PTH123 - after every video
            return int(file.read().split()[5]) * resource.getpagesize()
    except OSError:  # not Linux: the peak, in KiB or, on macOS, bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _peak_bytes() -> int:
    """The most memory that was ever resident; 0 where no limit is obeyed. `ru_maxrss` may be that of the parent."""
    with suppress(OSError), open("/proc/self/status") as file:  # noqa: PTH123 - as above
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")), 0)
    return 0


def _size(path: str) -> int:
    try:
        return file_size(location(path))
    except (OSError, ConfigError):
        return 0


def _die_with_parent() -> None:
    """End this process as soon as the parent is gone, whatever the decoder is doing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def attempt(decode: Decode, task: Task, transform: TransformSpec, sink: _Parts) -> Answer:
    """Decode one video; whatever goes wrong becomes its reason, except that memory is short."""
    job, began = task.job, time.monotonic()
    where = {"key": job.key, "start_s": job.start_s, "end_s": job.end_s, "views": job.views}
    try:
        video = decode(job.path, task.frames, transform, sink, **where, options=task.options)
        sink.flush()
        n_wanted = int(video.rows.max(initial=-1)) + 1
        if video.rows.size and sink.n_crops == n_wanted:
            return replace(video, seconds=time.monotonic() - began - sink.waited_s)
        reason, is_final = f"decoder gave {sink.n_crops} of {n_wanted} crops", True
    except DecodeError as error:
        reason, is_final = error.reason, not isinstance(error, SourceError)
    except MemoryError:
        raise
    except Exception as error:  # the one place that catches all: one video in one process
        reason, is_final = f"{type(error).__name__}: {error}".partition("\n")[0][:300], True
    return Failure(reason, task.attempts, is_final, time.monotonic() - began - sink.waited_s)
