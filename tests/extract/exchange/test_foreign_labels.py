"""Labels, class names, splits and groups: from arrays, from folders, from a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.data_manifests.records import Manifest, VideoRecord
from coldframe.extract.exchange.foreign import understand
from coldframe.extract.exchange.foreign_labels import Reading, matched
from coldframe.extract.exchange.parcels import Leaf

BANK = {"x": np.ones((3, 2, 4), np.float32), "ids": np.array(["b", "a", "c"])}
CLIP = np.ones((2, 4), np.float32)


@pytest.fixture
def read(tmp_path: Path):
    """The manifest that is understood of arrays by their names."""
    source = tmp_path / "f.npz"
    source.write_bytes(b"")

    def call(arrays: dict[str, Any], **reading: Any) -> Manifest:
        leaves = {name: Leaf(np.shape(x), np.asarray(x).dtype, np.asarray(x).__getitem__) for name, x in arrays.items()}
        parcel, call.notes = understand(leaves, Reading(**reading), source, None)
        return parcel.manifest

    return call


def names(manifest: Manifest) -> dict[str, str | None]:
    return {r.video_id: None if r.label is None else manifest.class_names[r.label] for r in manifest.records}


@pytest.mark.parametrize(
    ("arrays", "classes", "expected"),
    [
        ({"y": [1, 0, 1], "classes": ["wave", "clap"]}, ("wave", "clap"), ["clap", "wave", "clap"]),
        ({"y": [1, -1, 1], "classes": ["wave", "clap", "jump"]}, ("wave", "clap", "jump"), ["clap", None, "clap"]),
        ({"labels": ["wave", "clap", "wave"]}, ("clap", "wave"), ["wave", "clap", "wave"]),
        ({"label": ["wave", "", "clap"], "classes": ["wave", "clap"]}, ("wave", "clap"), ["wave", None, "clap"]),
        ({"targets": [10, 9, 10]}, ("9", "10"), ["10", "9", "10"]),
        ({"y": [1.0, 0.0, 1.0]}, ("0", "1"), ["1", "0", "1"]),
    ],
)
def test_labels_beside_one_array(read, arrays, classes, expected) -> None:
    manifest = read(BANK | arrays)
    assert manifest.class_names == classes
    assert list(names(manifest).values()) == expected
    assert any(note.startswith(f"labels from {next(iter(arrays))}") for note in read.notes)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"y": [0, 5, 1], "classes": ["wave", "clap"]}, "not in the list of 2 classes; found 5"),
        ({"y": ["wave", "jump", "clap"], "classes": ["wave", "clap"]}, "lacks; found jump"),
        ({"y": [0.5, 1.0, 2.0]}, "holds no labels; found 0.5"),
        ({"y": [np.nan, 1.0, 2.0]}, "holds no labels; found nan"),
    ],
)
def test_labels_that_cannot_be(read, arrays, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(BANK | arrays)


def test_arrays_that_the_user_names(read) -> None:
    arrays = BANK | {"action": [0, 1, 0], "verbs": ["run", "sit"], "actor": [7, 8, 7], "short": [1, 2]}
    manifest = read(arrays, labels="action", classes="verbs", group="actor")
    assert names(manifest) == {"b": "run", "a": "sit", "c": "run"}
    assert [r.group for r in manifest.records] == ["7", "8", "7"]
    assert "groups from actor" in read.notes
    with pytest.raises(UnknownName, match="actor"):
        read(arrays, group="acter")
    with pytest.raises(ConfigError, match=r"short is not one value a video; found \[2\]; expected \[3\]"):
        read(arrays, labels="short")


def test_one_value_in_each_videos_group(read) -> None:
    arrays = {"v1/features": CLIP, "v1/label": 4, "v1/who": "ann", "v2/features": CLIP, "v2/label": [3], "v2/who": "bo"}
    manifest = read(arrays, group="who")
    assert names(manifest) == {"v1": "4", "v2": "3"}
    assert [r.group for r in manifest.records] == ["ann", "bo"]
    del arrays["v2/label"]
    with pytest.raises(
        ConfigError, match="label is not one value a video; found nothing; expected one value in v2/label"
    ):
        read(arrays)


def test_labels_from_folders(read) -> None:
    assert names(read({"wave/a": CLIP, "clap/x/b": CLIP})) == {"wave/a": "wave", "clap/x/b": "clap"}
    manifest = read({"train/wave/a": CLIP, "validation/wave/b": CLIP, "test/clap/c": CLIP})
    assert [(r.split, r.label) for r in manifest.records] == [("train", 1), ("val", 1), ("test", 0)]
    assert set(names(read({"wave/a": CLIP, "b": CLIP})).values()) == {None}
    assert "no labels: give --labels KEY or --manifest FILE" in read.notes


def test_a_test_split_is_drawn_in_whole_groups(read) -> None:
    bank = {
        "x": np.ones((40, 2, 4), np.float32),
        "ids": np.arange(40),
        "y": np.arange(40) % 2,
        "who": np.arange(40) // 4,
    }
    manifest = read(bank, group="who", ids="ids", test_fraction=0.2)
    assert [sum(r.split == split for r in manifest.records) for split in ("train", "test")] == [32, 8]
    assert len({(r.group, r.split) for r in manifest.records}) == 10
    assert "8 videos drawn for testing, whole groups" in read.notes
    for arrays, words in (({"a": CLIP, "b": CLIP}, "found no labels"), ({"test/w/a": CLIP}, "splits from folders")):
        with pytest.raises(ConfigError, match=words):
            read(arrays, test_fraction=0.2)


def record(video_id: str, path: str) -> VideoRecord:
    return VideoRecord(video_id, path, None)


def test_a_manifest_knows_videos_by_id_path_or_file() -> None:
    rows = (record("1", "wave/a.mp4"), record("clap/b.avi", "clap/b.avi"), record("c", "deep/c.d.mp4"))
    named, notes = matched(Manifest("m", "/", (), rows), ["wave/a", "b", "c", "z"])
    assert named == {"1": "wave/a", "clap/b.avi": "b", "c": "c"}
    assert notes == ("1 videos that the manifest lacks left out: z",)


def test_a_name_that_two_videos_have_names_none() -> None:
    rows = (record("wave/a.mp4", "wave/a.mp4"), record("clap/a.mp4", "clap/a.mp4"))
    manifest = Manifest("m", "/", (), rows)
    with pytest.raises(
        ConfigError, match=r"knows none of the file's videos; found a; expected ids such as wave/a\.mp4"
    ):
        matched(manifest, ["a"])
    with pytest.raises(ConfigError, match=r"'wave/a' and 'wave/a\.mp4' are both"):
        matched(manifest, ["wave/a", "wave/a.mp4"])
