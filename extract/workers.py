"""Decode processes that can be killed, so that a bad video costs one video.

decord's `get_batch` can spin for ever, deaf to signals and to timers of its own process (decord #373, #375), and
damaged files crash it (#25). So every video is decoded in a child process without torch, which is killed once it has
shown no progress for too long, may take only so much memory, and is replaced now and then, since decoders leak (#1).
Crops come back through shared memory, a few at a time, so that a video may be of any length:

    parent  ── task ──────────▶  worker    a worker holds at most `ahead` tasks: the one in work, and those waiting
    parent  ◀── started ───────  worker    the video's time runs from here
    parent  ◀── part in slot ──  worker    some crops; the time begins anew
    parent  ── slot is free ──▶  worker    the parent has copied them
    parent  ◀── answer ────────  worker    the video is done, or has failed

The parent takes one part of each worker at a time, and a worker without a free slot waits: whoever is slower, neither
side holds more than a few parts.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from ctypes import c_uint8
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..data_manifests.errors import ConfigError
from ..data_manifests.locations import file_size, is_url, location, scratch_folder
from .crops import Picture
from .frames import WHOLE, DecodedVideo, DecodeError, DecodeOptions, SourceError, decode
from .specs import FrameSpec, TransformSpec

_SPAWN = multiprocessing.get_context("spawn")  # decord does not survive a fork (decord #220)
_START_UP_S = 120.0  # to import the decoders from a slow disk
_LONGEST_WAIT_S = 3600.0  # at a stretch: the system takes no infinity
_FAREWELL_S = 5.0  # between a process's last word and its exit code
_STILLBORN = 3  # the environment is broken; fewer may have been killed for want of memory
_BYTES_PER_S = 2 << 20  # a file of this size has one second more to show progress
_SLOTS, _SLOT_CROPS = 3, 32  # parts of a video in shared memory, a worker; crops to a part, at most
_PART_S = 1.0  # a part that is not full after so long is sent: it is progress
_SERVICE_VIDEOS, _SERVICE_BYTES = 1000, 1 << 30  # a worker is replaced after so many videos, or grown by so much
_NEXT_VIDEO = b"\0"  # written between what decoders say of one video and of the next
_LEAST_BYTES = 512 << 20  # decord asks for up to 256 MB in one piece: half of what is allowed, see `_serve`


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


class DecodePool:
    """Decodes videos in worker processes; a context manager.

    Attributes:
        decoding_s: seconds that workers spent on videos, summed over workers.
        waiting_s: seconds that the caller waited for a video.
    """

    def __init__(
        self,
        frames: FrameSpec,
        transform: TransformSpec,
        *,
        workers: int = 2,
        timeout_s: float = 60.0,
        memory_bytes: int = 4 << 30,
        ahead: int = 2,
        options: DecodeOptions = WHOLE,
        decode: Decode = decode,
    ) -> None:
        """Prepare the pool; entering it starts the workers.

        Args:
            workers: processes, of one thread each; 0 decodes in this process, without any protection.
            timeout_s: an attempt that shows no progress for so long is killed; large files have a little more. inf is
                no limit.
            memory_bytes: what a worker may take for one video, besides what it starts with.
            ahead: videos that a worker holds at a time: the one in work, and those waiting.
            options: which damaged or long videos are taken.
            decode: must be importable by its name; it runs in the workers.

        Raises:
            ConfigError: a time limit that is not more than 0, or too little memory to start with.
        """
        if not timeout_s > 0:  # NaN is not
            raise ConfigError("a video needs some time", seen=f"timeout_s={timeout_s}", wanted="more than 0 seconds")
        if memory_bytes < _LEAST_BYTES:
            raise ConfigError(
                "a video needs some memory", seen=_gib(memory_bytes), wanted=f"at least {_gib(_LEAST_BYTES)}"
            )
        self.decoding_s = 0.0
        self.waiting_s = 0.0
        self._frames, self._transform, self._options = frames, transform, options
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._ahead = ahead
        self._decode = decode
        self._n_workers = workers
        self._workers: list[_Worker] = []
        self._scratch = ExitStack()  # the folder of what workers fetch
        self._again: deque[_Task] = deque()  # to be dealt again before anything new
        self._stillborn = 0  # workers lost in a row before their first video

    def __enter__(self) -> Self:
        if self._n_workers:
            _fill_standard_descriptors()
            shape = (self._n_workers, _SLOTS, *self._part_shape)
            # One anonymous file, unlinked at birth: nothing is left behind however a process dies, and where
            # /dev/shm is too small for all slots the standard library takes the folder of temporary files.
            memory: Any = _SPAWN.RawArray(c_uint8, math.prod(shape))
            slots = np.frombuffer(memory, np.uint8).reshape(shape)
            scratch = self._scratch.enter_context(scratch_folder())
            try:
                for number in range(self._n_workers):
                    orders = _Orders(
                        memory, shape, number, self._transform, self._decode, self._memory_bytes, scratch / str(number)
                    )
                    self._workers.append(_Worker(orders, slots[number]))
            except BaseException:
                self._stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def _part_shape(self) -> tuple[int, ...]:
        """The largest part of a video, [n, 3, S, S]."""
        side, n_crops = self._transform.size_px, _SLOT_CROPS
        if self._frames.n_frames is not None:
            n_crops = min(n_crops, self._frames.n_frames * self._frames.n_views)
        return n_crops, 3, side, side

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []
        self._scratch.close()

    def decode(self, jobs: Iterable[Job]) -> Iterator[tuple[str, Chunk | Answer]]:
        """Decode videos; they start in order and come back as they are done: parts of each, then its answer.

        A video that crashes its worker, or runs out of time or memory, is tried once more, by PyAV, where the decoder is
        `auto`.

        Raises:
            RuntimeError: workers die before their first video; the environment is broken. Or the pool was not entered.
        """
        tasks = (_Task(job, self._frames, self._options) for job in jobs)
        if len(self._workers) < self._n_workers:
            raise RuntimeError("the pool has no workers: enter it first, as a context manager")
        if not self._workers:
            for task in tasks:
                for arrival in self._decode_here(task):
                    yield task.job.key, arrival
            return
        for worker in self._workers:
            if worker.tasks:  # of an earlier call whose caller walked away
                worker.restart()
        self._again.clear()
        self._deal(tasks)
        while busy := [worker for worker in self._workers if worker.tasks]:
            arrivals = self._collect(busy)
            self._deal(tasks)  # first, so that the workers have something to do while the caller has
            yield from arrivals

    def _decode_here(self, task: _Task) -> Iterator[Chunk | Answer]:
        """Decode one video in a thread of this process, a few parts ahead of the caller."""
        sink = _QueuedParts(self._part_shape)

        def run() -> None:
            try:
                sink.arrivals.put(_attempt(self._decode, task, self._transform, sink))
            except MemoryError:
                sink.arrivals.put(Failure("out of memory", is_final=False))
            except BaseException as error:  # what would end a process, such as SystemExit
                sink.arrivals.put(error)

        threading.Thread(target=run, name="coldframe-decode", daemon=True).start()
        arrival: Chunk | Answer | BaseException | None = None
        try:
            while not isinstance(arrival, DecodedVideo | Failure):
                began = time.monotonic()
                arrival = sink.arrivals.get()
                self.waiting_s += time.monotonic() - began
                if isinstance(arrival, BaseException):
                    raise arrival
                if isinstance(arrival, Chunk):
                    sink.room.release()
                else:
                    self.decoding_s += arrival.seconds
                yield arrival
        finally:
            sink.close()

    def _deal(self, tasks: Iterator[_Task]) -> None:
        """Give each task to the worker that holds fewest, until all hold enough."""
        while fit := [worker for worker in self._workers if len(worker.tasks) < self._ahead]:
            task = self._again.popleft() if self._again else next(tasks, None)
            if task is None:
                return
            min(fit, key=lambda worker: len(worker.tasks)).send(task)

    def _collect(self, busy: list[_Worker]) -> list[tuple[str, Chunk | Answer]]:
        """Wait until something happens; replace workers that have served, crashed or run out of time or memory."""
        began = time.monotonic()
        deadline = min(worker.deadline_s(self._timeout_s) for worker in busy)
        wait([worker.pipe for worker in busy], timeout=min(max(0.0, deadline - began), _LONGEST_WAIT_S))
        self.waiting_s += time.monotonic() - began

        arrivals: list[tuple[str, Chunk | Answer]] = []
        for worker in busy:
            for task, arrival in worker.hear():
                self.decoding_s += 0.0 if isinstance(arrival, Chunk) else arrival.seconds
                self._stillborn = 0
                arrivals.append((task.job.key, arrival))
            if worker.has_served:
                self._again.extend(worker.tasks)
                worker.restart()
            elif trouble := worker.trouble(self._timeout_s):
                arrivals += self._bury(worker, trouble)
        return arrivals

    def _bury(self, worker: _Worker, trouble: Failure) -> list[tuple[str, Failure]]:
        """Replace a lost worker; blame the video it was at, and deal the others again."""
        innocent = list(worker.tasks)
        guilty = innocent.pop(0) if worker.progress_s is not None else None
        self._stillborn = 0 if worker.is_proven else self._stillborn + 1
        if self._stillborn == _STILLBORN:
            raise RuntimeError(f"decode workers do not start: {trouble.reason}")
        worker.restart()
        self._again.extend(innocent)
        self.decoding_s += trouble.seconds
        if guilty is None:
            return []
        if guilty.frames.decoder == "auto":
            self._again.append(replace(guilty, frames=replace(guilty.frames, decoder="pyav"), attempts=2))
            return []
        return [(guilty.job.key, replace(trouble, attempts=guilty.attempts))]


@dataclass(frozen=True, slots=True)
class _Task:
    """One attempt at one video."""

    job: Job
    frames: FrameSpec
    options: DecodeOptions
    attempts: int = 1


class _Orders(NamedTuple):
    """What a worker process is told at birth."""

    memory: Any
    shape: tuple[int, ...]  # [workers, slots, crops, 3, S, S]
    number: int
    transform: TransformSpec
    decode: Decode
    memory_bytes: int
    scratch: Path  # for what it fetches; gone with the process


class _Worker:
    """The parent's side of one process; the process may be replaced, its slots stay."""

    def __init__(self, orders: _Orders, slots: NDArray[np.uint8]) -> None:
        self._orders = orders
        self._slots = slots  # [slots, crops, 3, S, S]
        self._start()

    def _start(self) -> None:
        """Start a process that has no tasks."""
        self._orders.scratch.mkdir(exist_ok=True)
        self.tasks: deque[_Task] = deque()  # the first is in work, or about to be
        self.progress_s: float | None = None  # when the first task was taken up, or last showed progress
        self.is_proven = False  # whether this process has taken up a task
        self.has_served = False  # whether it takes up no further task
        self._began_s = 0.0  # when the first task was taken up
        self._patience_s = 0.0  # more time for a large file
        self._is_gone = False
        self._ran_out: Failure | None = None  # of memory
        self._waits_since_s = time.monotonic()
        self._words = b""  # the end of what the decoders wrote
        self.pipe, theirs = _SPAWN.Pipe()
        self._noise, their_noise = _SPAWN.Pipe(duplex=False)
        os.set_blocking(self._noise.fileno(), False)
        process = _SPAWN.Process(
            target=_serve, args=(theirs, their_noise, self._orders), name="coldframe-decode", daemon=True
        )
        with _sheltered():
            process.start()
            self._process = process
        theirs.close()  # so that the pipe ends with the process
        their_noise.close()

    def stop(self) -> None:
        """Kill the process: it may be deaf to anything less, and has nothing to lose."""
        with suppress(ValueError):  # it is closed already: Ctrl-C came before its successor
            self._process.kill()
            self._process.join()
            self._process.close()
        self.pipe.close()
        self._noise.close()
        shutil.rmtree(self._orders.scratch, ignore_errors=True)  # the killed could not

    def restart(self) -> None:
        """Replace the process."""
        self.stop()
        self._start()

    def send(self, task: _Task) -> None:
        """Hand over a task."""
        if not self.tasks:
            self._waits_since_s = time.monotonic()
        self.tasks.append(task)
        self._tell(task)

    def hear(self) -> list[tuple[_Task, Chunk | Answer]]:
        """Take what has arrived, up to the first part: a fast worker would keep the parent here for ever."""
        heard: list[tuple[_Task, Chunk | Answer]] = []
        self._listen()
        try:
            while self.pipe.poll():
                match self.pipe.recv():
                    case _Started(at_s, size):
                        self.progress_s = self._began_s = at_s
                        self.is_proven, self._patience_s = True, size / _BYTES_PER_S
                    case _Filled(slot, first, n_crops):
                        heard.append((self.tasks[0], Chunk(first, self._slots[slot, :n_crops].copy())))
                        self.progress_s = time.monotonic()
                        self._tell(slot)
                        break
                    case _Done(answer, is_last):
                        heard.append((self.tasks.popleft(), answer))
                        self.has_served = is_last
                        self.progress_s, self._waits_since_s = None, time.monotonic()
                    case Failure() as failure:
                        self._ran_out = failure
                        break
        except (EOFError, OSError):
            self._is_gone = True
        return heard

    def deadline_s(self, timeout_s: float) -> float:
        """When the process must have answered, shown progress, or taken up its first task."""
        if self.progress_s is None:
            return self._waits_since_s + _START_UP_S
        return self.progress_s + timeout_s + self._patience_s

    def trouble(self, timeout_s: float) -> Failure | None:
        """Why the process must be replaced; None while all is well."""
        spent_s = 0.0 if self.progress_s is None else time.monotonic() - self._began_s
        if self._ran_out:
            return replace(self._ran_out, seconds=spent_s)
        if self._is_gone:
            self._process.join(_FAREWELL_S)
            self._listen()
            code = self._process.exitcode
            cause = f"crashed (signal {-code})" if code is not None and code < 0 else f"exited (code {code})"
            last_words = (
                self._words.rpartition(_NEXT_VIDEO)[2].decode(errors="replace").strip().rpartition("\n")[2][:200]
            )
            if last_words.endswith(("MemoryError", "std::bad_alloc", "Cannot allocate memory")):
                return replace(_out_of_memory(self._orders.memory_bytes), seconds=spent_s)
            was_killed = code == -signal.SIGKILL  # by the system, for want of memory
            reason = f"decoder {cause}" + (f": {last_words}" if last_words else "")
            return Failure(reason, is_final=not was_killed, seconds=spent_s)
        if time.monotonic() < self.deadline_s(timeout_s):
            return None
        reason = f"timed out after {timeout_s + self._patience_s:g} s"
        if self.progress_s is None:
            return Failure("no sign of life", seconds=spent_s)
        return Failure(
            reason, is_final=not is_url(self.tasks[0].job.path), seconds=spent_s
        )  # a network may be to blame

    def _tell(self, message: object) -> None:
        with suppress(OSError):  # the process is gone: `hear` will find out
            self.pipe.send(message)

    def _listen(self) -> None:
        """Keep the end of what the decoders wrote; read once, since one that never stops would be heard for ever."""
        with suppress(BlockingIOError):
            self._words = (self._words + os.read(self._noise.fileno(), 1 << 20))[-4096:]


class _Started(NamedTuple):
    """The first task was taken up; its file has so many bytes."""

    at_s: float
    size: int


class _Filled(NamedTuple):
    """A slot holds crops of the first task, `first` having come before."""

    slot: int
    first: int
    n_crops: int


class _Done(NamedTuple):
    """The first task is done."""

    answer: Answer
    is_last: bool  # the process takes up no other, and is to be replaced


def _fill_standard_descriptors() -> None:
    """Leave none of 0, 1 and 2 closed: a pipe would take its number, and a worker would write its noise there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


@contextmanager
def _sheltered() -> Iterator[None]:
    """Start a process that Ctrl-C does not reach, and that does not run the user's script again.

    `spawn` imports the parent's main module into the child: a script that imports torch would slow each worker down by
    seconds, and one without `if __name__ == "__main__"` would never get past its start.
    """
    resource_tracker.ensure_running()  # now, since its start unblocks signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it; this process handles it
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _serve(pipe: Connection, noise: Connection, orders: _Orders) -> None:
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
            pipe.send(_Started(began_s, 0))  # before anything that a disk can hold up
            if size := _size(task.job.path):
                pipe.send(_Started(began_s, size))
            with suppress(BlockingIOError):
                os.write(2, _NEXT_VIDEO)
            sink = _SharedParts(slots, inbox)
            answer: Answer | None = None
            with suppress(MemoryError):
                answer = _attempt(orders.decode, task, orders.transform, sink)
            sink.release()
            # FFmpeg's decoders call it damage where an allocation has failed, or skip frames; more than half was in use.
            is_short = _peak_bytes() > born_bytes + orders.memory_bytes // 2
            if answer is None or (is_short and _is_damaged(answer)):
                pipe.send(_out_of_memory(orders.memory_bytes))
                return
            n_done += 1
            has_leaked = _memory_bytes() > born_bytes + min(_SERVICE_BYTES, orders.memory_bytes // 2)
            is_last = is_short or has_leaked or n_done >= _SERVICE_VIDEOS
            pipe.send(_Done(answer, is_last))
            if is_last:
                return


class _Inbox:
    """What a worker hears: tasks, and numbers of slots that the parent has emptied."""

    def __init__(self, pipe: Connection, n_slots: int) -> None:
        self.pipe = pipe
        self.free = deque(range(n_slots))
        self._tasks: deque[_Task] = deque()

    def task(self) -> _Task:
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
        if isinstance(message, _Task):
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
        self._inbox.pipe.send(_Filled(self._slot, chunk.first, len(chunk.crops)))

    def release(self) -> None:
        """Keep a slot that was taken and not sent, for the next video."""
        if self._part is not None:
            self._inbox.free.append(self._slot)


class _QueuedParts(_Parts):
    """Sends parts to another thread."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.arrivals: queue.SimpleQueue[Chunk | Answer | BaseException] = queue.SimpleQueue()
        self.room = threading.Semaphore(_SLOTS)
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


def _out_of_memory(limit_bytes: int) -> Failure:
    return Failure(f"out of memory: a worker may take {_gib(limit_bytes)} for a video", is_final=False)


def _gib(n_bytes: int) -> str:
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


def _attempt(decode: Decode, task: _Task, transform: TransformSpec, sink: _Parts) -> Answer:
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
