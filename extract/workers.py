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
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from ctypes import c_uint8
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..data_manifests.errors import ConfigError
from ..data_manifests.locations import is_url, scratch_folder
from .frames import WHOLE, DecodedVideo, DecodeOptions, decode
from .specs import FrameSpec, TransformSpec
from .worker import (
    NEXT_VIDEO,
    SLOTS,
    Answer,
    Chunk,
    Decode,
    Done,
    Failure,
    Filled,
    Job,
    Orders,
    QueuedParts,
    Started,
    Task,
    attempt,
    gib,
    out_of_memory,
    serve,
)  # fmt: skip

__all__ = ["Answer", "Chunk", "DecodePool", "Failure", "Job", "cores"]

_SPAWN = multiprocessing.get_context("spawn")  # decord does not survive a fork (decord #220)
_START_UP_S = 120.0  # to import the decoders from a slow disk
_LONGEST_WAIT_S = 3600.0  # at a stretch: the system takes no infinity
_FAREWELL_S = 5.0  # between a process's last word and its exit code
_STILLBORN = 3  # the environment is broken; fewer may have been killed for want of memory
_SLOT_CROPS = 32  # to a part, at most
_BYTES_PER_S = 2 << 20  # a file of this size has one second more to show progress
_LEAST_BYTES = 512 << 20  # decord asks for up to 256 MB in one piece: half of what is allowed, see `serve`


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
                "a video needs some memory", seen=gib(memory_bytes), wanted=f"at least {gib(_LEAST_BYTES)}"
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
        self._again: deque[Task] = deque()  # to be dealt again before anything new
        self._stillborn = 0  # workers lost in a row before their first video

    def __enter__(self) -> Self:
        if self._n_workers:
            _fill_standard_descriptors()
            shape = (self._n_workers, SLOTS, *self._part_shape)
            # One anonymous file, unlinked at birth: nothing is left behind however a process dies, and where
            # /dev/shm is too small for all slots the standard library takes the folder of temporary files.
            memory: Any = _SPAWN.RawArray(c_uint8, math.prod(shape))
            slots = np.frombuffer(memory, np.uint8).reshape(shape)
            scratch = self._scratch.enter_context(scratch_folder())
            try:
                for number in range(self._n_workers):
                    orders = Orders(
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
        tasks = (Task(job, self._frames, self._options) for job in jobs)
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

    def _decode_here(self, task: Task) -> Iterator[Chunk | Answer]:
        """Decode one video in a thread of this process, a few parts ahead of the caller."""
        sink = QueuedParts(self._part_shape)

        def run() -> None:
            try:
                sink.arrivals.put(attempt(self._decode, task, self._transform, sink))
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

    def _deal(self, tasks: Iterator[Task]) -> None:
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


class _Worker:
    """The parent's side of one process; the process may be replaced, its slots stay."""

    def __init__(self, orders: Orders, slots: NDArray[np.uint8]) -> None:
        self._orders = orders
        self._slots = slots  # [slots, crops, 3, S, S]
        self._start()

    def _start(self) -> None:
        """Start a process that has no tasks."""
        self._orders.scratch.mkdir(exist_ok=True)
        self.tasks: deque[Task] = deque()  # the first is in work, or about to be
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
            target=serve, args=(theirs, their_noise, self._orders), name="coldframe-decode", daemon=True
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

    def send(self, task: Task) -> None:
        """Hand over a task."""
        if not self.tasks:
            self._waits_since_s = time.monotonic()
        self.tasks.append(task)
        self._tell(task)

    def hear(self) -> list[tuple[Task, Chunk | Answer]]:
        """Take what has arrived, up to the first part: a fast worker would keep the parent here for ever."""
        heard: list[tuple[Task, Chunk | Answer]] = []
        self._listen()
        try:
            while self.pipe.poll():
                match self.pipe.recv():
                    case Started(at_s, size):
                        self.progress_s = self._began_s = at_s
                        self.is_proven, self._patience_s = True, size / _BYTES_PER_S
                    case Filled(slot, first, n_crops):
                        heard.append((self.tasks[0], Chunk(first, self._slots[slot, :n_crops].copy())))
                        self.progress_s = time.monotonic()
                        self._tell(slot)
                        break
                    case Done(answer, is_last):
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
                self._words.rpartition(NEXT_VIDEO)[2].decode(errors="replace").strip().rpartition("\n")[2][:200]
            )
            if last_words.endswith(("MemoryError", "std::bad_alloc", "Cannot allocate memory")):
                return replace(out_of_memory(self._orders.memory_bytes), seconds=spent_s)
            was_killed = code == -signal.SIGKILL  # by the system, for want of memory
            reason = f"decoder {cause}" + (f": {last_words}" if last_words else "")
            return Failure(reason, is_final=not was_killed and code != 1, seconds=spent_s)
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
