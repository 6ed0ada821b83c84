"""One array of a shard, both directions: a zarr v3 array that is one raw shard file.

    <array>/zarr.json   metadata, written by zarr-python
    <array>/c.0.0.0     frames end to end, then where each of them lies

Any zarr library reads it. We read it faster: frames that lie end to end need no index once it has been checked, so a
video is one `preadv` from the file into the batch. bfloat16, which zarr lacks, is its bits in uint16 with the
attribute `dtype`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data_manifests.errors import ColdframeError
from ..data_manifests.locations import LocationError, file_size, is_url, read_bytes, read_ranges

# An absent frame reads as NaN in other libraries, never as a plausible zero; 0x7FC0 is bfloat16's.
_FILL = {"uint16": 0x7FC0, "float16": math.nan, "float32": math.nan, "float64": math.nan}


class StoreError(ColdframeError, OSError):
    """A store that is missing, truncated, corrupt, full or in use."""


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """An array whose index has been checked: frame i lies at byte i · frame_bytes of the file."""

    path: str
    n_frames: int
    frame_shape: tuple[int, ...]
    dtype: str  # bfloat16 where the file holds its bits

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read metadata and index of an array in this layout, whoever wrote it.

        Raises:
            StoreError: of another layout, truncated, corrupt.
            OSError, ValueError: files that are absent or no JSON.
        """
        meta = json.loads(read_bytes(folder / "zarr.json"))
        match meta:
            case {
                "shape": [n_frames, *frame],
                "data_type": str(dtype),
                "chunk_grid": {"configuration": {"chunk_shape": shard}},
                "codecs": [
                    {
                        "name": "sharding_indexed",
                        "configuration": {
                            "chunk_shape": [n_rows, *row],
                            "codecs": [{"name": "bytes"} as raw],
                            "index_codecs": [{"name": "bytes"}, {"name": "crc32c"}],
                            "index_location": "end",
                        },
                    }
                ],
            } if shard == meta["shape"] and row == frame and n_frames % n_rows == 0 and _is_little_endian(raw):
                n_chunks, chunk_bytes = n_frames // n_rows, n_rows * math.prod(frame) * np.dtype(dtype).itemsize
            case _:
                raise StoreError(f"{folder} is not one raw little-endian zarr shard of whole frames")
        separator = meta["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
        file = folder / _chunk_key(1 + len(frame), separator)
        _check_index(file, n_chunks, chunk_bytes)
        return cls(str(file), n_frames, tuple(frame), meta.get("attributes", {}).get("dtype", dtype))

    def read(self, first: int, n_frames: int) -> NDArray:
        """Some frames as they lie on the disk, [n, ...]; uint16 holds the bits of bfloat16."""
        dtype = np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype).newbyteorder("<")
        count = n_frames * math.prod(self.frame_shape)
        frames = np.fromfile(self.path, dtype, count, offset=first * self.frame_bytes)
        return frames.reshape(n_frames, *self.frame_shape)

    def checksum(self, first: int, n_frames: int) -> int:
        """crc32c of some frames' bytes, read a little at a time; of what there is where the file ends too soon."""
        left, crc = n_frames * self.frame_bytes, 0
        if is_url(self.path):
            for start in range(first * self.frame_bytes, first * self.frame_bytes + left, 1 << 24):
                part = bytearray(min(first * self.frame_bytes + left - start, 1 << 24))
                read_ranges([(self.path, start, memoryview(part))])
                crc = google_crc32c.extend(crc, bytes(part))
            return crc
        with open(self.path, "rb", buffering=0) as file:  # noqa: PTH123
            file.seek(first * self.frame_bytes)
            while left and (read := file.read(min(left, 1 << 24))):
                crc = google_crc32c.extend(crc, read)
                left -= len(read)
        return crc

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame."""
        return math.prod(self.frame_shape) * item_bytes(self.dtype)


class FrameReader:
    """Reads frames into memory that the caller owns; keeps few files open and survives a fork.

    `preadv` has no file position to share, so processes and threads may use the same descriptors. A file that the
    cache forgets is closed when the last read of it ends.
    """

    def __init__(self, max_open: int = 64) -> None:
        self._opened = functools.lru_cache(maxsize=max_open)(Descriptor)

    def read_all(self, reads: Iterable[tuple[ArrayFile, int, memoryview]]) -> None:
        """Fill each target (bytes) from a frame on; what lies behind URLs is asked for at once."""
        remote: list[tuple[str, int, memoryview]] = []
        for array, first, target in reads:
            if is_url(array.path):
                remote.append((array.path, first * array.frame_bytes, target))
            else:
                self.read_into(array, first, target)
        try:
            read_ranges(remote)
        except LocationError as error:
            raise StoreError(str(error)) from error

    def read_into(self, array: ArrayFile, first: int, target: memoryview) -> None:
        """Fill `target` (bytes) from frame `first` on; raises StoreError where the file ends too soon."""
        done, offset = 0, first * array.frame_bytes
        try:
            file = self._opened(array.path)
            while done < len(target):
                n_read = os.preadv(file.number, [target[done:]], offset + done)
                if not n_read:
                    raise StoreError("it ends too soon", seen=f"{offset + done} bytes")
                done += n_read
        except OSError as error:
            raise StoreError(f"{array.path} cannot be read at frame {first}: {error}") from error


class BatchMemory:
    """Memory for batches, used again when the last tensor in it is gone.

    Fresh memory costs a page fault every few KiB, together as much as the copy into it. Huge pages (which NumPy asks
    for and torch does not) make that a quarter; used memory has none. `preadv` wants an aligned target: from NumPy's
    16 bytes off a page it is three times slower.
    """

    def __init__(self, keep_bytes: int = 1 << 30) -> None:
        self._free: deque[NDArray[np.uint8]] = deque()
        self._keep_bytes = keep_bytes

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of whatever was there before."""
        n_bytes = math.prod(shape) * dtype.itemsize
        memory = self._take(n_bytes)
        start = -memory.ctypes.data % 4096
        used = memory[start : start + n_bytes]
        # The tensor's storage owns `used`: it dies with the last tensor that shares the storage.
        weakref.finalize(used, self._give_back, memory).atexit = False
        return torch.from_numpy(used).view(dtype).view(*shape)

    def _take(self, n_bytes: int) -> NDArray[np.uint8]:
        for _ in range(len(self._free)):
            try:
                memory = self._free.popleft()
            except IndexError:  # another thread was faster
                break
            if n_bytes <= memory.nbytes - 4096 <= 2 * n_bytes:
                return memory
            self._free.append(memory)
        return np.empty(n_bytes + 4096, np.uint8)

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        kept = self._free.copy()  # at once: threads take from it while the last tensor dies in another
        if sum(each.nbytes for each in kept) + memory.nbytes <= self._keep_bytes:
            self._free.append(memory)


def write_arrays(folder: Path, arrays: Mapping[str, Sequence[NDArray]]) -> None:
    """Write a zarr group of arrays; uint16 stands for the bits of bfloat16.

    Args:
        folder: of the group; must not exist.
        arrays: name -> what lies end to end in it, at least one [n, ...] each.
    """
    import zarr  # half a second to import, and readers never need it

    group = zarr.open_group(folder, mode="w-", zarr_format=3)
    for name, parts in arrays.items():
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        # A chunk to each frame; but one for all where a frame is one number, smaller than an index entry.
        chunk = (1, *shape[1:]) if shape[1:] else shape
        dtype = parts[0].dtype.name
        group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            shards=shape,
            chunks=chunk,
            compressors=None,
            filters=None,
            fill_value=_FILL.get(dtype, 0),
            chunk_key_encoding={"name": "default", "separator": "."},
            attributes={"dtype": "bfloat16"} if dtype == "uint16" else {},
        )
        # The payload is ours: zarr-python would hold the shard in memory twice more, and is several times slower.
        index = _index(shape[0] // chunk[0], math.prod(chunk) * parts[0].itemsize).tobytes()
        with (folder / name / _chunk_key(len(shape), ".")).open("xb") as file:
            for part in parts:
                file.write(_bytes_of(part).data)
            file.write(index + google_crc32c.value(index).to_bytes(4, "little"))


def checksum(frames: NDArray) -> int:
    """crc32c of an array's bytes."""
    return google_crc32c.value(_bytes_of(frames))


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def item_bytes(dtype: str) -> int:
    """Bytes of one number."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _bytes_of(array: NDArray) -> NDArray[np.uint8]:
    little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little_endian.reshape(-1).view(np.uint8)


def _is_little_endian(codec: Mapping[str, Any]) -> bool:
    return codec.get("configuration", {}).get("endian", "little") == "little"


def _chunk_key(n_dims: int, separator: str) -> str:
    """Name of the one file of an array that is one shard."""
    return separator.join(["c", *["0"] * n_dims])


def _check_index(file: Path, n_chunks: int, chunk_bytes: int) -> None:
    """Hold the file's index to its checksum, and to chunks that lie end to end.

    The index ends the file: n × (offset, bytes) as little-endian uint64, then the crc32c of that.
    """
    size, wanted = file_size(file), n_chunks * (chunk_bytes + 16) + 4
    if size != wanted:
        raise StoreError(f"{file} is truncated or grown", seen=f"{size} bytes", wanted=f"{wanted} bytes")
    tail = read_bytes(file, start=n_chunks * chunk_bytes)
    index, stated = tail[:-4], tail[-4:]
    if google_crc32c.value(index) != int.from_bytes(stated, "little"):
        raise StoreError(f"the index of {file} is corrupt")
    if index != _index(n_chunks, chunk_bytes).tobytes():
        raise StoreError(f"the frames of {file} do not lie end to end")


def _index(n_chunks: int, chunk_bytes: int) -> NDArray[np.uint64]:
    """Index of chunks that lie end to end, [n, 2] of offset and bytes."""
    offsets = np.arange(n_chunks, dtype="<u8") * np.uint64(chunk_bytes)
    return np.stack([offsets, np.full_like(offsets, chunk_bytes)], axis=1)


class Descriptor:
    """An open file that closes with its last reference, if not before."""

    __slots__ = ("number",)

    def __init__(self, path: str, flags: int = os.O_RDONLY) -> None:
        self.number = -1
        self.number = os.open(path, flags, 0o644)

    def close(self) -> None:
        """Close it now; closing twice does nothing."""
        number, self.number = (
            self.number,
            -1,
        )  # first, or an interrupt in between would close it again: by then, another
        if number >= 0:
            os.close(number)

    __del__ = close
