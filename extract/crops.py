"""A picture → the square crop that a tower sees, by Pillow: bit for bit what open_clip's transform gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .sampling import generator
from .specs import FrameSpec, TransformSpec

Picture = NDArray[np.uint8]  # RGB [H, W, 3], or a crop [3, S, S]
Crop = Callable[[Picture, int], Picture]  # of a picture, the crop of that number

_AREA, _RATIO = (0.5, 1.0), (3 / 4, 4 / 3)  # of random crops, as shares of the picture's area and as width by height


def cropper(frames: FrameSpec, transform: TransformSpec, key: str = "") -> Crop:
    """The crops that a spec asks for; random ones are the same in every frame of the video `key`."""
    match frames.crops:
        case "three":
            return partial(three_crop, transform=transform)
        case "random":
            return partial(random_crop, transform=transform, seed=frames.seed, key=key, flip=bool(frames.flip))
        case _:
            return lambda rgb, _: resize_and_crop(rgb, transform)


def resize_and_crop(rgb: Picture, transform: TransformSpec) -> Picture:
    """Do open_clip's evaluation transform up to, not including, ToTensor.  rgb [H, W, 3] -> [3, S, S].

    Source: open_clip 3.3 `image_transform` (MIT) and torchvision 0.20 `resize`, `center_crop` (BSD-3): their rounding.
    Differs: nothing, bit for bit; torchvision, and so torch, is not needed.
    """
    side = transform.size_px
    resized = _resized(rgb, transform)  # [h, w, 3]
    canvas = np.full((3, side, side), transform.fill_color, np.uint8)
    (from_y, to_y), (from_x, to_x) = _centred(resized.shape[0], side), _centred(resized.shape[1], side)
    canvas[:, to_y, to_x] = resized[from_y, from_x].transpose(2, 0, 1)
    return canvas


def three_crop(rgb: Picture, number: int, transform: TransformSpec) -> Picture:
    """Crop 0, 1 or 2: the begin, the middle or the end of the longer side.  rgb [H, W, 3] -> [3, S, S].

    Source: the three-crop test of SlowFast, Feichtenhofer et al. 2019, arXiv:1812.03982, §3.
    """
    if number == 1:
        return resize_and_crop(rgb, transform)
    side, resized = transform.size_px, _resized(rgb, transform)
    window = slice(0, side) if number == 0 else slice(-side, None)
    return np.ascontiguousarray(resized[window, window].transpose(2, 0, 1))  # the shorter side is `side` long


def random_crop(rgb: Picture, number: int, transform: TransformSpec, seed: int | None, key: str, flip: bool) -> Picture:
    """Draw `number` of a random resized crop: half the picture or more, resized to a square; with `flip` every second
    draw or so is mirrored.  rgb [H, W, 3] -> [3, S, S].

    Source: Inception's training crop, Szegedy et al. 2014, arXiv:1409.4842, §6, in torchvision's form.
    Differs: at least 0.5 of the area instead of 0.08: a cached draw is seen in every epoch.
    """
    rng, side = generator(seed, "crop", key, number), transform.size_px
    box, mirrored = _random_box(rgb.shape[0], rgb.shape[1], rng), flip and rng.random() < 0.5
    square = np.asarray(Image.fromarray(rgb).resize((side, side), _kernel(transform), box=box))  # [S, S, 3]
    return np.ascontiguousarray((square[:, ::-1] if mirrored else square).transpose(2, 0, 1))


def _random_box(height: int, width: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Left, upper, right, lower of a random part; the largest square in the middle where ten tries do not fit."""
    for _ in range(10):
        area = height * width * rng.uniform(*_AREA)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    side = min(height, width)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def _resized(rgb: Picture, transform: TransformSpec) -> Picture:
    """The whole picture in the size that is cropped, [h, w, 3]."""
    (height, width, _), side = rgb.shape, transform.size_px
    match transform.resize_mode:
        case "shortest":
            short = min(height, width)
            size = (int(side * width / short), int(side * height / short))
        case "longest":
            ratio = max(height, width) / side
            size = (round(width / ratio), round(height / ratio))
        case _:
            size = (side, side)
    return np.asarray(Image.fromarray(rgb).resize(size, _kernel(transform)))


def _kernel(transform: TransformSpec) -> Image.Resampling:
    return Image.Resampling.BILINEAR if transform.interpolation == "bilinear" else Image.Resampling.BICUBIC


def _centred(size: int, side: int) -> tuple[slice, slice]:
    """The part of an axis that a centre crop reads, and the part of the crop that it fills."""
    if size <= side:
        return slice(None), slice((side - size) // 2, (side - size) // 2 + size)
    return slice(round((size - side) / 2), round((size - side) / 2) + side), slice(None)  # banker's, as torchvision
