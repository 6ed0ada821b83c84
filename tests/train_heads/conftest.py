"""A store whose videos are easy to tell apart, made by a real tower with random weights."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coldframe.data_manifests.records import Manifest, VideoRecord
from coldframe.extract.frames import DecodedVideo
from coldframe.extract.specs import FeatureSpec, FrameSpec, feature_shape
from coldframe.extract.store import FeatureStore, FeatureWriter
from coldframe.extract.towers import load_tower

CLASSES = ("run", "jump", "swim")
DECODED = DecodedVideo.of_one_view(np.arange(4.0), "none")


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """3 classes × 16 videos, 12 to train and 4 to test; one training video is never extracted."""
    records = [
        VideoRecord(f"{name}/{number:02}.mp4", f"{name}/{number:02}.mp4", label, "train" if number < 12 else "test")
        for label, name in enumerate(CLASSES)
        for number in range(16)
    ]
    return Manifest("toy", "/nowhere", CLASSES, tuple(records))


@pytest.fixture(scope="session")
def store(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    """Four frames a video, float32: embedding, cls and tokens of the last block; the classes differ in their means."""
    tower = load_tower("coldframe-tiny", "random", device="cpu")
    spec = FeatureSpec(FrameSpec(n_frames=4), tower.spec, dtype="float32")
    names = ("embedding", f"cls.{tower.shape.layers}", f"tokens.{tower.shape.layers}")
    yield write_store(tmp_path_factory.mktemp("stores") / "toy", spec, tower.shape, names, manifest)


def write_store(path: Path, spec, shape, names, manifest) -> FeatureStore:
    rng = np.random.default_rng(0)
    sizes = {name: feature_shape(name, shape, spec.tower.transform.size_px) for name in names}
    centres = {name: rng.normal(size=(len(CLASSES), size[-1])) for name, size in sizes.items()}
    with FeatureWriter.open(path, spec, shape, names, manifest) as writer:
        ids = [video_id for video_id in writer.remaining() if video_id != "run/00.mp4"]
        builder = writer.begin_shard(ids)
        for video_id in ids:
            label = manifest.by_id[video_id].label
            features = {
                name: (centres[name][label] + rng.normal(size=(4, *size))).astype(np.float32)
                for name, size in sizes.items()
            }
            builder.add(video_id, features, DECODED)
        builder.commit()
    return FeatureStore.open(path)
