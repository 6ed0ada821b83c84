"""A store whose videos are easy to tell apart, made by a real tower with random weights."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors import safe_open
from torch import Tensor

from coldframe.data_manifests.records import Manifest, VideoRecord
from coldframe.extract.frames import DecodedVideo
from coldframe.extract.specs import FeatureSpec, FrameSpec, feature_shape
from coldframe.extract.store import FeatureStore, FeatureWriter
from coldframe.extract.towers import Tower, load_tower

CLASSES = ("run", "jump", "swim")
# Its text tower is as wide as its embedding, as OpenAI's are.
SMALL = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"width": 48, "heads": 3, "layers": 2},
}
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


@pytest.fixture(scope="session")
def full_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    """Eight videos of three classes, four frames of noise each, with all that the tower makes of them, float32."""
    folder = tmp_path_factory.mktemp("stores")
    (folder / "small.json").write_text(json.dumps(SMALL))
    tower = load_tower(str(folder / "small.json"), "random", device="cpu")
    records = [VideoRecord(f"{n}.mp4", f"{n}.mp4", n % 3, "test" if n > 5 else "train") for n in range(8)]
    manifest = Manifest("noise", "/nowhere", CLASSES, tuple(records))
    layers, side = tower.shape.layers, tower.spec.transform.size_px
    every_layer = (f"{kind}.{k}" for kind in ("cls", "tokens") for k in range(layers + 1))
    names = ("pixels", "embedding", f"summary.{layers - 1}", *every_layer)
    spec = FeatureSpec(FrameSpec(n_frames=4), tower.spec, dtype="float32")
    rng, path = np.random.default_rng(1), folder / "full"
    with FeatureWriter.open(path, spec, tower.shape, names, manifest) as writer:
        builder = writer.begin_shard(list(manifest.ids))
        for video_id in manifest.ids:
            pixels = rng.integers(0, 256, (4, 3, side, side), dtype=np.uint8)
            features = tower.encode_frames(pixels, names)
            builder.add(video_id, {name: value.numpy() for name, value in features.items()}, DECODED)
        builder.commit()
    yield FeatureStore.open(path)


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


@dataclass
class Recording:
    """Recorded inputs, weights and outputs of an original implementation."""

    file: Any
    sizes: dict[str, Any]  # the metadata's `config`

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __contains__(self, name: str) -> bool:
        return name in self.file.keys()  # noqa: SIM118

    def named(self, prefix: str) -> dict[str, Tensor]:
        """Tensors under a prefix, without it: `clip.`, `head.`."""
        names = (name for name in self.file.keys() if name.startswith(prefix))  # noqa: SIM118
        return {name.removeprefix(prefix): self[name] for name in names}

    @cached_property
    def tower(self) -> Tower:
        """The frozen CLIP of the recording, of the sizes that its tensors have."""
        weights = self.named("clip.")
        width, _, patch, _ = weights["visual.conv1.weight"].shape
        side = round((len(weights["visual.positional_embedding"]) - 1) ** 0.5) * patch
        vision = CLIPVisionCfg(
            layers=_n_blocks(weights, "visual.transformer.resblocks."),
            width=width,
            head_width=64,
            patch_size=patch,
            image_size=side,
        )
        n_words, text_width = weights["token_embedding.weight"].shape
        text_layers = _n_blocks(weights, "transformer.resblocks.")
        text = CLIPTextCfg(vocab_size=n_words, width=text_width, heads=max(1, text_width // 64), layers=text_layers)
        model = CLIP(weights["visual.proj"].shape[1], vision, text, quick_gelu=True)
        model.load_state_dict(weights)
        return Tower(model, device="cpu")


def _n_blocks(weights: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


@pytest.fixture(scope="session")
def recorded(golden: Path) -> Callable[[str], list[Recording]]:
    """All recordings of a system, which the metadata `what` names; at least one."""

    def find(what: str) -> list[Recording]:
        opened = [safe_open(path, "pt") for path in sorted(golden.glob("*.safetensors"))]
        files = [file for file in opened if (file.metadata() or {}).get("what") == what]
        assert files, f"no recording of {what} in {golden}"
        return [Recording(file, json.loads(file.metadata()["config"])) for file in files]

    return find
