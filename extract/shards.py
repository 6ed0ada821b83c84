"""One shard of a store, both directions: a folder that appears whole or not at all, and never changes.

00007-1f2e3d4c/
  features.zarr/    a plain zarr v3 group, one array a feature: frames of all ok videos, in the order of the rows
  videos.parquet    one row a view of a video, with a checksum of its bytes in each array
  SHA256SUMS        of every other file, as sha256sum writes it; the folder's name ends in the digits of this file's own

So every byte of a shard is held to something: to its name, or to a file that is held to its name. Behind a URL, where no
folder can be renamed into place, the rows arrive last.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import os
import re
import shlex
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..data_manifests.locations import (
    LocationError,
    all_at_once,
    is_alive,
    is_local,
    is_out_of_reach,
    is_url,
    list_files,
    read_bytes,
    scratch_folder,
    upload,
    upload_folder,
)
from .arrays import ArrayFile, StoreError, checksum, write_arrays

SALVAGED = 0.95  # a video with a smaller share of its frames is damaged
_NAME = re.compile(r"(\d{5,})-[0-9a-f]{8}")
_TORN = ".tmp-"
_TORN_NAME = re.compile(re.escape(_TORN) + r"(.+)-(\d{1,9})-\d+")  # host, pid, number
_GROUP, _TABLE, _SUMS, _SUM = "features.zarr", "videos.parquet", "SHA256SUMS", "crc32c."
_COLUMNS = {
    "video_id": pa.string(),
    "status": pa.string(),
    "reason": pa.string(),
    "n_frames": pa.int32(),
    "n_repeated": pa.int32(),
    "view": pa.int32(),
    "n_source_frames": pa.int64(),
    "kept": pa.float64(),
    "source_bytes": pa.int64(),
    "decoder": pa.string(),
    "attempts": pa.int32(),
    "content_hash": pa.string(),
    "seconds": pa.float64(),
    "tried": pa.string(),
}


@dataclass(frozen=True, slots=True)
class VideoRow:
    """What a shard says of one video: that its features are here, or why they are not."""

    video_id: str
    status: str  # ok | failed, for good | deferred: failed for now, the next run tries again
    reason: str = ""
    n_frames: int = 0
    n_repeated: int = 0  # frames that repeat another, because the video has too few
    view: int = 0  # see sampling.py; a failed video has one row
    n_source_frames: int = 0  # of the whole file
    kept: float = 1.0  # share of the promised frames that could be decoded, where the file was salvaged
    source_bytes: int = 0  # size of the file
    decoder: str = ""
    attempts: int = 1
    content_hash: str = ""
    seconds: float = 0.0
    tried: str = ""  # of a failure: under which settings
    crc32c: Mapping[str, int] = dataclasses.field(default_factory=dict)  # array -> checksum of the video's bytes

    @property
    def is_ok(self) -> bool:
        """Whether the shard holds the video's frames."""
        return self.status == "ok"


@dataclass(frozen=True)
class Shard:
    """A committed shard: its rows, and where each video's frames begin."""

    path: Path
    rows: tuple[VideoRow, ...]
    arrays: tuple[str, ...]  # each of them holds every ok video of the shard

    @property
    def number(self) -> int:
        """Shards are numbered as they are written: of two rows of a video, the one in the higher number is newer."""
        return int(self.path.name.partition("-")[0])

    @property
    def table(self) -> Path:
        """The file of the rows: where it is, the shard is whole."""
        return self.path / _TABLE

    @property
    def sums(self) -> bytes:
        """The digests of its files: two shards with the same are the same."""
        return read_bytes(self.path / _SUMS)

    @functools.cached_property
    def first_frame(self) -> tuple[int, ...]:
        """Where each row's frames begin, and after the last row F."""
        return tuple(accumulate((row.n_frames for row in self.rows), initial=0))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the rows of a shard; raises StoreError where they are missing or damaged."""
        try:
            content = pa.BufferReader(read_bytes(path / _TABLE))
            with pq.ParquetFile(content, page_checksum_verification=True) as file:
                table = file.read(use_threads=False)  # its threads may outlive the interpreter, and abort it
            arrays = tuple(name.removeprefix(_SUM) for name in table.column_names if name.startswith(_SUM))
            sums = table.select([_SUM + name for name in arrays]).rename_columns(arrays).to_pylist()
            columns = [name for name in _COLUMNS if name in table.column_names]  # an older release wrote fewer
            rows = tuple(
                VideoRow(**row, crc32c=crc32c if row["status"] == "ok" else {})
                for row, crc32c in zip(table.select(columns).to_pylist(), sums, strict=True)
            )
        except (OSError, KeyError, TypeError, pa.ArrowException) as error:
            if is_out_of_reach(error):
                raise
            raise StoreError(f"the rows of shard {path} cannot be read: {error}", fix=_repair(path)) from error
        return cls(path, rows, arrays)

    def array(self, name: str) -> ArrayFile:
        """Open an array and check its index; raises StoreError with the path and the videos that it should hold."""
        try:
            array = ArrayFile.open(self.path / _GROUP / name)
            if array.n_frames != self.first_frame[-1]:
                raise StoreError("another number of frames", seen=array.n_frames, wanted=self.first_frame[-1])
        except (OSError, ValueError) as error:
            is_lost = isinstance(error, OSError) and error.errno not in (None, errno.ENOENT)  # not our word
            if is_lost or is_out_of_reach(error):
                detail = getattr(error, "strerror", None) or error
                raise StoreError(f"array {name} of shard {self.path} cannot be read: {detail}") from error
            ids = [row.video_id for row in self.rows if row.is_ok]
            more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
            raise StoreError(
                f"array {name} of shard {self.path} (with {', '.join(ids[:3])}{more}) is damaged: {error}",
                fix=_repair(self.path),
            ) from error
        return array


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is not as it was written."""

    shard: str
    problem: str
    array: str = ""  # that cannot be trusted; "" for a file that holds no features
    row: int | None = None  # of that array; None for all of them
    is_unreadable: bool = False  # the rows themselves are lost

    def __str__(self) -> str:
        return f"{self.shard}: {self.problem}"


def damage_of(path: Path) -> Iterator[Damage]:
    """Hold every byte of a shard to its checksum; nothing of it is held in memory."""
    yield from _changed_files(path)
    try:
        shard = Shard.read(path)
    except StoreError as error:
        yield Damage(path.name, str(error), is_unreadable=True)
        return
    for name in shard.arrays if shard.first_frame[-1] else ():
        try:
            array = shard.array(name)
        except StoreError as error:
            if is_out_of_reach(error):
                raise
            yield Damage(path.name, str(error), name)
            continue
        ok = [(number, shard.first_frame[number], row) for number, row in enumerate(shard.rows) if row.is_ok]
        for (number, _, row), crc in zip(ok, _checksums(array, [(at, row.n_frames) for _, at, row in ok]), strict=True):
            if crc != row.crc32c[name]:
                yield Damage(path.name, f"{name} of {row.video_id!r} is not what was written", name, number)


def committed(folder: Path) -> list[Path]:
    """The shards in a folder, oldest first; torn ones are not among them."""
    if is_local(folder):
        found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    else:  # the rows of a shard arrive last
        holders = [
            folder / name.removesuffix(f"/{_TABLE}") for name in list_files(folder) if name.endswith(f"/{_TABLE}")
        ]
        found = [path for path in holders if _NAME.fullmatch(path.name) and path.parent == folder]
    return sorted(found, key=lambda path: (int(path.name.partition("-")[0]), path.name))


def read_shards(folder: Path) -> list[Shard]:
    """Every committed shard of a folder, oldest first; raises StoreError where one cannot be read."""
    found = committed(folder)
    return [Shard.read(path) for path in found] if is_local(folder) else all_at_once(Shard.read, found)


def write_shard(folder: Path, number: int, rows: Sequence[VideoRow], arrays: Mapping[str, Sequence[NDArray]]) -> Shard:
    """Write a shard beside its place, have it on the disk, then rename it into place; or upload it, its rows last.

    Args:
        folder: of the store's shards.
        number: higher than that of any shard there.
        rows: of all videos, failed ones too; checksums are filled in here.
        arrays: name -> an array [T, ...] for each ok row, in the order of the rows; uint16 for the bits of bfloat16.

    Raises:
        StoreError: the disk is full or failing; nothing is left behind.
    """
    if not is_local(folder):
        return _upload_shard(folder, number, rows, arrays)
    rows = _with_checksums(rows, arrays)
    torn = _torn(folder, number)
    n_bytes = sum(part.nbytes for parts in arrays.values() for part in parts)
    if shutil.disk_usage(folder).free < n_bytes:
        raise _disk_full(folder, n_bytes)
    offsets = np.array([0, *accumulate(row.n_frames for row in rows)], dtype=np.int64)
    try:
        torn.mkdir()
        filled = {name: parts for name, parts in arrays.items() if parts}  # none where every video failed
        write_arrays(torn / _GROUP, {**filled, "frame_offsets": [offsets]})
        _write_rows(torn / _TABLE, rows, list(arrays))
        final = folder / f"{number:05d}-{_write_sums(torn, list(filled))}"
        for path in _bottom_up(torn):
            _sync(path)
        torn.rename(final)
        _sync(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(folder, n_bytes) from error
        raise StoreError(f"a shard could not be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(torn, ignore_errors=True)  # what a failure left; nothing after the rename
    return Shard(final, tuple(rows), tuple(arrays))


def copy_shard(source: Path, folder: Path, number: int) -> None:
    """Put a shard of another store into a folder under a new number, linked file by file where that can be."""
    torn = _torn(folder, number)

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:  # another file system
            shutil.copyfile(one, other)

    try:
        shutil.copytree(source, torn, copy_function=link)
        for path in _bottom_up(torn):
            _sync(path)
        torn.rename(folder / f"{number:05d}-{source.name.rpartition('-')[2]}")
        _sync(folder)
    except OSError as error:
        raise StoreError(f"the shard {source} could not be copied to {folder}: {error}") from error
    finally:
        shutil.rmtree(torn, ignore_errors=True)


def remove_shard(path: Path) -> None:
    """Delete a shard, at once as readers see it."""
    torn = _torn(path.parent, int(path.name.partition("-")[0]))
    path.rename(torn)
    shutil.rmtree(torn)


def _upload_shard(
    folder: Path, number: int, rows: Sequence[VideoRow], arrays: Mapping[str, Sequence[NDArray]]
) -> Shard:
    with scratch_folder() as here:
        shard = write_shard(here, number, rows, arrays)
        there = folder / shard.path.name
        try:
            upload_folder(shard.path, there, last=_TABLE)
        except LocationError as error:
            raise StoreError(f"a shard could not be written to {folder}: {error}") from error
    return dataclasses.replace(shard, path=there)


def remove_torn(folder: Path) -> None:
    """Delete what dead writers left half-written; one that may be alive keeps its folder."""
    for path in folder.glob(f"{_TORN}*"):
        name = _TORN_NAME.fullmatch(path.name)
        if name is None or name[1] != socket.gethostname():
            continue
        if (pid := int(name[2])) == os.getpid() or not is_alive(pid):
            shutil.rmtree(path)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Change a small file so that readers see the old one or the new one, whatever happens; `write` makes the new."""
    if not is_local(path):
        with scratch_folder() as here:
            write(here / path.name)
            upload(here / path.name, path)
        return
    new = path.with_stem(f"{path.stem}.new")
    write(new)
    _sync(new)
    new.replace(path)
    _sync(path.parent)


def _torn(folder: Path, number: int) -> Path:
    """Where a shard lies until it is whole."""
    return folder / f"{_TORN}{socket.gethostname()}-{os.getpid()}-{number:05d}"


def _with_checksums(rows: Sequence[VideoRow], arrays: Mapping[str, Sequence[NDArray]]) -> list[VideoRow]:
    left = {name: iter(parts) for name, parts in arrays.items()}

    def summed(row: VideoRow) -> VideoRow:
        return dataclasses.replace(row, crc32c={name: checksum(next(parts)) for name, parts in left.items()})

    return [summed(row) if row.is_ok else row for row in rows]


def _write_rows(path: Path, rows: Sequence[VideoRow], arrays: Sequence[str]) -> None:
    table: dict[str, Any] = {
        name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in _COLUMNS.items()
    }
    table |= {_SUM + name: pa.array([row.crc32c.get(name) for row in rows], pa.uint32()) for name in arrays}
    pq.write_table(pa.table(table), path, write_page_checksum=True)


def _write_sums(torn: Path, arrays: Sequence[str]) -> str:
    """List the digests of the files that no checksum in the rows covers; gives the first digits of the list's own."""
    covered = {torn / _GROUP / name for name in arrays}
    paths = sorted(p for p in torn.rglob("*") if p.is_file() and (p.parent not in covered or p.suffix == ".json"))
    lines = [f"{_sha256(path.read_bytes())}  {path.relative_to(torn).as_posix()}\n" for path in paths]
    (torn / _SUMS).write_text("".join(lines), encoding="utf-8")
    return _sha256("".join(lines).encode())[:8]


def _checksums(array: ArrayFile, spans: Sequence[tuple[int, int]]) -> Iterable[int]:
    """Checksums of spans of frames; those behind a URL are asked for at once."""
    if is_url(array.path):
        return all_at_once(lambda span: array.checksum(*span), spans)
    return (array.checksum(*span) for span in spans)


def _changed_files(path: Path) -> Iterator[Damage]:
    """Hold a shard's small files to their digests, and these to the folder's name."""
    try:
        listed = read_bytes(path / _SUMS)
    except OSError as error:
        if is_out_of_reach(error):
            raise
        yield Damage(path.name, f"{_SUMS} cannot be read: {error.strerror or error}")
        return
    if not path.name.endswith(_sha256(listed)[:8]):
        yield Damage(path.name, f"{_SUMS} is not what was written")
        return
    for line in listed.decode().splitlines():
        digest, _, name = line.partition("  ")
        try:
            is_changed = _sha256(read_bytes(path / name)) != digest
        except OSError as error:
            if is_out_of_reach(error):
                raise
            is_changed = True
        if is_changed:
            parts = name.split("/")
            array = parts[1] if parts[0] == _GROUP and len(parts) == 3 and parts[1] != "frame_offsets" else ""
            yield Damage(path.name, f"{name} is not what was written", array, is_unreadable=name == _TABLE)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _bottom_up(folder: Path) -> Iterator[Path]:
    """Everything in a folder before the folder."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _bottom_up(path)
        else:
            yield path
    yield folder


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _repair(shard: Path) -> str:
    return f"Mend it: coldframe verify {shlex.quote(str(shard.parents[1]))} --repair"


def _disk_full(folder: Path, n_bytes: int) -> StoreError:
    return StoreError(
        f"the disk of {folder} is full",
        seen=f"{shutil.disk_usage(folder).free:,} bytes free",
        wanted=f"{n_bytes:,} bytes for the next shard",
        fix="Free some space and run the same command again: what is committed stays.",
    )
