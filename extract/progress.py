"""What a long run shows: a bar with rate and time left on a terminal, a plain line every few seconds elsewhere.

Everything goes to stderr, so that results on stdout stay clean.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console

_EVERY_S = 5.0  # between plain lines


class Progress:
    """Counts things done; a context manager."""

    def __init__(self, total: int, unit: str, *, quiet: bool = False) -> None:
        """Prepare for `total` things; `unit` is their plural. `quiet` shows nothing."""
        self.done = 0
        self._total = total
        self._unit = unit
        self._quiet = quiet or total == 0 or sys.stderr is None  # closed, as of a daemon
        self._note = ""
        self._bar: progress.Progress | None = None

    def __enter__(self) -> Self:
        self._began_s = self._shown_s = time.monotonic()
        if not self._quiet and sys.stderr.isatty():
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}", style="dim"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._bar.add_task(self._unit, total=self._total, rate="", note="")
        return self

    def update(self, n: int = 1, **fields: object) -> None:
        """Count `n` more things; `fields` are shown behind the count, as they stand."""
        self.done += n
        self._note = " · ".join(f"{name.replace('_', ' ')} {value}" for name, value in fields.items())
        if self._bar:
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=self.done, rate=f"{self._rate():.1f}/s", note=self._note)
        elif not self._quiet and time.monotonic() - self._shown_s >= _EVERY_S:
            left_s = (self._total - self.done) / self._rate() if self.done else 0
            self._say(f"{_clock(left_s)} left")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif not self._quiet:
            took = f"in {_clock(time.monotonic() - self._began_s)}"
            self._say(
                took if kind is None else f"{took}, interrupted" if kind is KeyboardInterrupt else f"{took}, then ended"
            )

    def _rate(self) -> float:
        return self.done / max(time.monotonic() - self._began_s, 1e-9)

    def _say(self, when: str) -> None:
        self._shown_s = time.monotonic()
        parts = [f"{self.done}/{self._total} {self._unit}", f"{self._rate():.1f}/s", when, self._note]
        print(" · ".join(part for part in parts if part), file=sys.stderr, flush=True)  # noqa: T201


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
