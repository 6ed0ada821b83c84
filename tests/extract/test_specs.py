"""Identity: what names a store and what does not, and how features are named."""

from __future__ import annotations

import dataclasses

import pytest

from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.extract.specs import (
    IMPORTED,
    FeatureSpec,
    FrameSpec,
    SpecMismatch,
    TowerShape,
    TowerSpec,
    TransformSpec,
    canonical_feature,
    canonical_features,
    feature_shape,
)

TRANSFORM = TransformSpec(224, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
TOWER = TowerSpec("ViT-B-16", "openai", "ab" * 32, True, "fp32", TRANSFORM)
SPEC = FeatureSpec(FrameSpec(), TOWER)
SHAPE = TowerShape(12, 768, 12, 512, (14, 14), 512, 12, 8, 77)


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(SPEC, dtype="float32"),
        dataclasses.replace(SPEC, frames=FrameSpec(n_frames=16)),
        dataclasses.replace(SPEC, frames=FrameSpec(decoder="pyav")),
        dataclasses.replace(SPEC, tower=dataclasses.replace(TOWER, quick_gelu=False)),
        dataclasses.replace(SPEC, tower=dataclasses.replace(TOWER, weights_sha256="cd" * 32)),
        dataclasses.replace(SPEC, tower=dataclasses.replace(TOWER, precision="fp16")),
        dataclasses.replace(
            SPEC, tower=dataclasses.replace(TOWER, transform=dataclasses.replace(TRANSFORM, size_px=336))
        ),
    ],
)
def test_whatever_can_change_a_value_changes_the_fingerprint(other: FeatureSpec) -> None:
    assert other.fingerprint != SPEC.fingerprint
    with pytest.raises(SpecMismatch, match="was made with another"):
        SPEC.expect(other, "the store")


def test_where_weights_came_from_does_not() -> None:
    same = dataclasses.replace(SPEC, tower=dataclasses.replace(TOWER, pretrained="weights.pt"))
    assert same.fingerprint == SPEC.fingerprint
    SPEC.expect(same, "the store")


def test_the_fingerprint_is_the_same_everywhere_and_for_ever() -> None:
    assert SPEC.fingerprint == "ae971f5c9ee3d505"
    assert FeatureSpec.from_json(SPEC.to_json()) == SPEC


def test_another_format_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="version 99"):
        FeatureSpec.from_json(SPEC.to_json() | {"format_version": 99})


def test_layers_count_from_either_end() -> None:
    assert canonical_feature("tokens.-1", 12) == "tokens.12"
    assert canonical_feature("cls.-13", 12) == canonical_feature("cls.0", 12) == "cls.0"
    assert canonical_features(["tokens.12", "embedding", "tokens.-1", "tokens.2"], 12) == (
        "embedding",
        "tokens.2",
        "tokens.12",
    )
    assert canonical_feature("summary.-2", 12) == canonical_feature("summary.11", 12) == "summary.11"
    assert canonical_feature("summary.-13", 12) == "summary.0"
    for name in (
        "summary.12",
        "summary.-1",
        "summary.-14",
        "summary",
        "tokens.13",
        "tokens.-14",
        "tokens",
        "patches.1",
        "cls.x",
        "cls.²",
        "cls.١",
        "cls.--1",
        "cls." + "1" * 5000,
    ):
        with pytest.raises(UnknownName):
            canonical_feature(name, 12)


def test_shapes_of_one_frame() -> None:
    assert feature_shape("tokens.12", SHAPE, 224) == (197, 768)
    assert feature_shape("cls.12", SHAPE, 224) == (768,)
    assert feature_shape("summary.11", SHAPE, 224) == (2328,)
    assert feature_shape("embedding", SHAPE, 224) == (512,)
    assert feature_shape("pixels", SHAPE, 224) == (3, 224, 224)


def test_imported_frames_are_nobodys_and_of_any_length() -> None:
    frames = FrameSpec(None, IMPORTED, IMPORTED)
    assert (frames.n_views, frames.describe()) == (1, "as imported")
    for sampling, decoder in ((IMPORTED, "auto"), ("all", IMPORTED)):
        with pytest.raises(UnknownName, match="is named 'imported'"):
            FrameSpec(None, sampling, decoder)
    with pytest.raises(ConfigError, match="takes no n_frames"):
        FrameSpec(8, IMPORTED, IMPORTED)
