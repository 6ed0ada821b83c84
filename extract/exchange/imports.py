"""Features in somebody's files, or in an export of ours, as a store."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...data_manifests.errors import ConfigError
from ...data_manifests.locations import refuse_url
from ...data_manifests.records import Manifest
from ..catalogue import HEADER, MANIFEST, SHARDS, TIMES, Header
from ..frames import DecodedVideo
from ..progress import Progress
from ..shards import VideoRow, committed
from ..specs import SpecMismatch, TowerShape
from ..store import FeatureStore
from ..writer import FeatureWriter, ShardBuilder
from . import hdf5, numpy_files
from .foreign import understand
from .foreign_labels import Reading
from .parcels import ExchangeReport, Parcel


def import_features(
    source: Path,
    store: Path,
    *,
    reading: Reading | None = None,
    manifest: Manifest | None = None,
    quiet: bool = False,
) -> ExchangeReport:
    """Write the features in a `.h5`, `.npz`, `.npy` or a folder of such to a store; go on with it if it exists.

    A file that `export_store` wrote becomes the store that it was. Ctrl-C keeps the shards that are committed.

    Args:
        reading: what the numbers in somebody else's file are.
        manifest: labels and splits; None takes those in the file.

    Raises:
        ConfigError: a file of which it cannot be said what it holds, or numbers that are not finite.
        SpecMismatch: the store is of other features.
        StoreError: a damaged file, or a store that cannot be written.
    """
    refuse_url(source, "an import")
    if source.is_file() and source.suffix in hdf5.SUFFIXES:
        with hdf5.opened(source) as file:
            if hdf5.is_export(file):
                if reading not in (None, Reading()):
                    raise ConfigError(
                        f"{source} was exported by coldframe and knows what it holds",
                        fix="Leave out every option but --store and --manifest.",
                    )
                parcel, notes = _relabelled(hdf5.read(file), manifest), ()
            else:
                parcel, notes = understand(hdf5.leaves(file), reading or Reading(), source, manifest)
            return _into_store(parcel, source, store, manifest is not None, notes, quiet)
    if not (source.is_dir() or (source.is_file() and source.suffix in (".npz", ".npy"))):
        seen = source if source.exists() else f"nothing at {source}"
        raise ConfigError(
            "no features to import", seen=seen, wanted=".h5, .hdf5, .npz, .npy, or a folder of .npy or .npz"
        )
    parcel, notes = understand(numpy_files.leaves(source), reading or Reading(), source, manifest)
    return _into_store(parcel, source, store, manifest is not None, notes, quiet)


def _into_store(
    parcel: Parcel, source: Path, path: Path, is_labelled: bool, notes: tuple[str, ...], quiet: bool
) -> ExchangeReport:
    """Write what the store lacks of a parcel; `is_labelled` where the user named the manifest."""
    report, began = ExchangeReport.of(parcel, source, path, notes), time.perf_counter()
    shape = _shape_with(path, parcel, is_labelled)
    with FeatureWriter.open(path, parcel.spec, shape, parcel.features, parcel.manifest) as writer:
        todo = _lacking(writer, parcel)
        report.n_present = report.n_videos - sum(rows[0].is_ok for rows in todo.values())
        try:
            with Progress(len(todo), "videos", quiet=quiet) as progress:
                while todo:
                    for part in writer.plan(todo):
                        shard = writer.begin_shard(part)
                        for video_id in part:
                            rows = _made_together(todo[video_id])
                            _hand_over(shard, parcel, rows)
                            progress.update(len(rows) == len(todo[video_id]))
                        shard.commit()
                    todo = _lacking(writer, parcel)
        except KeyboardInterrupt:
            report.interrupted = True
    report.seconds = time.perf_counter() - began
    return report


def _lacking(writer: FeatureWriter, parcel: Parcel) -> dict[str, list[VideoRow]]:
    """What a parcel knows and a store lacks: views of each video, or why it has none."""
    failed = {row.video_id for row in writer.failures}
    lacking: dict[str, list[VideoRow]] = {}
    for video_id in writer.remaining(retry=True):
        views = writer.missing(video_id).views
        for row in parcel.rows.get(video_id, ()):
            if row.view in views if row.is_ok else video_id not in failed:
                lacking.setdefault(video_id, []).append(row)
    return lacking


def _made_together(rows: Sequence[VideoRow]) -> list[VideoRow]:
    """The first of a video's views, and those that share with it what is known of a video rather than of a view."""

    def shared(row: VideoRow) -> VideoRow:
        return dataclasses.replace(row, view=0, n_repeated=0, crc32c={})

    return [row for row in rows if shared(row) == shared(rows[0])]


def _hand_over(shard: ShardBuilder, parcel: Parcel, rows: Sequence[VideoRow]) -> None:
    """Give a shard views of one video as they are known, or the reason why it has none."""
    first = rows[0]
    if not first.is_ok:
        is_final = first.status == "failed"
        shard.fail(first.video_id, first.reason, is_final=is_final, seconds=first.seconds, attempts=first.attempts)
        return
    views = [parcel.read(row.video_id, row.view) for row in rows]
    arrays = {name: np.concatenate([view[name] for view in views]) for name in views[0]}  # [V·T, ...]
    times = arrays.pop(TIMES).reshape(len(rows), -1)  # [V, T]
    numbers = np.arange(times.size).reshape(times.shape)
    video = DecodedVideo(
        rows=numbers,
        timestamps_s=times,
        indices=numbers,
        n_source_frames=first.n_source_frames,
        n_repeated=np.array([row.n_repeated for row in rows]),
        decoder=first.decoder,
        content_sha256=first.content_hash,
        source_bytes=first.source_bytes,
        kept=first.kept,
        views=tuple(row.view for row in rows),
        seconds=first.seconds,
    )
    shard.add(first.video_id, arrays, video, attempts=first.attempts)


def _shape_with(path: Path, parcel: Parcel, is_labelled: bool) -> TowerShape:
    """The tower's sizes as far as store and parcel know them together: each knows those of its own features."""
    if not ((path / HEADER).is_file() and committed(path / SHARDS)):
        return parcel.shape
    stored = FeatureStore.open(path, expect=parcel.spec)
    if not is_labelled and Header.read(path).manifest_fingerprint != parcel.manifest.fingerprint:
        raise ConfigError(
            f"the store {path} has other videos, labels, splits or groups than the file",
            fix=f"Name those that it shall have; to keep its own: --manifest {path / MANIFEST}",
        )
    _refuse_other_versions(stored, parcel)
    sizes = {}
    for name, ours in dataclasses.asdict(stored.shape).items():
        theirs = getattr(parcel.shape, name)
        known = {size for size in (ours, theirs) if size not in (0, (0, 0))}
        if len(known) > 1 and name not in ("layers", "heads"):
            raise SpecMismatch(f"the store {path} is of features with another {name}", seen=ours, wanted=theirs)
        sizes[name] = max(ours, theirs)
    return TowerShape(**sizes)


def _refuse_other_versions(stored: FeatureStore, parcel: Parcel) -> None:
    """Refuse videos that would make void what the store has of them."""
    for row in stored.rows:
        for new in parcel.rows.get(row.video_id, ()):
            if row.is_ok and new.is_ok and (new.content_hash, new.n_frames) != (row.content_hash, row.n_frames):
                raise ConfigError(
                    f"video {row.video_id!r} is another version of itself in the store {stored.path}",
                    seen=f"{new.n_frames} frames of content {new.content_hash[:12] or 'unknown'}",
                    wanted=f"{row.n_frames} frames of content {row.content_hash[:12] or 'unknown'}",
                    fix="Import into another store.",
                )


def _relabelled(parcel: Parcel, manifest: Manifest | None) -> Parcel:
    """A parcel under another manifest, which must know every video that has features."""
    if manifest is None:
        return parcel
    if lost := [video_id for video_id in parcel.ok if video_id not in manifest.by_id]:
        raise ConfigError(f"{len(lost):,} videos of the file are not in the manifest {manifest.name}", seen=lost[0])
    rows = {video_id: row for video_id, row in parcel.rows.items() if video_id in manifest.by_id}
    return dataclasses.replace(parcel, manifest=manifest, rows=rows)
