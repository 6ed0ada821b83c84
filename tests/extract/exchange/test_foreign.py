"""Which arrays of somebody's file are the videos, and what the numbers are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.data_manifests.records import ManifestError
from coldframe.extract.exchange.foreign import understand
from coldframe.extract.exchange.foreign_labels import Reading
from coldframe.extract.exchange.parcels import Leaf, Parcel


def frames(*shape: int, dtype: str = "float32", value: float = 1) -> np.ndarray:
    return np.full(shape, value, dtype)


@pytest.fixture
def read(tmp_path: Path):
    """What is understood of arrays by their names."""
    source = tmp_path / "f.npz"
    source.write_bytes(b"of these bytes the tower's name is made")

    def call(arrays: dict[str, np.ndarray], given=None, **reading: str) -> Parcel:
        leaves = {name: Leaf(x.shape, x.dtype, x.__getitem__) for name, x in arrays.items()}
        parcel, call.notes = understand(leaves, Reading(**reading), source, given)
        return parcel

    return call


def test_an_array_a_video(read) -> None:
    parcel = read({"b": frames(2, 4, value=2), "a": frames(3, 4), "number": np.array(7)})
    assert (parcel.ok, parcel.features) == (["a", "b"], ("embedding",))
    assert {i: row.n_frames for i, (row,) in parcel.rows.items()} == {"a": 3, "b": 2}
    assert {row.decoder for (row,) in parcel.rows.values()} == {"imported"}
    np.testing.assert_array_equal(parcel.read("b", 0)["embedding"], frames(2, 4, value=2))
    assert np.isnan(parcel.read("b", 0)["timestamps_s"]).tolist() == [True, True]
    assert (parcel.spec.frames.describe(), parcel.spec.dtype, parcel.shape.embed_dim) == ("as imported", "float32", 4)


def test_a_video_of_one_frame(read) -> None:
    parcel = read({"c/a": frames(4), "c/b": frames(4)})
    assert parcel.read("c/a", 0)["embedding"].shape == (1, 4)


def test_videos_in_class_groups(read) -> None:
    assert read({"wave/a": frames(2, 4), "clap/b": frames(2, 4)}).ok == ["clap/b", "wave/a"]


def test_a_group_a_video(read) -> None:
    arrays = {f"{c}/v{i}/{n}": frames(2, 4) for c in ("wave", "clap") for i in range(2) for n in ("rgb", "flow")}
    with pytest.raises(ConfigError, match=r"several arrays; found flow, rgb\. Choose: --dataset"):
        read(arrays)
    parcel = read(arrays, dataset="flow")
    assert parcel.ok == ["clap/v0", "clap/v1", "wave/v0", "wave/v1"]
    assert read(arrays, dataset=".").ok == sorted(arrays)
    with pytest.raises(UnknownName, match="Did you mean flow"):
        read(arrays, dataset="flwo")


def test_names_that_repeat_in_every_class_are_videos_where_the_manifest_says_so(read, toy) -> None:
    arrays = {f"{c}/{i}": frames(2, 4) for c in ("wave", "clap") for i in (1, 2)}
    with pytest.raises(ConfigError, match=r"several arrays; found 1, 2\. .*or \. if each is a video"):
        read(arrays)
    assert read(arrays, given=toy.manifest(arrays)).ok == sorted(arrays)


def test_a_group_that_holds_other_arrays_too(read) -> None:
    arrays = {"v1/features": frames(9, 4), "v1/gtscore": frames(9), "v1/picks": np.arange(9),
              "v2/features": frames(5, 4), "v2/gtscore": frames(5), "v2/picks": np.arange(5)}  # fmt: skip
    assert read(arrays).ok == ["v1", "v2"]
    assert "v1/gtscore" in " ".join(read.notes)
    assert read({"only/features": frames(9, 4)}).ok == ["only"]


@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 4)])
def test_all_videos_in_one_array(read, shape: tuple[int, ...]) -> None:
    bank = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    parcel = read({"x": bank, "ids": np.array(["c", "a", "b"]), "title": np.array(["1", "2", "3"])})
    np.testing.assert_array_equal(parcel.read("a", 0)["embedding"], bank[1].reshape(-1, 4))
    assert "features from x, ids from ids" in read.notes
    parcel = read({"x": bank, "number": np.array([7, 5, 6]), "note": np.array(["r", "r", "s"])}, ids="number")
    assert parcel.ok == ["5", "6", "7"]


def test_ids_may_be_bytes_but_not_any(read) -> None:
    assert read({"x": frames(2, 1, 4), "ids": np.array(["é".encode(), b"b"])}).ok == ["b", "é"]
    with pytest.raises(ConfigError, match="not UTF-8"):
        read({"x": frames(2, 1, 4), "ids": np.array([b"\xff", b"b"])})


def test_ids_that_cannot_be_are_refused(read) -> None:
    bank = frames(3, 2, 4)
    with pytest.raises(ConfigError, match="nothing says which they are; found x float32"):
        read({"x": bank})
    with pytest.raises(ConfigError, match="could be the ids; found one, two"):
        read({"x": bank, "one": np.array(list("abc")), "two": np.array(list("def"))})
    with pytest.raises(ConfigError, match=r"2 different values in \[3\]; expected 3 different"):
        read({"x": bank, "ids": np.array(list("aab"))}, ids="ids")
    with pytest.raises(UnknownName, match="array of ids"):
        read({"x": bank, "ids": np.array(list("abc"))}, ids="names")
    with pytest.raises(ConfigError, match="text or whole numbers"):
        read({"x": bank, "w": np.arange(3.0)}, ids="w")
    with pytest.raises(ConfigError, match="could be the features; found x, z"):
        read({"x": bank, "z": bank, "ids": np.array(list("abc"))})
    with pytest.raises(ManifestError, match="leave the root"):
        read({"x": bank, "ids": np.array(["../a", "b", "c"])})


def test_tokens(read) -> None:
    parcel = read({"x": frames(2, 3, 5, 6), "ids": np.array(["a", "b"])}, feature="tokens.12")
    assert (parcel.features, parcel.shape.grid, parcel.shape.width) == (("tokens.12",), (2, 2), 6)
    assert parcel.read("b", 0)["tokens.12"].shape == (3, 5, 6)
    assert read({"a": frames(3, 7, 6), "b": frames(1, 7, 6)}, feature="tokens.3").shape.grid == (1, 6)
    with pytest.raises(ConfigError, match="without a class token; found 4"):
        read({"a": frames(3, 4, 6)}, feature="tokens.3")
    with pytest.raises(ConfigError, match="For tokens of single videos: --as tokens"):
        read({"a": frames(3, 5, 6)})


def test_layers_of_a_tower_that_nobody_knows(read) -> None:
    parcel = read({"a": frames(3, 128)}, feature="cls.11")
    assert (parcel.features, parcel.shape.layers, parcel.shape.heads) == (("cls.11",), 11, 2)
    with pytest.raises(ConfigError, match="counts from the last block"):
        read({"a": frames(3, 6)}, feature="cls.-1")
    for name in ("pixels", "cls", "cls.x", "embeding"):
        with pytest.raises(UnknownName):
            read({"a": frames(3, 6)}, feature=name)


def test_the_tower_of_an_unknown_origin_is_the_file(read, tmp_path: Path) -> None:
    one = read({"a": frames(3, 6)}).spec.tower
    assert (one.model, one.pretrained) == ("imported", "f.npz")
    (tmp_path / "f.npz").write_bytes(b"other bytes")
    assert read({"a": frames(3, 6)}).spec.tower.weights_sha256 != one.weights_sha256


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "found no array"),
        ({"a": np.ones((3, 4), np.int64)}, "no array holds embedding features; found a int64"),
        ({"a": np.ones(3, object)}, "a pickled, which is never loaded"),
        ({"a": frames(2, 4), "b": frames(2, 5)}, r"different sizes; found \[2, 5\] of b; expected \[4\]"),
        ({"a": frames(2, 4), "b": frames(0, 4)}, "'b' is empty"),
        ({"x": frames(0, 2, 4), "ids": np.array([], str)}, "no video in it"),
        ({"a": frames(2, 3, 4, 5, 6)}, "no array holds"),
    ],
)
def test_arrays_that_are_no_features(read, arrays, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(arrays)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(read, bad: float) -> None:
    parcel = read({"a": frames(2, 4), "b": np.array([[0, bad]], np.float32).repeat(2, 1)})
    parcel.read("a", 0)
    with pytest.raises(ConfigError, match="'b' has numbers that are not finite"):
        parcel.read("b", 0)


def test_numbers_are_stored_as_they_are_or_as_asked(read) -> None:
    for given, stored in (("float16", "float16"), (">f4", "float32"), ("float64", "float32")):
        assert read({"a": frames(2, 4, dtype=given)}).spec.dtype == stored
    assert read({"a": frames(2, 4)}, dtype="bfloat16").read("a", 0)["embedding"].dtype == np.float32
    with pytest.raises(ConfigError, match="'a' has numbers that float16 cannot hold"):
        read({"a": frames(2, 4, value=1e5)}, dtype="float16").read("a", 0)
    with pytest.raises(UnknownName, match="dtype"):
        read({"a": frames(2, 4)}, dtype="int8")


def test_options_that_would_say_nothing_are_refused(read, toy) -> None:
    with pytest.raises(ConfigError, match="Leave out --labels"):
        read({"a": frames(2, 4)}, given=toy.manifest(["a"]), group="player")
    with pytest.raises(ConfigError, match="Add --model"):
        read({"a": frames(2, 4)}, pretrained="openai")
