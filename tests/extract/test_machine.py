"""Releases and limits, in both layouts of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coldframe.extract import machine

GIB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine of 16 GiB, 12 of them free, and 8 cores; gives a function that writes a file of its control groups."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    monkeypatch.setattr(machine, "_PROC", proc)
    monkeypatch.setattr(machine, "_CGROUPS", groups)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)

    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    write(proc / "meminfo", f"MemTotal: {16 << 20} kB\nMemFree: {2 << 20} kB\nMemAvailable: {12 << 20} kB")

    def limit(own: str, **files: str) -> None:
        write(proc / "self" / "cgroup", own)
        for path, text in files.items():
            write(groups / path.replace("__", "/").replace("_0_", "."), text)

    return limit


def test_without_control_groups(system) -> None:
    assert machine.limits()["cores"] == "6 usable of 8"
    assert machine.limits()["memory"] == "12.0 GiB free of 16.0 GiB"


def test_the_tightest_level_of_version_2_counts(system) -> None:
    system(
        "0::/jobs/mine",
        jobs__cpu_0_max="150000 100000",
        jobs__mine__cpu_0_max="max 100000",
        jobs__memory_0_max=str(4 * GIB),
        jobs__memory_0_current=str(3 * GIB),
        jobs__memory_0_stat=f"anon 5\ninactive_file {GIB}",
        jobs__mine__memory_0_max="max",
        jobs__mine__memory_0_current=str(GIB),
        jobs__mine__memory_0_stat="inactive_file 0",
    )
    assert machine.limits()["cores"] == "1.5 usable of 8 (control group: 1.5)"
    assert machine.limits()["memory"] == "2.0 GiB free of 4.0 GiB"


def test_version_1(system) -> None:
    system(
        "4:memory:/job\n1:cpu,cpuacct:/job\n0::/",
        cpu__job__cpu_0_cfs_quota_us="200000",
        cpu__job__cpu_0_cfs_period_us="100000",
        cpu__cpu_0_cfs_quota_us="-1",
        cpu__cpu_0_cfs_period_us="100000",
        memory__job__memory_0_limit_in_bytes=str(2 * GIB),
        memory__job__memory_0_usage_in_bytes=str(GIB),
        memory__job__memory_0_stat="total_inactive_file 0",
    )
    assert machine.limits()["cores"] == "2 usable of 8 (control group: 2)"
    assert machine.limits()["memory"] == "1.0 GiB free of 2.0 GiB"


def test_what_cannot_be_read_is_said(system, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_PROC", tmp_path / "elsewhere")
    found = machine.limits()
    assert found["memory"].startswith("unknown, FileNotFoundError")
    assert found["cores"] == "6 usable of 8"


def test_releases_name_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "no-such-package", "torch"))
    found = machine.versions()
    assert found["no-such-package"] == "not installed"
    assert found["numpy"][0].isdigit()
    assert "CUDA" in found["torch"] or "ROCm" in found["torch"]
    assert "commit " in found["coldframe"]
