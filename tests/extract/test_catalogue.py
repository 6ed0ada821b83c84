"""Which shard speaks for a video, and what a folder must have to be a store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coldframe.extract.arrays import StoreError
from coldframe.extract.catalogue import Catalogue, Header
from coldframe.extract.shards import Shard, VideoRow


def shard(number: int, arrays: tuple[str, ...], view: int = 0, **rows: str) -> Shard:
    """Rows by id: a content hash, or `failed`."""
    made = [
        VideoRow(i, "failed" if c == "failed" else "ok", n_frames=1, content_hash=c, view=view) for i, c in rows.items()
    ]
    return Shard(Path(f"{number:05d}-00000000"), tuple(made), arrays)


def places(catalogue: Catalogue) -> dict[str, dict[str, int]]:
    """The shard that holds each array of the first views."""
    return {
        name: {i: place[0] for (i, view), place in held.items() if not view} for name, held in catalogue.holders.items()
    }


def test_an_added_feature_leaves_the_others() -> None:
    catalogue = Catalogue([shard(0, ("x",), a="1", b="1"), shard(1, ("y",), a="1")])
    assert places(catalogue) == {"x": {"a": 0, "b": 0}, "y": {"a": 1}}
    assert catalogue.newest == {("a", 0): (1, 0), ("b", 0): (0, 1)}


def test_the_newer_of_two_shards_wins() -> None:
    catalogue = Catalogue([shard(0, ("x",), a="1", b="1"), shard(1, ("x",), b="1")])
    assert places(catalogue) == {"x": {"a": 0, "b": 1}}


def test_another_content_makes_older_features_void() -> None:
    catalogue = Catalogue([shard(0, ("x", "y"), a="1", b="1"), shard(1, ("x",), a="2")])
    assert places(catalogue) == {"x": {"a": 1, "b": 0}, "y": {"b": 0}}


def test_views_are_added_and_void_together() -> None:
    catalogue = Catalogue([shard(0, ("x",), a="1"), shard(1, ("x",), view=1, a="1"), shard(2, ("x",), view=2, a="1")])
    assert list(catalogue.views("a")) == [0, 1, 2]
    assert catalogue.holders["x"]["a", 2] == (2, 0)
    catalogue.add(shard(3, ("x",), a="2"))
    assert list(catalogue.views("a")) == [0]
    assert catalogue.holders["x"] == {("a", 0): (3, 0)}


def test_a_newer_failure_is_told_and_takes_nothing_away() -> None:
    catalogue = Catalogue([shard(0, ("x",), a="1"), shard(1, ("y",), a="failed")])
    assert [row.video_id for row in catalogue.failures()] == ["a"]
    assert places(catalogue) == {"x": {"a": 0}}
    catalogue.add(shard(2, ("y",), a="1"))
    assert catalogue.failures() == []
    assert places(catalogue) == {"x": {"a": 0}, "y": {"a": 2}}


def test_a_header_comes_back(toy) -> None:
    toy.path.mkdir()
    header = Header(toy.spec("bfloat16"), toy.shape, ("embedding",), "f" * 16, "2030-01-01", "coldframe 9")
    header.write(toy.path)
    assert Header.read(toy.path) == header
    assert header.frame_shape("tokens.1") == (5, 6)
    assert (header.dtype("tokens.1"), header.frame_bytes("tokens.1")) == ("bfloat16", 60)
    assert (header.dtype("pixels"), header.frame_bytes("pixels")) == ("uint8", 192)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "version 99; expected version 1"),
        ({"dtype": "float32"}, "was edited"),
        ({"frames": None}, "damaged"),
    ],
)
def test_a_header_of_another_kind_is_refused(toy, change: dict, message: str) -> None:
    toy.path.mkdir()
    Header(toy.spec(), toy.shape, (), "f" * 16, "2030-01-01", "coldframe 9").write(toy.path)
    file = toy.path / "store.json"
    data = json.loads(file.read_text())
    data["spec"] |= change
    file.write_text(json.dumps(data))
    with pytest.raises(StoreError, match=message):
        Header.read(toy.path)
    file.write_text(file.read_text()[:-30])
    with pytest.raises(StoreError, match="damaged"):
        Header.read(toy.path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such folder"),
        ("", "it is a file"),
        ("notes.txt", "has no store.json"),
        ("head.safetensors", "looks like a checkpoint"),
        ("wave/1.MP4", "coldframe extract"),
    ],
)
def test_what_is_not_a_store_is_said_to_be_what_it_is(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "place"
    if content == "":
        path.touch()
    elif content:
        (path / content).parent.mkdir(parents=True)
        (path / content).touch()
    with pytest.raises(StoreError, match=message):
        Header.read(path)
