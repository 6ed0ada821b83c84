"""Features on their way out of a store or into one, whatever file they travel in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data_manifests.records import Manifest
from .catalogue import TIMES
from .shards import VideoRow
from .specs import FeatureSpec, TowerShape
from .store import FeatureStore

_STEPS = re.compile(r"(?<![^/])/|/$")  # a slash that begins a path, follows another or ends it
_DOTS = re.compile(r"(?<![^/])\.{1,2}(?![^/])")  # a part that is . or ..


@dataclass(frozen=True, slots=True)
class Parcel:
    """What a store is made of, without its files."""

    spec: FeatureSpec
    shape: TowerShape
    features: tuple[str, ...]  # canonical names
    manifest: Manifest
    rows: Mapping[str, VideoRow]  # id → what is known of the video; failed ones too
    read: Callable[[str], dict[str, NDArray]]  # id → array → [T, ...]; uint16 for the bits of bfloat16

    @property
    def ok(self) -> list[str]:
        """Ids of the videos that have features, sorted."""
        return sorted(video_id for video_id, row in self.rows.items() if row.is_ok)

    def dtype(self, array: str) -> str:
        """Type of a feature's or of the timestamps' numbers."""
        return {TIMES: "float64", "pixels": "uint8"}.get(array, self.spec.dtype)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of a file, not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # of kind U for text
    read: Callable[[Any], NDArray]  # index → numbers; () is all of it


def from_store(store: FeatureStore, features: tuple[str, ...], manifest: Manifest) -> Parcel:
    """The features of those videos of a store that are in `manifest`."""
    rows = {row.video_id: row for row in store.rows if row.video_id in manifest.by_id}
    parcel = Parcel(store.spec, store.shape, features, manifest, rows, lambda video_id: read(video_id))

    def read(video_id: str) -> dict[str, NDArray]:
        arrays = {name: store.read(name, video_id) for name in (*features, TIMES)}
        return {name: _bits(x) if parcel.dtype(name) == "bfloat16" else x for name, x in arrays.items()}

    return parcel


def as_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The numbers whose bfloat16 bits these are."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def array_name(name: str, view: int) -> str:
    """A feature's or the timestamps' name outside a store: that of a video's first view is its own."""
    return f"{name}@{view}" if view else name


def path_of(video_id: str) -> str:
    """An id as a relative path below which nothing else lies; what a path cannot say is written as in a URL."""
    steps = _STEPS.sub("%2F", video_id.replace("%", "%25"))
    return _DOTS.sub(lambda dots: dots[0].replace(".", "%2E"), steps)


def _bits(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bfloat16 bits of float32 numbers that bfloat16 holds: their upper halves, also of a NaN."""
    return (np.ascontiguousarray(numbers).view(np.uint32) >> 16).astype(np.uint16)
