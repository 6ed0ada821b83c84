"""Keeping stores sound: verify, repair, compact, merge.

Nothing here changes a shard. What shall stay is written again under a higher number; then the old folder goes. A run that
is killed in between leaves both, and the newer one counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import posixpath
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data_manifests.locations import folder_bytes, is_local, is_url, location, names_in, refuse_url
from ..data_manifests.records import Manifest, VideoRecord, listed
from .arrays import StoreError, checksum
from .catalogue import COPY, MANIFEST, SHARDS, TIMES, Catalogue, Header, Key, Place
from .leases import Lease
from .pipeline import ExtractOptions, encode_videos, extract
from .progress import Progress
from .shards import (
    SALVAGED,
    Damage,
    Shard,
    VideoRow,
    committed,
    copy_shard,
    damage_of,
    remove_shard,
    remove_torn,
    replace_file,
    write_shard,
)  # fmt: skip
from .specs import arrays_of
from .store import FeatureStore
from .towers import Tower
from .workers import Failure, Job
from .writer import SHARD_BYTES, SHARD_VIDEOS

_QUARANTINE = "quarantine"
# What another decoder and another batch may change: rounding, besides that of the store's dtype.
_COSINES = {"float32": 0.9999, "float16": 0.9999, "bfloat16": 0.9995, "int8": 0.99}


@dataclass(slots=True)
class VerifyReport:
    """What is wrong with a store, and what became of it."""

    store: Path
    n_shards: int = 0
    n_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    videos: dict[str, tuple[str, ...]] = field(default_factory=dict)  # id → arrays that cannot be trusted
    n_absent: int = 0  # videos of the manifest that were not extracted yet, nor failed
    n_failed: int = 0  # videos whose last attempt failed
    has_quarantine: bool = False  # whether shards wait there that could not be replaced
    n_decoded_again: int = 0  # by --deep
    unlike: dict[str, str] = field(default_factory=dict)  # id → how it differs when it is decoded and encoded again
    gone: dict[str, str] = field(default_factory=dict)  # id → why it could not be decoded again
    cosines: dict[str, float] = field(default_factory=dict)  # feature → smallest cosine to what was encoded again
    repaired: bool = False
    failures: dict[str, str] = field(default_factory=dict)  # id → why it could not be extracted again

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong, or nothing any more."""
        return not self.failures and (self.repaired or not (self.damage or self.unlike))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"store": str(self.store), "is_sound": self.is_sound}

    def describe(self) -> str:
        """The report for people."""
        lines = [f"{self.store}: {self.n_shards:,} shards, {self.n_bytes / 1e6:,.1f} MB held to their checksums"]
        lines += [f"  damaged  {line}" for line in self.damage[:20]]
        lines += [f"           and {len(self.damage) - 20:,} more, see --json"] if len(self.damage) > 20 else []
        if self.n_decoded_again or self.gone:
            cosines = ", ".join(f"{name} {cosine:.6f}" for name, cosine in self.cosines.items())
            lines.append(
                f"  {self.n_decoded_again:,} videos decoded and encoded again; smallest cosine: {cosines or 'none'}"
            )
        lines += [f"  unlike   {video_id}: {what}" for video_id, what in list(self.unlike.items())[:20]]
        lines += [f"  gone     {video_id}: {why}" for video_id, why in list(self.gone.items())[:20]]
        lines += [f"  failed   {video_id}: {why}" for video_id, why in list(self.failures.items())[:20]]
        if self.n_absent:
            lines.append(
                f"  absent   {self.n_absent:,} videos of the manifest are neither there nor failed: extract goes on"
            )
        if self.n_failed:
            lines.append(
                f"  failed   {self.n_failed:,} videos at the last attempt: see inspect; extract --retry tries again"
            )
        if self.has_quarantine:
            lines.append(
                f"  aside    {self.store / _QUARANTINE} has shards whose rows are unreadable: delete it when extract is done"
            )
        n_bad = len(self.videos.keys() | self.unlike.keys())
        if self.repaired:
            lines.append(f"  repaired: {n_bad - len(self.failures):,} videos extracted again")
        elif not self.is_sound:
            lines.append(f"  {n_bad:,} videos cannot be trusted: coldframe verify {self.store} --repair")
        else:
            lines.append("  all is as it was written")
        return "\n".join(lines)


def verify(store: Path, *, quiet: bool = False) -> VerifyReport:
    """Hold every byte of a store to its checksum, also what newer shards have replaced.

    Raises:
        StoreError: no store, or a header or manifest that is damaged.
    """
    store = location(store)
    manifest = Header.read(store).read_manifest(store)
    inside = names_in(store)
    if SHARDS not in inside or (is_local(store) and not (store / SHARDS).is_dir()):
        raise StoreError(f"{store / SHARDS} is missing", fix="Put it back, or run the same extract command again.")
    report, paths = VerifyReport(store), committed(store / SHARDS)
    if COPY in inside:  # an older release wrote none
        try:
            Header.read(store, COPY)
        except StoreError as error:
            report.damage.append(Damage(COPY, str(error)))
    with Progress(len(paths), "shards", quiet=quiet) as progress:
        for path in paths:
            report.damage += damage_of(path)
            report.n_bytes += folder_bytes(path)
            progress.update(damaged=len(report.damage))
    report.n_shards = len(paths)
    catalogue = _readable(store, report)
    bad = _untrusted(catalogue, report)
    report.videos = {video_id: tuple(sorted(bad[video_id])) for video_id in sorted(bad)}
    report.n_failed, report.has_quarantine = len(catalogue.troubles), _QUARANTINE in inside
    report.n_absent = sum((i, 0) not in catalogue.newest and i not in catalogue.troubles for i in manifest.ids)
    return report


def verify_deep(
    store: Path, tower: Tower, report: VerifyReport, sample: float = 1.0, options: ExtractOptions | None = None
) -> None:
    """Decode videos again, by another decoder where there is one, encode them again, compare; what is found goes into
    the report.

    Args:
        sample: share of the videos; the same ones each time.

    Raises:
        SpecMismatch: the tower is not the one that made the store.
    """
    opened = FeatureStore.open(store, check=False)
    options = _as_salvaged(opened.catalogue, options)
    opened.spec.expect(dataclasses.replace(opened.spec, tower=tower.spec), f"the store {store}")
    sound = [i for i in opened.ids if i not in report.videos and i in opened.manifest.by_id]
    drawn = np.random.default_rng(0).permutation(sound)[: max(round(sample * len(sound)), min(1, len(sound)))]
    by_decoder: dict[str, list[str]] = defaultdict(list)
    for video_id in sorted(drawn.tolist()):
        by_decoder["pyav" if opened.row(video_id).decoder == "decord" else "auto"].append(video_id)
    with Progress(len(drawn), "videos decoded again", quiet=options.quiet) as progress:
        for decoder, ids in by_decoder.items():
            frames = dataclasses.replace(opened.spec.frames, decoder=decoder)
            spec = dataclasses.replace(opened.spec, frames=frames, dtype="float32")
            records = [opened.manifest.by_id[video_id] for video_id in ids]
            jobs = [Job(r.video_id, opened.manifest.path_of(r), r.start_s, r.end_s) for r in records]
            with contextlib.closing(encode_videos(jobs, tower, opened.features, spec, options)) as answers:
                for video_id, answer, features in answers:
                    if isinstance(answer, Failure):
                        report.gone[video_id] = answer.reason
                    elif unlike := _difference(opened, video_id, answer, features, report.cosines):
                        report.unlike[video_id] = unlike
                    report.n_decoded_again += not isinstance(answer, Failure)
                    progress.update(unlike=len(report.unlike), gone=len(report.gone))


def repair(store: Path, tower: Tower, report: VerifyReport, options: ExtractOptions | None = None) -> None:
    """Extract again exactly what a report says cannot be trusted, and remove what is damaged.

    A video that cannot be decoded any more keeps its sound features. A shard whose rows are unreadable waits in
    `quarantine/` until all videos of the store are there again.

    Raises:
        SpecMismatch: the tower is not the one that made the store.
        StoreError: somebody is writing the store.
    """
    refuse_url(store, "repair")
    header, options = Header.read(store), _as_salvaged(_readable(store, report), options)
    lost = sorted({damage.shard for damage in report.damage if damage.is_unreadable})
    with Lease.take(store):
        for name in lost:
            (store / _QUARANTINE).mkdir(exist_ok=True)
            (store / SHARDS / name).rename(store / _QUARANTINE / name)
    void: dict[str, Collection[str]] = {
        video_id: set(arrays) for video_id, arrays in _untrusted(_readable(store, report), report).items()
    }
    every_array = {TIMES, *(array for name in header.features for array in arrays_of(name, header.spec.dtype))}
    void |= dict.fromkeys(report.unlike, every_array)
    again = extract(
        header.read_manifest(store), store, tower, header.spec, header.features,
        dataclasses.replace(options, retry=True), void=void, only=None if lost else void,
    )  # fmt: skip
    with Lease.take(store):
        catalogue = Catalogue(map(Shard.read, committed(store / SHARDS)))
        names = {damage.shard for damage in report.damage}
        damaged = [number for number, shard in enumerate(catalogue.shards) if shard.path.name in names]
        _fold(store, catalogue, damaged, bad=_places(catalogue, report.damage))
        if not again.failures and not again.interrupted:
            shutil.rmtree(store / _QUARANTINE, ignore_errors=True)
    report.repaired = not again.interrupted
    report.failures = {i: reason for i, reason in again.failures.items() if lost or i in void}


def compact(store: Path, *, quiet: bool = False) -> tuple[int, int]:
    """Write what is alive in small and half-dead shards into full ones; gives the number of shards before and after.

    Raises:
        StoreError: somebody is writing the store; or it is damaged, and must be repaired first.
    """
    refuse_url(store, "compact")
    Header.read(store)  # before anything is made in a folder that is no store
    with Lease.take(store):
        remove_torn(store / SHARDS)
        catalogue = FeatureStore.open(store).catalogue
        n_before = len(catalogue.shards)
        loose = [number for number in range(n_before) if not _is_full(catalogue, number)]
        n_new = len(_new_shards(catalogue, _alive(catalogue, loose))) + bool(_failed_rows(catalogue, loose))
        if n_new < len(loose) or not all(_is_alive(catalogue, number) for number in loose):
            _fold(store, catalogue, loose, quiet=quiet)
    return n_before, len(committed(store / SHARDS))


def merge(store: Path, others: Sequence[Path]) -> int:
    """Add the videos and features of other stores to a store, or to a new one; gives the number of shards added.

    Files are linked where the file system can, so that nothing is copied; the other stores stay as they are.

    Raises:
        SpecMismatch: they were not made alike.
        StoreError: one id stands for two videos; or somebody is writing the store.
    """
    for place in (store, *others):
        refuse_url(place, "merge")
    n_added = 0
    if not store.exists():
        _begin_like(store, others[0])
    Header.read(store)  # before anything is made in a folder that is no store
    with Lease.take(store):
        for other in others:
            ours, theirs = FeatureStore.open(store), FeatureStore.open(other)
            if ours.path.resolve() == theirs.path.resolve():
                raise StoreError(f"{store} cannot be merged into itself")
            ours.spec.expect(theirs.spec, f"the store {store}")
            manifest = _union(ours, theirs)
            known = {shard.sums for shard in ours.catalogue.shards}
            number = max((shard.number for shard in ours.catalogue.shards), default=-1)
            for shard in theirs.catalogue.shards:
                if shard.sums not in known:
                    copy_shard(shard.path, store / SHARDS, number := number + 1)
                    n_added += 1
            replace_file(store / MANIFEST, manifest.write)
            mine, of_other = Header.read(store), Header.read(other)
            draws = max(mine.spec.frames.draws, of_other.spec.frames.draws)
            dataclasses.replace(
                mine,
                spec=dataclasses.replace(mine.spec, frames=dataclasses.replace(mine.spec.frames, draws=draws)),
                manifest_fingerprint=manifest.fingerprint,
                features=tuple(dict.fromkeys((*mine.features, *of_other.features))),
            ).write(store)
    return n_added


def _begin_like(store: Path, other: Path) -> None:
    """Make a store without shards that is of the videos and settings of another."""
    header = Header.read(other)
    manifest = header.read_manifest(other)
    (store / SHARDS).mkdir(parents=True)
    manifest.write(store / MANIFEST)
    header.write(store)


def _readable(store: Path, report: VerifyReport) -> Catalogue:
    """What the shards with readable rows hold."""
    lost = {damage.shard for damage in report.damage if damage.is_unreadable}
    return Catalogue(Shard.read(path) for path in committed(store / SHARDS) if path.name not in lost)


def _untrusted(catalogue: Catalogue, report: VerifyReport) -> dict[str, set[str]]:
    """Videos whose newest arrays are damaged, and which arrays."""
    bad = _places(catalogue, report.damage)
    found: dict[str, set[str]] = defaultdict(set)
    for array, held in catalogue.holders.items():
        for (video_id, _), place in held.items():
            if (array, place) in bad:
                found[video_id].add(array)
    return found


def _places(catalogue: Catalogue, found: Iterable[Damage]) -> set[tuple[str, Place]]:
    """Arrays and rows that are damaged."""
    numbers = {shard.path.name: number for number, shard in enumerate(catalogue.shards)}
    return {
        (damage.array, (numbers[damage.shard], row))
        for damage in found
        if damage.array and damage.shard in numbers
        for row in (
            [damage.row] if damage.row is not None else range(len(catalogue.shards[numbers[damage.shard]].rows))
        )
    }


def _as_salvaged(catalogue: Catalogue, options: ExtractOptions | None) -> ExtractOptions:
    """Options that take again every video that was taken: also those that were salvaged."""
    shares = [row.kept for row in catalogue.rows() if row.kept < SALVAGED]
    least = max(min(shares, default=1.0) - 1e-6, 1e-6)
    return dataclasses.replace(options or ExtractOptions(), **({"salvage": least} if shares else {}), max_frames=None)


Alive = dict[Key, dict[str, Place]]  # what of a view lies where


def _alive(catalogue: Catalogue, numbers: Sequence[int], bad: Collection[tuple[str, Place]] = ()) -> Alive:
    """What some shards hold that no newer one has replaced, and that is not bad; with the times of each view."""
    folded, alive = set(numbers), defaultdict[Key, dict[str, Place]](dict)
    for array, held in catalogue.holders.items():
        for key, place in held.items():
            if array != TIMES and place[0] in folded and (array, place) not in bad:
                alive[key][array] = place
    times = catalogue.holders.get(TIMES, {})
    return {key: {**alive[key], TIMES: times[key]} for key in sorted(alive) if (TIMES, times[key]) not in bad}


def _new_shards(catalogue: Catalogue, alive: Alive) -> list[list[Key]]:
    """Deal views to shards of the usual size; those of one shard have the same arrays."""
    groups: dict[tuple[str, ...], list[Key]] = defaultdict(list)
    for key, places in alive.items():
        groups[tuple(sorted(places))].append(key)
    return [part for group in groups.values() for part in _parts(catalogue, group, alive)]


def _failed_rows(catalogue: Catalogue, numbers: Sequence[int]) -> list[VideoRow]:
    """What some shards say of videos whose last attempt failed."""
    return [row for number in numbers for row in catalogue.shards[number].rows if _is_trouble(catalogue, row)]


def _fold(
    store: Path, catalogue: Catalogue, numbers: Sequence[int], bad: Collection[tuple[str, Place]] = (), *,
    quiet: bool = True,
) -> None:  # fmt: skip
    """Write what is alive in some shards, and not bad, into new ones; then remove them."""
    alive, failed = _alive(catalogue, numbers, bad), _failed_rows(catalogue, numbers)
    number = max((shard.number for shard in catalogue.shards), default=-1)
    with Progress(len(alive), "videos moved", quiet=quiet) as progress:
        for keys in _new_shards(catalogue, alive):
            rows = [dataclasses.replace(catalogue.row(next(iter(alive[key].values()))), crc32c={}) for key in keys]
            arrays = {name: [_content(catalogue, name, alive[key][name]) for key in keys] for name in alive[keys[0]]}
            write_shard(store / SHARDS, number := number + 1, rows, arrays)
            progress.update(len(keys))
    if failed:
        write_shard(store / SHARDS, number + 1, failed, {})
    for old in numbers:
        remove_shard(catalogue.shards[old].path)


def _parts(catalogue: Catalogue, keys: Sequence[Key], alive: Mapping[Key, Mapping[str, Place]]) -> Iterator[list[Key]]:
    """Deal views to shards of the usual size."""
    part: list[Key] = []
    n_bytes = 0
    for key in keys:
        size = sum(_size(catalogue, array, place) for array, place in alive[key].items())
        if part and (n_bytes + size > SHARD_BYTES or len(part) == SHARD_VIDEOS):
            yield part
            part, n_bytes = [], 0
        part.append(key)
        n_bytes += size
    if part:
        yield part


def _size(catalogue: Catalogue, array: str, place: Place) -> int:
    return catalogue.array(place[0], array).frame_bytes * catalogue.row(place).n_frames


def _content(catalogue: Catalogue, name: str, place: Place) -> Any:
    """An array of one view, [T, ...], as it lies on the disk; held to its checksum, so that no damage is passed on."""
    shard, row = catalogue.shards[place[0]], catalogue.row(place)
    frames = catalogue.array(place[0], name).read(shard.first_frame[place[1]], row.n_frames)
    if checksum(frames) != row.crc32c[name]:
        raise StoreError(
            f"{name} of {row.video_id!r} in {shard.path} is damaged",
            fix=f"Repair the store first: coldframe verify {shard.path.parents[1]} --repair",
        )
    return frames


def _is_trouble(catalogue: Catalogue, row: VideoRow) -> bool:
    return catalogue.troubles.get(row.video_id) is row


def _is_alive(catalogue: Catalogue, number: int) -> bool:
    """Whether no row of a shard has been replaced."""
    shard = catalogue.shards[number]
    return all(
        all(
            catalogue.holders[name].get((row.video_id, row.view)) == (number, i)
            for name in shard.arrays
            if name != TIMES  # every shard of a video has them
        )
        if row.is_ok
        else _is_trouble(catalogue, row)
        for i, row in enumerate(shard.rows)
    )


def _is_full(catalogue: Catalogue, number: int) -> bool:
    """Whether a shard is alive and at least half as large as a new one would be."""
    shard = catalogue.shards[number]
    n_bytes = (
        sum(catalogue.array(number, name).frame_bytes for name in shard.arrays) * shard.first_frame[-1]
        if shard.first_frame[-1]
        else 0
    )
    return _is_alive(catalogue, number) and (n_bytes >= SHARD_BYTES // 2 or len(shard.rows) >= SHARD_VIDEOS // 2)


def _difference(
    store: FeatureStore, video_id: str, video: Any, features: Mapping[str, Tensor], cosines: dict[str, float]
) -> str:
    """How a video that was decoded and encoded again differs from what the store has of it; empty where it does not."""
    if video.content_sha256 != store.row(video_id).content_hash:
        return "the file has changed since"
    for i, view in enumerate(video.views):
        times = store.read(TIMES, video_id, view)
        if times.shape != video.timestamps_s[i].shape or np.abs(times - video.timestamps_s[i]).max() > 2e-3:
            return f"other frames: at {_seconds(video.timestamps_s[i])} s, not at {_seconds(times)} s"
        for name, crops in features.items():
            ours, again = torch.from_numpy(store.read(name, video_id, view)), crops[torch.from_numpy(video.rows[i])]
            if name == "pixels":
                if (n_other := int((ours != again).any(dim=(1, 2, 3)).sum())) > 0:
                    return f"{n_other} pictures have other pixels"
                continue
            cosine = float(F.cosine_similarity(ours.double(), again.double(), dim=-1).min())
            cosines[name] = min(cosines.get(name, 1.0), round(cosine, 6))
            if not cosine >= _COSINES[store.spec.dtype]:
                return f"{name} has a cosine of {cosine:.4f} to what was encoded again"
    return ""


def _seconds(times: np.ndarray) -> str:
    return ", ".join(f"{at:.2f}" for at in times[:4]) + (" …" if len(times) > 4 else "")


def _union(ours: FeatureStore, theirs: FeatureStore) -> Manifest:
    """The videos of two stores as one manifest; class names of the first come first.

    Raises:
        StoreError: one id stands for two videos.
    """
    mine, other = ours.manifest, theirs.manifest
    names = tuple(dict.fromkeys((*mine.class_names, *other.class_names)))
    local = [root for root in dict.fromkeys((mine.root, other.root)) if not is_url(root)]
    root = mine.root if mine.root == other.root or not local else os.path.commonpath(local)

    def moved(manifest: Manifest, record: VideoRecord) -> VideoRecord:
        path = manifest.path_of(record)
        if not is_url(path):
            path = posixpath.relpath(path, root)
        elif manifest.root == root:
            path = record.path
        label = None if record.label is None else names.index(manifest.class_names[record.label])
        return dataclasses.replace(record, path=path, label=label)

    records = {record.video_id: moved(mine, record) for record in mine.records}
    clashes: list[str] = []
    for record in (moved(other, record) for record in other.records):
        known = records.setdefault(record.video_id, record)
        both = record.video_id in ours and record.video_id in theirs
        same_file = not both or _content_of(ours, record.video_id) == _content_of(theirs, record.video_id)
        if dataclasses.replace(known, path=record.path) != record or not same_file:
            clashes.append(record.video_id)
    if clashes:
        raise StoreError(
            f"{len(clashes)} ids stand for different videos, labels, splits or times in {ours.path} and {theirs.path}",
            seen=listed(clashes),
        )
    return Manifest(mine.name, root, names, tuple(records[video_id] for video_id in sorted(records)))


def _content_of(store: FeatureStore, video_id: str) -> tuple[str, int]:
    row = store.row(video_id)
    return row.content_hash, row.n_frames
