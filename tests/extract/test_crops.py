"""Crops are open_clip's, the published three, or random ones that every frame of a video shares."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from coldframe.extract.crops import cropper, random_crop, resize_and_crop, three_crop
from coldframe.extract.frames import Crops, decode
from coldframe.extract.specs import FrameSpec, TransformSpec

ZEROS, ONES = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
SMALL = TransformSpec(48, ZEROS, ONES)


def open_clip_crop(rgb: np.ndarray, transform: TransformSpec) -> np.ndarray:
    """What open_clip makes of a picture, as the bytes that its ToTensor divided by 255."""
    import open_clip.transform

    theirs: Any = open_clip.transform.image_transform(
        transform.size_px,
        is_train=False,
        mean=ZEROS,
        std=ONES,
        resize_mode=transform.resize_mode,
        interpolation=transform.interpolation,
        fill_color=transform.fill_color,
    )
    return (theirs(Image.fromarray(rgb)) * 255).round().byte().numpy()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("mode", "fill"), [("shortest", 0), ("longest", 0), ("longest", 114), ("squash", 0)])
def test_the_transform_is_that_of_open_clip(mode: str, fill: int, interpolation: str) -> None:
    rng = np.random.default_rng(0)
    sizes = [(320, 240), (240, 321), (427, 239), (65, 49), (31, 200), (64, 64), (33, 32), (7, 5), (301, 50)]
    for side, (width, height) in [*itertools.product((32, 65), sizes), (224, (340, 256)), (336, (64, 49))]:
        rgb = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        transform = TransformSpec(side, ZEROS, ONES, interpolation, mode, fill)
        ours = resize_and_crop(rgb, transform)
        assert ours.flags.c_contiguous
        np.testing.assert_array_equal(ours, open_clip_crop(rgb, transform), err_msg=f"{side} of {width}x{height}")


def test_the_transform_is_that_of_open_clip_on_a_real_frame(shared: Path) -> None:
    path = shared / "data" / "videos" / "singles" / "tai_chi" / "st-gcn_ta_chi.mp4"
    if not path.is_file():
        pytest.skip(f"no {path}")
    transform = TransformSpec(224, ZEROS, ONES)
    video = decode(path, FrameSpec(1), transform, sink := Crops())
    with av.open(str(path)) as container:
        pictures = itertools.islice(container.decode(video=0), int(video.indices[0, 0]), None)
        rgb = next(pictures).to_ndarray(format="rgb24")
    np.testing.assert_array_equal(sink[0], open_clip_crop(rgb, transform))


def ramp(width: int, height: int) -> np.ndarray:
    """A picture whose red grows from left to right, its green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.full_like(x, 128)], axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize(("width", "height"), [(160, 90), (90, 160), (64, 64), (65, 49), (301, 50), (49, 48)])
def test_three_crops_are_begin_middle_and_end_of_the_longer_side(width: int, height: int) -> None:
    rgb = ramp(width, height)
    begin, middle, end = (three_crop(rgb, number, SMALL) for number in range(3))
    assert begin.shape == middle.shape == end.shape == (3, 48, 48)
    assert all(crop.flags.c_contiguous and crop.dtype == np.uint8 for crop in (begin, middle, end))
    np.testing.assert_array_equal(middle, resize_and_crop(rgb, SMALL))
    resized = np.asarray(Image.fromarray(rgb).resize((max(48, 48 * width // height), max(48, 48 * height // width)), 3))
    np.testing.assert_array_equal(begin, resized[:48, :48].transpose(2, 0, 1))
    np.testing.assert_array_equal(end, resized[-48:, -48:].transpose(2, 0, 1))


def box_of(crop: np.ndarray) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a crop of a ramp, as shares of the picture; right < left where it is mirrored."""
    red, green = crop[0].mean(axis=0) / 255, crop[1].mean(axis=1) / 255  # of each column, of each row
    return red[0], red[-1], green[0], green[-1]


def test_random_crops_are_half_of_the_picture_or_more_and_keep_its_proportions() -> None:
    width, height = 320, 240
    rgb, mirrored, lefts = ramp(width, height), 0, set()
    for number in range(200):
        crop = random_crop(rgb, number, SMALL, seed=0, key="v", flip=True)
        assert crop.shape == (3, 48, 48)
        left, right, top, bottom = box_of(crop)
        mirrored += right < left
        left, right = min(left, right), max(left, right)
        w, h = (right - left) * width, (bottom - top) * height
        assert 0.42 < w * h / (width * height) < 1.01  # by pixels' centres, so a little less than the box
        assert 0.7 < w / h < 1.4
        lefts.add(round(left, 3))
    assert 70 < mirrored < 130
    assert len(lefts) > 50


def test_a_random_crop_is_a_function_of_seed_key_and_draw_alone() -> None:
    rgb, other = ramp(320, 240), ramp(320, 240)[::-1].copy()

    def crop(picture: np.ndarray = rgb, number: int = 3, seed: int = 0, key: str = "v", flip: bool = False) -> Any:
        return random_crop(picture, number, SMALL, seed, key, flip)

    np.testing.assert_array_equal(crop(), crop())
    left_right = box_of(crop())[:2]
    assert box_of(crop(other))[:2] == pytest.approx(left_right)  # every frame of the video
    for changed in (crop(number=4), crop(seed=1), crop(key="w")):
        assert box_of(changed) != pytest.approx(box_of(crop()))
    for number in range(8):  # a flip moves no box
        flipped, plain = crop(number=number, flip=True), crop(number=number)
        np.testing.assert_array_equal(np.sort([flipped, plain[:, :, ::-1], plain], axis=0)[1], flipped)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 500), (500, 2), (7, 5)])
def test_random_crops_of_odd_pictures(width: int, height: int) -> None:
    for number in range(20):
        crop = random_crop(ramp(width, height), number, SMALL, seed=0, key="v", flip=True)
        assert crop.shape == (3, 48, 48)
        assert crop.flags.c_contiguous


def test_the_cropper_of_a_spec() -> None:
    rgb = ramp(120, 60)
    for frames, crop in {
        FrameSpec(4): resize_and_crop(rgb, SMALL),
        FrameSpec(4, crops="three"): three_crop(rgb, 2, SMALL),
        FrameSpec(4, crops="random", seed=5): random_crop(rgb, 2, SMALL, 5, "v", flip=False),
        FrameSpec(4, crops="random", seed=5, flip=True): random_crop(rgb, 2, SMALL, 5, "v", flip=True),
    }.items():
        np.testing.assert_array_equal(cropper(frames, SMALL, "v")(rgb, 2), crop)
