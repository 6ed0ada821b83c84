"""Bad input: one line that says what is wrong and what to do, exit code 2 or 3, never a traceback."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from coldframe.cli import main
from coldframe.data_manifests import EpisodeSpec
from coldframe.data_manifests.drawn import plan_clips
from coldframe.extract import FeatureStore
from coldframe.extract.frames import write_video

TINY = ("--model", "coldframe-tiny", "--quiet", "--workers", "1")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a command in an empty folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(left.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sound clip of sixteen frames."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, plan_clips(4)[0].draw(n_frames=16, size_px=64), fps=12)
    return path


@pytest.fixture(scope="module")
def store(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store of two classes, embeddings alone."""
    root = tmp_path_factory.mktemp("small")
    for name in ("jump", "wave"):
        for split, n in (("train", 3), ("val", 1), ("test", 1)):
            for i in range(n):
                (root / "videos" / split / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(clip, root / "videos" / split / name / f"{i}.mp4")
    with pytest.raises(SystemExit) as left:
        main(["extract", str(root / "videos"), "--store", str(root / "store"), "--features", "embedding", *TINY])
    assert not left.value.code
    return root / "store"


def refused(answer: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, and one line of error that holds these words."""
    code, _, err = answer
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]


# Folders and manifests


def test_a_folder_that_is_not_there(run) -> None:
    refused(run("extract", "videos", "--store", "s", *TINY), "videos")


def test_an_empty_folder(run, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    refused(run("extract", "videos", "--store", "s", *TINY), "videos")
    assert not (tmp_path / "s").exists()


def test_a_folder_without_videos(run, tmp_path: Path) -> None:
    (tmp_path / "videos" / "a").mkdir(parents=True)
    (tmp_path / "videos" / "a" / "notes.txt").write_text("no video")
    refused(run("extract", "videos", "--store", "s", *TINY), ".txt", ".mp4")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a.mp4,run\na.mp4,run\n", ("duplicate", "line 3")),
        ("../a.mp4,run\n", ("root", "line 2")),
        ("a.mp4\tb,run,3\n", ("line 2",)),
    ],
)
def test_a_manifest_that_cannot_be_right(run, tmp_path: Path, rows: str, words: tuple[str, ...]) -> None:
    (tmp_path / "m.csv").write_text("path,label\n" + rows)
    refused(run("extract", "m.csv", "--store", "s", *TINY), *words)


def test_a_missing_file_is_a_failure_and_check_finds_it(run, tmp_path: Path, clip: Path) -> None:
    shutil.copy(clip, tmp_path / "here.mp4")
    (tmp_path / "m.csv").write_text("path,label\nhere.mp4,a\ngone.mp4,a\n")
    code, out, _ = run("manifest", "check", "m.csv", "--json")
    assert (code, json.loads(out)["missing_files"]) == (3, ["gone.mp4"])
    code, out, _ = run("extract", "m.csv", "--store", "s", "--json", *TINY)
    assert code == 3
    assert list(json.loads(out)["failures"]) == ["gone.mp4"]
    assert FeatureStore.open(tmp_path / "s").ids == ("here.mp4",)


# Videos


def audio_only(path: Path) -> None:
    """A second of a tone, in an MP4 without pictures."""
    with av.open(path, "w") as file:
        stream = file.add_stream("aac", rate=44100, layout="mono")
        tone = np.sin(np.arange(44100, dtype=np.float32) / 20)[None]
        for at in range(0, 44100 - 1024, 1024):
            frame = av.AudioFrame.from_ndarray(tone[:, at : at + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 44100, at, Fraction(1, 44100)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def test_broken_videos_are_counted_and_explained_and_the_others_are_written(run, tmp_path: Path, clip: Path) -> None:
    folder = tmp_path / "videos" / "class"
    folder.mkdir(parents=True)
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "truncated.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    audio_only(folder / "audio.mp4")
    frames = plan_clips(4)[1].draw(n_frames=16, size_px=64)
    shutil.copy(clip, folder / "good.mp4")
    write_video(folder / "single.mp4", frames[:1], fps=12)
    write_video(folder / "odd.mkv", frames[:, :63, :61], fps=12, pix_fmt="yuv444p")
    write_video(folder / "ten_bit.mp4", frames, fps=12, codec="libx265", pix_fmt="yuv420p10le")
    code, out, _ = run("extract", "videos", "--store", "s", "--json", *TINY)
    report = json.loads(out)
    assert code == 3
    assert {Path(name).stem for name in report["failures"]} == {"text", "empty", "truncated", "audio"}
    assert all(reason.strip() for reason in report["failures"].values())
    store = FeatureStore.open(tmp_path / "s")
    assert {Path(name).stem for name in store.ids} == {"good", "single", "odd", "ten_bit"}
    single = next(row for row in store.rows if row.video_id == "class/single.mp4")
    assert (single.n_frames, single.n_repeated) == (8, 7)
    code, out, _ = run("inspect", "s")
    assert code == 0
    assert "failed" in out
    code, out, _ = run("extract", "videos", "--store", "s", "--json", *TINY)  # a failure is final until it is retried
    assert (code, json.loads(out)["n_written"], json.loads(out)["n_failed"]) == (3, 0, 4)


def test_real_clips_of_every_container(run, tmp_path: Path, shared: Path) -> None:
    clips = sorted((shared / "data" / "videos" / "singles").rglob("*.*"))
    for path in [*clips[::3], *sorted((shared / "data" / "videos" / "hard").rglob("*.*"))]:
        (tmp_path / "videos" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "videos" / path.parent.name / path.name)
    code, out, err = run("extract", "videos", "--store", "s", "--json", *TINY)
    assert code in (0, 3), err
    report = json.loads(out)
    assert report["n_written"] + report["n_failed"] == report["n_videos"]
    assert len(report["failures"]) <= 1, report["failures"]  # one of the hard files is no video


# Plans


def test_a_plan_says_what_extract_will_write(run, store: Path, tmp_path: Path) -> None:
    videos = FeatureStore.open(store).manifest.root
    options = (videos, "--store", "new", "--features", "tokens.-1", "--dtype", "int8", "--frames", "4", *TINY)
    code, out, _ = run("plan", *options, "--sample", "2", "--json")
    told = json.loads(out)
    assert (code, told["n_todo"], told["frames"]["value"], told["note"]) == (0, 10, 40, "")
    assert not (tmp_path / "new").exists()
    assert run("extract", *options)[0] == 0
    written = sum(file.stat().st_size for file in (tmp_path / "new").rglob("*") if file.is_file())
    assert told["total_bytes"]["value"] == pytest.approx(written, rel=0.02)
    code, out, _ = run("plan", *options)
    assert (code, "nothing to do" in out) == (0, True)


def test_a_plan_without_network_or_room_still_plans(run, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("open_clip.download_pretrained", fail)
    monkeypatch.setattr("coldframe.extract.forecast.free_bytes", lambda _: 10)
    videos = FeatureStore.open(store).manifest.root
    options = ("--model", "ViT-S-32-alt", "--pretrained", "far", "--features", "tokens.-1", "--quiet")
    refused(run("plan", videos, *options), "'far'")  # such weights were never published
    tag = ("--model", "RN50-quickgelu", "--features", "embedding", "--quiet", "--sample", "1", "--workers", "1")
    code, out, _ = run("plan", videos, *tag, "--frames", "1", "--batch", "1")
    assert code == 0
    assert "DOES NOT FIT" in out
    assert "random ones stand in" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--store", "{store}", "--features", "embedding", "--frames", "4"), ("n_frames",)),
        (("--sampling", "fps", "--stride", "2"), ("stride",)),
        (("--for", "evl_decodr"), ("evl_decoder",)),
        (("--shard", "4/4"), ("0/4",)),
    ],
)
def test_a_plan_is_refused_where_extract_would_be(run, store: Path, options: tuple[str, ...], words: tuple) -> None:
    videos, options = FeatureStore.open(store).manifest.root, tuple(option.format(store=store) for option in options)
    refused(run("plan", videos, *options, *TINY), *words)
    refused(run("extract", videos, "--store", "new", *options, *TINY), *words)


# Names


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (("train-head", "evl_decodr", "--out", "r"), "evl_decoder"),
        (("eval", "closed_sets", "--head", "mean_pool"), "closed_set"),
        (("eval", "few_shot", "--head", "prototype"), "prototypes"),
        (("eval", "few_shot", "--head", "prototypes", "--metric", "otan"), "otam"),
        (("train-head", "linear_probe", "--out", "r", "--set", "epoch=3"), "epochs"),
        (("eval", "zero_shot", "--head", "mean_pool", "--templates", "vidio"), "video"),
    ],
)
def test_unknown_names_list_the_near_ones(run, store: Path, arguments: tuple[str, ...], near: str) -> None:
    refused(run(*arguments, "--store", store), near)


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (("--model", "ViT-B-61"), "ViT-B-16"),
        (("--model", "coldframe-tiny", "--features", "embeding"), "embedding"),
        (("--model", "coldframe-tiny", "--features", "tokens.9"), "tokens."),
        (("--model", "coldframe-tiny", "--for", "evl"), "evl_decoder"),
        (("--model", "coldframe-tiny", "--dtype", "float61"), "float16"),
        (("--model", "ViT-B-16", "--pretrained", "opnai"), "openai"),
        (("--model", "ViT-B-16", "--pretrained", "openai"), "ViT-B-16-quickgelu"),
    ],
)
def test_unknown_things_to_extract(run, store: Path, arguments: tuple[str, ...], near: str) -> None:
    videos = FeatureStore.open(store).manifest.root
    refused(run("extract", videos, "--store", "new", "--quiet", *arguments), near)


# Stores and checkpoints


def test_a_store_of_another_fingerprint(run, store: Path) -> None:
    videos = FeatureStore.open(store).manifest.root
    refused(run("extract", videos, "--store", store, "--frames", "4", *TINY), "n_frames", "8", "4")


def test_a_store_that_lacks_what_the_head_needs(run, store: Path) -> None:
    answer = run("train-head", "evl_decoder", "--store", store, "--out", "r")
    refused(answer, "evl_decoder needs", "coldframe extract", "tokens.4")


def test_the_command_in_that_message_works(run, store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    _, _, err = run("train-head", "linear_probe", "--store", "copy", "--out", "r")
    command = err.strip().partition("coldframe extract")[2].split()
    code, _, err = run("extract", *command, "--quiet")
    assert code == 0, err
    code, _, err = run("train-head", "linear_probe", "--store", "copy", "--out", "r", "--set", "epochs=1", "--quiet")
    assert code == 0, err


@pytest.mark.parametrize("what", ["nothing", "file", "folder", "store"])
def test_a_checkpoint_that_is_not_one(run, store: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("weights")
    path = {"nothing": "absent", "file": "file", "folder": "folder", "store": store}[what]
    refused(run("eval", "closed_set", "--store", store, "--checkpoint", path), "not a checkpoint")


@pytest.mark.parametrize("what", ["absent", "folder", "file"])
def test_a_store_that_is_not_one(run, tmp_path: Path, what: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("store")
    refused(run("inspect", what), what)


def test_verify_finds_a_flipped_bit_and_repair_mends_it(run, store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    assert run("verify", "copy")[0] == 0
    file = next((tmp_path / "copy" / "shards").glob("*/features.zarr/embedding/c*"))
    damaged = bytearray(file.read_bytes())
    damaged[5] ^= 1
    file.write_bytes(damaged)
    code, out, _ = run("verify", "copy", "--json")
    assert code == 3
    assert list(json.loads(out)["videos"].values()) == [["embedding"]]
    assert run("verify", "copy", "--repair", "--workers", "1", "--quiet")[0] == 0
    code, out, _ = run("verify", "copy", "--deep", "--sample", "0.3", "--workers", "1", "--json", "--quiet")
    assert (code, json.loads(out)["is_sound"]) == (0, True), out
    assert run("compact", "copy", "--json")[0] == 0


def test_a_failed_video_that_is_taken_away_is_no_failure_any_more(run, tmp_path: Path, clip: Path) -> None:
    (tmp_path / "videos" / "a").mkdir(parents=True)
    shutil.copy(clip, tmp_path / "videos" / "a" / "good.mp4")
    (tmp_path / "videos" / "a" / "bad.mp4").write_text("no video")
    assert run("extract", "videos", "--store", "s", *TINY)[0] == 3
    (tmp_path / "videos" / "a" / "bad.mp4").unlink()
    assert run("extract", "videos", "--store", "s", *TINY)[0] == 0


def test_a_sweep_prints_its_table_and_its_runs_are_checkpoints(run, store: Path) -> None:
    words = ("sweep", "temporal_transformer", "--store", store, "--out", "runs", "--quiet", "--set", "epochs=1")
    code, out, err = run(*words, "--set", "lr=1e-3,1e-4", "--set", "layers=1,2", "--set", "heads=2", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["n_runs"], report["n_diverged"], sum(found["best"] for found in report["runs"])) == (4, 0, 1)
    assert {tuple(found["settings"]) for found in report["runs"]} == {("layers", "lr")}
    assert run("eval", "closed_set", "--store", store, "--checkpoint", report["runs"][0]["run"])[0] == 0
    code, out, _ = run(*words, "--set", "lr=1e-3,1e30", "--set", "heads=2", "--set", "warmup_epochs=0")
    assert "| best | temporal_transformer" in out
    assert code == (3 if "diverged" in out else 0)
    refused(run(*words, "--set", "lrr=1"), "lr")
    refused(run("sweep", "prototypes", "--store", store, "--out", "runs"), "nothing to train", "eval few_shot")
    refused(
        run("train-head", "temporal_transformer", "--store", store, "--out", "r", "--set", "lr=1,2"), "coldframe sweep"
    )


def test_the_short_form_of_no_recipe_is_refused(run, store: Path) -> None:
    refused(run("train-head", "mean_pool", "--store", store, "--out", "r", "--short"), "--config")


def test_a_sweep_of_no_head_is_refused(run, store: Path) -> None:
    refused(run("sweep", ",", "--store", store, "--out", "r"), "HEAD,HEAD")


def test_a_list_that_is_cut_says_so(run) -> None:
    refused(run("recipes", "xyzzy"), "There are: ", " more.")


@pytest.mark.parametrize("reach", [9, -99])
def test_a_reach_that_the_tower_has_not_is_refused_by_its_name(run, store: Path, reach: int) -> None:
    words = ("train-head", "ez_clip", "--store", store, "--out", "r", "--set", f"reach={reach}")
    refused(run(*words), "impossible reach into a tower of 4 blocks", f"found {reach}")


def test_eval_wants_one_head(run, store: Path) -> None:
    refused(run("eval", "closed_set", "--store", store), "--checkpoint", "--head")


def test_eval_of_a_run_takes_no_settings(run, store: Path) -> None:
    words = ("eval", "few_shot", "--store", store, "--checkpoint", "r", "--metric", "otam")
    refused(run(*words), "a run knows its settings", "--metric")


def test_too_few_classes_for_the_episodes(run, store: Path) -> None:
    assert EpisodeSpec().n_way == 5
    refused(run("eval", "few_shot", "--store", store, "--head", "prototypes"), "5", "2")


def test_python_cli_py_is_the_same_program() -> None:
    root = Path(__file__).resolve().parent.parent
    done = [
        subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout
        for command in (
            [sys.executable, str(root / "cli.py"), "--help"],
            [str(Path(sys.executable).parent / "coldframe"), "--help"],
        )
    ]
    assert done[0] == done[1]


@pytest.mark.parametrize("words", [("extract", "--foo"), ("nothing",), ("extract",), ("plan", "v", "--frames", "x")])
def test_words_that_it_does_not_know_take_one_line(run, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert "--help" in err


def test_an_error_is_json_too_where_that_was_asked_for(run) -> None:
    code, out, err = run("inspect", "nowhere", "--json")
    assert code == 2
    assert err == f"error: {json.loads(out)['error']}\n"


@pytest.mark.parametrize("words", [
    ("extract", "v", "--store", ""), ("extract", ""), ("inspect", ""), ("manifest", "folder", "v", "--out", ""),
    ("train-head", "linear_probe", "--store", "s", "--out", ""), ("eval", "closed_set", "--store", ""),
])  # fmt: skip
def test_an_empty_path_is_not_the_current_folder(run, words: tuple[str, ...], tmp_path: Path) -> None:
    refused(run(*words), "a path is empty")
    assert not list(tmp_path.iterdir())


def test_draws_without_the_other_settings_are_refused_with_all_of_them(run, store: Path) -> None:
    asked = ("extract", store.parent / "videos", "--store", "random", *TINY)
    settings = (
        "--sampling",
        "random",
        "--crops",
        "random",
        "--flip",
        "--seed",
        "3",
        "--frames",
        "2",
        "--dtype",
        "float32",
    )
    assert run(*asked, *settings, "--features", "embedding")[0] == 0
    for command in ("extract", "plan"):
        answer = run(command, *asked[1:], "--draws", "3")
        refused(answer, "nothing random", "--draws 3", "--crops random", "--flip", "--seed 3", "--dtype float32")
    words = shlex.split(answer[2].partition("coldframe extract ")[2])
    code, _, err = run("extract", *words, "--quiet", "--workers", "1")
    assert code == 0, err
    assert FeatureStore.open(Path("random")).spec.frames.draws == 3
    refused(run(*asked[:3], "elsewhere", *TINY, "--draws", "3"), "nothing random")


@pytest.mark.parametrize("device", ["cuda:99", "meta", "mps", "far"])
def test_a_device_that_is_not_there(run, store: Path, device: str) -> None:
    refused(run("extract", store.parent / "videos", "--store", "s", "--device", device, *TINY), "device")


def test_a_file_that_was_replaced_is_extracted_again(run, tmp_path: Path, clip: Path) -> None:
    (tmp_path / "videos" / "a").mkdir(parents=True)
    (tmp_path / "videos" / "b").mkdir(parents=True)
    for name in ("a/0.mp4", "b/1.mp4"):
        shutil.copy(clip, tmp_path / "videos" / name)
    assert run("extract", "videos", "--store", "s", *TINY)[0] == 0
    write_video(tmp_path / "videos" / "b" / "1.mp4", plan_clips(4)[3].draw(n_frames=24, size_px=64), fps=12)
    code, out, _ = run("extract", "videos", "--store", "s", "--json", *TINY)
    assert (code, json.loads(out)["changed"], json.loads(out)["n_written"]) == (0, ["b/1.mp4"], 1)
    assert json.loads(run("extract", "videos", "--store", "s", "--json", *TINY)[1])["n_written"] == 0
    opened = FeatureStore.open(tmp_path / "s")
    assert not np.allclose(opened.read("embedding", "a/0.mp4"), opened.read("embedding", "b/1.mp4"), atol=0.01)


@pytest.mark.parametrize(
    "options",
    [("--batch", "0"), ("--worker-memory", "nan"), ("--worker-memory", "inf"), ("--sampling", "fps", "--fps", "0"),
     ("--sampling", "fps", "--fps", "inf"), ("--sampling", "dense", "--stride", "0"), ("--min-fraction", "nan", "--on-damage",
     "salvage"), ("--min-fraction", "2", "--on-damage", "salvage"), ("--draws", "3")],
)  # fmt: skip
def test_options_that_cannot_be_meant(run, store: Path, options: tuple[str, ...]) -> None:
    refused(run("extract", store.parent / "videos", "--store", "s", *options, *TINY))


def test_another_spec_is_refused_with_the_command_of_the_stores_own(run, store: Path) -> None:
    answer = run("extract", store.parent / "videos", "--store", store, "--frames", "4", *TINY)
    refused(answer, "n_frames", "coldframe extract", "--frames 8")


def test_another_split_of_the_same_videos_is_told(run, store: Path, tmp_path: Path) -> None:
    shutil.copytree(store.parent, tmp_path / "all")
    manifest = FeatureStore.open(store).manifest
    records = tuple(dataclasses.replace(r, split="test" if r.split == "val" else r.split) for r in manifest.records)
    dataclasses.replace(manifest, records=records).write(tmp_path / "m.csv")
    code, out, err = run("extract", "m.csv", "--store", "all/store", "--features", "embedding", *TINY)
    assert code == 0, err
    assert "2 videos have another label, split or group" in out
