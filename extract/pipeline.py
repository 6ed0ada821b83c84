"""Stage 1, top-down: manifest → decode → encode → shards of a feature store.

Videos are dealt to shards before anything is decoded, in the order of their ids, so that a rerun does exactly what is
missing. A shard appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data_manifests.errors import ConfigError
from ..data_manifests.locations import refuse_unreachable
from ..data_manifests.records import Manifest, listed
from .arrays import StoreError
from .compress import fidelity, pool_tokens, rounded
from .frames import DecodedVideo, DecodeError, DecodeOptions
from .leases import WHOLE, Part
from .progress import Progress
from .shards import SALVAGED
from .space import free_bytes, needed_bytes, readable
from .specs import IMPORTED, SAMPLINGS, FeatureSpec, canonical_features
from .towers import Tower, TowerError
from .workers import Answer, Chunk, DecodePool, Failure, Job
from .writer import FeatureWriter, ShardBuilder

_FULL_BYTES = 1 << 30  # of a shard in memory; it is written although videos of it are still to come


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
    n_relabelled: int = 0  # videos whose label, split or group the store's manifest had otherwise
    changed: list[str] = field(default_factory=list)  # ids whose files have another size than before: extracted again
    n_salvaged: int = 0  # damaged videos of which a part was taken
    batch_frames: int | None = None  # what the device's memory held, where it was less than asked for
    fidelity: dict[str, float] = field(default_factory=dict)  # feature → smallest cosine to float32 seen in a sample

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

    def saw_fidelity(self, feature: str, cosines: Tensor) -> None:
        """Take the cosines [...] between what was computed and what will be read of a feature."""
        self.fidelity[feature] = min(self.fidelity.get(feature, 1.0), round(float(cosines.min()), 6))

    def absorb(self, other: ExtractReport) -> None:
        """Count what a second pass over some of the videos did."""
        for name in ("n_written", "n_frames", "decode_wait_s", "tower_s", "write_wait_s", "n_salvaged"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failures |= other.failures
        self.interrupted |= other.interrupted
        self.fidelity |= {name: min(cosine, self.fidelity.get(name, 1.0)) for name, cosine in other.fidelity.items()}

    def live(self, seconds: float) -> dict[str, str]:
        """What a long run shows beside its rate: shares of the time, and failures by reason."""
        shares = {"decode-wait": self.decode_wait_s, "tower": self.tower_s, "write-wait": self.write_wait_s}
        shown = {"frames/s": f"{self.n_frames / seconds:.0f}"}
        shown |= {side: f"{spent / seconds:.0%}" for side, spent in shares.items()}
        reasons = ", ".join(f"{n} {reason}" for reason, n in list(self.reasons.items())[:3])
        return shown | {"failed": f"{self.n_failed} ({reasons})" if reasons else "0"}

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
        lines = [
            f"{self.store}: {self.n_written:,} videos written, {self.n_present:,} had everything, {self.n_failed:,} failed"
        ]
        if self.n_written and self.seconds:
            rate = f"{self.n_written / self.seconds:.1f} videos/s, {self.n_frames / self.seconds:.0f} frames/s"
            lines.append(
                f"{self.seconds:.1f} s, {rate}; waited {self.decode_wait_s:.1f} s for decoding, "
                f"{self.tower_s:.1f} s for the tower, {self.write_wait_s:.1f} s for the disk"
            )
        if self.fidelity and self.n_written:
            name = min(self.fidelity, key=lambda feature: self.fidelity[feature])
            lines.append(
                f"smallest cosine of float32 to what was stored, in a sample: {self.fidelity[name]:.6f} ({name})"
            )
        if self.n_relabelled:
            lines.append(f"{self.n_relabelled:,} videos have another label, split or group in the store than before")
        if self.changed:
            lines.append(f"{len(self.changed):,} videos have other files than before and were extracted again")
        if self.n_salvaged:
            lines.append(f"{self.n_salvaged:,} damaged videos were salvaged as far as they go; see inspect")
        if self.batch_frames:
            lines.append(
                f"the device held {self.batch_frames} frames at a time: --batch {self.batch_frames} saves the search"
            )
        lines += [f"failed: {video_id}: {reason}" for video_id, reason in list(self.failures.items())[:10]]
        if self.n_failed > 10:
            lines.append(f"and {self.n_failed - 10} more: coldframe inspect {self.store} --json")
        if self.n_failed:
            lines.append(
                "the next run tries again what may mend by itself (files, disks, memory); --retry tries everything"
            )
        if any(reason.startswith(("truncated", "corrupt")) for reason in self.failures.values()):
            lines.append("--on-damage salvage takes what can be read of files that are cut off or have holes")
        if self.interrupted:
            lines.append("interrupted; the same command goes on from here")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """How a run works; nothing here changes a feature's value."""

    workers: int = 2  # decode processes; 0 decodes in this one
    timeout_s: float = 60.0  # without progress on one video
    worker_bytes: int = 4 << 30  # memory that a decode process may take for one video
    batch_frames: int | None = None  # to one pass of the tower, halved where memory is short; None: the tower's usual
    shard_videos: int | None = None  # at most; None lets their size decide
    retry: bool = False  # also what failed for good in an earlier run
    salvage: float | None = None  # smallest share of a damaged video's frames that will do; None: only whole videos
    stop_at_damage: bool = False  # end the run at the first video that cannot be read
    max_frames: int | None = 36_000  # of one view; longer videos are refused
    ignore_space: bool = False  # begin although the disk looks too small
    part: Part = WHOLE  # of the videos, when several processes write one store
    quiet: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.batch_frames is not None and self.batch_frames < 1:
            raise ConfigError(
                "a pass of the tower takes some frames", seen=f"batch={self.batch_frames}", wanted="1 or more"
            )
        if self.salvage is not None and not 0 < self.salvage <= 1:  # NaN is not
            raise ConfigError("the smallest share of a video's frames is above 0 and at most 1", seen=self.salvage)

    @property
    def tried(self) -> str:
        """What a failure depends on besides the file: under other options the video is worth another try."""
        return f"salvage {self.salvage}, at most {self.max_frames} frames"


def extract(
    manifest: Manifest, store: Path, tower: Tower, spec: FeatureSpec, features: Sequence[str],
    options: ExtractOptions | None = None, *,
    void: Mapping[str, Collection[str]] | None = None, only: Collection[str] | None = None,
) -> ExtractReport:  # fmt: skip
    """Write the features of every video of `manifest` to a store; resume it if it exists.

    Ctrl-C keeps what is encoded and returns a report that says so.

    Args:
        features: names such as `embedding`, `cls.-1`, `tokens.8`; an existing store gains those it lacks.
        void: arrays of videos that the store has but that shall be written again.
        only: of all videos that lack something, these; None is all.

    Raises:
        SpecMismatch: the store was made with another spec.
        StoreError: the store cannot be written; the shards committed so far stay.
        DecodeError: a video cannot be read, and the options say to stop there.
        ConfigError: mirrored crops of classes that tell left from right, frames of imported features, or URLs that this
            installation cannot read.
    """
    options = options or ExtractOptions()
    _refuse_imported(spec)
    refuse_flips(spec, manifest)
    refuse_unreachable(map(manifest.path_of, manifest.records), options.workers)
    report = ExtractReport(store)
    started = time.perf_counter()
    asked = canonical_features(features, tower.shape.layers)
    shape = spec.shape_of(tower.shape)
    with FeatureWriter.open(
        store, spec, shape, asked, manifest, shard_videos=options.shard_videos, part=options.part
    ) as writer:
        writer.void, writer.tried = void or {}, options.tried
        changed = set(writer.changed_files()) if only is None else set()
        todo = [
            key for key in writer.remaining(retry=options.retry) if key not in changed and (only is None or key in only)
        ]
        again = {*todo, *changed}
        report.failures = {row.video_id: row.reason for row in writer.failures if row.video_id not in again}
        report.n_videos, report.n_relabelled = len(writer.ids), writer.n_relabelled
        report.n_present = report.n_videos - len(again) - report.n_failed
        if todo:
            names = canonical_features({n for key in todo for n in writer.missing(key).names}, tower.shape.layers)
            shards = writer.plan(todo)
            tasks = list(jobs(writer, manifest, shards))
            if not options.ignore_space:
                _refuse_full_disk(writer, tasks, options)
            try:
                with (
                    Progress(len(todo), "videos", quiet=options.quiet) as progress,
                    closing(encode_videos(tasks, tower, names, writer.spec, options, report)) as videos,
                    _Shards(writer, shards, report) as filing,
                ):
                    for key, answer, features_of_it in videos:
                        if options.stop_at_damage and isinstance(answer, Failure):
                            raise DecodeError(f"{key}: {answer.reason}", fix="Mend it, or leave out --on-damage fail.")
                        if isinstance(answer, DecodedVideo) and writer.is_another(key, answer):
                            changed.add(key)
                            filing.leave(key)
                        else:
                            filing.file(key, answer, features_of_it)
                        progress.update(1, **report.live(time.perf_counter() - started))
            except KeyboardInterrupt:
                report.interrupted = True
    if changed and not report.interrupted:
        # All that the store has of them is of another file: everything is written anew, in all views.
        whole = dataclasses.replace(options, retry=True)
        everything = dict.fromkeys(changed, writer.every_array)
        report.absorb(extract(manifest, store, tower, spec, writer.every_feature, whole, void=everything, only=changed))
        report.changed = sorted(changed)
    report.seconds = time.perf_counter() - started
    return report


def _refuse_full_disk(writer: FeatureWriter, tasks: Sequence[Job], options: ExtractOptions) -> None:
    """Raise StoreError where what is to be written, at the least, is more than the disk has room for."""
    need = needed_bytes(writer, tasks, workers=options.workers, max_frames=options.max_frames)
    free = free_bytes(writer.path)
    if free is not None and need.value - need.plus_minus > free:
        raise StoreError(
            f"the disk of {writer.path} cannot hold the features",
            seen=f"{readable(free)} free",
            wanted=f"{readable(need.value)} for {len(tasks):,} videos",
            fix="Store fewer features, --dtype int8, --token-grid 7, or fewer frames; `coldframe plan` shows what each "
            "costs. Or begin all the same with --ignore-space.",
        )


def encode_videos(
    tasks: Iterable[Job], tower: Tower, names: Sequence[str], spec: FeatureSpec, options: ExtractOptions,
    report: ExtractReport | None = None,
) -> Generator[tuple[str, Answer, dict[str, Tensor]], None, None]:  # fmt: skip
    """Decode and encode videos, in whichever order they are done.

    Yields:
        A job's key; what was decoded, or why it was not; and its features, array name → [n, ...] for its n crops.
    """
    report = report or ExtractReport(Path())
    with decode_pool(spec, options) as pool:
        encoder = Encoder(tower, names, spec, options.batch_frames or tower.usual_batch, report)
        yield from encoder.run(_timed(pool.decode(tasks), report))


def jobs(writer: FeatureWriter, manifest: Manifest, shards: Iterable[Iterable[str]]) -> Iterator[Job]:
    """What has to be decoded, shard by shard."""
    for key in (key for ids in shards for key in ids):
        record = manifest.by_id[key]
        yield Job(key, manifest.path_of(record), record.start_s, record.end_s, writer.missing(key).views)


def decode_pool(spec: FeatureSpec, options: ExtractOptions) -> DecodePool:
    """The decode processes of a run; entering it starts them."""
    return DecodePool(
        spec.frames,
        spec.tower.transform,
        workers=options.workers,
        timeout_s=options.timeout_s,
        memory_bytes=options.worker_bytes,
        options=DecodeOptions(options.salvage, options.max_frames),
    )


def _refuse_imported(spec: FeatureSpec) -> None:
    """Refuse to sample as nobody knows how."""
    if spec.frames.sampling == IMPORTED:
        raise ConfigError(
            "features can be imported, but not extracted as imported ones were",
            seen=f"sampling {IMPORTED}",
            wanted=f"one of {', '.join(SAMPLINGS)}",
            fix="Extract to another store, or use coldframe import.",
        )


def refuse_flips(spec: FeatureSpec, manifest: Manifest) -> None:
    """Refuse mirrored crops of classes that tell left from right."""
    sided = [
        name for name in manifest.class_names if re.search(r"\b(left|right)", name.replace("_", " "), re.IGNORECASE)
    ]
    if spec.frames.flip and sided:
        raise ConfigError(
            f"{len(sided)} classes tell left from right, and a mirrored video would belong to another one",
            seen=listed(sided),
            fix="Leave out --flip.",
        )


def _timed(
    arrivals: Iterator[tuple[str, Chunk | Answer]], report: ExtractReport
) -> Iterator[tuple[str, Chunk | Answer]]:
    """Count the time that nothing but decoding could be waited for."""
    while True:
        began = time.perf_counter()
        arrival = next(arrivals, None)
        report.decode_wait_s += time.perf_counter() - began
        if arrival is None:
            return
        yield arrival


class Encoder:
    """Runs the tower over crops as they arrive, whichever videos they are of, and puts the videos together again."""

    def __init__(
        self, tower: Tower, names: Sequence[str], spec: FeatureSpec, batch_frames: int, report: ExtractReport
    ) -> None:
        self._tower, self._names, self._spec, self._report = tower, names, spec, report
        self._batch_frames = batch_frames
        self._encoded: dict[str, list[dict[str, Tensor]]] = {}  # of videos that are not complete, part by part

    def run(self, arrivals: Iterable[tuple[str, Chunk | Answer]]) -> Iterator[tuple[str, Answer, dict[str, Tensor]]]:
        """Give each video's answer with its features, array name → [n, ...] for its n crops; none where it failed."""
        waiting: list[tuple[str, Chunk | Answer]] = []
        n_crops = 0
        for key, arrival in arrivals:
            waiting.append((key, arrival))
            n_crops += len(arrival.crops) if isinstance(arrival, Chunk) else 0
            if n_crops >= self._batch_frames:
                yield from self._finish(waiting)
                waiting, n_crops = [], 0
        yield from self._finish(waiting)

    def _finish(self, waiting: list[tuple[str, Chunk | Answer]]) -> Iterator[tuple[str, Answer, dict[str, Tensor]]]:
        parts = [arrival.crops for _, arrival in waiting if isinstance(arrival, Chunk)]
        encoded = iter(self._encode(parts))
        for key, arrival in waiting:
            if isinstance(arrival, Chunk):
                if arrival.first == 0:  # the video begins, or begins again
                    self._encoded[key] = []
                self._encoded[key].append(next(encoded))
                continue
            parts_of_it = self._encoded.pop(key, [])
            if isinstance(arrival, Failure):
                yield key, arrival, {}
            else:
                yield key, arrival, {name: torch.cat([part[name] for part in parts_of_it]) for name in parts_of_it[0]}

    def _encode(self, parts: Sequence[NDArray[np.uint8]]) -> list[dict[str, Tensor]]:
        """Features of parts [n, 3, S, S]: array name → [n, ...] for each of them."""
        if not parts:
            return []
        began = time.perf_counter()
        crops = torch.cat([torch.from_numpy(part) for part in parts])  # [F, 3, S, S]
        crops = crops.pin_memory() if self._tower.device.type == "cuda" else crops
        chunks: list[dict[str, Tensor]] = []
        while (done := sum(len(next(iter(chunk.values()))) for chunk in chunks)) < len(crops):
            try:
                chunks.append(self._pass(crops[done : done + self._batch_frames], checked=not chunks))
            except torch.OutOfMemoryError as error:
                if self._batch_frames == 1:
                    raise TowerError(
                        "the device has no memory for a single frame", fix="Use a smaller tower."
                    ) from error
                self._batch_frames = self._report.batch_frames = -(-self._batch_frames // 2)
                torch.cuda.empty_cache()
        lengths = [len(part) for part in parts]
        split = {name: torch.cat([chunk[name] for chunk in chunks]).split(lengths) for name in chunks[0]}
        self._report.tower_s += time.perf_counter() - began
        return [{name: pieces[i] for name, pieces in split.items()} for i in range(len(parts))]

    def _pass(self, crops: Tensor, checked: bool) -> dict[str, Tensor]:
        """One pass of the tower, in the arrays of the store: rounded on the device, so that fewer bytes cross to the host."""
        with torch.inference_mode():
            stored: dict[str, Tensor] = {}
            for name, frames in self._tower.encode_frames(crops, self._names).items():
                if name.startswith("tokens.") and self._spec.token_grid:
                    frames = pool_tokens(frames, self._tower.shape.grid, self._spec.token_grid)
                arrays = rounded(name, frames, self._spec.dtype)
                if checked and frames.is_floating_point() and self._spec.dtype != "float32":
                    self._report.saw_fidelity(name, fidelity(name, frames[:1], {n: a[:1] for n, a in arrays.items()}))
                stored |= {array: values.cpu() for array, values in arrays.items()}
        return stored


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
            if kind in (KeyboardInterrupt, DecodeError):
                for number in sorted(self._open):
                    self._commit(number)
            if kind in (None, KeyboardInterrupt, DecodeError):
                self._wait(0)
        finally:
            self._disk.shutdown(wait=True)

    def leave(self, key: str) -> None:
        """A video of which nothing is to be kept."""
        self._settle(self._shard_of[key])

    def file(self, key: str, answer: Answer, features: Mapping[str, Tensor]) -> None:
        """Give a video to its shard, with its features or with the reason why it has none."""
        number = self._shard_of[key]
        if number not in self._open:
            self._open[number] = self._writer.begin_shard(self._plan[number])
        shard = self._open[number]
        if isinstance(answer, Failure):
            shard.fail(key, answer.reason, is_final=answer.is_final, seconds=answer.seconds)
            self._report.failures[key] = answer.reason
        else:
            shard.add(key, features, answer)
            self._report.n_written += 1
            self._report.n_frames += answer.rows.size
            self._report.n_salvaged += answer.kept < SALVAGED
        self._settle(number)

    def _settle(self, number: int) -> None:
        """One video of a shard less is awaited; long videos fill a shard before all of them have come."""
        self._missing[number] -= 1
        shard = self._open.get(number)
        if shard and (self._missing[number] == 0 or shard.n_bytes > _FULL_BYTES):
            self._commit(number)

    def _commit(self, number: int) -> None:
        self._writing.append(self._disk.submit(self._open.pop(number).commit))
        self._wait(1)  # one shard may be on its way to the disk while the next one fills

    def _wait(self, allowed: int) -> None:
        began = time.perf_counter()
        while len(self._writing) > allowed:
            self._writing.pop(0).result()
        self._report.write_wait_s += time.perf_counter() - began
