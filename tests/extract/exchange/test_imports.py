"""Export and import: nothing is lost on the way, and a target appears whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from coldframe.cli import main
from coldframe.data_manifests.errors import ConfigError
from coldframe.data_manifests.records import Manifest
from coldframe.extract.arrays import StoreError
from coldframe.extract.exchange import Reading, export_store, import_features, imports
from coldframe.extract.shards import committed
from coldframe.extract.specs import IMPORTED, FrameSpec, SpecMismatch
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


def test_views_int8_and_pooled_tokens_come_back_bit_for_bit(views: FeatureStore, tmp_path: Path) -> None:
    assert (views.n_views, len(views.rows)) == (3, 8)
    export_store(views, tmp_path / "f.h5", quiet=True)
    report = import_features(tmp_path / "f.h5", tmp_path / "back", quiet=True)
    assert (report.n_videos, report.n_failed, report.n_present) == (2, 2, 0)
    back = FeatureStore.open(tmp_path / "back")
    same(views, back)
    for row in views.rows:
        for array in ("embedding", "tokens.2", "scale.2", "timestamps_s") if row.is_ok else ():
            one, other = (store.stored(array, row.video_id, row.view) for store in (views, back))
            assert (one.dtype, one.tobytes()) == (other.dtype, other.tobytes())
    assert [(row.status, row.attempts, row.reason) for row in back.failures] == [
        ("failed", 1, "no video stream"),
        ("deferred", 2, "no such file"),
    ]
    n_shards = len(committed(tmp_path / "back" / "shards"))
    assert import_features(tmp_path / "f.h5", tmp_path / "back", quiet=True).n_present == 2
    assert len(committed(tmp_path / "back" / "shards")) == n_shards


def test_a_draw_that_the_store_lacks_is_added(views: FeatureStore, tmp_path: Path) -> None:
    third = sorted(committed(views.path / "shards"))[-1]
    export_store(views, tmp_path / "all.h5", quiet=True)
    third.rename(tmp_path / third.name)
    export_store(FeatureStore.open(views.path), tmp_path / "two.h5", quiet=True)
    assert import_features(tmp_path / "two.h5", tmp_path / "back", quiet=True).n_present == 0
    assert FeatureStore.open(tmp_path / "back").n_views == 2
    import_features(tmp_path / "all.h5", tmp_path / "back", quiet=True)
    back = FeatureStore.open(tmp_path / "back")
    assert back.rows == views.rows
    assert back.bad_videos() == {}


def test_what_failed_here_but_not_there_is_imported(toy, tmp_path: Path) -> None:
    export_store(toy.write(IDS, ["embedding"]), tmp_path / "f.h5", quiet=True)
    other = type(toy)(tmp_path / "other")
    other.write(IDS, ["embedding"], failed={"x": "no video stream"})
    assert import_features(tmp_path / "f.h5", other.path, quiet=True).n_present == 4
    assert FeatureStore.open(other.path).rows == FeatureStore.open(toy.path).rows


def test_another_version_of_a_video_does_not_replace_what_is_there(toy, tmp_path: Path) -> None:
    export_store(toy.write(IDS, ["embedding"], seed=1), tmp_path / "f.h5", quiet=True)
    other = type(toy)(tmp_path / "other")
    store = other.write(IDS[:1], ["cls.2"])
    with pytest.raises(ConfigError, match=r"'clap/a\.mp4' is another version .* Import into another store"):
        import_features(tmp_path / "f.h5", other.path, manifest=toy.manifest(IDS), quiet=True)
    assert FeatureStore.open(other.path).rows == store.rows


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
    monkeypatch.setattr("coldframe.extract.writer.SHARD_VIDEOS", 2)
    real, seen = imports._hand_over, []

    def stop_at_the_fourth(shard, parcel, rows) -> None:
        seen.append(rows)
        if len(seen) == 4:
            raise KeyboardInterrupt
        real(shard, parcel, rows)

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
    assert store.spec.frames == FrameSpec(None, IMPORTED, IMPORTED)
    assert store.longest == 3


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


def test_an_imported_store_says_what_cannot_be_done_with_it(run, tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", x=np.ones((2, 3, 4), np.float32), ids=["a", "b"], y=["wave", "clap"])
    assert run("import", "f.npz", "--store", "s", "-q")[0] == 0
    for line, words in (
        ("train-head evl_decoder --store s --out r", "tokens.-1, and nothing says which tower made these imported"),
        ("train-head linear_probe --store s --out r --set feature=cls.3", "no feature is named 'cls.3'"),
        ("export s --to f.h5 --features cls.0", "extract cannot add to it; import what is missing"),
        ("export s --to f.h5 --features cls.0", "coldframe import f.npz --store s --as cls.0 --dtype float32"),
        ("eval zero_shot --store s --head mean_pool", "coldframe import FILE --store STORE --model ViT-B-16"),
        ("extract s/manifest.parquet --store s --model coldframe-tiny", "do not mix: write to another store"),
        ("extract s/manifest.parquet --store t --sampling imported", "no sampling is named 'imported'"),
        (
            "extract s/manifest.parquet --store t --model coldframe-tiny --sampling imported --decoder imported",
            "not ext",
        ),
    ):
        code, _, err = run(*line.split())
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        assert words in err
    assert not (tmp_path / "t").exists()
    tower = {"a": np.ones((3, 128), np.float32)}
    np.savez(tmp_path / "g.npz", **tower)
    assert run("import", "g.npz", "--store", "u", "--model", "coldframe-tiny", "--as", "cls.-1", "-q")[0] == 0
    with pytest.raises(SpecMismatch, match=r"import FILE --store .*u --as tokens\.1 .*--model coldframe-tiny"):
        FeatureStore.open(tmp_path / "u").require(["tokens.1"], "it")
