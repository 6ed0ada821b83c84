"""The feature store as readers see it: features of any videos, straight from the disk into one batch.

catalogue.py tells the format; writer.py writes it.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data_manifests.locations import all_at_once, changed_at, is_local, location
from ..data_manifests.records import Manifest
from .arrays import ArrayFile, BatchMemory, FrameReader, StoreError, bytes_of, checksum
from .catalogue import MANIFEST, SHARDS, TIMES, Catalogue, Header
from .shards import VideoRow, read_shards
from .specs import FeatureSpec, SpecMismatch, TowerShape, canonical_feature, canonical_features
from .writer import FeatureWriter, ShardBuilder

__all__ = ["FeatureStore", "FeatureWriter", "FrameFeatures", "ShardBuilder", "StoreError", "VideoRow"]

_RESIDENT_BYTES = 4 << 30  # features without patches are held in memory, each up to this size


@dataclass(frozen=True, slots=True, eq=False)
class FrameFeatures:
    """One video."""

    features: Mapping[str, NDArray]  # canonical name -> [T, ...]; bfloat16 comes as float32
    timestamps_s: NDArray[np.float64]  # [T]


class FeatureStore:
    """A store as it was when it was opened; picklable, and usable in forked and spawned processes alike."""

    def __init__(self, path: Path, header: Header, catalogue: Catalogue) -> None:
        """Use `open`."""
        self.path, self._header, self._catalogue = path, header, catalogue
        self._reader, self._memory = FrameReader(), BatchMemory()
        self._arrays: dict[tuple[int, str], ArrayFile] = {}
        self._resident: dict[str, tuple[Tensor, dict[str, int]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, (self.path, self._header, self._catalogue)

    @classmethod
    def open(cls, path: Path | str, expect: FeatureSpec | None = None, *, check: bool = True) -> Self:
        """Open a store for reading, in a folder or behind a URL.

        Args:
            expect: refuse a store that was made otherwise.
            check: hold every array's size and index to what they must be; False opens a damaged store.

        Raises:
            StoreError: no store, of an unknown format version, or damaged.
            SpecMismatch: not what `expect` says; names the field.
            LocationError: a URL that cannot be read.
        """
        path = location(path)
        store = cls(path, Header.read(path), Catalogue(read_shards(path / SHARDS)))
        if expect is not None:
            store.spec.expect(expect, f"the store {path}")
        if check:
            arrays = [
                (shard, name)
                for name, held in store._catalogue.holders.items()
                for shard in sorted({shard for shard, _ in held.values()})
            ]
            if is_local(path):
                for array in arrays:
                    store._array(*array)
            else:
                all_at_once(lambda array: store._array(*array), arrays)
        return store

    @property
    def spec(self) -> FeatureSpec:
        """What made the features."""
        return self._header.spec

    @property
    def shape(self) -> TowerShape:
        """Sizes of the tower."""
        return self._header.shape

    @property
    def fingerprint(self) -> str:
        """Of the spec: it names the store."""
        return self.spec.fingerprint

    @cached_property
    def manifest(self) -> Manifest:
        """The videos that the store is of, with the labels they had."""
        return self._header.read_manifest(self.path)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Ids of the videos that have features, sorted."""
        return tuple(sorted(row.video_id for row in self._catalogue.rows() if row.is_ok))

    @cached_property
    def features(self) -> tuple[str, ...]:
        """Canonical names of the features that every video has."""
        held = {n: ids for n, ids in self._catalogue.holders.items() if n != TIMES and all(i in ids for i in self.ids)}
        return canonical_features(held if self.ids else (), self.shape.layers)

    @property
    def failures(self) -> list[VideoRow]:
        """Rows of the videos that could not be read: id, reason, attempts."""
        return self._catalogue.failures()

    @property
    def rows(self) -> list[VideoRow]:
        """The newest row of every video, failed ones too, by id."""
        return sorted(self._catalogue.rows(), key=lambda row: row.video_id)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, video_id: str) -> bool:
        place = self._catalogue.newest.get(video_id)
        return place is not None and self._catalogue.row(place).is_ok

    def __getitem__(self, video_id: str) -> FrameFeatures:
        """Everything of one video; raises StoreError for one that the store lacks."""
        return FrameFeatures({name: self.read(name, video_id) for name in self.features}, self.read(TIMES, video_id))

    def read(self, name: str, video_id: str) -> NDArray:
        """One feature of one video, [T, ...], or its `timestamps_s` [T]; bfloat16 comes as float32."""
        canonical = name if name == TIMES else canonical_feature(name, self.shape.layers)
        frames = self._read(canonical, video_id)
        return frames.float().numpy() if frames.dtype == torch.bfloat16 else frames.numpy()

    def lengths(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Frames of each video, [B]; raises StoreError for a video that the store lacks."""
        return np.array([self._row(video_id).n_frames for video_id in ids], dtype=np.int64)

    def gather(
        self,
        ids: Sequence[str],
        names: Sequence[str],
        out: Mapping[str, Tensor] | None = None,
        *,
        pin: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Read features of videos into one batch, each video with one read straight into its place.

        Args:
            ids: any videos of the store, in any order, also repeated.
            names: features, such as `embedding` or `tokens.-1`.
            out: contiguous tensors to fill, by canonical name, of exactly the shape and dtype that they would have.
            pin: read into page-locked memory, from which copies to an accelerator overlap with work.

        Returns:
            canonical name -> [B, T, ...] with T of the longest video, zeros after the end of a shorter one;
            and the mask [B, T], True where there is a frame.

        Raises:
            StoreError: a video that the store lacks, or a file that cannot be read.
            SpecMismatch: a feature that not all of these videos have; says how to add it.
        """
        lengths = torch.from_numpy(self.lengths(ids))  # [B]
        n_frames = int(lengths.max()) if len(ids) else 0
        mask = torch.arange(n_frames) < lengths[:, None]  # [B, T]
        features: dict[str, Tensor] = {}
        for name in canonical_features(names, self.shape.layers):
            self._refuse_absent(name, ids)
            batch = self._batch(name, mask.shape, None if out is None else out[name], pin)
            frames = batch.flatten(0, 1)  # [B·T, ...], the same memory
            if self._is_small(name):
                self._pick(frames, name, ids, mask)
            else:
                self._fill(frames, name, ids, range(0, mask.numel(), max(n_frames, 1)))
            if not mask.all():
                batch[~mask] = 0
            features[name] = batch
        return features, mask

    def require(self, features: Iterable[str], wanted_by: str) -> None:
        """Raise SpecMismatch, ending with the command that adds them, if some video lacks one of the features."""
        missing = [name for name in canonical_features(features, self.shape.layers) if name not in self.features]
        if missing:
            raise SpecMismatch(
                f"{wanted_by} needs {', '.join(missing)}, which not all videos of {self.path} have",
                seen=", ".join(self.features) or "no features",
                fix=f"Add what is missing: {self.extract_command(missing)}",
            )

    def extract_command(self, features: Sequence[str]) -> str:
        """The command that adds features to this store."""
        tower, frames = self.spec.tower, self.spec.frames
        settings = {
            "store": self.path,
            "model": tower.model,
            "pretrained": tower.pretrained,
            "precision": tower.precision,
            "frames": frames.n_frames,
            "decoder": frames.decoder,
            "dtype": self.spec.dtype,
            "features": ",".join(features),
        }
        options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return shlex.join(["coldframe", "extract", str(self.path / MANIFEST), *options])

    def verify(self, video_id: str) -> tuple[str, ...]:
        """Names of a video's arrays whose bytes are not the ones that were written, or cannot be read."""
        self._row(video_id)
        return tuple(
            name
            for name, held in self._catalogue.holders.items()
            if video_id in held and not self._is_sound(name, video_id, self._catalogue.row(held[video_id]))
        )

    def checksums(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """`verify` of every video, in the order in which they lie on the disk."""
        for video_id in sorted(self.ids, key=lambda video_id: self._catalogue.newest[video_id]):
            yield video_id, self.verify(video_id)

    def bad_videos(self) -> dict[str, tuple[str, ...]]:
        """Videos with bytes that are not the ones that were written, and in which arrays."""
        return {video_id: bad for video_id, bad in self.checksums() if bad}

    def stats(self) -> dict[str, Any]:
        """What `inspect` shows, ready for JSON."""
        spec, shards = self.spec, self._catalogue.shards
        rows, n_frames = [self._row(video_id) for video_id in self.ids], self._n_frames
        return {
            "path": str(self.path),
            "fingerprint": self.fingerprint,
            "spec": spec.to_json(),
            "manifest_fingerprint": self._header.manifest_fingerprint,
            "n_videos": len(rows),
            "n_failed": len(self.failures),
            "n_frames": n_frames,
            "n_with_repeated_frames": sum(row.n_repeated > 0 for row in rows),
            "feature_bytes": {name: n_frames * self._header.frame_bytes(name) for name in self.features},
            "decoders": dict(Counter(row.decoder for row in rows).most_common()),
            "failures": {row.video_id: row.reason for row in self.failures},
            "n_shards": len(shards),
            "created_at": self._header.created_at,
            "created_by": self._header.created_by,
            "changed_at": changed_at(shards[-1].table).isoformat(timespec="seconds")
            if shards
            else self._header.created_at,
        }

    def describe(self) -> str:
        """`stats` for people."""
        facts, tower, frames = self.stats(), self.spec.tower, self.spec.frames
        lines = [
            f"{self.path}: {facts['n_videos']:,} videos, {facts['n_frames']:,} frames, {facts['n_failed']:,} failed",
            f"  tower    {tower.model} {tower.pretrained} {tower.precision}, weights {tower.weights_sha256[:16]}",
            f"  frames   {frames.n_frames} {frames.sampling}, decoder {frames.decoder}, stored as {self.spec.dtype}",
            f"  settings {self.fingerprint}, shards: {facts['n_shards']:,}, changed {facts['changed_at']}",
            *(f"  feature  {name:<11} {n_bytes / 1e3:12,.0f} kB" for name, n_bytes in facts["feature_bytes"].items()),
            *(f"  failed   {video_id}: {reason}" for video_id, reason in list(facts["failures"].items())[:20]),
            *([f"           and {facts['n_failed'] - 20:,} more, see --json"] if facts["n_failed"] > 20 else []),
        ]
        return "\n".join(lines)

    def _row(self, video_id: str) -> VideoRow:
        """The row of a video that has features."""
        place = self._catalogue.newest.get(video_id)
        if place is None:
            raise StoreError(f"video {video_id!r} is not in the store {self.path}")
        row = self._catalogue.row(place)
        if not row.is_ok:
            raise StoreError(f"video {video_id!r} has no features in {self.path}: {row.reason}")
        return row

    def _refuse_absent(self, name: str, ids: Iterable[str]) -> None:
        """Raise SpecMismatch if one of these videos, which all have features, lacks this one."""
        held = self._catalogue.holders.get(name, {})
        if not all(video_id in held for video_id in ids):
            self.require([name], "what is asked for")

    def _batch(self, name: str, rows: Sequence[int], out: Tensor | None, pin: bool) -> Tensor:
        """Where a batch [B, T, ...] goes: the caller's tensor, or a new one."""
        shape, dtype = (*rows, *self._header.frame_shape(name)), self._dtype(name)
        if out is None:
            return torch.empty(shape, dtype=dtype, pin_memory=True) if pin else self._memory.empty(shape, dtype)
        if out.shape != shape or out.dtype != dtype or not out.is_contiguous():
            raise ValueError(f"out[{name!r}] must be contiguous {dtype} {shape}, not {out.dtype} {tuple(out.shape)}")
        return out

    def _array(self, shard: int, name: str) -> ArrayFile:
        """An array of a shard, opened and checked once."""
        if (shard, name) not in self._arrays:
            array = self._catalogue.shards[shard].array(name)
            found = (array.dtype, *array.frame_shape)
            wanted = (self._header.dtype(name), *self._header.frame_shape(name))
            if found != wanted:
                raise StoreError(f"{array.path} is not what the store says", seen=found, wanted=wanted)
            self._arrays[shard, name] = array
        return self._arrays[shard, name]

    def _read(self, name: str, video_id: str) -> Tensor:
        """One array of one video, [T, ...]."""
        shape = (self._row(video_id).n_frames, *self._header.frame_shape(name))
        self._refuse_absent(name, [video_id])
        frames = torch.empty(shape, dtype=self._dtype(name))
        self._fill(frames, name, [video_id], [0])
        return frames

    def _fill(self, frames: Tensor, name: str, ids: Sequence[str], begins: Iterable[int]) -> None:
        """Read each video into `frames` [F, ...], from the frame on where it begins."""
        memory, held = bytes_of(frames), self._catalogue.holders.get(name, {})

        def reads() -> Iterator[tuple[ArrayFile, int, memoryview]]:
            for (number, row), begin in sorted(zip((held[video_id] for video_id in ids), begins, strict=True)):
                array, shard = self._array(number, name), self._catalogue.shards[number]
                target = memory[begin * array.frame_bytes :][: shard.rows[row].n_frames * array.frame_bytes]
                yield array, shard.first_frame[row], target

        self._reader.read_all(reads())

    def _is_small(self, name: str) -> bool:
        """Whether a feature is held in memory: one vector a frame, and not too many of them."""
        n_bytes = self._n_frames * self._header.frame_bytes(name)
        return len(self._header.frame_shape(name)) == 1 and n_bytes <= _RESIDENT_BYTES

    def _pick(self, frames: Tensor, name: str, ids: Sequence[str], mask: Tensor) -> None:
        """Copy a feature that is held in memory into `frames` [B·T, D]."""
        held, begins = self._held(name)
        begin = torch.tensor([begins[video_id] for video_id in ids], dtype=torch.int64)  # [B]
        rows = begin[:, None] + torch.arange(mask.shape[1]) * mask  # [B, T]
        torch.index_select(held, 0, rows.flatten(), out=frames)

    def _held(self, name: str) -> tuple[Tensor, dict[str, int]]:
        """A feature of all videos, [F, D], read when first asked for; and where each video begins in it."""
        if name not in self._resident:
            ids = [video_id for video_id in self.ids if video_id in self._catalogue.holders.get(name, ())]
            *begins, n_frames = accumulate(self.lengths(ids).tolist(), initial=0)
            frames = torch.empty((n_frames, *self._header.frame_shape(name)), dtype=self._dtype(name))
            self._fill(frames, name, ids, begins)
            self._resident[name] = frames, dict(zip(ids, begins, strict=True))
        return self._resident[name]

    def _is_sound(self, name: str, video_id: str, row: VideoRow) -> bool:
        try:
            return checksum(np.asarray(bytes_of(self._read(name, video_id)))) == row.crc32c[name]
        except StoreError:
            return False

    def _dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self._header.dtype(name))

    @cached_property
    def _n_frames(self) -> int:
        return int(self.lengths(self.ids).sum())
