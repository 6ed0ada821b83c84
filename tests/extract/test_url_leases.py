"""What leases need of the place where they lie, behind a URL."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from coldframe.data_manifests.locations import location
from coldframe.extract.url_leases import UrlFolder


@pytest.fixture(params=["s3", "memory"])
def folder(request: pytest.FixtureRequest) -> UrlFolder:
    fsspec.filesystem("memory").store.clear()
    root = request.getfixturevalue("bucket") if request.param == "s3" else "memory://bucket"
    return UrlFolder(location(root) / "store/leases")


def test_objects_are_made_once_written_and_removed(folder: UrlFolder) -> None:
    assert folder.names() == []
    folder.create("part-0")
    with pytest.raises(FileExistsError):
        folder.create("part-0")
    assert folder.read("part-0") == b""
    folder.write("part-0", b"who")
    folder.touch("part-0")
    assert (folder.names(), folder.read("part-0")) == (["part-0"], b"who")
    assert folder.is_locked("part-0") is None
    assert -1 <= folder.age_s("part-0") < 30
    assert folder.names() == ["part-0"]
    folder.remove("part-0")
    assert folder.names() == []


def test_what_is_gone_is_told_and_not_made(folder: UrlFolder) -> None:
    asks: list[Callable[[], object]] = [
        lambda: folder.read("gone"),
        lambda: folder.write("gone", b"who"),
        lambda: folder.touch("gone"),
        lambda: folder.age_s("gone"),
        lambda: folder.remove("gone"),
    ]
    for ask in asks:
        with pytest.raises(OSError, match="file is missing") as error:
            ask()
        assert error.value.errno == errno.ENOENT
    assert folder.names() == []


def test_of_several_callers_one_makes_an_object(bucket: str) -> None:
    folder = UrlFolder(location(bucket) / "leases")

    def made(_: int) -> bool:
        try:
            folder.create("gate-0")
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(made, range(24))) == 1
