"""Stage 1, top-down: manifest → decode → encode → shards of a feature store.

Videos are dealt to shards before anything is decoded, in the order of their ids, so that a rerun does exactly what is
missing. A shard appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data_manifests.locations import refuse_unreachable
from ..data_manifests.records import Manifest
from .frames import DecodedVideo
from .progress import Progress
from .specs import FeatureSpec, canonical_features
from .towers import Tower
from .workers import DecodePool, Failure
from .writer import FeatureWriter, ShardBuilder


@dataclass(slots=True)
class ExtractReport:
    """What a run did; seconds are of this process, not of the decode workers."""

    store: Path
    n_videos: int = 0  # asked for by the manifest
    n_present: int = 0  # had their features before the run began
    n_written: int = 0
    n_frames: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # video id → reason; those of earlier runs too
    seconds: float = 0.0
    decode_wait_s: float = 0.0  # the tower had nothing to do
    tower_s: float = 0.0
    write_wait_s: float = 0.0  # the disk was behind
    interrupted: bool = False

    @property
    def n_failed(self) -> int:
        """Videos without features, for a reason."""
        return len(self.failures)

    @property
    def bottleneck(self) -> str | None:
        """The side that more workers, a faster device or a faster disk would speed up; None where nothing was done."""
        spent = {"decoding": self.decode_wait_s, "tower": self.tower_s, "disk": self.write_wait_s}
        return max(spent, key=lambda side: spent[side]) if self.n_written else None

    @property
    def reasons(self) -> dict[str, int]:
        """Failures by their reason's first words, most frequent first."""
        return dict(Counter(reason.partition(":")[0] for reason in self.failures.values()).most_common())

    def to_json(self) -> dict[str, Any]:
        """Plain values, with what is derived."""
        return dataclasses.asdict(self) | {
            "store": str(self.store),
            "n_failed": self.n_failed,
            "bottleneck": self.bottleneck,
            "reasons": self.reasons,
        }

    def describe(self) -> str:
        """The report for people."""
        rate = f"{self.n_written / self.seconds:.1f} videos/s, {self.n_frames / self.seconds:.0f} frames/s"
        lines = [
            f"{self.store}: {self.n_written:,} videos written, {self.n_present:,} were there, {self.n_failed:,} failed"
        ]
        if self.n_written:
            lines.append(
                f"{self.seconds:.1f} s, {rate}; waited {self.decode_wait_s:.1f} s for decoding, "
                f"{self.tower_s:.1f} s for the tower, {self.write_wait_s:.1f} s for the disk"
            )
        lines += [f"failed: {video_id}: {reason}" for video_id, reason in list(self.failures.items())[:10]]
        if self.n_failed > 10:
            lines.append(f"and {self.n_failed - 10} more: coldframe inspect {self.store} --json")
        if self.n_failed:
            lines.append("a failure is final; --retry-failed tries again")
        if self.interrupted:
            lines.append("interrupted; the same command goes on from here")
        return "\n".join(lines)


def extract(
    manifest: Manifest,
    store: Path,
    *,
    tower: Tower,
    spec: FeatureSpec,
    features: Sequence[str],
    workers: int = 2,
    timeout_s: float = 60.0,
    batch_frames: int = 64,
    shard_videos: int | None = None,
    retry_failed: bool = False,
    quiet: bool = False,
) -> ExtractReport:
    """Write the features of every video of `manifest` to a store; resume it if it exists.

    Ctrl-C keeps what is encoded and returns a report that says so.

    Args:
        features: names such as `embedding`, `cls.-1`, `tokens.8`; an existing store gains those it lacks.
        timeout_s: a video that decodes for longer is killed and counted as failed.
        batch_frames: frames to one pass of the tower.
        shard_videos: videos to a shard, at most; None lets their size decide.
        retry_failed: try the videos again that failed in an earlier run.

    Raises:
        SpecMismatch: the store was made with another spec.
        StoreError: the store cannot be written; the shards committed so far stay.
        ConfigError: URLs of a kind that this installation cannot read.
    """
    refuse_unreachable(map(manifest.path_of, manifest.records), workers)
    report = ExtractReport(store, n_videos=len(manifest.records))
    started = time.perf_counter()
    asked = canonical_features(features, tower.shape.layers)
    with FeatureWriter.open(store, spec, tower.shape, asked, manifest, shard_videos=shard_videos) as writer:
        todo = writer.remaining(retry_failed=retry_failed)
        again = set(todo)
        report.failures = {
            row.video_id: row.reason
            for row in writer.failures
            if row.video_id in manifest.by_id and row.video_id not in again
        }
        report.n_present = report.n_videos - len(todo) - report.n_failed
        if todo:
            names = canonical_features({name for key in todo for name in writer.missing(key)}, tower.shape.layers)
            shards = writer.plan(todo)
            records = [manifest.by_id[key] for ids in shards for key in ids]
            jobs = ((r.video_id, manifest.path_of(r), r.start_s, r.end_s) for r in records)
            try:
                with (
                    Progress(len(todo), "videos", quiet=quiet) as progress,
                    DecodePool(spec.frames, spec.tower.transform, workers=workers, timeout_s=timeout_s) as pool,
                    _Shards(writer, shards, report) as filing,
                ):
                    for batch in _batches(pool.decode(jobs), batch_frames, report):
                        filing.file(batch, _encode(tower, batch, names, spec.dtype, batch_frames, report))
                        progress.update(
                            len(batch),
                            **{"frames/s": f"{report.n_frames / (time.perf_counter() - started):.0f}"},
                            failed=report.n_failed,
                            waits_for=report.bottleneck,
                        )
            except KeyboardInterrupt:
                report.interrupted = True
    report.seconds = time.perf_counter() - started
    return report


def _batches(
    videos: Iterator[tuple[str, DecodedVideo | Failure]], batch_frames: int, report: ExtractReport
) -> Iterator[dict[str, DecodedVideo | Failure]]:
    """Collect decoded videos until they fill one pass of the tower."""
    batch: dict[str, DecodedVideo | Failure] = {}
    n_frames = 0
    began = time.perf_counter()
    for key, video in videos:
        batch[key] = video
        n_frames += len(video.pixels) if isinstance(video, DecodedVideo) else 0
        if n_frames >= batch_frames:
            report.decode_wait_s += time.perf_counter() - began
            yield batch
            batch, n_frames = {}, 0
            began = time.perf_counter()
    report.decode_wait_s += time.perf_counter() - began
    if batch:
        yield batch


def _encode(
    tower: Tower,
    batch: dict[str, DecodedVideo | Failure],
    names: Sequence[str],
    dtype: str,
    batch_frames: int,
    report: ExtractReport,
) -> dict[str, dict[str, Tensor]]:
    """Run the tower over the frames of several videos; give each video its own rows [T, ...] back."""
    videos = {key: video for key, video in batch.items() if isinstance(video, DecodedVideo)}
    if not videos:
        return {}
    began = time.perf_counter()
    pixels = torch.cat([torch.from_numpy(video.pixels) for video in videos.values()])  # [F, 3, S, S]
    chunks = [tower.encode_frames(part, names) for part in pixels.split(batch_frames)]
    rows = {name: torch.cat([_storable(chunk[name], dtype) for chunk in chunks]) for name in names}  # [F, ...]
    lengths = [len(video.pixels) for video in videos.values()]
    split = {name: frames.split(lengths) for name, frames in rows.items()}
    report.tower_s += time.perf_counter() - began
    return {key: {name: split[name][i] for name in names} for i, key in enumerate(videos)}


def _storable(frames: Tensor, dtype: str) -> Tensor:
    """Round on the device, so that half as many bytes cross to the host; pixels stay what they are."""
    return frames.to(getattr(torch, dtype) if frames.is_floating_point() else frames.dtype).cpu()


class _Shards:
    """Shards being filled; a background thread writes each as soon as its last video has arrived."""

    def __init__(self, writer: FeatureWriter, plan: Sequence[Sequence[str]], report: ExtractReport) -> None:
        self._writer = writer
        self._report = report
        self._plan = plan
        self._shard_of = {key: number for number, ids in enumerate(plan) for key in ids}
        self._missing = [len(ids) for ids in plan]
        self._open: dict[int, ShardBuilder] = {}
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._writing: list[Future[None]] = []

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Finish the writes; an interrupted run also keeps the videos that its open shards already hold."""
        try:
            if kind is KeyboardInterrupt:
                for number in sorted(self._open):
                    self._commit(number)
            if kind in (None, KeyboardInterrupt):
                self._wait(0)
        finally:
            self._disk.shutdown(wait=True)

    def file(self, batch: dict[str, DecodedVideo | Failure], encoded: dict[str, dict[str, Tensor]]) -> None:
        """Give every video of a batch to its shard, with its features or with the reason why it has none."""
        for key, video in batch.items():
            number = self._shard_of[key]
            if number not in self._open:
                self._open[number] = self._writer.begin_shard(self._plan[number])
            if isinstance(video, DecodedVideo):
                self._open[number].add(key, encoded[key], video)
                self._report.n_written += 1
                self._report.n_frames += len(video.pixels)
            else:
                self._open[number].fail(key, video.reason)
                self._report.failures[key] = video.reason
            self._missing[number] -= 1
            if self._missing[number] == 0:
                self._commit(number)

    def _commit(self, number: int) -> None:
        self._writing.append(self._disk.submit(self._open.pop(number).commit))
        self._wait(1)  # one shard may be on its way to the disk while the next one fills

    def _wait(self, allowed: int) -> None:
        began = time.perf_counter()
        while len(self._writing) > allowed:
            self._writing.pop(0).result()
        self._report.write_wait_s += time.perf_counter() - began
