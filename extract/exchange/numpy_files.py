"""NumPy's files, .npy and .npz, as arrays that are not read yet; pickled objects are never loaded."""

from __future__ import annotations

import functools
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data_manifests.errors import ConfigError
from ..arrays import StoreError
from ..catalogue import HEADER, SHARDS
from .parcels import Leaf

_BROKEN = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)  # what NumPy says of a bad file


def leaves(source: Path) -> dict[str, Leaf]:
    """The arrays of an .npz, of an .npy, or of a folder of them, by their paths without suffix.

    Raises:
        ConfigError: something else.
        StoreError: a file that NumPy cannot read.
    """
    load = functools.lru_cache(maxsize=1)(_load)  # an array of many videos is unpacked once
    if source.is_file():
        files = {"" if source.suffix == ".npz" else source.stem: source}
    else:
        _refuse_stores(source)
        found = sorted(path for path in source.rglob("*.np[yz]") if path.is_file())
        files = {path.relative_to(source).with_suffix("").as_posix(): path for path in found}
        if len(files) < len(found):
            twins = Counter(path.with_suffix("") for path in found)
            raise ConfigError(f"{source} has an .npy and an .npz of one name", seen=max(twins, key=lambda p: twins[p]))
    found_leaves: dict[str, Leaf] = {}
    for name, file in files.items():
        try:
            found_leaves |= _members(name, file, load) if file.suffix == ".npz" else {name: _mapped(file)}
        except _BROKEN as error:
            raise _unreadable(file, error) from error
    return found_leaves


def _members(name: str, file: Path, load: Callable[[Path, str], NDArray]) -> dict[str, Leaf]:
    """The arrays of an .npz, below the name of the file; one that is alone has the file's name."""
    with _archive(file) as archive:
        keys, headers = archive.files, {key: _header(archive, key) for key in archive.files}
    alone = len(keys) == 1 and name
    return {
        name if alone else f"{name}/{key}".lstrip("/"): Leaf(*headers[key], functools.partial(_member, load, file, key))
        for key in keys
    }


@contextmanager
def _archive(file: Path) -> Iterator[Any]:
    """An .npz; NumPy would leave a broken one open."""
    with file.open("rb") as opened:
        archive = np.load(opened, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise zipfile.BadZipFile("it is an .npy by another name")
        yield archive


def _header(archive: Any, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array in an .npz, without unpacking it."""
    with archive.zip.open(f"{key}.npy") as member:
        major, _ = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    return shape, dtype


def _load(file: Path, key: str) -> NDArray:
    with _archive(file) as archive:
        return archive[key]


def _member(load: Callable[[Path, str], NDArray], file: Path, key: str, index: Any) -> NDArray:
    try:
        return load(file, key)[index]
    except _BROKEN as error:
        raise _unreadable(file, error) from error


def _mapped(file: Path) -> Leaf:
    """An .npy, which is opened when it is read: a process may not map a hundred thousand files."""

    def opened() -> NDArray:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            array.close()
            raise zipfile.BadZipFile("it is an .npz by another name")
        return array

    first = opened()
    return Leaf(first.shape, first.dtype, lambda index: opened()[index])


def _unreadable(file: Path, error: Exception) -> StoreError:
    fix = "Save it without pickled objects." if "ickle" in str(error) or "Python objects" in str(error) else None
    return StoreError(f"{file} cannot be read: {error or type(error).__name__}", fix=fix)


def _refuse_stores(source: Path) -> None:
    if not (source / HEADER).is_file():
        return
    if (source / SHARDS).is_dir():
        raise ConfigError(f"{source} is a feature store already")
    table = source / ("manifest.csv" if (source / "manifest.csv").exists() else "manifest.parquet")
    raise ConfigError(
        f"{source} is an export of coldframe, with a folder a feature",
        fix=f"Import one: {source}/embedding --manifest {table}; or export to .h5, which imports exactly.",
    )
