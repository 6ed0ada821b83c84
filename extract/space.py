"""How much disk an extraction will take, before it starts: lengths of a few videos, scaled to all of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data_manifests.locations import is_local
from .frames import DecodedVideo, DecodeOptions, probe
from .progress import Progress
from .sampling import generator
from .specs import FeatureSpec
from .workers import DecodePool, Job
from .writer import FeatureWriter

_PROBES = 32  # headers that are read where the sampling fixes no length


class Estimate(NamedTuple):
    """A number, and how far off it may be: two standard errors; 0 where it was counted."""

    value: float
    plus_minus: float = 0.0


def needed_bytes(
    writer: FeatureWriter, jobs: Sequence[Job], *, workers: int = 2, max_frames: int | None = None
) -> Estimate:
    """Disk that the videos still to be extracted will take, times and indices included; no picture is decoded.

    Where the sampling fixes the length of a video this only counts. Elsewhere the headers of a few videos are read, in
    processes that can be killed.
    """
    ids, share = [job.key for job in jobs], 0.0
    n_frames = writer.spec.frames.n_frames
    lengths: Mapping[str, float] = dict.fromkeys(ids, float(n_frames or 0))
    if n_frames is None and jobs:
        seen = promised_lengths(drawn(jobs, _PROBES), writer.spec, workers, max_frames)
        lengths, share = extrapolate(seen, ids, segments(jobs))
    by_feature, besides = writer.bytes_of(lengths)
    n_bytes = sum(by_feature.values()) + besides
    return Estimate(n_bytes, share * n_bytes)


def promised_lengths(
    jobs: Sequence[Job], spec: FeatureSpec, workers: int = 2, max_frames: int | None = None, *, quiet: bool = True
) -> dict[str, float]:
    """Frames a view of videos, as their headers have it; those that cannot be read are left out."""
    found: dict[str, float] = {}
    options = DecodeOptions(max_frames=max_frames)
    with (
        Progress(len(jobs), "headers", quiet=quiet) as progress,
        DecodePool(spec.frames, spec.tower.transform, workers=workers, options=options, decode=probe) as pool,
    ):
        for key, answer in pool.decode(jobs):
            if isinstance(answer, DecodedVideo):
                found[key] = answer.rows.shape[1]
            progress.update()
    return found


def free_bytes(path: Path) -> int | None:
    """Free space where a folder is, or will be; None where that is behind a URL."""
    if not is_local(path):
        return None
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def readable(n_bytes: float) -> str:
    """Bytes for people: 3 significant digits in decimal units."""
    units = iter(("bytes", "kB", "MB", "GB"))
    unit = next(units)
    while n_bytes >= 999.5 and unit != "TB":
        n_bytes, unit = n_bytes / 1000, next(units, "TB")
    n_digits = 0 if n_bytes >= 99.95 or unit == "bytes" else 1 if n_bytes >= 9.995 else 2
    return f"{n_bytes:,.{n_digits}f} {unit}"


def drawn(jobs: Sequence[Job], n: int, seed: int = 0) -> list[Job]:
    """A random sample of some of the jobs, in random order."""
    chosen = generator(seed, "forecast").choice(len(jobs), min(n, len(jobs)), replace=False)
    return [jobs[i] for i in chosen.tolist()]


def extrapolate(
    seen: Mapping[str, float], ids: Collection[str], *sizes: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """Guess a number of every video from that of a sample, in proportion to whichever size predicts the sample best.

    Args:
        seen: of the sample.
        ids: of all videos.
        sizes: candidates, each of every video; one that lacks a video is left out. All videos alike is always one.

    Returns:
        The number of every video, as it was seen where it was; and two standard errors of their sum, as a share of it.

    Source: the ratio estimator of survey sampling.
    """
    if not seen:
        return dict.fromkeys(ids, 0.0), 0.0
    values = np.array(list(seen.values()), dtype=np.float64)
    alike = dict.fromkeys(ids, 1.0)
    best, best_error = alike, math.inf
    for size in (alike, *(size for size in sizes if size.keys() >= set(ids) and min(size.values()) > 0)):
        x = np.array([size[key] for key in seen])
        error = float(np.square(values - values.sum() / x.sum() * x).sum())
        if error < best_error * (1 - 1e-9):
            best, best_error = size, error
    scale = float(values.sum()) / sum(best[key] for key in seen)
    found = {key: seen.get(key, scale * best[key]) for key in ids}
    n, n_unseen, total = len(seen), len(found) - len(seen), sum(found.values())
    if not n_unseen or not total:
        return found, 0.0
    # Of one video nothing can be said but that it may be anything.
    spread = math.sqrt(best_error / (n - 1)) if n > 1 else float(values[0])
    unseen = math.sqrt(n_unseen * len(found) / n)  # the finite sample's own part is known
    return found, 2 * spread * unseen / total


def segments(jobs: Sequence[Job]) -> dict[str, float]:
    """Seconds of the videos that are a segment with a beginning and an end."""
    return {job.key: job.end_s - (job.start_s or 0.0) for job in jobs if job.end_s is not None and job.end_s < math.inf}
