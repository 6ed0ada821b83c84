"""Bytes before they are written; and guesses about all videos from a few."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coldframe.data_manifests import from_folder
from coldframe.data_manifests.drawn import plan_clips
from coldframe.extract import ExtractOptions, FeatureSpec, FeatureWriter, FrameSpec, load_tower
from coldframe.extract.frames import Crops, DecodeError, DecodeOptions, decode, probe, write_video
from coldframe.extract.pipeline import extract, jobs
from coldframe.extract.space import Estimate, extrapolate, free_bytes, needed_bytes, readable, segments
from coldframe.extract.workers import Job


@pytest.fixture(scope="module")
def tower():
    return load_tower("coldframe-tiny", device="cpu")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of 8 to 48 frames, at 8 a second."""
    root = tmp_path_factory.mktemp("videos")
    for i, clip in enumerate(plan_clips(4)[:6]):
        write_video(root / "class" / f"{i}.mp4", clip.draw(n_frames=8 * (i + 1), size_px=32), fps=8)
    return root


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("frames", "features", "dtype", "grid"),
    [
        (FrameSpec(8), ["tokens.-1", "embedding"], "float16", None),
        (FrameSpec(3, "random", seed=1, draws=2), ["tokens.-1", "tokens.1", "pixels"], "int8", 3),
        (FrameSpec(4, "dense", stride=2, clips=3, crops="three"), ["tokens.-1", "cls.-1"], "float32", None),
        (FrameSpec(None, "all"), ["tokens.-1"], "float16", None),
    ],
    ids=["uniform", "draws of int8", "views", "all"],
)
def test_needed_bytes_are_those_that_are_written(
    tower, videos: Path, tmp_path: Path, frames: FrameSpec, features: list[str], dtype: str, grid: int | None
) -> None:
    manifest, spec = from_folder(videos), FeatureSpec(frames, tower.spec, dtype, grid)
    with FeatureWriter.open(tmp_path, spec, spec.shape_of(tower.shape), features, manifest) as writer:
        tasks = list(jobs(writer, manifest, [writer.remaining()]))
        needed = needed_bytes(writer, tasks, workers=1)
    before = size_of(tmp_path)
    extract(manifest, tmp_path, tower, spec, features, ExtractOptions(workers=1, quiet=True))
    assert needed.value == pytest.approx(size_of(tmp_path) - before, rel=0.02)
    assert needed.plus_minus == 0  # fixed lengths; or every header was read
    with FeatureWriter.open(tmp_path, spec, spec.shape_of(tower.shape), features, manifest) as writer:
        assert needed_bytes(writer, list(jobs(writer, manifest, [writer.remaining()])), workers=1).value == 0


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".avi", ".webm"])
def test_a_header_promises_the_frames_that_decoding_gives(tower, tmp_path: Path, ending: str) -> None:
    path, spec = tmp_path / f"clip{ending}", FrameSpec(None, "fps", rate_fps=4.0)
    codec = "libvpx" if ending == ".webm" else "libx264"
    write_video(path, plan_clips(4)[0].draw(n_frames=24, size_px=32), fps=12, codec=codec)
    for part in ({}, {"start_s": 0.5, "end_s": 1.5}):
        crops = Crops()
        promised = probe(path, spec, tower.spec.transform, crops, **part)
        assert promised.rows.shape == decode(path, spec, tower.spec.transform, Crops(), **part).rows.shape
        assert not crops
    with pytest.raises(DecodeError, match="too long"):
        probe(path, spec, tower.spec.transform, Crops(), options=DecodeOptions(max_frames=2))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DecodeError, match="not a video"):
        probe(tmp_path / "text.mp4", spec, tower.spec.transform, Crops())
    with pytest.raises(OSError, match="no such file"):
        probe(tmp_path / "absent.mp4", spec, tower.spec.transform, Crops())


def test_a_preview_touches_nothing_and_keeps_nobody_out(toy) -> None:
    manifest = toy.manifest(["a", "b", "c"])
    preview = FeatureWriter.preview(toy.path, toy.spec(), toy.shape, ["embedding"], manifest)
    assert preview.remaining() == ["a", "b", "c"]
    assert not toy.path.exists()
    toy.write(["a", "b"])
    seen = sorted(toy.path.rglob("*"))
    with toy.open(["a", "b"], ["embedding"]):
        preview = FeatureWriter.preview(toy.path, toy.spec(), toy.shape, ["embedding"], manifest)
        assert preview.remaining() == ["c"]
    assert [path for path in sorted(toy.path.rglob("*")) if "leases" not in path.parts] == [
        path for path in seen if "leases" not in path.parts
    ]


def test_a_sum_is_guessed_by_the_size_that_predicts_the_sample() -> None:
    rng = np.random.default_rng(0)
    ids = [str(i) for i in range(1000)]
    size = {key: float(rng.integers(1, 100)) for key in ids}
    noise = {key: float(rng.integers(1, 100)) for key in ids}
    seen = {key: 3 * size[key] for key in ids[::50]}
    found, share = extrapolate(seen, ids, noise, size)
    assert found == pytest.approx({key: 3 * size[key] for key in ids})
    assert share == pytest.approx(0, abs=1e-9)


def test_the_margin_holds_the_truth_nineteen_times_of_twenty() -> None:
    rng = np.random.default_rng(0)
    truth = {str(i): float(x) for i, x in enumerate(rng.gamma(4, 10, 400))}
    held = 0
    for _ in range(200):
        drawn = {str(i): truth[str(i)] for i in rng.choice(400, 40, replace=False)}
        found, share = extrapolate(drawn, truth)
        held += abs(sum(found.values()) - sum(truth.values())) <= share * sum(found.values())
    assert 180 <= held <= 198


def test_what_was_seen_whole_is_certain_and_nothing_seen_is_nothing() -> None:
    assert extrapolate({"a": 2.0, "b": 5.0}, ["a", "b"]) == ({"a": 2.0, "b": 5.0}, 0.0)
    assert extrapolate({}, ["a"]) == ({"a": 0.0}, 0.0)
    found, share = extrapolate({"a": 2.0}, ["a", "b"], {"a": 1.0})  # a size that lacks a video is of no use
    assert (found["b"], share > 0.5) == (2.0, True)


def test_segments_tell_their_seconds() -> None:
    tasks = [Job("a", "a", 1.0, 3.0), Job("b", "b", None, 2.5), Job("c", "c", 1.0, None)]
    assert segments(tasks) == {"a": 2.0, "b": 2.5}


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (999_600, "1.00 MB"),
     (4.2e9, "4.20 GB"), (1.5e12, "1.50 TB"), (2.5e15, "2,500 TB")],
)  # fmt: skip
def test_sizes_for_people(n_bytes: float, text: str) -> None:
    assert readable(n_bytes) == text


def test_free_space_of_a_folder_that_is_still_to_be_made(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.01)
    assert Estimate(3).plus_minus == 0
