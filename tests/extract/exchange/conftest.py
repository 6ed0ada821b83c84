"""A store of everything that a row can be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coldframe.extract.specs import FrameSpec
from coldframe.extract.store import FeatureStore
from coldframe.extract.writer import FeatureWriter


@pytest.fixture
def views(toy) -> FeatureStore:
    """Pooled int8 tokens of 3 draws, the third of which came later; one video failed, one is deferred, one is undone."""
    rng = np.random.default_rng(0)
    for draws, asked in ((2, ["a", "b", "gone", "later"]), (3, ["a", "b"])):
        frames = FrameSpec(None, "fps", rate_fps=1.0, crops="random", seed=0, draws=draws)
        spec = dataclasses.replace(toy.spec("int8"), frames=frames, token_grid=1)
        manifest = toy.manifest(["a", "b", "gone", "later", "undone"])
        shape = spec.shape_of(toy.shape)
        with FeatureWriter.open(toy.path, spec, shape, ["embedding", "tokens.2"], manifest) as writer:
            shard = writer.begin_shard(asked)
            for video_id in asked:
                if video_id == "gone":
                    shard.fail(video_id, "no video stream", seconds=1.5)
                    continue
                if video_id == "later":
                    shard.fail(video_id, "no such file", is_final=False, attempts=2)
                    continue
                n_frames, new = 2 + (video_id == "b"), writer.missing(video_id).views
                rows = rng.integers(0, 4, (len(new), n_frames))
                rows[0, 0] = 3
                info = toy.info(n_frames, rows=rows, views=new, n_repeated=1, kept=0.9, seconds=draws, decoder="decord")
                sizes = {"embedding": (4, 4), "tokens.2": (4, 2, 6)}
                crops = {name: rng.normal(0, 9, size).astype(np.float32) for name, size in sizes.items()}
                shard.add(video_id, crops, info)
            shard.commit()
    return FeatureStore.open(toy.path)
