"""Features on their way out of a store or into one, whatever file they travel in."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data_manifests.records import Manifest
from ..catalogue import TIMES
from ..shards import VideoRow
from ..specs import FeatureSpec, TowerShape, arrays_of
from ..store import FeatureStore

_STEPS = re.compile(r"(?<![^/])/|/$")  # a slash that begins a path, follows another or ends it
_DOTS = re.compile(r"(?<![^/])\.{1,2}(?![^/])")  # a part that is . or ..


@dataclass(frozen=True, slots=True)
class Parcel:
    """What a store is made of, without its files."""

    spec: FeatureSpec
    shape: TowerShape
    features: tuple[str, ...]  # canonical names
    manifest: Manifest
    rows: Mapping[str, Sequence[VideoRow]]  # id → its views; of a video without features, why it has none
    read: Callable[[str, int], dict[str, NDArray]]  # id, view → array → [T, ...]; uint16 for the bits of bfloat16

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays of a view."""
        return (*(array for name in self.features for array in arrays_of(name, self.spec.dtype)), TIMES)

    @property
    def ok(self) -> list[str]:
        """Ids of the videos that have features, sorted."""
        return sorted(video_id for video_id, rows in self.rows.items() if rows[0].is_ok)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of a file, not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # of kind U for text
    read: Callable[[Any], NDArray]  # index → numbers; () is all of it


@dataclass(slots=True)
class ExchangeReport:
    """What an export or an import did."""

    source: Path
    target: Path
    features: tuple[str, ...]
    fingerprint: str
    n_videos: int  # that have features
    n_failed: int  # videos without features, whose reasons travel along
    n_present: int = 0  # import: had them before
    notes: tuple[str, ...] = ()  # how a file was read
    seconds: float = 0.0
    interrupted: bool = False

    @classmethod
    def of(cls, parcel: Parcel, source: Path, target: Path, notes: tuple[str, ...] = ()) -> ExchangeReport:
        """Before anything was done."""
        n_ok = len(parcel.ok)
        return cls(source, target, parcel.features, parcel.spec.fingerprint, n_ok, len(parcel.rows) - n_ok, notes=notes)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"source": str(self.source), "target": str(self.target)}

    def describe(self) -> str:
        """The report for people."""
        present = f", {self.n_present:,} of them were there" if self.n_present else ""
        failed = f", {self.n_failed:,} failed before" if self.n_failed else ""
        lines = [
            f"{self.target}: {', '.join(self.features)} of {self.n_videos:,} videos from {self.source}{present}{failed}"
        ]
        lines += [f"  {note}" for note in self.notes]
        if self.interrupted:
            lines.append("interrupted; the same command goes on from here")
        return "\n".join(lines)


def from_store(store: FeatureStore, features: tuple[str, ...], manifest: Manifest) -> Parcel:
    """The features of those videos of a store that are in `manifest`, in every view that has them all."""
    rows: dict[str, list[VideoRow]] = {}
    for row in store.rows:
        is_whole = not row.is_ok or all(store.holds(name, row.video_id, row.view) for name in features)
        if is_whole and row.video_id in manifest.by_id:
            rows.setdefault(row.video_id, []).append(row)

    def read(video_id: str, view: int) -> dict[str, NDArray]:
        return {name: store.stored(name, video_id, view) for name in parcel.arrays}

    parcel = Parcel(store.spec, store.shape, features, manifest, rows, read)
    return parcel


def array_name(name: str, view: int) -> str:
    """A feature's or the timestamps' name outside a store: that of a video's first view is its own."""
    return f"{name}@{view}" if view else name


def path_of(video_id: str) -> str:
    """An id as a relative path below which nothing else lies; what a path cannot say is written as in a URL."""
    steps = _STEPS.sub("%2F", video_id.replace("%", "%25"))
    return _DOTS.sub(lambda dots: dots[0].replace(".", "%2E"), steps)
