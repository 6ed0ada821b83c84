"""The feature store as `extract` writes it: what is missing, dealt to shards, each written whole or not at all."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data_manifests.locations import is_local, location, names_in
from ..data_manifests.records import Manifest, listed
from .arrays import Descriptor, StoreError
from .catalogue import HEADER, MANIFEST, SHARDS, TIMES, Catalogue, Header
from .journal import Journal
from .shards import VideoRow, committed, read_shards, remove_torn, replace_file, write_shard
from .specs import FeatureSpec, TowerShape, canonical_features

if TYPE_CHECKING:
    from .frames import DecodedVideo

# A shard is what a killed run loses and what a commit holds in memory; but every shard costs each reader a few files.
_SHARD_BYTES, _SHARD_VIDEOS = 256 << 20, 256
_LOCK = "lock"


class FeatureWriter:
    """The one writer of a store, until it is closed or its process ends."""

    def __init__(
        self, path: Path, header: Header, catalogue: Catalogue, manifest: Manifest, features: tuple[str, ...]
    ) -> None:
        """Use `open`."""
        self.path, self.features = path, features
        self._header, self._catalogue, self._manifest = header, catalogue, manifest
        self._journal = Journal(path)
        self._next_number = catalogue.shards[-1].number + 1 if catalogue.shards else 0
        self._lock: Descriptor | None = None
        self._shard_videos = _SHARD_VIDEOS

    @classmethod
    def open(
        cls,
        path: Path | str,
        spec: FeatureSpec,
        shape: TowerShape,
        features: Iterable[str],
        manifest: Manifest,
        *,
        shard_videos: int | None = None,
    ) -> Self:
        """Create a store, or go on with one.

        Args:
            features: to be written for every video of `manifest`; what the store already holds stays.
            manifest: replaces the one in the store, of which it must hold every video that has features.
            shard_videos: videos to a shard, at most; None is 256. Large videos make smaller shards either way.

        Raises:
            SpecMismatch: the store was made with another spec; names the field.
            StoreError: another writer is at work; the folder is something else; or the store is damaged.
        """
        path, names = location(path), canonical_features(features, shape.layers)
        _refuse_other_folder(path)
        lock = None
        if is_local(path):  # behind a URL two writers waste work, but lose none: no shard is written over
            (path / SHARDS).mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path)
        try:
            if lock:
                remove_torn(path / SHARDS)
            catalogue = Catalogue(read_shards(path / SHARDS))
            header = _new_header(path, spec, shape, names, manifest, catalogue)
            replace_file(path / MANIFEST, manifest.write)
            header.write(path)
            writer = cls(path, header, catalogue, manifest, names)
        except BaseException:
            if lock:
                lock.close()  # a traceback that somebody keeps would hold it
            raise
        writer._lock, writer._shard_videos = lock, shard_videos or _SHARD_VIDEOS
        return writer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another writer in."""
        if self._lock:
            self._lock.close()

    @property
    def failures(self) -> list[VideoRow]:
        """Rows of the videos that could not be read: id, reason, attempts."""
        return self._catalogue.failures()

    def remaining(self, retry_failed: bool = False) -> list[str]:
        """Ids without a final row for the features asked for, sorted; a failure is final unless it is to be retried."""
        return [
            video_id
            for video_id in sorted(self._manifest.ids)
            if (retry_failed if self._has_failed(video_id) else self.missing(video_id))
        ]

    def missing(self, video_id: str) -> tuple[str, ...]:
        """The features asked for that the store lacks of a video; a failed one lacks them all."""
        if self._has_failed(video_id):
            return self.features
        return tuple(name for name in self.features if video_id not in self._catalogue.holders.get(name, ()))

    def plan(self, ids: Iterable[str]) -> list[list[str]]:
        """Deal videos to shards, in the order of their ids; videos that lack the same features lie together."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for video_id in sorted(ids):
            groups.setdefault(self.missing(video_id), []).append(video_id)
        shards: list[list[str]] = []
        for names, group in sorted(groups.items()):
            size = self._videos_in_a_shard(names)
            shards += [group[at : at + size] for at in range(0, len(group), size)]
        return shards

    def begin_shard(self, ids: Sequence[str]) -> ShardBuilder:
        """Begin one shard of a plan; it is numbered now and written when it is committed."""
        number, self._next_number = self._next_number, self._next_number + 1
        missing = {name for video_id in ids for name in self.missing(video_id)}
        self._journal.log("started", shard=number, n_videos=len(ids))
        return ShardBuilder(self, number, ids, canonical_features(missing, self._header.shape.layers))

    def _has_failed(self, video_id: str) -> bool:
        place = self._catalogue.newest.get(video_id)
        return place is not None and not self._catalogue.row(place).is_ok

    def _videos_in_a_shard(self, names: Iterable[str]) -> int:
        n_bytes = self._header.spec.frames.n_frames * sum(map(self._header.frame_bytes, names))
        return min(max(_SHARD_BYTES // max(n_bytes, 1), 1), self._shard_videos)


class ShardBuilder:
    """A shard while it is in memory."""

    def __init__(self, writer: FeatureWriter, number: int, ids: Iterable[str], features: tuple[str, ...]) -> None:
        """Use `FeatureWriter.begin_shard`."""
        self.features = features  # those that the shard's videos lack
        self._writer, self._number = writer, number
        self._awaited = set(ids)
        self._rows: dict[str, VideoRow] = {}
        self._arrays: dict[str, dict[str, NDArray]] = {name: {} for name in (*features, TIMES)}
        self._began = time.perf_counter()

    def add(
        self, video_id: str, features: Mapping[str, NDArray | Tensor], video: DecodedVideo, seconds: float = 0.0
    ) -> None:
        """Keep one video's features; the arrays are not copied before the commit.

        Args:
            features: canonical name -> [T, ...]; those that the store already has are left out. Floats are converted to
                the store's dtype; uint16 holds the bits of bfloat16.
            video: as it was decoded; its pixels are not looked at.
            seconds: that the video took.
        """
        n_frames = len(video.timestamps_s)
        self._arrived(video_id)
        for name in self.features:
            self._arrays[name][video_id] = self._storable(name, features[name], n_frames)
        self._arrays[TIMES][video_id] = np.ascontiguousarray(video.timestamps_s, dtype=np.float64)
        self._rows[video_id] = VideoRow(
            video_id,
            "ok",
            n_frames=n_frames,
            n_repeated=video.n_repeated,
            decoder=video.decoder,
            attempts=self._attempt(video_id),
            content_hash=video.content_sha256,
            seconds=seconds,
        )

    def fail(self, video_id: str, reason: str, seconds: float = 0.0) -> None:
        """Keep why a video has no features."""
        self._arrived(video_id)
        attempt = self._attempt(video_id)
        self._rows[video_id] = VideoRow(video_id, "failed", reason, attempts=attempt, seconds=seconds)
        self._writer._journal.log("failed", video_id=video_id, reason=reason, attempt=attempt, seconds=seconds)

    def commit(self) -> None:
        """Write what has arrived, all of it or nothing; a reader that opens the store from now on sees it.

        Raises:
            StoreError: the disk is full or failing; the store is as it was.
        """
        rows = [self._rows[video_id] for video_id in sorted(self._rows)]
        if not rows:
            return
        ok = [row.video_id for row in rows if row.is_ok]
        arrays = {name: [parts[video_id] for video_id in ok] for name, parts in self._arrays.items()}
        shard = write_shard(self._writer.path / SHARDS, self._number, rows, arrays)
        self._writer._catalogue.add(shard)
        self._writer._journal.log(
            "done",
            shard=self._number,
            n_ok=len(ok),
            n_failed=len(rows) - len(ok),
            seconds=round(time.perf_counter() - self._began, 3),
        )

    def _arrived(self, video_id: str) -> None:
        if video_id not in self._awaited:
            raise ValueError(f"{video_id!r} is not awaited by this shard, or has already arrived")
        self._awaited.remove(video_id)

    def _attempt(self, video_id: str) -> int:
        """Which attempt at the video this is, counted over runs."""
        place = self._writer._catalogue.newest.get(video_id)
        last = None if place is None else self._writer._catalogue.row(place)
        return 1 if last is None or last.is_ok else last.attempts + 1

    def _storable(self, name: str, frames: NDArray | Tensor, n_frames: int) -> NDArray:
        """Frames as the bytes that the store holds; raises ValueError for those of another shape or kind."""
        header = self._writer._header
        dtype, tensor = getattr(torch, header.dtype(name)), torch.as_tensor(frames)
        if tensor.shape != (n_frames, *header.frame_shape(name)) or n_frames < 1:
            raise ValueError(f"{name} must be [{n_frames}, {header.frame_shape(name)}], not {list(tensor.shape)}")
        if dtype == torch.bfloat16 and tensor.dtype == torch.uint16:
            return tensor.numpy()
        if tensor.is_floating_point() != dtype.is_floating_point:
            raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        return (tensor.view(torch.uint16) if dtype == torch.bfloat16 else tensor).numpy()


def _refuse_other_folder(path: Path) -> None:
    """Refuse a folder that is neither a store, nor one that was just begun, nor empty."""
    found = names_in(path)
    if HEADER in found:
        return
    begun = {_LOCK, MANIFEST, *(() if committed(path / SHARDS) else (SHARDS,))}
    if strangers := sorted(name for name in found if name not in begun and ".new." not in name):
        raise StoreError(
            f"{path} is neither a feature store nor empty", seen=listed(strangers), fix="Name a new folder."
        )


def _take_lock(path: Path) -> Descriptor:
    """Be the one writer; the system lets go when the process ends, however it ends."""
    file = path / _LOCK
    lock = Descriptor(str(file), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(
            f"another extract ({file.read_text() or 'just started'}) is writing {path}", fix="Wait for it, or end it."
        ) from error
    except OSError as error:
        raise StoreError(
            f"{path} cannot be locked: {error}", fix="Write to a file system that has locks, and copy the store."
        ) from error
    os.ftruncate(lock.number, 0)
    os.pwrite(lock.number, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return lock


def _new_header(
    path: Path, spec: FeatureSpec, shape: TowerShape, names: tuple[str, ...], manifest: Manifest, catalogue: Catalogue
) -> Header:
    """The header that a store shall have; refuses one that cannot go on as this spec or this manifest."""
    asked, created_at = names, datetime.now(UTC).isoformat(timespec="seconds")
    stored = Header.read(path) if HEADER in names_in(path) else None
    if stored and catalogue.shards:  # a store without a shard is bound to nothing
        stored.spec.expect(spec, f"the store {path}")
        _refuse_other_videos(_manifest_of(path, stored), manifest, catalogue)
        asked, created_at = canonical_features((*stored.features, *names), shape.layers), stored.created_at
    return Header(spec, shape, asked, manifest.fingerprint, created_at, f"coldframe {version('coldframe')}")


def _manifest_of(path: Path, header: Header) -> Manifest | None:
    """The manifest of a store, or None where it is lost: a writer may have died between manifest and header."""
    try:
        return header.read_manifest(path)
    except StoreError:
        return None


def _refuse_other_videos(stored: Manifest | None, given: Manifest, catalogue: Catalogue) -> None:
    """Refuse a manifest under which features of the store would be of no video, or of another part of it."""

    def is_another(video_id: str) -> bool:
        new = given.by_id.get(video_id)
        if new is None or stored is None:
            return new is None
        old = stored.by_id.get(video_id)
        return old is None or (old.start_s, old.end_s) != (new.start_s, new.end_s)

    ok = sorted(row.video_id for row in catalogue.rows() if row.is_ok)
    if others := [video_id for video_id in ok if is_another(video_id)]:
        raise StoreError(
            f"{len(others)} videos of the store are not in the manifest {given.name}, or at other times",
            seen=listed(others),
            fix="Extract a manifest that holds them too, or write to another store.",
        )
