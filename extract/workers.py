"""Decode processes that can be killed, so that a bad video costs one video.

decord's `get_batch` can spin for ever, deaf to signals and to timers of its own process (decord #373, #375), and
damaged files crash it (#25). So every video is decoded in a child process without torch, which is killed once it has
shown no progress for too long, may take only so much memory, and is replaced now and then, since decoders leak (#1).
Crops come back through shared memory, a few at a time, so that a video may be of any length:

    parent  ── task ──────────▶  worker    a worker holds at most `ahead` tasks: the one in work, and those waiting
    parent  ◀── started ───────  worker    the video's time runs from here
    parent  ◀── part in slot ──  worker    up to `slot_crops` crops; the time begins anew
    parent  ── slot is free ──▶  worker    the parent has copied them
    parent  ◀── answer ────────  worker    the video is done, or has failed
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
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
from .frames import WHOLE, Crops, DecodedVideo, DecodeError, DecodeOptions, Sink, SourceError, decode
from .specs import FrameSpec, TransformSpec

_SPAWN = multiprocessing.get_context("spawn")  # decord does not survive a fork (decord #220)
_START_UP_S = 120.0  # to import the decoders from a slow disk
_LONGEST_WAIT_S = 3600.0  # at a stretch: the system takes no infinity
_FAREWELL_S = 5.0  # between a process's last word and its exit code
_STILLBORN = 3  # the environment is broken; fewer may have been killed for want of memory
_BYTES_PER_S = 2 << 20  # a file of this size has one second more to show progress
_SLOTS, _SLOT_CROPS = 3, 32  # parts of a video in shared memory, a worker; crops to a part, at most
_SERVICE_VIDEOS, _SERVICE_BYTES = 1000, 1 << 30  # a worker is replaced after so many videos, or grown by so much


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
            ConfigError: a time limit that is not more than 0.
        """
        if not timeout_s > 0:  # NaN is not
            raise ConfigError("a video needs some time", seen=f"timeout_s={timeout_s}", wanted="more than 0 seconds")
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
        side, n_crops = self._transform.size_px, _SLOT_CROPS
        if self._frames.n_frames is not None:
            n_crops = min(n_crops, self._frames.n_frames * self._frames.n_views)
        shape = (self._n_workers, _SLOTS, n_crops, 3, side, side)
        if self._n_workers:
            _fill_standard_descriptors()
            # One anonymous file, unlinked at birth: nothing is left behind however a process dies, and where
            # /dev/shm is too small for all slots the standard library takes the folder of temporary files.
            memory: Any = _SPAWN.RawArray(c_uint8, math.prod(shape))
            slots = np.frombuffer(memory, np.uint8).reshape(shape)
            scratch = self._scratch.enter_context(scratch_folder())
            self._workers = [
                _Worker(
                    _Orders(
                        memory, shape, number, self._transform, self._decode, self._memory_bytes, scratch / str(number)
                    ),
                    slots[number],
                )
                for number in range(self._n_workers)
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []
        self._scratch.close()

    def decode(self, jobs: Iterable[Job]) -> Iterator[tuple[str, Chunk | Answer]]:
        """Decode videos; they start in order and come back as they are done: parts of each, then its answer.

        A video that crashes its worker or runs out of time is tried once more, by PyAV, where the decoder is `auto`.

        Raises:
            RuntimeError: workers die before their first video; the environment is broken.
        """
        tasks = (_Task(job, self._frames, self._options) for job in jobs)
        if not self._workers:
            for task in tasks:
                crops = Crops()
                answer = _attempt(self._decode, task, self._transform, crops)
                self.decoding_s += answer.seconds
                if isinstance(answer, DecodedVideo):
                    yield task.job.key, Chunk(0, np.stack(crops))
                yield task.job.key, answer
            return
        for worker in self._workers:
            if worker.tasks:  # of an earlier call whose caller walked away
                worker.restart()
        self._again.clear()
        self._deal(tasks)
        while busy := [worker for worker in self._workers if worker.tasks]:
            answers = self._collect(busy)
            self._deal(tasks)  # first, so that the workers have something to do while the caller has
            yield from answers

    def _deal(self, tasks: Iterator[_Task]) -> None:
        """Give each task to the worker that holds fewest, until all hold enough; replace those that have served."""
        for worker in self._workers:
            if worker.has_served and not worker.tasks:
                worker.restart()
        while fit := [w for w in self._workers if not w.has_served and len(w.tasks) < self._ahead]:
            task = self._again.popleft() if self._again else next(tasks, None)
            if task is None:
                return
            min(fit, key=lambda w: len(w.tasks)).send(task)

    def _collect(self, busy: list[_Worker]) -> list[tuple[str, Chunk | Answer]]:
        """Wait until something happens; bury workers that crashed or ran out of time."""
        began = time.monotonic()
        deadline = min(worker.deadline_s(self._timeout_s) for worker in busy)
        wait([worker.pipe for worker in busy], timeout=min(max(0.0, deadline - began), _LONGEST_WAIT_S))
        self.waiting_s += time.monotonic() - began

        answers: list[tuple[str, Chunk | Answer]] = []
        for worker in busy:
            for task, answer in worker.hear():
                self.decoding_s += 0.0 if isinstance(answer, Chunk) else answer.seconds
                answers.append((task.job.key, answer))
            if trouble := worker.trouble(self._timeout_s):
                answers += self._bury(worker, trouble)
        return answers

    def _bury(self, worker: _Worker, trouble: Failure) -> list[tuple[str, Failure]]:
        """Replace a lost worker; blame the video it was at, and deal the others again."""
        innocent = list(worker.tasks)
        guilty = innocent.pop(0) if worker.progress_s is not None else None
        self._stillborn = 0 if worker.is_proven else self._stillborn + 1
        if self._stillborn == _STILLBORN:
            raise RuntimeError(f"decode workers do not start: {trouble.reason}")
        worker.restart()
        self._again.extend(innocent)
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
        self.has_served = False  # whether it is time to replace it
        self._n_done = 0
        self._patience_s = 0.0  # more time for a large file
        self._is_gone = False
        self._waits_since_s = time.monotonic()
        self._words = b""  # the end of what the decoders wrote since the last answer
        self.pipe, theirs = _SPAWN.Pipe()
        self._noise, their_noise = _SPAWN.Pipe(duplex=False)
        os.set_blocking(self._noise.fileno(), False)
        self._process = _SPAWN.Process(
            target=_serve, args=(theirs, their_noise, self._orders), name="coldframe-decode", daemon=True
        )
        with _sheltered():
            self._process.start()
        theirs.close()  # so that the pipe ends with the process
        their_noise.close()

    def stop(self) -> None:
        """Kill the process: it may be deaf to anything less, and has nothing to lose."""
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
        """Take the parts and answers that have arrived."""
        heard: list[tuple[_Task, Chunk | Answer]] = []
        self._listen()
        try:
            while self.pipe.poll():
                match self.pipe.recv():
                    case _Started(at_s, size):
                        self.progress_s, self.is_proven, self._patience_s = at_s, True, size / _BYTES_PER_S
                    case _Filled(slot, first, n_crops):
                        heard.append((self.tasks[0], Chunk(first, self._slots[slot, :n_crops].copy())))
                        self.progress_s = time.monotonic()
                        self._tell(slot)
                    case _Done(answer, grown_bytes):
                        heard.append((self.tasks.popleft(), answer))
                        self.progress_s, self._waits_since_s, self._words = None, time.monotonic(), b""
                        self._n_done += 1
                        self.has_served = self._n_done >= _SERVICE_VIDEOS or grown_bytes > _SERVICE_BYTES
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
        if self._is_gone:
            self._process.join(_FAREWELL_S)
            self._listen()
            code = self._process.exitcode
            cause = f"crashed (signal {-code})" if code is not None and code < 0 else f"exited (code {code})"
            last_words = self._words.decode(errors="replace").strip().rpartition("\n")[2][:200]
            was_killed = code == -signal.SIGKILL  # by the system, for want of memory
            return Failure(f"decoder {cause}" + (f": {last_words}" if last_words else ""), is_final=not was_killed)
        if time.monotonic() < self.deadline_s(timeout_s):
            return None
        reason = f"timed out after {timeout_s + self._patience_s:g} s"
        if self.progress_s is None:
            return Failure("no sign of life")
        return Failure(reason, is_final=not is_url(self.tasks[0].job.path))  # a network may be to blame

    def _tell(self, message: object) -> None:
        with suppress(OSError):  # the process is gone: `hear` will find out
            self.pipe.send(message)

    def _listen(self) -> None:
        """Keep the end of what the decoders wrote."""
        with suppress(BlockingIOError):
            while heard := os.read(self._noise.fileno(), 1 << 16):
                self._words = (self._words + heard)[-4096:]


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
    """The first task is done; the process has grown by so much since it began to work."""

    answer: Answer
    grown_bytes: int


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
    born_bytes = _memory_bytes()
    _limit_memory(orders.memory_bytes)
    slots = np.frombuffer(orders.memory, np.uint8).reshape(orders.shape)[orders.number]  # [slots, crops, 3, S, S]
    inbox = _Inbox(pipe, len(slots))
    with suppress(EOFError):
        while True:
            task = inbox.task()
            pipe.send(_Started(time.monotonic(), 0))  # first: a server that is asked for the size may be slow
            pipe.send(_Started(time.monotonic(), _size(task.job.path)))
            sink = _SharedSink(slots, inbox)
            answer = _attempt(orders.decode, task, orders.transform, sink)
            if isinstance(answer, DecodedVideo):
                sink.flush()
            sink.release()
            pipe.send(_Done(answer, _memory_bytes() - born_bytes))


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


class _SharedSink:
    """Puts crops into shared memory and tells the parent of each full slot."""

    def __init__(self, slots: NDArray[np.uint8], inbox: _Inbox) -> None:
        self._slots, self._inbox = slots, inbox
        self._slot: int | None = None  # being filled
        self._first = self._n_crops = 0

    def restart(self) -> None:
        """Begin the video again."""
        self._first = self._n_crops = 0

    def put(self, crop: Picture) -> None:
        """Take the next crop [3, S, S]."""
        if self._slot is None:
            self._slot = self._inbox.slot()
        self._slots[self._slot, self._n_crops] = crop
        self._n_crops += 1
        if self._n_crops == self._slots.shape[1]:
            self.flush()

    def flush(self) -> None:
        """Send what has come."""
        if self._slot is not None and self._n_crops:
            self._inbox.pipe.send(_Filled(self._slot, self._first, self._n_crops))
            self._first, self._n_crops, self._slot = self._first + self._n_crops, 0, None

    def release(self) -> None:
        """Keep a slot that was taken and not sent, for the next video."""
        if self._slot is not None:
            self._inbox.free.append(self._slot)


def _limit_memory(n_bytes: int) -> None:
    """Let an allocation beyond so much more than now fail, instead of taking the machine down."""
    with suppress(ValueError, OSError):  # a lower limit is set already
        used = _memory_bytes(field=5)  # data and stack
        resource.setrlimit(resource.RLIMIT_DATA, (used + n_bytes, resource.RLIM_INFINITY))


def _memory_bytes(field: int = 1) -> int:
    """Memory of this process: what is resident, or another field of /proc/self/statm."""
    try:
        with open("/proc/self/statm") as file:  # noqa: PTH123 - after every video
            return int(file.read().split()[field]) * resource.getpagesize()
    except OSError:  # not Linux: the peak, in KiB or, on macOS, bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


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


def _attempt(decode: Decode, task: _Task, transform: TransformSpec, sink: Sink) -> Answer:
    """Decode one video; whatever goes wrong becomes its reason."""
    job, began = task.job, time.perf_counter()
    where = {"key": job.key, "start_s": job.start_s, "end_s": job.end_s, "views": job.views}
    try:
        video = decode(job.path, task.frames, transform, sink, **where, options=task.options)
        return replace(video, seconds=time.perf_counter() - began)
    except DecodeError as error:
        reason, is_final = error.reason, not isinstance(error, SourceError)
    except MemoryError:
        reason, is_final = "out of memory", False
    except Exception as error:  # the one place that catches all: one video in one process
        reason, is_final = f"{type(error).__name__}: {error}".partition("\n")[0][:300], True
    return Failure(reason, task.attempts, is_final, time.perf_counter() - began)
