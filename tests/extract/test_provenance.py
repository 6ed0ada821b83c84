from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from coldframe.extract import provenance


def test_the_commit_is_of_a_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "extract" / "provenance.py"
    file.parent.mkdir()
    file.write_text("1")
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert provenance.code_commit() == ""
    git("init", "-q")
    assert provenance.code_commit() == ""  # no commit yet
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    git("tag", "v1")
    assert provenance.code_commit() == head
    file.write_text("2")
    assert provenance.code_commit() == f"{head}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.code_commit() == ""  # no git


def test_versions_name_what_moves_numbers() -> None:
    assert provenance.code_versions().keys() == {"coldframe", "torch", "open_clip_torch", "numpy"}
    assert provenance.code_versions()["torch"]
