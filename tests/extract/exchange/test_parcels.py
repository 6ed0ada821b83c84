"""Names and numbers on their way out of a store."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coldframe.extract.exchange.parcels import array_name, from_store, path_of
from coldframe.extract.store import FeatureStore


@pytest.mark.parametrize(
    ("video_id", "path"),
    [
        ("clap/clip.avi", "clap/clip.avi"),
        ("s3://bucket/a.mp4", "s3:/%2Fbucket/a.mp4"),
        ("/abs/a.mp4", "%2Fabs/a.mp4"),
        ("a/", "a%2F"),
        ("../a/./b/..", "%2E%2E/a/%2E/b/%2E%2E"),
        ("..a/b.../c", "..a/b.../c"),
        ("100%2F", "100%252F"),
    ],
)
def test_an_id_is_a_relative_path_of_its_own(video_id: str, path: str) -> None:
    assert path_of(video_id) == path


def test_a_first_view_has_the_features_name() -> None:
    assert (array_name("cls.2", 0), array_name("cls.2", 3)) == ("cls.2", "cls.2@3")


def test_bfloat16_travels_as_its_bits(toy) -> None:
    store = toy.write(["a", "b"], ["embedding", "pixels"], dtype="bfloat16")
    parcel = from_store(store, store.features, store.manifest)
    bits = parcel.read("a", 0)["embedding"]
    kept = torch.from_numpy(toy.numbers("a", "embedding")).to(torch.bfloat16)
    np.testing.assert_array_equal(bits, kept.view(torch.uint16).numpy())
    np.testing.assert_array_equal(parcel.read("b", 0)["pixels"], toy.numbers("b", "pixels"))


def test_bits_of_a_nan_stay_what_they_are(toy) -> None:
    odd = np.full((3, 4), 0xFFC1, dtype=np.uint16)
    with toy.open(["a"], ["embedding"], dtype="bfloat16") as writer:
        shard = writer.begin_shard(["a"])
        shard.add("a", {"embedding": odd}, toy.info())
        shard.commit()
    store = FeatureStore.open(toy.path)
    np.testing.assert_array_equal(from_store(store, ("embedding",), store.manifest).read("a", 0)["embedding"], odd)
