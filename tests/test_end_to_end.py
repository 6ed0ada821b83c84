"""Drawn clips through every stage, by the commands a user types."""

from __future__ import annotations

import contextlib
import io
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from coldframe.cli import main
from coldframe.data_manifests import Manifest, VideoRecord
from coldframe.data_manifests.drawn import MOTIONS, plan_clips
from coldframe.extract import FeatureStore
from coldframe.extract.frames import write_video

ROOT = Path(__file__).resolve().parent.parent
N_CLIPS = 64
HEADS = ("linear_probe", "attentive_pool", "temporal_transformer", "evl_decoder")


def coldframe(*arguments: object) -> tuple[int, str]:
    """Run a command in this process, as the console script does; its exit code and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return int(left.value.code or 0), printed.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn clips and a manifest that labels them by motion."""
    root = tmp_path_factory.mktemp("clips")
    records = []
    for clip in plan_clips(n_per_class=N_CLIPS // len(MOTIONS), seed=0):
        write_video(root / "videos" / clip.path, clip.draw(n_frames=16, size_px=64), fps=12)
        records.append(VideoRecord(clip.path, clip.path, MOTIONS.index(clip.motion), clip.split))
    Manifest("drawn", str(root / "videos"), MOTIONS, tuple(records)).write(root / "motion.csv")
    return root


@pytest.fixture(scope="module")
def extracted(folder: Path) -> tuple[object, ...]:
    """The command that extracts what every head needs, after it has run once."""
    command = ("extract", folder / "motion.csv", "--store", folder / "store", "--model", "coldframe-tiny", "--quiet",
               "--for", ",".join(HEADS), "--features", "embedding", "--workers", "2", "--json")  # fmt: skip
    code, out = coldframe(*command)
    assert (code, json.loads(out)["n_written"]) == (0, N_CLIPS)
    return command


@pytest.fixture(scope="module")
def store(folder: Path, extracted: tuple[object, ...]) -> Path:
    """The store that it wrote."""
    assert extracted
    return folder / "store"


def test_a_rerun_does_nothing(store: Path, extracted: tuple[object, ...]) -> None:
    opened = FeatureStore.open(store)
    assert len(opened.ids) == N_CLIPS
    assert not opened.failures
    before = sorted(path.name for path in (store / "shards").iterdir())
    code, out = coldframe(*extracted)
    assert (code, json.loads(out)["n_written"], json.loads(out)["n_present"]) == (0, 0, N_CLIPS)
    assert sorted(path.name for path in (store / "shards").iterdir()) == before


def test_inspect_says_what_is_in_the_store(store: Path) -> None:
    code, out = coldframe("inspect", store, "--json")
    assert (code, json.loads(out)["n_videos"]) == (0, N_CLIPS)
    assert "coldframe-tiny" in coldframe("inspect", store)[1]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_trains_and_is_scored(head: str, folder: Path, store: Path) -> None:
    run, results = folder / "runs" / head, folder / f"{head}.jsonl"
    code, _ = coldframe("train-head", head, "--store", store, "--out", run, "--set", "epochs=2", "--quiet")
    assert code == 0
    code, out = coldframe("eval", "closed_set", "--store", store, "--checkpoint", run, "--json", "--results", results)
    assert code == 0
    result = json.loads(out)
    assert result["n"] == sum(r.split == "test" for r in FeatureStore.open(store).manifest.records)
    low, high = result["interval_95"]["top_1"]
    assert 0 <= low <= result["metrics"]["top_1"] <= high <= 1
    assert "top_1" in coldframe("results", results)[1]


def test_a_trained_decoder_shows_where_it_looks(folder: Path, store: Path) -> None:
    run, picture = folder / "runs" / "looks", folder / "looks.png"
    assert (
        coldframe("train-head", "evl_decoder", "--store", store, "--out", run, "--set", "epochs=1", "--quiet")[0] == 0
    )
    video = FeatureStore.open(store).ids[0]
    code, out = coldframe("attention", run, "--store", store, "--video", video, "--out", picture, "--json")
    assert (code, json.loads(out)["video_id"]) == (0, video)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert coldframe("attention", run, "--store", store, "--video", "nobody", "--out", picture)[0] == 2


@pytest.mark.parametrize("metric", ["mean_cosine", "otam", "bi_mhm"])
def test_few_shot_repeats_to_the_digit(metric: str, folder: Path, store: Path) -> None:
    command = ("eval", "few_shot", "--store", store, "--head", "prototypes", "--metric", metric, "--split", "train",
               "--shot", "1", "--episodes", "200", "--json", "--results", folder / f"{metric}.jsonl")  # fmt: skip
    first, second = (json.loads(coldframe(*command)[1]) for _ in range(2))
    assert first["metrics"] == second["metrics"]
    assert first["fingerprints"] == second["fingerprints"]
    assert first["n"] == 200


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_at_random_moments_then_a_rerun_gives_the_same_store(folder: Path) -> None:
    arguments = [sys.executable, str(ROOT / "cli.py"), "extract", "motion.csv", "--model", "coldframe-tiny", "--quiet",
                 "--features", "embedding,tokens.-1", "--shard-videos", "4", "--workers", "2"]  # fmt: skip
    began = time.monotonic()
    subprocess.run([*arguments, "--store", "whole"], cwd=folder, check=True)
    seconds = time.monotonic() - began
    moments = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen([*arguments, "--store", "killed"], cwd=folder, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=moments.uniform(0.4, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    subprocess.run([*arguments, "--store", "killed"], cwd=folder, check=True)
    assert same_videos(FeatureStore.open(folder / "whole"), FeatureStore.open(folder / "killed"))


def same_videos(one: FeatureStore, other: FeatureStore) -> bool:
    """Two stores hold the same videos with the same numbers, each once."""
    assert one.fingerprint == other.fingerprint
    assert one.ids == other.ids
    assert one.features == other.features
    for name in one.features:
        for video_id in one.ids:
            np.testing.assert_array_equal(one.read(name, video_id), other.read(name, video_id))
    return True
