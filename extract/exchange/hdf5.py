"""HDF5, both directions; the only user of h5py.

    FILE.h5             attributes: spec, shape, features, class_names, manifest … as JSON or text
      class/clip.avi/   a group a video, named by its id; attributes: its record and its row
        embedding       [T, E], as it lies in the store; bfloat16 as its bits in uint16, with the attribute dtype
        tokens.12       [T, 1+N, D]; if int8, to be multiplied by scale.12 [T, 1+N]
        timestamps_s    [T]

Views after a video's first are named embedding@1, timestamps_s@1 and so on; the latter has the row's attributes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ...data_manifests.errors import ColdframeError, ConfigError
from ...data_manifests.records import Manifest, VideoRecord, listed
from ..arrays import StoreError, checksum
from ..catalogue import TIMES
from ..progress import Progress
from ..shards import VideoRow
from ..specs import FeatureSpec, TowerShape
from .parcels import Leaf, Parcel, array_name, path_of

SUFFIXES = (".h5", ".hdf5")
EXPORT_VERSION = 1
_MARK = "coldframe_export"
_ROW = tuple(field.name for field in dataclasses.fields(VideoRow) if field.name not in ("video_id", "crc32c"))


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """A file for reading; raises StoreError if it is not HDF5, or cut short."""
    with _speaking_for(path):
        file = h5py.File(path, "r")
    with file:
        yield file


def is_export(file: h5py.File) -> bool:
    """Whether a file was written by `write`."""
    return _MARK in file.attrs


def write(path: Path, parcel: Parcel, progress: Progress) -> None:
    """Write a parcel; a row and its bytes are what they are in the store.

    Raises:
        ConfigError: one video's group would lie where another has an array.
        StoreError: the store's bytes are not the ones that were written.
    """
    _refuse_collisions(parcel)
    manifest = parcel.manifest
    with _speaking_for(path, "written"), h5py.File(path, "w") as file:
        file.attrs[_MARK] = EXPORT_VERSION
        file.attrs["created_by"] = f"coldframe {version('coldframe')}"
        file.attrs["fingerprint"] = parcel.spec.fingerprint
        file.attrs["spec"] = json.dumps(parcel.spec.to_json())
        file.attrs["shape"] = json.dumps(dataclasses.asdict(parcel.shape))
        file.attrs["features"] = json.dumps(parcel.features)
        file.attrs["manifest_name"], file.attrs["manifest_root"] = manifest.name, manifest.root
        file.attrs["class_names"] = json.dumps(manifest.class_names)  # as one text: a list may exceed an attribute
        for number, record in enumerate(manifest.records):
            group = file.require_group(path_of(record.video_id))
            group.attrs["record"] = number
            for name, value in _facts(record, manifest).items():
                group.attrs[name] = value
            for row in parcel.rows.get(record.video_id, ()):
                _write_view(group, row, parcel)
            progress.update(record.video_id in parcel.rows)


def read(file: h5py.File) -> Parcel:
    """What a file of ours holds; its arrays are read when they are asked for, and held to their checksums.

    Raises:
        ConfigError: of a version that this release does not read.
        StoreError: damaged.
    """
    with _speaking_for(file.filename):
        attrs: Any = file.attrs
        if attrs[_MARK] != EXPORT_VERSION:
            raise ConfigError(
                f"{file.filename} has a layout that this release does not read",
                seen=attrs[_MARK],
                wanted=EXPORT_VERSION,
            )
        spec, shape = FeatureSpec.from_json(json.loads(attrs["spec"])), json.loads(attrs["shape"])
        if attrs["fingerprint"] != spec.fingerprint:
            raise StoreError(f"{file.filename} was edited", seen=attrs["fingerprint"], wanted=spec.fingerprint)
        features, class_names = tuple(json.loads(attrs["features"])), tuple(json.loads(attrs["class_names"]))
        groups = sorted(_groups(file), key=lambda group: int(group.attrs["record"]))
        places = {group.attrs["video_id"]: group.name for group in groups}
        records = tuple(_record(group.attrs, class_names) for group in groups)
        manifest = Manifest(attrs["manifest_name"], attrs["manifest_root"], class_names, records)
        rows = {group.attrs["video_id"]: found for group in groups if (found := _rows(group))}
        shape = TowerShape(**shape | {"grid": tuple(shape["grid"])})

    def arrays(video_id: str, view: int) -> dict[str, NDArray]:
        with _speaking_for(file.filename):
            group: Any = file[places[video_id]]
            return {name: _sound(group[array_name(name, view)]) for name in parcel.arrays}

    parcel = Parcel(spec, shape, features, manifest, rows, arrays)
    return parcel


def leaves(file: h5py.File) -> dict[str, Leaf]:
    """Every data set of anybody's file, by each of its paths.

    Raises:
        ConfigError: what lies in other files, or is a link: it would be left out, or read as zeros, without a word.
        StoreError: damaged.
    """
    found: dict[str, Leaf] = {}
    elsewhere: list[str] = []

    def visit(name: str, link: object) -> None:
        item: Any = file[name] if isinstance(link, h5py.HardLink) else None
        if item is None or (isinstance(item, h5py.Dataset) and (item.is_virtual or item.external)):
            elsewhere.append(name)
        elif isinstance(item, h5py.Dataset) and item.shape is not None:
            found[name] = _leaf(item)

    with _speaking_for(file.filename):
        file.visititems_links(visit)
    if elsewhere:
        raise ConfigError(
            f"{file.filename} holds links or virtual data sets, which are not followed",
            seen=listed(elsewhere),
            fix="Copy the numbers into one file, as h5repack and h5py's Group.copy do.",
        )
    return found


def _leaf(dataset: Any) -> Leaf:
    is_text = h5py.check_string_dtype(dataset.dtype) is not None

    def read(index: Any) -> NDArray:
        with _speaking_for(dataset.file.filename):
            return np.asarray((dataset.asstr() if is_text else dataset)[index])

    return Leaf(dataset.shape, np.dtype("U") if is_text else dataset.dtype, read)


@contextmanager
def _speaking_for(path: Path | str, done: str = "read") -> Iterator[None]:
    """What h5py says of a file, on one line; it gives its errors neither a number nor a file's name."""
    try:
        yield
    except ColdframeError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise StoreError(f"{path} cannot be {done} as HDF5: {error}") from error


def _refuse_collisions(parcel: Parcel) -> None:
    """Refuse ids of which one continues another where an array of that lies."""
    paths = {path_of(video_id): video_id for video_id in parcel.manifest.ids}
    for path, video_id in paths.items():
        parts = path.split("/")
        for at, part in enumerate(parts[1:], start=1):
            other = paths.get("/".join(parts[:at]))
            if other is not None and part.partition("@")[0] in parcel.arrays:
                raise ConfigError(
                    f"video {video_id!r} would lie where {other!r} has its {part}",
                    fix="Export to a folder or a .tar, or rename one of them in a manifest and extract again.",
                )


def _facts(record: VideoRecord, manifest: Manifest) -> dict[str, Any]:
    """A record as attributes; what is unknown is left out."""
    label = None if record.label is None else manifest.class_names[record.label]
    facts = {"label": label, "captions": json.dumps(record.captions)}
    facts |= {name: getattr(record, name) for name in ("video_id", "path", "split", "group", "start_s", "end_s")}
    return {name: value for name, value in facts.items() if value is not None}


def _record(attrs: Mapping[str, Any], class_names: tuple[str, ...]) -> VideoRecord:
    start_s, end_s = (None if attrs.get(name) is None else float(attrs[name]) for name in ("start_s", "end_s"))
    label = attrs.get("label")
    return VideoRecord(
        attrs["video_id"],
        attrs["path"],
        None if label is None else class_names.index(label),
        attrs["split"],
        attrs["group"],
        tuple(json.loads(attrs["captions"])),
        start_s,
        end_s,
    )


def _write_view(group: h5py.Group, row: VideoRow, parcel: Parcel) -> None:
    for name, array in parcel.read(row.video_id, row.view).items() if row.is_ok else ():
        dataset = group.create_dataset(array_name(name, row.view), data=array)
        dataset.attrs["crc32c"] = checksum(array)
        if array.dtype == np.uint16:
            dataset.attrs["dtype"] = "bfloat16"
    attrs = group[array_name(TIMES, row.view)].attrs if row.view else group.attrs
    for name in _ROW:
        attrs[name] = getattr(row, name)


def _rows(group: Any) -> list[VideoRow]:
    """The rows of a video, by view; none of one that was never extracted."""
    later = [group[name] for name in group if name.startswith(f"{TIMES}@")]
    found = [{name: item.attrs[name] for name in _ROW} for item in (group, *later) if "status" in item.attrs]
    plain = [{name: v.item() if isinstance(v, np.generic) else v for name, v in facts.items()} for facts in found]
    return sorted((VideoRow(group.attrs["video_id"], **facts) for facts in plain), key=lambda row: row.view)


def _groups(file: h5py.File) -> list[Any]:
    found: list[Any] = []

    def visit(_: str, item: object) -> None:
        if isinstance(item, h5py.Group) and "video_id" in item.attrs:
            found.append(item)

    file.visititems(visit)
    return found


def _sound(dataset: Any) -> NDArray:
    """All of a data set of ours; raises StoreError if its bytes are not the ones that were written."""
    array = dataset[()]
    if checksum(array) != int(dataset.attrs["crc32c"]):
        raise StoreError(f"{dataset.name} of {dataset.file.filename} is damaged", fix="Copy or export it again.")
    return array
