"""What an extraction will cost, before it starts: disk, time, memory, and what the time goes into.

Nothing is guessed that can be tried: a random sample of the videos is decoded by the real processes, and the real tower
runs over some of its crops. Disk is counted where the sampling fixes how long a video is.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data_manifests.errors import ConfigError
from ..data_manifests.locations import names_in, refuse_unreachable
from ..data_manifests.records import Manifest
from .catalogue import HEADER, Header
from .frames import DecodedVideo
from .pipeline import Encoder, ExtractOptions, ExtractReport, decode_pool, jobs, refuse_flips
from .pretrained import are_weights_here
from .progress import Progress
from .space import Estimate, drawn, extrapolate, free_bytes, promised_lengths, readable, segments
from .specs import FeatureSpec, canonical_features
from .towers import Tower, load_tower
from .workers import Chunk, DecodePool, Job, cores
from .writer import FeatureWriter

_SAMPLE = 16
_PASSES, _PASSES_S = 3, 10.0  # of the tower that are timed: so many, or so long
_PROBES = 512  # headers that are read where the sampling fixes no length
_STATS_AT_ONCE = 16  # files that are asked for their size: a disk of the network answers slowly
_MANY_FILES = 10_000  # fewer are no long wait


@dataclass(frozen=True, slots=True)
class Forecast:
    """What `extract` will do; every number counts each video as sound."""

    store: Path
    n_videos: int  # of the manifest, or of the part that is asked for
    n_present: int  # the store has all that is asked for of them
    n_given_up: int  # failed for good in an earlier run
    n_todo: int
    n_sampled: int
    failures: dict[str, str]  # in the sample: video id → reason
    frames: Estimate  # that the store gains, all views
    crops: Estimate  # distinct ones, which the tower sees
    feature_bytes: dict[str, int]  # that the store gains
    other_bytes: int  # times, indices, rows
    total_bytes: Estimate
    free_bytes: int | None  # None behind a URL
    memory_bytes: dict[str, int]  # feature → of all videos, once all is done
    machine_bytes: int
    decode_s: Estimate  # by all workers together, on their own
    workers: int
    cores: int
    tower_s: Estimate
    frames_per_s: float  # of the tower, on its own
    batch_frames: int  # that the device held
    device: str  # cpu | cuda | mps
    tower: str

    @property
    def total_s(self) -> Estimate:
        """On an accelerator the slower side decides; on a processor both sides share the cores."""
        both = (self.decode_s, self.tower_s)
        if self.device != "cpu":
            return max(both)
        return Estimate(sum(side.value for side in both), sum(side.plus_minus for side in both))

    @property
    def fits(self) -> bool:
        """Whether the disk has room."""
        return self.free_bytes is None or self.total_bytes.value <= self.free_bytes

    @property
    def bottleneck(self) -> str | None:
        """The side that takes longer; None where nothing is to be done."""
        return ("decoding" if self.decode_s.value > self.tower_s.value else "tower") if self.n_todo else None

    @property
    def advice(self) -> str:
        """What would make it faster."""
        share = self.tower_s.value / max(self.decode_s.value, 1e-9)
        waits = f"the {self.device} device idles {1 - share:.0%} of the time; " if self.device != "cpu" else ""
        if self.bottleneck == "decoding" and self.workers < self.cores:
            return f"{waits}this machine has more cores: --workers {self.cores}"
        if self.bottleneck == "decoding":
            return f"{waits}more cores help, or more machines with --shard"
        if self.device == "cpu":
            return "a smaller tower or fewer frames help; a GPU most of all"
        enough = math.ceil(self.workers / share)
        return f"a smaller tower, fewer frames or --compile help; {enough} decode workers would do"

    def to_json(self) -> dict[str, Any]:
        """Plain values, with what is derived."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        facts |= {"store": str(self.store), "n_failed": len(self.failures), "total_s": self.total_s,
                  "fits": self.fits, "bottleneck": self.bottleneck, "advice": self.advice}  # fmt: skip
        return {name: fact._asdict() if isinstance(fact, Estimate) else fact for name, fact in facts.items()}

    def describe(self) -> str:
        """The forecast for people."""
        done = [f"{self.n_present:,} are in the store"] if self.n_present else []
        done += [f"{self.n_given_up:,} failed for good (--retry tries them again)"] if self.n_given_up else []
        lines = [("videos", "; ".join([f"{self.n_todo:,} of {self.n_videos:,} to extract", *done]))]
        if not self.n_todo:
            return _table([*lines, ("total", "nothing to do")])
        reasons = Counter(reason.partition(":")[0] for reason in self.failures.values()).most_common(3)
        share = f"{len(self.failures) / self.n_sampled:.0%}"
        why = ", ".join(f"{n} {reason}" for reason, n in reasons)
        failed = (
            f"{len(self.failures)} ({share}) failed: {why}; what follows counts all as sound" if why else "all sound"
        )
        lines += [
            ("sample", f"{self.n_sampled:,} videos tried, {failed}"),
            ("frames", f"{_number(self.frames)} stored, {_number(self.crops)} crops through the tower"),
        ]
        sizes = [*self.feature_bytes.items(), ("times, indices", self.other_bytes)]
        width = max(len(name) for name, _ in sizes)
        lines += [("" if i else "disk", f"{name:<{width}}  {readable(n):>8}") for i, (name, n) in enumerate(sizes)]
        more = f" ± {readable(self.total_bytes.plus_minus)}" if self.total_bytes.plus_minus else ""
        lines.append(("", f"{'total':<{width}}  {readable(self.total_bytes.value):>8}{more}"))
        if self.free_bytes is not None:
            lines.append(("free", f"{readable(self.free_bytes)} at {self.store}: {self._room(self.free_bytes)}"))
        lines += [("memory", line) for line in self._memory()]
        rate = f"{self.n_todo / max(self.decode_s.value, 1e-9):.1f} videos/s, {self.workers} workers"
        held = f" and batches of {self.batch_frames}" if self.device != "cpu" else ""
        kind = "both share the cores" if self.device == "cpu" else "the slower of the two"
        lines += [
            ("decoding", f"{_time(self.decode_s)} at {rate} on {self.cores} cores"),
            (
                "tower",
                f"{_time(self.tower_s)} at {self.frames_per_s:,.1f} frames/s, {self.tower} on {self.device}{held}",
            ),
            ("total", f"{_time(self.total_s)} ({kind})"),
            ("bottleneck", f"{self.bottleneck}: {self.advice}"),
        ]
        return _table(lines)

    def _room(self, free_bytes: int) -> str:
        if not self.fits:
            return f"IT DOES NOT FIT, {readable(self.total_bytes.value - free_bytes)} ARE MISSING"
        if self.total_bytes.value + self.total_bytes.plus_minus > free_bytes:
            return "IT MAY NOT FIT"
        return "it fits"

    def _memory(self) -> list[str]:
        """Whether training will read from memory what it reads again and again."""
        large = sum(n for name, n in self.memory_bytes.items() if name.startswith(("tokens.", "pixels")))
        small = sum(self.memory_bytes.values()) - large
        lines = []
        if large and large < self.machine_bytes / 2:
            lines.append(
                f"{readable(large)} of patches, {readable(self.machine_bytes)} here: epochs after the first read memory"
            )
        elif large:
            lines.append(
                f"{readable(large)} of patches, {readable(self.machine_bytes)} here: every epoch READS THE DISK"
            )
        if small:
            lines.append(f"{readable(small)} of embeddings, class tokens and summaries, which training holds in memory")
        return lines


def forecast(
    manifest: Manifest, store: Path, tower: Tower, spec: FeatureSpec, features: Sequence[str],
    options: ExtractOptions | None = None, *, n_sample: int | None = None, seed: int = 0,
) -> Forecast:  # fmt: skip
    """Try an extraction on a sample of the videos and count the rest; nothing is written.

    Args:
        store: where it would be written; what is there already is not counted.
        n_sample: videos that are decoded and timed, besides one a worker to warm up; None is 16, or two a worker.

    Raises:
        SpecMismatch, StoreError, ConfigError: those that `extract` would raise before it begins.
    """
    options = options or ExtractOptions()
    n_sample = max(_SAMPLE, 2 * options.workers) if n_sample is None else n_sample
    if n_sample < 1:
        raise ConfigError("a forecast needs a sample", seen=f"sample={n_sample}", wanted="1 video or more")
    refuse_flips(spec, manifest)
    refuse_unreachable(map(manifest.path_of, manifest.records), options.workers)
    names = canonical_features(features, tower.shape.layers)
    writer = FeatureWriter.preview(
        store, spec, spec.shape_of(tower.shape), names, manifest,
        shard_videos=options.shard_videos, part=options.part,
    )  # fmt: skip
    writer.tried = options.tried
    todo = writer.remaining(retry=options.retry)
    given_up = set(writer.remaining(retry=True)) - set(todo)
    tasks = list(jobs(writer, manifest, [todo]))
    sample = _Sample()
    report = ExtractReport(store)
    batch_frames = options.batch_frames or tower.usual_batch
    frames_per_s = 0.0
    if tasks:
        missing = canonical_features({n for key in todo for n in writer.missing(key).names}, tower.shape.layers)
        sample.decode(tasks, writer.spec, options, n_sample, seed, batch_frames)
        encoder = Encoder(tower, missing, writer.spec, batch_frames, report)
        frames_per_s = _time_tower(encoder, report, sample.batch(batch_frames, spec), options.quiet)

    sizes = (segments(tasks), _file_sizes(tasks, options.quiet))
    lengths, share = dict.fromkeys(todo, float(writer.spec.frames.n_frames or 0)), 0.0
    if tasks and writer.spec.frames.n_frames is None:
        probes = drawn(tasks, _PROBES, seed)
        promised = promised_lengths(probes, writer.spec, options.workers, options.max_frames, quiet=options.quiet)
        lengths, share = extrapolate(promised | sample.lengths, todo, *sizes)
    seconds, seconds_share = extrapolate(sample.seconds, todo, *sizes, lengths)
    crops, crops_share = extrapolate(sample.n_crops, todo, *sizes, lengths)
    n_frames, n_crops = sum(lengths[key] * len(writer.missing(key).views) for key in todo), sum(crops.values())
    by_feature, besides = writer.bytes_of(lengths)
    total_bytes = sum(by_feature.values()) + besides
    decode_s = sum(seconds.values()) / max(min(options.workers, len(tasks)), 1)
    tower_s = n_crops / frames_per_s if tasks else 0.0
    n_sound = len(writer.ids) - len(given_up)
    mean_length = sum(lengths.values()) / max(len(todo), 1)
    return Forecast(
        store=store,
        n_videos=len(writer.ids),
        n_present=n_sound - len(todo),
        n_given_up=len(given_up),
        n_todo=len(todo),
        n_sampled=len(sample.lengths) + len(sample.failures),
        failures=sample.failures,
        frames=Estimate(round(n_frames), round(share * n_frames)),
        crops=Estimate(round(n_crops), round(crops_share * n_crops)),
        feature_bytes=by_feature,
        other_bytes=besides,
        total_bytes=Estimate(total_bytes, round(share * total_bytes)),
        free_bytes=free_bytes(store),
        memory_bytes={
            name: round(n_sound * mean_length * writer.spec.frames.n_views * writer.frame_bytes(name)) for name in names
        },
        machine_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        decode_s=Estimate(decode_s, seconds_share * decode_s),
        workers=options.workers,
        cores=cores(),
        tower_s=Estimate(tower_s, crops_share * tower_s),
        frames_per_s=frames_per_s,
        batch_frames=report.batch_frames or batch_frames,
        device=tower.device.type,
        tower=f"{tower.spec.model} {tower.spec.precision}",
    )


def tower_of_the_same_cost(model: str, pretrained: str | None, precision: str, device: str) -> tuple[Tower, str]:
    """Load a tower; where that needs a download, one of random weights, and a note that says so."""
    if are_weights_here(model, pretrained):
        return load_tower(model, pretrained, precision, device), ""
    note = f"the weights {pretrained} are not here yet: random ones stand in, at the same cost"
    return load_tower(model, "random", precision, device), note


def spec_of_stand_in(spec: FeatureSpec, store: Path) -> FeatureSpec:
    """The spec that a store would be asked for by the true weights of a tower, of which only a stand-in is here."""
    if HEADER not in names_in(store):
        return spec
    stored, mine = Header.read(store).spec.tower, spec.tower
    return dataclasses.replace(spec, tower=dataclasses.replace(stored, model=mine.model, precision=mine.precision))


class _Sample:
    """What came of decoding some of the videos."""

    def __init__(self) -> None:
        self.lengths: dict[str, float] = {}  # video id → T
        self.n_crops: dict[str, float] = {}
        self.seconds: dict[str, float] = {}  # of one worker; of failed videos too
        self.failures: dict[str, str] = {}
        self._crops: list[NDArray[np.uint8]] = []  # [n, 3, S, S] each; enough of them for a batch

    def decode(
        self, tasks: Sequence[Job], spec: FeatureSpec, options: ExtractOptions, n: int, seed: int, batch_frames: int
    ) -> None:
        """Decode `n` of the videos; and others before, so that no worker's start is timed."""
        picked = drawn(tasks, n + max(options.workers, 1), seed)
        n_warm = min(max(options.workers, 1), len(picked) // 2)
        with (
            Progress(len(picked), "videos tried", quiet=options.quiet) as progress,
            decode_pool(spec, options) as pool,
        ):
            self._take(pool, picked[:n_warm], batch_frames, progress)
            self.seconds.clear()
            self._take(pool, picked[n_warm:], batch_frames, progress)

    def batch(self, n: int, spec: FeatureSpec) -> NDArray[np.uint8]:
        """Crops for the tower [n, 3, S, S], repeated where there are too few."""
        side = spec.tower.transform.size_px
        seen = np.concatenate(self._crops) if self._crops else np.zeros((1, 3, side, side), np.uint8)
        return np.resize(seen, (n, *seen.shape[1:]))

    def _take(self, pool: DecodePool, tasks: Iterable[Job], n_kept: int, progress: Progress) -> None:
        for key, answer in pool.decode(tasks):
            if isinstance(answer, Chunk):
                if sum(map(len, self._crops)) < n_kept:
                    self._crops.append(answer.crops)
                continue
            self.seconds[key] = answer.seconds
            if isinstance(answer, DecodedVideo):
                self.lengths[key], self.n_crops[key] = answer.rows.shape[1], int(answer.rows.max()) + 1
            else:
                self.failures[key] = answer.reason
            progress.update(1, failed=len(self.failures))


def _time_tower(encoder: Encoder, report: ExtractReport, crops: NDArray[np.uint8], quiet: bool) -> float:
    """Frames a second that the tower encodes, from crops in memory to features in memory."""
    n_passes, began_s = 0, 0.0
    with Progress(1 + _PASSES, "passes of the tower", quiet=quiet) as progress:
        while n_passes <= _PASSES and (n_passes < 2 or report.tower_s - began_s < _PASSES_S):
            list(encoder.run([("sample", Chunk(0, crops))]))
            began_s = began_s or report.tower_s  # the first pass warms up
            n_passes += 1
            progress.update()
    return (n_passes - 1) * len(crops) / (report.tower_s - began_s)


def _file_sizes(tasks: Sequence[Job], quiet: bool) -> dict[str, float]:
    """Bytes of the videos' files; 1 where there is none."""

    def size(job: Job) -> float:
        try:
            return max(Path(job.path).stat().st_size, 1)
        except (OSError, ValueError):
            return 1

    found: dict[str, float] = {}
    with (
        Progress(len(tasks), "files", quiet=quiet or len(tasks) < _MANY_FILES) as progress,
        ThreadPoolExecutor(_STATS_AT_ONCE) as pool,
    ):
        for job, n_bytes in zip(tasks, pool.map(size, tasks), strict=True):
            found[job.key] = n_bytes
            progress.update()
    return found


def _number(estimate: Estimate) -> str:
    more = f" ± {estimate.plus_minus:,.0f}" if estimate.plus_minus else ""
    return f"{estimate.value:,.0f}{more}"


def _time(estimate: Estimate) -> str:
    more = f" ± {_clock(estimate.plus_minus)}" if estimate.plus_minus else ""
    return f"{_clock(estimate.value)}{more}"


def _clock(seconds: float) -> str:
    """Two units at most."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, left_s = divmod(round(seconds), 60)
    hours, left_min = divmod(minutes, 60)
    return f"{hours:,} h {left_min} min" if hours else f"{minutes} min {left_s} s"


def _table(lines: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{label:<10}  {text}" for label, text in lines)
