"""The feature store as `extract` writes it: what is missing, dealt to shards, each written whole or not at all."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data_manifests.locations import is_local, is_url, location, names_in
from ..data_manifests.records import Manifest, VideoRecord, listed
from .arrays import StoreError
from .catalogue import COPY, HEADER, MANIFEST, SHARDS, TIMES, Catalogue, Header, Key, way_back
from .compress import rounded
from .journal import Journal
from .leases import LEASES, WHOLE, Lease, Part, exclusive, live
from .shards import VideoRow, committed, read_shards, remove_torn, replace_file, write_shard
from .specs import FeatureSpec, FrameSpec, SpecMismatch, TowerShape, arrays_of, canonical_features

if TYPE_CHECKING:
    from .frames import DecodedVideo

# A shard is what a killed run loses and what a commit holds in memory; but every shard costs each reader a few files.
SHARD_BYTES, SHARD_VIDEOS = 256 << 20, 256
_INDEX_BYTES = 16  # of one frame in one array
_ROW_BYTES, _SUM_BYTES, _META_BYTES = 95, 5, 2500  # about: of a view, of its array, of an array's description
_USUAL_FRAMES = 300  # of a video whose length is not fixed
_ATTEMPTS = 3  # at a video that failed for now; then it needs a word from the user


class FeatureWriter:
    """The one writer of a store, until it is closed or its process ends."""

    def __init__(
        self,
        path: Path,
        header: Header,
        catalogue: Catalogue,
        manifest: Manifest,
        features: tuple[str, ...],
        part: Part,
        lease: Lease | None,
    ) -> None:
        """Use `open` or `preview`."""
        self.path, self.features = path, features
        self._header, self._catalogue, self._manifest = header, catalogue, manifest
        self._journal = Journal(path)
        self._next_number = catalogue.shards[-1].number + 1 if catalogue.shards else 0
        self._part, self._lease = part, lease
        self.void: Mapping[str, Collection[str]] = {}  # video id -> arrays that are there but shall be written again
        self.n_relabelled = 0  # videos whose label, split or group was another in the store's manifest
        self.tried = ""  # what a failure depends on besides the file
        self._shard_videos = SHARD_VIDEOS

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
        part: Part = WHOLE,
    ) -> Self:
        """Create a store, or go on with one.

        Args:
            features: to be written for every video of `manifest`; what the store already holds stays.
            manifest: replaces the one in the store, of which it must hold every video that has features.
            shard_videos: videos to a shard, at most; None is 256. Large videos make smaller shards either way.
            part: the videos that this writer is for; others may write other parts at the same time.

        Raises:
            SpecMismatch: the store was made with another spec; names the field.
            StoreError: another writer is at this part; the folder is something else; or the store is damaged.
        """
        path, names = location(path), canonical_features(features, shape.layers)
        _refuse_other_folder(path)
        if is_local(path):
            (path / SHARDS).mkdir(parents=True, exist_ok=True)
        lease = Lease.take(path, part)
        try:
            with exclusive(path) as turn:
                if is_local(path):
                    remove_torn(path / SHARDS)
                catalogue = Catalogue(read_shards(path / SHARDS))
                others = len(live(path)) - 1
                header = _new_header(path, spec, shape, names, manifest, catalogue, others)
                turn.check()
                before = _manifest_of(path, Header.read(path)) if HEADER in names_in(path) else None
                if not others or _manifest_of(path, header) is None:
                    replace_file(path / MANIFEST, manifest.write)
                header.write(path)
            writer = cls(path, header, catalogue, manifest, names, part, lease)
            writer.n_relabelled = _n_relabelled(before, manifest)
        except BaseException:
            lease.close()  # a traceback that somebody keeps would hold it
            raise
        writer._shard_videos = shard_videos or SHARD_VIDEOS
        return writer

    @classmethod
    def preview(
        cls,
        path: Path | str,
        spec: FeatureSpec,
        shape: TowerShape,
        features: Iterable[str],
        manifest: Manifest,
        *,
        shard_videos: int | None = None,
        part: Part = WHOLE,
    ) -> Self:
        """What `open` would find, to ask it what is missing: nothing is touched, nobody is kept out, nothing is written.

        Raises:
            SpecMismatch, StoreError: as `open`.
        """
        path, names = location(path), canonical_features(features, shape.layers)
        _refuse_other_folder(path)
        catalogue = Catalogue(read_shards(path / SHARDS))
        header = _new_header(path, spec, shape, names, manifest, catalogue, others=0)
        writer = cls(path, header, catalogue, manifest, names, part, lease=None)
        writer._shard_videos = shard_videos or SHARD_VIDEOS
        return writer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another writer in."""
        if self._lease:
            self._lease.close()

    @property
    def spec(self) -> FeatureSpec:
        """What the store is made by: as asked for, with all draws that any run asked for."""
        return self._header.spec

    @property
    def ids(self) -> list[str]:
        """Ids of the videos of this writer's part, sorted."""
        return [video_id for video_id in sorted(self._manifest.ids) if self._part.holds(video_id)]

    def _is_mine(self, video_id: str) -> bool:
        return video_id in self._manifest.by_id and self._part.holds(video_id)

    @property
    def failures(self) -> list[VideoRow]:
        """Rows of the videos of this part that lack something asked for because the last attempt failed."""
        return [
            row
            for row in self._catalogue.failures()
            if self._is_mine(row.video_id) and self.missing(row.video_id).names
        ]

    @property
    def every_feature(self) -> tuple[str, ...]:
        """What any run asked for."""
        return self._header.features

    @property
    def every_array(self) -> tuple[str, ...]:
        """The arrays that hold what any run asked for."""
        return tuple(array for name in self.every_feature for array in arrays_of(name, self.spec.dtype))

    def is_another(self, video_id: str, video: DecodedVideo) -> bool:
        """Whether the store has features of another file under this id, not all of which are to be written again."""
        place = self._catalogue.newest.get((video_id, 0))
        if place is None or set(self.every_array) <= set(self.void.get(video_id, ())):
            return False
        row = self._catalogue.row(place)
        return (row.content_hash, row.n_frames) != (video.content_sha256, video.rows.shape[1])

    def changed_files(self) -> list[str]:
        """Ids of this part's videos whose files have another size than when they were read; files that are gone have not.

        Another content of the same size is seen when the video is decoded: for something new, or by `verify --deep`.
        """
        rows = [
            row for row in self._catalogue.rows() if row.view == 0 and row.source_bytes and self._is_mine(row.video_id)
        ]
        paths = [self._manifest.path_of(self._manifest.by_id[row.video_id]) for row in rows]
        with ThreadPoolExecutor(16) as pool:  # a network file system answers one question at a time
            sizes = list(pool.map(_file_size, paths, chunksize=64))
        return sorted(
            row.video_id for row, size in zip(rows, sizes, strict=True) if size not in (None, row.source_bytes)
        )

    def remaining(self, retry: bool = False) -> list[str]:
        """Ids of videos that lack something asked for, sorted.

        Args:
            retry: also those that failed for good, or too often.
        """
        return [
            video_id
            for video_id in self.ids
            if self.missing(video_id).names and (retry or not self._is_given_up(video_id))
        ]

    def missing(self, video_id: str) -> Missing:
        """The features asked for that the store lacks of a video, and in which views; what is `void` it lacks, too."""
        names: set[str] = set()
        views: list[int] = []
        for view in range(self._header.spec.frames.n_views):
            key = (video_id, view)
            lacks = {
                name
                for name in self.features
                for array in arrays_of(name, self._header.spec.dtype)
                if key not in self._catalogue.holders.get(array, ()) or array in self.void.get(video_id, ())
            }
            if lacks or TIMES in self.void.get(video_id, ()):
                names |= lacks or set(self.features[:1])
                views.append(view)
        return Missing(canonical_features(names, self._header.shape.layers), tuple(views))

    def plan(self, ids: Iterable[str]) -> list[list[str]]:
        """Deal videos to shards, in the order of their ids; videos that lack the same features lie together."""
        groups: dict[Missing, list[str]] = {}
        for video_id in sorted(ids):
            groups.setdefault(self.missing(video_id), []).append(video_id)
        shards: list[list[str]] = []
        for missing, group in sorted(groups.items()):
            size = self._videos_in_a_shard(missing)
            shards += [group[at : at + size] for at in range(0, len(group), size)]
        return shards

    def frame_bytes(self, name: str) -> int:
        """Bytes of one frame of a feature, with the scales of its tokens."""
        return sum(map(self._header.frame_bytes, arrays_of(name, self._header.spec.dtype)))

    def bytes_of(self, lengths: Mapping[str, float]) -> tuple[dict[str, int], int]:
        """What videos with so many frames a view will take on the disk: by feature, and besides (times, indices, rows)."""
        by_feature: Counter[str] = Counter()
        besides = 0.0
        for ids in self.plan(lengths):
            missing = self.missing(ids[0])  # that of all videos of the shard
            n_frames = sum(lengths[video_id] for video_id in ids) * len(missing.views)
            n_arrays = 1  # the times
            for name in missing.names:
                by_feature[name] += round(n_frames * self.frame_bytes(name))
                n_arrays += len(arrays_of(name, self._header.spec.dtype))
            besides += n_frames * (self._header.frame_bytes(TIMES) + _INDEX_BYTES * (n_arrays - 1))
            besides += len(ids) * len(missing.views) * (_ROW_BYTES + _SUM_BYTES * n_arrays) + _META_BYTES * (
                1 + n_arrays
            )
        return dict(by_feature), round(besides)

    def begin_shard(self, ids: Sequence[str]) -> ShardBuilder:
        """Begin one shard of a plan; it is numbered now and written when it is committed."""
        assert self._lease, "a preview writes nothing"
        number, self._next_number = self._next_number, self._next_number + 1
        missing = {name for video_id in ids for name in self.missing(video_id).names}
        self._journal.log("started", shard=number, n_videos=len(ids))
        return ShardBuilder(self, number, ids, canonical_features(missing, self._header.shape.layers))

    def _is_given_up(self, video_id: str) -> bool:
        """Whether a video failed for good, or for now but too often; a file or a setting that changed gives new hope."""
        trouble = self._catalogue.troubles.get(video_id)
        if trouble is None or (trouble.status != "failed" and trouble.attempts < _ATTEMPTS):
            return False
        size = _file_size(self._manifest.path_of(self._manifest.by_id[video_id]))
        return trouble.tried == self.how(video_id) and size in (None, trouble.source_bytes)

    def how(self, video_id: str) -> str:
        """Under which settings, and of which part of a video, an attempt is made."""
        record = self._manifest.by_id[video_id]
        return f"{record.start_s} to {record.end_s} s, {self.tried}"

    def _videos_in_a_shard(self, missing: Missing) -> int:
        n_frames = (self._header.spec.frames.n_frames or _USUAL_FRAMES) * len(missing.views)
        n_bytes = n_frames * sum(map(self.frame_bytes, missing.names))
        return min(max(SHARD_BYTES // max(n_bytes, 1), 1), self._shard_videos)


def _file_size(path: str) -> int | None:
    try:
        return None if is_url(path) else Path(path).stat().st_size
    except OSError:
        return None


class Missing(NamedTuple):
    """What a store lacks of a video."""

    names: tuple[str, ...]  # canonical
    views: tuple[int, ...]


class ShardBuilder:
    """A shard while it is in memory."""

    def __init__(self, writer: FeatureWriter, number: int, ids: Iterable[str], features: tuple[str, ...]) -> None:
        """Use `FeatureWriter.begin_shard`."""
        self.features = features  # those that the shard's videos lack
        self._writer, self._number = writer, number
        self._awaited = set(ids)
        self._rows: dict[Key, VideoRow] = {}
        arrays = [array for name in features for array in arrays_of(name, writer._header.spec.dtype)]
        self._arrays: dict[str, dict[Key, NDArray]] = {name: {} for name in (*arrays, TIMES)}
        self._began = time.perf_counter()

    @property
    def n_bytes(self) -> int:
        """What it holds so far."""
        return sum(part.nbytes for parts in self._arrays.values() for part in parts.values())

    def add(
        self,
        video_id: str,
        features: Mapping[str, NDArray | Tensor],
        video: DecodedVideo,
        *,
        attempts: int | None = None,
    ) -> None:
        """Keep one video's features.

        Args:
            features: array name -> one entry for each crop of the video [n, ...], which `video.rows` deals to its views;
                those that the store already has are left out. Floats are converted to the store's dtype; uint16 holds
                the bits of bfloat16; int8 tokens may come as floats, or with their scales.
            video: as it was decoded.
            attempts: that it took; None counts those that the store knows.
        """
        self._arrived(video_id)
        n_crops = int(video.rows.max()) + 1
        stored = self._storable(features, n_crops)
        attempt = attempts or self._attempt(video_id)
        for i, view in enumerate(video.views):
            rows, key = video.rows[i], (video_id, view)
            for name, frames in stored.items():
                is_whole = len(rows) == len(frames) and (np.diff(rows) == 1).all()
                self._arrays[name][key] = frames if is_whole else frames[rows]
            self._arrays[TIMES][key] = np.ascontiguousarray(video.timestamps_s[i], dtype=np.float64)
            self._rows[key] = VideoRow(
                video_id,
                "ok",
                n_frames=len(rows),
                n_repeated=int(video.n_repeated[i]),
                view=view,
                n_source_frames=video.n_source_frames,
                kept=video.kept,
                source_bytes=video.source_bytes,
                decoder=video.decoder,
                attempts=attempt,
                content_hash=video.content_sha256,
                seconds=video.seconds,
            )

    def fail(
        self, video_id: str, reason: str, *, is_final: bool = True, seconds: float = 0.0, attempts: int | None = None
    ) -> None:
        """Keep why a video has no features; what is not final is tried again by the next run."""
        self._arrived(video_id)
        attempt, status = attempts or self._attempt(video_id), "failed" if is_final else "deferred"
        path = self._writer._manifest.path_of(self._writer._manifest.by_id[video_id])
        tried = {"source_bytes": _file_size(path) or 0, "tried": self._writer.how(video_id)}
        self._rows[video_id, 0] = VideoRow(video_id, status, reason, attempts=attempt, seconds=seconds, **tried)
        facts = {"video_id": video_id, "reason": reason, "attempt": attempt, "seconds": round(seconds, 3)}
        self._writer._journal.log(status, **facts)

    def commit(self) -> None:
        """Write what has arrived, all of it or nothing; a reader that opens the store from now on sees it.

        Raises:
            StoreError: the disk is full or failing; the store is as it was.
        """
        rows = [self._rows[key] for key in sorted(self._rows)]
        if not rows:
            return
        ok = [(row.video_id, row.view) for row in rows if row.is_ok]
        arrays = {name: [parts[key] for key in ok] for name, parts in self._arrays.items()}
        assert self._writer._lease
        self._writer._lease.check()
        shard = write_shard(self._writer.path / SHARDS, self._number, rows, arrays)
        self._writer._catalogue.add(shard)
        self._writer._journal.log(
            "done",
            shard=self._number,
            n_ok=len({video_id for video_id, _ in ok}),
            n_failed=len(rows) - len(ok),
            seconds=round(time.perf_counter() - self._began, 3),
        )

    def _arrived(self, video_id: str) -> None:
        if video_id not in self._awaited:
            raise ValueError(f"{video_id!r} is not awaited by this shard, or has already arrived")
        self._awaited.remove(video_id)

    def _attempt(self, video_id: str) -> int:
        """Which attempt at the video this is, counted over runs."""
        last = self._writer._catalogue.troubles.get(video_id)
        return 1 if last is None else last.attempts + 1

    def _storable(self, features: Mapping[str, NDArray | Tensor], n_crops: int) -> dict[str, NDArray]:
        """Features as the arrays that the store holds; raises ValueError for those of another shape or kind."""
        header, arrays = self._writer._header, dict[str, Tensor]()
        for name in self.features:
            frames = torch.as_tensor(features[name])
            if frames.is_floating_point():
                arrays |= rounded(name, frames.detach().cpu(), header.spec.dtype)
            else:
                arrays |= {array: torch.as_tensor(features[array]) for array in arrays_of(name, header.spec.dtype)}
        return {name: self._checked(name, frames, n_crops) for name, frames in arrays.items()}

    def _checked(self, name: str, frames: Tensor, n_crops: int) -> NDArray:
        header = self._writer._header
        dtype = getattr(torch, header.dtype(name))
        if frames.shape != (n_crops, *header.frame_shape(name)) or n_crops < 1:
            raise ValueError(f"{name} must be [{n_crops}, {header.frame_shape(name)}], not {list(frames.shape)}")
        if dtype == torch.bfloat16:
            frames, dtype = frames.view(torch.uint16), torch.uint16
        if frames.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, not {frames.dtype}")
        return frames.contiguous().numpy()


def _refuse_other_folder(path: Path) -> None:
    """Refuse a folder that is neither a store, nor one that was just begun, nor empty."""
    found = names_in(path)
    if HEADER in found:
        return
    begun = {LEASES, MANIFEST, COPY, *(() if committed(path / SHARDS) else (SHARDS,))}
    if strangers := sorted(name for name in found if name not in begun and ".new." not in name):
        fix = way_back(path) or "Name a new folder."
        raise StoreError(f"{path} is neither a feature store nor empty", seen=listed(strangers), fix=fix)


def _new_header(
    path: Path,
    spec: FeatureSpec,
    shape: TowerShape,
    names: tuple[str, ...],
    manifest: Manifest,
    catalogue: Catalogue,
    others: int,
) -> Header:
    """The header that a store shall have; refuses one that cannot go on as this spec or this manifest.

    While `others` write other parts, the spec and the manifest must be theirs.
    """
    asked, created_at = names, datetime.now(UTC).isoformat(timespec="seconds")
    stored = Header.read(path) if HEADER in names_in(path) else None
    if stored and others and stored.manifest_fingerprint != manifest.fingerprint:
        raise StoreError(
            f"{path} is being written by {others} others from another manifest",
            seen=manifest.fingerprint,
            wanted=stored.manifest_fingerprint,
            fix="Wait for them, or give the same manifest.",
        )
    if stored and (catalogue.shards or others):  # a store without a shard is bound to nothing
        _expect(stored, spec, path)
        spec = dataclasses.replace(spec, frames=_with_draws(spec.frames, stored.spec.frames.draws))
        _refuse_other_videos(_manifest_of(path, stored), manifest, catalogue)
        asked, created_at = canonical_features((*stored.features, *names), shape.layers), stored.created_at
    return Header(spec, shape, asked, manifest.fingerprint, created_at, f"coldframe {version('coldframe')}")


def _n_relabelled(before: Manifest | None, now: Manifest) -> int:
    """Videos whose label, split or group has changed."""

    def facts(manifest: Manifest, record: VideoRecord) -> tuple[str | None, str, str]:
        label = None if record.label is None else manifest.class_names[record.label]
        return label, record.split, record.group

    old = {} if before is None else {r.video_id: facts(before, r) for r in before.records}
    return sum(facts(now, r) != old.get(r.video_id, facts(now, r)) for r in now.records)


def _expect(stored: Header, spec: FeatureSpec, path: Path) -> None:
    """Refuse another spec than the store's, with the command that has the store's own settings."""
    try:
        stored.spec.expect(spec, f"the store {path}")
    except SpecMismatch as error:
        from .store import FeatureStore  # which stands on this file

        command = FeatureStore(path, stored, Catalogue()).extract_command(stored.features)
        raise SpecMismatch(str(error), fix=f"Its own settings are those of: {command}") from error


def _with_draws(frames: FrameSpec, draws: int) -> FrameSpec:
    """The same with as many draws at least: another run may have added some."""
    return dataclasses.replace(frames, draws=max(frames.draws, draws))


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

    ok = sorted(row.video_id for row in catalogue.rows() if row.view == 0)
    if others := [video_id for video_id in ok if is_another(video_id)]:
        raise StoreError(
            f"{len(others)} videos of the store are not in the manifest {given.name}, or at other times",
            seen=listed(others),
            fix="Extract a manifest that holds them too, or write to another store.",
        )
