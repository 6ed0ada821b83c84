from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coldframe.data_manifests import Manifest, ManifestError, UnknownName, VideoRecord
from coldframe.data_manifests.records import relative_to_root


def record(path: str, label: int | None = 0, split: str = "", **others: object) -> VideoRecord:
    return VideoRecord(**{"video_id": path, "path": path, "label": label, "split": split, **others})  # type: ignore[arg-type]


def manifest(*records: VideoRecord, classes: tuple[str, ...] = ("run",), root: str = "/data") -> Manifest:
    return Manifest("clips", root, classes, records)


TWO = manifest(record("run/a.mp4", 0, "train"), record("sit/b.mp4", 1, "test"), classes=("run", "sit"))


def refusal(bad: Manifest) -> str:
    with pytest.raises(ManifestError) as error:
        bad.check()
    return str(error.value)


def test_a_good_manifest_is_returned_by_its_check() -> None:
    assert TWO.check() is TWO


def test_views_by_id_label_and_split() -> None:
    made = manifest(record("a.mp4", 1, "train"), record("b.mp4", None), record("c.mp4", 0, "val"), classes=("x", "y"))
    assert made.ids == ("a.mp4", "b.mp4", "c.mp4")
    assert made.labels.dtype == np.int64
    assert made.labels.tolist() == [1, -1, 0]
    assert made.by_id["c.mp4"] is made.records[2]
    assert made.split("train").ids == ("a.mp4",)
    assert made.split("train").class_names == ("x", "y")
    assert made.split("test").records == ()


def test_every_caption_can_be_a_class_of_its_own() -> None:
    made = manifest(
        record("a.mp4", 0, "train", captions=("a dog barks", "a dog")),
        record("b.mp4", 0, "train"),
        record("c.mp4", None, "train", captions=("a cat", " a dog ")),
        record("d.mp4", 0, "test", captions=("rain",)),
    )
    view = made.split("train").by_caption()
    assert view.class_names == ("a dog barks", "a dog", "a cat")
    assert view.ids == ("a.mp4", "a.mp4", "c.mp4", "c.mp4")
    assert view.labels.tolist() == [0, 1, 2, 1]
    assert [r.captions for r in view.records] == [("a dog barks",), ("a dog",), ("a cat",), ("a dog",)]
    assert made.by_caption().class_names[-1] == "rain"
    with pytest.raises(ManifestError, match="no captions; found 1 videos"):
        manifest(record("b.mp4")).by_caption()


def test_shared_labels_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        TWO.labels[0] = 1


def test_a_misspelt_split_is_not_an_empty_one() -> None:
    with pytest.raises(UnknownName, match="Did you mean test"):
        TWO.split("tset")


def test_fingerprint_is_of_contents_not_of_place_or_order() -> None:
    moved = replace(TWO, name="other", root="/elsewhere", records=TWO.records[::-1])
    assert moved.fingerprint == TWO.fingerprint
    assert len(TWO.fingerprint) == 16
    assert int(TWO.fingerprint, 16) >= 0


@pytest.mark.parametrize(
    "change",
    [
        {"video_id": "run/c.mp4"},
        {"label": 1},
        {"label": None},
        {"split": "val"},
        {"group": "g1"},
        {"captions": ("a man runs",)},
        {"start_s": 1.0},
        {"end_s": 2.0},
    ],
)
def test_fingerprint_changes_with(change: dict[str, object]) -> None:
    changed = replace(TWO, records=(dataclasses.replace(TWO.records[0], **change), TWO.records[1]))  # type: ignore[arg-type]
    assert changed.fingerprint != TWO.fingerprint


def test_fingerprint_changes_with_class_names_and_their_order() -> None:
    assert replace(TWO, class_names=("sit", "run")).fingerprint != TWO.fingerprint
    assert replace(TWO, class_names=("run", "sit", "fly")).fingerprint != TWO.fingerprint


def test_fingerprint_is_the_same_tomorrow() -> None:
    assert TWO.fingerprint == "b1335e5f2adfd10b"


def test_files_are_found_below_the_root_and_the_missing_are_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/a.mp4").touch()
    made = manifest(
        record("run/a.mp4"), record("run/b.mp4"), record("run"), record("memory://gone/c.mp4"), root=str(tmp_path)
    )
    assert made.path_of(made.records[0]) == f"{tmp_path}/run/a.mp4"
    assert made.path_of(made.records[3]) == "memory://gone/c.mp4"
    assert made.missing_files() == ["run/b.mp4", "run", "memory://gone/c.mp4"]


def test_description_counts_splits_and_warns_of_torn_groups() -> None:
    made = manifest(
        record("a.mp4", 0, "train", group="p1"), record("b.mp4", 0, "test", group="p1"), record("c.mp4", None)
    )
    text = made.describe()
    assert "3 videos, 1 classes" in text
    assert "1 train · 1 test · 1 in no split · 1 without a label, below /data" in text
    assert made.fingerprint in text
    assert "1 groups lie in more than one split: p1" in text
    assert "note" not in TWO.describe()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b.mp4", "a/b.mp4"),
        ("./a//./b.mp4", "a/b.mp4"),
        ("/data/a.mp4", "a.mp4"),
        ("https://host/a.mp4", "https://host/a.mp4"),
        ("a..b/..c.mp4", "a..b/..c.mp4"),
        ("../a.mp4", None),
        ("a/../../b.mp4", None),
        ("a/../b.mp4", None),
        ("/etc/a.mp4", None),
        ("/data2/a.mp4", None),
        ("/", None),
        ("/data", None),
        (".", None),
        ("a\\b.mp4", None),
        ("https://host/../a.mp4", None),
        ("file:///etc/a.mp4", None),
    ],
)
def test_paths_stay_below_the_root(path: str, expected: str | None) -> None:
    assert relative_to_root(path, "/data") == expected


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (manifest(), ["holds no video"]),
        (manifest(record("a.mp4"), record("../b.mp4")), ["leave the root", "record 2 '../b.mp4'"]),
        (
            manifest(record("a.mp4"), record("b.mp4", video_id="a.mp4")),
            ["duplicate ids", "record 2", "first on record 1"],
        ),
        (manifest(record("a.mp4", 1)), ["outside the class list", "label 1 of 1"]),
        (manifest(record("a.mp4", -1)), ["outside the class list", "label -1"]),
        (manifest(record("a.mp4", 0, "Train")), ["unknown splits", "'Train'", "train, val, test"]),
        (manifest(record("")), ["unusable text", "path ''"]),
        (manifest(record("a\nb.mp4")), ["unusable text", r"'a\nb.mp4'"]),
        (manifest(record("a.mp4", captions=("one\u2028two",))), ["unusable text", "caption"]),
        (manifest(record("a.mp4", group="g\t1")), ["unusable text", "group"]),
        (manifest(record("caf\udce9.mp4")), ["unusable text", r"\udce9"]),
        (manifest(record("a.mp4", start_s=2.0, end_s=2.0)), ["impossible times", "start_s=2.0 end_s=2.0"]),
        (manifest(record("a.mp4", start_s=-1.0)), ["impossible times"]),
        (manifest(record("a.mp4", start_s=math.nan)), ["impossible times"]),
        (manifest(record("a.mp4", end_s=math.inf)), ["impossible times"]),
        (manifest(record("a.mp4"), classes=("run", "sit")), ["no video has", "line 2 of the class list 'sit'"]),
        (manifest(record("a.mp4"), classes=("run ",)), ["unusable class names", "'run '"]),
        (manifest(record("a.mp4"), classes=("run", "run")), ["unusable class names", "first on line 1"]),
        (
            manifest(record("a.mp4", 0, "train"), record("a.mp4", 0, "test", video_id="copy")),
            ["splits overlap", "record 2 'a.mp4' in test (record 1 in train)"],
        ),
        (
            manifest(record("a.mp4", 0, "train"), record("./a.mp4", 0, "val")),
            ["splits overlap", "in val (record 1 in train)"],
        ),
        (
            manifest(record("/data/a.mp4", 0, "train"), record("a.mp4", 0, "val")),
            ["splits overlap"],
        ),
        (
            manifest(record("caf\u00e9.mp4", 0, "train"), record("cafe\u0301.mp4", 0, "test")),
            ["splits overlap"],
        ),
        (
            manifest(record("a.mp4", 0, "train"), record("a.mp4", 0, "train", video_id="copy")),
            ["same video twice", "first on record 1"],
        ),
    ],
)
def test_refused(bad: Manifest, words: list[str]) -> None:
    message = refusal(bad)
    assert all(word in message for word in words), message


def segment(start: float | None, end: float | None, split: str) -> VideoRecord:
    return record("a.mp4", 0, split, video_id=f"a.mp4#{start}-{end}-{split}", start_s=start, end_s=end)


def test_segments_of_one_video_may_touch_and_within_a_split_overlap() -> None:
    manifest(segment(0, 10, "train"), segment(10, 20, "test"), segment(5, 8, "train"), segment(7, 9, "")).check()


@pytest.mark.parametrize(
    "segments",
    [
        [segment(0, 10, "train"), segment(9.5, 20, "test")],
        [segment(9.5, 20, "test"), segment(0, 10, "train")],
        [segment(None, None, "train"), segment(5, 6, "val")],
        [segment(5, None, "train"), segment(100, 101, "val")],
        # a short segment of the same split must not hide the long one before it
        [segment(0, 100, "train"), segment(1, 2, "train"), segment(50, 60, "test")],
    ],
)
def test_segments_of_different_splits_may_not_overlap(segments: list[VideoRecord]) -> None:
    assert "splits overlap" in refusal(manifest(*segments))


def test_a_view_may_have_empty_classes_where_it_says_so() -> None:
    view = TWO.split("train")
    assert view.check(allow_empty_classes=True) is view
    assert "line 2 of the class list 'sit'" in refusal(view)


def test_many_offenders_are_counted_not_listed() -> None:
    message = refusal(manifest(*(record(f"{i}.mp4", 7) for i in range(12))))
    assert "record 5 label 7" in message
    assert "record 6 label" not in message
    assert "and 7 more" in message
