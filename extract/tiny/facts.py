"""What coldframe-tiny is taught: drawn pictures, and captions that tell some of the facts about them.

A picture has four facts: the size, colour, shape and place of what it shows. A caption tells any of them, so that an
embedding must say where the shape is, and a head on top can read motion. Pictures are blurred and compressed as video
is. Facts are rows of indices into `WORDS`; -1 stands for a fact that a caption leaves unsaid.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ...data_manifests.drawn import COLOURS, MAX_TILT, PLACES, SHAPES, draw_background, draw_frames

Facts = NDArray[np.int64]  # [n, 4]

SIZES = {"small": (0.16, 0.19), "large": (0.24, 0.28), "": (0.19, 0.24)}  # radii; what lies between has no name
WORDS = (tuple(SIZES), tuple(COLOURS), SHAPES, tuple(PLACES))
SIZE, COLOUR, SHAPE, PLACE = range(4)
TEMPLATES = (
    *("{}",) * 3,
    "a {}",
    "the {}",
    "a photo of a {}",
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}",
    "a drawing of a {}.",
    "an image of one {}",
    "a video of a {}.",
    "a video of {}.",
    "a frame of a video of a {}.",
)
LONGEST_CAPTION = 24  # tokens, rounded up


def draw_facts(n: int, rng: np.random.Generator) -> Facts:
    """What n pictures will show: [n, 4], independent and uniform."""
    return rng.integers([len(words) for words in WORDS], size=(n, len(WORDS)))


def draw_pictures(
    facts: Facts, rng: np.random.Generator
) -> tuple[list[Image.Image], NDArray[np.float64], NDArray[np.float64]]:
    """Draw what the facts say, then spoil it as a camera and a video codec would.

    Returns:
        The pictures, 64 or 96 pixels a side; the middle of each shape [n, 2], x and y, and its radius [n], in sides.
    """
    n = len(facts)
    centres = np.array([PLACES[WORDS[PLACE][fact]] for fact in facts[:, PLACE]]) + rng.uniform(-0.08, 0.08, size=(n, 2))
    radii = rng.uniform(*np.array([SIZES[WORDS[SIZE][fact]] for fact in facts[:, SIZE]]).T)
    pictures = []
    for fact, centre, radius in zip(facts, centres, radii, strict=True):
        shape, colour = WORDS[SHAPE][fact[SHAPE]], WORDS[COLOUR][fact[COLOUR]]
        background = draw_background(int(rng.choice([64, 96], p=[0.7, 0.3])), rng)
        angle = rng.uniform(-MAX_TILT, MAX_TILT)
        frames = draw_frames(shape, colour, centre[None], radius[None], np.array([angle]), background, rng)
        pictures.append(_spoil(Image.fromarray(frames[0]), rng))
    return pictures, centres, radii


def tell(facts: Facts, kinds: Sequence[int]) -> Facts:
    """Leave only facts of some kinds, and never a size that has no name; -1 for the others."""
    told = np.where(np.isin(range(len(WORDS)), kinds), facts, -1)
    told[told[:, SIZE] == WORDS[SIZE].index(""), SIZE] = -1
    return told


def is_true(facts: Facts, told: Facts) -> NDArray[np.bool_]:
    """Whether captions are true of pictures, [pictures, captions]: they tell nothing that is otherwise."""
    return ((told[None] == -1) | (told[None] == facts[:, None])).all(axis=2)


def caption(told: NDArray[np.int64], rng: np.random.Generator) -> str:
    """Say facts [4] in words, such as "a photo of a small red circle at the top left."."""
    size, colour, shape, place = (words[fact] if fact >= 0 else "" for words, fact in zip(WORDS, told, strict=True))
    noun = shape or rng.choice(["", "shape", "thing"] if size or colour else ["shape", "thing"])
    where = place and f"{rng.choice(['at', 'in'])} the {place}"
    text = rng.choice(TEMPLATES).format(" ".join(filter(None, (size, colour, noun, where))))
    # Templates that are filled by a machine say "a orange", people do not: both are learnt.
    return re.sub(r"\ba (?=[aeiou])", "an ", text) if rng.random() < 0.5 else text


def _spoil(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Blur it, or compress it, or both, or neither."""
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    if rng.random() < 0.6:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(30, 95)))
        picture = Image.open(file).convert("RGB")
    return picture
