"""What the writers of a store did and when: one JSON line an event, one file a writer, only ever appended to."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..data_manifests.locations import is_local, names_in, read_bytes, write_bytes


class Journal:
    """The journal of one writer: `started` and `done` of a shard, `failed` of a video."""

    def __init__(self, store: Path) -> None:
        """Begin, or go on with, the file of this process; behind a URL begin a new one."""
        folder, name = store / "journal", f"{socket.gethostname()}-{os.getpid()}"
        self._lines: list[str] | None = None
        if not is_local(store):  # an object is never appended to
            self._lines, name = [], f"{name}-{time.time_ns()}"
        self._path = folder / f"{name}.jsonl"

    def log(self, event: str, **facts: Any) -> None:
        """Append an event; a line is written at once, and is not waited for. Behind a URL it waits for a shard's end."""
        line = json.dumps({"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}) + "\n"
        if self._lines is None:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
            return
        self._lines.append(line)
        if event == "done":
            write_bytes(self._path, "".join(self._lines).encode())


def read_journal(store: Path) -> Iterator[dict[str, Any]]:
    """The events of every writer, file by file; a line that a crash tore is left out."""
    folder = store / "journal"
    for name in sorted(name for name in names_in(folder) if name.endswith(".jsonl")):
        for line in read_bytes(folder / name).decode(errors="replace").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue
