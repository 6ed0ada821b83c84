"""Leases behind a URL: objects that only one can make, and whose age is by the server's clock. There are no locks."""

from __future__ import annotations

import secrets
from pathlib import Path

from ..data_manifests.locations import changed_at, create, names_in, read_bytes, remove, write_bytes


class UrlFolder:
    """The folder of a store's leases, as `leases.Folder` wants it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clock = path / f"clock-{secrets.token_hex(4)}"

    def __str__(self) -> str:
        return str(self._path)

    def names(self) -> list[str]:
        """The objects."""
        return sorted(names_in(self._path))

    def create(self, name: str) -> None:
        """Make an empty object, which nothing locks; raises FileExistsError where there is one."""
        create(self._path / name)

    def read(self, name: str) -> bytes:
        """What is in an object."""
        return read_bytes(self._path / name)

    def write(self, name: str, content: bytes) -> None:
        """Replace an object, if it is there; one that is removed at this very moment comes back, and grows old."""
        self.read(name)
        write_bytes(self._path / name, content)

    def touch(self, name: str) -> None:
        """Make an object new."""
        write_bytes(self._path / name, self.read(name))

    def age_s(self, name: str) -> float:
        """Seconds since an object was written, by the clock of the server."""
        written = changed_at(self._path / name)
        write_bytes(self._clock, b"")
        try:
            return (changed_at(self._clock) - written).total_seconds()
        finally:
            remove(self._clock)

    def is_locked(self, name: str) -> None:
        """Nobody knows."""

    def remove(self, name: str) -> None:
        """Delete an object."""
        self.read(name)
        remove(self._path / name)
