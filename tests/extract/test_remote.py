"""Videos and stores behind URLs: an S3 on this machine, and memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from coldframe.cli import main
from coldframe.data_manifests import Manifest, VideoRecord, from_folder
from coldframe.data_manifests.locations import list_files, location, read_bytes, write_bytes
from coldframe.extract import FeatureStore, StoreError, upkeep
from coldframe.extract.frames import Crops, DecodedVideo, DecodeError, SourceError, decode, write_video
from coldframe.extract.journal import read_journal
from coldframe.extract.leases import Part, live
from coldframe.extract.shards import damage_of
from coldframe.extract.space import free_bytes
from coldframe.extract.specs import FrameSpec, TransformSpec
from coldframe.extract.workers import Answer, Chunk, DecodePool, Failure, Job
from coldframe.extract.writer import FeatureWriter

from .conftest import Toy

FRAMES = FrameSpec(n_frames=2)
TRANSFORM = TransformSpec(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SPLITS = ("train", "test", "val")
CLIPS = ("spin/a.mp4", "spin/b.mp4", "wave/c.mp4")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small videos in the folders of two classes."""
    root, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for clip in CLIPS:
        write_video(root / clip, rng.integers(0, 255, (9, 48, 64, 3), dtype=np.uint8), fps=10)
    return root


@pytest.fixture
def videos(clips: Path, bucket: str) -> str:
    """The same in a bucket."""
    for clip in CLIPS:
        fsspec.filesystem("s3").put_file(str(clips / clip), f"{bucket}/videos/{clip}")
    return f"{bucket}/videos"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files of this process and of its workers."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def coldframe(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    """Run a command with --json: its exit code, its object, and its last words."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return int(left.value.code or 0), json.loads(printed.out or "null"), printed.err


def received(pool: DecodePool, jobs: list[Job]) -> tuple[dict[str, Answer], dict[str, list[np.ndarray]]]:
    """What a pool says of each video, and the crops [n, 3, S, S] that came before."""
    answers: dict[str, Answer] = {}
    crops: dict[str, list[np.ndarray]] = defaultdict(list)
    for key, arrival in pool.decode(jobs):
        if isinstance(arrival, Chunk):
            crops[key].append(arrival.crops)
        else:
            answers[key] = arrival
    return answers, crops


@pytest.mark.parametrize("workers", [0, 1])
def test_a_video_behind_a_url_is_the_same_video(clips: Path, videos: str, scratch: Path, workers: int) -> None:
    jobs = [Job(clip, f"{videos}/{clip}") for clip in (*CLIPS, "absent.mp4")]
    with DecodePool(FRAMES, TRANSFORM, workers=workers) as pool:
        found, crops = received(pool, jobs)
    absent = found.pop("absent.mp4")
    assert isinstance(absent, Failure)
    assert (absent.reason, absent.is_final) == (f"file is missing: {videos}/absent.mp4", False)
    for clip, video in found.items():
        here = decode(clips / clip, FRAMES, TRANSFORM, kept := Crops(), key=clip)
        assert isinstance(video, DecodedVideo)
        np.testing.assert_array_equal(np.concatenate(crops[clip]), np.stack(kept))
        np.testing.assert_array_equal(video.rows, here.rows)
        assert (video.decoder, video.content_sha256, video.source_bytes) == (
            here.decoder, here.content_sha256, here.source_bytes
        )  # fmt: skip
    assert not list(scratch.iterdir())


def test_a_network_that_fails_is_told_from_a_bad_video(
    videos: str, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    fsspec.filesystem("s3").pipe_file(f"{videos}/bad.mp4", b"no video")
    with pytest.raises(DecodeError, match="not a video") as bad:
        decode(f"{videos}/bad.mp4", FRAMES, TRANSFORM, Crops())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3 = fsspec.get_filesystem_class("s3")
    s3.clear_instance_cache()
    monkeypatch.setattr(s3, "retries", 1)
    with pytest.raises(SourceError, match=rf"^network failure: {videos}/{CLIPS[0]} ") as lost:
        decode(f"{videos}/{CLIPS[0]}", FRAMES, TRANSFORM, Crops())
    assert not isinstance(bad.value, SourceError)
    with DecodePool(FRAMES, TRANSFORM, workers=0) as pool:
        ((_, failure),) = pool.decode([Job("a", f"{videos}/{CLIPS[0]}")])
    assert isinstance(failure, Failure)
    assert (failure.is_final, failure.reason) == (False, str(lost.value))
    assert not list(scratch.iterdir())


def test_what_a_killed_worker_fetched_is_removed(scratch: Path, videos: str) -> None:
    """The worker is killed while it decodes a copy, the way the watchdog kills it."""
    left: list[list[Path]] = []

    def kill() -> None:
        while not (copies := list(scratch.glob("*/0/*.mp4"))):
            time.sleep(0.001)
        left.append(copies)
        (worker,) = pool._workers
        os.kill(worker._process.pid or 0, signal.SIGKILL)

    with DecodePool(FrameSpec(2, decoder="pyav"), TRANSFORM, workers=1, ahead=1) as pool:
        killer = threading.Thread(target=kill)
        killer.start()
        found, _ = received(pool, [Job(str(n), f"{videos}/{CLIPS[0]}") for n in range(20)])
        killer.join()
        assert len(found) == 20
        assert {v.reason for v in found.values() if isinstance(v, Failure)} <= {"decoder crashed (signal 9)"}
        assert not any(copy.exists() for copy in left[0])
    assert not list(scratch.iterdir())


def test_manifest_check_looks_behind_urls(videos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coldframe(capsys, "manifest", "check", videos, "--json")[:1] == (0,)
    records = (VideoRecord("a", CLIPS[0], None), VideoRecord("b", f"{videos}/gone.mp4", None))
    Manifest("m", videos, (), records).write(tmp_path / "m.csv")
    code, facts, _ = coldframe(capsys, "manifest", "check", tmp_path / "m.csv", "--json")
    assert (code, facts["missing_files"]) == (3, ["b"])
    code, facts, _ = coldframe(capsys, "manifest", "folder", videos, "--out", tmp_path / "f.csv", "--json")
    assert (code, facts["videos"]) == (0, 3)
    assert Manifest.read(tmp_path / "f.csv").fingerprint == from_folder(videos).fingerprint


def test_a_url_that_cannot_be_opened_is_one_line(videos: str, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("nope://bucket/videos", "s3://no-such-bucket/videos"):
        code, _, words = coldframe(capsys, "manifest", "check", place)
        assert (code, words.count("\n")) == (2, 1)
        assert place.partition("/")[0] in words
    code, _, words = coldframe(
        capsys, "train-head", "linear_probe", "--store", "memory://a", "--out", "s3://bucket/run"
    )
    assert (code, "runs and results are local" in words) == (2, True)


# Stores


@pytest.fixture(params=["s3", "memory"])
def remote(request: pytest.FixtureRequest) -> Toy:
    """Makes stores below a URL."""
    fsspec.filesystem("memory").store.clear()
    return Toy(location(request.getfixturevalue("bucket") if request.param == "s3" else "memory://bucket"))


IDS = ("a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4")


def write_in_three_runs(toy: Toy) -> FeatureStore:
    """Several shards; a video of another length; a failure that goes; a feature that comes later."""
    options: dict[str, Any] = {"lengths": {"b.mp4": 1}, "per_shard": 2}
    toy.write(IDS, ("embedding",), deferred={"c.mp4": "network failure"}, **options)
    toy.write(IDS, ("embedding",), **options)
    return toy.write(IDS, ("embedding", "tokens.2"), **options)


def test_a_store_behind_a_url_is_the_same_store(remote: Toy, toy: Toy, scratch: Path) -> None:
    here, there = write_in_three_runs(toy), write_in_three_runs(remote)
    assert (there.ids, there.features, there.failures) == (here.ids, here.features, here.failures)
    assert there.manifest.fingerprint == here.manifest.fingerprint
    for ids in (IDS, ("e.mp4", "b.mp4", "e.mp4")):
        (batch, mask), (wanted, wanted_mask) = (s.gather(ids, ["embedding", "tokens.2"]) for s in (there, here))
        assert mask.equal(wanted_mask)
        assert all(batch[name].equal(wanted[name]) for name in wanted)
    np.testing.assert_array_equal(there.read("timestamps_s", "b.mp4"), here.read("timestamps_s", "b.mp4"))
    names = {str(p.relative_to(toy.path)) for p in (toy.path / "shards").rglob("*") if p.is_file()}
    assert {name for name in list_files(remote.path) if name.startswith("shards/")} == names
    assert [e["event"] for e in read_journal(remote.path)].count("done") == there.stats()["n_shards"]
    assert str(remote.path) in there.describe()
    assert there.bad_videos() == {}
    assert not list(scratch.iterdir())


def test_a_shard_without_its_rows_is_absent(remote: Toy) -> None:
    remote.write(IDS, per_shard=2)
    system = fsspec.filesystem(str(remote.path).partition("://")[0])
    *_, last = sorted(name for name in list_files(remote.path / "shards") if name.endswith("videos.parquet"))
    system.rm_file(str(remote.path / "shards" / last))
    assert FeatureStore.open(remote.path).ids == IDS[:4]
    assert remote.write(IDS, per_shard=2).ids == IDS


def test_damage_behind_a_url_is_found(remote: Toy) -> None:
    remote.write(IDS)
    (name,) = (n for n in list_files(remote.path) if "tokens.2/c." in n)
    whole = read_bytes(remote.path / name)
    write_bytes(remote.path / name, bytes([whole[0] ^ 1]) + whole[1:])
    assert FeatureStore.open(remote.path).bad_videos() == {"a.mp4": ("tokens.2",)}
    report = upkeep.verify(remote.path, quiet=True)
    assert (report.videos, report.is_sound, len(report.damage)) == ({"a.mp4": ("tokens.2",)}, False, 1)
    for damage in (whole[:-1], whole[:7], whole[:-5] + b"?" + whole[-4:]):
        write_bytes(remote.path / name, damage)
        with pytest.raises(StoreError, match=r"tokens.2 of shard .* is damaged"):
            FeatureStore.open(remote.path)
    store = FeatureStore.open(remote.path, check=False)
    fsspec.filesystem(str(remote.path).partition("://")[0]).rm_file(str(remote.path / name))
    with pytest.raises(StoreError, match="is damaged: file is missing"):
        store.read("tokens.2", "a.mp4")


def test_every_byte_behind_a_url_is_held_to_its_name(remote: Toy) -> None:
    write_in_three_runs(remote)
    sound = upkeep.verify(remote.path, quiet=True)
    names = list_files(remote.path / "shards")
    n_bytes = sum(len(read_bytes(remote.path / "shards" / name)) for name in names)
    assert (sound.is_sound, sound.damage, sound.n_shards, sound.n_bytes) == (True, [], 7, n_bytes)
    for name in names[:: len(names) // 8]:
        place = remote.path / "shards" / name
        whole = read_bytes(place)
        write_bytes(place, whole[:-1] + bytes([whole[-1] ^ 1]))
        assert not upkeep.verify(remote.path, quiet=True).is_sound, name
        write_bytes(place, whole)


def test_writers_behind_a_url_keep_out_of_each_others_way(remote: Toy) -> None:
    manifest, spec = remote.manifest(IDS), remote.spec()
    with remote.open(IDS, ("embedding",)):
        with pytest.raises(StoreError, match="another extract is writing this store"):
            remote.open(IDS, ("embedding",))
        with pytest.raises(StoreError, match="is writing"):
            FeatureWriter.open(remote.path, spec, remote.shape, ("embedding",), manifest, part=Part(0, 2))
    first, second = (
        FeatureWriter.open(remote.path, spec, remote.shape, ("embedding",), manifest, part=Part(n, 2)) for n in (0, 1)
    )
    assert sorted(first.ids + second.ids) == list(IDS)
    assert [holder.part for holder in live(remote.path)] == [Part(0, 2), Part(1, 2)]
    first.close()
    second.close()
    assert live(remote.path) == []


def test_a_preview_leaves_nothing_behind_a_url(remote: Toy) -> None:
    manifest = remote.manifest(IDS)
    found = FeatureWriter.preview(remote.path, remote.spec(), remote.shape, ("embedding",), manifest)
    assert found.remaining() == list(IDS)
    assert list_files(remote.path) == []
    assert free_bytes(remote.path) is None


def test_what_needs_a_local_store_says_so(remote: Toy, toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    there, here = remote.write(IDS).path, toy.write(IDS).path
    before = list_files(there)
    for arguments in (
        ("verify", there, "--repair"),
        ("compact", there),
        ("merge", there, here),
        ("merge", here, there),
    ):
        code, _, words = coldframe(capsys, *arguments)
        assert (code, words.count("\n")) == (2, 1)
        assert f"found {there}" in words
        assert "Copy it to a local disk first" in words
    assert list_files(there) == before


def test_a_store_travels_from_url_to_url(
    remote: Toy, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, file, again = remote.write(IDS).path, tmp_path / "f.h5", remote.path.parent / "again"
    assert coldframe(capsys, "export", there, "--to", file, "--quiet", "--json")[0] == 0
    assert coldframe(capsys, "import", file, "--store", again, "--quiet", "--json")[0] == 0
    assert FeatureStore.open(again).ids == IDS
    np.testing.assert_array_equal(
        FeatureStore.open(again).read("tokens.2", "c.mp4"), toy.write(IDS).read("tokens.2", "c.mp4")
    )
    for arguments in (("export", there, "--to", there / "f.h5"), ("import", there / "f.h5", "--store", toy.path)):
        code, _, words = coldframe(capsys, *arguments)
        assert (code, words.count("\n"), "Copy it to a local disk first" in words) == (2, 1, True)


def test_what_is_no_store_behind_a_url_is_refused(remote: Toy) -> None:
    with pytest.raises(StoreError, match=r"is not a feature store.*coldframe extract VIDEOS --store"):
        FeatureStore.open(str(remote.path))
    write_bytes(remote.path / "thesis.pdf", b"years of work")
    with pytest.raises(StoreError, match=r"neither a feature store nor empty; found thesis\.pdf"):
        remote.write(IDS)


def total(store: FeatureStore) -> float:
    return float(store.gather(IDS, ["tokens.2"])[0]["tokens.2"].float().sum())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of a process with threads; DataLoader does it too
def test_a_store_behind_a_url_is_read_by_a_fork(bucket: str) -> None:
    store = Toy(location(bucket)).write(IDS)
    for opened in (store, FeatureStore.open(store.path, check=False)):  # the other opens its arrays in the child
        wanted, fork = total(store), multiprocessing.get_context("fork")
        ours, theirs = fork.Pipe()
        child = fork.Process(target=lambda opened, pipe: pipe.send(total(opened)), args=(opened, theirs))
        child.start()
        assert ours.poll(60)
        assert ours.recv() == wanted
        child.join()


def test_a_store_behind_a_url_is_read_by_a_stranger(bucket: str) -> None:
    store = Toy(location(bucket)).write(IDS)
    code = (
        "import pickle, sys\n"
        "batch, _ = pickle.load(sys.stdin.buffer).gather(sys.argv[1:], ['tokens.2'])\n"
        "print(float(batch['tokens.2'].float().sum()))"
    )
    command = [sys.executable, "-W", "error", "-c", code, *IDS]
    done = subprocess.run(command, input=pickle.dumps(store), capture_output=True, check=True, cwd="/")
    assert float(done.stdout) == total(store)


def test_a_network_that_fails_is_no_damage(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore.open(Toy(location(bucket)).write(IDS).path, check=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3 = fsspec.get_filesystem_class("s3")
    s3.clear_instance_cache()
    monkeypatch.setattr(s3, "retries", 1)
    with pytest.raises(StoreError, match="cannot be read: network failure"):
        store.read("tokens.2", "a.mp4")
    with pytest.raises(OSError, match=r"^network failure"):
        FeatureStore.open(bucket + "/store")
    for shard in store.catalogue.shards:
        with pytest.raises(OSError, match="network failure"):
            list(damage_of(shard.path))
        with pytest.raises(OSError, match=r"^network failure"):
            type(shard).read(shard.path)


# The program


def test_the_program_from_bucket_to_bucket(
    videos: str, clips: Path, bucket: str, tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", "coldframe-tiny", "--features", "embedding,cls.-1", "--workers", "1", "--shard-videos", "2",
               "--quiet", "--json")  # fmt: skip
    store = f"{bucket}/stores/tiny"
    code, costs, _ = coldframe(capsys, "plan", videos, "--store", store, *options)
    assert (code, costs["n_todo"], costs["failures"], costs["fits"], costs["free_bytes"]) == (0, 3, {}, True, None)
    assert list_files(location(f"{bucket}/stores")) == []
    code, report, _ = coldframe(capsys, "extract", videos, "--store", store, *options)
    assert (code, report["n_written"], report["store"]) == (0, 3, store)
    code, report, _ = coldframe(capsys, "extract", videos, "--store", store, *options)
    assert (code, report["n_written"], report["n_present"]) == (0, 0, 3)
    more = (*options, "--features", "embedding,cls.-1,tokens.-1")
    code, report, _ = coldframe(capsys, "extract", f"{store}/manifest.parquet", "--store", store, *more)
    assert (code, report["n_written"]) == (0, 3)
    assert coldframe(capsys, "extract", clips, "--store", tmp_path / "local", *more)[0] == 0
    here, there = FeatureStore.open(tmp_path / "local"), FeatureStore.open(store)
    assert there.manifest.fingerprint == here.manifest.fingerprint
    for name in here.features:
        for clip in CLIPS:
            np.testing.assert_array_equal(there.read(name, clip), here.read(name, clip))

    assert coldframe(capsys, "inspect", store, "--json")[1]["n_videos"] == 3
    code, facts, _ = coldframe(capsys, "verify", store, "--deep", "--workers", "1", "--quiet", "--json")
    assert (code, facts["damage"], facts["unlike"], facts["n_decoded_again"]) == (0, [], {}, 3)
    labels = Manifest(
        "m",
        videos,
        ("spin", "wave"),
        tuple(VideoRecord(c, c, int(c[0] == "w"), s) for c, s in zip(CLIPS, SPLITS, strict=True)),
    )
    labels.write(tmp_path / "m.parquet")
    fsspec.filesystem("s3").put_file(str(tmp_path / "m.parquet"), f"{bucket}/m.parquet")
    run = ("--manifest", f"{bucket}/m.parquet", "--out", tmp_path / "run", "--set", "epochs=1", "--quiet", "--json")
    assert coldframe(capsys, "train-head", "linear_probe", "--store", store, *run)[0] == 0
    scored = ("--manifest", f"{bucket}/m.parquet", "--results", tmp_path / "r.jsonl", "--json")
    code, result, _ = coldframe(
        capsys, "eval", "closed_set", "--store", store, "--checkpoint", tmp_path / "run", *scored
    )
    assert (code, result["n"]) == (0, 1)
    for _ in range(2):  # the texts are made, then found
        code, result, _ = coldframe(capsys, "eval", "zero_shot", "--store", store, "--head", "mean_pool", *scored)
        assert (code, result["n"]) == (0, 1)
    assert sum(name.startswith("text/") for name in list_files(location(store))) == 1
    assert not [path for path in scratch.iterdir() if "coldframe" in path.name]


def test_the_program_to_memory(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fsspec.filesystem("memory").store.clear()
    store = "memory://stores/tiny"
    options = ("--model", "coldframe-tiny", "--features", "embedding", "--workers", "1", "--quiet", "--json")
    assert coldframe(capsys, "extract", clips, "--store", store, *options)[0] == 0
    assert FeatureStore.open(store).ids == CLIPS
    code, _, words = coldframe(capsys, "extract", "memory://videos", "--store", store, *options)
    assert (code, "no video below" in words) == (2, True)
