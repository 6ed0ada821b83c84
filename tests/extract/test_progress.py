"""Plain lines where nobody watches, a bar where somebody does, nothing on stdout."""

from __future__ import annotations

import io
import sys

import pytest

from coldframe.extract import progress
from coldframe.extract.progress import Progress


class Clock:
    """A clock that the test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_plain_lines_come_every_few_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Progress(40, "videos") as shown:
        for number in range(20):
            clock.now += 1.0
            shown.update(2, failed=number // 10, waits_for="decode")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "10/40 videos · 2.0/s · 0:00:15 left · failed 0 · waits for decode",
        "20/40 videos · 2.0/s · 0:00:10 left · failed 0 · waits for decode",
        "30/40 videos · 2.0/s · 0:00:05 left · failed 1 · waits for decode",
        "40/40 videos · 2.0/s · 0:00:00 left · failed 1 · waits for decode",
        "40/40 videos · 2.0/s · in 0:00:20 · failed 1 · waits for decode",
    ]


def test_an_interrupted_run_says_how_far_it_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(KeyboardInterrupt), Progress(9, "steps") as shown:
        clock.now += 2.0
        shown.update()
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "1/9 steps · 0.5/s · in 0:00:02, interrupted\n"


@pytest.mark.parametrize(("total", "quiet"), [(5, True), (0, False)])
def test_quiet_and_empty_runs_show_nothing(total: int, quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total, "videos", quiet=quiet) as shown:
        shown.update(total)
    assert shown.done == total
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress(3, "videos") as shown:
        for _ in range(3):
            shown.update(1, failed=0)
    assert "videos" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert "failed 0" in terminal.getvalue()
    assert capsys.readouterr().out == ""
