"""Places behind URLs: an S3 on this machine, memory, and what goes wrong on the way there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import pytest

from coldframe.data_manifests import ConfigError, Manifest, ManifestError, VideoRecord, from_folder
from coldframe.data_manifests import locations as places
from coldframe.data_manifests.locations import (
    LocationError,
    MissingError,
    TransientError,
    exist,
    fetched,
    is_local,
    is_out_of_reach,
    list_files,
    location,
    names_in,
    read_bytes,
    read_ranges,
    refuse_unreachable,
    scratch_folder,
    upload_folder,
)


@pytest.fixture(params=["s3", "memory"])
def root(request: pytest.FixtureRequest) -> str:
    """An empty folder of each kind."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/some folder"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]
    return "memory://some folder"


def put(root: str, **files: bytes) -> str:
    for name, content in files.items():
        fsspec.filesystem(root.partition("://")[0]).pipe_file(f"{root}/{name}", content)
    return root


def put_files(root: str, *names: str) -> str:
    return put(root, **{name: name.encode() for name in names})


def test_what_is_local_stays_a_path() -> None:
    assert location("/videos/a b.mp4") == location("file:///videos/a b.mp4") == Path("/videos/a b.mp4")
    assert location(Path("store")) == Path("store")
    assert is_local(location("store"))


def test_a_url_keeps_its_slashes_and_its_odd_names(root: str) -> None:
    place = location(root)
    assert not is_local(place)
    assert location(place) == place
    names = ["a#1?.mp4", "50%.mp4", "ü b.mp4"]
    put_files(root, *names)
    assert [str(place / name) for name in names] == [f"{root}/{name}" for name in names]
    assert [read_bytes(place / name) for name in names] == [name.encode() for name in names]
    assert read_bytes(place / names[0], start=2) == b"1?.mp4"
    assert list_files(place) == sorted(names)
    assert names_in(place) == {*names}
    assert names_in(place.parent) == {"some folder"}
    assert names_in(place / "nowhere") == set()


def test_many_ranges_are_read_into_their_places(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {name: os.urandom(1000) for name in "ab"}
    put(root, **content)
    wanted = [("a", 0, 10), ("a", 10, 20), ("a", 30, 500), ("b", 990, 10), ("a", 999, 1), ("b", 0, 1000)]
    for joined, window in ((1 << 20, 1 << 20), (25, 1), (1, 600)):
        monkeypatch.setattr(places, "_JOINED_BYTES", joined)
        monkeypatch.setattr(places, "_WINDOW_BYTES", window)
        targets = [bytearray(n) for _, _, n in wanted]
        read_ranges([(f"{root}/{f}", at, memoryview(t)) for (f, at, _), t in zip(wanted, targets, strict=True)])
        assert [bytes(t) for t in targets] == [content[f][at : at + n] for f, at, n in wanted]
    with pytest.raises(LocationError, match="ends too soon"):
        read_ranges([(f"{root}/a", 990, memoryview(bytearray(20)))])
    with pytest.raises(FileNotFoundError, match=f"file is missing: {root}/c"):
        read_ranges([(f"{root}/c", 0, memoryview(bytearray(1)))])


def test_a_fetched_copy_is_gone_after_its_use(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    put(root, **{"a.mp4": b"frames" * 1000})
    with fetched(f"{root}/a.mp4") as copy:
        assert (copy.read_bytes(), copy.suffix, copy.parent) == (b"frames" * 1000, ".mp4", tmp_path)
    with pytest.raises(ZeroDivisionError), fetched(f"{root}/a.mp4"):
        _ = 1 / 0
    for absent in (f"{root}/b.mp4", root):
        with pytest.raises(LocationError) as error, fetched(absent):
            pass
        assert not isinstance(error.value, TransientError)
    assert not list(tmp_path.iterdir())
    with fetched(file := tmp_path / "here.mp4") as copy:
        assert copy == file


def test_a_copy_that_does_not_fit_is_not_begun(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_files(root, "a.mp4")
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 4}))
    with pytest.raises(TransientError, match=r"disk full.*5 bytes"), fetched(f"{root}/a.mp4"):
        pass


def test_the_last_file_of_a_folder_arrives_last(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("z/deep/c", "last", "a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    upload_folder(tmp_path, location(root) / "shard", "last")
    assert list_files(location(root)) == ["shard/a", "shard/last", "shard/z/deep/c"]
    (tmp_path / "a").chmod(0)
    monkeypatch.setattr(places, "upload", refuse_a(places.upload))
    with pytest.raises(ConnectionError):
        upload_folder(tmp_path, location(root) / "torn", "last")
    assert not any(name.startswith("torn/last") for name in list_files(location(root)))


def refuse_a(upload):  # type: ignore[no-untyped-def]
    def upload_or_fail(file: Path, to: Path) -> None:
        if file.name == "a":
            raise ConnectionError("it broke")
        upload(file, to)

    return upload_or_fail


def test_a_manifest_and_its_videos_behind_a_url(root: str) -> None:
    put_files(root, "run/a.mp4", "run/.hidden.mp4", "sit/b.MP4", "sit/notes.txt", "loose.mp4")
    made = from_folder(root, test_fraction=0.0, val_fraction=0.0)
    assert made.ids == ("loose.mp4", "run/a.mp4", "sit/b.MP4")
    assert (made.name, made.root, made.class_names) == ("some folder", root, ("run", "sit"))
    assert [made.path_of(r) for r in made.records][1] == f"{root}/run/a.mp4"
    assert made.missing_files() == []
    fsspec.filesystem(root.partition("://")[0]).rm(f"{root}/run/a.mp4")
    assert made.missing_files() == ["run/a.mp4"]
    with pytest.raises(ManifestError, match="without a video: talk"):
        from_folder(put_files(root, "talk/notes.txt"))
    with pytest.raises(ManifestError, match="no video below"):
        from_folder(f"{root}/nowhere")

    csv = b"path,label\nrun/a.mp4,run\nsit/b.MP4,sit\n"
    put(root, **{"m.csv": csv, "m.classes.txt": b"sit\r\nrun\r\n"})
    read = Manifest.read(f"{root}/m.csv")
    assert (read.root, read.class_names) == (root, ("sit", "run"))
    with pytest.raises(FileNotFoundError):
        Manifest.read(f"{root}/absent.csv")
    for name in ("copies/m.csv", "copies/m.parquet"):
        read.write(f"{root}/{name}")
        again = Manifest.read(f"{root}/{name}")
        assert (again.root, again.class_names, again.records) == (read.root, read.class_names, read.records)


def test_folders_of_splits_behind_a_url(root: str) -> None:
    made = from_folder(put_files(root, "train/run/a.mp4", "test/run/b.mp4", "test/sit/c.mp4", "train/sit/d.mp4"))
    assert [(r.video_id, r.split) for r in made.records][:2] == [("test/run/b.mp4", "test"), ("test/sit/c.mp4", "test")]
    assert made.class_names == ("run", "sit")


def test_a_root_of_this_machine_may_be_written_as_a_url(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    made = from_folder(f"file://{tmp_path}")
    assert made.root == str(tmp_path)
    assert made.missing_files() == []


def test_no_permission_is_for_good(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_files(bucket, "a.mp4")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for ask in (lambda: exist([f"{bucket}/a.mp4"]), lambda: read_bytes(location(f"{bucket}/a.mp4"))):
        with pytest.raises(LocationError, match=f"no permission: {bucket}/a.mp4 ") as error:
            ask()
        assert not isinstance(error.value, TransientError)


def test_a_missing_bucket_is_missing(bucket: str) -> None:
    with pytest.raises(MissingError, match="file is missing: s3://another-bucket"):
        list_files(location("s3://another-bucket/videos"))


def test_a_network_that_fails_may_come_back(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:  # bound, but it does not listen
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
        with pytest.raises(LocationError, match=f"^network failure: {bucket}/a.mp4 ") as error:
            read_bytes(location(f"{bucket}/a.mp4"))
        assert isinstance(error.value, TransientError)
        assert is_out_of_reach(error.value)
        later = OSError("a reason")
        later.__cause__ = error.value
        assert is_out_of_reach(later)
        made = Manifest("m", bucket, (), (VideoRecord("a.mp4", "a.mp4", None),))
        with pytest.raises(LocationError, match="network failure"):
            made.missing_files()  # not known to be missing
    assert not is_out_of_reach(None)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nope://a/b", "nope:// cannot be opened"),
        ("s3://bucket/a", "pip install 'coldframe[s3]'"),
        ("gs://bucket/a", "pip install gcsfs"),
    ],
)
def test_a_url_without_its_library_says_what_to_install(url: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, library, None)
    for scheme in ("s3", "gs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    for ask in (lambda: location(url), lambda: refuse_unreachable(["a.mp4", url], 2)):
        with pytest.raises(ConfigError) as error:
            ask()
        assert says in str(error.value)
        assert "\n" not in str(error.value)


def test_what_is_in_memory_no_other_process_sees() -> None:
    refuse_unreachable(["memory://a", "/b"], 0)
    with pytest.raises(ConfigError, match="workers=0"):
        refuse_unreachable(["memory://a"], 1)


def test_the_scratch_of_killed_processes_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    code = (
        "import os; from coldframe.data_manifests.locations import scratch_folder as s\n"
        "with s() as f: (f / 'video.mp4').touch(); os.kill(os.getpid(), 9)"
    )
    with scratch_folder() as first:
        subprocess.run([sys.executable, "-c", code], check=False, cwd="/")
        (left,) = set(tmp_path.iterdir()) - {first}
        assert (left / "video.mp4").exists()
        with scratch_folder() as second:
            assert set(tmp_path.iterdir()) == {first, second}
    assert not list(tmp_path.iterdir())
