"""A store as files that other programs read, and features of others as a store.

    FILE.h5   HDF5, a group a video (hdf5.py); imported again it is the same store, bit for bit
    FILE.tar  webdataset: KEY.FEATURE.npy and KEY.json; a KEY is an id in which a dot is written %2E
    DIR       FEATURE/ID.npy, timestamps_s/ID.npy, manifest.csv, store.json

What is written appears whole or not at all.
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data_manifests.errors import ConfigError
from ..data_manifests.records import Manifest, ManifestError
from . import numpy_files
from .catalogue import HEADER, MANIFEST, SHARDS, TIMES, Header
from .foreign import understand
from .foreign_labels import Reading
from .frames import DecodedVideo
from .parcels import Parcel, array_name, as_float32, from_store, path_of
from .progress import Progress
from .shards import VideoRow, committed
from .specs import SpecMismatch, TowerShape, canonical_features
from .store import FeatureStore
from .writer import FeatureWriter, ShardBuilder

HDF5 = (".h5", ".hdf5")
_MARK = "exported_as"


@dataclass(slots=True)
class ExchangeReport:
    """What an export or an import did."""

    source: Path
    target: Path
    features: tuple[str, ...]
    fingerprint: str
    n_videos: int = 0  # that have features
    n_present: int = 0  # import: had them before
    n_failed: int = 0  # videos without features, whose reasons travel along
    notes: tuple[str, ...] = ()  # how a file was read
    seconds: float = 0.0
    interrupted: bool = False

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
    report = ExchangeReport(store.path, to, names, store.fingerprint, len(parcel.ok))
    report.n_failed = len(parcel.rows) - len(parcel.ok)
    began = time.perf_counter()
    with Progress(len(parcel.rows), "videos", quiet=quiet) as progress, _appearing(to) as part:
        write(part, parcel, progress)
    report.seconds = time.perf_counter() - began
    return report


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
    from . import hdf5

    if source.is_file() and source.suffix in HDF5:
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


# Into a store


def _into_store(
    parcel: Parcel, source: Path, path: Path, is_labelled: bool, notes: tuple[str, ...], quiet: bool
) -> ExchangeReport:
    """Write what the store lacks of a parcel; `is_labelled` where the user named the manifest."""
    report = ExchangeReport(source, path, parcel.features, parcel.spec.fingerprint, len(parcel.ok), notes=notes)
    report.n_failed = len(parcel.rows) - report.n_videos
    began = time.perf_counter()
    shape = _shape_with(path, parcel, is_labelled)
    with FeatureWriter.open(path, parcel.spec, shape, parcel.features, parcel.manifest) as writer:
        todo = [video_id for video_id in writer.remaining() if video_id in parcel.rows]
        report.n_present = report.n_videos - sum(parcel.rows[video_id].is_ok for video_id in todo)
        try:
            with Progress(len(todo), "videos", quiet=quiet) as progress:
                for part in writer.plan(todo):
                    shard = writer.begin_shard(part)
                    for video_id in part:
                        _hand_over(shard, parcel, parcel.rows[video_id])
                        progress.update()
                    shard.commit()
        except KeyboardInterrupt:
            report.interrupted = True
    report.seconds = time.perf_counter() - began
    return report


def _hand_over(shard: ShardBuilder, parcel: Parcel, row: VideoRow) -> None:
    """Give a shard one video as it is known: with its features, or with the reason why it has none."""
    if row.is_ok:
        arrays = parcel.read(row.video_id)
        times = arrays.pop(TIMES)
        frames = np.arange(len(times))
        pixels = np.empty((len(times), 3, 0, 0), np.uint8)  # nobody looks at them
        video = DecodedVideo(pixels, times, frames, len(times), row.n_repeated, row.decoder, row.content_hash)
        shard.add(row.video_id, arrays, video, row.seconds)
    else:
        shard.fail(row.video_id, row.reason, row.seconds)
    shard._rows[row.video_id] = dataclasses.replace(shard._rows[row.video_id], attempts=row.attempts)


def _shape_with(path: Path, parcel: Parcel, is_labelled: bool) -> TowerShape:
    """The tower's sizes as far as store and parcel know them together: each knows those of its own features."""
    if not ((path / HEADER).is_file() and committed(path / SHARDS)):
        return parcel.shape
    stored = Header.read(path)
    stored.spec.expect(parcel.spec, f"the store {path}")
    if not is_labelled and stored.manifest_fingerprint != parcel.manifest.fingerprint:
        raise ConfigError(
            f"the store {path} has other videos, labels, splits or groups than the file",
            fix=f"Name those that it shall have; to keep its own: --manifest {path / MANIFEST}",
        )
    sizes = {}
    for name, ours in dataclasses.asdict(stored.shape).items():
        theirs = getattr(parcel.shape, name)
        known = {size for size in (ours, theirs) if size not in (0, (0, 0))}
        if len(known) > 1 and name not in ("layers", "heads"):
            raise SpecMismatch(f"the store {path} is of features with another {name}", seen=ours, wanted=theirs)
        sizes[name] = max(ours, theirs)
    return TowerShape(**sizes)


def _relabelled(parcel: Parcel, manifest: Manifest | None) -> Parcel:
    """A parcel under another manifest, which must know every video that has features."""
    if manifest is None:
        return parcel
    if lost := [video_id for video_id in parcel.ok if video_id not in manifest.by_id]:
        raise ConfigError(f"{len(lost):,} videos of the file are not in the manifest {manifest.name}", seen=lost[0])
    rows = {video_id: row for video_id, row in parcel.rows.items() if video_id in manifest.by_id}
    return dataclasses.replace(parcel, manifest=manifest, rows=rows)


# Out of a store


def _writer_of(to: Path) -> Callable[[Path, Parcel, Progress], None]:
    """What writes the kind of file that a name asks for."""
    if to.suffix in HDF5:
        from . import hdf5

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
    there, source = to.resolve(), store.resolve()
    if there.is_relative_to(source) or source.is_relative_to(there):
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
    for video_id, row in sorted(parcel.rows.items()):
        for name, numbers in _numbers(parcel, row):
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
    facts = {video_id: _row_facts(row) for video_id, row in sorted(parcel.rows.items())}
    text = json.dumps({_MARK: "npy"} | _store_facts(parcel) | {"videos": facts}, indent=1)
    (folder / HEADER).write_text(text + "\n", encoding="utf-8")


def _write_tar(path: Path, parcel: Parcel, progress: Progress) -> None:
    """A sample a video. The member `__store__`, which webdataset passes over, says what made the features."""
    with tarfile.open(path, "x") as tar:
        facts = {_MARK: "webdataset"} | _store_facts(parcel) | {"class_names": parcel.manifest.class_names}
        _add(tar, "__store__", json.dumps(facts).encode())
        for video_id, row in sorted(parcel.rows.items()):
            if row.is_ok:
                key = path_of(video_id).replace(".", "%2E")
                for name, numbers in _numbers(parcel, row):
                    npy = io.BytesIO()
                    np.save(npy, numbers, allow_pickle=False)
                    _add(tar, f"{key}.{name}.npy", npy.getvalue())
                _add(
                    tar, f"{key}.json", json.dumps(_record_facts(parcel.manifest, video_id) | _row_facts(row)).encode()
                )
            progress.update()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no time and no owner: one store makes one tar
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _numbers(parcel: Parcel, row: VideoRow) -> Iterator[tuple[str, NDArray]]:
    """The arrays of a video that is ok, in types that NumPy has."""
    for name, array in (parcel.read(row.video_id) if row.is_ok else {}).items():
        yield array_name(name, row.view), as_float32(array) if parcel.dtype(name) == "bfloat16" else array


def _store_facts(parcel: Parcel) -> dict[str, Any]:
    return {
        "created_by": f"coldframe {version('coldframe')}",
        "fingerprint": parcel.spec.fingerprint,
        "spec": parcel.spec.to_json(),
        "shape": dataclasses.asdict(parcel.shape),
        "features": parcel.features,
    }


def _row_facts(row: VideoRow) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(row).items() if name not in ("video_id", "crc32c")}


def _record_facts(manifest: Manifest, video_id: str) -> dict[str, Any]:
    record = manifest.by_id[video_id]
    class_name = None if record.label is None else manifest.class_names[record.label]
    return dataclasses.asdict(record) | {"class_name": class_name}
