"""Where the shared data lies, and what every test may rely on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: test processes share the cores

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real clips, golden vectors and official lists; skips loudly where it is absent."""
    folder = Path(os.environ.get("COLDFRAME_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set COLDFRAME_SHARED")
    return folder


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The folder of recorded behaviour of the original implementations."""
    named = os.environ.get("COLDFRAME_GOLDEN")
    return Path(named) if named else request.getfixturevalue("shared") / "golden"
