"""Exports: what other programs find in them, and targets that appear whole or not at all."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.data_manifests.records import Manifest
from coldframe.extract.arrays import StoreError
from coldframe.extract.exchange import export_store
from coldframe.extract.shards import committed
from coldframe.extract.specs import SpecMismatch
from coldframe.extract.store import FeatureStore

IDS = ["clap/a.mp4", "clap/b.c.mp4", "wave/a.mp4", "wave/é b.mp4", "x"]


def test_npy_files(toy, tmp_path: Path) -> None:
    store = toy.write(IDS, ["embedding", "tokens.1"], dtype="bfloat16", failed={"x": "timed out"})
    export_store(store, tmp_path / "d", quiet=True)
    array = np.load(tmp_path / "d" / "tokens.1" / "clap/b.c.mp4.npy", allow_pickle=False)
    np.testing.assert_array_equal(array, toy.numbers("clap/b.c.mp4", "tokens.1"))
    assert array.dtype == np.float32
    times = np.load(tmp_path / "d" / "timestamps_s" / "wave/é b.mp4.npy", allow_pickle=False)
    np.testing.assert_array_equal(times, np.arange(3) / 25)
    facts = json.loads((tmp_path / "d" / "store.json").read_text())
    assert (facts["fingerprint"], facts["features"]) == (store.fingerprint, ["embedding", "tokens.1"])
    assert (facts["videos"]["x"]["reason"], facts["videos"]["clap/a.mp4"]["n_frames"]) == ("timed out", 3)
    assert (facts["videos"]["x"]["n_views"], facts["videos"]["clap/a.mp4"]["n_views"]) == (0, 1)
    manifest = Manifest.read(tmp_path / "d" / "manifest.csv")
    assert manifest.fingerprint == store.manifest.fingerprint


def test_float16_stays_float16_and_a_split_gets_a_parquet(toy, tmp_path: Path) -> None:
    store = toy.write(IDS[:3], ["embedding"])
    export_store(store, tmp_path / "d", split="test", quiet=True)
    (only,) = store.manifest.split("test").ids
    assert np.load(tmp_path / "d" / "embedding" / f"{only}.npy").dtype == np.float16
    assert Manifest.read(tmp_path / "d" / "manifest.parquet").class_names == ("wave", "clap")
    assert not list((tmp_path / "d").glob("manifest.c*"))


def test_files_of_two_videos_in_one_place_are_refused(toy, tmp_path: Path) -> None:
    store = toy.write(["a", "a.npy/b"], ["embedding"])
    with pytest.raises(ConfigError, match="would lie where another"):
        export_store(store, tmp_path / "d", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_webdataset(toy, tmp_path: Path) -> None:
    store = toy.write(IDS, ["embedding", "tokens.1"])
    export_store(store, tmp_path / "f.tar", quiet=True)
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tmp_path / "f.tar") as tar:
        for member in tar:
            if member.name == "__store__":
                facts = json.load(tar.extractfile(member))
                continue
            key, extension = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", member.name).groups()
            assert not samples or key == next(reversed(samples)) or key not in samples  # a sample's files lie together
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    assert (facts["fingerprint"], facts["class_names"]) == (store.fingerprint, ["wave", "clap"])
    assert list(samples) == ["clap/a%2Emp4", "clap/b%2Ec%2Emp4", "wave/a%2Emp4", "wave/é b%2Emp4", "x"]
    clip = samples["clap/b%2Ec%2Emp4"]
    assert sorted(clip) == ["embedding.npy", "json", "timestamps_s.npy", "tokens.1.npy"]
    array = np.load(io.BytesIO(clip["tokens.1.npy"]), allow_pickle=False)
    np.testing.assert_array_equal(array, store.read("tokens.1", "clap/b.c.mp4"))
    told = json.loads(clip["json"])
    assert (told["video_id"], told["class_name"], told["label"], told["n_frames"]) == ("clap/b.c.mp4", "clap", 1, 3)


def test_one_store_makes_one_tar(toy, tmp_path: Path) -> None:
    store = toy.write(IDS, ["embedding"])
    for name in ("one.tar", "two.tar"):
        export_store(store, tmp_path / name, quiet=True)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


@pytest.mark.parametrize("name", ["f.h5", "f.tar", "f"])
def test_a_target_is_replaced_only_when_asked_and_whole(toy, tmp_path: Path, name: str, monkeypatch) -> None:
    store = toy.write(IDS, ["embedding"])
    to = tmp_path / "deep" / name
    export_store(store, to, quiet=True)
    with pytest.raises(ConfigError, match="--overwrite"):
        export_store(store, to, quiet=True)
    before = sorted(path.name for path in to.parent.rglob("*"))
    monkeypatch.setattr(FeatureStore, "stored", lambda *_: (_ for _ in ()).throw(StoreError("torn")))
    with pytest.raises(StoreError, match="torn"):
        export_store(store, to, overwrite=True, quiet=True)
    monkeypatch.undo()
    assert sorted(path.name for path in to.parent.rglob("*")) == before
    export_store(store, to, overwrite=True, split="train", quiet=True)
    assert [path.name for path in to.parent.iterdir()] == [name]
    after = sorted(path.name for path in to.parent.rglob("*"))
    assert (after != before) == (name == "f")


def test_folders_that_no_export_wrote_are_safe(toy, tmp_path: Path) -> None:
    store = toy.write(IDS, ["embedding"])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("1")
    for to, words in (
        (tmp_path / "thesis", "no export wrote"),
        (toy.path, "in its store"),
        (toy.path / "out.h5", "in its store"),
        (tmp_path, "in its store"),
        (tmp_path / "thesis" / "chapter.txt", "a file or a folder"),
        (tmp_path / "f.zip", "FILE.h5"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_store(store, to, overwrite=True, quiet=True)
    other = type(toy)(tmp_path / "other")
    other.write(IDS, ["embedding"])
    with pytest.raises(ConfigError, match="no export wrote"):
        export_store(store, other.path, overwrite=True, quiet=True)
    assert FeatureStore.open(other.path).ids


def test_what_a_store_lacks_is_refused(toy, tmp_path: Path) -> None:
    store = toy.write(IDS[:2], ["embedding"], failed={IDS[1]: "gone"})
    with pytest.raises(SpecMismatch, match=r"tokens\.2"):
        export_store(store, tmp_path / "f.h5", features=["tokens.-1"], quiet=True)
    with pytest.raises(UnknownName, match="split"):
        export_store(store, tmp_path / "f.h5", split="tset", quiet=True)
    with pytest.raises(ConfigError, match="no video of the split val"):
        export_store(store, tmp_path / "f.h5", split="val", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_damage_does_not_travel(toy, tmp_path: Path) -> None:
    store = toy.write(IDS, ["embedding"])
    (shard,) = committed(toy.path / "shards")
    file = next((shard / "features.zarr" / "embedding").glob("c.*"))
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    for name in ("f.h5", "f.tar", "f"):
        with pytest.raises(StoreError, match=r"embedding of video 'clap/a.mp4' is damaged"):
            export_store(store, tmp_path / name, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_views_and_rounded_tokens_as_readers_of_the_store_get_them(views: FeatureStore, tmp_path: Path) -> None:
    export_store(views, tmp_path / "d", quiet=True)
    export_store(views, tmp_path / "f.tar", quiet=True)
    with tarfile.open(tmp_path / "f.tar") as tar:
        names = [name for name in tar.getnames() if name.startswith("a.")]
        assert json.load(tar.extractfile("a.json"))["n_views"] == 3
    assert names[:2] == ["a.embedding.npy", "a.tokens.2.npy"]
    assert len(names) == 3 * 3 + 1
    for view, suffix in enumerate(("", "@1", "@2")):
        for name in ("embedding", "tokens.2"):
            array = np.load(tmp_path / "d" / f"{name}{suffix}" / "b.npy")
            assert array.dtype == np.float16
            np.testing.assert_array_equal(array, views.read(name, "b", view))
    assert not (tmp_path / "d" / "scale.2").exists()
