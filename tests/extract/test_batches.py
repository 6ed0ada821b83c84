"""Batches: the right videos in the right order, and threads that never outlive their reader."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch

from coldframe.data_manifests.errors import UnknownName
from coldframe.extract.arrays import StoreError
from coldframe.extract.batches import FeatureBatch, FeatureDataset, labelled
from coldframe.extract.specs import FrameSpec, SpecMismatch
from coldframe.extract.store import FeatureStore
from coldframe.extract.writer import FeatureWriter

IDS = [f"{n:02d}.mp4" for n in range(10)]
LABELS = np.array([0, 1, 2, -1, 1, 1, 0, 2, 1, -1])


@pytest.fixture
def dataset(toy) -> FeatureDataset:
    return FeatureDataset(toy.write(IDS, lengths={IDS[4]: 5}), IDS, LABELS, ["tokens.-1", "embedding"])


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("feature-batches")]


def test_a_batch_holds_what_its_videos_hold(dataset: FeatureDataset, toy) -> None:
    batch = dataset.all()
    assert len(batch) == len(dataset) == 10
    assert batch.video_ids == tuple(IDS)
    assert batch.labels.tolist() == LABELS.tolist()
    assert set(batch.features) == {"embedding", "tokens.2"}
    assert batch.mask.sum(1).tolist() == [5 if i == IDS[4] else 3 for i in IDS]
    assert not batch["tokens.2"][~batch.mask].any()
    np.testing.assert_array_equal(batch["tokens.2"][6, :3].float().numpy(), toy.numbers(IDS[6], "tokens.2"))
    with pytest.raises(UnknownName, match="feature in this batch"):
        _ = batch["tokens.1"]


def test_selected_rows_keep_together(dataset: FeatureDataset) -> None:
    batch = dataset.all()
    part = batch.select(torch.tensor([7, 2, 7]))
    assert part.video_ids == (IDS[7], IDS[2], IDS[7])
    assert part.labels.tolist() == [2, 2, 2]
    assert torch.equal(part["embedding"], batch["embedding"][[7, 2, 7]])
    assert torch.equal(part.mask, batch.mask[[7, 2, 7]])


def test_padding_is_looked_for_before_a_batch_goes_to_a_device() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    batch = FeatureBatch({"embedding": torch.ones(2, 2, 3)}, mask, torch.arange(2), ("a", "b"))
    whole = batch.select(torch.tensor([0]))
    assert torch.equal(batch.real, mask)
    assert whole.real is None
    for one, has_padding in ((batch, True), (whole, False)):
        there = one.to("meta")  # where nothing can be looked at
        assert (there.real is not None) == has_padding
        assert (there.only(["embedding"]).real is not None) == has_padding


def test_a_dtype_is_given_to_floats_alone() -> None:
    features = {"embedding": torch.ones(2, 3, 4).half(), "pixels": torch.ones(2, 3, 3, 8, 8, dtype=torch.uint8)}
    batch = FeatureBatch(features, torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 1]), ("a", "b"))
    moved = batch.to("cpu", torch.float32)
    assert moved["embedding"].dtype == torch.float32
    assert moved["pixels"].dtype == torch.uint8
    assert batch["embedding"].dtype == torch.float16
    assert batch.to("cpu")["embedding"].dtype == torch.float16


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_an_epoch_is_every_video_once_in_an_order_of_its_seed(dataset: FeatureDataset, ahead: int) -> None:
    def order(seed: int | None) -> list[str]:
        return [i for batch in dataset.batches(4, seed, ahead=ahead) for i in batch.video_ids]

    assert order(None) == IDS
    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == IDS
    for batch in dataset.batches(4, 7, ahead=ahead):
        assert batch.labels.tolist() == [LABELS[IDS.index(i)] for i in batch.video_ids]
        alone, _ = dataset.store.gather(batch.video_ids, ["tokens.2"])
        assert torch.equal(batch["tokens.2"], alone["tokens.2"])


def test_the_last_batch_may_be_left_out(dataset: FeatureDataset) -> None:
    assert [len(batch) for batch in dataset.batches(4)] == [4, 4, 2]
    assert [len(batch) for batch in dataset.batches(4, drop_last=True)] == [4, 4]
    assert [len(batch) for batch in dataset.batches(16)] == [10]
    assert list(dataset.batches(16, drop_last=True)) == []


def test_batches_that_are_kept_stay_as_they_are(dataset: FeatureDataset) -> None:
    kept = list(dataset.batches(3, 5))
    for batch in kept:
        alone, _ = dataset.store.gather(batch.video_ids, ["tokens.2"])
        assert torch.equal(batch["tokens.2"], alone["tokens.2"])


def test_an_epoch_left_early_stops_its_threads(dataset: FeatureDataset) -> None:
    epoch = dataset.batches(2, 0, ahead=2)
    next(epoch)
    assert readers()
    epoch.close()
    assert readers() == []


def test_an_error_of_the_disk_reaches_the_reader_at_its_batch(toy) -> None:
    store = toy.write(IDS, ["tokens.2"], per_shard=5)
    second = sorted((store.path / "shards").iterdir())[1]
    (second / "features.zarr" / "tokens.2" / "c.0.0.0").write_bytes(b"")
    epoch = FeatureDataset(store, IDS, LABELS, ["tokens.2"]).batches(5)
    assert next(epoch).video_ids == tuple(IDS[:5])
    with pytest.raises(StoreError, match="ends too soon"):
        next(epoch)
    assert readers() == []


def test_what_the_store_lacks_is_refused_before_the_first_batch(toy) -> None:
    store = toy.write(IDS, ["embedding"], failed={IDS[3]: "gone"})
    with pytest.raises(SpecMismatch, match=r"needs tokens\.1"):
        FeatureDataset(store, IDS[:2], LABELS[:2], ["tokens.1"])
    with pytest.raises(StoreError, match="gone"):
        FeatureDataset(store, IDS, LABELS, ["embedding"])
    with pytest.raises(ValueError, match="labels of shape"):
        FeatureDataset(store, IDS[:2], LABELS, ["embedding"])


def test_classes_are_counted_without_the_unknown(dataset: FeatureDataset) -> None:
    assert dataset.class_counts().tolist() == [2, 4, 2]
    assert dataset.class_counts(5).tolist() == [2, 4, 2, 0, 0]


def test_labelled_videos_and_the_missing_ones(toy) -> None:
    store = toy.write(IDS[:8], ["embedding"], failed={IDS[2]: "gone"})
    manifest = toy.manifest(IDS)  # train, train, test, test, train, train, …; labels 0, 1, 0, 1, …
    ids, labels, missing = labelled(store, manifest)
    assert ids == (*IDS[:2], *IDS[3:8])
    assert labels.tolist() == [0, 1, 1, 0, 1, 0, 1]
    assert missing == (IDS[2], *IDS[8:])
    ids, labels, missing = labelled(store, manifest, "test")
    assert (ids, labels.tolist(), missing) == ((IDS[3], IDS[6], IDS[7]), [1, 0, 1], (IDS[2],))
    assert len(FeatureDataset(store, ids, labels, ["embedding"]).all()) == 3
    assert labelled(store, manifest, "val")[0] == ()


def test_a_data_set_of_an_empty_split_has_no_batches(toy) -> None:
    dataset = FeatureDataset(toy.write(IDS), (), np.array([], dtype=np.int64), ["embedding"])
    assert list(dataset.batches(4, 0)) == []
    assert dataset.all()["embedding"].shape == (0, 0, 4)


def test_a_store_opened_twice_gives_the_same_batches(dataset: FeatureDataset) -> None:
    other = FeatureDataset(FeatureStore.open(dataset.store.path), IDS, LABELS, dataset.features)
    for one, two in zip(dataset.batches(4, 3), other.batches(4, 3), strict=True):
        assert torch.equal(one["tokens.2"], two["tokens.2"])


def test_an_epoch_draws_views_by_its_seed_and_an_ordered_pass_takes_the_one_asked_for(toy) -> None:
    n_views = 4
    frames = FrameSpec(3, "random", seed=0, draws=n_views)
    spec = dataclasses.replace(toy.spec(), frames=frames)
    with FeatureWriter.open(toy.path, spec, toy.shape, ["embedding"], toy.manifest(IDS)) as writer:
        shard = writer.begin_shard(writer.remaining())
        for i in writer.ids:
            numbers = np.repeat(np.arange(n_views, dtype=np.float32), 3)[:, None].repeat(
                4, axis=1
            )  # a view's own number
            rows = np.arange(3 * n_views).reshape(n_views, 3)
            shard.add(i, {"embedding": numbers}, toy.info(views=tuple(range(n_views)), rows=rows))
        shard.commit()
    dataset = FeatureDataset(FeatureStore.open(toy.path), IDS, LABELS, ["embedding"])

    def drawn(seed: int | None, view: int | None = None) -> list[int]:
        epoch = dataset.batches(3, seed, view=view)
        return [int(number) for batch in epoch for number in batch["embedding"][:, 0, 0]]

    assert set(drawn(None)) == {0}
    assert set(drawn(None, view=2)) == set(drawn(5, view=2)) == {2}
    seen = [drawn(seed) for seed in range(6)]
    assert drawn(0) == seen[0] != seen[1]
    assert {number for epoch in seen for number in epoch} == {0, 1, 2, 3}
