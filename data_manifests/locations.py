"""Where files lie: in this machine's folders, or behind a URL that fsspec knows. Its only user, and that of upath.

A place is a `pathlib.Path`, or the path that universal_pathlib makes of a URL, which has the same methods; what those
methods lack, or do one request after another, is here. Both libraries are imported when the first URL is met.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from errno import ENOENT
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .errors import ColdframeError, ConfigError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_FRESH: dict[str, Any] = {
    "use_listings_cache": False
}  # other machines write too: what was listed a minute ago is no news
_EXTRAS = {"s3": "pip install 'coldframe[s3]'", "gs": "pip install gcsfs", "gcs": "pip install gcsfs"}
_AT_ONCE = 32  # requests of a few hundred bytes: each of them mostly waits
_JOINED_BYTES, _WINDOW_BYTES = 16 << 20, 256 << 20  # of one request; of all that are under way
_SCRATCH = "coldframe-scratch"
_DENIED = re.compile("credential|unauthorized|forbidden|accessdenied", re.IGNORECASE)  # in the names of exceptions
_GONE_WRONG_FOR_GOOD = {errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENAMETOOLONG}

Item = TypeVar("Item")
Found = TypeVar("Found")


class LocationError(ColdframeError, OSError):
    """A URL that cannot be read or written; the text is `category: URL (detail)`."""


class MissingError(LocationError, FileNotFoundError):
    """There is nothing behind a URL."""

    errno = ENOENT


class TransientError(LocationError):
    """A network, a server or a full disk is at fault: the same request may succeed later."""


def is_url(path: str) -> bool:
    """Whether a path is a URL, such as s3://bucket/video.mp4."""
    return "://" in path and _URL.match(path) is not None


def without_file_scheme(path: str) -> str:
    """A path without the file:// before it, which says nothing; any other is given back."""
    return path.removeprefix("file://").removeprefix("local://")


def is_out_of_reach(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, tells nothing of a file, since what is behind its URL could not be seen."""
    while error is not None and not isinstance(error, LocationError):
        error = error.__cause__
    return error is not None and not isinstance(error, MissingError)


def refuse_url(place: Path | str, what: str) -> None:
    """Raise ConfigError where a place is behind a URL, for `what` only works on this machine's disks."""
    if is_url(str(place)):
        raise ConfigError(f"{what} needs a folder of this machine", seen=place, fix="Copy it to a local disk first.")


def location(place: Path | str) -> Path:
    """The path of a place: pathlib's where it is local, file:// included; for a URL one that behaves alike.

    Raises:
        ConfigError: the URL is of a kind that is unknown, or whose library is not installed.
    """
    text = without_file_scheme(str(place))
    if not is_url(text):
        return Path(text)
    if not isinstance(place, str):
        return place
    _file_system(text)  # refuses it, if it must be refused, in one line
    from upath import UPath

    return cast(Path, UPath(text, **_FRESH))


def is_local(place: Path) -> bool:
    """Whether a place is a folder or file of this machine."""
    return not is_url(str(place))


def refuse_unreachable(places: Iterable[str], n_workers: int) -> None:
    """Raise ConfigError where URLs are of a kind that this installation, or that another process, cannot read."""
    for scheme in {place.partition("://")[0] for place in places if is_url(place)}:
        _file_system(f"{scheme}://")
        if scheme == "memory" and n_workers:
            raise ConfigError("decode processes do not see what is in memory://", fix="Decode with workers=0.")


@contextmanager
def reached(place: Path | str) -> Iterator[None]:
    """Turn whatever fails on the way to a URL into a LocationError; errors of local files stay as they are."""
    try:
        yield
    except ColdframeError:
        raise
    except Exception as error:
        # An OSError, or an exception of the library that speaks to the server; Python's others are bugs of ours.
        if not is_url(str(place)) or not (isinstance(error, OSError) or type(error).__module__ != "builtins"):
            raise
        raise _as_location_error(place, error) from error


def read_bytes(place: Path, start: int = 0) -> bytes:
    """The bytes of a file from `start` on; raises FileNotFoundError, of our kind for a URL."""
    if is_local(place) and not start:
        return place.read_bytes()
    if is_local(place):
        with place.open("rb") as file:
            file.seek(start)
            return file.read()
    with reached(place):
        system, path = _file_system(str(place))
        return cast(bytes, system.cat_file(path, start=start or None))


def file_size(place: Path) -> int:
    """Bytes of a file; raises FileNotFoundError, of our kind for a URL."""
    if is_local(place):
        return place.stat().st_size
    with reached(place):
        system, path = _file_system(str(place))
        return system.info(path)["size"]


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    if is_local(folder):
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    with reached(folder):
        system, path = _file_system(str(folder))
        return sum(facts["size"] for facts in cast(dict[str, Any], system.find(path, detail=True)).values())


def changed_at(place: Path) -> datetime:
    """When a file was written."""
    if is_local(place):
        return datetime.fromtimestamp(place.stat().st_mtime, UTC)
    with reached(place):
        system, path = _file_system(str(place))
        return system.modified(path)


def names_in(folder: Path) -> set[str]:
    """What lies directly in a folder; nothing where there is no folder."""
    try:
        if is_local(folder):
            return {path.name for path in folder.iterdir()}
        with reached(folder):
            system, path = _file_system(str(folder))
            return {PurePosixPath(name).name for name in system.ls(path, detail=False)}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def read_ranges(ranges: Sequence[tuple[str, int, memoryview]]) -> None:
    """Fill each memory with the bytes of a URL from an offset on, many requests at once.

    Ranges that follow each other, in the list and in the file, are one request.

    Raises:
        LocationError: something is missing, too short, or cannot be reached.
    """
    joined: list[tuple[str, int, int, list[memoryview]]] = []  # URL, start, stop, the memories that lie end to end
    for url, start, target in ranges:
        last = joined[-1] if joined else None
        if last and last[:1] == (url,) and last[2] == start and start + len(target) - last[1] <= _JOINED_BYTES:
            joined[-1] = (url, last[1], start + len(target), [*last[3], target])
        else:
            joined.append((url, start, start + len(target), [target]))
    for window in _windows(joined):
        with reached(window[0][0]):
            system, _ = _file_system(window[0][0])
            paths = [_file_system(url)[1] for url, *_ in window]
            starts, stops = [start for _, start, _, _ in window], [stop for _, _, stop, _ in window]
            answers = system.cat_ranges(paths, starts, stops, on_error="return")
        for (url, start, stop, targets), answer in zip(window, answers, strict=True):
            with reached(url):
                if isinstance(answer, BaseException):
                    raise answer
            if len(answer) != stop - start:
                raise LocationError(f"file ends too soon: {url}", seen=f"{start + len(answer)} bytes", wanted=stop)
            at = 0
            for target in targets:
                target[:] = answer[at : at + len(target)]
                at += len(target)


def list_files(folder: Path) -> list[str]:
    """Everything below a URL, as paths relative to it, in one listing; nothing where there is nothing."""
    with reached(folder):
        system, top = _file_system(str(folder))
        top = top.rstrip("/") + "/"
        return sorted(path.removeprefix(top) for path in system.find(top) if path.startswith(top) and path != top)


def exist(urls: Sequence[str]) -> dict[str, bool]:
    """Whether there is a file behind each URL; raises LocationError where that cannot be known."""

    def is_there(url: str) -> bool:
        try:
            with reached(url):  # `isfile` would take a failing network for a missing file
                system, path = _file_system(url)
                return system.info(path)["type"] == "file"
        except MissingError:
            return False

    return dict(zip(urls, all_at_once(is_there, urls), strict=True))


def all_at_once(function: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """Call a function that waits for a network with each item, many at a time."""
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="requests") as pool:
        return list(pool.map(function, items))


@contextmanager
def fetched(place: Path | str) -> Iterator[Path]:
    """A local file with the bytes of a place: the file itself, or a temporary copy of what is behind a URL.

    Raises:
        LocationError: it is missing, may not be read, cannot be reached, or is larger than the free disk.
    """
    if not is_url(str(place)):
        yield Path(place)
        return
    url = str(place)
    # Containers are known by their content, but the ending is a hint that a decoder may use.
    number, name = tempfile.mkstemp(suffix=PurePosixPath(url).suffix[:16])
    os.close(number)
    copy = Path(name)
    try:
        with reached(url):
            system, path = _file_system(url)
            info = system.info(path)
            if info["type"] != "file":
                raise IsADirectoryError(errno.EISDIR, "a folder")
            n_bytes = info.get("size")  # some web servers do not tell
            if n_bytes is not None and n_bytes > shutil.disk_usage(copy.parent).free:
                raise OSError(errno.ENOSPC, f"{n_bytes:,} bytes do not fit into {copy.parent}")
            system.get_file(path, name)
            if n_bytes is not None and copy.stat().st_size != n_bytes:
                raise ConnectionError(f"{copy.stat().st_size:,} of {n_bytes:,} bytes arrived")
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def write_bytes(to: Path, content: bytes) -> None:
    """Write an object behind a URL; readers see the old one or the new one."""
    with reached(to):
        system, path = _file_system(str(to))
        system.pipe_file(path, content)


def create(to: Path) -> None:
    """Make an empty object behind a URL; raises FileExistsError where there is one: of several callers one makes it."""
    with reached(to):
        system, path = _file_system(str(to))
        try:
            system.pipe_file(path, b"", mode="create")
        except FileExistsError:
            exists = True
        else:
            exists = False
    if exists:
        raise FileExistsError(f"{to} exists")


def remove(place: Path) -> None:
    """Delete what is behind a URL."""
    with reached(place):
        system, path = _file_system(str(place))
        system.rm_file(path)


def upload(file: Path, to: Path) -> None:
    """Copy a local file to a URL; readers see the old object or the new one."""
    with reached(to):
        system, path = _file_system(str(to))
        system.put_file(str(file), path)


def upload_folder(folder: Path, to: Path, last: str) -> None:
    """Copy a local folder to a URL, the file named `last` when all others have arrived."""
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    all_at_once(lambda name: upload(folder / name, to / name), [name for name in files if name != last])
    upload(folder / last, to / last)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder that is gone after the block; what killed processes of this machine left goes as well."""
    ours = f"{_SCRATCH}-{socket.gethostname()}-"
    for left in Path(tempfile.gettempdir()).glob(f"{ours}*"):
        pid = left.name.removeprefix(ours).partition("-")[0]
        if pid.isdecimal() and not is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)  # that of another user stays
    with tempfile.TemporaryDirectory(prefix=f"{ours}{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
    return True


def _file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, the same for all of a kind in a process, and the path in it."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        system = fsspec.filesystem(scheme, **_FRESH)
    except ImportError as error:
        fix = f"Install it: {_EXTRAS[scheme]}" if scheme in _EXTRAS else f"{error}."
        raise ConfigError(f"{scheme}:// needs a library that is not installed", fix=fix) from None
    except ValueError as error:
        wanted = "a path, s3://, gs:// or another that fsspec knows"
        raise ConfigError(f"{scheme}:// cannot be opened: {error}", wanted=wanted) from None
    return system, cast(str, system._strip_protocol(url))


def _windows(joined: Sequence[tuple[str, int, int, Any]]) -> Iterator[Sequence[tuple[str, int, int, Any]]]:
    """Requests of one file system, in lists whose bytes may lie in memory at once."""
    begin, n_bytes = 0, 0
    for number, (url, start, stop, _) in enumerate(joined):
        is_elsewhere = url.partition("://")[0] != joined[begin][0].partition("://")[0]
        if number > begin and (n_bytes + stop - start > _WINDOW_BYTES or is_elsewhere):
            yield joined[begin:number]
            begin, n_bytes = number, 0
        n_bytes += stop - start
    if joined:
        yield joined[begin:]


def _as_location_error(place: Path | str, error: Exception) -> LocationError:
    """The kind of an error, of whichever library, in one line."""
    detail = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    if isinstance(error, FileNotFoundError):
        return MissingError(f"file is missing: {place}")
    if isinstance(error, PermissionError) or _DENIED.search(type(error).__name__):
        return LocationError(f"no permission: {place} ({detail})")
    if isinstance(error, (IsADirectoryError, NotADirectoryError)):
        return LocationError(f"not a regular file: {place}")
    if isinstance(error, OSError) and error.errno in _GONE_WRONG_FOR_GOOD:
        return LocationError(f"request refused: {place} ({detail})")
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return TransientError(f"{'disk full' if is_full else 'network failure'}: {place} ({detail})")
