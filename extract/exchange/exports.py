"""A store as files that other programs read.

    FILE.h5   HDF5, a group a video (hdf5.py); imported again it is the same store, bit for bit
    FILE.tar  webdataset: KEY.FEATURE.npy and KEY.json; a KEY is an id in which a dot is written %2E
    DIR       FEATURE/ID.npy, timestamps_s/ID.npy, manifest.csv, store.json

Views after a video's first are FEATURE@1, timestamps_s@1 and so on. NumPy's files hold what readers of a store get:
bfloat16 as float32, int8 as float16. What is written appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...data_manifests.errors import ConfigError
from ...data_manifests.locations import is_local, refuse_url
from ...data_manifests.records import Manifest, ManifestError
from ..catalogue import HEADER, TIMES
from ..compress import restored
from ..progress import Progress
from ..shards import VideoRow
from ..specs import arrays_of, canonical_features
from ..store import FeatureStore
from . import hdf5
from .parcels import ExchangeReport, Parcel, array_name, from_store, path_of

_MARK = "exported_as"


def export_store(
    store: FeatureStore,
    to: Path,
    *,
    features: Sequence[str] = (),
    split: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> ExchangeReport:
    """Write features of a store as a `.h5`, as a `.tar`, or as a folder of `.npy` files.

    Args:
        features: names such as `embedding`; none are all that every video has.
        split: of the store's manifest; None is every video.
        overwrite: replace a file, or a folder that was exported.

    Raises:
        ConfigError: a target that is there, or of another kind; or nothing to export.
        SpecMismatch: a feature that the store lacks.
        StoreError: damaged features.
    """
    write = _writer_of(to)
    _refuse_target(to, store.path, overwrite)
    names = canonical_features(features, store.shape.layers) or store.features
    store.require(names, wanted_by="the export")
    manifest = store.manifest if split is None else store.manifest.split(split)
    parcel = from_store(store, names, manifest)
    if not parcel.ok:
        raise ConfigError(f"{store.path} has features of no video" + (f" of the split {split}" if split else ""))
    report, began = ExchangeReport.of(parcel, store.path, to), time.perf_counter()
    with Progress(len(parcel.rows), "videos", quiet=quiet) as progress, _appearing(to) as part:
        write(part, parcel, progress)
    report.seconds = time.perf_counter() - began
    return report


def _writer_of(to: Path) -> Callable[[Path, Parcel, Progress], None]:
    """What writes the kind of file that a name asks for."""
    if to.suffix in hdf5.SUFFIXES:
        return hdf5.write
    if to.suffix not in (".tar", ""):
        raise ConfigError(
            "an export is a file or a folder",
            seen=to.name,
            wanted="FILE.h5, FILE.tar, or a folder's name without a dot",
        )
    return _write_tar if to.suffix == ".tar" else _write_folder


def _refuse_target(to: Path, store: Path, overwrite: bool) -> None:
    """Refuse to replace what was not asked for, and what no export wrote."""
    refuse_url(to, "an export")
    there, source = to.resolve(), store.resolve()
    if is_local(store) and (there.is_relative_to(source) or source.is_relative_to(there)):
        raise ConfigError("an export cannot lie in its store, or the store in it", seen=to, fix="Name another place.")
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{to} is there already", fix="Add --overwrite, or name another place.")
    if to.is_dir() and not (to.suffix == "" and _is_export(to)):
        raise ConfigError(f"{to} is a folder that no export wrote", fix="Remove it yourself, or name another place.")
    if to.is_file() and to.suffix == "":
        raise ConfigError(f"{to} is a file", wanted="FILE.h5, FILE.tar, or a folder")


def _is_export(folder: Path) -> bool:
    try:
        return _MARK in json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


@contextmanager
def _appearing(to: Path) -> Iterator[Path]:
    """A place beside a target; what is written there becomes the target, or vanishes with the failure."""
    to.parent.mkdir(parents=True, exist_ok=True)
    part, old = (to.with_name(f".{to.name}.{kind}-{os.getpid()}") for kind in ("part", "old"))
    try:
        yield part
        if part.is_file():
            with part.open("rb") as file:
                os.fsync(file.fileno())  # a crash after the rename must not leave an empty file
        if to.is_dir():  # a folder cannot be replaced in one step
            to.rename(old)
        part.replace(to)
    except BaseException:
        if old.exists() and not to.exists():
            old.rename(to)
        raise
    finally:
        for path in (part, old):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _write_folder(folder: Path, parcel: Parcel, progress: Progress) -> None:
    """An `.npy` for every feature of every video; bfloat16 as float32."""
    folder.mkdir()
    for video_id in sorted(parcel.rows):
        for name, numbers in _numbers(parcel, video_id):
            file = folder / name / f"{path_of(video_id)}.npy"
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("xb") as out:
                    np.save(out, numbers, allow_pickle=False)
            except (FileExistsError, NotADirectoryError) as error:
                raise ConfigError(
                    f"the file of video {video_id!r} would lie where another video's lies", fix="Export to a .tar."
                ) from error
        progress.update()
    try:
        parcel.manifest.write(folder / "manifest.csv")
    except ManifestError:  # a CSV holds neither | in a caption nor a class that no video has
        (folder / "manifest.csv").unlink(missing_ok=True)
        parcel.manifest.write(folder / "manifest.parquet")
    facts = {video_id: _row_facts(rows) for video_id, rows in sorted(parcel.rows.items())}
    text = json.dumps({_MARK: "npy"} | _store_facts(parcel) | {"videos": facts}, indent=1)
    (folder / HEADER).write_text(text + "\n", encoding="utf-8")


def _write_tar(path: Path, parcel: Parcel, progress: Progress) -> None:
    """A sample a video. The member `__store__`, which webdataset passes over, says what made the features."""
    with tarfile.open(path, "x") as tar:
        facts = {_MARK: "webdataset"} | _store_facts(parcel) | {"class_names": parcel.manifest.class_names}
        _add(tar, "__store__", json.dumps(facts).encode())
        for video_id, rows in sorted(parcel.rows.items()):
            key = path_of(video_id).replace(".", "%2E")
            for name, numbers in _numbers(parcel, video_id):
                npy = io.BytesIO()
                np.save(npy, numbers, allow_pickle=False)
                _add(tar, f"{key}.{name}.npy", npy.getvalue())
            if rows[0].is_ok:
                facts = _record_facts(parcel.manifest, video_id) | _row_facts(rows)
                _add(tar, f"{key}.json", json.dumps(facts).encode())
            progress.update()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no time and no owner: one store makes one tar
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _numbers(parcel: Parcel, video_id: str) -> Iterator[tuple[str, NDArray]]:
    """Features and timestamps of every view of a video, in types that NumPy has."""
    for row in parcel.rows[video_id]:
        arrays = parcel.read(video_id, row.view) if row.is_ok else {}
        for name in (*parcel.features, TIMES) if arrays else ():
            parts = [arrays[array] for array in arrays_of(name, parcel.spec.dtype)]
            yield (
                array_name(name, row.view),
                restored(*map(torch.from_numpy, parts)).numpy() if parts[1:] else _plain(parts[0]),
            )


def _plain(array: NDArray) -> NDArray:
    """The same numbers, those whose bfloat16 bits these are as float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def _store_facts(parcel: Parcel) -> dict[str, Any]:
    return {
        "created_by": f"coldframe {version('coldframe')}",
        "fingerprint": parcel.spec.fingerprint,
        "spec": parcel.spec.to_json(),
        "shape": dataclasses.asdict(parcel.shape),
        "features": parcel.features,
    }


def _row_facts(rows: Sequence[VideoRow]) -> dict[str, Any]:
    """What is known of a video; of its first view, where views differ."""
    facts = dataclasses.asdict(rows[0]) | {"n_views": sum(row.is_ok for row in rows)}
    return {name: value for name, value in facts.items() if name not in ("video_id", "view", "crc32c")}


def _record_facts(manifest: Manifest, video_id: str) -> dict[str, Any]:
    record = manifest.by_id[video_id]
    class_name = None if record.label is None else manifest.class_names[record.label]
    return dataclasses.asdict(record) | {"class_name": class_name}
