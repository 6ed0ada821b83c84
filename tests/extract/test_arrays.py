"""The raw array file: other libraries read ours, we read theirs, and damage is found."""

from __future__ import annotations

import gc
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorstore
import torch
import zarr
from zarr.codecs import BytesCodec, ZstdCodec

from coldframe.extract.arrays import ArrayFile, BatchMemory, FrameReader, StoreError, checksum, write_arrays

DTYPES = ("float16", "float32", "float64", "uint8", "int64", "uint16")


def numbers(dtype: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def stock(array: Path) -> np.ndarray:
    """What zarr-python reads."""
    return np.asarray(zarr.open_array(array, mode="r")[...])


def read(array: ArrayFile, first: int = 0, n: int | None = None) -> np.ndarray:
    n = array.n_frames - first if n is None else n
    raw = np.empty(n * array.frame_bytes, np.uint8)
    FrameReader().read_into(array, first, raw.data)
    stored = "uint16" if array.dtype == "bfloat16" else array.dtype
    return raw.view(stored).reshape(n, *array.frame_shape)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Five frames [5, 2, 3] of float32."""
    write_arrays(tmp_path / "group", {"x": [numbers("float32", 5, 2, 3)]})
    return tmp_path / "group" / "x"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frame", [(), (4,), (2, 3), (3, 2, 2)])
def test_round_trip_here_and_in_other_libraries(tmp_path: Path, dtype: str, frame: tuple[int, ...]) -> None:
    parts = [numbers(dtype, n, *frame) for n in (2, 1, 4)]
    whole = np.concatenate(parts)
    write_arrays(tmp_path / "group", {"tokens.1": parts})
    array = ArrayFile.open(tmp_path / "group" / "tokens.1")
    assert (array.n_frames, array.frame_shape) == (7, frame)
    assert array.dtype == ("bfloat16" if dtype == "uint16" else dtype)
    np.testing.assert_array_equal(read(array), whole)
    np.testing.assert_array_equal(read(array, 2, 3), whole[2:5])
    np.testing.assert_array_equal(stock(tmp_path / "group" / "tokens.1"), whole)
    kvstore = {"driver": "file", "path": str(tmp_path / "group" / "tokens.1")}
    other = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
    assert other.dtype == whole.dtype
    np.testing.assert_array_equal(other, whole)


def test_bfloat16_is_its_bits_with_an_attribute(tmp_path: Path) -> None:
    tensor = torch.tensor([[1.5, -2.0], [0.0, float("inf")]], dtype=torch.bfloat16)
    write_arrays(tmp_path / "group", {"x": [tensor.view(torch.uint16).numpy()]})
    assert zarr.open_array(tmp_path / "group" / "x", mode="r").attrs["dtype"] == "bfloat16"
    assert torch.equal(torch.from_numpy(stock(tmp_path / "group" / "x")).view(torch.bfloat16), tensor)


def test_big_endian_and_strided_arrays_are_written_as_their_numbers(tmp_path: Path) -> None:
    whole = numbers("float32", 6, 4)
    write_arrays(tmp_path / "group", {"x": [whole[::2].astype(">f4")], "y": [whole[:, ::2]]})
    np.testing.assert_array_equal(read(ArrayFile.open(tmp_path / "group" / "x")), whole[::2])
    np.testing.assert_array_equal(stock(tmp_path / "group" / "y"), whole[:, ::2])


@pytest.mark.parametrize("separator", ["/", "."])
def test_a_file_written_by_zarr_is_read(tmp_path: Path, separator: str) -> None:
    whole = numbers("float16", 6, 2, 3)
    settings = {"shards": whole.shape, "chunks": (1, 2, 3), "compressors": None, "filters": None}
    array = zarr.create_array(
        tmp_path / "x",
        shape=whole.shape,
        dtype="float16",
        chunk_key_encoding={"name": "default", "separator": separator},
        **settings,
    )
    array[:] = whole
    np.testing.assert_array_equal(read(ArrayFile.open(tmp_path / "x")), whole)


@pytest.mark.parametrize(
    "settings",
    [
        {"shards": None, "chunks": (6, 2)},
        {"shards": (3, 2), "chunks": (1, 2)},
        {"shards": (6, 2), "chunks": (1, 1)},
        {"shards": (6, 2), "chunks": (1, 2), "compressors": ZstdCodec()},
        {"shards": (6, 2), "chunks": (1, 2), "serializer": BytesCodec(endian="big")},
    ],
    ids=["unsharded", "two shards", "split frames", "compressed", "big-endian"],
)
def test_another_layout_is_refused(tmp_path: Path, settings: dict) -> None:
    array = zarr.create_array(
        tmp_path / "x", shape=(6, 2), dtype="float32", **{"compressors": None, "filters": None, **settings}
    )
    array[:] = 1
    with pytest.raises(StoreError, match="not one raw little-endian zarr shard"):
        ArrayFile.open(tmp_path / "x")


def test_every_flipped_byte_of_the_index_is_found(written: Path) -> None:
    file = written / "c.0.0.0"
    sound = file.read_bytes()
    n_bytes = 5 * 2 * 3 * 4
    for at in range(n_bytes, len(sound)):
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises(StoreError, match="corrupt"):
            ArrayFile.open(written)


def test_frames_in_another_order_are_refused_though_the_checksum_holds(written: Path) -> None:
    file = written / "c.0.0.0"
    sound = file.read_bytes()
    index = np.frombuffer(sound[120:-4], "<u8").reshape(5, 2)[::-1].tobytes()
    file.write_bytes(sound[:120] + index + google_crc32c.value(index).to_bytes(4, "little"))
    with pytest.raises(StoreError, match="end to end"):
        ArrayFile.open(written)


@pytest.mark.parametrize("change", [-1, -100, 1])
def test_another_length_is_refused(written: Path, change: int) -> None:
    file = written / "c.0.0.0"
    os.truncate(file, file.stat().st_size + change)
    with pytest.raises(StoreError, match="truncated or grown"):
        ArrayFile.open(written)


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_not_zeros(written: Path) -> None:
    array = ArrayFile.open(written)
    os.truncate(written / "c.0.0.0", 60)
    with pytest.raises(StoreError, match="ends too soon"):
        read(array)


def test_a_flipped_byte_of_a_frame_changes_its_checksum() -> None:
    frames = numbers("float16", 3, 4)
    flipped = frames.copy()
    flipped.view(np.uint8)[0, 0] ^= 1
    assert checksum(frames) == google_crc32c.value(frames.tobytes())
    assert checksum(flipped) != checksum(frames)


def test_few_files_stay_open(tmp_path: Path) -> None:
    write_arrays(tmp_path / "group", {f"x{i}": [numbers("uint8", 2, 2)] for i in range(6)})
    arrays = [ArrayFile.open(tmp_path / "group" / f"x{i}") for i in range(6)]
    reader, target = FrameReader(max_open=2), memoryview(bytearray(4))

    def n_open() -> int:
        return sum(
            str(tmp_path) in str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()
        )

    for array in arrays * 2:
        reader.read_into(array, 0, target)
    assert n_open() == 2
    del reader
    assert n_open() == 0


def test_memory_is_used_again_only_when_no_tensor_is_left() -> None:
    memory = BatchMemory()
    batch = memory.empty((4, 1 << 18), torch.float16)
    assert batch.shape == (4, 1 << 18)
    assert batch.data_ptr() % 4096 == 0
    place, row = batch.data_ptr(), batch[1]
    row.fill_(7)
    del batch
    other = memory.empty((4, 1 << 18), torch.float16)
    assert other.data_ptr() != place
    other.zero_()
    assert bool((row == 7).all())
    del row
    gc.collect()
    assert memory.empty((1 << 18, 3), torch.float16).data_ptr() == place


def test_memory_that_would_be_too_much_to_keep_is_let_go() -> None:
    memory = BatchMemory(keep_bytes=1 << 20)
    first, second = memory.empty((700_000,), torch.uint8), memory.empty((700_000,), torch.uint8)
    del first, second
    gc.collect()
    assert sum(kept.nbytes for kept in memory._free) <= 1 << 20


def test_metadata_says_what_the_format_says(written: Path) -> None:
    meta = json.loads((written / "zarr.json").read_text())
    (codec,) = meta["codecs"]
    assert meta["zarr_format"] == 3
    assert meta["fill_value"] == "NaN"
    assert [c["name"] for c in codec["configuration"]["codecs"]] == ["bytes"]
    assert codec["configuration"]["chunk_shape"] == [1, 2, 3]
    assert codec["configuration"]["index_location"] == "end"


def test_memory_comes_back_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers take memory while the last tensors of other batches die elsewhere; a finalizer's error is never raised."""
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        memory = BatchMemory()

        def take(size: int) -> None:
            for n in range(400):
                held = [memory.empty((size + n % 7, 100), torch.float32) for _ in range(4)]
                del held

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(take, size) for size in (10, 20, 40, 80)]:
                done.result()
    finally:
        sys.setswitchinterval(before)
    assert not unraisable
