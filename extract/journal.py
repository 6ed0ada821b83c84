"""What the writers of a store did and when: one JSON line an event, one file a writer, only ever appended to."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class Journal:
    """The journal of one writer: `started` and `done` of a shard, `failed` of a video."""

    def __init__(self, store: Path) -> None:
        """Begin, or go on with, the file of this process."""
        self._path = store / "journal" / f"{socket.gethostname()}-{os.getpid()}.jsonl"

    def log(self, event: str, **facts: Any) -> None:
        """Append an event; a line is written at once, and is not waited for."""
        line = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_journal(store: Path) -> Iterator[dict[str, Any]]:
    """The events of every writer, file by file; a line that a crash tore is left out."""
    for path in sorted((store / "journal").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue
