"""HDF5 of ours: how it lies, and what it says when it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.arrays import StoreError
from coldframe.extract.exchange import export_store, hdf5, import_features
from coldframe.extract.specs import FeatureSpec
from coldframe.extract.store import FeatureStore

IDS = ["clap/a.mp4", "clap/b.mp4", "wave/a.mp4"]


@pytest.fixture
def exported(toy, tmp_path: Path) -> Path:
    store = toy.write(IDS, ["embedding", "cls.2"], failed={IDS[2]: "no video stream"})
    export_store(store, tmp_path / "f.h5", quiet=True)
    return tmp_path / "f.h5"


def test_a_video_is_a_group_that_its_id_names(toy, exported: Path) -> None:
    with h5py.File(exported) as file:
        clip = file["clap/b.mp4"]
        np.testing.assert_array_equal(clip["embedding"][()], toy.numbers("clap/b.mp4", "embedding").astype(np.float16))
        np.testing.assert_array_equal(file["clap/b.mp4/timestamps_s"][()], np.arange(3) / 25)
        assert (clip.attrs["label"], clip.attrs["split"], clip.attrs["decoder"]) == ("clap", "train", "pyav")
        assert (clip.attrs["n_frames"], clip.attrs["status"]) == (3, "ok")
        failed = file[IDS[2]]
        assert (failed.attrs["status"], failed.attrs["reason"], len(failed)) == ("failed", "no video stream", 0)
        assert FeatureSpec.from_json(json.loads(file.attrs["spec"])) == toy.spec()
        assert json.loads(file.attrs["class_names"]) == ["wave", "clap"]


def test_bfloat16_is_its_bits_and_says_so(toy, tmp_path: Path) -> None:
    export_store(toy.write(IDS, ["embedding"], dtype="bfloat16"), tmp_path / "f.h5", quiet=True)
    with h5py.File(tmp_path / "f.h5") as file:
        array = file[IDS[0]]["embedding"]
        assert (array.dtype, array.attrs["dtype"]) == (np.uint16, "bfloat16")


def test_an_id_may_continue_another_but_not_into_its_arrays(toy, tmp_path: Path) -> None:
    store = toy.write(["a", "a/b", "a/b/c"], ["embedding"])
    export_store(store, tmp_path / "f.h5", quiet=True)
    import_features(tmp_path / "f.h5", tmp_path / "back", quiet=True)
    back = FeatureStore.open(tmp_path / "back")
    assert back.ids == store.ids
    assert back.rows == store.rows


@pytest.mark.parametrize("other", ["a/embedding", "a/timestamps_s/b", "a/embedding@1"])
def test_an_id_in_anothers_array_is_refused(toy, tmp_path: Path, other: str) -> None:
    store = toy.write(["a", other], ["embedding"])
    with pytest.raises(ConfigError, match="would lie where 'a' has its"):
        export_store(store, tmp_path / "f.h5", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_file_cut_short_is_named(exported: Path, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    exported.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=r"f\.h5 cannot be read as HDF5: .*truncated"):
        import_features(exported, tmp_path / "back", quiet=True)


def test_a_file_that_is_no_hdf5_is_named(tmp_path: Path) -> None:
    (tmp_path / "f.h5").write_text("hello")
    with pytest.raises(StoreError, match=r"f\.h5 cannot be read as HDF5"):
        import_features(tmp_path / "f.h5", tmp_path / "back", quiet=True)


def test_changed_numbers_are_found(exported: Path, tmp_path: Path) -> None:
    with h5py.File(exported, "a") as file:
        file["clap/a.mp4/embedding"][0, 0] += 1
    with pytest.raises(StoreError, match=r"clap/a\.mp4/embedding of .* is damaged"):
        import_features(exported, tmp_path / "back", quiet=True)


@pytest.mark.parametrize(
    ("where", "attribute", "value", "words"),
    [
        ("/", "fingerprint", "0" * 16, "was edited"),
        ("/", "coldframe_export", 99, "does not read; found 99"),
        ("/", "spec", "{", "cannot be read as HDF5"),
        ("clap/a.mp4", "label", "jump", "cannot be read as HDF5"),
        ("clap/a.mp4", "split", None, "cannot be read as HDF5"),
    ],
)
def test_damaged_facts_are_one_line(exported: Path, tmp_path: Path, where, attribute, value, words) -> None:
    with h5py.File(exported, "a") as file:
        if value is None:
            del file[where].attrs[attribute]
        else:
            file[where].attrs[attribute] = value
    with pytest.raises((StoreError, ConfigError), match=words):
        import_features(exported, tmp_path / "back", quiet=True)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("kind", ["soft", "external", "virtual", "raw"])
def test_numbers_that_lie_elsewhere_are_not_left_out_in_silence(tmp_path: Path, kind: str) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["a"] = np.ones((2, 3), np.float32)
        if kind == "virtual":
            layout = h5py.VirtualLayout((2, 3), np.float32)
            layout[:] = h5py.VirtualSource("gone.h5", "a", (2, 3))
            file.create_virtual_dataset("b", layout)
        elif kind == "raw":
            file.create_dataset("b", (2, 3), np.float32, external=[(tmp_path / "raw", 0, 24)])
        else:
            file["b"] = h5py.SoftLink("/a") if kind == "soft" else h5py.ExternalLink("gone.h5", "/a")
    with pytest.raises(ConfigError, match="not followed; found b"):
        import_features(tmp_path / "f.h5", tmp_path / "back", quiet=True)


def test_leaves_are_every_array_of_a_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["a/x"] = np.zeros((2, 3), np.float32)
        file["names"] = ["é", "b"]
        file["fixed"] = np.array([b"a", b"bc"])
        file["same"] = file["a/x"]
        file["nothing"] = h5py.Empty("f4")
    with hdf5.opened(tmp_path / "f.h5") as file:
        leaves = hdf5.leaves(file)
        assert {name: (leaf.shape, leaf.dtype.kind) for name, leaf in leaves.items()} == {
            "a/x": ((2, 3), "f"), "same": ((2, 3), "f"), "names": ((2,), "U"), "fixed": ((2,), "U")}  # fmt: skip
        assert leaves["names"].read(()).tolist() == ["é", "b"]
        assert leaves["a/x"].read(1).shape == (3,)
