"""Writing: what is missing, what a shard takes, who may write, and what is refused."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from coldframe.extract import writer as writer_module
from coldframe.extract.arrays import StoreError
from coldframe.extract.catalogue import Header
from coldframe.extract.journal import read_journal
from coldframe.extract.leases import Part
from coldframe.extract.shards import committed
from coldframe.extract.specs import FrameSpec, SpecMismatch
from coldframe.extract.store import FeatureStore
from coldframe.extract.writer import FeatureWriter

IDS = [f"{label}/{n}.mp4" for label in ("clap", "wave") for n in range(5)]


def test_a_rerun_does_exactly_what_is_missing(toy) -> None:
    toy.write(IDS[:4])
    with toy.open(IDS, ["embedding", "tokens.-1"]) as writer:
        assert writer.features == ("embedding", "tokens.2")
        assert writer.remaining() == IDS[4:]
    before = committed(toy.path / "shards")
    store = toy.write(IDS)
    assert store.ids == tuple(IDS)
    assert committed(toy.path / "shards")[: len(before)] == before
    with toy.open(IDS, ["embedding", "tokens.2"]) as writer:
        assert writer.remaining() == []


def test_a_run_that_ends_before_its_commit_has_done_nothing(toy) -> None:
    with toy.open(IDS, ["embedding"]) as writer:
        shard = writer.begin_shard(IDS[:2])
        shard.add(IDS[0], {"embedding": toy.numbers(IDS[0], "embedding")}, toy.info())
    with toy.open(IDS, ["embedding"]) as writer:
        assert writer.remaining() == IDS
    assert FeatureStore.open(toy.path).ids == ()


def test_an_interrupted_shard_keeps_what_has_arrived(toy) -> None:
    with toy.open(IDS, ["embedding"]) as writer:
        shard = writer.begin_shard(IDS[:3])
        shard.add(IDS[1], {"embedding": toy.numbers(IDS[1], "embedding")}, toy.info())
        shard.commit()
        writer.begin_shard(IDS[3:5]).commit()
        assert writer.remaining() == [IDS[0], *IDS[2:]]
    assert FeatureStore.open(toy.path).ids == (IDS[1],)


def test_failures_are_final_until_they_are_retried(toy) -> None:
    store = toy.write(IDS, failed={IDS[2]: "no video stream", IDS[7]: "timed out"})
    assert [(row.video_id, row.reason, row.attempts) for row in store.failures] == [
        (IDS[2], "no video stream", 1),
        (IDS[7], "timed out", 1),
    ]
    with toy.open(IDS, ["embedding", "tokens.2"]) as writer:
        assert writer.remaining() == []
        assert writer.remaining(retry=True) == [IDS[2], IDS[7]]
        assert writer.failures == store.failures
    store = toy.write(IDS, failed={IDS[7]: "timed out"}, retry=True)
    assert [(row.video_id, row.attempts) for row in store.failures] == [(IDS[7], 2)]
    assert set(store.ids) == set(IDS) - {IDS[7]}


def test_a_failure_takes_nothing_away_that_an_earlier_run_could_read(toy) -> None:
    toy.write(IDS[:2], ["embedding"])
    store = toy.write(IDS[:2], ["tokens.1"], failed={IDS[0]: "gone"})
    assert [row.video_id for row in store.failures] == [IDS[0]]
    assert store.ids == tuple(IDS[:2])
    assert store.features == ("embedding",)
    np.testing.assert_array_equal(store.read("embedding", IDS[0]), toy.numbers(IDS[0], "embedding"))
    with toy.open(IDS[:2], ["embedding"]) as writer:
        assert (writer.failures, writer.remaining(retry=True)) == ([], [])  # it lacks nothing of what is asked for
    store = toy.write(IDS[:2], ["tokens.1"], retry=True)
    assert store.failures == []
    assert store.features == ("embedding", "tokens.1")


def test_what_failed_for_now_is_tried_again_a_few_times(toy) -> None:
    for attempt in (1, 2, 3):
        store = toy.write(IDS[:2], deferred={IDS[0]: "file is missing"})
        assert [(row.status, row.attempts) for row in store.failures] == [("deferred", attempt)]
    with toy.open(IDS[:2], ["embedding", "tokens.2"]) as writer:
        assert writer.remaining() == []
        assert writer.remaining(retry=True) == [IDS[0]]


def test_an_added_feature_is_written_alone_and_for_those_that_lack_it(toy) -> None:
    toy.write(IDS[:3], ["embedding", "tokens.2"])
    n_before = len(committed(toy.path / "shards"))
    with toy.open(IDS, ["tokens.1", "tokens.2"]) as writer:
        assert writer.missing(IDS[0]) == (("tokens.1",), (0,))
        assert writer.missing(IDS[5]) == (("tokens.1", "tokens.2"), (0,))
        plan = writer.plan(writer.remaining())
        assert plan == [IDS[:3], IDS[3:]]
        assert [writer.begin_shard(ids).features for ids in plan] == [("tokens.1",), ("tokens.1", "tokens.2")]
    toy.write(IDS[:3], ["tokens.1", "tokens.2"])
    (added,) = committed(toy.path / "shards")[n_before:]
    assert set(zarr.open_group(added / "features.zarr", mode="r")) == {"tokens.1", "timestamps_s", "frame_offsets"}


def test_a_builder_leaves_out_what_its_shard_does_not_lack(toy) -> None:
    toy.write(IDS[:2], ["embedding"])
    with toy.open(IDS[:2], ["embedding", "cls.1"]) as writer:
        (ids,) = writer.plan(writer.remaining())
        shard = writer.begin_shard(ids)
        for i in ids:
            both = {"cls.1": toy.numbers(i, "cls.1"), "embedding": toy.numbers(i, "embedding") + 1}
            shard.add(i, both, toy.info(content_sha256="version 0"))
        shard.commit()
    store = FeatureStore.open(toy.path)
    assert store.features == ("cls.1", "embedding")
    np.testing.assert_array_equal(store.read("embedding", IDS[0]), toy.numbers(IDS[0], "embedding"))


def test_plans_are_functions_of_the_ids_and_respect_both_limits(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    with toy.open(IDS, ["embedding", "tokens.1"]) as writer:
        assert writer.plan(reversed(IDS)) == [IDS]
        # 3 frames of (4 + 5·6) float16: 204 bytes a video
        monkeypatch.setattr(writer_module, "SHARD_BYTES", 3 * 204)
        assert writer.plan(IDS) == [IDS[:3], IDS[3:6], IDS[6:9], IDS[9:]]
        monkeypatch.setattr(writer_module, "SHARD_BYTES", 100)
        assert [len(ids) for ids in writer.plan(IDS)] == [1] * 10
        monkeypatch.undo()
        many = [f"{n:04d}" for n in range(600)]
        assert [len(ids) for ids in writer.plan(many)] == [256, 256, 88]


def test_another_spec_is_refused_by_the_name_of_the_field(toy) -> None:
    toy.write(IDS[:1])
    with pytest.raises(SpecMismatch, match=r"frames\.n_frames; found 3; expected 4"):
        toy.open(IDS, ["embedding"], n_frames=4)
    with pytest.raises(SpecMismatch, match=r"tower\.weights_sha256"):
        toy.open(IDS, ["embedding"], weights="cd" * 32)
    with pytest.raises(SpecMismatch, match="dtype; found 'float16'; expected 'float32'"):
        toy.open(IDS, ["embedding"], dtype="float32")
    with pytest.raises(SpecMismatch) as kept:
        toy.open(IDS, ["embedding"], n_frames=5)
    toy.open(IDS, ["embedding"]).close()  # though `kept` holds on to the writer that was refused
    assert "n_frames" in str(kept.value)
    assert FeatureStore.open(toy.path).ids == (IDS[0],)


def test_two_writers_at_once_are_refused(toy) -> None:
    with toy.open(IDS, ["embedding"]), pytest.raises(StoreError, match=r"another extract is writing .* pid \d+ on"):
        toy.open(IDS, ["embedding"])
    first = toy.open(IDS, ["embedding"])
    del first
    toy.open(IDS, ["embedding"]).close()


def test_a_writer_in_another_process_is_refused_and_its_death_lets_go(toy) -> None:
    toy.open(IDS, ["embedding"]).close()
    code = """
import sys
from pathlib import Path
from coldframe.extract.leases import Lease
lease = Lease.take(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(toy.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"taken\n"
        with pytest.raises(StoreError, match=f"pid {other.pid}"):
            toy.open(IDS, ["embedding"])
        FeatureStore.open(toy.path)
        other.kill()
        other.wait()
    toy.open(IDS, ["embedding"]).close()


def test_parts_are_written_side_by_side_and_make_one_store(toy) -> None:
    parts = [Part(0, 2), Part(1, 2)]
    open_part = partial(FeatureWriter.open, toy.path, toy.spec(), toy.shape, ["embedding"], toy.manifest(IDS))
    with open_part(part=parts[0]) as first, open_part(part=parts[1]) as second:
        assert sorted(first.ids + second.ids) == sorted(IDS)
        assert 0 < len(first.ids) < len(IDS)
        with pytest.raises(StoreError, match="writing"):
            open_part(part=Part(0, 4))
        for writer in (first, second):
            shard = writer.begin_shard(writer.remaining())
            for i in writer.ids:
                shard.add(i, {"embedding": toy.numbers(i, "embedding")}, toy.info())
            shard.commit()
    store = FeatureStore.open(toy.path)
    assert store.ids == tuple(sorted(IDS))
    assert store.bad_videos() == {}
    with open_part() as whole:
        assert whole.remaining() == []


def test_views_are_rows_and_more_draws_are_new_rows(toy) -> None:
    def write(draws: int) -> FeatureStore:
        frames = FrameSpec(3, "random", seed=0, draws=draws)
        spec = dataclasses.replace(toy.spec(), frames=frames)
        with FeatureWriter.open(toy.path, spec, toy.shape, ["embedding"], toy.manifest(IDS[:2])) as writer:
            for ids in writer.plan(writer.remaining()):
                views = writer.missing(ids[0]).views
                shard = writer.begin_shard(ids)
                for i in ids:
                    numbers = toy.numbers(i, "embedding", 9)[3 * views[0] :][: 3 * len(views)]
                    rows = np.array([[3 * n, 3 * n + 1, 3 * n + 1] for n in range(len(views))])
                    shard.add(i, {"embedding": numbers[: rows.max() + 1]}, toy.info(views=views, rows=rows))
                shard.commit()
        return FeatureStore.open(toy.path)

    assert write(2).n_views == 2
    n_shards = len(committed(toy.path / "shards"))
    store = write(3)
    assert (store.n_views, len(committed(toy.path / "shards"))) == (3, n_shards + 1)
    first = toy.numbers(IDS[0], "embedding", 9)
    np.testing.assert_array_equal(store.read("embedding", IDS[0], view=2), first[[6, 7, 7]])
    features, mask = store.gather(IDS[:2], ["embedding"], view=[2, 0])
    np.testing.assert_array_equal(features["embedding"][0].numpy(), first[[6, 7, 7]])
    np.testing.assert_array_equal(features["embedding"][1].numpy(), store.read("embedding", IDS[1]))
    assert mask.all()
    assert store.bad_videos() == {}
    with pytest.raises(StoreError, match="no view 3"):
        store.gather(IDS[:1], ["embedding"], view=3)
    assert write(1).n_views == 3  # asking for fewer takes none away


def test_int8_keeps_a_scale_for_each_token(toy) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(3, 5, 6)).astype(np.float32) * 10.0 ** rng.integers(-3, 3, (3, 5, 1))
    with toy.open(IDS[:1], ["embedding", "tokens.2"], dtype="int8") as writer:
        shard = writer.begin_shard(writer.remaining())
        shard.add(IDS[0], {"embedding": toy.numbers(IDS[0], "embedding"), "tokens.2": tokens}, toy.info())
        shard.commit()
    store = FeatureStore.open(toy.path)
    assert store.features == ("embedding", "tokens.2")
    (folder,) = committed(toy.path / "shards")
    arrays = zarr.open_group(folder / "features.zarr", mode="r")
    assert {name: str(arrays[name].dtype) for name in ("tokens.2", "scale.2", "embedding")} == {
        "tokens.2": "int8", "scale.2": "float16", "embedding": "float16"
    }  # fmt: skip
    read = store.gather(IDS[:1], ["tokens.2"])[0]["tokens.2"][0]
    assert read.dtype == torch.float16
    np.testing.assert_array_equal(read.numpy(), store.read("tokens.2", IDS[0]))
    step = np.abs(tokens).max(axis=-1, keepdims=True) / 127
    assert (np.abs(read.float().numpy() - tokens) <= 0.51 * step).all()
    assert store.bad_videos() == {}


def test_a_failed_commit_leaves_the_store_as_it_was(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.write(IDS[:2])
    with toy.open(IDS[:4], ["embedding", "tokens.2"]) as writer:
        shard = writer.begin_shard(writer.remaining())
        for i in IDS[2:4]:
            shard.add(i, {name: toy.numbers(i, name) for name in shard.features}, toy.info())
        monkeypatch.setattr("coldframe.extract.shards.shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
        with pytest.raises(StoreError, match="is full"):
            shard.commit()
        monkeypatch.undo()
        assert writer.remaining() == IDS[2:4]
        shard.commit()
        assert writer.remaining() == []
    assert FeatureStore.open(toy.path).ids == tuple(IDS[:4])


def test_what_a_dead_run_left_is_swept_and_never_read(toy) -> None:
    toy.write(IDS[:2])
    (shard,) = committed(toy.path / "shards")
    torn = shard.rename(shard.with_name(f".tmp-{socket.gethostname()}-{2**22 + 1}-00000"))
    assert FeatureStore.open(toy.path).ids == ()
    with toy.open(IDS[:2], ["embedding", "tokens.2"]) as writer:
        assert writer.remaining() == IDS[:2]
    assert not torn.exists()


@pytest.mark.parametrize("kind", ["bfloat16 tensor", "float32 array", "bits"])
def test_floats_become_the_dtype_of_the_store(toy, kind: str) -> None:
    numbers = torch.tensor([[1.0, 1 / 3, -2.5, 1e30]] * 2)
    rounded = numbers.to(torch.bfloat16)
    given = {
        "bfloat16 tensor": rounded,
        "float32 array": numbers.numpy(),
        "bits": rounded.view(torch.uint16).numpy(),
    }[kind]
    with toy.open(IDS[:1], ["embedding"], dtype="bfloat16") as writer:
        shard = writer.begin_shard(IDS[:1])
        shard.add(IDS[0], {"embedding": given}, toy.info(2))
        shard.commit()
    (read,) = FeatureStore.open(toy.path).gather(IDS[:1], ["embedding"])[0].values()
    assert torch.equal(read[0], rounded)


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("embedding", np.zeros((3, 5), np.float32)),
        ("embedding", np.zeros((2, 4), np.float32)),
        ("embedding", np.zeros((3, 4), np.int64)),
        ("pixels", np.zeros((3, 3, 8, 8), np.float32)),
    ],
    ids=["width", "frames", "integers", "float pixels"],
)
def test_frames_of_another_shape_or_kind_are_refused(toy, name: str, frames: np.ndarray) -> None:
    with toy.open(IDS, [name]) as writer, pytest.raises(ValueError, match=f"{name} must be"):
        writer.begin_shard(IDS[:1]).add(IDS[0], {name: frames}, toy.info())


def test_a_video_arrives_once_and_in_its_own_shard(toy) -> None:
    with toy.open(IDS, ["embedding"]) as writer:
        shard = writer.begin_shard(IDS[:1])
        shard.fail(IDS[0], "no video stream")
        for i in IDS[:2]:
            with pytest.raises(ValueError, match="not awaited"):
                shard.fail(i, "again")


def test_a_larger_manifest_replaces_the_smaller(toy) -> None:
    toy.write(IDS[:2])
    store = toy.write(IDS)
    assert store.manifest == toy.manifest(IDS)
    assert store.stats()["manifest_fingerprint"] == toy.manifest(IDS).fingerprint


def test_a_manifest_without_a_video_of_the_store_is_refused(toy) -> None:
    toy.write(IDS[:3], failed={IDS[0]: "gone"})
    toy.open(IDS[1:], ["embedding"]).close()
    with pytest.raises(StoreError, match=rf"1 videos of the store are not in the manifest toy.*{IDS[1]}"):
        toy.open(IDS[2:], ["embedding"])
    assert FeatureStore.open(toy.path).manifest == toy.manifest(IDS[1:])


def test_a_folder_of_other_things_is_refused(toy) -> None:
    toy.path.mkdir()
    (toy.path / "notes.txt").touch()
    with pytest.raises(StoreError, match=r"neither a feature store nor empty; found notes\.txt"):
        toy.open(IDS, ["embedding"])
    assert [path.name for path in toy.path.iterdir()] == ["notes.txt"]


def test_a_store_that_was_only_just_begun_can_be_opened_again(toy) -> None:
    toy.open(IDS, ["embedding"]).close()
    (toy.path / "store.json").rename(toy.path / "store.new.json")
    toy.open(IDS, ["embedding"]).close()
    assert FeatureStore.open(toy.path).manifest == toy.manifest(IDS)


def test_shards_without_a_header_are_not_taken_over(toy) -> None:
    toy.write(IDS)
    (toy.path / "store.json").unlink()
    with pytest.raises(StoreError, match="found journal, shards"):
        toy.open(IDS, ["embedding"], dtype="float32")


def test_the_header_remembers_all_that_was_asked_for(toy) -> None:
    toy.write(IDS[:1], ["embedding"])
    created_at = Header.read(toy.path).created_at
    toy.write(IDS[:1], ["cls.1"])
    header = Header.read(toy.path)
    assert header.features == ("cls.1", "embedding")
    assert header.created_at == created_at


def test_the_journal_tells_what_happened(toy) -> None:
    toy.write(IDS[:2], failed={IDS[1]: "timed out"})
    events = [
        {name: fact for name, fact in event.items() if name not in ("at", "seconds")}
        for event in read_journal(toy.path)
    ]
    assert events == [
        {"event": "started", "shard": 0, "n_videos": 2},
        {"event": "failed", "video_id": IDS[1], "reason": "timed out", "attempt": 1},
        {"event": "done", "shard": 0, "n_ok": 1, "n_failed": 1},
    ]


def test_folders_are_made(toy, tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "store"
    FeatureWriter.open(str(deep), toy.spec(), toy.shape, ["embedding"], toy.manifest(IDS)).close()
    assert FeatureStore.open(str(deep)).ids == ()


@pytest.mark.parametrize("damage", ["missing", "unreadable", "of a killed run"])
def test_a_lost_manifest_is_replaced_by_the_given_one(toy, damage: str) -> None:
    toy.write(IDS[:3])
    path = toy.path / "manifest.parquet"
    if damage == "missing":
        path.unlink()
    elif damage == "unreadable":
        path.write_bytes(path.read_bytes()[:-30])
    else:
        toy.manifest(IDS).write(path)
    with pytest.raises(StoreError, match=r"Run the same extract command again\.$"):
        _ = FeatureStore.open(toy.path).manifest
    with pytest.raises(StoreError, match="1 videos of the store are not in the manifest"):
        toy.open(IDS[1:], ["embedding"])
    toy.open(IDS, ["embedding"]).close()
    store = FeatureStore.open(toy.path)
    assert (store.manifest, store.ids) == (toy.manifest(IDS), tuple(IDS[:3]))


def test_a_store_without_a_shard_is_bound_to_no_spec(toy) -> None:
    toy.open(IDS, ["embedding"]).close()
    store = toy.write(IDS[:2], ["cls.1"], dtype="float32")
    assert (store.spec, store.ids) == (toy.spec("float32"), tuple(IDS[:2]))
