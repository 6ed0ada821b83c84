"""Which code made a result: written into checkpoints and results."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def code_commit() -> str:
    """The commit this package runs from, `-dirty` if it was changed since; "" where it is not a git checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed: a repository further up would not be ours
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def code_versions() -> dict[str, str]:
    """Releases of what can move a number."""
    found: dict[str, str] = {}
    for name in ("coldframe", "torch", "open_clip_torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a bare checkout
            found[name] = ""
    return found
