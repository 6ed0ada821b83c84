"""What this machine and this installation are: releases, and the limits that a long run meets.

Nothing here fails: what cannot be read is described by its error. The decoders are not imported, for they may crash.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path

from .provenance import code_commit

PACKAGES = (
    *("torch", "open_clip_torch", "torchvision", "numpy", "pillow", "av", "decord", "decord2", "torchcodec"),
    *("zarr", "h5py", "pyarrow", "fsspec", "s3fs"),
)

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def versions() -> dict[str, str]:
    """Releases of everything that can move a number or break a run."""
    found = {
        "coldframe": f"{release('coldframe') or 'not installed'}, commit {code_commit() or 'unknown'}",
        "Python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        **{package: release(package) or "not installed" for package in PACKAGES},
    }
    try:
        import torch

        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        found["torch"] = f"{torch.__version__}, {build if torch.version.cuda or torch.version.hip else 'no CUDA'}"
    except Exception as error:  # a broken installation can fail anywhere
        found["torch"] += f", {line_of(error)}"
    return found


def release(package: str) -> str:
    """The release of an installed package; "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def limits() -> dict[str, str]:
    """Limits that a long run meets."""
    facts: dict[str, Callable[[], str]] = {
        "cores": _cores,
        "memory": _memory,
        "shared memory": lambda: f"/dev/shm: {space('/dev/shm')}",  # noqa: S108 - pixels on their way lie there
        "temporary files": lambda: f"{tempfile.gettempdir()}: {space(tempfile.gettempdir())}",
        "open files": lambda: "{}, at most {}".format(*resource.getrlimit(resource.RLIMIT_NOFILE)),
    }
    return {name: _told(fact) for name, fact in facts.items()}


def space(folder: str | Path) -> str:
    """How much of a folder's disk is free."""
    usage = shutil.disk_usage(folder)
    return f"{gib(usage.free)} free of {gib(usage.total)}"


def line_of(error: Exception) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _told(fact: Callable[[], str]) -> str:
    try:
        return fact()
    except Exception as error:  # a report must not end for want of one line
        return f"unknown, {line_of(error)}"


def _cores() -> str:
    """Cores that this process may use, by affinity and by the quota of its control group."""
    n_all = os.cpu_count() or 1
    n_own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_all
    quotas: list[Sequence[str]] = [text.split() for text in _cgroup("cpu", "cpu.max")]
    quotas += zip(_cgroup("cpu", "cpu.cfs_quota_us"), _cgroup("cpu", "cpu.cfs_period_us"), strict=False)
    limits = [int(quota) / int(period) for quota, period in quotas if quota.isdigit()]
    return f"{min([n_own, *limits]):g} usable of {n_all}" + (f" (control group: {min(limits):g})" if limits else "")


def _memory() -> str:
    """Memory that this process may still take, within the limit of its control group."""
    lines = (_PROC / "meminfo").read_text().splitlines()
    facts = {line.partition(":")[0]: int(line.split()[1]) << 10 for line in lines}
    free, total = facts.get("MemAvailable", facts["MemFree"]), facts["MemTotal"]
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        levels = zip(*(_cgroup("memory", name) for name in (limit, used, "memory.stat")), strict=False)
        for most, taken, stat in levels:
            if most.isdigit():
                reclaimable = dict(line.split() for line in stat.splitlines()).get(cached, 0)
                total = min(total, int(most))
                free = min(free, int(most) - int(taken) + int(reclaimable))
    return f"{gib(max(free, 0))} free of {gib(total)}"


def _cgroup(controller: str, name: str) -> list[str]:
    """What a file says in this process's control group and in each one above it, in either version's layout."""
    try:
        groups = [line.split(":", 2) for line in (_PROC / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in groups:
        if not controllers or controller in controllers.split(","):
            own = Path(path.lstrip("/"))
            files = (_CGROUPS / (controllers and controller) / group / name for group in chain([own], own.parents))
            found += [file.read_text().strip() for file in files if file.is_file()]
    return found


def gib(n_bytes: int) -> str:
    """Bytes for people."""
    return f"{n_bytes / 2**30:.1f} GiB"
