"""Export and import: nothing is lost on the way, and a target appears whole or not at all."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from coldframe.cli import main
from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.data_manifests.records import Manifest
from coldframe.extract.arrays import StoreError
from coldframe.extract.exchange import Reading, export_store, import_features, imports
from coldframe.extract.shards import committed
from coldframe.extract.specs import SpecMismatch
from coldframe.extract.store import FeatureStore

IDS = ["clap/a.mp4", "clap/b.c.mp4", "wave/a.mp4", "wave/é b.mp4", "x"]
NAMES = ["embedding", "cls.2", "tokens.1", "pixels"]


def same(one: FeatureStore, other: FeatureStore) -> None:
    """Bytes, timestamps, rows, manifest, specs."""
    assert one.ids == other.ids
    assert one.features == other.features
    assert (one.spec, one.shape, one.fingerprint) == (other.spec, other.shape, other.fingerprint)
    assert one.manifest == other.manifest
    assert one.rows == other.rows  # with the checksums of all bytes
    for video_id in one.ids:
        for name in (*one.features, "timestamps_s"):
            a, b = one.read(name, video_id), other.read(name, video_id)
            assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())
    assert other.bad_videos() == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_hdf5_there_and_back_is_the_same_store(toy, tmp_path: Path, dtype: str) -> None:
    toy.write(IDS, NAMES, lengths={"clap/a.mp4": 2, "x": 1}, failed={"wave/a.mp4": "timed out"}, dtype=dtype)
    store = toy.write(IDS, NAMES, failed={"wave/a.mp4": "timed out again"}, retry=True, dtype=dtype)
    assert store.failures[0].attempts == 2
    report = export_store(store, tmp_path / "f.h5", quiet=True)
    assert (report.n_videos, report.n_failed, report.features) == (4, 1, store.features)
    report = import_features(tmp_path / "f.h5", tmp_path / "back", quiet=True)
    assert (report.n_videos, report.n_failed, report.n_present) == (4, 1, 0)
    same(store, FeatureStore.open(tmp_path / "back"))


def test_a_manifest_with_everything_comes_back(toy, tmp_path: Path) -> None:
    store = toy.write(IDS, ["embedding"])
    records = [
        dataclasses.replace(r, group="g", captions=("one|two", "three"), start_s=0.1, end_s=2.5, split="val")
        for r in store.manifest.records
    ]
    records[0] = dataclasses.replace(records[0], label=None, start_s=None, end_s=None, captions=(), group="", split="")
    full = dataclasses.replace(store.manifest, records=tuple(reversed(records)), class_names=("wave", "clap", "absent"))
    export_store(store, tmp_path / "plain.h5", quiet=True)
    with pytest.raises(StoreError, match="at other times"):
        import_features(tmp_path / "plain.h5", toy.path, manifest=full, quiet=True)
    import_features(tmp_path / "plain.h5", tmp_path / "labelled", manifest=full, quiet=True)
    labelled = FeatureStore.open(tmp_path / "labelled")
    assert labelled.manifest == full
    export_store(labelled, tmp_path / "labelled.h5", quiet=True)
    import_features(tmp_path / "labelled.h5", tmp_path / "back", quiet=True)
    same(labelled, FeatureStore.open(tmp_path / "back"))


def test_videos_that_were_never_extracted_stay_to_be_done(toy, tmp_path: Path) -> None:
    with toy.open(IDS, ["embedding"]) as writer:
        shard = writer.begin_shard(IDS[:2])
        for video_id in IDS[:2]:
            shard.add(video_id, {"embedding": toy.numbers(video_id, "embedding")}, toy.info())
        shard.commit()
    store = FeatureStore.open(toy.path)
    export_store(store, tmp_path / "f.h5", quiet=True)
    import_features(tmp_path / "f.h5", tmp_path / "back", quiet=True)
    same(store, FeatureStore.open(tmp_path / "back"))


def test_an_import_goes_on_where_it_was_interrupted(toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = toy.write(IDS, ["embedding"])
    export_store(store, tmp_path / "f.h5", quiet=True)
    monkeypatch.setattr("coldframe.extract.writer._SHARD_VIDEOS", 2)
    real, seen = imports._hand_over, []

    def stop_at_the_fourth(shard, parcel, row) -> None:
        seen.append(row.video_id)
        if len(seen) == 4:
            raise KeyboardInterrupt
        real(shard, parcel, row)

    monkeypatch.setattr(imports, "_hand_over", stop_at_the_fourth)
    assert import_features(tmp_path / "f.h5", tmp_path / "back", quiet=True).interrupted
    assert FeatureStore.open(tmp_path / "back").ids == tuple(IDS[:2])
    monkeypatch.setattr(imports, "_hand_over", real)
    report = import_features(tmp_path / "f.h5", tmp_path / "back", quiet=True)
    assert (report.n_present, report.interrupted) == (2, False)
    same(store, FeatureStore.open(tmp_path / "back"))
    n_shards = len(committed(tmp_path / "back" / "shards"))
    assert import_features(tmp_path / "f.h5", tmp_path / "back", quiet=True).n_present == 5
    assert len(committed(tmp_path / "back" / "shards")) == n_shards


def test_a_part_of_a_store(toy, tmp_path: Path) -> None:
    store = toy.write(IDS, ["embedding", "cls.2"])
    report = export_store(store, tmp_path / "f.h5", features=["cls.-1"], split="train", quiet=True)
    train = store.manifest.split("train")
    assert (report.features, report.n_videos) == (("cls.2",), len(train.ids))
    import_features(tmp_path / "f.h5", tmp_path / "back", quiet=True)
    back = FeatureStore.open(tmp_path / "back")
    assert (back.features, set(back.ids), back.manifest) == (("cls.2",), set(train.ids), train)


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
    monkeypatch.setattr(FeatureStore, "read", lambda *_: (_ for _ in ()).throw(StoreError("torn")))
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
    with pytest.raises(StoreError, match=r"embedding of video 'clap/a.mp4' is damaged"):
        export_store(store, tmp_path / "f.h5", quiet=True)


def test_options_that_an_export_of_ours_knows_better_are_refused(toy, tmp_path: Path) -> None:
    export_store(toy.write(IDS, ["embedding"]), tmp_path / "f.h5", quiet=True)
    with pytest.raises(ConfigError, match="knows what it holds"):
        import_features(tmp_path / "f.h5", tmp_path / "back", reading=Reading(feature="cls.1"), quiet=True)
    with pytest.raises(ConfigError, match="not in the manifest"):
        import_features(tmp_path / "f.h5", tmp_path / "back", manifest=toy.manifest(IDS[:2]), quiet=True)


def test_labels_of_a_store_are_not_lost_to_those_of_a_file(toy, tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", x=np.ones((2, 3, 4), np.float16), ids=IDS[:2])
    given = toy.manifest(IDS[:2])
    import_features(tmp_path / "f.npz", tmp_path / "s", manifest=given, quiet=True)
    with pytest.raises(ConfigError, match=r"to keep its own: --manifest .*manifest\.parquet"):
        import_features(tmp_path / "f.npz", tmp_path / "s", quiet=True)
    assert FeatureStore.open(tmp_path / "s").manifest == given


def test_features_of_one_file_come_together(tmp_path: Path) -> None:
    arrays = {"e": np.ones((2, 3, 4), np.float32), "c": np.ones((2, 3, 6), np.float32)}
    np.savez(tmp_path / "f.npz", **arrays, t=np.ones((2, 3, 5, 6), np.float32), ids=["a", "b"])
    for feature, dataset in (("embedding", "e"), ("cls.11", "c"), ("tokens.12", "t")):
        import_features(tmp_path / "f.npz", tmp_path / "s", reading=Reading(feature, dataset), quiet=True)
    store = FeatureStore.open(tmp_path / "s")
    assert store.features == ("cls.11", "embedding", "tokens.12")
    shape = store.shape
    assert (shape.layers, shape.width, shape.embed_dim, shape.grid) == (12, 6, 4, (2, 2))
    with pytest.raises(SpecMismatch, match="another width"):
        import_features(tmp_path / "f.npz", tmp_path / "s", reading=Reading("cls.3", "e"), quiet=True)


def test_the_declared_tower_has_its_texts(tmp_path: Path) -> None:
    from coldframe.extract.text import encode_classes
    from coldframe.extract.towers import load_tower

    tower = load_tower("coldframe-tiny", device="cpu")
    width = tower.shape.embed_dim
    np.savez(tmp_path / "f.npz", x=np.ones((2, 3, width), np.float32), ids=["a", "b"], y=["wave", "clap"])
    reading = Reading(model="coldframe-tiny")
    import_features(tmp_path / "f.npz", tmp_path / "s", reading=reading, quiet=True)
    store = FeatureStore.open(tmp_path / "s")
    assert (store.spec.tower, store.shape) == (tower.spec, tower.shape)
    texts = encode_classes(tower, store.manifest.class_names)
    logits = torch.from_numpy(store.read("embedding", "a")) @ texts.embedding.flatten(1)[:, :width].T
    assert logits.shape == (3, 2)
    np.savez(tmp_path / "g.npz", x=np.ones((2, 3, width + 1), np.float32), ids=["a", "b"])
    with pytest.raises(ConfigError, match="not embedding of coldframe-tiny"):
        import_features(tmp_path / "g.npz", tmp_path / "s2", reading=reading, quiet=True)


def test_real_features(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "features" / "thetis_inceptionv3_16x512.npz"
    report = import_features(source, tmp_path / "s", reading=Reading(group="player"), quiet=True)
    assert report.n_videos == 1980
    store = FeatureStore.open(tmp_path / "s")
    with np.load(source) as given:
        for i in (0, 1000, 1979):
            name = str(given["name"][i])
            np.testing.assert_array_equal(store.read("embedding", name), given["x"][i])
            record = store.manifest.by_id[name]
            assert store.manifest.class_names[record.label] == given["classes"][given["y"][i]]
            assert record.group == str(given["player"][i])
    assert {row.decoder for row in store.rows} == {"imported"}
    assert (store.spec.tower.model, len(store.spec.tower.weights_sha256)) == ("imported", 64)


def test_nothing_to_import(tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("hello")
    for source in (tmp_path / "f.txt", tmp_path / "absent.h5"):
        with pytest.raises(ConfigError, match="no features to import"):
            import_features(source, tmp_path / "s", quiet=True)


def test_a_stores_and_an_exports_folder_are_named_for_what_they_are(toy, tmp_path: Path) -> None:
    store = toy.write(IDS, ["embedding"])
    export_store(store, tmp_path / "d", quiet=True)
    with pytest.raises(ConfigError, match="already"):
        import_features(toy.path, tmp_path / "s", quiet=True)
    with pytest.raises(ConfigError, match=r"manifest\.csv"):
        import_features(tmp_path / "d", tmp_path / "s", quiet=True)
    given = Manifest.read(tmp_path / "d" / "manifest.csv")
    import_features(tmp_path / "d" / "embedding", tmp_path / "s", manifest=given, quiet=True)
    back = FeatureStore.open(tmp_path / "s")
    assert back.ids == store.ids
    np.testing.assert_array_equal(back.read("embedding", IDS[1]), store.read("embedding", IDS[1]))


def test_a_foreign_hdf5(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        for i, video_id in enumerate(["wave/a", "wave/b", "clap/c"]):
            file[video_id] = np.full((i + 1, 4), i, np.float32)
    import_features(tmp_path / "f.h5", tmp_path / "s", quiet=True)
    store = FeatureStore.open(tmp_path / "s")
    assert store.lengths(["wave/a", "wave/b", "clap/c"]).tolist() == [1, 2, 3]
    assert [store.manifest.class_names[r.label] for r in store.manifest.records] == ["clap", "wave", "wave"]
    assert store.spec.frames.n_frames == 3


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a command in an empty folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in arguments])
        return int(left.value.code or 0), *capsys.readouterr()

    return call


def test_the_commands(toy, run, tmp_path: Path) -> None:
    store = toy.write(IDS, ["embedding", "cls.2"])
    code, out, err = run("export", toy.path, "--to", "f.h5", "--features", "cls.-1", "--split", "train", "--json", "-q")
    assert (code, json.loads(out)["features"], err) == (0, ["cls.2"], "")
    code, out, _ = run("import", "f.h5", "--store", "back")
    assert (code, "back: cls.2 of" in out) == (0, True)
    assert set(FeatureStore.open(tmp_path / "back").ids) == set(store.manifest.split("train").ids)
    np.savez(tmp_path / "f.npz", f=np.ones((2, 3, 4), np.float32), n=[1, 2], a=["x", "y"], c=["x", "y", "z"], p=[0, 0])
    options = "--as cls.12 --dataset f --ids n --labels a --classes c --group p --dtype float16 --json -q"
    code, out, err = run("import", "f.npz", "--store", "s", *options.split())
    assert (code, json.loads(out)["n_videos"], err) == (0, 2, "")
    stored = FeatureStore.open(tmp_path / "s")
    assert (stored.features, stored.spec.dtype, stored.manifest.class_names) == (
        ("cls.12",),
        "float16",
        ("x", "y", "z"),
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("export absent --to f.h5", "absent is not a feature store"),
        ("export store --to store --overwrite", "cannot lie in its store"),
        ("export store --to f.npz", "expected FILE.h5, FILE.tar"),
        ("export store --to f.h5 --features tokns.1", "no feature is named"),
        ("export store --to f.h5 --split dev", "no split is named 'dev'"),
        ("import absent --store s", "found nothing at absent"),
        ("import store --store s", "is a feature store already"),
        ("import bad.h5 --store s", "bad.h5 cannot be read as HDF5"),
        ("import bad.npz --store s", "bad.npz cannot be read"),
        ("import nan.npz --store s", "'a' has numbers that are not finite"),
        ("import nan.npz --store s --model absent-tower", "no model is named"),
        ("import nan.npz --store s --manifest absent.csv", "no such folder or manifest"),
        ("import nan.npz --store s --pretrained openai", "Add --model NAME"),
        ("import nan.npz --store folder", "folder is neither a feature store nor empty"),
    ],
)
def test_a_mistake_is_one_line(toy, run, tmp_path: Path, line: str, words: str) -> None:
    toy.write(IDS, ["embedding"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("1")
    (tmp_path / "bad.h5").write_bytes(b"\x89HDF\r\n\x1a\nand no more")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and no more")
    np.savez(tmp_path / "nan.npz", x=np.full((2, 3, 4), np.nan), ids=["a", "b"])
    code, _, err = run(*line.split(), "-q")
    (only,) = [text for text in err.splitlines() if text.strip()]
    assert code == 2
    assert only.startswith("error: ")
    assert words in only
