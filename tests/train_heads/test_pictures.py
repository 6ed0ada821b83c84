"""Pictures of attention: numbers by hand, and a trained decoder on drawn videos."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coldframe.data_manifests.drawn import plan_clips
from coldframe.data_manifests.errors import ConfigError
from coldframe.data_manifests.records import Manifest, VideoRecord
from coldframe.extract import ExtractOptions, FeatureSpec, FeatureStore, FrameSpec, extract
from coldframe.extract.frames import write_video
from coldframe.extract.specs import SpecMismatch
from coldframe.extract.store import StoreError
from coldframe.extract.towers import load_tower
from coldframe.train_heads import Checkpoint, TrainSpec, train
from coldframe.train_heads.heads.evl_decoder import Config
from coldframe.train_heads.heads.linear_probe import Config as ProbeConfig
from coldframe.train_heads.pictures import crops_of, draw_attention, heat_maps, overlay


def test_heat_lies_where_the_patch_is() -> None:
    attention = torch.zeros(2, 3, 1 + 6)
    attention[0, 1, 1 + 5] = 0.6  # last row, last column of 2 × 3
    attention[1, 2, 0] = 0.9  # a class token has no place
    heat = heat_maps(attention, (2, 3), 12)
    assert heat.shape == (2, 3, 12, 12)
    assert not heat[1].any()
    assert not heat[0, [0, 2]].any()
    torch.testing.assert_close(heat[0, 1].max(), torch.tensor(0.6))
    assert int(heat[0, 1].argmax()) // 12 >= 6
    assert int(heat[0, 1].argmax()) % 12 >= 8
    torch.testing.assert_close(heat_maps(torch.full((1, 5), 0.25), (2, 2), 7), torch.full((1, 7, 7), 0.25))


def test_overlay_by_hand() -> None:
    crops = np.full((2, 3, 2, 2), 100, np.uint8)
    heat = np.zeros((1, 2, 2, 2), np.float32)
    heat[0, 1, 0, 1], heat[0, 1, 1, 1] = 0.02, 0.01  # the hottest pixel, and half of it
    picture = overlay(crops, heat)
    assert picture.shape == (4, 4, 3)
    assert (picture[:2] == 100).all()
    assert (picture[2:, :3] == 100).all()
    assert picture[2, 3].tolist() == [224, 224, 20]  # 0.2 · 100 + 0.8 · yellow
    assert picture[3, 3].tolist() == [162, 60, 60]  # 0.6 · 100 + 0.4 · red
    assert (overlay(crops, 0 * heat) == 100).all()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FeatureStore, FeatureStore, Checkpoint]]:
    """One store with pixels and one without, of the same six clips, and a decoder of two layers."""
    root = tmp_path_factory.mktemp("pictures")
    records = []
    for number, clip in enumerate(plan_clips(n_per_class=10, seed=0)[:6]):
        write_video(root / "videos" / clip.path, clip.draw(n_frames=8, size_px=64), fps=12)
        records.append(VideoRecord(clip.path, clip.path, number % 2, "val" if number > 3 else "train"))
    manifest = Manifest("drawn", str(root / "videos"), ("a", "b"), tuple(records))
    tower = load_tower("coldframe-tiny", "random", device="cpu")
    spec = FeatureSpec(FrameSpec(n_frames=3), tower.spec, "float32")
    options = ExtractOptions(workers=1, quiet=True)
    stores = []
    for name, features in (
        ("with", ["tokens.3", "tokens.4", "embedding", "pixels"]),
        ("without", ["tokens.3", "tokens.4"]),
    ):
        extract(manifest, root / name, tower, spec, features, options)
        stores.append(FeatureStore.open(root / name))
    config, once = Config(n_layers=2, cross_frame=False), TrainSpec(epochs=1)
    yield *stores, train(stores[0], manifest, "evl_decoder", config, once, root / "run", device="cpu", quiet=True)


def test_frames_and_a_row_for_each_layer(drawn: tuple[FeatureStore, FeatureStore, Checkpoint], tmp_path: Path) -> None:
    store, without_pixels, checkpoint = drawn
    video_id, side = store.ids[0], store.spec.tower.transform.size_px
    looked = draw_attention(checkpoint, store, video_id, tmp_path / "new" / "with.png", "cpu")
    picture = np.asarray(Image.open(tmp_path / "new" / "with.png"))
    assert picture.shape == (3 * side, 3 * side, 3)
    frames = store.read("pixels", video_id)
    for i in range(3):
        np.testing.assert_array_equal(picture[:side, i * side : (i + 1) * side], frames[i].transpose(1, 2, 0))
    assert (picture[side : 2 * side] != picture[:side]).any()

    assert looked.predicted in ("a", "b")
    assert 0.5 <= looked.probability <= 1
    assert np.shape(looked.frame_shares) == (2, 3)
    np.testing.assert_allclose(np.sum(looked.frame_shares, axis=1), 1, atol=1e-5)
    assert all(0 < share < 1 for share in looked.class_token_shares)
    assert looked.to_json()["video_id"] == video_id
    assert looked.describe().count("layer") == 2

    again = draw_attention(checkpoint, without_pixels, video_id, tmp_path / "without.png", "cpu")
    assert replace(again, out=looked.out) == looked
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "without.png")), picture)


def test_what_cannot_be_drawn_is_told(drawn: tuple[FeatureStore, FeatureStore, Checkpoint], tmp_path: Path) -> None:
    store, without_pixels, checkpoint = drawn
    video_id = store.ids[1]
    with pytest.raises(ConfigError, match="no such format"):
        draw_attention(checkpoint, store, video_id, tmp_path / "picture.txt", "cpu")
    with pytest.raises(StoreError, match="nobody"):
        draw_attention(checkpoint, store, "nobody.mp4", tmp_path / "picture.png", "cpu")
    probe = train(
        store, store.manifest, "linear_probe", ProbeConfig("embedding"), TrainSpec(epochs=1), tmp_path / "probe"
    )
    with pytest.raises(ConfigError, match="linear_probe has no attention maps"):
        draw_attention(probe, store, video_id, tmp_path / "picture.png", "cpu")

    record = without_pixels.manifest.by_id[video_id]
    other = without_pixels.manifest.by_id[store.ids[2]]
    file = Path(without_pixels.manifest.path_of(record))
    file.write_bytes(Path(without_pixels.manifest.path_of(other)).read_bytes())
    with pytest.raises(SpecMismatch, match="has changed since"):
        crops_of(without_pixels, video_id)
