"""Everything that can change a feature's value, frozen and fingerprinted.

A store is named by the fingerprint of its `FeatureSpec`. *Which* features and layers it holds is contents, not identity.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ..data_manifests.errors import ColdframeError, ConfigError, UnknownName

FORMAT_VERSION = 1
DTYPES = ("float16", "bfloat16", "float32", "int8")  # int8: patch and class tokens, with a float16 scale each
SAMPLINGS = ("uniform", "random", "dense", "fps", "all")
CROPS = ("centre", "three", "random")
_MOST = 10_000  # frames a second, clips, draws: more is a slip of the pen
DECODERS = ("auto", "decord", "pyav", "torchcodec")  # auto: decord where it is exact, else PyAV
IMPORTED = "imported"  # frames, decoder or tower of features that came from elsewhere; nothing here can make such
PRECISIONS = ("fp32", "bf16", "fp16")


class SpecMismatch(ColdframeError, ValueError):
    """A store or checkpoint was made otherwise than this run expects; names the field and both values."""


@dataclass(frozen=True, slots=True)
class FrameSpec:
    """Which frames of a video are kept, how they are cropped, and who decodes them. `None` is: does not apply."""

    n_frames: int | None = 8  # T; None where the sampling decides
    sampling: str = "uniform"  # see SAMPLINGS
    decoder: str = "auto"  # see DECODERS
    stride: int | None = None  # dense: frames of the source from one to the next
    clips: int | None = None  # dense: how many, evenly spread; None is one in the middle
    rate_fps: float | None = None  # fps: frames a second
    crops: str | None = None  # None: the centre | three: along the longer side | random: resized, one a draw
    flip: bool | None = None  # random crops: mirror every second draw or so
    seed: int | None = None  # of random frames and crops
    draws: int = field(default=1, metadata={"identity": False})  # of what is random; more can be added later

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if not self.sampling == self.decoder == IMPORTED:
            _one_of("sampling", self.sampling, SAMPLINGS)
            _one_of("decoder", self.decoder, DECODERS)
        _one_of("crops", self.crops or "centre", CROPS)
        of_fixed_length = self.sampling not in ("fps", "all", IMPORTED)
        is_random = self.sampling == "random" or self.crops == "random"
        _whole("n_frames", self.n_frames, of_fixed_length, f"sampling {self.sampling}")
        _whole("stride", self.stride, self.sampling == "dense", f"sampling {self.sampling}")
        _whole("clips", self.clips, None if self.sampling == "dense" else False, f"sampling {self.sampling}")
        _whole("draws", self.draws if is_random or self.draws != 1 else None, is_random, "nothing random")
        if (self.rate_fps is not None) != (self.sampling == "fps") or not 0 < (
            1 if self.rate_fps is None else self.rate_fps
        ) <= _MOST:
            wanted = f"above 0 and at most {_MOST}"
            raise ConfigError("sampling fps takes a rate, no other does", seen=f"fps={self.rate_fps}", wanted=wanted)
        if (self.seed is not None) != is_random:
            raise ConfigError("a seed belongs to random frames or random crops", seen=f"seed={self.seed}")
        if self.flip is not None and self.crops != "random":
            raise ConfigError("only random crops can be flipped", seen=f"crops={self.crops or 'centre'}")

    @property
    def length(self) -> int:
        """T, where it is fixed."""
        assert self.n_frames is not None
        return self.n_frames

    @property
    def n_clips(self) -> int:
        """Clips of one draw."""
        return self.clips or 1

    @property
    def n_crops(self) -> int:
        """Crops of one clip; a random crop is a draw."""
        return 3 if self.crops == "three" else 1

    @property
    def n_views(self) -> int:
        """V, rows of one video in a store."""
        return self.draws * self.n_clips * self.n_crops

    def describe(self) -> str:
        """For people: what a row holds."""
        match self.sampling:
            case "fps":
                words = [f"{self.rate_fps:g} a second"]
            case "all":
                words = ["all"]
            case "imported":
                words = ["as imported"]
            case _:
                words = [f"{self.n_frames} {self.sampling}"]
        words += [f"{self.stride} apart"] if self.stride else []
        words += [f"{self.n_clips} clips"] if self.n_clips > 1 else []
        words += [f"{self.crops} crops{' flipped at random' if self.flip else ''}"] if self.crops else []
        words += [f"{self.draws} draws of seed {self.seed}"] if self.seed is not None else []
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class TransformSpec:
    """open_clip's own evaluation transform for a model: resize, centre crop, scale, normalise."""

    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"  # bicubic | bilinear, antialiased by Pillow
    resize_mode: str = "shortest"  # shortest (then centre crop) | longest (then pad) | squash
    fill_color: int = 0


@dataclass(frozen=True, slots=True)
class TowerSpec:
    """A frozen CLIP: architecture, exact weights, arithmetic and pre-processing."""

    model: str  # open_clip's name, or coldframe-tiny
    pretrained: str = field(metadata={"identity": False})  # tag or file it came from; weights_sha256 is the identity
    weights_sha256: str  # of the loaded parameters, so a tag and a file of the same weights are the same tower
    quick_gelu: bool
    precision: str  # fp32 | bf16 | fp16
    transform: TransformSpec


@dataclass(frozen=True, slots=True)
class TowerShape:
    """The sizes of a tower, so that heads can be built without loading it."""

    layers: int  # L, image blocks
    width: int  # D
    heads: int
    embed_dim: int  # E
    grid: tuple[int, int]  # patches down, across; N is their product
    text_width: int
    text_layers: int
    text_heads: int
    context_length: int

    @property
    def n_patches(self) -> int:
        """N, patch tokens of a frame."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """The identity of a store: two stores with one fingerprint hold the same numbers for the same video."""

    frames: FrameSpec
    tower: TowerSpec
    dtype: str = "float16"
    token_grid: int | None = None  # patch tokens averaged to g × g of them; None keeps the tower's grid
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse what the format does not have."""
        _one_of("dtype", self.dtype, DTYPES)
        _whole("token_grid", self.token_grid, None, "")
        if self.frames.crops == "three" and self.tower.transform.resize_mode != "shortest":
            raise ConfigError("three crops need a transform that resizes the shorter side", seen=self.tower.transform)

    def shape_of(self, shape: TowerShape) -> TowerShape:
        """The sizes of the features that a tower of this shape leaves in the store."""
        if self.token_grid is None:
            return shape
        if self.token_grid > min(shape.grid):
            raise ConfigError(
                "tokens cannot be pooled to a finer grid", seen=self.token_grid, wanted=f"up to {min(shape.grid)}"
            )
        return dataclasses.replace(shape, grid=(self.token_grid, self.token_grid))

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of every field that can change a value.

        Fields that are None are left out, so that a field added later with the default None renames no store.
        """
        return hashlib.sha256(json.dumps(_identity(self), sort_keys=True).encode()).hexdigest()[:16]

    def expect(self, other: FeatureSpec, what: str) -> None:
        """Raise SpecMismatch, naming the first field in which `other` differs from this spec."""
        mine, theirs = _flat(_identity(self)), _flat(_identity(other))
        is_one_imported = (self.frames.sampling == IMPORTED) != (other.frames.sampling == IMPORTED)
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise SpecMismatch(
                    f"{what} was made with another {name}",
                    seen=repr(mine.get(name)),
                    wanted=repr(theirs.get(name)),
                    fix="What is imported and what is extracted do not mix: write to another store."
                    if is_one_imported
                    else "Ask for the same setting, or write to another store.",
                )

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; `from_json` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a spec; raises ConfigError for a format version that this release cannot read."""
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(
                "the store's format is not one this release reads",
                seen=f"version {version}",
                wanted=f"version {FORMAT_VERSION}",
                fix="Use the coldframe release that wrote it.",
            )
        tower = dict(data["tower"])
        transform = dict(tower.pop("transform"))
        transform["mean"], transform["std"] = tuple(transform["mean"]), tuple(transform["std"])
        return cls(
            frames=FrameSpec(**data["frames"]),
            tower=TowerSpec(**tower, transform=TransformSpec(**transform)),
            dtype=data["dtype"],
            token_grid=data.get("token_grid"),
        )


def canonical_feature(name: str, layers: int) -> str:
    """Give a feature its stored name: `tokens.-1` of a 12-block tower is `tokens.12`.

    `tokens.<k>` and `cls.<k>` count the residual stream after block k; k = 0 is after ln_pre, k = layers (or -1) the last.
    `summary.<k>` is what block k+1 needs of it (see summary.py), so that `summary.-2` is the last.

    Raises:
        UnknownName: not a feature, or a layer that the tower lacks.
    """
    kind, _, layer = name.partition(".")
    if name in ("embedding", "pixels"):
        return name
    if kind in ("tokens", "cls", "summary") and re.fullmatch("-?[0-9]{1,9}", layer):
        k = int(layer)
        k = k + layers + 1 if k < 0 else k
        last = layers - 1 if kind == "summary" else layers
        if 0 <= k <= last:
            return f"{kind}.{k}"
        raise UnknownName(
            "feature", name, (f"{kind}.{i}" for i in (*range(-layers - 1, last - layers), *range(last + 1)))
        )
    choices = ("embedding", "pixels", "cls.-1", "tokens.-1", "cls.0", "tokens.0", "summary.-2")
    raise UnknownName("feature", name, choices)


def canonical_features(names: Iterable[str], layers: int) -> tuple[str, ...]:
    """Canonical names, each once, sorted by kind and layer."""
    found = {canonical_feature(name, layers) for name in names}
    return tuple(sorted(found, key=lambda n: (n.partition(".")[0], int(n.partition(".")[2] or 0))))


def arrays_of(feature: str, dtype: str) -> tuple[str, ...]:
    """The arrays that hold a canonical feature: itself, and in an int8 store the scales of its tokens."""
    kind, _, layer = feature.partition(".")
    return (feature, f"scale.{layer}") if dtype == "int8" and kind == "tokens" else (feature,)


def feature_shape(name: str, shape: TowerShape, size_px: int) -> tuple[int, ...]:
    """Shape of one frame.

    tokens [1+N, D], their scales [1+N], cls [D], summary [3D + 2·heads], embedding [E], pixels [3, S, S].
    """
    match name.partition(".")[0]:
        case "scale":
            return (1 + shape.n_patches,)
        case "tokens":
            return (1 + shape.n_patches, shape.width)
        case "cls":
            return (shape.width,)
        case "summary":
            return (3 * shape.width + 2 * shape.heads,)
        case "embedding":
            return (shape.embed_dim,)
        case "pixels":
            return (3, size_px, size_px)
        case _:
            raise UnknownName("feature", name, ("embedding", "pixels", "cls.<k>", "summary.<k>", "tokens.<k>"))


def _one_of(kind: str, name: str, choices: tuple[str, ...]) -> None:
    if name not in choices:
        raise UnknownName(kind, name, choices)


def _whole(name: str, value: int | None, needed: bool | None, what: str) -> None:
    """Refuse a count that is below 1, missing where it is needed, or there where it means nothing (`needed` False)."""
    if value is None and needed:
        raise ConfigError(f"{what} needs {name}", wanted="1 or more")
    if value is not None and needed is False:
        raise ConfigError(f"{what} takes no {name}", seen=f"{name}={value}")
    if value is not None and value < 1:
        raise ConfigError(f"{name} must be at least 1", seen=f"{name}={value}")
    most = _MOST if name in ("clips", "draws") else 1_000_000
    if value is not None and value > most:
        raise ConfigError(f"{name} must be at most {most:,}", seen=f"{name}={value}")


def _identity(spec: Any) -> dict[str, Any]:
    """The fields that can change a value, nested; None and non-identity fields left out."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(spec):
        value = getattr(spec, f.name)
        if value is None or not f.metadata.get("identity", True):
            continue
        found[f.name] = _identity(value) if dataclasses.is_dataclass(value) else value
    return found


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
