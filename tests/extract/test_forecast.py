"""What a forecast says against what `extract` then does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from coldframe.data_manifests import ConfigError, Manifest, from_folder
from coldframe.data_manifests.drawn import plan_clips
from coldframe.extract import ExtractOptions, FeatureSpec, FrameSpec, SpecMismatch, Tower, load_tower
from coldframe.extract import forecast as module
from coldframe.extract.forecast import Forecast, forecast, spec_of_stand_in, tower_of_the_same_cost
from coldframe.extract.frames import write_video
from coldframe.extract.pipeline import extract
from coldframe.extract.space import Estimate
from coldframe.extract.weights import TowerError

OPTIONS = ExtractOptions(workers=1, quiet=True, batch_frames=8)


@pytest.fixture(scope="module")
def tower() -> Tower:
    return load_tower("coldframe-tiny", device="cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine clips of 8 to 24 frames, at 8 a second."""
    root = tmp_path_factory.mktemp("clips")
    for i, clip in enumerate(plan_clips(4)[:9]):
        write_video(root / "class" / f"{i}.mp4", clip.draw(n_frames=24, size_px=32)[: 8 + 2 * i], fps=8)
    return root


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def asked(tower: Tower, frames: FrameSpec | None = None, dtype: str = "float16") -> FeatureSpec:
    return FeatureSpec(frames or FrameSpec(4), tower.spec, dtype)


FEATURES = ["tokens.-1", "tokens.0", "embedding"]


@pytest.mark.parametrize(
    ("frames", "dtype"),
    [(FrameSpec(4), "float16"), (FrameSpec(4, "random", seed=0, draws=2), "int8"), (FrameSpec(None, "all"), "float32")],
    ids=["uniform", "draws", "all"],
)
def test_a_forecast_is_what_extract_writes(
    tower: Tower, clips: Path, tmp_path: Path, frames: FrameSpec, dtype: str
) -> None:
    store, spec = tmp_path / "store", asked(tower, frames, dtype)
    told = forecast(from_folder(clips), store, tower, spec, FEATURES, OPTIONS, n_sample=3)
    assert not store.exists()
    report = extract(from_folder(clips), store, tower, spec, FEATURES, OPTIONS)
    assert told.total_bytes.value == pytest.approx(size_of(store), rel=0.02)
    assert told.total_bytes.value == sum(told.feature_bytes.values()) + told.other_bytes
    assert told.frames == (report.n_frames, 0)
    assert (told.n_todo, told.n_videos, told.n_sampled, told.failures) == (9, 9, 4, {})  # one to warm up
    assert sum(told.memory_bytes.values()) == sum(told.feature_bytes.values())
    assert told.tower_s.value == pytest.approx(told.crops.value / told.frames_per_s, rel=0.02)  # whole crops
    assert told.total_s.value == told.decode_s.value + told.tower_s.value > 0
    assert told.fits


def test_distinct_crops_are_counted_once(tower: Tower, clips: Path, tmp_path: Path) -> None:
    dense = FrameSpec(4, "dense", stride=1, clips=40)  # the clips overlap
    told = forecast(from_folder(clips), tmp_path / "s", tower, asked(tower, dense), FEATURES, OPTIONS, n_sample=99)
    assert told.frames.value == 9 * 40 * 4
    assert told.crops == (sum(8 + 2 * i for i in range(9)), 0)


def test_frames_of_unknown_length_come_with_a_margin(
    tower: Tower, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PROBES", 4)
    spec = asked(tower, FrameSpec(None, "fps", rate_fps=4.0))
    told = forecast(from_folder(clips), tmp_path / "s", tower, spec, FEATURES, OPTIONS, n_sample=3)
    truth = sum(4 + i for i in range(9))
    assert told.frames.plus_minus > 0
    assert abs(told.frames.value - truth) <= 1.5 * told.frames.plus_minus
    assert " ± " in told.describe()


def test_what_the_store_has_is_not_counted(tower: Tower, clips: Path, tmp_path: Path) -> None:
    store, whole = tmp_path / "store", from_folder(clips)
    some = Manifest("some", whole.root, whole.class_names, whole.records[:4])
    extract(some, store, tower, asked(tower), FEATURES, OPTIONS)
    before = sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*"))
    told = forecast(whole, store, tower, asked(tower), FEATURES, OPTIONS)
    assert (told.n_todo, told.n_present, told.frames.value) == (5, 4, 20)
    assert told.memory_bytes["embedding"] * 5 == told.feature_bytes["embedding"] * 9
    more = forecast(some, store, tower, asked(tower), [*FEATURES, "cls.1"], OPTIONS)
    assert list(more.feature_bytes) == ["cls.1"]
    none = forecast(some, store, tower, asked(tower), FEATURES, OPTIONS)
    assert (none.n_todo, none.total_bytes.value, none.bottleneck, none.fits) == (0, 0, None, True)
    assert "nothing to do" in none.describe()
    json.dumps(none.to_json())
    assert before == sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*"))
    with pytest.raises(SpecMismatch, match="n_frames"):
        forecast(whole, store, tower, asked(tower, FrameSpec(5)), FEATURES, OPTIONS)


def test_failures_of_the_sample_are_told_with_their_reasons(tower: Tower, clips: Path, tmp_path: Path) -> None:
    for i, path in enumerate(sorted(clips.rglob("*.mp4"))[:4]):
        (tmp_path / "v" / "class").mkdir(parents=True, exist_ok=True)
        (tmp_path / "v" / "class" / path.name).write_bytes(path.read_bytes() if i else b"no video")
    store, manifest = tmp_path / "store", from_folder(tmp_path / "v")
    told = forecast(manifest, store, tower, asked(tower), FEATURES, OPTIONS)
    assert told.failures == {"class/0.mp4": "not a video"}
    assert "1 (25%) failed: 1 not a video" in told.describe()
    extract(manifest, store, tower, asked(tower), FEATURES, OPTIONS)
    after = forecast(manifest, store, tower, asked(tower), FEATURES, OPTIONS)
    assert (after.n_todo, after.n_present, after.n_given_up) == (0, 3, 1)
    assert forecast(
        manifest, store, tower, asked(tower), FEATURES, dataclasses.replace(OPTIONS, retry=True)
    ).failures == {"class/0.mp4": "not a video"}


def test_a_set_without_one_sound_video_still_has_a_tower(tower: Tower, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_bytes(b"no video")
    told = forecast(from_folder(tmp_path / "v"), tmp_path / "s", tower, asked(tower), FEATURES, OPTIONS)
    assert told.frames_per_s > 0
    assert "1 (100%) failed" in told.describe()


def test_refusals_are_those_of_extract(tower: Tower, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sample"):
        forecast(from_folder(clips), tmp_path, tower, asked(tower), FEATURES, OPTIONS, n_sample=0)
    whole = from_folder(clips)
    sided = Manifest("sided", whole.root, ("turn left",), whole.records)
    flipped = FrameSpec(4, crops="random", flip=True, seed=0)
    with pytest.raises(ConfigError, match="left from right"):
        forecast(sided, tmp_path / "s", tower, asked(tower, flipped), FEATURES, OPTIONS)


def told(**changes: Any) -> Forecast:
    """A forecast of numbers that need no run."""
    facts: dict[str, Any] = {
        "store": Path("s"), "n_videos": 10, "n_present": 0, "n_given_up": 0, "n_todo": 10, "n_sampled": 4,
        "failures": {}, "frames": Estimate(80), "crops": Estimate(80), "feature_bytes": {"tokens.12": 5_000_000_000},
        "other_bytes": 1000, "total_bytes": Estimate(5_000_001_000), "free_bytes": 10**10,
        "memory_bytes": {"tokens.12": 5_000_000_000, "embedding": 1_000_000}, "machine_bytes": 64 * 10**9,
        "decode_s": Estimate(100.0, 10.0), "workers": 4, "cores": 8, "tower_s": Estimate(25.0), "frames_per_s": 3.2,
        "batch_frames": 64, "device": "cuda", "tower": "ViT-B-16 fp16",
    }  # fmt: skip
    return Forecast(**facts | changes)


def test_the_slower_side_decides_on_a_gpu_and_both_count_on_a_processor() -> None:
    assert told().total_s == (100, 10)
    assert told(device="cpu").total_s == (125, 10)
    assert told(tower_s=Estimate(300.0)).total_s == (300, 0)


@pytest.mark.parametrize(
    ("changes", "bottleneck", "words"),
    [
        ({}, "decoding", "idles 75% of the time; this machine has more cores: --workers 8"),
        ({"workers": 8}, "decoding", "--shard"),
        ({"tower_s": Estimate(400.0)}, "tower", "1 decode workers would do"),
        ({"tower_s": Estimate(200.0)}, "tower", "2 decode workers would do"),
        ({"device": "cpu", "tower_s": Estimate(400.0)}, "tower", "a GPU most of all"),
        ({"device": "cpu"}, "decoding", "--workers 8"),
    ],
)
def test_advice_fits_the_bottleneck(changes: dict[str, Any], bottleneck: str, words: str) -> None:
    assert told(**changes).bottleneck == bottleneck
    assert words in told(**changes).advice


def test_what_does_not_fit_is_said_in_capitals() -> None:
    assert "it fits" in told().describe()
    assert "IT DOES NOT FIT, 1.00 GB ARE MISSING" in told(free_bytes=4_000_001_000).describe()
    assert "IT MAY NOT FIT" in told(total_bytes=Estimate(9 * 10**9, 2 * 10**9)).describe()
    assert "read memory" in told().describe()
    assert "READS THE DISK" in told(machine_bytes=8 * 10**9).describe()


def test_json_has_what_is_derived() -> None:
    facts = json.loads(json.dumps(told().to_json()))
    assert facts["decode_s"] == {"value": 100.0, "plus_minus": 10.0}
    assert (facts["fits"], facts["bottleneck"], facts["total_s"]["value"], facts["store"]) == (
        True,
        "decoding",
        100,
        "s",
    )


def test_weights_that_are_not_here_are_stood_in_for(
    tower: Tower, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "are_weights_here", lambda _, pretrained: pretrained != "far_away")
    stand_in, note = tower_of_the_same_cost("coldframe-tiny", "far_away", "fp32", "cpu")
    assert "far_away" in note
    assert (stand_in.spec.pretrained, stand_in.shape) == ("random", tower.shape)
    assert tower_of_the_same_cost("coldframe-tiny", None, "fp32", "cpu")[1] == ""
    with pytest.raises(TowerError, match="nosuch"):  # a mistake is no want of a network
        tower_of_the_same_cost("coldframe-tiny", "nosuch", "fp32", "cpu")

    spec = asked(stand_in)
    assert spec_of_stand_in(spec, tmp_path / "store") == spec
    extract(from_folder(clips), tmp_path / "store", tower, asked(tower), FEATURES, OPTIONS)
    spec = spec_of_stand_in(spec, tmp_path / "store")
    assert forecast(from_folder(clips), tmp_path / "store", stand_in, spec, FEATURES, OPTIONS).n_todo == 0
    other = asked(load_tower("coldframe-tiny", "random", "bf16", "cpu"))
    with pytest.raises(SpecMismatch, match="precision"):
        forecast(
            from_folder(clips), tmp_path / "store", stand_in, spec_of_stand_in(other, tmp_path / "store"), FEATURES
        )
