"""The feature store as readers see it: features of any videos, straight from the disk into one batch.

catalogue.py tells the format; writer.py writes it.
"""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
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
from .catalogue import MANIFEST, SHARDS, TIMES, Catalogue, Header, Key
from .compress import restored
from .shards import SALVAGED, Damage, VideoRow, damage_of, read_shards
from .specs import IMPORTED, FeatureSpec, SpecMismatch, TowerShape, arrays_of, canonical_feature, canonical_features
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
        self.path, self._header, self.catalogue = path, header, catalogue
        self._reader, self._memory = FrameReader(), BatchMemory()
        self._arrays: dict[tuple[int, str], ArrayFile] = {}
        self._resident: dict[str, tuple[Tensor, dict[Key, int]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, (self.path, self._header, self.catalogue)

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
                for name, held in store.catalogue.holders.items()
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
        return tuple(sorted(video_id for video_id, view in self.catalogue.newest if view == 0))

    @cached_property
    def n_views(self) -> int:
        """V, views that every video has."""
        return min((sum(1 for _ in self.catalogue.views(video_id)) for video_id in self.ids), default=0)

    @cached_property
    def features(self) -> tuple[str, ...]:
        """Canonical names of the features that every video has."""
        keys = [(video_id, view) for video_id in self.ids for view in range(self.n_views)]
        held = {n for n, held in self.catalogue.holders.items() if keys and all(key in held for key in keys)}
        return canonical_features((n for n in held if n != TIMES and not n.startswith("scale.")), self.shape.layers)

    @property
    def failures(self) -> list[VideoRow]:
        """Rows of the videos whose last attempt failed: id, reason, attempts. Older features of them stay."""
        return self.catalogue.failures()

    @property
    def rows(self) -> list[VideoRow]:
        """The newest row of every view of every video, and of videos without features the failure; by id and view."""
        failed = (row for row in self.failures if row.video_id not in self)
        return sorted([*self.catalogue.rows(), *failed], key=lambda row: (row.video_id, row.view))

    @cached_property
    def longest(self) -> int:
        """T of the longest video."""
        return max((row.n_frames for row in self.catalogue.rows()), default=0)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, video_id: str) -> bool:
        return (video_id, 0) in self.catalogue.newest

    def __getitem__(self, video_id: str) -> FrameFeatures:
        """Everything of one video's first view; raises StoreError for one that the store lacks."""
        return FrameFeatures({name: self.read(name, video_id) for name in self.features}, self.read(TIMES, video_id))

    def read(self, name: str, video_id: str, view: int = 0) -> NDArray:
        """One feature of one view of a video, [T, ...], or its `timestamps_s` [T]; bfloat16 comes as float32."""
        if name == TIMES:
            return self._read(TIMES, (video_id, view)).numpy()
        canonical = canonical_feature(name, self.shape.layers)
        arrays = [self._read(array, (video_id, view)) for array in arrays_of(canonical, self.spec.dtype)]
        frames = restored(*arrays) if len(arrays) == 2 else arrays[0]
        return frames.float().numpy() if frames.dtype == torch.bfloat16 else frames.numpy()

    def stored(self, array: str, video_id: str, view: int = 0) -> NDArray:
        """One array of one view of a video as it lies in the store, [T, ...]; uint16 for the bits of bfloat16.

        Raises:
            StoreError: the store lacks it, or its bytes are not the ones that were written.
        """
        frames = self._read(array, (video_id, view))
        row = self.catalogue.row(self.catalogue.holders[array][video_id, view])
        if checksum(np.asarray(bytes_of(frames))) != row.crc32c[array]:
            raise StoreError(
                f"{array} of video {video_id!r} is damaged in {self.path}",
                fix="See `coldframe inspect STORE --verify`, and extract again what it lists.",
            )
        return (frames.view(torch.uint16) if frames.dtype == torch.bfloat16 else frames).numpy()

    def holds(self, array: str, video_id: str, view: int = 0) -> bool:
        """Whether the store has an array of a view of a video."""
        return (video_id, view) in self.catalogue.holders.get(array, ())

    def lengths(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Frames of each video, [B]; raises StoreError for a video that the store lacks."""
        return np.array([self._row((video_id, 0)).n_frames for video_id in ids], dtype=np.int64)

    def gather(
        self,
        ids: Sequence[str],
        names: Sequence[str],
        out: Mapping[str, Tensor] | None = None,
        *,
        view: int | Sequence[int] = 0,
        pin: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Read features of videos into one batch, each video with one read straight into its place.

        Args:
            ids: any videos of the store, in any order, also repeated.
            names: features, such as `embedding` or `tokens.-1`.
            out: contiguous tensors to fill, by canonical name, of exactly the shape and dtype that they would have.
            view: which view of the videos, or of each of them; all views of a video are equally long.
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
        views = [view] * len(ids) if isinstance(view, int | np.integer) else view
        if len(views) != len(ids):
            raise ValueError(f"{len(ids)} videos have {len(views)} views")
        keys = [(video_id, int(number)) for video_id, number in zip(ids, views, strict=True)]
        features: dict[str, Tensor] = {}
        for name in canonical_features(names, self.shape.layers):
            self._refuse_absent(name, keys)
            batch = self._batch(name, mask.shape, None if out is None else out[name], pin)
            frames = batch.flatten(0, 1)  # [B·T, ...], the same memory
            begins = range(0, mask.numel(), max(n_frames, 1))
            arrays = arrays_of(name, self.spec.dtype)
            if len(arrays) == 2:
                parts = [
                    self._memory.empty(
                        (len(frames), *self._header.frame_shape(a)), getattr(torch, self._header.dtype(a))
                    )
                    for a in arrays
                ]
                for array, part in zip(arrays, parts, strict=True):
                    self._fill(part, array, keys, begins)
                restored(*parts, out=frames)
            elif self._is_small(name):
                self._pick(frames, name, keys, mask)
            else:
                self._fill(frames, name, keys, begins)
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
                fix=self._how_to_add(missing),
            )

    def extract_command(self, features: Sequence[str], *, draws: int | None = None) -> str:
        """The command that adds features to this store, or draws of what is random."""
        tower, frames = self.spec.tower, self.spec.frames
        settings = {
            "store": self.path,
            "model": tower.model,
            "pretrained": tower.pretrained,
            "precision": tower.precision,
            "sampling": None if frames.sampling == "uniform" else frames.sampling,
            "frames": frames.n_frames,
            "stride": frames.stride,
            "clips": frames.clips,
            "fps": frames.rate_fps,
            "crops": frames.crops,
            "draws": None if frames.seed is None else draws or frames.draws,
            "seed": frames.seed or None,
            "decoder": frames.decoder,
            "dtype": self.spec.dtype,
            "token-grid": self.spec.token_grid,
            "features": ",".join(features),
        }
        options = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
        options += ["--flip"] if frames.flip else []
        return shlex.join(["coldframe", "extract", str(self.path / MANIFEST), *options])

    def _how_to_add(self, features: Sequence[str]) -> str:
        """What to do about features that are missing."""
        tower = self.spec.tower
        if self.spec.frames.sampling != IMPORTED:
            return f"Add what is missing: {self.extract_command(features)}"
        settings = {"store": str(self.path), "as": features[0], "dtype": self.spec.dtype}
        if tower.model != IMPORTED:
            settings |= {"model": tower.model, "pretrained": tower.pretrained}
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        source = tower.pretrained if tower.model == IMPORTED else "FILE"
        return (
            "The store was imported, so extract cannot add to it; import what is missing, if you have it: "
            + shlex.join(["coldframe", "import", source, *options])
        )

    def damage(self) -> Iterator[Damage]:
        """Whatever is not as it was written, shard by shard, also of rows that newer ones have replaced."""
        for shard in self.catalogue.shards:
            yield from damage_of(shard.path)

    def bad_videos(self) -> dict[str, tuple[str, ...]]:
        """Videos with arrays, of any view, whose bytes are not the ones that were written."""
        numbers = {shard.path.name: number for number, shard in enumerate(self.catalogue.shards)}
        bad: dict[str, set[str]] = defaultdict(set)
        for damage in self.damage():
            number, held = numbers[damage.shard], self.catalogue.holders.get(damage.array, {})
            for (video_id, _), place in held.items():
                if place[0] == number and damage.row in (None, place[1]):
                    bad[video_id].add(damage.array)
        return {video_id: tuple(sorted(bad[video_id])) for video_id in sorted(bad)}

    def row(self, video_id: str, view: int = 0) -> VideoRow:
        """What the store says of one view of a video; raises StoreError for one that it lacks."""
        return self._row((video_id, view))

    def duplicates(self) -> list[tuple[str, ...]]:
        """Ids of videos whose files hold the same bytes, and that show the same part of it; each group once."""
        groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for video_id in self.ids:
            record = self.manifest.by_id.get(video_id)
            if content := self._row((video_id, 0)).content_hash:
                groups[content, record and record.start_s, record and record.end_s].append(video_id)
        return [tuple(group) for group in groups.values() if len(group) > 1]

    def leaks(self, manifest: Manifest | None = None) -> list[tuple[str, ...]]:
        """Duplicates of which one is in another split than another: what is tested was trained on."""
        by_id = (manifest or self.manifest).by_id

        def splits(group: Iterable[str]) -> set[str]:
            return {by_id[video_id].split for video_id in group if video_id in by_id} - {""}

        return [group for group in self.duplicates() if len(splits(group)) > 1]

    def stats(self) -> dict[str, Any]:
        """What `inspect` shows, ready for JSON."""
        spec, shards = self.spec, self.catalogue.shards
        rows, n_frames = list(self.catalogue.rows()), self._n_frames
        return {
            "path": str(self.path),
            "fingerprint": self.fingerprint,
            "spec": spec.to_json(),
            "manifest_fingerprint": self._header.manifest_fingerprint,
            "n_videos": len(self.ids),
            "n_views": self.n_views,
            "n_failed": sum(row.video_id not in self for row in self.failures),
            "n_expected": len(self.manifest.ids),
            "n_frames": n_frames,
            "n_with_repeated_frames": sum(row.n_repeated > 0 for row in rows),
            "n_salvaged": sum(row.kept < SALVAGED and row.view == 0 for row in rows),
            "n_duplicates": sum(len(group) - 1 for group in self.duplicates()),
            "leaks": [list(group) for group in self.leaks()],
            "feature_bytes": {
                name: n_frames * sum(map(self._header.frame_bytes, arrays_of(name, spec.dtype)))
                for name in self.features
            },
            "decoders": dict(Counter(row.decoder for row in rows).most_common()),
            "failures": {row.video_id: row.reason for row in self.failures if row.video_id not in self},
            "failed_since": {row.video_id: row.reason for row in self.failures if row.video_id in self},
            "partly": self._partly(),
            "salvaged": {row.video_id: round(row.kept, 4) for row in rows if row.kept < SALVAGED and row.view == 0},
            "duplicates": [list(group) for group in self.duplicates()],
            "n_deferred": sum(row.status == "deferred" for row in self.failures),
            "n_shards": len(shards),
            "created_at": self._header.created_at,
            "created_by": self._header.created_by,
            "changed_at": changed_at(shards[-1].table).isoformat(timespec="seconds")
            if shards
            else self._header.created_at,
        }

    def describe(self) -> str:
        """`stats` for people."""
        facts, tower = self.stats(), self.spec.tower
        since = list(facts["failed_since"].items())
        grid = f", patches pooled to {self.spec.token_grid} x {self.spec.token_grid}" if self.spec.token_grid else ""
        lines = [
            f"{self.path}: {facts['n_videos']:,} of {facts['n_expected']:,} videos, {facts['n_frames']:,} frames, "
            f"{facts['n_failed']:,} failed",
            f"  tower    {tower.model} {tower.pretrained} {tower.precision}, weights {tower.weights_sha256[:16]}",
            f"  frames   {self.spec.frames.describe()}, decoder {self.spec.frames.decoder}, "
            f"stored as {self.spec.dtype}{grid}",
            f"  settings {self.fingerprint}, shards: {facts['n_shards']:,}, changed {facts['changed_at']}",
            *(f"  feature  {name:<11} {n_bytes / 1e3:12,.0f} kB" for name, n_bytes in facts["feature_bytes"].items()),
            *(
                f"  partly   {name}: {n:,} of {facts['n_videos']:,} videos have it"
                for name, n in facts["partly"].items()
            ),
            *([f"  views    {self.n_views} of every video"] if self.n_views > 1 else []),
            *([f"  salvaged {facts['n_salvaged']:,} damaged videos, as far as they go"] if facts["n_salvaged"] else []),
            *(
                [f"  copies   {facts['n_duplicates']:,} videos have the same bytes as another"]
                if facts["n_duplicates"]
                else []
            ),
            *(f"  LEAK     in several splits: {', '.join(group)}" for group in facts["leaks"][:20]),
            *(f"  since    {video_id}: {reason}; older features stay" for video_id, reason in since[:5]),
            *(f"  failed   {video_id}: {reason}" for video_id, reason in list(facts["failures"].items())[:20]),
            *([f"           and {facts['n_failed'] - 20:,} more, see --json"] if facts["n_failed"] > 20 else []),
        ]
        return "\n".join(lines)

    def _partly(self) -> dict[str, int]:
        """Features that some videos have and others lack, and how many have them."""
        names = [name for name in self._header.features if name not in self.features]
        held = {name: sum(view == 0 for _, view in self.catalogue.holders.get(name, ())) for name in names}
        return {name: n for name, n in held.items() if n}

    def _row(self, key: Key) -> VideoRow:
        """The row of a view that has features."""
        if (place := self.catalogue.newest.get(key)) is not None:
            return self.catalogue.row(place)
        video_id, view = key
        if video_id in self:
            raise StoreError(f"video {video_id!r} has no view {view} in {self.path}", wanted=f"one of {self.n_views}")
        if trouble := self.catalogue.troubles.get(video_id):
            raise StoreError(f"video {video_id!r} has no features in {self.path}: {trouble.reason}")
        raise StoreError(f"video {video_id!r} is not in the store {self.path}")

    def _refuse_absent(self, name: str, keys: Iterable[Key]) -> None:
        """Raise if one of these views lacks this feature."""
        held = self.catalogue.holders.get(name, {})
        for key in keys:
            if key not in held:
                self._row(key)
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
            array = self.catalogue.array(shard, name)
            found = (array.dtype, *array.frame_shape)
            wanted = (self._header.dtype(name), *self._header.frame_shape(name))
            if found != wanted:
                raise StoreError(f"{array.path} is not what the store says", seen=found, wanted=wanted)
            self._arrays[shard, name] = array
        return self._arrays[shard, name]

    def _read(self, array: str, key: Key) -> Tensor:
        """One array of one view of a video, [T, ...]."""
        shape = (self._row(key).n_frames, *self._header.frame_shape(array))
        self._refuse_absent(array, [key])
        frames = torch.empty(shape, dtype=getattr(torch, self._header.dtype(array)))
        self._fill(frames, array, [key], [0])
        return frames

    def _fill(self, frames: Tensor, name: str, keys: Sequence[Key], begins: Iterable[int]) -> None:
        """Read each view into `frames` [F, ...], from the frame on where it begins."""
        memory, held = bytes_of(frames), self.catalogue.holders.get(name, {})

        def reads() -> Iterator[tuple[ArrayFile, int, memoryview]]:
            for (number, row), begin in sorted(zip((held[key] for key in keys), begins, strict=True)):
                array, shard = self._array(number, name), self.catalogue.shards[number]
                target = memory[begin * array.frame_bytes :][: shard.rows[row].n_frames * array.frame_bytes]
                yield array, shard.first_frame[row], target

        self._reader.read_all(reads())

    def _is_small(self, name: str) -> bool:
        """Whether a feature is held in memory: one vector a frame, and not too many of them."""
        n_bytes = self._n_frames * self._header.frame_bytes(name)
        return len(self._header.frame_shape(name)) == 1 and n_bytes <= _RESIDENT_BYTES

    def _pick(self, frames: Tensor, name: str, keys: Sequence[Key], mask: Tensor) -> None:
        """Copy a feature that is held in memory into `frames` [B·T, D]."""
        held, begins = self._held(name)
        begin = torch.tensor([begins[key] for key in keys], dtype=torch.int64)  # [B]
        rows = begin[:, None] + torch.arange(mask.shape[1]) * mask  # [B, T]
        torch.index_select(held, 0, rows.flatten(), out=frames)

    def _held(self, name: str) -> tuple[Tensor, dict[Key, int]]:
        """A feature of all videos, [F, D], read when first asked for; and where each view begins in it."""
        if name not in self._resident:
            keys = sorted(self.catalogue.holders.get(name, ()))
            *begins, n_frames = accumulate((self._row(key).n_frames for key in keys), initial=0)
            frames = torch.empty((n_frames, *self._header.frame_shape(name)), dtype=self._dtype(name))
            self._fill(frames, name, keys, begins)
            self._resident[name] = frames, dict(zip(keys, begins, strict=True))
        return self._resident[name]

    def _dtype(self, name: str) -> torch.dtype:
        """Type of what readers get of a feature."""
        dtype = self._header.dtype(name)
        return torch.float16 if dtype == "int8" else getattr(torch, dtype)

    @cached_property
    def _n_frames(self) -> int:
        return sum(row.n_frames for row in self.catalogue.rows())
