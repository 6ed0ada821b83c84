"""What a whole store is: the format, version 1, and which shard speaks for which video.

STORE/
  store.json          FeatureSpec and its fingerprint (the store's identity), TowerShape, the features asked for
  store.copy.json     the same again, for the day when that is lost
  manifest.parquet    the videos, their labels, and where they are
  shards/             see shards.py; immutable, so a retry or another feature is a new shard
  journal/            see journal.py
  text/               class names through the text tower, see text.py
  leases/             who is writing, see leases.py; readers need none

Behind a URL the same objects; a shard is there when its rows are, which arrive last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..data_manifests.errors import ConfigError
from ..data_manifests.locations import LocationError, is_local, read_bytes
from ..data_manifests.records import Manifest, ManifestError
from .arrays import ArrayFile, StoreError, item_bytes
from .shards import Shard, VideoRow, replace_file
from .specs import FORMAT_VERSION, FeatureSpec, TowerShape, feature_shape

TIMES = "timestamps_s"  # [T] of every video, an array beside its features
HEADER, COPY, MANIFEST, SHARDS = "store.json", "store.copy.json", "manifest.parquet", "shards"
_VIDEOS = {".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg"}


@dataclass(frozen=True, slots=True)
class Header:
    """`store.json`."""

    spec: FeatureSpec
    shape: TowerShape
    features: tuple[str, ...]  # asked for so far; which of them every video has, the shards say
    manifest_fingerprint: str
    created_at: str  # ISO 8601, UTC
    created_by: str

    @classmethod
    def read(cls, store: Path, name: str = HEADER) -> Self:
        """Read a store's header, or its copy.

        Raises:
            StoreError: no store, of a format version that this release does not read, or damaged.
        """
        path = store / name
        try:
            text = read_bytes(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            fix = way_back(store, name)
            raise StoreError(f"{store} is not a feature store: {_what_it_is(store)}", fix=fix) from None
        try:
            data = json.loads(text)
            spec = FeatureSpec.from_json(data["spec"])
            shape = data["shape"] | {"grid": tuple(data["shape"]["grid"])}
            header = cls(
                spec,
                TowerShape(**shape),
                tuple(data["features"]),
                data["manifest_fingerprint"],
                data["created_at"],
                data["created_by"],
            )
        except ConfigError as error:
            raise StoreError(f"{path}: {error}", fix=way_back(store, name)) from error
        except (KeyError, TypeError, ValueError) as error:
            seen = f"{type(error).__name__}: {error}"[:120]
            raise StoreError(f"{path} is damaged", seen=seen, fix=way_back(store, name)) from error
        if data["fingerprint"] != spec.fingerprint:
            seen = f"fingerprint {data['fingerprint']}"
            raise StoreError(f"{path} was edited", seen=seen, wanted=spec.fingerprint, fix=way_back(store, name))
        if (digest := data.pop("sha256", None)) not in (None, _digest(data)):  # an older release wrote none
            seen = f"digest {digest}"
            raise StoreError(f"{path} was edited", seen=seen, wanted=_digest(data), fix=way_back(store, name))
        return header

    def write(self, store: Path) -> None:
        """Write or replace a store's header."""
        data = {"format_version": FORMAT_VERSION, "fingerprint": self.spec.fingerprint} | dataclasses.asdict(self)
        text = json.dumps(data | {"sha256": _digest(data)}, indent=1) + "\n"
        for name in (HEADER, COPY):
            replace_file(store / name, lambda new: new.write_text(text, encoding="utf-8"))

    def frame_shape(self, array: str) -> tuple[int, ...]:
        """Shape of one frame of a feature or of the timestamps."""
        return () if array == TIMES else feature_shape(array, self.shape, self.spec.tower.transform.size_px)

    def dtype(self, array: str) -> str:
        """Type of a feature's or of the timestamps' numbers."""
        fixed = {TIMES: "float64", "pixels": "uint8"}
        if self.spec.dtype == "int8":
            return fixed.get(array, "int8" if array.startswith("tokens.") else "float16")
        return fixed.get(array, self.spec.dtype)

    def frame_bytes(self, array: str) -> int:
        """Bytes of one frame of a feature or of the timestamps."""
        return math.prod(self.frame_shape(array)) * item_bytes(self.dtype(array))

    def read_manifest(self, store: Path) -> Manifest:
        """The manifest of the store; raises StoreError if it is not the one that the header names."""
        path, fix = store / MANIFEST, "Run the same extract command again."
        try:
            manifest = Manifest.read(path)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing", fix=fix) from None
        except LocationError:
            raise  # to a writer it would look lost, and be replaced
        except (OSError, ManifestError) as error:
            raise StoreError(f"{path} cannot be read: {error}", fix=fix) from error
        if manifest.fingerprint != self.manifest_fingerprint:
            wanted = self.manifest_fingerprint
            raise StoreError(f"{path} was changed", seen=manifest.fingerprint, wanted=wanted, fix=fix)
        return manifest


Place = tuple[int, int]  # shard, row
Key = tuple[str, int]  # video id, view


class Catalogue:
    """Which shard and row speak for a view of a video.

    Of two rows of a view the newer wins, and so does the newer of two shards that hold a feature of it. A newer row
    that saw another content or another number of frames makes everything older of the video void: a batch never mixes
    two versions. A failure takes nothing away: what an earlier run could read stays.
    """

    def __init__(self, shards: Iterable[Shard] = ()) -> None:
        """Add shards, oldest first."""
        self.shards: list[Shard] = []
        self.newest: dict[Key, Place] = {}
        self.holders: dict[str, dict[Key, Place]] = {}  # array -> view of a video -> shard, row
        self._arrays: dict[tuple[int, str], ArrayFile] = {}
        self.troubles: dict[str, VideoRow] = {}  # video id -> the last attempt, where it failed
        for shard in shards:
            self.add(shard)

    def add(self, shard: Shard) -> None:
        """Add the newest shard."""
        number = len(self.shards)
        self.shards.append(shard)
        for i, row in enumerate(shard.rows):
            if not row.is_ok:
                self.troubles[row.video_id] = row
                continue
            self.troubles.pop(row.video_id, None)
            self._forget_other_versions(row)
            key = (row.video_id, row.view)
            self.newest[key] = (number, i)
            for name in shard.arrays:
                self.holders.setdefault(name, {})[key] = (number, i)

    def row(self, place: Place) -> VideoRow:
        """The row at a place."""
        shard, i = place
        return self.shards[shard].rows[i]

    def array(self, shard: int, name: str) -> ArrayFile:
        """An array of a shard, opened and checked once."""
        if (shard, name) not in self._arrays:
            self._arrays[shard, name] = self.shards[shard].array(name)
        return self._arrays[shard, name]

    def rows(self) -> Iterator[VideoRow]:
        """The newest row of every view that has features."""
        return map(self.row, self.newest.values())

    def views(self, video_id: str) -> Iterator[int]:
        """Views of a video that have features: 0, 1, 2, …"""
        return itertools.takewhile(lambda view: (video_id, view) in self.newest, itertools.count())

    def failures(self) -> list[VideoRow]:
        """Rows of the videos whose last attempt failed, by id."""
        return [self.troubles[video_id] for video_id in sorted(self.troubles)]

    def _forget_other_versions(self, row: VideoRow) -> None:
        """Drop what is held of another content or length of a video."""
        first = self.newest.get((row.video_id, 0))
        if first is None or _version(self.row(first)) == _version(row):
            return
        for view in list(self.views(row.video_id)):
            for held in (self.newest, *self.holders.values()):
                held.pop((row.video_id, view), None)


def way_back(store: Path, name: str = HEADER) -> str | None:
    """What to do about a header that is lost; None where its copy is lost, too."""
    if name == COPY:
        return None
    try:
        Header.read(store, COPY)
    except StoreError:
        return None
    return f"Its copy is sound, put it back: {shlex.join(['cp', str(store / COPY), str(store / HEADER)])}"


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _version(row: VideoRow) -> tuple[Any, ...]:
    return row.content_hash, row.n_frames


def _what_it_is(path: Path) -> str:
    """The likeliest reason why there is no header at a path, and what to do."""
    if not is_local(path):
        return f"there is no {HEADER}. Make one with: coldframe extract VIDEOS --store {path}"
    if not path.exists():
        return "there is no such folder. Make one with: coldframe extract VIDEOS --store STORE"
    if not path.is_dir():
        return "it is a file"
    suffixes = {file.suffix.lower() for pattern in ("*", "*/*") for file in path.glob(pattern)}
    if ".safetensors" in suffixes:
        return f"it has no {HEADER} and looks like a checkpoint of train-head. Give the store it was trained on"
    if suffixes & _VIDEOS:
        return f"it holds videos. Extract them first: coldframe extract {path} --store STORE"
    return f"it has no {HEADER}"
