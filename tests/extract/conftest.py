"""Toy stores: a tower of two blocks, and features that are a function of video id, name and seed."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldframe.data_manifests.records import Manifest, VideoRecord
from coldframe.extract.catalogue import Header
from coldframe.extract.specs import FeatureSpec, FrameSpec, TowerShape, TowerSpec, TransformSpec
from coldframe.extract.store import FeatureStore
from coldframe.extract.writer import FeatureWriter

SHAPE = TowerShape(
    layers=2, width=6, heads=2, embed_dim=4, grid=(2, 2), text_width=4, text_layers=1, text_heads=1, context_length=8
)
TRANSFORM = TransformSpec(size_px=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@dataclass
class Info:
    """What a decoder says of a video."""

    rows: np.ndarray  # [V, T]
    timestamps_s: np.ndarray  # [V, T]
    n_repeated: np.ndarray  # [V]
    decoder: str = "pyav"
    content_sha256: str = ""
    n_source_frames: int = 100
    source_bytes: int = 1000
    kept: float = 1.0
    views: tuple[int, ...] = (0,)
    seconds: float = 0.0


class Toy:
    """Makes stores below one folder."""

    shape = SHAPE

    def __init__(self, folder: Path) -> None:
        self.path = folder / "store"

    def spec(self, dtype: str = "float16", n_frames: int = 3, weights: str = "ab" * 32) -> FeatureSpec:
        tower = TowerSpec("toy", "random", weights, quick_gelu=False, precision="fp32", transform=TRANSFORM)
        return FeatureSpec(FrameSpec(n_frames), tower, dtype)

    def manifest(self, ids: Iterable[str], **changes: Any) -> Manifest:
        splits = ("train", "test")
        records = [VideoRecord(i, i, n % 2, split=splits[n // 2 % 2]) for n, i in enumerate(sorted(ids))]
        return dataclasses.replace(Manifest("toy", "/videos", ("wave", "clap"), tuple(records)), **changes)

    def numbers(self, video_id: str, name: str, n_frames: int = 3, seed: int = 0) -> np.ndarray:
        """One feature of a video, [T, ...] float32 (pixels uint8), that float16 and bfloat16 hold exactly."""
        rng = np.random.default_rng([zlib.crc32(f"{video_id} {name}".encode()), seed])
        header = Header(self.spec(), SHAPE, (), "", "", "")
        shape = (n_frames, *header.frame_shape(name))
        if name == "pixels":
            return rng.integers(0, 256, shape, dtype=np.uint8)
        return (rng.integers(-128, 128, shape) / 16).astype(np.float32)

    def info(self, n_frames: int = 3, **facts: Any) -> Any:
        n_views = len(facts.get("views", (0,)))
        rows = np.tile(np.arange(n_frames), (n_views, 1))
        return Info(facts.pop("rows", rows), rows / 25, np.full(n_views, facts.pop("n_repeated", 0)), **facts)

    def open(self, ids: Iterable[str], features: Iterable[str], **spec: Any) -> FeatureWriter:
        return FeatureWriter.open(self.path, self.spec(**spec), SHAPE, features, self.manifest(ids))

    def write(
        self,
        ids: Sequence[str],
        features: Sequence[str] = ("embedding", "tokens.2"),
        *,
        lengths: Mapping[str, int] | None = None,
        failed: Mapping[str, str] | None = None,
        deferred: Mapping[str, str] | None = None,
        seed: int = 0,
        retry: bool = False,
        per_shard: int | None = None,
        **spec: Any,
    ) -> FeatureStore:
        """Do what `extract` would, with `failed` videos failing for the reason given; then open the store."""
        lengths, failed, deferred = lengths or {}, failed or {}, deferred or {}
        with self.open(ids, features, **spec) as writer:
            plan = writer.plan(writer.remaining(retry))
            if per_shard:
                plan = [part[at : at + per_shard] for part in plan for at in range(0, len(part), per_shard)]
            for part in plan:
                shard = writer.begin_shard(part)
                for i in part:
                    n = lengths.get(i, 3)
                    if i in failed:
                        shard.fail(i, failed[i])
                    elif i in deferred:
                        shard.fail(i, deferred[i], is_final=False)
                    else:
                        content = f"version {seed}"
                        arrays = {name: self.numbers(i, name, n, seed) for name in shard.features}
                        shard.add(i, arrays, self.info(n, content_sha256=content))
                shard.commit()
        return FeatureStore.open(self.path)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)
