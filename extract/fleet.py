"""One command, several devices: a process for each, which extracts its part of the videos; one report of them all."""

from __future__ import annotations

import dataclasses
import json
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..data_manifests.errors import ConfigError
from .leases import WHOLE, Part
from .pipeline import ExtractReport

_EVERY_S = 5.0  # between plain lines
_TICK_S = 0.1
_LAST_WORDS_S = 5.0  # a pipe may be held open by somebody that the child started
_PROGRESS = re.compile(r"(\d+)/(\d+) videos · ([\d.]+)/s\b(?:.*\bfailed (\d+))?")  # as progress.py says it
_FINE = (0, 3, 2, 130)  # exit codes by which a process means what it says
_TOGETHER = {"seconds": max, "batch_frames": lambda a, b: min(filter(None, (a, b)), default=None),
             "fidelity": lambda a, b: {k: min(a.get(k, 1.0), b.get(k, 1.0)) for k in a | b}}  # fmt: skip
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def split_devices(text: str) -> list[str]:
    """The devices that a user means by `cuda:0,cuda:1` or by `all`.

    Raises:
        ConfigError: there are none.
    """
    devices = [name.strip() for name in text.split(",") if name.strip()]
    if devices == ["all"]:
        import torch

        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if not devices or "all" in devices:
        raise ConfigError("no devices to extract on", seen=text, wanted="such as cuda:0,cuda:1, or all where cuda is")
    return devices


def run_fleet(
    command: Sequence[str], devices: Sequence[str], store: Path, part: Part = WHOLE, *, quiet: bool = False
) -> tuple[ExtractReport, int]:
    """Run a command once for each device, each on a part of its own, until all have ended.

    Ctrl-C and SIGTERM reach every process once, and the report of what they did still comes; a second Ctrl-C ends them.

    Args:
        command: `coldframe extract …` that shows its progress; `--device D --shard I/N --json` are added to it, and
            stand above what it says of those.
        part: of the videos; the processes share it.
        quiet: shows no progress; errors are shown.

    Returns:
        The sum of the reports, and an exit code: 128 + the signal that ended it all; 1 if a process crashed, while the
        others went on; else what they agree on.
    """
    heard: queue.Queue[tuple[_Child, str]] = queue.Queue()
    shown = _Shown(quiet)
    children: list[_Child] = []
    with _caught_signals() as caught:
        try:
            for number, device in enumerate(devices):
                options = ["--device", device, "--shard", str(part.split(number, len(devices))), "--json"]
                children.append(_Child(_with_options(command, options), device, heard))
            running, sent = list(children), 0
            while running:
                while sent < len(caught):
                    # Ctrl-C again: whoever repeats it wants no more shards.
                    signum = signal.SIGTERM if caught[sent] in caught[:sent] else caught[sent]
                    shown.say(f"{signal.Signals(signum).name}: ending {len(running)} of {len(children)} processes")
                    for child in running:
                        child.process.send_signal(signum)
                    sent += 1
                _relay(heard, shown, _TICK_S)
                ended = [child for child in running if child.has_ended()]
                _relay(heard, shown)  # their last words, before what is said of them
                for child in ended:
                    running.remove(child)
                    if not caught:
                        child.explain(shown)
                shown.progress(children)
        finally:
            for child in children:  # none is left alone, should this process fail
                child.end()
            shown.close(children)
    report = sum_reports(store, (child.report for child in children if child.report))
    report.interrupted |= bool(caught)
    return report, 128 + caught[0] if caught else _exit_code([child.code for child in children])


def sum_reports(store: Path, reports: Iterable[Mapping[str, Any]]) -> ExtractReport:
    """One report of processes that ran side by side, each told by its JSON."""
    whole = ExtractReport(store)
    for report in reports:
        for name in {field.name for field in dataclasses.fields(whole)} & report.keys() - {"store"}:
            setattr(whole, name, _TOGETHER.get(name, _sum)(getattr(whole, name), report[name]))
    return whole


class _Child:
    """One process, its last progress and its report."""

    def __init__(self, command: Sequence[str], device: str, heard: queue.Queue[tuple[_Child, str]]) -> None:
        self.device = device
        self.done = self.total = self.n_failed = 0
        self.rate = 0.0
        self.report: dict[str, Any] | None = None
        self._ended = False
        self._out = b""
        # In a session of its own, where the terminal's Ctrl-C does not reach it a second time.
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self._readers = [
            threading.Thread(target=self._read_out, daemon=True),
            threading.Thread(target=self._read_words, args=(heard,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def code(self) -> int:
        """The exit code; that of a crash where the report is missing."""
        code = self.process.returncode
        return 1 if code in (0, 3) and self.report is None else code

    def has_ended(self) -> bool:
        """Whether the process is gone, and all that it said has arrived."""
        if not self._ended and self.process.poll() is not None:
            for reader in self._readers:
                reader.join(_LAST_WORDS_S)
            self.report = _json_object(self._out)
            self._ended = True
        return self._ended

    def note(self, text: str) -> bool:
        """Take in a line if it is one of progress."""
        if found := _PROGRESS.match(text):
            self.done, self.total, self.rate = int(found[1]), int(found[2]), float(found[3])
            self.n_failed = int(found[4] or 0)
        return bool(found)

    def explain(self, shown: _Shown) -> None:
        """Say how the process died, if it did."""
        if self.code not in _FINE:
            code = self.process.returncode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            lack = " without a report" if code in _FINE else ""
            shown.say(f"error: {self.device} {how}{lack}; the others go on, and the same command does what it left")

    def end(self) -> None:
        """Make sure that the process is gone."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_LAST_WORDS_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for reader in self._readers:
            reader.join(_LAST_WORDS_S)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe and not any(reader.is_alive() for reader in self._readers):
                pipe.close()

    def _read_out(self) -> None:
        assert self.process.stdout
        self._out = self.process.stdout.read()

    def _read_words(self, heard: queue.Queue[tuple[_Child, str]]) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            text = line.decode(errors="replace").rstrip().rpartition("\r")[2]  # the last state of a bar
            if text:
                heard.put((self, text))


class _Shown:
    """What a user sees on stderr: lines, and under them on a terminal the progress of all processes together."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._is_terminal = quiet, sys.stderr.isatty()
        self._shown_s = time.monotonic()
        self._last = ""

    def say(self, text: str) -> None:
        """Show a line."""
        self._write(f"{text}\n")

    def progress(self, children: Sequence[_Child]) -> None:
        """Show how far all are, if it is time."""
        line = _progress_of(children)
        if self._quiet or not line or line == self._last:
            return
        if self._is_terminal:
            self._write(line)
            self._last = line
        elif time.monotonic() - self._shown_s >= _EVERY_S:
            self._shown_s = time.monotonic()
            self._write(f"{line}\n")

    def close(self, children: Sequence[_Child]) -> None:
        """Leave the last state on the screen."""
        line = _progress_of(children)
        if not self._quiet and line:
            self._write(f"{line}\n")

    def _write(self, text: str) -> None:
        if self._is_terminal and not self._quiet:
            text, self._last = f"\r\x1b[2K{text}", ""
        sys.stderr.write(text)
        sys.stderr.flush()


def _progress_of(children: Sequence[_Child]) -> str:
    """All processes' progress in one line; nothing before they have told theirs."""
    running = [child for child in children if not child.has_ended()]
    if not any(child.total for child in children):
        return ""
    left_s = [(child.total - child.done) / child.rate for child in running if child.rate]
    parts = [
        f"{sum(child.done for child in children)}/{sum(child.total for child in children)} videos",
        f"{sum(child.rate for child in running):.1f}/s" if running else "",
        f"{timedelta(seconds=round(max(left_s)))} left" if left_s else "",
        f"failed {sum(child.n_failed for child in children)}",
        f"{len(running)} of {len(children)} devices at work" if running else "",
    ]
    return " · ".join(part for part in parts if part)


def _relay(heard: queue.Queue[tuple[_Child, str]], shown: _Shown, wait_s: float = 0.0) -> None:
    """Take in what the processes said; show what is no progress, with the device in front.

    Signals arrive while this waits. A `SimpleQueue` would then wait for ever: up to Python 3.12, where a signal's handling
    outlasts the time limit, what remains of it is negative, which means none.
    """
    with suppress(queue.Empty):
        while True:
            child, text = heard.get(timeout=wait_s)
            if not child.note(text):
                shown.say(f"[{child.device}] {text}")
            wait_s = 0.0


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collect the signals that would end this process, but those that it ignores anyway."""
    caught: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may handle any
    signums = [s for s in _SIGNALS if is_main and signal.getsignal(s) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, lambda number, _: caught.append(number)) for signum in signums}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _with_options(command: Sequence[str], options: Sequence[str]) -> list[str]:
    """The command with options after its own, of which the last counts; what follows `--` is no option."""
    at = command.index("--") if "--" in command else len(command)
    return [*command[:at], *options, *command[at:]]


def _exit_code(codes: Sequence[int]) -> int:
    if any(code not in _FINE for code in codes):
        return 1
    return next((code for code in (130, 2, 3) if code in codes), 0)


def _json_object(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _sum(one: Any, other: Any) -> Any:
    """Numbers added, either of two truths, dictionaries merged; of anything else the later one."""
    if isinstance(one, dict):
        return one | {key: _sum(one[key], value) if key in one else value for key, value in other.items()}
    if isinstance(one, bool):
        return one or other
    return one + other if isinstance(one, int | float | list) else other
