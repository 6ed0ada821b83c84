"""Several processes as one: their reports, their progress, their errors, and the signals for them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract import fleet
from coldframe.extract.fleet import run_fleet, split_devices, sum_reports
from coldframe.extract.leases import Part
from coldframe.extract.pipeline import ExtractReport
from coldframe.extract.progress import Progress

# Behaves as its device is called; writes into the folder what it was given.
CHILD = """
import json, os, signal, sys, time
folder, report, arguments = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
device = [value for name, value in zip(arguments, arguments[1:]) if name == "--device"][-1]
def say(text):
    print(text, file=sys.stderr, flush=True)
def note(kind):
    with open(f"{folder}/{device}.{kind}", "a") as file:
        file.write(" ".join(arguments) + "\\n")
def interrupted(number, _):
    note(signal.Signals(number).name)
    if device != "deaf":
        report["interrupted"] = True
        print(json.dumps(report))
        sys.exit(130)
signal.signal(signal.SIGINT, interrupted)
note("started")
say("4/8 videos · 2.0/s · 0:00:02 left · failed 1 · waits for tower")
if device == "killed":
    say("about to die")
    os.kill(os.getpid(), signal.SIGKILL)
if device == "refused":
    say("error: no such video")
    sys.exit(2)
if device == "broken":
    sys.exit(0)
if device in ("slow", "deaf"):
    time.sleep(0.2)
    note("ready")
    for _ in range(600):  # a signal that comes just before a sleep is seen after it
        time.sleep(0.1)
if device == "after":
    while os.path.exists(f"{folder}/wait"):
        time.sleep(0.01)
say("8/8 videos · 2.0/s · in 0:00:04 · failed 1 · waits for tower")
print(json.dumps(report, indent=2))
sys.exit(3 if device == "failing" else 0)
"""


def report(**facts: Any) -> dict[str, Any]:
    return ExtractReport(Path("ignored"), **facts).to_json()


def command(folder: Path, **facts: Any) -> list[str]:
    return [sys.executable, "-c", CHILD, str(folder), json.dumps(report(**facts)), "--device", "all"]


def test_devices_are_named_or_found() -> None:
    assert split_devices("cuda:0, cuda:1,") == ["cuda:0", "cuda:1"]
    for text in ("", ",", "all,cpu"):
        with pytest.raises(ConfigError, match="no devices"):
            split_devices(text)


def test_reports_add_up_and_time_does_not() -> None:
    reports = [
        report(n_videos=3, n_written=2, n_frames=16, failures={"a": "torn"}, seconds=2.0, tower_s=1.5),
        report(n_videos=5, n_written=5, n_frames=40, seconds=3.0, tower_s=2.5, interrupted=True),
    ]
    whole = sum_reports(Path("store"), reports)
    assert whole == ExtractReport(
        Path("store"),
        n_videos=8,
        n_written=7,
        n_frames=56,
        failures={"a": "torn"},
        seconds=3.0,
        tower_s=4.0,
        interrupted=True,
    )
    assert sum_reports(Path("store"), []) == ExtractReport(Path("store"))


def test_every_device_gets_a_part_of_the_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, code = run_fleet(command(tmp_path, n_videos=8, n_written=7), ["x:0", "x:1"], tmp_path / "s", Part(1, 2))
    assert (made.store, made.n_videos, made.n_written, made.interrupted, code) == (tmp_path / "s", 16, 14, False, 0)
    for device, part in (("x:0", "1/4"), ("x:1", "3/4")):
        given = (tmp_path / f"{device}.started").read_text().strip()
        assert given == f"--device all --device {device} --shard {part} --json"
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "16/16 videos · failed 2\n"


def test_options_come_before_what_is_no_option() -> None:
    assert fleet._with_options(["extract", "--", "-odd-"], ["--json"]) == ["extract", "--json", "--", "-odd-"]


def test_what_progress_says_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, "videos") as progress:
        progress.update(2, **{"frames/s": "9"}, failed=1, waits_for="disk")
    found = fleet._PROGRESS.match(capsys.readouterr().err)
    assert found
    assert (found[1], found[2], found[4]) == ("2", "3", "1")
    assert float(found[3]) > 0


def test_progress_is_one_line_for_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_EVERY_S", 0.3)
    (tmp_path / "wait").touch()
    timer = threading.Timer(1.0, (tmp_path / "wait").unlink)
    timer.start()
    run_fleet(command(tmp_path), ["after", "after"], tmp_path)
    timer.join()
    lines = capsys.readouterr().err.splitlines()
    assert "8/16 videos · 4.0/s · 0:00:02 left · failed 2 · 2 of 2 devices at work" in lines
    run_fleet(command(tmp_path), ["after", "after"], tmp_path, quiet=True)
    assert capsys.readouterr().err == ""


def test_a_terminal_keeps_progress_on_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run_fleet(command(tmp_path), ["killed"], tmp_path)
    states = terminal.getvalue().split("\r\x1b[2K")
    assert "[killed] about to die\n" in states
    assert states[-2:] == ["4/8 videos · failed 1", "4/8 videos · failed 1\n"]


def test_the_others_go_on_when_one_is_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wait").touch()

    def release() -> None:
        while not (tmp_path / "killed.started").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        (tmp_path / "wait").unlink()

    thread = threading.Thread(target=release)
    thread.start()
    made, code = run_fleet(command(tmp_path, n_written=7), ["killed", "after"], tmp_path, quiet=True)
    thread.join()
    assert (made.n_written, code) == (7, 1)
    assert capsys.readouterr().err.splitlines() == [
        "[killed] about to die",
        "error: killed was killed by SIGKILL; the others go on, and the same command does what it left",
    ]


@pytest.mark.parametrize(
    ("devices", "code", "said"),
    [
        (["failing", "x"], 3, ""),
        (["refused", "failing"], 2, "[refused] error: no such video\n"),
        (["broken", "x"], 1, "error: broken ended with exit code 0 without a report"),
    ],
)
def test_the_exit_code_is_the_worst(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], devices: list[str], code: int, said: str
) -> None:
    assert run_fleet(command(tmp_path), devices, tmp_path, quiet=True)[1] == code
    assert capsys.readouterr().err.startswith(said)


def after_ready(folder: Path, n_children: int, *signums: int) -> threading.Thread:
    """Send signals to this process, once all its children are ready and then whenever they have noted the last one."""

    def n_noted(kind: str) -> int:
        return sum(len(path.read_text().splitlines()) for path in folder.glob(f"*.{kind}"))

    def send() -> None:
        awaited, end_s = "ready", time.monotonic() + 50.0  # a child that is not told to end does so after 60 s
        for signum in signums:
            while n_noted(awaited) < n_children:
                if time.monotonic() > end_s:
                    return  # a signal that the fleet does not await any more would end the tests
                time.sleep(0.01)
            os.kill(os.getpid(), signum)
            awaited = signal.Signals(signum).name

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_ctrl_c_reaches_every_process_once_and_their_reports_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    thread = after_ready(tmp_path, 2, signal.SIGINT)
    made, code = run_fleet(command(tmp_path, n_written=2), ["slow", "slow"], tmp_path, quiet=True)
    thread.join()
    assert (made.n_written, made.interrupted, code) == (4, True, 130)
    assert len((tmp_path / "slow.SIGINT").read_text().splitlines()) == 2
    assert capsys.readouterr().err == "SIGINT: ending 2 of 2 processes\n"
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_is_heard_though_its_handling_outlasts_a_tick(tmp_path: Path) -> None:
    def slowly(*_: object) -> None:
        time.sleep(2 * fleet._TICK_S)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGUSR1, slowly)
    thread = after_ready(tmp_path, 1, signal.SIGUSR1)
    made, code = run_fleet(command(tmp_path), ["slow"], tmp_path, quiet=True)
    thread.join()
    signal.signal(signal.SIGUSR1, before)
    assert (made.interrupted, code) == (True, 130)
    assert (tmp_path / "slow.SIGINT").exists()  # a fleet that waits for what its processes say hears it too late


def test_a_second_ctrl_c_ends_the_deaf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thread = after_ready(tmp_path, 1, signal.SIGINT, signal.SIGINT)
    made, code = run_fleet(command(tmp_path), ["deaf"], tmp_path, quiet=True)
    thread.join()
    assert (made.interrupted, code) == (True, 130)
    assert "SIGTERM: ending 1 of 1 processes" in capsys.readouterr().err


def test_sigterm_ends_all(tmp_path: Path) -> None:
    thread = after_ready(tmp_path, 1, signal.SIGTERM)
    made, code = run_fleet(command(tmp_path), ["slow"], tmp_path, quiet=True)
    thread.join()
    assert (made.interrupted, code) == (True, 143)


def test_no_process_is_left_when_one_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def second_fails(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        if started:
            raise OSError("no more processes")
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(fleet.subprocess, "Popen", second_fails)
    with pytest.raises(OSError, match="no more processes"):
        run_fleet(command(tmp_path), ["slow", "slow"], tmp_path)
    assert started[0].returncode == -signal.SIGTERM
