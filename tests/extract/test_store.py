"""Reading: the numbers that were written, one batch or one video at a time, or an error that names what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr

from coldframe.extract import store as store_module
from coldframe.extract.arrays import FrameReader, StoreError
from coldframe.extract.shards import committed
from coldframe.extract.specs import SpecMismatch
from coldframe.extract.store import FeatureStore

IDS = [f"{label}/{n}.mp4" for label in ("clap", "wave") for n in range(4)]
RAGGED = {IDS[1]: 5, IDS[2]: 1, IDS[6]: 2}
FEATURES = ("cls.1", "embedding", "pixels", "tokens.0", "tokens.2")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def padded(toy, ids: list[str], name: str, lengths: dict[str, int]) -> np.ndarray:
    """The batch as it must be, [B, T, ...], made from the videos one by one."""
    videos = [toy.numbers(i, name, lengths.get(i, 3)) for i in ids]
    batch = np.zeros((len(ids), max(map(len, videos)), *videos[0].shape[1:]), videos[0].dtype)
    for row, video in zip(batch, videos, strict=True):
        row[: len(video)] = video
    return batch


def array_files(store: FeatureStore, name: str) -> list[Path]:
    return sorted(store.path.glob(f"shards/*/features.zarr/{name}/c.*"))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("lengths", [{}, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_written_is_read(toy, dtype: str, lengths: dict[str, int]) -> None:
    store = toy.write(IDS, FEATURES, lengths=lengths, dtype=dtype, per_shard=3)
    assert store.ids == tuple(IDS)
    assert store.features == FEATURES
    assert store.lengths(IDS).tolist() == [lengths.get(i, 3) for i in IDS]
    ids = [IDS[5], IDS[1], IDS[6], IDS[1]]
    features, mask = store.gather(ids, FEATURES)
    assert mask.tolist() == [[t < lengths.get(i, 3) for t in range(mask.shape[1])] for i in ids]
    for name in FEATURES:
        wanted = padded(toy, ids, name, lengths)
        assert features[name].dtype == (torch.uint8 if name == "pixels" else DTYPES[dtype])
        np.testing.assert_array_equal(features[name].to(torch.float32).numpy(), wanted)
        np.testing.assert_array_equal(store.read(name, IDS[1]), toy.numbers(IDS[1], name, lengths.get(IDS[1], 3)))
    video = store[IDS[2]]
    assert set(video.features) == set(FEATURES)
    assert video.features["tokens.2"].dtype == (np.float32 if dtype == "bfloat16" else np.dtype(dtype))
    assert video.timestamps_s.tolist() == (np.arange(lengths.get(IDS[2], 3)) / 25).tolist()


def test_other_zarr_libraries_read_the_same_numbers(toy) -> None:
    store = toy.write(IDS, ["tokens.1", "pixels"], lengths=RAGGED, failed={IDS[3]: "gone"})
    (shard,) = committed(toy.path / "shards")

    def stock(name: str) -> np.ndarray:
        return np.asarray(zarr.open_array(shard / "features.zarr" / name, mode="r")[...])

    begins = stock("frame_offsets")
    assert np.diff(begins).tolist() == [0 if i == IDS[3] else RAGGED.get(i, 3) for i in IDS]
    for name in ("tokens.1", "pixels"):
        kvstore = {"driver": "file", "path": str(shard / "features.zarr" / name)}
        other = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
        np.testing.assert_array_equal(other, stock(name))
        for n, i in enumerate(IDS):
            if i in store:
                np.testing.assert_array_equal(store.read(name, i), other[begins[n] : begins[n + 1]])


def test_a_batch_is_read_into_the_tensors_given(toy) -> None:
    store = toy.write(IDS, ["tokens.1", "embedding"], lengths=RAGGED)
    out = {"tokens.1": torch.full((2, 5, 5, 6), 9.0).half(), "embedding": torch.full((2, 5, 4), 9.0).half()}
    features, _ = store.gather([IDS[1], IDS[2]], ["tokens.1", "embedding"], out=out)
    for name, batch in out.items():
        assert features[name] is batch
        np.testing.assert_array_equal(batch.float().numpy(), padded(toy, [IDS[1], IDS[2]], name, RAGGED))
    for wrong in (torch.zeros(2, 4, 5, 6).half(), torch.zeros(2, 5, 5, 6), torch.zeros(2, 5, 6, 5).half().mT):
        with pytest.raises(ValueError, match="must be contiguous"):
            store.gather([IDS[1], IDS[2]], ["tokens.1"], out={"tokens.1": wrong})


def test_an_empty_batch(toy) -> None:
    features, mask = toy.write(IDS).gather([], ["embedding", "tokens.1", "tokens.2"])
    assert mask.shape == (0, 0)
    assert features["tokens.2"].shape == (0, 0, 5, 6)


def test_small_features_are_read_from_disk_once(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    store = toy.write(IDS, ["embedding", "tokens.2"])
    reads = []
    read_into = FrameReader.read_into
    monkeypatch.setattr(FrameReader, "read_into", lambda *given: (reads.append(given[1].path), read_into(*given)))
    for _ in range(3):
        store.gather(IDS[:2], ["embedding"])
    assert len(reads) == len(IDS)
    store.gather(IDS[:2], ["tokens.2"])
    assert len(reads) == len(IDS) + 2


def test_a_feature_too_large_to_hold_is_read_each_time(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    store = toy.write(IDS, ["embedding"], lengths=RAGGED)
    monkeypatch.setattr(store_module, "_RESIDENT_BYTES", 10)
    batch = store.gather(IDS, ["embedding"])[0]["embedding"]
    np.testing.assert_array_equal(batch.float().numpy(), padded(toy, IDS, "embedding", RAGGED))
    assert not store._resident


def test_a_batch_stays_as_it_is_while_others_are_read(toy) -> None:
    store = toy.write(IDS, ["tokens.2"])
    batches = [store.gather([i], ["tokens.2"])[0]["tokens.2"] for i in IDS * 3]
    for i, batch in zip(IDS * 3, batches, strict=True):
        np.testing.assert_array_equal(batch[0].float().numpy(), toy.numbers(i, "tokens.2"))


def test_missing_and_failed_videos_are_named(toy) -> None:
    store = toy.write(IDS, failed={IDS[3]: "timed out: 60 s"})
    assert IDS[3] not in store
    assert "x.mp4" not in store
    assert IDS[0] in store
    assert len(store) == len(IDS) - 1
    with pytest.raises(StoreError, match=r"video 'x\.mp4' is not in the store"):
        store.gather([IDS[0], "x.mp4"], ["embedding"])
    with pytest.raises(StoreError, match=rf"'{IDS[3]}' has no features in .*: timed out: 60 s"):
        store[IDS[3]]
    assert [(row.video_id, row.status) for row in store.rows][2:4] == [(IDS[2], "ok"), (IDS[3], "failed")]


def test_a_feature_that_some_videos_lack_is_none_of_the_store(toy) -> None:
    toy.write(IDS[:3], ["embedding", "tokens.1"])
    store = toy.write(IDS, ["embedding"])
    assert store.features == ("embedding",)
    assert store.gather(IDS[:3], ["tokens.1"])[0]["tokens.1"].shape == (3, 3, 5, 6)
    for names in (["tokens.1"], ["cls.2"]):
        with pytest.raises(SpecMismatch, match=f"{names[0]}, which not all videos"):
            store.gather(IDS, names)
    with pytest.raises(SpecMismatch):
        store.read("tokens.1", IDS[5])


def test_an_added_feature_joins_the_older_ones(toy) -> None:
    toy.write(IDS, ["embedding"], lengths=RAGGED, per_shard=3)
    store = toy.write(IDS, ["tokens.-1"], lengths=RAGGED)
    assert store.features == ("embedding", "tokens.2")
    features, _ = store.gather(IDS, ["tokens.-1", "embedding"])
    for name in ("embedding", "tokens.2"):
        np.testing.assert_array_equal(features[name].float().numpy(), padded(toy, IDS, name, RAGGED))


def test_a_video_that_changed_between_two_runs_never_mixes_its_versions(toy) -> None:
    toy.write(IDS, ["embedding"])
    store = toy.write(IDS, ["tokens.1"], seed=1)
    assert store.features == ("tokens.1",)
    store = toy.write(IDS, ["embedding"], seed=1)
    assert store.features == ("embedding", "tokens.1")
    np.testing.assert_array_equal(store.read("embedding", IDS[0]), toy.numbers(IDS[0], "embedding", seed=1))


def test_what_is_required_but_absent_comes_with_the_command_that_adds_it(toy) -> None:
    store = toy.write(IDS, ["embedding", "tokens.2"], dtype="bfloat16")
    store.require(["tokens.-1", "embedding"], wanted_by="linear_probe")
    with pytest.raises(SpecMismatch) as error:
        store.require(["tokens.1", "tokens.2", "cls.-1"], wanted_by="evl_decoder")
    text = str(error.value)
    assert text.startswith("evl_decoder needs cls.2, tokens.1, which not all videos of ")
    assert "found embedding, tokens.2" in text
    command = shlex.split(text[text.index("coldframe extract") :])
    assert command[2] == str(toy.path / "manifest.parquet")
    assert dict(zip(command[3::2], command[4::2], strict=True)) == {
        "--store": str(toy.path),
        "--model": "toy",
        "--pretrained": "random",
        "--precision": "fp32",
        "--frames": "3",
        "--decoder": "auto",
        "--dtype": "bfloat16",
        "--features": "cls.2,tokens.1",
    }


def test_another_expectation_is_refused_by_the_name_of_the_field(toy) -> None:
    toy.write(IDS[:1])
    FeatureStore.open(toy.path, toy.spec())
    with pytest.raises(SpecMismatch, match=r"frames\.n_frames; found 3; expected 8"):
        FeatureStore.open(toy.path, toy.spec(n_frames=8))


def test_a_sound_store_verifies(toy) -> None:
    store = toy.write(IDS, FEATURES, lengths=RAGGED, per_shard=3, dtype="bfloat16")
    assert store.bad_videos() == {}


def test_a_flipped_byte_of_a_frame_is_found(toy) -> None:
    store = toy.write(IDS, ["embedding", "tokens.2"], lengths=RAGGED)
    (tokens,), (times,) = array_files(store, "tokens.2"), array_files(store, "timestamps_s")
    frames_before = 3 + 5 + 1
    flip(tokens, frames_before * 60 + 7)  # a frame is 5 × 6 float16
    flip(times, 0)
    assert FeatureStore.open(toy.path).bad_videos() == {IDS[0]: ("timestamps_s",), IDS[3]: ("tokens.2",)}


@pytest.mark.parametrize("damage", ["index", "truncated", "missing", "metadata", "rows"])
def test_damage_stops_the_store_from_opening_and_names_the_place(toy, damage: str) -> None:
    store = toy.write(IDS, ["embedding", "tokens.2"], per_shard=4)
    _, file = array_files(store, "tokens.2")
    match damage:
        case "index":
            flip(file, file.stat().st_size - 30)
        case "truncated":
            os.truncate(file, 100)
        case "missing":
            shutil.rmtree(file.parent)
        case "metadata":
            meta = json.loads((file.parent / "zarr.json").read_text())
            (file.parent / "zarr.json").write_text(json.dumps(meta | {"data_type": "int16"}))
        case "rows":
            flip(file.parents[2] / "videos.parquet", 40)
    with pytest.raises(StoreError) as error:
        FeatureStore.open(toy.path)
    assert str(file.parents[2]) in str(error.value)
    if damage in ("index", "truncated", "missing"):
        assert f"{IDS[4]}, {IDS[5]}, {IDS[6]} and 1 more" in str(error.value)
        damaged = FeatureStore.open(toy.path, check=False)
        assert damaged.bad_videos() == dict.fromkeys(IDS[4:], ("tokens.2",))
        assert damaged.gather(IDS[:4], ["tokens.2"])[1].all()


def test_a_changed_manifest_is_noticed(toy) -> None:
    store = toy.write(IDS)
    toy.manifest(IDS, class_names=("clap", "wave")).write(toy.path / "manifest.parquet")
    with pytest.raises(StoreError, match=r"manifest\.parquet was changed"):
        _ = store.manifest
    (toy.path / "manifest.parquet").unlink()
    with pytest.raises(StoreError, match="missing"):
        _ = store.manifest


def test_a_folder_without_a_header_is_no_store(toy) -> None:
    with pytest.raises(StoreError, match="not a feature store"):
        FeatureStore.open(toy.path)


def test_pickled_and_used(toy) -> None:
    store = toy.write(IDS, ["embedding", "tokens.2"], lengths=RAGGED, per_shard=3)
    store.gather(IDS, ["embedding", "tokens.2"])
    n_empty = len(pickle.dumps(FeatureStore.open(toy.path)))
    copy = pickle.loads(pickle.dumps(store))
    assert abs(len(pickle.dumps(store)) - n_empty) < 500  # no features and no files travel
    assert copy.ids == store.ids
    batch = copy.gather(IDS, ["tokens.2"])[0]["tokens.2"]
    np.testing.assert_array_equal(batch.float().numpy(), padded(toy, IDS, "tokens.2", RAGGED))


def test_a_forked_process_reads_while_its_parent_does(toy) -> None:
    store = toy.write(IDS, ["embedding", "tokens.2"], per_shard=2)
    wanted = {name: padded(toy, IDS, name, {}) for name in store.features}

    def is_right() -> bool:
        for _ in range(50):
            features, _ = store.gather(IDS, ["embedding", "tokens.2"])
            if not all(np.array_equal(features[name].float().numpy(), wanted[name]) for name in wanted):
                return False
        return True

    assert is_right()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks among threads
        child = os.fork()
    if child == 0:
        os._exit(0 if is_right() else 1)
    assert is_right()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_store_is_what_it_was_when_it_was_opened(toy) -> None:
    store = toy.write(IDS[:4])
    toy.write(IDS, ["embedding", "tokens.1"])
    assert store.ids == tuple(IDS[:4])
    assert store.features == ("embedding", "tokens.2")


def test_stats_count_what_is_there(toy) -> None:
    store = toy.write(IDS, ["embedding", "tokens.2"], lengths=RAGGED, failed={IDS[0]: "timed out"}, per_shard=3)
    facts = store.stats()
    n_frames = 3 * 4 + 5 + 1 + 2
    assert facts["n_videos"] == 7
    assert facts["n_frames"] == n_frames
    assert list(facts["failures"].values()) == ["timed out"]
    assert facts["feature_bytes"] == {"embedding": n_frames * 8, "tokens.2": n_frames * 60}
    assert facts["n_shards"] == 3
    assert facts["decoders"] == {"pyav": 7}
    assert json.loads(json.dumps(facts))["spec"]["dtype"] == "float16"
    text = store.describe()
    for part in ("7 of 8 videos", f"{n_frames} frames", "1 failed", "toy random", "tokens.2", ": timed out"):
        assert part in text


def test_an_empty_store_says_so(toy) -> None:
    toy.open(IDS, ["embedding"]).close()
    store = FeatureStore.open(toy.path)
    assert (store.ids, store.features, store.stats()["n_frames"]) == ((), (), 0)
    with pytest.raises(SpecMismatch, match="no features"):
        store.require(["embedding"], wanted_by="linear_probe")
