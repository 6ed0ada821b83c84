"""Whatever happens to a store's bytes is found, and mended from the videos; folding and merging lose nothing."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from coldframe.data_manifests.folder import from_folder
from coldframe.data_manifests.records import Manifest
from coldframe.extract import upkeep
from coldframe.extract.arrays import StoreError
from coldframe.extract.frames import write_video
from coldframe.extract.pipeline import ExtractOptions, extract
from coldframe.extract.shards import committed
from coldframe.extract.specs import FeatureSpec, FrameSpec, SpecMismatch
from coldframe.extract.store import FeatureStore
from coldframe.extract.towers import Tower, load_tower

FEATURES = ("embedding", "cls.-1", "tokens.-1")
HERE = ExtractOptions(workers=0, quiet=True)
IDS = [f"{label}/{n}.mp4" for label in ("clap", "wave") for n in range(5)]


@pytest.fixture(scope="module")
def tower() -> Tower:
    return load_tower("coldframe-tiny", device="cpu")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name in "abc":
        for number in range(2):
            pictures = np.kron(rng.integers(0, 255, (12, 6, 8, 3), dtype=np.uint8), np.ones((1, 8, 8, 1), np.uint8))
            write_video(folder / name / f"{number}.mp4", pictures, fps=12)
    return folder


@pytest.fixture(scope="module")
def sound(videos: Path, tower: Tower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    spec = FeatureSpec(FrameSpec(2), tower.spec)
    extract(from_folder(videos), path, tower, spec, FEATURES, dataclasses.replace(HERE, shard_videos=3))
    return path


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "store"))


def flip(file: Path, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0]
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def features(path: Path) -> dict[tuple[str, str], np.ndarray]:
    opened = FeatureStore.open(path)
    return {(name, i): opened.read(name, i) for i in opened.ids for name in (*opened.features, "timestamps_s")}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, frames in one.items():
        np.testing.assert_allclose(frames, other[key], atol=2e-3, err_msg=str(key))  # another batch rounds otherwise


def files_of(store: Path) -> list[Path]:
    return sorted(path for path in (store / "shards").rglob("*") if path.is_file())


def test_a_sound_store_is_sound(store: Path) -> None:
    report = upkeep.verify(store, quiet=True)
    assert (report.is_sound, report.damage, report.videos, report.n_absent) == (True, [], {}, 0)
    assert report.n_bytes == sum(path.stat().st_size for path in files_of(store))


def test_one_flipped_bit_anywhere_is_found(store: Path) -> None:
    rng = np.random.default_rng(0)
    for file in files_of(store):
        size = 8 * file.stat().st_size
        for bit in {0, size - 1, *rng.integers(0, size, 6).tolist()}:
            flip(file, bit)
            assert not upkeep.verify(store, quiet=True).is_sound, (file, bit)
            flip(file, bit)
    assert upkeep.verify(store, quiet=True).is_sound


def test_a_lost_shard_is_told(store: Path) -> None:
    shutil.rmtree(committed(store / "shards")[0])
    report = upkeep.verify(store, quiet=True)
    assert report.n_absent == 3
    assert "3 videos of the manifest are neither there nor failed" in report.describe()


def test_a_lost_file_is_found(store: Path) -> None:
    for file in files_of(store):
        kept = file.read_bytes()
        file.unlink()
        assert not upkeep.verify(store, quiet=True).is_sound, file
        file.write_bytes(kept)


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_is_mended(store: Path, sound: Path, tower: Tower, seed: int) -> None:
    rng = np.random.default_rng(seed)
    file = files_of(store)[seed * 7 % len(files_of(store))]
    flip(file, int(rng.integers(0, 8 * file.stat().st_size)))
    report = upkeep.verify(store, quiet=True)
    upkeep.repair(store, tower, report, HERE)
    assert report.is_sound
    assert upkeep.verify(store, quiet=True).damage == []
    assert_same(features(store), features(sound))


@pytest.mark.parametrize("name", ["videos.parquet", "SHA256SUMS", "tokens.4/c.0.0.0", "tokens.4/zarr.json",
                                  "frame_offsets/c.0", "features.zarr/zarr.json", "timestamps_s/c.0"])  # fmt: skip
def test_every_kind_of_file_is_mended(store: Path, sound: Path, tower: Tower, name: str) -> None:
    for file in [path for path in files_of(store) if path.as_posix().endswith(name)][:1]:
        file.write_bytes(file.read_bytes()[:-9])
    report = upkeep.verify(store, quiet=True)
    assert report.damage
    upkeep.repair(store, tower, report, HERE)
    assert report.is_sound
    assert upkeep.verify(store, quiet=True).damage == []
    assert not (store / "quarantine").exists()
    assert_same(features(store), features(sound))


def test_repair_extracts_only_what_is_bad(store: Path, tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = FeatureStore.open(store)
    (array,) = [path for path in files_of(store) if path.as_posix().endswith("tokens.4/c.0.0.0")][:1]
    flip(array, 100)
    report = upkeep.verify(store, quiet=True)
    assert report.videos == {opened.ids[0]: ("tokens.4",)}
    decoded: list[str] = []
    real = upkeep.extract.__globals__["jobs"]

    def counted(*args):
        for job in real(*args):
            decoded.append(job.key)
            yield job

    monkeypatch.setitem(upkeep.extract.__globals__, "jobs", counted)
    upkeep.repair(store, tower, report, HERE)
    assert decoded == [opened.ids[0]]


def test_what_cannot_be_extracted_again_keeps_what_is_sound(
    store: Path, sound: Path, tower: Tower, videos: Path, tmp_path: Path
) -> None:
    (array,) = [path for path in files_of(store) if path.as_posix().endswith("tokens.4/c.0.0.0")][:1]
    flip(array, 100)
    moved = shutil.move(videos, tmp_path / "gone")
    report = upkeep.verify(store, quiet=True)
    (bad,) = report.videos
    try:
        upkeep.repair(store, tower, report, HERE)
    finally:
        shutil.move(moved, videos)
    assert report.failures == {bad: "file is missing"}
    assert not report.is_sound
    opened = FeatureStore.open(store)
    assert len(opened.ids) == 6
    assert "tokens.4" not in opened.features
    np.testing.assert_array_equal(opened.read("embedding", bad), FeatureStore.open(sound).read("embedding", bad))
    extract(opened.manifest, store, tower, opened.spec, FEATURES, HERE)  # the videos are back
    assert_same(features(store), features(sound))


def test_deep_verification_finds_features_of_other_videos(
    store: Path, tower: Tower, videos: Path, tmp_path: Path
) -> None:
    report = upkeep.verify(store, quiet=True)
    upkeep.verify_deep(store, tower, report, options=HERE)
    assert (report.n_decoded_again, report.unlike, report.gone) == (6, {}, {})
    assert min(report.cosines.values()) > 0.9999
    kept = (videos / "a/0.mp4").read_bytes()
    try:
        shutil.copy(videos / "b/0.mp4", videos / "a/0.mp4")
        (videos / "c/1.mp4").rename(tmp_path / "elsewhere.mp4")
        report = upkeep.verify(store, quiet=True)
        upkeep.verify_deep(store, tower, report, options=HERE)
        assert report.unlike == {"a/0.mp4": "the file has changed since"}
        assert report.gone == {"c/1.mp4": "file is missing"}
        upkeep.repair(store, tower, report, HERE)
        opened = FeatureStore.open(store)
        np.testing.assert_allclose(opened.read("embedding", "a/0.mp4"), opened.read("embedding", "b/0.mp4"), atol=2e-3)
        assert opened.duplicates() == [("a/0.mp4", "b/0.mp4")]
    finally:
        (videos / "a/0.mp4").write_bytes(kept)
        (tmp_path / "elsewhere.mp4").rename(videos / "c/1.mp4")
    report = upkeep.verify(store, quiet=True)
    upkeep.verify_deep(store, tower, report, sample=0.5, options=HERE)
    assert report.n_decoded_again == 3
    with pytest.raises(SpecMismatch, match="weights_sha256"):
        upkeep.verify_deep(store, load_tower("coldframe-tiny", "random", device="cpu"), report, options=HERE)


def test_compact_folds_and_loses_nothing(toy) -> None:
    toy.write(IDS, ["embedding"], per_shard=1, failed={IDS[3]: "not a video"}, deferred={IDS[4]: "file is missing"})
    toy.write(IDS, ["embedding", "tokens.2"], per_shard=2, lengths={IDS[0]: 3})
    before = FeatureStore.open(toy.path)
    rows = {(row.video_id, row.status, row.attempts) for row in before.rows}
    arrays = features(toy.path)
    n_before = len(committed(toy.path / "shards"))
    assert upkeep.compact(toy.path, quiet=True) == (n_before, 2)  # one of the features, one of the failure
    after = FeatureStore.open(toy.path)
    assert {(row.video_id, row.status, row.attempts) for row in after.rows} == rows
    for key, frames in features(toy.path).items():
        np.testing.assert_array_equal(frames, arrays[key])
    assert after.bad_videos() == {}
    assert upkeep.compact(toy.path, quiet=True)[1] == 2
    with toy.open(IDS, ["embedding", "tokens.2"]) as writer, pytest.raises(StoreError, match="writing"):
        assert writer.remaining() == []
        upkeep.compact(toy.path, quiet=True)


def test_compact_leaves_full_shards_alone(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "SHARD_VIDEOS", 10)
    toy.write(IDS, ["embedding"], per_shard=5)
    toy.write(IDS, ["tokens.2"], per_shard=5)
    before = committed(toy.path / "shards")
    assert upkeep.compact(toy.path, quiet=True) == (4, 4)
    assert committed(toy.path / "shards") == before


def test_compact_passes_no_damage_on(toy) -> None:
    store = toy.write(IDS, ["embedding"], per_shard=1)
    for file in [path for path in files_of(store.path) if path.as_posix().endswith("embedding/c.0.0")][:1]:
        flip(file, 3)
    with pytest.raises(StoreError, match="Repair the store first"):
        upkeep.compact(toy.path, quiet=True)
    assert len(FeatureStore.open(toy.path).ids) == len(IDS)


@pytest.mark.parametrize("step", ["write", "remove"])
def test_a_compact_that_dies_leaves_a_whole_store(toy, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    toy.write(IDS, ["embedding"], per_shard=1)
    arrays = features(toy.path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(upkeep, "write_shard" if step == "write" else "remove_shard", die)
    with pytest.raises(KeyboardInterrupt):
        upkeep.compact(toy.path, quiet=True)
    monkeypatch.undo()
    assert_same(features(toy.path), arrays)
    assert upkeep.compact(toy.path, quiet=True)[1] == 1
    assert_same(features(toy.path), arrays)


def rename(path: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Give a store another manifest."""
    from coldframe.extract.catalogue import Header

    manifest = change(FeatureStore.open(path).manifest)
    manifest.write(path / "manifest.parquet")
    dataclasses.replace(Header.read(path), manifest_fingerprint=manifest.fingerprint).write(path)


def test_merge_takes_everything_and_copies_nothing(toy, tmp_path: Path) -> None:
    toy.write(IDS[:6], ["embedding"], per_shard=2)
    other = type(toy)(tmp_path / "other")
    other.write(IDS[4:], ["embedding"], failed={IDS[9]: "not a video"})
    wanted = features(toy.path) | features(other.path)
    assert upkeep.merge(toy.path, [other.path]) == 1
    merged = FeatureStore.open(toy.path)
    assert_same(features(toy.path), wanted)
    assert merged.ids == tuple(IDS[:9])
    assert [row.video_id for row in merged.failures] == [IDS[9]]
    assert sorted(merged.manifest.ids) == IDS
    assert upkeep.verify(toy.path, quiet=True).is_sound
    (shard,) = committed(other.path / "shards")
    assert (shard / "videos.parquet").stat().st_nlink == 2


def test_merge_relabels_and_finds_the_files_again(toy, tmp_path: Path) -> None:
    toy.write(IDS[:5], ["embedding"])
    other = type(toy)(tmp_path / "other")
    other.write(IDS[5:], ["embedding"])
    rename(other.path, lambda m: dataclasses.replace(m, root="/videos/more", class_names=("clap", "jump")))
    upkeep.merge(toy.path, [other.path])
    manifest = FeatureStore.open(toy.path).manifest
    assert manifest.class_names == ("wave", "clap", "jump")
    record = manifest.by_id[IDS[5]]
    assert manifest.path_of(record) == f"/videos/more/{IDS[5]}"


def test_merge_refuses_what_does_not_fit(toy, tmp_path: Path) -> None:
    toy.write(IDS[:5], ["embedding"])
    other, third = type(toy)(tmp_path / "other"), type(toy)(tmp_path / "third")
    other.write(IDS[3:], ["embedding"], seed=1)  # another content under the same ids
    before = features(toy.path)
    with pytest.raises(StoreError, match="2 ids stand for different videos"):
        upkeep.merge(toy.path, [other.path])
    third.write(IDS[5:], ["embedding"], n_frames=4, lengths=dict.fromkeys(IDS, 4))
    with pytest.raises(SpecMismatch, match="n_frames"):
        upkeep.merge(toy.path, [third.path])
    assert_same(features(toy.path), before)


def test_merge_keeps_the_draws_of_both(videos: Path, tower: Tower, tmp_path: Path) -> None:
    for name, draws in (("one", 1), ("three", 3)):
        spec = FeatureSpec(FrameSpec(2, "random", seed=0, draws=draws), tower.spec)
        extract(from_folder(videos), tmp_path / name, tower, spec, ["embedding"], HERE)
    upkeep.merge(tmp_path / "one", [tmp_path / "three"])
    merged = FeatureStore.open(tmp_path / "one")
    assert (merged.n_views, merged.spec.frames.draws) == (3, 3)
    report = upkeep.verify(tmp_path / "one", quiet=True)
    report.unlike = dict.fromkeys(merged.ids, "said to be")
    upkeep.repair(tmp_path / "one", tower, report, HERE)
    assert FeatureStore.open(tmp_path / "one").n_views == 3


def test_merge_into_a_new_store_into_itself_and_again(toy, tmp_path: Path) -> None:
    toy.write(IDS[:5], ["embedding"])
    other = type(toy)(tmp_path / "other")
    other.write(IDS[5:], ["embedding"])
    assert upkeep.merge(tmp_path / "new", [toy.path, other.path]) == 2
    assert FeatureStore.open(tmp_path / "new").ids == tuple(IDS)
    assert upkeep.merge(tmp_path / "new", [toy.path, other.path]) == 0
    with pytest.raises(StoreError, match="into itself"):
        upkeep.merge(toy.path, [toy.path])


@pytest.mark.parametrize("name", ["videos", "nowhere"])
def test_upkeep_of_what_is_no_store_leaves_it_as_it_is(toy, tmp_path: Path, name: str) -> None:
    toy.write(IDS[:1], ["embedding"])
    (tmp_path / "videos").mkdir()
    with pytest.raises(StoreError, match="not a feature store"):
        upkeep.compact(tmp_path / name, quiet=True)
    with pytest.raises(StoreError, match="not a feature store"):
        upkeep.merge(tmp_path / "videos", [toy.path])
    assert not any((tmp_path / "videos").iterdir())
    assert not (tmp_path / "nowhere").exists()


def test_salvaged_videos_are_verified_and_repaired_as_they_were_taken(
    videos: Path, tower: Tower, tmp_path: Path
) -> None:
    folder, store = tmp_path / "videos", tmp_path / "store"
    shutil.copytree(videos, folder)
    pictures = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), dtype=np.uint8)
    write_video(folder / "a" / "cut.avi", pictures, fps=12, codec="mpeg4")
    whole = (folder / "a" / "cut.avi").read_bytes()
    (folder / "a" / "cut.avi").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "bad.mp4").write_text("no video")
    manifest, spec = from_folder(folder), FeatureSpec(FrameSpec(2), tower.spec)
    skipped = extract(manifest, store, tower, spec, ["embedding", "cls.-1"], HERE)
    assert set(skipped.failures) == {"a/bad.mp4", "a/cut.avi"}
    taken = extract(manifest, store, tower, spec, ["embedding", "cls.-1"], dataclasses.replace(HERE, salvage=0.1))
    assert (taken.n_written, taken.n_salvaged) == (1, 1)  # without a word of --retry
    before = features(store)
    for file in [path for path in files_of(store) if path.as_posix().endswith("embedding/c.0.0")]:
        flip(file, 5)
    report = upkeep.verify(store, quiet=True)
    assert "a/cut.avi" in report.videos
    upkeep.repair(store, tower, report, HERE)
    assert (report.failures, report.is_sound) == ({}, True)
    assert f"repaired: {len(report.videos)} videos" in report.describe()
    assert_same(features(store), before)
    report = upkeep.verify(store, quiet=True)
    upkeep.verify_deep(store, tower, report, options=HERE)
    assert (report.gone, report.unlike, report.n_decoded_again) == ({}, {}, 7)


def test_another_file_of_the_same_size_voids_everything_and_loses_nothing(
    videos: Path, tower: Tower, tmp_path: Path
) -> None:
    folder, store = tmp_path / "videos", tmp_path / "store"
    shutil.copytree(videos, folder)
    manifest, spec = from_folder(folder), FeatureSpec(FrameSpec(2), tower.spec)
    extract(manifest, store, tower, spec, ["embedding"], HERE)
    changed = bytearray((folder / "b" / "1.mp4").read_bytes())
    changed[-3] ^= 255  # of the index at the end: the pictures stay
    (folder / "b" / "1.mp4").write_bytes(changed)
    report = extract(manifest, store, tower, spec, ["cls.-1"], HERE)
    assert (report.changed, report.n_failed, report.n_written) == (["b/1.mp4"], 0, 6)
    opened = FeatureStore.open(store)
    assert (len(opened.ids), opened.features) == (6, ("cls.4", "embedding"))


def test_compact_settles(toy) -> None:
    toy.write(IDS[:3], ["embedding"])
    toy.write(IDS[:3], ["tokens.2"], failed={IDS[0]: "gone"})
    upkeep.compact(toy.path, quiet=True)
    shards = committed(toy.path / "shards")
    upkeep.compact(toy.path, quiet=True)
    assert committed(toy.path / "shards") == shards
