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
DTYPES = ("float16", "bfloat16", "float32")
PRECISIONS = ("fp32", "bf16", "fp16")


class SpecMismatch(ColdframeError, ValueError):
    """A store or checkpoint was made otherwise than this run expects; names the field and both values."""


@dataclass(frozen=True, slots=True)
class FrameSpec:
    """Which frames of a video are kept, and who decodes them."""

    n_frames: int = 8
    sampling: str = "uniform"  # the centres of n_frames equal segments
    decoder: str = "auto"  # auto: decord where it is good, else PyAV | decord | pyav

    def __post_init__(self) -> None:
        """Refuse what no decoder could do."""
        if self.n_frames < 1:
            raise ConfigError("a video needs at least one frame", seen=f"n_frames={self.n_frames}", wanted="1 or more")
        if self.sampling not in ("uniform",):
            raise UnknownName("sampling", self.sampling, ("uniform",))
        if self.decoder not in ("auto", "decord", "pyav"):
            raise UnknownName("decoder", self.decoder, ("auto", "decord", "pyav"))


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
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse a dtype that the format does not have."""
        if self.dtype not in DTYPES:
            raise UnknownName("dtype", self.dtype, DTYPES)

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of every field that can change a value.

        Fields that are None are left out, so that a field added later with the default None renames no store.
        """
        return hashlib.sha256(json.dumps(_identity(self), sort_keys=True).encode()).hexdigest()[:16]

    def expect(self, other: FeatureSpec, what: str) -> None:
        """Raise SpecMismatch, naming the first field in which `other` differs from this spec."""
        mine, theirs = _flat(_identity(self)), _flat(_identity(other))
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise SpecMismatch(
                    f"{what} was made with another {name}",
                    seen=repr(mine.get(name)),
                    wanted=repr(theirs.get(name)),
                    fix="Ask for the same setting, or write to another store.",
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
        )


def canonical_feature(name: str, layers: int) -> str:
    """Give a feature its stored name: `tokens.-1` of a 12-block tower is `tokens.12`.

    `tokens.<k>` and `cls.<k>` count the residual stream after block k; k = 0 is after ln_pre, k = layers (or -1) the last.

    Raises:
        UnknownName: not a feature, or a layer that the tower lacks.
    """
    kind, _, layer = name.partition(".")
    if name in ("embedding", "pixels"):
        return name
    if kind in ("tokens", "cls") and re.fullmatch("-?[0-9]{1,9}", layer):
        k = int(layer)
        k = k + layers + 1 if k < 0 else k
        if 0 <= k <= layers:
            return f"{kind}.{k}"
        raise UnknownName("feature", name, (f"{kind}.{i}" for i in range(-layers - 1, layers + 1)))
    raise UnknownName("feature", name, ("embedding", "pixels", "cls.-1", "tokens.-1", "cls.0", "tokens.0"))


def canonical_features(names: Iterable[str], layers: int) -> tuple[str, ...]:
    """Canonical names, each once, sorted by kind and layer."""
    found = {canonical_feature(name, layers) for name in names}
    return tuple(sorted(found, key=lambda n: (n.partition(".")[0], int(n.partition(".")[2] or 0))))


def feature_shape(name: str, shape: TowerShape, size_px: int) -> tuple[int, ...]:
    """Shape of one frame of a canonical feature: tokens [1+N, D], cls [D], embedding [E], pixels [3, S, S]."""
    match name.partition(".")[0]:
        case "tokens":
            return (1 + shape.n_patches, shape.width)
        case "cls":
            return (shape.width,)
        case "embedding":
            return (shape.embed_dim,)
        case "pixels":
            return (3, size_px, size_px)
        case _:
            raise UnknownName("feature", name, ("embedding", "pixels", "cls.<k>", "tokens.<k>"))


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
