from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from coldframe.data_manifests import ConfigError, Manifest, ManifestError, from_folder


def put(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def refusal(root: Path, **options: object) -> str:
    with pytest.raises((ManifestError, ConfigError)) as error:
        from_folder(root, **options)  # type: ignore[arg-type]
    return str(error.value)


def per_split(made: Manifest, class_name: str) -> dict[str, int]:
    label = made.class_names.index(class_name)
    return dict(Counter(r.split for r in made.records if r.label == label))


def test_one_folder_a_class(tmp_path: Path) -> None:
    root = put(
        tmp_path / "clips",
        "Run_Fast/b.MP4",
        "Run_Fast/a.mp4",
        "Run_Fast/deep/er/a.mp4",
        "läuft 走る/#(1); x!.avi",
        "läuft 走る/2.webm",
        "läuft 走る/notes.txt",
        "loose.mkv",
    )
    made = from_folder(root)
    assert made.class_names == ("Run_Fast", "läuft 走る")
    assert made.ids == (
        "Run_Fast/a.mp4",
        "Run_Fast/b.MP4",
        "Run_Fast/deep/er/a.mp4",
        "loose.mkv",
        "läuft 走る/#(1); x!.avi",
        "läuft 走る/2.webm",
    )
    assert made.labels.tolist() == [0, 0, 0, -1, 1, 1]
    assert [r.path for r in made.records] == list(made.ids)
    assert made.by_id["loose.mkv"].split == ""
    assert (made.name, made.root) == ("clips", str(root))
    assert made.missing_files() == []


def test_folders_of_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    root = put(
        tmp_path, "train/run/a.mp4", "train/sit/a.mp4", "Validation/run/b.mp4", "test/fly/x/a.mp4", "train/c.mp4"
    )
    made = from_folder(root)
    assert made.class_names == ("fly", "run", "sit")
    assert {r.video_id: r.split for r in made.records} == {
        "Validation/run/b.mp4": "val",
        "test/fly/x/a.mp4": "test",
        "train/c.mp4": "train",
        "train/run/a.mp4": "train",
        "train/sit/a.mp4": "train",
    }
    assert [r.label for r in made.records] == [1, 0, None, 1, 2]


def test_videos_without_folders_have_no_label(tmp_path: Path) -> None:
    made = from_folder(put(tmp_path, "b.mp4", "a.gif"))
    assert made.ids == ("a.gif", "b.mp4")
    assert made.class_names == ()
    assert [(r.label, r.split) for r in made.records] == [(None, ""), (None, "")]


def test_the_hidden_is_skipped(tmp_path: Path) -> None:
    root = put(tmp_path, "run/a.mp4", "run/._a.mp4", ".thumbs/t.mp4", "run/.cache/c.mp4", "run/.part.mp4")
    assert from_folder(root).ids == ("run/a.mp4",)


def test_linked_class_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    disk = put(tmp_path / "disk", "a.mp4")
    root = put(tmp_path / "root", "sit/b.mp4")
    (root / "run").symlink_to(disk)
    (root / "sit/up").symlink_to(root)
    assert from_folder(root).ids == ("run/a.mp4", "sit/b.mp4")


def test_drawn_splits_have_their_shares(tmp_path: Path) -> None:
    put(tmp_path, *(f"run/{i}.mp4" for i in range(10)), *(f"sit/{i}.mp4" for i in range(20)))
    put(tmp_path, "one/a.mp4", "two/a.mp4", "two/b.mp4", *(f"three/{i}.mp4" for i in range(3)))
    made = from_folder(tmp_path)
    assert per_split(made, "run") == {"train": 7, "test": 2, "val": 1}
    assert per_split(made, "sit") == {"train": 14, "test": 4, "val": 2}
    assert per_split(made, "one") == {"train": 1}
    assert per_split(made, "two") == {"train": 1, "test": 1}
    assert per_split(made, "three") == {"train": 1, "test": 1, "val": 1}
    assert from_folder(tmp_path) == made
    assert from_folder(tmp_path, seed=1).fingerprint != made.fingerprint


def test_fractions_of_nothing_draw_nothing(tmp_path: Path) -> None:
    put(tmp_path, *(f"run/{i}.mp4" for i in range(10)))
    assert per_split(from_folder(tmp_path, test_fraction=0, val_fraction=0), "run") == {"train": 10}
    assert per_split(from_folder(tmp_path, test_fraction=0.5, val_fraction=0), "run") == {"train": 5, "test": 5}


@pytest.mark.parametrize(("expression", "group"), [(r"/(g\d+)_c\d", "g7"), (r"g\d+", "g7"), (r"^(x)?.*/(g\d+)", "")])
def test_groups_come_from_an_expression(tmp_path: Path, expression: str, group: str) -> None:
    put(tmp_path, *(f"run/g{g}_c{c}.mp4" for g in range(8) for c in range(3)), "x/g1_c1.mp4")
    made = from_folder(tmp_path, group_by=expression)
    assert made.by_id["run/g7_c2.mp4"].group == group


def test_groups_stay_in_one_split_over_all_classes(tmp_path: Path) -> None:
    put(tmp_path, *(f"{action}/{actor}_{i}.mp4" for action in "abcd" for actor in range(9) for i in range(2)))
    made = from_folder(tmp_path, group_by=r"/(\d)_")
    homes = {(r.group, r.split) for r in made.records}
    assert len(homes) == 9
    assert Counter(split for _, split in homes) == {"train": 6, "test": 2, "val": 1}
    assert "note" not in made.describe()


def test_roots_that_cannot_be(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent")
    file = put(tmp_path / "a", "x.mp4") / "x.mp4"
    assert "a folder of videos was expected" in refusal(file)
    (tmp_path / "empty").mkdir()
    assert "no files at all" in refusal(tmp_path / "empty")
    texts = put(tmp_path / "texts", "run/a.txt", "run/b.TXT", "c.jpg", "README")
    message = refusal(texts)
    assert "2 × .txt" in message
    assert "1 × no extension" in message
    assert ".avi .flv" in message


def test_a_class_without_videos_is_named(tmp_path: Path) -> None:
    put(tmp_path, "run/a.mp4", "sit/a.txt", ".git/config")
    message = refusal(tmp_path)
    assert "class folders without a video: sit." in message.replace(";", ".")
    put(tmp_path / "splits", "train/run/a.mp4", "test/sit/a.txt")
    assert "without a video: sit" in refusal(tmp_path / "splits")


def test_splits_beside_classes_are_ambiguous(tmp_path: Path) -> None:
    message = refusal(put(tmp_path, "train/run/a.mp4", "test/run/b.mp4", "extra/c.mp4"))
    assert "test, train beside extra" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test_fraction": 0.7, "val_fraction": 0.3}, "less than 1 together"),
        ({"test_fraction": -0.1}, "0 or more"),
        ({"group_by": "("}, "not a regular expression"),
        ({"group_by": "zzz"}, "matches no video"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, options: dict[str, object], words: str) -> None:
    assert words in refusal(put(tmp_path, "run/a.mp4", "run/b.mp4"), **options)


def test_names_that_no_manifest_can_hold_are_refused(tmp_path: Path) -> None:
    assert "unusable text" in refusal(put(tmp_path / "newline", "run/a\nb.mp4"))
    assert "unusable class names" in refusal(put(tmp_path / "space", "run /a.mp4"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_no_empty_one(tmp_path: Path) -> None:
    put(tmp_path, "run/a.mp4", "sit/b.mp4")
    (tmp_path / "sit").chmod(0)
    try:
        with pytest.raises(PermissionError):
            from_folder(tmp_path)
    finally:
        (tmp_path / "sit").chmod(0o700)


def test_real_clips(shared: Path) -> None:
    root = shared / "data/videos/weizmann"
    if not root.is_dir():
        pytest.skip(f"no real clips at {root}")
    made = from_folder(root, group_by=r"actor\d")
    assert len(made.class_names) == 4
    assert len(made.records) == 72
    assert {len({r.split for r in made.records if r.group == group}) for group in {r.group for r in made.records}} == {
        1
    }
    assert {r.split for r in made.records} == {"train", "val", "test"}
    assert made.missing_files() == []


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a/1.mp4", "a/2.mp4", "a/3.mp4")
    try:
        (tmp_path / "a" / os.fsdecode(b"\xff.mp4")).touch()
    except OSError as error:
        pytest.skip(f"this file system has no such names: {error}")
    assert r"unusable text" in refusal(tmp_path)
