"""NumPy's files: listed without being read, and never unpickled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.arrays import StoreError
from coldframe.extract.exchange.numpy_files import leaves


def test_a_folder_of_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c" / "v1.0.npy", np.arange(6.0).reshape(2, 3))
    np.savez(tmp_path / "one.npz", np.ones((1, 3)))
    np.savez_compressed(tmp_path / "two.npz", features=np.ones((4, 3)), label=np.array(2))
    found = leaves(tmp_path)
    assert {name: leaf.shape for name, leaf in found.items()} == {
        "c/v1.0": (2, 3), "one": (1, 3), "two/features": (4, 3), "two/label": ()}  # fmt: skip
    assert found["c/v1.0"].read(1).tolist() == [3, 4, 5]
    assert found["two/features"].read(()).sum() == 12


def test_an_npz_by_itself(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", x=np.zeros((2, 3), np.float16), name=["a", "b"])
    found = leaves(tmp_path / "f.npz")
    assert {name: (leaf.shape, leaf.dtype.kind) for name, leaf in found.items()} == {
        "x": ((2, 3), "f"), "name": ((2,), "U")}  # fmt: skip


class Boom:
    """Would be noticed if it were unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", x=np.zeros((2, 3)), meta=np.array([Boom()], dtype=object))
    meta = leaves(tmp_path / "f.npz")["meta"]
    assert meta.dtype.kind == "O"
    with pytest.raises(StoreError, match="without pickled objects"):
        meta.read(())
    np.save(tmp_path / "g.npy", np.array([Boom()], dtype=object), allow_pickle=True)
    with pytest.raises(StoreError, match="without pickled objects"):
        leaves(tmp_path / "g.npy")


@pytest.mark.parametrize("name", ["f.npy", "f.npz"])
@pytest.mark.parametrize("kept", [0, 20, 150])
def test_files_cut_short_are_named(tmp_path: Path, name: str, kept: int) -> None:
    file = tmp_path / name
    (np.save if name == "f.npy" else np.savez)(file, np.zeros((20, 3)))
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(StoreError, match=rf"{name} cannot be read"):
        leaves(tmp_path)


def test_numbers_that_do_not_unpack_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", x=np.arange(300.0))
    content = bytearray((tmp_path / "f.npz").read_bytes())
    content[1000] ^= 1
    (tmp_path / "f.npz").write_bytes(content)
    with pytest.raises(StoreError, match=r"f\.npz cannot be read"):
        leaves(tmp_path / "f.npz")["x"].read(())


def test_twins_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    np.savez(tmp_path / "a.npz", np.zeros((2, 3)))
    with pytest.raises(ConfigError, match=r"of one name; found .*a"):
        leaves(tmp_path)


@pytest.mark.parametrize(("kind", "other"), [("npz", "npy"), ("npy", "npz")])
def test_one_kind_by_the_name_of_the_other(tmp_path: Path, kind: str, other: str) -> None:
    (np.savez if kind == "npz" else np.save)(tmp_path / f"a.{kind}", np.zeros((2, 3)))
    (tmp_path / f"a.{kind}").rename(tmp_path / f"a.{other}")
    with pytest.raises(StoreError, match="by another name"):
        leaves(tmp_path)
