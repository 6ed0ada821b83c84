"""Decode processes that can be killed, so that a bad video costs one video.

decord's `get_batch` can spin for ever, deaf to signals and to timers of its own process (decord #373, #375), and
damaged files crash it (#25). So every video is decoded in a child process without torch, which is killed once the video
has had its time. Pixels come back through shared memory:

    parent  ── task, slot ──▶  worker    a worker holds at most `ahead` tasks, each with a slot for its pixels
    parent  ◀── started ─────  worker    the video's time runs from here
    parent  ◀── answer ──────  worker    the parent copies the slot and gives it to the next task
"""

from __future__ import annotations

import math
import multiprocessing
import os
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
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..data_manifests.errors import ConfigError
from ..data_manifests.locations import is_transient, scratch_folder
from .frames import DecodedVideo, DecodeError, decode
from .specs import FrameSpec, TransformSpec

_SPAWN = multiprocessing.get_context("spawn")  # decord does not survive a fork (decord #220)
_START_UP_S = 120.0  # to import the decoders from a slow disk
_LONGEST_WAIT_S = 3600.0  # at a stretch: the system takes no infinity
_FAREWELL_S = 5.0  # between a process's last word and its exit code
_STILLBORN = 3  # the environment is broken; fewer may have been killed for want of memory
_IN_SLOT = np.empty(0, np.uint8)  # stands for pixels that lie in shared memory

Job = tuple[str, str, float | None, float | None]  # key, path, start_s, end_s
Decode = Callable[[str, FrameSpec, TransformSpec, float | None, float | None], DecodedVideo]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a video has no frames."""

    reason: str  # `category` or `category: detail`
    attempts: int = 1
    is_transient: bool = False  # a network or a server is at fault, not the video


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
        ahead: int = 2,
        decode: Decode = decode,
    ) -> None:
        """Prepare the pool; entering it starts the workers.

        Args:
            workers: processes, of one thread each; 0 decodes in this process, without any protection.
            timeout_s: time limit of one attempt at one video, whatever its length; inf is no limit.
            ahead: videos that a worker holds at a time: the one in work, and those waiting.
            decode: must be importable by its name; it runs in the workers.

        Raises:
            ConfigError: a time limit that is not more than 0.
        """
        if not timeout_s > 0:  # NaN is not
            raise ConfigError("a video needs some time", seen=f"timeout_s={timeout_s}", wanted="more than 0 seconds")
        self.decoding_s = 0.0
        self.waiting_s = 0.0
        self._frames = frames
        self._transform = transform
        self._timeout_s = timeout_s
        self._ahead = ahead
        self._decode = decode
        self._n_workers = workers
        self._workers: list[_Worker] = []
        self._scratch = ExitStack()  # the folder of what workers fetch
        self._again: deque[_Task] = deque()  # to be dealt again before anything new
        self._stillborn = 0  # workers lost in a row before their first video

    def __enter__(self) -> Self:
        side = self._transform.size_px
        shape = (self._n_workers, self._ahead, self._frames.n_frames, 3, side, side)
        if self._n_workers:
            _fill_standard_descriptors()
            # One anonymous file, unlinked at birth: nothing is left behind however a process dies, and where
            # /dev/shm is too small for all slots the standard library takes the folder of temporary files.
            memory: Any = _SPAWN.RawArray(c_uint8, math.prod(shape))
            slots = np.frombuffer(memory, np.uint8).reshape(shape)
            scratch = self._scratch.enter_context(scratch_folder())
            self._workers = [
                _Worker((memory, shape, number, self._transform, self._decode), slots[number], scratch / str(number))
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

    def decode(self, jobs: Iterable[Job]) -> Iterator[tuple[str, DecodedVideo | Failure]]:
        """Decode (key, path, start_s, end_s) jobs; they start in order and come back as they are done.

        A video that crashes its worker or runs out of time is tried once more, by PyAV, where the decoder is `auto`.

        Raises:
            RuntimeError: workers die before their first video; the environment is broken.
        """
        tasks = (_Task(*job, self._frames) for job in jobs)
        if not self._workers:
            for task in tasks:
                answer, seconds = _attempt(self._decode, task, self._transform)
                self.decoding_s += seconds
                yield task.key, answer
            return
        for worker in self._workers:
            if worker.tasks:  # of an earlier call whose caller walked away
                worker.stop()
                worker.start()
        self._again.clear()
        self._deal(tasks)
        while busy := [worker for worker in self._workers if worker.tasks]:
            answers = self._collect(busy)
            self._deal(tasks)  # first, so that the workers have something to do while the caller has
            yield from answers

    def _deal(self, tasks: Iterator[_Task]) -> None:
        """Give each task to the worker that holds fewest, until all hold enough."""
        while len((worker := min(self._workers, key=lambda w: len(w.tasks))).tasks) < self._ahead:
            task = self._again.popleft() if self._again else next(tasks, None)
            if task is None:
                return
            worker.send(task)

    def _collect(self, busy: list[_Worker]) -> list[tuple[str, DecodedVideo | Failure]]:
        """Wait until something happens; bury workers that crashed or ran out of time."""
        began = time.monotonic()
        deadline = min(worker.deadline_s(self._timeout_s) for worker in busy)
        wait([worker.pipe for worker in busy], timeout=min(max(0.0, deadline - began), _LONGEST_WAIT_S))
        self.waiting_s += time.monotonic() - began

        answers: list[tuple[str, DecodedVideo | Failure]] = []
        for worker in busy:
            for task, answer, seconds in worker.hear():
                self.decoding_s += seconds
                answers.append((task.key, answer))
            if reason := worker.trouble(self._timeout_s):
                answers += self._bury(worker, reason)
        return answers

    def _bury(self, worker: _Worker, reason: str) -> list[tuple[str, Failure]]:
        """Replace a lost worker; blame the video it was at, and deal the others again."""
        innocent = list(worker.tasks)
        guilty = innocent.pop(0) if worker.started_s is not None else None
        self._stillborn = 0 if worker.is_proven else self._stillborn + 1
        if self._stillborn == _STILLBORN:
            raise RuntimeError(f"decode workers do not start: {reason}")
        worker.stop()
        worker.start()
        self._again.extend(innocent)
        if guilty is None:
            return []
        if guilty.frames.decoder == "auto":
            self._again.append(replace(guilty, frames=replace(guilty.frames, decoder="pyav"), attempts=2))
            return []
        return [(guilty.key, Failure(reason, guilty.attempts))]


@dataclass(frozen=True, slots=True)
class _Task:
    """One attempt at one video."""

    key: str
    path: str
    start_s: float | None
    end_s: float | None
    frames: FrameSpec
    attempts: int = 1


class _Worker:
    """The parent's side of one process; the process may be replaced, its slots stay."""

    def __init__(self, orders: tuple[Any, ...], slots: NDArray[np.uint8], scratch: Path) -> None:
        self._orders = orders  # of the process, besides its pipes and its folder
        self._slots = slots  # [ahead, T, 3, S, S]
        self._scratch = scratch
        self.start()

    def start(self) -> None:
        """Start a process that has no tasks."""
        self._scratch.mkdir()
        self.tasks: deque[_Task] = deque()  # the first is in work, or about to be
        self.started_s: float | None = None  # when the first task was taken up
        self.is_proven = False  # whether this process has taken up a task
        self._is_gone = False
        self._waits_since_s = time.monotonic()
        self._used: deque[int] = deque()  # the slot of each task
        self._free = deque(range(len(self._slots)))
        self._words = b""  # the end of what the decoders wrote since the last answer
        self.pipe, theirs = _SPAWN.Pipe()
        self._noise, their_noise = _SPAWN.Pipe(duplex=False)
        os.set_blocking(self._noise.fileno(), False)
        self._process = _SPAWN.Process(
            target=_serve,
            args=(theirs, their_noise, self._scratch, *self._orders),
            name="coldframe-decode",
            daemon=True,
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
        shutil.rmtree(self._scratch, ignore_errors=True)  # the killed could not

    def send(self, task: _Task) -> None:
        """Hand over a task and a slot for its pixels."""
        if not self.tasks:
            self._waits_since_s = time.monotonic()
        self.tasks.append(task)
        self._used.append(self._free.popleft())
        with suppress(OSError):  # the process is gone: `hear` will find out
            self.pipe.send((task, self._used[-1]))

    def hear(self) -> list[tuple[_Task, DecodedVideo | Failure, float]]:
        """Take the answers that have arrived, with the seconds that they took."""
        answers: list[tuple[_Task, DecodedVideo | Failure, float]] = []
        self._listen()
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                if isinstance(message, float):
                    self.started_s, self.is_proven = message, True
                    continue
                answer, seconds = message
                task, slot = self.tasks.popleft(), self._used.popleft()
                if isinstance(answer, DecodedVideo):
                    answer = replace(answer, pixels=self._slots[slot].copy())
                answers.append((task, answer, seconds))
                self._free.append(slot)
                self.started_s, self._waits_since_s, self._words = None, time.monotonic(), b""
        except (EOFError, OSError):
            self._is_gone = True
        return answers

    def deadline_s(self, timeout_s: float) -> float:
        """When the process must have answered, or taken up its first task."""
        return self._waits_since_s + _START_UP_S if self.started_s is None else self.started_s + timeout_s

    def trouble(self, timeout_s: float) -> str:
        """Why the process must be replaced; empty while all is well."""
        if self._is_gone:
            self._process.join(_FAREWELL_S)
            self._listen()
            code = self._process.exitcode
            cause = f"crashed (signal {-code})" if code is not None and code < 0 else f"exited (code {code})"
            last_words = self._words.decode(errors="replace").strip().rpartition("\n")[2][:200]
            return f"decoder {cause}" + (f": {last_words}" if last_words else "")
        if time.monotonic() < self.deadline_s(timeout_s):
            return ""
        return f"timed out after {timeout_s:g} s" if self.started_s is not None else "no sign of life"

    def _listen(self) -> None:
        """Keep the end of what the decoders wrote."""
        with suppress(BlockingIOError):
            while heard := os.read(self._noise.fileno(), 1 << 16):
                self._words = (self._words + heard)[-4096:]


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


def _serve(
    pipe: Connection,
    noise: Connection,
    scratch: Path,
    memory: Any,
    shape: tuple[int, ...],
    number: int,
    transform: TransformSpec,
    decode: Decode,
) -> None:
    """Be a worker process: decode tasks until the parent closes the pipe, or dies."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tempfile.tempdir = str(scratch)
    os.set_blocking(noise.fileno(), False)  # what nobody reads is dropped, never waited for
    for descriptor in (1, 2):  # not sys.stdout and sys.stderr, which may be closed
        os.dup2(noise.fileno(), descriptor)
    slots = np.frombuffer(memory, np.uint8).reshape(shape)[number]  # [ahead, T, 3, S, S]
    while True:
        try:
            task, slot = pipe.recv()
        except EOFError:
            return
        pipe.send(time.monotonic())
        answer, seconds = _attempt(decode, task, transform)
        if isinstance(answer, DecodedVideo):
            slots[slot] = answer.pixels
            answer = replace(answer, pixels=_IN_SLOT)
        pipe.send((answer, seconds))


def _die_with_parent() -> None:
    """End this process as soon as the parent is gone, whatever the decoder is doing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _attempt(decode: Decode, task: _Task, transform: TransformSpec) -> tuple[DecodedVideo | Failure, float]:
    """Decode one video; whatever goes wrong becomes its reason.  Gives the seconds it took as well."""
    began = time.perf_counter()
    try:
        answer = decode(task.path, task.frames, transform, task.start_s, task.end_s)
    except DecodeError as error:
        answer = Failure(error.reason, task.attempts, is_transient(error))
    except Exception as error:  # the one place that catches all: one video in one process
        answer = Failure(f"{type(error).__name__}: {error}".partition("\n")[0][:300], task.attempts)
    return answer, time.perf_counter() - began
