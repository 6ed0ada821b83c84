"""How fast are shuffled batches of whole videos read from the store? One JSON line; ratios above 1 favour the store.

60 videos of 8 frames of ViT-B/16 tokens (8 × 197 × 768 float16, 2.4 MB each; 145 MB, twice), warm page cache. Every
repeat gives every way the same batch, in an order that changes, so that a disturbance hits all of them.

    python tests/benchmarks/bench_gather.py [--repeats 30] [--batch 32]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import torch
import zarr

from coldframe.data_manifests.records import Manifest, VideoRecord
from coldframe.extract.frames import DecodedVideo
from coldframe.extract.specs import FeatureSpec, FrameSpec, TowerShape, TowerSpec, TransformSpec
from coldframe.extract.store import FeatureStore, FeatureWriter

N_VIDEOS, N_FRAMES, NAME = 60, 8, "tokens.12"
IDS = [f"{n:03d}.mp4" for n in range(N_VIDEOS)]
VITB16 = TowerShape(12, 768, 12, 512, (14, 14), 512, 12, 8, 77)


def main() -> None:
    """Write both files, time every way, print the line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=30)
    options.add_argument("--batch", type=int, default=32)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flat, write_s = write(Path(folder))
        seconds = timed(ways(Path(folder), flat, given.batch), given.repeats, given.batch)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    n_bytes = given.batch * flat.nbytes / N_VIDEOS

    def ratio(other: str, ours: str) -> float:
        """Of the medians over repeats; both were timed within milliseconds of each other in every repeat."""
        return round(statistics.median(b / a for a, b in zip(seconds[ours], seconds[other], strict=True)), 2)

    print(
        json.dumps(
            {
                "benchmark": "gather",
                "batch": given.batch,
                "repeats": given.repeats,
                "write_gb_s": round(flat.nbytes / write_s / 1e9, 2),
                "ms": {name: round(1e3 * taken, 2) for name, taken in medians.items()},
                "gb_s": {name: round(n_bytes / taken / 1e9, 2) for name, taken in medians.items()},
                "vs_memmap": ratio("memmap", "store"),
                "vs_memmap_same_memory": ratio("memmap_into", "store_into"),
                "vs_zarr": ratio("zarr", "store"),
                "vs_tensorstore": ratio("tensorstore", "store"),
                "machine": platform.platform(),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
                "zarr": zarr.__version__,
            }
        )
    )


def write(folder: Path) -> tuple[np.memmap, float]:
    """The same numbers as one flat file and as a store; and the seconds that the store took."""
    numbers = np.random.default_rng(0).standard_normal((N_VIDEOS, N_FRAMES, 197, 768), np.float32).astype(np.float16)
    numbers.tofile(folder / "flat.bin")
    transform = TransformSpec(224, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    tower = TowerSpec("ViT-B-16", "random", "0" * 64, quick_gelu=False, precision="fp32", transform=transform)
    records = tuple(VideoRecord(i, i, 0, split="train") for i in IDS)
    video = DecodedVideo.of_one_view(np.arange(N_FRAMES) / 4, "none")
    began = time.perf_counter()
    spec, manifest = FeatureSpec(FrameSpec(N_FRAMES), tower), Manifest("bench", "/videos", ("any",), records)
    with FeatureWriter.open(folder / "store", spec, VITB16, [NAME], manifest) as writer:
        for ids in writer.plan(writer.remaining()):
            shard = writer.begin_shard(ids)
            for video_id in ids:
                shard.add(video_id, {NAME: numbers[IDS.index(video_id)]}, video)
            shard.commit()
    taken = time.perf_counter() - began
    return np.memmap(folder / "flat.bin", np.float16, mode="r", shape=numbers.shape), taken


def ways(folder: Path, flat: np.memmap, batch: int) -> dict[str, Callable[[list[int]], object]]:
    """Each reads the videos at some rows; `_into` uses the same memory again, the others make a new batch."""
    store = FeatureStore.open(folder / "store")
    shard = sorted((folder / "store" / "shards").iterdir())
    stock = [zarr.open_array(path / "features.zarr" / NAME, mode="r") for path in shard]
    kvstores = [{"driver": "file", "path": str(path / "features.zarr" / NAME)} for path in shard]
    other = [tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result() for kvstore in kvstores]
    per_shard = stock[0].shape[0] // N_FRAMES
    shape = (batch, *flat.shape[1:])
    memory, tensor = np.empty(shape, np.float16), torch.empty(shape, dtype=torch.float16)

    def copied(videos: Iterable[Any], into: np.ndarray | None = None) -> np.ndarray:
        made = np.empty(shape, np.float16) if into is None else into
        for row, video in enumerate(videos):
            made[row] = video
        return made

    def frames(row: int) -> slice:
        first = row % per_shard * N_FRAMES
        return slice(first, first + N_FRAMES)

    return {
        "store": lambda rows: store.gather([IDS[row] for row in rows], [NAME]),
        "memmap": lambda rows: copied(flat[row] for row in rows),
        "store_into": lambda rows: store.gather([IDS[row] for row in rows], [NAME], out={NAME: tensor}),
        "memmap_into": lambda rows: copied((flat[row] for row in rows), memory),
        "zarr": lambda rows: copied(stock[row // per_shard][frames(row)] for row in rows),
        "tensorstore": lambda rows: copied(other[row // per_shard][frames(row)].read().result() for row in rows),
    }


def timed(ways: dict[str, Callable[[list[int]], object]], repeats: int, batch: int) -> dict[str, list[float]]:
    """Seconds of every way in every repeat, after one round that is not counted."""
    rng, names = np.random.default_rng(1), list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        rows = rng.permutation(N_VIDEOS)[:batch].tolist()
        for name in rng.permutation(names):
            began = time.perf_counter()
            made = ways[name](rows)
            taken = time.perf_counter() - began
            del made
            if repeat:
                seconds[name].append(taken)
    return seconds


if __name__ == "__main__":
    main()
